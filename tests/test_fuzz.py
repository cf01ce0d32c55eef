"""Readers against thousands of damaged files: each is read to whole millivolts of the right shape, or refused with a reason."""
import contextlib
import csv
import functools
import random
import signal
import time

import numpy as np
import pytest
import scipy.io

import data
from data import Contract, Record, Stop, array, finish, load_challenge, load_wfdb, ptbxl

EXTREMES = [b'0', b'-1', b'nan', b'inf', b'1e308', b'99999999999999999999', b'-32768', b'1/0', b'()', b'16x4', b'../../x', b'', b'\0', b'\xff\xfe', b'"', b'\n', b' ', b'12', b'1000']


def mutate(text, rng):
    """One to four changes: bits, spans, words; what is cut, doubled, swapped or replaced by something extreme."""
    text = bytearray(text)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(text) + 1)
        j = min(len(text), i + rng.choice((1, 1, 2, 8, 64)))
        kind = rng.randrange(6)
        if kind == 0 and i < len(text):
            text[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del text[i:j]
        elif kind == 2:
            text[i:i] = text[i:j] * rng.randint(1, 3)
        elif kind == 3:
            text[i:j] = rng.choice(EXTREMES)
        elif kind == 4:
            words = bytes(text).split(b' ')
            words[rng.randrange(len(words))] = rng.choice(EXTREMES)
            text = bytearray(b' '.join(words))
        else:
            del text[rng.randrange(len(text) + 1):]
    return bytes(text)


class Late(BaseException):
    """No Exception, which the readers would take for a defect of the record."""


@contextlib.contextmanager
def in_time(seconds=10):
    """Fails where the block takes longer."""
    def late(*_):
        raise Late(f'hangs: {seconds} s')
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(record):
    """What `finish` makes of a record: counts of the right shape, or a reason. Returns whether it was read."""
    done, counts, facts = finish(record, Contract(), peaks=False)
    if counts is None:
        assert isinstance(facts, str) and facts
        return False
    assert counts.dtype == np.int16 and counts.ndim == 2 and counts.shape[1] == 12 and 600 <= len(counts) <= 240 * data.MAX_SECONDS
    return True


def leads(rng, samples=500):
    return (np.random.default_rng(rng.randrange(9)).normal(0, 300, (samples, 12))).astype('<i2')


def header(file, fmt, comments=''):
    lines = [f'r 12 100 500'] + [f'{file} {fmt} 1000(0)/mV 16 0 0 0 0 {name}' for name in data.LEADS]
    return ('\n'.join(lines) + '\n' + comments).encode()


def test_a_hang_is_seen():
    with pytest.raises(Late), in_time(1):
        check(Record('r', load=lambda r: time.sleep(3)))


def test_damaged_wfdb_headers(tmp_path):
    rng, read = random.Random(0), 0
    whole = header('r.dat', '16', '# Age: 61\n# Sex: F\n')
    (tmp_path / 'r.dat').write_bytes(leads(rng).tobytes())
    (tmp_path / 'r.hea').write_bytes(whole)
    assert check(Record('r', load=functools.partial(load_wfdb, path=tmp_path / 'r')))
    for _ in range(900):
        (tmp_path / 'r.hea').write_bytes(mutate(whole, rng))
        with in_time():
            read += check(Record('r', load=functools.partial(load_wfdb, path=tmp_path / 'r')))
    assert 20 < read < 880                                       # some changes do no harm, most do


def test_damaged_challenge_records(tmp_path):
    rng, read = random.Random(1), 0
    whole = header('r.mat', '16+24', '#Age: 50\n#Sex: Male\n#Dx: 426783006,59118001\n')
    scipy.io.savemat(tmp_path / 'r.mat', {'val': leads(rng).T}, format='4')
    signals = (tmp_path / 'r.mat').read_bytes()
    for i in range(500):
        (tmp_path / 'r.hea').write_bytes(whole if i % 2 else mutate(whole, rng))
        (tmp_path / 'r.mat').write_bytes(mutate(signals, rng) if i % 2 else signals)
        with in_time():
            read += check(Record('r', load=functools.partial(load_challenge, path=tmp_path / 'r')))
    assert 10 < read < 490


def test_damaged_arrays(tmp_path):
    rng, read = random.Random(2), 0
    np.save(tmp_path / 'whole.npy', np.stack([leads(rng, 600).T / 1000 for _ in range(3)]).astype(np.float32))
    np.savez(tmp_path / 'whole.npz', x=np.load(tmp_path / 'whole.npy'), fs=240, unit='mV')
    for i in range(500):
        kind = ('npy', 'npz')[i % 2]
        whole = (tmp_path / f'whole.{kind}').read_bytes()
        cut = 160 if i % 4 == 0 else len(whole)                  # a quarter: the header of the .npy alone
        (tmp_path / f'x.{kind}').write_bytes(mutate(whole[:cut], rng) + whole[cut:])
        with in_time():
            try:
                for record in array(tmp_path / f'x.{kind}', 240, data.LEADS, 'mV'):
                    read += check(record)
            except Stop as e:
                assert str(e)
    assert 30 < read < 1470, read


def test_damaged_tables(tmp_path, monkeypatch):
    rng, rows = random.Random(3), 0
    np.save(tmp_path / 'x.npy', np.stack([leads(rng, 600).T / 1000 for _ in range(3)]).astype(np.float32))
    labels = b'id,patient,fold,age,sex,MI,AF\na,p,1,60,F,1,0\nb,q,2,70,M,0,1\nc,q,2,71,M,,1\n'
    statements = (data.HERE / 'sample/ptbxl/scp_statements.csv').read_bytes()
    database = b''.join((data.HERE / 'sample/ptbxl/ptbxl_database.csv').read_bytes().splitlines(True)[:6])
    for i in range(400):
        with in_time():
            try:
                if i % 2:
                    (tmp_path / 'labels.csv').write_bytes(mutate(labels, rng))
                    rows += sum(check(r) for r in array(tmp_path / 'x.npy', 240, data.LEADS, 'mV', tmp_path / 'labels.csv'))
                else:
                    (tmp_path / 'records100').mkdir(exist_ok=True)
                    (tmp_path / 'ptbxl_database.csv').write_bytes(mutate(database, rng))
                    (tmp_path / 'scp_statements.csv').write_bytes(mutate(statements, rng) if i % 4 else statements)
                    rows += sum(not check(r) for r in ptbxl(tmp_path))           # its signal files are not there: each is dropped
            except Stop as e:
                assert str(e)
    assert rows > 200


def test_names_stay_inside_the_folder(tmp_path, monkeypatch):
    """Ids and file names from a file are never used as a path to write to."""
    monkeypatch.chdir(tmp_path)
    np.save('x.npy', np.stack([leads(random.Random(0), 600).T / 1000 for _ in range(4)]).astype(np.float32))
    (tmp_path / 'labels.csv').write_text('id,patient,../../up\n../../a,/etc/b,1\n/tmp/c,..,0\nd\\e,x,1\nf,y,0\n')
    before = {p for p in tmp_path.parent.rglob('*')}
    data.main('array --root x.npy --fs-in 240 --labels labels.csv --out mine --no-peaks --workers 1'.split())
    data.main('show mine --record 0'.split())
    made = {p for p in tmp_path.parent.rglob('*')} - before
    assert made and all(p.is_relative_to(tmp_path / 'datasets') or p.is_relative_to(tmp_path / 'out') for p in made)
