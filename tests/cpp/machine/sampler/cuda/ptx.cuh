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
inline float MaxOrNan(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }

}  // namespace twinjet::sampler::cuda
