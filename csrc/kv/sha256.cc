#include "kv/sha256.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <string_view>

namespace twinjet::kv {
namespace {

uint32_t LoadBigEndian(const uint8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return __builtin_bswap32(word);
}

void CompressOne(uint32_t* state, const uint8_t* block) {
  uint32_t w[64];
  for (int t = 0; t < 16; ++t) w[t] = LoadBigEndian(block + 4 * t);
  for (int t = 16; t < 64; ++t) {
    uint32_t s0 = std::rotr(w[t - 15], 7) ^ std::rotr(w[t - 15], 18) ^ (w[t - 15] >> 3);
    uint32_t s1 = std::rotr(w[t - 2], 17) ^ std::rotr(w[t - 2], 19) ^ (w[t - 2] >> 10);
    w[t] = w[t - 16] + s0 + w[t - 7] + s1;
  }
  uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
  uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
#pragma GCC unroll 64
  for (int t = 0; t < 64; ++t) {
    uint32_t sum1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
    uint32_t t1 = h + sum1 + ((e & f) ^ (~e & g)) + kSha256Rounds[t] + w[t];
    uint32_t sum0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
    uint32_t t2 = sum0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
  }
  const uint32_t sums[8] = {a, b, c, d, e, f, g, h};
  for (size_t i = 0; i < 8; ++i) state[i] += sums[i];
}

void Compress(uint32_t* state, const uint8_t* blocks, size_t num_blocks) {
  for (size_t i = 0; i < num_blocks; ++i) CompressOne(state, blocks + i * kSha256BlockBytes);
}

void CompressPair(uint32_t* a, const uint8_t* block_a, uint32_t* b, const uint8_t* block_b) {
  CompressOne(a, block_a);
  CompressOne(b, block_b);
}

}  // namespace

const Sha256Target& PortableSha256Target() {
  static constexpr Sha256Target kTarget = {"sha256-portable", Compress, CompressPair};
  return kTarget;
}

const Sha256Target& BestSha256Target() {
  static const Sha256Target* const kBest = [] {
    const char* forced = std::getenv("TWINJET_CPU_TARGET");
    bool baseline = forced != nullptr && std::string_view(forced) == "baseline";
    const Sha256Target* sha_ni = baseline ? nullptr : ShaNiSha256Target();
    return sha_ni ? sha_ni : &PortableSha256Target();
  }();
  return *kBest;
}

Sha256::Sha256(const Sha256Target& target) : Sha256(target, kSha256Start, 0) {}

Sha256::Sha256(const Sha256Target& target, const Sha256State& state, uint64_t num_absorbed_bytes)
    : target_(&target), state_(state), num_bytes_(num_absorbed_bytes), tail_{} {}

Sha256& Sha256::Update(std::span<const uint8_t> bytes) {
  size_t held = num_bytes_ % kSha256BlockBytes;
  num_bytes_ += bytes.size();
  if (held > 0) {
    size_t taken = std::min(kSha256BlockBytes - held, bytes.size());
    std::copy_n(bytes.data(), taken, tail_.data() + held);
    bytes = bytes.subspan(taken);
    if (held + taken < kSha256BlockBytes) return *this;
    target_->compress(state_.data(), tail_.data(), 1);
  }
  size_t num_blocks = bytes.size() / kSha256BlockBytes;
  target_->compress(state_.data(), bytes.data(), num_blocks);
  bytes = bytes.subspan(num_blocks * kSha256BlockBytes);
  std::copy(bytes.begin(), bytes.end(), tail_.begin());
  return *this;
}

std::array<uint8_t, kSha256Bytes> Sha256::Finish() {
  uint64_t num_bits = num_bytes_ * 8;
  uint8_t padding[kSha256BlockBytes + 8] = {0x80};
  size_t held = num_bytes_ % kSha256BlockBytes;
  size_t num_zeros = (held < 56 ? 56 : 120) - held;  // the 0x80 byte counted
  uint64_t length = __builtin_bswap64(num_bits);
  std::memcpy(padding + num_zeros, &length, sizeof(length));
  Update({padding, num_zeros + sizeof(length)});
  std::array<uint8_t, kSha256Bytes> digest;
  for (size_t i = 0; i < 8; ++i) {
    uint32_t word = __builtin_bswap32(state_[i]);
    std::memcpy(digest.data() + 4 * i, &word, sizeof(word));
  }
  return digest;
}

}  // namespace twinjet::kv
