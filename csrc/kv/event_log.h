// EventLog: the last changes of the prefix cache, for routers that follow what this process holds.
// A ring of fixed size; when full, the oldest event makes room. A hash is stored when the first block is
// cached under it and removed when the last is not any more, so that the events tell a set of hashes.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kv/types.h"

namespace twinjet::kv {

struct Event {
  enum class Kind : uint8_t { kStored, kRemoved, kCleared };
  Kind kind = Kind::kCleared;
  bool has_parent = false;
  BlockId block = kNoBlock;
  int32_t num_tokens = 0;        // how many of the block's token ids the log holds: all or none
  uint32_t tag = 0;              // of the sequence that stored the block, see Sequence::tag
  uint64_t sequence_number = 0;  // a gap between two tells of dropped events
  BlockHash hash{};
  BlockHash parent{};
};

class EventLog {
 public:
  // capacity 0 keeps nothing.
  EventLog(int32_t capacity, int32_t block_size);

  bool enabled() const { return capacity_ > 0; }
  uint64_t num_dropped() const { return num_dropped_; }
  size_t size() const { return size_; }

  // parent: null for a first block. tokens: the block's ids, or empty where unknown.
  void Stored(BlockId block, const BlockHash& hash, const BlockHash* parent, std::span<const int32_t> tokens,
              uint32_t tag);
  void Removed(BlockId block, const BlockHash& hash);
  void Cleared();

  // The i-th oldest event and its token ids. Precondition: i < size().
  const Event& at(size_t i) const { return events_[(first_ + i) % capacity_]; }
  std::span<const int32_t> tokens(size_t i) const;
  // Forgets all events; numbering goes on.
  void Drain() { first_ = size_ = 0; }
  // Appends the oldest events to *bytes as records and forgets them: those up to max_events. A record is a
  // Record and then num_blocks hashes of 16 bytes and, where it has any, num_blocks * num_tokens token ids
  // of 4 bytes, all as they lie in memory. Stored blocks that continue each other share a record, and so do
  // removed ones that follow each other. Events that were dropped are told before those that came after.
  struct Record {
    enum class Kind : uint8_t { kStored = 1, kRemoved = 2, kCleared = 3, kLost = 4 };
    Kind kind = Kind::kCleared;
    uint8_t has_parent = 0;
    uint16_t unused = 0;
    uint32_t tag = 0;
    uint32_t num_blocks = 0;  // of kLost: how many events
    uint32_t num_tokens = 0;  // a block; 0: not known
    BlockHash parent{};
  };
  void Encode(size_t max_events, std::string* bytes);

  size_t MemoryBytes() const {
    return events_.capacity() * sizeof(Event) + tokens_.capacity() * sizeof(int32_t);
  }

 private:
  size_t Add(const Event& event);

  size_t capacity_;
  size_t block_size_;
  size_t first_ = 0;
  size_t size_ = 0;
  uint64_t next_number_ = 0;
  uint64_t num_lost_told_ = 0;  // of num_dropped_, by Encode()
  uint64_t num_dropped_ = 0;
  std::vector<Event> events_;
  std::vector<int32_t> tokens_;  // block_size an event
};

}  // namespace twinjet::kv
