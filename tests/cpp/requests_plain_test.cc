// Reading plain requests: what is cut, doubled or not in its shortest form is left to protobuf, and no byte
// beyond the message is looked at. That the values are protobuf's is shown in tests/server/test_plain.py.
#include <random>
#include <string>

#include "check.h"
#include "requests/plain_generate.h"

namespace twinjet::requests {
namespace {

std::string Field(int number, std::string_view bytes) {
  std::string field{static_cast<char>(number << 3 | 2), static_cast<char>(bytes.size())};
  return field.append(bytes);
}

const std::string kTokens("\x05\xE8\x07\x80\x80\x01", 6);

TEST(reads_every_plain_field) {
  const std::string options = Field(1, "id-1") + Field(3, "tenant") + Field(4, "salt") + Field(7, "session");
  const std::string message =
      Field(1, "demo") + Field(3, kTokens) + Field(4, std::string("\x58\x07", 2)) + Field(5, options);
  const auto plain = ReadPlainGenerate(message);
  CHECK(plain.has_value());
  CHECK(plain->model == "demo");
  CHECK(plain->token_ids == (std::vector<int32_t>{5, 1000, 16384}));
  CHECK(plain->largest_token == 16384);
  CHECK(plain->sampling.size() == 2);
  CHECK(plain->request_id == "id-1" && plain->tenant == "tenant");
  CHECK(plain->cache_salt == "salt" && plain->session == "session");
  // Every beginning but the whole is cut, or lacks a field that may be lacking.
  for (size_t size = 0; size < message.size(); ++size) {
    const std::string cut(message, 0, size);
    const auto part = ReadPlainGenerate(cut);
    if (part) CHECK(part->token_ids == plain->token_ids);
  }
}

TEST(leaves_what_is_not_plain) {
  const auto is_plain = [](const std::string& message) { return ReadPlainGenerate(message).has_value(); };
  const std::string good = Field(3, kTokens);
  CHECK(is_plain(good));
  CHECK(is_plain(Field(2, "text")));
  CHECK(!is_plain(""));
  CHECK(!is_plain(good + Field(2, "text")));
  CHECK(!is_plain(good + good));
  CHECK(!is_plain(good + Field(6, "")));
  CHECK(!is_plain(good + Field(1, "\xFF")));
  CHECK(!is_plain(Field(2, "\xC0\x80")));
  CHECK(!is_plain(good + Field(5, Field(1, "with space"))));
  CHECK(!is_plain(good + Field(5, Field(1, std::string(128, 'a')).insert(1, 1, '\x80').substr(0, 100))));
  CHECK(!is_plain(good + Field(5, Field(2, "priority"))));
  CHECK(!is_plain(good + std::string("\x18\x05", 2)));         // one token id, not packed
  CHECK(!is_plain(std::string("\x1A\x85\x00", 3) + kTokens));  // a size of two bytes where one is enough
  CHECK(!is_plain(Field(3, std::string(10, '\xFF') + '\x01')));
  CHECK(!is_plain(Field(3, "\xFF\xFF\xFF\xFF\x08")));  // 2^31 and more
  CHECK(is_plain(Field(3, "\xFF\xFF\xFF\xFF\x07")));
  CHECK(!is_plain(Field(3, "\x80")));
  const std::string large(kMaxPlainBytes - 4, 'a');
  CHECK(is_plain(std::string("\x12\xFC\xFF\x03", 4) + large));
  CHECK(!is_plain(std::string("\x12\xFD\xFF\x03", 4) + large + 'a'));
}

TEST(looks_at_nothing_beyond_the_message) {
  std::mt19937 random(7);
  const std::string base = Field(1, "demo") + Field(3, kTokens) + Field(5, Field(1, "id"));
  for (int i = 0; i < 200000; ++i) {
    std::string message = base;
    for (auto n = random() % 3 + 1; n > 0; --n)
      message[random() % message.size()] = static_cast<char>(random());
    message.resize(random() % (message.size() + 1));
    message.shrink_to_fit();
    ReadPlainGenerate(message);
  }
}

TEST(draws_ids_and_seeds) {
  Lots lots;
  CHECK(lots.DrawId("").size() == 24);
  CHECK(lots.DrawId("caller").starts_with("caller-"));
  const std::string longest = lots.DrawId(std::string(200, 'x'));
  CHECK(longest.size() == kMaxIdChars && IsRequestId(longest));
  CHECK(lots.DrawId("") != lots.DrawId(""));
  for (int i = 0; i < 5000; ++i) CHECK(lots.DrawSeed() >> 53 == 0);
}

}  // namespace
}  // namespace twinjet::requests
