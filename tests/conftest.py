"""Prepared datasets that several tests share, in a folder of their own; and one thread, for tensors
so small that threads wait for each other longer than they work."""
import os

# before torch is imported, and for the scripts that tests start
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest

import data
import train


@pytest.fixture(scope='session')
def world(tmp_path_factory):
    """A folder with datasets/sample (the 500 real records) and datasets/synthetic (640 records)."""
    folder = tmp_path_factory.mktemp('world')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data.main(data.DEFAULTS['sample'].split())
        data.prepare('synthetic', data.synthetic(640), extra_tasks=data.SYNTHETIC_TASKS, workers=1)
    return folder


@pytest.fixture
def here(world, monkeypatch):
    """The shared folder as the current one."""
    monkeypatch.chdir(world)
    return world


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='session', autouse=True)
def undrawn():
    """Runs of a few steps without the figure of their log, which takes longer than they do. Scripts
    that tests start draw it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'draw_log', lambda *_: None)
        yield
