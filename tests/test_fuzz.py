"""Readers against thousands of damaged files: each is read to whole microvolts of the right shape,
or refused with a reason."""
import random
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.io

import data
from data import LEADS, Contract, Record, Stop

EXTREMES = (b'0|-1|nan|inf|1e308|99999999999999999999|-32768|1/0|()|16x4|../../x||\0|\xff\xfe|"|\n'
            b'| |12|1000').split(b'|')


def mutate(text, rng):
    """One to three changes of bytes or words: replaced, cut out, doubled, made extreme, cut off."""
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(text) + 1)
        j = min(len(text), i + rng.choice((1, 1, 2, 8, 64)))
        words = text.split(b' ')
        words[rng.randrange(len(words))] = rng.choice(EXTREMES)
        new = rng.choice((bytes(byte ^ 1 << rng.randrange(8) for byte in text[i:j]),
                          text[i:j] * rng.choice((0, 2, 3)), rng.choice(EXTREMES)))
        text = rng.choice((text[:i] + new + text[j:],) * 4 + (b' '.join(words), text[:i]))
    return text


class Late(BaseException):
    """No Exception, which the readers would take for a fault of the record."""


@pytest.fixture(autouse=True)
def in_time():
    """A test fails where a reader hangs."""
    def late(*_):
        raise Late('hangs')
    signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)


def check(record):
    """What `process` makes of a record: counts of the right shape, or a reason. Was it read?"""
    _, counts, why = data.process(record, Contract(), peaks=False)
    if counts is None:
        assert why
        return False
    assert counts.dtype == np.int16 and counts.shape[1:] == (12,) and len(counts) >= 600
    return True


def read(records):
    """How many records were read, 0 if the reader stopped with a reason."""
    try:
        return sum(check(record) for record in records)
    except Stop as e:
        assert str(e)
        return 0


def noise(*shape):
    return np.random.default_rng(0).normal(0, 300, shape).astype('<i2')


def test_a_hang_is_seen():
    signal.setitimer(signal.ITIMER_REAL, .1)
    with pytest.raises(Late):
        check(Record('r', load=lambda _: signal.pause()))


@pytest.mark.parametrize('file, fmt', [('r.dat', '16'), ('r.mat', '16+24')])
def test_damaged_wfdb_records(empty, file, fmt):
    rng, count, header, signals = random.Random(fmt), 0, Path('r.hea'), Path(file)
    lines = [f'{file} {fmt} 1000(0)/mV 16 0 0 0 0 {lead}\n' for lead in LEADS]
    text = f'r 12 100 500\n{"".join(lines)}#Age: 50\n#Sex: M\n#Dx: 426783006,59118001\n'.encode()
    if fmt == '16':
        noise(500, 12).tofile(file)
    else:
        scipy.io.savemat(file, {'val': noise(12, 500)}, format='4')
    whole = signals.read_bytes()
    for i in range(701):
        header.write_bytes(mutate(text, rng) if i % 3 else text)
        signals.write_bytes(whole if i % 3 or i == 0 else mutate(whole, rng))
        count += check(Record('r', load=partial(data.load_challenge, path=Path('r'))))
        assert count or i                                           # the first one is undamaged
    assert 20 < count < 680                                         # some changes do no harm


def test_damaged_arrays(empty):
    rng, count, x = random.Random(2), 0, noise(3, 12, 600) / np.float32(1000)
    np.save('whole.npy', x)
    np.savez('whole.npz', x=x, fs=240, unit='mV')
    for i in range(500):
        kind = ('npy', 'npz')[i % 2]
        whole = Path(f'whole.{kind}').read_bytes()
        cut = 160 if i % 4 == 0 else len(whole)                     # the header of the .npy alone
        Path(f'x.{kind}').write_bytes(mutate(whole[:cut], rng) + whole[cut:])
        count += read(data.array(f'x.{kind}', 240, LEADS, 'mV'))
    assert 30 < count < 1470


def test_damaged_tables(empty):
    """Signal files of ptbxl are not there, so that each of its records is dropped."""
    rng, rows, x = random.Random(3), 0, noise(3, 12, 600) / np.float32(1000)
    np.save('x.npy', x)
    Path('records100').mkdir()
    labels = b'id,patient,fold,age,sex,MI,AF\na,p,1,60,F,1,0\nb,q,2,70,M,0,1\nc,q,2,71,M,,1\n'
    sample = data.HERE / 'sample/ptbxl'
    statements = (sample / 'scp_statements.csv').read_bytes()
    database = b''.join((sample / 'ptbxl_database.csv').read_bytes().splitlines(True)[:6])
    for i in range(400):
        Path('labels.csv').write_bytes(mutate(labels, rng))
        Path('ptbxl_database.csv').write_bytes(mutate(database, rng))
        Path('scp_statements.csv').write_bytes(statements if i % 2 else mutate(statements, rng))
        rows += read(data.array('x.npy', 240, LEADS, 'mV', 'labels.csv'))
        assert read(data.ptbxl('.')) == 0
    assert 40 < rows < 1000


def test_names_stay_inside_the_folder(empty):
    """Ids and file names from a file are never used as a path to write to."""
    np.save('x.npy', noise(4, 12, 600) / 1000)
    Path('labels.csv').write_text('id,patient,../../up\n../../a,/etc/b,1\n/srv/c,..,0\n'
                                  'd\\e,x,1\nf,y,0\n')
    before = {*empty.parent.rglob('*')}
    data.main('array --root x.npy --fs-in 240 --labels labels.csv --out mine --workers 1'.split())
    data.main('show mine --record 0'.split())
    new = {*empty.parent.rglob('*')} - before
    assert new and all(path.relative_to(empty).parts[0] in ('datasets', 'out') for path in new)
