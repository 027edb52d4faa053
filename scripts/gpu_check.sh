#!/usr/bin/env bash
# gpu_check.sh [--quick] [--out DIR] [--python PYTHON] [--googletest SOURCE_DIR] -- what a machine with a GPU
# can show, without a network: builds against the torch there, runs the tests on the GPU, the kernels' under
# compute-sanitizer, and the benchmark. Every part goes on whatever became of the one before, leaves its log in
# DIR (build/gpu_check), and has a line in the table at the end, DIR/summary.txt. With --quick all of it ends
# within ten minutes: the benchmark has the targets' cases alone and compiles for a minute and a half at most, and
# a part is cut off when its time, or the time of all, is over.
set -uo pipefail
cd "$(dirname "$0")/.."
out=build/gpu_check python=python3 googletest='' quick=''
while [ $# -gt 0 ]; do
  if [ "$1" = --quick ]; then quick=--quick; shift; continue; fi
  [ $# -gt 1 ] || { echo "gpu_check: do not know '$1', or it lacks a value" >&2; exit 2; }
  case $1 in
    --out) out=$2 ;;
    --python) python=$2 ;;
    --googletest) googletest=$2 ;;
    *) echo "gpu_check: do not know '$1'" >&2; exit 2 ;;
  esac
  shift 2
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out"/*.log "$out"/bench*.json "$out/summary.txt"
# CMake compiles CUDA as C++20 from 3.26 on: the one that was installed with $python, if any, before the system's.
# compute-sanitizer is beside the compiler, which may be a link.
export PATH=$(dirname "$(command -v "$python")"):$PATH:/usr/local/cuda/bin out python googletest quick capability
summary=()
failed=0

row() { summary+=("$(printf '%-12s %-12s %5s  %s' "$@")"); }
skip() { row "$1" skipped "" "$2"; }
has() { "$python" -c "import $1" 2>/dev/null; }

# part NAME SECONDS QUICK_SECONDS FUNCTION [ARGUMENT...]: runs it with its log in NAME.log.
part() {
  local name=$1 limit=$2 began=$SECONDS rc=0 how=passed
  if [ -n "$quick" ]; then limit=$(($3 < 580 - SECONDS ? $3 : 580 - SECONDS)); fi
  if [ "$limit" -lt 5 ]; then skip "$name" "no time left"; failed=1; return 1; fi
  shift 3
  echo "gpu_check: $name"
  # A shell of its own: timeout runs no function of this one.
  timeout --kill-after=5 "$limit" bash -c '"$@"' part "$@" >"$out/$name.log" 2>&1 || rc=$?
  case $rc in
    0) ;;
    124 | 137) how="cut off" ;;
    *) how="failed ($rc)" ;;
  esac
  [ $rc -eq 0 ] || { failed=1; tail -n 15 "$out/$name.log"; }
  row "$name" "$how" "$((SECONDS - began)) s" "$(grep -av '^\s*$' "$out/$name.log" | tail -n 1 | cut -c 1-90)"
  return $rc
}

machine() {
  nvidia-smi && nvcc --version &&
    "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_properties(0))'
}

# A venv that sees what $python sees, and takes this package without touching that.
build() {
  "$python" -m venv --without-pip "$out/venv" &&
    "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
      >"$("$out/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth" &&
    "$python" -m pip --python "$out/venv/bin/python" install --no-deps --no-build-isolation --no-index --editable . \
      -C cmake.define.VMOE_CUDA=ON -C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$capability" -C "build-dir=$out/build"
}

tests() { "$python" -m pytest -p no:cacheprovider -k "cuda or Gpu" --durations=10 "$@"; }

kernels() {
  cmake -S . -B "$out/cpp" -G Ninja -DVMOE_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$capability" -DFETCHCONTENT_FULLY_DISCONNECTED=ON \
    ${googletest:+"-DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=$googletest"} && cmake --build "$out/cpp" --target cuda_tests
}
googletests() { "$out/cpp/tests/cpp/cuda/cuda_tests" --gtest_brief=1; }
sanitize() { compute-sanitizer --tool "$1" --error-exitcode 9 "${@:2}"; }
# Without GoogleTest the same kernels by way of the ops; torch's own are none of racecheck's business here.
sanitize_ops() {
  sanitize "$1" --kernel-name kernel_substring=vmoe "$python" -m pytest -p no:cacheprovider -k "cuda or Gpu" \
    tests/ops/test_invert_slots.py tests/ops/test_assign_slots.py tests/ops/test_softmax_topk.py tests/ops/test_cuda.py
}
sanitize_kernels() { sanitize "$1" "$out/cpp/tests/cpp/cuda/cuda_tests" --gtest_brief=1; }

bench() { "$python" -m benchmarks.run $quick --device cuda --csv "$out/bench.csv"; }

export -f machine build tests kernels googletests sanitize sanitize_ops sanitize_kernels bench

capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') ||
  { echo "gpu_check: $python has no torch that sees a GPU" >&2; exit 1; }

part machine 60 30 machine
part build 600 240 build
python=$out/venv/bin/python

if has pytest; then
  part ops 600 120 tests tests/ops
  part layers 600 60 tests tests/routers tests/test_moe.py tests/models
else
  skip pytest "not installed"
fi

if has rich; then
  part bench 3600 240 bench
else
  skip bench "rich is not installed"
fi

check=sanitize_ops
if [ -n "$googletest" ] || [ -e /usr/include/gtest/gtest.h ]; then
  part kernels 600 120 kernels && part googletest 300 60 googletests && check=sanitize_kernels
else
  skip googletest "not here (--googletest SOURCE_DIR)"
fi
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    # initcheck takes torch's own memory for uninitialised.
    [ $tool = initcheck ] && [ $check = sanitize_ops ] || part $tool 1200 60 $check $tool
  done
else
  skip sanitizers "no compute-sanitizer"
fi

printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit $failed
