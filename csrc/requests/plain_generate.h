// PlainGenerate: a GenerateRequest (proto/twinjet/v1/generation.proto) that asks for nothing but what most
// ask for, read and checked in one pass. Whatever is not plain is left, whole, to those who know all of the
// contract and can say what is wrong with it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace twinjet::requests {

// Views are into the message.
struct PlainGenerate {
  std::string_view model;
  std::string_view text;           // exactly one of text and token_ids is empty
  std::vector<int32_t> token_ids;  // none negative
  int32_t largest_token = -1;
  std::string_view sampling;  // the bytes of SamplingParams, not looked at
  std::string_view request_id;
  std::string_view tenant;
  std::string_view cache_salt;
  std::string_view session;
};

// Larger ones are rare, and take long enough that they must not be read among others.
inline constexpr size_t kMaxPlainBytes = 64 << 10;

// Unset unless every field is known here and comes once, token ids are packed, the message has at most
// kMaxPlainBytes, and all but what needs a model is in its range: then protobuf reads the same values from
// the message.
std::optional<PlainGenerate> ReadPlainGenerate(std::string_view message);

inline constexpr size_t kMaxIdChars = 128;
inline constexpr size_t kMaxLabelBytes = 128;
// Whether a request may be named so: at most kMaxIdChars printable ASCII characters without spaces.
bool IsRequestId(std::string_view id);

// Draws ids and seeds from the system's randomness, which it asks for in large pieces. Not thread-safe.
class Lots {
 public:
  // 24 hexadecimal digits, after as much of `prefix` and a hyphen as kMaxIdChars leaves room for; "" is none.
  std::string DrawId(std::string_view prefix);
  // Below 2^53.
  uint64_t DrawSeed();

 private:
  std::string_view Draw(size_t num_bytes);

  std::string drawn_;
  size_t pos_ = 0;
};

}  // namespace twinjet::requests
