# make study | test | bench | gpu-check | lint | format. The first run makes .venv with all that is needed; later ones
# find it there and compile only what changed. ARGS is passed on: make study ARGS="--seeds 1",
# make test ARGS="-k topk".
PYTHON ?= python3
bin := .venv/bin
MAKEFLAGS += --no-print-directory
compiled := pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(shell find csrc -type f)
cpp_files := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: study test bench gpu-check lint format

study: .venv/installed
	$(bin)/vmoe-routers study $(ARGS)

test: .venv/installed
	$(bin)/cmake -S . -B build/cpp -DVMOE_TORCH=ON -DPython_EXECUTABLE=$(CURDIR)/$(bin)/python $(CMAKE_ARGS)
	$(bin)/cmake --build build/cpp --parallel $(shell nproc)
	for isa in $$(build/cpp/tests/cpp/cpp_tests --list-isas); do \
	  build/cpp/tests/cpp/cpp_tests --isa=$$isa --gtest_brief=1 || exit 1; done
	for schedule in forward backward shuffled; do \
	  build/cpp/tests/cpp/cuda/cuda_tests --schedule=$$schedule --gtest_brief=1 || exit 1; done
	$(bin)/pytest $(ARGS)
	$(bin)/pytest --cuda-on-host=build/cpp/tests/cpp/cuda/libcuda_on_host.so tests/ops tests/routers tests/test_moe.py $(ARGS) || \
	  [ $$? -eq 5 ]  # ARGS may choose none of these

bench: .venv/bench
	$(bin)/python -m benchmarks.run $(ARGS)

# On a machine with a GPU, against the torch of $(PYTHON): no network, nothing installed there.
gpu-check:
	scripts/gpu_check.sh --python $(PYTHON) $(ARGS)

lint: .venv/lint
	$(bin)/ruff check . && $(bin)/ruff format --check . && $(bin)/pyright --pythonpath $(bin)/python
	$(bin)/clang-format --dry-run -Werror $(cpp_files)

format: .venv/lint
	$(bin)/ruff check --fix-only . && $(bin)/ruff format .
	$(bin)/clang-format -i $(cpp_files)

.venv/installed: scripts/setup.sh $(compiled)
	scripts/setup.sh $(PYTHON)
	touch $@

.venv/bench: .venv/installed
	$(bin)/pip install --quiet --no-build-isolation --editable ".[bench]"
	touch $@

.venv/lint: .venv/installed
	$(bin)/pip install --quiet --no-build-isolation --editable ".[lint]"
	touch $@
