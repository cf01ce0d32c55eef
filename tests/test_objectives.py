"""Objectives against brute force."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

import objectives
from models import Config, Encoder, see_data, sized
from objectives import (CMSC, CPC, JEPA, MAE, OBJECTIVES, Beats, Data2Vec, DinoSR, HuBERT, Supervised, Teacher, VQBeat, block_mask, effective_rank, halves,
                        health, kmeans, released_input, sinkhorn, span_mask, spread, standardise)


def make(seed=0, horizon=3, negatives=5):
    torch.manual_seed(seed)
    return CPC(Encoder(Config(dim=8, layers=1)), horizon=horizon, negatives=negatives).double().eval()


def test_cpc_equals_brute_force(monkeypatch):
    objective, x = make(), torch.randn(2, 12, 40, dtype=torch.float64)
    draws = torch.randint(19, (2, 17, 5))
    monkeypatch.setattr(torch, 'randint', lambda *args, **kwargs: draws)
    loss, logs = objective({'x': x})
    loss.backward()
    gradients = [p.grad.clone() for p in objective.parameters()]
    objective.zero_grad()
    z = objective.encoder.tokens({'x': x})[0]
    h = objective.encoder.backbone(z)
    total, right = 0., 0
    for b in range(2):
        for i in range(17):
            c, target = objective.head(h[b, i]), i + 3
            candidates = [target] + [j + 1 if j >= target else j for j in draws[b, i].tolist()]
            assert target not in candidates[1:]
            logits = torch.stack([c @ z[b, j] for j in candidates])
            total = total + torch.logsumexp(logits, 0) - logits[0]
            right += int(logits[0] > logits[1:].max())
    (total / 34).backward()
    assert loss.item() == pytest.approx(total.item() / 34, abs=1e-6)
    assert logs['accuracy'].item() == pytest.approx(right / 34)
    for p, g in zip(objective.parameters(), gradients):
        assert torch.allclose(p.grad, g, atol=1e-6)


def test_cpc_targets_are_not_detached():
    objective = make()
    z = objective.encoder.tokens({'x': torch.randn(2, 12, 40, dtype=torch.float64)})[0].detach().requires_grad_()
    objective.encoder.tokens = lambda batch: (z, None)
    objective.encoder.backbone = lambda z, pad: z.detach()       # no gradient through the context
    objective({})[0].backward()
    assert z.grad.abs().sum() > 0


def test_cpc_with_zeroed_head_is_ln_129():
    objective = CPC(Encoder(Config(dim=8, layers=1)))
    objective.head.weight.data.zero_()
    loss, logs = objective({'x': torch.randn(2, 12, 600)})
    assert loss.item() == pytest.approx(math.log(129), abs=1e-5) and logs['accuracy'] == 0    # all tie: collapse is no success


def test_cpc_negatives_are_uniform_over_the_other_positions():
    objective, L = make(horizon=3, negatives=4000), 20
    z = torch.eye(L, 8, dtype=torch.float64).expand(1, L, 8)
    counts, original = torch.zeros(L), torch.Tensor.gather
    objective.encoder.tokens, objective.encoder.backbone = lambda batch: (z, None), lambda z, pad: z

    def spy(tensor, dim, index):
        counts.add_(torch.bincount(index[0, 4, 1:], minlength=L))                            # position 4 predicts token 7
        return original(tensor, dim, index)

    torch.Tensor.gather = spy
    try:
        objective({})
    finally:
        torch.Tensor.gather = original
    expected = torch.full((L,), 4000 / 19)
    expected[7] = 0
    assert counts[7] == 0 and ((counts - expected) ** 2 / expected.clamp(min=1)).sum() < 44  # chi2(18), p = .0006


# --- what the masked objectives share

def within(values, expected, errors=3):
    """The mean of independent values lies within so many standard errors of what theory says."""
    return abs(values.mean() - expected) < errors * values.std() / len(values) ** .5


def test_spans_equal_a_loop(monkeypatch):
    torch.manual_seed(0)
    draws = torch.rand(3, 56), torch.randint(50, (3, 1))
    draws[0][2] += 1                                             # nothing starts by itself in the last sequence
    monkeypatch.setattr(torch, 'rand', lambda *shape, **kwargs: draws[0])
    monkeypatch.setattr(torch, 'randint', lambda *args, **kwargs: draws[1])
    mask, p = span_mask(3, 50, 7, hide=.3), 1 - .7 ** (1 / 7)
    for b in range(3):
        starts = [t - 6 for t in range(56) if draws[0][b, t] < p] or [draws[1][b, 0].item()]
        assert mask[b].tolist() == [any(s <= t < s + 7 for s in starts) for t in range(50)]


@pytest.mark.parametrize('span', [1, 10, 30, 60])
def test_spans_hide_the_share_asked_for(span):
    torch.manual_seed(0)
    mask = span_mask(3000, 300, span).float()
    assert within(mask.mean(1), .49) and within(mask[:, 0], .49) and within(mask[:, -1], .49)                 # edges too
    assert 1 - (1 - .49) ** .1 == pytest.approx(.065, abs=1e-3) and span_mask(400, 300, 10, hide=1e-9).any(1).all()


def test_released_spans_hide_six_percent():
    torch.manual_seed(0)
    mask = span_mask(6000, 300, 10, released=True).float()
    inner = mask[:, 5:-6]
    assert within(inner.mean(1), 1 - .9935 ** 10) and mask.mean() < .065
    assert within((mask.sum(1) == 0).float(), .9935 ** 300) and within(mask[:, -1], .0065)                    # the last only as a middle


def test_blocks_are_as_specified():
    torch.manual_seed(0)
    for _ in range(20):
        visible, cover = block_mask(16, 300)
        lengths = cover.sum(1) / 4
        assert (lengths == lengths[0]).all() and 45 <= lengths[0] <= 60 and cover.max() <= 4
        assert not (visible & (cover > 0)).any() and (visible.sum(1) >= 10).all()


def test_block_statistics():
    """Hidden share and visible share against the sums over all starts, for the lengths drawn."""
    torch.manual_seed(0)
    unions, contexts = [], []
    for _ in range(300):
        share = torch.rand(2, generator=torch.Generator().manual_seed(len(unions)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, 'rand', lambda *a, **k: share)
            visible, cover = block_mask(8, 300, least=0)
        n, c = int(300 * (.15 + .05 * share[0])), int(300 * (.85 + .15 * share[1]))
        t = torch.arange(300)
        by = lambda size: (torch.minimum(t, torch.tensor(300 - size)) - (t - size + 1).clamp(min=0) + 1) / (301 - size)       # a block holds t
        free = (1 - by(n)) ** 4
        unions.append(((cover > 0).float().mean(1) - (1 - free).mean()).mean())
        contexts.append((visible.float().mean(1) - (by(c) * free).mean()).mean())
    assert within(torch.stack(unions), 0.) and within(torch.stack(contexts), 0.)


def test_released_blocks_reveal_targets():
    torch.manual_seed(0)
    masks = [block_mask(64, 300, released=True) for _ in range(60)]
    assert all((c.sum(1) == 4 * 64).all() and (v.sum(1) >= 64).all() for v, c in masks)
    leak = torch.cat([(v & (c > 0)).any(1) for v, c in masks]).float()
    assert within(leak, .099, errors=4)                          # a tenth of the crops, by an independent simulation


def test_teacher_starts_as_a_copy_and_follows_in_closed_form():
    torch.manual_seed(0)
    student = Encoder(Config(dim=8, layers=2, causal=False))
    teacher, start = Teacher(student, steps=100), copy.deepcopy(student.state_dict())
    for a, b in zip(teacher.net.state_dict().values(), student.state_dict().values()):
        assert torch.equal(a, b)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.)
    student.stem[1].running_mean += 2
    for _ in range(7):
        teacher.follow(student)
    left, moved = .5 ** (7 / 5), teacher.net.state_dict()        # half-life: 5 % of 100 steps
    assert torch.allclose(moved['blocks.0.s4.C'], start['blocks.0.s4.C'] + 1 - left, atol=1e-5)
    assert torch.allclose(moved['stem.1.running_mean'], start['stem.1.running_mean'] + 2 * (1 - left), atol=1e-5)
    assert torch.equal(moved['blocks.0.s4.log_dt'], student.blocks[0].s4.log_dt)
    assert Teacher(student, 100, momentum=.9996).momentum ** 600 == pytest.approx(.79, abs=.005)
    frozen = Teacher(student, 100, released=('ema',))
    before = copy.deepcopy(frozen.net.state_dict())
    frozen.follow(student)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), frozen.net.state_dict().values())) and frozen.mode == 'train'
    assert not torch.equal(before['blocks.0.s4.C'], student.state_dict()['blocks.0.s4.C'])


@pytest.mark.parametrize('kind', [JEPA, Data2Vec, DinoSR, HuBERT])
def test_teacher_gets_no_gradient_and_eval_changes_nothing(kind):
    torch.manual_seed(0)
    objective = kind(Encoder(Config(dim=16, layers=2, causal=False)), steps=100).train()
    batch = {'x': torch.randn(2, 12, 200)}
    loss, logs = objective(batch)
    loss.backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert sum(p.grad.abs().sum() for p in objective.encoder.parameters() if p.grad is not None) > 0
    assert not objective.teacher.net.training
    objective.teacher.mode = 'train'
    objective(batch)
    assert objective.teacher.net.training


def frozen(objective, monkeypatch, **draws):
    """The objective in eval mode with its masks fixed."""
    for name, value in draws.items():
        monkeypatch.setattr(objectives, name, lambda *args, value=value, **kwargs: value)
    return objective.eval()


def smooth_l1(d):
    return .5 * d * d if abs(d) < 1 else abs(d) - .5


def agree(objective, batch, by_hand):
    """The objective's loss and its gradients are those of a loss written out by hand."""
    loss, learned = objective(batch)[0], [p for p in objective.parameters() if p.requires_grad]
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-4)
    for a, b in zip(torch.autograd.grad(loss, learned, allow_unused=True), torch.autograd.grad(by_hand, learned, allow_unused=True)):
        assert (a is None and b is None) or torch.allclose(a, b, atol=2e-4, rtol=1e-3)


def features(objective, batch, visible):
    """Student's head output and the teacher's layers and features, by hand."""
    z = objective.encoder.tokens(batch)[0]
    h = objective.encoder.backbone(torch.where(visible[..., None], z, objective.hidden))
    layers = []
    objective.teacher.net.eval()
    with torch.no_grad():
        f = objective.teacher.net.backbone(objective.teacher.net.tokens(batch)[0], None, layers)
    return objective.head(h), layers, f


def standard(x):
    """Mean 0, SD 1 over the tokens of each crop, feature by feature; x (B, L, D)."""
    return torch.stack([torch.stack([(c - c.mean()) / (c.var(correction=0) + 1e-8) ** .5 for c in crop.T], 1) for crop in x])


def test_standardise():
    torch.manual_seed(0)
    x = torch.randn(2, 20, 8) * 3 + 5 * torch.randn(8)
    assert torch.allclose(standardise(x), standard(x), atol=1e-5)
    assert torch.allclose(standardise(x, 'layer')[1, 3], (x[1, 3] - x[1, 3].mean()) / (x[1, 3].var(correction=0) + 1e-5) ** .5, atol=1e-5)


def test_jepa_equals_a_loop_over_blocks(monkeypatch):
    torch.manual_seed(0)
    starts, length, context = [[2, 5, 9, 14], [0, 8, 8, 15]], 4, [[1, 19], [0, 18]]
    cover, visible = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 20, dtype=torch.bool)
    for b in range(2):
        visible[b, context[b][0]:context[b][1]] = True
        for s in starts[b]:
            cover[b, s:s + length] += 1
            visible[b, s:s + length] = False
    objective = frozen(JEPA(Encoder(Config(dim=8, layers=2, causal=False))), monkeypatch, block_mask=(visible, cover))
    batch = {'x': torch.randn(2, 12, 40)}
    p, _, f = features(objective, batch, visible)
    d = p - standard(f)
    terms = [smooth_l1(d[b, t, k]) for b in range(2) for s in starts[b] for t in range(s, s + length) for k in range(8)]
    assert len(terms) == 2 * 4 * 4 * 8
    agree(objective, batch, sum(terms) / len(terms))


def test_data2vec_equals_a_loop(monkeypatch):
    torch.manual_seed(0)
    mask = torch.rand(2, 20) < .4
    objective = frozen(Data2Vec(Encoder(Config(dim=8, layers=3, causal=False))), monkeypatch, span_mask=mask)
    batch = {'x': torch.randn(2, 12, 40)}
    p, layers, _ = features(objective, batch, ~mask)
    target = (standard(layers[1][0]) + standard(layers[2][0])) / 2
    terms = [sum(smooth_l1(d) for d in p[b, t] - target[b, t]) / 8 ** .5 for b, t in torch.nonzero(mask).tolist()]
    agree(objective, batch, sum(terms) / len(terms))


def test_dinosr_equals_a_loop(monkeypatch):
    torch.manual_seed(0)
    mask = torch.rand(2, 20) < .4
    objective = frozen(DinoSR(Encoder(Config(dim=8, layers=3, causal=False)), codes=6), monkeypatch, span_mask=mask)
    batch = {'x': torch.randn(2, 12, 40)}
    p, layers, _ = features(objective, batch, ~mask)
    terms = []
    for b, t in torch.nonzero(mask).tolist():
        for j in range(2):
            x = standard(layers[1 + j][1])[b, t]
            code = min(range(6), key=lambda v: (x - objective.codebook()[j, v]).norm().item())
            terms.append(-p[b, t, 6 * j:6 * j + 6].log_softmax(0)[code])
    agree(objective, batch, sum(terms) / len(terms))


def test_dinosr_codebook_as_released_is_one():
    torch.manual_seed(0)
    objective = DinoSR(Encoder(Config(dim=8, layers=3, causal=False)), released=('codebook',)).train()
    objective({'x': torch.randn(2, 12, 40)})[0].backward()
    assert objective.codebook().shape == (1, 256, 8) and objective.head.out.out_features == 512
    assert objective.head.out.weight.grad[:256].any() and not objective.head.out.weight.grad[256:].any()


def test_dinosr_codebook_equals_a_loop(monkeypatch):
    torch.manual_seed(0)
    objective = DinoSR(Encoder(Config(dim=8, layers=2, causal=False)), codes=5).train()
    before = objective.codebook().clone()
    objective({'x': torch.randn(2, 12, 40)})
    x, code, _ = objective.seen
    sums, counts = objective.sums.clone(), objective.counts.clone()
    objective.after_step(0)
    for j in range(2):
        for v in range(5):
            mine = [x[j, i] for i in range(40) if min(range(5), key=lambda u: (x[j, i] - before[j, u]).norm().item()) == v]
            s = .9 * sums[j, v] + .1 * (torch.stack(mine).sum(0) if mine else 0)
            n = .9 * counts[j, v] + .1 * len(mine)
            assert torch.allclose(objective.codebook()[j, v], s / n if mine else before[j, v], atol=1e-4)
            if not mine:
                assert torch.allclose(objective.codebook()[j, v], before[j, v], atol=1e-5)


def test_sinkhorn_is_even_and_normalised():
    torch.manual_seed(0)
    q = sinkhorn(torch.randn(500, 10) * 2, rounds=60)
    assert torch.allclose(q.sum(1), torch.ones(500), atol=1e-5) and torch.allclose(q.sum(0), torch.full((10,), 50.), rtol=1e-2)
    a = torch.randn(6, 3)
    expected = (a - a.amax(1, keepdim=True)).exp()
    for _ in range(3):
        for k in range(3):
            expected[:, k] = expected[:, k] / (expected[:, k].sum() + 1e-8)
        for i in range(6):
            expected[i] = expected[i] / (expected[i].sum() + 1e-8)
    assert torch.allclose(sinkhorn(a), expected, atol=1e-6)


def test_seeding_finds_separate_clusters():
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(8, 16), dim=1)
    x = F.normalize(centres.repeat(100, 1) + .01 * torch.randn(800, 16), dim=1)
    found = (spread(x, 64) @ centres.T).argmax(1)
    assert len(set(found.tolist())) == 8


def test_hubert_equals_a_loop(monkeypatch):
    torch.manual_seed(0)
    mask = torch.rand(2, 150) < .5
    objective = frozen(HuBERT(Encoder(Config(dim=16, layers=1, causal=False))), monkeypatch, span_mask=mask)
    batch = {'x': torch.randn(2, 12, 300)}
    objective(batch)                                             # seeds the prototypes
    p, _, f = features(objective, batch, ~mask)
    x, total = F.normalize(standard(f).flatten(0, 1), dim=1), 0.
    for z, proto in zip(p.flatten(0, 1).split((128, 256), 1), objective.prototypes.split((128, 256))):
        q = sinkhorn(x @ proto.T / .15)
        kl = torch.stack([F.kl_div((z[i] / .5).log_softmax(0), q[i], reduction='sum') for i in range(300)])
        entropy = torch.distributions.Categorical(logits=z).entropy().mean()
        total += .75 * kl[mask.flatten()].mean() + .25 * kl[~mask.flatten()].mean() + .001 * entropy
    agree(objective, batch, total)


def test_effective_rank():
    torch.manual_seed(0)
    assert effective_rank(torch.randn(4000, 8)).item() == pytest.approx(8, abs=.1)
    assert effective_rank(torch.randn(4000, 1) * torch.randn(8)).item() == pytest.approx(1, abs=1e-2)


# --- the second paper's objectives, beats and patches

def records(B=3, T=1200, patients=None):
    """A batch of noise with R-peaks every 200 samples; the last record has fewer."""
    peaks = torch.arange(150, T - 100, 200).repeat(B, 1)
    peaks[-1, 2:] = -1
    return dict(x=torch.randn(B, 12, T), peaks=peaks, patient=torch.tensor(patients or list(range(B))), y=(torch.rand(B, 4) < .5).float())


def test_halves():
    batch = dict(x=torch.arange(20.).view(1, 1, 20), peaks=torch.tensor([[3, 9, 10, 18, -1]]))
    h = halves(batch)
    assert h['x'].flatten(1).tolist() == [list(range(10)), list(range(10, 20))]
    assert h['peaks'].tolist() == [[3, 9, -1, -1, -1], [0, 8, -1, -1, -1]]


def test_cmsc_equals_a_loop():
    torch.manual_seed(0)
    objective, batch = CMSC(Encoder(sized('resnet', 'tiny'))).eval(), records(patients=[7, 8, 7])
    f = torch.cat([objective.encoder({'x': batch['x'][..., a:a + 600]})[0].mean(1) for a in (0, 600)])
    z = [v / v.norm() for v in objective.head(f)]
    who, total, right = [7, 8, 7] * 2, 0., 0
    for i in range(6):
        others = [a for a in range(6) if a != i]
        positives = [a for a in others if who[a] == who[i]]
        assert len(positives) == (3 if who[i] == 7 else 1)
        denominator = torch.logsumexp(torch.stack([z[i] @ z[a] / .1 for a in others]), 0)
        total = total + sum(denominator - z[i] @ z[p] / .1 for p in positives) / len(positives)
        right += max(others, key=lambda a: (z[i] @ z[a]).item()) in positives
    agree(objective, batch, total / 6)
    logs = objective(batch)[1]
    assert logs['accuracy'].item() == pytest.approx(right / 6) and logs['chance'].item() == pytest.approx((4 * 3 + 2) / 6 / 5)


def test_vqbeat_equals_a_loop():
    torch.manual_seed(0)
    objective, batch = VQBeat(Encoder(sized('beat', 'tiny')), codes=9).eval(), records()
    objective(batch)                                             # seeds the codebook
    h, pad = objective.encoder(batch)
    e = F.normalize(objective.to_code(h), dim=2)
    q = torch.zeros_like(e)
    commit = []
    for b, t in torch.nonzero(~pad[:, 1:]).tolist():
        nearest = min(range(9), key=lambda k: (e[b, t + 1] - objective.codebook[k]).norm().item())
        q[b, t + 1] = e[b, t + 1] + (objective.codebook[nearest] - e[b, t + 1]).detach()
        commit.append((e[b, t + 1] - objective.codebook[nearest]).square().mean())
    y = objective.from_code(q)
    for block in objective.decoder:
        y = block(y, pad)[0]
    beats, out = objective.encoder.stem.beats(batch)[0], objective.head(y[:, 1:])
    errors = [(out[b, t] - beats[b, t]).square().mean() for b, t in torch.nonzero(~pad[:, 1:]).tolist()]
    agree(objective, batch, sum(errors) / len(errors) + sum(commit) / len(commit))


def test_vqbeat_codebook_equals_a_loop():
    torch.manual_seed(0)
    objective, batch = VQBeat(Encoder(sized('beat', 'tiny')), codes=9).train(), records()
    objective(batch)
    before, (x, code) = objective.codebook.clone(), objective.seen
    objective.after_step(0)
    for v in range(9):
        mine = [x[i] for i in range(len(x)) if code[i] == v]
        new = before[v] if not mine else F.normalize(.99 * before[v] + .01 * F.normalize(torch.stack(mine).mean(0), dim=0), dim=0)
        assert torch.allclose(objective.codebook[v], new, atol=1e-6)


def test_kmeans_finds_separate_clusters():
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(8, 16), dim=1)
    x = F.normalize(centres.repeat(50, 1) + .01 * torch.randn(400, 16), dim=1)
    found = kmeans(x, 16)
    assert ((found @ centres.T).amax(0) > .99).all() and torch.allclose(found.norm(dim=1), torch.ones(16))
    assert kmeans(x[:5], 8).shape == (8, 16)                     # fewer beats than codes


def make_beats(codes=9):
    tokenizer = VQBeat(Encoder(sized('beat', 'tiny')), codes=codes).eval()
    tokenizer(records(8))
    return Beats(Encoder(sized('beat', 'tiny')), tokenizer=tokenizer).eval()


def test_beats_equals_a_loop(monkeypatch):
    torch.manual_seed(0)
    objective, batch = make_beats(), records()
    noise = torch.rand(3, 60)
    monkeypatch.setattr(torch, 'rand', lambda *shape, **kwargs: noise)
    pad = (batch['peaks'] < 0).repeat(1, 12)
    mask = torch.zeros(3, 60, dtype=torch.bool)
    for b in range(3):
        real = torch.nonzero(~pad[b])[:, 0].tolist()
        mask[b, sorted(real, key=lambda t: noise[b, t].item())[:len(real) // 2]] = True
    assert mask.sum(1).tolist() == [30, 30, 12] and not (mask & pad).any()
    e, _ = objective.tokenizer.encode(batch)
    z, padded = objective.encoder.tokens(batch, ~mask)
    h = objective.encoder.backbone(z, padded)
    terms = []
    for b, t in torch.nonzero(mask).tolist():
        code = max(range(9), key=lambda k: (e[b, t + 1] @ objective.tokenizer.codebook[k]).item())
        terms.append(-objective.head(h[b, t + 1]).log_softmax(0)[code])
    agree(objective, batch, sum(terms) / len(terms))
    assert all(not p.requires_grad for p in objective.tokenizer.parameters())


def test_mae_equals_a_loop(monkeypatch):
    torch.manual_seed(0)
    objective, batch = MAE(Encoder(sized('vit', 'tiny'))).eval(), records(2, 480)
    noise = torch.rand(2, 40)
    monkeypatch.setattr(torch, 'rand', lambda *shape, **kwargs: noise)
    mask = torch.stack([n <= n.sort().values[19] for n in noise])                            # the 20 smallest of 40
    z, _ = objective.encoder.tokens(batch, ~mask)
    y = objective.embed(objective.encoder.backbone(z))
    terms = []
    for b in range(2):
        seen = iter(y[b, 1:])
        line = torch.stack([y[b, 0]] + [objective.hidden if m else next(seen) for m in mask[b]]) + objective.place[:41]
        p = objective.head(objective.norm(objective.decoder(line[None])[0]))[0, 1:]
        for t in torch.nonzero(mask[b])[:, 0].tolist():
            patch = batch['x'][b, :, 12 * t:12 * t + 12]
            patch = patch - patch.mean(1, keepdim=True)
            terms.append((p[t] - (patch / (patch.square().mean() + 1e-6).sqrt()).flatten()).square().mean())
    agree(objective, batch, sum(terms) / len(terms))


def test_mae_hides_the_same_number_everywhere():
    torch.manual_seed(0)
    for hide in (.05, .5, .75):
        logs = MAE(Encoder(sized('vit', 'tiny')), hide=hide)(records(2, 2400))[1]
        assert logs['hidden'].item() == pytest.approx(hide, abs=1e-6)


@pytest.mark.parametrize('focal', [0., 2.])
def test_supervised_equals_a_loop(focal):
    torch.manual_seed(0)
    objective, batch = Supervised(Encoder(sized('s4', 'tiny')), columns=[2, 0, 3], focal=focal).eval(), records()
    batch['y'][1, 2] = math.nan
    z, terms = objective.head(objective.encoder(batch)[0]), []
    for b in range(3):
        for k, c in enumerate([2, 0, 3]):
            if math.isfinite(batch['y'][b, c]):
                p = z[b, k].sigmoid() if batch['y'][b, c] else 1 - z[b, k].sigmoid()
                terms.append(-p.log() * (1 - p) ** focal)
    assert len(terms) == 8
    agree(objective, batch, sum(terms) / 8)


# --- every pair

def build(name, backbone):
    kind = OBJECTIVES[name]
    more = {'supervised': dict(columns=range(4)), 'beats': dict(tokenizer=None), 'vqbeat': dict(codes=64)}.get(name, {})
    if name == 'beats':
        more['tokenizer'] = make_beats(codes=64).tokenizer
    return kind(Encoder(sized(backbone, 'tiny', kind.causal)), steps=10, **more)


def derived(name, objective, batch, logs):
    """The loss with a zeroed head where every token is hidden."""
    if name in ('jepa', 'data2vec'):                             # smooth L1 of the target itself
        layers, f = objective.teacher(batch)
        target = standardise(f) if name == 'jepa' else (standardise(layers[-1][0]) + standardise(layers[-2][0])) / 2
        error = F.smooth_l1_loss(torch.zeros_like(target), target).item()
        return error * (objective.encoder.dim ** .5 if name == 'data2vec' else 1)
    if name == 'hubert':                                         # uniform prediction: ln K - entropy of the target, + .001 ln K
        x = F.normalize(standardise(logs['target']).flatten(0, 1), dim=1)
        entropy = [torch.special.entr(sinkhorn(x @ p.T / .15)).sum(1).mean().item() for p in objective.prototypes.split((128, 256))]
        return (.75 + .001) * math.log(128 * 256) - .75 * sum(entropy)
    if name == 'vqbeat':
        beats, pad = objective.encoder.stem.beats(batch)
        e = objective.encode(batch)[0][:, 1:][~pad]
        return (beats[~pad].square().mean() + (e - objective.codebook[(e @ objective.codebook.T).argmax(1)]).square().mean()).item()
    return {'cpc': math.log(129), 'dinosr': math.log(256), 'cmsc': math.log(2 * 3 - 1), 'beats': math.log(64), 'mae': 1., 'supervised': math.log(2)}[name]


@pytest.mark.parametrize('name, backbone', [(name, backbone) for name, kind in OBJECTIVES.items() for backbone in kind.backbones])
def test_every_pair_learns(name, backbone, monkeypatch):
    """Two steps: finite losses, a gradient for every trainable tensor and none for what is fixed, and the loss of a zeroed head."""
    torch.manual_seed(0)
    objective, batch = build(name, backbone).train(), records()
    learned = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(learned.values(), lr=1e-3)
    for step in range(2):
        loss, logs = objective(batch)
        loss.backward()
        assert loss.isfinite()
        idle = [n for n, p in learned.items() if p.grad is None]
        assert idle == (['encoder.stem.hidden'] if backbone == 'beat' and name != 'beats' else [])            # learns only where beats are hidden
        assert all(p.grad is None for n, p in objective.named_parameters() if n not in learned)
        optimiser.step(), optimiser.zero_grad()
        objective.after_step(step)
    numbers, alarm = health(logs)
    assert all(math.isfinite(v) for v in numbers.values()) and 1 <= numbers['rank'] <= 128 and 0 <= numbers['std'] <= 1.01
    objective.eval()
    if name == 'hubert':
        objective.age.zero_()
    last = [m for m in objective.head.modules() if isinstance(m, torch.nn.Linear)][-1]
    last.weight.data.zero_()
    if last.bias is not None:
        last.bias.data.zero_()
    monkeypatch.setattr(objectives, 'span_mask', lambda B, L, *args: torch.ones(B, L, dtype=torch.bool))
    monkeypatch.setattr(objectives, 'block_mask', lambda B, L, *args: (torch.zeros(B, L, dtype=torch.bool), torch.ones(B, L, dtype=torch.long)))
    loss, logs = objective(batch)
    assert loss.item() == pytest.approx(derived(name, objective, batch, logs), rel=2e-4)


# --- leaks

@pytest.mark.parametrize('name, backbone', [(n, b) for n in ('jepa', 'data2vec', 'dinosr', 'hubert') for b in OBJECTIVES[n].backbones] + [('beats', 'beat'), ('mae', 'vit')])
def test_what_is_hidden_cannot_be_seen(name, backbone, monkeypatch):
    """Other values in the hidden samples change no output of the student at all; other values in visible ones do."""
    torch.manual_seed(0)
    objective, batch = build(name, backbone).eval(), records()
    out, hidden = [], torch.zeros(3, 12, 1200, dtype=torch.bool)
    if name == 'beats':
        noise = torch.rand(3, 60)
        monkeypatch.setattr(torch, 'rand', lambda *shape, **kwargs: noise)
        pad = (batch['peaks'] < 0).repeat(1, 12)
        rank = noise.masked_fill(pad, 2.).argsort(1).argsort(1)
        for b, t in torch.nonzero(rank < (~pad).sum(1, keepdim=True) // 2).tolist():
            p = batch['peaks'][b, t % 5]
            hidden[b, t // 5, p - 100:p + 100] = True
    elif name == 'mae':
        noise = torch.rand(3, 100)
        monkeypatch.setattr(torch, 'rand', lambda *shape, **kwargs: noise)
        hidden[:] = (noise.argsort(1).argsort(1) < 50).repeat_interleave(12, 1)[:, None]
    elif name == 'jepa':
        visible, cover = block_mask(3, 600)
        monkeypatch.setattr(objectives, 'block_mask', lambda *args: (visible, cover))
    else:
        visible = ~span_mask(3, 600, 10)
        monkeypatch.setattr(objectives, 'span_mask', lambda *args: ~visible)
    if name in ('jepa', 'data2vec', 'dinosr', 'hubert'):         # token t sees samples 2 t - 1 to 2 t + 1
        seen = torch.zeros(3, 1202, dtype=torch.bool)
        for k in range(3):
            seen[:, k:k + 1200:2] |= visible
        hidden[:] = ~seen[:, None, 1:1201]
    objective.head.register_forward_hook(lambda module, inputs, output: out.append(output))
    objective(batch)
    for where in (hidden, ~hidden):
        assert where.any()
        objective({**batch, 'x': torch.where(where, batch['x'] + 1, batch['x'])})
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])


# --- health and alarms

def test_unassigned_codes_stay_for_good():
    torch.manual_seed(0)
    for released, stays in (((), True), (('codebook',), False)):
        objective = DinoSR(Encoder(Config(dim=8, layers=2, causal=False)), codes=5, released=released)
        before = objective.codebook().clone()
        x, code = torch.randn(objective.books, 40, 8), torch.zeros(objective.books, 40, dtype=torch.long)
        for _ in range(300):
            objective.seen = x, code, F.one_hot(code, 5).float().sum(1)
            objective.after_step(0)
        dead = objective.codebook()[:, 1:]
        assert torch.equal(dead, before[:, 1:]) if stays else dead.abs().max() < 1e-3        # as released they fade to the origin
        assert torch.allclose(objective.codebook()[:, 0], x.mean(1), atol=1e-4)


def test_alarms_fire_on_collapse():
    torch.manual_seed(0)
    good = dict(features=torch.randn(4, 300, 16), target=torch.randn(4, 300, 16), hits=torch.full((2, 64), 30.))
    numbers, alarm = health(good)
    assert alarm == '' and numbers['std'] == pytest.approx(1, abs=.02) and numbers['perplexity'] == pytest.approx(64) and numbers['chance'] == pytest.approx(1 / 64)
    assert 'one direction' in health({**good, 'features': torch.randn(4, 300, 1) * torch.randn(16)})[1]
    assert 'all the same' in health({**good, 'features': torch.randn(16) + .001 * torch.randn(4, 300, 16)})[1]
    for constant in (torch.ones(4, 300, 16), torch.zeros(4, 300, 16)):
        numbers, alarm = health({**good, 'features': constant})
        assert numbers['rank'] == pytest.approx(1, abs=1e-3) and 'one direction' in alarm and 'all the same' in alarm
    assert 'targets hardly vary' in health({**good, 'target': torch.randn(16) + .001 * torch.randn(4, 300, 16)})[1]
    one = torch.zeros(2, 64)
    one[:, 3] = 1000
    numbers, alarm = health({**good, 'hits': one})
    assert 'any code' in alarm and numbers['perplexity'] == pytest.approx(1) and numbers['chance'] == 1 and numbers['codes'] == 1


@pytest.mark.parametrize('kind', [JEPA, Data2Vec, DinoSR, HuBERT])
def test_a_constant_teacher_raises_an_alarm(kind):
    torch.manual_seed(0)
    batch = {'x': torch.randn(4, 12, 600).cumsum(2) * .1}
    objective = kind(see_data(Encoder(Config(dim=16, layers=2, causal=False)), [batch]), steps=100).eval()
    assert health(objective(batch)[1])[1] == ''
    objective.teacher.net.blocks[-1].norm.weight.data.zero_()    # every feature the same
    objective.teacher.net.blocks[-1].out.weight.data.zero_()     # and every branch
    assert health(objective(batch)[1])[1] != ''


def test_released_input_is_positional():
    x = torch.zeros(1, 12, 5)
    x[0, 9] = .14030828 + .00155546                              # V4, divided by what is another lead's SD
    assert released_input(x)[0, 9, 0].item() == pytest.approx(1, abs=1e-4) and released_input(x)[0, 0, 0].item() == pytest.approx(.00184586 / .16401004, abs=1e-5)


def test_pairs_and_picture(tmp_path, here, capsys):
    objectives.main(['--pairs'])
    text = capsys.readouterr().out
    assert all(name in text for name in OBJECTIVES)
    objectives.main(['--out', str(tmp_path / 'o.png')])
    assert (tmp_path / 'o.png').stat().st_size > 10_000
    with pytest.raises(SystemExit, match='--record 500: the sample has records 0 to'):
        objectives.main(['--record', '500'])


def test_raw_target_is_millivolts():
    """Patch by patch, lead by lead, the signal itself; with a zeroed head the loss is its mean square over all patches but one."""
    objective, batch = MAE(Encoder(sized('vit', 'tiny')), hide=.999, raw_target=True).eval(), records(2, 480)
    target = objective.target(batch)                             # (B, 40, 12 12): 50 ms are 12 samples
    x = batch['x']
    assert all(torch.equal(target[b, i, 12 * lead:12 * lead + 12], x[b, lead, 12 * i:12 * i + 12]) for b in (0, 1) for i in (0, 17, 39) for lead in (0, 11))
    objective.head.weight.data.zero_(), objective.head.bias.data.zero_()
    squares = target.square().mean(2)                            # (B, 40)
    loss = objective(batch)[0].item()
    assert squares.sum().sub(squares.amax(1).sum()).item() / 78 - 1e-7 <= loss <= squares.sum().sub(squares.amin(1).sum()).item() / 78 + 1e-7
