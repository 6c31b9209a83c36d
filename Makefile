# Every target does its own set-up: a virtual environment in .venv with the versions of constraints.txt.
# PYTHON chooses the interpreter (3.11 or newer); PIP_ARGS goes to pip (for example another index for a CPU-only torch).
PYTHON ?= python3
PIP_ARGS ?=
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo

comma := ,
EXTRAS := cpu,export,profiling,serve,dev,tensorrt-rtx
PYTEST := python -m pytest -q -n 2 --dist loadfile

.PHONY: demo test test-quick test-newest test-lowest test-install check lint types dist install clean

demo: install
	$(BIN)/starling export demo $(DEMO) --force
	$(BIN)/starling generate $(DEMO) "What is the capital of France, and what is it known for?" --max-tokens 96
	$(BIN)/starling profile $(DEMO)
	@echo 'The command is $(BIN)/starling; in this shell, after: . $(BIN)/activate'

# Two processes: tracing and tokenizers leave the second core idle.
test: install
	$(BIN)/$(PYTEST)

test-quick: install
	$(BIN)/$(PYTEST) -m "not slow and not install"

# The quick tests with the newest release of every package (torch stays: the index's next one brings CUDA) ...
test-newest: $(VENV)-newest/installed
	$(VENV)-newest/bin/$(PYTEST) -m "not slow and not install"

# ... and with the lowest that pyproject.toml allows.
test-lowest: $(VENV)-lowest/installed
	$(VENV)-lowest/bin/$(PYTEST) -m "not slow and not install"

# Wheels and sources, and the documents' install lines, in environments of their own.
test-install: install
	$(BIN)/python -m pytest -q -m install

check: lint types

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror engine/kernels/*/*.h engine/kernels/*/*.cpp engine/kernels/cuda/*.cu

types: install
	$(BIN)/mypy -p starling

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard engine/kernels/*/*.cpp engine/kernels/*/*.h)
	@$(PYTHON) -c 'import sys; sys.exit("starling needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[$(EXTRAS),release]'
	touch $@

# The kernels' library lies in the checkout: `install` has built it.
$(VENV)-newest/installed: pyproject.toml setup.py | install
	test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet $(PIP_ARGS) $(TORCH)
	STARLING_BUILD_KERNELS=0 $(VENV)-newest/bin/python -m pip install --quiet $(PIP_ARGS) --upgrade --upgrade-strategy eager --editable '.[$(EXTRAS)]' $(TORCH)
	touch $@

$(VENV)-lowest/installed: pyproject.toml setup.py | install
	test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --extra $(subst $(comma), --extra ,$(EXTRAS)) pyproject.toml -o $(VENV)-lowest/lowest.txt
	$(VENV)-lowest/bin/python -m pip install --quiet $(PIP_ARGS) --constraint $(VENV)-lowest/lowest.txt $(TORCH)
	STARLING_BUILD_KERNELS=0 $(VENV)-lowest/bin/python -m pip install --quiet $(PIP_ARGS) --constraint $(VENV)-lowest/lowest.txt --editable '.[$(EXTRAS)]'
	touch $@

# What is published: the sources, a wheel for any system, and one with the CPU kernels, which any x86-64 Linux since
# glibc 2.28 takes. setuptools would put what an earlier build left into a wheel.
dist: install
	rm -rf dist build/lib* build/bdist* build/wheels
	$(BIN)/python -m build --sdist --outdir dist .
	STARLING_BUILD_KERNELS=0 $(BIN)/python -m build --wheel --outdir dist .
	rm -rf build/lib* build/bdist*
	STARLING_BUILD_KERNELS=1 $(BIN)/python -m build --wheel --outdir build/wheels .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat manylinux_2_28_x86_64 --wheel-dir dist build/wheels/*.whl
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-lowest build dist *.egg-info
