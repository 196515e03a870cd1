#include "stream/utf8.h"

#include <cstdint>

namespace twinjet::stream {

Utf8Unit NextUtf8(std::string_view bytes) {
  using Kind = Utf8Unit::Kind;
  const auto at = [&](size_t i) { return static_cast<uint8_t>(bytes[i]); };
  const uint8_t lead = at(0);
  if (lead < 0x80) return {Kind::kCharacter, 1};
  if (lead < 0xC2 || lead > 0xF4) return {Kind::kInvalid, 1};
  const size_t size = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // The second byte's range excludes overlong forms, surrogates and what is above U+10FFFF.
  const uint8_t least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const uint8_t most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (size_t i = 1; i < size; ++i) {
    if (i == bytes.size()) return {Kind::kCut, i};
    if (at(i) < (i == 1 ? least : 0x80) || at(i) > (i == 1 ? most : 0xBF)) return {Kind::kInvalid, i};
  }
  return {Kind::kCharacter, size};
}

bool IsUtf8(std::string_view bytes) {
  while (!bytes.empty()) {
    Utf8Unit unit = NextUtf8(bytes);
    if (unit.kind != Utf8Unit::Kind::kCharacter) return false;
    bytes.remove_prefix(unit.size);
  }
  return true;
}

void Utf8Decoder::Feed(std::string_view bytes, std::string* text) {
  std::string joined;
  if (!waiting_.empty()) {
    joined = std::move(waiting_);
    waiting_.clear();
    bytes = joined.append(bytes);
  }
  while (!bytes.empty()) {
    Utf8Unit unit = NextUtf8(bytes);
    if (unit.kind == Utf8Unit::Kind::kCut) {
      waiting_ = bytes;
      return;
    }
    text->append(unit.kind == Utf8Unit::Kind::kCharacter ? bytes.substr(0, unit.size) : kReplacement);
    bytes.remove_prefix(unit.size);
  }
}

void Utf8Decoder::FeedWhole(std::string_view bytes, std::string* text) {
  if (bytes.empty()) return;
  Flush(text);
  text->append(bytes);
}

void Utf8Decoder::Flush(std::string* text) {
  if (waiting_.empty()) return;
  waiting_.clear();
  text->append(kReplacement);
}

}  // namespace twinjet::stream
