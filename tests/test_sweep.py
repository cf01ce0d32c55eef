"""Sweeps: what is counted, which runs are made, resuming, what is held out."""
import argparse
import csv
import itertools
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm

import scaling
import train
from data import Dataset, Stop
from evaluate import Score, compare
from models import SIZES, Encoder, config_of, net1d
from scaling import flops
from objectives import OBJECTIVES


def arguments(*flags):
    p = argparse.ArgumentParser()
    scaling.sweep_flags(p)
    a = p.parse_args([str(f) for f in flags])
    a.jobs = 1
    return a


def test_torchs_counter_counts_what_we_take_it_to():
    """Two FLOPs a product, in place too, attention included; no norms, no FFTs."""
    a, b = torch.zeros(3, 4, 5), torch.zeros(3, 5, 6)
    assert flops(lambda: torch.zeros(3, 4, 6).baddbmm_(a, b)) == flops(lambda: a @ b) == 2 * 3 * 4 * 5 * 6
    assert flops(lambda: torch.nn.Conv1d(12, 32, 17, 2, 8)(torch.zeros(1, 12, 1000))) == 2 * 32 * 500 * 12 * 17 == 6_528_000
    q = torch.zeros(1, 12, 64, 64)
    assert flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 12 * 64 * 64 * 64 == 12_582_912
    assert flops(lambda: torch.nn.BatchNorm1d(8)(torch.zeros(4, 8, 5))) == flops(lambda: torch.fft.rfft(torch.zeros(8, 64))) == 0


def macs(c, T, beats=13):
    """Multiply-accumulates of one forward pass through an encoder of Config c, in closed form: (for each crop of T samples, once for a whole
    batch), the latter the kernels of S4. beats: R-peaks in the crop, where they are the tokens. Norms, activations and biases are left out.
    S4's long convolution takes FFTs of 2L, at 5/2 n log2 n real FLOPs each."""
    D, L, ways, N = c.dim, -(-T // 2), 1 if c.causal else 2, c.state
    attention = lambda L, wide: c.layers * (4 * L * D * wide + 2 * L * L * wide + 2 * L * D * c.ffn)
    stem = L * (3 * c.leads * D + 3 * D * D)
    if c.backbone in ('s4', 's4d'):
        transform = D * 5 / 2 * 2 * L * math.log2(2 * L) / 2
        long, once = 2 * transform, ways * D * (N if c.backbone == 's4' else N // 2) * L + transform
        return stem + c.layers * (long + 2 * L * D * D), c.layers * once
    if c.backbone == 'transformer':
        return stem + attention(L, D), 0
    if c.backbone == 'net1d':
        total = stem + L * 16 * D * (D // 8)
        for b in net1d(D, c.layers, c.causal)[1:]:
            i, o, gate = b.conv1.in_channels, b.conv1.out_channels, L if c.causal else 1
            total += L * (i * o + 16 * o * (o // b.conv2.groups) + o * o) + 2 * gate * o * (o // 2)
        return total, 0
    if c.backbone == 'resnet':
        widths = [round(D * i / c.layers) for i in range(1, c.layers + 1)]
        total, length = 17 * T * c.leads * widths[0], T
        for i, (a, b) in enumerate(zip(widths[:1] + widths, widths)):
            short = -(-length // (4 if 0 < i < 5 else 1))
            total += 17 * length * a * b + 17 * short * b * b + (a != b) * short * a * b
            length = short
        return total, 0
    if c.backbone == 'beat':
        return 3 * c.leads * beats * round(.96 * c.fs) * D + attention(1 + c.leads * beats, 64 * c.heads), 0
    patch = round(.05 * c.fs)
    return T // patch * c.leads * patch * D + attention(1 + T // patch, D), 0


@pytest.mark.parametrize('backbone, size, causal', [(b, s, c) for b in SIZES for s in [*list(SIZES[b])[:2], next((s for s in SIZES[b] if 'x' in s), 'tiny')]
                                                    for c in ((True, False) if b in ('s4', 's4d', 'transformer', 'net1d') else (False,))])
def test_analytic_macs_are_torchs(backbone, size, causal):
    e, (B, T) = Encoder(config_of(backbone, size, causal)).eval(), (3, 1210 if backbone in ('resnet', 'beat', 'vit') else 610)
    batch = dict(x=torch.zeros(B, 12, T), peaks=torch.arange(100, 1100, 200).repeat(B, 1))
    crop, once = macs(e.config, T, beats=5)
    with torch.no_grad():
        e(batch)                                                 # S4's dynamics are made once, for all batches to come
        assert flops(lambda: e(batch), fft=True) == pytest.approx(2 * (B * crop + once), rel=1e-6)            # an FFT's count is rounded


def test_the_fft_of_s4_is_counted():
    """Per channel one real FFT of 2L there and one back, and one of the kernel for the whole batch."""
    crop, once = macs(config_of('s4', 'tiny', True), 600)
    linear, transform = 300 * (3 * 12 * 64 + 3 * 64 * 64 + 4 * 2 * 64 * 64), 4 * 64 * 2.5 * 600 * np.log2(600) / 2
    assert crop == pytest.approx(linear + 2 * transform) and once == pytest.approx(4 * 64 * 8 * 300 + transform)
    assert flops(lambda: torch.fft.irfft(torch.fft.rfft(torch.zeros(5, 64))), fft=True) == 2 * 5 * 2.5 * 64 * 6


@pytest.mark.parametrize('objective', ['cpc', 'jepa', 'cmsc', 'supervised'])
def test_student_and_teacher_are_counted_apart(objective):
    backbone = next(iter(OBJECTIVES[objective].rates))
    encoder = Encoder(config_of(backbone, 'tiny', OBJECTIVES[objective].causal))
    built = OBJECTIVES[objective](encoder, **(dict(columns=range(3)) if objective == 'supervised' else {})).eval()
    T = 2400 if backbone == 'resnet' else 600
    batch = dict(x=torch.randn(4, 12, T), y=torch.ones(4, 3), patient=torch.arange(4), peaks=torch.full((4, 0), -1))
    with torch.no_grad():
        built(batch)
        student, extra = scaling.counted(built, batch)
    crop, once = macs(encoder.config, T)
    assert extra == pytest.approx(crop + once / 4 if objective == 'jepa' else 0, rel=1e-6)    # an FFT's count is rounded
    head = student - crop - (once / 4 if backbone != 'resnet' else 0)
    assert 0 < head < .6 * crop                                  # jepa's is deep; CMSC's two halves cost one whole but for the padding


def test_nested_subsets(here):
    ds = Dataset('synthetic')
    rows = ds.split()[0]
    sets = [ds.nested(rows, n, 3) for n in (10, 11, 100, len(rows))]
    for small, large in itertools.pairwise(sets):
        assert set(small) <= set(large)
    assert [len(s) for s in sets] == [10, 11, 100, len(rows)] and np.array_equal(sets[-1], np.sort(rows))
    whole = [p for p in set(ds.patient[sets[2]]) if (ds.patient[rows] == p).sum() == (ds.patient[sets[2]] == p).sum()]
    assert len(whole) >= len(set(ds.patient[sets[2]])) - 1       # only the last patient may be cut
    assert set(ds.nested(rows, 100, 4)) != set(sets[2])
    for n in (0, len(rows) + 1):
        with pytest.raises(Stop, match='take 1 to'):
            ds.nested(rows, n, 0)


def test_what_is_counted_lasts_the_window(here, monkeypatch):
    """A crop of a record that is too short would begin before it."""
    ds, drawn = Dataset('synthetic'), []
    rows = ds.split()[0]
    ds.length[rows[::2]] = 100
    monkeypatch.setattr(ds, 'collate', lambda rows, starts, samples: drawn.extend(zip(rows, starts)) or dict(x=torch.zeros(1)))
    scaling.first_batch(ds, argparse.Namespace(window=2.5), len(rows) // 2, 'cpu')
    assert {r for r, _ in drawn} == set(rows[1::2]) and min(s for _, s in drawn) >= 0


def test_the_grid_has_both_axes_and_replicates_its_corners():
    sizes, records = list('abcde'), [1, 2, 3, 4, 5]
    joint = scaling.grid('joint', sizes, records)
    assert len({p[:2] for p in joint}) == len(joint) == 15
    assert {(s, 5) for s in sizes} | {('c', r) for r in records} | {('a', 1), ('b', 2), ('d', 4), ('e', 1)} <= {p[:2] for p in joint}
    assert {p[:2] for p in joint if p[2]} == {('a', 1), ('a', 5), ('e', 1), ('e', 5), ('c', 3)}
    assert {p[:2] for p in scaling.grid('params', sizes, records)} | {p[:2] for p in scaling.grid('data', sizes, records)} <= {p[:2] for p in joint}


def test_a_backbone_without_a_ladder_needs_sizes():
    with pytest.raises(Stop, match='net1d has no ladder of sizes: name some with --size, of tiny'):
        scaling.pairs(arguments('joint', '--family', 's4', 'net1d', '--objective', 'cpc'))
    assert scaling.pairs(arguments('joint', '--family', 'net1d', '--objective', 'cpc', '--size', 'tiny')) == [('net1d', 'cpc', ['tiny'])]


def test_only_supervised_is_swept_over_labels():
    assert scaling.pairs(arguments('labels', '--size', '4x12')) == [('s4', 'supervised', ['4x12'])]
    with pytest.raises(Stop, match='none of cpc runs on any of s4 with labels'):
        scaling.pairs(arguments('labels', '--objective', 'cpc'))


def test_ladder_and_patience():
    assert scaling.ladder(400) == [50, 71, 100, 141, 200, 283, 400] and scaling.ladder(30) == [30]
    rows = lambda *values: [dict(objective='cpc', step=i, id_val=v) for i, v in enumerate(values)]
    assert not scaling.finished(rows(3, 2, 2.5), 9, 2) and scaling.finished(rows(3, 2, 2.5, 2.1), 9, 2) and scaling.finished(rows(3, 2), 1, 2)
    moving = [dict(objective='jepa', step=0, id_val=1, ood_a_val=2, ood_b_val=4, ood_a_test=9)]
    assert scaling.worth(moving[0]) == 3                         # targets move, so what is watched is out of distribution


def test_entropy_is_torchs_on_known_labels():
    z, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(2, (7, 3)).double()
    known = torch.rand(7, 3) > .3
    expected = F.binary_cross_entropy_with_logits(z[known], y[known])
    assert scaling.entropy(z.numpy(), torch.where(known, y, torch.nan).numpy()) == pytest.approx(expected.item())


def test_no_patient_of_the_pretraining_is_probed_on(here, monkeypatch):
    ds, used, chosen = Dataset('sample'), [], []
    last = np.unique(ds.fold)[-4:]
    features = lambda encoder, ds, rows, *rest, **how: used.append(rows) or np.random.default_rng(0).standard_normal((len(rows), 4))
    monkeypatch.setattr(scaling, 'embed', features)
    seen = set(ds.patient[np.isin(ds.fold, last)][::2].tolist()) | {ds.id[np.isin(ds.fold, last)][1]}
    found = scaling.out_of_distribution(None, 'sample:super', 600, ds.contract, 'cpu', seen)
    held = used[0][np.isin(ds.fold[used[0]], last)]
    assert len(held) > 20 and not set(ds.patient[held]) & seen and not set(ds.id[held]) & seen
    assert set(used[0]) >= set(np.flatnonzero(~np.isin(ds.fold, last))) and found['ood_sample_super_test'] < 1       # L2 is chosen by loss
    with pytest.raises(Stop, match='without patients seen'):
        scaling.out_of_distribution(None, 'sample:super', 600, ds.contract, 'cpu', set(ds.patient.tolist()))


TINY = '--size 4x12 --seeds 0 --steps 8 --batch 4 --lr 1e-2 --ood sample:super'.split()


def killed(monkeypatch, function, after):
    """`function` of scaling raises when called for the time `after`."""
    real, calls = getattr(scaling, function), []

    def once(*args):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(scaling, function, once)


@pytest.mark.parametrize('function', ['assess', 'write_csv'])
def test_a_killed_run_goes_on_without_a_lost_or_doubled_row(here, monkeypatch, tmp_path, function):
    """Killed after the checkpoint and before the row is there, and compared with a run that was not."""
    monkeypatch.setattr(scaling, 'ladder', lambda steps: [2, 4, 8])
    results = []
    for out in ('whole', 'broken'):
        a = arguments('data', '--records', 40, *TINY, '--objective', 'cpc', '--out', tmp_path / out)
        a.records = [40]
        (name, run), = scaling.plan(a, Dataset('synthetic'), {}).items()
        if out == 'broken':
            with monkeypatch.context() as patch:
                killed(patch, function, 2)
                with pytest.raises(KeyboardInterrupt):
                    scaling.run_one(name, *run, a)
            assert len(scaling.rows_in(tmp_path / out / 'runs' / name / 'rows.csv')) == 1
        results.append([{k: v for k, v in r.items() if k != 'seconds'} for r in scaling.run_one(name, *run, a)])
    assert results[0] == results[1] and [r['step'] for r in results[0]] == ['2', '4', '8']
    assert (tmp_path / 'broken/runs' / name / 'best/ckpt.pt').is_file()
    a.batch = 5
    (name, run), = scaling.plan(a, Dataset('synthetic'), {}).items()
    with pytest.raises(Stop, match='begun with batch = 4'):
        scaling.run_one(name, *run, a)


def test_a_sweep_end_to_end(here, tmp_path):
    """Two workers, rates chosen, rows collected; done again it changes nothing, and a second kind shares its runs."""
    flags = ['--size', '4x12', '4x24', '--records', '20', '40', '--seeds', '0', '--steps', '6', '--lr-steps', '2', '--batch', '4', '--ood', 'sample:super',
             '--out', str(tmp_path), '--jobs', '2', '--objective', 'cpc', 'supervised']
    scaling.main(['sweep', 'params', *flags])
    rows = list(csv.DictReader(open(tmp_path / 'runs.csv')))
    assert {(r['objective'], r['size'], r['D']) for r in rows} == {(o, s, '40') for o in ('cpc', 'supervised') for s in ('4x12', '4x24')} and len(rows) == 4
    chosen = list(csv.DictReader(open(tmp_path / 'rate_runs.csv')))
    for r in rows:
        mine = [c for c in chosen if (c['objective'], c['size']) == (r['objective'], r['size'])]
        assert len(mine) == 3 and r['lr'] == min(mine, key=lambda c: float(c['id_val']))['lr']
        assert float(r['flops']) == pytest.approx(6 * float(r['macs']) * 4 * 6, rel=1e-6) and int(r['patients']) <= 40
    scaling.main(['sweep', 'data', *flags])
    after = list(csv.DictReader(open(tmp_path / 'runs.csv')))
    assert len(after) == len({r['run'] for r in after}) == 6 and [r for r in after if r['D'] == '40'] == rows


def test_an_estimate_is_timed_on_the_threads_of_one_process(here, monkeypatch, capsys):
    threads, seen = torch.get_num_threads(), []
    monkeypatch.setattr(scaling, 'price', lambda *args: seen.append(torch.get_num_threads()) or (1., 1.))
    torch.set_num_threads(4)
    try:
        scaling.main(['sweep', 'params', '--size', '4x12', '--records', '40', '--lr', '1e-2', '--ood', 'sample:super', '--jobs', '2', '--estimate'])
        assert seen == [2, 2] and 'core-minutes (2 at a time)' in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)


def test_labels_are_nested_and_anchored(here):
    ds = Dataset('synthetic')
    sets = scaling.label_sets(arguments('labels', '--seeds', 0, 1), ds)
    y = np.array(ds.labels)[ds.split()[0]]
    count = {n: (y[:, i] == 1).sum() for i, n in enumerate(ds.label_names)}
    for arm, seed in itertools.product(('dominant', 'tail'), (0, 1)):
        mine = [s for s in sets if s[0] == arm and s[3] == seed]
        for small, large in itertools.pairwise(mine):
            assert small[1] == large[1] and set(small[2]) < set(large[2])
        anchors, others = mine[-1][1], set(mine[-1][2]) - set(mine[-1][1])
        assert all(count[n] >= 10 for n in mine[-1][2]) or arm == 'dominant'
        edge = min if arm == 'dominant' else max
        assert (edge(count[n] for n in anchors) >= max(count[n] for n in others)) if arm == 'dominant' else edge(count[n] for n in anchors) <= min(count[n] for n in others)


def test_losses_on_anchors_only(here, tmp_path):
    """What is held out is scored on the anchors, whatever else is learned."""
    a = arguments('labels', '--records', 40, *TINY, '--objective', 'supervised', '--out', tmp_path)
    a.records = [40]
    ds = Dataset('synthetic')
    name, (t, arm, anchors) = next((n, r) for n, r in scaling.plan(a, ds, {}).items() if 'tail' in n and len(r[0].task.split('+')) > len(r[2]))
    t.steps = 1
    torch.manual_seed(0)
    objective = train.build(t, 240, ds.columns(t.task))
    columns = [ds.label_names.index(n) for n in anchors]
    rows = ds.split()[1][:8]
    loss, _ = scaling.held_out(objective, ds, rows, t, torch.device('cpu'), columns)
    batches = [ds.collate(rows[i:i + 4], np.zeros(4, int), 600) for i in (0, 4)]
    with torch.no_grad():
        z = torch.cat([objective.head(*objective.encoder(b)) for b in batches])[:, [objective.columns.tolist().index(c) for c in columns]]
    y = torch.cat([b['y'] for b in batches])[:, columns]
    assert loss == pytest.approx(F.binary_cross_entropy_with_logits(z[y.isfinite()], y[y.isfinite()]).item(), rel=1e-5)


def test_nothing_of_the_test_folds_is_trained_on(here, tmp_path):
    a = arguments('data', '--records', 'all', *TINY, '--objective', 'cpc', '--out', tmp_path)
    ds = Dataset('synthetic')
    a.records = [len(ds.split()[0])]
    (name, run), = scaling.plan(a, ds, {}).items()
    run[0].steps = 2
    scaling.run_one(name, *run, a)
    seen = train.read_seen(Path(tmp_path, 'runs', name))
    assert not set(seen) & set(ds.patient[np.concatenate(ds.split()[1:])])


def test_what_is_trained_from_scratch_starts_alike_every_time(here, monkeypatch, tmp_path):
    """Whether the score before it is trained, which draws, or is there already: else a sweep that goes on finds none in out/scores."""
    a = arguments('finetune', '--records', 40, *TINY, '--out', tmp_path)
    a.records, folder, began = [40], tmp_path / 'runs/x', []
    t = scaling.settings(a, Dataset('synthetic'), 's4', 'cpc', '4x12', 40, 0)
    t.steps = 1
    train.train(t, folder / 'best')
    scaling.write_csv(folder / 'rows.csv', [dict.fromkeys(('run', 'family', 'paradigm', 'objective', 'size', 'N', 'D', 'seed'), 0)])

    def output(task, encoder, *rest):
        began.append(encoder.state_dict())
        torch.rand(len(began))
        return np.full(task.y.shape, .5), None

    monkeypatch.setattr(scaling.Task, 'output', output)
    for _ in range(2):
        assert [r['mode'] for r in scaling.finetune_one(folder, a)] == ['finetune', 'scratch']
    for one, two in ((began[0], began[2]), (began[1], began[3])):
        assert all(torch.equal(v, two[k]) for k, v in one.items())


def test_the_estimate_of_fine_tuning_trains_nothing(tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'runs/x'
    (folder / 'best').mkdir(parents=True)
    (folder / 'best/ckpt.pt').touch()
    scaling.write_csv(folder / 'rows.csv', [dict(family='s4', objective='cpc', seed=0, D=40)])
    a = arguments('finetune', '--records', 20, 40, '--out', tmp_path, '--estimate')
    monkeypatch.setattr(scaling, 'run_all', None)
    scaling.finetune(a)
    assert '1 runs on 2 numbers of records' in capsys.readouterr().out and not (tmp_path / 'finetune.csv').exists()


@pytest.mark.parametrize('flags, words', [
    (['--family', 'resnet', '--size', '3x24', '--objective', 'cpc'], 'none of cpc runs on any of resnet'), (['--records', '9999999'], 'must not exceed'),
    (['--ood', 'nothere:super'], 'no dataset'), (['--ood', 'sample:nothere'], "no task 'nothere'"),
    (['--steps', '0'], '--steps 0 must lie'), (['--size', '4x12', 'huge'], 'no size huge'), (['--records', '0', 'all'], '--records 0 must lie'),
    (['--seeds', '-1'], '--seeds -1 must lie'), (['--jobs', '0'], '--jobs 0 must lie'), (['--lr', 'nan'], '--lr nan must lie'),
    (['--objective', 'jepa', '--ood'], '--ood names no data')])
def test_bad_flags_are_one_line(here, tmp_path, flags, words):
    with pytest.raises(SystemExit, match=words) as stop:
        scaling.main(['sweep', 'params', '--size', '4x12', '--records', '20', '--seeds', '0', '--steps', '2', '--lr', '1e-2', '--batch', '4', '--jobs', '1',
                      '--ood', 'sample:super', '--out', str(tmp_path), *flags])
    assert '\n' not in str(stop.value)


def test_what_stops_in_a_worker_does_not_stop_the_others(tmp_path):
    a = argparse.Namespace(jobs=1, out=tmp_path)
    (tmp_path / 'runs/x').mkdir(parents=True)
    scaling.write_csv(tmp_path / 'runs/x/rows.csv', [dict(run='x')])
    assert scaling.run_all({'fine': (scaling.ladder, (8,))}, a, '') == {'fine': [8]}
    (tmp_path / 'runs.csv').unlink()
    with pytest.raises(Stop, match='^1 of 2 runs stopped; the first: bad: no dataset'):
        scaling.run_all({'bad': (scaling.ood, ('nothere', None)), 'fine': (scaling.ladder, (8,))}, a, '')
    assert (tmp_path / 'runs.csv').exists()                      # what there is, is collected


def test_workers_end_with_a_killed_sweep(tmp_path):
    (tmp_path / 'sleeper.py').write_text('''import argparse, os, time, scaling
def work():
    open('pid.tmp', 'w').write(str(os.getpid()))
    os.rename('pid.tmp', 'pid')
    time.sleep(600)
if __name__ == '__main__':
    scaling.run_all({'x': (work, ())}, argparse.Namespace(jobs=1, out='.'), 'x')
''')
    root = Path(__file__).parent.parent
    parent = subprocess.Popen([sys.executable, 'sleeper.py'], cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(root)}, stderr=subprocess.DEVNULL)
    end = time.time() + 120
    while not (tmp_path / 'pid').exists() and time.time() < end:
        time.sleep(.1)
    worker = int((tmp_path / 'pid').read_text())
    parent.kill()
    parent.wait()
    alive = lambda: Path(f'/proc/{worker}/stat').exists() and Path(f'/proc/{worker}/stat').read_text().split()[2] != 'Z'
    while alive() and time.time() < end:
        time.sleep(.1)
    assert not alive()


# ---------------------------------------------------------------------------------------------------------------------
# the study

def test_a_part_of_the_study_is_rebuilt(here, monkeypatch, capsys):
    """At tiny scale, begun, gone on with, and claims from its tables, which have the columns of the kept ones."""
    part = scaling.STUDY['masking']
    monkeypatch.setitem(scaling.STUDY, 'masking', part._replace(arms={n: part.arms[n] for n in ('hide50', 'raw')}, looks=(('sample', 'linear', 'all'),), seeds=(0, 1)))
    flags = ['study', 'masking', '--steps', '2', '--batch', '4', '--jobs', '1', '--out', 'st']
    scaling.main([*flags, '--estimate'])
    assert not Path('st').exists()
    (folder, t), *_ = scaling.study_runs('masking', scaling.parse(flags), 'cpu')['raw']
    scaling.pretrain(folder, t)
    made = (folder / 'ckpt.pt').read_bytes()
    scaling.main(flags)
    assert '3 of 4 runs to make' in capsys.readouterr().out and (folder / 'ckpt.pt').read_bytes() == made
    for what, rows in (('arms', {'hide50', 'raw', 'random encoder'}), ('pairs', {'variant', 'gain by variant'})):
        found = list(csv.DictReader(open(f'st/study_masking_{what}.csv')))
        assert {r['arm' if what == 'arms' else 'family'] for r in found} == rows
        for kept in (Path(__file__).parent.parent / 'assets/results').glob(f'study_*_{what}.csv'):
            assert list(found[0]) == list(csv.DictReader(open(kept)).fieldnames)
    scaling.main(['claims', 'st', '--out', 'st/claims'])
    assert "raw" in (said := capsys.readouterr().out) and said.count("can't tell") == 1 and Path('st/claims/claims.png').exists() and Path('st/claims/study_masking.png').exists()      # of two seeds
    with pytest.raises(Stop, match='another --data'):
        scaling.main([*flags, '--steps', '3'])
    for bad, line in ((['nothing'], 'no part nothing'), (['filtered'], 'needs ptbxl1819')):
        with pytest.raises(Stop, match=line):
            scaling.main(['study', *bad])


def test_equal_flops(here):
    """Every arm's steps times its FLOPs are those of the cheapest arm's steps, to a step."""
    a = scaling.parse(['study', 'flops', '--steps', '40', '--batch', '4', '--seeds', '0'])
    ts = {arm: pairs[0][1] for arm, pairs in scaling.study_runs('flops', a, 'cpu').items()}
    ds = Dataset('synthetic')
    cost = {arm: scaling.price(ts[arm], ds, 'cpu')[1] for arm in ('cpc s4', 'jepa s4', 'hubert s4', 'cpc transformer', 'cpc net1d')}
    total = {arm: ts[arm].steps * cost[arm] for arm in cost}
    assert max(t.steps for t in ts.values()) == 40
    assert all(abs(total[a] - total[b]) <= cost[a] + cost[b] for a in cost for b in cost)


def test_codes_are_counted_without_backward(here):
    """Beside the teacher: distances to two books of 256 codes (DinoSR), similarities to 384 prototypes (HuBERT++), of 300 tokens."""
    ds = Dataset('synthetic')
    batch = ds.batch(ds.split()[0], 600, 4, 0, 0)
    student = {}
    for name, codes in (('data2vec', 0), ('dinosr', 2 * 256), ('hubert', 384)):
        objective = OBJECTIVES[name](Encoder(config_of('s4', 'tiny')), steps=4).eval()
        with torch.no_grad():
            student[name], extra = scaling.counted(objective, batch)
        crop, once = macs(objective.encoder.config, 600)
        assert extra == pytest.approx(crop + once / 4 + codes * 300 * 64)
    head = lambda out: 300 * 64 * out                            # the heads alone set the students apart: data2vec's and DinoSR's differ in their last map
    assert student['dinosr'] - student['data2vec'] == pytest.approx(head(512) - head(64))


def test_codes_of_beats_are_counted_without_backward():
    """A tokenizer's encoder, its map to 128 and its similarities to 50 codes; VQBeat's own, of real beats only."""
    peaks = torch.full((4, 10), -1)
    peaks[:2] = torch.arange(100, 2100, 200)                     # two of four records have any beat: padded to ten in each of 12 leads
    batch, D = dict(x=torch.randn(4, 12, 2400), peaks=peaks), 32
    tokenizer = OBJECTIVES['vqbeat'](Encoder(config_of('beat', 'tiny')), codes=50).eval()
    beats = OBJECTIVES['beats'](Encoder(config_of('beat', 'tiny')), tokenizer=tokenizer).eval()
    crop, _ = macs(tokenizer.encoder.config, 2400, beats=10)
    with torch.no_grad():
        student, extra = scaling.counted(beats, batch)
        assert extra == crop + 121 * (D * D + D * 128) + 120 * 128 * 50
        assert student == crop + D * 50 * 30                     # half of 120 beats in half of the records: what the head maps
        student, extra = scaling.counted(tokenizer, batch)
        assert extra == 60 * 128 * 50
        head = 121 * (D * D + 2 * D * 128) + 120 * (D * D + D * tokenizer.encoder.stem.length)
        assert student == crop + head + 2 * macs(replace(tokenizer.encoder.config, layers=1), 2400, beats=10)[0] - 2 * 3 * 12 * 10 * 230 * D


def test_average_of_scores():
    """Points and resamples of an average are those of its members, and its differences those averaged."""
    rng = np.random.default_rng(0)
    y, patient = rng.integers(0, 2, (60, 3)).astype(float), np.arange(60)
    scores = [Score([[rng.normal(size=y.shape) + k * y] for _ in range(3)], y, patient) for k in (.2, .5, 1)]
    mean, zero = scaling.average(scores[:2]), scores[2]
    assert np.allclose(mean.point['AUROC'], (scores[0].point['AUROC'] + scores[1].point['AUROC']) / 2)
    points, boot = mean.difference(zero)
    parts = [s.difference(zero) for s in scores[:2]]
    assert np.allclose(points, (parts[0][0] + parts[1][0]) / 2) and np.allclose(boot, (parts[0][1] + parts[1][1]) / 2)
    assert scaling.average(scores[:1]).interval() == scores[0].interval()
    gain = scaling.combined(scores[:2], lambda v: v[0] - v[1])
    assert np.allclose(gain.point['AUROC'], scores[0].point['AUROC'] - scores[1].point['AUROC'])


def test_contrasts_of_two_factors():
    part = scaling.Part('', ('objective', 'backbone'), {f'{o} {b}': '' for o, b in itertools.product('ab', 'xyz')}, ())
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (60, 3)).astype(float)
    scores = {n: Score([[rng.normal(size=y.shape)] for _ in range(2)], y, np.arange(60)) for n in part.arms}
    found = scaling.contrasts(part, scores)
    assert {n: list(levels) for n, levels in found.items()} == {'objective, mean': ['a', 'b'], 'objective, x': ['a', 'b'], 'objective, y': ['a', 'b'], 'objective, z': ['a', 'b'],
                                                                'backbone, mean': ['x', 'y', 'z'], 'backbone, a': ['x', 'y', 'z'], 'backbone, b': ['x', 'y', 'z']}
    assert np.allclose(found['backbone, mean']['y'].point['AUROC'], (scores['a y'].point['AUROC'] + scores['b y'].point['AUROC']) / 2)
    assert found['objective, z']['b'] is scores['b z']
    cross = part._replace(arms={n: '' for n in part.arms if 'a' in n or 'x' in n})           # a cross, as of equal FLOPs, has no averages
    assert {n: list(levels) for n, levels in scaling.contrasts(cross, scores).items()} == {'objective, x': ['a', 'b'], 'backbone, a': ['x', 'y', 'z']}


def test_what_would_be_found():
    """With many seeds and pairs, 80 % power at Holm's first level is the normal's: (z_{1 - .05 / 2m} + z_.8) standard errors."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (400, 1)).astype(float)
    levels = {n: Score([[rng.normal(size=y.shape) + y] for _ in range(60)], y, np.arange(400)) for n in 'abc'}
    for r in scaling.compared(levels):
        points, boot = levels[r['a']].difference(levels[r['b']])
        se = np.hypot(boot.std(), points.mean(1).std(ddof=1) / 60 ** .5)
        assert r['detectable'] == pytest.approx((norm.ppf(1 - .05 / 6) + norm.ppf(.8)) * se, rel=.05)


def test_ranks_from_a_kept_table():
    """As `compare` gives them: a and c are alike, b is behind both, d behind all."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (400, 1)).astype(float)
    levels = {n: Score([[rng.normal(size=y.shape) + k * y] for _ in range(9)], y, np.arange(400)) for n, k in zip('dcba', (0, 2, 1, 2))}
    rows, ranks = compare(levels)
    assert ranks == dict(a=1, b=3, c=1, d=4) and scaling.ranked(rows) == 'c 1, a 1, b 3, d 4'


@pytest.mark.parametrize('kind, verdicts, said', [
    ('better', ('better', 'better'), 'agrees'), ('better', ('better', "can't tell"), "can't tell"), ('better', ('better', 'worse'), 'disagrees'),
    ('better', ('better', 'equivalent within 0.005'), 'disagrees'), ('close', ('equivalent within 0.005', 'equivalent within 0.005'), 'agrees'),
    ('close', ("can't tell", 'equivalent within 0.005'), "can't tell"), ('close', ('better', "can't tell"), 'disagrees')])
def test_verdicts_on_claims(kind, verdicts, said):
    """The claimed winner may stand on either side of a comparison."""
    claim = scaling.Claim('', '', '', 'w', ('p', 'q'), kind)
    sizes = {'better': .1, 'worse': -.1, "can't tell": .02, 'equivalent within 0.005': .001}
    row = lambda a, b, v: dict(a=a, b=b, difference=sizes[v], low=sizes[v] - .03, high=sizes[v] + .01, verdict=v, metric='macro AUROC', seeds='0 1 2')
    turned = {'better': 'worse', 'worse': 'better'}
    second = row('w', 'q', verdicts[1])
    second |= dict(a='q', b='w', difference=-second['difference'], low=-second['high'], high=-second['low'], verdict=turned.get(verdicts[1], verdicts[1]))
    rows = [row('w', 'p', verdicts[0]), second, row('p', 'q', 'better')]
    least, found = scaling.verdict(claim, rows)
    decides = {'agrees': verdicts, "can't tell": ["can't tell"], 'disagrees': [v for v in verdicts if v[:5] in (('worse', 'equiv') if kind == 'better' else ('bette', 'worse'))]}[said]
    assert found == said and least['a'] == 'w' and least['verdict'] in decides
    assert least['high'] - least['difference'] == pytest.approx(.01)                         # turned as a whole
    assert scaling.verdict(claim, [r | dict(seeds='0 1') for r in rows])[1] == "can't tell"
