"""Sweeps and the study: which runs are made, what is held out, going on, verdicts."""
import shlex
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm

import data
import scaling
import train
from data import Dataset, Stop, read_seen
from evaluate import MODES, Estimate, add_rows, label_count
from models import Encoder, config_of, load
from scaling import read_rows
from . import study

TINY = '--size 4x12 --seeds 0 --steps 8 --batch 4 --lr 1e-2 --jobs 1 --ood sample:super'


def arguments(flags):
    return scaling.parse(['sweep', *flags.split()])


def serial(work, jobs, name):
    """run_all in this process, where patches hold."""
    return {key: function(*arguments) for key, (function, *arguments) in work.items()}


def killed(function, calls):
    """The function, whose second call is interrupted. Arguments are added to `calls`."""
    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return function(*arguments)
    return interrupted


# -------------------------------------------------------------------------------------------------
# which runs

def test_nested_subsets(here):
    ds = Dataset('synthetic')
    rows = ds.split()[0]
    sets = [ds.nested(rows, n, 3) for n in (10, 11, 100, len(rows))]
    assert [len(s) for s in sets] == [10, 11, 100, len(rows)]
    assert all({*small} < {*large} for small, large in pairwise(sets))
    cut = {*ds.patient[sets[2]]} & {*ds.patient[np.setdiff1d(rows, sets[2])]}
    assert len(cut) < 2 and {*ds.nested(rows, 100, 4)} != {*sets[2]}
    with pytest.raises(Stop, match='take 1 to'):
        ds.nested(rows, len(rows) + 1, 0)


def test_all_records_are_those_that_last_the_window(here, monkeypatch, tmp_path):
    """Half of them last 2.5 s: CPC takes these too, CMSC needs 10 s. None is of the test fold."""
    ds = Dataset('synthetic')
    rows, *held = ds.split()
    ds.length[rows[::2]] = 600
    for module in (scaling, train):
        monkeypatch.setattr(module, 'Dataset', lambda *_: ds)
    a = arguments(f'data {TINY} --ood --records all --objective cpc cmsc --out {tmp_path}')
    runs, long = scaling.plan(a, ds, {}), rows[1::2]
    for planned in (runs, scaling.plan(a, ds)):                   # and the pilots
        assert {t.records for t, *_ in planned.values()} == {len(rows), len(long)}
    name, run = list(runs.items())[1]
    assert [row['D'] for row in scaling.sweep_run(name, *run, a)] == [len(long)]
    seen = read_seen(tmp_path / 'runs' / name)
    assert seen == ds.names(long) and not seen & ds.names(np.concatenate(held))
    a.records = [len(long) + 1]
    with pytest.raises(Stop, match=f'{len(long)} training records of 10 s, as cmsc needs'):
        scaling.plan(a, ds, {})


def test_the_grid_has_both_axes_and_replicates_ends_and_middles():
    sizes, records = 'abcde', [1, 2, 3, 4, 5]
    params, few, joint = (scaling.grid(k, sizes, records) for k in ('params', 'data', 'joint'))
    assert {p[:2] for p in params + few} == {*product(sizes, [5]), *product('c', records)}
    assert len(joint) == 15 and {*joint} > {*params, *few}
    assert {p[:2] for p in joint} > {('b', 2), ('d', 4)}
    assert {p[:2] for p in joint if p[2]} == {*product('ace', [1, 3, 5])}


def test_families_objectives_and_sizes_that_there_are():
    """Only supervised is swept over labels."""
    def pairs(flags):
        return scaling.pairs(arguments(flags))

    assert pairs('joint --family net1d --objective cpc --size tiny') == [('net1d', 'cpc', ['tiny'])]
    assert pairs('labels --size 4x12') == [('s4', 'supervised', ['4x12'])]
    with pytest.raises(Stop, match='net1d has no ladder of sizes: name some with --size, of tiny'):
        pairs('joint --family s4 net1d --objective cpc')
    with pytest.raises(Stop, match='none of cpc runs on any of s4 in sweep labels'):
        pairs('labels --objective cpc')


def test_ladder_and_patience():
    def cpc(*values):
        return [dict(objective='cpc', step=i, id_val=v) for i, v in enumerate(values)]

    assert scaling.evaluation_steps(400) == [50, 71, 100, 141, 200, 283, 400]
    assert scaling.evaluation_steps(30) == [30]
    assert not scaling.finished(cpc(3, 2, 2.5), 9, 2)
    assert scaling.finished(cpc(3, 2, 2.5, 2.1), 9, 2) and scaling.finished(cpc(3, 2), 1, 2)
    jepa = dict(objective='jepa', id_val=1, ood_a_val=2, ood_b_val=4, ood_a_test=9)
    assert scaling.watched(jepa) == 3                             # its targets move


def test_labels_are_nested_and_anchored(here):
    """Anchors are the most frequent labels, or the rarest that have ten positives."""
    ds = Dataset('synthetic')
    y = ds.labels[ds.split()[0]]
    count = dict(zip(ds.label_names, (y == 1).sum(0)))
    sets = scaling.label_sets(arguments('labels --seeds 0 1'), ds)
    for arm, seed in product(('dominant', 'tail'), (0, 1)):
        _, anchors, names, _ = zip(*[s for s in sets if s[0] == arm and s[3] == seed])
        assert all({*small} < {*large} for small, large in pairwise(names))
        assert all({*mine} == {*names[0]} for mine in anchors)
        low = [count[n] for n in names[0]]
        high = [count[n] for n in names[-1] if n not in names[0]]
        if arm == 'dominant':
            low, high = high, low
        assert max(low) <= min(high) and min(low) >= (10 if arm == 'tail' else 1)


# -------------------------------------------------------------------------------------------------
# what is held out

def test_losses_on_anchors_only(here):
    """Held-out losses are taken over the anchors, whatever else is learned."""
    ds = Dataset('synthetic')
    *_, (t, _, anchors) = scaling.plan(arguments(f'labels {TINY} --records 40'), ds, {}).values()
    learned, columns = ds.columns(t.task), [ds.label_names.index(name) for name in anchors]
    objective, rows = train.build(t, 240, learned), ds.split()[1]
    row = scaling.describe(objective, t, ds, anchors, (), 1)
    batch = ds.collate(rows, np.zeros(len(rows), int), 600)
    with torch.no_grad():
        z = objective.head(*objective.encoder(batch))[:, [learned.index(c) for c in columns]]
    expected = F.binary_cross_entropy_with_logits(z, batch['y'][:, columns])
    assert row['labels'] == len(learned) > len(anchors)
    assert row['id_val'] == pytest.approx(expected.item(), rel=1e-5)


def test_no_patient_of_the_pretraining_is_probed_on(here, monkeypatch):
    """Patients are known by any of their records, and one has records in training and test folds.
    Logits of 0 have the loss ln 2, AUROC .5."""
    ds, asked = Dataset('sample'), []

    def probe(encoder, ds, columns, parts, by_loss):
        asked.extend(parts)
        return [np.zeros((len(part), len(columns))) for part in parts[1:]]

    monkeypatch.setattr(scaling, 'quick_probe', probe)
    monkeypatch.setattr(scaling, 'Dataset', lambda _: ds)
    encoder, folds = Encoder(config_of('s4', '4x12')), np.unique(ds.fold)
    ds.patient[ds.fold == folds[0]] = ds.patient[ds.fold == folds[-1]][-1]
    seen = np.flatnonzero(np.isin(ds.fold, folds[-4:]))[::2]
    found = scaling.out_of_distribution(encoder, 'sample:super', {*ds.recording[seen]})
    assert list(found.values()) == pytest.approx([np.log(2), np.log(2), .5])
    for rows, part in zip(asked, (folds[:-4], folds[-4:-3], folds[-3:])):
        assert len(rows) > 10 and np.isin(ds.fold[rows], part).all()
    learned, val, test = ({*ds.patient[rows]} for rows in asked)
    assert not (val | test) & {*ds.patient[seen]} and not learned & test
    with pytest.raises(Stop, match='without patients seen'):
        scaling.out_of_distribution(encoder, 'sample:super', {*ds.patient})


# -------------------------------------------------------------------------------------------------
# making the runs

@pytest.mark.parametrize('function', ['describe', 'write_csv'])
def test_a_killed_run_goes_on_without_a_lost_or_doubled_row(here, monkeypatch, tmp_path, function):
    """Killed when a checkpoint is on disk and its row is not; compared with one never killed."""
    monkeypatch.setattr(scaling, 'evaluation_steps', lambda steps: [2, 4, 8])
    kept = []
    for out in ('broken', 'whole'):
        flags = f'data {TINY} --batch 20 --ood --records 40 --objective cpc --out {tmp_path / out}'
        a = arguments(flags)
        (name, run), = scaling.plan(a, Dataset('synthetic'), {}).items()
        file = tmp_path / out / 'runs' / name / 'rows.csv'
        if out == 'broken':
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(scaling, function, killed(getattr(scaling, function), []))
                scaling.sweep_run(name, *run, a)
        scaling.sweep_run(name, *run, a)
        kept.append(read_rows(file))
    assert kept[0] == kept[1] and [row['step'] for row in kept[1]] == ['2', '4', '8']


def test_a_sweep_end_to_end(here, monkeypatch, tmp_path):
    """Two workers. Rates are chosen by validation. Done again nothing changes, and a second kind
    shares its runs. Fine-tuning starts from the best weights, and scratch from the initial ones."""
    flags = ('--size 4x12 --records 20 40 --seeds 0 --steps 6 --lr-steps 2 --batch 20 '
             f'--jobs 2 --ood sample:super --objective cpc --out {tmp_path}').split()
    real, calls = scaling.run_all, []
    monkeypatch.setattr(scaling, 'run_all', lambda *given: (
        calls.append(1) or real if not calls else serial)(*given))     # pilots in workers
    scaling.main(['sweep', 'params', *flags])
    rows, pilots = (read_rows(tmp_path / name) for name in ('runs.csv', 'rate_runs.csv'))
    assert [(r['size'], r['D']) for r in rows] == [('4x12', '40')]
    for row in rows:
        mine = [p for p in pilots if p['size'] == row['size']]
        assert len(mine) == 3 and row['lr'] == min(mine, key=lambda p: float(p['id_val']))['lr']
    monkeypatch.setattr(scaling, 'run_all', serial)
    for kind, count in (('params', 1), ('data', 2)):
        made = {f: f.read_bytes() for f in tmp_path.rglob('*.pt')}
        scaling.main(['sweep', kind, *flags])
        after, began = read_rows(tmp_path / 'runs.csv'), []
        assert len(after) == count and [r for r in after if r['D'] == '40'] == rows
        assert all(f.read_bytes() == weights for f, weights in made.items())

    def predict(t, encoder, arm, count, seed):
        began.append(encoder.state_dict())
        return np.full((len(t.test), len(t.labels)), .5), None

    monkeypatch.setattr(scaling, 'predict', predict)
    scaling.main(['sweep', 'finetune', *flags])
    tuned = read_rows(tmp_path / 'finetune.csv')
    assert [(r['run'], r['mode'], r['D_F']) for r in tuned] == [*product(
        [r['run'] for r in rows], ('finetune', 'scratch'), ('20', '40'))]
    for row, weights in zip(tuned, began):
        best = load(tmp_path / 'runs' / row['run'] / 'best')
        start = best['encoder' if row['mode'] == 'finetune' else 'initial']
        assert all(torch.equal(weights[k], start[k]) for k in start)
        assert float(row['loss']) == pytest.approx(np.log(2))


def test_an_estimate_trains_nothing(here, monkeypatch, tmp_path, capsys):
    """A step is timed after threads are shared out, since each of the processes has so many."""
    shared = []
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    monkeypatch.setattr(torch, 'set_num_threads', shared.append)
    monkeypatch.setattr(scaling, 'step_cost', lambda *_: (60. * sum(shared), 1.))
    flags = f'{TINY} --ood --records 40 --objective cpc --jobs 2 --estimate --out {tmp_path}'
    scaling.main(['sweep', 'params', *flags.split()])
    held = sum(map(len, Dataset('synthetic').split()[1:]))
    minutes = 8 + (512 + held) / 4 / 3                            # two of 1 minute at a time
    assert f'at most {minutes:.0f} minutes with 2 at a time' in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


def test_one_that_stops_in_a_worker_does_not_stop_the_others(tmp_path):
    work = {'bad': (Dataset, 'nothere'), 'fine': (scaling.write_csv, tmp_path / 'a', [dict(b=1)])}
    with pytest.raises(Stop, match='^1 of 2 jobs stopped; the first: bad: no dataset'):
        scaling.run_all(work, 1, '')
    assert read_rows(tmp_path / 'a') == [dict(b='1')]


@pytest.mark.parametrize('flags, words', [
    ('--family resnet --size 3x24 --objective cpc', 'none of cpc runs on any of resnet'),
    ('--records 9999999', 'must be at most 479'), ('--ood nothere:super', "no dataset 'nothere'"),
    ('--ood sample:nothere', "no task 'nothere'"), ('--size 4x12 huge', 'no size huge'),
    ('--objective jepa --ood', 'give --ood a dataset')])
def test_bad_flags_are_one_line(here, tmp_path, monkeypatch, flags, words):
    """Before anything is trained."""
    monkeypatch.setattr(scaling, 'run_all', None)
    with pytest.raises(SystemExit) as stop:
        scaling.main(f'sweep params {TINY} --records 20 --out {tmp_path} {flags}'.split())
    line = str(stop.value)
    assert words in line and '\n' not in line and not [*tmp_path.iterdir()]


# -------------------------------------------------------------------------------------------------
# the study

def test_every_row_of_the_tables_parses():
    a, names = SimpleNamespace(steps=None, seeds=None, device='cpu', out=''), {}
    for part in study.STUDY.index:
        names[part], looks = set(), study.LOOKS[study.LOOKS.part == part]
        datasets = {*looks.data}
        for arm, ((_, t), *others) in study.runs_of(part, a).items():
            names[part] |= {arm, *(f'{arm} @{step}' for step in t.keep)}
            datasets |= {*t.data.split(',')}
            assert len(others) > 1
        assert {*looks['mode']} <= {*MODES} and [*map(label_count, looks.labels)]
        assert datasets <= {*study.PREPARE, *data.DEFAULTS}
    for claim in study.CLAIMS.itertuples():
        asked = f'{claim.first}/{claim.others}'.replace('+', '/').split('/')
        assert {*asked} <= names[claim.part] and claim.kind in ('better', 'gain', 'close')
    for name, command in study.PREPARE.items():
        assert data.make_parser().parse_args(shlex.split(command)[2:]).out == name


TABLES = dict(STUDY="""
part   seeds  steps  kept  question
toy    3      4      0 2   Is it made?
""", ARMS="""
part  arm     flags of train.py
toy   cpc     --objective cpc --size 4x12 --layers 1 --batch 4
toy   jepa    --objective jepa --size 4x12 --layers 1 --batch 4
""", LOOKS="""
part  data    mode    labels
toy   sample  linear  all
""", CLAIMS="""
part  kind    first  others
toy   better  jepa   cpc
toy   close   cpc    cpc @2/jepa
""")


def test_a_part_that_was_broken_goes_on(here, monkeypatch):
    for name, text in TABLES.items():
        monkeypatch.setattr(study, name, study.read_table(text))
    monkeypatch.setattr(study, 'STUDY', study.STUDY.set_index('part'))
    monkeypatch.setitem(study.FOLDS, 'sample', (range(1, 8), (8,), (9, 10)))
    monkeypatch.setattr(study, 'run_all', serial)
    made, tables = [], []
    monkeypatch.setattr(study, 'pretrain', killed(study.pretrain, made))
    with pytest.raises(KeyboardInterrupt):
        study.main(['toy', '--out', 'st'])
    for _ in range(2):
        study.main(['toy', '--out', 'st'])
        tables.append({f.name: f.read_text() for f in Path('st').glob('*.csv')})
    assert tables[0] == tables[1] and len(made) == 7            # of 6 runs, one twice
    assert {f.name for f in Path('st').glob('*.png')} == {'study_toy.png', 'study_claims.png'}
    scores = {(r['arm'], r['what']): float(r['value'])
              for r in read_rows(Path('st/study_toy_scores.csv'))}
    assert {*scores} == {*product(('cpc', 'jepa'), ('', 'untrained', '0', '2', 'gain'))}
    for arm in ('cpc', 'jepa'):
        assert scores[arm, '0'] == scores[arm, 'untrained']
        assert scores[arm, 'gain'] == pytest.approx(scores[arm, ''] - scores[arm, '0'])
    assert [row['claim'] for row in read_rows(Path('st/study_toy_claims.csv'))] == [
        'jepa is better than cpc', 'cpc is close to cpc @2, jepa']
    with pytest.raises(Stop, match='begun with steps = 4'):
        study.main(['toy', '--out', 'st', '--steps', '3'])


def test_figures_against_steps_and_labels(tmp_path):
    point = dict(data='real', value=.7, low=.6, high=.8, sd=.1)
    for part, mode, arm, what, step in (('curves', 'linear', 's4', '0', 0),
                                        ('curves', 'linear', 's4', '', 9),
                                        ('data', 'linear', 'real', '', 9),
                                        ('data', 'finetune', 'real', 'scratch', 0)):
        rows = [point | dict(mode=mode, arm=f'{objective} {arm}', what=what, step=step, labelled=n)
                for objective in ('cpc', 'jepa') for n in (100, 300)]
        add_rows(tmp_path / f'study_{part}_scores.csv', rows, ['arm', 'what', 'step', 'labelled'])
    for part in ('curves', 'data'):
        study.draw(part, tmp_path)
    assert {f.name for f in tmp_path.glob('*.png')} == {
        'study_curves.png', 'study_backbones.png', 'study_data.png'}


def test_a_test_patient_that_was_pretrained_on_stops_it(here):
    a = SimpleNamespace(steps=1, seeds=1, device='cpu', out='leak')
    (folder, t), *_ = study.runs_of('curves', a)['cpc s4']
    t.data = 'sample'
    study.pretrain(folder, t)
    with pytest.raises(Stop, match='cpc: .* of sample are of patients pretrained on'):
        study.look('cpc', [(folder, t)], 'sample', 'linear', 'all')


def estimate(mean, spread=0.):
    """An Estimate whose bootstrap has the SD `spread`, and whose seeds agree."""
    z = norm.ppf((np.arange(1000) + .5) / 1000)
    return Estimate(np.full((5, 1), mean), mean + spread * z / z.std())


@pytest.mark.parametrize('kind, others, verdict', [
    ('better', (.1, .2), 'agrees'), ('better', (.1, .9), 'disagrees'),
    ('better', (.1, .699), 'disagrees'), ('better', (.1, (.6, .1)), "can't tell"),
    ('better', ((.6, .1), .9), 'disagrees'), ('close', (.701, .698), 'agrees'),
    ('close', (.701, .6), 'disagrees'), ('close', (.701, (.7, .1)), "can't tell"),
    ('close', (.701, (.688, .003)), "can't tell"), ('gain', (.1, .2), 'disagrees')])
def test_verdicts(kind, others, verdict):
    """The claim is about .7; others are given as their mean, or mean and SD. By gain a, untrained
    .6, is behind."""
    means = dict(a=.7) | dict(zip('bc', others))
    scores = {k: estimate(*v) if isinstance(v, tuple) else estimate(v) for k, v in means.items()}
    scores |= {f'{k} @gain': estimate(.1 if k == 'a' else .3) for k in 'abc'}
    claim = SimpleNamespace(kind=kind, first='a', others='b/c')
    assert study.judge(claim, scores)['verdict'] == verdict
    few = {k: Estimate(e.points[:2], e.boot) for k, e in scores.items()}
    assert study.judge(claim, few)['verdict'] == "can't tell"


def test_what_decides_and_what_would_be_found():
    """Of m comparisons 80 % power at level .05 / m: (z_{1 - .025 / m} + z_.8) standard errors,
    beyond the margin where arms are said to be close. An average of two arms is compared."""
    scores = dict(a=estimate(.8, .02), b=estimate(.6, .02), c=estimate(.65), d=estimate(.5))
    claim = SimpleNamespace(kind='better', first='a+b', others='c/d')
    row, z = study.judge(claim, scores), norm.ppf([1 - .025 / 2, .8])
    assert row['other'] == 'c' and row['difference'] == pytest.approx(.05)
    assert row['detectable'] == pytest.approx(z.sum() * .02)
    claim = SimpleNamespace(kind='close', first='a', others='c')
    row, z = study.judge(claim, scores), norm.ppf([.975, .8])
    assert row['detectable'] == pytest.approx(.01 + z.sum() * .02)


def test_share_of_gain():
    """Where the final gain has no error, that of the share is the early gain's over it."""
    share, low, high = study.share_of_gain(estimate(.06, .003), estimate(.1))
    half = norm.ppf(.975) * .03
    assert share == pytest.approx(.6)
    assert (low, high) == pytest.approx((.6 - half, .6 + half), abs=.011)


def test_order_kept():
    """1 for equal orders, -1 for opposite ones. One pair of three that is exchanged: 1/3."""
    for late, tau in (((.6, .7, .8), 1), ((.8, .7, .6), -1), ((.7, .6, .8), 1 / 3)):
        found = study.order_kept([estimate(m, .01) for m in (.1, .2, .3)], [*map(estimate, late)])
        assert found == pytest.approx([tau] * 3)
