#!/usr/bin/env bash
# Collects what the GPU tests and kernel benchmarks need on a node that has torch and Triton but no internet.
#   benchmarks/offline_wheels.sh FOLDER [cp312]          here, with internet: wheels for that Python, x86_64 Linux
#   pip install --no-index --find-links FOLDER --no-deps FOLDER/*.whl          there, then in the checkout:
#   TULU_HPC_CUDA=ON pip install --no-index --no-build-isolation --no-deps -e .
#   pytest tests/gpu --gpu-summary FILE; python -m tulu_hpc.kernels.FAMILY.bench     (`tulu-hpc` itself needs more)
# torch, Triton and CUDA stay those of the node: nothing here depends on their versions.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,7s/^# //p' "$0"; exit 2; }
FOLDER=$1 TAG=${2:-cp312}
HERE=$(cd "$(dirname "$0")/.." && pwd)
VERSION=${TAG#cp}
PACKAGES=(pybind11 ninja cmake setuptools wheel pytest pluggy iniconfig pygments packaging pytest-timeout hypothesis
  sortedcontainers liger-kernel cut-cross-entropy)
mkdir -p "$FOLDER"
for package in "${PACKAGES[@]}"; do
  # The pinned version where there is one; names are compared as PyPI does.
  pin=$(grep -hiE "^${package//-/[-_.]}==" "$HERE"/constraints/*.txt | head -n 1 || true)
  python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --dest "$FOLDER" \
    --python-version "${VERSION:0:1}.${VERSION:1}" --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
    --platform any "${pin:-$package}"
done
du -sh "$FOLDER"
ls "$FOLDER"
