"""Measure how fast training is and what its time goes to. A command, not a test.

    python -m tests.benchmark                       # a training step of CPC on S4, part by part
    python -m tests.benchmark all --size base       # of every objective
    python -m tests.benchmark growth                # as batch, length, width and records grow
    python -m tests.benchmark convolutions          # S4's: by FFT, by matrices

Every row is measured in a process of its own, so that its peak of memory is its own too. Times are
medians of seven. Writes a CSV, and of growth a picture, to --out.
"""
import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, chdir
from dataclasses import asdict
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch

import train
from data import Contract, Dataset
from evaluate import write_csv
from models import (S4, Encoder, autocast, config_of, fft_conv, pick_device, to_device,
                    toeplitz_conv)
from objectives import CPC, OBJECTIVES, VQBeat
from scaling import flops

PARTS = ('data', 'stem', 'backbone', 'teacher', 'objective', 'backward', 'optimiser')
GROWTH = {'batch': (8, 16, 32, 64, 128), 'seconds': (2.5, 5, 10, 20, 60),
          'width': (48, 88, 160, 288, 512), 'records': (10_000, 100_000, 1_000_000)}
CONVOLUTIONS = {'fft': fft_conv, 'toeplitz': toeplitz_conv, 'toeplitz bf16': toeplitz_conv}
LENGTHS = (75, 300, 1200, 7200)                            # of a convolution, in tokens


def now(device):
    """The clock in ms, read when the device has done what it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return 1e3 * time.perf_counter()


def timed(work, device):
    """How long work() takes, in ms."""
    began = now(device)
    work()
    return now(device) - began


def usual_time(work, device):
    """The median, after two to warm up."""
    return median([timed(work, device) for _ in range(9)][2:])


def peak_memory(device):
    """The most memory that this process has used, of a GPU or else of the machine, in MB."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    import resource                                        # Windows has none; of macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10


def alone(work, *arguments):
    """work(*arguments) in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(work, *arguments).result()


def watch(step, objective, optimiser, device):
    """The ms of each part of a step, with a clock around it, for which a GPU has to wait."""
    spent = Counter()

    def clocked(part, work):
        def run(*arguments):
            began = now(device)
            out = work(*arguments)
            spent[part] += now(device) - began
            return out
        return run

    places = [('data', Dataset, 'batch'), ('stem', objective.encoder, 'tokens'),
              ('backbone', objective.encoder, 'backbone'), ('objective', objective, 'forward'),
              ('backward', torch.Tensor, 'backward'), ('optimiser', optimiser, 'step'),
              ('optimiser', torch.nn.utils, 'clip_grad_norm_'),
              ('optimiser', objective, 'after_step')]
    if hasattr(objective, 'teacher'):
        places.append(('teacher', objective.teacher, 'forward'))
    with ExitStack() as stack:
        for part, owner, name in places:
            work = clocked(part, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, work))
        step()
    spent['objective'] -= spent['stem'] + spent['backbone'] + spent['teacher']    # ran inside it
    return [spent[part] for part in PARTS]


def measure_step(name, size, batch):
    """A training step, its parts, and a large matrix product, measured in turn. products_ms: what
    the step's own products would take at the speed of the large one."""
    device = pick_device()
    run = train.make_parser().parse_args(['--objective', name, '--size', size])
    if name == 'beats':
        run.tokenizer = 'untrained'
        train.load_tokenizer = lambda *_: VQBeat(Encoder(config_of('beat', size)))
    train.fill_in(run)
    ds = Dataset('synthetic', device)
    rows, columns = ds.split()[0], ds.columns('findings')
    objective, optimiser, _ = train.start(run, ds, columns, (), None, device)

    def step():
        crops = to_device(ds.batch(rows, round(240 * run.window), batch, 0, 0), device)
        train.take_step(run, 0, crops, objective, objective, optimiser)

    kind = torch.bfloat16 if device.type == 'cuda' else torch.float32
    left, right = (torch.randn(n, 1024, device=device, dtype=kind) for n in (9600, 1024))
    step()
    step()
    memory = peak_memory(device)
    tries = [[timed(step, device), timed(lambda: left @ right, device),
              *watch(step, objective, optimiser, device)] for _ in range(7)]
    whole, product, *parts = map(median, zip(*tries))
    products = flops(step) * product / (2 * left.numel() * 1024)
    return dict(objective=name, backbone=run.backbone, size=size, batch=batch,
                crops_per_second=1e3 * batch / whole, step_ms=whole,
                **{f'{part}_ms': ms for part, ms in zip(PARTS, parts)}, memory_mb=memory,
                products_ms=products, times_products=whole / products)


def measure_growth(axis, value):
    """A CPC step of S4 4x88 on 16 crops of 2.5 s, but for one of these."""
    batch, seconds, width = (dict(batch=16, seconds=2.5, width=88) | {axis: value}).values()
    device = pick_device()
    objective = CPC(Encoder(config_of('s4', f'4x{width}', causal=True))).to(device)
    x = torch.randn(batch, round(240 * seconds), 12, device=device)
    before = peak_memory(device)

    def step():
        with autocast(device):
            objective(dict(x=x.transpose(1, 2)))[0].backward()

    ms = usual_time(step, device)
    return dict(axis=axis, value=value, ms=ms, memory_mb=peak_memory(device) - before)


def measure_records(axis, value):
    """Opening a dataset of so many records, and drawing a batch of 32."""
    cpu = torch.device('cpu')
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        alone(write_many, value)
        before, began = peak_memory(cpu), now(cpu)
        ds = Dataset('many')
        opened, rows = now(cpu) - began, ds.split()[0]
        ms = usual_time(lambda: ds.batch(rows, 600, 32, 0, 0), cpu)
    return dict(axis=axis, value=value, ms=ms, memory_mb=peak_memory(cpu) - before, open_ms=opened)


def write_many(count):
    """The dataset `many`. Its signals and labels are files with a hole, which need no room."""
    folder, number, T = Path('datasets/many'), np.arange(count), 2400
    folder.mkdir(parents=True)
    np.memmap(folder / 'signals.i16', np.int16, 'w+', shape=(count * T, 12))
    np.lib.format.open_memmap(folder / 'labels.npy', 'w+', np.float32, (count, 246))
    names, peaks = np.char.mod('many/%d', number), np.arange(100, T, 200)         # 72 a minute
    np.savez(folder / 'index.npz', offset=T * number, length=np.full(count, T), age=number,
             sex=number % 2, fold=number % 10, peaks=np.tile(peaks, count),
             peak_start=len(peaks) * np.arange(count + 1), id=names, patient=names, signal=names)
    meta = dict(contract=asdict(Contract()), labels=[], tasks={}, records=count, hash='many')
    (folder / 'meta.json').write_text(json.dumps(meta))


def measure_convolution(L, name):
    """512 channels of 9,600 tokens in all, forward and backward. error: the largest difference
    from float64 over the largest value, of 8 channels."""
    device, convolve = pick_device(), CONVOLUTIONS[name]
    past, ahead = S4(512, causal=False).kernel(L).detach().to(device)
    kernel = torch.cat([ahead[:, 1:].flip(1), past], 1)
    u = torch.randn(512, max(1, 9600 // L), L, device=device)
    exact = fft_conv(u[:8].double(), kernel[:8].double())
    kind = torch.bfloat16 if 'bf16' in name else torch.float32
    u, kernel = (t.to(kind).requires_grad_() for t in (u, kernel))
    ms = usual_time(lambda: convolve(u, kernel).sum().backward(), device)
    error = (convolve(u, kernel)[:8] - exact).abs().max() / exact.abs().max()
    return dict(tokens=L, way=name, ms=ms, error=error.item())


def jobs_of(a, cuda):
    """What to call for each row: a function and its arguments."""
    if a.what == 'growth':
        return [(measure_records if axis == 'records' else measure_growth, axis, value)
                for axis, values in GROWTH.items() for value in values]
    if a.what == 'convolutions':                           # longer matrices would take gigabytes
        return [(measure_convolution, L, name) for L in LENGTHS for name in CONVOLUTIONS
                if name == 'fft' or L <= (1200 if cuda else 300) and (cuda or 'bf16' not in name)]
    names = OBJECTIVES if a.what == 'all' else [a.what]
    return [(measure_step, name, a.size, a.batch) for name in names]


def main(argv=None):
    """The command line: see the top of the file."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', nargs='?', default='cpc',
                   choices=['all', 'growth', 'convolutions', *OBJECTIVES])
    p.add_argument('--size', default='tiny', help='of the encoders')
    p.add_argument('--batch', type=int, default=32, help='crops of a step')
    p.add_argument('--out', default='out', help='folder for the tables')
    a, rows, cuda = p.parse_args(argv), [], torch.cuda.is_available()
    device, threads = torch.cuda.get_device_name() if cuda else 'cpu', torch.get_num_threads()
    print(f'{device}, {threads} threads, torch {torch.__version__}')
    os.makedirs(a.out, exist_ok=True)
    for work, *arguments in jobs_of(a, cuda):
        row = alone(work, *arguments)
        row = {k: f'{v:.4g}' if isinstance(v, float) else v for k, v in row.items()}
        print(*(f'{k} {v}' for k, v in row.items()), sep='  ', flush=True)
        rows.append(dict(row, device=device, threads=threads))
        write_csv(f'{a.out}/{a.what}.csv', rows)
    if a.what == 'growth':
        from .figures import growth
        growth(a.out).savefig(f'{a.out}/growth.png')


if __name__ == '__main__':
    main()
