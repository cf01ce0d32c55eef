"""Self-supervised objectives, one class each, side by side.

    python train.py --objective cpc                      # cpc jepa data2vec dinosr hubert: each trains through the same loop

An objective wraps an Encoder. Its class attributes say what it needs (window in seconds, causal, which backbones);
forward(batch) returns (loss, logs), logs being what shows its health; after_step(step) moves teachers and codebooks.
The five follow arXiv 2605.12241 as its methods intend; where its released code does otherwise, the class says so.
"""
import copy, math

import torch
import torch.nn.functional as F
from torch import nn

from models import S4Block, Config, Encoder


# ---------------------------------------------------------------------------------------------------------------------
# what several objectives share

def make_teacher(encoder):
    """An exact copy of the student, buffers included, in eval mode and without gradients."""
    return copy.deepcopy(encoder).eval().requires_grad_(False)


@torch.no_grad()
def follow(teacher, student, half_life):
    """Move every float entry of the teacher towards the student's, halving the distance in `half_life` steps; copy the rest."""
    for (name, t), s in zip(teacher.state_dict().items(), student.state_dict().values()):
        if name.endswith('log_dt'):                              # frozen dynamics: equal from the start
            continue
        if t.is_floating_point():
            t.lerp_(s, 1 - .5 ** (1 / half_life))
        else:
            t.copy_(s)


@torch.no_grad()
def teach(teacher, batch):
    """The teacher's (branch, output) of every block on the unmasked batch, then its final output: list, (B, L, D)."""
    teacher.eval()                                               # whatever mode the objective as a whole is in
    layers = []
    return layers, teacher.backbone(*teacher.tokens(batch), layers)


def span_mask(B, L, span, probability=.065, device='cpu'):
    """True where hidden (B, L): each token starts a span with the given probability, spans merge; at least one in each sequence.
    Spans of 10 hide 49 %. (The released code divides the probability by the span once more and hides 6 %.)"""
    starts = torch.rand(B, L, device=device) < probability
    starts = starts | (torch.arange(L, device=device) == torch.randint(L, (B, 1), device=device))
    return F.max_pool1d(F.pad(starts.float(), (span - 1, 0))[:, None], span, 1)[:, 0] > 0


def block_mask(B, L, device='cpu', targets=4, least=10, tries=16):
    """JEPA's blocks: `targets` blocks of 15-20 % of the tokens, the same length in a batch, and a context of 85-100 % less the blocks.
    Returns (visible (B, L) bool, cover (B, L): how many target blocks hold each token). A context that falls under `least` tokens is
    drawn again. (The released code makes all blocks 64 tokens and reveals targets in a tenth of the crops.)"""
    share = torch.rand(2)
    length, context = int(L * (.15 + .05 * share[0])), int(L * (.85 + .15 * share[1]))
    t = torch.arange(L, device=device)
    starts = torch.randint(L - length + 1, (tries, B, targets, 1), device=device)
    cover = ((t >= starts) & (t < starts + length)).sum(2)       # (tries, B, L)
    start = torch.randint(L - context + 1, (tries, B, 1), device=device)
    visible = (t >= start) & (t < start + context) & (cover == 0)
    pick = (visible.sum(2) >= least).int().argmax(0)             # the first draw that shows enough
    row = torch.arange(B, device=device)
    return visible[pick, row], cover[pick, row]


def norm(x):
    """LayerNorm over the features without weights."""
    return F.layer_norm(x.float(), x.shape[-1:])


def effective_rank(x):
    """exp of the entropy of the covariance's normalised spectrum, of x (..., D): 1 is collapse, D is full."""
    x = x.detach().float().flatten(0, -2)
    x = x[:: max(1, len(x) // 2048)]
    share = torch.linalg.eigvalsh(torch.cov(x.T)).clamp(min=1e-12)
    share = share / share.sum()
    return torch.exp(-(share * share.log()).sum())


class Head(nn.Module):
    """SSL head of data2vec, DinoSR and JEPA: one layer of the backbone's kind, bidirectional (S4: state 64), then a linear map."""

    def __init__(self, config, out):
        super().__init__()
        if config.backbone == 's4':
            self.block = S4Block(config.dim, 64, False, config.dropout)
        else:
            self.block = Encoder(Config(config.backbone, config.dim, 1, causal=False, dropout=config.dropout)).blocks[-1]
        self.out = nn.Linear(config.dim, out)

    def forward(self, h):
        return self.out(self.block(h)[0])


class CPC(nn.Module):
    """Contrastive predictive coding (van den Oord et al. 2018, 1807.03748) as arXiv 2605.12241 runs it.

    At each position i a causal context predicts the stem's token `horizon` = 14 steps (117 ms) ahead, and only that one, among 128
    negatives. Negatives: tokens of the same crop, drawn uniformly with replacement from all positions but the target's, anew for
    every position; past, present and future all qualify. Logits are plain inner products (no temperature, no normalisation), and
    the targets are not detached: the stem learns through them too. Loss: cross-entropy, mean over positions and crops;
    ln 129 = 4.86 with a zeroed head. (The released code sums over the 286 positions instead.)
    """
    window, causal, backbones = 2.5, True, ('s4', 'transformer', 'net1d')

    def __init__(self, encoder, steps=800, horizon=14, negatives=128):
        super().__init__()
        self.encoder, self.horizon, self.negatives = encoder, horizon, negatives
        self.head = nn.Linear(encoder.dim, encoder.dim, bias=False)

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


class JEPA(nn.Module):
    """Joint-embedding prediction: from a visible context, predict an EMA teacher's features of hidden blocks (I-JEPA, Assran et al.
    2023, 2301.08243, for a sequence). Loss: smooth L1 (beta 1), mean over blocks, tokens and features, targets LayerNormed;
    about .42 with a zeroed head. A rising loss can be healthy: the targets move."""
    window, causal, backbones = 2.5, False, ('s4', 'transformer', 'net1d')

    def __init__(self, encoder, steps=800):
        super().__init__()
        self.encoder, self.teacher, self.half_life = encoder, make_teacher(encoder), max(1, .05 * steps)
        self.hidden = nn.Parameter(torch.randn(encoder.dim))
        self.head = Head(encoder.config, encoder.dim)

    def forward(self, batch):
        # view and mask
        z, pad = self.encoder.tokens(batch)                      # (B, L, D)
        visible, cover = block_mask(*z.shape[:2], z.device)
        # student
        h = self.encoder.backbone(torch.where(visible[..., None], z, self.hidden.to(z.dtype)), pad)
        p = self.head(h)
        # teacher and target
        _, f = teach(self.teacher, batch)
        target = norm(f)
        # loss and health
        error = F.smooth_l1_loss(p.float(), target, reduction='none').mean(2)                # (B, L)
        loss = (error * cover).sum() / cover.sum()
        return loss, {'rank': effective_rank(f), 'hidden': 1 - visible.float().mean()}

    def after_step(self, step):
        follow(self.teacher, self.encoder, self.half_life)


class Data2Vec(nn.Module):
    """data2vec (Baevski et al. 2022, 2202.03555): regress the mean of an EMA teacher's top two layers at hidden tokens.

    Target: each of the last two blocks' branches before the residual sum, LayerNormed, averaged. Loss: smooth L1 (beta 1), summed over
    the features / sqrt(D), mean over hidden tokens; 5.3 to 9.6 at D 512 with a zeroed head, by how alike the two layers are."""
    window, causal, backbones = 2.5, False, ('s4', 'transformer', 'net1d')

    def __init__(self, encoder, steps=800, span_ms=83):
        super().__init__()
        self.encoder, self.teacher, self.half_life = encoder, make_teacher(encoder), max(1, .05 * steps)
        self.span = max(1, round(span_ms / 1000 * encoder.tokens_per_second))
        self.hidden = nn.Parameter(torch.randn(encoder.dim))
        self.head = Head(encoder.config, encoder.dim)

    def forward(self, batch):
        # view and mask
        z, pad = self.encoder.tokens(batch)                      # (B, L, D)
        mask = span_mask(*z.shape[:2], self.span, device=z.device)
        # student
        h = self.encoder.backbone(torch.where(mask[..., None], self.hidden.to(z.dtype), z), pad)
        p = self.head(h)
        # teacher and target
        layers, f = teach(self.teacher, batch)
        target = (norm(layers[-1][0]) + norm(layers[-2][0])) / 2
        # loss and health
        error = F.smooth_l1_loss(p.float(), target, reduction='none').sum(2) / target.shape[2] ** .5              # (B, L)
        loss = (error * mask).sum() / mask.sum()
        return loss, {'rank': effective_rank(f), 'target_std': target.std((0, 1)).mean(), 'hidden': mask.float().mean()}

    def after_step(self, step):
        follow(self.teacher, self.encoder, self.half_life)


class DinoSR(nn.Module):
    """DinoSR (Liu et al. 2023, 2305.10005): predict, at hidden tokens, which code of an online codebook the teacher's feature falls to.

    One codebook of 256 for each of the last two blocks' outputs (the released configuration has one, on the last output). Codes are
    EMA means (decay .9) of the features assigned to them, all tokens counting; unassigned codes keep their place. Loss: cross-entropy,
    mean over hidden tokens and codebooks; ln 256 = 5.55 with a zeroed head. A loss near 0 with few codes used is collapse."""
    window, causal, backbones = 2.5, False, ('s4', 'transformer', 'net1d')

    def __init__(self, encoder, steps=800, span_ms=83, codes=256, books=2, decay=.9):
        super().__init__()
        self.encoder, self.teacher, self.half_life = encoder, make_teacher(encoder), max(1, .05 * steps)
        self.span, self.books, self.decay = max(1, round(span_ms / 1000 * encoder.tokens_per_second)), books, decay
        self.hidden = nn.Parameter(torch.randn(encoder.dim))
        self.head = Head(encoder.config, books * codes)
        self.register_buffer('sums', norm(torch.randn(books, codes, encoder.dim)))
        self.register_buffer('counts', torch.ones(books, codes))
        self.seen = None

    def codebook(self):
        return self.sums / self.counts.clamp(min=1e-8)[..., None]                            # (books, codes, D)

    def forward(self, batch):
        # view and mask
        z, pad = self.encoder.tokens(batch)                      # (B, L, D)
        mask = span_mask(*z.shape[:2], self.span, device=z.device)
        # student
        h = self.encoder.backbone(torch.where(mask[..., None], self.hidden.to(z.dtype), z), pad)
        logits = self.head(h).float().unflatten(2, (self.books, -1))                         # (B, L, books, codes)
        # teacher and target
        layers, f = teach(self.teacher, batch)
        x = torch.stack([norm(out).flatten(0, 1) for _, out in layers[-self.books:]])        # (books, B L, D)
        code = torch.cdist(x, self.codebook()).argmin(2)                                     # (books, B L)
        self.seen = (x, code) if self.training else None
        # loss and health
        target = code.view(self.books, *mask.shape).permute(1, 2, 0)                         # (B, L, books)
        loss = F.cross_entropy(logits[mask].flatten(0, 1), target[mask].flatten())
        used = torch.zeros_like(self.counts).scatter_(1, code, 1.).sum(1).mean()
        return loss, {'rank': effective_rank(f), 'codes': used, 'hidden': mask.float().mean()}

    @torch.no_grad()
    def after_step(self, step):
        x, code = self.seen
        hits = torch.zeros_like(self.counts).scatter_add_(1, code, torch.ones_like(code, dtype=self.counts.dtype))
        sums = torch.zeros_like(self.sums).scatter_add_(1, code[..., None].expand_as(x), x)
        self.sums.lerp_(sums, 1 - self.decay)                    # both decay together, so an unassigned code stays where it is
        self.counts.lerp_(hits, 1 - self.decay)
        follow(self.teacher, self.encoder, self.half_life)


def sinkhorn(scores, rounds=3):
    """Rows of exp(scores) (N, K) made to sum to 1 and columns to be even, alternately, ending with the rows."""
    q = (scores - scores.amax(1, keepdim=True)).exp()
    for _ in range(rounds):
        q = q / (q.sum(0) + 1e-8)
        q = q / (q.sum(1, keepdim=True) + 1e-8)
    return q


@torch.no_grad()
def spread(x, count):
    """`count` well separated rows of x (N, D), unit length: k-means++ seeding in rounds that double the set, each new row drawn with
    probability proportional to its squared distance to the nearest chosen one (log2 count rounds instead of one per code)."""
    chosen = x[torch.randint(len(x), (1,), device=x.device)]
    while len(chosen) < count:
        weight = torch.cdist(x, chosen).amin(1).square() + 1e-12
        chosen = torch.cat([chosen, x[torch.multinomial(weight, min(len(chosen), count - len(chosen)))]])
    return F.normalize(chosen, dim=1)


class HuBERT(nn.Module):
    """HuBERT++: predict soft cluster assignments of an EMA teacher's features, made even by Sinkhorn-Knopp, in codebooks of 128 and 256.

    Prototypes: k-means++ on the first batch, then EMA (.99) of the features assigned to them, unit length. Teacher temperature .15 to
    .07, student's .5 to .1, cosine over 200 steps. Loss per codebook: .75 KL at hidden + .25 KL at visible tokens + .001 entropy of
    the prediction; summed over codebooks."""
    window, causal, backbones = 2.5, False, ('s4', 'transformer', 'net1d')
    sizes = (128, 256)

    def __init__(self, encoder, steps=800, span_ms=83, alpha=.75):
        super().__init__()
        self.encoder, self.teacher, self.half_life, self.alpha = encoder, make_teacher(encoder), max(1, .05 * steps), alpha
        self.span, dim = max(1, round(span_ms / 1000 * encoder.tokens_per_second)), encoder.dim
        self.hidden = nn.Parameter(torch.randn(dim))
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, sum(self.sizes)))
        self.register_buffer('prototypes', torch.zeros(sum(self.sizes), dim))
        self.register_buffer('age', torch.zeros((), dtype=torch.long))
        self.seen = None

    def temperature(self, first, last):
        through = (self.age / 200).clamp(max=1)
        return first + (last - first) * (1 - torch.cos(math.pi * through)) / 2

    def forward(self, batch):
        # view and mask
        z, pad = self.encoder.tokens(batch)                      # (B, L, D)
        mask = span_mask(*z.shape[:2], self.span, device=z.device)
        # student
        h = self.encoder.backbone(torch.where(mask[..., None], self.hidden.to(z.dtype), z), pad)
        logits = self.head(h).float().flatten(0, 1).split(self.sizes, 1)
        # teacher and target
        _, f = teach(self.teacher, batch)
        x, hidden = F.normalize(f.float().flatten(0, 1), dim=1), mask.flatten()              # (B L, D)
        if not self.prototypes.any():
            self.prototypes.copy_(torch.cat([spread(x, k) for k in self.sizes]))
        targets = [sinkhorn(x @ p.T / self.temperature(.15, .07)) for p in self.prototypes.split(self.sizes)]
        self.seen = (x, targets) if self.training else None
        # loss and health
        loss = 0.
        for q, s in zip(targets, logits):
            kl = (q * (q.clamp(min=1e-12).log() - (s / self.temperature(.5, .1)).log_softmax(1))).sum(1)
            entropy = -(s.softmax(1) * (s.softmax(1) + 1e-8).log()).sum(1).mean()
            loss = loss + self.alpha * kl[hidden].mean() + (1 - self.alpha) * kl[~hidden].mean() + .001 * entropy
        used = sum(q.argmax(1).unique().numel() for q in targets)
        return loss, {'rank': effective_rank(f), 'codes': used, 'hidden': mask.float().mean()}

    @torch.no_grad()
    def after_step(self, step):
        x, targets = self.seen
        means = torch.cat([F.normalize(q.T @ x, dim=1) for q in targets])
        self.prototypes.copy_(F.normalize(.99 * self.prototypes + .01 * means, dim=1))
        self.age += 1
        follow(self.teacher, self.encoder, self.half_life)


OBJECTIVES = {'cpc': CPC, 'jepa': JEPA, 'data2vec': Data2Vec, 'dinosr': DinoSR, 'hubert': HuBERT}
