#include "door/mailbox.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace twinjet::door {
namespace {

// A burst's memory is not kept for ever.
constexpr size_t kKeptBytes = 4 << 20;

int MakeEventFd() {
  const int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (fd < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  return fd;
}

}  // namespace

void Mail::Clear() {
  commands.clear();
  bytes.clear();
  if (bytes.capacity() > kKeptBytes) bytes.shrink_to_fit();
  if (commands.capacity() * sizeof(Command) > kKeptBytes) commands.shrink_to_fit();
}

Mailbox::Mailbox() : fd_(MakeEventFd()) {}

Mailbox::~Mailbox() { close(fd_); }

void Mailbox::Wake() {
  const uint64_t one = 1;
  // The counter holds more than wake-ups can ever come.
  [[maybe_unused]] const ssize_t written = write(fd_, &one, sizeof one);
}

void Mailbox::Hold() {
  const std::lock_guard lock(mutex_);
  holder_ = std::this_thread::get_id();
}

void Mailbox::LetGo() {
  {
    const std::lock_guard lock(mutex_);
    holder_ = {};
    if (mail_.commands.empty() || std::exchange(is_told_, true)) return;
  }
  Wake();
}

bool Mailbox::MustWake() { return holder_ != std::this_thread::get_id() && !std::exchange(is_told_, true); }

void Mailbox::Post(Command command) {
  {
    const std::lock_guard lock(mutex_);
    if (is_closed_) return;
    mail_.commands.push_back(std::move(command));
    if (!MustWake()) return;
  }
  Wake();
}

void Mailbox::Add(const CallRef& call, std::string_view bytes) {
  call->CountUnsent(bytes.size());
  mail_.commands.push_back({CommandKind::kMessage, call, mail_.bytes.size(), bytes.size(), nullptr, nullptr});
  mail_.bytes.append(bytes);
}

void Mailbox::PostMessage(const CallRef& call, std::string_view bytes) {
  {
    const std::lock_guard lock(mutex_);
    if (is_closed_) return;
    Add(call, bytes);
    if (!MustWake()) return;
  }
  Wake();
}

void Mailbox::PostMessages(std::span<const Outgoing> messages) {
  {
    const std::lock_guard lock(mutex_);
    if (is_closed_) return;
    const size_t num_before = mail_.commands.size();
    for (const Outgoing& message : messages) {
      if (message.call->mailbox() == this) Add(message.call, message.bytes);
    }
    if (mail_.commands.size() == num_before || !MustWake()) return;
  }
  Wake();
}

void Mailbox::Close() {
  Mail dropped;
  const std::lock_guard lock(mutex_);
  is_closed_ = true;
  std::swap(mail_, dropped);
}

void Mailbox::Take(Mail* mail) {
  const std::lock_guard lock(mutex_);
  std::swap(mail_, *mail);
  is_told_ = false;
}

}  // namespace twinjet::door
