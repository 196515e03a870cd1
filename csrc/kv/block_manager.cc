#include "kv/block_manager.h"

#include <algorithm>
#include <bit>
#include <ranges>

namespace twinjet::kv {

BlockManager::BlockManager(const ManagerOptions& options)
    : options_(options),
      block_mask_(options.block_size - 1),
      block_shift_(std::countr_zero(static_cast<uint32_t>(options.block_size))),
      hasher_(options.block_size, options.algorithm, options.hash_key),
      pool_(options.num_blocks, options.null_block),
      cache_(options.prefix_cache ? options.num_blocks : 0, hasher_.TableSeed()),
      events_(options.max_events, options.block_size) {}

size_t BlockManager::MemoryBytes() const {
  return sizeof(*this) + pool_.MemoryBytes() + cache_.MemoryBytes() + events_.MemoryBytes() +
         sequences_.MemoryBytes() + num_detached_.capacity() * sizeof(int32_t) +
         match_.capacity() * sizeof(BlockId);
}

int32_t BlockManager::CountFree(std::span<const BlockId> blocks) const {
  return static_cast<int32_t>(
      std::ranges::count_if(blocks, [this](BlockId block) { return pool_.ref_count(block) == 0; }));
}

Status BlockManager::NoRoom(int64_t total_blocks) {
  if (total_blocks > pool_.num_circulating()) return Status::kNeverFits;
  ++stats_.num_failed;
  return Status::kNoRoom;
}

void BlockManager::Forget(BlockId block) {
  BlockHash hash = cache_.HashOf(block);
  cache_.Erase(block);
  if (events_.enabled() && cache_.Find(hash) == kNoBlock) events_.Removed(block, hash);
  ++stats_.num_evicted_blocks;
}

bool BlockManager::PublishBlock(const Sequence& sequence, int64_t index, const BlockHash& hash,
                                const BlockHash* parent, std::span<const int32_t> tokens) {
  BlockId block = sequence.table.data()[index];
  if (cache_.Contains(block)) return false;
  bool is_first = events_.enabled() && cache_.Find(hash) == kNoBlock;
  cache_.Insert(hash, block);
  if (is_first) events_.Stored(block, hash, parent, tokens, sequence.tag);
  return true;
}

void BlockManager::Seal(Sequence& sequence) {
  if (!sequence.knows_tokens) return;
  auto index = static_cast<int64_t>(sequence.hashes.size());
  BlockHash parent = index > 0 ? sequence.hashes.back() : sequence.root;
  BlockHash hash = hasher_.HashBlock(parent, sequence.tail.data());
  sequence.hashes.push_back(hash);
  if (sequence.publishes) {
    PublishBlock(sequence, index, hash, index > 0 ? &parent : nullptr, sequence.tail);
    sequence.num_published = index + 1;
  }
}

Status BlockManager::Open(SequenceId* sequence) {
  if (sequences_.full()) return Status::kTooManySequences;
  *sequence = sequences_.Open();
  sequences_.Find(*sequence)->is_external = true;
  return Status::kOk;
}

Status BlockManager::Allocate(std::span<const int32_t> tokens, std::span<const BlockHash> hashes,
                              const BlockHash& root, const AllocateOptions& options, SequenceId* id) {
  auto num_tokens = static_cast<int64_t>(tokens.size());
  if (num_tokens == 0 || options.num_lookahead_tokens < 0 || options.headroom.reserved_blocks < 0) {
    return Status::kBadCount;
  }
  if (sequences_.full()) return Status::kTooManySequences;
  auto num_full = static_cast<size_t>(num_tokens >> block_shift_);
  if (options_.prefix_cache && hashes.size() != num_full) return Status::kTooFewHashes;

  // The last token is always left to compute.
  size_t max_matched = options_.prefix_cache ? static_cast<size_t>((num_tokens - 1) >> block_shift_) : 0;
  if (match_.size() < max_matched) match_.resize(max_matched);
  int32_t num_matched = Match(hashes.first(max_matched), match_.data());
  std::span<const BlockId> matched(match_.data(), static_cast<size_t>(num_matched));
  int64_t max_tokens = static_cast<int64_t>(pool_.num_circulating()) << block_shift_;
  if (num_tokens > max_tokens || options.num_lookahead_tokens > max_tokens - num_tokens) {
    return Status::kNeverFits;
  }
  int64_t num_blocks = BlocksFor(num_tokens + options.num_lookahead_tokens);
  int64_t num_new = num_blocks - num_matched;
  if (!Fits(num_new + CountFree(matched), options.headroom)) return NoRoom(num_blocks);

  SequenceId opened = sequences_.Open();
  Sequence& sequence = *sequences_.Find(opened);
  try {
    EnsureTable(sequence, num_blocks);
    if (options_.prefix_cache) {
      sequence.tail.resize(static_cast<size_t>(block_size()));
      sequence.hashes.assign(hashes.begin(), hashes.end());
    }
  } catch (...) {
    sequences_.Close(opened);
    throw;
  }
  for (BlockId block : matched) pool_.Ref(block);
  std::ranges::copy(matched, sequence.table.data());
  sequence.num_blocks = num_matched;
  for (int64_t i = 0; i < num_new; ++i) TakeInto(sequence);
  sequence.num_tokens = num_tokens;
  sequence.num_published = num_matched;
  sequence.num_cached_tokens = static_cast<int64_t>(num_matched) << block_shift_;
  sequence.knows_tokens = options_.prefix_cache;
  sequence.publishes = options_.prefix_cache && options.publish;
  sequence.root = root;
  if (sequence.knows_tokens) {
    std::ranges::copy(tokens.subspan(num_full << block_shift_), sequence.tail.begin());
  }
  if (sequence.publishes) {
    for (size_t i = static_cast<size_t>(num_matched); i < num_full; ++i) {
      PublishBlock(sequence, static_cast<int64_t>(i), hashes[i], i > 0 ? &hashes[i - 1] : nullptr,
                   tokens.subspan(i << block_shift_, static_cast<size_t>(block_size())));
    }
    sequence.num_published = static_cast<int64_t>(num_full);
  }
  ++stats_.num_queries;
  stats_.num_queried_tokens += static_cast<uint64_t>(num_tokens);
  stats_.num_hit_tokens += static_cast<uint64_t>(sequence.num_cached_tokens);
  stats_.num_hits += num_matched > 0;
  *id = opened;
  return Status::kOk;
}

Status BlockManager::PlanAppend(Sequence& sequence, int64_t num_tokens, int64_t* num_new) {
  // Beyond this no pool could hold it, and the sums below cannot overflow.
  if (num_tokens > (static_cast<int64_t>(pool_.num_blocks()) + 1) << block_shift_) return Status::kNeverFits;
  int64_t num_blocks = BlocksFor(sequence.num_tokens + num_tokens);
  *num_new = std::max<int64_t>(num_blocks - sequence.num_blocks, 0);
  if (num_blocks > pool_.num_circulating() || *num_new > pool_.num_free()) return NoRoom(num_blocks);
  EnsureTable(sequence, num_blocks);
  if (sequence.knows_tokens) {
    auto num_full = static_cast<size_t>((sequence.num_tokens + num_tokens) >> block_shift_);
    if (num_full > sequence.hashes.capacity()) {
      sequence.hashes.reserve(std::max(num_full, sequence.hashes.capacity() * 3 / 2));
    }
  }
  return Status::kOk;
}

Status BlockManager::Append(SequenceId id, std::span<const int32_t> tokens,
                            std::vector<BlockId>* new_blocks) {
  Sequence* sequence = sequences_.Find(id);
  if (!sequence) return Status::kUnknownSequence;
  if (tokens.empty()) return Status::kBadCount;
  int64_t num_new = 0;
  Status status = PlanAppend(*sequence, static_cast<int64_t>(tokens.size()), &num_new);
  if (status != Status::kOk) return status;
  new_blocks->reserve(new_blocks->size() + static_cast<size_t>(num_new));
  for (int64_t i = 0; i < num_new; ++i) new_blocks->push_back(TakeInto(*sequence));
  if (sequence->knows_tokens) {
    for (int32_t token : tokens) PushToken(*sequence, token);
  } else {
    sequence->num_tokens += static_cast<int64_t>(tokens.size());
  }
  return Status::kOk;
}

Status BlockManager::AppendOne(SequenceId id, int32_t token, BlockId* new_block) {
  Sequence* sequence = sequences_.Find(id);
  if (!sequence) return Status::kUnknownSequence;
  int64_t num_new = 0;
  Status status = PlanAppend(*sequence, 1, &num_new);
  if (status != Status::kOk) return status;
  *new_block = num_new > 0 ? TakeInto(*sequence) : kNoBlock;
  if (sequence->knows_tokens) {
    PushToken(*sequence, token);
  } else {
    ++sequence->num_tokens;
  }
  return Status::kOk;
}

Status BlockManager::AppendCount(SequenceId id, int64_t num_tokens, std::vector<BlockId>* new_blocks) {
  Sequence* sequence = sequences_.Find(id);
  if (!sequence) return Status::kUnknownSequence;
  if (num_tokens <= 0) return Status::kBadCount;
  int64_t num_new = 0;
  Status status = PlanAppend(*sequence, num_tokens, &num_new);
  if (status != Status::kOk) return status;
  new_blocks->reserve(new_blocks->size() + static_cast<size_t>(num_new));
  for (int64_t i = 0; i < num_new; ++i) new_blocks->push_back(TakeInto(*sequence));
  sequence->num_tokens += num_tokens;
  sequence->knows_tokens = false;
  return Status::kOk;
}

Status BlockManager::AppendBatch(std::span<const SequenceId> ids, const int32_t* tokens,
                                 BlockId* new_blocks) {
  ++batch_stamp_;
  int64_t num_needed = 0;
  for (SequenceId id : ids) {
    Sequence* sequence = sequences_.Find(id);
    if (!sequence) return Status::kUnknownSequence;
    if (sequence->batch_stamp == batch_stamp_) return Status::kDuplicate;
    sequence->batch_stamp = batch_stamp_;
    int64_t num_new = 0;
    Status status = PlanAppend(*sequence, 1, &num_new);
    if (status != Status::kOk) return status;
    num_needed += num_new;
  }
  if (num_needed > pool_.num_free()) return NoRoom(0);
  for (size_t i = 0; i < ids.size(); ++i) {
    Sequence& sequence = *sequences_.Find(ids[i]);
    bool needs_block = BlocksFor(sequence.num_tokens + 1) > sequence.num_blocks;
    new_blocks[i] = needs_block ? TakeInto(sequence) : kNoBlock;
    if (tokens && sequence.knows_tokens) {
      PushToken(sequence, tokens[i]);
    } else {
      ++sequence.num_tokens;
      sequence.knows_tokens = false;
    }
  }
  return Status::kOk;
}

Status BlockManager::Publish(SequenceId id, int64_t num_tokens, int64_t* num_new) {
  Sequence* sequence = sequences_.Find(id);
  *num_new = 0;
  if (!sequence) return Status::kUnknownSequence;
  if (sequence->is_external) return Status::kWrongKind;
  if (num_tokens < 0 || num_tokens > sequence->num_tokens) return Status::kBadCount;
  if (!options_.prefix_cache) return Status::kOk;
  const std::vector<BlockHash>& hashes = sequence->hashes;
  int64_t num_full = std::min(num_tokens >> block_shift_, static_cast<int64_t>(hashes.size()));
  for (int64_t i = sequence->num_published; i < num_full; ++i) {
    const BlockHash* parent = i > 0 ? &hashes[static_cast<size_t>(i - 1)] : nullptr;
    *num_new += PublishBlock(*sequence, i, hashes[static_cast<size_t>(i)], parent, {});
  }
  sequence->num_published = std::max(sequence->num_published, num_full);
  return Status::kOk;
}

Status BlockManager::Fork(SequenceId id, SequenceId* child_id, BlockCopy* copy) {
  *copy = {};
  Sequence* parent = sequences_.Find(id);
  if (!parent) return Status::kUnknownSequence;
  if (sequences_.full()) return Status::kTooManySequences;
  int64_t num_full = parent->num_tokens >> block_shift_;
  bool has_partial = (parent->num_tokens & block_mask_) != 0;
  if (has_partial && pool_.num_free() == 0) return NoRoom(0);

  SequenceId opened = sequences_.Open();
  parent = sequences_.Find(id);
  Sequence& child = *sequences_.Find(opened);
  try {
    EnsureTable(child, num_full + 1);
    child.hashes = parent->hashes;
    child.tail = parent->tail;
  } catch (...) {
    sequences_.Close(opened);
    throw;
  }
  std::copy_n(parent->table.data(), num_full, child.table.data());
  child.num_blocks = num_full;
  for (BlockId block : child.blocks()) pool_.Ref(block);
  if (has_partial) *copy = {parent->table.data()[num_full], TakeInto(child)};
  child.num_tokens = parent->num_tokens;
  child.num_published = std::min(parent->num_published, num_full);
  child.num_cached_tokens = parent->num_cached_tokens;
  child.is_external = parent->is_external;
  child.knows_tokens = parent->knows_tokens;
  child.publishes = parent->publishes;
  child.root = parent->root;
  *child_id = opened;
  return Status::kOk;
}

Status BlockManager::Reserve(Sequence& sequence, int64_t num_tokens, std::span<const BlockId> matched,
                             const Headroom& headroom, int64_t* num_new) {
  *num_new = 0;
  if (num_tokens < 0 || headroom.reserved_blocks < 0) return Status::kBadCount;
  auto num_matched = static_cast<int64_t>(matched.size());
  if (num_matched > 0 && sequence.num_blocks > 0) return Status::kNotEmpty;
  for (BlockId block : matched) {
    if (!pool_.IsValid(block)) return Status::kBadBlock;
    if (!IsCached(block)) return Status::kNotCached;
  }
  int64_t wanted = std::max<int64_t>(BlocksFor(num_tokens) - sequence.num_blocks - num_matched, 0);
  if (!Fits(wanted + CountFree(matched), headroom)) {
    ++stats_.num_failed;
    return Status::kNoRoom;
  }
  EnsureTable(sequence, sequence.num_blocks + num_matched + wanted);
  if (num_matched > 0) {
    for (BlockId block : matched) pool_.Ref(block);
    std::ranges::copy(matched, sequence.table.data());
    sequence.num_blocks = sequence.num_published = num_matched;
    sequence.num_cached_tokens = num_matched << block_shift_;
  }
  for (int64_t i = 0; i < wanted; ++i) TakeInto(sequence);
  if (sequence.is_external) sequence.num_tokens = num_tokens;
  *num_new = wanted;
  return Status::kOk;
}

// Blocks nobody references any more join the free queue: at its front those without contents worth
// keeping, at its end the cached ones.
template <typename Range>
void BlockManager::Release(const Range& blocks) {
  BlockPool::Chain first, last;
  for (BlockId block : blocks) {
    if (pool_.Unref(block)) pool_.AddToChain(IsCached(block) ? &last : &first, block);
  }
  pool_.Prepend(first);
  pool_.Append(last);
}

Status BlockManager::Free(SequenceId id) {
  Sequence* sequence = sequences_.Find(id);
  if (!sequence) return Status::kUnknownSequence;
  // From last to first, so that the tail is reused before the head.
  Release(sequence->blocks() | std::views::reverse);
  sequences_.Close(id);
  return Status::kOk;
}

Status BlockManager::Detach(SequenceId id, std::vector<BlockId>* blocks) {
  Sequence* sequence = sequences_.Find(id);
  if (!sequence) return Status::kUnknownSequence;
  if (num_detached_.empty()) num_detached_.resize(static_cast<size_t>(num_blocks()));
  blocks->assign(sequence->blocks().begin(), sequence->blocks().end());
  for (BlockId block : *blocks) ++num_detached_[block];
  sequences_.Close(id);
  return Status::kOk;
}

Status BlockManager::FreeBlocks(std::span<const BlockId> blocks) {
  size_t num_checked = 0;
  Status status = Status::kOk;
  for (; num_checked < blocks.size() && status == Status::kOk; ++num_checked) {
    BlockId block = blocks[num_checked];
    if (!pool_.IsValid(block)) {
      status = Status::kBadBlock;
    } else if (num_detached_.empty() || num_detached_[block] == 0) {
      status = Status::kNotDetached;
    } else {
      --num_detached_[block];
    }
  }
  if (status != Status::kOk) {
    for (BlockId block : blocks.first(num_checked - 1)) ++num_detached_[block];
    return status;
  }
  Release(blocks);
  return Status::kOk;
}

Status BlockManager::Evict(std::span<const BlockId> blocks, int64_t* num_evicted) {
  *num_evicted = 0;
  for (BlockId block : blocks) {
    if (!pool_.IsValid(block)) return Status::kBadBlock;
  }
  for (BlockId block : blocks) {
    if (!IsCached(block)) continue;
    Forget(block);
    ++*num_evicted;
  }
  return Status::kOk;
}

bool BlockManager::Reset() {
  if (num_used_blocks() > 0) return false;
  if (options_.prefix_cache) cache_.Clear();
  events_.Cleared();
  return true;
}

}  // namespace twinjet::kv
