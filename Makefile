# Every target does its own set-up: a virtual environment in .venv with the versions of constraints.txt.
# PYTHON chooses the interpreter (3.11 or newer); PIP_ARGS goes to pip (for example another index for a CPU-only torch).
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo

.PHONY: demo test check lint types install clean

demo: install
	$(BIN)/starling export demo $(DEMO) --force
	$(BIN)/starling generate $(DEMO) "What is the capital of France, and what is it known for?" --max-tokens 96
	$(BIN)/starling profile $(DEMO)

# Two processes: tracing and tokenizers leave the second core idle.
test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: lint types

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror engine/kernels/*.h engine/kernels/*.cpp

types: install
	$(BIN)/mypy -p starling

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard engine/kernels/*.cpp engine/kernels/*.h)
	@$(PYTHON) -c 'import sys; sys.exit("starling needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[cpu,export,profiling,serve,dev,tensorrt-rtx]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
