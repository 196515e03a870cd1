// A block's view of its row and the exchanges between the row's blocks.
#pragma once

#include "sampler/cuda/cluster.cuh"
#include "sampler/cuda/plan.h"

namespace twinjet::sampler::cuda {

// Where a block stands. All members are the same in all of its threads.
struct Block {
  Cluster cluster;
  SharedHead* head;
  uint64_t* group_mass;  // [groups_per_block]
  float* group_max;      // [groups_per_block]
  float* slice;          // [num_local * kGroupSize], filled up with -inf
  char* gathered;        // see SharedLayout
  int32_t first_group;   // of the row
  int32_t num_local;     // groups of this block; may be 0
  int32_t groups_per_block;
  int32_t num_groups;  // of the row
  uint32_t exchange;   // number of the next exchange of mail
  uint32_t listing;    // number of the next exchange of lists
  bool is_arriving;    // a bulk copy fills the slice's whole groups; wait for head->arrival
};

// The group a lane works on in pass `pass`, within the block; lane_in_group in 0 .. 7.
__device__ __forceinline__ int32_t GroupOfLane(int32_t pass) {
  return pass * kGroupsPerPass + static_cast<int32_t>(threadIdx.x) / kLanesPerGroup;
}
__device__ __forceinline__ int32_t LaneInGroup() {
  return static_cast<int32_t>(threadIdx.x) % kLanesPerGroup;
}

// Lane lane_in_group's float4 number i (0 .. 7) of a group in shared memory: eight lanes read 128
// consecutive bytes, which no two of them share a bank in.
__device__ __forceinline__ int32_t FloatFourOfLane(int32_t group, int32_t i) {
  return group * (kGroupSize / 4) + i * kLanesPerGroup + LaneInGroup();
}

struct MaxOf {
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};
struct MinOf {
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a < b ? a : b; }
};
struct SumOf {
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};

template <class Op>
__device__ __forceinline__ uint64_t ReduceWarp(uint64_t value, Op op) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = op(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

// Sends by_warp's combination of kCount words to every block and waits for theirs; returns the mail. In a
// cluster of one nothing is sent, and the mail is the block's own.
template <int kCount, class Combine>
__device__ __forceinline__ auto* ExchangeMail(Block& block, Combine combine) {
  SharedHead& head = *block.head;
  const uint32_t set = block.exchange & 1;
  const uint32_t phase = block.exchange >> 1 & 1;
  ++block.exchange;
  auto* mail = head.mail[set];
  if (block.cluster.size == 1) {
    if (threadIdx.x < kCount) mail[0][threadIdx.x] = combine(threadIdx.x);
    __syncthreads();
    return mail;
  }
  if (threadIdx.x == 0) ExpectBytes(&head.mail_arrival[set], block.cluster.size * kCount * 8);
  if (threadIdx.x < block.cluster.size * kCount) {
    const uint32_t i = threadIdx.x % kCount;
    SendRemote(&mail[block.cluster.rank][i], combine(i), &head.mail_arrival[set], threadIdx.x / kCount);
  }
  WaitPhase(&head.mail_arrival[set], phase);
  return mail;
}

// Every thread of every block of the row gets the combination of all threads' values.
template <int kCount, class Op>
__device__ __forceinline__ void AllReduce(Block& block, uint64_t (&values)[kCount], Op op) {
  SharedHead& head = *block.head;
  __syncthreads();  // by_warp may be read still from the last call
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint64_t value = ReduceWarp(values[i], op);
    if (threadIdx.x % 32 == 0) head.by_warp[threadIdx.x / 32][i] = value;
  }
  __syncthreads();
  auto* mail = ExchangeMail<kCount>(block, [&](uint32_t i) {
    uint64_t value = head.by_warp[0][i];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) value = op(value, head.by_warp[w][i]);
    return value;
  });
  if (kCount <= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = mail[0][i];
      for (uint32_t r = 1; r < block.cluster.size; ++r) values[i] = op(values[i], mail[r][i]);
    }
    return;
  }
  if (threadIdx.x < kCount) {
    uint64_t value = mail[0][threadIdx.x];
    for (uint32_t r = 1; r < block.cluster.size; ++r) value = op(value, mail[r][threadIdx.x]);
    head.totals[threadIdx.x] = value;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = head.totals[i];
}

// A runner of a race: time as the bits of a positive double, which order as the times do.
struct Runner {
  uint64_t time;
  uint64_t index;
};
constexpr uint64_t kNeverArrives = ~0ull;

__device__ __forceinline__ Runner Earlier(const Runner& a, const Runner& b) {
  return b.time < a.time || (b.time == a.time && b.index < a.index) ? b : a;
}

// The block's earliest runner, in all threads.
__device__ __forceinline__ Runner EarliestInBlock(Block& block, Runner runner) {
  SharedHead& head = *block.head;
  __syncthreads();  // by_warp is read by all threads below, and may be still from the last call
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    runner = Earlier(runner,
                     {__shfl_xor_sync(~0u, runner.time, offset), __shfl_xor_sync(~0u, runner.index, offset)});
  }
  if (threadIdx.x % 32 == 0) {
    head.by_warp[threadIdx.x / 32][0] = runner.time;
    head.by_warp[threadIdx.x / 32][1] = runner.index;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) runner = Earlier(runner, {head.by_warp[w][0], head.by_warp[w][1]});
  return runner;
}

// The row's earliest runner, in all threads of all blocks.
__device__ __forceinline__ Runner EarliestInRow(Block& block, Runner runner) {
  runner = EarliestInBlock(block, runner);
  auto* mail = ExchangeMail<2>(block, [&](uint32_t i) { return i == 0 ? runner.time : runner.index; });
  Runner earliest = {mail[0][0], mail[0][1]};
  for (uint32_t r = 1; r < block.cluster.size; ++r) earliest = Earlier(earliest, {mail[r][0], mail[r][1]});
  return earliest;
}

}  // namespace twinjet::sampler::cuda
