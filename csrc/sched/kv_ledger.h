// KvLedger: which blocks an engine's running requests hold, as far as can be known from outside, and
// whether another request's use stays within the cache.
//
//   KvLedger ledger(options);
//   if (HoldingId holding; ledger.Admit(ask, &holding)) {
//     ledger.Publish(holding);               // the engine has computed the prompt
//     ledger.Append(holding, 0, num_tokens); // tokens streamed
//     ledger.Release(holding);
//   }
//
// It mirrors the engine block for block: a shared prefix counts once, streamed tokens append. Only
// prompts are known to its prefix cache; outputs are counted without their ids. It never takes a block
// from anyone. Not thread-safe. What it cannot see: how far ahead of the stream the engine is
// (num_lookahead_tokens), and the engine's own eviction order, which decides what a prompt costs to
// compute, not how many blocks it takes.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kv/block_manager.h"
#include "sched/length_estimator.h"

namespace twinjet::sched {

// Names what one running request holds, for the life of the ledger: that of a released one is never
// found again.
using HoldingId = int64_t;

struct LedgerOptions {
  kv::ManagerOptions blocks;
  int32_t num_usable_blocks = 0;  // what admission may fill
  int64_t num_lookahead_tokens = 0;
  // Unset reserves max_tokens for every output, so that use never exceeds the cache. Otherwise the
  // expected use at each step ahead and so many standard deviations must stay within it.
  std::optional<double> sigmas;
  int64_t num_longest = 0;  // tokens of the longest context
};

// What a request would take. num_outputs >= 1, num_prompt_tokens and max_tokens >= 0, each below 2^40.
struct Ask {
  int64_t num_prompt_tokens = 0;
  int64_t num_outputs = 1;
  int64_t max_tokens = 0;
  bool is_fixed = false;                  // it will take max_tokens, whatever others took
  std::span<const kv::BlockHash> hashes;  // of the prompt's full blocks; none without a prefix cache
  std::shared_ptr<LengthEstimator> lengths;
};

// Steps ahead at which use is predicted: 0, 16, then two to the octave past `longest`.
std::vector<double> Horizon(int64_t longest);

class KvLedger {
 public:
  explicit KvLedger(const LedgerOptions& options);
  KvLedger(const KvLedger&) = delete;
  KvLedger& operator=(const KvLedger&) = delete;

  const kv::BlockHasher& hasher() const { return manager_.hasher(); }
  bool shares() const { return manager_.prefix_cache_enabled(); }
  int32_t num_blocks() const { return manager_.num_blocks(); }
  // Blocks held now, those for which there was no room included; so it may exceed num_blocks().
  int64_t num_used_blocks() const {
    return manager_.num_used_blocks() + (num_lost_ + block_size_ - 1) / block_size_;
  }
  // Tokens so far for which there was no room.
  int64_t num_overflows() const { return num_overflows_; }
  bool is_predicting() const { return is_predicting_; }

  // Whether the prompt and one token of each output fit an empty cache.
  bool CanEverHold(int64_t num_prompt_tokens, int64_t num_outputs) const;
  // Prompt tokens that are in the cache now; at least one is always left to compute.
  int64_t FindCached(std::span<const kv::BlockHash> hashes, int64_t num_prompt_tokens);

  // Whether a block of this content is in the cache.
  bool Caches(const kv::BlockHash& hash) const { return manager_.Find(hash) != kv::kNoBlock; }

  // Holds the prompt's blocks if the use to come stays within the cache; else false, nothing changed.
  // A request that is alone is held if its prompt fits, for it could never run otherwise.
  bool Admit(const Ask& ask, HoldingId* holding);
  // Prompt tokens found in the cache at admission; nothing for an unknown holding.
  std::optional<int64_t> NumCachedTokens(HoldingId holding) const;
  // The next calls are false, and nothing is changed, for an unknown holding or output.
  bool Append(HoldingId holding, int64_t output_index, int64_t num_tokens);
  // Others may share the prompt from now on.
  bool Publish(HoldingId holding);
  // Gives back everything; blocks of the prompt stay in the cache until their room is needed.
  bool Release(HoldingId holding);
  // Forgets cached prefixes; false while anything is held.
  bool Reset() { return manager_.Reset(); }

  // The first invariant that does not hold, or "". O(blocks).
  std::string Check() const;

 private:
  // A sequence's part in the prediction, by step ahead: mean and variance of its blocks.
  struct Forecast {
    std::vector<double> blocks;
    std::vector<double> spread;
  };
  struct Output {
    kv::SequenceId sequence = 0;
    int64_t num_own = 0;  // blocks it alone took
    int64_t num_slots = 0;
    int64_t num_tokens = 0;
    int64_t num_lost = 0;
    int64_t num_forecast_tokens = 0;  // num_tokens when its part was made
    bool has_forecast = false;
    Forecast forecast;
  };
  struct Holding {
    bool is_live = false;
    int64_t generation = 0;
    int64_t num_prompt_tokens = 0;
    int64_t num_outputs = 0;
    int64_t max_tokens = 0;
    int64_t max_blocks = 0;
    int64_t num_cached_tokens = 0;
    bool is_fixed = false;
    std::shared_ptr<LengthEstimator> lengths;
    std::vector<kv::BlockHash> hashes;
    std::vector<Output> outputs;  // the first num_outputs are in use

    std::span<Output> in_use() { return {outputs.data(), static_cast<size_t>(num_outputs)}; }
    std::span<const Output> in_use() const { return {outputs.data(), static_cast<size_t>(num_outputs)}; }
  };

  int64_t BlocksFor(int64_t num_tokens) const { return (num_tokens + block_size_ - 1) / block_size_; }
  Holding* Find(HoldingId id);
  size_t TakeSlot();
  std::span<const kv::BlockId> Match(std::span<const kv::BlockHash> hashes, int64_t num_prompt_tokens);
  int64_t NumReferenced(const Ask& ask);
  bool StaysWithin(const Ask& ask, int64_t num_new, int64_t num_reserve);
  // Makes the sequences of a holding: all of them, or none.
  bool Open(const Ask& ask, Holding& holding);
  void FreeOutputs(Holding& holding, int64_t count);
  void Predict(LengthEstimator& lengths, int64_t num_tokens, int64_t max_tokens, double num_own,
               bool is_fixed, Forecast* forecast) const;
  void Include(Holding& holding, Output& output);
  void Exclude(Output& output);
  void StartPredicting();
  void StopPredicting();
  void Lose(Output& output, int64_t num_tokens);

  LedgerOptions options_;
  kv::BlockManager manager_;
  int64_t block_size_;
  int64_t num_slots_;
  std::vector<double> times_;
  std::vector<double> end_blocks_;  // blocks that the tokens up to the next of times_ take
  Forecast sum_;
  Forecast asked_;
  int64_t num_own_ = 0;
  int64_t num_reserved_ = 0;
  int64_t num_lost_ = 0;
  int64_t num_sequences_ = 0;
  int64_t num_overflows_ = 0;
  bool is_predicting_ = false;
  int64_t num_roomy_ = 0;
  std::vector<Holding> holdings_;
  std::vector<size_t> free_;
  std::vector<kv::BlockId> matched_;
};

}  // namespace twinjet::sched
