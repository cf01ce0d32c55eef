"""Objectives against literal loops."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

import objectives
from models import Config, Encoder, calibrate_batchnorm, config_of
from objectives import (ALARMS, CPC, JEPA, OBJECTIVES, Data2Vec, DinoSR, HuBERT, Teacher,
                        block_mask, halves, health, kmeans, kmeans_plus_plus, released_input,
                        sinkhorn, span_mask, standardise)

TEACHERS = ('jepa', 'data2vec', 'dinosr', 'hubert')
PAIRS = [(name, backbone) for name, kind in OBJECTIVES.items() for backbone in kind.rates]


def noise(B, T):
    return {'x': torch.randn(B, 12, T)}


def records(T=1200):
    """Noise with R-peaks every 200 samples. The last of three records has two, and the patient of
    the first."""
    peaks = torch.arange(150, T - 100, 200).repeat(3, 1)
    peaks[2, 2:] = -1
    return dict(noise(3, T), peaks=peaks, y=torch.rand(3, 4).round(),
                patient=torch.tensor([7, 8, 7]))


def small(layers):
    torch.manual_seed(0)
    return Encoder(Config(dim=8, layers=layers, causal=False))


def build(name, backbone, batch, **more):
    """An objective on a tiny backbone with BatchNorm calibrated, as train.py builds it."""
    torch.manual_seed(0)
    kind, options = OBJECTIVES[name], dict(supervised={'columns': range(4)}, vqbeat={'codes': 64})
    if name == 'beats':
        more['tokenizer'] = build('vqbeat', backbone, batch)
        more['tokenizer'](batch)                                  # seeds the codebook
    encoder = Encoder(config_of(backbone, 'tiny', kind.causal))
    calibrate_batchnorm(encoder, [halves(batch) if kind.views == 2 else batch])
    return kind(encoder, steps=10, **options.get(name, {}) | more).eval()


def fix(monkeypatch, where, **draws):
    """Replace functions by what they shall return."""
    for name, value in draws.items():
        monkeypatch.setattr(where, name, lambda *args, value=value, **options: value)


def agree(objective, batch, by_hand):
    """The loss and its gradients are those of a loss written out by hand. Returns the logs."""
    loss, logs = objective(batch)
    assert loss.item() == pytest.approx(by_hand.item(), abs=2e-5)
    learned = [p for p in objective.parameters() if p.requires_grad]
    pairs = zip(*(torch.autograd.grad(v, learned, allow_unused=True) for v in (loss, by_hand)))
    assert all(a is b or torch.allclose(a, b, atol=2e-4, rtol=1e-3) for a, b in pairs)
    return logs


def nearest(x, codes):
    return min(range(len(codes)), key=lambda v: (x - codes[v]).norm().item())


def within(values, expected):
    """The mean of independent values lies within three standard errors of what theory says."""
    return abs(values.mean() - expected) < 3 * values.std() / len(values) ** .5


# --- contrast

def test_cpc_equals_a_loop(monkeypatch):
    objective, batch = CPC(small(1), horizon=3, negatives=5).eval(), noise(2, 40)
    draws, total, right = torch.randint(19, (2, 17, 5)), 0., 0

    def randint(high, shape, device):
        assert (high, shape) == (19, draws.shape)                 # all but the target, evenly
        return draws

    monkeypatch.setattr(torch, 'randint', randint)
    z = objective.encoder.tokens(batch)[0]
    scores = objective.head(objective.encoder.backbone(z)) @ z.transpose(1, 2)
    for b in range(2):
        for i in range(17):
            others = [j for j in range(20) if j != i + 3]
            logits = scores[b, i, [i + 3] + [others[k] for k in draws[b, i]]]
            total = total + logits.logsumexp(0) - logits[0]
            right += not logits.argmax()
    assert agree(objective, batch, total / 34)['accuracy'].item() == pytest.approx(right / 34)


def test_halves():
    x = torch.arange(20.)
    h = halves(dict(x=x.view(1, 1, 20), peaks=torch.tensor([[3, 9, 10, 18, -1]])))
    assert torch.equal(h['x'], x.view(2, 1, 10))
    assert h['peaks'].tolist() == [[3, 9, -1, -1, -1], [0, 8, -1, -1, -1]]


def test_cmsc_equals_a_loop():
    batch, total, right = records(), 0., 0
    objective = build('cmsc', 'resnet', batch)
    parts = [objective.encoder({'x': x})[0].mean(1) for x in batch['x'].split(600, 2)]
    z = F.normalize(objective.head(torch.cat(parts)), dim=1)
    scores, who = z @ z.T / .1, [7, 8, 7] * 2
    for i in range(6):
        others = [a for a in range(6) if a != i]
        positives = [a for a in others if who[a] == who[i]]
        total = total + scores[i, others].logsumexp(0) - scores[i, positives].mean()
        right += others[scores[i, others].argmax()] in positives
    logs = agree(objective, batch, total / 6)
    assert logs['accuracy'].item() == pytest.approx(right / 6)
    assert logs['chance'].item() == pytest.approx(14 / 30)


# --- masks

def test_spans_equal_a_loop(monkeypatch):
    torch.manual_seed(0)
    uniform, one = torch.rand(3, 56), torch.randint(50, (3, 1))
    uniform[2] += 1                                               # here no span starts by itself
    fix(monkeypatch, torch, rand=uniform, randint=one)
    mask, p = span_mask(3, 50, 7, hide=.3), 1 - .7 ** (1 / 7)
    for b in range(3):
        starts = [t - 6 for t in range(56) if uniform[b, t] < p] or [one[b, 0].item()]
        assert mask[b].tolist() == [any(s <= t < s + 7 for s in starts) for t in range(50)]


@pytest.mark.parametrize('span', [1, 10, 30, 60])
def test_spans_hide_the_share_asked_for(span):
    """At the edges too; and never nothing."""
    torch.manual_seed(0)
    mask = span_mask(3000, 300, span).float()
    assert all(within(share, .49) for share in (mask.mean(1), mask[:, 0], mask[:, -1]))
    assert span_mask(400, 300, 10, hide=1e-9).any(1).all()


def test_released_spans_hide_six_percent():
    torch.manual_seed(0)
    mask = span_mask(6000, 300, 10, released=True).float()
    assert within(mask[:, 5:-6].mean(1), 1 - .9935 ** 10)
    assert within((mask.sum(1) == 0).float(), .9935 ** 300)
    assert within(mask[:, -1], .0065)                             # the last one only as a middle


def test_blocks_are_as_specified(monkeypatch):
    """Lengths and disjointness; hidden and visible shares against the shares of all starts."""
    torch.manual_seed(0)
    errors, t = [], torch.arange(300)

    def holds(size):
        """Which share of a block's starts makes it hold each token."""
        start = torch.arange(301 - size)[:, None]
        return ((start <= t) & (t < start + size)).double().mean(0)

    assert (block_mask(500, 30)[0].sum(1) >= 10).all()            # some are drawn again
    for share in torch.rand(300, 2):
        fix(monkeypatch, torch, rand=share)
        visible, cover = block_mask(8, 300)
        n, c = int(300 * (.15 + .05 * share[0])), int(300 * (.85 + .15 * share[1]))
        hidden, free = cover > 0, (1 - holds(n)) ** 4
        assert (cover.sum(1) == 4 * n).all() and not (visible & hidden).any()
        errors.append([hidden.double().mean() - (1 - free).mean(),
                       visible.double().mean() - (holds(c) * free).mean()])
    assert all(within(error, 0.) for error in torch.tensor(errors).T)


def test_released_blocks_reveal_targets():
    torch.manual_seed(0)
    masks = [block_mask(64, 300, released=True) for _ in range(60)]
    assert all((c.sum(1) == 4 * 64).all() and (v.sum(1) >= 64).all() for v, c in masks)
    leak = torch.cat([(v & (c > 0)).any(1) for v, c in masks]).float()
    assert within(leak, .099)                     # a tenth of the crops, by another simulation


# --- teachers

def test_teacher_starts_as_a_copy_and_follows_in_closed_form():
    """As released it has weights of its own, which never move."""
    student = small(2)
    new, old = student.state_dict(), copy.deepcopy(student.state_dict())
    teacher, released = Teacher(student, steps=100), Teacher(student, 100, released=('ema',))
    own = copy.deepcopy(released.net.state_dict())
    assert not torch.equal(own['blocks.0.s4.C'], old['blocks.0.s4.C'])
    for name in ('blocks.0.s4.C', 'stem.1.running_mean'):
        new[name] += 1
    for steps in (0, 7):
        for _ in range(steps):
            teacher.follow(student)
            released.follow(student)
        for name, value in teacher.net.state_dict().items():
            left = .5 ** (steps / 5)                              # half-life: 5 % of 100 steps
            expected = new[name] + left * (old[name] - new[name])
            assert torch.allclose(value.double(), expected.double(), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(released.net.state_dict().values(), own.values()))
    for kept in (teacher, released):
        kept(noise(2, 40))
    assert released.net.training and not teacher.net.training


def standard(x):
    """Mean 0, SD 1 over the tokens of each crop, feature by feature; x (B, L, D)."""
    return torch.stack([torch.stack([(c - c.mean()) / c.std(correction=0) for c in crop.T], 1)
                        for crop in x])


def test_standardise():
    torch.manual_seed(0)
    x = torch.randn(2, 20, 8) * 3 + 5 * torch.randn(8)
    assert torch.allclose(standardise(x), standard(x), atol=1e-5)
    layer = standard(x.transpose(1, 2)).transpose(1, 2)           # each token over its features
    assert torch.allclose(standardise(x, 'layer'), layer, atol=1e-5)


def smooth_l1(d):
    return .5 * d * d if abs(d) < 1 else abs(d) - .5


def masked(monkeypatch, kind, hidden=torch.arange(40).view(2, 20) % 5 < 2, **options):
    """An objective with a fixed mask, its batch, the mask; by hand the prediction, and the
    teacher's layers and output."""
    objective, batch = kind(small(3), **options).eval(), noise(2, 40)
    fix(monkeypatch, objectives, span_mask=hidden)
    objective(batch)                                              # seeds HuBERT's prototypes
    layers, net = [], objective.teacher.net
    z = objective.encoder.tokens(batch)[0]
    h = objective.encoder.backbone(torch.where(hidden[..., None], objective.mask_token, z))
    with torch.no_grad():
        f = net.backbone(net.tokens(batch)[0], None, layers)
    return objective, batch, hidden, objective.head(h), layers, f


def test_jepa_equals_a_loop_over_blocks(monkeypatch):
    starts, cover = [[2, 5, 9, 14], [0, 8, 8, 15]], torch.zeros(2, 20, dtype=torch.long)
    for b in range(2):
        for s in starts[b]:
            cover[b, s:s + 4] += 1
    visible = cover == 0
    visible[:, 19] = False                                        # outside the context
    fix(monkeypatch, objectives, block_mask=(visible, cover))
    objective, batch, _, p, _, f = masked(monkeypatch, JEPA, ~visible)
    d = p - standard(f)
    terms = [smooth_l1(e) for b in range(2) for s in starts[b] for e in d[b, s:s + 4].flatten()]
    agree(objective, batch, sum(terms) / len(terms))


def test_data2vec_equals_a_loop(monkeypatch):
    objective, batch, hidden, p, layers, _ = masked(monkeypatch, Data2Vec)
    d = p - (standard(layers[1][0]) + standard(layers[2][0])) / 2
    agree(objective, batch, sum(smooth_l1(e) for e in d[hidden].flatten()) / 8 ** .5 / hidden.sum())


def test_dinosr_equals_a_loop(monkeypatch):
    objective, batch, hidden, p, layers, _ = masked(monkeypatch, DinoSR, codes=6)
    terms = []
    for j in range(2):
        x, logits = standard(layers[1 + j][1]), p[..., 6 * j:6 * j + 6].log_softmax(2)
        for b, t in hidden.nonzero().tolist():
            terms.append(-logits[b, t, nearest(x[b, t], objective.codebook()[j])])
    agree(objective, batch, sum(terms) / len(terms))


@pytest.mark.parametrize('released', [(), ('codebook',)])
def test_dinosr_codebook_equals_a_loop(released):
    """Codes are running means of their features. Unassigned codes stay; as released, with one
    codebook and half of the head idle, they fade to the origin."""
    objective = DinoSR(small(3), codes=5, released=released)
    objective(noise(2, 40))[0].backward()
    gradient = objective.head.out.weight.grad
    assert gradient[:5].any() and gradient[5:].any() != bool(released)
    before, (x, code, _) = copy.deepcopy(objective), objective.last_assignment
    objective.after_step()
    for j, codes in enumerate(before.codebook()):
        for v in range(5):
            mine = [y for y in x[j] if nearest(y, codes) == v]
            total = .9 * before.sums[j, v] + .1 * sum(mine)
            expected = total / (.9 * before.counts[j, v] + .1 * len(mine))
            assert torch.allclose(objective.codebook()[j, v], expected, atol=1e-4)
    before, one = objective.codebook()[:, 1:], F.one_hot(torch.zeros_like(code), 5).float().sum(1)
    for _ in range(300):
        objective.last_assignment = x, torch.zeros_like(code), one
        objective.after_step()
    used, others = objective.codebook().split((1, 4), 1)
    assert torch.allclose(used[:, 0], x.mean(1), atol=1e-4)
    assert others.abs().max() < 1e-3 if released else torch.equal(others, before)


def test_sinkhorn_is_even_and_normalised():
    torch.manual_seed(0)
    q = sinkhorn(torch.randn(500, 10) * 2, rounds=60)
    assert torch.allclose(q.sum(1), torch.ones(500), atol=1e-5)
    assert torch.allclose(q.sum(0), torch.tensor(50.), rtol=1e-2)
    a = torch.randn(6, 3)
    expected = (a - a.amax(1, keepdim=True)).exp()
    for _ in range(3):
        for line in (*expected.T, *expected):                     # in place
            line /= line.sum()
    assert torch.allclose(sinkhorn(a), expected, atol=1e-6)


def test_clusters_are_found():
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(8, 16), dim=1)
    x = F.normalize(centres[[0] * 393 + [*range(1, 8)]] + .01 * torch.randn(400, 16), dim=1)
    assert (kmeans_plus_plus(x, 64) @ centres.T).argmax(1).unique().numel() == 8
    found = kmeans(x, 16)
    assert ((found @ centres.T).amax(0) > .99).all()
    assert torch.allclose(found.norm(dim=1), torch.ones(16)) and kmeans(x[:5], 8).shape == (8, 16)


def test_hubert_equals_a_loop(monkeypatch):
    objective, batch, hidden, p, _, f = masked(monkeypatch, HuBERT)
    x, mask, books = F.normalize(standard(f).flatten(0, 1), dim=1), hidden.flatten(), (128, 256)
    total, moved = 0., []
    for z, codes in zip(p.flatten(0, 1).split(books, 1), objective.prototypes.split(books)):
        q = sinkhorn(x @ codes.T / .15)
        kl = F.kl_div((z / .5).log_softmax(1), q, reduction='none').sum(1)
        entropy = torch.distributions.Categorical(logits=z).entropy().mean()
        total = total + .75 * kl[mask].mean() + .25 * kl[~mask].mean() + .001 * entropy
        moved.append(.99 * codes + .01 * F.normalize(q.T @ x, dim=1))
    agree(objective, batch, total)
    objective.after_step()
    assert torch.allclose(objective.prototypes, F.normalize(torch.cat(moved), dim=1), atol=1e-6)


# --- heartbeats, patches, labels

def test_vqbeat_equals_a_loop():
    batch = records()
    objective = build('vqbeat', 'beat', batch, codes=9)
    objective(batch)                                              # seeds the codebook
    before, (h, pad) = objective.codebook.clone(), objective.encoder(batch)
    real, tokens = ~pad[:, 1:], torch.zeros(*pad.shape, 128)
    e = F.normalize(objective.to_code(h), dim=2)[:, 1:][real]
    code = torch.tensor([nearest(x, before) for x in e])
    tokens[:, 1:][real] = e + (before[code] - e).detach()
    y = objective.from_code(tokens)
    for block in objective.decoder:
        y = block(y, pad)[0]
    error = (objective.head(y[:, 1:]) - objective.encoder.stem.beats(batch)[0])[real]
    agree(objective, batch, error.square().mean() + (e - before[code]).square().mean())
    objective.after_step()
    for v in range(9):
        new, mine = before[v], e[code == v]
        if len(mine):
            new = F.normalize(.99 * new + .01 * F.normalize(mine.sum(0), dim=0), dim=0)
        assert torch.allclose(objective.codebook[v], new, atol=1e-6)


def test_beats_equals_a_loop(monkeypatch):
    batch = records()
    objective, draws = build('beats', 'beat', batch), torch.rand(3, 60)
    fix(monkeypatch, torch, rand=draws)
    mask = torch.zeros(3, 60, dtype=torch.bool)
    for b in range(3):
        real = [t for t in range(60) if b < 2 or t % 5 < 2]       # the last has two beats of five
        mask[b, sorted(real, key=lambda t: draws[b, t])[:len(real) // 2]] = True
    e, _ = objective.tokenizer.encode(batch)
    z, padded = objective.encoder.tokens(batch, ~mask)
    logits = objective.head(objective.encoder.backbone(z, padded)[:, 1:]).log_softmax(2)
    terms = [-logits[b, t, nearest(e[b, t + 1], objective.tokenizer.codebook)]
             for b, t in mask.nonzero().tolist()]
    agree(objective, batch, sum(terms) / len(terms))


@pytest.mark.parametrize('raw, count', [(False, 20), (True, 2)])
def test_mae_equals_a_loop(raw, count, monkeypatch):
    batch = noise(2, 480)
    objective = build('mae', 'vit', batch, hide=count / 40, raw_target=raw)
    draws, terms = torch.rand(2, 40), []
    fix(monkeypatch, torch, rand=draws)
    hidden, visible = draws.argsort(1).split((count, 40 - count), 1)
    z, _ = objective.encoder.tokens(batch, visible)
    y = objective.embed(objective.encoder.backbone(z))
    for b in range(2):
        line = objective.mask_token.repeat(41, 1)
        line[0], line[visible[b] + 1] = y[b, 0], y[b, 1:]
        line, _ = objective.decoder((line + objective.position[:41])[None])
        p = objective.head(objective.norm(line))[0, 1:]
        for t in hidden[b].tolist():
            patch = batch['x'][b, :, 12 * t:12 * t + 12]
            if not raw:
                patch = patch - patch.mean(1, keepdim=True)
                patch = patch / (patch.square().mean() + 1e-6).sqrt()
            terms.append((p[t] - patch.flatten()).square().mean())
    agree(objective, batch, sum(terms) / len(terms))


@pytest.mark.parametrize('focal', [0., 2.])
def test_supervised_equals_a_loop(focal):
    batch = records()
    batch['y'][1, 2] = math.nan
    objective = build('supervised', 's4', batch, columns=[2, 0, 3], focal=focal)
    z, terms = objective.head(objective.encoder(batch)[0]), []
    for b in range(3):
        for k, y in enumerate(batch['y'][b, [2, 0, 3]]):
            if y.isfinite():
                p = (z[b, k] if y else -z[b, k]).sigmoid()
                terms.append(-p.log() * (1 - p) ** focal)
    assert len(terms) == 8
    agree(objective, batch, sum(terms) / 8)


# --- every pair

def zero_head_loss(name, objective, batch, logs):
    """The loss with a zeroed head where every token is hidden."""
    if name in ('jepa', 'data2vec'):                              # smooth L1 of the target itself
        layers, f = objective.teacher(batch)
        parts = [f] if name == 'jepa' else [layers[-1][0], layers[-2][0]]
        target = sum(map(standardise, parts)) / len(parts)
        error = F.smooth_l1_loss(0 * target, target).item()
        return error * (1 if name == 'jepa' else objective.encoder.dim ** .5)
    if name == 'hubert':                        # ln K - entropy of the target, + .001 ln K
        x = F.normalize(standardise(logs['target']).flatten(0, 1), dim=1)
        targets = [sinkhorn(x @ p.T / .15) for p in objective.prototypes.split((128, 256))]
        entropy = sum(torch.special.entr(q).sum(1).mean().item() for q in targets)
        return .751 * math.log(128 * 256) - .75 * entropy
    if name == 'vqbeat':
        beats, pad = objective.encoder.stem.beats(batch)
        cosine = (logs['features'] @ objective.codebook.T).amax(1).mean()
        return (beats[~pad].square().mean() + (2 - 2 * cosine) / 128).item()
    return {'cpc': math.log(129), 'dinosr': math.log(256), 'cmsc': math.log(2 * 3 - 1),
            'beats': math.log(64), 'mae': 1., 'supervised': math.log(2)}[name]


@pytest.mark.parametrize('name, backbone', PAIRS)
def test_every_pair_learns(name, backbone, monkeypatch):
    """Two steps: finite losses; teachers and tokenizers do not learn, all the rest gets a gradient
    (but no beat is hidden except by beats). Then the loss of a zeroed head."""
    torch.manual_seed(0)
    batch = records()
    objective = build(name, backbone, batch).train()
    learned = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    assert not any(n.startswith(('teacher', 'tokenizer')) for n in learned)
    never = ['encoder.stem.mask_token'] * (backbone == 'beat' and name != 'beats')
    optimiser = torch.optim.AdamW(learned.values(), lr=1e-3)
    for _ in range(2):
        loss, logs = objective(batch)
        loss.backward()
        assert loss.isfinite()
        assert [n for n, p in learned.items() if p.grad is None] == never
        optimiser.step()
        optimiser.zero_grad()
        objective.after_step()
    assert all(map(math.isfinite, health(logs)[0].values()))
    objective.eval()
    if name == 'hubert':
        objective.age.zero_()
    last = [m for m in objective.head.modules() if isinstance(m, torch.nn.Linear)][-1]
    for p in last.parameters():
        p.data.zero_()
    every = torch.ones(3, 600, dtype=torch.bool)
    fix(monkeypatch, objectives, span_mask=every, block_mask=(~every, every.long()))
    loss, logs = objective(batch)
    assert loss.item() == pytest.approx(zero_head_loss(name, objective, batch, logs), rel=2e-4)
    assert name != 'cpc' or logs['accuracy'] == 0                 # all tie: collapse is no success


@pytest.mark.parametrize('name, backbone', PAIRS)
def test_every_pair_takes_a_step_in_bf16(name, backbone, monkeypatch):
    """The loss is that of fp32 within 2 %. Without oneDNN, since its bf16 convolutions of 16 taps
    over 4 or 8 channels (Net1D's) are wrong on CPUs with AMX."""
    monkeypatch.setattr(torch.backends.mkldnn, 'enabled', False)
    torch.manual_seed(0)
    batch, losses = records(T=600), []
    objective = build(name, backbone, batch)
    for low in (False, True):
        torch.manual_seed(1)
        with torch.autocast('cpu', torch.bfloat16, enabled=low):
            loss, _ = objective(batch)
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=.02) and losses[1] != losses[0]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(objective.parameters(), 1., error_if_nonfinite=True)
    objective.after_step()
    assert all(v.isfinite().all() for v in objective.state_dict().values())


@pytest.mark.parametrize('name, backbone', [
    pair for pair in PAIRS if pair[0] in (*TEACHERS, 'beats', 'mae')])
def test_what_is_hidden_cannot_be_seen(name, backbone, monkeypatch):
    """Other values in the hidden samples change no output of the student at all; other values in
    visible ones do. Every second beat or patch is hidden, or every second ten tokens."""
    torch.manual_seed(0)
    batch, out, t = records(), [], torch.arange(1200)
    objective, hidden = build(name, backbone, batch), t // 12 % 2 == 0
    if name == 'beats':
        hidden = torch.zeros(3, 12, 1200, dtype=torch.bool)
        for token in range(0, 60, 2):
            for b, p in enumerate(batch['peaks'][:, token % 5]):
                hidden[b, token // 5, p - 100:p + 100] = p > 0
    elif name in TEACHERS:                              # token i sees samples 2 i - 1 to 2 i + 1
        mask = t[:600] // 10 % 2 == 0
        hidden = mask[t // 2] & mask[((t + 1) // 2).clamp(max=599)]
        mask = mask.repeat(3, 1)
        fix(monkeypatch, objectives, block_mask=(~mask, mask), span_mask=mask)
    draws = (t[:60 if name == 'beats' else 100] % 2.).repeat(3, 1)
    fix(monkeypatch, torch, rand=draws)                           # the lower half is hidden
    objective.head.register_forward_hook(lambda module, inputs, output: out.append(output))
    for where in (0, hidden, ~hidden):
        objective({**batch, 'x': batch['x'] + where})
    assert hidden.any() and torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])


# --- health

def test_alarms_fire_on_collapse():
    torch.manual_seed(0)
    x = torch.randn(8, 512, 8) * torch.tensor([1, 2] * 4)         # .05 and .2 of the variance
    line, same = x[..., :1] * torch.randn(8), torch.randn(8) + .001 * x
    good = dict(features=x, target=x, hits=torch.full((2, 64), 30.))
    numbers, alarm = health(good)
    expected = dict(rank=.05 ** -.2 * .2 ** -.8, std=1, target_std=1, codes=64, chance=1 / 64,
                    perplexity=64)                                # rank: exp of the entropy
    assert not alarm and numbers == pytest.approx(expected, rel=.0125)
    for name, kind, value in (('rank', 'features', line), ('std', 'features', same),
                              ('target_std', 'target', same)):
        assert health(good | {kind: value})[1].endswith(ALARMS[name])
    one = F.one_hot(torch.tensor([3, 3]), 64) * 1000.
    expected = dict(rank=1, std=0, target_std=0, codes=1, chance=1, perplexity=1)
    for constant in (torch.ones_like(x), torch.zeros_like(x)):
        numbers, alarm = health(dict(features=constant, target=constant, hits=one))
        assert all(text in alarm for text in ALARMS.values())
        assert numbers == pytest.approx(expected, abs=1e-3)


def test_codebooks_of_two_sizes_share_one_limit():
    """2 % of the mean of HuBERT's 128 and 256 codes is 3.84: 3 and 4 codes in use are too few, 4
    and 4 are enough."""
    for used, alarming in ((3, True), (4, False)):
        hits = torch.zeros(128), torch.zeros(256)
        hits[0][:used], hits[1][:4] = 1000., 1000.
        numbers, alarm = health(dict(features=torch.randn(300, 16), hits=hits))
        assert numbers['codes'] == pytest.approx(numbers['perplexity']) == (used + 4) / 2
        assert ('any code' in alarm) == alarming


@pytest.mark.parametrize('name', TEACHERS)
def test_a_constant_teacher_raises_an_alarm(name):
    torch.manual_seed(0)
    batch = {'x': torch.randn(4, 12, 600).cumsum(2)}
    objective = build(name, 's4', batch)
    assert not health(objective(batch)[1])[1]
    last = objective.teacher.net.blocks[-1]
    last.norm.weight.data.zero_()                                 # every feature the same
    last.out.weight.data.zero_()                                  # and every branch
    assert health(objective(batch)[1])[1]


def test_released_input_is_positional():
    """V4 is divided by what is another lead's SD."""
    x = torch.zeros(1, 12, 5)
    x[0, 9] = .14030828 + .00155546
    y = released_input(x)[0, :, 3]
    assert (y[0], y[9]) == pytest.approx((.00184586 / .16401004, 1), abs=1e-5)


def test_pairs_are_printed(capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['objectives.py'])
    objectives.main()
    text = capsys.readouterr().out
    assert all(name in text for name in OBJECTIVES)
