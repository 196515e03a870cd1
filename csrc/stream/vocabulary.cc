#include "stream/vocabulary.h"

#include <array>
#include <stdexcept>

#include "stream/detokenizer.h"
#include "stream/utf8.h"

namespace twinjet::stream {
namespace {

// Byte-level BPE spells each byte as a printable character (Radford et al. 2019, GPT-2): itself, or, in
// order, one from U+0100 on. Gives the byte of a code point, -1 if it stands for none.
constexpr auto kByteOfCharacter = [] {
  std::array<int16_t, 512> bytes{};
  bytes.fill(-1);
  int16_t next = 256;
  for (int16_t b = 0; b < 256; ++b) {
    bool is_printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    bytes[static_cast<size_t>(is_printable ? b : next++)] = b;
  }
  return bytes;
}();

int32_t CodePoint(std::string_view c) {
  const auto low = [&](size_t i) { return static_cast<uint8_t>(c[i]) & 0x3F; };
  switch (c.size()) {
    case 1:
      return static_cast<uint8_t>(c[0]);
    case 2:
      return (static_cast<uint8_t>(c[0]) & 0x1F) << 6 | low(1);
    case 3:
      return (static_cast<uint8_t>(c[0]) & 0x0F) << 12 | low(1) << 6 | low(2);
    default:
      return (static_cast<uint8_t>(c[0]) & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3);
  }
}

// A token with any other character in it, as added ones may have, stands for its own UTF-8.
std::string FromByteLevel(std::string_view token) {
  std::string bytes;
  for (std::string_view rest = token; !rest.empty();) {
    Utf8Unit unit = NextUtf8(rest);
    int32_t code = CodePoint(rest.substr(0, unit.size));
    if (code >= static_cast<int32_t>(kByteOfCharacter.size()) ||
        kByteOfCharacter[static_cast<size_t>(code)] < 0) {
      return std::string(token);
    }
    bytes += static_cast<char>(kByteOfCharacter[static_cast<size_t>(code)]);
    rest.remove_prefix(unit.size);
  }
  return bytes;
}

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

// The byte of "<0xE2>"; -1 for any other token.
int ByteOf(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
  int high = HexDigit(token[3]);
  int low = HexDigit(token[4]);
  return high < 0 || low < 0 ? -1 : high << 4 | low;
}

std::string Replaced(std::string_view text, std::string_view mark, std::string_view by) {
  std::string made;
  for (size_t found; !mark.empty() && (found = text.find(mark)) != std::string_view::npos;) {
    made.append(text.substr(0, found)).append(by);
    text.remove_prefix(found + mark.size());
  }
  return made.append(text);
}

}  // namespace

Vocabulary::Vocabulary(Joining joining, std::span<const std::optional<std::string>> tokens,
                       std::span<const int32_t> special, std::string_view mark, int32_t strip_left)
    : joining_(joining), strip_left_(strip_left), mark_(mark), ends_{0}, flags_(tokens.size()) {
  if (joining == Joining::kFunction) throw std::invalid_argument("kFunction needs a function");
  ends_.reserve(tokens.size() + 1);
  for (size_t id = 0; id < tokens.size(); ++id) {
    if (tokens[id]) {
      if (!IsUtf8(*tokens[id])) throw std::invalid_argument("a token is not UTF-8");
      flags_[id] = kKnown;
      bytes_ += BytesOf(*tokens[id], &flags_[id]);
      if (IsUtf8(std::string_view(bytes_).substr(ends_.back()))) flags_[id] |= kWhole;
    }
    if (bytes_.size() > UINT32_MAX) throw std::invalid_argument("the vocabulary is larger than 4 GiB");
    ends_.push_back(static_cast<uint32_t>(bytes_.size()));
  }
  for (int32_t id : special) {
    if (flags(id) & kKnown) flags_[static_cast<size_t>(id)] |= kSpecial;
  }
}

Vocabulary::Vocabulary(int32_t num_tokens, std::span<const int32_t> special, DecodeFunction decode)
    : joining_(Joining::kFunction),
      flags_(static_cast<size_t>(num_tokens), kKnown),
      decode_(std::move(decode)) {
  for (int32_t id : special) {
    if (flags(id) & kKnown) flags_[static_cast<size_t>(id)] |= kSpecial;
  }
}

std::string Vocabulary::BytesOf(std::string_view token, uint8_t* flags) const {
  if (joining_ == Joining::kByteLevel) return FromByteLevel(token);
  // Metaspace keeps its marks, which are dropped or become spaces according to the place.
  if (joining_ == Joining::kMetaspace) return std::string(token);
  std::string text = Replaced(token, mark_, " ");
  int byte = ByteOf(text);
  if (byte < 0) return text;
  *flags |= kByte;
  return std::string(1, static_cast<char>(byte));
}

std::string Vocabulary::first_bytes(int32_t id) const {
  return joining_ == Joining::kMetaspace ? Replaced(bytes(id), mark_, "") : std::string(bytes(id));
}

std::string Vocabulary::TokenText(int32_t id) const {
  if (!(flags(id) & kKnown)) return "";
  if (joining_ == Joining::kFunction) return decode_(std::span(&id, 1), false);
  if (joining_ == Joining::kMetaspace) return Replaced(bytes(id), mark_, " ");
  std::string text;
  Utf8Decoder utf8;
  utf8.Feed(bytes(id), &text);
  utf8.Flush(&text);
  return text;
}

std::string Vocabulary::Decode(std::span<const int32_t> ids, bool skip_special) const {
  if (joining_ == Joining::kFunction) return decode_(ids, skip_special);
  // The incremental decoder looks at no more than a count, so it may borrow this object.
  Detokenizer detokenizer(std::shared_ptr<const Vocabulary>(std::shared_ptr<void>(), this), skip_special);
  std::string text;
  for (int32_t id : ids) detokenizer.Feed(id, &text);
  detokenizer.Flush(&text);
  return text;
}

}  // namespace twinjet::stream
