"""Real and synthetic 12-lead ECGs, all in one form: millivolts, leads by name, one sampling rate.

    python data.py                                       # the 500 real ECGs in the box and 4,000 synthetic ones, ready to train
    python data.py show sample --record 0                # a 12-lead picture in out/
    python data.py calibrate                             # synthetic against real, measure by measure, with a figure
    python data.py peaks --root DIR --annotation ii      # R-peaks found against annotated ones, such as those of LUDB
    python data.py ptbxl --root DIR [--rate 500]         # PTB-XL in its official layout; --download fetches it first
    python data.py challenge --root DIR --cohort georgia # PhysioNet/CinC Challenge 2020/2021 cohorts
    python data.py SOURCE --root DIR                     # zzu, sph, code15, echonext or mimic, in their published layouts (--help)
    python data.py sequences                             # generated sequences that are no ECGs, in eight classes
    python data.py wfdb --root DIR                       # any folder of WFDB records, without labels
    python data.py array --root x.npy --fs-in 500        # your own (N, 12, T) or (N, T, 12) array

File on disk -> Record -> prepared dataset -> batch. A prepared dataset is a folder datasets/NAME of signals.i16, labels.npy,
index.npz and meta.json. The signal contract follows arXiv 2605.12241 (12 leads, mV, 240 Hz, 2.5 s, no filter);
--contract sc gives the setting of arXiv 2605.17276 (100 Hz, 10 s, high-pass and mains notch). TASKS lists the tasks of both papers,
each with the command that prepares its data.
"""
import argparse, ast, contextlib, csv, functools, hashlib, itertools, json, math, os, re, shutil, sys, time, tokenize, warnings, zipfile, zlib
from array import array as typed
from collections import Counter as Tally
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import scipy.ndimage
import scipy.signal
import torch
from tqdm import tqdm

LEADS = ('I', 'II', 'III', 'aVR', 'aVL', 'aVF', 'V1', 'V2', 'V3', 'V4', 'V5', 'V6')
HERE = Path(__file__).resolve().parent


class Stop(SystemExit):
    """A defect of the run: one line that says what to do; a script that meets it ends with exit code 1."""


class Defect(Exception):
    """A defect of one record: its text is the reason under which the record is dropped and counted."""


def script(main, stopped):
    """A script's main, where Ctrl-C and what the system refuses, such as writing to a full disk, become one line."""
    try:
        main()
    except KeyboardInterrupt:
        raise Stop(stopped)
    except OSError as e:
        raise Stop(f'{e.filename or "output"}: {e.strerror or e}; what was complete before is intact')


@dataclass(frozen=True)
class Contract:
    """What a stored sample means. Checkpoints carry it, and evaluating on data with another one is refused."""
    fs: int = 240                                                # Hz
    leads: tuple = LEADS
    unit: str = 'mV'                                             # 'SD' under norm = 'record'
    scale: float = 1e-3                                          # units per stored int16 count
    filter: str = 'none'                                         # zero-phase steps joined by +: hp0.5, lp40, notch60
    norm: str = 'none'                                           # 'record': each lead of a record to mean 0, SD 1
    window: float = 2.5                                          # s: shorter records are dropped, a model's crop

    def differs(self, other):
        """Fields in which two contracts disagree, as text; the window is a model's own affair. '' if none."""
        a, b = asdict(self), asdict(other)
        return ', '.join(f'{k} {a[k]} against {b[k]}' for k in a if k != 'window' and a[k] != b[k])

    @staticmethod
    def read(d):
        return Contract(**{**d, 'leads': tuple(d['leads'])})


# the second paper gives neither cut-off nor filter order: 0.5 Hz, second order, are our choice
CONTRACTS = {'ps': Contract(), 'sc': Contract(fs=100, filter='hp0.5+notch60', window=10.)}


@dataclass
class Record:
    """One recording as a reader yields it. x (T, C) in `unit` at `fs` Hz; `load(record)` fills in what only the signal file says
    (x, fs, leads, unit, ...) later, in a worker. labels: name -> 0, 1, a number or NaN, names being namespaced (super/MI). Within the
    namespaces that a record uses, what it does not name is 0; the others are unknown, and all are where labels is None."""
    id: str
    patient: str = ''                                            # '' where unknown: then the record stands for itself
    x: object = None
    fs: float = 0.
    leads: tuple = ()
    unit: str = ''
    age: float = math.nan                                        # years
    sex: float = math.nan                                        # 1 female, 0 male
    labels: dict = None
    fold: int = -1                                               # -1: none given, a hash of the patient or stratification decides
    strata: tuple = None                                         # what stratified folds balance; None: the labels
    peaks: object = None                                         # R-peaks in s; None: to be found
    load: object = None


# ---------------------------------------------------------------------------------------------------------------------
# readers: one generator each, all yielding Record

BITS = {'8': 8, '16': 16, '24': 24, '32': 32, '61': 16, '80': 8, '160': 16, '212': 12, '310': 32 / 3, '311': 32 / 3}
MAX_SECONDS = 3600


def signal_line(fields):
    """(file, format, offset, gain, baseline, unit, name) of one signal of a WFDB header, from the words of its line. Raises Defect."""
    form = re.fullmatch(r'(\d+)(?:x(\d+))?(?::\d+)?(?:\+(\d+))?', fields[1] if len(fields) > 1 else '')
    if not form or os.path.basename(fields[0]) != fields[0] or form[2] not in (None, '1'):
        raise Defect('unreadable header')
    gain = re.fullmatch(r'([-+]?[\d.]+(?:[eE][-+]?\d+)?)(?:\(([-+]?\d+)\))?(?:/(\S+))?', fields[2] if len(fields) > 2 else '')
    if not gain:
        raise Defect('gain absent')
    if not gain[3]:
        raise Defect('unit absent')
    if not 1e-3 <= abs(float(gain[1])) <= 1e9:
        raise Defect('absurd gain')
    if len(fields) < 9:
        raise Defect('unnamed lead')
    baseline = float(fields[4] if gain[2] is None else gain[2])  # absent: the ADC's zero
    return fields[0], form[1], int(form[3] or 0), float(gain[1]), baseline, gain[3], ' '.join(fields[8:])


def check_header(path):
    """Parse the text of a WFDB header and refuse what wfdb would forgive: an absent fs becomes 250 there, a gain of 0 becomes 200,
    and memory for any promised length is taken. Returns a dict of fs, samples, comments and, one entry per signal, file, format, offset,
    gain, baseline, unit, name. Raises Defect, and FileNotFoundError where there is no header."""
    text = Path(f'{path}.hea').read_text(encoding='latin-1')
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    comments = [re.match(r'[#\s<]*([^:>]*)>?\s*:?(.*)', line) for line in lines if line[0] == '#']
    lines = [line.split() for line in lines if line[0] != '#']
    if not lines or len(lines[0]) < 2 or not lines[0][1].isdigit():
        raise Defect('unreadable header')
    first, count = lines[0], int(lines[0][1])
    if '/' in first[0]:
        raise Defect('several segments')
    if len(first) < 3:
        raise Defect('fs absent')
    try:
        fs, samples = float(re.split('[/(]', first[2])[0]), int(first[3]) if len(first) > 3 else 0
    except ValueError:
        raise Defect('unreadable header')
    if not 50 <= fs <= 10000:
        raise Defect('absurd fs')
    if not 0 <= samples <= MAX_SECONDS * fs:
        raise Defect('absurd length')
    if count < 12 or len(lines) - 1 < count:
        raise Defect('missing lead')
    signals = zip(*(signal_line(fields) for fields in lines[1:count + 1]))
    h = dict(zip(('file', 'format', 'offset', 'gain', 'baseline', 'unit', 'name'), signals))
    for name in set(h['file']):
        file = Path(path).parent / name
        if not file.is_file():
            raise Defect('file missing')
        bits = sum(BITS.get(form, 0) for form, owner in zip(h['format'], h['file']) if owner == name)        # compressed formats count as 0
        if file.stat().st_size < bits * samples / 8 + max(h['offset']):
            raise Defect('truncated file')
    if len(set(h['unit'])) > 1:
        raise Defect('leads in different units')
    return h | dict(fs=fs, samples=samples, comments={c[1].strip().lower(): c[2].strip() for c in comments})


def load_wfdb(record, path):
    """Fill a Record from the WFDB record at `path` (no extension): signal in its own units, age and sex from the comments, which it
    returns as a dict. 16-bit signals in one file, the usual case, are read straight into numpy (wfdb would take five times as long over
    the header); every other format by wfdb."""
    h = check_header(path)
    if set(h['format']) == {'16'} and len(set(h['file'])) == len(set(h['offset'])) == 1:
        count = len(h['name'])
        raw = np.fromfile(Path(path).parent / h['file'][0], '<i2', h['samples'] * count or -1, offset=h['offset'][0])
        x = raw[:len(raw) // count * count].reshape(-1, count).astype(float)
        x[x == -32768] = np.nan                                  # WFDB's mark of a missing sample
        record.x = (x - h['baseline']) / h['gain']
    else:
        import wfdb
        record.x = wfdb.rdrecord(str(path)).p_signal
    record.fs, record.leads, record.unit, comments = h['fs'], h['name'], h['unit'][0], h['comments']
    if math.isnan(record.age) and re.fullmatch(r'\d{1,3}', comments.get('age', '')):
        record.age = float(comments['age'])
    if math.isnan(record.sex):
        record.sex = {'f': 1., 'm': 0.}.get(comments.get('sex', '')[:1].lower(), math.nan)
    return comments


def load_challenge(record, path):
    """A Challenge record: WFDB, with its diagnoses as SNOMED codes (2021) or as names (2020) in the comment Dx."""
    codes = [c.strip() for c in load_wfdb(record, path).get('dx', '').split(',') if c.strip()]
    if record.id.startswith('ningbo/'):                          # its sheet of the label map has two codes for complete LBBB, the others one
        codes = ['164909002' if c == '733534002' else c for c in codes]
    if codes:
        record.labels = {('snomed/' if c.isdigit() else 'dx2020/') + c: 1. for c in codes}


def rows_of(path, *needed, ragged=True):
    """Rows of a csv file as dicts. Stops where the file or a needed column is missing; what a short row lacks is blank, or, if not `ragged`,
    stops too."""
    path = Path(path)
    if not path.is_file():
        raise Stop(f'no {path.name} in {path.parent}: --root must name the folder that holds it (ptbxl: or add --download)')
    with open(path, newline='', encoding='utf-8-sig') as f:
        try:
            reader = csv.DictReader(f, restval='' if ragged else None)
            names = reader.fieldnames or []
            if missing := [c for c in needed if c not in names]:
                raise Stop(f'{path} has no column {", ".join(missing)}')
            if len(set(names)) < len(names) or (len(names) == 1 and ';' in names[0]):
                raise Stop(f'{path}: its first line must name each column once, separated by commas')
            for row in reader:
                if not ragged and (None in row or None in row.values()):
                    raise Stop(f'{path}, line {reader.line_num}: not as many cells as the first line names')
                yield row
        except UnicodeDecodeError:
            raise Stop(f'{path} is not in UTF-8: save it so')


def number(text, otherwise=math.nan):
    """A csv cell as a finite float; `otherwise` for blanks and text."""
    try:
        return float(text) if math.isfinite(float(text)) else otherwise
    except (TypeError, ValueError):
        return otherwise


def ptbxl(root, rate=100):
    """PTB-XL in its official layout (Wagner et al. 2020), at 100 or 500 Hz, with its six label sets as namespaces: all (71 codes),
    diag (44), form (19), rhythm (12), sub (23), super (5). A code counts whatever its likelihood; folds are strat_fold."""
    root = Path(root)
    if not (root / f'records{rate}').is_dir() and (root / f'records{600 - rate}').is_dir():
        raise Stop(f'{root} has no records{rate}, but records{600 - rate}: add --rate {600 - rate}')
    sets = {}                                                    # code -> its labels
    for r in rows_of(root / 'scp_statements.csv', '', 'diagnostic', 'form', 'rhythm', 'diagnostic_class', 'diagnostic_subclass'):
        code = r['']
        sets[code] = [f'all/{code}']
        if number(r['diagnostic']) == 1:
            sets[code] += [f'diag/{code}', f'sub/{r["diagnostic_subclass"]}', f'super/{r["diagnostic_class"]}']
        sets[code] += [f'{kind}/{code}' for kind in ('form', 'rhythm') if number(r[kind]) == 1]
    vocabulary = dict.fromkeys(sorted(itertools.chain(*sets.values())), 0.)
    for row in rows_of(root / 'ptbxl_database.csv', 'ecg_id', 'patient_id', 'age', 'sex', 'scp_codes', 'strat_fold',
                       'filename_lr', 'filename_hr'):
        age = number(row['age'])                                 # 300 means over 89
        yield Record(f'ptbxl/{row["ecg_id"]}', f'ptbxl/patient{row["patient_id"]}' if row['patient_id'] else '', age=min(age, 90.),
                     sex=number(row['sex']), fold=int(number(row['strat_fold'], -1)), labels=vocabulary,
                     load=functools.partial(load_ptbxl, root=root, name=row['filename_lr' if rate == 100 else 'filename_hr'],
                                            codes=row['scp_codes'], sets=sets))


def load_ptbxl(record, root, name, codes, sets):
    """Signal and labels of one row of ptbxl_database.csv."""
    try:
        codes = ast.literal_eval(codes)
    except (ValueError, SyntaxError):
        raise Defect('unreadable scp_codes')
    if not isinstance(codes, dict) or '..' in Path(name).parts or Path(name).is_absolute():
        raise Defect('unreadable scp_codes or file name')
    record.labels = {**record.labels, **{n: 1. for c in codes for n in sets.get(c, [f'all/{c}'])}}
    load_wfdb(record, root / name)


def challenge(root, cohorts=()):
    """PhysioNet/CinC Challenge 2020/2021 records (.hea with .mat or .dat), all cohorts or those named. No patient ids, no folds.
    The cohort ptb-xl is PTB-XL over again: never pretrain on one and test on the other."""
    found = sorted(Path(root).resolve().rglob('*.hea'))
    cohort = lambda p: p.parts[-3] if re.fullmatch(r'g\d+', p.parts[-2]) else p.parts[-2]
    missing = set(cohorts) - {cohort(p) for p in found}
    if missing:
        raise Stop(f'no cohort {", ".join(sorted(missing))} under {root}; there: {", ".join(sorted({cohort(p) for p in found})) or "none"}')
    for p in found:
        if not cohorts or cohort(p) in cohorts:
            yield Record(f'{cohort(p)}/{p.stem}', load=functools.partial(load_challenge, path=p.with_suffix('')))


def cell(row, *words):
    """The cell of the first column whose name holds all the words, in any case; '' where none does."""
    return next((v or '' for k, v in row.items() if k and all(w in k.lower() for w in words)), '')


def entries(text):
    """The entries of a cell such as 'C21';'D31', without quotes; none for Null."""
    parts = [part.strip(' \'"') for part in (text or '').split(';')]
    return [part for part in parts if part.lower() not in ('', 'null', 'nan', 'n/a')]


def female(text):
    """1 for female, 0 for male, NaN for anything else (MIMIC writes 'missing')."""
    return {'f': 1., 'female': 1., 'm': 0., 'male': 0.}.get((text or '').strip(' \'"').lower(), math.nan)


def strata(names, sex, age, edges):
    """Names with sex and age group added, for folds that balance them too."""
    known = [(f'sex {sex:g}', sex), (f'age {sum(age >= e for e in edges)}', age)]
    return (*names, *(name for name, value in known if not math.isnan(value)))


def zzu(root):
    """ZZU pECG (Tan et al. 2025, figshare): children's ECGs, 500 Hz, upper-case lead names; records of nine leads are passed over.
    Labels are the AHA statements of ECGCode.csv by their description (aha/Sinus tachycardia); as in the released code, entries that it
    does not list (prose, codes with a modifier) count as nothing. Folds balance disease category, sex and age over patients.
    Written to the published schema, not yet tried on the real files."""
    root = Path(root)
    statement = {c: cell(r, 'desc').strip() for r in rows_of(root / 'ECGCode.csv') for c in entries(cell(r, 'aha'))}
    disease = {c: cell(r, 'category').strip() for r in rows_of(root / 'DiseaseCode.csv') for c in entries(cell(r, 'icd', 'code'))}
    vocabulary = dict.fromkeys((f'aha/{d}' for d in sorted(set(statement.values()))), 0.)
    for row in rows_of(root / 'AttributesDictionary.csv', 'Filename', 'Patient_ID', 'Age', 'Gender', 'Lead', 'AHA_code', 'ICD-10 code'):
        if number(row['Lead']) != 12:
            continue
        name, sex, age = row['Filename'].strip(' \'"'), female(row['Gender']), number(row['Age'].strip(' \'"d')) / 365.25
        categories = sorted({disease[c] for c in entries(row['ICD-10 code']) if c in disease})
        yield Record(f'zzu/{name}', f'zzu/{row["Patient_ID"]}', age=age, sex=sex, strata=strata(categories, sex, age, (1, 5, 12, 18)),
                     labels=vocabulary | {f'aha/{statement[c]}': 1. for c in entries(row['AHA_code']) if c in statement},
                     load=functools.partial(load_wfdb, path=root / 'Child_ecg' / name))


def need_h5py():
    """Stops in one line where h5py is missing."""
    try:
        import h5py
    except ImportError:
        raise Stop('this source is in HDF5 files: pip install h5py')


def sph(root):
    """SPH (Liu et al. 2022, figshare): HDF5, 500 Hz, mV, 10 to 56 s. Labels are the AHA codes of the statements without their
    modifiers (aha/22). Folds balance statements, modifiers, sex and age over patients.
    Written to the published schema, not yet tried on the real files."""
    need_h5py()
    for row in rows_of(Path(root) / 'metadata.csv', 'ECG_ID', 'AHA_Code', 'Patient_ID', 'Age', 'Sex'):
        codes = [[part.strip() for part in s.split('+')] for s in entries(row['AHA_Code'])]
        sex, age, name = female(row['Sex']), number(row['Age']), row['ECG_ID'].strip()
        parts = {f'{"modifier" if i else "aha"} {part}' for code in codes for i, part in enumerate(code)}
        yield Record(f'sph/{name}', f'sph/{row["Patient_ID"]}', fs=500, leads=LEADS, unit='mV', age=age, sex=sex,
                     labels={f'aha/{code[0]}': 1. for code in codes} or None, strata=strata(sorted(parts), sex, age, (20, 40, 60, 80)),
                     load=functools.partial(load_sph, path=Path(root, 'records', f'{name}.h5')))


def load_sph(record, path):
    """Signal of one SPH record."""
    import h5py
    with h5py.File(path) as file:
        record.x = file['ecg'][:].T                              # (12, T) float16 in the file


def code15(root):
    """CODE-15% (Ribeiro et al. 2021, Zenodo): HDF5, 400 Hz, 7 or 10 s in 4,096 samples; its six findings as code/1dAVb, RBBB, LBBB, SB,
    AF, ST. Hashed folds by patient: the last is the 10 % that arXiv 2605.17276 holds out. Records of parts that are not there are
    dropped and counted. Its unit is not stated: values are taken as mV, as in the released code of arXiv 2605.12241, though the CODE test
    set of the same group is in .1 mV: check that their SD is .2 to .4 before mixing. Written to the published schema, not yet tried on the real files."""
    need_h5py()
    names, truth = ('1dAVb', 'RBBB', 'LBBB', 'SB', 'AF', 'ST'), {'true': 1., 'false': 0.}
    value = lambda text: truth.get((text or '').strip().lower(), number(text))
    for row in rows_of(Path(root) / 'exams.csv', 'exam_id', 'age', 'is_male', 'patient_id', 'trace_file', *names):
        yield Record(f'code15/{row["exam_id"]}', f'code15/patient{row["patient_id"]}', fs=400, leads=LEADS, unit='mV', age=number(row['age']),
                     sex=1 - value(row['is_male']), labels={f'code/{n}': value(row[n]) for n in names},
                     load=functools.partial(load_code15, path=Path(root, row['trace_file'].strip()), exam=int(number(row['exam_id'], -1))))


@functools.lru_cache(32)                                         # once per file and worker
def code15_part(path):
    """(tracings (N, 4096, 12), {exam: row}) of one part."""
    import h5py
    file = h5py.File(path)
    return file['tracings'], {int(exam): i for i, exam in enumerate(file['exam_id'][:])}


def load_code15(record, path, exam):
    """The row of the part that holds the exam, without the zeros that pad it on both sides."""
    tracings, row = code15_part(path)
    if exam not in row:
        raise Defect('exam not in its file')
    x = tracings[row[exam]]                                      # (4096, 12)
    pad = int((x == 0).all(1).sum()) // 2
    record.x = x[pad:len(x) - pad]


FLAGS = [f'{name}_flag' for name in (
    'lvef_lte_45 lvwt_gte_13 aortic_stenosis_moderate_or_greater aortic_regurgitation_moderate_or_greater mitral_regurgitation_moderate_or_greater '
    'tricuspid_regurgitation_moderate_or_greater pulmonary_regurgitation_moderate_or_greater rv_systolic_dysfunction_moderate_or_greater '
    'pericardial_effusion_moderate_large pasp_gte_45 tr_max_gte_32').split()]


def echonext(root):
    """EchoNext 1.1.0 (Poterucha et al. 2025, PhysioNet, restricted): 250 Hz, 10 s. Its signals are standardised, not mV; they pass here
    as if they were mV, since the released code of arXiv 2605.12241 does not rescale them either. Labels: eleven flags (echonext/...) and
    the composite one (shd/...). The official split is kept: train is fold 0, val 8, test 9. Row i of a split in the csv is row i of its
    waveforms. Written to the published schema, not yet tried on the real files."""
    root, fold, seen = Path(root), {'train': 0, 'val': 8, 'test': 9}, Tally()
    table = next(root.glob('[Ee]cho[Nn]ext_metadata_100k.csv'), root / 'echonext_metadata_100k.csv')
    for row in rows_of(table, 'ecg_key', 'patient_key', 'split', 'age_at_ecg', 'sex', *FLAGS):
        split, sex = row['split'].strip(), female(row['sex'])
        if split not in fold:
            continue
        labels = {f'echonext/{f[:-5]}': number(row[f]) for f in FLAGS}
        labels |= {f'shd/{f[:-5]}': number(v) for f, v in row.items() if f.startswith('shd') and f.endswith('_flag')}
        yield Record(f'echonext/{row["ecg_key"]}', f'echonext/{row["patient_key"]}', fs=250, leads=LEADS, unit='mV', labels=labels,
                     age=number(row['age_at_ecg']), sex=number(row['sex']) if math.isnan(sex) else sex, fold=fold[split],
                     load=functools.partial(load_echonext, path=root / f'EchoNext_{split}_waveforms.npy', row=seen[split]))
        seen[split] += 1
    for split, n in seen.items():
        file = root / f'EchoNext_{split}_waveforms.npy'
        there = len(np.load(file, mmap_mode='r')) if file.is_file() else n       # one that is not there is counted record by record
        if n != there:
            raise Stop(f'{file.name} has {there} records, but {table.name} has {n} of split {split}: they cannot be matched')


def load_echonext(record, path, row):
    """Signal of one row of a split's waveforms."""
    record.x = np.load(path, mmap_mode='r')[row, 0]              # (N, 1, 2500, 12) in the file


FEATURES = ('rr', 'qrs', 'qt', 'qtc', 'p_axis', 'qrs_axis', 't_axis')                        # ms and degrees
MDS = {'biometrics': ('biometrics', 'height weight bmi'.split()), 'vitals': ('vitals', 'dbp heartrate o2sat resprate sbp temperature'.split()),
       'labs': ('labvalues', 'PT, Albumin, Anion Gap, Bicarbonate, Bilirubin Total, Calcium Total, Creatinine, Ferritin, Urea Nitrogen, '
                'Hematocrit, Hemoglobin, Lymphocytes, MCHC, RDW, Red Blood Cells, RDW-SD, Creatine Kinase (CK), NTproBNP'.split(', '))}


def mimic(root, cardiac=2000, others=2000):
    """MIMIC-IV-ECG 1.0 (PhysioNet), leads by name (its files have aVF before aVL), clipped to 3 mV; and, where the credentialed tables
    lie in the same folder, its clinical labels. Alone: all records, seven regressions (features/), hashed folds by patient.
    records_w_diag_icd10.csv (MIMIC-IV-ECG-ICD): the setting of arXiv 2605.12241, ECGs taken in the ED that have a code, in folds 18 and
    19 of strat_fold only the first of a stay; codes of prefix I are cardiac/, others noncardiac/, kept if they have `cardiac` or `others`
    ECGs in the whole table; sex/, age/. mds_ed.csv (MDS-ED): see mds_columns.
    Written to the published schemas, not yet tried on the real files. The papers interpolate any NaN; here long gaps drop the record."""
    root = Path(root)
    study = lambda text: (text or '').split('.')[0].strip()
    measured = {study(r['study_id']): typed('f', machine(r)) for r in rows_of(
        root / 'machine_measurements.csv', 'study_id', 'rr_interval', 'qrs_onset', 'qrs_end', 't_end', 'p_axis', 'qrs_axis', 't_axis')}
    stays, common, names, outcomes = None, {}, (), {}
    if (root / 'records_w_diag_icd10.csv').is_file():
        stays, common = mimic_stays(root / 'records_w_diag_icd10.csv', study, cardiac, others)
    if (root / 'mds_ed.csv').is_file():
        names, outcomes = mds_outcomes(root / 'mds_ed.csv', study)
    known = {name.split('/')[0]: name for name in reversed(common.values())}   # the commonest of each namespace: its 0 makes the others known
    for row in rows_of(root / 'record_list.csv', 'subject_id', 'study_id', 'path'):
        key = study(row['study_id'])
        if stays is not None and key not in stays:
            continue
        labels = {f'features/{n}': v for n, v in zip(FEATURES, measured.get(key, [math.nan] * 7))}
        labels |= zip(names, outcomes.get(key, ()))
        fold, age, sex = -1, math.nan, math.nan
        if stays is not None:
            codes, fold, age, sex = stays[key]
            labels |= dict.fromkeys(known.values(), 0.)
            labels |= {common[c]: 1. for c in codes if c in common}
            labels |= {'sex/female': sex, 'age/years': age}
        yield Record(f'mimic/{key}', f'mimic/{study(row["subject_id"])}', age=age, sex=sex, labels=labels, fold=fold,
                     load=functools.partial(load_mimic, path=root / row['path'].strip()))


def load_mimic(record, path):
    """Signal of one MIMIC-IV-ECG record, clipped to 3 mV."""
    load_wfdb(record, path)
    record.x = np.clip(record.x, -3, 3)


def machine(row):
    """The seven FEATURES of a row of machine_measurements.csv; times beyond 0 to 5000 ms and axes beyond 360 degrees are unknown."""
    within = lambda v, low, high: v if low <= v <= high else math.nan
    rr, on, end, t = (within(number(row[k]), 0, 5000) for k in ('rr_interval', 'qrs_onset', 'qrs_end', 't_end'))
    qrs, qt = within(end - on, 0, 5000), within(t - on, 0, 5000)
    axes = [within(number(row[k]), -360, 360) for k in ('p_axis', 'qrs_axis', 't_axis')]
    return [rr, qrs, qt, qt / math.sqrt(rr / 1000) if rr > 0 else math.nan, *axes]


def icd_codes(text):
    """ICD-10 codes of a cell like ['I2510', 'W19XXXA']: cut to five characters, trailing X removed, ancestors of three or more added."""
    codes = {code[:5].rstrip('X') for code in re.findall(r'\w+', text or '')}
    return {code[:n] for code in codes for n in range(3, len(code) + 1)}


def mimic_stays(path, study, cardiac, others):
    """({study: (codes, fold, age, sex)} of the ECGs that the label setting keeps, {code: label} of the codes common enough, the commonest
    first)."""
    count, stays = Tally(), {}
    for row in rows_of(path, 'study_id', 'all_diag_all', 'gender', 'age', 'ecg_taken_in_ed', 'ecg_no_within_stay', 'strat_fold'):
        codes, fold = icd_codes(row['all_diag_all']), int(number(row['strat_fold'], -1))
        count.update(codes)
        in_ed = row['ecg_taken_in_ed'].strip().lower() in ('true', '1', '1.0')
        if codes and in_ed and (fold < 18 or number(row['ecg_no_within_stay']) == 0):
            stays[study(row['study_id'])] = tuple(map(sys.intern, sorted(codes))), fold, number(row['age']), female(row['gender'])
    common = {}
    for code, n in count.most_common():
        space, least = ('cardiac', cardiac) if code[0] == 'I' else ('noncardiac', others)
        if n >= least:
            common[code] = f'{space}/{code}'
    return stays, common


def mds_columns(columns):
    """{label: column} of mds_ed.csv. Columns named deterioration_... are the yes/no outcomes, in three namespaces: mortality/1d ... stay,
    icu/24h, icu/stay, deterioration/... . For biometrics/, labs/ and vitals/ the benchmark takes the measurement nearest to the ECG from
    MIMIC-IV's own tables; here it is the column of that name or, for MDS-ED's summaries of the first 90 minutes, NAME_first."""
    plain = lambda text: re.sub('[^a-z0-9]', '', text.lower())
    by, found = {plain(c): c for c in columns}, {}
    for column in columns:
        if column.lower().startswith('deterioration_'):
            rest = column.lower()[len('deterioration_'):]
            home = next((ns for ns in ('mortality', 'icu') if rest.startswith(ns + '_')), 'deterioration')
            found[f'{home}/{rest.removeprefix(home + "_")}'] = column
    for home, (prefix, names) in MDS.items():
        for name in names:
            keys = [plain(f'{start}_{name}_{end}') for start in (prefix, home) for end in ('', 'first')]
            found |= {f'{home}/{name}': by[key] for key in keys[::-1] if key in by}
    return found


def mds_outcomes(path, study):
    """(label names, {study: values}) of mds_ed.csv; -999 is unknown, and so is the outer 1 % of each number on either side."""
    keys, values, columns = [], [], None
    for row in rows_of(path, 'general_study_id'):
        columns = columns or mds_columns([c for c in row if c])
        keys.append(study(row['general_study_id']))
        values.append(typed('f', (math.nan if (v := number(row[c])) == -999 else v for c in columns.values())))
    if not columns:
        raise Stop(f'{path} has no rows, or no column that is known here')
    values = np.array(values, np.float32)
    for k, name in enumerate(columns):
        if name.split('/')[0] in MDS and np.isfinite(values[:, k]).any():
            low, high = np.nanpercentile(values[:, k], (1, 99))
            values[(values[:, k] < low) | (values[:, k] > high), k] = np.nan
    return tuple(columns), dict(zip(keys, values.tolist()))


SEQUENCES = ('sine', 'square', 'sawtooth', 'chirp', 'walk', 'noise', 'pulses', 'bursts')


def sequences(records, seed=0, seconds=10., fs=240):
    """Sequences that are no ECGs, eight classes in turn (sequence/sine ...), for transfer beyond medicine without training. Two sources of
    the class, of random frequency and phase, are mixed at random into twelve leads of .1 to 2 mV; record i depends on (seed, i) alone."""
    for i in range(records):
        rng, name = np.random.default_rng([seed, i]), SEQUENCES[i % 8]
        t = np.arange(round(seconds * fs)) / fs
        x = np.stack([sequence(name, t, rng) for _ in range(2)], 1) @ rng.normal(size=(2, 12))          # (T, 12)
        x *= .1 * 20 ** rng.random() / (x - x.mean(0)).std(0).max()
        yield Record(f'sequences{seed}/{i}', x=x - x.mean(0) + rng.normal(0, .004, x.shape), fs=fs, leads=LEADS, unit='mV',
                     labels={f'sequence/{name}': 1.}, peaks=np.zeros(0))


def sequence(name, t, rng):
    """One source of class `name` at times t (T,) in s, of order 1."""
    f, phase = .5 * 16 ** rng.random(), rng.random()             # .5 to 8 Hz
    turn, steps = f * t + phase, rng.normal(size=len(t))
    if name == 'sine':
        return np.sin(2 * np.pi * turn)
    if name == 'square':
        return np.sign(np.sin(2 * np.pi * turn))
    if name == 'sawtooth':
        return 2 * (turn % 1) - 1
    if name == 'chirp':                                          # the frequency grows to as much as sixfold
        return np.sin(2 * np.pi * (turn + f * (1 + 4 * rng.random()) * t ** 2 / (2 * t[-1])))
    if name == 'walk':
        return np.cumsum(steps) / np.sqrt(len(t))
    if name == 'noise':                                          # power falls as 1 / f^0 ... 1 / f^1.2
        spectrum = np.fft.rfft(steps) * np.maximum(np.fft.rfftfreq(len(t), t[1]), .3) ** (-.6 * rng.random())
        return np.fft.irfft(spectrum, len(t))
    train = (rng.random(len(t)) < f * t[1]).astype(float)        # pulses, bursts: at irregular times, f a second on average
    train[rng.integers(len(t))] = 1
    hump = scipy.ndimage.gaussian_filter1d(train, (.02 if name == 'pulses' else .15) * (1 + rng.random()) / t[1])
    return hump / hump.max() * (1 if name == 'pulses' else np.sin(2 * np.pi * (12 + 18 * rng.random()) * (t + phase)))


def wfdb_folder(root):
    """Any folder of WFDB records, at any depth, without labels."""
    for p in sorted(Path(root).rglob('*.hea')):
        yield Record(p.relative_to(root).with_suffix('').as_posix(), load=functools.partial(load_wfdb, path=p.with_suffix('')))


def read_array(path, fs, leads, unit):
    """(x (N, T, C), fs, leads, unit) of an .npy, which streams, or of an .npz (key x), which is read whole and may carry the others."""
    try:
        file = np.load(path, mmap_mode='r', allow_pickle=False)
        if isinstance(file, np.lib.npyio.NpzFile):
            file = {k: file[k] for k in ('x', 'fs', 'leads', 'unit') if k in file}
    except FileNotFoundError:
        raise Stop(f'no file {path}: --root must name a .npy or .npz file')
    except (ValueError, OSError, EOFError, MemoryError, OverflowError, RuntimeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile,
            zlib.error) as e:
        raise Stop(f'{path} is no numeric .npy or .npz file ({e})')
    if isinstance(file, dict):
        if 'x' not in file:
            raise Stop(f'{path} has no array x; it has {", ".join(file)}')
        fs, unit = (np.ravel(file.get(k, given)).tolist()[0] for k, given in (('fs', fs), ('unit', unit)))
        leads, file = np.ravel(file.get('leads', leads)).tolist(), file['x']
    if not fs:
        raise Stop(f'the sampling rate of {path} is unknown: add --fs-in HZ')
    axis = [a for a in (2, 1) if file.ndim == 3 and file.shape[a] == len(leads)]
    if not axis or file.dtype.kind not in 'iuf':
        raise Stop(f'{path} is {file.dtype} {file.shape}: numbers of shape (N, {len(leads)}, T) or (N, T, {len(leads)}) are needed')
    return file if axis[0] == 2 else file.transpose(0, 2, 1), fs, tuple(leads), unit


def array(path, fs, leads, unit, labels=None):
    """Your own recordings: .npy or .npz (key x) of shape (N, 12, T) or (N, T, 12); an .npz may carry fs, leads and unit itself.
    labels: csv with one row per record, in order; columns id, patient, fold, age, sex are what they say, every other one a label,
    blank where unknown."""
    recordings, fs, leads, unit = read_array(path, fs, leads, unit)
    if labels and not Path(labels).is_file():
        raise Stop(f'no file {labels}: --labels must name a csv file')
    known, rows = ('id', 'patient', 'fold', 'age', 'sex'), [{}] * len(recordings)
    if labels:
        rows = [{k.lower() if k.lower() in known else k: v for k, v in r.items()} for r in rows_of(labels, ragged=False)]
    if len(rows) != len(recordings):
        raise Stop(f'{labels} has {len(rows)} rows for {len(recordings)} records')
    names = [name for name in rows[0] if name not in known] if rows else []
    for name in names:
        odd = [i for i, row in enumerate(rows) if math.isfinite(number(row[name])) and number(row[name]) not in (0, 1)]
        if odd:
            print(f'{labels}: column {name} is a number, not yes or no (row {odd[0] + 1} has {rows[odd[0]][name]}): scored by MAE')
    for i, (x, row) in enumerate(zip(recordings, rows)):
        if row.get('age') and math.isnan(number(row['age'])):
            raise Stop(f'{labels}, row {i + 1}: age {row["age"]!r} is no number of years')
        sex = {'f': 1., 'm': 0.}.get((row.get('sex') or ' ')[0].lower(), number(row.get('sex')))
        fold = int(row['fold']) if re.fullmatch(r'\d{1,4}', row.get('fold') or '') else -1
        if fold < 0 and row.get('fold'):
            raise Stop(f'{labels}, row {i + 1}: fold {row["fold"]!r} is no whole number')
        for name in names:
            if row[name] and not math.isfinite(number(row[name])):
                raise Stop(f'{labels}, row {i + 1}, column {name}: {row[name][:40]!r} is no number; use 1, 0, or blank for unknown')
        patient = row.get('patient') or ''
        if math.isfinite(number(patient)):                       # a patient's number is no record's number, which `overlap` looks for too
            patient = f'patient {patient}'
        yield Record(row.get('id') or f'{Path(path).stem}/{i}', patient, np.array(x, float), fs, leads, unit, number(row.get('age')), sex,
                     {f'label/{name}': number(row[name]) for name in names} if labels else None, fold)


def synthetic(records, seed=0, seconds=10., shifts=(), prevalence=1.):
    """Synthetic records 0 ... records - 1, always computed in whole blocks of 64, so that a larger set begins with a smaller one."""
    cohort = f'synthetic{seed}' + ''.join(f'-{s}' for s in sorted(shifts))
    for start in range(0, records, 64):
        s = synthesize(seed, torch.arange(start, start + 64), seconds, shifts=shifts, prevalence=prevalence)
        values = torch.cat([s['findings'], s['tail'], s['targets']], 1).tolist()
        for i in range(min(64, records - start)):
            beats = s['beats'][i].double().numpy()
            yield Record(f'{cohort}/{start + i}', f'{cohort}/patient{s["patient"][i]}', s['x'][i].numpy(), 240, LEADS, 'uV',
                         float(s['targets'][i, -1]), float(s['female'][i]), dict(zip(SYNTHETIC_LABELS, values[i])),
                         peaks=beats[(beats >= 0) & (beats < seconds)])


def synthetic_in_memory(records, device):
    """What preparing `records` synthetic records of 10 s would write, as (meta, index, signals, labels) in memory, signals on `device`."""
    T, block = 2400, 1024 if device.type == 'cuda' else 64
    signals, found = torch.empty(records * T, 12, dtype=torch.int16, device=device), []
    for start in tqdm(range(0, records, block), desc='making records', unit='block', disable=None):
        s = synthesize(0, torch.arange(start, start + block), device=device)
        s = {k: v[:records - start] for k, v in s.items()}       # the last block may hold more than is asked for
        signals[start * T:(start + block) * T] = s['x'].flatten(0, 1)
        inside = (s['beats'] >= 0) & (s['beats'] < 10)
        labels = torch.cat([s['findings'], s['tail'], s['targets']], 1)
        found.append([t.cpu() for t in (s['patient'], labels, s['female'], inside.sum(1), s['beats'][inside])])
    patient, labels, female, count, beats = (torch.cat(part).numpy() for part in zip(*found))
    folds = np.array([fold_of(f'synthetic0/patient{p}') for p in range(patient[-1] + 1)])
    name = lambda what, numbers: np.char.add(f'synthetic0/{what}', numbers.astype(str))
    index = dict(offset=np.arange(records) * T, length=np.full(records, T), id=name('', np.arange(records)), patient=name('patient', patient),
                 fold=folds[patient], age=labels[:, -1].astype(float), sex=female.astype(float),
                 peaks=np.rint(beats.astype(float) * 240).astype(np.int32), peak_start=np.r_[0, np.cumsum(count)])
    first = hashlib.blake2b(signals[:T].cpu().numpy().tobytes(), digest_size=8).hexdigest()                # another generator, another hash
    meta = dict(contract=asdict(Contract()), labels=SYNTHETIC_LABELS, tasks=tasks_of(SYNTHETIC_LABELS, SYNTHETIC_TASKS), hash=f'{records}@{first}')
    return meta, index, signals, labels.astype(np.float32)


def download(source, root, rate=100, cohorts=()):
    """Fetch PTB-XL or Challenge 2021 cohorts from PhysioNet into root through wfdb, which skips files that are there already."""
    import wfdb
    Path(root).mkdir(parents=True, exist_ok=True)
    if source == 'ptbxl':
        wfdb.dl_files('ptb-xl', root, ['ptbxl_database.csv', 'scp_statements.csv', 'LICENSE.txt'])
        names = [r['filename_lr' if rate == 100 else 'filename_hr'] for r in rows_of(Path(root) / 'ptbxl_database.csv')]
        wfdb.dl_files('ptb-xl', root, [n + end for n in names for end in ('.hea', '.dat')])
    else:
        wanted = [r for r in wfdb.get_record_list('challenge-2021') if not cohorts or r.split('/')[1] in cohorts]
        if not wanted:
            raise Stop(f'PhysioNet\'s challenge-2021 has no cohort {", ".join(cohorts)}')
        wfdb.dl_database('challenge-2021', root, wanted, annotators=None)


# ---------------------------------------------------------------------------------------------------------------------
# from a record to the contract

def conform(x, fs, leads, unit, contract):
    """x (T, C) in `unit` at `fs` Hz to (T', 12) in the contract's units and rate. Leads are taken by name, in any order and case.
    Gaps of up to 0.1 s are interpolated. Returns (x, samples interpolated, x in mV before filter, rate and norm). Raises Defect."""
    if not 50 <= fs <= 10000:
        raise Defect('absurd fs')
    factor = {'mv': 1., 'uv': 1e-3, '\u00b5v': 1e-3, '\u03bcv': 1e-3, 'v': 1e3}.get(str(unit).lower())
    if factor is None:
        raise Defect('unknown unit')
    names = [str(name).strip().upper() for name in leads]
    if any(names.count(name.upper()) != 1 for name in contract.leads):
        missing = [name for name in contract.leads if name.upper() not in names]
        raise Defect(f'missing lead {", ".join(missing)}' if missing else 'lead named twice')
    x = np.asarray(x, float)[:, [names.index(name.upper()) for name in contract.leads]] * factor
    window = round(contract.window * fs)
    if len(x) < window:
        raise Defect('shorter than a window')
    bad = ~np.isfinite(x)
    if bad.any():
        runs = scipy.ndimage.label(bad, [[0, 1, 0]] * 3)[0]      # runs along time, lead by lead
        if np.bincount(runs.ravel())[1:].max() > .1 * fs or bad.mean(0).max() > .05:
            raise Defect('NaN or inf beyond a short gap')
        for c in np.flatnonzero(bad.any(0)):
            x[bad[:, c], c] = np.interp(np.flatnonzero(bad[:, c]), np.flatnonzero(~bad[:, c]), x[~bad[:, c], c])
    parts = x[:len(x) // window * window].reshape(-1, window, x.shape[1])
    if ((np.ptp(parts, axis=1) < 2e-3).mean(0) > .5).sum() > 2:  # flat in most of its windows
        raise Defect('more than two flat leads')
    if np.abs(x).max() > 32.767:
        raise Defect('beyond 32.767 mV: wrong gain or unit?')
    y = resample(filtered(x, fs, contract.filter), fs, contract.fs)
    if contract.norm == 'record':
        y = (y - y.mean(0)) / (y.std(0) + 1e-6)
    return y, int(bad.sum()), x


def filtered(x, fs, steps):
    """x (T, C) at `fs` Hz after a contract's filter: second-order Butterworth steps and notches of Q 30, forwards and backwards."""
    for step in steps.split('+') if steps != 'none' else ():
        kind, hz = re.fullmatch(r'(hp|lp|notch)([\d.]+)', step).groups()
        hz = float(hz)
        if hz >= fs / 2:                                         # nothing there to remove
            continue
        if kind == 'notch':
            x = scipy.signal.filtfilt(*scipy.signal.iirnotch(hz, 30, fs), x, axis=0)
        else:
            x = scipy.signal.sosfiltfilt(scipy.signal.butter(2, hz, kind, fs=fs, output='sos'), x, axis=0)
    return x


def resample(x, fs, to):
    """x (T, C) from fs to `to` Hz by a polyphase filter, which removes what would alias; ends continue the line through them."""
    if fs == to:
        return x
    ratio = Fraction(to / fs).limit_denominator(1000)
    return scipy.signal.resample_poly(x, ratio.numerator, ratio.denominator, axis=0, padtype='line')


def find_peaks(x, fs):
    """R-peaks in s of x (T, 12) in mV: wfdb's XQRS at 240 Hz (at 100 Hz it counts twice) on the first of V5, V2, II, I in which it
    finds at least 24 a minute. On LUDB's 200 records it finds all 1,831 annotated beats, within 0.1 s, and 2 more."""
    from wfdb.processing import XQRS
    y = resample(x, fs, 240)
    for lead in ('V5', 'V2', 'II', 'I'):
        signal = y[:, LEADS.index(lead)]
        if np.ptp(signal) < .02:
            continue
        detector = XQRS(signal, 240)
        detector.detect(verbose=False)
        if len(detector.qrs_inds) >= max(2, .4 * len(y) / 240):
            return np.asarray(detector.qrs_inds) / 240
    return np.zeros(0)


def finish(record, contract, peaks=True):
    """Worker: one Record to (record without its signal, counts (T, 12) int16, facts) or (record, None, reason for dropping it)."""
    try:
        if record.load:
            record.load(record)
        x, repaired, raw = conform(record.x, record.fs, record.leads, record.unit, contract)
        counts = np.rint(x / contract.scale)
        if np.abs(counts).max() > 32767:
            raise Defect('beyond the range of int16')
        counts = counts.astype(np.int16)
        I, II = raw[:, 0], raw[:, 1]
        derived = np.stack([II - I, -(I + II) / 2, I - II / 2, II - I / 2], 1)               # III, aVR, aVL, aVF by Einthoven and Goldberger
        ecg = record.peaks is None or len(record.peaks) > 0      # what is known to have no R-peaks owes Einthoven nothing
        facts = dict(repaired=repaired, einthoven=ecg and bool((np.std(raw[:, 2:6] - derived, 0) > .1 * np.std(II) + .02).any()))
        if record.peaks is None:
            record.peaks = find_peaks(raw, record.fs) if peaks else np.zeros(0)
        record.peaks = np.rint(np.asarray(record.peaks) * contract.fs).astype(np.int32)
    except Defect as e:
        counts, facts = None, str(e)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        counts, facts = None, 'file missing'
    except Exception as e:                                       # whatever a damaged file makes a library raise
        counts, facts = None, f'unreadable ({type(e).__name__})'
    return replace(record, x=None, load=None), counts, facts


BLOCK = 256                                                      # records under way at a time


def finish_all(records, contract, peaks, workers):
    """What `finish` makes of each record, in order, in `workers` processes; None: one per core, 1: in this one."""
    work = functools.partial(finish, contract=contract, peaks=peaks)
    pool = ProcessPoolExecutor(workers) if workers != 1 else None
    records = iter(records)
    try:
        while block := list(itertools.islice(records, BLOCK)):   # bounded, so that a fast reader cannot fill the memory
            yield from pool.map(work, block, chunksize=4) if pool else map(work, block)
    except BrokenExecutor:
        raise Stop('a worker process died, perhaps for lack of memory: try again with fewer --workers')
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def fold_of(patient):
    """Fold 1 ... 10 of a patient for whom the source gives none: a hash, so that it never depends on what else is in the set."""
    return int.from_bytes(hashlib.blake2b(patient.encode(), digest_size=4).digest(), 'big') % 10 + 1


def stratify(Y, groups=None, folds=10, seed=0):
    """Folds 0 ... folds - 1 (N,) that share out each label evenly: iterative stratification (Sechidis et al. 2011). Y (N, K) is above 0
    where a record has a label. Records of a group, such as a patient, stay together; a group without any label gets -1: always training.
    The rarest label comes first, and of its groups those with most of it; each goes to the fold that still lacks most of the label, of
    several to the one that lacks most of all its labels (our reading of the tie: sets of patients come out within 1 of even instead of
    within 36), then most records, then by lot."""
    group = np.arange(len(Y)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count, size = np.zeros((group.max() + 1, Y.shape[1]), int), np.bincount(group)           # (groups, K) and (groups,), in records
    np.add.at(count, group, np.asarray(Y) > 0)
    fold = np.full(len(count), -1)
    tie = np.random.default_rng(seed).random((len(count), folds))
    lack = np.repeat(count.sum(0)[None], folds, 0)               # (folds, K) times `folds`: whole numbers tie exactly
    room = np.full(folds, size[count.any(1)].sum())
    left = (count > 0).sum(0)                                    # groups still to be placed, label by label
    while left.any():
        k = np.where(left > 0, left, left.max() + 1).argmin()
        todo = np.flatnonzero((fold < 0) & (count[:, k] > 0))
        for g in todo[np.argsort(-count[todo, k], kind='stable')]:
            f = fold[g] = np.lexsort((tie[g], room, lack @ (count[g] > 0), lack[:, k]))[-1]
            lack[f] -= folds * count[g]
            room[f] -= folds * size[g]
            left -= count[g] > 0
    return fold[group]


def mended(name):
    """Folder of a prepared dataset and where its predecessor goes while it is replaced. A kill between the two renames of `prepare`
    leaves only the predecessor: it is put back."""
    home, old = Path('datasets', name), Path('datasets', f'.{name}.old')
    if old.exists() and not home.exists():
        old.rename(home)
    return home, old


def prepare(name, records, contract=Contract(), source='', extra_tasks=(), workers=None, peaks=True, strict=False, total=None,
            folds='hash'):
    """Write the prepared dataset datasets/NAME from a reader's records, streaming: signals go to disk as they come, only the index
    (some 300 bytes a record) stays in memory. The folder appears when it is complete and replaces an older one.
    Records with a defect are dropped and counted by reason (strict: the first one stops). folds: how records whose source gives no
    fold get one, 'hash' of the patient or 'stratified' by labels. Prints a summary, returns the meta dict."""
    if not re.fullmatch(r'[\w][\w.-]*', name):
        raise Stop(f'{name!r} cannot name a dataset: use letters, digits, _, - and .')
    home, old = mended(name)
    temporary = Path('datasets', f'.{name}.partial')
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        meta = write_dataset(temporary, records, contract, workers, peaks, strict, total, name, folds)
        meta |= dict(source=source, tasks=tasks_of(meta['labels'], extra_tasks))
        (temporary / 'meta.json').write_text(json.dumps(meta, indent=1))
        if home.exists():
            shutil.rmtree(old, ignore_errors=True)
            home.rename(old)
        temporary.rename(home)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def tasks_of(names, extra=()):
    """{task: columns} of label names: a task for each namespace, and the `extra` ones, pairs of a task and its names."""
    spaces = [name.split('/')[0] for name in names]
    tasks = {space: [column for column, its in enumerate(spaces) if its == space] for space in dict.fromkeys(spaces)}
    return tasks | {task: [names.index(name) for name in its] for task, its in extra}


def peak_memory(workers=False):
    """Peak resident memory of this process, or of its largest finished worker, in MB; NaN where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return math.nan
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if workers else resource.RUSAGE_SELF)
    return usage.ru_maxrss / (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)


def write_dataset(folder, records, contract, workers, peaks, strict, total, name, folds):
    """The files of a prepared dataset but for meta.json, whose content it returns."""
    began, early = time.time(), None
    dropped, index, spaces, balanced, names, fold_by, ids = Tally(), [], [], [], {}, {}, set()
    peaks_so_far, peak_start = typed('i'), typed('q', [0])       # typed arrays: small objects here would fragment the heap
    sizes = typed('f')                                           # of each record: its middle lead from trough to crest
    cells = typed('q'), typed('i'), typed('f')                   # row, column, value of each label that is not 0
    digest, offset, repaired, odd = hashlib.blake2b(digest_size=8), 0, 0, 0
    with open(folder / 'signals.i16', 'wb') as signals, contextlib.closing(finish_all(records, contract, peaks, workers)) as finished, \
            tqdm(finished, total=total, desc=f'preparing {name}', unit='rec', disable=None) as bar:
        for record, counts, facts in bar:
            if record.id in ids:
                raise Stop(f'record id {record.id} appears twice: make the ids unique and prepare again')
            ids.add(record.id)
            if len(ids) == BLOCK:
                early = peak_memory()
            if counts is None:
                dropped[facts] += 1
                if strict:
                    raise Stop(f'record {record.id}: {facts} (--strict stops at the first defect)')
                continue
            patient, labels = record.patient or record.id, record.labels or {}
            fold = record.fold if record.fold >= 0 or folds == 'stratified' else fold_of(patient)
            if fold_by.setdefault(patient, fold) != fold:
                raise Stop(f'patient {patient} is in folds {fold_by[patient]} and {fold}: a patient must stay in one fold')
            for key, value in labels.items():
                column = names.setdefault(key, len(names))
                if value:
                    for cell, v in zip(cells, (len(index), column, value)):
                        cell.append(v)
            index.append((offset, len(counts), record.id, patient, fold, record.age, record.sex))
            spaces.append(frozenset(key.split('/')[0] for key in labels))
            if folds == 'stratified':
                balanced.append([k for k, v in labels.items() if v > 0] if record.strata is None else record.strata)
            peaks_so_far.extend(record.peaks.tolist())
            peak_start.append(len(peaks_so_far))
            sizes.append(contract.scale * np.median(np.ptp(counts, 0)))
            data = counts.tobytes()
            signals.write(data)
            digest.update(data)
            offset += len(counts)
            repaired += facts['repaired'] > 0
            odd += facts['einthoven']
    if not index:
        why = '; '.join(f'{n} {reason}' for reason, n in dropped.most_common()) or 'the source holds no records'
        raise Stop(f'nothing left to prepare: {why}')
    labels = np.lib.format.open_memmap(folder / 'labels.npy', 'w+', np.float32, (len(index), len(names)))
    for known in set(spaces):                                    # unknown: namespaces that a record does not use
        unknown = [column for name, column in names.items() if name.split('/')[0] not in known]
        labels[np.ix_([used == known for used in spaces], unknown)] = np.nan
    labels[np.array(cells[0]), np.array(cells[1])] = np.array(cells[2])
    labels.flush()
    digest.update(labels.tobytes())
    columns = dict(zip(('offset', 'length', 'id', 'patient', 'fold', 'age', 'sex'), map(np.array, zip(*index))))
    if folds == 'stratified':
        column = {what: i for i, what in enumerate(sorted(set(itertools.chain(*balanced))))}
        Y = np.zeros((len(index), len(column)), bool)
        for row, what in zip(Y, balanced):
            row[[column[w] for w in what]] = True
        columns['fold'] = np.where(columns['fold'] >= 0, columns['fold'], stratify(Y, columns['patient']))
    columns |= dict(peaks=np.array(peaks_so_far), peak_start=np.array(peak_start))
    np.savez(folder / 'index.npz', **columns)
    meta = dict(contract=asdict(contract), labels=list(names), records=len(index), seen=len(ids), dropped=dict(dropped),
                repaired=repaired, einthoven=odd, folds=folds, hash=digest.hexdigest())
    summarise(name, meta, columns, np.median(sizes), time.time() - began)
    now = peak_memory()
    print(f'  peak memory {now:.0f} MB, {now - (early or now):.0f} MB of it since the first {min(len(ids), BLOCK)} records'
          + (f'; largest worker {peak_memory(workers=True):.0f} MB' if workers != 1 else ''))
    return meta


def summarise(name, meta, index, size, seconds):
    """Print what has been prepared, and what about it looks wrong. size: mV from trough to crest of a usual lead."""
    fs, seen, kept = meta['contract']['fs'], meta['seen'], meta['records']
    print(f'{name}: {kept:,} of {seen:,} records kept, {len(set(index["patient"])):,} patients, {index["length"].sum() / fs / 3600:.1f} h of '
          f'signal, {len(meta["labels"])} labels, {len(index["peaks"]):,} R-peaks; {seconds:.1f} s ({seen / seconds:.0f} records/s)')
    for reason, n in Tally(meta['dropped']).most_common():
        print(f'  {n:,} dropped: {reason}')
    rate = np.median(60 * fs * np.diff(index['peak_start']) / index['length'])
    if meta['contract']['norm'] == 'none' and len(index['peaks']):
        print(f'  half of them have {rate:.0f} or more beats a minute, and {size:.2g} mV or more from trough to crest'
              + ('' if 40 < rate < 140 and .3 < size < 5 else ': no usual ECG, or is the rate or the gain another than was said?'))
    if meta['repaired']:
        print(f'  {meta["repaired"]:,} with short gaps interpolated')
    if meta['einthoven']:
        print(f'  {meta["einthoven"]:,} whose limb leads do not fit together (III = II - I, aVR = -(I + II) / 2 and so on): swapped, '
              'mislabelled or scaled one by one?')


# ---------------------------------------------------------------------------------------------------------------------
# prepared datasets, splits, batches

def open_prepared(name):
    """(meta, index, signals, labels) of datasets/NAME, signals (samples, 12) int16 on disk; one that can prepare itself does so when
    missing. Raises Stop where it is missing or damaged."""
    folder, _ = mended(name)
    if not folder.exists() and name in DEFAULTS:
        DEFAULTS[name]()
    try:
        meta = json.loads((folder / 'meta.json').read_text())
        index = dict(np.load(folder / 'index.npz'))
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='The given NumPy array is not writable')     # nor is it written to
            signals = torch.from_numpy(np.memmap(folder / 'signals.i16', np.int16, 'r').reshape(-1, 12))
        labels = np.load(folder / 'labels.npy', mmap_mode='r')
        whole = len(signals) == index['offset'][-1] + index['length'][-1] and len(labels) == len(index['id']) == meta['records']
    except FileNotFoundError as e:
        if folder.exists():
            raise Stop(f'datasets/{name} is damaged (no {Path(e.filename).name}): prepare it again')
        there = ', '.join(sorted(p.parent.name for p in Path('datasets').glob('[!.]*/meta.json'))) or 'none'
        raise Stop(f'no dataset {name!r} in datasets/ (there: {there}): prepare it with python data.py, see its --help')
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise Stop(f'datasets/{name} is damaged ({type(e).__name__}: {e}): prepare it again')
    if not whole:
        raise Stop(f'datasets/{name} is damaged (files of different lengths): prepare it again')
    return meta, index, signals, labels


class Dataset:
    """One or more prepared datasets ('ptbxl' or 'ptbxl,georgia') as one, signals on disk, everything else in memory.

    labels (N, K) float32 with NaN for unknown; id, patient, fold, age, sex, length (N,); tasks {name: columns}; contract.
    `synthetic`, `sample` and `shifted` (1,000 synthetic records of other patients, field and devices) prepare themselves;
    synthetic@1000000 makes so many synthetic records on `device`, without touching the disk. Crops come on `device`; on CUDA all
    signals lie there if they take less than half of what is free. Raises Stop where a dataset is missing, damaged or of another contract.
    """

    def __init__(self, names, device='cpu'):
        self.name, self.device = names, torch.empty(0, device=device).device                 # cuda:0, where only cuda was said
        parts = []                                               # (meta, index, signals, labels) of each
        for name in names.split(','):
            made = re.fullmatch(r'synthetic@([1-9]\d{0,7})', name)
            parts.append(synthetic_in_memory(int(made[1]), self.device) if made else open_prepared(name))
        self.contract = Contract.read(parts[0][0]['contract'])
        for name, (meta, *_) in zip(names.split(','), parts):
            if differs := Contract.read(meta['contract']).differs(self.contract):
                raise Stop(f'datasets/{name} has another contract ({differs}): prepare the datasets alike')
        more = sum(p[2].nbytes for p in parts if p[2].device != self.device)
        fits = self.device.type == 'cuda' and more < torch.cuda.mem_get_info(self.device)[0] / 2
        self.signals = [p[2].to(self.device if fits else 'cpu') for p in parts]
        self.label_names = list(dict.fromkeys(n for p in parts for n in p[0]['labels']))
        self.part = np.repeat(np.arange(len(parts)), [len(p[1]['id']) for p in parts])
        for key in ('offset', 'length', 'id', 'patient', 'fold', 'age', 'sex'):
            setattr(self, key, np.concatenate([p[1][key] for p in parts]))
        if len(set(self.id)) < len(self.id):
            raise Stop(f'{names}: the same record is in two of these datasets')
        self.peaks = np.concatenate([p[1]['peaks'] for p in parts])
        self.peak_count = np.concatenate([np.diff(p[1]['peak_start']) for p in parts])
        self.peak_start = np.cumsum(np.r_[0, self.peak_count])
        if len(parts) == 1:
            self.labels = parts[0][3]
        else:
            self.labels = np.full((len(self.id), len(self.label_names)), np.nan, np.float32)
            for i, (meta, _, _, labels) in enumerate(parts):
                self.labels[np.ix_(self.part == i, [self.label_names.index(n) for n in meta['labels']])] = labels
        self.tasks = {}
        for meta, *_ in parts:
            for task, columns in meta['tasks'].items():
                found = [self.label_names.index(meta['labels'][c]) for c in columns]
                self.tasks[task] = list(dict.fromkeys(self.tasks.get(task, []) + found))
        self.hash = '+'.join(p[0]['hash'] for p in parts)
        self.order = functools.lru_cache(2)(self.order)          # every step of an epoch asks for it

    def __len__(self):
        return len(self.id)

    def columns(self, task):
        """Label columns of a task, of a single label (super/MI), or of several of either joined by +, each column once. Of several, those
        that the set lacks are passed over; Stops where none is there."""
        known = {n: [c] for c, n in enumerate(self.label_names)} | self.tasks
        columns = list(dict.fromkeys(c for part in [task, *task.split('+')] for c in known.get(part, ())))
        if not columns:
            raise Stop(f'{self.name} has no task {task!r}; it has {", ".join(self.tasks) or "no labels"}')
        return columns

    def split(self):
        """Row numbers (train, validation, test): the highest fold tests, the second highest validates, patients stay together."""
        if len(folds := np.unique(self.fold)) < 3:
            raise Stop(f'{self.name} has {len(folds)} folds: three are needed for train, validation and test')
        return [np.flatnonzero(m) for m in (self.fold < folds[-2], self.fold == folds[-2], self.fold == folds[-1])]

    def nested(self, rows, records, seed):
        """`records` of `rows`, whole patients (the last may be cut) in an order drawn from `seed`: a smaller set lies in every larger one.
        Stops where there are fewer."""
        if not 0 < records <= len(rows):
            raise Stop(f'{self.name} has {len(rows):,} training records long enough: take 1 to {len(rows):,}, not {records:,}')
        patients, owner = np.unique(self.patient[rows], return_inverse=True)
        place = np.random.default_rng([seed, 3]).permutation(len(patients))[owner]
        return np.sort(rows[np.argsort(place, kind='stable')[:records]])

    def crop(self, rows, starts, samples):
        """Crops of `samples` from records `rows`, beginning at `starts`: (B, 12, samples) float32 in the contract's unit, on the device."""
        at, part, pieces = self.offset[rows] + starts, self.part[rows], []
        for i in np.unique(part):
            signals = self.signals[i]
            windows = signals.as_strided((len(signals) - samples + 1, samples * 12), (12, 1))              # all crops there are, none copied
            pieces.append(windows.index_select(0, torch.from_numpy(at[part == i]).to(signals.device, non_blocking=True)))
        back = np.argsort(np.argsort(part, kind='stable'))       # from dataset after dataset to the order of `rows`
        x = pieces[0] if len(pieces) == 1 else torch.cat(pieces)[back]
        if self.device.type == 'cuda' and not x.is_cuda:         # as int16: half of what the floats would take
            x = x.pin_memory().to(self.device, non_blocking=True)
        return x.view(-1, samples, 12).transpose(1, 2).float().mul_(self.contract.scale)

    def order(self, seed, epoch, n):
        """In which order an epoch visits n records."""
        return np.random.default_rng([seed, epoch, 1]).permutation(n)

    def batch(self, rows, samples, size, seed, step, share=(0, 1)):
        """Training batch `step`: one random crop from each of `size` records, a function of (seed, step) alone; each epoch passes
        over `rows` once in a new order. Dict of x (B, 12, T), y (B, K), patient (B,), peaks (B, P) in samples, -1 where none.
        share (i, n): of every n crops the i-th, for one of n processes."""
        turn = step * size + np.arange(size)
        epoch = turn // len(rows)
        rows = rows[np.concatenate([self.order(seed, e, len(rows))[turn[epoch == e] % len(rows)] for e in np.unique(epoch)])]
        room = self.length[rows] - samples + 1
        starts = (np.random.default_rng([seed, step, 2]).random(size) * room).astype(int)
        return self.collate(rows[share[0]::share[1]], starts[share[0]::share[1]], samples)

    def collate(self, rows, starts, samples):
        """The batch of given crops, as `batch` describes it."""
        rows, starts = np.asarray(rows), np.asarray(starts)
        k = np.arange(self.peak_count[rows].max(initial=0))      # of the record's R-peaks
        last = self.peak_start[rows] + self.peak_count[rows] - 1
        peaks = self.peaks[np.minimum(self.peak_start[rows][:, None] + k, last[:, None])] - starts[:, None]
        inside = (k < self.peak_count[rows][:, None]) & (peaks >= 0) & (peaks < samples)
        peaks = np.sort(np.where(inside, peaks, samples), 1)[:, :inside.sum(1).max(initial=0)]
        patient = np.unique(self.patient[rows], return_inverse=True)[1]
        return dict(x=self.crop(rows, starts, samples), y=torch.from_numpy(np.array(self.labels[rows])),
                    patient=torch.from_numpy(patient), peaks=torch.from_numpy(np.where(peaks < samples, peaks, -1)))

    def crops(self, rows, samples):
        """Consecutive, non-overlapping crops of records `rows` for evaluation: (row of each crop, start of each crop)."""
        count = self.length[rows] // samples
        owner = np.repeat(rows, count)
        return owner, np.concatenate([np.arange(c) * samples for c in count]).astype(int)


# ---------------------------------------------------------------------------------------------------------------------
# the synthetic 12-lead ECG: Gaussian beats on a heart dipole, seen through each patient's own lead field

FINDINGS = ('1dAVb RBBB LBBB SB AF ST IRBBB AFL PVC PAC SARR LAFB LVH RVH IMI AMI LMI STD STE TINV LQT LVOLT PACE '
            'WPW').split()                                       # CODE's six come first
TARGETS = ['hr', 'pr', 'qrs', 'qt', 'axis', 'age']               # beats/min, ms, ms, ms, degrees, years
P1, P2, Q, R1, R2, S, X, J, T1, T2, U, SP, F1, F2 = range(14)    # a beat's Gaussians. X: late or delta wave, SP: pacing spike, F: notches
_P, _QRS, _T = [P1, P2], [Q, R1, R2, S, F1, F2], [T1, T2]
# mean and between-patient SD of each kernel's dipole (x left, y down, z back; mV), fitted to 297 normal PTB-XL records
_MU = np.array([[.037, .063, -.022], [.060, .074, .003], [-.100, -.068, -.275], [.85, .436, .16], [.676, .382, .539],
                [-.24, -.042, .391], [0, 0, 0], [0, .002, -.047], [.12, .045, -.18], [.216, .133, -.063],
                [.012, .01, -.01], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
_SD = np.array([[.019, .032, .018], [.022, .043, .024], [.166, .097, .176], [.302, .298, .438], [.482, .306, .341],
                [.186, .162, .253], [0, 0, 0], [.03, .024, .033], [.09, .051, .113], [.131, .072, .097],
                [.008, .008, .008], [0, 0, 0], [.2, .16, .2], [.2, .16, .2]])
# what one lead sees of the dipole (rows I, II, V1-V6): Dower's matrix refitted to the same records
_FIELD = np.array([[.638, -.142, -.029], [.252, 1.057, -.148], [-.508, .302, -.741], [-.066, .221, -1.693],
                   [.982, -.028, -1.15], [1.228, .106, -.487], [1.068, .154, -.068], [.78, .222, .102]])
_FIELD *= np.array([1.04, 1, .96, 1.2, 1.28, 1.2, 1.12, 1.08])[:, None]
_FIELD_SD = np.linalg.norm(_FIELD, axis=1) * np.array([.26, .05, .13, .11, .11, .09, .09, .13])
# leads I, II, V1-V6 of what no dipole explains; V3-V6 of P2 lowered until the P waves met the calibration
_RESIDUAL = {P2: [.053, .015, -.013, .019, -.006, -.032, -.034, -.023], S: [.056, .023, -.074, .053, .022, -.05, -.041, .006],
             T1: [.026, .007, -.029, .045, -.013, -.026, -.005, .016], T2: [.034, .008, -.02, .044, -.016, -.028, -.003, .018]}
_LBBB = {Q: [.25, .1, .25], R1: [.7, .3, .8], R2: [.9, .2, 1], S: [.8, .1, .6], X: [.4, .05, .3], J: [-.12, -.02, -.25],
         T1: [-.16, -.04, -.3], T2: [-.2, -.05, -.15]}
_PVC = [0, 0, .4, .8, 1, .6, .3, -.1, -.3, -.35, 0, 0, 0, 0]
_CHRONIC = {'1dAVb': (.05, .45), 'RBBB': (.045, .4), 'IRBBB': (.05, 0), 'LBBB': (.035, .45), 'AF': (.05, .55), 'AFL': (.02, .4),
            'LAFB': (.06, .35), 'LVH': (.08, .2), 'RVH': (.025, 0), 'IMI': (.07, .4), 'AMI': (.06, .4), 'LMI': (.03, .4),
            'LVOLT': (.05, .2), 'PACE': (.02, .5), 'WPW': (.02, -.2)}           # finding: (prevalence, slope per decade of age)
_ACUTE = {'PVC': (.05, .3), 'PAC': (.04, .3), 'STD': (.07, .3), 'STE': (.03, 0), 'TINV': (.06, .1), 'LQT': (.04, .1)}
_TERRITORY = np.array([[0, 1, 0], [-.2, 0, -1], [.4, 0, -.9], [1, 0, .1], [.8, -.6, 0], [.7, .7, .1], [0, 0, 1], [-1, .3, -.3]])
_TERRITORY /= np.linalg.norm(_TERRITORY, axis=1, keepdims=True)
# morphologies of the long tail: mV along the territory, per unit of severity; those without a number shrink waves instead
_TAIL = {'STdown': {J: -.16}, 'STup': {J: .22}, 'Tinverted': {T2: -.38}, 'Ttall': {T2: .42}, 'Tflat': {}, 'Q': {Q: -.42, R1: -.3},
         'notch': {F1: .8, F2: -.8}, 'Rloss': {}, 'U': {U: .14}}
_TAIL_GAIN = np.array([[gains.get(k, 0.) for k in range(14)] for gains in _TAIL.values()])   # (9, 14)
TAIL = [f'{m}-{t}-{s}' for t in range(8) for m in _TAIL for s in ('mild', 'moderate', 'severe')]
SYNTHETIC_LABELS = [f'findings/{n}' for n in FINDINGS] + [f'tail/{n}' for n in TAIL] + [f'target/{n}' for n in TARGETS]
SYNTHETIC_TASKS = [('code', [f'findings/{n}' for n in FINDINGS[:6]]), ('unseen', [f'findings/{n}' for n in FINDINGS[6:]])]
SHIFTS = {'age': dict(age=8., female=.6), 'prevalence': dict(prevalence=1.), 'field': dict(field=1.5, electrode=.5),
          'gain': dict(gain=.85, gain_sd=.15), 'noise': dict(mains=.015, muscle=2., baseline=1.6), 'device': dict(highpass=.5, lsb=5),
          'swap': dict(swap=.03), 'twave': dict(twave=.85)}
_HOME = dict(age=0., female=.5, prevalence=0., field=1., electrode=.3, gain=1., gain_sd=.07, mains=0., muscle=1., baseline=1.,
             highpass=0., lsb=2, swap=0., twave=1.)                       # lsb in uV: not 2.5 and 4.88, so that every lead is whole uV


class Draws:
    """Counter-based random numbers (SplitMix64): what is drawn depends on (seed, index, purpose) alone, on any device.

    index (B,) int64; u and n return (B, *shape) uniforms in (0, 1) and standard normals."""

    def __init__(self, seed, index):
        self.seed, self.index = seed, index

    def u(self, purpose, *shape):
        signed = lambda c: (c + 2 ** 63) % 2 ** 64 - 2 ** 63
        golden, a, b = (signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

        def mix(z):                                              # int64 >> keeps the sign: mask it off
            z = (z ^ (z >> 30 & (1 << 34) - 1)) * a
            z = (z ^ (z >> 27 & (1 << 37) - 1)) * b
            return z ^ (z >> 31 & (1 << 33) - 1)

        stream = signed((self.seed << 32 | zlib.crc32(purpose.encode())) % 2 ** 64)
        h = mix(mix(self.index * golden) ^ mix(torch.tensor(stream, device=self.index.device)))
        e = torch.arange(1, math.prod(shape) + 1, device=h.device) * golden
        z = mix(h[:, None] + e).view(-1, *shape)
        return ((z >> 41 & (1 << 23) - 1).float() + .5) / 2 ** 23     # 24 bits with the half: exact, never 0 or 1

    def n(self, purpose, *shape):
        return torch.erfinv(2 * self.u(purpose, *shape) - 1) * 2 ** .5


def patient_of(index):
    """Patient number of synthetic record(s): blocks of 16 records hold 10 patients with 7 x 1, 2, 3 and 4 records."""
    slot = [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 8, 8, 9, 9, 9, 9]
    return index // 16 * 10 + torch.as_tensor(slot, device=index.device)[index % 16]


def synthesize(seed, index, seconds=10., fs=240, shifts=(), prevalence=1., noise=True, device='cpu'):
    """Synthetic ECGs: record i depends on (seed, i, shifts) alone, whatever else is asked for with it.

    index: record numbers (B,). Returns a dict of x (B, T, 12) int16 microvolts in the order of LEADS, patient (B,),
    findings (B, 24), tail (B, 216), targets (B, 6) with NaN where a target is undefined, female (B,), beats (B, n) seconds.
    Einthoven's and Goldberger's relations hold exactly, in integers. shifts: names from SHIFTS, which make another cohort.
    """
    s = _HOME | {k: v for name in shifts for k, v in SHIFTS[name].items()}
    index = torch.as_tensor(index, device=device)
    patient = patient_of(index)
    key = seed * 1000003 + zlib.crc32(','.join(sorted(shifts)).encode())
    p, r = Draws(2 * key, patient), Draws(2 * key + 1, index)
    y = _findings(p, r, s, prevalence)
    beats, kind = _rhythm(p, r, y, math.ceil(4.4 * seconds) + 2)
    x, axis = _leads(p, r, y, s, beats, kind, round(seconds * fs), fs)
    if noise:
        x = _add_noise(r, x, s, fs)
    if s['highpass']:
        spectrum, f = torch.fft.rfft(x, dim=1), torch.fft.rfftfreq(x.shape[1], 1 / fs, device=x.device)
        spectrum *= torch.where(r.u('highpass', 1, 1) < .5, (f >= s['highpass']).float()[:, None], 1.)
        x = torch.fft.irfft(spectrum, n=x.shape[1], dim=1)
    counts = torch.round(x * (1000 / s['lsb'])).int()
    limb = torch.round(x[..., :2] * (500 / s['lsb'])).int() * 2  # I and II in even steps, so that their halves are whole too
    swapped = r.u('swap', 1) < s['swap']                         # arms swapped: I changes sign, II and III change places
    I, II = limb[..., 0], limb[..., 1]
    I, II = torch.where(swapped, -I, I), torch.where(swapped, II - I, II)
    limb = torch.stack([I, II, II - I, -(I + II) // 2, I - II // 2, II - I // 2], -1)
    x = (torch.cat([limb, counts[..., 2:]], -1) * s['lsb']).clamp(-32766, 32766).short()
    inside = (beats >= 0) & (beats < seconds)
    first, last = beats.masked_fill(~inside, 1e9).amin(1), beats.masked_fill(~inside, -1e9).amax(1)
    hr = 60 * (inside.sum(1) - 1) / (last - first)               # of the beats in the record
    hr = torch.where(inside.sum(1) > 1, hr, torch.nan)
    nan = lambda v, *where: torch.where(sum(y[w] for w in where) > 0, torch.nan, v)
    targets = torch.stack([hr, nan(y['pr'], 'AF', 'AFL', 'PACE'), y['d'], y['qt'], axis, y['age']], 1)
    return dict(x=x, patient=patient, findings=torch.stack([y[k] for k in FINDINGS], 1), tail=y['tail'].flatten(1),
                targets=targets, female=y['female'], beats=beats)


def _findings(p, r, s, prevalence):
    """Latent traits and the findings that they cause: dict of (B,) floats, findings 0 or 1, severities under 'g/NAME'."""
    y = {'age': (54 + s['age'] + 18 * p.n('age')).clamp(18, 95), 'female': (p.u('sex') < s['female']).float()}
    ag, sex = (y['age'] - 54) / 10, 2 * y['female'] - 1
    least = {'LAFB': .35, 'LVH': .25, 'IMI': .2, 'AMI': .2, 'LMI': .2, 'RBBB': 0, 'IRBBB': 0, 'LBBB': 0, 'PACE': 0}
    for name, (p0, slope) in (_CHRONIC | _ACUTE).items():
        who, low, scale = p if name in _CHRONIC else r, least.get(name, .3), prevalence     # what is chronic is drawn once a patient
        if s['prevalence']:
            scale *= 1.5 if name in ('AF', 'LBBB', 'PACE') else .6
        p0 *= scale
        risk = math.log(p0 / (1 - p0)) + slope * ag - .24 * slope ** 2
        y[name] = (who.u('has ' + name) < torch.sigmoid(risk)).float()
        y['g/' + name] = (low + (1 - low) * who.u('severity ' + name) + .1 * r.n('g ' + name)).clamp(low, 1)

    def bar(*names, by):                                         # a finding in `by` rules out those in names
        for n in names:
            y[n] = y[n] * (sum(y[b] for b in by) == 0)

    for group in (['AF', 'AFL', 'PACE'], ['PACE', 'LBBB', 'RBBB', 'IRBBB', 'WPW'], ['IMI', 'AMI', 'LMI'], ['STD', 'STE'], ['PVC', 'PAC']):
        for i, name in enumerate(group[1:], 1):
            bar(name, by=group[:i])
    bar('IMI', 'AMI', 'LMI', 'LVH', 'RVH', 'LAFB', 'STD', 'STE', 'TINV', by=['LBBB', 'PACE'])
    bar('LVH', by=['RVH', 'LVOLT'])
    bar('1dAVb', by=['AF', 'AFL', 'PACE', 'WPW'])
    bar('WPW', 'PAC', by=['AF', 'AFL', 'PACE'])
    y.update(ag=ag, sex=sex, sinus=(y['AF'] + y['AFL'] + y['PACE'] == 0).float())
    _intervals(p, r, y)
    # the long tail: 8 territories x 9 morphologies x 3 severities; of several severities the highest counts
    rank = torch.as_tensor(np.random.default_rng(0).permutation(216).reshape(8, 9, 3), device=ag.device)
    p0 = .04 * prevalence / (1 + rank / 4) ** 1.1
    tail = (p.u('tail', 8, 9, 3) < p0).float() * (1 - (y['LBBB'] + y['PACE'] + y['LVOLT']).clamp(max=1))[:, None, None, None]
    tail[..., 1] *= 1 - tail[..., 2]
    tail[..., 0] *= (1 - tail[..., 2]) * (1 - tail[..., 1])
    low, wide = tail.new_tensor([.35, .55, .8]), tail.new_tensor([.2, .25, .3])
    y['tail'], y['tail severity'] = tail, (tail * (low + wide * p.u('tail severity', 8, 9, 3))).sum(-1)   # (B, 8, 9)
    return y


def _intervals(p, r, y):
    """Add heart rate (per minute), PR, P and QRS durations and QT (ms) to y, and the findings that are thresholds of them:
    SB, ST, SARR, 1dAVb, LQT."""
    ag, sex, sinus = y['ag'], y['sex'], y['sinus']
    u = lambda purpose, who=r: who.u(purpose)
    pick = lambda name, new, old: torch.where(y[name] > 0, new, old)
    hr = 71.2 + 1.25 * sex - .3 * ag + 9.5 * r.n('hr') + 4 * p.n('hr')
    tachy = 104 + 36 * u('ta') ** 1.5 - 6 * u('tb')
    brady = 57 - 16 * u('ba') ** 1.3 + 4 * u('bb')
    hr = torch.where(u('rate') < .05, tachy, torch.where(u('rate') < .10, brady, hr)).clamp(32, 180)
    hr = pick('AF', 60 + 70 * u('af rate'), hr)
    flutter, ratio = 4.4 + 1.2 * u('flutter'), (2 + 3 * u('ratio')).floor()
    hr = pick('AFL', 60 * flutter / ratio, hr)
    pr = (158 + 4.5 * ag + 14 * p.n('pr') + 4 * r.n('pr') - .25 * (hr - 70)).clamp(100, 320)
    pr = pick('1dAVb', 206 + 80 * u('pr a', p) ** 1.3 - 4 * u('pr b', p), pick('WPW', 95 + 20 * u('pr wpw', p), pr))
    y['1dAVb'] = ((pr > 200) & (sinus > 0) & (y['WPW'] == 0)).float()
    d = (88 - 2.4 * sex + 7 * p.n('qrs')).clamp(66, 118)
    for name, low, high in (('RBBB', 122, 152), ('IRBBB', 100, 116), ('LBBB', 124, 160), ('PACE', 130, 170), ('WPW', 105, 130)):
        d = pick(name, low + (high - low) * p.u('qrs ' + name), d)
    qtc = 402 + 5 * sex + 1.5 * ag + 15 * p.n('qtc') + 8 * r.n('qtc') + .8 * (d - 88).clamp(min=0)
    qtc = pick('LQT', 470 + 50 * u('lqt a') ** 1.2 - 6 * u('lqt b'), qtc)
    y['LQT'] = ((qtc > 465 + 5 * sex) & (y['PACE'] == 0)).float()
    rsa = .018 * torch.exp(-.30 * ag + .55 * p.n('rsa'))
    y['SARR'], y['SB'], y['ST'] = (rsa > .06) * sinus, (hr < 55) * sinus, (hr > 100) * sinus
    dp = (102 + 4 * ag + 8 * p.n('dp')).clamp(70, 140)
    y.update(hr=hr, pr=pr, dp=dp, d=d, qt=qtc - 154 * (1 - 60 / hr), rsa=rsa.clamp(max=.25), flutter=flutter)


def _rhythm(p, r, y, n):
    """Beat times (B, n) in seconds, from just before 0, and their kind: 0 normal, 1 PVC or PAC. Adds the breathing to y."""
    col = lambda v: v[:, None]
    k = torch.arange(n, device=y['hr'].device)
    rr = 60 / col(y['hr'])
    t = k * rr
    y['breath'], y['breath phase'] = .20 + .12 * p.u('breath'), 2 * math.pi * r.u('breath phase')
    sway = torch.sin(2 * math.pi * col(y['breath']) * t + col(y['breath phase']))
    slow = torch.sin(2 * math.pi * .095 * t + 2 * math.pi * r.u('slow', 1))
    sinus = rr * (1 + col(y['rsa']) * (sway + .6 * slow) + .006 * r.n('rr', n))
    fibrillation = rr * torch.exp((.12 + .14 * r.u('af cv', 1)) * r.n('af rr', n))
    varied = (2 + 3 * r.u('block', n)).floor() / col(y['flutter'])
    flutter = torch.where(r.u('varies', 1) < .35, varied, rr.expand(-1, n))
    steady = torch.where(col(y['PACE']) > 0, rr.expand(-1, n), sinus)
    rr = torch.where(col(y['AF']) > 0, fibrillation, torch.where(col(y['AFL']) > 0, flutter, steady))
    ectopic = r.u('ectopic', n) < .05 + .17 * r.u('ectopic rate', 1) ** 2
    ectopic |= k == 2 + (r.u('one', 1) * (col(y['hr']) / 6 - 4).clamp(min=1)).floor()      # at least one within 10 s
    ectopic &= col(y['PVC'] + y['PAC']) > 0
    ectopic[:, 0] = False
    ectopic[:, 1:] &= ~ectopic[:, :-1]                           # never two in a row
    early = .58 + .20 * r.u('early', n)
    after = torch.where(col(y['PVC']) > 0, 2 - early, 1.08)
    rr = rr * torch.where(ectopic, early, 1.)
    rr[:, 1:] = rr[:, 1:] * torch.where(ectopic[:, :-1], after[:, :-1], 1.)
    rr = rr.clamp(min=.24)
    return rr.cumsum(1) - rr[:, :1] * (1 + r.u('phase', 1)), ectopic


def _kernels(p, r, y, s):
    """Dipoles A (B, 14, 3) in mV, centres and widths (B, 14) in s, relative to the middle of the QRS."""
    d, pr, dp, qt, v = y['d'], y['pr'], y['dp'], y['qt'], 2 * p.u('notch') - 1
    on, const = -d / 2 - pr, torch.ones_like(d)
    t2 = qt - d / 2 - .176 * qt                                  # the T wave ends 2 sigma after its centre
    wpw = y['WPW'] > 0
    centre = torch.stack([on + .33 * dp, on + .67 * dp, -.22 * d, -.065 * d, .065 * d, .22 * d, torch.where(wpw, -.33 * d, .30 * d),
                          .5 * d + 48, t2 - .145 * qt, t2, t2 + 150, -.5 * d - 4, .2 * d * v, .3 * d * v], 1)
    width = torch.stack([.165 * dp, .165 * dp, .085 * d, .083 * d, .083 * d, .085 * d, torch.where(wpw, .10 * d, .105 * d), 40 * const,
                         .128 * qt, .088 * qt, 35 * const, 1.6 * const, 4 * const, 3.5 * const], 1)
    A = torch.tensor(_MU, device=d.device).float() + torch.tensor(_SD, device=d.device).float() * (
        .62 * p.n('dipole', 14, 3) + .18 * r.n('dipole', 14, 3))
    col = lambda w: w[:, None, None]
    ag, sex = y['ag'], y['sex']
    A[:, _P] *= col(torch.exp(.20 * p.n('P size')) * (1 - y['AF']) * (1 - y['AFL']) * (1 - y['PACE']))
    A[:, _QRS] *= col(torch.exp(.20 * p.n('QRS size') - .07 * ag - .05 * sex))
    A[:, _T] *= col(torch.exp(.18 * p.n('T size') + .08 * r.n('T size')) * (1 - .05 * ag - .12 * sex).clamp(min=.4) * s['twave'])
    A[:, J, 2] += .025 * sex
    A[:, J] += (-.35 * (y['hr'] - 75).clamp(min=0) / 50)[:, None] * A.new_tensor([.06, .06, -.03])
    _disease(p, y, A)
    A *= col(torch.where(y['LVOLT'] > 0, .3 + .3 * p.u('low voltage'), 1.))
    turn = math.pi / 180 * (A.new_tensor([11., 11, 14]) * p.n('rotation', 3) + 3 * r.n('rotation', 3))
    turn[:, 2] += math.pi / 180 * (4 * sex - 7 * ag)
    spin = torch.zeros(len(d), 3, 3, device=d.device)            # exp of a skew matrix is a rotation
    for i, j, axis, sign in ((1, 2, 0, -1), (0, 2, 1, 1), (0, 1, 2, -1)):
        spin[:, i, j], spin[:, j, i] = sign * turn[:, axis], -sign * turn[:, axis]
    return A @ torch.matrix_exp(spin).transpose(1, 2), centre / 1000, width / 1000


def _disease(p, y, A):
    """What the findings and the long tail make of the dipoles A (B, 14, 3), in place."""
    given = lambda name: y[name] * y['g/' + name]                # (B,) its severity, 0 where it is not found
    axis = lambda purpose: torch.nn.functional.normalize(p.n(purpose, 3))                    # (B, 3), each patient's own, of length 1

    def add(k, weight, direction):                               # (B,) times (3,)
        A[:, k] += weight[:, None] * A.new_tensor(direction)

    late = y['RBBB'] * (.35 + .65 * y['g/RBBB']) + y['IRBBB'] * (.1 + .3 * y['g/IRBBB'])
    A[:, S] *= (1 - .6 * late)[:, None]
    for k, direction in ((X, [-.55, 0, -.75]), (T1, [.05, 0, .12]), (T2, [.10, 0, .25])):
        add(k, late, direction)
    for name, up in (('LBBB', 1.), ('PACE', -2.5)):              # a paced beat spreads like LBBB, from below upwards
        mix = (y[name] * (.5 + .5 * y['g/' + name]))[:, None]
        for k, target in _LBBB.items():
            A[:, k] += mix * (A.new_tensor(target) * A.new_tensor([1, up, 1]) - A[:, k])
    A[:, SP] += (y['PACE'] * (.5 + 1.5 * p.u('spike')))[:, None] * axis('spike axis')
    A[:, X] += (given('WPW') * .5)[:, None] * axis('delta axis')
    for k, direction in ((R1, [.1, -.25, 0]), (R2, [.15, -.95, 0]), (S, [.2, -.6, .1])):
        add(k, given('LAFB'), direction)
    A[:, R1:S + 1] *= (1 + .75 * given('LVH'))[:, None, None]
    for k, direction in ((R2, [.2, 0, .35]), (J, [-.07, -.03, .05]), (T2, [-.26, -.1, .1])):
        add(k, given('LVH'), direction)
    for k, direction in ((R2, [-.7, .3, -.9]), (S, [-.5, .1, -.4]), (T2, [.1, -.1, .2])):
        add(k, given('RVH'), direction)
    for name, direction in (('IMI', [0, 1, 0]), ('AMI', [.15, 0, -1]), ('LMI', [1, -.2, 0])):
        add(Q, given(name) * -.38, direction)
        add(R1, given(name) * -.45, direction)
        add(T2, given(name) * -.2 * (p.u('T ' + name) < .6), direction)
    for name, direction, st, t in (('STD', [1, .35, -.35], -.14, -.12), ('STE', [-.15, 1, 0], .22, .16)):
        add(J, given(name) * st, direction)
        add(T1, given(name) * t, direction)
    add(T2, given('TINV') * .34, [-.35, -.05, 1])
    territory, severity = A.new_tensor(_TERRITORY), y['tail severity']                       # (8, 3), (B, 8, 9)
    A += torch.einsum('btm,mk,tc->bkc', severity, A.new_tensor(_TAIL_GAIN), territory)
    for morphology, waves in (('Tflat', [T1, T2]), ('Rloss', [R1, R2])):                     # shrink what lies along the territory
        share = (1.2 * severity[:, :, list(_TAIL).index(morphology)]).clamp(max=1)           # (B, 8)
        for k in waves:
            A[:, k] -= (share * (A[:, k] @ territory.T)) @ territory


def _ectopic(r, y, odd, A, centre, width, M, field, local):
    """Centres, widths (O, 14) and matrices (O, 14, 8) of the ectopic beats of the O records in the mask `odd`."""
    A, centre, width, M, field, local = (v[odd] for v in (A, centre, width, M, field, local))
    pvc = y['PVC'][odd, None] > 0
    e = torch.nn.functional.normalize(r.n('PVC axis', 3)[odd]) * (1.1 + .5 * r.n('PVC size', 1)[odd].abs())
    wide = .150 + .025 * r.u('PVC width', 1)[odd]
    stretch = 1000 * wide / y['d'][odd, None]
    late = torch.cat([centre[:, :Q], centre[:, Q:J] * stretch, centre[:, J:] + wide / 3], 1)
    broad = torch.cat([width[:, :Q], width[:, Q:J] * stretch, width[:, J:]], 1)
    own = M.new_tensor(_PVC)[:, None] * e[:, None]               # (O, 14, 3): all along one direction, no P wave
    own = own @ field.transpose(1, 2) + local * own.norm(dim=2, keepdim=True)
    shifted = M.clone()                                          # a PAC differs in its P wave alone, which starts elsewhere
    shifted[:, _P] = (A[:, _P] * A.new_tensor([.4, -.8, 1.2])) @ field.transpose(1, 2)
    return torch.where(pvc, late, centre), torch.where(pvc, broad, width), torch.where(pvc[..., None], own, shifted)


def _field(p, r, s):
    """What leads I, II, V1-V6 see of a dipole (B, 8, 3): each patient's own, with chest electrodes slid along the row V1 ... V6."""
    own = p.n('field', 8, 3)
    field = own.new_tensor(_FIELD) + s['field'] * own.new_tensor(_FIELD_SD)[:, None] * own
    moved = torch.arange(6, device=own.device) + s['electrode'] * p.n('electrode', 6) + .12 * r.n('electrode', 6)
    low = moved.floor().clamp(0, 4).long()
    at = lambda i: field[:, 2:].gather(1, i[..., None].expand(-1, -1, 3))
    return torch.cat([field[:, :2], at(low) + (moved - low).clamp(-.5, 1.5)[..., None] * (at(low + 1) - at(low))], 1)


def _leads(p, r, y, s, beats, kind, T, fs):
    """Noise-free leads I, II, V1-V6 (B, T, 8) in mV and the frontal axis (B,) in degrees."""
    A, centre, width = _kernels(p, r, y, s)
    B, device, field = len(A), A.device, _field(p, r, s)
    gain = s['gain'] * torch.exp(s['gain_sd'] * p.n('gain', 1, 1))
    local = .16 * p.n('local', 14, 8) * A.new_tensor([.3, .3, 1, 1, 1, 1, 1, 1])             # what no dipole explains
    size, mean_size = A.norm(dim=2, keepdim=True), A.new_tensor(np.linalg.norm(_MU, axis=1))

    def seen(A, size):                                           # one beat's matrix (B, 14, 8)
        M = A @ field.transpose(1, 2) + local * size
        for k, residual in _RESIDUAL.items():
            M[:, k] += (size[:, k] / mean_size[k]).clamp(max=2) * A.new_tensor(residual)
        return gain * M

    M = seen(A, size)
    t = torch.arange(T, device=device) / fs
    before = (torch.searchsorted(beats, t.expand(B, -1).contiguous(), right=True) - 1).clamp(0, beats.shape[1] - 2)
    x = torch.zeros(B, T, 8, device=device)
    odd = kind.any(1)                                            # records with a PVC or PAC need a second kind of beat
    if odd.any():
        c1, w1, M1 = _ectopic(r, y, odd, A, centre, width, M, gain * field, gain * local)
    whole, t_wave = slice(0, 14), slice(J, SP)                   # a sample is reached by the beats on either side of it and,
    for back, ks in ((1, t_wave), (0, whole), (-1, whole)):      # at short intervals, by the T wave of the one before
        j = before - back
        dt, ectopic = (t - beats.gather(1, j.clamp(min=0))).masked_fill(j < 0, 1e3), kind.gather(1, j.clamp(min=0))
        G = torch.exp(-.5 * ((dt[..., None] - centre[:, None, ks]) / width[:, None, ks]) ** 2)            # (B, T, 14)
        if odd.any():
            G[odd] *= ~ectopic[odd][..., None]
            G1 = torch.exp(-.5 * ((dt[odd][..., None] - c1[:, None, ks]) / w1[:, None, ks]) ** 2) * ectopic[odd][..., None]
            x[odd] += G1 @ M1[:, ks]
        x += G @ M[:, ks]                                        # (B, T, 8)
    breath = torch.sin(2 * math.pi * y['breath'][:, None] * t + y['breath phase'][:, None])
    x *= 1 + .025 * breath[..., None]
    drift = .3 * torch.sin(2 * math.pi * .31 * t + 6.28 * r.u('f drift', 1))                 # fibrillation: waves whose rate drifts
    phase = 2 * math.pi * ((4.5 + 3.5 * r.u('f wave', 1)) * t + drift + r.u('f phase', 1))
    f = (torch.sin(phase) + .4 * torch.sin(2 * phase + 1)) * ((.012 + .045 * r.u('f size', 1)) * y['AF'][:, None])
    x += f[..., None] * A.new_tensor([.3, .6, 1, .6, .35, .25, .2, .2])
    phase = 2 * math.pi * (y['flutter'][:, None] * t + r.u('F phase', 1))                   # flutter: a sawtooth
    saw = (torch.sin(phase) + .45 * torch.sin(2 * phase) + .2 * torch.sin(3 * phase)) * ((.05 + .08 * r.u('F size', 1)) * y['AFL'][:, None])
    x += saw[..., None] * A.new_tensor([.25, 1, -.6, -.3, .2, .25, .25, .25])
    area = (M[:, Q:J, :2] * width[:, Q:J, None]).sum(1)          # of the QRS in I and II
    axis = torch.rad2deg(torch.atan2((area[:, 1] - area[:, 0] / 2) * 2 / 3 ** .5, area[:, 0]))
    return x, axis


def _add_noise(r, x, s, fs):
    """Noise at the nine electrodes (mV RMS): baseline wander, pink, muscle, mains, now and then a bump."""
    B, T = x.shape[:2]
    f = torch.fft.rfftfreq(T, 1 / fs, device=x.device)
    shape = torch.stack([torch.exp(-(f / .28) ** 2) * (f > 0), (f.clamp(min=.3)) ** -.9 / (1 + (f / 15) ** 2) * (f > .3),
                         f / (f + 12) / (1 + (f / 70) ** 2)])    # power spectra
    limb = x.new_tensor([.55] * 3 + [.50] * 6)                   # most of the chest's wander is common to V1-V6
    rms = torch.stack([.034 * s['baseline'] * torch.exp(.75 * r.n('baseline', 1) + .45 * r.n('electrode baseline', 9)) * limb,
                       (.009 * torch.exp(.4 * r.n('pink', 1))).expand(-1, 9),
                       (.0045 * s['muscle'] * torch.exp(.65 * r.n('muscle', 1))).expand(-1, 9)], -1)   # (B, 9, 3)
    power = rms ** 2 @ (shape / shape.sum(1, keepdim=True))      # (B, 9, F): independent noises add in power
    angle = 2 * math.pi * r.u('noise', 9, len(f))
    e = torch.fft.irfft(torch.polar((2 * power).sqrt() * T / 2, angle), n=T)                 # (B, 9, T)
    slow = .05 * s['baseline'] * torch.exp(.75 * r.n('baseline', 1)) * (2 * shape[0] / shape[0].sum()).sqrt() * T / 2
    e[:, 3:] += torch.fft.irfft(torch.polar(slow, 2 * math.pi * r.u('common baseline', len(f))), n=T)[:, None]
    t = torch.arange(T, device=x.device) / fs
    hz = torch.where(r.u('mains hz', 1, 1) < (0. if s['mains'] else .5), 50., 60.)
    size = (s['mains'] or .0007) * torch.exp((.3 if s['mains'] else 1) * r.n('mains', 1, 1)) * 2 ** .5
    e += size * torch.exp(.3 * r.n('mains electrode', 9, 1)) * torch.sin(2 * math.pi * (hz * t + r.u('mains phase', 9, 1)))
    where = (torch.arange(9, device=x.device) == (9 * r.u('bump at', 1)).floor()) & (r.u('bump', 1) < .1)
    size = (.15 + .5 * r.u('bump size', 1, 1)) * torch.sign(r.u('bump sign', 1, 1) - .5)
    e += where[..., None] * size * torch.exp(-.5 * ((t - T / fs * r.u('bump time', 1, 1)) / (.1 + .3 * r.u('bump width', 1, 1))) ** 2)
    ra, la, ll = e[:, 0], e[:, 1], e[:, 2]
    return x + torch.cat([torch.stack([la - ra, ll - ra], 1), e[:, 3:] - e[:, :3].mean(1, keepdim=True)], 1).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# pictures, calibration

def figure(*args, **kwargs):
    """A matplotlib figure that needs no screen: (fig, axes) of plt.subplots."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(*args, **kwargs)
    plt.close(fig)                                               # it can still be drawn on and saved, and goes when the caller lets go
    return fig, axes


def show(name, row):
    """The classic paper picture of one record, 25 mm/s and 10 mm/mV: 2.5 s of each lead, 10 s of lead II below. Returns its path."""
    ds = Dataset(name)
    if not 0 <= row < len(ds):
        raise Stop(f'{name} has records 0 to {len(ds) - 1}')
    fs = ds.contract.fs
    T = min(int(ds.length[row]), round(10 * fs))
    x = ds.crop(np.array([row]), np.array([0]), T)[0].numpy()    # (12, T)
    fig, ax = figure(figsize=(11, 4.9), layout='constrained')
    for k in range(51):
        ax.axvline(k * .2, color='#f3b5b5' if k % 5 else '#e58a8a', lw=.5, zorder=0)
    for k in np.arange(-7.5, 2.01, .5):
        ax.axhline(k, color='#f3b5b5', lw=.5, zorder=0)
    for i, lead in enumerate(LEADS):                             # four columns of three
        start, end, height = i // 3 * T // 4, (i // 3 + 1) * T // 4, -2 * (i % 3)
        ax.plot(np.arange(start, end) / fs, np.clip(x[i, start:end], -1.8, 1.9) + height, 'k', lw=.7)
        ax.text(start / fs + .05, height + .85, lead, weight='bold')
    ax.plot(np.arange(T) / fs, np.clip(x[1], -1.4, 1.9) - 6, 'k', lw=.7)
    ax.text(.05, -5.15, 'II', weight='bold')
    peaks = ds.peaks[ds.peak_start[row]:ds.peak_start[row + 1]]
    ax.plot(peaks[peaks < T] / fs, np.full((peaks < T).sum(), -7.3), 'k|', ms=5)
    labels = [n for n, v in zip(ds.label_names, ds.labels[row]) if v == 1 and not n.startswith('target/')]
    said = ', '.join(labels) or 'no positive label'
    age = '' if np.isnan(ds.age[row]) else f'{ds.age[row]:.0f} y'
    ax.set(xlim=(0, T / fs), ylim=(-7.5, 2), xticks=[], yticks=[], aspect=.4)
    ax.set_title(f'{ds.id[row]}   {age}\n{said}', size=9, loc='left')
    path = Path(f'out/{name}_{row}.png')
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    print(f'{path}: record {row} of {name}, {said}')
    return path


def check_peaks(root, extension='ii'):
    """R-peaks found against annotated ones (symbol N in WFDB annotation files, as LUDB has): prints counts, draws errors in time and the
    worst record. Between a record's first and last annotation only; a match is within .1 s. Returns (annotated, matched, extra)."""
    import wfdb
    files = sorted(Path(root).rglob(f'*.{extension}'))
    if not files:
        raise Stop(f'no annotation files *.{extension} under {root}: name their extension with --annotation')
    rows = []
    for file in tqdm(files, desc='R-peaks', disable=None):
        record, mark = Record(file.stem), wfdb.rdann(str(file.with_suffix('')), extension)
        try:
            load_wfdb(record, file.with_suffix(''))
            _, _, x = conform(record.x, record.fs, record.leads, record.unit, Contract())
        except (Defect, FileNotFoundError) as e:
            print(f'{file.stem} is left out: {e}')
            continue
        truth = mark.sample[np.array(mark.symbol) == 'N'] / record.fs
        if not len(truth):
            continue
        found = find_peaks(x, record.fs)
        found = found[(found > truth[0] - .15) & (found < truth[-1] + .15)]
        error = found[np.abs(found[:, None] - truth).argmin(0)] - truth if len(found) else np.full(len(truth), np.inf)
        near = error[np.abs(error) <= .1]
        rows.append(dict(name=file.stem, x=x, fs=record.fs, truth=truth, found=found, error=near,
                         missed=len(truth) - len(near), extra=len(found) - len(near)))
    if not rows:
        raise Stop(f'no usable record under {root} has beats annotated as N in *.{extension}')
    annotated, extra = sum(len(r['truth']) for r in rows), sum(r['extra'] for r in rows)
    matched = annotated - sum(r['missed'] for r in rows)
    error = 1e3 * np.concatenate([r['error'] for r in rows])
    worst = max(rows, key=lambda r: (r['missed'] + r['extra'], np.abs(r['error']).max(initial=0)))
    x = worst['x'][:, LEADS.index('II')]
    fig, axes = figure(1, 2, figsize=(12, 3.2), layout='constrained', width_ratios=(1, 2.4))
    axes[0].hist(error, 40, color='C0')
    axes[0].set(xlabel='found - annotated, ms', ylabel='beats', title=f'{matched:,} of {annotated:,} beats, {extra} extra')
    axes[1].plot(np.arange(len(x)) / worst['fs'], x, 'k', lw=.7)
    for times, color, height in ((worst['truth'], 'C2', 1.15), (worst['found'], 'C3', 1.3)):
        axes[1].plot(times, np.full(len(times), height * x.max()), '|', color=color, ms=10, mew=2)
    axes[1].set(xlabel='s', ylabel='lead II, mV', title=f'the worst record, {worst["name"]}; beats found: red, annotated: green')
    path = Path('out/peaks.png')
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    print(f'{path}: {len(rows)} records, {annotated:,} annotated beats, {matched:,} found within 100 ms (median error '
          f'{np.median(error):+.1f} ms, 95 % within {np.percentile(np.abs(error), 95):.0f} ms), {extra} extra')
    return annotated, matched, extra


def measure(x, peaks, fs):
    """What calibration compares, of one record x (T, 12) in mV with R-peaks in samples: dict of numbers."""
    m, independent = {}, [0, 1, 6, 7, 8, 9, 10, 11]              # the other four leads follow from I and II
    eight, names = x[:, independent], [LEADS[i] for i in independent]
    per_lead = lambda what, values, leads=names: m.update({f'{what} {n} (mV)': v for n, v in zip(leads, values)})
    per_lead('SD', x.std(0), LEADS)
    per_lead('1 %', np.percentile(eight, 1, axis=0))
    per_lead('99 %', np.percentile(eight, 99, axis=0))
    at = lambda a, b: slice(round((.25 + a) * fs), round((.25 + b) * fs))
    beats = [eight[p - round(.25 * fs):p + round(.45 * fs)] for p in peaks if .25 * fs < p < len(x) - .45 * fs]
    beat = np.median(beats, axis=0) if beats else np.full((round(.7 * fs), 8), np.nan)
    beat = beat - np.median(beat[at(-.08, -.055)], axis=0)       # the PR segment is zero
    t = beat[at(.15, .44)]
    per_lead('QRS peak to peak', np.ptp(beat[at(-.07, .07)], axis=0))
    per_lead('T peak', np.take_along_axis(t, np.abs(t).argmax(0)[None], 0)[0])
    per_lead('P peak', beat[at(-.25, -.09)].max(0))
    m['mean abs correlation'] = np.abs(np.corrcoef(eight.T))[np.triu_indices(8, 1)].mean()
    band = scipy.signal.sosfiltfilt(scipy.signal.butter(2, (.5, 40), 'bandpass', fs=fs, output='sos'), eight, axis=0)
    for what, signal in (('raw', eight), ('.5-40 Hz', band)):
        share = np.linalg.eigvalsh(np.cov(signal.T))[::-1].clip(1e-12)
        share = share / share.sum()
        if what == 'raw':
            m['effective rank'] = np.exp(-(share * np.log(share)).sum())
        m.update({f'energy of {k} components, {what}': share[:k].sum() for k in (3, 4, 5)})
    rr = np.diff(peaks) / fs
    m['HR (/min)'] = 60 / rr.mean() if len(rr) else np.nan
    m['ln RMSSD (ms)'] = np.log(1000 * np.sqrt(np.mean(np.diff(rr) ** 2)) + 1) if len(rr) > 1 else np.nan
    power, f = np.abs(np.fft.rfft(eight - eight.mean(0), axis=0)) ** 2, np.fft.rfftfreq(len(x), 1 / fs)
    total = power.sum(1)
    for a, b in ((0, .5), (.5, 5), (5, 15), (15, 40)):
        m[f'power {a}-{b} Hz'] = total[(f >= a) & (f < b)].sum() / total.sum()
    inside = (f >= 15) & (f < 40)
    m['PSD slope 15-40 Hz'] = np.polyfit(np.log(f[inside]), np.log(total[inside] + 1e-12), 1)[0]
    slow = 1000 * np.sqrt(2 * power[f < .5].sum(0)) / len(x)
    m['below .5 Hz, I (uV)'], m['below .5 Hz, V1-V6 (uV)'] = slow[0], slow[2:].mean()
    return {k: float(v) for k, v in m.items()}


def calibrate(real='sample', made='synthetic', records=512, path='out/calibration.png'):
    """Between-record mean and SD of every measure, real against synthetic; accepted where the means differ by at most .4 of the
    real SD. Prints the table, draws it, returns {measure: (real mean, real SD, synthetic mean, difference in SD)}."""
    sets = []
    if differs := Dataset(made).contract.differs(Dataset(real).contract):
        raise Stop(f'datasets/{made} has another contract than datasets/{real} ({differs}): prepare them alike')
    for name in (real, made):
        ds = Dataset(name)
        rows = [measure(ds.crop(np.array([i]), np.array([0]), int(ds.length[i]))[0].T.numpy(),
                        ds.peaks[ds.peak_start[i]:ds.peak_start[i + 1]], ds.contract.fs)
                for i in tqdm(range(min(len(ds), records)), desc=f'measuring {name}', disable=None)]
        sets.append({k: np.array([r[k] for r in rows]) for k in rows[0]})
    table = {}
    print(f'{"measure":34s} {real:>17s} {made:>17s}  difference')
    for k in sets[0]:
        (a, sd), (b, sd_b) = ((np.nanmean(s[k]), np.nanstd(s[k])) for s in sets)
        d = (b - a) / sd
        table[k] = (a, sd, b, d)
        print(f'{k:34s} {a:8.3f} +- {sd:5.3f} {b:8.3f} +- {sd_b:5.3f}  {d:+5.2f} SD' + ('' if abs(d) <= .4 else '  <- beyond .4'))
    fig, ax = figure(figsize=(7, 12), layout='constrained')
    for k, (*_, d) in enumerate(table.values()):
        ax.plot(d, -k, 'o', color='C0' if abs(d) <= .4 else 'C3', ms=4)
    ax.axvspan(-.4, .4, color='C0', alpha=.12)
    ax.set(yticks=-np.arange(len(table)), xlim=(-1.2, 1.2), xlabel='difference of means, in SD of the real records')
    ax.set_yticklabels(list(table), size=6)
    ax.set_title(f'{made} against {real}: accepted within .4 SD', size=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    within = sum(abs(d) <= .4 for *_, d in table.values())
    print(f'{path}: {within} of {len(table)} measures within .4 SD')
    return table


# ---------------------------------------------------------------------------------------------------------------------
# the tasks of the two papers

@dataclass(frozen=True)
class Target:
    """One task of a paper. `trained` and `scored` are what Dataset.columns takes; where their namespaces differ (all, diag) columns
    correspond by the name after the slash."""
    category: str
    data: str                                                    # default name of the prepared dataset
    trained: str                                                 # label sets that one model is trained on, joined by +
    scored: str                                                  # those that it is scored on
    least: int                                                   # positives that a label needs in the whole dataset to count
    metric: str                                                  # AUROC, or MAE of standardised numbers
    classes: int                                                 # outputs in the paper's code, None if unknown
    folds: tuple = None                                          # of train, val, test; None: highest tests, second validates, the rest trains
    prepare: str = ''                                            # command, ROOT standing for the folder of the source


# --window 10 keeps records of 5,000 samples at 500 Hz or more; challenge and ptbxl can add --download, the others' files come from
# figshare or PhysioNet
PREPARE = {
    'ningbo': 'challenge --root ROOT --cohort ningbo --out ningbo',
    'cpsc2018': 'challenge --root ROOT --cohort cpsc_2018 --window 10 --out cpsc2018',
    'cpsc_extra': 'challenge --root ROOT --cohort cpsc_2018_extra --window 10 --out cpsc_extra',
    'georgia': 'challenge --root ROOT --cohort georgia --window 10 --out georgia',
    'chapman': 'challenge --root ROOT --cohort chapman_shaoxing --out chapman',    # stands in for the original on figshare, an xlsx file
    'sph': 'sph --root ROOT',
    'ptbxl': 'ptbxl --root ROOT --rate 500',
    'zzu': 'zzu --root ROOT --window 10',
    'echonext': 'echonext --root ROOT',
    'mimic': 'mimic --root ROOT',
    # the second paper standardises CPSC2018 and PTB-XL, normalises and band-passes CSN (Chapman, Shaoxing and Ningbo merged): cut-offs
    # .5 and 40 Hz, like those of --contract sc, are ours
    'sc_cpsc2018': 'challenge --root ROOT --cohort cpsc_2018 --contract sc --norm record --out sc_cpsc2018',
    'sc_csn': 'challenge --root ROOT --cohort chapman_shaoxing ningbo --contract sc --filter hp0.5+lp40 --norm record --out sc_csn',
    'sc_echonext': 'echonext --root ROOT --contract sc --out sc_echonext',
    'sc_ptbxl': 'ptbxl --root ROOT --contract sc --norm record --out sc_ptbxl',
    'sc_mimic': 'mimic --root ROOT --contract sc --out sc_mimic'}
# AF, AFIB, AT, AVNRT, SAAWR, SB, SR, ST, SVT: Chapman's rhythms that have a code in the Challenge
RHYTHMS = '+'.join(f'snomed/{c}' for c in (164890007, 164889003, 713422000, 251166008, 17366009, 426177001, 426783006, 427084000, 426761007))
ALL_MIMIC = 'cardiac+noncardiac+deterioration+mortality+icu+sex+age+biometrics+features+labs+vitals'
SIX_MORTALITIES = '+'.join(f'mortality/{days}d' for days in (1, 7, 28, 90, 180, 365))        # without that of the stay: our choice of six
# the second paper trains on 25 %, validates on 5 % and tests on 10 % of MIMIC's 20 folds: which ones is our choice
QUARTER = ((0, 1, 2, 3, 4), (17,), (18, 19))
ADULT, ACUTE, PERSON = 'adult ECG interpretation', 'acute care', 'patient characteristics'
TASKS = {name: Target(*row, prepare=f'python data.py {PREPARE[row[1]]}') for name, row in {
    # arXiv 2605.12241; MIMIC's codes must have 2,000 ECGs, which the reader sees to
    'ningbo': (ADULT, 'ningbo', 'snomed', 'snomed', 10, 'AUROC', 68),
    'cpsc2018': (ADULT, 'cpsc2018', 'snomed', 'snomed', 10, 'AUROC', 9),
    'cpsc_extra': (ADULT, 'cpsc_extra', 'snomed', 'snomed', 10, 'AUROC', 33),
    'georgia': (ADULT, 'georgia', 'snomed', 'snomed', 10, 'AUROC', 50),
    'chapman': (ADULT, 'chapman', 'snomed', 'snomed', 10, 'AUROC', 42),
    'chapman_rhythm': (ADULT, 'chapman', 'snomed', RHYTHMS, 10, 'AUROC', None),
    'sph': (ADULT, 'sph', 'aha', 'aha', 10, 'AUROC', 35),
    'ptbxl_all': (ADULT, 'ptbxl', 'all', 'all', 10, 'AUROC', 71),
    'ptbxl_diag': (ADULT, 'ptbxl', 'all', 'diag', 10, 'AUROC', 44),
    'ptbxl_form': (ADULT, 'ptbxl', 'all', 'form', 10, 'AUROC', 19),
    'ptbxl_rhythm': (ADULT, 'ptbxl', 'all', 'rhythm', 10, 'AUROC', 12),
    'ptbxl_sub': (ADULT, 'ptbxl', 'sub', 'sub', 10, 'AUROC', 23),
    'ptbxl_super': (ADULT, 'ptbxl', 'super', 'super', 10, 'AUROC', 5),
    'zzu': ('paediatric ECG interpretation', 'zzu', 'aha', 'aha', 10, 'AUROC', 58),
    'echonext': ('cardiac structure and function', 'echonext', 'echonext', 'echonext', 10, 'AUROC', 11),
    'mimic_cardiac': ('cardiac outcomes', 'mimic', ALL_MIMIC, 'cardiac', 1, 'AUROC', 158),
    'mimic_noncardiac': ('non-cardiac outcomes', 'mimic', ALL_MIMIC, 'noncardiac', 1, 'AUROC', 918),
    'mimic_deterioration': (ACUTE, 'mimic', ALL_MIMIC, 'deterioration', 1, 'AUROC', 6),
    'mimic_mortality': (ACUTE, 'mimic', ALL_MIMIC, 'mortality', 1, 'AUROC', 7),
    'mimic_icu': (ACUTE, 'mimic', ALL_MIMIC, 'icu', 1, 'AUROC', 2),
    'mimic_sex': (PERSON, 'mimic', ALL_MIMIC, 'sex', 1, 'AUROC', 1),
    'mimic_age': (PERSON, 'mimic', ALL_MIMIC, 'age', 1, 'MAE', 1),
    'mimic_biometrics': (PERSON, 'mimic', ALL_MIMIC, 'biometrics', 1, 'MAE', 3),
    'mimic_features': (PERSON, 'mimic', ALL_MIMIC, 'features', 1, 'MAE', 7),
    'mimic_labs': (PERSON, 'mimic', ALL_MIMIC, 'labs', 1, 'MAE', 18),
    'mimic_vitals': (PERSON, 'mimic', ALL_MIMIC, 'vitals', 1, 'MAE', 6),
    # arXiv 2605.17276, out of distribution
    'sc_cpsc2018': (ADULT, 'sc_cpsc2018', 'snomed', 'snomed', 10, 'AUROC', 9),
    'sc_csn': (ADULT, 'sc_csn', 'snomed', 'snomed', 10, 'AUROC', None),
    'sc_echonext': ('cardiac structure and function', 'sc_echonext', 'shd', 'shd', 1, 'AUROC', 1),
    'sc_ptbxl_diag': (ADULT, 'sc_ptbxl', 'diag', 'diag', 10, 'AUROC', 44),
    'sc_ptbxl_form': (ADULT, 'sc_ptbxl', 'form', 'form', 10, 'AUROC', 19),
    'sc_ptbxl_rhythm': (ADULT, 'sc_ptbxl', 'rhythm', 'rhythm', 10, 'AUROC', 12),
    'sc_ptbxl_sub': (ADULT, 'sc_ptbxl', 'sub', 'sub', 10, 'AUROC', 23),
    'sc_ptbxl_super': (ADULT, 'sc_ptbxl', 'super', 'super', 10, 'AUROC', 5),
    'sc_mimic_sex': (PERSON, 'sc_mimic', 'sex', 'sex', 1, 'AUROC', 1, QUARTER),
    'sc_mimic_icu': (ACUTE, 'sc_mimic', 'icu', 'icu', 1, 'AUROC', 2, QUARTER),
    'sc_mimic_mortality': (ACUTE, 'sc_mimic', SIX_MORTALITIES, SIX_MORTALITIES, 1, 'AUROC', 6, QUARTER)}.items()}


# ---------------------------------------------------------------------------------------------------------------------
# command line

MADE, READ = ('synthetic', 'sequences'), ('ptbxl', 'challenge', 'zzu', 'sph', 'code15', 'echonext', 'mimic', 'wfdb', 'array')
TAKES = {'name': ('show',), 'record': ('show',), 'annotation': ('peaks',), 'root': (*READ, 'peaks'), 'no_peaks': (*READ, 'sample'),
         'download': ('ptbxl', 'challenge'), 'rate': ('ptbxl',), 'cohort': ('challenge',), 'least': ('mimic',),
         'folds': ('challenge', 'sph', 'zzu', 'code15', 'array'), 'fs_in': ('array',), 'leads': ('array',), 'unit': ('array',),
         'labels': ('array',), 'records': MADE, 'seconds': MADE, 'seed': MADE, 'shift': ('synthetic',),
         'prevalence_scale': ('synthetic',)}                     # every other flag: whatever prepares a dataset
RATES = {'synthetic': 240, 'sequences': 240, 'sample': 100, 'code15': 400, 'echonext': 250, 'zzu': 500, 'sph': 500, 'mimic': 500}     # Hz


def parser():
    """The command line's flags, in groups."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source', nargs='?', choices=[*MADE, 'sample', *READ, 'show', 'calibrate', 'peaks'],
                   help='what to prepare, or show / calibrate / peaks; nothing: the sample and the synthetic set')
    p.add_argument('name', nargs='?', help='show: the prepared dataset')
    p.add_argument('--root', help='folder (or file, for array) that holds the source')
    p.add_argument('--out', help='name of the prepared dataset (default: the source)')
    p.add_argument('--download', action='store_true', help='ptbxl, challenge: fetch it from PhysioNet into --root first')
    p.add_argument('--strict', action='store_true', help='stop at the first record with a defect')
    p.add_argument('--workers', type=int, help='processes (default: one per core; 1 for synthetic and sequences)')
    p.add_argument('--annotation', default='ii', help='peaks: extension of the annotation files')
    p.add_argument('--no-peaks', action='store_true', help='do not look for R-peaks')
    p.add_argument('--folds', choices=['stratified', 'hash'], help='for records without a fold: balance the labels (challenge, sph, zzu), or hash the '
                   'patient (all others)')
    g = p.add_argument_group('the signal contract')
    g.add_argument('--contract', choices=list(CONTRACTS), default='ps', help='ps: mV, 240 Hz, 2.5 s; sc: 100 Hz, 10 s, high-pass, notch')
    g.add_argument('--fs', type=int, help='Hz')
    g.add_argument('--window', type=float, help='s: shorter records are dropped')
    g.add_argument('--filter', help='none, or steps like hp0.5+lp40+notch60')
    g.add_argument('--norm', choices=['none', 'record'], help='record: each lead of a record to mean 0, SD 1 (amplitude is lost)')
    g = p.add_argument_group('ptbxl, challenge, mimic')
    g.add_argument('--rate', type=int, choices=[100, 500], default=100, help='which of the two versions of PTB-XL')
    g.add_argument('--cohort', nargs='+', default=[], help='Challenge cohorts (default: all that are there)')
    g.add_argument('--least', type=int, default=2000, help='ECGs of MIMIC that a cardiac code needs to become a label; 10 for scaling labels')
    g = p.add_argument_group('array')
    g.add_argument('--fs-in', type=float, help='Hz of the array')
    g.add_argument('--leads', default=','.join(LEADS), help='lead names in the order of the array, joined by commas')
    g.add_argument('--unit', choices=['mV', 'uV', 'V'], default='mV')
    g.add_argument('--labels', help='csv of labels, one row per record')
    g = p.add_argument_group('synthetic, sequences')
    g.add_argument('--records', type=int, default=4000)
    g.add_argument('--seconds', type=float, default=10.)
    g.add_argument('--seed', type=int, default=0)
    g.add_argument('--shift', nargs='+', default=[], choices=[*SHIFTS, 'all'], help='synthetic: a shifted cohort, out of distribution')
    g.add_argument('--prevalence-scale', type=float, default=1., help='synthetic: .3 comes near the prevalences of CODE')
    g = p.add_argument_group('show')
    g.add_argument('--record', type=int, default=0, help='row of the prepared dataset')
    return p


def arguments(argv=None):
    """(parsed command line, contract). Stops at what the source would ignore and at values out of range."""
    p = parser()
    a = p.parse_args(argv)
    given = [k for k, v in vars(a).items() if k != 'source' and v != p.get_default(k)]
    ignored = [k for k in given if a.source not in TAKES.get(k, (*MADE, 'sample', *READ))]
    if ignored:
        named = ', '.join(repr(a.name) if k == 'name' else '--' + k.replace('_', '-') for k in ignored)
        raise Stop(f'{a.source or "data.py without a source"} makes no use of {named}: leave it out')
    changes = {k: getattr(a, k) for k in ('fs', 'window', 'filter', 'norm') if getattr(a, k) is not None}
    contract = replace(CONTRACTS[a.contract], **changes, unit='SD' if a.norm == 'record' else 'mV')
    if not 50 <= contract.fs <= 1000 or not .1 <= contract.window <= MAX_SECONDS:
        raise Stop('--fs must lie between 50 and 1000 Hz, --window between 0.1 and 3600 s')
    step = r'(hp|lp|notch)(\d+(?:\.\d+)?)'
    steps = re.findall(step, contract.filter)
    known = contract.filter == 'none' or re.fullmatch(rf'{step}(\+{step})*', contract.filter)
    if not known or any(float(hz) == 0 for _, hz in steps):
        raise Stop(f'--filter {contract.filter}: none, or steps like hp0.5+lp40+notch60')
    rate = (RATES | {'ptbxl': a.rate, 'array': a.fs_in}).get(a.source) or math.inf
    for kind, hz in steps:                                       # a notch may remove mains that the contract's rate would alias
        limit = contract.fs if kind == 'notch' else min(rate, contract.fs) / 2
        if float(hz) >= limit:
            raise Stop(f'--filter {contract.filter}: {kind}{hz} must stay below {limit:g} Hz, with --fs {contract.fs}'
                       + (f' and a source of {rate:g} Hz' if rate < math.inf else ''))
    if a.seed < 0 or a.seed >= 2 ** 31 or (a.workers is not None and a.workers < 1) or a.least < 1:
        raise Stop('--seed must lie between 0 and 2^31, --workers and --least be 1 or more')
    if a.records < 1 or not .5 <= a.seconds <= MAX_SECONDS or not 0 < a.prevalence_scale <= 5:
        raise Stop('--records must be 1 or more, --seconds 0.5 to 3600, --prevalence-scale above 0 and up to 5')
    if a.source in READ and not a.root:
        raise Stop(f'--root DIR is missing: where is the {a.source} source?')
    return a, contract


def main(argv=None):
    """The command line: see the top of the file."""
    a, contract = arguments(argv)
    if a.source == 'show':
        return show(a.name or 'sample', a.record)
    if a.source == 'calibrate':
        return calibrate()
    if a.source == 'peaks':
        return check_peaks(a.root or '.', a.annotation)
    if a.source is None:
        DEFAULTS['sample']()
        DEFAULTS['synthetic']()
        return
    if a.download:
        download(a.source, a.root, a.rate, a.cohort)
    if a.root and not Path(a.root).exists():
        raise Stop(f'no such folder or file: {a.root}')
    shifts = tuple(SHIFTS) if 'all' in a.shift else tuple(a.shift)
    records = {                                                  # generators: only the one taken reads anything
        'synthetic': synthetic(a.records, a.seed, a.seconds, shifts, a.prevalence_scale),
        'sequences': sequences(a.records, a.seed, a.seconds),
        'sample': ptbxl(HERE / 'sample/ptbxl'),
        'ptbxl': ptbxl(a.root, a.rate),
        'challenge': challenge(a.root, a.cohort),
        'zzu': zzu(a.root), 'sph': sph(a.root), 'code15': code15(a.root), 'echonext': echonext(a.root), 'wfdb': wfdb_folder(a.root),
        'mimic': mimic(a.root, a.least),
        'array': array(a.root, a.fs_in, a.leads.split(','), a.unit, a.labels)}[a.source]
    made, totals = a.source in MADE, {'sample': 500} | dict.fromkeys(MADE, a.records)
    prepare(a.out or a.source, records, contract, ' '.join(sys.argv[1:] if argv is None else argv),
            extra_tasks=SYNTHETIC_TASKS if a.source == 'synthetic' else (), workers=a.workers or (1 if made else None),
            peaks=not a.no_peaks, strict=a.strict, total=totals.get(a.source),
            folds=a.folds or ('stratified' if a.source in ('challenge', 'sph', 'zzu') else 'hash'))


DEFAULTS = {name: functools.partial(main, command.split()) for name, command in (                     # these prepare themselves
    ('sample', 'sample'), ('synthetic', 'synthetic --records 4000'),
    ('shifted', 'synthetic --records 1000 --seed 1 --shift all --out shifted'))}


if __name__ == '__main__':
    script(main, 'stopped; nothing was changed')
