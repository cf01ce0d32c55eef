"""Self-supervised objectives, one class each, side by side.

    python objectives.py                                 # out/objectives.png: what each hides, sees and predicts, on a real ECG
    python objectives.py --pairs                         # which objective runs on which backbone, at which rate, with which flags
    python train.py --objective jepa                     # each trains through the same loop

An objective wraps an Encoder. Its class attributes say what it needs: window (s), causal, backbones (with a learning rate for
each), options (the flags of train.py that it takes), released (what --as_released can switch). forward(batch) returns (loss, logs): logs
is the evidence of its health, which `health` turns into numbers and an alarm; after_step(step) moves teachers and codebooks.
CPC, JEPA, data2vec, DinoSR and HuBERT++ follow arXiv 2605.12241 as its methods intend, CMSC, the beats and supervised training
2605.17276, MAE 2309.07136. Where released code does otherwise, the class says so, and --as_released switches to it.
"""
import argparse, copy, math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models import S4, S4D, Encoder, MeanPool, S4Block, TransformerBlock, cut_beats, pool, sized


# ---------------------------------------------------------------------------------------------------------------------
# what several objectives share

class Teacher(nn.Module):
    """Starts as an exact copy of the student, buffers included, and follows it: the distance halves in `half_life` (a share of the run's
    steps), or shrinks by `momentum` a step where that is given. No gradients; mode eval or train (dropout, batch statistics).
    As released ('ema'): random weights of its own that never move, in train mode."""

    def __init__(self, encoder, steps, half_life=.05, momentum=None, teacher_mode='eval', released=()):
        super().__init__()
        if 'ema' in released:
            net, self.momentum, self.mode = Encoder(encoder.config), 1., 'train'
        else:
            net, self.momentum, self.mode = copy.deepcopy(encoder), momentum or .5 ** (1 / max(1, half_life * steps)), teacher_mode
        self.net = net.requires_grad_(False)

    @torch.no_grad()
    def forward(self, batch):
        """The (branch, output) of every block on the unmasked batch, then the final output: list, (B, L, D)."""
        self.net.train(self.mode == 'train')                     # whatever mode the objective as a whole is in
        z, pad = self.net.tokens(batch)
        layers = []
        return layers, self.net.backbone(z, pad, layers)

    @torch.no_grad()
    def follow(self, student):
        """One step of the moving average, of every float entry; others are copied."""
        if self.momentum == 1:
            return
        for (name, t), s in zip(self.net.state_dict().items(), student.state_dict().values()):
            if name.endswith('log_dt'):                          # equal for good; to touch it would void what S4 derived from it
                continue
            if t.is_floating_point():
                t.lerp_(s, 1 - self.momentum)
            else:
                t.copy_(s)


def span_mask(B, L, span, hide=.49, released=False, device='cpu'):
    """True where hidden (B, L). Spans of `span` tokens start anywhere, at a rate that hides the share `hide`, and merge: at .49 and spans
    of 10 each token starts one with probability .065, as in data2vec. Every sequence has at least one. As released, that
    probability is divided by the span once more, so 6 % is hidden and in a seventh of the sequences nothing."""
    probability = 1 - (1 - hide) ** (1 / span)
    if released:
        middle = torch.rand(B, L, device=device) < .065 / span
        mask = F.max_pool1d(F.pad(middle.float(), (span // 2, (span - 1) // 2))[:, None], span, 1)[:, 0] > 0
        mask[:, -1] = middle[:, -1]
        return mask
    starts = torch.rand(B, L + span - 1, device=device) < probability                        # from span - 1 tokens before the first
    lonely = torch.arange(L + span - 1, device=device) == torch.randint(L, (B, 1), device=device) + span - 1
    starts = starts | (lonely & ~starts.any(1, keepdim=True))
    return F.max_pool1d(starts.float()[:, None], span, 1)[:, 0] > 0


def block_mask(B, L, released=False, device='cpu', targets=4, least=10, tries=16):
    """JEPA's blocks: `targets` blocks of 15-20 % of the tokens, the same length in a batch, and a context of 85-100 % less the blocks.
    Returns (visible (B, L) bool, cover (B, L): how many target blocks hold each token). A context that falls under `least` tokens is
    drawn again. As released, blocks have 64 tokens at least and a context under 64 becomes 64 random tokens, targets or not."""
    share = torch.rand(2)
    length, context = int(L * (.15 + .05 * share[0])), int(L * (.85 + .15 * share[1]))
    if released:
        length, tries, least = min(max(length, 64), L - 1), 1, 64
    t = torch.arange(L, device=device)
    starts = torch.randint(L - length + 1, (tries, B, targets, 1), device=device)
    cover = ((t >= starts) & (t < starts + length)).sum(2)       # (tries, B, L)
    start = torch.randint(L - context + 1, (tries, B, 1), device=device)
    visible = (t >= start) & (t < start + context) & (cover == 0)
    pick = (visible.sum(2) >= least).int().argmax(0)             # the first draw that shows enough
    row = torch.arange(B, device=device)
    visible, cover = visible[pick, row], cover[pick, row]
    if released:
        random = torch.rand(B, L, device=device).argsort(1).argsort(1) < least
        visible = torch.where(visible.sum(1, keepdim=True) < least, random, visible)
    return visible, cover


def standardise(x, how='instance'):
    """Features x (B, L, D) made comparable: to mean 0 and SD 1 of each feature over the crop's tokens (instance, as data2vec for speech and
    DinoSR do) or of each token over its features (layer, as the released ECG code does). A fresh encoder's features share a large
    part that never changes; instance takes it out, layer leaves it in and lets teachers collapse into it."""
    x = x.float()
    return F.layer_norm(x, x.shape[-1:]) if how == 'layer' else F.instance_norm(x.transpose(1, 2), eps=1e-8).transpose(1, 2)


def products(a, b):
    """Inner products of the rows of a and b in fp32, whatever autocast says: bf16 cannot tell close candidates apart."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().transpose(-1, -2)


def masked_mean(x, mask):
    """Mean of x where mask, weighted where it counts; 0 where it is empty."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


class Head(nn.Module):
    """SSL head of data2vec, DinoSR and JEPA: one layer of the backbone's kind, bidirectional (S4: state 64; its dropout is
    tied over time, the released one's is not), then a linear map."""

    def __init__(self, c, out):
        super().__init__()
        if c.backbone in ('s4', 's4d'):
            self.block = S4Block(c.dim, 64, False, c.dropout, S4 if c.backbone == 's4' else S4D)
        else:
            self.block = Encoder(replace(c, causal=False)).blocks[-1]
        self.out = nn.Linear(c.dim, out)

    def forward(self, h):
        return self.out(self.block(h)[0])


# ---------------------------------------------------------------------------------------------------------------------
# health

def effective_rank(x):
    """exp of the entropy of the covariance's normalised spectrum, of x (..., D): 1 is collapse, D is full."""
    x = x.detach().float().flatten(0, -2)
    share = torch.linalg.eigvalsh(torch.cov(x.T)).clamp(min=0)
    return torch.special.entr(share / share.sum().clamp(min=1e-20)).sum().exp()


def variety(x):
    """How unlike the rows of x (N, D) are: root of the total variance of their directions, near 1 where they vary like noise, 0 where all
    are the same."""
    return F.normalize(x, dim=1).std(0).square().sum().sqrt()


ALARMS = {'rank': 'features lie in one direction', 'std': 'features are all the same', 'target_std': 'targets hardly vary',
          'perplexity': 'hardly any code in use'}


@torch.no_grad()
def health(logs):
    """What an objective's logs say of its health, in this batch: a dict of floats, and an alarm, '' where there is none.

    features (..., D), the student's: rank (effective) and std (`variety`); target (..., D), the teacher's features before they are
    standardised: target_std (`variety`); hits (books, K), how often each code was the target: codes used and perplexity, means over
    codebooks, and chance, the share of the commonest; single numbers (accuracy, chance, hidden) as they are."""
    few = lambda x: x.float().flatten(0, -2)[:: max(1, x[..., 0].numel() // 2048)]           # 4095 rows at most
    out = {k: float(v) for k, v in logs.items() if k not in ('features', 'target', 'hits')}
    least = dict(rank=1.5, std=.05, target_std=.05)
    x = few(logs['features'])
    out |= dict(rank=effective_rank(x).item(), std=variety(x).item())
    if 'target' in logs:
        out['target_std'] = variety(few(logs['target'])).item()
    if 'hits' in logs:
        share = logs['hits'] / logs['hits'].sum(1, keepdim=True).clamp(min=1)
        out |= dict(codes=(share > 0).sum(1).float().mean().item(), chance=share.amax(1).mean().item(),
                    perplexity=torch.special.entr(share).sum(1).exp().mean().item())
        least['perplexity'] = .02 * min(share.shape[1], logs['hits'].sum(1).mean().item())   # of the codes that could be in use
    return out, '; '.join(f'{k} {out[k]:.2g}: {ALARMS[k]}' for k, low in least.items() if k in out and out[k] < low)


# ---------------------------------------------------------------------------------------------------------------------
# the objectives

class CPC(nn.Module):
    """Contrastive predictive coding (van den Oord et al. 2018, 1807.03748) as arXiv 2605.12241 runs it.

    At each position i a causal context predicts the stem's token `horizon` = 14 steps (117 ms) ahead, and only that one, among 128
    negatives. Negatives: tokens of the same crop, drawn uniformly with replacement from all positions but the target's, anew for
    every position; past, present and future all qualify. Logits are plain inner products (no temperature, no normalisation), and
    the targets are not detached: the stem learns through them too. Loss: cross-entropy, mean over positions and crops;
    ln 129 = 4.86 with a zeroed head. (The released code sums over the 286 positions instead.)
    """
    window, causal, backbones = 2.5, True, {'s4': 1e-2, 's4d': 1e-2, 'transformer': 1e-2, 'net1d': 3e-3}
    options, released = ('horizon', 'negatives'), ('lr',)

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
        s = products(c, z)                                       # (B, P, L)
        # target and negatives: indices 0 ... L-1 but for the target's own
        B, P, L = s.shape
        target = torch.arange(self.horizon, L, device=s.device).expand(B, P)[..., None]
        negative = torch.randint(L - 1, (B, P, self.negatives), device=s.device)
        negative = negative + (negative >= target)
        logits = s.gather(2, torch.cat([target, negative], 2))   # (B, P, 1 + negatives)
        # loss and health
        loss = F.cross_entropy(logits.flatten(0, 1), torch.zeros(B * P, dtype=torch.long, device=s.device))
        accuracy = (logits[..., :1] > logits[..., 1:]).all(2).float().mean()                 # a tie is a miss: collapse scores 0
        return loss, {'features': h, 'accuracy': accuracy, 'chance': 1 / (1 + self.negatives)}

    def after_step(self, step):
        """Nothing to move: CPC has no teacher."""


class JEPA(nn.Module):
    """Joint-embedding prediction: from a visible context, predict an EMA teacher's features of hidden blocks (I-JEPA, Assran et al.
    2023, 2301.08243, for a sequence). Loss: smooth L1 (beta 1), mean over blocks, tokens and features, targets standardised;
    about .42 with a zeroed head. A rising loss can be healthy: the targets move."""
    window, causal, backbones = 2.5, False, {'s4': 3e-3, 's4d': 3e-3, 'transformer': 1e-2, 'net1d': 1e-2}
    options, released = ('target_norm', 'half_life', 'momentum', 'teacher_mode'), ('ema', 'mask', 'lr', 'norm')

    def __init__(self, encoder, steps=800, target_norm='instance', released=(), **teacher):
        super().__init__()
        self.encoder, self.teacher, self.as_released = encoder, Teacher(encoder, steps, released=released, **teacher), 'mask' in released
        self.hidden, self.how = nn.Parameter(torch.randn(encoder.dim)), target_norm
        self.head = Head(encoder.config, encoder.dim)

    def forward(self, batch):
        # view and mask
        z, pad = self.encoder.tokens(batch)                      # (B, L, D)
        visible, cover = block_mask(*z.shape[:2], self.as_released, z.device)
        # student
        h = self.encoder.backbone(torch.where(visible[..., None], z, self.hidden.to(z.dtype)), pad)
        p = self.head(h)
        # teacher and target
        _, f = self.teacher(batch)
        target = standardise(f, self.how)
        # loss and health
        error = F.smooth_l1_loss(p.float(), target, reduction='none').mean(2)                # (B, L)
        loss = masked_mean(error, cover)
        return loss, {'features': h, 'target': f, 'hidden': 1 - visible.float().mean()}

    def after_step(self, step):
        self.teacher.follow(self.encoder)


class Data2Vec(nn.Module):
    """data2vec (Baevski et al. 2022, 2202.03555): regress the mean of an EMA teacher's top two layers at hidden tokens.

    Target: each of the last two blocks' branches before the residual sum, standardised, averaged. Loss: smooth L1 (beta 1), summed over
    the features / sqrt(D), mean over hidden tokens; 5.3 to 9.6 at D 512 with a zeroed head, by how alike the two layers are."""
    window, causal, backbones = 2.5, False, {'s4': 1e-2, 's4d': 1e-2, 'transformer': 1e-2, 'net1d': 1e-2}
    options, released = ('span_ms', 'hide', 'target_norm', 'half_life', 'momentum', 'teacher_mode'), ('ema', 'mask', 'lr', 'norm')

    def __init__(self, encoder, steps=800, span_ms=83, hide=.49, target_norm='instance', released=(), **teacher):
        super().__init__()
        self.encoder, self.teacher, self.as_released = encoder, Teacher(encoder, steps, released=released, **teacher), 'mask' in released
        self.span, self.hide = max(1, round(span_ms / 1000 * encoder.tokens_per_second)), hide
        self.hidden, self.how = nn.Parameter(torch.randn(encoder.dim)), target_norm
        self.head = Head(encoder.config, encoder.dim)

    def forward(self, batch):
        # view and mask
        z, pad = self.encoder.tokens(batch)                      # (B, L, D)
        mask = span_mask(*z.shape[:2], self.span, self.hide, self.as_released, z.device)
        # student
        h = self.encoder.backbone(torch.where(mask[..., None], self.hidden.to(z.dtype), z), pad)
        p = self.head(h)
        # teacher and target
        layers, f = self.teacher(batch)
        target = (standardise(layers[-1][0], self.how) + standardise(layers[-2][0], self.how)) / 2
        # loss and health
        error = F.smooth_l1_loss(p.float(), target, reduction='none').sum(2) / target.shape[2] ** .5               # (B, L)
        loss = masked_mean(error, mask)
        return loss, {'features': h, 'target': layers[-1][0], 'hidden': mask.float().mean()}

    def after_step(self, step):
        self.teacher.follow(self.encoder)


class DinoSR(nn.Module):
    """DinoSR (Liu et al. 2023, 2305.10005): predict, at hidden tokens, which code of an online codebook the teacher's feature falls to.

    One codebook of 256 for each of the last two blocks' outputs (as released ('codebook'), one on the last output, half of the head's
    outputs idle). Codes are EMA means (decay .9) of the features assigned to them, all tokens counting; unassigned codes keep their
    place. Loss: cross-entropy, mean over hidden tokens and codebooks; ln 256 = 5.55 with a zeroed head. A loss near 0 with few codes
    used is collapse."""
    window, causal, backbones = 2.5, False, {'s4': 1e-3, 's4d': 1e-3, 'transformer': 3e-4, 'net1d': 1e-2}
    options, released = ('span_ms', 'hide', 'target_norm', 'half_life', 'momentum', 'teacher_mode'), ('ema', 'mask', 'lr', 'codebook', 'norm')

    def __init__(self, encoder, steps=800, span_ms=83, hide=.49, codes=256, target_norm='instance', released=(), **teacher):
        super().__init__()
        self.encoder, self.teacher, self.as_released = encoder, Teacher(encoder, steps, released=released, **teacher), 'mask' in released
        self.span, self.hide = max(1, round(span_ms / 1000 * encoder.tokens_per_second)), hide
        self.books = 1 if 'codebook' in released else 2
        self.hidden, self.how = nn.Parameter(torch.randn(encoder.dim)), target_norm
        self.head = Head(encoder.config, 2 * codes)
        self.register_buffer('sums', standardise(torch.randn(self.books, codes, encoder.dim), 'layer'))
        self.register_buffer('counts', torch.ones(self.books, codes))
        self.seen = None

    def codebook(self):
        return self.sums / self.counts.clamp(min=1e-8)[..., None]                            # (books, codes, D)

    def forward(self, batch):
        # view and mask
        z, pad = self.encoder.tokens(batch)                      # (B, L, D)
        mask = span_mask(*z.shape[:2], self.span, self.hide, self.as_released, z.device)
        # student
        h = self.encoder.backbone(torch.where(mask[..., None], self.hidden.to(z.dtype), z), pad)
        logits = self.head(h).float().unflatten(2, (2, -1))[:, :, :self.books]               # (B, L, books, codes)
        # teacher and target
        layers, f = self.teacher(batch)
        x = torch.stack([standardise(out, self.how).flatten(0, 1) for _, out in layers[-self.books:]])        # (books, B L, D)
        code = torch.cdist(x, self.codebook()).argmin(2)                                     # (books, B L)
        hits = torch.zeros_like(self.counts).scatter_add_(1, code, torch.ones_like(code, dtype=self.counts.dtype))
        self.seen = (x, code, hits) if self.training else None
        # loss and health
        target = code.view(self.books, *mask.shape).permute(1, 2, 0)                         # (B, L, books)
        error = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction='none').view(target.shape)
        loss = masked_mean(error.mean(2), mask)
        accuracy = masked_mean((logits.argmax(3) == target).float().mean(2), mask)
        return loss, {'features': h, 'target': f, 'hits': hits, 'accuracy': accuracy, 'hidden': mask.float().mean()}

    @torch.no_grad()
    def after_step(self, step):
        x, code, hits = self.seen
        sums = torch.zeros_like(self.sums).scatter_add_(1, code[..., None].expand_as(x), x)
        moved = (hits > 0) | (self.books == 1)                   # as released, unassigned codes fade too, after 175 steps to the origin
        self.counts.copy_(torch.where(moved, self.counts.lerp(hits, .1), self.counts))
        self.sums.copy_(torch.where(moved[..., None], self.sums.lerp(sums, .1), self.sums))
        self.teacher.follow(self.encoder)


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
    probability proportional to its squared distance to the nearest chosen one (log2 count rounds instead of one per code). Where more
    are wanted than there are rows, some are taken again and shaken, since of equal ones only the first would ever be chosen."""
    chosen = x[torch.randint(len(x), (1,), device=x.device)]
    while len(chosen) < count:
        weight = torch.cdist(x, chosen).amin(1).square() + 1e-12
        more = torch.multinomial(weight, min(len(chosen), count - len(chosen)), replacement=len(x) < count)
        chosen = torch.cat([chosen, x[more]])
    again = .1 * torch.randn_like(chosen) * chosen.std(0) if len(x) < count else 0.
    return F.normalize(chosen + again, dim=1)


class HuBERT(nn.Module):
    """HuBERT++: predict soft cluster assignments of an EMA teacher's features, made even by Sinkhorn-Knopp, in codebooks of 128 and 256.

    Prototypes: k-means++ on the first batch, then EMA (.99) of the features assigned to them, unit length. Teacher temperature .15 to
    .07, student's .5 to .1, cosine over 200 steps. Loss per codebook: .75 KL at hidden + .25 KL at visible tokens + .001 entropy of
    the prediction; summed over codebooks."""
    window, causal, backbones = 2.5, False, {'s4': 1e-2, 's4d': 3e-3, 'transformer': 1e-2, 'net1d': 1e-2}
    options, released = ('span_ms', 'hide', 'target_norm', 'half_life', 'momentum', 'teacher_mode'), ('ema', 'mask', 'lr', 'norm')
    sizes = (128, 256)

    def __init__(self, encoder, steps=800, span_ms=83, hide=.49, target_norm='instance', released=(), **teacher):
        super().__init__()
        self.encoder, self.teacher, self.as_released = encoder, Teacher(encoder, steps, released=released, **teacher), 'mask' in released
        self.span, self.hide = max(1, round(span_ms / 1000 * encoder.tokens_per_second)), hide
        self.hidden, self.how, dim = nn.Parameter(torch.randn(encoder.dim)), target_norm, encoder.dim
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, sum(self.sizes)))
        self.register_buffer('prototypes', torch.zeros(sum(self.sizes), dim))
        self.register_buffer('age', torch.zeros((), dtype=torch.long))
        self.seen, self.seeded = None, False

    def temperature(self, first, last):
        through = (self.age / 200).clamp(max=1)
        return first + (last - first) * (1 - torch.cos(math.pi * through)) / 2

    def forward(self, batch):
        # view and mask
        z, pad = self.encoder.tokens(batch)                      # (B, L, D)
        mask = span_mask(*z.shape[:2], self.span, self.hide, self.as_released, z.device)
        # student
        h = self.encoder.backbone(torch.where(mask[..., None], self.hidden.to(z.dtype), z), pad)
        logits = self.head(h).float().flatten(0, 1).split(self.sizes, 1)
        # teacher and target
        _, f = self.teacher(batch)
        x, hidden = F.normalize(standardise(f, self.how).flatten(0, 1), dim=1), mask.flatten()              # (B L, D)
        self.seeded = self.seeded or bool(self.prototypes.any())                             # asked until it is, since asking waits
        if not self.seeded:
            self.prototypes.copy_(torch.cat([spread(x, k) for k in self.sizes]))
        targets = [sinkhorn(products(x, p) / self.temperature(.15, .07)) for p in self.prototypes.split(self.sizes)]
        self.seen = (x, targets) if self.training else None
        # loss and health
        loss, right, hits = 0., 0., x.new_zeros(len(self.sizes), max(self.sizes))
        for i, (q, s) in enumerate(zip(targets, logits)):
            kl = (q * (q.clamp(min=1e-12).log() - (s / self.temperature(.5, .1)).log_softmax(1))).sum(1)
            entropy = -(s.softmax(1) * (s.softmax(1) + 1e-8).log()).sum(1).mean()
            loss = loss + .75 * masked_mean(kl, hidden) + .25 * masked_mean(kl, ~hidden) + .001 * entropy
            code = q.argmax(1)
            right = right + masked_mean((s.argmax(1) == code).float(), hidden) / len(self.sizes)
            hits[i].scatter_add_(0, code, torch.ones_like(code, dtype=hits.dtype))
        return loss, {'features': h, 'target': f, 'hits': hits, 'accuracy': right, 'hidden': mask.float().mean()}

    @torch.no_grad()
    def after_step(self, step):
        x, targets = self.seen
        means = torch.cat([F.normalize(q.T @ x, dim=1) for q in targets])
        self.prototypes.copy_(F.normalize(.99 * self.prototypes + .01 * means, dim=1))
        self.age += 1
        self.teacher.follow(self.encoder)


def halves(batch):
    """Both halves of every crop, the second ones after all the first: x (2 B, C, T / 2), peaks (2 B, P) ascending, -1 where none."""
    half, peaks = batch['x'].shape[2] // 2, batch['peaks']
    inside = [torch.where((peaks >= start) & (peaks < start + half), peaks - start, 2 * half) for start in (0, half)]
    peaks = torch.cat(inside).sort(1).values
    return dict(x=torch.cat([batch['x'][..., :half], batch['x'][..., half:2 * half]]), peaks=torch.where(peaks < half, peaks, -1))


class CMSC(nn.Module):
    """Contrastive learning of adjacent segments (CLOCS, Kiyasseh et al. 2021, 2005.13249) in the form of 2605.17276: the two halves of a
    10 s crop, and other records of the same patient, attract; all else in the batch repels. Mean-pooled features, a 2-layer map to
    128, unit length, temperature .1 (CLOCS's; the paper's is not known). Loss: -log softmax over the other 2 B - 1 views, mean over
    positives, then over views; ln(2 B - 1) with a zeroed head. The encoder sees 5 s, so 5 s is what it is evaluated on."""
    window, views, causal, backbones = 10, 2, False, {'resnet': 1e-3, 'beat': 1e-3, 's4': 3e-3, 's4d': 1e-2, 'transformer': 1e-3, 'net1d': 1e-2}
    options, released = (), ()

    def __init__(self, encoder, steps=800):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(encoder.dim, encoder.dim), nn.ReLU(), nn.Linear(encoder.dim, 128))

    def forward(self, batch):
        # views
        h, pad = self.encoder(halves(batch))                     # (2 B, L, D)
        f = pool(h, pad)
        z = F.normalize(self.head(f).float(), dim=1)             # (2 B, 128)
        # target: the patient's other views
        who = batch['patient'].repeat(2)
        self_ = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = (who == who[:, None]) & ~self_
        # loss and health
        s = (products(z, z) / .1).masked_fill(self_, -1e9)
        log_p = s.log_softmax(1)
        loss = -((log_p * positive).sum(1) / positive.sum(1)).mean()
        accuracy = positive[torch.arange(len(z), device=z.device), s.argmax(1)].float().mean()
        return loss, {'features': f, 'accuracy': accuracy, 'chance': positive.sum(1).float().mean() / (len(z) - 1)}

    def after_step(self, step):
        """Nothing to move: CMSC has no teacher."""


class VQBeat(nn.Module):
    """The vocabulary of heartbeats (HeartLang's VQ-HBR, 2502.10707): an autoencoder of beat tokens through a vector quantiser of 8192 codes.

    Encoder, 2-layer map to 128, nearest code by cosine, two decoder layers, 2-layer map back to the .96 s of each beat. Codes:
    k-means of the first batch (10 rounds), then EMA (.99) of what is assigned to them, unit length; unused ones stay. Loss over real
    beats only, never padding: mean square error in mV^2 + commitment (mean square to the code). With a zeroed decoder map it is
    the beats' mean square + commitment."""
    window, causal, backbones = 10, False, {'beat': 3e-3}
    options, released = ('codes',), ()

    def __init__(self, encoder, steps=800, codes=8192):
        super().__init__()
        self.encoder, c = encoder, encoder.config
        self.to_code = nn.Sequential(nn.Linear(c.dim, c.dim), nn.Tanh(), nn.Linear(c.dim, 128))
        self.from_code = nn.Linear(128, c.dim)
        self.decoder = nn.ModuleList(TransformerBlock(c.dim, c.ffn, c.heads, dropout=0., rotary=False, head=64, bias=False) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(c.dim, c.dim), nn.Tanh(), nn.Linear(c.dim, encoder.stem.length))
        self.register_buffer('codebook', torch.zeros(codes, 128))
        self.seen, self.seeded = None, False

    def encode(self, batch):
        """Unit-length features (B, 1 + leads P, 128) and pad, of the unmasked batch."""
        h, pad = self.encoder(batch)
        return F.normalize(self.to_code(h).float(), dim=2), pad

    @torch.no_grad()
    def codes(self, batch):
        """The code of every beat (B, leads P), and where there is none."""
        x, pad = self.encode(batch)
        return products(x[:, 1:], self.codebook).argmax(2), pad[:, 1:]

    def forward(self, batch):
        # view and code
        x, pad = self.encode(batch)
        real = ~pad[:, 1:]                                       # (B, leads P)
        e = x[:, 1:][real]                                       # (n, 128)
        self.seeded = self.seeded or bool(self.codebook.any())
        if not self.seeded:
            self.codebook.copy_(kmeans(e.detach(), len(self.codebook)))
        code = products(e.detach(), self.codebook).argmax(1)
        q = self.codebook[code]
        self.seen = (e.detach(), code) if self.training else None
        # reconstruction, the gradient passing the quantiser straight through
        y = torch.zeros_like(x)
        y[:, 1:][real] = e + (q - e).detach()
        y = self.from_code(y)
        for block in self.decoder:
            y, _ = block(y, pad)
        # target, loss and health
        beats, _ = self.encoder.stem.beats(batch)                # (B, leads P, length)
        error = (self.head(y[:, 1:]).float() - beats)[real].square().mean()
        loss = error + F.mse_loss(e, q)
        hits = torch.bincount(code, minlength=len(self.codebook)).float()[None]
        return loss, {'features': e, 'hits': hits, 'explained': 1 - error / beats[real].square().mean()}

    @torch.no_grad()
    def after_step(self, step):
        x, code = self.seen
        hits = torch.bincount(code, minlength=len(self.codebook))[:, None]
        means = torch.zeros_like(self.codebook).index_add_(0, code, x) / hits.clamp(min=1)
        moved = F.normalize(.99 * self.codebook + .01 * F.normalize(means, dim=1), dim=1)
        self.codebook.copy_(torch.where(hits > 0, moved, self.codebook))


@torch.no_grad()
def kmeans(x, count, rounds=10):
    """Spherical k-means of unit rows x (N, D): `count` unit centres; one that attracts nothing stays where it was seeded."""
    centres = spread(x, count)
    for _ in range(rounds):
        code = products(x, centres).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, code, x)
        centres = torch.where(sums.any(1, keepdim=True), F.normalize(sums, dim=1), centres)
    return centres


class Beats(nn.Module):
    """Masked heartbeat prediction (HeartLang, 2502.10707): half of a record's beat tokens are hidden, their codes predicted.

    The codes are those of a VQBeat trained before on the same records (--tokenizer), lead and time embeddings included. A beat is hidden
    before the embedding mixes neighbours, and padding is never hidden nor predicted. (The released code hides after mixing, so
    neighbours still carry the beat, counts padding, and computes codes without lead and time.) Loss: cross-entropy, mean over hidden
    beats; ln(codes) = 9.01 with a zeroed head."""
    window, causal, backbones = 10, False, {'beat': 3e-3}
    options, released = ('tokenizer', 'hide'), ()

    def __init__(self, encoder, steps=800, tokenizer=None, hide=.5):
        super().__init__()
        self.encoder, self.tokenizer, self.hide = encoder, tokenizer.requires_grad_(False), hide
        self.head = nn.Linear(encoder.dim, len(tokenizer.codebook))

    def forward(self, batch):
        # target
        self.tokenizer.eval()
        code, pad = self.tokenizer.codes(batch)                  # (B, leads P)
        # view and mask: the given share of the real beats of each record, rounded down
        rank = torch.rand(code.shape, device=code.device).masked_fill(pad, 2.).argsort(1).argsort(1)
        mask = rank < ((~pad).sum(1, keepdim=True) * self.hide).long()
        # student
        z, padded = self.encoder.tokens(batch, ~mask)
        h = self.encoder.backbone(z, padded)[:, 1:]              # CLS is left out
        logits = self.head(h[mask]).float()                      # (n, codes)
        # loss and health
        hits = torch.bincount(code[mask], minlength=logits.shape[1]).float()[None]
        loss = F.cross_entropy(logits, code[mask], reduction='sum') / mask.sum().clamp(min=1)
        accuracy = (logits.argmax(1) == code[mask]).sum() / mask.sum().clamp(min=1)
        return loss, {'features': h[~pad], 'hits': hits, 'accuracy': accuracy, 'hidden': mask.sum() / (~pad).sum().clamp(min=1)}

    def after_step(self, step):
        """Nothing to move: the tokenizer is fixed."""


class MAE(nn.Module):
    """Masked autoencoder of 50 ms patches over all leads (MTECG, 2309.07136; He et al. 2022, 2111.06377): the encoder sees the visible
    patches alone, one decoder block predicts the hidden ones.

    Target: the patch's fluctuation, each lead's mean in the patch removed, divided by the SD over the whole patch (the paper's exact
    form is not known; this keeps the proportions between leads). Loss: mean square error, mean over hidden patches;
    1 with a zeroed head. raw_target: millivolts as they are. The paper finds ratios of 5 to 75 % to work; .5 is our choice."""
    window, causal, backbones = 10, False, {'vit': 1e-3}
    options, released = ('hide', 'raw_target'), ()

    def __init__(self, encoder, steps=800, hide=.5, raw_target=False):
        super().__init__()
        self.encoder, self.hide, self.raw, c = encoder, hide, raw_target, encoder.config
        self.embed, self.hidden = nn.Linear(c.dim, c.dim), nn.Parameter(torch.zeros(c.dim))
        self.place = nn.Parameter(nn.init.trunc_normal_(torch.empty(201, c.dim), std=.02))
        self.decoder, self.norm = TransformerBlock(c.dim, c.ffn, c.heads, dropout=c.dropout, rotary=False), nn.LayerNorm(c.dim)
        self.head = nn.Linear(c.dim, c.leads * encoder.stem.length)

    def target(self, batch):
        """Fluctuations of all patches: (B, L, leads length)."""
        p = self.encoder.stem.patches(batch).unflatten(2, (self.encoder.config.leads, -1))   # (B, L, leads, length)
        if self.raw:
            return p.flatten(2)
        p = (p - p.mean(3, keepdim=True)).flatten(2)
        return p / (p.square().mean(2, keepdim=True) + 1e-6).sqrt()                          # 1 uV^2 keeps flat patches flat

    def forward(self, batch):
        # target and mask: the same number of visible patches in every crop
        target = self.target(batch)
        B, L = target.shape[:2]
        mask = torch.rand(B, L, device=target.device).argsort(1).argsort(1) < min(L - 1, max(1, round(self.hide * L)))
        # student
        z, pad = self.encoder.tokens(batch, ~mask)
        h = self.encoder.backbone(z, pad)                        # (B, 1 + visible, D)
        # decoder: hidden patches in their places
        y = self.embed(h)
        full = self.hidden.to(y.dtype).expand(B, L, -1).clone()
        full[~mask] = y[:, 1:].flatten(0, 1)
        y, _ = self.decoder(torch.cat([y[:, :1], full], 1) + self.place[:L + 1])
        p = self.head(self.norm(y[:, 1:]))
        # loss and health
        error = (p.float() - target).square().mean(2)            # (B, L)
        loss = masked_mean(error, mask)
        return loss, {'features': h[:, 1:], 'explained': 1 - loss / masked_mean(target.square().mean(2), mask), 'hidden': mask.float().mean()}

    def after_step(self, step):
        """Nothing to move: MAE has no teacher."""


class Supervised(nn.Module):
    """Multi-label classification, the other paradigm of 2605.17276: mean pooling and a linear map. Loss: binary cross-entropy, mean over
    known labels; ln 2 with a zeroed head. focal > 0 (Lin et al. 2017, 1708.02002) weights each by (1 - p of the truth)^focal, for
    long tails; ln 2 / 2^focal with a zeroed head. columns: the labels of batch['y'] that are learned."""
    window, causal = 2.5, False
    backbones = {'s4': 1e-2, 's4d': 1e-2, 'transformer': 1e-2, 'net1d': 1e-2, 'resnet': 3e-3, 'beat': 3e-3, 'vit': 1e-3}
    options, released = ('task', 'focal'), ()

    def __init__(self, encoder, steps=800, columns=(), focal=0.):
        super().__init__()
        self.encoder, self.columns, self.focal = encoder, list(columns), focal
        self.head = MeanPool(encoder.dim, len(self.columns))

    def forward(self, batch):
        # view and prediction
        h, pad = self.encoder(batch)
        logits = self.head(h, pad).float()                       # (B, K)
        # target
        y = batch['y'][:, self.columns]
        known = y.isfinite()
        y = torch.where(known, y, 0.)                            # a placeholder: what is unknown has no part in the loss
        # loss and health
        error = F.binary_cross_entropy_with_logits(logits, y, reduction='none')
        if self.focal:
            error = error * (-torch.expm1(-error)).clamp(min=1e-6) ** self.focal             # exp(-error): p of the truth
        loss, there = masked_mean(error, known), known.any(0)
        rate = (y * known).sum(0) / known.sum(0).clamp(min=1)    # of each label, in this batch
        return loss, {'features': h if pad is None else h[~pad], 'accuracy': masked_mean(((logits > 0) == (y > .5)).float(), known),
                      'chance': masked_mean(torch.maximum(rate, 1 - rate), there)}

    def after_step(self, step):
        """Nothing to move: labels stand still."""


OBJECTIVES = {'cpc': CPC, 'jepa': JEPA, 'data2vec': Data2Vec, 'dinosr': DinoSR, 'hubert': HuBERT, 'cmsc': CMSC, 'vqbeat': VQBeat, 'beats': Beats,
              'mae': MAE, 'supervised': Supervised}

# PTB-XL means and SDs (mV) by which the released code standardises every objective's input but CPC's. Their order is I II V1-V6 III aVR aVL
# aVF by their size, but the code applies them by position to I II III aVR aVL aVF V1-V6: reproduced as it is.
_MEAN = [-.00184586, -.00130277, .00017031, -.00091313, -.00148835, -.00174687, -.00077071, -.00207407, .00054329, .00155546, -.00114379, -.00035649]
_STD = [.16401004, .1647168, .23374124, .33767231, .33362807, .30583013, .2731171, .27554379, .17128962, .14030828, .14606956, .14656108]


def released_input(x):
    """x (B, 12, T) in mV, standardised as the released code does."""
    return (x - x.new_tensor(_MEAN)[:, None]) / (x.new_tensor(_STD)[:, None] + 1e-8)


def draw(row, path):
    """What each objective sees (white), hides (grey) and predicts (red), on lead II of record `row` of the sample, as a figure at `path`. Masks
    of blocks and spans come from the objectives' own code."""
    from data import Dataset, Stop, figure
    ds = Dataset('sample')
    if not 0 <= row < len(ds):
        raise Stop(f'--record {row}: the sample has records 0 to {len(ds) - 1}')
    torch.manual_seed(0)
    long, short = ds.collate([row], [0], 2400), ds.collate([row], [0], 600)
    encoder = Encoder(sized('s4', 'tiny'))
    L = 300
    fig, axes = figure(8, 1, figsize=(11, 15), layout='constrained')

    def panel(ax, title, x, hidden=(), shade='C3'):
        ax.plot(torch.arange(len(x)) / 240, x, color='k', lw=.8)
        for a, b in hidden:
            ax.axvspan(a, b, color=shade, alpha=.35, lw=0)
        ax.set_title(title, size=9, loc='left')
        ax.set(xlim=(0, len(x) / 240), ylabel='mV')

    def runs(mask, width):
        """Stretches (from, to) in s where a mask of tokens `width` s wide is True."""
        edges = torch.diff(F.pad(mask.int(), (1, 1)))            # where it turns: from and to in turn
        return [(a * width, b * width) for a, b in edges.nonzero().view(-1, 2).tolist()]

    x, token = short['x'][0, 1], 1 / 120
    axes[0].axvspan(151 * token, L * token, color='.85')
    panel(axes[0], 'cpc: from what is white, all up to token 150, tell token 164 (red), 117 ms ahead, from 128 others of the crop (blue ticks)', x,
          [(164 * token, 165 * token)])
    axes[0].vlines(torch.randint(L, (128,)) * token, *axes[0].get_ylim(), color='C0', lw=.3)
    visible, cover = block_mask(1, L)
    panel(axes[1], "jepa: from what is white, predict the teacher's features in four blocks (red; darker where two overlap); grey is hidden, not predicted",
          x, [r for n in range(1, 5) for r in runs(cover[0] >= n, token)])
    for a, b in runs(~visible[0] & (cover[0] == 0), token):
        axes[1].axvspan(a, b, color='.85')
    for ax, ms in zip(axes[2:4], (83, 250)):
        span = round(ms / 1000 * encoder.tokens_per_second)
        panel(ax, f"data2vec, dinosr, hubert with spans of {ms} ms: hidden tokens (red); predicted are the teacher's top layers, its codes, its soft clusters",
              x, runs(span_mask(1, L, span)[0], token))
    x = long['x'][0, 1]
    panel(axes[4], 'cmsc: two halves of one record (orange, green) attract, those of other patients repel', x, [(0, 5)], 'C1')
    axes[4].axvspan(5, 10, color='C2', alpha=.35, lw=0)
    beats = cut_beats(long['x'][:, 1:2], long['peaks'], 230)[0, 0].ne(0)                     # (P, length)
    half, hidden = torch.rand(len(beats)).argsort() < len(beats) // 2, []
    for peak, beat, chosen in zip(long['peaks'][0].tolist(), beats, half):
        if chosen and beat.any():
            at = peak - 115 + beat.nonzero()[:, 0]               # the samples that it covers
            hidden.append((at[0].item() / 240, (at[-1].item() + 1) / 240))
    panel(axes[5], 'beats: the codes of hidden beats (red), each token one lead of one beat', x, hidden)
    mae = MAE(Encoder(sized('vit', 'tiny')))
    mask = torch.rand(200).argsort().argsort() < 100
    target = mae.target(long)[0].unflatten(1, (12, -1))[:, 1].flatten()
    panel(axes[6], 'mae: patches of 50 ms; the hidden half (red) is predicted', x, runs(mask, .05))
    panel(axes[7], '     as fluctuation: the level of each patch removed, its size made 1 (shown for lead II)', target, runs(mask, .05))
    axes[7].set(xlabel='s', ylabel='SD')
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    print(path)


def main(argv=None):
    """The command line: see the top of the file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--pairs', action='store_true', help='print which objective runs on which backbone')
    p.add_argument('--record', type=int, default=5, help='of the real sample, for the figure')
    p.add_argument('--out', default='out/objectives.png', help='where the figure goes')
    a = p.parse_args(argv)
    if not a.pairs:
        return draw(a.record, a.out)
    backbones = list(Supervised.backbones)
    print(f'{"":11s}{"window":>7s}  ' + ''.join(f'{b:>12s}' for b in backbones) + '   (learning rates)   flags; --as_released')
    for name, kind in OBJECTIVES.items():
        rates = ''.join(f'{kind.backbones.get(b, ""):>12}' for b in backbones)
        flags = ' '.join('--' + o.replace('_', '-') for o in kind.options)
        print(f'{name:11s}{kind.window:5.1f} s  {rates}   {flags}' + (f'; {",".join(kind.released)}' if kind.released else ''))


if __name__ == '__main__':
    main()
