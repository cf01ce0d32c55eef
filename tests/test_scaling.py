"""Laws against their algebra, fits against planted truths, refusals against tables that cannot
tell, and every command on tables whose answer is known."""
import argparse
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.stats

import scaling
from data import Stop
from scaling import Law, fit_law, fit_runs, joint_law, optimum, pareto, read_runs

TRUTH = Law(.11, 6., 3., .35, .22)


def study(seed=0, truth=TRUTH, noise=.01, seeds=1):
    """5 sizes x 5 numbers of records x seeds, with losses of a planted law."""
    rows = itertools.product(np.geomspace(2e4, 2e8, 5).round(), np.geomspace(2e3, 2e6, 5).round(),
                             range(seeds))
    runs = pd.DataFrame(rows, columns=['N', 'D', 'seed'])
    noise = np.exp(noise * np.random.default_rng(seed).standard_normal(len(runs)))
    return runs.assign(loss=noise * joint_law(runs.N, runs.D, *truth))


def sweep():
    """A sweep's table: CPC and JEPA, 5 x 5 sizes, two seeds, three steps a run. The second step is
    best by validation, the third by test loss."""
    rows, rng = [], np.random.default_rng(0)
    for objective, N, D, seed in itertools.product(
            ('cpc', 'jepa'), np.geomspace(3e3, 3e5, 5).round(), np.geomspace(32, 3200, 5).round(),
            (0, 1)):
        L = joint_law(N, D, *TRUTH) * math.exp(.005 * rng.standard_normal())
        for k, val, test in ((.5, 1.05, 1.), (1, 1., 1.), (2, 1.03, .9)):
            step = round(20 * k * D ** .8)
            rows.append(dict(run=f'{objective}_{N}_{D}_{seed}', family='s4', paradigm='SSL',
                             objective=objective, N=N, D=D, lr=1e-3, step=step, seed=seed,
                             flops=6 * 300 * N * 32 * step, id_val=L * val, id_test=L * test,
                             ood_a_val=.2 + L * val, ood_a_test=.2 + L, ood_a_auroc=.9 - .05 * L))
    return pd.DataFrame(rows)


def run(command, path, *flags, rows=None):
    """The tables of a command on a CSV, after they were delivered."""
    if rows is not None:
        rows.to_csv(path, index=False)
    parser = argparse.ArgumentParser()
    scaling.table_flags(parser, command)
    parser.set_defaults(resamples=50)                      # enough for these tests
    a = parser.parse_args([str(path), *flags])
    tables, figures = getattr(scaling, command.replace('-', '_') + '_command')(a)
    scaling.deliver(a, tables, figures)
    assert all((path.parent / f'runs_{name}.png').stat().st_size for name in figures)
    return {name: pd.DataFrame(rows) for name, rows in tables.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'runs.csv'


# --- laws

@pytest.mark.parametrize('u, v', [(1, 1), (1.1, .8), (.9, 1.3)])
def test_optimum_against_brute_force(u, v):
    C, k = 1e13, 60
    N, D = optimum(C, TRUTH, k, u, v)
    assert k * N ** u * D ** v == pytest.approx(C)
    best = scipy.optimize.minimize_scalar(
        lambda x: joint_law(math.exp(x), (C / (k * math.exp(u * x))) ** (1 / v), *TRUTH),
        bounds=(2, 25), method='bounded')
    assert joint_law(N, D, *TRUTH) == pytest.approx(best.fun, rel=1e-9)
    data_part = v * math.log(optimum(C * 1.001, TRUTH, k, u, v)[1] / D) / math.log(1.001)
    assert data_part == pytest.approx(scaling.data_share(TRUTH, u, v))
    assert np.isnan(optimum(C, TRUTH, k, u, -v)).all()


def test_minimum_data_by_its_definition():
    least = scaling.minimum_data(1e6, TRUTH, .1)
    assert joint_law(1e6, least, *TRUTH) == pytest.approx(1.1 * joint_law(1e6, np.inf, *TRUTH))


def test_pareto_by_hand():
    assert pareto(np.array([3., 1, 2, 2, 5, 4]), np.array([.5, .9, .7, .8, .5, .4])) == [1, 2, 0, 5]


# --- fits

def test_noiseless_truth_comes_back():
    runs = study(noise=0)
    p, _ = fit_law(runs[['N', 'D']].to_numpy().T, runs.loss)
    assert p == pytest.approx(TRUTH, rel=1e-3)


def test_gradient_and_sum():
    rng = np.random.default_rng(0)
    x, l, weight = rng.standard_normal((2, 9)), .3 * rng.standard_normal(9), rng.random(9)
    p = np.array([.1, -1, -.5, .3, .2])
    value, gradient = scaling.huber(p, x, l, weight, .02)
    numeric = scipy.optimize.approx_fprime(
        p, lambda q: scaling.huber(q, x, l, weight, .02)[0], 1e-7)
    assert gradient == pytest.approx(numeric, rel=1e-4)
    r = l - np.log(.1 + np.exp(-1 - .3 * x[0]) + np.exp(-.5 - .2 * x[1]))
    terms = [v ** 2 / 2 if abs(v) < .02 else .02 * (abs(v) - .01) for v in r]
    assert value == pytest.approx(terms @ weight)


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_one_start_finds_as_little_as_many(seed):
    runs = study(seed, noise=.03)
    scales, L = runs[['N', 'D']].to_numpy().T, runs.loss.to_numpy()
    x, l = (np.log(v) - np.log(v).mean(-1, keepdims=True) for v in (scales, L))

    def total(start=None):
        return scaling.huber(fit_law(scales, L, start=start)[1], x, l, 1., 1e-3)[0]

    starts = itertools.product((0, .2), (-1, -2), (-1, -2), (.1, .6), (.1, .6))
    assert total() <= min(total(np.array(s)) for s in starts) * (1 + 1e-5)


def test_one_axis_has_the_floor_of_the_law_and_of_the_other_axis():
    N = np.geomspace(2e4, 2e8, 7)
    runs = pd.DataFrame(dict(N=N, D=2e4, loss=joint_law(N, 2e4, *TRUTH)))
    law = fit_runs(runs, 'loss', axis='N', resamples=1).law
    floor = TRUTH.E + TRUTH.B * 2e4 ** -TRUTH.beta
    assert (law.E, law.A, law.alpha) == pytest.approx((floor, TRUTH.A, TRUTH.alpha), rel=1e-3)


def test_intervals_checks_and_weights():
    runs = study(3, seeds=2)
    f = fit_runs(runs, 'loss', seed=5)
    for c in ('E', 'alpha', 'beta'):
        row = scaling.span(x=getattr(f.boot, c))
        assert row['x_low'] < getattr(TRUTH, c) < row['x_high']
    kept, w = runs.N < runs.N.max(), f.weights
    p, _ = fit_law(runs[kept][['N', 'D']].to_numpy().T, runs.loss[kept])
    error = (joint_law(runs.N, runs.D, *p) / runs.loss - 1)[~kept].mean()
    assert f.checks['error_N'] == pytest.approx(error)
    assert f.checks['noise'] == pytest.approx(.01, abs=.003)
    assert (w[0] == 1).all() and w.min() > 0 and w[1:].mean() == pytest.approx(1, abs=.03)
    assert w[1:].var() == pytest.approx(50 / 45, rel=.1)


def test_bootstrap_is_as_wide_as_repeated_studies():
    fits = [fit_runs(study(seed, seeds=2), 'loss', resamples=60) for seed in range(25)]
    for c in ('alpha', 'beta'):
        spread = np.std([getattr(f.law, c) for f in fits])
        assert np.median([getattr(f.boot, c).std() for f in fits]) == pytest.approx(spread, rel=.4)


S = np.geomspace(1e3, 1e5, 9)


@pytest.mark.parametrize('N, D, axis, reason', [
    (S, S, 'joint', 'grow together'), (S[:1].repeat(9), S, 'joint', '--axis D'),
    (S[[0, 0, 1, 1, 2, 2]], S[[0, 1, 1, 2, 2, 0]], 'joint', 'too few'),
    (S[:5], S[:5], 'N', '1.0 decades')])
def test_refused_where_sizes_cannot_tell(N, D, axis, reason):
    runs = pd.DataFrame(dict(N=N, D=D, loss=joint_law(N, D, *TRUTH)))
    assert reason in fit_runs(runs, 'loss', axis=axis)


def test_refused_where_the_loss_does_not_move():
    for seed in range(8):
        assert 'do not identify' in fit_runs(study(seed, Law(.5, 0., 0., .3, .3)), 'loss')
        assert not isinstance(fit_runs(study(seed, noise=.05), 'loss', resamples=1), str)
    assert 'the same loss' in fit_runs(study().assign(loss=1), 'loss')


def test_flags():
    none = study(noise=0, truth=TRUTH._replace(E=-.02))
    assert 'E = 0' in fit_runs(none, 'loss', resamples=1).flags
    steep = study(noise=0, truth=Law(.5, 1e20, 3., 5., .2))
    assert 'exponent of N at its bound' in fit_runs(steep, 'loss', resamples=1).flags


# --- tables of runs

@pytest.mark.parametrize('change, says', [
    (lambda r: r.drop(columns='D'), 'lacks the column D'),
    (lambda r: r.drop(columns=['id_test', 'ood_a_test']), '--loss'),
    (lambda r: r.assign(N=1000, D=100), 'N has 1 level'),
    (lambda r: pd.concat([r, r[3:4].assign(id_test=1)]), 'line 302: it is there twice'),
    (lambda r: r.drop(columns='run'), 'column `run`'),
    (lambda r: r.assign(finished=0), 'No losses'),
    (('id_test', math.nan), 'line 9: id_test is no'), (('id_test', math.inf), 'line 9: id_test is'),
    (('N', 3), 'line 9: N must be a whole number'),
    (('D', 3.2), 'line 9: D must be a whole number')])
def test_a_wrong_table_gives_one_clear_line(change, says, path):
    rows = sweep()
    if callable(change):
        rows = change(rows)
    else:
        rows.loc[7, change[0]] = change[1]
    with pytest.raises(Stop) as stop:
        run('fit', path, rows=rows)
    assert says in str(stop.value) and '\n' not in str(stop.value)
    assert [f.name for f in path.parent.iterdir()] == ['runs.csv']


@pytest.mark.parametrize('text, says', [
    ('', 'no CSV'), ('N,D,loss\n', '0 rows'), ('N,D,loss\n10,1,1\n\n10,2\n', 'line 4: not as many'),
    ('N,D,size\n10,2,tiny\n', 'size is no loss')])
def test_no_table_gives_one_clear_line(text, says, path):
    path.write_text(text)
    with pytest.raises(Stop, match=says):
        read_runs(path, ['size'] if 'size' in text else None)


def test_selection_is_by_validation_and_never_by_test(path):
    sweep().to_csv(path, index=False)
    runs, losses = read_runs(path)
    chosen = scaling.select(runs[runs.objective == 'cpc'], 'id_test')
    least = runs.groupby('run')[['id_val', 'id_test']].min().loc[chosen.run]
    assert losses == ['id_test', 'ood_a_test'] and len(chosen) == 50
    assert (chosen.id_val.to_numpy() == least.id_val).all()
    assert (chosen.id_test.to_numpy() > least.id_test).all()
    with pytest.raises(Stop, match='no validation loss beside id_test'):
        scaling.select(runs.drop(columns='id_val'), 'id_test')


def test_of_several_rates_the_best_by_validation_stands(path):
    rows = pd.DataFrame(dict(run=range(6), N=1000, D=100, seed=[0, 0, 0, 1, 1, 1], lr=[3, 1, 2] * 2,
                             id_val=[2, 1, 3] * 2, id_test=[7, 8, 6] * 2))
    rows.to_csv(path, index=False)
    assert list(scaling.select(read_runs(path)[0], 'id_test').lr) == [1, 1]


def test_unfinished_runs_are_left_out_and_improving_ones_flagged(path, capsys):
    first = study(2).rename(columns=dict(loss='id_test')).assign(
        run=range(25), step=1, finished=0, id_val=2)
    last = first.assign(step=2, finished=[0] + 24 * [1], id_val=3 - 2 * (first.run % 5 > 0))
    pd.concat([first, last]).to_csv(path, index=False)
    runs, _ = read_runs(path)
    assert len(runs) == 48 and '1 runs have not finished' in capsys.readouterr().out
    f = fit_runs(scaling.select(runs, 'id_test'), 'id_test', resamples=1)
    assert f.flags == '20 of 24 runs still improving when they ended'


def test_losses_that_do_not_compare():
    runs = pd.DataFrame(dict(objective='cmsc', batch=[32, 64], id_test=1., ood_a_test=1.))
    assert 'batch size' in scaling.incomparable(runs, 'id_test')
    assert not scaling.incomparable(runs[:1], 'id_test')
    assert 'learns too' in scaling.incomparable(runs.assign(objective='HuBERT++'), 'id_test')


# --- commands

def test_a_strangers_table_needs_three_columns(path):
    fit = run('fit', path, '--loss', 'L', rows=study(5).rename(columns=dict(loss='L')))['fit']
    joint = fit.iloc[0]
    assert joint.alpha_low < .35 < joint.alpha_high and joint.configuration == 'all runs'
    assert list(fit.axis) == ['joint', 'N', 'D'] and np.isnan(fit.beta[1])
    assert pd.read_csv(path.with_name('runs_fit.csv')).alpha[0] == joint.alpha
    assert list(run('fit', path, '--axis', 'D', rows=study(5))['fit'].axis) == ['D']


def test_fit_compares_what_can_be_compared(path, capsys):
    tables = run('fit', path, rows=sweep())
    joint, ratio = tables['fit'].query('axis == "joint"'), tables['ratios'].iloc[0]
    assert list(joint.loss) == ['id_test', 'ood_a_test', 'ood_a_test']
    assert list(tables['ratios'].loss) == ['ood_a_test'] * 2
    _, one, two = joint.alpha
    assert ratio.ratio_low < ratio.ratio == one / two < ratio.ratio_high
    assert 'left out: s4 SSL jepa, id_test' in capsys.readouterr().out


def test_a_refused_fit_shows_the_grid(path, capsys):
    few = study().query('N < 3e5 and D < 1e6')
    with pytest.raises(Stop, match='N has 2 level.* sweep joint makes a grid'):
        run('fit', path, rows=few)
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].split() == ['200000', '1', '1', '1', '1']


def test_allocation_and_its_law_use_the_runs_that_had_stopped_improving(path):
    """The largest models end at their best evaluation, with losses that are 30 % too high."""
    rows = sweep().query('objective == "cpc"').reset_index(drop=True)
    rows['id_test'] *= np.where(rows.N < 2e5, 1, 1.3)
    ended = rows[(rows.N < 2e5) | (rows.index % 3 < 2)]
    clean, found = (run('allocate', path, '--loss', 'id_test', rows=r)['allocate'].iloc[0]
                    for r in (rows.query('N < 2e5'), ended))
    same = ['N', 'D_high', 'data_share', 'u', 'v']
    assert found[same].equals(clean[same])
    assert (found.u, found.v) == pytest.approx((1, .8), abs=.01)
    assert found.N_low < found.N < found.N_high and '10 of 50 runs were still' in found['flags']
    with pytest.raises(Stop, match='50 of 50 runs .*give them more steps'):
        run('allocate', path, '--loss', 'id_test', rows=sweep()[lambda r: r.index % 3 < 2])


def test_no_allocation_where_records_cost_nothing(path):
    rows = sweep().query('objective == "cpc"').groupby('run').nth(1)
    with pytest.raises(Stop, match='fixed number of steps'):
        run('allocate', path, rows=rows.assign(flops=rows.N * 500))


def test_loss_to_loss_with_the_weights_of_the_fits(path):
    """The first cell has two rates. By id and by ood different ones are best: no run is in both."""
    rows = sweep()
    other = rows[rows.run == rows.run[0]].assign(run='other', lr=2e-3)
    other['id_val'] *= .99
    other['ood_a_val'] *= 1.01
    found = run('transfer', path, rows=pd.concat([rows, other]))['transfer'].iloc[0]
    assert (found.points, found.dropped) == (49, 0) and found.gamma_low < 1 < found.gamma_high
    assert not any('_ratio' in c for c in found.index)     # none without an interval
    i, o, _ = scaling.fit_all(argparse.Namespace(runs=path, loss=None, resamples=50, seed=0))
    gammas = [np.polyfit(np.log(i.runs.id_test[1:] - E), np.log(o.runs.ood_a_test[1:] - F), 1,
                         w=np.sqrt(w[1:]))[0] for w, E, F in zip(i.weights, i.boot.E, o.boot.E)]
    assert [found.gamma, found.gamma_low, found.gamma_high] == pytest.approx(
        list(scaling.span(x=np.array(gammas)).values()))


def transferred(k=2., a=.6, b=-.1):
    """Rows in which fine-tuning on D_F is worth k D_F^a N^b more records of a scratch law, and was
    done from scratch on just as many."""
    rows = []
    for N in (1e5, 1e6, 1e7):
        D_F = np.geomspace(100, 2e3, 5).round()
        D = np.r_[50, D_F + k * D_F ** a * N ** b, 1e5]
        for mode, sizes, equal in (('scratch', D, D), ('finetune', D_F, D[1:-1])):
            rows.append(pd.DataFrame(dict(N=N, D_F=sizes, mode=mode, loss=.2 + 4 * equal ** -.4)))
    return pd.concat(rows, ignore_index=True)


def test_effective_data_comes_back_and_other_points_are_counted():
    odd = pd.DataFrame(dict(N=1e5, D_F=1e3, mode='finetune', loss=[.19, .2 + 4 * 500 ** -.4, 3]))
    rows = pd.concat([transferred(), odd])
    points, law = scaling.data_transferred(rows, 'loss', np.ones(len(rows)))
    assert [math.exp(law[0]), *law[1:]] == pytest.approx((2, .6, -.1))
    assert points.status.value_counts().to_dict() == dict(ok=15, censored=1, negative=1,
                                                          extrapolated=1)


def test_scratch_losses_are_read_off_a_monotone_curve():
    D, L = np.array([100., 100, 1000, 10000]), np.array([.5, .5, .3, .2])
    wanted = np.array([.5, .3, .2, math.sqrt(.5 * .3), .1, .6])
    found = scaling.effective_data(D, L, wanted, np.ones(4))
    assert found == pytest.approx([100, 1000, 10000, 10 ** 2.5, math.inf, math.nan], nan_ok=True)


def test_scratch_runs_are_matched_by_family_and_objective(path):
    """Two objectives of one family and size, whose networks learn differently from scratch."""
    rows = transferred(b=0.).assign(run=range(36), family='s4', task='x', objective='cpc')
    rows['D_F'] = rows.D_F.round()
    other = rows.assign(objective='supervised', loss=rows.loss * 1.2, run=range(36, 72))
    laws = run('transfer', path, rows=pd.concat([rows, other]))['effective']
    assert list(laws.ok) == [15, 15] and laws.a.to_numpy() == pytest.approx([.6, .6], abs=.01)
    assert laws.k.to_numpy() == pytest.approx([2, 2], rel=.05)


def test_overfit_interval_is_that_of_the_refitted_laws(path):
    """beta and L(N, inf) are fitted to the same runs, which a line through them does not know."""
    rows = study(1, Law(.3, 6., 3., .35, .6))
    tables = run('overfit', path, '--resamples', '200', rows=rows)
    f, slopes = fit_runs(rows, 'loss', resamples=200, seed=[0, *b'all runs']), []
    for law, w in zip(map(Law._make, zip(*f.boot)), f.weights):
        limit = joint_law(rows.N, np.inf, *law)
        extent, z = rows.loss / limit - 1, rows.D ** law.beta * limit
        if not slopes:
            clear = law.B / z > 3 * f.checks['noise']
        good = clear & (extent > 0)
        slopes.append(np.polyfit(np.log(z[good]), np.log(extent[good]), 1, w=np.sqrt(w[good]))[0])
    low, high = np.quantile(slopes[1:], [.025, .975], method='inverted_cdf')
    found = tables['overfit'].iloc[0]
    assert 5 < found.points < 25 and low < -1 < high
    assert [found.slope, found.slope_low, found.slope_high] == pytest.approx([slopes[0], low, high])
    assert list(tables['minimum_data'].N) == sorted(rows.N.unique())


def test_labels_by_their_slopes(path):
    rows = pd.DataFrame([
        dict(run=f'{arm}{n}{s}', arm=arm, labels=n, N=1000, D=100, seed=s,
             id_test=(1 + .01 * s) * n ** slope, id_auroc=.8)
        for arm, slope in (('dominant', -.1), ('tail', .05)) for n in (9, 90, 300) for s in (0, 1)])
    tables = run('labels', path, rows=rows)
    assert list(tables['labels_slopes'].slope) == pytest.approx([0, -.1, 0, .05], abs=1e-9)
    assert tables['labels']['mean'].iloc[3] == pytest.approx(1.005 * 9 ** -.1)
    with pytest.raises(Stop, match='dominant or tail'):
        run('labels', path, rows=rows.assign(arm='steps'))


@pytest.mark.parametrize('spread, seeds, clear', [(.01, 3, True), (.5, 3, False), (.01, 1, False)])
def test_winner_and_crossing_by_hand(spread, seeds, clear, path):
    """A crossing is clear beyond twice the standard error of seeds, and never without seeds."""
    lines = dict(s4=(.5, .3), resnet=(.4, .35))
    rows = pd.DataFrame([
        dict(family=family, objective='supervised', N=10000, D=D, seed=s,
             ood_a_test=v * (1 + spread * (s - seeds // 2)))
        for family, line in lines.items() for D, v in zip((100, 1000), line) for s in range(seeds)])
    tables = run('winners', path, rows=rows)
    assert list(tables['winners'].winner) == ['resnet supervised', 's4 supervised']
    assert tables['crossings'].iloc[0].to_dict() == dict(
        loss='ood_a_test', overtakes='s4 supervised', other='resnet supervised',
        before='N 10,000, D 100', after='N 10,000, D 1,000', clear=clear)


def test_winners_and_errors_of_a_sweep(path):
    fields = run('winners', path, rows=sweep())['winners'].loss
    assert set(fields) == {'ood_a_test', 'id_test of cpc'}
    errors = run('loss-vs-error', path)['loss_vs_error']
    assert set(errors.configuration) == {'s4 SSL cpc', 's4 SSL jepa'}
    assert errors.spearman.to_numpy() == pytest.approx(1, abs=.01) and (errors.points == 25).all()
    with pytest.raises(Stop, match='no configuration has four points'):
        run('loss-vs-error', path, rows=sweep().query('N < 4e3 and D < 1e3'))


def test_permutation_p_is_exact():
    x, y = np.random.default_rng(0).standard_normal((2, 6))
    rho, p = scaling.permutation_p(x, y)
    every = [scipy.stats.spearmanr(order, y).statistic for order in itertools.permutations(x)]
    assert rho == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert p == pytest.approx(np.mean(np.abs(every) >= abs(rho) - 1e-9))
