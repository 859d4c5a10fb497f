"The papers' rows: what is listed, what matches, how a record is reported, and the page of all rows."

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from imtm_lite.files import DataError, write_json
from imtm_lite.recall import PROTOCOLS
from imtm_lite.results import (
    PAPERS,
    ROWS,
    compare,
    elsewhere,
    files_of,
    find_row,
    list_paper_rows,
    markdown_table,
    needs_of,
    page,
    rank_correlation,
    read_experiment,
    read_records,
    report,
    spread,
    table,
    text_table,
    verdict,
)
from imtm_lite.workshop.reproduce import SPLIT_SIZES

ROOT = Path(__file__).parent.parent
IMTM = [sys.executable, '-c', 'from imtm_lite.workshop.cli import main; main()']


def seed_of(number, six):
    return dict(
        seed=number,
        members=[number],
        i2t=list(six[:3]),
        t2i=list(six[3:]),
        rsum=float(sum(six)),
        hours=[1.5],
        device='a device',
        precision='no',
        fingerprints=dict(train='a', dev='b', test='c'),
        checkpoints=['d'],
        versions=dict(imtm_lite='0'),
    )


def record_of(name, *sixes, **more):
    row = ROWS[name]
    record = dict(row=name, dry=False, ensemble=1, source=row.source, settings=row.settings)
    record |= dict(changes={}, differences=[], data=dict(pictures={}))
    record['seeds'] = [seed_of(number, six) for number, six in enumerate(sixes)]
    record |= more
    return record | dict(verdict=verdict(find_row(name, record['ensemble']), record))


# what is listed


def test_rows_are_complete():
    galleries = ('f30k', 'coco-1k', 'coco-5k')
    assert set(ROWS) == {f'{model}-{name}' for model in PAPERS for name in galleries}
    for row in ROWS.values():
        assert row.protocol in PROTOCOLS
        assert PROTOCOLS[row.protocol].images == SPLIT_SIZES[row.data][row.split]
        assert row.source
        assert row.settings


def test_figures_are_those_of_two_papers_and_their_sums_are_right():
    with_figures = [row for row in ROWS.values() if row.figures]
    assert {row.model for row in with_figures} == {'camp', 'ssamt'}
    assert len(with_figures) == 6
    for row in with_figures:
        assert len(row.figures) == 6
        assert abs(sum(row.figures) - row.rsum) < 0.15
        for way in (row.figures[:3], row.figures[3:]):
            assert list(way) == sorted(set(way))


def test_the_list_names_every_row_its_source_and_whose_settings_stand_in():
    out = subprocess.run([*IMTM, 'reproduce'], capture_output=True, text=True)
    assert out.returncode == 0
    assert out.stdout == list_paper_rows() + '\n'
    lines = {}
    for line in out.stdout.split('\n'):
        first = line.partition(' ')[0]
        if first in ROWS:
            lines[first] = line
    assert set(lines) == set(ROWS)
    assert '466.9' in lines['camp-f30k']
    assert not re.search(r'\d\.\d', lines['hire-f30k'])
    for words in (
        'performance.md of the repository',
        'no figure confirmed by a source',
        'two phases',
        '3SHNet',
        'names no data set',
        '--ensemble 2',
    ):
        assert words in out.stdout, words


def shown_in(notebook: Path) -> list[str]:
    "Everything that a notebook shows as Markdown."
    shown = []
    for cell in json.loads(notebook.read_text())['cells']:
        for output in cell.get('outputs', []):
            shown.append(''.join(output.get('data', {}).get('text/markdown', '')))
    return shown


def test_the_page_lists_every_row_and_what_it_waits_for():
    lines = page(ROOT / 'data/results').split('\n')[2:]
    assert [line.split('`')[1] for line in lines][: len(ROWS)] == list(ROWS)
    for line in lines:
        assert line.count('|') == 7
        assert ('not run: needs `' in line) != ('library' in line)
        if line.startswith('| `hire'):
            assert 'no figure confirmed by a source' in line


def test_the_lesson_and_the_readme_show_the_present_page():
    text = page(ROOT / 'data/results')
    others = elsewhere(ROOT / 'data/results')
    [lesson] = (ROOT / 'nbs').glob('*_results.ipynb')
    shown = '\n'.join(shown_in(lesson))
    assert text in shown, f'run {lesson.name}'
    assert others in shown, f'run {lesson.name}'
    assert text in (ROOT / 'README.md').read_text(), 'run nbs/index.ipynb and make readme'


# verdicts


def test_verdicts_on_hand_made_figures():
    row = ROWS['camp-f30k']

    def word(*by):
        return compare(row.figures, np.add(row.figures, by))[1]

    assert compare(row.figures, row.figures) == (0, 'matches')
    assert word(1, 1, 1, 1, 1, 1) == 'matches'
    assert word(-6, 0, 0, 0, 0, 0) == 'matches'
    assert word(1, 1, 1, 1, 1, 1.01) == 'above'
    assert word(-3, -3, 0, 0, 0, -0.1) == 'below'
    # the sums are nearly equal, the figures are not
    distance, side = compare(row.figures, np.add(row.figures, (3, 3, 3, -3, -3, -3.1)))
    assert distance == pytest.approx(18.1 / 6)
    assert side == 'below'


def test_a_verdict_is_of_the_mean_over_the_seeds():
    row = ROWS['camp-f30k']
    shifted = [np.add(row.figures, points) for points in (3, -3, 0.3)]
    assert verdict(row, record_of('camp-f30k', *shifted)).startswith('matches: 0.1 points')


OTHER_DATA = dict(differences=['train: 3 pictures instead of 29,000'])


@pytest.mark.parametrize(
    'name, more, reason',
    [
        ('hire-f30k', {}, 'no figure confirmed'),
        ('camp-f30k', dict(ensemble=2), 'single model'),
        ('camp-f30k', dict(dry=True), 'dry run'),
        ('camp-f30k', OTHER_DATA, "not the paper's data"),
    ],
)
def test_no_verdict_where_there_is_nothing_to_compare(name, more, reason):
    record = record_of(name, ROWS['camp-f30k'].figures, **more)
    text = report(record)
    assert record['verdict'].startswith('no verdict')
    assert reason in record['verdict']
    assert 'matches' not in text
    # the line of differences from the paper's figures
    assert ('difference' in text) == ('differences' in more)


def test_report_has_paper_ours_difference_and_spread():
    six = ROWS['camp-f30k'].figures
    text = report(record_of('camp-f30k', np.add(six, 0.5), np.subtract(six, 0.1), np.add(six, 0.2)))
    lines = {line.split('  ')[0]: line for line in text.split('\n')}
    for name, figures in (
        ('paper', ('68.1', '466.9')),
        ('ours', ('68.3 ± 0.3', '468.1 ± 1.8')),
        ('difference', ('+0.2', '+1.2')),
    ):
        for figure in figures:
            assert figure in lines[name], name
    assert 'matches: 0.2 points' in text
    assert text.count('1.50 hours on a device') == 3
    assert 'train a dev b test c' in text
    assert 'performance.md' in text


def test_report_says_what_was_changed_and_names_no_folder():
    changes = dict(epochs=1, arguments=dict(text='/models/bert', width=8))
    text = report(record_of('camp-f30k', ROWS['camp-f30k'].figures, changes=changes))
    assert 'changed: epochs 1, text bert, width 8' in text


def test_records_enter_the_page_and_dry_runs_do_not(tmp_path):
    six = ROWS['ssamt-f30k'].figures
    pair = record_of('hire-f30k', six, ensemble=2)
    write_json(tmp_path / 'reproduce-ssamt-f30k.json', record_of('ssamt-f30k', six))
    write_json(tmp_path / 'reproduce-hire-f30k-ensemble2.json', pair)
    lines = {line.split('`')[1]: line for line in page(tmp_path).split('\n')[2:]}
    assert len(lines) == len(ROWS) + 1
    assert 'matches' in lines['ssamt-f30k']
    assert lines['ssamt-f30k'].count('**488.7**') == 2
    assert 'no verdict' in lines['hire-f30k-ensemble2']
    assert 'not run' in lines['hire-f30k']
    write_json(tmp_path / 'reproduce-camp-f30k.json', record_of('camp-f30k', six, dry=True))
    with pytest.raises(DataError, match='reproduce-camp-f30k.json: is the record of a dry run'):
        read_records(tmp_path)


# files


def test_what_a_row_is_made_from():
    relations = ('boxes', 'triples')
    needs = {model: needs_of(model) for model in PAPERS}
    assert needs == dict(camp=(), ssamt=(), cmsei=relations, hire=relations)
    assert files_of(ROWS['camp-coco-5k']) == [
        '{train,dev,testall}_ims.npy',
        '{train,dev,testall}_caps.txt',
        '{train,dev,testall}_ids.txt',
    ]
    partners = {'predicates.txt', '{train,dev,test}_img_sizes.npy'}
    assert partners < set(files_of(ROWS['hire-f30k']))


# tables


def test_spread_is_mean_and_largest_distance():
    assert spread([1.0, 2.0, 6.0]) == '3.0 ± 3.0'
    assert spread([2.0]) == '2.0'
    assert spread([2.0, 3.0], digits=0) == '2 ± 0'


def test_tables_line_up_and_have_a_cell_for_every_column():
    rows = [['', 'rSum'], ['a long name', '7.0'], ['b', '466.9']]
    assert text_table(rows).split('\n') == [
        '              rSum',
        'a long name    7.0',
        'b            466.9',
    ]
    assert text_table(rows, left=2).split('\n')[1] == 'a long name  7.0'
    lines = markdown_table(rows).split('\n')
    assert lines[1] == '|---|---|'
    assert all(line.count('|') == 3 for line in lines)


def test_a_table_of_an_experiment_has_means_and_empty_cells(tmp_path):
    rows = [
        dict(name='a', seed=0, rsum=1.0, probes=None),
        dict(name='a', seed=1, rsum=3.0, probes=dict(count=50.0)),
        dict(name='b', seed=0, rsum=2.0, probes=None),
    ]
    columns = (('rSum', 'rsum', 1), ('count', 'probes/count', 0))
    write_json(tmp_path / 'tiny.json', dict(rows=rows, columns=columns))
    record = read_experiment(tmp_path, 'tiny')
    assert table(record).split('\n')[2:] == ['| a | 2 | 2.0 ± 1.0 | 50 |', '| b | 1 | 2.0 |  |']
    assert table(record, rows=['b', 'c'], columns=columns[:1]).split('\n')[2:] == [
        '| b | 1 | 2.0 |'
    ]
    write_json(tmp_path / 'old.json', dict(rows={}))
    assert read_experiment(tmp_path, 'old') is read_experiment(tmp_path, 'none') is None


def test_orders_are_compared_by_ranks_and_ties_share_theirs():
    def correlation(*pairs):
        rows = [dict(name=str(k), rsum=x, paper=y) for k, (x, y) in enumerate(pairs)]
        return rank_correlation(dict(rows=rows))

    assert correlation((1, 10), (2, 20), (4, 30)) == pytest.approx(1)
    assert correlation((1, 30), (2, 20), (4, 10)) == pytest.approx(-1)
    # ranks 0, 1, 2 and 0.5, 0.5, 2
    assert correlation((1, 10), (2, 10), (4, 30)) == pytest.approx(3**0.5 / 2)
    assert correlation((1, 10), (2, None), (4, 30)) is None
