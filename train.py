"""Pretrain an encoder.

    python train.py                                      # CPC with a tiny S4 on synthetic ECGs, some two minutes on two CPU cores
    python train.py --objective jepa --backbone transformer         # what goes with what: python objectives.py --pairs
    python train.py --objective jepa --as_released ema   # with one of the released code's deviations
    python train.py --data ptbxl --size base --steps 20000 --batch 64
    python train.py --resume --out out/cpc_s4_tiny_0     # go on after an interruption, exactly
    python train.py --benchmark --size base              # where a training step's time goes; --benchmark all: of every objective
    python train.py --benchmark growth                   # time and memory against batch, length, width and records
    torchrun --nproc_per_node 2 train.py                 # one process a GPU, each with its share of every batch

The loop knows nothing of the objective it runs. Batches, dropout and negatives are drawn from (seed, step, process) alone, which
makes resuming exact. Writes ckpt.pt, log.csv and loss.png to a fresh numbered folder in out/, or to --out.
"""
import argparse, json, math, multiprocessing, os, queue, sys, tempfile, threading, time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import Contract, Dataset, Stop, figure, peak_memory, script
from evaluate import auroc, embed, first_task, linear_probe, macro, write_csv
from models import (SIZES, Config, Encoder, flops, groups, keep_heap, learning_rate, load, now, parameters, pick_device, precision, save, seconds,
                    see_data, sized, to_device)
from objectives import OBJECTIVES, VQBeat, health, released_input


def knobs():
    """Every setting, with its default."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group('what')
    g.add_argument('--objective', choices=list(OBJECTIVES), default='cpc')
    g.add_argument('--backbone', choices=list(SIZES), help='default: the first that the objective runs on, s4 for most')
    g.add_argument('--size', choices=list(dict.fromkeys(s for sizes in SIZES.values() for s in sizes)), default='tiny', metavar='SIZE',
                   help='tiny, small, base, released, or a rung of a ladder such as 5x320 (resnet) or 6x512 (beat); python models.py shows them')
    g.add_argument('--layers', type=int, help="of the backbone (default: the size's)")
    g.add_argument('--data', default='synthetic', help='prepared dataset, or several joined by commas; their training folds are used')
    g.add_argument('--records', type=int,
                   help='how many of the training records: whole patients in an order drawn from the seed, so that smaller sets lie in larger ones')
    g.add_argument('--window', type=float, help="crop in s (default: the objective's)")
    g = p.add_argument_group("the objective's own", 'each for the objectives that have it, see python objectives.py --pairs; its default otherwise')
    g.add_argument('--span-ms', type=float, help='length of masked spans in ms (83)')
    g.add_argument('--hide', type=float, help='share of tokens hidden (0.49 in spans; 0.5 of beats and patches)')
    g.add_argument('--raw-target', action='store_true', default=None, help='predict millivolts, not fluctuations about the mean of each patch')
    g.add_argument('--target-norm', choices=['instance', 'layer'], help="how the teacher's features are standardised (instance); layer is the released code's")
    g.add_argument('--half-life', type=float, help="of the teacher's distance to the student, as a share of the run (0.05)")
    g.add_argument('--momentum', type=float, help="the teacher's, in place of --half-life; 0.9996 is the released code's")
    g.add_argument('--teacher-mode', choices=['eval', 'train'], help='whether the teacher has dropout and batch statistics (eval)')
    g.add_argument('--horizon', type=int, help='tokens that CPC looks ahead (14)')
    g.add_argument('--negatives', type=int, help='of CPC, per prediction (128)')
    g.add_argument('--codes', type=int, help='of the vocabulary that vqbeat learns (8192)')
    g.add_argument('--tokenizer', help='run folder of a vqbeat, whose codes beats predicts')
    g.add_argument('--task', help='labels that supervised learns (default: the first of findings, super, snomed, dx2020, label)')
    g.add_argument('--focal', type=float, help='exponent of the focal loss (0: plain cross-entropy)')
    g.add_argument('--as_released', '--as-released', type=lambda text: tuple(text.split(',')), default=(), metavar='WHAT',
                   help="the released code's deviations, any of ema,mask,lr,codebook,norm (norm: standardised input in"
                   ' pretraining only; evaluation stays in mV, as it was released)')
    g = p.add_argument_group('how')
    g.add_argument('--steps', type=int, default=800)
    g.add_argument('--batch', type=int, default=32)
    g.add_argument('--lr', type=float, help='peak (default: chosen for objective and backbone, see python objectives.py --pairs)')
    g.add_argument('--schedule', choices=['cosine', 'constant'], default='cosine', help='after a warm-up over 5 %% of the run')
    g.add_argument('--weight-decay', type=float, default=1e-3)
    g.add_argument('--clip', type=float, default=1., help='largest norm of the gradient')
    g.add_argument('--seed', type=int, default=0)
    g.add_argument('--device', help='cpu or cuda (default: cuda where there is one)')
    g = p.add_argument_group('where and how often')
    g.add_argument('--out', help='run folder (default: a fresh numbered one in out/)')
    g.add_argument('--resume', action='store_true', help='go on from the checkpoint in --out (default: the newest run)')
    g.add_argument('--force', action='store_true', help='overwrite --out')
    g.add_argument('--log-every', type=int, default=20, help='steps')
    g.add_argument('--save-every', type=int, default=200, help='steps')
    g.add_argument('--probe-every', type=int, default=200, help='steps; 0: no online probe')
    g.add_argument('--probe-records', type=int, default=600, help='training records of the online probe')
    g.add_argument('--compile', action='store_true', help="torch.compile the encoder's stem and blocks: minutes at the start, for long runs on a GPU")
    g.add_argument('--benchmark', nargs='?', const='one', metavar='WHAT',
                   help='train nothing, time training steps: of --objective, of the one named here, of all; or growth')
    return p


def flag(name):
    """A setting's name as it is typed."""
    return '--' + name.replace('_', '-')


def check(a):
    """Refuse numbers that no run can have."""
    if a.benchmark not in (None, 'one', 'all', 'growth', *OBJECTIVES):
        raise Stop(f'--benchmark {a.benchmark}: take all, growth, or one of {", ".join(OBJECTIVES)}')
    for name in ('steps', 'batch', 'layers', 'records', 'log_every', 'save_every'):
        if getattr(a, name) is not None and getattr(a, name) < 1:
            raise Stop(f'{flag(name)} must be 1 or more')
    for name in ('lr', 'clip', 'window', 'span_ms', 'half_life', 'codes', 'horizon', 'negatives', 'probe_records', 'hide', 'momentum'):
        value, most = getattr(a, name), 1 if name in ('hide', 'momentum') else math.inf
        if value is not None and not 0 < value < most:
            raise Stop(f'{flag(name)} {value:g} must lie between 0 and {most}')
    for name in ('seed', 'weight_decay', 'probe_every', 'focal'):
        if not 0 <= (getattr(a, name) or 0) < 2 ** 31:
            raise Stop(f'{flag(name)} {getattr(a, name)} must not be negative, nor absurdly large')
    if a.window is not None and a.window < .5:
        raise Stop(f'--window {a.window} must be 0.5 s or more')
    if a.backbone == 'net1d' and a.layers and a.layers < 7:
        raise Stop('net1d has seven stages: --layers must be 7 or more')
    if a.layers == 1 and a.objective in ('data2vec', 'dinosr'):
        raise Stop(f'{a.objective} takes its targets from the last two layers: --layers must be 2 or more')


def run_folder(a):
    """The folder to write to, made or checked: nothing is overwritten without --force."""
    if a.out is None:
        if a.resume:
            found = sorted(Path('out').glob('*/ckpt.pt'), key=lambda f: f.stat().st_mtime)
            if not found:
                raise Stop('nothing to resume: no checkpoint in out/')
            return found[-1].parent
        number = 0
        while (out := Path('out', f'{a.objective}_{a.backbone}_{a.size}_{number}')).exists():
            number += 1
        return out
    out = Path(a.out)
    if '..' in out.parts:
        raise Stop(f'--out {out}: name the folder without ..')
    if out.exists() and not (a.resume or a.force):
        raise Stop(f'{out} exists: add --resume to go on with it, --force to overwrite it, or take another --out')
    if a.force and out.exists() and not (out / 'ckpt.pt').is_file():
        raise Stop(f'{out} is no run folder (no ckpt.pt in it), so --force leaves it alone: take another --out')
    if a.resume and not (out / 'ckpt.pt').is_file():
        raise Stop(f'nothing to resume in {out}: it has no ckpt.pt')
    return out


def settle(a):
    """Fill in what the objective decides, and refuse what it does not have."""
    kind = OBJECTIVES[a.objective]
    a.backbone = a.backbone or next(iter(kind.backbones))
    if a.backbone not in kind.backbones:
        raise Stop(f'{a.objective} does not run on {a.backbone}: take {", ".join(kind.backbones)}')
    for name in dict.fromkeys(o for other in OBJECTIVES.values() for o in other.options):
        if getattr(a, name) is not None and name not in kind.options:
            raise Stop(f'{a.objective} has no {flag(name)}: it takes {", ".join(map(flag, kind.options)) or "no flag of its own"}')
    if unknown := set(a.as_released) - set(kind.released):
        raise Stop(f'--as_released {",".join(sorted(unknown))}: of {a.objective} there is {",".join(kind.released) or "nothing"} to switch')
    if a.objective == 'beats' and not (a.tokenizer or a.benchmark):
        raise Stop('beats predicts the codes of a vqbeat: train one with python train.py --objective vqbeat --out out/vq, then add --tokenizer out/vq')
    a.lr = a.lr or (3e-3 if 'lr' in a.as_released else kind.backbones[a.backbone])
    whole = a.backbone in ('resnet', 'beat', 'vit')              # made for whole records
    a.window = a.window or (10 if whole else kind.window)
    sized(a.backbone, a.size)                                    # stops at a size that the backbone lacks


def resume(out, a, given):
    """The checkpoint in `out`; the arguments it was started with are put into `a`. Other flags than it was started with are refused."""
    try:
        checkpoint = load(out / 'ckpt.pt')
    except ValueError as e:
        raise Stop(str(e))
    if 'args' not in checkpoint:
        raise Stop(f'{out}/ckpt.pt is no checkpoint of train.py: nothing to resume')
    for k, v in checkpoint['args'].items():
        if given.get(k, v) != v:
            raise Stop(f'{out} was started with {flag(k)} {v}: --resume goes on as begun, leave the flag out')
        setattr(a, k, v)
    return checkpoint


def yes_no(y):
    """Which columns of labels y (n, K) hold 0, 1 and NaN, and not NaN alone: (K,) bool."""
    answer = np.isin(y, (0, 1))
    return answer.any(0) & (answer | np.isnan(y)).all(0)


def online_probe(encoder, ds, samples, device, most):
    """Macro AUROC of a linear probe fitted on up to `most` training records and scored on half as many validation records, first crops.
    A rough gauge of progress; NaN where there are no labels."""
    train, val, _ = ds.split()
    columns = next((c for t, c in ds.tasks.items() if t != 'tail'), [])
    rows = []
    for part, count in (train, most), (val, most // 2):
        part = part[ds.length[part] >= samples]
        rows.append(part[np.isfinite(np.array(ds.labels[part][:, columns])).any(1)][:count])
    if min(map(len, rows)) < 20:
        return math.nan
    n, rows = len(rows[0]), np.concatenate(rows)
    y = np.array(ds.labels[rows][:, columns])
    y = y[:, yes_no(y)]
    if not y.shape[1]:
        return math.nan
    X, at = embed(encoder, ds, rows, samples, device, 'probe', first=True), np.arange(len(rows))
    table = auroc(linear_probe(X, y, at[:n * 4 // 5], at[n * 4 // 5:n])[0](X[at[n:]]), y[n:])
    return float(macro(table)[0]) if np.isfinite(table).any() else math.nan


def draw_loss(rows, path):
    """Loss, accuracy or other health, and online probe over the steps."""
    state = list(rows[0])[4:-5]                                  # after step, lr, loss, gradient; before alarm, probe, seconds, speed, device
    panels = ['loss', *(name for name in state if name != 'chance'), 'probe']
    fig, axes = figure(2, -(-len(panels) // 2), figsize=(2.1 * len(panels), 6), layout='constrained')
    points = lambda name: [(r['step'], r[name]) for r in rows if r[name] != '' and math.isfinite(r[name])]
    for ax, name in zip(axes.flat, panels):
        if points(name):
            ax.plot(*zip(*points(name)), marker='o' if name == 'probe' else '')
        if name == 'accuracy':
            ax.plot(*zip(*points('chance')), ls=':', color='C7', label='chance')
            ax.legend()
        ax.set(xlabel='step', title=name)
    for ax in axes.flat[len(panels):]:
        ax.axis('off')
    fig.savefig(path, dpi=120)


def load_tokenizer(path, contract):
    """The vqbeat of a run folder, and its checkpoint."""
    try:
        c = load(Path(path) / 'ckpt.pt')
    except ValueError as e:
        raise Stop(str(e))
    if c.get('objective') != 'vqbeat' or c['step'] < c['args']['steps']:
        raise Stop(f'--tokenizer {path}: a finished run of --objective vqbeat is needed')
    if differs := Contract.read(c['contract']).differs(contract):
        raise Stop(f'--tokenizer {path} was trained under another contract ({differs}): train one on this data')
    tokenizer = VQBeat(Encoder(Config(**c['config'])), codes=len(c['state']['codebook']))
    tokenizer.load_state_dict(c['state'], strict=True)
    return tokenizer, c


def build(a, fs, columns=(), tokenizer=None, batches=()):
    """The objective around a fresh encoder, as the arguments say. The encoder's BatchNorm sees `batches` first: a teacher in eval mode is
    a copy of it, and with the statistics of a layer that has seen nothing its features would hardly depend on the signal."""
    kind = OBJECTIVES[a.objective]
    options = {k: getattr(a, k) for k in kind.options if getattr(a, k) is not None and k not in ('task', 'tokenizer')}
    if a.objective == 'supervised':
        options['columns'] = columns
    if a.objective == 'beats':
        options['tokenizer'] = tokenizer
    if 'ema' in kind.released:                                   # the rates (lr) and the input (norm) are switched in this file
        options['released'] = a.as_released
    encoder = Encoder(sized(a.backbone, a.size, kind.causal, fs, a.layers))
    if batches:
        with torch.random.fork_rng(devices=[]):
            see_data(encoder, batches)
    objective = kind(encoder, steps=a.steps, **options)
    if a.compile:
        for block in (encoder.stem, *encoder.blocks):
            block.compile()                                      # at its first call, and not the teacher's copy
    return objective


def optimiser_groups(objective, a):
    """One rate for all parts; as released ('lr'), a tenth for the backbone and the mask token, a hundredth for the stem."""
    if 'lr' not in a.as_released:
        return groups(objective, a.lr, a.weight_decay)
    e = objective.encoder
    middle = nn.ModuleDict({'blocks': e.blocks, 'norm': e.norm})
    if hasattr(objective, 'hidden'):
        middle.register_parameter('hidden', objective.hidden)
    parts = (objective.head, a.lr), (middle, a.lr / 10), (e.stem, a.lr / 100)
    return [g for part, rate in parts for g in groups(part, rate, a.weight_decay)]


def describe(a, ds, device, objective, records, short, out):
    """Print what follows from the arguments and the data. records: how many are trained on; short: how many are too short for a crop."""
    encoder, contract = objective.encoder, ds.contract
    stem, whole, everything = parameters(encoder.stem), parameters(encoder), parameters(objective)
    print(f'{a.objective} on {a.backbone} {a.size}: stem {stem:,} + backbone {whole - stem:,} + head {everything - whole:,} parameters, '
          + ('causal' if encoder.causal else 'bidirectional'))
    if hasattr(objective, 'teacher'):
        m, spans = objective.teacher.momentum, f'; spans of {objective.span} tokens' if hasattr(objective, 'span') else ''
        pace = f'half-life {math.log(.5) / math.log(m):.0f} steps' if m < 1 else 'it never moves'
        print(f'teacher: momentum {m:.6f}, {pace}, {objective.teacher.mode} mode{spans}')
    left_out = f' ({short:,} too short)' if short else ''
    released = f'; as released: {", ".join(a.as_released)}' if a.as_released else ''
    print(f'{a.data}: {records:,} training records{left_out}, {a.window} s crops of {round(a.window * contract.fs)} samples '
          f'at {contract.fs} Hz, {contract.unit}, filter {contract.filter}{released}')
    print(f'{a.steps:,} steps of {a.batch} crops = {a.steps * a.batch / records:.1f} epochs on {device}, '
          f'{"bf16 products, fp32 convolution" if device.type == "cuda" else "fp32"}, lr {a.lr:g}; writing to {out}/')


def distribute(objective):
    """The objective under DistributedDataParallel. Of all processes: the gradient, the mean of their gradients. Of each process alone: negatives
    (CMSC's among its crops), Sinkhorn's balance, BatchNorm's statistics, the mean over what is masked or known. Of the first process: buffers,
    sent to all before every step, that is running statistics and the codebooks of dinosr, hubert and vqbeat, which learn from its crops alone."""
    # these never change, and sending them would void what S4 derived from them
    still = [name for name, _ in objective.named_buffers() if name.endswith('log_dt')]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, still)
    return nn.parallel.DistributedDataParallel(objective, static_graph=True)                 # static: the same ones are without use at every step


def join(a):
    """Under torchrun: join the other processes, on the GPU of one's own, and be silent in all but the first."""
    world, cuda = int(os.environ.get('WORLD_SIZE', 1)), torch.cuda.is_available() and a.device != 'cpu'
    if world == 1:
        return
    if a.batch % world:
        raise Stop(f'--batch {a.batch} is for all processes together: take a multiple of {world}')
    a.device = f'cuda:{os.environ["LOCAL_RANK"]}' if cuda else 'cpu'
    if cuda:
        torch.cuda.set_device(a.device)
    dist.init_process_group('nccl' if cuda else 'gloo')
    if dist.get_rank():
        sys.stdout = open(os.devnull, 'w')


def ahead(fetch, steps, patience=300.):
    """(step, fetch(step)) for each of the steps; a thread prepares the next batch while this one is used. Stops where none comes for
    `patience` s."""
    made, left = queue.Queue(1), threading.Event()

    def put(thing):
        while not left.is_set():
            try:
                return made.put(thing, timeout=.1)
            except queue.Full:                                   # the batch before is still in use
                pass

    def work():
        try:
            for step in steps:
                if left.is_set():
                    return
                put((step, fetch(step)))
        except BaseException as e:                               # it is raised where the batch is wanted
            put((None, e))

    thread = threading.Thread(target=work, daemon=True)          # a daemon: waiting for a disk, it does not keep the process alive
    thread.start()
    try:
        for _ in steps:
            try:
                step, batch = made.get(timeout=patience)
            except queue.Empty:
                raise Stop(f'no batch for {patience:.0f} s: is the disk with datasets/ still there? Once it is, go on with --resume')
            if step is None:
                raise batch
            yield step, batch
    finally:
        left.set()
        thread.join(1.)


def trainable(a, ds):
    """Rows of the training records that last a crop, and how many do not."""
    rows = ds.split()[0]
    long = ds.length[rows] >= round(a.window * ds.contract.fs)
    if not long.any():
        raise Stop(f'no training record of {a.data} lasts {a.window} s: prepare longer ones or lower --window')
    return rows[long], int((~long).sum())


def label_columns(a, ds, rows):
    """Columns of the labels that supervised learns. Stops where they are not yes or no, or there are none for some class."""
    a.task = a.task or first_task(ds)
    columns = ds.columns(a.task)
    if not yes_no(np.array(ds.labels[:, columns])[rows]).all():
        raise Stop(f'task {a.task} of {a.data}: supervised training needs yes/no labels, some for every class')
    return columns


def clear(out):
    """Make the run folder, without what a run that --force overwrites left in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Stop(f'{out} cannot be made ({e.strerror}): take another --out')
    for pattern in ('log.csv', 'results_*', 'loss.png', 'labels*.png', 'pca_*.png'):
        for old in out.glob(pattern):
            old.unlink()


def conclude(a, out, log):
    """Draw a finished run's log, and say whether it looked healthy and what to do with it."""
    draw_loss(log, out / 'loss.png')
    late = log[len(log) // 4:]
    if alarms := [r['alarm'] for r in late if r['alarm']]:
        print(f'! {len(alarms)} of the last {len(late)} logged steps raised an alarm ({alarms[-1]}): the features have likely collapsed')
    print(f'{out}: ckpt.pt, log.csv, loss.png; evaluate it with python evaluate.py {out}' + ('' if a.data == 'synthetic' else f' --data {a.data}'))


EXPLODED = 1e6                                                   # norm of a gradient; in healthy runs it stayed below 200


def train(a, out, checkpoint=None, until=None):
    """Pretrain as the arguments say; writes the run folder and returns the objective. checkpoint: where to go on from; until: the step
    after which to save and leave off, to be resumed as if nothing had happened."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = pick_device(a.device)
    if rank:
        dist.barrier()                                           # until the first process has prepared what prepares itself
    ds = Dataset(a.data, device)
    if world > 1 and not rank:
        dist.barrier()
    if checkpoint and checkpoint.get('world', 1) != world:       # each draws its own negatives, masks and dropout
        raise Stop(f'{out} was begun with {checkpoint.get("world", 1)} processes, not {world}: go on with as many')
    if checkpoint and checkpoint['dataset'] != ds.hash:
        raise Stop(f'{a.data} has been prepared anew since this run began: prepare it as it was, or start again')

    # what it learns from
    samples, seen = round(a.window * ds.contract.fs), a.window / getattr(OBJECTIVES[a.objective], 'views', 1)
    rows, short = trainable(a, ds)
    if a.records:
        rows = ds.nested(rows, a.records, a.seed)
    if a.backbone == 'beat' and not ds.peak_count[rows].any():
        raise Stop(f'{a.data} has no R-peaks: prepare it without --no-peaks')
    columns = label_columns(a, ds, rows) if a.objective == 'supervised' else []
    tokenizer, patients = None, {str(p) for p in [*ds.patient[rows], *ds.id[rows]]}
    if a.objective == 'beats':
        tokenizer, source = load_tokenizer(a.tokenizer, ds.contract)
        patients |= set(source['patients'])

    def fetch(step, size=a.batch, share=(rank, world)):
        batch = to_device(ds.batch(rows, samples, size, a.seed, step, share), device)
        if 'norm' in a.as_released:
            batch['x'] = released_input(batch['x'])
        return batch

    # objective and optimiser, fresh or where they were
    torch.manual_seed(a.seed)
    shown = []
    if not checkpoint:                                           # a checkpoint's BatchNorm has seen them
        shown = [to_device(fetch(step, min(32, len(rows)), (0, 1)), 'cpu') for step in range(8)]
    objective = build(a, ds.contract.fs, columns, tokenizer, shown).to(device)
    if a.objective == 'cpc' and objective.horizon >= samples / ds.contract.fs * objective.encoder.tokens_per_second:
        raise Stop(f'{a.window} s at {ds.contract.fs} Hz are no more tokens than the horizon, {objective.horizon}: lower --horizon or raise --window')
    encoder, learned = objective.encoder, [p for p in objective.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(optimiser_groups(objective, a), lr=a.lr, fused=device.type == 'cuda')
    first, log, before = 0, [], 0.
    if checkpoint:
        objective.load_state_dict(checkpoint['state'], strict=True)
        optimiser.load_state_dict(checkpoint['optimiser'])
        first, log, before = checkpoint['step'], checkpoint['log'], checkpoint['seconds']
    describe(a, ds, device, objective, len(rows), short, out)
    if checkpoint:
        print(f'resuming at step {first:,}' if first < a.steps else f'already finished: all {first:,} steps were done')
    print(f'{"step":>7s} {"seconds":>8s} {"loss":>8s} {"gradient":>8s}  health and online probe; ! is an alarm')
    parallel = distribute(objective) if world > 1 else objective

    def keep(step):
        save(out / 'ckpt.pt', dict(
            objective=a.objective, config=asdict(encoder.config), encoder=encoder.state_dict(), state=objective.state_dict(),
            optimiser=optimiser.state_dict(), step=step, seed=a.seed, world=world, contract=asdict(replace(ds.contract, window=seen)), data=a.data,
            dataset=ds.hash, patients=sorted(patients), command=' '.join(sys.argv), log=log,
            args={k: v for k, v in vars(a).items() if k not in ('out', 'resume', 'force', 'benchmark', 'device', 'compile')},
            seconds=before + time.time() - began))

    began = time.time()
    if not checkpoint and not rank:
        clear(out)
        keep(0)
    pace, clip = dict(schedule=a.schedule), a.clip
    if 'lr' in a.as_released:
        pace, clip = dict(schedule='constant', warmup=0.), math.inf
    stop, broken = min(until or a.steps, a.steps), torch.tensor(-1, device=device)
    for step, batch in ahead(fetch, range(first, stop)):
        objective.train()
        torch.manual_seed(((a.seed * 1_000_003 + step) * world + rank) % 2 ** 63)            # dropout and negatives of this step and process
        for group in optimiser.param_groups:
            group['lr'] = learning_rate(step, a.steps, group['peak'], **pace)
        last, saving = step + 1 == a.steps, step + 1 == stop or (step + 1) % a.save_every == 0
        probing = a.probe_every and (last or step == 0 or (step + 1) % a.probe_every == 0)
        logging = last or step % a.log_every == 0 or probing

        # one step
        with precision(device):
            loss, logs = parallel(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learned, clip)
        broken = torch.where((broken < 0) & ~(loss.detach().isfinite() & (norm < EXPLODED)), step, broken)
        if (device.type == 'cpu' or logging or saving) and broken >= 0:                      # on a GPU to ask is to wait
            if not rank:
                torch.save(fetch(broken.item(), share=(0, 1)), out / 'bad_batch.pt')
            raise Stop(f'at step {broken.item()} the loss or its gradient was not finite, or the norm of the gradient above {EXPLODED:g} '
                       f'(at step {step}: loss {loss.item():g}, norm {norm.item():g}): its batch is in {out}/bad_batch.pt, '
                       'the last good state in ckpt.pt; lower --lr and start again')
        optimiser.step()
        optimiser.zero_grad()
        objective.after_step(step)

        # log, probe, keep
        if logging and not rank:
            probe = online_probe(encoder, ds, round(seen * ds.contract.fs), device, a.probe_records) if probing else ''
            spent, (state, alarm) = time.time() - began, health(logs)
            log.append(dict(step=step, lr=optimiser.param_groups[0]['lr'], loss=loss.item(), gradient=norm.item(), **state, alarm=alarm, probe=probe,
                            seconds=round(before + spent, 2), crops_per_second=round((step + 1 - first) * a.batch / spent, 1), device=str(device)))
            notes = [' '.join(f'{k} {v:.3g}' for k, v in state.items())]
            if probing:
                notes.append(f'probe AUROC {probe:.3f}' if math.isfinite(probe) else 'no probe: too few labelled records')
            if alarm:
                notes.append(f'! {alarm}')
            print(f'{step:7,d} {before + spent:8.1f} {loss.item():8.4f} {norm.item():8.3f}', *notes, sep='  ', flush=True)
        if saving and not rank:
            keep(step + 1)
            write_csv(out / 'log.csv', log)
    if stop == a.steps and not rank:
        conclude(a, out, log)
    return objective


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks

class Traffic(TorchDispatchMode):
    """Counts the bytes that every operation but a matrix product reads and writes, as if no cache kept anything; what it overwrites counts as
    read too, and what the optimiser does to lists of tensors as read only."""
    products, silent = ('mm', 'bmm', 'addmm', 'baddbmm', 'convolution', 'attention'), ('empty', 'detach', '_unsafe_view', '_local_scalar')

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if not op.is_view and not any(word in op.name() for word in (*self.products, *self.silent)):
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
        return out


def reference(device):
    """What the machine can do: a large product, the FLOPs of it, a large copy, the bytes it reads and writes."""
    size = dict(device=device, dtype=torch.bfloat16 if device.type == 'cuda' else torch.float32)
    left, right, result = torch.randn(9600, 512, **size), torch.randn(512, 1024, **size), torch.empty(9600, 1024, **size)
    here, there = torch.empty(2, 2 ** 26, dtype=torch.uint8, device=device)                  # 64 MiB each: more than a cache holds
    times = 50 if device.type == 'cuda' else 1                   # on a GPU one is over before it is launched

    def product():
        for _ in range(times):
            torch.mm(left, right, out=result)

    def copy():
        for _ in range(times):
            here.copy_(there)

    return product, times * 2 * 9600 * 512 * 1024, copy, times * 2 * here.nbytes


PARTS = ('data', 'stem', 'backbone', 'teacher', 'objective', 'backward', 'optimiser')


def bench(a, repeats=7):
    """One row: medians of `repeats` steps, of their parts, and of a large product and copy, all measured in turn. A step's floor is its matrix
    products at the product's rate; its traffic, what all other operations read and write, at the copy's."""
    device = pick_device(a.device)
    ds = Dataset(a.data, device)
    rows, _ = trainable(a, ds)
    torch.manual_seed(0)
    tokenizer = VQBeat(Encoder(sized('beat', a.size, fs=ds.contract.fs))) if a.objective == 'beats' else None
    objective = build(a, ds.contract.fs, range(min(24, len(ds.label_names))), tokenizer).to(device)
    optimiser = torch.optim.AdamW(optimiser_groups(objective, a), fused=device.type == 'cuda')
    learned, spent = [p for p in objective.parameters() if p.requires_grad], {}

    def timed(part, work):
        """The same work, whose time is added to that of the part."""
        def run(*args):
            began = now(device)
            out = work(*args)
            spent[part] += now(device) - began
            return out
        return run

    def fetch():
        return to_device(ds.batch(rows, round(a.window * ds.contract.fs), a.batch, 0, 0), device)

    def forward(batch):
        with precision(device):
            return objective(batch)[0]

    def update():
        torch.nn.utils.clip_grad_norm_(learned, a.clip)
        optimiser.step()
        optimiser.zero_grad()
        objective.after_step(0)

    def step(watch=lambda part, work: work, batch=None):
        batch = batch or watch('data', fetch)()
        loss = watch('objective', forward)(batch)
        watch('backward', loss.backward)()
        watch('optimiser', update)()

    inner = {'stem': (objective.encoder, 'tokens'), 'backbone': (objective.encoder, 'backbone')}
    if hasattr(objective, 'teacher'):
        inner['teacher'] = objective.teacher, 'forward'

    def watched():                                               # a step of its own, since to wait between the parts costs a GPU time
        spent.update(dict.fromkeys(PARTS, 0.))
        for part, (owner, name) in inner.items():
            setattr(owner, name, timed(part, getattr(owner, name)))
        step(timed)
        for owner, name in inner.values():
            delattr(owner, name)
        spent['objective'] -= spent['stem'] + spent['backbone'] + spent['teacher']           # which ran inside
        return [spent[part] for part in PARTS]

    for _ in range(2):                                           # the first one may also seed a codebook, and grows the heap
        step()
    memory = torch.cuda.max_memory_allocated(device) / 2 ** 20 if device.type == 'cuda' else peak_memory()
    product, product_flops, copy, copy_bytes = reference(device)
    tries = [[seconds(step, device), seconds(product, device), seconds(copy, device), *watched()] for _ in range(repeats)]
    whole, product_s, copy_s, *parts = np.median(tries, 0)
    rate, width, count, batch = product_flops / product_s, copy_bytes / copy_s, flops(step), fetch()
    with Traffic() as traffic:
        step(batch=batch)
    floor, moved = count / rate, traffic.bytes / width
    return dict(objective=a.objective, backbone=a.backbone, size=a.size, batch=a.batch, device=str(device), threads=torch.get_num_threads(), compiled=a.compile,
                crops_per_second=a.batch / whole, step_ms=1e3 * whole, **{f'{part}_ms': 1e3 * t for part, t in zip(PARTS, parts)}, memory_mb=memory,
                gflop=count / 1e9, gflop_per_s=rate / 1e9, copy_gb_per_s=width / 1e9, products_ms=1e3 * floor, times_products=whole / floor,
                traffic_ms=1e3 * moved, of_roofline=(floor + moved) / whole)


def alone(work, *arguments):
    """work(*arguments) in a process of its own, whose peak of memory is its own too."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), keep_heap) as pool:
        return pool.submit(work, *arguments).result()


def rounded(row):
    """A row whose floats are text of four digits."""
    return {k: f'{v:.4g}' if isinstance(v, float) else v for k, v in row.items()}


def benchmark(a):
    """A table of steps and their parts, one objective or all, each in a process of its own; also as out/benchmark.csv."""
    rows, path = [], Path('out/benchmark.csv')
    for name in OBJECTIVES if a.benchmark == 'all' else [a.objective]:
        if a.benchmark == 'all':
            a = argparse.Namespace(**{**vars(a), 'objective': name, 'backbone': None, 'lr': None, 'window': None})
            settle(a)
        r = alone(bench, a)
        rows.append(rounded(r))
        if len(rows) == 1:
            print(f'{a.size}, batch {a.batch}, {r["device"]}, {r["threads"]} threads; large product {r["gflop_per_s"]:.0f} GFLOP/s, '
                  f'copy {r["copy_gb_per_s"]:.1f} GB/s, each measured in turn with the steps')
            heads = ' '.join(f'{part:>9s}' for part in PARTS)
            print(f'{"objective, backbone":24s} crops/s  step ms  {heads}   products  x   traffic  of roofline  memory')
        parts = ' '.join(f'{r[f"{part}_ms"]:9.1f}' for part in PARTS)
        print(f'{name + ", " + a.backbone:24s} {r["crops_per_second"]:7.0f} {r["step_ms"]:8.1f}  {parts}  {r["products_ms"]:7.1f} '
              f'{r["times_products"]:5.2f} {r["traffic_ms"]:7.1f} {r["of_roofline"]:8.0%} {r["memory_mb"]:9.0f} MB', flush=True)
        path.parent.mkdir(exist_ok=True)
        write_csv(path, rows)
    print(path)


GROWTH = {'batch': (8, 16, 32, 64, 128), 'seconds': (2.5, 5, 10, 20, 60), 'width': (48, 88, 160, 288, 512), 'records': (10_000, 100_000, 1_000_000)}


def growth_point(axis, value, a, folder):
    """Row of one setting of the growth figure."""
    device = pick_device(a.device)
    if axis == 'records':                                        # opened, and a batch of 32 drawn once the epoch's order is there
        os.chdir(folder)
        before, began = peak_memory(), time.perf_counter()
        ds = Dataset('many')
        opened, rows = time.perf_counter() - began, ds.split()[0]

        def work():
            ds.batch(rows, 600, 32, 0, 0)
    else:
        torch.manual_seed(0)
        a = argparse.Namespace(**{**vars(a), 'size': f'4x{value if axis == "width" else 88}', 'objective': 'cpc', 'backbone': 's4'})
        objective, opened = build(a, 240).to(device), ''
        T = round(240 * (value if axis == 'seconds' else 2.5))
        x, before = torch.randn(value if axis == 'batch' else 16, T, 12, device=device).transpose(1, 2), peak_memory()

        def work():
            with precision(device):
                objective(dict(x=x))[0].backward()

    times = [seconds(work, device) for _ in range(7)]
    on_gpu = device.type == 'cuda' and axis != 'records'
    memory = torch.cuda.max_memory_allocated(device) / 2 ** 20 if on_gpu else peak_memory() - before
    return dict(axis=axis, value=value, device=str(device), ms=1e3 * np.median(times[2:]), memory_mb=memory, open_s=opened)


def many_records(folder, count, labels=246):
    """A prepared dataset of `count` records in folder/datasets/many: index and labels in full length, the signals a file whose contents are a
    hole, so that a million records fit on any disk."""
    home, T, number = Path(folder, 'datasets/many'), 2400, np.arange(count)
    home.mkdir(parents=True)
    with open(home / 'signals.i16', 'wb') as f:
        f.truncate(count * T * 12 * 2)
    np.lib.format.open_memmap(home / 'labels.npy', 'w+', np.float32, (count, labels)).flush()
    peaks = np.arange(100, T, 200, dtype=np.int32)               # 72 beats a minute
    np.savez(home / 'index.npz', offset=number * T, length=np.full(count, T), id=np.char.add('synthetic0/', number.astype(str)), fold=number % 10 + 1,
             patient=np.char.add('synthetic0/patient', (number * 10 // 16).astype(str)), age=number % 90 * 1., sex=number % 2 * 1.,
             peaks=np.tile(peaks, count), peak_start=np.arange(count + 1) * len(peaks))
    meta = dict(contract=asdict(Contract()), labels=[f'label/{k}' for k in range(labels)], tasks={'label': [*range(labels)]}, records=count, hash='many')
    (home / 'meta.json').write_text(json.dumps(meta))


def growth(a):
    """Time and memory of a CPC step on S4 4x88 (16 crops of 2.5 s) as batch, length or width grows, and of drawing a batch as the records do:
    out/growth.csv, .png."""
    rows = []
    Path('out').mkdir(exist_ok=True)
    for axis, values in GROWTH.items():
        for value in values:
            with tempfile.TemporaryDirectory() as folder:
                if axis == 'records':
                    alone(many_records, folder, value)
                r = alone(growth_point, axis, value, a, folder)
            rows.append(r)
            write_csv('out/growth.csv', [rounded(row) for row in rows])
            opened = f'  opened in {r["open_s"]:.2f} s' if r['open_s'] else ''
            print(f'{axis:8s} {value:9g}  {r["ms"]:9.2f} ms  {r["memory_mb"]:8.0f} MB{opened}', flush=True)
    draw_growth(rows, 'out/growth.png')
    print('out/growth.csv, out/growth.png')


def draw_growth(rows, path):
    """Milliseconds above, MB below, against each axis; dotted: in proportion, from the first point on."""
    axes_of = list(dict.fromkeys(r['axis'] for r in rows))
    fig, axes = figure(2, len(axes_of), figsize=(3.2 * len(axes_of), 6), squeeze=False, layout='constrained')
    for k, (what, title) in enumerate((('ms', 'milliseconds'), ('memory_mb', 'MB'))):
        for ax, axis in zip(axes[k], axes_of):
            x, y = np.array([(float(r['value']), max(float(r[what]), 1e-3)) for r in rows if r['axis'] == axis]).T         # 0 MB has no logarithm
            ax.loglog(x, y, marker='o')
            ax.loglog(x, y[0] * x / x[0], ls=':', color='C7', label='in proportion')
            ax.minorticks_off()
            ax.set_xticks(x, [f'{v:,.10g}' for v in x])
            ax.set(xlabel=axis, ylabel=title)
            ax.legend()
    fig.savefig(path, dpi=100)


def main(argv=None):
    """The command line: see the top of the file."""
    keep_heap()
    parser = knobs()
    a = parser.parse_args(argv)
    check(a)
    checkpoint = None
    if a.resume:
        typed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(a))))        # what stands there already gets no default
        out = run_folder(a)
        checkpoint = resume(out, a, {k: v for k, v in vars(typed).items() if v is not None})
    if a.benchmark in OBJECTIVES:
        a.objective = a.benchmark
    settle(a)
    if a.benchmark:
        return growth(a) if a.benchmark == 'growth' else benchmark(a)
    join(a)
    out = out if a.resume else run_folder(a)
    if dist.is_initialized():
        dist.barrier()                                           # all have looked for a free folder before one makes it
    try:
        train(a, out, checkpoint)
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        raise Stop(f'\nstopped; go on from the last save (every {a.save_every} steps) with python train.py --resume --out {out}')


if __name__ == '__main__':
    script(main, 'stopped')
    if 'RANK' in os.environ:                                     # gloo's threads, still letting go of tensors, abort if the interpreter goes first
        sys.stdout.flush()
        os._exit(0)
