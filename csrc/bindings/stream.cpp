// Python face of csrc/stream.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <string>

#include "bindings.h"
#include "stream_internal.h"

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

using stream::EngineFinish;
using stream::Joining;
using stream::Output;
using stream::StopCause;
using stream::StopMatcher;
using stream::Vocabulary;

Joining JoiningOf(const std::string& name) {
  if (name == "byte_level") return Joining::kByteLevel;
  if (name == "byte_fallback") return Joining::kByteFallback;
  if (name == "metaspace") return Joining::kMetaspace;
  throw py::value_error("joining must be byte_level, byte_fallback or metaspace, not " + name);
}

std::shared_ptr<Vocabulary> OfFunction(int32_t num_tokens, py::function decode,
                                       const std::vector<int32_t>& special) {
  if (num_tokens < 0) throw py::value_error("num_tokens must not be negative");
  // Destroyed wherever the last stream ends, which need not be under the GIL.
  std::shared_ptr<py::function> held(new py::function(std::move(decode)), [](py::function* function) {
    py::gil_scoped_acquire gil;
    delete function;
  });
  return std::make_shared<Vocabulary>(num_tokens, special,
                                      [held](std::span<const int32_t> ids, bool skip_special) {
                                        py::gil_scoped_acquire gil;
                                        py::list list;
                                        for (int32_t id : ids) list.append(id);
                                        return py::cast<std::string>((*held)(list, skip_special));
                                      });
}

py::tuple Take(Output& self, const std::vector<int32_t>& ids, const std::optional<std::string>& finish,
               const std::variant<std::monostate, int32_t, std::string>& stopped_by) {
  EngineFinish engine_finish = EngineFinish::kNone;
  if (finish == "stop") {
    engine_finish = EngineFinish::kStop;
  } else if (finish == "length") {
    engine_finish = EngineFinish::kLength;
  } else if (finish) {
    throw py::value_error("finish must be stop, length or None, not " + *finish);
  }
  std::string text;
  size_t num_taken = 0;
  if (const auto* token = std::get_if<int32_t>(&stopped_by)) {
    num_taken = self.Take(ids, &text, engine_finish, StopCause::kToken, *token);
  } else if (const auto* stop = std::get_if<std::string>(&stopped_by)) {
    num_taken = self.Take(ids, &text, engine_finish, StopCause::kText, 0, *stop);
  } else {
    num_taken = self.Take(ids, &text, engine_finish);
  }
  return py::make_tuple(num_taken, py::str(text));
}

std::string Fed(StopMatcher& self, const std::string& text) {
  std::string shown;
  self.Feed(text, true, &shown);
  return shown;
}

}  // namespace

std::shared_ptr<const std::vector<std::string>> CheckedStops(std::vector<std::string> stops) {
  for (const std::string& stop : stops) {
    if (stop.empty()) throw py::value_error("a stop string is empty");
  }
  return std::make_shared<const std::vector<std::string>>(std::move(stops));
}

std::shared_ptr<const stream::OutputRules> MakeRules(std::vector<std::string> stop,
                                                     std::vector<int32_t> eos_token_ids,
                                                     std::vector<int32_t> stop_token_ids, int64_t min_tokens,
                                                     int64_t max_tokens, bool include_stop,
                                                     bool skip_special) {
  stream::OutputRules rules;
  rules.stop = CheckedStops(std::move(stop));
  rules.eos_token_ids = std::move(eos_token_ids);
  rules.stop_token_ids = std::move(stop_token_ids);
  rules.min_tokens = min_tokens;
  rules.max_tokens = max_tokens;
  rules.include_stop = include_stop;
  rules.skip_special = skip_special;
  return std::make_shared<const stream::OutputRules>(std::move(rules));
}

py::object EndingOf(const stream::Ending& ending) {
  using stream::Ending;
  if (ending.reason == Ending::Reason::kNone) return py::none();
  const char* reason = ending.reason == Ending::Reason::kLength ? "length" : "stop";
  switch (ending.cause) {
    case Ending::Cause::kEos:
    case Ending::Cause::kStopToken:
      return py::make_tuple(reason, ending.token, ending.cause == Ending::Cause::kEos);
    case Ending::Cause::kStopString:
      return py::make_tuple(reason, py::str(ending.text.data(), ending.text.size()), false);
    default:
      return py::make_tuple(reason, py::none(), false);
  }
}

void BindStream(py::module_& module) {
  py::class_<Vocabulary, std::shared_ptr<Vocabulary>>(module, "Vocabulary",
                                                      "What each token of a model says; immutable.")
      .def(py::init([](const std::string& joining, const std::vector<std::optional<std::string>>& tokens,
                       const std::vector<int32_t>& special, const std::string& mark, int32_t strip_left) {
             return std::make_shared<Vocabulary>(JoiningOf(joining), tokens, special, mark, strip_left);
           }),
           py::arg("joining"), py::arg("tokens"), py::kw_only(), py::arg("special"), py::arg("mark") = "",
           py::arg("strip_left") = 0)
      .def_static("of_function", &OfFunction, py::arg("num_tokens"), py::arg("decode"), py::kw_only(),
                  py::arg("special"))
      .def_property_readonly("is_native",
                             [](const Vocabulary& self) { return self.joining() != Joining::kFunction; })
      .def("__len__", &Vocabulary::size)
      .def(
          "decode",
          [](const Vocabulary& self, const std::vector<int32_t>& ids, bool skip_special) {
            return self.Decode(ids, skip_special);
          },
          py::arg("token_ids"), py::kw_only(), py::arg("skip_special"))
      .def("token_text", &Vocabulary::TokenText, py::arg("token_id"));

  py::class_<Output>(module, "Output", "One output: tokens in, text out, and why it ended.")
      .def(py::init([](std::shared_ptr<const Vocabulary> vocabulary, std::vector<std::string> stop,
                       std::vector<int32_t> eos, std::vector<int32_t> stop_ids, int64_t min_tokens,
                       int64_t max_tokens, bool include_stop, bool skip_special) {
             return std::make_unique<Output>(std::move(vocabulary),
                                             MakeRules(std::move(stop), std::move(eos), std::move(stop_ids),
                                                       min_tokens, max_tokens, include_stop, skip_special));
           }),
           py::arg("vocabulary"), py::kw_only(), py::arg("stop") = std::vector<std::string>(),
           py::arg("eos_token_ids") = std::vector<int32_t>(),
           py::arg("stop_token_ids") = std::vector<int32_t>(), py::arg("min_tokens") = 0,
           py::arg("max_tokens") = INT64_MAX, py::arg("include_stop") = false, py::arg("skip_special") = true)
      .def("take", &Take, py::arg("token_ids"), py::arg("finish") = std::nullopt,
           py::arg("stopped_by") = std::monostate())
      .def_property_readonly("ending", [](const Output& self) { return EndingOf(self.ending()); })
      .def_property_readonly("num_tokens", &Output::num_tokens);

  py::class_<StopMatcher>(module, "StopMatcher", "Finds stop strings in text that arrives in pieces.")
      .def(py::init([](std::vector<std::string> stops, bool include) {
             return StopMatcher(CheckedStops(std::move(stops)), include);
           }),
           py::arg("stops"), py::kw_only(), py::arg("include") = false)
      .def("feed", &Fed, py::arg("text"))
      .def("flush",
           [](StopMatcher& self) {
             std::string shown;
             self.Flush(&shown);
             return shown;
           })
      .def_property_readonly("matched", [](const StopMatcher& self) { return self.matched(); });
  BindPump(module);
}

}  // namespace twinjet::bindings
