"""The pretraining loop: exact resume after a kill, refusals, benchmark."""
import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import objectives
import train
from models import load

ROOT = Path(__file__).resolve().parent.parent
SHORT = '--steps 30 --batch 8 --layers 1 --log-every 5 --save-every 10 --probe-every 15 --seed 3'.split()


def start(*flags):
    return subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows(path):
    return [{k: v for k, v in r.items() if k not in ('seconds', 'crops_per_second')} for r in csv.DictReader(open(path))]


def test_killed_and_resumed_is_bitwise_the_same(here):
    whole = start(*SHORT, '--out', 'out/whole')
    assert whole.wait() == 0, whole.stdout.read()
    killed, checkpoint = start(*SHORT, '--out', 'out/killed'), here / 'out/killed/ckpt.pt'
    while not (checkpoint.exists() and load(checkpoint)['step'] >= 10):
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert load(checkpoint)['step'] < 30
    again = start('--resume', '--out', 'out/killed')
    assert again.wait() == 0, again.stdout.read()
    a, b = load(here / 'out/whole/ckpt.pt'), load(checkpoint)
    assert a['step'] == b['step'] == 30 and a['state'].keys() == b['state'].keys()
    assert all(torch.equal(a['state'][k], b['state'][k]) for k in a['state'])
    assert rows(here / 'out/whole/log.csv') == rows(here / 'out/killed/log.csv')
    assert (here / 'out/killed/loss.png').exists()


@pytest.mark.parametrize('objective, backbone', [('cpc', 's4'), ('jepa', 's4d'), ('data2vec', 'transformer'), ('dinosr', 's4'), ('hubert', 's4'),
                                                 ('cmsc', 'resnet'), ('vqbeat', 'beat'), ('beats', 'beat'), ('mae', 'vit'), ('supervised', 's4')])
def test_every_objective_resumes_exactly(here, monkeypatch, objective, backbone):
    """Teachers, codebooks, prototypes and temperatures come back with the weights."""
    flags = f'--objective {objective} --backbone {backbone} --layers 2 --steps 4 --batch 4 --save-every 2 --log-every 1 --probe-every 0 --out out/{objective}'
    if objective == 'beats':
        train.main('--objective vqbeat --steps 1 --batch 4 --codes 32 --probe-every 0 --out out/vq'.split())
        flags = '--tokenizer out/vq ' + flags
    train.main((flags + '-whole').split())
    kind = train.OBJECTIVES[objective]
    after, seen = kind.after_step, []

    def interrupted(self, step):
        seen.append(step)
        if step == 2:
            raise KeyboardInterrupt
        after(self, step)

    monkeypatch.setattr(kind, 'after_step', interrupted)
    with pytest.raises(SystemExit, match='stopped; go on from'):
        train.main((flags + '-cut').split())
    monkeypatch.undo()
    monkeypatch.chdir(here)
    train.main(['--resume', '--out', f'out/{objective}-cut'])
    a, b = (load(here / f'out/{objective}-{end}/ckpt.pt') for end in ('whole', 'cut'))
    assert all(torch.equal(a['state'][k], b['state'][k]) for k in a['state']) and seen == [0, 1, 2]
    assert rows(here / f'out/{objective}-whole/log.csv') == rows(here / f'out/{objective}-cut/log.csv')


def test_loss_falls(here):
    train.main('--steps 60 --batch 16 --layers 1 --probe-every 0 --out out/falls'.split())
    losses = [float(r['loss']) for r in rows(here / 'out/falls/log.csv')]
    assert losses[-1] < 4.7                                      # below chance, ln 129 = 4.86


def test_non_finite_loss_stops_and_keeps_the_last_good_state(here):
    with pytest.raises(SystemExit, match='at step . the loss or its gradient was not finite.*lower --lr'):
        train.main('--steps 20 --batch 4 --layers 1 --lr 1e30 --clip 1e30 --probe-every 0 --out out/blown'.split())
    state = load(here / 'out/blown/ckpt.pt')['state']
    assert all(t.isfinite().all() for t in state.values()) and (here / 'out/blown/bad_batch.pt').exists()


def test_a_bad_gradient_never_reaches_a_checkpoint(here, monkeypatch):
    from objectives import CPC
    forward = CPC.forward

    def poisoned(self, batch):
        loss, logs = forward(self, batch)
        steps.append(0)
        return (loss + (0 * self.head.weight.sum()).sqrt() if len(steps) == 3 else loss), logs                # finite loss, NaN gradient

    steps = []
    monkeypatch.setattr(CPC, 'forward', poisoned)
    with pytest.raises(SystemExit, match='at step 2 .*norm nan'):
        train.main('--steps 6 --batch 4 --layers 1 --save-every 1 --probe-every 0 --out out/poisoned'.split())
    checkpoint = load(here / 'out/poisoned/ckpt.pt')
    assert checkpoint['step'] == 2 and all(t.isfinite().all() for t in checkpoint['state'].values())


def test_an_exploded_gradient_stops(here, monkeypatch):
    monkeypatch.setattr(train, 'EXPLODED', 1e-3)
    with pytest.raises(SystemExit, match='at step 0 .* the norm of the gradient above 0.001'):
        train.main('--steps 6 --batch 4 --layers 1 --probe-every 0 --out out/exploded'.split())
    assert load(here / 'out/exploded/ckpt.pt')['step'] == 0


def test_a_failing_write_leaves_the_checkpoint_before(here):
    """RLIMIT_FSIZE stands in for a full disk. The checkpoint of step 0 has no moments yet and fits, the next does not."""
    resource = pytest.importorskip('resource')
    flags = '--steps 4 --batch 4 --layers 1 --save-every 2 --probe-every 0 --out'.split()
    train.main([*flags, 'out/fits'])
    size = (here / 'out/fits/ckpt.pt').stat().st_size - 500
    done = subprocess.run([sys.executable, str(ROOT / 'train.py'), *flags, 'out/full'], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert done.returncode == 1 and 'ckpt.pt cannot be written' in done.stderr and 'Traceback' not in done.stderr
    assert load(here / 'out/full/ckpt.pt')['step'] == 0 and not list((here / 'out/full').glob('*.partial'))


def test_numeric_labels_do_not_disturb_pretraining(here):
    rng = np.random.default_rng(0)
    np.save('num.npy', rng.normal(0, .2, (60, 12, 800)).cumsum(2) * .05)
    Path('num.csv').write_text('hr,sick\n' + ''.join(f'{60 + i},{i % 2}\n' for i in range(60)))
    data.main('array --root num.npy --fs-in 250 --labels num.csv --out num --workers 1 --no-peaks'.split())
    train.main('--steps 2 --batch 4 --layers 1 --data num --out out/num'.split())
    assert load(here / 'out/num/ckpt.pt')['step'] == 2


def test_data_prepared_anew_with_other_labels_is_one_line(here):
    """The number of labels decides the head's shape, so this must be asked before the weights are loaded."""
    def prepare(names, answers):
        Path('anew.csv').write_text(names + ''.join(answers.format(i % 2) for i in range(30)))
        data.main('array --root anew.npy --fs-in 250 --labels anew.csv --out anew --workers 1 --no-peaks'.split())

    np.save('anew.npy', np.random.default_rng(0).normal(0, .2, (30, 12, 800)).cumsum(2) * .05)
    prepare('a,b\n', '{0},{0}\n')
    train.main('--objective supervised --steps 1 --batch 4 --layers 1 --probe-every 0 --data anew --out out/anew'.split())
    prepare('a\n', '{0}\n')
    with pytest.raises(SystemExit, match='prepared anew'):
        train.main('--resume --out out/anew'.split())


def test_choices_that_do_not_exist_are_one_line(here):
    for flags, why in (('--objective cpc --backbone resnet', 'cpc does not run on resnet: take s4, s4d, transformer, net1d'),
                       ('--objective cpc --hide .3', 'cpc has no --hide: it takes --horizon, --negatives'),
                       ('--objective cpc --as_released ema', '--as_released ema: of cpc there is lr to switch'),
                       ('--size 5x320', 's4 has no size 5x320'), ('--objective beats', 'train one with python train.py --objective vqbeat'),
                       ('--objective beats --tokenizer out/none', 'no checkpoint at'), ('--objective supervised --task target', 'needs yes/no labels'),
                       ('--objective mae --hide 1.5', '--hide 1.5 must lie between 0 and 1')):
        with pytest.raises(SystemExit, match=why):
            train.main([*flags.split(), '--out', 'out/refused'])
    assert not (here / 'out/refused').exists()


def test_released_rates_and_input(here):
    """Head 3e-3, backbone and mask token a tenth, stem a hundredth, all constant; the student sees standardised input."""
    a = train.knobs().parse_args('--objective jepa --as_released lr,norm'.split())
    train.settle(a)
    objective = train.build(a, 240)
    groups = train.optimiser_groups(objective, a)
    assert [g['peak'] for g in groups] == pytest.approx([3e-3, 3e-4, 3e-5])
    assert sum(p.numel() for g in groups for p in g['params']) == sum(p.numel() for p in objective.parameters() if p.requires_grad)
    assert any(p is objective.hidden for p in groups[1]['params'])
    seen, real = [], objectives.JEPA.forward
    with pytest.MonkeyPatch.context() as patch:
        real = objectives.JEPA.forward
        patch.setattr(objectives.JEPA, 'forward', lambda self, batch: (seen.append(batch['x']), real(self, batch))[1])
        train.main('--objective jepa --as_released lr,norm --steps 2 --batch 4 --log-every 1 --probe-every 0 --out out/released'.split())
    x = data.Dataset('synthetic').batch(data.Dataset('synthetic').split()[0], 600, 4, 0, 0)['x']
    assert torch.equal(seen[0], objectives.released_input(x))
    assert [float(r['lr']) for r in rows(here / 'out/released/log.csv')] == [3e-3, 3e-3]


def test_teacher_copies_statistics_that_have_seen_data(here):
    """BatchNorm is calibrated before the copy is made, and that leaves the weights alone."""
    a = train.knobs().parse_args('--objective jepa'.split())
    train.settle(a)
    ds = data.Dataset('synthetic')
    batches = [ds.batch(ds.split()[0], 600, 16, 0, step) for step in range(3)]
    built = []
    for given in ((), batches):
        torch.manual_seed(0)
        built.append(train.build(a, 240, batches=given))
    old, new = (o.state_dict() for o in built)
    changed = [k for k in old if not torch.equal(old[k], new[k])]
    assert changed and all('running' in k or 'tracked' in k for k in changed)
    assert torch.allclose(new['teacher.net.stem.1.running_mean'], torch.stack([built[1].encoder.stem[0](b['x']).mean((0, 2)) for b in batches]).mean(0), atol=1e-5)
    stale, fresh = (objectives.health(o.eval()(batches[0])[1])[0]['target_std'] for o in built)
    assert stale < .3 and fresh > .5                             # a teacher that has seen nothing hardly tells tokens apart


@pytest.mark.parametrize('objective', ['cpc', 'jepa', 'data2vec', 'dinosr', 'hubert', 'mae', 'cmsc', 'supervised'])
def test_healthy_runs_raise_no_alarm(here, objective):
    train.main(f'--objective {objective} --steps 12 --batch 8 --log-every 3 --probe-every 0 --out out/healthy_{objective}'.split())
    assert {r['alarm'] for r in rows(here / f'out/healthy_{objective}/log.csv')} == {''}


def test_alarm_reaches_the_log(here, monkeypatch, capsys):
    monkeypatch.setattr(train, 'health', lambda logs: ({'rank': 1.}, 'rank 1: features lie in one direction'))
    train.main('--steps 3 --batch 4 --layers 1 --log-every 1 --probe-every 0 --out out/alarm'.split())
    out = capsys.readouterr().out
    assert '! rank 1: features lie in one direction' in out and 'logged steps raised an alarm' in out
    assert {r['alarm'] for r in rows(here / 'out/alarm/log.csv')} == {'rank 1: features lie in one direction'}


def test_patients_of_the_tokenizer_count_as_seen(here):
    train.main('--objective vqbeat --steps 1 --batch 4 --codes 32 --probe-every 0 --data sample --out out/vqs'.split())
    train.main('--objective beats --tokenizer out/vqs --steps 1 --batch 4 --probe-every 0 --out out/bs'.split())
    patients = load(here / 'out/bs/ckpt.pt')['patients']
    assert any(p.startswith('ptbxl/') for p in patients) and any(p.startswith('synthetic0/') for p in patients)


def test_existing_folder_is_not_overwritten(here):
    train.main('--steps 1 --batch 4 --layers 1 --probe-every 0 --out out/mine'.split())
    before = (here / 'out/mine/ckpt.pt').read_bytes()
    with pytest.raises(SystemExit, match='exists: add --resume'):
        train.main('--steps 1 --out out/mine'.split())
    with pytest.raises(SystemExit, match='was started with --size tiny'):
        train.main('--size base --resume --out out/mine'.split())
    with pytest.raises(SystemExit, match='was started with --steps 1'):
        train.main('--steps 800 --resume --out out/mine'.split())                            # 800 is the default, but it was typed
    assert (here / 'out/mine/ckpt.pt').read_bytes() == before
    train.main('--steps 2 --batch 4 --layers 1 --probe-every 0 --out out/mine --force'.split())
    assert load(here / 'out/mine/ckpt.pt')['step'] == 2
    (here / 'out/thesis').mkdir()
    (here / 'out/thesis/figure.png').write_bytes(b'mine')
    with pytest.raises(SystemExit, match='is no run folder'):
        train.main('--steps 1 --out out/thesis --force'.split())
    assert (here / 'out/thesis/figure.png').exists()


@pytest.mark.parametrize('flags, why', [
    ('--data nowhere', "no dataset 'nowhere'"), ('--steps 0', 'must be 1 or more'), ('--window .1', '0.5 s or more'), ('--seed -1', '--seed'),
    ('--lr nan', '--lr'), ('--window inf', '--window'), ('--objective dinosr --layers 1', 'last two layers'), ('--out a/../b', 'without ..'), ('--device tpu', 'cannot be used here'), ('--device meta', 'cannot be used here'), ('--horizon 300', 'no more tokens than the horizon'),
    ('--out /proc/nothing', 'cannot be made'), ('--window 11', 'lasts 11.0 s'),
    ('--resume --out out/nothing', 'nothing to resume')])
def test_bad_requests_stop_before_anything_is_written(here, flags, why):
    before = sorted((here / 'out').glob('*')) if (here / 'out').exists() else []
    with pytest.raises(SystemExit, match=why):
        train.main(flags.split())
    assert before == (sorted((here / 'out').glob('*')) if (here / 'out').exists() else [])


def test_checkpoint_says_what_it_is(here):
    train.main('--steps 1 --batch 4 --layers 1 --probe-every 0 --data sample,synthetic --out out/both'.split())
    c = load(here / 'out/both/ckpt.pt')
    assert c['objective'] == 'cpc' and c['config']['causal'] and c['contract']['fs'] == 240 and c['contract']['window'] == 2.5
    assert any(p.startswith('ptbxl/') for p in c['patients']) and any(p.startswith('synthetic0/') for p in c['patients'])


@pytest.mark.parametrize('objective', list(train.OBJECTIVES))
def test_benchmark_parts_make_up_the_step(here, objective):
    train.main(f'--benchmark {objective} --batch 2 --layers 2'.split())
    row, = csv.DictReader(open('out/benchmark.csv'))
    assert row['objective'] == objective and float(row['crops_per_second']) > 0 and float(row['gflop']) > 0 and float(row['traffic_ms']) > 0
    parts = {part: float(row[f'{part}_ms']) for part in train.PARTS}
    assert [part for part in parts if parts[part] <= 0] == ([] if objective in ('jepa', 'data2vec', 'dinosr', 'hubert') else ['teacher'])
    assert .2 < sum(parts.values()) / float(row['step_ms']) < 5  # measured in turn: the same but for noise


def test_traffic_is_counted_by_hand():
    x, w = torch.ones(10, 4), torch.ones(4, 3)
    with train.Traffic() as traffic:
        y = (x.t().t() + x) @ w                                  # views move nothing, products are counted elsewhere
        y.sum()
        torch.nn.functional.linear(x[None], w.t())               # products of three dimensions go through a view, too
    assert traffic.bytes == 4 * (40 + 40 + 40) + 4 * (30 + 1)


def test_batches_come_in_order_and_faults_where_they_are_wanted():
    def fetch(step):
        if step == 3:
            raise ValueError('lost')
        return 10 * step

    got = []
    with pytest.raises(ValueError, match='lost'):
        for step, batch in train.ahead(fetch, range(1, 6)):
            got.append((step, batch))
    assert got == [(1, 10), (2, 20)]
    with pytest.raises(SystemExit, match='no batch for 0 s: is the disk'):
        list(train.ahead(lambda step: time.sleep(5), range(2), patience=.05))


# ---------------------------------------------------------------------------------------------------------------------
# two processes

def as_one_of_two(rank, folder, port, flags):
    """Train under the environment that torchrun sets, then leave one's weights in folder/rank.pt."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    os.chdir(folder)
    torch.set_num_threads(1)
    a = train.knobs().parse_args(flags.split())
    train.settle(a)
    train.join(a)
    objective = train.train(a, Path(a.out))
    torch.save(dict(objective.named_parameters()), f'{a.out}_{rank}.pt')
    torch.distributed.destroy_process_group()
    os._exit(0)                                                  # as at the end of train.py


def averaged_gradient(rank, folder, port):
    """The gradient under DistributedDataParallel on one half of a batch, BatchNorm's statistics fixed and no dropout."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    torch.distributed.init_process_group('gloo')
    objective, batch = still_supervised(folder, (rank, 2))
    parallel = train.distribute(objective)
    parallel(batch)[0].backward()
    if not rank:
        torch.save([p.grad for p in objective.parameters()], f'{folder}/gradient.pt')
    torch.distributed.destroy_process_group()
    os._exit(0)                                                  # as at the end of train.py


def still_supervised(folder, share):
    """A supervised objective in eval mode, which draws nothing at random, and its share of a batch."""
    os.chdir(folder)
    ds = data.Dataset('synthetic')
    torch.manual_seed(0)
    objective = train.OBJECTIVES['supervised'](train.Encoder(train.sized('s4', 'tiny')), columns=range(6)).eval()
    return objective, ds.batch(ds.split()[0], 600, 8, 0, 0, share)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


@pytest.mark.parametrize('objective', ['cpc', 'dinosr'])
def test_two_processes_hold_the_same_weights(here, objective):
    flags = f'--objective {objective} --steps 3 --batch 8 --layers 2 --probe-every 0 --out out/two_{objective}'
    torch.multiprocessing.spawn(as_one_of_two, (str(here), free_port(), flags), 2)
    a, b = (load(here / f'out/two_{objective}_{rank}.pt') for rank in (0, 1))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    c = load(here / f'out/two_{objective}/ckpt.pt')
    assert c['step'] == 3 and all(torch.equal(c['state'][k], a[k]) for k in a)


def test_torchrun_trains_and_resumes(here):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(ROOT / 'train.py')]
    flags = '--steps 4 --batch 8 --layers 1 --save-every 2 --probe-every 2 --out out/run'.split()
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0 and done.stdout.count('4 steps of 8 crops') == 1, done.stderr
    assert load(here / 'out/run/ckpt.pt')['step'] == 4 and load(here / 'out/run/ckpt.pt')['world'] == 2
    with pytest.raises(SystemExit, match='begun with 2 processes, not 1'):
        train.main('--resume --out out/run'.split())


def test_growth_draws_what_it_measured(here, monkeypatch):
    monkeypatch.setattr(train, 'GROWTH', {'batch': (2, 4), 'records': (100,)})
    train.main('--benchmark growth'.split())
    table = list(csv.DictReader(open('out/growth.csv')))
    assert [(r['axis'], r['value']) for r in table] == [('batch', '2'), ('batch', '4'), ('records', '100')]
    assert all(float(r['ms']) > 0 for r in table) and Path('out/growth.png').exists()


def test_averaged_gradient_is_that_of_the_joint_batch(here):
    torch.multiprocessing.spawn(averaged_gradient, (str(here), free_port()), 2)
    objective, batch = still_supervised(here, (0, 1))
    objective(batch)[0].backward()
    for p, g in zip(objective.parameters(), load(here / 'gradient.pt'), strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-4, atol=1e-7)


def test_shares_make_up_the_batch(here):
    ds = data.Dataset('synthetic')
    whole, *parts = (ds.batch(ds.split()[0], 600, 8, 0, 5, share) for share in ((0, 1), (0, 2), (1, 2)))
    for k in ('x', 'y'):
        np.testing.assert_array_equal(whole[k][0::2], parts[0][k])
        np.testing.assert_array_equal(whole[k][1::2], parts[1][k])
