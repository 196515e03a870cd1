// Moving a request's state between vLLM's Request and a DecodeRow.
#include "vllm/row.h"

#include <stdexcept>

namespace py = pybind11;

namespace twinjet::bindings {
namespace {

PyObject* Intern(const char* text) {
  PyObject* name = PyUnicode_InternFromString(text);
  if (!name) throw py::error_already_set();
  return name;
}

py::object Get(py::handle object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

int64_t ToInt(py::handle value) {
  int64_t number = PyLong_AsLongLong(value.ptr());
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

void Set(py::handle object, PyObject* name, int64_t value) {
  py::int_ number(value);
  if (PyObject_SetAttr(object.ptr(), name, number.ptr()) < 0) throw py::error_already_set();
}

bool IsEmpty(py::handle container) {
  Py_ssize_t size = PyObject_Size(container.ptr());
  if (size < 0) throw py::error_already_set();
  return size == 0;
}

#define TWINJET_NAME(name)                     \
  static PyObject* Name_##name() {             \
    static PyObject* interned = Intern(#name); \
    return interned;                           \
  }
TWINJET_NAME(_all_token_ids)
TWINJET_NAME(_block_hasher)
TWINJET_NAME(_output_token_ids)
TWINJET_NAME(block_hashes)
TWINJET_NAME(cache_salt)
TWINJET_NAME(eos_token_id)
TWINJET_NAME(events)
TWINJET_NAME(is_prefill_chunk)
TWINJET_NAME(lora_int_id)
TWINJET_NAME(lora_request)
TWINJET_NAME(max_tokens)
TWINJET_NAME(mm_features)
TWINJET_NAME(num_logprobs)
TWINJET_NAME(num_nans_in_logits)
TWINJET_NAME(num_prompt_tokens)
TWINJET_NAME(num_stale_output_tokens)
TWINJET_NAME(pooling_params)
TWINJET_NAME(prefill_stats)
TWINJET_NAME(prompt_embeds)
TWINJET_NAME(repetition_detection)
TWINJET_NAME(resumable)
TWINJET_NAME(sampling_params)
TWINJET_NAME(spec_decode_metrics)
TWINJET_NAME(spec_token_ids)
TWINJET_NAME(stop_token_ids)
TWINJET_NAME(structured_output_request)
TWINJET_NAME(trace_headers)
TWINJET_NAME(update_block_hashes)
#undef TWINJET_NAME

// Whether this request may ever be served natively.
bool IsPlain(py::handle request) {
  return Get(request, Name_structured_output_request()).is_none() &&
         Get(request, Name_pooling_params()).is_none() && Get(request, Name_prompt_embeds()).is_none() &&
         Get(request, Name_spec_decode_metrics()).is_none() &&
         !py::cast<bool>(Get(request, Name_resumable())) && IsEmpty(Get(request, Name_mm_features())) &&
         IsEmpty(Get(request, Name_spec_token_ids())) &&
         ToInt(Get(request, Name_num_nans_in_logits())) == 0 &&
         ToInt(Get(request, Name_num_stale_output_tokens())) == 0;
}

kv::BlockHash HashFrom(py::handle bytes) {
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(bytes.ptr(), &data, &size) < 0) throw py::error_already_set();
  if (size < kv::BlockHash::kBytes) throw std::invalid_argument("a block hash needs at least 16 bytes");
  return kv::BlockHash::FromBytes(data);
}

void AdoptHashes(const RowContext& context, DecodeRow& row) {
  py::object hasher = Get(row.request, Name__block_hasher());
  if (hasher.is_none()) {
    row.hashing = Hashing::kNone;
    return;
  }
  row.hashing = hasher.is(context.native_hasher) ? Hashing::kNative : Hashing::kPython;
  const kv::Sequence* sequence = context.manager->FindSequence(row.sequence);
  row.first_hash = sequence->num_published;
  Py_ssize_t num_hashes = PyList_GET_SIZE(row.block_hashes.ptr());
  for (Py_ssize_t i = row.first_hash; i < num_hashes; ++i) {
    row.hashes.push_back(HashFrom(PyList_GET_ITEM(row.block_hashes.ptr(), i)));
  }
  row.num_written_hashes = row.hashes.size();
  if (context.manager->prefix_cache_enabled()) {
    row.publish_at = (sequence->num_published + 1) * context.manager->block_size();
  }
  if (row.hashing != Hashing::kNative) return;
  int64_t block_size = context.manager->block_size();
  for (int64_t i = row.num_tokens - row.num_tokens % block_size; i < row.num_tokens; ++i) {
    row.block_tail.push_back(static_cast<int32_t>(ToInt(PyList_GET_ITEM(row.all_token_ids.ptr(), i))));
  }
}

kv::BlockHash ParentHash(const RowContext& context, const DecodeRow& row) {
  if (!row.hashes.empty()) return row.hashes.back();
  Py_ssize_t num_hashes = PyList_GET_SIZE(row.block_hashes.ptr());
  if (num_hashes > 0) return HashFrom(PyList_GET_ITEM(row.block_hashes.ptr(), num_hashes - 1));
  py::object salt = Get(row.request, Name_cache_salt());
  if (salt.is_none()) return context.manager->hasher().Root({});
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(salt.ptr(), &size);
  if (!text) throw py::error_already_set();
  return context.manager->hasher().Root({reinterpret_cast<const uint8_t*>(text), static_cast<size_t>(size)});
}

void AppendTokens(py::handle list, const std::vector<int32_t>& tokens) {
  for (int32_t token : tokens) {
    py::int_ number(token);
    if (PyList_Append(list.ptr(), number.ptr()) < 0) throw py::error_already_set();
  }
}

void WriteTokens(DecodeRow& row) {
  AppendTokens(row.output_token_ids, row.unwritten_tokens);
  AppendTokens(row.all_token_ids, row.unwritten_tokens);
  row.unwritten_tokens.clear();
}

// The token ids of a full block of the request, from its own list and from what is not written there yet.
void ReadBlock(const DecodeRow& row, int64_t block, int64_t block_size, std::vector<int32_t>* tokens) {
  tokens->clear();
  auto num_written = static_cast<int64_t>(PyList_GET_SIZE(row.all_token_ids.ptr()));
  for (int64_t i = block * block_size; i < (block + 1) * block_size; ++i) {
    bool is_written = i < num_written;
    tokens->push_back(is_written ? static_cast<int32_t>(ToInt(PyList_GET_ITEM(row.all_token_ids.ptr(), i)))
                                 : row.unwritten_tokens[static_cast<size_t>(i - num_written)]);
  }
}

void HashInPython(const RowContext& context, DecodeRow& row) {
  WriteTokens(row);
  PyObject* result = PyObject_CallMethodNoArgs(row.request.ptr(), Name_update_block_hashes());
  if (!result) throw py::error_already_set();
  Py_DECREF(result);
  auto num_known = static_cast<Py_ssize_t>(row.first_hash) + static_cast<Py_ssize_t>(row.hashes.size());
  for (Py_ssize_t i = num_known; i < PyList_GET_SIZE(row.block_hashes.ptr()); ++i) {
    row.hashes.push_back(HashFrom(PyList_GET_ITEM(row.block_hashes.ptr(), i)));
  }
  row.num_written_hashes = row.hashes.size();
  (void)context;
}

}  // namespace

const Names& Names::Get() {
  static const Names names{Intern("request_id"),
                           Intern("client_index"),
                           Intern("num_computed_tokens"),
                           Intern("num_output_placeholders"),
                           Intern("num_in_flight_tokens"),
                           Intern("num_tokens_with_spec"),
                           Intern("next_decode_eligible_step"),
                           Intern("status"),
                           Intern("stop_reason")};
  return names;
}

int64_t IntAttribute(py::handle object, PyObject* name) { return ToInt(Get(object, name)); }

bool Adopt(const RowContext& context, py::handle request, PyObject* sequences, PyObject* last_scheduled,
           int64_t step, DecodeRow* row) {
  const Names& names = Names::Get();
  if (py::cast<bool>(Get(request, Name_is_prefill_chunk())) || !IsPlain(request)) return false;
  py::object params = Get(request, Name_sampling_params());
  if (params.is_none() || !Get(params, Name_repetition_detection()).is_none()) return false;
  if (IntAttribute(request, names.next_decode_eligible_step) > step) return false;

  row->request_id = Get(request, names.request_id);
  if (context.resends_tokens) {
    int was_scheduled = PySet_Contains(last_scheduled, row->request_id.ptr());
    if (was_scheduled < 0) throw py::error_already_set();
    if (!was_scheduled) return false;
  }
  PyObject* sequence = PyDict_GetItemWithError(sequences, row->request_id.ptr());
  if (!sequence) {
    if (PyErr_Occurred()) throw py::error_already_set();
    return false;
  }
  row->sequence = ToInt(sequence);
  const kv::Sequence* blocks = context.manager->FindSequence(row->sequence);
  if (!blocks) return false;

  row->output_token_ids = Get(request, Name__output_token_ids());
  row->all_token_ids = Get(request, Name__all_token_ids());
  row->block_hashes = Get(request, Name_block_hashes());
  if (!PyList_CheckExact(row->output_token_ids.ptr()) || !PyList_CheckExact(row->all_token_ids.ptr()) ||
      !PyList_CheckExact(row->block_hashes.ptr())) {
    return false;
  }
  row->num_tokens = PyList_GET_SIZE(row->all_token_ids.ptr());
  row->num_output_tokens = PyList_GET_SIZE(row->output_token_ids.ptr());
  row->num_computed_tokens = IntAttribute(request, names.num_computed_tokens);
  row->num_output_placeholders = IntAttribute(request, names.num_output_placeholders);
  row->num_in_flight_tokens = IntAttribute(request, names.num_in_flight_tokens);
  if (row->num_tokens + row->num_output_placeholders - row->num_computed_tokens != 1) return false;

  row->max_tokens = IntAttribute(request, Name_max_tokens());
  row->max_total_tokens = IntAttribute(request, Name_num_prompt_tokens()) + row->max_tokens;
  row->client_index = IntAttribute(request, names.client_index);
  py::object adapter = Get(request, Name_lora_request());
  if (!adapter.is_none()) row->adapter = IntAttribute(adapter, Name_lora_int_id());
  py::object eos = Get(params, Name_eos_token_id());
  row->eos_token = eos.is_none() ? -1 : ToInt(eos);
  py::object stops = Get(params, Name_stop_token_ids());
  if (!stops.is_none()) {
    for (py::handle stop : stops) row->stop_tokens.push_back(static_cast<int32_t>(ToInt(stop)));
  }
  row->wants_logprobs = !Get(params, Name_num_logprobs()).is_none();
  row->trace_headers = Get(request, Name_trace_headers());
  row->has_first_output =
      !Get(request, Name_prefill_stats()).is_none() || !IsEmpty(Get(request, Name_events()));
  row->num_slots = blocks->num_blocks * context.manager->block_size();
  row->last_step = step - 1;
  row->request = py::reinterpret_borrow<py::object>(request);
  AdoptHashes(context, *row);
  return true;
}

void PushToken(const RowContext& context, DecodeRow& row, int64_t token) {
  row.unwritten_tokens.push_back(static_cast<int32_t>(token));
  ++row.num_tokens;
  ++row.num_output_tokens;
  if (row.hashing == Hashing::kNone) return;
  bool fills_block = row.num_tokens % context.manager->block_size() == 0;
  if (row.hashing == Hashing::kPython) {
    if (fills_block) HashInPython(context, row);
    return;
  }
  row.block_tail.push_back(static_cast<int32_t>(token));
  if (!fills_block) return;
  row.hashes.push_back(context.manager->hasher().HashBlock(ParentHash(context, row), row.block_tail.data()));
  row.block_tail.clear();
}

void Publish(const RowContext& context, DecodeRow& row, int64_t num_tokens) {
  if (num_tokens < row.publish_at) return;
  kv::Sequence* sequence = context.manager->FindSequence(row.sequence);
  int64_t num_new = 0;
  std::vector<int32_t> tokens;
  auto tokens_of = [&](int64_t block) {
    ReadBlock(row, block, context.manager->block_size(), &tokens);
    return std::span<const int32_t>(tokens);
  };
  kv::Status status = context.manager->PublishHashes(
      *sequence, num_tokens, row.first_hash + static_cast<int64_t>(row.hashes.size()),
      [&row](int64_t block) {
        // The parent of the first one lies before those that the row keeps.
        if (block < row.first_hash) return HashFrom(PyList_GET_ITEM(row.block_hashes.ptr(), block));
        return row.hashes[static_cast<size_t>(block - row.first_hash)];
      },
      tokens_of, &num_new);
  if (status != kv::Status::kOk) throw std::runtime_error("a full block has no hash to publish it under");
  row.publish_at = (sequence->num_published + 1) * context.manager->block_size();
}

void WriteBack(const RowContext& context, DecodeRow& row) {
  const Names& names = Names::Get();
  WriteTokens(row);
  for (; row.num_written_hashes < row.hashes.size(); ++row.num_written_hashes) {
    py::bytes hash(reinterpret_cast<const char*>(&row.hashes[row.num_written_hashes]), kv::BlockHash::kBytes);
    if (PyList_Append(row.block_hashes.ptr(), hash.ptr()) < 0) throw py::error_already_set();
  }
  Set(row.request, names.num_computed_tokens, row.num_computed_tokens);
  Set(row.request, names.num_in_flight_tokens, row.num_in_flight_tokens);
  if (!context.is_async) return;
  Set(row.request, names.num_output_placeholders, row.num_output_placeholders);
  // Vllm's async scheduler sets this for the V2 runner; it never delays a request without pipeline stages.
  if (!context.resends_tokens) Set(row.request, names.next_decode_eligible_step, row.last_step + 1);
}

}  // namespace twinjet::bindings
