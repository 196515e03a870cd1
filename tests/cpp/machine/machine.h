// Clusters of blocks on the host: the kernels' own source runs here, a fiber for each thread. What runs next,
// and when a copy or a message to another block arrives, is drawn at random, so an order that hardware may
// take once in a while is taken here often. It sees waits without end, messages to blocks that have ended,
// and results that depend on the order of what lies between two waits; not races inside that.
//
// Include it after all standard headers and before the kernels' headers.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace machine {

constexpr uint32_t kThreadsOfBlock = 128;
constexpr size_t kStackBytes = 256 << 10;

struct Index {
  uint32_t x;
};

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  uint32_t block = 0;
  Index thread = {0};
  uint64_t cluster_turn = 0;
  bool has_ended = false;
};
using Waiters = std::vector<Fiber*>;

// 32 lanes, or a block, that meet. Values of one meeting are read while those of the next come in.
template <size_t kSize>
struct Meeting {
  uint64_t values[2][kSize];
  uint32_t arrived = 0;
  uint64_t turn = 0;
  Waiters waiters;
};

struct PhaseBarrier {
  int64_t bytes = 0;
  bool has_arrival = false;
  uint32_t phase = 0;
  Waiters waiters;
};

struct BlockState {
  std::vector<char> memory;
  char* shared = nullptr;
  Meeting<32> warps[kThreadsOfBlock / 32];
  Meeting<kThreadsOfBlock> all;
  std::map<const void*, PhaseBarrier> barriers;
  uint32_t num_ended = 0;
};

struct ClusterState {
  uint32_t arrived = 0;
  uint64_t turn = 0;
  Waiters waiters;
};

class Machine {
 public:
  Machine(uint32_t num_clusters, uint32_t cluster_size, size_t shared_bytes, uint64_t seed)
      : size_(cluster_size), blocks_(num_clusters * cluster_size), clusters_(num_clusters), random_(seed) {
    for (BlockState& block : blocks_) {
      block.memory.assign(shared_bytes + 128, '\x5a');
      const auto begin = reinterpret_cast<uintptr_t>(block.memory.data());
      block.shared = reinterpret_cast<char*>((begin + 127) / 128 * 128);
    }
    arrives_early_ = random_() % 2 == 0;
  }

  static Machine*& Current() {
    static Machine* current = nullptr;
    return current;
  }
  Fiber& fiber() { return *running_; }
  BlockState& block() { return blocks_[running_->block]; }
  uint32_t cluster_size() const { return size_; }
  uint32_t num_blocks() const { return static_cast<uint32_t>(blocks_.size()); }
  uint32_t rank() const { return running_->block % size_; }

  // Runs body in every thread. Throws where threads wait for what cannot come any more.
  void Run(const std::function<void()>& body) {
    body_ = &body;
    Current() = this;
    static std::vector<std::unique_ptr<Fiber>> pool;
    const size_t number = blocks_.size() * kThreadsOfBlock;
    while (pool.size() < number) {
      pool.push_back(std::make_unique<Fiber>());
      void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      pool.back()->stack = static_cast<char*>(stack);
    }
    ready_.clear();
    for (size_t i = 0; i < number; ++i) {
      Fiber& fiber = *pool[i];
      fiber.block = static_cast<uint32_t>(i / kThreadsOfBlock);
      fiber.thread.x = static_cast<uint32_t>(i % kThreadsOfBlock);
      fiber.has_ended = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &main_;
      makecontext(&fiber.context, &Machine::Enter, 0);
      ready_.push_back(&fiber);
    }
    size_t left = number;
    uint64_t steps = 0;
    while (left > 0) {
      if (steps++ % 512 == 0) favoured_ = static_cast<uint32_t>(random_() % blocks_.size());
      const bool delivers =
          !under_way_.empty() && (ready_.empty() || random_() % (arrives_early_ ? 2 : 64) == 0);
      if (delivers) {
        Deliver();
        continue;
      }
      if (ready_.empty()) Fail("all threads wait; " + Waiting());
      running_ = TakeReady();
      swapcontext(&main_, &running_->context);
      if (!failure_.empty()) Fail(failure_);
      if (!running_->has_ended) continue;
      --left;
      ++blocks_[running_->block].num_ended;
    }
    if (!under_way_.empty()) Fail("messages are under way to blocks that have ended");
    Current() = nullptr;
  }

  // Now and then lets others go on first.
  void MayYield() {
    if (random_() % 16 != 0) return;
    ready_.push_back(running_);
    swapcontext(&running_->context, &main_);
  }

  void Park(Waiters& waiters) {
    waiters.push_back(running_);
    swapcontext(&running_->context, &main_);
  }

  template <size_t kSize>
  const uint64_t* Meet(Meeting<kSize>& meeting, uint32_t place, uint64_t value) {
    const uint64_t turn = meeting.turn;
    uint64_t* values = meeting.values[turn % 2];
    values[place] = value;
    if (++meeting.arrived == kSize) {
      meeting.arrived = 0;
      ++meeting.turn;
      Wake(meeting.waiters);
    } else {
      while (meeting.turn == turn) Park(meeting.waiters);
    }
    return values;
  }
  const uint64_t* MeetWarp(uint64_t value) {
    const uint32_t thread = running_->thread.x;
    return Meet(block().warps[thread / 32], thread % 32, value);
  }
  const uint64_t* MeetBlock(uint64_t value) { return Meet(block().all, running_->thread.x, value); }

  void ArriveAtCluster() {
    ClusterState& cluster = clusters_[running_->block / size_];
    running_->cluster_turn = cluster.turn;
    if (++cluster.arrived < size_ * kThreadsOfBlock) return;
    cluster.arrived = 0;
    ++cluster.turn;
    Wake(cluster.waiters);
  }
  void WaitForCluster() {
    ClusterState& cluster = clusters_[running_->block / size_];
    while (cluster.turn == running_->cluster_turn) Park(cluster.waiters);
  }

  void InitBarrier(const void* barrier) { block().barriers[barrier] = {}; }
  void ExpectBytes(const void* barrier, uint32_t bytes) {
    MayYield();
    PhaseBarrier& state = BarrierOf(barrier);
    if (state.has_arrival) failure_ = "a phase was expected before the last one ended";
    state.has_arrival = true;
    state.bytes += bytes;
    EndPhase(state);
  }
  void WaitPhase(const void* barrier, uint32_t phase) {
    PhaseBarrier& state = BarrierOf(barrier);
    while (state.phase == phase) Park(state.waiters);
    MayYield();
  }

  // What `local`, in this block's shared memory, is in block `rank` of its cluster.
  template <class T>
  T* InBlock(T* local, uint32_t rank) {
    const uint32_t target = running_->block / size_ * size_ + rank;
    return reinterpret_cast<T*>(blocks_[target].shared +
                                (reinterpret_cast<const char*>(local) - block().shared));
  }
  // Does `write` some time later and counts the bytes at the barrier of block `rank`.
  void Send(std::function<void()> write, const void* barrier, uint32_t rank, uint32_t bytes) {
    MayYield();
    under_way_.push_back({std::move(write), InBlock(static_cast<const char*>(barrier), rank),
                          running_->block / size_ * size_ + rank, bytes});
  }

 private:
  struct Message {
    std::function<void()> write;
    const void* barrier;
    uint32_t block;
    uint32_t bytes;
  };

  static void Enter() {
    Machine* machine = Current();
    Fiber* fiber = machine->running_;
    (*machine->body_)();
    fiber->has_ended = true;
  }

  [[noreturn]] static void Fail(const std::string& what) {
    Current() = nullptr;
    throw std::runtime_error(what);
  }

  Fiber* TakeReady() {
    size_t at = random_() % ready_.size();
    for (int i = 0; i < 3 && ready_[at]->block != favoured_; ++i) at = random_() % ready_.size();
    Fiber* fiber = ready_[at];
    ready_[at] = ready_.back();
    ready_.pop_back();
    return fiber;
  }

  void Wake(Waiters& waiters) {
    ready_.insert(ready_.end(), waiters.begin(), waiters.end());
    waiters.clear();
  }

  // Of the block whose thread runs.
  PhaseBarrier& BarrierOf(const void* barrier) {
    auto& barriers = block().barriers;
    const auto place = barriers.find(barrier);
    if (place != barriers.end()) return place->second;
    failure_ = "a barrier was used that its block has not made";
    swapcontext(&running_->context, &main_);  // for good
    return barriers[barrier];
  }

  void EndPhase(PhaseBarrier& state) {
    if (!state.has_arrival || state.bytes != 0) return;
    state.has_arrival = false;
    state.phase ^= 1;
    Wake(state.waiters);
  }

  void Deliver() {
    std::swap(under_way_[random_() % under_way_.size()], under_way_.back());
    const Message message = std::move(under_way_.back());
    under_way_.pop_back();
    if (blocks_[message.block].num_ended > 0) Fail("a message came to a block that was ending");
    message.write();
    const auto place = blocks_[message.block].barriers.find(message.barrier);
    if (place == blocks_[message.block].barriers.end()) Fail("a message came before its barrier was made");
    PhaseBarrier& state = place->second;
    state.bytes -= message.bytes;
    EndPhase(state);
  }

  std::string Waiting() const {
    std::string text;
    for (size_t b = 0; b < blocks_.size(); ++b) {
      const BlockState& block = blocks_[b];
      text += "block " + std::to_string(b) + ": " + std::to_string(block.num_ended) + " ended, " +
              std::to_string(block.all.waiters.size()) + " at its barrier";
      for (const auto& [place, barrier] : block.barriers) {
        if (barrier.waiters.empty()) continue;
        text += ", " + std::to_string(barrier.waiters.size()) + " at byte " +
                std::to_string(static_cast<const char*>(place) - block.shared) + " with " +
                std::to_string(barrier.bytes) + " bytes to come";
      }
      text += "; ";
    }
    return text;
  }

  uint32_t size_;
  std::vector<BlockState> blocks_;
  std::vector<ClusterState> clusters_;
  std::mt19937_64 random_;
  bool arrives_early_ = false;
  uint32_t favoured_ = 0;
  const std::function<void()>* body_ = nullptr;
  Fiber* running_ = nullptr;
  ucontext_t main_ = {};
  Waiters ready_;
  std::vector<Message> under_way_;
  std::string failure_;
};

inline Machine& Now() { return *Machine::Current(); }

template <class T>
uint64_t BitsOf(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T ValueOf(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
inline uint32_t Lane() { return Now().fiber().thread.x % 32; }

}  // namespace machine

// ---- CUDA's words ----

#define __device__
#define __forceinline__ inline
#define __noinline__
#define threadIdx (machine::Now().fiber().thread)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint32_t __float_as_uint(float x) { return machine::ValueOf<uint32_t>(machine::BitsOf(x)); }
inline float __uint_as_float(uint32_t x) { return machine::ValueOf<float>(machine::BitsOf(x)); }
inline double __longlong_as_double(long long x) { return machine::ValueOf<double>(machine::BitsOf(x)); }
inline long long __double_as_longlong(double x) { return machine::ValueOf<long long>(machine::BitsOf(x)); }
// For a of 2^52 and more, as the kernels have it: a unit of it is 1.
inline double __dadd_rz(double a, double b) { return a + std::floor(b); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t atomicAdd(uint32_t* place, uint32_t value) {
  machine::Now().MayYield();
  const uint32_t before = *place;
  *place += value;
  return before;
}

inline void __syncthreads() { machine::Now().MeetBlock(0); }
inline int __syncthreads_or(int value) {
  const uint64_t* all = machine::Now().MeetBlock(value != 0 ? 1 : 0);
  return *std::max_element(all, all + machine::kThreadsOfBlock) != 0 ? 1 : 0;
}
inline void __syncwarp() { machine::Now().MeetWarp(0); }
template <class T>
T __shfl_sync(uint32_t, T value, int lane) {
  return machine::ValueOf<T>(machine::Now().MeetWarp(machine::BitsOf(value))[lane]);
}
template <class T>
T __shfl_xor_sync(uint32_t, T value, int offset) {
  const uint64_t* all = machine::Now().MeetWarp(machine::BitsOf(value));
  return machine::ValueOf<T>(all[machine::Lane() ^ static_cast<uint32_t>(offset)]);
}
template <class T>
T __shfl_up_sync(uint32_t, T value, int offset) {
  const uint64_t* all = machine::Now().MeetWarp(machine::BitsOf(value));
  const int from = static_cast<int>(machine::Lane()) - offset;
  return from < 0 ? value : machine::ValueOf<T>(all[from]);
}
inline uint32_t __ballot_sync(uint32_t, bool value) {
  const uint64_t* all = machine::Now().MeetWarp(value ? 1 : 0);
  uint32_t bits = 0;
  for (uint32_t i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(all[i]) << i;
  return bits;
}
inline int __any_sync(uint32_t mask, bool value) { return __ballot_sync(mask, value) != 0 ? 1 : 0; }
template <class T>
T __reduce_add_sync(uint32_t, T value) {
  const uint64_t* all = machine::Now().MeetWarp(machine::BitsOf(value));
  T sum = 0;
  for (int i = 0; i < 32; ++i) sum += machine::ValueOf<T>(all[i]);
  return sum;
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  const uint64_t* all = machine::Now().MeetWarp(value);
  return static_cast<uint32_t>(*std::max_element(all, all + 32));
}
inline uint32_t __reduce_min_sync(uint32_t, uint32_t value) {
  const uint64_t* all = machine::Now().MeetWarp(value);
  return static_cast<uint32_t>(*std::min_element(all, all + 32));
}
