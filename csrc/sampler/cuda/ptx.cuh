// Single instructions of a thread that C++ has no name for. The machine of tests/cpp has its own.
#pragma once

#include <cstdint>

namespace twinjet::sampler::cuda {

__device__ __forceinline__ float WidenHalf(uint32_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
}
__device__ __forceinline__ uint32_t NarrowToHalf(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// 16 bytes that will not be read again.
__device__ __forceinline__ uint4 LoadOnce(const void* address) {
  uint4 value;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(address));
  return value;
}

// The larger, or NaN where one of them is.
__device__ __forceinline__ float MaxOrNan(float a, float b) {
  float max;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(max) : "f"(a), "f"(b));
  return max;
}

}  // namespace twinjet::sampler::cuda
