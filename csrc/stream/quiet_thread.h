// A thread that takes none of the process's signals, which are for the threads that were there before.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <thread>
#include <utility>

namespace twinjet::stream {

template <typename Function>
std::thread StartQuietThread(Function run) {
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  std::thread thread(std::move(run));
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

}  // namespace twinjet::stream
