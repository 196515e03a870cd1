// twinjet.sampling.Request: conversion of its arguments, and its documentation.
#include "sampler_request.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "sampler/bad_text.h"
#include "stream/vocabulary.h"

namespace twinjet::bindings {
namespace {

int32_t Narrow(int64_t token) { return token >= 0 && token <= INT32_MAX ? static_cast<int32_t>(token) : -1; }

// A list or tuple of plain ints, without numpy, which takes microseconds for the shortest; false for others.
bool ReadInts(const py::handle& object, std::vector<int32_t>* tokens) {
  if (!PyList_CheckExact(object.ptr()) && !PyTuple_CheckExact(object.ptr())) return false;
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(object.ptr());
  PyObject** const items = PySequence_Fast_ITEMS(object.ptr());
  tokens->reserve(static_cast<size_t>(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (!PyLong_CheckExact(items[i])) return false;
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(items[i], &overflow);
    if (overflow != 0) return false;
    tokens->push_back(Narrow(value));
  }
  return true;
}

// A list of token ids or an integer array, as int32. Values that do not fit become -1, which is
// outside every vocabulary.
std::vector<int32_t> Tokens(const py::handle& object, const char* name) {
  std::vector<int32_t> tokens;
  if (ReadInts(object, &tokens)) return tokens;
  const py::array array = py::array::ensure(object);
  if (!array || array.ndim() != 1) {
    PyErr_Clear();
    throw py::type_error(std::string(name) +
                         " must be a sequence of ints or a one-dimensional integer array");
  }
  if (array.size() == 0) return {};
  const char kind = array.dtype().kind();
  if (kind != 'i' && kind != 'u') throw py::type_error(std::string(name) + " must hold ints");
  const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
  tokens.resize(static_cast<size_t>(wide.size()));
  std::transform(wide.data(), wide.data() + tokens.size(), tokens.begin(), Narrow);
  return tokens;
}

uint64_t Unsigned(const py::int_& value, const char* name, uint64_t most) {
  const unsigned long long result = PyLong_AsUnsignedLongLong(value.ptr());
  if (PyErr_Occurred() != nullptr || result > most) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " is " + std::string(py::str(value)) + ": must be in [0, " +
                          std::to_string(most) + "]");
  }
  return result;
}

std::unique_ptr<PyRequest> MakeRequest(
    int64_t vocab_size, double temperature, int64_t top_k, double top_p, double min_p,
    double repetition_penalty, double frequency_penalty, double presence_penalty, const py::int_& seed,
    const py::int_& output_index, std::optional<int64_t> position_offset, const py::object& prompt_token_ids,
    const py::object& output_token_ids, const std::optional<std::map<int64_t, double>>& logit_bias,
    const py::object& allowed_token_ids, const std::optional<std::vector<py::object>>& bad_words,
    std::shared_ptr<sampler::BadText> bad_text, int64_t min_tokens, const py::object& stop_token_ids) {
  const auto narrow = [](int64_t value) {
    return static_cast<int32_t>(std::clamp<int64_t>(value, INT32_MIN, INT32_MAX));
  };
  sampler::RequestOptions options;
  sampler::RowParams& params = options.params;
  params.temperature = static_cast<float>(temperature);
  params.top_k = narrow(top_k);
  params.top_p = static_cast<float>(top_p);
  params.min_p = static_cast<float>(min_p);
  params.repetition_penalty = static_cast<float>(repetition_penalty);
  params.frequency_penalty = static_cast<float>(frequency_penalty);
  params.presence_penalty = static_cast<float>(presence_penalty);
  params.seed = Unsigned(seed, "seed", UINT64_MAX);
  params.output_index = static_cast<uint32_t>(Unsigned(output_index, "output_index", UINT32_MAX));
  const std::vector<int32_t> prompt = Tokens(prompt_token_ids, "prompt_token_ids");
  const std::vector<int32_t> output = Tokens(output_token_ids, "output_token_ids");
  options.position_offset = position_offset.value_or(static_cast<int64_t>(prompt.size()));
  options.prompt_token_ids = prompt;
  options.output_token_ids = output;
  if (logit_bias) {
    for (const auto& [id, bias] : *logit_bias)
      options.biases.push_back({narrow(id), static_cast<float>(bias)});
  }
  std::vector<int32_t> allowed;
  if (!allowed_token_ids.is_none()) {
    options.has_allowed = true;
    allowed = Tokens(allowed_token_ids, "allowed_token_ids");
    options.allowed_token_ids = allowed;
  }
  if (bad_words) {
    for (const py::object& word : *bad_words) options.bad_words.push_back(Tokens(word, "bad_words"));
  }
  options.bad_text = std::move(bad_text);
  options.min_tokens = min_tokens;
  options.stop_token_ids = Tokens(stop_token_ids, "stop_token_ids");
  return std::make_unique<PyRequest>(sampler::Request(narrow(vocab_size), options));
}

std::shared_ptr<sampler::TokenTexts> TextsOf(const stream::Vocabulary& vocabulary) {
  const auto size = static_cast<size_t>(vocabulary.size());
  const bool is_native = vocabulary.joining() != stream::Joining::kFunction;
  std::vector<std::string> made(is_native ? 0 : size);
  std::vector<std::string_view> texts(size);
  std::vector<uint8_t> special(size);
  for (size_t i = 0; i < size; ++i) {
    const auto id = static_cast<int32_t>(i);
    const uint8_t flags = vocabulary.flags(id);
    special[i] = (flags & stream::Vocabulary::kSpecial) != 0;
    if ((flags & stream::Vocabulary::kKnown) == 0) continue;
    texts[i] = is_native ? vocabulary.bytes(id) : (made[i] = vocabulary.TokenText(id));
  }
  return std::make_shared<sampler::TokenTexts>(texts, special);
}

void BindBadText(py::module_& module) {
  py::class_<sampler::TokenTexts, std::shared_ptr<sampler::TokenTexts>>(
      module, "TokenTexts",
      "What each token of a model adds to a text, in the form that BadText needs; immutable.")
      .def(py::init(&TextsOf), py::call_guard<py::gil_scoped_release>(), py::arg("vocabulary"))
      .def_static(
          "load",
          [](const py::bytes& saved) {
            return std::make_shared<sampler::TokenTexts>(
                sampler::TokenTexts::Load(static_cast<std::string_view>(saved)));
          },
          py::arg("saved"), "Read what save() gave. Raises ValueError for anything else.")
      .def("save", [](const sampler::TokenTexts& self) { return py::bytes(self.Save()); })
      .def("__len__", &sampler::TokenTexts::size);
  py::class_<sampler::BadText, std::shared_ptr<sampler::BadText>>(
      module, "BadText",
      R"(Strings that an output must not contain, over all ways to make them of tokens; immutable, for any requests.

Args:
    texts: of the model's tokens.
    words: the strings; none may be empty.
    skips_special: special tokens add nothing to the text.)")
      .def(py::init([](std::shared_ptr<sampler::TokenTexts> texts, std::vector<std::string> words,
                       bool skips_special) {
             return std::make_shared<sampler::BadText>(std::move(texts), std::move(words), skips_special);
           }),
           py::arg("texts"), py::arg("words"), py::kw_only(), py::arg("skips_special") = true);
}

}  // namespace

void BindSamplerRequest(py::module_& module) {
  BindBadText(module);
  py::class_<PyRequest>(module, "SamplerRequest",
                        R"(One sequence's parameters and history, made once and used every step.

Args:
    vocab_size: columns of the logits, 1 to 524,288.
    temperature: finite, at least 0; below 1e-5 is greedy.
    top_k: -1, 0 or vocab_size and more are off; 1 is greedy; ties at the boundary all stay.
    top_p: finite; 1 and more is off, 0 and less keeps the most likely token (with its ties).
    min_p: finite; least probability relative to the most likely token; 0 and less is off.
    repetition_penalty: finite, above 0; divides positive and multiplies other logits of tokens in the prompt or output.
    frequency_penalty: finite; taken from a logit once per occurrence in the output.
    presence_penalty: finite; taken once from the logits of tokens in the output.
    seed: 0 to 2**64 - 1.
    output_index: which of the request's sequences, 0 to 2**32 - 1.
    position_offset: position of the first output token; None is the length of prompt_token_ids.
    prompt_token_ids: for the repetition penalty; ids outside the vocabulary are passed over.
    output_token_ids: what was generated before, when a sequence is taken up midway.
    logit_bias: token id to finite bias, added to the logit.
    allowed_token_ids: None allows all; otherwise only these.
    bad_words: token sequences that must not be completed.
    bad_text: strings that the output's text must not contain.
    min_tokens: stop_token_ids are masked until the output has this many tokens (unless nothing else is left).
    stop_token_ids: see min_tokens.

All floats are rounded to float32. A request may be in one call at a time.

Raises:
    ValueError: a value outside its range.
    TypeError: a token list that does not hold ints.)")
      .def(py::init(&MakeRequest), py::arg("vocab_size"), py::kw_only(), py::arg("temperature") = 1.0,
           py::arg("top_k") = 0, py::arg("top_p") = 1.0, py::arg("min_p") = 0.0,
           py::arg("repetition_penalty") = 1.0, py::arg("frequency_penalty") = 0.0,
           py::arg("presence_penalty") = 0.0, py::arg("seed") = 0, py::arg("output_index") = 0,
           py::arg("position_offset") = py::none(), py::arg("prompt_token_ids") = py::tuple(),
           py::arg("output_token_ids") = py::tuple(), py::arg("logit_bias") = py::none(),
           py::arg("allowed_token_ids") = py::none(), py::arg("bad_words") = py::none(),
           py::arg("bad_text") = py::none(), py::arg("min_tokens") = 0,
           py::arg("stop_token_ids") = py::tuple())
      .def(
          "append", [](PyRequest& self, int32_t token_id) { self.Idle().Append(token_id); },
          py::arg("token_id"), "Add an output token that was not drawn by a call with advance.")
      .def(
          "truncate", [](PyRequest& self, size_t n) { self.Idle().Truncate(n); },
          py::arg("num_output_tokens"), "Take back all output tokens but the first num_output_tokens.")
      .def(
          "banned_token_ids",
          [](PyRequest& self) {
            const sampler::RowEdits edits = self.Idle().Edits();
            std::vector<int32_t> ids(edits.banned.begin(), edits.banned.end());
            if (edits.allowed_mask != nullptr) {
              for (int32_t id = 0; id < self.request.vocab_size(); ++id) {
                if ((edits.allowed_mask[id / 32] >> (id % 32) & 1) == 0) ids.push_back(id);
              }
            }
            return py::array_t<int32_t>(static_cast<py::ssize_t>(ids.size()), ids.data());
          },
          "Tokens that masks and bad words rule out now; some may come twice.")
      .def_property_readonly(
          "has_bad_text", [](const PyRequest& self) { return self.request.has_bad_text(); },
          "Whether what is ruled out depends on the text of the output so far.")
      .def_property_readonly("vocab_size", [](const PyRequest& self) { return self.request.vocab_size(); })
      .def_property_readonly("seed", [](const PyRequest& self) { return self.request.params().seed; })
      .def_property_readonly("output_index",
                             [](const PyRequest& self) { return self.request.params().output_index; })
      .def_property_readonly(
          "position", [](const PyRequest& self) { return self.request.position(); },
          "Position of the next token.")
      .def_property_readonly("num_output_tokens",
                             [](const PyRequest& self) { return self.request.output_token_ids().size(); })
      .def_property_readonly("output_token_ids",
                             [](const PyRequest& self) {
                               const std::vector<int32_t>& ids = self.request.output_token_ids();
                               return py::array_t<int32_t>(static_cast<py::ssize_t>(ids.size()), ids.data());
                             })
      .def_property_readonly("is_greedy", [](const PyRequest& self) { return self.request.is_greedy(); });
}

}  // namespace twinjet::bindings
