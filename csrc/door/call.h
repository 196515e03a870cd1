// What the door and its users know of a call: how it began, what happens to it, and a handle to answer by.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace twinjet::door {

class Mailbox;
struct Stream;

// Keys are lower case; the value of a key that ends in "-bin" is any bytes, not base64.
struct MetadataEntry {
  std::string key;
  std::string value;
};
using Metadata = std::vector<MetadataEntry>;

// Whether gRPC allows the entry in an answer. Reserved keys ("grpc-...", "content-type", ":status", "te")
// are refused, but for grpc-status-details-bin.
bool IsSendable(const MetadataEntry& entry);

// The canonical codes that the door itself answers with.
enum StatusCode : int {
  kOk = 0,
  kCancelled = 1,
  kUnknown = 2,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kResourceExhausted = 8,
  kUnimplemented = 12,
  kInternal = 13,
};

struct Status {
  int code = kOk;
  std::string message;  // UTF-8
  Metadata trailers;
};

// Counters of the whole door; any thread may read them.
struct Totals {
  std::atomic<int64_t> connections{0};  // open now
  std::atomic<int64_t> connections_accepted{0};
  std::atomic<int64_t> connections_refused{0};
  std::atomic<int64_t> calls{0};  // not let go of by their handlers
  std::atomic<int64_t> calls_started{0};
  std::atomic<int64_t> calls_succeeded{0};
  std::atomic<int64_t> calls_failed{0};
  std::atomic<int64_t> messages_sent{0};
  std::atomic<int64_t> messages_received{0};
  std::atomic<int64_t> received_bytes{0};  // of requests, held for handlers
  std::atomic<int64_t> open{0};            // calls of Options::bounded_paths without a status
};

// What one client has here, over all its connections. Any thread.
struct Client {
  std::atomic<size_t> num_connections{0};  // open
  std::atomic<int64_t> received_bytes{0};  // as in Totals
};

// A place among the calls of Options::bounded_paths, from Take until it is dropped.
class Place {
 public:
  // Null if max_open places are taken.
  static std::unique_ptr<Place> Take(std::shared_ptr<Totals> totals, size_t max_open);
  ~Place();
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

 private:
  explicit Place(std::shared_ptr<Totals> totals);
  const std::shared_ptr<Totals> totals_;
};

// How a call began.
struct CallInfo {
  std::string path;         // "/package.Service/Method"
  std::string peer;         // "ipv4:127.0.0.1:1234", "ipv6:%5B::1%5D:1234" or "unix:"
  Metadata metadata;        // without what belongs to HTTP/2 and to gRPC itself
  int64_t timeout_ns = -1;  // what was left when the call arrived; -1: no deadline
  bool accepts_gzip = false;
};

// A handle to a call. Its users hold it through a shared_ptr; the call counts against the door's and its
// connection's limits until the last of them lets go.
class Call {
 public:
  Call(uint64_t id, std::shared_ptr<Mailbox> mailbox, std::shared_ptr<Totals> totals,
       std::shared_ptr<Client> client, std::shared_ptr<std::atomic<int64_t>> held_by_connection);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // Unique in the process.
  uint64_t id() const { return id_; }
  // Tells the call's connection from others for as long as the call is held.
  const void* connection() const { return held_by_connection_.get(); }
  // Of the loop that the call's connection belongs to. After the door's end what is posted there is dropped.
  Mailbox* mailbox() const { return mailbox_.get(); }
  // Bytes that were written and have not become HTTP/2 frames, for want of flow-control window or because
  // the connection is full.
  int64_t unsent_bytes() const { return unsent_bytes_.load(); }
  // Whether the door has dropped the call: ended, reset by the client or lost with its connection.
  bool is_over() const { return is_over_.load(); }
  // To be called, by any thread, before a message of so many bytes is posted.
  void CountUnsent(size_t message_bytes);
  // Asks for one kRoom event when no more than Options::write_ahead_bytes are unsent. False if that is so
  // already, and then no event comes.
  bool AwaitRoom(size_t write_ahead_bytes);

 private:
  friend class Loop;
  friend class Session;

  const uint64_t id_;
  const std::shared_ptr<Mailbox> mailbox_;
  const std::shared_ptr<Totals> totals_;
  const std::shared_ptr<Client> client_;
  const std::shared_ptr<std::atomic<int64_t>> held_by_connection_;
  std::atomic<int64_t> unsent_bytes_{0};
  std::atomic<int64_t> received_bytes_{0};
  std::atomic<bool> wants_room_{false};
  std::atomic<bool> is_over_{false};
  Stream* stream_ = nullptr;  // the loop's thread only; null once the stream is gone
};

using CallRef = std::shared_ptr<Call>;

enum class EventKind : uint8_t {
  kCall,        // info is set
  kMessage,     // bytes: one request message; post kAck with their number when they are needed no more
  kHalfClosed,  // the client sends no more messages
  kCancelled,   // the call is over, not by its handler's doing; bytes: why. Comes at most once, and last
  kRoom,        // asked for by AwaitRoom
  kRefused,     // a call of one of Options::bounded_paths, with the path in bytes and no call; comes alone
};

struct Event {
  EventKind kind;
  CallRef call;
  std::string bytes;
  std::unique_ptr<CallInfo> info;
};

// Takes what happens. Deliver is called by the door's threads, each call's events in order and by one
// thread; it must be quick and must not throw. It may move from the events.
class EventSink {
 public:
  virtual ~EventSink() = default;
  virtual void Deliver(std::vector<Event>& events) = 0;
};

}  // namespace twinjet::door
