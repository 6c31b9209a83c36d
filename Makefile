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
NOOP := build/cuda-noop
NOOP_PACKAGES := onnxruntime-gpu nvidia-cuda-nvrtc==13.0.* nvidia-cuda-cuobjdump click jinja2 numpy pytest rich tokenizers

.PHONY: demo test test-quick sanitize test-cuda-noop test-newest test-lowest test-install test-arm test-clients test-lm-eval check lint types dist install clean

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

# The CPU kernels' tests and 2,000 hostile calls of them under GCC's address and undefined-behaviour sanitizers.
sanitize: install
	$(BIN)/python tests/hostile/sanitize.py build/sanitize

# What the CUDA path asks of a GPU, without one: ONNX Runtime's CUDA provider on a CUDA that does nothing, and our CUDA
# kernels through NVIDIA's compiler. An environment of its own, since onnxruntime and onnxruntime-gpu exclude each other.
test-cuda-noop: $(VENV)-cuda-noop/installed $(NOOP)/bundles/made
	$(VENV)-cuda-noop/bin/python tests/cuda_noop/build_noop.py $(NOOP)/headers/nvidia/cu13/include $(NOOP)/lib
	LD_LIBRARY_PATH=$(abspath $(NOOP)/lib) XDG_CACHE_HOME=$(abspath $(NOOP)/cache) $(VENV)-cuda-noop/bin/python -m pytest -q --confcutdir tests/cuda_noop tests/cuda_noop

# Headers alone of CUDA's runtime: its library would be found in an environment, before the one that does nothing.
$(VENV)-cuda-noop/installed: Makefile pyproject.toml | install
	test -x $(VENV)-cuda-noop/bin/python || $(PYTHON) -m venv $(VENV)-cuda-noop
	$(VENV)-cuda-noop/bin/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt $(NOOP_PACKAGES)
	$(VENV)-cuda-noop/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps --upgrade --target $(NOOP)/headers nvidia-cuda-runtime==13.0.* nvidia-cuda-crt==13.0.*
	touch $@

$(NOOP)/bundles/made: tests/cuda_noop/make_bundles.py $(shell find export profiling/gpu/packing -name '*.py') | install
	$(BIN)/python tests/cuda_noop/make_bundles.py $(NOOP)/bundles
	touch $@

# The CPU kernels' own tests meet no package but NumPy and ONNX Runtime, which all others go through too.
OTHER_VERSIONS := $(PYTEST) -m "not slow and not install" $(foreach name,kernels half_kernels half_bundles,--ignore tests/engine/test_$(name).py)

# The quick tests with the newest release of every package (torch stays: the index's next one brings CUDA) ...
test-newest: $(VENV)-newest/installed
	$(VENV)-newest/bin/$(OTHER_VERSIONS)

# ... and with the lowest that pyproject.toml allows.
test-lowest: $(VENV)-lowest/installed
	$(VENV)-lowest/bin/$(OTHER_VERSIONS)

# Wheels and sources, and the documents' install lines, in environments of their own.
test-install: install
	$(BIN)/python -m pytest -q -m install

# The CPU kernels on an emulated ARM processor. Not part of CI: it takes minutes, and Debian's packages for ARM.
test-arm: install
	$(BIN)/python tests/arm/emulated_arm.py build/arm
	$(BIN)/python -m pytest -q -m arm tests/arm

# lm-eval, in an environment of its own, by each way that docs/evaluation.md names. Not part of CI: it takes minutes.
test-lm-eval: install
	$(BIN)/python -m pytest -q -m lm_eval

# Clients that others wrote (OpenAI's for JavaScript, LangChain, LiteLLM, AIPerf) against a real server; wants node, npm
# and a network. Not part of CI: their packages are 2 GB.
test-clients: install
	test -d $(DEMO) || $(BIN)/starling export demo $(DEMO)
	$(BIN)/python tests/clients/drive.py $(DEMO)

check: lint types

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror engine/kernels/*/*.h engine/kernels/*/*.cpp engine/kernels/cuda/*.cu tests/cuda_noop/*.h tests/cuda_noop/*.cpp

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

# What is published: the sources, a wheel for any system, and one with the CPU kernels, which any Linux since glibc 2.28
# on such a processor takes. setuptools would put what an earlier build left into a wheel.
dist: install
	rm -rf dist build/lib* build/bdist* build/wheels
	$(BIN)/python -m build --sdist --outdir dist .
	STARLING_BUILD_KERNELS=0 $(BIN)/python -m build --wheel --outdir dist .
	rm -rf build/lib* build/bdist*
	STARLING_BUILD_KERNELS=1 $(BIN)/python -m build --wheel --outdir build/wheels .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat manylinux_2_28_$(shell uname -m) --wheel-dir dist build/wheels/*.whl
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-lowest $(VENV)-cuda-noop build dist *.egg-info
