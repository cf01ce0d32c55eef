"""Metrics, intervals and probes against brute force and closed forms; folds against leaks; the
command line."""
import copy
import csv
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F
from numpy.testing import assert_array_equal as equal
from torch import nn

import data
import evaluate
import train
from data import LEADS, TASKS, Dataset, Stop
from evaluate import (L2, POST, PROTOCOLS, Arm, Estimate, Recipe, Task, Tokens, add_rows, arms_of,
                      compare, draw_labels, embed, embed_array, estimates, fit, grouped, interval,
                      knn, linear_probe, logistic, loss_of, macro_auroc, metrics, open_run,
                      optimiser_groups, patient_weights, per_record, plans, predict, thresholds)
from models import AttentionPool, Config, Encoder, config_of, load
from .analyses import at_rate, cka, hsic, noisy, swap_arms, without
from .analyses import main as analyse

TINY = Config(dim=16, layers=1)
QUICK = PROTOCOLS['quick']
SHORT = '--batch 4 --size 4x12 --layers 1 --probe-every 0'


def generator(seed=0):
    return np.random.default_rng(seed)


def tiny(config=TINY):
    torch.manual_seed(0)
    return Encoder(config).eval()


def read(path):
    with open(path) as f:
        return list(csv.DictReader(f))


# -------------------------------------------------------------------------------------------------
# metrics

def tied(seed, n=60, K=3):
    """Scores with ties, labels with unknowns, groups, weights of two resamples."""
    rng = generator(seed)
    score, y = rng.integers(0, 6, (n, K)) * 1., rng.integers(0, 2, (n, K)) * 1.
    y[::5] = np.nan
    return score, y, rng.integers(0, 3, n), rng.integers(0, 4, (n, 2))


def table(score, y, group=None, weight=None, cut=2.5, number=False):
    """`metrics` of columns of one kind; a score above the cut says yes."""
    n, K = y.shape
    group = np.zeros(n) if group is None else group
    weight = np.ones((n, 1)) if weight is None else weight
    return metrics(score, score - cut, y, np.full(K, number), group, weight)


def count_pairs(score, y, group, weight):
    """AUROC of one class by looking at every pair."""
    right = total = 0.
    for i, j in itertools.product(range(len(y)), repeat=2):
        if y[i] == 1 and y[j] == 0 and group[i] == group[j]:
            won = (score[i] > score[j]) + .5 * (score[i] == score[j])
            right, total = right + weight[i] * weight[j] * won, total + weight[i] * weight[j]
    return right / total


def steps(score, y, weight):
    """Average precision of one class: from the highest threshold down, precision times the recall
    that the threshold adds."""
    known, total, before = np.isfinite(y), 0., 0.
    s, y, w = score[known], y[known], weight[known]
    for t in sorted(set(s), reverse=True):
        hits = w[(s >= t) & (y == 1)].sum()
        recall = hits / w[y == 1].sum()
        total += (recall - before) * hits / max(w[s >= t].sum(), 1e-12)
        before = recall
    return total


def test_metrics_equal_brute_force():
    score, y, group, weight = tied(0)
    folds, whole = table(score, y, group, weight), table(score, y, None, weight)
    for r, k in itertools.product(range(2), range(3)):
        s, t, w = score[:, k], y[:, k], weight[:, r]
        assert folds['AUROC'][k, r] == pytest.approx(count_pairs(s, t, group, w))
        assert whole['AUPRC'][k, r] == pytest.approx(steps(s, t, w))
        yes = s > 2.5
        hits, errors = w[yes & (t == 1)].sum(), w[yes & (t == 0) | ~yes & (t == 1)].sum()
        assert folds['F1'][k, r] == pytest.approx(2 * hits / (2 * hits + errors))


def test_average_precision_compares_ranks_between_groups():
    """Two probes of different scale, each without a fault."""
    y, group = np.array([[1, 1, 0, 0, 1, 1, 0, 0.]]).T, np.repeat([0, 1], 4)
    score = np.array([[4, 3, 2, 1, 400, 300, 200, 100.]]).T
    assert table(score, y, group)['AUPRC'] == 1 and table(score, y)['AUPRC'] < 1


def test_errors_of_numbers():
    score, y = generator().normal(size=(2, 40, 2))
    y[:9, 0] = np.nan
    found = table(score, y, number=True)
    assert np.allclose(found['MAE'][:, 0], np.nanmean(np.abs(score - y), 0))
    assert np.allclose(found['R2'][:, 0], 1 - np.nanmean((score - y) ** 2, 0) / np.nanvar(y, 0))


def test_weights_are_copies():
    rng = generator(1)
    score, y, weight = rng.random((30, 2)), rng.integers(0, 2, (30, 2)), rng.integers(0, 3, 30)
    copies = np.repeat(np.arange(30), weight)
    for number in (False, True):
        a = table(score, y, None, weight[:, None], .5, number)
        b = table(score[copies], y[copies], None, None, .5, number)
        assert np.allclose([*a.values()], [*b.values()], equal_nan=True)


def test_class_without_both_labels_is_not_scored():
    score, y = generator().random((10, 3)), np.zeros((10, 3))
    y[:5, 1], y[:, 2] = 1, 1
    found = table(score, y)
    assert all(np.isnan(found[m][[0, 2]]).all() for m in found)
    assert macro_auroc(score, y) == found['AUROC'][1, 0] and np.isnan(macro_auroc(score, y * 0))


def test_thresholds_give_the_best_f1():
    score, y, _, _ = tied(2, 25, 4)
    y[:, 3] = np.where(y[:, 3] == 1, 0, y[:, 3])                  # no positive
    found = thresholds(score, y)
    for k in range(3):
        best = max(table(score, y, cut=cut)['F1'][k, 0] for cut in np.arange(-.5, 6))
        assert table(score, y, cut=found)['F1'][k, 0] == best
    assert found[3] == np.inf


# -------------------------------------------------------------------------------------------------
# intervals, differences

def test_resamples_lose_no_class_and_have_the_right_spread():
    patient = generator().integers(0, 30, 50)
    weight = patient_weights(patient, 500)
    assert (weight > 0).all() and (weight[:, 0] == 1).all()
    equal(weight, weight[[list(patient).index(p) for p in patient]])
    alone, x = patient_weights(np.arange(400), 4000)[:, 1:], generator(1).normal(size=400)
    assert (x @ alone / alone.sum(0)).std() == pytest.approx(x.std() / 20, rel=.04)
    y, s = np.eye(1, 40).T, generator().random((40, 1))           # one positive
    found, _ = estimates([[(s, s)]], y, np.array([False]), np.arange(40), np.zeros(40))
    assert len(found['AUROC'].boot) == 1000 and np.isfinite(found['AUROC'].boot).all()


def spread(mean, sd, seed=0, n=1000):
    """n numbers with exactly this mean and SD."""
    z = generator(seed).normal(size=n)
    return mean + sd * (z - z.mean()) / z.std()


def test_interval_by_hand():
    boot, one = spread(.8, .01), np.array([[.8]])
    assert np.allclose(interval(Estimate(one, boot)), (.8, .8 - .019600, .8 + .019600), atol=1e-6)
    assert np.allclose(interval(Estimate(one, boot), .9)[2], .8 + .016449, atol=1e-6)
    three, patients, runs = np.array([[-.02, 0, .02]]), .01 ** 2, .02 ** 2 / 3
    for points, sources in ((three, 1), (three.T, 1), (three + three.T, 2)):        # both: 2
        variance = patients + sources * runs
        freedom = variance ** 2 // (sources * runs ** 2 / 2)      # rounded down
        half = scipy.stats.t.ppf(.975, freedom) * variance ** .5
        assert np.allclose(interval(Estimate(.8 + points, boot)), (.8, .8 - half, .8 + half))


def made(mean, sd=.002, noise=0, seeds=3):
    """The Estimate of seeds close to a mean."""
    points = mean + 1e-4 * np.arange(-1, 2)[:seeds, None]
    return Estimate(points, spread(points.mean(), sd, noise))


def test_verdicts_and_ranks():
    """a and b are alike and beat c; d is c's equal within the margin; e is too noisy to say."""
    scores = dict(a=made(.90, noise=1), b=made(.9001, noise=2), c=made(.80, noise=3),
                  d=made(.8, .0005, 4), e=made(.86, .1, 5))
    rows, ranks = compare(scores)
    verdict = {row['a'] + row['b']: row['verdict'] for row in rows}
    assert len(rows) == 10 and verdict['ab'] == verdict['cd'] == 'equivalent within 0.01'
    assert verdict['ac'] == verdict['bd'] == 'better'
    assert verdict['ae'] == verdict['de'] == "can't tell"
    assert ranks == dict(a=1, b=1, c=3, d=3, e=1)
    rows, ranks = compare(dict(low=made(.4), high=made(.6)), -1)  # of errors
    assert rows[0]['verdict'] == 'better' and ranks == dict(low=1, high=2)
    rows, _ = compare({mean: made(mean, seeds=2) for mean in (.8, .9, .9001)})
    assert {row['verdict'] for row in rows} == {"can't tell"}


def test_levels_of_a_comparison():
    """1 - .05 / m for m pairs; 90 % for equivalence, however many pairs."""
    scores = dict(a=made(.5, noise=1), b=made(.51, noise=2), c=made(.52, noise=3))
    e = evaluate.minus(scores['a'], scores['b'])
    edge = max(map(abs, interval(e, .9)[1:]))
    for margin, verdict in ((edge * 1.001, 'equivalent'), (edge * .999, 'worse')):
        (row, *_), _ = compare(scores, margin=margin)
        assert (row['difference'], row['low'], row['high']) == interval(e, 1 - .05 / 3)
        assert row['verdict'].startswith(verdict)


def test_estimates_are_paired():
    """The same patients are drawn for all; classes and numbers beside each other."""
    rng = generator()
    s, y = rng.random((80, 2)), np.c_[rng.integers(0, 2, 80), rng.normal(size=80)]
    rest = y, np.array([False, True]), rng.integers(0, 50, 80), np.zeros(80)
    (a, columns), (b, _) = (estimates([[(scores, s)]], *rest) for scores in (s, s + .5))
    equal(a['AUROC'].boot, b['AUROC'].boot)
    assert a['AUROC'].points == columns['AUROC'][0] == macro_auroc(s[:, :1], y[:, :1])
    assert a['MAE'].points == pytest.approx(np.abs(s - y)[:, 1].mean())


# -------------------------------------------------------------------------------------------------
# probes

def test_probe_is_at_its_optimum():
    rng = generator()
    X = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5))
    Y = rng.integers(0, 2, (300, 2)) * 1.
    Y[rng.random((300, 2)) < .2] = np.nan
    for l2, k in ((.1, 0), (1e-3, 1)):
        known = np.isfinite(Y[:, k])
        x, t = np.c_[X, np.ones(300)][known], Y[known, k]

        def loss(v):
            return np.mean(np.logaddexp(0, x @ v) - t * (x @ v)) + l2 / 2 * (v[:-1] ** 2).sum()

        found = scipy.optimize.minimize(loss, np.zeros(6), method='BFGS', options=dict(gtol=1e-8))
        assert np.allclose(logistic(X, Y, l2)[:, k], found.x, atol=1e-4)


def test_probe_of_numbers_equals_the_closed_form():
    """Ridge: w = (Z'Z / n + l2)^-1 Z'(y - mean) / n on centred Z, with the L2 of the least
    validation error. Classes beside numbers are learned as alone."""
    rng = generator()
    X = rng.normal(2, 3, (200, 4))
    Y = np.c_[X @ [1, -2, 0, .5] + rng.normal(size=200), X[:, 0] > 2]
    Y[rng.random(200) < .3, 0] = np.nan
    train_, val, numbers = np.arange(120), np.arange(120, 160), np.array([True, False])

    def closed(rows, l2):
        known = rows[np.isfinite(Y[rows, 0])]
        Z = (X - X[rows].mean(0)) / (X[rows].std(0) + 1e-6)
        middle, y = Z[known].mean(0), Y[known, 0]
        C = Z[known] - middle
        w = np.linalg.solve(C.T @ C / len(C) + l2 * np.eye(4), C.T @ (y - y.mean()) / len(C))
        return (Z - middle) @ w + y.mean()

    best = min(L2, key=lambda l2: np.nanmean(np.abs(closed(train_, l2) - Y[:, 0])[val]))
    weights, z = linear_probe(X, Y, train_, val, numbers)
    scores = evaluate.apply(weights, X)
    assert np.allclose(scores[:, 0], closed(np.arange(160), best))
    assert np.allclose(z[:, 0], closed(train_, best)[val])
    equal(weights[:, 1:], linear_probe(X, Y[:, 1:], train_, val)[0])
    assert macro_auroc(scores[160:, 1:], Y[160:, 1:]) > .99       # a linear rule
    once, _ = linear_probe(X, Y, train_, val, numbers, refit=False)
    assert np.allclose(evaluate.apply(once, X[val]), z)


def test_knn_equals_brute_force():
    rng = generator()
    X, Y, labelled = rng.normal(size=(60, 4)), rng.integers(0, 2, (60, 2)) * 1., np.arange(45)
    Y[rng.random((60, 2)) < .3] = np.nan
    Z = (X - X[:45].mean(0)) / (X[:45].std(0) + 1e-6)
    Z /= np.linalg.norm(Z, axis=1, keepdims=True)
    found = knn(X, Y, labelled, np.arange(45, 60), 5)
    for i, k in itertools.product(range(15), range(2)):
        near = sorted(labelled, key=lambda j: -Z[45 + i] @ Z[j])[:5]
        near = [j for j in near if np.isfinite(Y[j, k])]
        w = np.maximum(Z[near] @ Z[45 + i], 0) + 1e-9
        value = w @ Y[near, k] / w.sum() if near else 0
        assert found[i, k] == pytest.approx(value, abs=1e-6)


# -------------------------------------------------------------------------------------------------
# encoders on records, training by gradient

def test_per_record_mean_over_crops(here):
    ds, rows = Dataset('sample'), np.array([7, 3])
    got = per_record(lambda batch: batch['x'].mean(2) ** 2, tiny(), ds, rows)
    x = ds.crop(rows, np.zeros(2, int), 2400).view(2, 12, 4, 600)
    assert np.allclose(got, (x.mean(3) ** 2).mean(2), atol=1e-6)


class Short:
    """A Dataset whose records end after 600 samples, so that a random crop is the first one."""

    def __init__(self, ds):
        self.ds, self.length = ds, np.full(len(ds), 600)

    def __getattr__(self, name):
        return getattr(self.ds, name)

    def crops(self, rows, samples):
        return rows, np.zeros(len(rows), int)


@pytest.fixture
def short(here):
    """A task of two classes and a number on records of one crop, and rows of its three parts."""
    ds = Dataset('synthetic')
    columns = [ds.label_names.index(n) for n in ('findings/SB', 'findings/ST', 'target/hr')]
    y = ds.labels[:, columns] / np.float32([1, 1, 75])
    rows = [part[:24] for part in ds.split()]
    return SimpleNamespace(ds=Short(ds), y=y, numbers=np.arange(3) == 2), rows


def test_probe_on_kept_tokens_equals_the_probe_on_crops(short):
    """Kept tokens are standardised by those of the training records; here so is the encoder."""
    (t, rows), encoder = short, tiny()
    arm = Arm('a', [encoder], 'frozen', Recipe(6, batch=8))
    kept = fit(t, encoder, Tokens(encoder, t.ds, np.concatenate(rows)), rows, arm, 5)
    with torch.no_grad():
        h = encoder(t.ds.collate(rows[0], np.zeros(24, int), 600))[0].flatten(0, 1)
    like, scale = copy.deepcopy(encoder), 1 / h.std(0)
    like.norm = nn.Linear(16, 16)
    like.norm.load_state_dict(dict(weight=scale.diag(), bias=-h.mean(0) * scale))
    on_crops, other = (fit(t, like, t.ds, rows, arm, seed) for seed in (5, 6))
    assert all(np.allclose(a, b, atol=2e-3) for a, b in zip(kept, on_crops))    # half precision
    assert np.abs(other[1] - kept[1]).max() > .01                 # another seed is told apart


def test_kept_beat_tokens_equal_the_encoders(here, monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'half', torch.Tensor.float)
    ds, encoder = Dataset('synthetic'), tiny(Config('beat', 32, 1, 64, 1, dropout=0.))
    head, tokens = AttentionPool(32, 4), Tokens(encoder, ds, np.arange(12))
    owner, start = (x[::3] for x in ds.crops(np.arange(12), 600))
    kept = tokens.collate(owner, start, 600)
    assert kept['pad'].any()
    with torch.no_grad():
        wanted = head(*encoder(ds.collate(owner, start, 600)))
        assert torch.allclose(head(kept['h'], kept['pad']), wanted, atol=1e-5)


def test_fit_learns_a_copy(here):
    """Training on the records that it is then asked about must beat chance by far."""
    ds, rows, given = Dataset('synthetic'), np.arange(160), tiny()
    columns = [ds.label_names.index('findings/' + name) for name in ('PACE', 'LBBB')]
    t = SimpleNamespace(ds=ds, y=ds.labels[:, columns], numbers=np.zeros(2, bool))
    before = copy.deepcopy(given.state_dict())
    arm = Arm('a', [given], 'scratch', Recipe(12, 1e-2))
    _, test = fit(t, given, ds, [rows] * 3, arm)
    assert macro_auroc(test, t.y[rows]) > .8
    assert all(torch.equal(a, b) for a, b in zip(before.values(), given.state_dict().values()))


def test_the_epoch_is_chosen_on_validation(short, monkeypatch):
    """The epoch with the best validation value predicts. Patience stops after so many without a
    better one."""
    (t, rows), told, asked = short, iter([.1, .5, .2, .5, .4, .9]), []
    monkeypatch.setattr(evaluate, 'validation_value', lambda z, *_: asked.append(z) or next(told))
    recipe = replace(PROTOCOLS['sc']['linear'], patience=3)
    found, again = fit(t, tiny(), t.ds, [*rows[:2], rows[1]], Arm('a', [], 'linear', recipe))
    equal(found, again)                                           # by the same weights
    assert len(asked) == 5 and np.allclose(found[:, 2], asked[1][:, 2])
    assert np.allclose(found[:, :2], 1 / (1 + np.exp(-asked[1][:, :2])))


def test_loss_is_the_released_joint_one():
    rng = generator()
    logits = torch.tensor(rng.normal(size=(9, 6)), requires_grad=True)
    target = torch.tensor(np.c_[rng.integers(0, 2, (9, 3)), rng.normal(size=(9, 3))])
    target[rng.random((9, 6)) < .4] = np.nan
    target[:, [2, 5]] = np.nan                                    # nothing known of these
    known, numbers = target.isfinite(), torch.arange(6) > 2
    y = torch.where(known, target, 0)

    def mean(error, columns):
        each = error(logits, y, reduction='none').where(known, np.nan)
        return each[:, columns].nanmean(0).mean()

    bce = mean(F.binary_cross_entropy_with_logits, [0, 1])
    loss = loss_of(logits, target, numbers)
    assert torch.allclose(loss, bce + mean(F.l1_loss, [3, 4]))
    loss.backward()
    assert torch.equal(logits.grad != 0, known)
    assert torch.allclose(loss_of(logits[:, :3], target[:, :3], numbers[:3]), bce)
    assert loss_of(logits, target * np.nan, numbers) == 0


@pytest.mark.parametrize('backbone', ['s4', 's4d', 'transformer', 'net1d', 'resnet', 'beat', 'vit'])
def test_rates(backbone):
    """Every tensor that learns, once, at its rate: finetune 1, .1, .01; scratch all alike; layer by
    layer decay^(L + 1 - l)."""
    encoder, head = Encoder(config_of(backbone, 'tiny')), nn.Linear(3, 2)
    L, level = len(encoder.blocks), {}
    for l, layer in enumerate((encoder.stem, *encoder.blocks, head)):
        level |= dict.fromkeys(layer.parameters(), l)
    level |= dict.fromkeys(encoder.norm.parameters(), L)
    for mode, decay, wanted in (('finetune', None, [1e-5, *[1e-4] * L, 1e-3]),
                                ('finetune', .75, 1e-3 * .75 ** np.arange(L + 2)[::-1]),
                                ('scratch', None, [1e-3] * (L + 2)), ('frozen', None, [])):
        groups = optimiser_groups(encoder, head, mode, Recipe(lr=1e-3, decay=decay))
        found = [(p, group['peak']) for group in groups for p in group['params']]
        learns = {p: wanted[l] for p, l in level.items() if mode != 'frozen'}
        learns |= dict.fromkeys(head.parameters(), 1e-3)
        assert dict(found) == pytest.approx(learns) and len(found) == len(learns)


# -------------------------------------------------------------------------------------------------
# folds, leaks

def test_each_record_is_predicted_once_and_patients_stay_apart(here):
    ds = Dataset('sample')
    found, leaks = plans(ds, np.arange(len(ds)))
    equal(np.sort(np.concatenate([test for *_, test in found])), np.arange(len(ds)))
    for parts in found:
        for a, b in itertools.combinations([set(ds.patient[part]) for part in parts], 2):
            assert not a & b
    assert leaks == 0 and len(found) == 10


def test_a_planted_test_patient_is_left_out_of_training(here):
    """And one whose other record repeats the signal of a record of the planted patient."""
    ds = Dataset('sample')
    ds.patient, ds.signal = ds.patient.copy(), ds.signal.copy()
    tested, planted, third = (np.flatnonzero(ds.fold == fold)[0] for fold in (7, 3, 4))
    ds.patient[planted], ds.signal[third] = ds.patient[tested], ds.signal[planted]
    train_, val, test = plans(ds, np.arange(len(ds)))[0][6]
    assert tested in test and not {planted, third} & {*train_, *val}


def test_folds_seen_in_pretraining_are_not_tested_on(here, capsys):
    ds, rows = Dataset('sample'), np.arange(500)
    found, leaks = plans(ds, rows, ds.patient[ds.fold <= 8])
    assert set(ds.fold[np.concatenate([test for *_, test in found])]) == {9, 10}
    assert leaks == (ds.fold <= 8).sum() and '8 of 10' in capsys.readouterr().out
    with pytest.raises(Stop, match='patients of every test fold.*--allow overlap'):
        plans(ds, rows, ds.patient)
    assert len(plans(ds, rows, ds.patient, allow=True)[0]) == 10
    assert len(plans(ds, rows[ds.fold != 4])[0]) == 9
    with pytest.raises(Stop, match='in 2 folds'):
        plans(ds, rows[ds.fold < 3])


class Listed:
    """2,000 patients with a record each."""
    name, names = 'listed', Dataset.names
    patient = recording = signal = np.arange(2000).astype(str)


def test_folds_that_a_source_gives():
    """Large sets test on the last fold alone, and -1 always trains. Given folds are taken."""
    ds = Listed()

    def folds(*given):
        return [[set(ds.fold[part]) for part in plan] for plan in plans(ds, *given)[0]]

    ds.fold = np.repeat([-1, 0, 8, 9], (200, 1400, 200, 200))
    assert folds(np.arange(2000)) == [[{-1, 0}, {8}, {9}]]
    ds.fold = np.arange(2000) % 20
    given = (0, 1, 2, 3, 4), (17,), (18, 19)
    assert folds(np.arange(2000), (), given) == [[*map(set, given)]]
    assert [test for *_, test in folds(np.arange(900))] == [{fold} for fold in range(20)]


def test_label_draws():
    train_, val = np.arange(100), np.arange(100, 120)
    a, b = draw_labels(train_, val, 50, 0)
    assert len(b) == 10 and len({*a, *b}) == 50
    assert not np.array_equal(a, draw_labels(train_, val, 50, 1)[0])
    assert draw_labels(train_, val, 'all', 1) == (train_, val)


# -------------------------------------------------------------------------------------------------
# tasks

@pytest.fixture(scope='module')
def short_runs(world):
    """datasets/few, 150 synthetic records with many findings in three folds; and runs of two steps:
    a0 and a1 are seeds, so are b0 and b1 of two layers, w0 has a longer window."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        records = []
        for record in data.synthetic(900, seed=5):
            record.load(record)
            record.load = None
            if sum(v for k, v in record.labels.items() if k.startswith('findings/')) >= 2:
                record.fold = data.fold_of(record.patient) % 3
                records.append(record)
        data.prepare('few', records[:150], extra_tasks=data.SYNTHETIC_TASKS, workers=1)
        for out, flags in dict(a0='--keep 1', a1='--seed 1', b0='--layers 2', w0='--window 5',
                               b1='--layers 2 --seed 1').items():
            train.main(f'{SHORT} --steps 2 {flags} --out out/{out}'.split())


@pytest.fixture
def run(here, short_runs, monkeypatch):
    """out/a0. 50 resamples are enough for these tests."""
    monkeypatch.setattr(evaluate, 'patient_weights',
                        lambda patient, _: patient_weights(patient, 50))
    return open_run('out/a0')


def linear(run, mode='linear', **changes):
    return Arm('a', [run['net']], mode, replace(QUICK[mode], **changes))


def test_two_tasks_share_one_training(run, monkeypatch):
    """diag is scored on the columns of `all` that bear its names."""
    t, ds = Task('sample', 'ptbxl_all', [run]), Dataset('sample')
    scores, _ = predict(t, run['net'], linear(run))
    auroc = table(scores, t.y[t.test], t.group)['AUROC'][:, 0]
    monkeypatch.setattr(evaluate, 'train_and_score', lambda *given: pytest.fail('trained again'))
    part = Task('sample', 'ptbxl_diag', [run])
    names = {'all/' + ds.label_names[c].split('/')[1] for c in ds.tasks['diag']}
    assert {t.labels[k] for k in part.columns} == names & set(t.labels) and len(part.columns) > 1
    _, columns = part.score([[predict(part, run['net'], linear(run))]])
    assert np.allclose(columns['AUROC'], auroc[part.columns])


def test_labels_left_out_are_named(run, monkeypatch, capsys):
    """Labels that only the test fold lacks are trained on."""
    monkeypatch.setattr(evaluate, 'plans', lambda *given: (plans(*given)[0][-1:], 0))
    t = Task('sample', 'ptbxl_all', [run])
    scored, out = {t.labels[k] for k in t.columns}, capsys.readouterr().out
    assert scored < set(t.labels) and 'left out, yes or no in under 10 records: all/' in out
    assert 'without both values in the test records: all/' in out
    _, columns = t.score([[predict(t, run['net'], linear(run))]])
    assert len(columns['AUROC']) == len(scored) and np.isfinite(columns['AUROC']).all()


def test_records_with_none_of_the_labels(run, capsys):
    run |= dict(seen=set())
    kept = Task('synthetic', 'findings', [run])
    none = (~(kept.y > 0).any(1)).sum()
    assert f'{none} of 640 records have none of these labels: kept' in capsys.readouterr().out
    dropped = Task('synthetic', 'findings', [run], unlabelled='drop')
    equal(dropped.rows, np.flatnonzero((kept.y > 0).any(1)))


def test_too_little_to_test_on_is_refused(run, monkeypatch):
    monkeypatch.setitem(TASKS, 'rare', replace(TASKS['ptbxl_all'], least=500))
    with pytest.raises(Stop, match='too few positives'):
        Task('sample', 'rare', [run])
    monkeypatch.setattr(evaluate, 'plans', lambda *given: (plans(*given)[0][:1], 0))
    for records, positives in ((27, 9), (60, 2)):
        x = generator().normal(0, .05, (records, 720, 12))
        made = (data.Record(str(i), x=x[i], fs=240, leads=LEADS, unit='mV', fold=i % 3,
                            labels={'label/LBBB': int(i < positives)}) for i in range(records))
        data.prepare(f'tiny{records}', made, workers=1, peaks=False)
        with pytest.raises(Stop, match='needs 10 test patients'):
            Task(f'tiny{records}', None, [run])


def test_a_label_without_its_set(run):
    for name in ('lbbb', 'findings/LBBB'):
        assert Task('few', name, [run]).labels == ['findings/LBBB']
    with pytest.raises(Stop, match="has no task 'nothing'"):
        Task('few', 'nothing', [run])


def test_numbers_are_in_sd_of_their_training_records(run):
    t, ds = Task('few', 'target', [run]), Dataset('few')
    raw = np.array(ds.labels[:, ds.tasks['target']], float)
    rows = t.plans[0][0]
    wanted = (raw - np.nanmean(raw[rows], 0)) / np.nanstd(raw[rows], 0)
    assert t.numbers.all() and np.allclose(t.y, wanted, atol=1e-4, equal_nan=True)
    means = np.zeros((150, 6))
    found, _ = t.score([[(means, means)]])
    assert .7 < found['MAE'].points < .9                          # a normal distribution's is .798


def test_neither_preview_nor_thresholds_learn_from_validation(run, monkeypatch):
    """The head of fine-tuning starts as the converged probe on the training records. Scores of
    validation, on which thresholds are chosen, are of the training records alone."""
    t, net, caught = Task('few', 'code', [run]), run['net'], []
    X, (train_, val, _) = t.embedding(net), t.plans[0]
    z, *_ = evaluate.train_and_score(t, net, t.plans[0], linear(run, 'knn'), 'all', 0, 0)
    equal(z, knn(X, t.y, train_, val))
    monkeypatch.setattr(evaluate, 'fit', lambda *given: (caught.append(given[-1]), (0, 0))[1])
    arm = linear(run, 'finetune', preview=True)
    evaluate.train_and_score(t, net, t.plans[0], arm, 'all', 0, 0)
    equal(caught[0], linear_probe(X, t.y, train_, val, t.numbers, refit=False)[0])


def test_scores_are_kept_and_recipes_not_confused(run, monkeypatch):
    """And no mode changes the encoder that it is given."""
    net, before = run['net'], copy.deepcopy(run['net'].state_dict())
    t, arms = Task('few', 'code', [run]), {mode: linear(run, mode, epochs=1, least_steps=0)
                                           for mode in ('linear', 'knn', 'frozen', 'finetune')}
    first = {mode: predict(t, net, arm) for mode, arm in arms.items()}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    monkeypatch.setattr(evaluate, 'train_and_score', lambda *given: pytest.fail('trained again'))
    t, other, arm = Task('few', 'code', [open_run('out/a0')]), copy.deepcopy(net), arms['frozen']
    for mode in arms:
        equal(predict(t, net, arms[mode]), first[mode])
    next(other.parameters()).data[0] += 1e-3
    for given in ((other, arm), (net, arm, 30), (net, arm, 'all', 1), (net, arm, 'all', 0, 1),
                  (net, linear(run, 'frozen', epochs=1))):
        with pytest.raises(pytest.fail.Exception, match='trained again'):
            predict(t, *given)


# -------------------------------------------------------------------------------------------------
# groups of runs, arms

def pretend(objective='cpc', seed=0, step=10, folder='out', **args):
    return dict(path=f'{folder}/{objective}_{seed}', seed=seed, step=step, dataset='x',
                args=dict(objective=objective, seed=seed, **args))


def test_runs_are_grouped_by_all_but_their_seeds():
    found = grouped([pretend(o, s) for s in (1, 0) for o in ('cpc', 'jepa')])
    assert list(found) == ['cpc', 'jepa'] and [run['seed'] for run in found['cpc']] == [0, 1]
    for change in (dict(step=20), dict(lr=1.), dict(tokenizer='out/vq')):
        assert len(grouped([pretend(), pretend(folder='other', **change)])) == 2
    for runs in ([pretend(), pretend()], [pretend(), pretend(seed=1), pretend('jepa')]):
        with pytest.raises(Stop, match='same seeds, each once'):
            grouped(runs)


def test_names_leave_out_seeds_and_keep_steps():
    for path, name in (('a0', 'a'), ('cpc_s4_tiny_10', 'cpc_s4_tiny'), ('a0@20', 'a@20'),
                       ('curve@20', 'curve@20'), ('7', '7')):
        assert list(grouped([pretend() | dict(path=f'out/{path}')])) == [name]


def test_twins_are_the_runs_before_training(run):
    families = grouped([open_run('out/a1'), run])
    assert [arm.name for arm in arms_of(families, 'linear', QUICK)] == ['a, untrained', 'a']
    scratch, twins, nets = arms_of(families, 'finetune', QUICK, True)
    assert scratch.mode == 'scratch' and nets.reference == scratch.name == 'a, from scratch'
    for seed, name in enumerate(('out/a0', 'out/a1')):
        checkpoint = load(name)
        for arm, key in ((scratch, 'initial'), (twins, 'initial'), (nets, 'encoder')):
            state = arm.encoders[seed].state_dict()
            assert all(torch.equal(v, state[k]) for k, v in checkpoint[key].items())


def test_rows_are_added_by_key(tmp_path):
    file, key = tmp_path / 'rows.csv', ['task', 'labels']
    add_rows(file, [dict(task='a', labels=10, old=1), dict(task='a', labels='all')], key)
    add_rows(file, [dict(task='a', labels=10, more='x')], key)
    assert [[*row.values()] for row in read(file)] == [['a', '10', 'x', ''], ['a', 'all', '', '']]


# -------------------------------------------------------------------------------------------------
# from Python

# the twelve leads from I and II: Einthoven, Goldberger, and any six for V1 to V6
LIMBS = np.array([[1, 0, -1, -.5, 1, -.5, *range(6)], [0, 1, 1, -.5, -.5, 1, *range(6, 0, -1)]])


def test_embeddings_of_an_array_equal_those_of_a_prepared_dataset(run):
    """Of the same recordings, in another order of leads and unit, at another rate."""
    rng, samples = generator(), [1300, 2600, 5000]
    x = [rng.integers(-9, 9, (n, 2)).cumsum(0) @ LIMBS for n in samples]          # in uV
    data.prepare('array', (data.Record(str(i), x=y, fs=500, leads=LEADS, unit='uV')
                           for i, y in enumerate(x)), workers=1)
    wanted = embed(run['net'], Dataset('array'), np.arange(3))
    backwards = [y[:, ::-1] / 1000 for y in x]
    for given in ((x, 500, LEADS, 'uV'), (backwards, 500, LEADS[::-1])):
        found = embed_array(*given, run='out/a0')
        assert found.dtype == np.float32 and np.allclose(found, wanted, atol=1e-5)
    for bad, why in ((x[0][:, 1:], 'is needed'), (x[0][:300], 'shorter')):
        with pytest.raises(ValueError, match=f'recording 1.*{why}'):
            embed_array([x[0], bad], 500, unit='uV', run='out/a0')
    with pytest.warns(UserWarning, match='limb leads'):
        embed_array(x[:1], 500, ['II', 'I', *LEADS[2:]], 'uV', 'out/a0')


# -------------------------------------------------------------------------------------------------
# analyses

def test_cka_golden_values():
    """Google's notebook, numpy's legacy seed 1337. 50 records of 400 unrelated features."""
    rng = np.random.RandomState(1337)
    X = rng.randn(100, 10)
    Y = rng.randn(100, 10) + X
    assert cka(X, Y) == pytest.approx(.51346, abs=1e-5)
    rotation = np.linalg.qr(rng.randn(10, 10))[0]
    assert cka(3 * X @ rotation + 5, Y) == pytest.approx(cka(X, Y))
    assert cka(X, -2 * X) == pytest.approx(1)
    assert abs(cka(*rng.randn(2, 50, 400))) < .05


def test_hsic_equals_the_sum_over_distinct_indices():
    """Means of K_ij L_ij, K_ij L_kl, K_ij L_ik over distinct records (Song et al. 2012, eq. 4)."""
    K, L = (x @ x.T for x in generator().normal(size=(2, 6, 3)))

    def mean(m, value):
        return np.mean([value(*i) for i in itertools.permutations(range(6), m)])

    parts = (mean(2, lambda i, j: K[i, j] * L[i, j]), mean(4, lambda i, j, k, l: K[i, j] * L[k, l]),
             -2 * mean(3, lambda i, j, k: K[i, j] * L[i, k]))
    assert hsic(K, L) == pytest.approx(sum(parts))


def test_changed_signals(here):
    x = Dataset('synthetic').crop(np.arange(20), np.zeros(20, int), 600)
    swapped = swap_arms(x)
    I, II, III, R, L = swapped[:, :5].unbind(1)
    assert torch.equal(I, -x[:, 0]) and torch.equal(swapped[:, 5:], x[:, 5:])
    for rest in (I + III - II, R + (I + II) / 2, L - (I - III) / 2):        # it is still an ECG
        assert rest.abs().max() < 3e-3
    noise = noisy(10)(x) - x
    assert torch.allclose(noise.var((1, 2)) * 10, x.var((1, 2)), rtol=.1)
    assert torch.equal(without(0, 7)(x)[:, :9].any(2)[0], torch.arange(9) % 7 > 0)
    time = torch.arange(2400) / 240
    for hertz, kept in ((10, 1), (80, 0)):
        wave = torch.sin(2 * torch.pi * hertz * time).expand(1, 12, -1)
        assert (at_rate(240, 100)(wave) - kept * wave)[..., 100:-100].abs().max() < .05


def test_analyses_run(run, capsys):
    for analysis in ('robustness', 'cka', 'embeddings'):
        analyse([analysis, 'out/a0', '--data', 'few'])
    found, ds = np.load('out/a0/embeddings_few_a0.npz'), Dataset('few')
    assert found['X'].shape == (150, 12) and Path('out/a0/cka_few.png').stat().st_size > 1000
    equal(found['id'], ds.id)
    equal(found['y'], ds.labels)
    t = Task('few', None, [run])
    plain = t.score([[predict(t, run['net'], linear(run))]])[0]['AUROC'].points.item()
    rows = {row['condition']: row for row in read('out/a0/robustness_few.csv') if row['arm'] == 'a'}
    assert float(rows['unchanged']['value']) == pytest.approx(plain)
    with pytest.raises(Stop, match="no dataset 'nowhere'"):
        analyse(['cka', 'out/a0', '--data', 'nowhere'])


def test_label_law_comes_back(run, tmp_path):
    with pytest.raises(Stop, match='no arm with five numbers'):
        analyse(['efficiency', 'out/a0', '--data', 'few', '--out', str(tmp_path)])
    at = dict(data='few', task='code', mode='linear', protocol='quick', metric='AUROC', arm='a')
    law = {n: 1 - (2 * n ** -.5 + .1) for n in (20, 40, 80, 160, 320, 640)}
    add_rows(tmp_path / 'summary.csv', [dict(at, labelled=n, value=v, low=v, high=v)
                                        for n, v in law.items()], ['labelled'])
    analyse(['efficiency', 'out/a0', '--data', 'few', '--out', str(tmp_path)])
    row, = read(tmp_path / 'efficiency_few.csv')
    found = [float(row[key]) for key in ('C', 'a', 'L0')]
    assert found == pytest.approx([2, .5, .1], rel=1e-3)


# -------------------------------------------------------------------------------------------------
# the command line

def main(flags):
    evaluate.main(flags.split())


def test_checkpoints_by_folder_file_and_step(run):
    early = open_run('out/a0/ckpt_1.pt')
    assert (early['path'], early['step'], open_run('out/a0@1')['step']) == ('out/a0@1', 1, 1)
    assert open_run('out/a0/ckpt.pt')['path'] == 'out/a0'
    for path in ('out/nowhere', 'out', 'out/a0@7'):
        with pytest.raises(Stop, match='no checkpoint at'):
            open_run(path)
    Path('out/foreign').mkdir()
    for wrong in ({'w': torch.zeros(1)}, load('out/a0') | dict(encoder={})):
        torch.save(wrong, 'out/foreign/ckpt.pt')
        with pytest.raises(Stop, match='no checkpoint of train.py') as stop:
            open_run('out/foreign')
        assert '\n' not in str(stop.value)


def test_evaluate_writes_its_results(run, capsys):
    flags = 'out/a0 --data few --out out/r --recipe epochs=1 --labels 40 --draws 1'
    for more in ('', ' --mode finetune scratch'):
        main(flags + more)
    assert 'under three pretraining seeds' in capsys.readouterr().out
    rows = read('out/r/summary.csv')
    assert {row['metric'] for row in rows} == {'AUROC', 'AUPRC', 'F1'} and len(rows) == 15
    assert all(0 <= float(r['low']) <= float(r['value']) <= float(r['high']) <= 1 for r in rows)
    assert {(r['arm'], r['reference']) for r in rows if r['mode'] == 'finetune'} == {
        ('a', 'a, from scratch'), ('a, untrained', ''), ('a, from scratch', '')}
    assert len(list(Path('out/r').glob('few_findings_*.png'))) == 2


def test_pretrainings_are_compared(run, capsys):
    """Two depths with two seeds each, and MAE beside AUROC."""
    main('out/a0 out/a1 out/b0 out/b1 --data few --task code target')
    pairs = {row['task']: row for row in read('out/compare_a_b/pairs.csv')}
    value = {(r['task'], r['metric'], r['arm']): float(r['value'])
             for r in read('out/compare_a_b/summary.csv')}
    for task, metric in (('code', 'AUROC'), ('target', 'MAE')):
        assert pairs[task]['metric'] == metric and pairs[task]['verdict'] == "can't tell"
        difference = value[task, metric, 'a'] - value[task, metric, 'b']
        assert float(pairs[task]['difference']) == pytest.approx(difference)
    assert ': 1 a, 1 b' in capsys.readouterr().out


def test_windows_of_their_own(run):
    """2.5 s and 5 s: each encoder sees crops of its pretraining, whichever comes first."""
    found = []
    for order in ('out/a0 out/w0', 'out/w0 out/a0'):
        main(f'{order} --data few --task code --mode knn --out out/{order[-2:]}')
        rows = read(f'out/{order[-2:]}/summary.csv')
        found.append({(row['arm'], row['metric']): row['value'] for row in rows})
    assert found[0] == found[1] and ('w', 'AUROC') in found[0]


def test_ablation_of_post_training(run):
    main('out/a0 --data few --task code --mode finetune --ablate --labels 40 --draws 1 --recipe '
         'epochs=1 --out out/ablation')
    rows = [row for row in read('out/ablation/summary.csv') if row['metric'] == 'AUROC']
    assert {row['arm'] for row in rows} == {f'a, {part}' for part in ('plain', *POST, 'all')}
    assert len({row['value'] for row in rows}) >= 5               # one block has no depth to drop
    assert all((row['diff'] == '') == (row['arm'] == 'a, plain') for row in rows)


@pytest.mark.parametrize('objective, backbone',
                         [('mae', 'vit'), ('cmsc', 'resnet'), ('vqbeat', 'beat')])
def test_other_tokens_are_evaluated(run, objective, backbone):
    """Encoders with padding, a CLS token or a coarse rate go through every mode."""
    out = f'out/{backbone}'
    train.main(f'--objective {objective} --steps 1 --batch 4 --probe-every 0 '
               f'--out {out}'.split())
    main(f'{out} --data few --task code --mode linear frozen finetune --labels 30 --draws 1 '
         '--recipe epochs=1')
    rows = read(f'{out}/summary.csv')
    assert {(r['mode'], r['arm']) for r in rows} == set(itertools.product(
        ('linear', 'frozen', 'finetune'), (backbone, f'{backbone}, untrained')))


@pytest.mark.parametrize('protocol', ['released', 'sc'])
def test_protocols_run(run, protocol):
    main('out/a0 --data few --task code --mode linear frozen --labels 40 --draws 1 '
         f'--recipe epochs=2 --protocol {protocol} --out out/p_{protocol}')
    rows = read(f'out/p_{protocol}/summary.csv')
    assert {row['protocol'] for row in rows} == {f'{protocol} keep epochs=2'} and len(rows) == 12


def test_overlap_can_be_allowed(run, capsys):
    train.main(f'{SHORT} --steps 1 --data few --out out/f0'.split())
    main('out/f0 --data few --mode knn')
    assert '1 of 3 test folds are left out' in capsys.readouterr().out
    main('out/f0 --data few --mode knn --allow overlap')
    assert 'tested: 150 records' in capsys.readouterr().out


def test_list(here, capsys):
    main('--list')
    out = capsys.readouterr().out
    assert all(name in out for name in TASKS) and 'python data.py ptbxl --root' in out


@pytest.mark.parametrize('flags, why', [
    ('--labels 5 --data few', 'can be drawn'),
    ('--data nowhere', "no dataset 'nowhere'"), ('--task nothing --data few', 'has no task'),
    ('--task nothing', 'no task of the papers'), ('--device tpu', 'cannot be used'),
    ('--task ptbxl_all', 'needs datasets/ptbxl: python data.py ptbxl'),
    ('--ablate', 'needs --mode finetune'), ('out/a0', 'each once'),
    *[(f'--recipe {change}', 'write NAME=VALUE')
      for change in ('preview=true', 'schedule=x', 'z=1', 'lr=a')]])
def test_bad_requests_stop_with_one_line(run, flags, why):
    with pytest.raises(SystemExit, match=why) as stop:
        main('out/a0 ' + flags)
    assert '\n' not in str(stop.value)


def test_other_contract_is_refused(run):
    data.main('synthetic --records 64 --contract sc --out sc'.split())
    with pytest.raises(Stop, match='another contract.*fs 240 against 100.*--fs 240'):
        Task('sc', None, [run])
