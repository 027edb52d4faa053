#!/usr/bin/env bash
# gpu_check.sh [--quick] [--dry-run] [--out DIR] [--work DIR] [--python PYTHON] [--googletest DIR] -- checks this
# package on a machine with a GPU, without a network: builds it against the torch of PYTHON for that GPU, runs the tests
# and the benchmark on the GPU, and the kernels' tests under compute-sanitizer. A failed part does not stop later parts.
#   --quick       ends within four minutes: every part has a time limit, and a part that reaches it is interrupted
#   --dry-run     prints the commands of every part with its time limit, and runs none of them
#   --out         the folder of the results, build/gpu_check by default: summary.txt, with the result and the seconds of
#                 each part; log.txt, with the commands, their seconds and their output; bench.csv
#   --work        the folder of the builds, build/gpu_check by default, which a later run uses again
#   --googletest  the source of GoogleTest for the kernels' tests; by default /usr/src/googletest if it exists
set -uo pipefail
caller=$PWD
cd "$(dirname "$0")/.."
from_caller() { (cd "$caller" && realpath -ms -- "$1"); }
out=$PWD/build/gpu_check work=$PWD/build/gpu_check python=python3 googletest='' quick='' dry_run=''
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=--quick; shift; continue ;;
    --dry-run) dry_run=1; shift; continue ;;
  esac
  [ $# -gt 1 ] || { echo "gpu_check: unknown option '$1', or an option without its value" >&2; exit 2; }
  case $1 in
    --out) out=$(from_caller "$2") ;;
    --work) work=$(from_caller "$2") ;;
    --python) case $2 in */*) python=$(from_caller "$2") ;; *) python=$2 ;; esac ;;
    --googletest) googletest=$(from_caller "$2") && [ -f "$googletest/CMakeLists.txt" ] ||
      { echo "gpu_check: --googletest $2 has no CMakeLists.txt; wanted: the source folder of GoogleTest" >&2; exit 2; } ;;
    *) echo "gpu_check: unknown option '$1'" >&2; exit 2 ;;
  esac
  shift 2
done
[ -n "$googletest" ] || [ ! -f /usr/src/googletest/CMakeLists.txt ] || googletest=/usr/src/googletest
# CMake compiles CUDA as C++20 from 3.26 on, so prefer the CMake installed with $python to the system's.
# compute-sanitizer is in the toolkit's folder, even if nvcc on PATH is a link. Unbuffered output survives a kill.
export PATH=$(dirname "$(command -v "$python")"):$PATH:/usr/local/cuda/bin PYTHONUNBUFFERED=1

has() { "$python" -c "import $1" 2>/dev/null; }

# row NAME RESULT SECONDS WORDS: one line of the summary.
row() {
  if [ -n "$dry_run" ]; then printf '# %s: %s, %s\n' "$1" "$2" "$4"; return; fi
  printf '%-14s %-11s %6s  %s\n' "$@" >>"$out/summary.txt"
}

# run COMMAND...: runs one command of a part, and prints it and its seconds. SIGINT interrupts it at the part's time
# limit, so that pytest still prints tracebacks.
run() {
  local left=$((end - SECONDS)) began=$SECONDS rc=0
  set -- timeout --signal=INT --kill-after=10 $((left > 1 ? left : 1)) "$@"
  printf '%q ' "$@"
  echo
  [ -z "$dry_run" ] || return 0
  "$@" || rc=$?
  echo "# $((SECONDS - began)) s"
  return $rc
}

# part NAME SECONDS QUICK_SECONDS FUNCTION [ARGUMENT...]: runs FUNCTION with a time limit and its output in NAME.log of
# the folder $work.
part() {
  local name=$1 limit=$2 began=$SECONDS rc=0 result=passed left end
  if [ -n "$quick" ]; then left=$((total - began)) limit=$(($3 < left ? $3 : left)); fi
  if [ "$limit" -lt 5 ]; then row "$name" "no time" '' "earlier parts took all the time"; return 1; fi
  end=$((began + limit))
  shift 3
  if [ -n "$dry_run" ]; then
    echo "# $name: at most $limit s"
    "$@"
    return 0
  fi
  "$@" >"$work/$name.log" 2>&1 || rc=$?
  case $rc in
    0) ;;
    124 | 137) result="cut off" ;;
    *) result="failed ($rc)" ;;
  esac
  echo "gpu_check: $name $result in $((SECONDS - began)) s"
  [ $rc -eq 0 ] || tail -n 40 "$work/$name.log"
  row "$name" "$result" "$((SECONDS - began)) s" \
    "$(grep -avE '^\s*$|^# [0-9]+ s$' "$work/$name.log" | tail -n 1 | cut -c 1-90)"
  return $rc
}

# collect: joins the logs of the parts, in the order in which they ended.
collect() {
  local name
  while read -r name _; do
    if [ -f "$work/$name.log" ]; then printf '== %s\n' "$name"; cat "$work/$name.log"; fi
  done <"$out/summary.txt" >"$out/log.txt"
}

machine() {
  run date && run nvidia-smi && run nvcc --version &&
    run "$python" -c 'import torch
gpu = torch.cuda.get_device_properties(0)
print(f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, torch {torch.__version__}, CUDA {torch.version.cuda}")'
}

# Installs this package into a new venv that also sees the packages of $python, and leaves $python unchanged.
build() {
  local packages
  mapfile -t packages < <("$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")')
  run "$python" -m venv --without-pip "$work/venv" &&
    run "$venv" -c 'import pathlib, sys, sysconfig
site = pathlib.Path(sysconfig.get_path("purelib"))
site.joinpath("parent.pth").write_text("\n".join(sys.argv[2:]))
# setuptools-scm computes the version. This module replaces a missing setuptools-scm, and gives the version that
# setuptools-scm gives to a source folder without git (fallback_version in pyproject.toml).
if not int(sys.argv[1]):
    site.joinpath("setuptools_scm.py").write_text("""
class Configuration:
    @staticmethod
    def from_file(path):
        return None


def _get_version(config, **options):
    return "0.1.0.dev0"
""")' "$(has setuptools_scm && echo 1 || echo 0)" "${packages[@]}" &&
    run "$python" -m pip --python "$venv" install --no-deps --no-build-isolation --no-index --editable . \
      --config-settings=cmake.define.VMOE_CUDA=ON \
      --config-settings="cmake.define.CMAKE_CUDA_ARCHITECTURES=$capability" \
      --config-settings="build-dir=$work/build"
}

kernels() {
  run cmake -S . -B "$work/cpp" -G Ninja -DVMOE_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$capability" \
    -DFETCHCONTENT_FULLY_DISCONNECTED=ON \
    ${googletest:+-DCMAKE_DISABLE_FIND_PACKAGE_GTest=ON "-DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=$googletest"} &&
    run cmake --build "$work/cpp" --target gpu_tests
}

kernel_tests() { run "$work/cpp/tests/cpp/cuda/gpu/gpu_tests" "$@"; }
sanitize() {
  run compute-sanitizer --tool "$1" --error-exitcode 9 "$work/cpp/tests/cpp/cuda/gpu/gpu_tests" --gtest_brief=1 "${@:2}"
}
tests() { run "$venv" -m pytest -p no:cacheprovider --durations=10 "$@"; }
bench() { run "$venv" -m benchmarks.run ${quick:+--quick --no-compile} --device cuda --csv "$out/bench.csv"; }

capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null) || {
  [ -n "$dry_run" ] || { echo "gpu_check: $python has no torch that sees a GPU" >&2; exit 1; }
  capability=90
  echo "# no GPU here: the commands are for compute capability $capability"
}

if [ -z "$dry_run" ]; then
  mkdir -p "$out" "$work"
  rm -f "$work"/*.log "$out"/{bench.csv,log.txt,summary.txt}
  touch "$out/summary.txt"
  trap collect EXIT
fi
total=230  # seconds of a quick run: four minutes less ten seconds to kill a part that ignores SIGINT
venv=$work/venv/bin/python

part machine 60 15 machine

# Run both builds at the same time.
has_kernels=''
part build 1200 100 build &
module=$!
if [ -n "$dry_run" ]; then wait "$module"; fi  # do not mix the output of both
if [ -n "$googletest" ] || [ -e /usr/include/gtest/gtest.h ]; then
  part kernels 1200 100 kernels && has_kernels=1
else
  row kernels skipped '' "no GoogleTest here (--googletest DIR)"
fi
wait

# Run Sinkhorn's tests separately and print their names: the blocks of its kernels wait for each other, so a fault may
# hang a test, and the log must name this test.
if [ -n "$has_kernels" ]; then
  part googletest 600 35 kernel_tests --gtest_brief=1 '--gtest_filter=-*Sinkhorn*'
  part sinkhorn 300 20 kernel_tests '--gtest_filter=*Sinkhorn*'
fi

if has pytest; then
  workers=()
  if has xdist; then workers=(-n 6); fi
  part cuda 600 50 tests tests/ops/test_cuda.py
  part ops 600 40 tests "${workers[@]}" -k "cuda or Gpu" --ignore=tests/ops/test_cuda.py tests/ops
  if [ -z "$quick" ]; then
    part layers 600 0 tests "${workers[@]}" -k "cuda or Gpu" tests/routers tests/test_moe.py tests/models
  fi
else
  row pytest skipped '' "not installed"
fi

sanitizing=0
if [ -n "$has_kernels" ] && command -v compute-sanitizer >/dev/null; then sanitizing=25; fi
if has rich; then
  benching=40
  # Use the time that the parts before have left.
  if [ -z "$dry_run" ]; then benching=$((total - sanitizing - SECONDS)); fi
  part bench 3600 $benching bench
else
  row bench skipped '' "rich is not installed"
fi

if [ $sanitizing -eq 0 ]; then
  row sanitizers skipped '' "no compute-sanitizer, or no kernels' tests to run under it"
elif [ -n "$quick" ]; then
  part memcheck 0 $sanitizing sanitize memcheck '--gtest_filter=-*Large*:*Long*'
else
  for tool in memcheck racecheck initcheck; do part $tool 1200 0 sanitize $tool; done
fi

if [ -n "$dry_run" ]; then
  [ -z "$quick" ] || echo "# all parts together: at most $total s"
  exit 0
fi
cat "$out/summary.txt"
! grep -qE '^\S+ +(failed|cut off|no time)' "$out/summary.txt"
