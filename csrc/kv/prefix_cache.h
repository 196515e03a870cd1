// PrefixCache: block hash -> block, for full blocks whose contents may be reused. Holds no
// references: a cached block may be free (then it can be handed out, and must be erased here first)
// or in use. Several blocks may carry one hash; the oldest is found.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kv/types.h"

namespace twinjet::kv {

class PrefixCache {
 public:
  // seed: secret; without it nobody can choose hashes that crowd one stretch of the table.
  PrefixCache(int32_t num_blocks, const BlockHash& seed);

  // Cached blocks, duplicates counted.
  int32_t size() const { return size_; }
  bool Contains(BlockId block) const { return rings_[block].next != kNoBlock; }
  // Precondition: Contains(block).
  const BlockHash& HashOf(BlockId block) const { return hashes_[block]; }

  // The oldest block under `hash`, or kNoBlock.
  BlockId Find(const BlockHash& hash) const;
  // Writes the blocks of the longest run of cached hashes from the first on; returns its length.
  int32_t FindRun(std::span<const BlockHash> hashes, BlockId* blocks) const;

  // Asks the memory for what Insert() will touch: of many in a row each misses the CPU's caches.
  void PrefetchInsert(const BlockHash& hash, BlockId block) const {
    __builtin_prefetch(&slots_[Home(Mix(hash))], 1);
    __builtin_prefetch(&hashes_[block], 1);
    __builtin_prefetch(&rings_[block], 1);
  }

  // Whether a look-up of its hash comes upon `block`: a self-check. Precondition: Contains(block).
  bool Reaches(BlockId block) const;

  // Precondition: not Contains(block).
  void Insert(const BlockHash& hash, BlockId block);
  // Precondition: Contains(block).
  void Erase(BlockId block);
  void Clear();

  size_t MemoryBytes() const {
    return slots_.capacity() * sizeof(Slot) + hashes_.capacity() * sizeof(BlockHash) +
           rings_.capacity() * sizeof(Ring);
  }

 private:
  // Open addressing with linear probing, never more than half full, so it never grows. The tag
  // spares most look-ups a walk to the wrong block's hash.
  struct Slot {
    uint32_t tag;
    BlockId block;  // oldest of its ring; kNoBlock in an empty slot
  };
  // The blocks under one hash, oldest first, in a ring.
  struct Ring {
    BlockId prev;
    BlockId next;  // kNoBlock: not cached
  };

  uint64_t Mix(const BlockHash& hash) const {
    __extension__ using Wide = unsigned __int128;
    Wide product = static_cast<Wide>(hash.lo ^ seed_.lo) * (hash.hi ^ seed_.hi);
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }
  size_t Home(uint64_t mixed) const { return mixed & mask_; }
  static uint32_t Tag(uint64_t mixed) { return static_cast<uint32_t>(mixed >> 32); }
  // The slot that holds `hash`, or the empty one where it belongs.
  size_t Probe(const BlockHash& hash, uint64_t mixed) const;

  BlockHash seed_;
  size_t mask_;
  int32_t size_ = 0;
  std::vector<Slot> slots_;
  std::vector<BlockHash> hashes_;  // by block
  std::vector<Ring> rings_;        // by block
};

}  // namespace twinjet::kv
