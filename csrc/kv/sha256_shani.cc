// SHA-256 on the x86 SHA extensions. Compiled with -msha, so it must call no inline function that
// other files share: the linker might keep the copy made here for every CPU.
#include "kv/sha256.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

namespace twinjet::kv {
namespace {

// One message block into each of kLanes states. A round waits four cycles for the one before it; a
// second, independent lane fills the wait.
template <int kLanes>
inline void CompressLanes(uint32_t* const* states, const uint8_t* const* blocks) {
  const __m128i byte_swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  __m128i abef[kLanes], cdgh[kLanes], start_abef[kLanes], start_cdgh[kLanes], w[kLanes][4];
  for (int lane = 0; lane < kLanes; ++lane) {
    // The instructions want {f,e,b,a} and {h,g,d,c}, lowest word first.
    __m128i dcba = _mm_loadu_si128(reinterpret_cast<const __m128i*>(states[lane]));
    __m128i hgfe = _mm_loadu_si128(reinterpret_cast<const __m128i*>(states[lane] + 4));
    __m128i cdab = _mm_shuffle_epi32(dcba, 0xB1);
    __m128i efgh = _mm_shuffle_epi32(hgfe, 0x1B);
    abef[lane] = start_abef[lane] = _mm_alignr_epi8(cdab, efgh, 8);
    cdgh[lane] = start_cdgh[lane] = _mm_blend_epi16(efgh, cdab, 0xF0);
  }
#pragma GCC unroll 16
  for (int group = 0; group < 16; ++group) {
    const __m128i constants = _mm_load_si128(reinterpret_cast<const __m128i*>(kSha256Rounds + 4 * group));
#pragma GCC unroll 2
    for (int lane = 0; lane < kLanes; ++lane) {
      __m128i* words = w[lane];
      if (group < 4) {
        const auto* source = reinterpret_cast<const __m128i*>(blocks[lane]) + group;
        words[group] = _mm_shuffle_epi8(_mm_loadu_si128(source), byte_swap);
      } else {
        __m128i last = words[(group + 3) & 3];
        __m128i seven_back = _mm_alignr_epi8(last, words[(group + 2) & 3], 4);
        __m128i sum =
            _mm_add_epi32(_mm_sha256msg1_epu32(words[group & 3], words[(group + 1) & 3]), seven_back);
        words[group & 3] = _mm_sha256msg2_epu32(sum, last);
      }
      __m128i input = _mm_add_epi32(words[group & 3], constants);
      cdgh[lane] = _mm_sha256rnds2_epu32(cdgh[lane], abef[lane], input);
      abef[lane] = _mm_sha256rnds2_epu32(abef[lane], cdgh[lane], _mm_shuffle_epi32(input, 0x0E));
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    __m128i feba = _mm_shuffle_epi32(_mm_add_epi32(abef[lane], start_abef[lane]), 0x1B);
    __m128i dchg = _mm_shuffle_epi32(_mm_add_epi32(cdgh[lane], start_cdgh[lane]), 0xB1);
    __m128i dcba = _mm_blend_epi16(feba, dchg, 0xF0);
    __m128i hgfe = _mm_alignr_epi8(dchg, feba, 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(states[lane]), dcba);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(states[lane] + 4), hgfe);
  }
}

void Compress(uint32_t* state, const uint8_t* blocks, size_t num_blocks) {
  for (size_t i = 0; i < num_blocks; ++i) {
    const uint8_t* block = blocks + i * kSha256BlockBytes;
    CompressLanes<1>(&state, &block);
  }
}

void CompressPair(uint32_t* a, const uint8_t* block_a, uint32_t* b, const uint8_t* block_b) {
  uint32_t* const states[2] = {a, b};
  const uint8_t* const blocks[2] = {block_a, block_b};
  CompressLanes<2>(states, blocks);
}

bool CpuHasSha() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(ebx & bit_SHA)) return false;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_SSSE3) && (ecx & bit_SSE4_1);
}

}  // namespace

const Sha256Target* ShaNiSha256Target() {
  static constexpr Sha256Target kTarget = {"sha256-shani", Compress, CompressPair};
  static const bool kSupported = CpuHasSha();
  return kSupported ? &kTarget : nullptr;
}

}  // namespace twinjet::kv
#else
namespace twinjet::kv {
const Sha256Target* ShaNiSha256Target() { return nullptr; }
}  // namespace twinjet::kv
#endif
