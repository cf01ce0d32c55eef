"""The synthetic ECG: what is promised of it, and what is drawn against what the signal shows."""
import numpy as np
import pytest
import wfdb

import data
from data import LEADS, SHIFTS, Dataset, find_r_peaks, synthesize
from . import calibration

EIGHT = [0, 1, 6, 7, 8, 9, 10, 11]                      # I, II, V1 ... V6


def signals(records, **options):
    """Signals of the first records: (N, T, 12) in uV"""
    return np.stack([synthesize(0, i, **options)['x'] for i in range(records)]).astype(int)


def draw(index):
    """The generators of a record's patient and of the record, and what is drawn first from them"""
    patient = np.random.default_rng([0, 0, 0, data.patient_of(index)])
    record = np.random.default_rng([0, 0, 1, index])
    ecg = data.draw_findings(patient, record, data.DEFAULT_SETTING)
    data.draw_intervals(patient, record, ecg)
    return patient, record, ecg


@pytest.fixture(scope='module')
def made():
    return [synthesize(0, i) for i in range(512)]


@pytest.fixture
def under(monkeypatch):
    """Put the same people under the setting of one shift, so that it is all there is to see."""
    home = data.DEFAULT_SETTING
    return lambda shift: monkeypatch.setattr(data, 'DEFAULT_SETTING', home | SHIFTS[shift])


def test_einthoven_and_goldberger_hold_in_integers(made):
    for x in ([m['x'] for m in made], signals(200, shifts=tuple(SHIFTS))):
        I, II, III, aVR, aVL, aVF = np.moveaxis(np.array(x, int)[..., :6], -1, 0)
        assert (III == II - I).all() and (2 * aVR == -I - II).all()
        assert (2 * aVL == 2 * I - II).all() and (2 * aVF == 2 * II - I).all()


def test_records_depend_on_their_number_alone(here, made):
    for i in (300, 7, 64):
        assert np.array_equal(synthesize(0, i)['x'], made[i]['x'])
        assert not np.array_equal(synthesize(1, i)['x'], made[i]['x'])
    disk = Dataset('synthetic')
    for m, row in zip(made, range(64)):
        x = disk.crop(np.array([row]), np.array([0]), 2400)[0].numpy()
        assert np.array_equal(x, m['x'].T * np.float32(1e-3))
        values = [*m['findings'].values(), *m['tail'], *m['targets'].values()]
        assert np.array_equal(disk.labels[row], np.float32(values), equal_nan=True)


def test_records_of_a_patient_resemble_each_other(made):
    size = np.array([m['x'][:, EIGHT].std(0) for m in made])      # (N, 8)
    pairs = [i for i in range(511) if made[i]['patient'] == made[i + 1]['patient']]
    for i in pairs:
        a, b = made[i], made[i + 1]
        assert (a['age'], a['targets']['qrs']) == (b['age'], b['targets']['qrs'])
        assert np.array_equal(a['tail'], b['tail'])
    near = np.linalg.norm(size[pairs] - size[np.add(pairs, 1)], axis=1)
    assert near.mean() < .6 * np.linalg.norm(size[:, None] - size, axis=2).mean()


def test_noise_free_prefix():
    assert np.array_equal(signals(32, noise=False)[:, :1200], signals(32, seconds=5., noise=False))


# percent of records, as specified; SARR's 8.4 does not follow from its formula, which gives 5
PREVALENCE = '''1dAVb 5.9 RBBB 4.7 IRBBB 4.2 LBBB 4.5 SB 7.1 ST 4.8 AF 7.1 AFL 2.1 PVC 5.5 PAC 3.5
LAFB 6.2 LVH 8.0 RVH 1.9 IMI 7.1 AMI 5.8 LMI 2.9 STD 6.6 STE 2.5 TINV 5.6 LQT 5.8 LVOLT 5.0 PACE 2.3
WPW 1.9'''.split()


def test_prevalence_within_four_standard_errors(made):
    found = [draw(i)[2].findings for i in range(8192)]
    assert [f['PVC'] for f in found[:512]] == [m['findings']['PVC'] for m in made]
    for name, percent in zip(PREVALENCE[::2], PREVALENCE[1::2]):
        p = float(percent) / 100
        error = (2 * p * (1 - p) / 5120) ** .5          # 5,120 patients, as in what was specified
        assert abs(np.mean([f[name] for f in found]) - p) < 4 * error, name


def test_three_components_carry_the_noise_free_energy():
    share = [calibration.energy_shares(x[:, EIGHT])[:3].sum() for x in signals(128, noise=False)]
    assert .985 < np.median(share) < .998


def test_detected_heart_rate_is_the_drawn_one(made):
    near = 0
    for m in made[:64]:
        rate = 60 / np.diff(find_r_peaks(m['x'] / 1000, 240)).mean()
        near += abs(rate - m['targets']['hr']) < 2
        no_p = any(m['findings'][name] for name in ('AF', 'AFL', 'PACE'))
        assert np.isnan(m['targets']['pr']) == no_p
    assert near >= .95 * 64


def test_calibrated_against_the_real_sample(here):
    table = calibration.calibrate(records=512, path='out/calibration.png')
    assert len(table) == 69 and (here / 'out/calibration.png').exists()
    assert {name: row for name, row in table.items() if abs(row[-1]) > .4} == {}


def test_shifted_people(under):
    home = [draw(i)[2] for i in range(512)]
    under('age')
    for a, b in zip(home, [draw(i)[2] for i in range(512)]):
        if 18 < a.age < 87:                             # not cut off at 18 or 95
            assert b.age == pytest.approx(a.age + 8) and b.female >= a.female
    under('prevalence')
    often = [draw(i)[2] for i in range(512)]
    count = lambda people, name: sum(p.findings[name] for p in people)
    assert count(often, 'AF') > count(home, 'AF') and count(often, 'LVH') < count(home, 'LVH')


def test_shifted_signals(made, under):
    before = np.array([m['x'] for m in made], int)
    clean = signals(128, noise=False).std((1, 2))
    under('gain')
    weak = signals(128, noise=False).std((1, 2))
    assert np.median(weak / clean) == pytest.approx(.85, abs=.03)
    under('swap')
    x = signals(512)
    moved = (x != before).any((1, 2))
    assert .005 < moved.mean() < .06
    assert np.array_equal(x[moved, :, 0], -before[moved, :, 0])
    assert np.array_equal(x[moved, :, 1:3], before[moved][..., [2, 1]])
    assert np.array_equal(x[moved, :, 6:], before[moved, :, 6:])
    under('device')
    x = signals(256)
    filtered = np.array([data.apply_filter(y, 240, 'hp0.5') for y in before[:256, :, 6:] / 1.])
    same, high_passed = (np.abs(x[..., 6:] - y).max((1, 2)) <= 6        # both are rounded, in uV
                         for y in (before[:256, :, 6:], filtered))
    assert (x % 5 == 0).all() and (same ^ high_passed).all() and .4 < high_passed.mean() < .6
    under('noise')
    mains = lambda x: (np.abs(np.fft.rfft(x, axis=1)[:, 595:606]) ** 2).sum((1, 2))   # 60 Hz
    assert np.median(mains(signals(64))) > 30 * np.median(mains(before[:64]))


def test_shifted_dipoles_and_lead_field():
    """T waves x .85, and the spread of the lead field x 1.5"""
    setting = data.DEFAULT_SETTING | dict(electrode=0.)
    for i in range(64):
        A, B = (data.draw_dipoles(*draw(i), setting | shift) for shift in ({}, SHIFTS['twave']))
        ecg = draw(i)[2]
        if not any(ecg.findings.values()) and not ecg.tail.any():
            A[[data.T1, data.T2]] *= .85
            assert np.allclose(A, B)
        fields = [data.draw_field(*draw(i)[:2], setting | dict(field=f)) for f in (0., 1., 1.5)]
        assert np.allclose(fields[2] - fields[0], 1.5 * (fields[1] - fields[0]))
    assert SHIFTS['field']['field'] == 1.5


def onset(size, fraction, start=0):
    """Last sample before the highest of size (T,), sought from `start`, that is below a fraction of
    it; NaN if there is none"""
    top = start + size[start:].argmax()
    return max(np.flatnonzero(size[:top] < fraction * size[top]), default=np.nan)


def test_targets_are_what_the_signal_shows():
    """Noise-free sinus beats: P onset to QRS against PR, QRS width, end of T against QT, axis."""
    seen, drawn = [], []
    for i in range(512):
        ecg = draw(i)[2]
        odd = [ecg.findings[f] for f in ('AF', 'AFL', 'PACE', 'PVC', 'PAC', 'WPW', 'LVOLT')]
        if any(odd) or ecg.hr > 75:
            continue
        m = synthesize(0, i, noise=False)
        r = round(m['beats'][3] * 240)
        beat = m['x'][r - 84:r + 132, EIGHT] / 1000     # -350 to +550 ms
        slope = np.linalg.norm(np.gradient(beat, axis=0), axis=1)
        qrs = np.flatnonzero(slope[60:108] > .06 * slope.max()) + 60
        first, last = qrs[0], qrs[-1]
        beat -= beat[first - 3]                         # against the PR segment
        p = onset(np.linalg.norm(beat[:first - 8], axis=1), .3, start=20)
        size = np.linalg.norm(beat - beat[-4:].mean(0), axis=1)
        t_end = len(beat) - 1 - onset(size[:last + 13:-1], .2)
        I, II = beat[first:last, :2].sum(0)
        axis = np.degrees(np.arctan2((II - I / 2) * 2 / 3 ** .5, I))
        seen.append([(first - p) / .24, (last - first) / .24, (t_end - first) / .24, axis])
        target = m['targets']
        drawn.append([target['pr'], target['qrs'], target['qt'], target['axis']])
        assert drawn[-1][:3] == [ecg.pr, ecg.qrs, ecg.qt]
    there = np.isfinite(seen).all(1)
    seen, drawn = np.array(seen)[there], np.array(drawn)[there]
    turn = np.abs((seen[:, 3] - drawn[:, 3] + 180) % 360 - 180)
    r = [np.corrcoef(seen[:, k], drawn[:, k])[0, 1] for k in range(3)]
    assert len(seen) > 100 and min(r) > .7 and np.median(turn) < 5


def test_peaks_against_annotations(tmp_path, monkeypatch):
    """Planted beats of synthetic records, written as WFDB, one of them wrong by 300 ms."""
    monkeypatch.chdir(tmp_path)
    planted = 0
    for i in range(4):
        m = synthesize(0, i)
        at = np.rint(m['beats'] * 240).astype(int)
        at = at[(at > 0) & (at < 2400)]
        wfdb.wrsamp(f'r{i}', 240, ['mV'] * 12, list(LEADS), m['x'] / 1000, fmt=['16'] * 12,
                    adc_gain=[1000] * 12, baseline=[0] * 12)
        if i == 3:
            at[3] += 72
        wfdb.wrann(f'r{i}', 'ii', at, ['N'] * len(at))
        planted += len(at)
    assert calibration.check_peaks('.') == (planted, planted - 1, 1)
    assert (tmp_path / 'out/peaks.png').exists()
