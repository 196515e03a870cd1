// Python face of the streams and the pump. Steps from Python are tuples, read without pybind11's dispatch:
// they are the one thing here that comes for each token.
#include <pybind11/stl.h>
#include <unistd.h>

#include <limits>
#include <string>

#include "bindings.h"
#include "fast_call.h"
#include "kv_convert.h"
#include "sched_internal.h"
#include "stream/pump.h"
#include "stream_internal.h"

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

using stream::Delta;
using stream::Ending;
using stream::EngineFinish;
using stream::LogprobList;
using stream::LogprobRows;
using stream::Pump;
using stream::Report;
using stream::SequenceKey;
using stream::SequenceStep;
using stream::StepOutputs;
using stream::StopCause;
using stream::Stream;
using stream::StreamFacts;
using stream::Vocabulary;

py::list BytesOfAll(const std::vector<std::string>& messages) {
  py::list list(messages.size());
  for (size_t i = 0; i < messages.size(); ++i) list[i] = py::bytes(messages[i]);
  return list;
}

// Rows of (token ids, log probabilities, rank), the token in the sequence first; rank 0 or None: not known.
LogprobList ReadLogprobs(py::handle rows) {
  LogprobList list;
  for (py::handle item : py::cast<py::sequence>(rows)) {
    auto [ids, logprobs, rank] =
        py::cast<std::tuple<std::vector<int32_t>, std::vector<float>, std::optional<uint32_t>>>(item);
    if (ids.empty() || ids.size() != logprobs.size()) {
      throw py::value_error(
          "a row of log probabilities needs as many of them as token ids, and at least one");
    }
    list.Add(ids, logprobs, rank.value_or(0));
  }
  return list;
}

py::list WriteLogprobs(const LogprobList& list) {
  py::list rows;
  for (const LogprobList::Row& row : list.rows) {
    py::list ids;
    py::list logprobs;
    for (uint32_t i = 0; i < row.width; ++i) {
      ids.append(list.ids[row.first + i]);
      logprobs.append(list.logprobs[row.first + i]);
    }
    rows.append(py::make_tuple(ids, logprobs, row.rank));
  }
  return rows;
}

// Puts a list into a step's arrays, each row as wide as the widest.
LogprobRows PutLogprobs(const LogprobList& list, StepOutputs* step) {
  LogprobRows rows;
  rows.num_rows = static_cast<uint32_t>(list.rows.size());
  rows.first_candidate = static_cast<uint32_t>(step->candidate_ids.size());
  rows.first_rank = static_cast<uint32_t>(step->ranks.size());
  rows.width = list.rows.empty() ? 1 : list.rows.front().width;
  for (const LogprobList::Row& row : list.rows) {
    if (row.width != rows.width) throw py::value_error("rows of log probabilities differ in width");
    step->ranks.push_back(row.rank);
  }
  step->candidate_ids.insert(step->candidate_ids.end(), list.ids.begin(), list.ids.end());
  step->candidate_logprobs.insert(step->candidate_logprobs.end(), list.logprobs.begin(), list.logprobs.end());
  return rows;
}

EngineFinish ReadFinish(PyObject* finish) {
  if (finish == Py_None) return EngineFinish::kNone;
  const std::string name = py::cast<std::string>(py::handle(finish));
  if (name == "stop") return EngineFinish::kStop;
  if (name == "length") return EngineFinish::kLength;
  if (name == "aborted") return EngineFinish::kAborted;
  if (name == "failed") return EngineFinish::kFailed;
  throw py::value_error("finish must be stop, length, aborted, failed or None, not " + name);
}

// (key, token ids, finish, stopped by, prompt, logprobs); prompt: None or (cached tokens or None, rows or
// None).
bool ReadRow(PyObject* row, StepOutputs* step) {
  if (!PyTuple_Check(row) || PyTuple_GET_SIZE(row) != 6) {
    PyErr_SetString(PyExc_TypeError, "a row of a step must be a tuple of six");
    return false;
  }
  const SequenceKey key = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(row, 0));
  if (PyErr_Occurred()) return false;
  SequenceStep& made = step->Add(key);
  PyObject* ids = PyTuple_GET_ITEM(row, 1);
  TokenIds tokens;
  if (!tokens.Read(ids)) return false;
  step->token_ids.insert(step->token_ids.end(), tokens.span().begin(), tokens.span().end());
  made.num_tokens = static_cast<uint32_t>(tokens.span().size());
  made.finish = ReadFinish(PyTuple_GET_ITEM(row, 2));
  PyObject* stopped_by = PyTuple_GET_ITEM(row, 3);
  if (PyUnicode_Check(stopped_by)) {
    const std::string text = py::cast<std::string>(py::handle(stopped_by));
    made.stop_cause = StopCause::kText;
    made.num_text_bytes = static_cast<uint32_t>(text.size());
    step->text += text;
  } else if (stopped_by != Py_None) {
    made.stop_cause = StopCause::kToken;
    made.stop_token = py::cast<int32_t>(py::handle(stopped_by));
  }
  PyObject* prompt = PyTuple_GET_ITEM(row, 4);
  if (prompt != Py_None) {
    auto [cached, rows] = py::cast<std::tuple<std::optional<int32_t>, py::object>>(py::handle(prompt));
    made.has_prompt = true;
    made.num_cached_tokens = cached.value_or(-1);
    if (!rows.is_none()) made.prompt_logprobs = PutLogprobs(ReadLogprobs(rows), step);
  }
  PyObject* logprobs = PyTuple_GET_ITEM(row, 5);
  if (logprobs != Py_None) made.logprobs = PutLogprobs(ReadLogprobs(logprobs), step);
  return true;
}

PyObject* Step(PyPump& self, FastArgs args, Py_ssize_t) {
  const double now = PyFloat_AsDouble(args[1]);
  if (now == -1.0 && PyErr_Occurred()) return nullptr;
  if (!PyList_Check(args[0])) {
    return PyErr_Format(PyExc_TypeError, "rows must be a list, not %s", Py_TYPE(args[0])->tp_name);
  }
  self.step.Clear();
  try {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[0]); ++i) {
      if (!ReadRow(PyList_GET_ITEM(args[0], i), &self.step)) return nullptr;
    }
    self.native.Step(self.step, now);
  } catch (const py::cast_error& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
    return nullptr;
  } catch (const py::builtin_exception& error) {
    error.set_error();
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* Take(Stream& self, FastArgs, Py_ssize_t) {
  std::vector<std::string> messages;
  self.Take(&messages);
  return BytesOfAll(messages).release().ptr();
}

TWINJET_FAST(PyPump, "step", Step, 2, 2);
TWINJET_FAST(Stream, "take", Take, 0, 0);

SequenceKey Add(PyPump& self, std::shared_ptr<Stream> made, py::object owner, int32_t tenant,
                std::optional<sched::HoldingId> holding, double leaves_at) {
  stream::Account account;
  account.tenant = tenant;
  account.has_holding = holding.has_value();
  account.holding = holding.value_or(0);
  if (leaves_at < 9e18) account.leaves_at = static_cast<int64_t>(leaves_at);
  const SequenceKey key = self.native.Add(std::move(made), account);
  const uint32_t slot = Pump::SlotOf(key);
  if (self.owners.size() <= slot) self.owners.resize(slot + 1);
  self.owners[slot] = std::move(owner);
  return key;
}

int64_t Remove(PyPump& self, SequenceKey key) {
  // Only after the slot is known to be this key's may its owner go.
  if (key == 0 || Pump::SlotOf(key) >= self.owners.size() || !self.native.Has(key)) return 0;
  const int64_t num_left = self.native.Remove(key);
  self.owners[Pump::SlotOf(key)] = py::object();
  return num_left;
}

py::tuple Collect(PyPump& self, py::object ledger) {
  sched::KvLedger* native = nullptr;
  if (!ledger.is_none()) native = &py::cast<Ledger&>(ledger).native;
  const Report& report = self.native.Collect(native);
  py::list tenants;
  for (size_t i = 0; i < report.tenant_tokens.size(); ++i) {
    if (report.tenant_tokens[i] != 0) tenants.append(py::make_tuple(i, report.tenant_tokens[i]));
  }
  py::list requests;
  for (const Report::Request& request : report.requests) {
    requests.append(py::make_tuple(self.OwnerOf(request.slot), request.happenings));
  }
  py::list ended_early;
  for (SequenceKey key : report.ended_early) {
    ended_early.append(py::make_tuple(self.OwnerOf(Pump::SlotOf(key)), Pump::OutputOf(key)));
  }
  return py::make_tuple(report.num_tokens, tenants, requests, ended_early);
}

using EndingTuple =
    std::optional<std::tuple<std::string, std::variant<std::monostate, int32_t, std::string>, bool>>;

// ending: (reason, token id or string or None, whether an end token), as Output.ending.
Delta MadeDelta(
    uint32_t output_index, std::string text, std::vector<int32_t> ids, py::object logprobs,
    const std::optional<std::tuple<std::string, std::variant<std::monostate, int32_t, std::string>, bool>>&
        ending,
    std::string* stop_text) {
  Delta delta;
  delta.output_index = output_index;
  delta.text = std::move(text);
  delta.token_ids = std::move(ids);
  if (!logprobs.is_none()) delta.logprobs = ReadLogprobs(logprobs);
  if (!ending) return delta;
  const auto& [reason, stopped_by, is_eos] = *ending;
  delta.ending.emplace();
  delta.ending->reason = reason == "length" ? Ending::Reason::kLength : Ending::Reason::kStop;
  if (const auto* token = std::get_if<int32_t>(&stopped_by)) {
    delta.ending->cause = is_eos ? Ending::Cause::kEos : Ending::Cause::kStopToken;
    delta.ending->token = *token;
  } else if (const auto* stop = std::get_if<std::string>(&stopped_by)) {
    *stop_text = *stop;
    delta.ending->cause = Ending::Cause::kStopString;
    delta.ending->text = *stop_text;
  }
  return delta;
}

py::list TakeDeltas(Stream& self) {
  std::vector<Delta> deltas;
  self.TakeDeltas(&deltas);
  py::list list;
  for (const Delta& delta : deltas) {
    list.append(py::make_tuple(delta.output_index, delta.text, delta.token_ids, WriteLogprobs(delta.logprobs),
                               delta.ending ? EndingOf(*delta.ending) : py::none()));
  }
  return list;
}

py::object TakePrompt(Stream& self) {
  std::optional<stream::PromptNews> news = self.TakePrompt();
  if (!news) return py::none();
  return py::make_tuple(news->num_cached_tokens,
                        news->logprobs ? py::object(WriteLogprobs(*news->logprobs)) : py::none());
}

std::shared_ptr<Stream> MakeStream(std::shared_ptr<const Vocabulary> vocabulary, uint32_t num_outputs,
                                   std::vector<std::string> stop, std::vector<int32_t> eos_token_ids,
                                   std::vector<int32_t> stop_token_ids, int64_t min_tokens,
                                   int64_t max_tokens, bool include_stop, bool skip_special,
                                   std::string request_id, std::string model, std::string engine,
                                   std::string deployment, std::string sampler, uint32_t num_prompt_tokens,
                                   uint64_t seed, double arrived_at, int64_t max_pending_bytes) {
  if (num_outputs < 1) throw py::value_error("num_outputs must be at least 1");
  return std::make_shared<Stream>(
      std::move(vocabulary),
      MakeRules(std::move(stop), std::move(eos_token_ids), std::move(stop_token_ids), min_tokens, max_tokens,
                include_stop, skip_special),
      num_outputs,
      StreamFacts{std::move(request_id), std::move(model), std::move(engine), std::move(deployment),
                  std::move(sampler), num_prompt_tokens, seed},
      arrived_at, max_pending_bytes);
}

}  // namespace

PyPump::PyPump(int wake_fd)
    : native(wake_fd < 0 ? std::function<void()>() : [wake_fd] {
        const uint64_t one = 1;
        // A full counter has woken the reader already.
        [[maybe_unused]] ssize_t size = write(wake_fd, &one, sizeof one);
      }) {}

void BindPump(py::module_& module) {
  py::class_<Stream, std::shared_ptr<Stream>> streams(module, "Stream",
                                                      "One request on its way to its client.");
  streams
      .def(py::init(&MakeStream), py::arg("vocabulary"), py::kw_only(), py::arg("num_outputs"),
           py::arg("stop"), py::arg("eos_token_ids"), py::arg("stop_token_ids"), py::arg("min_tokens"),
           py::arg("max_tokens"), py::arg("include_stop"), py::arg("skip_special"),
           py::arg("request_id") = "", py::arg("model") = "", py::arg("engine") = "",
           py::arg("deployment") = "", py::arg("sampler") = "", py::arg("num_prompt_tokens") = 0,
           py::arg("seed") = 0, py::arg("arrived_at") = 0.0,
           py::arg("max_pending_bytes") = std::numeric_limits<int64_t>::max())
      .def("put_queued", &Stream::PutQueued, py::arg("position"), py::arg("expected_wait_s"))
      .def("set_dispatched", &Stream::SetDispatched, py::arg("queue_position"), py::arg("at"))
      .def(
          "put_handoff",
          [](Stream& self, const py::bytes& state, double now) {
            return self.PutHandoff(static_cast<std::string_view>(state), now);
          },
          py::arg("state"), py::arg("now"))
      .def("read_deltas", &Stream::ReadDeltas)
      .def("take_prompt", &TakePrompt)
      .def("take_deltas", &TakeDeltas)
      .def("drop", &Stream::Drop)
      .def("summary", [](const Stream& self) { return py::bytes(self.Summary()); })
      .def_property_readonly("num_prompt_tokens", &Stream::num_prompt_tokens)
      .def_property_readonly("num_output_tokens", &Stream::num_output_tokens)
      .def_property_readonly("max_pending_bytes", &Stream::max_pending_bytes)
      .def_property_readonly("num_pending_bytes", &Stream::num_pending_bytes)
      .def_property_readonly("num_outputs", &Stream::num_outputs)
      .def_property_readonly("blocked_since", &Stream::blocked_since)
      .def_property_readonly("first_token_at", &Stream::first_token_at)
      .def_property_readonly("last_token_at", &Stream::last_token_at)
      .def_property_readonly("first_token_s", &Stream::first_token_s)
      .def_property_readonly("per_token_s", &Stream::per_token_s)
      .def_property_readonly("is_over", &Stream::is_over)
      .def_property_readonly("has_begun", &Stream::has_begun);
  AddFastMethods(streams, {&TakeDef});

  py::class_<PyPump> pumps(module, "Pump", "Puts an engine's steps into all streams that they concern.");
  pumps.def(py::init<int>(), py::arg("wake_fd") = -1)
      .def("add", &Add, py::arg("stream"), py::arg("owner"), py::kw_only(), py::arg("tenant") = 0,
           py::arg("holding") = py::none(), py::arg("leaves_at") = std::numeric_limits<double>::infinity())
      .def("remove", &Remove, py::arg("key"))
      .def("collect", &Collect, py::arg("ledger"))
      .def(
          "put_prompt",
          [](PyPump& self, SequenceKey key, std::optional<uint32_t> num_cached, py::object logprobs,
             double now) {
            LogprobList list;
            if (!logprobs.is_none()) list = ReadLogprobs(logprobs);
            self.native.PutPrompt(key, num_cached, logprobs.is_none() ? nullptr : &list, now);
          },
          py::arg("key"), py::arg("num_cached_tokens"), py::arg("logprobs"), py::arg("now"))
      .def(
          "put_made",
          [](PyPump& self, SequenceKey key, uint32_t output_index, std::string text, std::vector<int32_t> ids,
             py::object logprobs, const EndingTuple& ending, double now) {
            std::string stop_text;
            self.native.PutMade(
                key, MadeDelta(output_index, std::move(text), std::move(ids), logprobs, ending, &stop_text),
                now);
          },
          py::arg("key"), py::arg("output_index"), py::arg("text"), py::arg("token_ids"), py::arg("logprobs"),
          py::arg("ending"), py::arg("now"));
  AddFastMethods(pumps, {&StepDef});
  pumps.attr("PROMPT_DONE") = static_cast<int>(stream::kPromptDone);
  pumps.attr("FIRST_TOKEN") = static_cast<int>(stream::kFirstToken);
  pumps.attr("LEAVING") = static_cast<int>(stream::kLeaving);
  pumps.attr("OVER") = static_cast<int>(stream::kOver);
  pumps.attr("FAILED") = static_cast<int>(stream::kFailed);
  pumps.attr("OVERFLOWED") = static_cast<int>(stream::kOverflowed);
  pumps.attr("AWAITED") = static_cast<int>(stream::kAwaited);
}

}  // namespace twinjet::bindings
