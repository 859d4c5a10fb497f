"Lessons as assignments: what students get, what is scored, and what misbehaviour costs."

import ast
import contextlib
import copy
import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from imtm_lite.files import DataError, SettingError
from imtm_lite.workshop import course as course_module
from imtm_lite.workshop.cli import main
from imtm_lite.workshop.course import (
    Assignment,
    bound,
    chosen_lessons,
    directives,
    fault_in,
    functions,
    imported,
    imports_of_module,
    lesson_names,
    lesson_of_module,
    mark_bodies,
    modules_for,
    notebook,
    own_requirements,
    read_lesson,
    read_lessons,
    read_notebook,
    replace_regions,
    score_submission,
    without_answers,
    without_directives,
)

ROOT = Path(__file__).parent.parent
LESSONS = ROOT / 'nbs'
ASSIGNMENTS = read_lessons(LESSONS)
LESSON_OF = lesson_of_module(LESSONS)
EXPORTED = set(LESSON_OF)
each_assignment = pytest.mark.parametrize('a', ASSIGNMENTS, ids=[a.lesson for a in ASSIGNMENTS])


def lines(*lines):
    return '\n'.join(lines)


LESSON = [
    ('markdown', '# Squares\n\n> A small lesson.'),
    ('code', '#| default_exp square'),
    ('code', '#| hide\nfrom math import prod\ndef same(a, b): assert a == b'),
    (
        'code',
        lines(
            '#| export',
            '#| answer square',
            'def square(x):',
            '    "The square of x."',
            '    # by multiplication',
            '    return x * x',
        ),
    ),
    (
        'code',
        lines(
            '#| question square 2',
            'same(square(2), 4)',
            '### BEGIN HIDDEN TESTS',
            'same(square(-3), 9)',
            '### END HIDDEN TESTS',
        ),
    ),
    ('code', '#| question square-of-none 1 square\nsame(square(0), 0)'),
    ('code', 'nine = square(3)'),
    (
        'code',
        lines(
            '#| answer cube',
            'def cube(x):',
            '    ### BEGIN SOLUTION',
            '    return x * square(x)',
            '    ### END SOLUTION',
        ),
    ),
    (
        'code',
        lines(
            '#| question cube',
            'same(cube(3), prod([3, nine]))',
            '### BEGIN HIDDEN TESTS',
            'same(cube(1), 1)',
            '### END HIDDEN TESTS',
        ),
    ),
    ('code', '#| hide\nimport nbdev; nbdev.nbdev_export()'),
]
GIVEN = 'cell-2'
SQUARE = 'cell-3'
TEST = 'cell-4'
CUBE = 'cell-7'
RIGHT = {SQUARE: 'def square(x): return x ** 2', CUBE: 'def cube(x): return x ** 3'}
EVERY = {'square', 'square-of-none', 'cube'}


def saved_cell(kind, text, k):
    "A cell as Jupyter saves it, with outputs that must not get out."
    cell = dict(cell_type=kind, id=f'cell-{k}', metadata={}, source=text.splitlines(True))
    if kind == 'code':
        output = dict(output_type='stream', name='stdout', text=['printed secret\n'])
        cell |= dict(execution_count=7, outputs=[output])
    return cell


def write_book(path, cells, **metadata):
    "A notebook file."
    book = dict(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=5)
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(book), encoding='utf-8')
    return path


def write_lesson(nbs, cells=LESSON):
    "A folder of lessons with one in it."
    saved = [saved_cell(kind, text, k) for k, (kind, text) in enumerate(cells)]
    write_book(nbs / '05_square.ipynb', saved, secret='in metadata')
    return nbs


def read_book(path):
    return json.loads(path.read_text(encoding='utf-8'))


def course(*arguments, cwd=None):
    "`imtm course` in this process, with what it prints and its exit code."
    out = io.StringIO()
    err = io.StringIO()
    argv = sys.argv
    folder = os.getcwd()
    sys.argv = ['imtm', 'course', *map(str, arguments)]
    os.chdir(cwd or folder)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
        os.chdir(folder)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "The small lesson, the notebook that students get, and a place for submissions."
    folder = tmp_path_factory.mktemp('small')
    nbs = write_lesson(folder / 'nbs')
    a = read_lesson(nbs, '05_square')
    return SimpleNamespace(nbs=nbs, a=a, book=notebook(a, blank=True), folder=folder)


def points(small, cells, **limits):
    "The questions that a submission of the small lesson gets right."
    path = write_book(small.folder / 'submission.ipynb', cells)
    limits = dict(limit=2, total=60) | limits
    faults = score_submission(small.a, read_notebook(path)[0], small.nbs, **limits)
    assert list(faults) == ['square', 'square-of-none', 'cube']
    return {name for name, fault in faults.items() if not fault}


def hand_in(small, written):
    "The cells of a submission: id -> what the student made of it, None: deleted."
    cells = copy.deepcopy(small.book['cells'])
    kept = [cell for cell in cells if written.get(cell['id'], '') is not None]
    return [dict(cell, source=written.get(cell['id'], cell['source'])) for cell in kept]


# what students get


def strings(value):
    "Every string in a JSON value, keys too; lists of lines joined."
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return [''.join(value)]
    inner = []
    if isinstance(value, list):
        inner = value
    if isinstance(value, dict):
        inner = [*value, *value.values()]
    return [string for item in inner for string in strings(item)]


def everything(folder):
    "All text in a folder, strings of notebooks as a person reads them."
    texts = []
    for path in Path(folder).rglob('*'):
        if path.suffix in ('.py', '.txt', '.md', '.json', '.jsonl'):
            texts.append(path.read_text(encoding='utf-8'))
        if path.suffix == '.ipynb':
            texts += strings(read_book(path))
    return '\n'.join(texts)


def stripped(text):
    "The lines of a text without their indentation, and without those that are empty."
    lines = [line.strip() for line in text.split('\n')]
    return [line for line in lines if line]


def regions_between_markers(text):
    "What stands between markers, lists of lines."
    regions = []
    inside = False
    for line in stripped(text):
        if re.match('### (BEGIN|END) ', line):
            inside = 'BEGIN' in line
            regions += [[]] if inside else []
        elif inside:
            regions[-1].append(line)
    return regions


def secrets(text):
    "What is nobody else's of what stands between markers: long lines, and three in a row."
    for region in regions_between_markers(text):
        threes = ['\n'.join(region[k : k + 3]) for k in range(len(region) - 2)]
        yield from (piece for piece in region + threes if len(piece) >= 24)


@pytest.fixture(scope='module')
def handout(tmp_path_factory):
    "Every assignment, as students get it."
    folder = tmp_path_factory.mktemp('handout') / 'out'
    assert course('build', '--out', folder).returncode == 0
    return folder


@each_assignment
def test_nothing_secret_is_handed_out(a, handout):
    book = read_book(handout / a.folder / f'{a.folder}.ipynb')
    for cell in book['cells']:
        assert not cell.get('outputs')
        assert not cell.get('execution_count')
    handed = '\n'.join(stripped(everything(handout / a.folder)))
    assert 'BEGIN SOLUTION' not in handed
    assert 'HIDDEN TESTS' not in handed
    hidden = [piece for cell in a.cells for piece in secrets(cell.text)]
    assert len(hidden) >= 3
    prose = '\n'.join(cell.text for cell in a.cells if cell.kind == 'prose')
    given = '\n'.join(stripped('\n'.join(without_answers(cell.text) for cell in a.cells)))
    assert [piece for piece in hidden if piece in handed and piece not in given] == []
    assert [piece for piece in hidden if piece in prose] == []


@each_assignment
@pytest.mark.parametrize('blank', [True, False], ids=['blank', 'the lesson'])
def test_the_blank_notebook_scores_nothing_and_the_lesson_everything(a, blank, tmp_path):
    path = write_book(tmp_path / 'submission.ipynb', notebook(a, blank=blank)['cells'])
    # cores may be busy
    limits = dict(limit=300, total=1800)
    faults = score_submission(a, read_notebook(path)[0], LESSONS, **limits)
    assert faults.keys() == {question.name for question in a.questions}
    right = [name for name, fault in faults.items() if not fault]
    assert right == ([] if blank else list(faults)), faults


# each goes with a lesson beside it that has more: the detector's, attention, the relation prior's
SMALL_ONES = ('regions', 'messages', 'semantic_graph')


@each_assignment
def test_an_assignment_has_questions_a_function_and_a_figure(a):
    answers = [cell.text for cell in a.cells if cell.kind == 'answer' and cell.name]
    assert re.search(r'def \w+', ' '.join(answers))
    if not a.lesson.endswith(SMALL_ONES):
        assert len({question.about for question in a.questions}) >= 2
        assert any('fig' in bound(text) for text in answers), 'a figure is kept in fig'


def test_outputs_metadata_and_cells_for_export_stay_behind(small):
    told = '\n'.join(strings(small.book))
    for word in (
        'secret',
        'nbdev',
        'default_exp',
        '#|',
        'x * x',
        'by multiplication',
        'square(-3)',
    ):
        assert word not in told
    assert '"The square of x."\n    # YOUR CODE HERE\n    raise NotImplementedError()' in told
    assert 'question square, 2 points' in told
    assert 'pip install -r requirements.txt' in told


def python(code, folder):
    "Code run in a folder, with the whole library on the path behind it."
    return subprocess.run(
        [sys.executable, '-c', code],
        cwd=folder,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )


TRY_TO_IMPORT = """
import importlib
import imtm_lite.losses, imtm_lite.regions
from imtm_lite.files import shipped

print(shipped('detector.safetensors'), shipped('sample').is_dir())
for module in ('recall', 'scoring', 'models.camp', 'world.scenes', 'workshop.check'):
    try:
        importlib.import_module(f'imtm_lite.{module}')
    except ModuleNotFoundError as fault:
        print(fault)
"""


def test_the_library_handed_out_ends_before_the_lesson(handout):
    out = python(TRY_TO_IMPORT, handout / LESSON_OF['imtm_lite.recall'])
    assert out.returncode == 0, out.stderr
    shipped, *faults = out.stdout.splitlines()
    assert shipped == 'imtm_lite/shipped/detector.safetensors True'
    assert len(faults) == 5
    assert all('is not part of this assignment' in fault for fault in faults)


def test_requirements_are_those_of_the_assignment(handout):
    lesson = LESSON_OF['imtm_lite.recall']
    needs = (handout / lesson / 'requirements.txt').read_text().split()
    assert {'torch>=2.6', 'fastcore<2', 'jupyterlab'} <= set(needs)
    for other in ('typer', 'accelerate', 'transformers', 'nbformat'):
        assert not any(line.startswith(other) for line in needs)


def test_requirements_need_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(course_module, 'ROOT', tmp_path)
    with pytest.raises(SettingError, match='in a checkout'):
        own_requirements()


def handed_with(module):
    "The modules that go with the lesson of a module."
    modules = modules_for(read_lesson(LESSONS, LESSON_OF[f'imtm_lite.{module}']), LESSONS)
    return {name.removeprefix('imtm_lite.') for name in modules}


def test_a_lesson_gets_earlier_modules_and_what_its_cells_import():
    assert handed_with('regions') == {'files'}
    assert handed_with('losses') == {'files', 'regions', 'text', 'data', 'encoders'}
    spatial = handed_with('spatial')
    assert spatial >= {'models.camp', 'gating', 'world.scenes'}
    later = {'spatial', 'semantic', 'models.cmsei', 'world.detector', 'workshop.relations'}
    assert not spatial & later


def test_a_lesson_beside_the_reading_path_gets_what_its_cells_import():
    assert {'files', 'regions', 'world.scenes'} <= handed_with('world.detector')
    assert not handed_with('world.detector') & {'world.detector', 'text', 'recall', 'attention'}
    relations = handed_with('workshop.relations')
    assert relations >= {'files', 'data', 'spatial', 'semantic', 'world.scenes'}
    assert not relations & {'workshop.relations', 'models.camp', 'explore'}


@each_assignment
def test_what_is_handed_out_imports_what_is_handed_out(a):
    modules = modules_for(a, LESSONS)
    missing = {}
    for module in modules:
        missing[module] = imports_of_module(module) & EXPORTED - modules
    for cell in a.code:
        missing[cell.id] = imported(cell.text, inner=False) & EXPORTED - modules
    own = {module for module, lesson in LESSON_OF.items() if lesson == a.lesson}
    assert {name: wrong - own for name, wrong in missing.items() if wrong - own} == {}


def test_lessons_are_those_of_three_folders(tmp_path):
    names = lesson_names(LESSONS)
    modules = ('recall', 'world.detector', 'workshop.relations')
    places = [names.index(LESSON_OF[f'imtm_lite.{module}']) for module in modules]
    assert places == sorted(places)
    assert len(names) == len(set(names))
    with pytest.raises(SettingError, match='no lessons here'):
        lesson_names(tmp_path)


IMPORTS = """
import imtm_lite.recall, os.path
from . import scenes
from ..data import Split, need
from imtm_lite import load

def later():
    import torch
"""


def test_what_a_text_imports():
    names = {
        'imtm_lite.recall',
        'os.path',
        'imtm_lite.world',
        'imtm_lite.world.scenes',
        'imtm_lite.data',
        'imtm_lite.data.Split',
        'imtm_lite.data.need',
        'imtm_lite',
        'imtm_lite.load',
    }
    assert imported(IMPORTS, 'imtm_lite.world', inner=False) == names
    assert imported(IMPORTS, 'imtm_lite.world') == names | {'torch'}


# markers


@pytest.mark.parametrize(
    'text',
    [
        '### BEGIN SOLUTION\nx',
        '### END SOLUTION',
        '### BEGIN SOLUTION\n### BEGIN SOLUTION\n### END SOLUTION',
        '    ##BEGIN  SOLUTION\n',
    ],
)
def test_a_marker_without_its_partner_is_a_fault(text):
    with pytest.raises(ValueError):
        without_answers(text)


def test_regions_are_replaced_with_their_indentation():
    text = 'a\n  ### BEGIN SOLUTION\n  b\n  ### END SOLUTION\nc'
    assert replace_regions(text, 'SOLUTION', ('one', 'two')) == 'a\n  one\n  two\nc'
    assert replace_regions("s = '### BEGIN SOLUTION'", 'SOLUTION') == "s = '### BEGIN SOLUTION'"


def exported():
    "The cells of all lessons that export functions."
    for lesson in lesson_names(LESSONS):
        for cell in read_notebook(LESSONS / f'{lesson}.ipynb')[0]:
            if cell['cell_type'] != 'code' or 'export' not in directives(cell['source']):
                continue
            text = without_directives(cell['source'])
            if functions(ast.parse(text)):
                yield text


def can_be_asked_for(function):
    return ast.get_docstring(function) is None or len(function.body) > 1


def without_markers(text):
    markers = ('### BEGIN SOLUTION', '### END SOLUTION')
    return '\n'.join(line for line in text.split('\n') if line.strip() not in markers)


def is_asked_for(function, before):
    "It has lost its body, and nothing else."
    documented = ast.get_docstring(before) is not None
    assert ast.get_docstring(function) == ast.get_docstring(before)
    assert ast.dump(function.args) == ast.dump(before.args)
    assert len(function.body) == 1 + documented
    return ast.unparse(function.body[-1]) == 'raise NotImplementedError()'


def test_the_bodies_of_exported_functions_can_be_asked_for():
    for text in exported():
        before = functions(ast.parse(text))
        askable = [name for name, function in before.items() if can_be_asked_for(function)]
        if not askable:
            continue
        # and the others stay as they are
        asked = askable[::2]
        marked = mark_bodies(text, asked)
        assert ast.dump(ast.parse(without_markers(marked))) == ast.dump(ast.parse(text))
        after = functions(ast.parse(without_answers(marked)))
        assert after.keys() == before.keys()
        for name, function in after.items():
            if name in asked:
                assert is_asked_for(function, before[name])
            elif not any(name.startswith(f'{other}.') for other in asked):
                assert ast.dump(function) == ast.dump(before[name])


def test_markers_of_questions_are_not_exported():
    for path in (ROOT / 'imtm_lite').rglob('*.py'):
        text = path.read_text(encoding='utf-8')
        assert not re.search(r'^\s*(#\||### (BEGIN|END))', text, re.M), path


FAULTS = {
    'a question about nothing': ('#| question lonely 1\nassert True', 'has no answer above it'),
    'an answer that nobody tests': (
        '#| answer idle\n### BEGIN SOLUTION\nx = 1\n### END SOLUTION',
        'no question tests',
    ),
    'a question twice': ('#| question square\nassert True', 'is there twice'),
    'points that are none': (
        '#| question other -1 square\nassert True',
        'needs a number of points',
    ),
    'points that are a word': ('#| question other many square\nassert True', 'many'),
    'too many words': ('#| question other 1 square cube\nassert True', 'no more words'),
    'a name that is none': ('#| question Other! 1 square\nassert True', 'is no name'),
    'no function to write': ('#| answer idle\nx = 1', 'no function'),
    'another function': ('#| answer idle h\ndef g(): return 1', 'no function h'),
    'half a marker': ('### BEGIN SOLUTION\nx = 1', 'no END SOLUTION'),
    'hidden tests of nothing': (
        'x = 1\n### BEGIN HIDDEN TESTS\n### END HIDDEN TESTS',
        'outside a question',
    ),
    'a solution in a question': (
        '#| question other 1 square\n### BEGIN SOLUTION\n### END SOLUTION',
        'a solution in a question',
    ),
    'half a hidden test': (
        '#| question other 1 square\n### END HIDDEN TESTS',
        'END HIDDEN TESTS too many',
    ),
}


@pytest.mark.parametrize('text, want', FAULTS.values(), ids=FAULTS.keys())
def test_a_lesson_marked_up_wrongly_is_told_with_its_cell(text, want, tmp_path):
    nbs = write_lesson(tmp_path / 'nbs', LESSON[:-1] + [('code', text)])
    with pytest.raises(SettingError, match=want) as fault:
        read_lesson(nbs, '05_square')
    assert '05_square.ipynb' in str(fault.value)
    assert 'cell-9' in str(fault.value)
    assert '\n' not in str(fault.value)


# due scores


@pytest.mark.parametrize(
    'written, right',
    [
        ({}, set()),
        (RIGHT, EVERY),
        (RIGHT | {SQUARE: 'def square(x): return x * abs(x)'}, {'square-of-none', 'cube'}),
        (RIGHT | {SQUARE: 'def square(x): return 4'}, {'cube'}),
        (RIGHT | {CUBE: 'def cube(x): return 27'}, {'square', 'square-of-none'}),
    ],
    ids=['blank', 'right', 'hidden test', 'half right', 'constant'],
)
def test_answers_get_their_points_and_a_mistake_costs_them_once(small, written, right):
    assert points(small, hand_in(small, written)) == right


MISBEHAVE = {
    'loops for ever': 'while True: pass',
    'loops when called': 'def square(x):\n    while True: pass',
    'swallows every exception': lines(
        'while True:', '    try:', '        while True: pass', '    except BaseException: pass'
    ),
    'prints without end': 'while True: print("x" * 10_000)',
    'ends the process': 'import os; os._exit(0)',
    'exits': 'exit()',
    'exits when called': 'def square(x): raise SystemExit(0)',
    'is killed': 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)',
    'no Python': 'I do not know.',
    'null': 'x = "\0"',
    'surrogate': 'x = "\ud800"',
    'asks': 'x = input()',
    'empty': '',
    'recursion': 'def square(x): return square(x)',
    'fault that cannot be told': lines(
        'class F(Exception):', '    def __str__(self): raise F', 'raise F'
    ),
    'imports it': 'from imtm_lite.square import square',
    'imports the real one': 'from imtm_lite.recall import ranks as square',
    'deleted': None,
}


@pytest.mark.parametrize('cell', MISBEHAVE.values(), ids=MISBEHAVE.keys())
def test_a_cell_that_misbehaves_costs_its_question_and_no_other(small, cell):
    assert points(small, hand_in(small, RIGHT | {SQUARE: cell})) == {'cube'}


def test_a_copy_of_the_process_changes_nothing(small):
    if not hasattr(os, 'fork'):
        pytest.skip('no fork here')
    forks = RIGHT[SQUARE] + '\nimport os; os.fork()'
    assert points(small, hand_in(small, RIGHT | {SQUARE: forks})) == EVERY


@pytest.mark.skipif(sys.platform != 'linux', reason='memory is limited on Linux only')
def test_memory_is_limited(small):
    greedy = 'held = []\nwhile True: held.append(bytearray(2**24))'
    cells = hand_in(small, RIGHT | {SQUARE: greedy})
    assert points(small, cells, memory=2**30, limit=20) == {'cube'}


@pytest.mark.parametrize(
    'line',
    ['', 'x', '[]', '"key"', '{"token": "lock"}', '[' * 9_000 + 'key', '{"fault": ""}'],
    ids=range(7),
)
def test_a_line_that_is_no_reply_is_none(line):
    assert fault_in(line, 'key') is None
    assert fault_in('{"token": "key", "fault": "late"}', 'key') == 'late'


@pytest.mark.parametrize(
    'written',
    [
        {TEST: 'pass', 'cell-5': 'pass', 'cell-8': 'square = cube = 1'},
        {TEST: None, 'cell-5': None, 'cell-8': None},
        {GIVEN: 'def same(a, b): pass'},
        {SQUARE: 'def same(a, b): pass\nsquare = cube = print'},
        {SQUARE: 'def square(x): return 0\nnine = 0\ndef same(a, b): pass'},
    ],
    ids=[
        'tests edited',
        'tests deleted',
        'helper edited',
        'helper redefined',
        'helper and names redefined',
    ],
)
def test_tests_are_the_lessons_whatever_the_student_did_to_them(small, written):
    assert not points(small, hand_in(small, written)) - {'square-of-none'}
    if SQUARE not in written:
        assert points(small, hand_in(small, RIGHT | written)) == EVERY


def test_deleted_and_moved_cells(small):
    cells = hand_in(small, RIGHT)
    # given cells are there again
    kept = [cell for cell in cells if cell['id'] not in (GIVEN, 'cell-6')]
    assert points(small, kept) == EVERY
    # the order is the lesson's
    assert points(small, cells[::-1]) == EVERY
    assert points(small, []) == set()


def test_added_and_changed_cells(small):
    source = 'import math\ndef times(a, b): return a * b\nlast = 0'
    added = dict(cell_type='code', metadata={}, source=source)
    jupyter = added | dict(source='%matplotlib inline\n!ls\n' + source)
    helped = {
        SQUARE: 'def square(x): return times(x, x)',
        CUBE: 'def cube(x): return int(math.pow(x, 3))',
    }
    cells = hand_in(small, RIGHT | helped)
    place = [cell['id'] for cell in cells].index(SQUARE)
    for cell in (added, jupyter):
        assert points(small, cells[:place] + [cell] + cells[place:]) == EVERY
    # an import added to a given cell counts
    changed = {
        GIVEN: 'from math import prod, pow\ndef same(a, b): pass',
        CUBE: 'def cube(x): return pow(x, 3)',
    }
    assert points(small, hand_in(small, RIGHT | changed)) == EVERY


def test_cells_are_known_by_one_of_two_names(small):
    cells = hand_in(small, RIGHT)
    # an editor that drops the ids, but keeps metadata
    nameless = [{name: cell[name] for name in cell if name != 'id'} for cell in cells]
    assert points(small, nameless) == EVERY
    # or the other way round
    assert points(small, [dict(cell, metadata={}) for cell in cells]) == EVERY
    assert points(small, [dict(cell, cell_type='markdown') for cell in cells]) == set()


def test_time_for_the_whole_submission_is_limited(small):
    stuck = {SQUARE: 'while True: pass', CUBE: 'while True: pass'}
    path = write_book(small.folder / 'stuck.ipynb', hand_in(small, stuck))
    faults = score_submission(small.a, read_notebook(path)[0], small.nbs, limit=60, total=2)
    assert all(faults.values())
    assert 'no time' in faults['cube']


# files and commands

NO_NOTEBOOKS = [
    '',
    'Dear Sir or Madam',
    '[]',
    '{"cells": 3}',
    '{"cells": ["x"]}',
    '{"worksheets": []}',
    '[' * 100_000,
    '\xff\xfe',
    '{"cells": [], "metadata": {}, "nbformat": 9, "nbformat_minor": 0}',
    '{"cells": [], "metadata": 3, "nbformat": 4, "nbformat_minor": 5}',
]


@pytest.mark.parametrize('content', NO_NOTEBOOKS, ids=range(len(NO_NOTEBOOKS)))
def test_what_is_no_notebook_gets_one_line(content, tmp_path):
    (tmp_path / 'x.ipynb').write_bytes(content.encode('latin-1'))
    with pytest.raises(DataError) as fault:
        read_notebook(tmp_path / 'x.ipynb')
    assert '\n' not in str(fault.value)
    with pytest.raises(DataError):
        read_notebook(tmp_path / 'none.ipynb')


def test_odd_cells_are_read_as_far_as_they_go(small):
    odd = [
        dict(metadata={}),
        dict(cell_type='code', metadata={}),
        dict(cell_type='code', id=3, metadata={}, source=3),
        dict(cell_type='code', id=3, metadata={}, source=None),
        dict(cell_type='code', metadata=dict(nbgrader='x'), source={}),
        dict(cell_type='code', metadata=dict(nbgrader=dict(grade_id=['x'])), source='1'),
    ]
    assert points(small, odd + hand_in(small, RIGHT)) == EVERY


@pytest.mark.parametrize(
    'cell',
    [
        dict(),
        dict(cell_type='code'),
        dict(cell_type='code', metadata=[], source=''),
        dict(cell_type='code', metadata={}, source=[1, None]),
        dict(cell_type='code', metadata={}, id=['x'], source=''),
    ],
    ids=range(5),
)
def test_cells_that_cannot_be_read_get_one_line(cell, tmp_path):
    path = write_book(tmp_path / 'odd.ipynb', [cell])
    with pytest.raises(DataError, match='cannot be read') as fault:
        read_notebook(path)
    assert '\n' not in str(fault.value)


def test_without_nbformat_one_line_says_how_to_get_it(small, monkeypatch):
    monkeypatch.setitem(sys.modules, 'nbformat', None)
    with pytest.raises(SettingError, match='pip install nbformat') as fault:
        read_notebook(small.nbs / '05_square.ipynb')
    assert '\n' not in str(fault.value)


NUMBERS = {
    '': ['05_a', '07_b', '12_c', 'world/02_d', 'workshop/04_e'],
    '05-10': ['05_a', '07_b'],
    '12': ['12_c'],
    '5,12': ['05_a', '12_c'],
    '2,world/02': ['world/02_d'],
    '12,workshop/1-9': ['12_c', 'workshop/04_e'],
}


@pytest.mark.parametrize('wanted', NUMBERS)
def test_numbers_of_lessons(wanted):
    every = [Assignment(name, []) for name in NUMBERS['']]
    assert [a.lesson for a in chosen_lessons(every, wanted)] == NUMBERS[wanted]


@pytest.mark.parametrize('wanted', ['06', 'all', '5-', '13-20', '2', '04', 'world/04', '/05', '5 '])
def test_numbers_of_no_lesson(wanted):
    every = [Assignment(name, []) for name in NUMBERS['']]
    with pytest.raises(SettingError, match='--lessons'):
        chosen_lessons(every, wanted)


@pytest.mark.parametrize(
    'content, want', [('{"cube": 5}', [2, 1, 5]), ('{"square": 0}', [0, 1, 1])]
)
def test_other_points(small, content, want, tmp_path):
    (tmp_path / 'points.json').write_text(content)
    a = read_lessons(small.nbs, tmp_path / 'points.json')[0]
    assert [question.points for question in a.questions] == want


@pytest.mark.parametrize(
    'content, want',
    [
        ('{"cubes": 5}', 'no question cubes'),
        ('[1]', 'holds no points'),
        ('{"cube": -1}', 'holds no points'),
        ('{"cube": "5"}', 'holds no points'),
        ('{', 'cannot be read'),
    ],
)
def test_points_that_are_none(small, content, want, tmp_path):
    (tmp_path / 'points.json').write_text(content)
    with pytest.raises((SettingError, DataError), match=want):
        read_lessons(small.nbs, tmp_path / 'points.json')


@pytest.fixture
def built(small, tmp_path):
    "A folder with the small lesson handed out, and the options that name it."
    nbs = ('--nbs', small.nbs)
    out = course('build', '--out', 'out', *nbs, cwd=tmp_path)
    assert out.returncode == 0
    assert '3 questions, 4 points' in out.stdout
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    book = tmp_path / 'out' / '05_square' / '05_square.ipynb'
    return SimpleNamespace(folder=tmp_path, nbs=nbs, book=book)


def answered(book, written):
    "A notebook that was handed out, with answers."
    cells = [cell | dict(source=written.get(cell['id'], cell['source'])) for cell in book['cells']]
    return book | dict(cells=cells)


def test_folders_that_are_there_and_lessons_that_are_not(built):
    again = course('build', '--out', 'out', *built.nbs, cwd=built.folder)
    assert again.returncode == 2
    assert again.stderr.count('\n') == 1
    assert 'is there already' in again.stderr
    nowhere = course('build', '--out', 'other', '--nbs', built.folder, cwd=built.folder)
    assert nowhere.returncode == 2
    assert 'no lessons here' in nowhere.stderr
    assert not (built.folder / 'other').exists()


def test_scores_files_and_exit_codes(built):
    folder = built.folder
    book = answered(read_book(built.book), RIGHT)
    (folder / 'anna.ipynb').write_text(json.dumps(book))
    (folder / 'essay.ipynb').write_text('Dear Sir or Madam')
    shutil.copy(built.book, folder / 'bob.ipynb')
    files = ('anna.ipynb', 'essay.ipynb', 'bob.ipynb')
    done = course('check', *files, '--json', 'scores.json', *built.nbs, cwd=folder)
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1
    assert 'essay.ipynb' in done.stderr
    assert 'not answered' in done.stdout
    scores = read_book(folder / 'scores.json')
    points = {name: (score['points'], score['of']) for name, score in scores.items()}
    assert points == {'anna.ipynb': (4, 4), 'bob.ipynb': (0, 4)}
    unanswered = dict(points=0, of=2, fault='NotImplementedError')
    assert scores['bob.ipynb']['questions']['square'] == unanswered
    assert course('check', 'bob.ipynb', *built.nbs, cwd=folder).returncode == 0


def test_a_submission_without_its_note_needs_the_lesson(built):
    book = answered(read_book(built.book), RIGHT)
    del book['metadata']['imtm_course']
    (built.folder / 'anna.ipynb').write_text(json.dumps(book))
    lost = course('check', 'anna.ipynb', *built.nbs, cwd=built.folder)
    assert lost.returncode == 2
    assert '--lesson' in lost.stderr
    told = course('check', 'anna.ipynb', '--lesson', '05', *built.nbs, cwd=built.folder)
    assert ' 4 ' in told.stdout
    shutil.move(built.folder / 'anna.ipynb', built.folder / 'anna_05_square.ipynb')
    named = course('check', 'anna_05_square.ipynb', *built.nbs, cwd=built.folder)
    assert ' 4 ' in named.stdout


def test_other_points_than_those_handed_out_are_told(built):
    (built.folder / 'points.json').write_text('{"cube": 5}')
    options = ('--points', 'points.json', *built.nbs)
    out = course('check', built.book, *options, cwd=built.folder)
    assert 'was handed out with other points' in out.stdout
    assert 'other points' not in course('check', built.book, *built.nbs, cwd=built.folder).stdout


def test_a_lesson_beside_the_reading_path_has_a_folder_of_one_name(tmp_path):
    nbs = write_lesson(tmp_path / 'nbs')
    (nbs / 'world').mkdir()
    (nbs / '05_square.ipynb').rename(nbs / 'world' / '05_square.ipynb')
    options = ('--lessons', 'world/05', '--nbs', nbs)
    assert course('build', '--out', 'out', *options, cwd=tmp_path).returncode == 0
    book = tmp_path / 'out' / 'world-05_square' / 'world-05_square.ipynb'
    assert 'Assignment world-05_square' in ' '.join(strings(read_book(book)))
    out = course('check', book, '--nbs', nbs, cwd=tmp_path)
    assert out.returncode == 0
    assert 'world/05_square' in out.stdout


def test_figures_are_kept(tmp_path):
    draw = lines(
        '#| answer look',
        '### BEGIN SOLUTION',
        'import matplotlib.pyplot as plt',
        'fig, ax = plt.subplots()',
        '### END SOLUTION',
    )
    cells = LESSON[:-1] + [('code', draw), ('code', '#| question look\nassert fig.axes')]
    nbs = write_lesson(tmp_path / 'nbs', cells)
    a = read_lesson(nbs, '05_square')
    path = write_book(tmp_path / 'anna.ipynb', notebook(a, blank=False)['cells'])
    faults = score_submission(a, read_notebook(path)[0], nbs, figures=tmp_path / 'anna')
    assert not any(faults.values())
    assert [path.name for path in tmp_path.glob('*.png')] == ['anna-look-7-1.png']


def test_the_two_commands_of_the_readme(tmp_path):
    "Hands out and checks an assignment, with the commands as they stand in README.md."
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    commands = re.findall(r'^\.venv/bin/imtm course (.*)$', readme, re.M)
    assert [command.split()[0] for command in commands] == ['build', 'check']
    build = shlex.split(commands[0])
    check = shlex.split(commands[1])
    assert course(*build, cwd=tmp_path).returncode == 0
    a = ASSIGNMENTS[0]
    handed = tmp_path / build[build.index('--out') + 1]
    submission = tmp_path / check[1]
    submission.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(handed / a.folder / f'{a.folder}.ipynb', submission)
    out = course(*check, cwd=tmp_path)
    assert out.returncode == 0
    assert all(question.name in out.stdout for question in a.questions)
    assert out.stdout.count('not answered') == len(a.questions)


# nbgrader


def nbgrader(folder, *arguments):
    # it calls its own tools by name
    tools = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    out = subprocess.run(
        [sys.executable, '-m', 'nbgrader', *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=dict(os.environ, PATH=tools),
    )
    assert out.returncode == 0, out.stderr


def test_nbgrader_makes_the_same_release_and_the_same_scores(small, tmp_path):
    pytest.importorskip('nbgrader')
    options = ('--out', 'handout', '--source', 'source', '--nbs', small.nbs)
    assert course('build', *options, cwd=tmp_path).returncode == 0
    config = "get_config().CourseDirectory.course_id = 'itm'\n"
    (tmp_path / 'nbgrader_config.py').write_text(config)
    nbgrader(tmp_path, 'generate_assignment', '05_square')

    def cells(folder):
        book = read_book(tmp_path / folder / '05_square' / '05_square.ipynb')
        return [(cell['cell_type'], ''.join(cell['source'])) for cell in book['cells']]

    assert cells('handout') == cells('release')
    assert cells('handout') != cells('source')
    wrong = {SQUARE: 'def square(x): return x * abs(x)'}
    for name, written in dict(anna=RIGHT, bob={}, carl=RIGHT | wrong).items():
        home = tmp_path / 'submitted' / name / '05_square'
        shutil.copytree(tmp_path / 'handout' / '05_square', home)
        book = answered(read_book(home / '05_square.ipynb'), written)
        (home / '05_square.ipynb').write_text(json.dumps(book))
    nbgrader(tmp_path, 'autograde', '05_square')
    nbgrader(tmp_path, 'export')
    rows = csv.DictReader((tmp_path / 'grades.csv').read_text().splitlines())
    grades = {row['student_id']: (float(row['score']), float(row['max_score'])) for row in rows}
    assert grades == dict(anna=(4, 4), bob=(0, 4), carl=(2, 4))
