// SipHash-2-4 with 128 bits of output (Aumasson, Bernstein: "SipHash: a fast short-input PRF", and
// the 128-bit variant of its reference code). Keyed; needs no special instructions.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "kv/types.h"

namespace twinjet::kv {

class SipHash128 {
 public:
  // key: 16 bytes.
  explicit SipHash128(const uint8_t* key) {
    uint64_t k[2];
    std::memcpy(k, key, sizeof(k));
    v0_ = 0x736f6d6570736575 ^ k[0];
    v1_ = 0x646f72616e646f6d ^ k[1] ^ 0xee;  // 0xee marks the 128-bit variant
    v2_ = 0x6c7967656e657261 ^ k[0];
    v3_ = 0x7465646279746573 ^ k[1];
  }

  // Whole words only, but for the last call before Finish().
  void Update(const void* data, size_t num_bytes) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    num_bytes_ += num_bytes;
    for (; num_bytes >= 8; num_bytes -= 8, bytes += 8) {
      uint64_t word;
      std::memcpy(&word, bytes, sizeof(word));
      Absorb(word);
    }
    tail_ = 0;
    if (num_bytes > 0) std::memcpy(&tail_, bytes, num_bytes);
  }

  BlockHash Finish() {
    Absorb(tail_ | static_cast<uint64_t>(num_bytes_) << 56);
    v2_ ^= 0xee;
    for (int i = 0; i < 4; ++i) Round();
    BlockHash hash;
    hash.lo = v0_ ^ v1_ ^ v2_ ^ v3_;
    v1_ ^= 0xdd;
    for (int i = 0; i < 4; ++i) Round();
    hash.hi = v0_ ^ v1_ ^ v2_ ^ v3_;
    return hash;
  }

 private:
  void Absorb(uint64_t word) {
    v3_ ^= word;
    Round();
    Round();
    v0_ ^= word;
  }

  void Round() {
    v0_ += v1_, v1_ = std::rotl(v1_, 13) ^ v0_, v0_ = std::rotl(v0_, 32);
    v2_ += v3_, v3_ = std::rotl(v3_, 16) ^ v2_;
    v0_ += v3_, v3_ = std::rotl(v3_, 21) ^ v0_;
    v2_ += v1_, v1_ = std::rotl(v1_, 17) ^ v2_, v2_ = std::rotl(v2_, 32);
  }

  uint64_t v0_, v1_, v2_, v3_;
  uint64_t tail_ = 0;
  size_t num_bytes_ = 0;
};

}  // namespace twinjet::kv
