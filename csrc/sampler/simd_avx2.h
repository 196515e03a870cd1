// Eight float lanes for simd_kernels.h. Everything lies in the target's own unnamed namespace.
#pragma once

#include <immintrin.h>

#include "sampler/kernels.h"

namespace twinjet::sampler {
namespace {

constexpr int kLanes = 8;
using F32 = __m256;
using I32 = __m256i;
using F64 = __m256d;  // half as many lanes
using I64 = __m256i;

// Lanes as bits, lane 0 lowest.
using LaneMask = uint32_t;

F32 Set(float x) { return _mm256_set1_ps(x); }
F32 Load(const float* p) { return _mm256_loadu_ps(p); }
F32 LoadHalf(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
F32 LoadBfloat16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
void Store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
F32 Add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
F32 Sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
F32 Mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
F32 Fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
F32 Truncate(F32 x) { return _mm256_round_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
// b where a is NaN.
F32 Max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
F32 AddExponent(F32 p, F32 shifted) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}
float HorizontalMax(F32 x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  y = _mm_max_ss(y, _mm_shuffle_ps(y, y, 1));
  return _mm_cvtss_f32(y);
}
LaneMask Bits(F32 mask) { return static_cast<uint32_t>(_mm256_movemask_ps(mask)); }
LaneMask AtLeast(F32 a, F32 b) { return Bits(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
LaneMask Less(F32 a, F32 b) { return Bits(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
// low <= x < high.
LaneMask Within(F32 x, F32 low, F32 high) {
  return Bits(_mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_GE_OQ), _mm256_cmp_ps(x, high, _CMP_LT_OQ)));
}
LaneMask AnyNan(F32 a, F32 b) { return Bits(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)); }
// x where a >= b, else 0.
F32 KeepAtLeast(F32 x, F32 a, F32 b) { return _mm256_and_ps(x, _mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
F32 NanToNegInf(F32 x, F32 neg_inf) {
  return _mm256_blendv_ps(x, neg_inf, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
// x where the bit is 1, else -inf.
F32 KeepBits(F32 x, LaneMask bits, F32 neg_inf) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit);
  return _mm256_blendv_ps(neg_inf, x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bit)));
}

// For each mask the numbers of its lanes, one a byte.
struct CompressTable {
  uint64_t lanes[256];
};

constexpr CompressTable MakeCompressTable() {
  CompressTable table = {};
  for (uint32_t bits = 0; bits < 256; ++bits) {
    int place = 0;
    for (uint64_t lane = 0; lane < 8; ++lane) {
      if ((bits >> lane) & 1u) table.lanes[bits] |= lane << (8 * place++);
    }
  }
  return table;
}
constexpr CompressTable kCompressTable = MakeCompressTable();

__m256i ChosenLanes(LaneMask bits) {
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kCompressTable.lanes[bits])));
}

void StoreIds(__m256i lanes, int32_t first_id, int32_t* out_id) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out_id),
                      _mm256_add_epi32(lanes, _mm256_set1_epi32(first_id)));
}

// Stores the chosen lanes of x and of first_id + lane next to each other.
void Compress(F32 x, int32_t first_id, LaneMask bits, float* out_x, int32_t* out_id) {
  const __m256i lanes = ChosenLanes(bits);
  _mm256_storeu_ps(out_x, _mm256_permutevar8x32_ps(x, lanes));
  StoreIds(lanes, first_id, out_id);
}

// Its half for the ids alone.
void CompressIds(int32_t first_id, LaneMask bits, int32_t* out_id) {
  StoreIds(ChosenLanes(bits), first_id, out_id);
}

F64 SetF64(double x) { return _mm256_set1_pd(x); }
F64 LoadF64(const double* p) { return _mm256_loadu_pd(p); }
void StoreF64(double* p, F64 x) { _mm256_storeu_pd(p, x); }
F64 AddF64(F64 a, F64 b) { return _mm256_add_pd(a, b); }
F64 SubF64(F64 a, F64 b) { return _mm256_sub_pd(a, b); }
F64 MulF64(F64 a, F64 b) { return _mm256_mul_pd(a, b); }
F64 DivF64(F64 a, F64 b) { return _mm256_div_pd(a, b); }
F64 FmaF64(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a, b, c); }

I32 SetI32(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
I32 LoadI32(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
I32 AddI32(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
I32 AsI32(F32 x) { return _mm256_castps_si256(x); }
I32 ToI32(F32 x) { return _mm256_cvttps_epi32(x); }
// Modulo 2^32.
uint32_t SumI32(I32 x) {
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(y));
}
I32 Xor(I32 a, I32 b) { return _mm256_xor_si256(a, b); }
// 32 x 32 -> 64 bits, by halves.
void MulWide(I32 a, I32 b, I32* low, I32* high) {
  const __m256i even = _mm256_mul_epu32(a, b);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
// The lower or upper half of the lanes, widened without sign.
I64 Widen(I32 x, int half) {
  return _mm256_cvtepu32_epi64(half == 0 ? _mm256_castsi256_si128(x) : _mm256_extracti128_si256(x, 1));
}
I64 SetI64(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
I64 OrI64(I64 a, I64 b) { return _mm256_or_si256(a, b); }
I64 AddI64(I64 a, I64 b) { return _mm256_add_epi64(a, b); }
I64 SubI64(I64 a, I64 b) { return _mm256_sub_epi64(a, b); }
template <int kCount>
I64 ShiftLeftI64(I64 x) {
  return _mm256_slli_epi64(x, kCount);
}
template <int kCount>
I64 ShiftRightI64(I64 x) {
  return _mm256_srli_epi64(x, kCount);
}
F64 AsF64(I64 x) { return _mm256_castsi256_pd(x); }
I64 AsI64(F64 x) { return _mm256_castpd_si256(x); }

}  // namespace
}  // namespace twinjet::sampler
