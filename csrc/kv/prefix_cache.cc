#include "kv/prefix_cache.h"

#include <algorithm>
#include <bit>

namespace twinjet::kv {

PrefixCache::PrefixCache(int32_t num_blocks, const BlockHash& seed)
    : seed_(seed),
      mask_(std::bit_ceil(2 * static_cast<size_t>(num_blocks)) - 1),
      slots_(mask_ + 1, Slot{0, kNoBlock}),
      hashes_(static_cast<size_t>(num_blocks)),
      rings_(static_cast<size_t>(num_blocks), Ring{kNoBlock, kNoBlock}) {}

size_t PrefixCache::Probe(const BlockHash& hash, uint64_t mixed) const {
  uint32_t tag = Tag(mixed);
  size_t index = Home(mixed);
  while (slots_[index].block != kNoBlock &&
         !(slots_[index].tag == tag && hashes_[slots_[index].block] == hash)) {
    index = (index + 1) & mask_;
  }
  return index;
}

BlockId PrefixCache::Find(const BlockHash& hash) const { return slots_[Probe(hash, Mix(hash))].block; }

int32_t PrefixCache::FindRun(std::span<const BlockHash> hashes, BlockId* blocks) const {
  // A long run is bound by cache misses, two a block; both are asked for some blocks ahead.
  constexpr size_t kSlotAhead = 16;
  constexpr size_t kHashAhead = 8;
  for (size_t i = 0; i < std::min(kSlotAhead, hashes.size()); ++i) {
    __builtin_prefetch(&slots_[Home(Mix(hashes[i]))]);
  }
  for (size_t i = 0; i < hashes.size(); ++i) {
    if (i + kSlotAhead < hashes.size()) {
      __builtin_prefetch(&slots_[Home(Mix(hashes[i + kSlotAhead]))]);
    }
    if (i + kHashAhead < hashes.size()) {
      BlockId likely = slots_[Home(Mix(hashes[i + kHashAhead]))].block;
      if (likely != kNoBlock) __builtin_prefetch(&hashes_[likely]);
    }
    BlockId block = Find(hashes[i]);
    if (block == kNoBlock) return static_cast<int32_t>(i);
    blocks[i] = block;
  }
  return static_cast<int32_t>(hashes.size());
}

bool PrefixCache::Reaches(BlockId block) const {
  BlockId oldest = Find(hashes_[block]);
  if (oldest == kNoBlock) return false;
  BlockId other = oldest;
  for (int32_t i = 0; i < size_; ++i) {
    if (rings_[rings_[other].next].prev != other) return false;
    if (other == block) return true;
    other = rings_[other].next;
  }
  return false;
}

void PrefixCache::Insert(const BlockHash& hash, BlockId block) {
  uint64_t mixed = Mix(hash);
  Slot& slot = slots_[Probe(hash, mixed)];
  hashes_[block] = hash;
  ++size_;
  if (slot.block == kNoBlock) {
    slot = {Tag(mixed), block};
    rings_[block] = {block, block};
    return;
  }
  BlockId oldest = slot.block;
  BlockId newest = rings_[oldest].prev;
  rings_[block] = {newest, oldest};
  rings_[newest].next = block;
  rings_[oldest].prev = block;
}

void PrefixCache::Erase(BlockId block) {
  --size_;
  Ring ring = rings_[block];
  rings_[block] = {kNoBlock, kNoBlock};
  size_t hole = Probe(hashes_[block], Mix(hashes_[block]));
  if (ring.next != block) {
    rings_[ring.prev].next = ring.next;
    rings_[ring.next].prev = ring.prev;
    if (slots_[hole].block == block) slots_[hole].block = ring.next;
    return;
  }
  // Close the gap: move back each later entry of the cluster that the hole would cut off from home.
  for (size_t index = (hole + 1) & mask_; slots_[index].block != kNoBlock; index = (index + 1) & mask_) {
    size_t home = Home(Mix(hashes_[slots_[index].block]));
    if (((index - home) & mask_) >= ((index - hole) & mask_)) {
      slots_[hole] = slots_[index];
      hole = index;
    }
  }
  slots_[hole].block = kNoBlock;
}

void PrefixCache::Clear() {
  std::fill(slots_.begin(), slots_.end(), Slot{0, kNoBlock});
  std::fill(rings_.begin(), rings_.end(), Ring{kNoBlock, kNoBlock});
  size_ = 0;
}

}  // namespace twinjet::kv
