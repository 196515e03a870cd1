// Borrowed views of Python arrays: the buffer protocol where an object has it, DLPack otherwise.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace twinjet::bindings {

enum class ElementType { kFloat32, kFloat16, kBfloat16, kInt32, kInt16, kUint16, kOther };

// One or two dimensions of an object on the CPU. Holds the export open for its lifetime; to be
// destroyed under the GIL.
class TensorView {
 public:
  // `name` is the argument's, for errors. Throws TypeError when the object has neither face, and
  // ValueError for a device other than the CPU or a number of dimensions other than 1 and 2.
  TensorView(pybind11::handle object, const char* name);
  ~TensorView();
  TensorView(const TensorView&) = delete;
  TensorView& operator=(const TensorView&) = delete;

  const char* data() const { return data_; }
  ElementType type() const { return type_; }
  const std::string& type_name() const { return type_name_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t row_stride_bytes() const { return row_stride_bytes_; }

  // ValueError unless the elements of a row are adjacent and aligned.
  void RequireAdjacentColumns() const;

 private:
  bool OpenBuffer(pybind11::handle object);
  void OpenDlpack(pybind11::handle object);
  void SetShape(int ndim, const int64_t* shape, const int64_t* strides_bytes);

  const char* name_;
  const char* data_ = nullptr;
  ElementType type_ = ElementType::kOther;
  std::string type_name_;
  int64_t item_bytes_ = 0;
  int64_t rows_ = 0, columns_ = 0;
  int64_t row_stride_bytes_ = 0, column_stride_bytes_ = 0;
  Py_buffer buffer_ = {};
  bool has_buffer_ = false;
  pybind11::object capsule_;
};

}  // namespace twinjet::bindings
