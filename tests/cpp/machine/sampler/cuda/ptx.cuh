// csrc/sampler/cuda/ptx.cuh for the machine on the host.
#pragma once

#include <cstdint>
#include <cstring>

#include "sampler/hd.h"

namespace twinjet::sampler::cuda {

inline float WidenHalf(uint32_t bits) {
  _Float16 half;
  const auto narrow = static_cast<uint16_t>(bits);
  std::memcpy(&half, &narrow, 2);
  return static_cast<float>(half);
}
inline uint32_t NarrowToHalf(float x) {
  const auto half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline uint4 LoadOnce(const void* address) {
  uint4 value;
  std::memcpy(&value, address, 16);
  return value;
}
// The card's may be wrong by so much; here they are, one way and the other.
inline float ApproximateExp2(float x) {
  const double y = std::exp2(static_cast<double>(x));
  const uint32_t bits = static_cast<uint32_t>(machine::BitsOf(x)) * 2654435761u;
  return y < 0x1p-126 ? 0.0f : static_cast<float>(y * (1.0 + (bits >> 31 != 0 ? 0x1p-22 : -0x1p-22)));
}
inline float ApproximateQuotient(float a, float b) { return a / b; }
inline float MaxOrNan(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }

}  // namespace twinjet::sampler::cuda
