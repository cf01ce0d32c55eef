"""The tables of docs/results.md that are made from the rows in docs/results.

    python -m tests.tables          # prints them; tests/test_readme.py compares the pages with them
"""
import re

import numpy as np
import pandas as pd

from data import HERE
from evaluate import DIFFERENCE, INTERVAL

RESULTS = HERE / 'docs/results'
SPELL = dict(cpc='CPC', jepa='JEPA', dinosr='DinoSR', hubert='HuBERT++', s4='S4',
             transformer='Transformer', net1d='Net1D')


def spell(text):
    """An arm or a claim as the pages spell it: CPC S4 + JEPA S4."""
    text = re.sub(r'\w+', lambda word: SPELL.get(word[0], word[0]), text)
    return re.sub(r'(?<=\w)\+(?=\w)', ' + ', text)


def short(value, form='.3f'):
    """A number without the zero before its point: .838, -.040."""
    return re.sub(r'^(\W?)0\.', r'\1.', format(value, form))


def cell(row, form='.3f', names=INTERVAL):
    """A row's value with its interval: .838 [.812, .864]; bold where a difference excludes 0."""
    value, low, high = (short(row[name], form) for name in names)
    bold = '**' if form[0] == '+' and row[names[1]] * row[names[2]] > 0 else ''
    return f'{bold}{value} [{low}, {high}]{bold}'


def markdown(columns):
    """Lines of a Markdown table. columns: pairs of a heading and its cells."""
    heads, cells = zip(*columns)
    rows = [heads, ['---'] * len(heads), *zip(*cells, strict=True)]
    return ['| ' + ' | '.join(row) + ' |' for row in rows]


def place(table):
    """Where rows were evaluated: `cohort`, or `real, frozen, all` if by no probe on all labels."""
    words = table.data + ', ' + table['mode'] + ', ' + table.labels.astype(str)
    return words.str.removesuffix(', linear, all')


def score_tables(part):
    """Tables of a part of the study, of up to three ways to evaluate: each arm's AUROC, its gain
    over its own untrained weights, and, where it was fine-tuned, over training from scratch."""
    table = pd.read_csv(RESULTS / f'study_{part}_scores.csv', dtype=str).fillna({'what': ''})
    table[[*INTERVAL]] = table[[*INTERVAL]].astype(float)
    table['at'] = place(table)
    looks, arms = table['at'].unique(), [*table.arm.unique()]
    for i in range(0, len(looks), 3):
        columns = [('arm', map(spell, arms))]
        for at in looks[i:i + 3]:
            for what, head in {'': at, 'gain': 'gain', 'less-scratch': 'less scratch'}.items():
                mine = table[(table['at'] == at) & (table.what == what)].set_index('arm')
                form = '+.3f' if what else '.3f'
                if len(mine):
                    columns.append((head, [cell(mine.loc[arm], form) for arm in arms]))
        yield markdown(columns)


def step_table(part):
    """AUROC of each arm at each kept step, on each data."""
    table = pd.read_csv(RESULTS / f'study_{part}_scores.csv', dtype=dict(what=str))
    table = table[table.what.isna() | table.what.str.isdigit()]
    values = table.set_index(['arm', 'step', 'data']).value
    arms, data = table.arm.unique(), table.data.unique()
    columns = [(f'{"; ".join(data)} after steps', map(spell, arms))]
    for step in sorted(table.step.unique()):
        columns.append((f'{step:,}', ['; '.join(short(values[arm, step, at]) for at in data)
                                      for arm in arms]))
    yield markdown(columns)


def claim_tables(parts):
    """The comparison that decides each claim on each data, decided ones first, and their number."""
    table = pd.concat(pd.read_csv(RESULTS / f'study_{part}_claims.csv') for part in parts)
    open_ = table.verdict == "can't tell"
    table = pd.concat([table[~open_], table[open_]])
    names = 'difference', *INTERVAL[1:]
    yield [f'Decided: {(~open_).sum()} of {len(table)} verdicts.']
    yield markdown([
        ('claim', table.claim.map(spell)),
        ('data', place(table)),
        ('deciding difference', [f'{cell(row, "+.3f", names)} to {spell(row["other"])}'
                                 for row in table.to_dict('records')]),
        ('found from', table.detectable.map(short)),
        ('verdict', table.verdict)])


def question_tables(part):
    """Each question's answer for each arm, on each data."""
    table = pd.read_csv(RESULTS / f'study_{part}_questions.csv')
    table['text'] = [cell(row, '.2f') for row in table.to_dict('records')]
    table.loc[np.isinf(table.low) & np.isinf(table.high), 'text'] = 'not determined'
    for question, mine in table.groupby('question', sort=False):
        arms = [*mine.arm.unique()]
        columns = [(question, map(spell, arms))]
        for data, here in mine.groupby(place(mine), sort=False):
            columns.append((data, here.set_index('arm').text[arms]))
        yield markdown(columns)


def encoder_table():
    """The encoder in sample/: macro AUROC against the number of labels."""
    table = pd.read_csv(RESULTS / 'encoder_sample.csv').query('metric == "AUROC"')
    rows, labels = {}, table.labels.unique()             # {name of the line: {labels: its cell}}
    for row in table.to_dict('records'):
        mode, state = row['mode'], row['arm'].removeprefix('encoder').strip(', ') or 'pretrained'
        name = state if state == 'from scratch' else f'{mode}, {state}'
        rows.setdefault(name, {})[row['labels']] = cell(row)
        if state == 'pretrained':
            difference = cell(row, '+.3f', DIFFERENCE)
            rows.setdefault(f'{mode}, difference', {})[row['labels']] = difference
    columns = [('macro AUROC', rows)]
    columns += [(count, [row[count] for row in rows.values()]) for count in labels]
    yield markdown(columns)


def tables():
    """All tables, lists of lines."""
    parts = [part for part in ('curves', 'data', 'released', 'records')
             if (RESULTS / f'study_{part}_scores.csv').exists()]
    for part in parts:
        yield from score_tables(part)
    yield from claim_tables(parts)
    yield from step_table('curves')
    yield from question_tables('curves')
    yield from encoder_table()


if __name__ == '__main__':
    for lines in tables():
        print('\n'.join(lines), end='\n\n')
