// One thread with an epoll set: its connections' sockets, its mailbox, and on one loop the listening sockets.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "door/call.h"
#include "door/listener.h"
#include "door/mailbox.h"
#include "door/options.h"
#include "door/sender.h"
#include "door/session.h"
#include "door/tls.h"

namespace twinjet::door {

// The clients that have connections or calls. Any thread.
class Clients {
 public:
  // key: as ClientKey gives it.
  std::shared_ptr<Client> Get(const std::string& key);

 private:
  struct Table {
    std::mutex mutex;
    std::unordered_map<std::string, std::weak_ptr<Client>> by_key;
  };
  const std::shared_ptr<Table> table_ = std::make_shared<Table>();
};

// A connection's among its client's, until it is dropped.
using Seat = std::shared_ptr<void>;

// A connection that was accepted and waits for its loop.
struct Accepted {
  int fd;
  std::string peer;
  std::shared_ptr<SSL_CTX> tls;
  std::shared_ptr<Client> client;
  Seat seat;
};

// The connections of a door that are open, for whoever wants to list them. Any thread.
class ConnectionList {
 public:
  uint64_t Add(std::shared_ptr<ConnectionStats> stats);
  void Remove(uint64_t id);
  std::vector<std::pair<uint64_t, std::shared_ptr<ConnectionStats>>> Get() const;

 private:
  mutable std::mutex mutex_;
  uint64_t next_id_ = 1;
  std::unordered_map<uint64_t, std::shared_ptr<ConnectionStats>> by_id_;
};

class Loop {
 public:
  Loop(const Options* options, std::shared_ptr<Totals> totals, ConnectionList* list, EventSink* sink);
  ~Loop();
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  // Before Start: accepts from these sockets, which stay the caller's, and gives each connection to place.
  void Accept(const std::vector<Listener>& listeners, std::function<void(Accepted)> place);
  void Start();

  // Any thread, after Start.
  void Adopt(Accepted accepted);
  void StopAccepting();
  void Drain();
  // Drains, and ends the thread when the last connection is gone or after grace_s.
  void Stop(double grace_s);
  void Join();

  const std::shared_ptr<Mailbox>& mailbox() const { return state_.mailbox; }
  int64_t num_connections() const { return num_connections_; }
  bool has_ring() const { return sender_.has_ring(); }

 private:
  struct Connection;

  void Run();
  void Turn(int timeout_ms);
  int TimeoutMs() const;
  void OnWake();
  void TakeAccepted();
  void Open(Accepted accepted);
  void AcceptFrom(int listener_fd);
  void OnReadable(Connection* connection);
  void FlushTouched(int64_t limit_ns);
  void Gather(Connection* connection);
  void SendGathered();
  void Flush(Connection* connection);
  bool Fill(Connection* connection, std::string* out);
  void Settle(Connection* connection);
  void BeginClose(Connection* connection);
  void Kill(Connection* connection);
  void Touch(Connection* connection, bool is_urgent = false);
  void Watch(Connection* connection, bool wants_out);
  void ApplyMail();
  void RunTimers();
  void Tick();
  void Deliver();

  const Options* const options_;
  ConnectionList* const list_;
  EventSink* const sink_;
  LoopState state_;
  const int64_t tick_ns_;
  int epoll_fd_;
  int spare_fd_;  // given up for a moment when descriptors run out, so that a client can be turned away
  std::vector<int> listener_fds_;
  std::function<void(Accepted)> place_;
  Clients clients_;  // of the loop that accepts
  std::unordered_map<Connection*, std::unique_ptr<Connection>> connections_;
  // To be flushed, urgent_ first. One may be in both, and one that is not is_touched any more is passed over.
  std::deque<Connection*> urgent_;
  std::deque<Connection*> touched_;
  std::vector<std::unique_ptr<Connection>> dead_;  // until neither the turn nor a list refers to them
  Mail mail_;
  std::string buffer_;
  Sender sender_;
  // One batch of connections on their way out: what each sends, one behind the other in bytes, and whether
  // that is not all.
  struct Gathered {
    Connection* connection;
    size_t begin;
    bool has_more;
  };
  std::vector<Gathered> gathered_;
  std::string gathered_bytes_;
  std::vector<Sending> sendings_;
  std::string unsealed_;  // of one connection
  int64_t ticked_at_ns_ = 0;
  bool is_stopping_ = false;
  int64_t stop_at_ns_ = 0;

  std::atomic<int64_t> num_connections_{0};
  std::mutex mutex_;
  // Guarded by mutex_.
  std::vector<Accepted> accepted_;
  bool is_accepting_asked_to_stop_ = false;
  bool is_drain_asked_ = false;
  bool is_stop_asked_ = false;
  double stop_grace_s_ = 0;
  std::thread thread_;
};

}  // namespace twinjet::door
