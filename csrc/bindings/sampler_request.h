// A sampling request as Python holds it.
#pragma once

#include <pybind11/pybind11.h>

#include "sampler/request.h"

namespace twinjet::bindings {

namespace py = pybind11;

// A request and whether a call is using it: another thread may not.
struct PyRequest {
  sampler::Request request;
  bool is_busy = false;

  sampler::Request& Idle() {
    if (is_busy) throw py::value_error("a request is given twice or is in use by another call");
    return request;
  }
};

void BindSamplerRequest(py::module_& module);

}  // namespace twinjet::bindings
