"""Metrics against pair counting, probes against their optimum, protocols against leaks."""
import copy
import csv
import json

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

import evaluate
import train
from data import Dataset, Stop
from evaluate import Score, Task, auroc, draw_labels, embed, fit, interval, linear_probe, logistic, macro, open_run, per_record, plans
from models import Config, Encoder, load

CPU = torch.device('cpu')


def count_pairs(score, y, group, weight):
    """AUROC of one class by looking at every pair."""
    right = total = 0.
    for i in range(len(y)):
        for j in range(len(y)):
            if y[i] == 1 and y[j] == 0 and group[i] == group[j]:
                total += weight[i] * weight[j]
                right += weight[i] * weight[j] * ((score[i] > score[j]) + .5 * (score[i] == score[j]))
    return right / total


def test_auroc_equals_pair_counting():
    rng = np.random.default_rng(0)
    score, y = rng.integers(0, 6, (60, 3)).astype(float), rng.integers(0, 2, (60, 3)).astype(float)
    y[rng.random((60, 3)) < .2] = np.nan
    group, weight = rng.integers(0, 3, 60), rng.integers(0, 4, (4, 60)).astype(float)
    table = auroc(score, y, group, weight)
    for r in range(4):
        for k in range(3):
            assert table[r, k] == pytest.approx(count_pairs(score[:, k], y[:, k], group, weight[r]))
    plain = auroc(score, y)[0]
    for k in range(3):
        a, b = score[y[:, k] == 1, k], score[y[:, k] == 0, k]
        assert plain[k] == pytest.approx(scipy.stats.mannwhitneyu(a, b).statistic / len(a) / len(b))


def test_class_without_both_labels_is_not_scored():
    score, y = np.random.default_rng(0).random((10, 3)), np.zeros((10, 3))
    y[:5, 1], y[:, 2] = 1, 1
    table = auroc(score, y)
    assert np.isnan(table[0, [0, 2]]).all() and macro(table)[0] == table[0, 1]


def test_weights_are_copies():
    rng = np.random.default_rng(1)
    score, y, weight = rng.random((30, 2)), rng.integers(0, 2, (30, 2)).astype(float), rng.integers(0, 3, 30)
    again = np.repeat(np.arange(30), weight)
    assert np.allclose(auroc(score, y, weight=weight[None].astype(float)), auroc(score[again], y[again]))


def test_interval_adds_its_variances_in_squares():
    boot, one = np.random.default_rng(0).normal(.8, .01, 100_000), np.array([[.8]])
    assert np.allclose(interval(one, boot)[1:], (.8 - .0196, .8 + .0196), atol=3e-4)
    points = np.array([[.78], [.80], [.82]])                     # three seeds: t(2) * .02 / sqrt(3)
    runs = scipy.stats.t.ppf(.975, 2) * .02 / 3 ** .5
    assert np.allclose(interval(points, boot)[1:], (.8 - np.hypot(.0196, runs), .8 + np.hypot(.0196, runs)), atol=3e-4)
    assert np.allclose(interval(points.T, boot), interval(points, boot))                     # three draws of one seed
    both = .8 + .02 * np.add.outer([-1, 0, 1], [-1, 0, 1])       # seeds and draws
    assert np.allclose(interval(both, boot)[2] - .8, (.0196 ** 2 + 2 * runs ** 2) ** .5, atol=3e-4)


def test_interval_covers_over_repeated_studies():
    """Truth .8, seeds SD .018, patients SE .01: an interval from three seeds must cover it in about 95 of 100 studies."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        patients = rng.normal(0, .01)
        low, high = interval(.8 + patients + rng.normal(0, .018, (3, 1)), .8 + patients + rng.normal(0, .01, 2000))[1:]
        covered += low < .8 < high
    assert .93 <= covered / 400 <= 1


def test_paired_difference_of_equals_is_zero():
    rng = np.random.default_rng(0)
    s, y, patient = rng.random((80, 2)), rng.integers(0, 2, (80, 2)).astype(float), rng.integers(0, 50, 80)
    score = Score([[s], [s + .1]], y, patient, np.zeros(80, int))
    assert score.minus(score) == (0, 0, 0)
    low, high = score.interval()[1:]
    assert low < score.point.mean() < high


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
    assert auroc(linear_probe(X, Y, rows[:500], rows[500:600], rows[600:]), Y[600:]).min() > .99


def test_per_record_mean_over_crops(here):
    ds, rows = Dataset('sample'), np.array([7, 3])
    got = per_record(lambda batch: batch['x'].mean(2) ** 2, ds, rows, 600, CPU)
    for row, value in zip(rows, got):
        x = ds.crop(np.array([row]), np.array([0]), 2400)[0].view(12, 4, 600)
        assert np.allclose(value, (x.mean(2) ** 2).mean(1), atol=1e-6)


@pytest.mark.parametrize('mode', ['linear', 'frozen'])
def test_probes_leave_the_encoder_bitwise_unchanged(here, mode):
    torch.manual_seed(0)
    ds, encoder = Dataset('synthetic'), Encoder(Config(dim=16, layers=1))
    before = copy.deepcopy(encoder.state_dict())
    rows = [r[:40] for r in ds.split()]
    if mode == 'linear':
        X = np.zeros((len(ds), 16))
        X[np.concatenate(rows)] = embed(encoder, ds, np.concatenate(rows), 600, CPU)
        linear_probe(X, np.array(ds.labels[:, :24]), *rows)
    else:
        fit(encoder, ds, list(range(24)), *rows, 600, 'frozen', CPU, 1)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), encoder.state_dict().values()))


def test_fit_learns(here):
    """Fine-tuning on the records that it is then asked about must beat chance by far."""
    torch.manual_seed(0)
    ds = Dataset('synthetic')
    rows, column = np.arange(160), [ds.label_names.index('findings/PACE'), ds.label_names.index('findings/LBBB')]
    score = fit(Encoder(Config(dim=16, layers=1)), ds, column, rows, rows, rows, 600, 'scratch', CPU, 12, lr=3e-3)
    assert macro(auroc(score, np.array(ds.labels[rows][:, column])))[0] > .8


def test_cross_validation_predicts_each_record_once_and_keeps_patients_apart(here):
    ds = Dataset('sample')
    found, folded = plans(ds, np.arange(len(ds)), set())
    assert folded and np.array_equal(np.sort(np.concatenate([p[2] for p in found])), np.arange(len(ds)))
    for parts in found:
        patients = [set(ds.patient[p]) for p in parts]
        assert not patients[0] & patients[1] and not patients[0] & patients[2] and not patients[1] & patients[2]


def test_folds_seen_in_pretraining_are_not_tested_on(here, capsys):
    ds = Dataset('sample')
    found, _ = plans(ds, np.arange(len(ds)), set(ds.patient[ds.fold <= 8]))
    assert set(ds.fold[np.concatenate([p[2] for p in found])]) == {9, 10} and '8 of 10' in capsys.readouterr().out
    with pytest.raises(Stop, match='patients of every test fold'):
        plans(ds, np.arange(len(ds)), set(ds.patient))
    with pytest.raises(Stop, match='PTB-XL under other names'):
        plans(ds, np.arange(len(ds)), {'ptb-xl/HR00599'})


def test_folds_without_labelled_records_are_no_folds(here):
    ds = Dataset('sample')
    found, _ = plans(ds, np.flatnonzero(ds.fold != 4), set())
    assert len(found) == 9 and min(len(part) for p in found for part in p) > 0
    with pytest.raises(Stop, match='in 2 folds'):
        plans(ds, np.flatnonzero(ds.fold < 3), set())


def test_label_draws():
    train, val = np.arange(100), np.arange(100, 120)
    a, b = draw_labels(train, val, 50, draw=0)
    assert len(a) == 40 and len(b) == 10 and len(set(a) | set(b)) == 50
    assert not np.array_equal(a, draw_labels(train, val, 50, 1)[0]) and draw_labels(train, val, 'all', 1) == (train, val)


@pytest.fixture(scope='module')
def run(world):
    """A run of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        train.main('--steps 2 --batch 4 --layers 1 --probe-every 0 --out out/short'.split())
    return 'out/short'


def test_foreign_checkpoints_are_refused(here, run):
    c = load(here / run / 'ckpt.pt')
    for name, wrong in (('a', {'w': torch.zeros(1)}), ('b', {**c, 'encoder': dict(list(c['encoder'].items())[1:])})):
        (here / 'out' / name).mkdir()
        torch.save(wrong, here / 'out' / name / 'ckpt.pt')
        with pytest.raises(Stop, match='no checkpoint of train.py'):
            open_run(here / 'out' / name)


def test_evaluate_writes_its_results(here, run, capsys):
    evaluate.main([run, '--labels', '100', 'all', '--draws', '2', '--epochs', '1'])
    text = capsys.readouterr().out
    for word in ('from scratch', 'random encoder', 'pretrained', 'synthetic, task findings', 'sample, task super: 500 test records of 466'):
        assert word in text
    result = json.loads((here / run / 'results_sample_super_linear_all_0.json').read_text())
    assert result['n'] == 500 and result['patients'] == 466 and result['low'] < result['point'] < result['high']
    assert len(result['classes']) == 5 and result['contract']['fs'] == 240
    assert result['minus_reference'][1] < result['minus_reference'][0] < result['minus_reference'][2] and result['labels'] == 'all'
    for name in ('results_linear.csv', 'labels.png', 'pca_sample.png', 'pca_synthetic.png'):
        assert (here / run / name).stat().st_size > 100


def test_two_runs_share_one_table(here, run, capsys):
    train.main('--steps 2 --batch 4 --layers 1 --probe-every 0 --seed 1 --out out/second'.split())
    evaluate.main([run + '/ckpt.pt', 'out/second', '--data', 'sample', '--task', 'rhythm'])
    table = list(csv.DictReader(open(here / run / 'results_sample_rhythm_linear.csv')))
    mine = [r for r in table if r['arm'] == 'pretrained']
    assert len(table) == 4 and {r['seed'] for r in mine} == {'0', '1'} and mine[0]['mean'] == mine[1]['mean']
    assert float(mine[0]['mean']) == pytest.approx(np.mean([float(r['point']) for r in mine]))
    with pytest.raises(Stop, match='alike but for their seeds; these share a seed'):
        evaluate.main([run, run])
    train.main('--steps 2 --batch 4 --layers 2 --probe-every 0 --seed 2 --out out/deeper'.split())
    with pytest.raises(Stop, match='these differ in layers'):
        evaluate.main([run, 'out/deeper'])


def test_against_another_run(here, run, capsys):
    """A run against itself differs by nothing; the table names what it is compared with."""
    flags = ['--data', 'sample', '--task', 'super']
    evaluate.main([run, '--against', run, *flags])
    table = list(csv.DictReader(open(here / run / 'results_sample_super_linear_against_short.csv')))
    assert [r['arm'] for r in table] == ['short', 'pretrained'] and table[0]['mean'] == table[1]['mean']
    assert table[1]['minus_reference'] == '0.0000 0.0000 0.0000' and 'minus short' in capsys.readouterr().out
    with pytest.raises(Stop, match='as many runs'):
        evaluate.main([run, '--against', run, 'out/second', *flags])


@pytest.mark.parametrize('objective, backbone', [('mae', 'vit'), ('cmsc', 'resnet'), ('vqbeat', 'beat')])
def test_other_tokens_are_evaluated(here, objective, backbone):
    """Encoders with padding, a CLS token or a coarse rate go through every mode."""
    run = f'out/{backbone}'
    train.main(f'--objective {objective} --steps 1 --batch 4 --probe-every 0 --out {run}'.split())
    for mode in ('linear', 'frozen', 'finetune'):
        evaluate.main([run, '--data', 'synthetic', '--task', 'code', '--mode', mode, '--labels', '60', '--draws', '1', '--epochs', '1'])
        assert list(csv.DictReader(open(here / run / f'results_synthetic_code_{mode}.csv')))[-1]['arm'] == 'pretrained'


@pytest.mark.parametrize('mode, arms', [('scratch', {'from scratch'}), ('finetune', {'from scratch', 'random encoder', 'pretrained'})])
def test_trained_modes(here, run, mode, arms):
    evaluate.main([run, '--data', 'synthetic', '--task', 'code', '--mode', mode, '--labels', '1', '--epochs', '1'])
    table = list(csv.DictReader(open(here / run / f'results_synthetic_code_{mode}.csv')))
    assert {r['arm'] for r in table} == arms and all(0 < float(r['low']) < float(r['high']) < 1 for r in table)


@pytest.mark.parametrize('flags, why', [
    (['--labels', '5', '--data', 'synthetic'], 'nothing was scored'), (['--device', 'tpu'], 'cannot be used here'), (['--data', 'nowhere'], "no dataset 'nowhere'"), (['--task', 'nothing'], 'has no task'), (['--task', 'target', '--data', 'synthetic'], 'numbers'),
    (['--draws', '0'], 'must be 1 or more')])
def test_bad_requests_stop_with_one_line(here, run, flags, why):
    with pytest.raises(SystemExit, match=why):
        evaluate.main([run, *flags])
    with pytest.raises(SystemExit, match='no checkpoint at'):
        evaluate.main(['out/nowhere'])


def test_other_contract_is_refused(here, run):
    import data
    data.main(['synthetic', '--records', '64', '--contract', 'sc', '--out', 'sc'])
    with pytest.raises(Stop, match=r'another contract.*fs 240 against 100.*--fs 240'):
        Task('sc', None, [open_run(run)], CPU)
