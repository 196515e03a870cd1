// Settling a threshold among few tokens that all blocks have listed: joining the lists, comparing all pairs.
#pragma once

#include "sampler/cuda/mass.cuh"

namespace twinjet::sampler::cuda {

// The row's candidates as Gather leaves them in `gathered`.
struct Candidates {
  int32_t count;
  int32_t own_begin;  // this block's lie in [own_begin, own_end)
  int32_t own_end;
};

// Weights are integers that a float holds.
__device__ __forceinline__ float* GatheredWeights(const Block& block) {
  return reinterpret_cast<float*>(block.gathered);
}
__device__ __forceinline__ float* GatheredLogits(const Block& block) {
  return reinterpret_cast<float*>(GatheredWeights(block) + kMaxCandidates);
}

// Joins the exchanged lists and works out the weights where they are wanted. Up to a multiple of four
// candidates follow some that reach nothing.
__device__ __forceinline__ Candidates Gather(const Block& block, const ListTotals& totals, float max,
                                             float scale, bool with_weights) {
  float* weight = GatheredWeights(block);
  float* logit = GatheredLogits(block);
  const uint32_t size = block.cluster.size;
  const uint32_t upto = SumUpToLane<kMaxCluster>(totals.of_lane);
  // As many threads to each list.
  const uint32_t share = kThreads / size;
  const uint32_t rank = threadIdx.x / share;
  const int from = static_cast<int>(rank < size ? rank : 0);
  const uint32_t number = __shfl_sync(~0u, totals.of_lane, from);
  const uint32_t begin = __shfl_sync(~0u, upto, from) - number;
  const float* list = ListOf(block, static_cast<uint32_t>(from));
  for (uint32_t i = threadIdx.x % share; rank < size && i < number; i += share) {
    const float x = list[i];
    logit[begin + i] = x;
    if (with_weights) weight[begin + i] = floorf(ScaledExp2(ZOf(x, max, scale)));
  }
  Candidates candidates;
  candidates.count = static_cast<int32_t>(totals.count);
  candidates.own_end = static_cast<int32_t>(__shfl_sync(~0u, upto, static_cast<int>(block.cluster.rank)));
  candidates.own_begin = candidates.own_end - static_cast<int32_t>(__shfl_sync(
                                                  ~0u, totals.of_lane, static_cast<int>(block.cluster.rank)));
  static_assert(kMaxCandidates % 4 == 0);
  const int32_t padded = candidates.count + static_cast<int32_t>(threadIdx.x);
  if (padded < (candidates.count + 3) / 4 * 4) {
    logit[padded] = __uint_as_float(0x7fc00000u);
    weight[padded] = 0.0f;
  }
  __syncthreads();
  return candidates;
}

// Few enough for every block to settle all of them; otherwise each settles its own.
constexpr int32_t kMaxSettledByAll = 128;

// Sum over `lanes` neighbouring lanes, a power of two up to 8.
template <class T>
__device__ __forceinline__ T SumLanes(T value, int32_t lanes) {
#pragma unroll
  for (int offset = kLanesPerGroup / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(~0u, value, offset);
    if (offset < lanes) value += other;
  }
  return value;
}

// What a candidate's mass may be.
template <class Sum>
__device__ __forceinline__ MassBounds BoundsOfSum(Sum sum) {
  const auto mass = static_cast<uint64_t>(sum);
  // A float's sum of up to kMaxCandidates weights in four chains, then over lanes: fewer than 68 roundings.
  const uint64_t slack = sizeof(Sum) == sizeof(float) ? (mass >> 17) + 1 : 0;
  return {mass - (slack < mass ? slack : mass), mass + slack};
}

// A threshold; 0 where no candidate reaches the target.
struct Settled {
  uint32_t key;
  bool is_certain;  // whichever the masses and the target are within their bounds
};

// The threshold among gathered candidates from floor_key up, all at once, one to eight lanes to a candidate.
// kTopP: least is p in fixed point and the total is the gathered weight; otherwise the target lies between
// least and most, and above is what lies above the candidates. Sum: a double is exact, a float quick.
enum class Settling { kCount, kMass, kTopP };
template <Settling kSettling, class Sum>
__device__ __forceinline__ Settled SettleBySums(Block& block, const Candidates& candidates,
                                                uint32_t floor_key, uint64_t above, uint64_t least,
                                                uint64_t most, bool by_all) {
  constexpr uint64_t kUncertain = 1ull << 32;
  const auto* weights = reinterpret_cast<const float4*>(GatheredWeights(block));
  const float* logit = GatheredLogits(block);
  const auto* logits = reinterpret_cast<const float4*>(logit);
  const float floor = FloatFromKey(floor_key);
  const int32_t fours = (candidates.count + 3) / 4;
  const int32_t begin = by_all ? 0 : candidates.own_begin;
  const int32_t end = by_all ? candidates.count : candidates.own_end;
  const int32_t number = end - begin;
  const int32_t lanes = number <= kThreads / 8   ? 8
                        : number <= kThreads / 4 ? 4
                        : number <= kThreads / 2 ? 2
                                                 : 1;
  uint32_t best = 0;
  bool is_certain = true;
#pragma unroll 1
  for (int32_t i = begin + static_cast<int32_t>(threadIdx.x) / lanes; __any_sync(~0u, i < end);
       i += kThreads / lanes) {
    const float x = i < end ? logit[i] : PositiveInfinity();
    Sum sum[4] = {}, all[4] = {};
#pragma unroll 2
    for (int32_t j = static_cast<int32_t>(threadIdx.x) % lanes; j < fours; j += lanes) {
      const float4 four = logits[j];
      const float other[4] = {four.x, four.y, four.z, four.w};
      float w[4] = {1.0f, 1.0f, 1.0f, 1.0f};
      if (kSettling != Settling::kCount) {
        const float4 weight = weights[j];
        w[0] = weight.x, w[1] = weight.y, w[2] = weight.z, w[3] = weight.w;
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        sum[q] += other[q] >= x ? static_cast<Sum>(w[q]) : 0;
        if (kSettling == Settling::kTopP) all[q] += other[q] >= floor ? static_cast<Sum>(w[q]) : 0;
      }
    }
    const Sum whole_sum = SumLanes((sum[0] + sum[1]) + (sum[2] + sum[3]), lanes);
    MassBounds mass = kSettling == Settling::kCount
                          ? MassBounds{static_cast<uint64_t>(whole_sum), static_cast<uint64_t>(whole_sum)}
                          : BoundsOfSum(whole_sum);
    MassBounds target = {least, most};
    if (kSettling == Settling::kTopP) {
      const MassBounds total = BoundsOfSum(SumLanes((all[0] + all[1]) + (all[2] + all[3]), lanes));
      target = {TopPMass(least, total.least), TopPMass(least, total.most)};
    }
    if (i < end && x >= floor && above + mass.most >= target.least) {
      const uint32_t key = OrderedKey(x);
      best = key > best ? key : best;
      if (above + mass.least < target.most) is_certain = false;
    }
  }
  if (!by_all) {
    const uint64_t all = AllMax(block, best | (is_certain ? 0 : kUncertain));
    return {static_cast<uint32_t>(all), all < kUncertain};
  }
  best = __reduce_max_sync(~0u, best);
  is_certain = __any_sync(~0u, !is_certain) == 0;
  __syncthreads();  // by_warp may be read still from the last call
  if (LaneInWarp() == 0) block.head->by_warp[threadIdx.x / 32][0] = best | (is_certain ? 0 : kUncertain);
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const uint64_t other = block.head->by_warp[w][0];
    best = static_cast<uint32_t>(other) > best ? static_cast<uint32_t>(other) : best;
    is_certain &= other < kUncertain;
  }
  return {best, is_certain};
}

// Quickly where that is certain, else exactly; certain unless the target is not known well enough.
template <Settling kSettling>
__device__ __forceinline__ Settled Settle(Block& block, const Candidates& candidates, uint32_t floor_key,
                                          uint64_t above, uint64_t least, uint64_t most, bool by_all) {
  const Settled settled =
      SettleBySums<kSettling, float>(block, candidates, floor_key, above, least, most, by_all);
  if (kSettling == Settling::kCount || settled.is_certain) return settled;
  return SettleBySums<kSettling, double>(block, candidates, floor_key, above, least, most, by_all);
}

}  // namespace twinjet::sampler::cuda
