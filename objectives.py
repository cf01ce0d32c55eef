"""Self-supervised objectives, one class each, side by side.

    python objectives.py                  # which objective runs on which backbone, with which flags
    python train.py --objective jepa      # every objective trains in the same loop

An objective wraps an encoder. objective(batch) returns (loss, logs); `health` turns the logs into
numbers and an alarm. after_step() moves teachers and codebooks after each optimiser step.
CPC, JEPA, data2vec, DinoSR and HuBERT++ follow the methods of arXiv 2605.12241; CMSC, the beats and
supervised training follow 2605.17276; MAE follows 2309.07136. Where the released code differs from
its paper, the class says so, and `train.py --as_released` switches to the code's behaviour.
"""
import argparse
import copy
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from models import S4, S4D, Encoder, MeanPool, S4Block, TransformerBlock, mean_pool


class Objective(nn.Module):
    """The interface of every objective, as train.py uses it."""
    window = 2.5                       # s, of a training crop
    views = 1                          # encoder inputs cut from one training crop
    causal = False                     # True: the backbone may not look ahead
    rates = {}                         # backbone -> peak learning rate: the backbones it runs on
    options = ()                       # the flags of train.py that it takes
    released = ()                      # what --as_released can switch

    def after_step(self):
        """Called after every optimiser step. Most objectives have nothing to move."""


# -------------------------------------------------------------------------------------------------
# building blocks

class Teacher(nn.Module):
    """A copy of the student that follows it as an exponential moving average (EMA) and gets no
    gradients. Its distance to the student halves in `half_life` (a share of the run's steps);
    `momentum` sets the factor per step directly. mode: 'eval' or 'train' (dropout, BatchNorm).
    As released ('ema'): random weights of its own that never move, in train mode."""

    def __init__(self, encoder, steps, released=(), half_life=.05, momentum=None,
                 teacher_mode='eval'):
        super().__init__()
        if 'ema' in released:
            net, self.momentum, self.mode = Encoder(encoder.config), 1., 'train'
        else:
            net, self.mode = copy.deepcopy(encoder), teacher_mode
            self.momentum = momentum or .5 ** (1 / max(1, half_life * steps))
        self.net = net.requires_grad_(False)

    @torch.no_grad()
    def forward(self, batch):
        """Features of the whole, unmasked crop: [(branch, output) of each block], final output, all
        (B, L, D). In fp32, since `standardise` magnifies rounding in almost constant features."""
        self.net.train(self.mode == 'train')
        layers = []
        with torch.autocast(batch['x'].device.type, enabled=False):
            z, pad = self.net.tokens(batch)
            return layers, self.net.backbone(z, pad, layers)

    @torch.no_grad()
    def follow(self, student):
        """One EMA step over weights and BatchNorm statistics; integers are copied."""
        if self.momentum == 1:
            return
        for (name, t), s in zip(self.net.state_dict().items(), student.state_dict().values()):
            if name.endswith('log_dt'):        # never changes; writing to it would void S4's basis
                continue
            if t.is_floating_point():
                t.lerp_(s, 1 - self.momentum)
            else:
                t.copy_(s)


def span_mask(B, L, span, hide=.49, released=False, device='cpu'):
    """True where hidden (B, L): spans of `span` tokens that start anywhere, may overlap, and hide
    the share `hide` on average. Every crop has at least one. As released, the start probability is
    divided by the span a second time: 6 % is hidden, and in a seventh of the crops nothing."""
    if released:
        middle = torch.rand(B, L, device=device) < .065 / span
        padded = F.pad(middle.float(), (span // 2, (span - 1) // 2))
        mask = F.max_pool1d(padded[:, None], span, 1)[:, 0] > 0
        mask[:, -1] = middle[:, -1]
        return mask
    probability = 1 - (1 - hide) ** (1 / span)
    positions = L + span - 1                       # a span may start before the first token
    starts = torch.rand(B, positions, device=device) < probability
    one = torch.randint(L, (B, 1), device=device) + span - 1
    lonely = torch.arange(positions, device=device) == one
    starts = starts | (lonely & ~starts.any(1, keepdim=True))
    return F.max_pool1d(starts.float()[:, None], span, 1)[:, 0] > 0


def block_mask(B, L, released=False, device='cpu', targets=4, least=10, tries=16):
    """JEPA's masks: `targets` blocks of 15-20 % of the tokens, and a context block of 85-100 %
    minus those. Returns visible (B, L) bool and cover (B, L): in how many target blocks a token
    lies. A context with fewer than `least` tokens is drawn again, `tries` times at most. As
    released, a block has 64 tokens or more, and a context under 64 becomes 64 random tokens,
    targets or not."""
    share = torch.rand(2)
    length, context = int(L * (.15 + .05 * share[0])), int(L * (.85 + .15 * share[1]))
    if released:
        length, tries, least = min(max(length, 64), L - 1), 1, 64
    t = torch.arange(L, device=device)
    starts = torch.randint(L - length + 1, (tries, B, targets, 1), device=device)
    cover = ((t >= starts) & (t < starts + length)).sum(2)                        # (tries, B, L)
    start = torch.randint(L - context + 1, (tries, B, 1), device=device)
    visible = (t >= start) & (t < start + context) & (cover == 0)
    first_good = (visible.sum(2) >= least).int().argmax(0)                        # (B,)
    row = torch.arange(B, device=device)
    visible, cover = visible[first_good, row], cover[first_good, row]
    if released:
        random = torch.rand(B, L, device=device).argsort(1).argsort(1) < least
        visible = torch.where(visible.sum(1, keepdim=True) < least, random, visible)
    return visible, cover


def standardise(x, how='instance'):
    """Teacher features (B, L, D) to mean 0 and SD 1: each feature over the crop's tokens
    ('instance', as in data2vec and DinoSR for speech), or each token over its features ('layer', as
    in the released ECG code). A fresh encoder's features share a large constant part; 'instance'
    removes it, 'layer' keeps it, and the teacher can collapse into it."""
    x = x.float()
    if how == 'layer':
        return F.layer_norm(x, x.shape[-1:])
    return F.instance_norm(x.transpose(1, 2), eps=1e-8).transpose(1, 2)


def dot_products(a, b):
    """Dot products of the rows of a with the rows of b, in fp32: bf16 is too coarse."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().transpose(-1, -2)


def masked_mean(x, mask):
    """Mean of x, weighted by mask; 0 if the mask is empty."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


class Head(nn.Module):
    """Prediction head of JEPA, data2vec and DinoSR: one more bidirectional block of the backbone's
    kind (S4 with state 64), then a linear map."""

    def __init__(self, config, out):
        super().__init__()
        if config.backbone in ('s4', 's4d'):
            kind = S4 if config.backbone == 's4' else S4D
            self.block = S4Block(config.dim, 64, False, config.dropout, kind)
        else:
            self.block = Encoder(replace(config, causal=False)).blocks[-1]
        self.out = nn.Linear(config.dim, out)

    def forward(self, h):
        return self.out(self.block(h)[0])


@torch.no_grad()
def kmeans_plus_plus(x, k):
    """k well separated rows of x (N, D), scaled to unit length. A new row is drawn with probability
    proportional to its squared distance to the nearest row so far; each round doubles the set. If
    k > N, rows are repeated with noise added, since only one of several equal codes is used."""
    chosen = x[torch.randint(len(x), (1,), device=x.device)]
    while len(chosen) < k:
        weight = torch.cdist(x, chosen).amin(1).square() + 1e-12
        count = min(len(chosen), k - len(chosen))
        chosen = torch.cat([chosen, x[torch.multinomial(weight, count, replacement=len(x) < k)]])
    if len(x) < k:
        chosen = chosen + .1 * torch.randn_like(chosen) * chosen.std(0)
    return F.normalize(chosen, dim=1)


@torch.no_grad()
def kmeans(x, k, rounds=10):
    """Spherical k-means of unit rows x (N, D): k unit centres. An empty cluster stays in place."""
    centres = kmeans_plus_plus(x, k)
    for _ in range(rounds):
        code = dot_products(x, centres).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, code, x)
        centres = torch.where(sums.any(1, keepdim=True), F.normalize(sums, dim=1), centres)
    return centres


def sinkhorn(scores, rounds=3):
    """exp(scores) (N, K), with columns made even and rows made to sum to 1, in turn."""
    q = (scores - scores.amax(1, keepdim=True)).exp()
    for _ in range(rounds):
        q = q / (q.sum(0) + 1e-8)
        q = q / (q.sum(1, keepdim=True) + 1e-8)
    return q


def count_codes(code, codes):
    """How often each of `codes` codes occurs: code (..., N) -> (..., codes) float."""
    hits = torch.zeros(*code.shape[:-1], codes, device=code.device)
    return hits.scatter_add_(-1, code, torch.ones_like(code, dtype=hits.dtype))


# -------------------------------------------------------------------------------------------------
# contrast

class CPC(Objective):
    """Contrastive predictive coding (van den Oord et al. 2018, 1807.03748), as in arXiv 2605.12241.

    A causal context at token i picks the stem's token i + 14 (117 ms ahead) out of 129 candidates.
    The 128 negatives are tokens of the same crop, past or future, drawn with replacement from all
    but the target. Logits are plain dot products. Targets are not detached, so the stem learns
    through them too. Loss: cross-entropy; ln 129 = 4.86 if the head is zero. (The released code
    sums over the 286 positions instead of taking the mean.)
    """
    causal = True
    rates = {'s4': 1e-2, 's4d': 1e-2, 'transformer': 1e-2, 'net1d': 3e-3}
    options = ('horizon', 'negatives')
    released = ('lr',)

    def __init__(self, encoder, steps=800, horizon=14, negatives=128):
        super().__init__()
        self.encoder, self.horizon, self.negatives = encoder, horizon, negatives
        self.head = nn.Linear(encoder.dim, encoder.dim, bias=False)

    def forward(self, batch):
        z, pad = self.encoder.tokens(batch)                               # (B, L, D)
        h = self.encoder.backbone(z, pad)
        prediction = self.head(h[:, :-self.horizon])                    # (B, P, D), P = L - horizon
        scores = dot_products(prediction, z)                              # (B, P, L)
        # candidates: the target, then negatives from 0 ... L-1 without the target
        B, P, L = scores.shape
        target = torch.arange(self.horizon, L, device=z.device).expand(B, P)[..., None]
        negative = torch.randint(L - 1, (B, P, self.negatives), device=z.device)
        negative = negative + (negative >= target)
        logits = scores.gather(2, torch.cat([target, negative], 2))       # (B, P, 1 + negatives)
        truth = torch.zeros(B * P, dtype=torch.long, device=z.device)     # the target comes first
        loss = F.cross_entropy(logits.flatten(0, 1), truth)
        accuracy = (logits[..., :1] > logits[..., 1:]).all(2).float().mean()      # a tie is a miss
        return loss, {'features': h, 'accuracy': accuracy, 'chance': 1 / (1 + self.negatives)}


class CMSC(Objective):
    """Contrastive learning of adjacent segments (CLOCS, Kiyasseh et al. 2021, 2005.13249), in the
    form of 2605.17276: the two halves of a 10 s crop, and other records of the same patient,
    attract; everything else in the batch repels. Mean-pooled features, a 2-layer map to 128, unit
    length, temperature .1 (that of CLOCS; the paper's is not known). Loss: -log softmax over the
    other 2 B - 1 halves, mean over positives; ln(2 B - 1) if the head is zero. The encoder is
    trained and evaluated on crops of 5 s."""
    window = 10
    views = 2
    rates = {'resnet': 1e-3, 'beat': 1e-3, 's4': 3e-3, 's4d': 1e-2, 'transformer': 1e-3,
             'net1d': 1e-2}

    def __init__(self, encoder, steps=800):
        super().__init__()
        self.encoder, dim = encoder, encoder.dim
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 128))

    def forward(self, batch):
        f = mean_pool(*self.encoder(halves(batch)))                       # (2 B, D)
        z = F.normalize(self.head(f).float(), dim=1)
        patient = batch['patient'].repeat(2)
        same = torch.eye(len(z), dtype=torch.bool, device=z.device)       # a half and itself
        positive = (patient == patient[:, None]) & ~same
        scores = (dot_products(z, z) / .1).masked_fill(same, -1e9)
        loss = -((scores.log_softmax(1) * positive).sum(1) / positive.sum(1)).mean()
        nearest = scores.argmax(1, keepdim=True)
        return loss, {'features': f, 'accuracy': positive.gather(1, nearest).float().mean(),
                      'chance': positive.sum(1).float().mean() / (len(z) - 1)}


def halves(batch):
    """All first halves of the crops, then all second ones: x (2 B, 12, T / 2), peaks (2 B, P) in
    samples of the half, -1 where none."""
    half, peaks = batch['x'].shape[2] // 2, batch['peaks']
    x = torch.cat([batch['x'][..., :half], batch['x'][..., half:2 * half]])
    inside = [(peaks >= start) & (peaks < start + half) for start in (0, half)]
    none = 2 * half                                                       # sorts to the end
    peaks = torch.cat([peaks.where(inside[0], none), (peaks - half).where(inside[1], none)])
    peaks = peaks.sort(1).values
    return dict(x=x, peaks=peaks.where(peaks < half, -1))


# -------------------------------------------------------------------------------------------------
# prediction of a teacher's features at hidden tokens

class MaskedPrediction(Objective):
    """The common part of JEPA, data2vec, DinoSR and HuBERT++. The student sees the crop with some
    tokens hidden. At these tokens it predicts the teacher's features of the whole crop."""
    options = ('span_ms', 'hide', 'target_norm', 'half_life', 'momentum', 'teacher_mode')
    released = ('ema', 'mask', 'lr', 'norm')

    def __init__(self, encoder, steps=800, span_ms=83, hide=.49, target_norm='instance',
                 released=(), **teacher):
        super().__init__()
        self.encoder, self.teacher = encoder, Teacher(encoder, steps, released, **teacher)
        self.span = max(1, round(span_ms / 1000 * encoder.tokens_per_second))
        self.hide, self.target_norm, self.released_mask = hide, target_norm, 'mask' in released
        self.mask_token = nn.Parameter(torch.randn(encoder.dim))

    def mask(self, z):
        """Which tokens are hidden, and with what weight each is predicted: (B, L) both."""
        hidden = span_mask(*z.shape[:2], self.span, self.hide, self.released_mask, z.device)
        return hidden, hidden

    def student(self, batch):
        """The student's features h (B, L, D), prediction (B, L, outputs), hidden, weight (B, L)."""
        z, pad = self.encoder.tokens(batch)                               # (B, L, D)
        hidden, weight = self.mask(z)
        z = torch.where(hidden[..., None], self.mask_token.to(z.dtype), z)
        h = self.encoder.backbone(z, pad)
        return h, self.head(h).float(), hidden, weight

    def after_step(self):
        self.teacher.follow(self.encoder)


class JEPA(MaskedPrediction):
    """Joint-embedding prediction (I-JEPA, Assran et al. 2023, 2301.08243, for a sequence): from a
    visible context, predict the teacher's output in hidden blocks. Loss: smooth L1, mean over
    blocks, tokens and features; about .42 if the head is zero. A rising loss can be healthy."""
    rates = {'s4': 3e-3, 's4d': 3e-3, 'transformer': 1e-2, 'net1d': 1e-2}
    options = ('target_norm', 'half_life', 'momentum', 'teacher_mode')

    def __init__(self, encoder, steps=800, **options):
        super().__init__(encoder, steps, **options)
        self.head = Head(encoder.config, encoder.dim)

    def mask(self, z):
        visible, cover = block_mask(*z.shape[:2], self.released_mask, z.device)
        return ~visible, cover

    def forward(self, batch):
        h, prediction, hidden, weight = self.student(batch)
        _, feature = self.teacher(batch)
        target = standardise(feature, self.target_norm)
        error = F.smooth_l1_loss(prediction, target, reduction='none').mean(2)    # (B, L)
        loss = masked_mean(error, weight)
        return loss, {'features': h, 'target': feature, 'hidden': hidden.float().mean()}


class Data2Vec(MaskedPrediction):
    """data2vec (Baevski et al. 2022, 2202.03555): predict the mean of the teacher's top two layers
    at hidden tokens. Target: the branches of the last two blocks before the residual sum,
    standardised, averaged. Loss: smooth L1, summed over features / sqrt(D), mean over hidden
    tokens."""
    rates = {'s4': 1e-2, 's4d': 1e-2, 'transformer': 1e-2, 'net1d': 1e-2}

    def __init__(self, encoder, steps=800, **options):
        super().__init__(encoder, steps, **options)
        self.head = Head(encoder.config, encoder.dim)

    def forward(self, batch):
        h, prediction, hidden, weight = self.student(batch)
        layers, _ = self.teacher(batch)
        last, before = layers[-1][0], layers[-2][0]
        target = (standardise(last, self.target_norm) + standardise(before, self.target_norm)) / 2
        error = F.smooth_l1_loss(prediction, target, reduction='none').sum(2)     # (B, L)
        loss = masked_mean(error / target.shape[2] ** .5, weight)
        return loss, {'features': h, 'target': last, 'hidden': hidden.float().mean()}


class DinoSR(MaskedPrediction):
    """DinoSR (Liu et al. 2023, 2305.10005): predict, at hidden tokens, which code of a codebook is
    nearest to the teacher's feature. One codebook of 256 for each of the last two blocks' outputs;
    codes are running means (decay .9) of the features assigned to them, unassigned codes keep their
    place. As released ('codebook'): one codebook, whose unassigned codes fade to the origin; half
    of the head's outputs idle. Loss: cross-entropy, mean over hidden tokens and codebooks;
    ln 256 = 5.55 if the head is zero. A loss near 0 with few codes in use is collapse."""
    rates = {'s4': 1e-3, 's4d': 1e-3, 'transformer': 3e-4, 'net1d': 1e-2}
    released = MaskedPrediction.released + ('codebook',)

    def __init__(self, encoder, steps=800, codes=256, released=(), **options):
        super().__init__(encoder, steps, released=released, **options)
        self.books = 1 if 'codebook' in released else 2
        self.head = Head(encoder.config, 2 * codes)
        start = standardise(torch.randn(self.books, codes, encoder.dim), 'layer')
        self.register_buffer('sums', start)
        self.register_buffer('counts', torch.ones(self.books, codes))
        self.last_assignment = None

    def codebook(self):
        return self.sums / self.counts.clamp(min=1e-8)[..., None]         # (books, codes, D)

    def forward(self, batch):
        h, prediction, hidden, weight = self.student(batch)
        logits = prediction.unflatten(2, (2, -1))[:, :, :self.books]      # (B, L, books, codes)
        layers, feature = self.teacher(batch)
        x = torch.stack([standardise(out, self.target_norm).flatten(0, 1)
                         for _, out in layers[-self.books:]])                     # (books, B L, D)
        code = torch.cdist(x, self.codebook()).argmin(2)                          # (books, B L)
        hits = count_codes(code, self.counts.shape[1])
        self.last_assignment = x, code, hits
        target = code.view(self.books, *hidden.shape).permute(1, 2, 0)            # (B, L, books)
        error = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction='none')
        loss = masked_mean(error.view_as(target).mean(2), weight)
        accuracy = masked_mean((logits.argmax(3) == target).float().mean(2), weight)
        return loss, {'features': h, 'target': feature, 'hits': hits, 'accuracy': accuracy,
                      'hidden': hidden.float().mean()}

    @torch.no_grad()
    def after_step(self):
        x, code, hits = self.last_assignment
        sums = torch.zeros_like(self.sums).scatter_add_(1, code[..., None].expand_as(x), x)
        moved = (hits > 0) | (self.books == 1)
        self.counts.copy_(torch.where(moved, self.counts.lerp(hits, .1), self.counts))
        self.sums.copy_(torch.where(moved[..., None], self.sums.lerp(sums, .1), self.sums))
        super().after_step()


class HuBERT(MaskedPrediction):
    """HuBERT++: predict soft cluster assignments of the teacher's features, made even by
    Sinkhorn-Knopp, in codebooks of 128 and 256. Prototypes: k-means++ on the first batch, then
    running means (decay .99), unit length. The teacher's temperature falls from .15 to .07, the
    student's from .5 to .1, as a cosine over 200 steps. Loss per codebook: .75 KL at hidden tokens
    + .25 KL at visible ones + .001 entropy of the prediction; summed over codebooks."""
    rates = {'s4': 1e-2, 's4d': 3e-3, 'transformer': 1e-2, 'net1d': 1e-2}
    sizes = (128, 256)

    def __init__(self, encoder, steps=800, **options):
        super().__init__(encoder, steps, **options)
        dim, codes = encoder.dim, sum(self.sizes)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, codes))
        self.register_buffer('prototypes', torch.zeros(codes, dim))
        self.register_buffer('age', torch.zeros((), dtype=torch.long))            # steps so far
        self.last_assignment, self.initialised = None, False

    def temperature(self, first, last):
        progress = (self.age / 200).clamp(max=1)
        return first + (last - first) * (1 - torch.cos(math.pi * progress)) / 2

    def forward(self, batch):
        h, prediction, hidden, _ = self.student(batch)
        logits = prediction.flatten(0, 1).split(self.sizes, 1)                    # 2 x (B L, K)
        _, feature = self.teacher(batch)
        x = F.normalize(standardise(feature, self.target_norm).flatten(0, 1), dim=1)     # (B L, D)
        self.initialised = self.initialised or bool(self.prototypes.any())
        if not self.initialised:
            self.prototypes.copy_(torch.cat([kmeans_plus_plus(x, k) for k in self.sizes]))
        targets = [sinkhorn(dot_products(x, p) / self.temperature(.15, .07))
                   for p in self.prototypes.split(self.sizes)]                    # 2 x (B L, K)
        self.last_assignment, mask = (x, targets), hidden.flatten()
        loss, accuracy, hits = 0., 0., []
        for q, s in zip(targets, logits):
            log_p = (s / self.temperature(.5, .1)).log_softmax(1)
            kl = (q * (q.clamp(min=1e-12).log() - log_p)).sum(1)
            entropy = -(s.softmax(1) * (s.softmax(1) + 1e-8).log()).sum(1).mean()
            loss = loss + .75 * masked_mean(kl, mask) + .25 * masked_mean(kl, ~mask)
            loss = loss + .001 * entropy
            code = q.argmax(1)
            accuracy = accuracy + masked_mean((s.argmax(1) == code).float(), mask) / len(self.sizes)
            hits.append(count_codes(code, q.shape[1]))
        return loss, {'features': h, 'target': feature, 'hits': hits, 'accuracy': accuracy,
                      'hidden': hidden.float().mean()}

    @torch.no_grad()
    def after_step(self):
        x, targets = self.last_assignment
        means = torch.cat([F.normalize(q.T @ x, dim=1) for q in targets])
        self.prototypes.copy_(F.normalize(.99 * self.prototypes + .01 * means, dim=1))
        self.age += 1
        super().after_step()


# -------------------------------------------------------------------------------------------------
# heartbeats and patches

class VQBeat(Objective):
    """The vocabulary of heartbeats (HeartLang's VQ-HBR, 2502.10707): an autoencoder of beat tokens
    through a vector quantiser of 8,192 codes. Encoder, 2-layer map to 128, nearest code by cosine,
    two decoder layers, 2-layer map back to the .96 s of each beat. Codes: k-means on the first
    batch, then running means (decay .99), unit length; unused codes stay. Loss over real beats:
    mean square error in mV^2 + commitment (mean square distance to the code)."""
    window = 10
    rates = {'beat': 3e-3}
    options = ('codes',)

    def __init__(self, encoder, steps=800, codes=8192):
        super().__init__()
        self.encoder, c = encoder, encoder.config
        self.to_code = nn.Sequential(nn.Linear(c.dim, c.dim), nn.Tanh(), nn.Linear(c.dim, 128))
        self.from_code = nn.Linear(128, c.dim)
        block = lambda: TransformerBlock(c.dim, c.ffn, c.heads, dropout=0., rotary=False, head=64,
                                         bias=False)
        self.decoder = nn.ModuleList([block(), block()])
        length = encoder.stem.length                                      # samples of a beat
        self.head = nn.Sequential(nn.Linear(c.dim, c.dim), nn.Tanh(), nn.Linear(c.dim, length))
        self.register_buffer('codebook', torch.zeros(codes, 128))
        self.last_assignment, self.initialised = None, False

    def encode(self, batch):
        """Unit-length features of the whole record: (B, 1 + leads P, 128), pad."""
        h, pad = self.encoder(batch)
        return F.normalize(self.to_code(h).float(), dim=2), pad

    @torch.no_grad()
    def codes(self, batch):
        """The code of every beat (B, leads P), and True where there is no beat."""
        x, pad = self.encode(batch)
        return dot_products(x[:, 1:], self.codebook).argmax(2), pad[:, 1:]

    def forward(self, batch):
        x, pad = self.encode(batch)
        real = ~pad[:, 1:]                                                        # (B, leads P)
        e = x[:, 1:][real]                                                        # (n, 128)
        self.initialised = self.initialised or bool(self.codebook.any())
        if not self.initialised:
            self.codebook.copy_(kmeans(e.detach(), len(self.codebook)))
        code = dot_products(e.detach(), self.codebook).argmax(1)
        q = self.codebook[code]
        self.last_assignment = e.detach(), code
        y = torch.zeros_like(x)
        y[:, 1:][real] = e + (q - e).detach()              # forward q, backward as if it were e
        y = self.from_code(y)
        for block in self.decoder:
            y, _ = block(y, pad)
        beats, _ = self.encoder.stem.beats(batch)                         # (B, leads P, length)
        error = (self.head(y[:, 1:]).float() - beats)[real].square().mean()
        loss = error + F.mse_loss(e, q)
        return loss, {'features': e, 'hits': count_codes(code[None], len(self.codebook)),
                      'explained': 1 - error / beats[real].square().mean()}

    @torch.no_grad()
    def after_step(self):
        x, code = self.last_assignment
        means = F.normalize(torch.zeros_like(self.codebook).index_add_(0, code, x), dim=1)
        self.codebook.copy_(F.normalize(.99 * self.codebook + .01 * means, dim=1))


class Beats(Objective):
    """Masked heartbeat prediction (HeartLang, 2502.10707): hide half of a record's beat tokens and
    predict their codes, those of a VQBeat trained before (--tokenizer). A beat is hidden before the
    embedding mixes neighbours; padding is never hidden nor predicted. (The released code hides
    after mixing, so neighbours still carry the beat; it also counts padding, and computes codes
    without lead and time.) Loss: cross-entropy, mean over hidden beats; ln 8192 = 9.01 if the head
    is zero."""
    window = 10
    rates = {'beat': 3e-3}
    options = ('tokenizer', 'hide')

    def __init__(self, encoder, steps=800, tokenizer=None, hide=.5):
        super().__init__()
        self.encoder, self.tokenizer, self.hide = encoder, tokenizer.requires_grad_(False), hide
        self.head = nn.Linear(encoder.dim, len(tokenizer.codebook))

    def forward(self, batch):
        self.tokenizer.eval()
        code, pad = self.tokenizer.codes(batch)                                   # (B, leads P)
        rank = torch.rand(code.shape, device=code.device).masked_fill(pad, 2.).argsort(1).argsort(1)
        mask = rank < ((~pad).sum(1, keepdim=True) * self.hide).long()            # rounded down
        z, padded = self.encoder.tokens(batch, ~mask)
        h = self.encoder.backbone(z, padded)[:, 1:]                               # without CLS
        logits, code = self.head(h[mask]).float(), code[mask]                     # (n, codes), (n,)
        n = mask.sum().clamp(min=1)
        loss = F.cross_entropy(logits, code, reduction='sum') / n
        return loss, {'features': h[~pad], 'hits': count_codes(code[None], logits.shape[1]),
                      'accuracy': (logits.argmax(1) == code).sum() / n,
                      'hidden': mask.sum() / (~pad).sum().clamp(min=1)}


class MAE(Objective):
    """Masked autoencoder of 50 ms patches over all leads (MTECG, 2309.07136; He et al. 2022,
    2111.06377): the encoder sees the visible patches only, one decoder block predicts the rest.
    Target: the patch with each lead's mean removed, divided by the SD of the whole patch (the
    paper's exact form is not known; this one keeps the proportions between leads). Loss: mean
    square error over hidden patches; 1 if the head is zero. raw_target: millivolts as they are. The
    paper finds that 5 to 75 % hidden all work; .5 is our choice."""
    window = 10
    rates = {'vit': 1e-3}
    options = ('hide', 'raw_target')

    def __init__(self, encoder, steps=800, hide=.5, raw_target=False):
        super().__init__()
        self.encoder, self.hide, self.raw, c = encoder, hide, raw_target, encoder.config
        self.embed, self.mask_token = nn.Linear(c.dim, c.dim), nn.Parameter(torch.zeros(c.dim))
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(201, c.dim), std=.02))
        self.decoder = TransformerBlock(c.dim, c.ffn, c.heads, dropout=c.dropout, rotary=False)
        self.norm, self.head = nn.LayerNorm(c.dim), nn.Linear(c.dim, c.leads * encoder.stem.length)

    def target(self, batch):
        """The prediction target of every patch: (B, L, leads length)."""
        p = self.encoder.stem.patches(batch)
        if self.raw:
            return p
        p = p.unflatten(2, (self.encoder.config.leads, -1))               # (B, L, leads, length)
        p = (p - p.mean(3, keepdim=True)).flatten(2)
        return p / (p.square().mean(2, keepdim=True) + 1e-6).sqrt()

    def forward(self, batch):
        target = self.target(batch)
        B, L = target.shape[:2]
        count = min(L - 1, max(1, round(self.hide * L)))                  # hidden, in every crop
        order = torch.rand(B, L, device=target.device).argsort(1)
        visible = order[:, count:].sort(1).values                         # (B, L - count)
        mask = torch.ones(B, L, device=target.device).scatter(1, visible, 0.)     # 1 where hidden
        z, pad = self.encoder.tokens(batch, visible)
        h = self.encoder.backbone(z, pad)                                 # (B, 1 + L - count, D)
        y = self.embed(h)
        place = visible[..., None].expand(-1, -1, y.shape[2])
        full = self.mask_token.to(y.dtype).expand(B, L, -1).scatter(1, place, y[:, 1:])
        y, _ = self.decoder(torch.cat([y[:, :1], full], 1) + self.position[:L + 1])
        prediction = self.head(self.norm(y[:, 1:])).float()
        loss = masked_mean((prediction - target).square().mean(2), mask)
        explained = 1 - loss / masked_mean(target.square().mean(2), mask)
        return loss, {'features': h[:, 1:], 'explained': explained, 'hidden': mask.mean()}


# -------------------------------------------------------------------------------------------------
# labels

class Supervised(Objective):
    """Multi-label classification: mean pooling and a linear map. Loss: binary cross-entropy, mean
    over known labels; ln 2 if the head is zero. focal > 0 (Lin et al. 2017, 1708.02002) weights
    each term by (1 - p of the truth)^focal. columns: which labels of batch['y'] are learned."""
    rates = {'s4': 1e-2, 's4d': 1e-2, 'transformer': 1e-2, 'net1d': 1e-2, 'resnet': 3e-3,
             'beat': 3e-3, 'vit': 1e-3}
    options = ('task', 'focal')

    def __init__(self, encoder, steps=800, columns=(), focal=0.):
        super().__init__()
        self.encoder, self.focal = encoder, focal
        # a tensor on the device, since indexing by a list would make a GPU wait
        self.register_buffer('columns', torch.tensor(columns).long(), persistent=False)
        self.head = MeanPool(encoder.dim, len(columns))

    def forward(self, batch):
        h, pad = self.encoder(batch)
        logits = self.head(h, pad).float()                                        # (B, K)
        y = batch['y'][:, self.columns]
        known = y.isfinite()
        y = y.where(known, 0.)
        error = F.binary_cross_entropy_with_logits(logits, y, reduction='none')
        if self.focal:
            error = error * (-torch.expm1(-error)).clamp(min=1e-6) ** self.focal  # exp(-error) = p
        loss = masked_mean(error, known)
        rate = (y * known).sum(0) / known.sum(0).clamp(min=1)                     # of each label
        correct = ((logits > 0) == (y > .5)).float()
        return loss, {'features': h if pad is None else h[~pad],
                      'accuracy': masked_mean(correct, known),
                      'chance': masked_mean(torch.maximum(rate, 1 - rate), known.any(0))}


OBJECTIVES = {'cpc': CPC, 'jepa': JEPA, 'data2vec': Data2Vec, 'dinosr': DinoSR, 'hubert': HuBERT,
              'cmsc': CMSC, 'vqbeat': VQBeat, 'beats': Beats, 'mae': MAE, 'supervised': Supervised}

# PTB-XL means and SDs (mV) by which the released code standardises the input of all objectives but
# CPC. By their size they are in the order I II V1-V6 III aVR aVL aVF, but the code applies them by
# position to I II III aVR aVL aVF V1-V6. Reproduced as it is.
_MEAN = [-.00184586, -.00130277, .00017031, -.00091313, -.00148835, -.00174687, -.00077071,
         -.00207407, .00054329, .00155546, -.00114379, -.00035649]
_STD = [.16401004, .1647168, .23374124, .33767231, .33362807, .30583013, .2731171, .27554379,
        .17128962, .14030828, .14606956, .14656108]


def released_input(x):
    """x (B, 12, T) in mV, standardised as the released code does (--as_released norm)."""
    return (x - x.new_tensor(_MEAN)[:, None]) / (x.new_tensor(_STD)[:, None] + 1e-8)


# -------------------------------------------------------------------------------------------------
# health

def effective_rank(x):
    """exp of the entropy of the covariance's normalised spectrum, x (N, D): 1 (collapse) to D."""
    share = torch.linalg.eigvalsh(torch.cov(x.T)).clamp(min=0)
    return torch.special.entr(share / share.sum().clamp(min=1e-20)).sum().exp()


def direction_std(x):
    """How much the directions of the rows of x (N, D) differ: 0 all the same, near 1 like noise."""
    return F.normalize(x, dim=1).std(0).square().sum().sqrt()


ALARMS = {'rank': 'features lie in one direction', 'std': 'features are all the same',
          'target_std': 'targets hardly vary', 'perplexity': 'hardly any code in use'}


def subsample(x):
    """Up to 4,095 of the rows of x (..., D): (N, D) in fp32."""
    x = x.float().flatten(0, -2)
    return x[::max(1, len(x) // 2048)]


@torch.no_grad()
def health(logs):
    """(numbers, alarm) of one batch; the alarm is '' where nothing is wrong. In logs: features
    (..., D) of the student; target (..., D), the teacher's before standardisation; hits, for each
    codebook (K,) how often a code was the target; single numbers, which pass through."""
    numbers = {k: float(v) for k, v in logs.items() if k not in ('features', 'target', 'hits')}
    x = subsample(logs['features'])
    numbers |= {'rank': effective_rank(x).item(), 'std': direction_std(x).item()}
    limits = {'rank': 1.5, 'std': .05, 'target_std': .05}
    if 'target' in logs:
        numbers['target_std'] = direction_std(subsample(logs['target'])).item()
    if 'hits' in logs:
        books = list(logs['hits'])
        shares = [hits / hits.sum().clamp(min=1) for hits in books]
        average = lambda values: sum(float(v) for v in values) / len(books)
        numbers['codes'] = average((share > 0).sum() for share in shares)
        numbers['chance'] = average(share.max() for share in shares)      # of the commonest code
        numbers['perplexity'] = average(torch.special.entr(share).sum().exp() for share in shares)
        # 2 % of the codes that could be in use
        limits['perplexity'] = .02 * average(min(len(hits), hits.sum()) for hits in books)
    low = [k for k, limit in limits.items() if k in numbers and numbers[k] < limit]
    return numbers, '; '.join(f'{k} {numbers[k]:.2g}: {ALARMS[k]}' for k in low)


def main():
    """Print which objective runs on which backbone, with its learning rates and flags."""
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    backbones = list(Supervised.rates)
    print(f'{"":18s}  ' + ''.join(f'{b:>12s}' for b in backbones) + '   flags; --as_released')
    for name, kind in OBJECTIVES.items():
        rates = ''.join(f'{kind.rates.get(b, ""):>12}' for b in backbones)
        flags = ' '.join('--' + o.replace('_', '-') for o in kind.options)
        released = f'; {",".join(kind.released)}' if kind.released else ''
        print(f'{name:11s}{kind.window:5.1f} s  {rates}   {flags}{released}')


if __name__ == '__main__':
    main()
