// Sequence: one growing token list and its block table. SequenceStore: all live ones, by id, in
// slots that are reused together with their buffers, so that no call allocates in steady state.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kv/types.h"

namespace twinjet::kv {

// A block table's memory. Shared: whoever looks at a table from outside holds it too, so it stays
// readable after the sequence is freed or its table moved to grow.
class TableBuffer {
 public:
  BlockId* data() const { return data_.get(); }
  int64_t capacity() const { return capacity_; }
  const std::shared_ptr<BlockId[]>& shared() const { return data_; }

  // Makes room for `needed` entries, keeping the first `used`.
  void Grow(int64_t needed, int64_t used) {
    int64_t capacity = std::max<int64_t>({16, needed, capacity_ + capacity_ / 2});
    std::shared_ptr<BlockId[]> grown =
        std::make_shared_for_overwrite<BlockId[]>(static_cast<size_t>(capacity));
    std::copy_n(data_.get(), used, grown.get());
    data_ = std::move(grown);
    capacity_ = capacity;
  }
  // Leaves the memory to those who look at it, if there are any.
  void Release() {
    if (data_.use_count() > 1) {
      data_.reset();
      capacity_ = 0;
    }
  }

 private:
  std::shared_ptr<BlockId[]> data_;
  int64_t capacity_ = 0;
};

struct Sequence {
  TableBuffer table;
  int64_t num_blocks = 0;
  int64_t num_tokens = 0;         // appended; or, for one without token ids, last reserved
  int64_t num_published = 0;      // leading blocks matched or published
  int64_t num_cached_tokens = 0;  // of the hit it began with
  uint64_t generation = 0;
  uint64_t batch_stamp = 0;  // the last batch that named it
  uint32_t tag = 0;          // the caller's, told with the events of blocks that this sequence stores
  bool is_live = false;
  bool is_external = false;   // made by Open(): the caller keeps tokens and hashes
  bool knows_tokens = false;  // all token ids so far are known, so blocks are hashed as they fill
  bool publishes = false;     // and published at once

  BlockHash root;                 // parent of the first block
  std::vector<BlockHash> hashes;  // one a full block, while knows_tokens
  std::vector<int32_t> tail;      // block_size ids, while knows_tokens; the partial block's come first

  std::span<const BlockId> blocks() const { return {table.data(), static_cast<size_t>(num_blocks)}; }
};

class SequenceStore {
 public:
  static constexpr int kSlotBits = 24;
  static constexpr int64_t kMaxSequences = int64_t{1} << kSlotBits;

  int64_t size() const { return num_live_; }

  // Null unless `id` is live. The pointer holds until the next Open().
  Sequence* Find(SequenceId id) {
    auto slot = static_cast<size_t>(id & (kMaxSequences - 1));
    if (id < 0 || slot >= slots_.size()) return nullptr;
    Sequence& sequence = slots_[slot];
    bool matches = sequence.is_live && sequence.generation == static_cast<uint64_t>(id >> kSlotBits);
    return matches ? &sequence : nullptr;
  }
  const Sequence* Find(SequenceId id) const { return const_cast<SequenceStore*>(this)->Find(id); }

  bool full() const { return num_live_ == kMaxSequences; }
  // Precondition: not full(). The sequence is empty.
  SequenceId Open();
  // Precondition: live.
  void Close(SequenceId id);

  std::span<const Sequence> slots() const { return slots_; }
  size_t MemoryBytes() const;

 private:
  int64_t num_live_ = 0;
  std::vector<Sequence> slots_;
  std::vector<int32_t> free_slots_;
};

inline SequenceId SequenceStore::Open() {
  if (free_slots_.empty()) {
    // Room for the slot in both lists first, so that Close() cannot fail.
    free_slots_.reserve(slots_.size() + 1);
    slots_.emplace_back();
    free_slots_.push_back(static_cast<int32_t>(slots_.size() - 1));
  }
  int32_t slot = free_slots_.back();
  free_slots_.pop_back();
  slots_[slot].is_live = true;
  ++num_live_;
  return static_cast<SequenceId>(slots_[slot].generation << kSlotBits) | slot;
}

inline void SequenceStore::Close(SequenceId id) {
  auto slot = static_cast<int32_t>(id & (kMaxSequences - 1));
  Sequence& sequence = slots_[slot];
  sequence.table.Release();
  sequence.num_blocks = sequence.num_tokens = sequence.num_published = sequence.num_cached_tokens = 0;
  sequence.is_live = sequence.is_external = sequence.knows_tokens = sequence.publishes = false;
  sequence.hashes.clear();
  sequence.tag = 0;
  ++sequence.generation;
  free_slots_.push_back(slot);
  --num_live_;
}

inline size_t SequenceStore::MemoryBytes() const {
  size_t bytes = slots_.capacity() * sizeof(Sequence) + free_slots_.capacity() * sizeof(int32_t);
  for (const Sequence& sequence : slots_) {
    bytes += static_cast<size_t>(sequence.table.capacity()) * sizeof(BlockId) +
             sequence.hashes.capacity() * sizeof(BlockHash) + sequence.tail.capacity() * sizeof(int32_t);
  }
  return bytes;
}

}  // namespace twinjet::kv
