// Calls whose requests are plain, for Python that takes many at once: what their beginning and their end
// need, in one call each.
#include <pybind11/stl.h>

#include <optional>
#include <utility>
#include <vector>

#include "door/door.h"
#include "door/mailbox.h"
#include "door_internal.h"
#include "fast_call.h"
#include "stream/stream.h"
#include "stream_internal.h"

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

using door::CallRef;
using door::Event;
using door::MetadataEntry;

constexpr std::string_view kRequestIdKey = "x-request-id";
constexpr const char* kAcceptedIdKey = "twinjet-request-id";
constexpr const char* kPrefixKey = "twinjet-prefix-key";

// A call whose request is plain. What it came with is kept until the call is accepted.
struct PyPlainCall {
  PyCall call;
  std::unique_ptr<Event> begun;
  std::string message;
};

// What the streams of many requests have in common.
struct PyStreamMaker {
  std::shared_ptr<const stream::Vocabulary> vocabulary;
  std::shared_ptr<const stream::OutputRules> rules;
  stream::StreamFacts facts;
  uint32_t num_outputs;
  int64_t max_pending_bytes;

  // Rules are shared by streams of one limit, and most have the same.
  void Limit(int64_t max_tokens) {
    if (rules->max_tokens == max_tokens) return;
    auto limited = std::make_shared<stream::OutputRules>(*rules);
    limited->max_tokens = max_tokens;
    rules = std::move(limited);
  }
};

// Trailers that many calls end with.
struct PyTrailers {
  door::Metadata metadata;
};

bool ReadText(PyObject* object, std::string_view* text) {
  Py_ssize_t size = 0;
  const char* bytes = PyUnicode_AsUTF8AndSize(object, &size);
  if (!bytes) return false;
  *text = {bytes, static_cast<size_t>(size)};
  return true;
}

// (request id, prefix key or ""): sends the initial metadata of a request that is taken.
PyObject* Accept(PyPlainCall& self, FastArgs args, Py_ssize_t) {
  std::string_view id;
  std::string_view key;
  if (!ReadText(args[0], &id) || !ReadText(args[1], &key)) return nullptr;
  door::Metadata headers;
  headers.push_back({kAcceptedIdKey, std::string(id)});
  if (!key.empty()) headers.push_back({kPrefixKey, std::string(key)});
  for (const MetadataEntry& entry : headers) {
    if (!door::IsSendable(entry)) return PyErr_Format(PyExc_ValueError, "a value that gRPC does not allow");
  }
  door::Acknowledge(self.call.call, self.message.size());
  door::SendHeaders(self.call.call, std::move(headers));
  self.begun.reset();
  self.message = std::string();
  Py_RETURN_NONE;
}

// (maker, request id, prompt tokens, seed, max tokens, arrived at): the stream, carried to the call.
PyObject* MakeCarried(PyPlainCall& self, FastArgs args, Py_ssize_t) {
  auto* maker = py::cast<PyStreamMaker*>(py::handle(args[0]));
  std::string_view id;
  if (!ReadText(args[1], &id)) return nullptr;
  const unsigned long num_prompt_tokens = PyLong_AsUnsignedLong(args[2]);
  const unsigned long long seed = PyLong_AsUnsignedLongLong(args[3]);
  const long long max_tokens = PyLong_AsLongLong(args[4]);
  const double arrived_at = PyFloat_AsDouble(args[5]);
  if (PyErr_Occurred()) return nullptr;
  maker->Limit(max_tokens);
  stream::StreamFacts facts = maker->facts;
  facts.request_id = id;
  facts.num_prompt_tokens = static_cast<uint32_t>(num_prompt_tokens);
  facts.seed = seed;
  auto made = std::make_shared<stream::Stream>(maker->vocabulary, maker->rules, maker->num_outputs,
                                               std::move(facts), arrived_at, maker->max_pending_bytes);
  made->Attach(CarrierFor(self.call.write_ahead_bytes), self.call.call);
  std::vector<std::string> none;
  made->Take(&none);  // so that the first put is carried
  return py::cast(std::move(made)).release().ptr();
}

// Hands over what the stream holds; false, and nothing done, while the client is behind.
bool WriteRest(const PyPlainCall& self, stream::Stream* stream) {
  const CallRef& call = self.call.call;
  if (call->unsent_bytes() > static_cast<int64_t>(self.call.write_ahead_bytes)) return false;
  std::vector<std::string> messages;
  stream->Take(&messages);
  for (const std::string& message : messages) door::Write(call, message);
  return true;
}

// (stream, trailers): whether everything could be handed over, so that the call is at its end; False, and
// nothing done, while its client is behind.
PyObject* End(PyPlainCall& self, FastArgs args, Py_ssize_t) {
  auto* stream = py::cast<stream::Stream*>(py::handle(args[0]));
  const auto* trailers = py::cast<const PyTrailers*>(py::handle(args[1]));
  const CallRef& call = self.call.call;
  if (!WriteRest(self, stream)) Py_RETURN_FALSE;
  door::Write(call, stream->Summary());
  door::Finish(call, {door::kOk, {}, trailers->metadata});
  Py_RETURN_TRUE;
}

// (stream, whether to drop what is left): whether what is left could be handed over, as with end(), so that a
// status may follow.
PyObject* HandOver(PyPlainCall& self, FastArgs args, Py_ssize_t) {
  if (args[1] == Py_True || WriteRest(self, py::cast<stream::Stream*>(py::handle(args[0])))) Py_RETURN_TRUE;
  Py_RETURN_FALSE;
}

TWINJET_FAST(PyPlainCall, "accept", Accept, 2, 2);
TWINJET_FAST(PyPlainCall, "make_carried", MakeCarried, 6, 6);
TWINJET_FAST(PyPlainCall, "end", End, 2, 2);
TWINJET_FAST(PyPlainCall, "hand_over", HandOver, 2, 2);

py::tuple Unpack(const PyPlainCall& self) {
  if (!self.begun) throw py::value_error("the call was accepted");
  return py::make_tuple(ShowCall(self.call.call, *self.begun->info, self.call.write_ahead_bytes),
                        py::bytes(self.message));
}

py::tuple ShowTokens(const std::vector<int32_t>& ids) {
  py::tuple shown(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    PyTuple_SET_ITEM(shown.ptr(), static_cast<Py_ssize_t>(i), PyLong_FromLong(ids[i]));
  }
  return shown;
}

template <typename Make>
const py::object& Remembered(std::string_view value, std::string* last, py::object* shown, Make make) {
  if (!*shown || *last != value) {
    *shown = make(value);
    *last = value;
  }
  return *shown;
}

// The last x-request-id, if it can be shown; null if the call brings what plain requests do not.
std::optional<std::string_view> SentId(const door::Metadata& metadata) {
  std::string_view sent;
  for (const auto& [key, value] : metadata) {
    if (key == "traceparent" || key == "tracestate") return std::nullopt;
    if (key == kRequestIdKey) sent = value;
  }
  return requests::IsRequestId(sent) ? sent : std::string_view();
}

}  // namespace

bool PlainPicker::TakeCall(Event& event) {
  if (event.info->path != path_) return false;
  const uint64_t id = event.call->id();
  waiting_.emplace(id, std::move(event));
  return true;
}

bool PlainPicker::Knows(const Event& event) const {
  return !waiting_.empty() && waiting_.contains(event.call->id());
}

Event PlainPicker::Drop(const Event& event) {
  auto node = waiting_.extract(event.call->id());
  return std::move(node.mapped());
}

std::vector<Event> PlainPicker::DropAll() {
  std::vector<Event> dropped;
  for (auto& [id, event] : waiting_) dropped.push_back(std::move(event));
  waiting_.clear();
  return dropped;
}

py::object PlainPicker::TakeMessage(Event& event, Event* call) {
  *call = Drop(event);
  const door::CallInfo& info = *call->info;
  const std::optional<std::string_view> sent_id = SentId(info.metadata);
  if (!sent_id) return {};
  const std::optional<requests::PlainGenerate> plain = requests::ReadPlainGenerate(event.bytes);
  if (!plain) return {};
  const py::str drawn_id = plain->request_id.empty()
                               ? py::str(lots_.DrawId(*sent_id))
                               : py::str(plain->request_id.data(), plain->request_id.size());
  const auto text = [](std::string_view value) { return py::str(value.data(), value.size()); };
  py::tuple shown = py::make_tuple(
      event.call->id(), py::none(), info.peer, ShowTimeout(info),
      Remembered(plain->model, &last_model_, &shown_model_, text), text(plain->text),
      ShowTokens(plain->token_ids), plain->largest_token,
      Remembered(plain->sampling, &last_sampling_, &shown_sampling_,
                 [](std::string_view value) { return py::bytes(value.data(), value.size()); }),
      drawn_id, text(plain->tenant), text(plain->cache_salt), text(plain->session), lots_.DrawSeed());
  // Last: it takes the message, which the views above are into.
  auto made = std::make_unique<PyPlainCall>();
  made->call = {event.call, write_ahead_bytes_};
  made->begun = std::make_unique<Event>(std::move(*call));
  made->message = std::move(event.bytes);
  shown[1] = py::cast(std::move(made));
  return shown;
}

void BindDoorPlain(py::module_& module) {
  module.def(
      "read_plain_generate",
      [](const py::bytes& message) -> py::object {
        const auto plain = requests::ReadPlainGenerate(std::string_view(message));
        if (!plain) return py::none();
        return py::make_tuple(plain->model, plain->text, plain->token_ids, plain->largest_token,
                              py::bytes(plain->sampling.data(), plain->sampling.size()), plain->request_id,
                              plain->tenant, plain->cache_salt, plain->session);
      },
      py::arg("message"));
  py::class_<PyTrailers>(module, "DoorTrailers", "Trailers that many calls end with.")
      .def(py::init([](const py::iterable& entries) {
             return std::make_unique<PyTrailers>(PyTrailers{ReadMetadata(entries)});
           }),
           py::arg("metadata"));

  py::class_<PyStreamMaker>(module, "StreamMaker", "Makes the streams of requests that are alike.")
      .def(py::init([](std::shared_ptr<const stream::Vocabulary> vocabulary, uint32_t num_outputs,
                       std::vector<std::string> stop, std::vector<int32_t> eos, std::vector<int32_t> stop_ids,
                       int64_t min_tokens, int64_t max_tokens, bool include_stop, bool skip_special,
                       std::string model, std::string engine, std::string deployment, std::string sampler,
                       int64_t max_pending_bytes) {
             if (num_outputs < 1) throw py::value_error("num_outputs must be at least 1");
             return std::make_unique<PyStreamMaker>(PyStreamMaker{
                 std::move(vocabulary),
                 MakeRules(std::move(stop), std::move(eos), std::move(stop_ids), min_tokens, max_tokens,
                           include_stop, skip_special),
                 {{}, std::move(model), std::move(engine), std::move(deployment), std::move(sampler), 0, 0},
                 num_outputs,
                 max_pending_bytes});
           }),
           py::arg("vocabulary"), py::kw_only(), py::arg("num_outputs"), py::arg("stop"),
           py::arg("eos_token_ids"), py::arg("stop_token_ids"), py::arg("min_tokens"), py::arg("max_tokens"),
           py::arg("include_stop"), py::arg("skip_special"), py::arg("model"), py::arg("engine"),
           py::arg("deployment"), py::arg("sampler"), py::arg("max_pending_bytes"));

  py::class_<PyPlainCall> calls(module, "PlainCall", "A call whose request is plain.");
  calls.def("unpack", &Unpack)
      .def("reopen", [](const PyPlainCall& self) { return self.call; })
      .def("finish",
           [](const PyPlainCall& self, int code, const std::string& message, const py::iterable& trailers) {
             door::Finish(self.call.call, {code, message, ReadMetadata(trailers)});
           });
  AddFastMethods(calls, {&AcceptDef, &MakeCarriedDef, &EndDef, &HandOverDef});
}

}  // namespace twinjet::bindings
