"""Draw figures for lectures into out/figures/. A command, not a test.

    python -m tests.figures                # all of them
    python -m tests.figures s4             # or architecture, objectives, growth (out/growth.csv)
"""
import os
import sys

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from data import LEADS, Dataset
from models import S4, Encoder, calibrate_batchnorm, config_of, cut_beats
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


def architecture():
    """From a real ECG to features and to their two uses. Shown are 16 of the D dimensions of the
    tokens and features of an untrained tiny S4. Positions are in inches."""
    record = Dataset('sample').collate([5], [0], 600)
    encoder = calibrate_batchnorm(Encoder(config_of('s4', 'tiny')), [record])
    blue, red, green = '#d2e3f3', '#f5d6d6', '#d5ead3'
    boxes = [                                       # x, y, width, height, colour, heading, text
        (.1, 4.6, 1.7, .5, 'w', '12-lead ECG', '(B, 12, 600), 2.5 s'),
        (2, 2.95, 1, .8, blue, 'CNN stem', '4 convo-\nlutions'),
        (2.9, 4.6, 1.5, .5, 'w', 'tokens (B, 300, D)', 'one every 8.3 ms'),
        (4.3, 2.85, 1.2, 1, blue, 'backbone', 'S4, S4D,\nTransformer\nor Net1D'),
        (5.7, 4.6, .9, .5, 'w', 'features', '(B, L, D)'),
        (.05, 1.3, 1.5, .7, 'w', '', '10 s for CMSC,\nvqbeat, beats\nand MAE'),
        (2, 1.83, 3.5, .3, 'w', '', 'D: 64 for a tiny S4, 32 for a tiny Transformer'),
        (2, 1.22, 3.5, .53, blue, 'or a ResNet on the raw signal',
         'a token every 67 ms (tiny) to 1.07 s (base)'),
        (2, .66, 3.5, .53, blue, 'or heartbeats and a Transformer',
         'a token for each beat of each lead'),
        (2, .1, 3.5, .53, blue, 'or 50 ms patches and a Transformer',
         'a token for each patch of all 12 leads'),
        (7, 4.8, 3.9, .3, 'w', 'pretraining: objectives and their targets', ''),
        (7, 4.07, 3.9, .72, red, 'contrastive',
         'CPC: the token 117 ms ahead, among 129\nCMSC: the other half of the record'),
        (7, 3.51, 3.9, .53, red, 'features of the teacher',
         'JEPA: hidden blocks; data2vec: hidden spans'),
        (7, 2.95, 3.9, .53, red, 'codes of the teacher',
         'DinoSR: nearest code; HuBERT++: soft codes'),
        (7, 2.39, 3.9, .53, red, 'codes of heartbeats', 'vqbeat: learns them; beats: hidden beats'),
        (7, 1.83, 3.9, .53, red, 'the signal', 'MAE: hidden patches'),
        (7, 1.27, 3.9, .53, red, 'labels', 'supervised: the known labels'),
        (7, .85, 3.9, .3, 'w', 'evaluation', ''),
        (7, .1, 1.2, .73, green, 'pooling', 'mean or\nattention'),
        (8.4, .1, 1, .73, green, 'head', 'linear map\nto labels'),
        (9.6, .1, 1.3, .73, green, 'AUROC', 'with its 95 %\ninterval')]
    arrows = [('->', 1.78, 3.35, 2, 3.35), ('->', 3, 3.35, 3.2, 3.35), ('->', 4.1, 3.35, 4.3, 3.35),
              ('->', 5.5, 3.35, 5.7, 3.35), ('->', 6.6, 3.35, 7, 3.35), ('<-', 7, .46, 6.4, 2.2),
              ('->', 8.2, .46, 8.4, .46), ('->', 9.4, .46, 9.6, .46)]
    for y in (1.48, .92, .36):
        arrows += ('<-', 2, y, 1.65, 2.1), ('->', 5.5, y, 5.9, 2.2)
    fig = plt.figure(figsize=(11, 5.2))
    ax = fig.add_axes((0, 0, 1, 1))
    with torch.no_grad():
        for x, h in (3.2, encoder.tokens(record)[0]), (5.7, encoder(record)[0]):
            image = F.instance_norm(h[..., :16].transpose(1, 2))[0]               # (16, 300)
            place = x, x + .9, 2.2, 4.5
            ax.imshow(image, 'Greys', vmin=-2, vmax=2, extent=place, interpolation='nearest')
    for i, lead in enumerate(record['x'][0]):
        ax.plot(torch.linspace(.52, 1.77, 600), 4.4 - .19 * i + .12 * lead, 'k', lw=.6)
        ax.text(.1, 4.4 - .19 * i, LEADS[i], va='center')
    for x, y, width, height, colour, heading, text in boxes:
        ax.add_patch(plt.Rectangle((x, y), width, height, color=colour, lw=0))
        x += width / 2
        ax.text(x, y + height - .06, heading, size=11, weight='bold', ha='center', va='top')
        ax.text(x, y + .06, text, size=11, ha='center', va='bottom')
    for style, *start, x, y in arrows:
        bend = 'arc3' if start[1] == y else 'angle,angleA=0,angleB=90'
        ax.annotate('', (x, y), start, arrowprops=dict(arrowstyle=style, connectionstyle=bend))
    ax.set(xlim=(0, 11), ylim=(0, 5.2), aspect='auto')
    ax.axis('off')
    return fig


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


FIGURES = {'architecture': architecture, 'objectives': objectives, 's4': s4, 'growth': growth}

if __name__ == '__main__':
    os.makedirs('out/figures', exist_ok=True)
    for name in sys.argv[1:] or list(FIGURES)[:3 + os.path.exists('out/growth.csv')]:
        torch.manual_seed(0)
        path = f'out/figures/{name}.png'
        FIGURES[name]().savefig(path, dpi=110)
        print(path)
