// BlockPool: the fixed array of blocks with its reference counts and one queue of free blocks.
// Knows nothing of what a block contains. The queue's front is handed out next; where a freed block
// joins it (front or back) is the caller's policy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kv/types.h"

namespace twinjet::kv {

class BlockPool {
 public:
  // A run of freed blocks linked together, not yet part of the queue.
  struct Chain {
    BlockId head = kNoBlock;
    BlockId tail = kNoBlock;
    int32_t size = 0;
  };

  // num_blocks >= 1. With null_block, block 0 is never free and never counted.
  BlockPool(int32_t num_blocks, bool null_block);

  int32_t num_blocks() const { return num_blocks_; }
  int32_t num_circulating() const { return num_blocks_ - first_block_; }
  int32_t num_free() const { return num_free_; }
  int32_t ref_count(BlockId block) const { return ref_counts_[block]; }
  // True for ids that may stand in a block table.
  bool IsValid(BlockId block) const { return block >= first_block_ && block < num_blocks_; }

  // Takes the front block; its reference count becomes 1. Precondition: num_free() > 0.
  BlockId Pop() {
    BlockId block = links_[num_blocks_].next;
    Unlink(block);
    ref_counts_[block] = 1;
    return block;
  }

  // Adds a reference, out of the queue if the block was free.
  void Ref(BlockId block) {
    if (ref_counts_[block]++ == 0) Unlink(block);
  }

  // Drops a reference. At zero the block is in limbo: the caller adds it to a chain.
  // Returns true at zero. Precondition: ref_count(block) > 0.
  bool Unref(BlockId block) { return --ref_counts_[block] == 0; }

  void AddToChain(Chain* chain, BlockId block) {
    links_[block] = {chain->tail, kNoBlock};
    (chain->size++ == 0 ? chain->head : links_[chain->tail].next) = block;
    chain->tail = block;
  }
  // Put a chain, in its order, before or after all free blocks.
  void Prepend(const Chain& chain) { Splice(num_blocks_, chain, links_[num_blocks_].next); }
  void Append(const Chain& chain) { Splice(links_[num_blocks_].prev, chain, num_blocks_); }

  // Walks the queue from the front; kNoBlock past the end. Start with NextFree(kNoBlock).
  BlockId NextFree(BlockId block) const {
    BlockId next = links_[block == kNoBlock ? num_blocks_ : block].next;
    return next == num_blocks_ ? kNoBlock : next;
  }

  size_t MemoryBytes() const {
    return links_.capacity() * sizeof(Link) + ref_counts_.capacity() * sizeof(int32_t);
  }

 private:
  struct Link {
    BlockId prev;
    BlockId next;
  };

  void Unlink(BlockId block) {
    Link link = links_[block];
    links_[link.prev].next = link.next;
    links_[link.next].prev = link.prev;
    --num_free_;
  }

  void Splice(BlockId before, const Chain& chain, BlockId after) {
    if (chain.size == 0) return;
    links_[before].next = chain.head;
    links_[chain.head].prev = before;
    links_[chain.tail].next = after;
    links_[after].prev = chain.tail;
    num_free_ += chain.size;
  }

  int32_t num_blocks_;
  BlockId first_block_;  // 1 where block 0 is the null block, else 0
  int32_t num_free_;
  std::vector<Link> links_;  // one a block, and the queue's sentinel at index num_blocks_
  std::vector<int32_t> ref_counts_;
};

}  // namespace twinjet::kv
