# Everything runs from a fresh clone: each target sets up what it needs.
#   make demo      live-migrate a running guest between two processes
#   make test      the tests            (ARGS="-k name" picks some)
#   make check     format, lint, types, layers
#   make setup     only the set-up:     .venv with the package and its compiled parts
#   make clean     remove all that the others made
# PYTHON=python3.12 chooses the interpreter (3.11 or newer) that .venv is made from.

PYTHON ?= python3
ARGS   ?=

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.set-up
NATIVE := $(VENV)/.native

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format clean
.DELETE_ON_ERROR:

help:
	@sed -n '2,7s/^# \{0,3\}//p' Makefile

setup: $(STAMP) $(NATIVE)

$(STAMP): pyproject.toml tools/setup.sh
	@sh tools/setup.sh '$(PYTHON)' '$(VENV)'
	@touch $@

# The compiled parts are optional: without them all works, more slowly, and the program says so.
$(NATIVE): $(STAMP) setup.py $(wildcard migrate/*.[ch] migrate/vm/riscv64/compiled/*.[ch])
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: setup
	$(BIN)/migrate demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py tests/test_repo.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find migrate tests tools -name __pycache__ -prune -exec rm -rf {} +
	find migrate -name '*.so' -delete
