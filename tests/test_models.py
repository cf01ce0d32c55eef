"""Encoders against explicit sums, closed forms and published parameter counts."""
import math
import pickle

import pytest
import torch
from torch import nn

import torch.nn.functional as F

import models
from models import (CHUNK, SIZES, AttentionPool, Config, Encoder, MeanPool, ResNetBlock, S4, S4Block, S4D, Stem, TransformerBlock, convolve, convolve_chunks, convolve_toeplitz,
                    cut_beats, discretise, drop_path, groups, learning_rate, legs, load, load_encoder, parameters, pool, regularise, rotate, save, see_data, sized, tied_dropout)


def make_s4(causal, seed=0, dim=6):
    torch.manual_seed(seed)
    return S4(dim, causal=causal).double()


def test_s4d_convolution_equals_recurrence():
    torch.manual_seed(0)
    s4d, u = S4D(6).double(), torch.randn(6, 3, 50, dtype=torch.float64)
    A, C = torch.complex(-s4d.a.exp(), s4d.w), torch.view_as_complex(s4d.C.detach())[0]
    Abar = (A * s4d.log_step.exp()[:, None]).exp()
    Bbar = (Abar - 1) / A
    x, y = torch.zeros(6, 3, 4, dtype=torch.complex128), []
    for t in range(50):
        x = Abar[:, None] * x + Bbar[:, None] * u[:, :, t, None]
        y.append(2 * (C[:, None] * x).sum(2).real)
    assert (s4d(u) - torch.stack(y, 2)).abs().max() < 1e-10
    assert torch.allclose(A.imag[0], math.pi * torch.arange(4.).double()) and torch.allclose(A.real, torch.tensor(-.5).double())


def test_legs_eigenvalues():
    A, _ = legs(8)
    P = (torch.arange(8, dtype=torch.float64) + .5).sqrt()
    assert torch.allclose(torch.linalg.eigvals(A).real.sort().values, -torch.arange(8., 0, -1, dtype=torch.float64), atol=1e-6)
    skew = A + torch.outer(P, P) + torch.eye(8) / 2
    assert torch.allclose(skew, -skew.T, atol=1e-12)


@pytest.mark.parametrize('L', [7, CHUNK, 300])
def test_convolution_equals_recurrence(L):
    s4 = make_s4(causal=True)
    u = torch.randn(6, 3, L, dtype=torch.float64)
    Abar, Bbar = discretise(s4.log_dt, 8)
    x, ys = torch.zeros(6, 3, 8, dtype=torch.float64), []
    for t in range(L):
        x = torch.einsum('hnm,hbm->hbn', Abar, x) + Bbar[:, None] * u[:, :, t, None]
        ys.append((s4.C[0][:, None] * x).sum(2))
    y = torch.stack(ys, 2)
    assert (convolve(u, s4.kernel(L)) - y).abs().max() < 1e-10
    assert (convolve_toeplitz(u, s4.kernel(L)) - y).abs().max() < 1e-10
    assert (convolve_chunks(u, s4.C, s4.dynamics(s4.chunk_parts)) - y).abs().max() < 1e-10


def test_bidirectional_equals_double_sum():
    L, s4 = 40, make_s4(causal=False)
    u, k = torch.randn(6, 2, L, dtype=torch.float64), s4.kernel(L)
    y = torch.zeros_like(u)
    for t in range(L):
        for j in range(L):
            if t - j >= 0:
                y[:, :, t] += k[0, :, j, None] * u[:, :, t - j]
            if t + 1 + j < L:
                y[:, :, t] += k[1, :, j, None] * u[:, :, t + 1 + j]
    assert (convolve(u, k) - y).abs().max() < 1e-10
    assert (convolve_toeplitz(u, k) - y).abs().max() < 1e-10
    assert (s4(u) - y).abs().max() < 1e-10


def test_gradients_of_the_convolution():
    u, k = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(convolve, (u, k)) and torch.autograd.gradcheck(convolve, (u, k[:1]))
    assert torch.autograd.gradcheck(convolve_toeplitz, (u, k)) and torch.autograd.gradcheck(convolve_toeplitz, (u, k[:1]))
    s4 = make_s4(causal=False)
    u = torch.randn(6, 2, 30, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, C: convolve_chunks(u, C, s4.dynamics(s4.chunk_parts)), (u, s4.C))


def test_fp32_convolution_stays_close():
    s4 = S4(16)
    u = torch.randn(16, 4, 300)
    exact = convolve(u.double(), s4.double().kernel(300))
    s4.float()
    assert (convolve(u, s4.kernel(300)) - exact).abs().max() < 1e-4
    assert (s4(u) - exact).abs().max() < 1e-4


def test_autocast_leaves_the_convolution_alone():
    s4, u = S4(16), torch.randn(16, 4, 60)
    with torch.autocast('cpu', torch.bfloat16):
        low = s4(u)
    assert low.dtype == torch.float32 and torch.equal(low, s4(u))


def test_half_the_rate_is_half_the_lag():
    s4 = make_s4(causal=True)
    s4.log_dt.fill_(math.log(1e-3))
    slow = s4.kernel(100)[0]
    s4.log_dt.fill_(math.log(2e-3))
    assert torch.allclose(s4.kernel(50)[0], slow[:, ::2] + slow[:, 1::2], atol=1e-5)


def test_causal_encoder_is_blind_to_the_future():
    torch.manual_seed(0)
    encoder = Encoder(Config(dim=16, causal=True)).eval()
    x = torch.randn(2, 12, 200)
    y = x.clone()
    y[:, :, 120:] += 1                                           # token 60 sees samples 119 to 121
    a, b = encoder({'x': x})[0], encoder({'x': y})[0]
    assert (a[:, :60] - b[:, :60]).abs().max() < 1e-5
    assert (a[:, 60:] - b[:, 60:]).abs().max() > 1e-2
    two_way = Encoder(Config(dim=16, causal=False)).eval()
    assert (two_way({'x': x})[0][:, :60] - two_way({'x': y})[0][:, :60]).abs().max() > 1e-2


def test_published_parameter_counts():
    assert parameters(Stem(12, 512)) == 808_960
    assert parameters(S4Block(512, 8, True, .2)) == 530_944
    assert parameters(S4Block(512, 8, False, .2)) == 535_040
    assert parameters(Encoder(Config(dim=512, causal=True))) == 2_932_736
    assert parameters(Encoder(Config(dim=512, causal=False))) == 2_949_120
    assert parameters(Encoder(Config(dim=512))) + parameters(AttentionPool(512, 71)) == 3_756_032


def test_stem_as_products_equals_its_convolutions():
    torch.manual_seed(0)
    stem, x = Stem(12, 8), torch.randn(3, 12, 61)
    assert torch.allclose(stem(dict(x=x))[0], nn.Sequential.forward(stem, x).transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize('samples, tokens', [(600, 300), (601, 301), (2400, 1200)])
def test_token_counts(samples, tokens):
    z, pad = Encoder(Config(dim=8)).tokens({'x': torch.randn(1, 12, samples)})
    assert z.shape == (1, tokens, 8) and pad is None and z.min() >= 0


@pytest.mark.parametrize('backbone', ['s4', 's4d', 'transformer', 'net1d'])
def test_causal_backbones_are_blind_to_the_future(backbone):
    x = torch.randn(2, 12, 200)
    y = x.clone()
    y[:, :, 120:] += 1
    for causal in (True, False):
        torch.manual_seed(0)
        encoder = Encoder(sized(backbone, 'tiny', causal)).eval()
        a, b = encoder({'x': x})[0], encoder({'x': y})[0]
        early = (a[:, :60] - b[:, :60]).abs().max()
        assert (early < 1e-5 if causal else early > 1e-4) and (a[:, 60:] - b[:, 60:]).abs().max() > 1e-3 and a.shape == (2, 100, encoder.dim)


def test_published_counts_of_other_backbones():
    """2605.12241's code, HeartLang's trunk, and the ladders of 2605.17276's Table S.4 (beats of 96 samples at 100 Hz)."""
    assert parameters(Encoder(sized('transformer', 'released'))) == 19_724_288
    assert parameters(Encoder(sized('net1d', 'released'))) == 10_487_424
    assert parameters(S4Block(512, 8, True, .2, S4D)) == 535_552 and parameters(S4Block(512, 64, True, .2, S4D)) == 592_896
    assert parameters(Encoder(sized('beat', 'released', fs=100))) == 38_262_528
    ladders = {'resnet': {'3x24': 27_376, '3x48': 105_824, '4x64': 231_008, '4x90': 455_681, '4x128': 916_160, '5x226': 3_430_809, '5x320': 6_865_536,
                          '6x452': 16_050_959, '6x640': 32_158_083, '7x1024': 94_481_086},
               'beat': {'1x24': 24_936, '1x48': 71_376, '1x96': 179_616, '2x128': 601_216, '3x192': 1_591_872, '3x256': 2_515_712, '4x348': 5_516_844,
                        '5x420': 11_621_820, '6x512': 19_202_560, '8x768': 50_839_296}}
    with torch.device('meta'):                                   # shapes without memory
        for backbone, ladder in ladders.items():
            assert ladder.keys() == SIZES[backbone].keys() - {'tiny', 'small', 'base', 'released'}
            for rung, count in ladder.items():
                assert parameters(Encoder(sized(backbone, rung, fs=100))) == count


@pytest.mark.parametrize('size', ['tiny', 'small', 'base'])
def test_sizes_match_in_parameters(size):
    s4 = parameters(Encoder(sized('s4', size)))
    for backbone in SIZES:
        assert parameters(Encoder(sized(backbone, size))) == pytest.approx(s4, rel=.1), backbone


def test_unknown_size_is_one_line():
    with pytest.raises(SystemExit, match='s4 has no size 5x320: take one of tiny'):
        sized('s4', '5x320')


def test_resnet_block_equals_its_parts():
    """Against plain torch layers with Ribeiro's padding, floor((17 - stride + 1) / 2), where the stride divides the length."""
    torch.manual_seed(0)
    block, x = ResNetBlock(6, 8, 4, .2, first=False).eval(), torch.randn(3, 64, 6)
    block.enter.norm.running_mean.normal_()
    y = x.transpose(1, 2)
    h = F.relu(block.enter.norm(y))
    h = F.relu(block.middle.norm(F.conv1d(h, block.conv1.weight, padding=8)))
    s = F.conv1d(h, block.conv2.weight, stride=4, padding=7) + F.conv1d(F.max_pool1d(y, 4), block.skip.weight)
    assert torch.allclose(block(x)[0], s.transpose(1, 2), atol=1e-5)
    assert Encoder(sized('resnet', '5x226'))({'x': torch.randn(1, 12, 601)})[0].shape == (1, 3, 226)          # 601, 151, 38, 10, 3


def test_beats_reassemble_the_signal():
    """Laid back where they came from, beats cover the signal once from half a beat before the first peak to half a beat after the last."""
    torch.manual_seed(0)
    x, peaks = torch.randn(2, 3, 700), torch.tensor([[90, 250, 400, 610], [130, 330, -1, -1]])
    beats = cut_beats(x, peaks, 230)
    assert beats.shape == (2, 3, 4, 230) and not beats[1, :, 2:].any()
    for b in range(2):
        y, count = torch.zeros(3, 1000), torch.zeros(1000)
        for p, beat in zip(peaks[b].tolist(), beats[b].transpose(0, 1)):
            if p >= 0:
                assert torch.equal(beat[:, 115], x[b, :, p])     # the peak sits in the middle
                y[:, 150 + p - 115:150 + p + 115] += beat
                count[150 + p - 115:150 + p + 115] += beat.ne(0).any(0)
        y, count = y[:, 150:850], count[150:850]
        assert count.max() == 1 and torch.equal(y, x[b] * count)
        assert (count[max(0, peaks[b, 0] - 115):peaks[b, 0] + 80] == 1).all()
    long = cut_beats(x, torch.tensor([[350], [350]]), 230)[0, :, 0]
    assert torch.equal(long, x[0, :, 235:465])


def test_padded_beats_change_nothing():
    torch.manual_seed(0)
    encoder, x = Encoder(sized('beat', 'small')).eval(), torch.randn(2, 12, 2400)
    peaks = torch.tensor([[300, 600, -1, -1], [200, 400, 700, 900]])
    _, pad = encoder(dict(x=x, peaks=peaks))
    assert pad.sum(1).tolist() == [24, 0] and not pad[:, 0].any()
    z, zpad = encoder.tokens(dict(x=x, peaks=peaks))
    noisy = z.clone()
    noisy[zpad] = 100.
    assert torch.allclose(pool(encoder.backbone(z, zpad), zpad), pool(encoder.backbone(noisy, zpad), zpad), atol=1e-5)
    assert torch.isfinite(encoder(dict(x=x, peaks=torch.full((2, 0), -1)))[0]).all()                          # no beat at all


def test_beats_do_not_depend_on_their_batch():
    torch.manual_seed(0)
    encoder, x = Encoder(sized('beat', 'tiny')).eval(), torch.randn(2, 12, 2400)
    peaks = torch.tensor([[300, 600, 1000, -1, -1, -1], [200, 400, 700, 900, 1200, 1500]])
    alone, among = pool(*encoder(dict(x=x[:1], peaks=peaks[:1, :3]))), pool(*encoder(dict(x=x, peaks=peaks)))[:1]
    assert torch.allclose(alone, among, atol=1e-5)


def test_visible_patches_are_the_rows_of_all():
    torch.manual_seed(0)
    encoder, batch = Encoder(sized('vit', 'tiny')), {'x': torch.randn(3, 12, 600)}
    keep = torch.rand(3, 50).argsort(1) < 20
    every, some = encoder.tokens(batch)[0], encoder.tokens(batch, keep)[0]
    assert every.shape == (3, 51, 32) and some.shape == (3, 21, 32)
    for b in range(3):
        assert torch.equal(some[b, 1:], every[b, 1:][keep[b]])
    p = encoder.stem.patches(batch)
    assert torch.equal(p[1, 7].view(12, 12), batch['x'][1, :, 84:96])                                        # 50 ms are 12 samples


def test_pools_leave_padding_out():
    torch.manual_seed(0)
    h, pad = torch.randn(2, 9, 32), torch.zeros(2, 9, dtype=torch.bool)
    pad[0, 5:] = True
    for head in (MeanPool(32, 4), AttentionPool(32, 4)):
        assert torch.allclose(head(h, pad)[0], head(h[:1, :5])[0], atol=1e-6) and torch.allclose(head(h, pad)[1], head(h)[1], atol=1e-6)


def test_dropout_of_the_mean_token():
    torch.manual_seed(0)
    h, plain, head = torch.ones(20_000, 1, 1), MeanPool(1, 1), MeanPool(1, 1, .3)
    head.load_state_dict(plain.state_dict())
    assert torch.equal(head.eval()(h), plain(h))
    dropped = (head.train()(h) - plain.out.bias).detach() / plain.out.weight
    assert torch.allclose(dropped[dropped != 0], torch.tensor(1 / .7)) and (dropped == 0).any()
    assert abs(dropped.mean() - 1) < 4 * (.3 / .7 / 20_000) ** .5


def test_dynamics_have_their_own_rate_and_no_decay():
    encoder = Encoder(sized('s4d', 'tiny'))
    rest, dynamics = groups(encoder, .01, .1)
    assert (rest['peak'], rest['weight_decay'], dynamics['peak'], dynamics['weight_decay']) == (.01, .1, .001, 0)
    assert len(dynamics['params']) == 3 * 4 and sum(p.numel() for g in (rest, dynamics) for p in g['params']) == parameters(encoder)
    assert len(groups(Encoder(sized('s4', 'tiny')), .01)) == 1


def test_rotary_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, dtype=torch.float64).expand(1, 1, 40, 16) for _ in range(2))
    turned = torch.stack([torch.complex(q[0, 0, t, :8], q[0, 0, t, 8:]) * torch.polar(torch.ones(8).double(), t * 10000. ** (-torch.arange(8) / 8).double())
                          for t in range(40)])
    assert torch.allclose(rotate(q)[0, 0], torch.cat([turned.real, turned.imag], 1), atol=1e-6)
    s = (rotate(q) @ rotate(k).transpose(2, 3))[0, 0]
    assert torch.allclose(s.diagonal(3), s[0, 3].expand(37)) and torch.allclose(s.diagonal(), (q[0, 0, 0] @ k[0, 0, 0]).expand(40))


def test_transformer_block_equals_torch_attention():
    torch.manual_seed(0)
    block, x = TransformerBlock(32, 64, 4, dropout=0.), torch.randn(2, 9, 32)
    trusted = nn.MultiheadAttention(32, 4, batch_first=True)
    trusted.in_proj_weight.data = torch.cat([block.q.weight, block.k.weight, block.v.weight])
    trusted.in_proj_bias.data = torch.cat([block.q.bias, block.k.bias, block.v.bias])
    trusted.out_proj.load_state_dict(block.out.state_dict())
    models.rotate, kept = lambda x: x, models.rotate             # torch's has no rotary positions
    try:
        pad = torch.arange(9) > torch.tensor([[8], [5]])
        assert torch.allclose(block.attention(x), trusted(x, x, x)[0], atol=1e-5)
        assert torch.allclose(block.attention(x, pad), trusted(x, x, x, key_padding_mask=pad)[0], atol=1e-5)
    finally:
        models.rotate = kept


def test_post_norm_and_branches():
    torch.manual_seed(0)
    encoder, layers = Encoder(Config(dim=16)).eval(), []
    z, pad = encoder.tokens({'x': torch.randn(2, 12, 100)})
    h = encoder.backbone(z, pad, layers)
    assert len(layers) == 4 and torch.equal(layers[-1][1], h)
    block, before = encoder.blocks[3], layers[2][1]
    assert torch.equal(block.norm(before + layers[3][0]), h)


def test_dropout_is_tied_over_tokens():
    torch.manual_seed(0)
    y = tied_dropout(torch.ones(40, 7, 50), .2, True, 1)
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert set(y.unique().tolist()) == {0, 1.25} and abs((y == 0).float().mean() - .2) < .03
    x = torch.randn(2, 3, 4)
    assert torch.equal(tied_dropout(x, .2, False, 1), x)


def test_stochastic_depth_keeps_the_expectation():
    """A branch goes or comes whole, record by record, with its mean kept: within four standard errors over 20,000 draws."""
    torch.manual_seed(0)
    p, x = .3, torch.tensor([2., -1.]).expand(20_000, 5, 2)
    y = drop_path(x, p, True)
    assert torch.equal(y, y[:, :1].expand_as(y)) and torch.allclose(y[:, 0], x[:, 0] / (1 - p) * (y[:, 0, :1] != 0))
    error = x[0, 0].abs() * (p / (1 - p) / 20_000) ** .5         # a draw's variance is x^2 p / (1 - p)
    assert ((y[:, 0].mean(0) - x[0, 0]).abs() < 4 * error).all() and abs((y[:, 0, 0] == 0).float().mean() - p) < 4 * (p * (1 - p) / 20_000) ** .5
    assert drop_path(x, p, False) is x and drop_path(x, 0., True) is x


@pytest.mark.parametrize('backbone', ['s4', 's4d', 'transformer', 'net1d', 'resnet', 'beat', 'vit'])
def test_stochastic_depth_grows_over_the_blocks(backbone):
    torch.manual_seed(0)
    encoder, batch = Encoder(sized(backbone, 'tiny', layers=None if backbone in ('net1d', 'resnet') else 4)), dict(x=torch.randn(2, 12, 600), peaks=torch.tensor([[100, 300, 500]] * 2))
    plain = encoder.eval()(batch)[0]
    regularise(encoder, .4, 0.)
    paths = [b.path for b in encoder.blocks if hasattr(b, 'path')]
    assert paths == pytest.approx([.4 * i / (len(paths) - 1) for i in range(len(paths))]) and len(paths) >= 3
    assert torch.equal(encoder(batch)[0], plain)                 # not in eval mode
    regularise(encoder)
    assert [b.path for b in encoder.blocks if hasattr(b, 'path')] == paths
    block, (z, _) = encoder.blocks[-1], encoder.tokens(batch)
    for before in encoder.blocks[:-1]:
        z = before(z, None)[0]

    def learning(path, training):
        """How many tensors of the last block get a gradient."""
        block.path = path
        block.zero_grad()
        block.train(training)(z.detach(), None)[0].square().sum().backward()
        return sum(q.grad is not None and bool(q.grad.abs().sum() > 0) for q in block.parameters())
    assert learning(1., True) <= learning(0., True) / 2 and learning(1., False) == learning(0., False)      # every branch of it can go, in train mode


def test_attention_pool_equals_explicit_attention():
    torch.manual_seed(0)
    pool, h = AttentionPool(32, 5, heads=4), torch.randn(3, 20, 32)
    q, k, v = pool.q(pool.query).view(4, 8), pool.k(h).view(3, 20, 4, 8), pool.v(h).view(3, 20, 4, 8)
    weight = (torch.einsum('hs,blhs->bhl', q, k) / 8 ** .5).softmax(2)
    assert torch.allclose(pool(h), pool.out(torch.einsum('bhl,blhs->bhs', weight, v).flatten(1)), atol=1e-5)


def test_schedule():
    assert learning_rate(0, 1000, 1.) == pytest.approx(1 / 50) and learning_rate(49, 1000, 1.) == 1
    assert learning_rate(525, 1000, 1.) == pytest.approx(.5) and learning_rate(1000, 1000, 1.) == pytest.approx(0)
    assert learning_rate(999, 1000, 1., 'constant') == 1


def test_random_encoder_has_seen_data():
    torch.manual_seed(0)
    encoder, batches = Encoder(Config(dim=8)), [{'x': 3 + torch.randn(4, 12, 60)} for _ in range(3)]
    weights = [p.clone() for p in encoder.parameters()]
    see_data(encoder, batches)
    first = torch.stack([encoder.stem[0](b['x']) for b in batches])
    assert torch.allclose(encoder.stem[1].running_mean, first.mean((0, 1, 3)), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(weights, encoder.parameters())) and not encoder.training


def test_a_device_that_fails_is_named(monkeypatch):
    def broken(*shape, device):
        raise RuntimeError('no driver')

    monkeypatch.setattr(torch, 'zeros', broken)
    with pytest.raises(SystemExit, match=r'device (cpu|cuda) cannot be used here \(no driver\): take --device cpu'):
        models.pick_device()
    with pytest.raises(SystemExit, match='device cpu cannot be used here .*: leave --device out, or take cpu'):
        models.pick_device('cpu')


def test_checkpoint_round_trip(tmp_path):
    encoder = Encoder(Config(dim=8))
    save(tmp_path / 'c.pt', dict(config=vars(encoder.config), encoder=encoder.state_dict()))
    again = load_encoder(load(tmp_path / 'c.pt'))
    assert all(torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), again.state_dict().values()))
    assert [f.name for f in tmp_path.iterdir()] == ['c.pt']


def test_checkpoint_must_match_exactly():
    encoder = Encoder(Config(dim=8))
    state = encoder.state_dict()
    for wrong in ({**state, 'extra': torch.zeros(1)}, dict(list(state.items())[:-1])):
        with pytest.raises(RuntimeError, match='extra|Missing'):
            load_encoder(dict(config=vars(encoder.config), encoder=wrong))


class Bomb:
    def __reduce__(self):
        return print, ('boom',)


def test_damaged_and_hostile_checkpoints_are_refused(tmp_path, capsys):
    path = tmp_path / 'c.pt'
    with pytest.raises(ValueError, match='no checkpoint'):
        load(path)
    torch.save({'a': Bomb()}, path)
    with pytest.raises(ValueError, match='cannot be read'):
        load(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match='cannot be read'):
        load(path)
    torch.save({'a': torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match='cannot be read'):
        load(path)
    assert 'boom' not in capsys.readouterr().out
