// The specification's arithmetic: published vectors, exactness, and what holds over all floats.
// TWINJET_TEST_ALL_FLOATS=1 walks every float z in range (seconds at -O2); otherwise every 997th.
#include <cmath>
#include <cstdlib>

#include "check.h"
#include "sampler/spec.h"

using namespace twinjet::sampler;

TEST(philox_matches_the_published_vectors) {
  const PhiloxBlock zero = Philox({{0, 0, 0, 0}}, 0, 0);
  CHECK_EQ(zero.word[0], 0x6627e8d5u);
  CHECK_EQ(zero.word[1], 0xe169c58du);
  CHECK_EQ(zero.word[2], 0xbc57ac4cu);
  CHECK_EQ(zero.word[3], 0x9b00dbd8u);
  const PhiloxBlock pi =
      Philox({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0xa4093822u, 0x299f31d0u);
  CHECK_EQ(pi.word[0], 0xd16cfe09u);
  CHECK_EQ(pi.word[1], 0x94fdccebu);
  CHECK_EQ(pi.word[2], 0x5001e420u);
  CHECK_EQ(pi.word[3], 0x24126ea1u);
}

TEST(weight_at_powers_of_two_is_exact) {
  for (int n = 0; n <= 44; ++n) CHECK_EQ(WeightOfZ(static_cast<float>(-n)), uint64_t{1} << (44 - n));
  CHECK_EQ(WeightOfZ(-45.0f), uint64_t{0});
  CHECK_EQ(WeightOfZ(NegativeInfinity()), uint64_t{0});
}

// Not monotone to the last place: q rounds in p = fma(q, f, 1). But a weight never exceeds that of
// the next larger z by more than one unit of its 24-bit significand, and only above z = -2.
TEST(weight_rises_with_z_but_for_one_unit) {
  const bool all = std::getenv("TWINJET_TEST_ALL_FLOATS") != nullptr;
  uint64_t num_falls = 0;
  for (uint32_t bits = 0x80000000u; bits < FloatBits(-46.0f); bits += all ? 1 : 997) {
    const float z = FloatFromBits(bits);
    const uint64_t larger = WeightOfZ(z), smaller = WeightOfZ(FloatFromBits(bits + 1));
    if (smaller <= larger) continue;
    ++num_falls;
    CHECK(z > -2.0f);
    CHECK(FloatBits(static_cast<float>(smaller)) - FloatBits(static_cast<float>(larger)) == 1);
  }
  std::printf("     %llu falls\n", static_cast<unsigned long long>(num_falls));
  if (all) CHECK_EQ(num_falls, uint64_t{83706});
}

TEST(weight_has_the_stated_error) {
  double worst = 0.0;
  for (uint32_t bits = 0x80000000u; bits < FloatBits(-20.0f); bits += 4001) {
    const float z = FloatFromBits(bits);
    const double exact = std::exp2(static_cast<double>(z) + 44.0);
    worst = std::max(worst, std::abs(static_cast<double>(WeightOfZ(z)) - exact) / exact);
  }
  CHECK(worst < 0x1p-23);
}

TEST(keys_order_floats) {
  const float values[] = {NegativeInfinity(), -3e38f, -1.0f, -1e-45f, 0.0f, 1e-45f, 1.0f, 3e38f,
                          PositiveInfinity()};
  for (size_t i = 1; i < sizeof values / sizeof *values; ++i)
    CHECK(OrderedKey(values[i - 1]) < OrderedKey(values[i]));
  CHECK_EQ(OrderedKey(-0.0f), OrderedKey(0.0f));
  for (float x : values) CHECK_EQ(FloatFromKey(OrderedKey(x)), x);
}

TEST(every_half_widens_exactly) {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const float x = FloatFromHalf(static_cast<uint16_t>(bits));
    const uint32_t exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
    if (exponent == 31 && mantissa != 0) {
      CHECK(IsNan(x));
      continue;
    }
    double expected = exponent == 0 ? std::ldexp(mantissa, -24)
                                    : std::ldexp(1024 + mantissa, static_cast<int>(exponent) - 25);
    if (exponent == 31) expected = std::numeric_limits<double>::infinity();
    CHECK_EQ(static_cast<double>(x), (bits & 0x8000u) != 0 ? -expected : expected);
  }
}

TEST(top_p_mass_is_the_ceiling) {
  std::mt19937_64 random = test::Random();
  for (int i = 0; i < 100000; ++i) {
    const uint64_t p = random() >> (random() % 64), total = 1 + (random() >> (1 + random() % 63));
    const unsigned __int128 product = static_cast<unsigned __int128>(p) * total;
    uint64_t expected = static_cast<uint64_t>(product >> 64) + (static_cast<uint64_t>(product) != 0 ? 1 : 0);
    if (expected == 0) expected = 1;
    CHECK_EQ(TopPMass(p, total), expected);
  }
}

TEST(parameters_are_checked) {
  const float nan = std::nanf("");
  RowConstants constants;
  const auto with = [&](auto change) {
    RowParams params;
    change(params);
    return PrepareRow(params, 100, &constants);
  };
  for (float bad : {nan, PositiveInfinity(), NegativeInfinity(), -1.0f}) {
    CHECK(with([bad](RowParams& p) { p.temperature = bad; }) == ParamError::kTemperature);
  }
  CHECK(with([nan](RowParams& p) { p.top_p = nan; }) == ParamError::kTopP);
  CHECK(with([](RowParams& p) { p.min_p = PositiveInfinity(); }) == ParamError::kMinP);
  CHECK(with([](RowParams& p) { p.top_k = -2; }) == ParamError::kTopK);
  CHECK(with([](RowParams& p) { p.repetition_penalty = 0.0f; }) == ParamError::kRepetitionPenalty);
  CHECK(with([](RowParams& p) { p.repetition_penalty = 1e-45f; }) == ParamError::kRepetitionPenalty);
  CHECK(with([nan](RowParams& p) { p.frequency_penalty = nan; }) == ParamError::kFrequencyPenalty);
  CHECK(with([nan](RowParams& p) { p.presence_penalty = nan; }) == ParamError::kPresencePenalty);
  CHECK(with([](RowParams& p) { p.top_k = 101; }) == ParamError::kNone);
  CHECK_EQ(constants.top_k, 0);
}
