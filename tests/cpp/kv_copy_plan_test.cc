// Waves of block copies against the same list carried out one copy at a time.
#include <set>

#include "check.h"
#include "kv/cuda/copy_plan.h"

using namespace twinjet::kv;

TEST(waves_give_what_the_list_gives) {
  std::mt19937_64 random = test::Random();
  for (int round = 0; round < 4000; ++round) {
    const size_t num_blocks = 2 + random() % 12;
    std::vector<BlockCopy> list(random() % 20);
    for (BlockCopy& copy : list) {
      copy = {static_cast<BlockId>(random() % num_blocks), static_cast<BlockId>(random() % num_blocks)};
    }
    std::vector<int> expected(num_blocks);
    for (size_t i = 0; i < num_blocks; ++i) expected[i] = static_cast<int>(i);
    std::vector<int> contents = expected;
    for (const BlockCopy& copy : list) {
      expected[static_cast<size_t>(copy.destination)] = expected[static_cast<size_t>(copy.source)];
    }
    const cuda::CopyPlan plan = cuda::PlanCopies(list);
    size_t begin = 0;
    for (int32_t end : plan.wave_ends) {
      std::set<BlockId> written, read;
      for (size_t i = begin; i < static_cast<size_t>(end); ++i) {
        CHECK(written.insert(plan.copies[i].destination).second);
        read.insert(plan.copies[i].source);
      }
      for (BlockId block : written) CHECK(read.count(block) == 0);
      // All at once: every source is read before any destination is written.
      const std::vector<int> before = contents;
      for (size_t i = begin; i < static_cast<size_t>(end); ++i) {
        contents[static_cast<size_t>(plan.copies[i].destination)] =
            before[static_cast<size_t>(plan.copies[i].source)];
      }
      begin = static_cast<size_t>(end);
    }
    CHECK_EQ(begin, plan.copies.size());
    CHECK(contents == expected);
  }
}

TEST(independent_copies_share_a_wave) {
  const std::vector<BlockCopy> list = {{0, 4}, {1, 5}, {0, 6}, {3, 3}};
  const cuda::CopyPlan plan = cuda::PlanCopies(list);
  CHECK_EQ(plan.copies.size(), size_t{3});
  CHECK_EQ(plan.wave_ends.size(), size_t{1});
}
