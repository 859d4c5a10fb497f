"The house rules: the library is what the notebooks export, notebooks are clean, imports are few, README is the index."

import ast
import filecmp
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The project's sources, to be exported and cleaned without touching them."
    root = tmp_path_factory.mktemp('copy')
    for name in ('nbs', 'imtm_lite'):
        shutil.copytree(
            ROOT / name,
            root / name,
            ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'),
        )
    for name in ('settings.ini', 'setup.py'):
        shutil.copy(ROOT / name, root)
    return root


def test_the_library_is_what_the_notebooks_export(copy):
    for path in (copy / 'imtm_lite').rglob('*.py'):
        if path.name != '__init__.py':
            path.unlink()
    subprocess.run(
        [sys.executable, '-c', 'import nbdev; nbdev.nbdev_export()'],
        cwd=copy,
        check=True,
        env=dict(__import__('os').environ, PYTHONPATH=str(copy)),
    )
    # _modidx.py is nbdev's own notes: not in git, not shipped
    ours, theirs = (
        {p.relative_to(r): p for p in (r / 'imtm_lite').rglob('*.py') if p.name != '_modidx.py'}
        for r in (ROOT, copy)
    )
    assert ours.keys() == theirs.keys()
    assert [str(n) for n in ours if not filecmp.cmp(ours[n], theirs[n], shallow=False)] == [], (
        'run nbdev_export'
    )


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_clean(path, copy):
    there = copy / 'nbs' / path.name
    subprocess.run(
        [sys.executable, '-c', f'from nbdev.clean import nbdev_clean; nbdev_clean({str(there)!r})'],
        cwd=copy,
        check=True,
    )
    assert there.read_bytes() == path.read_bytes(), 'run nbdev_clean'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_have_the_form_of_a_lesson(path):
    cells = json.loads(path.read_text())['cells']
    code = [c for c in cells if c['cell_type'] == 'code']
    first = ''.join(cells[0]['source']).split('\n')
    assert first[0].startswith('# ') and any(line.startswith('> ') for line in first)
    assert any(c['outputs'] for c in code), 'commit it executed'
    assert not [o for c in code for o in c['outputs'] if o['output_type'] == 'error']
    assert not re.search('/work/|/root/|/home/|ipykernel_', path.read_text())


def floors():
    "module -> number of the notebook that exports it."
    found = {}
    for path in NOTEBOOKS:
        name = re.search(r'#\| default_exp ([\w.]+)', path.read_text())
        if name:
            found[name[1]] = int(path.stem[:2])
    return found


def test_modules_import_only_earlier_lessons():
    number = floors()
    for name, floor in number.items():
        tree = ast.parse((ROOT / 'imtm_lite' / f"{name.replace('.', '/')}.py").read_text())
        # a relative import of level 1 starts here
        package = name.split('.')[:-1]
        inside = [
            '.'.join((package[: len(package) + 1 - n.level] if n.level else []) + [n.module or ''])
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom)
            and (n.level or (n.module or '').startswith('imtm_lite'))
        ]
        for module in inside:
            module = module.removeprefix('imtm_lite').strip('.')
            assert module == '' or number[module] < floor, f'{name} imports {module}'


ALLOWED = 'torch numpy einops safetensors accelerate typer tqdm matplotlib'


def test_the_library_imports_and_trains_without_nbdev_fastcore_torchtext(world, tmp_path):
    code = f'''
import importlib, pkgutil, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('nbdev', 'fastcore', 'torchtext', 'execnb', 'torchvision', 'timm', 'transformers', 'IPython', 'PIL', 'matplotlib', 'spacy'):
            raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Blocked())
import imtm_lite
for m in pkgutil.walk_packages(imtm_lite.__path__, 'imtm_lite.'): importlib.import_module(m.name)
from imtm_lite.runs import train
train('scan', {str(world)!r}, {str(tmp_path / 'run')!r}, arguments=dict(width=8, word_width=8), epochs=1, size=40, per_image=1, progress=False, device='cpu')
from imtm_lite.text import torchtext_vocab
try: torchtext_vocab(['a dog'])
except ImportError as fault: print('one line:', str(fault).count('\\n') == 0)
'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert 'one line: True' in out.stdout


def test_exported_modules_name_no_other_packages():
    # rich comes with typer, Pillow with matplotlib; the last four are optional and imported late
    allowed = (
        set(ALLOWED.split())
        | {'imtm_lite', 'rich', 'PIL', 'torchtext', 'transformers', 'tokenizers', 'spacy'}
        | set(sys.stdlib_module_names)
    )
    for path in (ROOT / 'imtm_lite').rglob('*.py'):
        if path.name == '_modidx.py':
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for name in names:
                assert name.split('.')[0] in allowed, f'{path.name} imports {name}'


def test_readme_is_the_index():
    from tools.readme import readme

    assert (ROOT / 'README.md').read_text(encoding='utf-8') == readme(ROOT / 'nbs/index.ipynb'), (
        'run make readme'
    )


def test_readme_links_exist():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    for link in re.findall(r'\]\(([^)#]+)\)', text):
        if not link.startswith('http'):
            assert (ROOT / link).exists(), link
