# make demo   a world, two models trained, a table and a picture
# make test   ruff, the tests, and every notebook from top to bottom
# make lab    the lessons in JupyterLab
# make readme README.md from nbs/index.ipynb
# make bench  speed and memory of every model beside its plain form, on one core
# make detector  train the mini detector again
# make package   source archive and wheel, in dist/

PYTHON ?= python3
BIN = .venv/bin
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)

.PHONY: demo test lab readme bench detector package

demo: .venv/installed
	$(BIN)/imtm demo --out runs/demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q tests

lab: .venv/installed
	$(BIN)/jupyter lab nbs

readme: .venv/installed
	$(BIN)/python -m tools.readme

bench: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench

detector: .venv/installed
	$(BIN)/python -m imtm_lite.world.detector imtm_lite/shipped/detector.safetensors

package: .venv/installed
	$(BIN)/python -m build

.venv/installed: constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.10 to 3.13 is needed, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
