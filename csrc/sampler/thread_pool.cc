#include "sampler/thread_pool.h"

namespace twinjet::sampler {

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    is_closing_ = true;
  }
  job_posted_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::TakeItems(const Work& work, int32_t num_items, int32_t worker) {
  for (int32_t i = next_item_.fetch_add(1); i < num_items; i = next_item_.fetch_add(1)) work(i, worker);
}

void ThreadPool::Run(int32_t num_items, const Work& work) {
  if (num_threads_ == 1 || num_items <= 1) {
    for (int32_t i = 0; i < num_items; ++i) work(i, 0);
    return;
  }
  while (threads_.size() + 1 < static_cast<size_t>(num_threads_)) {
    const int32_t worker = static_cast<int32_t>(threads_.size()) + 1;
    threads_.emplace_back([this, worker] { Serve(worker); });
  }
  next_item_.store(0);
  {
    const std::lock_guard lock(mutex_);
    work_ = &work;
    num_items_ = num_items;
    ++job_number_;
  }
  job_posted_.notify_all();
  TakeItems(work, num_items, 0);
  std::unique_lock lock(mutex_);
  work_ = nullptr;
  workers_idle_.wait(lock, [this] { return num_working_ == 0; });
}

void ThreadPool::Serve(int32_t worker) {
  uint64_t last_job = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    job_posted_.wait(lock, [&] { return is_closing_ || job_number_ != last_job; });
    if (is_closing_) return;
    last_job = job_number_;
    if (work_ == nullptr) continue;
    const Work& work = *work_;
    const int32_t num_items = num_items_;
    ++num_working_;
    lock.unlock();
    TakeItems(work, num_items, worker);
    lock.lock();
    if (--num_working_ == 0) workers_idle_.notify_one();
  }
}

}  // namespace twinjet::sampler
