// Python face of csrc/sampler; twinjet/sampling/__init__.py documents it.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <sched.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "sampler/batch.h"
#include "sampler/spec.h"
#include "sampler_request.h"
#include "tensor.h"

namespace twinjet::bindings {
namespace {

using sampler::Dtype;
using sampler::Kernels;

const Kernels& KernelsByName(const std::string& name) {
  const Kernels* kernels = name.empty() ? sampler::DefaultKernels() : sampler::FindKernels(name);
  if (kernels != nullptr) return *kernels;
  std::string names;
  for (const Kernels* available : sampler::AvailableKernels()) {
    if (!names.empty()) names += ", ";
    names += available->name;
  }
  const char* forced = std::getenv("TWINJET_CPU_TARGET");
  throw py::value_error(
      (name.empty() ? "TWINJET_CPU_TARGET is " + std::string(forced) : "target is " + name) +
      ": must be one of " + names + " on this CPU");
}

int DefaultThreads() {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  const int count = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
  return std::clamp(count, 1, 16);
}

using Int32Array = py::array_t<int32_t, py::array::c_style>;
using FloatArray = py::array_t<float, py::array::c_style>;

// Buffers of one call, kept for the next.
struct CallScratch {
  std::vector<PyRequest*> requests;
  std::vector<sampler::RowInput> inputs;
  std::vector<sampler::RowOutput> outputs;
};

// Marks requests as busy for its lifetime.
class BusyMarks {
 public:
  explicit BusyMarks(std::vector<PyRequest*>* requests) : requests_(requests) {}
  ~BusyMarks() {
    for (PyRequest* request : *requests_) request->is_busy = false;
    requests_->clear();
  }
  BusyMarks(const BusyMarks&) = delete;
  BusyMarks& operator=(const BusyMarks&) = delete;

  void Add(PyRequest* request) {
    request->Idle();
    request->is_busy = true;
    requests_->push_back(request);
  }

 private:
  std::vector<PyRequest*>* requests_;
};

Dtype LogitsDtype(const TensorView& logits, const std::string& override_name) {
  const ElementType type = logits.type();
  if (override_name == "bfloat16") {
    if (type == ElementType::kInt16 || type == ElementType::kUint16 || type == ElementType::kBfloat16) {
      return Dtype::kBfloat16;
    }
    throw py::type_error("logits have element type " + logits.type_name() +
                         ": must be a 16-bit integer to be read as bfloat16");
  }
  if (!override_name.empty())
    throw py::value_error("dtype is " + override_name + ": must be '' or 'bfloat16'");
  if (type == ElementType::kFloat32) return Dtype::kFloat32;
  if (type == ElementType::kFloat16) return Dtype::kFloat16;
  if (type == ElementType::kBfloat16) return Dtype::kBfloat16;
  throw py::type_error("logits have element type " + logits.type_name() +
                       ": must be float32, float16 or bfloat16");
}

// Grammar masks of a batch, by row.
class Bitmask {
 public:
  Bitmask(const py::object& words, const std::optional<Int32Array>& rows, size_t num_rows,
          int32_t vocab_size) {
    if (words.is_none()) {
      if (rows) throw py::value_error("bitmask_rows is given without a bitmask");
      return;
    }
    view_.emplace(words, "bitmask");
    if (view_->type() != ElementType::kInt32) {
      throw py::type_error("bitmask has element type " + view_->type_name() + ": must be int32");
    }
    view_->RequireAdjacentColumns();
    const int64_t needed = (static_cast<int64_t>(vocab_size) + 31) / 32;
    if (view_->columns() < needed) {
      throw py::value_error("bitmask has " + std::to_string(view_->columns()) +
                            " words a row: must have at least " + std::to_string(needed));
    }
    if (rows) {
      if (rows->ndim() != 1 || static_cast<size_t>(rows->size()) != num_rows) {
        throw py::value_error("bitmask_rows must have one element per row of logits");
      }
      rows_ = rows->data();
      for (size_t i = 0; i < num_rows; ++i) {
        if (rows_[i] < -1 || rows_[i] >= view_->rows()) {
          throw py::value_error("bitmask_rows has " + std::to_string(rows_[i]) + ": must be in [-1, " +
                                std::to_string(view_->rows()) + ")");
        }
      }
    } else if (view_->rows() < static_cast<int64_t>(num_rows)) {
      throw py::value_error("bitmask has " + std::to_string(view_->rows()) +
                            " rows: must have one per row of logits");
    }
  }

  const uint32_t* Row(size_t i) const {
    if (!view_) return nullptr;
    const int64_t row = rows_ == nullptr ? static_cast<int64_t>(i) : rows_[i];
    if (row < 0) return nullptr;
    return reinterpret_cast<const uint32_t*>(view_->data() + row * view_->row_stride_bytes());
  }

 private:
  std::optional<TensorView> view_;
  const int32_t* rows_ = nullptr;
};

class PySampler {
 public:
  PySampler(int num_threads, const std::string& target)
      : batch_(KernelsByName(target), num_threads == 0 ? DefaultThreads() : Checked(num_threads)) {}

  const sampler::BatchSampler& batch() const { return batch_; }

  py::tuple Sample(const py::object& logits, const std::string& dtype, const py::sequence& requests,
                   const py::object& bitmask, const std::optional<Int32Array>& bitmask_rows,
                   const py::object& advance, int32_t num_logprobs, bool processed_logprobs,
                   const py::object& processed_logits) {
    const TensorView view(logits, "logits");
    const Dtype type = LogitsDtype(view, dtype);
    view.RequireAdjacentColumns();
    if (view.columns() < 1 || view.columns() > sampler::kMaxVocabSize) {
      throw py::value_error("logits have " + std::to_string(view.columns()) +
                            " columns: must have between 1 and 524288");
    }
    const int32_t vocab_size = static_cast<int32_t>(view.columns());
    const size_t num_rows = static_cast<size_t>(view.rows());
    if (requests.size() != num_rows) {
      throw py::value_error("requests has length " + std::to_string(requests.size()) +
                            ": must have one per row of " + std::to_string(num_rows));
    }
    const Bitmask masks(bitmask, bitmask_rows, num_rows, vocab_size);
    const std::optional<py::array_t<bool>> advances = AdvanceFlags(advance, num_rows);
    const bool advance_all = !advances && py::cast<bool>(advance);
    float* processed = ProcessedData(processed_logits, num_rows, vocab_size);

    const py::ssize_t width = num_logprobs + 1;
    const py::ssize_t length = static_cast<py::ssize_t>(num_rows);
    Int32Array tokens(length), ranks(num_logprobs < 0 ? 0 : length);
    py::array_t<uint32_t> status(length);
    Int32Array top_ids({num_logprobs < 0 ? 0 : length, width});
    FloatArray top_logprobs({num_logprobs < 0 ? 0 : length, width});

    std::unique_ptr<CallScratch> scratch = std::move(scratch_);
    if (!scratch) scratch = std::make_unique<CallScratch>();
    {
      BusyMarks marks(&scratch->requests);
      scratch->inputs.assign(num_rows, {});
      scratch->outputs.assign(num_rows, {});
      for (size_t i = 0; i < num_rows; ++i) {
        auto* request = py::cast<PyRequest*>(requests[i]);
        marks.Add(request);
        if (request->request.vocab_size() != vocab_size) {
          throw py::value_error("request " + std::to_string(i) + " has vocab_size " +
                                std::to_string(request->request.vocab_size()) + ": must be the logits' " +
                                std::to_string(vocab_size));
        }
        sampler::RowInput& input = scratch->inputs[i];
        input.logits = view.data() + static_cast<int64_t>(i) * view.row_stride_bytes();
        input.dtype = type;
        input.vocab_size = vocab_size;
        input.constants = request->request.Constants();
        input.edits = request->request.Edits();
        input.edits.grammar_mask = masks.Row(i);
        input.num_logprobs = num_logprobs;
        input.processed_logprobs = processed_logprobs;
        sampler::RowOutput& output = scratch->outputs[i];
        if (num_logprobs >= 0) {
          output.top_ids = top_ids.mutable_data(static_cast<py::ssize_t>(i), 0);
          output.top_logprobs = top_logprobs.mutable_data(static_cast<py::ssize_t>(i), 0);
        }
        if (processed != nullptr) output.processed_logits = processed + i * static_cast<size_t>(vocab_size);
      }
      {
        const py::gil_scoped_release release;
        batch_.Draw(scratch->inputs, scratch->outputs);
      }
      for (size_t i = 0; i < num_rows; ++i) {
        const sampler::RowOutput& output = scratch->outputs[i];
        tokens.mutable_data()[i] = output.token_id;
        status.mutable_data()[i] = output.status;
        if (num_logprobs >= 0) ranks.mutable_data()[i] = output.rank;
        const bool advances_row = advances ? advances->data()[i] : advance_all;
        if (advances_row && output.token_id >= 0) scratch->requests[i]->request.Append(output.token_id);
      }
    }
    scratch_ = std::move(scratch);
    if (num_logprobs < 0) return py::make_tuple(tokens, status, py::none(), py::none(), py::none());
    return py::make_tuple(tokens, status, top_ids, top_logprobs, ranks);
  }

 private:
  static int Checked(int num_threads) {
    if (num_threads < 0 || num_threads > 1024) {
      throw py::value_error("num_threads is " + std::to_string(num_threads) + ": must be in [0, 1024]");
    }
    return num_threads;
  }

  static std::optional<py::array_t<bool>> AdvanceFlags(const py::object& advance, size_t num_rows) {
    if (py::isinstance<py::bool_>(advance)) return std::nullopt;
    if (!py::isinstance<py::array_t<bool>>(advance)) {
      throw py::type_error("advance must be a bool or a numpy array of bool");
    }
    auto flags = py::cast<py::array_t<bool, py::array::c_style | py::array::forcecast>>(advance);
    if (flags.ndim() != 1 || static_cast<size_t>(flags.size()) != num_rows) {
      throw py::value_error("advance must have one element per row of logits");
    }
    return flags;
  }

  // Not converted: a converted copy would be filled in the caller's array's stead.
  static float* ProcessedData(const py::object& object, size_t num_rows, int32_t vocab_size) {
    if (object.is_none()) return nullptr;
    if (!py::isinstance<py::array_t<float>>(object)) {
      throw py::type_error("processed_logits must be a float32 numpy array");
    }
    auto array = py::reinterpret_borrow<py::array_t<float>>(object);
    if (array.ndim() != 2 || static_cast<size_t>(array.shape(0)) != num_rows ||
        array.shape(1) != vocab_size) {
      throw py::value_error("processed_logits must have the shape of the logits");
    }
    if ((array.flags() & py::array::c_style) == 0) {
      throw py::value_error("processed_logits has strides: must be C-contiguous");
    }
    if (!array.writeable()) throw py::value_error("processed_logits is read-only: must be writable");
    return array.mutable_data();
  }

  sampler::BatchSampler batch_;
  std::unique_ptr<CallScratch> scratch_;  // taken by the call that runs, under the GIL
};

py::array_t<uint64_t> Weights(const FloatArray& row, double temperature, const std::string& target) {
  sampler::RowParams params;
  params.temperature = static_cast<float>(temperature);
  sampler::RowConstants constants;
  if (sampler::PrepareRow(params, sampler::kMaxVocabSize, &constants) != sampler::ParamError::kNone ||
      constants.is_greedy != 0) {
    throw py::value_error("temperature must be finite and at least 1e-5");
  }
  const int32_t n = static_cast<int32_t>(row.size());
  std::vector<float> weights(static_cast<size_t>(n) + sampler::kListSlack);
  const float max = n == 0 ? 0.0f : *std::max_element(row.data(), row.data() + n);
  KernelsByName(target).weigh(row.data(), n, max, constants.scale, weights.data());
  py::array_t<uint64_t> result(n);
  for (int32_t i = 0; i < n; ++i) {
    result.mutable_data()[i] = static_cast<uint64_t>(weights[static_cast<size_t>(i)]);
  }
  return result;
}

}  // namespace

void BindSampler(py::module_& module) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const sampler::InvalidRequest& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    }
  });
  module.attr("SAMPLER_SPEC_VERSION") = sampler::kSpecVersion;
  py::dict ranges;
  for (const sampler::ParamRange& range : sampler::kParamRanges) {
    ranges[range.name] = py::make_tuple(range.low, range.high);
  }
  module.attr("SAMPLER_RANGES") = ranges;
  module.attr("SAMPLER_STATUS_NAN") = sampler::kStatusNan;
  module.attr("SAMPLER_STATUS_INFINITE") = sampler::kStatusInfinite;
  module.attr("SAMPLER_STATUS_NO_TOKEN") = sampler::kStatusNoToken;
  module.def("sampler_cpu_target", [] { return KernelsByName("").name; });
  module.def("sampler_cpu_targets", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : sampler::AvailableKernels()) names.emplace_back(kernels->name);
    return names;
  });
  module.def("sampler_weights", &Weights, py::arg("row"), py::arg("temperature"), py::arg("target") = "",
             "Integer weights of float32 logits without NaN or +inf.");
  module.def(
      "sampler_exponential",
      [](uint64_t seed, uint64_t position, uint32_t output_index, uint32_t index) {
        return sampler::ExponentialOf({seed, position, output_index}, index);
      },
      py::arg("seed"), py::arg("position"), py::arg("output_index"), py::arg("index"));
  module.def("sampler_ln", [](double x) { return sampler::Ln(x); }, py::arg("x"));
  BindSamplerRequest(module);
  py::class_<PySampler>(module, "Sampler")
      .def(py::init<int, const std::string&>(), py::arg("num_threads") = 0, py::arg("target") = "")
      .def("sample", &PySampler::Sample, py::arg("logits"), py::arg("dtype"), py::arg("requests"),
           py::arg("bitmask"), py::arg("bitmask_rows"), py::arg("advance"), py::arg("num_logprobs"),
           py::arg("processed_logprobs"), py::arg("processed_logits"))
      .def_property_readonly("num_threads", [](const PySampler& self) { return self.batch().num_threads(); })
      .def_property_readonly("target", [](const PySampler& self) { return self.batch().kernels().name; });
}

}  // namespace twinjet::bindings
