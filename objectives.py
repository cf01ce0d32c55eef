"""Self-supervised objectives, one class each, side by side.

    python train.py --objective cpc                      # each trains through the same loop

An objective wraps an Encoder. Its class attributes say what it needs (window in seconds, causal, which backbones);
forward(batch) returns (loss, logs), logs being what shows its health; after_step(step) moves teachers and codebooks.
"""
import torch
import torch.nn.functional as F
from torch import nn


class CPC(nn.Module):
    """Contrastive predictive coding (van den Oord et al. 2018, 1807.03748) as arXiv 2605.12241 runs it.

    At each position i a causal context predicts the stem's token `horizon` = 14 steps (117 ms) ahead, and only that one, among 128
    negatives. Negatives: tokens of the same crop, drawn uniformly with replacement from all positions but the target's, anew for
    every position; past, present and future all qualify. Logits are plain inner products (no temperature, no normalisation), and
    the targets are not detached: the stem learns through them too. Loss: cross-entropy, mean over positions and crops;
    ln 129 = 4.86 with a zeroed head. (The released code sums over the 286 positions instead.)
    """
    window, causal, backbones = 2.5, True, ('s4',)

    def __init__(self, encoder, horizon=14, negatives=128):
        super().__init__()
        self.encoder, self.horizon, self.negatives = encoder, horizon, negatives
        dim = encoder.config.dim
        self.head = nn.Linear(dim, dim, bias=False)

    def forward(self, batch):
        # view and context
        z, pad = self.encoder.tokens(batch)                      # (B, L, D)
        h = self.encoder.backbone(z, pad)
        # prediction of every position against every token of its crop
        c = self.head(h[:, :-self.horizon])                      # (B, P, D)
        with torch.autocast(c.device.type, enabled=False):       # unnormalised logits are too large for bf16
            s = c.float() @ z.float().transpose(1, 2)            # (B, P, L)
        # target and negatives: indices 0 ... L-1 but for the target's own
        B, P, L = s.shape
        target = torch.arange(self.horizon, L, device=s.device).expand(B, P)[..., None]
        negative = torch.randint(L - 1, (B, P, self.negatives), device=s.device)
        negative = negative + (negative >= target)
        logits = s.gather(2, torch.cat([target, negative], 2))   # (B, P, 1 + negatives)
        # loss and health
        loss = F.cross_entropy(logits.flatten(0, 1), torch.zeros(B * P, dtype=torch.long, device=s.device))
        accuracy = (logits[..., :1] > logits[..., 1:]).all(2).float().mean()                # a tie is a miss: collapse scores 0
        return loss, {'accuracy': accuracy, 'chance': 1 / (1 + self.negatives)}

    def after_step(self, step):
        """Nothing to move: CPC has no teacher."""


OBJECTIVES = {'cpc': CPC}
