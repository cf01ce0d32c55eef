"""Analyses beyond the papers. A command, not a test.

    python -m tests.analyses robustness out/a0 out/a1    # noise, missing leads, sex, age
    python -m tests.analyses cka out/a0 --data ptbxl     # how alike are the layers?
    python -m tests.analyses embeddings out/a0           # to a file, for use elsewhere
    python evaluate.py out/a0 --data sample --labels .0625 .125 .25 .5 all
    python -m tests.analyses efficiency out/a0           # power laws over numbers of labels

The default data are the 500 real ECGs. Writes to the first run's folder, or to --out.
"""
import argparse
import copy
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data import Dataset, Stop, resample, run_script
from evaluate import (BOX, DIFFERENCE, INTERVAL, PROTOCOLS, Task, apply, arms_of, batches,
                      check_contract, embed, figure, grouped, interval, linear_probe, minus,
                      open_run, print_table, write_csv)
from models import mean_pool
from scaling import curves, power_law, project

# -------------------------------------------------------------------------------------------------
# robustness: changes of signals x (B, 12, T)

def noisy(snr):
    """White noise at `snr` dB below the power of each crop. Every batch gets the same pattern, so
    that encoders with the same window get the same noise."""
    def change(x):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return x + noise * x.std((1, 2), keepdim=True) / 10 ** (snr / 20)
    return change


def without(*leads):
    """Some of the 12 leads set to zero."""
    return lambda x: x.index_fill(1, torch.tensor(leads), 0.)


def swap_arms(x):
    """Right and left arm electrodes exchanged. I changes its sign; II and III change places, and so
    do aVR and aVL."""
    return torch.cat([-x[:, :1], x[:, [2, 1, 4, 3]], x[:, 5:]], 1)


def at_rate(fs, to):
    """From fs to another sampling rate and back, both in Hz."""
    def change(x):
        back = resample(resample(x.numpy().T, fs, to), to, fs)                # (T', 12, B)
        return torch.from_numpy(back.T[..., :x.shape[2]].copy()).float()
    return change


def changed(ds, change):
    """ds.collate with changed signals."""
    def collate(*crops):
        batch = ds.collate(*crops)
        return batch | dict(x=change(batch['x']))
    return collate


def conditions_of(t):
    """{condition: (change or None, mask of test records)} of a Task, unchanged records first.
    Groups of patients are 20 records or more."""
    age, sex, everybody = t.ds.age[t.test], t.ds.sex[t.test], np.ones(len(t.test), bool)
    groups = {'unchanged': everybody, 'women': sex == 1, 'men': sex == 0, 'age under 40': age < 40,
              'age 40 to 59': (age >= 40) & (age < 60), 'age 60 to 79': (age >= 60) & (age < 80),
              'age 80 or more': age >= 80}
    changes = {'noise at 20 dB': noisy(20), 'noise at 10 dB': noisy(10), 'noise at 0 dB': noisy(0),
               'limb leads only': without(*range(6, 12)), 'lead I only': without(*range(1, 12)),
               'arm electrodes swapped': swap_arms,
               'at 100 Hz and back': at_rate(t.ds.contract.fs, 100)}
    found = {name: (None, mask) for name, mask in groups.items() if mask.sum() >= 20}
    return found | {name: (change, everybody) for name, change in changes.items()}


def robustness(ds, runs, out):
    """Rows of the main metric of linear probes, fitted to unchanged records. They are tested on
    changed records and on groups of patients. diff: value on changed records minus value on the
    same records unchanged, with a paired interval; none for groups."""
    t, rows = Task(ds.name, None, runs), []
    part = copy.copy(t)
    for arm in arms_of(grouped(runs), 'linear', PROTOCOLS['quick']):
        probes = [[linear_probe(t.embedding(encoder), t.y, train, val, t.numbers)[0]
                   for train, val, _ in t.plans] for encoder in arm.encoders]
        for condition, (change, mask) in conditions_of(t).items():
            part.test, part.group, part.patient = t.test[mask], t.group[mask], t.patient[mask]
            collate, outputs = change and changed(ds, change), []
            for encoder, weights in zip(arm.encoders, probes):
                X = embed(encoder, ds, part.test, collate=collate)
                z = np.concatenate([apply(w, X[part.group == i]) for i, w in enumerate(weights)])
                outputs.append([(z, z)])
            found, _ = part.score(outputs)
            for metric, e in list(found.items())[:1]:        # none if a group has no class
                if condition == 'unchanged':
                    clean = e
                row = dict(arm=arm.name, condition=condition, metric=metric, n=mask.sum())
                row |= zip(INTERVAL, interval(e))
                if change:
                    row |= zip(DIFFERENCE, interval(minus(e, clean)))
                rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------------
# similarity of layers, embeddings

def hsic(K, L):
    """Unbiased HSIC (Song et al. 2012, eq. 4) of two Gram matrices (n, n), n >= 4."""
    n, K, L = len(K), K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    cross = 2 / (n - 2) * K.sum(0) @ L.sum(0)
    return ((K * L).sum() + K.sum() * L.sum() / (n - 1) / (n - 2) - cross) / n / (n - 3)


def cka(X, Y):
    """Linear centred kernel alignment (Kornblith et al. 2019) of X (n, p) and Y (n, q), rows of the
    same records, n >= 4: 1 where one is the other up to rotation and scale. Debiased (Nguyen et al.
    2021): near 0 for unrelated ones, and it may be below."""
    K, L = X @ X.T, Y @ Y.T
    return hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L))


@torch.no_grad()
def layer_features(encoder, ds, rows):
    """Mean over tokens of the stem's and each block's output on the records' first crops:
    [(len(rows), width)]."""
    parts = []
    for _, _, batch in batches(encoder, ds, rows, first=True):
        z, pad = encoder.tokens(batch)
        layers = [(None, z)]
        encoder.backbone(z, pad, layers)
        parts.append([mean_pool(h, pad).double().cpu() for _, h in layers])
    return [torch.cat(part).numpy() for part in zip(*parts)]


def long_enough(ds, runs):
    """Rows of the records that last a crop of every encoder."""
    rows = np.flatnonzero(ds.length >= max(run['net'].samples for run in runs))
    if len(rows) < 4:
        raise Stop(f'{ds.name}: too few records are long enough for these encoders')
    return rows


def similarity(ds, runs, out):
    """Rows, and a figure: CKA of every pair of layers of pretrained and untrained encoders, on 512
    records drawn at random. Layer 0 is the stem."""
    rows, layers = np.random.default_rng(0).permutation(long_enough(ds, runs))[:512], {}
    for run in runs:
        for kind, encoder in (('', run['net']), ('untrained ', run['twin'])):
            for i, X in enumerate(layer_features(encoder, ds, rows)):
                layers[f'{run["path"]} {kind}{i}'] = X
    table = [[cka(X, Y) for Y in layers.values()] for X in layers.values()]
    fig, [[ax]] = figure(10, 9)
    fig.colorbar(ax.imshow(table, vmin=0, vmax=1), label='CKA of layers (0: the stem)')
    ax.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
    ax.set_yticks(range(len(layers)), layers, fontsize=6)
    fig.savefig(out / f'cka_{ds.name}.png', dpi=120)
    return [dict(layer=name) | dict(zip(layers, line)) for name, line in zip(layers, table)]


def embeddings(ds, runs, out):
    """Write embeddings_DATA_RUN.npz of each run: X (n, D), y (n, K) with NaN for unknown, labels (K
    names), id, patient, fold, age, sex. Returns a row for each file."""
    rows, table = long_enough(ds, runs), []
    facts = {key: getattr(ds, key)[rows] for key in ('id', 'patient', 'fold', 'age', 'sex')}
    for run in runs:
        X = embed(run['net'], ds, rows).astype(np.float32)
        file = out / f'embeddings_{ds.name}_{Path(run["path"]).name}.npz'
        np.savez(file, X=X, y=ds.labels[rows], labels=np.array(ds.label_names, str), **facts)
        table.append(dict(file=file, records=len(X), width=X.shape[1]))
    return table


def efficiency(ds, runs, out):
    """Rows, and a figure: the power law error = C n^-a + L0 of each arm over the numbers n of
    labelled records that summary.csv in the folder has, five or more. error: 1 - AUROC, or MAE."""
    file, rows, series = out / 'summary.csv', [], []
    table = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=['data', 'metric'])
    table = table[(table.data == ds.name) & table.metric.isin(['AUROC', 'MAE'])]
    keys = ['task', 'mode', 'protocol', 'metric', 'arm']
    for key, mine in table.groupby(keys) if len(table) else ():
        n, error = mine.labelled.to_numpy(float), mine[[*INTERVAL]].to_numpy(float).T
        error = 1 - error if 'AUROC' in key else error
        if len(n) > 4:
            floor, (C,), (a,), _ = project(n[None], error[0], error[0] ** -2)
            rows.append(dict(zip(keys, key)) | dict(numbers=len(n), C=C, a=a, L0=floor))
            series.append((f'{key[1]}, {key[4]}', n, error,
                           lambda x, p=np.array([floor, C, a]): power_law(x[None], p)))
    if not rows:
        raise Stop(f'{file} has no arm with five numbers of labels on {ds.name}: python '
                   f'evaluate.py {runs[0]["path"]} --data {ds.name} --labels .0625 .125 .25 .5 all')
    curves(out / f'efficiency_{ds.name}.png', {f'error on {ds.name} over labelled records': series})
    return rows


def main(argv=None):
    """The command line: see the top of the file."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    analyses = dict(robustness=robustness, cka=similarity, embeddings=embeddings,
                    efficiency=efficiency)
    p.add_argument('analysis', choices=analyses)
    p.add_argument('runs', nargs='+', help='run folders')
    p.add_argument('--data', default='sample', help='a prepared dataset (sample)')
    p.add_argument('--out', type=Path, help="folder of results (default: the first run's)")
    a = p.parse_args(argv)
    runs, ds = [open_run(path) for path in a.runs], Dataset(a.data)
    for run in runs:
        check_contract(run, ds)
    first = Path(runs[0]['path'].partition('@')[0])
    if first.resolve() == BOX:                          # nothing goes into sample/
        first = Path('out/compare_encoder')
    out = a.out or first
    out.mkdir(parents=True, exist_ok=True)
    rows = analyses[a.analysis](ds, runs, out)
    print_table(rows)
    write_csv(out / f'{a.analysis}_{ds.name}.csv', rows)


if __name__ == '__main__':
    run_script(main)
