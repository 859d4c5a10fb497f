"The rules of the house: which room may enter which, and that library, README and notebooks agree."

import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from configparser import ConfigParser
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from imtm_lite.workshop.course import imported, lesson_names

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / 'imtm_lite'
LESSONS = [*lesson_names(ROOT / 'nbs'), 'index']
GROUND = 'files'  # which every room stands on, wherever its notebook is


def python(code, *, folder=ROOT, path=ROOT):
    "Code run by a fresh Python in a folder, with the library that lies in another."
    return subprocess.run(
        [sys.executable, '-c', code],
        cwd=folder,
        env=dict(os.environ, PYTHONPATH=str(path)),
        capture_output=True,
        text=True,
    )


def path_of(module):
    return LIBRARY / f'{module.replace(".", "/")}.py'


def modules_of_the_library():
    "Their names, without those that only make a folder a package."
    paths = [
        path for path in LIBRARY.rglob('*.py') if path.name not in ('__init__.py', '_modidx.py')
    ]
    return sorted('.'.join(path.relative_to(LIBRARY).with_suffix('').parts) for path in paths)


MODULES = modules_of_the_library()
WINGS = ('world.', 'workshop.')
CORE = [module for module in MODULES if not module.startswith(WINGS)]
MODELS = [module for module in MODULES if module.startswith('models.')]


@cache
def names_in(module, *, inner=True):
    "Dotted names of what a module imports; inner: inside functions too."
    package = f'imtm_lite.{module}'.rpartition('.')[0]
    return imported(path_of(module).read_text(encoding='utf-8'), package, inner=inner)


def imports_of(module):
    return {other for other in MODULES if f'imtm_lite.{other}' in names_in(module)}


IMPORTS = {module: imports_of(module) for module in MODULES}


def wrong_imports(modules, allowed):
    "The imports of some modules that are not allowed: module -> what it imports."
    wrong = {}
    for module in modules:
        others = sorted(other for other in IMPORTS[module] if not allowed(module, other))
        if others:
            wrong[module] = others
    return wrong


# rooms


def test_the_core_imports_neither_world_nor_workshop():
    assert wrong_imports(CORE, lambda module, other: other in CORE) == {}


def test_the_world_does_not_import_the_workshop():
    world = [module for module in MODULES if module.startswith('world.')]
    assert wrong_imports(world, lambda module, other: not other.startswith('workshop.')) == {}


def lesson_of_modules():
    "The notebooks that export each module: module -> names of lessons."
    lessons = defaultdict(list)
    for lesson in LESSONS:
        text = (ROOT / 'nbs' / f'{lesson}.ipynb').read_text(encoding='utf-8')
        name = re.search(r'#\| default_exp ([\w.]+)', text)
        if name:
            lessons[name[1]].append(lesson)
    return lessons


def test_every_module_has_its_notebook():
    lessons = lesson_of_modules()
    assert sorted(lessons) == MODULES
    assert {module: names for module, names in lessons.items() if len(names) > 1} == {}


def test_each_lesson_has_a_number_of_its_own():
    numbers = [lesson.split('_')[0] for lesson in LESSONS]
    assert sorted(number for number in set(numbers) if numbers.count(number) > 1) == []


def test_notebooks_lie_where_their_modules_do():
    for module, (lesson,) in lesson_of_modules().items():
        folder = lesson.rpartition('/')[0]
        if module != GROUND:
            assert folder == (module.split('.')[0] if module.startswith(WINGS) else ''), module


def test_floors_of_the_core_go_one_way():
    "A module of the reading path imports modules of earlier lessons only."
    lessons = lesson_of_modules()
    floors = {module: int(lessons[module][0][:2]) for module in CORE if module != GROUND}
    floors[GROUND] = 0

    def is_below(module, other):
        return other not in floors or floors[other] < floors[module]

    assert wrong_imports(CORE, is_below) == {}


def test_no_imports_go_in_circles():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as fault:
        pytest.fail(' > '.join(fault.args[1]))


# what opens, writes or draws
HANDS = {
    'pathlib',
    'os',
    'io',
    'shutil',
    'json',
    'csv',
    'pickle',
    'safetensors',
    'matplotlib',
    'PIL',
}
OPENERS = {'open', 'read_text', 'read_bytes', 'write_text', 'write_bytes', 'savefig', 'imread'}
SAVERS = {'torch.load', 'torch.save', 'np.load', 'np.save', 'numpy.load', 'numpy.save'}


@pytest.mark.parametrize('module', MODELS)
def test_models_open_no_file_and_draw_nothing(module):
    names = names_in(module)
    assert not {name.split('.')[0] for name in names} & HANDS
    for room in ('data.Split', 'files', 'explore', 'results', 'checkpoints'):
        assert f'imtm_lite.{room}' not in names
    for node in ast.walk(ast.parse(path_of(module).read_text(encoding='utf-8'))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called.split('.')[-1] not in OPENERS, called
            assert called not in SAVERS


# public names that two modules may share, each with its reason
SHARED = {}


def names_bound(assignment):
    "Names on the left; what a comprehension calls its items is nobody's business."
    for target in assignment.targets:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                yield node.id


def public_names(module):
    "The functions, classes and constants that a module defines at its top."
    for node in ast.parse(path_of(module).read_text(encoding='utf-8')).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        if isinstance(node, ast.Assign):
            yield from names_bound(node)
        if isinstance(node, ast.AnnAssign):
            yield node.target.id


def test_each_public_name_exists_once():
    homes = defaultdict(set)
    for module in MODULES:
        for name in public_names(module):
            if not name.startswith('_'):
                homes[name].add(module)
    twice = {name: sorted(modules) for name, modules in homes.items() if len(modules) > 1}
    assert {name: modules for name, modules in twice.items() if name not in SHARED} == {}


# notebooks and what is made of them


@pytest.fixture(scope='module')
def anew(tmp_path_factory):
    "The project exported and its notebooks cleaned, in a copy."
    root = tmp_path_factory.mktemp('copy')
    junk = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'shipped')
    for name in ('nbs', 'imtm_lite'):
        shutil.copytree(ROOT / name, root / name, ignore=junk)
    for name in ('settings.ini', 'setup.py'):
        shutil.copy(ROOT / name, root)
    for module in MODULES:
        (root / path_of(module).relative_to(ROOT)).unlink()
    (root / 'imtm_lite' / '_modidx.py').unlink(missing_ok=True)
    code = 'import nbdev, nbdev.clean; nbdev.nbdev_export(); nbdev.clean.nbdev_clean()'
    out = python(code, folder=root, path=root)
    assert out.returncode == 0, out.stderr
    return root


def python_files(root):
    "The modules of a copy of the library, by their place in it."
    paths = [path for path in (root / 'imtm_lite').rglob('*.py') if path.name != '_modidx.py']
    return {path.relative_to(root).as_posix() for path in paths}  # nbdev's index is not in git


def test_the_library_is_what_the_notebooks_export(anew):
    names = python_files(ROOT)
    assert names == python_files(anew)
    same, changed, lost = filecmp.cmpfiles(ROOT, anew, names, shallow=False)
    assert sorted(changed + lost) == [], 'run nbdev_export'


def test_notebooks_are_clean(anew):
    names = [f'nbs/{lesson}.ipynb' for lesson in LESSONS]
    same, changed, lost = filecmp.cmpfiles(ROOT, anew, names, shallow=False)
    assert sorted(changed + lost) == [], 'run nbdev_clean'


@pytest.mark.parametrize('lesson', LESSONS)
def test_notebooks_have_the_form_of_a_lesson(lesson):
    text = (ROOT / 'nbs' / f'{lesson}.ipynb').read_text(encoding='utf-8')
    cells = json.loads(text)['cells']
    first = ''.join(cells[0]['source']).split('\n')
    assert first[0].startswith('# ')
    assert any(line.startswith('> ') for line in first)
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    assert outputs, 'commit it executed'
    assert not [output for output in outputs if output['output_type'] == 'error']
    assert not re.search('/work/|/root/|/home/|ipykernel_|IProgress', text)


def test_ruff_has_nothing_to_say():
    pytest.importorskip('ruff')
    places = ['imtm_lite', 'tools', 'benchmarks', 'tests', 'nbs']
    out = subprocess.run(
        [sys.executable, '-m', 'ruff', 'check', '-q', '--output-format', 'concise', *places],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stdout + out.stderr


# what it needs

BLOCKED = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked}:
            raise ImportError('blocked: ' + name)

sys.meta_path.insert(0, Blocked())
import imtm_lite
for module in pkgutil.walk_packages(imtm_lite.__path__, 'imtm_lite.'):
    importlib.import_module(module.name)

from imtm_lite.runs import train
train(
    'scan', {data!r}, {run!r}, arguments=dict(width=8, word_width=8),
    epochs=1, size=40, per_image=1, progress=False, device='cpu',
)

from imtm_lite.text import torchtext_vocab
try:
    torchtext_vocab(['a dog'])
except ImportError as fault:
    print('one line:', str(fault).count('\\n') == 0)
"""
NOT_NEEDED = (
    'nbdev fastcore execnb IPython torchtext torchvision timm transformers '
    'PIL matplotlib spacy nbformat'
)


def test_the_library_imports_and_trains_without_what_is_not_needed(world, tmp_path):
    run = str(tmp_path / 'run')
    out = python(BLOCKED.format(blocked=NOT_NEEDED.split(), data=str(world), run=run))
    assert out.returncode == 0, out.stderr
    assert 'one line: True' in out.stdout


# installed under another name, or brought along
COMES_WITH = {'PIL': 'pillow', 'tokenizers': 'transformers'}


def declared():
    "The packages of settings.ini: those that everybody gets, and those of extras for users."
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    packages = {}
    for kind, lines in config['DEFAULT'].items():
        if kind.endswith('requirements'):
            packages[kind] = {re.match(r'[\w-]+', line)[0] for line in lines.split()}
    needed = packages.pop('requirements')
    packages.pop('dev_requirements')
    return needed, set().union(*packages.values())


def packages_in(module, *, inner):
    "The packages of others that a module imports, as they are installed."
    first = {name.split('.')[0] for name in names_in(module, inner=inner)}
    others = first - set(sys.stdlib_module_names) - {'imtm_lite'}
    return {COMES_WITH.get(name, name) for name in others}


@pytest.mark.parametrize('module', MODULES)
def test_modules_import_what_is_declared(module):
    needed, wanted = declared()
    assert packages_in(module, inner=False) <= needed
    assert packages_in(module, inner=True) <= needed | wanted


# the README


def test_readme_is_the_index():
    from tools.readme import readme

    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert text == readme(ROOT / 'nbs' / 'index.ipynb'), 'run make readme'


def test_readme_links_exist():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    for link in re.findall(r'\]\(([^)#]+)\)', text):
        if not link.startswith('http'):
            assert (ROOT / link).exists(), link
