"""What is a pretrained encoder worth? Probes, fine-tuning and training from scratch, each number with its interval.

    python evaluate.py                                   # the newest run: synthetic held-out records, then the 500 real ones
    python evaluate.py out/a out/b out/c                 # several pretraining seeds: intervals include their variance
    python evaluate.py out/a --data ptbxl --task super --mode frozen
    python evaluate.py out/a --against out/b             # paired differences to another pretraining instead of to a random encoder
    python evaluate.py --list                            # prepared datasets and their tasks

Modes, as in arXiv 2605.12241: linear (mean pooling, frozen encoder), frozen (attention pooling, frozen encoder), finetune
(everything learns). Beside the pretrained encoder stand a random one, whose BatchNorm has seen data, and one trained from scratch.
"""
import argparse, copy, csv, hashlib, json, sys, time
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import Contract, Dataset, Stop, figure
from models import (AttentionPool, Config, Encoder, MeanPool, groups, learning_rate, load, load_encoder, pick_device, pool, precision,
                    see_data, to_device)


# ---------------------------------------------------------------------------------------------------------------------
# metric and intervals

def auroc(score, y, group=None, weight=None):
    """AUROC of each class, by pair counting: the share of (positive, negative) pairs ranked rightly, ties counting half.

    score, y (n, K), NaN in y for unknown; group (n,): only pairs within a group count (folds, whose scores come from different
    probes); weight (R, n): R resamples as counts per record. Returns (R, K), NaN for a class without both labels in any group.
    """
    weight = np.ones((1, len(y))) if weight is None else weight
    group = np.zeros(len(y), int) if group is None else group
    out = np.full((len(weight), y.shape[1]), np.nan)
    for k in range(y.shape[1]):
        known = np.flatnonzero(np.isfinite(y[:, k]))
        known = known[np.lexsort((score[known, k], group[known]))]
        s, g, positive, w = score[known, k], group[known], y[known, k] > 0, weight[:, known]
        if not positive.any() or positive.all():
            continue
        negative = np.concatenate([np.zeros((len(w), 1)), np.cumsum(w * ~positive, 1)], 1)   # weight of negatives before each rank
        new_group = np.r_[True, g[1:] != g[:-1]]
        new_value = new_group | np.r_[True, s[1:] != s[:-1]]
        start = lambda new: np.flatnonzero(new)[np.cumsum(new) - 1]                          # first rank of one's block
        end = lambda new: np.r_[np.flatnonzero(new)[1:], len(s)][np.cumsum(new) - 1]         # one past its last
        at = lambda rank: negative[:, rank[positive]]
        below, ties = at(start(new_value)) - at(start(new_group)), at(end(new_value)) - at(start(new_value))
        pairs = (w[:, positive] * (at(end(new_group)) - at(start(new_group)))).sum(1)
        with np.errstate(invalid='ignore'):
            out[:, k] = (w[:, positive] * (below + ties / 2)).sum(1) / pairs
    return out


def resample_patients(patient, resamples=1000, seed=0):
    """Bootstrap over patients: how often each record counts in each resample, (R, n)."""
    names, index = np.unique(patient, return_inverse=True)
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return counts[:, index].astype(float)


def macro(table):
    """Mean over the classes that have both labels: (R, K) -> (R,)."""
    return np.nanmean(table, axis=1)


def interval(points, boot):
    """95 % interval of the mean over runs. points (S, draws): macro value per seed and label draw; boot (R,): bootstrap of their
    mean, resampling patients.

    Independent sources of variance add in squares: the patients (bootstrap percentiles), the seeds and the label draws (Student t
    over the means of each, where there is more than one). Returns (mean, low, high)."""
    mean, squares = points.mean(), 0.
    for means in (points.mean(1), points.mean(0)):
        if len(means) > 1:
            squares += (scipy.stats.t.ppf(.975, len(means) - 1) * means.std(ddof=1)) ** 2 / len(means)
    low, high = np.percentile(boot, [2.5, 97.5])
    return mean, mean - np.hypot(mean - low, squares ** .5), mean + np.hypot(high - mean, squares ** .5)


class Score:
    """Test predictions on the same records, as macro AUROC. scores: list over seeds of lists over label draws of (n, K). Every Score
    of the same records shares their resamples, and draw d is the same labelled records for every seed, so differences are paired."""

    def __init__(self, scores, y, patient, group):
        weight = resample_patients(patient)
        tables = [[auroc(s, y, group)[0] for s in draws] for draws in scores]
        self.point = np.array([[macro(t[None])[0] for t in draws] for draws in tables])      # (S, draws)
        self.boot = np.mean([np.concatenate([macro(auroc(s, y, group, w)) for w in np.array_split(weight, 10)])   # a tenth of the memory
                             for draws in scores for s in draws], 0)                         # (R,)
        self.per_class = np.mean([t for draws in tables for t in draws], 0)

    def interval(self):
        return interval(self.point, self.boot)

    def minus(self, other):
        return interval(self.point - other.point, self.boot - other.boot)


# ---------------------------------------------------------------------------------------------------------------------
# embeddings and the linear probe

@torch.no_grad()
def per_record(encode, ds, rows, samples, device, name='predicting', first=False):
    """Mean over each record's consecutive crops of encode(batch) (B, K): (len(rows), K). first: its first crop only."""
    assert len(set(rows)) == len(rows), 'a record is asked for twice'
    owner, start = (rows, np.zeros(len(rows), int)) if first else ds.crops(rows, samples)
    out = []
    size = max(1, 128 * 600 // samples)                          # crops at once: what a processor's cache likes
    for i in tqdm(range(0, len(owner), size), desc=name, leave=False, disable=None):
        with precision(device):
            out.append(encode(to_device(ds.collate(owner[i:i + size], start[i:i + size], samples), device)).double().cpu())
    place = {row: i for i, row in enumerate(rows)}
    place, out = torch.tensor([place[r] for r in owner]), torch.cat(out)
    total = torch.zeros(len(rows), out.shape[1], dtype=torch.float64).index_add_(0, place, out)
    return (total / torch.bincount(place, minlength=len(rows))[:, None]).numpy()


def embed(encoder, ds, rows, samples, device, name='embedding', first=False):
    """Mean over tokens and crops of the encoder's output: (len(rows), D)."""
    encoder = encoder.to(device).eval()
    return per_record(lambda batch: pool(*encoder(batch)), ds, rows, samples, device, name, first)


L2 = (.3, .1, .03, .01, 3e-3, 1e-3, 3e-4)


def logistic(X, Y, l2):
    """Converged multi-label logistic regression: minimises mean BCE over known labels, summed over classes, + l2 / 2 |W|^2.
    X (n, D) standardised, Y (n, K) with NaN. Returns (D + 1, K), the bias last.

    L-BFGS in the principal axes of X, each axis and class scaled by its curvature: the same minimum in far fewer steps."""
    X, Y = torch.from_numpy(X), torch.from_numpy(Y).double()
    known, D = Y.isfinite(), X.shape[1]
    T, share = torch.where(known, Y, 0.), known / known.sum(0).clamp(min=1)                  # an unknown label has no share
    variance, axes = torch.linalg.eigh(X.T @ X / len(X))
    Z, rate = torch.cat([X @ axes, X.new_ones(len(X), 1)], 1), (T * share).sum(0).clamp(1e-3, 1 - 1e-3)
    penalty = torch.cat([X.new_full((D, 1), l2), X.new_zeros(1, 1)])
    variance = torch.cat([variance.clamp(min=0), X.new_ones(1)])
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
    if v.grad.abs().max() > 1e-4:
        print(f'  the probe at l2 {l2} has not converged: gradient {v.grad.abs().max():.1e}', file=sys.stderr)
    return torch.cat([axes @ (v * scale)[:-1], (v * scale)[-1:]]).numpy()


def linear_probe(X, Y, train, val, test):
    """Linear probe on embeddings X (n, D): standardised on the labelled records, L2 chosen by macro AUROC on `val` (by BCE where
    no class has both labels there), refitted on train and val together. Returns scores (len(test), K)."""
    def fitted(rows, l2):
        mean, std = X[rows].mean(0), X[rows].std(0) + 1e-6
        w = logistic((X[rows] - mean) / std, Y[rows], l2)
        return lambda rows: (X[rows] - mean) / std @ w[:-1] + w[-1]

    known, best = np.isfinite(Y[val]), (-np.inf, None)
    for l2 in L2:                                                # from strong to weak: of equals the strongest
        z = fitted(train, l2)(val)
        table = auroc(z, Y[val])
        value = macro(table)[0] if np.isfinite(table).any() else -(np.logaddexp(0, z) - np.where(known, Y[val], 0) * z)[known].mean()
        best = max(best, (value, l2), key=lambda b: b[0])
    return fitted(np.concatenate([train, val]), best[1])(test)


# ---------------------------------------------------------------------------------------------------------------------
# heads and encoders trained by gradient: frozen, finetune, scratch

def predict(encoder, head, ds, rows, samples, device):
    """Mean over crops of the predicted probabilities: (len(rows), K)."""
    encoder.eval(), head.eval()
    return per_record(lambda batch: head(*encoder(batch)).float().sigmoid(), ds, rows, samples, device)


def fit(encoder, ds, columns, train, val, test, samples, mode, device, epochs, seed=0, lr=1e-3):
    """The downstream loop. frozen: attention pooling on a fixed encoder in eval mode; finetune: mean pooling, head at lr, backbone
    at lr / 10, stem at lr / 100; scratch: mean pooling, everything at 5 lr. One random crop per record and epoch, AdamW with weight
    decay 1e-3, cosine; the epoch with the best validation macro AUROC predicts. Returns scores (len(test), K)."""
    torch.manual_seed(seed)
    encoder, dim = copy.deepcopy(encoder).to(device), encoder.dim
    head = (AttentionPool if mode == 'frozen' else MeanPool)(dim, len(columns)).to(device)
    encoder.requires_grad_(mode != 'frozen')
    rates = {'frozen': (lr, 0, 0), 'finetune': (lr, lr / 10, lr / 100), 'scratch': (5 * lr,) * 3}[mode]
    parts = head, nn.ModuleList([encoder.blocks, encoder.norm]), encoder.stem
    optimiser = torch.optim.AdamW([g for part, rate in zip(parts, rates) for g in groups(part, rate)], lr=lr)
    batch_size = min(32, len(train))
    per_epoch, y = len(train) // batch_size, np.array(ds.labels[:, columns])
    best = (-1., None)
    for epoch in tqdm(range(epochs), desc=mode, leave=False, disable=None):
        encoder.train(mode != 'frozen'), head.train()
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            for group in optimiser.param_groups:
                group['lr'] = learning_rate(step, epochs * per_epoch, group['peak'])
            batch = to_device(ds.batch(train, samples, batch_size, seed, step), device)
            target = batch['y'][:, columns]
            with precision(device):
                logits = head(*encoder(batch)).float()
            known = target.isfinite()
            loss = F.binary_cross_entropy_with_logits(logits[known], target[known])
            if not loss.isfinite():
                raise Stop(f'{mode}: the loss is {loss.item()} at step {step}; try a lower rate')
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*encoder.parameters(), *head.parameters()], 1.)
            optimiser.step()
            optimiser.zero_grad()
        value = macro(auroc(predict(encoder, head, ds, val, samples, device), y[val]))[0]
        if not best[0] >= value:
            best = value, copy.deepcopy((encoder.state_dict(), head.state_dict()))
    encoder.load_state_dict(best[1][0])
    head.load_state_dict(best[1][1])
    return predict(encoder, head, ds, test, samples, device)


# ---------------------------------------------------------------------------------------------------------------------
# one dataset, one task

def plans(ds, rows, seen):
    """(train, val, test) row numbers of each probe to fit, and whether they are folds of a cross-validation: small datasets
    (under 2,000 records) predict every record once, larger ones their last fold. Test folds with patients in `seen` (those the
    encoder was pretrained on) are left out."""
    folds, small = np.unique(ds.fold[rows]), len(rows) < 2000
    if len(folds) < 3:
        raise Stop(f'{ds.name}: labelled records in {len(folds)} folds; three are needed for train, validation and test')
    if {name.split('/')[0] for name in [*seen, *ds.id]} >= {'ptb-xl', 'ptbxl'}:
        raise Stop('the Challenge cohort ptb-xl is PTB-XL under other names: pretrain on one of them and test on something else')
    which = lambda f: rows[ds.fold[rows] == f]
    result = [[rows[(ds.fold[rows] != f) & (ds.fold[rows] != folds[i - 1])], which(folds[i - 1]), which(f)] for i, f in enumerate(folds)]
    result = result if small else result[-1:]
    clean = [p for p in result if not seen & set(ds.patient[p[2]])]
    if not clean:
        raise Stop(f'{ds.name}: the encoder was pretrained on patients of every test fold: take other data, or pretrain on its training folds')
    if len(clean) < len(result):
        print(f'  {len(result) - len(clean)} of {len(result)} test folds hold patients seen in pretraining and are left out')
    return clean, small


def draw_labels(train, val, count, draw):
    """`count` labelled records out of train and val, a fifth of them to choose L2 or the epoch on; 'all' keeps the folds."""
    if count == 'all':
        return train, val
    rows = np.random.default_rng([draw, count]).permutation(np.concatenate([train, val]))[:count]
    return rows[count // 5:], rows[:count // 5]


def first_task(ds):
    """The task taken where none is named."""
    for name in ('findings', 'super', 'snomed', 'dx2020', 'label'):
        if name in ds.tasks:
            return name
    raise Stop(f'{ds.name} has no labels to predict: prepare it with labels, or name another set with --data')


class Task:
    """One dataset and task under one contract: its rows, labels and plans, and how to score an encoder on them."""

    def __init__(self, data, name, runs, device):
        self.ds, self.device = Dataset(data), device
        self.name = name or first_task(self.ds)
        self.columns = self.ds.columns(self.name)
        contract = Contract.read(runs[0]['contract'])
        for r in runs:
            if differs := Contract.read(r['contract']).differs(self.ds.contract):
                raise Stop(f'{r["path"]} was trained under another contract than datasets/{data} ({differs}): prepare the data with '
                           f'--fs {r["contract"]["fs"]} --filter {r["contract"]["filter"]} --norm {r["contract"]["norm"]}')
        self.samples = round(contract.window * contract.fs)
        y = np.array(self.ds.labels[:, self.columns])
        if not np.isin(y[np.isfinite(y)], (0, 1)).all():
            raise Stop(f'task {self.name} holds numbers, not yes/no labels')
        rows = np.flatnonzero((self.ds.length >= self.samples) & np.isfinite(y).any(1))
        self.plans, self.folded = plans(self.ds, rows, set().union(*(r['patients'] for r in runs)))
        self.test = np.concatenate([p[2] for p in self.plans])
        self.group = np.concatenate([np.full(len(p[2]), i) for i, p in enumerate(self.plans)])
        scored = np.isfinite(auroc(np.zeros((len(self.test), y.shape[1])), y[self.test], self.group)[0])
        self.unscored = [self.ds.label_names[c] for c, s in zip(self.columns, scored) if not s]
        self.columns = [c for c, s in zip(self.columns, scored) if s]
        if not self.columns:
            raise Stop(f'{data}, task {self.name}: no class has both labels among the {len(self.test)} test records; take more, or an '
                       f'encoder pretrained on other data, so that every fold can be tested on')
        self.y, self.patient = y[:, scored], self.ds.patient[self.test]
        same = np.array_equal(self.patient, self.ds.id[self.test])
        self.patients = None if same else len(set(self.patient))                             # None: the source names no patients
        self.available = min(len(p[0]) + len(p[1]) for p in self.plans)
        self.embeddings = {}

    def rows(self):
        return np.unique(np.concatenate([r for p in self.plans for r in p]))

    def embedding(self, encoder, name):
        """Embeddings of all rows that any plan needs, once per encoder: (len(ds), D)."""
        key = id(encoder)
        if key not in self.embeddings:
            rows = self.rows()
            X = np.zeros((len(self.ds), encoder.dim))
            X[rows] = embed(encoder, self.ds, rows, self.samples, self.device, name)
            self.embeddings[key] = encoder, X
        return self.embeddings[key][1]

    def scores(self, encoder, mode, count, seed, draw, epochs, name):
        """Test scores (n, K) of one encoder under one draw of labels."""
        out = []
        for train, val, test in self.plans:
            train, val = draw_labels(train, val, count, draw)
            if mode == 'linear':
                out.append(linear_probe(self.embedding(encoder, name), self.y, train, val, test))
            else:
                out.append(fit(encoder, self.ds, self.columns, train, val, test, self.samples, mode, self.device, epochs, 1000 * seed + draw))
        return np.concatenate(out)

    def score(self, encoders, mode, count, draws, epochs, name):
        """Score over all encoders (one per seed) and label draws, the same for each."""
        draws = 1 if count == 'all' else draws
        return Score([[self.scores(e, mode, count, seed, d, epochs, name) for d in range(draws)] for seed, e in enumerate(encoders)],
                     self.y[self.test], self.patient, self.group)


def random_encoders(runs, count, ds, samples):
    """`count` fresh encoders of the runs' shape whose BatchNorm has seen eight batches: of the training records that the runs were
    pretrained on where they are prepared, else of this dataset's."""
    if all(Path('datasets', name).is_dir() for name in runs[0]['data'].split(',')):
        ds = Dataset(runs[0]['data'])
    rows = ds.split()[0]
    rows, out = rows[ds.length[rows] >= samples], []
    for i in range(count):
        torch.manual_seed(10_000 + i)
        out.append(see_data(Encoder(Config(**runs[0]['config'])), (ds.batch(rows, samples, min(64, len(rows)), i, s) for s in range(8))))
    return out


def evaluate_task(runs, against, data, task, mode, counts, draws, epochs, scratch, out, device):
    """All arms on one dataset and task: prints the table, writes JSON files and figures, returns the rows of the CSV file. Differences
    are to the random encoder, or to the runs in `against`. With one run the random encoder is still averaged over three seeds where
    that is cheap, since its variance is large."""
    began, t = time.time(), Task(data, task, runs + against, device)
    pretrained, other = [load_encoder(r) for r in runs], str(Path(against[0]['path']).name) if against else 'random encoder'
    reference = [load_encoder(r) for r in against] or random_encoders(runs, 3 if len(runs) == 1 and mode == 'linear' else len(runs), t.ds, t.samples)
    print(f'\n{data}, task {t.name}: {len(t.test):,} test records of {t.patients or "unknown"} patients, {len(t.columns)} classes'
          + (f' ({len(t.unscored)} without both labels: {", ".join(t.unscored[:6])}{" ..." if len(t.unscored) > 6 else ""})' if t.unscored else '')
          + (f'; {len(t.plans)} folds, each record predicted by a probe that never saw its patient, pairs counted within folds' if t.folded else ''))
    print(f'{"labels":>8s}  {"arm":22s} macro AUROC  95 % interval    minus {other}')
    counts = [int(c * t.available) if isinstance(c, float) and c < 1 else 'all' if c == 1 else c for c in counts]
    rows, extra = [], dict(epochs='' if mode == 'linear' else epochs, draws=draws)
    for count in counts:
        if count != 'all' and not 10 <= count <= t.available:
            print(f'{str(count):>8s}  left out: between 10 and {t.available:,} labelled records can be drawn')
            continue
        arms = {}
        if count == 'all' and (scratch or mode in ('finetune', 'scratch')):
            torch.manual_seed(0)
            arms['from scratch'] = t.score([Encoder(Config(**r['config'])) for r in runs], 'scratch', count, draws, 2 * epochs, 'scratch')
        if mode != 'scratch':
            arms[other] = t.score(reference, mode, count, draws, epochs, other)
            arms['pretrained'] = t.score(pretrained, mode, count, draws, epochs, 'pretrained')
        for arm, score in arms.items():
            how = dict(mode='scratch', epochs=2 * epochs) if arm == 'from scratch' else dict(mode=mode)
            rows += report(runs, t, arm, {**extra, **how, 'labels': count}, score, arms.get(other))
    if mode == 'linear' and rows:
        draw_pca([(other, t.embedding(reference[0], '')), ('pretrained', t.embedding(pretrained[0], ''))], t,
                 out / f'pca_{t.ds.name.replace(",", "+")}.png')
    print('  * the interval of the paired difference excludes 0' if len(runs) > 1 else
          '  one pretraining seed: its variance is not in these intervals; give several runs to have it in them')
    print(f'  {time.time() - began:.0f} s')
    return rows


def report(runs, t, arm, how, score, reference):
    """Print one line of the table and write one JSON file per run (none for the reference); returns rows for the CSV file."""
    mean, low, high = np.clip(score.interval(), 0, 1)            # Student's t may reach beyond
    difference = score.minus(reference) if reference and score is not reference else None
    text = ''
    if difference:
        text = '{:+.3f} [{:+.3f}, {:+.3f}]'.format(*difference) + (' *' if len(runs) > 1 and difference[1] * difference[2] > 0 else '')
    note = f' ({how["epochs"]} epochs)' if how['epochs'] else ''
    print(f'{str(how["labels"]):>8s}  {arm + note:22s} {mean:.3f}        [{low:.3f}, {high:.3f}]   {text}')
    names, rows = [t.ds.label_names[c] for c in t.columns], []
    common = dict(data=t.ds.name, task=t.name, arm=arm, **how, n=len(t.test), patients=t.patients, metric='macro AUROC', mean=mean, low=low,
                  high=high, minus_reference=difference, runs=len(runs))
    for i, points in enumerate(score.point):
        seed = i if score is reference else runs[i]['seed']
        rows.append({**common, 'minus_reference': ' '.join(f'{v:.4f}' for v in difference or ()), 'classes': len(names), 'seed': seed, 'point': points.mean()})
        if score is not reference:
            result = dict(command=' '.join(sys.argv), checkpoint=runs[i]['hash'], contract=runs[i]['contract'], seed=seed, point=float(points.mean()),
                          **common, classes=names, left_out=t.unscored, per_class=dict(zip(names, score.per_class)))
            file = f'results_{t.ds.name.replace(",", "+")}_{t.name}_{how["mode"]}_{how["labels"]}_{seed}.json'
            (Path(runs[i]['path']) / file).write_text(json.dumps(result, indent=1))
    return rows


def draw_pca(arms, t, path):
    """First two principal components of the standardised embeddings, coloured by the two most frequent classes."""
    rows = t.rows()
    common = np.argsort(-np.nansum(t.y[rows], 0))[:2]
    fig, axes = figure(1, len(arms), figsize=(10, 4.6), layout='constrained')
    for ax, (name, X) in zip(axes, arms):
        X = (X[rows] - X[rows].mean(0)) / (X[rows].std(0) + 1e-6)
        U, S, _ = np.linalg.svd(X, full_matrices=False)
        ax.scatter(*(U[:, :2] * S[:2]).T, s=4, color='#cccccc', label='others')
        for c, color in zip(common, ('C0', 'C3')):
            ax.scatter(*(U[:, :2] * S[:2])[t.y[rows, c] > 0].T, s=6, color=color, label=t.ds.label_names[t.columns[c]])
        share = S ** 2 / (S ** 2).sum()
        ax.set_title(f'{name}: {100 * share[:2].sum():.0f} % of variance, effective rank {np.exp(-(share * np.log(share + 1e-12)).sum()):.1f}', size=9)
        ax.legend(fontsize=7)
    fig.savefig(path, dpi=120)


def draw_curve(rows, path):
    """AUROC against the number of labels, one panel per dataset."""
    sets = [d for d in dict.fromkeys(r['data'] for r in rows) if len({r['labels'] for r in rows if r['data'] == d}) > 1]
    if not sets:
        return
    fig, axes = figure(1, len(sets), figsize=(5.5 * len(sets), 4), layout='constrained', squeeze=False)
    for ax, data in zip(axes[0], sets):
        for arm, color in zip(dict.fromkeys(r['arm'] for r in rows if r['data'] == data), ('C7', 'C1', 'C0') if rows[0]['arm'] == 'from scratch' else ('C1', 'C0', 'C7')):
            mine = list({r['labels']: r for r in rows if r['data'] == data and r['arm'] == arm}.values())
            x = [list(dict.fromkeys(r['labels'] for r in rows if r['data'] == data)).index(r['labels']) for r in mine]
            y = np.array([[r['mean'], r['low'], r['high']] for r in mine])
            if len(y):
                ax.errorbar(x, y[:, 0], np.abs(y[:, 1:] - y[:, :1]).T, fmt='o-', capsize=3, color=color, label=arm)
        ticks = list(dict.fromkeys(str(r['labels']) for r in rows if r['data'] == data))
        ax.set_xticks(range(len(ticks)), ticks)
        ax.set(xlabel='labelled records', ylabel='macro AUROC', title=f'{data}, {rows[-1]["mode"]}')
        ax.legend()
    fig.savefig(path, dpi=120)


def open_run(path):
    """The checkpoint of a run folder, with its path and hash. Prints what was loaded."""
    path = Path(path).parent if Path(path).name == 'ckpt.pt' else Path(path)
    file = path / 'ckpt.pt'
    try:
        c = load(file)
    except ValueError as e:
        raise Stop(str(e))
    try:
        c |= dict(path=str(path), hash=hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest(), patients=set(c['patients']))
        encoder = load_encoder(c)
    except (RuntimeError, KeyError, TypeError) as e:
        raise Stop(f'{file} is no checkpoint of train.py, or of another version of it: {" ".join(str(e).split())[:200]}')
    if c['step'] < c['args']['steps']:
        print(f'{file} is of an unfinished run, {c["step"]} of {c["args"]["steps"]} steps: go on with python train.py --resume --out {path}')
    print(f'{file}: the {c["objective"]} student after {c["step"]:,} steps on {c["data"]}, seed {c["seed"]}, '
          f'{sum(p.numel() for p in encoder.parameters()):,} parameters in {len(c["encoder"])} tensors, all matched')
    return c


def alike(runs):
    """Stops unless the runs differ in nothing but their seeds, since they are averaged."""
    free = ('seed', 'log_every', 'save_every', 'probe_every', 'probe_records', 'tokenizer')
    unlike = [k for k in (runs[0]['args'] if runs else ()) if k not in free and len({str(r['args'].get(k)) for r in runs}) > 1]
    if unlike or len({r['step'] for r in runs}) > 1 or len({r['seed'] for r in runs}) < len(runs):
        raise Stop('several runs are averaged, so they must be alike but for their seeds; these '
                   + (f'differ in {", ".join(unlike)}' if unlike else 'share a seed, or are not equally far') + ': evaluate them one by one')


def labels(text):
    """--labels: all, a fraction up to 1, or a number of records."""
    if text == 'all':
        return text
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError('must be all, a fraction up to 1 or a number of records')
    return int(value) if value > 1 else value


def main(argv=None):
    """The command line: see the top of the file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='*', help='run folders (default: the newest in out/)')
    p.add_argument('--against', nargs='+', default=[], metavar='RUN', help='as many run folders to compare with, seed by seed, in place of random encoders')
    p.add_argument('--data', nargs='+', default=['synthetic', 'sample'], help='prepared datasets')
    p.add_argument('--task', help='label set to predict (default: the first of findings, super, snomed, dx2020, label)')
    p.add_argument('--mode', choices=['linear', 'frozen', 'finetune', 'scratch'], default='linear')
    p.add_argument('--labels', nargs='+', type=labels, help='numbers of labelled records, or fractions up to 1 '
                   '(default: 100 300 1000 all on synthetic data, else all)')
    p.add_argument('--draws', type=int, default=3, help='draws of few labels')
    p.add_argument('--epochs', type=int, default=3, help='of frozen and finetune; scratch takes twice as many')
    p.add_argument('--scratch', action=argparse.BooleanOptionalAction, help='train from scratch too (default: on synthetic data, unless --against)')
    p.add_argument('--device')
    p.add_argument('--list', action='store_true', help='show prepared datasets and their tasks')
    a = p.parse_args(argv)
    if a.list:
        for meta in sorted(Path('datasets').glob('[!.]*/meta.json')):
            try:
                m = json.loads(meta.read_text())
                print(f'{meta.parent.name}: {m["records"]:,} records; ' + ', '.join(f'{t} ({len(c)})' for t, c in m['tasks'].items()))
            except (ValueError, KeyError, TypeError):
                print(f'{meta.parent.name}: damaged, prepare it again')
        return
    found = [f for f in sorted(Path('out').glob('*/ckpt.pt'), key=lambda f: f.stat().st_mtime) if a.runs or load(f).get('step')]
    if not a.runs and not found:
        raise Stop('no run in out/: pretrain one with python train.py')
    if a.draws < 1 or a.epochs < 1:
        raise Stop('--draws and --epochs must be 1 or more')
    runs = [open_run(r) for r in a.runs or [found[-1].parent]]
    against = [open_run(r) for r in a.against]
    alike(runs), alike(against)
    if against and (len(against) != len(runs) or against[0]['contract'] != runs[0]['contract']):
        raise Stop('--against needs as many runs as are evaluated, with the same contract and window')
    out, rows, device = Path(runs[0]['path']), [], pick_device(a.device)
    for data in a.data:
        made = data.startswith('synthetic')
        counts = a.labels or ([100, 300, 1000, 'all'] if made and a.mode == 'linear' else ['all'])
        rows += evaluate_task(runs, against, data, a.task, a.mode, counts, a.draws, a.epochs, made and not against if a.scratch is None else a.scratch, out, device)
    if not rows:
        raise Stop('nothing was scored')
    name = [d.replace(',', '+') for d in a.data] if a.data != ['synthetic', 'sample'] else []
    name = '_'.join([*name, *([a.task] if a.task else []), a.mode, *(f'against_{Path(r["path"]).name}' for r in against[:1])])
    with open(out / f'results_{name}.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    draw_curve(rows, out / ('labels.png' if name == 'linear' else f'labels_{name}.png'))
    print(f'\ntables and figures are in {out}/: {", ".join(sorted(f.name for f in out.glob("*.png")))}, results_{name}.csv, results_*.json')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        raise Stop('stopped')
