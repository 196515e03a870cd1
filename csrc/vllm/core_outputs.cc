#include "vllm/core_outputs.h"

#include <limits>
#include <vector>

#include "vllm/msgpack_reader.h"

namespace twinjet::vllm {
namespace {

using stream::EngineFinish;
using stream::LogprobRows;
using stream::SequenceStep;
using stream::StepOutputs;
using stream::StopCause;

// Fields of vLLM's array-like structs; compat.py's fingerprint stands for them.
constexpr uint32_t kMessageFields = 9;
constexpr uint32_t kOutputFields = 18;
constexpr int64_t kPreempted = 3;

uint32_t Narrow(int64_t value) {
  if (value < 0 || value > std::numeric_limits<int32_t>::max()) throw WireError("a count is out of range");
  return static_cast<uint32_t>(value);
}

int32_t TokenId(int64_t value) {
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
    throw WireError("a token id is out of range");
  }
  return static_cast<int32_t>(value);
}

// A numpy array or a torch tensor of one or two dimensions, little-endian.
struct Matrix {
  enum class Kind : uint8_t { kInt32, kInt64, kFloat32, kFloat64 };

  Kind kind;
  uint32_t num_rows = 0;
  uint32_t width = 1;
  const uint8_t* data = nullptr;

  size_t size() const { return size_t{num_rows} * width; }

  template <typename T>
  T At(size_t index) const {
    switch (kind) {
      case Kind::kInt32:
        return static_cast<T>(Load<int32_t>(index));
      case Kind::kInt64:
        return static_cast<T>(Load<int64_t>(index));
      case Kind::kFloat32:
        return static_cast<T>(Load<float>(index));
      default:
        return static_cast<T>(Load<double>(index));
    }
  }

 private:
  template <typename S>
  S Load(size_t index) const {
    S value;
    std::memcpy(&value, data + index * sizeof(S), sizeof(S));
    return value;
  }
};

Matrix::Kind KindOf(std::string_view name) {
  if (name == "<i4" || name == "int32") return Matrix::Kind::kInt32;
  if (name == "<i8" || name == "int64") return Matrix::Kind::kInt64;
  if (name == "<f4" || name == "float32") return Matrix::Kind::kFloat32;
  if (name == "<f8" || name == "float64") return Matrix::Kind::kFloat64;
  throw WireError("an array of an unknown type");
}

Matrix ReadMatrix(MsgpackReader& reader, std::span<const Frame> frames) {
  if (reader.ReadArray() != 3) throw WireError("an array's description was expected");
  Matrix matrix;
  matrix.kind = KindOf(reader.ReadText());
  const uint32_t num_dimensions = reader.ReadArray();
  if (num_dimensions != 1 && num_dimensions != 2)
    throw WireError("an array of 1 or 2 dimensions was expected");
  matrix.num_rows = Narrow(reader.ReadInt());
  if (num_dimensions == 2) matrix.width = Narrow(reader.ReadInt());
  Frame data;
  if (reader.NextIsInt()) {
    const int64_t index = reader.ReadInt();
    if (index < 0 || static_cast<size_t>(index) >= frames.size()) throw WireError("a frame is missing");
    data = frames[static_cast<size_t>(index)];
  } else {
    data = reader.ReadBinary();
  }
  const bool is_wide = matrix.kind == Matrix::Kind::kInt64 || matrix.kind == Matrix::Kind::kFloat64;
  if (data.size() != matrix.size() * (is_wide ? 8 : 4))
    throw WireError("an array is not as long as its shape says");
  matrix.data = data.data();
  return matrix;
}

// vLLM's LogprobsLists and LogprobsTensors both begin with ids, log probabilities and ranks.
LogprobRows ReadLogprobs(MsgpackReader& reader, std::span<const Frame> frames, StepOutputs* outputs) {
  const uint32_t num_fields = reader.ReadArray();
  if (num_fields < 3) throw WireError("log probabilities lack a field");
  const Matrix ids = ReadMatrix(reader, frames);
  const Matrix logprobs = ReadMatrix(reader, frames);
  const Matrix ranks = ReadMatrix(reader, frames);
  reader.Skip(num_fields - 3);
  if (ids.num_rows != logprobs.num_rows || ids.width != logprobs.width || ranks.size() != ids.num_rows) {
    throw WireError("log probabilities of different shapes");
  }
  LogprobRows rows;
  rows.num_rows = ids.num_rows;
  rows.width = ids.width;
  rows.first_candidate = static_cast<uint32_t>(outputs->candidate_ids.size());
  rows.first_rank = static_cast<uint32_t>(outputs->ranks.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    outputs->candidate_ids.push_back(TokenId(ids.At<int64_t>(i)));
    outputs->candidate_logprobs.push_back(logprobs.At<float>(i));
  }
  for (size_t i = 0; i < ranks.size(); ++i) outputs->ranks.push_back(Narrow(ranks.At<int64_t>(i)));
  return rows;
}

void ReadStopReason(MsgpackReader& reader, SequenceStep* row, StepOutputs* outputs) {
  if (reader.TakeNil()) return;
  if (reader.NextIsInt()) {
    row->stop_cause = StopCause::kToken;
    row->stop_token = TokenId(reader.ReadInt());
    return;
  }
  const std::string_view text = reader.ReadText();
  row->stop_cause = StopCause::kText;
  outputs->text += text;
  row->num_text_bytes = static_cast<uint32_t>(text.size());
}

EngineFinish ReadFinish(MsgpackReader& reader) {
  if (reader.TakeNil()) return EngineFinish::kNone;
  switch (reader.ReadInt()) {
    case 0:
      return EngineFinish::kStop;
    case 1:
      return EngineFinish::kLength;
    case 2:
      return EngineFinish::kAborted;
    default:
      return EngineFinish::kFailed;
  }
}

uint32_t CountPreemptions(MsgpackReader& reader) {
  uint32_t count = 0;
  for (uint32_t left = reader.ReadArray(); left > 0; --left) {
    for (uint32_t fields = reader.ReadMap(); fields > 0; --fields) {
      if (reader.ReadText() == "type") {
        count += reader.ReadInt() == kPreempted;
      } else {
        reader.Skip();
      }
    }
  }
  return count;
}

void ReadPrefill(MsgpackReader& reader, SequenceStep* row) {
  row->has_prompt = true;
  for (uint32_t fields = reader.ReadMap(); fields > 0; --fields) {
    if (reader.ReadText() == "num_cached_tokens") {
      row->num_cached_tokens = static_cast<int32_t>(Narrow(reader.ReadInt()));
    } else {
      reader.Skip();
    }
  }
}

void ReadOutput(MsgpackReader& reader, std::span<const Frame> frames, StepOutputs* outputs,
                CoreMessage* message) {
  if (reader.ReadArray() != kOutputFields) throw WireError("an output has another number of fields");
  const stream::SequenceKey key = KeyOfRequestId(reader.ReadText());
  if (key == 0) {
    reader.Skip(kOutputFields - 1);
    return;
  }
  SequenceStep& row = outputs->Add(key);
  row.num_tokens = reader.ReadArray();
  for (uint32_t i = 0; i < row.num_tokens; ++i) outputs->token_ids.push_back(TokenId(reader.ReadInt()));
  if (!reader.TakeNil()) row.logprobs = ReadLogprobs(reader, frames, outputs);
  if (!reader.TakeNil()) row.prompt_logprobs = ReadLogprobs(reader, frames, outputs);
  reader.Skip();  // a vector
  row.finish = ReadFinish(reader);
  ReadStopReason(reader, &row, outputs);
  if (!reader.TakeNil()) message->num_preemptions += CountPreemptions(reader);
  reader.Skip(3);  // parameters of transfers, trace headers
  if (!reader.TakeNil()) ReadPrefill(reader, &row);
  reader.Skip(kOutputFields - 12);
}

void ReadStats(MsgpackReader& reader, CoreMessage* message) {
  message->has_stats = true;
  for (uint32_t fields = reader.ReadMap(); fields > 0; --fields) {
    const std::string_view name = reader.ReadText();
    if (name == "num_running_reqs") {
      message->num_running = Narrow(reader.ReadInt());
    } else if (name == "num_waiting_reqs" || name == "num_skipped_waiting_reqs") {
      message->num_waiting += Narrow(reader.ReadInt());
    } else if (name == "kv_cache_usage") {
      message->kv_usage = reader.ReadNumber();
    } else {
      reader.Skip();
    }
  }
}

}  // namespace

stream::SequenceKey KeyOfRequestId(std::string_view request_id) {
  const size_t dash = request_id.rfind('-');
  if (dash == std::string_view::npos) return 0;
  const std::string_view digits = request_id.substr(dash + 1);
  if (digits.empty() || digits.size() > 16) return 0;
  stream::SequenceKey key = 0;
  for (const char digit : digits) {
    const bool is_number = digit >= '0' && digit <= '9';
    if (!is_number && !(digit >= 'a' && digit <= 'f')) return 0;
    key = key << 4 | static_cast<unsigned>(is_number ? digit - '0' : digit - 'a' + 10);
  }
  return key;
}

CoreMessage DecodeCoreOutputs(std::span<const Frame> frames, StepOutputs* outputs) {
  outputs->Clear();
  if (frames.empty()) throw WireError("a message without frames");
  CoreMessage message;
  try {
    MsgpackReader reader(frames[0]);
    if (reader.ReadArray() != kMessageFields) throw WireError("the message has another number of fields");
    reader.Skip();  // engine_index
    for (uint32_t left = reader.ReadArray(); left > 0; --left) ReadOutput(reader, frames, outputs, &message);
    if (!reader.TakeNil()) ReadStats(reader, &message);
    reader.Skip();  // timestamp
    if (!reader.TakeNil()) {
      message.has_utility = true;
      reader.Skip();
    }
    reader.Skip(kMessageFields - 5);
    if (!reader.is_done()) throw WireError("the message goes on behind its end");
  } catch (...) {
    outputs->Clear();
    throw;
  }
  return message;
}

}  // namespace twinjet::vllm
