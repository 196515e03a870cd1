// What a client sends: the frames of its requests.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "door/fields.h"
#include "door/session.h"

namespace twinjet::door {
namespace {

constexpr size_t kHeaderBombFactor = 8;  // this many times the limit ends the connection
constexpr size_t kEventBytes = 96;       // what a message costs on its way to its handler, beside its bytes
constexpr int64_t kLateCalls = 64;       // handlers of reset calls that may still be at work

uint64_t NextCallId() {
  static std::atomic<uint64_t> next{1};
  return next++;
}

}  // namespace

int Session::OnBeginFrame(uint8_t type) {
  if (type == NGHTTP2_HEADERS) {
    conduct_.BeginHeaders(loop_->now_ns);
  } else if (type != NGHTTP2_CONTINUATION) {
    conduct_.EndHeaders();
  }
  // The others are looked at when they are whole; types that nghttp2 does not know it skips by itself.
  const bool is_ignored = type == NGHTTP2_PRIORITY || type > NGHTTP2_CONTINUATION;
  return is_ignored && !SpendIdleFrame() ? NGHTTP2_ERR_CALLBACK_FAILURE : 0;
}

int Session::OnBeginHeaders(const nghttp2_frame* frame) {
  if (frame->headers.cat == NGHTTP2_HCAT_REQUEST) {
    auto stream = std::make_unique<Stream>(this, frame->hd.stream_id, loop_->options->max_metadata_bytes);
    stream->read_at_ns = loop_->now_ns;
    streams_.emplace(frame->hd.stream_id, std::move(stream));
  }
  return 0;
}

int Session::OnHeader(const nghttp2_frame* frame, std::string_view name, std::string_view value) {
  Stream* stream = Find(frame->hd.stream_id);
  if (!stream) return 0;
  const size_t limit = loop_->options->max_metadata_bytes;
  stream->metadata_bytes += name.size() + value.size() + kHeaderOverhead;
  if (stream->metadata_bytes > limit) {
    if (stream->metadata_bytes <= limit * kHeaderBombFactor) return 0;
    ComplainAndClose(NGHTTP2_ENHANCE_YOUR_CALM, "too_much_metadata");
    return NGHTTP2_ERR_CALLBACK_FAILURE;
  }
  // A request's trailers, which come after its head, mean nothing in gRPC.
  if (stream->head) stream->head->Add(name, value);
  return 0;
}

int Session::OnInvalidHeader(int32_t stream_id, std::string_view name) {
  const Stream* stream = Find(stream_id);
  if (stream && stream->head && !name.starts_with(':') && stream->head->AddInvalid()) return 0;
  conduct_.EndHeaders();
  return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
}

int Session::OnFrame(const nghttp2_frame* frame) {
  const bool is_ended = (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) != 0;
  switch (frame->hd.type) {
    case NGHTTP2_HEADERS: {
      conduct_.EndHeaders();
      Stream* stream = Find(frame->hd.stream_id);
      if (!stream) break;
      if (frame->headers.cat == NGHTTP2_HCAT_REQUEST) {
        OnRequest(stream, is_ended);
      } else if (is_ended) {
        OnHalfClosed(stream);
      }
      break;
    }
    case NGHTTP2_DATA: {
      if (frame->hd.length == 0 && !is_ended && !SpendIdleFrame()) return NGHTTP2_ERR_CALLBACK_FAILURE;
      Stream* stream = Find(frame->hd.stream_id);
      if (stream && is_ended) OnHalfClosed(stream);
      break;
    }
    case NGHTTP2_SETTINGS:
      is_settled_ = true;
      if (!(frame->hd.flags & NGHTTP2_FLAG_ACK) && !SpendIdleFrame()) return NGHTTP2_ERR_CALLBACK_FAILURE;
      break;
    case NGHTTP2_PING:
      if (frame->hd.flags & NGHTTP2_FLAG_ACK) {
        if (is_draining_) SendLastGoaway();
      } else if (!conduct_.OnPing(loop_->now_ns)) {
        ComplainAndClose(NGHTTP2_ENHANCE_YOUR_CALM, "too_many_pings");
        return NGHTTP2_ERR_CALLBACK_FAILURE;
      }
      break;
    default:
      break;
  }
  return 0;
}

bool Session::SpendIdleFrame() {
  if (conduct_.OnIdleFrame(loop_->now_ns)) return true;
  ComplainAndClose(NGHTTP2_ENHANCE_YOUR_CALM, "too_many_empty_frames");
  return false;
}

void Session::OnRequest(Stream* stream, bool is_ended) {
  const Options& limits = *loop_->options;
  ++loop_->totals->calls_started;
  ++stats_->calls_started;
  stream->is_request_ended = is_ended;
  // Large answers of several calls take turns; by default the older one would go first.
  const nghttp2_extpri in_turn{NGHTTP2_EXTPRI_DEFAULT_URGENCY, 1};
  nghttp2_session_change_extpri_stream_priority(http2_, stream->id, &in_turn, 1);
  if (*held_calls_ >= static_cast<int64_t>(limits.max_streams) + kLateCalls) {
    ++loop_->totals->calls_failed;
    stream->is_finished = stream->is_discarding = true;
    nghttp2_submit_rst_stream(http2_, NGHTTP2_FLAG_NONE, stream->id, NGHTTP2_REFUSED_STREAM);
    return;
  }
  const std::unique_ptr<RequestHead> head = std::move(stream->head);
  if (std::optional<Refusal> refusal = head->Check(stream->metadata_bytes)) {
    return Refuse(stream, std::move(*refusal));
  }
  if (loop_->totals->calls >= static_cast<int64_t>(limits.max_calls) || HasTooManyBytes(0)) {
    return RefuseForLoad(stream, limits.overload);
  }
  std::unique_ptr<CallInfo> info = head->TakeInfo();
  stream->reader.set_encoding(head->encoding());
  stream->call = std::make_shared<Call>(NextCallId(), loop_->mailbox, loop_->totals, client_, held_calls_);
  stream->call->stream_ = stream;
  Hold(stream, stream->metadata_bytes);
  if (info->timeout_ns >= 0) stream->deadline_ns = loop_->now_ns + info->timeout_ns;
  info->peer = stats_->peer;
  if (limits.max_open > 0 &&
      std::ranges::find(limits.bounded_paths, info->path) != limits.bounded_paths.end()) {
    stream->untold = std::move(info);
    if ((is_ended || is_draining_) && !TellOfCall(stream)) return;
  } else {
    loop_->events.push_back({EventKind::kCall, stream->call, {}, std::move(info)});
  }
  if (is_ended) loop_->events.push_back({EventKind::kHalfClosed, stream->call, {}, nullptr});
  SettleTimer(stream);
}

bool Session::TellOfCall(Stream* stream) {
  if (!stream->untold) return true;
  std::unique_ptr<CallInfo> info = std::move(stream->untold);
  stream->place = Place::Take(loop_->totals, loop_->options->max_open);
  if (!stream->place) {
    stream->is_handler_told = true;
    loop_->events.push_back({EventKind::kRefused, nullptr, std::move(info->path), nullptr});
    RefuseForLoad(stream, loop_->options->full);
    return false;
  }
  loop_->events.push_back({EventKind::kCall, stream->call, {}, std::move(info)});
  return true;
}

int Session::OnData(int32_t stream_id, std::string_view data) {
  nghttp2_session_consume_connection(http2_, data.size());
  Stream* stream = Find(stream_id);
  if (!stream) return 0;
  if (!stream->is_discarding) {
    stream->read_at_ns = loop_->now_ns;
    ReadMessages(stream, data);
  }
  if (stream->num_unacknowledged > 0 && !stream->is_discarding) {
    stream->withheld_bytes += data.size();
  } else {
    nghttp2_session_consume_stream(http2_, stream_id, data.size());
  }
  return 0;
}

void Session::ReadMessages(Stream* stream, std::string_view data) {
  const size_t limit = loop_->options->max_message_bytes;
  std::string message;
  while (!HasTooManyBytes(*stream) && stream->reader.Read(&data, limit, &message)) {
    if (!TellOfCall(stream)) return;
    ++loop_->totals->messages_received;
    ++stats_->messages_received;
    ++stream->num_unacknowledged;
    stream->has_message = true;
    Hold(stream, message.size() + kEventBytes);
    loop_->events.push_back({EventKind::kMessage, stream->call, std::move(message), nullptr});
    message.clear();
  }
  SetBuffered(stream, stream->reader.buffered_bytes());
  switch (stream->reader.error()) {
    case ReadError::kNone:
      break;
    case ReadError::kTooLarge: {
      const size_t size = stream->reader.declared_bytes();
      return Refuse(stream, {kResourceExhausted, (size > 0 ? "a message of " + std::to_string(size) + " bytes"
                                                           : std::string("a compressed message that grows")) +
                                                     "; allowed: " + std::to_string(limit) + " bytes"});
    }
    case ReadError::kBadFlag:
      return Refuse(stream, {kInternal, "a message's compressed flag must be 0 or 1"});
    case ReadError::kNoEncoding:
      return Refuse(stream, {kInternal, "a compressed message, but no grpc-encoding"});
    case ReadError::kNotDecodable:
      return Refuse(stream, {kInternal, "a message is not compressed as grpc-encoding says"});
  }
  if (HasTooManyBytes(*stream)) return RefuseForLoad(stream, loop_->options->overload);
  if (stream->reader.is_in_message()) SettleTimer(stream);
}

// Until the handler acknowledges them, or lets go of the call.
void Session::Hold(Stream* stream, size_t num_bytes) {
  stream->call->received_bytes_ += static_cast<int64_t>(num_bytes);
  CountReceived(static_cast<int64_t>(num_bytes));
}

void Session::CountReceived(int64_t num_bytes) {
  loop_->totals->received_bytes += num_bytes;
  client_->received_bytes += num_bytes;
}

bool Session::HasTooManyBytes(int64_t num_held) const {
  auto limit = static_cast<int64_t>(loop_->options->max_received_bytes);
  if (num_held > static_cast<int64_t>(kLargeBytes)) limit -= limit / 9;
  return loop_->totals->received_bytes > limit || client_->received_bytes > limit - limit / 9;
}

bool Session::HasTooManyBytes(const Stream& stream) const {
  return HasTooManyBytes(stream.call->received_bytes_.load() + static_cast<int64_t>(stream.buffered_bytes));
}

void Session::SetBuffered(Stream* stream, size_t num_bytes) {
  CountReceived(static_cast<int64_t>(num_bytes) - static_cast<int64_t>(stream->buffered_bytes));
  stream->buffered_bytes = num_bytes;
}

void Session::Acknowledge(Stream* stream, size_t num_bytes) {
  const auto num_held = static_cast<int64_t>(num_bytes + kEventBytes);
  stream->call->received_bytes_ -= num_held;
  CountReceived(-num_held);
  if (--stream->num_unacknowledged <= 0 && stream->withheld_bytes > 0) {
    nghttp2_session_consume_stream(http2_, stream->id, std::exchange(stream->withheld_bytes, 0));
  }
}

void Session::OnHalfClosed(Stream* stream) {
  stream->is_request_ended = true;
  if (stream->is_discarding || !stream->call) return;
  if (stream->reader.is_in_message()) {
    return Refuse(stream, {kInvalidArgument, "the request ended in the middle of a message"});
  }
  if (!TellOfCall(stream)) return;
  loop_->events.push_back({EventKind::kHalfClosed, stream->call, {}, nullptr});
}

}  // namespace twinjet::door
