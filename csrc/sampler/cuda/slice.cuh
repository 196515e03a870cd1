// How logits lie in a block's slice: as float32, or as the 16 bits that came where nothing changes them. All
// passes read them here, four at a time, widened.
#pragma once

#include "sampler/cuda/block.cuh"
#include "sampler/cuda/ptx.cuh"

namespace twinjet::sampler::cuda {

template <Dtype kDtype>
__device__ __forceinline__ float4 Widen(const uint2& pair) {
  if (kDtype == Dtype::kBfloat16)
    return make_float4(__uint_as_float(pair.x << 16), __uint_as_float(pair.x & 0xffff0000u),
                       __uint_as_float(pair.y << 16), __uint_as_float(pair.y & 0xffff0000u));
  return make_float4(WidenHalf(pair.x & 0xffffu), WidenHalf(pair.x >> 16), WidenHalf(pair.y & 0xffffu),
                     WidenHalf(pair.y >> 16));
}

template <Dtype kStored>
struct StoredFour {
  uint2 bits;

  __device__ __forceinline__ float4 Widened() const { return Widen<kStored>(bits); }
  // x must be what the type holds exactly.
  static __device__ __forceinline__ StoredFour Of(const float4& x) {
    if (kStored == Dtype::kBfloat16)
      return {{__float_as_uint(x.x) >> 16 | (__float_as_uint(x.y) & 0xffff0000u),
               __float_as_uint(x.z) >> 16 | (__float_as_uint(x.w) & 0xffff0000u)}};
    return {{NarrowToHalf(x.x) | NarrowToHalf(x.y) << 16, NarrowToHalf(x.z) | NarrowToHalf(x.w) << 16}};
  }
};

template <>
struct StoredFour<Dtype::kFloat32> {
  float4 bits;

  __device__ __forceinline__ float4 Widened() const { return bits; }
  static __device__ __forceinline__ StoredFour Of(const float4& x) { return {x}; }
};

template <Dtype kStored>
__device__ __forceinline__ StoredFour<kStored>* FoursOf(const Block& block) {
  return reinterpret_cast<StoredFour<kStored>*>(block.slice);
}

// Token i of the slice.
template <Dtype kStored>
__device__ __forceinline__ float TokenOf(const Block& block, int32_t i) {
  if (kStored == Dtype::kFloat32) return block.slice[i];
  const uint32_t bits = reinterpret_cast<const uint16_t*>(block.slice)[i];
  return kStored == Dtype::kFloat16 ? WidenHalf(bits) : __uint_as_float(bits << 16);
}

// x must be what the type holds exactly.
template <Dtype kStored>
__device__ __forceinline__ void SetToken(const Block& block, int32_t i, float x) {
  if (kStored == Dtype::kFloat32) {
    block.slice[i] = x;
  } else {
    reinterpret_cast<uint16_t*>(block.slice)[i] =
        static_cast<uint16_t>(kStored == Dtype::kFloat16 ? NarrowToHalf(x) : __float_as_uint(x) >> 16);
  }
}

}  // namespace twinjet::sampler::cuda
