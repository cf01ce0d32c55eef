"""Prepared datasets that several tests share, in a folder of their own."""
import pytest

import data


@pytest.fixture(scope='session')
def world(tmp_path_factory):
    """A folder with datasets/sample (the 500 real records) and datasets/synthetic (640 records)."""
    folder = tmp_path_factory.mktemp('world')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data.DEFAULTS['sample']()
        data.prepare('synthetic', data.synthetic(640), extra_tasks=data.SYNTHETIC_TASKS, workers=1)
    return folder


@pytest.fixture
def here(world, monkeypatch):
    """The shared folder as the current one."""
    monkeypatch.chdir(world)
    return world
