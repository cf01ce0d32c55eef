"""Break things on purpose and tell what became of them. A command, not a test.

    python -m tests.faults                     # some 30 minutes on two cores; --times 3 for a glance
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
from pathlib import Path

import torch

from data import Dataset, Stop
from evaluate import write_csv
from models import load

ROOT = Path(__file__).resolve().parent.parent
PREPARE = 'data.py synthetic --records 640 --out made'
TRAIN = ('train.py --data made --layers 1 --batch 8 --steps 300 --save-every 5 --log-every 5 '
         '--probe-every 100 --out out/')
SWEEP = ('scaling.py sweep params --data made --ood made:code --objective cpc --size 4x12 4x24 '
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


def log(path):
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
        command = TRAIN + 'cut'
        if Path('out/cut/ckpt.pt').exists():
            load('out/cut')
            command = 'train.py --resume --out out/cut'
        else:
            shutil.rmtree('out/cut', ignore_errors=True)   # killed before the first checkpoint
        if killed < times and kill(command, 1, .6 * seconds, rng):
            killed += 1
            continue
        must('train.py --resume --out out/cut')
        state = load('out/cut')['state']
        assert all(torch.equal(state[k], whole[k]) for k in whole)
        assert log('out/cut/log.csv') == log('out/whole/log.csv')
        shutil.rmtree('out/cut')
        compared += 1
    return killed, (f'every checkpoint loaded; {compared} runs came to their end, weights and log '
                    'equal to one never killed, bit for bit')
