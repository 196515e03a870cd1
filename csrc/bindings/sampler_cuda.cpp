// Python face of csrc/sampler/cuda; twinjet/sampling/cuda.py documents it and allocates. Without the CUDA
// side only HAS_CUDA is bound.
#include "bindings.h"

#if defined(TWINJET_WITH_CUDA)
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <set>
#include <string>
#include <vector>

#include "sampler/cuda/device_sampler.h"
#include "sampler_request.h"
#endif

namespace twinjet::bindings {

#if defined(TWINJET_WITH_CUDA)
namespace {

namespace py = pybind11;
using sampler::Dtype;

// DLPack's memory layout (github.com/dmlc/dlpack, version 0 structs: what `__dlpack__()` gives by default).
struct DlDevice {
  int32_t type;
  int32_t id;
};
struct DlType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlType type;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DlManaged {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManaged*);
};
constexpr int32_t kDlCuda = 2;
constexpr uint8_t kDlInt = 0, kDlFloat = 2, kDlBfloat = 4;

// A tensor on a CUDA device, borrowed through DLPack for the object's lifetime. No stream is synchronised:
// the caller names the stream that its tensors are ready on.
class DeviceTensor {
 public:
  DeviceTensor(const py::handle& object, const char* name, int device) : name_(name) {
    if (!py::hasattr(object, "__dlpack__")) {
      throw py::type_error(std::string(name) + " is a " + Py_TYPE(object.ptr())->tp_name +
                           ": must have DLPack");
    }
    capsule_ = object.attr("__dlpack__")(py::arg("stream") = -1);
    if (!PyCapsule_IsValid(capsule_.ptr(), "dltensor")) {
      throw py::type_error(std::string(name) + ": __dlpack__() gave no dltensor capsule");
    }
    managed_ = static_cast<DlManaged*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
    PyCapsule_SetName(capsule_.ptr(), "used_dltensor");
    const DlTensor& tensor = managed_->tensor;
    std::string problem;
    if (tensor.device.type != kDlCuda || tensor.device.id != device) {
      problem = " is on another device: must be on CUDA device " + std::to_string(device);
    } else if (tensor.ndim != 1 && tensor.ndim != 2) {
      problem = " has " + std::to_string(tensor.ndim) + " dimensions: must have 1 or 2";
    } else if (tensor.strides != nullptr && columns() > 1 && tensor.strides[tensor.ndim - 1] != 1) {
      problem = " must have adjacent elements in its last dimension";
    }
    if (!problem.empty()) {
      Release();
      throw py::value_error(std::string(name) + problem);
    }
  }
  ~DeviceTensor() { Release(); }
  DeviceTensor(const DeviceTensor&) = delete;
  DeviceTensor& operator=(const DeviceTensor&) = delete;

  char* data() const { return static_cast<char*>(managed_->tensor.data) + managed_->tensor.byte_offset; }
  int64_t columns() const { return managed_->tensor.shape[managed_->tensor.ndim - 1]; }
  int64_t rows() const { return managed_->tensor.ndim == 2 ? managed_->tensor.shape[0] : 1; }
  int64_t row_stride() const {
    const DlTensor& tensor = managed_->tensor;
    if (tensor.ndim == 1 || tensor.strides == nullptr) return columns();
    return tensor.strides[0];
  }
  bool Is(uint8_t code, uint8_t bits) const {
    const DlType& type = managed_->tensor.type;
    return type.code == code && type.bits == bits && type.lanes == 1;
  }

  // The data of an output of this shape.
  template <typename T>
  T* Output(uint8_t code, int64_t num_rows, int64_t num_columns) const {
    const bool contiguous = rows() <= 1 || row_stride() == num_columns;
    if (!Is(code, 32) || !contiguous || rows() * columns() != num_rows * num_columns) {
      throw py::value_error(name_ + " must be a contiguous " + (code == kDlInt ? "int32" : "float32") +
                            " tensor of shape [" + std::to_string(num_rows) + ", " +
                            std::to_string(num_columns) + "]");
    }
    return reinterpret_cast<T*>(data());
  }

 private:
  void Release() {
    if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
    managed_ = nullptr;
  }

  std::string name_;
  py::object capsule_;
  DlManaged* managed_ = nullptr;
};

cudaStream_t Stream(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

class PyDeviceSampler {
 public:
  PyDeviceSampler(int device, int num_slots) : sampler_(device, num_slots) {}

  sampler::cuda::DeviceSampler& sampler() { return sampler_; }

  void Prepare(const py::sequence& requests, int32_t vocab_size,
               const std::optional<py::array_t<int32_t, py::array::c_style>>& bitmask_rows,
               uintptr_t stream) {
    rows_.clear();
    std::set<const PyRequest*> seen;
    if (bitmask_rows && bitmask_rows->size() != static_cast<py::ssize_t>(requests.size())) {
      throw py::value_error("bitmask_rows must have one element per request");
    }
    max_bitmask_row_ = -1;
    for (size_t i = 0; i < requests.size(); ++i) {
      auto* request = py::cast<PyRequest*>(requests[i]);
      sampler::Request& idle = request->Idle();
      if (!seen.insert(request).second) throw py::value_error("a request is given twice");
      if (idle.vocab_size() != vocab_size) {
        throw py::value_error("request " + std::to_string(i) + " has vocab_size " +
                              std::to_string(idle.vocab_size()) + ": must be the logits' " +
                              std::to_string(vocab_size));
      }
      sampler::cuda::HostRow row;
      row.constants = idle.Constants();
      row.edits = idle.Edits();
      row.bitmask_row = bitmask_rows ? bitmask_rows->data()[i] : -1;
      if (row.bitmask_row < -1) throw py::value_error("bitmask_rows must be at least -1");
      max_bitmask_row_ = std::max(max_bitmask_row_, row.bitmask_row);
      rows_.push_back(row);
    }
    sampler_.Prepare(rows_, vocab_size, Stream(stream));
  }

  void Launch(const py::object& logits, const std::string& dtype, const py::object& bitmask,
              const py::object& token_ids, const py::object& status, const py::object& processed_logits,
              int32_t num_logprobs, bool processed_logprobs, const py::object& top_ids,
              const py::object& top_logprobs, const py::object& ranks, uintptr_t stream) {
    const int device = sampler_.device();
    const DeviceTensor view(logits, "logits", device);
    sampler::cuda::Logits input;
    input.data = view.data();
    input.row_stride = view.row_stride();
    if (view.Is(kDlFloat, 32)) {
      input.dtype = Dtype::kFloat32;
    } else if (view.Is(kDlFloat, 16)) {
      input.dtype = Dtype::kFloat16;
    } else if (view.Is(kDlBfloat, 16) || (view.Is(kDlInt, 16) && dtype == "bfloat16")) {
      input.dtype = Dtype::kBfloat16;
    } else {
      throw py::type_error("logits must be float32, float16 or bfloat16");
    }
    if (view.columns() < 1 || view.columns() > sampler::kMaxVocabSize) {
      throw py::value_error("logits have " + std::to_string(view.columns()) +
                            " columns: must have between 1 and 524288");
    }
    const int64_t num_rows = view.rows();
    input.num_rows = static_cast<int32_t>(num_rows);
    input.vocab_size = static_cast<int32_t>(view.columns());
    std::optional<DeviceTensor> mask;
    if (!bitmask.is_none()) {
      mask.emplace(bitmask, "bitmask", device);
      if (!mask->Is(kDlInt, 32)) throw py::type_error("bitmask must be int32");
      if (mask->columns() < (view.columns() + 31) / 32)
        throw py::value_error("bitmask has too few words a row");
      input.bitmask = reinterpret_cast<const uint32_t*>(mask->data());
      input.bitmask_stride = mask->row_stride();
    }
    if (max_bitmask_row_ >= (mask ? mask->rows() : 0)) {
      throw py::value_error("bitmask_rows has " + std::to_string(max_bitmask_row_) +
                            ": must be below the bitmask's number of rows");
    }
    sampler::cuda::Outputs outputs;
    const DeviceTensor tokens(token_ids, "token_ids", device), flags(status, "status", device);
    outputs.token_ids = tokens.Output<int32_t>(kDlInt, num_rows, 1);
    outputs.status = flags.Output<uint32_t>(kDlInt, num_rows, 1);
    std::optional<DeviceTensor> processed, ids, logprobs, places;
    if (!processed_logits.is_none()) {
      processed.emplace(processed_logits, "processed_logits", device);
      outputs.processed_logits = processed->Output<float>(kDlFloat, num_rows, view.columns());
    }
    outputs.num_logprobs = num_logprobs;
    outputs.processed_logprobs = processed_logprobs;
    if (num_logprobs > sampler::cuda::kMaxTopLogprobs) {
      throw py::value_error("num_logprobs is " + std::to_string(num_logprobs) + ": must be at most " +
                            std::to_string(sampler::cuda::kMaxTopLogprobs) + " on CUDA");
    }
    if (num_logprobs >= 0) {
      ids.emplace(top_ids, "top_ids", device);
      logprobs.emplace(top_logprobs, "top_logprobs", device);
      places.emplace(ranks, "ranks", device);
      outputs.top_ids = ids->Output<int32_t>(kDlInt, num_rows, 1 + num_logprobs);
      outputs.top_logprobs = logprobs->Output<float>(kDlFloat, num_rows, 1 + num_logprobs);
      outputs.ranks = places->Output<int32_t>(kDlInt, num_rows, 1);
    }
    sampler_.Sample(input, outputs, Stream(stream));
  }

 private:
  sampler::cuda::DeviceSampler sampler_;
  std::vector<sampler::cuda::HostRow> rows_;
  int32_t max_bitmask_row_ = -1;
};

}  // namespace

void BindSamplerCuda(py::module_& module) {
  module.attr("HAS_CUDA") = true;
  module.attr("CUDA_MAX_LOGPROBS") = sampler::cuda::kMaxTopLogprobs;
  py::class_<PyDeviceSampler>(module, "CudaSampler")
      .def(py::init<int, int>(), py::arg("device"), py::arg("num_slots") = 4)
      .def_property_readonly("device", [](PyDeviceSampler& self) { return self.sampler().device(); })
      .def(
          "reserve",
          [](PyDeviceSampler& self, int32_t num_rows, int32_t vocab_size, size_t num_edits,
             size_t num_allowed) { self.sampler().Reserve(num_rows, vocab_size, num_edits, num_allowed); },
          py::arg("num_rows"), py::arg("vocab_size"), py::arg("num_edits"), py::arg("num_allowed_rows"))
      .def("prepare", &PyDeviceSampler::Prepare, py::arg("requests"), py::arg("vocab_size"),
           py::arg("bitmask_rows"), py::arg("stream"))
      .def("launch", &PyDeviceSampler::Launch, py::arg("logits"), py::arg("dtype"), py::arg("bitmask"),
           py::arg("token_ids"), py::arg("status"), py::arg("processed_logits"), py::arg("num_logprobs"),
           py::arg("processed_logprobs"), py::arg("top_ids"), py::arg("top_logprobs"), py::arg("ranks"),
           py::arg("stream"));
}

#else

void BindSamplerCuda(pybind11::module_& module) { module.attr("HAS_CUDA") = false; }

#endif

}  // namespace twinjet::bindings
