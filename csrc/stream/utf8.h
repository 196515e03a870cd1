// UTF-8 from bytes that arrive in pieces: what is no character becomes U+FFFD, one for each maximal part of
// one (Unicode 16, section 3.9, as Rust and Python replace), and half a character waits for its rest.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace twinjet::stream {

inline constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// One step through bytes: a whole character, bytes that can be none, or the beginning of one that the end
// cuts.
struct Utf8Unit {
  enum class Kind { kCharacter, kInvalid, kCut } kind;
  size_t size;
};

// Precondition: bytes is not empty.
Utf8Unit NextUtf8(std::string_view bytes);
bool IsUtf8(std::string_view bytes);

class Utf8Decoder {
 public:
  // Appends to *text what is certain.
  void Feed(std::string_view bytes, std::string* text);
  // The same for bytes that are whole characters, without looking at them.
  void FeedWhole(std::string_view bytes, std::string* text);
  // No bytes follow: half a character that waits becomes U+FFFD.
  void Flush(std::string* text);

 private:
  std::string waiting_;  // at most three bytes
};

}  // namespace twinjet::stream
