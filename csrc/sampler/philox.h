// Counter-based randomness: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers:
// as easy as 1, 2, 3", SC 2011) and the exponential race drawn from it.
#pragma once

#include "sampler/spec_math.h"

namespace twinjet::sampler {

constexpr uint32_t kPhiloxM0 = 0xd2511f53u;
constexpr uint32_t kPhiloxM1 = 0xcd9e8d57u;
constexpr uint32_t kPhiloxW0 = 0x9e3779b9u;
constexpr uint32_t kPhiloxW1 = 0xbb67ae85u;

// The fourth counter word is a group's or a token's index with the level in the top bit.
constexpr uint32_t kGroupLevel = 0u;
constexpr uint32_t kTokenLevel = 0x80000000u;

struct PhiloxBlock {
  uint32_t word[4];
};

// What is the same for all draws of a row.
struct RaceKey {
  uint64_t seed;          // of the request
  uint64_t position;      // of the token being drawn
  uint32_t output_index;  // which of the request's sequences
};

TWINJET_HD PhiloxBlock Philox(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxM0) * counter.word[0];
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxM1) * counter.word[2];
    const PhiloxBlock next = {
        {static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
         static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    counter = next;
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  return counter;
}

// (r + 1/2) * 2^-52 with r the top 52 of the block's first 64 bits (word 1 high, word 0 low):
// exact, and never 0 or 1.
TWINJET_HD double UniformOf(uint32_t low, uint32_t high) {
  const uint64_t r = ((static_cast<uint64_t>(high) << 32) | low) >> 12;
  return MulRn(AddRn(static_cast<double>(r), 0.5), 0x1p-52);
}

// The exponential variate of one runner; index carries its level bit.
TWINJET_HD double ExponentialOf(const RaceKey& key, uint32_t index) {
  const PhiloxBlock counter = {{static_cast<uint32_t>(key.position),
                                static_cast<uint32_t>(key.position >> 32), key.output_index, index}};
  const PhiloxBlock block =
      Philox(counter, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
  return -Ln(UniformOf(block.word[0], block.word[1]));
}

// A runner's time: the smallest wins, the lower index on a tie. mass is at least 1 and at most 2^53.
TWINJET_HD double RaceTime(double exponential, uint64_t mass) {
  return DivRn(exponential, static_cast<double>(mass));
}

}  // namespace twinjet::sampler
