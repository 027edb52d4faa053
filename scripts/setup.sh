#!/usr/bin/env bash
# setup.sh [PYTHON [EXTRA]] -- makes .venv with torch, the build tools and this package (editable), with what EXTRA of
# pyproject.toml needs (study by default, test, bench, lint). Run by the Makefile; once more does no harm.
# VMOE_CUDA in the environment says for which GPUs the CUDA kernels are compiled: AUTO (the default) for the GPUs of
# this machine, and not at all where there is none; ON for every architecture that CMakeLists.txt names; OFF for none.
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

# What pip cannot bring.
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
# Without the system's GoogleTest, CMake fetches its source.
if [ "$extra" = test ] && may_apt_get && [ ! -e /usr/include/gtest/gtest.h ]; then
  apt_get libgtest-dev || say "no libgtest-dev: CMake will fetch GoogleTest"
fi

# The build itself never looks at a device: it is told here.
options=(-C "cmake.define.VMOE_CUDA=$cuda")
case $cuda in
  AUTO)
    capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
      grep -xE '[0-9]+\.[0-9]+' | sort -u || true)
    if [ -n "$capabilities" ]; then
      architectures=$(tr -d . <<<"$capabilities" | paste -sd ';')
      options+=(-C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$architectures")
      cuda_words="CUDA kernels for compute capability $(paste -sd ' ' <<<"$capabilities")"
    else
      options=(-C cmake.define.VMOE_CUDA=OFF)
      cuda_words="no CUDA kernels, for there is no GPU (VMOE_CUDA=ON compiles them all the same)"
    fi
    ;;
  # CMakeLists.txt chooses, whatever an earlier build was told.
  ON) options+=(-C cmake.args=-UCMAKE_CUDA_ARCHITECTURES) cuda_words="CUDA kernels for every architecture" ;;
  OFF) cuda_words="no CUDA kernels" ;;
  *) die "VMOE_CUDA must be AUTO, ON or OFF, got '$cuda'" ;;
esac

[ -x .venv/bin/pip ] || { say "making .venv with $("$python" --version)"; "$python" -m venv --clear .venv; }
# Python compiles a module when it is first imported: to compile all of torch's takes longer than the study needs.
install() { .venv/bin/python -m pip --disable-pip-version-check install --no-compile "$@"; }
quiet=--quiet
[ -t 1 ] && quiet=  # a progress bar for who looks on
say "torch (some GB, once)"
install $quiet torch torchvision
say "build tools"
install --quiet scikit-build-core pybind11 cmake ninja
say "vmoe_routers with what $extra needs; compiling: $cuda_words"
# No isolation: pip would fetch torch a second time for the build.
install --quiet --no-build-isolation --editable ".[$extra]" "${options[@]}"
