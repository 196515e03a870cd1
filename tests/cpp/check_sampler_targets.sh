#!/bin/sh
# Builds the sampler's C++ tests and runs them with every instruction set this CPU has, 20 times the
# usual number of random rows. Needs g++ and cmake, no Python. Usage: check_sampler_targets.sh [build folder]
set -eu
source_dir=$(cd "$(dirname "$0")/../.." && pwd)
build_dir=${1:-$source_dir/build/targets}
cmake -S "$source_dir" -B "$build_dir" -DCMAKE_BUILD_TYPE=Release -DTWINJET_WERROR=ON -DTWINJET_CUDA=OFF \
  -DTWINJET_PYTHON=OFF -DTWINJET_TESTS=ON
cmake --build "$build_dir" --target sampler_spec_test sampler_row_test sampler_request_test sampler_batch_test
for name in spec request batch; do "$build_dir/tests/cpp/sampler_${name}_test"; done
TWINJET_TEST_ROWS=${TWINJET_TEST_ROWS:-20} "$build_dir/tests/cpp/sampler_row_test"
for object in "$build_dir"/csrc/sampler/CMakeFiles/twinjet_sampler.dir/kernels_avx*.o; do
  # A weak symbol could be kept by the linker for baseline code too.
  if nm "$object" | grep -q ' [VWu] '; then
    echo "$object defines weak symbols" >&2
    exit 1
  fi
done
