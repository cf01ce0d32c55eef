"""Encoders, one shape for all: x (B, 12, T) -> stem -> tokens (B, L, D) -> backbone -> (B, L, D).

    python models.py                       # a line for every encoder: parameters and tokens
    python models.py --size base

A CNN stem with an S4, S4D, Transformer or Net1D backbone (arXiv 2605.12241), Ribeiro's ResNet and
heartbeats as tokens (2605.17276), patches as tokens (2309.07136). Then heads, and what every script
needs: device, precision, learning rate, checkpoints.
"""
import argparse
import math
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# backbone -> size -> (width D, layers, width of the FFN, attention heads). At tiny, small and base,
# the number of parameters is within 7 % of that of s4. released: the size in the papers' code
SIZES = {
    's4': {'tiny': (64, 4, 0, 0), 'small': (256, 4, 0, 0), 'base': (512, 4, 0, 0),
           'released': (512, 4, 0, 0)},
    's4d': {'tiny': (64, 4, 0, 0), 'small': (256, 4, 0, 0), 'base': (512, 4, 0, 0)},
    'transformer': {'tiny': (32, 4, 120, 2), 'small': (128, 4, 420, 4), 'base': (256, 4, 824, 4),
                    'released': (512, 6, 2048, 8)},
    'net1d': {'tiny': (32, 8, 0, 0), 'small': (128, 14, 0, 0), 'base': (256, 20, 0, 0),
              'released': (512, 20, 0, 0)},
    'resnet': {'tiny': (34, 3, 0, 0), 'small': (116, 4, 0, 0), 'base': (210, 5, 0, 0),
               'released': (320, 5, 0, 0)},
    'beat': {'tiny': (32, 1, 160, 1), 'small': (128, 2, 704, 4), 'base': (256, 3, 1240, 4),
             'released': (768, 12, 1024, 8)},
    'vit': {'tiny': (32, 4, 96, 2), 'small': (128, 4, 428, 4), 'base': (256, 4, 880, 4),
            'released': (192, 12, 768, 3)}}
# ladders for scaling laws, named layers x width: resnet and beat from 2605.17276 (Table S.4), the
# others our own, three times as many parameters from step to step
LADDERS = {
    'resnet': '3x24 3x48 4x64 4x90 4x128 5x226 5x320 6x452 6x640 7x1024',
    'beat': '1x24:1 1x48:2 1x96:2 2x128:4 3x192:4 3x256:4 4x348:4 5x420:8 6x512:8 8x768:8',
    's4': '4x12 4x24 4x48 4x88 4x160 4x288 4x512 4x928',
    'transformer': '4x8:1 4x14:1 4x24:2 4x44:2 4x80:4 4x144:4 4x256:4 4x464:8'}
for backbone, ladder in LADDERS.items():
    for rung in ladder.split():                                   # layers x width : heads
        name, _, heads = rung.partition(':')
        layers, dim = map(int, name.split('x'))
        SIZES[backbone][name] = dim, layers, 4 * dim if heads else 0, int(heads or 0)
DROPOUT = {'s4': .2, 's4d': .2, 'transformer': .1, 'net1d': 0., 'resnet': .2, 'beat': .1, 'vit': 0.}


def tied_dropout(x, p, training):
    """Dropout of whole channels of x (B, L, D): one decision per record and channel, for all
    tokens."""
    return F.dropout1d(x.transpose(1, 2), p, training).transpose(1, 2)


def drop_path(branch, p, training):
    """Stochastic depth (Huang et al. 2016, 1603.09382): a residual branch (B, ...) is left out with
    probability p, record by record, and scaled by 1 / (1 - p) where it stays."""
    if not training or not p:
        return branch
    return branch * F.dropout(branch.new_ones(len(branch), *[1] * (branch.dim() - 1)), p)


class Stem(nn.Sequential):
    """Four convolutions with BatchNorm and ReLU, kernels 3 1 1 1, the first with stride 2:
    (B, leads, T) -> (B, ceil(T / 2), dim). A token sees 3 samples. Mixing over longer times is left
    to the backbone. 808,960 parameters for 12 leads and dim 512."""

    def __init__(self, leads, dim):
        first = nn.Conv1d(leads, dim, 3, stride=2, padding=1, bias=False)
        layers = [first, nn.BatchNorm1d(dim), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv1d(dim, dim, 1, bias=False), nn.BatchNorm1d(dim), nn.ReLU()]
        super().__init__(*layers)

    def forward(self, batch, keep=None):
        z = super().forward(batch['x']).transpose(1, 2)                           # (B, L, dim)
        return z.contiguous(), None        # one memory layout for all blocks, so each compiles once


# -------------------------------------------------------------------------------------------------
# S4: a long convolution per channel

def legs(state):
    """HiPPO-LegS matrices A (N, N), B (N,) in float64; the eigenvalues of A are -1 ... -N
    (Gu et al. 2020, 2008.07669)."""
    n = torch.arange(state, dtype=torch.float64)
    B = (2 * n + 1).sqrt()
    A = -torch.tril(torch.outer(B, B), -1) - torch.diag(n + 1)
    return A, B


def discretise(log_dt, state):
    """Bilinear rule, one step size per channel: Abar (H, N, N), Bbar (H, N) in float64."""
    A, B = (t.to(log_dt.device) for t in legs(state))
    dt, I = log_dt.double().exp()[:, None, None], torch.eye(state).to(A)
    Abar = torch.linalg.solve(I - dt / 2 * A, I + dt / 2 * A)
    Bbar = torch.linalg.solve(I - dt / 2 * A, dt * B[:, None])[..., 0]
    return Abar, Bbar


class FFTConv(torch.autograd.Function):
    """u (H, B, L) convolved with a kernel (H, 2 L) around a circle, cut to L. The backward pass is
    written out: autograd would take complex FFTs, which are twice the work."""

    @staticmethod
    def forward(ctx, u, kernel):
        U = torch.fft.rfft(u, n=kernel.shape[1])
        K = torch.fft.rfft(kernel)
        ctx.save_for_backward(U, K)
        return torch.fft.irfft(U * K[:, None], n=kernel.shape[1])[..., :u.shape[2]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        U, K = ctx.saved_tensors
        L = gradient.shape[2]
        G = torch.fft.rfft(gradient, n=2 * L)
        du = torch.fft.irfft(G * K.conj()[:, None], n=2 * L)[..., :L]
        return du, torch.fft.irfft((G * U.conj()).sum(1), n=2 * L)


def fft_conv(u, kernel):
    """`long_conv` by FFT, in fp32 or better: a product of bf16 spectra would be too coarse."""
    L = u.shape[2]
    circle = F.pad(kernel, (0, 1)).roll(1 - L, 1)      # lag 0 first, and room for what wraps around
    return FFTConv.apply(u.to(kernel), circle)


def toeplitz_conv(u, kernel):
    """`long_conv` as one (L, L) matrix product per channel, in bf16 under autocast. L^2 work, but
    all of it is what a GPU does fastest."""
    lags = kernel.unfold(1, u.shape[2], 1).flip(1)     # (H, L, L): row i, column j holds lag j - i
    return u @ lags


def long_conv(u, kernel):
    """y_t = sum_j kernel_j u_{t-j}, one kernel per channel. u and y are (H, B, L), the kernel is
    (H, 2 L - 1) over the lags j = -(L - 1) ... L - 1."""
    if u.is_cuda and u.shape[2] <= 1024:
        return toeplitz_conv(u, kernel)
    return fft_conv(u, kernel)


class LongConv(nn.Module):
    """u -> k * u + D u, both (H, B, L). A subclass has D (H,) and kernel(L) -> k (1 or 2, H, L):
    k0 looks back, y_t = sum_j k0_j u_{t-j}; k1, where there is one, looks ahead and adds
    sum_j k1_j u_{t+1+j}, shifted by one so that lag 0 counts once."""

    @torch.compiler.disable                            # complex numbers and the cache break graphs
    def forward(self, u):
        L = u.shape[2]
        with torch.autocast(u.device.type, enabled=False):
            k = self.kernel(L)
            past = k[0] + F.pad(self.D[:, None], (0, L - 1))                      # D u is lag 0
            ahead = k[1, :, :-1].flip(1) if len(k) == 2 else torch.zeros_like(past[:, 1:])
            kernel = torch.cat([ahead, past], 1)                                  # (H, 2 L - 1)
        return long_conv(u, kernel)


class S4(LongConv):
    """The S4 of arXiv 2605.12241's code: HiPPO-LegS dynamics A, B, dt stay as drawn, only C and D
    learn. The kernel k_l = sum_n C_n (Abar^l Bbar)_n is linear in C, so each channel mixes `state`
    decaying filters at a time scale of its own."""

    def __init__(self, dim, state=8, causal=True):
        super().__init__()
        log_dt = torch.empty(dim).uniform_(math.log(1e-3), math.log(1e-1))
        self.register_buffer('log_dt', log_dt)
        self.C = nn.Parameter(torch.randn(1 if causal else 2, dim, state))
        self.D = nn.Parameter(torch.randn(dim))
        self.cache = None, None, None                  # (log_dt, key, basis)

    def basis(self, L):
        """(Abar^l Bbar) for l = 0 ... L - 1: (H, N, L), computed in float64. Kept for the next
        call, since it does not learn."""
        key = L, self.log_dt._version, self.C.dtype, self.C.device
        if self.cache[0] is not self.log_dt or self.cache[1] != key:
            Abar, Bbar = discretise(self.log_dt, self.C.shape[2])
            steps = [Bbar]
            while len(steps) < L:
                steps.append((Abar @ steps[-1][..., None])[..., 0])
            self.cache = self.log_dt, key, torch.stack(steps, -1).to(self.C)
        return self.cache[2]

    def kernel(self, L):
        """Kernels (1 or 2, H, L) over the lags 0 ... L - 1."""
        return torch.einsum('chn,hnl->chl', self.C, self.basis(L))


class S4D(LongConv):
    """Diagonal state space whose dynamics learn too: S4D-Lin (Gu et al. 2022, 2206.11893) with
    `state` / 2 complex modes per channel, A = -exp(a) + i w, B = 1, zero-order hold:
    k_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l). log_step, a and w want a small
    learning rate and no weight decay: see `parameter_groups`."""

    def __init__(self, dim, state=8, causal=True):
        super().__init__()
        self.log_step = nn.Parameter(torch.empty(dim).uniform_(math.log(1e-3), math.log(1e-1)))
        self.a = nn.Parameter(torch.full((dim, state // 2), math.log(.5)))
        self.w = nn.Parameter(math.pi * torch.arange(state // 2.).repeat(dim, 1))
        C = torch.randn(1 if causal else 2, dim, state // 2, 2) / 2 ** .5         # E|C|^2 = 1
        self.C = nn.Parameter(C)
        self.D = nn.Parameter(torch.randn(dim))

    def kernel(self, L):
        """Kernels (1 or 2, H, L) over the lags 0 ... L - 1."""
        A = torch.complex(-self.a.exp(), self.w)                                  # (H, N / 2)
        step = A * self.log_step.exp()[:, None]
        C = torch.view_as_complex(self.C) * torch.expm1(step) / A
        powers = (step[..., None] * torch.arange(L, device=step.device)).exp()    # (H, N / 2, L)
        return 2 * torch.einsum('chn,hnl->chl', C, powers).real


class Block(nn.Module):
    """A residual block: forward(x (B, L, D), pad) -> output, branch. The branch is what is added to
    x; data2vec predicts it. drop_path_rate: see `drop_path`."""
    drop_path_rate = 0.

    def add(self, x, branch):
        return x + drop_path(branch, self.drop_path_rate, self.training)


class S4Block(Block):
    """Post-norm: LayerNorm(x + drop(GLU(W drop(gelu(k * x + D x)) + b))), k * x by S4 or S4D."""

    def __init__(self, dim, state, causal, dropout, kind=S4):
        super().__init__()
        self.s4 = kind(dim, state, causal)
        self.out = nn.Linear(dim, 2 * dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(self, x, pad=None):
        u = x.flatten(0, 1).t().contiguous().unflatten(1, x.shape[:2])            # (H, B, L)
        y = F.gelu(self.s4(u)).permute(1, 2, 0)                                   # (B, L, H)
        branch = F.glu(self.out(tied_dropout(y, self.dropout, self.training)))
        return self.norm(self.add(x, tied_dropout(branch, self.dropout, self.training))), branch


# -------------------------------------------------------------------------------------------------
# Transformer

def rotate(x):
    """Rotary position embedding (Su et al. 2021, 2104.09864), base 10000: x (B, heads, L, size)."""
    L, half = x.shape[2], x.shape[3] // 2
    rate = 10000. ** (-torch.arange(half, device=x.device) / half)
    angle = torch.outer(torch.arange(L, device=x.device), rate)
    a, b, cos, sin = x[..., :half], x[..., half:], angle.cos().to(x), angle.sin().to(x)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class TransformerBlock(Block):
    """Pre-norm, GELU: x + drop(attention(norm x)), then x + drop(ffn(norm x)); the branch is the
    second one. 2605.12241 has rotary positions; beats and patches have learned ones, and beats
    heads of 64 and no bias in q, k, v. No dropout on the attention weights (the papers' code has
    it): the fast attention kernel on a CPU has none, and the slow one takes four times as long."""

    def __init__(self, dim, ffn, heads, causal=False, dropout=.1, rotary=True, head=None,
                 bias=True):
        super().__init__()
        self.heads, self.causal, self.dropout, self.rotary = heads, causal, dropout, rotary
        inner = heads * (head or dim // heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, inner, bias) for _ in range(3))
        self.out = nn.Linear(inner, dim)
        self.up, self.down = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        for linear in (self.q, self.k, self.v, self.out, self.up, self.down):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def attention(self, x, pad=None):
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)   # (B, heads, L, size)
                   for layer in (self.q, self.k, self.v))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        mask = None if pad is None else ~pad[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x, pad=None):
        drop = lambda y: F.dropout(y, self.dropout, self.training)
        x = self.add(x, drop(self.attention(self.norm1(x), pad)))
        branch = self.down(drop(F.gelu(self.up(self.norm2(x)))))
        return self.add(x, drop(branch)), branch


# -------------------------------------------------------------------------------------------------
# Net1D, the CNN of ECGFounder, at stride 1

def pad16(x, causal):
    """x (B, C, L) padded for 16 taps: 15 tokens of the past, or 7 of the past and 8 ahead."""
    return F.pad(x, (15, 0) if causal else (7, 8))


class Net1DBlock(Block):
    """Bottleneck: 1x1, grouped convolution of 16 taps, 1x1, squeeze-and-excitation; the identity is
    padded with zero channels. As released it is not causal: 8 taps look ahead and the excitation
    pools over all time, so CPC would see its targets. Causal: pools over the tokens so far."""

    def __init__(self, inside, outside, causal, first):
        super().__init__()
        self.causal, self.first, self.grow = causal, first, outside - inside
        self.conv1, self.conv3 = nn.Conv1d(inside, outside, 1), nn.Conv1d(outside, outside, 1)
        self.conv2 = nn.Conv1d(outside, outside, 16, groups=max(1, outside // 16))
        self.squeeze = nn.Linear(outside, outside // 2)
        self.excite = nn.Linear(outside // 2, outside)

    def forward(self, x, pad=None):
        y = x.transpose(1, 2)                                                     # (B, C, L)
        h = self.conv1(y if self.first else F.silu(y))
        h = self.conv2(pad16(F.silu(h), self.causal))
        h = self.conv3(F.silu(h)).transpose(1, 2)                                 # (B, L, C)
        if self.causal:
            count = torch.arange(1, h.shape[1] + 1, device=h.device)[:, None]
            pooled = h.cumsum(1) / count
        else:
            pooled = h.mean(1, keepdim=True)
        branch = h * self.excite(F.silu(self.squeeze(pooled))).sigmoid()
        return self.add(F.pad(x, (self.grow // 2, self.grow - self.grow // 2)), branch), branch


class Net1DEntry(nn.Module):
    """First convolution of Net1D: D -> D / 8 channels, 16 taps, Swish."""

    def __init__(self, dim, causal):
        super().__init__()
        self.causal, self.conv = causal, nn.Conv1d(dim, dim // 8, 16)

    def forward(self, x, pad=None):
        y = F.silu(self.conv(pad16(x.transpose(1, 2), self.causal))).transpose(1, 2)
        return y, y


def net1d(dim, layers, causal):
    """Blocks of Net1D (Hong et al. 2020) as in arXiv 2605.12241: seven stages of widths D / 8 to D
    with 2 2 2 3 3 4 4 blocks; other numbers of layers keep the proportions."""
    ends = [round(layers * part / 20) for part in (0, 2, 4, 6, 9, 12, 16, 20)]
    shares = (8, 4, 4, 2, 2, 1, 1)
    widths = [dim // s for s, a, b in zip(shares, ends, ends[1:]) for _ in range(b - a)]
    inputs = [dim // 8] + widths[:-1]
    blocks = [Net1DBlock(a, b, causal, i == 0) for i, (a, b) in enumerate(zip(inputs, widths))]
    return [Net1DEntry(dim, causal)] + blocks


# -------------------------------------------------------------------------------------------------
# Ribeiro's ResNet, on the raw signal

def same(x, kernel, stride):
    """Zero padding of x (B, C, T) so that a convolution gives ceil(T / stride)."""
    T = x.shape[2]
    total = max(0, (-(-T // stride) - 1) * stride + kernel - T)
    left = min(total, (kernel - stride + 1) // 2)
    return F.pad(x, (left, total - left))


class ResNetStem(nn.Sequential):
    """Convolution of 17 taps, BatchNorm, ReLU: (B, leads, T) -> (B, T, width)."""

    def __init__(self, leads, width):
        conv = nn.Conv1d(leads, width, 17, padding=8, bias=False)
        super().__init__(conv, nn.BatchNorm1d(width), nn.ReLU())

    def forward(self, batch, keep=None):
        return super().forward(batch['x']).transpose(1, 2), None


class BatchNormReLU(nn.Module):
    """drop(relu(BatchNorm(x))) of x (B, L, C)."""

    def __init__(self, width, dropout):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(width), dropout

    def forward(self, x):
        y = F.relu(self.norm(x.transpose(1, 2)))
        return F.dropout(y, self.dropout, self.training).transpose(1, 2)


class ResNetBlock(Block):
    """Pre-activation block of Ribeiro et al. 2020 (Nature Communications 11:1760), kernel 17: two
    convolutions, the second with the stride; the skip takes maxima over the stride, then a 1x1
    convolution where the width changes. (B, L, C) -> (B, ceil(L / stride), F)."""

    def __init__(self, inside, outside, stride, dropout, first):
        super().__init__()
        self.stride = stride
        self.enter = nn.Identity() if first else BatchNormReLU(inside, dropout)
        self.conv1 = nn.Conv1d(inside, outside, 17, padding=8, bias=False)
        self.middle = BatchNormReLU(outside, dropout)
        self.conv2 = nn.Conv1d(outside, outside, 17, stride, bias=False)
        wider = inside != outside
        self.skip = nn.Conv1d(inside, outside, 1, bias=False) if wider else nn.Identity()

    def forward(self, x, pad=None):
        h = self.conv1(self.enter(x).transpose(1, 2)).transpose(1, 2)
        branch = self.conv2(same(self.middle(h).transpose(1, 2), 17, self.stride)).transpose(1, 2)
        skip = self.skip(F.max_pool1d(x.transpose(1, 2), self.stride, ceil_mode=True))
        return self.add(skip.transpose(1, 2), branch), branch


def resnet(dim, layers, dropout):
    """Blocks of widths D i / layers; the second to the fifth divide the length by 4."""
    widths = [round(dim * i / layers) for i in range(1, layers + 1)]
    strides = [4 if 0 < i < 5 else 1 for i in range(layers)]
    inputs = widths[:1] + widths
    return [ResNetBlock(a, b, s, dropout, i == 0)
            for i, (a, b, s) in enumerate(zip(inputs, widths, strides))]


# -------------------------------------------------------------------------------------------------
# beats as tokens (HeartLang, 2502.10707), patches as tokens (MTECG, 2309.07136)

def cut_beats(x, peaks, length):
    """Beats (B, C, P, length) around R-peaks (B, P), ascending, -1 where none. A beat reaches
    halfway to the peaks before and after it, `length` / 2 at most; zeros elsewhere, the peak in the
    middle."""
    B, C, T = x.shape
    after = torch.cat([peaks[:, 1:], peaks.new_full((B, 1), -1)], 1)
    right = torch.where(after >= 0, (peaks + after) // 2, T)                 # halfway, or the end
    left = torch.cat([peaks.new_zeros(B, 1), right[:, :-1]], 1)
    at = peaks[..., None] - length // 2 + torch.arange(length, device=x.device)   # (B, P, length)
    inside = (at >= left[..., None].clamp(min=0)) & (at < right[..., None].clamp(max=T))
    inside &= (peaks >= 0)[..., None]
    flat = at.clamp(0, T - 1).flatten(1)[:, None].expand(-1, C, -1)
    return x.gather(2, flat).unflatten(2, at.shape[1:]) * inside[:, None]


class BeatStem(nn.Module):
    """One token per lead and heartbeat, lead by lead, after a CLS token: (B, leads, T) and R-peaks
    -> (B, 1 + leads P, dim). A convolution over three neighbouring beats of a lead embeds a beat of
    .96 s; then where (lead), when (second) and which (position) are added. (HeartLang's convolution
    runs on into the next lead, so there a token depends on its batch.) 21 beats a record at most
    (HeartLang drops trailing leads instead). keep (B, leads P) False: the beat is zeroed before the
    convolution, and a learned vector stands for it. pad: where a record has fewer beats."""
    most = 21

    def __init__(self, leads, dim, fs, dropout):
        super().__init__()
        self.length, self.fs, self.dropout = round(.96 * fs), fs, dropout
        self.embed = nn.Conv1d(self.length, dim, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.embed.weight, nonlinearity='leaky_relu')
        self.mask_token, self.cls = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.randn(dim))
        self.lead, self.second = nn.Embedding(16, dim), nn.Embedding(16, dim)
        self.position = nn.Parameter(torch.randn(257, dim))

    def peaks(self, batch):
        """R-peaks (B, P) of the beats that become tokens, -1 where none; P is 1 at least."""
        if 'peaks' not in batch:
            raise ValueError('beat tokens need R-peaks')
        peaks = batch['peaks'][:, :self.most]
        return peaks if peaks.shape[1] else peaks.new_full((len(peaks), 1), -1)

    def beats(self, batch):
        """Beats (B, leads P, length), lead by lead, and pad (B, leads P)."""
        peaks = self.peaks(batch)
        x = cut_beats(batch['x'], peaks, self.length)                      # (B, leads, P, length)
        return x.flatten(1, 2), (peaks < 0).repeat(1, x.shape[1])

    def forward(self, batch, keep=None):
        (x, pad), peaks = self.beats(batch), self.peaks(batch)
        B, leads, P = len(x), batch['x'].shape[1], peaks.shape[1]
        if keep is not None:
            x = x * keep[..., None]
        x = x.unflatten(1, (leads, P)).flatten(0, 1).transpose(1, 2)        # (B leads, length, P)
        z = self.embed(x).transpose(1, 2).reshape(B, leads * P, -1)
        if keep is not None:
            z = torch.where(keep[..., None], z, self.mask_token.to(z.dtype))
        lead = torch.arange(leads, device=z.device).repeat_interleave(P)
        beat = torch.arange(P, device=z.device).repeat(leads)
        second = (peaks.clamp(min=0) // round(self.fs) + 1).clamp(max=15).repeat(1, leads)
        z = z + self.lead(lead + 1) + self.second(second)
        z = z + self.position[1 + lead * self.most + beat]
        cls = (self.cls + self.position[0]).to(z.dtype).expand(B, 1, -1)
        return F.dropout(torch.cat([cls, z], 1), self.dropout, self.training), F.pad(pad, (1, 0))


class PatchStem(nn.Module):
    """Patches of 50 ms over all leads, a linear map, learned positions, after a CLS token:
    (B, leads, T) -> (B, 1 + L, dim), at most 10 s. keep (B, n): indices 0 ... L - 1 of the patches
    that become tokens."""

    def __init__(self, leads, dim, fs):
        super().__init__()
        self.length = round(.05 * fs)
        self.embed, self.cls = nn.Linear(leads * self.length, dim), nn.Parameter(torch.zeros(dim))
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(201, dim), std=.02))

    def patches(self, batch):
        """Patches (B, L, leads length) without an incomplete last one. ValueError if L > 200."""
        x, L = batch['x'], batch['x'].shape[2] // self.length
        if not 0 < L < len(self.position):
            raise ValueError(f'{L} patches: there is room for 1 to {len(self.position) - 1}')
        return x[..., :L * self.length].unflatten(2, (L, -1)).transpose(1, 2).flatten(2)

    def forward(self, batch, keep=None):
        p = self.patches(batch)
        z = self.embed(p) + self.position[1:p.shape[1] + 1]                       # (B, L, D)
        if keep is not None:
            z = z.gather(1, keep[..., None].expand(-1, -1, z.shape[2]))
        cls = (self.cls + self.position[0]).to(z.dtype).expand(len(z), 1, -1)
        return torch.cat([cls, z], 1), None


# -------------------------------------------------------------------------------------------------
# the encoder

@dataclass
class Config:
    """All that is needed to build an Encoder; stored in every checkpoint."""
    backbone: str = 's4'
    dim: int = 64                                                 # D
    layers: int = 4
    ffn: int = 120                                                # FFN width of attention backbones
    heads: int = 4
    state: int = 8                                                # N of S4
    causal: bool = True
    dropout: float = .2
    leads: int = 12
    fs: float = 240                                               # Hz of the input


def config_of(backbone, size, causal=False, fs=240, layers=None):
    """The Config of a backbone at a named size."""
    if size not in SIZES[backbone]:
        raise SystemExit(f'{backbone} has no size {size}: take one of {", ".join(SIZES[backbone])}')
    dim, depth, ffn, heads = SIZES[backbone][size]
    return Config(backbone, dim, layers or depth, ffn, heads, causal=causal,
                  dropout=DROPOUT[backbone], fs=fs)


class Encoder(nn.Module):
    """encoder(batch) -> features h (B, L, D), pad. In two halves: tokens(batch) -> z (B, L, D), pad
    and backbone(z, pad) -> h.

    batch: a dict with x (B, leads, T) in mV and, for beats, peaks (B, P). pad (B, L): True where a
    token stands for nothing; None where every token counts. keep: what the beat and patch stems may
    see, as they say. layers: a list to which the backbone appends each block's (branch, output).
    window: length in s of the crops that it is trained on."""

    def __init__(self, config, window=2.5):
        super().__init__()
        c = config
        self.config, self.dim, self.causal, self.window = c, c.dim, c.causal, window
        self.norm = nn.Identity()

        def attention(**options):
            return [TransformerBlock(c.dim, c.ffn, c.heads, c.causal, c.dropout, **options)
                    for _ in range(c.layers)]

        if c.backbone in ('s4', 's4d', 'transformer', 'net1d'):
            self.stem = Stem(c.leads, c.dim)
            self.tokens_per_second = c.fs / 2
        if c.backbone in ('s4', 's4d'):
            kind = S4 if c.backbone == 's4' else S4D
            blocks = [S4Block(c.dim, c.state, c.causal, c.dropout, kind) for _ in range(c.layers)]
        elif c.backbone == 'transformer':
            blocks = attention()
            self.norm = nn.LayerNorm(c.dim)
        elif c.backbone == 'net1d':
            blocks = net1d(c.dim, c.layers, c.causal)
        elif c.backbone == 'resnet':
            blocks = resnet(c.dim, c.layers, c.dropout)
            self.stem = ResNetStem(c.leads, blocks[0].conv1.in_channels)
            self.norm = BatchNormReLU(c.dim, c.dropout)
            self.tokens_per_second = c.fs / 4 ** (min(c.layers, 5) - 1)
        elif c.backbone == 'beat':
            blocks = attention(rotary=False, head=64, bias=False)
            self.stem = BeatStem(c.leads, c.dim, c.fs, c.dropout)
            self.norm = nn.LayerNorm(c.dim)
            self.tokens_per_second = None                         # as many as the heart makes
        elif c.backbone == 'vit':
            blocks = attention(rotary=False)
            self.stem = PatchStem(c.leads, c.dim, c.fs)
            self.norm = nn.LayerNorm(c.dim)
            self.tokens_per_second = c.fs / self.stem.length
        self.blocks = nn.ModuleList(blocks)

    @property
    def samples(self):
        """Length of a crop in samples."""
        return round(self.window * self.config.fs)

    @property
    def device(self):
        """Where its weights are."""
        return next(self.parameters()).device

    def tokens(self, batch, keep=None):
        if isinstance(batch, torch.Tensor):
            raise TypeError("an encoder takes a dict: encoder({'x': x}), x (B, leads, T) in mV")
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
def calibrate_batchnorm(encoder, batches):
    """Set BatchNorm's running mean and variance from `batches`. Weights do not change. An untrained
    encoder without this step divides by made-up variances, and its features say little."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm1d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None                                         # average over all batches seen
    encoder.train()
    for batch in batches:
        encoder(batch)
    for m in norms:
        m.momentum = .1
    return encoder.eval()


def set_regularisation(encoder, drop_path_rate=None, dropout=None):
    """Set an encoder's dropout, and its stochastic depth, which grows linearly from 0 at the first
    block to `drop_path_rate` at the last. None leaves what is there."""
    if drop_path_rate is not None:
        blocks = [b for b in encoder.blocks if isinstance(b, Block)]
        for i, block in enumerate(blocks):
            block.drop_path_rate = drop_path_rate * i / max(1, len(blocks) - 1)
    if dropout is not None:
        for m in encoder.modules():
            if hasattr(m, 'dropout'):
                m.dropout = dropout


# -------------------------------------------------------------------------------------------------
# heads: (B, L, D) -> (B, K)

def mean_pool(h, pad=None):
    """Mean over the tokens that count: (B, L, D) -> (B, D), in fp32."""
    h = h.float()
    if pad is None:
        return h.mean(1)
    count = (~pad)[..., None].to(h)
    return (h * count).sum(1) / count.sum(1).clamp(min=1)


class MeanPool(nn.Module):
    """Mean over tokens, then a linear map: the head of linear probing and fine-tuning."""

    def __init__(self, dim, classes, dropout=0.):
        super().__init__()
        self.out, self.dropout = nn.Linear(dim, classes), dropout

    def forward(self, h, pad=None):
        return self.out(F.dropout(mean_pool(h, pad), self.dropout, self.training))


class AttentionPool(nn.Module):
    """The head of frozen evaluation: a learned query attends over the tokens, with gcd(16, D) heads
    and no biases. All records share the query, so it is multiplied into the key map. Tokens are
    pooled before the value map. This avoids keys and values of shape (B, L, D)."""

    def __init__(self, dim, classes, heads=16):
        super().__init__()
        self.heads = math.gcd(heads, dim)
        self.query = nn.Parameter(torch.randn(dim) / dim ** .5)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, classes, bias=False)

    def forward(self, h, pad=None):
        D, size = h.shape[2], h.shape[2] // self.heads
        q, k, v = self.q(self.query).view(-1, size), self.k.weight, self.v.weight
        query = torch.einsum('hs,hsd->hd', q, k.view(-1, size, D)) / size ** .5
        score = h @ query.T                                                       # (B, L, heads)
        if pad is not None:
            score = score.masked_fill(pad[..., None], -math.inf)
        pooled = score.softmax(1).transpose(1, 2) @ h                             # (B, heads, D)
        return self.out(torch.einsum('bhd,hsd->bhs', pooled, v.view(-1, size, D)).flatten(1))


# -------------------------------------------------------------------------------------------------
# device, precision, learning rate, checkpoints

def pick_device(name=None):
    """The device asked for, else CUDA where there is one, else the CPU. Exits with one line if it
    cannot be used."""
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        raise SystemExit(f'device {name} cannot be used here ({reason}): take --device cpu')
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')                # TF32, exact for inputs in bf16
    return device


def autocast(device):
    """bfloat16 matrix products on a CUDA card that has them, else plain fp32."""
    bf16 = device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def learning_rate(step, steps, peak, schedule='cosine', warmup=.05):
    """Linear warm-up over a fraction of the run, then cosine to zero, or constant."""
    rise = min(1., (step + 1) / max(1, warmup * steps))
    if schedule == 'constant':
        return peak * rise
    progress = max(0., (step - warmup * steps) / max(1, steps - warmup * steps))
    return peak * rise * .5 * (1 + math.cos(math.pi * min(1., progress)))


def parameter_groups(module, peak, weight_decay=1e-3):
    """Optimiser groups with a peak rate each. The dynamics of S4D take 1e-3 at most, no decay."""
    dynamics, rest = [], []
    for name, p in module.named_parameters():
        if p.requires_grad:
            (dynamics if name.endswith(('.log_step', '.a', '.w')) else rest).append(p)
    groups = [dict(params=rest, peak=peak, weight_decay=weight_decay),
              dict(params=dynamics, peak=min(peak, 1e-3), weight_decay=0.)]
    return [g for g in groups if g['params']]


def count_parameters(module):
    """The number of trainable parameters of a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def to_device(batch, device):
    """A batch on the device. Only copies to a GPU are asynchronous. After an asynchronous copy to
    the CPU, values could be read before they arrive."""
    if torch.device(device).type != 'cuda':
        return {k: v.to(device) for k, v in batch.items()}
    pinned = {k: v if v.is_cuda else v.pin_memory() for k, v in batch.items()}
    return {k: v.to(device, non_blocking=True) for k, v in pinned.items()}


def save(path, checkpoint):
    """Write to a temporary file, then rename it: there is never half a checkpoint at `path`."""
    temporary = Path(f'{path}.partial')
    try:
        with open(temporary, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except RuntimeError as e:                  # of torch's writer, when the disk cuts it short
        raise OSError(0, f'{path} cannot be written, is the disk full?') from e
    finally:
        temporary.unlink(missing_ok=True)


# what torch raises for a damaged or foreign file
UNREADABLE = (AttributeError, EOFError, ImportError, LookupError, OSError, RuntimeError, TypeError,
              ValueError, pickle.UnpicklingError)


def load(path, device='cpu'):
    """A checkpoint from its file or run folder: tensors and plain values only, so that no file can
    run code. Raises ValueError with what to do."""
    path = Path(path, 'ckpt.pt') if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f'no checkpoint at {path}: train one with python train.py')
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except UNREADABLE as e:
        raise ValueError(f'{path} cannot be read as a checkpoint ({type(e).__name__})') from e


def load_encoder(run):
    """The pretrained encoder of a run folder, a checkpoint's file, or a checkpoint that is loaded,
    in eval mode. Strict: a missing or surplus tensor is an error."""
    checkpoint = run if isinstance(run, dict) else load(run)
    encoder = Encoder(Config(**checkpoint['config']), checkpoint['contract']['window'])
    encoder.load_state_dict(checkpoint['encoder'])
    return encoder.eval()


def main():
    """Print the encoders of a size."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = list(dict.fromkeys(size for known in SIZES.values() for size in known))
    p.add_argument('--size', default='tiny', choices=sizes, metavar='SIZE',
                   help='tiny, small, base, released, or a rung of a ladder such as 5x320')
    size = p.parse_args().size
    print('backbone      D x layers        stem   backbone   together  tokens in 10 s')
    for backbone in [b for b, known in SIZES.items() if size in known]:
        encoder = Encoder(config_of(backbone, size)).eval()
        peaks = torch.arange(1, 13)[None] * 190                   # 12 beats in 10 s
        with torch.no_grad():
            tokens = encoder(dict(x=torch.randn(1, 12, 2400), peaks=peaks))[0].shape[1]
        stem, both = count_parameters(encoder.stem), count_parameters(encoder)
        print(f'{backbone:12s} {encoder.dim:4d} x {encoder.config.layers:2d} {stem:11,d} '
              f'{both - stem:10,d} {both:10,d} {tokens:7,d}')


if __name__ == '__main__':
    main()
