"""Break things on purpose and tell what became of them. A command, not a test.

    python -m tests.faults                     # half an hour on two cores; --times 3: a glance
    python -m tests.faults --only preparing training

Kill -9 at random moments while preparing, training and sweeping; disks that refuse to write; files
cut short; a dataset that vanishes. Stops where something is lost. One line a fault, also in --out.
"""
import argparse
import csv
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path

import torch

from data import Dataset, Stop
from evaluate import write_csv
from models import load

ROOT = Path(__file__).resolve().parent.parent
PREPARE = 'data.py synthetic --records 640 --out made'
TRAIN = ('train.py --data made --layers 1 --batch 8 --steps 300 --save-every 5 --log-every 5 '
         '--probe-every 100 --out out/')
SWEEP = ('scaling.py sweep params --data made --ood sample:super --objective cpc --size 4x12 4x24 '
         '--records 32 --steps 100 --lr .01 --jobs 2 --seeds 0 1 --out out/')


def start(command, **options):
    """A script in a session of its own, so that it can be killed with all its workers."""
    script, *flags = command.split()
    return subprocess.Popen([sys.executable, str(ROOT / script), *flags], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True, **options)


def must(command):
    """Run a script that has to succeed: seconds."""
    began, process = time.time(), start(command)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return time.time() - began


def refused(command, **options):
    """Run a script that has to stop with one line: that line."""
    process = start(command, **options)
    said = process.communicate()[0]
    assert process.returncode == 1 and 'Traceback' not in said, said
    return said.strip().splitlines()[-1]


def kill(command, least, most, rng):
    """Kill -9 a script and its workers after a random time: True if it had not ended by then."""
    process = start(command)
    try:
        process.communicate(timeout=rng.uniform(least, most))
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True


def content():
    """A hash of the dataset's files; raises Stop where it is missing or damaged."""
    Dataset('made')
    files = (Path('datasets/made', name) for name in ('signals.i16', 'labels.npy', 'index.npz'))
    return hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()


def preparing(times, rng):
    """A dataset is the old one, the new one, or refused: never in parts."""
    commands, seconds, killed, found = {}, 0., 0, []
    for command in (PREPARE + ' --seed 1', PREPARE):
        seconds = must(command)
        commands[content()] = command
    now = content()
    while killed < times:
        other, = (command for known, command in commands.items() if known != now)
        killed += kill(other, .3 * seconds, 1.02 * seconds, rng)
        try:
            found.append('old' if content() == now else 'new')
            now = content()
            assert now in commands
        except Stop:
            found.append('refused')
            must(commands[now])
    must(PREPARE)
    assert commands[content()] == PREPARE
    assert not [path for path in Path('datasets').iterdir() if path.name[0] == '.']
    counts = ', '.join(f'{found.count(what)} times {what}' for what in ('old', 'new', 'refused'))
    return killed, f'{counts}; prepared again, equal to one never killed'


def rows(path):
    """The rows of a table, without times."""
    if not Path(path).exists():
        return []
    with open(path) as f:
        return [tuple(v for k, v in row.items() if k != 'seconds') for row in csv.DictReader(f)]


def training(times, rng):
    """Every checkpoint loads; a run that was killed ends as one that was not."""
    seconds, killed, compared = must(TRAIN + 'whole'), 0, 0
    whole = load('out/whole')['state']
    while killed < times or Path('out/cut').exists():
        command = 'train.py --resume --out out/cut'
        if not Path('out/cut/ckpt.pt').exists():           # killed before the first checkpoint
            shutil.rmtree('out/cut', ignore_errors=True)
            command = TRAIN + 'cut'
        if killed < times:
            killed += kill(command, 1, .6 * seconds, rng)
        else:
            must(command)
        if Path('out/cut/ckpt.pt').exists() and load('out/cut')['step'] == 300:
            must('train.py --resume --out out/cut')        # for its log and picture
            state = load('out/cut')['state']
            assert all(torch.equal(state[k], whole[k]) for k in whole)
            assert rows('out/cut/log.csv') == rows('out/whole/log.csv')
            shutil.rmtree('out/cut')
            compared += 1
    return killed, (f'every checkpoint loaded; {compared} runs came to their end, weights and log '
                    'equal to one never killed, bit for bit')


def sweeping(times, rng):
    """No row of a sweep is lost, changed or doubled; it ends as one that was never killed."""
    seconds, killed, before = must(SWEEP + 'sweep'), 0, set()
    while killed < times:
        ended = not kill(SWEEP + 'cut_sweep', 1, .7 * seconds, rng)
        killed += not ended
        now = {row for file in Path('out/cut_sweep/runs').glob('*/rows.csv') for row in rows(file)}
        assert before <= now, 'a row was lost or changed'
        before = now
        if ended or killed == times:
            must(SWEEP + 'cut_sweep')
            assert rows('out/cut_sweep/runs.csv') == rows('out/sweep/runs.csv')
            shutil.rmtree('out/cut_sweep')
            before = set()
    return killed, 'no row lost, changed or doubled; in the end equal to one never killed'


def limit(size):
    """For a script in which no file may grow beyond `size` bytes: writing fails as on a full
    disk."""
    return dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def refusing(times, rng):
    """Writes that fail, at random sizes: what was there before is intact."""
    must(TRAIN + 'full --steps 5')                         # of two --steps the last counts
    size, before = os.path.getsize('out/full/ckpt.pt'), content()
    for _ in range(times):
        options = limit(rng.randrange(1000, size))
        refused(PREPARE + ' --seed 1', **options)
        line = refused(TRAIN + 'refused --steps 5', **options)
        assert content() == before and not [*Path('out/refused').glob('*.partial')]
        if Path('out/refused/ckpt.pt').exists():
            assert load('out/refused')['step'] == 0        # it has no moments, so it may fit
        shutil.rmtree('out/refused', ignore_errors=True)
    return 2 * times, f'one line and exit code 1, what was there before intact: "{line}"'


def cutting(times, rng):
    """Checkpoints and datasets cut short anywhere are refused."""
    must(TRAIN + 'short --steps 5')
    lines, files = set(), [Path('out/short/ckpt.pt'), *Path('datasets/made').iterdir()]
    for i in range(times):
        file = files[i % len(files)]
        whole = file.read_bytes()
        file.write_bytes(whole[:rng.randrange(len(whole))])
        commands = ['evaluate.py out/short --data made']
        if file.suffix == '.pt':
            commands.append('train.py --resume --out out/short')
        for command in commands:
            line = refused(command)
            assert file.parent.name in line, line
            lines.add(line.split(' (')[0])
        file.write_bytes(whole)
    return times, f'refused in one line each time: {"; ".join(sorted(lines))}'


def vanishing(times, rng):
    """The dataset's folder is moved away in the middle of a run."""
    process = start(TRAIN + 'gone')
    while not Path('out/gone/log.csv').exists():
        time.sleep(.05)
    os.rename('datasets/made', 'datasets/away')
    said = process.communicate()[0]
    assert process.returncode == 0, said
    line = refused('train.py --resume --out out/gone')
    os.rename('datasets/away', 'datasets/made')
    return 1, f'the run, which holds the files open, came to its end; the next start: "{line}"'


FAULTS = dict(preparing=preparing, training=training, sweeping=sweeping, refusing=refusing,
              cutting=cutting, vanishing=vanishing)


def main():
    """The command line: see the top of the file."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--times', type=int, default=20, help='of each fault')
    p.add_argument('--only', nargs='+', choices=list(FAULTS), default=list(FAULTS))
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', default='out/faults.csv')
    a = p.parse_args()
    out, table = Path(a.out).absolute(), []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        must(PREPARE)
        for name in a.only:
            began = time.time()
            count, outcome = FAULTS[name](a.times, random.Random(a.seed))
            seconds = round(time.time() - began)
            table.append(dict(fault=name, times=count, outcome=outcome, seconds=seconds))
            print(f'{name}, {count} times: {outcome} ({seconds} s)', flush=True)
            write_csv(out, table)


if __name__ == '__main__':
    main()
