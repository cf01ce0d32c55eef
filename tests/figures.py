"""Draw figures for lectures into out/figures/. A command, not a test.

    python -m tests.figures                # all of them
    python -m tests.figures s4             # any of objectives, s4, growth (from out/growth.csv)
"""
import os
import sys

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from data import Dataset
from models import S4, Encoder, config_of, cut_beats
from objectives import MAE, block_mask, span_mask


def panel(ax, title, x, **shades):
    """A lead x (T,) over time. shades: a colour, and in which of its tokens x is shaded so."""
    ax.plot(torch.arange(len(x)) / 240, x, 'k', lw=.8)
    for colour, mask in shades.items():
        turns = torch.diff(F.pad(mask.int(), (1, 1))).nonzero().view(-1, 2)
        for start, end in turns * len(x) / len(mask) / 240:
            ax.axvspan(start, end, color=colour, alpha=.35, lw=0)
    ax.set_title(title, size=10, loc='left')
    ax.set_xlim(0, len(x) / 240)


def objectives():
    """What each objective sees (white), hides (grey), predicts (red), on lead II of a real ECG."""
    record, token = Dataset('sample').collate([5], [0], 2400), torch.arange(300)
    lead = record['x'][0, 1]
    fig, axes = plt.subplots(6, 1, figsize=(11, 12), layout='constrained')
    panel(axes[0], 'cpc: from the tokens up to 150 (white), tell token 164 (red), 117 ms ahead, '
          'from 128 others of the crop (blue)', lead[:600], C7=token > 150,
          C0=torch.isin(token, torch.randint(300, (128,))), r=token == 164)
    visible, cover = (mask[0] for mask in block_mask(1, 300))
    panel(axes[1], "jepa: predict the teacher's features in four blocks (red, darker where they "
          'overlap); grey is hidden, but not predicted', lead[:600],
          C7=~visible & (cover == 0), C3=cover > 0, r=cover > 1)
    panel(axes[2], 'data2vec, dinosr, hubert: predict what the teacher makes of hidden tokens '
          '(red): layers, codes, soft clusters', lead[:600], C3=span_mask(1, 300, 10)[0])
    panel(axes[3], 'cmsc: the halves of a record (orange, green) attract, those of other patients '
          'repel', lead, C1=token < 150, C2=token >= 150)
    number = torch.arange(1., 2401)                               # of each sample; 0 is padding
    beats = cut_beats(number[None, None], record['peaks'], 230)[0, 0]             # (P, 230)
    panel(axes[4], 'beats: predict the codes of hidden beats (red); a token is a beat of one lead',
          lead, C3=torch.isin(number, beats[torch.randperm(len(beats))[::2]]))
    patches = torch.randperm(200) < 100
    target = MAE(Encoder(config_of('vit', 'tiny'))).target(record)[0, :, 12:24].flatten()
    panel(axes[5], 'mae: predict the hidden half (red) of the patches of 50 ms, each without its '
          'mean and of size 1', target, C3=patches)
    fig.supxlabel('s (lead II in mV; of mae in SD)')
    return fig


def s4():
    """The filters of one S4 channel, and the kernels of three with time scales 7 times apart."""
    layer = S4(3)
    layer.log_dt.copy_(torch.tensor([.002, .014, .1]).log())
    kernel = layer.kernel(300)[0].detach().T                      # (300, 3)
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout='constrained')
    left.plot(layer.basis(300)[1].T)
    left.set_title('the 8 filters of a channel, dt .014')
    right.plot(kernel / kernel.abs().amax(0), label=['dt .002', 'dt .014', 'dt .1'])
    right.set_title('kernels: mixes of filters, scaled')
    right.legend()
    fig.supxlabel('lag in tokens of 8.3 ms')
    return fig


def growth(folder='out'):
    """What `python -m tests.benchmark growth` measured; at 45 degrees in proportion."""
    import pandas as pd
    parts = pd.read_csv(f'{folder}/growth.csv').groupby('axis', sort=False)
    fig, axes = plt.subplots(1, len(parts), figsize=(14, 4), layout='constrained')
    for ax, (name, part) in zip(axes, parts):
        part.plot('value', ['ms', 'memory_mb'], style='o-', loglog=True, ax=ax, xlabel=name)
        ax.set_xticks(part['value'], map('{:,.10g}'.format, part['value']))
        ax.xaxis.minorticks_off()
        ax.set_aspect('equal', 'datalim')
    return fig


FIGURES = {'objectives': objectives, 's4': s4, 'growth': growth}

if __name__ == '__main__':
    os.makedirs('out/figures', exist_ok=True)
    for name in sys.argv[1:] or list(FIGURES)[:2 + os.path.exists('out/growth.csv')]:
        torch.manual_seed(0)
        path = f'out/figures/{name}.png'
        FIGURES[name]().savefig(path, dpi=110)
        print(path)
