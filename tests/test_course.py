"Lessons as assignments: what students get, what is scored, and what happens to submissions that misbehave."

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

import pytest

from imtm_lite.files import DataError, SettingError
from imtm_lite.workshop.cli import main
from imtm_lite.workshop.course import (
    bare,
    bound,
    choose,
    directives,
    functions,
    mark_bodies,
    notebook,
    plain_cell,
    read_lesson,
    read_lessons,
    read_notebook,
    replace_regions,
    score,
    without_answers,
)

ROOT = Path(__file__).parent.parent
LESSONS = ROOT / 'nbs'
ASSIGNMENTS = read_lessons(LESSONS)
LESSON = [
    ('markdown', '# Squares\n\n> A small lesson.'),
    ('code', '#| default_exp square'),
    ('code', '#| hide\nfrom math import prod\ndef same(a, b): assert a == b'),
    (
        'code',
        '#| export\n#| answer square\ndef square(x):\n    "The square of x."\n    # by multiplication\n    return x * x',
    ),
    (
        'code',
        '#| question square 2\nsame(square(2), 4)\n### BEGIN HIDDEN TESTS\nsame(square(-3), 9)\n### END HIDDEN TESTS',
    ),
    ('code', '#| question square-of-none 1 square\nsame(square(0), 0)'),
    ('code', 'nine = square(3)'),
    (
        'code',
        '#| answer cube\ndef cube(x):\n    ### BEGIN SOLUTION\n    return x * square(x)\n    ### END SOLUTION',
    ),
    (
        'code',
        '#| question cube\nsame(cube(3), prod([3, nine]))\n### BEGIN HIDDEN TESTS\nsame(cube(1), 1)\n### END HIDDEN TESTS',
    ),
    ('code', '#| hide\nimport nbdev; nbdev.nbdev_export()'),
]
SQUARE, GIVEN, TEST, CUBE = (f'cell-{k}' for k in (3, 2, 4, 7))
RIGHT = {SQUARE: 'def square(x): return x ** 2', CUBE: 'def cube(x): return x ** 3'}


def write(path, cells):
    "A notebook file as Jupyter saves it, with outputs that must not get out."
    made = [
        dict(cell_type=kind, id=f'cell-{k}', metadata={}, source=text.splitlines(True))
        | (
            {}
            if kind == 'markdown'
            else dict(
                execution_count=7,
                outputs=[dict(output_type='stream', name='stdout', text=['printed secret\n'])],
            )
        )
        for k, (kind, text) in enumerate(cells)
    ]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(
        json.dumps(
            dict(cells=made, metadata=dict(secret='in metadata'), nbformat=4, nbformat_minor=5)
        ),
        encoding='utf-8',
    )
    return path


def course(*arguments, cwd=None):
    "`imtm course` in this process, with what it prints and its exit code."
    out = io.StringIO()
    err = io.StringIO()
    before = (sys.argv, os.getcwd())
    sys.argv = ['imtm', 'course', *map(str, arguments)]
    code = 0
    if cwd:
        os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "The small lesson, and the notebook that students get."
    nbs = write(tmp_path_factory.mktemp('small') / 'nbs/05_square.ipynb', LESSON).parent
    a = read_lesson(nbs / '05_square.ipynb')
    return nbs, a, notebook(a, blank=True)


def points(small, cells, **limits):
    "The questions that a submission of the small lesson gets right."
    nbs, a, _ = small
    faults = score(a, [plain_cell(c) for c in cells], nbs, **dict(limit=2, total=60) | limits)
    assert list(faults) == ['square', 'square-of-none', 'cube']
    return {name for name, fault in faults.items() if not fault}


def hand_in(small, written):
    "The cells of a submission: id -> what the student made of it, None: deleted."
    return [
        dict(c, source=written.get(c['id'], c['source']))
        for c in copy.deepcopy(small[2]['cells'])
        if written.get(c['id'], '') is not None
    ]


EVERY = {'square', 'square-of-none', 'cube'}


# what students get


def everything(folder):
    "All text in a folder, strings of notebooks as a person reads them."
    parts = []
    for path in Path(folder).rglob('*'):
        if path.suffix in ('.py', '.txt', '.md', '.json', '.jsonl'):
            parts.append(path.read_text(encoding='utf-8'))
        if path.suffix == '.ipynb':
            parts += strings(json.loads(path.read_text(encoding='utf-8')))
    return '\n'.join(parts)


def strings(x):
    "Every string in a JSON value, keys too; lists of lines joined."
    if isinstance(x, str):
        return [x]
    if isinstance(x, list) and all(isinstance(s, str) for s in x):
        return [''.join(x)]
    return [
        s
        for part in (x if isinstance(x, list) else [*x, *x.values()] if isinstance(x, dict) else [])
        for s in strings(part)
    ]


def secrets(text):
    "The lines between markers that are long enough to be nobody else's."
    secret = []
    inside = False
    for line in text.split('\n'):
        if re.match(r'\s*### (BEGIN|END) ', line):
            inside = 'BEGIN' in line
        elif inside and len(line.strip()) >= 16:
            secret.append(line.strip())
    return secret


@pytest.mark.parametrize('a', ASSIGNMENTS, ids=lambda a: a.lesson)
def test_nothing_secret_is_handed_out(a, tmp_path):
    assert course('build', '--out', tmp_path / 'out', '--lessons', a.lesson[:2]).returncode == 0
    book = json.loads((tmp_path / 'out' / a.lesson / f'{a.lesson}.ipynb').read_text())
    assert not [
        c
        for c in book['cells']
        if c['cell_type'] == 'code' and (c['outputs'] or c['execution_count'])
    ]
    handed = everything(tmp_path / 'out')
    given = '\n'.join(c.text for c in a.cells if c.kind in ('given', 'prose')) + '\n'.join(
        without_answers(c.text) for c in a.cells
    )
    assert 'BEGIN SOLUTION' not in handed and 'HIDDEN TESTS' not in handed
    hidden = [line for c in a.cells for line in secrets(c.text)]
    assert len(hidden) >= 3
    assert [line for line in hidden if line in handed and line not in given] == []
    assert [
        line
        for line in hidden
        if line in given and any(line in c.text for c in a.cells if c.kind == 'prose')
    ] == []


@pytest.mark.parametrize('a', ASSIGNMENTS, ids=lambda a: a.lesson)
def test_the_blank_notebook_scores_nothing_and_the_lesson_everything(a):
    for blank in (True, False):
        # cores may be busy
        faults = score(
            a,
            [plain_cell(c) for c in notebook(a, blank=blank)['cells']],
            LESSONS,
            limit=300,
            total=1800,
        )
        assert faults.keys() == {q.name for q in a.questions}
        assert all(map(bool, faults.values())) if blank else not any(faults.values()), faults


@pytest.mark.parametrize('a', ASSIGNMENTS, ids=lambda a: a.lesson)
def test_an_assignment_has_questions_a_figure_and_data(a):
    assert len({q.about for q in a.questions}) >= 2
    assert any('fig' in bound(c.text) for c in a.cells if c.kind == 'answer' and c.name), (
        'one question asks for a figure, kept in fig'
    )
    assert re.search(r'def \w+', ' '.join(c.text for c in a.cells if c.kind == 'answer'))


def test_outputs_metadata_and_cells_for_export_stay_behind(small):
    told = '\n'.join(strings(small[2]))
    assert (
        'secret' not in told
        and 'nbdev' not in told
        and 'default_exp' not in told
        and '#|' not in told
    )
    assert 'x * x' not in told and 'by multiplication' not in told and 'square(-3)' not in told
    assert '"The square of x."\n    # YOUR CODE HERE\n    raise NotImplementedError()' in told
    assert 'question square, 2 points' in told and 'pip install -r requirements.txt' in told


def test_the_library_handed_out_ends_before_the_lesson(tmp_path):
    assert course('build', '--out', tmp_path / 'out', '--lessons', '12').returncode == 0
    here = tmp_path / 'out/12_recall'
    # the whole library is on the path behind it
    run = lambda code: subprocess.run(
        [sys.executable, '-c', code],
        cwd=here,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert (
        run(
            'import imtm_lite.losses, imtm_lite.regions; print(imtm_lite.regions.load_detector())'
        ).returncode
        == 0
    )
    for module in ('recall', 'scoring', 'models.camp'):
        fault = run(f'import imtm_lite.{module}').stderr
        assert 'ModuleNotFoundError' in fault and 'not part of this assignment' in fault
    needs = (here / 'requirements.txt').read_text().split()
    assert (
        'torch>=2.6' in needs
        and 'fastcore<2' in needs
        and not any(n.startswith(('typer', 'accelerate', 'transformers')) for n in needs)
    )


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
    assert (
        replace_regions(
            'a\n  ### BEGIN SOLUTION\n  b\n  ### END SOLUTION\nc', 'SOLUTION', ('one', 'two')
        )
        == 'a\n  one\n  two\nc'
    )
    assert replace_regions("s = '### BEGIN SOLUTION'", 'SOLUTION') == "s = '### BEGIN SOLUTION'"


def exported():
    for path in sorted(LESSONS.glob('[0-9]*.ipynb')):
        for c in read_notebook(path)[0]:
            if (
                c['cell_type'] == 'code'
                and 'export' in directives(c['source'])
                and (text := bare(c['source']))
                and functions(ast.parse(text))
            ):
                yield text


def test_the_bodies_of_exported_functions_can_be_asked_for():
    for text in exported():
        before = {n: f for n, f in functions(ast.parse(text)).items()}
        asked = [n for n, f in before.items() if ast.get_docstring(f) is None or len(f.body) > 1]
        if not asked:
            continue
        # and the others stay as they are
        some = asked[::2]
        marked = mark_bodies(text, some)
        assert ast.dump(
            ast.parse(
                '\n'.join(
                    l
                    for l in marked.split('\n')
                    if l.strip() not in ('### BEGIN SOLUTION', '### END SOLUTION')
                )
            )
        ) == ast.dump(ast.parse(text))
        after = functions(ast.parse(without_answers(marked)))
        assert after.keys() == before.keys()
        for name, f in after.items():
            if name not in some:
                assert ast.dump(f) == ast.dump(before[name])
            else:
                said = ast.get_docstring(before[name])
                assert ast.get_docstring(f) == said and ast.dump(f.args) == ast.dump(
                    before[name].args
                )
                assert (
                    len(f.body) == 1 + (said is not None)
                    and ast.unparse(f.body[-1]) == 'raise NotImplementedError()'
                )


def test_markers_of_questions_are_not_exported():
    for path in (ROOT / 'imtm_lite').rglob('*.py'):
        assert not re.search(
            r'^\s*(#\||### (BEGIN|END))', path.read_text(encoding='utf-8'), re.M
        ), path


FAULTS = {
    'a question about nothing': (
        ('code', '#| question lonely 1\nassert True'),
        'has no answer above it',
    ),
    'an answer that nobody tests': (
        ('code', '#| answer idle\n### BEGIN SOLUTION\nx = 1\n### END SOLUTION'),
        'no question tests',
    ),
    'a question twice': (('code', '#| question square\nassert True'), 'is there twice'),
    'points that are none': (
        ('code', '#| question other -1 square\nassert True'),
        'needs a number of points',
    ),
    'points that are a word': (('code', '#| question other many square\nassert True'), 'many'),
    'a name that is none': (('code', '#| question Other! 1 square\nassert True'), 'is no name'),
    'no function to write': (('code', '#| answer idle\nx = 1'), 'no function'),
    'another function': (('code', '#| answer idle h\ndef g(): return 1'), 'no function h'),
    'half a marker': (('code', '### BEGIN SOLUTION\nx = 1'), 'no END SOLUTION'),
    'hidden tests of nothing': (
        ('code', 'x = 1\n### BEGIN HIDDEN TESTS\n### END HIDDEN TESTS'),
        'outside a question',
    ),
    'a solution in a question': (
        ('code', '#| question other 1 square\n### BEGIN SOLUTION\n### END SOLUTION'),
        'a solution in a question',
    ),
    'half a hidden test': (
        ('code', '#| question other 1 square\n### END HIDDEN TESTS'),
        'END HIDDEN TESTS too many',
    ),
}


@pytest.mark.parametrize('cell, said', FAULTS.values(), ids=FAULTS.keys())
def test_a_lesson_marked_up_wrongly_is_told_with_its_cell(cell, said, tmp_path):
    path = write(tmp_path / 'nbs/05_square.ipynb', LESSON[:-1] + [cell])
    with pytest.raises(SettingError, match=said) as fault:
        read_lesson(path)
    assert (
        '05_square.ipynb' in str(fault.value)
        and 'cell-9' in str(fault.value)
        and '\n' not in str(fault.value)
    )


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
    'swallows every exception': 'while True:\n    try:\n        while True: pass\n    except BaseException: pass',
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
    'fault that cannot be told': 'class F(Exception):\n    def __str__(self): raise F\nraise F',
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
    assert (
        points(small, hand_in(small, RIGHT | {SQUARE: RIGHT[SQUARE] + '\nimport os; os.fork()'}))
        == EVERY
    )


@pytest.mark.skipif(sys.platform != 'linux', reason='memory is limited on Linux only')
def test_memory_is_limited(small):
    assert points(
        small,
        hand_in(small, RIGHT | {SQUARE: 'held = []\nwhile True: held.append(bytearray(2**24))'}),
        memory=2**30,
        limit=20,
    ) == {'cube'}


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


def test_deleted_changed_and_added_cells(small):
    cells = hand_in(small, RIGHT)
    # given cells are there again
    assert points(small, [c for c in cells if c['id'] not in (GIVEN, 'cell-6')]) == EVERY
    # the order is the lesson's
    assert points(small, cells[::-1]) == EVERY
    added = dict(
        cell_type='code', metadata={}, source='import math\ndef times(a, b): return a * b\nlast = 0'
    )
    helped = hand_in(
        small,
        RIGHT
        | {
            SQUARE: 'def square(x): return times(x, x)',
            CUBE: 'def cube(x): return int(math.pow(x, 3))',
        },
    )
    place = [c['id'] for c in helped].index(SQUARE)
    assert points(small, helped[:place] + [added] + helped[place:]) == EVERY
    assert (
        points(
            small,
            helped[:place]
            + [added | dict(source='%matplotlib inline\n!ls\n' + added['source'])]
            + helped[place:],
        )
        == EVERY
    )
    changed = hand_in(
        small,
        RIGHT
        | {
            GIVEN: 'from math import prod, pow\ndef same(a, b): pass',
            CUBE: 'def cube(x): return pow(x, 3)',
        },
    )
    # an import added to a given cell counts
    assert points(small, changed) == EVERY
    nameless = [{k: v for k, v in c.items() if k != 'id'} for c in cells]
    # an editor that drops the ids, but keeps metadata
    assert points(small, nameless) == EVERY
    # or the other way round
    assert points(small, [dict(c, metadata={}) for c in cells]) == EVERY
    assert points(small, [dict(c, cell_type='markdown') for c in cells]) == set()
    assert points(small, []) == set()


def test_time_for_the_whole_submission_is_limited(small):
    nbs, a, _ = small
    stuck = hand_in(small, {SQUARE: 'while True: pass', CUBE: 'while True: pass'})
    faults = score(a, [plain_cell(c) for c in stuck], nbs, limit=60, total=2)
    assert all(faults.values()) and 'no time' in faults['cube']


# files and commands


@pytest.mark.parametrize(
    'content',
    [
        '',
        'Dear Sir or Madam',
        '[]',
        '{"cells": 3}',
        '{"cells": ["x"]}',
        '{"worksheets": []}',
        '[' * 100_000,
        '\xff\xfe',
    ],
    ids=range(8),
)
def test_what_is_no_notebook_gets_one_line(content, tmp_path):
    (tmp_path / 'x.ipynb').write_bytes(content.encode('latin-1'))
    with pytest.raises(DataError) as fault:
        read_notebook(tmp_path / 'x.ipynb')
    assert '\n' not in str(fault.value)


def test_odd_cells_are_read_as_far_as_they_go(small):
    odd = [
        dict(),
        dict(cell_type='code'),
        dict(cell_type='code', id=3, metadata=[], source=[1, None]),
        dict(cell_type='code', metadata=dict(nbgrader='x'), source={}),
        dict(cell_type='code', metadata=dict(nbgrader=dict(grade_id=['x'])), source='1'),
    ]
    assert points(small, odd + hand_in(small, RIGHT)) == EVERY


def test_numbers_of_lessons():
    class Named:
        def __init__(self, lesson):
            self.lesson = lesson

    every = [Named(n) for n in ('05_a', '07_b', '12_c')]
    names = lambda wanted: [a.lesson for a in choose(every, wanted)]
    assert (
        names('') == ['05_a', '07_b', '12_c']
        and names('05-10') == ['05_a', '07_b']
        and names('12') == ['12_c']
        and names('5,12') == ['05_a', '12_c']
    )
    for wanted in ('06', 'all', '5-', '13-20'):
        with pytest.raises(SettingError, match='--lessons'):
            choose(every, wanted)


def test_other_points(small, tmp_path):
    for content, want in (('{"cube": 5}', [2, 1, 5]), ('{"square": 0}', [0, 1, 1])):
        (tmp_path / 'points.json').write_text(content)
        assert [
            q.points for q in read_lessons(small[0], tmp_path / 'points.json')[0].questions
        ] == want
    for content, said in (
        ('{"cubes": 5}', 'no question cubes'),
        ('[1]', 'holds no points'),
        ('{"cube": -1}', 'holds no points'),
        ('{', 'cannot be read'),
    ):
        (tmp_path / 'points.json').write_text(content)
        with pytest.raises((SettingError, DataError), match=said):
            read_lessons(small[0], tmp_path / 'points.json')


def test_commands_files_and_exit_codes(small, tmp_path):
    nbs = ('--nbs', small[0])
    out = course('build', '--out', 'out', *nbs, cwd=tmp_path)
    assert (
        out.returncode == 0
        and '3 questions, 4 points' in out.stdout
        and sorted(p.name for p in tmp_path.iterdir()) == ['out']
    )
    again = course('build', '--out', 'out', *nbs, cwd=tmp_path)
    assert (
        again.returncode == 2
        and again.stderr.count('\n') == 1
        and 'is there already' in again.stderr
    )
    nowhere = course('build', '--out', 'other', '--nbs', tmp_path, cwd=tmp_path)
    assert (
        nowhere.returncode == 2
        and 'no lessons here' in nowhere.stderr
        and not (tmp_path / 'other').exists()
    )

    book = json.loads((tmp_path / 'out/05_square/05_square.ipynb').read_text())
    book['cells'] = [dict(c, source=RIGHT.get(c['id'], c['source'])) for c in book['cells']]
    (tmp_path / 'anna.ipynb').write_text(json.dumps(book))
    (tmp_path / 'essay.ipynb').write_text('Dear Sir or Madam')
    shutil.copy(tmp_path / 'out/05_square/05_square.ipynb', tmp_path / 'bob.ipynb')
    done = course(
        'check',
        'anna.ipynb',
        'essay.ipynb',
        'bob.ipynb',
        '--json',
        'scores.json',
        *nbs,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'essay.ipynb' in done.stderr
    scores = json.loads((tmp_path / 'scores.json').read_text())
    assert {k: (v['points'], v['of']) for k, v in scores.items()} == {
        'anna.ipynb': (4, 4),
        'bob.ipynb': (0, 4),
    }
    assert (
        scores['bob.ipynb']['questions']['square']
        == dict(points=0, of=2, fault='NotImplementedError')
        and 'not answered' in done.stdout
    )
    assert course('check', 'bob.ipynb', *nbs, cwd=tmp_path).returncode == 0

    del book['metadata']['imtm_course']
    (tmp_path / 'anna.ipynb').write_text(json.dumps(book))
    lost = course('check', 'anna.ipynb', *nbs, cwd=tmp_path)
    assert lost.returncode == 2 and '--lesson' in lost.stderr
    assert ' 4 ' in course('check', 'anna.ipynb', '--lesson', '05', *nbs, cwd=tmp_path).stdout


def test_figures_are_kept(tmp_path):
    cells = LESSON[:-1] + [
        (
            'code',
            '#| answer look\n### BEGIN SOLUTION\nimport matplotlib.pyplot as plt\nfig, ax = plt.subplots()\n### END SOLUTION',
        ),
        ('code', '#| question look\nassert fig.axes'),
    ]
    nbs = write(tmp_path / 'nbs/05_square.ipynb', cells).parent
    a = read_lesson(nbs / '05_square.ipynb')
    faults = score(
        a,
        [plain_cell(c) for c in notebook(a, blank=False)['cells']],
        nbs,
        figures=tmp_path / 'anna',
    )
    assert not any(faults.values()) and [p.name for p in tmp_path.glob('*.png')] == [
        'anna-look-7-1.png'
    ]


def test_the_two_commands_of_the_readme(tmp_path):
    "Hands out and checks an assignment, with the commands as they stand in README.md."
    commands = re.findall(
        r'^\.venv/bin/imtm course (.*)$', (ROOT / 'README.md').read_text(encoding='utf-8'), re.M
    )
    assert [c.split()[0] for c in commands] == ['build', 'check']
    build, check = map(shlex.split, commands)
    assert course(*build, cwd=tmp_path).returncode == 0
    handed = tmp_path / build[build.index('--out') + 1]
    submission = tmp_path / check[1]
    submission.parent.mkdir(parents=True, exist_ok=True)
    a = ASSIGNMENTS[0]
    shutil.copy(handed / a.lesson / f'{a.lesson}.ipynb', submission)
    out = course(*check, cwd=tmp_path)
    assert (
        out.returncode == 0
        and all(q.name in out.stdout for q in a.questions)
        and out.stdout.count('not answered') == len(a.questions)
    )


def test_nbgrader_makes_the_same_release_and_the_same_scores(small, tmp_path):
    pytest.importorskip('nbgrader')

    def nbgrader(*args):
        out = subprocess.run(
            [sys.executable, '-m', 'nbgrader', *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            # it calls its own tools by name
            env=dict(
                os.environ, PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
            ),
        )
        assert out.returncode == 0, out.stderr

    assert (
        course(
            'build', '--out', 'handout', '--source', 'source', '--nbs', small[0], cwd=tmp_path
        ).returncode
        == 0
    )
    (tmp_path / 'nbgrader_config.py').write_text("get_config().CourseDirectory.course_id = 'itm'\n")
    nbgrader('generate_assignment', '05_square')
    cells = lambda folder: [
        (c['cell_type'], ''.join(c['source']))
        for c in json.loads((tmp_path / folder / '05_square/05_square.ipynb').read_text())['cells']
    ]
    assert cells('handout') == cells('release') != cells('source')
    for name, written in dict(
        anna=RIGHT, bob={}, carl=RIGHT | {SQUARE: 'def square(x): return x * abs(x)'}
    ).items():
        shutil.copytree(tmp_path / 'handout/05_square', tmp_path / 'submitted' / name / '05_square')
        path = tmp_path / 'submitted' / name / '05_square/05_square.ipynb'
        book = json.loads(path.read_text())
        book['cells'] = [dict(c, source=written.get(c['id'], c['source'])) for c in book['cells']]
        path.write_text(json.dumps(book))
    nbgrader('autograde', '05_square')
    nbgrader('export')
    rows = csv.DictReader((tmp_path / 'grades.csv').read_text().splitlines())
    assert {r['student_id']: (float(r['score']), float(r['max_score'])) for r in rows} == dict(
        anna=(4, 4), bob=(0, 4), carl=(2, 4)
    )
