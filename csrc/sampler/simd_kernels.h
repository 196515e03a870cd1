// The kernels in terms of the vector types of simd_avx2.h or simd_avx512.h, one of which must have
// been included before. For kernels_avx2.cc and kernels_avx512.cc only. All of it has internal
// linkage: with external linkage the linker would keep one target's copy for both; so nothing of the standard
// library is called either.
#pragma once

namespace twinjet::sampler {
namespace {

int32_t Least(int32_t a, int32_t b) { return a < b ? a : b; }

static_assert(kGroupSize % (4 * kLanes) == 0);

// A weight below this z is 0, with room for the polynomial's error.
constexpr float kZeroWeightZ = -45.0f;

struct Float32Source {
  const float* data;
  F32 Vector(int32_t i) const { return Load(data + i); }
  float Scalar(int32_t i) const { return data[i]; }
};

struct Float16Source {
  const uint16_t* data;
  F32 Vector(int32_t i) const { return LoadHalf(data + i); }
  float Scalar(int32_t i) const { return FloatFromHalf(data[i]); }
};

struct Bfloat16Source {
  const uint16_t* data;
  F32 Vector(int32_t i) const { return LoadBfloat16(data + i); }
  float Scalar(int32_t i) const { return FloatFromBfloat16(data[i]); }
};

LaneMask MaskBits(const uint32_t* mask, int32_t i) {
  return (mask[i / 32] >> (i % 32)) & ((1u << kLanes) - 1u);
}

// The part of a group that does not fill a vector, and the whole of a short last group.
template <bool kWrite, typename Source>
bool ScanTail(const Source& source, int32_t begin, int32_t end, const uint32_t* mask, float* out,
              float* max) {
  bool has_nan = false;
  for (int32_t i = begin; i < end; ++i) {
    float x = source.Scalar(i);
    if (IsNan(x)) {
      has_nan = true;
      x = NegativeInfinity();
    }
    if (mask != nullptr && ((mask[i / 32] >> (i % 32)) & 1u) == 0) x = NegativeInfinity();
    if (x > *max) *max = x;
    if constexpr (kWrite) out[i] = x;
  }
  return has_nan;
}

template <typename Source>
bool ScanMaxima(const Source& source, int32_t n, float* group_max) {
  const F32 neg_inf = Set(NegativeInfinity());
  LaneMask nan = 0;
  bool tail_nan = false;
  for (int32_t begin = 0; begin < n; begin += kGroupSize) {
    const int32_t end = Least(n, begin + kGroupSize);
    F32 max0 = neg_inf, max1 = neg_inf, max2 = neg_inf, max3 = neg_inf;
    int32_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      const F32 x0 = source.Vector(i), x1 = source.Vector(i + kLanes);
      const F32 x2 = source.Vector(i + 2 * kLanes), x3 = source.Vector(i + 3 * kLanes);
      max0 = Max(x0, max0);
      max1 = Max(x1, max1);
      max2 = Max(x2, max2);
      max3 = Max(x3, max3);
      nan |= AnyNan(x0, x1) | AnyNan(x2, x3);
    }
    float max = HorizontalMax(Max(Max(max0, max1), Max(max2, max3)));
    tail_nan |= ScanTail<false>(source, i, end, nullptr, nullptr, &max);
    group_max[begin / kGroupSize] = max;
  }
  return nan != 0 || tail_nan;
}

template <typename Source>
bool ScanWrite(const Source& source, int32_t n, const uint32_t* mask, float* out, float* group_max) {
  const F32 neg_inf = Set(NegativeInfinity());
  LaneMask nan = 0;
  bool tail_nan = false;
  for (int32_t begin = 0; begin < n; begin += kGroupSize) {
    const int32_t end = Least(n, begin + kGroupSize);
    F32 max_lanes = neg_inf;
    int32_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      F32 x = source.Vector(i);
      nan |= AnyNan(x, x);
      x = NanToNegInf(x, neg_inf);
      if (mask != nullptr) x = KeepBits(x, MaskBits(mask, i), neg_inf);
      max_lanes = Max(x, max_lanes);
      Store(out + i, x);
    }
    float max = HorizontalMax(max_lanes);
    tail_nan |= ScanTail<true>(source, i, end, mask, out, &max);
    group_max[begin / kGroupSize] = max;
  }
  return nan != 0 || tail_nan;
}

template <typename Source>
bool ScanSource(const Source& source, int32_t n, const uint32_t* mask, float* out, float* group_max) {
  return out == nullptr ? ScanMaxima(source, n, group_max) : ScanWrite(source, n, mask, out, group_max);
}

bool Scan(const void* source, Dtype dtype, int32_t n, const uint32_t* mask, float* out, float* group_max) {
  switch (dtype) {
    case Dtype::kFloat16:
      return ScanSource(Float16Source{static_cast<const uint16_t*>(source)}, n, mask, out, group_max);
    case Dtype::kBfloat16:
      return ScanSource(Bfloat16Source{static_cast<const uint16_t*>(source)}, n, mask, out, group_max);
    case Dtype::kFloat32:
      break;
  }
  return ScanSource(Float32Source{static_cast<const float*>(source)}, n, mask, out, group_max);
}

// ScaledExp2 of spec_math.h for several vectors at once, truncated: one vector is a chain of some 45
// cycles, longer than a core looks ahead. The rounding constant carries the 44, which is even and so
// does not change how halves round. A difference may be an fma with a factor of 1: the same bits,
// and the multipliers have room while the adders do not. Always inlined: called, it would pass its vectors
// through memory.
template <int kCount>
[[gnu::always_inline]] inline void WeightVectors(F32 (&x)[kCount], F32 minus_max, F32 scale) {
  const F32 one = Set(1.0f), min_z = Set(kMinZ);
  const F32 magic = Set(kRoundMagic + static_cast<float>(kMassBits));
  F32 shifted[kCount], p[kCount];
  for (int v = 0; v < kCount; ++v) x[v] = Max(Mul(Fma(x[v], one, minus_max), scale), min_z);
  for (int v = 0; v < kCount; ++v) shifted[v] = Add(x[v], magic);
  for (int v = 0; v < kCount; ++v) x[v] = Sub(x[v], Sub(shifted[v], magic));
  for (int v = 0; v < kCount; ++v) p[v] = Fma(Set(kExp2C6), x[v], Set(kExp2C5));
  for (int v = 0; v < kCount; ++v) p[v] = Fma(p[v], x[v], Set(kExp2C4));
  for (int v = 0; v < kCount; ++v) p[v] = Fma(p[v], x[v], Set(kExp2C3));
  for (int v = 0; v < kCount; ++v) p[v] = Fma(p[v], x[v], Set(kExp2C2));
  for (int v = 0; v < kCount; ++v) p[v] = Fma(p[v], x[v], Set(kExp2C1));
  for (int v = 0; v < kCount; ++v) p[v] = Fma(p[v], x[v], one);
  for (int v = 0; v < kCount; ++v) x[v] = Truncate(AddExponent(p[v], shifted[v]));
}

constexpr int32_t kFloatsPerLine = 16;  // of cache
constexpr int kUnroll = 4;
constexpr int32_t kRun = kUnroll * kLanes;

// Sums integers of at most 2^44 held in floats, up to a group's worth of them. Adding kSplit rounds
// to a multiple of 2^22 and leaves that multiple in the low bits, so the high parts are summed as
// the floats' own bits; the low parts lie within 2^21, so four of them add up exactly as floats.
class MassSum {
 public:
  void Add(const F32 (&w)[kUnroll]) {
    const F32 split = Set(kSplit), one = Set(1.0f);
    F32 low[kUnroll];
    for (int v = 0; v < kUnroll; ++v) {
      const F32 shifted = sampler::Add(w[v], split);
      high_ = AddI32(high_, AsI32(shifted));
      low[v] = Sub(w[v], Fma(shifted, one, Set(-kSplit)));
    }
    low_ = AddI32(low_, ToI32(sampler::Add(sampler::Add(low[0], low[1]), sampler::Add(low[2], low[3]))));
    num_vectors_ += kUnroll;
  }

  uint64_t Total() const {
    const uint32_t bias = static_cast<uint32_t>(num_vectors_ * kLanes) * FloatBits(kSplit);
    const uint64_t high = SumI32(high_) - bias;
    const int64_t low = static_cast<int32_t>(SumI32(low_));
    return (high << 22) + static_cast<uint64_t>(low);
  }

 private:
  static constexpr float kSplit = 0x1.8p45f;
  I32 high_ = SetI32(0), low_ = SetI32(0);
  int num_vectors_ = 0;
};

template <bool kFilter, bool kStore>
uint64_t GroupMass(const float* x, int32_t n, float max, float scale, float threshold, float* weights) {
  const F32 minus_max = Set(-max), scales = Set(scale), thresholds = Set(threshold);
  MassSum sum;
  int32_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    F32 w[kUnroll];
    for (int v = 0; v < kUnroll; ++v) w[v] = Load(x + i + v * kLanes);
    WeightVectors(w, minus_max, scales);
    if constexpr (kFilter) {
      for (int v = 0; v < kUnroll; ++v) w[v] = KeepAtLeast(w[v], Load(x + i + v * kLanes), thresholds);
    }
    if constexpr (kStore) {
      for (int v = 0; v < kUnroll; ++v) Store(weights + i + v * kLanes, w[v]);
    }
    sum.Add(w);
  }
  uint64_t mass = sum.Total();
  for (; i < n; ++i) {
    const uint64_t weight = !kFilter || x[i] >= threshold ? WeightOf(x[i], max, scale) : 0;
    if constexpr (kStore) weights[i] = static_cast<float>(weight);
    mass += weight;
  }
  return mass;
}

template <bool kStore>
void MassesOfGroups(const float* x, int32_t n, const float* group_max, float max, float scale,
                    float threshold, const float* ahead, float* weights, uint64_t* masses) {
  const bool filter = threshold > NegativeInfinity();
  for (int32_t begin = 0; begin < n; begin += kGroupSize) {
    const int32_t size = Least(n - begin, kGroupSize);
    if (ahead != nullptr) {
      for (int32_t i = 0; i < size; i += kFloatsPerLine) __builtin_prefetch(ahead + begin + i, 0, 2);
    }
    const int32_t g = begin / kGroupSize;
    if (!(group_max[g] >= threshold) || ZOf(group_max[g], max, scale) < kZeroWeightZ) {
      masses[g] = 0;
    } else if (filter) {
      masses[g] =
          GroupMass<true, kStore>(x + begin, size, max, scale, threshold, kStore ? weights + begin : nullptr);
    } else {
      masses[g] = GroupMass<false, kStore>(x + begin, size, max, scale, threshold,
                                           kStore ? weights + begin : nullptr);
    }
  }
}

void GroupMasses(const float* x, int32_t n, const float* group_max, float max, float scale, float threshold,
                 const float* ahead, uint64_t* masses) {
  MassesOfGroups<false>(x, n, group_max, max, scale, threshold, ahead, nullptr, masses);
}

void WeighGroups(const float* x, int32_t n, const float* group_max, float max, float scale, float threshold,
                 float* weights, uint64_t* masses) {
  MassesOfGroups<true>(x, n, group_max, max, scale, threshold, nullptr, weights, masses);
}

int32_t SplitMasses(const float* x, const float* weights, int32_t n, const float* group_max,
                    const uint64_t* masses, float low, float high, uint64_t* above, int32_t* out_id) {
  const F32 lows = Set(low), highs = Set(high);
  int32_t count = 0;
  for (int32_t begin = 0; begin < n; begin += kGroupSize) {
    const int32_t g = begin / kGroupSize;
    if (masses[g] == 0 || !(group_max[g] >= low)) {
      above[g] = 0;
      continue;
    }
    const int32_t end = Least(n, begin + kGroupSize);
    MassSum sum;
    int32_t i = begin;
    for (; i + kRun <= end; i += kRun) {
      F32 w[kUnroll];
      for (int v = 0; v < kUnroll; ++v) {
        const int32_t first = i + v * kLanes;
        const F32 y = Load(x + first);
        w[v] = KeepAtLeast(Load(weights + first), y, highs);
        // Without a branch: a bracket of a few in a hundred tokens leaves no vector certain.
        const LaneMask bits = Within(y, lows, highs);
        CompressIds(first, bits, out_id + count);
        count += __builtin_popcount(bits);
      }
      sum.Add(w);
    }
    uint64_t mass = sum.Total();
    for (; i < end; ++i) {
      if (x[i] >= high) {
        mass += static_cast<uint64_t>(weights[i]);
      } else if (x[i] >= low) {
        out_id[count++] = i;
      }
    }
    above[g] = mass;
  }
  return count;
}

int32_t Collect(const float* x, int32_t n, const float* group_max, float threshold, float below, float* out_x,
                int32_t* out_id) {
  const F32 thresholds = Set(threshold), belows = Set(below);
  int32_t count = 0;
  for (int32_t begin = 0; begin < n; begin += kGroupSize) {
    if (!(group_max[begin / kGroupSize] >= threshold)) continue;
    const int32_t end = Least(n, begin + kGroupSize);
    int32_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      const F32 x0 = Load(x + i), x1 = Load(x + i + kLanes);
      const F32 x2 = Load(x + i + 2 * kLanes), x3 = Load(x + i + 3 * kLanes);
      if (AtLeast(Max(Max(x0, x1), Max(x2, x3)), thresholds) == 0) continue;
      const F32 vectors[4] = {x0, x1, x2, x3};
      for (int v = 0; v < 4; ++v) {
        const LaneMask bits = AtLeast(vectors[v], thresholds) & Less(vectors[v], belows);
        if (bits == 0) continue;
        Compress(vectors[v], i + v * kLanes, bits, out_x + count, out_id + count);
        count += __builtin_popcount(bits);
      }
    }
    for (; i < end; ++i) {
      if (x[i] >= threshold && x[i] < below) {
        out_x[count] = x[i];
        out_id[count] = i;
        ++count;
      }
    }
  }
  return count;
}

void Weigh(const float* x, int32_t n, float max, float scale, float* weights) {
  const F32 minus_max = Set(-max), scales = Set(scale);
  int32_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    F32 w[kUnroll];
    for (int v = 0; v < kUnroll; ++v) w[v] = Load(x + i + v * kLanes);
    WeightVectors(w, minus_max, scales);
    for (int v = 0; v < kUnroll; ++v) Store(weights + i + v * kLanes, w[v]);
  }
  for (; i + kLanes <= n; i += kLanes) {
    F32 w[1] = {Load(x + i)};
    WeightVectors(w, minus_max, scales);
    Store(weights + i, w[0]);
  }
  for (; i < n; ++i) weights[i] = static_cast<float>(WeightOf(x[i], max, scale));
}

int32_t CountAtLeast(const float* x, int32_t n, const float* group_max, float value) {
  const F32 values = Set(value);
  int32_t count = 0;
  for (int32_t begin = 0; begin < n; begin += kGroupSize) {
    if (!(group_max[begin / kGroupSize] >= value)) continue;
    const int32_t end = Least(n, begin + kGroupSize);
    int32_t i = begin;
    for (; i + kLanes <= end; i += kLanes) count += __builtin_popcount(AtLeast(Load(x + i), values));
    for (; i < end; ++i) count += x[i] >= value ? 1 : 0;
  }
  return count;
}

// Ln of spec_math.h.
F64 LnVector(F64 x) {
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdull;
  constexpr uint64_t kBias = 1024ull << 52;
  const I64 bits = AsI64(x);
  const I64 biased_k = ShiftRightI64<52>(AddI64(bits, SetI64(kBias - kSqrtHalf)));
  const F64 f = AsF64(SubI64(AddI64(bits, SetI64(kBias)), ShiftLeftI64<52>(biased_k)));
  // biased_k below the point of 2^52 reads as 2^52 + biased_k.
  const F64 k = SubF64(AsF64(OrI64(biased_k, SetI64(0x4330000000000000ull))), SetF64(0x1p52 + 1024.0));
  const F64 one = SetF64(1.0);
  const F64 s = DivF64(SubF64(f, one), AddF64(f, one));
  const F64 z = MulF64(s, s);
  F64 q = SetF64(2.0 / 21.0);
  q = FmaF64(q, z, SetF64(2.0 / 19.0));
  q = FmaF64(q, z, SetF64(2.0 / 17.0));
  q = FmaF64(q, z, SetF64(2.0 / 15.0));
  q = FmaF64(q, z, SetF64(2.0 / 13.0));
  q = FmaF64(q, z, SetF64(2.0 / 11.0));
  q = FmaF64(q, z, SetF64(2.0 / 9.0));
  q = FmaF64(q, z, SetF64(2.0 / 7.0));
  q = FmaF64(q, z, SetF64(2.0 / 5.0));
  q = FmaF64(q, z, SetF64(2.0 / 3.0));
  q = FmaF64(q, z, SetF64(2.0));
  return FmaF64(k, SetF64(kLn2), MulF64(s, q));
}

void ExponentialVectors(const RaceKey& key, I32 index, F64* low_half, F64* high_half) {
  const I32 m0 = SetI32(kPhiloxM0), m1 = SetI32(kPhiloxM1);
  uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
  I32 c0 = SetI32(static_cast<uint32_t>(key.position));
  I32 c1 = SetI32(static_cast<uint32_t>(key.position >> 32));
  I32 c2 = SetI32(key.output_index);
  I32 c3 = index;
  for (int round = 0; round < 10; ++round) {
    I32 low0, high0, low1, high1;
    MulWide(m0, c0, &low0, &high0);
    MulWide(m1, c2, &low1, &high1);
    c0 = Xor(Xor(high1, c1), SetI32(key0));
    c1 = low1;
    c2 = Xor(Xor(high0, c3), SetI32(key1));
    c3 = low0;
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  F64 halves[2];
  for (int half = 0; half < 2; ++half) {
    const I64 word = OrI64(ShiftLeftI64<32>(Widen(c1, half)), Widen(c0, half));
    const I64 r = ShiftRightI64<12>(word);
    const F64 exact = SubF64(AsF64(OrI64(r, SetI64(0x4330000000000000ull))), SetF64(0x1p52));
    const F64 u = MulF64(AddF64(exact, SetF64(0.5)), SetF64(0x1p-52));
    halves[half] = SubF64(SetF64(-0.0), LnVector(u));
  }
  *low_half = halves[0];
  *high_half = halves[1];
}

int32_t Race(const RaceKey& key, const uint32_t* indices, const double* masses, int32_t n) {
  int32_t best = 0;
  double best_time = 0.0;
  for (int32_t i = 0; i < n; i += kLanes) {
    uint32_t lane_index[kLanes];
    double lane_mass[kLanes];
    const int32_t size = Least(n - i, kLanes);
    const uint32_t* index = indices + i;
    const double* mass = masses + i;
    if (size < kLanes) {
      for (int32_t lane = 0; lane < kLanes; ++lane) {
        lane_index[lane] = lane < size ? index[lane] : 0;
        lane_mass[lane] = lane < size ? mass[lane] : 1.0;
      }
      index = lane_index;
      mass = lane_mass;
    }
    F64 low, high;
    ExponentialVectors(key, LoadI32(index), &low, &high);
    double times[kLanes];
    StoreF64(times, DivF64(low, LoadF64(mass)));
    StoreF64(times + kLanes / 2, DivF64(high, LoadF64(mass + kLanes / 2)));
    for (int32_t lane = 0; lane < size; ++lane) {
      if ((i == 0 && lane == 0) || times[lane] < best_time) {
        best_time = times[lane];
        best = i + lane;
      }
    }
  }
  return best;
}

}  // namespace
}  // namespace twinjet::sampler
