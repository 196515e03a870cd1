// BlockManager by example: what each call takes, gives back and refuses.
#include <numeric>

#include "check.h"
#include "kv/block_manager.h"

using namespace twinjet::kv;

namespace {

// A manager with a shorthand for prompts 0, 1, 2, ... under a salt.
struct Fixture {
  explicit Fixture(ManagerOptions options) : manager(options) {}
  ~Fixture() {
    std::string wrong = manager.Check();
    if (!wrong.empty()) std::fprintf(stderr, "invariant: %s\n", wrong.c_str()), std::abort();
  }

  Status Allocate(const std::vector<int32_t>& tokens, SequenceId* id, AllocateOptions options = {}) {
    BlockHash root = manager.hasher().Root({});
    std::vector<BlockHash> hashes(tokens.size() / static_cast<size_t>(manager.block_size()));
    manager.hasher().HashBlocks(root, tokens.data(), hashes);
    return manager.Allocate(tokens, hashes, root, options, id);
  }
  std::vector<BlockId> Table(SequenceId id) {
    auto blocks = manager.FindSequence(id)->blocks();
    return {blocks.begin(), blocks.end()};
  }
  std::vector<BlockId> FreeOrder() {
    std::vector<BlockId> order;
    const BlockPool& pool = manager.pool();
    for (BlockId b = pool.NextFree(kNoBlock); b != kNoBlock; b = pool.NextFree(b)) order.push_back(b);
    return order;
  }

  BlockManager manager;
};

std::vector<int32_t> Count(int n) {
  std::vector<int32_t> tokens(static_cast<size_t>(n));
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens;
}

using Ids = std::vector<BlockId>;

}  // namespace

TEST(prompt_is_found_again_but_for_its_last_token) {
  Fixture f({.num_blocks = 8, .block_size = 4});
  SequenceId a, b;
  CHECK_EQ(f.Allocate(Count(8), &a), Status::kOk);
  CHECK(f.Table(a) == (Ids{0, 1}));
  CHECK_EQ(f.Allocate(Count(8), &b), Status::kOk);
  // The second block is full, yet its last token must be computed, so it is not shared.
  CHECK(f.Table(b) == (Ids{0, 2}));
  CHECK_EQ(f.manager.FindSequence(b)->num_cached_tokens, 4);
  CHECK_EQ(f.manager.pool().ref_count(0), 2);
}

TEST(freed_tail_is_reused_before_head_and_unpublished_before_published) {
  Fixture f({.num_blocks = 6, .block_size = 4});
  SequenceId a;
  CHECK_EQ(f.Allocate(Count(10), &a), Status::kOk);  // blocks 0 and 1 full, 2 partial
  CHECK_EQ(f.manager.Free(a), Status::kOk);
  CHECK(f.FreeOrder() == (Ids{2, 3, 4, 5, 1, 0}));
  CHECK_EQ(f.manager.Free(a), Status::kUnknownSequence);
}

TEST(refused_calls_change_nothing) {
  Fixture f({.num_blocks = 4, .block_size = 4});
  SequenceId a, b;
  CHECK_EQ(f.Allocate(Count(12), &a), Status::kOk);
  Ids before = f.FreeOrder();
  std::vector<BlockId> blocks;
  CHECK_EQ(f.manager.Append(a, Count(5), &blocks), Status::kNeverFits);
  CHECK_EQ(f.Allocate(Count(40), &b), Status::kNeverFits);
  std::vector<int32_t> other(8, 3);
  CHECK_EQ(f.Allocate(other, &b), Status::kNoRoom);
  CHECK_EQ(f.Allocate({}, &b), Status::kBadCount);
  CHECK(f.FreeOrder() == before);
  CHECK_EQ(f.manager.num_sequences(), 1);
  CHECK_EQ(f.manager.stats().num_failed, 1u);
}

TEST(batch_takes_all_or_none) {
  Fixture f({.num_blocks = 4, .block_size = 2});
  SequenceId ids[3];
  for (auto& id : ids) CHECK_EQ(f.Allocate({1, static_cast<int32_t>(&id - ids)}, &id), Status::kOk);
  BlockId blocks[3];
  int32_t tokens[3] = {5, 6, 7};
  CHECK_EQ(f.manager.AppendBatch(ids, tokens, blocks), Status::kNoRoom);
  for (auto id : ids) CHECK_EQ(f.manager.FindSequence(id)->num_tokens, 2);
  SequenceId twice[2] = {ids[0], ids[0]};
  CHECK_EQ(f.manager.AppendBatch(twice, tokens, blocks), Status::kDuplicate);
  CHECK_EQ(f.manager.AppendBatch({ids, 1}, tokens, blocks), Status::kOk);
  CHECK_EQ(blocks[0], 3);
  CHECK_EQ(f.manager.AppendBatch({ids, 1}, tokens, blocks), Status::kOk);
  CHECK_EQ(blocks[0], kNoBlock);
}

TEST(fork_shares_full_blocks_and_copies_the_partial_one) {
  Fixture f({.num_blocks = 8, .block_size = 4});
  SequenceId a, b;
  BlockCopy copy;
  CHECK_EQ(f.Allocate(Count(6), &a), Status::kOk);
  CHECK_EQ(f.manager.Fork(a, &b, &copy), Status::kOk);
  CHECK_EQ(copy.source, 1);
  CHECK_EQ(copy.destination, 2);
  CHECK(f.Table(b) == (Ids{0, 2}));
  BlockId block;
  for (auto [id, token] : {std::pair{a, 50}, {b, 60}}) {
    for (int i = 0; i < 2; ++i) CHECK_EQ(f.manager.AppendOne(id, token, &block), Status::kOk);
  }
  CHECK(!(f.manager.cache().HashOf(1) == f.manager.cache().HashOf(2)));
  SequenceId c;
  CHECK_EQ(f.manager.Fork(a, &c, &copy), Status::kOk);
  CHECK_EQ(copy.source, kNoBlock);  // block-aligned: nothing to copy
}

TEST(watermark_and_reservation_hold_blocks_back) {
  Fixture f({.num_blocks = 8, .block_size = 4, .watermark_blocks = 2});
  SequenceId a;
  AllocateOptions options{.headroom = {.reserved_blocks = 1, .use_watermark = true}};
  CHECK_EQ(f.Allocate(Count(24), &a, options), Status::kNoRoom);
  CHECK_EQ(f.Allocate(Count(20), &a, options), Status::kOk);
  CHECK_EQ(f.manager.num_free_blocks(), 3);
}

TEST(adopted_free_blocks_count_as_needed) {
  Fixture f({.num_blocks = 4, .block_size = 4});
  SequenceId a, b, c;
  CHECK_EQ(f.Allocate(Count(8), &a), Status::kOk);
  CHECK_EQ(f.manager.Free(a), Status::kOk);
  CHECK_EQ(f.Allocate({9, 9, 9, 9, 9}, &b), Status::kOk);
  CHECK_EQ(f.manager.num_free_blocks(), 2);
  // Two cached and free blocks match; with the third it needs three.
  CHECK_EQ(f.Allocate(Count(9), &c), Status::kNoRoom);
  CHECK_EQ(f.manager.Open(&c), Status::kOk);
  int64_t num_new;
  CHECK_EQ(f.manager.Reserve(c, 8, Ids{0, 1}, {}, &num_new), Status::kOk);
  CHECK_EQ(num_new, 0);
  CHECK_EQ(f.manager.Reserve(c, 8, Ids{0}, {}, &num_new), Status::kNotEmpty);
}

TEST(external_hashes_publish_and_duplicates_find_the_oldest) {
  Fixture f({.num_blocks = 8, .block_size = 4, .null_block = true, .max_events = 16});
  BlockHash hashes[2] = {{1, 1}, {2, 2}};
  SequenceId ids[2];
  int64_t num_new;
  for (SequenceId& id : ids) {
    CHECK_EQ(f.manager.Open(&id), Status::kOk);
    CHECK_EQ(f.manager.Reserve(id, 9, {}, {}, &num_new), Status::kOk);
    Sequence& sequence = *f.manager.FindSequence(id);
    auto hash_of = [&](int64_t i) { return hashes[i]; };
    CHECK_EQ(f.manager.PublishHashes(sequence, 12, 2, hash_of, &num_new), Status::kTooFewHashes);
    CHECK_EQ(f.manager.PublishHashes(sequence, 16, 2, hash_of, &num_new), Status::kBadCount);
    CHECK_EQ(f.manager.PublishHashes(sequence, 9, 2, hash_of, &num_new), Status::kOk);
    CHECK_EQ(num_new, 2);
  }
  BlockId found[2];
  CHECK_EQ(f.manager.Match(hashes, found), 2);
  CHECK_EQ(found[0], 1);
  int64_t num_evicted;
  CHECK_EQ(f.manager.Evict(Ids{1}, &num_evicted), Status::kOk);
  CHECK_EQ(f.manager.Match(hashes, found), 2);
  CHECK_EQ(found[0], 4);  // the second sequence's copy
  CHECK_EQ(f.manager.Evict(Ids{0}, &num_evicted), Status::kBadBlock);
  CHECK(f.manager.events().at(1).parent == hashes[0]);
  CHECK(!f.manager.Reset());
  for (SequenceId id : ids) CHECK_EQ(f.manager.Free(id), Status::kOk);
  CHECK(f.manager.Reset());
  CHECK_EQ(f.manager.Match(hashes, found), 0);
}

TEST(detached_blocks_stay_referenced_until_given_back) {
  Fixture f({.num_blocks = 4, .block_size = 4});
  SequenceId a;
  Ids blocks;
  CHECK_EQ(f.Allocate(Count(8), &a), Status::kOk);
  CHECK_EQ(f.manager.Detach(a, &blocks), Status::kOk);
  CHECK(blocks == (Ids{0, 1}));
  CHECK_EQ(f.manager.num_used_blocks(), 2);
  CHECK_EQ(f.manager.FreeBlocks(Ids{0, 0}), Status::kNotDetached);
  CHECK_EQ(f.manager.FreeBlocks(Ids{1, 9}), Status::kBadBlock);
  CHECK_EQ(f.manager.FreeBlocks(Ids{1, 0}), Status::kOk);
  CHECK(f.FreeOrder() == (Ids{2, 3, 1, 0}));
}

TEST(table_memory_outlives_the_sequence_for_those_who_hold_it) {
  Fixture f({.num_blocks = 64, .block_size = 4});
  SequenceId a, b;
  CHECK_EQ(f.Allocate(Count(8), &a), Status::kOk);
  std::shared_ptr<BlockId[]> view = f.manager.FindSequence(a)->table.shared();
  CHECK_EQ(f.manager.Free(a), Status::kOk);
  CHECK_EQ(f.Allocate(std::vector<int32_t>(200, 5), &b), Status::kOk);
  CHECK_EQ(view[0], 0);
  CHECK_EQ(view[1], 1);
  CHECK(f.manager.FindSequence(a) == nullptr);
}

TEST(sequences_that_stop_knowing_their_tokens_stop_publishing) {
  Fixture f({.num_blocks = 8, .block_size = 4});
  SequenceId a;
  Ids blocks;
  int64_t num_new;
  CHECK_EQ(f.Allocate(Count(4), &a, {.publish = false}), Status::kOk);
  CHECK_EQ(f.manager.num_cached_blocks(), 0);
  CHECK_EQ(f.manager.AppendCount(a, 9, &blocks), Status::kOk);
  CHECK_EQ(f.manager.Publish(a, 13, &num_new), Status::kOk);
  CHECK_EQ(num_new, 1);
  CHECK_EQ(f.manager.Publish(a, 14, &num_new), Status::kBadCount);
}

TEST(shared_block_is_published_once) {
  Fixture f({.num_blocks = 8, .block_size = 4});
  SequenceId a, b;
  BlockCopy copy;
  int64_t num_new;
  CHECK_EQ(f.Allocate(Count(8), &a, {.publish = false}), Status::kOk);
  CHECK_EQ(f.manager.Fork(a, &b, &copy), Status::kOk);
  CHECK_EQ(f.manager.Publish(a, 8, &num_new), Status::kOk);
  CHECK_EQ(num_new, 2);
  CHECK_EQ(f.manager.Publish(b, 8, &num_new), Status::kOk);
  CHECK_EQ(num_new, 0);
  CHECK_EQ(f.manager.FindSequence(b)->num_published, 2);
  CHECK_EQ(f.manager.num_cached_blocks(), 2);
}
