#!/usr/bin/env bash
# gpu_check.sh [--out DIR] [--python PYTHON] [--googletest SOURCE_DIR] -- what a machine with a GPU can
# show, without a network: builds against the torch there, runs the tests on the GPU, the kernels' under
# compute-sanitizer, and quick benchmarks. Every part goes on whatever became of the one before and leaves
# its log in DIR (build/gpu_check); the last lines say which passed. Within ten minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
out=build/gpu_check python=python3 googletest=
while [ $# -gt 1 ]; do
  case $1 in
    --out) out=$2 ;;
    --python) python=$2 ;;
    --googletest) googletest=$2 ;;
    *) break ;;
  esac
  shift 2
done
[ $# -eq 0 ] || { echo "gpu_check: do not know '$1'" >&2; exit 2; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
summary=()
failed=0

# part NAME SECONDS COMMAND...: runs it with its log in NAME.log.
part() {
  local name=$1 limit=$2 began=$SECONDS rc=0
  shift 2
  echo "gpu_check: $name"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || rc=$?
  [ $rc -eq 0 ] || { failed=1; tail -n 15 "$out/$name.log"; }
  summary+=("$(printf '%-20s %-10s %4d s' "$name" "$([ $rc -eq 0 ] && echo passed || echo "failed ($rc)")" $((SECONDS - began)))")
  return $rc
}
skip() { summary+=("$(printf '%-20s %s' "$1" "skipped: $2")"); }

capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') ||
  { echo "gpu_check: $python has no torch that sees a GPU" >&2; exit 1; }

machine() {
  nvidia-smi && nvcc --version
  "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_properties(0))'
}
part machine 60 machine

# A venv that sees what $python sees, and takes this package without touching that.
build() {
  "$python" -m venv --without-pip "$out/venv" &&
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
      >"$("$out/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth" &&
    "$python" -m pip --python "$out/venv/bin/python" install --no-deps --no-build-isolation --no-index --editable . \
      -C cmake.define.VMOE_CUDA=ON -C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$capability" -C "build-dir=$out/build"
}
part build 280 build
python=$out/venv/bin/python

# The kernels' own tests need GoogleTest: the system's, or a source folder.
kernels() {
  cmake -S . -B "$out/cpp" -G Ninja -DVMOE_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$capability" -DFETCHCONTENT_FULLY_DISCONNECTED=ON \
    ${googletest:+"-DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=$googletest"} && cmake --build "$out/cpp" --target cuda_tests
}
if [ -n "$googletest" ] || [ -d /usr/include/gtest ]; then
  if part kernels 200 kernels; then
    part googletest 60 "$out/cpp/tests/cpp/cuda/cuda_tests" --gtest_brief=1
    for tool in memcheck racecheck initcheck; do
      part $tool 80 compute-sanitizer --tool $tool --error-exitcode 9 "$out/cpp/tests/cpp/cuda/cuda_tests" --gtest_brief=1
    done
  fi
else
  skip googletest "GoogleTest is not here (--googletest SOURCE_DIR)"
  # The same kernels by way of the ops; torch's own kernels are none of racecheck's business here.
  for tool in memcheck racecheck; do
    part $tool 80 compute-sanitizer --tool $tool --error-exitcode 9 --kernel-name kernel_substring=vmoe \
      "$python" -m pytest -p no:cacheprovider tests/ops/test_cuda.py tests/ops/test_invert_slots.py -k "cuda or Gpu"
  done
fi

part pytest 200 "$python" -m pytest -p no:cacheprovider tests/ops -k "cuda or Gpu" --durations=10
# Of the ops that have a CUDA kernel.
for op in topk expert_choice assign_slots invert_slots dispatch soft_mix; do
  part bench-$op 45 "$python" -m benchmarks.run --quick --no-compile --device cuda --only $op --json "$out/bench-$op.json"
done

printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit $failed
