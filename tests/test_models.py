"""Encoders against explicit sums, closed forms and published parameter counts."""
import math
import pickle

import pytest
import torch
from torch import nn

import models
from models import (CHUNK, LAYERS, AttentionPool, Config, Encoder, S4, S4Block, TransformerBlock, convolve, convolve_chunks, discretise, learning_rate, legs,
                    load, load_encoder, parameters, rotate, save, see_data, stem, tied_dropout)


def make_s4(causal, seed=0, dim=6):
    torch.manual_seed(seed)
    return S4(dim, causal=causal).double()


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
    assert (convolve_chunks(u, s4.C[0], s4.dynamics(s4.chunk_parts)) - y).abs().max() < 1e-10


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
    assert (s4.mix(u) - y).abs().max() < 1e-10


def test_fp32_convolution_stays_close():
    s4 = S4(16)
    u = torch.randn(16, 4, 300)
    exact = convolve(u.double(), s4.double().kernel(300))
    s4.float()
    assert (convolve(u, s4.kernel(300)) - exact).abs().max() < 1e-4
    assert (s4.mix(u) - exact).abs().max() < 1e-4


def test_autocast_leaves_the_convolution_alone():
    s4, u = S4(16), torch.randn(16, 4, 60)
    with torch.autocast('cpu', torch.bfloat16):
        low = s4.mix(u)
    assert low.dtype == torch.float32 and torch.equal(low, s4.mix(u))


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
    a, b = encoder({'x': x}), encoder({'x': y})
    assert (a[:, :60] - b[:, :60]).abs().max() < 1e-5
    assert (a[:, 60:] - b[:, 60:]).abs().max() > 1e-2
    two_way = Encoder(Config(dim=16, causal=False)).eval()
    assert (two_way({'x': x})[:, :60] - two_way({'x': y})[:, :60]).abs().max() > 1e-2


def test_published_parameter_counts():
    assert parameters(stem(12, 512)) == 808_960
    assert parameters(S4Block(512, 8, True, .2)) == 530_944
    assert parameters(S4Block(512, 8, False, .2)) == 535_040
    assert parameters(Encoder(Config(dim=512, causal=True))) == 2_932_736
    assert parameters(Encoder(Config(dim=512, causal=False))) == 2_949_120
    assert parameters(Encoder(Config(dim=512))) + parameters(AttentionPool(512, 71)) == 3_756_032


@pytest.mark.parametrize('samples, tokens', [(600, 300), (601, 301), (2400, 1200)])
def test_token_counts(samples, tokens):
    z, pad = Encoder(Config(dim=8)).tokens({'x': torch.randn(1, 12, samples)})
    assert z.shape == (1, tokens, 8) and pad is None and z.min() >= 0


@pytest.mark.parametrize('backbone, count', [('transformer', 19_724_288), ('net1d', 10_487_424)])
def test_other_backbones(backbone, count):
    assert parameters(Encoder(Config(backbone, 512, LAYERS[backbone]))) == count
    x = torch.randn(2, 12, 200)
    y = x.clone()
    y[:, :, 120:] += 1
    for causal in (True, False):
        torch.manual_seed(0)
        encoder = Encoder(Config(backbone, 64, 2, causal=causal)).eval()
        a, b = encoder({'x': x}), encoder({'x': y})
        early = (a[:, :60] - b[:, :60]).abs().max()
        assert (early < 1e-6 if causal else early > 1e-4) and (a[:, 60:] - b[:, 60:]).abs().max() > 1e-3 and a.shape == (2, 100, 64)


def test_rotary_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, dtype=torch.float64).expand(1, 1, 40, 16) for _ in range(2))
    s = (rotate(q) @ rotate(k).transpose(2, 3))[0, 0]
    assert torch.allclose(s.diagonal(3), s[0, 3].expand(37)) and torch.allclose(s.diagonal(), (q[0, 0, 0] @ k[0, 0, 0]).expand(40))


def test_transformer_block_equals_torch_attention():
    torch.manual_seed(0)
    block, x = TransformerBlock(32, causal=False, dropout=0., heads=4), torch.randn(2, 9, 32)
    trusted = nn.MultiheadAttention(32, 4, batch_first=True)
    trusted.in_proj_weight.data = torch.cat([block.q.weight, block.k.weight, block.v.weight])
    trusted.in_proj_bias.data = torch.cat([block.q.bias, block.k.bias, block.v.bias])
    trusted.out_proj.load_state_dict(block.out.state_dict())
    models.rotate, kept = lambda x: x, models.rotate             # torch's has no rotary positions
    try:
        assert torch.allclose(block.attention(x), trusted(x, x, x)[0], atol=1e-5)
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
