"""The pretraining loop: exact resuming, what a run leaves behind, refusals, two processes."""
import csv
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import data
import train
from data import Contract, Dataset, Stop, read_seen, run_script
from models import Encoder, config_of, load
from objectives import CPC, JEPA, OBJECTIVES, released_input

SCRIPTS = {**os.environ, 'PYTHONPATH': str(Path(__file__).resolve().parent.parent)}


def run(out, flags=''):
    """A short run in out/OUT: its checkpoint."""
    short = '--batch 4 --records 16 --layers 1 --log-every 1 --probe-every 0'
    train.main(f'{short} {flags} --out out/{out}'.split())
    return load(f'out/{out}')


def resume(out):
    train.main(['--resume', '--out', f'out/{out}'])
    return load(f'out/{out}')


def read(path):
    """The rows of a table, without times."""
    with open(path) as f:
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader(f)]


def log(out):
    return read(f'out/{out}/log.csv')


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def arguments(flags):
    a = train.make_parser().parse_args(flags.split())
    train.fill_in(a)
    return a


def prepare(name, labels, contract=Contract()):
    """A dataset of 30 records of noise."""
    noise = np.random.default_rng(0).normal(0, .05, (30, 720, 12))
    records = (data.Record(str(i), x=x, fs=240, leads=data.LEADS, unit='mV',
                           labels={f'label/{name}': i % 2 for name in labels})
               for i, x in enumerate(noise))
    data.prepare(name, records, contract, workers=1, peaks=False)


# -------------------------------------------------------------------------------------------------
# resuming

@pytest.mark.parametrize('name', OBJECTIVES)
def test_interrupted_run_goes_on_exactly(here, monkeypatch, name):
    """Ctrl-C in the second of four steps. Compared with a run that keeps copies: weights, teachers,
    codebooks and the log, bit for bit."""
    flags, kind, steps = f'--objective {name} --layers 2 --steps 4', OBJECTIVES[name], []
    if name == 'beats':
        run('vq', '--objective vqbeat --steps 1 --codes 32')
        flags += ' --tokenizer out/vq'
    whole = run(f'{name}_whole', f'{flags} --keep 0 2 4')
    kept = {step: load(f'out/{name}_whole/ckpt_{step}.pt') for step in (0, 2, 4)}
    after_step = kind.after_step

    def interrupt(self):
        after_step(self)
        steps.append(0)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(kind, 'after_step', interrupt)
        with pytest.raises(SystemExit, match='saved at step 2'):
            run(f'{name}_cut', flags)
    cut = load(f'out/{name}_cut')
    end = resume(f'{name}_cut')
    assert same(cut['state'], kept[2]['state']) and same(end['state'], kept[4]['state'])
    assert all(same(c['initial'], kept[0]['encoder']) for c in (whole, cut, end))
    assert log(f'{name}_whole') == log(f'{name}_cut')
    assert whole['contract']['window'] == whole['args']['window'] / kind.views
    if name not in ('vqbeat', 'beats'):
        assert {row['alarm'] for row in log(f'{name}_whole')} == {''}


KILLED = '''
import os, torch, train
write = torch.save
def save(checkpoint, file):
    if checkpoint['step'] == 40:
        file.write(b'half a checkpoint')
        file.flush()
        os.kill(os.getpid(), 9)
    write(checkpoint, file)
torch.save = save
train.main()
'''


def test_run_killed_while_it_saves_goes_on_exactly(here):
    """The probe and the log leave no trace in the weights, and the loss falls below chance."""
    flags = '--steps 60 --batch 16 --layers 1 --log-every 10 --save-every 20 --out'.split()
    killed = subprocess.run([sys.executable, '-c', KILLED, *flags, 'out/killed'], env=SCRIPTS)
    assert killed.returncode == -signal.SIGKILL and load('out/killed')['step'] == 20
    train.main([*flags, 'out/whole'])
    train.main([*flags, 'out/quiet', '--log-every', '60', '--probe-every', '0'])
    whole = load('out/whole')
    assert same(whole['state'], resume('killed')['state']) and log('whole') == log('killed')
    assert same(whole['state'], load('out/quiet')['state'])
    assert float(log('whole')[-1]['loss']) < math.log(129)


def test_full_disk_leaves_the_checkpoint_before(here):
    """A limit on the size of files stands in for a full disk. The checkpoint of step 0, which has
    no moments of the optimiser yet, fits."""
    resource = pytest.importorskip('resource')
    run('fits', '--steps 1')
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = os.path.getsize('out/fits/ckpt.pt') * 4 // 5
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most[1]))
    try:
        with pytest.raises(Stop):                          # one line
            run_script(lambda: run('full', '--steps 1'))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert load('out/full')['step'] == 0 and not [*Path('out/full').glob('*.partial')]


def test_only_the_run_itself_is_resumed_or_overwritten(here):
    run('mine', '--steps 1')
    before = Path('out/mine/ckpt.pt').read_bytes()
    for flags, why in (('', 'exists: add --resume'), ('--resume --size base', 'than --size'),
                       ('--resume --steps 800', 'than --steps')):          # 800 is the default
        with pytest.raises(SystemExit, match=why):
            train.main(f'{flags} --out out/mine'.split())
    assert Path('out/mine/ckpt.pt').read_bytes() == before
    assert run('mine', '--steps 2 --force')['step'] == 2
    os.makedirs('out/thesis')
    with pytest.raises(SystemExit, match='out/thesis exists'):
        run('thesis', '--steps 1 --force')


def test_data_prepared_anew_is_not_resumed(here):
    """The number of labels is the head's width, so this is asked before weights are loaded."""
    prepare('anew', 'ab')
    run('anew', '--objective supervised --steps 1 --data anew')
    prepare('anew', 'a')
    with pytest.raises(SystemExit, match='begun with other data'):
        resume('anew')


# -------------------------------------------------------------------------------------------------
# what training does

def test_bad_gradient_stops_before_it_is_saved(here, monkeypatch):
    """The loss of the third step is finite, but not its gradient. Its batch is kept."""
    forward, seen = CPC.forward, []

    def poisoned(self, batch):
        loss, logs = forward(self, batch)
        seen.append(batch)
        root = (0 * self.head.weight.sum()).sqrt()
        return loss + root if len(seen) == 3 else loss, logs

    monkeypatch.setattr(CPC, 'forward', poisoned)
    with pytest.raises(SystemExit, match='at step 2 .*norm nan'):
        run('poisoned', '--steps 6 --save-every 1')
    last = load('out/poisoned')
    assert last['step'] == 2 and all(t.isfinite().all() for t in last['state'].values())
    assert torch.equal(torch.load('out/poisoned/bad_batch.pt')['x'], seen[2]['x'])


def test_exploding_gradient_stops(here):
    with pytest.raises(SystemExit, match=r'norm \d.*lower --lr'):
        run('exploded', '--steps 20 --lr 1e4 --clip 1e9')
    assert load('out/exploded')['step'] == 0 and Path('out/exploded/bad_batch.pt').exists()


def test_released_rates_input_and_teacher(here, monkeypatch):
    """Rates: head 3e-3, backbone and mask token a tenth, stem a hundredth, all constant. The input
    is standardised. The teacher has weights of its own, which stay."""
    flags = '--objective jepa --as_released ema,lr,norm --steps 2'
    a = arguments(flags)
    objective = train.build(a, 240)
    groups = train.optimiser_groups(objective, a)
    grouped = [p for group in groups for p in group['params']]
    assert [group['peak'] for group in groups] == pytest.approx([3e-3, 3e-4, 3e-5])
    assert {*map(id, grouped)} == {id(p) for p in objective.parameters() if p.requires_grad}
    assert any(p is objective.mask_token for p in groups[1]['params'])
    forward, seen = JEPA.forward, []
    monkeypatch.setattr(JEPA, 'forward',
                        lambda self, batch: seen.append(batch) or forward(self, batch))
    end = run('released', flags + ' --keep 0')['state']
    start = load('out/released/ckpt_0.pt')['state']
    ds = Dataset('synthetic')
    x = ds.batch(ds.nested(ds.split()[0], 16, 0), 600, 4, 0, 0)['x']
    assert torch.equal(seen[0]['x'], released_input(x))
    assert [float(row['lr']) for row in log('released')] == [3e-3, 3e-3]
    student, teacher = 'encoder.stem.0.weight', 'teacher.net.stem.0.weight'
    assert torch.equal(start[teacher], end[teacher])
    assert not torch.equal(start[student], end[student])
    assert not torch.equal(start[student], start[teacher])


def test_teacher_copies_statistics_that_have_seen_data(here):
    """BatchNorm is calibrated before the copy is made, and nothing else changes."""
    a, ds, built = arguments('--objective jepa'), Dataset('synthetic'), []
    batches = [ds.batch(ds.split()[0], 600, 16, 0, step) for step in range(3)]
    for given in ((), batches):
        torch.manual_seed(0)
        built.append(train.build(a, 240, batches=given))
    old, new = (objective.state_dict() for objective in built)
    changed = [k for k in old if not torch.equal(old[k], new[k])]
    assert changed and all('running' in k or 'tracked' in k for k in changed)
    means = [built[1].encoder.stem[0](batch['x']).mean((0, 2)) for batch in batches]
    torch.testing.assert_close(new['teacher.net.stem.1.running_mean'], sum(means) / 3)


def test_what_a_run_and_its_tokenizer_have_seen_is_noted(here):
    run('vqs', '--objective vqbeat --steps 1 --codes 32 --data sample')
    run('bs', '--objective beats --tokenizer out/vqs --steps 1')
    names = []
    for ds in Dataset('sample'), Dataset('synthetic'):
        rows = ds.nested(ds.split()[0], 16, 0)
        names.append({*ds.patient[rows], *ds.recording[rows], *ds.signal[rows]})
    assert read_seen('out/vqs') == names[0] and read_seen('out/bs') == names[0] | names[1]


def test_alarm_reaches_the_log(here, monkeypatch, capsys):
    monkeypatch.setattr(train, 'health', lambda logs: ({'rank': 1.}, 'rank 1: collapsed'))
    run('alarm', '--steps 3')
    assert {row['alarm'] for row in log('alarm')} == {'rank 1: collapsed'}
    assert capsys.readouterr().out.count('rank 1: collapsed') == 4         # and once at the end


def test_intervals_that_nobody_set(here):
    """On a CPU: a row every 20 steps, a probe at the first, the last and every 200th."""
    train.main('--steps 201 --batch 1 --layers 1 --records 8 --probe-records 40 '
               '--out out/intervals'.split())
    rows = log('intervals')
    assert [int(row['step']) for row in rows] == [*range(0, 200, 20), 199, 200]
    assert [int(row['step']) for row in rows if row['probe']] == [0, 199, 200]


def test_batches_come_in_order_and_faults_where_they_are_wanted():
    batches = train.prefetch(lambda step: 6 // (3 - step), range(1, 6))
    assert [next(batches), next(batches)] == [(1, 3), (2, 6)]
    with pytest.raises(ZeroDivisionError):
        next(batches)


@pytest.mark.parametrize('flags, why', [
    ('--backbone resnet', 'cpc does not run on resnet: take s4, s4d, transformer, net1d'),
    ('--hide .3', 'cpc has no --hide: it has --horizon, --negatives'),
    ('--as_released ema', 'cpc has lr to switch'),
    ('--objective data2vec --as_released mask --hide .3', 'leave --hide out'),
    ('--objective jepa --as_released norm --data normed', 'standardises millivolts'),
    ('--objective beats', 'train one with python train.py --objective vqbeat'),
    ('--objective supervised --task target', 'yes/no labels are needed'),
    ('--objective dinosr --layers 1', 'must be 2 or more'),
    ('--size 5x320', 's4 has no size 5x320'), ('--data nowhere', "no dataset 'nowhere'"),
    ('--window 11', 'lasts 11.0 s'), ('--horizon 300', 'lower --horizon'),
    ('--device meta', 'cannot be used'), ('--resume', 'nothing to resume'),
    ('--steps 0', '--steps'), ('--lr nan', '--lr'), ('--hide 1.5', '--hide'),
    ('--seed -1', '--seed')])
def test_bad_requests_stop_before_anything_is_written(here, capsys, flags, why):
    if 'normed' in flags:
        prepare('normed', 'a', Contract(norm='record', unit='SD'))
    with pytest.raises(SystemExit) as stop:
        train.main([*flags.split(), '--out', 'out/refused'])
    assert why in f'{stop.value} {capsys.readouterr().err}' and not Path('out/refused').exists()


# -------------------------------------------------------------------------------------------------
# two processes

def supervised(share):
    """A supervised objective in eval mode, which draws nothing at random; its share of a batch."""
    ds = Dataset('synthetic')
    torch.manual_seed(0)
    objective = OBJECTIVES['supervised'](Encoder(config_of('s4', 'tiny')), columns=range(6)).eval()
    return objective, ds.batch(ds.split()[0], 600, 8, 0, 0, share)


def as_one_of_two():
    """What torchrun starts: the gradient of half a batch, a run, one that halts and goes on."""
    whole = train.train

    def both(a, out, checkpoint, until, rank, world, interrupted):
        objective, half = supervised((rank, world))
        parallel = train.distribute(objective)
        parallel(half)[0].backward()
        whole(a, out, None, 2, rank, world)
        dist.barrier()
        halted = whole(a, out, load(out), None, rank, world)
        whole(a, Path('out/never_halted'), None, None, rank, world)
        torch.save([[p.grad for p in objective.parameters()], dict(halted.named_parameters())],
                   out / f'{rank}.pt')

    train.train = both
    train.main()


def test_two_processes(here):
    """They hold the same weights, resume exactly, and average their gradients to that of the whole
    batch."""
    flags = '--objective dinosr --steps 4 --batch 8 --layers 2 --probe-every 2 --out out/two'
    torchrun = '-m torch.distributed.run --standalone --nproc_per_node 2'
    done = subprocess.run([sys.executable, *torchrun.split(), __file__, *flags.split()],
                          capture_output=True, text=True, env=SCRIPTS)
    assert done.returncode == 0 and done.stdout.count('4 steps of 8 crops') == 3, done.stderr
    end, (gradient, weights) = load('out/two'), torch.load('out/two/0.pt')
    assert same(weights, torch.load('out/two/1.pt')[1])
    assert all(torch.equal(end['state'][k], weights[k]) for k in weights)
    assert same(end['state'], load('out/never_halted')['state'])
    objective, batch = supervised((0, 1))
    objective(batch)[0].backward()
    for p, g in zip(objective.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-7)
    with pytest.raises(SystemExit, match=r'other processes \(2\)'):
        resume('two')


# -------------------------------------------------------------------------------------------------
# the benchmark command

def test_benchmark_measures_every_part(here, monkeypatch):
    from . import benchmark                 # not above: torchrun runs this file as a script
    assert benchmark.alone(max, 2, 3) == 3                 # in another process, not so the rest
    monkeypatch.setattr(benchmark, 'alone', lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(benchmark, 'GROWTH', {'batch': (2, 4), 'records': (50,)})
    monkeypatch.setattr(benchmark, 'LENGTHS', (20,))
    for what in ('jepa', 'growth', 'convolutions'):
        benchmark.main([what, *'--size 4x12 --batch 2 --out out/benchmark'.split()])
    step, = read('out/benchmark/jepa.csv')
    assert all(float(step[f'{part}_ms']) > 0 for part in benchmark.PARTS)
    assert [row['value'] for row in read('out/benchmark/growth.csv')] == ['2', '4', '50']
    fft, matrices = read('out/benchmark/convolutions.csv')[:2]
    assert float(fft['error']) < 1e-5 and float(matrices['error']) < 1e-5


if __name__ == '__main__':
    as_one_of_two()
