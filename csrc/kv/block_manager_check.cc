// The block manager's invariants, each verified from scratch.
#include "kv/block_manager.h"

namespace twinjet::kv {
namespace {

std::string About(const char* what, int64_t which) { return std::string(what) + " " + std::to_string(which); }

std::string CheckSequence(const Sequence& sequence, const BlockManager& manager) {
  if (manager.BlocksFor(sequence.num_tokens) > sequence.num_blocks)
    return "a sequence has tokens without slots";
  if (sequence.num_published > sequence.num_blocks) return "a sequence has published blocks it does not hold";
  auto num_full = static_cast<size_t>(sequence.num_tokens / manager.block_size());
  if (sequence.knows_tokens && sequence.hashes.size() != num_full) return "a full block has no hash";
  for (BlockId block : sequence.blocks()) {
    if (!manager.pool().IsValid(block)) return About("a table holds the invalid block", block);
  }
  return "";
}

}  // namespace

std::string BlockManager::Check() const {
  std::vector<int32_t> references(static_cast<size_t>(num_blocks()), 0);
  if (!num_detached_.empty()) references = num_detached_;
  int64_t num_live = 0;
  for (const Sequence& sequence : sequences_.slots()) {
    if (!sequence.is_live) continue;
    ++num_live;
    std::string wrong = CheckSequence(sequence, *this);
    if (!wrong.empty()) return wrong;
    for (BlockId block : sequence.blocks()) ++references[block];
  }
  if (num_live != sequences_.size()) return "the count of live sequences is off";

  std::vector<bool> is_free(static_cast<size_t>(num_blocks()), false);
  int32_t num_free = 0;
  for (BlockId block = pool_.NextFree(kNoBlock); block != kNoBlock; block = pool_.NextFree(block)) {
    if (!pool_.IsValid(block) || is_free[block]) return About("the free queue is broken at block", block);
    is_free[block] = true;
    ++num_free;
  }
  if (num_free != pool_.num_free()) return "the count of free blocks is off";

  int32_t num_cached = 0;
  for (BlockId block = 0; block < num_blocks(); ++block) {
    bool cached = IsCached(block);
    num_cached += cached;
    if (!pool_.IsValid(block)) {
      if (cached || is_free[block]) return "the null block is in circulation";
      continue;
    }
    if (references[block] != pool_.ref_count(block)) return About("wrong reference count of block", block);
    if (is_free[block] != (pool_.ref_count(block) == 0))
      return About("neither free nor referenced: block", block);
    if (cached && !cache_.Reaches(block)) return About("not found under its hash: block", block);
  }
  if (num_cached != num_cached_blocks()) return "the count of cached blocks is off";
  return "";
}

}  // namespace twinjet::kv
