// StepRouter: from a message of vLLM's engine core into the pumps of the requests that it concerns.
//
//   router.Open(key, {&pump, pump_key, ...});   // the engine is given a request id that carries `key`
//   router.Take(frames, now);                   // for each message
//   while (router.has_rest()) router.TakeRest(now);
//
// Keys are the caller's and are never used twice. A sequence is forgotten when the engine has ended it, or by
// Close(). The pumps must outlive their sequences here. Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "stream/pump.h"
#include "vllm/core_outputs.h"

namespace twinjet::vllm {

struct Route {
  stream::Pump* pump = nullptr;
  stream::SequenceKey pump_key = 0;
  // Most candidates a token and a prompt token are to have: those asked for and the token itself. The engine
  // gives as many as any request of the batch asked for.
  uint32_t width = 1;
  uint32_t prompt_width = 1;
  // The key of the request's output 0, which is opened first; 0: this is it. That output tells of the prompt;
  // what comes of others before waits for it.
  stream::SequenceKey first = 0;
};

// A sequence whose end is an error; what its last row had is not put into its pump.
struct IrregularEnd {
  stream::SequenceKey key = 0;
  stream::EngineFinish finish = stream::EngineFinish::kNone;  // kStop: no token was admissible
  uint32_t num_tokens = 0;                                    // in the last row
};

class StepRouter {
 public:
  void Open(stream::SequenceKey key, const Route& route);
  // Whether it was still open.
  bool Close(stream::SequenceKey key) { return sequences_.erase(key) > 0; }

  // Decodes a message and puts its first kRowsAtOnce rows into their pumps; TakeRest() the next so many, for
  // whoever has more to do than to wait for a large step. There must be no rest. Throws WireError, and then
  // has put nothing.
  void Take(std::span<const Frame> frames, double now);
  void TakeRest(double now);
  bool has_rest() const { return next_row_ < step_.sequences.size(); }
  static constexpr size_t kRowsAtOnce = 256;

  // Of the last message.
  const CoreMessage& message() const { return message_; }
  // Of the rows put last.
  const std::vector<IrregularEnd>& irregular() const { return irregular_; }
  // Sequences that it ended, the irregular ones too.
  const std::vector<stream::SequenceKey>& ended() const { return ended_; }
  // Pumps that got rows.
  const std::vector<stream::Pump*>& stepped() const { return stepped_; }

  // Whether the rows put last brought what their pumps should soon tell of; see Pump::Step.
  bool is_eventful() const { return is_eventful_; }

  size_t num_open() const { return sequences_.size(); }

 private:
  // What the outputs of a request share.
  struct Prompt {
    bool is_told = false;
    stream::StepOutputs logprobs;  // parts of a long prompt's
    stream::StepOutputs waiting;   // rows of other outputs
  };
  struct Sequence {
    Route route;
    std::shared_ptr<Prompt> prompt;
  };
  struct Group {
    stream::Pump* pump = nullptr;
    stream::StepOutputs outputs;
  };

  void Put(const stream::SequenceStep& row, Sequence* sequence);
  stream::StepOutputs& OutputsOf(stream::Pump* pump);

  std::unordered_map<stream::SequenceKey, Sequence> sequences_;
  stream::StepOutputs step_;
  CoreMessage message_;
  size_t next_row_ = 0;        // of step_
  std::vector<Group> groups_;  // kept for their memory; the first num_groups_ count
  size_t num_groups_ = 0;
  std::vector<IrregularEnd> irregular_;
  std::vector<stream::SequenceKey> ended_;
  std::vector<stream::Pump*> stepped_;
  bool is_eventful_ = false;
};

}  // namespace twinjet::vllm
