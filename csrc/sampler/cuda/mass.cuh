// Exact sums over a slice: weights of groups, and what lies at or above pivots.
//
// A weight is a float of 2^44 and less, to be truncated to an integer. It is widened to a double with one
// integer multiply-add and added, rounding toward zero, to a double that starts at 2^52: one unit in the
// last place is 1 there, so the addition truncates the weight and is exact. 32 weights stay below 2^53.
#pragma once

#include "sampler/cuda/search.h"
#include "sampler/cuda/slice.cuh"

namespace twinjet::sampler::cuda {

constexpr double kSumBase = 0x1p52;

// The weight of x before truncation; less than 1, which adds nothing, where x is below the threshold.
template <bool kFiltered>
__device__ __forceinline__ double KeptWeightAsDouble(float x, float max, float scale, float threshold) {
  const float z = !kFiltered || x >= threshold ? MulRn(SubRn(x, max), scale) : kMinZ;
  return __longlong_as_double(static_cast<long long>(WeightAsDoubleBits(z)));
}

__device__ __forceinline__ uint64_t IntegerOfSum(double sum) {
  return static_cast<uint64_t>(__double_as_longlong(sum)) & ((1ull << 52) - 1);
}

__device__ __forceinline__ uint64_t SumGroupLanes(uint64_t value) {
#pragma unroll
  for (int offset = kLanesPerGroup / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

__device__ __forceinline__ uint64_t SumWarp(uint64_t value) { return ReduceWarp(value, SumOf()); }

// The weight of a lane's float4 numbers begin, begin + kStep, ... (kNumber of them) that reach the threshold.
// kFiltered: false where all logits do.
template <bool kFiltered, int kNumber, int kStep, Dtype kStored>
__device__ __forceinline__ uint64_t MassOfLane(const StoredFour<kStored>* begin, float max, float scale,
                                               float threshold) {
  double even = kSumBase, odd = kSumBase;
#pragma unroll 2
  for (int i = 0; i < kNumber; ++i) {
    const float4 x = begin[i * kStep].Widened();
    const double w0 = KeptWeightAsDouble<kFiltered>(x.x, max, scale, threshold);
    const double w1 = KeptWeightAsDouble<kFiltered>(x.y, max, scale, threshold);
    const double w2 = KeptWeightAsDouble<kFiltered>(x.z, max, scale, threshold);
    const double w3 = KeptWeightAsDouble<kFiltered>(x.w, max, scale, threshold);
    even = __dadd_rz(even, w0);
    odd = __dadd_rz(odd, w1);
    even = __dadd_rz(even, w2);
    odd = __dadd_rz(odd, w3);
  }
  return IntegerOfSum(even) + IntegerOfSum(odd);
}

// group_mass[g] = sum of the weights of group g's tokens with x >= threshold, for the groups of passes
// [begin, end); where few of a warp's groups have any, all its lanes share each of them. No barrier at the
// end.
template <Dtype kStored, bool kFiltered>
__device__ __forceinline__ void SumGroups(const Block& block, float max, float scale, float threshold) {
  const auto* slice = FoursOf<kStored>(block);
  constexpr int kGroupsPerWarp = 32 / kLanesPerGroup;
  const int32_t passes = NumPasses(block);
  for (int32_t pass = 0; pass < passes; ++pass) {
    const int32_t group = GroupOfLane(pass);
    const bool inside = group < block.num_local;
    const float top = inside ? block.group_max[group] : NegativeInfinity();
    // Below z = -45 every weight is truncated to 0.
    const bool active = inside && top >= threshold && ZOf(top, max, scale) >= -45.0f;
    const uint32_t lanes = __ballot_sync(~0u, active);
    uint64_t mass = 0;
    if (__popc(lanes) > kGroupsPerWarp / 2 * kLanesPerGroup) {
      if (active) {
        mass = MassOfLane<kFiltered, kTokensPerLane / 4, kLanesPerGroup>(slice + FloatFourOfLane(group, 0),
                                                                         max, scale, threshold);
      }
      mass = SumGroupLanes(mass);
    } else {
      const int32_t first = GroupOfLane(pass) - LaneInWarp() / kLanesPerGroup;
#pragma unroll 1
      for (uint32_t left = lanes; left != 0;) {
        const int32_t which = (__ffs(static_cast<int>(left)) - 1) / kLanesPerGroup;
        left &= ~(0xffu << (which * kLanesPerGroup));
        const auto* begin = slice + (first + which) * (kGroupSize / 4) + LaneInWarp();
        const uint64_t whole =
            SumWarp(MassOfLane<kFiltered, kGroupSize / 128, 32>(begin, max, scale, threshold));
        if (LaneInWarp() / kLanesPerGroup == which) mass = whole;
      }
    }
    if (inside && LaneInGroup() == 0) block.group_mass[group] = mass;
  }
}

// About the mass of group i of the block by its scan, in units of the largest weight.
__device__ __forceinline__ float ApproximateMass(const Block& block, int32_t i, float max, float scale) {
  return block.group_sum[i] * ApproximateExp2(MulRn(SubRn(block.group_max[i], max), scale));
}

// A time that a group does not arrive before, whichever of its tokens are kept; endless if it has no weight.
// mass: its ApproximateMass. Sums and this division are off by far less than the 2^-10 added.
__device__ __forceinline__ float LeastTime(double exponential, float mass) {
  constexpr float kLargest = static_cast<float>(1ull << kMassBits);
  const float most = mass * (1.0f + 0x1p-10f);
  if (!(most * kLargest >= 1.0f)) return PositiveInfinity();
  return ApproximateQuotient(static_cast<float>(exponential), most) * (1.0f / kLargest);
}

template <Dtype kStored>
__device__ __forceinline__ void SumGroups(const Block& block, float max, float scale, float threshold) {
  if (threshold == NegativeInfinity()) {
    SumGroups<kStored, false>(block, max, scale, threshold);
  } else {
    SumGroups<kStored, true>(block, max, scale, threshold);
  }
}

// sums[i] += total of this lane's tokens with pivot i <= x < hi; sums[kNumPivots] of those with
// lo <= x < hi. Totals are weights, or counts with kCount. The pivots ascend and are not below lo.
template <Dtype kStored, bool kCount>
__device__ __forceinline__ void SumAtPivots(const Block& block, float max, float scale, float lo,
                                            uint32_t hi_key, const Pivots& pivots,
                                            uint64_t (&sums)[kNumPivots + 1]) {
  const auto* slice = FoursOf<kStored>(block);
  float pivot[kNumPivots];
#pragma unroll
  for (int i = 0; i < kNumPivots; ++i) pivot[i] = FloatFromKey(pivots.key[i]);
  const float last = LastBelow(hi_key);  // x < hi and x <= last are the same
  const int32_t passes = NumPasses(block);
  for (int32_t pass = 0; pass < passes; ++pass) {
    const int32_t group = GroupOfLane(pass);
    const bool inside = group < block.num_local;
    const float top = inside ? block.group_max[group] : NegativeInfinity();
    const bool active = inside && top >= lo;
    if (__any_sync(~0u, active)) {
      const bool reaches_pivot = __any_sync(~0u, active && top >= pivot[0]);
      if (active) {
        double all = kSumBase, at[kNumPivots];
        uint32_t count = 0, count_at[kNumPivots];
#pragma unroll
        for (int i = 0; i < kNumPivots; ++i) {
          at[i] = kSumBase;
          count_at[i] = 0;
        }
#pragma unroll 2
        for (int i = 0; i < kTokensPerLane / 4; ++i) {
          const float4 four = slice[FloatFourOfLane(group, i)].Widened();
          const float x[4] = {four.x, four.y, four.z, four.w};
          bool in[4];
#pragma unroll
          for (int q = 0; q < 4; ++q) in[q] = x[q] >= lo && x[q] <= last;
          if (!(in[0] || in[1] || in[2] || in[3])) continue;
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            if (kCount) {
              const uint32_t one = in[q] ? 1u : 0u;
              count += one;
#pragma unroll
              for (int k = 0; k < kNumPivots; ++k) count_at[k] += x[q] >= pivot[k] ? one : 0u;
            } else {
              // Outside the bracket: less than 1, which adds nothing.
              const float z = in[q] ? MulRn(SubRn(x[q], max), scale) : kMinZ;
              const double w = __longlong_as_double(static_cast<long long>(WeightAsDoubleBits(z)));
              all = __dadd_rz(all, w);
              if (reaches_pivot) {
#pragma unroll
                for (int k = 0; k < kNumPivots; ++k) {
                  if (x[q] >= pivot[k]) at[k] = __dadd_rz(at[k], w);
                }
              }
            }
          }
        }
        sums[kNumPivots] += kCount ? count : IntegerOfSum(all);
        if (reaches_pivot) {
#pragma unroll
          for (int i = 0; i < kNumPivots; ++i) sums[i] += kCount ? count_at[i] : IntegerOfSum(at[i]);
        }
      }
    }
  }
}

// Counts a sample of this block's tokens lo <= x < hi in about the grid's bins. No barrier at the end.
template <Dtype kStored>
__device__ __forceinline__ void CountSample(const Block& block, const BinGrid& grid, uint32_t hi_key,
                                            const Bins& bins) {
  const auto* slice = FoursOf<kStored>(block);
  const float last = LastBelow(hi_key);
  const int32_t passes = NumPasses(block);
#pragma unroll 2
  for (int32_t pass = 0; pass < passes; ++pass) {
    const int32_t group = GroupOfLane(pass);
    if (group >= block.num_local || !(block.group_max[group] >= grid.lo)) continue;
    const float4 four = slice[FloatFourOfLane(group, 0)].Widened();
    const float x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (x[q] >= grid.lo && x[q] <= last) atomicAdd(&bins.low[GuessBin(grid, x[q])], 1u);
    }
  }
}

// Of this block's tokens: the weight of those from a logit up, and of those below it.
struct PartedMass {
  uint64_t from;
  uint64_t below;
};

// Keeps this block's tokens lo <= x < hi in `kept`, as far as there is room, and parts all weight at lo.
// *count, in shared memory and 0 before, becomes the number of tokens to keep, room or not. weighs_below:
// false where nobody asks for what lies below. No barrier at the end.
template <Dtype kStored>
__device__ __forceinline__ PartedMass SumAndKeep(const Block& block, float max, float scale, float lo,
                                                 uint32_t hi_key, bool weighs_below, float* kept,
                                                 uint32_t* count) {
  const auto* slice = FoursOf<kStored>(block);
  const float last = LastBelow(hi_key);
  const int32_t passes = NumPasses(block);
  PartedMass mass = {0, 0};
  for (int32_t pass = 0; pass < passes; ++pass) {
    const int32_t group = GroupOfLane(pass);
    if (group >= block.num_local || !(weighs_below || block.group_max[group] >= lo)) continue;
    double all[2] = {kSumBase, kSumBase}, from[2] = {kSumBase, kSumBase};
    uint32_t found = 0;  // bit of each of the lane's 32 tokens
#pragma unroll 2
    for (int i = 0; i < kTokensPerLane / 4; ++i) {
      const float4 four = slice[FloatFourOfLane(group, i)].Widened();
      const float x[4] = {four.x, four.y, four.z, four.w};
      uint32_t bits = 0;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const uint64_t w = WeightAsDoubleBits(MulRn(SubRn(x[q], max), scale));
        all[q % 2] = __dadd_rz(all[q % 2], __longlong_as_double(static_cast<long long>(w)));
        // Without its upper half a weight is less than 1.
        const uint64_t kept_w = static_cast<uint64_t>(x[q] >= lo ? static_cast<uint32_t>(w >> 32) : 0u)
                                    << 32 |
                                static_cast<uint32_t>(w);
        from[q % 2] = __dadd_rz(from[q % 2], __longlong_as_double(static_cast<long long>(kept_w)));
        if (x[q] >= lo && x[q] <= last) bits |= 1u << q;
      }
      found |= bits << (4 * i);
    }
    const uint64_t of_group = IntegerOfSum(from[0]) + IntegerOfSum(from[1]);
    mass.from += of_group;
    mass.below += IntegerOfSum(all[0]) + IntegerOfSum(all[1]) - of_group;
    if (found == 0) continue;
    uint32_t place = atomicAdd(count, static_cast<uint32_t>(__popc(found)));
    while (found != 0 && place < kMaxKept) {
      const int32_t bit = __ffs(static_cast<int>(found)) - 1;
      found &= found - 1;
      kept[place++] = TokenOf<kStored>(block, 4 * FloatFourOfLane(group, bit / 4) + bit % 4);
    }
  }
  return mass;
}

// Adds the weights of kept tokens, all inside the grid's bracket, to the bins. No barrier at the end.
constexpr int kLowBits = 22;
static_assert(kMaxKept < 1 << (32 - kLowBits) && kMassBits <= 2 * kLowBits);
__device__ __forceinline__ void WeighKept(const float* kept, int32_t count, float max, float scale,
                                          const BinGrid& grid, const Bins& bins) {
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) {
    const uint64_t weight = WeightOf(kept[i], max, scale);
    const int32_t bin = BinOf(grid, kept[i]);
    atomicAdd(&bins.low[bin], static_cast<uint32_t>(weight) & ((1u << kLowBits) - 1));
    atomicAdd(&bins.high[bin], static_cast<uint32_t>(weight >> kLowBits));
  }
}

// SumAtPivots by weight over kept tokens instead of the slice.
__device__ __forceinline__ void SumKeptAtPivots(const float* kept, int32_t count, float max, float scale,
                                                const Bracket& bracket, const Pivots& pivots,
                                                uint64_t (&sums)[kNumPivots + 1]) {
  const float lo = FloatFromKey(bracket.lo), last = LastBelow(bracket.hi);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) {
    const float x = kept[i];
    if (!(x >= lo && x <= last)) continue;
    const uint64_t weight = WeightOf(x, max, scale);
    sums[kNumPivots] += weight;
#pragma unroll
    for (int k = 0; k < kNumPivots; ++k) sums[k] += x >= FloatFromKey(pivots.key[k]) ? weight : 0;
  }
}

// How many of this lane's tokens have x >= value.
template <Dtype kStored>
__device__ __forceinline__ uint64_t CountAtLeast(const Block& block, float value) {
  const auto* slice = FoursOf<kStored>(block);
  const int32_t passes = NumPasses(block);
  uint32_t count = 0;
  for (int32_t pass = 0; pass < passes; ++pass) {
    const int32_t group = GroupOfLane(pass);
    if (group >= block.num_local || !(block.group_max[group] >= value)) continue;
#pragma unroll
    for (int i = 0; i < kTokensPerLane / 4; ++i) {
      const float4 x = slice[FloatFourOfLane(group, i)].Widened();
      count += (x.x >= value ? 1u : 0u) + (x.y >= value ? 1u : 0u) + (x.z >= value ? 1u : 0u) +
               (x.w >= value ? 1u : 0u);
    }
  }
  return count;
}

}  // namespace twinjet::sampler::cuda
