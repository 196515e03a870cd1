// What handlers want of a session: headers, messages and their way into frames.
#include <algorithm>
#include <string>
#include <utility>

#include "door/fields.h"
#include "door/session.h"
#include "door/wire.h"

namespace twinjet::door {

void Session::Apply(Command& command, const Mail& mail) {
  Stream* stream = command.call->stream_;
  switch (command.kind) {
    case CommandKind::kHeaders:
      if (!stream->are_headers_sent && !stream->is_finished) SendHeaders(stream, *command.headers);
      break;
    case CommandKind::kMessage:
      if (stream->is_finished) {
        stream->call->unsent_bytes_ -= static_cast<int64_t>(command.size + kPrefixBytes);
      } else {
        AddMessage(stream, std::string_view(mail.bytes).substr(command.offset, command.size));
      }
      break;
    case CommandKind::kFinish:
      stream->is_handler_told = true;
      Finish(stream, std::move(*command.status));
      break;
    case CommandKind::kReset:
      stream->is_handler_told = true;
      Reset(stream, NGHTTP2_CANCEL);
      break;
    case CommandKind::kAck:
      Acknowledge(stream, command.size);
      break;
    case CommandKind::kCompress:
      if (!stream->are_headers_sent) stream->is_compressing = true;
      break;
  }
}

void Session::SendHeaders(Stream* stream, const Metadata& headers) {
  FieldList fields;
  fields.AddOpening("200", stream->is_compressing);
  fields.AddMetadata(headers);
  const nghttp2_data_provider provider = MessagesOf(stream);
  nghttp2_submit_response(http2_, stream->id, fields.data(), fields.size(), &provider);
  stream->are_headers_sent = true;
}

void Session::AddMessage(Stream* stream, std::string_view bytes) {
  if (stream->out.size() > loop_->options->max_unsent_bytes) {
    stream->call->unsent_bytes_ -= static_cast<int64_t>(bytes.size() + kPrefixBytes);
    Break(stream, {kResourceExhausted, "the client reads too slowly", {}});
    Reset(stream, NGHTTP2_ENHANCE_YOUR_CALM);
    return;
  }
  if (!stream->are_headers_sent) SendHeaders(stream, {});
  std::string gzipped;
  if (stream->is_compressing) {
    gzipped = Gzip(bytes);
    stream->call->unsent_bytes_ += static_cast<int64_t>(gzipped.size()) - static_cast<int64_t>(bytes.size());
    bytes = gzipped;
  }
  const bool was_empty = stream->out.is_empty();
  stream->out.Append(stream->is_compressing, bytes);
  ++loop_->totals->messages_sent;
  ++stats_->messages_sent;
  if (was_empty) Resume(stream);
}

// Not an error when the stream's data is not deferred: then it is on its way already.
void Session::Resume(Stream* stream) { nghttp2_session_resume_data(http2_, stream->id); }

ssize_t Session::ReadOutgoing(Stream* stream, size_t max_bytes, uint32_t* flags) {
  const size_t num_left = stream->out.size();
  if (num_left == 0 && !stream->is_finished) return NGHTTP2_ERR_DEFERRED;
  const size_t num_bytes = std::min(num_left, max_bytes);
  *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
  if (num_bytes == num_left && stream->is_finished) {
    *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
    SubmitTrailers(stream);
  }
  return static_cast<ssize_t>(num_bytes);
}

int Session::SendData(const uint8_t* frame_header, size_t num_bytes, Stream* stream) {
  constexpr size_t kFrameHeaderBytes = 9;
  out_->append(reinterpret_cast<const char*>(frame_header), kFrameHeaderBytes);
  // No padding: the door asks nghttp2 for none.
  stream->out.MoveTo(out_, num_bytes);
  stream->moved_at_ns = loop_->now_ns;
  if (num_bytes > 0) TakeFromUnsent(stream, num_bytes);
  return 0;
}

void Session::TakeFromUnsent(Stream* stream, size_t num_bytes) {
  Call& call = *stream->call;
  const int64_t num_left = call.unsent_bytes_ -= static_cast<int64_t>(num_bytes);
  if (num_left <= static_cast<int64_t>(loop_->options->write_ahead_bytes) && call.wants_room_.load() &&
      call.wants_room_.exchange(false)) {
    loop_->events.push_back({EventKind::kRoom, stream->call, {}, nullptr});
  }
}

void Session::DropOutgoing(Stream* stream) {
  const size_t num_left = stream->out.Drop();
  if (num_left > 0) TakeFromUnsent(stream, num_left);
}

int Session::OnFrameSent(const nghttp2_frame* frame) {
  // nghttp2 sends a ping ahead of everything else, so this one is made when the GOAWAY is out.
  if (frame->hd.type == NGHTTP2_GOAWAY && is_draining_ && !is_last_goaway_sent_) {
    return nghttp2_submit_ping(http2_, NGHTTP2_FLAG_NONE, nullptr);
  }
  if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) return 0;
  conduct_.OnAnswered();
  if (frame->hd.type == NGHTTP2_HEADERS && (frame->hd.flags & NGHTTP2_FLAG_END_STREAM)) {
    Stream* stream = Find(frame->hd.stream_id);
    // The answer is whole; what the client would still send is of no use.
    if (stream && !stream->is_request_ended) {
      nghttp2_submit_rst_stream(http2_, NGHTTP2_FLAG_NONE, stream->id, NGHTTP2_NO_ERROR);
    }
  }
  return 0;
}

}  // namespace twinjet::door
