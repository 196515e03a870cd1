// Stream: one request on its way to its client. Tokens go in, ready messages come out; what is not taken yet
// is merged: a stream holds one unsent delta for each output, and another where that one has grown large.
//
// One side puts (an engine's step, perhaps in a thread of its own), the other takes (whoever writes to the
// client). Both may run at once; each method locks. A message that follows another in one Take() follows it
// on the wire.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "stream/carrier.h"
#include "stream/output.h"
#include "stream/responses.h"
#include "stream/step_outputs.h"

namespace twinjet::stream {

// A delta grows no further once it has so many bytes, so that its message stays far below the 4 MiB that
// gRPC's clients take by default. Log probabilities of the prompt come in messages of that size too.
inline constexpr size_t kLargeMessageBytes = size_t{1} << 20;

// What is not sent yet of one output.
struct Delta {
  uint32_t output_index = 0;
  std::string text;
  std::vector<int32_t> token_ids;
  LogprobList logprobs;
  std::optional<Ending> ending;
};

// What an engine told of the prompt.
struct PromptNews {
  std::optional<uint32_t> num_cached_tokens;
  std::optional<LogprobList> logprobs;
};

// What a step did to a stream, for those who keep accounts.
struct Effect {
  uint32_t num_tokens = 0;
  bool has_prompt = false;       // the engine has just told of the prompt
  bool is_first = false;         // the first tokens of the request
  bool has_ended_early = false;  // the output has ended, and its engine does not know
  bool is_over = false;          // this ended the last output
  bool has_failed = false;       // the engine ended the output irregularly
  bool has_overflowed = false;   // more than max_pending_bytes wait: nothing more is kept
  bool is_awaited = false;       // a Take() came back empty and there is something now
};

class Stream {
 public:
  // arrived_at: seconds of the clock that all times here are of. max_pending_bytes: of unsent tokens.
  Stream(std::shared_ptr<const Vocabulary> vocabulary, std::shared_ptr<const OutputRules> rules,
         uint32_t num_outputs, StreamFacts facts, double arrived_at, int64_t max_pending_bytes);
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // For one that is read by TakePrompt() and TakeDeltas(), not by Take(). Call before the first put.
  void ReadDeltas() { reads_deltas_ = true; }

  // Puts. Each returns whether an empty Take() had been waiting for it.
  bool PutQueued(uint32_t position, std::optional<double> expected_wait_s);
  void SetDispatched(uint32_t queue_position, double at);
  bool PutPrompt(std::optional<uint32_t> num_cached_tokens, const LogprobList* logprobs);
  // One row of a step. Nothing after the output's end.
  Effect Put(const StepOutputs& step, const SequenceStep& row, uint32_t output_index, double now);
  // The same for an engine that makes text and ends itself. ending.text is copied.
  Effect PutMade(Delta delta, double now);

  // Ends the request with a handoff instead of outputs; nothing after it. Whether a Take() had been waiting.
  bool PutHandoff(std::string_view state, double now);

  // Hands over to a carrier: whenever a Take() has come back empty, what a pump's step puts is carried to
  // `call` instead of awaited. Who takes still learns of the end, and takes what the carrier had no room for.
  void Attach(std::shared_ptr<Carrier> carrier, std::shared_ptr<void> call);
  // For the pump, after an Effect with is_awaited: appends what `carrier` is to carry, if it is this
  // stream's. kNobody: nobody carries, so whoever waits must be woken. kOther: another carrier does.
  enum class Carried : uint8_t { kNobody, kOther, kDone };
  Carried TakeParcels(double now, const Carrier* carrier, std::vector<Carrier::Parcel>* parcels);
  std::shared_ptr<Carrier> carrier() const;
  // Since when the carrier has had no room for what waits; unset if nothing does.
  std::optional<double> blocked_since() const;

  // Takes.
  // Appends the messages that are ready; false, and the next put is told to be awaited, if there are none.
  bool Take(std::vector<std::string>* messages);
  // The same, not encoded. What the engine told of the prompt is given once.
  std::optional<PromptNews> TakePrompt();
  void TakeDeltas(std::vector<Delta>* deltas);
  // Forgets what is not taken, and keeps nothing any more.
  void Drop();
  // The last message, once nothing is left to take.
  std::string Summary() const;

  uint32_t num_outputs() const { return static_cast<uint32_t>(outputs_.size()); }
  const Vocabulary& vocabulary() const { return *vocabulary_; }
  uint32_t num_prompt_tokens() const { return facts_.num_prompt_tokens; }
  int64_t num_output_tokens() const;
  int64_t max_pending_bytes() const { return max_pending_bytes_; }
  int64_t num_pending_bytes() const;
  std::optional<double> first_token_at() const;
  double last_token_at() const;
  // TTFT and TPOT in seconds; unset before the first, the second token.
  std::optional<double> first_token_s() const;
  std::optional<double> per_token_s() const;
  bool is_over() const;
  // Whether the engine has told of the prompt: something of the answer may have left from then on.
  bool has_begun() const;

 private:
  struct Item {
    enum class Kind : uint8_t { kMessage, kQueued, kDelta } kind;
    std::string message;
    uint32_t output_index = 0;
    std::unique_ptr<Delta> full = nullptr;  // of kDelta: the delta, if it was too large to go on in pending_
  };

  template <typename Add>
  void EncodeItems(Add add);
  bool Awaken();
  void PutPromptLocked(std::optional<uint32_t> num_cached_tokens, const LogprobList* logprobs);
  Delta& PendingOf(uint32_t output_index);
  template <typename Add>
  void AddDelta(const Delta& delta, Add add) const;
  void NoteTokens(double now, Effect* effect);
  void Account(const Delta& pending, size_t num_bytes_before, Effect* effect);
  std::optional<double> PerTokenLocked() const;
  int64_t NumTokensLocked() const;

  mutable std::mutex mutex_;
  const std::shared_ptr<const Vocabulary> vocabulary_;
  const std::shared_ptr<const OutputRules> rules_;
  const StreamFacts facts_;
  const double arrived_at_;
  const int64_t max_pending_bytes_;
  std::vector<Output> outputs_;
  std::vector<int64_t> num_tokens_;
  std::vector<bool> has_ended_;
  std::vector<std::string> stop_texts_;  // of PutMade
  std::vector<Delta> pending_;
  std::vector<bool> is_pending_;
  std::deque<Item> items_;
  uint32_t num_open_;
  int64_t num_pending_bytes_ = 0;
  std::shared_ptr<Carrier> carrier_;
  std::shared_ptr<void> call_;
  std::optional<double> blocked_since_;
  bool is_prompt_told_ = false;
  bool reads_deltas_ = false;
  std::optional<PromptNews> prompt_news_;  // with reads_deltas_
  bool is_awaited_ = false;
  bool is_dropped_ = false;
  double dispatched_at_;
  uint32_t queue_position_ = 0;
  std::optional<uint32_t> num_cached_tokens_;
  std::optional<double> first_token_at_;
  double last_token_at_;
};

}  // namespace twinjet::stream
