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
SCRIPTS = {'data.py': data, 'train.py': train, 'evaluate.py': evaluate, 'models.py': models,
           'objectives.py': objectives}
TEXT = (ROOT / 'README.md').read_text() + ''.join(m.__doc__ for m in SCRIPTS.values())


PARSERS = {'data.py': data.make_parser().parse_args, 'train.py': train.make_parser().parse_args,
           'evaluate.py': evaluate.parse}


@pytest.mark.parametrize('script', PARSERS)
def test_every_command_is_one(script):
    """Commands as they are typed. [...], NAME and what a shell fills in ($s) may be anything."""
    commands = re.findall(rf'python {script}([^`\n#|&);]*)', TEXT)
    commands = [re.sub(r'\$\w+', '1', re.sub(r'\[[^]]*\]|\.\.\.', '', c)) for c in commands]
    commands = [c.replace('NAME', 'jepa') for c in commands if 'SOURCE' not in c]
    assert len(commands) > 8
    for command in commands:
        PARSERS[script](shlex.split(command))


def test_every_command_of_scaling_is_one():
    commands = re.findall(r'python scaling\.py([^`\n#|&)]*)', TEXT + scaling.__doc__)
    assert len(commands) > 12 and all(scaling.parse(shlex.split(c)).command for c in commands)


def test_files_linked_are_there():
    linked = re.findall(r'\]\(((?:docs|sample)/[^)]+)\)', (ROOT / 'README.md').read_text())
    assert linked and [f for f in linked if not (ROOT / f).exists()] == []


def test_requirements_are_the_eight_packages_pinned():
    lines = (ROOT / 'requirements.txt').read_text().split()
    names = sorted(re.fullmatch(r'(\w+)==[\d.]+', line)[1] for line in lines)
    assert names == ['matplotlib', 'numpy', 'pandas', 'pytest', 'scipy', 'torch', 'tqdm', 'wfdb']


def test_anchors_linked_are_headings():
    text = re.sub(r'(?m)^    .*$', '', (ROOT / 'README.md').read_text())
    headings = re.findall(r'(?m)^#+ (.*)$', text)
    slugs = [re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in headings]
    linked = re.findall(r'\]\(#([^)]+)\)', text)
    assert len(linked) > 20 and [a for a in linked if slugs.count(a) != 1] == []
