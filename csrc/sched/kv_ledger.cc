#include "sched/kv_ledger.h"

#include <algorithm>
#include <cmath>

namespace twinjet::sched {
namespace {

constexpr int kSlotBits = 24;

// After so many admissions in a row with room for the worst case, predictions are no longer kept up.
constexpr int64_t kRoomyAdmissions = 1000;

// After so many tokens a sequence's part in the prediction is made anew.
constexpr int64_t kRefreshTokens = 32;

}  // namespace

std::vector<double> Horizon(int64_t longest) {
  double octaves = std::max(1.0, std::log2(static_cast<double>(std::max<int64_t>(longest, 32))) - 4.0 + 1.0);
  int num_steps = 2 * static_cast<int>(std::ceil(octaves)) + 1;
  std::vector<double> times = {0.0};
  for (int k = 0; k < num_steps; ++k) times.push_back(std::floor(16.0 * std::exp2(k / 2.0)));
  return times;
}

KvLedger::KvLedger(const LedgerOptions& options)
    : options_(options),
      manager_(options.blocks),
      block_size_(options.blocks.block_size),
      num_slots_(int64_t{options.blocks.num_blocks} * options.blocks.block_size),
      times_(Horizon(options.num_longest)) {
  for (size_t k = 0; k < times_.size(); ++k) {
    double end = k + 1 < times_.size() ? times_[k + 1] : 2 * times_.back();
    end_blocks_.push_back(end / static_cast<double>(block_size_));
  }
  for (Forecast* forecast : {&sum_, &asked_}) {
    forecast->blocks.resize(times_.size());
    forecast->spread.resize(times_.size());
  }
}

bool KvLedger::CanEverHold(int64_t num_prompt_tokens, int64_t num_outputs) const {
  int64_t num_shared = shares() ? num_prompt_tokens / block_size_ : 0;
  int64_t num_each = BlocksFor(num_prompt_tokens + 1) - num_shared;
  return num_shared + num_each * num_outputs <= num_blocks();
}

int64_t KvLedger::FindCached(std::span<const kv::BlockHash> hashes, int64_t num_prompt_tokens) {
  return static_cast<int64_t>(Match(hashes, num_prompt_tokens).size()) * block_size_;
}

bool KvLedger::Admit(const Ask& ask, HoldingId* id) {
  int64_t prompt_blocks = BlocksFor(ask.num_prompt_tokens);
  int64_t full_blocks = shares() ? ask.num_prompt_tokens / block_size_ : 0;
  int64_t max_blocks = BlocksFor(ask.num_prompt_tokens + ask.max_tokens + options_.num_lookahead_tokens);
  int64_t num_reserve = ask.num_outputs * (max_blocks - prompt_blocks);
  int64_t num_new = ask.num_outputs * (prompt_blocks - full_blocks) + full_blocks;
  bool is_alone = num_sequences_ == 0;
  if (num_used_blocks() + num_new + num_reserved_ + num_reserve > options_.num_usable_blocks) {
    // What running requests share costs nothing more; looked up only where it may matter.
    num_new -= NumReferenced(ask);
  }
  if (num_used_blocks() + num_new > (is_alone ? num_blocks() : options_.num_usable_blocks)) return false;
  if (!is_alone && !StaysWithin(ask, num_new, num_reserve)) return false;

  size_t slot = TakeSlot();
  Holding& holding = holdings_[slot];
  if (!Open(ask, holding)) {
    free_.push_back(slot);
    return false;
  }
  int64_t num_own = 0;
  for (const Output& output : holding.in_use()) num_own += output.num_own;
  if (num_own > num_new && !is_alone) {
    // The cache shares less than it seemed: what was asked of the prediction does not hold.
    FreeOutputs(holding, ask.num_outputs);
    free_.push_back(slot);
    return false;
  }
  holding.is_live = true;
  holding.max_blocks = max_blocks;
  num_own_ += num_own;
  num_reserved_ += num_reserve;
  num_sequences_ += ask.num_outputs;
  if (is_predicting_) {
    for (Output& output : holding.in_use()) Include(holding, output);
  }
  *id = holding.generation << kSlotBits | static_cast<int64_t>(slot);
  return true;
}

std::optional<int64_t> KvLedger::NumCachedTokens(HoldingId id) const {
  const Holding* holding = const_cast<KvLedger*>(this)->Find(id);
  return holding ? std::optional(holding->num_cached_tokens) : std::nullopt;
}

bool KvLedger::Append(HoldingId id, int64_t output_index, int64_t num_tokens) {
  Holding* holding = Find(id);
  if (!holding || output_index < 0 || output_index >= holding->num_outputs) return false;
  Output& output = holding->outputs[static_cast<size_t>(output_index)];
  output.num_tokens += num_tokens;
  int64_t num_needed = holding->num_prompt_tokens + output.num_tokens;
  if (num_needed <= output.num_slots) return true;
  int64_t num_new = 0;
  if (output.num_lost > 0 || num_needed > num_slots_ ||
      manager_.Reserve(output.sequence, num_needed, {}, {}, &num_new) != kv::Status::kOk) {
    Lose(output, num_tokens);
    return true;
  }
  output.num_slots += num_new * block_size_;
  output.num_own += num_new;
  num_own_ += num_new;
  num_reserved_ -= num_new;
  if (is_predicting_ && output.num_tokens - output.num_forecast_tokens >= kRefreshTokens) {
    Exclude(output);
    Include(*holding, output);
  }
  return true;
}

bool KvLedger::Publish(HoldingId id) {
  Holding* holding = Find(id);
  if (!holding) return false;
  if (holding->hashes.empty()) return true;
  int64_t num_new = 0;
  manager_.PublishHashes(
      *manager_.FindSequence(holding->outputs[0].sequence), holding->num_prompt_tokens,
      static_cast<int64_t>(holding->hashes.size()),
      [&](int64_t i) { return holding->hashes[static_cast<size_t>(i)]; }, &num_new);
  return true;
}

bool KvLedger::Release(HoldingId id) {
  Holding* holding = Find(id);
  if (!holding) return false;
  for (Output& output : holding->in_use()) {
    num_reserved_ -= holding->max_blocks - output.num_slots / block_size_;
    num_own_ -= output.num_own;
    num_lost_ -= output.num_lost;
    if (output.has_forecast) Exclude(output);
  }
  num_sequences_ -= holding->num_outputs;
  FreeOutputs(*holding, holding->num_outputs);
  holding->is_live = false;
  holding->lengths.reset();
  ++holding->generation;
  free_.push_back(static_cast<size_t>(id & ((int64_t{1} << kSlotBits) - 1)));
  if (num_sequences_ == 0 && is_predicting_) StopPredicting();
  return true;
}

std::string KvLedger::Check() const {
  std::string wrong = manager_.Check();
  if (!wrong.empty()) return wrong;
  int64_t num_own = 0, num_reserved = 0, num_lost = 0, num_sequences = 0;
  Forecast sum{std::vector<double>(times_.size()), std::vector<double>(times_.size())};
  for (const Holding& holding : holdings_) {
    if (!holding.is_live) continue;
    for (const Output& output : holding.in_use()) {
      num_own += output.num_own;
      num_reserved += holding.max_blocks - output.num_slots / block_size_;
      num_lost += output.num_lost;
      ++num_sequences;
      if (output.has_forecast != is_predicting_) return "a forecast is missing or left over";
      for (size_t k = 0; output.has_forecast && k < times_.size(); ++k) {
        sum.blocks[k] += output.forecast.blocks[k];
        sum.spread[k] += output.forecast.spread[k];
      }
    }
  }
  if (num_own != num_own_) return "own blocks do not add up";
  if (num_reserved != num_reserved_) return "reserved blocks do not add up";
  if (num_lost != num_lost_) return "lost tokens do not add up";
  if (num_sequences != num_sequences_) return "sequences do not add up";
  if (num_sequences != manager_.num_sequences()) return "the block manager holds other sequences";
  for (size_t k = 0; k < times_.size(); ++k) {
    double slack = 1e-6 * (1.0 + std::abs(sum.blocks[k]) + std::abs(sum.spread[k]));
    if (std::abs(sum.blocks[k] - sum_.blocks[k]) > slack) return "expected blocks do not add up";
    if (std::abs(sum.spread[k] - sum_.spread[k]) > slack) return "variances do not add up";
  }
  return "";
}

KvLedger::Holding* KvLedger::Find(HoldingId id) {
  auto slot = static_cast<size_t>(id & ((int64_t{1} << kSlotBits) - 1));
  if (id < 0 || slot >= holdings_.size()) return nullptr;
  Holding& holding = holdings_[slot];
  return holding.is_live && holding.generation == id >> kSlotBits ? &holding : nullptr;
}

size_t KvLedger::TakeSlot() {
  if (free_.empty()) {
    // Room for the slot in both lists first, so that giving it back cannot fail.
    free_.reserve(holdings_.size() + 1);
    holdings_.emplace_back();
    return holdings_.size() - 1;
  }
  size_t slot = free_.back();
  free_.pop_back();
  return slot;
}

std::span<const kv::BlockId> KvLedger::Match(std::span<const kv::BlockHash> hashes,
                                             int64_t num_prompt_tokens) {
  int64_t limit = num_prompt_tokens > 0 ? (num_prompt_tokens - 1) / block_size_ : 0;
  auto count = std::min(static_cast<size_t>(limit), hashes.size());
  if (matched_.size() < count) matched_.resize(count);
  return std::span(matched_).first(static_cast<size_t>(manager_.Match(hashes.first(count), matched_.data())));
}

// Leading prompt blocks that a running sequence holds, which cost nothing more. Whoever holds a block
// of a chain holds those before it.
int64_t KvLedger::NumReferenced(const Ask& ask) {
  std::span<const kv::BlockId> blocks = Match(ask.hashes, ask.num_prompt_tokens);
  return std::ranges::partition_point(
             blocks, [&](kv::BlockId block) { return manager_.pool().ref_count(block) > 0; }) -
         blocks.begin();
}

bool KvLedger::StaysWithin(const Ask& ask, int64_t num_new, int64_t num_reserve) {
  int64_t num_used = num_used_blocks() + num_new;
  if (num_used + num_reserved_ + num_reserve <= options_.num_usable_blocks) {
    // Room for the worst case. Predictions cost more than they tell while that goes on.
    ++num_roomy_;
    if (is_predicting_ && num_roomy_ >= kRoomyAdmissions) StopPredicting();
    return true;
  }
  if (!options_.sigmas) return false;
  num_roomy_ = 0;
  if (!is_predicting_) StartPredicting();
  auto n = static_cast<double>(ask.num_outputs);
  Predict(*ask.lengths, 0, ask.max_tokens, static_cast<double>(num_new) / n, ask.is_fixed, &asked_);
  double most = 0.0;
  for (size_t k = 0; k < times_.size(); ++k) {
    double variance = std::max(sum_.spread[k] + n * asked_.spread[k], 0.0);
    most = std::max(most, sum_.blocks[k] + n * asked_.blocks[k] + *options_.sigmas * std::sqrt(variance));
  }
  return most <= static_cast<double>(options_.num_usable_blocks - (num_used - num_new - num_own_));
}

bool KvLedger::Open(const Ask& ask, Holding& holding) {
  holding.num_prompt_tokens = ask.num_prompt_tokens;
  holding.num_outputs = ask.num_outputs;
  holding.max_tokens = ask.max_tokens;
  holding.is_fixed = ask.is_fixed;
  holding.lengths = ask.lengths;
  holding.hashes.assign(ask.hashes.begin(), ask.hashes.end());
  if (holding.outputs.size() < static_cast<size_t>(ask.num_outputs)) {
    holding.outputs.resize(static_cast<size_t>(ask.num_outputs));
  }
  for (int64_t i = 0; i < ask.num_outputs; ++i) {
    Output& output = holding.outputs[static_cast<size_t>(i)];
    int32_t num_used = manager_.num_used_blocks();
    kv::Status status;
    if (i > 0 && shares()) {
      kv::BlockCopy copy;
      status = manager_.Fork(holding.outputs[0].sequence, &output.sequence, &copy);
    } else if ((status = manager_.Open(&output.sequence)) == kv::Status::kOk) {
      std::span<const kv::BlockId> matched = Match(ask.hashes, ask.num_prompt_tokens);
      int64_t num_new = 0;
      status = manager_.Reserve(output.sequence, ask.num_prompt_tokens, matched, {}, &num_new);
      holding.num_cached_tokens = static_cast<int64_t>(matched.size()) * block_size_;
      if (status != kv::Status::kOk) manager_.Free(output.sequence);
    }
    if (status != kv::Status::kOk) {
      FreeOutputs(holding, i);
      return false;
    }
    output.num_own = manager_.num_used_blocks() - num_used;
    output.num_slots = BlocksFor(ask.num_prompt_tokens) * block_size_;
    output.num_tokens = output.num_lost = output.num_forecast_tokens = 0;
    output.has_forecast = false;
  }
  return true;
}

void KvLedger::FreeOutputs(Holding& holding, int64_t count) {
  for (Output& output : holding.in_use().first(static_cast<size_t>(count))) manager_.Free(output.sequence);
}

// Mean and variance of the blocks that a sequence holds for itself, at each step ahead.
void KvLedger::Predict(LengthEstimator& lengths, int64_t num_tokens, int64_t max_tokens, double num_own,
                       bool is_fixed, Forecast* forecast) const {
  auto size = static_cast<double>(block_size_);
  auto left = static_cast<double>(max_tokens - num_tokens);
  // A sequence begins its next block half a block from now, on average.
  double base = num_own + static_cast<double>(options_.num_lookahead_tokens) / size + 0.5;
  std::span<const double> survival;
  if (!is_fixed) survival = lengths.SurvivalNear(num_tokens, times_);
  for (size_t k = 0; k < times_.size(); ++k) {
    double alive = times_[k] < left ? (is_fixed ? 1.0 : survival[k]) : 0.0;
    double held = std::min(end_blocks_[k], left / size) + base;
    forecast->blocks[k] = alive * held;
    forecast->spread[k] = forecast->blocks[k] * (held - forecast->blocks[k]);
  }
}

void KvLedger::Include(Holding& holding, Output& output) {
  output.forecast.blocks.resize(times_.size());
  output.forecast.spread.resize(times_.size());
  Predict(*holding.lengths, output.num_tokens, holding.max_tokens, static_cast<double>(output.num_own),
          holding.is_fixed, &output.forecast);
  for (size_t k = 0; k < times_.size(); ++k) {
    sum_.blocks[k] += output.forecast.blocks[k];
    sum_.spread[k] += output.forecast.spread[k];
  }
  output.has_forecast = true;
  output.num_forecast_tokens = output.num_tokens;
}

void KvLedger::Exclude(Output& output) {
  for (size_t k = 0; k < times_.size(); ++k) {
    sum_.blocks[k] -= output.forecast.blocks[k];
    sum_.spread[k] -= output.forecast.spread[k];
  }
  output.has_forecast = false;
}

void KvLedger::StartPredicting() {
  is_predicting_ = true;
  for (Holding& holding : holdings_) {
    if (!holding.is_live) continue;
    for (Output& output : holding.in_use()) Include(holding, output);
  }
}

void KvLedger::StopPredicting() {
  is_predicting_ = false;
  for (Holding& holding : holdings_) {
    for (Output& output : holding.outputs) output.has_forecast = false;
  }
  // Sums of floats drift, so they start again from zero.
  std::ranges::fill(sum_.blocks, 0.0);
  std::ranges::fill(sum_.spread, 0.0);
}

void KvLedger::Lose(Output& output, int64_t num_tokens) {
  output.num_lost += num_tokens;
  num_lost_ += num_tokens;
  num_overflows_ += num_tokens;
}

}  // namespace twinjet::sched
