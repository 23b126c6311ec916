# make help lists the targets. Everything happens in .venv; nothing outside this folder is changed.
#
# PYTHON       interpreter that makes .venv (default: the first of python3.11, python3 that is 3.10 to 3.12)
# JOBS         processes that tests are spread over (default: 2)
# TORCH_INDEX  extra pip index for torch alone, to choose its build. Empty: what pip is configured with.
#              CPU build:   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
#              CUDA 13.0:   make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130
#              A build of such an index ("2.13.0+cpu") wins over the plain 2.13.0 of PyPI.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

TORCH := torch==2.13.0
TORCH_INDEX ?=
SUITABLE := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3; do "$$p" -c '$(SUITABLE)' 2>/dev/null && { echo "$$p"; break; }; done)

BIN := .venv/bin
READY := .venv/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Files of tests are spread over processes; ranks that a test starts come on top, hence a thread each.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 20 --durations-min 5

.PHONY: help setup demo srum-demo check test thorough lint clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

setup: $(READY) ## make .venv and install the project into it

# Once, and again when setup.py changes. torch comes first and alone: see TORCH_INDEX.
$(READY): setup.py
	@test -n "$(PYTHON)" || { echo "setup: no Python 3.10 to 3.12 found. Debian 12: apt-get install python3 python3-venv;" \
	  "else name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "setup: $(PYTHON) cannot make virtual environments." \
	  "Debian: apt-get install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[dev]"
	@touch $@

demo: $(READY) ## train on generated shapes with 2 local ranks (some minutes of CPU), then draw four pictures
	$(BIN)/megabagel train examples/configs/demo.yaml --nproc 2
	$(BIN)/megabagel generate runs/demo "a red circle on the left" -n 4 --size 64x64 --steps 25 --text-scale 2 \
	  --out runs/demo/drawn

srum-demo: $(READY) ## train scenes.yaml (half an hour) unless it is, then SRUM on its own pictures, beside fine-tuning
	$(BIN)/megabagel train examples/configs/scenes.yaml --nproc 2
	$(BIN)/megabagel posttrain run examples/posttrain/srum_demo.yaml
	$(BIN)/python tools/srum_study.py runs/scenes runs/srum/round_1 runs/srum/study --seeds 0 --only sft srum

lint: $(READY) ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint ## lint, then the tests that take one process and little time: minutes
	$(PYTEST) -m "not slow and not thorough and not ranks and not costly"

test: lint ## lint, then the fast tests, then the slow ones
	$(PYTEST) -m "not slow and not thorough"
	$(PYTEST) -m "slow and not thorough"

thorough: $(READY) ## the tests that `make test` only samples
	$(PYTEST) -m thorough

clean: ## remove .venv, caches and build output; runs and data stay
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
