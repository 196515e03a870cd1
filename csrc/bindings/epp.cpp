// twinjet._core: the endpoint picker's core. Block hashes go through Python as bytes, 16 each.
#include <pybind11/stl.h>

#include <string>

#include "bindings.h"
#include "epp/ext_proc.h"
#include "epp/picker.h"
#include "epp/prefix_index.h"
#include "epp/prompt.h"
#include "kv_internal.h"

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

constexpr int64_t kMaxReplicas = 1 << 20;

std::string_view ViewOf(const py::bytes& bytes) {
  auto span = BytesOf(bytes);
  return {reinterpret_cast<const char*>(span.data()), span.size()};
}

std::span<const kv::BlockHash> HashesOf(const py::bytes& bytes, std::vector<kv::BlockHash>* copy) {
  auto span = BytesOf(bytes);
  if (span.size() % kv::BlockHash::kBytes != 0) throw py::value_error("hashes must have 16 bytes each");
  copy->resize(span.size() / kv::BlockHash::kBytes);
  if (!span.empty()) std::memcpy(static_cast<void*>(copy->data()), span.data(), span.size());
  return *copy;
}

epp::ReplicaId CheckedReplica(int64_t id) {
  if (id < 0 || id >= kMaxReplicas) throw py::value_error("no replica has the number " + std::to_string(id));
  return static_cast<epp::ReplicaId>(id);
}

epp::ReplicaId Known(const epp::Picker& picker, int64_t id) {
  epp::ReplicaId checked = CheckedReplica(id);
  if (!picker.Has(checked)) throw py::key_error("no replica has the number " + std::to_string(id));
  return checked;
}

// Text of clients may hold any bytes.
py::str Text(std::string_view text) {
  PyObject* decoded = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace");
  if (!decoded) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(decoded);
}

py::object ReadMessage(const py::bytes& data) {
  epp::ProcessingRequest request;
  if (!epp::ReadProcessingRequest(ViewOf(data), &request)) {
    throw py::value_error("not an envoy.service.ext_proc.v3.ProcessingRequest");
  }
  py::dict headers;
  for (const auto& [key, value] : request.headers) headers[Text(key)] = Text(value);
  py::object allowed = py::none();
  if (request.has_allowed) {
    py::list addresses;
    for (std::string_view address : request.allowed) addresses.append(Text(address));
    allowed = addresses;
  }
  return py::make_tuple(static_cast<int>(request.kind), request.is_end_of_stream, headers,
                        py::bytes(request.body.data(), request.body.size()), request.request_body_mode,
                        request.response_body_mode, allowed, Text(request.source_address));
}

std::unique_ptr<epp::Prompt> ReadPrompt(const py::bytes& message, const std::string& method) {
  if (method != "Generate" && method != "Chat") throw py::value_error("method must be 'Generate' or 'Chat'");
  auto prompt = std::make_unique<epp::Prompt>();
  std::string_view view = ViewOf(message);
  bool is_read = false;
  auto kind = method == "Chat" ? epp::Method::kChat : epp::Method::kGenerate;
  {
    py::gil_scoped_release released;
    is_read = epp::ReadPrompt(view, kind, prompt.get());
  }
  if (!is_read) throw py::value_error("not a twinjet.v1." + method + "Request");
  return prompt;
}

void BindPrompt(py::module_& module) {
  py::class_<epp::Prompt>(module, "EppPrompt", "What of a request bears on where it should go.")
      .def(py::init(&ReadPrompt), py::arg("message"), py::arg("method"))
      .def_property_readonly("model", [](const epp::Prompt& prompt) { return Text(prompt.model); })
      .def_property_readonly("tenant", [](const epp::Prompt& prompt) { return Text(prompt.tenant); })
      .def_property_readonly("cache_salt", [](const epp::Prompt& prompt) { return Text(prompt.cache_salt); })
      .def_property_readonly("adapter", [](const epp::Prompt& prompt) { return Text(prompt.adapter); })
      .def_readonly("priority", &epp::Prompt::priority)
      .def_readonly("has_token_ids", &epp::Prompt::has_token_ids)
      .def_readonly("num_tokens", &epp::Prompt::num_tokens)
      .def("token_ids",
           [](const epp::Prompt& prompt) {
             const auto& words = prompt.words;
             return py::bytes(reinterpret_cast<const char*>(words.data()),
                              prompt.has_token_ids ? words.size() * sizeof(int32_t) : 0);
           })
      .def(
          "hash",
          [](const epp::Prompt& prompt, const kv::BlockHasher& hasher) {
            std::vector<kv::BlockHash> hashes;
            {
              py::gil_scoped_release released;
              hashes = prompt.Hashes(hasher);
            }
            return ToBytes(hashes);
          },
          py::arg("hasher"));
}

void BindIndex(py::module_& module) {
  using epp::PrefixIndex;
  py::class_<PrefixIndex>(module, "PrefixIndex", "Which replicas hold which block hashes.")
      .def(py::init([](int64_t max_links) {
             if (max_links < 1 || max_links > int64_t{1} << 31) {
               throw py::value_error("max_links must lie in 1..2^31, not " + std::to_string(max_links));
             }
             auto drawn = py::module_::import("os").attr("urandom")(kv::BlockHash::kBytes).cast<py::bytes>();
             return std::make_unique<PrefixIndex>(static_cast<size_t>(max_links),
                                                  kv::BlockHash::FromBytes(BytesOf(drawn).data()));
           }),
           py::arg("max_links"))
      .def(
          "set_capacity",
          [](PrefixIndex& index, int64_t replica, int64_t max_blocks) {
            if (max_blocks < 0) throw py::value_error("max_blocks is negative");
            index.SetCapacity(CheckedReplica(replica), static_cast<size_t>(max_blocks));
          },
          py::arg("replica"), py::arg("max_blocks"))
      .def(
          "touch",
          [](PrefixIndex& index, int64_t replica, const py::bytes& hashes) {
            std::vector<kv::BlockHash> copy;
            index.Touch(CheckedReplica(replica), HashesOf(hashes, &copy));
          },
          py::arg("replica"), py::arg("hashes"))
      .def(
          "store",
          [](PrefixIndex& index, int64_t replica, const py::bytes& hashes) {
            std::vector<kv::BlockHash> copy;
            for (const kv::BlockHash& hash : HashesOf(hashes, &copy))
              index.Store(CheckedReplica(replica), hash);
          },
          py::arg("replica"), py::arg("hashes"))
      .def(
          "erase",
          [](PrefixIndex& index, int64_t replica, const py::bytes& hashes) {
            std::vector<kv::BlockHash> copy;
            for (const kv::BlockHash& hash : HashesOf(hashes, &copy))
              index.Erase(CheckedReplica(replica), hash);
          },
          py::arg("replica"), py::arg("hashes"))
      .def(
          "clear", [](PrefixIndex& index, int64_t replica) { index.Clear(CheckedReplica(replica)); },
          py::arg("replica"))
      .def(
          "find",
          [](PrefixIndex& index, const py::bytes& hashes) {
            std::vector<kv::BlockHash> copy;
            std::vector<epp::Match> matches;
            index.Find(HashesOf(hashes, &copy), &matches);
            py::dict found;
            for (const epp::Match& match : matches)
              found[py::int_(match.replica)] = py::int_(match.num_blocks);
            return found;
          },
          py::arg("hashes"))
      .def_property_readonly("num_blocks", &PrefixIndex::num_blocks)
      .def_property_readonly("num_links", &PrefixIndex::num_links)
      .def("memory_bytes", &PrefixIndex::MemoryBytes)
      .def("check", &PrefixIndex::Check);
}

py::list Rank(epp::Picker& picker, const py::bytes& candidates, int64_t num_tokens,
              const py::sequence& lookups, double now, uint64_t random, int64_t count) {
  auto ids = BytesOf(candidates);
  if (ids.size() % sizeof(epp::ReplicaId) != 0) throw py::value_error("candidates must have 4 bytes each");
  std::vector<epp::ReplicaId> replicas(ids.size() / sizeof(epp::ReplicaId));
  if (!ids.empty()) std::memcpy(replicas.data(), ids.data(), ids.size());
  std::vector<epp::Match> cached;
  std::vector<epp::Match> matches;
  std::vector<kv::BlockHash> copy;
  for (const py::handle& lookup : lookups) {
    auto [index, hashes, block_tokens] = lookup.cast<std::tuple<epp::PrefixIndex*, py::bytes, uint32_t>>();
    index->Find(HashesOf(hashes, &copy), &matches);
    for (const epp::Match& match : matches)
      cached.push_back({match.replica, match.num_blocks * block_tokens});
  }
  std::vector<epp::Choice> choices;
  picker.Rank(replicas, num_tokens, cached, now, random, static_cast<size_t>(std::max<int64_t>(count, 0)),
              &choices);
  py::list result;
  for (const epp::Choice& choice : choices) {
    result.append(py::make_tuple(choice.replica, choice.cost, choice.cached_tokens, choice.waiting));
  }
  return result;
}

void BindPicker(py::module_& module) {
  using epp::Picker;
  py::class_<Picker>(module, "Picker", "The replica on which a request will likely begin to answer first.")
      .def(py::init([](double prefill_per_s, double running_tokens, double waiting_tokens, double kv_penalty,
                       double report_lag_s, double report_life_s, double max_waiting) {
             epp::PickerOptions options;
             options.prefill_per_s = prefill_per_s;
             options.running_tokens = running_tokens;
             options.waiting_tokens = waiting_tokens;
             options.kv_penalty = kv_penalty;
             options.report_lag_s = report_lag_s;
             options.report_life_s = report_life_s;
             options.max_waiting = max_waiting;
             return std::make_unique<Picker>(options);
           }),
           py::kw_only(), py::arg("prefill_per_s"), py::arg("running_tokens"), py::arg("waiting_tokens"),
           py::arg("kv_penalty"), py::arg("report_lag_s"), py::arg("report_life_s"), py::arg("max_waiting"))
      .def("add", &Picker::Add)
      .def(
          "remove", [](Picker& picker, int64_t id) { picker.Remove(Known(picker, id)); }, py::arg("replica"))
      .def(
          "set_kv_tokens",
          [](Picker& picker, int64_t id, double kv_tokens) {
            picker.SetKvTokens(Known(picker, id), kv_tokens);
          },
          py::arg("replica"), py::arg("kv_tokens"))
      .def(
          "report",
          [](Picker& picker, int64_t id, double now, double waiting, double running, double waiting_tokens,
             double kv_utilization) {
            picker.Report(Known(picker, id), {waiting, running, waiting_tokens, kv_utilization}, now);
          },
          py::arg("replica"), py::arg("now"), py::kw_only(), py::arg("waiting"), py::arg("running"),
          py::arg("waiting_tokens"), py::arg("kv_utilization"))
      .def("rank", &Rank, py::arg("candidates"), py::arg("num_tokens"), py::arg("lookups"), py::arg("now"),
           py::arg("random"), py::arg("count"))
      .def(
          "begin",
          [](Picker& picker, int64_t id, int64_t num_tokens, double now) {
            return picker.Begin(Known(picker, id), num_tokens, now);
          },
          py::arg("replica"), py::arg("num_tokens"), py::arg("now"))
      .def(
          "end",
          [](Picker& picker, int64_t id, uint64_t ticket, int64_t num_tokens) {
            picker.End(Known(picker, id), ticket, num_tokens);
          },
          py::arg("replica"), py::arg("ticket"), py::arg("num_tokens"))
      .def(
          "in_flight", [](const Picker& picker, int64_t id) { return picker.in_flight(Known(picker, id)); },
          py::arg("replica"))
      .def("__len__", &Picker::size);
}

}  // namespace

void BindEpp(py::module_& module) {
  module.def("read_processing_request", &ReadMessage, py::arg("data"));
  BindPrompt(module);
  BindIndex(module);
  BindPicker(module);
}

}  // namespace twinjet::bindings
