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
                      std::span<const int32_t> tokens, uint32_t tag) {
  if (!enabled()) return;
  size_t index = Add({.kind = Event::Kind::kStored,
                      .has_parent = parent != nullptr,
                      .block = block,
                      .num_tokens = static_cast<int32_t>(tokens.size()),
                      .tag = tag,
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

void EventLog::Encode(size_t max_events, std::string* bytes) {
  static_assert(sizeof(Record) == 32 && sizeof(BlockHash) == BlockHash::kBytes);
  auto append = [bytes](const void* data, size_t size) {
    bytes->append(static_cast<const char*>(data), size);
  };
  if (num_dropped_ > num_lost_told_) {
    Record lost;
    lost.kind = Record::Kind::kLost;
    lost.num_blocks = static_cast<uint32_t>(num_dropped_ - num_lost_told_);
    append(&lost, sizeof(lost));
    num_lost_told_ = num_dropped_;
  }
  size_t end = std::min(max_events, size_);
  for (size_t i = 0; i < end;) {
    const Event& first = at(i);
    auto kind = static_cast<Record::Kind>(static_cast<uint8_t>(first.kind) + 1);
    size_t next = i + 1;
    auto continues = [&] {
      const Event& event = at(next);
      if (event.kind != first.kind || first.kind == Event::Kind::kCleared) return false;
      if (first.kind == Event::Kind::kRemoved) return true;
      return event.has_parent && event.parent == at(next - 1).hash && event.tag == first.tag &&
             event.num_tokens == first.num_tokens;
    };
    while (next < end && continues()) ++next;
    Record record;
    record.kind = kind;
    record.has_parent = first.has_parent;
    record.tag = first.tag;
    record.num_blocks = static_cast<uint32_t>(first.kind == Event::Kind::kCleared ? 0 : next - i);
    record.num_tokens = static_cast<uint32_t>(first.num_tokens);
    record.parent = first.parent;
    append(&record, sizeof(record));
    if (first.kind != Event::Kind::kCleared) {
      for (size_t k = i; k < next; ++k) append(&at(k).hash, sizeof(BlockHash));
      for (size_t k = i; k < next; ++k) append(tokens(k).data(), tokens(k).size_bytes());
    }
    i = next;
  }
  first_ = capacity_ == 0 ? 0 : (first_ + end) % capacity_;
  size_ -= end;
}

}  // namespace twinjet::kv
