// Python face of csrc/requests, but for what belongs to the door's calls.
#include <pybind11/stl.h>

#include "bindings.h"
#include "requests/message_shape.h"

namespace py = pybind11;

namespace twinjet::bindings {

void BindRequests(py::module_& module) {
  using requests::MessageShape;
  py::class_<MessageShape>(module, "MessageShape")
      .def(py::init<std::vector<MessageShape::Type>>(), py::arg("types"))
      .def(
          "find_excess",
          [](const MessageShape& self, const py::bytes& message, size_t max_values, size_t max_numbers) {
            const std::string_view view(message);
            const py::gil_scoped_release released;
            return self.FindExcess(view, max_values, max_numbers);
          },
          py::arg("message"), py::arg("max_values"), py::arg("max_numbers"));
}

}  // namespace twinjet::bindings
