# Everything a person runs, by name. `make serve` and `make test` are the two that matter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: native cuda stubs test-cpp test-cpp-asan test-cpp-tsan

# Build the extension and the stubs into the source tree, for work with PYTHONPATH=python.
native: stubs
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release -DTWINJET_WERROR=ON -DTWINJET_CUDA=OFF \
	  -DSKBUILD_PROJECT_VERSION=0.1.0 -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	cmake --build build/dev --target _core
	cp build/dev/csrc/bindings/_core*.so python/twinjet/

# Compile the CUDA side, warnings as errors, for all its architectures. Needs nvcc, no GPU.
CUDA_ARCHITECTURES ?= 80-real;89-real;90a-real;100-real;100-virtual
cuda:
	cmake -S . -B build/cuda -G Ninja -DCMAKE_BUILD_TYPE=Release -DTWINJET_WERROR=ON -DTWINJET_CUDA=ON \
	  -DTWINJET_GPU_TESTS=ON -DTWINJET_PYTHON=ON "-DTWINJET_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)" \
	  -DSKBUILD_PROJECT_VERSION=0.1.0 -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	cmake --build build/cuda --target _core sampler_gpu_test kv_gpu_test sampler_gpu_bench

stubs:
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python proto/generate.py python

# The C++ tests, plain and under the sanitizers; each builds the cores anew and runs ctest.
test-cpp: CPP_TEST_FLAGS := -DCMAKE_BUILD_TYPE=Release
test-cpp-asan: CPP_TEST_FLAGS := -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTWINJET_SANITIZE=address,undefined
test-cpp-tsan: CPP_TEST_FLAGS := -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTWINJET_SANITIZE=thread
test-cpp test-cpp-asan test-cpp-tsan:
	PATH=$(abspath $(BIN)):$$PATH cmake -S . -B build/$@ -G Ninja $(CPP_TEST_FLAGS) -DTWINJET_WERROR=ON \
	  -DTWINJET_CUDA=OFF -DTWINJET_PYTHON=OFF -DTWINJET_TESTS=ON
	PATH=$(abspath $(BIN)):$$PATH cmake --build build/$@ -j 2
	PATH=$(abspath $(BIN)):$$PATH ctest --test-dir build/$@ --output-on-failure
