#!/usr/bin/env bash
# Runs the GPU tests under NVIDIA's compute-sanitizer: out-of-bounds and misaligned access, races in shared memory, reads
# of memory that nobody wrote. Needs a GPU and the CUDA toolkit. Slow: minutes.
#   tests/sanitizers/compute.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH: it is part of the CUDA toolkit" >&2; exit 2; }
for tool in memcheck racecheck initcheck; do
  echo "== $tool"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
    "$PYTHON" -m pytest -p no:cacheprovider "${@:-tests/gpu}"
done
