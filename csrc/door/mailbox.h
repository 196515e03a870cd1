// How other threads tell a loop what to do: commands and message bytes in one buffer, swapped out at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "door/call.h"

namespace twinjet::door {

enum class CommandKind : uint8_t { kHeaders, kMessage, kFinish, kReset, kAck, kCompress };

struct Command {
  CommandKind kind;
  CallRef call;
  size_t offset = 0;  // kMessage: where its bytes begin in Mail::bytes
  size_t size = 0;    // kMessage: how many; kAck: bytes of request no longer held
  std::unique_ptr<Metadata> headers;
  std::unique_ptr<Status> status;
};

// What lay in a mailbox.
struct Mail {
  std::vector<Command> commands;
  std::string bytes;
  void Clear();
};

// A message for a call's client, without gRPC's prefix.
struct Outgoing {
  CallRef call;
  std::string_view bytes;
};

class Mailbox {
 public:
  Mailbox();
  ~Mailbox();
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

  // An event of EPOLLIN and EPOLLET comes when there is mail and when Wake is called. It is never read: that
  // would be a system call for each wake-up.
  int fd() const { return fd_; }

  // Any thread.
  void Post(Command command);
  void PostMessage(const CallRef& call, std::string_view bytes);
  // Posts those messages whose calls belong to this mailbox.
  void PostMessages(std::span<const Outgoing> messages);
  void Wake();
  // From Hold to LetGo what the calling thread posts wakes nobody, so that it is taken at once; LetGo wakes
  // for it. One thread holds at a time.
  void Hold();
  void LetGo();
  // Drops what lies here and whatever comes later.
  void Close();

  // The loop's thread: swaps what came into *mail, which must be clear.
  void Take(Mail* mail);

 private:
  void Add(const CallRef& call, std::string_view bytes);
  // After something was added, with the lock: whether to wake for it.
  bool MustWake();

  const int fd_;
  std::mutex mutex_;
  // Guarded by mutex_.
  Mail mail_;
  bool is_closed_ = false;
  std::thread::id holder_;  // of no thread if nobody holds
  bool is_told_ = false;    // there was a wake-up for the mail
};

}  // namespace twinjet::door
