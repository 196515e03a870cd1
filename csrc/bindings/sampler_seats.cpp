// Python face of csrc/sampler/cuda/seat_sampler.h; twinjet/sampling/seats.py documents it. Device memory
// comes as addresses: the callers are an engine's own tensors, checked there, and a step has no time for
// more.
#include "bindings.h"

#if defined(TWINJET_WITH_CUDA)
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "sampler/cuda/seat_sampler.h"
#include "sampler_request.h"

namespace twinjet::bindings {
namespace {

namespace py = pybind11;
using sampler::cuda::SeatSampler;

using Seats = py::array_t<int64_t, py::array::c_style>;
using Flags = py::array_t<bool, py::array::c_style>;
using MaskRows = py::array_t<int32_t, py::array::c_style>;

std::span<const int64_t> SpanOf(const Seats& seats) {
  return {seats.data(), static_cast<size_t>(seats.size())};
}
std::span<const uint8_t> SpanOf(const Flags& flags) {
  return {reinterpret_cast<const uint8_t*>(flags.data()), static_cast<size_t>(flags.size())};
}

template <typename T>
T* Address(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A draw's statuses, to be read once; a receipt that nobody reads is given back when it goes.
class PyReceipt {
 public:
  PyReceipt(std::shared_ptr<SeatSampler> sampler, SeatSampler::Receipt receipt)
      : sampler_(std::move(sampler)), receipt_(receipt) {}
  ~PyReceipt() {
    if (!is_spent_) sampler_->Forget(receipt_);
  }
  PyReceipt(const PyReceipt&) = delete;
  PyReceipt& operator=(const PyReceipt&) = delete;

  py::array_t<uint32_t> Read() {
    if (is_spent_) throw py::value_error("this draw's statuses were read before");
    is_spent_ = true;
    std::vector<uint32_t> statuses;
    {
      py::gil_scoped_release release;
      statuses = sampler_->Read(receipt_);
    }
    return py::array_t<uint32_t>(static_cast<py::ssize_t>(statuses.size()), statuses.data());
  }

 private:
  std::shared_ptr<SeatSampler> sampler_;
  SeatSampler::Receipt receipt_;
  bool is_spent_ = false;
};

class PySeats {
 public:
  PySeats(int device, int32_t vocab_size, int32_t max_rows)
      : sampler_(std::make_shared<SeatSampler>(device, vocab_size, max_rows)) {}

  void Put(int32_t seat, PyRequest& request) { sampler_->Put(seat, request.Idle()); }
  void Remove(int32_t seat) { sampler_->Remove(seat); }
  int32_t NumOutputs(int64_t seat) const {
    if (!sampler_->Has(seat)) throw py::value_error("seat " + std::to_string(seat) + " is empty");
    return sampler_->num_outputs(seat);
  }

  // The first row whose seat is empty, -1 if there is none.
  int64_t FirstEmpty(const Seats& seats) const {
    for (py::ssize_t i = 0; i < seats.size(); ++i) {
      if (!sampler_->Has(seats.data()[i])) return i;
    }
    return -1;
  }

  // Seats of the requests in a batch of vLLM's V1 runner, and the rows that need a look: without a seat, or
  // with another number of output tokens than the seat has counted.
  py::tuple Match(const py::list& request_ids, const py::dict& states, const py::dict& seats) const {
    static PyObject* const output_token_ids = PyUnicode_InternFromString("output_token_ids");
    Seats found(static_cast<py::ssize_t>(request_ids.size()));
    int64_t* out = found.mutable_data();
    py::list rows;
    for (py::ssize_t i = 0; i < found.size(); ++i) {
      PyObject* id = PyList_GET_ITEM(request_ids.ptr(), i);
      out[i] = sampler::cuda::SeatTable::kSkip;
      PyObject* seat = PyDict_GetItemWithError(seats.ptr(), id);
      if (seat == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
      bool is_current = false;
      if (seat != nullptr) {
        out[i] = PyLong_AsLongLong(seat);
        PyObject* state = PyDict_GetItemWithError(states.ptr(), id);
        if (state == nullptr) throw py::key_error(py::cast<std::string>(py::handle(id)));
        const auto output = py::reinterpret_steal<py::object>(PyObject_GetAttr(state, output_token_ids));
        if (!output) throw py::error_already_set();
        const Py_ssize_t known = PyObject_Size(output.ptr());
        if (known < 0) throw py::error_already_set();
        is_current = sampler_->Has(out[i]) && sampler_->num_outputs(out[i]) == known;
      }
      if (!is_current) rows.append(i);
    }
    return py::make_tuple(found, rows);
  }

  std::unique_ptr<PyReceipt> Draw(const Seats& seats, const Flags& advances, uintptr_t logits,
                                  int64_t row_stride, int dtype, const std::optional<MaskRows>& mask_rows,
                                  uintptr_t masks, int64_t mask_stride, uintptr_t token_ids, uintptr_t status,
                                  uintptr_t tokens64, uintptr_t tokens32, uintptr_t num_sampled,
                                  uintptr_t num_rejected, int32_t num_logprobs, bool processed_logprobs,
                                  uintptr_t top_ids, uintptr_t top_logprobs, uintptr_t ranks,
                                  uintptr_t stream) {
    CheckDtype(dtype);
    if (num_logprobs > sampler::cuda::kMaxTopLogprobs) {
      throw py::value_error("num_logprobs is " + std::to_string(num_logprobs) + ": must be at most " +
                            std::to_string(sampler::cuda::kMaxTopLogprobs) + " on CUDA");
    }
    sampler::cuda::Logits input;
    input.data = Address<void>(logits);
    input.row_stride = row_stride;
    input.dtype = static_cast<sampler::Dtype>(dtype);
    input.num_rows = static_cast<int32_t>(seats.size());
    input.vocab_size = sampler_->vocab_size();
    input.bitmask = Address<const uint32_t>(masks);
    input.bitmask_stride = mask_stride;
    std::span<const int32_t> rows_of_masks;
    if (mask_rows) rows_of_masks = {mask_rows->data(), static_cast<size_t>(mask_rows->size())};
    sampler::cuda::SeatResults results;
    results.outputs.token_ids = Address<int32_t>(token_ids);
    results.outputs.status = Address<uint32_t>(status);
    results.outputs.num_logprobs = num_logprobs;
    results.outputs.processed_logprobs = processed_logprobs;
    results.outputs.top_ids = Address<int32_t>(top_ids);
    results.outputs.top_logprobs = Address<float>(top_logprobs);
    results.outputs.ranks = Address<int32_t>(ranks);
    results.tokens64 = Address<int64_t>(tokens64);
    results.tokens32 = Address<int32_t>(tokens32);
    results.num_sampled = Address<int32_t>(num_sampled);
    results.num_rejected = Address<int32_t>(num_rejected);
    std::optional<SeatSampler::Receipt> receipt;
    {
      py::gil_scoped_release release;
      receipt =
          sampler_->Draw(SpanOf(seats), SpanOf(advances), rows_of_masks, input, results, Stream(stream));
    }
    return std::make_unique<PyReceipt>(sampler_, *receipt);
  }

  void Follow(const Seats& seats, const Flags& advances, uintptr_t tokens, int64_t stride, int32_t bits,
              uintptr_t stream) {
    if (bits != 32 && bits != 64) throw py::value_error("bits must be 32 or 64");
    py::gil_scoped_release release;
    sampler_->Follow(SpanOf(seats), SpanOf(advances), Address<void>(tokens), stride, bits, Stream(stream));
  }

  void Mask(const Seats& seats, uintptr_t logits, int64_t row_stride, int dtype, uintptr_t stream) {
    CheckDtype(dtype);
    py::gil_scoped_release release;
    sampler_->Mask(SpanOf(seats), Address<void>(logits), row_stride, static_cast<sampler::Dtype>(dtype),
                   Stream(stream));
  }

  py::dict Waits() {
    const SeatSampler::AllWaits waits = sampler_->waits();
    py::dict result;
    result["buffers"] = waits.buffers;
    result["memory"] = waits.memory;
    result["results"] = waits.results;
    return result;
  }

 private:
  static void CheckDtype(int dtype) {
    if (dtype < 0 || dtype > 2) throw py::value_error("dtype must be 0, 1 or 2");
  }
  static cudaStream_t Stream(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

  std::shared_ptr<SeatSampler> sampler_;
};

}  // namespace

void BindSamplerSeats(py::module_& module) {
  py::class_<PyReceipt>(module, "SeatReceipt").def("read", &PyReceipt::Read);
  py::class_<PySeats>(module, "SeatSampler")
      .def(py::init<int, int32_t, int32_t>(), py::arg("device"), py::arg("vocab_size"), py::arg("max_rows"))
      .def("put", &PySeats::Put, py::arg("seat"), py::arg("request"))
      .def("remove", &PySeats::Remove, py::arg("seat"))
      .def("num_outputs", &PySeats::NumOutputs, py::arg("seat"))
      .def("first_empty", &PySeats::FirstEmpty, py::arg("seats"))
      .def("match", &PySeats::Match, py::arg("request_ids"), py::arg("states"), py::arg("seats"))
      .def("draw", &PySeats::Draw, py::arg("seats"), py::arg("advances"), py::arg("logits"),
           py::arg("row_stride"), py::arg("dtype"), py::arg("mask_rows"), py::arg("masks"),
           py::arg("mask_stride"), py::arg("token_ids"), py::arg("status"), py::arg("tokens64"),
           py::arg("tokens32"), py::arg("num_sampled"), py::arg("num_rejected"), py::arg("num_logprobs"),
           py::arg("processed_logprobs"), py::arg("top_ids"), py::arg("top_logprobs"), py::arg("ranks"),
           py::arg("stream"))
      .def("follow", &PySeats::Follow, py::arg("seats"), py::arg("advances"), py::arg("tokens"),
           py::arg("stride"), py::arg("bits"), py::arg("stream"))
      .def("mask", &PySeats::Mask, py::arg("seats"), py::arg("logits"), py::arg("row_stride"),
           py::arg("dtype"), py::arg("stream"))
      .def("waits", &PySeats::Waits);
}

}  // namespace twinjet::bindings

#else

namespace twinjet::bindings {

void BindSamplerSeats(pybind11::module_&) {}

}  // namespace twinjet::bindings

#endif
