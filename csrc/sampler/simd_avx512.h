// Sixteen float lanes for simd_kernels.h. Everything lies in the target's own unnamed namespace.
#pragma once

#include <immintrin.h>

#include "sampler/kernels.h"

namespace twinjet::sampler {
namespace {

constexpr int kLanes = 16;
using F32 = __m512;
using I32 = __m512i;
using F64 = __m512d;  // half as many lanes
using I64 = __m512i;

// Lanes as bits, lane 0 lowest.
using LaneMask = uint32_t;

F32 Set(float x) { return _mm512_set1_ps(x); }
F32 Load(const float* p) { return _mm512_loadu_ps(p); }
F32 LoadHalf(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
F32 LoadBfloat16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
void Store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
F32 Add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
F32 Sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
F32 Mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
F32 Fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
F32 Truncate(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
// b where a is NaN.
F32 Max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
F32 AddExponent(F32 p, F32 shifted) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
}
float HorizontalMax(F32 x) { return _mm512_reduce_max_ps(x); }
LaneMask AtLeast(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
LaneMask Less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
// low <= x < high.
LaneMask Within(F32 x, F32 low, F32 high) {
  return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, low, _CMP_GE_OQ), x, high, _CMP_LT_OQ);
}
LaneMask AnyNan(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
// x where a >= b, else 0.
F32 KeepAtLeast(F32 x, F32 a, F32 b) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), x); }
F32 NanToNegInf(F32 x, F32 neg_inf) {
  return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), neg_inf);
}
// x where the bit is 1, else -inf.
F32 KeepBits(F32 x, LaneMask bits, F32 neg_inf) {
  return _mm512_mask_mov_ps(neg_inf, static_cast<__mmask16>(bits), x);
}

// Stores the chosen lanes of x and of first_id + lane next to each other. Compressing in registers
// and storing whole vectors avoids the slow memory form of vpcompressd on Zen 4.
void Compress(F32 x, int32_t first_id, LaneMask bits, float* out_x, int32_t* out_id) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i ids = _mm512_add_epi32(lane, _mm512_set1_epi32(first_id));
  const __mmask16 mask = static_cast<__mmask16>(bits);
  _mm512_storeu_ps(out_x, _mm512_maskz_compress_ps(mask, x));
  _mm512_storeu_si512(out_id, _mm512_maskz_compress_epi32(mask, ids));
}

// Its half for the ids alone.
void CompressIds(int32_t first_id, LaneMask bits, int32_t* out_id) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i ids = _mm512_add_epi32(lane, _mm512_set1_epi32(first_id));
  _mm512_storeu_si512(out_id, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), ids));
}

F64 SetF64(double x) { return _mm512_set1_pd(x); }
F64 LoadF64(const double* p) { return _mm512_loadu_pd(p); }
void StoreF64(double* p, F64 x) { _mm512_storeu_pd(p, x); }
F64 AddF64(F64 a, F64 b) { return _mm512_add_pd(a, b); }
F64 SubF64(F64 a, F64 b) { return _mm512_sub_pd(a, b); }
F64 MulF64(F64 a, F64 b) { return _mm512_mul_pd(a, b); }
F64 DivF64(F64 a, F64 b) { return _mm512_div_pd(a, b); }
F64 FmaF64(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }

I32 SetI32(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
I32 LoadI32(const uint32_t* p) { return _mm512_loadu_si512(p); }
I32 AddI32(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
I32 AsI32(F32 x) { return _mm512_castps_si512(x); }
I32 ToI32(F32 x) { return _mm512_cvttps_epi32(x); }
// Modulo 2^32, which GCC's _mm512_reduce_add_epi32 is not: its last step is a signed addition.
uint32_t SumI32(I32 x) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti32x8_epi32(x, 1));
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(y));
}
I32 Xor(I32 a, I32 b) { return _mm512_xor_si512(a, b); }
// 32 x 32 -> 64 bits, by halves.
void MulWide(I32 a, I32 b, I32* low, I32* high) {
  const __m512i even = _mm512_mul_epu32(a, b);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
  *low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  *high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}
// The lower or upper half of the lanes, widened without sign.
I64 Widen(I32 x, int half) {
  return _mm512_cvtepu32_epi64(half == 0 ? _mm512_castsi512_si256(x) : _mm512_extracti32x8_epi32(x, 1));
}
I64 SetI64(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
I64 OrI64(I64 a, I64 b) { return _mm512_or_si512(a, b); }
I64 AddI64(I64 a, I64 b) { return _mm512_add_epi64(a, b); }
I64 SubI64(I64 a, I64 b) { return _mm512_sub_epi64(a, b); }
template <int kCount>
I64 ShiftLeftI64(I64 x) {
  return _mm512_slli_epi64(x, kCount);
}
template <int kCount>
I64 ShiftRightI64(I64 x) {
  return _mm512_srli_epi64(x, kCount);
}
F64 AsF64(I64 x) { return _mm512_castsi512_pd(x); }
I64 AsI64(F64 x) { return _mm512_castpd_si512(x); }

}  // namespace
}  // namespace twinjet::sampler
