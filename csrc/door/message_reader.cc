#include "door/message_reader.h"

#include <algorithm>
#include <utility>

namespace twinjet::door {

bool MessageReader::Read(std::string_view* input, size_t max_bytes, std::string* message) {
  if (error_ != ReadError::kNone) return false;
  while (num_prefix_ < kPrefixBytes) {
    if (input->empty()) return false;
    prefix_[num_prefix_++] = input->front();
    input->remove_prefix(1);
    if (num_prefix_ < kPrefixBytes) continue;
    num_bytes_ = 0;
    for (size_t i = 1; i < kPrefixBytes; ++i) {
      num_bytes_ = num_bytes_ << 8 | static_cast<unsigned char>(prefix_[i]);
    }
    if (prefix_[0] != 0 && prefix_[0] != 1) {
      error_ = ReadError::kBadFlag;
    } else if (prefix_[0] == 1 && encoding_ == Encoding::kIdentity) {
      error_ = ReadError::kNoEncoding;
    } else if (num_bytes_ > max_bytes) {
      error_ = ReadError::kTooLarge;
    }
    if (error_ != ReadError::kNone) return false;
  }
  const size_t num_taken = std::min(num_bytes_ - body_.size(), input->size());
  body_.append(input->substr(0, num_taken));
  input->remove_prefix(num_taken);
  if (body_.size() < num_bytes_) return false;
  if (prefix_[0] == 1) {
    bool is_too_large = false;
    std::optional<std::string> plain = Inflate(body_, max_bytes, &is_too_large);
    if (!plain) {
      error_ = is_too_large ? ReadError::kTooLarge : ReadError::kNotDecodable;
      num_bytes_ = 0;
      return false;
    }
    body_ = std::move(*plain);
  }
  num_prefix_ = 0;
  *message = std::exchange(body_, std::string());
  return true;
}

}  // namespace twinjet::door
