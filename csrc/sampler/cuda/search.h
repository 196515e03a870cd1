// The threshold search of top-k and top-p, free of any parallelism: where pivots go and how a bracket
// shrinks. Every block of a row runs it on the same numbers and so arrives at the same bracket.
//
// A threshold is the largest logit t with total(x >= t) >= target, where total counts tokens (top-k)
// or sums their weights (top-p). Logits stand for themselves as ordered keys.
#pragma once

#include <cmath>

#include "sampler/cuda/plan.h"
#include "sampler/spec.h"

// Only nvcc's device pass knows the pragma.
#if defined(__CUDA_ARCH__)
#define TWINJET_UNROLL _Pragma("unroll")
#else
#define TWINJET_UNROLL
#endif

namespace twinjet::sampler::cuda {

constexpr int kNumPivots = 7;
constexpr uint32_t kKeyOfNegativeInfinity = 0x007fffffu;

// total(key >= lo) = reached >= target > total(key >= hi) = above.
struct Bracket {
  uint32_t lo;
  uint32_t hi;
  uint64_t above;
  uint64_t reached;
};

// Ascending keys in (lo, hi); may repeat.
struct Pivots {
  uint32_t key[kNumPivots];
};

// The largest float below key hi. No float has the key just below that of the zeros, and what FloatFromKey
// makes of it, -0, equals +0.
TWINJET_HD float LastBelow(uint32_t hi) {
  constexpr uint32_t kKeyOfZero = 0x80000000u;
  return FloatFromKey(hi == kKeyOfZero ? hi - 2 : hi - 1);
}

TWINJET_HD uint32_t ClampKey(uint32_t key, const Bracket& bracket) {
  if (key <= bracket.lo) return bracket.lo + 1;
  return key >= bracket.hi ? bracket.hi - 1 : key;
}

// A search by mass first lists about so many tokens: most nuclei are smaller, and so many are quickly
// settled. A group's maximum counts for one, though in small vocabularies a group has several of them.
TWINJET_HD int32_t NumListed(int32_t num_groups) { return num_groups / 2 < 80 ? num_groups / 2 : 80; }

// From here up it lists tokens where no bound of their number is at hand.
TWINJET_HD uint32_t FirstMassPivot(float max, float scale) {
  return OrderedKey(SubRn(max, MulRn(7.0f, 1.0f / scale)));
}

// What a row's mass may be: between two numbers, or exactly.
struct MassBounds {
  uint64_t least;
  uint64_t most;
};

// Of a mass that scans of the row's groups add up to, with u = 2^-24: a token's exponent and its weight's
// differ by less than 4.1 u |z|, so all of them together by less than 4.1 u ln 2 of the mean |z| by weight,
// which log2 V bounds (docs/sampler.md, "Error bounds"): 3.3e-6. Three powers of two differ by 4 u each, sums
// and products by at most 36 roundings, weights by 2 u and what is cut off them by 2^-25 in all: less
// than 6.5e-6 together.
TWINJET_HD MassBounds BoundsOfScans(uint64_t about) {
  const uint64_t slack = about >> 17;
  return {about - slack, about + slack};
}

// A key that the threshold cannot lie below: num_tokens tokens lighter than it weigh no more than may be
// dropped, total - target. The margin covers the weights' rounding and the float arithmetic here.
TWINJET_HD uint32_t LeastMassKey(float max, float scale, uint64_t total, uint64_t target,
                                 int32_t num_tokens) {
  const uint64_t weight = (total - target) / static_cast<uint32_t>(num_tokens);
  if (weight < 4) return kKeyOfNegativeInfinity;
  int log2_weight = 0;
  while (log2_weight < 62 && (weight >> (log2_weight + 1)) != 0) ++log2_weight;
  const float z = static_cast<float>(log2_weight - kMassBits - 1);
  const float x = AddRn(max, MulRn(z, 1.0f / scale));
  // Far from 0 a float is too coarse to hold the place: no guarantee then.
  if (!(x < max) || ZOf(x, max, scale) > AddRn(z, 0.9f)) return kKeyOfNegativeInfinity;
  return OrderedKey(x);
}

// First pivots of a search by count below `top`, given a length typical of the row.
TWINJET_HD Pivots CountPivots(const Bracket& bracket, float top, float length) {
  constexpr float kStep[kNumPivots] = {-8.0f, -4.0f, -2.0f, -1.0f, -0.5f, -0.25f, 0.0f};
  Pivots pivots;
  TWINJET_UNROLL
  for (int i = 0; i < kNumPivots; ++i) {
    pivots.key[i] = ClampKey(OrderedKey(AddRn(top, MulRn(kStep[i], length))), bracket);
  }
  return pivots;
}

// Equal steps of the key: bounds the number of rounds on any row.
TWINJET_HD Pivots KeyPivots(const Bracket& bracket) {
  const uint64_t width = bracket.hi - bracket.lo;
  Pivots pivots;
  TWINJET_UNROLL
  for (int i = 0; i < kNumPivots; ++i) {
    const uint64_t offset = width * static_cast<uint32_t>(i + 1) / (kNumPivots + 1);
    pivots.key[i] = ClampKey(bracket.lo + static_cast<uint32_t>(offset), bracket);
  }
  return pivots;
}

// Where the next pivots of a bracket go. Round 0: equal steps of the logit. Then close around the place where
// the target would lie if the total grew evenly, which it nearly does over a short stretch; but every third
// round by KeyPivots.
TWINJET_HD Pivots NextPivots(const Bracket& bracket, uint64_t target, int round) {
  constexpr float kEven[kNumPivots] = {0.125f, 0.25f, 0.375f, 0.5f, 0.625f, 0.75f, 0.875f};
  constexpr float kClose[kNumPivots] = {-0.2f, -0.06f, -0.02f, 0.0f, 0.02f, 0.06f, 0.2f};
  const float lo = FloatFromKey(bracket.lo);
  const float hi = LastBelow(bracket.hi);
  const float width = SubRn(hi, lo);
  if (round % 3 == 2 || !(width > 0.0f) || !IsFinite(width)) return KeyPivots(bracket);
  const float share = static_cast<float>(static_cast<double>(bracket.reached - target) /
                                         static_cast<double>(bracket.reached - bracket.above));
  Pivots pivots;
  TWINJET_UNROLL
  for (int i = 0; i < kNumPivots; ++i) {
    const float place = round == 0 ? kEven[i] : AddRn(share, kClose[i]);
    pivots.key[i] = ClampKey(OrderedKey(AddRn(lo, MulRn(width, place))), bracket);
  }
  return pivots;
}

// sums[i] = total(pivot i <= key < hi).
TWINJET_HD Bracket Shrink(const Bracket& bracket, const Pivots& pivots, const uint64_t* sums,
                          uint64_t target) {
  Bracket next = bracket;
  TWINJET_UNROLL
  for (int i = 0; i < kNumPivots; ++i) {
    const uint64_t total = bracket.above + sums[i];
    if (total >= target) {
      next.lo = pivots.key[i];
      next.reached = total;
    } else if (pivots.key[i] < next.hi) {
      next.hi = pivots.key[i];
      next.above = total;
    }
  }
  return next;
}

// A bracket's logits parted evenly into kNumBins bins.
struct BinGrid {
  float lo;
  float width;
  float per_bin;  // kNumBins / width
  bool is_fit;    // the bracket is neither too narrow nor endless
};
TWINJET_HD BinGrid GridBetween(float lo, float hi) {
  const float width = SubRn(hi, lo);
  return {lo, width, static_cast<float>(kNumBins) / width, width > 0x1p-60f && IsFinite(width)};
}
TWINJET_HD BinGrid GridOf(const Bracket& bracket) {
  return GridBetween(FloatFromKey(bracket.lo), LastBelow(bracket.hi));
}
TWINJET_HD float EdgeOf(const BinGrid& grid, int32_t bin) {
  return AddRn(grid.lo, MulRn(grid.width, static_cast<float>(bin) * (1.0f / kNumBins)));
}

// About the bin of x, a logit of the bracket.
TWINJET_HD int32_t GuessBin(const BinGrid& grid, float x) {
  const auto bin = static_cast<int32_t>(MulRn(SubRn(x, grid.lo), grid.per_bin));
  return bin < kNumBins ? bin : kNumBins - 1;
}

// The last bin whose edge x reaches.
TWINJET_HD int32_t BinOf(const BinGrid& grid, float x) {
  int32_t bin = GuessBin(grid, x);
  while (bin > 0 && x < EdgeOf(grid, bin)) --bin;
  while (bin < kNumBins - 1 && x >= EdgeOf(grid, bin + 1)) ++bin;
  return bin;
}

// A search from above for a logit that at least k of a set of values reach, and few more than k: the values
// from lo up are counted in bins, the bin where their number reaches k becomes the next stretch.
struct CountedBin {
  int32_t bin;
  int32_t count;  // values in it and above
};
struct Stretch {
  float lo;  // at least k values reach it
  float hi;
};
// The bin of a value from lo up; what lies above hi is in the last one.
TWINJET_HD int32_t BinAbove(const BinGrid& grid, float x) {
  const float place = MulRn(SubRn(x, grid.lo), grid.per_bin);
  return place < static_cast<float>(kNumBins - 1) ? static_cast<int32_t>(place) : kNumBins - 1;
}
// All values of the bin and above reach the new lo: a hundredth of a bin outweighs the roundings of the place
// and of the product, and a sum that is no larger than a float is not rounded to anything larger.
TWINJET_HD Stretch NarrowTo(const Stretch& stretch, const BinGrid& grid, int32_t bin) {
  constexpr float kPerBin = 1.0f / kNumBins;
  Stretch next = stretch;
  if (bin > 0) next.lo = AddRn(grid.lo, MulRn(grid.width, (static_cast<float>(bin) - 0.01f) * kPerBin));
  if (bin < kNumBins - 1) next.hi = EdgeOf(grid, bin + 1);
  return next;
}
constexpr int kMaxStretches = 4;
TWINJET_HD bool IsCloseCount(int32_t count, int32_t k) { return count <= k + k / 4; }

// What a bin of a sample weighs, about: all its tokens as if they lay in its middle.
TWINJET_HD uint64_t MassOfSampledBin(const BinGrid& grid, int32_t bin, uint64_t count, float max,
                                     float scale) {
  const float middle = AddRn(EdgeOf(grid, bin), MulRn(grid.width, 0.5f / kNumBins));
  return count * WeightOf(middle < max ? middle : max, max, scale);
}

// The bin in which the mass from the bottom first exceeds some amount.
struct BinPlace {
  int32_t bin;
  uint64_t before;  // mass of the bins below it
  uint64_t mass;    // its own
  uint64_t total;   // of all bins; not above the amount: there is no such bin
};

// That bin as a bracket.
TWINJET_HD Bracket BracketOfBin(const Bracket& bracket, const BinGrid& grid, const BinPlace& place) {
  Bracket next;
  next.lo = place.bin == 0 ? bracket.lo : OrderedKey(EdgeOf(grid, place.bin));
  next.hi = place.bin == kNumBins - 1 ? bracket.hi : OrderedKey(EdgeOf(grid, place.bin + 1));
  next.reached = bracket.above + place.total - place.before;
  next.above = next.reached - place.mass;
  return next;
}

// A bracket [lo, hi) that a search by mass over a sample of the tokens ends with, made as wide as the
// sample's noise: its masses are not known yet. dropped: mass of the sample below the threshold. limits: not
// left.
TWINJET_HD Bracket WindowOfSample(const Bracket& sampled, uint64_t target, uint64_t dropped, float max,
                                  float scale, const Bracket& limits) {
  Bracket window = limits;
  const float lo = FloatFromKey(sampled.lo);
  const float width = SubRn(LastBelow(sampled.hi), lo);
  if (!(width > 0.0f) || !IsFinite(width) || sampled.reached <= sampled.above) return window;
  const float inside = static_cast<float>(sampled.reached - sampled.above);
  const float share = static_cast<float>(sampled.reached - target) / inside;
  const float middle = AddRn(lo, MulRn(width, share));
  // As if all that is dropped were tokens as heavy as those at the threshold.
  const float weight = ScaledExp2(ZOf(middle, max, scale));
  const float noise = sqrtf(MulRn(static_cast<float>(dropped), weight)) / inside;
  const float margin = MulRn(width, AddRn(MulRn(3.5f, noise), 0.02f));
  const uint32_t low = OrderedKey(SubRn(middle, margin)), high = OrderedKey(AddRn(middle, margin));
  if (low > limits.lo && low < limits.hi) window.lo = low;
  if (high > window.lo && high < limits.hi) window.hi = high;
  return window;
}

// The smallest key whose z is at least min_z: min-p as a threshold on the logit. max is finite.
TWINJET_HD uint32_t MinPKey(float max, float scale, float min_z) {
  uint32_t lo = kKeyOfNegativeInfinity;
  uint32_t hi = OrderedKey(max);
  if (ZOf(FloatFromKey(lo), max, scale) >= min_z) return lo;
  // z(lo) < min_z <= z(hi). As a rule float arithmetic is off by a few keys only.
  const uint32_t guess = OrderedKey(AddRn(max, MulRn(min_z, 1.0f / scale)));
  const uint32_t below = guess - 8, above = guess + 8;
  if (below > lo && below < hi && ZOf(FloatFromKey(below), max, scale) < min_z) lo = below;
  if (above > lo && above < hi && ZOf(FloatFromKey(above), max, scale) >= min_z) hi = above;
  while (hi - lo > 1) {
    const uint32_t middle = lo + (hi - lo) / 2;
    if (ZOf(FloatFromKey(middle), max, scale) >= min_z) {
      hi = middle;
    } else {
      lo = middle;
    }
  }
  return hi;
}

// 2^(z + 44) before truncation, as a double's bits: adding it to an integer double of at least 2^52
// with rounding toward zero adds the integer weight. z at most 0.
TWINJET_HD uint64_t WeightAsDoubleBits(float z) {
#if defined(__CUDA_ARCH__)
  const float clamped = fmaxf(z, kMinZ);  // one instruction; kMinZ for NaN, as below
#else
  const float clamped = z > kMinZ ? z : kMinZ;
#endif
  const float shifted = AddRn(clamped, kRoundMagic);
  const float n = SubRn(shifted, kRoundMagic);
  const float f = SubRn(clamped, n);
  float p = kExp2C6;
  p = FmaRn(p, f, kExp2C5);
  p = FmaRn(p, f, kExp2C4);
  p = FmaRn(p, f, kExp2C3);
  p = FmaRn(p, f, kExp2C2);
  p = FmaRn(p, f, kExp2C1);
  p = FmaRn(p, f, 1.0f);
  // The low 9 bits of kRoundMagic are 0, so the shift leaves n alone. p's exponent is at least 126 and
  // n at least -46: 80 or more, a positive normal float.
  const uint32_t bits = FloatBits(p) + (FloatBits(shifted) << 23);
  // Widening moves the fraction by 52 - 23 places and the exponent's bias by 1023 - 127.
  return static_cast<uint64_t>(bits) * (1ull << 29) + (static_cast<uint64_t>(1023 - 127 + kMassBits) << 52);
}

}  // namespace twinjet::sampler::cuda
