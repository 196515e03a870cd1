#include "door/outbox.h"

#include "door/wire.h"

namespace twinjet::door {
namespace {

constexpr size_t kKeptBytes = 4 << 10;

}  // namespace

void Outbox::Append(bool is_compressed, std::string_view message) {
  char prefix[kPrefixBytes];
  PutPrefix(is_compressed, static_cast<uint32_t>(message.size()), prefix);
  bytes_.append(prefix, kPrefixBytes).append(message);
}

void Outbox::MoveTo(std::string* out, size_t num_bytes) {
  out->append(bytes_, pos_, num_bytes);
  pos_ += num_bytes;
  if (pos_ == bytes_.size()) {
    bytes_.clear();
    pos_ = 0;
    if (bytes_.capacity() > kKeptBytes) bytes_.shrink_to_fit();
  } else if (pos_ > bytes_.size() / 2 && pos_ > kKeptBytes) {
    bytes_.erase(0, pos_);
    pos_ = 0;
  }
}

size_t Outbox::Drop() {
  const size_t num_left = size();
  bytes_ = std::string();
  pos_ = 0;
  return num_left;
}

}  // namespace twinjet::door
