#include "tensor.h"

#include <cstring>

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

// The unversioned structures of DLPack (dmlc/dlpack, ABI of version 0.x, which __dlpack__() without
// max_version exports).
struct DlDevice {
  int32_t device_type;
  int32_t device_id;
};

struct DlDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null when contiguous
  uint64_t byte_offset;
};

struct DlManagedTensor {
  DlTensor tensor;
  void* manager_context;
  void (*deleter)(DlManagedTensor* self);
};

constexpr int32_t kDlCpu = 1;
constexpr int32_t kDlCudaHost = 3;
constexpr uint8_t kDlInt = 0, kDlUint = 1, kDlFloat = 2, kDlBfloat = 4;

ElementType TypeOfDlpack(DlDataType type, std::string* name) {
  static constexpr const char* kNames[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  *name = (type.code < 7 ? kNames[type.code] : "type") + std::to_string(type.bits);
  if (type.lanes != 1) return ElementType::kOther;
  if (type.code == kDlFloat && type.bits == 32) return ElementType::kFloat32;
  if (type.code == kDlFloat && type.bits == 16) return ElementType::kFloat16;
  if (type.code == kDlBfloat && type.bits == 16) return ElementType::kBfloat16;
  if (type.code == kDlInt && type.bits == 32) return ElementType::kInt32;
  if (type.code == kDlInt && type.bits == 16) return ElementType::kInt16;
  if (type.code == kDlUint && type.bits == 16) return ElementType::kUint16;
  return ElementType::kOther;
}

ElementType TypeOfFormat(const char* format, int64_t item_bytes, std::string* name) {
  const char* f = format == nullptr ? "B" : format;
  if (*f == '@' || *f == '=' || *f == '<') ++f;  // native is little-endian on every target we build for
  *name = f;
  if (std::strlen(f) != 1) return ElementType::kOther;
  if (*f == 'f') return ElementType::kFloat32;
  if (*f == 'e') return ElementType::kFloat16;
  if ((*f == 'i' || *f == 'l') && item_bytes == 4) return ElementType::kInt32;
  if (*f == 'h') return ElementType::kInt16;
  if (*f == 'H') return ElementType::kUint16;
  return ElementType::kOther;
}

void ReleaseCapsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  auto* managed = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  PyCapsule_SetName(capsule, "used_dltensor");
  if (managed->deleter != nullptr) managed->deleter(managed);
}

}  // namespace

TensorView::TensorView(py::handle object, const char* name) : name_(name) {
  if (!OpenBuffer(object)) OpenDlpack(object);
}

TensorView::~TensorView() {
  if (has_buffer_) PyBuffer_Release(&buffer_);
  if (capsule_) ReleaseCapsule(capsule_.ptr());
}

bool TensorView::OpenBuffer(py::handle object) {
  if (!PyObject_CheckBuffer(object.ptr())) return false;
  if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_STRIDED_RO | PyBUF_FORMAT) != 0) {
    throw py::error_already_set();
  }
  has_buffer_ = true;
  int64_t shape[2] = {}, strides[2] = {};
  for (int i = 0; i < buffer_.ndim && i < 2; ++i) {
    shape[i] = buffer_.shape[i];
    strides[i] = buffer_.strides[i];
  }
  data_ = static_cast<const char*>(buffer_.buf);
  item_bytes_ = buffer_.itemsize;
  type_ = TypeOfFormat(buffer_.format, item_bytes_, &type_name_);
  const int ndim = buffer_.ndim;
  if (ndim != 1 && ndim != 2) {
    PyBuffer_Release(&buffer_);
    has_buffer_ = false;
  }
  SetShape(ndim, shape, strides);
  return true;
}

void TensorView::OpenDlpack(py::handle object) {
  if (!py::hasattr(object, "__dlpack__") || !py::hasattr(object, "__dlpack_device__")) {
    throw py::type_error(
        std::string(name_) + " is a " + Py_TYPE(object.ptr())->tp_name +
        ": must be a numpy array, a torch tensor or another object with the buffer protocol or "
        "DLPack");
  }
  const auto device = py::cast<py::tuple>(object.attr("__dlpack_device__")());
  const int type = py::cast<int>(py::int_(device[0]));
  if (type != kDlCpu && type != kDlCudaHost) {
    throw py::value_error(std::string(name_) + " is on DLPack device type " + std::to_string(type) +
                          ": must be on the CPU");
  }
  capsule_ = object.attr("__dlpack__")();
  if (!PyCapsule_IsValid(capsule_.ptr(), "dltensor")) {
    throw py::type_error(std::string(name_) + ": __dlpack__() gave no dltensor capsule");
  }
  const DlTensor& tensor =
      static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"))->tensor;
  type_ = TypeOfDlpack(tensor.dtype, &type_name_);
  item_bytes_ = tensor.dtype.bits / 8;
  data_ = static_cast<const char*>(tensor.data) + tensor.byte_offset;
  const int32_t ndim = tensor.ndim;
  int64_t shape[2] = {}, strides[2] = {};
  for (int i = 0; i < ndim && i < 2; ++i) {
    shape[i] = tensor.shape[i];
    const int64_t contiguous = i + 1 < ndim ? tensor.shape[1] : 1;
    strides[i] = (tensor.strides == nullptr ? contiguous : tensor.strides[i]) * item_bytes_;
  }
  if (ndim != 1 && ndim != 2) ReleaseCapsule(capsule_.ptr());
  SetShape(ndim, shape, strides);
}

void TensorView::SetShape(int ndim, const int64_t* shape, const int64_t* strides_bytes) {
  if (ndim != 1 && ndim != 2) {
    throw py::value_error(std::string(name_) + " has " + std::to_string(ndim) +
                          " dimensions: must have 1 or 2");
  }
  rows_ = ndim == 2 ? shape[0] : 1;
  columns_ = shape[ndim - 1];
  row_stride_bytes_ = ndim == 2 ? strides_bytes[0] : 0;
  column_stride_bytes_ = strides_bytes[ndim - 1];
}

void TensorView::RequireAdjacentColumns() const {
  if (columns_ > 1 && rows_ > 0 && column_stride_bytes_ != item_bytes_) {
    throw py::value_error(std::string(name_) + " has a stride of " + std::to_string(column_stride_bytes_) +
                          " bytes in its last dimension: must be " + std::to_string(item_bytes_));
  }
  const bool is_aligned = reinterpret_cast<uintptr_t>(data_) % static_cast<uintptr_t>(item_bytes_) == 0 &&
                          row_stride_bytes_ % item_bytes_ == 0;
  if (!is_aligned) throw py::value_error(std::string(name_) + " is not aligned to its element size");
}

}  // namespace twinjet::bindings
