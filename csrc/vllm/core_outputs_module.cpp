// Python face of the decoder of vLLM's engine core's messages.
#include <pybind11/pybind11.h>

#include <deque>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/stream_internal.h"
#include "vllm/core_outputs.h"
#include "vllm/core_reader.h"

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

using stream::EngineFinish;
using stream::LogprobRows;
using stream::SequenceKey;
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

// Where sequences of a pump report to: the pump's Python object, which is kept, and the outlet that is told.
struct Outlet {
  py::object pump;
  py::object outlet;
  size_t num_sequences = 0;
};

py::object StatsOf(const vllm::CoreMessage& message) {
  if (!message.has_stats) return py::none();
  return py::make_tuple(message.num_running, message.num_waiting, message.kv_usage);
}

class PyCoreReader {
 public:
  PyCoreReader(int fd, const py::bytes& unread) : reader_(fd, std::string_view(unread)) {}

  void Open(SequenceKey key, py::object outlet, SequenceKey pump_key, uint32_t num_logprobs,
            uint32_t num_prompt_logprobs, SequenceKey first) {
    py::object pump = outlet.attr("pump");
    stream::Pump* native = &py::cast<PyPump&>(pump).native;
    reader_.Open(key, {native, pump_key, num_logprobs + 1, num_prompt_logprobs + 1, first});
    Outlet& known = outlets_[native];
    if (known.num_sequences++ == 0) known = {std::move(pump), std::move(outlet), 1};
    pumps_[key] = native;
  }

  bool Close(SequenceKey key) {
    // What has ended needs no lock, behind which the reader may be busy.
    if (!pumps_.contains(key) || !reader_.Close(key)) return false;
    Forget(key);
    return true;
  }

  py::tuple Take() {
    reader_.Take(&news_);
    py::list stepped;
    for (stream::Pump* pump : news_.stepped) {
      const auto found = outlets_.find(pump);
      if (found != outlets_.end()) stepped.append(found->second.outlet);
    }
    py::list irregular;
    for (const vllm::IrregularEnd& end : news_.irregular) {
      irregular.append(py::make_tuple(end.key, static_cast<int>(end.finish), end.num_tokens));
    }
    py::list utilities;
    for (const std::string& utility : news_.utilities) utilities.append(py::bytes(utility));
    py::object end = py::none();
    if (news_.end) end = py::str(*news_.end);
    for (const SequenceKey key : news_.ended) Forget(key);
    return py::make_tuple(std::move(stepped), std::move(irregular),
                          news_.stats ? StatsOf(*news_.stats) : py::none(), news_.num_preemptions,
                          std::move(utilities), std::move(end));
  }

  vllm::CoreReader& reader() { return reader_; }

 private:
  void Forget(SequenceKey key) {
    const auto found = pumps_.find(key);
    if (found == pumps_.end()) return;
    const auto outlet = outlets_.find(found->second);
    pumps_.erase(found);
    if (--outlet->second.num_sequences > 0) return;
    // The object may do anything when it goes, so it goes last.
    const Outlet gone = std::move(outlet->second);
    outlets_.erase(outlet);
  }

  std::unordered_map<stream::Pump*, Outlet> outlets_;
  std::unordered_map<SequenceKey, stream::Pump*> pumps_;
  vllm::CoreNews news_;
  vllm::CoreReader reader_;  // last, so that its thread ends before the pumps go
};

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
      .def_property_readonly("stats", [](const CoreOutputs& self) { return StatsOf(self.message); })
      .def_property_readonly("num_rows",
                             [](const CoreOutputs& self) { return self.outputs.sequences.size(); })
      .def_property_readonly("num_preemptions",
                             [](const CoreOutputs& self) { return self.message.num_preemptions; })
      .def_property_readonly("has_utility", [](const CoreOutputs& self) { return self.message.has_utility; });
  py::class_<PyCoreReader>(module, "CoreReader")
      .def(py::init<int, const py::bytes&>(), py::arg("fd"), py::arg("unread"))
      .def("fileno", [](PyCoreReader& self) { return self.reader().fd(); })
      .def("open", &PyCoreReader::Open, py::arg("key"), py::arg("outlet"), py::arg("pump_key"), py::kw_only(),
           py::arg("num_logprobs"), py::arg("num_prompt_logprobs"), py::arg("first"))
      .def("close", &PyCoreReader::Close, py::arg("key"))
      .def("start", [](PyCoreReader& self) { self.reader().Start(); })
      .def(
          "stop", [](PyCoreReader& self) { self.reader().Stop(); }, py::call_guard<py::gil_scoped_release>())
      .def("read", [](PyCoreReader& self) { return self.reader().Read(); })
      .def("take", &PyCoreReader::Take)
      .def_property_readonly("num_open", [](PyCoreReader& self) { return self.reader().num_open(); });
}

}  // namespace twinjet::bindings
