"""The encoder that comes with the code, and how it was made."""
import re

import numpy as np
import pandas as pd
import pytest
import torch

import evaluate
import train
from data import Dataset, Stop, overlap, read_seen
from evaluate import BOX, embed, embed_array
from models import load
from . import analyses, encoder


def test_the_pool_holds_nothing_of_the_sample(here):
    """No patient, no id, no hash of a signal. The log is of that pretraining."""
    seen, ds = read_seen(BOX), Dataset('sample')
    for names in (ds.patient, ds.recording, ds.signal):
        assert seen.isdisjoint(names)
    assert not overlap(ds, seen).any()
    ids = [int(name[6:]) for name in seen if re.fullmatch(r'ptbxl/\d+', name)]
    assert len(ids) > 1000 and min(ids) > 500
    log, checkpoint = pd.read_csv(BOX / 'log.csv'), load(BOX)
    assert log.step.iloc[-1] + 1 == checkpoint['step'] == checkpoint['args']['steps']


def test_it_is_better_than_its_untrained_twin_on_real_records(here, tmp_path):
    assert (BOX / 'ckpt.pt').stat().st_size < 3e6
    evaluate.main([str(BOX), '--data', 'sample', '--out', str(tmp_path)])
    table = pd.read_csv(tmp_path / 'summary.csv').set_index(['metric', 'arm'])
    assert table.diff_low['AUROC', 'encoder'] > 0


def test_embed_array_takes_it_by_default(here):
    ds, rows = Dataset('sample'), [3, 70]
    x = ds.collate(rows, [0, 0], 2400)['x'].numpy().transpose(0, 2, 1)
    run = evaluate.open_run(BOX, 'cpu')
    assert np.allclose(embed_array(x, 240), embed(run['net'], ds, rows), atol=1e-5)


def test_results_do_not_go_into_sample(here, tmp_path, monkeypatch):
    """python evaluate.py, where no run is, and an analysis."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'datasets').symlink_to(here / 'datasets')
    before = sorted(BOX.iterdir())
    evaluate.main('--data sample --mode knn'.split())
    analyses.main(['embeddings', str(BOX)])
    assert sorted(BOX.iterdir()) == before
    assert {file.name for file in (tmp_path / 'out/compare_encoder').iterdir()} >= {
        'summary.csv', 'embeddings_sample_encoder.npz'}


def test_pool_keeps_the_patients_of_the_sample_out(empty):
    """Of four records, the first two are of a patient of the sample."""
    pd.DataFrame(dict(ecg_id=[1, 900, 901, 902], patient_id=[15709., 15709., 7., 8.],
                      filename_lr=[f'records100/00000/{i:05d}_lr' for i in (1, 900, 901, 902)])
                 ).to_csv('ptbxl_database.csv')
    encoder.main('pool --root .'.split())
    table = pd.read_csv('pool.csv', dtype=str, keep_default_na=False)
    assert table.fold.tolist() == ['10', '10', '', '']
    assert table.id.tolist() == ['00001_lr', '00900_lr', '00901_lr', '00902_lr']
    assert table.patient[3] == 'ptbxl/patient8'


def test_packed_weights_are_those_of_the_run_in_half_precision(here, tmp_path):
    train.main('--steps 1 --probe-every 0 --out out/boxed'.split())
    encoder.main(['pack', 'out/boxed', '--out', str(tmp_path)])
    full, half = load('out/boxed'), load(tmp_path)
    for name in ('encoder', 'initial'):
        for key, value in full[name].items():
            wanted = value.half() if value.is_floating_point() else value
            assert torch.equal(half[name][key], wanted)
    assert read_seen(tmp_path) == read_seen('out/boxed')
    with pytest.raises(Stop, match='begun with other data or other processes'):
        train.main(['--resume', '--out', str(tmp_path)])
