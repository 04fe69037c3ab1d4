# Needs only make and Python 3.11, 3.12 or 3.13. `make` lists what it can do.

.PHONY: help setup quickstart test fast lint types floor docs tables tpu check lock clean
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

export PYTHON  # which interpreter makes the environments; empty: the newest that is found
BIN := .venv/bin

help:  ## this list
	@echo 'make TARGET [PYTHON=python3.12]'
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/  \1\t\2/p' Makefile | expand -t 14

setup:  ## create .venv and install the versions of requirements.txt
	@.ci/venv .venv requirements.txt

quickstart: setup  ## train and evaluate on the embedded data set, a few minutes on a laptop
	$(BIN)/ghm-jax train experiments/quickstart.py
	$(BIN)/ghm-jax evaluate runs/quickstart

test: setup  ## the whole test suite
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

fast: setup  ## the tests not marked slow
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

lint: setup  ## ruff: rules and format
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check

types: setup  ## pyright
	@$(BIN)/python -m pyright

floor:  ## the fast tests on the oldest versions that pyproject.toml allows, in .venv-floor
	@.ci/venv .venv-floor requirements-floor.txt
	@.venv-floor/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

docs: setup  ## the documentation's site, into site/
	@$(BIN)/python .ci/config_page.py
	@$(BIN)/python -m zensical build --clean --strict
	@$(BIN)/python .ci/formulas.py site

tables: setup  ## write the tables of measured results into README.md and docs/
	@$(BIN)/python .ci/tables.py

tpu: setup  ## the tests that need the compiler for TPUs, where it can be installed (into .cache/)
	@if $(BIN)/python -m pip install --quiet --no-deps --upgrade --target .cache/libtpu "libtpu==0.0.42.*"; \
	then PYTHONPATH=$(CURDIR)/.cache/libtpu $(BIN)/python -m pytest tests/analysis/test_compiled.py; \
	else echo 'no libtpu for this machine: tests skipped'; fi

check: lint types test tpu floor  ## what CI runs

lock:  ## regenerate both requirements files from pyproject.toml (the only target that needs uv)
	uv pip compile --quiet --upgrade --universal --extra dev \
	    --no-emit-package ghm-jax pyproject.toml -o requirements.txt
	uv pip compile --quiet --upgrade --universal --extra test --resolution lowest-direct \
	    --no-emit-package ghm-jax pyproject.toml -o requirements-floor.txt

clean:  ## remove environments and caches; never data/ or runs/
	rm -rf .venv .venv-floor .pytest_cache .ruff_cache .cache build dist site
	find ghm_jax experiments tests -name __pycache__ -prune -exec rm -rf {} +
