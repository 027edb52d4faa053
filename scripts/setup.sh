#!/usr/bin/env bash
# setup.sh [PYTHON [EXTRA]] -- creates .venv with torch, the build tools, this package (editable) and the dependencies
# of EXTRA of pyproject.toml (study by default, test, bench, lint, or several: test,lint). The Makefile runs
# this script. A second run is safe.
# The environment variable VMOE_CUDA chooses the architectures for which the CUDA kernels are compiled. AUTO, the
# default, chooses the GPUs of this machine, or no architecture without a GPU. ON chooses all architectures of
# cmake/modules.cmake, and OFF none. Numbers, as "80" or "80;90", are architectures.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3} extra=${2:-study} cuda=${VMOE_CUDA:-AUTO}

say() { echo "setup: $*"; }
die() { say "$*" >&2; exit 1; }
may_apt_get() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
apt_get() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y -qq "$@" >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq "$@" >/dev/null; }
}

# Check the tools that pip cannot install.
command -v "$python" >/dev/null ||
  die "$python was not found; install Python 3.10 or newer, or give its name: make PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  die "$python is $("$python" --version), but 3.10 or newer is required: make PYTHON=..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
missing=()
command -v c++ >/dev/null || missing+=(g++)
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python$version-venv")
"$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
  missing+=("python$version-dev")
if [ ${#missing[@]} -gt 0 ]; then
  may_apt_get || die "packages are missing, please install them: sudo apt install ${missing[*]}"
  say "installing ${missing[*]}"
  apt_get "${missing[@]}"
fi
# Without a system GoogleTest, CMake fetches its source.
if [[ ,$extra, = *,test,* ]] && may_apt_get && [ ! -e /usr/include/gtest/gtest.h ]; then
  apt_get libgtest-dev || say "libgtest-dev cannot be installed: CMake will download GoogleTest"
fi

# The build does not look for GPUs, so this script passes the architectures to the build.
options=(--config-settings="cmake.define.VMOE_CUDA=$cuda")
case $cuda in
  AUTO)
    capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
      grep -xE '[0-9]+\.[0-9]+' | sort -u || true)
    if [ -n "$capabilities" ]; then
      architectures=$(tr -d . <<<"$capabilities" | paste -sd ';')
      options+=(--config-settings="cmake.define.CMAKE_CUDA_ARCHITECTURES=$architectures")
      cuda_words="CUDA kernels for compute capability $(paste -sd ' ' <<<"$capabilities")"
    else
      options=(--config-settings=cmake.define.VMOE_CUDA=OFF)
      cuda_words="no CUDA kernels, because no GPU was found (VMOE_CUDA=ON compiles them anyway)"
    fi
    ;;
  # cmake/modules.cmake chooses the architectures: remove the choice of an earlier build from CMake's cache.
  ON)
    options+=(--config-settings=cmake.args=-UCMAKE_CUDA_ARCHITECTURES)
    cuda_words="CUDA kernels for all architectures"
    ;;
  OFF) cuda_words="no CUDA kernels" ;;
  [0-9]*)
    options=(--config-settings=cmake.define.VMOE_CUDA=ON)
    options+=(--config-settings="cmake.define.CMAKE_CUDA_ARCHITECTURES=$cuda")
    cuda_words="CUDA kernels for architecture $cuda"
    ;;
  *) die "VMOE_CUDA must be AUTO, ON, OFF or architectures as 80 or 80;90, got '$cuda'" ;;
esac

[ -x .venv/bin/pip ] || { say "creating .venv with $("$python" --version)"; "$python" -m venv --clear .venv; }
# --no-compile: Python compiles modules at their first import. Compiling all of torch takes longer than the study.
install=(.venv/bin/python -m pip --disable-pip-version-check install --no-compile)
quiet=--quiet
[ -t 1 ] && quiet=  # show a progress bar in a terminal
say "installing build tools and torch (several GB, only the first time); compiling the CPU kernels"
"${install[@]}" --quiet scikit-build-core pybind11 setuptools-scm cmake ninja
mkdir -p build
# pip installs torch on one core. The CPU kernels need no torch, so the first build compiles them meanwhile, in the
# folder of the package's build. The package's build compiles again what fails here, and reports the error.
compile_kernels() {
  # shellcheck disable=SC2086 # several arguments
  .venv/bin/cmake -S . -B build/venv -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" -DVMOE_KERNELS_ONLY=ON \
    ${CMAKE_ARGS:-} && .venv/bin/cmake --build build/venv
}
if [ ! -e build/venv ]; then compile_kernels >build/kernels.log 2>&1 & fi
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT  # Ctrl-C and a failed command end the other processes, too
"${install[@]}" $quiet torch torchvision
wait
say "installing the dependencies of $extra; compiling $cuda_words"
# One pip downloads the dependencies while another compiles. With build isolation, pip would download torch a second
# time. The Makefile builds the tests in the same folder.
.venv/bin/python scripts/requirements.py "$extra" >build/requirements.txt
"${install[@]}" --quiet -r build/requirements.txt &
dependencies=$!
"${install[@]}" --quiet --no-build-isolation --no-deps --config-settings=build-dir=build/venv --editable . "${options[@]}"
wait "$dependencies"
