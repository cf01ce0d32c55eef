"""Readers, contract, prepared datasets and batches. Every record is made here or comes along."""
import ast
import csv
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import wfdb
from numpy.testing import assert_array_equal as equal               # NaN equals NaN

import data
from data import (LEADS, BadRecord, Contract, Dataset, Record, Stop, fold_of, overlap, prepare,
                  resample, to_contract)

SAMPLE = Path(__file__).resolve().parent.parent / 'sample/ptbxl'


def ecg(seconds=10, fs=500, seed=0):
    """A plausible recording in mV (T, 12)."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(0, .01, (round(seconds * fs), 12)), 0)


def run(line):
    """The dataset that a command of data.py prepares."""
    words = line.split()
    data.main([*words, '--workers', '1', '--no-peaks'])
    return Dataset(words[words.index('--out') + 1] if '--out' in words else words[0])


def named(ds):
    """The labels that are 1, of each record."""
    return [{n for n, v in zip(ds.label_names, row) if v == 1} for row in ds.labels]


def signal(ds, row):
    """A record of a prepared dataset (T, 12)."""
    return ds.collate([row], [0], int(ds.length[row]))['x'][0].T.numpy()


def close(ds, row, x, fs, tolerance=2e-3):
    """Is record `row` of a prepared dataset x (T, 12) of fs Hz?"""
    return np.abs(signal(ds, row) - resample(x, fs, 240)).max() < tolerance


def write_wfdb(path, x=None, comments=('Age: 63', 'Sex: Female'), leads=LEADS, **settings):
    """A WFDB record of 500 Hz. Returns the path of its header."""
    path, n = Path(path), len(leads)
    path.parent.mkdir(parents=True, exist_ok=True)
    if 'samps_per_frame' not in settings:
        settings['p_signal'] = ecg() if x is None else x
    usual = dict(units=['mV'] * n, fmt=['16'] * n, adc_gain=[1000.] * n, baseline=[0] * n)
    wfdb.wrsamp(path.name, 500, sig_name=list(leads), comments=list(comments),
                write_dir=str(path.parent), **usual | settings)
    return path.with_suffix('.hea')


def read_wfdb(header):
    """The counts of a WFDB record, or why it is dropped."""
    record = Record('r', load=partial(data.load_wfdb, path=header.with_suffix('')))
    _, counts, why = data.process(record, Contract(), peaks=False)
    return why if counts is None else counts


def convert(x, fs=500, leads=LEADS, unit='mV', contract=Contract()):
    return to_contract(x, fs, leads, unit, contract)


# --- resampling, filter, contract

def test_resampling_keeps_amplitude_and_phase_and_removes_what_would_alias():
    wave = lambda hz, fs: np.sin(2 * np.pi * hz * np.arange(10 * fs) / fs + .4)[:, None]
    for fs in (500, 100, 1000, 257):
        y = resample(wave(10, fs), fs, 240)
        assert len(y) == 2400 and np.abs(y - wave(10, 240))[120:-120].max() < 5e-3
    assert np.abs(resample(wave(180, 500), 500, 240)[120:-120]).max() < 5e-3


def test_filters_of_the_second_contract():
    """100 Hz; wander and mains are removed, an ECG's frequencies stay."""
    x = np.sin(2 * np.pi * np.outer(np.arange(5000) / 500, [.1, 10, 60]))
    y = convert(np.repeat(x, 4, 1), contract=data.CONTRACTS['sc'])[0][300:700]
    assert np.abs(y[:, [0, 8]]).max() < .05
    assert np.abs(y[:, 4] - x[1500:3500:5, 1]).max() < .02


def test_short_gaps_are_interpolated_long_ones_refused():
    x = ecg()
    x[1000:1040, 3], x[0:5, 4], x[2000, 5] = np.nan, np.inf, np.nan
    y, filled, raw = convert(x)
    line = np.interp(np.arange(1, 41), [0, 41], [x[999, 3], x[1040, 3]])
    assert np.isfinite(y).all() and np.allclose(filled[1000:1040, 3], line)
    equal(raw, x)
    x[1000:1060, 3] = np.nan
    with pytest.raises(BadRecord, match='beyond a short gap'):
        convert(x)


def test_padding_is_cut_off_and_nothing_else():
    x = ecg()
    x[2000:2600] = 0
    for pad in (np.zeros((300, 12)), np.full((300, 12), np.nan)):
        for padded in (np.r_[pad, x], np.r_[x, pad], np.r_[pad, x, pad]):
            equal(convert(padded)[2], x)
    short = np.r_[x, np.zeros((50, 12))]                            # .1 s: no padding
    equal(convert(short)[2], short)


@pytest.mark.parametrize('why, change', [
    ('lead V6 missing', dict(leads=LEADS[:11] + ('X',))), ('named twice', dict(leads=('II',) * 12)),
    ('unknown unit', dict(unit='furlong')), ('absurd fs', dict(fs=1e6)),
    ('absurd fs', dict(fs=np.nan)), ('empty', dict(x=0 * ecg())),
    ('more than two flat leads', dict(x=ecg() * ([0] * 3 + [1] * 9))),
    ('wrong gain or unit', dict(x=1e4 * ecg())), ('shorter than a window', dict(x=ecg(2))),
    ('longer than an hour', dict(x=ecg(3700, 50), fs=50))])
def test_faults_of_a_signal(why, change):
    with pytest.raises(BadRecord, match=why):
        convert(**{'x': ecg()} | change)


def test_two_flat_leads_are_tolerated_and_records_normalised():
    x = ecg()
    x[:, 3:5] = .5
    assert convert(x)[0].shape == (2400, 12)
    y = convert(ecg(), contract=Contract(norm='record'))[0]
    assert np.allclose(y.mean(0), 0, atol=1e-9) and np.allclose(y.std(0), 1, atol=1e-3)


# --- WFDB

def test_wfdb_folder_round_trip_with_one_worker_or_two(empty):
    x = ecg(12)
    write_wfdb('in/deep/b', x[:, ::-1], leads=[n.lower() for n in LEADS[::-1]])
    write_wfdb('in/a', x)
    one, two = (prepare(f'w{n}', data.wfdb_folder('in'), workers=n) for n in (1, 2))
    assert one['labels'] == [] and one['hash'] == two['hash']
    ds = Dataset('w2')
    assert ' '.join(ds.id) == 'a deep/b' and close(ds, 0, x, 500)
    equal(signal(ds, 0), signal(ds, 1))
    equal([ds.sex, ds.age], [[1, 1], [63, 63]])


def stored(fmt, x):
    """Samples x (n,) in the formats of signal(5) that wfdb reads but does not write."""
    if fmt in ('8', '61', '160'):                                   # 8: x are differences
        return (x + 32768 * (fmt == '160')).astype({'8': 'i1', '61': '>i2', '160': '<u2'}[fmt])
    a, b, c = (x & 1023).reshape(-1, 3).T                           # three of ten bits
    if fmt == '311':
        return (a | b << 10 | c << 20).astype('<u4')
    return np.stack([a << 1 | (c & 31) << 11, b << 1 | c >> 5 << 11], 1).astype('<u2')


@pytest.mark.parametrize('fmt', '8 16 24 32 61 80 160 212 310 311 508 516 524'.split())
def test_every_wfdb_format_is_read_as_wfdb_reads_it(empty, fmt):
    """And as it was written: one or two samples per frame, V1 to V6 stored seven frames late. wfdb
    itself knows no skew in formats 8 and 508 to 524, nor in frames of two samples."""
    own = fmt in '8 61 160 310 311'.split()
    for n, skew in ((1, 0), (2, 0), (1, 7), (2, 7)):
        counts = np.random.default_rng(n).integers(-60, 60, (30 * n, 12))
        header = write_wfdb('r', e_d_signal=list(counts.T), samps_per_frame=[n] * 12,
                            fmt=['16' if own else fmt] * 12)
        if own:
            x = np.diff(counts, axis=0, prepend=counts[:1]) if fmt == '8' else counts
            stored(fmt, x.reshape(30, n, 12).swapaxes(1, 2).ravel()).tofile('r.dat')
        text = header.read_text().replace('.dat 16', f'.dat {fmt}')
        header.write_text(re.sub(r'(\.dat \S+)(?=.* V\d)', rf'\1:{skew}', text))
        record = Record('r')
        data.load_wfdb(record, Path('r'))
        written = counts.reshape(30, n, 12).mean(1) / 1000
        written[:, 6:] = np.r_[written[skew:, 6:], np.full((skew, 6), np.nan)]
        if not skew or n == 1 and fmt not in '8 508 516 524'.split():
            trusted = wfdb.rdrecord('r').p_signal
            assert np.allclose(record.x, trusted, equal_nan=True, rtol=0, atol=1e-3)
        assert np.allclose(record.x, written, equal_nan=True, rtol=0, atol=1e-6)
        assert record.leads == LEADS and record.fs == 500


# why a record is dropped | what is replaced in its header | by what
DAMAGE = r'''
fs absent | rec 12 .* | rec 12
absurd fs | rec 12 500 | rec 12 5
longer than an hour | 500 5000 | 500 2000000
unreadable length x | 500 5000 | 500 x
several segments, or a / in the name of the record | rec 12 | rec/3 12
several segments, or a / in the name of the record | rec 12 | sub/rec 12
unreadable header | (?s).* | garbage
none of the twelve leads is there | 1000\S+ |
absurd gain | 1000.0(?=.* V6$) | 0
unreadable gain 1000(0.0)/mV | 1000.0\(0\) | 1000(0.0)
unknown unit parsec | /mV | /parsec
leads in different units | /mV(?=.* V6$) | /uV
lead aVF missing or named twice | aVF | aVG
lead V1 missing or named twice | V1 | V2
file missing | rec.dat | gone.dat
a .mat file of version 5 under a header for version 4 | rec.dat 16 | five.mat 16+24
unreadable (ValueError) | 500 5000 | 500 6000'''


@pytest.mark.parametrize('line', DAMAGE.strip().splitlines())
def test_a_damaged_wfdb_record_is_dropped_with_its_reason(empty, line):
    why, old, new = (part.strip() for part in line.split(' |'))
    header = write_wfdb('rec')
    header.write_text(re.sub(f'(?m){old}', new, header.read_text()))
    Path('five.mat').write_bytes(b'MATLAB 5.0 MAT-file' + bytes(10 ** 6))
    assert read_wfdb(header) == why


@pytest.mark.parametrize('code', ['utf-8', 'latin-1'])
def test_odd_headers_are_read(empty, code):
    """No unit (header(5): mV), a micro sign, a comment whose UTF-8 holds byte 85, and so on."""
    header = write_wfdb('rec')
    expected, text = read_wfdb(header), header.read_text()
    for old, new in (('/mV', ''), (r'1000.0\(0\)/mV', '1/µV'), ('rec 12', '# Årdal\nrec 12'),
                     ('rec 12 500', 'rec 12 500/1000(7)')):
        header.write_bytes(re.sub(old, new, text).encode(code))
        equal(read_wfdb(header), expected)


def test_a_channel_that_is_no_ecg_does_no_harm(empty):
    x = ecg()
    header = write_wfdb('rec', leads=('ABP', *LEADS), units=['mmHg'] + ['mV'] * 12,
                        e_p_signal=[np.repeat(x[:, 0], 4), *x.T], samps_per_frame=[4] + [1] * 12)
    equal(read_wfdb(header), read_wfdb(write_wfdb('twelve', x)))


def test_challenge_reads_codes_and_names(empty):
    for name, comments in {'georgia/g1/E1': 'Age: 300/Sex: Female/Dx: 426783006,164889003',
                           'georgia/g1/E2': 'Age: 9 months/Sex: Missing/Dx: 426783006;59118001',
                           'cpsc_2018/A1': 'Age: NaN/Sex: M/Dx: RBBB,I-AVB',
                           'cpsc_2018/A2': 'Age: -1/Sex: Unknown/Dx: Unknown'}.items():
        write_wfdb(f'in/training/{name}', comments=comments.split('/'))
    ds, nan = run('challenge --root in --folds hash'), np.nan
    assert ' '.join(ds.id) == 'cpsc_2018/A1 cpsc_2018/A2 georgia/E1 georgia/E2'
    assert named(ds) == [{'dx2020/RBBB', 'dx2020/I-AVB'}, set(),
                         {'snomed/426783006', 'snomed/164889003'},
                         {'snomed/426783006', 'snomed/59118001'}]
    equal([ds.age, ds.sex], [[nan, nan, 90, nan], [0, nan, 1, nan]])
    # a record coded in one scheme knows nothing in the other
    unknown = [np.isnan(ds.labels[:, ds.tasks[task]]).all(1) for task in ('dx2020', 'snomed')]
    equal(unknown, [[False, True, True, True], [True, True, False, False]])
    assert len(run('challenge --root in --cohort georgia')) == 2
    with pytest.raises(Stop, match='no cohort nowhere.*there: cpsc_2018, georgia'):
        run('challenge --root in --cohort nowhere')


def test_download_asks_physionet_for_the_right_files(empty, monkeypatch):
    asked = []
    for name in ('dl_files', 'dl_database'):
        monkeypatch.setattr(wfdb, name, lambda db, root, what, **_: asked.append((db, what)))
    monkeypatch.setattr(wfdb, 'get_record_list',
                        lambda db: ['training/georgia/g1/', 'training/ptb/g1/'])
    copy_ptbxl('p', [{}, dict(filename_hr='records500/01000/01001_hr')])
    with pytest.raises(Stop, match='nothing left to prepare: 1 file missing'):
        run('ptbxl --root p --rate 500 --download --folders 01000')
    assert asked[1] == ('ptb-xl', [f'records500/01000/01001_hr.{end}' for end in ('hea', 'dat')])
    with pytest.raises(Stop, match='no cohort georgia under new'):  # nothing has come
        run('challenge --root new --download --cohort georgia')
    assert asked[2] == ('challenge-2021', ['training/georgia/g1/'])
    with pytest.raises(Stop, match='no cohort atlantis'):
        run('challenge --root new --download --cohort atlantis')


# --- PTB-XL

def test_ptbxl_sample(here):
    ds = Dataset('sample')
    assert len(ds) == 500 and len(set(ds.patient)) == 466 and (ds.length == 2400).all()
    sizes = [len(ds.tasks[task]) for task in 'all diag form rhythm sub super'.split()]
    assert sizes == [71, 44, 19, 12, 23, 5]
    equal(ds.labels[:, ds.columns('super')].sum(0), [78, 40, 73, 297, 96])     # CD HYP MI NORM STTC
    table = csv.DictReader(open(SAMPLE / 'ptbxl_database.csv'))
    for labels, fold, cells in zip(named(ds), ds.fold, table):
        codes = {f'all/{code}' for code in ast.literal_eval(cells['scp_codes'])}
        assert codes == {name for name in labels if name[:4] == 'all/'}
        assert fold == int(cells['strat_fold'])
    x = wfdb.rdrecord(str(SAMPLE / 'records100/00000/00007_lr')).p_signal
    y = signal(ds, 6)
    assert np.abs(y[::12] - x[::5]).max() < 5e-2                    # the same times
    assert np.abs(y[:, 2] - y[:, 1] + y[:, 0]).max() < 5e-3         # Einthoven, to the rounding
    parts = ds.split()
    assert sum(map(len, parts)) == 500 and sum(len({*ds.patient[rows]}) for rows in parts) == 466


def copy_ptbxl(folder, rows):
    """A PTB-XL of a few rows of the sample's, each a dict of changed cells."""
    original = list(csv.DictReader(open(SAMPLE / 'ptbxl_database.csv')))
    for part in ('00000', '01000'):                                 # the same eight records
        shutil.copytree(SAMPLE / 'records100/00000', f'{folder}/records100/{part}',
                        ignore=lambda _, names: [name for name in names if name > '00009'])
    shutil.copy(SAMPLE / 'scp_statements.csv', folder)
    with open(f'{folder}/ptbxl_database.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, original[0])
        writer.writeheader()
        writer.writerows(original[i] | changes for i, changes in enumerate(rows))


def test_faults_of_ptbxl(empty):
    copy_ptbxl('p', [{}, dict(scp_codes='os.system(1)'), dict(filename_lr='../../etc/passwd'),
                     dict(filename_lr='records100/0'),
                     dict(age='300', patient_id='15709.0', strat_fold='3'),
                     dict(scp_codes="{'NEW': 0.0}", filename_lr='records100/01000/00006_lr')])
    meta = prepare('p', data.ptbxl('p'), workers=1)
    assert meta['dropped'] == {'unreadable scp_codes': 1, 'file missing': 2} and meta['seen'] == 6
    ds = Dataset('p')
    assert ds.age[1] == 90 and 'all/NEW' in named(ds)[2]
    assert ds.patient[0] == ds.patient[1] == 'ptbxl/patient15709'   # pandas writes 15709.0
    assert ' '.join(run('ptbxl --root p --folders 01000 02000').id) == 'ptbxl/6'
    for name, row, why in (('q', dict(ecg_id='1'), 'record id ptbxl/1 appears twice'),
                           ('r', dict(patient_id='15709', strat_fold='4'), 'one fold')):
        copy_ptbxl(name, [{}, row])
        with pytest.raises(Stop, match=why):
            run(f'ptbxl --root {name} --out p')
    assert len(Dataset('p')) == 3                                   # the old one is left alone


# --- arrays and tables of one's own

TABLE = """ , ID , patient_id, Gender, Age, sick, super/MI, dose, fold
0, r0, 15709.0, F, 300, 1, , .5, 4
1, r1, 15709, missing, -1, 0.0, 1, 1, 4.0
,,,, , ,,
2, r2, p, Male, 999,, 0, ,7"""


def test_arrays_and_their_labels(empty, capsys):
    """One rate and rows in order, or rates and units of each record and rows by id."""
    x, nan = np.stack([ecg(6, 250, seed) for seed in range(3)]), np.nan
    np.save('a.npy', x)
    Path('a.csv').write_text(TABLE)
    a = run('array --root a.npy --fs-in 250 --labels a.csv --out a')
    said = capsys.readouterr().out
    assert 'column dose is a number' in said and 'column sick' not in said
    np.savez('b.npz', x=(x * [[[1]], [[1e3]], [[.001]]]).swapaxes(1, 2)[::-1],
             id=['r2', 'r1', 'r0'], fs=[1000, 500, 250], unit=['V', 'uV', 'mV'])
    first, *rows = TABLE.splitlines()
    Path('b.csv').write_text('\n'.join([first, *rows[2:], *rows[:2]]).replace(',', ';'))
    b = run('array --root b.npz --labels b.csv --window .5 --out b')
    for row, fs in enumerate((250, 500, 1000)):
        assert close(a, row, x[row], 250) and close(b, 2 - row, x[row], fs)
    for key, expected in dict(
            id=['r0', 'r1', 'r2'], patient=['patient 15709', 'patient 15709', 'p'], fold=[4, 4, 7],
            sex=[1, nan, 0], age=[90, nan, nan],
            labels=[[1, nan, .5], [0, 1, 1], [nan, 0, nan]]).items():
        equal(getattr(a, key), expected)
        equal(getattr(b, key)[::-1], expected)
    assert a.label_names == ['label/sick', 'super/MI', 'label/dose']


# the lines of a table | why it is refused
BAD = """
sick,sick/1,0 | each column once
id,record/1,0 | mean the same
sick/1,0 | 2 cells, but 1 columns
id,patient,sick/a,1 | 2 cells, but 3 columns
sick/1_0 | '1_0' is no number
sick/1e39 | '1e39' is no number
\xe9t\xe9/1 | not in UTF-8
sick/yes | 'yes' is no number
age,sick/50y,1 | age '50y' is no number
sex,sick/1,1/2,0 | sex '2'
fold,sick/train,1 | fold 'train' is no whole number
sick/1 | has 1 rows for 2"""


@pytest.mark.parametrize('line', BAD.strip().splitlines())
def test_a_cell_that_would_be_misread_stops(empty, line):
    text, why = line.split(' | ')
    np.save('x.npy', np.zeros((2, 12, 800)))
    Path('l.csv').write_bytes(text.replace('/', '\n').encode('latin-1'))
    with pytest.raises(Stop, match=why):
        run('array --root x.npy --fs-in 250 --labels l.csv')


@pytest.mark.parametrize('arrays, why', [
    (dict(x=np.zeros((3, 11, 500))), 'of shape'), (dict(y=[0], fs=1), 'no array x; .* y, fs'),
    (dict(x=np.zeros((2, 12, 9))), 'rate .* is unknown'),
    (dict(x=np.zeros((3, 12, 9)), fs=[1, 2]), '3 records, but 2 fs'),
    (dict(x=np.zeros((0, 12, 9)), fs=1), 'no records'),
    (dict(x=np.zeros((2, 12, 999)), fs=250), 'nothing left.* 2 empty')])
def test_bad_arrays(empty, arrays, why):
    np.savez('a.npz', **arrays)
    with pytest.raises(Stop, match=why):
        run('array --root a.npz')


def test_labels_of_a_wfdb_folder(empty, capsys):
    for name in ('p1/a', 'p1/b', 'p2/c'):
        write_wfdb(f'in/{name}')
    Path('l.csv').write_text('filename,patient,age,super/MI,note\np1/a,7,,1,x\nc.hea,7.0,5,0,y\n'
                             'zz,8,9,1,z\n')
    ds = run('wfdb --root in --labels l.csv --ignore note')
    printed = capsys.readouterr().out
    assert '3 rows; 2 records have one, 1 do not' in printed
    assert '1 folds of 2 to 2 records' in printed            # of one patient; p1/b is in no fold
    assert ' '.join(ds.id) == 'p1/a p1/b p2/c' and ds.label_names == ['super/MI']
    equal(ds.patient, ['patient 7', 'p1/b', 'patient 7'])
    equal([*ds.labels.T, ds.age], [[1, np.nan, 0], [63, 63, 5]])
    write_wfdb('in/p2/a')
    for name, why in (('x', 'none of the records'), ('a', 'a is the name of several records')):
        Path('l.csv').write_text(f'id,super/MI\n{name},1\n')
        with pytest.raises(Stop, match=why):
            run('wfdb --root in --labels l.csv')


def test_what_looks_wrong_is_asked_about(here, capsys):
    """Einthoven's law holds at any rate and gain; the usual heart rate and height do not."""
    x = Dataset('sample').collate(np.arange(30), np.zeros(30, int), 2400)['x'].numpy()
    swapped = x[:, [0, 1, 2, 4, 5, 3, *range(6, 12)]]               # aVL, aVF, aVR
    for name, array, fs, wrong in (('right', x, 240, set()), ('fast', x, 500, {'unusual'}),
                                   ('small', .2 * x, 240, {'unusual'}),
                                   ('swapped', swapped, 240, {'30 whose limb leads do not fit'})):
        np.save('known.npy', array)
        data.main(f'array --root known.npy --out {name} --workers 1 --fs-in {fs}'.split())
        said = capsys.readouterr().out
        assert {w for w in ('unusual', '30 whose limb leads do not fit') if w in said} == wrong


# --- folds, and recordings that are the same

def test_folds_are_stratified_for_few_labelled_records_else_hashed():
    patient = np.array([f'p{i}' for i in range(1000)])
    hashed = [fold_of(p) for p in patient]
    assert abs(np.bincount(hashed)[1:] - 100).max() < 35
    for n, label, even in ((999, ['a'], True), (1000, ['a'], False), (999, (), False)):
        index = dict(patient=patient[:n], fold=np.full(n, -1))
        fold = data.draw_folds(index, [label] * n, 'auto')
        equal(sorted(np.bincount(fold)) if even else fold, [99] + [100] * 9 if even else hashed[:n])


def test_negatives_are_tested_and_given_folds_are_kept(empty):
    np.save('x.npy', np.stack([ecg(3, 240, seed) for seed in range(40)]))
    rows = [f'{i % 4 // 3},{i // 10 if i < 30 else ""},{"NA" if i < 33 else "p1"}'
            for i in range(40)]
    Path('l.csv').write_text('\n'.join(['sick,fold,patient', *rows]))
    ds = run('array --root x.npy --fs-in 240 --labels l.csv --ignore fold patient')
    equal(np.bincount(ds.fold), [4] * 10)
    equal(np.bincount(ds.fold, ds.labels[:, 0]), [1] * 10)
    ds = run('array --root x.npy --fs-in 240 --labels l.csv')       # fold 2 tests, blanks train
    equal([len(rows) for rows in ds.split()], [20, 10, 10])
    assert len(set(ds.patient)) == 34


def test_a_recording_is_known_under_every_name(empty):
    """Three recordings of PTB-XL read by two readers, copied in another order of leads and unit,
    and, as the Challenge names one, found by its name alone."""
    copy_ptbxl('p', [{}] * 3)
    x = [wfdb.rdrecord(f'p/records100/00000/0000{i}_lr').p_signal for i in (1, 2, 3)]
    np.savez('c.npz', x=np.float32(1000 * np.stack(x))[..., ::-1], leads=LEADS[::-1], fs=100,
             unit='uV')
    write_wfdb('any/folder/HR00001')
    p, w = run('ptbxl --root p'), run('wfdb --root p/records100/00000')
    c, h = run('array --root c.npz'), run('challenge --root any')
    for other in (w, c):
        equal(other.signal[:3], p.signal)
        assert overlap(p, other.names(range(3))).all() and overlap(other, p.names([2]))[2]
    equal(w.recording[:3], p.recording)
    for names in (h.names([0]), {p.patient[0]}):
        equal(overlap(p, names), [True, False, False])
    assert overlap(h, p.names([0])) and not overlap(c, h.names([0])).any()
    flat = [ecg(seed=seed) * (np.arange(12) != 1) for seed in (0, 1)]        # II
    assert data.signal_hash(flat[0]) != data.signal_hash(flat[1])
    assert data.same_recording('records500/00000/00001_hr') == p.recording[0]


def test_no_training_row_is_tested_under_another_name(empty):
    """Two datasets with folds 1 to 10 and 0 to 19 that share recordings, patients and signals."""
    rng = np.random.default_rng(0)
    for name, n, folds in (('a', 60, range(1, 11)), ('b', 90, range(20))):
        numbers = zip(rng.permutation(999)[:n], rng.permutation(999), rng.integers(0, 300, n))
        prepare(name, [Record(f'{name}/JS{i:05}', f'p{k}', ecg(3, 240, seed), 240, LEADS, 'mV',
                              fold=folds[k % len(folds)]) for i, seed, k in numbers], workers=1)
    ds = Dataset('a,b')
    own = lambda rows: {*ds.patient[rows], *ds.signal[rows], *(name[2:] for name in ds.id[rows])}
    train, validation, test = map(own, ds.split())
    assert not train & validation and not train & test and not validation & test
    for i in range(len(ds)):                                        # nor another one of its patient
        assert not own([i]) & test or ds.patient[i] not in train
    equal(ds.split()[2], np.flatnonzero(np.r_[Dataset('a').fold == 10, Dataset('b').fold == 19]))
    assert len(ds.split()[0]) > 40 and len(ds.split()[1]) > 3


# --- prepared datasets and batches

def test_a_dataset_is_replaced_when_the_new_one_is_complete(empty):
    def interrupted():
        yield from data.synthetic(1)
        raise KeyboardInterrupt

    prepare('d', data.synthetic(3), workers=1)
    with pytest.raises(KeyboardInterrupt):
        prepare('d', interrupted(), workers=1)
    assert len(Dataset('d')) == 3 and [p.name for p in Path('datasets').iterdir()] == ['d']
    prepare('d', data.synthetic(2), workers=1)
    assert len(Dataset('d')) == 2
    file = Path('datasets/d/signals.i16')
    file.write_bytes(file.read_bytes()[:24000])
    with pytest.raises(Stop, match='d is damaged.*prepare it again'):
        Dataset('d')


def test_datasets_join(here):
    both, sample, synthetic = map(Dataset, ('sample,synthetic', 'sample', 'synthetic'))
    x = both.collate([507, 508, 3], [9, 0, 5], 600)['x']
    equal(x[0].T, signal(synthetic, 7)[9:609])
    equal(x[2].T, signal(sample, 3)[5:605])
    equal(both.labels[507, both.columns('tail')], synthetic.labels[7, synthetic.columns('tail')])
    assert np.isnan(both.labels[507, both.columns('super')]).all()


def test_batches_depend_on_seed_and_step_alone_and_visit_every_record_once(here, monkeypatch):
    ds, visits = Dataset('synthetic'), []
    rows = ds.split()[0][:40]
    make = lambda seed, step: Dataset('synthetic').batch(rows, 600, 16, seed, step)
    for key, value in make(0, 5).items():
        equal(value, make(0, 5)[key])
    x = make(0, 5)['x']
    assert x.shape == (16, 12, 600) and x.dtype == torch.float32
    assert not torch.equal(x, make(0, 6)['x']) and not torch.equal(x, make(1, 5)['x'])
    monkeypatch.setattr(ds, 'collate', lambda rows, starts, _: visits.extend(zip(rows, starts)))
    for step in range(10):                                          # 80 crops of 40 records
        ds.batch(rows, 600, 8, 0, step)
    order, starts = zip(*visits)
    assert sorted(order[:40]) == sorted(order[40:]) == sorted(rows) and order[:40] != order[40:]
    assert 0 <= min(starts) < max(starts) <= 1800 and len(set(starts)) > 50


def test_crops_tile_the_record_and_peaks_follow_them(here):
    ds = Dataset('synthetic')
    equal(ds.crops([4, 2], 700), [[4, 4, 4, 2, 2, 2], [0, 700, 1400] * 2])
    peaks = ds.peaks[ds.peak_start[4]:ds.peak_start[5]].tolist()
    expected = [peak - 300 for peak in peaks if 300 <= peak < 900]
    assert ds.collate([4], [300], 600)['peaks'].tolist() == [expected] and expected


def test_records_are_shown_and_system_errors_are_one_line(here):
    assert data.show('sample', 'ptbxl/4') == data.show('sample', '3')
    assert Path('out/sample_3.png').stat().st_size > 10_000
    with pytest.raises(Stop, match='records 0 to 499'):
        data.show('sample', '500')
    with pytest.raises(Stop, match='^nowhere/x: No such file or directory$'):
        data.run_script(partial(open, 'nowhere/x'))
