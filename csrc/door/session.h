// One HTTP/2 connection as gRPC's server side sees it. Bytes in, bytes out: no socket, no thread, no clock.
//
// Whoever runs it feeds what the peer sent, applies the commands of its calls, lets it Tick, and after each
// of these pulls what is to be sent. All on one thread.
#pragma once

#include <nghttp2/nghttp2.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "door/call.h"
#include "door/mailbox.h"
#include "door/message_reader.h"
#include "door/options.h"

namespace twinjet::door {

class Session;

// A call as its connection has it, from its first header to the end of its HTTP/2 stream.
struct Stream {
  Stream(Session* owner, int32_t stream_id) : session(owner), id(stream_id) {}

  Session* const session;
  const int32_t id;
  CallRef call;  // null until the request's headers are found good
  std::unique_ptr<CallInfo> info = std::make_unique<CallInfo>();  // until the handler is told
  std::unique_ptr<Place> place;  // until the status is set, if the path is bounded

  // What the headers say beyond info.
  std::string method;
  std::string content_type;
  std::string bad_metadata;  // what is wrong with it
  Encoding encoding = Encoding::kIdentity;
  bool has_bad_timeout = false;
  size_t metadata_bytes = 0;

  MessageReader reader;
  size_t buffered_bytes = 0;  // of reader, as counted in Totals
  size_t withheld_bytes = 0;  // of flow-control window that the client gets back once messages are taken
  int num_unacknowledged = 0;
  int64_t read_at_ns = 0;

  std::string out;  // framed messages, of which the first out_pos bytes are sent
  size_t out_pos = 0;
  int64_t moved_at_ns = 0;  // when bytes last left out, or the call was finished
  Status status;
  bool is_compressing = false;
  bool are_headers_sent = false;
  bool is_finished = false;    // status is set
  bool is_discarding = false;  // what the client still sends is of no use
  bool is_request_ended = false;
  bool is_handler_told = false;  // of the end
  int64_t deadline_ns = -1;
  int64_t timer_at_ns = -1;
};

// When something must be done about a stream: its deadline, or the end of patience with it.
struct Timer {
  int64_t at_ns;
  Stream* stream;
  friend auto operator<=>(const Timer&, const Timer&) = default;
};

// What the sessions of one loop share. Not for other threads.
struct LoopState {
  const Options* options;
  std::shared_ptr<Totals> totals;
  std::shared_ptr<Mailbox> mailbox;
  int64_t now_ns = 0;         // steady clock, as of this turn of the loop
  std::vector<Event> events;  // to be delivered at the end of the turn
  std::set<Timer> timers;
};

// Counters of a connection; any thread may read them.
struct ConnectionStats {
  explicit ConnectionStats(std::string peer_name) : peer(std::move(peer_name)) {}
  const std::string peer;
  std::atomic<int64_t> calls_started{0};
  std::atomic<int64_t> calls_succeeded{0};
  std::atomic<int64_t> calls_failed{0};
  std::atomic<int64_t> messages_sent{0};
  std::atomic<int64_t> messages_received{0};
  std::atomic<int64_t> keepalives_sent{0};
};

// Spends up to burst at once and regains rate a second.
class TokenBucket {
 public:
  TokenBucket(uint64_t burst, uint64_t rate) : burst_(burst), rate_(rate), tokens_(burst) {}
  bool Spend(int64_t now_ns);
  void Refund(uint64_t tokens) { tokens_ = std::min(burst_, tokens_ + tokens); }

 private:
  const uint64_t burst_;
  const uint64_t rate_;
  uint64_t tokens_;
  int64_t filled_at_ns_ = 0;
};

class Session {
 public:
  Session(LoopState* loop, std::shared_ptr<ConnectionStats> stats);
  // Tells the handlers of calls that are still open.
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Takes bytes from the peer. False: the connection is beyond help; send what Pull still gives and close it.
  bool Feed(std::string_view bytes);
  // Appends bytes to send to *out, until that holds about max_bytes.
  void Pull(std::string* out, size_t max_bytes);
  // Does what command says; its call must be one of this session. mail: what a message's offset refers to.
  void Apply(Command& command, const Mail& mail);
  // Does what is due. To be called every now and then, a few times within the shortest of the time limits.
  // False: close the connection, after sending what there is to send.
  bool Tick();
  // A timer of one of this session's streams is due, and no longer in LoopState::timers.
  void OnTimer(Stream* stream);

  // Accepts no more calls: tells the peer so, finishes those it had begun, then is_done().
  void Drain();
  bool is_done() const;
  bool is_idle() const { return streams_.empty(); }  // no call

  void* owner = nullptr;  // of whoever runs the session, for its own use

 private:
  struct Callbacks;
  using NvList = std::vector<nghttp2_nv>;

  int OnBeginFrame(uint8_t type);
  int OnBeginHeaders(const nghttp2_frame* frame);
  int OnHeader(const nghttp2_frame* frame, std::string_view name, std::string_view value);
  int OnFrame(const nghttp2_frame* frame);
  int OnData(int32_t stream_id, std::string_view data);
  int OnFrameSent(const nghttp2_frame* frame);
  int OnStreamClose(int32_t stream_id, uint32_t error_code);
  ssize_t ReadOutgoing(Stream* stream, size_t max_bytes, uint32_t* flags);
  int SendData(nghttp2_frame* frame, const uint8_t* header, size_t num_bytes, Stream* stream);

  void OnRequest(Stream* stream, bool is_ended);
  void OnHalfClosed(Stream* stream);
  bool OnClientPing();
  void ReadMessages(Stream* stream, std::string_view data);
  void SetBuffered(Stream* stream, size_t num_bytes);

  // Answers instead of a handler, which is told if it has the call.
  void Refuse(Stream* stream, int code, std::string message, const char* http_status = "200");
  void RefuseForLoad(Stream* stream, std::string message);
  void RefuseForLoad(Stream* stream, std::string message, const std::string& details);
  bool FindPlace(Stream* stream);
  // Ends a call in the middle, and tells its handler.
  void Break(Stream* stream, int code, const std::string& why);
  void TellHandler(Stream* stream, std::string why);

  void SendHeaders(Stream* stream, const Metadata& headers);
  void AddMessage(Stream* stream, std::string_view bytes);
  void Finish(Stream* stream, Status status);
  void SubmitTrailers(Stream* stream);
  void Resume(Stream* stream);
  void Acknowledge(Stream* stream, size_t num_bytes);
  void DropOutgoing(Stream* stream);
  void TakeFromUnsent(Stream* stream, size_t num_bytes);
  void SetTimer(Stream* stream, int64_t at_ns);
  void SettleTimer(Stream* stream);
  void SendLastGoaway();
  void ComplainAndClose(uint32_t error_code, std::string_view text);
  Stream* Find(int32_t stream_id);
  bool SpendIdleFrame();

  LoopState* const loop_;
  const std::shared_ptr<ConnectionStats> stats_;
  const std::shared_ptr<std::atomic<int64_t>> held_calls_;  // by handlers, streams gone or not
  nghttp2_session* http2_ = nullptr;
  std::unordered_map<int32_t, std::unique_ptr<Stream>> streams_;
  std::string* out_ = nullptr;  // where SendData appends; set during Pull

  std::string opening_;  // the first bytes, until they are known to be HTTP/2's
  bool is_http2_ = false;
  bool is_http1_answered_ = false;
  bool is_settled_ = false;  // the client's SETTINGS came
  bool is_closing_ = false;  // nothing more is read
  bool is_draining_ = false;
  bool is_last_goaway_sent_ = false;
  int64_t closing_since_ns_ = 0;  // as Tick saw it
  int64_t started_at_ns_;
  int64_t heard_at_ns_;
  int64_t pinged_at_ns_ = 0;  // 0: no ping of ours is unanswered
  int64_t idle_since_ns_;
  int64_t drain_at_ns_ = 0;      // when the second GOAWAY goes out at the latest
  int64_t header_since_ns_ = 0;  // when a header block began that has not ended
  int64_t client_ping_at_ns_;    // when the client last pinged without having been sent anything since
  bool has_client_pinged_ = false;
  int num_ping_strikes_ = 0;
  TokenBucket idle_frames_;
};

}  // namespace twinjet::door
