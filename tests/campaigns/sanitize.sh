#!/usr/bin/env bash
# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, at every ISA of this machine:
#
#     PYTHON=.venv/bin/python tests/campaigns/sanitize.sh [seconds of fuzzing, default 60] [its seed, default 0]
#
# Ends with "no finding" and exit code 0, or at the first finding, with the kernel's line and the call. Needs cmake
# and pybind11. Builds into build/sanitize, beside no other build; python/ is copied there so that its _C is the one
# imported. In this build each piece of a kernel's scratch ends in a red zone (csrc/cpu/conv_tile.h).
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "${PYTHON:-python3}")
PATH=$(dirname "$python"):$PATH  # cmake may be its package
seconds=${1:-60} seed=${2:-0}
build=$PWD/build/sanitize

# pybind11's types have no vptr check across libraries.
checks="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
mkdir -p "$build"
cmake -S . -B "$build" -DCMAKE_CXX_FLAGS="$checks" -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" > "$build/log" 2>&1 || { cat "$build/log"; exit 1; }
cmake --build "$build" -j "${JOBS:-2}"
rm -rf "$build/python"
mkdir "$build/python"
cp -r python/convoxel "$build/python/"
rm -f "$build"/python/convoxel/_C*.so
cmake --install "$build" --prefix "$build/python" > "$build/log"
# Without the pool: its blocks have no red zones behind them, and keep those of the scratch that they were.
sed -i 's/^LEAST = .*/LEAST = 2**63/' "$build/python/convoxel/memory.py"

# Python itself is not instrumented: the runtime comes first, and leaks are the interpreter's. torch's tensors have
# red zones because its malloc is then the sanitizer's; hostile sizes are refused, not granted.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export LD_PRELOAD
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:max_allocation_size_mb=4096
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:abort_on_error=1
export PYTHONPATH="$build/python" OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive

"$python" -c "import convoxel; print('sanitized', convoxel._C.__file__, *convoxel.isas())"
"$python" -m pytest -p no:cacheprovider tests/test_properties.py tests/test_winograd.py tests/test_depthwise.py
"$python" -m pytest -p no:cacheprovider -k "exact or nearest or bound or bits or strides" \
  tests/test_conv.py tests/test_norm.py tests/test_pool.py tests/test_resample.py tests/test_activation.py
# Without torch's own kernels, some of which do not survive these calls.
"$python" tests/campaigns/fuzz.py --seconds "$seconds" --seed "$seed" --ours
echo "no finding"
