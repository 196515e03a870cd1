// Draws the rows of a batch on several threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>

#include "sampler/kernels.h"
#include "sampler/row.h"

namespace twinjet::sampler {

class BatchSampler {
 public:
  // num_threads >= 1. Memory and threads are made at the first batch that needs them.
  BatchSampler(const Kernels& kernels, int num_threads);
  ~BatchSampler();

  // Fills outputs[i] from inputs[i]. Thread-safe: concurrent calls take turns. A child made by fork
  // may call it whatever the parent was doing. Floating-point modes of the calling thread (rounding,
  // flush to zero) do not matter.
  void Draw(std::span<const RowInput> inputs, std::span<RowOutput> outputs);

  const Kernels& kernels() const { return kernels_; }
  int num_threads() const { return num_threads_; }

 private:
  struct State;
  State& StateOfThisProcess();

  const Kernels& kernels_;
  const int num_threads_;
  std::atomic<State*> state_{nullptr};
};

}  // namespace twinjet::sampler
