#!/usr/bin/env bash
# lower_bounds.sh [PYTHON] -- builds and tests with the oldest packages that pyproject.toml allows, as listed in
# tests/lower_bounds.txt, in build/lower-bounds. PYTHON should be the oldest supported Python, 3.10.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3} folder=build/lower-bounds
[ -x $folder/bin/pip ] || "$python" -m venv $folder
install() { $folder/bin/python -m pip --disable-pip-version-check install --quiet --constraint tests/lower_bounds.txt "$@"; }
install torch torchvision scikit-build-core pybind11 setuptools-scm cmake ninja
export PATH="$PWD/$folder/bin:$PATH"
install --no-build-isolation '.[training]' pytest pytest-xdist hypothesis 'tomli; python_version < "3.11"' \
  --config-settings=build-dir=build/lower --config-settings=cmake.define.VMOE_CUDA=OFF
# The tests run in a folder without the source tree, so that they import the installed package.
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
chmod 755 "$run"  # a test becomes another user
cp -r tests docs examples scripts pyproject.toml README.md "$run"
cd "$run"
# Old packages call functions that newer versions of their dependencies deprecate.
python -m pytest -n auto -p no:cacheprovider -W ignore::DeprecationWarning \
  tests/test_import.py tests/test_moe.py tests/test_experts.py tests/test_aux_loss.py tests/test_missing_packages.py \
  tests/ops tests/routers tests/models tests/checkpoints tests/study tests/training
