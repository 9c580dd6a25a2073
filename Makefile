# One command each; python3 with venv, and make, are all they need. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
READY := $(VENV)/.ready
BENCH := $(VENV)/.ready-bench
PEERS := $(VENV)/peers
ROOMS := limiter worker producer pocketfleet
SIDE_BY_SIDE := -n 4 --dist worksteal
UV := uv>=0.9,<1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check reliability soak bench lock clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## make .venv with the pinned dependencies; quick when nothing changed

demo: $(READY) ## 100 users, two calls each, four worker processes, five users at a time
	$(BIN)/python -m examples.demo

test: $(READY) ## all tests, four at a time: most wait for processes
	$(BIN)/pytest $(SIDE_BY_SIDE)

check: $(READY) ## what CI runs: format, lint, types, import rules, tests with warnings as errors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -W error $(SIDE_BY_SIDE)
	$(BIN)/pytest -W error --doctest-modules $(ROOMS)

reliability: $(READY) ## break everything that can break here; writes docs/reliability.md (about 15 minutes)
	$(BIN)/python -m tests.reliability

soak: $(READY) ## the long tests, then a storm of faults for SOAK_MINUTES (20), with an account at its end
	$(BIN)/pytest -W error -m long
	$(BIN)/python -m tests.soak

bench: $(BENCH) ## measure speed and cost; prints the README's table
	$(BIN)/python -m benchmarks

lock: ## write requirements/*.txt anew from pyproject.toml
	PYTHON="$(PYTHON)" UV="$(UV)" sh requirements/lock.sh

clean: ## remove what the other commands made, .venv included; your data in .pocketfleet stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find $(ROOMS) tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(READY): pyproject.toml requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("PocketFleet needs Python 3.11 or newer, and $(PYTHON) is %d.%d: run make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes -r requirements/dev.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(BENCH): $(READY) requirements/bench.txt requirements/peers.txt
	$(PIP) install --require-hashes -r requirements/bench.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --quiet --disable-pip-version-check install --require-hashes -r requirements/peers.txt
	@touch $@
