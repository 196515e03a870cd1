// Vocabulary: what each token of a model says, read from its tokenizer once and then shared by all streams.
//
// Three ways in which tokens join to text are done here; a tokenizer with another one is asked itself, by a
// function. Immutable and thread-safe, as far as that function is.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace twinjet::stream {

// How tokens join to text.
//   kByteLevel: each token is bytes, all of them together are decoded with replacement (GPT-2's BPE).
//   kByteFallback: each token is text; a run of byte tokens "<0xE2>" is the text that it encodes, or one
//   U+FFFD a
//     byte if it encodes none (SentencePiece with byte fallback). Only the run's end tells which.
//   kMetaspace: each token is text; the first one's marks of a space are dropped.
//   kFunction: as the function says.
enum class Joining : uint8_t { kByteLevel, kByteFallback, kMetaspace, kFunction };

// Text of token ids, as the tokenizer decodes them all at once. May throw.
using DecodeFunction = std::function<std::string(std::span<const int32_t> ids, bool skip_special)>;

class Vocabulary {
 public:
  enum Flag : uint8_t {
    kKnown = 1,
    kSpecial = 2,  // left out of text unless asked for
    kByte = 4,     // a single byte of a run (kByteFallback)
    kWhole = 8,    // complete characters
  };

  // tokens: by id, as the tokenizer spells them; unset ids are unknown and give no text. special: ids.
  // strip_left: with kByteFallback, so many spaces at most are cut from the text's beginning.
  // mark: with kByteFallback and kMetaspace, what stands for a space; "" is none.
  Vocabulary(Joining joining, std::span<const std::optional<std::string>> tokens,
             std::span<const int32_t> special, std::string_view mark = "", int32_t strip_left = 0);
  // kFunction. num_tokens: ids from 0.
  Vocabulary(int32_t num_tokens, std::span<const int32_t> special, DecodeFunction decode);

  Joining joining() const { return joining_; }
  int32_t size() const { return static_cast<int32_t>(flags_.size()); }
  int32_t strip_left() const { return strip_left_; }
  // Flags of a token; 0 for an unknown one.
  uint8_t flags(int32_t id) const { return id >= 0 && id < size() ? flags_[static_cast<size_t>(id)] : 0; }
  // What a known token adds; with kByte its one byte. Not for kFunction.
  std::string_view bytes(int32_t id) const {
    size_t i = static_cast<size_t>(id);
    return std::string_view(bytes_).substr(ends_[i], ends_[i + 1] - ends_[i]);
  }
  // The same at the beginning of an output.
  std::string first_bytes(int32_t id) const;

  // The text of a token alone, special or not; parts of characters show as U+FFFD. Unknown ids give "".
  std::string TokenText(int32_t id) const;
  // The text of ids, all at once.
  std::string Decode(std::span<const int32_t> ids, bool skip_special) const;

  const DecodeFunction& decode_function() const { return decode_; }

 private:
  std::string BytesOf(std::string_view token, uint8_t* flags) const;

  Joining joining_;
  int32_t strip_left_ = 0;
  std::string mark_;
  std::string bytes_;
  std::vector<uint32_t> ends_;
  std::vector<uint8_t> flags_;
  DecodeFunction decode_;
};

}  // namespace twinjet::stream
