"""Real and synthetic 12-lead ECGs in one form: millivolts, leads by name, one sampling rate.

    python data.py                                        # the 500 real ECGs here, 4,000 synthetic
    python data.py show sample --record 0                 # a 12-lead picture in out/
    python data.py array --root x.npy --fs-in 500 [--labels labels.csv]    # your own (N, 12, T)
    python data.py wfdb --root DIR [--labels labels.csv]  # your own folder of WFDB records
    python data.py ptbxl --root DIR [--rate 500] [--download --folders 00000 01000]
    python data.py challenge --root DIR --cohort georgia  # PhysioNet/CinC Challenge 2020/2021
    python data.py SOURCE --root DIR                      # zzu, sph, code15, echonext, mimic
    python data.py sequences                              # no ECGs: sines, noise, random walks ...

File on disk -> Record -> prepared dataset -> batch. A prepared dataset is a folder datasets/NAME of
signals.i16, labels.npy, index.npz and meta.json. The default signal contract is that of arXiv
2605.12241 (12 leads, mV, 240 Hz, 2.5 s, no filter); --contract sc gives that of 2605.17276. TASKS
lists the tasks of both papers with the commands that prepare their data.
"""
import argparse
import ast
import csv
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import tokenize
import warnings
import zipfile
import zlib
from array import array as compact
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from math import isnan, nan
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import scipy.ndimage
import scipy.signal
import torch
from scipy.spatial.transform import Rotation
from tqdm import tqdm

warnings.filterwarnings('ignore', 'The given NumPy array is not writable')  # it is never written to
LEADS = ('I', 'II', 'III', 'aVR', 'aVL', 'aVF', 'V1', 'V2', 'V3', 'V4', 'V5', 'V6')
HERE = Path(__file__).resolve().parent
MAX_SECONDS = 3600
# what numpy raises for a damaged or foreign file
UNREADABLE = (ValueError, TypeError, KeyError, OSError, EOFError, MemoryError, OverflowError,
              RuntimeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)


class Stop(SystemExit):
    """A fault of the whole run: one line that says what to do; the exit code is 1."""


class BadRecord(Exception):
    """A fault of one record. Its text is the reason under which the record is dropped."""


def run_script(main):
    """Run a script's main(). Ctrl-C and system errors (a full disk, say) end it with one line
    instead of a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        raise Stop('stopped')
    except OSError as e:
        raise Stop(f'{e.filename or "output"}: {e.strerror or e}')


@dataclass(frozen=True)
class Contract:
    """The meaning of a stored sample. It is stored in checkpoints. Evaluation on data with another
    contract is refused."""
    fs: int = 240                                                   # Hz
    leads: tuple = LEADS
    unit: str = 'mV'                                                # 'SD' if norm is 'record'
    scale: float = 1e-3                                             # units per stored int16 count
    filter: str = 'none'                                            # e.g. hp0.5+lp40+notch60
    norm: str = 'none'                                              # 'record': each lead to SD 1
    window: float = 2.5                                             # s: shorter records are dropped

    def differs(self, other):
        """The fields in which two contracts differ, as text; '' if none. The window is not
        compared."""
        a, b = asdict(self), asdict(other)
        return ', '.join(f'{k} {a[k]} against {b[k]}' for k in a if k != 'window' and a[k] != b[k])

    @staticmethod
    def read(d):
        return Contract(**{**d, 'leads': tuple(d['leads'])})


# 2605.17276 gives neither cut-off nor order of its filter: 0.5 Hz and second order are our choice
CONTRACTS = {'ps': Contract(), 'sc': Contract(fs=100, filter='hp0.5+notch60', window=10.)}


@dataclass
class Record:
    """One recording as a reader yields it. load(record) runs later, in a worker process, and fills
    in the fields that only the signal file holds. labels: {name: 0, 1, a number, or NaN for
    unknown}; names begin with a label set (super/MI). A label that the record does not name is 0 if
    it belongs to a label set that the record uses, else unknown. labels=None: all unknown."""
    id: str
    patient: str = ''                                               # '': known by its id alone
    x: object = None                                                # (T, C) in `unit` at `fs` Hz
    fs: float = 0.
    leads: tuple = ()
    unit: str = ''
    age: float = nan                                           # years
    sex: float = nan                                           # 1 female, 0 male
    labels: dict = None
    fold: int = -1                                                  # -1: to be drawn
    strata: tuple = None                                            # what stratified folds balance
    r_peaks: object = None                                          # in s; None: to be found
    load: object = None


# -------------------------------------------------------------------------------------------------
# tables and their cells

UNKNOWN = ('', 'missing', 'unknown', 'nan', 'none', 'null', 'n/a', 'na', 'other')


def read_csv(path, *needed):
    """Rows of a csv file, its cells separated by commas, semicolons or tabs: dicts of stripped
    strings, '' where blank. Rows of blanks are left out. needed: columns that must be there. Stops
    at what would be misread."""
    path = Path(path)
    if not path.is_file():
        raise Stop(f'no {path.name} in {path.parent}: --root must name the folder that holds it')
    with open(path, encoding='utf-8-sig', newline='') as file:
        try:
            separator = max(',;\t', key=file.readline().count)
            file.seek(0)
            reader = csv.reader(file, delimiter=separator, strict=True)
            names = [name.strip() for name in next(reader, [])]
            if len(set(names)) < len(names):
                raise Stop(f'{path}: its first line must name each column once')
            if missing := set(needed) - set(names):
                raise Stop(f'{path} has no column {", ".join(sorted(missing))}')
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(names):
                    raise Stop(f'{path}, line {reader.line_num}: {len(cells)} cells, but '
                               f'{len(names)} columns')
                yield dict(zip(names, map(str.strip, cells)))
        except (UnicodeDecodeError, csv.Error) as e:
            raise Stop(f'{path} is no table, or not in UTF-8: {e}')


def number(text):
    """A cell as a float that float32 can hold; NaN for blanks and words."""
    try:
        value = float(text.replace('_', 'x'))                       # Python takes 1_0 for 10
    except ValueError:
        return nan
    return value if abs(value) < 1e38 else nan


def whole(text):
    """A number of a patient or study without the decimals that pandas adds: 15709.0 -> 15709."""
    return re.sub(r'^(\d+)\.0+$', r'\1', text.strip())


def fold_number(text):
    """A cell as the number of a fold; -1 if it is none."""
    return int(whole(text)) if re.fullmatch(r'\d{1,4}', whole(text)) else -1


def years(text):
    """An age in years; NaN if it is not within 0 to 120. PTB-XL has 300 for ages over 89: 90."""
    age = number(text)
    if age == 300:
        return 90.
    return age if 0 <= age <= 120 else nan


def is_female(text):
    """1 for female, 0 for male, NaN for anything else (MIMIC writes 'missing')."""
    word = text.strip(' \'"').lower()
    if word in ('m', 'male', '0', '0.0'):
        return 0.
    return 1. if word in ('f', 'female', '1', '1.0') else nan


def split_codes(text):
    """The entries of a cell such as 'C21';'D31' or 426783006,164889003; none for Unknown."""
    parts = [part.strip(' \'"') for part in re.split('[;,]', text)]
    return [part for part in parts if part.lower() not in UNKNOWN]


def with_sex_and_age(names, sex, age, edges):
    """Names, and groups of sex and age, for folds that balance them too."""
    groups = [(f'sex {sex:g}', sex), (f'age {sum(age >= e for e in edges)}', age)]
    return (*names, *(name for name, value in groups if not isnan(value)))


# columns of a table of one's own that are no labels, and other names under which they are known
OWN = dict(pair.split('=') for pair in '''
    id=id record=id filename=id patient=patient patient_id=patient subject_id=patient
    fold=fold strat_fold=fold age=age sex=sex gender=sex'''.split())


def read_labels(path, ignore=()):
    """Your own labels: rows of a csv as dicts of id, patient, fold, age, sex and labels. A column
    like super/MI keeps its label set, any other NAME becomes label/NAME. Blank is unknown. The
    nameless column that pandas writes is no label. Stops at a cell that would be misread."""
    if not Path(path).is_file():
        raise Stop(f'no file {path}: --labels must name a csv file')
    table, rows = list(read_csv(path, *ignore)), []
    columns = {name: OWN.get(name.lower(), name if '/' in name else f'label/{name}')
               for name in (table[0] if table else ()) if name and name not in ignore}
    if len(set(columns.values())) < len(columns):
        raise Stop(f'{path}: two of {", ".join(columns)} mean the same: --ignore one')
    names = [name for name, own in columns.items() if own not in OWN]
    for i, cells in enumerate(table, 1):
        row = dict.fromkeys(OWN, '') | {own: cells[name] for name, own in columns.items()}
        for name in names:
            if cells[name] and isnan(number(cells[name])):
                raise Stop(f'{path}, row {i}, column {name}: {cells[name][:40]!r} is no number; '
                           f'use 1, 0, or blank for unknown, rename it id, or --ignore {name}')
        age, sex, fold, patient = row['age'], row['sex'], row['fold'], whole(row['patient'])
        if patient.lower() in UNKNOWN:
            patient = ''
        if age.lower() not in UNKNOWN and isnan(number(age)):
            raise Stop(f'{path}, row {i}: age {age!r} is no number of years')
        if sex.lower() not in UNKNOWN and isnan(is_female(sex)):
            raise Stop(f'{path}, row {i}: sex {sex!r}? Write female, male, or leave it blank')
        if fold and fold_number(fold) < 0:
            raise Stop(f'{path}, row {i}: fold {fold!r} is no whole number')
        rows.append(dict(
            id=row['id'], patient=f'patient {patient}' if patient.isdigit() else patient,
            fold=fold_number(fold), age=years(age), sex=is_female(sex),
            labels={columns[name]: number(cells[name]) for name in names}))
    for name in names:
        if others := {row[name] for row in table if number(row[name]) not in (0, 1)} - {''}:
            print(f'{path}: column {name} is a number, not yes or no (it has {min(others)}): '
                  'scored by MAE')
    return rows


def match_labels(path, ignore, names):
    """The rows of `read_labels` for records of these names: by id, which may also be the last part
    of a name. {} for a record that has none."""
    rows = read_labels(path, ignore)
    by_id = {re.sub(r'\.(hea|dat|mat)$', '', row['id']): row for row in rows}
    if len(by_id) < len(rows):
        raise Stop(f'{path}: a column id must name the record of each row, each once')
    last = Counter(name.split('/')[-1] for name in names)
    if several := [i for i in by_id if i not in names and last[i] > 1]:
        raise Stop(f'{path}: {several[0]} is the name of several records: give their paths')
    found = [by_id.get(name, by_id.get(name.split('/')[-1], {})) for name in names]
    count = sum(map(bool, found))
    print(f'{path}: {len(rows)} rows; {count} records have one, {len(names) - count} do not')
    if not count:
        raise Stop(f'{path} names none of the records, which have names such as {names[:1]}')
    return found


# -------------------------------------------------------------------------------------------------
# readers: generators of Records

GAIN = re.compile(r'(-?\d+\.?\d*(?:e[-+]?\d+)?)(?:\(-?\d+\))?(?:/(\S+))?')  # gain(baseline)/unit


def read_header(path):
    """(fs, positions of the twelve leads, their unit, comments) of a WFDB header, refusing what
    wfdb would forgive: an absent sampling rate becomes 250 Hz there, a gain of 0 becomes 200, and a
    micro sign is dropped. An absent unit is mV (header(5)). Raises BadRecord."""
    raw = Path(f'{path}.hea').read_bytes()
    try:
        text = raw.decode('utf-8-sig')
    except UnicodeDecodeError:
        text = raw.decode('latin-1')
    lines = [line.strip() for line in text.split('\n') if line.strip()]
    comments = '\n'.join(line for line in lines if line[0] == '#')
    first, *signals = [line.split() for line in lines if line[0] != '#'] or [[]]
    if len(first) < 2 or not first[1].isdigit():
        raise BadRecord('unreadable header')
    if '/' in first[0]:
        raise BadRecord('several segments, or a / in the name of the record')
    if len(first) < 3:
        raise BadRecord('fs absent')
    fs = number(re.split('[/(]', first[2])[0])
    if not 50 <= fs <= 10000:
        raise BadRecord('absurd fs')
    length = first[3] if len(first) > 3 else '0'
    if not length.isdigit():
        raise BadRecord(f'unreadable length {length}')
    if int(length) > MAX_SECONDS * fs:
        raise BadRecord('longer than an hour')
    wanted, units = [], set()
    for position, words in enumerate(signals[:int(first[1])]):
        if ' '.join(words[8:]).upper() not in map(str.upper, LEADS):
            continue
        gain = GAIN.fullmatch(words[2])
        if not gain:
            raise BadRecord(f'unreadable gain {words[2]}')
        if not 1e-3 <= abs(float(gain[1])) <= 1e9:
            raise BadRecord('absurd gain')
        wanted.append(position)
        units.add(gain[2] or 'mV')
        if path.with_name(words[0]).read_bytes()[:10] == b'MATLAB 5.0':
            raise BadRecord('a .mat file of version 5 under a header for version 4')
    if len(units) > 1:
        raise BadRecord('leads in different units')
    return fs, wanted, ''.join(units), comments


def load_wfdb(record, path):
    """Fill a Record from the WFDB record at `path` (no extension), read by wfdb in any of its
    formats, with skew and samples per frame. Returns the header's comments as text."""
    import wfdb
    record.fs, wanted, record.unit, comments = read_header(path)
    if not wanted:
        raise BadRecord('none of the twelve leads is there')
    # wfdb averages a frame with its invalid samples, and applies no skew in formats 8, 508 ... 524
    file = wfdb.rdrecord(str(path), channels=wanted, smooth_frames=False, ignore_skew=True)
    record.x, record.leads = np.full((file.sig_len, len(wanted)), np.nan), tuple(file.sig_name)
    for i, (x, skew) in enumerate(zip(file.e_p_signal, file.skew)):
        frames = x.reshape(file.sig_len, -1).mean(1)[skew or 0:]
        record.x[:len(frames), i] = frames
    field = lambda name: re.search(rf'(?im)(?:^#\s*|<){name}>?\s*:[ \t]*'
                                   r'(\w[\w.]*)(?![\w.]| *(?:week|month|day))', comments)
    if isnan(record.age) and (found := field('age')):
        record.age = years(found[1])
    if isnan(record.sex) and (found := field('sex')):
        record.sex = is_female(found[1])
    return comments


def wfdb_folder(root, labels=None, ignore=()):
    """Any folder of WFDB records, at any depth. labels: a csv of your own, matched by the record's
    name or its path under root."""
    names = [file.relative_to(root).with_suffix('').as_posix()
             for file in sorted(Path(root).rglob('*.hea'))]
    rows = match_labels(labels, ignore, names) if labels else [{} for _ in names]
    for name, row in zip(names, rows):
        yield Record(**row | dict(id=name), load=partial(load_wfdb, path=Path(root, name)))


def ptbxl(root, rate=100, folders=()):
    """PTB-XL in its official layout (Wagner et al. 2020), 100 or 500 Hz, with its six label sets:
    all (71 statements), diag (44), form (19), rhythm (12), sub (23), super (5). A statement counts
    whatever its likelihood; folds are strat_fold. folders: only these, such as 00000."""
    root, file = Path(root), 'filename_lr' if rate == 100 else 'filename_hr'
    names = {}                                                      # statement -> its labels
    for row in read_csv(root / 'scp_statements.csv', '', 'diagnostic', 'form', 'rhythm',
                        'diagnostic_class', 'diagnostic_subclass'):
        code = row['']
        names[code] = [f'all/{code}']
        names[code] += [f'{part}/{code}' for part in ('form', 'rhythm') if number(row[part]) == 1]
        if number(row['diagnostic']) == 1:
            names[code] += [f'diag/{code}', f'sub/{row["diagnostic_subclass"]}',
                            f'super/{row["diagnostic_class"]}']
    no = dict.fromkeys(sorted(itertools.chain(*names.values())), 0.)
    for row in read_csv(root / 'ptbxl_database.csv', 'ecg_id', 'patient_id', 'age', 'sex',
                        'scp_codes', 'strat_fold', file):
        if folders and Path(row[file]).parent.name not in folders:
            continue
        patient = whole(row['patient_id'])
        load = partial(load_ptbxl, path=root / row[file], codes=row['scp_codes'], names=names)
        yield Record(f'ptbxl/{whole(row["ecg_id"])}', f'ptbxl/patient{patient}' if patient else '',
                     age=years(row['age']), sex=is_female(row['sex']), labels=no, load=load,
                     fold=fold_number(row['strat_fold']))


def load_ptbxl(record, path, codes, names):
    """Signal and labels of one row of ptbxl_database.csv."""
    try:
        codes = ast.literal_eval(codes).keys()
    except (ValueError, SyntaxError, TypeError, AttributeError):
        raise BadRecord('unreadable scp_codes')
    for code in codes:
        record.labels = record.labels | dict.fromkeys(names.get(code, [f'all/{code}']), 1.)
    load_wfdb(record, path)


def challenge(root, cohorts=()):
    """PhysioNet/CinC Challenge 2020/2021 (.hea with .mat or .dat): all cohorts, or those named. No
    patient ids, no folds. Its ptb-xl is PTB-XL again: never train on one and test on the other."""
    cohort_of = lambda p: p.parts[-3 if re.fullmatch(r'g\d+', p.parts[-2]) else -2]
    files = sorted(Path(root).resolve().rglob('*.hea'))
    there = {cohort_of(file) for file in files}
    if missing := set(cohorts) - there:
        raise Stop(f'no cohort {", ".join(sorted(missing))} under {root}; there: '
                   f'{", ".join(sorted(there)) or "none"}')
    for file in files:
        if not cohorts or cohort_of(file) in cohorts:
            load = partial(load_challenge, path=file.with_suffix(''))
            yield Record(f'{cohort_of(file)}/{file.stem}', load=load)


def load_challenge(record, path):
    """Signal and diagnoses: SNOMED codes (2021) or names (2020) in the comment Dx."""
    found = re.search(r'(?im)^#\s*dx\s*:(.*)$', load_wfdb(record, path))
    codes = split_codes(found[1]) if found else []
    if 'ningbo' in record.id.lower():                               # two codes for complete LBBB
        codes = ['164909002' if code == '733534002' else code for code in codes]
    if codes:
        record.labels = {('snomed/' if c.isdigit() else 'dx2020/') + c: 1. for c in codes}


def zzu(root):
    """ZZU pECG (Tan et al. 2025, figshare): children, 500 Hz, records of 12 leads. Labels: the AHA
    statements of ECGCode.csv; as in the released code, entries not listed there count as nothing.
    Folds balance disease, sex and age. Written to the published schema, not tried on real files."""
    root = Path(root)
    statement = {c: r['Description'] for r in read_csv(root / 'ECGCode.csv')
                 for c in split_codes(r['AHA(Category&Code)'])}
    disease = {c: r['Disease Category'] for r in read_csv(root / 'DiseaseCode.csv')
               for c in split_codes(r['ICD-10 Code'])}
    no = dict.fromkeys((f'aha/{name}' for name in sorted(set(statement.values()))), 0.)
    for r in read_csv(root / 'AttributesDictionary.csv', 'Filename', 'Patient_ID', 'Age', 'Gender',
                      'Lead', 'AHA_code', 'ICD-10 code'):
        if number(r['Lead']) != 12:
            continue
        name, sex = r['Filename'].strip(' \'"'), is_female(r['Gender'])
        age = number(r['Age'].strip(' \'"d')) / 365.25
        yes = {f'aha/{statement[c]}': 1. for c in split_codes(r['AHA_code']) if c in statement}
        diseases = sorted({disease[c] for c in split_codes(r['ICD-10 code']) if c in disease})
        yield Record(f'zzu/{name}', f'zzu/{r["Patient_ID"]}', age=age, sex=sex, labels=no | yes,
                     strata=with_sex_and_age(diseases, sex, age, (1, 5, 12, 18)),
                     load=partial(load_wfdb, path=root / 'Child_ecg' / name))


def open_h5(path):
    """An HDF5 file. Stops where h5py is missing."""
    try:
        import h5py
    except ImportError:
        raise Stop('this source is in HDF5 files: pip install h5py')
    return h5py.File(path)


def sph(root):
    """SPH (Liu et al. 2022, figshare): HDF5, 500 Hz, mV. Labels: AHA codes without their modifiers
    (aha/22). Folds balance statements, modifiers, sex and age. Not tried on real files."""
    for r in read_csv(Path(root, 'metadata.csv'), 'ECG_ID', 'AHA_Code', 'Patient_ID', 'Age', 'Sex'):
        codes = [[part.strip() for part in code.split('+')] for code in split_codes(r['AHA_Code'])]
        parts = {f'{"modifier" if i else "aha"} {p}' for code in codes for i, p in enumerate(code)}
        sex, age, name = is_female(r['Sex']), years(r['Age']), r['ECG_ID']
        yield Record(f'sph/{name}', f'sph/{r["Patient_ID"]}', None, 500, LEADS, 'mV', age, sex,
                     {f'aha/{code[0]}': 1. for code in codes} or None,
                     strata=with_sex_and_age(sorted(parts), sex, age, (20, 40, 60, 80)),
                     load=partial(load_sph, path=Path(root, 'records', f'{name}.h5')))


def load_sph(record, path):
    """Signal of one SPH record."""
    with open_h5(path) as file:
        record.x = file['ecg'][:].T                                 # (12, T) float16 in the file


def code15(root):
    """CODE-15% (Ribeiro et al. 2021, Zenodo): HDF5, 400 Hz, 7 or 10 s padded with zeros to 4,096
    samples, six findings. Hashed folds by patient. Its unit is not stated: taken as mV, as in the
    released code. But the CODE test set of the same group is in .1 mV, so check that the SD is .2
    to .4 mV before mixing. Not tried on real files."""
    names, yes = ('1dAVb', 'RBBB', 'LBBB', 'SB', 'AF', 'ST'), {'true': '1', 'false': '0'}
    value = lambda text: is_female(yes.get(text.lower(), text))     # 1, 0, or NaN
    for r in read_csv(Path(root, 'exams.csv'), 'exam_id', 'age', 'is_male', 'patient_id',
                      'trace_file', *names):
        exam, patient = whole(r['exam_id']), whole(r['patient_id'])
        load = partial(load_code15, path=Path(root, r['trace_file']), exam=exam)
        yield Record(f'code15/{exam}', f'code15/patient{patient}', None, 400, LEADS, 'mV',
                     years(r['age']), 1 - value(r['is_male']),
                     {f'code/{n}': value(r[n]) for n in names}, load=load)


@lru_cache(32)                                            # once per file and worker
def code15_part(path):
    """(tracings (N, 4096, 12), {exam: row}) of one file."""
    file = open_h5(path)
    return file['tracings'], {str(int(exam)): i for i, exam in enumerate(file['exam_id'][:])}


def load_code15(record, path, exam):
    """Signal of one exam, zeros included."""
    tracings, row = code15_part(path)
    if exam not in row:
        raise BadRecord('exam not in its file')
    record.x = tracings[row[exam]]


FLAGS = [f'{name}_flag' for name in """lvef_lte_45 lvwt_gte_13 aortic_stenosis_moderate_or_greater
    aortic_regurgitation_moderate_or_greater mitral_regurgitation_moderate_or_greater
    tricuspid_regurgitation_moderate_or_greater pulmonary_regurgitation_moderate_or_greater
    rv_systolic_dysfunction_moderate_or_greater pericardial_effusion_moderate_large pasp_gte_45
    tr_max_gte_32""".split()]
SHD = 'shd_moderate_or_greater_flag'                                # any structural heart disease


def echonext(root):
    """EchoNext 1.1.0 (Poterucha et al. 2025, PhysioNet): 250 Hz, 10 s, signals in SD, not mV, kept
    as they are, as in the released code. Labels: eleven flags (echonext/) and the composite one
    (shd/). The official split is kept: train is fold 0, val 8, test 9. Not tried on real files."""
    root, fold = Path(root), {'train': 0, 'val': 8, 'test': 9}
    table = root / 'echonext_metadata_100k.csv'
    rows_so_far = Counter()                                         # of each split
    for r in read_csv(table, 'ecg_key', 'patient_key', 'split', 'age_at_ecg', 'sex', SHD, *FLAGS):
        split = r['split']
        if split not in fold:
            continue
        labels = {f'echonext/{name.removesuffix("_flag")}': number(r[name]) for name in FLAGS}
        labels[f'shd/{SHD.removesuffix("_flag")}'] = number(r[SHD])
        load = partial(load_echonext, path=root / f'EchoNext_{split}_waveforms.npy',
                                 row=rows_so_far[split])
        yield Record(f'echonext/{r["ecg_key"]}', f'echonext/{r["patient_key"]}', None, 250, LEADS,
                     'mV', years(r['age_at_ecg']), is_female(r['sex']), labels, fold[split],
                     load=load)
        rows_so_far[split] += 1
    for split, n in rows_so_far.items():
        file = root / f'EchoNext_{split}_waveforms.npy'
        if file.is_file() and len(np.load(file, mmap_mode='r')) != n:
            raise Stop(f'{file.name} does not have the {n} records of split {split} in the csv')


def load_echonext(record, path, row):
    """Signal of one row of a split's waveforms."""
    record.x = np.load(path, mmap_mode='r')[row, 0]                 # (N, 1, 2500, 12) in the file


FEATURES = ('rr', 'qrs', 'qt', 'qtc', 'p_axis', 'qrs_axis', 't_axis')       # ms and degrees
ECG_TIMES = ('rr_interval', 'qrs_onset', 'qrs_end', 't_end')
ECG_AXES = ('p_axis', 'qrs_axis', 't_axis')
LABS = ('PT, Albumin, Anion Gap, Bicarbonate, Bilirubin Total, Calcium Total, Creatinine, '
        'Ferritin, Urea Nitrogen, Hematocrit, Hemoglobin, Lymphocytes, MCHC, RDW, Red Blood Cells, '
        'RDW-SD, Creatine Kinase (CK), NTproBNP').split(', ')
MEASURED = {'biometrics': ('biometrics', 'height weight bmi'.split()), 'labs': ('labvalues', LABS),
            'vitals': ('vitals', 'dbp heartrate o2sat resprate sbp temperature'.split())}


def mimic(root, cardiac=2000, others=2000):
    """MIMIC-IV-ECG 1.0 (PhysioNet), clipped to 3 mV. Alone: all records and seven regressions
    (features/). With records_w_diag_icd10.csv in the same folder: the setting of arXiv 2605.12241,
    ECGs taken in the ED that have a code, in folds 18 and 19 only the first of a stay; ICD codes I
    are cardiac/, others noncardiac/, if at least `cardiac` or `others` ECGs of the table have them;
    sex/, age/. With mds_ed.csv (MDS-ED): its outcomes too. Not tried on real files."""
    root = Path(root)
    features = {whole(r['study_id']): compact('f', machine_features(r)) for r in read_csv(
        root / 'machine_measurements.csv', 'study_id', *ECG_TIMES, *ECG_AXES)}
    stays, label_of, names, outcomes = None, {}, (), {}
    if (root / 'records_w_diag_icd10.csv').is_file():
        stays, label_of = mimic_stays(root / 'records_w_diag_icd10.csv', cardiac, others)
    if (root / 'mds_ed.csv').is_file():
        names, outcomes = mds_outcomes(root / 'mds_ed.csv')
    commonest = {}                                                  # label set -> a label of it
    for name in label_of.values():
        commonest.setdefault(name.split('/')[0], name)
    for r in read_csv(root / 'record_list.csv', 'subject_id', 'study_id', 'path'):
        study, fold, age, sex = whole(r['study_id']), -1, nan, nan
        if stays is not None and study not in stays:
            continue
        measured = features.get(study, [nan] * len(FEATURES))
        labels = {f'features/{name}': value for name, value in zip(FEATURES, measured)}
        labels |= zip(names, outcomes.get(study, ()))
        if stays is not None:
            codes, fold, age, sex = stays[study]
            labels |= dict.fromkeys(commonest.values(), 0.)         # one 0 makes a label set known
            labels |= {label_of[c]: 1. for c in codes if c in label_of}
            labels |= {'sex/female': sex, 'age/years': age}
        yield Record(f'mimic/{study}', f'mimic/{whole(r["subject_id"])}', age=age, sex=sex,
                     labels=labels, fold=fold,
                     load=partial(load_mimic, path=root / r['path']))


def load_mimic(record, path):
    """Signal of one MIMIC-IV-ECG record, clipped to 3 mV."""
    load_wfdb(record, path)
    record.x = np.clip(record.x, -3, 3)


def machine_features(r):
    """The FEATURES of a row of machine_measurements.csv, in ms and degrees. NaN for times outside 0
    to 5,000 ms and axes outside -360 to 360 degrees."""
    within = lambda v, low, high: v if low <= v <= high else nan
    rr, on, end, t = (within(number(r[name]), 0, 5000) for name in ECG_TIMES)
    qrs, qt = within(end - on, 0, 5000), within(t - on, 0, 5000)
    axes = [within(number(r[name]), -360, 360) for name in ECG_AXES]
    return [rr, qrs, qt, qt / math.sqrt(rr / 1000) if rr > 0 else nan, *axes]


def icd_codes(text):
    """ICD-10 codes of a cell such as ['I2510', 'W19XXXA']: five characters at most, trailing X
    removed, with their ancestors of three or more characters."""
    codes = {code[:5].rstrip('X') for code in re.findall(r'\w+', text)}
    return {code[:n] for code in codes for n in range(3, len(code) + 1)}


def mimic_stays(path, cardiac, others):
    """({study: (codes, fold, age, sex)} of the ECGs kept, {code: label} of the common codes, the
    commonest first)."""
    count, stays, label_of = Counter(), {}, {}
    for r in read_csv(path, 'study_id', 'all_diag_all', 'gender', 'age', 'ecg_taken_in_ed',
                      'ecg_no_within_stay', 'strat_fold'):
        codes, fold = icd_codes(r['all_diag_all']), fold_number(r['strat_fold'])
        count.update(codes)
        in_ed = r['ecg_taken_in_ed'].lower() in ('true', '1', '1.0')
        if codes and in_ed and (fold < 18 or number(r['ecg_no_within_stay']) == 0):
            codes = tuple(map(sys.intern, sorted(codes)))
            stays[whole(r['study_id'])] = codes, fold, years(r['age']), is_female(r['gender'])
    for code, n in count.most_common():
        label_set, least = ('cardiac', cardiac) if code[0] == 'I' else ('noncardiac', others)
        if n >= least:
            label_of[code] = f'{label_set}/{code}'
    return stays, label_of


def mds_columns(columns):
    """{label: column} of mds_ed.csv. Columns deterioration_... are yes/no outcomes, in three label
    sets: mortality/, icu/, deterioration/. Measurements are the column of that name, or the first
    of MDS-ED's 90 minutes."""
    plain = lambda text: re.sub('[^a-z0-9]', '', text.lower())
    column_of, found = {plain(column): column for column in columns}, {}
    for column in columns:
        if column.lower().startswith('deterioration_'):
            rest = column.lower().removeprefix('deterioration_')
            home = next((h for h in ('mortality', 'icu') if rest.startswith(h)), 'deterioration')
            found[f'{home}/{rest.removeprefix(home + "_")}'] = column
    for home, (prefix, names) in MEASURED.items():
        for name in names:
            for key in (plain(prefix + name + 'first'), plain(prefix + name)):
                if key in column_of:
                    found[f'{home}/{name}'] = column_of[key]
    return found


def mds_outcomes(path):
    """(label names, {study: values}) of mds_ed.csv. -999, and the outer 1 % of a measurement, are
    unknown."""
    found, studies, values = {}, [], []
    for row in read_csv(path, 'general_study_id'):
        found = found or mds_columns(row)
        studies.append(whole(row['general_study_id']))
        values.append(compact('f', [number(row[column]) for column in found.values()]))
    values = np.array(values, np.float32)                           # (studies, labels)
    values[values == -999] = np.nan
    for k, name in enumerate(found):
        if name.split('/')[0] in MEASURED and np.isfinite(values[:, k]).any():
            low, high = np.nanquantile(values[:, k], (.01, .99))
            values[(values[:, k] < low) | (values[:, k] > high), k] = np.nan
    return tuple(found), dict(zip(studies, values.tolist()))


SEQUENCES = ('sine', 'square', 'walk', 'noise')


def sequences(records, seed=0, seconds=10., fs=240):
    """Sequences that are no ECGs, four classes in turn (sequence/sine ...), for transfer beyond
    medicine. Two random sources of the class are mixed at random into twelve leads; the largest
    lead has an SD of .1 to 2 mV. Record i depends on (seed, i) alone."""
    for i in range(records):
        rng, name = np.random.default_rng([seed, i]), SEQUENCES[i % len(SEQUENCES)]
        t = np.arange(round(seconds * fs)) / fs
        sources = np.stack([sequence(name, t, rng), sequence(name, t, rng)], 1)
        x = sources @ rng.normal(size=(2, 12))                      # (T, 12)
        x *= .1 * 20 ** rng.random() / (x - x.mean(0)).std(0).max()
        x += rng.normal(0, .004, x.shape) - x.mean(0)
        yield Record(f'sequences{seed}/{i}', x=x, fs=fs, leads=LEADS, unit='mV',
                     labels={f'sequence/{name}': 1.}, r_peaks=np.zeros(0))


def sequence(name, t, rng):
    """One source of class `name` at times t (T,) in s, of order 1."""
    cycles = .5 * 16 ** rng.random() * t + rng.random()             # .5 to 8 Hz
    steps, f = rng.normal(size=len(t)), np.fft.rfftfreq(len(t), t[1])
    if name == 'walk':
        return np.cumsum(steps) / np.sqrt(len(t))
    if name == 'noise':                                             # power 1 / f^0 ... 1 / f^1.2
        return np.fft.irfft(np.fft.rfft(steps) * np.maximum(f, .3) ** (-.6 * rng.random()), len(t))
    sine = np.sin(math.tau * cycles)
    return np.sign(sine) if name == 'square' else sine


def array(path, fs, leads, unit, labels=None, ignore=()):
    """Your own recordings: .npy or .npz (key x) of shape (N, 12, T) or (N, T, 12). An .npz may
    carry id, leads, and, one for all or one each, fs and unit. labels: a csv of your own, matched
    by id where the .npz has ids, else row by row."""
    x, fs, leads, unit, ids = read_array(path, fs, leads, unit)
    rows = [{} for _ in x]
    if labels and ids is not None:
        rows = match_labels(labels, ignore, ids)
    elif labels:
        rows = read_labels(labels, ignore)
        if len(rows) != len(x) or not rows:
            raise Stop(f'{labels} has {len(rows)} rows for {len(x)} records')
        print(f'{labels}: matched by position, row 1 = {rows[0]["id"] or "record 0"}')
    for i, row in enumerate(rows):
        name = ids[i] if ids is not None else row.get('id') or f'{Path(path).stem}/{i}'
        yield Record(**row | dict(id=name), x=np.array(x[i], float), fs=fs[i], leads=leads,
                     unit=unit[i])


def read_array(path, fs, leads, unit):
    """(x (N, T, C), fs (N,), leads, unit (N,), ids or None) of an .npy, which is not read whole, or
    an .npz, which is."""
    try:
        file = np.load(path, mmap_mode='r', allow_pickle=False)
        file = dict(file) if isinstance(file, np.lib.npyio.NpzFile) else {'x': file}
    except UNREADABLE as e:
        raise Stop(f'{path} is no numeric .npy or .npz file ({e})')
    if 'x' not in file:
        raise Stop(f'{path} has no array x; it has {", ".join(file)}')
    x, leads = file['x'], np.ravel(file.get('leads', leads)).tolist()
    if x.ndim != 3 or len(leads) not in x.shape[1:] or x.dtype.kind not in 'iuf':
        raise Stop(f'{path} is {x.dtype} {x.shape}: numbers of shape (N, {len(leads)}, T) or '
                   f'(N, T, {len(leads)}) are needed')
    if fs and 'fs' in file:
        raise Stop(f'{path} holds its own sampling rate: leave --fs-in out')
    fs, unit = np.ravel(file.get('fs', fs or 0)), np.ravel(file.get('unit', unit))
    ids = np.ravel(file['id']).astype(str).tolist() if 'id' in file else None
    if not {len(fs), len(unit)} <= {1, len(x)} or len(ids or x) != len(x):
        raise Stop(f'{path} has {len(x)} records, but {len(fs)} fs, {len(unit)} units, '
                   f'{len(ids or x)} ids')
    if not fs.all():
        raise Stop(f'the sampling rate of {path} is unknown: add --fs-in HZ')
    fs, unit = np.broadcast_to(fs, len(x)).tolist(), np.broadcast_to(unit, len(x)).tolist()
    return x if x.shape[2] == len(leads) else x.transpose(0, 2, 1), fs, leads, unit, ids


def download(a):
    """Fetch PTB-XL or Challenge 2021 cohorts from PhysioNet into --root, by wfdb, which skips files
    that are there already. a: the command line's arguments."""
    import wfdb
    Path(a.root).mkdir(parents=True, exist_ok=True)
    if a.source == 'challenge':
        records = [r for r in wfdb.get_record_list('challenge-2021')
                   if not a.cohort or r.split('/')[1] in a.cohort]
        wfdb.dl_database('challenge-2021', a.root, records, annotators=None)
        return
    wfdb.dl_files('ptb-xl', a.root, ['ptbxl_database.csv', 'scp_statements.csv'])
    column = 'filename_lr' if a.rate == 100 else 'filename_hr'
    names = [row[column] for row in read_csv(Path(a.root, 'ptbxl_database.csv'), column)]
    names = [name for name in names if not a.folders or Path(name).parent.name in a.folders]
    wfdb.dl_files('ptb-xl', a.root, [name + end for name in names for end in ('.hea', '.dat')])


# -------------------------------------------------------------------------------------------------
# the synthetic 12-lead ECG
#
# The heart is a dipole that changes with time: a vector (x to the left, y down, z to the back; mV).
# A beat is a sum of 14 Gaussians of time, each with its own dipole. A lead sees a projection of it.
# Findings change the dipoles, the intervals and the rhythm, so every label is exact.
#
# `patient` and `record` are random generators. All records of a patient draw the same numbers from
# `patient`: what is drawn from it must not depend on anything that `record` gave.

# the Gaussians of a beat; X: late wave of RBBB or delta wave of WPW, J: ST segment, F1, F2: notches
WAVES = 'P1 P2 Q R1 R2 S X J T1 T2 U SPIKE F1 F2'.split()
P1, P2, Q, R1, R2, S, X, J, T1, T2, U, SPIKE, F1, F2 = range(14)


def table(text, kind=float):
    """A table in text as {first word of a row: array of the others}."""
    return {name: np.array(words, kind) for name, *words in map(str.split, text.splitlines())}


def matrix(text):
    """The numbers of a table in text."""
    return np.stack(list(table(text).values()))


def effects(words, n):
    """Words such as R2 .2 0 .35 S 0 .1 0, with n numbers a wave, as {R2: numbers, S: numbers}."""
    groups = [words[i:i + n + 1] for i in range(0, len(words), n + 1)]
    return {WAVES.index(wave): np.array(numbers, float) for wave, *numbers in groups}


# Dipoles of the waves in mV: mean and SD between patients, fitted to 297 normal PTB-XL records;
# those of LBBB; and sizes in a ventricular extrasystole, whose Gaussians all have one direction.
#      mean x, y, z       SD x, y, z       LBBB x, y, z      PVC
DIPOLES = matrix('''\
P1     .037  .063 -.022   .019 .032 .018   0    0    0     0
P2     .060  .074  .003   .022 .043 .024   0    0    0     0
Q     -.100 -.068 -.275   .166 .097 .176   .25  .1   .25   .4
R1     .850  .436  .160   .302 .298 .438   .7   .3   .8    .8
R2     .676  .382  .539   .482 .306 .341   .9   .2   1     1
S     -.240 -.042  .391   .186 .162 .253   .8   .1   .6    .6
X      0     0     0      0    0    0      .4   .05  .3    .3
J      0     .002 -.047   .030 .024 .033  -.12 -.02 -.25  -.1
T1     .120  .045 -.180   .090 .051 .113  -.16 -.04 -.3   -.3
T2     .216  .133 -.063   .131 .072 .097  -.2  -.05 -.15  -.35
U      .012  .010 -.010   .008 .008 .008   0    0    0     0
SPIKE  0     0     0      0    0    0      0    0    0     0
F1     0     0     0      .2   .16  .2     0    0    0     0
F2     0     0     0      .2   .16  .2     0    0    0     0''')      # (14, 10)

# Centres of the waves, from the middle of the QRS, and widths (SD): parts of the intervals, and ms
#      centre: QRS PR P QT ms        width: QRS PR P QT ms
TIMES = matrix('''\
P1    -.5   -1  .33  0     0    0     0  .165  0     0
P2    -.5   -1  .67  0     0    0     0  .165  0     0
Q     -.22   0  0    0     0    .085  0  0     0     0
R1    -.065  0  0    0     0    .083  0  0     0     0
R2     .065  0  0    0     0    .083  0  0     0     0
S      .22   0  0    0     0    .085  0  0     0     0
X      .30   0  0    0     0    .105  0  0     0     0
J      .5    0  0    0     48   0     0  0     0     40
T1    -.5    0  0    .679  0    0     0  0     .128  0
T2    -.5    0  0    .824  0    0     0  0     .088  0
U     -.5    0  0    .824  150  0     0  0     0     35
SPIKE -.5    0  0    0    -4    0     0  0     0     1.6
F1     .2    0  0    0     0    0     0  0     0     4
F2     .3    0  0    0     0    0     0  0     0     3.5''')         # (14, 10)

# What leads see: mV per mV of dipole (Dower's matrix of 1980, refitted to the same records) and its
# SD between patients; then mV that no dipole explains, where that of the wave has its mean size.
#    x       y        z         SD      P2    S     T1    T2
FIELD = matrix('''\
I    .6635 -.1477  -.0302   .177   .053  .056  .026  .034
II   .2520 1.0570  -.1480   .055   .015 -.020  .007  .008
V1  -.4877  .2899  -.7114   .118  -.013 -.074 -.029 -.020
V2  -.0792  .2652 -2.0316   .226   .019  .053  .045  .044
V3  1.2570 -.0358 -1.4720   .213  -.006 -.030 -.013 -.016
V4  1.4736  .1272  -.5844   .143  -.032 -.110 -.026 -.028
V5  1.1962  .1725  -.0762   .109  -.034 -.041 -.005 -.003
V6   .8424  .2398   .1102   .115  -.023  .006  .016  .018''')  # (8, 8)

FINDINGS = ('1dAVb RBBB LBBB SB AF ST '                           # these six are CODE's
            'IRBBB AFL PVC PAC SARR LAFB LVH RVH '
            'IMI AMI LMI STD STE TINV LQT LVOLT PACE WPW').split()
ACUTE = 'PVC PAC STD STE TINV LQT'.split()                        # drawn for each record
# Prevalence at age 54, slope of its log odds per decade of age, least and greatest severity; then
# what a finding of severity 1 adds to the dipoles of some waves: x, y, z in mV
TABLE = table('''\
1dAVb .05  .45 .3  1
RBBB  .045 .4  .35 1    X  -.55 0 -.75     T1 .05 0 .12        T2 .10 0 .25
IRBBB .05  0   .1  .4   X  -.55 0 -.75     T1 .05 0 .12        T2 .10 0 .25
LBBB  .035 .45 .5  1
AF    .05  .55 .3  1
AFL   .02  .4  .3  1
LAFB  .06  .35 .35 1    R1 .1 -.25 0       R2 .15 -.95 0       S  .2 -.6 .1
LVH   .08  .2  .25 1    R2 .2 0 .35        J  -.07 -.03 .05    T2 -.26 -.1 .1
RVH   .025 0   .3  1    R2 -.7 .3 -.9      S  -.5 .1 -.4       T2 .1 -.1 .2
IMI   .07  .4  .2  1    Q  0 -.38 0        R1 0 -.45 0         T2 0 -.2 0
AMI   .06  .4  .2  1    Q  -.057 0 .38     R1 -.0675 0 .45     T2 -.03 0 .2
LMI   .03  .4  .2  1    Q  -.38 .076 0     R1 -.45 .09 0       T2 -.2 .04 0
LVOLT .05  .2  .3  1
PACE  .02  .5  .5  1
WPW   .02 -.2  .3  1
PVC   .05  .3  .3  1
PAC   .04  .3  .3  1
STD   .07  .3  .3  1    J -.14 -.049 .049  T1 -.12 -.042 .042
STE   .03  0   .3  1    J -.033 .22 0      T1 -.024 .16 0
TINV  .06  .1  .3  1    T2 -.119 -.017 .34
LQT   .04  .1  .3  1''', str)
PREVALENCE = {name: row[:4].astype(float) for name, row in TABLE.items()}
EFFECTS = {name: effects(row[4:], 3) for name, row in TABLE.items()}
# a finding and those that it rules out, in this order
RULES_OUT = table('''\
AF    AFL PACE 1dAVb WPW PAC
AFL   PACE 1dAVb WPW PAC
PACE  LBBB RBBB IRBBB WPW LAFB LVH RVH IMI AMI LMI STD STE TINV 1dAVb PAC
LBBB  RBBB IRBBB WPW LAFB LVH RVH IMI AMI LMI STD STE TINV
RBBB  IRBBB WPW
IRBBB WPW
WPW   1dAVb
RVH   LVH
LVOLT LVH
IMI   AMI LMI
AMI   LMI
STD   STE
PVC   PAC''', str)
# shortest and longest QRS, ms
WIDE_QRS = table('RBBB 122 152\nIRBBB 100 116\nLBBB 124 160\nPACE 130 170\nWPW 105 130')

# The long tail: 216 rare labels, each a morphology of one territory of the heart in one of three
# severities. mV along the territory at severity 1; a 0 shrinks what the wave has along it.
TERRITORIES = matrix('''\
0   0     1     0
1  -.196  0    -.981
2   .406  0    -.914
3   .995  0     .100
4   .8   -.6    0
5   .704  .704  .101
6   0     0     1
7  -.921  .276 -.276''')
MORPHOLOGIES = table('''\
STdown    J -.16
STup      J .22
Tinverted T2 -.38
Ttall     T2 .42
Tflat     T1 0  T2 0
Q         Q -.42  R1 -.3
notch     F1 .8  F2 -.8
Rloss     R1 0  R2 0
U         U .14''', str)
MORPHOLOGIES = {name: effects(row, 1) for name, row in MORPHOLOGIES.items()}
SEVERITIES = table('mild .35 .55\nmoderate .55 .8\nsevere .8 1.1')
TAIL = [f'{m}-{t}-{s}' for t in range(8) for m in MORPHOLOGIES for s in SEVERITIES]
TAIL_PREVALENCE = .04 / (1 + np.random.default_rng(0).permutation(216) / 4) ** 1.1

TARGETS = 'hr pr qrs qt axis age'.split()                         # /min, ms, ms, ms, degrees, years
SYNTHETIC_LABELS = [f'findings/{name}' for name in FINDINGS]
SYNTHETIC_TASKS = [('code', SYNTHETIC_LABELS[:6]), ('unseen', SYNTHETIC_LABELS[6:])]
SYNTHETIC_LABELS = SYNTHETIC_LABELS + [f'tail/{name}' for name in TAIL]
SYNTHETIC_LABELS += [f'target/{name}' for name in TARGETS]

DEFAULT_SETTING = dict(
    age=0., female=.5,                          # years more; share of women
    often=1., seldom=1.,                        # factors of prevalence: AF, LBBB, PACE; the others
    field=1., electrode=.3,                     # factor of FIELD's SD; SD of V1-V6, in spacings
    gain=1., gain_sd=.07,                       # median; SD of the logarithm
    mains=.0007, mains_sd=1., mains_60=.5,      # mV RMS; SD of the logarithm; share of 60 Hz
    muscle=1., baseline=1.,                     # factors of noise
    highpass=0., lsb=2,                         # Hz, in half of the records; uV a count
    swap=0., twave=1.)                          # share with swapped arms; factor of the T wave
SHIFTS = {
    'age': dict(age=8., female=.6),
    'prevalence': dict(often=1.5, seldom=.6),
    'field': dict(field=1.5, electrode=.5),
    'gain': dict(gain=.85, gain_sd=.15),
    'noise': dict(mains=.015, mains_sd=.3, mains_60=1., muscle=2., baseline=1.6),
    'device': dict(highpass=.5, lsb=5),
    'swap': dict(swap=.03),
    'twave': dict(twave=.85)}


def patient_of(index):
    """Number of a record's patient: of ten patients, seven have 1 record and three have 2, 3, 4."""
    return index // 16 * 10 + int('0123456778889999'[index % 16])


def draw_findings(patient, record, setting):
    """A namespace of age (years), decades (from age 54), female (0. or 1.), sex (-1 or 1), findings
    {name: yes or no}, severity {name: number} and tail, see draw_tail."""
    age = np.clip(patient.normal(54 + setting['age'], 18), 18, 95)
    female = float(patient.random() < setting['female'])
    decades = (age - 54) / 10
    findings, severity = dict.fromkeys(FINDINGS, False), {}
    for name, (prevalence, slope, least, greatest) in PREVALENCE.items():
        rng = record if name in ACUTE else patient
        prevalence *= setting['often' if name in ('AF', 'LBBB', 'PACE') else 'seldom']
        # the last term keeps the prevalence over all ages near that at 54
        log_odds = math.log(prevalence / (1 - prevalence)) + slope * decades - .24 * slope ** 2
        findings[name] = rng.random() < 1 / (1 + math.exp(-log_odds))
        drawn = rng.uniform(least, greatest) + record.normal(0, .1)
        severity[name] = np.clip(drawn, least, greatest)
    for name, others in RULES_OUT.items():
        if findings[name]:
            findings.update(dict.fromkeys(others, False))
    return SimpleNamespace(age=age, decades=decades, female=female, sex=2 * female - 1,
                           findings=findings, severity=severity, tail=draw_tail(patient, findings))


def draw_tail(patient, findings):
    """Severity of each label of the long tail, 0 where it is absent: (8, 9, 3)."""
    tail = patient.random((8, 9, 3)) < TAIL_PREVALENCE.reshape(8, 9, 3)
    tail &= not (findings['LBBB'] or findings['PACE'] or findings['LVOLT'])
    for territory, morphology, level in np.argwhere(tail):        # the greatest severity stays
        tail[territory, morphology, :level] = False
    low, high = np.transpose(list(SEVERITIES.values()))
    return tail * patient.uniform(low, high, tail.shape)


def draw_intervals(patient, record, ecg):
    """Add heart rate (/min) and PR, P, QRS and QT (ms) to the ECG, and the findings that are
    thresholds of them. How they depend on age and sex was fitted to normal PTB-XL records."""
    findings, decades, sex = ecg.findings, ecg.decades, ecg.sex
    hr = patient.normal(71.2 + 1.25 * sex - .3 * decades, 4) + record.normal(0, 9.5)
    kind = record.random()
    if kind < .05:
        hr = 104 + 36 * record.random() ** 1.5 - 6 * record.random()
    elif kind < .10:
        hr = 57 - 16 * record.random() ** 1.3 + 4 * record.random()
    hr = np.clip(hr, 32, 180)
    ecg.flutter = record.uniform(4.4, 5.6)                        # rate of the atria, Hz
    if findings['AF']:
        hr = record.uniform(60, 130)
    if findings['AFL']:
        hr = 60 * ecg.flutter / record.integers(2, 5)
    pr = patient.normal(158 + 4.5 * decades, 14) + record.normal(-.25 * (hr - 70), 4)
    pr = np.clip(pr, 100, 320)
    if findings['WPW']:
        pr = patient.uniform(95, 115)
    if findings['1dAVb']:
        pr = 206 + 80 * patient.random() ** 1.3 - 4 * patient.random()
    qrs = np.clip(patient.normal(88 - 2.4 * sex, 7), 66, 118)
    for name, (shortest, longest) in WIDE_QRS.items():
        if findings[name]:
            qrs = patient.uniform(shortest, longest)
    qtc = patient.normal(402 + 5 * sex + 1.5 * decades, 15) + record.normal(0, 8)
    qtc += .8 * max(qrs - 88, 0)
    if findings['LQT']:
        qtc = 470 + 50 * record.random() ** 1.2 - 6 * record.random()
    ecg.sway = min(.018 * patient.lognormal(-.30 * decades, .55), .25)    # of RR with breathing
    ecg.sinus = sinus = not (findings['AF'] or findings['AFL'] or findings['PACE'])
    findings['1dAVb'] = sinus and pr > 200 and not findings['WPW']
    findings['SB'] = sinus and hr < 55
    findings['ST'] = sinus and hr > 100
    findings['SARR'] = sinus and ecg.sway > .06
    findings['LQT'] = qtc > 465 + 5 * sex and not findings['PACE']
    ecg.hr, ecg.pr, ecg.qrs = hr, pr, qrs
    ecg.p_wave = np.clip(patient.normal(102 + 4 * decades, 8), 70, 140)
    ecg.qt = qtc - 154 * (1 - 60 / hr)                            # Framingham's correction
    ecg.breath, ecg.breath_phase = patient.uniform(.20, .32), record.random()     # Hz, cycles


def draw_beats(rng, ecg, seconds):
    """Times of the R-peaks in s, from just before 0 to just after the end, and whether each beat is
    ectopic (two arrays). A longer record begins with the same beats."""
    findings, mean = ecg.findings, 60 / ecg.hr
    irregularity = rng.uniform(.12, .26)                          # of RR in AF
    varies, slow_phase = rng.random() < .35, rng.random()         # the block in AFL
    rate = .05 + .17 * rng.random() ** 2                          # of ectopic beats
    surely = 2 + int(rng.random() * max(ecg.hr / 6 - 4, 1))       # one comes within 10 s
    beats, ectopic = [-mean * rng.random()], [False]
    while beats[-1] < seconds + 1:
        k, z, block = len(beats), rng.normal(), rng.integers(2, 5)
        u, early = rng.random(), rng.uniform(.58, .78)
        rr = mean
        if findings['AF']:
            rr *= math.exp(irregularity * z)
        if findings['AFL'] and varies:
            rr = block / ecg.flutter
        if ecg.sinus:
            breath = math.sin(math.tau * (ecg.breath * k * mean + ecg.breath_phase))
            slow = math.sin(math.tau * (.095 * k * mean + slow_phase))
            rr *= 1 + ecg.sway * (breath + .6 * slow) + .006 * z
        if ectopic[-1]:
            rr *= pause
        can = (findings['PVC'] or findings['PAC']) and not ectopic[-1]
        ectopic.append(can and (u < rate or k == surely))
        if ectopic[-1]:
            rr *= early
            pause = 2 - early if findings['PVC'] else 1.08
        beats.append(beats[-1] + max(rr, .24))
    return np.array(beats), np.array(ectopic)


def draw_dipoles(patient, record, ecg, setting):
    """The dipoles of a beat: (14, 3) in mV."""
    sex, decades = ecg.sex, ecg.decades
    own = patient.normal(0, .62, (14, 3)) + record.normal(0, .18, (14, 3))
    A = DIPOLES[:, :3] + DIPOLES[:, 3:6] * own
    A[[P1, P2]] *= patient.lognormal(0, .20) * ecg.sinus
    A[[Q, R1, R2, S, F1, F2]] *= patient.lognormal(-.07 * decades - .05 * sex, .20)
    size = max(1 - .05 * decades - .12 * sex, .4) * setting['twave']
    A[[T1, T2]] *= size * patient.lognormal(0, .18) * record.lognormal(0, .08)
    A[J, 2] += .025 * sex
    A[J] += max(ecg.hr - 75, 0) * np.array([-.00042, -.00042, .00021])
    add_findings(A, patient, ecg.findings, ecg.severity)
    add_tail(A, ecg.tail)
    if ecg.findings['LVOLT']:
        A *= patient.uniform(.3, .6)
    turn = patient.normal(0, [11, 11, 14]) + record.normal(0, 3, 3)   # degrees about x, y, z
    turn[2] += 4 * sex - 7 * decades
    return Rotation.from_rotvec(turn, degrees=True).apply(A)


def direction(rng):
    """A random direction: (3,) of length 1."""
    v = rng.normal(size=3)
    return v / np.linalg.norm(v)


def add_findings(A, patient, findings, severity):
    """Change the dipoles A (14, 3) as the findings demand."""
    for name in ('RBBB', 'IRBBB'):
        if findings[name]:
            A[S] *= 1 - .6 * severity[name]
    for name in ('LBBB', 'PACE'):
        if findings[name]:
            up = [1, -2.5, 1] if name == 'PACE' else 1            # paced from below
            A[Q:U] += severity[name] * (DIPOLES[Q:U, 6:9] * up - A[Q:U])
    if findings['PACE']:
        A[SPIKE] += patient.uniform(.5, 2) * direction(patient)
    if findings['WPW']:
        A[X] += .5 * severity['WPW'] * direction(patient)
    if findings['LVH']:
        A[[R1, R2, S]] *= 1 + .75 * severity['LVH']
    spared = patient.random() < .4                                # infarcts that leave the T wave
    for name, effect in EFFECTS.items():
        if findings[name]:
            for k, dipole in effect.items():
                if not (k == T2 and spared and name.endswith('MI')):
                    A[k] += severity[name] * dipole


def add_tail(A, tail):
    """Change the dipoles A (14, 3) as the labels of the long tail (8, 9, 3) demand."""
    waves = list(MORPHOLOGIES.values())
    for t, m, level in np.argwhere(tail):
        severity, along = tail[t, m, level], TERRITORIES[t]
        for k, gain in waves[m].items():
            change = severity * gain if gain else -min(1.2 * severity, 1) * A[k] @ along
            A[k] += change * along


def wave_times(patient, ecg):
    """Centres and widths of a beat's Gaussians, (14,) each, in s from the middle of the QRS."""
    intervals = np.array([ecg.qrs, ecg.pr, ecg.p_wave, ecg.qt, 1]) / 1000
    centre, width = TIMES[:, :5] @ intervals, TIMES[:, 5:] @ intervals
    centre[[F1, F2]] *= patient.uniform(-1, 1)
    if ecg.findings['WPW']:                                       # X comes first, as the delta wave
        centre[X] *= -1.1
        width[X] *= .10 / .105
    return centre, width


def draw_field(patient, record, setting):
    """What leads I, II, V1 ... V6 see of a dipole: (8, 3)."""
    field = FIELD[:, :3] + setting['field'] * FIELD[:, 3:4] * patient.normal(size=(8, 3))
    # the electrodes of V1 ... V6 slide along their row
    at = np.arange(6) + patient.normal(0, setting['electrode'], 6) + record.normal(0, .12, 6)
    left = np.clip(at.astype(int), 0, 4)
    part = np.clip(at - left, -.5, 1.5)[:, None]
    chest = field[2:]
    field[2:] = chest[left] + part * (chest[left + 1] - chest[left])
    return field


def ectopic_beat(record, ecg, A, M, field, local, centre, width):
    """M, centres and widths of an ectopic beat, from the dipoles A, M, ... of a normal one."""
    M, centre, width = M.copy(), centre.copy(), width.copy()
    if ecg.findings['PAC']:                                       # its P wave starts elsewhere
        M[[P1, P2]] = A[[P1, P2]] * [.4, -.8, 1.2] @ field.T
        return M, centre, width
    A = np.outer(DIPOLES[:, 9] * (1.1 + .5 * abs(record.normal())), direction(record))
    qrs = record.uniform(150, 175)
    centre[Q:J] *= qrs / ecg.qrs
    width[Q:J] *= qrs / ecg.qrs
    centre[J:] += qrs / 3000
    return A @ field.T + local * np.linalg.norm(A, axis=1, keepdims=True), centre, width


def add_beats(x, t, beats, M, centre, width):
    """Add to x (T, 8) the Gaussians M (14, 8) of a beat at each of `beats`. All times in s."""
    for beat in beats:
        start, stop = np.searchsorted(t, [beat - .5, beat + 1])   # no Gaussian reaches further
        after = t[start:stop, None] - beat                        # (n, 1)
        x[start:stop] += np.exp(-.5 * ((after - centre) / width) ** 2) @ M    # (n, 14) @ (14, 8)


def noise_free(patient, record, ecg, beats, ectopic, setting, t):
    """Leads I, II, V1 ... V6 (T, 8) in mV, and the axis of the QRS in degrees."""
    A, (centre, width) = draw_dipoles(patient, record, ecg, setting), wave_times(patient, ecg)
    field = draw_field(patient, record, setting)
    local = patient.normal(0, [.05] * 2 + [.16] * 6, (14, 8))     # beyond any dipole
    size = np.linalg.norm(A, axis=1, keepdims=True)               # (14, 1)
    M = A @ field.T + local * size                                # (14, 8)
    ks = [P2, S, T1, T2]
    relative = size[ks] / np.linalg.norm(DIPOLES[ks, :3], axis=1, keepdims=True)
    M[ks] += np.minimum(relative, 2) * FIELD[:, 4:].T
    x = np.zeros((len(t), 8))
    add_beats(x, t, beats[~ectopic], M, centre, width)
    if ecg.findings['PVC'] or ecg.findings['PAC']:
        other = ectopic_beat(record, ecg, A, M, field, local, centre, width)
        add_beats(x, t, beats[ectopic], *other)
    breath = 1 + .025 * np.sin(math.tau * (ecg.breath * t + ecg.breath_phase))
    x *= setting['gain'] * patient.lognormal(0, setting['gain_sd']) * breath[:, None]
    x += atrial_waves(record, ecg, t)
    I, II = width[Q:J] @ M[Q:J, :2]                               # area of the QRS
    aVF = II - I / 2
    return x, math.degrees(math.atan2(aVF * 2 / 3 ** .5, I))


def atrial_waves(rng, ecg, t):
    """Fibrillation or flutter at times t (T,): (T, 8) in mV; 0 in other rhythms."""
    if ecg.findings['AF']:
        drift = .3 * np.sin(math.tau * (.31 * t + rng.random()))
        phase = math.tau * (rng.uniform(4.5, 8) * t + drift + rng.random())
        wave = rng.uniform(.012, .057) * (np.sin(phase) + .4 * np.sin(2 * phase + 1))
        return np.outer(wave, [.3, .6, 1, .6, .35, .25, .2, .2])
    if ecg.findings['AFL']:                                       # a sawtooth
        phase = math.tau * (ecg.flutter * t + rng.random())
        wave = np.sin(phase) + .45 * np.sin(2 * phase) + .2 * np.sin(3 * phase)
        return rng.uniform(.05, .13) * np.outer(wave, [.25, 1, -.6, -.3, .2, .25, .25, .25])
    return 0.


def coloured(rng, power, T):
    """Noise (n, T) of these powers (n, F) at the frequencies, in random phases."""
    waves = np.exp(2j * math.pi * rng.random(power.shape))
    return np.fft.irfft(np.sqrt(power / 2) * T * waves, n=T)


def draw_noise(rng, t, setting):
    """Noise in leads I, II, V1 ... V6 (T, 8) in mV, from that of nine electrodes: baseline wander,
    pink noise, muscle, mains, now and then a bump. Sizes are mV RMS."""
    T, f = len(t), np.fft.rfftfreq(len(t), t[1])
    wander = np.exp(-(f / .28) ** 2) * (f > 0)
    pink = np.maximum(f, .3) ** -.9 / (1 + (f / 15) ** 2) * (f > .35)
    muscle = f / (f + 12) / (1 + (f / 70) ** 2)
    wander /= wander.sum()
    pink *= (.009 * rng.lognormal(0, .4)) ** 2 / pink.sum()
    muscle *= (.0045 * setting['muscle'] * rng.lognormal(0, .65)) ** 2 / muscle.sum()
    size = setting['baseline'] * rng.lognormal(0, .75)
    own = size * rng.lognormal(0, .45, 9) * ([.018] * 3 + [.0155] * 6)
    e = coloured(rng, np.outer(own ** 2, wander) + pink + muscle, T)  # (9, T)
    e[3:] += coloured(rng, (.047 * size) ** 2 * wander, T)         # V1 ... V6 share most wander
    hz = 60 if rng.random() < setting['mains_60'] else 50
    size = setting['mains'] * rng.lognormal(0, setting['mains_sd']) * rng.lognormal(0, .3, (9, 1))
    e += 2 ** .5 * size * np.sin(math.tau * (hz * t + rng.random((9, 1))))
    if rng.random() < .1:
        bump = np.exp(-.5 * ((t - rng.uniform(0, t[-1])) / rng.uniform(.1, .4)) ** 2)
        e[rng.integers(9)] += rng.choice([-1, 1]) * rng.uniform(.15, .65) * bump
    ra, la, ll = e[:3]
    return np.stack([la - ra, ll - ra, *(e[3:] - e[:3].mean(0))], 1)


def twelve_leads(x, lsb, swapped):
    """I, II, V1 ... V6 (T, 8) in mV to int16 uV in the order of LEADS (T, 12). Counts of I and II
    are even, so that Einthoven's and Goldberger's relations hold exactly."""
    I, II = 2 * np.rint(x[:, :2].T * 500 / lsb)
    if swapped:                                                   # the arms: II becomes III
        I, II = -I, II - I
    chest = np.rint(x[:, 2:].T * 1000 / lsb)
    counts = np.stack([I, II, II - I, -(I + II) / 2, I - II / 2, II - I / 2, *chest], 1)
    return (counts * lsb).astype(np.int16)


def synthesize(seed, index, seconds=10., fs=240, shifts=(), noise=True):
    """Synthetic ECG number `index`, which depends on (seed, index, shifts) alone. `shifts`: names
    from SHIFTS, which make another cohort.

    Returns a dict: x (T, 12) int16 uV in the order of LEADS; patient, a number; female, 0. or 1.;
    age in years; findings {name: 0. or 1.}; tail (216,), 0. or 1., in the order of TAIL; targets
    {name: value} in the units of TARGETS, NaN where undefined; beats (n,), the R-peaks in s."""
    setting = dict(DEFAULT_SETTING)
    for name in shifts:
        setting.update(SHIFTS[name])
    cohort, number = zlib.crc32(','.join(sorted(shifts)).encode()), patient_of(index)
    # beats and noise have generators of their own, since longer records draw more of them
    patient, record, beat_rng, noise_rng = [
        np.random.default_rng([seed, cohort, k, n])
        for k, n in enumerate([number, index, index, index])]
    ecg = draw_findings(patient, record, setting)
    draw_intervals(patient, record, ecg)
    beats, ectopic = draw_beats(beat_rng, ecg, seconds)
    t = np.arange(round(seconds * fs)) / fs
    x, axis = noise_free(patient, record, ecg, beats, ectopic, setting, t)
    if noise:
        x += draw_noise(noise_rng, t, setting)
    if setting['highpass'] and record.random() < .5:
        x = apply_filter(x, fs, f'hp{setting["highpass"]}')
    x = twelve_leads(x, setting['lsb'], swapped=record.random() < setting['swap'])
    beats = beats[(beats >= 0) & (beats < seconds)]
    hr = 60 / np.diff(beats).mean() if len(beats) > 1 else nan
    targets = [hr, ecg.pr if ecg.sinus else nan, ecg.qrs, ecg.qt, axis, ecg.age]
    return dict(x=x, patient=number, female=ecg.female, age=ecg.age, beats=beats,
                findings={name: float(found) for name, found in ecg.findings.items()},
                tail=(ecg.tail > 0).ravel() * 1., targets=dict(zip(TARGETS, targets)))


def load_synthetic(record, seed, index, seconds, shifts):
    """Fill in a Record of `synthetic`."""
    ecg = synthesize(seed, index, seconds, shifts=shifts)
    record.x, record.fs, record.leads, record.unit = ecg['x'], 240, LEADS, 'uV'
    record.age, record.sex, record.r_peaks = ecg['age'], ecg['female'], ecg['beats']
    values = [*ecg['findings'].values(), *ecg['tail'], *ecg['targets'].values()]
    record.labels = dict(zip(SYNTHETIC_LABELS, values))


def synthetic(records, seed=0, seconds=10., shifts=()):
    """Yield the Records 0 ... records - 1. Each is made when it is loaded, in a worker."""
    cohort = '-'.join([f'synthetic{seed}', *sorted(shifts)])
    for index in range(records):
        load = partial(load_synthetic, seed=seed, index=index, seconds=seconds,
                                 shifts=shifts)
        yield Record(f'{cohort}/{index}', f'{cohort}/patient{patient_of(index)}', load=load)


# -------------------------------------------------------------------------------------------------
# from a record to the contract

UNITS = {'mv': 1., 'uv': 1e-3, '\u00b5v': 1e-3, '\u03bcv': 1e-3, 'v': 1e3}             # in mV


def take_leads(x, fs, leads, unit, contract):
    """The contract's leads of x (T, C), by name in any case and order: (T', 12) in mV. Padding
    (zero or NaN in all leads for over .1 s at an end) is cut off. Raises BadRecord."""
    if not 50 <= fs <= 10000:
        raise BadRecord('absurd fs')
    unit = str(unit).lower()
    if unit not in UNITS:
        raise BadRecord(f'unknown unit {unit}')
    names = [str(name).strip().upper() for name in leads]
    for lead in contract.leads:
        if names.count(lead.upper()) != 1:
            raise BadRecord(f'lead {lead} missing or named twice')
    columns = [names.index(lead.upper()) for lead in contract.leads]
    x = np.asarray(x, float)[:, columns] * UNITS[unit]
    if len(x) > MAX_SECONDS * fs:
        raise BadRecord('longer than an hour')
    filled = np.flatnonzero((np.isfinite(x) & (x != 0)).any(1))
    if not len(filled):
        raise BadRecord('empty')
    start, end = filled[0], filled[-1] + 1
    return x[start if start > .1 * fs else 0:end if len(x) - end > .1 * fs else len(x)]


def signal_hash(x):
    """Sixteen hexadecimal digits by which the source signal x (T, 12) in mV is known again under
    another file name, folder, container, unit or order of leads: a hash of lead II in uV, of V2
    where II is flat. (PTB-XL has a recording twice that differs in V2 and V5 alone.)"""
    x = np.where(np.isfinite(x), x, 0)
    lead = x[:, 1] if np.ptp(x[:, 1]) > .002 else x[:, 7]
    counts = np.floor(1000 * lead + .51).astype(np.int64)           # rounds; .01 is for halves
    return hashlib.blake2b(counts.tobytes(), digest_size=8).hexdigest()


def fill_gaps(x, fs):
    """x (T, C) with gaps of up to .1 s interpolated. Raises BadRecord at a longer gap, and if gaps
    are over 5 % of a lead."""
    gaps = ~np.isfinite(x)
    if not gaps.any():
        return x
    runs, _ = scipy.ndimage.label(gaps, [[0, 1, 0]] * 3)            # runs along time, lead by lead
    if np.bincount(runs.ravel())[1:].max() > .1 * fs or gaps.mean(0).max() > .05:
        raise BadRecord('NaN or inf beyond a short gap')
    import pandas as pd
    return pd.DataFrame(np.where(gaps, np.nan, x)).interpolate(limit_direction='both').values


def to_contract(x, fs, leads, unit, contract):
    """x (T, C) in `unit` at `fs` Hz to (T', 12) in the contract's unit and rate. Returns it, the
    leads in mV at `fs` Hz with gaps filled, and these with gaps as they are. Raises BadRecord."""
    raw = take_leads(x, fs, leads, unit, contract)
    window = round(contract.window * fs)
    if len(raw) < window:
        raise BadRecord('shorter than a window')
    filled = fill_gaps(raw, fs)
    windows = filled[:len(raw) // window * window].reshape(-1, window, raw.shape[1])
    flat = (np.ptp(windows, axis=1) < 2e-3).mean(0) > .5            # in most of its windows
    if flat.sum() > 2:
        raise BadRecord('more than two flat leads')
    if np.abs(filled).max() > 32.767:
        raise BadRecord('beyond 32.767 mV: wrong gain or unit?')
    y = resample(apply_filter(filled, fs, contract.filter), fs, contract.fs)
    if contract.norm == 'record':
        y = (y - y.mean(0)) / (y.std(0) + 1e-6)
    return y, filled, raw


def apply_filter(x, fs, steps):
    """x (T, C) through a contract's filter: second-order Butterworth steps and notches of Q 30,
    forwards and backwards. A lp or notch above half of fs has nothing to remove."""
    for kind, hz in re.findall(r'(hp|lp|notch)([\d.]+)', steps):
        hz = float(hz)
        if hz >= fs / 2:
            continue
        if kind == 'notch':
            x = scipy.signal.filtfilt(*scipy.signal.iirnotch(hz, 30, fs), x, axis=0)
        else:
            sos = scipy.signal.butter(2, hz, kind, fs=fs, output='sos')
            x = scipy.signal.sosfiltfilt(sos, x, axis=0)
    return x


def resample(x, fs, to):
    """x (T, C) from fs to `to` Hz by a polyphase filter, which removes what would alias."""
    if fs == to:
        return x
    ratio = Fraction(to / fs).limit_denominator(1000)
    return scipy.signal.resample_poly(x, ratio.numerator, ratio.denominator, axis=0, padtype='line')


def find_r_peaks(x, fs):
    """R-peaks in s of x (T, 12) in mV: wfdb's XQRS at 240 Hz (at 100 Hz it counts twice) on the
    first of V5, V2, II, I in which it finds at least 24 a minute."""
    from wfdb.processing import XQRS
    x = resample(x, fs, 240)
    for lead in ('V5', 'V2', 'II', 'I'):
        signal = x[:, LEADS.index(lead)]
        if np.ptp(signal) < .02:
            continue
        detector = XQRS(signal, 240)
        detector.detect(verbose=False)
        if len(detector.qrs_inds) >= max(2, .4 * len(x) / 240):
            return np.asarray(detector.qrs_inds) / 240
    return np.zeros(0)


def limbs_fit(x):
    """Do the limb leads of x (T, 12) obey Einthoven and Goldberger, III = II - I and so on?."""
    I, II = x.T[:2]
    derived = np.stack([II - I, -(I + II) / 2, I - II / 2, II - I / 2], 1)
    return not (np.std(x[:, 2:6] - derived, 0) > .1 * np.std(II) + .02).any()


def process(record, contract, peaks=True):
    """In a worker: (record without its signal, counts (T, 12) int16, facts), or (record, None, the
    reason for dropping it)."""
    try:
        if record.load:
            record.load(record)
        x, filled, raw = to_contract(record.x, record.fs, record.leads, record.unit, contract)
        counts = np.rint(x / contract.scale)
        if np.abs(counts).max() > 32767:
            raise BadRecord('beyond the range of int16')
        odd = record.r_peaks is None and not limbs_fit(filled)
        if record.r_peaks is None:
            record.r_peaks = find_r_peaks(filled, record.fs) if peaks else np.zeros(0)
        record.r_peaks = np.rint(record.r_peaks * contract.fs).astype(np.int32)
        facts = dict(signal=signal_hash(raw), gaps=not np.isfinite(raw).all(), odd=odd)
        counts = counts.astype(np.int16)
    except BadRecord as e:
        counts, facts = None, str(e)
    except FileNotFoundError:
        counts, facts = None, 'file missing'
    except Exception as e:                             # what a damaged file makes a library raise
        counts, facts = None, f'unreadable ({type(e).__name__})'
    return replace(record, x=None, load=None), counts, facts


def process_all(records, contract, peaks, workers):
    """What `process` makes of each record, in order, in `workers` processes (None: one per core),
    256 records at a time so that a fast reader cannot fill the memory."""
    work = partial(process, contract=contract, peaks=peaks)
    if workers == 1:
        yield from map(work, records)
        return
    records = iter(records)
    with ProcessPoolExecutor(workers) as pool:
        while block := list(itertools.islice(records, 256)):
            yield from pool.map(work, block, chunksize=4)


# -------------------------------------------------------------------------------------------------
# folds

def fold_of(patient):
    """Fold 1 ... 10 of a patient, by hash: it never depends on what else is in the set."""
    return int(hashlib.blake2b(patient.encode(), digest_size=4).hexdigest(), 16) % 10 + 1


def stratify(Y, groups=None, folds=10, seed=0):
    """Folds 0 ... folds - 1 (N,) with even shares of each label: iterative stratification (Sechidis
    et al. 2011). Y (N, K) is above 0 where a record has a label. Records of a group (a patient)
    stay together; a group without labels gets -1, which always trains. The rarest label comes
    first, and of its groups those with most of it. Each group goes to the fold that needs this
    label most. Ties: the fold that needs most of all the group's labels (our choice), then most
    records, then at random."""
    group = np.arange(len(Y)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = np.zeros((group.max() + 1, Y.shape[1]), int)            # (groups, K), in records
    np.add.at(count, group, np.asarray(Y) > 0)
    size, fold = np.bincount(group), np.full(len(count), -1)
    lot = np.random.default_rng(seed).random((len(count), folds))
    lack = np.repeat(count.sum(0)[None], folds, 0)                  # (folds, K), times `folds`
    room = np.full(folds, size[count.any(1)].sum())
    left = (count > 0).sum(0)                                       # groups to be placed, by label
    while left.any():
        k = np.where(left > 0, left, left.max() + 1).argmin()
        todo = np.flatnonzero((fold < 0) & (count[:, k] > 0))
        for g in todo[np.argsort(-count[todo, k], kind='stable')]:
            f = np.lexsort((lot[g], room, lack @ (count[g] > 0), lack[:, k]))[-1]
            fold[g] = f
            lack[f] -= folds * count[g]
            room[f] -= folds * size[g]
            left -= count[g] > 0
    return fold[group]


def draw_folds(index, strata, how):
    """Folds (N,) of the records whose source gives none, by hash of the patient or by `stratify`.
    'auto': stratified if there are labels and under 1,000 records. Where the source gives some, the
    other records get -1, which always trains, unless their patient has a fold."""
    fold, patient, names = index['fold'], index['patient'], sorted(set(itertools.chain(*strata)))
    if (fold >= 0).any():
        given = dict(zip(patient[fold >= 0], fold[fold >= 0]))
        drawn = np.array([given.get(name, -1) for name in patient])
    elif how == 'hash' or not names or (how == 'auto' and len(fold) >= 1000):
        drawn = np.array([fold_of(name) for name in patient])
    else:
        Y = [[name in its for name in names] for its in map(set, strata)]
        drawn = stratify(np.array(Y), patient)
    fold = np.where(fold >= 0, fold, drawn)
    folds_of = {}
    for name, f in zip(patient.tolist(), fold.tolist()):
        if folds_of.setdefault(name, f) != f:
            raise Stop(f'patient {name} is in folds {folds_of[name]} and {f}: a patient must stay '
                       'in one fold')
    return fold


# -------------------------------------------------------------------------------------------------
# prepared datasets

def prepare(name, records, contract=Contract(), source='', extra_tasks=(), workers=None, peaks=True,
            total=None, folds='hash'):
    """Write datasets/NAME from a reader's records, streaming. The folder appears when it is
    complete and replaces an older one. Bad records are dropped and counted by reason. folds: how
    records get one whose source gives none, see `draw_folds`. Returns the content of meta.json."""
    if not re.fullmatch(r'\w[\w.-]*', name):
        raise Stop(f'{name!r} cannot name a dataset: use letters, digits, _, - and .')
    home, temporary = Path('datasets', name), Path('datasets', f'.{name}.partial')
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        finished = process_all(records, contract, peaks, workers)
        finished = tqdm(finished, f'preparing {name}', total, unit='rec', disable=None)
        meta, index = write_dataset(temporary, finished, contract, folds)
        meta |= dict(source=source, tasks=group_tasks(meta['labels'], extra_tasks))
        (temporary / 'meta.json').write_text(json.dumps(meta, indent=1))
        shutil.rmtree(home, ignore_errors=True)
        temporary.rename(home)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print_summary(name, meta, index)
    return meta


def group_tasks(names, extra=()):
    """{task: columns}: a task for each label set, and the extra ones, pairs of a task and its
    names."""
    tasks = {}
    for column, name in enumerate(names):
        tasks.setdefault(name.split('/')[0], []).append(column)
    return tasks | {task: [names.index(name) for name in its] for task, its in extra}


class LabelTable:
    """Labels as they come, record by record, kept sparse: only values that are not 0 take room."""

    def __init__(self):
        self.column = {}                                            # label -> column
        self.rows, self.columns, self.values = compact('q'), compact('q'), compact('f')
        self.sets, self.kind = {}, compact('q')                     # label sets; which a row uses

    def add(self, labels):
        """One record's labels."""
        used = frozenset(label.split('/')[0] for label in labels)
        for label, value in labels.items():
            column = self.column.setdefault(label, len(self.column))
            if value:                                               # NaN too
                self.rows.append(len(self.kind))
                self.columns.append(column)
                self.values.append(value)
        self.kind.append(self.sets.setdefault(used, len(self.sets)))

    def write(self, path):
        """Save as .npy (N, K) float32: NaN in the label sets that a record does not use."""
        table = np.lib.format.open_memmap(path, 'w+', np.float32,
                                          (len(self.kind), len(self.column)))
        for used, kind in self.sets.items():
            unknown = [k for label, k in self.column.items() if label.split('/')[0] not in used]
            table[np.ix_(np.array(self.kind) == kind, unknown)] = np.nan
        table[np.array(self.rows), np.array(self.columns)] = self.values
        table.flush()
        return table


def write_dataset(folder, finished, contract, folds):
    """Write the files of a prepared dataset except meta.json. Returns the content of meta.json, and
    the index."""
    began, dropped, ids, strata, labels = time.time(), Counter(), set(), [], LabelTable()
    rows, r_peaks, peak_start, heights = [], compact('i'), compact('q', [0]), compact('f')
    digest, offset, gaps, odd = hashlib.blake2b(digest_size=8), 0, 0, 0
    with open(folder / 'signals.i16', 'wb') as signals:
        for record, counts, facts in finished:
            if record.id in ids:
                raise Stop(f'record id {record.id} appears twice: make the ids unique')
            ids.add(record.id)
            if counts is None:
                dropped[facts] += 1
                continue
            its_labels = record.labels or {}
            labels.add(its_labels)
            if folds != 'hash':
                positive = [name for name, value in its_labels.items() if value > 0]
                positive = positive or ['none'] * bool(its_labels)  # spreads those without findings
                strata.append(positive if record.strata is None else record.strata)
            patient = record.patient or same_recording(record.id)
            rows.append((offset, len(counts), record.id, patient, facts['signal'], record.fold,
                         record.age, record.sex))
            r_peaks.extend(record.r_peaks.tolist())
            peak_start.append(len(r_peaks))
            heights.append(contract.scale * np.median(np.ptp(counts, 0)))
            data = counts.tobytes()
            signals.write(data)
            digest.update(data)
            offset += len(counts)
            gaps += facts['gaps']
            odd += facts['odd']
    if not rows:
        why = '; '.join(f'{n} {reason}' for reason, n in dropped.most_common())
        raise Stop(f'nothing left to prepare: {why or "the source holds no records"}')
    keys = 'offset', 'length', 'id', 'patient', 'signal', 'fold', 'age', 'sex'
    index = dict(zip(keys, map(np.array, zip(*rows))))
    index['fold'] = draw_folds(index, strata, folds)
    index |= dict(peaks=np.array(r_peaks, np.int32), peak_start=np.array(peak_start))
    digest.update(labels.write(folder / 'labels.npy'))              # not copied: it may be large
    for values in index.values():
        digest.update(values.tobytes())
    np.savez(folder / 'index.npz', **index)
    return dict(contract=asdict(contract), labels=list(labels.column), records=len(rows),
                seen=len(ids), dropped=dict(dropped), gaps=gaps, odd_limbs=odd,
                height=float(np.median(heights)), seconds=round(time.time() - began, 1),
                hash=digest.hexdigest()), index


def print_summary(name, meta, index):
    """Say what has been prepared, what about it looks wrong, and what to do next."""
    fs, n = meta['contract']['fs'], meta['records']
    print(f'{name}: {n:,} of {meta["seen"]:,} records kept, {len(set(index["patient"])):,} '
          f'patients, {index["length"].sum() / fs / 3600:.1f} h of signal, {len(meta["labels"])} '
          f'labels, {len(index["peaks"]):,} R-peaks; {meta["seconds"]} s')
    for reason, count in meta['dropped'].items():
        print(f'  {count:,} dropped: {reason}')
    folds, sizes = np.unique(index['fold'], return_counts=True)
    print(f'  {(folds >= 0).sum()} folds of {sizes[folds >= 0].min(initial=n):,} to '
          f'{sizes[folds >= 0].max(initial=0):,} records')
    rate = np.median(60 * fs * np.diff(index['peak_start']) / index['length'])
    if meta['contract']['norm'] == 'none' and len(index['peaks']):
        print(f'  median heart rate {rate:.0f}/min, median height of a lead {meta["height"]:.2g} mV'
              + ('' if 40 < rate < 140 and .3 < meta['height'] < 5
                 else ': unusual, is the sampling rate or the gain wrong?'))
    print(f'  {meta["gaps"]:,} with short gaps filled, {n - len(set(index["signal"])):,} with the '
          f'signal of another one, {meta["odd_limbs"]:,} whose limb leads do not fit together '
          '(III = II - I and so on)')
    print(f'  next: python train.py --data {name}; for a small set, '
          f'python evaluate.py RUN --data {name}')


# -------------------------------------------------------------------------------------------------
# the tasks of the two papers

# how to prepare the data of a task, ROOT standing for the folder of the source. --window 10 keeps
# records of 10 s or more. The second paper standardises CPSC2018 and PTB-XL, normalises and
# band-passes CSN (Chapman, Shaoxing and Ningbo merged): cut-offs .5 and 40 Hz, like those of
# --contract sc, are ours. chapman stands in for the original on figshare, an xlsx file
PREPARE = '''
ningbo        challenge --root ROOT --cohort ningbo
cpsc2018      challenge --root ROOT --cohort cpsc_2018 --window 10
cpsc_extra    challenge --root ROOT --cohort cpsc_2018_extra --window 10
georgia       challenge --root ROOT --cohort georgia --window 10
chapman       challenge --root ROOT --cohort chapman_shaoxing
sph           sph --root ROOT
ptbxl         ptbxl --root ROOT --rate 500
zzu           zzu --root ROOT --window 10
echonext      echonext --root ROOT
mimic         mimic --root ROOT
sc_cpsc2018   challenge --root ROOT --cohort cpsc_2018 --contract sc --norm record
sc_csn        challenge --root ROOT --cohort chapman_shaoxing ningbo --contract sc\
 --filter hp0.5+lp40 --norm record
sc_echonext   echonext --root ROOT --contract sc
sc_ptbxl      ptbxl --root ROOT --contract sc --norm record
sc_mimic      mimic --root ROOT --contract sc
'''
# trained, scored: label sets joined by +, as Dataset.columns takes them; one model is trained on
# the first and scored on the second, which correspond by the name after the slash. least: positives
# that a label needs in the whole dataset to count (MIMIC's codes need 2,000 ECGs, which the reader
# sees to). MAE: of standardised numbers. classes: outputs in the paper's code, - if unknown
TASK_TABLE = '''
name                 data         trained    scored         least  metric  classes
ningbo               ningbo       snomed     snomed         10     AUROC   68
cpsc2018             cpsc2018     snomed     snomed         10     AUROC   9
cpsc_extra           cpsc_extra   snomed     snomed         10     AUROC   33
georgia              georgia      snomed     snomed         10     AUROC   50
chapman              chapman      snomed     snomed         10     AUROC   42
chapman_rhythm       chapman      snomed     RHYTHMS        10     AUROC   -
sph                  sph          aha        aha            10     AUROC   35
ptbxl_all            ptbxl        all        all            10     AUROC   71
ptbxl_diag           ptbxl        all        diag           10     AUROC   44
ptbxl_form           ptbxl        all        form           10     AUROC   19
ptbxl_rhythm         ptbxl        all        rhythm         10     AUROC   12
ptbxl_sub            ptbxl        sub        sub            10     AUROC   23
ptbxl_super          ptbxl        super      super          10     AUROC   5
zzu                  zzu          aha        aha            10     AUROC   58
echonext             echonext     echonext   echonext       10     AUROC   11
mimic_cardiac        mimic        MIMIC      cardiac        1      AUROC   158
mimic_noncardiac     mimic        MIMIC      noncardiac     1      AUROC   918
mimic_deterioration  mimic        MIMIC      deterioration  1      AUROC   6
mimic_mortality      mimic        MIMIC      mortality      1      AUROC   7
mimic_icu            mimic        MIMIC      icu            1      AUROC   2
mimic_sex            mimic        MIMIC      sex            1      AUROC   1
mimic_age            mimic        MIMIC      age            1      MAE     1
mimic_biometrics     mimic        MIMIC      biometrics     1      MAE     3
mimic_features       mimic        MIMIC      features       1      MAE     7
mimic_labs           mimic        MIMIC      labs           1      MAE     18
mimic_vitals         mimic        MIMIC      vitals         1      MAE     6
sc_cpsc2018          sc_cpsc2018  snomed     snomed         10     AUROC   9
sc_csn               sc_csn       snomed     snomed         10     AUROC   -
sc_echonext          sc_echonext  shd        shd            1      AUROC   1
sc_ptbxl_diag        sc_ptbxl     diag       diag           10     AUROC   44
sc_ptbxl_form        sc_ptbxl     form       form           10     AUROC   19
sc_ptbxl_rhythm      sc_ptbxl     rhythm     rhythm         10     AUROC   12
sc_ptbxl_sub         sc_ptbxl     sub        sub            10     AUROC   23
sc_ptbxl_super       sc_ptbxl     super      super          10     AUROC   5
sc_mimic_sex         sc_mimic     sex        sex            1      AUROC   1
sc_mimic_icu         sc_mimic     icu        icu            1      AUROC   2
sc_mimic_mortality   sc_mimic     SIX        SIX            1      AUROC   6
'''
LABEL_SETS = {
    # Chapman's rhythms that the Challenge has codes for: AF, AFIB, AT, AVNRT, SAAWR, SB, ...
    'RHYTHMS': 'snomed/164890007+snomed/164889003+snomed/713422000+snomed/251166008+snomed/17366009'
               '+snomed/426177001+snomed/426783006+snomed/427084000+snomed/426761007',
    'MIMIC': 'cardiac+noncardiac+deterioration+mortality+icu+sex+age+biometrics+features+labs+'
             'vitals',
    # all mortality outcomes except that within the stay; the choice of six is ours
    'SIX': 'mortality/1d+mortality/7d+mortality/28d+mortality/90d+mortality/180d+mortality/365d'}
# the second paper trains on 25 %, validates on 5 % and tests on 10 % of MIMIC: which of its 20
# folds these are is our choice
QUARTER = ((0, 1, 2, 3, 4), (17,), (18, 19))


@dataclass(frozen=True)
class Target:
    """One task of a paper, a row of TASK_TABLE, with the command that prepares its data."""
    data: str
    trained: str
    scored: str
    least: int
    metric: str
    classes: int                                                    # None if unknown
    folds: tuple                                                    # None: `Dataset.split`
    prepare: str


def read_tasks():
    """{name: Target} of TASK_TABLE."""
    commands = dict(line.split(maxsplit=1) for line in PREPARE.strip().splitlines())
    tasks = {}
    for line in TASK_TABLE.strip().splitlines()[1:]:
        name, data, trained, scored, least, metric, classes = line.split()
        tasks[name] = Target(
            data, LABEL_SETS.get(trained, trained), LABEL_SETS.get(scored, scored), int(least),
            metric, None if classes == '-' else int(classes),
            QUARTER if data == 'sc_mimic' else None,
            f'python data.py {commands[data].strip()} --out {data}')
    return tasks


TASKS = read_tasks()


def open_prepared(name):
    """(meta, index, signals, labels) of datasets/NAME. signals (samples, 12) int16 stay on disk."""
    folder = Path('datasets', name)
    if not folder.exists() and name in DEFAULTS:
        main(DEFAULTS[name].split())
    if not folder.exists():
        there = ', '.join(sorted(p.parent.name for p in Path('datasets').glob('[!.]*/meta.json')))
        raise Stop(f'no dataset {name!r} in datasets/ (there: {there or "none"}): prepare it with '
                   'python data.py, see its --help')
    try:
        meta = json.loads((folder / 'meta.json').read_text())
        index = dict(np.load(folder / 'index.npz'))
        counts = np.memmap(folder / 'signals.i16', np.int16, 'r')
        signals = torch.from_numpy(counts.reshape(-1, 12))
        labels = np.load(folder / 'labels.npy', mmap_mode='r')
        lengths = len(signals), len(labels), len(index['signal'])
        if lengths != (index['length'].sum(), meta['records'], meta['records']):
            raise ValueError('its files are of different lengths')
    except UNREADABLE as e:
        raise Stop(f'datasets/{name} is damaged or of an older version ({type(e).__name__}: {e}): '
                   'prepare it again')
    return meta, index, signals, labels


def same_recording(name):
    """One name for a recording that is published under several: PTB-XL's 00001_lr and 00001_hr and
    the Challenge's HR00001 are ptbxl/1; Chapman's, Shaoxing's and Ningbo's JS00001 lie in folders
    of any name. Other names are as they are."""
    stem = name.split('/')[-1]
    if found := re.fullmatch(r'HR(\d{5})|(\d{5})_[lh]r', stem):
        return f'ptbxl/{int(found[1] or found[2])}'
    return stem if re.fullmatch(r'JS\d{5}', stem) else name


def overlap(ds, seen):
    """True where a record of the Dataset, or its patient, is among `seen`: patients, ids and
    signal hashes, as `Dataset.names` gives them and seen.npz of a run holds them. (N,) bool."""
    keys = ds.patient, ds.recording, ds.signal
    seen = np.array(sorted(seen | {same_recording(name) for name in seen}) or [''])
    known = np.any([np.isin(key, seen) for key in keys], 0)
    while True:                                               # and what shares a name with these
        more = np.any([np.isin(key, key[known]) for key in keys], 0)
        if (more == known).all():
            return known
        known = more


def write_seen(folder, names):
    """Write seen.npz in a run folder: the `Dataset.names` of the training records."""
    np.savez_compressed(Path(folder, 'seen.npz'), names=np.array(sorted(names)))


def read_seen(folder):
    """The names that `write_seen` kept. Stops where they are missing, since a test record that was
    trained on would not be noticed."""
    try:
        return set(np.load(Path(folder, 'seen.npz'))['names'].tolist())
    except UNREADABLE as e:
        raise Stop(f'{folder}/seen.npz, which names the records that a run was trained on, is '
                   f'missing or damaged ({type(e).__name__}): take it from the run, or train again')


def align_folds(fold):
    """Fold numbers (N,) as ranks that end with 99, so that the last two folds of every dataset have
    the same numbers. -1 stays."""
    names = np.unique(fold[fold >= 0])
    rank = 99 - len(names) + 1 + np.searchsorted(names, fold)
    return np.where(fold >= 0, rank, -1)


@lru_cache(2)                                             # every step of an epoch asks
def epoch_order(seed, epoch, n):
    """In which order an epoch visits n records."""
    return np.random.default_rng([seed, epoch, 1]).permutation(n)


class Dataset:
    """One or more prepared datasets ('ptbxl' or 'ptbxl,georgia') as one: signals on disk (or on the
    GPU if they fit into half of its free memory), everything else in memory.

    labels (N, K), NaN for unknown; id, recording (see `same_recording`), patient, signal (a hash),
    fold, age in years, sex (1: female), length in samples, each (N,); tasks {name: columns};
    contract. `synthetic`, `sample` and `shifted` (1,000 synthetic records of another population and
    other devices) are prepared on first use. Stops if a dataset is missing, damaged or of another
    contract."""

    def __init__(self, names, device='cpu'):
        self.name, self.device = names, torch.device(device)
        metas, indices, signals, labels = zip(*map(open_prepared, names.split(',')))
        self.contract = Contract.read(metas[0]['contract'])
        for name, meta in zip(names.split(','), metas):
            if differs := Contract.read(meta['contract']).differs(self.contract):
                raise Stop(f'datasets/{name} has another contract ({differs}): prepare them alike')
        self.signals = signals
        if self.device.type == 'cuda':
            free, _ = torch.cuda.mem_get_info(self.device)
            if sum(s.nbytes for s in signals) < free / 2:
                self.signals = [s.to(self.device) for s in signals]
        self.part = np.repeat(np.arange(len(metas)), [len(index['id']) for index in indices])
        if len(indices) > 1:
            indices = [index | dict(fold=align_folds(index['fold'])) for index in indices]
        for key in ('offset', 'length', 'id', 'patient', 'signal', 'fold', 'age', 'sex', 'peaks'):
            setattr(self, key, np.concatenate([index[key] for index in indices]))
        self.peak_count = np.concatenate([np.diff(index['peak_start']) for index in indices])
        self.peak_start = np.cumsum(np.r_[0, self.peak_count])
        self.recording = np.array([same_recording(name) for name in self.id])
        self.join_labels(metas, labels)
        self.hash = '+'.join(meta['hash'] for meta in metas)

    def join_labels(self, metas, labels):
        """Set label_names, labels and tasks from those of the parts."""
        self.label_names = list(dict.fromkeys(n for meta in metas for n in meta['labels']))
        self.labels, self.tasks = labels[0], {}
        if len(metas) > 1:
            self.labels = np.full((len(self), len(self.label_names)), np.nan, np.float32)
        for i, meta in enumerate(metas):
            columns = [self.label_names.index(name) for name in meta['labels']]
            if len(metas) > 1:
                self.labels[np.ix_(self.part == i, columns)] = labels[i]
            for task, its in meta['tasks'].items():
                both = self.tasks.get(task, []) + [columns[c] for c in its]
                self.tasks[task] = list(dict.fromkeys(both))

    def __len__(self):
        return len(self.id)

    def names(self, rows):
        """Names that identify records: the set of their patients, recordings and signal hashes."""
        return {str(name) for key in (self.patient, self.recording, self.signal)
                for name in key[rows]}

    def columns(self, task):
        """Columns of a task, of a single label (super/MI), or of several of either joined by +. Of
        several, those that the set lacks are passed over; Stops where none is there."""
        known = {n: [c] for c, n in enumerate(self.label_names)} | self.tasks
        parts = [task] if task in known else task.split('+')
        columns = list(dict.fromkeys(c for part in parts for c in known.get(part, ())))
        if not columns:
            raise Stop(f'{self.name} has no task {task!r}; it has '
                       f'{", ".join(self.tasks) or "no labels"}')
        return columns

    def split(self):
        """Row numbers (train, validation, test). The highest fold of each dataset is the test fold,
        and the second highest is the validation fold. No patient or recording is in two parts, even
        under two names: test comes first, then validation. Stops if there are under three folds."""
        folds = np.unique(self.fold)
        if len(folds) < 3:
            raise Stop(f'{self.name} has {len(folds)} folds: three are needed for train, '
                       'validation and test')
        second, last = folds[-2:]
        test = np.flatnonzero(self.fold == last)
        tested = overlap(self, self.names(test))
        validation = np.flatnonzero((self.fold == second) & ~tested)
        used = tested | overlap(self, self.names(validation)) | (self.fold == second)
        return np.flatnonzero(~used), validation, test

    def nested(self, rows, records, seed):
        """`records` of `rows`, whole patients (the last may be cut) in an order drawn from the
        seed, so that a smaller set lies in every larger one. Stops where there are fewer."""
        if not 0 < records <= len(rows):
            raise Stop(f'{self.name} has {len(rows):,} training records long enough: take 1 to '
                       f'{len(rows):,}, not {records:,}')
        patients, owner = np.unique(self.patient[rows], return_inverse=True)
        place = np.random.default_rng([seed, 3]).permutation(len(patients))[owner]
        return np.sort(rows[np.argsort(place, kind='stable')[:records]])

    def crop(self, rows, starts, samples):
        """Crops of `samples` from records `rows`, beginning at `starts`: (B, 12, samples) float32
        in the contract's unit, on the device."""
        at, part, pieces = self.offset[rows] + starts, self.part[rows], []
        for i in np.unique(part):                                   # dataset after dataset
            signals = self.signals[i]
            shape = len(signals) - samples + 1, samples * 12
            windows = signals.as_strided(shape, (12, 1))            # every crop there is, no copy
            mine = torch.from_numpy(at[part == i]).to(signals.device)
            pieces.append(windows.index_select(0, mine))
        back = np.argsort(np.argsort(part, kind='stable'))          # the inverse permutation
        x = pieces[0] if len(pieces) == 1 else torch.cat(pieces)[back]
        if self.device.type == 'cuda' and not x.is_cuda:            # as int16: half as many bytes
            x = x.pin_memory().to(self.device, non_blocking=True)
        return x.view(-1, samples, 12).transpose(1, 2).float().mul_(self.contract.scale)

    def batch(self, rows, samples, size, seed, step, share=(0, 1)):
        """Training batch `step`: a random crop from each of `size` records, depending on (seed,
        step) alone; an epoch passes over `rows` once, in a new order. share (i, n): every n-th crop
        from the i-th on, for one of n processes. Returns what `collate` does."""
        turn, n = step * size + np.arange(size), len(rows)
        epoch, place = divmod(turn, n)
        order = [epoch_order(seed, e, n)[place[epoch == e]] for e in np.unique(epoch)]
        rows = rows[np.concatenate(order)]
        room = self.length[rows] - samples + 1
        starts = (np.random.default_rng([seed, step, 2]).random(size) * room).astype(int)
        return self.collate(rows[share[0]::share[1]], starts[share[0]::share[1]], samples)

    def collate(self, rows, starts, samples):
        """A batch of given crops: x (B, 12, samples) in the contract's unit; y (B, K), NaN if
        unknown; patient (B,), numbers that are valid in this batch only; peaks (B, P), ascending,
        in samples from the start of the crop, -1 where none."""
        rows, starts = np.asarray(rows), np.asarray(starts)
        first, count = self.peak_start[rows][:, None], self.peak_count[rows][:, None]
        k = np.arange(count.max(initial=0))                         # of the record's R-peaks
        peaks = self.peaks[np.minimum(first + k, first + count - 1)] - starts[:, None]
        inside = (k < count) & (peaks >= 0) & (peaks < samples)
        peaks = np.sort(np.where(inside, peaks, samples), 1)        # those outside go to the end
        peaks = peaks[:, :inside.sum(1).max(initial=0)]
        patient = np.unique(self.patient[rows], return_inverse=True)[1]
        return dict(x=self.crop(rows, starts, samples),
                    y=torch.from_numpy(np.array(self.labels[rows])),
                    peaks=torch.from_numpy(np.where(peaks < samples, peaks, -1)),
                    patient=torch.from_numpy(patient))

    def crops(self, rows, samples):
        """All consecutive crops of records `rows`, for evaluation: (row, start) of each."""
        count = self.length[rows] // samples
        starts = [np.arange(c) * samples for c in count]
        return np.repeat(rows, count), np.concatenate(starts).astype(int)


# -------------------------------------------------------------------------------------------------
# picture, command line

def show(name, record):
    """The classic paper picture, 25 mm/s and 10 mm/mV: 2.5 s of each lead, 10 s of lead II below.
    record: a row number or an id. Returns the figure's path."""
    import matplotlib.pyplot as plt
    ds = Dataset(name)
    named = {key: row for row, its_id in enumerate(ds.id) for key in (its_id, str(row))}
    if record not in named:
        raise Stop(f'{name} has records 0 to {len(ds) - 1}, with ids such as {ds.id[0]}')
    row, fs = named[record], ds.contract.fs
    T = min(int(ds.length[row]), round(10 * fs))
    batch = ds.collate([row], [0], T)
    fig, ax = plt.subplots(figsize=(11, 4.9), layout='constrained')
    ax.set_xticks(np.arange(0, T / fs, .2))
    ax.set_yticks(np.arange(-7.5, 2.01, .5))
    ax.grid(color='#f3b5b5', lw=.5)
    quarters = [(lead, i // 3 * T // 4, (i // 3 + 1) * T // 4, -2 * (i % 3))
                for i, lead in enumerate(LEADS)]                    # four columns of three
    for lead, a, b, height in (*quarters, ('II', 0, T, -6)):
        x = batch['x'][0, LEADS.index(lead), a:b].clamp(-1.8, 1.9)
        ax.plot(np.arange(a, b) / fs, x + height, 'k', lw=.7)
        ax.text(a / fs + .05, height + .85, lead, weight='bold')
    for peak in batch['peaks'][0] / fs:
        ax.text(peak, -7.4, '|', ha='center')
    labels = ', '.join(n for n, v in zip(ds.label_names, ds.labels[row]) if v == 1)
    ax.set(xlim=(0, T / fs), ylim=(-7.5, 2), aspect=.4)
    ax.tick_params(length=0, labelleft=False, labelbottom=False)
    age = f'{ds.age[row]:.0f} y'.replace('nan y', '')
    ax.set_title(f'{ds.id[row]}   {age}\n{labels}', size=9, loc='left', parse_math=False)
    path = Path(f'out/{name}_{row}.png')
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)
    print(f'{path}: record {row} of {name}; {labels or "no positive label"}')
    return path


DEFAULTS = {'sample': 'sample', 'synthetic': 'synthetic --records 4000',      # made on first use
            'shifted': 'synthetic --records 1000 --seed 1 --shift all --out shifted'}
READERS = {
    'sample': lambda a: ptbxl(HERE / 'sample/ptbxl'),
    'synthetic': lambda a: synthetic(a.records, a.seed, a.seconds,
                                     SHIFTS if 'all' in a.shift else a.shift),
    'sequences': lambda a: sequences(a.records, a.seed, a.seconds),
    'array': lambda a: array(a.root, a.fs_in, a.leads.split(','), a.unit, a.labels, a.ignore),
    'wfdb': lambda a: wfdb_folder(a.root, a.labels, a.ignore),
    'ptbxl': lambda a: ptbxl(a.root, a.rate, a.folders),
    'challenge': lambda a: challenge(a.root, a.cohort),
    'mimic': lambda a: mimic(a.root, a.least),
    'zzu': lambda a: zzu(a.root),
    'sph': lambda a: sph(a.root),
    'code15': lambda a: code15(a.root),
    'echonext': lambda a: echonext(a.root)}
FOLDS = {'challenge': 'stratified', 'zzu': 'stratified', 'sph': 'stratified', 'wfdb': 'auto',
         'array': 'auto'}                                           # the others: hash


def make_parser():
    """One subcommand per source, each with its own flags."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    sources, sub = {}, p.add_subparsers(dest='source', metavar='SOURCE')
    for name in READERS:
        add = sources[name] = sub.add_parser(name).add_argument
        add('--out', default=name, help='name of the prepared dataset')
        add('--workers', type=int, help='processes (default: one per core)')
        add('--no-peaks', action='store_true', help='do not look for R-peaks')
        add('--contract', choices=list(CONTRACTS), default='ps',
            help='ps: mV, 240 Hz, 2.5 s; sc: 100 Hz, 10 s, high-pass, notch')
        add('--fs', type=int, help='sampling rate of the prepared dataset in Hz')
        add('--window', type=float, help='s: shorter records are dropped')
        add('--filter', help='none, or steps like hp0.5+lp40+notch60')
        add('--norm', choices=['none', 'record'], help='record: each lead to mean 0, SD 1')
        if name in ('synthetic', 'sequences'):
            add('--records', type=int, default=4000)
            add('--seconds', type=float, default=10.)
            add('--seed', type=int, default=0)
        elif name != 'sample':
            add('--root', required=True, help='folder (for array: file) of the source')
            add('--folds', choices=['stratified', 'hash', 'auto'], default=FOLDS.get(name, 'hash'),
                help='rule for the folds of a source without folds')
        if name in ('ptbxl', 'challenge'):
            add('--download', action='store_true', help='fetch it from PhysioNet into --root first')
        if name in ('wfdb', 'array'):
            add('--labels', help='csv of labels, with a column id')
            add('--ignore', nargs='+', default=[], metavar='COLUMN', help='to skip')
    sources['ptbxl']('--rate', type=int, choices=[100, 500], default=100, help='Hz of files')
    sources['ptbxl']('--folders', nargs='+', default=[], help='only these, such as 00000 01000')
    sources['challenge']('--cohort', nargs='+', default=[], help='default: all that are there')
    sources['mimic']('--least', type=int, default=2000,
                     help='ECGs that a cardiac code needs to become a label')
    sources['array']('--fs-in', type=float, help='sampling rate of the array in Hz')
    sources['array']('--leads', default=','.join(LEADS), help='in the order of the array')
    sources['array']('--unit', choices=['mV', 'uV', 'V'], default='mV')
    sources['synthetic']('--shift', nargs='+', default=[], choices=[*SHIFTS, 'all'],
                         help='differences from the default population and devices')
    s = sub.add_parser('show', help='draw a record')
    s.add_argument('name')
    s.add_argument('--record', default='0', help='row number or id')
    return p


def contract_of(a):
    """The contract that the arguments ask for."""
    given = {k: v for k, v in vars(a).items()
             if k in ('fs', 'window', 'filter', 'norm') and v is not None}
    contract = replace(CONTRACTS[a.contract], **given, unit='SD' if a.norm == 'record' else 'mV')
    step = r'(hp(?=\d(\.|\+|$))|lp|notch)(?!0+(\.0+)?(\+|$))\d+(\.\d+)?'    # hp below 10 Hz, not 0
    if not re.fullmatch(rf'none|{step}(\+{step})*', contract.filter):
        raise Stop(f'--filter {contract.filter}: none, or steps like hp0.5+lp40+notch60; hp is '
                   'below 10')
    if not 50 <= contract.fs <= 1000 or not .1 <= contract.window <= MAX_SECONDS:
        raise Stop('--fs must lie between 50 and 1000 Hz, --window between 0.1 and 3600 s')
    if getattr(a, 'seed', 0) < 0:
        raise Stop('--seed must not be negative')
    if a.workers is not None and a.workers < 1:
        raise Stop('--workers must be 1 or more')
    return contract


def main(argv=None):
    """The command line: see the top of the file."""
    a = make_parser().parse_args(argv)
    if a.source == 'show':
        return show(a.name, a.record)
    if a.source is None:
        return [main(DEFAULTS[name].split()) for name in ('sample', 'synthetic')]
    contract = contract_of(a)
    if getattr(a, 'download', False):
        download(a)
    if not Path(getattr(a, 'root', '.')).exists():
        raise Stop(f'no such folder or file: {a.root}')
    prepare(a.out, READERS[a.source](a), contract,
            ' '.join(argv or sys.argv[1:]),
            extra_tasks=SYNTHETIC_TASKS if a.source == 'synthetic' else (), workers=a.workers,
            peaks=not a.no_peaks, total=getattr(a, 'records', None),
            folds=getattr(a, 'folds', 'hash'))


if __name__ == '__main__':
    run_script(main)
