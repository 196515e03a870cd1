// How a session's calls end: by their handlers, by the door, by the client, by time.
#include <atomic>
#include <memory>
#include <string>
#include <utility>

#include "door/fields.h"
#include "door/session.h"

namespace twinjet::door {
namespace {

Status Told(int code, const OwnStatus& own) {
  Status status{code, own.message, {}};
  if (!own.details.empty()) status.trailers.push_back({"grpc-status-details-bin", own.details});
  return status;
}

}  // namespace

void Session::Finish(Stream* stream, Status status) {
  if (stream->is_finished) return;
  stream->is_finished = true;
  stream->is_discarding = true;
  stream->place.reset();
  // A handler that knows nothing of the call need not learn of it.
  if (stream->untold) {
    stream->untold.reset();
    stream->is_handler_told = true;
  }
  stream->moved_at_ns = loop_->now_ns;
  std::atomic<int64_t>& count =
      status.code == kOk ? loop_->totals->calls_succeeded : loop_->totals->calls_failed;
  ++count;
  ++(status.code == kOk ? stats_->calls_succeeded : stats_->calls_failed);
  if (MetadataBytes(status.trailers) > kMaxMetadataBytes) status.trailers.clear();
  if (stream->withheld_bytes > 0) {
    nghttp2_session_consume_stream(http2_, stream->id, std::exchange(stream->withheld_bytes, 0));
  }
  if (stream->are_headers_sent) {
    stream->status = std::move(status);
    Resume(stream);
  } else {
    FieldList fields;
    fields.AddOpening("200", false);
    fields.AddStatus(status);
    nghttp2_submit_response(http2_, stream->id, fields.data(), fields.size(), nullptr);
    stream->are_headers_sent = true;
  }
  SettleTimer(stream);
}

void Session::SubmitTrailers(Stream* stream) {
  FieldList fields;
  fields.AddStatus(stream->status);
  nghttp2_submit_trailer(http2_, stream->id, fields.data(), fields.size());
}

void Session::Refuse(Stream* stream, Refusal refusal) {
  TellHandler(stream, refusal.message);
  stream->is_discarding = true;
  Status status{refusal.code, std::move(refusal.message), {}};
  if (stream->call || std::string_view(refusal.http_status) == "200") {
    Finish(stream, std::move(status));
    return;
  }
  ++loop_->totals->calls_failed;
  ++stats_->calls_failed;
  stream->is_finished = true;
  FieldList fields;
  fields.AddOpening(refusal.http_status, false);
  fields.AddStatus(status);
  nghttp2_submit_response(http2_, stream->id, fields.data(), fields.size(), nullptr);
}

void Session::RefuseForLoad(Stream* stream, const OwnStatus& status) {
  TellHandler(stream, status.message);
  stream->is_discarding = true;
  Finish(stream, Told(kResourceExhausted, status));
}

void Session::EndCallsThatAskNothing() {
  const Options& limits = *loop_->options;
  if (loop_->totals->calls < static_cast<int64_t>(limits.max_calls / 2)) return;
  const int64_t longest_ns = Nanoseconds(limits.message_stall_s);
  for (const auto& [id, stream] : streams_) {
    if (!stream->call || stream->is_finished || stream->is_request_ended || stream->has_message) continue;
    if (loop_->now_ns - stream->read_at_ns >= longest_ns) RefuseForLoad(stream.get(), limits.overload);
  }
}

// What is unsent still goes first: a message may be half sent, and RST_STREAM would hide the status.
void Session::Break(Stream* stream, Status status) {
  TellHandler(stream, status.message);
  Finish(stream, std::move(status));
}

void Session::Reset(Stream* stream, uint32_t error_code) {
  DropOutgoing(stream);
  nghttp2_submit_rst_stream(http2_, NGHTTP2_FLAG_NONE, stream->id, error_code);
}

void Session::TellHandler(Stream* stream, std::string why) {
  if (stream->is_handler_told || !stream->call || stream->untold) return;
  stream->is_handler_told = true;
  stream->call->is_over_ = true;
  loop_->events.push_back({EventKind::kCancelled, stream->call, std::move(why), nullptr});
}

int Session::OnStreamClose(int32_t stream_id, uint32_t error_code) {
  const auto found = streams_.find(stream_id);
  if (found == streams_.end()) return 0;
  const std::unique_ptr<Stream> stream = std::move(found->second);
  streams_.erase(found);
  if (stream->call) {
    if (!stream->is_finished) {
      ++loop_->totals->calls_failed;
      ++stats_->calls_failed;
    }
    TellHandler(stream.get(), error_code == NGHTTP2_CONNECT_ERROR ? "the connection was lost"
                                                                  : "the client cancelled the call");
    DropOutgoing(stream.get());
    stream->call->is_over_ = true;
    stream->call->stream_ = nullptr;
  }
  SetBuffered(stream.get(), 0);
  if (stream->timer_at_ns >= 0) loop_->timers.erase({stream->timer_at_ns, stream.get()});
  if (streams_.empty()) idle_since_ns_ = loop_->now_ns;
  return 0;
}

void Session::SetTimer(Stream* stream, int64_t at_ns) {
  if (stream->timer_at_ns >= 0) {
    if (stream->timer_at_ns <= at_ns) return;
    loop_->timers.erase({stream->timer_at_ns, stream});
  }
  stream->timer_at_ns = at_ns;
  loop_->timers.insert({at_ns, stream});
}

// A timer is never put off: when it is due, OnTimer looks again.
void Session::SettleTimer(Stream* stream) {
  const Options& limits = *loop_->options;
  if (stream->is_finished) {
    SetTimer(stream, stream->moved_at_ns + Nanoseconds(limits.linger_s));
    return;
  }
  if (stream->deadline_ns >= 0) SetTimer(stream, stream->deadline_ns);
  if (stream->reader.is_in_message()) {
    SetTimer(stream, stream->read_at_ns + Nanoseconds(limits.message_stall_s));
  }
}

void Session::OnTimer(Stream* stream) {
  const Options& limits = *loop_->options;
  const int64_t now_ns = loop_->now_ns;
  stream->timer_at_ns = -1;
  if (stream->is_finished) {
    if (now_ns >= stream->moved_at_ns + Nanoseconds(limits.linger_s)) {
      Reset(stream, NGHTTP2_CANCEL);
      return;
    }
  } else if (stream->deadline_ns >= 0 && now_ns >= stream->deadline_ns) {
    Break(stream, Told(kDeadlineExceeded, limits.deadline));
  } else if (stream->reader.is_in_message() &&
             now_ns >= stream->read_at_ns + Nanoseconds(limits.message_stall_s)) {
    Break(stream, {kResourceExhausted, "the client stopped in the middle of a message", {}});
  }
  SettleTimer(stream);
}

}  // namespace twinjet::door
