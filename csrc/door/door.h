// A gRPC server on nghttp2: connections, calls and their bytes, and nothing of what the messages mean.
//
//   Door door(options, &sink);
//   int port = 0;
//   door.Listen("127.0.0.1", &port);
//   door.Start();
//   ... sink.Deliver({kCall, call, info}), ({kMessage, call, bytes}), ({kHalfClosed, call}) ...
//   Write(call, answer);             // from any thread
//   Finish(call, {kOk, "", {}});
//   door.Stop(5);
//
// What is written is copied, and sent by the thread of the call's connection: many calls' messages in one
// WriteAll leave in one send a connection. Nothing here blocks but Stop.
#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "door/call.h"
#include "door/loop.h"
#include "door/mailbox.h"
#include "door/options.h"
#include "door/tls.h"

namespace twinjet::door {

// What a handler does with its call, from any thread. In the order in which they are given; without effect
// once the call is over or finished.
void SendHeaders(const CallRef& call, Metadata headers);  // the first message and Finish send them otherwise
void Write(const CallRef& call, std::string_view message);
void Finish(const CallRef& call, Status status);
void Reset(const CallRef& call);                      // ends the call with RST_STREAM CANCEL
void Acknowledge(const CallRef& call, size_t bytes);  // a request message is no longer held
void CompressAnswers(const CallRef& call);            // with gzip; before SendHeaders and Write

class Door {
 public:
  // sink must outlive the door, and is called until Stop returns.
  Door(Options options, EventSink* sink);
  ~Door();  // Stop(0)
  Door(const Door&) = delete;
  Door& operator=(const Door&) = delete;

  // Listens as ListenOn says; before Start. use_tls: UseTls must have been called.
  void Listen(const std::string& host, int* port, bool use_tls);
  // Makes connections that come from now on use these, on sockets that listen with TLS. Throws
  // std::invalid_argument, and keeps what was in use, if they do not work.
  void UseTls(const TlsSettings& settings);
  void Start();

  // Messages of many calls, each handed to its connection's thread at once.
  void WriteAll(std::span<const Outgoing> messages);

  // From Hold to LetGo what this thread posts waits, to be taken all at once; see Mailbox.
  void Hold();
  void LetGo();

  // Tells the clients of all connections to make new calls elsewhere; goes on accepting connections.
  void Drain();
  // Accepts no more, drains, waits up to grace_s for what is begun, drops the rest and ends the threads.
  void Stop(double grace_s);

  // Whether what connections send at once leaves in one system call (Sender).
  bool has_ring() const { return loops_.front()->has_ring(); }
  const Totals& totals() const { return *totals_; }
  const Options& options() const { return options_; }
  std::vector<std::pair<uint64_t, std::shared_ptr<ConnectionStats>>> connections() const {
    return list_.Get();
  }

 private:
  void Place(Accepted accepted);

  const Options options_;
  EventSink* const sink_;
  const std::shared_ptr<Totals> totals_ = std::make_shared<Totals>();
  ConnectionList list_;
  std::vector<Listener> listeners_;
  bool does_use_tls_ = false;
  bool is_started_ = false;
  bool is_stopped_ = false;
  std::mutex tls_mutex_;
  std::shared_ptr<SSL_CTX> tls_;  // guarded by tls_mutex_
  std::vector<std::unique_ptr<Loop>> loops_;
};

}  // namespace twinjet::door
