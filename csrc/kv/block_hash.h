// BlockHasher: chained, keyed 128-bit hashes of blocks of token ids.
//
//   root(salt)        = F(root key,  0x00 || salt)
//   extend(p, extra)  = F(root key,  0x01 || p || extra)       bytes that a single block depends on
//   block(p, tokens)  = F(block key, tokens as int32 || p)     p: hash of the block before, or the root
//
// F is one of
//   kSha256:  the first 16 bytes of SHA-256(key || label, zero-padded to 32 bytes || message), the
//             label being "twinjet.kv.block" or "twinjet.kv.root";
//   kSipHash: SipHash-2-4-128; the block key is the key's first half, the root key its second.
// All messages under the block key have one length, so neither length extension nor a choice of
// where one part ends helps an attacker.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "kv/sha256.h"
#include "kv/types.h"

namespace twinjet::kv {

inline constexpr size_t kHashKeyBytes = 32;
using HashKey = std::array<uint8_t, kHashKeyBytes>;

// Immutable after construction: any number of threads may use one.
class BlockHasher {
 public:
  enum class Algorithm : uint8_t { kSha256, kSipHash };

  // block_size: a power of two in 1..kMaxBlockSize. target: for tests; the best one otherwise.
  BlockHasher(int32_t block_size, Algorithm algorithm, const HashKey& key,
              const Sha256Target& target = BestSha256Target());

  int32_t block_size() const { return block_size_; }
  Algorithm algorithm() const { return algorithm_; }
  const char* implementation() const;

  BlockHash Root(std::span<const uint8_t> salt) const;
  BlockHash Extend(const BlockHash& parent, std::span<const uint8_t> extra) const;

  // Hashes hashes.size() full blocks in a row. Precondition: tokens holds at least that many.
  void HashBlocks(const BlockHash& parent, const int32_t* tokens, std::span<BlockHash> hashes) const;
  BlockHash HashBlock(const BlockHash& parent, const int32_t* tokens) const {
    BlockHash hash;
    HashBlocks(parent, tokens, {&hash, 1});
    return hash;
  }

  // A secret derived from the key, for a hash table's seed.
  BlockHash TableSeed() const;

 private:
  BlockHash Labelled(uint8_t label, std::span<const uint8_t> first, std::span<const uint8_t> second) const;
  void HashLarge(BlockHash parent, const int32_t* tokens, std::span<BlockHash> hashes) const;
  void HashSmall(BlockHash parent, const int32_t* tokens, std::span<BlockHash> hashes) const;

  int32_t block_size_;
  Algorithm algorithm_;
  HashKey key_;
  const Sha256Target* target_;
  Sha256State block_start_;  // SHA-256 after the key blocks
  Sha256State root_start_;
};

inline constexpr int32_t kMaxBlockSize = 65536;

}  // namespace twinjet::kv
