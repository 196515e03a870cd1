// RequestHead: what a request's header block says, and whether gRPC allows it.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "door/call.h"
#include "door/wire.h"

namespace twinjet::door {

// What the door answers instead of a handler.
struct Refusal {
  int code;
  std::string message;
  const char* http_status = "200";
};

class RequestHead {
 public:
  // max_bytes: of the block, as HTTP/2 counts.
  explicit RequestHead(size_t max_bytes) : max_bytes_(max_bytes) {}

  // Takes a field of the block, in the order in which they come.
  void Add(std::string_view name, std::string_view value);
  // Takes note of a field that HTTP/2 itself does not allow. False if something was wrong before.
  bool AddInvalid();

  // Once the block has ended: what is wrong with it, if anything. num_bytes: its size as HTTP/2 counts.
  std::optional<Refusal> Check(size_t num_bytes) const;

  Encoding encoding() const { return encoding_; }
  // All but the peer. To be called once.
  std::unique_ptr<CallInfo> TakeInfo() { return std::move(info_); }

 private:
  void AddBinary(std::string_view name, std::string_view values);

  const size_t max_bytes_;
  size_t num_split_bytes_ = 0;  // what binary values sent as one field would have more as fields of their own
  std::unique_ptr<CallInfo> info_ = std::make_unique<CallInfo>();
  std::string method_;
  std::string content_type_;
  std::string bad_metadata_;  // what is wrong with it
  Encoding encoding_ = Encoding::kIdentity;
  bool has_bad_timeout_ = false;
};

}  // namespace twinjet::door
