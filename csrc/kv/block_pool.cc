#include "kv/block_pool.h"

namespace twinjet::kv {

BlockPool::BlockPool(int32_t num_blocks, bool null_block)
    : num_blocks_(num_blocks),
      first_block_(null_block ? 1 : 0),
      num_free_(num_blocks - first_block_),
      links_(static_cast<size_t>(num_blocks) + 1),
      ref_counts_(static_cast<size_t>(num_blocks), 0) {
  // A ring through the sentinel, in order of id.
  BlockId last = num_blocks_;
  for (BlockId block = first_block_; block < num_blocks_; ++block) {
    links_[block].prev = last;
    links_[last].next = block;
    last = block;
  }
  links_[last].next = num_blocks_;
  links_[num_blocks_].prev = last;
  if (null_block) ref_counts_[0] = 1;
}

}  // namespace twinjet::kv
