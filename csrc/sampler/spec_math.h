// Per-element arithmetic of the sampler's specification: everything that scalar, AVX2, AVX-512 and
// CUDA code must reproduce bit for bit. docs/sampler.md explains the choices and derives the errors.
#pragma once

#include "sampler/hd.h"

namespace twinjet::sampler {

constexpr int kMassBits = 44;           // the largest weight of a row is 2^44
constexpr int kMaxVocabSize = 1 << 19;  // keeps every sum of weights at or below 2^63
constexpr int kGroupSize = 256;         // consecutive token ids that race together
constexpr float kMinZ = -46.0f;         // -(kMassBits + 2): the weight is 0 from here down
constexpr float kGreedyTemperature = 1e-5f;
constexpr double kLog2E = 0x1.71547652b82fep+0;
constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds |z| < 2^22 to an integer

// 2^f on [-1/2, 1/2], constant term 1: coefficients of f^1 .. f^6.
constexpr float kExp2C1 = 0x1.62e430p-1f;
constexpr float kExp2C2 = 0x1.ebfbdap-3f;
constexpr float kExp2C3 = 0x1.c6af2cp-5f;
constexpr float kExp2C4 = 0x1.3b2e30p-7f;
constexpr float kExp2C5 = 0x1.5f3e6cp-10f;
constexpr float kExp2C6 = 0x1.41fbbcp-13f;

TWINJET_HD float PositiveInfinity() { return FloatFromBits(0x7f800000u); }
TWINJET_HD float NegativeInfinity() { return FloatFromBits(0xff800000u); }
TWINJET_HD bool IsNan(float x) { return (FloatBits(x) & 0x7fffffffu) > 0x7f800000u; }

// Widening of the 16-bit types; both are exact.
TWINJET_HD float FloatFromBfloat16(uint16_t bits) { return FloatFromBits(static_cast<uint32_t>(bits) << 16); }

TWINJET_HD float FloatFromHalf(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    return FloatFromBits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude < 0x400u) {  // zero and subnormal: magnitude * 2^-24 is exact
    return FloatFromBits(sign | FloatBits(MulRn(static_cast<float>(magnitude), 0x1p-24f)));
  }
  return FloatFromBits(sign | ((magnitude << 13) + 0x38000000u));
}

// ---- Steps 1 and 2: what happens to a logit before the maximum is taken ----

// x + b.
TWINJET_HD float ApplyBias(float x, float bias) { return AddRn(x, bias); }

// For a token of the prompt or of the output. inverse is float32(1 / penalty), rounded once on the
// host, so that both branches are one multiplication.
TWINJET_HD float ApplyRepetition(float x, float penalty, float inverse) {
  return MulRn(x, x > 0.0f ? inverse : penalty);
}

// For a token that occurs count > 0 times in the output: first frequency, then presence.
TWINJET_HD float ApplyFrequencyPresence(float x, float frequency, float presence, uint32_t count) {
  return SubRn(SubRn(x, MulRn(frequency, static_cast<float>(count))), presence);
}

// ---- Order of logits ----

// Unsigned integers in the order of the logits, -0 and +0 equal. Not defined for NaN.
TWINJET_HD uint32_t OrderedKey(float x) {
  const uint32_t bits = FloatBits(AddRn(x, 0.0f));  // -0 + 0 is +0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

TWINJET_HD float FloatFromKey(uint32_t key) {
  return FloatFromBits((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// ---- Steps 5 and 6: from logit to integer weight ----

// z of a logit, in units of log2: 0 for the maximum, negative below, -inf for a masked token.
// scale is RowConstants::scale. With max = +inf only the +inf tokens count.
TWINJET_HD float ZOf(float x, float max, float scale) {
  if (max == PositiveInfinity()) return x == max ? 0.0f : NegativeInfinity();
  return MulRn(SubRn(x, max), scale);
}

// 2^(z + 44) before truncation. z at most 0; below kMinZ is treated as kMinZ.
TWINJET_HD float ScaledExp2(float z) {
  const float clamped = z > kMinZ ? z : kMinZ;
  const float shifted = AddRn(clamped, kRoundMagic);
  const float n = SubRn(shifted, kRoundMagic);  // round half to even
  const float f = SubRn(clamped, n);            // exact
  float p = kExp2C6;
  p = FmaRn(p, f, kExp2C5);
  p = FmaRn(p, f, kExp2C4);
  p = FmaRn(p, f, kExp2C3);
  p = FmaRn(p, f, kExp2C2);
  p = FmaRn(p, f, kExp2C1);
  p = FmaRn(p, f, 1.0f);
  // The low bits of `shifted` hold n; the sum stays a normal float because n + 44 >= -2.
  const uint32_t exponent = (FloatBits(shifted) - FloatBits(kRoundMagic) + kMassBits) << 23;
  return FloatFromBits(FloatBits(p) + exponent);
}

// The integer weight: 2^44 at z = 0. Always a float's 24 significant bits, so it also is exact as
// a float, and the sum of a group's 256 weights is exact as a double.
TWINJET_HD uint64_t WeightOfZ(float z) { return static_cast<uint64_t>(ScaledExp2(z)); }

TWINJET_HD uint64_t WeightOf(float x, float max, float scale) { return WeightOfZ(ZOf(x, max, scale)); }

// ---- Logarithm ----

// Natural logarithm of a positive, normal double: the one logarithm of the specification.
// x = 2^k f with f in [sqrt(1/2), sqrt(2)), ln f = 2 atanh(s), s = (f - 1) / (f + 1).
TWINJET_HD double Ln(double x) {
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdull;
  const uint64_t bits = DoubleBits(x);
  // 1024 is added and taken away to keep the shifted value unsigned.
  const int64_t k = static_cast<int64_t>((bits - kSqrtHalf + (1024ull << 52)) >> 52) - 1024;
  const double f = DoubleFromBits(bits - (static_cast<uint64_t>(k) << 52));
  const double s = DivRn(SubRn(f, 1.0), AddRn(f, 1.0));
  const double z = MulRn(s, s);
  double q = 2.0 / 21.0;
  q = FmaRn(q, z, 2.0 / 19.0);
  q = FmaRn(q, z, 2.0 / 17.0);
  q = FmaRn(q, z, 2.0 / 15.0);
  q = FmaRn(q, z, 2.0 / 13.0);
  q = FmaRn(q, z, 2.0 / 11.0);
  q = FmaRn(q, z, 2.0 / 9.0);
  q = FmaRn(q, z, 2.0 / 7.0);
  q = FmaRn(q, z, 2.0 / 5.0);
  q = FmaRn(q, z, 2.0 / 3.0);
  q = FmaRn(q, z, 2.0);
  return FmaRn(static_cast<double>(k), kLn2, MulRn(s, q));
}

// ---- Step 9: top-p ----

// The least mass that must precede a token for it to be dropped: max(1, ceil(p * total)).
// p_fixed is floor(p * 2^64).
TWINJET_HD uint64_t TopPMass(uint64_t p_fixed, uint64_t total) {
  const uint64_t high = MulHi(p_fixed, total);
  const uint64_t rounded = p_fixed * total != 0 ? high + 1 : high;
  return rounded == 0 ? 1 : rounded;
}

// ---- Logprobs ----

// ln of a mass in units of the largest weight.
TWINJET_HD double LnMass(uint64_t mass) {
  return SubRn(Ln(static_cast<double>(mass)), MulRn(static_cast<double>(kMassBits), kLn2));
}

// Natural log probability of logit x in a row with maximum max (finite) at a temperature, ln_mass
// being LnMass of the row's kept mass at that temperature. -inf for a masked token.
TWINJET_HD float LogProb(float x, float max, float temperature, double ln_mass) {
  const double distance = SubRn(static_cast<double>(x), static_cast<double>(max));
  return static_cast<float>(SubRn(DivRn(distance, static_cast<double>(temperature)), ln_mass));
}

}  // namespace twinjet::sampler
