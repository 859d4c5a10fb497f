"""The package away from its checkout: a wheel in a fresh environment with nothing but what it
declares, in an empty folder."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest

from imtm_lite.workshop.cli import NEEDED

ROOT = Path(__file__).parent.parent


def settings():
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def name_of(requirement):
    "torch>=2.6 -> torch; numpy ; extra == 'x' -> numpy"
    return re.match(r'[\w.-]+', requirement)[0].lower().replace('_', '-')


def declared(kind='requirements'):
    return [name_of(requirement) for requirement in settings()[kind].split()]


# without PYTHONPATH and its like, through which the checkout would be seen
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}


def call(*words, **how):
    return subprocess.run([*map(str, words)], capture_output=True, text=True, **how)


def run_quietly(*words, **how):
    out = call(*words, **how)
    assert out.returncode == 0, (out.stdout + out.stderr)[-3000:]
    return out


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "A source archive, and the wheel that is built from it."
    pytest.importorskip('build')
    source = tmp_path_factory.mktemp('source') / 'imtm_lite'
    unwanted = shutil.ignore_patterns('__pycache__')
    for name in ('imtm_lite', 'nbs', 'data/results'):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for path in [*ROOT.iterdir(), ROOT / 'data' / 'README.md']:
        if path.is_file() and not path.name.startswith('.'):
            shutil.copy(path, source / path.relative_to(ROOT))
    out = tmp_path_factory.mktemp('dist')
    build = ('-m', 'build', '--no-isolation', '-o', out)
    run_quietly(sys.executable, *build, cwd=source, env=CLEAN)
    return out


@pytest.fixture(scope='module')
def wheel(dist):
    return next(dist.glob('*.whl'))


def test_the_archive_holds_what_a_build_and_a_reader_need(dist):
    with tarfile.open(next(dist.glob('*.tar.gz'))) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE'} <= names
    assert {'CHANGELOG.md', 'CITATION.cff', 'CONTRIBUTING.md', 'data/README.md'} <= names
    assert 'nbs/index.ipynb' in names and 'imtm_lite/shipped/detector.safetensors' in names
    assert 'imtm_lite/_modidx.py' not in names


def test_the_wheel_holds_the_library_and_what_is_shipped(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name for name in names if name.endswith('METADATA'))
        about = archive.read(info).decode()
    library = {p.relative_to(ROOT).as_posix() for p in ROOT.glob('imtm_lite/**/*.py')}
    shipped = {p.relative_to(ROOT).as_posix() for p in ROOT.glob('imtm_lite/shipped/**/*.*')}
    ours = library | shipped | {'imtm_lite/py.typed'}
    assert {name for name in names if 'dist-info' not in name} == ours - {'imtm_lite/_modidx.py'}
    assert 'License-Expression: Apache-2.0' in about and 'Classifier: Typing :: Typed' in about
    assert f'Version: {settings()["version"]}\n' in about


IMPORTED_AS = {'PIL': 'pillow'}  # where the name of a module is not that of its package
STANDARD = {*sys.stdlib_module_names, 'imtm_lite'}


def imported_by(path):
    "Packages that a module imports, late imports included."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition('.')[0]


def test_what_is_imported_is_declared():
    optional = ('torchtext', 'transformers', 'spacy', 'course')
    known = {name for kind in optional for name in declared(f'{kind}_requirements')}
    known |= {*declared(), 'tokenizers'}  # which transformers brings along
    for path in (ROOT / 'imtm_lite').rglob('*.py'):
        packages = {IMPORTED_AS.get(name, name) for name in set(imported_by(path)) - STANDARD}
        assert packages <= known, f'{path.name}: {packages - known} not in settings.ini'


def test_doctor_looks_at_what_is_declared():
    assert sorted(NEEDED) == sorted(declared())
    assert 'torchtext' not in declared()


def test_importing_the_library_takes_no_time():
    program = (
        'import time; t = time.perf_counter(); import imtm_lite; print(time.perf_counter() - t)'
    )
    times = [float(run_quietly(sys.executable, '-c', program).stdout) for _ in range(3)]
    assert min(times) < 0.2, times


def with_their_own(names):
    "Packages and what they require in turn, as far as it is installed here."
    seen = set()
    waiting = list(names)
    while waiting:
        name = name_of(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # of another system, or of another version of Python
        waiting += [need for need in needs if 'extra ==' not in need]
    return seen


def link_packages(names, folder):
    "The files of installed packages, below another folder; nothing else comes along."
    for name in names:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in files} - {'..', '__pycache__'}:
            link = folder / top
            if not link.exists():
                link.symlink_to(metadata.distribution(name).locate_file(top))


@pytest.fixture(scope='module')
def elsewhere(wheel, tmp_path_factory):
    "Runs a program of a fresh environment, which has the wheel, in an empty folder."
    home = tmp_path_factory.mktemp('fresh')
    venv.create(home / 'env', with_pip=False)
    python = home / 'env' / 'bin' / 'python'
    install = ('pip', '--python', python, 'install', '--no-index', '--no-deps', wheel)
    run_quietly(sys.executable, '-m', *install, env=CLEAN)
    (home / 'packages').mkdir()
    link_packages(with_their_own(declared()), home / 'packages')
    site = next((home / 'env' / 'lib').glob('python*/site-packages'))
    (site / 'declared.pth').write_text(f'{home / "packages"}\n')
    (home / 'empty').mkdir()

    def call_there(program, *words):
        return call(home / 'env' / 'bin' / program, *words, cwd=home / 'empty', env=CLEAN)

    return call_there


def test_the_fresh_environment_knows_nothing_of_the_checkout(elsewhere):
    out = elsewhere('python', '-c', 'import imtm_lite; print(imtm_lite.__file__)')
    assert 'site-packages' in out.stdout and str(ROOT) not in out.stdout, out.stderr
    for name in ('nbdev', 'fastcore', 'pytest', 'torchtext', 'transformers'):
        assert elsewhere('python', '-c', f'import {name}').returncode, f'{name} is there'


SMALL = ('--set', 'width=16', '--set', 'word_width=8', '--min-freq', '1')
WALK = [
    ('doctor',),
    ('world', 'world', '--train', 40, '--dev', 10, '--test', 10),
    ('check', 'world'),
    ('train', 'scan', '--data', 'world', '--out', 'run', '--epochs', 1, *SMALL),
    ('eval', 'run', '--data', 'world'),
    ('search', 'run', 'a dog is running', '--data', 'world'),
    ('reproduce', 'cmsei-f30k', '--dry-run'),
]


def test_the_whole_walk_in_an_empty_folder(elsewhere):
    for words in WALK:
        began = time.time()
        out = elsewhere('imtm', *words)
        assert out.returncode == 0, f'{words}: {out.stdout}{out.stderr}'
        print(f'{words[0]}: {time.time() - began:.0f} s')


def test_what_needs_a_checkout_says_so_in_one_line(elsewhere):
    out = elsewhere('imtm', 'course', 'build', '--out', 'handout')
    assert out.returncode == 2 and out.stderr.count('\n') == 1, out.stderr
    assert out.stderr.startswith('imtm: ') and 'checkout of imtm_lite' in out.stderr
