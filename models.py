"""Encoders: CNN stem and S4 backbone, as in arXiv 2605.12241, with the heads and helpers that both training loops share.

    python models.py                                     # parameters of every size, and the S4 kernels of a fresh layer in out/s4.png

x (B, 12, T) -> stem -> tokens (B, L, D) at half the sampling rate -> backbone -> (B, L, D).
"""
import argparse, math, os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {'tiny': 64, 'small': 256, 'base': 512}                  # width D; the paper's models are base


# ---------------------------------------------------------------------------------------------------------------------
# stem

def stem(leads, dim):
    """Four convolutions with BatchNorm and ReLU, kernels 3 1 1 1, the first with stride 2: (B, leads, T) -> (B, dim, ceil(T / 2)).
    A token sees 3 samples; all mixing over time is the backbone's. 808,960 parameters for 12 leads and dim 512."""
    layers = []
    for i in range(4):
        conv = nn.Conv1d(dim, dim, 1, bias=False) if i else nn.Conv1d(leads, dim, 3, stride=2, padding=1, bias=False)
        layers += [conv, nn.BatchNorm1d(dim), nn.ReLU()]
    return nn.Sequential(*layers)


# ---------------------------------------------------------------------------------------------------------------------
# S4 with frozen HiPPO-LegS dynamics

def legs(state):
    """HiPPO-LegS matrices A (N, N) and B (N,) in float64; the eigenvalues of A are -1 ... -N. (Gu et al. 2020, 2008.07669)"""
    n = torch.arange(state, dtype=torch.float64)
    A = -torch.tril(torch.outer((2 * n + 1).sqrt(), (2 * n + 1).sqrt()), -1) - torch.diag(n + 1)
    return A, (2 * n + 1).sqrt()


def discretise(log_dt, state):
    """Bilinear rule, one step size per channel: Abar (H, N, N) and Bbar (H, N) in float64."""
    A, B = legs(state)
    A, B, I = A.to(log_dt.device), B.to(log_dt.device), torch.eye(state, dtype=torch.float64, device=log_dt.device)
    dt = log_dt.double().exp()[:, None, None]
    Abar = torch.linalg.solve(I - dt / 2 * A, I + dt / 2 * A)
    Bbar = torch.linalg.solve(I - dt / 2 * A, dt * B[:, None])[..., 0]
    return Abar, Bbar


def convolve(u, k):
    """Long convolution by FFT. u and result (H, B, L).

    k (1, H, L): y_t = sum_j k[0]_j u_{t-j}, which never looks ahead;
    k (2, H, L): plus sum_j k[1]_j u_{t+1+j}, the same looking back from the future, shifted by one so that lag 0 counts once.
    """
    L = u.shape[2]
    kernel = F.pad(k[0], (0, L))                                 # (H, 2L): room for what would wrap around
    if len(k) == 2:
        kernel = kernel + F.pad(k[1].flip(1), (L, 0))
    spectrum = torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(kernel)[:, None]
    return torch.fft.irfft(spectrum, n=2 * L)[..., :L]


CHUNK = 25


def convolve_chunks(u, C, parts):
    """The causal convolution again, without FFT: within chunks of 25 tokens as a small matrix product, between chunks through the
    state, which is only N wide. Linear in L, and about twice as fast as the FFT on a CPU. u and result (H, B, L); C (H, N);
    parts: what S4.chunk_parts made of the dynamics."""
    H, B, L = u.shape
    within, into, out_of, across = parts
    K, N = -(-L // CHUNK), C.shape[1]
    x = F.pad(u, (0, K * CHUNK - L)).reshape(H, B * K, CHUNK)
    local = (C[:, None] @ within).view(H, CHUNK, CHUNK)          # k_{l-j}, zero for l < j
    read = (C[:, None] @ out_of).view(H, N, CHUNK)               # C Abar^{l+1}
    entering = (x @ into).view(H, B, K, N)                       # what each chunk adds to the state
    state, states = u.new_zeros(H, B, N), []
    for k in range(K):
        states.append(state)
        state = torch.baddbmm(entering[:, :, k], state, across)
    y = torch.baddbmm(torch.stack(states, 2).view(H, B * K, N) @ read, x, local)
    return y.view(H, B, K * CHUNK)[..., :L]


def tied_dropout(x, p, training, dim):
    """Dropout with one decision per record and channel, shared by all tokens, which lie along `dim`."""
    if not training or not p:
        return x
    shape = list(x.shape)
    shape[dim] = 1
    return x * F.dropout(x.new_ones(shape), p)


class S4(nn.Module):
    """The S4 of arXiv 2605.12241's code: LegS dynamics A, B, dt stay as drawn, only C, D and the output map learn.

    With A, B, dt frozen the kernel is linear in C over a fixed basis: k_l = sum_n C_n (Abar^l Bbar)_n, so each channel mixes
    `state` decaying filters at a time scale of its own. (B, L, H) -> (B, L, H): GLU(W drop(gelu(k * u + D u)) + b).
    """

    def __init__(self, dim, state=8, causal=True, dropout=.2):
        super().__init__()
        self.p, self.ready = dropout, None
        self.register_buffer('log_dt', torch.empty(dim).uniform_(math.log(1e-3), math.log(1e-1)))
        self.C = nn.Parameter(torch.randn(1 if causal else 2, dim, state))
        self.D = nn.Parameter(torch.randn(dim))
        self.out = nn.Linear(dim, 2 * dim)

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
        """The matrices of convolve_chunks, float64: within (H, N, c c), into (H, c, N), out_of (H, N, N c), across (H, N, N)."""
        Abar, Bbar = discretise(self.log_dt, self.C.shape[2])
        powers = [torch.eye(Abar.shape[1]).to(Abar).expand_as(Abar)]
        while len(powers) <= CHUNK:
            powers.append(Abar @ powers[-1])
        powers, basis = torch.stack(powers, -1), self.basis(CHUNK)[0]                        # (H, N, N, c + 1), (H, N, c)
        lag = torch.arange(CHUNK, device=Abar.device) - torch.arange(CHUNK, device=Abar.device)[:, None]
        within = (basis[:, :, lag.clamp(min=0)] * (lag >= 0)).flatten(2)
        return within, basis.flip(2).transpose(1, 2), powers[..., 1:].flatten(2), powers[..., CHUNK].transpose(1, 2)

    def kernel(self, L):
        """Kernels (1 or 2, H, L), lags 0 ... L - 1."""
        return torch.einsum('chn,hnl->chl', self.C, *self.dynamics(self.basis, L))

    def mix(self, u):
        """k * u, by the faster way for the device and at the precision of C, whatever autocast says; u and result (H, B, L)."""
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(self.C)
            if u.device.type != 'cpu' or self.C.shape[2] > 16:   # a wide state makes chunks slow
                return convolve(u, self.kernel(u.shape[2]))
            parts = self.dynamics(self.chunk_parts)
            y = convolve_chunks(u, self.C[0], parts)
            if len(self.C) == 2:
                y = y + F.pad(convolve_chunks(u.flip(2), self.C[1], parts).flip(2)[..., 1:], (0, 1))
            return y

    def forward(self, u):
        u = u.permute(2, 0, 1).contiguous()                      # (H, B, L)
        y = F.gelu(self.mix(u) + self.D[:, None, None] * u)
        y = tied_dropout(y, self.p, self.training, 2).permute(1, 2, 0)                       # (B, L, H)
        return F.glu(self.out(y), -1)


class S4Block(nn.Module):
    """Post-norm residual block: LayerNorm(x + drop(S4(x)))."""

    def __init__(self, dim, state, causal, dropout):
        super().__init__()
        self.s4, self.norm, self.p = S4(dim, state, causal, dropout), nn.LayerNorm(dim), dropout

    def forward(self, x):
        branch = self.s4(x)
        return self.norm(x + tied_dropout(branch, self.p, self.training, 1)), branch


# ---------------------------------------------------------------------------------------------------------------------
# Transformer with rotary positions

def rotate(x):
    """Rotary position embedding (Su et al. 2021, 2104.09864), base 10000, pairs (i, i + half): x (B, heads, L, size)."""
    L, half = x.shape[2], x.shape[3] // 2
    angle = torch.outer(torch.arange(L, device=x.device), 10000. ** (-torch.arange(half, device=x.device) / half))
    a, b, cos, sin = x[..., :half], x[..., half:], angle.cos().to(x), angle.sin().to(x)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class TransformerBlock(nn.Module):
    """Pre-norm block of arXiv 2605.12241: x + drop(attention(norm x)), then x + drop(ffn(norm x)); 8 heads, FFN 4 D, GELU.
    Its branch is the second one, the last before a residual sum."""

    def __init__(self, dim, causal, dropout, heads=8):
        super().__init__()
        self.heads, self.causal, self.p = heads, causal, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.wide, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        for linear in (self.q, self.k, self.v, self.out, self.wide, self.narrow):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def attention(self, x):
        split = lambda y: y.unflatten(2, (self.heads, -1)).transpose(1, 2)                   # (B, heads, L, size)
        q, k, v = rotate(split(self.q(x))), rotate(split(self.k(x))), split(self.v(x))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p * self.training, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x):
        drop = lambda y: F.dropout(y, self.p, self.training)
        x = x + drop(self.attention(self.norm1(x)))
        branch = self.narrow(drop(F.gelu(self.wide(self.norm2(x)))))
        return x + drop(branch), branch


# ---------------------------------------------------------------------------------------------------------------------
# Net1D, the CNN of ECGFounder at stride 1

class Net1DBlock(nn.Module):
    """Bottleneck block of Net1D: 1x1, grouped convolution of 16 taps, 1x1, squeeze-and-excitation, identity padded with zero channels.

    As released it is not causal: 8 taps look ahead and the excitation pools over all time, so CPC would see its targets. Causal here
    means that all 15 neighbours lie in the past and the excitation pools over the tokens so far."""

    def __init__(self, inside, outside, causal, first):
        super().__init__()
        self.causal, self.first, self.grow = causal, first, outside - inside
        self.conv1, self.conv3 = nn.Conv1d(inside, outside, 1), nn.Conv1d(outside, outside, 1)
        self.conv2 = nn.Conv1d(outside, outside, 16, groups=max(1, outside // 16))
        self.squeeze, self.excite = nn.Linear(outside, outside // 2), nn.Linear(outside // 2, outside)

    def forward(self, x):
        y = x.transpose(1, 2)                                    # (B, C, L)
        h = self.conv1(y if self.first else F.silu(y))
        h = self.conv2(F.pad(F.silu(h), (15, 0) if self.causal else (7, 8)))
        h = self.conv3(F.silu(h)).transpose(1, 2)                # (B, L, C)
        L = h.shape[1]
        pooled = h.cumsum(1) / torch.arange(1, L + 1, device=h.device)[:, None] if self.causal else h.mean(1, keepdim=True)
        branch = h * self.excite(F.silu(self.squeeze(pooled))).sigmoid()
        return branch + F.pad(x, (self.grow // 2, self.grow - self.grow // 2)), branch


class Net1DEntry(nn.Module):
    """First convolution of Net1D, D -> D / 8 channels, 16 taps, and Swish."""

    def __init__(self, dim, causal):
        super().__init__()
        self.causal, self.conv = causal, nn.Conv1d(dim, dim // 8, 16)

    def forward(self, x):
        y = F.silu(self.conv(F.pad(x.transpose(1, 2), (15, 0) if self.causal else (7, 8)))).transpose(1, 2)
        return y, y


def net1d(dim, causal):
    """The blocks of Net1D (Hong et al. 2020) with the widths of arXiv 2605.12241 at dim 512: seven stages, 20 blocks, stride 1."""
    widths = [dim // 8, dim // 4, dim // 4, dim // 2, dim // 2, dim, dim]
    widths = [w for w, blocks in zip(widths, (2, 2, 2, 3, 3, 4, 4)) for _ in range(blocks)]
    return [Net1DEntry(dim, causal)] + [Net1DBlock(a, b, causal, i == 0) for i, (a, b) in enumerate(zip([dim // 8] + widths, widths))]


# ---------------------------------------------------------------------------------------------------------------------
# the encoder

LAYERS = {'s4': 4, 'transformer': 6, 'net1d': 20}                # the paper's; it also tries 6 for S4. Net1D's depth is fixed
DROPOUT = {'s4': .2, 'transformer': .1, 'net1d': 0.}


@dataclass
class Config:
    """All that is needed to build an Encoder; it travels in the checkpoint."""
    backbone: str = 's4'
    dim: int = 64                                                # D
    layers: int = 4
    state: int = 8                                               # N of S4
    causal: bool = True
    dropout: float = .2
    leads: int = 12
    fs: float = 240                                              # Hz of the input


class Encoder(nn.Module):
    """Stem and backbone: tokens(batch) -> z (B, L, D), pad; backbone(z, pad) -> h (B, L, D); encoder(batch) does both.
    Attributes: dim, causal, tokens_per_second.

    pad (B, L) is True where a token stands for nothing, None where every token counts. `layers`: a list to which the backbone
    appends each block's (branch before the residual sum, output).
    """

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        self.stem = stem(c.leads, c.dim)
        self.dim, self.causal, self.tokens_per_second = c.dim, c.causal, c.fs / 2
        make = {'s4': lambda: [S4Block(c.dim, c.state, c.causal, c.dropout) for _ in range(c.layers)],
                'transformer': lambda: [TransformerBlock(c.dim, c.causal, c.dropout) for _ in range(c.layers)],
                'net1d': lambda: net1d(c.dim, c.causal)}
        self.blocks = nn.ModuleList(make[c.backbone]())
        self.norm = nn.LayerNorm(c.dim) if c.backbone == 'transformer' else nn.Identity()

    def tokens(self, batch):
        return self.stem(batch['x']).transpose(1, 2).contiguous(), None

    def backbone(self, z, pad=None, layers=None):
        for block in self.blocks:
            z, branch = block(z)
            if layers is not None:
                layers.append((branch, z))
        return self.norm(z)

    def forward(self, batch):
        return self.backbone(*self.tokens(batch))


@torch.no_grad()
def see_data(encoder, batches):
    """Give a fresh encoder's BatchNorm the mean and variance of `batches`, and nothing else: what "random encoder" means here."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm1d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None                                        # average over all batches seen
    encoder.train()
    for batch in batches:
        encoder.tokens(batch)
    for m in norms:
        m.momentum = .1
    return encoder.eval()


# ---------------------------------------------------------------------------------------------------------------------
# heads: (B, L, D) -> (B, K)

class MeanPool(nn.Module):
    """Mean over tokens, then a linear map: the head of linear probing, fine-tuning and training from scratch."""

    def __init__(self, dim, classes):
        super().__init__()
        self.out = nn.Linear(dim, classes)

    def forward(self, h):
        return self.out(h.mean(1))


class AttentionPool(nn.Module):
    """A learned query attends over the tokens, 16 heads, no biases: the head of frozen evaluation.

    The query is the same for all records, so it is folded into the key map, and tokens are pooled before the value map: the
    same result without a (B, L, D) key or value."""

    def __init__(self, dim, classes, heads=16):
        super().__init__()
        self.heads, self.query = heads, nn.Parameter(torch.randn(dim) / dim ** .5)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, classes, bias=False)

    def forward(self, h):
        D, size = h.shape[2], h.shape[2] // self.heads
        query = torch.einsum('hs,hsd->hd', self.q(self.query).view(-1, size), self.k.weight.view(-1, size, D)) / size ** .5
        pooled = (h @ query.T).softmax(1).transpose(1, 2) @ h    # (B, heads, D)
        return self.out(torch.einsum('bhd,hsd->bhs', pooled, self.v.weight.view(-1, size, D)).flatten(1))


# ---------------------------------------------------------------------------------------------------------------------
# device, precision, schedule, checkpoints

def pick_device(name=None):
    """The device asked for, else CUDA where there is one, else the CPU. Exits with one line where it cannot be had."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name) if name else device
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise SystemExit(f'device {name} cannot be used here ({str(e).splitlines()[0]}): leave --device out, or take cpu')
    return device


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


def parameters(module):
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def to_device(batch, device):
    """A batch on the device; copies do not wait on CUDA."""
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}


def save(path, checkpoint):
    """Write a checkpoint under a temporary name and rename it: there is never half a checkpoint at `path`."""
    path = Path(path)
    temporary = path.with_name(path.name + '.partial')
    with open(temporary, 'wb') as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


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


def main():
    """The command line: see the top of the file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', default='out/s4.png', help='where the figure goes')
    a = p.parse_args()
    for size, dim in SIZES.items():
        for causal in (True, False):
            encoder = Encoder(Config(dim=dim, causal=causal))
            print(f'{size:6s} D {dim:4d} {"causal" if causal else "bidirectional":14s} stem {parameters(encoder.stem):9,d}  '
                  f's4 {parameters(encoder.blocks):9,d}  together {parameters(encoder):9,d}')
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    torch.manual_seed(0)
    layer = S4(8)
    layer.log_dt.copy_(torch.linspace(math.log(1e-3), math.log(1e-1), 8))
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout='constrained')
    k = layer.kernel(300)[0].detach()
    for h in (1, 4, 7):
        axes[0].plot(layer.basis(300)[0][h].T, lw=.8, color=f'C{h}')
        axes[1].plot(k[h] / k[h].abs().max(), color=f'C{h}', label=f'dt {layer.log_dt[h].exp():.3f}')
    axes[0].set(title='basis: 8 filters per channel, three time scales', xlabel='lag in tokens (8.3 ms)')
    axes[1].set(title='kernels: random mixes of them, scaled', xlabel='lag in tokens (8.3 ms)')
    axes[1].legend()
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(a.out, dpi=120)
    print(a.out)


if __name__ == '__main__':
    main()
