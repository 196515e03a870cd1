#include "kv/event_log.h"

#include <algorithm>

namespace twinjet::kv {

EventLog::EventLog(int32_t capacity, int32_t block_size)
    : capacity_(static_cast<size_t>(capacity)),
      block_size_(static_cast<size_t>(block_size)),
      events_(capacity_),
      tokens_(capacity_ * block_size_) {}

size_t EventLog::Add(const Event& event) {
  if (size_ == capacity_) {
    first_ = (first_ + 1) % capacity_;
    --size_;
    ++num_dropped_;
  }
  size_t index = (first_ + size_++) % capacity_;
  events_[index] = event;
  events_[index].sequence_number = next_number_++;
  return index;
}

void EventLog::Stored(BlockId block, const BlockHash& hash, const BlockHash* parent,
                      std::span<const int32_t> tokens) {
  if (!enabled()) return;
  size_t index = Add({.kind = Event::Kind::kStored,
                      .has_parent = parent != nullptr,
                      .block = block,
                      .num_tokens = static_cast<int32_t>(tokens.size()),
                      .hash = hash,
                      .parent = parent ? *parent : BlockHash{}});
  std::copy(tokens.begin(), tokens.end(), tokens_.begin() + static_cast<ptrdiff_t>(index * block_size_));
}

void EventLog::Removed(BlockId block, const BlockHash& hash) {
  if (enabled()) Add({.kind = Event::Kind::kRemoved, .block = block, .hash = hash, .parent = {}});
}

void EventLog::Cleared() {
  if (enabled()) Add({.kind = Event::Kind::kCleared, .hash = {}, .parent = {}});
}

std::span<const int32_t> EventLog::tokens(size_t i) const {
  size_t index = (first_ + i) % capacity_;
  return {tokens_.data() + index * block_size_, static_cast<size_t>(events_[index].num_tokens)};
}

}  // namespace twinjet::kv
