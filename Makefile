# Every target works on a machine that has only Python 3.11 or later, make and a C compiler.
# `make` alone lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PYTEST_ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# Two runs at once must not install into the same environment: the second waits, then finds it done.
LOCK := $(if $(shell command -v flock),flock Makefile)
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1
# -P keeps the checkout off sys.path: tests see what is installed, as a user does.
PYTEST := $(OFFLINE) $(BIN)/python -P -m pytest
# Files of tests share what they have quantized: each stays in one process.
PARALLEL := -n $(WORKERS) --dist loadfile
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup test test-all coverage check fix demo bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile | expand -t 18

setup: $(STAMP) ## create .venv and install dq with everything the tests need

$(STAMP): pyproject.toml constraints.txt
	@$(LOCK) sh -euc '\
	if [ "$@" -nt pyproject.toml ] && [ "$@" -nt constraints.txt ]; then exit 0; fi; \
	if [ -z "$(PYTHON)" ]; then echo "dq needs Python 3.11 or later; install python3.11" >&2; exit 1; fi; \
	echo "installing dq into $(VENV)"; \
	"$(PYTHON)" -m venv "$(VENV)" || { \
	  echo "no virtual environment: install the venv module (Debian: python3.11-venv)" >&2; exit 1; }; \
	$(PIP) setuptools; \
	$(PIP) --no-build-isolation -e ".[dev]"; \
	touch "$@"'

test: setup ## run the tests that need neither a GPU nor much time; no network
	$(PYTEST) $(PARALLEL) -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: setup ## run every test this machine can run
	$(PYTEST) $(PARALLEL) $(PYTEST_ARGS)

coverage: setup ## run the tests and list the lines they miss
	$(PYTEST) -m "not slow and not gpu" --cov --cov-report=term-missing $(PYTEST_ARGS)

check: setup ## lint, formatting, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -q tests/test_layers.py

fix: setup ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: setup ## quantize, generate and score with the checkpoint inside the package, offline
	$(BIN)/dq demo

bench: setup ## measure speed and quality on this machine
	$(BIN)/dq bench

clean: ## remove caches and the environment
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
