"""What the README and the module docstrings tell people to type."""
import re
import shlex
from pathlib import Path

import pytest

import data
import evaluate
import models
import objectives
import scaling
import train

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {'data.py': data, 'train.py': train, 'evaluate.py': evaluate, 'models.py': models, 'objectives.py': objectives}
TEXT = (ROOT / 'README.md').read_text() + ''.join(m.__doc__ for m in SCRIPTS.values())


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_flag_named_is_a_flag(script, capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', [script, '--help'])
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main()
    known = set(re.findall(r'--[a-z][a-z_-]*', capsys.readouterr().out.split('options:')[1]))
    commands = re.findall(rf'python {script}([^`\n#|&)]*)', TEXT)
    named = {flag for command in commands for flag in re.findall(r'--[a-z][a-z_-]*', command)}
    assert stop.value.code == 0 and commands and named <= known


def test_every_command_of_scaling_is_one():
    commands = re.findall(r'python scaling\.py([^`\n#|&)]*)', TEXT + scaling.__doc__)
    assert len(commands) > 12 and all(scaling.parse(shlex.split(c)).command for c in commands)


def test_files_linked_are_there():
    linked = re.findall(r'\]\(((?:assets|sample)/[^)]+)\)', (ROOT / 'README.md').read_text())
    assert linked and [f for f in linked if not (ROOT / f).exists()] == []


def test_requirements_are_the_six_packages_pinned():
    lines = (ROOT / 'requirements.txt').read_text().split()
    assert sorted(re.fullmatch(r'(\w+)==[\d.]+', line)[1] for line in lines) == ['numpy', 'pytest', 'scipy', 'torch', 'tqdm', 'wfdb']


def test_anchors_linked_are_headings():
    text = re.sub(r'(?m)^    .*$', '', (ROOT / 'README.md').read_text())
    slugs = [re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in re.findall(r'(?m)^#+ (.*)$', text)]
    linked = re.findall(r'\]\(#([^)]+)\)', text)
    assert len(linked) > 20 and [a for a in linked if slugs.count(a) != 1] == []
