"""Pretrain an encoder.

    python train.py                                      # CPC with a tiny S4 on synthetic ECGs, some two minutes on two CPU cores
    python train.py --data ptbxl --size base --steps 20000 --batch 64
    python train.py --resume --out out/cpc_s4_tiny_0     # go on after an interruption, exactly
    python train.py --benchmark --size base              # a training step against its matrix products

The loop knows nothing of the objective it runs. Batches, dropout and negatives are drawn from (seed, step) alone, which makes
resuming exact. Writes ckpt.pt, log.csv and loss.png to a fresh numbered folder in out/, or to --out.
"""
import argparse, csv, math, sys, time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from data import Dataset, Stop, figure
from evaluate import auroc, embed, linear_probe, macro
from models import DROPOUT, LAYERS, SIZES, Config, Encoder, learning_rate, load, parameters, pick_device, precision, save, to_device
from objectives import OBJECTIVES


def knobs():
    """Every setting, with its default."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group('what')
    g.add_argument('--objective', choices=list(OBJECTIVES), default='cpc')
    g.add_argument('--backbone', choices=list(LAYERS), default='s4')
    g.add_argument('--size', choices=list(SIZES), default='tiny', help='width: ' + ', '.join(f'{k} {v}' for k, v in SIZES.items()))
    g.add_argument('--layers', type=int, help='of the backbone (default: ' + ', '.join(f'{k} {v}' for k, v in LAYERS.items()) + '; net1d is fixed)')
    g.add_argument('--data', default='synthetic', help='prepared dataset, or several joined by commas; their training folds are used')
    g.add_argument('--window', type=float, help="crop in s (default: the objective's)")
    g = p.add_argument_group('how')
    g.add_argument('--steps', type=int, default=800)
    g.add_argument('--batch', type=int, default=32)
    g.add_argument('--lr', type=float, default=3e-3, help='peak')
    g.add_argument('--schedule', choices=['cosine', 'constant'], default='cosine', help='after a warm-up over 5 %% of the run')
    g.add_argument('--weight-decay', type=float, default=1e-3)
    g.add_argument('--clip', type=float, default=1., help='largest norm of the gradient')
    g.add_argument('--seed', type=int, default=0)
    g.add_argument('--device', help='cpu or cuda (default: cuda where there is one)')
    g = p.add_argument_group('where and how often')
    g.add_argument('--out', help='run folder (default: a fresh numbered one in out/)')
    g.add_argument('--resume', action='store_true', help='go on from the checkpoint in --out (default: the newest run)')
    g.add_argument('--force', action='store_true', help='overwrite --out')
    g.add_argument('--log-every', type=int, default=20, help='steps')
    g.add_argument('--save-every', type=int, default=200, help='steps')
    g.add_argument('--probe-every', type=int, default=200, help='steps; 0: no online probe')
    g.add_argument('--benchmark', action='store_true', help='time training steps, train nothing')
    return p


def run_folder(a):
    """The folder to write to, made or checked: nothing is overwritten without --force."""
    if a.out is None:
        if a.resume:
            found = sorted(Path('out').glob('*/ckpt.pt'), key=lambda f: f.stat().st_mtime)
            if not found:
                raise Stop('nothing to resume: no checkpoint in out/')
            return found[-1].parent
        number = 0
        while (out := Path('out', f'{a.objective}_{a.backbone}_{a.size}_{number}')).exists():
            number += 1
        return out
    out = Path(a.out)
    if '..' in out.parts:
        raise Stop(f'--out {out}: name the folder without ..')
    if out.exists() and not (a.resume or a.force):
        raise Stop(f'{out} exists: add --resume to go on with it, --force to overwrite it, or take another --out')
    if a.force and out.exists() and not (out / 'ckpt.pt').is_file():
        raise Stop(f'{out} is no run folder (no ckpt.pt in it), so --force leaves it alone: take another --out')
    if a.resume and not (out / 'ckpt.pt').is_file():
        raise Stop(f'nothing to resume in {out}: it has no ckpt.pt')
    return out


def resume(out, a, parser):
    """The checkpoint in `out`, and the arguments it was started with; other flags given now are refused."""
    try:
        checkpoint = load(out / 'ckpt.pt')
    except ValueError as e:
        raise Stop(str(e))
    if 'args' not in checkpoint:
        raise Stop(f'{out}/ckpt.pt is no checkpoint of train.py: nothing to resume')
    for k, v in checkpoint['args'].items():
        if getattr(a, k) not in (v, parser.get_default(k)):
            raise Stop(f'{out} was started with --{k.replace("_", "-")} {v}: --resume goes on as begun, leave the flag out')
        setattr(a, k, v)
    return checkpoint


def online_probe(encoder, ds, samples, device):
    """Macro AUROC of a linear probe fitted on up to 600 training records and scored on up to 300 validation records, first crops.
    A rough gauge of progress; NaN where there are no labels."""
    y = np.array(ds.labels[:, next((c for t, c in ds.tasks.items() if t != 'tail'), [])])
    y = y[:, np.isin(y, (0, 1)).any(0) & (np.isin(y, (0, 1)) | np.isnan(y)).all(0)]          # yes/no labels only
    usable = np.flatnonzero((ds.length >= samples) & np.isfinite(y).any(1))
    train, val, _ = (r[np.isin(r, usable)] for r in ds.split())
    train, val = train[:600], val[:300]
    if len(train) < 20 or len(val) < 20:
        return math.nan
    rows, X = np.concatenate([train, val]), np.zeros((len(ds), encoder.dim))
    X[rows] = embed(encoder, ds, rows, samples, device, 'probe', first=True)
    cut = len(train) * 4 // 5
    scores = linear_probe(X, y, train[:cut], train[cut:], val)
    table = auroc(scores, y[val])
    return float(macro(table)[0]) if np.isfinite(table).any() else math.nan


def write_log(path, rows):
    """All rows of the log, under a temporary name first: a kill leaves the old log or the new one."""
    temporary = path.with_name(path.name + '.partial')
    with open(temporary, 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def draw_loss(rows, path):
    """Loss, accuracy or other health, and online probe over the steps."""
    health = [k for k in list(rows[0])[4:-4] if k != 'chance']
    panels = ['loss', *health, 'probe']
    fig, axes = figure(1, len(panels), figsize=(4 * len(panels), 3.2), layout='constrained')
    for ax, name in zip(axes, panels):
        xy = [(int(r['step']), float(r[name])) for r in rows if r[name] not in ('', None) and math.isfinite(float(r[name]))]
        ax.plot(*zip(*xy), marker='o' if name == 'probe' else '') if xy else None
        if name == 'accuracy':
            ax.axhline(float(rows[0]['chance']), ls=':', color='C7', label='chance')
            ax.legend()
        ax.set(xlabel='step', title=name)
    fig.savefig(path, dpi=120)


def build(a, fs):
    """The objective around a fresh encoder, as the arguments say."""
    kind = OBJECTIVES[a.objective]
    config = Config(a.backbone, SIZES[a.size], a.layers or LAYERS[a.backbone], causal=kind.causal, dropout=DROPOUT[a.backbone], fs=fs)
    return kind(Encoder(config), steps=a.steps)


def train(a, out, checkpoint=None):
    """Pretrain as the arguments say; writes the run folder. checkpoint: where to go on from."""
    ds, device = Dataset(a.data), pick_device(a.device)
    kind = OBJECTIVES[a.objective]
    window = a.window or kind.window
    samples = round(window * ds.contract.fs)
    rows = ds.split()[0]
    short = int((ds.length[rows] < samples).sum())
    rows = rows[ds.length[rows] >= samples]
    if not len(rows):
        raise Stop(f'no training record of {a.data} lasts {window} s: prepare longer ones or lower --window')
    torch.manual_seed(a.seed)
    objective = build(a, ds.contract.fs).to(device)
    encoder, config, learned = objective.encoder, objective.encoder.config, [p for p in objective.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=a.lr, weight_decay=a.weight_decay)
    first, log, seconds = 0, [], 0.
    if checkpoint:
        objective.load_state_dict(checkpoint['state'], strict=True)
        optimiser.load_state_dict(checkpoint['optimiser'])
        first, log, seconds = checkpoint['step'], checkpoint['log'], checkpoint['seconds']
        if checkpoint['dataset'] != ds.hash:
            raise Stop(f'{a.data} has been prepared anew since this run began: prepare it as it was, or start again')
    print(f'{a.objective} on {a.backbone} {a.size}: stem {parameters(encoder.stem):,} + backbone {parameters(encoder) - parameters(encoder.stem):,} '
          f'+ head {parameters(objective) - parameters(encoder):,} parameters, {"causal" if config.causal else "bidirectional"}')
    print(f'{a.data}: {len(rows):,} training records' + (f' ({short:,} too short)' if short else '') + f', {window} s crops of {samples} samples '
          f'at {ds.contract.fs} Hz, {-(-samples // 2)} tokens, {ds.contract.unit}, filter {ds.contract.filter}')
    print(f'{a.steps:,} steps of {a.batch} crops = {a.steps * a.batch / len(rows):.1f} epochs on {device}, '
          f'{"bf16 products, fp32 convolution" if device.type == "cuda" else "fp32"}; writing to {out}/')
    if checkpoint:
        print(f'resuming at step {first:,}' if first < a.steps else f'already finished: all {first:,} steps were done')
    print(f'{"step":>7s} {"seconds":>8s} {"lr":>8s} {"loss":>8s}  health and online probe')

    def keep(step):
        save(out / 'ckpt.pt', dict(
            objective=a.objective, config=asdict(config), encoder=encoder.state_dict(), state=objective.state_dict(),
            optimiser=optimiser.state_dict(), step=step, seed=a.seed, contract=asdict(replace(ds.contract, window=window)), data=a.data,
            dataset=ds.hash, patients=sorted({str(p) for p in ds.patient[rows]}), command=' '.join(sys.argv), log=log,
            args={k: v for k, v in vars(a).items() if k not in ('out', 'resume', 'force', 'benchmark', 'device')},
            seconds=seconds + time.time() - began))

    began = time.time()
    if not checkpoint:
        out.mkdir(parents=True, exist_ok=True)
        for old in (f for pattern in ('log.csv', 'results_*', 'loss.png', 'labels.png', 'pca_*.png') for f in out.glob(pattern)):
            old.unlink()                                         # of the run that --force overwrites
        keep(0)
    for step in range(first, a.steps):
        objective.train()
        torch.manual_seed((a.seed * 1_000_003 + step) % 2 ** 63)                             # dropout and negatives of this step
        batch = to_device(ds.batch(rows, samples, a.batch, a.seed, step), device)
        lr = learning_rate(step, a.steps, a.lr, a.schedule)
        for group in optimiser.param_groups:
            group['lr'] = lr

        # one step
        with precision(device):
            loss, logs = objective(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learned, a.clip)
        if not (loss.isfinite() and norm.isfinite()):
            torch.save(batch, out / 'bad_batch.pt')
            raise Stop(f'the loss is {loss.item()} and its gradient {norm.item()} at step {step}: the batch is in {out}/bad_batch.pt, '
                       f'the last good state in ckpt.pt; lower --lr and start again')
        optimiser.step()
        optimiser.zero_grad()
        objective.after_step(step)

        # log, probe, keep
        last = step + 1 == a.steps
        probing = a.probe_every and (last or step == 0 or (step + 1) % a.probe_every == 0)
        if last or step % a.log_every == 0 or probing:
            probe = online_probe(encoder, ds, samples, device) if probing else ''
            spent = seconds + time.time() - began
            log.append(dict(step=step, lr=lr, loss=loss.item(), gradient=norm.item(), **{k: float(v) for k, v in logs.items()}, probe=probe,
                            seconds=round(spent, 2), crops_per_second=round((step + 1 - first) * a.batch / (time.time() - began), 1), device=str(device)))
            print(f'{step:7,d} {spent:8.1f} {lr:8.1e} {loss.item():8.4f}  ' + ' '.join(f'{k} {float(v):.4f}' for k, v in logs.items())
                  + (f'  probe AUROC {probe:.3f}' if probing else ''), flush=True)
        if last or (step + 1) % a.save_every == 0:
            keep(step + 1)
            write_log(out / 'log.csv', log)
    draw_loss(log, out / 'loss.png')
    print(f'{out}: ckpt.pt, log.csv, loss.png; evaluate it with python evaluate.py {out}' + ('' if a.data == 'synthetic' else f' --data {a.data}'))


def benchmark(a, repeats=7):
    """Median time of a training step against its matrix products at the rate of a large product measured in turn with it."""
    from torch.utils.flop_counter import FlopCounterMode
    device, kind = pick_device(a.device), OBJECTIVES[a.objective]
    torch.manual_seed(0)
    objective = build(a, 240).to(device)
    optimiser, batch = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad]), {'x': torch.randn(a.batch, 12, round(kind.window * 240), device=device)}
    left, right = torch.randn(9600, 512, device=device), torch.randn(512, 1024, device=device)

    def step():
        with precision(device):
            loss, _ = objective(batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        objective.after_step(0)

    def product():
        with precision(device):
            for _ in range(4):
                left @ right

    def seconds(work):
        began = time.perf_counter()
        work()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter() - began

    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    product()
    times = np.array([[seconds(step), seconds(product)] for _ in range(repeats)])
    rate = 4 * 2 * 9600 * 512 * 1024 / np.median(times[:, 1])
    ideal = flops / rate
    print(f'{a.objective} {a.backbone} {a.size}, batch {a.batch}, {device}, {torch.get_num_threads()} threads, medians of {repeats}')
    print(f'matrix products of a step: {flops / 1e9:.1f} GFLOP, {flops / 6e9 / a.batch:.2f} GMAC forward per crop')
    print(f'large matrix product: {rate / 1e9:.0f} GFLOP/s, so the products alone take {1e3 * ideal:.0f} ms')
    print(f'a training step takes {1e3 * np.median(times[:, 0]):.0f} ms, {np.median(times[:, 0]) / ideal:.2f} times that; '
          f'{a.batch / np.median(times[:, 0]):.0f} crops/s')


def main(argv=None):
    """The command line: see the top of the file."""
    parser = knobs()
    a = parser.parse_args(argv)
    for name in ('steps', 'batch', 'layers', 'log_every', 'save_every'):
        if getattr(a, name) is not None and getattr(a, name) < 1:
            raise Stop(f'--{name.replace("_", "-")} must be 1 or more')
    if not (a.seed >= 0 and 0 < a.lr < math.inf and 0 < a.clip and a.weight_decay >= 0 and (a.window is None or .5 <= a.window < math.inf) and a.seed < 2 ** 31):
        raise Stop('--seed must not be negative, --lr and --clip must be positive, --weight-decay not negative, --window 0.5 s or more')
    if a.layers == 1 and a.objective in ('data2vec', 'dinosr'):
        raise Stop(f'{a.objective} takes its targets from the last two layers: --layers must be 2 or more')
    if a.benchmark:
        return benchmark(a)
    out = run_folder(a)
    checkpoint = resume(out, a, parser) if a.resume else None
    try:
        train(a, out, checkpoint)
    except KeyboardInterrupt:
        raise Stop(f'\nstopped; go on from the last save (every {a.save_every} steps) with python train.py --resume --out {out}')


if __name__ == '__main__':
    main()
