// Detokenizer, StopMatcher and Output on random tokens, against what one look at the whole gives.
#include <algorithm>

#include "check.h"
#include "stream/output.h"

using namespace twinjet::stream;

namespace {

// Tokens of random bytes, spelled as byte-level BPE spells them, and one special token at the end.
std::shared_ptr<const Vocabulary> RandomBytes(std::mt19937_64& random, std::vector<std::string>* bytes) {
  std::vector<std::optional<std::string>> tokens;
  for (int i = 0; i < 64; ++i) {
    std::string token;
    std::string spelled;
    for (uint64_t size = 1 + random() % 4; size > 0; --size) {
      // Lead and continuation bytes more often than chance would have it.
      uint8_t byte = static_cast<uint8_t>(random() % 3 ? 0x80 + random() % 0x75 : 33 + random() % 90);
      token += static_cast<char>(byte);
      uint32_t code = byte;
      if (byte >= 127 && byte <= 160) code = 256 + 33 + (byte - 127);
      if (byte == 173) code = 256 + 67;
      if (code < 0x80) {
        spelled += static_cast<char>(code);
      } else {
        spelled += static_cast<char>(0xC0 | code >> 6);
        spelled += static_cast<char>(0x80 | (code & 0x3F));
      }
    }
    bytes->push_back(token);
    tokens.push_back(spelled);
  }
  tokens.push_back("<end>");
  bytes->push_back("<end>");
  const int32_t special[] = {64};
  return std::make_shared<Vocabulary>(Joining::kByteLevel, tokens, special);
}

std::string Lossy(std::string_view bytes) {
  std::string text;
  while (!bytes.empty()) {
    Utf8Unit unit = NextUtf8(bytes);
    text += unit.kind == Utf8Unit::Kind::kCharacter ? bytes.substr(0, unit.size) : kReplacement;
    bytes.remove_prefix(unit.size);
  }
  return text;
}

}  // namespace

TEST(pieces_join_to_the_whole_and_are_always_characters) {
  std::mt19937_64 random = test::Random();
  for (int round = 0; round < 300; ++round) {
    std::vector<std::string> bytes;
    std::shared_ptr<const Vocabulary> vocabulary = RandomBytes(random, &bytes);
    Detokenizer detokenizer(vocabulary, true);
    std::string shown;
    std::string whole;
    for (int i = 0; i < 30; ++i) {
      int32_t id = static_cast<int32_t>(random() % 68) - 1;
      std::string piece;
      detokenizer.Feed(id, &piece);
      CHECK(IsUtf8(piece));
      shown += piece;
      if (id >= 0 && id < 64) whole += bytes[static_cast<size_t>(id)];
    }
    detokenizer.Flush(&shown);
    CHECK(shown == Lossy(whole));
  }
}

TEST(a_stop_string_ends_where_reading_byte_by_byte_finds_it) {
  std::mt19937_64 random = test::Random();
  auto word = [&](uint64_t least, uint64_t most) {
    std::string made;
    for (uint64_t size = least + random() % (most - least + 1); size > 0; --size) made += "ab"[random() % 2];
    return made;
  };
  for (int round = 0; round < 3000; ++round) {
    auto stops = std::make_shared<std::vector<std::string>>();
    for (uint64_t i = random() % 4; i > 0; --i) stops->push_back(word(1, 5));
    StopMatcher matcher(stops, false);
    std::string whole;
    std::string shown;
    std::string expected;
    int found = -1;
    for (int i = 0; i < 8 && found < 0; ++i) {
      std::string piece = word(0, 6);
      for (char c : piece) {
        whole += c;
        size_t longest = 0;
        for (size_t s = 0; s < stops->size(); ++s) {
          if (whole.ends_with((*stops)[s]) && (*stops)[s].size() > longest) {
            longest = (*stops)[s].size();
            found = static_cast<int>(s);
          }
        }
        expected = whole.substr(0, whole.size() - longest);
        if (found >= 0) break;
      }
      matcher.Feed(piece, true, &shown);
    }
    CHECK_EQ(matcher.matched() >= 0, found >= 0);
    if (found >= 0)
      CHECK((*stops)[static_cast<size_t>(matcher.matched())] == (*stops)[static_cast<size_t>(found)]);
    matcher.Flush(&shown);
    CHECK(shown == expected);
  }
}

TEST(tokens_after_the_end_are_not_taken) {
  std::vector<std::optional<std::string>> tokens = {"a", "b", "c", "</s>"};
  const int32_t special[] = {3};
  auto vocabulary = std::make_shared<Vocabulary>(Joining::kByteLevel, tokens, special);
  auto rules = std::make_shared<OutputRules>();
  rules->eos_token_ids = {3};
  rules->min_tokens = 2;
  Output output(vocabulary, rules);
  std::string text;
  const int32_t ids[] = {3, 0, 1, 3, 2};
  CHECK_EQ(output.Take(ids, &text), size_t{4});
  CHECK(text == "ab");
  CHECK(output.ending().cause == Ending::Cause::kEos);
  CHECK_EQ(output.Take(ids, &text), size_t{0});
}
