// Words shared by the KV-cache block manager's parts: ids, block hashes, status codes.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace twinjet::kv {

static_assert(std::endian::native == std::endian::little, "token ids are hashed as little-endian bytes");

using BlockId = int32_t;
inline constexpr BlockId kNoBlock = -1;

// Names a sequence for the life of its manager: slot in the low bits, generation above, so the id of
// a freed sequence never finds the next one in its slot.
using SequenceId = int64_t;

// 128 bits that stand for a block's tokens and everything before them. Byte order as hashed.
struct BlockHash {
  uint64_t lo = 0;
  uint64_t hi = 0;

  static constexpr int kBytes = 16;
  static BlockHash FromBytes(const void* bytes) {
    BlockHash hash;
    std::memcpy(&hash, bytes, kBytes);
    return hash;
  }
  friend bool operator==(const BlockHash&, const BlockHash&) = default;
};
static_assert(sizeof(BlockHash) == BlockHash::kBytes);

// What became of a call. Anything but kOk means that nothing was changed.
enum class Status : uint8_t {
  kOk,
  kNoRoom,            // the free blocks do not suffice now
  kNeverFits,         // more blocks than the pool has
  kUnknownSequence,   // never existed, or was freed
  kDuplicate,         // a sequence named twice in one batch
  kBadBlock,          // block id out of range, or the null block
  kNotCached,         // a matched block has lost its contents
  kNotDetached,       // given back more often than detached
  kBadCount,          // negative, zero where that is senseless, or past the sequence's end
  kTooFewHashes,      // a full block without a hash to publish it under
  kNotEmpty,          // matched blocks for a sequence that has blocks already
  kWrongKind,         // a call for sequences with token ids on one without, or the reverse
  kTooManySequences,  // no slot left for another sequence
};

}  // namespace twinjet::kv
