// Entry of the extension module twinjet._core.
#include "bindings.h"

PYBIND11_MODULE(_core, module) {
  module.doc() =
      "Native parts of Twinjet: the KV-cache block manager, the token sampler, the scheduler's arithmetic, "
      "the way from tokens to a stream's bytes.";
  module.attr("__version__") = TWINJET_VERSION;
  twinjet::bindings::BindKv(module);
  twinjet::bindings::BindEpp(module);
  twinjet::bindings::BindProcess(module);
  twinjet::bindings::BindRequests(module);
  twinjet::bindings::BindSampler(module);
  twinjet::bindings::BindSamplerCuda(module);
  twinjet::bindings::BindSamplerSeats(module);
  twinjet::bindings::BindSched(module);
  twinjet::bindings::BindStream(module);
  twinjet::bindings::BindVllm(module);
  twinjet::bindings::BindVllmWire(module);
#ifdef TWINJET_WITH_DOOR
  twinjet::bindings::BindDoor(module);
#endif
}
