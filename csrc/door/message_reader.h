// Cuts a request's bytes into messages, as they come in pieces of any size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "door/wire.h"

namespace twinjet::door {

enum class ReadError : uint8_t {
  kNone,
  kTooLarge,      // the message is longer than max_bytes, as sent or decompressed
  kBadFlag,       // the prefix's first byte is neither 0 nor 1
  kNoEncoding,    // compressed, though the call named no encoding
  kNotDecodable,  // not what the encoding says
};

class MessageReader {
 public:
  void set_encoding(Encoding encoding) { encoding_ = encoding; }

  // Takes bytes from *input up to the end of a message; true if *message is one now. False: more input is
  // needed, or error() is set and the reader is of no more use.
  bool Read(std::string_view* input, size_t max_bytes, std::string* message);

  ReadError error() const { return error_; }
  // The length that a too large message declared, or 0 if it grew too large when decompressed.
  size_t declared_bytes() const { return num_bytes_; }
  bool is_in_message() const { return num_prefix_ > 0; }
  // Bytes of the unfinished message, in memory. Memory follows the bytes that came, not those declared.
  size_t buffered_bytes() const { return body_.size(); }

 private:
  Encoding encoding_ = Encoding::kIdentity;
  ReadError error_ = ReadError::kNone;
  uint8_t num_prefix_ = 0;
  char prefix_[kPrefixBytes] = {};
  size_t num_bytes_ = 0;
  std::string body_;
};

}  // namespace twinjet::door
