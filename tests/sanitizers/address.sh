#!/usr/bin/env bash
# Runs the tests of the C++ kernels with AddressSanitizer and UndefinedBehaviorSanitizer in the compiled core.
#   tests/sanitizers/address.sh [pytest arguments]        PYTHON=.venv/bin/python by default
# The core is built apart (build/sanitized) and laid over a copy of the package, so the checkout's own build stays.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
BUILD=$PWD/build/sanitized
FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
PATH=$(dirname "$PYTHON"):$PATH

mkdir -p build
cmake -G Ninja -S . -B "$BUILD" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTULU_CUDA=OFF "-DPython_EXECUTABLE=$PYTHON" \
  "-Dpybind11_DIR=$("$PYTHON" -m pybind11 --cmakedir)" "-DCMAKE_CXX_FLAGS=$FLAGS" \
  "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$BUILD/lib" >"$BUILD.log" 2>&1 || { cat "$BUILD.log"; exit 1; }
cmake --build "$BUILD" >>"$BUILD.log" 2>&1 || { cat "$BUILD.log"; exit 1; }

COPY=$(mktemp -d)
trap 'rm -rf "$COPY"' EXIT
cp -rL tulu_hpc tests pyproject.toml "$COPY"/
rm -f "$COPY"/tulu_hpc/kernels/*.so
cp "$BUILD"/lib/*.so "$COPY"/tulu_hpc/kernels/

cd "$COPY"
export LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)"
# Python and torch keep memory to the end by design; what is looked for is access, not leaks.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH=$COPY OMP_NUM_THREADS=2
# It must see a planted fault: a block of logits that is said to be ten times as long as it is.
if "$PYTHON" -c '
import torch
from tulu_hpc.kernels.native import core
z = [torch.zeros(64) for _ in range(5)]
target, start = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1])
a = [x.data_ptr() for x in z]
core().linear_logprob_forward_cpu(a[0], 640, 1, 640, 0, target.data_ptr(), start.data_ptr(), *a[1:], 1.0, 0.0, 1)
' >"$COPY/planted.log" 2>&1 || ! grep -q heap-buffer-overflow "$COPY/planted.log"; then
  echo "the planted fault was not seen:" >&2
  cat "$COPY/planted.log" >&2
  exit 1
fi
TESTS=(tests/kernels/test_linear_logprob.py
  tests/kernels/test_linear_logprob_products.py tests/kernels/test_linear_logprob_invariance.py
  tests/kernels/test_linear_logprob_interface.py tests/kernels/test_preference_loss.py tests/kernels/test_policy_loss.py
  tests/kernels/test_value_loss.py tests/kernels/test_gae.py)
"$PYTHON" -m pytest -p no:cacheprovider "${@:-${TESTS[@]}}" -k "not compile and not triton"
