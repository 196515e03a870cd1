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
  const float last = LastBelow(bracket.hi);
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
  auto* num_sent = head.num_sent[block.listing & 1];
  ++block.listing;
  if (threadIdx.x < block.cluster.size) {
    StoreRemote(&num_sent[block.cluster.rank], static_cast<uint64_t>(head.list_size), threadIdx.x,
                block.cluster);
  }
  ClusterSync(block.cluster);  // the lists are read by other blocks next
  uint32_t total = 0;
  for (uint32_t r = 0; r < block.cluster.size; ++r) total += static_cast<uint32_t>(num_sent[r]);
  if (threadIdx.x < block.cluster.size)
    head.num_listed[threadIdx.x] = static_cast<int32_t>(num_sent[threadIdx.x]);
  __syncthreads();
  return total;
}

// Copies all blocks' lists to this block, a warp to each list, and works out the weights (1 at scale 0).
// Returns how many candidates there are.
__device__ __forceinline__ int32_t Gather(Block& block, float max, float scale) {
  SharedHead& head = *block.head;
  auto* weight = reinterpret_cast<double*>(block.gathered);
  auto* logit = reinterpret_cast<float*>(weight + kMaxCandidates);
  const uint32_t warp = threadIdx.x / 32;
  int32_t begin = 0;
  for (uint32_t r = 0; r < block.cluster.size; ++r) {
    const int32_t number = head.num_listed[r];
    if (r % kWarps == warp) {
      for (int32_t i = static_cast<int32_t>(threadIdx.x) % 32; i < number; i += 32) {
        const float x = LoadRemote(&head.list[i], r, block.cluster);
        logit[begin + i] = x;
        weight[begin + i] = static_cast<double>(WeightOf(x, max, scale));
      }
    }
    begin += number;
  }
  __syncthreads();
  return begin;
}

// The threshold among `total` gathered candidates from floor_key up: each block settles its own, eight lanes
// to a candidate. kTopP: target_or_p is p in fixed point and the total is the gathered weight; otherwise it
// is the target, and above what lies above the candidates.
enum class Settling { kCount, kMass, kTopP };
template <Settling kSettling>
__device__ __forceinline__ uint32_t Settle(Block& block, int32_t total, uint32_t floor_key, uint64_t above,
                                           uint64_t target_or_p) {
  const SharedHead& head = *block.head;
  const auto* weight = reinterpret_cast<const double*>(block.gathered);
  const auto* logit = reinterpret_cast<const float*>(weight + kMaxCandidates);
  const int32_t own = head.num_listed[block.cluster.rank];
  const float floor = FloatFromKey(floor_key);
  uint64_t best = 0;
  for (int32_t base = 0; base < own; base += kGroupsPerPass) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x) / kLanesPerGroup;
    const float x = i < own ? head.list[i] : PositiveInfinity();
    double sum = 0.0, all = 0.0;  // at most 384 * 2^44: exact
    for (int32_t j = LaneInGroup(); j < total; j += kLanesPerGroup) {
      const double w = kSettling == Settling::kCount ? 1.0 : weight[j];
      if (logit[j] >= x) sum += w;
      if (kSettling == Settling::kTopP && logit[j] >= floor) all += w;
    }
    const uint64_t mass = above + SumGroupLanes(static_cast<uint64_t>(sum));
    uint64_t target = target_or_p;
    if (kSettling == Settling::kTopP)
      target = TopPMass(target_or_p, SumGroupLanes(static_cast<uint64_t>(all)));
    if (i < own && x >= floor && mass >= target) {
      const uint64_t key = OrderedKey(x);
      best = key > best ? key : best;
    }
  }
  uint64_t values[1] = {best};
  AllReduce(block, values, MaxOf());
  return static_cast<uint32_t>(values[0]);
}

// Narrows the bracket until few candidates are left, or one logit. *num_gathered: how many candidates lie in
// `gathered` at the end, if they are all tokens from the threshold up; 0 otherwise. scale: for their weights.
template <bool kCount>
__device__ __forceinline__ uint32_t FindThreshold(Block& block, float max, float scale, Bracket bracket,
                                                  uint64_t target, bool try_at_once, int32_t* num_gathered) {
  *num_gathered = 0;
  for (int round = 0;; ++round) {
    if (bracket.hi - bracket.lo == 1) return bracket.lo;
    if ((round > 0 || try_at_once) && Collect(block, bracket) <= kMaxCandidates) {
      const int32_t total = Gather(block, max, scale);
      if (bracket.above == 0) *num_gathered = total;
      return Settle<kCount ? Settling::kCount : Settling::kMass>(block, total, bracket.lo, bracket.above,
                                                                 target);
    }
    const Pivots pivots = NextPivots(bracket, target, round);
    uint64_t sums[kNumPivots + 1] = {};
    SumAtPivots<kCount>(block, max, scale, FloatFromKey(bracket.lo), bracket.hi, pivots, sums);
    AllReduce(block, sums, SumOf());
    bracket = Shrink(bracket, pivots, sums, target);
  }
}

// Copies all groups' maxima of the row to this block, filled up with -inf to a multiple of 4. group_max of
// all blocks must be in place.
__device__ __forceinline__ void GatherMaxima(const Block& block) {
  ClusterSync(block.cluster);  // the other blocks' maxima are seen
  auto* maxima = reinterpret_cast<float*>(block.gathered);
  const int32_t padded = (block.num_groups + 3) / 4 * 4;
  for (int32_t g = static_cast<int32_t>(threadIdx.x); g < padded; g += kThreads) {
    const int32_t owner = g / block.groups_per_block;
    maxima[g] = g < block.num_groups ? LoadRemote(&block.group_max[g - owner * block.groups_per_block],
                                                  static_cast<uint32_t>(owner), block.cluster)
                                     : NegativeInfinity();
  }
  __syncthreads();
}

// The key of the k-th largest group maximum, 1 <= k <= num_groups: at least k tokens reach it. It is the
// smallest maximum that fewer than k others exceed.
__device__ __forceinline__ uint32_t KthMaximum(Block& block, int32_t k) {
  GatherMaxima(block);
  const auto* maxima = reinterpret_cast<const float4*>(block.gathered);
  constexpr int kLanes = 4;
  uint64_t found = ~0ull;
  for (int32_t base = 0; base < block.num_local; base += kThreads / kLanes) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x) / kLanes;
    const float x = i < block.num_local ? block.group_max[i] : 0.0f;
    int32_t larger = 0;
#pragma unroll 4
    for (int32_t j = static_cast<int32_t>(threadIdx.x) % kLanes; j < (block.num_groups + 3) / 4;
         j += kLanes) {
      const float4 four = maxima[j];
      larger += (four.x > x ? 1 : 0) + (four.y > x ? 1 : 0) + (four.z > x ? 1 : 0) + (four.w > x ? 1 : 0);
    }
    larger += __shfl_xor_sync(~0u, larger, 1);
    larger += __shfl_xor_sync(~0u, larger, 2);
    if (i < block.num_local && larger < k) found = MinOf()(found, OrderedKey(x));
  }
  uint64_t values[1] = {found};
  AllReduce(block, values, MinOf());
  return static_cast<uint32_t>(values[0]);
}

// The k-th largest logit, 1 <= k < vocab_size. scale, num_gathered: see FindThreshold.
__device__ __forceinline__ uint32_t TopKThreshold(Block& block, float max, float scale, int32_t k,
                                                  int32_t vocab_size, int32_t* num_gathered) {
  const uint64_t target = static_cast<uint64_t>(k);
  Bracket bracket = {kKeyOfNegativeInfinity, OrderedKey(max) + 1, 0, static_cast<uint64_t>(vocab_size)};
  if (k <= block.num_groups) {
    bracket.lo = KthMaximum(block, k);
    return FindThreshold<true>(block, max, scale, bracket, target, k <= kMaxCandidates, num_gathered);
  }
  // All group maxima are above; the distance from the smallest to the largest is a scale to step down by.
  const float least = FloatFromKey(KthMaximum(block, block.num_groups));
  const float length = SubRn(max, least);
  const Pivots pivots =
      length > 0.0f && IsFinite(length) ? CountPivots(bracket, least, length) : KeyPivots(bracket);
  uint64_t sums[kNumPivots + 1] = {};
  SumAtPivots<true>(block, max, 0.0f, NegativeInfinity(), bracket.hi, pivots, sums);
  AllReduce(block, sums, SumOf());
  return FindThreshold<true>(block, max, scale, Shrink(bracket, pivots, sums, target), target, false,
                             num_gathered);
}

// Step 9 over the tokens from floor_key up. num_gathered: not 0 where `gathered` holds all of them already.
__device__ __forceinline__ uint32_t TopPThreshold(Block& block, float max, float scale, uint32_t floor_key,
                                                  uint64_t top_p_fixed, int32_t vocab_size,
                                                  int32_t num_gathered) {
  const uint32_t top = OrderedKey(max) + 1;
  if (top - floor_key == 1) return floor_key;
  if (num_gathered == 0 && floor_key > kKeyOfNegativeInfinity) {
    const Bracket all = {floor_key, top, 0, 0};
    if (Collect(block, all) <= kMaxCandidates) num_gathered = Gather(block, max, scale);
  }
  if (num_gathered != 0) return Settle<Settling::kTopP>(block, num_gathered, floor_key, 0, top_p_fixed);

  const uint32_t wanted = FirstMassPivot(max, scale);
  const uint32_t pivot = wanted > floor_key && wanted < top ? wanted : floor_key + 1;
  uint64_t sums[2] = {0, 0};  // whole mass, mass from the pivot up
  sums[1] = SumGroups<true>(block, max, scale, FloatFromKey(floor_key), FloatFromKey(pivot));
  __syncthreads();
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < block.num_local; i += kThreads) {
    sums[0] += block.group_mass[i];
  }
  AllReduce(block, sums, SumOf());
  const uint64_t target = TopPMass(top_p_fixed, sums[0]);
  Bracket bracket = {pivot, top, 0, sums[1]};
  const bool is_high = sums[1] >= target;
  if (!is_high) {
    bracket = {floor_key, pivot, sums[1], sums[0]};
    const uint32_t least = LeastMassKey(max, scale, sums[0], target, vocab_size);
    // `reached` stays what it is: the little mass that lies below the least key only tilts a guess.
    if (least > bracket.lo && least < bracket.hi) bracket.lo = least;
  }
  int32_t unused = 0;
  return FindThreshold<false>(block, max, scale, bracket, target, is_high, &unused);
}

}  // namespace twinjet::sampler::cuda
