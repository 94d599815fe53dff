# `make quickstart` and `make test` set up a virtual environment of their own and need nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test runs slow docs lint clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jdiff needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ $(VENV)/.run

quickstart: $(VENV)/.run  ## train a small DiT on OpenMoji and make a picture (about ten minutes on two cores)
	$(BIN)/python launch.py --config configs/quickstart.py

test: $(VENV)/.dev lint  ## the fast tests
	$(BIN)/python -m pytest -n auto --dist loadfile

runs: $(VENV)/.dev  ## small models trained, resumed and sampled, and every command of the README and of docs/ at a small size
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "runs and not slow"

slow: $(VENV)/.dev  ## full sizes and long runs
	$(BIN)/python -m pytest -m slow

docs: $(VENV)/.dev  ## of those the commands alone
	$(BIN)/python -m pytest -m "runs or not runs" tests/test_docs.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV)
