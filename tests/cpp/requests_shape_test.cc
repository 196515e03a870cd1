// Counting a message's values: each kind against its own limit, the path to what is too much, and nothing
// said of bytes that are no message.
#include <random>
#include <stdexcept>
#include <string>

#include "check.h"
#include "requests/message_shape.h"

namespace twinjet::requests {
namespace {

using Path = std::vector<uint32_t>;

std::string Repeat(std::string_view piece, size_t times) {
  std::string all;
  for (size_t i = 0; i < times; ++i) all.append(piece);
  return all;
}

// A message within another, in field 2 of both; numbers in 3 (varints), 4 and 5.
const MessageShape kShape({{{2, 0}, {3, kPackedVarints}, {4, kPacked4}, {5, kPacked8}}});

TEST(values_and_numbers_have_limits_of_their_own) {
  const std::string empty_strings = Repeat(std::string("\x0A\x00", 2), 10);
  CHECK(!kShape.FindExcess(empty_strings, 10, 0));
  CHECK(kShape.FindExcess(empty_strings, 9, 100) == Path{1});
  const std::string packed("\x1A\x05\x01\x80\x01\x02\x03", 7);  // 1, 128, 2, 3
  CHECK(!kShape.FindExcess(packed, 0, 4));
  CHECK(kShape.FindExcess(packed, 100, 3) == Path{3});
  CHECK(kShape.FindExcess(Repeat(std::string("\x18\x01", 2), 3), 100, 2) == Path{3});  // not packed
  CHECK(kShape.FindExcess("\x22\x08" + std::string(8, 'x'), 100, 1) == Path{4});
  CHECK(!kShape.FindExcess("\x2A\x08" + std::string(8, 'x'), 0, 1));
  CHECK(kShape.FindExcess(Repeat(std::string("\x78\x01", 2), 3), 2, 100) == Path{15});  // unknown fields
}

TEST(the_path_leads_through_messages) {
  const std::string inner("\x0A\x00\x0A\x00", 4);
  const std::string message = "\x12\x06\x12\x04" + inner;
  CHECK(!kShape.FindExcess(message, 4, 0));
  CHECK((kShape.FindExcess(message, 3, 0) == Path{2, 2, 1}));
}

TEST(nothing_is_said_of_what_is_no_message) {
  std::string deep;
  for (int i = 0; i < 200; ++i) {
    std::string size;
    for (size_t n = deep.size();; n >>= 7) {
      size.push_back(static_cast<char>((n & 0x7F) | (n > 0x7F ? 0x80 : 0)));
      if (n <= 0x7F) break;
    }
    deep = "\x12" + size + deep;
  }
  CHECK(!kShape.FindExcess(deep, 1000, 0));
  CHECK(!kShape.FindExcess("\x12\x7F", 0, 0));
  CHECK(!kShape.FindExcess(std::string(20, '\xFF'), 0, 0));
  auto random = test::Random();
  for (int i = 0; i < 20000; ++i) {
    std::string noise(random() % 40, '\0');
    for (char& byte : noise) byte = static_cast<char>(random() % 64);
    kShape.FindExcess(noise, random() % 8, random() % 8);  // for the sanitizers
  }
}

TEST(a_kind_that_is_no_type_is_refused) {
  for (const std::vector<MessageShape::Type>& types :
       {std::vector<MessageShape::Type>{{{1, 1}}}, std::vector<MessageShape::Type>{{{1, -4}}}, {}}) {
    bool is_refused = false;
    try {
      MessageShape{types};
    } catch (const std::invalid_argument&) {
      is_refused = true;
    }
    CHECK(is_refused);
  }
}

}  // namespace
}  // namespace twinjet::requests
