# Everything a person runs, by name. `make serve` and `make test` are the two that matter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: native stubs

# Build the extension and the stubs into the source tree, for work with PYTHONPATH=python.
native: stubs
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release -DTWINJET_WERROR=ON -DTWINJET_CUDA=OFF \
	  -DSKBUILD_PROJECT_VERSION=0.1.0 -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	cmake --build build/dev --target _core
	cp build/dev/csrc/bindings/_core*.so python/twinjet/

stubs:
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python proto/generate.py python
