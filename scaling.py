"""Sweeps over model and data size.

    python scaling.py sweep joint --family s4 --objective cpc supervised
"""
import argparse, contextlib, copy, csv, itertools, math, multiprocessing, os, shutil, sys, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train
from data import Contract, Dataset, Stop
from evaluate import Arm, PROTOCOLS, Task, auroc, embed, first_task, fresh, linear_probe, macro, open_run, write_csv
from models import CHUNK, SIZES, flops, load, net1d, parameters, pick_device, to_device
from objectives import OBJECTIVES

MOVING = ('jepa', 'data2vec', 'dinosr', 'hubert')                # their targets move with the run: losses of two runs do not compare


# ---------------------------------------------------------------------------------------------------------------------
# compute

def macs(c, T, beats=13, fft=False):
    """Multiply-accumulates of one forward pass through an encoder of Config c: (for each crop of T samples, once for a whole batch), the
    latter the kernels of S4. beats: R-peaks in the crop, where they are the tokens. Norms, activations and biases are left out.
    fft: S4's long convolution as three real FFTs of 2L, at 5/2 n log2 n real FLOPs each, as on CUDA; else its chunks, as on a CPU."""
    D, L, ways, N = c.dim, -(-T // 2), 1 if c.causal else 2, c.state
    attention = lambda L, wide: c.layers * (4 * L * D * wide + 2 * L * L * wide + 2 * L * D * c.ffn)
    stem = L * (3 * c.leads * D + 3 * D * D)
    if c.backbone in ('s4', 's4d'):
        if fft or c.backbone == 's4d':
            modes = N if c.backbone == 's4' else N // 2
            long, once = D * 3 * 5 / 2 * 2 * L * math.log2(2 * L) / 2 * fft, ways * D * modes * L
        else:
            K = -(-L // CHUNK)
            long = D * K * (CHUNK * CHUNK + 2 * ways * N * CHUNK + ways * N * N)
            once = ways * D * N * (CHUNK * CHUNK + N * CHUNK)
        return stem + c.layers * (long + 2 * L * D * D), c.layers * once
    if c.backbone == 'transformer':
        return stem + attention(L, D), 0
    if c.backbone == 'net1d':
        total = stem + L * 16 * D * (D // 8)
        for b in net1d(D, c.layers, c.causal)[1:]:
            i, o, gate = b.conv1.in_channels, b.conv1.out_channels, L if c.causal else 1
            total += L * (i * o + 16 * o * (o // b.conv2.groups) + o * o) + 2 * gate * o * (o // 2)
        return total, 0
    if c.backbone == 'resnet':
        widths = [round(D * i / c.layers) for i in range(1, c.layers + 1)]
        total, length = 17 * T * c.leads * widths[0], T
        for i, (a, b) in enumerate(zip(widths[:1] + widths, widths)):
            short = -(-length // (4 if 0 < i < 5 else 1))
            total += 17 * length * a * b + 17 * short * b * b + (a != b) * short * a * b
            length = short
        return total, 0
    if c.backbone == 'beat':
        return 3 * c.leads * beats * round(.96 * c.fs) * D + attention(1 + c.leads * beats, 64 * c.heads), 0
    patch = round(.05 * c.fs)
    return T // patch * c.leads * patch * D + attention(1 + T // patch, D), 0


def counted(objective, batch):
    """Forward MACs of one crop through an objective: (student with all its views and heads, teacher or tokenizer that is not trained),
    as models.flops counts them."""
    B, T = batch['x'].shape[0], batch['x'].shape[2]
    objective(batch)                                             # S4 makes its dynamics once for all
    total = flops(lambda: objective(batch)) / 2 / B
    other = objective.teacher.net.config if hasattr(objective, 'teacher') else objective.tokenizer.encoder.config if hasattr(objective, 'tokenizer') else None
    crop, once = macs(other, T, batch['peaks'].shape[1]) if other else (0, 0)
    extra = crop + once / B
    return total - extra, extra


# ---------------------------------------------------------------------------------------------------------------------
# sweeps: what to run

# sizes by family, layers x width, about threefold in parameters from 3K on; resnet's and beat's are those of 2605.17276, Table S.4
LADDERS = {family: [s for s in sizes if 'x' in s] for family, sizes in SIZES.items()}
KINDS = {'params': 'every size on all records', 'data': 'the middle size on every number of records',
         'joint': 'both axes, the diagonal and two points off it: what the joint law needs', 'labels': 'supervised on more and more labels',
         'finetune': "fine-tuning of the sweep's best checkpoints against training from scratch, on more and more records"}


def grid(kind, sizes, records):
    """[(size, records, replicated)] of a sweep. Corners and centre, on an axis its ends and middle, are replicated with every seed."""
    top, middle, size = len(records) - 1, len(records) // 2, len(sizes) // 2
    last = len(sizes) - 1
    params, numbers = {(i, top) for i in range(last + 1)}, {(size, j) for j in range(top + 1)}
    if kind == 'joint':
        points = params | numbers | {(round(i * last / max(1, top)), i) for i in range(top + 1)} | {(0, middle), (last, middle), (last, 0)}
        often = {(0, 0), (0, top), (last, 0), (last, top), (size, middle)}
    else:
        points = params if kind == 'params' else numbers
        often = {(0, top), (size, top), (last, top)} if kind == 'params' else {(size, 0), (size, middle), (size, top)}
    return [(sizes[i], records[j], (i, j) in often) for i, j in sorted(points)]


def ladder(steps, first=50):
    """Steps to evaluate at: a factor of sqrt 2 apart, the last of them `steps`."""
    return sorted({round(steps / 2 ** (k / 2)) for k in range(40) if steps / 2 ** (k / 2) >= min(first, steps)})


def settings(a, ds, family, objective, size, records, seed, task=None):
    """train.py's arguments of one run."""
    t = train.knobs().parse_args([])
    task = (task or first_task(ds)) if objective == 'supervised' else None
    steps = a.steps if a.fixed == 'steps' else math.ceil(a.epochs * records / a.batch)
    for name, value in dict(objective=objective, backbone=family, size=size, data=a.data, records=records, seed=seed, lr=a.lr, steps=steps, batch=a.batch,
                            schedule=a.schedule, device=a.device, probe_every=0, save_every=100, log_every=50, task=task,
                            tokenizer=a.tokenizer if objective == 'beats' else None).items():
        setattr(t, name, value)
    train.settle(t)
    return t


def label_sets(a, ds):
    """[(arm, anchor names, training names, draw)] of label scaling (2605.17276, Section 4.2): anchored in the tenth of labels that are most
    frequent, or in the rarest 2 % of those with at least ten positives, and extended by random others, nested, up to all of them."""
    names = np.array(ds.label_names)[ds.columns(a.labels)]
    y = np.array(ds.labels[:, ds.columns(a.labels)])[ds.split()[0]]
    binary = np.isin(y, (0, 1)).any(0) & ~(np.isfinite(y) & ~np.isin(y, (0, 1))).any(0)
    count = (y == 1).sum(0)
    sets = []
    for arm, rows, share in (('dominant', binary & (count > 0), .1), ('tail', binary & (count >= 10), .02)):
        order = np.argsort(-count[rows] if arm == 'dominant' else count[rows], kind='stable')
        pool = names[rows][order]
        anchors = max(2, round(share * len(pool)))
        for seed in a.seeds:
            others = np.random.default_rng([seed, 4]).permutation(pool[anchors:])
            for part in sorted({anchors, *(max(anchors, round(f * len(pool))) for f in (.3, .5, 1))}):
                sets.append((arm, list(pool[:anchors]), [*pool[:anchors], *others[:part - anchors]], seed))
    return sets


def pairs(a):
    """The (family, objective, sizes) asked for that there are."""
    found = [(f, o, a.size or LADDERS[f][:5]) for f, o in itertools.product(a.family, a.objective) if f in OBJECTIVES[o].backbones]
    if not found:
        raise Stop(f'none of {", ".join(a.objective)} runs on any of {", ".join(a.family)}: see python objectives.py --pairs')
    return found


def pilots(a, ds):
    """Short runs on all records, at three rates for each size: a rate that suits one size only would bend alpha."""
    runs = {}
    for family, objective, sizes in pairs(a):
        for size, factor in itertools.product([sizes[len(sizes) // 2]] if a.kind in ('data', 'labels') else sizes, (10 ** -.5, 1, 10 ** .5)):
            t = settings(a, ds, family, objective, size, len(ds.split()[0]), 100)
            t.lr, t.steps = float(f'{t.lr * factor:.1g}'), a.lr_steps
            runs[f'rate_{family}_{objective}_{size}_{t.lr:g}'] = t, 'rate', None
    return runs


def plan(a, ds, rates):
    """The runs of a sweep: {name: (arguments of train.py, arm, anchor labels)}. rates: {(family, objective, size): rate}."""
    runs = {}
    for family, objective, sizes in pairs(a):
        if a.kind == 'labels':
            for arm, anchors, names, seed in label_sets(a, ds):
                runs[f'{family}_{objective}_{sizes[len(sizes) // 2]}_{arm}{len(names)}_s{seed}'] = settings(
                    a, ds, family, objective, sizes[len(sizes) // 2], a.records[-1], seed, task='+'.join(names)), arm, anchors
            continue
        for size, count, often in grid(a.kind, sizes, a.records):
            for seed in a.seeds if often else a.seeds[:1]:
                runs[f'{family}_{objective}_{size}_{count}_{a.fixed}_s{seed}'] = settings(a, ds, family, objective, size, count, seed), a.fixed, None
    for t, _, _ in runs.values():
        t.lr = rates.get((t.backbone, t.objective, t.size), t.lr)
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# sweeps: one run

@torch.no_grad()
def held_out(objective, ds, rows, t, device, columns=None):
    """(loss, macro AUROC) of an objective on the first crops of `rows`, in eval mode, masks and negatives the same for every run. AUROC, and
    a loss over the label columns given only, for supervised; else NaN."""
    objective.eval()
    samples, loss, scores = round(t.window * ds.contract.fs), [], []
    size = min(t.batch, len(rows))
    for i in range(len(rows) // size):                           # whole batches: negatives of CMSC are the batch
        torch.manual_seed(i)
        part = rows[i * size:(i + 1) * size]
        batch = to_device(ds.collate(part, np.zeros(len(part), int), samples), device)
        if columns is None:
            loss.append(objective(batch)[0].item())
        else:
            at = [objective.columns.index(c) for c in columns]
            scores.append(objective.head(*objective.encoder(batch)).float()[:, at].cpu().numpy())
    if columns is None:
        return float(np.mean(loss)), math.nan
    z, y = np.concatenate(scores), np.array(ds.labels[rows[:len(rows) // size * size]])[:, columns]
    return entropy(z, y), float(macro(auroc(z, y))[0])


def entropy(z, y):
    """Mean binary cross-entropy (nats) of logits z (n, K) over the known labels y."""
    known = np.isfinite(y)
    return float((np.logaddexp(0, z) - np.where(known, y, 0) * z)[known].mean())


def ood(name, contract):
    """(Dataset, label columns) of dataset:task, under the contract of what is pretrained on."""
    data, _, task = name.partition(':')
    ds = Dataset(data)
    if differs := ds.contract.differs(contract):
        raise Stop(f'datasets/{data} has another contract than the pretraining data ({differs}): prepare them alike')
    return ds, ds.columns(task or first_task(ds))


def out_of_distribution(encoder, name, samples, contract, device):
    """{ood_TASK_val, _test, _auroc}: a linear probe on the first crops of dataset:task. The three highest folds test, the next validates,
    the others train."""
    ds, columns = ood(name, contract)
    y, folds = np.array(ds.labels[:, columns]), np.unique(ds.fold[ds.fold >= 0])
    rows = np.flatnonzero((ds.length >= samples) & np.isfinite(y).any(1) & (ds.fold >= 0))
    part = lambda chosen: np.flatnonzero(np.isin(ds.fold[rows], chosen))
    tr, val, test = part(folds[:-4]), part(folds[-4:-3]), part(folds[-3:])
    y = y[rows]
    both = lambda p: np.isfinite(auroc(np.zeros((len(p), y.shape[1])), y[p])[0]) if len(p) else np.zeros(y.shape[1], bool)
    y = y[:, both(tr) & both(test) & ~(np.isfinite(y) & ~np.isin(y, (0, 1))).any(0)]
    if not y.shape[1]:
        raise Stop(f'{name}: no yes/no label has both values in the training and the test folds')
    X = embed(encoder, ds, rows, samples, device, name, first=True)
    predict, z = linear_probe(X, y, tr, val)
    score = predict(X[test])
    key = 'ood_' + name.replace(':', '_')
    return {f'{key}_val': entropy(z, y[val]), f'{key}_test': entropy(score, y[test]), f'{key}_auroc': float(macro(auroc(score, y[test]))[0])}


def assess(objective, t, ds, anchors, oods, device):
    """Losses of a checkpoint: in distribution on 512 training records and all validation and test records, then out of distribution."""
    objective.eval()
    samples = round(t.window * ds.contract.fs)
    rows = [r[ds.length[r] >= samples] for r in ds.split()]
    rows[0] = ds.nested(rows[0], t.records, t.seed)[:512]
    columns = None
    if t.objective == 'supervised':
        columns = [ds.label_names.index(n) for n in anchors] if anchors else objective.columns
    result = {}
    for name, part in zip(('train', 'val', 'test'), rows):
        result[f'id_{name}'], result[f'id_{name}_auroc'] = held_out(objective, ds, part, t, device, columns)
    result.pop('id_train_auroc')
    seen = round(samples / getattr(OBJECTIVES[t.objective], 'views', 1))
    for name in oods:
        result |= out_of_distribution(objective.encoder, name, seen, ds.contract, device)
    return result


def worth(row):
    """What early stopping watches, lower is better: validation loss in distribution, out of it where targets move."""
    values = [v for k, v in row.items() if k.endswith('_val') and k.startswith('ood_')] if row['objective'] in MOVING else [row['id_val']]
    return float(np.mean([float(v) for v in values]))


def rows_of(folder):
    """Finished evaluations of a run."""
    file = folder / 'rows.csv'
    return list(csv.DictReader(open(file, newline=''))) if file.exists() else []


def finished(rows, steps, patience):
    """Whether a run has reached its last step, or its validation loss has not improved at `patience` evaluations in turn."""
    if not rows:
        return False
    values = [worth(r) for r in rows]
    return int(rows[-1]['step']) >= steps or len(values) - 1 - int(np.argmin(values)) >= patience


def run_one(name, t, arm, anchors, a, threads):
    """Train one run from evaluation to evaluation until it is finished. A killed one goes on from its last checkpoint, exactly: a step is
    evaluated after its checkpoint is on disk, and a row is written after it is evaluated. Returns its rows, or why there are none."""
    try:
        torch.set_num_threads(threads)
        return legs(name, t, arm, anchors, a)
    except Stop as e:                                            # it would end the worker, not the sweep
        return f'{name}: {e}'


def legs(name, t, arm, anchors, a):
    folder = Path(a.out, 'runs', name)
    folder.mkdir(parents=True, exist_ok=True)
    rows, ds, device, oods = rows_of(folder), Dataset(t.data), pick_device(t.device), a.ood if arm != 'rate' or t.objective in MOVING else ()
    saved = load(folder / 'ckpt.pt') if (folder / 'ckpt.pt').is_file() else {}
    for k, v in saved.get('args', {}).items():
        if v != getattr(t, k) and k not in ('save_every', 'log_every'):
            raise Stop(f'{folder} was begun with {k} = {v}, not {getattr(t, k)}: sweep as before, or take another --out')
    for step in [t.steps] if arm == 'rate' else ladder(t.steps):
        if finished(rows, t.steps, a.patience):
            break
        if rows and int(rows[-1]['step']) >= step:
            continue
        with open(folder / 'train.txt', 'a') as log, contextlib.redirect_stdout(log):
            objective = train.train(copy.copy(t), folder, saved, until=step)
        saved = load(folder / 'ckpt.pt')
        began = time.time()
        batch = to_device(ds.batch(ds.split()[0], round(t.window * ds.contract.fs), min(t.batch, t.records), 0, 0), device)
        with torch.no_grad():
            student, extra = counted(objective.eval(), batch)
        encoder = objective.encoder
        patients = len(np.unique(ds.patient[ds.nested(trainable(ds, t), t.records, t.seed)]))
        row = dict(run=name, family=t.backbone, paradigm='SL' if t.objective == 'supervised' else 'SSL', objective=t.objective, arm=arm, size=t.size,
                   N=parameters(encoder), N_total=parameters(objective), macs=round(student), extra_macs=round(extra), batch=t.batch, D=t.records,
                   patients=patients, labels=len(getattr(objective, 'columns', ())), lr=t.lr, step=step, epochs=round(step * t.batch / t.records, 4),
                   flops=float((6 * student + 2 * extra) * t.batch * step), seed=t.seed, **assess(objective, t, ds, anchors, oods, device))
        row['seconds'] = round(time.time() - began, 2)
        rows.append({k: str(v) for k, v in row.items()})
        if worth(rows[-1]) == min(map(worth, rows)):
            (folder / 'best').mkdir(exist_ok=True)
            shutil.copyfile(folder / 'ckpt.pt', folder / 'best/ckpt.pt.partial')
            os.replace(folder / 'best/ckpt.pt.partial', folder / 'best/ckpt.pt')
        write_csv(folder / 'rows.csv', rows)
    return rows


def trainable(ds, t):
    """Training records that last the run's window."""
    rows = ds.split()[0]
    return rows[ds.length[rows] >= round(t.window * ds.contract.fs)]


# ---------------------------------------------------------------------------------------------------------------------
# sweeps: all runs

def estimate(a, ds, runs, device):
    """Prints what runs cost at most: a step of each size is timed, evaluations are forward passes."""
    cost, total = {}, 0.
    crops = min(512, max(a.records)) + sum(map(len, ds.split()[1:])) + sum(len(Dataset(o.split(':')[0])) for o in a.ood)
    for t, arm, _ in tqdm(runs.values(), desc='timing', leave=False, disable=None):
        if (key := (t.backbone, t.objective, t.size)) not in cost:
            columns = ds.columns(t.task or first_task(ds)) if t.objective == 'supervised' else ()
            objective = train.build(t, ds.contract.fs, columns, train.load_tokenizer(t.tokenizer, ds.contract)[0] if t.tokenizer else None).to(device)
            batch = to_device(ds.batch(trainable(ds, t), round(t.window * ds.contract.fs), t.batch, 0, 0), device)
            for _ in range(2):                                   # the first step also grows the heap
                began = time.perf_counter()
                objective(batch)[0].backward()
                cost[key] = time.perf_counter() - began
        evaluations = 1 if arm == 'rate' else len(ladder(t.steps))
        total += cost[key] * (t.steps + evaluations * crops / t.batch / 3)
    print(f'{len(runs)} runs, at most {total / 60:.0f} core-minutes ({a.jobs} at a time); early stopping ends many sooner')


def collect(out, prefix=''):
    """All rows of finished and unfinished runs in `out`, pilots apart, in one order whatever the order they were made in."""
    rows = [r for folder in sorted(Path(out, 'runs').glob('*')) if folder.name.startswith('rate_') == (prefix == 'rate_') for r in rows_of(folder)]
    if rows:
        write_csv(Path(out, f'{prefix}runs.csv'), rows)
    return rows


def run_all(work, a, name):
    """work: {name: (function, arguments)}, a.jobs at a time in processes of their own. Stops, after the others are done, with what failed."""
    results, threads = {}, max(1, (os.cpu_count() or 1) // a.jobs)
    with ProcessPoolExecutor(a.jobs, multiprocessing.get_context('spawn')) as pool:
        futures = {pool.submit(function, *arguments, threads): key for key, (function, arguments) in work.items()}
        for future in tqdm(as_completed(futures), desc=name, total=len(futures), disable=None):
            results[futures[future]] = future.result()
            collect(a.out)
    if failed := [r for r in results.values() if isinstance(r, str)]:
        raise Stop(f'{len(failed)} of {len(work)} runs stopped; the first: {failed[0]}')
    return results


def sweep(a):
    """Make the rows of runs.csv that are not there yet."""
    ds, device = Dataset(a.data), pick_device(a.device)
    for name in a.ood:                                           # prepared, or refused, before anything is trained
        ood(name, ds.contract)
    most = len(ds.split()[0])
    a.records = sorted({most if r == 'all' else r for r in a.records})
    if a.records[-1] > most:
        raise Stop(f'{a.data} has {most:,} training records: --records must not exceed that')
    a.jobs = a.jobs or (1 if device.type == 'cuda' else os.cpu_count() or 1)
    Path(a.out).mkdir(parents=True, exist_ok=True)
    if a.kind == 'finetune':
        return finetune(a)
    trial, runs = {} if a.lr else pilots(a, ds), plan(a, ds, {})
    estimate(a, ds, trial | runs, device)
    if a.estimate:
        return
    rates = {}
    for name, rows in run_all({n: (run_one, (n, *r, a)) for n, r in trial.items()}, a, 'rates').items():
        key = tuple(rows[-1][k] for k in ('family', 'objective', 'size'))
        rates[key] = min(rates.get(key, (math.inf, 0)), (worth(rows[-1]), float(rows[-1]['lr'])))
    collect(a.out, 'rate_')
    for key, (value, lr) in sorted(rates.items()):
        print(f'{" ".join(key)}: rate {lr:g}')
    done = run_all({n: (run_one, (n, *r, a)) for n, r in plan(a, ds, {k: lr for k, (_, lr) in rates.items()}).items()}, a, f'sweep {a.kind}')
    rows = collect(a.out)
    print(f'{a.out}/runs.csv: {len(rows)} rows of {len({r["run"] for r in rows})} runs; fit them with python scaling.py fit {a.out}/runs.csv')


def finetune_one(folder, a, threads):
    """Rows of fine-tuning one run's best checkpoint, and of training its shape from scratch, on each number of labelled records."""
    try:
        torch.set_num_threads(threads)
        with contextlib.redirect_stdout(open(os.devnull, 'w')):
            run = open_run(Path(folder, 'best'))
            data, _, task = a.ood[0].partition(':')
            t = Task(data, [task] if task else None, [run], pick_device(a.device))
        origin, rows = rows_of(Path(folder))[0], []
        for mode, count in itertools.product(('finetune', 'scratch'), a.records):
            if count > t.available:
                continue
            recipe = replace(PROTOCOLS['quick'], batch=a.batch, schedule='constant', patience=10)
            epochs = math.ceil(a.steps * a.batch / (.8 * count))
            arm = Arm(mode, [run['net'] if mode == 'finetune' else fresh(run)], mode, recipe, epochs)
            torch.manual_seed(run['seed'])
            p = t.output(arm.encoders[0], arm, count, run['seed'], 0)[0]
            z = np.log(p.clip(1e-6, 1 - 1e-6) / (1 - p.clip(1e-6, 1 - 1e-6)))
            rows.append({k: origin[k] for k in ('run', 'family', 'paradigm', 'objective', 'size', 'N', 'D', 'seed')}
                        | dict(task=a.ood[0], mode=mode, D_F=count, loss=entropy(z, t.y), auroc=float(macro(auroc(z, t.y))[0])))
        return rows
    except Stop as e:
        return f'{folder}: {e}'


def finetune(a):
    """Effective data transferred (2605.17276, Eq. S.9): rows of finetune.csv. Finished scores are kept in out/scores."""
    folders = [f.parent.parent for f in sorted(Path(a.out, 'runs').glob('*/best/ckpt.pt')) if not f.parent.parent.name.startswith('rate_')]
    first = {f: rows_of(f)[0] for f in folders if rows_of(f)}
    most = max((int(r['D']) for r in first.values()), default=0)
    folders = [f for f, r in first.items() if r['family'] in a.family and r['objective'] in a.objective and int(r['seed']) in a.seeds and int(r['D']) == most]
    if not folders:
        raise Stop(f'{a.out} has no runs to fine-tune: sweep them first, with python scaling.py sweep params --out {a.out}')
    results = run_all({str(f): (finetune_one, (str(f), a)) for f in folders}, a, 'sweep finetune')
    rows = [r for f in folders for r in results[str(f)]]
    write_csv(Path(a.out, 'finetune.csv'), rows)
    print(f'{a.out}/finetune.csv: {len(rows)} rows; python scaling.py transfer {a.out}/finetune.csv')


def number_or_all(text):
    return text if text == 'all' else int(text)


def sweep_flags(p):
    p.add_argument('kind', choices=list(KINDS), help='; '.join(f'{k}: {v}' for k, v in KINDS.items()))
    p.add_argument('--family', nargs='+', default=['s4'], choices=list(SIZES), help='backbones')
    p.add_argument('--objective', nargs='+', default=['cpc', 'supervised'], choices=list(OBJECTIVES))
    p.add_argument('--size', nargs='+', help="sizes, ascending (default: the five smallest of the family's ladder, see python models.py)")
    p.add_argument('--records', nargs='+', type=number_or_all, default=[32, 100, 320, 1000, 'all'], help='numbers of pretraining (finetune: labelled) records')
    p.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='of corners and centre; all other points take the first')
    p.add_argument('--data', default='synthetic', help='prepared dataset to pretrain on')
    p.add_argument('--ood', nargs='*', default=['shifted:findings', 'sample:super'], metavar='DATA:TASK', help='where linear probes are fitted; finetune takes the first')
    p.add_argument('--fixed', choices=['steps', 'epochs'], default='steps', help='what is the same for every number of records')
    p.add_argument('--steps', type=int, default=400, help='at most, if steps are fixed')
    p.add_argument('--epochs', type=float, default=20, help='at most, if epochs are fixed')
    p.add_argument('--batch', type=int, default=32)
    p.add_argument('--schedule', choices=['cosine', 'constant'], default='constant', help='constant: no evaluation is more annealed than another')
    p.add_argument('--patience', type=int, default=3, help='evaluations, a factor of sqrt 2 in steps apart, without a better validation loss before a run stops')
    p.add_argument('--lr', type=float, help='one rate for all (default: the best of three for each size)')
    p.add_argument('--lr-steps', type=int, default=150, help='of the runs that choose the rate')
    p.add_argument('--labels', default='findings+tail', help='labels: the label sets to draw from')
    p.add_argument('--tokenizer', help='beats: run folder of a vqbeat')
    p.add_argument('--jobs', type=int, help='runs at a time (default: one per core, 1 on CUDA)')
    p.add_argument('--estimate', action='store_true', help='print what it would cost, train nothing')
    p.add_argument('--device')
    p.add_argument('--out', default='out/scaling')


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest='command')
    sweep_flags(commands.add_parser('sweep'))
    a = p.parse_args(argv)
    sweep(a)


if __name__ == '__main__':
    main()
