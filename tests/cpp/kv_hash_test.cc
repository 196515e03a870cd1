// Block hashes: published vectors of the primitives, and agreement of the CPU targets.
#include <numeric>
#include <string>
#include <string_view>

#include "check.h"
#include "kv/block_hash.h"
#include "kv/siphash.h"

using namespace twinjet::kv;

namespace {

std::string Hex(std::span<const uint8_t> bytes) {
  std::string text;
  for (uint8_t byte : bytes) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

std::span<const uint8_t> Bytes(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

std::string Sha256Hex(const Sha256Target& target, std::string_view text) {
  return Hex(Sha256(target).Update(Bytes(text)).Finish());
}

std::vector<const Sha256Target*> Targets() {
  std::vector<const Sha256Target*> targets = {&PortableSha256Target()};
  if (ShaNiSha256Target()) targets.push_back(ShaNiSha256Target());
  return targets;
}

HashKey CountingKey() {
  HashKey key;
  std::iota(key.begin(), key.end(), uint8_t{0});
  return key;
}

}  // namespace

TEST(sha256_matches_fips_180_4_examples) {
  for (const Sha256Target* target : Targets()) {
    CHECK_EQ(Sha256Hex(*target, ""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK_EQ(Sha256Hex(*target, "abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK_EQ(Sha256Hex(*target, "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
             "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    CHECK_EQ(Sha256Hex(*target, std::string(1000000, 'a')),
             "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  }
}

TEST(sha256_takes_a_message_in_any_pieces) {
  std::mt19937_64 random = test::Random();
  std::string message(400, '\0');
  for (char& c : message) c = static_cast<char>(random());
  for (const Sha256Target* target : Targets()) {
    for (size_t length = 0; length <= message.size(); ++length) {
      std::string_view text = std::string_view(message).substr(0, length);
      size_t cut = length ? random() % length : 0;
      Sha256 sha(*target);
      sha.Update(Bytes(text.substr(0, cut))).Update({}).Update(Bytes(text.substr(cut)));
      CHECK_EQ(Hex(sha.Finish()), Sha256Hex(PortableSha256Target(), text));
    }
  }
}

TEST(pair_compression_equals_two_single_ones) {
  std::mt19937_64 random = test::Random();
  for (const Sha256Target* target : Targets()) {
    for (int round = 0; round < 100; ++round) {
      uint8_t blocks[2][kSha256BlockBytes];
      for (auto& block : blocks) {
        for (uint8_t& byte : block) byte = static_cast<uint8_t>(random());
      }
      Sha256State a = kSha256Start, b = kSha256Start, x = kSha256Start, y = kSha256Start;
      b[3] = y[3] = static_cast<uint32_t>(random());
      target->compress_pair(a.data(), blocks[0], b.data(), blocks[1]);
      PortableSha256Target().compress(x.data(), blocks[0], 1);
      PortableSha256Target().compress(y.data(), blocks[1], 1);
      CHECK(a == x);
      CHECK(b == y);
    }
  }
}

// The first two of the 128-bit vectors in SipHash's reference code: key 00..0f,
// message 00, 01, 02, ...
TEST(siphash_matches_reference_vectors) {
  HashKey key = CountingKey();
  SipHash128 empty(key.data());
  empty.Update(nullptr, 0);
  BlockHash hash = empty.Finish();
  CHECK_EQ(Hex({reinterpret_cast<uint8_t*>(&hash), 16}), "a3817f04ba25a8e66df67214c7550293");
  SipHash128 one(key.data());
  one.Update(key.data(), 1);
  hash = one.Finish();
  CHECK_EQ(Hex({reinterpret_cast<uint8_t*>(&hash), 16}), "da87c1d86b99af44347659119b22fc45");
}

TEST(all_targets_and_block_sizes_hash_alike) {
  std::mt19937_64 random = test::Random();
  std::vector<int32_t> tokens(4096);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() >> 33);
  for (int32_t block_size = 1; block_size <= 1024; block_size *= 2) {
    BlockHasher portable(block_size, BlockHasher::Algorithm::kSha256, CountingKey(), PortableSha256Target());
    BlockHasher best(block_size, BlockHasher::Algorithm::kSha256, CountingKey());
    std::vector<BlockHash> a(tokens.size() / block_size), b(a.size());
    BlockHash root = best.Root(Bytes("tenant"));
    CHECK(root == portable.Root(Bytes("tenant")));
    portable.HashBlocks(root, tokens.data(), a);
    best.HashBlocks(root, tokens.data(), b);
    CHECK(a == b);
    // One block at a time is the same chain.
    BlockHash parent = root;
    for (size_t i = 0; i < a.size(); ++i) {
      parent = best.HashBlock(parent, tokens.data() + i * block_size);
      CHECK(parent == a[i]);
    }
  }
}

TEST(every_input_changes_the_hash) {
  for (auto algorithm : {BlockHasher::Algorithm::kSha256, BlockHasher::Algorithm::kSipHash}) {
    BlockHasher hasher(16, algorithm, CountingKey());
    HashKey other_key = CountingKey();
    std::vector<int32_t> tokens(16, 7);
    BlockHash root = hasher.Root({});
    BlockHash hash = hasher.HashBlock(root, tokens.data());
    for (size_t byte = 0; byte < kHashKeyBytes; ++byte) {
      other_key = CountingKey();
      other_key[byte] ^= 1;
      BlockHasher other(16, algorithm, other_key);
      CHECK(!(other.HashBlock(other.Root({}), tokens.data()) == hash));
    }
    for (size_t i = 0; i < tokens.size(); ++i) {
      tokens[i] ^= 1 << 16;
      CHECK(!(hasher.HashBlock(root, tokens.data()) == hash));
      tokens[i] ^= 1 << 16;
    }
    CHECK(!(hasher.HashBlock(hasher.Root(Bytes("a")), tokens.data()) == hash));
    CHECK(!(hasher.HashBlock(hasher.Extend(root, Bytes("a")), tokens.data()) == hash));
    CHECK(!(hasher.Extend(root, {}) == root));
    // A salt that spells out an extended parent is still another message.
    std::string spelled(1, '\1');
    spelled.append(reinterpret_cast<const char*>(&root), BlockHash::kBytes);
    CHECK(!(hasher.Root(Bytes(spelled)) == hasher.Extend(root, {})));
  }
}
