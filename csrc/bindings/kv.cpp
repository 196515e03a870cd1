// Python face of csrc/kv: what each of its types binds.
#include "bindings.h"
#include "kv_internal.h"

namespace twinjet::bindings {

void BindKv(pybind11::module_& module) {
  BindBlockHasher(module);
  BindBlockTable(module);
  BindBlockManager(module);
}

}  // namespace twinjet::bindings
