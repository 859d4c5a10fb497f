"Every notebook runs from top to bottom (cells marked slow or cuda are left out)."

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NBS = ROOT / 'nbs'
FOLDERS = ('.', 'world', 'workshop')
NOTEBOOKS = [path for folder in FOLDERS for path in sorted((NBS / folder).glob('*.ipynb'))]
TEST = 'from nbdev.test import nbdev_test; nbdev_test({path!r}, n_workers=0, do_print=True)'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=[str(path.relative_to(NBS)) for path in NOTEBOOKS])
def test_notebook_runs(path):
    out = subprocess.run(
        [sys.executable, '-c', TEST.format(path=str(path))],
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, (out.stdout + out.stderr)[-3000:]
