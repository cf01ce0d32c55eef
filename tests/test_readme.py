"""What README.md, docs/ and sample/encoder tell people to type and to open: commands, flags, files,
links, and the Python snippet."""
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import data
import evaluate
import models
import objectives
import scaling
import train
from data import Dataset

from .tables import score_tables, tables

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path: path.read_text() for path in (ROOT / 'README.md', ROOT / 'sample/encoder/README.md',
                                             *sorted(ROOT.glob('docs/*.md')))}
TEXT = '\n'.join(PAGES.values())
SCRIPTS = data, models, objectives, train, evaluate, scaling
PARSERS = {'data.py': data.make_parser().parse_args, 'train.py': train.make_parser().parse_args,
           'evaluate.py': evaluate.parse, 'scaling.py': scaling.parse}


def typed(command, text):
    """The arguments of every command as it is typed. [...], NAME and what a shell fills in ($s) may
    be anything."""
    found = re.findall(rf'python {command}((?: (?![#|&>])[^`\n#|&);>]*)?)', text)
    found = [re.sub(r'\$\w+', '1', re.sub(r'\[[^]]*\]|\.\.\.', '', words)) for words in found]
    return [shlex.split(words.replace('NAME', 'jepa')) for words in found if 'SOURCE' not in words]


@pytest.mark.parametrize('script', PARSERS)
def test_every_command_is_one(script):
    commands = typed(re.escape(script), TEXT + ''.join(module.__doc__ for module in SCRIPTS))
    assert len(commands) > 12
    for words in commands:
        PARSERS[script](words)


def test_every_command_in_tests_is_one():
    """python -m tests.NAME WORDS: the file is there, and has the words' flags and names in it."""
    commands = re.findall(r'python -m tests\.(\w+)((?: (?!out/)[-\w.]+)*)', TEXT)
    assert len(commands) > 8
    for name, words in commands:
        source = (ROOT / f'tests/{name}.py').read_text()
        for word in words.split():
            if word.isupper() or word.isdigit():                # RUN: to be filled in
                continue
            assert re.search(rf"\b{word.lstrip('-')}\b", source), (name, word)


def test_every_flag_is_one():
    """Flags named in the text, without a command."""
    sources = ''.join(path.read_text() for path in (*ROOT.glob('*.py'), *ROOT.glob('tests/*.py')))
    known = set(re.findall(r"'(--[\w-]+)'", sources)) | {'--help'}
    named = set(re.findall(r'`(--[\w-]+)', TEXT))
    assert len(named) > 15 and named - known == set()


def headings(path):
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r'(?ms)^```.*?^```|^    .*?$', '', path.read_text())
    found = re.findall(r'(?m)^#+ (.*)$', text)
    return [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in found]


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_link_is_dead(page):
    links = re.findall(r'\]\(((?!http)[^)\s]+)\)', PAGES[page])
    assert links
    for link in links:
        name, _, anchor = link.partition('#')
        path = page.parent / name if name else page
        assert path.exists(), link
        assert not anchor or headings(path).count(anchor) == 1, link


def test_every_figure_is_shown():
    shown = {Path(link).name for link in re.findall(r'!\[[^]]*\]\(([^)\s]+)\)', TEXT)}
    drawn = *ROOT.glob('docs/figures/*'), *ROOT.glob('docs/results/*.png')
    assert {path.name for path in drawn} == shown


def test_files_named_are_there():
    named = set(re.findall(r'`((?:(?:tests|docs|sample)/[\w./]*)|\w+\.py)`', TEXT))
    assert len(named) > 6 and [name for name in named if not (ROOT / name).exists()] == []


def test_tables_are_of_the_kept_rows():
    for lines in tables():
        assert '\n'.join(lines) in PAGES[ROOT / 'docs/results.md'], lines[0]
    assert '\n'.join(next(score_tables('curves'))) in PAGES[ROOT / 'README.md']


def test_snippet_embeds_as_it_stands(here):
    """Two real recordings, by the encoder that comes with the code."""
    x = Dataset('sample').collate([0, 1], [0, 0], 2400)['x'].numpy().transpose(0, 2, 1)
    np.save('ecg.npy', x)
    snippet = re.search(r'(?s)```python\n(.*?)```', PAGES[ROOT / 'README.md'])[1]
    names = {}
    exec(snippet.replace('fs=500', 'fs=240'), names)
    assert names['embeddings'].shape == (2, 64)
    # each recording is embedded alone: the second, given alone, is the same
    alone = evaluate.embed_array(x[1:], fs=240)
    assert np.allclose(names['embeddings'][1:], alone, atol=1e-6)


def test_requirements_are_the_eight_packages_pinned():
    lines = (ROOT / 'requirements.txt').read_text().split()
    names = sorted(re.fullmatch(r'(\w+)==[\d.]+', line)[1] for line in lines)
    assert names == ['matplotlib', 'numpy', 'pandas', 'pytest', 'scipy', 'torch', 'tqdm', 'wfdb']
