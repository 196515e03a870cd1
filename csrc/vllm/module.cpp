// Python face of the native decode path under vLLM's scheduler.
#include "bindings/bindings.h"
#include "bindings/kv_convert.h"
#include "vllm/decode_batch.h"

namespace py = pybind11;

namespace twinjet::bindings {

void BindVllm(py::module_& module) {
  py::class_<DecodeBatch>(module, "DecodeBatch")
      .def(py::init([](py::object manager, int64_t max_model_len, bool is_async, bool resends_tokens,
                       py::object native_hasher, const py::tuple& statuses, py::type output_type) {
             RowContext context;
             context.manager = ManagerOf(manager.ptr());
             if (!context.manager) throw py::error_already_set();
             if (max_model_len < 1) throw py::value_error("max_model_len must be at least 1");
             if (statuses.size() != 2) throw py::value_error("statuses must be (stopped, length capped)");
             context.max_model_len = max_model_len;
             context.is_async = is_async;
             context.resends_tokens = resends_tokens;
             context.native_hasher = std::move(native_hasher);
             context.stopped_status = statuses[0];
             context.length_status = statuses[1];
             return std::make_unique<DecodeBatch>(std::move(manager), std::move(context),
                                                  std::move(output_type));
           }),
           py::arg("manager"), py::kw_only(), py::arg("max_model_len"), py::arg("is_async"),
           py::arg("resends_tokens"), py::arg("native_hasher"), py::arg("statuses"), py::arg("output_type"))
      .def("schedule", &DecodeBatch::Schedule, py::arg("running"), py::arg("sequences"),
           py::arg("last_scheduled"), py::arg("token_budget"), py::arg("step"), py::kw_only(),
           py::arg("shows_adapters") = false)
      .def("merge", &DecodeBatch::Merge, py::arg("running"), py::arg("num_scheduled"), py::arg("native"),
           py::arg("other_scheduled"), py::arg("other"))
      .def("update", &DecodeBatch::Update, py::arg("num_scheduled"), py::arg("row_indices"),
           py::arg("sampled"), py::arg("logprobs"), py::arg("requests"))
      .def("evict", &DecodeBatch::Evict, py::arg("request"))
      .def("evict_all", &DecodeBatch::EvictAll)
      .def("write_back", &DecodeBatch::WriteBackAll)
      .def_property_readonly("num_rows", &DecodeBatch::num_rows)
      .def_property_readonly("template_version", &DecodeBatch::template_version)
      .def("counters", [](const DecodeBatch& batch) {
        const Counters& counters = batch.counters();
        py::dict result;
        result["rows_scheduled"] = counters.num_rows_scheduled;
        result["rows_updated"] = counters.num_rows_updated;
        result["rows_adopted"] = counters.num_adopted;
        result["rows_evicted"] = counters.num_evicted;
        return result;
      });
}

}  // namespace twinjet::bindings
