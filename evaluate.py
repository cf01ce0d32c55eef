"""What is a pretrained encoder worth? Probes, fine-tuning and training from scratch, each number with its interval.

    python evaluate.py                                   # the newest run: synthetic held-out records, then the 500 real ones
    python evaluate.py out/a0 out/a1 out/a2              # runs that differ in their seeds only are averaged, and intervals include it
    python evaluate.py out/a? out/b? --mode linear frozen finetune        # several pretrainings: one table, paired differences, ranks
    python evaluate.py out/a? --task ptbxl_all ptbxl_diag --protocol released          # tasks of the papers by name
    python evaluate.py --list                            # every task, whether its data is prepared, the command that prepares it
    python evaluate.py out/a? --mode finetune --ablate   # what each part of post-training adds to plain fine-tuning
    python evaluate.py out/a? --analyse robustness       # noise, missing and swapped leads, another rate, age and sex

Modes, as in arXiv 2605.12241: linear (mean pooling, frozen encoder), frozen (attention pooling, frozen encoder), finetune (everything
learns), scratch; and training-free knn and prototypes. Beside each pretraining stand random encoders of its shape, whose BatchNorm has
seen data. Finished scores are kept in out/scores, so a command that was stopped goes on where it was.
"""
import argparse, copy, csv, functools, hashlib, itertools, json, math, shlex, shutil, sys, tempfile, textwrap, time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.signal
import scipy.sparse
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import HERE, TASKS, Contract, Dataset, Stop, contract_of, make_parser, overlap, read_seen, run_script, stratify
from models import (AttentionPool, Config, Encoder, MeanPool, autocast, calibrate_batchnorm, learning_rate, load, load_encoder, mean_pool,
                    parameter_groups, pick_device, set_regularisation, to_device)


def figure(*args, **kwargs):
    """A matplotlib figure that needs no screen: (fig, axes) of plt.subplots."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(*args, **kwargs)
    plt.close(fig)                                               # it can still be drawn on and saved, and goes when the caller lets go
    return fig, axes


# ---------------------------------------------------------------------------------------------------------------------
# metrics: (score (n, K), y (n, K) with NaN for unknown, group, weight (R, n)) -> (R, K), NaN for a class without both labels

def cells(score, y, group, weight):
    """(k, P, N, first cell of each group) of each class k with both labels: the weight of positives and negatives (cells, R) at each score,
    from the lowest, group after group. Scores with negatives alone that follow each other share a cell: few positives make few cells."""
    weight = np.ascontiguousarray((np.ones((1, len(y))) if weight is None else weight).T)    # (n, R)
    group = np.zeros(len(y), int) if group is None else group
    for k in range(y.shape[1]):
        known = np.flatnonzero(np.isfinite(y[:, k]))
        known = known[np.lexsort((score[known, k], group[known]))]
        s, g, positive = score[known, k], group[known], y[known, k] > 0
        if not positive.any() or positive.all():
            continue
        new_group = np.r_[True, g[1:] != g[:-1]]
        first = np.flatnonzero(new_group | np.r_[True, s[1:] != s[:-1]])                     # of each score
        has = np.logical_or.reduceat(positive, first)
        first = first[new_group[first] | has | np.r_[False, has[:-1]]]                       # of each cell
        ends = np.r_[first, len(s)]

        def total(mine):                                         # a row for each cell, with 1 in the columns of its records
            table = scipy.sparse.csr_array((np.ones(mine.sum()), known[mine], np.r_[0, np.cumsum(mine)][ends]), (len(first), len(y)))
            return table @ weight
        yield k, total(positive), total(~positive), np.flatnonzero(new_group[first])


def auroc(score, y, group=None, weight=None):
    """AUROC of each class, by pair counting: the share of (positive, negative) pairs ranked rightly, ties counting half.

    score, y (n, K), NaN in y for unknown; group (n,): only pairs within a group count (folds, whose scores come from different
    probes); weight (R, n): R resamples as counts per record. Returns (R, K), NaN for a class without both labels in any group.
    """
    out = np.full((1 if weight is None else len(weight), y.shape[1]), np.nan)
    for k, P, N, starts in cells(score, y, group, weight):
        below = np.cumsum(N, 0) - N / 2                          # negatives at a tie count half
        others = (below - N / 2)[starts]                         # those of the groups before do not count
        p, n = np.add.reduceat(P, starts), np.add.reduceat(N, starts)
        with np.errstate(invalid='ignore'):
            out[:, k] = (np.einsum('cr,cr->r', P, below) - (p * others).sum(0)) / (p * n).sum(0)
    return out


def average_precision(score, y, group=None, weight=None):
    """Area under precision and recall, as the sum of precision over steps of recall; equal scores make one step. Between groups scores
    are compared by their rank within the group."""
    out = np.full((1 if weight is None else len(weight), y.shape[1]), np.nan)
    if group is not None:
        score = score.copy()
        for g, k in itertools.product(np.unique(group), range(y.shape[1])):
            known = (group == g) & np.isfinite(y[:, k])
            score[known, k] = scipy.stats.rankdata(score[known, k]) / known.sum()
    for k, P, N, _ in cells(score, y, None, weight):
        found, asked = (np.cumsum(x[::-1], 0)[::-1] for x in (P, P + N))                     # at this score or above
        with np.errstate(invalid='ignore'):
            out[:, k] = (P * np.where(asked > 0, found / asked, 0.)).sum(0) / found[0]
    return out


def f1(margin, y, group=None, weight=None):
    """F1 of each class where a margin (n, K) above 0, the score less its threshold, says yes."""
    weight = np.ones((1, len(y))) if weight is None else weight
    known, yes, true = np.isfinite(y), margin > 0, y > 0
    hits, asked, there = (weight @ (m & known).astype(float) for m in (yes & true, yes, true))
    both = (true & known).any(0) & (~true & known).any(0)
    with np.errstate(invalid='ignore'):
        return np.where(both & (there > 0), 2 * hits / (asked + there), np.nan)


def mae(score, y, group=None, weight=None):
    """Mean absolute error of each target, in the unit of y."""
    weight = np.ones((1, len(y))) if weight is None else weight
    known = np.isfinite(y)
    with np.errstate(invalid='ignore'):
        return weight @ np.where(known, np.abs(score - y), 0) / (weight @ known.astype(float))


def thresholds(score, y):
    """For each class the score above which saying yes gives the best F1 on these records; infinite where no positive is known."""
    out = np.full(score.shape[1], np.inf)
    for k in range(score.shape[1]):
        known = np.isfinite(y[:, k])
        s, true = score[known, k], y[known, k] > 0
        if true.any():
            order = np.argsort(-s, kind='stable')
            s, hits = s[order], np.cumsum(true[order])
            value = np.where(np.r_[s[1:] != s[:-1], True], 2 * hits / (np.arange(1, len(s) + 1) + true.sum()), 0)
            best = value.argmax()
            out[k] = (s[best] + s[best + 1]) / 2 if best + 1 < len(s) else s[best] - 1e-9
    return out


# ---------------------------------------------------------------------------------------------------------------------
# intervals, differences, ranks

WORK = 1e10                                                      # resamples x records x columns that a Score may take: a minute or two


def resample_patients(patient, resamples=1000, bayesian=False):
    """Bootstrap over patients: how often each record counts in each resample, (R, n). bayesian: with weights drawn from a flat Dirichlet
    (Rubin 1981), under which no record, and so no rare class, ever vanishes."""
    names, index = np.unique(patient, return_inverse=True)
    return patient_weights(len(names), resamples, bayesian)[:, index].astype(float)


@functools.lru_cache(2)
def patient_weights(n, resamples, bayesian):
    """Weights of n patients (resamples, n), kept: with tens of thousands they take seconds."""
    rng = np.random.default_rng(0)
    return n * rng.dirichlet(np.ones(n), resamples) if bayesian else rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.int16)


def macro(table, empty=None):
    """Mean over the classes that have both labels: (R, K) -> (R,). empty: what the others count as; .5 is the convention of the
    benchmark of 2509.25095, which pulls macro AUROC and its interval down."""
    known = np.isfinite(table) if empty is None else np.ones(table.shape, bool)
    with np.errstate(invalid='ignore'):
        return np.where(np.isfinite(table), table, empty or 0.).sum(1) / known.sum(1)


def interval(points, boot, level=.95):
    """(mean, low, high) over runs. points (S, draws): macro value per seed and label draw; boot (R,): bootstrap of their mean over patients,
    NaN where no class had both labels. Independent sources of variance add in squares: patients (percentiles; beyond the outermost ten
    resamples the tails are taken for normal), seeds and label draws (Student t over the means of each, where there is more than one)."""
    mean, squares = points.mean(), 0.
    for means in (points.mean(1), points.mean(0)):
        if len(means) > 1:
            squares += (scipy.stats.t.ppf(.5 + level / 2, len(means) - 1) * means.std(ddof=1)) ** 2 / len(means)
    reach = min(level, 1 - 20 / len(boot))                       # ten resamples lie beyond on either side
    stretch = scipy.stats.norm.ppf(.5 + level / 2) / scipy.stats.norm.ppf(.5 + reach / 2) if reach < level else 1.
    low, high = (np.nanpercentile(boot, [50 - 50 * reach, 50 + 50 * reach]) - mean) * stretch
    grown = lambda d: min(d, 0.) + np.hypot(max(d, 0.), squares ** .5)                       # a percentile may lie on the mean's other side
    return mean, mean - grown(-low), mean + grown(high)


def p_value(points, boot):
    """Two-sided p: 1 - the highest level whose interval excludes 0, by bisection of log p; 1e-9 at least."""
    excludes = lambda p: np.prod(interval(points, boot, 1 - p)[1:]) > 0
    low, high = math.log(1e-9), 0.
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if excludes(math.exp(middle)) else (middle, high)
    return math.exp(high)


def holm(p):
    """Holm's adjusted p values (1979): the family-wise error of rejecting those under alpha is at most alpha."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(stepped, 1)[np.argsort(order)]


class Score:
    """Test predictions on the same records, as macro metrics. outputs: list over seeds of lists over label draws of (n, K); margins: the
    same, scores less their thresholds, for F1; numbers (K,): which columns are numbers, scored by MAE. Every Score of the same records
    shares their resamples, and draw d is the same labelled records for every seed, so differences are paired. 1,000 resamples, fewer
    (200 at least) where that would be more than WORK."""

    def __init__(self, outputs, y, patient, group=None, margins=None, numbers=None, bayesian=False, empty=None):
        weight = resample_patients(patient, int(np.clip(WORK / y.size, 200, 1000)), bayesian=bayesian)
        weights = np.array_split(weight, -(-weight.size // 20_000_000))                      # a few hundred MB at once
        numbers = np.zeros(y.shape[1], bool) if numbers is None else numbers
        none = None if empty is None else 0.                     # AUPRC and F1 of a class without both labels, where it counts
        self.point, self.boot, self.per_class = {}, {}, {}       # by metric: (S, draws), (R,), (K,)
        for name, metric, values, mine, fill in (('AUROC', auroc, outputs, ~numbers, empty), ('AUPRC', average_precision, outputs, ~numbers, none),
                                                 ('F1', f1, margins, ~numbers, none), ('MAE', mae, outputs, numbers, None)):
            if values is None or not mine.any():
                continue
            value = lambda s, w=None: metric(s[:, mine], y[:, mine], group, w)
            tables = [[value(s)[0] for s in draws] for draws in values]
            self.point[name] = np.array([[macro(t[None], fill)[0] for t in draws] for draws in tables])
            self.boot[name] = np.mean([np.concatenate([macro(value(s, w), fill) for w in weights]) for draws in values for s in draws], 0)
            self.per_class[name] = np.full(y.shape[1], np.nan)
            self.per_class[name][mine] = np.mean([t for draws in tables for t in draws], 0)
        self.main = next(iter(self.point))

    def interval(self, metric=None):
        """(mean, low, high), within what the metric can be: Student's t may reach beyond."""
        m = metric or self.main
        return tuple(np.clip(interval(self.point[m], self.boot[m]), 0, np.inf if m == 'MAE' else 1))

    def minus(self, other, metric=None):
        return interval(*self.difference(other, metric))

    def difference(self, other, metric=None):
        m = metric or self.main
        return self.point[m] - other.point[m], self.boot[m] - other.boot[m]


def compare(scores, margin=.005):
    """All pairs of a dict {name: Score}: rows with the paired difference, its 95 % interval, p, Holm's p over all pairs, and a verdict:
    equivalent (the 90 % interval lies within +-margin: two one-sided tests), however surely it is not 0; else better or worse (Holm's p
    under .05); else can't tell. And ranks: 1 + how many are better, so that models nobody can tell apart, or need to, tie."""
    rows, alike, sign = [], [], -1 if next(iter(scores.values())).main == 'MAE' else 1
    for (a, A), (b, B) in itertools.combinations(scores.items(), 2):
        points, boot = A.difference(B)
        difference, low, high = interval(points, boot)
        rows.append(dict(a=a, b=b, difference=difference, low=low, high=high, p=p_value(points, boot)))
        _, low, high = interval(points, boot, .9)
        alike.append(-margin < low and high < margin)
    beaten = []
    for row, equivalent, p in zip(rows, alike, holm([r['p'] for r in rows])):
        row |= dict(p_holm=p, verdict="can't tell")
        if equivalent:
            row['verdict'] = f'equivalent within {margin:g}'
        elif p < .05:
            better = sign * row['difference'] > 0
            row['verdict'] = 'better' if better else 'worse'
            beaten.append(row['b'] if better else row['a'])
    return rows, {name: 1 + beaten.count(name) for name in scores}


# ---------------------------------------------------------------------------------------------------------------------
# what an encoder makes of records: embeddings, and tokens kept for heads on a frozen encoder

def batches(ds, owner, start, samples, device, name):
    """The crops of records `owner` from `start` on, in order: (slice of them, their batch)."""
    size = max(1, 128 * 600 // samples)                          # crops at once: what a processor's cache likes
    for i in tqdm(range(0, len(owner), size), desc=name, leave=False, disable=None):
        mine = slice(i, i + size)
        yield mine, to_device(ds.collate(owner[mine], start[mine], samples), device)


@torch.no_grad()
def per_record(encode, ds, rows, samples, device, name='predicting', first=False):
    """Mean over each record's consecutive crops of encode(batch) (B, K): (len(rows), K). first: its first crop only."""
    assert len(set(rows)) == len(rows), 'a record is asked for twice'
    owner, start = (rows, np.zeros(len(rows), int)) if first else ds.crops(rows, samples)
    out = []
    for _, batch in batches(ds, owner, start, samples, device, name):
        with autocast(device):
            out.append(encode(batch).double().cpu())
    out, place = torch.cat(out), {row: i for i, row in enumerate(rows)}
    at = torch.tensor([place[row] for row in owner])
    total = torch.zeros(len(rows), out.shape[1], dtype=torch.float64).index_add_(0, at, out)
    return (total / torch.bincount(at, minlength=len(rows))[:, None]).numpy()


def embed(encoder, ds, rows, samples, device, name='embedding', first=False):
    """Mean over tokens and crops of the encoder's output: (len(rows), D)."""
    encoder = encoder.to(device).eval()
    return per_record(lambda batch: mean_pool(*encoder(batch)), ds, rows, samples, device, name, first)


class Tokens:
    """A frozen encoder's tokens of all consecutive crops of `rows`, made in one pass and kept in half precision in a file without a name
    that vanishes with the process. Serves `per_record` and `fit` in the Dataset's place: its batches hold h (B, L, D) and pad instead
    of x. pooled: only the mean over tokens, L = 1. mean and square: of each record's tokens, (len(ds), D)."""

    @torch.no_grad()
    def __init__(self, encoder, ds, rows, samples, device, pooled=False, dtype=np.float16):
        encoder, self.crops, self.length = encoder.to(device).eval(), ds.crops, ds.length
        owner, start = ds.crops(rows, samples)
        self.at = {crop: i for i, crop in enumerate(zip(owner.tolist(), start.tolist()))}    # where a crop's tokens lie
        self.h, self.count = None, np.zeros(len(owner), int)
        self.mean, self.square = np.zeros((2, len(ds.length), encoder.dim))                  # the first is what `embed` gives
        for mine, batch in batches(ds, owner, start, samples, device, 'tokens'):
            with autocast(device):
                h, pad = encoder(batch)
                mean = mean_pool(h, pad)
                square = mean_pool(h.float() ** 2, pad)
            crops = (ds.length[owner[mine]] // samples)[:, None]
            np.add.at(self.mean, owner[mine], mean.double().cpu().numpy() / crops)
            np.add.at(self.square, owner[mine], square.double().cpu().numpy() / crops)
            if pooled:
                h, pad = mean[:, None], None
            if self.h is None:
                longest = h.shape[1] if pad is None else 1 + 12 * encoder.stem.most          # beats: as many as there is room for
                shape, folder, self.file = (len(owner), longest, h.shape[2]), tempfile.gettempdir(), tempfile.TemporaryFile()
                need, free = math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
                if need > .9 * free:
                    raise Stop(f'{ds.name}: the tokens take {need / 1e9:,.1f} GB, {folder} has {free / 1e9:,.1f}: set TMPDIR to a larger disk, '
                               'or take --protocol released, which keeps none')
                self.h = np.memmap(self.file, dtype, 'w+', shape=shape)
            for i, tokens in enumerate(h.float().cpu().numpy()):
                tokens = tokens if pad is None else tokens[~pad[i].cpu().numpy()]
                self.h[mine.start + i, :len(tokens)] = tokens
                self.count[mine.start + i] = len(tokens)

    def collate(self, rows, starts, samples):
        at = [self.at[row, start] for row, start in zip(rows.tolist(), starts.tolist())]
        count = torch.from_numpy(self.count[at])
        h = torch.from_numpy(self.h[at][:, :count.max()]).float()
        return dict(h=h, pad=torch.arange(h.shape[1]) >= count[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# probes without a training loop: each returns predict(rows) -> (len(rows), K), and its scores on the validation records

L2 = (.3, .1, .03, .01, 3e-3, 1e-3, 3e-4)


def logistic(X, Y, l2):
    """Converged multi-label logistic regression: minimises mean BCE over known labels, summed over classes, + l2 / 2 |W|^2.
    X (n, D) standardised, Y (n, K) with NaN. Returns (D + 1, K), the bias last.

    L-BFGS in the principal axes of X, each axis and class scaled by its curvature: the same minimum in far fewer steps."""
    X, Y = torch.from_numpy(X), torch.from_numpy(Y).double()
    known = Y.isfinite()
    T, share = torch.where(known, Y, 0.), known / known.sum(0).clamp(min=1)                  # an unknown label has no share
    rate = (T * share).sum(0).clamp(1e-3, 1 - 1e-3)
    variance, axes = torch.linalg.eigh(X.T @ X / len(X))
    Z = torch.cat([X @ axes, X.new_ones(len(X), 1)], 1)          # (n, D + 1)
    variance = torch.cat([variance.clamp(min=0), X.new_ones(1)])
    penalty = torch.cat([X.new_full((X.shape[1], 1), l2), X.new_zeros(1, 1)])
    scale = (variance[:, None] * rate * (1 - rate) + penalty) ** -.5                         # (D + 1, K)
    v = torch.zeros_like(scale)

    def loss():
        w = v * scale
        z = Z @ w
        v.grad = (Z.T @ ((z.sigmoid() - T) * share) + penalty * w) * scale
        return (share * (F.softplus(z) - T * z)).sum() + (penalty * w ** 2).sum() / 2

    threads = torch.get_num_threads()                            # small products wait for each other's threads longer than they run
    torch.set_num_threads(threads if Z.numel() * scale.shape[1] > 2e7 else 1)
    torch.optim.LBFGS([v], max_iter=1000, tolerance_grad=1e-6, tolerance_change=0, history_size=10, line_search_fn='strong_wolfe').step(loss)
    torch.set_num_threads(threads)
    if (steepest := v.grad.abs().max()) > 1e-4:
        print(f'  the probe at l2 {l2} has not converged: gradient {steepest:.1e}', file=sys.stderr)
    w = v * scale
    return torch.cat([axes @ w[:-1], w[-1:]]).numpy()


def ridge(X, Y, l2):
    """Ridge regression of each column of Y (n, K) on the records where it is known: minimises mean squared error + l2 |W|^2. X (n, D)
    standardised. Returns (D + 1, K), the bias last."""
    out = np.zeros((X.shape[1] + 1, Y.shape[1]))
    for k in range(Y.shape[1]):
        known = np.isfinite(Y[:, k])
        if not known.any():
            continue
        Z = np.c_[X[known], np.ones(known.sum())]
        penalty = np.diag(np.r_[np.full(X.shape[1], l2), 0])
        out[:, k] = np.linalg.lstsq(Z.T @ Z / len(Z) + penalty, Z.T @ Y[known, k] / len(Z), rcond=None)[0]
    return out


def linear_probe(X, Y, train, val, numbers=None, refit=True, worth=None):
    """Linear probe on embeddings X (n, D): standardised on the labelled records, L2 chosen on `val` by macro AUROC (by BCE where no class
    has both labels there) or by `worth`, for numbers by MAE, refitted on train and val together unless told not to."""
    numbers = np.zeros(Y.shape[1], bool) if numbers is None else numbers

    def fitted(rows, l2):
        mean, std = X[rows].mean(0), X[rows].std(0) + 1e-6
        Z, w = (X[rows] - mean) / std, np.zeros((X.shape[1] + 1, Y.shape[1]))
        for mine, solve, penalty in ((~numbers, logistic, l2[0]), (numbers, ridge, l2[1])):
            if mine.any():
                w[:, mine] = solve(Z, Y[rows][:, mine], penalty)
        return lambda features: (features - mean) / std @ w[:-1] + w[-1]

    best = [None, None]                                          # of classes and of numbers: value, L2, scores on val
    for l2 in L2:                                                # from strong to weak: of equals the strongest
        z, y = fitted(train, (l2, l2))(X[val]), Y[val]
        for i, (mine, value) in enumerate(((~numbers, worth or probe_value), (numbers, number_value))):
            v = value(z[:, mine], y[:, mine])
            if best[i] is None or v > best[i][0]:
                best[i] = v, l2, z
    (_, l2_classes, z_classes), (_, l2_numbers, z_numbers) = best
    rows = np.concatenate([train, val]) if refit else train
    return fitted(rows, (l2_classes, l2_numbers)), np.where(numbers, z_numbers, z_classes)


def probe_value(z, y):
    """Macro AUROC, or minus the BCE where no class has both labels; 0 where nothing is known."""
    table = auroc(z, y)
    if np.isfinite(table).any():
        return macro(table)[0]
    return -entropy(z, y) if np.isfinite(y).any() else 0.


def entropy(z, y):
    """Mean binary cross-entropy (nats) of logits z (n, K) over the known labels y."""
    known = np.isfinite(y)
    return float((np.logaddexp(0, z) - np.where(known, y, 0) * z)[known].mean())


def number_value(z, y):
    """Minus the MAE, averaged over the numbers that are known of any record; 0 where none is."""
    error = mae(z, y)
    return -macro(error)[0] if np.isfinite(error).any() else 0.


def training_free(X, Y, train, val, how, k=20):
    """Nothing learns: cosine similarity of embeddings standardised on the labelled records. knn: mean label of the k nearest labelled
    records, weighted by similarity; prototypes: similarity to the mean of a class's positives less that to the mean of the others."""
    def fitted(rows):
        mean, std = X[rows].mean(0), X[rows].std(0) + 1e-6
        unit = lambda features: unit_rows((features - mean) / std)
        known = np.isfinite(Y[rows])                             # what is unknown has weight 0
        Z, y = unit(X[rows]), np.where(known, Y[rows], 0)

        def knn(features):
            if len(features) > 500:                              # what fits into memory, many records and labels as there may be
                return np.concatenate([knn(part) for part in np.array_split(features, -(-len(features) // 500))])
            similar = unit(features) @ Z.T                       # (n, labelled)
            near = np.argsort(-similar, 1, kind='stable')[:, :k]
            w = (np.maximum(np.take_along_axis(similar, near, 1), 0) + 1e-9)[..., None] * known[near]        # (n, k, K)
            return (w * y[near]).sum(1) / w.sum(1).clip(1e-12)

        def prototypes(features):
            centre = lambda members: unit_rows(members.T @ Z / members.sum(0)[:, None].clip(1e-12))          # (K, D)
            return unit(features) @ (centre(known * (y > 0)) - centre(known * (y == 0))).T
        return knn if how == 'knn' else prototypes
    return fitted(np.concatenate([train, val])), fitted(train)(X[val])


def unit_rows(x):
    """Rows of x (n, D) at length 1."""
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# heads and encoders trained by gradient

@dataclass(frozen=True)
class Recipe:
    """How a head, or everything, is trained downstream."""
    epochs: dict = field(default_factory=lambda: dict(linear=20, frozen=20, finetune=6, scratch=6))
    batch: int = 32
    lr: float = 1e-3                                             # of the head, times `factor`
    steps: dict = field(default_factory=lambda: dict(linear=500, frozen=500, finetune=70, scratch=70))          # at the least
    factor: dict = field(default_factory=lambda: dict(linear=1., frozen=10., finetune=20., scratch=5.))          # of lr: steps are few
    standardise: bool = True                                     # tokens of frozen encoders, by mean and SD over the training records
    weight_decay: float = 1e-3
    schedule: str = 'cosine'
    patience: int = 0                                            # epochs without a better validation before it stops; 0: never
    by_loss: bool = False                                        # better is a lower validation loss, not a higher macro AUROC
    clip: float = 1.
    solved: bool = True                                          # linear probes are solved, not trained by this recipe
    cached: bool = True                                          # frozen encoders see each record's consecutive crops once, not random ones
    preview: bool = False                                        # the head starts as the converged linear probe
    path: float = 0.                                             # stochastic depth at the last block
    dropout: float = None                                        # of encoder and mean token; None: the encoder's own
    decay: float = None                                          # layer-wise: lr decay^(L + 1 - l), l = 0 the stem, L + 1 the head


# released: 2605.12241's code; sc: the probe of 2605.17276, whose rate and batch are lost (1e-3 and 64 are our choice)
MODES = 'linear', 'frozen', 'finetune', 'scratch'
PAPERS = dict(batch=64, steps=dict.fromkeys(MODES, 0), factor=dict.fromkeys(MODES, 1.), standardise=False, solved=False, schedule='constant')
PROTOCOLS = {'quick': Recipe(), 'released': Recipe(dict.fromkeys(MODES, 100), clip=math.inf, cached=False, **PAPERS),
             'sc': Recipe(dict.fromkeys(MODES, 200), weight_decay=0., patience=5, **PAPERS)}
# post-training's parts (2509.12991, whose values are known from a replication only; the decay of MTECG, 2309.07136, is not known: .75 is ours)
POST = dict(preview=True, path=.5, dropout=.05, schedule='cosine', decay=.75)


def loss_of(logits, target, numbers):
    """Mean over classes of the BCE over known labels + mean over numbers of the L1 error over known values, 1 : 1; columns of which the
    batch knows nothing do not count (2605.12241's joint loss)."""
    known = target.isfinite()
    y = torch.where(known, target, 0.)
    bce = F.binary_cross_entropy_with_logits(logits, y.clamp(0, 1), reduction='none')
    error = torch.where(numbers, (logits - y).abs(), bce) * known                            # (B, K)
    column, counts = error.sum(0) / known.sum(0).clamp(min=1), known.any(0)
    return sum(column[mine].sum() / mine.sum().clamp(min=1) for mine in (counts & ~numbers, counts & numbers))


def rates(encoder, head, mode, recipe):
    """Optimiser groups. finetune: head lr, backbone lr / 10, stem lr / 100, as in 2605.12241, or layer by layer where recipe.decay is
    given; scratch: one rate."""
    lr = recipe.lr * recipe.factor[mode]
    middle = nn.ModuleList([encoder.blocks, encoder.norm])
    if mode == 'finetune' and recipe.decay:
        layers = [encoder.stem, *encoder.blocks[:-1], nn.ModuleList([encoder.blocks[-1], encoder.norm]), head]
        parts = [(m, lr * recipe.decay ** (len(layers) - 1 - l)) for l, m in enumerate(layers)]
    elif mode == 'finetune':
        parts = [(head, lr), (middle, lr / 10), (encoder.stem, lr / 100)]
    elif mode == 'scratch':
        parts = [(m, lr) for m in (head, middle, encoder.stem)]
    else:
        parts = [(head, lr)]
    return [g for m, rate in parts for g in parameter_groups(m, rate, recipe.weight_decay)]


def new_head(dim, classes, mode, dropout, start):
    """Attention pooling for frozen, else mean pooling, whose weights may start as a probe (D + 1, K) on mean embeddings."""
    if mode == 'frozen':
        return AttentionPool(dim, classes)
    head = MeanPool(dim, classes, dropout or 0.)
    if start is not None:
        head.out.weight.data.copy_(torch.from_numpy(start[:-1].T))
        head.out.bias.data.copy_(torch.from_numpy(start[-1]))
    return head


def fit(encoder, source, y, train, val, test, samples, mode, recipe, device, seed=0, numbers=None, epochs=None, start=None):
    """The downstream loop. linear and frozen: mean or attention pooling on a fixed encoder in eval mode; finetune and scratch: mean
    pooling, everything learns. source: the Dataset, of which each epoch takes one random crop per record, or Tokens of it. y (len(ds), K)
    with NaN. AdamW; the epoch with the best validation score (macro AUROC, less MAE) predicts. start: a probe (D + 1, K) on mean
    embeddings for the head to begin with. Returns scores on val and test."""
    torch.manual_seed(seed)
    rng, cached, still = np.random.default_rng(seed), isinstance(source, Tokens), mode in ('linear', 'frozen')
    numbers = np.zeros(y.shape[1], bool) if numbers is None else numbers
    kinds = torch.from_numpy(numbers).to(device)
    head = new_head(encoder.dim, y.shape[1], mode, recipe.dropout, start).to(device)
    if not still:
        encoder = copy.deepcopy(encoder).requires_grad_(True)
        set_regularisation(encoder, recipe.path, recipe.dropout)
    encoder = encoder.to(device)
    optimiser = torch.optim.AdamW(rates(encoder, head, mode, recipe), lr=recipe.lr)
    learns = [p for g in optimiser.param_groups for p in g['params']]
    size = min(recipe.batch, len(train))
    per_epoch = len(train) // size
    epochs = epochs or max(recipe.epochs[mode], -(-recipe.steps[mode] // per_epoch))
    warmup = .05 if recipe.schedule == 'cosine' else 0.

    shift, scale = 0., 1.
    if cached and recipe.standardise:
        shift, square = (torch.from_numpy(m[train].mean(0)).float().to(device) for m in (source.mean, source.square))
        scale = (square - shift ** 2).clamp(min=1e-12).rsqrt()

    def output(batch):
        if cached:
            return head((batch['h'] - shift) * scale, batch['pad']).float()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not still):
            h, pad = encoder(batch)
        return head(h, pad).float()

    def scores(batch):
        z = output(batch)
        return torch.where(kinds, z, z.sigmoid())

    def predict(rows):
        encoder.eval()
        head.eval()
        return per_record(scores, source, rows, samples, device)

    best, since = (-math.inf, None, None), 0                     # value, weights, scores on val
    for epoch in tqdm(range(epochs), desc=mode, leave=False, disable=None):
        encoder.train(not still)
        head.train()
        order = rng.permutation(train)
        for i in range(per_epoch):
            rows = order[i * size:(i + 1) * size]
            u, room = rng.random(size), source.length[rows]
            starts = (u * (room // samples)).astype(int) * samples if cached else (u * (room - samples + 1)).astype(int)
            for group in optimiser.param_groups:
                group['lr'] = learning_rate(epoch * per_epoch + i, epochs * per_epoch, group['peak'], recipe.schedule, warmup)
            batch = to_device(source.collate(rows, starts, samples), device)
            with autocast(device):
                loss = loss_of(output(batch), torch.from_numpy(y[rows]).float().to(device), kinds)
            if not loss.isfinite():
                raise Stop(f'{mode}: the loss is {loss.item()} in epoch {epoch}; try a lower rate')
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learns, recipe.clip)
            optimiser.step()
            optimiser.zero_grad()
        z = predict(val)
        logits, truth = scipy.special.logit(z[:, ~numbers].clip(1e-12, 1 - 1e-12)), y[val][:, ~numbers]
        value = -entropy(logits, truth) if recipe.by_loss else probe_value(logits, truth)
        value += number_value(z[:, numbers], y[val][:, numbers])
        if not best[0] >= value:
            best, since = (value, copy.deepcopy((head.state_dict(), None if still else encoder.state_dict())), z), 0
        elif recipe.patience and (since := since + 1) >= recipe.patience:
            break
    _, (head_weights, encoder_weights), z = best
    head.load_state_dict(head_weights)
    if not still:
        encoder.load_state_dict(encoder_weights)
    return z, predict(test)


def yes_no(y):
    """Which columns of labels y (n, K) hold 0 and 1, apart from NaN: (K,) bool."""
    answer = np.isin(y, (0, 1))
    return answer.any(0) & (answer | np.isnan(y)).all(0)


def probe_rows(ds, samples, most):
    """What the online probe looks at: the first `most` labelled training records that last a crop,
    half as many validation records, and the label columns."""
    columns = next((c for task, c in ds.tasks.items() if task != 'tail'), [])
    parts = []
    for part, n in zip(ds.split(), (most, most // 2)):
        part = part[ds.length[part] >= samples]
        labelled = (row for row in part if np.isfinite(ds.labels[row][columns]).any())
        parts.append(list(itertools.islice(labelled, n)))
    return *parts, columns


def online_probe(encoder, ds, probed, samples, device):
    """Macro AUROC of a linear probe on first crops, a rough gauge of progress. NaN if there are too
    few records with yes/no labels."""
    train, val, columns = probed
    y = ds.labels[train + val][:, columns]
    y = y[:, yes_no(y)]
    if min(len(train), len(val)) < 20 or not y.shape[1]:
        return math.nan
    n, at = len(train), np.arange(len(train))
    X = embed(encoder, ds, np.array(train + val), samples, device, 'probe', first=True)
    predict, _ = linear_probe(X, y, at[:n * 4 // 5], at[n * 4 // 5:])
    table = auroc(predict(X[n:]), y[n:])
    return float(macro(table)[0]) if np.isfinite(table).any() else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# one dataset, the tasks that one model is trained on, and how to score an encoder on them

def plans(ds, rows, seen, folds=None, allow=False):
    """(train, val, test) row numbers of each probe to fit, and whether they are folds of a cross-validation: small datasets (under 1,000
    records) predict every record once, larger ones their last fold; folds: a triple of fold numbers instead. Fold -1 always trains.
    Test folds with patients in `seen` (those the encoder was pretrained on) are left out, unless `allow`ed."""
    names, small = np.unique(ds.fold[rows]), len(rows) < 1000 and not folds
    names = names[names >= 0]
    if len(names) < 3:
        raise Stop(f'{ds.name}: labelled records in {len(names)} folds; three are needed for train, validation and test')
    which = lambda *f: rows[np.isin(ds.fold[rows], f)]
    if folds:
        result = [[which(*f) for f in folds]]
    else:
        result = [[rows[~np.isin(ds.fold[rows], (f, names[i - 1]))], which(names[i - 1]), which(f)] for i, f in enumerate(names)]
        result = result if small else result[-1:]
    for plan in result:                                          # a recording may be in the set twice, a patient in two folds of joined sets
        again = overlap(ds, ds.names(plan[2]))
        plan[:2] = [part[~again[part]] for part in plan[:2]]
    for train, val, test in result:
        assert not set(ds.patient[test]) & set(ds.patient[np.r_[train, val]]), 'a patient of the test fold is in training or validation'
    known = overlap(ds, seen)
    clean = [p for p in result if allow or not known[p[2]].any()]
    if n := sum(known[p[2]].sum() for p in result):
        fate = ', allowed' if allow else f'; {len(result) - len(clean)} of {len(result)} test folds are left out'
        print(f'  {n:,} test records are of patients seen in pretraining{fate}')
    if not clean:
        raise Stop(f'{ds.name}: the encoder was pretrained on patients of every test fold: take other data, pretrain on its training folds, or --allow overlap')
    return clean, small


def draw_labels(train, val, count, draw):
    """`count` labelled records out of train and val, a fifth of them to choose L2 or the epoch on; 'all' keeps the folds."""
    if count == 'all':
        return train, val
    rows = np.random.default_rng([draw, count]).permutation(np.concatenate([train, val]))[:count]
    return rows[count // 5:], rows[:count // 5]


def first_task(ds):
    """The task taken where none is named."""
    for name in ('findings', 'super', 'snomed', 'dx2020', 'label', 'sequence'):
        if name in ds.tasks:
            return name
    raise Stop(f'{ds.name} has no labels to predict: prepare it with labels, or name another set with --data')


def digest(*things):
    """A short hash of arrays, tensors and whatever json can write."""
    h = hashlib.blake2b(digest_size=10)
    for t in things:
        if torch.is_tensor(t):
            t = t.cpu().numpy()
        h.update(t.tobytes() if isinstance(t, np.ndarray) else json.dumps(t, sort_keys=True, default=str).encode())
    return h.hexdigest()


SOURCE = digest(*((HERE / f).read_text(encoding='utf-8') for f in ('data.py', 'models.py', 'evaluate.py')))


@dataclass(eq=False)
class Arm:
    """What is scored: encoders, one per pretraining seed, and what is done with them. reference: the arm it is compared with."""
    name: str
    encoders: list
    mode: str
    recipe: Recipe
    epochs: int = None
    runs: list = ()
    reference: str = ''

    @property
    def solved(self):
        """Whether its probe is solved, or nothing learns: no epochs."""
        return self.mode in ('knn', 'prototypes') or (self.mode == 'linear' and self.recipe.solved)


def shape(run):
    """What a random encoder or one trained from scratch shares with a run."""
    return json.dumps([run['config'], run['contract']['window']], sort_keys=True)


def fresh(run):
    """A new encoder of a run's shape."""
    encoder = Encoder(Config(**run['config']))
    encoder.window = run['contract']['window']
    return encoder


class Task:
    """One dataset under one contract: rows, labels and plans of the tasks `names`, which share one training, and how to score an
    encoder on them. Names are the papers' (data.TASKS) or the dataset's own label sets."""

    def __init__(self, data, names, runs, device, allow=(), empty=None):
        target = TASKS.get(names[0]) if names else None
        if target and data == target.data and not Path('datasets', data).exists():
            raise Stop(f'task {names[0]} needs datasets/{data}: {target.prepare}')
        self.ds, self.device, self.empty = Dataset(data), device, empty
        self.names = names or [first_task(self.ds)]
        columns = np.array(self.ds.columns(target.trained if target else self.names[0]))
        for r in runs:
            if (differs := Contract.read(r['contract']).differs(self.ds.contract)) and 'contract' not in allow:
                raise Stop(f'{r["path"]} was trained under another contract than datasets/{data} ({differs}): prepare the data with '
                           f'--fs {r["contract"]["fs"]} --filter {r["contract"]["filter"]} --norm {r["contract"]["norm"]}, or --allow contract')
        self.samples = max(self.crop(r['net']) for r in runs)    # records long enough for all
        self.seen = set().union(*(r['patients'] for r in runs))

        # columns: labels often enough yes and no, and numbers that every plan can learn
        y = np.array(self.ds.labels[:, columns])
        numbers = (np.isfinite(y) & ~np.isin(y, (0, 1))).any(0)
        least = target.least if target else 1
        kept = numbers | (((y > 0).sum(0) >= least) & ((y == 0).sum(0) >= least))
        if not kept.any():
            raise Stop(f'{data}, task {self.names[0]}: too few positives: none of its labels is positive, and negative, in {least} of {len(self.ds):,} records')
        rows = np.flatnonzero((self.ds.length >= self.samples) & np.isfinite(y[:, kept]).any(1))
        self.plans, self.folded = plans(self.ds, rows, self.seen, target and target.folds, 'overlap' in allow)
        kept &= ~numbers | np.all([np.isfinite(y[train]).any(0) for train, _, _ in self.plans], 0)
        self.columns, self.numbers, self.raw = columns[kept].tolist(), numbers[kept], y[:, kept]
        self.label_names = [self.ds.label_names[c] for c in self.columns]

        # test records, and which columns can be scored on them
        self.test = np.concatenate([p[2] for p in self.plans])
        self.group = np.concatenate([np.full(len(p[2]), i) for i, p in enumerate(self.plans)])
        y = self.raw[self.test]
        scored = np.where(self.numbers, np.isfinite(y).any(0), np.isfinite(auroc(np.zeros(y.shape), y, self.group)[0]))
        self.unscored = [n for n, s in zip(self.label_names, scored) if not s]               # trained on all the same
        if not scored.any():
            raise Stop(f'{data}, task {self.names[0]}: no class has both labels among the {len(self.test)} test records; take more, or an '
                       'encoder pretrained on other data, so that every fold can be tested on')
        self.parts = {name: self.part(name, scored | (empty is not None)) for name in self.names}
        self.y = np.concatenate([self.scaled(p)[p[2]] for p in self.plans])
        self.patient = self.ds.patient[self.test]
        self.patients = len(set(self.patient))
        if np.array_equal(self.patient, self.ds.id[self.test]):
            self.patients = None                                 # the source names none
        self.available = min(len(train) + len(val) for train, val, _ in self.plans)
        self.embeddings, self.fresh, self.tokens = {}, {}, (None, None)                      # kept for the next arm that asks
        self.encoded, self.seconds = 0, 0.

    def part(self, name, scored):
        """Positions, among the columns trained on, of those that task `name` is scored on."""
        wanted = {self.ds.label_names[c] for c in self.ds.columns(TASKS[name].scored if name in TASKS else name)}
        if not wanted & set(self.label_names):                   # such as diag/IMI for all/IMI
            codes = {n.split('/', 1)[1] for n in wanted}
            wanted = {n for n in self.label_names if n.split('/', 1)[1] in codes}
        found = [i for i, n in enumerate(self.label_names) if n in wanted and scored[i]]
        if not found:
            raise Stop(f'{self.ds.name}, task {name}: too few positives here for any of its labels')
        return found

    def random_encoders(self, run, count):
        """`count` fresh encoders of a run's shape whose BatchNorm has seen eight batches of records on which none is validated or tested
        here: training records of the run's pretraining, where that is not prepared this dataset's, else of the sets that prepare themselves."""
        made, samples = self.fresh.setdefault(shape(run), []), self.crop(run['net'])
        if len(made) >= count:
            return made[:count]
        rows = np.concatenate([part for p in self.plans for part in p[1:]])
        held = self.ds.names(rows)
        contract = Contract.read(run['contract'])
        for name in (run['data'], self.ds.name, 'synthetic', 'sample'):
            if name in ('synthetic', 'sample') or all(Path('datasets', part).is_dir() for part in name.split(',')):
                ds = Dataset(name)
                rows = ds.split()[0]
                rows = rows[(ds.length[rows] >= samples) & ~overlap(ds, held)[rows]]
                if len(rows) and not contract.differs(ds.contract):
                    break
        else:
            raise Stop(f'random encoders must see records of {run["path"]}\'s contract that nothing is tested on: prepare {run["data"]}, '
                       'on which it was pretrained')
        for i in range(len(made), count):
            torch.manual_seed(10_000 + i)
            made.append(calibrate_batchnorm(fresh(run), (ds.batch(rows, samples, min(64, len(rows)), i, s) for s in range(8))))
        return made

    def scaled(self, plan):
        """Labels (len(ds), K), numbers to mean 0 and SD 1 of the plan's training records."""
        if not self.numbers.any():
            return self.raw
        y = self.raw.copy()
        train = y[plan[0]][:, self.numbers].astype(float)
        y[:, self.numbers] = (y[:, self.numbers] - np.nanmean(train, 0)) / np.nanstd(train, 0).clip(1e-9)
        return y

    def crop(self, encoder):
        """Samples that an encoder sees at once: its pretraining's window."""
        return round(encoder.window * encoder.config.fs)

    def rows(self):
        return np.unique(np.concatenate([r for p in self.plans for r in p]))

    def timed(self, work, rows):
        """work(), counted as having encoded `rows`."""
        began = time.time()
        out = work()
        self.encoded, self.seconds = self.encoded + len(rows), self.seconds + time.time() - began
        return out

    def embedding(self, encoder, name='embedding'):
        """Embeddings of all rows that any plan needs, once per encoder: (len(ds), D)."""
        if id(encoder) not in self.embeddings:
            rows, X = self.rows(), np.zeros((len(self.ds), encoder.dim))
            X[rows] = self.timed(lambda: embed(encoder, self.ds, rows, self.crop(encoder), self.device, name), rows)
            self.embeddings[id(encoder)] = encoder, X            # with the encoder, lest another gets its id
        return self.embeddings[id(encoder)][1]

    def source(self, encoder, mode, recipe):
        """What `fit` draws from: Tokens of a frozen encoder, those of one at a time, or the dataset."""
        if mode not in ('linear', 'frozen') or not recipe.cached:
            return self.ds
        if self.tokens[0] != (id(encoder), mode):
            self.tokens = None, None                             # the old file goes before the new one comes
            make = lambda: Tokens(encoder, self.ds, self.rows(), self.crop(encoder), self.device, mode == 'linear')
            self.tokens = (id(encoder), mode), self.timed(make, self.rows())
            self.embeddings.setdefault(id(encoder), (encoder, self.tokens[1].mean))
        return self.tokens[1]

    def fitted(self, encoder, plan, arm, count='all', seed=0, draw=0):
        """One training: (scores on val, on test), and the labelled val rows."""
        (train, val), test = draw_labels(*plan[:2], count, draw), plan[2]
        y = self.scaled(plan)
        if arm.mode == 'prototypes' and self.numbers.any():
            raise Stop(f'{self.ds.name}, task {self.names[0]}: prototypes are of yes/no labels, and some of these are numbers')
        if arm.solved:
            X = self.embedding(encoder, arm.name)
            predict, z = linear_probe(X, y, train, val, self.numbers) if arm.mode == 'linear' else training_free(X, y, train, val, arm.mode)
            return z, predict(X[test]), val
        start = None
        if arm.mode == 'finetune' and arm.recipe.preview:        # not refitted: val still chooses the epoch
            predict, _ = linear_probe(self.embedding(encoder, arm.name), y, train, val, self.numbers, refit=False)
            bias = predict(np.zeros((1, encoder.dim)))
            start = np.r_[predict(np.eye(encoder.dim)) - bias, bias]
        source = self.source(encoder, arm.mode, arm.recipe)
        z, scores = fit(encoder, source, y, train, val, test, self.crop(encoder), arm.mode, arm.recipe, self.device, 1000 * seed + draw,
                        self.numbers, arm.epochs, start)
        return z, scores, val

    def output(self, encoder, arm, count, seed, draw):
        """Scores and margins (n, K) on the test records of all plans, from out/scores where they are known."""
        how = [SOURCE, self.ds.hash, self.columns, arm.mode, asdict(arm.recipe), arm.epochs, count, seed, draw, self.crop(encoder),
               asdict(encoder.config)]
        file = Path('out/scores', digest(how, *encoder.state_dict().values(), *itertools.chain(*self.plans)) + '.npz')
        if file.exists():
            return tuple(np.load(file)[k] for k in ('scores', 'margins'))
        before = digest(*encoder.state_dict().values())
        scores, margins = [], []
        for plan in self.plans:
            z, test, val = self.fitted(encoder, plan, arm, count, seed, draw)
            scores.append(test)
            margins.append(test - thresholds(z, self.scaled(plan)[val]))
        assert digest(*encoder.state_dict().values()) == before, 'evaluation changed the encoder that was given to it'
        scores, margins = np.concatenate(scores), np.concatenate(margins)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix='.npz', delete=False) as f:
            np.savez(f, scores=scores, margins=margins)
        Path(f.name).replace(file)
        return scores, margins

    def score(self, arm, count='all', draws=1, bayesian=False):
        """{task: Score} over all encoders (one per seed) and label draws, the same for each."""
        draws = 1 if count == 'all' else draws
        out = [[self.output(e, arm, count, seed, d) for d in range(draws)] for seed, e in enumerate(arm.encoders)]
        pick = lambda which, columns: [[o[which][:, columns] for o in of_seed] for of_seed in out]
        return {name: Score(pick(0, c), self.y[:, c], self.patient, self.group, pick(1, c), self.numbers[c], bayesian, self.empty)
                for name, c in self.parts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# arms, tables, figures

def slug(*words):
    """Words as part of a file name."""
    return '_'.join(str(w).replace(',', '+').replace(' ', '-').replace('/', '-') for w in words)


def signed(difference, low, high):
    """A difference and its interval as text."""
    return f'{difference:+.3f} [{low:+.3f}, {high:+.3f}]'


def grouped(runs):
    """Runs that differ in nothing but their seeds, together: {name: runs}, named by what sets them apart. Stops where seeds collide or
    groups have other seeds than each other, since their differences are taken seed by seed."""
    free = ('seed', 'log_every', 'save_every', 'probe_every', 'probe_records', 'tokenizer')
    alike = {}
    for r in runs:
        settings = {k: v for k, v in r['args'].items() if k not in free}
        alike.setdefault(json.dumps([r['step'], settings], sort_keys=True, default=str), []).append(r)
    found = [sorted(g, key=lambda r: r['seed']) for g in alike.values()]
    if any(len({r['seed'] for r in g}) < len(g) for g in found):
        raise Stop('two of these runs share all settings and the seed: give each once')
    if len({tuple(r['seed'] for r in g) for g in found}) > 1:
        raise Stop('compared pretrainings need the same seeds, since differences are taken seed by seed; here: '
                   + '; '.join(f'{Path(g[0]["path"]).name} ... {", ".join(str(r["seed"]) for r in g)}' for g in found))
    if len(found) == 1:
        return {'pretrained': found[0]}
    plain, names = ('objective', 'backbone', 'size'), [''] * len(found)
    for key in dict.fromkeys([*plain, *(k for g in found for k in g[0]['args'] if k not in free), 'step']):
        values = [str(g[0]['args'].get(key, g[0].get(key))) for g in found]
        if len(set(zip(names, values))) > len(set(names)):
            names = [f'{n} {v}' if key in plain else f'{n} {key}={v}' for n, v in zip(names, values)]
    return dict(zip(map(str.strip, names), found))


def arms_of(families, t, mode='linear', recipe=PROTOCOLS['quick'], epochs=None, ablate=False, scratch=False):
    """The arms of one table: from scratch, random encoders and the pretrainings, or the parts of post-training one by one."""
    made, shapes = [], {}
    for name, runs in families.items():
        shapes.setdefault(shape(runs[0]), []).append((name, runs))
    for members in shapes.values():
        runs = members[0][1]
        c = runs[0]['config']
        tail = f' ({c["backbone"]} {c["dim"]}x{c["layers"]}{" causal" * c["causal"]}, {runs[0]["contract"]["window"]:g} s)' if len(shapes) > 1 else ''
        if scratch or mode == 'scratch':
            torch.manual_seed(0)
            made.append(Arm('from scratch' + tail, [fresh(r) for r in runs], 'scratch', recipe, epochs, runs))
        if mode == 'scratch':
            continue
        if not ablate:
            count = 3 if len(runs) == 1 and mode in ('linear', 'knn', 'prototypes') else len(runs)
            made.append(Arm('random encoder' + tail, t.random_encoders(runs[0], count), mode, recipe, epochs))
            for name, runs in members:
                made.append(Arm(name, [r['net'] for r in runs], mode, recipe, epochs, runs, 'random encoder' + tail))
            continue
        plain = replace(recipe, preview=False, path=0., dropout=None, schedule='constant', decay=None)
        parts = {'plain': {}, **{f'+ {k}': {k: v} for k, v in POST.items()}, 'all parts': POST}
        for (name, runs), (part, changes) in itertools.product(members, parts.items()):
            called = f'{name} ' if len(families) > 1 else ''
            made.append(Arm(called + part, [r['net'] for r in runs], mode, replace(plain, **changes), epochs, runs, called + 'plain'))
    return {arm.name: arm for arm in made}


def evaluate_task(families, t, mode, counts, a, out):
    """All arms on one dataset in one mode: prints tables, writes JSON files and figures, returns the rows of the CSV files: of scores, of
    classes, of comparisons."""
    began, rows, classes, pairs = time.time(), [], [], []
    t.encoded, t.seconds, seeds = 0, 0., len(next(iter(families.values())))
    text = f'\n{t.ds.name}, {mode}: {len(t.test):,} test records of {t.patients or "unknown"} patients, {len(t.columns)} labels'
    if t.unscored:
        some = ', '.join(t.unscored[:6]) + (' ...' if len(t.unscored) > 6 else '')
        text += f' ({len(t.unscored)} trained on, but without both values among these records: {some})'
    if t.folded:
        text += f'; {len(t.plans)} folds, each record predicted by a probe that never saw its patient, pairs counted within folds'
    print(text)
    if (people := t.patients or len(t.test)) < 20:
        print(f'  ! {people} patients are too few to say anything: test on all, with an encoder that was pretrained on other data')
    given = dict(lr=a.lr, batch=a.batch, preview=a.preview, path=a.drop_path, dropout=a.dropout, schedule=a.schedule, decay=a.layer_decay)
    recipe = replace(PROTOCOLS[a.protocol], **{k: v for k, v in given.items() if v is not None})
    arms, asked = arms_of(families, t, mode, recipe, a.epochs, a.ablate, a.scratch), []
    for count in dict.fromkeys(int(c * t.available) if isinstance(c, float) else c for c in counts):
        if count == 'all' or 10 <= count <= t.available:
            asked.append((count, [arm for arm in arms.values() if count == 'all' or arm.mode == mode]))
        else:
            print(f'{count:8d}  left out: between 10 and {t.available:,} labelled records can be drawn')
    for arm in arms.values():                                    # encoder by encoder, while its tokens are at hand; `score` reads what is kept
        for seed, encoder in enumerate(arm.encoders):
            for count, draw in [(c, d) for c, those in asked if arm in those for d in range(1 if c == 'all' else a.draws)]:
                t.output(encoder, arm, count, seed, draw)
    for count, those in asked:
        scores = {arm.name: t.score(arm, count, a.draws, a.bootstrap == 'bayesian') for arm in those}
        for task in t.parts:
            mine = {name: s[task] for name, s in scores.items()}
            rows += report(t, task, arms, mine, count, a, seeds > 1)
            classes += per_class(t, task, mine, mode, count)
            if len(families) > 1 or a.ablate:
                found, ranks = compare(mine, a.margin)
                show_pairs(found, ranks, arms)
                pairs += [dict(data=t.ds.name, task=task, mode=mode, labels=count, **r) for r in found]
                draw_arms(mine, ranks, f'{t.ds.name} {task}, {mode}, {count} labels', out / f'arms_{slug(t.ds.name, task, mode, count)}.png')
    if mode == 'linear' and rows:
        shown = [arm for arm in arms.values() if arm.mode == 'linear'][:4]
        draw_pca([(arm.name, t.embedding(arm.encoders[0])) for arm in shown], t, out / f'pca_{slug(t.ds.name)}.png')
    if seeds == 1 and rows:
        print('  one pretraining seed: its variance is not in these intervals; give several runs to have it in them')
    elif rows:
        print('  * the interval of the paired difference excludes 0'
              + ('; with two seeds intervals are very wide: three or more tell more' if seeds == 2 else ''))
    speed = f'; {t.encoded:,} records encoded at {t.encoded / t.seconds:,.0f}/s' if t.seconds else ''
    print(f'  {time.time() - began:.0f} s{speed}')
    return rows, classes, pairs


def report(t, task, arms, scores, count, a, several):
    """Print one table and write one JSON file per run (none for random encoders); returns rows for the CSV file."""
    first = next(iter(scores.values()))
    main, resamples = first.main, len(first.boot[first.main])
    others = [m for m in first.point if m != main]
    names, rows, wide = [t.label_names[c] for c in t.parts[task]], [], max(map(len, scores)) + 2
    print(f'  {task}: {len(names)} labels' + (f'; intervals from {resamples} resamples, since there is so much' if resamples < 1000 else ''))
    print(f'{"labels":>8s}  {"arm":{wide}s}macro {main:7s}95 % interval   ' + ''.join(f'{m:7s}' for m in others) + 'minus its reference')
    for name, score in scores.items():
        arm, reference = arms[name], scores.get(arms[name].reference)
        minus = {m: score.minus(reference, m) if reference and reference is not score else () for m in score.point}
        text = '{:.3f}        [{:.3f}, {:.3f}]  '.format(*score.interval()) + ''.join(f'{score.point[m].mean():.3f}  ' for m in others)
        if minus[main]:
            _, low, high = minus[main]
            text += signed(*minus[main]) + (' *' if several and low * high > 0 else '')
        print(f'{count!s:>8s}  {name:{wide}s}{text}')
        epochs = '' if arm.solved else arm.epochs or arm.recipe.epochs[arm.mode]
        if epochs and not arm.epochs and arm.recipe.steps[arm.mode]:
            epochs = f'{epochs}, or {arm.recipe.steps[arm.mode]} steps'
        common = dict(data=t.ds.name, task=task, arm=name, mode=arm.mode, protocol=a.protocol, epochs=epochs, draws=a.draws, labels=count, n=len(t.test),
                      patients=t.patients, classes=len(names), runs=len(arm.encoders))
        for metric in score.point:
            mean, low, high = score.interval(metric)
            for i, points in enumerate(score.point[metric]):
                seed = arm.runs[i]['seed'] if arm.runs else i
                rows.append({**common, 'metric': f'macro {metric}', 'mean': mean, 'low': low, 'high': high,
                             'minus_reference': ' '.join(f'{v:.4f}' for v in minus[metric]), 'seed': seed, 'point': points.mean()})
                if arm.runs and metric == main:
                    result = dict(rows[-1], command=' '.join(sys.argv), checkpoint=arm.runs[i]['hash'], contract=arm.runs[i]['contract'],
                                  recipe=asdict(arm.recipe), names=names, left_out=t.unscored,
                                  per_class={m: dict(zip(names, score.per_class[m].tolist())) for m in score.per_class})
                    special = [*([name] if name not in ('pretrained', 'from scratch') else []), arm.mode, *([a.protocol] if a.protocol != 'quick' else [])]
                    file = f'results_{slug(t.ds.name, task, *special, count, seed)}.json'
                    (Path(arm.runs[i]['path']) / file).write_text(json.dumps(result, indent=1))
    return rows


def show_pairs(pairs, ranks, arms, most=15):
    """Print the verdicts on pairs of pretrainings, and every arm's rank."""
    shown = [r for r in pairs if all(arms[r[k]].runs for k in 'ab')]
    for r in shown[:most]:
        print(f'  {r["a"]} minus {r["b"]}: {signed(r["difference"], r["low"], r["high"])}, {r["verdict"]}')
    if len(shown) > most:
        print(f'  and {len(shown) - most} more pairs: see pairs_*.csv')
    best = ', '.join(f'{ranks[n]} {n}' for n in sorted(ranks, key=ranks.get))
    print(f'  ranks (ties: no difference beyond doubt, or none that matters; Holm over {len(pairs)} pairs): {best}')


def per_class(t, task, scores, mode, count):
    """Rows of the table of classes: how many positives of how many known, and each arm's metrics."""
    rows = []
    for i, c in enumerate(t.parts[task]):
        y = t.y[:, c]
        rows.append(dict(data=t.ds.name, task=task, mode=mode, labels=count, label=t.label_names[c], known=int(np.isfinite(y).sum()),
                         positive='' if t.numbers[c] else int((y > 0).sum()),
                         **{f'{n} {m}': f'{v[i]:.4f}' for n, s in scores.items() for m, v in s.per_class.items() if np.isfinite(v[i])}))
    return rows


def draw_arms(scores, ranks, title, path):
    """Every arm's point and interval, best on top, with its rank."""
    order = sorted(scores, key=lambda n: (ranks[n], -scores[n].interval()[0]), reverse=True)
    fig, ax = figure(figsize=(7, .34 * len(order) + 1.2), layout='constrained')
    for i, name in enumerate(order):
        mean, low, high = scores[name].interval()
        ax.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt='o', capsize=3, color='C7' if 'random' in name or 'scratch' in name else 'C0')
    ax.set_yticks(range(len(order)), [f'{n}  {ranks[n]}.' for n in order])
    ax.set(xlabel=f'macro {scores[order[0]].main}', title=title)
    ax.title.set_size(9)
    fig.savefig(path, dpi=120)


def draw_pca(arms, t, path):
    """First two principal components of the standardised embeddings, coloured by the two most frequent classes."""
    rows = np.random.default_rng(0).permutation(t.rows())[:5000]
    common = [c for c in np.argsort(-np.nansum(np.where(t.numbers, 0, t.raw[rows]), 0))[:2] if not t.numbers[c]]
    fig, axes = figure(1, len(arms), figsize=(5 * len(arms), 4.6), layout='constrained', squeeze=False)
    for ax, (name, X) in zip(axes[0], arms):
        X = (X[rows] - X[rows].mean(0)) / (X[rows].std(0) + 1e-6)
        U, S, _ = np.linalg.svd(X, full_matrices=False)
        points = U[:, :2] * S[:2]
        ax.scatter(*points.T, s=4, color='#cccccc', label='others')
        for c, color in zip(common, ('C0', 'C3')):
            ax.scatter(*points[t.raw[rows, c] > 0].T, s=6, color=color, label=t.label_names[c])
        share = S ** 2 / (S ** 2).sum()
        rank = np.exp(-(share * np.log(share + 1e-12)).sum())
        ax.set_title(f'{name}: {100 * share[:2].sum():.0f} % of variance, effective rank {rank:.1f}', size=9)
        ax.set(xlabel='first principal component', ylabel='second')
        ax.legend(fontsize=7)
    fig.savefig(path, dpi=120)


def draw_curve(rows, path):
    """The main metric against the number of labels, one panel per dataset, task and mode."""
    key = lambda r: (r['data'], r['task'], None if r['mode'] == 'scratch' else r['mode'], r['metric'])
    rows = [r for r in rows if r['metric'] in ('macro AUROC', 'macro MAE')]
    panels = [k for k in dict.fromkeys(key(r) for r in rows) if k[2] and len({r['labels'] for r in rows if key(r) == k}) > 1]
    if not panels:
        return
    fig, axes = figure(1, len(panels), figsize=(5.5 * len(panels), 4), layout='constrained', squeeze=False)
    for ax, panel in zip(axes[0], panels):
        mine = [r for r in rows if key(r) in (panel, (*panel[:2], None, panel[3]))]
        ticks = list(dict.fromkeys(r['labels'] for r in mine))
        for arm in dict.fromkeys(r['arm'] for r in mine):
            found = list({r['labels']: r for r in mine if r['arm'] == arm}.values())
            y = np.array([[r['mean'], r['low'], r['high']] for r in found])
            ax.errorbar([ticks.index(r['labels']) for r in found], y[:, 0], np.abs(y[:, 1:] - y[:, :1]).T, fmt='o-', capsize=3, label=arm,
                        color={'from scratch': 'C7', 'random encoder': 'C1', 'pretrained': 'C0'}.get(arm))
        ax.set_xticks(range(len(ticks)), map(str, ticks))
        ax.set(xlabel='labelled records', ylabel=mine[0]['metric'], title=f'{panel[0]}, {panel[1]}, {panel[2]}')
        ax.legend(fontsize=7)
    fig.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# analyses of runs on one dataset: robustness, label efficiency, similarity of representations, calibration, embeddings

class Changed:
    """A Dataset whose batches' signals (B, 12, T) go through `change(x, rows, starts)` first."""

    def __init__(self, ds, change):
        self.ds, self.crops, self.change = ds, ds.crops, change

    def collate(self, rows, starts, samples):
        batch = self.ds.collate(rows, starts, samples)
        return {**batch, 'x': self.change(batch['x'], rows, starts)}


def noisy(snr):
    """White noise at `snr` dB below the mean power of each crop, all leads together: the same for every encoder, whatever its window, since
    a sample's noise depends on its record and place alone."""
    def change(x, rows, starts):
        T = x.shape[2]
        noise = [np.random.default_rng(row).standard_normal((start + T, 12), np.float32)[start:].T for row, start in zip(rows, starts)]
        return x + torch.from_numpy(np.stack(noise)) * (x.var((1, 2), keepdim=True) / 10 ** (snr / 10)).sqrt()
    return change


def without(*leads):
    """Some of the 12 leads set to zero."""
    return lambda x, *_: x.index_fill(1, torch.tensor(leads), 0.)


def swap_arms(x, *_):
    """Right and left arm electrodes exchanged: I changes its sign, II and III, aVR and aVL change places."""
    return torch.cat([-x[:, :1], x[:, [2, 1, 4, 3]], x[:, 5:]], 1)


def at_rate(fs, to):
    """Through another sampling rate and back."""
    def change(x, *_):
        there = scipy.signal.resample_poly(x.numpy(), to, fs, axis=2)
        return torch.from_numpy(scipy.signal.resample_poly(there, fs, to, axis=2)[..., :x.shape[2]].copy()).float()
    return change


def cohort(t, name):
    """Records of another dataset that the probes of task `t` can be asked about: (dataset, its rows, columns of the probe, labels)."""
    other = Dataset(name)
    common = [c for c in t.parts[t.names[0]] if t.label_names[c] in other.label_names]
    rows = np.flatnonzero((other.length >= t.samples) & ~overlap(other, t.seen | t.ds.names(slice(None))))
    if not common or other.contract.differs(t.ds.contract) or not len(rows) or t.numbers.any():
        raise Stop(f'--cohort {name}: a dataset of patients seen neither here nor in pretraining, with the same contract and some of the same '
                   'yes/no labels is needed')
    return other, rows, common, np.array(other.labels[rows][:, [other.label_names.index(t.label_names[c]) for c in common]], float)


def robustness(families, t, a, out):
    """Linear probes fitted on unchanged records, then asked about changed ones, about groups of patients, and about other cohorts with the
    same labels. Like every analysis returns rows for the CSV file."""
    task, columns, rows = t.names[0], t.parts[t.names[0]], []
    cohorts, arms = {name: cohort(t, name) for name in a.cohort}, arms_of(families, t)
    changes = {f'noise at {snr} dB': noisy(snr) for snr in (20, 10, 0)}
    changes |= {'limb leads only': without(*range(6, 12)), 'lead I only': without(*range(1, 12)), 'arm electrodes swapped': swap_arms,
                'through 100 Hz': at_rate(t.ds.contract.fs, 100)}
    age, sex = t.ds.age[t.test], t.ds.sex[t.test]
    people = {'women': sex == 1, 'men': sex == 0}
    people |= {f'age {low} to {high - 1}': (age >= low) & (age < high) for low, high in ((0, 40), (40, 60), (60, 80), (80, 120))}
    print(f'\n{t.ds.name}, {task}: linear probes fitted on unchanged records')
    print(f'{"arm":24s} {"condition":26s}      n  macro  95 % interval   minus unchanged')

    def show(arm, condition, n, score, clean=None):
        mean, low, high = score.interval()
        minus = score.minus(clean) if clean else ()
        print(f'{arm:24s} {condition:26s} {n:6,}  {mean:.3f}  [{low:.3f}, {high:.3f}]  ' + (signed(*minus) if clean else ''))
        rows.append(dict(data=t.ds.name, task=task, arm=arm, condition=condition, n=n, metric=f'macro {score.main}', mean=mean, low=low, high=high,
                         minus_unchanged=' '.join(f'{v:.4f}' for v in minus)))

    def score_of(outputs, of=slice(None)):
        return Score([[o[of][:, columns]] for o in outputs], t.y[of][:, columns], t.patient[of], t.group[of], numbers=t.numbers[columns])

    for arm in arms.values():
        probes = [[linear_probe(t.embedding(e, arm.name), t.scaled(p), *p[:2], t.numbers)[0] for p in t.plans] for e in arm.encoders]

        def outputs(change=None):
            found = []
            for e, predict in zip(arm.encoders, probes):
                X = embed(e, Changed(t.ds, change), t.test, t.crop(e), t.device) if change else t.embedding(e)[t.test]
                found.append(np.concatenate([f(X[t.group == i]) for i, f in enumerate(predict)]))
            return found

        plain = outputs()
        clean = score_of(plain)
        show(arm.name, 'unchanged', len(t.test), clean)
        for condition, change in changes.items():
            show(arm.name, condition, len(t.test), score_of(outputs(change)), clean)
        for condition, mine in people.items():
            if mine.sum() < 20:
                continue
            score = score_of(plain, mine)
            if np.isfinite(score.point[score.main]).all():       # some class has both labels
                show(arm.name, condition, int(mine.sum()), score)
        for name, (other, known, common, y) in cohorts.items():
            found = [[probe[-1](embed(e, other, known, t.crop(e), t.device))[:, common]] for e, probe in zip(arm.encoders, probes)]
            show(arm.name, f'cohort {name}', len(known), Score(found, y, other.patient[known]))
    return rows


def one_per_patient(ds, rows, seed=42):
    """One record of each patient, drawn by lot."""
    rows = np.random.default_rng(seed).permutation(rows)
    return np.sort(rows[np.unique(ds.patient[rows], return_index=True)[1]])


def balance(t, rows):
    """What subsets of records keep in balance (len(rows), columns): labels, the lack of any, sex and age group."""
    y, age, sex = t.raw[rows][:, ~t.numbers] > 0, t.ds.age[rows], t.ds.sex[rows]
    return np.c_[y, ~y.any(1), sex == 1, sex == 0, age < 40, (age >= 40) & (age < 60), (age >= 60) & (age < 80), age >= 80]


def label_law(n, error):
    """(C, a, L0) of error = C n^-a + L0, by least squares in relative error, 0 <= a <= 3 and 0 <= L0 <= the lowest error."""
    n, error = np.asarray(n, float), np.asarray(error, float)
    lowest = error.min()
    miss = lambda v: (v[0] * (n / n[0]) ** -v[1] + v[2]) / error - 1
    found = [scipy.optimize.least_squares(miss, (error[0] - f * lowest, a, f * lowest), bounds=((0, 0, 0), (np.inf, 3, lowest)))
             for a in (.2, .5, 1.) for f in (.1, .5, .9)]
    C, alpha, floor = min(found, key=lambda r: r.cost).x
    return C * n[0] ** alpha, alpha, floor


def efficiency(families, t, a, out):
    """1 to 1 / 128 of the labelled records, one per patient, stratified, linear probe: points, fitted laws, and the share of labels with
    which a pretraining reaches its reference's error."""
    arms, task, columns = arms_of(families, t), t.names[0], t.parts[t.names[0]]
    rows, found = [], {name: [] for name in arms}
    train, val, tested = t.plans[-1]
    train, val = one_per_patient(t.ds, train), one_per_patient(t.ds, val)
    y, test = t.scaled(t.plans[-1]), t.group == len(t.plans) - 1
    print(f'\n{t.ds.name}, {task}: {len(train) + len(val):,} labelled records, one per patient, halved seven times or while ten remain, '
          f'{a.draws} stratified draws; {test.sum():,} test records')
    for k in range(8):
        draws = [[part[stratify(balance(t, part), folds=2 ** k, seed=d) == 0] for part in (train, val)] for d in range(a.draws if k else 1)]
        n = round(np.mean([len(p) + len(q) for p, q in draws]))
        if n < 10 or min(len(q) for _, q in draws) < 2:
            break
        for name, arm in arms.items():
            asked = lambda X, p, q: linear_probe(X, y, p, q, t.numbers)[0](X[tested])[:, columns]
            outputs = [[asked(t.embedding(e, name), p, q) for p, q in draws] for e in arm.encoders]
            score = Score(outputs, t.y[test][:, columns], t.patient[test], numbers=t.numbers[columns])
            mean, low, high = score.interval()
            found[name].append((n, 1 - mean if score.main == 'AUROC' else mean))
            print(f'{n:8,d}  {name:24s} {mean:.3f} [{low:.3f}, {high:.3f}]')
            rows.append(dict(data=t.ds.name, task=task, arm=name, labels=n, metric=f'macro {score.main}', mean=mean, low=low, high=high))
    if len(rows) < 5 * len(arms):
        print('  fewer than five sizes have ten labelled records: no law is fitted')
    what = 'macro MAE' if t.numbers[columns].all() else '1 - macro AUROC'
    draw_laws(found, arms, what, f'{t.ds.name}, {task}', out / f'efficiency_{slug(t.ds.name, task)}.png')
    return rows


def draw_laws(found, arms, what, title, path):
    """Fit, print and draw the law of every arm's points {arm: [(labelled records, error)]}; compare it with that of its reference."""
    fig, ax = figure(figsize=(6, 4.2), layout='constrained')
    laws = {}
    for i, (name, points) in enumerate(found.items()):
        n, error = np.array(points, float).reshape(-1, 2).T
        ax.loglog(n, error, 'o', color=f'C{i}', label=name)
        if len(n) >= 5 and error.min() > 0:
            C, alpha, floor = laws[name] = label_law(n, error)
            ax.loglog(n, C * n ** -alpha + floor, color=f'C{i}')
            bound = alpha < 1e-3 or floor < 1e-6 or floor > .999 * error.min()
            print(f'  {name}: error = {C:.3g} n^-{alpha:.2f} + {floor:.3f}' + (' (an exponent or floor at its bound: not identified)' if bound else ''))
        if name in laws and arms[name].reference in laws:
            (C, alpha, floor), (C0, alpha0, floor0) = laws[name], laws[arms[name].reference]
            level = C0 * n ** -alpha0 + floor0                   # the reference's error with n labels
            reached = [(m, ((v - floor) / C) ** (-1 / max(alpha, 1e-9)) / m) for m, v in zip(n, level) if v > floor]
            told = ', '.join(f'{times:.2g} times {m:.0f}' for m, times in reached if np.isfinite(times))
            print(f"  {name} reaches its reference's error with so many labels: {told or 'none, however many'}")
    ax.set(xlabel='labelled records', ylabel=what, title=title)
    ax.legend(fontsize=7)
    fig.savefig(path, dpi=120)


def hsic(K, L):
    """Unbiased HSIC (Song et al. 2012) of two Gram matrices (n, n)."""
    n, K, L = len(K), K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    return ((K * L).sum() + K.sum() * L.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * K.sum(0) @ L.sum(0)) / n / (n - 3)


def cka(X, Y):
    """Linear centred kernel alignment (Kornblith et al. 2019) of X (n, p) and Y (n, q), the same records in rows: 1 where one is the other
    up to rotation and scale. Debiased (Nguyen et al. 2021): near 0, and it may be below, for unrelated ones at any width; n >= 4."""
    K, L = X @ X.T, Y @ Y.T
    return hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L))


def layer_features(encoder, ds, rows, samples, device):
    """Mean over tokens of every stage on the records' first crops: [(len(rows), width)], the stem's tokens first."""
    encoder, widths = encoder.to(device).eval(), []

    def stages(batch):
        z, pad = encoder.tokens(batch)
        layers = []
        encoder.backbone(z, pad, layers)
        pooled = [mean_pool(x, pad if pad is None or pad.shape[1] == x.shape[1] else None) for x in (z, *(output for _, output in layers))]
        widths[:] = [p.shape[1] for p in pooled]
        return torch.cat(pooled, 1)
    return np.split(per_record(stages, ds, rows, samples, device, 'layers', first=True), np.cumsum(widths)[:-1], 1)


def similarity(families, t, a, out):
    """Debiased CKA of every pair of layers of the arms' encoders on up to 512 test records, with a figure."""
    arms = arms_of(families, t)
    rows = t.test[:512]
    if len(rows) < 4:
        raise Stop(f'CKA needs 4 test records or more; {t.ds.name} has {len(rows)}')
    stages = {}
    for name, arm in arms.items():
        for i, e in enumerate(arm.encoders[:2]):                 # two seeds: how alike they are is the ceiling
            for l, X in enumerate(layer_features(e, t.ds, rows, t.crop(e), t.device)):
                stages[f'{name}, {i}', f'layer {l}' if l else 'stem'] = X
    table = np.array([[cka(X, Y) for Y in stages.values()] for X in stages.values()])
    fig, ax = figure(figsize=(2.5 + .16 * len(table), 2 + .16 * len(table)), layout='constrained')
    image = ax.imshow(table, vmin=0, vmax=1, cmap='magma')
    ticks, models = [l.replace('layer ', '') for _, l in stages], [m for m, _ in stages]
    ax.set_xticks(range(len(ticks)), ticks, rotation=90, fontsize=6)
    ax.set_yticks(range(len(ticks)), ticks, fontsize=6)
    for name in dict.fromkeys(models):                           # written once beside its layers, with a line above them
        first, size, text = models.index(name), models.count(name), textwrap.fill(name, 20)
        ax.text(-2.5, first + (size - 1) / 2, text, fontsize=7, ha='right', va='center')
        ax.text(first + (size - 1) / 2, len(ticks) + 1.5, text, fontsize=7, ha='center', va='top', rotation=90)
        ax.axhline(first - .5, color='w', lw=1)
        ax.axvline(first - .5, color='w', lw=1)
    fig.colorbar(image, shrink=.6, label=f'CKA, {len(rows)} records')
    fig.savefig(out / f'cka_{slug(t.ds.name)}.png', dpi=120)
    print(f'\n{t.ds.name}: debiased CKA of last layers on {len(rows)} records')
    for (m, i), (n, j) in itertools.combinations({m: i for i, m in enumerate(models)}.items(), 2):           # the last index of each
        print(f'  {m} and {n}: {table[i, j]:.3f}')
    return [dict(data=t.ds.name, n=len(rows), model=m, layer=l, other=n, other_layer=k, cka=table[i, j])
            for (i, (m, l)), (j, (n, k)) in itertools.combinations(enumerate(stages), 2)]


def reliability(p, y):
    """Of probabilities p (n,) in ten bins of equal width (3, 10): how many, their sum, how many of the labels y (n,) are positive."""
    bins = np.minimum((p * 10).astype(int), 9)
    return np.array([np.bincount(bins, w, 10) for w in (np.ones_like(p), p, y.astype(float))])


def calibration(families, t, a, out):
    """Reliability and ROC curves of linear probes, all classes pooled, with the expected calibration error and Brier score: of each
    encoder's probe, averaged, since the mean of several probes is another model, and better calibrated than any."""
    arms, task, rows = arms_of(families, t), t.names[0], []
    columns = [c for c in t.parts[task] if not t.numbers[c]]
    if not columns:
        raise Stop('calibration is of yes/no labels')
    known = np.isfinite(t.y[:, columns])
    y = t.y[:, columns][known] > 0
    fig, (left, right) = figure(1, 2, figsize=(10, 4.4), layout='constrained')
    for i, (name, arm) in enumerate(arms.items()):
        each = [scipy.special.expit(t.output(e, arm, 'all', s, 0)[0])[:, columns][known] for s, e in enumerate(arm.encoders)]
        bins = [reliability(p, y) for p in each]
        error = np.mean([np.abs(says - true).sum() / len(y) for _, says, true in bins])
        brier = np.mean([((p - y) ** 2).mean() for p in each])
        print(f'  {name}: expected calibration error {error:.3f}, Brier {brier:.4f}')
        rows.append(dict(data=t.ds.name, task=task, arm=name, n=len(t.test), expected_calibration_error=error, brier=brier))
        count, says, true = np.sum(bins, 0)
        there = count > 0
        left.plot(says[there] / count[there], true[there] / count[there], 'o-', color=f'C{i}', label=f'{name}, expected calibration error {error:.3f}')
        ranked = np.tile(y, len(each))[np.argsort(-np.concatenate(each))]
        right.plot(np.cumsum(~ranked) / (~ranked).sum(), np.cumsum(ranked) / ranked.sum(), color=f'C{i}', label=name)
    left.set(xlabel='predicted probability', ylabel='share of positives', title=f'{t.ds.name}, {task}')
    right.set(xlabel='false positive rate', ylabel='true positive rate', title='all labels pooled')
    for ax, corner in ((left, 'upper left'), (right, 'lower right')):
        ax.plot([0, 1], [0, 1], ':', color='C7')
        ax.legend(fontsize=7, loc=corner)
    fig.savefig(out / f'calibration_{slug(t.ds.name, task)}.png', dpi=120)
    return rows


def embeddings(families, t, a, out):
    """Mean-pooled embeddings of every record that the task knows to embeddings_*.npz: X (n, D), id, patient, fold, y, label names."""
    rows = t.rows()
    for runs in families.values():
        for r in runs:
            file = Path(r['path'], f'embeddings_{slug(t.ds.name)}.npz')
            X = embed(r['net'], t.ds, rows, t.crop(r['net']), t.device).astype(np.float32)
            np.savez(file, X=X, id=t.ds.id[rows], patient=t.ds.patient[rows], fold=t.ds.fold[rows], y=t.raw[rows].astype(np.float32),
                     labels=np.array(t.label_names))
            print(f'{file}: {X.shape[0]:,} x {X.shape[1]}')
    return []


ANALYSES = {'robustness': robustness, 'efficiency': efficiency, 'cka': similarity, 'calibration': calibration, 'embeddings': embeddings}


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def open_run(path):
    """The checkpoint of a run folder, with its path and hash. Prints what was loaded."""
    path, _, step = str(path).partition('@')                     # out/run@20: the copy that --keep 20 made
    path = Path(path).parent if Path(path).name == 'ckpt.pt' else Path(path)
    if set('*?[') & set(str(path)) and not path.exists():
        raise Stop(f'no run matches {path}')
    file = path / (f'ckpt_{step}.pt' if step else 'ckpt.pt')
    if step and not file.exists():
        raise Stop(f'{path} kept no checkpoint of step {step}; it has {", ".join(sorted(f.name for f in path.glob("ckpt*.pt"))) or "none"}')
    if not file.exists() and (inside := sorted(str(f.parent) for f in path.glob('*/ckpt.pt'))):
        more = f' ... ({len(inside)} in all)' if len(inside) > 6 else ''
        raise Stop(f'{path} is a folder of runs, no run: name some of {" ".join(inside[:6])}{more}')
    try:
        c = load(file)
        c['patients'] = read_seen(path) if 'encoder' in c else set()
        c |= dict(path=str(path), hash=hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest())
        c['net'] = load_encoder(c)
        c['net'].window = c['contract']['window']
    except ValueError as e:
        raise Stop(str(e))
    except (RuntimeError, KeyError, TypeError) as e:
        raise Stop(f'{file} is no checkpoint of train.py, or of another version of it: {" ".join(str(e).split())[:200]}')
    if c['step'] < c['args']['steps'] and not step:
        print(f'{file} is of an unfinished run, {c["step"]} of {c["args"]["steps"]} steps: go on with python train.py --resume --out {path}')
    print(f'{file}: the {c["objective"]} student after {c["step"]:,} steps on {c["data"]}, seed {c["seed"]}, '
          f'{sum(p.numel() for p in c["net"].parameters()):,} parameters in {len(c["encoder"])} tensors, all matched')
    return c


def newest():
    """The folder of the last checkpoint in out/ that has learnt."""
    for file in sorted(Path('out').glob('*/ckpt.pt'), key=lambda f: -f.stat().st_mtime):
        try:
            if load(file).get('step'):
                return file.parent
        except (ValueError, AttributeError) as e:
            print(f'passing over {file}: {e}')
    raise Stop('no run in out/: pretrain one with python train.py')


def show_tasks():
    """Every task of the papers, whether its data is prepared, the command that prepares it; then what else is prepared."""
    metas = {}
    for file in sorted(Path('datasets').glob('[!.]*/meta.json')):
        try:
            m = json.loads(file.read_text())
            metas[file.parent.name] = {k: m[k] for k in ('tasks', 'records', 'source')} | dict(contract=Contract.read(m['contract']))
        except (ValueError, KeyError, TypeError):
            print(f'datasets/{file.parent.name}: damaged, prepare it again')
    print('task                   labels  scored by  data')
    last = ''
    for name, task in TASKS.items():
        paper = 'out of distribution in arXiv 2605.17276' if name.startswith('sc_') else 'arXiv 2605.12241'
        if paper != last:
            print(paper)
        last, state = paper, f'not prepared: {task.prepare}'
        if m := metas.get(task.data):
            state = f'{m["records"]:,} records in datasets/{task.data}'
            differs = m['contract'].differs(contract_of(make_parser().parse_args(shlex.split(task.prepare)[2:])))
            if not differs and '--rate 500' in task.prepare and '--rate 500' not in m['source']:
                differs = 'from the 100 Hz files'
            if differs:
                state += f', but {differs}; as in the paper: {task.prepare}'
        print(f'  {name:19s} {task.classes or "by data":>7}  {task.metric:9s}  {state}')
    for name, m in metas.items():
        print(f'datasets/{name}: {m["records"]:,} records; label sets ' + (', '.join(f'{t} ({len(c)})' for t, c in m['tasks'].items()) or 'none'))


def labels(text):
    """--labels: all (or 1), a fraction (float) or a number of records (int)."""
    value = 1. if text == 'all' else float(text)
    if not 0 < value < 1e9 or (value > 1 and value % 1):
        raise argparse.ArgumentTypeError('must be all, a fraction up to 1 or a number of records')
    if value == 1:
        return 'all'
    return value if value < 1 else int(value)


def jobs_of(a):
    """(dataset, tasks that share one training on it) of everything that was asked for."""
    out = {}
    for name in a.task or [None]:
        target = TASKS.get(name)
        if name and not target and not a.data:
            raise Stop(f'--task {name} is no task of the papers (see --list): name the dataset that has it with --data')
        for data in a.data or ([target.data] if target else ['synthetic', 'sample']):
            if Path(data, 'ckpt.pt').exists() or Path(data).name == 'ckpt.pt':
                raise Stop(f'{data} is a run, no dataset: name the runs first, then the flags')
            out.setdefault((data, (target.trained, target.least, target.folds) if target else name), []).append(name)
    return [(data, [n for n in names if n]) for (data, _), names in out.items()]


def write_csv(path, rows):
    """Rows, whose keys may differ, under the union of their keys; under a temporary name first: a kill leaves the old file or the new one."""
    temporary = Path(path).with_name(Path(path).name + '.partial')
    try:
        with open(temporary, 'w', newline='') as f:
            writer = csv.DictWriter(f, list(dict.fromkeys(k for r in rows for k in r)))
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)                        # where writing failed


def write_markdown(path, rows, pairs):
    """The table of arms, and of their differences, as markdown."""
    table = [['data, task', 'mode', 'labels', 'arm', 'metric', 'value', 'minus reference'], ['---'] * 7]
    one_of_the_seeds = {tuple(r[k] for k in ('data', 'task', 'mode', 'labels', 'arm', 'metric')): r for r in rows}
    for (data, task, *what), r in one_of_the_seeds.items():
        minus = [float(v) for v in r['minus_reference'].split()]
        table.append([f'{data}, {task}', *what, f'{r["mean"]:.3f} [{r["low"]:.3f}, {r["high"]:.3f}]', signed(*minus) if minus else ''])
    if pairs:
        table += [[], ['data, task', 'mode', 'labels', 'a', 'b', 'a - b', 'p, Holm', 'a is'], ['---'] * 8]
    for r in pairs:
        table.append([f'{r["data"]}, {r["task"]}', r['mode'], r['labels'], r['a'], r['b'], signed(r['difference'], r['low'], r['high']),
                      f'{r["p_holm"]:.3f}', r['verdict']])
    Path(path).write_text(''.join(f'| {" | ".join(map(str, line))} |\n' if line else '\n' for line in table))


def parse(argv=None):
    """The arguments, checked."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='*', help='run folders (default: the newest in out/); those alike but for seeds are averaged, others compared')
    p.add_argument('--data', nargs='+', help='prepared datasets (default: the task\'s, else synthetic and sample)')
    p.add_argument('--task', nargs='+', help='tasks of the papers (--list) or label sets of the data (default: the first of '
                   'findings, super, snomed, dx2020, label, sequence)')
    p.add_argument('--mode', nargs='+', choices=['linear', 'frozen', 'finetune', 'scratch', 'knn', 'prototypes'], default=['linear'])
    p.add_argument('--protocol', choices=list(PROTOCOLS), default='quick',
                   help='released: 100 epochs of random crops as in 2605.12241; sc: the probe of 2605.17276')
    p.add_argument('--labels', nargs='+', type=labels, help='numbers of labelled records, or fractions up to 1 '
                   '(default: 100 300 1000 all for a linear probe on synthetic data, else all)')
    p.add_argument('--draws', type=int, default=3, help='draws of few labels')
    p.add_argument('--analyse', nargs='+', choices=list(ANALYSES), default=[], help='in place of the table')
    p.add_argument('--cohort', nargs='+', default=[], help='robustness: datasets to ask the fitted probes about')
    p.add_argument('--list', action='store_true', help='show all tasks and the prepared datasets')
    p.add_argument('--device')
    g = p.add_argument_group('training, where the protocol shall not decide')
    g.add_argument('--epochs', type=int, help='quick: 20 of frozen, or as many as make 500 steps; 6 of finetune and scratch, or 70 steps')
    g.add_argument('--batch', type=int)
    g.add_argument('--lr', type=float,
                   help='of the head (1e-3); quick: 10 times as much for attention pooling, 20 for fine-tuning, 5 for training from scratch')
    g.add_argument('--scratch', action=argparse.BooleanOptionalAction,
                   help='train from scratch too (default: on synthetic data with one pretraining, and beside finetune)')
    g = p.add_argument_group('post-training (2509.12991), parts of --mode finetune')
    g.add_argument('--preview', action='store_true', default=None, help='the head starts as the linear probe')
    g.add_argument('--drop-path', type=float, help='stochastic depth, growing to this at the last block')
    g.add_argument('--dropout', type=float)
    g.add_argument('--schedule', choices=['cosine', 'constant'], help='of any training')
    g.add_argument('--layer-decay', type=float, help='rate of each layer below the head, as a multiple of the one above')
    g.add_argument('--ablate', action='store_true',
                   help='plain fine-tuning, each part alone (' + ', '.join(f'{k} {v}' for k, v in POST.items()) + '), all of them')
    g = p.add_argument_group('statistics')
    g.add_argument('--bootstrap', choices=['patients', 'bayesian'], default='patients', help='bayesian: no rare class ever vanishes from a resample')
    g.add_argument('--benchmark-convention', action='store_true', help='a class without positives counts, as .5')
    g.add_argument('--margin', type=float, default=.005, help='difference that would not matter: within it two arms are equivalent')
    g.add_argument('--allow', nargs='+', choices=['overlap', 'contract'], default=[],
                   help='go on although test patients were pretrained on, or under another contract')
    a = p.parse_args(argv)
    for name, low, high in (('draws', 1, 1000), ('epochs', 1, 10000), ('batch', 1, 65536), ('lr', 1e-9, 10), ('drop_path', 0, .99), ('dropout', 0, .99),
                            ('layer_decay', .01, 1), ('margin', 0, 1)):
        if getattr(a, name) is not None and not low <= getattr(a, name) <= high:
            raise Stop(f'--{name.replace("_", "-")} must lie between {low:g} and {high:g}')
    if a.ablate and a.mode != ['finetune']:
        raise Stop('--ablate takes fine-tuning apart: add --mode finetune')
    if 'finetune' not in a.mode and any(v is not None for v in (a.preview, a.drop_path, a.dropout, a.layer_decay)):
        raise Stop('--preview, --drop-path, --dropout and --layer-decay belong to --mode finetune')
    if 'scratch' in a.mode and a.scratch is False:
        raise Stop('--mode scratch asks for what --no-scratch leaves out: give one of the two')
    if a.cohort and 'robustness' not in a.analyse:
        raise Stop('--cohort belongs to --analyse robustness')
    return a


def results_name(a, families):
    """What the files of a command's results have in their names."""
    tasks, others = a.task or [], [Path(g[0]['path']).name for g in list(families.values())[1:4]]
    words = [*(a.data or []), *(tasks if len(tasks) < 4 else (tasks[0], 'to', tasks[-1])), *a.mode]
    if a.ablate:
        words.append('ablation')
    if a.protocol != 'quick':
        words.append(a.protocol)
    return slug(*words, *(['against', *others] if others else []))


def main(argv=None):
    """The command line: see the top of the file."""
    a = parse(argv)
    if a.list:
        return show_tasks()
    runs = [open_run(r) for r in a.runs or [newest()]]
    families, device, out, began = grouped(runs), pick_device(a.device), Path(runs[0]['path']), time.time()
    written = lambda *patterns: ', '.join(sorted(f.name for p in patterns for f in out.glob(p) if f.stat().st_mtime >= began - 1))
    wished, rows, classes, pairs = a.scratch, [], [], []
    for data, names in jobs_of(a):
        t = Task(data, names, runs, device, a.allow, .5 if a.benchmark_convention else None)
        for analysis in a.analyse:
            if found := ANALYSES[analysis](families, t, a, out):
                write_csv(out / f'{analysis}_{slug(data, *t.names)}.csv', found)
        if a.analyse:
            continue
        showcase = data.startswith('synthetic') and len(families) == 1
        for mode in sorted(a.mode, key='frozen'.__ne__):         # frozen first: its pass over the data serves the others
            usual = not a.ablate and (mode == 'finetune' or (showcase and mode in ('linear', 'frozen')))
            a.scratch = usual if wished is None else wished
            counts = a.labels or ([100, 300, 1000, 'all'] if showcase and mode == 'linear' else ['all'])
            for kept, new in zip((rows, classes, pairs), evaluate_task(families, t, mode, counts, a, out)):
                kept += new
    if a.analyse:
        return print(f'\ntables and figures are in {out}/: {written(*(f"{n}_*" for n in a.analyse))}')
    if not rows:
        raise Stop('nothing was scored')
    name = results_name(a, families)
    write_csv(out / f'results_{name}.csv', rows)
    write_csv(out / f'classes_{name}.csv', classes)
    write_markdown(out / f'results_{name}.md', rows, pairs)
    if pairs:
        write_csv(out / f'pairs_{name}.csv', pairs)
    draw_curve(rows, out / ('labels.png' if name == 'linear' else f'labels_{name}.png'))
    print(f'\ntables and figures are in {out}/: {written("*.png")}, results_{name}.csv and .md, classes_{name}.csv'
          + (f', pairs_{name}.csv' if pairs else '') + ', results_*.json')


if __name__ == '__main__':
    run_script(main)
