// DecodeRow: the native copy of a vLLM request that does nothing but decode. While a request is
// resident its counters and new tokens live here and its Python object lags behind; WriteBack()
// brings that up to date before anyone else may look.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "kv/block_manager.h"

namespace twinjet::bindings {

// What the rows of one scheduler share.
struct RowContext {
  kv::BlockManager* manager;
  int64_t max_model_len;
  bool is_async;                    // async scheduling: output placeholders are kept
  bool resends_tokens;              // V1 runner: a request not in the last step needs its tokens sent
  pybind11::object native_hasher;   // the block hasher whose hashes can be continued here; None: none
  pybind11::object stopped_status;  // RequestStatus.FINISHED_STOPPED
  pybind11::object length_status;   // RequestStatus.FINISHED_LENGTH_CAPPED
};

enum class Hashing : uint8_t {
  kNone,    // the request has no hasher
  kNative,  // continued with the manager's hasher
  kPython,  // the request's own hasher is called when a block fills
};

struct DecodeRow {
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

  // As the attributes of vLLM's Request of these names.
  int64_t num_computed_tokens = 0;
  int64_t num_tokens = 0;
  int64_t num_output_tokens = 0;
  int64_t num_output_placeholders = 0;
  int64_t num_in_flight_tokens = 0;
  int64_t max_tokens = 0;
  int64_t max_total_tokens = 0;  // prompt and max_tokens

  int64_t num_slots = 0;        // tokens the block table has room for
  int64_t publish_at = kNever;  // tokens at which the next full block is due for the cache
  int64_t last_step = -1;       // step in which it was last scheduled
  int64_t eos_token = -1;       // -1: none
  int64_t client_index = 0;
  int64_t adapter = 0;  // 0: the model itself
  kv::SequenceId sequence = -1;
  Hashing hashing = Hashing::kNone;
  bool wants_logprobs = false;
  bool has_first_output = false;  // prefill statistics or events are still to be sent
  bool is_scheduled = false;      // in the step being built

  pybind11::object request;
  pybind11::object request_id;
  pybind11::object trace_headers;     // None mostly
  pybind11::object output_token_ids;  // the request's own lists
  pybind11::object all_token_ids;
  pybind11::object block_hashes;

  std::vector<int32_t> stop_tokens;
  std::vector<int32_t> unwritten_tokens;  // not yet in the request's lists
  std::vector<int32_t> block_tail;        // tokens of the block being filled (native hashing)
  std::vector<kv::BlockHash> hashes;      // of blocks first_hash and on
  int64_t first_hash = 0;
  size_t num_written_hashes = 0;  // leading hashes that the request's list has

  bool StopsAt(int64_t token) const {
    for (int32_t stop : stop_tokens) {
      if (stop == token) return true;
    }
    return false;
  }
};

// Fills `row` from a running request if all it needs next is one decode that can be done natively;
// false otherwise, with nothing changed. last_scheduled: set of request ids of the step before.
bool Adopt(const RowContext& context, pybind11::handle request, PyObject* sequences, PyObject* last_scheduled,
           int64_t step, DecodeRow* row);

// Appends a token to the row, hashing the block that it fills.
void PushToken(const RowContext& context, DecodeRow& row, int64_t token);

// Publishes the full blocks within the first num_tokens tokens.
void Publish(const RowContext& context, DecodeRow& row, int64_t num_tokens);

// Brings the request's attributes and lists up to date.
void WriteBack(const RowContext& context, DecodeRow& row);

// Attribute `name` (interned) of a request as an integer.
int64_t IntAttribute(pybind11::handle object, PyObject* name);

// Interned attribute names.
struct Names {
  PyObject* request_id;
  PyObject* client_index;
  PyObject* num_computed_tokens;
  PyObject* num_output_placeholders;
  PyObject* num_in_flight_tokens;
  PyObject* num_tokens_with_spec;
  PyObject* next_decode_eligible_step;
  PyObject* status;
  PyObject* stop_reason;
  static const Names& Get();
};

}  // namespace twinjet::bindings
