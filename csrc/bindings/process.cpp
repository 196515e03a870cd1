// twinjet._core: what processes that other native code forks from this one begin with.
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <system_error>

#include "bindings.h"

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

std::atomic<int> num_asking = 0;

// In the child of each fork(); vfork() and posix_spawn(), Python's subprocess among them, do not come here.
void BeginSession() {
  if (num_asking.load() > 0) setsid();
}

void AskForSessions(bool is_wanted) {
  static std::once_flag registered;
  std::call_once(registered, [] {
    const int error = pthread_atfork(nullptr, nullptr, &BeginSession);
    if (error != 0) throw std::system_error(error, std::generic_category(), "pthread_atfork");
  });
  num_asking += is_wanted ? 1 : -1;
}

}  // namespace

void BindProcess(py::module_& module) {
  module.def("ask_for_sessions", &AskForSessions, py::arg("is_wanted"),
             "Have processes that are forked from this one begin sessions, until as often told not to.");
}

}  // namespace twinjet::bindings
