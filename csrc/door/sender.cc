#include "door/sender.h"

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>

namespace twinjet::door {
namespace {

constexpr unsigned kEntries = 128;
// Fewer than that cost as much through the ring as one by one.
constexpr size_t kWorthwhile = 4;
// A kernel with this has IORING_OP_SEND, too (5.7).
constexpr unsigned kNeeded = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_FAST_POLL;

ssize_t SendOne(const Sending& sending) {
  while (true) {
    const ssize_t result = send(sending.fd, sending.bytes, sending.size, MSG_NOSIGNAL);
    if (result >= 0) return result;
    if (errno != EINTR) return -errno;
  }
}

// Memory that the kernel shares with us. A forked child has no use for it.
class Mapping {
 public:
  Mapping(int fd, off_t offset, size_t size) : size_(size) {
    void* const at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
    if (at == MAP_FAILED) return;
    at_ = static_cast<char*>(at);
    madvise(at_, size_, MADV_DONTFORK);
  }
  ~Mapping() {
    if (at_) munmap(at_, size_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  bool is_there() const { return at_ != nullptr; }
  template <typename T>
  T* Get(size_t offset = 0) const {
    return reinterpret_cast<T*>(at_ + offset);
  }

 private:
  char* at_ = nullptr;
  const size_t size_;
};

unsigned Load(unsigned* shared) { return std::atomic_ref(*shared).load(std::memory_order_acquire); }
void Store(unsigned* shared, unsigned value) {
  std::atomic_ref(*shared).store(value, std::memory_order_release);
}

}  // namespace

// The sockets are non-blocking, so each send is over, with a result, when the call that submits it returns.
class Sender::Ring {
 public:
  // Null if the kernel has none for us.
  static std::unique_ptr<Ring> Open() {
    io_uring_params params{};
    const int fd = static_cast<int>(syscall(__NR_io_uring_setup, kEntries, &params));
    if (fd < 0) return nullptr;
    std::unique_ptr<Ring> ring(new Ring(fd, params));
    const bool is_good =
        (params.features & kNeeded) == kNeeded && ring->queues_.is_there() && ring->entries_.is_there();
    return is_good ? std::move(ring) : nullptr;
  }
  ~Ring() { close(fd_); }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Gives how many of the first were sent, with their results set: fewer than there are when the kernel is
  // short of memory. No more than kEntries.
  size_t Send(std::span<Sending> sendings) {
    const unsigned first = *submit_tail_;
    for (size_t i = 0; i < sendings.size(); ++i) Prepare(first + static_cast<unsigned>(i), sendings[i], i);
    Store(submit_tail_, first + static_cast<unsigned>(sendings.size()));
    const auto num_all = static_cast<unsigned>(sendings.size());
    Enter(num_all, num_all);
    const unsigned num_taken = Load(submit_head_) - first;
    Store(submit_tail_, first + num_taken);
    for (unsigned num_done = Reap(sendings); num_done < num_taken; num_done += Reap(sendings)) {
      Enter(0, num_taken - num_done);
    }
    return num_taken;
  }

 private:
  Ring(int fd, const io_uring_params& params)
      : fd_(fd),
        queues_(fd, IORING_OFF_SQ_RING,
                std::max(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                         params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe))),
        entries_(fd, IORING_OFF_SQES, params.sq_entries * sizeof(io_uring_sqe)) {
    if (!queues_.is_there() || !entries_.is_there()) return;
    submit_head_ = queues_.Get<unsigned>(params.sq_off.head);
    submit_tail_ = queues_.Get<unsigned>(params.sq_off.tail);
    done_head_ = queues_.Get<unsigned>(params.cq_off.head);
    done_tail_ = queues_.Get<unsigned>(params.cq_off.tail);
    done_ = queues_.Get<io_uring_cqe>(params.cq_off.cqes);
    submit_mask_ = params.sq_entries - 1;
    done_mask_ = params.cq_entries - 1;
    auto* const order = queues_.Get<unsigned>(params.sq_off.array);
    for (unsigned i = 0; i < params.sq_entries; ++i) order[i] = i;
  }

  void Prepare(unsigned at, const Sending& sending, size_t index) {
    io_uring_sqe& entry = entries_.Get<io_uring_sqe>()[at & submit_mask_];
    entry = {};
    entry.opcode = IORING_OP_SEND;
    entry.fd = sending.fd;
    entry.addr = reinterpret_cast<uintptr_t>(sending.bytes);
    entry.len = static_cast<unsigned>(sending.size);
    entry.msg_flags = MSG_NOSIGNAL | MSG_DONTWAIT;
    entry.user_data = index;
  }

  void Enter(unsigned num_submitted, unsigned num_awaited) {
    syscall(__NR_io_uring_enter, fd_, num_submitted, num_awaited, IORING_ENTER_GETEVENTS, nullptr, size_t{0});
  }

  unsigned Reap(std::span<Sending> sendings) {
    const unsigned from = *done_head_;
    const unsigned until = Load(done_tail_);
    for (unsigned i = from; i != until; ++i) {
      const io_uring_cqe& done = done_[i & done_mask_];
      sendings[done.user_data].result = done.res;
    }
    Store(done_head_, until);
    return until - from;
  }

  const int fd_;
  const Mapping queues_;
  const Mapping entries_;
  unsigned* submit_head_ = nullptr;  // the kernel's
  unsigned* submit_tail_ = nullptr;
  unsigned* done_head_ = nullptr;
  unsigned* done_tail_ = nullptr;  // the kernel's
  io_uring_cqe* done_ = nullptr;
  unsigned submit_mask_ = 0;
  unsigned done_mask_ = 0;
};

Sender::Sender(bool does_use_ring) : ring_(does_use_ring ? Ring::Open() : nullptr) {}

Sender::~Sender() = default;

void Sender::Send(std::span<Sending> sendings) {
  while (ring_ && sendings.size() >= kWorthwhile) {
    const std::span<Sending> some = sendings.first(std::min<size_t>(sendings.size(), kEntries));
    const size_t num_sent = ring_->Send(some);
    for (Sending& sending : some.first(num_sent)) {
      if (sending.result == -EINTR) sending.result = SendOne(sending);
    }
    sendings = sendings.subspan(num_sent);
    if (num_sent < some.size()) break;
  }
  for (Sending& sending : sendings) sending.result = SendOne(sending);
}

}  // namespace twinjet::door
