"""How the encoder in sample/encoder was made. sample/encoder/README.md has all commands.

    python -m tests.encoder pool --root PTBXL        # which records train: writes pool.csv
    python -m tests.encoder pack out/tiny            # a run's encoder, to out/encoder

The 500 real ECGs in sample/ptbxl are test data, so their patients are not pretrained on: pool.csv
puts all records of these patients into fold 10, the test fold.
"""
import argparse
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from data import HERE, Stop, read_seen, run_script, write_seen
from models import save
from train import load_run


def pool(root):
    """Write pool.csv, labels for `data.py wfdb` on PTB-XL: fold 10 for all records of a patient of
    the sample, no fold for the others, so that all of them train. root: the folder of
    ptbxl_database.csv."""
    table, sample = [pd.read_csv(Path(folder, 'ptbxl_database.csv'))
                     for folder in (root, HERE / 'sample/ptbxl')]
    known = table.patient_id.isin(sample.patient_id)
    rows = pd.DataFrame(dict(id=table.filename_lr.str.split('/').str[-1],
                             patient='ptbxl/patient' + table.patient_id.astype(int).astype(str),
                             fold=np.where(known, '10', '')))
    rows.to_csv('pool.csv', index=False)
    print(f'pool.csv: {known.sum():,} of {len(known):,} records are of patients of the sample and '
          'do not train')


def pack(run, out):
    """Write the encoder of a finished run, before and after pretraining, in half precision, with
    seen.npz and log.csv. Head and optimiser are left out, so it cannot be resumed."""
    checkpoint = load_run(run)
    if checkpoint['step'] < checkpoint['args']['steps']:
        raise Stop(f'{run} is not finished: python train.py --resume --out {run}')
    for name in ('encoder', 'initial'):
        checkpoint[name] = {k: v.half() if v.is_floating_point() else v
                            for k, v in checkpoint[name].items()}
    del checkpoint['state'], checkpoint['optimiser'], checkpoint['log']
    Path(out).mkdir(parents=True, exist_ok=True)
    save(Path(out, 'ckpt.pt'), checkpoint | dict(world=0))     # of no run: --resume refuses it
    shutil.copy(Path(run, 'log.csv'), out)
    # LUDB's records are data/1 to data/200: names that another folder may have, too
    write_seen(out, {re.sub(r'^data/(\d+)$', r'ludb/\1', name) for name in read_seen(run)})
    print(f'{out}: {Path(out, "ckpt.pt").stat().st_size / 1e6:.2f} MB')


def main(argv=None):
    """The command line: see the top of the file."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add('what', choices=['pool', 'pack'])
    add('run', nargs='?', help='pack: the run folder')
    add('--root', help='pool: the folder of ptbxl_database.csv')
    add('--out', default='out/encoder', help='pack: the folder to write (out/encoder)')
    a = p.parse_args(argv)
    if not (a.root if a.what == 'pool' else a.run):
        p.error('pool needs --root, pack needs a run folder')
    if a.what == 'pool':
        pool(a.root)
    else:
        pack(a.run, a.out)


if __name__ == '__main__':
    run_script(main)
