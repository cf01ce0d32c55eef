"""The readers of the papers' datasets on tiny files of each published schema, stratified folds, the table of tasks, the command line."""
import dataclasses
import shlex
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import data
from data import LEADS, TASKS, Dataset, Stop, prepare, stratify
from tests.test_data import ecg, write_wfdb

SAMPLE = Path(__file__).resolve().parent.parent / 'sample/ptbxl'


def table(path, text):
    """A csv file; the columns of `text` may be padded with blanks after the separator |."""
    lines = [[cell.strip() for cell in line.split('|')] for line in text.strip().splitlines()]
    path.write_text('\n'.join(','.join(f'"{cell}"' if ',' in cell else cell for cell in cells) for cells in lines) + '\n')


def named(ds, row):
    """The labels of a row that are 1."""
    return {n for n, v in zip(ds.label_names, ds.labels[row]) if v == 1}


def value(ds, row, name):
    return ds.labels[row, ds.label_names.index(name)]


def signal(ds, row):
    """A record of a prepared dataset (T, 12)."""
    return ds.crop(np.array([row]), np.array([0]), int(ds.length[row]))[0].T.numpy()


# --- tiny files of each published schema

def make_zzu(root):
    for name, x in (('P00/P00001/P00001_E01', ecg(12, seed=1)), ('P00/P00002/P00002_E01', ecg(6, seed=2)), ('P00/P00002/P00002_E02', ecg(11, seed=3))):
        path = root / 'Child_ecg' / name
        write_wfdb(path.parent, path.name, x[:, ::-1], comments=(), leads=[n.upper() for n in LEADS[::-1]])
    table(root / 'ECGCode.csv', '''
        Description | AHA(Category&Code) | CHN(Category&Code)
        Sinus tachycardia | C21 | C13
        Atrial premature complexes, nonconducted | D31 | D22
        Left ventricular high voltage | N/A | J106''')
    table(root / 'DiseaseCode.csv', '''
        Disease Type | Disease Category | ICD-10 Code | ICD-10 Description
        Myocarditis | Fulminant | (F) I40.0 | x
        Other | OD | See attribute dictionary file | x''')
    table(root / 'AttributesDictionary.csv', '''
        Filename | ECG_ID | Patient_ID | Age | Gender | Lead | AHA_code | CHN_code | ICD-10 code
        P00/P00001/P00001_E01 | P00001_E01 | P00001 | 572d | 'Female' | 12 | 'C21';'D31';'Left ventricular high voltage' | 'C13' | '(F) I40.0';'Q21.0'
        P00/P00002/P00002_E01 | P00002_E01 | P00002 | 3653d | 'Male' | 12 | 'C21+Modifier362' | 'C13' | 'J18.9'
        P00/P00002/P00002_E02 | P00002_E02 | P00002 | 3653d | 'Male' | 12 | Null | Null | Null
        P00/P00003/P00003_E01 | P00003_E01 | P00003 | 10d | 'Male' | 9 | 'C21' | 'C13' | 'J18.9\'''')
    return root


def make_sph(root):
    h5py = pytest.importorskip('h5py')
    (root / 'records').mkdir(parents=True)
    for i, name in enumerate(('A00001', 'A00002')):
        with h5py.File(root / f'records/{name}.h5', 'w') as f:
            f['ecg'] = ecg(12, seed=i).T.astype(np.float16)
    table(root / 'metadata.csv', '''
        ECG_ID | AHA_Code | Patient_ID | Age | Sex | N | Date
        A00001 | 22;23 | S00001 | 55 | M | 6000 | 2020-03-04
        A00002 | 60+310;147 | S00002 | 32 | F | 6000 | 2019-09-03
        A00003 | 1 | S00003 | 63 | M | 6000 | 2020-07-16''')
    return root


def make_code15(root):
    h5py = pytest.importorskip('h5py')
    root.mkdir(parents=True)
    with h5py.File(root / 'exams_part0.hdf5', 'w') as f:
        x = np.zeros((3, 4096, 12))
        x[0, 648:3448], x[1, 48:4048] = ecg(7, 400, 1), ecg(10, 400, 2)
        x[0, 648:3448, 0], x[1, 48:4048, 0] = 1.5, 2.5           # a lead whose level tells the records apart and is never 0
        f['exam_id'], f['tracings'] = np.array([30, 10, 0]), x
    table(root / 'exams.csv', '''
        exam_id | age | is_male | nn_predicted_age | 1dAVb | RBBB | LBBB | SB | ST | AF | patient_id | death | timey | normal_ecg | trace_file
        10 | 38 | True | 40 | False | True | False | False | False | False | 7 | False | 2.1 | True | exams_part0.hdf5
        20 | 38 | True | 40 | False | True | False | False | False | False | 7 | False | 2.1 | True | exams_part0.hdf5
        30 | 73 | False | 67 | True | False | False | False | False | True | 8 | False | 0.1 | False | exams_part0.hdf5
        40 | 73 | False | 67 | True | False | False | False | False | True | 8 | False | 0.1 | False | exams_part9.hdf5''')
    return root


def make_echonext(root):
    root.mkdir(parents=True)
    for i, (split, n) in enumerate((('train', 2), ('val', 1), ('test', 1))):
        np.save(root / f'EchoNext_{split}_waveforms.npy', np.stack([ecg(10, 250, 10 * i + j)[None] for j in range(n)]).astype(np.float32))
    flags = [' | '.join(data.FLAGS), *(' | '.join(str(int(k == i)) for k in range(11)) for i in range(5))]
    front = ['ecg_key | patient_key | split | age_at_ecg | sex | shd_moderate_or_greater_flag', 'e0 | p0 | test | 50 | Female | 1', 'e1 | p1 | train | 61 | Male | 0',
             'e2 | p2 | no_split | 70 | Male | 0', 'e3 | p1 | train | 62 | Male | 1', 'e4 | p3 | val | 80 | Female | 0']
    table(root / 'echonext_metadata_100k.csv', '\n'.join(f'{a} | {b}' for a, b in zip(front, flags)))
    return root


def make_mimic(root, tables=()):
    order = ('I', 'II', 'III', 'aVR', 'aVF', 'aVL', 'V1', 'V2', 'V3', 'V4', 'V5', 'V6')      # as on disk
    rows, machine = [], []
    for i, (subject, study) in enumerate(((1, 101), (1, 102), (2, 201), (3, 301), (4, 401))):
        path, x = f'files/p1/p{subject}/s{study}/{study}', ecg(10, seed=i)
        x[1000:1100, 0] = 4.2                                    # beyond what the papers keep
        write_wfdb(root / Path(path).parent, str(study), x[:, [LEADS.index(n) for n in order]], comments=(), leads=order)
        rows.append(f'{subject} | {study} | {study} | 2180-07-23 | {path}')
        machine.append(f'{subject} | {study} | {65535 if i else 810} | 40 | 140 | 440 | {999 if i else 51} | -12 | 29999')
    table(root / 'record_list.csv', '\n'.join(['subject_id | study_id | file_name | ecg_time | path', *rows]))
    table(root / 'machine_measurements.csv', '\n'.join(
        ['subject_id | study_id | rr_interval | qrs_onset | qrs_end | t_end | p_axis | qrs_axis | t_axis', *machine]))
    if 'icd' in tables:                                          # 102: not the first of its stay; 301: no code; 401: not in the ED
        table(root / 'records_w_diag_icd10.csv', '''
            study_id | subject_id | all_diag_all | gender | age | ecg_no_within_stay | ecg_taken_in_ed | strat_fold
            101 | 1 | ['I2510', 'W19XXXA'] | F | 52.0 | 0 | True | 18
            102 | 1 | ['I2510'] | F | 52.0 | 1 | True | 18
            201 | 2 | ['E785'] | missing | | 3 | True | 4
            301 | 3 | [] | M | 40.0 | 0 | True | 5
            401 | 4 | ['I10'] | M | 40.0 | 0 | False | 19''')
    if 'mds' in tables:
        table(root / 'mds_ed.csv', '''
            general_study_id | deterioration_severe_hypoxemia | deterioration_icu_24h | deterioration_mortality_1d | deterioration_mortality_stay | biometrics_bmi | vitals_sbp_first | labvalues_bilirubin,_total_first
            101 | 1 | 0 | -999 | 1 | 25 | 120 | 1.5
            999 | 0 | 1 | 0 | 0 | 26 | 130 | 2.5
            998 | 0 | 1 | 0 | 0 | 24 | 110 | .5''')
    return root


# --- each reader

def test_zzu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.main(['zzu', '--root', str(make_zzu(tmp_path / 'z')), '--workers', '1', '--window', '10', '--no-peaks'])
    ds = Dataset('zzu')
    assert list(ds.id) == ['zzu/P00/P00001/P00001_E01', 'zzu/P00/P00002/P00002_E02'] and list(ds.patient) == ['zzu/P00001', 'zzu/P00002']
    assert set(ds.label_names) == {'aha/Sinus tachycardia', 'aha/Atrial premature complexes, nonconducted'}
    assert named(ds, 0) == set(ds.label_names) and (ds.labels[1] == 0).all()       # no statement: no, not unknown
    assert ds.age.tolist() == pytest.approx([572 / 365.25, 3653 / 365.25]) and ds.sex.tolist() == [1, 0] and set(ds.fold) <= set(range(10))
    assert np.abs(signal(ds, 0) - data.resample(ecg(12, seed=1), 500, 240)).max() < 2e-3
    first, short, null = data.zzu(tmp_path / 'z')
    assert first.strata == ('Fulminant', 'sex 1', 'age 1') and null.strata == ('sex 0', 'age 2') and set(short.labels.values()) == {0}


def test_sph(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = make_sph(tmp_path / 's')
    data.main(['sph', '--root', str(root), '--workers', '1', '--no-peaks'])
    ds = Dataset('sph')
    assert list(ds.id) == ['sph/A00001', 'sph/A00002'] and named(ds, 0) == {'aha/22', 'aha/23'} and named(ds, 1) == {'aha/60', 'aha/147'}
    assert ds.sex.tolist() == [0, 1] and ds.age.tolist() == [55, 32] and list(ds.patient) == ['sph/S00001', 'sph/S00002']
    assert [set(r.strata) for r in data.sph(root)][1] == {'aha 60', 'aha 147', 'modifier 310', 'sex 1', 'age 1'}
    assert np.abs(signal(ds, 1) - data.resample(ecg(12, seed=1), 500, 240)).max() < 5e-3


def test_code15(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = make_code15(tmp_path / 'c')
    meta = prepare('c', data.code15(root), workers=1, peaks=False)
    ds = Dataset('c')
    assert list(ds.id) == ['code15/10', 'code15/30'] and meta['dropped'] == {'exam not in its file': 1, 'file missing': 1}
    assert ds.label_names == [f'code/{n}' for n in data.FINDINGS[:6]] and named(ds, 0) == {'code/RBBB'} and named(ds, 1) == {'code/1dAVb', 'code/AF'}
    assert ds.length.tolist() == [2400, 1680] and ds.sex.tolist() == [0, 1] and ds.fold.tolist() == [data.fold_of(p) for p in ds.patient]
    assert np.abs(signal(ds, 0)[:, 0] - 2.5).max() < .01 and np.abs(signal(ds, 1)[:, 0] - 1.5).max() < .01


def test_hdf5_sources_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'h5py', None)
    for source in ('sph', 'code15'):
        with pytest.raises(Stop, match='^[^\n]*pip install h5py$'):
            data.main([source, '--root', str(tmp_path)])


def test_echonext(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = make_echonext(tmp_path / 'e')
    data.main(['echonext', '--root', str(root), '--workers', '1', '--no-peaks'])
    ds = Dataset('echonext')
    assert list(ds.id) == [f'echonext/e{i}' for i in (0, 1, 3, 4)] and ds.fold.tolist() == [9, 0, 0, 8]
    assert [r.tolist() for r in ds.split()] == [[1, 2], [3], [0]] and ds.sex.tolist() == [1, 0, 0, 1] and ds.age.tolist() == [50, 61, 62, 80]
    assert {t: len(c) for t, c in ds.tasks.items()} == {'echonext': 11, 'shd': 1}
    assert named(ds, 0) == {'echonext/lvef_lte_45', 'shd/shd_moderate_or_greater'} and named(ds, 1) == {'echonext/lvwt_gte_13'}
    for row, seed in ((0, 20), (1, 0), (2, 1), (3, 10)):         # the test split's first, the training split's first and second, ...
        assert np.abs(signal(ds, row) - data.resample(ecg(10, 250, seed), 250, 240)).max() < 2e-3
    np.save(root / 'EchoNext_val_waveforms.npy', np.zeros((2, 1, 2500, 12)))
    with pytest.raises(Stop, match='has 2 records, but .* has 1 of split val'):
        list(data.echonext(root))


def test_mimic_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.main(['mimic', '--root', str(make_mimic(tmp_path / 'm')), '--workers', '1', '--no-peaks'])
    ds = Dataset('mimic')
    assert list(ds.id) == [f'mimic/{s}' for s in (101, 102, 201, 301, 401)] and ds.fold.tolist() == [data.fold_of(p) for p in ds.patient]
    assert ds.label_names == [f'features/{n}' for n in data.FEATURES] and ds.patient.tolist() == [f'mimic/{i}' for i in (1, 1, 2, 3, 4)]
    nan = np.nan
    assert np.allclose(ds.labels[0], [810, 100, 400, 400 / .9, 51, -12, nan], equal_nan=True)
    assert np.allclose(ds.labels[1], [nan, 100, 400, nan, nan, -12, nan], equal_nan=True)
    expected = data.resample(np.clip(ecg(10, seed=0), -3, 3), 500, 240)
    assert np.abs(signal(ds, 0)[:, 1:] - expected[:, 1:]).max() < 2e-3               # aVL and aVF by name, though swapped on disk
    assert 2.9 < signal(ds, 0)[:, 0].max() < 3.5                 # the plateau of 4.2 mV is clipped (and rings a little)


def test_mimic_with_credentialed_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = make_mimic(tmp_path / 'm', ('icd', 'mds'))
    prepare('m', data.mimic(root, 1, 1), workers=1, peaks=False)
    ds = Dataset('m')
    assert list(ds.id) == ['mimic/101', 'mimic/201'] and ds.fold.tolist() == [18, 4] and np.array_equal(ds.sex, [1, np.nan], equal_nan=True)
    assert named(ds, 0) == {'cardiac/I25', 'cardiac/I251', 'cardiac/I2510', 'noncardiac/W19', 'sex/female', 'deterioration/severe_hypoxemia', 'mortality/stay'}
    assert named(ds, 1) == {'noncardiac/E78', 'noncardiac/E785'} and value(ds, 1, 'cardiac/I25') == 0        # no cardiac code: known to be none
    assert value(ds, 0, 'age/years') == 52 and np.isnan(value(ds, 1, 'age/years')) and np.isnan(value(ds, 1, 'sex/female'))
    assert value(ds, 0, 'icu/24h') == 0 and np.isnan(value(ds, 0, 'mortality/1d')) and np.isnan(value(ds, 1, 'icu/24h'))
    assert [value(ds, 0, n) for n in ('biometrics/bmi', 'vitals/sbp', 'labs/Bilirubin Total')] == [25, 120, 1.5]
    prepare('rare', data.mimic(root, 2, 3), workers=1, peaks=False)                 # counted in the whole table: I25 thrice, I10 once, E78 once
    assert {n for n in Dataset('rare').label_names if 'cardiac' in n} == {'cardiac/I25', 'cardiac/I251', 'cardiac/I2510'}


def test_icd_codes_are_cut_and_their_ancestors_added():
    assert data.icd_codes("['W19XXXA', 'I2510', 'I10', 'T400X1A']") == {'W19', 'I25', 'I251', 'I2510', 'I10', 'T40', 'T400'}
    assert data.icd_codes('[]') == data.icd_codes('') == set()


def test_outer_percent_of_a_number_is_unknown(tmp_path):
    rows = [f'{i} | {i} | 1' for i in range(201)]
    table(tmp_path / 'mds_ed.csv', '\n'.join(['general_study_id | biometrics_weight | deterioration_ecmo', *rows]))
    names, values = data.mds_outcomes(tmp_path / 'mds_ed.csv', str)
    weight = np.array([v[names.index('biometrics/weight')] for v in values.values()])
    assert np.flatnonzero(np.isnan(weight)).tolist() == [0, 1, 199, 200] and all(v[names.index('deterioration/ecmo')] == 1 for v in values.values())


def test_challenge_folds_and_the_merged_code_of_ningbo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(20):
        write_wfdb(tmp_path / 'c/ningbo/g1', f'JS{i}', ecg(3, seed=i), comments=[f'Dx: {(733534002, 164909002)[i % 2]},426783006' if i < 19 else 'Age: 5'])
    write_wfdb(tmp_path / 'c/georgia/g1', 'E1', ecg(3), comments=['Dx: 733534002'])
    data.main(f'challenge --root {tmp_path}/c --workers 1 --no-peaks --cohort ningbo --out n'.split())
    ds = Dataset('n')
    assert sorted(ds.label_names) == ['snomed/164909002', 'snomed/426783006'] and np.nansum(ds.labels) == 38
    row = list(ds.id).index('ningbo/JS19')                       # the one without Dx
    count = Counter(np.delete(ds.fold, row).tolist())
    assert ds.fold[row] == -1 and sorted(count) == list(range(10)) and set(count.values()) <= {1, 2} and row in ds.split()[0]
    data.main(f'challenge --root {tmp_path}/c --workers 1 --no-peaks --folds hash --out h'.split())
    ds = Dataset('h')
    assert ds.fold.tolist() == [data.fold_of(i) for i in ds.id] and named(ds, list(ds.id).index('georgia/E1')) == {'snomed/733534002'}


def test_folds_given_by_the_source_are_never_stratified_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save('a.npy', np.stack([ecg(4, 250, s) for s in range(4)]))
    for column, expected in (('fold', [3, 1, 2, 3]), ('number', None)):
        Path('l.csv').write_text(f'{column},sick\n3,1\n1,1\n2,1\n3,0\n')
        data.main('array --root a.npy --fs-in 250 --labels l.csv --workers 1 --no-peaks --folds stratified'.split())
        fold = Dataset('array').fold.tolist()
        assert fold == expected if expected else len(set(fold)) == 4


def test_sequences(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main('sequences --records 40 --seed 3'.split())
    assert 'III' not in capsys.readouterr().out                  # Einthoven's law is of hearts
    assert data.finish(dataclasses.replace(next(data.sequences(1)), peaks=None), data.Contract(), False)[2]['einthoven']       # and is still looked at there
    ds = Dataset('sequences')
    assert {t: len(c) for t, c in ds.tasks.items()} == {'sequence': 8} and (ds.labels.sum(0) == 5).all() and (ds.labels.sum(1) == 1).all()
    loudest = np.array([signal(ds, i).std(0).max() for i in range(40)])
    assert .09 < loudest.min() < loudest.max() < 2.1 and len(ds.peaks) == 0
    more = list(data.sequences(48, seed=3))[:40]
    assert all(np.abs(r.x - signal(ds, i)).max() < 6e-4 for i, r in enumerate(more))
    assert np.linalg.matrix_rank(more[0].x - more[0].x.mean(0), tol=1) == 2          # two sources, and noise far below them
    t, rng = np.arange(2400) / 240, np.random.default_rng(0)
    assert set(data.sequence('square', t, rng)) <= {-1, 0, 1} and all(np.isfinite(data.sequence(n, t, rng)).all() for n in data.SEQUENCES)


# --- stratified folds

def plain(Y, group, folds, seed):
    """The same rule in plain Python: the rarest label first, its groups by multiplicity; the fold by lack of the label, of the group's
    labels, of records, by lot."""
    members = [[i for i in range(len(Y)) if group[i] == g] for g in sorted(set(group))]
    count = [[sum(Y[i][k] for i in m) for k in range(len(Y[0]))] for m in members]
    tie, fold = np.random.default_rng(seed).random((len(members), folds)), {}
    labelled = [g for g in range(len(members)) if any(count[g])]
    while rest := [g for g in labelled if g not in fold]:
        carry = {k: [g for g in rest if count[g][k]] for k in range(len(Y[0]))}
        k = min((k for k in carry if carry[k]), key=lambda k: (len(carry[k]), k))
        for g in sorted(carry[k], key=lambda g: (-count[g][k], g)):
            got = lambda f, what: sum(what(h) for h in fold if fold[h] == f)
            own = lambda h: sum(n for n, mine in zip(count[h], count[g]) if mine)
            fold[g] = max(range(folds), key=lambda f: (-got(f, lambda h: count[h][k]), -got(f, own), -got(f, lambda h: len(members[h])), tie[g][f]))
    return [fold.get(sorted(set(group)).index(g), -1) for g in group]


def test_stratification_is_the_plain_rule():
    rng = np.random.default_rng(0)
    Y = (rng.random((60, 5)) < [.5, .3, .2, .1, .05]).astype(int)
    for group in (np.arange(60), rng.integers(0, 40, 60)):
        assert stratify(Y, group, 4, 7).tolist() == plain(Y.tolist(), group.tolist(), 4, 7)


def test_stratified_folds_keep_the_ratios():
    rng = np.random.default_rng(1)
    one = np.eye(8, dtype=bool)[rng.choice(8, 3000, p=np.arange(1, 9) / 36)]         # one label each: as even as whole numbers can be
    several = rng.random((3000, 12)) < .3 * .7 ** np.arange(12)
    for Y, off in ((one, 1), (several, 1)):
        fold = stratify(Y)
        counts = np.stack([Y[fold == f].sum(0) for f in range(10)])
        assert np.abs(counts - Y.sum(0) / 10).max() <= off and counts.sum() == Y.sum()
        assert ((fold == -1) == ~Y.any(1)).all() and np.array_equal(fold, stratify(Y)) and not np.array_equal(fold, stratify(Y, seed=1))


def test_patients_stay_in_one_stratified_fold():
    rng = np.random.default_rng(2)
    Y, patient = rng.random((2000, 6)) < .2, rng.integers(0, 1200, 2000)
    fold = stratify(Y, patient)
    assert all(len(set(fold[patient == p])) == 1 for p in set(patient)) and (fold[Y.any(1)] >= 0).all()
    counts = np.stack([Y[fold == f].sum(0) for f in range(10)])
    assert np.abs(counts - Y.sum(0) / 10).max() <= 1.5


# --- the table of tasks

PAPER = ('ningbo cpsc2018 cpsc_extra georgia chapman chapman_rhythm sph ptbxl_all ptbxl_diag ptbxl_form ptbxl_rhythm ptbxl_sub ptbxl_super zzu echonext '
         'mimic_cardiac mimic_noncardiac mimic_deterioration mimic_mortality mimic_icu mimic_sex mimic_age mimic_biometrics mimic_features mimic_labs '
         'mimic_vitals').split()


def test_the_table_holds_both_papers():
    names, outputs = list(TASKS), {n: TASKS[n].classes for n in PAPER}
    assert names[:26] == PAPER and len(names) == 37 and all(n.startswith('sc_') for n in names[26:])
    assert sum(v for n, v in outputs.items() if n.startswith('mimic')) == 1127       # outputs of the joint MIMIC model, 1092 of them binary
    assert sum(v for n, v in outputs.items() if TASKS[n].metric == 'MAE') == 35
    assert sum(v or 0 for v in outputs.values()) == 1607         # all but Chapman's rhythms, which the paper does not count separately


@pytest.mark.parametrize('task', TASKS)
def test_every_command_of_the_table_is_one(task):
    t = TASKS[task]
    words = shlex.split(t.prepare)
    a, contract = data.arguments(words[2:])
    assert words[:2] == ['python', 'data.py'] and a.root == 'ROOT' and (a.out or a.source) == t.data
    assert (contract.fs, contract.norm != 'none') == ((100, t.data in ('sc_cpsc2018', 'sc_csn', 'sc_ptbxl')) if task.startswith('sc_') else (240, False))
    assert t.folds is None or (len(t.folds) == 3 and not set(t.folds[0]) & set(t.folds[1]) and not set(t.folds[1]) & set(t.folds[2]))


SOURCES = {'ptbxl': lambda root: data.ptbxl(SAMPLE), 'zzu': lambda root: data.zzu(make_zzu(root)), 'sph': lambda root: data.sph(make_sph(root)),
           'echonext': lambda root: data.echonext(make_echonext(root)), 'mimic': lambda root: data.mimic(make_mimic(root, ('icd', 'mds')), 1, 1)}


@pytest.mark.parametrize('source', [*SOURCES, 'challenge'])
def test_label_sets_of_the_table_are_those_of_the_readers(tmp_path, source):
    if source == 'challenge':                                    # its labels stand in the files
        write_wfdb(tmp_path / 'georgia/g1', 'E1', ecg(3))
        (record,) = data.challenge(tmp_path)
        record.load(record)
        records = [record]
    else:
        records = SOURCES[source](tmp_path / 'root')
    emitted = {name.split('/')[0] for record in records for name in record.labels or ()}
    wanted = {part.split('/')[0] for t in TASKS.values() if t.prepare.split()[2] == source for part in f'{t.trained}+{t.scored}'.split('+')}
    assert wanted and wanted <= emitted


def test_columns_of_joined_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare('m', data.mimic(make_mimic(tmp_path / 'm', ('icd',)), 1, 1), workers=1, peaks=False)
    ds = Dataset('m')
    c, n = ds.columns('cardiac'), ds.columns('noncardiac')
    assert ds.columns('cardiac+noncardiac') == c + n == ds.columns('cardiac+noncardiac+cardiac+labs') and ds.columns('sex/female+sex') == ds.columns('sex')
    assert ds.columns(TASKS['mimic_age'].trained) and ds.columns('cardiac/I25+cardiac/I99') == [ds.label_names.index('cardiac/I25')]
    with pytest.raises(Stop, match="no task 'labs.vitals'"):
        ds.columns('labs+vitals')


# --- the command line

@pytest.mark.parametrize('line, why', [
    ('synthetic --no-peaks', 'synthetic makes no use of --no-peaks'), ('synthetic extra', "makes no use of 'extra'"), ('ptbxl --root . --folds hash', '--folds'),
    ('show sample --root x --strict', 'show makes no use of --root, --strict'), ('wfdb --root . --seed 3', '--seed'), ('--out x', 'without a source makes no use of --out'),
    ('synthetic --filter hp500', 'hp500 must stay below 120 Hz'), ('sample --filter lp50', 'lp50 must stay below 50 Hz'), ('mimic --root . --least 0', '--least'),
    ('wfdb --root . --fs 100 --filter hp0.5+lp60', 'lp60 must stay below 50 Hz'), ('zzu --root .', 'no ECGCode.csv'), ('mimic --root .', 'no machine_measurements.csv'),
    ('echonext --root .', 'no echonext_metadata_100k.csv'), ('zzu', '--root DIR is missing')])
def test_what_would_be_ignored_or_fail_is_one_line(tmp_path, monkeypatch, line, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stop, match=why) as stop:
        data.main(line.split())
    assert '\n' not in str(stop.value) and not any((tmp_path / 'datasets').glob('[!.]*'))
