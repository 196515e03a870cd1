// CoreReader: reads what vLLM's engine core sends and puts it into the pumps of the requests that it
// concerns, in a thread of its own, so that tokens go on whatever Python does meanwhile.
//
//   CoreReader reader(fd, unread);
//   reader.Start();                        // or Read() whenever fd is readable
//   reader.Open(key, {&pump, pump_key, ...});
//   reader.Take(&news);                    // whenever fd() is readable
//
// What else a message tells waits in the news. Open(), Close(), Take(), Start() and Stop() are for one
// thread, the owner's. The pumps must outlive their sequences here.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "vllm/step_router.h"
#include "vllm/zmtp_reader.h"

namespace twinjet::vllm {

struct CoreNews {
  std::vector<stream::Pump*> stepped;      // pumps that got rows, each once
  std::vector<IrregularEnd> irregular;     // not put into their pumps
  std::vector<stream::SequenceKey> ended;  // sequences that are forgotten, the irregular ones too
  std::optional<CoreMessage> stats;        // the last message that had them
  uint32_t num_preemptions = 0;
  std::vector<std::string> utilities;  // messages that answer utility calls
  std::optional<std::string> end;      // nothing more comes; why, "" if the peer has just gone
  void Clear();
};

class CoreReader {
 public:
  // fd: a connected non-blocking stream socket, which stays the caller's. unread: what was read from it
  // already. Throws std::system_error.
  CoreReader(int fd, std::string_view unread);
  ~CoreReader();
  CoreReader(const CoreReader&) = delete;
  CoreReader& operator=(const CoreReader&) = delete;

  void Open(stream::SequenceKey key, const Route& route);
  // Whether it was still open.
  bool Close(stream::SequenceKey key);

  // An event of POLLIN is there while there is news, or milliseconds later where a step brought only tokens
  // that are on their way.
  int fd() const { return event_fd_; }
  // Swaps the news into *news.
  void Take(CoreNews* news);

  // Reads in a thread from now on; the socket blocks.
  void Start();
  // Reads no more and breaks the connection. Idempotent.
  void Stop();
  // Reads once and takes what came, up to a number of messages or a part of a large one: whether there is
  // more to take. For those who do not Start(), in the owner's thread.
  bool Read();

  size_t num_open();

 private:
  enum class Taken : uint8_t { kNothing, kPart, kMessage };

  void Run();
  bool Fill();
  Taken TakeSome();
  bool TakeMessage(std::span<const Frame> frames, double now);
  void OpenWaiting();
  // Whether it should be told of at once.
  bool Publish(bool is_new);
  void End(std::string why);
  void Tell();

  const int socket_fd_;
  const int event_fd_;
  ZmtpReader zmtp_;
  bool has_ended_ = false;
  double told_at_ = 0;
  std::atomic<bool> is_stopped_ = false;
  std::thread thread_;

  std::mutex mutex_;  // held for a part of a message; before the next one
  StepRouter router_;

  std::mutex exchange_mutex_;
  std::vector<std::pair<stream::SequenceKey, Route>> opening_;
  CoreNews news_;
  bool is_told_ = false;
};

}  // namespace twinjet::vllm
