// DecodeBatch: Update(), and how outputs are made.
#include <stdexcept>

#include "vllm/decode_batch.h"

// Where a member descriptor keeps its offset.
#include <structmember.h>

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

py::object Steal(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

}  // namespace

OutputMaker::OutputMaker(py::type output_type) {
  blank_ = output_type(py::arg("request_id") = "", py::arg("new_token_ids") = py::none());
  py::object copy = output_type.attr("__copy__");
  if (Py_IS_TYPE(copy.ptr(), &PyMethodDescr_Type)) {
    PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(copy.ptr())->d_method;
    if (method->ml_flags == METH_NOARGS) copy_ = method->ml_meth;
  }
  request_id_ = FindField(output_type, "request_id");
  new_token_ids_ = FindField(output_type, "new_token_ids");
  trace_headers_ = FindField(output_type, "trace_headers");
  new_logprobs_ = FindField(output_type, "new_logprobs");
}

OutputMaker::Field OutputMaker::FindField(py::handle type, const char* name) const {
  Field field;
  field.name = PyUnicode_InternFromString(name);
  py::object descriptor = type.attr(name);
  if (!Py_IS_TYPE(descriptor.ptr(), &PyMemberDescr_Type)) return field;
  PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(descriptor.ptr())->d_member;
  if (member->type != T_OBJECT_EX) return field;
  // Trust the offset only if it leads where the attribute does, and nobody tracks the object.
  auto* slot = reinterpret_cast<PyObject**>(reinterpret_cast<char*>(blank_.ptr()) + member->offset);
  if (*slot == py::object(blank_.attr(name)).ptr() && !PyObject_IS_GC(blank_.ptr()))
    field.offset = member->offset;
  return field;
}

void OutputMaker::Set(py::handle output, const Field& field, py::handle value) {
  if (field.offset < 0) {
    if (PyObject_SetAttr(output.ptr(), field.name, value.ptr()) < 0) throw py::error_already_set();
    return;
  }
  auto* slot = reinterpret_cast<PyObject**>(reinterpret_cast<char*>(output.ptr()) + field.offset);
  Py_SETREF(*slot, Py_NewRef(value.ptr()));
}

py::object OutputMaker::Make(py::handle request_id, py::handle token_ids) const {
  py::object output = copy_ ? Steal(copy_(blank_.ptr(), nullptr)) : py::object(blank_.attr("__copy__")());
  Set(output, request_id_, request_id);
  Set(output, new_token_ids_, token_ids);
  return output;
}

void OutputMaker::SetTraceHeaders(py::handle output, py::handle value) const {
  Set(output, trace_headers_, value);
}
void OutputMaker::SetLogprobs(py::handle output, py::handle value) const {
  Set(output, new_logprobs_, value);
}

DecodeRow* DecodeBatch::FindById(PyObject* request_id) {
  PyObject* address = PyDict_GetItemWithError(by_id_.ptr(), request_id);
  if (address) return static_cast<DecodeRow*>(PyLong_AsVoidPtr(address));
  if (PyErr_Occurred()) throw py::error_already_set();
  return nullptr;
}

py::list& DecodeBatch::OutputsOf(int64_t client) {
  for (auto& [index, outputs] : client_outputs_) {
    if (index == client) return outputs;
  }
  return client_outputs_.emplace_back(client, py::list()).second;
}

bool DecodeBatch::UpdateRow(DecodeRow& row, int64_t num_scheduled, PyObject* tokens, bool* stopped) {
  *stopped = false;
  if (!tokens || !PyList_CheckExact(tokens) || PyList_GET_SIZE(tokens) != 1) return false;
  int overflow = 0;
  long long token = PyLong_AsLongLongAndOverflow(PyList_GET_ITEM(tokens, 0), &overflow);
  if (token < 0 || token > INT32_MAX) {
    PyErr_Clear();
    return false;
  }
  row.num_in_flight_tokens -= num_scheduled;
  PushToken(context_, row, token);
  py::object status;
  if (token == row.eos_token) {
    status = context_.stopped_status;
  } else if (row.StopsAt(token)) {
    status = context_.stopped_status;
    if (PyObject_SetAttr(row.request.ptr(), Names::Get().stop_reason, PyList_GET_ITEM(tokens, 0)) < 0) {
      throw py::error_already_set();
    }
  } else if (row.num_tokens >= context_.max_model_len || row.num_output_tokens >= row.max_tokens) {
    status = context_.length_status;
  }
  if (context_.is_async) {
    --row.num_output_placeholders;
    if (row.num_output_placeholders < 0) throw std::runtime_error("a token came that was not scheduled");
    Publish(context_, row, row.num_computed_tokens - row.num_output_placeholders);
  }
  if (status) {
    *stopped = true;
    if (PyObject_SetAttr(row.request.ptr(), Names::Get().status, status.ptr()) < 0)
      throw py::error_already_set();
  }
  return true;
}

py::tuple DecodeBatch::Update(const py::dict& num_scheduled, const py::dict& row_indices,
                              const py::list& sampled, const py::object& logprobs, const py::dict& requests) {
  py::list firsts;   // (request, output): the first output of a request
  py::list stopped;  // (position, request, output)
  py::dict rest;     // request id -> number of scheduled tokens, for stock
  py::list holes;    // (client, index in its outputs, request id) of the rest
  client_outputs_.clear();
  static PyObject* slice_request = PyUnicode_InternFromString("slice_request");

  PyObject* id = nullptr;
  PyObject* count = nullptr;
  Py_ssize_t cursor = 0;
  size_t guess = 0;  // the row that most likely comes next
  for (Py_ssize_t position = 0; PyDict_Next(num_scheduled.ptr(), &cursor, &id, &count); ++position) {
    while (guess < positions_.size() && !(positions_[guess] && positions_[guess]->is_scheduled)) ++guess;
    DecodeRow* row = guess < positions_.size() && positions_[guess]->request_id.ptr() == id
                         ? positions_[guess++]
                         : FindById(id);
    PyObject* request = row ? row->request.ptr() : PyDict_GetItemWithError(requests.ptr(), id);
    if (!request) {
      if (PyErr_Occurred()) throw py::error_already_set();
      continue;  // finished while the step ran
    }
    if (row) {
      PyObject* index_object = PyDict_GetItemWithError(row_indices.ptr(), id);
      Py_ssize_t index = index_object ? PyLong_AsSsize_t(index_object) : -1;
      PyObject* tokens = index >= 0 && index < PyList_GET_SIZE(sampled.ptr())
                             ? PyList_GET_ITEM(sampled.ptr(), index)
                             : nullptr;
      bool has_stopped = false;
      if (UpdateRow(*row, PyLong_AsLongLong(count), tokens, &has_stopped)) {
        ++counters_.num_rows_updated;
        py::object output = outputs_.Make(row->request_id, tokens);
        if (!row->trace_headers.is_none()) outputs_.SetTraceHeaders(output, row->trace_headers);
        if (row->wants_logprobs && !logprobs.is_none()) {
          py::int_ row_index(index);
          py::int_ one(1);
          outputs_.SetLogprobs(
              output, Steal(PyObject_CallMethodObjArgs(logprobs.ptr(), slice_request, row_index.ptr(),
                                                       one.ptr(), nullptr)));
        }
        if (row->has_first_output) {
          firsts.append(py::make_tuple(row->request, output));
          row->has_first_output = false;
        }
        py::list& outputs = OutputsOf(row->client_index);
        if (PyList_Append(outputs.ptr(), output.ptr()) < 0) throw py::error_already_set();
        if (has_stopped) {
          stopped.append(py::make_tuple(position, row->request, output));
          Drop(row, true);
        }
        continue;
      }
      Drop(row, true);
    }
    // A place in the order of outputs, for what stock makes of it.
    int64_t client = IntAttribute(request, Names::Get().client_index);
    py::list& places = OutputsOf(client);
    holes.append(py::make_tuple(client, places.size(), py::handle(id)));
    places.append(py::none());
    if (PyDict_SetItem(rest.ptr(), id, count) < 0) throw py::error_already_set();
  }

  py::dict outputs;
  for (auto& [client, list] : client_outputs_) outputs[py::int_(client)] = list;
  client_outputs_.clear();
  return py::make_tuple(outputs, firsts, stopped, rest, holes);
}

}  // namespace twinjet::bindings
