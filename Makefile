# Everything a person runs, by name. `make serve` and `make test` are the two that matter.
#
# VENV names the virtual environment. The default, .venv, is created and kept up to date; another one is used
# as it is, with the source tree on the path.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUF := .cache/buf/node_modules/.bin/buf
BUF_VERSION := 1.75.0

ifeq ($(VENV),.venv)
ready := $(PYTHON) deploy/bootstrap.py
run := $(BIN)/python
else
ready := $(MAKE) --no-print-directory native VENV=$(VENV) DEV=
run := PYTHONPATH=python $(BIN)/python
endif

# What CMake must be told to build the extension, which pip tells it otherwise.
extension = -DSKBUILD_PROJECT_VERSION=0.1.0 -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)

.PHONY: serve venv test guidellm bench-frontend bench-frontend-figures cuda lint format native stubs test-cpp test-cpp-asan test-cpp-tsan test-core-asan \
  fuzz-door

# Install what is missing, make the demo model ready and serve it. ARGS go to `twinjet serve`.
serve:
	@$(ready)
	@exec $(run) -m twinjet.cli serve $(ARGS)

# Create or update the virtual environment, with the tools for tests and lint.
venv:
	@$(ready) $(if $(filter .venv,$(VENV)),--dev)

# All tests, the quick ones first; the last lines are pytest's two summaries.
test: venv test-cpp test-cpp-asan test-cpp-tsan
	-@$(MAKE) --no-print-directory guidellm
	PYTHON=$(PYTHON) deploy/dynamo_venv.sh
	PYTEST="$(run) -m pytest" deploy/pytest_both.sh

# guidellm, whose own models must read the reports that we write; its tests are skipped where it cannot be had.
guidellm: .cache/guidellm/installed
.cache/guidellm/installed: deploy/requirements/guidellm.txt
	$(PYTHON) -m venv --clear .cache/guidellm
	.cache/guidellm/bin/pip install -q --no-deps -r $<
	touch $@

lint: venv stubs $(BUF)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests/cpp -name '*.h' -o -name '*.cc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(BIN)/clang-format --dry-run -Werror
	cd proto && ../$(BUF) lint && ../$(BUF) format -d --exit-code
	deploy/buf_breaking.sh $(BUF)

# Bring Python, C++ and proto into the form that lint wants.
format: venv $(BUF)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests/cpp -name '*.h' -o -name '*.cc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(BIN)/clang-format -i
	cd proto && ../$(BUF) format -w

$(BUF):
	npm install --prefix .cache/buf --no-fund --no-audit @bufbuild/buf@$(BUF_VERSION)

# Build the extension and the stubs into the source tree, for work with PYTHONPATH=python.
native: stubs
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release -DTWINJET_WERROR=ON -DTWINJET_CUDA=OFF \
	  $(extension)
	cmake --build build/dev --target _core
	cp --remove-destination build/dev/csrc/bindings/_core*.so python/twinjet/

# Compile the CUDA side, warnings as errors, for all its architectures. Needs nvcc, no GPU.
CUDA_ARCHITECTURES ?= 80-real;89-real;90a-real;100-real;100-virtual
cuda: venv
	PATH=$(abspath $(BIN)):$$PATH cmake -S . -B build/cuda -G Ninja -DCMAKE_BUILD_TYPE=Release -DTWINJET_WERROR=ON -DTWINJET_CUDA=ON \
	  -DTWINJET_GPU_TESTS=ON -DTWINJET_PYTHON=ON "-DTWINJET_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)" \
	  $(extension)
	PATH=$(abspath $(BIN)):$$PATH cmake --build build/cuda --target _core sampler_gpu_test kv_gpu_test sampler_gpu_bench

# What the front end costs behind a mock of vLLM's engine core. ARGS go to bench/frontend/run.py.
bench-frontend: build/bench/load
	@$(ready)
	@$(run) bench/frontend/run.py $(ARGS)

# All of it, beside other front ends, into docs/frontend.md: some 20 minutes, on a machine that does nothing else.
FRONTEND_FIGURES := build/bench/frontend.json
bench-frontend-figures: build/bench/load
	@$(ready)
	VENV=$(VENV) bench/frontend/peers.sh
	$(run) bench/frontend/run.py --campaign --out $(FRONTEND_FIGURES) --keep-logs build/bench/logs $(ARGS)
	$(run) bench/frontend/table.py $(FRONTEND_FIGURES)

build/bench/load: bench/frontend/load.cc
	mkdir -p $(@D)
	$(CXX) -O2 -std=c++20 -Wall -Wextra $< -lnghttp2 -lssl -lcrypto -o $@

stubs:
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python proto/generate.py python

# The C++ tests, plain and under the sanitizers; each builds the cores anew and runs ctest. Under the thread
# sanitizer only those that have threads.
test-cpp: CPP_TEST_FLAGS := -DCMAKE_BUILD_TYPE=Release
# With -O2 a sanitized build takes twice the time, and the tests run no faster.
SANITIZED = -DCMAKE_BUILD_TYPE=RelWithDebInfo "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g1 -DNDEBUG" -DTWINJET_SANITIZE
test-cpp-asan: CPP_TEST_FLAGS := $(SANITIZED)=address,undefined
test-cpp-tsan: CPP_TEST_FLAGS := $(SANITIZED)=thread
test-cpp-tsan: CPP_TEST_TARGET := --target threaded_tests
test-cpp-tsan: CTEST_FLAGS := -L threaded
test-cpp test-cpp-asan test-cpp-tsan:
	PATH=$(abspath $(BIN)):$$PATH cmake -S . -B build/$@ -G Ninja $(CPP_TEST_FLAGS) -DTWINJET_WERROR=ON \
	  -DTWINJET_CUDA=OFF -DTWINJET_PYTHON=OFF -DTWINJET_TESTS=ON
	PATH=$(abspath $(BIN)):$$PATH cmake --build build/$@ -j 2 $(CPP_TEST_TARGET)
	PATH=$(abspath $(BIN)):$$PATH ctest --test-dir build/$@ --output-on-failure $(CTEST_FLAGS)

# Hostile bytes into the native door, under libFuzzer with the address and undefined-behaviour sanitizers; needs
# clang. Not part of `make test`.
FUZZ_CXX ?= clang++-14
FUZZ_S ?= 300
fuzz-door:
	mkdir -p build/fuzz-door/corpus
	$(FUZZ_CXX) -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Icsrc -Wall -Wextra \
	  tests/fuzz/door_fuzz.cc csrc/door/call.cc csrc/door/fields.cc csrc/door/mailbox.cc csrc/door/message_reader.cc \
	  csrc/door/outbox.cc csrc/door/peer_conduct.cc csrc/door/request_head.cc csrc/door/session*.cc csrc/door/wire.cc -lnghttp2 -lz -o build/fuzz-door/door_fuzz
	build/fuzz-door/door_fuzz -max_total_time=$(FUZZ_S) -max_len=4096 -artifact_prefix=build/fuzz-door/ build/fuzz-door/corpus

# The extension itself under the address and undefined-behaviour sanitizers: its Python tests without an engine.
# Not part of `make test`: its build alone takes some minutes.
CORE_ASAN := build/test-core-asan
CORE_ASAN_TESTS ?= tests/kv tests/sampling tests/scheduler tests/stream tests/engines/vllm
test-core-asan: venv stubs
	PATH=$(abspath $(BIN)):$$PATH cmake -S . -B $(CORE_ASAN) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DTWINJET_SANITIZE=address,undefined -DTWINJET_WERROR=ON -DTWINJET_CUDA=OFF $(extension)
	PATH=$(abspath $(BIN)):$$PATH cmake --build $(CORE_ASAN) --target _core
	rm -rf $(CORE_ASAN)/python && mkdir $(CORE_ASAN)/python && cp -r python/twinjet $(CORE_ASAN)/python/
	cp $(CORE_ASAN)/csrc/bindings/_core*.so $(CORE_ASAN)/python/twinjet/
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) \
	  $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	  PYTHONPATH=$(CORE_ASAN)/python $(BIN)/python -m pytest -s -q -W default -m "not engine" $(CORE_ASAN_TESTS)
