"""Pretrain an encoder.

    python train.py                           # CPC, tiny S4, synthetic ECGs: a minute on 2 cores
    python train.py --objective jepa --backbone transformer   # valid pairs: objectives.py
    python train.py --objective jepa --as_released ema     # with a deviation of the released code
    python train.py --data ptbxl --size base --steps 20000 --batch 64
    python train.py --keep 0 20 200               # for learning curves: evaluate.py RUN@20
    python train.py --resume --out out/cpc_s4_tiny_0          # go on after an interruption, exactly
    torchrun --nproc_per_node 2 train.py          # one process per GPU, each a share of the batch

The loop is the same for all objectives. Batches, masks, dropout and negatives depend on (seed,
step, process) alone, which makes resuming exact. Writes ckpt.pt, seen.npz (the patients and records
trained on), log.csv and loss.png to a new numbered folder in out/, or to --out.
"""
import argparse
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data import Contract, Dataset, Stop, read_seen, run_script, write_seen
from evaluate import first_task, online_probe, write_csv, yes_no
from models import (SIZES, Encoder, autocast, calibrate_batchnorm, config_of, count_parameters,
                    learning_rate, load, load_encoder, parameter_groups, pick_device, save,
                    to_device)
from objectives import OBJECTIVES, VQBeat, health, released_input


def within(low, high, kind=float):
    """An argparse type: a number from low to high."""
    def read(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} must lie between {low:g} and {high:g}')
        return value
    read.__name__ = kind.__name__                          # argparse names it in its messages
    return read


count, natural = within(1, 1e9, int), within(0, 1e9, int)
positive, share = within(1e-9, 1e9), within(1e-9, 1 - 1e-9)


def make_parser():
    """The command line's flags, in groups."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = list(dict.fromkeys(size for known in SIZES.values() for size in known))
    add = p.add_argument_group('model and data').add_argument
    add('--objective', type=str.lower, choices=list(OBJECTIVES), default='cpc',
        help='see python objectives.py')
    add('--backbone', type=str.lower, choices=list(SIZES),
        help='default: the first that the objective runs on')
    add('--size', choices=sizes, default='tiny', metavar='SIZE',
        help='tiny, small, base, released, or a rung of a ladder such as 5x320')
    add('--layers', type=count, help="blocks of the backbone (default: the size's)")
    add('--data', default='synthetic', help='prepared datasets, joined by commas; the training '
        'folds of each are used')
    add('--records', type=count, help='number of training records, whole patients (all)')
    add('--window', type=within(.1, 3600), help="crop in s (default: the objective's)")
    add = p.add_argument_group('for some objectives', 'list: python objectives.py').add_argument
    add('--span-ms', type=positive, help='length of hidden spans in ms (83)')
    add('--hide', type=share, help='share of tokens hidden (.49; in beats and mae .5)')
    add('--raw-target', action='store_true', default=None, help='MAE: predict millivolts')
    add('--target-norm', choices=['instance', 'layer'], help="scaling of the teacher's features")
    add('--half-life', type=positive, help='share of the run in which the distance between teacher '
        'and student halves (.05)')
    add('--momentum', type=share, help='EMA factor a step of the teacher, instead of --half-life')
    add('--teacher-mode', choices=['eval', 'train'], help="the teacher's dropout and BatchNorm")
    add('--horizon', type=count, help='tokens that CPC looks ahead (14)')
    add('--negatives', type=count, help='negatives of CPC for each prediction (128)')
    add('--codes', type=count, help='size of the vocabulary of vqbeat (8192)')
    add('--tokenizer', help='run folder of a vqbeat, whose codes beats predicts')
    add('--task', help='task that supervised trains on (default: the first)')
    add('--focal', type=positive, help='exponent of the focal loss (default: cross-entropy)')
    add('--as_released', '--as-released', type=lambda text: tuple(text.split(',')), default=(),
        metavar='WHAT', help='behaviours of the released code, any of ema,mask,lr,codebook,norm; '
        'ema, mask, codebook: see objectives.py; lr: constant .003 for the head, a tenth for the '
        'backbone, a hundredth for the stem, no warm-up, no clipping; norm: standardised input')
    add = p.add_argument_group('optimisation').add_argument
    add('--steps', type=count, default=400, help='optimiser steps (400)')
    add('--batch', type=count, default=32, help='crops a step, of all processes together (32)')
    add('--lr', type=positive, help="peak learning rate (default: the objective's)")
    add('--schedule', choices=['cosine', 'constant'], default='cosine',
        help='course of the learning rate after the warm-up')
    add('--weight-decay', type=within(0, 1e9), default=1e-3, help='of AdamW (.001)')
    add('--clip', type=positive, default=1., help='largest norm of the gradient')
    add('--warmup', type=within(0, 1), default=.05, help='share of the run (.05)')
    add('--seed', type=natural, default=0, help='of weights, batches, masks and dropout (0)')
    add('--device', help='cpu or cuda (default: cuda where there is one)')
    add('--compile', action='store_true', help='torch.compile the blocks: for long runs on a GPU')
    add = p.add_argument_group('output').add_argument
    add('--out', help='run folder (default: a new numbered one in out/)')
    add('--resume', action='store_true', help='go on from the checkpoint in --out (or the newest)')
    add('--force', action='store_true', help='overwrite the run in --out')
    add('--keep', type=natural, nargs='+', default=[], metavar='STEP',
        help='keep copies of the checkpoint at these steps')
    add('--log-every', type=count, help='steps between rows of log.csv (20; 100 on a GPU)')
    add('--save-every', type=count, default=200, help='steps between checkpoints (200)')
    add('--probe-every', type=natural, help='steps between probes (200; 2,000 on a GPU); 0: none')
    add('--probe-records', type=count, default=600, help='training records of the probe (600)')
    return p


def flag(name):
    """The flag of a setting: span_ms -> --span-ms."""
    return '--' + name.replace('_', '-')


def fill_in(a):
    """Fill in the objective's defaults in `a`. Stops at flags that do not apply to it."""
    kind = OBJECTIVES[a.objective]
    a.backbone = a.backbone or next(iter(kind.rates))
    if a.backbone not in kind.rates:
        raise Stop(f'{a.objective} does not run on {a.backbone}: take {", ".join(kind.rates)} (or '
                   f'add a learning rate to {kind.__name__}.rates in objectives.py)')
    for name in {option for other in OBJECTIVES.values() for option in other.options}:
        if getattr(a, name) is not None and name not in kind.options:
            raise Stop(f'{a.objective} has no {flag(name)}: it has '
                       f'{", ".join(map(flag, kind.options)) or "no flags"}')
    if unknown := set(a.as_released) - set(kind.released):
        raise Stop(f'--as_released {",".join(unknown)}: {a.objective} has '
                   f'{",".join(kind.released) or "nothing"} to switch')
    if 'mask' in a.as_released and a.hide is not None:
        raise Stop('--as_released mask hides a fixed share: leave --hide out')
    if a.objective == 'beats' and not a.tokenizer:
        raise Stop('beats predicts the codes of a vqbeat: train one with python train.py '
                   '--objective vqbeat --out out/vq, then add --tokenizer out/vq')
    if a.objective in ('data2vec', 'dinosr') and a.layers == 1:
        raise Stop(f'{a.objective} takes its targets from two layers: --layers must be 2 or more')
    if a.backbone == 'net1d' and a.layers and a.layers < 7:
        raise Stop('net1d: --layers must be 7 or more')
    if 'lr' in a.as_released:
        a.lr, a.warmup, a.clip, a.schedule = a.lr or 3e-3, 0., math.inf, 'constant'
    if a.keep and max(a.keep) > a.steps:
        raise Stop(f'--keep {max(a.keep)}: the run has {a.steps} steps')
    a.lr = a.lr or kind.rates[a.backbone]
    a.window = a.window or (10 if a.backbone in ('resnet', 'beat', 'vit') else kind.window)
    config_of(a.backbone, a.size)                          # stops at a size that the backbone lacks


def run_folder(a):
    """The folder to write to. Nothing is overwritten without --force."""
    if a.resume:
        found = sorted(Path('out').glob('*/ckpt.pt'), key=lambda f: f.stat().st_mtime)
        out = Path(a.out) if a.out else found[-1].parent if found else Path('out')
        if not (out / 'ckpt.pt').is_file():
            raise Stop(f'nothing to resume: no ckpt.pt in {out}')
        return out
    if a.out is None:
        name, number = f'{a.objective}_{a.backbone}_{a.size}', 0
        while Path('out', f'{name}_{number}').exists():
            number += 1
        return Path('out', f'{name}_{number}')
    out = Path(a.out)
    if out.exists() and not (a.force and (out / 'ckpt.pt').is_file()):
        raise Stop(f'{out} exists: add --resume to go on with it, --force to overwrite a run')
    return out


def load_run(folder):
    """The checkpoint of a run folder. Stops where it is missing or damaged."""
    try:
        return load(folder)
    except ValueError as e:
        raise Stop(str(e))


def load_tokenizer(path, contract):
    """The vqbeat of a run folder."""
    c = load_run(path)
    if c['objective'] != 'vqbeat' or c['step'] < c['args']['steps']:
        raise Stop(f'--tokenizer {path}: a finished run of --objective vqbeat is needed')
    if differs := Contract.read(c['contract']).differs(contract):
        raise Stop(f'--tokenizer {path} was trained under another contract ({differs})')
    tokenizer = VQBeat(load_encoder(c), codes=len(c['state']['codebook']))
    tokenizer.load_state_dict(c['state'])
    return tokenizer


def build(a, fs, columns=(), tokenizer=None, batches=()):
    """The objective around a fresh encoder. BatchNorm sees `batches` first: a teacher in eval mode
    copies its statistics, and with made-up ones its features would hardly depend on the signal."""
    kind = OBJECTIVES[a.objective]
    options = {k: getattr(a, k) for k in kind.options if getattr(a, k) is not None}
    if a.objective == 'supervised':
        options.pop('task', None)
        options['columns'] = columns
    if a.objective == 'beats':
        options['tokenizer'] = tokenizer
    if 'ema' in kind.released:
        options['released'] = a.as_released
    config = config_of(a.backbone, a.size, kind.causal, fs, a.layers)
    encoder = Encoder(config, a.window / kind.views)
    if batches:
        with torch.random.fork_rng(devices=[]):            # leaves the random state as it was
            calibrate_batchnorm(encoder, batches)
    objective = kind(encoder, steps=a.steps, **options)
    if a.objective == 'cpc' and objective.horizon >= a.window * encoder.tokens_per_second:
        raise Stop(f'{a.window} s are no more tokens than the horizon: lower --horizon')
    if a.compile:
        for block in (encoder.stem, *encoder.blocks):
            block.compile()
    return objective


def optimiser_groups(objective, a):
    """One learning rate for all parts; as released ('lr'): a tenth for the backbone and the mask
    token, a hundredth for the stem."""
    if 'lr' not in a.as_released:
        return parameter_groups(objective, a.lr, a.weight_decay)
    e = objective.encoder
    middle = nn.ModuleDict({'blocks': e.blocks, 'norm': e.norm})
    if hasattr(objective, 'mask_token'):
        middle.register_parameter('mask_token', objective.mask_token)
    parts = (objective.head, a.lr), (middle, a.lr / 10), (e.stem, a.lr / 100)
    return [g for part, lr in parts for g in parameter_groups(part, lr, a.weight_decay)]


def open_data(a, device, rank, world):
    """The Dataset. The first process prepares what is missing, the others wait for it."""
    if rank:
        dist.barrier()
    ds = Dataset(a.data, device)
    if world > 1 and not rank:
        dist.barrier()
    if 'norm' in a.as_released and ds.contract.unit != 'mV':
        raise Stop(f'--as_released norm standardises millivolts, {a.data} is in {ds.contract.unit}')
    return ds


def training_rows(a, ds):
    """Rows of the records to train on, and the label columns that supervised training learns."""
    parts = ds.split()
    rows = parts[0][ds.length[parts[0]] >= round(a.window * ds.contract.fs)]
    print(f'{a.data}: {len(ds):,} records, of which {len(parts[0]):,} train, {len(parts[1]):,} '
          f'validate, {len(parts[2]):,} test; {len(parts[0]) - len(rows):,} are too short to train')
    if not len(rows):
        raise Stop(f'no training record of {a.data} lasts {a.window} s')
    if a.records:
        rows = ds.nested(rows, a.records, a.seed)
    if a.backbone == 'beat' and not ds.peak_count[rows].any():
        raise Stop(f'{a.data} has no R-peaks: prepare it without --no-peaks')
    if a.objective != 'supervised':
        return rows, ()
    a.task = a.task or first_task(ds)
    columns = ds.columns(a.task)
    if not yes_no(ds.labels[:, columns][rows]).all():
        raise Stop(f'task {a.task} of {a.data}: yes/no labels are needed, some for every class')
    return rows, columns


def describe(a, objective, records, device, out):
    """Print what follows from the arguments and the data."""
    encoder = objective.encoder
    stem, whole, everything = map(count_parameters, (encoder.stem, encoder, objective))
    print(f'{a.objective} on {a.backbone} {a.size}, {"" if encoder.causal else "not "}causal: stem '
          f'{stem:,} + backbone {whole - stem:,} + head {everything - whole:,} parameters')
    print(f'{a.steps:,} steps of {a.batch} crops of {a.window:g} s = '
          f'{a.steps * a.batch / records:.1f} epochs of {records:,} records; lr {a.lr:g}; '
          f'{device}; {out}/')
    print(f'{"step":>7s} {"seconds":>8s} {"loss":>8s} {"gradient":>8s}  health; ! is an alarm')


def draw_log(log, path):
    """Every number of the log against the step."""
    import matplotlib.pyplot as plt
    import pandas as pd
    table = pd.DataFrame(log).set_index('step').drop(columns=['alarm', 'seconds', 'device'])
    table = table.apply(pd.to_numeric)                     # blank where no probe was taken
    table.plot(subplots=True, layout=(2, -1), figsize=(13, 6), style={'probe': 'o'}, legend=False,
               title=list(table))
    plt.tight_layout()
    plt.savefig(path, dpi=120)
    plt.close()


def join_processes(a):
    """Join torchrun's processes, each on its own GPU if there is one. Only the first one prints.
    Returns (rank, number of processes), which is (0, 1) without torchrun."""
    world = int(os.environ.get('WORLD_SIZE', 1))
    if world == 1:
        return 0, 1
    if a.batch % world:
        raise Stop(f'--batch {a.batch} is for all processes together: take a multiple of {world}')
    cuda = torch.cuda.is_available() and a.device != 'cpu'
    a.device = f'cuda:{os.environ["LOCAL_RANK"]}' if cuda else 'cpu'
    if cuda:
        torch.cuda.set_device(a.device)
    dist.init_process_group('nccl' if cuda else 'gloo')
    if dist.get_rank():
        sys.stdout = open(os.devnull, 'w')
    return dist.get_rank(), world


def distribute(objective):
    """The objective under DistributedDataParallel. Gradients are averaged over all processes.
    Negatives, Sinkhorn and BatchNorm statistics use each process's own crops. Buffers (running
    statistics, codebooks) are copied from process 0 before every step."""
    ddp = nn.parallel.DistributedDataParallel
    constant = [name for name, _ in objective.named_buffers() if name.endswith('log_dt')]
    ddp._set_params_and_buffers_to_ignore_for_model(objective, constant)    # keeps S4's cache valid
    return ddp(objective, static_graph=True)


def prefetch(fetch, steps):
    """(step, fetch(step)) for every step; a thread makes the next batch while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(fetch, steps[0]) if steps else None
        for step in steps:
            now = batch.result()
            if step + 1 in steps:
                batch = pool.submit(fetch, step + 1)
            yield step, now


def note_interrupt():
    """A list that is empty until Ctrl-C is pressed, so that the step under way can be finished and
    saved. A second Ctrl-C stops at once."""
    pressed = []

    def note(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pressed.append(True)

    signal.signal(signal.SIGINT, note)
    return pressed


def begin(out, seen):
    """Make the run folder, delete the files of an overwritten run, and write seen.npz."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob('*'):
        if old.suffix in ('.csv', '.json', '.md', '.npz', '.png', '.pt'):
            old.unlink()
    write_seen(out, seen)


def save_run(a, out, ds, objective, optimiser, run, world):
    """Write the log, a copy of the checkpoint if the step is in --keep, and ckpt.pt. ckpt.pt comes
    last, so that it is never ahead of the other files."""
    skip = ('out', 'resume', 'force', 'device', 'compile')
    args = {k: v for k, v in vars(a).items() if k not in skip}
    contract = replace(ds.contract, window=objective.encoder.window)
    checkpoint = dict(
        run, objective=a.objective, config=asdict(objective.encoder.config), args=args,
        encoder=objective.encoder.state_dict(), state=objective.state_dict(),
        optimiser=optimiser.state_dict(), seed=a.seed, world=world, data=a.data, dataset=ds.hash,
        contract=asdict(contract), command=' '.join(sys.argv))
    write_csv(out / 'log.csv', run['log'])
    if run['step'] in a.keep:
        save(out / f'ckpt_{run["step"]}.pt', checkpoint)
    save(out / 'ckpt.pt', checkpoint)


def take_step(a, step, batch, objective, parallel, optimiser):
    """One step: forward, backward, update. Returns (loss, gradient norm before clipping, logs)."""
    for group in optimiser.param_groups:
        group['lr'] = learning_rate(step, a.steps, group['peak'], a.schedule, a.warmup)
    objective.train()
    with autocast(batch['x'].device):
        loss, logs = parallel(batch)
    loss.backward()
    learned = [p for p in objective.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(learned, a.clip)
    optimiser.step()
    optimiser.zero_grad()
    objective.after_step()
    return loss.detach(), norm, logs


def stop_broken(out, step, batch, loss, norm):
    """Save the batch whose loss or gradient was not finite or too large, and stop the run."""
    torch.save(batch, out / 'bad_batch.pt')
    raise Stop(f'at step {step} the loss or its gradient was not finite, or the gradient above '
               f'{EXPLODED:g} (last seen: loss {loss.item():g}, norm {norm.item():g}); its batch '
               f'is in {out}/bad_batch.pt, the last good state in ckpt.pt; lower --lr, start again')


def log_step(run, step, lr, loss, norm, logs, probe):
    """Add a row to the log, and print it. `step` counts from 0, but --keep and the checkpoint's
    step count finished steps."""
    numbers, alarm = health(logs)
    numbers['probe'] = probe
    run['log'].append(dict(step=step, lr=lr, loss=loss.item(), gradient=norm.item(), **numbers,
                           alarm=alarm, seconds=round(run['seconds'], 2), device=str(loss.device)))
    notes = ' '.join(f'{k} {v:.3g}' for k, v in numbers.items() if v != '')
    notes += f'  ! {alarm}' if alarm else ''
    print(f'{step:7,d} {run["seconds"]:8.1f} {loss.item():8.4f} {norm.item():8.3f}  {notes}',
          flush=True)


def conclude(a, out, log):
    """Draw a finished run's log; say whether it looked healthy, and what to do with it."""
    try:
        draw_log(log, out / 'loss.png')
    except ImportError as e:                               # training needs torch and numpy alone
        print(f'loss.png is not drawn: {e}')
    late = log[len(log) // 4:]
    if alarms := [row['alarm'] for row in late if row['alarm']]:
        print(f'! {len(alarms)} of the last {len(late)} logged steps raised an alarm '
              f'({alarms[-1]}): the features have likely collapsed')
    data = '' if a.data == 'synthetic' else f' --data {a.data}'
    print(f'{out}: ckpt.pt, log.csv; evaluate it with python evaluate.py {out}{data}')


EXPLODED = 1e6                               # norm of a gradient; in healthy runs it is under 200


def start(a, ds, columns, batches, checkpoint, device):
    """(objective, optimiser, state of the run), new or as a checkpoint has them."""
    torch.manual_seed(a.seed)
    tokenizer = load_tokenizer(a.tokenizer, ds.contract) if a.objective == 'beats' else None
    objective = build(a, ds.contract.fs, columns, tokenizer, batches).to(device)
    fused = device.type == 'cuda'
    optimiser = torch.optim.AdamW(optimiser_groups(objective, a), fused=fused)
    initial = {k: v.cpu().clone() for k, v in objective.encoder.state_dict().items()}
    run = dict(step=0, seconds=0., log=[], initial=initial)
    if checkpoint:
        objective.load_state_dict(checkpoint['state'])
        for group in checkpoint['optimiser']['param_groups']:
            group['fused'] = fused                         # it may have begun on another device
        optimiser.load_state_dict(checkpoint['optimiser'])
        run = {k: checkpoint[k] for k in run}
    return objective, optimiser, run


def train(a, out, checkpoint=None, until=None, rank=0, world=1, interrupted=()):
    """Pretrain with the arguments `a`, write the run folder, return the objective. checkpoint: the
    state to go on from. until: save and return after this many steps. rank, world: number of this
    process, and of all. interrupted: save and stop when this list is not empty."""
    device = pick_device(a.device)
    ds = open_data(a, device, rank, world)
    if checkpoint and (checkpoint['world'], checkpoint['dataset']) != (world, ds.hash):
        raise Stop(f'{out} was begun with other data or other processes ({checkpoint["world"]}): '
                   'prepare the data as it was and go on with as many, or start again')
    rows, columns = training_rows(a, ds)
    samples = round(a.window * ds.contract.fs)

    def fetch(step, size=a.batch, share=(rank, world)):
        batch = to_device(ds.batch(rows, samples, size, a.seed, step, share), device)
        if 'norm' in a.as_released:
            batch['x'] = released_input(batch['x'])
        return batch

    size = min(32, len(rows))
    batches = [to_device(fetch(i, size, (0, 1)), 'cpu') for i in range(8)]    # for BatchNorm
    objective, optimiser, run = start(a, ds, columns, batches, checkpoint, device)
    describe(a, objective, len(rows), device, out)
    if not checkpoint and not rank:
        begin(out, ds.names(rows) | (read_seen(a.tokenizer) if a.tokenizer else set()))
        save_run(a, out, ds, objective, optimiser, run, world)
    parallel = distribute(objective) if world > 1 else objective
    gpu = device.type == 'cuda'
    log_every = a.log_every or (100 if gpu else 20)
    probe_every = (2000 if gpu else 200) if a.probe_every is None else a.probe_every
    began = time.time() - run['seconds']
    stop, broken = min(until or a.steps, a.steps), torch.tensor(-1, device=device)
    for step, batch in prefetch(fetch, range(run['step'], stop)):
        done = step + 1
        torch.manual_seed(((a.seed * 1_000_003 + step) * world + rank) % 2 ** 63)
        loss, norm, logs = take_step(a, step, batch, objective, parallel, optimiser)
        healthy = loss.isfinite() & (norm < EXPLODED)
        broken = torch.where((broken < 0) & ~healthy, step, broken)
        probing = probe_every and (done in (1, a.steps) or done % probe_every == 0)
        logging = done == a.steps or probing or step % log_every == 0
        saving = done == stop or done % a.save_every == 0 or done in a.keep or bool(interrupted)
        if (not gpu or logging or saving) and broken >= 0:         # this test waits for the GPU
            stop_broken(out, broken.item(), fetch(broken.item(), share=(0, 1)), loss, norm)
        run.update(step=done, seconds=time.time() - began)
        if logging and not rank:
            probe = ''
            if probing:
                probe = online_probe(objective.encoder, ds, a.probe_records)
            log_step(run, step, optimiser.param_groups[0]['lr'], loss, norm, logs, probe)
        if saving and not rank:
            save_run(a, out, ds, objective, optimiser, run, world)
            if interrupted:
                raise Stop(f'stopped; saved at step {done}: python train.py --resume --out {out}')
    if stop == a.steps and not rank:
        conclude(a, out, run['log'])
    return objective


def main(argv=None):
    """The command line: see the top of the file."""
    parser = make_parser()
    a, checkpoint = parser.parse_args(argv), None
    if a.resume:
        out = run_folder(a)
        checkpoint = load_run(out)
        parser.set_defaults(**checkpoint['args'])
        a = parser.parse_args(argv)
        if changed := [flag(k) for k, v in checkpoint['args'].items() if getattr(a, k) != v]:
            raise Stop(f'{out} was started with other flags than {", ".join(changed)}: --resume '
                       'goes on as begun, leave them out')
    fill_in(a)
    rank, world = join_processes(a)
    out = out if a.resume else run_folder(a)
    if world > 1:
        dist.barrier()                       # until all have chosen the same folder
    interrupted = note_interrupt() if world == 1 else ()
    try:
        train(a, out, checkpoint, None, rank, world, interrupted)
    except torch.OutOfMemoryError:
        raise Stop(f'out of memory: --batch {a.batch} is too large for this GPU, halve it')
    if world > 1:
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)                          # gloo's threads may abort at an orderly exit


if __name__ == '__main__':
    run_script(main)
