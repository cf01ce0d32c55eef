"""Laws against their algebra, fits against planted truths, refusals against tables that cannot tell, and the papers' printed numbers."""
import csv
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

import scaling
from data import Stop
from scaling import (CONFIGS, Law, Scaled, aicc, configurations, data_transferred, draws, effective_data, equivalent_scale_up, excess_ratio, fit_frontier, fit_runs,
                     frontier_curve, growth, joint_law, loss_to_loss, marginal, minimum_data, objective_sum, optimal_loss, optimum, overfit_extent, pareto,
                     permutation_p, profile, project, read_runs, robust, select, shared_floor, shares, transfer_law)

TRUTH = Law(.11, 6., 3., .35, .22)


def cells(n=8, d=6, repeat=1):
    """Model sizes from 2e4 to 2e8 crossed with records from 2e3 to 2e6."""
    N, D = np.meshgrid(np.geomspace(2e4, 2e8, n), np.geomspace(2e3, 2e6, d))
    return np.repeat(N.ravel(), repeat), np.repeat(D.ravel(), repeat)


def noisy(N, D, seed, truth=TRUTH, noise=.01):
    return joint_law(N, D, *truth) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(N)))


def as_rows(N, D, L):
    return [dict(N=n, D=d, loss=v, line=i) for i, (n, d, v) in enumerate(zip(N, D, L))]


@pytest.fixture(scope='module')
def study():
    """A fit to 5 x 5 sizes, two runs each, with 1 % noise."""
    N, D = cells(5, 5, 2)
    return fit_runs(as_rows(N, D, noisy(N, D, 3)), 'loss')


# --- laws

def test_identities_of_the_laws():
    assert excess_ratio(10, math.log10(2)) == pytest.approx(.5) and excess_ratio(10, .1) == pytest.approx(.794, abs=5e-4)
    assert equivalent_scale_up(10, 1.3, 1.) == pytest.approx(10 ** 1.3)
    assert shares(Law(0, 1, 1, .4, .1)) == pytest.approx((.2, .8)) and sum(shares(TRUTH, 1.1, .8)) == pytest.approx(1)
    assert joint_law(1e6, np.inf, *TRUTH) == pytest.approx(.11 + 6 * 1e6 ** -.35)
    assert scaling.compute(100, 8, 10) == 48000 and scaling.compute(100, 8, 10, extra_macs=50) == 48000 + 8000


@pytest.mark.parametrize('u, v, N, D', [(1, 1, 163353, 1.02029e6), (1.1, .8, 194062, 5.7068e6), (.9, 1.3, 125713, 126430)])
def test_optimum_against_brute_force(u, v, N, D):
    C, k = 1e13, 60
    n, d = optimum(C, TRUTH, k, u, v)
    assert (n, d) == pytest.approx((N, D), rel=1e-5) and k * n ** u * d ** v == pytest.approx(C, rel=1e-9)
    best = scipy.optimize.minimize_scalar(lambda x: joint_law(math.exp(x), (C / (k * math.exp(u * x))) ** (1 / v), *TRUTH), bounds=(2, 25), method='bounded',
                                          options=dict(xatol=1e-9))
    assert optimal_loss(C, TRUTH, k, u, v) == pytest.approx(best.fun, rel=1e-9) and math.log(n) == pytest.approx(best.x, abs=1e-3)


def test_optimal_loss_is_a_power_of_compute():
    C = np.geomspace(1e9, 1e16, 8)
    slope = np.diff(np.log(optimal_loss(C, TRUTH, 60) - TRUTH.E)) / np.diff(np.log(C))
    assert slope == pytest.approx(-.1350877, abs=1e-7)


@pytest.mark.parametrize('v', [0, -.3])
def test_no_optimum_where_records_cost_nothing(v):
    with pytest.raises(ValueError, match='no optimum'):
        optimum(1e13, TRUTH, 60, 1, v)


def test_overfitting_collapses_on_one_line():
    N, D = cells()
    extent, z = overfit_extent(joint_law(N, D, *TRUTH), N, TRUTH), D ** TRUTH.beta * joint_law(N, np.inf, *TRUTH)
    assert extent * z == pytest.approx(TRUTH.B, rel=1e-12)
    least = minimum_data(1e6, TRUTH, .1)
    assert least == pytest.approx(2.29568e10, rel=1e-5) and overfit_extent(joint_law(1e6, least, *TRUTH), 1e6, TRUTH) == pytest.approx(.1)
    assert minimum_data(1e6, TRUTH, .05) / least == pytest.approx(2 ** (1 / .22)) and minimum_data(1e8, TRUTH, .1) > least


def test_pareto_by_hand():
    C, L = np.array([3., 1, 2, 2, 5, 4]), np.array([.5, .9, .7, .8, .5, .4])
    assert pareto(C, L) == [1, 2, 0, 5]
    assert pareto(np.array([1., 1, 2]), np.array([.5, .5, .5])) == [0]


# --- fits

def test_noiseless_truth_comes_back():
    N, D = cells()
    L = joint_law(N, D, *TRUTH)
    s = Scaled(N, D, L)
    assert project(N, D, L) == pytest.approx(TRUTH, rel=1e-4) and s.law(robust(s)[0]) == pytest.approx(TRUTH, rel=1e-4)


def test_records_in_other_units_change_B_alone():
    N, D = cells(5, 5)
    L = noisy(N, D, 0)
    a, b = (s.law(robust(s, .01)[0]) for s in (Scaled(N, D, L), Scaled(N, 250 * D, L)))
    assert b._replace(B=a.B) == pytest.approx(a, rel=1e-4) and b.B == pytest.approx(a.B * 250 ** a.beta, rel=1e-4)


def test_gradient_and_sum():
    N, D = cells(5, 5)
    s = Scaled(N, D, noisy(N, D, 1))
    p = np.array([-1., -.5, .1, .3, .2])
    f, g = objective_sum(p, s.x, s.y, s.l, .02)
    for i, e in enumerate(np.eye(5) * 1e-6):
        assert g[i] == pytest.approx((objective_sum(p + e, s.x, s.y, s.l, .02)[0] - objective_sum(p - e, s.x, s.y, s.l, .02)[0]) / 2e-6, rel=1e-4)
    r = s.l - np.log(np.exp(p[0] - p[3] * s.x) + np.exp(p[1] - p[4] * s.y) + p[2])
    assert f == pytest.approx(sum(v ** 2 / 2 if abs(v) < .02 else .02 * (abs(v) - .01) for v in r))


def test_batched_descent_ends_where_lbfgs_from_many_starts_ends():
    N, D = cells(5, 5)
    s = Scaled(N, D, noisy(N, D, 2))
    ends = [scipy.optimize.minimize(objective_sum, np.clip([a, a, e, x, y], s.low, s.high), (s.x, s.y, s.l, 1e-3), 'L-BFGS-B', True, bounds=list(zip(s.low, s.high)),
                                    options=dict(ftol=1e-15, gtol=1e-12, maxiter=5000)).fun for a, e, x, y in itertools.product((-1, -2), (0, .2), (.1, .5), (.1, .5))]
    assert robust(s)[1] == pytest.approx(min(ends), rel=1e-5)


def test_mean_and_loose_tolerance_stop_early():
    N, D = cells(5, 5, 2)
    s = Scaled(N, D, noisy(N, D, 4))
    start = np.array([-.5, -.5, .3, .6, .6])
    early = scipy.optimize.minimize(lambda p: objective_sum(p, s.x, s.y, s.l, 1e-3)[0] / len(s.l), start, bounds=list(zip(s.low, s.high)))
    assert early.success and objective_sum(early.x, s.x, s.y, s.l, 1e-3)[0] > robust(s)[1] * (1 + 1e-6)


def test_intervals_hold_the_truth(study):
    for c in ('alpha', 'beta', 'E'):
        for low, high in (study.interval(lambda w: getattr(w, c)), study.profiles[c]):
            assert low < getattr(TRUTH, c) < high and low < getattr(study.law, c) < high
        inner = study.interval(lambda w: getattr(w, c), .8)
        assert study.interval(lambda w: getattr(w, c))[0] < inner[0] < inner[1] < study.interval(lambda w: getattr(w, c))[1]


def test_profile_is_an_f_test(study):
    s, n = study.s, len(study.s.l)
    fixed = lambda alpha: s.descend(study.p, delta=1e9, low=np.r_[s.low[:3], alpha, s.low[4]][None], high=np.r_[s.high[:3], alpha, s.high[4]][None])[1][0]
    least = s.descend(study.p, delta=1e9)[1][0]
    for end in study.profiles['alpha']:
        assert scipy.stats.f.sf((fixed(end) / least - 1) * (n - 5), 1, n - 5) == pytest.approx(.05, abs=.005)


def test_checks(study):
    at = joint_law(study.N, study.D, *study.law)
    assert study.checks['R2'] == pytest.approx(1 - np.var(study.L - at) * 1 / np.var(study.L), rel=1e-3) and .99 < study.checks['R2'] < 1
    assert study.checks['log_RMSE'] == pytest.approx(.01, abs=.004) and study.checks['AICc_minus_line'] < -20
    assert abs(study.checks['held_out_N']) < .05 and abs(study.checks['held_out_D']) < .05
    without = study.checks['law_without_N']
    assert study.checks['held_out_N'] == pytest.approx(np.mean([joint_law(n, d, *without) / v - 1 for n, d, v in zip(study.N, study.D, study.L) if n == study.N.max()]))
    N, D = cells(5, 5)
    straight = fit_runs(as_rows(N, D, noisy(N, D, 0, Law(0, 9., 0., .2, 1.)) * D ** -.1), 'loss', resamples=200)
    assert isinstance(straight, str) or straight.checks['AICc_minus_line'] > 0
    assert aicc(2., 20, 3) == pytest.approx(20 * math.log(.1) + 8 + 40 / 15)


def test_bootstrap_keeps_every_run_and_makes_up_for_the_fit():
    w = draws(40, 4000, 5, 0)
    assert w.min() > 0 and w.mean() == pytest.approx(1, abs=.01) and w.var() == pytest.approx(40 / 35, rel=.05)
    assert not np.isclose(w[:, 0], w[:, 1]).all() and (draws(40, 3, 5, 0) == draws(40, 3, 5, 0)).all()


def test_bootstrap_is_as_wide_as_repeated_studies():
    N, D = cells(5, 5, 2)
    fits = [fit_runs(as_rows(N, D, noisy(N, D, seed)), 'loss', delta='mad', resamples=200, checked=False) for seed in range(25)]
    for c in ('alpha', 'beta'):
        assert np.median([getattr(f.boot, c).std() for f in fits]) == pytest.approx(np.std([getattr(f.law, c) for f in fits]), rel=.4)


def test_marginals_and_their_floor():
    N = np.geomspace(2e4, 2e8, 6)
    L = joint_law(N, 2e4, *TRUTH)
    E, A, alpha, rss = marginal(N, L)
    assert (E, A, alpha) == pytest.approx((TRUTH.E + 3 * 2e4 ** -.22, 6, .35), rel=1e-4) and rss < 1e-12
    assert marginal(N, L, floor=E)[2] == pytest.approx(alpha, rel=1e-4) and marginal(N, L, floor=0.)[2] < .5 * alpha
    assert fit_runs(as_rows(N, N * 0 + 2e4, L), 'loss', axis='N', resamples=200, checked=False).law.alpha == pytest.approx(.35, rel=1e-3)
    rising = marginal(N, L[::-1].copy())
    assert rising[1] == 0 and rising[0] == pytest.approx(L.mean())


@pytest.mark.parametrize('N, D, axis, reason', [
    (np.geomspace(1e4, 1e6, 9), np.geomspace(1e2, 1e4, 9), 'joint', 'grow together'),
    (np.full(9, 1e5), np.geomspace(1e2, 1e4, 9), 'joint', '--axis D'),
    (np.repeat([1e4, 1e6], 5), np.tile(np.geomspace(1e2, 1e4, 5), 2), 'joint', 'N has 2 levels'),
    (np.repeat([1e4, 1e5, 1e6], 2), np.array([1e3, 1e4, 1e4, 1e5, 1e5, 1e3]), 'joint', 'too few'),
    (np.geomspace(1e5, 1e6, 9), np.full(9, 1e3), 'N', '1.0 decades')])
def test_refused_where_runs_cannot_tell(N, D, axis, reason):
    assert reason in fit_runs(as_rows(N, D, joint_law(N, D, *TRUTH)), 'loss', axis=axis)


def test_refused_where_the_profile_is_flat():
    N, D = cells(5, 5, 2)
    assert 'do not identify' in fit_runs(as_rows(N, D, noisy(N, D, 0, Law(.5, 0., 0., .3, .3))), 'loss')


def test_a_floor_of_zero_is_flagged():
    N, D = cells(5, 5)
    assert 'E = 0' in fit_runs(as_rows(N, D, np.maximum(joint_law(N, D, *TRUTH._replace(E=-.02)), 1e-3)), 'loss', resamples=200, checked=False).flags


def test_a_shared_floor_against_brute_force():
    N, D = cells(4, 4)
    fits = [fit_runs(as_rows(N, D, noisy(N, D, i, t)), 'loss', name, delta=.01, resamples=200, checked=False) for i, (name, t) in enumerate((('a', TRUTH), ('b', Law(.2, 2., 5., .5, .3))))]
    found = shared_floor(fits)

    def total(E):
        sums = []
        for f in fits:
            s = Scaled(f.N, f.D, f.L)
            s.low[2] = s.high[2] = E * math.exp(-s.zero[2])
            sums.append(robust(s, .01)[1])
        return sum(sums)

    E = found['a'].E
    assert E == pytest.approx(found['b'].E) and total(E) <= min(total(e) for e in np.linspace(.05, .3, 26)) * (1 + 1e-4)
    assert .9 * fits[0].law.E < E < 1.1 * fits[1].law.E and found['b'].alpha < fits[1].law.alpha


def test_loss_to_loss_and_its_floor():
    excess = np.geomspace(.05, 3, 12)
    L = transfer_law(excess, .3, .45, .25)
    assert loss_to_loss(excess, L - .25) == pytest.approx((.3, .45, 0))
    assert loss_to_loss(excess, L)[1] < .25                      # the wrong floor halves the exponent
    kappa, gamma, dropped = loss_to_loss(np.r_[excess, -1, 1], np.r_[L - .25, 1, 0])
    assert (kappa, gamma, dropped) == pytest.approx((.3, .45, 2))


def test_frontier_curve():
    C = np.geomspace(1, 1e6, 30)
    assert fit_frontier(C, frontier_curve(C, .8, .3, .12, 50)) == pytest.approx((.8, .3, .12, 50), rel=1e-4)


# --- effective data

def transferred(k=2., a=.6, b=-.1, sizes=(1e5, 1e6, 1e7)):
    """Rows in which fine-tuning on D_F is worth k D_F^a N^b more records of a scratch law .2 + 4 D^-.4."""
    law, rows = lambda D: .2 + 4 * D ** -.4, []
    for N in sizes:
        rows += [dict(N=N, D_F=D, mode='scratch', loss=law(D)) for D in np.geomspace(100, 1e5, 8)]
        rows += [dict(N=N, D_F=D, mode='finetune', loss=law(D + k * D ** a * N ** b)) for D in np.geomspace(100, 2e3, 5)]
    return rows


def test_effective_data_comes_back():
    points, law, counts = data_transferred(transferred(), 'loss')
    assert law == pytest.approx((2, .6, -.1), rel=1e-6) and counts == dict(ok=15, censored=0, extrapolated=0, negative=0)


def test_points_that_cannot_be_read_are_counted():
    rows = transferred() + [dict(N=1e5, D_F=1e3, mode='finetune', loss=v) for v in (.19, .2005, .2 + 4 * 500 ** -.4, .2 + 4 * 50 ** -.4)]
    rows += [dict(N=1e5, D_F=10, mode='finetune', loss=.2 + 4 * 50 ** -.4)]
    _, law, counts = data_transferred(rows, 'loss')
    assert law == pytest.approx((2, .6, -.1), rel=1e-6) and counts == dict(ok=15, censored=2, extrapolated=1, negative=2)


def test_few_scratch_sizes_are_read_off_a_monotone_curve():
    D, L = np.array([100., 100, 1000, 10000]), np.array([.5, .52, .3, .2])
    found, status = effective_data(D, L, [.3, .2, .51, .1, .6])
    assert found[:3] == pytest.approx([1000, 10000, 100], rel=1e-3) and list(status) == ['ok', 'ok', 'ok', 'censored', 'extrapolated']
    with pytest.raises(Stop, match='two are the least'):
        effective_data(D[:2], L[:2], [.5])


# --- tables of runs

def table(path, **columns):
    """A sweep's table: two configurations, 5 x 5 sizes, two seeds, three steps of which the second is best by validation."""
    rng, rows = np.random.default_rng(0), []
    for (family, objective), N, D, seed in itertools.product((('s4', 'cpc'), ('s4', 'jepa')), np.geomspace(3e3, 3e5, 5).round(), np.geomspace(32, 3200, 5).round(), (0, 1)):
        L = joint_law(N, D, *TRUTH) * math.exp(.005 * rng.standard_normal())
        best = 20 * D ** .8
        for k, factor in ((.5, 1.05), (1, 1), (2, 1.03)):
            rows.append(dict(run=f'{objective}_{N:.0f}_{D:.0f}_{seed}', family=family, paradigm='SSL', objective=objective, arm='steps', N=int(N), macs=int(300 * N), extra_macs=0,
                             batch=32, D=int(D), labels=0, lr=1e-3, step=round(best * k), seed=seed, id_train=L, id_val=L * factor, id_test=L * (.9 if k == 2 else 1),
                             ood_a_val=.2 + L * factor, ood_a_test=.2 + L, ood_a_auroc=.9 - .05 * L) | columns)
    write(path, rows)
    return rows


def write(path, rows):
    with open(path, 'w', newline='') as f:
        w = csv.DictWriter(f, rows[0])
        w.writeheader(), w.writerows(rows)


def test_selection_is_by_validation_and_never_by_test(tmp_path):
    table(tmp_path / 'runs.csv')
    rows, losses = read_runs(tmp_path / 'runs.csv')
    chosen = select(configurations(rows)['s4 SSL cpc'], 'id_test')
    assert losses == ['id_test', 'ood_a_test'] and len(chosen) == 50 and all(r['id_val'] == min(q['id_val'] for q in rows if q['run'] == r['run']) for r in chosen)
    assert all(r['id_test'] > min(q['id_test'] for q in rows if q['run'] == r['run']) for r in chosen)
    for r in rows:
        r.pop('id_val')
    with pytest.raises(Stop, match='no validation loss'):
        select(rows, 'id_test')


def test_of_several_rates_the_best_by_validation_stands(tmp_path):
    rows = [dict(run=f'{lr}_{s}', N=1000, D=100, seed=s, lr=lr, id_val=v + s, id_test=9 - v) for s in (0, 1) for lr, v in ((.1, 2), (.01, 1), (.001, 3))]
    write(tmp_path / 'runs.csv', rows)
    assert [r['lr'] for r in select(read_runs(tmp_path / 'runs.csv')[0], 'id_test')] == [.01, .01]


def test_a_strangers_table_needs_three_columns(tmp_path, capsys):
    N, D = cells(5, 5)
    write(tmp_path / 'mine.csv', [dict(N=int(n), D=int(d), val_loss=v) for n, d, v in zip(N, D, noisy(N, D, 5))])
    scaling.main(['fit', str(tmp_path / 'mine.csv'), '--loss', 'val_loss', '--resamples', '200'])
    fit = json.loads((tmp_path / 'mine_fit.json').read_text())['fits'][0]
    assert fit['alpha_low95'] < .35 < fit['alpha_high95'] and fit['law']['alpha'] == fit['alpha'] and 'all runs' in capsys.readouterr().out
    assert (tmp_path / 'mine_fit.csv').exists() and (tmp_path / 'mine_fit_val_loss.png').exists()


def wrong(name, rows):
    """One defect at a time."""
    if name == 'column':
        return [{k: v for k, v in r.items() if k != 'D'} for r in rows]
    if name == 'loss':
        return [{k: v for k, v in r.items() if not k.endswith('_test')} for r in rows]
    if name in ('nan', '', 'inf', '-1', '0'):
        rows[7]['id_test'] = name
    if name == 'one size':
        rows = [r | dict(D=100, N=1000) for r in rows]
    if name == 'duplicate':
        rows.append(dict(rows[3]))
    if name == 'millions':
        rows[5]['N'] = 3.
    if name == 'thousands of records':
        rows[5]['D'] = 3.2
    if name == 'mixed':
        for r in rows[:9]:
            r['N'] *= 10 ** 6
    if name == 'ragged':
        rows[3]['ood_a_auroc'] = '0.5,7'
    return rows


@pytest.mark.parametrize('name, says', [('column', 'lacks the column D'), ('loss', '--loss'), ('nan', 'line 9: id_test is nan'), ('', 'line 9: id_test is nan'), ('inf', 'line 9'),
                                        ('-1', 'line 9'), ('0', 'line 9'), ('one size', 'N has 1 level'), ('duplicate', 'lines 5 and'), ('millions', 'no count of parameters'),
                                        ('thousands of records', 'no count of records'), ('mixed', 'mixed units'), ('ragged', 'cells')])
def test_a_wrong_table_gives_one_clear_line(name, says, tmp_path):
    rows = wrong(name, table(tmp_path / 'runs.csv'))
    write(tmp_path / 'runs.csv', rows)
    if name == 'ragged':
        (tmp_path / 'runs.csv').write_text((tmp_path / 'runs.csv').read_text().replace('"0.5,7"', '0.5,7'))
    with pytest.raises(Stop) as stop:
        scaling.main(['fit', str(tmp_path / 'runs.csv'), '--resamples', '200'])
    assert says in str(stop.value) and '\n' not in str(stop.value) and isinstance(stop.value.code, str)


@pytest.mark.parametrize('text', [None, '', 'N,D,id_test\n'])
def test_no_table_gives_one_clear_line(text, tmp_path):
    if text is not None:
        (tmp_path / 'runs.csv').write_text(text)
    with pytest.raises(Stop, match='runs.csv'):
        scaling.main(['fit', str(tmp_path / 'runs.csv')])


def test_moving_targets_are_fitted_out_of_distribution_only(tmp_path, capsys):
    table(tmp_path / 'runs.csv')
    scaling.main(['fit', str(tmp_path / 'runs.csv'), '--resamples', '200'])
    said = capsys.readouterr().out
    fits = {(f['configuration'], f['loss'], f['axis']) for f in json.loads((tmp_path / 'runs_fit.json').read_text())['fits']}
    assert ('s4 SSL jepa', 'ood_a_test', 'joint') in fits and ('s4 SSL cpc', 'id_test', 'joint') in fits and not any(f[:2] == ('s4 SSL jepa', 'id_test') for f in fits)
    assert 'not fitted: s4 SSL jepa, id_test' in said and "cpc's targets are learned too" in said and 'one floor E' in said
    pairs = json.loads((tmp_path / 'runs_fit.json').read_text())['ratios']
    assert {p['loss'] for p in pairs} == {'ood_a_test'} and all(p['low'] < p['ratio'] < p['high'] for p in pairs)
    assert all(p['worth_of_10x'] == pytest.approx(10 ** p['ratio']) for p in pairs)
    assert next(p for p in pairs if p['exponent'] == 'beta')['low'] < 1 < next(p for p in pairs if p['exponent'] == 'beta')['high']


@pytest.mark.parametrize('flags, words', [
    (['fit', 'runs.csv', '--loss', 'size'], 'size is no loss'), (['fit', 'runs.csv', '--out', 'runs.csv/x'], 'no folder that can be written'),
    (['fit', 'runs.csv', '--seed', '-1'], 'must lie between'), (['fit', 'runs.csv', '--loss', 'flat'], 'same loss'), (['fit', 'nothere.csv'], 'no file nothere.csv'),
    (['fit', 'steps.csv'], 'nothing in a column `run`'), (['labels', 'blank.csv', '--loss', 'loss'], 'line 2: labels must be'),
    (['simulate', '--truth', '.5', '0', '0', '.3', '.3'], '--truth takes'), (['simulate', '--truth', 'nan', '1', '1', '.3', '.3'], '--truth takes')])
def test_bad_flags_and_columns_are_one_line(tmp_path, monkeypatch, flags, words):
    N, D = cells(5, 5)
    rows = [dict(N=int(n), D=int(d), size='a', flat=1, loss=v) for n, d, v in zip(N, D, noisy(N, D, 0))]
    monkeypatch.chdir(tmp_path)
    write('runs.csv', rows)
    write('steps.csv', [r | dict(run='', step=s, id_val=1, id_test=1) for r in rows for s in (1, 2)])
    write('blank.csv', [r | dict(arm='tail', labels='') for r in rows])
    with pytest.raises(Stop, match=words) as stop:
        scaling.main(flags)
    assert '\n' not in str(stop.value) and not list(tmp_path.glob('*_*'))


def test_a_table_with_nothing_to_compare_is_one_line(tmp_path, capsys):
    rows = [dict(objective=o, arm='tail', labels=n, N=n, D=n, id_test=n if o == 'jepa' else '', ood_a_auroc=.9 - n / 100) for o in ('jepa', 'cpc') for n in (10, 20, 30, 40)]
    write(tmp_path / 'runs.csv', rows)
    write(tmp_path / 'bare.csv', [{k: v for k, v in r.items() if k not in 'ND'} for r in rows])
    with pytest.raises(Stop, match='no two losses'):
        scaling.main(['winners', str(tmp_path / 'runs.csv')])
    with pytest.raises(Stop, match='lacks the column N, D'):
        scaling.main(['labels', str(tmp_path / 'bare.csv')])
    scaling.main(['loss-vs-error', str(tmp_path / 'runs.csv')])
    assert 'cpc: left out, no id_test' in capsys.readouterr().out


def test_cmsc_with_several_batch_sizes_is_refused():
    rows = [dict(objective='cmsc', batch=b) for b in (32, 64)]
    assert 'batch size' in scaling.incomparable(rows, 'id_test') and not scaling.incomparable(rows, 'ood_a_test') and not scaling.incomparable(rows[:1], 'id_test')


# --- commands

def test_growth_of_compute():
    N, D = cells(4, 4)
    rows = [dict(N=n, D=d, step=50 * n ** .1 * d ** .8, batch=32., macs=200 * n ** .9 - 20 * n ** .9, extra_macs=60 * n ** .9) for n, d in zip(N, D)]
    rows.append(rows[0] | dict(step=1., improving=True))         # stopped too early, which must not count
    w = np.random.default_rng(0).gamma(1, 1, (3, len(rows)))
    g, (k, u, v) = growth(SimpleNamespace(rows=rows, weights=w))
    assert (g['p'], g['q'], g['mu'], g['u'], g['v'], g['left_out']) == pytest.approx((.1, -.2, .9, 1., .8, 1)) and g['k'] == pytest.approx(6 * 200 * 50 * 32)
    assert u == pytest.approx(np.ones(3)) and v == pytest.approx(np.full(3, .8)) and k == pytest.approx(np.full(3, g['k']))        # no noise, so no spread
    for r in rows[3:]:
        r['improving'] = True
    assert math.isnan(growth(SimpleNamespace(rows=rows, weights=w))[0]['v'])


def test_allocate(tmp_path, capsys):
    table(tmp_path / 'runs.csv')
    scaling.main(['allocate', str(tmp_path / 'runs.csv'), '--loss', 'ood_a_test', '--resamples', '200'])
    rows = list(csv.DictReader(open(tmp_path / 'runs_allocate.csv')))
    assert float(rows[0]['v']) == pytest.approx(.8, abs=.01) and float(rows[0]['N_low']) < float(rows[0]['N']) < float(rows[0]['N_high'])
    assert rows[-1]['beyond_the_runs'] and 'extrapolated' in capsys.readouterr().out and len(list(tmp_path.glob('*.png'))) == 2
    table(tmp_path / 'runs.csv', step=500, run='')
    rows = [r for r in csv.DictReader(open(tmp_path / 'runs.csv'))][::3]
    write(tmp_path / 'fixed.csv', [r | dict(run=i) for i, r in enumerate(rows)])
    with pytest.raises(Stop, match='fixed number of steps'):
        scaling.main(['allocate', str(tmp_path / 'fixed.csv'), '--resamples', '200'])


@pytest.mark.parametrize('command, files', [('transfer', ['transfer.csv', 'transfer.png']), ('overfit', ['overfit.csv', 'minimum_data.csv', 'overfit.png']),
                                            ('winners', ['winners.csv', 'winners.png']), ('loss-vs-error', ['loss_vs_error.csv', 'loss_vs_error.png'])])
def test_commands_write_tables_and_figures(command, files, tmp_path):
    table(tmp_path / 'runs.csv')
    scaling.main([command, str(tmp_path / 'runs.csv')] + ['--resamples', '200'] * (command in ('transfer', 'overfit')))
    assert all((tmp_path / f'runs_{f}').stat().st_size for f in files)
    rows = list(csv.DictReader(open(tmp_path / f'runs_{files[0]}')))
    if command == 'transfer':                                    # planted: the loss out of distribution is .2 more than in it
        assert [r['configuration'] for r in rows] == ['s4 SSL cpc'] and float(rows[0]['gamma_low']) < 1 < float(rows[0]['gamma_high'])
    if command == 'overfit':
        assert float(rows[0]['slope']) == pytest.approx(-1, abs=.1)
    if command == 'winners':
        assert {r['loss'] for r in rows} == {'ood_a_test', 'id_test of cpc'}
    if command == 'loss-vs-error':
        assert all(float(r['spearman']) == pytest.approx(1, abs=.01) for r in rows)


def test_winner_and_crossing_by_hand(tmp_path, capsys):
    """Crossings beyond twice the standard error of seeds are told, those within it, or without seeds to judge them by, are counted."""
    lines = [(f, d, v) for f, line in (('s4', (.5, .3)), ('resnet', (.4, .35))) for d, v in zip((100, 1000), line)]
    for spread, seeds, clear in ((.01, (-1, 0, 1), 'True'), (.5, (-1, 0, 1), 'False'), (.01, (0,), 'False')):
        write(tmp_path / 'runs.csv', [dict(family=f, objective='supervised', N=10000, D=d, seed=s, ood_a_test=v * (1 + spread * s)) for f, d, v in lines for s in seeds])
        scaling.main(['winners', str(tmp_path / 'runs.csv')])
        assert [r['winner'] for r in csv.DictReader(open(tmp_path / 'runs_winners.csv'))] == ['resnet supervised', 's4 supervised']
        assert [r['clear'] for r in csv.DictReader(open(tmp_path / 'runs_crossings.csv'))] == [clear]
        assert ('s4 supervised overtakes resnet supervised between D 100 and 1,000' in capsys.readouterr().out) == (clear == 'True')


def test_an_unfinished_run_is_left_out_and_one_that_ended_too_early_is_flagged(tmp_path, capsys):
    N, D = cells(5, 5)
    rows = [dict(run=f'{n:.0f}_{d:.0f}', N=int(n), D=int(d), step=s, seed=0, finished=int(s == 2), id_val=v * (3 - s if i % 5 else s), id_test=v)
            for i, (n, d, v) in enumerate(zip(N, D, noisy(N, D, 2))) for s in (1, 2)]
    rows[1]['finished'] = 0
    write(tmp_path / 'runs.csv', rows)
    found, _ = read_runs(tmp_path / 'runs.csv')
    assert len(found) == 48 and '1 runs have not finished' in capsys.readouterr().out
    assert '20 of 24 runs still improving when they ended' in fit_runs(select(found, 'id_test'), 'id_test', resamples=200).flags
    write(tmp_path / 'runs.csv', [r | dict(finished=0) for r in rows])
    with pytest.raises(Stop, match='no run has finished'):
        read_runs(tmp_path / 'runs.csv')


def test_overfitting_near_the_noise_does_not_bend_the_line(tmp_path):
    """A true law whose largest D lie within 1 % noise of endless data: slope -1 is inside nearly every interval."""
    N, D = cells(5, 5)
    truth, inside = Law(.3, 6., 3., .35, .6), []
    for seed in range(6):
        write(tmp_path / 'runs.csv', [dict(N=int(n), D=int(d), loss=v) for n, d, v in zip(N, D, noisy(N, D, seed, truth))])
        scaling.main(['overfit', str(tmp_path / 'runs.csv'), '--resamples', '200'])
        row = next(csv.DictReader(open(tmp_path / 'runs_overfit.csv')))
        inside.append(abs(float(row['slope']) + 1) < 1.5 * float(row['slope_95']))
    assert sum(inside) >= 5


def test_effective_command(tmp_path, capsys):
    write(tmp_path / 'ft.csv', [r | dict(run=f'{r["N"]:.0f}', family='s4', objective='cpc', task='x', N=int(r['N']), D_F=round(r['D_F'])) for r in transferred()])
    scaling.main(['transfer', str(tmp_path / 'ft.csv')])
    law = next(csv.DictReader(open(tmp_path / 'ft_effective.csv')))
    assert float(law['a']) == pytest.approx(.6, abs=.05) and 'censored' in capsys.readouterr().out
    assert abs(float(law['a_low']) - .6) < .05 and abs(float(law['a_high']) - .6) < .05          # no noise but of rounding


def test_labels_command(tmp_path, capsys):
    rows = [dict(run=f'{arm}{n}{s}', arm=arm, labels=n, N=1000, D=100, seed=s, step=1, id_val=1, id_test=(1 + .01 * s) * n ** slope, id_test_auroc=.8)
            for arm, slope in (('dominant', -.1), ('tail', .05)) for n in (9, 90, 300) for s in (0, 1)]
    write(tmp_path / 'runs.csv', rows)
    scaling.main(['labels', str(tmp_path / 'runs.csv')])
    slopes = {(r['configuration'], r['measure']): float(r['slope']) for r in csv.DictReader(open(tmp_path / 'runs_labels_slopes.csv'))}
    assert slopes == pytest.approx({('dominant', 'id_test'): -.1, ('dominant', 'id_test_auroc'): 0, ('tail', 'id_test'): .05, ('tail', 'id_test_auroc'): 0}, abs=1e-9)
    write(tmp_path / 'runs.csv', [r | dict(loss=r['id_test']) for r in rows if r['seed'] == 0])
    scaling.main(['labels', str(tmp_path / 'runs.csv'), '--loss', 'loss'])
    assert [r['measure'] for r in csv.DictReader(open(tmp_path / 'runs_labels_slopes.csv'))] == ['loss', 'loss']         # once for each arm
    write(tmp_path / 'runs.csv', [r | dict(arm='steps') for r in rows])
    with pytest.raises(Stop, match='dominant or tail'):
        scaling.main(['labels', str(tmp_path / 'runs.csv')])


def test_permutation_p_is_exact():
    assert permutation_p(np.arange(5), np.arange(5) ** 2) == pytest.approx((1, 2 / 120, True))
    x, y = np.random.default_rng(0).standard_normal((2, 7))
    rho, p, _ = permutation_p(x, y)
    assert rho == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert p == pytest.approx(scipy.stats.permutation_test((x,), lambda v: scipy.stats.spearmanr(v, y).statistic, permutation_type='pairings', n_resamples=np.inf).pvalue, abs=1e-9)
    assert permutation_p(x, y, most=5)[1] == pytest.approx(p, abs=.02)


def test_simulate(tmp_path, capsys):
    scaling.main(['simulate', '--studies', '4', '--resamples', '200', '--out', str(tmp_path)])
    rows = list(csv.DictReader(open(tmp_path / 'simulate.csv')))
    assert len(rows) == 12 and {r['parameter'] for r in rows} == {'alpha', 'beta', 'E'} and '4 studies' in capsys.readouterr().out


# --- printed tables

def test_loss_to_loss_table_adds_up():
    sets, gamma, ends = scaling.printed_transfer()
    assert gamma.shape == (4, 11) and gamma.mean(1) == pytest.approx(ends[:, 0], abs=6e-4) and gamma.std(1) == pytest.approx(ends[:, 1], abs=6e-4)
    assert abs(gamma[0].std(ddof=1) - ends[0, 1]) > 5e-3         # the printed one divides by n
    assert (gamma < 1).sum() == 43 and (gamma == .05).sum() == 8
    sex = sets.index('MIMIC(sex)')
    assert gamma[3, sex] / gamma[2, sex] == pytest.approx(7.66) and CONFIGS[2] == ('resnet', 'SL')


def test_claims_are_counted():
    assert [(found, of, agrees) for _, found, of, agrees in scaling.printed_claims()] == [
        (52, 55, False), (33, 33, True), (57, 66, False), (3, 11, False), (10, 11, True), (10, 11, True), (9, 11, True), (3, 11, True), (4, 11, True), (3, 4, False),
        (8, 11, True), (4, 11, False), (3, 11, False), (121, 121, True), (43, 55, True), (56, 66, True), (31, 55, True), (55, 66, True)]


def test_what_the_printed_exponents_hang_on():
    _, M = scaling.printed_losses('table_s5_model_bins', 'model_bin')
    _, D = scaling.printed_losses('table_s6_data_bins', 'data_bin')
    for grid in scaling.D_GRIDS.values():
        free, zero = (scaling.printed_exponents(grid, D, floor)[0].mean(1) for floor in ('free', '0'))
        assert free[1] / free[0] > 5 and free[3] / free[2] > 3   # SSL over SL
        assert zero[3] / zero[2] < 1                             # reversed for ResNets without a floor
    alpha = scaling.printed_exponents(scaling.N_GRID, M, 'free')[0].mean(1)
    assert alpha[2] > alpha[0] and alpha[3] > alpha[1]


def test_published_command(tmp_path, capsys):
    scaling.main(['published', '--out', str(tmp_path)])
    rows, said = list(csv.DictReader(open(tmp_path / 'published.csv'))), capsys.readouterr().out
    share = {r['quantity']: r['refitted'] for r in rows if 'data share' in r['quantity'] and '1-100' in r['quantity']}
    transformer, contrast = (next(v for k, v in share.items() if f'{c},' in k) for c in ('T-SL', 'T-SSL'))
    assert float(transformer.split()[0]) > .85 and float(contrast.split()[2]) < .5
    assert [r['note'] for r in rows if r['quantity'].startswith('S.')] == ['agrees'] * 3 and [r['refitted'] for r in rows if r['quantity'].startswith('S.')] == ['22 of 22', '23 of 23', '22 of 22']
    assert 'REVERSED' in said and 'likely a copied column' in said and (tmp_path / 'bins.png').exists() and (tmp_path / 'exponents.png').exists()


def test_one_axis_is_fitted_at_one_level_of_the_other(tmp_path):
    table(tmp_path / 'runs.csv')
    scaling.main(['fit', str(tmp_path / 'runs.csv'), '--axis', 'D', '--loss', 'ood_a_test', '--resamples', '200'])
    rows = list(csv.DictReader(open(tmp_path / 'runs_fit.csv')))
    assert [(r['runs'], r['levels_N'], r['levels_D']) for r in rows] == [('10', '1', '5')] * 2 and 'alpha' not in rows[0]
    assert all(float(r['beta_low95']) < .22 < float(r['beta_high95']) for r in rows)


def test_models_that_got_worse_are_flagged():
    N, D = cells(5, 5)
    L = noisy(N, D, 0) * np.where((N == N.max()) & (D == D.min()), 1.5, 1)
    flags = fit_runs(as_rows(N, D, L), 'loss', resamples=200).flags
    assert flags[-1] == f'largest N worse than a smaller one at D = {D.min():,.0f}'
