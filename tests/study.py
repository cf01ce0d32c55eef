"""The study: claims of the papers compared like for like, with intervals over patients and seeds.

    python -m tests.study                     # all parts, half a day of two cores; resumable
    python -m tests.study curves --seeds 3    # one part
    python -m tests.study claims --out docs/results    # verdicts and figures of the kept rows

The tables at the top of tests/study.py say what is pretrained (STUDY, ARMS), on which data it is
evaluated (LOOKS), and what is claimed (CLAIMS). Every arm is compared with its own untrained
weights. Writes study_*.csv and .png to --out.
"""
import argparse
import contextlib
import io
import math
import re
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

import train
from data import Dataset, Stop, run_script
from evaluate import (INTERVAL, PROTOCOLS, Arm, Estimate, Task, figure, forest, interval,
                      label_count, minus, open_run, predict, print_table, slug, write_csv)
from scaling import begun, pretrain, run_all, share_threads

from .tables import place, spell


def read_table(text):
    """A DataFrame of words from a text whose columns are two or more spaces apart."""
    return pd.read_csv(io.StringIO(text.strip()), sep='  +', engine='python', dtype=str)


# kept: steps before the last at which copies of the checkpoint are kept, - for none
STUDY = read_table("""
part      seeds  steps  kept            question
curves    5      2000   0 20 60 200 600  Which objective, which backbone, and when?
data      5      2000   -               Are real records better to pretrain on than synthetic ones?
records   4      2000   -               Do more pretraining records help, at equal steps?
released  8      300    -               Do the deviations of the released code matter?
""").set_index('part')
LOOKS = read_table("""
part      data    mode      labels
curves    cohort  linear    all
curves    real    linear    all
data      real    linear    100
data      real    linear    300
data      real    linear    all
data      real    frozen    all
data      real    finetune  100
data      real    finetune  all
records   cohort  linear    all
records   real    linear    all
released  cohort  linear    all
released  real    linear    all
""")
# the rate of the Transformer under JEPA is thrice its default: better on validation records
ARMS = read_table("""
part      arm               flags of train.py
curves    cpc s4            --objective cpc
curves    jepa s4           --objective jepa
curves    data2vec s4       --objective data2vec
curves    dinosr s4         --objective dinosr
curves    hubert s4         --objective hubert
curves    cpc transformer   --objective cpc --backbone transformer
curves    jepa transformer  --objective jepa --backbone transformer --lr 3e-2
curves    cpc net1d         --objective cpc --backbone net1d
curves    jepa net1d        --objective jepa --backbone net1d
data      cpc real          --objective cpc --data real
data      cpc synthetic     --objective cpc --data synthetic19000 --records 14900
data      cpc both          --objective cpc --data real,synthetic19000
data      jepa real         --objective jepa --data real
data      jepa synthetic    --objective jepa --data synthetic19000 --records 14900
data      jepa both         --objective jepa --data real,synthetic19000
records   cpc 100           --objective cpc --data synthetic19000 --records 100
records   cpc 1000          --objective cpc --data synthetic19000 --records 1000
records   cpc 10000         --objective cpc --data synthetic19000 --records 10000
records   jepa 100          --objective jepa --data synthetic19000 --records 100
records   jepa 1000         --objective jepa --data synthetic19000 --records 1000
records   jepa 10000        --objective jepa --data synthetic19000 --records 10000
released  jepa              --objective jepa
released  jepa ema          --objective jepa --as_released ema
released  jepa mask         --objective jepa --as_released mask
released  jepa lr           --objective jepa --as_released lr
released  jepa norm         --objective jepa --as_released norm
released  dinosr            --objective dinosr
released  dinosr codebook   --objective dinosr --as_released codebook
released  data2vec          --objective data2vec
released  data2vec layer    --objective data2vec --target-norm layer
""")
# kind better: the first arm is better than each of the others. gain: it gains more over its own
# untrained weights. close: it differs from each by less than MARGIN. a+b: the mean of two arms.
# a/b: two others. cpc s4 @200: the arm after 200 steps
CLAIMS = read_table("""
part      kind    first                others
curves    better  cpc s4               jepa s4/data2vec s4/dinosr s4/hubert s4
curves    close   jepa s4              cpc s4
curves    better  cpc s4+jepa s4       cpc transformer+jepa transformer/cpc net1d+jepa net1d
curves    gain    cpc s4+jepa s4       cpc transformer+jepa transformer/cpc net1d+jepa net1d
curves    better  cpc s4+jepa s4       cpc s4 @200+jepa s4 @200
records   better  cpc 10000+jepa 10000  cpc 100+jepa 100/cpc 1000+jepa 1000
data      better  cpc real+jepa real   cpc synthetic+jepa synthetic
released  close   jepa                 jepa ema/jepa mask/jepa lr/jepa norm
released  close   dinosr               dinosr codebook
released  close   data2vec             data2vec layer
""")
MARGIN = .01                            # a smaller difference in macro AUROC does not matter
PREPARE = {
    'cohort': 'python data.py synthetic --records 2000 --seed 1 --shift all --out cohort',
    'synthetic19000': 'python data.py synthetic --records 19000 --seed 2 --out synthetic19000',
    'real': 'python data.py ptbxl --root PTBXL --download --folders 00000 01000 --out real'}
# the two highest folds test together, the one below validates
FOLDS = dict.fromkeys(('cohort', 'real'), (range(1, 8), (8,), (9, 10)))


def runs_of(name, a):
    """{arm: [(folder, train.py's arguments) of each seed]} of a part."""
    part, runs = STUDY.loc[name], {}
    steps, seeds = a.steps or int(part.steps), a.seeds or int(part.seeds)
    for (_, _, arm, flags), seed in product(ARMS[ARMS.part == name].itertuples(), range(seeds)):
        t = train.make_parser().parse_args(flags.split())
        vars(t).update(steps=steps, seed=seed, device=a.device, schedule='constant', probe_every=0,
                       log_every=20)
        t.keep = [int(k) for k in part.kept.strip('-').split() if int(k) < steps]
        train.fill_in(t)
        folder = Path(a.out, 'runs', slug(name, arm, f's{seed}'))
        runs.setdefault(arm, []).append((folder, t))
    return runs


def look(arm, runs, data, mode, labels):
    """(labelled records to learn from, {name: Estimate of macro AUROC}) of one arm on a dataset: of
    itself; `arm @untrained`; `arm @gain` (the difference of these two); `arm @200` (the checkpoint
    kept at step 200); with mode finetune, `arm @scratch`, and `arm @less-scratch` (the difference
    to it). Raises Stop where test patients were pretrained on."""
    with contextlib.redirect_stdout(None):
        final = [open_run(folder, t.device) for folder, t in runs]
        t = Task(data, None, final, folds=FOLDS.get(data))
        asked = {arm: ('net', final, mode), f'{arm} @untrained': ('twin', final, mode)}
        for step in runs[0][1].keep:
            kept = [open_run(f'{folder}@{step}', t.device) for folder, t in runs]
            asked[f'{arm} @{step}'] = 'net', kept, mode
    if t.leaks:
        raise Stop(f'{arm}: {t.leaks} test records of {data} are of patients pretrained on')
    if mode == 'finetune':
        asked[f'{arm} @scratch'] = 'twin', final, 'scratch'
    found = {}
    for name, (key, opened, how) in asked.items():
        recipe, draws = PROTOCOLS['quick'][how], range(1 if labels == 'all' else 3)
        outputs = [[predict(t, run[key], Arm(name, [], how, recipe), labels, seed, draw)
                    for draw in draws] for seed, run in enumerate(opened)]
        found[name] = t.score(outputs)[0]['AUROC']
    found[f'{arm} @gain'] = minus(found[arm], found[f'{arm} @untrained'])
    if mode == 'finetune':
        found[f'{arm} @less-scratch'] = minus(found[arm], found[f'{arm} @scratch'])
    return t.available if labels == 'all' else labels, found


def judge(claim, scores):
    """A row: the comparison that decides a claim, the true value of it that would have been found
    (for "close": refuted) four times in five, and the verdict: agrees, disagrees or can't tell.
    The m comparisons of a claim have level 1 - .05 / m each. "better" and "gain" need every
    difference to be positive. One that is negative, or equal to 0 within MARGIN (level 1 - .1 / m),
    refutes them. "close" needs every difference to be equal within MARGIN (level 90 %). One that is
    surely larger refutes it. With under three seeds the verdict is can't tell. scores: {name:
    Estimate}."""
    def mean(name):
        parts = [scores[arm + ' @gain' * (claim.kind == 'gain')] for arm in name.split('+')]
        return Estimate(*(np.mean(values, 0) for values in zip(*parts)))

    rows, others = [], claim.others.split('/')
    for other in others:
        e = minus(mean(claim.first), mean(other))
        difference, low, high = interval(e, 1 - .05 / len(others))
        equality = .9 if claim.kind == 'close' else 1 - .1 / len(others)    # any one refutes
        (_, low90, high90), (_, low60, high60) = interval(e, equality), interval(e, .6)
        bound, word = MARGIN if claim.kind == 'close' else 0., "can't tell"
        if len(e.points) > 2 and max(-low90, high90) < MARGIN:
            word = 'equal'
        elif len(e.points) > 2 and (low > bound or high < -bound):
            word = 'better' if difference > 0 else 'worse'
        rows.append(dict(other=other, difference=difference, low=low, high=high, word=word,
                         # half widths at this level and at 60 % (t of .8): power of 80 %
                         detectable=bound + (high - low + high60 - low60) / 2))
    words = {row['word'] for row in rows}
    wanted, against = ('equal', 'better') if claim.kind == 'close' else ('better', 'equal')
    verdict, reasons = "can't tell", {"can't tell"}
    if words == {wanted}:
        verdict, reasons = 'agrees', {wanted}
    elif words & {'worse', against}:
        verdict, reasons = 'disagrees', {'worse', against}
    decides = max((row for row in rows if row.pop('word') in reasons), key=lambda row: abs(
        row['difference']) if claim.kind == 'close' else -row['difference'])
    says = dict(better='is better than', gain='gains more than', close='is close to')[claim.kind]
    text = f'{claim.first} {says} {claim.others}'.replace('+', ' + ').replace('/', ', ')
    return dict(claim=text) | decides | dict(verdict=verdict)


def share_of_gain(early, final):
    """(share, low, high) of a final gain that is there early: the shares s from -1 to 2 for which
    early - s final may be 0 (Fieller); infinite where that holds at -1 or 2. Both are Estimates."""
    shares, inside = np.linspace(-1, 2, 301), []
    for s in shares:
        scaled = Estimate(s * final.points, s * final.boot)
        _, low, high = interval(minus(early, scaled))
        if low <= 0 <= high:
            inside.append(s)
    low, high = min(inside, default=math.nan), max(inside, default=math.nan)
    share = early.points.mean() / final.points.mean()
    return share, -math.inf if low == shares[0] else low, math.inf if high == shares[-1] else high


def order_kept(early, late, resamples=1000):
    """(tau, low, high): Kendall's tau between the orders of arms at two steps, by resamples of
    patients and of seeds. early, late: Estimates of the same arms."""
    rng, found = np.random.default_rng(0), []
    for r in range(resamples):
        seeds = rng.integers(len(early[0].points), size=len(early[0].points))
        # the mean by a resample of patients, moved by that of seeds; both are the same for all arms
        values = [[e.boot[r % len(e.boot)] + e.points[seeds].mean() - e.points.mean() for e in of]
                  for of in (early, late)]
        found.append(scipy.stats.kendalltau(*values).statistic)
    means = [[e.points.mean() for e in of] for of in (early, late)]
    return scipy.stats.kendalltau(*means).statistic, *np.nanquantile(found, [.025, .975])


def questions(scores, runs):
    """Rows: three questions that kept steps answer, for one look. scores: {name: Estimate}."""
    rows, kept = [], next(iter(runs.values()))[0][1].keep
    arms = [arm for arm in runs if arm.endswith(' s4')]
    for arm, made in runs.items():
        if 20 in kept:
            early = minus(scores[f'{arm} @20'], scores[f'{arm} @untrained'])
            share = share_of_gain(early, scores[f'{arm} @gain'])
            rows.append(dict(question='share of the gain after 20 steps', arm=arm)
                        | dict(zip(INTERVAL, share)))
        together, names = [], {k: f'{arm} @{k}' for k in kept if k} | {made[0][1].steps: arm}
        for i, (folder, _) in enumerate(made):
            log = pd.read_csv(folder / 'log.csv').set_index('step').loss
            loss = [log[log.index <= step].iloc[-1] for step in names]
            area = [scores[key].points[i].mean() for key in names.values()]
            together.append(scipy.stats.spearmanr(loss, area).statistic)
        if len(names) > 2:
            rows.append(dict(question='Spearman of training loss and AUROC along a run: mean, '
                             'smallest and largest of the seeds', arm=arm, value=np.mean(together),
                             low=min(together), high=max(together)))
    if 200 in kept and len(arms) > 2:
        tau = order_kept([scores[f'{arm} @200'] for arm in arms], [scores[arm] for arm in arms])
        rows.append(dict(question="Kendall's tau of the objectives, 200 steps and the end",
                         arm='s4') | dict(zip(INTERVAL, tau)))
    return rows


def pretrained(folder, t):
    """Pretrain a run. Returns nothing: a worker would send back all weights."""
    pretrain(folder, t)


def make(name, a):
    """Pretrain and evaluate a part of the study; goes on where it was stopped."""
    runs, looks = runs_of(name, a), LOOKS[LOOKS.part == name]
    print(f'{name}: {STUDY.question[name]} {len(runs)} arms', flush=True)
    pretraining = {made[0][1].data for made in runs.values()}
    for data in sorted({*looks.data, *','.join(pretraining).split(',')}):
        if data in PREPARE and not Path('datasets', data).exists():
            raise Stop(f'{name} needs datasets/{data}: {PREPARE[data]}')
        Dataset(data)                                   # made before several processes ask for it
    run_all({str(folder): (pretrained, folder, t) for made in runs.values()
             for folder, t in made if (begun(folder, t) or {}).get('step') != t.steps},
            a.jobs, f'{name}: pretraining')
    work = {(arm, *at): (look, arm, made, *at[:2], label_count(at[2]))
            for arm, made in runs.items() for _, _, *at in looks.itertuples()}
    found = run_all(work, a.jobs, f'{name}: evaluation')
    tabulate(name, found, runs, Path(a.out))


def tabulate(name, found, runs, out):
    """Write a part's tables of scores, claims and questions. found: {(arm, data, mode, labels):
    what `look` gives}."""
    rows, claims, asked = [], [], []
    for _, _, *at in LOOKS[LOOKS.part == name].itertuples():
        scores, here = {}, dict(zip(('data', 'mode', 'labels'), at))
        for arm in runs:
            here['labelled'], its = found[arm, *at]
            scores |= its
        for key, e in scores.items():
            arm, _, what = key.partition(' @')
            last = 0 if what in ('untrained', 'scratch') else runs[arm][0][1].steps
            step = int(what) if what.isdigit() else last
            rows.append(here | dict(arm=arm, what=what, step=step, seeds=len(e.points))
                        | dict(zip(INTERVAL, interval(e)), sd=e.points.mean(1).std(ddof=1)))
        for claim in CLAIMS[CLAIMS.part == name].itertuples():
            if {*re.split(r'[+/]', f'{claim.first}/{claim.others}')} <= {*scores}:    # steps kept
                claims.append(here | judge(claim, scores))
        asked += [here | row for row in questions(scores, runs)]
    write_csv(out / f'study_{name}_scores.csv', rows)
    for table, its in (('claims', claims), ('questions', asked)):
        if its:                                         # a short run keeps no step to ask about
            write_csv(out / f'study_{name}_{table}.csv', its)


def draw(name, out):
    """Draw a part's figures from study_NAME_scores.csv. `curves`: macro AUROC against pretraining
    steps. `data`: against labelled records. Other parts: each arm's gain."""
    table = pd.read_csv(out / f'study_{name}_scores.csv', dtype=dict(what=str)).fillna({'what': ''})
    # second: the backbone in `curves`, the pretraining data in `data`
    table[['objective', 'second']] = table.arm.str.partition(' ')[[0, 2]]
    if name == 'curves':
        steps = table[(table.what == '') | table.what.str.isdigit()]
        on_s4 = steps[steps.second == 's4']
        draw_lines(out / 'study_curves.png', on_s4, 'step', 'data', ['objective'])
        both = steps[steps.objective.isin(['cpc', 'jepa'])]
        draw_lines(out / 'study_backbones.png', both, 'step', 'data', ['objective', 'second'])
    elif name == 'data':
        linear = (table['mode'] == 'linear') & table.what.isin(['', 'untrained'])
        shown = table[linear | (table.what == 'scratch')]
        shown = shown[(shown.what == '') | (shown.second == 'real')]    # baselines of one pool
        draw_lines(out / 'study_data.png', shown, 'labelled', 'objective', ['second', 'what'])
    else:
        gains = table[table.what == 'gain']
        gains = gains.assign(name=place(gains) + ', ' + gains.arm.map(spell))
        forest(out / f'study_{name}.png', gains.to_dict('records'), 'gain in macro AUROC')


def draw_lines(path, table, x, panel, names):
    """A panel for each value of the column `panel`: macro AUROC against the column x, a line for
    each combination of the columns `names`, with a band of one SD over seeds on both sides."""
    panels, ticks = table.groupby(panel, sort=False), sorted(table[x].unique())
    fig, [axes] = figure(5 * len(panels), 4, len(panels))
    for ax, (title, here) in zip(axes, panels):
        for key, mine in here.sort_values(x, kind='stable').groupby(names, sort=False):
            ax.plot(mine[x], mine.value, 'o-', ms=3, label=spell(' '.join(key)).strip())
            ax.fill_between(mine[x], mine.value - mine.sd, mine.value + mine.sd, alpha=.15)
        ax.set_xscale('symlog', linthresh=10)
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        ax.set(title=title, xlabel=dict(step='pretraining steps', labelled='labels')[x],
               ylabel='macro AUROC')
    ax.legend(loc='center left', bbox_to_anchor=(1, .5))            # the same lines in all panels
    fig.savefig(path, dpi=120)


def claims(out):
    """Print the verdicts of all parts whose tables are in a folder, and draw their figures."""
    files = sorted(out.glob('study_*_claims.csv'))
    if not files:
        raise Stop(f'no study_*_claims.csv in {out}: make them with python -m tests.study')
    table = pd.concat(map(pd.read_csv, files))
    table['name'] = table.claim + '; ' + place(table)
    print_table(table, 'name', 'other', 'difference', 'low', 'high', 'detectable', 'verdict')
    rows = []
    for row in table.assign(value=table.difference, place=place(table)).to_dict('records'):
        first, gains, _ = re.split(' (is|gains) ', row['claim'], maxsplit=1)
        name = f'{first} less {row["other"]}{", gain" * (gains == "gains")}; {row["place"]}'
        colour = {'agrees': 'C2', 'disagrees': 'C3'}.get(row['verdict'], 'C7')
        rows.append(row | dict(name=spell(name), colour=colour))
    forest(out / 'study_claims.png', rows, 'difference in macro AUROC\n'
           'green: agrees, red: disagrees')
    for name in STUDY.index:
        if (out / f'study_{name}_scores.csv').exists():
            draw(name, out)
    print(f'figures are in {out}/')


def main(argv=None):
    """The command line: see the top of the file."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add('part', nargs='*', help=f'{", ".join(STUDY.index)} (default: all), or claims')
    add('--seeds', type=train.count, help="number of seeds (default: the part's)")
    add('--steps', type=train.count, help="pretraining steps (default: the part's)")
    add('--jobs', type=train.count, help='processes (default: one per thread, 1 on a GPU)')
    add('--device', help='cpu or cuda (default: cuda where there is one)')
    add('--out', default='out/study')
    a = p.parse_args(argv)
    if unknown := {*a.part} - {*STUDY.index, 'claims'}:
        raise Stop(f'no part {unknown.pop()}: take some of {", ".join(STUDY.index)}, or claims')
    share_threads(a)
    for name in a.part or STUDY.index:
        if name != 'claims':
            make(name, a)
    claims(Path(a.out))


if __name__ == '__main__':
    run_script(main)
