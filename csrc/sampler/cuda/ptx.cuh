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

// 2^x with a relative error below 2^-22 (on an H100 2^-22.7, over all floats), for x from -inf to 0; 0 where
// that is below 2^-126.
__device__ __forceinline__ float ApproximateExp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a / b with a relative error below 2^-22, for b from 2^-126 to 2^126.
__device__ __forceinline__ float ApproximateQuotient(float a, float b) {
  float y;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// The larger, or NaN where one of them is.
__device__ __forceinline__ float MaxOrNan(float a, float b) {
  float max;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(max) : "f"(a), "f"(b));
  return max;
}

}  // namespace twinjet::sampler::cuda
