// Outbox: a stream's messages, framed as gRPC does, that have not become HTTP/2 frames.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace twinjet::door {

class Outbox {
 public:
  size_t size() const { return bytes_.size() - pos_; }
  bool is_empty() const { return bytes_.empty(); }
  // With the message's prefix.
  void Append(bool is_compressed, std::string_view message);
  // Appends the first num_bytes, which there must be, to *out.
  void MoveTo(std::string* out, size_t num_bytes);
  // Gives the size that was.
  size_t Drop();

 private:
  std::string bytes_;
  size_t pos_ = 0;  // of the first that is not sent
};

}  // namespace twinjet::door
