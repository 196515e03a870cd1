// BlockManager: which sequence holds which blocks, and what the prefix cache remembers of them.
//
//   BlockManager manager({.num_blocks = 1024, .block_size = 16});
//   SequenceId sequence;
//   if (manager.Allocate(prompt, hashes, root, {}, &sequence) == Status::kOk) ...
//   manager.AppendOne(sequence, token, &new_block);
//   manager.Free(sequence);
//
// Every call first works out what it takes and then does it, so a Status other than kOk means that
// nothing was changed. No call throws, but for std::bad_alloc where a table must grow, and that
// too before anything is changed. Not thread-safe: one caller at a time. hasher() may be used from any
// thread.
//
// A sequence either knows its token ids (Allocate, Append*), and then its full blocks are hashed
// here; or it does not (Open, Reserve), and the caller brings hashes to publish blocks under.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kv/block_hash.h"
#include "kv/block_pool.h"
#include "kv/event_log.h"
#include "kv/prefix_cache.h"
#include "kv/sequence.h"
#include "kv/types.h"

namespace twinjet::kv {

struct ManagerOptions {
  int32_t num_blocks = 0;        // 1..2^30; at least 2 with null_block
  int32_t block_size = 16;       // a power of two, 1..kMaxBlockSize
  bool prefix_cache = true;      // false: nothing is hashed, published or found
  bool null_block = false;       // block 0 is never handed out
  int32_t watermark_blocks = 0;  // free blocks that a call with use_watermark leaves over
  BlockHasher::Algorithm algorithm = BlockHasher::Algorithm::kSha256;
  HashKey hash_key{};      // secret
  int32_t max_events = 0;  // length of the event log
};

// How much of the pool a call may take.
struct Headroom {
  int64_t reserved_blocks = 0;  // free blocks to leave over; >= 0
  bool use_watermark = false;   // and the watermark besides
};

struct AllocateOptions {
  int64_t num_lookahead_tokens = 0;
  Headroom headroom{};
  bool publish = true;  // publish full blocks at once
};

struct Stats {
  uint64_t num_queries = 0;
  uint64_t num_queried_tokens = 0;
  uint64_t num_hit_tokens = 0;
  uint64_t num_hits = 0;
  uint64_t num_allocated_blocks = 0;
  uint64_t num_evicted_blocks = 0;
  uint64_t num_failed = 0;
};

struct BlockCopy {
  BlockId source = kNoBlock;
  BlockId destination = kNoBlock;
};

class BlockManager {
 public:
  explicit BlockManager(const ManagerOptions& options);
  BlockManager(const BlockManager&) = delete;
  BlockManager& operator=(const BlockManager&) = delete;

  // ---- Sizes and usage.
  int32_t num_blocks() const { return pool_.num_blocks(); }
  int32_t block_size() const { return block_mask_ + 1; }
  bool has_null_block() const { return options_.null_block; }
  bool prefix_cache_enabled() const { return options_.prefix_cache; }
  int32_t watermark_blocks() const { return options_.watermark_blocks; }
  int32_t num_free_blocks() const { return pool_.num_free(); }
  int32_t num_used_blocks() const { return pool_.num_circulating() - pool_.num_free(); }
  int32_t num_cached_blocks() const { return cache_.size(); }
  int64_t num_sequences() const { return sequences_.size(); }
  const BlockHasher& hasher() const { return hasher_; }
  const Stats& stats() const { return stats_; }
  void ResetStats() { stats_ = {}; }
  EventLog& events() { return events_; }
  bool events_enabled() const { return events_.enabled(); }
  size_t MemoryBytes() const;

  int64_t BlocksFor(int64_t num_tokens) const { return (num_tokens + block_mask_) >> block_shift_; }
  bool IsCached(BlockId block) const { return options_.prefix_cache && cache_.Contains(block); }
  const BlockPool& pool() const { return pool_; }
  const PrefixCache& cache() const { return cache_; }

  // ---- Look-up. Takes no references.
  // The blocks of the longest cached run of `hashes`, written to `blocks` (as many as hashes).
  int32_t Match(std::span<const BlockHash> hashes, BlockId* blocks) const {
    return options_.prefix_cache ? cache_.FindRun(hashes, blocks) : 0;
  }
  // The oldest block cached under `hash`, or kNoBlock.
  BlockId Find(const BlockHash& hash) const { return options_.prefix_cache ? cache_.Find(hash) : kNoBlock; }
  // How many of these valid blocks are free: adopting them takes that many out of the free ones.
  int32_t CountFree(std::span<const BlockId> blocks) const;

  // ---- Sequences with token ids.
  // hashes: of all full blocks of `tokens`, chained from `root` (ignored without a prefix cache).
  Status Allocate(std::span<const int32_t> tokens, std::span<const BlockHash> hashes, const BlockHash& root,
                  const AllocateOptions& options, SequenceId* sequence);
  // New block ids are appended to *new_blocks.
  Status Append(SequenceId id, std::span<const int32_t> tokens, std::vector<BlockId>* new_blocks);
  // *new_block is kNoBlock if none was needed.
  Status AppendOne(SequenceId id, int32_t token, BlockId* new_block);
  // Tokens of unknown ids: from here on the sequence's blocks are not hashed.
  Status AppendCount(SequenceId id, int64_t num_tokens, std::vector<BlockId>* new_blocks);
  // One token to each of ids. tokens: as many, or null where unknown. new_blocks: as many, each
  // kNoBlock if none was needed.
  Status AppendBatch(std::span<const SequenceId> ids, const int32_t* tokens, BlockId* new_blocks);
  // Publishes full blocks within the first num_tokens tokens; *num_new counts them.
  Status Publish(SequenceId id, int64_t num_tokens, int64_t* num_new);
  // Shares full blocks and copies a partial last one: *copy tells which (source kNoBlock: none).
  // The copy is to be made before the next write to either block.
  Status Fork(SequenceId id, SequenceId* child, BlockCopy* copy);

  // ---- Sequences without token ids.
  Status Open(SequenceId* sequence);
  // Gives the sequence slots for num_tokens tokens in all, after adopting `matched` blocks if it has
  // none yet. The new blocks are the last *num_new of its table. kNoRoom also if it could never fit.
  Status Reserve(SequenceId id, int64_t num_tokens, std::span<const BlockId> matched,
                 const Headroom& headroom, int64_t* num_new) {
    Sequence* sequence = sequences_.Find(id);
    return sequence ? Reserve(*sequence, num_tokens, matched, headroom, num_new) : Status::kUnknownSequence;
  }
  Status Reserve(Sequence& sequence, int64_t num_tokens, std::span<const BlockId> matched,
                 const Headroom& headroom, int64_t* num_new);
  // Publishes block i, of those past num_published within the first num_tokens tokens, under
  // hash_of(i), a BlockHash; *num_new counts those the cache did not know. tokens_of(i): a span of the
  // block's token ids for the event log, or of none; called only while that is enabled.
  template <typename HashOf, typename TokensOf>
  Status PublishHashes(Sequence& sequence, int64_t num_tokens, int64_t num_hashes, const HashOf& hash_of,
                       const TokensOf& tokens_of, int64_t* num_new);
  template <typename HashOf>
  Status PublishHashes(Sequence& sequence, int64_t num_tokens, int64_t num_hashes, const HashOf& hash_of,
                       int64_t* num_new) {
    auto unknown = [](int64_t) { return std::span<const int32_t>(); };
    return PublishHashes(sequence, num_tokens, num_hashes, hash_of, unknown, num_new);
  }

  // ---- The end of a sequence.
  Status Free(SequenceId id);
  // Drops the sequence but keeps its references; *blocks is its table, for FreeBlocks() later.
  Status Detach(SequenceId id, std::vector<BlockId>* blocks);
  // Gives back detached references in this order.
  Status FreeBlocks(std::span<const BlockId> blocks);

  // ---- Cache upkeep.
  // Forgets these blocks' contents, referenced or not. A free one keeps its place in the queue.
  Status Evict(std::span<const BlockId> blocks, int64_t* num_evicted);
  // Forgets all; false, and nothing done, while a block is in use.
  bool Reset();

  // ---- Inspection.
  Sequence* FindSequence(SequenceId id) { return sequences_.Find(id); }
  const Sequence* FindSequence(SequenceId id) const { return sequences_.Find(id); }
  // The first invariant that does not hold, or "". O(blocks).
  std::string Check() const;

  // ---- For fused loops in callers: one more slot where the table is full. Precondition: room for
  // one block in the pool and, see EnsureTable, in the table.
  BlockId TakeInto(Sequence& sequence) {
    BlockId block = Take();
    sequence.table.data()[sequence.num_blocks++] = block;
    return block;
  }
  static void EnsureTable(Sequence& sequence, int64_t num_blocks) {
    if (num_blocks > sequence.table.capacity()) sequence.table.Grow(num_blocks, sequence.num_blocks);
  }

 private:
  // The front free block, its old contents forgotten.
  BlockId Take() {
    BlockId block = pool_.Pop();
    ++stats_.num_allocated_blocks;
    if (options_.prefix_cache && cache_.Contains(block)) Forget(block);
    return block;
  }
  void Forget(BlockId block);
  Status NoRoom(int64_t total_blocks);
  bool Fits(int64_t num_new, const Headroom& headroom) const {
    int64_t kept = headroom.reserved_blocks + (headroom.use_watermark ? options_.watermark_blocks : 0);
    return num_new + kept <= pool_.num_free();
  }
  // Hashes the block just filled and publishes it if the sequence does.
  void Seal(Sequence& sequence);
  void PushToken(Sequence& sequence, int32_t token) {
    sequence.tail[sequence.num_tokens & block_mask_] = token;
    if ((++sequence.num_tokens & block_mask_) == 0) Seal(sequence);
  }
  // False if the block is cached already, by a sequence that shares it.
  bool PublishBlock(const Sequence& sequence, int64_t index, const BlockHash& hash, const BlockHash* parent,
                    std::span<const int32_t> tokens);
  // Drops a reference to each block of a range, in its order.
  template <typename Range>
  void Release(const Range& blocks);
  // Whether `num_tokens` more fit, with the blocks that takes; makes room in the sequence's vectors.
  Status PlanAppend(Sequence& sequence, int64_t num_tokens, int64_t* num_new);

  ManagerOptions options_;
  int32_t block_mask_;
  int block_shift_;
  BlockHasher hasher_;
  BlockPool pool_;
  PrefixCache cache_;
  EventLog events_;
  SequenceStore sequences_;
  Stats stats_;
  uint64_t batch_stamp_ = 0;
  std::vector<int32_t> num_detached_;  // references held by no sequence, by block; empty until the first
  std::vector<BlockId> match_;         // scratch of Allocate
};

template <typename HashOf, typename TokensOf>
Status BlockManager::PublishHashes(Sequence& sequence, int64_t num_tokens, int64_t num_hashes,
                                   const HashOf& hash_of, const TokensOf& tokens_of, int64_t* num_new) {
  int64_t num_full = num_tokens >> block_shift_;
  *num_new = 0;
  if (!sequence.is_external) return Status::kWrongKind;
  if (num_tokens < 0 || num_full > sequence.num_blocks) return Status::kBadCount;
  if (!options_.prefix_cache || num_full <= sequence.num_published) return Status::kOk;
  if (num_full > num_hashes) return Status::kTooFewHashes;
  constexpr int64_t kAhead = 8;
  const BlockId* table = sequence.table.data();
  for (int64_t i = sequence.num_published; i < num_full; ++i) {
    if (i + kAhead < num_full) cache_.PrefetchInsert(hash_of(i + kAhead), table[i + kAhead]);
    if (!events_.enabled()) {
      *num_new += PublishBlock(sequence, i, hash_of(i), nullptr, {});
      continue;
    }
    BlockHash parent = i > 0 ? hash_of(i - 1) : BlockHash{};
    *num_new += PublishBlock(sequence, i, hash_of(i), i > 0 ? &parent : nullptr, tokens_of(i));
  }
  sequence.num_published = num_full;
  return Status::kOk;
}

}  // namespace twinjet::kv
