# On a machine with Python 3.11 or later and a network, these set up all they need in .venv:
#
#   make demo    train, calibrate, measure and explain a network on a real scene
#   make test    the test suite; PYTEST_ARGS=tests/core runs a part of it
#   make lint    ruff and mypy
#   make clean   remove .venv and caches

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint clean

demo: .venv/.demo
	$(BIN)/dynanet demo

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/.demo: EXTRAS := onnx,rs
.venv/.dev: EXTRAS := all,dev

.venv/.demo .venv/.dev: .venv/.torch pyproject.toml hatch_build.py $(wildcard dynanet/ops/native/*.[ch])
	@echo "Installing dynanet[$(EXTRAS)] in .venv ..."
	@$(INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@

# torch goes first, at the pinned version: whatever is installed later then keeps it, and no other build is drawn.
.venv/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.11")'
	@echo "Installing torch in .venv (once; it is large) ..."
	@$(PYTHON) -m venv .venv
	@$(INSTALL) torch
	@touch $@
