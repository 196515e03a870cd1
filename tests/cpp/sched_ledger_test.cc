// KvLedger: what a request costs, what stops one, and random calls that must leave every sum right.
#include <map>

#include "check.h"
#include "sched/kv_ledger.h"

using namespace twinjet;
using sched::Ask;
using sched::HoldingId;
using sched::KvLedger;

namespace {

sched::LedgerOptions Options(int32_t num_blocks, std::optional<double> sigmas, bool shares = true) {
  sched::LedgerOptions options;
  options.blocks = {.num_blocks = num_blocks,
                    .block_size = 4,
                    .prefix_cache = shares,
                    .algorithm = kv::BlockHasher::Algorithm::kSipHash};
  options.num_usable_blocks = num_blocks;
  options.sigmas = sigmas;
  options.num_longest = 400;
  return options;
}

std::vector<kv::BlockHash> HashesOf(const KvLedger& ledger, int32_t family, int64_t num_tokens) {
  std::vector<int32_t> tokens(static_cast<size_t>(num_tokens));
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = family * 1000 + static_cast<int32_t>(i);
  std::vector<kv::BlockHash> hashes(tokens.size() / 4);
  ledger.hasher().HashBlocks(ledger.hasher().Root({}), tokens.data(), hashes);
  return hashes;
}

Ask AskFor(int64_t prompt, int64_t max_tokens, std::span<const kv::BlockHash> hashes, int64_t n = 1) {
  return {.num_prompt_tokens = prompt,
          .num_outputs = n,
          .max_tokens = max_tokens,
          .hashes = hashes,
          .lengths = std::make_shared<sched::LengthEstimator>(10.0)};
}

}  // namespace

TEST(a_published_prefix_counts_once) {
  KvLedger ledger(Options(64, std::nullopt));
  std::vector<kv::BlockHash> hashes = HashesOf(ledger, 1, 17);
  HoldingId first = 0, second = 0;
  CHECK(ledger.Admit(AskFor(17, 4, hashes), &first));
  CHECK_EQ(ledger.num_used_blocks(), 5);
  CHECK_EQ(ledger.FindCached(hashes, 17), 0);
  CHECK(ledger.Publish(first));
  CHECK_EQ(ledger.FindCached(hashes, 17), 16);
  CHECK_EQ(ledger.FindCached(hashes, 16), 12);  // one token is left to compute
  CHECK(ledger.Admit(AskFor(17, 4, hashes), &second));
  CHECK_EQ(*ledger.NumCachedTokens(second), 16);
  CHECK_EQ(ledger.num_used_blocks(), 6);
  CHECK(ledger.Release(first));
  CHECK(ledger.Release(second));
  CHECK_EQ(ledger.num_used_blocks(), 0);
  CHECK_EQ(ledger.Check(), "");
}

TEST(the_greatest_reserve_admits_only_what_can_never_overflow) {
  KvLedger ledger(Options(10, std::nullopt, false));
  HoldingId first = 0, second = 0;
  CHECK(ledger.Admit(AskFor(4, 16, {}), &first));
  CHECK(!ledger.Admit(AskFor(4, 17, {}), &second));
  CHECK(ledger.Admit(AskFor(4, 16, {}), &second));
  for (int i = 0; i < 16; ++i) {
    CHECK(ledger.Append(first, 0, 1));
    CHECK(ledger.Append(second, 0, 1));
  }
  CHECK_EQ(ledger.num_used_blocks(), 10);
  CHECK_EQ(ledger.num_overflows(), 0);
  CHECK_EQ(ledger.Check(), "");
}

TEST(tokens_without_room_are_counted_until_their_request_ends) {
  KvLedger ledger(Options(4, 1.0, false));
  HoldingId alone = 0;
  CHECK(ledger.Admit(AskFor(16, 40, {}), &alone));
  CHECK(ledger.Append(alone, 0, 5));
  CHECK_EQ(ledger.num_overflows(), 5);
  CHECK_EQ(ledger.num_used_blocks(), 6);
  CHECK(ledger.Release(alone));
  CHECK_EQ(ledger.num_used_blocks(), 0);
  CHECK_EQ(ledger.num_overflows(), 5);
}

TEST(unknown_holdings_and_outputs_change_nothing) {
  KvLedger ledger(Options(16, 1.0));
  HoldingId holding = 0;
  std::vector<kv::BlockHash> hashes = HashesOf(ledger, 1, 8);
  CHECK(ledger.Admit(AskFor(8, 4, hashes, 2), &holding));
  for (int64_t index : {-1, 2}) CHECK(!ledger.Append(holding, index, 1));
  CHECK(ledger.Release(holding));
  for (HoldingId gone : {holding, HoldingId{-1}, HoldingId{1} << 50}) {
    CHECK(!ledger.Append(gone, 0, 1));
    CHECK(!ledger.Publish(gone));
    CHECK(!ledger.Release(gone));
    CHECK(!ledger.NumCachedTokens(gone));
  }
  CHECK_EQ(ledger.Check(), "");
}

TEST(random_calls_keep_every_sum) {
  std::mt19937_64 random = test::Random();
  for (int round = 0; round < 60; ++round) {
    bool shares = random() % 2 == 0;
    std::optional<double> sigmas;
    if (random() % 3 != 0) sigmas = static_cast<double>(random() % 4);
    auto num_blocks = static_cast<int32_t>(4 + random() % 60);
    KvLedger ledger(Options(num_blocks, sigmas, shares));
    auto lengths = std::make_shared<sched::LengthEstimator>(20.0);
    std::map<HoldingId, int64_t> running;
    for (int i = 0; i < 300; ++i) {
      auto pick = running.begin();
      if (!running.empty()) std::advance(pick, static_cast<int64_t>(random() % running.size()));
      switch (random() % 5) {
        case 0:
        case 1: {
          auto prompt = static_cast<int64_t>(1 + random() % 60);
          std::vector<kv::BlockHash> hashes;
          if (shares) hashes = HashesOf(ledger, static_cast<int32_t>(random() % 3), prompt);
          int64_t n = random() % 4 == 0 ? 3 : 1;
          Ask ask = AskFor(prompt, static_cast<int64_t>(random() % 100), hashes, n);
          ask.lengths = lengths;
          ask.is_fixed = random() % 4 == 0;
          HoldingId holding = 0;
          bool is_alone = running.empty();
          bool is_held = ledger.Admit(ask, &holding);
          if (is_held) running[holding] = n;
          // Work conservation: alone, whatever can ever be held is.
          if (is_alone && ledger.CanEverHold(prompt, n)) CHECK(is_held);
          break;
        }
        case 2:
          if (running.empty()) break;
          CHECK(ledger.Append(pick->first,
                              static_cast<int64_t>(random() % static_cast<uint64_t>(pick->second)),
                              static_cast<int64_t>(random() % 40)));
          break;
        case 3:
          if (running.empty()) break;
          CHECK(ledger.Publish(pick->first));
          break;
        default:
          if (running.empty()) break;
          CHECK(ledger.Release(pick->first));
          running.erase(pick);
          lengths->Observe(static_cast<int64_t>(random() % 100), random() % 2 == 0);
      }
      CHECK_EQ(ledger.Check(), "");
    }
    for (const auto& [holding, n] : running) CHECK(ledger.Release(holding));
    CHECK_EQ(ledger.num_used_blocks(), 0);
    CHECK(ledger.Reset());
    CHECK_EQ(ledger.Check(), "");
  }
}
