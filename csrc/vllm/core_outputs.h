// DecodeCoreOutputs: one message of vLLM's engine core, an EngineCoreOutputs in msgpack with its tensors in
// frames behind it, into flat arrays.
//
// A request that is to be found again carries its key in its id: "anything-<hex>". What a message holds
// besides tokens and statistics (answers to utility calls, vectors) is only told of, and is for whoever
// decodes it in Python. Every length is checked against the frame: a broken message throws and gives nothing.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string_view>

#include "stream/step_outputs.h"

namespace twinjet::vllm {

// The message is not what this vLLM version sends.
class WireError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct CoreMessage {
  bool has_stats = false;  // the next four are known
  uint32_t num_running = 0;
  uint32_t num_waiting = 0;  // those that are put back for a while included
  double kv_usage = 0;       // share of the KV blocks in use
  uint32_t num_preemptions = 0;
  bool has_utility = false;  // the message answers a utility call
};

using Frame = std::span<const uint8_t>;

// frames: the message and its tensors' data. Clears `outputs` first; outputs whose id carries no key are left
// out. Throws WireError.
CoreMessage DecodeCoreOutputs(std::span<const Frame> frames, stream::StepOutputs* outputs);

// The key that a request id carries, 0 if none.
stream::SequenceKey KeyOfRequestId(std::string_view request_id);

}  // namespace twinjet::vllm
