"""How real the synthetic ECGs are, and how well R-peaks are found.

    python -m tests.calibration                     # synthetic against real: a table and a figure
    python -m tests.calibration peaks --root DIR    # R-peaks found against annotated ones

DIR is a folder of WFDB records with annotations, such as LUDB. Everything is written to out/.
"""
import argparse
import csv
from pathlib import Path

import numpy as np
import scipy.signal
from tqdm import tqdm

from data import (LEADS, BadRecord, Contract, Dataset, Record, Stop, find_r_peaks, load_wfdb,
                  run_script, to_contract)

EIGHT = [0, 1, 6, 7, 8, 9, 10, 11]                      # I, II, V1 ... V6: independent leads


def waves_of(x, peaks, fs):
    """{wave: its size in mV in each lead (C,)} in the median beat of x (T, C), peaks in samples"""
    before, after = round(.25 * fs), round(.45 * fs)
    beats = [x[p - before:p + after] for p in peaks if before < p < len(x) - after]
    beat = np.median(beats, axis=0) if beats else np.full((before + after, x.shape[1]), np.nan)

    def part(start, stop):                              # of the beat, in s from the R-peak
        return beat[round((.25 + start) * fs):round((.25 + stop) * fs)]

    beat = beat - np.median(part(-.08, -.055), axis=0)  # the PR segment is zero
    t_wave = part(.15, .44)
    highest = np.abs(t_wave).argmax(0)
    return {'QRS peak to peak': np.ptp(part(-.07, .07), axis=0),
            'T peak': t_wave[highest, np.arange(x.shape[1])],
            'P peak': part(-.25, -.09).max(0)}


def energy_shares(x):
    """Share of each principal component in the energy of x (T, 8), the greatest first: (8,)"""
    energy = np.linalg.eigvalsh(np.cov(x.T))[::-1].clip(1e-12)
    return energy / energy.sum()


def spectrum_of(x, fs):
    """Shares of power in bands, the slope of the spectrum and the baseline: x (T, 8), a dict."""
    power = np.abs(np.fft.rfft(x - x.mean(0), axis=0)) ** 2
    f, total = np.fft.rfftfreq(len(x), 1 / fs), power.sum(1)
    found = {}
    for low, high in ((0, .5), (.5, 5), (5, 15), (15, 40)):
        found[f'power {low}-{high} Hz'] = total[(f >= low) & (f < high)].sum() / total.sum()
    inside = (f >= 15) & (f < 40)
    slope, _ = np.polyfit(np.log(f[inside]), np.log(total[inside] + 1e-12), 1)
    slow = 1000 * np.sqrt(2 * power[f < .5].sum(0)) / len(x)
    found['PSD slope 15-40 Hz'] = slope
    found['below .5 Hz, I (uV)'] = slow[0]
    found['below .5 Hz, V1-V6 (uV)'] = slow[2:].mean()
    return found


def measure(x, peaks, fs):
    """What calibration compares, of one record x (T, 12) in mV with R-peaks in samples: a dict."""
    eight, names = x[:, EIGHT], [LEADS[i] for i in EIGHT]
    found = {f'SD {lead} (mV)': value for lead, value in zip(LEADS, x.std(0))}
    per_lead = {'1 %': np.percentile(eight, 1, axis=0), '99 %': np.percentile(eight, 99, axis=0)}
    for what, values in (per_lead | waves_of(eight, peaks, fs)).items():
        for lead, value in zip(names, values):
            found[f'{what} {lead} (mV)'] = value
    correlation = np.abs(np.corrcoef(eight.T))
    found['mean abs correlation'] = correlation[np.triu_indices(8, 1)].mean()
    share = energy_shares(eight)
    found['effective rank'] = np.exp(-(share * np.log(share)).sum())
    sos = scipy.signal.butter(2, (.5, 40), 'bandpass', fs=fs, output='sos')
    filtered = energy_shares(scipy.signal.sosfiltfilt(sos, eight, axis=0))
    for k in (3, 4, 5):
        found[f'energy of {k} components, raw'] = share[:k].sum()
        found[f'energy of {k} components, .5-40 Hz'] = filtered[:k].sum()
    rr = np.diff(peaks) / fs
    found['HR (/min)'] = 60 / rr.mean() if len(rr) else np.nan
    rmssd = 1000 * np.sqrt(np.mean(np.diff(rr) ** 2)) if len(rr) > 1 else np.nan
    found['ln RMSSD (ms)'] = np.log(rmssd + 1)
    return found | spectrum_of(eight, fs)


def measure_all(ds, records):
    """{measure: values (N,)} of the first records of a Dataset"""
    found = []
    for i in tqdm(range(min(len(ds), records)), desc=f'measuring {ds.name}', disable=None):
        x = ds.crop(np.array([i]), np.array([0]), int(ds.length[i]))[0].T.numpy()
        peaks = ds.peaks[ds.peak_start[i]:ds.peak_start[i + 1]]
        found.append(measure(x, peaks, ds.contract.fs))
    return {name: np.array([row[name] for row in found]) for name in found[0]}


def calibrate(real='sample', made='synthetic', records=512, path='out/calibration.png'):
    """Compare the mean of every measure over real and over synthetic records. Accepted is a
    difference of .4 SD of the real records. Prints and saves a table and a figure. Returns
    {measure: (real mean, real SD, synthetic mean, difference in SD)}."""
    import matplotlib.pyplot as plt
    sets = Dataset(real), Dataset(made)
    if differs := sets[1].contract.differs(sets[0].contract):
        raise Stop(f'{made} has another contract than {real} ({differs}): prepare them alike')
    a, b = [measure_all(ds, records) for ds in sets]
    rows = {}
    print(f'{"measure":34s} {real:>17s} {made:>17s}  difference')
    for name in a:
        mean, sd = np.nanmean(a[name]), np.nanstd(a[name])
        mean_b, sd_b = np.nanmean(b[name]), np.nanstd(b[name])
        difference = (mean_b - mean) / sd
        rows[name] = mean, sd, mean_b, difference
        mark = '  <- beyond .4' if abs(difference) > .4 else ''
        print(f'{name:34s} {mean:8.3f} +- {sd:5.3f} {mean_b:8.3f} +- {sd_b:5.3f} '
              f' {difference:+5.2f} SD{mark}')
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix('.csv'), 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['measure', 'real_mean', 'real_sd', 'synthetic_mean', 'difference_in_sd'])
        writer.writerows([name, *row] for name, row in rows.items())
    differences = np.array([row[-1] for row in rows.values()])
    height = -np.arange(len(rows))
    fig, ax = plt.subplots(figsize=(7, 12), layout='constrained')
    ax.scatter(differences, height, s=16, c=np.where(np.abs(differences) <= .4, 'C0', 'C3'))
    ax.axvspan(-.4, .4, color='C0', alpha=.12)
    ax.set(xlim=(-1.2, 1.2), xlabel='difference of means, in SD of the real records')
    ax.set_yticks(height, list(rows), size=6)
    ax.set_title(f'{made} against {real}: accepted within .4 SD', size=9)
    fig.savefig(path, dpi=130)
    plt.close(fig)
    print(f'{path}: {(np.abs(differences) <= .4).sum()} of {len(rows)} measures within .4 SD')
    return rows


def compare_peaks(x, fs, truth):
    """(found, errors of those within .1 s of an annotated beat), in s, between the first and the
    last annotated beat. x (T, 12) in mV."""
    found = find_r_peaks(x, fs)
    found = found[(found > truth[0] - .15) & (found < truth[-1] + .15)]
    if not len(found):
        return found, found
    nearest = np.abs(found[:, None] - truth).argmin(0)            # to each annotated beat
    error = found[nearest] - truth
    return found, error[np.abs(error) <= .1]


def check_peaks(root, extension='ii'):
    """R-peaks found against annotated ones (symbol N of WFDB annotations). Prints counts, draws
    the errors and the worst record. Returns (annotated, matched, extra)."""
    import wfdb
    files = sorted(Path(root).rglob(f'*.{extension}'))
    if not files:
        raise Stop(f'no annotation files *.{extension} under {root}: name theirs with --annotation')
    rows = []
    for file in tqdm(files, desc='R-peaks', disable=None):
        record, mark = Record(file.stem), wfdb.rdann(str(file.with_suffix('')), extension)
        try:
            load_wfdb(record, file.with_suffix(''))
            _, x, _ = to_contract(record.x, record.fs, record.leads, record.unit, Contract())
        except (BadRecord, FileNotFoundError) as e:
            print(f'{file.stem} is left out: {e}')
            continue
        truth = mark.sample[np.array(mark.symbol) == 'N'] / record.fs
        if len(truth):
            found, error = compare_peaks(x, record.fs, truth)
            rows.append(dict(name=file.stem, lead=x[:, LEADS.index('II')], fs=record.fs,
                             truth=truth, found=found, error=error,
                             wrong=len(truth) + len(found) - 2 * len(error)))
    if not rows:
        raise Stop(f'no usable record under {root} has beats annotated as N in *.{extension}')
    annotated = sum(len(row['truth']) for row in rows)
    error = 1000 * np.concatenate([row['error'] for row in rows])
    extra = sum(len(row['found']) for row in rows) - len(error)
    title = f'{len(error):,} of {annotated:,} beats found within 100 ms, {extra} extra'
    path = draw_peaks(error, title, max(rows, key=lambda row: row['wrong']))
    print(f'{path}: {len(rows)} records, {title}; median error {np.median(error):+.1f} ms, '
          f'95 % within {np.percentile(np.abs(error), 95):.0f} ms')
    return annotated, len(error), extra


def draw_peaks(error, title, worst):
    """Histogram of the errors (ms), and the record with the most wrong beats. Returns the path."""
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(2, 1, figsize=(12, 6), layout='constrained')
    left.hist(error, 40)
    left.set(xlabel='found - annotated, ms', ylabel='beats', title=title)
    lead = worst['lead']
    right.plot(np.arange(len(lead)) / worst['fs'], lead, 'k', lw=.7)
    for times, colour, height in ((worst['truth'], 'C2', 1.15), (worst['found'], 'C3', 1.3)):
        right.plot(times, np.full(len(times), height * lead.max()), '|', color=colour, ms=10, mew=2)
    right.set(xlabel='s', ylabel='lead II, mV')
    right.set_title(f'the worst record, {worst["name"]}; beats found: red, annotated: green')
    path = Path('out/peaks.png')
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, prog='python -m tests.calibration',
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='?', default='calibrate', choices=['calibrate', 'peaks'])
    parser.add_argument('--root', help='peaks: folder of the annotated records')
    parser.add_argument('--annotation', default='ii', help='peaks: extension of the annotations')
    args = parser.parse_args()
    if args.what == 'calibrate':
        calibrate()
    elif args.root:
        check_peaks(args.root, args.annotation)
    else:
        parser.error('peaks needs --root DIR')


if __name__ == '__main__':
    run_script(main)
