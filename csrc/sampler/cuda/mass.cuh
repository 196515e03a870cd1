// Exact sums over a slice: weights of groups, and what lies at or above pivots.
//
// A weight is a float of 2^44 and less, to be truncated to an integer. It is widened to a double with one
// integer multiply-add and added, rounding toward zero, to a double that starts at 2^52: one unit in the
// last place is 1 there, so the addition truncates the weight and is exact. 32 weights stay below 2^53.
#pragma once

#include "sampler/cuda/block.cuh"
#include "sampler/cuda/search.h"

namespace twinjet::sampler::cuda {

constexpr double kSumBase = 0x1p52;

__device__ __forceinline__ double WeightAsDouble(float x, float max, float scale) {
  return __longlong_as_double(static_cast<long long>(WeightAsDoubleBits(MulRn(SubRn(x, max), scale))));
}

// The same, or less than 1, which adds nothing, where x is below the threshold.
__device__ __forceinline__ double KeptWeightAsDouble(float x, float max, float scale, float threshold) {
  const float z = x >= threshold ? MulRn(SubRn(x, max), scale) : kMinZ;
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

// group_mass[g] = sum of the weights of group g's tokens with x >= threshold. With kPivot, returns this
// lane's share of the weight of those with x >= pivot, pivot being at least threshold. No barrier at the end.
template <bool kPivot>
__device__ __forceinline__ uint64_t SumGroups(const Block& block, float max, float scale, float threshold,
                                              float pivot) {
  const auto* slice = reinterpret_cast<const float4*>(block.slice);
  const int32_t passes = (block.num_local + kGroupsPerPass - 1) / kGroupsPerPass;
  uint64_t reaching = 0;
  for (int32_t pass = 0; pass < passes; ++pass) {
    const int32_t group = GroupOfLane(pass);
    const bool inside = group < block.num_local;
    const float top = inside ? block.group_max[group] : NegativeInfinity();
    // Below z = -45 every weight is truncated to 0.
    const bool active = inside && top >= threshold && ZOf(top, max, scale) >= -45.0f;
    uint64_t mass = 0;
    if (__any_sync(~0u, active)) {
      if (active) {
        double even = kSumBase, odd = kSumBase, high = kSumBase;
#pragma unroll 2
        for (int i = 0; i < kTokensPerLane / 4; ++i) {
          const float4 x = slice[FloatFourOfLane(group, i)];
          const double w0 = KeptWeightAsDouble(x.x, max, scale, threshold);
          const double w1 = KeptWeightAsDouble(x.y, max, scale, threshold);
          const double w2 = KeptWeightAsDouble(x.z, max, scale, threshold);
          const double w3 = KeptWeightAsDouble(x.w, max, scale, threshold);
          even = __dadd_rz(even, w0);
          odd = __dadd_rz(odd, w1);
          even = __dadd_rz(even, w2);
          odd = __dadd_rz(odd, w3);
          if (kPivot && fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)) >= pivot) {
            if (x.x >= pivot) high = __dadd_rz(high, w0);
            if (x.y >= pivot) high = __dadd_rz(high, w1);
            if (x.z >= pivot) high = __dadd_rz(high, w2);
            if (x.w >= pivot) high = __dadd_rz(high, w3);
          }
        }
        mass = IntegerOfSum(even) + IntegerOfSum(odd);
        if (kPivot) reaching += IntegerOfSum(high);
      }
      mass = SumGroupLanes(mass);
    }
    if (inside && LaneInGroup() == 0) block.group_mass[group] = mass;
  }
  return reaching;
}

// sums[i] += total of this lane's tokens with pivot i <= x < hi; sums[kNumPivots] of those with
// lo <= x < hi. Totals are weights, or counts with kCount. The pivots ascend and are not below lo.
template <bool kCount>
__device__ __forceinline__ void SumAtPivots(const Block& block, float max, float scale, float lo,
                                            uint32_t hi_key, const Pivots& pivots,
                                            uint64_t (&sums)[kNumPivots + 1]) {
  const auto* slice = reinterpret_cast<const float4*>(block.slice);
  float pivot[kNumPivots];
#pragma unroll
  for (int i = 0; i < kNumPivots; ++i) pivot[i] = FloatFromKey(pivots.key[i]);
  const float last = LastBelow(hi_key);  // x < hi and x <= last are the same
  const int32_t passes = (block.num_local + kGroupsPerPass - 1) / kGroupsPerPass;
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
          const float4 four = slice[FloatFourOfLane(group, i)];
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

// How many of this lane's tokens have x >= value.
__device__ __forceinline__ uint64_t CountAtLeast(const Block& block, float value) {
  const auto* slice = reinterpret_cast<const float4*>(block.slice);
  const int32_t passes = (block.num_local + kGroupsPerPass - 1) / kGroupsPerPass;
  uint32_t count = 0;
  for (int32_t pass = 0; pass < passes; ++pass) {
    const int32_t group = GroupOfLane(pass);
    if (group >= block.num_local || !(block.group_max[group] >= value)) continue;
#pragma unroll
    for (int i = 0; i < kTokensPerLane / 4; ++i) {
      const float4 x = slice[FloatFourOfLane(group, i)];
      count += (x.x >= value ? 1u : 0u) + (x.y >= value ? 1u : 0u) + (x.z >= value ? 1u : 0u) +
               (x.w >= value ? 1u : 0u);
    }
  }
  return count;
}

}  // namespace twinjet::sampler::cuda
