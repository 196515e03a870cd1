// Threads: one hasher shared by many, and managers used one caller at a time under a lock.
#include <mutex>
#include <numeric>
#include <thread>

#include "check.h"
#include "kv/block_manager.h"

using namespace twinjet::kv;

TEST(hasher_is_shared_while_the_manager_changes) {
  BlockManager manager({.num_blocks = 256, .block_size = 16});
  std::vector<int32_t> tokens(2048);
  std::iota(tokens.begin(), tokens.end(), 0);
  std::vector<BlockHash> expected(tokens.size() / 16);
  BlockHash root = manager.hasher().Root({});
  manager.hasher().HashBlocks(root, tokens.data(), expected);

  std::mutex lock;
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < 200; ++round) {
        std::vector<BlockHash> hashes(expected.size());
        manager.hasher().HashBlocks(root, tokens.data(), hashes);
        wrong[t] += hashes != expected;
        std::lock_guard<std::mutex> held(lock);
        SequenceId id;
        Status status = manager.Allocate(tokens, hashes, root, {}, &id);
        if (status != Status::kOk) {
          ++wrong[t];
          continue;
        }
        wrong[t] += round > 0 && manager.FindSequence(id)->num_cached_tokens != 2032;
        wrong[t] += manager.Free(id) != Status::kOk;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int count : wrong) CHECK_EQ(count, 0);
  CHECK_EQ(manager.Check(), std::string());
}
