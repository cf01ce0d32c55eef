"""Objectives against brute force."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

import objectives
from models import Config, Encoder
from objectives import (CPC, JEPA, Data2Vec, DinoSR, HuBERT, block_mask, effective_rank, follow, make_teacher, sinkhorn, span_mask,
                        spread)


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

def test_spans_equal_a_loop_and_hide_half(monkeypatch):
    torch.manual_seed(0)
    draws = torch.rand(3, 50), torch.randint(50, (3, 1))
    monkeypatch.setattr(torch, 'rand', lambda *shape, **kwargs: draws[0])
    monkeypatch.setattr(torch, 'randint', lambda *args, **kwargs: draws[1])
    mask = span_mask(3, 50, 7)
    for b in range(3):
        starts = [t for t in range(50) if draws[0][b, t] < .065 or t == draws[1][b, 0]]
        assert mask[b].tolist() == [any(s <= t < s + 7 for s in starts) for t in range(50)]
    monkeypatch.undo()
    assert span_mask(400, 300, 10).float().mean().item() == pytest.approx(1 - .935 ** 10, abs=.02)
    assert span_mask(400, 300, 10, probability=0.).any(1).all()


def test_blocks_are_as_specified():
    torch.manual_seed(0)
    for _ in range(20):
        visible, cover = block_mask(16, 300)
        lengths = cover.sum(1) / 4
        assert (lengths == lengths[0]).all() and 45 <= lengths[0] <= 60 and cover.max() <= 4
        assert not (visible & (cover > 0)).any() and (visible.sum(1) >= 10).all()


def test_teacher_starts_as_a_copy_and_halves_its_distance():
    torch.manual_seed(0)
    student = Encoder(Config(dim=8, layers=2, causal=False))
    teacher, start = make_teacher(student), copy.deepcopy(student.state_dict())
    for a, b in zip(teacher.state_dict().values(), student.state_dict().values()):
        assert torch.equal(a, b)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.)
    student.stem[1].running_mean += 2
    for _ in range(5):
        follow(teacher, student, half_life=5)
    moved = teacher.state_dict()
    assert torch.allclose(moved['blocks.0.s4.C'], start['blocks.0.s4.C'] + .5, atol=1e-5)
    assert torch.allclose(moved['stem.1.running_mean'], start['stem.1.running_mean'] + 1, atol=1e-5)
    assert torch.equal(moved['blocks.0.s4.log_dt'], student.blocks[0].s4.log_dt)


@pytest.mark.parametrize('kind', [JEPA, Data2Vec, DinoSR, HuBERT])
def test_teacher_gets_no_gradient_and_eval_changes_nothing(kind):
    torch.manual_seed(0)
    objective = kind(Encoder(Config(dim=16, layers=2, causal=False)), steps=100).train()
    loss, logs = objective({'x': torch.randn(2, 12, 200)})
    loss.backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert sum(p.grad.abs().sum() for p in objective.encoder.parameters() if p.grad is not None) > 0
    assert 1 <= logs['rank'] <= 16 and not objective.teacher.training


def frozen(objective, monkeypatch, **draws):
    """The objective in eval mode with its masks fixed."""
    for name, value in draws.items():
        monkeypatch.setattr(objectives, name, lambda *args, value=value, **kwargs: value)
    return objective.eval()


def smooth_l1(d):
    return .5 * d * d if abs(d) < 1 else abs(d) - .5


def features(objective, batch, visible):
    """Student's head output and the teacher's layers and features, by hand."""
    z = objective.encoder.tokens(batch)[0]
    h = objective.encoder.backbone(torch.where(visible[..., None], z, objective.hidden))
    layers = []
    f = objective.teacher.backbone(objective.teacher.tokens(batch)[0], None, layers)
    return objective.head(h), layers, f


def standard(v):
    return (v - v.mean()) / (v.var(correction=0) + 1e-5) ** .5


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
    terms = [smooth_l1((p[b, t, d] - standard(f[b, t])[d]).item()) for b in range(2) for s in starts[b] for t in range(s, s + length) for d in range(8)]
    assert len(terms) == 2 * 4 * 4 * 8 and objective(batch)[0].item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_data2vec_equals_a_loop(monkeypatch):
    torch.manual_seed(0)
    mask = torch.rand(2, 20) < .4
    objective = frozen(Data2Vec(Encoder(Config(dim=8, layers=3, causal=False))), monkeypatch, span_mask=mask)
    batch = {'x': torch.randn(2, 12, 40)}
    p, layers, _ = features(objective, batch, ~mask)
    terms = []
    for b, t in torch.nonzero(mask).tolist():
        target = (standard(layers[1][0][b, t]) + standard(layers[2][0][b, t])) / 2
        terms.append(sum(smooth_l1(d.item()) for d in p[b, t] - target) / 8 ** .5)
    assert objective(batch)[0].item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_values_with_a_zeroed_head():
    torch.manual_seed(0)
    batch = {'x': torch.randn(4, 12, 600)}
    for kind, low, high in ((JEPA, .36, .46), (Data2Vec, .2 * 8, .42 * 8), (DinoSR, math.log(256) - 1e-4, math.log(256) + 1e-4)):
        objective = kind(Encoder(Config(dim=64, causal=False))).eval()
        objective.head.out.weight.data.zero_(), objective.head.out.bias.data.zero_()
        assert low < objective(batch)[0].item() < high, kind


def test_dinosr_codebook_equals_a_loop(monkeypatch):
    torch.manual_seed(0)
    objective = DinoSR(Encoder(Config(dim=8, layers=2, causal=False)), codes=5).train()
    before = objective.codebook().clone()
    objective({'x': torch.randn(2, 12, 40)})
    x, code = objective.seen
    sums, counts = objective.sums.clone(), objective.counts.clone()
    objective.after_step(0)
    for j in range(2):
        for v in range(5):
            mine = [x[j, i] for i in range(40) if min(range(5), key=lambda u: (x[j, i] - before[j, u]).norm().item()) == v]
            s = .9 * sums[j, v] + .1 * (torch.stack(mine).sum(0) if mine else 0)
            n = .9 * counts[j, v] + .1 * len(mine)
            assert torch.allclose(objective.codebook()[j, v], s / n, atol=1e-4)
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
    loss = objective(batch)[0].item()
    p, _, f = features(objective, batch, ~mask)
    x, total = F.normalize(f.flatten(0, 1), dim=1), 0.
    for z, proto in zip(p.flatten(0, 1).split((128, 256), 1), objective.prototypes.split((128, 256))):
        q = sinkhorn(x @ proto.T / .15)
        kl = torch.stack([F.kl_div((z[i] / .5).log_softmax(0), q[i], reduction='sum') for i in range(300)])
        entropy = torch.distributions.Categorical(logits=z).entropy().mean()
        total += .75 * kl[mask.flatten()].mean() + .25 * kl[~mask.flatten()].mean() + .001 * entropy
    assert loss == pytest.approx(total.item(), abs=1e-4)


def test_effective_rank():
    torch.manual_seed(0)
    assert effective_rank(torch.randn(4000, 8)).item() == pytest.approx(8, abs=.1)
    assert effective_rank(torch.randn(4000, 1) * torch.randn(8)).item() == pytest.approx(1, abs=1e-2)
