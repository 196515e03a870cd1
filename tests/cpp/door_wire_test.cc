// gRPC's encodings and the cutting of bytes into messages.
#include "check.h"
#include "door/message_reader.h"
#include "door/wire.h"
#include "door_client.h"

using namespace twinjet::door;

TEST(timeouts_have_eight_digits_and_a_unit) {
  CHECK_EQ(*ParseTimeout("1S"), 1'000'000'000);
  CHECK_EQ(*ParseTimeout("99999999n"), 99'999'999);
  CHECK_EQ(*ParseTimeout("0m"), 0);
  CHECK_EQ(*ParseTimeout("5u"), 5'000);
  CHECK_EQ(*ParseTimeout("2M"), 120'000'000'000);
  CHECK_EQ(*ParseTimeout("1H"), 3'600'000'000'000);
  CHECK(*ParseTimeout("99999999H") > int64_t{1} << 60);
  for (const char* bad : {"", "S", "1", "1s", "-1S", "123456789S", "1.5S", " 1S", "1SS"}) {
    CHECK(!ParseTimeout(bad));
  }
}

TEST(messages_are_percent_encoded) {
  CHECK_EQ(PercentEncode("plain, text!"), "plain, text!");
  CHECK_EQ(PercentEncode("100%\n\xc3\xa9\x7f"), "100%25%0A%C3%A9%7F");
  CHECK_EQ(PercentDecode("100%25%0A%C3%a9%7F"), "100%\n\xc3\xa9\x7f");
  CHECK_EQ(PercentDecode("%zz%4%"), "%zz%4%");
}

TEST(base64_is_its_own_inverse_with_and_without_padding) {
  auto random = test::Random();
  for (size_t size = 0; size < 70; ++size) {
    std::string bytes(size, '\0');
    for (char& c : bytes) c = static_cast<char>(random());
    std::string text = Base64Encode(bytes);
    CHECK_EQ(*Base64Decode(text), bytes);
    while (text.size() % 4 != 0) text += '=';
    CHECK_EQ(*Base64Decode(text), bytes);
  }
  CHECK_EQ(Base64Encode("hi!"), "aGkh");
  for (const char* bad : {"a", "aGk!", "====", "a===", "aG k"}) CHECK(!Base64Decode(bad));
}

TEST(accepted_encodings_are_a_list) {
  CHECK(AcceptsGzip("identity, deflate, gzip"));
  CHECK(AcceptsGzip("gzip"));
  CHECK(!AcceptsGzip("identity,gzipped"));
  CHECK(!AcceptsGzip(""));
}

TEST(inflate_stops_at_its_limit) {
  bool is_too_large = false;
  const std::string zeros(1 << 20, '\0');
  const std::string bomb = Gzip(zeros);
  CHECK(bomb.size() < 2000);
  CHECK_EQ(*Inflate(bomb, zeros.size(), &is_too_large), zeros);
  CHECK(!Inflate(bomb, zeros.size() - 1, &is_too_large));
  CHECK(is_too_large);
  CHECK(!Inflate(bomb.substr(0, bomb.size() - 1), zeros.size(), &is_too_large));
  CHECK(!is_too_large);
  CHECK(!Inflate(bomb + "x", zeros.size(), &is_too_large));
  CHECK(!Inflate("", 10, &is_too_large));
  CHECK_EQ(*Inflate(Gzip(""), 0, &is_too_large), "");
}

namespace {

std::vector<std::string> ReadAll(MessageReader& reader, std::string_view input, size_t piece, size_t limit) {
  std::vector<std::string> found;
  std::string message;
  for (size_t at = 0; at < input.size(); at += piece) {
    std::string_view left = input.substr(at, piece);
    while (reader.Read(&left, limit, &message)) found.push_back(message);
  }
  return found;
}

}  // namespace

TEST(messages_are_found_however_their_bytes_are_cut) {
  const std::vector<std::string> messages = {"", "a", std::string(300, 'x'), "", std::string(70000, 'y')};
  std::string input;
  for (const std::string& message : messages) {
    input += test::Framed(message);
    input += test::Framed(Gzip(message), true);
  }
  for (size_t piece : {size_t{1}, size_t{2}, size_t{5}, size_t{6}, size_t{1000}, input.size()}) {
    MessageReader reader;
    reader.set_encoding(Encoding::kGzip);
    const std::vector<std::string> found = ReadAll(reader, input, piece, 70000);
    CHECK_EQ(found.size(), 2 * messages.size());
    for (size_t i = 0; i < found.size(); ++i) CHECK_EQ(found[i], messages[i / 2]);
    CHECK(!reader.is_in_message());
  }
}

TEST(bad_messages_are_told_apart) {
  const auto error_of = [](const std::string& input, Encoding encoding) {
    MessageReader reader;
    reader.set_encoding(encoding);
    ReadAll(reader, input, 3, 100);
    return reader.error();
  };
  CHECK(error_of(test::Framed(std::string(101, 'x')), Encoding::kIdentity) == ReadError::kTooLarge);
  CHECK(error_of(test::Framed(std::string(100, 'x')), Encoding::kIdentity) == ReadError::kNone);
  CHECK(error_of(test::Framed(Gzip(std::string(101, 'x')), true), Encoding::kGzip) == ReadError::kTooLarge);
  CHECK(error_of(test::Framed("x", true), Encoding::kIdentity) == ReadError::kNoEncoding);
  CHECK(error_of(test::Framed("x", true), Encoding::kGzip) == ReadError::kNotDecodable);
  CHECK(error_of(std::string("\x02\0\0\0\0", 5), Encoding::kGzip) == ReadError::kBadFlag);
}

TEST(a_declared_length_takes_no_memory) {
  MessageReader reader;
  std::string message;
  std::string_view input("\0\x7f\xff\xff\xff", 5);
  CHECK(!reader.Read(&input, 0x7fffffff, &message));
  CHECK_EQ(reader.buffered_bytes(), 0u);
  CHECK(reader.is_in_message());
}
