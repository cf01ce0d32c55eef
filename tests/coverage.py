"""How often 95 % intervals hold the truth, in simulated studies. A command, not a test.

    python -m tests.coverage intervals             # of a difference over patients and seeds
    python -m tests.coverage laws --studies 200    # of a scaling law's exponents and floor

Prints a table and writes it to out/.
"""
import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

from data import run_script
from evaluate import Estimate, interval
from scaling import Law, fit_runs, joint_law, span

TRUTH = Law(.11, 6., 3., .35, .22)
PATIENTS = 300


def intervals_of(studies, seeds, share, rng):
    """Studies of two arms whose true difference is 0: (errors, half widths by Welch and
    Satterthwaite, half widths by adding the squares of two separate ones), each (studies,). share:
    the standard error over seeds, divided by that over patients."""
    patients = rng.standard_normal((studies, PATIENTS))
    means = share * math.sqrt(seeds / PATIENTS) * rng.standard_normal((studies, seeds))
    error = patients.mean(1) + means.mean(1)
    by_patients, by_seeds = patients.var(1) / PATIENTS, means.var(1, ddof=1) / seeds
    freedom = (by_patients + by_seeds) ** 2 * (seeds - 1) // by_seeds ** 2
    welch = scipy.stats.t.ppf(.975, freedom) * np.sqrt(by_patients + by_seeds)
    added = np.sqrt(scipy.stats.norm.ppf(.975) ** 2 * by_patients
                    + scipy.stats.t.ppf(.975, seeds - 1) ** 2 * by_seeds)
    for i in range(min(studies, 50)):                     # evaluate.interval gives the same
        boot = scipy.stats.norm.ppf((np.arange(1000) + .5) / 1000)
        boot *= math.sqrt(by_patients[i]) / boot.std()
        _, low, high = interval(Estimate(means[i, :, None] + patients[i].mean(), boot))
        assert abs((high - low) / 2 / welch[i] - 1) < 1e-6
    return error, welch, added


def intervals(studies):
    """A row for each number of seeds and share: coverage and mean width of both formulas."""
    rng, rows = np.random.default_rng(0), []
    for seeds in (3, 5, 8):
        for share in (.5, 1, 2):
            error, *halves = intervals_of(studies, seeds, share, rng)
            row = dict(seeds=seeds, seeds_over_patients=share)
            for name, half in zip(('welch', 'added'), halves):
                row[name] = (abs(error) < half).mean()
                row[f'{name}_width'] = 2 * half.mean()
            rows.append(row)
    return rows


def planted(seed, noise=.01, levels=5, seeds=3):
    """Whether each interval of one study with a planted law holds the truth, or the refusal."""
    rng = np.random.default_rng(seed)
    N, D = np.meshgrid(np.geomspace(2e4, 2e7, levels), np.geomspace(2e3, 2e6, levels))
    runs = pd.DataFrame(dict(N=N.ravel(), D=D.ravel())).loc[np.arange(levels ** 2).repeat(seeds)]
    error = np.exp(noise * rng.standard_normal(len(runs)))
    fit = fit_runs(runs.assign(loss=joint_law(runs.N, runs.D, *TRUTH) * error), 'loss', seed=seed)
    if isinstance(fit, str):
        return [dict(refused=fit)]
    rows = []
    for c in ('alpha', 'beta', 'E'):
        row = span(estimate=getattr(fit.boot, c)) | dict(parameter=c, truth=getattr(TRUTH, c))
        row['covered'] = row['estimate_low'] <= row['truth'] <= row['estimate_high']
        rows.append(row | dict(width=row['estimate_high'] - row['estimate_low']))
    return rows


def laws(studies):
    """A row for each parameter: truth, mean estimate and its spread, coverage, median width."""
    with ProcessPoolExecutor(2) as pool:
        rows = pd.DataFrame(sum(pool.map(planted, range(studies)), []))
    return rows.groupby('parameter').agg(
        truth=('truth', 'first'), estimate=('estimate', 'mean'), spread=('estimate', 'std'),
        studies=('covered', 'size'), covered=('covered', 'mean'), width=('width', 'median'))


def main():
    """The command line: see the top of the file."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('what', choices=['intervals', 'laws'], nargs='?', default='intervals')
    p.add_argument('--studies', type=int, help='default: 20,000 intervals, 200 laws')
    a = p.parse_args()
    command, studies = (intervals, 20000) if a.what == 'intervals' else (laws, 200)
    table = pd.DataFrame(command(a.studies or studies))
    print(table.round(4).to_string())
    Path('out').mkdir(exist_ok=True)
    table.to_csv(f'out/coverage_{a.what}.csv')


if __name__ == '__main__':
    run_script(main)
