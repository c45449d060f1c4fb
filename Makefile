# `make demo` and `make test` do all the set-up on a fresh machine; see README.md.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Wheels of the CPU build are taken where pip finds them; constraints.txt pins every version that was tested.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-slow lint types imports check clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) -e '.[dev]'
	touch $@

demo: $(VENV)/installed ## train, record, analyse and report on the built-in stream
	$(BIN)/driftlens demo

test: $(VENV)/installed-dev ## the default test suite, on every core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(VENV)/installed-dev ## tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-dev ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed-dev ## strict type checking
	$(BIN)/mypy

imports: $(VENV)/installed-dev ## import contracts between the rooms
	$(BIN)/lint-imports

check: lint types imports test ## everything that must pass before a change lands

clean: ## remove the environment and caches (runs stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
