# Every target prepares .venv by itself. pip's own settings decide where packages come from.
PYTHON ?= python3
TORCH ?= 2.13.0
# where torch brings none along, as its builds for the CPU
TRITON ?= 3.8.0
# torch releases that check-wheel runs the tests on; the wheel itself is built against $(TORCH)
CHECK_TORCH ?= 2.13.0 2.10.0
ARGS ?=
# tests at once; 0: one after another, in this process
JOBS ?= 2

V := .venv
PIP := $(V)/bin/python -m pip install --disable-pip-version-check
CUDA := $(wildcard csrc/cuda/*.h csrc/cuda/*.cu csrc/cuda/*.cuh csrc/cuda/emulation/*)
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h) $(CUDA)
CPP_TESTS := $(patsubst tests/cpp/%.cpp,%,$(wildcard tests/cpp/test_*.cpp))

# torch finds ninja by PATH
export PATH := $(CURDIR)/$(V)/bin:$(PATH)

.PHONY: setup test test-all emulation demo bench gpu gpu-static lint format sanitize wheel check-wheel clean

setup: $(V)/.built

$(V)/bin/python:
	$(PYTHON) -m venv $(V)

$(V)/.torch: Makefile | $(V)/bin/python
	$(PIP) --quiet "torch==$(TORCH)" numpy "setuptools>=77" wheel ninja
	$(V)/bin/python -c "import triton" 2>/dev/null || $(PIP) --quiet "triton==$(TRITON)"
	touch $@

# The editable install leaves the extension out, so that it is built once, incrementally, and its output is seen.
$(V)/.installed: $(V)/.torch pyproject.toml
	FASTMAML_CPP=0 $(PIP) --quiet --no-build-isolation -e ".[test]"
# it asks for Python 3.12 and runs on 3.11
	$(PIP) --quiet --no-deps --ignore-requires-python "ttsem==0.1.0"
	touch $@

# What setup.py reads besides files: written where it is new, so that another architecture builds again.
BUILD_SETTINGS := $(TORCH_CUDA_ARCH_LIST) $(FASTMAML_CUDA) $(CUDA_HOME)
$(shell mkdir -p build; echo '$(BUILD_SETTINGS)' | cmp -s - build/settings || echo '$(BUILD_SETTINGS)' > build/settings)

# Two recipes at once: nvcc is at work on the kernels while pip fetches.
MAKEFLAGS += --jobs=2

build/.kernels: setup_cuda.py build/settings $(CUDA) csrc/program.h
	$(PYTHON) setup_cuda.py
	touch $@

$(V)/.built: $(V)/.installed build/.kernels setup.py $(CSRC)
# ninja would take part in make's sharing out of jobs, which this make has not offered it
	MAKEFLAGS= $(V)/bin/python setup.py --quiet build_ext --inplace
	touch $@

$(V)/.bench $(V)/.dev: $(V)/.%: $(V)/.installed | setup
	FASTMAML_CPP=0 $(PIP) --quiet --no-build-isolation -e ".[$*]"
	touch $@

PYTEST := -m pytest -n $(JOBS) --dist worksteal
# Threads that wait do so asleep: the other tests want their core.
test test-all check-wheel: export OMP_WAIT_POLICY = passive

test: setup emulation
	$(V)/bin/python $(PYTEST) $(ARGS)

test-all: setup emulation
	$(V)/bin/python $(PYTEST) --all $(ARGS)

# The CUDA kernels for the CPU, which FASTMAML_EMULATE=1 takes: for tests where there is no GPU.
EMULATION := build/emulation/libfastmaml_cuda.so
EMULATION_FLAGS := -std=c++17 -O2 -fPIC -fvisibility=hidden -pthread

emulation: $(EMULATION)

build/emulation/%.o: csrc/cuda/emulation/%.cpp $(CUDA) csrc/program.h
	@mkdir -p $(@D)
	$(CXX) $(EMULATION_FLAGS) -c $< -o $@

$(EMULATION): build/emulation/inner_loop.o build/emulation/cluster.o
	$(CXX) -shared -pthread $^ -o $@

demo: setup
	$(V)/bin/fastmaml demo $(ARGS)

bench: setup $(V)/.bench
	$(V)/bin/python -m pytest bench --benchmark-autosave --benchmark-storage=bench/results/benchmarks
	$(V)/bin/python -m bench.meta_step $(or $(ARGS),sine omniglot-mlp)
	$(V)/bin/python -m bench.memory

# Everything that needs a GPU, on a machine that has one: all tests there, the kernels under the memory checker,
# then the comparison with the peers.
gpu: setup $(V)/.bench
	@$(V)/bin/python -m bench.gpu --check
	$(V)/bin/python -m pytest
	@if command -v compute-sanitizer >/dev/null; then \
	  for tool in memcheck racecheck synccheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(V)/bin/python -m pytest \
	      tests/test_kernels.py tests/test_kernels_mlp.py tests/test_cuda_values.py \
	      -k "one_of_each or one_norm or whole_loop or (test_op and N5)" || exit 1; \
	  done; \
	else echo "no compute-sanitizer on PATH: the memory checker was not run"; fi
	$(V)/bin/python -m bench.gpu $(ARGS)

gpu-static: setup emulation
	$(PIP) --quiet "cuxray==0.6.0"
	$(V)/bin/python -m bench.gpu_static --conflicts --out bench/results/gpu_static.md
	$(V)/bin/python -m bench.cuda_static --conflicts --out bench/results/cuda_static.md
	$(V)/bin/python -m bench.gpu_counts --out bench/results/gpu_counts.md

lint: setup $(V)/.dev
	$(V)/bin/ruff check .
	$(V)/bin/ruff format --check .
	$(V)/bin/pyright
	$(V)/bin/clang-format --dry-run -Werror $(CSRC) $(wildcard tests/cpp/*.cpp tests/cpp/*.h tests/cuda/*.cpp tests/cuda/*.h)

format: setup $(V)/.dev
	$(V)/bin/ruff check --fix-only .
	$(V)/bin/ruff format .
	$(V)/bin/clang-format -i $(CSRC) $(wildcard tests/cpp/*.cpp tests/cpp/*.h tests/cuda/*.cpp tests/cuda/*.h)

# The C++ tests drive the engine, csrc/cpu, without torch: its variant for 16-byte vectors, and the products on
# the matrix unit, once per sanitizer.
SANITIZE_asan := -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZE_tsan := -fsanitize=thread
CPP_BINARIES := $(foreach s,asan tsan,$(addprefix build/$(s)/,$(CPP_TESTS)))
CPP_FLAGS := -std=c++17 -O1 -g -fno-omit-frame-pointer -DFASTMAML_INLINE=inline -Icsrc -pthread

define sanitizer
build/$(1)/%.o: csrc/cpu/%.cpp $(CSRC)
	@mkdir -p $$(@D)
	$$(CXX) $$(CPP_FLAGS) $$(SANITIZE_$(1)) -c $$< -o $$@
build/$(1)/%: tests/cpp/%.cpp $(wildcard tests/cpp/*.h) $(patsubst %,build/$(1)/%.o,isa_generic arena amx)
	$$(CXX) $$(CPP_FLAGS) $$(SANITIZE_$(1)) $$< $$(filter %.o,$$^) -o $$@
.PRECIOUS: build/$(1)/%.o
endef
$(foreach s,asan tsan,$(eval $(call sanitizer,$(s))))

sanitize: $(CPP_BINARIES)
	@for test in $^; do echo "$$test"; "$$test" || exit 1; done

wheel: $(V)/.installed
	rm -rf build/lib* build/bdist* dist
	$(V)/bin/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps -w dist .

# Each venv sees the tests but not the source tree, so what is tested is the wheel.
check-wheel: wheel
	@for torch in $(CHECK_TORCH); do \
	  dir=build/check-$$torch; \
	  echo "== the wheel on torch $$torch"; \
	  rm -rf $$dir/tree && mkdir -p $$dir/tree && cp -r tests docs bench pyproject.toml $$dir/tree && \
	  { [ -x $$dir/bin/python ] || $(PYTHON) -m venv $$dir; } && \
	  $$dir/bin/python -m pip install --disable-pip-version-check --quiet "torch==$$torch" "$$(ls dist/*.whl)[test]" && \
	  $$dir/bin/python -m pip install --disable-pip-version-check --quiet --force-reinstall --no-deps dist/*.whl && \
	  (cd $$dir/tree && ../bin/python -c "import fastmaml._C" && ../bin/python $(PYTEST) -q $(ARGS)) || exit 1; \
	done

clean:
	rm -rf build dist fastmaml/*.so
