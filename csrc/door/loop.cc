#include "door/loop.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <utility>

#include "stream/quiet_thread.h"

namespace twinjet::door {
namespace {

constexpr size_t kReadBytes = 64 << 10;
constexpr int kReadsATurn = 4;  // of one connection, so that the others get theirs
constexpr size_t kSendBytes = 64 << 10;
constexpr size_t kGatheredConnections = 64;  // few enough for their bytes to stay in the cache
constexpr size_t kGatheredBytes = 256 << 10;
constexpr size_t kTlsAnswerBytes = 64 << 10;  // to a client that makes TLS answer and does not read
constexpr int kAcceptsATurn = 64;
constexpr int64_t kFlushNs = 500'000;        // of sending, or as long as the rest of the turn took
constexpr int64_t kCloseNs = 1'000'000'000;  // for a client to read our last words
constexpr int64_t kLongestTickNs = 1'000'000'000;
constexpr int64_t kShortestTickNs = 10'000'000;

int64_t Now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Time limits are kept to about an eighth of the shortest.
int64_t TickNs(const Options& options) {
  double shortest = options.handshake_s;
  for (double limit : {options.header_s, options.idle_s, options.keepalive_s, options.keepalive_timeout_s}) {
    if (limit > 0) shortest = std::min(shortest, limit);
  }
  return std::clamp(static_cast<int64_t>(shortest / 8 * 1e9), kShortestTickNs, kLongestTickNs);
}

}  // namespace

std::shared_ptr<Client> Clients::Get(const std::string& key) {
  const std::lock_guard lock(table_->mutex);
  std::weak_ptr<Client>& known = table_->by_key[key];
  if (std::shared_ptr<Client> client = known.lock()) return client;
  const auto forget = [table = table_, key](Client* client) {
    {
      const std::lock_guard table_lock(table->mutex);
      const auto found = table->by_key.find(key);
      // Since its last holder let go another may have taken its place.
      if (found != table->by_key.end() && found->second.expired()) table->by_key.erase(found);
    }
    delete client;
  };
  std::shared_ptr<Client> client(new Client, forget);
  known = client;
  return client;
}

uint64_t ConnectionList::Add(std::shared_ptr<ConnectionStats> stats) {
  const std::lock_guard lock(mutex_);
  by_id_.emplace(next_id_, std::move(stats));
  return next_id_++;
}

void ConnectionList::Remove(uint64_t id) {
  const std::lock_guard lock(mutex_);
  by_id_.erase(id);
}

std::vector<std::pair<uint64_t, std::shared_ptr<ConnectionStats>>> ConnectionList::Get() const {
  const std::lock_guard lock(mutex_);
  return {by_id_.begin(), by_id_.end()};
}

struct Loop::Connection {
  Connection(const Accepted& accepted, LoopState* state, std::shared_ptr<ConnectionStats> stats)
      : seat(accepted.seat),
        stream(accepted.fd, accepted.tls),
        session(std::make_unique<Session>(state, std::move(stats), accepted.client)) {
    session->owner = this;
  }

  const Seat seat;
  ByteStream stream;
  std::unique_ptr<Session> session;  // null when only the client's end is waited for
  uint64_t id = 0;
  size_t num_unsent() const { return out.size() - out_pos; }

  std::string out;  // what the socket did not take, and what TLS answers
  size_t out_pos = 0;
  size_t num_tls_answered = 0;  // bytes of TLS's since out was last empty
  bool is_touched = false;
  bool is_urgent = false;
  int num_listed = 0;  // times in touched_ and urgent_
  bool is_dead = false;
  bool wants_out = false;
  int64_t close_at_ns = 0;
};

Loop::Loop(const Options* options, std::shared_ptr<Totals> totals, ConnectionList* list, EventSink* sink)
    : options_(options),
      list_(list),
      sink_(sink),
      tick_ns_(TickNs(*options)),
      epoll_fd_(epoll_create1(EPOLL_CLOEXEC)),
      spare_fd_(open("/dev/null", O_RDONLY | O_CLOEXEC)),
      buffer_(kReadBytes, '\0') {
  state_.options = options;
  state_.totals = std::move(totals);
  state_.mailbox = std::make_shared<Mailbox>();
  state_.now_ns = Now();
  epoll_event event{};
  event.events = EPOLLIN | EPOLLET;
  event.data.ptr = this;  // stands for the mailbox
  if (epoll_fd_ < 0 || epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, state_.mailbox->fd(), &event) != 0) {
    throw std::system_error(errno, std::generic_category(), "epoll");
  }
}

Loop::~Loop() {
  if (thread_.joinable()) {
    Stop(0);
    Join();
  }
  for (const Accepted& accepted : accepted_) close(accepted.fd);
  close(epoll_fd_);
  if (spare_fd_ >= 0) close(spare_fd_);
}

void Loop::Accept(const std::vector<Listener>& listeners, std::function<void(Accepted)> place) {
  place_ = std::move(place);
  for (const Listener& listener : listeners) listener_fds_.push_back(listener.fd);
  for (int& fd : listener_fds_) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.ptr = &fd;
    if (epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event) != 0) {
      throw std::system_error(errno, std::generic_category(), "epoll");
    }
  }
}

void Loop::Start() {
  // Without SIGPIPE a write to a closed socket just fails.
  thread_ = stream::StartQuietThread([this] { Run(); });
}

void Loop::Adopt(Accepted accepted) {
  bool is_first = false;
  {
    const std::lock_guard lock(mutex_);
    is_first = accepted_.empty();
    accepted_.push_back(std::move(accepted));
    ++num_connections_;
  }
  if (is_first) state_.mailbox->Wake();
}

void Loop::StopAccepting() {
  {
    const std::lock_guard lock(mutex_);
    is_accepting_asked_to_stop_ = true;
  }
  state_.mailbox->Wake();
}

void Loop::Drain() {
  {
    const std::lock_guard lock(mutex_);
    is_drain_asked_ = true;
  }
  state_.mailbox->Wake();
}

void Loop::Stop(double grace_s) {
  {
    const std::lock_guard lock(mutex_);
    is_stop_asked_ = is_drain_asked_ = is_accepting_asked_to_stop_ = true;
    stop_grace_s_ = grace_s;
  }
  state_.mailbox->Wake();
}

void Loop::Join() {
  if (thread_.joinable()) thread_.join();
}

void Loop::Run() {
  state_.now_ns = Now();
  while (true) {
    Turn(TimeoutMs());
    if (!is_stopping_) continue;
    const bool has_work = std::any_of(connections_.begin(), connections_.end(), [](const auto& entry) {
      const Connection& connection = *entry.first;
      return connection.session || connection.num_unsent() > 0;
    });
    if (!has_work || state_.now_ns >= stop_at_ns_) break;
  }
  while (!connections_.empty()) Kill(connections_.begin()->first);
  dead_.clear();
  Deliver();
  state_.mailbox->Close();
}

int Loop::TimeoutMs() const {
  if (!urgent_.empty() || !touched_.empty()) return 0;
  int64_t until_ns = ticked_at_ns_ + tick_ns_;
  if (!state_.timers.empty()) until_ns = std::min(until_ns, state_.timers.begin()->at_ns);
  if (is_stopping_) until_ns = std::min(until_ns, stop_at_ns_);
  const int64_t left_ns = until_ns - state_.now_ns;
  // Rounded up: a timer that is not quite due would make the loop spin.
  return left_ns <= 0 ? 0 : static_cast<int>(std::min<int64_t>((left_ns + 999'999) / 1'000'000, 1000));
}

void Loop::Turn(int timeout_ms) {
  std::array<epoll_event, 128> ready;
  const int num_ready = epoll_wait(epoll_fd_, ready.data(), static_cast<int>(ready.size()), timeout_ms);
  state_.now_ns = Now();
  for (int i = 0; i < num_ready; ++i) {
    const epoll_event& event = ready[static_cast<size_t>(i)];
    void* what = event.data.ptr;
    if (what == this) {
      OnWake();
      continue;
    }
    const auto listener = std::find_if(listener_fds_.begin(), listener_fds_.end(),
                                       [what](const int& fd) { return &fd == what; });
    if (listener != listener_fds_.end()) {
      AcceptFrom(*listener);
      continue;
    }
    auto* connection = static_cast<Connection*>(what);
    if (connection->is_dead) continue;
    if (event.events & EPOLLOUT) Touch(connection);
    if (event.events & ~static_cast<uint32_t>(EPOLLOUT)) OnReadable(connection);
  }
  RunTimers();
  if (state_.now_ns - ticked_at_ns_ >= tick_ns_) Tick();
  // What was read need not wait for what is sent.
  Deliver();
  FlushTouched(std::max(kFlushNs, Now() - state_.now_ns));
  std::erase_if(dead_, [](const auto& connection) { return connection->num_listed == 0; });
  Deliver();
}

// A step's messages for thousands of streams take milliseconds to send. So after a while the rest waits for
// another turn, which reads first; and connections with a stream's first message go before the others, each
// of which gets its turn because a stream has only one first message.
//
// First the bytes of some connections are made, then all of them are sent: each of the two stays in the
// processor's caches for longer, and one system call can send them all. Nothing here touches a connection.
void Loop::FlushTouched(int64_t limit_ns) {
  const int64_t until_ns = Now() + limit_ns;
  for (std::deque<Connection*>* list : {&urgent_, &touched_}) {
    while (!list->empty()) {
      Connection* connection = list->front();
      list->pop_front();
      --connection->num_listed;
      if (!connection->is_touched || connection->is_dead) continue;
      connection->is_touched = connection->is_urgent = false;
      if (!connection->session || connection->num_unsent() > 0) {
        Flush(connection);
      } else {
        Gather(connection);
      }
      if (gathered_.size() >= kGatheredConnections || gathered_bytes_.size() >= kGatheredBytes)
        SendGathered();
      if (Now() >= until_ns) return SendGathered();
    }
    // First messages do not wait for the bytes of others to be made.
    SendGathered();
  }
}

void Loop::Deliver() {
  if (state_.events.empty()) return;
  sink_->Deliver(state_.events);
  state_.events.clear();
}

void Loop::OnWake() {
  ApplyMail();
  TakeAccepted();
  bool does_stop_accepting = false;
  bool does_drain = false;
  {
    const std::lock_guard lock(mutex_);
    does_stop_accepting = std::exchange(is_accepting_asked_to_stop_, false);
    does_drain = std::exchange(is_drain_asked_, false);
    if (is_stop_asked_) {
      is_stopping_ = true;
      stop_at_ns_ = state_.now_ns + static_cast<int64_t>(stop_grace_s_ * 1e9);
    }
  }
  if (does_stop_accepting) {
    for (int fd : listener_fds_) epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, fd, nullptr);
    listener_fds_.clear();
  }
  if (does_drain) {
    for (const auto& [connection, owner] : connections_) {
      if (!connection->session) continue;
      connection->session->Drain();
      Touch(connection);
    }
  }
}

void Loop::ApplyMail() {
  state_.mailbox->Take(&mail_);
  for (Command& command : mail_.commands) {
    Call& call = *command.call;
    if (Stream* stream = call.stream_) {
      auto* connection = static_cast<Connection*>(stream->session->owner);
      const bool is_first = command.kind == CommandKind::kMessage && stream->moved_at_ns == 0;
      stream->session->Apply(command, mail_);
      Touch(connection, is_first);
    } else if (command.kind == CommandKind::kMessage) {
      call.unsent_bytes_ -= static_cast<int64_t>(command.size + kPrefixBytes);
    }
  }
  mail_.Clear();
}

void Loop::TakeAccepted() {
  std::vector<Accepted> accepted;
  {
    const std::lock_guard lock(mutex_);
    accepted.swap(accepted_);
  }
  for (Accepted& one : accepted) Open(std::move(one));
}

void Loop::Open(Accepted accepted) {
  auto stats = std::make_shared<ConnectionStats>(accepted.peer);
  auto connection = std::make_unique<Connection>(accepted, &state_, stats);
  Connection* const key = connection.get();
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = key;
  if (epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, accepted.fd, &event) != 0) {
    --num_connections_;
    --state_.totals->connections;
    return;
  }
  connection->id = list_->Add(std::move(stats));
  connections_.emplace(key, std::move(connection));
}

void Loop::AcceptFrom(int listener_fd) {
  for (int i = 0; i < kAcceptsATurn; ++i) {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    const int fd =
        accept4(listener_fd, reinterpret_cast<sockaddr*>(&address), &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
      if ((errno == EMFILE || errno == ENFILE) && spare_fd_ >= 0) {
        close(spare_fd_);
        const int turned_away = accept(listener_fd, nullptr, nullptr);
        if (turned_away >= 0) close(turned_away);
        ++state_.totals->connections_refused;
        spare_fd_ = open("/dev/null", O_RDONLY | O_CLOEXEC);
        continue;
      }
      if (errno == EINTR || errno == ECONNABORTED) continue;
      return;
    }
    Accepted accepted{fd, PeerName(address), nullptr, nullptr, nullptr};
    const bool is_local = address.ss_family == AF_UNIX;
    accepted.client = is_local ? std::make_shared<Client>()
                               : clients_.Get(ClientKey(address, options_->client_ipv6_prefix));
    const size_t max_of_client = options_->max_address_connections;
    if (state_.totals->connections >= static_cast<int64_t>(options_->max_connections) ||
        (max_of_client > 0 && accepted.client->num_connections >= max_of_client)) {
      ++state_.totals->connections_refused;
      close(fd);
      continue;
    }
    ++accepted.client->num_connections;
    accepted.seat =
        Seat(accepted.client.get(), [client = accepted.client](void*) { --client->num_connections; });
    ++state_.totals->connections;
    ++state_.totals->connections_accepted;
    place_(std::move(accepted));
  }
}

void Loop::OnReadable(Connection* connection) {
  for (int i = 0; i < kReadsATurn || connection->stream.has_pending(); ++i) {
    size_t num_read = 0;
    const size_t num_held = connection->out.size();
    const IoResult result =
        connection->stream.Read(buffer_.data(), buffer_.size(), &num_read, &connection->out);
    if (connection->out.size() > num_held) {
      connection->num_tls_answered += connection->out.size() - num_held;
      Touch(connection);
    }
    if (result == IoResult::kClosed) {
      // TLS may have said why.
      if (connection->stream.has_tls() && connection->num_unsent() > 0) Flush(connection);
      return Kill(connection);
    }
    if (result == IoResult::kWouldBlock) break;
    if (connection->num_tls_answered > kTlsAnswerBytes) return Kill(connection);
    if (!connection->session) continue;
    Touch(connection);
    if (!connection->session->Feed(std::string_view(buffer_).substr(0, num_read))) break;
    if (num_read < buffer_.size() && !connection->stream.has_pending()) break;
  }
}

void Loop::Touch(Connection* connection, bool is_urgent) {
  const bool is_listed = is_urgent ? connection->is_urgent : connection->is_touched;
  connection->is_touched = true;
  connection->is_urgent |= is_urgent;
  if (is_listed) return;
  ++connection->num_listed;
  (is_urgent ? urgent_ : touched_).push_back(connection);
}

void Loop::Watch(Connection* connection, bool wants_out) {
  if (connection->wants_out == wants_out) return;
  connection->wants_out = wants_out;
  epoll_event event{};
  event.events = EPOLLIN | (wants_out ? EPOLLOUT : 0u);
  event.data.ptr = connection;
  epoll_ctl(epoll_fd_, EPOLL_CTL_MOD, connection->stream.fd(), &event);
}

void Loop::Gather(Connection* connection) {
  const size_t begin = gathered_bytes_.size();
  const bool has_more = Fill(connection, &gathered_bytes_);
  if (connection->is_dead) {
    gathered_bytes_.resize(begin);
  } else if (gathered_bytes_.size() == begin) {
    Settle(connection);
  } else {
    gathered_.push_back({connection, begin, has_more});
  }
}

void Loop::SendGathered() {
  for (size_t i = 0; i < gathered_.size(); ++i) {
    const size_t begin = gathered_[i].begin;
    const size_t end = i + 1 < gathered_.size() ? gathered_[i + 1].begin : gathered_bytes_.size();
    sendings_.push_back({gathered_[i].connection->stream.fd(), gathered_bytes_.data() + begin, end - begin});
  }
  sender_.Send(sendings_);
  for (size_t i = 0; i < gathered_.size(); ++i) {
    Connection* const connection = gathered_[i].connection;
    const Sending& sending = sendings_[i];
    if (sending.result < 0 && sending.result != -EAGAIN) {
      Kill(connection);
      continue;
    }
    const auto num_sent = static_cast<size_t>(std::max<ssize_t>(sending.result, 0));
    if (num_sent < sending.size) {
      connection->out.assign(sending.bytes + num_sent, sending.size - num_sent);
      connection->out_pos = 0;
      Watch(connection, true);
    } else if (gathered_[i].has_more) {
      Flush(connection);
    } else {
      Settle(connection);
    }
  }
  gathered_.clear();
  sendings_.clear();
  gathered_bytes_.clear();
  if (gathered_bytes_.capacity() > 4 * kGatheredBytes) gathered_bytes_.shrink_to_fit();
}

// Appends what the session has to send, as it goes over the wire; kills the connection if it cannot.
// Whether there may be more.
bool Loop::Fill(Connection* connection, std::string* out) {
  if (!connection->stream.has_tls()) return connection->session->Pull(out, out->size() + kSendBytes);
  unsealed_.clear();
  const bool has_more = connection->session->Pull(&unsealed_, kSendBytes);
  if (connection->stream.Seal(unsealed_, out)) return has_more;
  Kill(connection);
  return false;
}

// One connection by itself: what it holds already, and what it has to send beyond that.
void Loop::Flush(Connection* connection) {
  bool has_more = connection->session != nullptr;
  while (true) {
    if (connection->num_unsent() == 0) {
      connection->out.clear();
      connection->out_pos = 0;
      connection->num_tls_answered = 0;
      if (!has_more) break;
      has_more = Fill(connection, &connection->out);
      if (connection->is_dead) return;
      if (connection->out.empty()) break;
    }
    Sending sending{connection->stream.fd(), connection->out.data() + connection->out_pos,
                    connection->num_unsent()};
    sender_.Send({&sending, 1});
    if (sending.result == -EAGAIN) return Watch(connection, true);
    if (sending.result < 0) return Kill(connection);
    connection->out_pos += static_cast<size_t>(sending.result);
  }
  Settle(connection);
}

// All is sent.
void Loop::Settle(Connection* connection) {
  // An idle connection keeps no memory for what it once sent.
  if (connection->session && connection->session->is_idle()) connection->out = std::string();
  Watch(connection, false);
  if (!connection->session || connection->session->is_done()) BeginClose(connection);
}

// Closing at once could lose what was just sent: the kernel answers unread bytes with a reset.
void Loop::BeginClose(Connection* connection) {
  if (connection->close_at_ns > 0) return;
  connection->session.reset();
  connection->close_at_ns = state_.now_ns + kCloseNs;
  connection->stream.ShutWrite();
}

void Loop::Kill(Connection* connection) {
  const auto found = connections_.find(connection);
  if (found == connections_.end()) return;
  connection->is_dead = true;
  connection->session.reset();
  epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, connection->stream.fd(), nullptr);
  list_->Remove(connection->id);
  --num_connections_;
  --state_.totals->connections;
  dead_.push_back(std::move(found->second));
  connections_.erase(found);
}

void Loop::RunTimers() {
  while (!state_.timers.empty() && state_.timers.begin()->at_ns <= state_.now_ns) {
    Stream* stream = state_.timers.begin()->stream;
    state_.timers.erase(state_.timers.begin());
    Session* session = stream->session;
    session->OnTimer(stream);
    Touch(static_cast<Connection*>(session->owner));
  }
}

void Loop::Tick() {
  ticked_at_ns_ = state_.now_ns;
  std::vector<Connection*> hopeless;
  for (const auto& [connection, owner] : connections_) {
    if (!connection->session) {
      if (state_.now_ns >= connection->close_at_ns) hopeless.push_back(connection);
    } else {
      const bool is_fit = connection->session->Tick();
      if (!is_fit) hopeless.push_back(connection);
      Touch(connection);
    }
  }
  for (Connection* connection : hopeless) {
    Flush(connection);
    if (!connection->is_dead) Kill(connection);
  }
}

}  // namespace twinjet::door
