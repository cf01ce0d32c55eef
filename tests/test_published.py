"""The printed tables of arXiv 2605.17276: how often its statements hold in them, whether their
sums add up, and on which choices the refitted exponents hang."""
import numpy as np
import pandas as pd
import pytest

import scaling as scaling


def losses(name, bins):
    """Losses (datasets, bins) of T-SL, T-SSL, R-SL, R-SSL."""
    table = scaling.printed_losses(name, bins)
    return [table[f'{arch} {p}'] for arch in ('transformer', 'resnet') for p in ('SL', 'SSL')]


def counts(losses):
    """How often T-SSL is below T-SL, R-SSL below R-SL, a ResNet lowest, T-SL lowest; the lowest."""
    ts, tx, rs, rx = losses
    best = np.argmin(losses, 0)
    return [(tx < ts).sum(), (rx < rs).sum(), (best >= 2).sum(), (best == 0).sum()], best


def test_statements_about_losses_are_counted():
    M, D = losses('table_s5_model_bins', 'model_bin'), losses('table_s6_data_bins', 'data_bin')
    found, best = counts(M)
    assert found == [52, 31, 43, 0] and M[0].size == 55 and (M[1] < M[0])[:, 2:].all()
    assert (best == 2).sum(0)[:3].tolist() == [8, 4, 3]
    found, best = counts(D)
    assert found == [57, 55, 56, 0] and D[0].size == 66 and (D[1] < D[0])[:, 0].sum() == 3
    assert (best == 3).sum(0)[:3].tolist() == [10, 10, 9] and (best[:, 5] == 2).sum() == 3
    ahead = D[2] < D[3]
    over = ahead[:, 3] & ~ahead[:, 2]
    assert over.sum() == 4 and ahead[over, 5].sum() == 3
    assert [np.log(L[:, 0] / L[:, -1]).mean().round(3) for L in D[2:]] == [.378, .203]
    assert (D[0] == D[2]).sum(1).max() == 4                # EchoNext: likely a copied column


def test_printed_means_add_up():
    s9, s10 = (pd.read_csv(scaling.PUBLISHED / f'table_{name}.csv').set_index('method')
               for name in ('s9_benchmark_auroc', 's10_ptbxl_detail'))
    tasks = ['ptbxl_avg', 'echonext', 'mimic_sex', 'mimic_icu', 'mimic_mort', 'cpsc2018']
    means = s9[tasks].mean(axis=1).to_numpy()
    assert len(s9) == 22 and means == pytest.approx(s9['mean'], abs=6e-4)
    areas = s10[[f'{c}_auc' for c in ('diag', 'sub', 'sup', 'form', 'rhythm')]].mean(axis=1)
    assert len(s10) == 23 and areas.to_numpy() == pytest.approx(s10.macro_auc_avg, abs=6e-5)
    assert s9.ptbxl_avg.to_numpy() == pytest.approx(s10.macro_auc_avg[s9.index], abs=6e-4)
    s7 = pd.read_csv(scaling.PUBLISHED / 'table_s7_loss_to_loss.csv')
    one = s7[s7.category.notna()].set_index(['dataset', 'arch', 'paradigm']).transfer_exponent
    one = one.sort_index()
    assert ((one < 1).sum(), (one == .05).sum(), len(one)) == (43, 8, 44)
    sex = one['MIMIC(sex)', 'resnet']
    assert sex['SSL'] / sex['SL'] == pytest.approx(7.66)   # over the bound of .05


def test_shared_floor_against_brute_force():
    x = scaling.D_GRIDS[0]
    curves = [L[0] for L in losses('table_s6_data_bins', 'data_bin')]

    def total(E):
        return sum(scaling.project(x[None], L, floor=E)[3] for L in curves)

    least = min(map(total, np.linspace(0, np.min(curves), 60)))
    assert total(scaling.shared_floor(x, curves)) <= least * (1 + 1e-5)


def test_exponents_hang_on_the_floor():
    D = scaling.printed_losses('table_s6_data_bins', 'data_bin')
    free, zero = (scaling.exponents(scaling.D_GRIDS[0], D, floor).mean()
                  for floor in ('free', 'zero'))
    assert free['resnet SSL'] > 4 * free['resnet SL']
    assert zero['resnet SSL'] < zero['resnet SL']          # reversed without a floor
