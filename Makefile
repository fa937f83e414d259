# make demo    the whole system on generated scenes, nothing to install by hand
# make test    style, types and all quick tests (a missing server skips; with CI=true it fails)
# make check   style and types alone
# make story       three companies, from a job to a release, by real commands: embedded and over real servers
# make test-slow   training runs of minutes
# make chaos       tests that kill processes and servers at random moments; SECONDS=600 SEED=1
# make bench, make servers, make clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test check story test-slow chaos bench servers format clean

demo: $(VENV)/.site
	$(BIN)/fedqueue demo

# Two modules at a time, because most of them wait for servers and sites; each worker has servers of its own.
test: check
	$(PYTEST) -n 2 --dist loadfile -m "not slow and not chaos"

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

story: $(VENV)/.test
	$(PYTEST) -m slow tests/e2e/test_three_companies.py

test-slow: $(VENV)/.test
	$(PYTEST) -m slow

# The run of SECONDS s; what SEED chooses is in tests/chaos/plan.py. Its tables go to runs/chaos-<SEED>.md.
SECONDS ?= 600
SEED ?= 1

chaos: $(VENV)/.test
	CHAOS_SECONDS=$(SECONDS) CHAOS_SEED=$(SEED) $(PYTEST) -m chaos -s

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.merge
	$(BIN)/python -m benchmarks.backlog
	$(BIN)/python -m benchmarks.loading

# Real servers with accounts on free ports, for trying things by hand; prints the settings, ends with Ctrl-C.
servers: $(VENV)/.test
	$(BIN)/python -m tests.servers

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedqueue needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

# About 5 GB: torch brings its CUDA packages, and works on the CPU.
$(VENV)/.site: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[site]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[site,test]'
	@touch $@ $(VENV)/.site

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
