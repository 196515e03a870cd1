// One HTTP/2 connection as gRPC's server side sees it. Bytes in, bytes out: no socket, no thread, no clock.
//
// Whoever runs it feeds what the peer sent, applies the commands of its calls, lets it Tick, and after each
// of these pulls what is to be sent. All on one thread.
#pragma once

#include <nghttp2/nghttp2.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "door/call.h"
#include "door/mailbox.h"
#include "door/peer_conduct.h"
#include "door/request_head.h"
#include "door/stream.h"

namespace twinjet::door {

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

class Session {
 public:
  Session(LoopState* loop, std::shared_ptr<ConnectionStats> stats, std::shared_ptr<Client> client);
  // Tells the handlers of calls that are still open.
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Takes bytes from the peer. False: the connection is beyond help; send what Pull still gives and close it.
  bool Feed(std::string_view bytes);
  // Appends bytes to send to *out, until that holds about max_bytes. Whether there may be more.
  bool Pull(std::string* out, size_t max_bytes);
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
  // nghttp2's callbacks: session_callbacks.cc.
  struct Callbacks;
  static nghttp2_session_callbacks* CallbackTable();
  static nghttp2_data_provider MessagesOf(Stream* stream);

  // What the client sends: session_requests.cc.
  int OnBeginFrame(uint8_t type);
  int OnBeginHeaders(const nghttp2_frame* frame);
  int OnHeader(const nghttp2_frame* frame, std::string_view name, std::string_view value);
  int OnInvalidHeader(int32_t stream_id, std::string_view name);
  int OnFrame(const nghttp2_frame* frame);
  int OnData(int32_t stream_id, std::string_view data);
  void OnRequest(Stream* stream, bool is_ended);
  void OnHalfClosed(Stream* stream);
  void ReadMessages(Stream* stream, std::string_view data);
  void Hold(Stream* stream, size_t num_bytes);
  void CountReceived(int64_t num_bytes);
  bool HasTooManyBytes(int64_t num_held) const;
  bool HasTooManyBytes(const Stream& stream) const;
  void SetBuffered(Stream* stream, size_t num_bytes);
  void Acknowledge(Stream* stream, size_t num_bytes);
  bool SpendIdleFrame();

  // What handlers send: session_answers.cc.
  void SendHeaders(Stream* stream, const Metadata& headers);
  void AddMessage(Stream* stream, std::string_view bytes);
  void Resume(Stream* stream);
  ssize_t ReadOutgoing(Stream* stream, size_t max_bytes, uint32_t* flags);
  int SendData(const uint8_t* frame_header, size_t num_bytes, Stream* stream);
  int OnFrameSent(const nghttp2_frame* frame);
  void DropOutgoing(Stream* stream);
  void TakeFromUnsent(Stream* stream, size_t num_bytes);

  // How calls end: session_ends.cc.
  void Finish(Stream* stream, Status status);
  void SubmitTrailers(Stream* stream);
  // Answers instead of a handler, which is told if it has the call.
  void Refuse(Stream* stream, Refusal refusal);
  void RefuseForLoad(Stream* stream, const OwnStatus& status);
  // Where calls become scarce: those that have sent nothing for long.
  void EndCallsThatAskNothing();
  // Tells the handler of its call, if it has not been told. False: there is no place, and the call is
  // refused.
  bool TellOfCall(Stream* stream);
  // Ends a call in the middle, and tells its handler.
  void Break(Stream* stream, Status status);
  void Reset(Stream* stream, uint32_t error_code);
  void TellHandler(Stream* stream, std::string why);
  int OnStreamClose(int32_t stream_id, uint32_t error_code);
  void SetTimer(Stream* stream, int64_t at_ns);
  void SettleTimer(Stream* stream);

  // The connection: session.cc.
  void SendLastGoaway();
  void ComplainAndClose(uint32_t error_code, std::string_view text);
  Stream* Find(int32_t stream_id);

  LoopState* const loop_;
  const std::shared_ptr<ConnectionStats> stats_;
  const std::shared_ptr<Client> client_;
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
  int64_t drain_at_ns_ = 0;  // when the second GOAWAY goes out at the latest
  PeerConduct conduct_;
};

}  // namespace twinjet::door
