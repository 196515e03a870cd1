// BlockPool and PrefixCache alone: order of the free queue, duplicates, and probing under deletion.
#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "check.h"
#include "kv/block_pool.h"
#include "kv/event_log.h"
#include "kv/prefix_cache.h"

using namespace twinjet::kv;

namespace {

std::vector<BlockId> FreeOrder(const BlockPool& pool) {
  std::vector<BlockId> order;
  for (BlockId b = pool.NextFree(kNoBlock); b != kNoBlock; b = pool.NextFree(b)) order.push_back(b);
  return order;
}

BlockPool::Chain ChainOf(BlockPool& pool, const std::vector<BlockId>& blocks) {
  BlockPool::Chain chain;
  for (BlockId block : blocks) {
    CHECK(pool.Unref(block));
    pool.AddToChain(&chain, block);
  }
  return chain;
}

}  // namespace

TEST(fresh_pool_hands_out_by_id_and_skips_the_null_block) {
  BlockPool pool(4, true);
  CHECK_EQ(pool.num_free(), 3);
  for (BlockId expected : {1, 2, 3}) CHECK_EQ(pool.Pop(), expected);
  CHECK_EQ(pool.num_free(), 0);
  CHECK(!pool.IsValid(0));
  CHECK(!pool.IsValid(4));
}

TEST(chains_keep_their_order_at_either_end) {
  BlockPool pool(6, false);
  for (int i = 0; i < 5; ++i) pool.Pop();  // 5 stays free
  pool.Prepend(ChainOf(pool, {3, 1}));
  pool.Append(ChainOf(pool, {0, 4}));
  pool.Append({});
  CHECK(FreeOrder(pool) == (std::vector<BlockId>{3, 1, 5, 0, 4}));
  pool.Ref(5);  // out of the middle
  CHECK(FreeOrder(pool) == (std::vector<BlockId>{3, 1, 0, 4}));
  CHECK_EQ(pool.num_free(), 4);
}

TEST(one_block_pool_works) {
  BlockPool pool(1, false);
  CHECK_EQ(pool.Pop(), 0);
  CHECK_EQ(pool.NextFree(kNoBlock), kNoBlock);
  pool.Append(ChainOf(pool, {0}));
  CHECK_EQ(pool.Pop(), 0);
}

TEST(cache_behaves_as_a_map_to_oldest_under_random_use) {
  // Few distinct hashes make duplicates; home slots crowded on purpose make long clusters.
  std::mt19937_64 random = test::Random();
  constexpr int32_t kBlocks = 32;
  PrefixCache cache(kBlocks, {random(), random()});
  std::map<uint64_t, std::deque<BlockId>> model;
  std::map<BlockId, uint64_t> hash_of;
  for (int step = 0; step < 200000; ++step) {
    auto block = static_cast<BlockId>(random() % kBlocks);
    auto known = hash_of.find(block);
    CHECK_EQ(cache.Contains(block), known != hash_of.end());
    if (known == hash_of.end()) {
      uint64_t value = random() % 24;
      cache.Insert({value, value * 0x9e3779b97f4a7c15}, block);
      model[value].push_back(block);
      hash_of[block] = value;
    } else {
      cache.Erase(block);
      auto& blocks = model[known->second];
      blocks.erase(std::find(blocks.begin(), blocks.end(), block));
      hash_of.erase(known);
    }
    CHECK_EQ(cache.size(), static_cast<int32_t>(hash_of.size()));
    for (uint64_t value = 0; value < 24; ++value) {
      const auto& blocks = model[value];
      BlockId expected = blocks.empty() ? kNoBlock : blocks.front();
      CHECK_EQ(cache.Find({value, value * 0x9e3779b97f4a7c15}), expected);
    }
    if (step % 20000 == 19999) {
      cache.Clear();
      model.clear();
      hash_of.clear();
    }
  }
}

TEST(find_run_stops_at_the_first_miss) {
  constexpr int32_t kBlocks = 100;
  PrefixCache cache(kBlocks, {1, 2});
  std::vector<BlockHash> hashes(kBlocks);
  for (size_t i = 0; i < hashes.size(); ++i) hashes[i] = {i + 1, ~i};
  for (BlockId i = 0; i < kBlocks; ++i) {
    if (i != 70) cache.Insert(hashes[i], i);
  }
  std::vector<BlockId> found(kBlocks, kNoBlock);
  CHECK_EQ(cache.FindRun(hashes, found.data()), 70);
  for (BlockId i = 0; i < 70; ++i) CHECK_EQ(found[i], i);
  CHECK_EQ(cache.FindRun({}, found.data()), 0);
}

TEST(event_log_encodes_chains_as_one_record_and_tells_what_was_lost) {
  EventLog log(4, 2);
  const int32_t tokens[] = {4, 5};
  BlockHash hashes[] = {{1, 0}, {2, 0}, {3, 0}, {4, 0}};
  for (BlockId i = 0; i < 4; ++i) log.Stored(i, hashes[i], i ? &hashes[i - 1] : nullptr, tokens, 7);
  log.Removed(0, hashes[0]);  // makes the first stored one drop
  std::string bytes;
  log.Encode(2, &bytes);
  CHECK_EQ(log.size(), 2u);
  auto record_at = [&bytes](size_t offset) {
    EventLog::Record record;
    std::memcpy(&record, bytes.data() + offset, sizeof(record));
    return record;
  };
  EventLog::Record lost = record_at(0);
  CHECK(lost.kind == EventLog::Record::Kind::kLost);
  CHECK_EQ(lost.num_blocks, 1u);
  EventLog::Record stored = record_at(sizeof(lost));
  CHECK(stored.kind == EventLog::Record::Kind::kStored);
  CHECK_EQ(stored.num_blocks, 2u);
  CHECK_EQ(stored.num_tokens, 2u);
  CHECK_EQ(stored.tag, 7u);
  CHECK(stored.has_parent == 1 && stored.parent == hashes[0]);
  CHECK_EQ(bytes.size(), 2 * sizeof(lost) + 2 * (16 + 8));
  bytes.clear();
  log.Encode(100, &bytes);
  CHECK_EQ(log.size(), 0u);
  CHECK(record_at(0).kind == EventLog::Record::Kind::kStored);
  CHECK(record_at(sizeof(lost) + 16 + 8).kind == EventLog::Record::Kind::kRemoved);
  bytes.clear();
  log.Encode(100, &bytes);
  CHECK(bytes.empty());
}

TEST(event_log_drops_the_oldest_and_numbers_show_the_gap) {
  EventLog log(3, 2);
  const int32_t tokens[] = {4, 5};
  BlockHash parent = {1, 1};
  for (BlockId i = 0; i < 4; ++i)
    log.Stored(i, {0, static_cast<uint64_t>(i)}, i ? &parent : nullptr, tokens, 7);
  log.Removed(9, {7, 7});
  CHECK_EQ(log.size(), 3u);
  CHECK_EQ(log.num_dropped(), 2u);
  CHECK_EQ(log.at(0).sequence_number, 2u);
  CHECK_EQ(log.at(0).block, 2);
  CHECK_EQ(log.tokens(0).size(), 2u);
  CHECK_EQ(log.tokens(0)[1], 5);
  CHECK(log.at(2).kind == Event::Kind::kRemoved);
  CHECK(log.tokens(2).empty());
  log.Drain();
  log.Cleared();
  CHECK_EQ(log.at(0).sequence_number, 5u);
}
