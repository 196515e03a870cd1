// Entry of the extension module twinjet._core.
#include "bindings.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "Native parts of Twinjet: the KV-cache block manager and the token sampler.";
  module.attr("__version__") = TWINJET_VERSION;
  twinjet::bindings::BindKv(module);
  twinjet::bindings::BindSampler(module);
  twinjet::bindings::BindSamplerCuda(module);
  twinjet::bindings::BindVllm(module);
}
