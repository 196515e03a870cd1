#include "kv/block_hash.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "kv/siphash.h"

namespace twinjet::kv {
namespace {

enum : uint8_t { kRootLabel = 0, kExtendLabel = 1, kSeedLabel = 2 };

Sha256State AbsorbKey(const Sha256Target& target, const HashKey& key, std::string_view label) {
  std::array<uint8_t, kSha256BlockBytes> block{};
  std::copy(key.begin(), key.end(), block.begin());
  std::copy(label.begin(), label.end(), block.begin() + kHashKeyBytes);
  Sha256State state = kSha256Start;
  target.compress(state.data(), block.data(), 1);
  return state;
}

// First 16 bytes of the digest that `state` stands for.
BlockHash Truncate(const Sha256State& state) {
  uint32_t words[4];
  for (size_t i = 0; i < 4; ++i) words[i] = __builtin_bswap32(state[i]);
  return BlockHash::FromBytes(words);
}

std::span<const uint8_t> BytesOf(const BlockHash& hash) {
  return {reinterpret_cast<const uint8_t*>(&hash), BlockHash::kBytes};
}

}  // namespace

BlockHasher::BlockHasher(int32_t block_size, Algorithm algorithm, const HashKey& key,
                         const Sha256Target& target)
    : block_size_(block_size),
      algorithm_(algorithm),
      key_(key),
      target_(&target),
      block_start_(AbsorbKey(target, key, "twinjet.kv.block")),
      root_start_(AbsorbKey(target, key, "twinjet.kv.root")) {}

const char* BlockHasher::implementation() const {
  return algorithm_ == Algorithm::kSha256 ? target_->name : "siphash-2-4-128";
}

BlockHash BlockHasher::Labelled(uint8_t label, std::span<const uint8_t> first,
                                std::span<const uint8_t> second) const {
  if (algorithm_ == Algorithm::kSha256) {
    Sha256 sha(*target_, root_start_, kSha256BlockBytes);
    return BlockHash::FromBytes(sha.Update({&label, 1}).Update(first).Update(second).Finish().data());
  }
  std::vector<uint8_t> message;
  message.reserve(1 + first.size() + second.size());
  message.push_back(label);
  message.insert(message.end(), first.begin(), first.end());
  message.insert(message.end(), second.begin(), second.end());
  SipHash128 sip(key_.data() + kHashKeyBytes / 2);
  sip.Update(message.data(), message.size());
  return sip.Finish();
}

BlockHash BlockHasher::Root(std::span<const uint8_t> salt) const { return Labelled(kRootLabel, {}, salt); }

BlockHash BlockHasher::Extend(const BlockHash& parent, std::span<const uint8_t> extra) const {
  return Labelled(kExtendLabel, BytesOf(parent), extra);
}

BlockHash BlockHasher::TableSeed() const { return Labelled(kSeedLabel, {}, {}); }

void BlockHasher::HashBlocks(const BlockHash& parent, const int32_t* tokens,
                             std::span<BlockHash> hashes) const {
  if (hashes.empty()) return;
  size_t num_token_bytes = static_cast<size_t>(block_size_) * sizeof(int32_t);
  if (algorithm_ == Algorithm::kSipHash) {
    BlockHash last = parent;
    for (BlockHash& hash : hashes) {
      SipHash128 sip(key_.data());
      // Parts of whole words only, so a block of a single token goes in one part with the parent.
      if (block_size_ > 1) {
        sip.Update(tokens, num_token_bytes);
        sip.Update(&last, BlockHash::kBytes);
      } else {
        uint8_t message[sizeof(int32_t) + BlockHash::kBytes];
        std::memcpy(message, tokens, sizeof(int32_t));
        std::memcpy(message + sizeof(int32_t), &last, BlockHash::kBytes);
        sip.Update(message, sizeof(message));
      }
      hash = last = sip.Finish();
      tokens += block_size_;
    }
  } else if (num_token_bytes % kSha256BlockBytes == 0) {
    HashLarge(parent, tokens, hashes);
  } else {
    HashSmall(parent, tokens, hashes);
  }
}

// The tokens fill whole message blocks, and only the last message block, parent and padding, waits
// for the hash before. It is computed beside the first message block of the next tokens.
void BlockHasher::HashLarge(BlockHash parent, const int32_t* tokens, std::span<BlockHash> hashes) const {
  size_t num_token_bytes = static_cast<size_t>(block_size_) * sizeof(int32_t);
  size_t num_chunks = num_token_bytes / kSha256BlockBytes;
  const auto* bytes = reinterpret_cast<const uint8_t*>(tokens);

  alignas(16) uint8_t closing[kSha256BlockBytes] = {};
  closing[BlockHash::kBytes] = 0x80;
  uint64_t num_bits =
      __builtin_bswap64(8 * static_cast<uint64_t>(kSha256BlockBytes + num_token_bytes + BlockHash::kBytes));
  std::memcpy(closing + kSha256BlockBytes - sizeof(num_bits), &num_bits, sizeof(num_bits));

  Sha256State next = block_start_;
  target_->compress(next.data(), bytes, num_chunks);
  for (size_t i = 0; i < hashes.size(); ++i) {
    Sha256State state = next;
    std::memcpy(closing, &parent, BlockHash::kBytes);
    if (i + 1 < hashes.size()) {
      bytes += num_token_bytes;
      next = block_start_;
      target_->compress_pair(state.data(), closing, next.data(), bytes);
      target_->compress(next.data(), bytes + kSha256BlockBytes, num_chunks - 1);
    } else {
      target_->compress(state.data(), closing, 1);
    }
    hashes[i] = parent = Truncate(state);
  }
}

void BlockHasher::HashSmall(BlockHash parent, const int32_t* tokens, std::span<BlockHash> hashes) const {
  size_t num_token_bytes = static_cast<size_t>(block_size_) * sizeof(int32_t);
  for (BlockHash& hash : hashes) {
    Sha256 sha(*target_, block_start_, kSha256BlockBytes);
    sha.Update({reinterpret_cast<const uint8_t*>(tokens), num_token_bytes}).Update(BytesOf(parent));
    hash = parent = BlockHash::FromBytes(sha.Finish().data());
    tokens += block_size_;
  }
}

}  // namespace twinjet::kv
