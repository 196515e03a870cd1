#include "door/door.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>

namespace twinjet::door {
namespace {

void Post(CommandKind kind, const CallRef& call, size_t size = 0, std::unique_ptr<Metadata> headers = nullptr,
          std::unique_ptr<Status> status = nullptr) {
  call->mailbox()->Post({kind, call, 0, size, std::move(headers), std::move(status)});
}

}  // namespace

void SendHeaders(const CallRef& call, Metadata headers) {
  Post(CommandKind::kHeaders, call, 0, std::make_unique<Metadata>(std::move(headers)));
}

void Write(const CallRef& call, std::string_view message) { call->mailbox()->PostMessage(call, message); }

void Finish(const CallRef& call, Status status) {
  Post(CommandKind::kFinish, call, 0, nullptr, std::make_unique<Status>(std::move(status)));
}

void Reset(const CallRef& call) { Post(CommandKind::kReset, call); }

void Acknowledge(const CallRef& call, size_t bytes) { Post(CommandKind::kAck, call, bytes); }

void CompressAnswers(const CallRef& call) { Post(CommandKind::kCompress, call); }

Door::Door(Options options, EventSink* sink) : options_(std::move(options)), sink_(sink) {
  if (options_.num_threads < 1) throw std::invalid_argument("a door needs at least one thread");
  for (int i = 0; i < options_.num_threads; ++i) {
    loops_.push_back(std::make_unique<Loop>(&options_, totals_, &list_, sink_));
  }
}

Door::~Door() { Stop(0); }

void Door::Listen(const std::string& host, int* port, bool use_tls) {
  if (is_started_) throw std::logic_error("the door is open already");
  does_use_tls_ = use_tls;
  for (Listener& listener : ListenOn(host, port)) listeners_.push_back(std::move(listener));
}

void Door::UseTls(const TlsSettings& settings) {
  std::shared_ptr<SSL_CTX> context = MakeTlsContext(settings);
  const std::lock_guard lock(tls_mutex_);
  tls_.swap(context);
}

void Door::Start() {
  if (std::exchange(is_started_, true)) throw std::logic_error("the door is open already");
  loops_.front()->Accept(listeners_, [this](Accepted accepted) { Place(std::move(accepted)); });
  for (const std::unique_ptr<Loop>& loop : loops_) loop->Start();
}

// Called by the loop that accepts. The loop with the fewest connections gets it.
void Door::Place(Accepted accepted) {
  if (does_use_tls_) {
    const std::lock_guard lock(tls_mutex_);
    accepted.tls = tls_;
  }
  const auto least = std::min_element(loops_.begin(), loops_.end(), [](const auto& a, const auto& b) {
    return a->num_connections() < b->num_connections();
  });
  (*least)->Adopt(std::move(accepted));
}

void Door::WriteAll(std::span<const Outgoing> messages) {
  for (const std::unique_ptr<Loop>& loop : loops_) loop->mailbox()->PostMessages(messages);
}

void Door::Hold() {
  for (const std::unique_ptr<Loop>& loop : loops_) loop->mailbox()->Hold();
}

void Door::LetGo() {
  for (const std::unique_ptr<Loop>& loop : loops_) loop->mailbox()->LetGo();
}

void Door::Drain() {
  for (const std::unique_ptr<Loop>& loop : loops_) loop->Drain();
}

void Door::Stop(double grace_s) {
  if (std::exchange(is_stopped_, true)) return;
  if (is_started_) {
    // The loop that accepts hands connections to the others, so it has to have stopped doing so first.
    for (const std::unique_ptr<Loop>& loop : loops_) loop->Stop(grace_s);
    for (const std::unique_ptr<Loop>& loop : loops_) loop->Join();
  }
  for (const Listener& listener : listeners_) {
    close(listener.fd);
    if (!listener.unlink_path.empty()) unlink(listener.unlink_path.c_str());
  }
  listeners_.clear();
}

}  // namespace twinjet::door
