"""Break things on purpose and tell what became of them: a command, not a test.

    python -m tests.faults                               # some 40 minutes on two cores; --times 3 for a glance
    python -m tests.faults --only preparing training

Kill -9 at random moments while preparing, training and sweeping; disks that refuse to write; checkpoints cut short; a dataset that
vanishes. Prints one line a fault and writes them to --out.
"""
import argparse
import csv
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data import Dataset
from evaluate import write_csv
from models import load

ROOT = Path(__file__).resolve().parent.parent
PREPARE = 'data.py synthetic --records 640 --out made'
TRAIN = 'train.py --data made --layers 1 --batch 8 --steps 300 --save-every 5 --log-every 5 --probe-every 100'
SWEEP = 'scaling.py sweep params --data made --ood made:code --objective cpc --size 4x12 4x24 --records 32 --steps 100 --lr .01 --jobs 2 --seeds 0 1'


def start(command, **how):
    """A script in a session of its own, so that it can be killed with all its workers."""
    script, *flags = command.split()
    return subprocess.Popen([sys.executable, str(ROOT / script), *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **how)


def finish(command, **how):
    """Run to the end: (exit code, what it said, seconds)."""
    began, process = time.time(), start(command, **how)
    text = process.communicate()[0].strip()
    return process.returncode, text, time.time() - began


def must(command):
    """Run to the end: seconds; raises where it fails."""
    code, text, seconds = finish(command)
    assert code == 0, text
    return seconds


def kill(command, least, most, rng):
    """Kill -9 a script and its workers after a random time; True if it had not ended by then."""
    process, until = start(command), time.time() + rng.uniform(least, most)
    while process.poll() is None and time.time() < until:
        time.sleep(.01)
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return running


def preparing(times, rng):
    """The dataset of before, whole, or the new one, whole; and at last the same as without kills."""
    commands, seconds = {}, 0.
    for command in (PREPARE + ' --seed 1', PREPARE):
        seconds = must(command)
        commands[Dataset('made').hash] = command
    killed = stood = 0
    while killed < times:
        before = Dataset('made').hash
        killed += kill(next(c for hash_, c in commands.items() if hash_ != before), .3 * seconds, 1.02 * seconds, rng)
        after = Dataset('made').hash                             # raises where it is damaged
        assert after in commands
        stood += after == before
    must(PREPARE)
    assert commands[Dataset('made').hash] == PREPARE and not [p for p in Path('datasets').iterdir() if p.name[0] == '.']
    return killed, f'whole each time: the old dataset {stood} times, else the new one; prepared again: equal to one never killed'


def state(folder):
    return load(Path(folder, 'ckpt.pt'))['state']


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def training(times, rng):
    """Every checkpoint loads; resumed to the end, weights and log equal those of a run that was never killed."""
    seconds = must(TRAIN + ' --out out/whole')
    log = lambda folder: [{k: v for k, v in r.items() if k not in ('seconds', 'crops_per_second')} for r in csv.DictReader(open(Path(folder, 'log.csv')))]
    killed = resumed = compared = 0
    while killed < times or Path('out/cut').exists():
        there = Path('out/cut/ckpt.pt').exists()
        if killed < times:
            killed += kill('train.py --resume --out out/cut' if there else TRAIN + ' --out out/cut', 1, .6 * seconds, rng)
        else:
            must('train.py --resume --out out/cut' if there else TRAIN + ' --out out/cut')
        resumed += there
        if Path('out/cut').exists() and not Path('out/cut/ckpt.pt').exists():
            shutil.rmtree('out/cut')                             # killed before the first checkpoint: nothing to resume
        elif Path('out/cut').exists() and load('out/cut/ckpt.pt')['step'] == 300 and Path('out/cut/loss.png').exists():
            assert same(state('out/cut'), state('out/whole')) and log('out/cut') == log('out/whole')
            compared += 1
            shutil.rmtree('out/cut')
    return killed, f'every checkpoint loaded, {resumed} resumptions; {compared} runs came to their end, weights and log equal to one never killed, bit for bit'


def sweeping(times, rng):
    """No row is lost, changed or doubled; finished, the sweep equals one that was never killed."""
    keep = lambda path: [tuple(v for k, v in r.items() if k != 'seconds') for r in csv.DictReader(open(path))] if Path(path).exists() else []
    rows = lambda out: {row for file in Path(out, 'runs').glob('*/rows.csv') for row in keep(file)}
    seconds, killed, seen = must(SWEEP + ' --out out/s_whole'), 0, set()
    while killed < times:
        if not kill(SWEEP + ' --out out/s_cut', 1, .7 * seconds, rng):
            compare(keep)
            shutil.rmtree('out/s_cut')
            seen = set()
            continue
        killed += 1
        now = rows('out/s_cut')
        assert seen <= now, 'a row was lost or changed'
        seen = now
    must(SWEEP + ' --out out/s_cut')
    assert seen <= rows('out/s_cut')
    compare(keep)
    return killed, 'no row lost, changed or doubled; the finished sweep equals one never killed, row for row'


def compare(keep):
    whole, cut = keep('out/s_whole/runs.csv'), keep('out/s_cut/runs.csv')
    assert len(cut) == len(set(cut)) and whole == cut


def limit(size):
    """A child in which no file may grow beyond `size` bytes: writing fails as on a full disk."""
    return dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def refusing(times, rng):
    """Writes that fail, at random sizes, while preparing and training."""
    must(TRAIN + ' --steps 5 --out out/full')                    # of two --steps the last counts
    before, hash_ = Path('out/full/ckpt.pt').read_bytes(), Dataset('made').hash
    count = 0
    for _ in range(times):
        size = rng.randrange(1000, len(before))
        for command in (PREPARE, TRAIN + ' --steps 5 --force --out out/full2'):
            code, text, _ = finish(command, **limit(size))
            assert code == 1 and 'Traceback' not in text, text
            count += 1
        shutil.rmtree('out/full2', ignore_errors=True)
        assert Dataset('made').hash == hash_
    code, text, _ = finish(TRAIN + ' --steps 5 --out out/fuller', **limit(len(before) - 500))      # that of step 0 fits, having no moments yet
    assert code == 1 and load('out/fuller/ckpt.pt')['step'] == 0
    return count + 1, f'one line and exit code 1, earlier datasets and checkpoints intact: "{text.splitlines()[-1]}"'


def cutting(times, rng):
    """Checkpoints cut short anywhere: refused in one line."""
    data, n = Path('out/whole/ckpt.pt').read_bytes() if Path('out/whole').exists() else None, 0
    if data is None:
        must(TRAIN + ' --steps 5 --out out/whole')
        data = Path('out/whole/ckpt.pt').read_bytes()
    Path('out/short').mkdir()
    for _ in range(times):
        Path('out/short/ckpt.pt').write_bytes(data[:rng.randrange(len(data))])
        for command in ('train.py --resume --out out/short', 'evaluate.py out/short --data made'):
            code, text, _ = finish(command)
            assert code == 1 and 'Traceback' not in text and 'cannot be read as a checkpoint' in text, text
            n += 1
    return n, 'refused in one line each time, by train.py --resume and by evaluate.py'


def vanishing(times, rng):
    """The dataset's folder is moved away in the middle of a run."""
    process = start(TRAIN + ' --out out/gone')
    while not Path('out/gone/log.csv').exists():
        time.sleep(.05)
    os.rename('datasets/made', 'datasets/away')
    text = process.communicate()[0]
    code, again, _ = finish('train.py --resume --out out/gone')
    os.rename('datasets/away', 'datasets/made')
    assert process.returncode == 0 and code == 1 and 'Traceback' not in text + again
    return 1, f'the run went on, since it held the file open, and ended with code {process.returncode}; the next start says "{again.splitlines()[-1][:100]}"'


FAULTS = dict(preparing=preparing, training=training, sweeping=sweeping, refusing=refusing, cutting=cutting, vanishing=vanishing)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--times', type=int, default=20)
    p.add_argument('--only', nargs='+', choices=list(FAULTS), default=list(FAULTS))
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', default='out/faults.csv')
    a = p.parse_args()
    out, rows = Path(a.out).absolute(), []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        must(PREPARE)
        for name in a.only:
            began = time.time()
            count, what = FAULTS[name](a.times, random.Random(a.seed))
            rows.append(dict(fault=name, times=count, outcome=what, seconds=round(time.time() - began)))
            print(f'{name}, {count} times: {what} ({rows[-1]["seconds"]} s)', flush=True)
            write_csv(out, rows)
        os.chdir('/')


if __name__ == '__main__':
    main()
