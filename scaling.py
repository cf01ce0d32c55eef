"""Scaling laws of ECG pretraining: sweeps of runs, and laws fitted to them with intervals. A law is
refused where the runs cannot identify it.

    python scaling.py                            # published tables refitted, half a minute
    python scaling.py sweep joint --estimate     # cost of a sweep over sizes and records
    python scaling.py sweep joint                # make it: out/scaling/runs.csv
    python scaling.py fit out/scaling/runs.csv   # L(N, D) = E + A N^-alpha + B D^-beta
    python scaling.py fit mine.csv --loss val    # anybody's runs: columns N, D and a loss
    python scaling.py fit runs.csv --axis D      # one axis alone, where the other has one level
    python scaling.py allocate runs.csv          # compute split between parameters and records
    python scaling.py transfer runs.csv          # loss against loss out of distribution
    python scaling.py overfit runs.csv           # the cost of too few records, how many suffice
    python scaling.py sweep labels --objective supervised
    python scaling.py labels runs.csv            # more training labels, on the same anchor labels
    python scaling.py winners runs.csv           # which configuration is lowest, and crossings
    python scaling.py loss-vs-error runs.csv     # does a lower loss mean a smaller error?
    python scaling.py sweep finetune             # the sweep's best checkpoints, fine-tuned
    python scaling.py transfer out/scaling/finetune.csv         # effective data transferred

Laws and experiments of arXiv 2605.17276, fitted as Hoffmann et al. (2203.15556, Approach 3) with
the corrections of Besiroglu et al. (2404.10102); loss-vs-error is of 2605.12241. Of several rows of
a run, the one with the lowest validation loss counts, and its test loss is fitted. Tables and
figures land beside the CSV of runs, or in --out.
"""
import argparse
import contextlib
import csv
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise, permutations, product
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train
from data import HERE, Dataset, Stop, overlap, read_seen, run_script
from evaluate import (PROTOCOLS, Arm, Task, cross_entropy, figure, first_task, macro_auroc,
                      open_run, predict, quick_probe, slug, write_csv, yes_no)
from models import SIZES, count_parameters, pick_device, to_device
from objectives import OBJECTIVES

# -------------------------------------------------------------------------------------------------
# a table of runs

MOVING = 'jepa', 'data2vec', 'dinosr', 'hubert'         # their targets are learned in the run
TEXT = 'run', 'family', 'paradigm', 'objective', 'arm', 'mode', 'size', 'task'
NUMBERS = 'D_F', 'step', 'seed', 'lr', 'labels', 'batch'
# columns of whole numbers and the least of each; N = 2 would be two million, written short
COUNTS = dict(N=10, D=1, D_F=1, labels=1, flops=1)


def refuse(runs, wrong, why):
    """Stop where a row is wrong (n,), and name the line of the first one."""
    if wrong.any():
        raise Stop(f'the table of runs, line {runs.line[wrong].iloc[0]}: {why}')


def read_runs(path, losses=None, needed=('N', 'D')):
    """A CSV with one row per evaluation of a run: (DataFrame, names of its losses).

    losses: columns to fit; by default id_test and all ood_*_test, else loss. needed: other columns
    that must be there. Added: `line` in the file; `configuration` from family, paradigm, objective
    and, where there are several, arm; absent columns of TEXT ('') and NUMBERS (NaN). Runs that have
    not finished are left out. Raises Stop on missing columns and cells, rows that are there twice,
    counts that are not whole numbers, and several steps without a column `run`."""
    try:
        with open(path, newline='', encoding='utf-8-sig') as f:
            header, *rows = csv.reader(f)
    except (ValueError, csv.Error) as e:
        raise Stop(f'{path} is no CSV with the names of its columns in the first line: {e}')
    rows = {line: row for line, row in enumerate(rows, 2) if row}
    if ragged := [line for line, row in rows.items() if len(row) != len(header)]:
        raise Stop(f'{path}, line {ragged[0]}: not as many cells as the header has')
    losses = losses or [c for c in header if re.fullmatch('id_test|ood_.+_test', c)] or ['loss']
    if missing := [c for c in (*needed, *losses) if c not in header or not rows]:
        raise Stop(f'{path} lacks the column {", ".join(missing)} (--loss names the columns of '
                   f'losses); it has {len(rows)} rows of {", ".join(header)}')
    if words := {*losses} & {*TEXT}:
        raise Stop(f'{words.pop()} is no loss: name a column of numbers with --loss')
    runs = pd.DataFrame(list(rows.values()), columns=header).assign(line=list(rows))
    for c in {*header, *NUMBERS} - {*TEXT}:
        runs[c] = pd.to_numeric(runs.get(c, ''), errors='coerce') * 1.
    for c in TEXT:
        runs[c] = runs.get(c, '')
    for c in {*needed} & {*COUNTS}:
        refuse(runs, ~(runs[c] >= COUNTS[c]) | (runs[c] % 1 != 0), f'{c} must be a whole number of '
               f'at least {COUNTS[c]} in every row, written out: 2000000, not 2 or 2M')
    alone = runs.run == ''
    twice = ~alone & runs.duplicated(['run', 'step', 'mode', 'D_F', 'task'])
    refuse(runs, twice | runs.duplicated(header), 'it is there twice, or is the same step of the '
           'same run as an earlier line: remove one')
    refuse(runs, alone & (runs.step[alone].nunique() > 1), 'there are several steps, but no column '
           '`run` that says which rows belong together')
    runs['run'] = runs.run.where(~alone, runs.line.astype(str))
    if 'finished' in header:
        unfinished = runs.groupby('run').finished.transform('max') == 0
        if unfinished.any():
            print(f'{runs.run[unfinished].nunique()} runs have not finished and are left out; the '
                  'same sweep command finishes them')
        runs = runs[~unfinished].copy()
    names = ['family', 'paradigm', 'objective'] + ['arm'] * (runs.arm.nunique() > 1)
    names = runs[names].itertuples(index=False)
    runs['configuration'] = [' '.join(filter(None, row)) or 'all runs' for row in names]
    return runs, losses


def incomparable(runs, loss, moving=False):
    """Why the losses of these runs of one configuration do not compare, or ''. moving: losses whose
    targets move with the run are taken all the same."""
    # HuBERT++ is hubert
    objective, inside = runs.objective.iloc[0].lower().rstrip('+'), not loss.startswith('ood_')
    if runs[loss].isna().all():
        return f'no {loss}'
    if objective in MOVING and inside and not moving:
        return ('its targets come from a network or codebook that learns too, so losses of two '
                'runs do not compare: only ood_*_test is fitted')
    if objective == 'cmsc' and inside and runs.batch.nunique() > 1:
        return 'its loss depends on the batch size (the number of negatives): take runs of one'
    return ''


def lowest_validation(runs, keys, loss):
    """Of rows that are equal in `keys`, the one of lowest validation loss, never of test loss."""
    val = re.sub('_test$', '_val', loss)
    several = runs.duplicated(keys, keep=False)
    unknown = val == loss or val not in runs or runs[val].isna()
    refuse(runs, several & unknown, 'there are several rows or learning rates for its run, and no '
           f'validation loss beside {loss} to choose by (NAME_val beside NAME_test): the lowest '
           'test loss would be optimistic. Keep one of them')
    return runs.sort_values(val, kind='stable').drop_duplicates(keys) if several.any() else runs


def select(runs, loss):
    """One row per run of one configuration: the one with the lowest validation loss. Then, of runs
    that differ in their learning rate only, the best by validation. Sorted by N, D and seed.
    Added: `improving`, whether the last evaluation of the run was its best, so that it ended too
    early. Raises Stop on losses that are no positive numbers."""
    refuse(runs, ~((runs[loss] > 0) & (runs[loss] < math.inf)), f'{loss} is no positive number: '
           'repair the row or leave it out')
    last = runs.groupby('run').step.transform('max')
    runs = runs.assign(improving=runs.duplicated('run', keep=False) & (runs.step == last))
    chosen, setting = lowest_validation(runs, ['run'], loss), ['N', 'D', 'labels', 'seed']
    several = chosen.groupby(setting, dropna=False).lr.transform('nunique') > 1
    chosen = pd.concat([chosen[~several], lowest_validation(chosen[several], setting, loss)])
    return chosen.sort_values(['N', 'D', 'seed', 'line'], ignore_index=True)


def comparable(a, needed=('N', 'D'), moving=False):
    """Yield (configuration, loss, all its rows, one row per run) of the table a.runs and the losses
    a.loss. Says what is left out, and why."""
    runs, losses = read_runs(a.runs, a.loss, needed)
    for (name, rows), loss in product(runs.groupby('configuration'), losses):
        if reason := incomparable(rows, loss, moving):
            print(f'left out: {name}, {loss}: {reason}')
        else:
            yield name, loss, rows, select(rows, loss)


OTHER = dict(N='D', D='N')                              # the other scale


def fullest(runs, axis):
    """The runs along `axis` while the other axis is fixed. It is fixed at the level with the most
    levels of `axis`, and of several such at the highest."""
    levels = runs.groupby(OTHER[axis])[axis].nunique()[::-1]
    return runs[runs[OTHER[axis]] == levels.idxmax()]


# -------------------------------------------------------------------------------------------------
# laws

# five numbers; or five arrays (1 + R,), of the fit and of R resamples. A or B is 0 where its axis
# was not fitted
Law = namedtuple('Law', 'E A B alpha beta', defaults=(0., 0., 1., 1.))


def joint_law(N, D, E, A, B, alpha, beta):
    """Loss L(N, D) = E + A N^-alpha + B D^-beta (2605.17276, Eq. 1; 2203.15556, Approach 3).
    N parameters, D records."""
    return E + A * N ** -alpha + B * D ** -beta


@np.errstate(all='ignore')                             # resamples may ask for more than floats hold
def optimum(C, law, k, u=1., v=1.):
    """(N*, D*) of least loss under C = k N^u D^v FLOPs (2605.17276, Appendix B.4, for u = v = 1).
    NaN where u or v is negative, since there is no optimum then."""
    E, A, B, alpha, beta = law
    total = u * beta + v * alpha
    H = np.float_power(v * alpha * A / (u * beta * B), 1 / total)
    return H ** v * (C / k) ** (beta / total), H ** -u * (C / k) ** (alpha / total)


def data_share(law, u=1., v=1.):
    """The share of a marginal log-increase in compute that goes to records at the optimum. The rest
    goes to parameters."""
    return v * law.alpha / (u * law.beta + v * law.alpha)


@np.errstate(all='ignore')
def minimum_data(N, law, tolerance):
    """Records from which a model of N parameters is within `tolerance` (a share of the loss) of
    endless data: L(N, D) / L(N, inf) - 1 = tolerance (2605.17276, Appendix B; Kaplan 2020)."""
    return np.float_power(law.B / (tolerance * joint_law(N, np.inf, *law)), 1 / law.beta)


def pareto(C, L):
    """Indices, by growing compute, of the points that no point of as little compute beats
    (2605.17276, Figure 5a). Of equal points the first stays. C, L (n,)."""
    order = np.lexsort((L, C))
    before = np.r_[math.inf, np.minimum.accumulate(L[order])[:-1]]
    return order[L[order] < before].tolist()


# -------------------------------------------------------------------------------------------------
# fits

AXES = dict(joint=['N', 'D'], N=['N'], D=['D'])         # scales that a law is fitted over
PARAMETERS = dict(joint=Law._fields, N=('E', 'A', 'alpha'), D=('E', 'B', 'beta'))


LOW, HIGH = 1e-3, 3.                            # what an exponent may be


def project(scales, L, weight=1., floor=None):
    """Least squares of E + sum_j c_j s_j^-a_j, E and c not negative: (E, c (J,), a (J,), weighted
    sum of squares). For given exponents the law is linear in the rest (NNLS), so only these are
    searched, on a log grid and then by simplex (`brute` adds it). scales (J, n), L, weight (n,);
    floor: E, if it is known."""
    unit, span = np.exp(np.log(scales).mean(1)), np.log([LOW, HIGH])     # else c spans decades
    root, free = np.sqrt(weight) * np.ones(len(L)), floor is None

    def solve(q):
        a = np.exp(np.clip(np.atleast_1d(q), *span))
        terms = (scales / unit[:, None]) ** -a[:, None]
        terms = np.vstack([np.ones(len(L)), terms]) if free else terms
        return *scipy.optimize.nnls((terms * root).T, (L - (floor or 0.)) * root), a

    ranges = [tuple(span)] * len(scales)
    found, rest, a = solve(scipy.optimize.brute(lambda q: solve(q)[1], ranges, Ns=25))
    E, c = (found[0], found[1:]) if free else (floor, found)
    return E, c * unit ** a, a, rest ** 2


def huber(p, x, l, weight, delta):
    """The weighted SUM of Huber losses of log residuals, and its gradient (1 + 2 J,). A mean would
    be so small that usual tolerances stop the search early (Besiroglu et al., 2404.10102).
    p = (E, log c (J,), a (J,)); x (J, n) and l (n,): logs of scales and losses."""
    E, c, a = np.split(p, [1, 1 + len(x)])
    terms = np.exp(c[:, None] - a[:, None] * x)                              # (J, n)
    model = E + terms.sum(0)
    r = l - np.log(model)
    slope = -weight * np.clip(r, -delta, delta) / model
    gradient = np.r_[slope.sum(), terms @ slope, -(terms * x) @ slope]
    return (weight * scipy.special.huber(delta, r)).sum(), gradient


def fit_law(scales, L, weight=1., delta=1e-3, start=None):
    """The robust fit of L = E + sum_j c_j s_j^-a_j (Hoffmann et al., 2203.15556, Eq. 3).

    scales (J, n): N and D, or one of them. L, weight (n,). delta: of Huber's loss. start: where the
    search begins, by default the least squares of `project`. Returns (E, c (J,), a (J,)) as one
    array, and the same in the search's own units, as a start for other weights."""
    J, x = len(scales), np.log(scales)
    zero, unit = x.mean(1), np.exp(np.log(L).mean())
    x, l = x - zero[:, None], np.log(L / unit)
    if start is None:
        E, c, a, _ = project(np.exp(x), L / unit, weight)
        start = np.r_[E, np.log(np.maximum(c, 1e-9)), a]
    bounds = [(0, np.exp(l.min()))] + [(-25, 6)] * J + [(LOW, HIGH)] * J
    for _ in range(2):                                  # a kink of Huber's loss may stop it early
        start = scipy.optimize.minimize(huber, start, (x, l, weight, delta), 'L-BFGS-B', True,
                                        bounds=bounds, options=dict(ftol=1e-15, gtol=1e-12,
                                                                   maxiter=1000)).x
    a = start[1 + J:]
    return np.r_[start[0] * unit, np.exp(start[1:1 + J] + a * zero) * unit, a], start


def power_law(scales, p):
    """E + sum_j c_j s_j^-a_j (n,) at scales (J, n) for p = (E, c (J,), a (J,))."""
    J = len(scales)
    return p[0] + p[1:1 + J] @ scales ** -p[1 + J:, None]


def draw_weights(n, free, resamples, seed):
    """Weights (1 + R, n) of n runs: ones, then R draws of a bootstrap. Gamma weights keep all runs,
    and so all levels of N and D, in every resample. Their variance n / (n - free) makes up for the
    residuals that a fit of `free` parameters has shrunk."""
    shape = max(n - free, 1) / n
    drawn = np.random.default_rng(seed).gamma(shape, 1 / shape, (resamples, n))
    return np.vstack([np.ones(n), drawn])


def bootstrap(scales, L, start, weights):
    """Laws (1 + R, 1 + 2 J), fitted with each row of weights (1 + R, n), from `start`."""
    return np.array([fit_law(scales, L, w, start=start)[0] for w in weights])


# A law fitted to the loss of n runs, DataFrame `runs`. key: {configuration, loss}; axis: joint, N
# or D; law: Law of numbers. weights (1 + R, n): ones, and those of R resamples; boot: Law of arrays
# (1 + R,), fitted with them. checks: {R2, noise, error_N, error_D}; flags: text, why to doubt it;
# rows: all evaluations of the runs.
Fit = namedtuple('Fit', 'key loss axis runs law weights boot checks flags rows', defaults=(None,))


def unfit(runs, axis):
    """Why runs of these sizes cannot tell the exponents of a law, or ''."""
    levels, cells = runs[['N', 'D']].nunique(), runs[['N', 'D']].drop_duplicates()
    if axis != 'joint':
        decades = math.log10(runs[axis].max() / runs[axis].min())
        few = levels[axis] < 5 or decades < 1.5 - 1e-9
        return (f'{axis} has {levels[axis]} level(s) over {decades:.1f} decades; a curve with a '
                'floor needs 5 levels over 1.5 decades') if few else ''
    for c in OTHER:
        if levels[c] < 3:
            return (f'{c} has {levels[c]} level(s), and its exponent needs three (--axis '
                    f'{OTHER[c]} fits the other alone)')
    if len(runs) < 8:
        return f'{len(runs)} runs are too few for five parameters; 8 are the least'
    if abs(np.log(cells).corr().N.D) > .95:
        return ('N and D grow together (correlation of their logs over .95), so nobody can tell '
                'which of them lowers the loss')
    return ''


def fit_runs(runs, loss, name='all runs', axis='joint', resamples=200, seed=0):
    """Fit a law to the runs of one configuration, one row each (`select`). axis: joint, N or D.
    Returns a Fit, or as text the reason why there is none. The noise is the SD of log residuals. An
    exponent is refused where its term changes the loss by less than the noise over all its levels.
    seed: of the resamples."""
    if reason := unfit(runs, axis):
        return reason
    L, scales = runs[loss].to_numpy(), runs[AXES[axis]].to_numpy(float).T
    if L.max() < L.min() * (1 + 1e-9):
        return 'all runs have the same loss'
    p, start = fit_law(scales, L)
    at, law = power_law(scales, p), Law(**dict(zip(PARAMETERS[axis], p)))
    noise, flags = math.sqrt((np.log(L / at) ** 2).sum() / (len(L) - len(p))), []
    checks = dict(R2=1 - ((L - at) ** 2).mean() / L.var(), noise=noise)
    for c, s, factor, exponent in zip(AXES[axis], scales, p[1:], p[1 + len(scales):]):
        moved = np.ptp(factor * s ** -exponent) / at.mean()
        if moved < noise + 1e-9:
            return (f'over all levels of {c} the law moves by {moved:.1%}, the noise is '
                    f'{noise:.1%}: these runs do not identify its exponent')
        if not LOW * 1.01 < exponent < HIGH / 1.01:
            flags.append(f'exponent of {c} at its bound')
        kept = s < s.max()                              # the error at the largest level, left out
        if not unfit(runs[kept], axis):
            q, _ = fit_law(scales[:, kept], L[kept])
            checks[f'error_{c}'] = (power_law(scales[:, ~kept], q) / L[~kept] - 1).mean()
    if law.E < 1e-6 * L.min():
        flags.append('E = 0')
    if law.E > L.min() * (1 - 1e-6):
        flags.append('E at the lowest loss')
    if n := np.sum(runs.get('improving', 0)):
        flags.append(f'{n} of {len(L)} runs still improving when they ended')
    weights = draw_weights(len(L), len(p), resamples, seed)
    boot = Law(**dict(zip(PARAMETERS[axis], bootstrap(scales, L, start, weights).T)))
    return Fit(dict(configuration=name, loss=loss), loss, axis, runs, law, weights, boot, checks,
               '; '.join(flags))


def span(**values):
    """{name, name_low, name_high} of values (1 + R,): the first, and the 95 % percentile interval
    of the resamples. NaN are left out; infinite values are not interpolated."""
    row = {}
    for name, value in values.items():
        row[name] = value[0]
        row[f'{name}_low'], row[f'{name}_high'] = np.nanquantile(value[1:], [.025, .975],
                                                                 method='inverted_cdf')
    return row


def fit_all(a, axes=('joint',), needed=('N', 'D'), settled=False):
    """Fits of every configuration and loss of a.runs, over all `axes`. settled: without the runs
    that were still improving. Says why others are not fitted, and prints how many of their runs
    there are of each size. Raises Stop where there is no fit."""
    fits, grid, reason = [], [], ''
    for (name, loss, rows, chosen), axis in product(comparable(a, needed), axes):
        late, note = chosen.improving & settled, ''
        if late.any():
            note = (f'{late.sum()} of {len(late)} runs were still improving when they ended and '
                    'are left out (give them more steps); ')
        runs = chosen[~late] if axis == 'joint' else fullest(chosen, axis)
        found = fit_runs(runs, loss, name, axis, a.resamples, [a.seed, *name.encode()])
        if isinstance(found, str):
            reason = reason or f'{name}, {loss}: {note}{found}'
            print(f'not fitted: {name}, {loss}, {axis}: {note}{found}')
            grid.append(chosen.astype(dict(N=int, D=int)))
        else:
            fits.append(found._replace(flags=(note + found.flags).strip('; '), rows=rows))
    if grid:
        cells = pd.concat(grid).drop_duplicates('run')
        print('runs of N parameters (rows) on D records (columns)')
        print(pd.crosstab([cells.configuration, cells.N], cells.D))
    if not fits:
        raise Stop(f'nothing can be fitted. {reason or "No losses can be compared"}. python '
                   'scaling.py sweep joint makes a grid of runs that can be')
    return fits


def along(f, c, level, x):
    """The law of a Fit at sizes x of the scale c; the other scale is at `level`."""
    return joint_law(*((x, level) if c == 'N' else (level, x)), *f.law)


def ratios(fits):
    """Ratios of the exponents of two joint fits of one loss, with intervals. In distribution
    only within an objective, since the losses of two have different units. An exponent at its bound
    is censored, and so is its ratio."""
    rows = []
    for (a, b), (c, e) in product(combinations(fits, 2), (('N', 'alpha'), ('D', 'beta'))):
        one, two = (f.runs.objective.iloc[0] for f in (a, b))
        alike = a.loss.startswith('ood_') or one == two != ''
        free = f'of {c} at its bound' not in a.flags + b.flags
        if a.axis == b.axis == 'joint' and a.loss == b.loss and alike and free:
            rows.append(dict(exponent=e, loss=a.loss, a=a.key['configuration'],
                             b=b.key['configuration'])
                        | span(ratio=getattr(a.boot, e) / getattr(b.boot, e)))
    return rows


def fit_command(a):
    """Fit L(N, D) = E + A N^-alpha + B D^-beta, and each axis of it alone."""
    fits, figures, table = fit_all(a, AXES if a.axis == 'joint' else [a.axis]), {}, []
    for f in fits:
        L = f.runs[f.loss]
        row = f.key | dict(axis=f.axis, runs=len(L), lowest=L.min(), drop=np.ptp(np.log(L)))
        row |= span(**{c: getattr(f.boot, c) for c in PARAMETERS[f.axis]})
        if f.axis == 'joint':
            row |= span(data_share=data_share(f.boot))
        table.append(row | f.checks | dict(flags=f.flags))
        panels = figures.setdefault(f'fit_{slug(*f.key.values())}', {})
        for c in AXES[f.axis]:
            panels[f'{f.loss} over {c}, fit of axis {f.axis}'] = [
                (f'{OTHER[c]} = {level:,.0f}', mine[c], mine[f.loss], partial(along, f, c, level))
                for level, mine in f.runs.groupby(OTHER[c])]
    return dict(fit=table, ratios=ratios(fits)), figures


# -------------------------------------------------------------------------------------------------
# allocation of compute

def power_fit(y, *x, weights):
    """log c and the exponents b (1 + J, 1 + R) of y = c prod_j x_j^b_j, by least squares of the
    logs with each row of weights (1 + R, n). y, x: (n,) or (1 + R, n); points that are not positive
    and finite are left out. NaN where too few are left, or the x depend on each other."""
    found = []
    for row in zip(*np.broadcast_arrays(weights, y, *x)):
        row = np.array(row)
        w, y, *x = row[:, ((row > 0) & (row < math.inf)).all(0)]
        X, root = np.log([np.full(len(w), math.e), *x]).T, np.sqrt(w)
        known = len(w) > X.shape[1] == np.linalg.matrix_rank(X)
        b = np.linalg.lstsq(X * root[:, None], np.log(y) * root)[0]
        found.append(b if known else b + math.nan)
    return np.array(found).T


def beyond(f, **sizes):
    """The scales, as text, on which a size lies outside the runs of a Fit."""
    return ' '.join(c for c, x in sizes.items() if not f.runs[c].min() <= x <= f.runs[c].max())


def allocate_command(a):
    """Sizes and records of least loss for a budget of compute; Pareto frontier of evaluations.

    Compute is C = k N^u D^v, fitted at the best step of each run, so that u and v take up that
    larger runs take more or fewer epochs."""
    table, figures = [], {}
    for f in fit_all(a, needed=('N', 'D', 'flops'), settled=True):
        log_k, u, v = power_fit(f.runs.flops, f.runs.N, f.runs.D, weights=f.weights)
        if not min(u[0], v[0]) > 1e-6:
            print(f'left out: {slug(*f.key.values())}: there is no optimum, since compute does not '
                  f'grow with both N and D (N^{u[0]:.2f} D^{v[0]:.2f})')
            continue
        k, v = np.exp(log_k), np.where(np.minimum(u, v) > 0, v, math.nan)
        for C in np.geomspace(f.runs.flops.min(), 10 * f.runs.flops.max(), 4):
            N, D = optimum(C, f.boot, k, u, v)
            table.append(f.key | dict(C=C) | span(
                N=N, D=D, data_share=data_share(f.boot, u, v), u=u, v=v) | dict(
                predicted=joint_law(N[0], D[0], *f.law), beyond=beyond(f, N=N[0], D=D[0]),
                flags=f.flags))
        # the lambdas below are called after the loop, so they keep this round's law as a default
        best_at = partial(optimum, law=f.law, k=k[0], u=u[0], v=v[0])
        val = f.rows.get(re.sub('_test$', '_val', f.loss), f.rows[f.loss])
        val = val.fillna(f.rows[f.loss]).to_numpy()         # the frontier is chosen by it
        frontier = f.rows.iloc[pareto(f.rows.flops.to_numpy(), val)]
        figures[f'allocate_{slug(*f.key.values())}'] = {
            'N over C, FLOPs': [('runs, and the best N', f.runs.flops, f.runs.N,
                                 lambda C, at=best_at: at(C)[0])],
            f'{f.loss} over C, FLOPs': [
                ('evaluations', f.rows.flops, f.rows[f.loss], None),
                ('Pareto frontier by validation, best law', frontier.flops, frontier[f.loss],
                 lambda C, at=best_at, law=f.law: joint_law(*at(C), *law))]}
    if not table:
        raise Stop('nothing to allocate: with a fixed number of steps more records cost no '
                   'compute; train to early stopping, or for a number of epochs')
    return dict(allocate=table), figures


# -------------------------------------------------------------------------------------------------
# transfer

def transfer_command(a):
    """Loss out of distribution against loss in it; effective data, where rows have mode and D_F.

    The law is L_ood - E_ood = kappa (L_id - E_id)^gamma (2605.17276, Eq. 4). The floors E are
    those of the joint fits. The rows of `sweep finetune` give effective data instead."""
    runs, losses = read_runs(a.runs, a.loss, ())
    if runs['mode'].isin(['scratch', 'finetune']).any():
        return effective(a, losses)
    fits, table, panels = fit_all(a), [], {}
    for i, o in permutations(fits, 2):
        if i.key != o.key | dict(loss='id_test') or not o.loss.startswith('ood_'):
            continue
        # the runs of both, perhaps at two steps, with the weights that they had in the fits
        both = i.runs[['run', i.loss]].reset_index().merge(o.runs[['run', o.loss]], on='run')
        x, y = (both[f.loss].to_numpy() - f.boot.E[:, None] for f in (i, o))         # (1 + R, n)
        log_kappa, gamma = power_fit(y, x, weights=i.weights[:, both['index']])
        kappa = np.exp(log_kappa)
        table.append(o.key | span(kappa=kappa, gamma=gamma) | dict(
            E_id=i.law.E, E_ood=o.law.E, points=len(both), dropped=(np.minimum(x, y)[0] <= 0).sum(),
            flags=f'{i.flags}; {o.flags}'.strip('; ')))
        panels.setdefault(f'{o.loss} - E over id_test - E', []).append(
            (i.key['configuration'], x[0], y[0], lambda x, k=kappa[0], g=gamma[0]: k * x ** g))
    if not table:
        raise Stop('no configuration has a law of id_test and of an ood_*_test, whose floors '
                   'loss-to-loss needs')
    return dict(transfer=table), dict(transfer=panels)


def effective_data(D, L, wanted, weight):
    """Records D_E from which training from scratch reaches each loss of `wanted` (2605.17276,
    Appendix B; Hernandez et al., 2102.01293). L, weight (n,) are of scratch runs on D (n,) records.
    Their mean log losses are made monotone (isotonic regression) and interpolated over log D. inf:
    `wanted` is lower than any scratch run; NaN: higher than with the fewest records."""
    levels, index = np.unique(D, return_inverse=True)
    total = np.bincount(index, weight)
    mean = np.bincount(index, weight * np.log(L)) / total
    falling = scipy.optimize.isotonic_regression(mean, weights=total, increasing=False).x
    return np.exp(np.interp(-np.log(wanted), -falling, np.log(levels), math.nan, math.inf))


def data_transferred(runs, loss, weight):
    """D_T = D_E - D_F = k D_F^a N^b (2605.17276, Eq. S.9): (points, [log k, a, b]) of rows with
    mode scratch or finetune, D_F and N. Only points with D_T > 0 have a log, so where pretraining
    hardly helps the law is biased upwards; `status` tells of the others. NaN where the points are
    too few, b also where they are of one size. weight (n,): of each row."""
    points, runs = [], runs.assign(weight=weight)
    for _, mine in runs.groupby('N'):
        tuned, scratch = (mine[mine['mode'] == m] for m in ('finetune', 'scratch'))
        if scratch.D_F.nunique() > 1:                       # two are the least to read a size off
            D_E = effective_data(scratch.D_F, scratch[loss], tuned[loss], scratch.weight)
            status = np.select([D_E == math.inf, np.isnan(D_E), D_E <= tuned.D_F],
                               ['censored', 'extrapolated', 'negative'], 'ok')
            points.append(tuned.assign(D_E=D_E, D_T=D_E - tuned.D_F, status=status))
    points = pd.concat(points or [runs[:0].assign(D_T=0., status='')])
    sizes = [points.N] if points.N[points.status == 'ok'].nunique() > 1 else []
    law = power_fit(points.D_T, points.D_F, *sizes, weights=[points.weight])[:, 0]
    return points, [*law, math.nan][:3]


def effective(a, losses):
    """Effective data transferred, per configuration, task and loss, against training from scratch
    of the same family and objective: networks of two objectives are not the same."""
    runs, _ = read_runs(a.runs, losses, ('N', 'D_F', 'mode'))
    laws, table, panels, keys = [], [], {}, ['family', 'objective', 'task']
    tuned = runs[runs['mode'] == 'finetune'].groupby(['configuration', *keys])
    for ((name, *same), mine), loss in product(tuned, losses):
        base = runs[(runs['mode'] == 'scratch') & (runs[keys] == same).all(axis=1)]
        part = pd.concat([mine, base]).query(f'`{loss}` > 0')
        weights = draw_weights(len(part), 3, a.resamples, a.seed)        # of runs, not of points
        points, _ = data_transferred(part, loss, weights[0])
        if points.empty:
            continue
        log_k, *powers = np.array([data_transferred(part, loss, w)[1] for w in weights]).T
        law = zip('kab', (np.exp(log_k), *powers))
        laws.append(dict(configuration=name, task=same[-1], loss=loss)
                    | span(**{c: values for c, values in law if not math.isnan(values[0])})
                    | points.status.value_counts().to_dict())
        table.append(points)
        used = points[points.D_T > 0]
        panels.setdefault(f'{loss}: D_T over D_F', []).append(
            (f'{name} {same[-1]}', used.D_F, used.D_T, None))
    if not table:
        raise Stop(f'{a.runs}: no size N has finetune rows, and scratch rows of the same family, '
                   'objective and task on two numbers of records D_F')
    return dict(effective=laws, effective_points=pd.concat(table)), dict(effective=panels)


# -------------------------------------------------------------------------------------------------
# overfitting, labels, winners, loss against error

def overfit_command(a):
    """The cost of too few records, whether it is as the law says, and how many records suffice.

    The extent L / L(N, inf) - 1 is the share of loss that is owed to too few records. Under the
    joint law it is B / z with z = D^beta L(N, inf), one line of slope -1 for all sizes (2605.17276,
    Appendix B; Kaplan 2020, Section 4)."""
    slopes, table, panels = [], [], {}
    for f in fit_all(a):
        N, D, L = f.runs[['N', 'D', f.loss]].to_numpy().T
        laws = Law(*(v[:, None] for v in f.boot))                            # (1 + R, 1)
        limit = joint_law(N, np.inf, *laws)
        z, extent = D ** laws.beta * limit, L / limit - 1                    # (1 + R, n)
        # chosen by the predicted extent: choosing by the observed one would bend the line
        clear = f.law.B / z[0] > 3 * f.checks['noise']
        if len(np.unique(z[0, clear])) < 3:
            print(f'left out: {slug(*f.key.values())}: at under three z the loss exceeds that with '
                  'endless data by three times the noise')
            continue
        _, slope = power_fit(extent[:, clear], z[:, clear], weights=f.weights[:, clear])
        slopes.append(f.key | span(slope=slope, B=f.boot.B) | dict(
            points=clear.sum(), within_noise=(~clear).sum(), flags=f.flags))
        for size, tolerance in product(np.unique(N), a.tolerance):
            least = span(D_min=minimum_data(size, f.boot, tolerance))
            table.append(f.key | dict(N=size, tolerance=tolerance) | least
                         | dict(beyond=beyond(f, D=least['D_min'])))
        panels.setdefault(f'{f.loss}: extent over z', []).append(
            (f'{f.key["configuration"]}, and B / z', z[0, clear], extent[0, clear],
             partial(np.divide, f.law.B)))
    return dict(overfit=slopes, minimum_data=table), dict(overfit=panels)


def labels_command(a):
    """Loss and AUROC on an arm's anchor labels, against the number of labels trained on."""
    table, slopes, panels, keys = [], [], {}, ['configuration', 'arm', 'N', 'D']
    for _, loss, _, runs in comparable(a, ('N', 'D', 'arm', 'labels')):
        runs = runs[runs.arm.isin(['dominant', 'tail'])]
        measures = {loss, re.sub('_test$', '_auroc', loss)} & {*runs}
        for (level, mine), measure in product(runs.groupby(keys), sorted(measures)):
            key = dict(zip(keys, level), measure=measure)
            points = mine.groupby('labels')[measure].agg(['mean', 'std', 'count']).reset_index()
            table.append(points.assign(**key))
            y, sd = points['mean'], points['std'].fillna(0)
            panels.setdefault(f'{measure} over labels', []).append(
                (' '.join(map(str, level)), points.labels, np.array([y, y - sd, y + sd]), None))
            if len(points) > 1:
                line = scipy.stats.linregress(np.log(mine.labels), np.log(mine[measure]))
                half = scipy.stats.t.ppf(.975, len(mine) - 2) * line.stderr
                slopes.append(key | dict(slope=line.slope, slope_low=line.slope - half,
                                         slope_high=line.slope + half))
    if not slopes:
        raise Stop(f'{a.runs} has no arm dominant or tail with several numbers of labels around '
                   'its anchor: python scaling.py sweep labels makes them')
    return dict(labels=pd.concat(table), labels_slopes=slopes), dict(labels=panels)


def winners_command(a):
    """The lowest configuration for each size and number of records, and where two cross."""
    cells, figures, found = [], {}, []
    for name, loss, _, runs in comparable(a):
        # two objectives have two units; families compete within half a decade of N
        field = loss if loss.startswith('ood_') else f'{loss} of {runs.objective[0] or name}'
        near = 10 ** (np.round(2 * np.log10(runs.N)) / 2)
        cells.append(runs.assign(loss=field, N=near, value=runs[loss]))
    if not cells:
        raise Stop(f'{a.runs}: no two losses can be compared')
    cells = pd.concat(cells)
    for field, mine in cells.groupby('loss'):
        found += crossings(mine)
        panels = figures[f'winners_{slug(field)}'] = {}
        for axis in OTHER:
            line = fullest(mine, axis).pivot_table('value', axis, 'configuration')
            panels[f'{field} over {axis}'] = [(name, y.index, y, None) for name, y in line.items()]
    means = cells.pivot_table('value', ['loss', 'N', 'D'], 'configuration')
    winner = means.idxmin(axis=1).where(means.count(axis=1) > 1, 'alone')
    return dict(winners=means.assign(winner=winner).reset_index(), crossings=found), figures


def crossings(cells):
    """Neighbouring cells along N or D, the other fixed, between which the means of two
    configurations change places. clear: before and after, all of several seeds of one lie below all
    of the other. cells: DataFrame of loss, N, D, configuration, value, one row a run."""
    found, cell = [], ['N', 'D']
    means, low, high, count = (cells.pivot_table('value', cell, 'configuration', how)
                               for how in ('mean', 'min', 'max', 'count'))
    for (one, two), fixed in product(combinations(means, 2), cell):
        gap = (means[one] - means[two]).dropna()
        apart = np.maximum(low[one] - high[two], low[two] - high[one]) > 0
        apart &= np.minimum(count[one], count[two]) > 1
        for _, line in gap.groupby(fixed):
            for before, after in pairwise(line.index):
                if gap[before] * gap[after] < 0:
                    up, other = (one, two) if gap[after] < 0 else (two, one)
                    found.append(dict(loss=cells.loss.iloc[0], overtakes=up, other=other,
                                      before='N {:,.0f}, D {:,.0f}'.format(*before),
                                      after='N {:,.0f}, D {:,.0f}'.format(*after),
                                      clear=apart[before] and apart[after]))
    return found


def loss_vs_error_command(a):
    """Correlate pretraining loss and 1 - AUROC downstream, within a configuration (2605.12241).

    A point is the mean over seeds of one N and D. Spearman's rho has a permutation p; no fit."""
    table, panels = [], {}
    for name, _, _, runs in comparable(a, moving=True):
        tasks = [c for c in runs if re.fullmatch('ood_.+_auroc', c)]
        runs['all'] = runs[tasks].mean(axis=1, skipna=False)
        for task in (*tasks, 'all'):
            points = runs.dropna(subset=task).groupby(['N', 'D'])[['id_test', task]].mean()
            if len(points) < 4:
                print(f'left out: {name}, {task}: {len(points)} points are too few to correlate')
                continue
            x, y = points.id_test.to_numpy(), 1 - points[task].to_numpy()
            rho, p = permutation_p(x, y)
            logs = np.corrcoef(np.log(x), np.log(y.clip(1e-6)))[0, 1]
            table.append(dict(configuration=name, task=task, points=len(x), spearman=rho, p=p,
                              pearson_of_logs=logs))
            panels.setdefault(f'1 - {task} over id_test', []).append((name, x, y, None))
    if not table:
        raise Stop(f'{a.runs}: no configuration has four points with an id_test and an ood_*_auroc')
    return dict(loss_vs_error=table), dict(loss_vs_error=panels)


def permutation_p(x, y):
    """(Spearman's rho, two-sided p) over all orders of up to 8 points, else over 40,320 random
    ones. x, y (n,)."""
    x, y = (scipy.stats.zscore(scipy.stats.rankdata(v)) for v in (x, y))
    found = scipy.stats.permutation_test((x,), lambda x, axis: x @ y / len(y), vectorized=True,
                                         permutation_type='pairings', n_resamples=40320, rng=0)
    return found.statistic, found.pvalue


# -------------------------------------------------------------------------------------------------
# published tables

PUBLISHED = HERE / 'tests/published'
# the tables do not say how many records a bin holds: five assumptions, in percent of all
D_GRIDS = [np.geomspace(1, 100, 6), np.geomspace(.1, 100, 6), np.array([1., 5, 10, 25, 50, 100]),
           np.array([.1, .5, 1, 10, 50, 100]), np.array([.1, 1, 5, 10, 50, 100])]
# parameters of the five model bins, of which the two ends are known; records of the whole set
N_GRID, RECORDS = np.geomspace(2e4, 2e8, 5), 2.3e6


def printed_losses(name, bins):
    """{'arch paradigm': losses (datasets, bins)} of Table S.5 or S.6."""
    table = pd.read_csv(PUBLISHED / f'{name}.csv')
    wide = table.pivot(index=['arch', 'paradigm', 'dataset'], columns=bins, values='loss')
    return {' '.join(key): of.to_numpy() for key, of in wide.groupby(level=['arch', 'paradigm'])}


def shared_floor(x, curves):
    """The one floor E, at most the lowest loss, under which all curves (bins,) over x have the
    least squares."""
    return scipy.optimize.minimize_scalar(
        lambda E: sum(project(x[None], L, floor=E)[3] for L in curves),
        bounds=(0, min(map(np.min, curves))), method='bounded').x


def exponents(x, losses, floor):
    """Exponents of curves over x: DataFrame (datasets, 'arch paradigm'). floor: free; shared, one E
    for all curves of a dataset; or zero."""
    table = []
    for curves_of_set in zip(*losses.values()):
        E = shared_floor(x, curves_of_set) if floor == 'shared' else dict(free=None, zero=0.)[floor]
        table.append([project(x[None], L, floor=E)[2][0] for L in curves_of_set])
    return pd.DataFrame(table, columns=list(losses))


def published_command(a):
    """The printed tables of arXiv 2605.17276, refitted: how far its numbers hang on choices."""
    M = printed_losses('table_s5_model_bins', 'model_bin')
    D = printed_losses('table_s6_data_bins', 'data_bin')
    s7 = pd.read_csv(PUBLISHED / 'table_s7_loss_to_loss.csv').dropna(subset='category')
    gamma = s7.groupby(['arch', 'paradigm']).transfer_exponent.agg(
        mean='mean', std=lambda g: g.std(ddof=0), at_bound=lambda g: (g == .05).sum())
    rows, shares, panels = [], [], {}
    data = [('transformer SSL', 'transformer SL'), ('resnet SSL', 'resnet SL')]
    model = [('resnet SL', 'transformer SL'), ('resnet SSL', 'transformer SSL')]
    for (scale, grids, losses, pairs), floor in product(
            (('D', D_GRIDS, D, data), ('N', [N_GRID], M, model)), ('free', 'shared', 'zero')):
        fits = [exponents(x, losses, floor) for x in grids]
        for one, two in pairs:
            axes = f'exponent of {scale} over that of the other, floor {floor}'
            panels.setdefault(axes, []).append(
                (f'{one} over {two}', fits[0][two], fits[0][one], np.array))     # and a diagonal
            ratio = [e[one].mean() / e[two].mean() for e in fits]
            larger = [(e[one] > e[two]).sum() for e in fits]
            rows.append(dict(exponent=scale, floor=floor, a=one, b=two, ratio_min=min(ratio),
                             ratio_max=max(ratio), larger_min=min(larger), larger_max=max(larger),
                             of_medians=fits[0][one].median() / fits[0][two].median()))
    for grid, key in product((D_GRIDS[0], D_GRIDS[2]), M):
        scales = np.array([[*N_GRID, *[N_GRID[3]] * 6], [*[RECORDS] * 5, *grid * RECORDS / 100]])
        laws = [project(scales, np.r_[m, d])[2] for m, d in zip(M[key], D[key])]
        share = np.array([alpha / (alpha + beta) for alpha, beta in laws])
        shares.append(dict(configuration=key, records=str(grid.round(1)), mean=share.mean(),
                           median=np.median(share), above_half=(share > .5).sum()))
    return (dict(loss_to_loss=gamma.reset_index(), exponents=rows, data_shares=shares),
            dict(exponents=panels))


# -------------------------------------------------------------------------------------------------
# tables and figures

# printed below each table: how its columns are read
READING = dict(
    fit='axis N or D: fitted at the level of the other with most runs. lowest: least loss. drop: '
        'natural log of highest over lowest.\nAn exponent says how soon a curve nears its own '
        'floor E, not how low it is or how far it fell. data_share: alpha / (alpha + beta).\n'
        'noise: SD of log residuals. error_N, error_D: relative error of the law at the largest N '
        'or D, when these runs are left out of the fit.\n'
        "cpc's targets are learned too, so part of a change in its id_test is a change of the task",
    ratios='10 times the N (alpha) or D (beta) of a gains as much as 10^ratio times that of b '
           '(2605.17276, Eq. 3). An exponent at its bound has no ratio',
    allocate='C: FLOPs, k N^u D^v. N, D: of least loss under C. data_share: of a marginal increase '
             'in log compute. beyond: the scales on which the optimum lies outside the runs',
    transfer='gamma under 1: diminishing returns. It moves with both floors E',
    effective='D_T = k D_F^a N^b from the points that are ok; censored: no training from scratch '
              'is as good; extrapolated: beyond its sizes; negative: pretraining harms.\nOnly '
              'points with D_T > 0 enter the law, which biases it upwards. Read k and D_T, not a '
              'alone',
    overfit='the law was fitted to these very runs, so a slope near -1 is no proof of it, but one '
            'far from -1 speaks against it',
    minimum_data='D_min: records from which the loss exceeds that with endless data by at most the '
                 'tolerance (a share of it). beyond: D_min lies outside the runs',
    labels='id_* is on the anchor labels, the same at every point of an arm; std: over seeds',
    winners='means over seeds; N is rounded to half a decade; alone: no other has such a run',
    crossings='clear: before and after there are several seeds, and all of one lie below all '
              'of the other',
    loss_vs_error='objectives are never pooled: their losses have different units, and those of '
                  'moving targets not even one scale.\nBoth sides improve with N and D, so a small '
                  'p says that they go together, not that the lower loss is better at one size',
    loss_to_loss='Table S.7: an exponent of .050 is the bound of their fit. The 7.6x of the '
                 'abstract is .383 over this bound (R-SSL over R-SL on sex)',
    exponents='Tables S.5 (N) and S.6 (D). ratio: mean exponent of a over that of b; of_medians: '
              'the same of medians. Published are 1.3 to 2.5 (N) and up to 16 (D).\nmin, max: over '
              'five assumptions of how many records a bin holds; larger: on how many of 11 sets a '
              '> b.\nThe claim "more data-efficient" depends on the floor: a ratio under 1 '
              'reverses it',
    data_shares='published: .90 transformer SL, .27 transformer SSL, .79 resnet SL. records: of '
                'the bins, in percent (assumed)')


def curves(path, panels):
    """A log-log panel for each {'y over x': [(label, x, y, law or None)]}: points, and law(x) as a
    line to three times their range. y (n,), or (3, n): value, low, high, drawn with bars."""
    fig, [axes] = figure(4.6 * len(panels), 4, columns=len(panels))
    for ax, (title, series) in zip(axes, panels.items()):
        for i, (label, x, y, law) in enumerate(series):
            y, colour = np.atleast_2d(y), f'C{i % 10}'
            bars = np.abs(y[1:] - y[0]) if len(y) == 3 else None
            ax.errorbar(x, y[0], bars, fmt='o', ms=4, c=colour, label=label)
            if law:
                line = np.geomspace(np.min(x), 3 * np.max(x))
                ax.plot(line, law(line), c=colour)
        ylabel, _, xlabel = title.partition(' over ')
        ax.set(xlabel=xlabel, ylabel=ylabel, xscale='log', yscale='log')
        ax.tick_params('x', which='minor', rotation=90)          # else they lie over each other
        ax.legend(fontsize=6)
    fig.savefig(path, dpi=120)


def readable(value):
    """A cell of a printed table."""
    if not isinstance(value, float):
        return str(value)
    short = f'{value:,.0f}' if 1e3 <= abs(value) < 1e7 else f'{value:.4g}'
    return '' if math.isnan(value) else short


def deliver(a, tables, figures):
    """Print tables, with `x [low to high]` in place of three columns. Write them and the figures to
    --out, by default beside the CSV of runs."""
    path = Path(a.runs)
    out = Path(a.out or path.parent)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        table = pd.DataFrame(rows)
        if table.empty:
            continue
        write_csv(out / f'{path.stem}_{name}.csv', table.to_dict('records'))
        shown = table.map(readable)
        for c in [c for c in table if f'{c}_low' in table]:
            low, high = shown.pop(f'{c}_low'), shown.pop(f'{c}_high')
            shown[c] += (' [' + low + ' to ' + high + ']').where(shown[c] != '', '')
        print(f'\n{name}\n{shown.to_string(index=False)}\n{READING.get(name, "")}')
    for name, drawn in figures.items():
        curves(out / f'{path.stem}_{name}.png', drawn)
    print(f'\n[low to high]: 95 % of resamples of the runs; an unstable estimate may lie outside.\n'
          f'Tables (CSV) and figures (PNG) are {out}/{path.stem}_*')


def table_flags(p, name):
    """The flags of the commands that read a table of runs, and of published."""
    p.add_argument('--out',
                   help='folder to write to (default: that of the CSV of runs; for published out)')
    if name == 'published':
        return p.set_defaults(runs='out/published.csv')
    p.add_argument('runs', help='CSV of runs, one row per evaluation')
    if name == 'loss-vs-error':
        return p.set_defaults(loss=['id_test'])
    p.add_argument('--loss', nargs='+', help='columns of losses (default: id_test and ood_*_test)')
    if name not in ('labels', 'winners'):
        p.add_argument('--resamples', type=train.within(100, 1e5, int), default=200,
                       help='resamples of the runs, for intervals (200)')
        p.add_argument('--seed', type=train.natural, default=0, help='seed of the resamples (0)')
    if name == 'fit':
        p.add_argument('--axis', choices=AXES, default='joint',
                       help='joint: over both, and over each alone; N or D: this one alone (joint)')
    if name == 'overfit':
        p.add_argument('--tolerance', type=train.share, nargs='+', default=[.1],
                       help='share of the loss that too few records may cost (.1)')


# -------------------------------------------------------------------------------------------------
# cost

def flops(work):
    """FLOPs of work()'s matrix products and convolutions, two per multiply-accumulate, as torch
    counts them, and of real FFTs (5/2 n log2 n each), which it overlooks. Work done element by
    element is not counted."""
    def fft(shape, n):                             # shape: of the real side
        return round(math.prod(shape[:-1]) * 5 / 2 * n * math.log2(n))

    overlooked = {
        torch.ops.aten._fft_r2c: lambda x, *how, out_shape=None, **more: fft(x, x[-1]),
        torch.ops.aten._fft_c2r: lambda x, dim, norm, n, out_shape=None, **how: fft(x, n)}
    counter = FlopCounterMode(display=False, custom_mapping=overlooked)
    with counter, sdpa_kernel(SDPBackend.MATH):    # the attention kernel that can be counted
        work()
    return counter.get_total_flops()


def step_cost(t, ds):
    """(seconds, FLOPs) of one training step with train.py's arguments t: forward and backward of
    the student, and its teacher, tokenizer or codebook. Without the optimiser."""
    with contextlib.redirect_stdout(None):
        rows, columns = train.training_rows(t, ds)
    tokenizer = train.load_tokenizer(t.tokenizer, ds.contract) if t.tokenizer else None
    device = pick_device(t.device)
    objective = train.build(t, ds.contract.fs, columns, tokenizer).to(device)
    samples = round(t.window * ds.contract.fs)
    batch = to_device(ds.batch(rows, samples, t.batch, 0, 0), device)

    def step():
        objective(batch)[0].backward()

    step()                                         # the first one is slower
    began = time.perf_counter()
    step()
    return time.perf_counter() - began, flops(step)


# -------------------------------------------------------------------------------------------------
# sweeps: which runs

def grid(kind, sizes, records):
    """[(size, records, replicated)] of a sweep. params: every size on most records. data: middle
    size on every number. joint: both, the diagonal, and three points off it, so that N and D do
    not grow together. Points at the ends and middle of both axes are replicated with every seed."""
    widest, most = len(sizes) - 1, len(records) - 1
    size, count = len(sizes) // 2, len(records) // 2             # the middle of either axis
    points = set()
    if kind != 'data':
        points |= {(i, most) for i in range(len(sizes))}
    if kind != 'params':
        points |= {(size, j) for j in range(len(records))}
    if kind == 'joint':
        points |= {(round(j * widest / max(1, most)), j) for j in range(len(records))}
        points |= {(0, count), (widest, count), (widest, 0)}
    often = {*product((0, size, widest), (0, count, most))}
    return [(sizes[i], records[j], (i, j) in often) for i, j in sorted(points)]


def evaluation_steps(steps):
    """Steps to evaluate at: a factor of sqrt 2 apart, 50 or more, the last of them `steps`."""
    down = [steps / 2 ** (k / 2) for k in range(40)]
    return sorted({round(step) for step in down if step >= min(50, steps)})


def long_enough(ds, t):
    """Rows (training, validation, test) of the records that last the run's crop."""
    samples = round(t.window * ds.contract.fs)
    return [part[ds.length[part] >= samples] for part in ds.split()]


def settings(a, ds, family, objective, size, records, seed, task=None):
    """train.py's arguments of one run. records: a number, or all that are long enough. The rate is
    constant, so that no evaluation is more annealed than another."""
    t = train.make_parser().parse_args([])
    vars(t).update(objective=objective, backbone=family, size=size, data=a.data, seed=seed, lr=a.lr,
                   batch=a.batch, schedule='constant', device=a.device, probe_every=0)
    t.tokenizer = a.tokenizer if objective == 'beats' else None
    t.task = task or first_task(ds) if objective == 'supervised' else None
    train.fill_in(t)
    most = len(long_enough(ds, t)[0])
    t.records = most if records == 'all' else records
    if t.records > most:
        raise Stop(f'{a.data} has {most:,} training records of {t.window:g} s, as {objective} '
                   f'needs: --records must be at most {most}, or all')
    t.steps = math.ceil(a.epochs * t.records / a.batch) if a.fixed == 'epochs' else a.steps
    return t


def label_sets(a, ds):
    """[(arm, anchor names, training names, seed)] of label scaling (2605.17276, Section 4.2):
    anchored in the tenth of labels that are most frequent, or in the rarest 2 % of those with at
    least ten positives, and extended by random others, nested, up to all of them."""
    columns = ds.columns(a.labels)
    names, y = np.array(ds.label_names)[columns], ds.labels[ds.split()[0]][:, columns]
    count, sets = (y == 1).sum(0), []
    for arm, least, sign, share in (('dominant', 1, -1, .1), ('tail', 10, 1, .02)):
        rows = np.flatnonzero(yes_no(y) & (count >= least))
        pool = names[rows][np.argsort(sign * count[rows], kind='stable')].tolist()
        anchors = max(2, round(share * len(pool)))
        for seed in a.seeds:
            others = np.random.default_rng([seed, 4]).permutation(pool[anchors:]).tolist()
            for total in sorted({max(anchors, round(f * len(pool))) for f in (0, .3, .5, 1)}):
                training = pool[:anchors] + others[:total - anchors]
                sets.append((arm, pool[:anchors], training, seed))
    return sets


def pairs(a):
    """[(family, objective, sizes)] of the flags, without combinations that do not exist. Default
    sizes: the five smallest of the family that are named layers x width, as in 4x64."""
    sizes = {f: a.size or [s for s in SIZES[f] if 'x' in s][:5] for f in a.family}
    if bare := [f for f in a.family if not sizes[f]]:
        raise Stop(f'{bare[0]} has no ladder of sizes: name some with --size, of '
                   f'{", ".join(SIZES[bare[0]])}')
    found = [(f, o, sizes[f]) for f, o in product(a.family, a.objective)
             if f in OBJECTIVES[o].rates and (o == 'supervised' or a.kind != 'labels')]
    if not found:
        raise Stop(f'none of {", ".join(a.objective)} runs on any of {", ".join(a.family)} in '
                   f'sweep {a.kind}: see python objectives.py')
    return found


def plan(a, ds, rates=None):
    """The runs of a sweep: {name: (train.py's arguments, arm, anchor labels)}. rates: {(family,
    objective, size): rate}; None: the pilot runs that choose them, short ones on all records at
    three rates for each size, since a rate that suits one size only would bend alpha."""
    runs = {}
    for family, objective, sizes in pairs(a):
        middle = sizes[len(sizes) // 2]
        if rates is None:
            tried = [middle] if a.kind in ('data', 'labels') else sizes
            for size, factor in product(tried, (10 ** -.5, 1, 10 ** .5)):
                t = settings(a, ds, family, objective, size, 'all', 100)      # no seed of the sweep
                t.lr, t.steps = float(f'{t.lr * factor:.1g}'), a.lr_steps
                runs[f'rate_{family}_{objective}_{size}_{t.lr:g}'] = t, 'rate', ()
        elif a.kind == 'labels':
            for arm, anchors, names, seed in label_sets(a, ds):
                task = '+'.join(names)
                t = settings(a, ds, family, objective, middle, a.records[-1], seed, task)
                name = f'{family}_{objective}_{middle}_{arm}{len(names)}_s{seed}'
                runs[name] = t, arm, anchors
        else:
            for size, count, often in grid(a.kind, sizes, a.records):
                for seed in a.seeds if often else a.seeds[:1]:
                    t = settings(a, ds, family, objective, size, count, seed)
                    name = f'{family}_{objective}_{size}_{t.records}_{a.fixed}_s{seed}'
                    runs[name] = t, a.fixed, ()
    for t, arm, _ in runs.values():
        t.lr = (rates or {}).get((t.backbone, t.objective, t.size), t.lr)
    return runs


# -------------------------------------------------------------------------------------------------
# sweeps: one run

@torch.no_grad()
def held_out(objective, ds, rows, t, columns):
    """(loss, macro AUROC) of an objective on the first crops of `rows`, in eval mode, with the same
    masks and negatives for every run. columns: of supervised, the labels over which both are taken;
    none for the others, whose AUROC is NaN."""
    objective.eval()
    if len(rows) < 2:
        raise Stop(f'{ds.name}: {len(rows)} held-out records last {t.window:g} s, as {t.objective} '
                   'needs: take other data')
    size, samples, found = min(t.batch, len(rows)), round(t.window * ds.contract.fs), []
    rows = rows[:len(rows) // size * size]              # whole: CMSC's negatives are the batch
    for i, part in enumerate(rows.reshape(-1, size)):
        torch.manual_seed(i)
        batch = to_device(ds.collate(part, np.zeros(size, int), samples), objective.encoder.device)
        if columns:
            found.append(objective.head(*objective.encoder(batch)).float().cpu().numpy())
        else:
            found.append(objective(batch)[0].item())
    if not columns:
        return float(np.mean(found)), math.nan
    learned, y = objective.columns.tolist(), ds.labels[rows][:, columns]
    z = np.concatenate(found)[:, [learned.index(c) for c in columns]]
    return cross_entropy(z, y), macro_auroc(z, y)


def out_of_distribution(encoder, name, seen):
    """{ood_NAME_val, _test, _auroc} of a linear probe on the first crops of dataset:task, its L2
    chosen by validation loss. The three highest folds test, the next validates, the others train.
    Test and validation records of patients in `seen` are left out."""
    data, _, task = name.partition(':')
    ds = Dataset(data)
    columns = np.array(ds.columns(task or first_task(ds)))
    y, folds = ds.labels[:, columns], np.unique(ds.fold[ds.fold >= 0])
    test = np.isin(ds.fold, folds[-3:])
    leaks = np.isin(ds.fold, folds[-4:]) & overlap(ds, seen)
    leaks |= ~test & overlap(ds, ds.names(test))                 # a set may hold a recording twice
    usable = (ds.length >= encoder.samples) & np.isfinite(y).any(1) & ~leaks
    parts = [np.flatnonzero(usable & np.isin(ds.fold, part))
             for part in (folds[:-4], folds[-4:-3], folds[-3:])]
    good = yes_no(y)
    for part in parts:
        good &= (y[part] == 0).any(0) & (y[part] == 1).any(0)
    if not good.any():
        raise Stop(f'{name}: no yes/no label has both values in the training, validation and test '
                   'folds, without patients seen in pretraining')
    z_val, z = quick_probe(encoder, ds, columns[good], parts, by_loss=True)
    y, key = y[:, good], f'ood_{data}_{task}'.rstrip('_')
    return {f'{key}_val': cross_entropy(z_val, y[parts[1]]),
            f'{key}_test': cross_entropy(z, y[parts[2]]),
            f'{key}_auroc': macro_auroc(z, y[parts[2]])}


def describe(objective, t, ds, anchors, oods, step):
    """One row of runs.csv: what was trained and on what, its cost, and its losses in distribution
    (512 training records, all validation and test records) and out of it."""
    encoder, supervised = objective.encoder, t.objective == 'supervised'
    rows = long_enough(ds, t)
    # all training records, though this run may see fewer: the test set is the same for all runs
    seen = ds.names(rows[0]) | (read_seen(t.tokenizer) if t.tokenizer else set())
    rows[0] = ds.nested(rows[0], t.records, t.seed)
    columns = objective.columns.tolist() if supervised else []
    row = dict(family=t.backbone, paradigm='SL' if supervised else 'SSL', objective=t.objective,
               size=t.size, N=count_parameters(encoder), N_total=count_parameters(objective),
               D=t.records, labels=len(columns), lr=t.lr,
               batch=t.batch, step=step, seed=t.seed, flops=step_cost(t, ds)[1] * step)
    columns = [ds.label_names.index(name) for name in anchors] or columns
    for name, part in zip(('train', 'val', 'test'), (rows[0][:512], *rows[1:])):
        row[f'id_{name}'], row[f'id_{name}_auroc'] = held_out(objective, ds, part, t, columns)
    for name in oods:
        row |= out_of_distribution(encoder, name, seen)
    return row


def watched(row):
    """The loss that early stopping watches: validation loss in distribution, or where targets move
    (MOVING) the mean validation loss out of distribution."""
    if row['objective'] not in MOVING:
        return float(row['id_val'])
    return float(np.mean([float(v) for k, v in row.items() if re.fullmatch('ood_.*_val', k)]))


def read_rows(file):
    """The rows of a CSV as dicts of text, none where there is no file."""
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def finished(rows, steps, patience):
    """Whether a run has reached its last step, or has not improved at `patience` evaluations."""
    if not rows:
        return False
    since = len(rows) - 1 - int(np.argmin([watched(row) for row in rows]))
    return int(rows[-1]['step']) >= steps or since >= patience


def begun(folder, t):
    """The checkpoint of a run, None where there is none. Raises Stop if its flags were others."""
    if not (folder / 'ckpt.pt').is_file():
        return None
    checkpoint = train.load_run(folder)
    for k, v in checkpoint['args'].items():
        if v != getattr(t, k) and k not in ('save_every', 'log_every'):
            raise Stop(f'{folder} was begun with {k} = {v}, not {getattr(t, k)}: take the '
                       'flags that it was begun with, or another --out')
    if checkpoint['dataset'] != Dataset(t.data).hash:
        raise Stop(f'{folder} was begun before {t.data} was prepared anew: remove it, and the same '
                   'command makes that run again')
    return checkpoint


def pretrain(folder, t, until=None):
    """Train a run up to a step, or to its end, and return its objective. One that was stopped goes
    on. Its output goes to train.txt."""
    checkpoint = begun(folder, t)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'train.txt', 'a') as log, contextlib.redirect_stdout(log):
        return train.train(t, folder, checkpoint, until)


def sweep_run(name, t, arm, anchors, a):
    """Train one run from evaluation to evaluation until it is finished, and return its rows. The
    best checkpoint is kept in best/. A run that was killed goes on exactly, since a step is
    evaluated after its checkpoint is on disk, and a row is written after it is evaluated."""
    folder, ds = Path(a.out, 'runs', name), Dataset(t.data)
    begun(folder, t)
    rows = read_rows(folder / 'rows.csv')
    oods = a.ood if arm != 'rate' or t.objective in MOVING else ()
    for step in [t.steps] if arm == 'rate' else evaluation_steps(t.steps):
        if finished(rows, t.steps, a.patience):
            break
        if rows and int(rows[-1]['step']) >= step:
            continue
        objective = pretrain(folder, t, step)
        rows.append(dict(run=name, arm=arm) | describe(objective, t, ds, anchors, oods, step))
        rows[-1]['finished'] = int(finished(rows, t.steps, a.patience))
        if watched(rows[-1]) == min(map(watched, rows)):
            (folder / 'best').mkdir(exist_ok=True)
            for file in ('ckpt.pt', 'seen.npz'):
                shutil.copy(folder / file, folder / 'best')
        write_csv(folder / 'rows.csv', rows)
    return rows


# -------------------------------------------------------------------------------------------------
# sweeps: all runs

def share_threads(a):
    """Settle how many processes run at a time, and take the threads that each of them will have, so
    that a step that is timed here costs what it will cost there."""
    threads = torch.get_num_threads()
    a.jobs = a.jobs or (1 if pick_device(a.device).type == 'cuda' else threads)
    torch.set_num_threads(max(1, threads // a.jobs))


def start_worker(threads):
    """First call in a worker: set its threads, and make it end at Ctrl-C and with its parent."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def run_all(work, jobs, name):
    """{key: result} of {key: (function, *arguments)}, `jobs` at a time in processes of their own.
    Raises Stop, after the others are done, where one stopped."""
    context, threads = multiprocessing.get_context('spawn'), torch.get_num_threads()
    results, failed = {}, []
    with ProcessPoolExecutor(jobs, context, start_worker, (threads,)) as pool:
        futures = {pool.submit(*task): key for key, task in work.items()}
        for future in tqdm(as_completed(futures), name, len(futures), disable=None):
            try:
                results[futures[future]] = future.result()
            except SystemExit as e:
                failed.append(f'{futures[future]}: {e}')
            except BrokenProcessPool:
                raise Stop(f'{name}: a worker was killed, probably for lack of memory: take fewer '
                           f'--jobs than {jobs}; the same command goes on where it was')
    if failed:
        raise Stop(f'{len(failed)} of {len(work)} jobs stopped; the first: {failed[0]}')
    return results


def estimate(a, ds, runs):
    """Print what runs take at most: a step of each size is timed, and an evaluation is forward
    alone, a third of a step."""
    seconds, total = {}, 0.
    crops = 512 + sum(map(len, ds.split()[1:])) + sum(len(Dataset(o.split(':')[0])) for o in a.ood)
    for t, _, _ in runs.values():
        key = t.backbone, t.objective, t.size
        if key not in seconds:
            seconds[key], _ = step_cost(t, ds)
        total += seconds[key] * (t.steps + len(evaluation_steps(t.steps)) * crops / t.batch / 3)
    print(f'{len(runs)} runs with the short ones that choose the learning rate: at most '
          f'{total / 60 / a.jobs:.0f} minutes with {a.jobs} at a time; early stopping ends many '
          'sooner')


def make_runs(a, runs, pilot=False):
    """Make the runs of a sweep that are not made yet. Write the rows of all runs in its folder to
    runs.csv, or those of pilots to rate_runs.csv, and return them."""
    work = {name: (sweep_run, name, *run, a) for name, run in runs.items()}
    try:
        run_all(work, a.jobs, f'sweep {a.kind}')
    finally:                                            # what there is, also where a run stopped
        rows = [row for file in sorted(Path(a.out, 'runs').glob('*/rows.csv'))
                for row in read_rows(file) if (row['arm'] == 'rate') == pilot]
        write_csv(Path(a.out, 'rate_runs.csv' if pilot else 'runs.csv'), rows)
    return rows


def sweep_command(a):
    """Train and evaluate models of several sizes on several numbers of records."""
    ds = Dataset(a.data)
    for name in a.ood:                                  # prepared, or refused, before any training
        data, _, task = name.partition(':')
        ood = Dataset(data)
        ood.columns(task or first_task(ood))
        if differs := ood.contract.differs(ds.contract):
            raise Stop(f'{name} has another contract than {a.data} ({differs}): prepare them alike')
    a.records = sorted(a.records, key=lambda count: math.inf if count == 'all' else count)
    if not a.ood and (a.kind == 'finetune' or {*MOVING} & {*a.objective}):
        raise Stop(f'give --ood a dataset: finetune and {", ".join(MOVING)} are judged on it')
    share_threads(a)
    if a.kind == 'finetune':
        return finetune(a)
    pilots = {} if a.lr else plan(a, ds)
    estimate(a, ds, pilots | plan(a, ds, {}))
    if a.estimate:
        return
    Path(a.out).mkdir(parents=True, exist_ok=True)
    best = {}                                           # (family, objective, size): (loss, rate)
    for row in make_runs(a, pilots, True) if pilots else ():
        key = row['family'], row['objective'], row['size']
        best[key] = min(best.get(key, (math.inf, 0.)), (watched(row), float(row['lr'])))
    for key, (_, rate) in best.items():
        print(f'{" ".join(key)}: rate {rate:g}')
    runs = plan(a, ds, {key: rate for key, (_, rate) in best.items()})
    rows = make_runs(a, runs)
    print(f'{a.out}/runs.csv: {len(rows)} rows of {len({row["run"] for row in rows})} runs; fit '
          f'them with python scaling.py fit {a.out}/runs.csv')


def finetune_run(name, a):
    """Rows of fine-tuning one run's best checkpoint, and of training its untrained weights, on each
    number of labelled records."""
    folder, (data, _, task) = Path(a.out, 'runs', name), a.ood[0].partition(':')
    with contextlib.redirect_stdout(None):
        run = open_run(folder / 'best', a.device)
        t = Task(data, task or None, [run])
    if t.numbers.any():
        raise Stop(f'{a.ood[0]} has labels that are numbers: finetune takes yes/no labels')
    origin, rows = read_rows(folder / 'rows.csv')[0], []
    counts = [count for count in a.records if count != 'all' and count <= t.available]
    for mode, count in product(('finetune', 'scratch'), counts):
        epochs = math.ceil(a.steps * a.batch / (.8 * count))     # a fifth of the records validates
        recipe = replace(PROTOCOLS['quick'][mode], epochs=epochs, least_steps=0, batch=a.batch,
                         schedule='constant', patience=max(10, epochs // 10), by_loss=True)
        encoder = run['net' if mode == 'finetune' else 'twin']
        p, _ = predict(t, encoder, Arm(mode, [encoder], mode, recipe), count, run['seed'])
        z, y = scipy.special.logit(p.clip(1e-6, 1 - 1e-6)), t.y[t.test]
        keys = 'run', 'family', 'paradigm', 'objective', 'size', 'N', 'D', 'seed'
        rows.append({k: origin[k] for k in keys} | dict(
            task=a.ood[0], mode=mode, D_F=count, loss=cross_entropy(z, y), auroc=macro_auroc(z, y)))
    return rows


def finetune(a):
    """Write finetune.csv, for effective data transferred (2605.17276, Eq. S.9): the runs of a sweep
    on most records, fine-tuned and from scratch on numbers of labelled records."""
    runs = pd.DataFrame(read_rows(Path(a.out, 'runs.csv')))
    if len(runs):
        runs = runs[runs.family.isin(a.family) & runs.objective.isin(a.objective)
                    & runs.seed.isin(map(str, a.seeds)) & (runs.arm == a.fixed)]
        runs['D'] = runs.D.astype(int)
        most = runs.groupby(['family', 'objective']).D.transform('max')
        runs = runs[runs.D == most].drop_duplicates('run')
    if not len(runs):
        raise Stop(f'{a.out}/runs.csv has no runs of these --family, --objective, --seeds and '
                   f'--fixed: make them with python scaling.py sweep params --out {a.out}')
    print(f'{len(runs)} runs, fine-tuned and from scratch on {len(a.records)} numbers of '
          f'records, at most some {a.steps} steps each')
    if a.estimate:
        return
    results = run_all({name: (finetune_run, name, a) for name in runs.run}, a.jobs, 'finetune')
    rows = [row for name in runs.run for row in results[name]]
    write_csv(Path(a.out, 'finetune.csv'), rows)
    print(f'{len(rows)} rows: python scaling.py transfer {a.out}/finetune.csv')


# -------------------------------------------------------------------------------------------------
# the command line

def sweep_flags(p):
    """The flags of sweep."""
    add = p.add_argument
    add('kind', choices=['params', 'data', 'joint', 'labels', 'finetune'],
        help='params: every size on all records; data: the middle size on every number of records; '
        'joint: both axes, the diagonal and three points off it, as the joint law needs; labels: '
        'supervised on more and more labels; finetune: fine-tuning of the best checkpoints against '
        'training from scratch')
    add('--family', nargs='+', default=['s4'], choices=SIZES, help='backbones (s4)')
    add('--objective', nargs='+', default=['cpc', 'supervised'], choices=OBJECTIVES,
        help='what to pretrain with (cpc supervised)')
    add('--size', nargs='+',
        help='model sizes, ascending (default: the five smallest of the form 4x64)')
    add('--records', nargs='+', type=count_or_all, default=[32, 100, 320, 1000, 'all'],
        help='numbers of pretraining (finetune: labelled) records (32 100 320 1000 all)')
    add('--seeds', nargs='+', type=train.natural, default=[0, 1, 2],
        help='of points at the ends and middle of an axis; others take the first seed (0 1 2)')
    add('--data', default='synthetic', help='prepared dataset to pretrain on (synthetic)')
    add('--ood', nargs='*', default=['shifted:findings', 'sample:super'], metavar='DATA:TASK',
        help='data for linear probes (shifted:findings sample:super); finetune takes the first')
    add('--fixed', choices=['steps', 'epochs'], default='steps',
        help='few and many records get the same number of steps, or of epochs (steps)')
    add('--steps', type=train.count, default=800,
        help='most steps of a run, with --fixed steps (800)')
    add('--epochs', type=train.positive, default=20,
        help='most epochs of a run, with --fixed epochs (20)')
    add('--batch', type=train.count, default=32, help='crops in a batch (32)')
    add('--patience', type=train.count, default=3, help='evaluations, a factor of sqrt 2 in steps '
        'apart, without a better validation loss before a run stops (3)')
    add('--lr', type=train.positive, help='one rate for all (default: the best of three)')
    add('--lr-steps', type=train.count, default=150,
        help='steps of the runs that choose the rate (150)')
    add('--labels', default='findings+tail', help='labels: the label sets to draw from')
    add('--tokenizer', help='beats: run folder of a vqbeat')
    add('--jobs', type=train.count, help='runs at a time (default: one per thread, 1 on a GPU)')
    add('--estimate', action='store_true', help='print the cost, train nothing')
    add('--device', help='cpu or cuda (default: cuda where there is one)')
    add('--out', default='out/scaling', help='folder of the runs and runs.csv (out/scaling)')


def count_or_all(text):
    """An argparse type: a number of records, or the word all."""
    return text if text == 'all' else train.count(text)


COMMANDS = {'sweep': sweep_command, 'fit': fit_command, 'allocate': allocate_command,
            'transfer': transfer_command, 'overfit': overfit_command, 'labels': labels_command,
            'winners': winners_command, 'loss-vs-error': loss_vs_error_command,
            'published': published_command}


def parse(argv=None):
    """The arguments; published where there are none."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest='command', metavar='COMMAND')
    for name, command in COMMANDS.items():
        q = sub.add_parser(name, help=command.__doc__.split('\n')[0], description=command.__doc__)
        sweep_flags(q) if name == 'sweep' else table_flags(q, name)
    return p.parse_args((sys.argv[1:] if argv is None else argv) or ['published'])


def main(argv=None):
    """The command line: see the top of the file."""
    a = parse(argv)
    if a.command == 'sweep':
        return sweep_command(a)
    deliver(a, *COMMANDS[a.command](a))


if __name__ == '__main__':
    run_script(main)
