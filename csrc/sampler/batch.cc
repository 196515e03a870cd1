#include "sampler/batch.h"

#include <unistd.h>

#include <mutex>
#include <vector>

#include "sampler/thread_pool.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace twinjet::sampler {
namespace {

// Round to nearest, subnormals kept, exceptions masked, for the lifetime of the object.
class DefaultFloatModes {
 public:
#if defined(__SSE__)
  DefaultFloatModes() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatModes() { _mm_setcsr(saved_); }
#else
  DefaultFloatModes() = default;
#endif
  DefaultFloatModes(const DefaultFloatModes&) = delete;
  DefaultFloatModes& operator=(const DefaultFloatModes&) = delete;

 private:
#if defined(__SSE__)
  unsigned saved_;
#endif
};

// The row that the thread which draws row i takes next if all rows take as long, or null.
const float* RowAfter(std::span<const RowInput> inputs, size_t i, int num_threads) {
  const size_t next = i + static_cast<size_t>(num_threads);
  if (next >= inputs.size() || inputs[next].dtype != Dtype::kFloat32) return nullptr;
  if (inputs[next].vocab_size < inputs[i].vocab_size) return nullptr;
  return static_cast<const float*>(inputs[next].logits);
}

}  // namespace

struct BatchSampler::State {
  explicit State(int num_threads) : process(getpid()), pool(num_threads), workspaces(num_threads) {}

  const pid_t process;
  std::mutex mutex;
  ThreadPool pool;
  std::vector<Workspace> workspaces;
};

BatchSampler::BatchSampler(const Kernels& kernels, int num_threads)
    : kernels_(kernels), num_threads_(num_threads) {}

BatchSampler::~BatchSampler() {
  State* state = state_.load();
  if (state != nullptr && state->process == getpid()) delete state;
}

// A forked child has none of the parent's threads, and its copy of the mutex may be locked for ever:
// the parent's state is left as it is and a new one takes its place.
BatchSampler::State& BatchSampler::StateOfThisProcess() {
  State* state = state_.load();
  if (state != nullptr && state->process == getpid()) return *state;
  State* fresh = new State(num_threads_);
  if (state_.compare_exchange_strong(state, fresh)) return *fresh;
  delete fresh;
  return *state;
}

void BatchSampler::Draw(std::span<const RowInput> inputs, std::span<RowOutput> outputs) {
  State& state = StateOfThisProcess();
  const std::lock_guard lock(state.mutex);
  state.pool.Run(static_cast<int32_t>(inputs.size()), [&](int32_t row, int32_t worker) {
    const DefaultFloatModes modes;
    const size_t i = static_cast<size_t>(row);
    RowInput input = inputs[i];
    input.ahead = RowAfter(inputs, i, num_threads_);
    DrawRow(kernels_, input, &state.workspaces[static_cast<size_t>(worker)], &outputs[i]);
  });
}

}  // namespace twinjet::sampler
