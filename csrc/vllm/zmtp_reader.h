// ZmtpReader: messages out of a ZeroMQ peer's byte stream (ZMTP 3, https://rfc.zeromq.org/spec/23/) after
// both have introduced themselves (engines/vllm/front/zmtp.py does that).
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "vllm/core_outputs.h"

namespace twinjet::vllm {

// The bytes are no ZMTP.
class ZmtpError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Not thread-safe.
class ZmtpReader {
 public:
  // unread: what has been read from the socket already.
  explicit ZmtpReader(std::string_view unread);

  // Reads once, as much as there is room for: recv's result and errno.
  ssize_t Fill(int fd);
  // The frames of the next message, valid until Fill(); none if it has not come whole. Throws ZmtpError.
  std::span<const Frame> Next();
  // What the peer's commands want to be answered; clears it.
  std::string TakeReply();

  static constexpr uint64_t kMaxFrameBytes = uint64_t{1} << 31;

 private:
  struct Extent {
    size_t begin;  // from begin_
    size_t size;
  };

  void MakeRoom();
  void Obey(std::string_view command);

  std::vector<uint8_t> buffer_;
  size_t begin_ = 0;    // of the message that is being read
  size_t scanned_ = 0;  // of it, from begin_
  size_t end_ = 0;      // of what was read
  size_t wanted_ = 0;   // from begin_, before there is anything to do
  std::vector<Extent> extents_;
  std::vector<Frame> frames_;
  std::string reply_;
};

}  // namespace twinjet::vllm
