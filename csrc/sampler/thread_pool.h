// A few threads that share out the items of one job at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace twinjet::sampler {

class ThreadPool {
 public:
  // Item index, worker index in 0 .. num_threads - 1.
  using Work = std::function<void(int32_t, int32_t)>;

  // The calling thread is one of num_threads; the others start at the first job that needs them.
  explicit ThreadPool(int num_threads) : num_threads_(num_threads) {}
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls work once for each item in 0 .. num_items - 1, in any order, and returns when all are
  // done. work must not throw. One call at a time.
  void Run(int32_t num_items, const Work& work);

  int num_threads() const { return num_threads_; }

 private:
  void Serve(int32_t worker);
  void TakeItems(const Work& work, int32_t num_items, int32_t worker);

  const int num_threads_;
  std::vector<std::thread> threads_;
  std::atomic<int32_t> next_item_{0};

  std::mutex mutex_;
  std::condition_variable job_posted_;
  std::condition_variable workers_idle_;
  // Guarded by mutex_.
  const Work* work_ = nullptr;  // null between jobs: a thread that wakes late finds nothing
  int32_t num_items_ = 0;
  uint64_t job_number_ = 0;
  int num_working_ = 0;
  bool is_closing_ = false;
};

}  // namespace twinjet::sampler
