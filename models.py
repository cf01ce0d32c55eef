"""Encoders: a CNN stem with an S4, S4D, Transformer or Net1D backbone; Ribeiro's ResNet; beat tokens; patch tokens. One shape for all.

    python models.py                                     # every encoder: parameters, MACs, tokens, receptive field, time; S4 kernels in out/s4.png
    python models.py --size base
    python models.py --convolutions                      # ways to convolve, timed side by side

x (B, 12, T) -> stem -> tokens (B, L, D) -> backbone (B, L, D). arXiv 2605.12241 (stem, S4, Transformer, Net1D), 2605.17276 (ResNet, beats),
2309.07136 (patches).
"""
import argparse, csv, ctypes, itertools, math, os, statistics, sys, time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# (width D, layers, FFN width, heads) by backbone and size. tiny, small and base match in parameters; released is what the papers' code has
SIZES = {
    's4': {'tiny': (64, 4, 0, 0), 'small': (256, 4, 0, 0), 'base': (512, 4, 0, 0), 'released': (512, 4, 0, 0)},
    's4d': {'tiny': (64, 4, 0, 0), 'small': (256, 4, 0, 0), 'base': (512, 4, 0, 0)},
    'transformer': {'tiny': (32, 4, 120, 2), 'small': (128, 4, 420, 4), 'base': (256, 4, 824, 4), 'released': (512, 6, 2048, 8)},
    'net1d': {'tiny': (32, 8, 0, 0), 'small': (128, 14, 0, 0), 'base': (256, 20, 0, 0), 'released': (512, 20, 0, 0)},
    'resnet': {'tiny': (34, 3, 0, 0), 'small': (116, 4, 0, 0), 'base': (210, 5, 0, 0), 'released': (320, 5, 0, 0)},
    'beat': {'tiny': (32, 1, 160, 1), 'small': (128, 2, 704, 4), 'base': (256, 3, 1240, 4), 'released': (768, 12, 1024, 8)},
    'vit': {'tiny': (32, 4, 96, 2), 'small': (128, 4, 428, 4), 'base': (256, 4, 880, 4), 'released': (192, 12, 768, 3)}}
# the ladders of 2605.17276, Table S.4, named layers x width
SIZES['resnet'] |= {f'{l}x{d}': (d, l, 0, 0) for l, d in ((3, 24), (3, 48), (4, 64), (4, 90), (4, 128), (5, 226), (5, 320), (6, 452), (6, 640), (7, 1024))}
SIZES['beat'] |= {f'{l}x{d}': (d, l, 4 * d, h) for l, d, h in ((1, 24, 1), (1, 48, 2), (1, 96, 2), (2, 128, 4), (3, 192, 4), (3, 256, 4), (4, 348, 4),
                                                               (5, 420, 8), (6, 512, 8), (8, 768, 8))}
SIZES['s4'] |= {f'4x{d}': (d, 4, 0, 0) for d in (12, 24, 48, 88, 160, 288, 512, 928)}         # our own, threefold in parameters from 3K on
SIZES['transformer'] |= {f'4x{d}': (d, 4, 4 * d, h) for d, h in ((8, 1), (14, 1), (24, 2), (44, 2), (80, 4), (144, 4), (256, 4), (464, 8))}
DROPOUT = {'s4': .2, 's4d': .2, 'transformer': .1, 'net1d': 0., 'resnet': .2, 'beat': .1, 'vit': 0.}


# ---------------------------------------------------------------------------------------------------------------------
# stem

class Stem(nn.Sequential):
    """Four convolutions with BatchNorm and ReLU, kernels 3 1 1 1, the first with stride 2: (B, leads, T) -> (B, ceil(T / 2), dim).
    A token sees 3 samples; all mixing over time is the backbone's. 808,960 parameters for 12 leads and dim 512. Computed as matrix
    products on (B, L, dim), the form that the backbone takes."""

    def __init__(self, leads, dim):
        layers = []
        for i in range(4):
            conv = nn.Conv1d(dim, dim, 1, bias=False) if i else nn.Conv1d(leads, dim, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm1d(dim), nn.ReLU()]
        super().__init__(*layers)

    def forward(self, batch, keep=None):
        z = F.pad(batch['x'].transpose(1, 2), (0, 0, 1, 1)).unfold(1, 3, 2).flatten(2)       # (B, L, leads 3): what each token sees
        for layer in self:
            if isinstance(layer, nn.Conv1d):
                z = F.linear(z, layer.weight.flatten(1))         # (B, L, dim)
            else:
                z = layer(z.flatten(0, 1)).view_as(z)            # BatchNorm, over crops and tokens; ReLU
        return z, None


# ---------------------------------------------------------------------------------------------------------------------
# S4 with frozen HiPPO-LegS dynamics

def legs(state):
    """HiPPO-LegS matrices A (N, N) and B (N,) in float64; the eigenvalues of A are -1 ... -N. (Gu et al. 2020, 2008.07669)"""
    n = torch.arange(state, dtype=torch.float64)
    B = (2 * n + 1).sqrt()
    A = -torch.tril(torch.outer(B, B), -1) - torch.diag(n + 1)
    return A, B


def discretise(log_dt, state):
    """Bilinear rule, one step size per channel: Abar (H, N, N) and Bbar (H, N) in float64."""
    A, B = (t.to(log_dt.device) for t in legs(state))
    dt, I = log_dt.double().exp()[:, None, None], torch.eye(state).to(A)
    Abar = torch.linalg.solve(I - dt / 2 * A, I + dt / 2 * A)
    Bbar = torch.linalg.solve(I - dt / 2 * A, dt * B[:, None])[..., 0]
    return Abar, Bbar


def ring(k):
    """Kernels k (1 or 2, H, L) as one (H, 2 L) over the lags 0 ... L - 1, -L ... -1, which has room for what would wrap around."""
    return F.pad(k[0], (0, k.shape[2])) if len(k) == 1 else torch.cat([k[0], k[1].flip(1)], 1)


class Circular(torch.autograd.Function):
    """u (H, B, L) with the `ring` of a kernel (H, 2 L): (H, B, L). Backward by real FFTs like forward, where autograd would take complex
    ones of twice the work; not differentiable a second time."""

    @staticmethod
    def forward(ctx, u, kernel):
        U, K = torch.fft.rfft(u, n=kernel.shape[1]), torch.fft.rfft(kernel)
        ctx.save_for_backward(U, K)
        return torch.fft.irfft(U * K[:, None], n=kernel.shape[1])[..., :u.shape[2]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (U, K), L = ctx.saved_tensors, g.shape[2]
        G = torch.fft.rfft(g, n=2 * L)
        return torch.fft.irfft(G * K.conj()[:, None], n=2 * L)[..., :L], torch.fft.irfft((G * U.conj()).sum(1), n=2 * L)


def convolve(u, k):
    """Long convolution by FFT. u and result (H, B, L).

    k (1, H, L): y_t = sum_j k[0]_j u_{t-j}, which never looks ahead;
    k (2, H, L): plus sum_j k[1]_j u_{t+1+j}, the same looking back from the future, shifted by one so that lag 0 counts once.
    """
    return Circular.apply(u, ring(k))


def convolve_toeplitz(u, k):
    """The same convolution as one (L, L) matrix product a channel, in the dtype of u: L^2 work, all of it matrix products. u and result
    (H, B, L); k (1 or 2, H, L) as for `convolve`."""
    H, _, L = u.shape
    turned = ring(k).to(u).repeat(1, L)[:, :L * (2 * L - 1)].view(H, L, 2 * L - 1)       # row j is turned by j: lag t - j in column t
    return u @ turned[..., :L]


CHUNK = 25                                                       # tokens


def convolve_chunks(u, C, parts):
    """The same convolution without FFT: within chunks of 25 tokens as a small matrix product, between chunks through states that are
    only N wide, one from the past and, looking both ways, one from the future. Linear in L, and about twice as fast as the FFT on a
    CPU. u and result (H, B, L); C (1 or 2, H, N); parts: what S4.chunk_parts made of the dynamics."""
    H, B, L = u.shape
    within, into, out_of, across = parts
    K, ways, N = -(-L // CHUNK), len(C), C.shape[2]
    x = (F.pad(u, (0, K * CHUNK - L)) if L % CHUNK else u).reshape(H, B * K, CHUNK)          # a pad of nothing would copy all
    local = (C[:, :, None] @ within).sum(0).view(H, CHUNK, CHUNK)                            # what a token of the chunk does to another
    read = (C[:, :, None] @ out_of).view(ways, H, N, CHUNK).transpose(0, 1).reshape(H, ways * N, CHUNK)
    entering = (x @ into).view(H, B, K, ways, N).permute(2, 0, 3, 1, 4)                      # (K, H, ways, B, N): what a chunk adds
    if ways == 2:
        entering = torch.stack([entering[:, :, 0], entering[:, :, 1].flip(0)], 2)            # the future is walked backwards
    state, states = u.new_zeros(H, ways * B, N), []
    for add in entering.flatten(2, 3):
        states.append(state)
        state = torch.baddbmm(add, state, across)
    states = torch.stack(states).view(K, H, ways, B, N)
    if ways == 2:
        states = torch.stack([states[:, :, 0], states[:, :, 1].flip(0)], 2)
    y = (states.permute(1, 3, 0, 2, 4).reshape(H, B * K, ways * N) @ read).baddbmm_(x, local)
    return y.view(H, B, K * CHUNK)[..., :L]


def tied_dropout(x, p, training, dim):
    """Dropout with one decision per record and channel, shared by all tokens, which lie along `dim`."""
    if not training or not p:
        return x
    return x * F.dropout(x.new_ones(x.narrow(dim, 0, 1).shape), p)


def drop_path(branch, p, training):
    """Stochastic depth (Huang et al. 2016, 1603.09382): a residual branch (B, ...) is left out with probability p, record by record, and
    scaled by 1 / (1 - p) where it stays, so that its expectation does too."""
    if not training or not p:
        return branch
    return branch * F.dropout(branch.new_ones(len(branch), *[1] * (branch.dim() - 1)), p)


class S4(nn.Module):
    """The S4 of arXiv 2605.12241's code: LegS dynamics A, B, dt stay as drawn, only C learns. u -> k * u, both (H, B, L).

    With A, B, dt frozen the kernel is linear in C over a fixed basis: k_l = sum_n C_n (Abar^l Bbar)_n, so each channel mixes
    `state` decaying filters at a time scale of its own.
    """

    def __init__(self, dim, state=8, causal=True):
        super().__init__()
        self.ready = None
        self.register_buffer('log_dt', torch.empty(dim).uniform_(math.log(1e-3), math.log(1e-1)))
        self.C = nn.Parameter(torch.randn(1 if causal else 2, dim, state))

    def dynamics(self, what, *args):
        """What follows from log_dt alone (`what` is basis or chunk_parts), made once for each precision and device."""
        key = (what.__name__, args, self.C.dtype, self.C.device, self.log_dt._version)
        if self.ready is None or self.ready[0] != key:
            self.ready = key, [t.to(self.C) for t in what(*args)]
        return self.ready[1]

    def basis(self, L):
        """(Abar^l Bbar) for l = 0 ... L - 1: one tensor (H, N, L), float64."""
        Abar, Bbar = discretise(self.log_dt, self.C.shape[2])
        steps = [Bbar]
        while len(steps) < L:
            steps.append((Abar @ steps[-1][..., None])[..., 0])
        return [torch.stack(steps, -1)]

    def chunk_parts(self):
        """The matrices of convolve_chunks, float64: within (ways, H, N, c c), into (H, c, ways N), out_of (ways, H, N, N c), across (H, N, N).
        From the past, Abar^{l + 1} carries a state to token l of the chunk; from the future, Abar^{c - 1 - l}."""
        Abar, _ = discretise(self.log_dt, self.C.shape[2])
        powers = [torch.eye(Abar.shape[1]).to(Abar).expand_as(Abar)]
        while len(powers) <= CHUNK:
            powers.append(Abar @ powers[-1])
        powers, basis = torch.stack(powers, -1), self.basis(CHUNK)[0]                        # (H, N, N, c + 1), (H, N, c)
        token, ways = torch.arange(CHUNK, device=Abar.device), len(self.C)
        lag = token - token[:, None]                             # (c, c): to a token (column) from another (row)
        pick = lambda lag: (basis[:, :, lag.clamp(min=0)] * (lag >= 0)).flatten(2)
        within = torch.stack([pick(lag), pick(-lag - 1)][:ways])
        into = torch.cat([basis.flip(2), basis][:ways], 1).transpose(1, 2)
        out_of = torch.stack([powers[..., 1:].flatten(2), powers[..., :-1].flip(3).flatten(2)][:ways])
        return within, into, out_of, powers[..., CHUNK].transpose(1, 2)

    def kernel(self, L):
        """Kernels (1 or 2, H, L), lags 0 ... L - 1."""
        return torch.einsum('chn,hnl->chl', self.C, *self.dynamics(self.basis, L))

    def forward(self, u):
        """By the faster way for the device and at the precision of C, whatever autocast says."""
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(self.C)
            if u.device.type != 'cpu' or self.C.shape[2] > 16:   # a wide state makes chunks slow
                return convolve(u, self.kernel(u.shape[2]))
            return convolve_chunks(u, self.C, self.dynamics(self.chunk_parts))


class S4D(nn.Module):
    """Diagonal state space whose dynamics learn too (Gu et al. 2022, 2206.11893), S4D-Lin: `state` / 2 complex modes per channel,
    A = -exp(a) + i w, B = 1, zero-order hold: k_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l). u -> k * u, both (H, B, L).
    log_step, a and w want a small rate and no weight decay: see `groups`."""

    def __init__(self, dim, state=8, causal=True):
        super().__init__()
        self.log_step = nn.Parameter(torch.empty(dim).uniform_(math.log(1e-3), math.log(1e-1)))
        self.a = nn.Parameter(torch.full((dim, state // 2), math.log(.5)))
        self.w = nn.Parameter(math.pi * torch.arange(state // 2.).repeat(dim, 1))
        self.C = nn.Parameter(torch.randn(1 if causal else 2, dim, state // 2, 2) / 2 ** .5)                  # E|C|^2 = 1

    def kernel(self, L):
        """Kernels (1 or 2, H, L), lags 0 ... L - 1."""
        A = torch.complex(-self.a.exp(), self.w)                 # (H, N / 2)
        step = A * self.log_step.exp()[:, None]
        C = torch.view_as_complex(self.C) * torch.expm1(step) / A
        powers = (step[..., None] * torch.arange(L, device=step.device)).exp()               # (H, N / 2, L)
        return 2 * torch.einsum('chn,hnl->chl', C, powers).real

    def forward(self, u):
        with torch.autocast(u.device.type, enabled=False):
            return convolve(u.to(self.a), self.kernel(u.shape[2]))


class S4Block(nn.Module):
    """Post-norm residual block: LayerNorm(x + drop(GLU(W drop(gelu(k * x + D x)) + b))), k * x by S4 or S4D."""

    path = 0.                                                    # of drop_path, see `regularise`

    def __init__(self, dim, state, causal, dropout, kind=S4):
        super().__init__()
        self.s4, self.D, self.out = kind(dim, state, causal), nn.Parameter(torch.randn(dim)), nn.Linear(dim, 2 * dim)
        self.norm, self.p = nn.LayerNorm(dim), dropout

    def forward(self, x, pad=None):
        u = x.flatten(0, 1).t().contiguous().unflatten(1, x.shape[:2])                       # (H, B, L): copied in blocks, as permute is not
        y = F.gelu(torch.addcmul(self.s4(u), self.D[:, None, None], u))
        y = tied_dropout(y, self.p, self.training, 2).permute(1, 2, 0)                       # (B, L, H)
        value, gate = self.out(y).chunk(2, -1)
        branch = value * gate.sigmoid()                          # F.glu's backward takes half as long again on a CPU
        return self.norm(x + drop_path(tied_dropout(branch, self.p, self.training, 1), self.path, self.training)), branch


# ---------------------------------------------------------------------------------------------------------------------
# Transformer

def rotate(x):
    """Rotary position embedding (Su et al. 2021, 2104.09864), base 10000, pairs (i, i + half): x (B, heads, L, size)."""
    L, half = x.shape[2], x.shape[3] // 2
    angle = torch.outer(torch.arange(L, device=x.device), 10000. ** (-torch.arange(half, device=x.device) / half))
    a, b, cos, sin = x[..., :half], x[..., half:], angle.cos().to(x), angle.sin().to(x)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class TransformerBlock(nn.Module):
    """Pre-norm block: x + drop(attention(norm x)), then x + drop(ffn(norm x)), GELU. Its branch is the second one, the last before a
    residual sum. 2605.12241: rotary positions. Beats and patches have learned ones; beats also heads of 64 and no bias in q, k, v. No
    dropout on the attention weights (the papers' code has it): torch's fast kernel for the CPU has none, and the slow one takes four
    times as long."""

    path = 0.

    def __init__(self, dim, ffn, heads, causal=False, dropout=.1, rotary=True, head=None, bias=True):
        super().__init__()
        self.heads, self.causal, self.p, self.rotary, wide = heads, causal, dropout, rotary, heads * (head or dim // heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, wide, bias) for _ in range(3))
        self.out, self.wide, self.narrow = nn.Linear(wide, dim), nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        for linear in (self.q, self.k, self.v, self.out, self.wide, self.narrow):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def attention(self, x, pad=None):
        split = lambda y: y.unflatten(2, (self.heads, -1)).transpose(1, 2)                   # (B, heads, L, size)
        turn = rotate if self.rotary else lambda y: y
        q, k, v = turn(split(self.q(x))), turn(split(self.k(x))), split(self.v(x))
        y = F.scaled_dot_product_attention(q, k, v, None if pad is None else ~pad[:, None, None], is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x, pad=None):
        drop = lambda y: F.dropout(y, self.p, self.training)
        x = x + drop_path(drop(self.attention(self.norm1(x), pad)), self.path, self.training)
        branch = self.narrow(drop(F.gelu(self.wide(self.norm2(x)))))
        return x + drop_path(drop(branch), self.path, self.training), branch


# ---------------------------------------------------------------------------------------------------------------------
# Net1D, the CNN of ECGFounder at stride 1

class Net1DBlock(nn.Module):
    """Bottleneck block of Net1D: 1x1, grouped convolution of 16 taps, 1x1, squeeze-and-excitation, identity padded with zero channels.

    As released it is not causal: 8 taps look ahead and the excitation pools over all time, so CPC would see its targets. Causal here
    means that all 15 neighbours lie in the past and the excitation pools over the tokens so far."""

    path = 0.

    def __init__(self, inside, outside, causal, first):
        super().__init__()
        self.causal, self.first, self.grow = causal, first, outside - inside
        self.conv1, self.conv3 = nn.Conv1d(inside, outside, 1), nn.Conv1d(outside, outside, 1)
        self.conv2 = nn.Conv1d(outside, outside, 16, groups=max(1, outside // 16))
        self.squeeze, self.excite = nn.Linear(outside, outside // 2), nn.Linear(outside // 2, outside)

    def forward(self, x, pad=None):
        y = x.transpose(1, 2)                                    # (B, C, L)
        h = self.conv1(y if self.first else F.silu(y))
        h = self.conv2(F.pad(F.silu(h), (15, 0) if self.causal else (7, 8)))
        h = self.conv3(F.silu(h)).transpose(1, 2)                # (B, L, C)
        L = h.shape[1]
        pooled = h.cumsum(1) / torch.arange(1, L + 1, device=h.device)[:, None] if self.causal else h.mean(1, keepdim=True)
        branch = h * self.excite(F.silu(self.squeeze(pooled))).sigmoid()
        return drop_path(branch, self.path, self.training) + F.pad(x, (self.grow // 2, self.grow - self.grow // 2)), branch


class Net1DEntry(nn.Module):
    """First convolution of Net1D, D -> D / 8 channels, 16 taps, and Swish."""

    def __init__(self, dim, causal):
        super().__init__()
        self.causal, self.conv = causal, nn.Conv1d(dim, dim // 8, 16)

    def forward(self, x, pad=None):
        y = F.silu(self.conv(F.pad(x.transpose(1, 2), (15, 0) if self.causal else (7, 8)))).transpose(1, 2)
        return y, y


def net1d(dim, layers, causal):
    """The blocks of Net1D (Hong et al. 2020) as in arXiv 2605.12241: seven stages, widths D / 8 to D, stride 1. Its 20 blocks are
    2 2 2 3 3 4 4; another number is spread over the stages in the same proportion."""
    ends = [round(layers * part / 20) for part in (0, 2, 4, 6, 9, 12, 16, 20)]
    widths = [dim // share for share, a, b in zip((8, 4, 4, 2, 2, 1, 1), ends, ends[1:]) for _ in range(b - a)]
    return [Net1DEntry(dim, causal)] + [Net1DBlock(a, b, causal, i == 0) for i, (a, b) in enumerate(zip([dim // 8] + widths, widths))]


# ---------------------------------------------------------------------------------------------------------------------
# Ribeiro's ResNet, on the raw signal

def same(x, kernel, stride):
    """Zero padding of x (B, C, T) so that a convolution gives ceil(T / stride)."""
    T = x.shape[2]
    total = max(0, (-(-T // stride) - 1) * stride + kernel - T)
    left = min(total, (kernel - stride + 1) // 2)
    return F.pad(x, (left, total - left))


class ResNetStem(nn.Module):
    """Convolution of 17 taps on the raw signal, BatchNorm, ReLU: (B, leads, T) -> (B, T, width of the first block)."""

    def __init__(self, leads, width):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(leads, width, 17, bias=False), nn.BatchNorm1d(width)

    def forward(self, batch, keep=None):
        return F.relu(self.norm(self.conv(same(batch['x'], 17, 1)))).transpose(1, 2), None


class Activate(nn.Module):
    """drop(relu(BatchNorm(x))) of x (B, L, C)."""

    def __init__(self, width, dropout):
        super().__init__()
        self.norm, self.p = nn.BatchNorm1d(width), dropout

    def forward(self, x):
        return F.dropout(F.relu(self.norm(x.transpose(1, 2))), self.p, self.training).transpose(1, 2)


class ResNetBlock(nn.Module):
    """Pre-activation block of Ribeiro et al. 2020 (Nature Communications 11:1760), kernel 17: two convolutions, the second with the
    stride; the skip takes maxima over the stride, then a 1x1 convolution where the width changes. x (B, L, C) -> (B, ceil(L / stride), F)."""

    path = 0.

    def __init__(self, inside, outside, stride, dropout, first):
        super().__init__()
        self.stride = stride
        self.enter = nn.Identity() if first else Activate(inside, dropout)
        self.conv1, self.conv2 = nn.Conv1d(inside, outside, 17, bias=False), nn.Conv1d(outside, outside, 17, stride, bias=False)
        self.middle = Activate(outside, dropout)
        self.skip = nn.Conv1d(inside, outside, 1, bias=False) if inside != outside else nn.Identity()

    def forward(self, x, pad=None):
        h = self.conv1(same(self.enter(x).transpose(1, 2), 17, 1)).transpose(1, 2)
        branch = self.conv2(same(self.middle(h).transpose(1, 2), 17, self.stride))           # (B, F, L / stride)
        skip = self.skip(F.max_pool1d(x.transpose(1, 2), self.stride, ceil_mode=True))
        return (skip + drop_path(branch, self.path, self.training)).transpose(1, 2), branch.transpose(1, 2)


def resnet(dim, layers, dropout):
    """Blocks of widths D i / layers; the second to the fifth divide the length by 4."""
    widths = [round(dim * i / layers) for i in range(1, layers + 1)]
    strides = [4 if 0 < i < 5 else 1 for i in range(layers)]
    return [ResNetBlock(a, b, s, dropout, i == 0) for i, (a, b, s) in enumerate(zip(widths[:1] + widths, widths, strides))]


# ---------------------------------------------------------------------------------------------------------------------
# beats as tokens (HeartLang, 2502.10707), patches as tokens (MTECG, 2309.07136)

def cut_beats(x, peaks, length):
    """Beats (B, C, P, length) around R-peaks (B, P), ascending, -1 where none. Each runs from midway to the peak before to midway to
    the next, half a length at most to either side, with the peak at length // 2 and zeros where the beat does not reach."""
    B, C, T = x.shape
    half, there = length // 2, peaks >= 0
    after = torch.cat([peaks[:, 1:], peaks.new_full((B, 1), -1)], 1)
    right = torch.where(after >= 0, (peaks + after) // 2, T)     # midway, or the end
    left = torch.cat([peaks.new_zeros(B, 1), right[:, :-1]], 1)
    at = peaks[..., None] - half + torch.arange(length, device=x.device)                     # (B, P, length)
    inside = there[..., None] & (at >= left[..., None].clamp(min=0)) & (at < right[..., None].clamp(max=T))
    flat = at.clamp(0, T - 1).flatten(1)[:, None].expand(-1, C, -1)
    return x.gather(2, flat).unflatten(2, at.shape[1:]) * inside[:, None]


class BeatStem(nn.Module):
    """One token per lead and heartbeat, lead by lead, after a CLS token: (B, leads, T) and R-peaks -> (B, 1 + leads P, dim).

    A beat of .96 s is embedded by a convolution over three neighbouring beats of its lead (HeartLang's runs on into the next lead, so
    there a record's tokens depend on the batch it comes in), then where (lead), when (second) and which (position) are added. Up to 21
    beats a record, the rest are left out (HeartLang leaves out trailing leads instead). keep (B, leads P) False: the beat is zeroed
    before the convolution mixes neighbours, and a learned vector stands for it. pad: where a record has fewer beats."""
    most = 21

    def __init__(self, leads, dim, fs, dropout):
        super().__init__()
        self.length, self.fs, self.p = round(.96 * fs), fs, dropout
        self.embed = nn.Conv1d(self.length, dim, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.embed.weight, nonlinearity='leaky_relu')
        self.hidden, self.first = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.randn(dim))
        self.lead, self.second, self.place = nn.Embedding(16, dim), nn.Embedding(16, dim), nn.Parameter(torch.randn(257, dim))

    def peaks(self, batch):
        """R-peaks (B, P) of the beats that become tokens, -1 where none; P is 1 at least."""
        if 'peaks' not in batch:
            raise ValueError('beat tokens need R-peaks')
        peaks = batch['peaks'][:, :self.most]
        return peaks if peaks.shape[1] else peaks.new_full((len(peaks), 1), -1)

    def beats(self, batch):
        """Beats (B, leads P, length) and pad (B, leads P), lead by lead; the contents of a padded one are zero."""
        peaks = self.peaks(batch)
        x = cut_beats(batch['x'], peaks, self.length)            # (B, leads, P, length)
        return x.flatten(1, 2), (peaks < 0).repeat(1, x.shape[1])

    def forward(self, batch, keep=None):
        (x, pad), peaks = self.beats(batch), self.peaks(batch)
        B, leads, P = len(x), batch['x'].shape[1], peaks.shape[1]
        if keep is not None:
            x = x * keep[..., None]
        z = self.embed(x.unflatten(1, (leads, P)).flatten(0, 1).transpose(1, 2))             # (B leads, D, P)
        z = z.transpose(1, 2).reshape(B, leads * P, -1)
        if keep is not None:
            z = torch.where(keep[..., None], z, self.hidden.to(z.dtype))
        lead, beat = torch.arange(leads, device=z.device).repeat_interleave(P), torch.arange(P, device=z.device).repeat(leads)
        when = (peaks.clamp(min=0) // round(self.fs) + 1).clamp(max=15).repeat(1, leads)
        z = z + self.lead(lead + 1) + self.second(when) + self.place[1 + lead * self.most + beat]
        z = torch.cat([(self.first + self.place[0]).to(z.dtype).expand(B, 1, -1), z], 1)
        return F.dropout(z, self.p, self.training), F.pad(pad, (1, 0))


class PatchStem(nn.Module):
    """Patches of 50 ms over all leads, linearly embedded, with learned positions, after a CLS token: (B, leads, T) -> (B, 1 + T / patch,
    dim). keep (B, L), the same count in every row: only these patches become tokens, (B, 1 + kept, dim). 10 s at most."""

    def __init__(self, leads, dim, fs):
        super().__init__()
        self.length = round(.05 * fs)
        self.embed, self.first = nn.Linear(leads * self.length, dim), nn.Parameter(torch.zeros(dim))
        self.place = nn.Parameter(nn.init.trunc_normal_(torch.empty(201, dim), std=.02))

    def patches(self, batch):
        """Patches (B, L, leads length), the last incomplete one left out."""
        x = batch['x']
        L = x.shape[2] // self.length
        if not 0 < L < len(self.place):
            raise ValueError(f'{x.shape[2]} samples make {L} patches; there is room for 1 to {len(self.place) - 1}')
        return x[..., :L * self.length].unflatten(2, (L, -1)).transpose(1, 2).flatten(2)

    def forward(self, batch, keep=None):
        p = self.patches(batch)
        z = self.embed(p) + self.place[1:p.shape[1] + 1]         # (B, L, D)
        if keep is not None:
            z = z[keep].view(len(z), -1, z.shape[2])
        return torch.cat([(self.first + self.place[0]).to(z.dtype).expand(len(z), 1, -1), z], 1), None


# ---------------------------------------------------------------------------------------------------------------------
# the encoder

@dataclass
class Config:
    """All that is needed to build an Encoder; it travels in the checkpoint."""
    backbone: str = 's4'
    dim: int = 64                                                # D
    layers: int = 4
    ffn: int = 120                                               # of attention backbones, as is the next
    heads: int = 4
    state: int = 8                                               # N of S4
    causal: bool = True
    dropout: float = .2
    leads: int = 12
    fs: float = 240                                              # Hz of the input


def sized(backbone, size, causal=False, fs=240, layers=None):
    """The Config of a backbone at a named size. Exits with one line where the backbone has no such size."""
    if size not in SIZES[backbone]:
        raise SystemExit(f'{backbone} has no size {size}: take one of {", ".join(SIZES[backbone])}')
    dim, depth, ffn, heads = SIZES[backbone][size]
    return Config(backbone, dim, layers or depth, ffn, heads, causal=causal, dropout=DROPOUT[backbone], fs=fs)


class Encoder(nn.Module):
    """Stem and backbone: tokens(batch, keep=None) -> z (B, L, D), pad; backbone(z, pad) -> h (B, L, D); encoder(batch) -> h, pad.
    Attributes: dim, causal, tokens_per_second (None for beats).

    batch: a dict with x (B, leads, T) in mV and, for beats, peaks (B, P). pad (B, L) is True where a token stands for nothing, None where
    every token counts. keep (B, L): what beat and patch stems may see. `layers`: a list to which the backbone appends each block's
    (branch before the residual sum, output).
    """

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        self.dim, self.causal = c.dim, c.causal
        attention = lambda **how: [TransformerBlock(c.dim, c.ffn, c.heads, c.causal, c.dropout, **how) for _ in range(c.layers)]
        if c.backbone in ('s4', 's4d'):
            blocks = [S4Block(c.dim, c.state, c.causal, c.dropout, S4 if c.backbone == 's4' else S4D) for _ in range(c.layers)]
            stem, rate, norm = Stem(c.leads, c.dim), c.fs / 2, nn.Identity()
        elif c.backbone == 'transformer':
            blocks = attention()
            stem, rate, norm = Stem(c.leads, c.dim), c.fs / 2, nn.LayerNorm(c.dim)
        elif c.backbone == 'net1d':
            blocks = net1d(c.dim, c.layers, c.causal)
            stem, rate, norm = Stem(c.leads, c.dim), c.fs / 2, nn.Identity()
        elif c.backbone == 'resnet':
            blocks = resnet(c.dim, c.layers, c.dropout)
            stem, rate, norm = ResNetStem(c.leads, blocks[0].conv1.in_channels), c.fs / 4 ** (min(c.layers, 5) - 1), Activate(c.dim, c.dropout)
        elif c.backbone == 'beat':
            blocks = attention(rotary=False, head=64, bias=False)
            stem, rate, norm = BeatStem(c.leads, c.dim, c.fs, c.dropout), None, nn.LayerNorm(c.dim)
        elif c.backbone == 'vit':
            blocks = attention(rotary=False)
            stem, rate, norm = PatchStem(c.leads, c.dim, c.fs), c.fs / round(.05 * c.fs), nn.LayerNorm(c.dim)
        else:
            raise KeyError(c.backbone)
        self.stem, self.tokens_per_second, self.blocks, self.norm = stem, rate, nn.ModuleList(blocks), norm

    def tokens(self, batch, keep=None):
        return self.stem(batch, keep)

    def backbone(self, z, pad=None, layers=None):
        for block in self.blocks:
            z, branch = block(z, pad)
            if layers is not None:
                layers.append((branch, z))
        return self.norm(z)

    def forward(self, batch):
        z, pad = self.tokens(batch)
        return self.backbone(z, pad), pad


@torch.no_grad()
def see_data(encoder, batches):
    """Give a fresh encoder's BatchNorm the mean and variance of `batches`, and nothing else: what "random encoder" means here."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm1d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None                                        # average over all batches seen
    encoder.train()
    for batch in batches:
        encoder(batch)
    for m in norms:
        m.momentum = .1
    return encoder.eval()


def regularise(encoder, path=None, dropout=None):
    """Set an encoder's stochastic depth, which grows linearly from 0 at the first residual block to `path` at the last, and its dropout;
    None leaves what is there."""
    if path is not None:
        blocks = [b for b in encoder.blocks if hasattr(b, 'path')]
        for i, block in enumerate(blocks):
            block.path = path * i / max(1, len(blocks) - 1)
    if dropout is not None:
        for m in encoder.modules():
            if hasattr(m, 'p'):
                m.p = dropout


# ---------------------------------------------------------------------------------------------------------------------
# heads: (B, L, D) -> (B, K)

def pool(h, pad=None):
    """Mean over the tokens that count: (B, L, D) -> (B, D)."""
    h = h.float()                                                # a mean in bf16 would lose what sets records apart
    if pad is None:
        return h.mean(1)
    count = (~pad)[..., None].to(h)
    return (h * count).sum(1) / count.sum(1).clamp(min=1)


class MeanPool(nn.Module):
    """Mean over tokens, then a linear map: the head of linear probing, fine-tuning and training from scratch."""

    def __init__(self, dim, classes, dropout=0.):
        super().__init__()
        self.out, self.p = nn.Linear(dim, classes), dropout

    def forward(self, h, pad=None):
        return self.out(F.dropout(pool(h, pad), self.p, self.training))


class AttentionPool(nn.Module):
    """A learned query attends over the tokens, 16 heads (or the most that divide D), no biases: the head of frozen evaluation.

    The query is the same for all records, so it is folded into the key map, and tokens are pooled before the value map: the
    same result without a (B, L, D) key or value."""

    def __init__(self, dim, classes, heads=16):
        super().__init__()
        self.heads, self.query = math.gcd(heads, dim), nn.Parameter(torch.randn(dim) / dim ** .5)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, classes, bias=False)

    def forward(self, h, pad=None):
        D, size = h.shape[2], h.shape[2] // self.heads
        query = torch.einsum('hs,hsd->hd', self.q(self.query).view(-1, size), self.k.weight.view(-1, size, D)) / size ** .5
        score = h @ query.T                                      # (B, L, heads)
        if pad is not None:
            score = score.masked_fill(pad[..., None], -math.inf)
        pooled = score.softmax(1).transpose(1, 2) @ h            # (B, heads, D)
        return self.out(torch.einsum('bhd,hsd->bhs', pooled, self.v.weight.view(-1, size, D)).flatten(1))


# ---------------------------------------------------------------------------------------------------------------------
# device, precision, schedule, checkpoints

def pick_device(name=None):
    """The device asked for, else CUDA where there is one, else the CPU. Exits with one line where it cannot be had."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name) if name else device
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        way_out = 'leave --device out, or take cpu' if name else 'take --device cpu'
        raise SystemExit(f'device {name or device} cannot be used here ({str(e).splitlines()[0]}): {way_out}')
    return device


def now(device):
    """The clock in s, read once the device has done what it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work, device):
    """How long work() takes on the device."""
    began = now(device)
    work()
    return now(device) - began


def keep_heap():
    """Have glibc keep freed memory, large blocks too, for the next step rather than return it to the system, which would hand it back page by
    page: 6 % of a training step on a CPU. Does nothing elsewhere."""
    if mallopt := getattr(ctypes.CDLL(None) if sys.platform == 'linux' else None, 'mallopt', None):
        mallopt(-4, 0)                                           # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)                                          # M_TRIM_THRESHOLD: never shrink


def precision(device):
    """Autocast context: bfloat16 products on CUDA (FFTs stay fp32), plain fp32 on the CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda')


def learning_rate(step, steps, peak, schedule='cosine', warmup=.05):
    """Linear warm-up over a fraction of the run, then cosine to zero or constant."""
    rise = min(1., (step + 1) / max(1, warmup * steps))
    if schedule == 'constant':
        return peak * rise
    through = max(0., (step - warmup * steps) / max(1, steps - warmup * steps))
    return peak * rise * .5 * (1 + math.cos(math.pi * min(1., through)))


def groups(module, peak, weight_decay=1e-3):
    """Optimiser groups of what learns in a module, each with its peak rate. Dynamics of S4D take 1e-3 at most and no weight decay."""
    learned = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    dynamics = [p for n, p in learned if n.endswith(('.log_step', '.a', '.w'))]
    rest = [p for n, p in learned if not n.endswith(('.log_step', '.a', '.w'))]
    both = (dict(params=rest, peak=peak, weight_decay=weight_decay), dict(params=dynamics, peak=min(peak, 1e-3), weight_decay=0.))
    return [g for g in both if g['params']]


def parameters(module):
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def to_device(batch, device):
    """A batch on the device; to a GPU without waiting for it."""
    if torch.device(device).type == 'cuda':
        return {k: v if v.is_cuda else v.pin_memory().to(device, non_blocking=True) for k, v in batch.items()}
    return {k: v.to(device) for k, v in batch.items()}


def save(path, checkpoint):
    """Write a checkpoint under a temporary name and rename it: there is never half a checkpoint at `path`. Exits with one line where the disk
    refuses."""
    path = Path(path)
    temporary = path.with_name(path.name + '.partial')
    try:
        with open(temporary, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as e:
        temporary.unlink(missing_ok=True)
        if isinstance(e, RuntimeError) and 'inline_container' not in str(e):                 # torch's writer, cut short, says so
            raise
        why = getattr(e, 'strerror', None) or 'is the disk full?'
        raise SystemExit(f'{path} cannot be written ({why}): make room; the one saved before, if any, is intact')


def load(path, device='cpu'):
    """Read a checkpoint, tensors and plain values only. Raises ValueError with what to do where it is missing or damaged."""
    if not Path(path).is_file():
        raise ValueError(f'no checkpoint at {path}: train one with python train.py --out {Path(path).parent}')
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:                                       # torch raises many kinds for a damaged or foreign file
        raise ValueError(f'{path} cannot be read as a checkpoint ({type(e).__name__}): train again, or take another one') from e


def load_encoder(checkpoint):
    """The pretrained encoder of a checkpoint, in eval mode. Strict: a missing or surplus tensor is an error."""
    encoder = Encoder(Config(**checkpoint['config']))
    encoder.load_state_dict(checkpoint['encoder'], strict=True)
    return encoder.eval()


def flops(work, fft=False):
    """FLOPs of work()'s matrix products and convolutions, two a multiply-accumulate, as torch counts them: attention under the kernel that it
    can count, and products in place, which it overlooks, too. fft: add real FFTs, 5/2 n log2 n each. What is done element by element is
    left out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    overlooked = {torch.ops.aten.baddbmm_: lambda total, a, b, out_shape=None, **how: 2 * math.prod(a) * b[2]}
    if fft:                                                      # shape: of what is real, of all transforms side by side
        real = lambda shape, n: round(math.prod(shape[:-1]) * 5 / 2 * n * math.log2(n))
        overlooked[torch.ops.aten._fft_r2c] = lambda x, *rest, out_shape=None, **how: real(x, x[-1])
        overlooked[torch.ops.aten._fft_c2r] = lambda x, dim, norm, n, out_shape=None, **how: real(x, n)
    with FlopCounterMode(display=False, custom_mapping=overlooked) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def measure(encoder):
    """What an encoder costs and sees, on records of 10 s: forward MACs per record, tokens, milliseconds of a training step per record,
    receptive field as text. MACs are matrix products and convolutions as torch counts them; FFTs and what is done element by element are
    left out."""
    fs, T = encoder.config.fs, round(10 * encoder.config.fs)
    x = torch.randn(4, encoder.config.leads, T)
    peaks = torch.arange(round(fs), T - round(fs), round(.8 * fs)).repeat(4, 1)              # 75 beats a minute
    encoder.eval()
    with torch.no_grad():
        count = flops(lambda: encoder(dict(x=x[:1], peaks=peaks[:1])))
    one = x[:1].clone().requires_grad_()
    h, _ = encoder(dict(x=one, peaks=peaks[:1]))
    h[0, h.shape[1] // 2].square().sum().backward()
    seen = torch.nonzero(one.grad[0].abs().amax(0) > 0)[:, 0] - T * (h.shape[1] // 2) / h.shape[1]
    past, future = max(0, -seen[0].item()) / fs, max(0, seen[-1].item()) / fs
    wide = lambda s: 'all' if s > 4.5 else f'{1e3 * s:.0f} ms'
    field = 'by attention, all' if encoder.config.backbone == 'beat' else f'{wide(past)} back, {wide(future)} ahead'
    encoder.train()
    times = [seconds(lambda: pool(*encoder(dict(x=x, peaks=peaks))).square().sum().backward(), x.device) for _ in range(4)]
    return count / 2, h.shape[1], 1e3 * min(times[1:]) / 4, field


def time_convolutions(path, lengths=(75, 300, 1200, 7200), dim=512, tokens=9600, repeats=7):
    """Every way to convolve, forward and backward, measured in turn, medians; and its error, largest difference from float64 over the largest
    value. `tokens` in all: 32 crops of 300. Printed, and written to `path`."""
    device, rows, half = pick_device(), [], torch.Tensor.bfloat16
    print(f'{dim} channels, {device}, {torch.get_num_threads()} threads: milliseconds forward and backward, largest error')

    def both(way, u):
        y = way(u.detach().requires_grad_())
        y.backward(torch.ones_like(y))

    for L, causal in itertools.product(lengths, (True, False)):
        torch.manual_seed(0)
        s4, u = S4(dim, causal=causal).to(device), torch.randn(dim, max(1, tokens // L), L, device=device)
        exact = convolve(u[:8].double(), s4.double().kernel(L)[:, :8]).detach()
        s4.float()
        parts = s4.dynamics(s4.chunk_parts)
        ways = {'fft': lambda u: convolve(u, s4.kernel(L)),
                'chunks': lambda u: convolve_chunks(u, s4.C, parts),
                'chunks bf16': lambda u: convolve_chunks(half(u), half(s4.C), [half(part) for part in parts])}
        if L <= 300 or device.type == 'cuda' and L <= 1200:      # beyond that the (L, L) matrices take gigabytes
            ways['toeplitz'] = lambda u: convolve_toeplitz(u, s4.kernel(L))
            ways['toeplitz bf16'] = lambda u: convolve_toeplitz(half(u), s4.kernel(L))
        times = [[seconds(lambda: both(way, u), device) for way in ways.values()] for _ in range(repeats + 2)][2:]
        found = []
        for (name, way), each in zip(ways.items(), zip(*times)):
            error = ((way(u)[:8].detach() - exact).abs().max() / exact.abs().max()).item()
            found.append(dict(device=str(device), tokens=L, causal=causal, way=name, ms=round(1e3 * statistics.median(each), 2), error=f'{error:.1e}'))
        print(f'{L:6d} tokens, {"causal" if causal else "bidirectional":13s}  '
              + ', '.join(f'{r["way"]} {r["ms"]:.1f} ms {r["error"]}' for r in found), flush=True)
        rows += found
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(path)


def print_encoders(size):
    """A line for every encoder of that size, both ways where it can be causal: what `measure` finds."""
    print('backbone     D x layers     stem    backbone    together     MMAC  tokens     step  receptive field of a token')
    print('MACs, tokens and time of one training step (forward, backward) are per record of 10 s')
    for backbone in [b for b, sizes in SIZES.items() if size in sizes]:
        for causal in (True, False) if backbone in ('s4', 's4d', 'transformer', 'net1d') else (False,):
            torch.manual_seed(0)
            e = Encoder(sized(backbone, size, causal))
            macs, tokens, ms, field = measure(e)
            stem, both = parameters(e.stem), parameters(e)
            print(f'{backbone:12s} {e.dim:5d} x {e.config.layers:2d} {stem:8,d} {both - stem:11,d} {both:11,d} {macs / 1e6:8.1f} {tokens:7,d} '
                  f'{ms:5.1f} ms  {field}{", causal" if causal else ""}', flush=True)


def draw_s4(path):
    """Basis and kernels of three S4 channels, whose time scales lie a factor of 7 apart."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    torch.manual_seed(0)
    layer = S4(8)
    layer.log_dt.copy_(torch.linspace(math.log(1e-3), math.log(1e-1), 8))
    basis, k = layer.basis(300)[0], layer.kernel(300)[0].detach()                            # (H, N, L), (H, L)
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout='constrained')
    for h in (1, 4, 7):
        axes[0].plot(basis[h].T, lw=.8, color=f'C{h}')
        axes[1].plot(k[h] / k[h].abs().max(), color=f'C{h}', label=f'dt {layer.log_dt[h].exp():.3f}')
    axes[0].set(title='basis: 8 filters per channel, three time scales', xlabel='lag in tokens (8.3 ms)')
    axes[1].set(title='kernels: random mixes of them, scaled', xlabel='lag in tokens (8.3 ms)')
    axes[1].legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    print(path)


def main():
    """The command line: see the top of the file."""
    keep_heap()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', default='tiny', help='tiny, small, base or released; or a rung of a ladder, such as 5x320 (resnet) or 6x512 (beat)')
    p.add_argument('--convolutions', action='store_true', help='time the ways to convolve on this device; out/convolutions.csv')
    p.add_argument('--out', default='out/s4.png', help='where the figure goes')
    a = p.parse_args()
    if a.convolutions:
        return time_convolutions('out/convolutions.csv')
    if not any(a.size in sizes for sizes in SIZES.values()):
        raise SystemExit(f'no backbone has size {a.size}: take ' + ', '.join(dict.fromkeys(s for sizes in SIZES.values() for s in sizes)))
    print_encoders(a.size)
    draw_s4(a.out)


if __name__ == '__main__':
    main()
