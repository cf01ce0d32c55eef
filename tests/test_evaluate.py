"""Metrics, intervals and probes against brute force and closed forms; protocols against leaks; the command line end to end."""
import copy
import csv
import dataclasses
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import scipy.signal
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F

import data
import evaluate
import train
from data import TASKS, Dataset, Stop
from evaluate import (MODES, POST, PROTOCOLS, Arm, Recipe, Score, Task, Tokens, at_rate, auroc, average_precision, cka, compare, draw_labels, embed, f1, figure, fit, grouped,
                      holm, hsic, interval, jobs_of, label_law, linear_probe, logistic, loss_of, macro, mae, noisy, one_per_patient, open_run, overlap, p_value,
                      per_record, plans, rates, resample_patients, ridge, swap_arms, thresholds, training_free, without)
from models import AttentionPool, Config, Encoder, calibrate_batchnorm, config_of, load

CPU = torch.device('cpu')
TINY = Config(dim=16, layers=1)


# --- metrics

def count_pairs(score, y, group, weight):
    """AUROC of one class by looking at every pair."""
    right = total = 0.
    for i in range(len(y)):
        for j in range(len(y)):
            if y[i] == 1 and y[j] == 0 and group[i] == group[j]:
                total += weight[i] * weight[j]
                right += weight[i] * weight[j] * ((score[i] > score[j]) + .5 * (score[i] == score[j]))
    return right / total


def tied(seed, n=60, K=3):
    """Scores with ties, labels with unknowns, groups and counts of four resamples."""
    rng = np.random.default_rng(seed)
    score, y = rng.integers(0, 6, (n, K)).astype(float), rng.integers(0, 2, (n, K)).astype(float)
    y[rng.random((n, K)) < .2] = np.nan
    return score, y, rng.integers(0, 3, n), rng.integers(0, 4, (4, n)).astype(float)


def test_auroc_equals_pair_counting():
    score, y, group, weight = tied(0)
    table = auroc(score, y, group, weight)
    for r in range(4):
        for k in range(3):
            assert table[r, k] == pytest.approx(count_pairs(score[:, k], y[:, k], group, weight[r]))
    plain = auroc(score, y)[0]
    for k in range(3):
        a, b = score[y[:, k] == 1, k], score[y[:, k] == 0, k]
        assert plain[k] == pytest.approx(scipy.stats.mannwhitneyu(a, b).statistic / len(a) / len(b))


def steps(score, y, weight):
    """Average precision of one class: from the highest threshold down, precision times the recall that the threshold adds."""
    known, total, before = np.isfinite(y), 0., 0.
    s, y, w = score[known], y[known], weight[known]
    for t in sorted(set(s), reverse=True):
        recall = w[(s >= t) & (y == 1)].sum() / w[y == 1].sum()
        total += (recall - before) * w[(s >= t) & (y == 1)].sum() / max(w[s >= t].sum(), 1e-12)
        before = recall
    return total


def test_average_precision_and_f1_equal_brute_force():
    score, y, _, weight = tied(1)
    ap, f = average_precision(score, y, None, weight), f1(score - 2.5, y, None, weight)
    for r, k in itertools.product(range(4), range(3)):
        assert ap[r, k] == pytest.approx(steps(score[:, k], y[:, k], weight[r]))
        yes, true, w = score[:, k] > 2.5, y[:, k], weight[r]
        tp, fp, fn = w[yes & (true == 1)].sum(), w[yes & (true == 0)].sum(), w[~yes & (true == 1)].sum()
        assert f[r, k] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert np.allclose(average_precision(score + .5, y, np.zeros(60, int)), average_precision(score, y))      # one group: ranks decide, and they are the same


def test_average_precision_compares_ranks_between_groups():
    """Two probes of different scale: within each, positives rank alike, so pooling must not let the louder one lead."""
    y, group = np.array([[1, 1, 0, 0, 1, 1, 0, 0.]]).T, np.repeat([0, 1], 4)
    score = np.array([[4, 3, 2, 1, 400, 300, 200, 100.]]).T
    assert average_precision(score, y, group)[0, 0] == 1 and average_precision(score, y)[0, 0] < 1


@pytest.mark.parametrize('metric', [auroc, average_precision, lambda s, y, weight=None: f1(s - .5, y, None, weight), mae])
def test_weights_are_copies(metric):
    rng = np.random.default_rng(1)
    score, y, weight = rng.random((30, 2)), rng.integers(0, 2, (30, 2)).astype(float), rng.integers(0, 3, 30)
    again = np.repeat(np.arange(30), weight)
    assert np.allclose(metric(score, y, weight=weight[None].astype(float)), metric(score[again], y[again]))


def test_class_without_both_labels_is_not_scored():
    score, y = np.random.default_rng(0).random((10, 3)), np.zeros((10, 3))
    y[:5, 1], y[:, 2] = 1, 1
    for metric in (auroc, average_precision, lambda s, y: f1(s - .5, y)):
        table = metric(score, y)
        assert np.isnan(table[0, [0, 2]]).all() and macro(table)[0] == table[0, 1]
    table = auroc(score, y)
    assert macro(table, .5)[0] == pytest.approx((table[0, 1] + 1) / 3)                       # the benchmark's convention
    s = [[score]]
    plain, convention = (Score(s, y, np.arange(10), empty=e).point['AUROC'][0, 0] for e in (None, .5))
    assert convention == pytest.approx((plain + 1) / 3)
    with np.errstate(all='raise'):
        assert np.isnan(macro(np.full((2, 3), np.nan))).all()


def test_thresholds_give_the_best_f1():
    rng = np.random.default_rng(2)
    score, y, _, _ = tied(2, 25, 4)
    y[:, 3] = np.where(rng.random(25) < .5, 0, np.nan)           # no positive
    found = thresholds(score, y)
    for k in range(3):
        best = max(f1(score[:, [k]] - cut, y[:, [k]])[0, 0] for cut in np.arange(-.5, 6))
        assert f1(score[:, [k]] - found[k], y[:, [k]])[0, 0] == best
    assert found[3] == np.inf


def test_mae_leaves_unknown_values_out():
    rng = np.random.default_rng(0)
    score, y = rng.normal(size=(40, 2)), rng.normal(size=(40, 2))
    y[rng.random((40, 2)) < .4] = np.nan
    assert np.allclose(mae(score, y)[0], np.nanmean(np.abs(score - y), 0))


# --- intervals, differences, ranks

def test_bayesian_weights_lose_no_record():
    patient = np.random.default_rng(0).integers(0, 30, 50)
    weight = resample_patients(patient, 200, bayesian=True)
    first = np.unique(patient, return_index=True)[1]
    assert (weight > 0).all() and np.allclose(weight[:, first].sum(1), len(first))           # of patients; records follow theirs
    assert all((weight[:, patient == p] == weight[:, [f]]).all() for p, f in zip(np.unique(patient), first))
    alone = resample_patients(np.arange(50), 200, bayesian=True)
    assert np.allclose(alone.sum(1), 50) and (resample_patients(np.arange(50), 200) == 0).any()


def test_interval_adds_its_variances_in_squares():
    boot, one = np.random.default_rng(0).normal(.8, .01, 100_000), np.array([[.8]])
    assert np.allclose(interval(one, boot)[1:], (.8 - .0196, .8 + .0196), atol=3e-4)
    assert np.allclose(interval(one, boot, .9)[1:], (.8 - .01645, .8 + .01645), atol=3e-4)
    points = np.array([[.78], [.80], [.82]])                     # three seeds: t(2) * .02 / sqrt(3)
    runs = scipy.stats.t.ppf(.975, 2) * .02 / 3 ** .5
    assert np.allclose(interval(points, boot)[1:], (.8 - np.hypot(.0196, runs), .8 + np.hypot(.0196, runs)), atol=3e-4)
    assert np.allclose(interval(points.T, boot), interval(points, boot))                     # three draws of one seed
    both = .8 + .02 * np.add.outer([-1, 0, 1], [-1, 0, 1])       # seeds and draws
    assert np.allclose(interval(both, boot)[2] - .8, (.0196 ** 2 + 2 * runs ** 2) ** .5, atol=3e-4)


def test_interval_of_one_run_is_the_percentiles():
    """Also where they lie beside the point, as the benchmark's convention makes them, and where resamples have no class."""
    boot = np.random.default_rng(0).normal(.7, .01, 1000)
    assert np.allclose(interval(np.array([[.8]]), np.r_[boot, np.full(50, np.nan)])[1:], np.percentile(boot, [2.5, 97.5]), atol=1e-4)


def test_tails_beyond_the_resamples_are_normal():
    boot = np.random.default_rng(0).normal(0, 1, 1_000_000)
    for level in (.9999, 1 - 1e-6):
        few = np.quantile(boot, (np.arange(1000) + .5) / 1000)   # an ideal bootstrap of 1,000
        assert interval(np.zeros((1, 1)), few, level)[2] == pytest.approx(scipy.stats.norm.ppf(.5 + level / 2), rel=.03)


def test_interval_covers_over_repeated_studies():
    """Truth .8, seeds SD .018, patients SE .01: an interval from three seeds must cover it in about 95 of 100 studies."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        patients = rng.normal(0, .01)
        low, high = interval(.8 + patients + rng.normal(0, .018, (3, 1)), .8 + patients + rng.normal(0, .01, 2000))[1:]
        covered += low < .8 < high
    assert .93 <= covered / 400 <= 1


@pytest.mark.parametrize('seeds', [1, 3])
def test_p_value_inverts_the_interval(seeds):
    rng, verdicts = np.random.default_rng(0), []
    for shift in np.linspace(0, .06, 25):
        points = shift + rng.normal(0, .01, (seeds, 1)) * (seeds > 1)
        boot, p = points.mean() + rng.normal(0, .01, 1000), 0
        p, (_, low, high) = p_value(points, boot), interval(points, boot)
        assert (p < .05) == (low * high > 0)
        _, low, high = interval(points, boot, 1 - 1.02 * p)
        assert low * high > 0 or p > .97                         # a little less sure, and 0 is outside
        verdicts.append(p < .05)
    assert 0 < sum(verdicts) < 25
    assert p_value(np.zeros((1, 1)), np.zeros(1000)) == 1
    assert p_value(np.full((1, 1), .5), .5 + rng.normal(0, .01, 1000)) < 1e-8                # so that Holm over many pairs can decide
    z = rng.normal(0, 1, 20000)
    assert p_value(np.full((1, 1), 2.), 2 + z) == pytest.approx(2 * scipy.stats.norm.sf(2), rel=.15)


def test_holm_by_hand():
    assert np.allclose(holm([.01, .04, .03, .005]), [.03, .06, .06, .02])                    # .005 x 4, .01 x 3, .03 x 2, then no less than before
    assert np.allclose(holm([.5, .9]), [1, 1]) and len(holm([])) == 0


def made_score(mean, spread=.002, noise=None, main='AUROC'):
    """A Score of two seeds around a mean with a given bootstrap."""
    s = Score.__new__(Score)
    s.main, s.point, s.per_class = main, {main: mean + np.array([[-1e-4], [1e-4]])}, {}
    s.boot = {main: mean + spread * (np.random.default_rng(0) if noise is None else np.random.default_rng(noise)).normal(size=1000)}
    return s


def test_verdicts_and_ranks():
    """a and b cannot be told apart, both beat c; d is c's twin to within the margin; e is too noisy to say."""
    scores = dict(a=made_score(.90, noise=1), b=made_score(.9001, noise=2), c=made_score(.80, noise=3), d=made_score(.8, .0005, 4), e=made_score(.86, .1, 5))
    rows, ranks = compare(scores, .01)
    verdict = {(r['a'], r['b']): r['verdict'] for r in rows}
    assert len(rows) == 10 and verdict['a', 'b'] == verdict['c', 'd'] == 'equivalent within 0.01'
    assert verdict['a', 'c'] == verdict['b', 'd'] == 'better' and verdict['a', 'e'] == verdict['d', 'e'] == "can't tell"
    assert ranks == dict(a=1, b=1, c=3, d=3, e=1)
    assert all(r['p'] <= r['p_holm'] <= 1 and 'equivalent' not in r for r in rows)
    rows, ranks = compare(dict(a=made_score(.903, .0005, 1), c=made_score(.9, .0005, 2)))      # sure, and yet too small to matter
    assert rows[0]['p_holm'] < .05 and rows[0]['verdict'] == 'equivalent within 0.005' and ranks == dict(a=1, c=1)
    rows, ranks = compare({n: made_score(m, noise=i, main='MAE') for i, (n, m) in enumerate((('low', .4), ('high', .6)))})
    assert rows[0]['verdict'] == 'better' and ranks == dict(low=1, high=2)                   # of errors the lower is the better
    assert compare({'only': made_score(.9)}) == ([], {'only': 1})


def test_many_arms_can_still_be_told_apart():
    """Twelve arms make 66 pairs: with p of 2 / 1000 at least, Holm's would all be .13 or more."""
    rows, ranks = compare({i: made_score(.5 + .03 * i, noise=i) for i in range(12)})
    assert {r['verdict'] for r in rows} == {'worse'} and list(ranks.values()) == list(range(12, 0, -1))


def test_paired_difference_of_equals_is_zero():
    rng = np.random.default_rng(0)
    s, y, patient = rng.random((80, 2)), rng.integers(0, 2, (80, 2)).astype(float), rng.integers(0, 50, 80)
    score = Score([[s], [s + .1]], y, patient, np.zeros(80, int), [[s - .5], [s - .5]])
    for metric in ('AUROC', 'AUPRC', 'F1'):
        assert score.minus(score, metric) == (0, 0, 0)
        low, high = score.interval(metric)[1:]
        assert low < score.point[metric].mean() < high
    better = Score([[s + .5 * y]], y, patient, np.zeros(80, int))                            # the same resamples: paired
    assert np.allclose(better.difference(score)[1], better.boot['AUROC'] - score.boot['AUROC']) and better.minus(score)[1] > 0


def test_score_of_classes_and_numbers():
    rng = np.random.default_rng(0)
    y = np.c_[rng.integers(0, 2, 60), rng.normal(size=60)].astype(float)
    s, numbers = rng.normal(size=(60, 2)), np.array([False, True])
    score = Score([[s]], y, np.arange(60), margins=[[s]], numbers=numbers)
    assert score.main == 'AUROC' and set(score.point) == {'AUROC', 'AUPRC', 'F1', 'MAE'}
    assert score.point['AUROC'] == auroc(s[:, :1], y[:, :1])[0, 0] and score.point['MAE'] == pytest.approx(np.abs(s - y)[:, 1].mean())
    assert np.isnan(score.per_class['AUROC'][1]) and np.isnan(score.per_class['MAE'][0]) and Score([[s[:, 1:]]], y[:, 1:], np.arange(60), numbers=numbers[1:]).main == 'MAE'


def test_rare_class_leaves_an_interval():
    """With one positive a third of the resamples have none: they are left out, and nothing is NaN."""
    y = np.zeros((40, 1))
    y[0] = 1
    score = Score([[np.random.default_rng(0).random((40, 1))]], y, np.arange(40))
    assert np.isnan(score.boot['AUROC']).mean() == pytest.approx((39 / 40) ** 40, abs=.05) and np.isfinite(score.interval()).all()
    assert np.isfinite(score.minus(score)).all() and p_value(*score.difference(score)) == 1


def test_large_tasks_take_fewer_resamples(monkeypatch):
    """The first of those that a smaller one would take, so nothing else changes."""
    rng = np.random.default_rng(0)
    s, y, patient = rng.random((50, 3)), rng.integers(0, 2, (50, 3)).astype(float), rng.integers(0, 40, 50)
    full = Score([[s]], y, patient, margins=[[s - .5]])
    monkeypatch.setattr(evaluate, 'WORK', 150 * 300)
    fewer = Score([[s]], y, patient, margins=[[s - .5]])
    monkeypatch.setattr(evaluate, 'WORK', 1)
    for m in ('AUROC', 'AUPRC', 'F1'):
        assert len(full.boot[m]) == 1000 and np.allclose(fewer.boot[m], full.boot[m][:300]) and len(Score([[s]], y, patient).boot['AUROC']) == 200


# --- probes

def test_probe_is_at_its_optimum():
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)), rng.integers(0, 2, (300, 2)).astype(float)
    Y[rng.random((300, 2)) < .2] = np.nan
    for l2 in (.1, 1e-3):
        w = logistic(X, Y, l2)
        for k in range(2):
            known = np.isfinite(Y[:, k])
            x, t = np.c_[X, np.ones(300)][known], Y[known, k]
            loss = lambda v: np.mean(np.logaddexp(0, x @ v) - t * (x @ v)) + l2 / 2 * (v[:-1] ** 2).sum()
            found = scipy.optimize.minimize(loss, np.zeros(6), method='BFGS', options=dict(gtol=1e-8))
            assert np.allclose(w[:, k], found.x, atol=1e-4)


def test_probe_finds_a_linear_rule():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(900, 10))
    Y = (X[:, :2] + .1 * rng.normal(size=(900, 2)) > 1).astype(float)
    rows = np.arange(900)
    predict, z = linear_probe(X, Y, rows[:500], rows[500:600])
    assert auroc(predict(X[600:]), Y[600:]).min() > .99 and auroc(z, Y[500:600]).min() > .99


def test_probe_of_numbers_equals_the_closed_form(monkeypatch):
    """Ridge: w = (Z'Z / n + l2 I)^-1 Z'(y - mean) / n on centred Z; the L2 is that of the least validation error; other columns go on as ever."""
    rng = np.random.default_rng(0)
    X = rng.normal(2, 3, (200, 4))
    Y = np.c_[X @ [1, -2, 0, .5] + rng.normal(size=200), X[:, 0] > 2]
    Y[rng.random(200) < .3, 0] = np.nan
    train_, val, numbers = np.arange(120), np.arange(120, 160), np.array([True, False])

    def closed(rows, l2):
        known = rows[np.isfinite(Y[rows, 0])]
        Z = (X - X[rows].mean(0)) / (X[rows].std(0) + 1e-6)
        middle, y = Z[known].mean(0), Y[known, 0]
        w = np.linalg.solve((Z[known] - middle).T @ (Z[known] - middle) / len(known) + l2 * np.eye(4), (Z[known] - middle).T @ (y - y.mean()) / len(known))
        return (Z - middle) @ w + y.mean()
    error = {l2: np.nanmean(np.abs(closed(train_, l2) - Y[:, 0])[val]) for l2 in evaluate.L2}
    best = min(error, key=error.get)
    predict, z = linear_probe(X, Y, train_, val, numbers)
    assert np.allclose(predict(X)[:, 0], closed(np.arange(160), best)) and np.allclose(z[:, 0], closed(train_, best)[val])
    alone, z_alone = linear_probe(X, Y[:, 1:], train_, val)
    assert np.allclose(predict(X)[:, 1], alone(X)[:, 0]) and np.allclose(z[:, 1], z_alone[:, 0])
    once, _ = linear_probe(X, Y, train_, val, numbers, refit=False)
    assert np.allclose(once(X)[:, 0], closed(train_, best)) and np.allclose(once(X[val]), z)
    assert np.allclose(ridge(X, Y[:, :1], 0.)[:, 0], np.linalg.lstsq(np.c_[X, np.ones(200)][(k := np.isfinite(Y[:, 0]))], Y[k, 0], rcond=None)[0])


def test_probe_without_known_validation_labels():
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(60, 3)), np.c_[rng.integers(0, 2, 60), rng.normal(size=60)].astype(float)
    Y[40:, :] = np.nan
    predict, z = linear_probe(X, Y, np.arange(40), np.arange(40, 60), np.array([False, True]))
    assert np.isfinite(predict(X)).all() and np.isfinite(z).all()


def test_training_free_equals_brute_force():
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(60, 4)), rng.integers(0, 2, (60, 2)).astype(float)
    Y[rng.random((60, 2)) < .3] = np.nan
    train_, val, test = np.arange(30), np.arange(30, 45), np.arange(45, 60)
    labelled = np.arange(45)
    Z = (X - X[labelled].mean(0)) / (X[labelled].std(0) + 1e-6)
    Z /= np.linalg.norm(Z, axis=1, keepdims=True)
    near, _ = training_free(X, Y, train_, val, 'knn', k=5)
    far, _ = training_free(X, Y, train_, val, 'prototypes')
    for i, k in itertools.product(test, range(2)):
        order = sorted(labelled, key=lambda j: -Z[i] @ Z[j])[:5]
        known = [j for j in order if np.isfinite(Y[j, k])]
        w = np.array([max(Z[i] @ Z[j], 0) + 1e-9 for j in known])
        assert near(X[[i]])[0, k] == pytest.approx((w * Y[known, k]).sum() / w.sum() if known else 0, abs=1e-6)
        centre = [Z[labelled][Y[labelled, k] == v].mean(0) for v in (0, 1)]
        centre = [c / np.linalg.norm(c) for c in centre]
        assert far(X[[i]])[0, k] == pytest.approx(Z[i] @ centre[1] - Z[i] @ centre[0])
    assert np.allclose(training_free(X, Y, train_, val, 'knn')[1], training_free(X[:45], Y[:45], train_, val, 'knn')[1])      # nothing of the test records
    assert np.allclose(near(np.tile(X, (20, 1))), np.tile(near(X), (20, 1)))                 # 1,200 records, 400 at a time


# --- what an encoder makes of records

def test_per_record_mean_over_crops(here):
    ds, rows = Dataset('sample'), np.array([7, 3])
    got = per_record(lambda batch: batch['x'].mean(2) ** 2, ds, rows, 600, CPU)
    for row, value in zip(rows, got):
        x = ds.crop(np.array([row]), np.array([0]), 2400)[0].view(12, 4, 600)
        assert np.allclose(value, (x.mean(2) ** 2).mean(1), atol=1e-6)


class Short:
    """A Dataset whose records end after one crop, so that a random crop is the first."""

    def __init__(self, ds, samples):
        self.ds, self.length = ds, np.full(len(ds), samples)

    def __getattr__(self, name):
        return getattr(self.ds, name)

    def crops(self, rows, samples):
        return rows, np.zeros(len(rows), int)


@pytest.fixture(scope='module', autouse=True)
def small(world):
    """datasets/few: 150 synthetic records with many findings in three folds, and no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        records = []
        for record in data.synthetic(900, seed=5):
            record.load(record)
            record.load = None
            if sum(v for name, v in record.labels.items() if name.startswith('findings/')) >= 2:
                records.append(record)
        data.prepare('few', records[:150], extra_tasks=data.SYNTHETIC_TASKS, workers=1)
        index = dict(np.load('datasets/few/index.npz'))
        np.savez('datasets/few/index.npz', **{**index, 'fold': index['fold'] % 3})


@pytest.fixture(scope='module')
def few(world):
    """The synthetic set with records of one crop, rows of three folds and labels of two classes and one number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        ds = Dataset('synthetic')
    rows = [r[:n] for r, n in zip(ds.split(), (48, 24, 24))]
    columns = [ds.label_names.index(n) for n in ('findings/SB', 'findings/ST', 'target/hr')]
    y = np.array(ds.labels[:, columns], float)
    y[:, 2] = (y[:, 2] - 75) / 20
    return Short(ds, 600), rows, y, np.array([False, False, True])


@pytest.mark.parametrize('mode', ['linear', 'frozen'])
def test_probe_on_kept_tokens_equals_the_probe_on_crops(few, mode):
    (ds, rows, y, numbers), recipe = few, replace(PROTOCOLS['quick'], epochs=dict(linear=3, frozen=3), batch=16, steps=dict.fromkeys(MODES, 0), factor=dict.fromkeys(MODES, 1.), standardise=False)
    torch.manual_seed(0)
    encoder, all_rows = Encoder(TINY).eval(), np.concatenate(rows)
    found = {}
    for name, source in (('crops', ds), ('single', Tokens(encoder, ds, all_rows, 600, CPU, mode == 'linear', np.float32)), ('half', Tokens(encoder, ds, all_rows, 600, CPU, mode == 'linear'))):
        found[name] = fit(encoder, source, y, *rows, 600, mode, recipe, CPU, 5, numbers)
    for i in range(2):
        assert np.allclose(found['single'][i], found['crops'][i], atol=1e-4) and np.allclose(found['half'][i], found['crops'][i], atol=2e-3)
    other = fit(encoder, ds, y, *rows, 600, mode, recipe, CPU, 6, numbers)
    assert np.abs(other[1] - found['crops'][1]).max() > 1e-3     # another seed is told apart


def test_quick_attention_pooling_standardises_tokens_by_the_training_records(few):
    (ds, rows, y, numbers), recipe = few, replace(PROTOCOLS['quick'], epochs=dict(frozen=2), batch=16, steps=dict.fromkeys(MODES, 0))
    torch.manual_seed(0)
    encoder = Encoder(TINY).eval()
    tokens, byhand = (Tokens(encoder, ds, np.concatenate(rows), 600, CPU, dtype=np.float32) for _ in range(2))
    mine = np.concatenate([tokens.h[[tokens.at[r, 0]]][0] for r in rows[0].tolist()])        # all tokens of the training records
    byhand.h[:] = (byhand.h - mine.mean(0)) / mine.std(0)
    found = fit(encoder, tokens, y, *rows, 600, 'frozen', recipe, CPU, 5, numbers)
    wanted = fit(encoder, byhand, y, *rows, 600, 'frozen', replace(recipe, standardise=False), CPU, 5, numbers)
    assert np.allclose(found[1], wanted[1], atol=1e-4)
    plain = fit(encoder, tokens, y, *rows, 600, 'frozen', replace(recipe, standardise=False), CPU, 5, numbers)
    assert np.abs(plain[1] - wanted[1]).max() > 1e-3


def test_kept_beat_tokens_equal_the_encoders(here):
    torch.manual_seed(0)
    ds, rows = Dataset('synthetic'), np.arange(12)
    encoder, head = Encoder(Config('beat', 32, 1, 64, 1, dropout=0.)).eval(), AttentionPool(32, 4)
    tokens = Tokens(encoder, ds, rows, 600, CPU, dtype=np.float32)
    owner, start = ds.crops(rows, 600)
    pick = np.random.default_rng(0).permutation(len(owner))[:16]
    kept = tokens.collate(owner[pick], start[pick], 600)
    assert kept['pad'].any() and len(set(kept['pad'].sum(1).tolist())) > 1
    with torch.no_grad():
        assert torch.allclose(head(kept['h'], kept['pad']), head(*encoder(ds.collate(owner[pick], start[pick], 600))), atol=1e-5)


def test_tokens_that_do_not_fit_the_disk_are_refused(here, monkeypatch):
    monkeypatch.setattr(evaluate.shutil, 'disk_usage', lambda path: type('Usage', (), dict(free=1000)))
    with pytest.raises(Stop, match='tokens take .* TMPDIR'):
        Tokens(Encoder(TINY), Dataset('sample'), np.arange(4), 600, CPU)


@pytest.mark.parametrize('mode', ['linear', 'frozen', 'knn'])
def test_probes_leave_the_encoder_bitwise_unchanged(here, mode):
    torch.manual_seed(0)
    ds, encoder = Dataset('synthetic'), Encoder(TINY)
    before = copy.deepcopy(encoder.state_dict())
    rows = [r[:40] for r in ds.split()]
    y = np.array(ds.labels[:, :24])
    if mode == 'frozen':
        fit(encoder, ds, y, *rows, 600, 'frozen', replace(PROTOCOLS['quick'], cached=False), CPU, epochs=1)
    else:
        X = np.zeros((len(ds), 16))
        X[np.concatenate(rows)] = embed(encoder, ds, np.concatenate(rows), 600, CPU)
        linear_probe(X, y, *rows[:2]) if mode == 'linear' else training_free(X, y, *rows[:2], mode)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), encoder.state_dict().values())) and not encoder.training


def test_fit_learns(here):
    """Training on the records that it is then asked about must beat chance by far."""
    torch.manual_seed(0)
    ds = Dataset('synthetic')
    rows, column = np.arange(160), [ds.label_names.index('findings/PACE'), ds.label_names.index('findings/LBBB')]
    y = np.array(ds.labels[:, column])
    given = Encoder(TINY)
    before = copy.deepcopy(given.state_dict())
    val, test = fit(given, ds, y, rows, rows, rows, 600, 'scratch', Recipe(lr=3e-3, factor=dict(scratch=1.)), CPU, epochs=12)
    assert macro(auroc(test, y[rows]))[0] > .8 and np.array_equal(val, test)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), given.state_dict().values()))                                # a copy learnt


def test_the_epoch_is_chosen_on_validation(few, monkeypatch):
    """Of the epochs the one with the best validation score predicts, with what it was then; patience stops after so many without a better."""
    (ds, rows, y, numbers), told = few, iter([.1, .5, .2, .5, .4, .3, .2, .1])
    monkeypatch.setattr(evaluate, 'probe_value', lambda z, y: next(told))
    monkeypatch.setattr(evaluate, 'number_value', lambda z, y: 0.)
    torch.manual_seed(0)
    encoder, recipe = Encoder(TINY).eval(), replace(PROTOCOLS['sc'], cached=False)
    best = fit(encoder, ds, y, *rows, 600, 'linear', replace(recipe, patience=3), CPU, numbers=numbers, epochs=8)
    assert next(told) == .3                                      # the second epoch, then three no better: five were asked for
    monkeypatch.setattr(evaluate, 'probe_value', lambda z, y: 0 if len(seen.append(z) or seen) != 2 else 1)
    seen = []
    again = fit(encoder, ds, y, *rows, 600, 'linear', replace(recipe, patience=0), CPU, numbers=numbers, epochs=8)
    assert len(seen) == 8 and np.allclose(again[0][:, :2], scipy.special.expit(seen[1])) and np.array_equal(again[1], best[1])


# --- losses and rates

def test_loss_is_the_released_joint_one():
    rng = np.random.default_rng(0)
    logits, target = torch.tensor(rng.normal(size=(9, 6)), requires_grad=True), torch.tensor(np.c_[rng.integers(0, 2, (9, 3)), rng.normal(size=(9, 3))])
    target[torch.tensor(rng.random((9, 6)) < .4)] = float('nan')
    target[:, [2, 5]] = float('nan')                             # a class and a number of which the batch knows nothing
    numbers = torch.tensor([False] * 3 + [True] * 3)

    def mean_of(columns, error):
        known = [[i for i in range(9) if target[i, c].isfinite()] for c in columns]
        return np.mean([np.mean([error(logits[i, c].item(), target[i, c].item()) for i in rows]) for c, rows in zip(columns, known) if rows])
    bce = lambda x, t: np.log1p(np.exp(-x)) if t else np.log1p(np.exp(x))
    by_hand = mean_of((0, 1, 2), bce), mean_of((3, 4, 5), lambda x, t: abs(x - t))
    loss = loss_of(logits, target, numbers)
    assert loss.item() == pytest.approx(sum(by_hand))
    loss.backward()
    assert torch.equal(logits.grad != 0, target.isfinite())
    assert loss_of(logits[:, :3], target[:, :3], numbers[:3]).item() == pytest.approx(by_hand[0])
    whole = torch.randint(0, 2, (9, 3)).double()
    assert loss_of(logits[:, :3], whole, numbers[:3]).item() == pytest.approx(F.binary_cross_entropy_with_logits(logits[:, :3], whole).item())
    nothing = loss_of(logits, torch.full_like(target, float('nan')), numbers)
    assert nothing.item() == 0 and nothing.requires_grad


@pytest.mark.parametrize('backbone', ['s4', 's4d', 'transformer', 'net1d', 'resnet', 'beat', 'vit'])
def test_rates(backbone):
    """Every tensor that learns once, at its rate: finetune 1, .1, .01; scratch all alike; layer by layer decay^(L + 1 - l)."""
    encoder, head = Encoder(config_of(backbone, 'tiny')), torch.nn.Linear(3, 2)
    L, recipe = len(encoder.blocks), Recipe(lr=1e-3, factor=dict.fromkeys(MODES, 1.) | dict(scratch=5.))
    part = {id(p): 'head' for p in head.parameters()} | {id(p): 0 for p in encoder.stem.parameters()} | {id(p): L for p in encoder.norm.parameters()}
    part |= {id(p): l + 1 for l, block in enumerate(encoder.blocks) for p in block.parameters()}
    dynamic = {id(p) for n, p in encoder.named_parameters() if n.endswith(('.log_step', '.a', '.w'))}
    level = lambda wanted: {i: (min(r, 1e-3) if i in dynamic else r) for i, r in wanted.items()}
    for mode, recipe, rate in (('finetune', recipe, lambda l: {'head': 1e-3, 0: 1e-5}.get(l, 1e-4)), ('scratch', recipe, lambda l: 5e-3),
                               ('finetune', replace(recipe, decay=.75), lambda l: 1e-3 * .75 ** (0 if l == 'head' else L + 1 - l))):
        groups = rates(encoder, head, mode, recipe)
        ids = [id(p) for g in groups for p in g['params']]
        assert len(ids) == len(set(ids)) and set(ids) == set(part)
        assert {id(p): g['peak'] for g in groups for p in g['params']} == pytest.approx(level({i: rate(l) for i, l in part.items()}))
    for mode in ('linear', 'frozen'):
        assert [id(p) for g in rates(encoder, head, mode, recipe) for p in g['params']] == [id(p) for p in head.parameters()]


# --- leaks

def test_cross_validation_predicts_each_record_once_and_keeps_patients_apart(here):
    ds = Dataset('sample')
    found, folded = plans(ds, np.arange(len(ds)), set())
    assert folded and np.array_equal(np.sort(np.concatenate([p[2] for p in found])), np.arange(len(ds)))
    for parts in found:
        patients = [set(ds.patient[p]) for p in parts]
        assert not patients[0] & patients[1] and not patients[0] & patients[2] and not patients[1] & patients[2]


def test_a_planted_test_patient_is_left_out_of_training(here):
    """As is one whose other record repeats the signal of a record of the planted patient's."""
    ds = Dataset('sample')
    ds.patient, ds.signal = ds.patient.copy(), ds.signal.copy()
    tested, planted, third = (np.flatnonzero(ds.fold == fold)[0] for fold in (7, 3, 4))
    ds.patient[planted], ds.signal[third] = ds.patient[tested], ds.signal[planted]
    train_, val, test = plans(ds, np.arange(len(ds)), set())[0][6]
    assert tested in test and not {planted, third} & {*train_, *val}


def test_folds_seen_in_pretraining_are_not_tested_on(here, capsys):
    ds = Dataset('sample')
    found, _ = plans(ds, np.arange(len(ds)), set(ds.patient[ds.fold <= 8]))
    assert set(ds.fold[np.concatenate([p[2] for p in found])]) == {9, 10} and '8 of 10' in capsys.readouterr().out
    everything = set(ds.patient)
    with pytest.raises(Stop, match='patients of every test fold.*--allow overlap'):
        plans(ds, np.arange(len(ds)), everything)
    found, _ = plans(ds, np.arange(len(ds)), everything, allow=True)
    assert len(found) == 10 and '500 test records are of patients seen in pretraining, allowed' in capsys.readouterr().out


class Listed:
    """Ids, patients and folds alone."""
    name = 'listed'
    names = Dataset.names

    def __init__(self, patient, id=None, fold=None):
        self.patient, self.id = np.array(patient), np.array(patient if id is None else id)
        self.recording = np.array([data.same_recording(str(i)) for i in self.id])
        self.signal = np.array([f'signal of {i}' for i in self.id])
        self.fold = None if fold is None else np.array(fold)


def test_the_challenges_names_of_ptbxl_are_known():
    """HR00599 is PTB-XL's record 599, in both directions, and takes its patient's other records along."""
    ptbxl = Listed(['ptbxl/patient1', 'ptbxl/patient1', 'ptbxl/patient2'], ['ptbxl/599', 'ptbxl/600', 'ptbxl/601'])
    assert overlap(ptbxl, {'ptb-xl/HR00599'}).tolist() == [True, True, False]
    assert overlap(Listed(['ptb-xl/HR00599', 'ptb-xl/HR05990', 'georgia/E00599']), {'ptbxl/599', 'ptbxl/patient1'}).tolist() == [True, False, False]
    assert overlap(ptbxl, {'ptbxl/patient2'}).tolist() == [False, False, True] and not overlap(ptbxl, {'patient1', '599', 'ptbxl/59'}).any()


def test_folds_that_a_source_gives():
    """EchoNext's 0, 8, 9 with -1 for unlabelled: large sets test on the last alone, -1 always trains; a triple of folds is taken as it is."""
    ds = Listed([f'p{i}' for i in range(2000)], fold=[-1] * 200 + [0] * 1400 + [8] * 200 + [9] * 200)
    ((train_, val, test),), folded = plans(ds, np.arange(2000), set())
    assert not folded and set(ds.fold[train_]) == {-1, 0} and set(ds.fold[val]) == {8} and set(ds.fold[test]) == {9}
    ds.fold = np.arange(2000) % 20
    ((train_, val, test),), _ = plans(ds, np.arange(2000), set(), ((0, 1, 2, 3, 4), (17,), (18, 19)))
    assert (len(train_), len(val), len(test)) == (500, 100, 200) and set(ds.fold[test]) == {18, 19}
    small = np.arange(0, 900)
    found, folded = plans(ds, small, set())
    assert folded and len(found) == 20 and np.array_equal(np.sort(np.concatenate([p[2] for p in found])), small)


def test_folds_without_labelled_records_are_no_folds(here):
    ds = Dataset('sample')
    found, _ = plans(ds, np.flatnonzero(ds.fold != 4), set())
    assert len(found) == 9 and min(len(part) for p in found for part in p) > 0
    with pytest.raises(Stop, match='in 2 folds'):
        plans(ds, np.flatnonzero(ds.fold < 3), set())


def test_label_draws():
    train_, val = np.arange(100), np.arange(100, 120)
    a, b = draw_labels(train_, val, 50, draw=0)
    assert len(a) == 40 and len(b) == 10 and len(set(a) | set(b)) == 50
    assert not np.array_equal(a, draw_labels(train_, val, 50, 1)[0]) and draw_labels(train_, val, 'all', 1) == (train_, val)


# --- tasks

@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Random encoders see one batch, not eight, and are one where three would stand beside a single run."""
    three = Task.random_encoders
    monkeypatch.setattr(Task, 'random_encoders', lambda self, run, count: three(self, run, count if count < 3 else 1))
    monkeypatch.setattr(evaluate, 'calibrate_batchnorm', lambda encoder, batches: calibrate_batchnorm(encoder, itertools.islice(batches, 1)))


@pytest.fixture(scope='module')
def run(world):
    """A run of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        train.main('--steps 2 --batch 4 --layers 1 --probe-every 0 --out out/short'.split())
    return 'out/short'


@pytest.fixture(scope='module')
def others(world, run):
    """Runs to compare with: another seed, another depth with both seeds, a longer window."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        for flags in ('--seed 1 --out out/second', '--layers 2 --out out/deep0', '--layers 2 --seed 1 --out out/deep1', '--window 5 --out out/wide'):
            train.main(f'--layers 1 --steps 2 --batch 4 --probe-every 0 {flags}'.split())
    return run


def test_two_tasks_share_one_training(here, run):
    """diag is scored on the columns of `all` that bear its names; labels rarer than the task's rule are no columns at all."""
    runs = [open_run(run)]
    t, ds = Task('sample', ['ptbxl_all', 'ptbxl_diag', 'ptbxl_rhythm'], runs, CPU), Dataset('sample')
    name = lambda c: ds.label_names[c].split('/')
    assert {name(c)[0] for c in t.columns} == {'all'} and t.parts['ptbxl_all'] == list(range(len(t.columns)))
    positives = {name(c)[1]: np.nansum(ds.labels[:, c] > 0) for c in ds.tasks['all']}
    assert {name(c)[1] for c in t.columns} == {n for n, p in positives.items() if p >= 10} and not t.unscored
    assert sum(0 < p < 10 for p in positives.values()) > 5
    for task in ('diag', 'rhythm'):
        kept = {name(t.columns[i])[1] for i in t.parts[f'ptbxl_{task}']}
        assert kept == {name(c)[1] for c in ds.tasks[task]} & {name(c)[1] for c in t.columns} and len(kept) > 1
        for i in t.parts[f'ptbxl_{task}']:                       # the same labels, under either name
            assert np.array_equal(ds.labels[:, t.columns[i]], ds.labels[:, ds.label_names.index(f'{task}/{name(t.columns[i])[1]}')])
    arm = Arm('pretrained', [r['net'] for r in runs], 'linear', PROTOCOLS['quick'])
    scores, (out, _) = t.score(arm), t.output(arm.encoders[0], arm, 'all', 0, 0)
    part = t.parts['ptbxl_diag']
    assert scores['ptbxl_diag'].point['AUROC'][0, 0] == macro(auroc(out[:, part], t.y[:, part], t.group))[0] and out.shape[1] == len(t.columns)
    class_ = scores['ptbxl_all'].per_class['AUROC'][part]
    assert np.allclose(class_, scores['ptbxl_diag'].per_class['AUROC'])


def test_too_few_positives_are_one_line(here, run, monkeypatch):
    monkeypatch.setitem(TASKS, 'ptbxl_rare', replace(TASKS['ptbxl_all'], least=500))
    with pytest.raises(Stop, match='too few positives: none of its labels is positive, and negative, in 500 of 500 records') as stop:
        Task('sample', ['ptbxl_rare'], [open_run(run)], CPU)
    monkeypatch.setitem(TASKS, 'ptbxl_some', replace(TASKS['ptbxl_all'], scored='form', least=100))
    with pytest.raises(Stop, match='too few positives here for any of its labels') as other:
        Task('sample', ['ptbxl_some'], [open_run(run)], CPU)
    assert '\n' not in str(stop.value) + str(other.value)


def test_flags_of_other_modes_leave_the_linear_probe_alone(here, run):
    """Linear probes are solved under the quick protocol, whatever fine-tuning beside them is told."""
    runs = [open_run(run)]
    t = Task('few', ['code'], runs, CPU)
    plain, other = (t.output(runs[0]['net'], Arm('pretrained', [runs[0]['net']], 'linear', recipe), 'all', 0, 0)[0]
                    for recipe in (PROTOCOLS['quick'], replace(PROTOCOLS['quick'], lr=3e-3, batch=8, path=.5)))
    assert np.array_equal(plain, other)
    assert not PROTOCOLS['sc'].solved and not PROTOCOLS['released'].solved


def test_numbers_are_standardised_by_their_training_records(here, run):
    runs = [open_run(run)]
    t = Task('few', ['target'], runs, CPU)
    (train_, val, test), ds = t.plans[0], Dataset('few')
    raw = np.array(ds.labels[:, t.columns], float)
    assert t.numbers.all() and len(t.columns) == 6
    assert np.allclose(t.scaled(t.plans[0]), (raw - np.nanmean(raw[train_], 0)) / np.nanstd(raw[train_], 0), atol=1e-4, equal_nan=True)
    constant = Score([[np.zeros((len(t.test), 6))]], t.y, t.patient, numbers=t.numbers)
    assert .7 < constant.point['MAE'][0, 0] < .9                 # the normal distribution's is .798
    score = t.score(Arm('pretrained', [runs[0]['net']], 'linear', PROTOCOLS['quick']))['target']
    assert score.main == 'MAE' and score.minus(constant)[0] < 0  # a probe beats the mean
    with pytest.raises(Stop, match='prototypes are of yes/no labels'):
        t.score(Arm('pretrained', [runs[0]['net']], 'prototypes', PROTOCOLS['quick']))


def test_the_benchmarks_convention_counts_classes_without_positives(here, run, monkeypatch):
    """Of the last fold's 50 records, some forms have no positive."""
    runs = [open_run(run)]
    monkeypatch.setattr(evaluate, 'plans', lambda *given: (plans(*given)[0][-1:], False))
    plain, all_ = (Task('sample', ['form'], runs, CPU, empty=e) for e in (None, .5))
    assert plain.unscored and all_.columns == plain.columns and len(all_.parts['form']) == len(plain.parts['form']) + len(plain.unscored)
    arm = Arm('pretrained', [runs[0]['net']], 'linear', PROTOCOLS['quick'])
    table = auroc(all_.output(arm.encoders[0], arm, 'all', 0, 0)[0], all_.y)[0]
    assert np.isnan(table).sum() == len(plain.unscored)
    assert all_.score(arm)['form'].point['AUROC'][0, 0] == pytest.approx((np.nansum(table) + .5 * len(plain.unscored)) / len(table), abs=1e-9)


def test_classes_that_cannot_be_scored_are_trained_on(here, run, monkeypatch):
    """As in the papers' code: a label counts by its positives in the whole dataset, whether or not the test fold has one."""
    monkeypatch.setattr(evaluate, 'plans', lambda *given: (plans(*given)[0][-1:], False))
    runs, given = [open_run(run)], []
    t, ds = Task('sample', ['ptbxl_all'], runs, CPU), Dataset('sample')
    assert t.unscored and set(t.unscored) < {ds.label_names[c] for c in t.columns}
    assert {ds.label_names[t.columns[c]] for c in t.parts['ptbxl_all']} == {ds.label_names[c] for c in t.columns} - set(t.unscored)
    monkeypatch.setattr(evaluate, 'fit', lambda encoder, source, y, train, val, test, *rest: (given.append(y), (np.zeros((len(val), y.shape[1])), np.zeros((len(test), y.shape[1]))))[1])
    score = t.score(Arm('pretrained', [runs[0]['net']], 'finetune', PROTOCOLS['released']))['ptbxl_all']
    positives = (np.array(ds.labels[:, ds.tasks['all']]) > 0).sum(0)
    assert given[0].shape[1] == (positives >= 10).sum() and np.isfinite(score.per_class['AUROC']).all()


def test_the_preview_has_not_seen_validation(here, run, monkeypatch):
    """The head that fine-tuning starts with gives the converged probe's outputs, and labels of validation records do not reach it."""
    runs, caught = [open_run(run)], []
    t = Task('few', ['code'], runs, CPU)
    monkeypatch.setattr(evaluate, 'fit', lambda *given: (caught.append(given[-1]), (None, None))[1])
    arm, e = Arm('pretrained', [runs[0]['net']], 'finetune', replace(PROTOCOLS['quick'], preview=True)), runs[0]['net']
    t.fitted(e, t.plans[0], arm)
    X, (train_, val, test) = t.embedding(e), t.plans[0]
    predict, z = linear_probe(X, t.raw, train_, val, refit=False)
    assert np.allclose(X[test] @ caught[0][:-1] + caught[0][-1], predict(X[test])) and np.allclose(X[val] @ caught[0][:-1] + caught[0][-1], z)
    monkeypatch.setattr(t, 'raw', t.raw.copy())
    t.raw[test] = 1 - t.raw[test]
    t.fitted(e, t.plans[0], arm)
    assert np.array_equal(caught[0], caught[1])


def test_scores_are_kept_and_recipes_not_confused(here, run, monkeypatch):
    runs = [open_run(run)]
    arm = lambda **how: Arm('pretrained', [runs[0]['net']], 'frozen', replace(PROTOCOLS['quick'], **how), 1)
    t = Task('few', ['code'], runs, CPU)
    t.plans = t.plans[:1]
    first = t.output(runs[0]['net'], arm(), 'all', 0, 0)
    monkeypatch.setattr(Task, 'fitted', lambda *given: pytest.fail('trained again'))
    again = Task('few', ['code'], [open_run(run)], CPU)
    again.plans = t.plans
    assert all(np.array_equal(a, b) for a, b in zip(first, again.output(open_run(run)['net'], arm(), 'all', 0, 0)))
    other = copy.deepcopy(runs[0]['net'])
    next(other.parameters()).data[0] += 1e-3
    for encoder, recipe, *rest in ((runs[0]['net'], arm(lr=2e-3), 'all', 0, 0), (other, arm(), 'all', 0, 0), (runs[0]['net'], arm(), 30, 0, 0),
                                   (runs[0]['net'], arm(), 'all', 1, 0), (runs[0]['net'], arm(), 'all', 0, 1)):
        with pytest.raises(pytest.fail.Exception, match='trained again'):
            t.output(encoder, recipe, *rest)


def test_random_encoders_have_the_runs_shape(here, others, monkeypatch):
    monkeypatch.setattr(evaluate, 'calibrate_batchnorm', calibrate_batchnorm)
    runs = [open_run(r) for r in ('out/short', 'out/wide')]
    t = Task('few', ['code'], runs, CPU)
    (a, b), (c,) = t.random_encoders(runs[0], 2), t.random_encoders(runs[1], 1)
    assert a.config == runs[0]['net'].config and c.config == runs[1]['net'].config and t.random_encoders(runs[0], 2)[0] is a
    assert not torch.equal(next(a.parameters()), next(b.parameters())) and a.stem[1].num_batches_tracked == 8
    assert t.crop(a) == t.crop(runs[0]['net']) == 600 and t.crop(c) == t.crop(runs[1]['net']) == 1200 == t.samples                # each its own window


@pytest.mark.parametrize('name, pretrained', [('few', 'gone'), ('sample', 'gone'), ('synthetic', 'gone'), ('sample', 'sample')])
def test_random_encoders_see_nothing_that_is_tested_on(here, run, monkeypatch, name, pretrained):
    """Whether or not what the run was pretrained on is prepared, in one split as in ten folds."""
    seen = []
    monkeypatch.setattr(Dataset, 'batch', lambda self, rows, *rest: seen.append((self, rows)))
    monkeypatch.setattr(evaluate, 'calibrate_batchnorm', lambda encoder, batches: (list(batches), encoder)[1])
    ds, loaded = Dataset(name), dict(open_run(run), data=pretrained)
    loaded['patients'] = set(ds.patient[ds.fold <= 8]) if pretrained == name else set()
    t = Task(name, None, [loaded], CPU)
    t.random_encoders(loaded, 2)
    held = np.concatenate([np.r_[p[1], p[2]] for p in t.plans])
    assert len(seen) == 16
    for source, rows in seen:
        assert len(rows) and not set(source.patient[rows]) & set(t.ds.patient[held]) and not set(source.id[rows]) & set(t.ds.id[held])


# --- groups of runs

def pretend(objective='cpc', seed=0, step=10, **args):
    return dict(path=f'out/{objective}{seed}', seed=seed, step=step, objective=objective, args=dict(objective=objective, backbone='s4', size='tiny', seed=seed, **args))


def test_runs_are_grouped_and_named_by_what_differs():
    runs = [pretend(o, s) for s in (1, 0) for o in ('cpc', 'jepa')]
    found = grouped(runs)
    assert list(found) == ['cpc', 'jepa'] and [r['seed'] for r in found['cpc']] == [0, 1]
    assert list(grouped(runs[::2])) == ['pretrained'] and len(grouped(runs[::2])['pretrained']) == 2
    assert list(grouped([pretend(lr=1.), pretend(lr=2.), pretend('jepa', lr=1.)])) == ['cpc lr=1.0', 'cpc lr=2.0', 'jepa lr=1.0']
    assert list(grouped([pretend(step=10), pretend(step=20)])) == ['step=10', 'step=20'] and len(grouped([pretend(), pretend(new=1)])) == 2
    with pytest.raises(Stop, match='share all settings and the seed'):
        grouped([pretend(), pretend()])
    with pytest.raises(Stop, match='same seeds.*cpc0 ... 0, 1; jepa0 ... 0, 2'):
        grouped([pretend(), pretend(seed=1), pretend('jepa'), pretend('jepa', seed=2)])


def test_tasks_are_sorted_by_training():
    A = SimpleNamespace
    assert jobs_of(A(task=['ptbxl_all', 'ptbxl_super', 'ptbxl_form'], data=None)) == [('ptbxl', ['ptbxl_all', 'ptbxl_form']), ('ptbxl', ['ptbxl_super'])]
    assert jobs_of(A(task=None, data=None)) == [('synthetic', []), ('sample', [])] and jobs_of(A(task=['super'], data=['a', 'b'])) == [('a', ['super']), ('b', ['super'])]
    for task in (['super'], ['ptbxl_all', 'super']):
        with pytest.raises(Stop, match='--task super is no task of the papers'):
            jobs_of(A(task=task, data=None))


# --- analyses

def biased_cka(X, Y):
    """As it was first defined (Kornblith et al. 2019, eq. 3 and 4)."""
    X, Y = X - X.mean(0), Y - Y.mean(0)
    return ((X.T @ Y) ** 2).sum() / np.linalg.norm(X.T @ X) / np.linalg.norm(Y.T @ Y)


def test_cka_golden_values():
    """Google's notebook, numpy's legacy seed 1337; and why debiasing matters: 50 records of 400 unrelated features."""
    rng = np.random.RandomState(1337)
    X = rng.randn(100, 10)
    Y = rng.randn(100, 10) + X
    assert biased_cka(X, Y) == pytest.approx(.55761, abs=1e-5) and cka(X, Y) == pytest.approx(.51346, abs=1e-5)
    rotation = np.linalg.qr(rng.randn(10, 10))[0]
    assert cka(3 * X @ rotation + 5, Y) == pytest.approx(cka(X, Y)) and cka(X, -2 * X) == pytest.approx(1)
    assert abs(cka(X @ rng.randn(10, 10), Y) - cka(X, Y)) > .01  # not to any linear map
    A, B = rng.randn(50, 400), rng.randn(50, 400)
    assert biased_cka(A, B) > .85 and abs(cka(A, B)) < .05


def test_hsic_equals_the_sum_over_distinct_indices():
    """Unbiased HSIC: means of K_ij L_ij, K_ij L_kl and K_ij L_ik over tuples of distinct records (Song et al. 2012, eq. 4)."""
    rng, n = np.random.default_rng(0), 6
    K, L = (x @ x.T for x in rng.normal(size=(2, n, 3)))
    mean = lambda m, value: np.mean([value(*i) for i in itertools.permutations(range(n), m)])
    assert hsic(K, L) == pytest.approx(mean(2, lambda i, j: K[i, j] * L[i, j]) + mean(4, lambda i, j, k, l: K[i, j] * L[k, l])
                                       - 2 * mean(3, lambda i, j, k: K[i, j] * L[i, k]))


def test_label_law_is_recovered():
    n = np.array([2000, 1000, 500, 250, 125, 62, 31, 16])
    for law in ((1.5, .5, .08), (.8, .3, .02), (3., 1., .1)):
        assert label_law(n, law[0] * n ** -law[1] + law[2]) == pytest.approx(law, rel=.02)


def test_one_record_of_each_patient():
    ds, rows = Listed(np.random.default_rng(0).integers(0, 20, 60)), np.arange(5, 55)
    found = one_per_patient(ds, rows)
    assert len(found) == len(set(ds.patient[found])) == len(set(ds.patient[rows])) and set(found) <= set(rows)
    assert np.array_equal(found, one_per_patient(ds, rows)) and not np.array_equal(found, one_per_patient(ds, rows, 43))


def test_subsets_keep_records_without_labels(here, run):
    """Of records without any label, of women and of the old a half keeps the half."""
    t = Task('few', ['code'], [open_run(run)], CPU)
    rows = t.plans[0][0]
    table = evaluate.balance(t, rows)
    half = data.stratify(table, folds=2, seed=0) == 0
    t.ds.age, t.ds.sex = np.full((2, len(t.ds)), np.nan)         # where neither age nor sex is known, the lack of labels still places a record
    assert evaluate.balance(t, rows).any(1).all()
    assert table.any(1).all() and abs(half.sum() - len(rows) / 2) <= 2 and table[:, len(t.columns)].sum() > 10
    assert (np.abs(table[half].sum(0) - table.sum(0) / 2) <= 2).all()


def test_calibration_is_of_each_encoder(here, others, tmp_path):
    """Not of their mean: beside one pretraining stand three random encoders, and an ensemble is calibrated better."""
    runs = [open_run(r) for r in ('out/short', 'out/second')]
    t, arm = Task('few', ['code'], runs, CPU), Arm('pretrained', [r['net'] for r in runs], 'linear', PROTOCOLS['quick'])
    found = {r['arm']: r for r in evaluate.calibration({'pretrained': runs}, t, None, tmp_path)}['pretrained']
    known, errors, briers = np.isfinite(t.y), [], []
    for s, encoder in enumerate(arm.encoders):
        p, y = scipy.special.expit(t.output(encoder, arm, 'all', s, 0)[0])[known], t.y[known]
        bins = [(p >= k / 10) & (p < (k + 1) / 10) for k in range(10)]
        errors.append(sum(abs(p[b].mean() - y[b].mean()) * b.mean() for b in bins if b.any()))
        briers.append(np.mean((p - y) ** 2))
    assert found['expected_calibration_error'] == pytest.approx(np.mean(errors)) and found['brier'] == pytest.approx(np.mean(briers))


def test_groups_of_patients_are_twenty_records_or_more(here, run, tmp_path):
    """Of numbers as of labels: one record would have an interval of no width."""
    runs = [open_run(run)]
    t = Task('few', ['target'], runs, CPU)
    rows = evaluate.robustness({'pretrained': runs}, t, SimpleNamespace(cohort=[]), tmp_path)
    count = {f'age {low} to {high - 1}': int(((t.ds.age >= low) & (t.ds.age < high)).sum()) for low, high in ((0, 40), (40, 60), (60, 80), (80, 120))}
    assert {r['condition']: r['n'] for r in rows if 'age' in r['condition']} == {c: n for c, n in count.items() if n >= 20} and 0 < min(count.values()) < 20


def test_efficiency_names_the_metric_of_its_task(here, run, tmp_path, monkeypatch):
    """Numbers that are trained together with labels, as MIMIC's age is."""
    monkeypatch.setitem(TASKS, 'joint', replace(TASKS['ptbxl_all'], trained='code+target', scored='target', least=1))
    drawn, runs = [], [open_run(run)]
    monkeypatch.setattr(evaluate, 'figure', lambda *a, **k: drawn.append(figure(*a, **k)) or drawn[-1])
    rows = evaluate.efficiency({'pretrained': runs}, Task('few', ['joint'], runs, CPU), SimpleNamespace(draws=1), tmp_path)
    assert {r['metric'] for r in rows} == {'macro MAE'} and drawn[0][1].get_ylabel() == 'macro MAE'


def test_changed_signals(here):
    x = Dataset('synthetic').crop(np.arange(20), np.zeros(20, int), 600)
    swapped = swap_arms(x)
    assert torch.equal(swap_arms(swapped), x) and torch.equal(swapped[:, 6:], x[:, 6:]) and torch.equal(swapped[:, 0], -x[:, 0])
    I, II, III, R, L, F_ = swapped[:, :6].unbind(1)              # Einthoven and Goldberger still hold, so this is an ECG
    assert (I + III - II).abs().max() < 3e-3 and (R + (I + II) / 2).abs().max() < 3e-3 and (L - (I - III) / 2).abs().max() < 3e-3 and torch.equal(F_, x[:, 5])
    rows, starts = np.arange(20), np.zeros(20, int)
    for snr in (20, 0):
        noise = noisy(snr)(x, rows, starts) - x
        measured = 10 * torch.log10(x.var((1, 2)) / noise.var((1, 2)))
        assert (measured - snr).abs().max() < .5 and not torch.equal(noisy(snr)(x, rows, starts), x)
    bare = without(0, 7)(x)
    assert not bare[:, [0, 7]].any() and torch.equal(bare[:, 1:7], x[:, 1:7]) and x[:, 0].any()
    t = torch.arange(2400) / 240
    sine = torch.sin(2 * torch.pi * 10 * t).expand(1, 12, -1)
    fast = torch.sin(2 * torch.pi * 80 * t).expand(1, 12, -1)
    inside = slice(100, -100)
    assert (at_rate(240, 100)(sine) - sine)[..., inside].abs().max() < .02 and at_rate(240, 100)(fast)[..., inside].abs().max() < .05


def test_noise_belongs_to_the_record(here):
    """In whatever order, batches and windows encoders ask, and however often, a record's samples get the same noise."""
    ds, rows = Dataset('synthetic'), np.arange(6)
    changed, loud = evaluate.Changed(ds, noisy(0)), lambda rows, starts, samples: ds.crop(rows, starts, samples).var((1, 2), keepdim=True).sqrt()
    noise = lambda rows, starts, samples: (changed.collate(rows, starts, samples)['x'] - ds.crop(rows, starts, samples)) / loud(rows, starts, samples)
    once, again = noise(rows, np.full(6, 600), 600), noise(rows[[4, 1]], np.full(2, 600), 600)
    assert torch.allclose(once[[4, 1]], again) and torch.allclose(noise(rows, np.zeros(6, int), 1200)[..., 600:], once, atol=1e-4)
    assert (once[0] - once[1]).abs().mean() > .5 and (once - noise(rows, np.zeros(6, int), 600)).abs().mean() > .5


# --- the command line

def test_foreign_checkpoints_are_refused(here, run):
    c = load(here / run / 'ckpt.pt')
    for name, wrong in (('a', {'w': torch.zeros(1)}), ('b', {**c, 'encoder': dict(list(c['encoder'].items())[1:])})):
        (here / 'out' / name).mkdir()
        torch.save(wrong, here / 'out' / name / 'ckpt.pt')
        data.write_seen(here / 'out' / name, set())
        with pytest.raises(Stop, match='no checkpoint of train.py'):
            open_run(here / 'out' / name)


def test_the_newest_run_is_found_past_damage(tmp_path, monkeypatch, here, run):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stop, match='no run in out/'):
        evaluate.newest()
    for name, content in (('good', (here / run / 'ckpt.pt').read_bytes()), ('torn', b'PK')):
        (tmp_path / 'out' / name).mkdir(parents=True)
        (tmp_path / 'out' / name / 'ckpt.pt').write_bytes(content)
    assert evaluate.newest().name == 'good'


def test_evaluate_writes_its_results(here, run, capsys):
    evaluate.main([run, '--data', 'few', '--labels', '40', 'all', '--draws', '1', '--epochs', '1', '--scratch'])
    evaluate.main([run, '--data', 'sample'])
    text = capsys.readouterr().out
    for word in ('from scratch', 'random encoder', 'pretrained', 'findings: ', 'few, linear: 150 test records of', 'sample, linear: 500 test records of 466 patients', 'super: 5 labels', 'one pretraining seed'):
        assert word in text
    result = json.loads((here / run / 'results_sample_super_linear_all_0.json').read_text())
    assert result['n'] == 500 and result['patients'] == 466 and result['low'] < result['point'] < result['high']
    assert result['classes'] == len(result['names']) == len(result['per_class']['AUROC']) == 5 and result['contract']['fs'] == 240
    mean, low, high = map(float, result['minus_reference'].split())
    assert low < mean < high and result['labels'] == 'all' and result['checkpoint'] == open_run(run)['hash']
    for name in ('results_few_linear.csv', 'results_few_linear.md', 'classes_few_linear.csv', 'labels_few_linear.png', 'pca_sample.png', 'pca_few.png'):
        assert (here / run / name).stat().st_size > 100
    table = list(csv.DictReader(open(here / run / 'results_few_linear.csv')))
    assert {r['metric'] for r in table} == {'macro AUROC', 'macro AUPRC', 'macro F1'} and all(0 <= float(r['low']) <= float(r['mean']) <= float(r['high']) <= 1 for r in table)


def test_two_runs_share_one_table(here, others, capsys):
    evaluate.main([others + '/ckpt.pt', 'out/second', '--data', 'few', '--task', 'findings'])
    table = [r for r in csv.DictReader(open(here / others / 'results_few_findings_linear.csv')) if r['metric'] == 'macro AUROC']
    mine = [r for r in table if r['arm'] == 'pretrained']
    assert len(table) == 4 and {r['seed'] for r in mine} == {'0', '1'} and mine[0]['mean'] == mine[1]['mean']
    assert float(mine[0]['mean']) == pytest.approx(np.mean([float(r['point']) for r in mine]))
    with pytest.raises(Stop, match='share all settings and the seed'):
        evaluate.main([others, others])


def test_pretrainings_are_compared(here, others, capsys):
    """Two depths with two seeds each: a table of pairs with verdicts, ranks, a figure; in every metric's direction."""
    flags = [others, 'out/second', 'out/deep0', 'out/deep1', '--data', 'few', '--task', 'code', 'target']
    evaluate.main(flags)
    text = capsys.readouterr().out
    assert 'layers=1' in text and 'layers=2' in text and 'ranks (ties' in text and 'macro MAE' in text
    name = 'few_code_target_linear_against_deep0'
    pairs = list(csv.DictReader(open(here / others / f'pairs_{name}.csv')))
    assert len(pairs) == 12 and {r['task'] for r in pairs} == {'code', 'target'}             # 2 pretrainings and 2 random encoders of their shapes
    points = {(r['task'], r['arm']): float(r['mean']) for r in csv.DictReader(open(here / others / f'results_{name}.csv')) if r['metric'] in ('macro AUROC', 'macro MAE')}
    for r in pairs:
        d = float(r['difference'])
        assert float(r['low']) < d < float(r['high']) and d == pytest.approx(points[r['task'], r['a']] - points[r['task'], r['b']], abs=1e-4)
        if r['verdict'] in ('better', 'worse'):
            assert (r['verdict'] == 'better') == (d > 0) ^ (r['task'] == 'target')
    markdown = (here / others / f'results_{name}.md').read_text()
    assert '| data, task | mode | labels | a | b |' in markdown and 'layers=2' in markdown
    assert (here / others / 'arms_few_code_linear_all.png').stat().st_size > 100
    with pytest.raises(Stop, match='need the same seeds'):
        evaluate.main([others, 'out/second', 'out/deep0'])


def test_windows_of_their_own(here, others):
    """2.5 s and 5 s: each encoder sees what it was pretrained on, whichever comes first."""
    found = []
    for order in (['out/short', 'out/wide'], ['out/wide', 'out/short']):
        evaluate.main([*order, '--data', 'few', '--task', 'code', '--mode', 'knn'])
        name = f'results_few_code_knn_against_{order[1].split("/")[1]}.csv'
        found.append({r['arm']: r['mean'] for r in csv.DictReader(open(here / order[0] / name)) if r['metric'] == 'macro AUROC'})
    assert found[0] == found[1] and {'window=2.5', 'window=5.0'} < set(found[0])


def test_ablation_of_post_training(here, run, capsys):
    evaluate.main([run, '--data', 'few', '--task', 'code', '--mode', 'finetune', '--ablate', '--labels', '40', '--draws', '1', '--epochs', '1'])
    table = list(csv.DictReader(open(here / run / 'results_few_code_finetune_ablation.csv')))
    assert {r['arm'] for r in table} == {'plain', *(f'+ {k}' for k in POST), 'all parts'} and 'pairs' in capsys.readouterr().out
    assert len({r['point'] for r in table if r['metric'] == 'macro AUROC'}) >= 5             # each part does something (one block has no depth to drop)
    assert all((r['minus_reference'] == '') == (r['arm'] == 'plain') for r in table)
    recipe = json.loads((here / run / 'results_few_code_+-decay_finetune_40_0.json').read_text())['recipe']
    assert recipe['decay'] == POST['decay'] and not recipe['preview'] and recipe['path'] == 0


@pytest.mark.parametrize('objective, backbone', [('mae', 'vit'), ('cmsc', 'resnet'), ('vqbeat', 'beat')])
def test_other_tokens_are_evaluated(here, objective, backbone):
    """Encoders with padding, a CLS token or a coarse rate go through every mode."""
    run = f'out/{backbone}'
    train.main(f'--objective {objective} --steps 1 --batch 4 --probe-every 0 --out {run}'.split())
    evaluate.main([run, '--data', 'few', '--task', 'code', '--mode', 'linear', 'frozen', 'finetune', 'prototypes', '--labels', '30', '--draws', '1',
                   '--epochs', '1', '--no-scratch'])
    table = list(csv.DictReader(open(here / run / 'results_few_code_linear_frozen_finetune_prototypes.csv')))
    assert {(r['mode'], r['arm']) for r in table} == {(m, a) for m in ('linear', 'frozen', 'finetune', 'prototypes') for a in ('random encoder', 'pretrained')}


@pytest.mark.parametrize('mode, arms', [('scratch', {'from scratch'}), ('finetune', {'from scratch', 'random encoder', 'pretrained'})])
def test_trained_modes(here, run, mode, arms):
    evaluate.main([run, '--data', 'few', '--task', 'code', '--mode', mode, '--labels', '1', '--epochs', '1'])
    table = [r for r in csv.DictReader(open(here / run / f'results_few_code_{mode}.csv')) if r['metric'] == 'macro AUROC']
    assert {r['arm'] for r in table} == arms and all(0 < float(r['low']) < float(r['high']) <= 1 for r in table)


def test_scratch_of_one_shape_is_one_arm(here, others, capsys):
    """Two pretrainings of one shape share what is trained from scratch, and there is nothing to compare it with."""
    train.main('--layers 1 --steps 3 --batch 4 --probe-every 0 --out out/longer'.split())
    evaluate.main([others, 'out/longer', '--data', 'few', '--task', 'code', '--mode', 'scratch', '--labels', '30', '--draws', '1', '--epochs', '1'])
    assert '1 from scratch' in capsys.readouterr().out


@pytest.mark.parametrize('protocol', ['released', 'sc'])
def test_protocols_run(here, run, protocol):
    evaluate.main([run, '--data', 'few', '--task', 'code', '--mode', 'linear', 'frozen', '--labels', '40', '--draws', '1', '--epochs', '2', '--protocol', protocol,
                   '--no-scratch', '--bootstrap', 'bayesian', '--benchmark-convention'])
    assert (here / run / f'results_few_code_linear_frozen_{protocol}.csv').exists()


@pytest.mark.parametrize('analysis, files', [('robustness', ['robustness_few_code.csv']), ('efficiency', ['efficiency_synthetic_code.csv', 'efficiency_synthetic_code.png']),
                                             ('cka', ['cka_few_code.csv', 'cka_few.png']), ('calibration', ['calibration_few_code.csv', 'calibration_few_code.png']),
                                             ('embeddings', ['embeddings_sample.npz'])])
def test_analyses(here, run, analysis, files, capsys):
    name = files[0].split('_')[1].split('.')[0]
    evaluate.main([run, '--data', name, '--analyse', analysis, '--draws', '1', *(['--task', 'code'] if name != 'sample' else []),
                   *(['--cohort', 'synthetic'] if analysis == 'robustness' else [])])
    assert all((here / run / f).stat().st_size > 100 for f in files)
    out = capsys.readouterr().out
    if analysis == 'embeddings':
        found, ds = np.load(here / run / files[0]), Dataset('sample')
        assert found['X'].shape == (500, 64) and np.array_equal(found['id'], ds.id) and found['labels'].tolist() == [ds.label_names[c] for c in ds.tasks['super']]
        return
    rows = list(csv.DictReader(open(here / run / files[0])))
    assert {r.get('arm') or r['model'].split(',')[0] for r in rows} == {'random encoder', 'pretrained'}
    if analysis == 'robustness':
        runs = [open_run(run)]
        plain = Task('few', ['code'], runs, CPU).score(Arm('pretrained', [runs[0]['net']], 'linear', PROTOCOLS['quick']))['code'].interval()[0]
        mine = {r['condition']: r for r in rows if r['arm'] == 'pretrained'}
        assert float(mine['unchanged']['mean']) == pytest.approx(plain) and {'lead I only', 'women', 'through 100 Hz', 'noise at 0 dB', 'cohort synthetic'} < set(mine)
        assert int(mine['cohort synthetic']['n']) == 640 - sum(Dataset('synthetic').fold <= 8)                # pretrained on the rest
        assert int(mine['women']['n']) + int(mine['men']['n']) == 150 and float(mine['through 100 Hz']['minus_unchanged'].split()[0]) != 0
    if analysis == 'efficiency':
        counts = [int(r['labels']) for r in rows if r['arm'] == 'pretrained']
        assert all(abs(a / 2 - b) <= 3 for a, b in zip(counts, counts[1:])) and len(counts) >= 4
    if analysis == 'cka':
        assert all(float(r['cka']) < 1.01 for r in rows) and 'debiased CKA' in out


def test_list(here, run, capsys):
    evaluate.main(['--list'])
    out = capsys.readouterr().out
    assert all(name in out for name in TASKS) and 'not prepared: python data.py' in out and 'datasets/synthetic: 640 records' in out


def test_list_tells_other_preparations_apart(tmp_path, monkeypatch, capsys):
    """PTB-XL's 100 Hz files where the papers take 500 Hz, and another contract; label counts nobody published are said to be the data's."""
    monkeypatch.chdir(tmp_path)
    meta = lambda name, source, **changes: dict(records=500, tasks={}, source=source, contract=dataclasses.asdict(replace(data.Contract(), **changes)))
    for name, m in dict(ptbxl=meta('ptbxl', 'ptbxl --root P'), ningbo=meta('ningbo', 'challenge', fs=100), georgia=meta('georgia', 'challenge')).items():
        (tmp_path / 'datasets' / name).mkdir(parents=True)
        (tmp_path / 'datasets' / name / 'meta.json').write_text(json.dumps(m))
    evaluate.main(['--list'])
    line = {text.split()[0]: text for text in capsys.readouterr().out.splitlines()}
    assert 'from the 100 Hz files; as in the paper: python data.py ptbxl --root ROOT --rate 500' in line['ptbxl_all'] and 'fs 100 against 240' in line['ningbo']
    assert line['georgia'].endswith('500 records in datasets/georgia') and 'by data' in line['chapman_rhythm'] and 'by data' in line['sc_csn']
    (tmp_path / 'datasets/ptbxl/meta.json').write_text(json.dumps(meta('ptbxl', 'ptbxl --root P --rate 500')))
    evaluate.main(['--list'])
    assert 'ptbxl_all             ' in (out := capsys.readouterr().out) and 'Hz files' not in out


def test_labels_of_the_cka_figure_are_short(here, run, monkeypatch):
    """Layers at the ticks, each model's name once beside them, wrapped."""
    drawn = []
    monkeypatch.setattr(evaluate, 'figure', lambda *a, **k: drawn.append(figure(*a, **k)) or drawn[-1])
    evaluate.main([run, '--data', 'few', '--analyse', 'cka'])
    (_, ax), = drawn
    names = [t.get_text() for t in ax.texts]
    assert {t.get_text() for t in ax.get_yticklabels()} == {'stem', '1'} and {n.replace('\n', ' ') for n in names} == {'random encoder, 0', 'pretrained, 0'}
    assert len(names) == 4 and max(len(line) for n in names for line in n.split('\n')) <= 20


def test_overlap_can_be_allowed(here, run, capsys):
    train.main('--steps 1 --batch 4 --layers 1 --probe-every 0 --data few --out out/onfew'.split())
    evaluate.main(['out/onfew', '--data', 'few', '--mode', 'knn'])
    assert 'test folds are left out' in capsys.readouterr().out
    evaluate.main(['out/onfew', '--data', 'few', '--mode', 'knn', '--allow', 'overlap'])
    out = capsys.readouterr().out
    assert 'test records are of patients seen in pretraining, allowed' in out and '150 test records' in out


@pytest.mark.parametrize('flags, why', [
    (['--labels', '5', '--data', 'few'], 'nothing was scored'), (['--labels', '100000', '--data', 'few'], 'nothing was scored'), (['--device', 'tpu'], 'cannot be used here'),
    (['--data', 'nowhere'], "no dataset 'nowhere'"), (['--task', 'nothing', '--data', 'few'], 'has no task'), (['--task', 'nothing'], 'is no task of the papers'),
    (['--task', 'ptbxl_all'], 'task ptbxl_all needs datasets/ptbxl: python data.py ptbxl'), (['--draws', '0'], '--draws must lie between 1'), (['--drop-path', '1'], '--drop-path'), (['--ablate'], 'add --mode finetune'),
    (['--preview'], 'belong to --mode finetune'), (['--mode', 'scratch', '--no-scratch'], 'give one of the two'), (['--cohort', 'sample'], 'belongs to --analyse robustness'),
    (['--analyse', 'robustness', '--data', 'few', '--cohort', 'sample'], 'some of the same yes/no labels')])
def test_bad_requests_stop_with_one_line(here, run, flags, why):
    with pytest.raises(Stop if '--device' not in flags else SystemExit, match=why) as stop:
        evaluate.main([run, *flags])
    assert '\n' not in str(stop.value)


def test_missing_run_is_one_line(here):
    with pytest.raises(Stop, match='no checkpoint at'):
        evaluate.main(['out/nowhere'])
    with pytest.raises(Stop, match='^out is a folder of runs, no run: name some of .*out/'):
        evaluate.main(['out'])


def test_other_contract_is_refused(here, run):
    data.main(['synthetic', '--records', '64', '--contract', 'sc', '--out', 'sc'])
    with pytest.raises(Stop, match=r'another contract.*fs 240 against 100.*--fs 240'):
        Task('sc', None, [open_run(run)], CPU)
