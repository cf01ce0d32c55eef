"""The readers of the papers' datasets on tiny files of each published schema, stratified folds, the
table of tasks, the command line."""
import shlex
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal as equal

import data
from data import LEADS, TASKS, Dataset, Record, Stop, prepare, stratify
from .test_data import SAMPLE, close, ecg, named, run, signal, write_wfdb


def table(path, text):
    """A csv file of cells separated by | and padded with blanks."""
    lines = [[cell.strip() for cell in line.split('|')] for line in text.strip().splitlines()]
    quoted = [','.join(f'"{cell}"' if ',' in cell else cell for cell in cells) for cells in lines]
    Path(path).write_text('\n'.join(quoted) + '\n')


# --- each reader, on files of its published schema

def make_zzu(root):
    for name, seconds in (('1/P00001_E01', 12), ('2/P00002_E01', 6), ('2/P00002_E02', 11)):
        path = root / f'Child_ecg/P00/P0000{name}'
        write_wfdb(path, ecg(seconds)[:, ::-1], (), LEADS[::-1])
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
        Filename | Patient_ID | Age | Gender | Lead | AHA_code | CHN_code | ICD-10 code
        P00/P00001/P00001_E01 | P00001 | 572d | 'Female' | 12 | 'C21';'D31';'x' | | '(F) I40.0';'y'
        P00/P00002/P00002_E01 | P00002 | 3653d | 'Male' | 12 | 'C21+Modifier362' | 'C13' | 'J18.9'
        P00/P00002/P00002_E02 | P00002 | 3653d | 'Male' | 12 | Null | Null | Null
        P00/P00003/P00003_E01 | P00003 | 10d | 'Male' | 9 | 'C21' | 'C13' | 'J18.9\'''')
    return root


def test_zzu(empty):
    ds = run(f'zzu --root {make_zzu(empty / "z")} --window 10')
    assert ' '.join(ds.id) == 'zzu/P00/P00001/P00001_E01 zzu/P00/P00002/P00002_E02'
    assert ' '.join(ds.patient) == 'zzu/P00001 zzu/P00002'
    both = {'aha/Sinus tachycardia', 'aha/Atrial premature complexes, nonconducted'}
    assert set(ds.label_names) == both and named(ds) == [both, set()]
    equal(ds.labels[1], 0)                                          # no statement: no, not unknown
    equal(ds.sex, [1, 0])
    equal(ds.age, np.array([572, 3653]) / 365.25)
    assert close(ds, 0, ecg(12), 500)
    first, short, null = data.zzu('z')
    assert first.strata == ('Fulminant', 'sex 1', 'age 1') and null.strata == ('sex 0', 'age 2')
    assert set(short.labels.values()) == {0}


def make_sph(root):
    h5py = pytest.importorskip('h5py')
    (root / 'records').mkdir(parents=True)
    for seed in (0, 1):
        with h5py.File(root / f'records/A0000{seed + 1}.h5', 'w') as f:
            f['ecg'] = ecg(12, seed=seed).T.astype(np.float16)
    table(root / 'metadata.csv', '''
        ECG_ID | AHA_Code | Patient_ID | Age | Sex | N | Date
        A00001 | 22;23 | S00001 | 55 | M | 6000 | 2020-03-04
        A00002 | 60+310;147 | S00002 | 32 | F | 6000 | 2019-09-03
        A00003 | 1 | S00003 | 63 | M | 6000 | 2020-07-16''')
    return root


def test_sph(empty):
    ds = run(f'sph --root {make_sph(empty / "s")}')
    assert ' '.join(ds.id) == 'sph/A00001 sph/A00002'
    assert ' '.join(ds.patient) == 'sph/S00001 sph/S00002'
    assert named(ds) == [{'aha/22', 'aha/23'}, {'aha/60', 'aha/147'}]
    equal(ds.sex, [0, 1])
    equal(ds.age, [55, 32])
    strata = {'aha 60', 'aha 147', 'modifier 310', 'sex 1', 'age 1'}
    assert set(list(data.sph('s'))[1].strata) == strata
    assert close(ds, 1, ecg(12, seed=1), 500, 5e-3)


def test_code15(empty):
    """Zeros at the ends are padding, zeros in the middle are not; exam 20 and part 9 are lost."""
    h5py = pytest.importorskip('h5py')
    x = np.zeros((3, 4096, 12))
    x[0, 648:3448], x[1, 48:4048] = ecg(7, 400, 1), ecg(10, 400, 2)
    x[1, 2000:2200] = 0
    with h5py.File('exams_part0.hdf5', 'w') as f:
        f['exam_id'], f['tracings'] = [30, 10, 0], x
    table('exams.csv', '''
        exam_id | age | is_male | 1dAVb | RBBB | LBBB | SB | ST | AF | patient_id | trace_file
        10 | 38 | True | False | True | False | False | False | False | 7 | exams_part0.hdf5
        20 | 38 | True | False | True | False | False | False | False | 7 | exams_part0.hdf5
        30 | 73 | False | True | False | False | False | False | True | 8.0 | exams_part0.hdf5
        40 | 73 | False | True | False | False | False | False | True | 8 | exams_part9.hdf5
        0 | 73 | False | True | False | False | False | False | True | 8 | exams_part0.hdf5''')
    meta = prepare('c', data.code15('.'), workers=1, peaks=False)
    assert meta['dropped'] == {'exam not in its file': 1, 'file missing': 1, 'empty': 1}
    ds = Dataset('c')
    assert ' '.join(ds.id) == 'code15/10 code15/30'
    assert {*ds.label_names} == {f'code/{n}' for n in data.FINDINGS[:6]}
    assert named(ds) == [{'code/RBBB'}, {'code/1dAVb', 'code/AF'}]
    equal(ds.sex, [0, 1])
    assert ds.patient[1] == 'code15/patient8' and ds.fold[1] == data.fold_of(ds.patient[1])
    assert close(ds, 0, x[1, 48:4048], 400) and close(ds, 1, x[0, 648:3448], 400)


def test_hdf5_sources_say_what_to_install(empty, monkeypatch):
    table('metadata.csv', 'ECG_ID | AHA_Code | Patient_ID | Age | Sex\nA1 | 22 | S1 | 55 | M')
    monkeypatch.setitem(sys.modules, 'h5py', None)
    with pytest.raises(Stop, match='^[^\n]*pip install h5py$'):
        run('sph --root .')


def test_odd_cells_of_the_sources(empty):
    """A blank fold trains, a blank exam is not there, other tables than expected stop."""
    add_credentialed(make_mimic(empty / 'm'))
    path = Path('m/records_w_diag_icd10.csv')
    path.write_text(path.read_text().replace(',18\n', ',\n').replace('52.0', '520'))
    first, *_ = data.mimic('m', 1, 1)
    assert first.fold == -1 and np.isnan(first.age)
    Path('m/mds_ed.csv').write_text('a,b\n1,2\n')
    with pytest.raises(Stop, match='no column general_study_id'):
        list(data.mimic('m', 1, 1))
    table('exams.csv', '''
        exam_id | age | is_male | 1dAVb | RBBB | LBBB | SB | ST | AF | patient_id | trace_file
         | 38 | 2 | False | True | False | False | False | False | 7 | exams_part0.hdf5''')
    (record,) = data.code15('.')
    assert np.isnan(record.sex)


def make_echonext(root):
    root.mkdir(parents=True)
    for split, seeds in (('train', (0, 1)), ('val', (10,)), ('test', (20,))):
        x = np.stack([ecg(10, 250, seed)[None] for seed in seeds])
        np.save(root / f'EchoNext_{split}_waveforms.npy', x)
    table(root / 'echonext_metadata_100k.csv', f'''
        ecg_key | patient_key | split | age_at_ecg | sex | {data.SHD} | {' | '.join(data.FLAGS)}
        e0 | p0 | test | 50 | Female | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0
        e1 | p1 | train | 61 | Male | 0 | 0 | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0
        e2 | p2 | no_split | 70 | Male | 0 | 0 | 0 | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0
        e3 | p1 | train | 62 | Male | 1 | 0 | 0 | 0 | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0
        e4 | p3 | val | 80 | Female | 0 | 0 | 0 | 0 | 0 | 1 | 0 | 0 | 0 | 0 | 0 | 0''')
    return root


def test_echonext(empty):
    root = make_echonext(empty / 'e')
    ds = run('echonext --root e')
    assert ' '.join(ds.id) == 'echonext/e0 echonext/e1 echonext/e3 echonext/e4'
    equal(ds.fold, [9, 0, 0, 8])
    equal(ds.sex, [1, 0, 0, 1])
    equal(ds.age, [50, 61, 62, 80])
    assert [rows.tolist() for rows in ds.split()] == [[1, 2], [3], [0]]
    assert len(ds.tasks['echonext']) == 11 and len(ds.tasks['shd']) == 1
    assert named(ds)[0] == {'echonext/lvef_lte_45', 'shd/shd_moderate_or_greater'}
    assert named(ds)[1] == {'echonext/lvwt_gte_13'}
    for row, seed in enumerate((20, 0, 1, 10)):                     # test, train, train, val
        assert close(ds, row, ecg(10, 250, seed), 250)
    np.save(root / 'EchoNext_val_waveforms.npy', np.zeros((2, 1, 2500, 12)))
    with pytest.raises(Stop, match='does not have the 1 records of split val'):
        list(data.echonext(root))


def make_mimic(root):
    order = 'I II III aVR aVF aVL V1 V2 V3 V4 V5 V6'.split()        # as on disk
    for study in (101, 102, 201, 301, 401):
        x = ecg(seed=study)
        x[1000:1100, 0] = 4.2                                       # beyond what the papers keep
        write_wfdb(root / f'files/{study}', x[:, [LEADS.index(n) for n in order]], (), order)
    table(root / 'record_list.csv', '''
        subject_id | study_id | file_name | ecg_time | path
        1 | 101 | 101 | 2180-07-23 | files/101
        1 | 102 | 102 | 2180-07-23 | files/102
        2 | 201 | 201 | 2180-07-23 | files/201
          |     |     |            |
        3 | 301 | 301 | 2180-07-23 | files/301
        4 | 401 | 401 | 2180-07-23 | files/401''')
    table(root / 'machine_measurements.csv', '''
        study_id | rr_interval | qrs_onset | qrs_end | t_end | p_axis | qrs_axis | t_axis
        101 | 810 | 40 | 140 | 440 | 51 | -12 | 29999
        102 | 65535 | 40 | 140 | 440 | 999 | -12 | 29999''')
    return root


def add_credentialed(root):
    """102: not the first of its stay; 301: no code; 401: not in the ED."""
    table(root / 'records_w_diag_icd10.csv', '''
        study_id | all_diag_all | gender | age | ecg_no_within_stay | ecg_taken_in_ed | strat_fold
        101 | ['I2510', 'W19XXXA'] | F | 52.0 | 0 | True | 18
        102 | ['I2510'] | F | 52.0 | 1 | True | 18
        201 | ['E785'] | missing | | 3 | True | 4
        301 | [] | M | 40.0 | 0 | True | 5
        401 | ['I10'] | M | 40.0 | 0 | False | 19''')
    names = ('general_study_id deterioration_severe_hypoxemia deterioration_icu_24h '
             'deterioration_mortality_1d deterioration_mortality_stay biometrics_bmi '
             'vitals_sbp_first labvalues_bilirubin,_total_first')
    table(root / 'mds_ed.csv', f'''{names.replace(' ', ' | ')}
        101 | 1 | 0 | -999 | 1 | 25 | 120 | 1.5
        999 | 0 | 1 | 0 | 0 | 26 | 130 | 2.5
        998 | 0 | 1 | 0 | 0 | 24 | 110 | .5''')


def test_mimic_alone(empty):
    make_mimic(empty / 'm')
    ds, nan = run('mimic --root m'), np.nan
    assert ' '.join(ds.id) == 'mimic/101 mimic/102 mimic/201 mimic/301 mimic/401'
    assert ' '.join(ds.patient) == 'mimic/1 mimic/1 mimic/2 mimic/3 mimic/4'
    equal(ds.fold, [data.fold_of(p) for p in ds.patient])
    assert ds.label_names == [f'features/{name}' for name in data.FEATURES]
    assert np.allclose(ds.labels, [
        [810, 100, 400, 400 / .9, 51, -12, nan], [nan, 100, 400, nan, nan, -12, nan],
        *[[nan] * 7] * 3], equal_nan=True)
    x = ecg(seed=101)
    x[1000:1100, 0] = 3                                             # clipped
    assert close(ds, 0, x, 500)                                     # leads by name


def test_mimic_with_credentialed_tables(empty):
    add_credentialed(make_mimic(empty / 'm'))
    prepare('m', data.mimic('m', 1, 1), workers=1, peaks=False)
    ds = Dataset('m')
    assert ' '.join(ds.id) == 'mimic/101 mimic/201'
    equal(ds.fold, [18, 4])
    equal(ds.sex, [1, np.nan])
    assert named(ds) == [
        {'cardiac/I25', 'cardiac/I251', 'cardiac/I2510', 'noncardiac/W19', 'sex/female',
         'deterioration/severe_hypoxemia', 'mortality/stay'}, {'noncardiac/E78', 'noncardiac/E785'}]
    values = [dict(zip(ds.label_names, row)) for row in ds.labels]
    for name, expected in {'age/years': (52, np.nan), 'sex/female': (1, np.nan),
                           'cardiac/I25': (1, 0),                   # no cardiac code: known
                           'icu/24h': (0, np.nan), 'mortality/1d': (np.nan, np.nan),
                           'biometrics/bmi': (25, np.nan), 'vitals/sbp': (120, np.nan),
                           'labs/Bilirubin Total': (1.5, np.nan)}.items():
        equal([row[name] for row in values], expected)
    c, n = ds.columns('cardiac'), ds.columns('noncardiac')
    assert ds.columns('cardiac+noncardiac') == c + n == ds.columns('cardiac+noncardiac+cardiac+no')
    assert ds.columns('sex/female+sex') == ds.columns('sex')
    assert ds.columns('cardiac/I25+cardiac/I99') == [ds.label_names.index('cardiac/I25')]
    with pytest.raises(Stop, match="no task 'lab.vital'"):
        ds.columns('lab+vital')
    # counted in the whole table: I25 thrice, I10 once, E78 once
    prepare('rare', data.mimic('m', 2, 3), workers=1, peaks=False)
    codes = {name for name in Dataset('rare').label_names if 'cardiac' in name}
    assert codes == {'cardiac/I25', 'cardiac/I251', 'cardiac/I2510'}


def test_icd_codes_are_cut_and_their_ancestors_added():
    codes = data.icd_codes("['W19XXXA', 'I2510', 'I10', 'T400X1A']")
    assert codes == {'W19', 'I25', 'I251', 'I2510', 'I10', 'T40', 'T400'}
    assert data.icd_codes('[]') == data.icd_codes('') == set()


def test_outer_percent_of_a_number_is_unknown(empty):
    rows = [f'{i} | {i} | 1' for i in range(201)]
    table('mds_ed.csv', '\n'.join(['general_study_id|biometrics_weight|deterioration_ecmo', *rows]))
    names, values = data.mds_outcomes('mds_ed.csv')
    values = dict(zip(names, np.array(list(values.values())).T))
    equal(np.flatnonzero(np.isnan(values['biometrics/weight'])), [0, 1, 199, 200])
    equal(values['deterioration/ecmo'], 1)


def test_challenge_folds_and_the_merged_code_of_ningbo(empty):
    for i in range(20):
        codes = f'Dx: {(733534002, 164909002)[i % 2]},426783006'
        write_wfdb(f'c/ningbo/g1/J{i}', ecg(3), [codes if i < 19 else 'Age: 5'])
    write_wfdb('c/georgia/g1/E1', ecg(3), ['Dx: 733534002'])
    ds = run('challenge --root c --cohort ningbo')
    assert sorted(ds.label_names) == ['snomed/164909002', 'snomed/426783006']
    assert np.nansum(ds.labels) == 38
    row = list(ds.id).index('ningbo/J19')                           # without Dx
    count = Counter(np.delete(ds.fold, row))
    assert ds.fold[row] == -1 and sorted(count) == [*range(10)] and set(count.values()) == {1, 2}
    ds = run('challenge --root c --folds hash')
    assert ds.fold.tolist() == [data.fold_of(i) for i in ds.id]
    assert named(ds)[list(ds.id).index('georgia/E1')] == {'snomed/733534002'}


def test_folds_given_by_the_source_are_never_stratified_anew(empty):
    np.save('a.npy', np.stack([ecg(4, 250, s) for s in range(4)]))
    for column in ('fold', 'number'):
        Path('l.csv').write_text(f'{column},sick\n3,1\n1,1\n2,1\n3,0\n')
        fold = run('array --root a.npy --fs-in 250 --labels l.csv --folds stratified').fold.tolist()
        assert fold == [3, 1, 2, 3] if column == 'fold' else len(set(fold)) == 4


def test_sequences(empty, capsys):
    ds, count = run('sequences --records 40 --seed 3'), len(data.SEQUENCES)
    assert ' 0 whose limb leads' in capsys.readouterr().out   # Einthoven's law is of hearts
    first, *_ = more = list(data.sequences(48, seed=3))             # and is looked at there
    assert data.process(replace(first, r_peaks=None), ds.contract, peaks=False)[2]['odd']
    equal(ds.labels, np.eye(count)[np.arange(40) % count])
    for row, record in enumerate(more[:40]):
        assert np.abs(record.x - signal(ds, row)).max() < 6e-4
        assert .09 < record.x.std(0).max() < 2.1
    assert np.linalg.matrix_rank(first.x - first.x.mean(0), tol=1) == 2        # two sources
    square = data.sequence('square', np.arange(2400) / 240, np.random.default_rng(0))
    assert set(square) <= {-1, 0, 1}


# --- stratified folds

def plain(Y, group, folds, seed):
    """The same rule in plain Python: the rarest label first, its groups by multiplicity; the fold
    by lack of the label, of the group's labels, of records, by lot."""
    groups, owner = np.unique(group, return_inverse=True)
    count = np.array([Y[owner == g].sum(0) for g in range(len(groups))])
    tie, fold = np.random.default_rng(seed).random((len(groups), folds)), {}
    while True:
        carry = [[g for g in range(len(groups)) if g not in fold and count[g, k]]
                 for k in range(Y.shape[1])]
        if not any(carry):
            return [fold.get(g, -1) for g in owner]
        k = min((len(its), k) for k, its in enumerate(carry) if its)[1]
        for g in sorted(carry[k], key=lambda g: (-count[g, k], g)):
            def need(f):
                its = np.array([h for h in fold if fold[h] == f], int)
                return (-count[its, k].sum(), -count[its][:, count[g] > 0].sum(),
                        -np.isin(owner, its).sum(), tie[g, f])
            fold[g] = max(range(folds), key=need)


def test_stratification_is_the_plain_rule():
    rng = np.random.default_rng(0)
    Y = (rng.random((60, 5)) < [.5, .3, .2, .1, .05]).astype(int)
    for group in (np.arange(60), rng.integers(0, 40, 60)):
        assert stratify(Y, group, 4, 7).tolist() == plain(Y, group, 4, 7)


def test_stratified_folds_keep_the_ratios_and_patients_together():
    rng = np.random.default_rng(1)
    one = np.eye(8, dtype=bool)[rng.choice(8, 3000, p=np.arange(1, 9) / 36)]    # one label each
    several = rng.random((3000, 12)) < .3 * .7 ** np.arange(12)
    for Y, patient, off in ((one, None, 1), (several, None, 1),
                            (several, rng.integers(0, 1800, 3000), 1.5)):
        fold = stratify(Y, patient)
        counts = np.stack([Y[fold == f].sum(0) for f in range(10)])
        assert np.abs(counts - Y.sum(0) / 10).max() <= off and counts.sum() == Y.sum()
        equal(fold, stratify(Y, patient))
        assert not np.array_equal(fold, stratify(Y, patient, seed=1))
        if patient is None:
            equal(fold == -1, ~Y.any(1))
        else:
            assert all(len(set(fold[patient == p])) == 1 for p in patient)


# --- the table of tasks

PAPER = ('ningbo cpsc2018 cpsc_extra georgia chapman chapman_rhythm sph ptbxl_all ptbxl_diag '
         'ptbxl_form ptbxl_rhythm ptbxl_sub ptbxl_super zzu echonext mimic_cardiac '
         'mimic_noncardiac mimic_deterioration mimic_mortality mimic_icu mimic_sex mimic_age '
         'mimic_biometrics mimic_features mimic_labs mimic_vitals').split()


def test_the_table_holds_both_papers():
    names, paper = list(TASKS), [TASKS[name] for name in PAPER]
    assert names[:26] == PAPER and len(names) == 37 and all(n[:3] == 'sc_' for n in names[26:])
    # outputs of the joint MIMIC model, 1,092 of them binary
    assert sum(t.classes for t in paper if t.data == 'mimic') == 1127
    assert sum(t.classes for t in paper if t.metric == 'MAE') == 35
    assert sum(t.classes or 0 for t in paper) == 1607               # but Chapman's rhythms


@pytest.mark.parametrize('task', TASKS)
def test_every_command_of_the_table_is_one(task):
    t = TASKS[task]
    words = shlex.split(t.prepare)
    a = data.make_parser().parse_args(words[2:])
    contract = data.contract_of(a)
    assert words[:2] == ['python', 'data.py'] and a.root == 'ROOT' and a.out == t.data
    assert contract.fs == (100 if task[:3] == 'sc_' else 240)
    assert (contract.norm == 'record') == (t.data in ('sc_cpsc2018', 'sc_csn', 'sc_ptbxl'))
    train, validation, test = t.folds or ((0,), (1,), (2,))
    assert len({*train, *validation, *test}) == len(train + validation + test)


def test_label_sets_of_the_table_are_those_of_the_readers(tmp_path):
    challenge = Record('challenge')                                 # its labels stand in the files
    header = write_wfdb(tmp_path / 'r', comments=['Dx: 426783006'])
    data.load_challenge(challenge, header.with_suffix(''))
    add_credentialed(make_mimic(tmp_path / 'm'))
    records = [challenge, *data.ptbxl(SAMPLE), *data.mimic(tmp_path / 'm', 1, 1),
               *data.zzu(make_zzu(tmp_path / 'z')), *data.sph(make_sph(tmp_path / 's')),
               *data.echonext(make_echonext(tmp_path / 'e'))]
    emitted = {(record.id.split('/')[0], name.split('/')[0])
               for record in records for name in record.labels}
    for t in TASKS.values():
        for part in f'{t.trained}+{t.scored}'.split('+'):
            assert (t.prepare.split()[2], part.split('/')[0]) in emitted


# --- the command line

LINES = '''
synthetic extra | unrecognized arguments: extra
synthetic --folds hash | unrecognized arguments: --folds
wfdb --root . --seed 3 | unrecognized arguments: --seed
show sample --root x | unrecognized arguments: --root
--out x | invalid choice: 'x'
ptbxl | required: --root
nonsense | invalid choice: 'nonsense'
ptbxl --root nowhere | no such folder or file: nowhere
ptbxl --root . | no scp_statements.csv
zzu --root . | no ECGCode.csv
mimic --root . | no machine_measurements.csv
echonext --root . | no echonext_metadata_100k.csv
wfdb --root . | the source holds no records
show nowhere | no dataset 'nowhere'
synthetic --records 0 | holds no records
synthetic --fs 1 | --fs must lie between
synthetic --workers 0 | --workers must be 1 or more
synthetic --filter hp120 | below 10
synthetic --filter magic | --filter magic: none, or steps
synthetic --filter hp0.5+ | none, or steps
synthetic --filter hp0 | none, or steps
synthetic --out ../x | cannot name a dataset
array --root nowhere.npy | no such folder or file
array --root x.npy | sampling rate of x.npy is unknown
array --root x.npy --fs-in 9 --labels gone.csv | --labels must name a csv'''


@pytest.mark.parametrize('line', LINES.strip().splitlines())
def test_a_command_that_cannot_be_is_refused(empty, capsys, line):
    """In one line of its own, or in argparse's; nothing is written."""
    words, why = line.split(' | ')
    np.save('x.npy', np.zeros((2, 12, 9)))
    with pytest.raises(SystemExit) as stop:
        data.main(words.split())
    assert why in f'{capsys.readouterr().err} {stop.value}' and '\n' not in str(stop.value)
    assert not any(Path('datasets').glob('*'))
