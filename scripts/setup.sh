#!/usr/bin/env bash
# setup.sh [PYTHON] -- makes .venv with torch, the build tools and this package (editable, with what
# its tests and the study need) in it. Run by the Makefile; once more does no harm.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

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
if may_apt_get && [ ! -e /usr/include/gtest/gtest.h ]; then
  apt_get libgtest-dev || say "no libgtest-dev: CMake will fetch GoogleTest"
fi

[ -x .venv/bin/pip ] || { say "making .venv with $("$python" --version)"; "$python" -m venv --clear .venv; }
install() { .venv/bin/python -m pip --disable-pip-version-check install "$@"; }
quiet=--quiet
[ -t 1 ] && quiet=  # a progress bar for who looks on
say "torch (some GB, once)"
install $quiet torch torchvision
say "build tools"
install --quiet scikit-build-core pybind11 cmake ninja
say "vmoe_routers: compiling, and what tests and study need"
# No isolation: pip would fetch torch a second time for the build.
install --quiet --no-build-isolation --editable ".[test]"
