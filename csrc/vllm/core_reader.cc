#include "vllm/core_reader.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <system_error>

#include "stream/quiet_thread.h"

namespace twinjet::vllm {
namespace {

constexpr std::string_view kDead = "ENGINE_CORE_DEAD";
constexpr int kMessagesATurn = 16;  // of Read()
constexpr double kQuietS = 0.005;   // that sums may wait for steps without events: a step of a large model

// Of the clock of Python's time.monotonic().
double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool IsDead(std::span<const Frame> frames) {
  return frames.size() == 1 && std::equal(frames[0].begin(), frames[0].end(), kDead.begin(), kDead.end());
}

}  // namespace

void CoreNews::Clear() {
  stepped.clear();
  irregular.clear();
  ended.clear();
  stats.reset();
  num_preemptions = 0;
  utilities.clear();
  end.reset();
}

CoreReader::CoreReader(int fd, std::string_view unread)
    : socket_fd_(fcntl(fd, F_DUPFD_CLOEXEC, 0)),
      event_fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      zmtp_(unread) {
  if (socket_fd_ >= 0 && event_fd_ >= 0) return;
  const int error = errno;
  for (int opened : {socket_fd_, event_fd_}) {
    if (opened >= 0) close(opened);
  }
  throw std::system_error(error, std::generic_category(), "the engine core's socket");
}

CoreReader::~CoreReader() {
  Stop();
  close(socket_fd_);
  close(event_fd_);
}

void CoreReader::Open(stream::SequenceKey key, const Route& route) {
  const std::lock_guard lock(exchange_mutex_);
  opening_.emplace_back(key, route);
}

bool CoreReader::Close(stream::SequenceKey key) {
  const std::lock_guard lock(mutex_);
  OpenWaiting();
  return router_.Close(key);
}

size_t CoreReader::num_open() {
  const std::lock_guard lock(mutex_);
  OpenWaiting();
  return router_.num_open();
}

void CoreReader::Take(CoreNews* news) {
  uint64_t count = 0;
  [[maybe_unused]] const ssize_t size =
      read(event_fd_, &count, sizeof count);  // nothing there: it was told of twice
  news->Clear();
  const std::lock_guard lock(exchange_mutex_);
  std::swap(*news, news_);
  is_told_ = false;
}

void CoreReader::Start() {
  fcntl(socket_fd_, F_SETFL, fcntl(socket_fd_, F_GETFL) & ~O_NONBLOCK);
  thread_ = stream::StartQuietThread([this] { Run(); });
}

void CoreReader::Stop() {
  is_stopped_ = true;
  shutdown(socket_fd_, SHUT_RDWR);  // wakes the thread, and the peer sees it although our socket is a copy
  if (thread_.joinable()) thread_.join();
}

void CoreReader::Run() {
  do {
    while (!is_stopped_ && TakeSome() != Taken::kNothing) {
    }
  } while (!is_stopped_ && Fill());
}

bool CoreReader::Read() {
  if (has_ended_) return false;
  // The rest of a message comes before what follows it.
  for (int i = 0; i < kMessagesATurn; ++i) {
    const Taken taken = TakeSome();
    if (taken == Taken::kPart) return true;
    if (taken == Taken::kNothing) {
      if (i > 0 || !Fill()) return false;
    }
  }
  return true;
}

// False at the end, and where nothing has come.
bool CoreReader::Fill() {
  if (has_ended_) return false;
  const ssize_t count = zmtp_.Fill(socket_fd_);
  if (count > 0) return true;
  if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return false;
  // The peer's process is at its end, which whoever watches that tells.
  End(count == 0 || errno == ECONNRESET
          ? ""
          : std::string("its messages cannot be read: ") + std::strerror(errno));
  return false;
}

CoreReader::Taken CoreReader::TakeSome() {
  if (has_ended_) return Taken::kNothing;
  const double now = Now();
  bool is_urgent = false;
  try {
    if (const std::lock_guard lock(mutex_); router_.has_rest()) {
      router_.TakeRest(now);
      is_urgent = Publish(false);
    } else {
      const std::span<const Frame> frames = zmtp_.Next();
      if (const std::string reply = zmtp_.TakeReply(); !reply.empty()) {
        // Without room the peer has not read for long, and hears nothing of us.
        [[maybe_unused]] const ssize_t size =
            send(socket_fd_, reply.data(), reply.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
      }
      if (frames.empty()) return Taken::kNothing;
      is_urgent = TakeMessage(frames, now);
    }
  } catch (const ZmtpError& error) {
    End(error.what());
    return Taken::kNothing;
  } catch (const WireError& error) {
    End(std::string("it sent a message that cannot be read: ") + error.what());
    return Taken::kNothing;
  } catch (const std::exception& error) {
    // Whatever it is, streams would wait for ever for what was in the message.
    End(std::string("its message was not delivered: ") + error.what());
    return Taken::kNothing;
  }
  if (is_urgent || now - told_at_ >= kQuietS) {
    told_at_ = now;
    Tell();
  }
  return router_.has_rest() ? Taken::kPart : Taken::kMessage;
}

bool CoreReader::TakeMessage(std::span<const Frame> frames, double now) {
  if (IsDead(frames)) throw ZmtpError("its engine core failed (EngineDeadError); its log says why");
  OpenWaiting();
  router_.Take(frames, now);
  if (router_.message().has_utility) {
    const std::lock_guard lock(exchange_mutex_);
    news_.utilities.emplace_back(reinterpret_cast<const char*>(frames[0].data()), frames[0].size());
  }
  return Publish(true);
}

// An answer to a request comes after the request was opened.
void CoreReader::OpenWaiting() {
  const std::lock_guard lock(exchange_mutex_);
  for (const auto& [key, route] : opening_) router_.Open(key, route);
  opening_.clear();
}

bool CoreReader::Publish(bool is_new) {
  const std::lock_guard lock(exchange_mutex_);
  for (stream::Pump* pump : router_.stepped()) {
    if (std::find(news_.stepped.begin(), news_.stepped.end(), pump) == news_.stepped.end()) {
      news_.stepped.push_back(pump);
    }
  }
  news_.irregular.insert(news_.irregular.end(), router_.irregular().begin(), router_.irregular().end());
  news_.ended.insert(news_.ended.end(), router_.ended().begin(), router_.ended().end());
  bool is_urgent = router_.is_eventful() || !router_.irregular().empty() || !router_.ended().empty();
  if (is_new) {
    const CoreMessage& message = router_.message();
    if (message.has_stats) news_.stats = message;
    news_.num_preemptions += message.num_preemptions;
    // What is no step of ours may be the last for long.
    is_urgent |= message.has_utility || message.num_preemptions > 0 || router_.stepped().empty();
  }
  return is_urgent;
}

void CoreReader::End(std::string why) {
  has_ended_ = true;
  if (is_stopped_) return;
  {
    const std::lock_guard lock(exchange_mutex_);
    news_.end = std::move(why);
  }
  Tell();
}

void CoreReader::Tell() {
  {
    const std::lock_guard lock(exchange_mutex_);
    if (std::exchange(is_told_, true)) return;
  }
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t size =
      write(event_fd_, &one, sizeof one);  // a full counter is readable as well
}

}  // namespace twinjet::vllm
