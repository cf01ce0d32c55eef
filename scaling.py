"""Scaling laws of ECG pretraining: fitted to a table of runs, with intervals, and refused where the runs cannot tell.

    python scaling.py                                    # the papers' printed tables refitted, published against refitted: half a minute
    python scaling.py sweep joint --estimate             # what a sweep over sizes and numbers of records would cost; without the flag: make it
    python scaling.py fit runs.csv                       # L(N, D) = E + A N^-alpha + B D^-beta of each configuration and loss
    python scaling.py fit mine.csv --loss val_loss       # anybody's runs: columns N (parameters), D (records) and a loss
    python scaling.py fit runs.csv --axis D              # one axis alone, where the other has one level
    python scaling.py allocate runs.csv                  # how to split compute between parameters and records
    python scaling.py transfer runs.csv                  # loss against loss; effective data, where rows have mode and D_F
    python scaling.py overfit runs.csv                   # what too few records cost, and how many suffice
    python scaling.py labels runs.csv                    # more training labels, seen on the same anchor labels
    python scaling.py winners runs.csv                   # which configuration is lowest where, and where they cross
    python scaling.py loss-vs-error runs.csv             # does a lower pretraining loss mean a smaller error downstream?
    python scaling.py study grid                         # objectives x backbones like for like; without a part: the whole study, hours
    python scaling.py claims                             # the papers' claims and what the study's tables say of them
    python scaling.py simulate --studies 200             # do the intervals cover a planted truth? some minutes

Laws and experiments of arXiv 2605.17276, fitted as Hoffmann et al. (2203.15556, Approach 3) with the corrections of Besiroglu et al.
(2404.10102); loss-vs-error is of 2605.12241. Where a run has several rows, the one with the lowest validation loss stands for it, and its
test loss is fitted. Tables, figures and JSON in full precision land beside the CSV of runs, or in --out.
"""
import argparse, contextlib, copy, csv, io, itertools, json, math, multiprocessing, os, re, shutil, textwrap, threading, time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import scipy.interpolate
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from tqdm import tqdm

import train
from data import Dataset, Stop, overlap, run_script
from evaluate import (Arm, PROTOCOLS, Task, arms_of, auroc, compare, embed, entropy, figure, first_task, fresh, interval, linear_probe, macro, open_run, slug,
                      write_csv)
from models import SIZES, config_of, count_parameters, load, pick_device, save, to_device
from objectives import OBJECTIVES

MOVING = ('jepa', 'data2vec', 'dinosr', 'hubert')                # their targets move with the run: losses of two runs do not compare
TEXT = ('run', 'family', 'paradigm', 'objective', 'arm', 'mode', 'size', 'task')             # columns that are no numbers


# ---------------------------------------------------------------------------------------------------------------------
# a table of runs

def read_runs(path, losses=None, needed=('N', 'D')):
    """(rows, losses) of a CSV with one row per evaluation. Numbers are floats (NaN where empty), row['line'] is the line in the file.
    losses: columns to fit, by default id_test and all ood_*_test. Raises Stop on missing columns, mixed units and duplicates."""
    try:
        with open(path, newline='', encoding='utf-8-sig') as f:
            reader = csv.DictReader(f)
            rows = [row | dict(line=reader.line_num) for row in reader]
    except FileNotFoundError:
        raise Stop(f'no file {path}: name a CSV of runs, of your own or made by python scaling.py sweep joint')
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise Stop(f'{path} cannot be read as CSV: {e}')
    if not rows:
        raise Stop(f'{path} has no rows')
    columns = [c for c in reader.fieldnames if c]
    losses = losses or [c for c in columns if re.fullmatch('id_test|ood_.+_test', c)] or [c for c in columns if c == 'loss']
    if words := [c for c in losses if c in TEXT]:
        raise Stop(f'{words[0]} is no loss: name a column of numbers with --loss')
    if missing := [c for c in (*needed, *losses) if c not in columns]:
        raise Stop(f'{path} lacks the column {", ".join(missing)}; it has {", ".join(columns)}')
    if not losses:
        raise Stop(f'{path} lacks id_test and ood_*_test: name the column of its loss with --loss; it has {", ".join(columns)}')
    for row in rows:
        if None in row or None in row.values():
            raise Stop(f'{path}, line {row["line"]}: not as many cells as the header has')
        row |= {c: real(row[c]) for c in columns if c not in TEXT}
    for name, what, least in (('N', 'parameters', 10), ('D', 'records', 1)):
        if name in needed:
            check_units(path, rows, name, what, least)
    check_twice(path, rows, columns)
    if {'run', 'finished'} <= set(columns):
        rows = without_unfinished(path, rows)
    return rows, losses


def real(text):
    """A cell as a float, NaN for blanks and words."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def column(rows, name):
    """One column of rows as floats (n,), NaN where it is missing."""
    return np.array([r.get(name, math.nan) for r in rows], float)


def check_units(path, rows, name, what, least):
    """Raises Stop where N or D is no count, or looks like thousands or millions in some rows and like ones in others."""
    for row in rows:
        value = row[name]
        if not 0 < value < math.inf:
            raise Stop(f'{path}, line {row["line"]}: {name} must be a positive number of {what}')
        if value < least or value % 1:
            raise Stop(f'{path}, line {row["line"]}: {name} = {value:g} is no count of {what}; thousands or millions? Write the number out in every row')
    levels = np.unique(column(rows, name))
    if len(levels) == 1:
        return
    ratios = levels[1:] / levels[:-1]
    gap = ratios.argmax()
    if ratios[gap] >= 1000 or levels[-1] / levels[0] > 1e7:
        raise Stop(f'{path}: {name} runs from {levels[0]:,.0f} to {levels[-1]:,.0f} with nothing between {levels[gap]:,.0f} and '
                   f'{levels[gap + 1]:,.0f}; mixed units? Give the number of {what} in every row')


def check_twice(path, rows, columns):
    """Raises Stop where a step of a run, or a whole row of a table without runs, is there twice."""
    seen = {}
    for row in rows:
        run = row.get('run')
        key = str([row.get(c) for c in (('run', 'step', 'mode', 'D_F', 'task') if run else columns)])
        first = seen.setdefault(key, row['line'])
        if first != row['line']:
            what = f'step of run {run}' if run else 'row'
            raise Stop(f'{path}: lines {first} and {row["line"]} are the same {what}: remove one')


def without_unfinished(path, rows):
    """The rows of runs of which one row says that it has finished."""
    ended = {row['run'] for row in rows if row['finished'] != 0}
    if left := {row['run'] for row in rows} - ended:
        print(f'{len(left)} runs have not finished and are left out: let the sweep go on')
    if not ended:
        raise Stop(f'{path}: no run has finished')
    return [row for row in rows if row['run'] in ended]


def configurations(rows):
    """Rows by (family, paradigm, objective), and by arm where there are several: {name: rows}."""
    several = len({r.get('arm') for r in rows}) > 1
    columns = ('family', 'paradigm', 'objective', 'arm') if several else ('family', 'paradigm', 'objective')
    groups = {}
    for row in rows:
        groups.setdefault(' '.join(row[c] for c in columns if row.get(c)) or 'all runs', []).append(row)
    return groups


def objective_of(rows):
    """The name of a configuration's objective as train.py has it, of HuBERT++ too."""
    return rows[0].get('objective', '').lower().rstrip('+')


def incomparable(rows, loss):
    """Why these runs' losses cannot be held against each other, or ''."""
    if loss.startswith('ood_'):
        return ''
    if (objective := objective_of(rows)) in MOVING:
        return f"{objective}'s targets come from a network or codebook that learns too, so losses of two runs do not compare: only ood_*_test is fitted"
    if objective == 'cmsc' and len({str(r.get('batch')) for r in rows}) > 1:
        return "cmsc's loss depends on the batch size (the number of negatives), and these runs have several"
    return ''


def validation(loss):
    """The column on which runs are selected for a test loss."""
    return re.sub('_test$', '_val', loss)


def select(rows, loss):
    """One row per run: the one with the lowest validation loss; then, of runs that differ in their learning rate only, the best by
    validation. Never looks at the test loss to choose. Sorted by (N, D, seed); `improving`: the run's last evaluation was its best, so it
    ended too early. Raises Stop on losses that are no positive numbers."""
    val = validation(loss)

    def best(group, what):
        if len(group) == 1:
            return group[0]
        if val == loss or not np.isfinite(column(group, val)).all():
            raise Stop(f'{what} for {loss}, and no validation loss ({val if val != loss else "NAME_val beside NAME_test"}) to choose by: '
                       'the lowest test loss would be optimistic. Keep one of them')
        return min(group, key=lambda r: r[val])

    for row in rows:
        if not 0 < row[loss] < math.inf:
            raise Stop(f'line {row["line"]}: {loss} is {row[loss]:g}; losses must be positive numbers: repair the row or leave it out')
    alone = [r for r in rows if not r.get('run')]
    if len({str(r.get('step')) for r in alone}) > 1 and len({(r['N'], r['D'], str(r.get('seed'))) for r in alone}) < len(alone):
        raise Stop('there are several steps, but nothing in a column `run` that says which rows belong together')
    runs, twins = {}, {}
    for row in rows:
        runs.setdefault(row.get('run') or row['line'], []).append(row)
    for name, group in runs.items():
        row = best(group, f'run {name} has {len(group)} rows')
        row['improving'] = len(group) > 1 and row.get('step') == max(r.get('step', 0) for r in group)
        twins.setdefault((row['N'], row['D'], row.get('labels'), row.get('seed', row['line'])), []).append(row)
    chosen = []
    for (N, D, _, seed), group in twins.items():
        if len({str(r.get('lr')) for r in group}) > 1:
            group = [best(group, f'N = {N:,.0f}, D = {D:,.0f}, seed {seed:g} has several learning rates')]
        chosen += group
    return sorted(chosen, key=lambda r: (r['N'], r['D'], str(r.get('seed')), r['line']))


# ---------------------------------------------------------------------------------------------------------------------
# laws

Law = namedtuple('Law', 'E A B alpha beta')                      # numbers, or arrays (R,) of as many resamples


def joint_law(N, D, E, A, B, alpha, beta):
    """Loss L(N, D) = E + A N^-alpha + B D^-beta (2605.17276, Eq. 1; Hoffmann 2022, Approach 3). N parameters, D records."""
    return E + A * N ** -alpha + B * D ** -beta


def excess_ratio(k, alpha):
    """What is left of the excess loss L - E after k times the scale, k^-alpha (2605.17276, Eq. 3)."""
    return k ** -alpha


def equivalent_scale_up(k, alpha, other):
    """By how much a family with exponent `other` must grow to gain what one with `alpha` gains from k, k^(alpha / other)."""
    return k ** (alpha / other)


def transfer_law(excess_id, kappa, gamma, floor=0.):
    """Out-of-distribution loss floor + kappa (L_id - E_id)^gamma (2605.17276, Eq. 4; Brandfonbrener et al., 2411.12925)."""
    return floor + kappa * excess_id ** gamma


def compute(macs, batch, step, extra_macs=0.):
    """Training FLOPs (6 M + 2 M_extra) batch step (2605.17276, Section 4.2): a MAC is two FLOPs, and backward is twice forward; teachers
    and tokenizers (extra) only go forward. macs: of one crop."""
    return (6 * macs + 2 * extra_macs) * batch * step


def optimum(C, law, k, u=1., v=1.):
    """(N*, D*) of least loss under C = k N^u D^v (2605.17276, Appendix B.4, for u = v = 1; other u and v, where epochs or the cost of a
    parameter change with size, by the same Lagrangian). Raises ValueError where v or u <= 0: then there is no optimum."""
    if np.any(v <= 0) or np.any(u <= 0):
        raise ValueError(f'compute grows as N^{np.min(u):.2f} D^{np.min(v):.2f}: with an exponent of zero or less that side is free, and no optimum exists')
    E, A, B, alpha, beta = law
    total = u * beta + v * alpha
    H = (v * alpha * A / (u * beta * B)) ** (1 / total)
    return H ** v * (C / k) ** (beta / total), H ** -u * (C / k) ** (alpha / total)


def shares(law, u=1., v=1.):
    """(of parameters, of records): the shares of a marginal log-increase in compute at the optimum; they sum to 1."""
    total = u * law.beta + v * law.alpha
    return u * law.beta / total, v * law.alpha / total


def optimal_loss(C, law, k, u=1., v=1.):
    """Loss at the optimum, E + K (C / k)^-g with g = alpha beta / (u beta + v alpha) (2605.17276, Appendix B.4)."""
    return joint_law(*optimum(C, law, k, u, v), *law)


def frontier_curve(C, a, b, c, d):
    """Loss a (C + d)^-b + c along the compute frontier, with saturation at both ends (2605.17276, Appendix B.4; Zhai et al. 2022)."""
    return a * (C + d) ** -b + c


def pareto(C, L):
    """Indices, by growing compute, of points that no point of as little compute beats (2605.17276, Figure 5a). Of ties the first stays.
    C, L (n,)."""
    order = np.lexsort((L, C))
    lowest_before = np.r_[math.inf, np.minimum.accumulate(L[order])[:-1]]
    return order[L[order] < lowest_before].tolist()


def overfit_extent(L, N, law):
    """L / L(N, inf) - 1, the share of loss that is owed to too few records (2605.17276, Appendix B; after Kaplan 2020, Section 4).
    Under the joint law it is B / (D^beta L(N, inf)) exactly: one line of slope -1 for all sizes."""
    return L / joint_law(N, np.inf, *law) - 1


def minimum_data(N, law, tolerance):
    """Records for which the overfitting extent of a model of N parameters is `tolerance` (2605.17276, Appendix B)."""
    with np.errstate(over='ignore'):                             # an exponent at its lower bound asks for more than a float holds
        return np.float_power(law.B / (tolerance * joint_law(N, np.inf, *law)), 1 / law.beta)


# ---------------------------------------------------------------------------------------------------------------------
# fitting

LOW, HIGH = 1e-3, 3.                                             # what an exponent may be
NEAR_LOW, NEAR_HIGH = LOW * 1.01, HIGH / 1.01                    # one beyond these has ended at its bound
AXES = {'joint': ('N', 'D'), 'N': ('N',), 'D': ('D',)}           # what a law is fitted over
EXPONENT = {'N': 'alpha', 'D': 'beta'}


def project(N, D, L, grid=25):
    """The joint law by variable projection: for given exponents it is linear in (E, A, B) >= 0, so only those two are searched, on a log
    grid and then by Nelder-Mead. Least squares of the raw loss. N, D, L (n,). Returns Law."""
    N0, D0 = (np.exp(np.log(v).mean()) for v in (N, D))          # else A and B span decades
    X = np.ones((len(L), 3))

    def solve(alpha, beta):
        X[:, 1], X[:, 2] = (N / N0) ** -alpha, (D / D0) ** -beta
        return scipy.optimize.nnls(X, L)                         # (E, A, B), root of the sum of squares

    values = np.geomspace(LOW, HIGH, grid)
    coarse = min(itertools.product(values, values), key=lambda e: solve(*e)[1])
    inside = lambda q: np.exp(np.clip(q, math.log(LOW), math.log(HIGH)))
    fine = scipy.optimize.minimize(lambda q: solve(*inside(q))[1], np.log(coarse), method='Nelder-Mead', options=dict(xatol=1e-10, fatol=0, maxiter=400))
    alpha, beta = inside(fine.x)
    E, A, B = solve(alpha, beta)[0]
    return Law(*map(float, (E, A * N0 ** alpha, B * D0 ** beta, alpha, beta)))


def marginal(x, L, floor=None, weight=1.):
    """L = E + A x^-alpha by variable projection (2605.17276, Eq. 2), least squares of the raw loss. x, L (n,). floor: E, where it is given;
    A, and E where it is free, are not negative. weight: of each point. At finite D the floor E of a curve over N is that of the joint law
    PLUS what the records held fixed cost, and the other way round. Returns (E, A, alpha, sum of squares)."""
    x0, w = np.exp(np.log(x).mean()), np.broadcast_to(weight, x.shape)
    grid = np.linspace(math.log(LOW), math.log(HIGH), 150)
    for _ in range(7):                                           # each time finer around the best
        alpha = np.exp(grid)
        z = (x / x0) ** -alpha[:, None]                          # (exponents, n)
        Sw, Sz, Szz, Sy, Szy = w.sum(), z @ w, z ** 2 @ w, L @ w, z @ (w * L)
        if floor is None:
            E = np.maximum(0, (Sy * Szz - Sz * Szy) / np.maximum(Sw * Szz - Sz ** 2, 1e-300))
            E = np.where(Szy < E * Sz, Sy / Sw, E)               # losses that rise: their mean, and A = 0
        else:
            E = np.full(len(grid), floor)
        A = np.maximum(0, (Szy - E * Sz) / Szz)
        rss = ((L - E[:, None] - A[:, None] * z) ** 2) @ w
        i, step = rss.argmin(), grid[1] - grid[0]
        best = E[i], A[i] * x0 ** alpha[i], alpha[i], rss[i]
        grid = np.clip(np.linspace(grid[i] - step, grid[i] + step, 41), math.log(LOW), math.log(HIGH))
    return tuple(map(float, best))


def residual(p, x, y, l):
    """Residuals of the log loss (R, n) and the gradient of the log law (R, n, 5), for R parameter vectors p = (log A, log B, E, alpha,
    beta) in units of the geometric means; x = log N, y = log D, l = log L, centred. E itself, and not its log, so that it can be 0."""
    terms = np.stack([np.exp(p[:, :1] - p[:, 3:4] * x), np.exp(p[:, 1:2] - p[:, 4:] * y)])
    model = terms.sum(0) + p[:, 2:3]
    s = terms / model
    return l - np.log(model), np.stack([s[0], s[1], 1 / model, -x * s[0], -y * s[1]], -1)


def objective_sum(p, x, y, l, delta):
    """The SUM of Huber losses of the residuals, and its gradient. A mean would be so small that usual tolerances stop the search early
    (Besiroglu et al., 2404.10102)."""
    r, J = (v[0] for v in residual(p[None], x, y, l))
    return scipy.special.huber(delta, r).sum(), -(np.clip(r, -delta, delta)[:, None] * J).sum(0)


class Scaled:
    """N, D, L (n,) in units of their geometric means, as logs x, y, l; the bounds low, high (5,) of the parameters. axis N or D: the other
    term is pinned at 0."""

    def __init__(self, N, D, L, axis='joint'):
        logs = [np.log(np.asarray(v, float)) for v in (N, D, L)]
        self.zero = [v.mean() for v in logs]
        self.x, self.y, self.l = (v - m for v, m in zip(logs, self.zero))
        self.low, self.high = np.array([-20, -20, 0, LOW, LOW]), np.array([6, 6, math.exp(self.l.min()), HIGH, HIGH])
        for term in {'joint': (), 'N': (1,), 'D': (0,)}[axis]:
            self.low[term] = self.high[term] = -60
            self.low[3 + term] = self.high[3 + term] = 1
        self.free = int((self.low < self.high).sum())

    def law(self, p):
        """Parameter vectors (..., 5) as Law in the units of the data."""
        a, b, E, alpha, beta = np.moveaxis(p, -1, 0)
        n, d, l = self.zero
        law = E * math.exp(l), np.exp(a + l + alpha * n), np.exp(b + l + beta * d), alpha, beta
        return Law(*law) if p.ndim > 1 else Law(*map(float, law))

    def vector(self, law):
        """A Law as parameters (5,) within the bounds."""
        n, d, l = self.zero
        A, B = (max(c * math.exp(-e * z - l), 1e-9) for c, e, z in ((law.A, law.alpha, n), (law.B, law.beta, d)))
        return np.clip([math.log(A), math.log(B), law.E * math.exp(-l), law.alpha, law.beta], self.low, self.high)

    def descend(self, p, weight=1., delta=1e-3, low=None, high=None, steps=300):
        """R weighted Huber fits at once, by Levenberg-Marquardt on reweighted squares: every step lowers the sum or is not made.
        p, low, high (R, 5) or (5,), the last two by default the bounds; weight (R, n). Returns (p, sums)."""
        p = np.atleast_2d(p)
        low = np.broadcast_to(self.low if low is None else low, p.shape)
        high = np.broadcast_to(self.high if high is None else high, p.shape)
        weight = np.broadcast_to(weight, (len(p), len(self.l)))
        p, damping, i = np.clip(p, low, high), np.full(len(p), 1e-3), np.arange(len(p))      # i: the fits that still move
        r, J = residual(p, self.x, self.y, self.l)
        f = (weight * scipy.special.huber(delta, r)).sum(1)
        for _ in range(steps):
            if not len(i):
                break
            WJ = (weight[i] / np.maximum(1, np.abs(r[i]) / delta))[..., None] * J[i]
            H, g = WJ.transpose(0, 2, 1) @ J[i], (WJ * r[i][..., None]).sum(1)
            stuck = ((p[i] <= low[i]) & (g < 0)) | ((p[i] >= high[i]) & (g > 0))             # at a bound, and pushing outwards
            g, H = np.where(stuck, 0, g), np.where(stuck[:, :, None] | stuck[:, None, :], 0, H)
            diagonal = np.einsum('ijj->ij', H)
            H = H + (damping[i, None] * diagonal + 1e-12 * diagonal.max(1, keepdims=True) + stuck + 1e-300)[:, :, None] * np.eye(5)
            q = np.clip(p[i] + np.linalg.solve(H, g[..., None])[..., 0], low[i], high[i])
            r2, J2 = residual(q, self.x, self.y, self.l)
            f2 = (weight[i] * scipy.special.huber(delta, r2)).sum(1)
            better = f2 < f[i]
            done = np.where(better, f[i] - f2 < 1e-10 * f[i], damping[i] > 1e8)
            p[i[better]], r[i[better]], J[i[better]], f[i[better]] = q[better], r2[better], J2[better], f2[better]
            damping[i] = np.where(better, damping[i] / 5, damping[i] * 4)
            i = i[~done]
        return p, f


def robust(s, delta=1e-3, first=None):
    """The parameters (5,) of least summed Huber loss of Scaled data (Hoffmann 2022, Eq. 3), and that sum: from 72 starts on a grid and
    from `first`, all at once; the best is polished by L-BFGS-B with tight tolerances."""
    half = math.log(.5), math.log(.1)
    starts = [np.clip(p, s.low, s.high) for p in itertools.product(half, half, (0, .5 * s.high[2]), (.1, .3, .9), (.1, .3, .9))]
    if first is not None:
        starts.append(first)
    ends, sums = s.descend(np.unique(starts, axis=0), delta=delta, steps=1000)
    best = ends[sums.argmin()]
    fine = scipy.optimize.minimize(objective_sum, best, (s.x, s.y, s.l, delta), 'L-BFGS-B', True, bounds=list(zip(s.low, s.high)),
                                   options=dict(ftol=1e-15, gtol=1e-12, maxiter=5000))
    return (fine.x, fine.fun) if fine.fun < sums.min() else (best, sums.min())


def draws(n, resamples, free, seed):
    """Weights (R, n) of a bootstrap over all runs of a study. Gamma weights: every run, and so every level of N and D, stays in every
    resample, which counts drawn with replacement do not grant; their variance n / (n - free) makes up for residuals that the fit has
    shrunk. Resampling within replicates instead would cover too little: with three seeds a third of the noise is missing."""
    shape = max(n - free, 1) / n
    return np.random.default_rng(seed).gamma(shape, 1 / shape, (resamples, n))


def profile(s, p, which):
    """(low, high) of a parameter by its profile: values at which the least squares of log loss over all the others exceed the best by no
    more than an F test at 95 % allows; bounds of the search where the data cannot exclude them. which: 2 E, 3 alpha, 4 beta."""
    p, spare = s.descend(p, delta=1e9)[0][0], len(s.l) - s.free
    allowed = 1 + scipy.stats.f.ppf(.95, 1, spare) / spare
    spaced = np.linspace if which == 2 else np.geomspace         # E may be 0
    start, end, least = s.low[which], s.high[which], math.inf
    for _ in range(3):                                           # the second and third time only around the bounds of the interval
        values = np.unique(np.r_[p[which], spaced(start, end, 80)])
        low, high, starts = (np.tile(v, (len(values), 1)) for v in (s.low, s.high, p))
        low[:, which] = high[:, which] = values
        sums = s.descend(starts, delta=1e9, low=low, high=high)[1]
        least = min(least, sums.min())
        inside = np.flatnonzero(sums <= least * allowed + 1e-25)
        start, end = values[max(inside[0] - 1, 0)], values[min(inside[-1] + 1, len(values) - 1)]
    return float(values[inside[0]]), float(values[inside[-1]])


@dataclass
class Fit:
    """A law with what is needed to trust it. rows: one per run; boot: Law of arrays (R,); profiles {E, alpha, beta: (low, high)}; checks:
    R2, log RMSE, held-out errors, AICc; flags: words."""
    name: str
    loss: str
    axis: str
    rows: list
    s: Scaled
    p: np.ndarray
    delta: float
    projected: Law
    law: Law
    weights: np.ndarray                                          # (R, n) of the runs in each resample
    boot: Law
    profiles: dict
    checks: dict = field(default_factory=dict)
    flags: list = field(default_factory=list)

    N = property(lambda self: column(self.rows, 'N'))
    D = property(lambda self: column(self.rows, 'D'))
    L = property(lambda self: column(self.rows, self.loss))
    axes = property(lambda self: AXES[self.axis])
    exponents = property(lambda self: [EXPONENT[c] for c in self.axes])

    def interval(self, value, level=.95):
        """Percentiles of value(law) over resamples; some may be infinite, so none are interpolated."""
        with np.errstate(all='ignore'):
            return np.quantile(value(self.boot), [.5 - level / 2, .5 + level / 2], axis=0, method='inverted_cdf')


def unfit(N, D, axis):
    """Why runs at these sizes cannot tell the exponents of a law, or ''."""
    levels = {'N': np.unique(N), 'D': np.unique(D)}
    count = {c: f'{c} has {len(v)} level{"s" * (len(v) > 1)}' for c, v in levels.items()}
    if axis != 'joint':
        decades = math.log10(levels[axis][-1] / levels[axis][0])
        if len(levels[axis]) < 5 or decades < 1.5 - 1e-9:
            return f'{count[axis]} over {decades:.1f} decades; a curve with a floor needs 5 over 1.5'
        return ''
    for c, other in (('N', 'D'), ('D', 'N')):
        if len(levels[c]) < 3:
            instead = f'; for the other axis alone add --axis {other}' if len(levels[other]) > 4 else ''
            return f'{count[c]} only, and {EXPONENT[c]} needs three{instead}'
    if len(N) < 8:
        return f'{len(N)} runs are too few for five parameters; 8 are the least'
    cells = np.unique(np.log(np.c_[N, D]), axis=0)
    if abs(np.corrcoef(cells.T)[0, 1]) > .95:
        return 'N and D grow together (correlation of their logs over .95), so nobody can tell which of them lowers the loss'
    return ''


def fit_runs(rows, loss, name='all runs', axis='joint', delta=1e-3, resamples=600, seed=0, checked=True):
    """Fit a law to the runs of one configuration. rows: one per run (`select`). delta: of Huber's loss of log residuals, or 'mad': 1.345
    of their normalised median absolute deviation. Returns Fit, or the reason, as text, why there is none."""
    N, D, L = (column(rows, c) for c in ('N', 'D', loss))
    if reason := unfit(N, D, axis):
        return reason
    if L.max() < L.min() * (1 + 1e-9):
        return 'all runs have the same loss'
    s = Scaled(N, D, L, axis)
    if axis == 'joint':
        first = project(N, D, L)
    else:
        E, c, e, _ = marginal(N if axis == 'N' else D, L)
        first = Law(E, c, 0., e, 1.) if axis == 'N' else Law(E, 0., c, 1., e)
    if delta == 'mad':
        r = residual(s.vector(first)[None], s.x, s.y, s.l)[0][0]
        delta = max(1.345 * 1.4826 * scipy.stats.median_abs_deviation(r), 1e-6)
    p, _ = robust(s, delta, s.vector(first))
    profiles = {'E': tuple(v * math.exp(s.zero[2]) for v in profile(s, p, 2))}
    for c in AXES[axis]:
        low, high = profiles[EXPONENT[c]] = profile(s, p, 3 if c == 'N' else 4)
        if low <= NEAR_LOW and high >= NEAR_HIGH:
            return f'{EXPONENT[c]} fits as well at {LOW:g} as at {HIGH:g}: these runs do not identify it'
    weights = draws(len(L), resamples, s.free, seed)
    boot = s.law(s.descend(np.tile(p, (resamples, 1)), weights, delta)[0])
    fit = Fit(name, loss, axis, rows, s, p, delta, first, s.law(p), weights, boot, profiles)
    if checked:
        fit.checks = checks(fit)
    fit.flags = bounds(fit) + rising(fit)
    if n := sum(r.get('improving', False) for r in rows):
        fit.flags.append(f'{n} of {len(rows)} runs still improving when they ended')
    return fit


def at_bound(exponent):
    """Whether an exponent, or each of an array, ended at a bound of the search, and so is censored, not measured."""
    return (exponent <= NEAR_LOW) | (exponent >= NEAR_HIGH)


def bounds(fit):
    """Flags: what ended at a bound of the search, and exponents whose profile is open to one side."""
    law, least, flags = fit.law, fit.L.min(), []
    for e in fit.exponents:
        value, (low, high) = getattr(law, e), fit.profiles[e]
        if at_bound(value):
            flags.append(f'{e} at its bound {value:.3g}')
        elif low <= NEAR_LOW:
            flags.append(f'{e} open downwards')
        elif high >= NEAR_HIGH:
            flags.append(f'{e} open upwards')
    if law.E < 1e-6 * least:
        flags.append('E = 0')
    if law.E > least * (1 - 1e-6):
        flags.append('E at the lowest loss')
    return flags


def rising(fit):
    """Where the largest model is clearly worse than a smaller one: the law cannot bend up, so such runs pull its exponents."""
    worse = []
    for D in np.unique(fit.D):
        means = {n: np.log(fit.L[(fit.D == D) & (fit.N == n)]).mean() for n in np.unique(fit.N[fit.D == D])}
        best = min(means, key=means.get)
        if means[max(means)] - means[best] > 3 * fit.checks.get('log_RMSE', math.inf):
            worse.append(f'{D:,.0f}')
    return [f'largest N worse than a smaller one at D = {", ".join(worse)}'] if worse else []


def checks(fit):
    """R2 of the raw loss, RMSE of its log, relative errors at the largest N and D when left out of the fit, and AICc minus that of a
    straight line in log-log space (below zero: the law is better)."""
    N, D, L, s = fit.N, fit.D, fit.L, fit.s
    at = joint_law(N, D, *fit.law)
    out = dict(R2=1 - ((L - at) ** 2).sum() / ((L - L.mean()) ** 2).sum(), log_RMSE=float(np.sqrt((np.log(L / at) ** 2).mean())),
               held_out_N=math.nan, held_out_D=math.nan)
    for c in fit.axes:
        kept = getattr(fit, c) < getattr(fit, c).max()
        if kept.sum() > s.free and all(len(np.unique(getattr(fit, axis)[kept])) > 2 for axis in fit.axes):
            part = Scaled(N[kept], D[kept], L[kept], fit.axis)
            law = out[f'law_without_{c}'] = part.law(robust(part, fit.delta)[0])
            out[f'held_out_{c}'] = float((joint_law(N, D, *law)[~kept] / L[~kept] - 1).mean())
    X = np.c_[np.ones(len(L)), *[{'N': s.x, 'D': s.y}[c] for c in fit.axes]]
    line = ((s.l - X @ np.linalg.lstsq(X, s.l, rcond=None)[0]) ** 2).sum()
    squares = 2 * s.descend(fit.p, delta=1e9)[1][0]
    out['AICc_minus_line'] = aicc(squares, len(L), s.free) - aicc(line, len(L), X.shape[1])
    return out


def aicc(rss, n, k):
    """Akaike's criterion, corrected for few points, of k parameters and a residual sum of squares over n points."""
    k += 1                                                       # the noise is a parameter too
    return n * math.log(max(rss, 1e-300) / n) + 2 * k + (2 * k * (k + 1) / (n - k - 1) if n > k + 1 else math.inf)


def shared_floor(fits):
    """One floor for all configurations on a task, since what cannot be told belongs to the task: the E of least summed Huber loss.
    Returns {name: Law}."""
    grid = np.linspace(0, min(f.L.min() for f in fits), 60)
    for _ in range(3):                                           # each time finer around the best
        total, laws = 0, {}
        for f in fits:
            low, high, starts = (np.tile(v, (len(grid), 1)) for v in (f.s.low, f.s.high, f.p))
            low[:, 2] = high[:, 2] = grid * math.exp(-f.s.zero[2])
            ends, sums = f.s.descend(starts, delta=f.delta, low=low, high=high)
            total, laws[f.name] = total + sums, f.s.law(ends)
        i, step = total.argmin(), grid[1] - grid[0]
        found = {name: Law(*(float(v[i]) for v in law)) for name, law in laws.items()}
        grid = np.clip(np.linspace(grid[i] - step, grid[i] + step, 21), 0, grid[-1])
    return found


def slices(rows):
    """{axis: rows}: the runs at the number of records that has most sizes (N), and at the size that has most numbers of records (D)."""
    out = {}
    for axis, other in (('N', 'D'), ('D', 'N')):
        levels = {}
        for r in rows:
            levels.setdefault(r[other], []).append(r)
        fullest = max(levels, key=lambda level: (len({r[axis] for r in levels[level]}), level))
        out[axis] = levels[fullest]
    return out


def fit_one(a, name, rows, loss, axis):
    """The fit of one configuration and loss, or the reason, as text, why there is none."""
    if not a.loss and not any(math.isfinite(r[loss]) for r in rows):
        return f'no {loss}'
    if reason := incomparable(rows, loss):
        return reason
    chosen = select(rows, loss)
    if axis != 'joint':
        chosen = slices(chosen)[axis]
    return fit_runs(chosen, loss, name, axis, a.delta, a.resamples, [a.seed, *name.encode()])


def fit_all(a, axis='joint', needed=('N', 'D')):
    """(fits of every configuration and loss of a.runs, all rows by configuration); what cannot be fitted is said in a line. Raises Stop
    where nothing can."""
    rows, losses = read_runs(a.runs, a.loss, needed)
    groups, fits, reasons = configurations(rows), [], []
    for name, loss in tqdm(list(itertools.product(groups, losses)), desc='fitting', leave=False, disable=None):
        found = fit_one(a, name, groups[name], loss, axis)
        if isinstance(found, Fit):
            fits.append(found)
        else:
            reasons.append(f'{name}, {loss}: {found}')
    if not fits:
        raise Stop('nothing can be fitted. ' + reasons[0] + (f' ({len(reasons) - 1} more like it)' if len(reasons) > 1 else ''))
    for reason in reasons:
        print('not fitted: ' + reason)
    for name in sorted({f.name for f in fits if f.rows[0].get('objective') == 'cpc' and f.loss.startswith('id_')}):
        print(f"{name}: cpc's targets are learned too, so part of a change in its id_test is a change of the task")
    return fits, groups


# ---------------------------------------------------------------------------------------------------------------------
# fit

def plain(value):
    """What JSON can hold, in full precision; what is not finite becomes null."""
    if isinstance(value, Law):
        value = value._asdict()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def spread(fit, value):
    """value(law) with its 95 % interval, as text."""
    low, high = fit.interval(value)
    return f'{value(fit.law):.3g} [{low:.3g}, {high:.3g}]'


def row_of(fit, shared=None):
    """A fit as a flat row: values, percentile intervals (80 and 95 %), profile intervals, checks, absolute losses."""
    row = dict(configuration=fit.name, loss=fit.loss, axis=fit.axis, runs=len(fit.rows), levels_N=len(set(fit.N)), levels_D=len(set(fit.D)),
               lowest_loss=fit.L.min(), drop=math.log(fit.L.max() / fit.L.min()))
    for c in {'joint': Law._fields, 'N': ('E', 'A', 'alpha'), 'D': ('E', 'B', 'beta')}[fit.axis]:
        row[c] = getattr(fit.law, c)
        for level in (95, 80):
            row[f'{c}_low{level}'], row[f'{c}_high{level}'] = fit.interval(lambda law: getattr(law, c), level / 100)
        if c in fit.profiles:
            row[f'{c}_profile_low'], row[f'{c}_profile_high'] = fit.profiles[c]
    for c in fit.axes:
        row[f'excess_left_by_10x_{c}'] = excess_ratio(10, row[EXPONENT[c]])
    if fit.axis == 'joint':
        row['data_share'] = shares(fit.law)[1]
        row['data_share_low95'], row['data_share_high95'] = fit.interval(lambda law: shares(law)[1])
    if shared:
        row |= dict(shared_E=shared.E, shared_alpha=shared.alpha, shared_beta=shared.beta)
    return row | {k: v for k, v in fit.checks.items() if not k.startswith('law_')} | dict(flags='; '.join(fit.flags))


def ratio(pairs, exponent):
    """The ratio of the summed exponents of pairs of fits, with an interval from joint resamples. A bound at either side censors a pair."""
    free = [pair for pair in pairs if not any(flag.startswith(f'{exponent} at') for fit in pair for flag in fit.flags)]
    censored = dict(censored=len(pairs) - len(free))
    if not free:
        return censored
    a, b = (sum(getattr(fit.law, exponent) for fit in side) for side in zip(*free))
    resampled_a, resampled_b = (sum(getattr(fit.boot, exponent) for fit in side) for side in zip(*free))
    low, high = np.quantile(resampled_a / resampled_b, [.025, .975])
    return dict(ratio=a / b, low=low, high=high, worth_of_10x=equivalent_scale_up(10, a, b)) | censored


def ratios(fits):
    """Ratios of exponents between configurations: per loss, and of the mean over the out-of-distribution losses that both have. In
    distribution only within an objective: the losses of two have different units. worth_of_10x: by how much b must grow to gain what a
    gains from ten times the size (2605.17276, Eq. 3)."""
    by, rows = {}, []
    for f in fits:
        by.setdefault(f.name, {})[f.loss] = f
    for one, two in itertools.combinations(by, 2):
        objective, other = (next(iter(by[name].values())).rows[0].get('objective') for name in (one, two))
        compared = {}
        for loss in by[one]:
            if loss in by[two] and (loss.startswith('ood_') or objective and objective == other):
                compared[loss] = [(by[one][loss], by[two][loss])]
        ood = [pair for loss, (pair,) in compared.items() if loss.startswith('ood_')]
        if len(ood) > 1:
            compared['mean of ood'] = ood
        for exponent, (label, pairs) in itertools.product(('alpha', 'beta'), compared.items()):
            rows.append(dict(exponent=exponent, loss=label, a=one, b=two) | ratio(pairs, exponent))
    return rows


def fit_command(a):
    """Fit the law, or one axis of it; table, ratios, CSV, JSON and one figure per loss."""
    fits, _ = fit_all(a, a.axis)
    losses = list(dict.fromkeys(f.loss for f in fits))
    marginals, shared, pairs = [], {}, []
    if a.axis == 'joint':
        marginals, pairs = fit_marginals(a, fits), ratios(fits)
        for loss in losses:
            group = [f for f in fits if f.loss == loss]
            if len(group) > 1 and loss.startswith('ood_'):
                shared[loss] = shared_floor(group)
    print_fits(fits + marginals)
    for loss, laws in shared.items():
        exponents = '; '.join(f'{n} alpha {w.alpha:.3g}, beta {w.beta:.3g}' for n, w in laws.items())
        print(f'one floor E = {next(iter(laws.values())).E:.3g} on {loss}: {exponents}')
    for r in pairs:
        found = 'unknown'
        if 'ratio' in r:
            found = f'{r["ratio"]:.2f} [{r["low"]:.2f}, {r["high"]:.2f}]'
            found += f', 10x is worth {r["worth_of_10x"]:.3g}x' if r['high'] < 10 * r['low'] else ''
        found += f'; {r["censored"]} at a bound left out' if r['censored'] else ''
        print(f'{r["exponent"]:5s} {r["loss"]}: {r["a"]} / {r["b"]} {found}')
    table = [row_of(f, shared.get(f.loss, {}).get(f.name)) for f in fits] + [row_of(f) for f in marginals]
    full = [row | dict(law=f.law, projected=f.projected, delta=f.delta, checks=f.checks) for row, f in zip(table, fits + marginals)]
    figures = [(f'fit_{slug(loss)}', draw_fits([f for f in fits if f.loss == loss], shared.get(loss, {}))) for loss in losses]
    deliver(a, ('fit', table), ('ratios', pairs), ('fit', dict(fits=full, ratios=pairs, resamples=a.resamples, seed=a.seed)), *figures)


def fit_marginals(a, fits):
    """Fits of one axis alone at one level of the other, for each joint fit; said where there is none."""
    out = []
    for f in fits:
        for axis, rows in slices(f.rows).items():
            found = fit_runs(rows, f.loss, f.name, axis, a.delta, a.resamples, a.seed)
            if isinstance(found, Fit):
                out.append(found)
            else:
                print(f'no marginal: {f.name}, {f.loss}: {found}')
    return out


def print_fits(fits):
    """One aligned line per fit, and what the columns mean."""
    print(f'\n{"configuration":28s} {"loss":16s} {"axis":5s} runs  lowest  drop  {"E [95 %]":24s} {"alpha":22s} {"beta":22s} {"data share":22s} '
          f'{"R2":>6s} {"RMSE":>6s}  out N  out D   AICc')
    known = lambda v, form: format(v, form) if math.isfinite(v) else ''
    for f in fits:
        c = f.checks
        alpha, beta = (spread(f, lambda w: getattr(w, e)) if e in f.exponents else '' for e in ('alpha', 'beta'))
        share = spread(f, lambda w: shares(w)[1]) if f.axis == 'joint' else ''
        print(f'{f.name:28s} {f.loss:16s} {f.axis:5s} {len(f.rows):4d} {f.L.min():7.4f} {math.log(f.L.max() / f.L.min()):5.2f}  '
              f'{spread(f, lambda w: w.E):24s} {alpha:22s} {beta:22s} {share:22s} {c["R2"]:6.3f} {c["log_RMSE"]:6.4f} '
              f'{known(c["held_out_N"], "+.1%"):>6s} {known(c["held_out_D"], "+.1%"):>6s} {known(c["AICc_minus_line"], "+.0f"):>6s}  {"; ".join(f.flags)}')
    print('drop: log of highest over lowest loss; an exponent says how soon a curve nears its own floor, not how low it is or how far it fell. '
          'out: error at the largest N or D, left out.\nAICc: against a straight line in log-log space; above zero the line does better, '
          'blank: too few runs to say')


def panels(rows, columns, width=4.6, height=3.6):
    """A figure of panels of that many inches each, and its axes (rows, columns)."""
    return figure(rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout='constrained')


def draw_fits(fits, shared):
    """A row per configuration: loss against N and against D; then the residuals."""
    fig, axes = panels(len(fits), len(fits[0].axes) + 1, height=3.4)
    for f, row in zip(fits, axes):
        for c, ax in zip(f.axes, row):
            draw_axis(ax, f, c, shared.get(f.name))
        for c, x, mark in (('N', f.N, 'o'), ('D', f.D, 'x')):
            row[-1].plot(x, 100 * np.log(f.L / joint_law(f.N, f.D, *f.law)), mark, ms=4, label=f'against {c}')
        row[-1].axhline(0, color='C7', lw=1)
        row[-1].set(xscale='log', xlabel='N or D', ylabel='residual of log loss, %', title='residuals')
        row[-1].legend(fontsize=6)
    return fig


def caption(ax, name, flags):
    """A title of the name and the wrapped flags."""
    ax.set_title('\n'.join([name, *textwrap.wrap('; '.join(dict.fromkeys(flags)), 60)]), fontsize=9)


def draw_axis(ax, f, c, shared):
    """Loss against c, N or D, a colour for each level of the other: the runs and the law, its 95 % band at the largest level, the floor,
    and the loss at the largest c as predicted without it. shared: the Law with one floor for all, or None."""
    x, others, other = (f.N, f.D, 'D') if c == 'N' else (f.D, f.N, 'N')
    line = np.geomspace(x.min(), x.max() * 3, 60)
    at = lambda law, x, level: joint_law(x, level, *law) if c == 'N' else joint_law(level, x, *law)
    if f.axis == 'joint':
        levels = np.unique(others)
    else:                                                        # the law has no term of the other, so its level does not matter
        levels, others = others[:1], np.full(len(x), others[0])
    for i, level in enumerate(levels):
        colour, mine = f'C{i % 10}', others == level
        ax.plot(x[mine], f.L[mine], 'o', ms=4, color=colour, label=f'{other} = {level:,.0f}' if f.axis == 'joint' else None)
        ax.plot(line, at(f.law, line, level), color=colour, lw=1)
    ax.fill_between(line, *np.quantile([at(w, line, levels[-1]) for w in zip(*f.boot)], [.025, .975], axis=0), color=colour, alpha=.2)
    if law := f.checks.get(f'law_without_{c}'):
        ax.plot(x.max(), at(law, x.max(), levels[-1]), 's', ms=8, mfc='none', color='k', label=f'predicted from smaller {c}')
    bound = ' (at a bound)' if any('E' in flag for flag in f.flags) else ''
    ax.axhline(f.law.E, ls='--', color='C7', lw=1, label=f'floor E = {f.law.E:.3g}{bound}')
    if shared:
        ax.axhline(shared.E, ls=':', color='C7', lw=1, label='one floor for all')
    ax.set(xscale='log', yscale='log', xlabel={'N': 'N, parameters', 'D': 'D, records'}[c], ylabel=f.loss,
           ylim=(.8 * f.L.min(), 1.1 * f.L.max() * (f.L.max() / f.L.min()) ** .3))           # room for the legend
    caption(ax, f.name, f.flags)
    ax.legend(fontsize=6, loc='upper center', ncols=3)


def few_ticks(fig):
    """Four plain numbers on log axes that span less than a decade and a half, where matplotlib's own would overlap."""
    from matplotlib.ticker import MaxNLocator, NullLocator
    for axis in (axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) if axis.get_scale() == 'log'):
        low, high = axis.get_view_interval()
        if 0 < low < high < 30 * low:
            axis.set_major_locator(MaxNLocator(4))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter('{x:g}')


def deliver(a, *things):
    """Write (name, table, dict or figure) as STEM_NAME.csv, .json or .png beside the runs, or to --out, and say so. Empty tables are left out."""
    path, files = Path(a.runs), []
    out = Path(a.out) if a.out else path.parent
    out.mkdir(parents=True, exist_ok=True)
    for name, thing in things:
        if thing == []:
            continue
        file = out / (f'{path.stem}_{name}' + {list: '.csv', dict: '.json'}.get(type(thing), '.png'))
        if isinstance(thing, list):
            write_csv(file, thing)
        elif isinstance(thing, dict):
            file.write_text(json.dumps(plain(thing), indent=1))
        else:
            few_ticks(thing)
            thing.savefig(file, dpi=100)
        files.append(file.name)
    print(f'\nin {out}/: ' + ', '.join(files))


# ---------------------------------------------------------------------------------------------------------------------
# simulate

def simulated(seed, truth, a):
    """One study with a planted law, fitted: a row per parameter, with whether its intervals cover the truth."""
    rng = np.random.default_rng([a.seed, seed])
    N, D = (np.repeat(v.ravel(), a.seeds) for v in np.meshgrid(np.geomspace(2e4, 2e7, a.levels), np.geomspace(2e3, 2e6, a.levels)))
    L = joint_law(N, D, *truth) * np.exp(a.noise * rng.standard_normal(len(N)))
    runs = [dict(N=n, D=d, loss=v) for n, d, v in zip(N, D, L)]
    fit = fit_runs(runs, 'loss', delta=a.delta, resamples=a.resamples, seed=[a.seed, seed, 1], checked=False)
    if isinstance(fit, str):
        return [dict(study=seed, refused=fit)]
    rows = []
    for c in ('alpha', 'beta', 'E'):
        true, (low, high), (plow, phigh) = getattr(truth, c), fit.interval(lambda w: getattr(w, c)), fit.profiles[c]
        rows.append(dict(study=seed, parameter=c, truth=true, estimate=getattr(fit.law, c), low=low, high=high, covered=low <= true <= high,
                         profile_low=plow, profile_high=phigh, profile_covered=plow <= true <= phigh))
    return rows


def simulate_command(a):
    """Studies with a planted law and noise: how often do 95 % intervals cover the truth?"""
    truth, rows = Law(*a.truth), []
    with ProcessPoolExecutor(2) as pool:
        parts = pool.map(simulated, range(a.studies), itertools.repeat(truth), itertools.repeat(a))
        for part in tqdm(parts, total=a.studies, desc='studies', disable=None):
            rows += part
    out = Path(a.out or 'out')
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / 'simulate.csv', rows)
    refused = [r for r in rows if 'refused' in r]
    print(f'{a.studies} studies, {a.levels} x {a.levels} sizes over 3 decades each, {a.seeds} seeds, {100 * a.noise:g} % noise, {a.resamples} resamples, '
          f'{len(refused)} refused')
    if len(refused) == len(rows):
        raise Stop('every study was refused, for example: ' + refused[0]['refused'])
    worst = 1.
    for c in ('alpha', 'beta', 'E'):
        mine = [r for r in rows if r.get('parameter') == c]
        estimates, width = column(mine, 'estimate'), np.median(column(mine, 'high') - column(mine, 'low'))
        covered, profile_covered = column(mine, 'covered').mean(), column(mine, 'profile_covered').mean()
        worst = min(worst, covered)
        print(f'{c:5s} truth {getattr(truth, c):.4g}, estimates {estimates.mean():.4g} +- {estimates.std():.2g}; covered by 95 % intervals: '
              f'bootstrap {covered:.1%}, profile {profile_covered:.1%}; median width {width:.3g}')
    print(f'{out}/simulate.csv')
    if worst < .88:
        raise Stop(f'95 % intervals cover the truth in {worst:.1%} only')


# ---------------------------------------------------------------------------------------------------------------------
# allocate

def ols(X, y, weight=1.):
    """Least squares of y (n,) on X (n, k): (coefficients, half widths of their 95 % Student intervals), NaN where X cannot tell them."""
    n, k = X.shape
    root = np.sqrt(np.broadcast_to(weight, n))
    X, y = X * root[:, None], y * root
    if n <= k or np.linalg.matrix_rank(X) < k:
        return np.full(k, math.nan), np.full(k, math.nan)
    b = np.linalg.lstsq(X, y, rcond=None)[0]
    variance = ((y - X @ b) ** 2).sum() / (n - k) * np.linalg.inv(X.T @ X).diagonal()
    return b, scipy.stats.t.ppf(.975, n - k) * np.sqrt(variance)


def growth(fit):
    """How compute grows with size, measured at the best steps: epochs = e0 N^p D^q and MACs (a third of extra_macs included) = m0 N^mu, so
    that C = k N^u D^v with k = 6 m0 e0, u = mu + p, v = 1 + q. Runs that were still improving when they ended say nothing about how long is
    long enough, and are left out. Returns (dict of these and of half widths p_95, q_95, mu_95, (k, u, v) of each resample of runs)."""
    used = np.array([not r.get('improving', False) for r in fit.rows])
    N, D, step, batch, macs, extra = (column(fit.rows, c)[used] for c in ('N', 'D', 'step', 'batch', 'macs', 'extra_macs'))
    macs = macs + np.nan_to_num(extra) / 3
    if not all((v > 0).all() for v in (step, batch, macs)):
        raise Stop('allocate needs macs, batch and step in every row: compute is measured, not assumed')
    X = np.c_[np.ones(len(N)), np.log(N), np.log(D)]             # of epochs; MACs do not depend on D
    epochs, macs = np.log(step * batch / D), np.log(macs)
    (e, p, q), (_, p95, q95) = ols(X, epochs)
    (m, mu), (_, mu95) = ols(X[:, :2], macs)
    found = dict(k=6 * math.exp(m + e), u=mu + p, v=1 + q, p=p, q=q, mu=mu, p_95=p95, q_95=q95, mu_95=mu95, left_out=int((~used).sum()))
    if math.isnan(found['k']) or len(N) < 6:
        return found | dict(v=math.nan), None

    def resampled(X, y):                                         # coefficients (k, R) of weighted least squares
        w = fit.weights[:, used]
        return np.linalg.solve(np.einsum('rn,ni,nj->rij', w, X, X), np.einsum('rn,ni,n->ri', w, X, y)[..., None])[..., 0].T

    (e, p, q), (m, mu) = resampled(X, epochs), resampled(X[:, :2], macs)
    k, u, v = 6 * np.exp(m + e), mu + p, 1 + q
    return found, tuple(np.where((u > 0) & (v > 0), x, math.nan) for x in (k, u, v))         # resamples without an optimum are left out


def fit_frontier(C, L):
    """Frontier curve through points (C, L): (a, b, c, d) of `frontier_curve`, by least squares of the log loss from 36 starts; C in units
    of its geometric mean while fitting."""
    C0 = np.exp(np.log(C).mean())
    x = C / C0
    natural = lambda q: (np.exp(q[0]), np.exp(q[1]), q[2], np.exp(q[3]))                     # a, b and d are positive
    error = lambda q: np.log(frontier_curve(x, *natural(q))) - np.log(L)
    low, high = [-20, -7, 0, math.log(x.min()) - 9], [12, 2, L.min(), math.log(x.max()) + 2]
    fits = []
    for b, c, d in itertools.product((.05, .2, .6), (.01, .3, .6, .9), (.01, .3, 3)):
        start = np.clip([math.log(L.max() * .5), math.log(b), c * L.min(), math.log(d * np.median(x))], low, np.array(high) - 1e-9)
        fits.append(scipy.optimize.least_squares(error, start, bounds=(low, high), xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=400))
    a, b, c, d = natural(min(fits, key=lambda r: r.cost).x)
    return a * C0 ** b, b, c, d * C0


def spent(rows):
    """FLOPs (n,) that rows of a table took."""
    macs, batch, step, extra = (column(rows, c) for c in ('macs', 'batch', 'step', 'extra_macs'))
    return compute(macs, batch, step, np.nan_to_num(extra))


def allocate_command(a):
    """The sizes and records of least loss for a budget, with intervals; iso-loss map; Pareto frontier of all evaluations."""
    fits, groups = fit_all(a, needed=('N', 'D', 'macs', 'batch', 'step'))
    table, figures, refused = [], [], []
    for f in fits:
        g, resampled = growth(f)
        print(f'\n{f.name}, {f.loss}: epochs to the best step = N^{g["p"]:.2f}+-{g["p_95"]:.2f} D^{g["q"]:.2f}+-{g["q_95"]:.2f}, '
              f'MACs = N^{g["mu"]:.2f}+-{g["mu_95"]:.2f}; C = {g["k"]:.3g} N^{g["u"]:.2f} D^{g["v"]:.2f}'
              + f', from the {len(f.rows) - g["left_out"]} of {len(f.rows)} runs that had stopped improving' * bool(g['left_out']))
        if reason := degenerate(f, g):
            refused.append(f'{f.name}, {f.loss}: {reason}')
            print('refused: ' + refused[-1])
            continue
        lost = np.isnan(resampled[2]).mean()
        for flag in f.flags + [f'{lost:.0%} of the resamples have no optimum and are left out of the intervals'] * bool(lost):
            print('  careful: ' + flag)
        C = spent(f.rows)
        line = np.geomspace(C.min(), C.max() * 10, 40)
        table += optima(f, g, resampled, line[::13])
        figures.append((f'allocate_{slug(f.name, f.loss)}', draw_allocation(f, groups[f.name], line, [g[c] for c in 'kuv'], resampled)))
    if not table:
        raise Stop('nothing to allocate. ' + refused[0])
    print('\nthe frontier is chosen by validation loss where there is one; evaluations before the end of a decaying learning rate look worse than '
          'runs that end there')
    deliver(a, ('allocate', table), *figures)


def degenerate(fit, g):
    """Why a fit has no optimum under the compute that `growth` measured, or ''."""
    if math.isnan(g['v']):
        return f'{g["left_out"]} of {len(fit.rows)} runs were still improving when they ended, too many to tell how long a run should be: raise --steps'
    if g['v'] <= 1e-6 or g['u'] <= 0:
        return (f'compute grows as N^{g["u"]:.2f} D^{g["v"]:.2f}. With a fixed number of steps more records cost nothing, so there is nothing to allocate: '
                'train to early stopping, or for a fixed number of epochs')
    return ''


def optima(f, g, resampled, budgets):
    """Rows of N* and D* at each budget (FLOPs), printed; intervals from resamples of runs, with their own growth of compute."""
    kuv, rows = [g[c] for c in 'kuv'], []
    within = lambda value: np.nanquantile(value(f.boot, resampled), [.025, .975], axis=-1, method='inverted_cdf')
    with np.errstate(all='ignore'):
        of_N, of_D = shares(f.law, *kuv[1:])
        (N_low, D_low), (N_high, D_high) = within(lambda w, c: np.array(shares(w, *c[1:])))
        print(f'  of a marginal increase in log compute, data get {of_D:.3g} [{D_low:.3g}, {D_high:.3g}], parameters {of_N:.3g} [{N_low:.3g}, {N_high:.3g}] '
              f'(at constant epochs and MACs = N: data {spread(f, lambda w: shares(w)[1])})')
        for C in budgets:
            n, d = optimum(C, f.law, *kuv)
            (nl, dl), (nh, dh) = within(lambda w, c: np.array(optimum(C, w, *c)))
            beyond = ' '.join(c for c, x, had in (('N', n, f.N), ('D', d, f.D)) if not had.min() <= x <= had.max())
            loose = ' '.join(c for c, low, high in (('N*', nl, nh), ('D*', dl, dh)) if not high < 1000 * low)
            rows.append(dict(configuration=f.name, loss=f.loss, C=C, N=n, N_low=nl, N_high=nh, D=d, D_low=dl, D_high=dh,
                             predicted=optimal_loss(C, f.law, *kuv), share_data=of_D, beyond_the_runs=beyond, **g))
            print(f'  C {C:9.2e}: N* {n:10,.3g} [{nl:,.3g}, {nh:,.3g}], D* {d:10,.3g} [{dl:,.3g}, {dh:,.3g}], loss {rows[-1]["predicted"]:.4f}'
                  + f'  not identified: {loose}, its interval spans three decades or more' * bool(loose) + f'  extrapolated in {beyond}' * bool(beyond))
    return rows


def draw_allocation(f, rows, line, kuv, resampled):
    """Left: loss over (C, N) at D = (C / k N^u)^(1/v), the optimal N, and where D exceeds what there is. Right: all evaluations, their
    Pareto frontier, the curve through it, and the law's optimal loss."""
    k, u, v = kuv
    fig, ((ax, bx),) = panels(1, 2, 6, 4.6)
    N = np.geomspace(f.N.min() / 3, f.N.max() * 3, 80)[:, None]
    D = (line / (k * N ** u)) ** (1 / v)
    Z = joint_law(N, np.maximum(D, 1), *f.law)
    shown = ax.contourf(line, N[:, 0], Z, levels=np.geomspace(Z.min(), min(Z.max(), 3 * f.L.max()), 14), cmap='viridis_r', extend='max')
    fig.colorbar(shown, ax=ax, label=f.loss, format='%.3g')
    ax.contourf(line, N[:, 0], D > f.D.max(), levels=[.5, 1.5], colors='none', hatches=['///'])
    ax.plot(line, optimum(line, f.law, *kuv)[0], 'r-', label='N*(C)')
    band = np.nanquantile([optimum(line, Law(*w), *c)[0] for w, c in zip(zip(*f.boot), zip(*resampled))], [.025, .975], axis=0)
    ax.fill_between(line, *band, color='r', alpha=.25)
    ax.plot(spent(f.rows), f.N, 'k.', ms=4, label='runs')
    ax.set(xscale='log', yscale='log', xlabel='C, training FLOPs', ylabel='N, parameters', ylim=(N.min(), N.max()),
           title=f'{f.name}, {f.loss}; hatched: more records than there are')
    ax.legend(fontsize=7)
    test, val, C = column(rows, f.loss), column(rows, validation(f.loss)), spent(rows)
    chosen = pareto(C, val if np.isfinite(val).all() else test)
    bx.plot(C, test, '.', color='C7', ms=3, label='evaluations')
    bx.plot(C[chosen], test[chosen], 'o-', ms=4, color='C0', label='Pareto frontier')
    if len(chosen) > 5:
        q = fit_frontier(C[chosen], test[chosen])
        bx.plot(line, frontier_curve(line, *q), 'k--', lw=1, label=f'{q[0]:.2g} (C + {q[3]:.2g})^-{q[1]:.2g} + {q[2]:.2g}')
    bx.plot(line, optimal_loss(line, f.law, *kuv), 'r-', lw=1, label='law at its optimum')
    bx.axhline(f.law.E, ls=':', color='C7', label='floor E')
    bx.set(xscale='log', yscale='log', xlabel='C, training FLOPs', ylabel=f.loss)
    bx.legend(fontsize=7)
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# transfer

def loss_to_loss(excess_id, excess_ood, weight=1.):
    """kappa, gamma of L_ood - E_ood = kappa (L_id - E_id)^gamma by a line in logs (2605.17276, Eq. 4), over the points where both excesses
    are positive. excess_* (..., n), weight alike. Returns (kappa, gamma, points dropped)."""
    x, y = np.asarray(excess_id, float), np.asarray(excess_ood, float)
    good = (x > 0) & (y > 0)
    w = good * weight
    x, y = (np.log(np.where(good, v, 1)) for v in (x, y))
    mean = lambda v: (w * v).sum(-1, keepdims=True) / w.sum(-1, keepdims=True)
    gamma = (w * (x - mean(x)) * (y - mean(y))).sum(-1) / (w * (x - mean(x)) ** 2).sum(-1)
    return np.exp(mean(y)[..., 0] - gamma * mean(x)[..., 0]), gamma, (~good).sum(-1)


def effective_data(D, L, wanted, weight=1.):
    """Records D_E at which training from scratch reaches each loss of `wanted` (2605.17276, Appendix B; Hernandez 2102.01293), by inverting
    a smooth curve through scratch runs (D, L): the law E + B D^-b where there are 5 sizes over 1.5 decades, else isotonic and monotone in
    log D. weight: of each scratch run. Returns (D_E, status): 'ok'; 'censored', lower than any scratch run or than the floor;
    'extrapolated', beyond the sizes."""
    D, L, wanted = (np.asarray(v, float) for v in (D, L, wanted))
    levels, index = np.unique(D, return_inverse=True)
    w = np.broadcast_to(weight, D.shape)
    total = np.bincount(index, w)
    mean = np.bincount(index, w * L) / total
    if not unfit(D, D, 'D'):
        E, B, b, _ = marginal(D, L, weight=w)
        with np.errstate(all='ignore'):
            found = np.where(wanted > E, (B / (wanted - E)) ** (1 / b), np.inf)
        lowest = max(E, mean.min())
    else:
        if len(levels) < 2:
            raise Stop(f'training from scratch has {len(levels)} number of records: two are the least to read a size off')
        smooth = scipy.optimize.isotonic_regression(mean, weights=total, increasing=False).x
        curve = scipy.interpolate.PchipInterpolator(np.log(levels), smooth)
        fine = np.linspace(*np.log(levels[[0, -1]]), 20001)
        found = np.exp(np.interp(-wanted, -curve(fine), fine, left=fine[0] - 1e-6, right=math.inf))
        lowest = smooth.min()
    outside = (found > levels[-1] * (1 + 1e-9)) | (found < levels[0] * (1 - 1e-9))
    return found, np.where(wanted < lowest, 'censored', np.where(outside, 'extrapolated', 'ok'))


def data_transferred(rows, loss, weight=None):
    """D_T = D_E - D_F = k D_F^a N^b of one task (2605.17276, Appendix B): points from rows with mode scratch or finetune, D_F, N and a loss,
    then a line in logs over those that can be used. weight: of each row, for resamples. Returns (points, (k, a, b), counts by status); b is
    NaN where one size tells nothing about it, all three where the points are too few."""
    mode, N, D_F, L = np.array([r['mode'] for r in rows]), column(rows, 'N'), column(rows, 'D_F'), column(rows, loss)
    weight = np.ones(len(rows)) if weight is None else weight
    points, good = [], []                                        # good: (D_F, N, D_T, weight) of those that can be used
    for n in np.unique(N):
        scratch, tuned = (np.flatnonzero((N == n) & (mode == m)) for m in ('scratch', 'finetune'))
        if not len(tuned) or not len(scratch):
            continue
        D_E, status = effective_data(D_F[scratch], L[scratch], L[tuned], weight[scratch])
        for i, e, s in zip(tuned, D_E, status):
            if s != 'censored' and e <= D_F[i]:
                s = 'negative'
            if s == 'ok':
                good.append((D_F[i], n, e - D_F[i], weight[i]))
            points.append(dict(N=n, D_F=D_F[i], loss=L[i], D_E=e, D_T=e - D_F[i], multiplier=e / D_F[i], status=str(s)))
    counts = {s: sum(p['status'] == s for p in points) for s in ('ok', 'censored', 'extrapolated', 'negative')}
    x, n, y, w = np.array(good).reshape(-1, 4).T
    X = np.c_[np.ones(len(x)), np.log(x), np.log(n)]
    if len(set(n)) < 2:
        (k, a), b = ols(X[:, :2], np.log(y), w)[0], math.nan
    else:
        k, a, b = ols(X, np.log(y), w)[0]
    return points, (math.exp(k), a, b), counts


def unit(row):
    """What two losses of one run share, also where they were best at different steps."""
    return tuple(str(row.get(c)) for c in ('run', 'N', 'D', 'seed')) if row.get('run') else row['line']


def transfer_row(a, i, o, ax):
    """Loss-to-loss of the fits in (i) and out of distribution (o) of one configuration: drawn, printed and returned as a row."""
    mate = {unit(r): r for r in o.rows}                          # the same run, perhaps at another step
    both = [(r, mate[unit(r)]) for r in i.rows if unit(r) in mate]
    x, y = np.array([(r[i.loss] - i.law.E, m[o.loss] - o.law.E) for r, m in both]).T
    kappa, gamma, dropped = loss_to_loss(x, y)
    shift_x, shift_y = ((f.law.E - f.boot.E)[:, None] for f in (i, o))                       # floors of the same resamples of runs
    boot = loss_to_loss(x + shift_x, y + shift_y, draws(len(x), a.resamples, i.s.free, [a.seed, *i.name.encode()]))[:2]
    (klow, glow), (khigh, ghigh) = np.nanquantile(boot, [.025, .975], axis=1)
    x, y = x[(x > 0) & (y > 0)], y[(x > 0) & (y > 0)]
    R2 = 1 - ((y - transfer_law(x, kappa, gamma)) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    alphas, betas, flags = o.law.alpha / i.law.alpha, o.law.beta / i.law.beta, '; '.join(i.flags + o.flags)
    print(f'{i.name:28s} {o.loss:20s} {kappa:8.3g}  {f"{gamma:.3f} [{glow:.3f}, {ghigh:.3f}]":22s} {R2:6.3f} {dropped:3d} of {len(both):3d}  '
          f'alphas {alphas:.2f}, betas {betas:.2f}  {flags}')
    line = np.geomspace(x.min(), x.max(), 40)
    ax.plot(x, y, 'o', ms=4)
    ax.plot(line, transfer_law(line, kappa, gamma), label=f'kappa {kappa:.2g}, gamma {gamma:.2f}; {dropped} dropped')
    ax.fill_between(line, *np.nanquantile(transfer_law(line, boot[0][:, None], boot[1][:, None]), [.025, .975], axis=0), alpha=.2)
    ax.set(xscale='log', yscale='log', xlabel=f'id_test - {i.law.E:.3g}', ylabel=f'{o.loss} - {o.law.E:.3g}')
    caption(ax, i.name, i.flags + o.flags)
    ax.legend(fontsize=7)
    return dict(configuration=i.name, loss=o.loss, points=len(x), dropped=int(dropped), E_id=i.law.E, E_ood=o.law.E, kappa=kappa, kappa_low=klow,
                kappa_high=khigh, gamma=gamma, gamma_low=glow, gamma_high=ghigh, R2=R2, alpha_ratio=alphas, beta_ratio=betas, flags=flags)


def transfer_command(a):
    """Loss out of distribution against loss in distribution; effective data transferred where the rows have `mode`."""
    rows, losses = read_runs(a.runs, a.loss, ())
    if tuned := [r for r in rows if r.get('mode') in ('scratch', 'finetune')]:
        return effective(a, tuned, losses)
    fits, _ = fit_all(a)
    pairs = [(i, o) for i in fits for o in fits if i.name == o.name and i.loss == 'id_test' and o.loss.startswith('ood_')]
    if not pairs:
        raise Stop('no configuration has a law of id_test and of an ood_*_test, whose floors loss-to-loss needs')
    fig, axes = panels(1, len(pairs), 4.4, 4)
    print(f'\n{"configuration":28s} {"out of distribution":20s}    kappa  {"gamma [95 %]":22s}     R2    dropped  expected where one term rules')
    table = [transfer_row(a, i, o, ax) for (i, o), ax in zip(pairs, axes[0])]
    print('gamma under 1: diminishing returns. It moves with both floors; where one term of the laws rules it is the ratio of their alphas or betas, '
          'so one clean power needs the two ratios alike')
    deliver(a, ('transfer', table), ('transfer', fig))


def effective(a, rows, losses):
    """Effective data transferred, per configuration, task and loss; training from scratch is that of the same family."""
    for r in rows:
        if not (0 < r.get('D_F', 0) < math.inf and 0 < r.get('N', 0) < math.inf):
            raise Stop(f'{a.runs}, line {r["line"]}: N and D_F must be positive numbers, of parameters and of records')
    table, laws = [], []
    groups = configurations([r for r in rows if r['mode'] == 'finetune']).items()
    for (group, tuned), task, loss in itertools.product(groups, dict.fromkeys(r.get('task', '') for r in rows), losses):
        mine = tuned + [r for r in rows if r['mode'] == 'scratch' and r.get('family') == tuned[0].get('family')]
        part = [r for r in mine if r.get('task', '') == task and r[loss] > 0]
        points, (k, p, b), counts = data_transferred(part, loss)
        if not points:
            continue
        table += [dict(configuration=group, task=task or loss) | point for point in points]
        left = (f'left out: {counts["censored"]} censored (no training from scratch is as good), {counts["extrapolated"]} beyond the sizes, '
                f'{counts["negative"]} where pretraining harms')
        if math.isnan(p):
            print(f'{group}, {task or loss}: {counts["ok"]} points can be used, too few for a law; {left}')
            continue
        w = draws(len(part), 200, 3, a.seed)                     # of runs, not of points: those of a smooth curve are not independent
        boot = [data_transferred(part, loss, row)[1] for row in tqdm(w, desc='resamples', leave=False, disable=None)]
        with np.errstate(all='ignore'):
            low, high = np.nanquantile(boot, [.025, .975], axis=0)
        laws.append(dict(configuration=group, task=task, loss=loss, k=k, a=p, a_low=low[1], a_high=high[1], b=b, b_low=low[2], b_high=high[2], **counts))
        sizes = '' if math.isnan(b) else f' N^{b:.2f} [{low[2]:.2f}, {high[2]:.2f}]'
        print(f'{group}, {task or loss}: D_T = {k:.3g} D_F^{p:.2f} [{low[1]:.2f}, {high[1]:.2f}]{sizes} from {counts["ok"]} points; {left}')
    if not table:
        raise Stop(f'{a.runs}: no size N has both scratch and finetune rows')
    print('a larger a means more saved per record, but read k and D_T themselves, not a alone')
    deliver(a, ('effective', laws), ('effective_points', table), ('effective', draw_effective(table)))


def draw_effective(table):
    """Effective records transferred against records fine-tuned on, a colour for each configuration and task."""
    fig, ax = figure(figsize=(6, 4.4), layout='constrained')
    for i, key in enumerate(dict.fromkeys((p['configuration'], p['task']) for p in table)):
        for status, mark in (('ok', 'o'), ('extrapolated', '^')):
            part = [p for p in table if (p['configuration'], p['task'], p['status']) == (*key, status) and p['D_T'] > 0]
            if part:
                ax.plot(column(part, 'D_F'), column(part, 'D_T'), mark, color=f'C{i % 10}', label=f'{" ".join(key)}, {status}')
    ax.set(xscale='log', yscale='log', xlabel='D_F, records fine-tuned on', ylabel='D_T, effective records transferred')
    ax.legend(fontsize=7)
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# overfit

def overfit_command(a):
    """Overfitting extent, its collapse on one line, the records that suffice, and training against validation loss over steps."""
    fits, groups = fit_all(a)
    table, lines = [], []
    fig, axes = panels(len(fits), 3, 13 / 3)
    for f, row in zip(fits, axes):
        extent, z = overfit_extent(f.L, f.N, f.law), f.D ** f.law.beta * joint_law(f.N, np.inf, *f.law)
        # well above the noise as predicted: to drop by what was observed would bend the line
        good = (overfit_extent(joint_law(f.N, f.D, *f.law), f.N, f.law) > 3 * f.checks['log_RMSE']) & (extent > 0)
        if len(np.unique(z[good])) < 3:
            print(f'{f.name}, {f.loss}: too few points lie above the limit of endless data by three times the noise')
            for ax in row:
                ax.axis('off')
            continue
        (c, slope), (_, half) = ols(np.c_[np.ones(good.sum()), np.log(z[good])], np.log(extent[good]))
        left, flags = int((~good).sum()), '; '.join(f.flags)
        lines.append(dict(configuration=f.name, loss=f.loss, slope=slope, slope_95=half, intercept=math.exp(c), B=f.law.B, dropped=left, flags=flags))
        print(f'{f.name}, {f.loss}: extent falls with slope {slope:.2f} +- {half:.2f} in D^beta L(N, inf), the law says -1 with intercept '
              f'B = {f.law.B:.3g} (found {math.exp(c):.3g}); {left} of {len(good)} points left out, within the noise of the limit  {flags}')
        for N, tolerance in itertools.product(np.unique(f.N), a.tolerance):
            least, (low, high) = minimum_data(N, f.law, tolerance), f.interval(lambda w: minimum_data(N, w, tolerance))
            table.append(dict(configuration=f.name, loss=f.loss, N=N, tolerance=tolerance, D_min=least, low=low, high=high))
            print(f'  N {N:12,.0f}: within {tolerance:.0%} of endless data from D = {least:.3g} [{low:.3g}, {high:.3g}] records'
                  + '  extrapolated' * bool(not f.D.min() <= least <= f.D.max()) + '  not identified' * bool(not high < 1000 * low))
        draw_overfit(row[:2], f, good, extent, z)
        trajectories(row[2], groups[f.name], f.rows)
    print('the law was fitted to these very runs, so a slope near -1 is no proof of it, but one far from -1 speaks against it')
    deliver(a, ('overfit', lines), ('minimum_data', table), ('overfit', fig))


def draw_overfit(axes, f, good, extent, z):
    """Overfitting extent against D, a colour for each size, with the law; and against z = D^beta L(N, inf), where all sizes collapse."""
    ax, bx = axes
    D, ends = np.unique(f.D), np.array([z.min(), z.max()])
    for i, N in enumerate(np.unique(f.N)):
        mine, colour = good & (f.N == N), f'C{i % 10}'
        ax.plot(f.D[mine], extent[mine], 'o', ms=4, color=colour, label=f'N = {N:,.0f}')
        ax.plot(D, overfit_extent(joint_law(N, D, *f.law), N, f.law), color=colour, lw=1)
        bx.plot(z[mine], extent[mine], 'o', ms=4, color=colour)
    bx.plot(ends, f.law.B / ends, 'k--', lw=1, label='slope -1')
    ax.set(xscale='log', yscale='log', xlabel='D, records', ylabel='L / L(N, inf) - 1', title=f'{f.name}, {f.loss}')
    bx.set(xscale='log', yscale='log', xlabel='D^beta L(N, inf)', title='collapse')
    ax.legend(fontsize=6)
    bx.legend(fontsize=7)


def trajectories(ax, rows, chosen):
    """Training and validation loss over steps, of the largest model on the least and on the most records."""
    most = max(r['N'] for r in chosen)
    levels = sorted({r['D'] for r in chosen if r['N'] == most})
    for D, colour in zip(dict.fromkeys((levels[0], levels[-1])), ('C0', 'C1')):
        run = next(r.get('run') for r in chosen if r['N'] == most and r['D'] == D)
        mine = sorted((r for r in rows if run and r.get('run') == run), key=lambda r: r.get('step', 0))
        for c, style in (('id_train', '--'), ('id_val', '-')):
            if c in (mine or [{}])[0]:
                ax.plot(column(mine, 'step'), column(mine, c), style, color=colour, label=f'{c}, D = {D:,.0f}')
    ax.set(xscale='log', yscale='log', xlabel='step', title=f'N = {most:,.0f}')
    if ax.lines:
        ax.legend(fontsize=7)


# ---------------------------------------------------------------------------------------------------------------------
# labels, winners, loss against error

def labels_command(a):
    """Loss and AUROC on an arm's anchor labels, and out of distribution, against the number of labels trained on."""
    rows, losses = read_runs(a.runs, a.loss, ('N', 'D', 'arm', 'labels'))
    rows = [r for r in rows if r['arm'] in ('dominant', 'tail')]
    if not rows:
        raise Stop(f'{a.runs} has no rows whose arm is dominant or tail: labels needs training on more and more labels around a fixed anchor')
    if blank := [r['line'] for r in rows if not r['labels'] > 0]:
        raise Stop(f'{a.runs}, line {blank[0]}: labels must be the number of labels that were trained on')
    table, slopes = [], []
    for (group, mine), loss in itertools.product(label_curves(rows).items(), losses):
        part = [r for r in mine if math.isfinite(r[loss])]
        chosen = select(part, loss) if part else []
        areas = [c for c in (re.sub('_test$', '_auroc', loss), f'{loss}_auroc') if chosen and math.isfinite(chosen[0].get(c, math.nan))]
        for measure in dict.fromkeys([loss, *areas]):            # once where a loss is not called _test
            x, y = column(chosen, 'labels'), column(chosen, measure)
            points = []
            for count in np.unique(x):
                v = y[x == count]
                points.append(dict(configuration=group, measure=measure, labels=int(count), seeds=len(v), mean=v.mean(),
                                   sd=v.std(ddof=1) if len(v) > 1 else math.nan))
            table += points
            if len(points) > 1:
                (_, b), (_, half) = ols(np.c_[np.ones(len(x)), np.log(x)], np.log(y))
                slopes.append(dict(configuration=group, measure=measure, slope=b, low=b - half, high=b + half, runs=len(x)))
                line = ', '.join(f'{r["labels"]} labels {r["mean"]:.4f}' for r in points)
                print(f'{group}, {measure}: {line}; d log / d log labels {b:+.3f} [{b - half:+.3f}, {b + half:+.3f}]')
    if not slopes:
        raise Stop(f'{a.runs}: every arm has one number of labels only')
    print('id_* is on the anchor labels, the same at every point of an arm; bars are standard deviations over seeds')
    deliver(a, ('labels', table), ('labels_slopes', slopes), ('labels', draw_labels(table)))


def label_curves(rows):
    """{name: rows}: a curve for each configuration, arm, size and number of records."""
    several, curves = len({(r['N'], r['D']) for r in rows}) > 1, {}
    for name, mine in configurations(rows).items():
        for r in mine:
            curve = name if r['arm'] in name.split() else f'{name} {r["arm"]}'
            curve += f' N = {r["N"]:,.0f}, D = {r["D"]:,.0f}' if several else ''
            curves.setdefault(curve, []).append(r)
    return curves


def draw_labels(table):
    """A panel per measure: its mean over seeds against the number of labels, a line for each curve."""
    measures = list(dict.fromkeys(r['measure'] for r in table))
    fig, axes = panels(1, len(measures), height=4)
    for m, ax in zip(measures, axes[0]):
        for group in dict.fromkeys(r['configuration'] for r in table if r['measure'] == m):
            part = [r for r in table if r['measure'] == m and r['configuration'] == group]
            ax.errorbar(*(column(part, c) for c in ('labels', 'mean', 'sd')), marker='o', capsize=3, label=group)
        ax.set(xscale='log', xlabel='labels trained on', title=m)
        ax.legend(fontsize=7)
    return fig


def winners_command(a):
    """Absolute losses per size and number of records, the lowest configuration of each cell, and where two configurations cross."""
    rows, losses = read_runs(a.runs, a.loss)
    table, cells = [], {}
    for (group, mine), loss in itertools.product(configurations(rows).items(), losses):
        part = [r for r in mine if math.isfinite(r[loss])]
        if not part:
            continue
        if reason := incomparable(part, loss):
            print(f'left out: {group}, {loss}: {reason}')
            continue
        field = loss                                             # in distribution, losses of two objectives have two units
        if not loss.startswith('ood_'):
            field += f' of {part[0].get("objective") or group}'
        for r in select(part, loss):
            near = 10 ** (round(2 * math.log10(r['N'])) / 2)     # half a decade, in which sizes of different families compete
            cells.setdefault((field, near, r['D']), {}).setdefault(group, []).append(r[loss])
    if not cells:
        raise Stop(f'{a.runs}: no two losses can be compared')
    for (field, N, D), found in sorted(cells.items()):
        means = {g: float(np.mean(v)) for g, v in found.items()}
        best = min(means, key=means.get) if len(means) > 1 else 'alone'
        table.append(dict(loss=field, N_near=N, D=D, winner=best, **means))
        print(f'{field:28s} N near {N:11,.0f}, D {D:9,.0f}: ' + ', '.join(f'{g} {v:.4f}{"*" * (g == best)}' for g, v in means.items()))
    crossed = crossings(table, cells)
    for c in crossed:
        if c['clear']:
            print('{loss}: {overtakes} overtakes {other} between {along} {from:,.0f} and {to:,.0f} at {fixed} {at:,.0f}'.format(**c))
    print(f'means over seeds; N to half a decade; {sum(not c["clear"] for c in crossed)} more crossings are not told from the spread of seeds, or have no '
          'seeds to tell them by')
    deliver(a, ('winners', table), ('crossings', crossed), ('winners', draw_winners(table)))


def contestants(rows):
    """The configurations with losses in rows of the table of winners."""
    return sorted({k for r in rows for k in r} - {'loss', 'N_near', 'D', 'winner'})


def crossings(table, cells):
    """Neighbouring cells along N or D, the other held fixed, between which two configurations change places. clear: before and after, their
    mean losses are apart by twice the standard error, from the spread of seeds pooled over all cells of a loss."""
    found, variances = [], {}
    for (field, _, _), losses in cells.items():
        for v in losses.values():
            if len(v) > 1:
                variances.setdefault(field, []).extend([np.var(np.log(v), ddof=1)] * (len(v) - 1))

    def clear(row, one, two):
        if row['loss'] not in variances:
            return False
        a, b = (cells[row['loss'], row['N_near'], row['D']][g] for g in (one, two))
        return bool(abs(math.log(row[one] / row[two])) > 2 * math.sqrt(np.mean(variances[row['loss']]) * (1 / len(a) + 1 / len(b))))

    for field, (fixed, moving) in itertools.product(dict.fromkeys(r['loss'] for r in table), (('N_near', 'D'), ('D', 'N_near'))):
        mine = [r for r in table if r['loss'] == field]
        for (one, two), level in itertools.product(itertools.combinations(contestants(mine), 2), sorted({r[fixed] for r in mine})):
            line = sorted((r for r in mine if r[fixed] == level and one in r and two in r), key=lambda r: r[moving])
            for before, after in itertools.pairwise(line):
                if (before[one] - before[two]) * (after[one] - after[two]) < 0:
                    up, other = (one, two) if after[one] < after[two] else (two, one)
                    found.append({'loss': field, 'overtakes': up, 'other': other, 'along': moving, 'from': before[moving], 'to': after[moving],
                                  'fixed': fixed, 'at': level, 'clear': clear(before, one, two) and clear(after, one, two)})
    return found


def draw_winners(table):
    """A row per loss: against N at the number of records with most sizes, and against D at the size with most numbers of records."""
    fields = list(dict.fromkeys(r['loss'] for r in table))
    fig, axes = panels(len(fields), 2, 5)
    for field, row in zip(fields, axes):
        mine = [r for r in table if r['loss'] == field]
        for ax, moving, fixed in ((row[0], 'N_near', 'D'), (row[1], 'D', 'N_near')):
            level = max({r[fixed] for r in mine}, key=lambda v: (sum(r[fixed] == v for r in mine), v))
            for g in contestants(mine):
                line = sorted((r[moving], r[g]) for r in mine if r[fixed] == level and g in r)
                if line:
                    ax.plot(*zip(*line), 'o-', ms=4, label=g)
            ax.set(xscale='log', yscale='log', xlabel=moving, title=f'{field}, {fixed} {level:,.0f}')
            ax.legend(fontsize=6)
    return fig


def permutation_p(x, y, most=8):
    """(Spearman's rho, two-sided p, exact): p over all orders of up to `most` points, over 20,000 random ones beyond."""
    n, exact = len(x), len(x) <= most
    x, y = (scipy.stats.rankdata(v) - (n + 1) / 2 for v in (x, y))
    norm = math.sqrt((x @ x) * (y @ y))
    if norm == 0:
        return math.nan, math.nan, exact
    if exact:
        orders = np.array(list(itertools.permutations(range(n))))
    else:
        orders = np.random.default_rng(0).permuted(np.tile(np.arange(n), (20000, 1)), axis=1)
    rho, others = x @ y / norm, y[orders] @ x / norm
    extreme = (np.abs(others) >= abs(rho) - 1e-9).sum()
    p = extreme / len(orders) if exact else (extreme + 1) / (len(orders) + 1)                # the order found is one of the random ones
    return float(rho), float(p), exact


def error_command(a):
    """Within one configuration: pretraining loss against 1 - AUROC downstream, a point per (N, D), seeds averaged (2605.12241)."""
    rows, _ = read_runs(a.runs, ['id_test'])
    tasks = {c: [c] for c in rows[0] if re.fullmatch('ood_.+_auroc', c)}
    if not tasks:
        raise Stop(f'{a.runs} has no ood_*_auroc')
    if len(tasks) > 1:
        tasks['all'] = list(tasks)
    table, drawn = [], []
    for group, mine in configurations(rows).items():
        chosen = select([r for r in mine if math.isfinite(r['id_test'])], 'id_test')
        if not chosen:
            print(f'{group}: left out, no id_test')
            continue
        if objective_of(chosen) in MOVING:
            print(f'{group}: careful, the targets move with the run, so its loss is no common scale')
        elif reason := incomparable(chosen, 'id_test'):
            print(f'{group}: left out, {reason}')
            continue
        for task, columns in tasks.items():
            points = error_points(chosen, columns)
            if len(points) < 4:
                print(f'{group}, {task}: {len(points)} points are too few to correlate')
                continue
            x, y = np.array(points).T
            rho, p, exact = permutation_p(x, y)
            pearson = float(np.corrcoef(np.log(x), np.log(np.maximum(y, 1e-6)))[0, 1])
            table.append(dict(configuration=group, task=task, points=len(x), spearman=rho, p=p, exact=exact, pearson_of_logs=pearson))
            drawn.append((x, y))
            print(f'{group}, {task}: {len(x)} points, Spearman {rho:+.2f}, p {p:.2g} ({"exact" if exact else "of 20,000 random orders"}), '
                  f'Pearson of logs {pearson:+.2f}')
    if not table:
        raise Stop('no configuration has four points with an id_test and an AUROC')
    print('objectives are never pooled: their losses have different units. Both sides improve with N and D, so a small p says that they go together,\n'
          'not that of two models of one size the lower loss is the better')
    deliver(a, ('loss_vs_error', table), ('loss_vs_error', draw_errors(table, drawn)))


def error_points(rows, columns):
    """[(loss in distribution, 1 - AUROC averaged over columns)] of every (N, D), means over seeds."""
    points = {}
    for r in rows:
        error = 1 - np.mean([r[c] for c in columns])
        if math.isfinite(error):
            points.setdefault((r['N'], r['D']), []).append((r['id_test'], error))
    return [np.mean(v, 0) for v in points.values()]


def draw_errors(table, points):
    """A panel for each row of the table, of its points (x, y); a row of panels for each configuration."""
    wide = len(table) // len({r['configuration'] for r in table})
    fig, axes = panels(-(-len(table) // wide), wide, 3.8)
    for r, (x, y), ax in zip(table, points, axes.flat):
        ax.plot(x, y, 'o')
        ax.set(xscale='log', yscale='log', xlabel='id_test', ylabel=f'1 - AUROC, {r["task"]}',
               title=f'{r["configuration"]}\nSpearman {r["spearman"]:+.2f}, p {r["p"]:.1g}')
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# published tables

PUBLISHED = Path(__file__).resolve().parent / 'tests/published'
CONFIGS = [(arch, paradigm) for arch in ('transformer', 'resnet') for paradigm in ('SL', 'SSL')]
SHORT = ('T-SL', 'T-SSL', 'R-SL', 'R-SSL')
# the tables do not say how many records a bin holds: five assumptions, in percent of all
D_GRIDS = {'log 1-100': np.geomspace(1, 100, 6), 'log .1-100': np.geomspace(.1, 100, 6), '1 5 10 25 50 100': np.array([1., 5, 10, 25, 50, 100]),
           '.1 .5 1 10 50 100': np.array([.1, .5, 1, 10, 50, 100]), '.1 1 5 10 50 100': np.array([.1, 1, 5, 10, 50, 100])}
N_GRID, RECORDS = np.geomspace(2e4, 2e8, 5), 2.3e6               # of the sizes only the two ends are known


def printed(name):
    """Rows of a published table."""
    with open(PUBLISHED / f'{name}.csv', newline='') as f:
        return list(csv.DictReader(f))


def printed_losses(name, bins):
    """(datasets, losses (4, datasets, bins)) of Table S.5 or S.6, in the order of CONFIGS."""
    rows = printed(name)
    sets = list(dict.fromkeys(r['dataset'] for r in rows))
    L = np.full((4, len(sets), max(int(r[bins]) for r in rows)), math.nan)
    for r in rows:
        L[CONFIGS.index((r['arch'], r['paradigm'])), sets.index(r['dataset']), int(r[bins]) - 1] = float(r['loss'])
    return sets, L


def shared_marginal_floor(x, curves):
    """(E, whether it is at its bound): the one floor, at most the lowest loss, under which all curves over x have the least squares."""
    total = lambda E: sum(marginal(x, L, E)[3] for L in curves)
    grid = np.linspace(0, min(L.min() for L in curves), 25)
    i = int(np.argmin([total(E) for E in grid]))
    fine = scipy.optimize.minimize_scalar(total, bounds=(grid[max(i - 1, 0)], grid[min(i + 1, 24)]), method='bounded').x
    return min(grid[i], fine, key=total), i == 24


def printed_exponents(x, L, floor):
    """Exponents (4, datasets) of curves L (4, datasets, bins) over x. floor: free, shared (one E per dataset) or 0. And the number of
    datasets whose shared floor ended at their lowest loss, which is a bound."""
    out, ended = np.empty(L.shape[:2]), 0
    for d in range(L.shape[1]):
        E = None if floor == 'free' else 0.
        if floor == 'shared':
            E, bound = shared_marginal_floor(x, L[:, d])
            ended += bound
        out[:, d] = [marginal(x, curve, E)[2] for curve in L[:, d]]
    return out, ended


def printed_claims():
    """Statements of the text about Tables S.5 and S.6, taken apart, and what the tables hold: [(claim, found, of, agrees)]."""
    sets, M = printed_losses('table_s5_model_bins', 'model_bin')
    _, D = printed_losses('table_s6_data_bins', 'data_bin')
    ts, tx, rs, rx = range(4)                                    # as in CONFIGS: Transformer or ResNet, supervised or SSL
    best_M, best_D = M.argmin(0), D.argmin(0)
    wins_M, wins_D = M[tx] < M[ts], D[tx] < D[ts]
    ahead = D[rs] < D[rx]                                        # (datasets, bins)
    over = [s for s, r in zip(sets, ahead) if r[3] and not r[2]]
    stays = [r[5] for r in ahead if r[3] and not r[2]]
    full = [s for s, best in zip(sets, best_D[:, 5]) if best == rs]
    says = lambda text, found, of, agrees: (text, int(found), of, bool(agrees))
    every = lambda text, cells: says(text, np.sum(cells), np.size(cells), np.all(cells))
    most = lambda text, cells: says(text, cells.sum(), cells.size, cells.mean() > .5)
    return [
        every('(i) T-SSL below T-SL in every model-size cell', wins_M),
        every('(i) and in the three larger model bins', wins_M[:, 2:]),
        every('(i) T-SSL below T-SL in every data-size cell', wins_D),
        every('(i) and in the smallest data bin', wins_D[:, 0]),
        *(most(f'(ii) R-SSL lowest on most sets in data bin {b}', best_D[:, b - 1] == rx) for b in (1, 2, 3)),
        says('(iii) R-SL lowest with all data on ' + ', '.join(full), len(full), 11, {'CPSC2018', 'PTB-XL(rhythm)'} <= set(full)),
        says('(iii) R-SL overtakes R-SSL at data bin 4 on ' + ', '.join(over), len(over), 11, len(over) > 0),
        every('(iii) and stays below with all data', stays),
        *(most(f'(iv) R-SL lowest on most sets in model bin {b}', best_M[:, b - 1] == rs) for b in (1, 2, 3)),
        every('(v) T-SL is not the lowest, in any cell', np.c_[best_M, best_D] != ts),
        most('(v) a ResNet lowest in most model-size cells', best_M >= rs),
        most('(v) a ResNet lowest in most data-size cells', best_D >= rs),
        most('(v) R-SSL below R-SL in most model-size cells', M[rx] < M[rs]),
        most('(v) R-SSL below R-SL in most data-size cells', D[rx] < D[rs])]


def printed_sums():
    """Whether the means that Tables S.9 and S.10 print are those of their columns, to rounding: as `printed_claims`."""
    s9, s10 = printed('table_s9_benchmark_auroc'), {r['method']: r for r in printed('table_s10_ptbxl_detail')}
    tasks = 'ptbxl_avg', 'echonext', 'mimic_sex', 'mimic_icu', 'mimic_mort', 'cpsc2018'
    areas = 'diag_auc', 'sub_auc', 'sup_auc', 'form_auc', 'rhythm_auc'
    off = lambda r, columns, total: abs(np.mean([float(r[c]) for c in columns]) - float(r[total]))
    return [(text, sum(good), len(good), all(good)) for text, good in (
        ('S.9: the mean is that of its six columns', [off(r, tasks, 'mean') < 6e-4 for r in s9]),
        ('S.10: the average is that of its five AUROCs', [off(r, areas, 'macro_auc_avg') < 6e-5 for r in s10.values()]),
        ('S.9: PTB-XL is the average of S.10', [off(r | s10[r['method']], ['ptbxl_avg'], 'macro_auc_avg') < 6e-4 for r in s9]))]


def printed_transfer():
    """Datasets, exponents gamma (4, datasets) of Table S.7, and its own means and standard deviations (4, 2)."""
    rows = printed('table_s7_loss_to_loss')
    sets = list(dict.fromkeys(r['dataset'] for r in rows if r['category']))
    of = lambda c, summary: [float(r['transfer_exponent']) for r in rows if (r['arch'], r['paradigm']) == c and (not r['category']) == summary]
    return sets, np.array([of(c, False) for c in CONFIGS]), np.array([of(c, True) for c in CONFIGS])


def published_command(a):
    """The printed tables of 2605.17276, refitted: what follows from them, what does not, and what hangs on a choice."""
    out, rows = Path(a.out or 'out/published'), []
    out.mkdir(parents=True, exist_ok=True)

    def say(quantity, published, refitted, note=''):
        rows.append(dict(quantity=quantity, published=published, refitted=refitted, note=note))
        print(f'  {quantity:58s} {published:>10s}  {refitted:32s} {note}')

    print('arXiv 2605.17276, refitted from its printed tables (tests/published). T Transformer, R ResNet; SL supervised, SSL self-supervised\n')
    print(f'  {"":58s} {"published":>10s}  refitted')
    sets, gamma = refit_transfer(say)
    names, M = printed_losses('table_s5_model_bins', 'model_bin')
    _, D = printed_losses('table_s6_data_bins', 'data_bin')
    beta = refit_data(say, D)
    alpha = refit_model(say, M)
    refit_shares(say, M, D)
    same = D[0, names.index('Echonext')] == D[2, names.index('Echonext')]
    print(f'\n  In Table S.6 EchoNext has the same loss for T-SL and R-SL in {same.sum()} of 6 bins, to four digits: likely a copied column, '
          'so nothing is concluded from it\n')
    print('statements about Tables S.5 and S.6, counted in them')
    for text, found, of, agrees in printed_claims() + printed_sums():
        word = 'agrees' if agrees else 'differs'
        rows.append(dict(quantity=text, published='yes', refitted=f'{found} of {of}', note=word))
        print(f'  {word:7s}  {found:3d} of {of:3d}  {text}')
    write_csv(out / 'published.csv', rows)
    draw_bins(names, M, D, out / 'bins.png')
    draw_exponents(names, alpha, beta, sets, gamma, out / 'exponents.png')
    print(f'\nin {out}/: published.csv, bins.png, exponents.png')


def refit_transfer(say):
    """Table S.7 and the 7.6x of the abstract. Returns datasets and exponents."""
    sets, gamma, ends = printed_transfer()
    for c, g, (mean, std) in zip(SHORT, gamma, ends):
        say(f'{c} transfer exponent, mean (std) of {len(sets)} sets', f'{mean:.3f}', f'{g.mean():.3f} ({g.std():.3f}; printed {std:.3f})',
            'std divides by n')
    say('transfer exponents under 1', '', f'{(gamma < 1).sum()} of {gamma.size}')
    say('transfer exponents of exactly .050, a bound of their fit', '', f'{(gamma == .05).sum()} of {gamma.size}', 'censored: anything up to .050')
    sex, echo = sets.index('MIMIC(sex)'), sets.index('Echonext')
    say('transfer efficiency on clinical tasks, SSL over SL', 'up to 7.6x', f'{gamma[3, sex] / gamma[2, sex]:.2f}x (sex, ResNets)',
        f'{gamma[3, sex]:.3f} over the bound {gamma[2, sex]:.3f}')
    say('the same on EchoNext, Transformers', '', f'{gamma[1, echo] / gamma[0, echo]:.1f}x', f'{gamma[1, echo]:.3f} over the bound {gamma[0, echo]:.3f}')
    print('  7.6x divides by .050, where the search ended and not what was measured: had it ended at .010, the same data could have said up to 38x\n')
    return sets, gamma


def refit_data(say, D):
    """Data exponents of Table S.6 under three kinds of floor. Returns those with free floors on a grid of 1 to 100 %."""
    for floor in ('free', 'shared', '0'):
        found = {k: printed_exponents(g, D, floor) for k, g in D_GRIDS.items()}
        for sl, ssl, label in ((0, 1, 'Transformer'), (2, 3, 'ResNet')):
            r = [b[ssl].mean() / b[sl].mean() for b, _ in found.values()]
            n = [(b[ssl] > b[sl]).sum() for b, _ in found.values()]
            say(f'data exponent SSL / SL, {label}, floor {floor}', 'up to 16x' if floor == 'free' else '',
                f'{min(r):.2f} to {max(r):.2f} over {len(r)} grids',
                f'SSL larger on {min(n)}-{max(n)} of 11 sets' + (', REVERSED' if max(r) < 1 else ''))
        if floor == 'free':
            free = found['log 1-100'][0]
        if floor == 'shared':
            ended = [n for _, n in found.values()]
            print(f'  the shared floor ends at the lowest loss of all on {min(ended)}-{max(ended)} of 11 sets: the bins do not hold enough to find it')
    print('  "more data-efficient" hangs on the floor: with a free one it is large, with one floor per set small, with E = 0 reversed for ResNets.\n'
          '  How many records a bin holds is not printed: five grids are assumed, above is the range over them')
    drop = np.log(D[:, :, 0] / D[:, :, -1]).mean(1)
    say('mean log drop of loss over the data bins, R-SL and R-SSL', '', f'{drop[2]:.3f} and {drop[3]:.3f}', 'the larger exponent has the smaller drop')
    print()
    return free


def refit_model(say, M):
    """Model exponents of Table S.5 under three kinds of floor, and the largest model of S.4. Returns those with free floors."""
    blocks = [12 * int(r['depth']) * int(r['width_or_hidden']) ** 2 for r in printed('table_s4_configs') if r['arch'] == 'transformer']
    say('largest model, millions of parameters', '200', f'{max(blocks) / 1e6:.0f} in Transformer blocks of S.4',
        'so 200 can only be a ResNet, if it counts parameters')
    for floor in ('free', 'shared', '0'):
        alpha, _ = printed_exponents(N_GRID, M, floor)
        for t, r, label in ((0, 2, 'SL'), (1, 3, 'SSL')):
            say(f'model exponent R / T, {label}, floor {floor}', '1.3-2.5x' if floor == 'free' else '',
                f'{alpha[r].mean() / alpha[t].mean():.2f} of means',
                f'{np.median(alpha[r]) / np.median(alpha[t]):.2f} of medians, R larger on {(alpha[r] > alpha[t]).sum()} of 11 sets')
        if floor == 'free':
            free = alpha
    print(f'  {at_bound(free).sum()} of 44 model exponents are at a bound; sizes are assumed evenly spaced in log from 20K to 200M. '
          'Exponents are compared, not losses\n')
    return free


def refit_shares(say, M, D):
    """What compute should be spent on, by joint laws through the 11 points of each set: Table S.5, taken to be at full data, and S.6, taken
    to be at the size of its fourth bin."""
    N = np.r_[N_GRID, np.full(6, N_GRID[3])]
    for k in ('log 1-100', '1 5 10 25 50 100'):
        R = np.r_[np.full(5, RECORDS), D_GRIDS[k] * RECORDS / 100]
        ended = 0
        for c, told in enumerate(('.90', '.27', '.79', '')):
            laws = [project(N, R, np.r_[m, d], 12) for m, d in zip(M[c], D[c])]
            share = np.array([shares(law)[1] for law in laws])
            ended += sum(at_bound(law.alpha) + at_bound(law.beta) for law in laws)
            say(f'data share of marginal compute, {SHORT[c]}, grid {k}', told, f'{share.mean():.2f} mean, {np.median(share):.2f} median',
                f'alpha > beta on {(share > .5).sum()} of 11 sets')
        print(f'  {ended} of 88 exponents are at a bound')


def draw_bins(names, M, D, path):
    """Losses over bins (4, datasets, bins) of Tables S.5 (M) and S.6 (D), with their free-floor curves and floors."""
    fig, axes = panels(4, 6, 20 / 6, 3)
    for block, (x, table, label) in enumerate(((N_GRID, M, 'N (assumed)'), (D_GRIDS['log 1-100'], D, '% of records (assumed)'))):
        line = np.geomspace(x[0], x[-1], 50)
        for d, name in enumerate(names):
            ax = axes[2 * block + d // 6, d % 6]
            for c, L in enumerate(table[:, d]):
                E, A, e, _ = marginal(x, L)
                ax.plot(x, L, 'o', color=f'C{c}', ms=4, label=f'{SHORT[c]} {e:.2f}' + (' at bound' if at_bound(e) else ''))
                ax.plot(line, E + A * line ** -e, color=f'C{c}', lw=1)
                ax.axhline(E, color=f'C{c}', lw=.6, ls=':')
            ax.set(xscale='log', xlabel=label, title=name)
            ax.legend(fontsize=6)
        axes[2 * block + 1, 5].axis('off')                       # 11 sets
    fig.savefig(path, dpi=70)


def draw_exponents(names, alpha, beta, sets, gamma, path):
    """Exponents (4, datasets) per dataset, hollow where they are at a bound."""
    fig, axes = panels(1, 3, 16 / 3, 4.6)
    for ax, values, bound, labels, title in ((axes[0, 0], alpha, at_bound(alpha), names, 'alpha, refitted, free floor'),
                                             (axes[0, 1], beta, at_bound(beta), names, 'beta, refitted, free floor'),
                                             (axes[0, 2], gamma, gamma <= .05, sets, 'gamma, as printed')):
        for c in range(4):
            at, x = bound[c], np.arange(len(labels)) + .15 * (c - 1.5)
            ax.plot(x[~at], values[c][~at], 'o', color=f'C{c}', label=SHORT[c])
            ax.plot(x[at], values[c][at], 'o', mfc='none', color=f'C{c}')
        ax.set(yscale='log', title=f'{title}; hollow: at a bound')
        ax.legend(fontsize=7)
        ax.set_xticks(range(len(labels)), labels, rotation=60, ha='right', fontsize=7)
    fig.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# compute

def flops(work, fft=False):
    """FLOPs of work()'s matrix products and convolutions, two a multiply-accumulate, as torch counts them: attention under the kernel that it
    can count, and products in place, which it overlooks, too. fft: add real FFTs, 5/2 n log2 n each. What is done element by element is
    left out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    overlooked = {torch.ops.aten.baddbmm_: lambda total, a, b, out_shape=None, **how: 2 * math.prod(a) * b[2]}
    if fft:                                                      # shape: of what is real, of all transforms side by side
        real = lambda shape, n: round(math.prod(shape[:-1]) * 5 / 2 * n * math.log2(n))
        overlooked[torch.ops.aten._fft_r2c] = lambda x, *rest, out_shape=None, **how: real(x, x[-1])
        overlooked[torch.ops.aten._fft_c2r] = lambda x, dim, norm, n, out_shape=None, **how: real(x, n)
    with FlopCounterMode(display=False, custom_mapping=overlooked) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


@torch.no_grad()
def counted(objective, batch):
    """Forward MACs of one crop through an objective in eval mode, as `flops` counts them, FFTs too: (student with all its views and
    heads, what has no backward: teacher, tokenizer and the search for codes)."""
    B, T = batch['x'].shape[0], batch['x'].shape[2]
    macs = lambda work: flops(work, fft=True) / 2 / B            # of a crop
    objective.eval()
    objective(batch)                                             # S4 makes its dynamics once for all
    student, extra = macs(lambda: objective(batch)), 0.
    if hasattr(objective, 'teacher'):
        extra = macs(lambda: objective.teacher(batch))
    if hasattr(objective, 'tokenizer'):
        extra = macs(lambda: objective.tokenizer.codes(batch))
    tokens = -(-T // 2)
    if hasattr(objective, 'prototypes'):                         # HuBERT++'s similarities
        extra += objective.prototypes.numel() * tokens
    if isinstance(objective, OBJECTIVES['vqbeat']):              # similarities of real beats
        _, pad = objective.encode(batch)
        extra += objective.codebook.numel() * (~pad[:, 1:]).sum().item() / B
    student -= extra
    if hasattr(objective, 'sums'):                               # DinoSR's distances, which the counter overlooks
        extra += objective.sums.numel() * tokens
    return student, extra


def trainable(ds, t):
    """Training records that last the run's window."""
    rows = ds.split()[0]
    return rows[ds.length[rows] >= round(t.window * ds.contract.fs)]


def first_batch(ds, t, size, device):
    """A batch to count and to time a run's step on."""
    return to_device(ds.batch(trainable(ds, t), round(t.window * ds.contract.fs), size, 0, 0), device)


def price(t, ds, device):
    """(seconds, FLOPs) of one training step, the optimiser's left out."""
    columns = ds.columns(t.task) if t.task else ()
    tokenizer = train.load_tokenizer(t.tokenizer, ds.contract) if t.tokenizer else None
    objective = train.build(t, ds.contract.fs, columns, tokenizer).to(device)
    batch = first_batch(ds, t, t.batch, device)
    for _ in range(2):                                           # the first step also grows the heap
        began = time.perf_counter()
        objective(batch)[0].backward()
        seconds = time.perf_counter() - began
    student, extra = counted(objective, batch)
    return seconds, compute(student, t.batch, 1, extra)


# ---------------------------------------------------------------------------------------------------------------------
# sweeps: what to run

KINDS = {'params': 'every size on all records', 'data': 'the middle size on every number of records',
         'joint': 'both axes, the diagonal and three points off it: what the joint law needs', 'labels': 'supervised on more and more labels',
         'finetune': "fine-tuning of the sweep's best checkpoints against training from scratch, on more and more records"}


def grid(kind, sizes, records):
    """[(size, records, replicated)] of a sweep. Corners and centre, on an axis its ends and middle, are replicated with every seed."""
    widest, most = len(sizes) - 1, len(records) - 1
    size, count = len(sizes) // 2, len(records) // 2             # the middle of either axis
    params, numbers = {(i, most) for i in range(len(sizes))}, {(size, j) for j in range(len(records))}
    if kind == 'params':
        points, often = params, {(0, most), (size, most), (widest, most)}
    elif kind == 'data':
        points, often = numbers, {(size, 0), (size, count), (size, most)}
    else:
        diagonal = {(round(j * widest / max(1, most)), j) for j in range(len(records))}
        points = params | numbers | diagonal | {(0, count), (widest, count), (widest, 0)}
        often = {(0, 0), (0, most), (widest, 0), (widest, most), (size, count)}
    return [(sizes[i], records[j], (i, j) in often) for i, j in sorted(points)]


def ladder(steps):
    """Steps to evaluate at: a factor of sqrt 2 apart, 50 or more, the last of them `steps`."""
    down = [steps / 2 ** (k / 2) for k in range(40)]
    return sorted({round(step) for step in down if step >= min(50, steps)})


def settings(a, ds, family, objective, size, records, seed, task=None):
    """train.py's arguments of one run."""
    t = train.make_parser().parse_args([])
    steps = a.steps if a.fixed == 'steps' else math.ceil(a.epochs * records / a.batch)
    vars(t).update(objective=objective, backbone=family, size=size, data=a.data, records=records, seed=seed, lr=a.lr, steps=steps, batch=a.batch,
                   schedule=a.schedule, device=a.device, probe_every=0, save_every=100, log_every=50)
    if objective == 'supervised':
        t.task = task or first_task(ds)
    if objective == 'beats':
        t.tokenizer = a.tokenizer
    train.fill_in(t)
    return t


def label_sets(a, ds):
    """[(arm, anchor names, training names, draw)] of label scaling (2605.17276, Section 4.2): anchored in the tenth of labels that are most
    frequent, or in the rarest 2 % of those with at least ten positives, and extended by random others, nested, up to all of them."""
    columns = ds.columns(a.labels)
    names, y = np.array(ds.label_names)[columns], np.array(ds.labels[:, columns])[ds.split()[0]]
    binary = np.isin(y, (0, 1)).any(0) & ~(np.isfinite(y) & ~np.isin(y, (0, 1))).any(0)
    count = (y == 1).sum(0)
    sets = []
    for arm, rows, share in (('dominant', binary & (count > 0), .1), ('tail', binary & (count >= 10), .02)):
        order = np.argsort(-count[rows] if arm == 'dominant' else count[rows], kind='stable')
        pool = names[rows][order]
        anchors = max(2, round(share * len(pool)))
        for seed in a.seeds:
            others = np.random.default_rng([seed, 4]).permutation(pool[anchors:])
            for part in sorted({max(anchors, round(f * len(pool))) for f in (0, .3, .5, 1)}):
                sets.append((arm, list(pool[:anchors]), [*pool[:anchors], *others[:part - anchors]], seed))
    return sets


def pairs(a):
    """The (family, objective, sizes) asked for that there are; by default the five smallest rungs, layers x width, of a family's ladder."""
    sizes = {f: a.size or [s for s in SIZES[f] if 'x' in s][:5] for f in a.family}
    if bare := [f for f in a.family if not sizes[f]]:
        raise Stop(f'{bare[0]} has no ladder of sizes: name some with --size, of {", ".join(SIZES[bare[0]])}')
    objectives = [o for o in a.objective if o == 'supervised' or a.kind != 'labels']         # others learn no labels
    found = [(f, o, sizes[f]) for f, o in itertools.product(a.family, objectives) if f in OBJECTIVES[o].rates]
    if not found:
        raise Stop(f'none of {", ".join(a.objective)} runs on any of {", ".join(a.family)}' + ' with labels' * (a.kind == 'labels')
                   + ': see python objectives.py --pairs')
    return found


def pilots(a, ds):
    """Short runs on all records, at three rates for each size: a rate that suits one size only would bend alpha."""
    runs = {}
    for family, objective, sizes in pairs(a):
        if a.kind in ('data', 'labels'):
            sizes = [sizes[len(sizes) // 2]]
        for size, factor in itertools.product(sizes, (10 ** -.5, 1, 10 ** .5)):
            t = settings(a, ds, family, objective, size, len(ds.split()[0]), 100)
            t.lr, t.steps = float(f'{t.lr * factor:.1g}'), a.lr_steps
            runs[f'rate_{family}_{objective}_{size}_{t.lr:g}'] = t, 'rate', None
    return runs


def plan(a, ds, rates):
    """The runs of a sweep: {name: (arguments of train.py, arm, anchor labels)}. rates: {(family, objective, size): rate}."""
    runs = {}
    for family, objective, sizes in pairs(a):
        if a.kind == 'labels':
            size = sizes[len(sizes) // 2]
            for arm, anchors, names, seed in label_sets(a, ds):
                t = settings(a, ds, family, objective, size, a.records[-1], seed, '+'.join(names))
                runs[f'{family}_{objective}_{size}_{arm}{len(names)}_s{seed}'] = t, arm, anchors
            continue
        for size, count, often in grid(a.kind, sizes, a.records):
            for seed in a.seeds if often else a.seeds[:1]:
                t = settings(a, ds, family, objective, size, count, seed)
                runs[f'{family}_{objective}_{size}_{count}_{a.fixed}_s{seed}'] = t, a.fixed, None
    for t, _, _ in runs.values():
        t.lr = rates.get((t.backbone, t.objective, t.size), t.lr)
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# sweeps: one run

@torch.no_grad()
def held_out(objective, ds, rows, t, device, columns):
    """(loss, macro AUROC) of an objective on the first crops of `rows`, in eval mode, masks and negatives the same for every run. columns:
    of supervised, the labels over which both are taken; None of all others, whose AUROC is NaN."""
    objective.eval()
    size, outputs = min(t.batch, len(rows)), []
    rows = rows[:len(rows) // size * size]                       # whole batches: negatives of CMSC are the batch
    for i, part in enumerate(rows.reshape(-1, size)):
        torch.manual_seed(i)
        batch = to_device(ds.collate(part, np.zeros(size, int), round(t.window * ds.contract.fs)), device)
        if columns is None:
            outputs.append(objective(batch)[0].item())
        else:
            outputs.append(objective.head(*objective.encoder(batch)).float().cpu().numpy())
    if columns is None:
        return float(np.mean(outputs)), math.nan
    z = np.concatenate(outputs)[:, [objective.columns.tolist().index(c) for c in columns]]
    y = np.array(ds.labels[rows])[:, columns]
    return entropy(z, y), float(macro(auroc(z, y))[0])


def ood(name, contract):
    """(Dataset, label columns) of dataset:task, under the contract of what is pretrained on."""
    data, _, task = name.partition(':')
    ds = Dataset(data)
    if differs := ds.contract.differs(contract):
        raise Stop(f'datasets/{data} has another contract than the pretraining data ({differs}): prepare them alike')
    return ds, ds.columns(task or first_task(ds))


def out_of_distribution(encoder, name, samples, contract, device, seen):
    """{ood_TASK_val, _test, _auroc}: a linear probe on the first crops of dataset:task, its L2 chosen by validation loss. The three highest
    folds test, the next validates, the others train; of val and test, patients among `seen` are left out."""
    ds, columns = ood(name, contract)
    y, folds = np.array(ds.labels[:, columns]), np.unique(ds.fold[ds.fold >= 0])
    leaks = np.isin(ds.fold, folds[-4:]) & overlap(ds, seen)
    test = np.isin(ds.fold, folds[-3:])
    leaks |= ~test & overlap(ds, ds.names(test))                 # a recording may be in the set twice
    rows = np.flatnonzero((ds.length >= samples) & np.isfinite(y).any(1) & (ds.fold >= 0) & ~leaks)
    tr, val, test = (np.flatnonzero(np.isin(ds.fold[rows], which)) for which in (folds[:-4], folds[-4:-3], folds[-3:]))
    y = y[rows]
    binary = ~(np.isfinite(y) & ~np.isin(y, (0, 1))).any(0)
    both = lambda part: (y[part] == 0).any(0) & (y[part] == 1).any(0)
    y = y[:, binary & both(tr) & both(test)]
    if not y.shape[1]:
        raise Stop(f'{name}: no yes/no label has both values in the training and the test folds, without patients seen in pretraining')
    X = embed(encoder, ds, rows, samples, device, name, first=True)
    predict, z = linear_probe(X, y, tr, val, worth=lambda z, y: -entropy(z, y))
    score = predict(X[test])
    key = 'ood_' + name.replace(':', '_')
    return {f'{key}_val': entropy(z, y[val]), f'{key}_test': entropy(score, y[test]), f'{key}_auroc': float(macro(auroc(score, y[test]))[0])}


def assess(objective, t, ds, anchors, oods, device):
    """Losses of a checkpoint: in distribution on 512 training records and all validation and test records, then out of distribution."""
    samples = round(t.window * ds.contract.fs)
    rows = [r[ds.length[r] >= samples] for r in ds.split()]
    seen = ds.names(rows[0]) | (train.read_seen(t.tokenizer) if t.tokenizer else set())          # by the largest run: the same test records for all
    rows[0] = ds.nested(rows[0], t.records, t.seed)[:512]
    columns = None
    if t.objective == 'supervised':
        columns = [ds.label_names.index(n) for n in anchors] if anchors else objective.columns.tolist()
    result = {}
    for name, part in zip(('train', 'val', 'test'), rows):
        result[f'id_{name}'], result[f'id_{name}_auroc'] = held_out(objective, ds, part, t, device, columns)
    result.pop('id_train_auroc')
    window = round(samples / OBJECTIVES[t.objective].views)
    for name in oods:
        result |= out_of_distribution(objective.encoder, name, window, ds.contract, device, seen)
    return result


def facts(objective, t, arm, step, ds, device):
    """What a row says beside losses: what was trained, its size, its data, and what it has cost."""
    encoder = objective.encoder
    student, extra = counted(objective, first_batch(ds, t, min(t.batch, t.records), device))
    patients = np.unique(ds.patient[ds.nested(trainable(ds, t), t.records, t.seed)])
    return dict(family=t.backbone, paradigm='SL' if t.objective == 'supervised' else 'SSL', objective=t.objective, arm=arm, size=t.size,
                N=count_parameters(encoder), N_total=count_parameters(objective), macs=round(student), extra_macs=round(extra), batch=t.batch, D=t.records,
                patients=len(patients), labels=len(getattr(objective, 'columns', ())), lr=t.lr, step=step, epochs=round(step * t.batch / t.records, 4),
                flops=float(compute(student, t.batch, step, extra)), seed=t.seed)


def worth(row):
    """What early stopping watches, lower is better: validation loss in distribution, out of it where targets move."""
    if row['objective'] not in MOVING:
        return float(row['id_val'])
    return float(np.mean([float(v) for k, v in row.items() if k.startswith('ood_') and k.endswith('_val')]))


def rows_in(file):
    """The rows of a CSV as dicts of text, none where there is no file. That of a run, rows.csv, holds its finished evaluations."""
    if not file.exists():
        return []
    with open(file, newline='') as f:
        return list(csv.DictReader(f))


def finished(rows, steps, patience):
    """Whether a run has reached its last step, or its validation loss has not improved at `patience` evaluations in turn."""
    if not rows:
        return False
    since = len(rows) - 1 - np.argmin([worth(r) for r in rows])
    return int(rows[-1]['step']) >= steps or since >= patience


def begun(folder, t):
    """The checkpoint of a run that was begun, {} of none. Stops where its settings were others."""
    try:
        saved = load(folder / 'ckpt.pt') if (folder / 'ckpt.pt').is_file() else {}
    except ValueError as e:
        raise Stop(f'{e}; remove {folder}, and the same command makes that run anew')
    for k, v in saved.get('args', {}).items():
        if v != getattr(t, k) and k not in ('save_every', 'log_every'):
            raise Stop(f'{folder} was begun with {k} = {v}, not {getattr(t, k)}: go on as before, or take another --out')
    if saved and saved['dataset'] != Dataset(t.data).hash:
        raise Stop(f'{folder} was begun on {t.data} before that was prepared anew: remove the folder, and the same command makes that run again')
    return saved


def run_one(name, t, arm, anchors, a):
    """Train one run from evaluation to evaluation until it is finished; returns its rows. A killed one goes on from its last checkpoint,
    exactly: a step is evaluated after its checkpoint is on disk, and a row is written after it is evaluated."""
    folder, ds, device = Path(a.out, 'runs', name), Dataset(t.data), pick_device(t.device)
    folder.mkdir(parents=True, exist_ok=True)
    rows, saved = rows_in(folder / 'rows.csv'), begun(folder, t)
    oods = a.ood if arm != 'rate' or t.objective in MOVING else ()
    for step in [t.steps] if arm == 'rate' else ladder(t.steps):
        if finished(rows, t.steps, a.patience):
            break
        if rows and int(rows[-1]['step']) >= step:
            continue
        with open(folder / 'train.txt', 'a') as log, contextlib.redirect_stdout(log):
            objective = train.train(t, folder, saved, until=step)
        saved, began = load(folder / 'ckpt.pt'), time.time()
        row = dict(run=name, **facts(objective, t, arm, step, ds, device), **assess(objective, t, ds, anchors, oods, device))
        row['seconds'] = round(time.time() - began, 2)
        rows.append({k: str(v) for k, v in row.items()})
        rows[-1]['finished'] = str(int(finished(rows, t.steps, a.patience)))
        if worth(rows[-1]) == min(map(worth, rows)):
            (folder / 'best').mkdir(exist_ok=True)
            save(folder / 'best/ckpt.pt', saved)
            shutil.copy(folder / 'seen.npz', folder / 'best')
        write_csv(folder / 'rows.csv', rows)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# sweeps: all runs

def estimate(a, ds, runs, device):
    """Prints what runs cost at most: a step of each size is timed, and an evaluation is forward alone, a third of it."""
    cost, total = {}, 0.
    crops = min(512, a.records[-1]) + sum(map(len, ds.split()[1:])) + sum(len(Dataset(o.split(':')[0])) for o in a.ood)
    for t, arm, _ in tqdm(runs.values(), desc='timing', leave=False, disable=None):
        key = t.backbone, t.objective, t.size
        if key not in cost:
            cost[key], _ = price(t, ds, device)
        times = 1 if arm == 'rate' else len(ladder(t.steps))
        total += cost[key] * (t.steps + times * crops / t.batch / 3)
    print(f'{len(runs)} runs, at most {total / 60:.0f} core-minutes ({a.jobs} at a time); early stopping ends many sooner')


def collect(out, prefix=''):
    """All rows of finished and unfinished runs in `out`, pilots apart, in one order whatever the order they were made in."""
    folders = [f for f in sorted(Path(out, 'runs').glob('*')) if f.name.startswith('rate_') == (prefix == 'rate_')]
    rows = [r for f in folders for r in rows_in(f / 'rows.csv')]
    if rows:
        write_csv(Path(out, f'{prefix}runs.csv'), rows)
    return rows


def share_threads(a, device):
    """Settle how many processes run at a time, and take the threads that each of them will have: a step timed here then costs what it will
    there, and random encoders come out bit for bit the same."""
    a.jobs = a.jobs or (1 if device.type == 'cuda' else torch.get_num_threads())
    torch.set_num_threads(max(1, torch.get_num_threads() // a.jobs))


def start_worker(threads):
    """What a worker does first. It ends when the process that made it is killed, and does not go on alone."""
    torch.set_num_threads(threads)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def run_all(work, a, name):
    """{name: result} of work {name: (function, arguments)}, a.jobs at a time in processes of their own. Stops, after the others are done, with
    what stopped."""
    results, failed = {}, []
    with ProcessPoolExecutor(a.jobs, multiprocessing.get_context('spawn'), start_worker, (torch.get_num_threads(),)) as pool:
        futures = {pool.submit(function, *arguments): key for key, (function, arguments) in work.items()}
        for future in tqdm(as_completed(futures), desc=name, total=len(futures), disable=None):
            try:
                results[futures[future]] = future.result()
            except SystemExit as e:
                failed.append(f'{futures[future]}: {e}')
            collect(a.out)
    if failed:
        raise Stop(f'{len(failed)} of {len(work)} runs stopped; the first: {failed[0]}')
    return results


def sweep(a):
    """Train and evaluate models of several sizes on several numbers of records, as far as runs.csv does not hold them yet."""
    ds, device = Dataset(a.data), pick_device(a.device)
    for name in a.ood:                                           # prepared, or refused, before anything is trained
        ood(name, ds.contract)
    most = len(ds.split()[0])
    a.records = sorted({most if r == 'all' else r for r in a.records})
    if a.records[-1] > most:
        raise Stop(f'{a.data} has {most:,} training records: --records must not exceed that')
    share_threads(a, device)
    if a.kind == 'finetune':
        return finetune(a)
    trial = {} if a.lr else pilots(a, ds)
    estimate(a, ds, trial | plan(a, ds, {}), device)
    if a.estimate:
        return
    Path(a.out).mkdir(parents=True, exist_ok=True)
    best = {}                                                    # (family, objective, size): (validation loss, rate)
    for rows in run_all({name: (run_one, (name, *run, a)) for name, run in trial.items()}, a, 'rates').values():
        key = tuple(rows[-1][k] for k in ('family', 'objective', 'size'))
        best[key] = min(best.get(key, (math.inf, 0)), (worth(rows[-1]), float(rows[-1]['lr'])))
    collect(a.out, 'rate_')
    rates = {key: lr for key, (_, lr) in sorted(best.items())}
    for key, lr in rates.items():
        print(f'{" ".join(key)}: rate {lr:g}')
    run_all({name: (run_one, (name, *run, a)) for name, run in plan(a, ds, rates).items()}, a, f'sweep {a.kind}')
    rows = collect(a.out)
    print(f'{a.out}/runs.csv: {len(rows)} rows of {len({r["run"] for r in rows})} runs; fit them with python scaling.py fit {a.out}/runs.csv')


def finetune_one(folder, a):
    """Rows of fine-tuning one run's best checkpoint, and of training its shape from scratch, on each number of labelled records."""
    data, _, task = a.ood[0].partition(':')
    with contextlib.redirect_stdout(io.StringIO()):
        run = open_run(folder / 'best')
        t = Task(data, [task] if task else None, [run], pick_device(a.device))
    if t.numbers.any():
        raise Stop(f'{a.ood[0]} has labels that are numbers: sweep finetune takes a task of yes/no labels')
    recipe = replace(PROTOCOLS['quick'], batch=a.batch, schedule='constant', patience=10, by_loss=True)
    origin, rows = rows_in(folder / 'rows.csv')[0], []
    for mode, count in itertools.product(('finetune', 'scratch'), a.records):
        if count > t.available:
            continue
        torch.manual_seed(run['seed'])                           # a fresh encoder is the same every time
        encoder = run['net'] if mode == 'finetune' else fresh(run)
        epochs = math.ceil(a.steps * a.batch / (.8 * count))     # a fifth of the records validates
        p, _ = t.output(encoder, Arm(mode, [encoder], mode, recipe, epochs), count, run['seed'], 0)
        p = p.clip(1e-6, 1 - 1e-6)
        z = np.log(p / (1 - p))
        rows.append({k: origin[k] for k in ('run', 'family', 'paradigm', 'objective', 'size', 'N', 'D', 'seed')}
                    | dict(task=a.ood[0], mode=mode, D_F=count, loss=entropy(z, t.y), auroc=float(macro(auroc(z, t.y))[0])))
    return rows


def finetune(a):
    """Effective data transferred (2605.17276, Eq. S.9): rows of finetune.csv. Finished scores are kept in out/scores."""
    folders = [f.parent.parent for f in sorted(Path(a.out, 'runs').glob('*/best/ckpt.pt'))]
    first = {f: rows[0] for f in folders if not f.name.startswith('rate_') and (rows := rows_in(f / 'rows.csv'))}
    most = max((int(r['D']) for r in first.values()), default=0)
    asked = lambda r: r['family'] in a.family and r['objective'] in a.objective and int(r['seed']) in a.seeds
    folders = [f for f, r in first.items() if asked(r) and int(r['D']) == most]
    if not folders:
        raise Stop(f'{a.out} has no runs to fine-tune: sweep them first, with python scaling.py sweep params --out {a.out}')
    print(f'{len(folders)} runs on {len(a.records)} numbers of records: as many fine-tunings and trainings from scratch, each of at most some {a.steps} steps')
    if a.estimate:
        return
    results = run_all({str(f): (finetune_one, (f, a)) for f in folders}, a, 'sweep finetune')
    rows = [r for f in folders for r in results[str(f)]]
    write_csv(Path(a.out, 'finetune.csv'), rows)
    print(f'{a.out}/finetune.csv: {len(rows)} rows; python scaling.py transfer {a.out}/finetune.csv')


# ---------------------------------------------------------------------------------------------------------------------
# the study: what the papers claim, compared like for like

OBJECTIVES_5, BACKBONES_3 = ('cpc', 'jepa', 'data2vec', 'dinosr', 'hubert'), ('s4', 'transformer', 'net1d')
# by the probe on validation records 3e-2 is better here than the defaults, though targets nearly collapse (assets/results/rates_tiny.csv)
FASTER = {'jepa transformer': ' --lr 3e-2', 'data2vec transformer': ' --lr 3e-2'}
GRID = {f'{o} {b}': f'--objective {o} --backbone {b}' + FASTER.get(f'{o} {b}', '') for o, b in itertools.product(OBJECTIVES_5, BACKBONES_3)}
CROSS = {arm: flags for arm, flags in GRID.items() if 'cpc' in arm or 's4' in arm}           # five objectives on S4, CPC on three backbones
# a question, what arms differ in, {arm: train.py's flags}, where they are looked at: (data, mode, number of labels), and pretraining seeds
Part = namedtuple('Part', 'question factors arms looks seeds', defaults=((0, 1, 2),))
LINEAR = (('cohort', 'linear', 'all'), ('sample', 'linear', 'all'))
LINEAR_4 = (*LINEAR, ('synthetic', 'linear', 'all'), ('synthetic', 'linear', 300))
STUDY = {
    'objectives': Part('which objective, on S4, after equal steps?', ('objective',),
                       {o: f'--objective {o} --backbone s4' for o in OBJECTIVES_5}, LINEAR_4, (0, 1, 2, 3, 4, 5)),
    'grid': Part('which objective on which backbone, after equal steps?', ('objective', 'backbone'), GRID, LINEAR_4),
    'modes': Part('which objective on S4, and which backbone by CPC, with attention pooling and fine-tuned on 300 labels?', ('objective', 'backbone'),
                  CROSS, (('cohort2000', 'frozen', 'all'), ('cohort2000', 'finetune', 300))),
    'flops': Part('which objective on S4, and which backbone by CPC, after equal FLOPs?', ('objective', 'backbone'), CROSS, LINEAR),
    'records': Part('do more pretraining records help, at equal steps?', ('objective', 'records'),
                    {f'{o} {n}': f'--objective {o}' + (n != 'all') * f' --records {n}' for o, n in itertools.product(OBJECTIVES_5, ('100', 'all'))},
                    (*LINEAR, ('sequences', 'knn', 'all'))),
    'depth': Part('are 6 layers of S4 better than 4?', ('objective', 'layers'),
                  {f'{o} {n}': f'--objective {o}' + (n != '4') * f' --layers {n}' for o, n in itertools.product(('cpc', 'jepa'), '46')}, LINEAR),
    'masking': Part('what matters for a masked autoencoder?', ('variant',),
                    {f'hide{h}': f'--objective mae --hide .{h}' for h in ('50', '05', '25', '75')}
                    | dict(raw='--objective mae --hide .50 --raw-target', long='--objective mae --hide .50 --steps {long}'), LINEAR),
    'pool': Part('are real ECGs better to pretrain on than as many synthetic ones?', ('objective', 'source'),
                 {f'{o} {source}': f'--objective {o} {flags}' for o in ('cpc', 'jepa', 'hubert')
                  for source, flags in (('synthetic', '--records {pool}'), ('pool', '--data ludb,cinc'))},
                 (('sample', 'linear', 'all'), ('sample', 'linear', 100))),
    'filtered': Part('which objective, on real records alone, filtered and standardised?', ('objective',),
                     {o: f'--objective {o} --data ptbxl1819' for o in OBJECTIVES_5},
                     (('ptbxl1819', 'linear', 'all'), ('ptbxl1819', 'frozen', 'all'), ('ptbxl1819', 'finetune', 'all')))}
PREPARE = {
    'cohort': 'python data.py synthetic --records 999 --seed 1 --shift all --out cohort',
    'cohort2000': 'python data.py synthetic --records 2000 --seed 1 --shift all --out cohort2000',
    'sequences': 'python data.py sequences', 'ludb': 'python data.py wfdb --root LUDB --out ludb',
    'cinc': 'python data.py challenge --root CINC2021 --cohort cpsc_2018 cpsc_2018_extra chapman_shaoxing ningbo --out cinc',
    'ptbxl1819': 'python data.py array --root X.npy --filter hp0.5+lp40 --norm record --out ptbxl1819, with any records of yours so filtered'}


def arm_settings(part, arm, seed, a):
    """train.py's arguments of one run of an arm; {long}: four times the steps, {pool}: as many records as the pool has to train on."""
    flags = STUDY[part].arms[arm]
    pool = len(Dataset('ludb,cinc').split()[0]) if '{pool}' in flags else 0
    flags = flags.format(long=4 * a.steps, pool=pool)
    t = train.make_parser().parse_args(['--steps', str(a.steps), '--size', a.size, '--data', a.data, *flags.split()])
    vars(t).update(seed=seed, batch=a.batch, device=a.device, probe_every=0, save_every=100)
    train.fill_in(t)
    return t


def study_runs(part, a, device):
    """{arm: [(folder, arguments of train.py) of each seed]}. flops: every arm takes as many steps as the cheapest one's FLOPs allow."""
    seeds = sorted(set(a.seeds or STUDY[part].seeds))
    runs = {arm: [arm_settings(part, arm, seed, a) for seed in seeds] for arm in STUDY[part].arms}
    if part == 'flops':
        cost = {arm: price(ts[0], Dataset(ts[0].data), device)[1] for arm, ts in tqdm(runs.items(), desc='counting', leave=False, disable=None)}
        for arm, ts in runs.items():
            for t in ts:
                t.steps = max(1, round(a.steps * min(cost.values()) / cost[arm]))
    default = vars(train.make_parser().parse_args([]))
    apart = ('objective', 'backbone', 'lr', 'window', 'seed', 'device', 'steps', 'probe_every', 'save_every')

    def folder(t):
        changed = [f'{k}-{v}' for k, v in sorted(vars(t).items()) if v != default[k] and k not in apart]
        return Path(a.out, 'runs', slug(t.objective, t.backbone, *changed, t.steps, f's{t.seed}'))

    return {arm: [(folder(t), t) for t in ts] for arm, ts in runs.items()}


def pretrain(folder, t):
    """Train one run to its end; a killed one goes on."""
    saved = begun(folder, t)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'train.txt', 'a') as log, contextlib.redirect_stdout(log):
        train.train(t, folder, saved)


def look(arms, data, ways, device):
    """{way: (Task, {name: Arm}, {name: Score})} of arms {name: run folders} on a dataset, with random encoders of the same shapes and, beside
    fine-tuning, training from scratch. ways: (mode, number of labels)."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        families = {name: [open_run(f) for f in folders] for name, folders in arms.items()}
        t = Task(data, None, [r for runs in families.values() for r in runs], pick_device(device))
    if 'seen in pretraining' in said.getvalue():
        raise Stop(f'{data} tests patients that were pretrained on')
    found = {}
    for mode, count in ways:
        made = arms_of(families, t, mode, scratch=mode == 'finetune')
        found[mode, count] = t, made, {name: t.score(arm, count, 3)[t.names[0]] for name, arm in made.items()}
    return found


def look_ahead(*arguments):
    """`look` in a worker, for what it leaves in out/scores: the rest is too much to send back."""
    look(*arguments)


def combined(scores, how):
    """A Score whose points and resamples are how(those of all scores), seed by seed and draw by draw."""
    out = copy.copy(scores[0])
    out.point = {m: how([s.point[m] for s in scores]) for m in out.point}
    out.boot = {m: how([s.boot[m] for s in scores]) for m in out.boot}
    return out


def average(scores):
    """The Score of what is expected of an arm drawn from several."""
    return combined(scores, lambda values: np.mean(values, 0))


def contrasts(part, scores, prefix=''):
    """{name of a family of comparisons: {level: Score}}: one factor's levels at each level of the other, and averaged over it where all meet
    all."""
    arms, factors = {tuple(name.split()): scores[name] for name in part.arms}, part.factors
    if len(factors) == 1:
        return {prefix + factors[0]: {level: s for (level,), s in arms.items()}}
    out = {}
    for i, factor in enumerate(factors):
        levels, others = (list(dict.fromkeys(key[j] for key in arms)) for j in (i, 1 - i))
        if len(arms) == len(levels) * len(others):
            out[f'{prefix}{factor}, mean'] = {l: average([s for key, s in arms.items() if key[i] == l]) for l in levels}
        for other in others:
            met = {key[i]: s for key, s in arms.items() if key[1 - i] == other}
            if len(met) > 1:
                out[f'{prefix}{factor}, {other}'] = met
    return out


def compared(levels):
    """The rows of `compare`, and in each the difference that Holm's first step would find four times in five: what reaches beyond 0 at its
    level, and .84 standard errors (Student's t for seeds) more."""
    rows, _ = compare(levels)
    for r in rows:
        points, boot = levels[r['a']].difference(levels[r['b']])
        half = lambda level: np.ptp(interval(points, boot, level)[1:]) / 2
        r['detectable'] = half(1 - .05 / len(rows)) + half(.6)
    return rows


def study(a):
    """The papers' comparisons like for like: pretrain, evaluate, compare with intervals; goes on where it was stopped."""
    device = pick_device(a.device)
    share_threads(a, device)
    if unknown := set(a.part) - set(STUDY):
        raise Stop(f'study has no part {", ".join(sorted(unknown))}: take some of {", ".join(STUDY)}')
    for name in a.part or STUDY:
        needed = {'synthetic', *(data for data, _, _ in STUDY[name].looks)}
        for flags in STUDY[name].arms.values():
            for data in re.findall(r'--data (\S+)', flags):
                needed |= set(data.split(','))
        missing = [d for d in sorted(needed) if d not in ('synthetic', 'sample') and not Path('datasets', d).is_dir()]
        lack = f'{name} needs {", ".join(missing)}: {"; ".join(PREPARE[d] for d in missing)}'
        if missing and len(a.part) == 1:
            raise Stop(lack)
        if missing:
            print(lack)
            continue
        for d in needed:
            Dataset(d)                                           # synthetic ones are prepared once, before several processes want them
        study_part(name, a, device)


def study_part(name, a, device):
    """One part of the study: its runs, its looks, and its two tables."""
    part, table = STUDY[name], Path(a.out, f'study_{name}_arms.csv')
    how = dict(pretrained_on=a.data, size=a.size, steps=str(a.steps), batch=str(a.batch))
    if any(r.get(k) != v for r in rows_in(table) for k, v in how.items()):
        raise Stop(f'{table} was made with another --data, --size, --steps or --batch: take another --out')
    runs = study_runs(name, a, device)
    seeds = [t.seed for _, t in next(iter(runs.values()))]
    left = {str(f): (pretrain, (f, t)) for made in runs.values() for f, t in made if begun(f, t).get('step') != t.steps}
    print(f'{name}: {part.question} {len(part.arms)} arms, {len(seeds)} seeds; {len(left)} of {sum(map(len, runs.values()))} runs to make', flush=True)
    if a.estimate:
        seconds = 0.
        for made in runs.values():
            _, t = made[0]
            seconds += price(t, Dataset(t.data), device)[0] * t.steps * sum(str(f) in left for f, _ in made)
        print(f'  {seconds / 60:.0f} core-minutes of pretraining, and about as much for the {len(part.looks)} tables')
        return
    run_all(left, a, f'{name}: pretraining')
    folders, ways = {arm: [str(f) for f, _ in made] for arm, made in runs.items()}, {}
    for data, mode, count in part.looks:
        ways.setdefault(data, []).append((mode, count))
    looks = {f'{data}, {arm}': (look_ahead, ({arm: folders[arm]}, data, ways[data], a.device)) for data in ways for arm in folders}
    run_all(looks, a, f'{name}: looking')
    rows, pairs = [], []
    for data in ways:
        for (mode, count), (t, arms, scores) in look(folders, data, ways[data], a.device).items():
            shared = dict(part=name, **how, data=data, task=t.names[0], mode=mode, labels=count, n=len(t.test), patients=t.patients or '',
                          classes=len(t.parts[t.names[0]]), seeds=' '.join(map(str, seeds)), metric=f'macro {next(iter(scores.values())).main}')
            rows += [shared | arm_row(arms[n], s, scores.get(arms[n].reference), runs.get(n)) for n, s in scores.items()]
            gains = {n: combined([scores[n], scores[arms[n].reference]], lambda v: v[0] - v[1]) for n in part.arms}
            for family, levels in (contrasts(part, scores) | contrasts(part, gains, 'gain by ')).items():
                pairs += [shared | dict(family=family) | r for r in compared(levels)]
    write_csv(table, rows)
    write_csv(Path(a.out, f'study_{name}_pairs.csv'), pairs)
    print(f'  {table}, study_{name}_pairs.csv: {len(rows)} arms, {len(pairs)} comparisons; python scaling.py claims {a.out}', flush=True)


def arm_row(arm, score, reference, runs):
    """One line of study_*_arms.csv: an arm under one look. reference and runs: None of random encoders and of training from scratch."""
    mean, low, high = score.interval()
    minus = score.minus(reference) if reference else ()
    own, rate = (runs[0][1].steps, runs[0][1].lr) if runs else ('', '')
    points = score.point[score.main].mean(1)                     # one for each seed
    return dict(arm=arm.name, own_steps=own, lr=rate, mean=mean, low=low, high=high, minus_random=' '.join(f'{v:.4f}' for v in minus),
                points=' '.join(f'{v:.4f}' for v in points))


# what a paper says, the part and family of comparisons that ask, the level that is said to win (close: to equal), and over which
Claim = namedtuple('Claim', 'text part family winner others kind')
CLAIMS = (Claim('CPC is the best objective, on S4', 'objectives', 'objective', 'cpc', OBJECTIVES_5[1:], 'better'),
          Claim('CPC is the best objective, on S4, equal FLOPs', 'flops', 'objective, s4', 'cpc', OBJECTIVES_5[1:], 'better'),
          Claim('CPC is the best objective, mean of backbones', 'grid', 'objective, mean', 'cpc', OBJECTIVES_5[1:], 'better'),
          Claim('CPC is the best objective, on S4, other modes', 'modes', 'objective, s4', 'cpc', OBJECTIVES_5[1:], 'better'),
          Claim('CPC is the best objective, on S4, real records, filtered', 'filtered', 'objective', 'cpc', OBJECTIVES_5[1:], 'better'),
          Claim('JEPA comes close to CPC, on S4', 'objectives', 'objective', 'cpc', ('jepa',), 'close'),
          Claim('S4 beats Transformer and CNN, mean of objectives', 'grid', 'backbone, mean', 's4', BACKBONES_3[1:], 'better'),
          Claim('the same of what pretraining adds to random weights', 'grid', 'gain by backbone, mean', 's4', BACKBONES_3[1:], 'better'),
          Claim('S4 beats Transformer and CNN, by CPC, other modes', 'modes', 'backbone, cpc', 's4', BACKBONES_3[1:], 'better'),
          Claim('S4 beats Transformer and CNN, by CPC, equal FLOPs', 'flops', 'backbone, cpc', 's4', BACKBONES_3[1:], 'better'),
          Claim('the same of what CPC adds to random weights, equal FLOPs', 'flops', 'gain by backbone, cpc', 's4', BACKBONES_3[1:], 'better'),
          Claim('all pretraining records help over 100, mean of objectives', 'records', 'records, mean', 'all', ('100',), 'better'),
          Claim('6 layers of S4 are better than 4, mean of CPC and JEPA', 'depth', 'layers, mean', '6', ('4',), 'better'),
          Claim('any share hidden from 5 to 75 % will do (MAE)', 'masking', 'variant', 'hide50', ('hide05', 'hide25', 'hide75'), 'close'),
          Claim('fluctuations are a better target than millivolts (MAE)', 'masking', 'variant', 'hide50', ('raw',), 'better'),
          Claim('four times the schedule helps (MAE)', 'masking', 'variant', 'long', ('hide50',), 'better'),
          Claim('our own: real records are better to pretrain on than as many synthetic ones', 'pool', 'source, mean', 'pool', ('synthetic',), 'better'))


def turned(row):
    """A comparison of a with b as one of b with a."""
    verdict = {'better': 'worse', 'worse': 'better'}.get(row['verdict'], row['verdict'])
    return row | dict(a=row['b'], b=row['a'], difference=-row['difference'], low=-row['high'], high=-row['low'], verdict=verdict)


def verdict(claim, rows):
    """(row that decides, the claimed winner first; agrees, disagrees or can't tell) of the rows of one look.

    better: agrees if the winner beats every other (Holm's p under .05 within the family), disagrees if it loses to one or equals one within
    the margin; close: agrees if it equals all within the margin, disagrees if it differs from one by Holm's p. Under three seeds nothing can
    be told. Of the rows that decide, the one that speaks most against the claim."""
    mine = [r for r in rows if r['a'] == claim.winner and r['b'] in claim.others]
    mine += [turned(r) for r in rows if r['b'] == claim.winner and r['a'] in claim.others]
    word = lambda r: r['verdict'].split(' ')[0]                  # equivalent within 0.005
    wanted, against = ({'better'}, {'worse', 'equivalent'}) if claim.kind == 'better' else ({'equivalent'}, {'better', 'worse'})
    decide, said = mine, 'agrees'
    if any(word(r) in against for r in mine):
        decide, said = [r for r in mine if word(r) in against], 'disagrees'
    elif any(word(r) not in wanted for r in mine):
        decide, said = [r for r in mine if word(r) not in wanted], "can't tell"
    sign = -1 if rows[0]['metric'].endswith('MAE') else 1
    least = min(decide, key=lambda r: sign * r['difference'] if claim.kind == 'better' else -abs(r['difference']))
    return least, said if len(rows[0]['seeds'].split()) > 2 else "can't tell"


def ranked(rows):
    """The levels of a family in one look, each with its rank as `compare` gives it: 1 + how many are better."""
    beaten = [r['b'] if r['verdict'] == 'better' else r['a'] for r in rows if r['verdict'] in ('better', 'worse')]
    ranks = {level: 1 + beaten.count(level) for level in dict.fromkeys(r[k] for k in 'ab' for r in rows)}
    return ', '.join(f'{level} {ranks[level]}' for level in sorted(ranks, key=ranks.get))


def look_of(row):
    """(data, mode, labels): which look a row of the study's tables is of."""
    return row['data'], row['mode'], row['labels']


def claims_command(a):
    """The papers' claims with their verdicts, as far as the study's tables in a folder go; and its figures."""
    numbers = ('n', 'difference', 'low', 'high', 'p_holm', 'detectable', 'mean')
    tables = {f.stem: [r | {k: float(r[k]) for k in numbers if r.get(k)} for r in rows_in(f)] for f in sorted(Path(a.runs).glob('study_*_*.csv'))}
    found = []
    for claim in CLAIMS:
        rows = [r for r in tables.get(f'study_{claim.part}_pairs', ()) if r['family'] == claim.family]
        if not {claim.winner, *claim.others} <= {r[k] for r in rows for k in 'ab'}:
            continue
        for at in dict.fromkeys(map(look_of, rows)):
            mine = [r for r in rows if look_of(r) == at]
            least, said = verdict(claim, mine)
            found.append(dict(claim=claim.text, data=at[0], mode=at[1], labels=at[2], steps=least['steps'], n=int(least['n']),
                              seeds=len(least['seeds'].split()), against=f'{least["a"]} - {least["b"]}',
                              **{k: least[k] for k in ('difference', 'low', 'high', 'detectable')}, verdict=said,
                              part=claim.part, family=claim.family, ranks=ranked(mine)))
    if not found:
        raise Stop(f'no study_*_pairs.csv in {a.runs}: make them with python scaling.py study')
    out = Path(a.out or 'out')
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / 'claims.csv', found)
    print('| claim | data, mode, labels | records, seeds | difference that decides [95 %] | would be found from | verdict |\n|---|---|---|---|---|---|')
    for i, r in enumerate(found):
        again = i and found[i - 1]['claim'] == r['claim']
        print(f'| {"" if again else r["claim"]} | {", ".join(look_of(r))} | {r["n"]:,}, {r["seeds"]} | {r["against"]} '
              f'{r["difference"]:+.3f} [{r["low"]:+.3f}, {r["high"]:+.3f}] | {r["detectable"]:.3f} | {r["verdict"]} |')
    families = dict.fromkeys((f'{r["part"]}: {r["family"]}', ', '.join(look_of(r)), r['ranks']) for r in found)
    apart = [f for f in families if re.search(r' [2-9](,|$)', f[2])]
    print('\n| part: what is compared | data, mode, labels | ranks: 1 + how many are better |\n|---|---|---|')
    for family in apart:
        print('| ' + ' | '.join(family) + ' |')
    print(f'in {len(families) - len(apart)} of {len(families)} all are ranked 1, since nothing is told apart')
    draw_claims(found, out / 'claims.png')
    parts = [name for name in STUDY if f'study_{name}_arms' in tables]
    for name in parts:
        draw_part(tables[f'study_{name}_arms'], out / f'study_{name}.png')
    print(f'\nin {out}/: claims.csv, claims.png, ' + ', '.join(f'study_{name}.png' for name in parts))


def draw_claims(found, path):
    """Every claim's deciding difference with its interval, and the margin of equivalence."""
    fig, ax = figure(figsize=(9, .24 * len(found) + 1.3), layout='constrained')
    colours = {'agrees': 'C2', 'disagrees': 'C3', "can't tell": 'C7'}
    ax.axvspan(-.005, .005, color='C0', alpha=.15, lw=0)
    ax.axvline(0, color='k', lw=.8)
    for i, r in enumerate(reversed(found)):
        ax.plot([r['low'], r['high']], [i, i], color=colours[r['verdict']])
        ax.plot(r['difference'], i, 'o', ms=4, color=colours[r['verdict']])
    ax.set_yticks(range(len(found)), [f'{r["claim"]}: {", ".join(look_of(r))}' for r in reversed(found)], fontsize=6)
    for said, colour in colours.items():
        ax.plot([], [], 'o-', color=colour, label=said)
    ax.legend(fontsize=7, loc='upper right')
    ax.set_ylim(-.7, len(found) - .3)
    fig.supxlabel('the difference that decides, the claimed winner minus the other, in macro AUROC; shaded: it would not matter', size=9)
    fig.savefig(path, dpi=120)


def draw_part(rows, path):
    """Macro AUROC of every arm of a part in each look, random encoders as bars."""
    looks = list(dict.fromkeys(map(look_of, rows)))
    there = {r['arm'] for r in rows}
    arms = [n for n in STUDY[rows[0]['part']].arms if n in there][::-1]
    last = list(dict.fromkeys(n.partition(' ')[2] for n in reversed(arms)))                  # levels of the second factor, if there is one
    fig, axes = figure(1, len(looks), figsize=(2.6 * len(looks) + 1, .27 * len(arms) + 1.2), layout='constrained', sharey=True, squeeze=False)
    for ax, at in zip(axes[0], looks):
        mine = {r['arm']: r for r in rows if look_of(r) == at}
        for i, arm in enumerate(arms):
            r, colour = mine[arm], f'C{last.index(arm.partition(" ")[2])}'
            ax.plot([r['low'], r['high']], [i, i], color=colour)
            ax.plot(r['mean'], i, 'o', ms=4, color=colour)
            if r['minus_random']:
                ax.plot(r['mean'] - float(r['minus_random'].split()[0]), i, '|', ms=9, color='k')
        ax.set_title(', '.join(at), size=8)
        ax.locator_params(axis='x', nbins=4)
    axes[0, 0].set_yticks(range(len(arms)), arms)
    axes[0, 0].set_ylim(-.6, len(arms) - .4)
    fig.supxlabel('macro AUROC; bar: random encoders of the same shape', size=9)
    fig.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def number_or_all(text):
    """A flag's count of records, or the word all."""
    return text if text == 'all' else int(text)


def sweep_flags(p):
    """The flags of sweep."""
    p.add_argument('kind', choices=list(KINDS), help='; '.join(f'{k}: {v}' for k, v in KINDS.items()))
    p.add_argument('--family', nargs='+', default=['s4'], choices=list(SIZES), help='backbones')
    p.add_argument('--objective', nargs='+', default=['cpc', 'supervised'], choices=list(OBJECTIVES))
    p.add_argument('--size', nargs='+', help="sizes, ascending (default: the five smallest of the family's ladder, see python models.py)")
    p.add_argument('--records', nargs='+', type=number_or_all, default=[32, 100, 320, 1000, 'all'], help='numbers of pretraining (finetune: labelled) records')
    p.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='of corners and centre; all other points take the first')
    p.add_argument('--data', default='synthetic', help='prepared dataset to pretrain on')
    p.add_argument('--ood', nargs='*', default=['shifted:findings', 'sample:super'], metavar='DATA:TASK',
                   help='where linear probes are fitted; finetune takes the first')
    p.add_argument('--fixed', choices=['steps', 'epochs'], default='steps', help='what is the same for every number of records')
    p.add_argument('--steps', type=int, default=800, help='at most, if steps are fixed')
    p.add_argument('--epochs', type=float, default=20, help='at most, if epochs are fixed')
    p.add_argument('--batch', type=int, default=32)
    p.add_argument('--schedule', choices=['cosine', 'constant'], default='constant', help='constant: no evaluation is more annealed than another')
    p.add_argument('--patience', type=int, default=3,
                   help='evaluations, a factor of sqrt 2 in steps apart, without a better validation loss before a run stops')
    p.add_argument('--lr', type=float, help='one rate for all (default: the best of three for each size)')
    p.add_argument('--lr-steps', type=int, default=150, help='of the runs that choose the rate')
    p.add_argument('--labels', default='findings+tail', help='labels: the label sets to draw from')
    p.add_argument('--tokenizer', help='beats: run folder of a vqbeat')
    p.add_argument('--jobs', type=int, help='runs at a time (default: one per thread that torch has, 1 on CUDA)')
    p.add_argument('--estimate', action='store_true', help='print what it would cost, train nothing')
    p.add_argument('--device')
    p.add_argument('--out', default='out/scaling')


def study_flags(p):
    """The flags of study."""
    p.add_argument('part', nargs='*', help='default: all; ' + '; '.join(f'{k}: {v.question}' for k, v in STUDY.items()))
    p.add_argument('--seeds', nargs='+', type=int, help='of pretraining (default: 0 to 5 for objectives, else 0 1 2)')
    p.add_argument('--data', default='synthetic', help='to pretrain on where a part does not say; on a GPU synthetic@1000000')
    p.add_argument('--size', default='tiny', choices=['tiny', 'small', 'base'])
    p.add_argument('--steps', type=int, default=300, help='of pretraining')
    p.add_argument('--batch', type=int, default=32)
    p.add_argument('--jobs', type=int, help='processes (default: one per thread that torch has, 1 on CUDA)')
    p.add_argument('--estimate', action='store_true', help='print what it would cost, make nothing')
    p.add_argument('--device')
    p.add_argument('--out', default='out/study')


def huber_delta(text):
    """The flag --delta: a number above 0, or mad."""
    if text == 'mad':
        return text
    if not 0 < float(text) < 1e6:
        raise argparse.ArgumentTypeError('must be mad or a positive number')
    return float(text)


def table_flags(p, name):
    """The flags of the commands that read tables, by name, and of simulate."""
    p.add_argument('--out', help='folder to write to (default: beside the CSV of runs; out/published; out)')
    if name == 'claims':
        p.add_argument('runs', nargs='?', default='assets/results', help="folder of the study's tables")
    elif name not in ('simulate', 'published'):
        p.add_argument('runs', help='CSV of runs, one row per evaluation')
    if name in ('fit', 'allocate', 'transfer', 'overfit', 'labels', 'winners'):
        p.add_argument('--loss', nargs='+', help='columns of losses (default: id_test and every ood_*_test)')
    if name in ('fit', 'allocate', 'transfer', 'overfit', 'simulate'):
        p.add_argument('--resamples', type=int, default=600, help='of the runs, for intervals')
        p.add_argument('--delta', type=huber_delta, default=1e-3,
                       help="of Huber's loss of log residuals, or mad: 1.345 normalised median absolute deviations")
        p.add_argument('--seed', type=int, default=0)
    if name == 'fit':
        p.add_argument('--axis', choices=['joint', 'N', 'D'], default='joint', help='N or D: one exponent alone')
    if name == 'overfit':
        p.add_argument('--tolerance', type=float, nargs='+', default=[.1], help='shares of loss that too few records may cost')
    if name == 'simulate':
        p.add_argument('--studies', type=int, default=200)
        p.add_argument('--levels', type=int, default=5, help='of N and of D')
        p.add_argument('--seeds', type=int, default=3, help='runs per cell')
        p.add_argument('--noise', type=float, default=.01, help='standard deviation of the log loss between runs')
        p.add_argument('--truth', type=float, nargs=5, default=[.11, 6, 3, .35, .22], metavar=('E', 'A', 'B', 'alpha', 'beta'))


COMMANDS = {'sweep': sweep, 'study': study, 'claims': claims_command, 'fit': fit_command, 'allocate': allocate_command, 'transfer': transfer_command,
            'overfit': overfit_command, 'labels': labels_command, 'winners': winners_command, 'loss-vs-error': error_command,
            'simulate': simulate_command, 'published': published_command}
LIMITS = dict(resamples=(200, 100000), studies=(1, 100000), levels=(3, 50), noise=(1e-6, 1), seed=(0, 2 ** 31), tolerance=(1e-6, 1), records=(1, 1e12),
              steps=(1, 1e9), epochs=(1e-3, 1e6), batch=(1, 65536), lr=(1e-9, 10), lr_steps=(1, 1e9), patience=(1, 1000), jobs=(1, 1024))


def parse(argv=None):
    """The arguments, checked."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest='command', metavar='COMMAND')
    for name, command in COMMANDS.items():
        q = sub.add_parser(name, help=command.__doc__.split('\n')[0].replace('%', '%%'), description=command.__doc__)
        if name == 'sweep':
            sweep_flags(q)
        elif name == 'study':
            study_flags(q)
        else:
            table_flags(q, name)
    a = p.parse_args(argv)
    if not a.command:
        return parse(['published'])
    check(a)
    return a


def check(a):
    """Raises Stop on arguments out of bounds, and where --out cannot be written to."""
    seeds = (1, 100) if a.command == 'simulate' else (0, 2 ** 31)                            # there a number of them
    for name, (low, high) in (LIMITS | dict(seeds=seeds)).items():
        given = getattr(a, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value not in (None, 'all') and not low <= value <= high:
                raise Stop(f'--{name.replace("_", "-")} {value} must lie between {low:g} and {high:g}')
    if a.command == 'simulate':
        E, A, B, *exponents = a.truth
        if not (0 <= E < math.inf and 0 < A < math.inf and 0 < B < math.inf and all(LOW < v < HIGH for v in exponents)):
            raise Stop(f'--truth takes E of 0 or more, A and B above 0, and alpha and beta between {LOW:g} and {HIGH:g}')
    out = Path(a.out or '.').absolute()
    there = next(p for p in (out, *out.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise Stop(f'--out {out}: {there} is no folder that can be written to')
    if a.command == 'sweep':
        for family, size in itertools.product(a.family, a.size or ()):
            config_of(family, size)
        if not a.ood and (a.kind == 'finetune' or a.kind != 'labels' and set(MOVING) & set(a.objective)):
            raise Stop(f'--ood names no data: by them finetune, and {", ".join(MOVING)}, whose targets move, are judged')


def main(argv=None):
    """The command line: see the top of the file."""
    a, threads = parse(argv), torch.get_num_threads()
    try:
        COMMANDS[a.command](a)
    finally:
        torch.set_num_threads(threads)                           # of which `share_threads` may have taken a part


if __name__ == '__main__':
    run_script(main)
