// Python face of csrc/sampler.
#include "bindings.h"

namespace twinjet::bindings {

void BindSampler(pybind11::module_& module) { (void)module; }

}  // namespace twinjet::bindings
