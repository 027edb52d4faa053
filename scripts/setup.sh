#!/usr/bin/env bash
# setup.sh [PYTHON [EXTRA]] -- creates .venv with torch, the build tools, this package (editable) and the dependencies
# of EXTRA of pyproject.toml (study by default, test, bench, lint). The Makefile runs it; running it again is safe.
# VMOE_CUDA in the environment chooses the GPUs for which the CUDA kernels are compiled: AUTO (the default) for the GPUs
# of this machine, and none without a GPU; ON for every architecture that cmake/modules.cmake names; OFF for none.
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
command -v "$python" >/dev/null || die "no $python here; Python 3.10 or newer is wanted: make PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  die "Python 3.10 or newer is wanted, $python is $("$python" --version): make PYTHON=..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
missing=()
command -v c++ >/dev/null || missing+=(g++)
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python$version-venv")
"$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
  missing+=("python$version-dev")
if [ ${#missing[@]} -gt 0 ]; then
  may_apt_get || die "please install first: sudo apt install ${missing[*]}"
  say "installing ${missing[*]}"
  apt_get "${missing[@]}"
fi
# Without a system GoogleTest, CMake fetches its source.
if [ "$extra" = test ] && may_apt_get && [ ! -e /usr/include/gtest/gtest.h ]; then
  apt_get libgtest-dev || say "no libgtest-dev: CMake will fetch GoogleTest"
fi

# The build itself never asks for a GPU: this script passes it the architectures.
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
      cuda_words="no CUDA kernels, for there is no GPU (VMOE_CUDA=ON compiles them all the same)"
    fi
    ;;
  # cmake/modules.cmake chooses the architectures; forget those of an earlier build.
  ON) options+=(--config-settings=cmake.args=-UCMAKE_CUDA_ARCHITECTURES) cuda_words="CUDA kernels for every architecture" ;;
  OFF) cuda_words="no CUDA kernels" ;;
  *) die "VMOE_CUDA must be AUTO, ON or OFF, got '$cuda'" ;;
esac

[ -x .venv/bin/pip ] || { say "making .venv with $("$python" --version)"; "$python" -m venv --clear .venv; }
# Python compiles a module at its first import. Compiling all of torch's modules takes longer than the study.
install() { .venv/bin/python -m pip --disable-pip-version-check install --no-compile "$@"; }
quiet=--quiet
[ -t 1 ] && quiet=  # show a progress bar in a terminal
say "torch (some GB, once)"
install $quiet torch torchvision
say "build tools"
install --quiet scikit-build-core pybind11 cmake ninja
say "vmoe_routers with what $extra needs; compiling: $cuda_words"
# With build isolation, pip would download torch a second time.
install --quiet --no-build-isolation --editable ".[$extra]" "${options[@]}"
