"""Evaluate pretrained encoders: probes, fine-tuning, training from scratch, all with intervals.

    python evaluate.py                           # the newest run, on synthetic and 500 real ECGs
    python evaluate.py sample/encoder --data mine    # the encoder that comes with the code
    python evaluate.py out/a0 out/a1 out/a2      # seeds of one pretraining are averaged
    python evaluate.py out/a? out/b? --mode linear frozen finetune      # pretrainings: compared
    python evaluate.py out/a0@200 out/b0@200     # the checkpoints that --keep 200 has kept
    python evaluate.py --list                    # the papers' tasks, how to prepare their data
    python evaluate.py out/a? --task ptbxl_all ptbxl_diag --protocol released
    python evaluate.py out/a? --mode finetune scratch --labels 100 all
    python evaluate.py out/a? --mode finetune --ablate       # the parts of post-training
    python -m tests.analyses robustness out/a0   # noise, missing leads, age, sex

Modes (arXiv 2605.12241): linear (mean over tokens, frozen encoder), frozen (attention pooling,
frozen encoder), finetune (everything learns), scratch (the same from untrained weights); and knn.
Each pretrained encoder is compared with its own untrained weights. Writes summary.csv, seeds.csv,
classes.csv, pairs.csv and figures to the run's folder, or to --out. Scores are kept in out/scores,
so that a command that was stopped goes on where it was.
"""
import argparse
import copy
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import re
import warnings
from collections import namedtuple
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import scipy.sparse
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import (HERE, LEADS, TASKS, Contract, Dataset, Record, Stop, overlap, process, read_seen,
                  run_script)
from models import (AttentionPool, MeanPool, autocast, count_parameters, learning_rate, load,
                    load_encoder, mean_pool, parameter_groups, pick_device, set_regularisation,
                    to_device)

# -------------------------------------------------------------------------------------------------
# metrics

METRICS = 'AUROC', 'AUPRC', 'F1', 'MAE', 'R2'        # the first of those that apply is the main one


def cells(score, y, weight):
    """Summed weights of the positives and of the negatives in cells of ascending score: (cells, R),
    (cells, R). score, y (n,), y 0 or 1; weight (n, R).

    A cell with positives holds one score, so that ties are seen. Between two of them all negatives
    share one cell, since their order changes no metric. A rare label thus has few cells."""
    order = np.argsort(score, kind='stable')
    value = np.r_[0, np.cumsum(np.diff(score[order]) > 0)]               # distinct score
    has = np.bincount(value, y[order] > 0) > 0                           # a positive has this score
    cell = np.cumsum(has | np.r_[True, has[:-1]])[value] - 1

    def total(mine):
        return scipy.sparse.coo_array((mine.astype(float), (cell, order))).tocsr() @ weight
    return total(y[order] > 0), total(y[order] == 0)


def ranking(score, y, group, weight):
    """AUROC and average precision of one class in R resamples: (R,), (R,).

    score, y (n,), y 0 or 1; group (n,): the fold, since scores of different probes do not compare;
    weight (n, R) of each record. AUROC: the share of pairs of a positive and a negative of one
    group that are ranked rightly; ties count half. Average precision: the mean over positives of
    the precision at their score. With several groups the score is replaced by its rank within the
    group, a share of the group's size."""
    right, pairs, rank = 0., 0., score.copy()
    groups = np.unique(group)
    for g in groups:
        rows = np.flatnonzero(group == g)
        P, N = cells(score[rows], y[rows], weight[rows])
        right = right + (P * (np.cumsum(N, 0) - N / 2)).sum(0)
        pairs = pairs + P.sum(0) * N.sum(0)
        rank[rows] = scipy.stats.rankdata(score[rows]) / len(rows)
    if len(groups) > 1:
        P, N = cells(rank, y, weight)
    hits, alarms = (np.cumsum(x[::-1], 0)[::-1] for x in (P, P + N))     # at this score or above
    return right / pairs, (P * hits / np.maximum(alarms, 1e-12)).sum(0) / P.sum(0)


def scorable(y, numbers, group):
    """Which columns of y (n, K) can be scored: (K,) bool. Numbers that are known at all, and
    classes with both labels in at least one group (n,), since AUROC compares within groups.
    numbers (K,) bool: which columns are numbers."""
    both = np.zeros(y.shape[1], bool)
    for g in np.unique(group):
        rows = y[group == g]
        both |= (rows == 0).any(0) & (rows > 0).any(0)
    return np.where(numbers, np.isfinite(y).any(0), both)


def metrics(score, margin, y, numbers, group, weight):
    """{metric: (K, R)}, NaN in columns that a metric is not for, or that cannot be scored.

    score (n, K): a logit or probability of each class, or the estimate of a number; margin (n, K):
    score less its threshold, for F1; y (n, K), NaN for unknown; numbers (K,) bool; group (n,);
    weight (n, R). MAE has the unit of y."""
    table = {m: np.full((y.shape[1], weight.shape[1]), np.nan) for m in METRICS}
    for k in np.flatnonzero(scorable(y, numbers, group)):
        known = np.isfinite(y[:, k])
        s, t, w = score[known, k], y[known, k], weight[known]
        if numbers[k]:
            table['MAE'][k] = np.abs(s - t) @ w / w.sum(0)
            table['R2'][k] = 1 - (s - t) ** 2 @ w / (t ** 2 @ w - (t @ w) ** 2 / w.sum(0))
        else:
            yes = margin[known, k] > 0
            table['AUROC'][k], table['AUPRC'][k] = ranking(s, t, group[known], w)
            table['F1'][k] = 2 * (yes * t) @ w / ((yes + t) @ w)
    return table


def macro_auroc(score, y):
    """Mean AUROC of the classes that have both labels, NaN if none has. score, y (n, K)."""
    no_numbers, one_group = np.zeros(y.shape[1], bool), np.zeros(len(y))
    table = metrics(score, score, y, no_numbers, one_group, np.ones((len(y), 1)))['AUROC']
    return float(np.nanmean(table)) if np.isfinite(table).any() else math.nan


def cross_entropy(z, y):
    """Mean binary cross-entropy (nats) of logits z (n, K) over the known labels y."""
    known = np.isfinite(y)
    return float((np.logaddexp(0, z) - np.where(known, y, 0) * z)[known].mean())


def thresholds(score, y):
    """The threshold of each class with the best F1 on these records: (K,). A score above it means
    yes. It lies midway between two scores, and is infinite where no positive is known. score, y
    (n, K), NaN for unknown."""
    out = np.full(y.shape[1], np.inf)
    for k in np.flatnonzero((y > 0).any(0)):
        known = np.isfinite(y[:, k])
        order = np.argsort(-score[known, k], kind='stable')
        s, hits = score[known, k][order], np.cumsum(y[known, k][order] > 0)
        lower = np.append(s[1:], s[-1] - 2e-9)                       # just below the lowest score
        value = 2 * hits / (np.arange(len(s)) + 1 + hits[-1])
        best = np.where(lower < s, value, 0).argmax()                # equal scores go together
        out[k] = (s[best] + lower[best]) / 2
    return out


# -------------------------------------------------------------------------------------------------
# intervals and differences

# points (S, draws): by pretraining seed and label draw; boot (R,): of their mean, by resample
Estimate = namedtuple('Estimate', 'points boot')


def patient_weights(patient, resamples=1000):
    """Weights (n, 1 + R) of records: ones, then R draws of a Bayesian bootstrap over patients
    (Rubin 1981). Exponential weights are Dirichlet weights up to a factor that no metric sees. No
    weight is 0, so a rare class stays in every resample. The seed is fixed, so two encoders on the
    same records get the same weights, and their difference is paired."""
    people, index = np.unique(patient, return_inverse=True)
    drawn = np.random.default_rng(0).exponential(size=(len(people), resamples))
    return np.c_[np.ones(len(index)), drawn[index]]


def estimates(outputs, y, numbers, patient, group):
    """({metric: Estimate of its mean over columns}, {metric: (K,) of each column}).

    outputs: for each seed, for each label draw, (scores, margins), both (n, K); patient (n,); the
    rest as in `metrics`. 1,000 resamples, fewer where y is large, 200 at least."""
    weight = patient_weights(patient, int(np.clip(1e10 / (y.size + 500 * len(y)), 200, 1000)))
    tables = [[metrics(*output, y, numbers, group, weight) for output in of_seed]
              for of_seed in outputs]
    found, columns = {}, {}
    for m in METRICS:
        values = np.array([[t[m] for t in of_seed] for of_seed in tables])   # (S, draws, K, 1 + R)
        applies = np.isfinite(values[0, 0, :, 0])
        if applies.any():
            macro = values[:, :, applies].mean(2)
            found[m] = Estimate(macro[..., 0], macro[..., 1:].mean((0, 1)))
            columns[m] = values[..., 0].mean((0, 1))
    return found, columns


def minus(a, b):
    """The Estimate of a paired difference: the same records, seeds and label draws."""
    return Estimate(a.points - b.points, a.boot - b.boot)


def interval(e, level=.95):
    """(mean, low, high) of an Estimate. The variances over test patients (bootstrap), pretraining
    seeds and label draws add up; Student's t has Welch's and Satterthwaite's degrees of freedom,
    rounded down. `python -m tests.coverage`: 95 % intervals hold the truth in 94 to 95 % of studies
    with 5 or 8 seeds, in 93 to 95 % with 3. It leaves out the choice of training patients, and the
    variance between seeds where there is only one."""
    parts = [(np.var(e.boot), math.inf)]
    for axis in (1, 0):
        means = e.points.mean(axis)
        if len(means) > 1:
            parts.append((np.var(means, ddof=1) / len(means), len(means) - 1))
    variance = sum(v for v, _ in parts)
    uncertainty = sum(v ** 2 / freedom for v, freedom in parts)
    freedom = variance ** 2 // uncertainty if uncertainty else math.inf
    half = scipy.stats.t.ppf(.5 + level / 2, freedom) * math.sqrt(variance)
    mean = e.points.mean()
    return mean, mean - half, mean + half


def compare(scores, sign=1, margin=.01):
    """All pairs of {name: Estimate}: (rows, {name: rank}).

    A row is the paired difference a - b of two names. Of m pairs each interval has level 1 - .05 /
    m, so that all of them hold together with 95 %. The verdict is on a: equivalent (the 90 %
    interval lies within +-margin), better or worse (the interval excludes 0), or can't tell. With
    under three seeds it is always can't tell. sign: -1 where less is better, as for MAE. Rank: 1 +
    the number of names that are better."""
    pairs, rows, beaten = list(itertools.combinations(scores, 2)), [], []
    for a, b in pairs:
        e = minus(scores[a], scores[b])
        difference, low, high = interval(e, 1 - .05 / len(pairs))
        _, low90, high90 = interval(e, .9)
        verdict, enough = "can't tell", len(e.points) > 2
        if enough and max(-low90, high90) < margin:
            verdict = f'equivalent within {margin:g}'
        elif enough and low * high > 0:
            verdict = 'better' if sign * difference > 0 else 'worse'
            beaten.append(b if verdict == 'better' else a)
        rows.append(dict(a=a, b=b, difference=difference, low=low, high=high, verdict=verdict))
    return rows, {name: 1 + beaten.count(name) for name in scores}


# -------------------------------------------------------------------------------------------------
# embeddings, and tokens kept for heads on a frozen encoder

def batches(encoder, ds, rows, collate=None, first=False):
    """(rows, starts, batch) of all consecutive crops of records, or of their first crops, as the
    encoder sees them. Each record must be as long as a crop or longer. collate(rows, starts,
    samples) makes the batch, by default ds.collate."""
    samples = encoder.samples
    owner, start = (rows, np.zeros(len(rows), int)) if first else ds.crops(rows, samples)
    size = 1 + 76_800 // samples                            # crops; more leave a processor's cache
    for i in tqdm(range(0, len(owner), size), 'crops', leave=False, disable=None):
        crops = owner[i:i + size], start[i:i + size]
        yield *crops, to_device((collate or ds.collate)(*crops, samples), encoder.device)


@torch.no_grad()
def per_record(encode, encoder, ds, rows, **how):
    """Mean over each record's crops of encode(batch) (B, K): (len(rows), K) float64. The rest as in
    `batches`."""
    out, owner = [], []
    for mine, _, batch in batches(encoder, ds, rows, **how):
        with autocast(encoder.device):
            out.append(encode(batch).double().cpu().numpy())
        owner.extend(mine)
    first = np.flatnonzero(np.diff(owner, prepend=-1))                   # of each record
    count = np.diff(first, append=len(owner))
    return np.add.reduceat(np.concatenate(out), first) / count[:, None]


def embed(encoder, ds, rows, **how):
    """Mean over tokens and crops of the encoder's output: (len(rows), D)."""
    encoder.eval()
    return per_record(lambda batch: mean_pool(*encoder(batch)), encoder, ds, rows, **how)


class Tokens:
    """A frozen encoder's tokens of all consecutive crops of records, encoded once and kept in half
    precision. Its batches hold h (B, L, D) and pad in place of x."""

    @torch.no_grad()
    def __init__(self, encoder, ds, rows):
        self.kept = {}
        for owner, start, batch in batches(encoder.eval(), ds, rows):
            with autocast(encoder.device):
                h, pad = encoder(batch)
            h = h.half().cpu()
            for i, crop in enumerate(zip(owner, start)):
                self.kept[crop] = h[i] if pad is None else h[i][~pad[i].cpu()]

    def collate(self, rows, starts, samples):
        """A batch of kept crops, in place of Dataset.collate: h (B, L, D), and pad (B, L), True
        where a crop has fewer tokens. The crops have the encoder's `samples`."""
        h = [self.kept[crop].float() for crop in zip(rows, starts)]
        h = nn.utils.rnn.pad_sequence(h, True, math.nan)                 # (B, L, D)
        pad = h[..., 0].isnan()
        return dict(h=h.where(~pad[..., None], 0), pad=pad)

    def moments(self, rows):
        """Mean and standard deviation over the tokens of the records: (D,), (D,)."""
        rows = set(rows)
        # n, sum and sum of squares, crop by crop: all tokens at once may not fit into memory
        sums = sum(torch.stack([h.double() ** p for p in range(3)]).sum(1)
                   for (row, _), h in self.kept.items() if row in rows)
        mean, square = sums[1:] / sums[0]
        return mean.float(), (square - mean ** 2).clamp(min=1e-12).sqrt().float()


# -------------------------------------------------------------------------------------------------
# probes without a training loop

# penalties to choose from, the strongest first, so that of equals the strongest is taken
L2 = .3, .1, .03, .01, 3e-3, 1e-3, 3e-4


def logistic(X, Y, l2):
    """Converged multi-label logistic regression: minimises mean BCE over known labels, summed over
    classes, + l2 / 2 |W|^2. X (n, D) standardised, Y (n, K) with NaN. (D + 1, K), the bias last.

    L-BFGS in the principal axes of X, each axis and class scaled by its curvature: the same minimum
    in far fewer steps."""
    X, Y = torch.from_numpy(X), torch.from_numpy(Y).double()
    known = Y.isfinite()
    Y, share = torch.where(known, Y, 0.), known / known.sum(0).clamp(min=1)
    rate = (Y * share).sum(0).clamp(1e-3, 1 - 1e-3)
    variance, axes = torch.linalg.eigh(X.T @ X / len(X))
    axes = torch.block_diag(axes, torch.ones(1, 1))                      # the bias is the last axis
    variance = F.pad(variance.clamp(min=0), (0, 1), value=1.)
    Z = F.pad(X, (0, 1), value=1.) @ axes                                # (n, D + 1)
    penalty = X.new_full((Z.shape[1], 1), l2)
    penalty[-1] = 0                                                      # of the bias
    scale = (variance[:, None] * rate * (1 - rate) + penalty) ** -.5     # (D + 1, K)
    v = torch.zeros_like(scale)

    def loss():
        w = v * scale
        z = Z @ w
        v.grad = (Z.T @ ((z.sigmoid() - Y) * share) + penalty * w) * scale
        return (share * (F.softplus(z) - Y * z)).sum() + (penalty * w ** 2).sum() / 2

    torch.optim.LBFGS([v], max_iter=1000, tolerance_grad=1e-6, tolerance_change=0, history_size=10,
                      line_search_fn='strong_wolfe').step(loss)
    return (axes @ (v * scale)).numpy()


def ridge(X, Y, l2):
    """Ridge regression of each column of Y (n, K) on the records where it is known: minimises mean
    squared error + l2 |W|^2. X (n, D). Returns (D + 1, K), the bias last."""
    out = np.zeros((X.shape[1] + 1, Y.shape[1]))
    penalty = np.diag([l2] * X.shape[1] + [0.])
    for k in np.flatnonzero(np.isfinite(Y).any(0)):
        known = np.isfinite(Y[:, k])
        Z = np.c_[X[known], np.ones(known.sum())]
        out[:, k] = np.linalg.solve(Z.T @ Z + len(Z) * penalty, Z.T @ Y[known, k])
    return out


def apply(weights, X):
    """Scores (n, K) of a probe (D + 1, K), the bias last, on embeddings X (n, D)."""
    return X @ weights[:-1] + weights[-1]


def fit_scaled(solve, X, Y, l2):
    """A probe on X (n, D) standardised by itself, as weights for X itself: (D + 1, K)."""
    mean, std = X.mean(0), X.std(0) + 1e-6
    w = solve((X - mean) / std, Y, l2)
    slopes = w[:-1] / std[:, None]
    return np.r_[slopes, w[-1:] - mean @ slopes]


def validation_value(z, y, numbers, by_loss=False):
    """The value that validation maximises: macro AUROC of the classes, minus the MAE of the numbers
    in SD. With by_loss, or if no class has both labels, minus the BCE takes the place of AUROC.
    z (n, K): logits, or numbers."""
    value, logits, labels = 0., z[:, ~numbers], y[:, ~numbers]
    if np.isfinite(labels).any():
        area = math.nan if by_loss else macro_auroc(logits, labels)
        value = -cross_entropy(logits, labels) if math.isnan(area) else area
    error = np.abs(z - y)[:, numbers]
    return value - np.nanmean(error) if np.isfinite(error).any() else value


def linear_probe(X, Y, train, val, numbers=None, refit=True, by_loss=False):
    """Linear probe on embeddings X (n, D): logistic regression of the classes in Y (n, K) and ridge
    regression of the numbers. L2 is chosen on `val`; then it is fitted to train and val together,
    if refit. Returns weights (D + 1, K) and the scores (len(val), K) by which L2 was chosen."""
    numbers = np.zeros(Y.shape[1], bool) if numbers is None else numbers
    weights, scores = np.zeros((X.shape[1] + 1, Y.shape[1])), np.zeros((len(val), Y.shape[1]))
    both = np.concatenate([train, val])
    for mine, solve in ((~numbers, logistic), (numbers, ridge)):
        if not mine.any():
            continue
        y = Y[:, mine]
        fits = [fit_scaled(solve, X[train], y[train], l2) for l2 in L2]
        values = [validation_value(apply(w, X[val]), y[val], numbers[mine], by_loss) for w in fits]
        best = int(np.argmax(values))                                # of equals, the strongest L2
        scores[:, mine] = apply(fits[best], X[val])
        weights[:, mine] = fit_scaled(solve, X[both], y[both], L2[best]) if refit else fits[best]
    return weights, scores


def knn(X, Y, labelled, asked, k=20):
    """Mean label of the k nearest labelled records, weighted by cosine similarity of embeddings
    that are standardised on the labelled records: (len(asked), K). Unknown labels weigh nothing."""
    X = F.normalize(torch.from_numpy((X - X[labelled].mean(0)) / (X[labelled].std(0) + 1e-6)))
    Y, out = torch.from_numpy(Y[labelled]), []
    known = Y.isfinite()
    Y = Y.where(known, 0.)
    for rows in np.array_split(asked, len(asked) // 500 + 1):            # what fits into memory
        similar, near = (X[rows] @ X[labelled].T).topk(min(k, len(labelled)))        # (n, k)
        w = (similar.clamp(min=0) + 1e-9)[..., None] * known[near]                   # (n, k, K)
        out.append((w * Y[near]).sum(1) / w.sum(1).clamp(min=1e-12))
    return torch.cat(out).numpy()


# -------------------------------------------------------------------------------------------------
# heads and encoders trained by gradient

@dataclass(frozen=True)
class Recipe:
    """How a probe, a head or everything is trained. Any field can be changed by --recipe."""
    epochs: int = 0
    lr: float = 1e-3                              # of the head
    least_steps: int = 0                          # more epochs until there are so many steps
    batch: int = 32
    weight_decay: float = 1e-3
    schedule: str = 'cosine'                      # or constant
    patience: int = 0                             # epochs without a better validation; 0: no stop
    by_loss: bool = False                         # better: a lower validation loss, not AUROC
    clip: float = 1.                              # largest norm of the gradient
    solved: bool = False                          # linear probe by `linear_probe`, no epochs
    cached: bool = False                          # tokens are kept: no random crops
    preview: bool = False                         # the head starts as the solved linear probe
    path: float = 0.                              # stochastic depth at the last block
    dropout: float = None                         # of encoder and head; None: the encoder's own
    decay: float = None                           # factor of the rate from a layer to the one below


MODES = 'linear', 'frozen', 'finetune', 'scratch', 'knn'
PAPER = Recipe(100, batch=64, schedule='constant', clip=math.inf)       # 2605.12241's code
# 2605.17276's rate and batch are not known: 1e-3 and 64 are ours
SC = Recipe(200, batch=64, schedule='constant', weight_decay=0., patience=5)
PROTOCOLS = {                                 # Recipe(epochs, lr, least_steps, ...)
    'quick': dict(linear=Recipe(solved=True), frozen=Recipe(20, 1e-2, 500, cached=True),
                  finetune=Recipe(6, 2e-2, 70), scratch=Recipe(6, 5e-3, 70), knn=Recipe()),
    'released': dict.fromkeys(MODES, PAPER),
    'sc': dict.fromkeys(MODES, SC)}
# post-training (2509.12991; values from a replication). The decay is of MTECG (2309.07136), which
# does not give its value: .75 is ours
POST = dict(preview=True, path=.5, dropout=.05, schedule='cosine', decay=.75)


def loss_of(logits, target, numbers):
    """Mean over classes of the BCE (nats) + mean over numbers of the L1 error (in SD), weighted 1 :
    1, over known labels. A column without a known label in the batch does not count (2605.12241's
    joint loss). logits, target (B, K), target NaN for unknown; numbers (K,) bool."""
    known = target.isfinite()
    y = torch.where(known, target, 0.)
    bce = F.binary_cross_entropy_with_logits(logits, y.clamp(0, 1), reduction='none')
    error = torch.where(numbers, (logits - y).abs(), bce) * known                        # (B, K)
    column, counts = error.sum(0) / known.sum(0).clamp(min=1), known.any(0)
    return sum(column[mine].sum() / mine.sum().clamp(min=1)
               for mine in (counts & ~numbers, counts & numbers))


def optimiser_groups(encoder, head, mode, recipe):
    """Optimiser groups with their peak rates. Frozen encoder: the head alone. finetune: the head's
    rate, a tenth of it for the backbone, a hundredth for the stem (2605.12241); with recipe.decay
    it falls by that factor from each layer to the one below. scratch: one rate for all."""
    *lower, last = encoder.blocks
    last = nn.ModuleList([last, encoder.norm])
    layers = [head, last, *lower[::-1], encoder.stem]        # from top to bottom
    factors = [1.]                                           # of a frozen encoder: the head alone
    if mode == 'finetune' and recipe.decay:
        factors = [recipe.decay ** i for i in range(len(layers))]
    elif mode == 'finetune':
        factors = [1., *[.1] * len(encoder.blocks), .01]
    elif mode == 'scratch':
        factors = [1.] * len(layers)
    return [group for layer, factor in zip(layers, factors)
            for group in parameter_groups(layer, recipe.lr * factor, recipe.weight_decay)]


def encoder_and_head(encoder, classes, arm, start=None):
    """(encoder, head) to train: the encoder itself where it is frozen, else a copy. The head:
    attention pooling for frozen, else mean pooling, which may start as a probe (D + 1, K)."""
    recipe = arm.recipe
    if arm.mode in ('finetune', 'scratch'):
        encoder = copy.deepcopy(encoder).requires_grad_(True)
        set_regularisation(encoder, recipe.path, recipe.dropout)
    if arm.mode == 'frozen':
        return encoder, AttentionPool(encoder.dim, classes).to(encoder.device)
    head = MeanPool(encoder.dim, classes, recipe.dropout or 0.)
    if start is not None:
        start = torch.from_numpy(start).float()
        head.out.load_state_dict(dict(weight=start[:-1].T, bias=start[-1]))
    return encoder, head.to(encoder.device)


def random_crops(rng, train, size, length, samples, cached):
    """(rows, starts) of the batches of one epoch: a random crop of each record; of kept tokens, one
    of the consecutive crops. The last, short batch is left out."""
    order, step = rng.permutation(train), samples if cached else 1
    for i in range(0, len(train) - size + 1, size):
        rows = order[i:i + size]
        places = (length[rows] - samples) // step + 1
        yield rows, (rng.random(size) * places).astype(int) * step


def fit(t, encoder, source, rows, arm, seed=0, start=None):
    """Train a head on Task t with AdamW, in modes finetune and scratch a copy of the encoder too.
    The weights of the epoch with the best validation_value are taken. source: the Dataset, or the
    kept Tokens of it. rows: (training, validation, test) row numbers. start: see
    `encoder_and_head`. Returns scores on the validation and the test rows, (n, K) each:
    probabilities, or numbers in SD."""
    torch.manual_seed(seed)
    (train, val, test), recipe, rng = rows, arm.recipe, np.random.default_rng(seed)
    encoder, head = encoder_and_head(encoder, t.y.shape[1], arm, start)
    moving, cached = arm.mode in ('finetune', 'scratch'), isinstance(source, Tokens)
    learner = nn.ModuleList([head, encoder]) if moving else head
    optimiser = torch.optim.AdamW(optimiser_groups(encoder, head, arm.mode, recipe))
    device = encoder.device
    numbers = torch.from_numpy(t.numbers).to(device)
    mean, std = (m.to(device) for m in source.moments(train)) if cached else (0., 1.)
    size = max(1, min(recipe.batch, len(train)))
    per_epoch = len(train) // size
    epochs = max(1, recipe.epochs, math.ceil(recipe.least_steps / per_epoch))
    steps, warmup = epochs * per_epoch, .05 if recipe.schedule == 'cosine' else 0.

    def output(batch):
        if cached:
            return head((batch['h'] - mean) / std, batch['pad']).float()
        with torch.set_grad_enabled(torch.is_grad_enabled() and moving):
            h, pad = encoder(batch)
        return head(h, pad).float()

    def scores(batch):
        z = output(batch)
        return torch.where(numbers, z, z.sigmoid())

    def predict(rows):
        learner.eval()
        return per_record(scores, encoder, t.ds, rows, collate=source.collate)

    encoder.eval()
    step, since, best = 0, 0, -math.inf
    for _ in tqdm(range(epochs), desc=arm.mode, leave=False, disable=None):
        learner.train()
        for picked, starts in random_crops(rng, train, size, t.ds.length, encoder.samples, cached):
            for group in optimiser.param_groups:
                group['lr'] = learning_rate(step, steps, group['peak'], recipe.schedule, warmup)
            batch = to_device(source.collate(picked, starts, encoder.samples), device)
            with autocast(device):
                loss = loss_of(output(batch), torch.from_numpy(t.y[picked]).to(device), numbers)
            loss.backward()
            nn.utils.clip_grad_norm_(learner.parameters(), recipe.clip)
            optimiser.step()
            optimiser.zero_grad()
            step += 1
        found = predict(val)
        z = np.where(t.numbers, found, scipy.special.logit(found.clip(1e-12, 1 - 1e-12)))
        value, since = validation_value(z, t.y[val], t.numbers, recipe.by_loss), since + 1
        if not best >= value:                           # also where value is NaN
            best, since, on_val = value, 0, found
            weights = copy.deepcopy(learner.state_dict())
        elif since == recipe.patience:
            break
    learner.load_state_dict(weights)
    return on_val, predict(test)


def yes_no(y):
    """Which columns of labels y (n, K) hold 0 and 1, apart from NaN: (K,) bool."""
    answer = np.isin(y, (0, 1))
    return answer.any(0) & (answer | np.isnan(y)).all(0)


def quick_probe(encoder, ds, columns, parts, by_loss=False):
    """Logits on the first crops of validation and test records by a linear probe on those of the
    training records. parts: the three row numbers. (len(val), K), (len(test), K)."""
    rows = np.concatenate(parts)
    train, val, test = np.split(np.arange(len(rows)), np.cumsum([len(p) for p in parts[:2]]))
    X = embed(encoder, ds, rows, first=True)
    weights, z = linear_probe(X, ds.labels[rows][:, columns], train, val, by_loss=by_loss)
    return z, apply(weights, X[test])


def online_probe(encoder, ds, most):
    """Macro AUROC of a linear probe on the first crops of `most` labelled training records and half
    as many for validation, a rough gauge of progress. NaN if there are too few yes/no labels."""
    columns = next((c for task, c in ds.tasks.items() if task != 'tail'), [])     # tail: too rare
    parts = []                               # of 20 * most records: reading labels must stay quick
    for rows in ds.split()[:2]:
        rows = rows[ds.length[rows] >= encoder.samples][:20 * most]
        parts.append(rows[np.isfinite(ds.labels[rows][:, columns]).any(1)][:most])
    train, val = parts[0], parts[1][:most // 2]
    columns = np.array(columns, int)[yes_no(ds.labels[train][:, columns])]
    if min(len(train), len(val)) < 20 or not len(columns):
        return math.nan
    cut = len(train) * 4 // 5
    _, z = quick_probe(encoder, ds, columns, (train[:cut], train[cut:], val))
    return macro_auroc(z, ds.labels[val][:, columns])


# -------------------------------------------------------------------------------------------------
# a task: one dataset, the labels that one model learns, the records to train and to test on

def plans(ds, rows, seen=(), folds=None, allow=False):
    """([(training, validation, test rows) of each probe to fit], test records of patients in
    `seen`).

    With under 1,000 records each fold is the test fold once, else only the last fold. The fold
    before it validates, all others train. folds: one triple of fold numbers instead. Fold -1 always
    trains. A recording or patient of the test fold is in no other part. `seen`: the names on which
    the encoder was pretrained; a test fold that has one of them is left out, unless `allow`. Raises
    Stop with under three folds, and where every fold is left out."""
    names = np.unique(ds.fold[rows])
    names = names[names >= 0]
    if len(names) < 3:
        raise Stop(f'{ds.name}: the labelled records lie in {len(names)} folds; training, '
                   'validation and test need three: prepare more records')
    held = zip(np.roll(names, 1), names)
    triples = [(np.setdiff1d(np.append(names, -1), pair), *pair) for pair in held]
    triples = [folds] if folds else triples if len(rows) < 1000 else triples[-1:]
    clean, known, leaks = [], overlap(ds, set(seen)), 0
    for triple in triples:
        train, val, test = (rows[np.isin(ds.fold[rows], part)] for part in triple)
        tested = overlap(ds, ds.names(test))                 # joined sets may hold it twice
        leaks += known[test].sum()
        if allow or not known[test].any():
            clean.append((train[~tested[train]], val[~tested[val]], test))
    if leaks:
        print(f'  {leaks:,} test records are of patients seen in pretraining: '
              f'{len(triples) - len(clean)} of {len(triples)} test folds are left out')
    if not clean:
        raise Stop(f'{ds.name}: the encoder was pretrained on patients of every test fold: take '
                   'other data, pretrain on its training folds, or --allow overlap')
    return clean, leaks


def draw_labels(train, val, count, draw):
    """`count` labelled records out of train and val, a fifth of them for validation; 'all' keeps
    both as they are."""
    if count == 'all':
        return train, val
    rows = np.random.default_rng([draw, count]).permutation(np.concatenate([train, val]))[:count]
    return rows[count // 5:], rows[:count // 5]


def first_task(ds):
    """The task taken where none is named."""
    for name in ('findings', 'super', 'snomed', 'dx2020', 'label', 'sequence'):
        if name in ds.tasks:
            return name
    raise Stop(f'{ds.name} has no labels to predict: prepare it with labels, or name another set '
               'with --data')


def code(label):
    """The label without its set: IMI of diag/IMI."""
    return label.split('/', 1)[-1]


def columns_of(ds, task):
    """Columns of a task of the papers, of a label set, or of a label named without its set."""
    alike = [name for name in ds.label_names if task.lower() == code(name).lower()]
    if task in TASKS:
        task = TASKS[task].scored
    elif task not in ds.tasks:
        task = '+'.join(alike) or task
    return ds.columns(task)


def check_contract(run, ds):
    """Raises Stop where a run was trained on data that were prepared otherwise."""
    c = run['contract']
    if differs := Contract.read(c).differs(ds.contract):
        raise Stop(f'{run["path"]} was trained under another contract than datasets/{ds.name} '
                   f'({differs}): prepare the data with --fs {c["fs"]} --filter {c["filter"]} '
                   f'--norm {c["norm"]}, or --allow contract')


def say(text, names):
    """Print a line with names, if there are any."""
    if len(names):
        print(f'  {text}{", ".join(names)}')


class Task:
    """What encoders are scored on: a task on a dataset.

    name: a task of the papers, a label set or a label of the data; None: the first. runs: whose
    encoders will be scored. allow: overlap, contract. unlabelled: keep or drop records that have
    none of the yes/no labels. folds: (training, validation, test) fold numbers in place of the
    task's own. Prints which labels and records are left out.

    ds        the Dataset
    labels    names of the K columns that are trained on
    y         (len(ds), K), NaN for unknown; numbers less their mean, in SD of the training records
    numbers   (K,) bool: which columns are numbers
    sd        (K,): their SD in the data's unit, 1 for classes
    columns   columns of y that the task is scored on
    plans     [(training, validation, test rows)], leaks: see `plans`
    test      rows of all test records; group: the plan, patient: the patient of each
    rows      rows of all plans; available: the labelled records of one plan

    Raises Stop where nothing can be scored."""

    def __init__(self, data, name, runs, allow=(), unlabelled='keep', folds=None):
        target = TASKS.get(name)
        if target and data == target.data and not Path('datasets', data).exists():
            raise Stop(f'task {name} needs datasets/{data}: {target.prepare}')
        self.ds = Dataset(data)
        for run in runs:
            if 'contract' not in allow:
                check_contract(run, self.ds)
        self.name = name or first_task(self.ds)
        self.choose_labels(target)
        rows = self.labelled(max(run['net'].samples for run in runs), unlabelled)
        seen = set().union(*(run['seen'] for run in runs))
        self.plans, self.leaks = plans(self.ds, rows, seen, folds or target and target.folds,
                                       'overlap' in allow)
        self.rows = np.unique(np.concatenate([part for plan in self.plans for part in plan]))
        self.available = min(len(train) + len(val) for train, val, _ in self.plans)
        trained = np.ma.masked_invalid(self.y[self.plans[0][0]])
        self.sd = np.where(self.numbers, trained.std(0).filled(math.nan).clip(1e-9), 1)
        mean = np.where(self.numbers, trained.mean(0).filled(math.nan), 0)
        self.y = ((self.y - mean) / self.sd).astype(np.float32)
        self.choose_tests()

    def choose_labels(self, target):
        """The labels that are yes and no often enough, and the numbers."""
        least = target.least if target else 1
        columns = self.ds.columns(target.trained) if target else columns_of(self.ds, self.name)
        y = np.array(self.ds.labels[:, columns])
        numbers = ~yes_no(y) & np.isfinite(y).any(0)
        kept = numbers | (np.minimum((y > 0).sum(0), (y == 0).sum(0)) >= least)
        labels = np.array(self.ds.label_names)[columns]
        say(f'left out, yes or no in under {least} records: ', labels[~kept])
        if not kept.any():
            raise Stop(f'{self.ds.name}, task {self.name}: too few positives: no label is yes, '
                       f'and no, in {least} of {len(y):,} records')
        self.labels, self.y, self.numbers = labels[kept].tolist(), y[:, kept], numbers[kept]

    def labelled(self, samples, unlabelled):
        """Rows of the records that last `samples` and have labels."""
        rows = np.flatnonzero((self.ds.length >= samples) & np.isfinite(self.y).any(1))
        if len(rows) < len(self.y):
            print(f'  {len(self.y) - len(rows):,} of {len(self.y):,} records are left out: too '
                  'short, or no label is known')
        none = ~(self.y[rows] > 0).any(1) & ~self.numbers.any()
        if none.any():
            print(f'  {none.sum():,} of {len(rows):,} records have none of these labels: ' + (
                'left out' if unlabelled == 'drop' else "kept as negatives, as in the papers' "
                'code; --unlabelled drop leaves them out'))
        return rows[~none] if unlabelled == 'drop' else rows

    def choose_tests(self):
        """The test records, and the columns that can be scored on them."""
        tests = [test for _, _, test in self.plans]
        self.test = np.concatenate(tests)
        self.group = np.repeat(range(len(tests)), list(map(len, tests)))
        self.patient, y = self.ds.patient[self.test], self.y[self.test]
        scored = scorable(y, self.numbers, self.group)
        train, val, _ = self.plans[-1]
        people = len(set(self.patient))
        print(f'  tested: {len(y):,} records of {people:,} patients, fold by fold ({len(tests)}); '
              f'for the last fold {len(train):,} records train, {len(val):,} validate; '
              f'{len(scored)} labels are learned')
        say('trained on, but without both values in the test records: ',
            np.array(self.labels)[~scored])
        wanted = [self.ds.label_names[c] for c in columns_of(self.ds, self.name)]
        for key in (str, code):               # by name, else without the set: diag/IMI is all/IMI
            keys = set(map(key, wanted))
            self.columns = [k for k in np.flatnonzero(scored) if key(self.labels[k]) in keys]
            if self.columns:
                break
        if people < 10 or (y[:, self.columns] > 0).sum(0).max(initial=0) < 3:
            raise Stop(f'{self.ds.name}, task {self.name}: too little to score. It needs 10 test '
                       f'patients (here {people}), and a label that 3 test records have and others '
                       'do not: prepare more records')

    @functools.lru_cache(4)
    def embedding(self, encoder):
        """Embeddings (len(ds), D) of all rows that a plan needs."""
        X = np.zeros((len(self.ds), encoder.dim))
        X[self.rows] = embed(encoder, self.ds, self.rows)
        return X

    @functools.lru_cache(1)
    def tokens(self, encoder):
        """Tokens of all rows that a plan needs, of one encoder at a time."""
        return Tokens(encoder, self.ds, self.rows)

    def score(self, outputs):
        """`estimates` of the task, from outputs[seed][draw] = (scores, margins)."""
        c = self.columns
        outputs = [[[x[:, c] for x in output] for output in of_seed] for of_seed in outputs]
        return estimates(outputs, self.y[self.test][:, c], self.numbers[c], self.patient,
                         self.group)


def train_and_score(t, encoder, plan, arm, count, seed, draw):
    """Scores of one training on validation and on test records, and the labels of validation."""
    (train, val), test = draw_labels(*plan[:2], count, draw), plan[2]
    if arm.mode == 'knn':
        X = t.embedding(encoder)
        return knn(X, t.y, train, val), knn(X, t.y, np.append(train, val), test), t.y[val]
    if arm.mode == 'linear' and arm.recipe.solved:
        X = t.embedding(encoder)
        weights, z = linear_probe(X, t.y, train, val, t.numbers)
        return z, apply(weights, X[test]), t.y[val]
    start = None
    if arm.recipe.preview:                              # not refitted: validation chooses the epoch
        X = t.embedding(encoder)
        start, _ = linear_probe(X, t.y, train, val, t.numbers, refit=False)
    source = t.tokens(encoder) if arm.mode == 'frozen' and arm.recipe.cached else t.ds
    # a seed of its own for each pair of pretraining seed and label draw
    return *fit(t, encoder, source, (train, val, test), arm, 1000 * seed + draw, start), t.y[val]


def digest(*things):
    """A short hash of arrays, tensors and whatever json can write."""
    h = hashlib.blake2b(digest_size=10)
    for x in things:
        x = x.cpu().numpy() if torch.is_tensor(x) else x
        h.update(x.tobytes() if isinstance(x, np.ndarray) else json.dumps(x).encode())
    return h.hexdigest()


# part of the key of kept scores: a change of these files makes new ones
SOURCE = digest(*((HERE / f'{name}.py').read_text() for name in ('data', 'models', 'evaluate')))


def predict(t, encoder, arm, count='all', seed=0, draw=0):
    """(scores, margins), each (n, K), of an encoder in an Arm on the test records of all plans;
    from out/scores where an earlier call left them. count: of labelled records; draw: which, the
    same for every encoder."""
    how = [SOURCE, t.ds.hash, t.labels, arm.mode, asdict(arm.recipe), count, seed, draw,
           encoder.samples, asdict(encoder.config), [list(map(len, plan)) for plan in t.plans]]
    rows = itertools.chain(*t.plans)
    file = Path('out/scores', digest(how, *encoder.state_dict().values(), *rows) + '.npz')
    if not file.exists():
        scores, margins = [], []
        for plan in t.plans:
            z, test, y = train_and_score(t, encoder, plan, arm, count, seed, draw)
            scores.append(test)
            margins.append(test - thresholds(z, y))
        file.parent.mkdir(parents=True, exist_ok=True)
        if not np.isfinite(np.concatenate(scores)).all():
            raise Stop(f'{arm.name}: scores that are not finite: take a lower rate, such as '
                       '--recipe lr=1e-4, or another encoder')
        partial = file.with_suffix(f'.{os.getpid()}.npz')        # another process may write it too
        np.savez(partial, scores=np.concatenate(scores), margins=np.concatenate(margins))
        partial.replace(file)
    found = np.load(file)
    return found['scores'], found['margins']


# -------------------------------------------------------------------------------------------------
# arms, tables, figures

# encoders: one for each pretraining seed; reference: the arm it is compared with
Arm = namedtuple('Arm', 'name encoders mode recipe reference', defaults=('',))
INTERVAL, DIFFERENCE = ('value', 'low', 'high'), ('diff', 'diff_low', 'diff_high')
KEY = ['data', 'task', 'mode', 'protocol', 'labels', 'metric']           # of rows in the tables


def grouped(runs):
    """{name: runs} of runs that differ in their seeds alone, named by their folder. Raises Stop
    where a seed is there twice, or groups have other seeds than each other, since differences are
    taken seed by seed."""
    free, groups = ('seed', 'log_every', 'save_every', 'probe_every', 'probe_records', 'keep'), {}
    for run in sorted(runs, key=lambda run: run['seed']):
        settings = {k: v for k, v in run['args'].items() if k not in free}
        groups.setdefault(str((run['step'], run['dataset'], settings)), []).append(run)
    seeds = {tuple(run['seed'] for run in group) for group in groups.values()}   # one if all agree
    if len(seeds) > 1 or len(set(*seeds)) < len(*seeds):
        raise Stop('differences are taken seed by seed, so each pretraining needs the same seeds, '
                   f'each once; here they are {sorted(seeds)}: add runs, or leave some out')
    paths = [group[0]['path'] for group in groups.values()]
    stems = [re.sub(r'(?<=[^@\d])_?\d+(?=@|$)', '', Path(path).name, count=1) for path in paths]
    names = stems if len(set(stems)) == len(stems) else paths
    return dict(zip(names, groups.values()))


def arms_of(families, mode, recipes, scratch=False, ablate=False):
    """The Arms of one table. Each pretraining is compared with its own untrained weights, and
    fine-tuning with training from scratch where scratch is asked for. ablate: each part of
    post-training alone and all together, compared with plain fine-tuning. families: see
    `grouped`; recipes: {mode: Recipe}."""
    arms = []
    for name, runs in families.items():
        nets, twins = [run['net'] for run in runs], [run['twin'] for run in runs]
        recipe, reference = recipes[mode], f'{name}, untrained'
        if scratch:
            arms.append(Arm(f'{name}, from scratch', twins, 'scratch', recipes['scratch']))
            reference = arms[-1].name if mode == 'finetune' else reference
        if ablate:
            recipe, reference = replace(recipe, schedule='constant'), f'{name}, plain'
            arms.append(Arm(reference, nets, mode, recipe))
            for part in (*POST, 'all'):
                changes = POST if part == 'all' else {part: POST[part]}
                post = replace(recipe, **changes)
                arms.append(Arm(f'{name}, {part}', nets, mode, post, reference))
        elif mode != 'scratch':
            arms.append(Arm(f'{name}, untrained', twins, mode, recipe))
            arms.append(Arm(name, nets, mode, recipe, reference))
    return arms


def write_csv(path, rows):
    """Write rows, whose keys may differ, under the union of their keys; to a temporary name first,
    so that a kill leaves the old file or the new one."""
    temporary = Path(f'{path}.partial')
    try:
        with open(temporary, 'w', newline='') as f:
            writer = csv.DictWriter(f, list(dict.fromkeys(k for row in rows for k in row)))
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def add_rows(path, rows, key):
    """Add rows to a CSV. A row replaces an older one with the same cells in the columns `key`."""
    old = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    write_csv(path, {tuple(str(row[k]) for k in key): row for row in old + rows}.values())


def evaluate_task(t, families, mode, a, out):
    """Score all arms of one mode on a Task: prints tables, adds to the CSVs, draws a figure."""
    recipes = {m: replace(r, **a.changes) for m, r in PROTOCOLS[a.protocol].items()}
    arms = arms_of(families, mode, recipes, 'scratch' in a.mode, a.ablate)
    jobs = [(arm, seed, encoder) for arm in arms for seed, encoder in enumerate(arm.encoders)]
    # the keys are the numbers of labelled records, each once, in the order asked for
    counts = {int(c * t.available) if isinstance(c, float) else c: None for c in a.labels}
    if short := [c for c in counts if c != 'all' and not 10 <= c <= t.available]:
        raise Stop(f'--labels {short}: from {t.ds.name}, 10 to {t.available:,} can be drawn')
    print(f'{mode}: {len(arms)} arms, {len(jobs)} encoders with all seeds; of {t.available:,} '
          f'labelled records each learns from {", ".join(map(str, counts))}')
    outputs = {(arm.name, count): [] for arm in arms for count in counts}
    for arm, seed, encoder in tqdm(jobs, 'encoders', leave=False, disable=None):
        for count in counts:
            draws = range(1 if count == 'all' else a.draws)
            outputs[arm.name, count].append([predict(t, encoder, arm, count, seed, draw)
                                             for draw in draws])
    for count in counts:
        protocol = ' '.join([a.protocol, a.unlabelled, *a.recipe])
        at = dict(data=t.ds.name, task=t.name, mode=mode, protocol=protocol, labels=count)
        name = slug(*at.values())
        print(f'\n{name}')
        at['labelled'] = t.available if count == 'all' else count
        found = {arm.name: t.score(outputs[arm.name, count]) for arm in arms}
        rows = tabulate(t, at, arms, families, found, out)
        print_table(rows, 'arm', 'metric', *INTERVAL, *DIFFERENCE, 'reference')
        main = rows[0]['metric']
        shown = [row | dict(name=row['arm']) for row in rows if row['metric'] == main]
        forest(out / f'{name}.png', shown, f'{name}: macro {main}')
        rivals = {arm.name: found[arm.name][0][main] for arm in arms
                  if a.ablate or arm.name in families}
        if len(rivals) > 1:
            pairs, ranks = compare(rivals, -1 if main == 'MAE' else 1, a.margin)
            print_table(pairs)
            print('rank (1 + number of arms that are surely better): '
                  + ', '.join(f'{ranks[n]} {n}' for n in sorted(ranks, key=ranks.get)))
            add_rows(out / 'pairs.csv', [dict(at, metric=main, **row) for row in pairs],
                     [*KEY, 'a', 'b'])


def print_table(rows, *columns):
    """Print rows as an aligned table."""
    import pandas as pd
    table = pd.DataFrame(rows, columns=columns or None)
    print(table.to_string(index=False, float_format='{:.3f}'.format, na_rep=''))


def tabulate(t, at, arms, families, found, out):
    """Add the scores to summary.csv (a row for each arm and metric), seeds.csv (each run) and
    classes.csv (each label), and return the rows of summary.csv. found: {arm: what Task.score
    returns}; at: the cells that all rows share. MAE is in SD of the training records, in
    classes.csv in the unit of the data."""
    rows, seeds, classes = [], [], []
    for arm in arms:
        for metric, e in found[arm.name][0].items():
            here = dict(at, metric=metric)
            row = dict(here, arm=arm.name, n=len(t.test), patients=len(set(t.patient)),
                       seeds=len(arm.encoders), reference=arm.reference)
            share = metric in ('AUROC', 'AUPRC', 'F1')
            row |= zip(INTERVAL, np.clip(interval(e), 0, 1) if share else interval(e))
            if arm.reference:
                row |= zip(DIFFERENCE, interval(minus(e, found[arm.reference][0][metric])))
            rows.append(row)
            for run, point in zip(families.get(arm.name, ()), e.points.mean(1)):
                facts = {k: run['args'][k] for k in ('objective', 'backbone', 'size', 'seed')}
                seeds.append(dict(here, run=run['path'], step=run['step'], **facts, point=point))
            for k, value in zip(t.columns, found[arm.name][1][metric]):
                unit, y = t.sd[k] if metric == 'MAE' else 1., t.y[t.test, k]
                classes.append(dict(here, arm=arm.name, label=t.labels[k], value=value * unit,
                                    known=np.isfinite(y).sum(), positive=(y > 0).sum()))
    add_rows(out / 'summary.csv', rows, [*KEY, 'arm'])
    add_rows(out / 'seeds.csv', seeds, [*KEY, 'run'])
    add_rows(out / 'classes.csv', classes, [*KEY, 'arm', 'label'])
    return rows


def slug(*words):
    """Words as part of a file name."""
    return re.sub('[^\\w.@-]+', '-', '_'.join(map(str, words)))


def figure(width, height, columns=1):
    """A matplotlib figure of so many inches, and its axes (rows, columns)."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(width, height), layout='constrained')
    return fig, fig.subplots(1, columns, squeeze=False)


def forest(path, rows, title):
    """Values with their intervals. rows: dicts of name, value, low, high, and a colour if any."""
    fig, [[ax]] = figure(8, .3 * len(rows) + 1)
    for i, row in enumerate(rows):
        ax.plot([row['low'], row['value'], row['high']], [i] * 3, 'o-',
                c=row.get('colour', 'C0'), markevery=[1])
    ax.set_yticks(range(len(rows)), [row['name'] for row in rows])
    ax.invert_yaxis()
    ax.set_title(title)
    fig.savefig(path, dpi=120)


# -------------------------------------------------------------------------------------------------
# from Python, and the command line

BOX = HERE / 'sample/encoder'                             # the encoder that comes with the code


@torch.no_grad()
def embed_array(x, fs, leads=LEADS, unit='mV', run=BOX):
    """Embeddings (N, D) float32 of N recordings by a pretrained encoder: the mean over its tokens
    and the recording's consecutive crops.

    x (N, T, C), or N arrays (T, C) of any lengths, in `unit` (mV, uV or V) at `fs` Hz; leads: names
    of the C columns, in any order, the twelve among them. run: a run folder or a checkpoint's file,
    by default the encoder in sample/. Resampled and filtered as the pretraining data were. Raises
    ValueError with the first recording that cannot be used, and why. Warns where limb leads
    contradict each other."""
    checkpoint, out = load(run), []
    encoder, contract = load_encoder(checkpoint), Contract.read(checkpoint['contract'])
    for i, signal in enumerate(map(np.asarray, x)):
        if signal.shape[1:] != (len(leads),):
            raise ValueError(
                f'recording {i} is {signal.shape}: (T, {len(leads)}) is needed; one alone: x[None]')
        record = Record(str(i), x=signal, fs=fs, leads=leads, unit=unit)
        record, counts, facts = process(record, contract, encoder.config.backbone == 'beat')
        if counts is None:
            raise ValueError(f'recording {i}: {facts}')
        if facts['odd']:
            warnings.warn(f'recording {i}: the limb leads contradict each other; check `leads`')
        h = []
        for start in range(0, len(counts) - encoder.samples + 1, encoder.samples):
            crop = torch.from_numpy(counts[start:start + encoder.samples].T * contract.scale)
            peaks = torch.from_numpy(record.r_peaks - start)
            peaks = peaks[(peaks >= 0) & (peaks < encoder.samples)]
            h.append(mean_pool(*encoder(dict(x=crop[None].float(), peaks=peaks[None]))))
        out.append(torch.cat(h).mean(0))
    return torch.stack(out).numpy()


def open_run(path, device=None):
    """A run: the dict of its checkpoint, and in it net and twin (the encoder after and before
    pretraining, on the device), path, and seen (names of the training records). path: a run folder,
    a checkpoint's file, or out/run@20 for the copy that --keep 20 made. Raises Stop where there is
    none, or none of this version."""
    path = re.sub(r'/ckpt_?(\d*)\.pt$', r'@\1', str(path)).rstrip('@')
    folder, _, step = path.partition('@')
    try:
        run = load(Path(folder, f'ckpt_{step}.pt') if step else folder)
        run['net'] = load_encoder(run).to(pick_device(device))
        run['twin'] = load_encoder(run | dict(encoder=run['initial'])).to(run['net'].device)
        print(f'{path}: {run["objective"]} after {run["step"]:,} of {run["args"]["steps"]:,} steps '
              f'on {run["data"]}, seed {run["seed"]}, {count_parameters(run["net"]):,} parameters')
    except ValueError as e:
        there = sorted(map(str, Path(folder).rglob('ckpt*.pt')))
        raise Stop(f'{e}; checkpoints in {folder}: {there}')
    except (RuntimeError, KeyError, TypeError) as e:
        raise Stop(f'{path} is no checkpoint of train.py, or of another version of it: '
                   f'{" ".join(str(e).split())[:200]}')
    return run | dict(path=path, seen=read_seen(folder))


def newest():
    """The folder of the newest checkpoint in out/, else the encoder that comes with the code."""
    found = sorted(Path('out').glob('*/ckpt.pt'), key=lambda f: f.stat().st_mtime)
    return found[-1].parent if found else BOX


def list_tasks():
    """Print the papers' tasks, and their prepared data or the commands that prepare them."""
    for name, task in TASKS.items():
        there = Path('datasets', task.data).exists()
        print(f'{name:20s} {task.classes or "?":>5} labels  {task.metric:6s} '
              + (f'datasets/{task.data}' if there else task.prepare))


def label_count(text):
    """--labels: 'all' (also for 1), a fraction under 1 (float) or a number of records (int)."""
    value = 1. if text == 'all' else float(text)
    if not 0 < value < 1e9 or (value > 1 and value % 1):
        raise argparse.ArgumentTypeError('must be all, a fraction up to 1, or a number of records')
    return 'all' if value == 1 else value if value < 1 else int(value)


def recipe_change(text):
    """--recipe name=value: a field of Recipe and its value."""
    name, _, value = text.partition('=')
    kind = {field.name: field.type for field in fields(Recipe)}.get(name)
    words = {'True': True, 'False': False} if kind is bool else dict(cosine='cosine',
                                                                     constant='constant')
    try:
        return name, words[value] if kind in (bool, str) else kind(value)
    except (KeyError, TypeError, ValueError):
        raise Stop(f'--recipe {text}: write NAME=VALUE with a name of --help; the value is a '
                   'number, True or False, or a schedule (cosine, constant)')


def make_parser():
    """The command line's flags."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add('runs', nargs='*', help='run folders; those alike but for seeds are averaged, others '
        'compared (default: the newest in out/, else sample/encoder)')
    add('--data', nargs='+', help="prepared datasets (default: the task's, else synthetic, sample)")
    add('--task', nargs='+', help='tasks of the papers (--list), label sets or labels of the data '
        '(default: findings, super, snomed, ..., what there is)')
    add('--mode', nargs='+', choices=MODES, default=['linear'],
        help='see above (linear); beside another mode, scratch is a further arm of its tables')
    add('--protocol', choices=list(PROTOCOLS), default='quick',
        help='quick (default): minutes on a CPU; released: 100 epochs of random crops as in '
        '2605.12241; sc: as in 2605.17276')
    add('--recipe', nargs='+', default=[], metavar='NAME=VALUE',
        help='changes to the protocol: ' + ', '.join(field.name for field in fields(Recipe)))
    add('--labels', nargs='+', type=label_count, default=['all'],
        help='how many labelled records to learn from: numbers, fractions, or all (all)')
    add('--draws', type=int, choices=range(1, 10), default=3,
        help='random choices of the labelled records, if not all (3)')
    add('--unlabelled', choices=['keep', 'drop'], default='keep',
        help='records with none of the labels: as negatives (keep), or left out')
    add('--ablate', action='store_true', help='finetune: the parts of post-training (2509.12991) '
        f'one by one and together: {", ".join(POST)}')
    add('--margin', type=float, default=.01,
        help='differences within +-margin count as equivalent (.01)')
    add('--allow', nargs='+', choices=['overlap', 'contract'], default=[],
        help='overlap: test on patients that were pretrained on; contract: test on data that '
        'were prepared otherwise than those of pretraining')
    add('--list', action='store_true',
        help='show the tasks of the papers, and how to prepare their data')
    add('--out', help="folder of results (default: the run's; of several, and of sample/encoder, "
        'out/compare_...)')
    add('--device', help='cpu or cuda (default: cuda where there is one)')
    return p


def parse(argv=None):
    """The arguments, checked."""
    a = make_parser().parse_args(argv)
    a.changes = dict(map(recipe_change, a.recipe))
    if 'epochs' in a.changes:                           # --recipe epochs=3 means three
        a.changes.setdefault('least_steps', 0)
    if a.ablate and a.mode != ['finetune']:
        raise Stop('--ablate needs --mode finetune, and no other mode beside it')
    return a


def main(argv=None):
    """The command line: see the top of the file."""
    a = parse(argv)
    if a.list:
        return list_tasks()
    runs = [open_run(path, a.device) for path in a.runs or [newest()]]
    families = grouped(runs)
    alone = Path(runs[0]['path'].partition('@')[0])
    out = Path(a.out or (f'out/compare_{slug(*families)[:100]}'         # nothing goes into sample/
                         if len(runs) > 1 or alone.resolve() == BOX else alone))
    out.mkdir(parents=True, exist_ok=True)
    for name in a.task or [None]:
        target = TASKS.get(name)
        if name and not target and not a.data:
            raise Stop(f'--task {name} is no task of the papers (see --list): name the dataset '
                       'that has it with --data')
        for data in a.data or ([target.data] if target else ['synthetic', 'sample']):
            print(f'\n{data}')
            t = Task(data, name, runs, a.allow, a.unlabelled)
            for mode in [mode for mode in a.mode if mode != 'scratch'] or ['scratch']:
                evaluate_task(t, families, mode, a, out)
    if len(runs) < 3 * len(families):
        print('under three pretraining seeds there is no verdict; intervals of two are very wide, '
              'and those of one seed leave out the variance between seeds')
    print('low, high: 95 % interval. diff: the value less that of the reference, paired by record '
          f'and seed, with its 95 % interval. Tables and figures are in {out}/')


if __name__ == '__main__':
    run_script(main)
