// Python face of the decoder of vLLM's engine core's messages.
#include <pybind11/pybind11.h>

#include <deque>
#include <vector>

#include "bindings/bindings.h"
#include "vllm/core_outputs.h"

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

using stream::EngineFinish;
using stream::LogprobRows;
using stream::SequenceStep;
using stream::StepOutputs;
using stream::StopCause;

// Buffers of Python objects, held while native code reads them.
class HeldFrames {
 public:
  explicit HeldFrames(const py::sequence& frames) {
    for (const py::handle frame : frames) {
      Py_buffer& view = views_.emplace_back();
      if (PyObject_GetBuffer(frame.ptr(), &view, PyBUF_SIMPLE) != 0) {
        views_.pop_back();
        Release();
        throw py::error_already_set();
      }
      frames_.emplace_back(static_cast<const uint8_t*>(view.buf), static_cast<size_t>(view.len));
    }
  }
  ~HeldFrames() { Release(); }
  HeldFrames(const HeldFrames&) = delete;
  HeldFrames& operator=(const HeldFrames&) = delete;

  std::span<const vllm::Frame> frames() const { return frames_; }

 private:
  void Release() {
    for (Py_buffer& view : views_) PyBuffer_Release(&view);
    views_.clear();
  }

  std::deque<Py_buffer> views_;
  std::vector<vllm::Frame> frames_;
};

py::object Logprobs(const StepOutputs& outputs, const LogprobRows& rows) {
  if (rows.num_rows == 0) return py::none();
  py::list found;
  for (uint32_t i = 0; i < rows.num_rows; ++i) {
    py::list candidates;
    const auto ids = outputs.CandidateIds(rows, i);
    const auto logprobs = outputs.CandidateLogprobs(rows, i);
    for (size_t j = 0; j < ids.size(); ++j) candidates.append(py::make_tuple(ids[j], logprobs[j]));
    found.append(py::make_tuple(std::move(candidates), outputs.Rank(rows, i)));
  }
  return found;
}

py::object Cause(const StepOutputs& outputs, const SequenceStep& row) {
  if (row.stop_cause == StopCause::kToken) return py::int_(row.stop_token);
  if (row.stop_cause == StopCause::kText) return py::str(std::string(outputs.StopText(row)));
  return py::none();
}

py::list Rows(const StepOutputs& outputs) {
  py::list rows(outputs.sequences.size());
  size_t index = 0;
  for (const SequenceStep& row : outputs.sequences) {
    py::list tokens(row.num_tokens);
    size_t at = 0;
    for (const int32_t token : outputs.Tokens(row)) tokens[at++] = py::int_(token);
    const bool is_plain = row.finish == EngineFinish::kNone && !row.has_prompt &&
                          row.logprobs.num_rows == 0 && row.prompt_logprobs.num_rows == 0;
    py::object rest = py::none();
    if (!is_plain) {
      py::object cached = py::none();
      if (row.has_prompt) cached = py::int_(row.num_cached_tokens);
      rest = py::make_tuple(static_cast<int>(row.finish), Cause(outputs, row), std::move(cached),
                            Logprobs(outputs, row.logprobs), Logprobs(outputs, row.prompt_logprobs));
    }
    rows[index++] = py::make_tuple(row.key, std::move(tokens), std::move(rest));
  }
  return rows;
}

struct CoreOutputs {
  StepOutputs outputs;
  vllm::CoreMessage message;

  void Decode(const py::sequence& sequence) {
    const HeldFrames held(sequence);
    const py::gil_scoped_release release;
    message = vllm::DecodeCoreOutputs(held.frames(), &outputs);
  }
};

}  // namespace

void BindVllmWire(py::module_& module) {
  py::register_exception<vllm::WireError>(module, "WireError", PyExc_ValueError);
  py::class_<CoreOutputs>(module, "CoreOutputs")
      .def(py::init<>())
      .def("decode", &CoreOutputs::Decode, py::arg("frames"))
      .def("rows", [](const CoreOutputs& self) { return Rows(self.outputs); })
      .def_property_readonly("stats",
                             [](const CoreOutputs& self) -> py::object {
                               const vllm::CoreMessage& message = self.message;
                               if (!message.has_stats) return py::none();
                               return py::make_tuple(message.num_running, message.num_waiting,
                                                     message.kv_usage);
                             })
      .def_property_readonly("num_rows",
                             [](const CoreOutputs& self) { return self.outputs.sequences.size(); })
      .def_property_readonly("num_preemptions",
                             [](const CoreOutputs& self) { return self.message.num_preemptions; })
      .def_property_readonly("has_utility", [](const CoreOutputs& self) { return self.message.has_utility; })
      .def_property_readonly("has_pooling", [](const CoreOutputs& self) { return self.message.has_pooling; });
}

}  // namespace twinjet::bindings
