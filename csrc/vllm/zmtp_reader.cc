#include "vllm/zmtp_reader.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

namespace twinjet::vllm {
namespace {

constexpr uint8_t kMore = 1;
constexpr uint8_t kLong = 2;
constexpr uint8_t kCommand = 4;
constexpr size_t kFirstBytes = 128 << 10;
constexpr size_t kKeptBytes = 1 << 20;  // a buffer that had to grow beyond is let go when it is empty
constexpr size_t kShortHeader = 2;
constexpr size_t kLongHeader = 9;
constexpr size_t kTtlBytes = 2;  // of a PING, before what is to be sent back
constexpr size_t kMaxPingBytes = 256;

uint64_t ReadSize(const uint8_t* bytes) {
  uint64_t size = 0;
  for (int i = 0; i < 8; ++i) size = size << 8 | bytes[i];
  return size;
}

}  // namespace

ZmtpReader::ZmtpReader(std::string_view unread)
    : buffer_(std::max(kFirstBytes, unread.size())), end_(unread.size()) {
  std::copy(unread.begin(), unread.end(), buffer_.begin());
}

ssize_t ZmtpReader::Fill(int fd) {
  MakeRoom();
  while (true) {
    const ssize_t count = recv(fd, buffer_.data() + end_, buffer_.size() - end_, 0);
    if (count > 0) end_ += static_cast<size_t>(count);
    if (count >= 0 || errno != EINTR) return count;
  }
}

std::span<const Frame> ZmtpReader::Next() {
  while (true) {
    const uint8_t* const message = buffer_.data() + begin_;
    const size_t held = end_ - begin_;
    const uint8_t* const at = message + scanned_;
    size_t header = kShortHeader;
    if (held > scanned_) {
      if (*at & ~(kMore | kLong | kCommand) || ((*at & kCommand) && (*at & kMore))) {
        char text[64];
        std::snprintf(text, sizeof text, "its messages cannot be read: a frame has the flags 0x%x", *at);
        throw ZmtpError(text);
      }
      if (*at & kLong) header = kLongHeader;
    }
    wanted_ = scanned_ + header;
    if (held < wanted_) return {};
    const uint64_t size = header == kLongHeader ? ReadSize(at + 1) : at[1];
    if (size > kMaxFrameBytes) {
      throw ZmtpError("its messages cannot be read: a frame of " + std::to_string(size) + " bytes");
    }
    wanted_ += size;
    if (held < wanted_) return {};
    const Extent extent{scanned_ + header, size};
    const uint8_t flags = *at;
    scanned_ = wanted_;
    if (flags & kCommand) {
      Obey({reinterpret_cast<const char*>(message + extent.begin), extent.size});
      if (extents_.empty()) begin_ += std::exchange(scanned_, 0);
      continue;
    }
    extents_.push_back(extent);
    if (flags & kMore) continue;
    frames_.clear();
    for (const Extent& part : extents_) frames_.emplace_back(message + part.begin, part.size);
    extents_.clear();
    begin_ += std::exchange(scanned_, 0);
    return frames_;
  }
}

std::string ZmtpReader::TakeReply() { return std::exchange(reply_, {}); }

void ZmtpReader::MakeRoom() {
  const size_t held = end_ - begin_;
  const size_t wanted = std::max(wanted_, held + 1);
  if (held == 0) {
    begin_ = end_ = 0;
    if (buffer_.size() > kKeptBytes && wanted <= kFirstBytes) {
      buffer_ = std::vector<uint8_t>(kFirstBytes);
      return;
    }
  }
  if (wanted <= buffer_.size() - begin_) return;
  if (wanted > buffer_.size()) {
    std::vector<uint8_t> larger(std::max(wanted, 2 * buffer_.size()));
    std::memcpy(larger.data(), buffer_.data() + begin_, held);
    buffer_.swap(larger);
  } else {
    std::memmove(buffer_.data(), buffer_.data() + begin_, held);
  }
  begin_ = 0;
  end_ = held;
}

void ZmtpReader::Obey(std::string_view command) {
  const auto length = command.empty() ? 0 : static_cast<uint8_t>(command.front());
  if (command.size() < 1u + length) throw ZmtpError("its commands cannot be read");
  const std::string_view name = command.substr(1, length);
  const std::string_view rest = command.substr(1u + length);
  if (name == "ERROR")
    throw ZmtpError("what connected refuses us: " +
                    std::string(rest.substr(std::min<size_t>(1, rest.size()))));
  if (name != "PING") return;
  // A peer that pings without reading gets no more than this.
  if (rest.size() < kTtlBytes || rest.size() - kTtlBytes > kMaxPingBytes || reply_.size() > kMaxPingBytes)
    return;
  const std::string answer = std::string("\x04PONG") + std::string(rest.substr(kTtlBytes));
  const bool is_long = answer.size() > 255;
  reply_ += static_cast<char>(is_long ? kCommand | kLong : kCommand);
  for (int i = is_long ? 7 : 0; i >= 0; --i) reply_ += static_cast<char>(answer.size() >> (8 * i) & 0xff);
  reply_ += answer;
}

}  // namespace twinjet::vllm
