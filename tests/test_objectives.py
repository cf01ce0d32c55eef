"""Objectives against brute force."""
import math

import pytest
import torch

from models import Config, Encoder
from objectives import CPC


def make(seed=0, horizon=3, negatives=5):
    torch.manual_seed(seed)
    return CPC(Encoder(Config(dim=8, layers=1)), horizon, negatives).double().eval()


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
