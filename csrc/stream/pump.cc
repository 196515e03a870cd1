#include "stream/pump.h"

#include <stdexcept>
#include <utility>

namespace twinjet::stream {
namespace {

constexpr uint32_t kMaxSlots = 1u << 24;
constexpr uint32_t kMaxOutputs = 1u << 8;

SequenceKey KeyOf(uint32_t generation, uint32_t slot, uint32_t output_index) {
  return SequenceKey{generation} << 32 | SequenceKey{slot} << 8 | output_index;
}
uint32_t GenerationOf(SequenceKey key) { return static_cast<uint32_t>(key >> 32); }

void AddTo(std::vector<int64_t>* sums, int32_t index, int64_t amount) {
  if (sums->size() <= static_cast<size_t>(index)) sums->resize(static_cast<size_t>(index) + 1);
  (*sums)[static_cast<size_t>(index)] += amount;
}

}  // namespace

SequenceKey Pump::Add(std::shared_ptr<Stream> stream, const Account& account) {
  if (stream->num_outputs() > kMaxOutputs) throw std::invalid_argument("more than 256 outputs");
  if (account.tenant < 0) throw std::invalid_argument("tenant must not be negative");
  std::lock_guard lock(mutex_);
  uint32_t index;
  if (free_.empty()) {
    if (slots_.size() == kMaxSlots) throw std::length_error("too many streams");
    index = static_cast<uint32_t>(slots_.size());
    slots_.emplace_back();
  } else {
    index = free_.back();
    free_.pop_back();
  }
  Slot& slot = slots_[index];
  // Generation 0 is of no key, so that key 0 is none.
  if (++slot.generation == 0) ++slot.generation;
  slot.account = account;
  slot.num_tokens = 0;
  slot.is_leaving = false;
  slot.happenings = 0;
  slot.fresh.assign(stream->num_outputs(), 0);
  slot.stream = std::move(stream);
  return KeyOf(slot.generation, index, 0);
}

Pump::Slot* Pump::Find(SequenceKey key) {
  const uint32_t index = SlotOf(key);
  if (index >= slots_.size()) return nullptr;
  Slot& slot = slots_[index];
  return slot.stream && slot.generation == GenerationOf(key) ? &slot : nullptr;
}

bool Pump::Has(SequenceKey key) {
  std::lock_guard lock(mutex_);
  return Find(key) != nullptr;
}

int64_t Pump::Remove(SequenceKey first) {
  std::shared_ptr<Stream> last_owner;  // destroyed without the lock
  std::lock_guard lock(mutex_);
  Slot* slot = Find(first);
  if (!slot) return 0;
  int64_t num_left = 0;
  for (int64_t count : slot->fresh) num_left += count;
  slot->fresh.clear();
  slot->happenings = 0;
  last_owner = std::move(slot->stream);
  slot->stream = nullptr;
  free_.push_back(SlotOf(first));
  return num_left;
}

bool Pump::Step(const StepOutputs& outputs, double now) {
  std::unique_lock lock(mutex_);
  bool is_eventful = false;
  ++num_steps_;
  for (const SequenceStep& row : outputs.sequences) {
    Slot* slot = Find(row.key);
    if (!slot) continue;
    const uint32_t output_index = OutputOf(row.key);
    is_eventful |= Note(row.key, *slot, slot->stream->Put(outputs, row, output_index, now), now);
  }
  CarryParcels();
  Wake(&lock);
  return is_eventful;
}

void Pump::PutMade(SequenceKey first, Delta delta, double now) {
  std::unique_lock lock(mutex_);
  Slot* slot = Find(first);
  if (!slot) return;
  const uint32_t output_index = delta.output_index;
  Note(first + output_index, *slot, slot->stream->PutMade(std::move(delta), now), now);
  CarryParcels();
  Wake(&lock);
}

void Pump::PutPrompt(SequenceKey first, std::optional<uint32_t> num_cached_tokens,
                     const LogprobList* logprobs, double now) {
  std::unique_lock lock(mutex_);
  Slot* slot = Find(first);
  if (!slot) return;
  Effect effect;
  effect.has_prompt = true;
  effect.is_awaited = slot->stream->PutPrompt(num_cached_tokens, logprobs);
  Note(first, *slot, effect, now);
  CarryParcels();
  Wake(&lock);
}

// The lock is held until the parcels are carried: a report of a stream's end comes after its messages.
void Pump::CarryParcels() {
  if (parcels_.empty()) return;
  carrier_->Carry(parcels_);
  parcels_.clear();
}

bool Pump::Note(SequenceKey key, Slot& slot, Effect effect, double now) {
  if (effect.is_awaited) {
    Stream& stream = *slot.stream;
    Stream::Carried carried = stream.TakeParcels(now, carrier_.get(), &parcels_);
    if (carried == Stream::Carried::kOther) {
      CarryParcels();
      carrier_ = stream.carrier();
      carried = stream.TakeParcels(now, carrier_.get(), &parcels_);
    }
    effect.is_awaited = carried != Stream::Carried::kDone;
  }
  uint32_t happenings = 0;
  if (effect.has_prompt) happenings |= kPromptDone;
  if (effect.is_first) happenings |= kFirstToken;
  if (effect.is_over) happenings |= kOver;
  if (effect.has_failed) happenings |= kFailed;
  if (effect.has_overflowed) happenings |= kOverflowed;
  if (effect.is_awaited) happenings |= kAwaited;
  if (effect.has_ended_early) ended_early_.push_back(key);
  if (effect.num_tokens > 0) {
    slot.fresh[OutputOf(key)] += effect.num_tokens;
    slot.num_tokens += effect.num_tokens;
    if (!slot.is_leaving && slot.num_tokens >= slot.account.leaves_at) {
      slot.is_leaving = true;
      happenings |= kLeaving;
    }
  }
  slot.happenings |= happenings;
  if ((happenings || effect.num_tokens) && !slot.is_dirty) {
    slot.is_dirty = true;
    dirty_.push_back(SlotOf(key));
  }
  return happenings || effect.has_ended_early;
}

void Pump::Wake(std::unique_lock<std::mutex>* lock) {
  if (is_told_ || !notify_ || (dirty_.empty() && ended_early_.empty())) return;
  is_told_ = true;
  lock->unlock();
  notify_();
}

const Report& Pump::Collect(sched::KvLedger* ledger) {
  std::lock_guard lock(mutex_);
  is_told_ = false;
  report_.num_steps = std::exchange(num_steps_, 0);
  report_.num_tokens = 0;
  report_.tenant_tokens.clear();
  report_.requests.clear();
  for (uint32_t index : dirty_) {
    Slot& slot = slots_[index];
    slot.is_dirty = false;
    if (!slot.stream) continue;
    for (size_t i = 0; i < slot.fresh.size(); ++i) {
      const int64_t count = std::exchange(slot.fresh[i], 0);
      if (count == 0) continue;
      report_.num_tokens += count;
      AddTo(&report_.tenant_tokens, slot.account.tenant, count);
      if (ledger && slot.account.has_holding) {
        ledger->Append(slot.account.holding, static_cast<int64_t>(i), count);
      }
    }
    if (slot.happenings) report_.requests.push_back({index, std::exchange(slot.happenings, 0)});
  }
  dirty_.clear();
  report_.ended_early.clear();
  for (SequenceKey key : ended_early_) {
    if (Find(key)) report_.ended_early.push_back(key);
  }
  ended_early_.clear();
  return report_;
}

}  // namespace twinjet::stream
