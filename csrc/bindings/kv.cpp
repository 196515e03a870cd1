// Python face of csrc/kv.
#include "bindings.h"

namespace twinjet::bindings {

void BindKv(pybind11::module_& module) { (void)module; }

}  // namespace twinjet::bindings
