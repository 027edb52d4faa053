# make study | test | fuzz | compat | coverage | bench | gpu-check | lint | tidy | docs | format | sdist | wheel |
# wheel-check | lower-bounds.
# The first run creates .venv with the dependencies of the target; later runs compile only changed files. ARGS has
# options of the command: make study ARGS="--seeds 1", make test ARGS="-k topk" (ARGS="-n0": one process).
# VMOE_CUDA=AUTO compiles the CUDA kernels for the GPUs of this machine. VMOE_CUDA=ON compiles them for all
# architectures, OFF for none, and 90 for the architecture 90.
PYTHON ?= python3
VMOE_CUDA ?= AUTO
export VMOE_CUDA
bin := .venv/bin
build := build/venv
CLANG ?= clang++
FUZZ_ISA ?= $(if $(filter x86_64,$(shell uname -m)),v3,base)
cuda_choice := build/cuda-$(subst ;,-,$(VMOE_CUDA))
cores := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
# Run three processes per two cores, because tests that start processes wait for them. Run at most eight, because each
# imports torch, which takes a gigabyte of memory. One process runs all tests of a file, because they share fixtures and
# imports. tests/conftest.py orders the files. Waiting threads must not spin, because the processes share the cores.
workers := -n $(shell echo $$(( ($(cores) * 3 + 1) / 2 ))) --maxprocesses=8 --dist=loadfile --no-loadscope-reorder
pytest := OMP_WAIT_POLICY=passive $(bin)/pytest $(workers)
MAKEFLAGS += --no-print-directory
compiled := pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(shell find csrc -type f)
cpp_files := $(shell find csrc tests/cpp tests/fuzz -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: study test fuzz compat coverage bench gpu-check lint tidy docs format sdist wheel wheel-check lower-bounds

study: .venv/study
	$(bin)/vmoe-routers study $(ARGS)

test: .venv/test
	$(bin)/cmake -S . -B $(build) -DVMOE_TESTS=ON -DVMOE_SANITIZE=OFF
	$(bin)/cmake --build $(build) --target tests/cpp/all --parallel $(cores)
	$(bin)/ctest --test-dir $(build) --output-on-failure --parallel $(cores)
	$(pytest) $(ARGS)
	$(pytest) -n $(cores) --cuda-on-host=$(build)/tests/cpp/cuda/libcuda_on_host.so \
	  tests/ops tests/routers tests/properties tests/test_moe.py $(ARGS) || \
	  [ $$? -eq 5 ]  # 5: ARGS selects none of these tests

# Fuzzes the CPU kernels (libFuzzer, needs Clang) and the readers of checkpoints (atheris) for ARGS seconds each.
fuzz: .venv/fuzz
	$(bin)/cmake -S . -B build/fuzz -DVMOE_FUZZ=$(FUZZ_ISA) -DCMAKE_CXX_COMPILER=$(CLANG)
	$(bin)/cmake --build build/fuzz --target fuzzers --parallel $(cores)
	tests/fuzz/run.sh $(bin)/python build/fuzz $(or $(ARGS),5)

# Runs the tests that need packages of the extra compat. `make test` skips these tests if the packages are missing.
compat: .venv/compat
	$(pytest) tests/compat tests/test_wrappers.py $(ARGS)

# Measures the lines of the package that pytest runs, also in child processes ([tool.coverage] of pyproject.toml).
coverage: .venv/coverage
	mkdir -p build/coverage && rm -f build/coverage/.coverage*
	OMP_WAIT_POLICY=passive $(bin)/coverage run -m pytest $(workers) $(ARGS)
	$(bin)/coverage combine --quiet && $(bin)/coverage report

bench: .venv/bench
	$(bin)/python -m benchmarks.run $(ARGS)

# Needs a GPU and no network. Builds against the torch of $(PYTHON), and installs nothing into that Python.
gpu-check:
	scripts/gpu_check.sh --python $(PYTHON) $(ARGS)

lint: .venv/lint .venv/test
	$(bin)/ruff check . && $(bin)/ruff format --check . && $(bin)/pyright --pythonpath $(bin)/python
	PATH="$(bin):$$PATH" PYTHONPATH=. $(bin)/pyright --ignoreexternal --verifytypes vmoe_routers
	$(bin)/clang-format --dry-run -Werror $(cpp_files)
	$(bin)/python scripts/check_prose.py

# Runs the checks of .clang-tidy on the kernels, without a build.
tidy: .venv/tidy
	ls csrc/cpu/*.cpp csrc/common/*.cpp | xargs -P $(cores) -I FILE $(bin)/clang-tidy --quiet FILE -- \
	  -std=c++20 -Icsrc -DVMOE_ISA=v3 -march=x86-64-v3 -ffp-contract=off

# Builds the documentation site in build/site, without a network. A broken link or page is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build
	$(bin)/python scripts/check_site.py build/site

format: .venv/lint
	$(bin)/ruff check --fix-only . && $(bin)/ruff format .
	$(bin)/clang-format -i $(cpp_files)

# Two builds of one commit have the same time stamps.
sdist wheel wheel-check: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 1700000000)

sdist: .venv/package
	$(bin)/python -m build --no-isolation --sdist

# Builds a CPU wheel for the Python of .venv. On Linux the wheel loads with glibc 2.28, on any build machine.
wheel: .venv/package
	scripts/build_wheel.sh dist

# Builds the wheel, checks the file, and tests the installed wheel in the environments PYTHONS, which have torch,
# torchvision, timm, pytest and hypothesis. Then builds a second wheel, which must have the same bytes.
wheel-check: .venv/package
	rm -rf build/wheel dist/first dist/second
	scripts/build_wheel.sh dist/first
	$(bin)/python scripts/check_wheel.py dist/first/*.whl $(addprefix --python ,$(PYTHONS))
	rm -rf build/wheel
	CCACHE_RECACHE=1 scripts/build_wheel.sh dist/second
	cmp dist/first/*.whl dist/second/*.whl

# Runs the tests with the oldest packages that pyproject.toml allows, in a separate environment.
lower-bounds:
	scripts/lower_bounds.sh $(PYTHON)

# Installs this package with the dependencies of one extra of pyproject.toml.
.venv/%: scripts/setup.sh $(compiled) $(cuda_choice)
	scripts/setup.sh $(PYTHON) $*
	touch $@

# Rebuild if VMOE_CUDA differs from the last build.
$(cuda_choice):
	mkdir -p build && rm -f build/cuda-* && touch $@
