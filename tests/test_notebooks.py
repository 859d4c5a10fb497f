"Every notebook runs from top to bottom (cells marked slow or cuda are left out)."

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize('path', sorted((ROOT / 'nbs').glob('*.ipynb')), ids=lambda p: p.stem)
def test_notebook_runs(path):
    out = subprocess.run(
        [
            sys.executable,
            '-c',
            f'from nbdev.test import nbdev_test; nbdev_test({str(path)!r}, n_workers=0, do_print=True)',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, (out.stdout + out.stderr)[-3000:]
