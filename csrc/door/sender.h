// Sender: the bytes of many sockets on their way at once: through io_uring one system call for all, where the
// kernel lets us have it, else one send each.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace twinjet::door {

// Bytes for one non-blocking socket.
struct Sending {
  int fd;
  const char* bytes;
  size_t size;
  ssize_t result = 0;  // bytes that the socket took, or an error of errno.h as a negative number
};

class Sender {
 public:
  // does_use_ring: false leaves io_uring alone.
  explicit Sender(bool does_use_ring = true);
  ~Sender();
  Sender(const Sender&) = delete;
  Sender& operator=(const Sender&) = delete;

  // Whether io_uring is in use: not on kernels that are too old, and not where a sandbox forbids it.
  bool has_ring() const { return ring_ != nullptr; }
  // Sets the result of each. Waits for nothing; one thread at a time.
  void Send(std::span<Sending> sendings);

 private:
  class Ring;

  std::unique_ptr<Ring> ring_;
};

}  // namespace twinjet::door
