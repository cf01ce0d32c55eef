"""Encoders against explicit sums, closed forms and published parameter counts."""
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from data import Dataset
from models import (S4, S4D, SIZES, AttentionPool, Block, Encoder, MeanPool, ResNetBlock, S4Block,
                    Stem, TransformerBlock, calibrate_batchnorm, config_of, count_parameters,
                    cut_beats, discretise, drop_path, fft_conv, learning_rate, legs, load,
                    load_encoder, mean_pool, net1d, parameter_groups, pick_device, rotate,
                    save, set_regularisation, tied_dropout, toeplitz_conv)
from scaling import flops, step_cost


def close(a, b, atol=1e-5):
    return torch.allclose(a, b, atol=atol, rtol=0)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def noise(B, T):
    return {'x': torch.randn(B, 12, T)}


def make(backbone, size='tiny', **options):
    torch.manual_seed(0)
    return Encoder(config_of(backbone, size, **options)).eval()


# --- S4

def test_legs_eigenvalues():
    A, _ = legs(8)
    P = (torch.arange(8).double() + .5).sqrt()
    assert close(torch.linalg.eigvals(A).real.sort().values, torch.arange(-8, 0).double(), 1e-6)
    skew = A + torch.outer(P, P) + torch.eye(8) / 2
    assert close(skew, -skew.T, 1e-12)


@pytest.mark.parametrize('kind', [S4, S4D])
def test_convolution_equals_recurrence(kind):
    """x_t = Abar x_{t-1} + Bbar u_t, y_t = C x_t + D u_t."""
    torch.manual_seed(0)
    s4, u, y = kind(6).double(), double(6, 3, 50), []
    if kind is S4:
        (Abar, Bbar), C = discretise(s4.log_dt, 8), s4.C[0]
    else:
        A = torch.complex(-s4.a.exp(), s4.w)
        assert close(A[0], 1j * math.pi * torch.arange(4).double() - .5, 1e-6)
        decay = (A * s4.log_step.exp()[:, None]).exp()
        Abar, Bbar, C = decay.diag_embed(), (decay - 1) / A, 2 * torch.view_as_complex(s4.C)[0]
    x = torch.zeros(6, 3, C.shape[1], dtype=C.dtype)
    for t in range(50):
        x = torch.einsum('hnm,hbm->hbn', Abar, x) + Bbar[:, None] * u[:, :, t, None]
        y.append((C[:, None] * x).sum(2).real + s4.D[:, None] * u[:, :, t])
    assert close(s4(u), torch.stack(y, 2), 1e-10)


@pytest.mark.parametrize('causal', [True, False])
def test_both_convolutions_equal_a_double_sum(causal, monkeypatch):
    """With the gradients of u, C and D. D u is lag 0."""
    torch.manual_seed(0)
    s4, u, weight = S4(6, causal=causal).double(), double(6, 2, 30), double(6, 2, 30)
    k, y = s4.kernel(30)[..., None], []
    for t in range(30):
        past = sum(k[0, :, t - j] * u[:, :, j] for j in range(t + 1))
        ahead = sum(k[1, :, j - t - 1] * u[:, :, j] for j in range(t + 1, 30) if not causal)
        y.append(past + ahead + s4.D[:, None] * u[:, :, t])

    def with_gradients(y):
        return [y, *torch.autograd.grad((y * weight).sum(), [u, s4.C, s4.D])]

    expected = with_gradients(torch.stack(y, 2))
    for convolution in (fft_conv, toeplitz_conv):
        monkeypatch.setattr('models.long_conv', convolution)
        assert all(close(a, b, 1e-10) for a, b in zip(with_gradients(s4(u)), expected))


def test_convolution_stays_in_fp32():
    torch.manual_seed(0)
    s4, u = S4(16, causal=False), torch.randn(16, 4, 300)
    y = s4(u)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(s4(u), y)
    assert close(y.double(), s4.double()(u.double()), 1e-4)


def test_half_the_rate_is_half_the_lag():
    torch.manual_seed(0)
    s4 = S4(6).double()
    s4.log_dt.fill_(math.log(1e-3))
    slow = s4.kernel(100)[0]
    s4.log_dt.fill_(math.log(2e-3))
    assert close(s4.kernel(50)[0], slow[:, ::2] + slow[:, 1::2])


def test_post_norm_and_branches():
    encoder, layers = make('s4'), []
    h = encoder.backbone(encoder.tokens(noise(2, 100))[0], None, layers)
    assert len(layers) == 4 and torch.equal(layers[3][1], h)
    assert torch.equal(encoder.blocks[3].norm(layers[2][1] + layers[3][0]), h)


# --- all backbones

@pytest.mark.parametrize('backbone', ['s4', 's4d', 'transformer', 'net1d'])
def test_causal_backbones_are_blind_to_the_future(backbone):
    torch.manual_seed(0)
    x = double(2, 12, 200)
    y = x + (torch.arange(200) >= 120)                            # token 60 sees samples 119 to 121
    for causal in (True, False):
        encoder = make(backbone, causal=causal).double()
        change = (encoder({'x': x})[0] - encoder({'x': y})[0]).abs()
        assert change.shape == (2, 100, encoder.dim) and change[:, 60:].max() > 1e-3
        early = change[:, :60].max()
        assert early < 1e-12 if causal else early > 1e-4


def test_published_parameter_counts():
    """Those of 2605.12241's code, of HeartLang's trunk, and of the ladders in Table S.4 of
    2605.17276 (beats of 96 samples at 100 Hz)."""
    ladders = {
        'resnet': (27_376, 105_824, 231_008, 455_681, 916_160, 3_430_809, 6_865_536, 16_050_959,
                   32_158_083, 94_481_086),
        'beat': (24_936, 71_376, 179_616, 601_216, 1_591_872, 2_515_712, 5_516_844, 11_621_820,
                 19_202_560, 50_839_296)}
    with torch.device('meta'):                                    # shapes without memory
        counts = {
            Stem(12, 512): 808_960, S4Block(512, 8, True, .2): 530_944,
            S4Block(512, 8, False, .2): 535_040, S4Block(512, 8, True, .2, S4D): 535_552,
            S4Block(512, 64, True, .2, S4D): 592_896, make('s4', 'released'): 2_949_120,
            make('s4', 'released', causal=True): 2_932_736,
            nn.Sequential(make('s4', 'released', causal=True), AttentionPool(512, 71)): 3_756_032,
            make('transformer', 'released'): 19_724_288, make('net1d', 'released'): 10_487_424,
            make('beat', 'released', fs=100): 38_262_528}
        for backbone, ladder in ladders.items():
            rungs = zip(list(SIZES[backbone])[4:], ladder, strict=True)
            counts |= {make(backbone, rung, fs=100): count for rung, count in rungs}
    assert list(map(count_parameters, counts)) == list(counts.values())


@pytest.mark.parametrize('size', ['tiny', 'small', 'base'])
def test_sizes_match_in_parameters(size):
    counts = [count_parameters(make(backbone, size)) for backbone in SIZES]
    assert counts == pytest.approx([counts[0]] * len(SIZES), rel=.07)     # the first: s4


def test_token_counts():
    for samples, tokens in ((600, 300), (601, 301)):
        z, pad = make('s4').tokens(noise(1, samples))
        assert z.shape == (1, tokens, 64) and pad is None and z.min() >= 0
    h, _ = make('resnet', '5x226')(noise(1, 601))
    assert h.shape == (1, 3, 226)                                 # 601, 151, 38, 10, 3


def test_what_cannot_be_built_or_encoded_is_one_line():
    with pytest.raises(SystemExit, match='^s4 has no size 5x320: take one of tiny, .*4x928$'):
        config_of('s4', '5x320')
    with pytest.raises(TypeError, match=r"a dict: encoder\({'x': x}\), x \(B, leads, T\) in mV"):
        make('s4')(torch.randn(1, 12, 600))


# --- blocks and stems

def test_rotary_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = (double(16).expand(1, 1, 40, 16) for _ in range(2))
    angle = torch.outer(torch.arange(40.), 10000. ** (-torch.arange(8) / 8)).double()
    turned = torch.complex(*q[0, 0].chunk(2, 1)) * torch.polar(torch.ones_like(angle), angle)
    assert close(rotate(q)[0, 0], torch.cat([turned.real, turned.imag], 1), 1e-6)
    s = (rotate(q) @ rotate(k).transpose(2, 3))[0, 0]
    assert close(s.diagonal(3), s[0, 3].expand(37)) and close(s[7, 7], q[0, 0, 0] @ k[0, 0, 0])


def test_transformer_block_equals_torch_attention():
    torch.manual_seed(0)
    block, x = TransformerBlock(32, 64, 4, dropout=0., rotary=False), torch.randn(2, 9, 32)
    trusted, parts = nn.MultiheadAttention(32, 4, batch_first=True), (block.q, block.k, block.v)
    trusted.in_proj_weight.data = torch.cat([part.weight for part in parts])
    trusted.in_proj_bias.data = torch.cat([part.bias for part in parts])
    trusted.out_proj.load_state_dict(block.out.state_dict())
    for pad in (None, torch.arange(9) > torch.tensor([[8], [5]])):
        assert close(block.attention(x, pad), trusted(x, x, x, key_padding_mask=pad)[0])


def test_resnet_block_equals_its_parts():
    """Plain torch layers with Ribeiro's padding, floor((17 - stride + 1) / 2), where the stride
    divides the length."""
    torch.manual_seed(0)
    block, x = ResNetBlock(6, 8, 4, .2, first=False).eval(), torch.randn(3, 64, 6)
    block.enter.norm.running_mean.normal_()
    y = x.transpose(1, 2)
    h = F.conv1d(F.relu(block.enter.norm(y)), block.conv1.weight, padding=8)
    h = F.conv1d(F.relu(block.middle.norm(h)), block.conv2.weight, stride=4, padding=7)
    s = h + F.conv1d(F.max_pool1d(y, 4), block.skip.weight)
    assert close(block(x)[0], s.transpose(1, 2))


def test_beats_equal_a_loop():
    """A beat reaches halfway to its neighbours or to the record's ends, at most half its length."""
    torch.manual_seed(0)
    x, peaks = torch.randn(2, 3, 700), torch.tensor([[90, 250, 400, 610], [130, 330, -1, -1]])
    expected = torch.zeros(2, 3, 4, 230)
    for b, real in enumerate(([90, 250, 400, 610], [130, 330])):
        edges = [0, *((p + q) // 2 for p, q in zip(real, real[1:])), 700]
        for i, p in enumerate(real):
            for t in range(max(edges[i], p - 115), min(edges[i + 1], p + 115)):
                expected[b, :, i, 115 + t - p] = x[b, :, t]
    assert torch.equal(cut_beats(x, peaks, 230), expected)


def test_beats_depend_on_neither_padding_nor_batch():
    encoder, x = make('beat', layers=2), torch.randn(2, 12, 2400)
    peaks = torch.tensor([[300, 600, 1000, -1, -1, -1], [200, 400, 700, 900, 1200, 1500]])
    alone = mean_pool(*encoder(dict(x=x[:1], peaks=peaks[:1, :3])))
    z, pad = encoder.tokens(dict(x=x, peaks=peaks))
    assert pad.sum(1).tolist() == [36, 0] and not pad[:, 0].any()
    for tokens in (z, z.masked_fill(pad[..., None], 100.)):
        assert close(mean_pool(encoder.backbone(tokens, pad), pad)[:1], alone)
    assert encoder(dict(x=x, peaks=peaks[:, :0]))[0].isfinite().all()              # no beat at all


def test_visible_patches_are_the_rows_of_all():
    encoder, batch = make('vit'), noise(3, 600)
    keep = torch.rand(3, 50).argsort(1)[:, :20]
    every, some = encoder.tokens(batch)[0], encoder.tokens(batch, keep)[0]
    assert every.shape == (3, 51, 32) and some.shape == (3, 21, 32)
    assert all(torch.equal(some[b, 1:], every[b, 1:][keep[b]]) for b in range(3))
    patches = encoder.stem.patches(batch)                         # 50 ms are 12 samples
    assert torch.equal(patches[1, 7].view(12, 12), batch['x'][1, :, 84:96])


# --- heads, regularisation, training

def test_pools_equal_their_formulas():
    """Over the tokens that count."""
    torch.manual_seed(0)
    mean, attention, h = MeanPool(32, 5), AttentionPool(32, 5, heads=4), torch.randn(3, 20, 32)
    pad = torch.arange(20) >= torch.tensor([[20], [7], [1]])
    q = attention.q(attention.query).view(4, 8)
    for b, n in enumerate((20, 7, 1)):
        x = h[b, :n]
        k, v = (part(x).view(n, 4, 8) for part in (attention.k, attention.v))
        weight = (torch.einsum('hs,lhs->hl', q, k) / 8 ** .5).softmax(1)
        pooled = torch.einsum('hl,lhs->hs', weight, v).flatten()
        for head, expected in ((mean, mean.out(x.mean(0))), (attention, attention.out(pooled))):
            assert close(head(h, pad)[b], expected) and close(head(x[None])[0], expected)


def head_dropout(x, p, training):
    """What the dropout of MeanPool leaves of tokens that are all the same."""
    head = MeanPool(2, 2, p).train(training)
    head.load_state_dict({'out.weight': torch.eye(2), 'out.bias': torch.zeros(2)})
    return head(x)[:, None].expand_as(x)


@pytest.mark.parametrize('drop', [tied_dropout, drop_path, head_dropout])
def test_dropout_keeps_the_expectation(drop):
    """One decision for all tokens of a record: 0 or 1 / (1 - p), whose mean is 1 within four
    standard errors. Stochastic depth decides for all channels at once, the others for each."""
    torch.manual_seed(0)
    x = torch.ones(20_000, 5, 2)
    y = drop(x, .3, True)
    assert torch.equal(y, y[:, :1].expand_as(y)) and close(y.unique(), torch.tensor([0., 1 / .7]))
    assert close(y[:, 0].mean(0), torch.ones(2), 4 * (.3 / .7 / 20_000) ** .5)
    assert torch.equal(y[..., 0], y[..., 1]) == (drop is drop_path)
    assert torch.equal(drop(x, .3, False), x) and torch.equal(drop(x, 0., True), x)


@pytest.mark.parametrize('backbone', SIZES)
def test_stochastic_depth_grows_over_the_blocks(backbone):
    encoder = make(backbone, layers=4)
    batch = dict(noise(2, 600), peaks=torch.tensor([[100, 300, 500]] * 2))
    plain, blocks = encoder(batch)[0], [b for b in encoder.blocks if isinstance(b, Block)]
    set_regularisation(encoder, .4)
    set_regularisation(encoder, dropout=0.)
    rates = [b.drop_path_rate for b in blocks]
    assert rates == pytest.approx(torch.linspace(0, .4, len(blocks)).tolist())
    assert torch.equal(encoder(batch)[0], plain)                  # not in eval mode
    block, (z, _) = blocks[-1], encoder.tokens(batch)
    for before in encoder.blocks[:-1]:
        z = before(z, None)[0].detach()

    def learning(rate, training):
        """How many tensors of the last block get a gradient."""
        block.drop_path_rate = rate
        block.zero_grad()
        block.train(training)(z, None)[0].square().sum().backward()
        return sum(p.grad is not None and p.grad.any() for p in block.parameters())

    assert learning(1., True) <= learning(0., True) / 2           # every branch of it can go
    assert learning(1., False) == learning(0., False)


def test_dynamics_have_their_own_rate_and_no_decay():
    encoder = make('s4d')
    rest, dynamics = parameter_groups(encoder, .01, .1)
    learned, own = rest.pop('params'), dynamics.pop('params')
    assert rest == dict(peak=.01, weight_decay=.1) and dynamics == dict(peak=.001, weight_decay=0)
    assert len(own) == 3 * 4 and sum(p.numel() for p in learned + own) == count_parameters(encoder)
    assert len(parameter_groups(make('s4'), .01)) == 1


def test_schedule():
    rates = [learning_rate(step, 1000, 1.) for step in (0, 49, 525, 1000)]
    assert rates == pytest.approx([1 / 50, 1, .5, 0])
    assert learning_rate(999, 1000, 1., 'constant') == 1


def test_batchnorm_is_calibrated():
    encoder, batches = make('s4'), [{'x': 3 + torch.randn(4, 12, 60)} for _ in range(3)]
    weights = [p.clone() for p in encoder.parameters()]
    calibrate_batchnorm(encoder, batches)
    x = torch.stack([encoder.stem[0](b['x']) for b in batches])
    assert close(encoder.stem[1].running_mean, x.mean((0, 1, 3))) and not encoder.training
    assert close(encoder.stem[1].running_var, x.var((1, 3)).mean(0))
    assert all(torch.equal(a, b) for a, b in zip(weights, encoder.parameters()))


def test_a_device_that_fails_is_named(monkeypatch):
    def broken(*shape, device):
        raise RuntimeError('no driver')

    monkeypatch.setattr(torch, 'zeros', broken)
    for name in (None, 'cpu'):
        with pytest.raises(SystemExit, match=r'device c.* cannot be used here \(no driver\)'):
            pick_device(name)


# --- cost

def macs(c, T, beats=5):
    """Multiply-accumulates of an encoder of Config c in closed form: (of each crop of T samples,
    of each batch, for S4's kernels). beats: R-peaks in a crop. Norms, activations and biases are
    left out. A real FFT of length n counts 5/2 n log2 n FLOPs, and two FLOPs are one MAC."""
    D, L, patch = c.dim, -(-T // 2), round(.05 * c.fs)
    stem = L * (3 * c.leads * D + 3 * D * D)

    def attention(L, wide):
        return c.layers * (4 * L * D * wide + 2 * L * L * wide + 2 * L * D * c.ffn)

    if c.backbone in ('s4', 's4d'):
        fft = D * 5 / 2 * 2 * L * math.log2(2 * L) / 2
        basis = c.state if c.backbone == 's4' else c.state // 2
        kernel = (1 if c.causal else 2) * D * basis * L + fft
        return stem + c.layers * (2 * fft + 2 * L * D * D), c.layers * kernel
    if c.backbone == 'transformer':
        return stem + attention(L, D), 0
    if c.backbone == 'vit':
        return T // patch * c.leads * patch * D + attention(1 + T // patch, D), 0
    if c.backbone == 'beat':
        beat = round(.96 * c.fs)
        return 3 * c.leads * beats * beat * D + attention(1 + c.leads * beats, 64 * c.heads), 0
    if c.backbone == 'net1d':
        total = stem + L * 16 * D * (D // 8)
        for b in net1d(D, c.layers, c.causal)[1:]:
            i, o, gate = b.conv1.in_channels, b.conv1.out_channels, L if c.causal else 1
            total += L * (i * o + 16 * o * (o // b.conv2.groups) + o * o) + 2 * gate * o * (o // 2)
        return total, 0
    widths = [round(D * i / c.layers) for i in range(1, c.layers + 1)]
    total = 17 * T * c.leads * widths[0]
    for i, (a, b) in enumerate(zip(widths[:1] + widths, widths)):
        short = -(-T // (4 if 0 < i < 5 else 1))
        total += 17 * T * a * b + 17 * short * b * b + (a != b) * short * a * b
        T = short
    return total, 0


def test_flops_equal_products_counted_by_hand():
    """Attention has two products. Norms work element by element."""
    a, b, q = torch.zeros(3, 4, 5), torch.zeros(3, 5, 6), torch.zeros(1, 12, 64, 64)
    conv, x = nn.Conv1d(12, 32, 17, 2, 8), torch.zeros(5, 64)
    assert flops(lambda: a @ b) == 2 * 3 * 4 * 5 * 6
    assert flops(lambda: conv(torch.zeros(1, 12, 1000))) == 2 * 32 * 500 * 12 * 17
    assert flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 12 * 64 ** 3
    assert flops(lambda: torch.fft.rfft(x)) == 5 * 2.5 * 64 * 6
    assert flops(lambda: torch.fft.irfft(torch.fft.rfft(x))) == 2 * 5 * 2.5 * 64 * 6
    assert flops(lambda: nn.BatchNorm1d(8)(torch.zeros(4, 8, 5))) == 0


@pytest.mark.parametrize('backbone, causal', [(backbone, False) for backbone in SIZES]
                         + [(backbone, True) for backbone in ('s4', 's4d', 'transformer', 'net1d')])
def test_forward_macs_equal_a_closed_form(backbone, causal):
    """Of sizes with one and with several heads. The counts of FFTs are rounded."""
    for size in list(SIZES[backbone])[:2] + list(SIZES[backbone])[4:5]:
        encoder, T = make(backbone, size, causal=causal), 1210
        batch = dict(noise(3, T), peaks=torch.arange(100, 1100, 200).repeat(3, 1))
        with torch.no_grad():
            encoder(batch)                                        # makes S4's dynamics
            counted = flops(lambda: encoder(batch))
        crop, once = macs(encoder.config, T)
        assert counted / 2 == pytest.approx(3 * crop + once, rel=1e-6)


@pytest.mark.parametrize('objective', ['cpc', 'jepa', 'supervised'])
def test_a_training_step_costs_6M_and_2X(here, objective):
    """M forward multiply-accumulates of the student, encoder and head; X of the teacher."""
    t, B, L, D = train.make_parser().parse_args(['--objective', objective]), 32, 300, 64
    train.fill_in(t)
    c = config_of('s4', 'tiny', causal=objective == 'cpc')
    crop, once = macs(c, 600)
    block, kernel = macs(replace(c, layers=1, state=64), 600)
    stem = L * (3 * 12 * D + 3 * D * D)
    head = {'cpc': B * (L - 14) * (D * D + L * D), 'supervised': 0,
            'jepa': B * (block - stem + L * D * D) + kernel}[objective]
    M, X = B * crop + once + head, (objective == 'jepa') * (B * crop + once)
    _, counted = step_cost(t, Dataset('synthetic'))
    assert .85 < counted / (6 * M + 2 * X) < 1.15


# --- checkpoints

def test_checkpoint_round_trip(tmp_path):
    encoder, path = make('s4'), tmp_path / 'ckpt.pt'
    state = encoder.state_dict()
    checkpoint = dict(config=vars(encoder.config), encoder=state, contract=dict(window=10.))
    save(path, checkpoint)
    assert list(tmp_path.iterdir()) == [path]
    for run in (tmp_path, path, load(path)):
        again = load_encoder(run)
        assert not again.training and again.samples == 2400
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), state.values()))
    for wrong in ({**state, 'extra': torch.zeros(1)}, dict(list(state.items())[:-1])):
        with pytest.raises(RuntimeError, match='extra|Missing'):
            load_encoder(dict(checkpoint, encoder=wrong))


class Bomb:
    def __reduce__(self):
        return print, ('boom',)


def test_damaged_and_hostile_checkpoints_are_refused(tmp_path, capsys):
    path = tmp_path / 'c.pt'
    with pytest.raises(ValueError, match='no checkpoint'):
        load(path)
    torch.save({'a': torch.zeros(1000)}, path)
    half = path.read_bytes()[:500]
    torch.save({'a': Bomb()}, path)
    for content in (half, path.read_bytes(), pickle.dumps(Bomb())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match='cannot be read'):
            load(path)
    assert 'boom' not in capsys.readouterr().out
