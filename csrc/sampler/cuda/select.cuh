// The thresholds of top-k and top-p over a row that lies in its blocks' slices; see search.h.
#pragma once

#include "sampler/cuda/mass.cuh"

namespace twinjet::sampler::cuda {

// Lists this block's tokens of the bracket in head.list, and tells all blocks how many each one has.
// Returns the row's number; above kMaxCandidates it is a lower bound and the lists are of no use.
__device__ __forceinline__ uint32_t Collect(Block& block, const Bracket& bracket) {
  SharedHead& head = *block.head;
  const auto* slice = reinterpret_cast<const float4*>(block.slice);
  const float lo = FloatFromKey(bracket.lo);
  const float last = FloatFromKey(bracket.hi - 1);
  if (threadIdx.x == 0) head.list_size = 0;
  __syncthreads();
  const int32_t passes = (block.num_local + kGroupsPerPass - 1) / kGroupsPerPass;
  for (int32_t pass = 0; pass < passes; ++pass) {
    const int32_t group = GroupOfLane(pass);
    const bool active = group < block.num_local && block.group_max[group] >= lo;
    if (!__any_sync(~0u, active)) continue;
    uint32_t found = 0;  // bit of each of the lane's 32 tokens
    if (active) {
#pragma unroll
      for (int i = 0; i < kTokensPerLane / 4; ++i) {
        const float4 x = slice[FloatFourOfLane(group, i)];
        found |= (x.x >= lo && x.x <= last ? 1u : 0u) << (4 * i);
        found |= (x.y >= lo && x.y <= last ? 2u : 0u) << (4 * i);
        found |= (x.z >= lo && x.z <= last ? 4u : 0u) << (4 * i);
        found |= (x.w >= lo && x.w <= last ? 8u : 0u) << (4 * i);
      }
    }
    if (found == 0) continue;
    const int32_t number = __popc(found);
    int32_t place = atomicAdd(&head.list_size, number);
    while (found != 0 && place < kMaxCandidates) {
      const int32_t bit = __ffs(static_cast<int>(found)) - 1;
      found &= found - 1;
      head.list[place++] = block.slice[4 * FloatFourOfLane(group, bit / 4) + bit % 4];
    }
  }
  __syncthreads();
  auto* mail = head.mail[block.parity];
  block.parity ^= 1;
  if (threadIdx.x < block.cluster.size) {
    StoreRemote(&mail[block.cluster.rank][0], static_cast<uint64_t>(head.list_size), threadIdx.x, block.cluster);
  }
  ClusterSync(block.cluster);
  uint32_t total = 0;
  for (uint32_t r = 0; r < block.cluster.size; ++r) total += static_cast<uint32_t>(mail[r][0]);
  if (threadIdx.x < block.cluster.size) head.num_listed[threadIdx.x] = static_cast<int32_t>(mail[threadIdx.x][0]);
  __syncthreads();
  return total;
}

// The threshold among the candidates that Collect listed: each block gathers all of them and settles its
// own, eight lanes to a candidate.
template <bool kCount>
__device__ __forceinline__ uint32_t Settle(Block& block, float max, float scale, uint64_t above, uint64_t target) {
  SharedHead& head = *block.head;
  auto* weight = reinterpret_cast<double*>(block.gathered);
  auto* logit = reinterpret_cast<float*>(weight + kMaxCandidates);
  int32_t begin = 0;
  for (uint32_t r = 0; r < block.cluster.size; ++r) {
    const int32_t number = head.num_listed[r];
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < number; i += kThreads) {
      const float x = LoadRemote(&head.list[i], r, block.cluster);
      logit[begin + i] = x;
      weight[begin + i] = kCount ? 1.0 : static_cast<double>(WeightOf(x, max, scale));
    }
    begin += number;
  }
  __syncthreads();
  const int32_t total = begin;
  const int32_t own = head.num_listed[block.cluster.rank];
  uint64_t best = 0;
  for (int32_t base = 0; base < own; base += kGroupsPerPass) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x) / kLanesPerGroup;
    const float x = i < own ? head.list[i] : PositiveInfinity();
    double sum = 0.0;  // at most 384 * 2^44: exact
    for (int32_t j = LaneInGroup(); j < total; j += kLanesPerGroup) {
      if (logit[j] >= x) sum += weight[j];
    }
    const uint64_t mass = above + SumGroupLanes(static_cast<uint64_t>(sum));
    if (i < own && mass >= target) {
      const uint64_t key = OrderedKey(x);
      best = key > best ? key : best;
    }
  }
  uint64_t values[1] = {best};
  AllReduce(block, values, MaxOf());
  return static_cast<uint32_t>(values[0]);
}

// Narrows the bracket until few candidates are left, or one logit.
template <bool kCount>
__device__ __forceinline__ uint32_t FindThreshold(Block& block, float max, float scale, Bracket bracket,
                                                  uint64_t target) {
  for (int round = 0;; ++round) {
    if (bracket.hi - bracket.lo == 1) return bracket.lo;
    if (Collect(block, bracket) <= kMaxCandidates) {
      return Settle<kCount>(block, max, scale, bracket.above, target);
    }
    const Pivots pivots = EvenPivots(bracket, round);
    uint64_t sums[kNumPivots + 1] = {};
    SumAtPivots<kCount, false>(block, max, scale, FloatFromKey(bracket.lo), bracket.hi, pivots, sums);
    AllReduce(block, sums, SumOf());
    bracket = Shrink(bracket, pivots, sums, target);
  }
}

// Copies all groups' maxima of the row to this block. group_max of all blocks must be in place.
__device__ __forceinline__ float* GatherMaxima(const Block& block) {
  auto* maxima = reinterpret_cast<float*>(block.gathered);
  for (int32_t g = static_cast<int32_t>(threadIdx.x); g < block.num_groups; g += kThreads) {
    const int32_t owner = g / block.groups_per_block;
    maxima[g] = LoadRemote(&block.group_max[g - owner * block.groups_per_block], static_cast<uint32_t>(owner),
                           block.cluster);
  }
  __syncthreads();
  return maxima;
}

// The key of the k-th largest group maximum, 1 <= k <= num_groups: at least k tokens reach it.
__device__ __forceinline__ uint32_t KthMaximum(Block& block, int32_t k) {
  const float* maxima = GatherMaxima(block);
  constexpr int kLanes = 4;
  uint64_t found = 0;
  for (int32_t base = 0; base < block.num_local; base += kThreads / kLanes) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x) / kLanes;
    const int32_t g = block.first_group + i;
    const float x = i < block.num_local ? block.group_max[i] : 0.0f;
    int32_t rank = 0;  // groups before this one, larger first, then by place
    for (int32_t j = static_cast<int32_t>(threadIdx.x) % kLanes; j < block.num_groups; j += kLanes) {
      rank += maxima[j] > x || (maxima[j] == x && j < g) ? 1 : 0;
    }
    rank += __shfl_xor_sync(~0u, rank, 1);
    rank += __shfl_xor_sync(~0u, rank, 2);
    if (i < block.num_local && rank == k - 1) found = OrderedKey(x);
  }
  uint64_t values[1] = {found};
  AllReduce(block, values, MaxOf());
  return static_cast<uint32_t>(values[0]);
}

// The k-th largest logit, 1 <= k < vocab_size.
__device__ __forceinline__ uint32_t TopKThreshold(Block& block, float max, int32_t k) {
  const uint64_t target = static_cast<uint64_t>(k);
  Bracket bracket = {kKeyOfNegativeInfinity, OrderedKey(max) + 1, 0};
  if (k <= block.num_groups) {
    bracket.lo = KthMaximum(block, k);
  } else {
    // All group maxima are above; the distance from the smallest to the largest is a scale to step down by.
    const float least = FloatFromKey(KthMaximum(block, block.num_groups));
    const float length = SubRn(max, least);
    const Pivots pivots =
        length > 0.0f && IsFinite(length) ? CountPivots(bracket, least, length) : EvenPivots(bracket, 0);
    uint64_t sums[kNumPivots + 1] = {};
    SumAtPivots<true, false>(block, max, 0.0f, NegativeInfinity(), bracket.hi, pivots, sums);
    AllReduce(block, sums, SumOf());
    bracket = Shrink(bracket, pivots, sums, target);
  }
  return FindThreshold<true>(block, max, 0.0f, bracket, target);
}

// Step 9 over the tokens from floor_key up.
__device__ __forceinline__ uint32_t TopPThreshold(Block& block, float max, float scale, uint32_t floor_key,
                                                  uint64_t top_p_fixed) {
  const Bracket whole = {floor_key, OrderedKey(max) + 1, 0};
  if (whole.hi - whole.lo == 1) return floor_key;
  const Pivots pivots = MassPivots(whole, max, scale);
  uint64_t sums[kNumPivots + 1] = {};
  SumAtPivots<false, false>(block, max, scale, FloatFromKey(floor_key), whole.hi, pivots, sums);
  AllReduce(block, sums, SumOf());
  const uint64_t target = TopPMass(top_p_fixed, sums[kNumPivots]);
  return FindThreshold<false>(block, max, scale, Shrink(whole, pivots, sums, target), target);
}

}  // namespace twinjet::sampler::cuda
