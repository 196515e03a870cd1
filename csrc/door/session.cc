#include "door/session.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace twinjet::door {
namespace {

constexpr std::string_view kMagic(NGHTTP2_CLIENT_MAGIC, NGHTTP2_CLIENT_MAGIC_LEN);
// Ends with the connection, so that no length need be told.
constexpr std::string_view kHttp1Answer =
    "HTTP/1.1 505 HTTP Version Not Supported\r\n"
    "Content-Type: text/plain\r\n"
    "Connection: close\r\n\r\n"
    "this port speaks gRPC over HTTP/2 only; use a gRPC client, for instance grpcurl\n";
constexpr size_t kHeaderOverhead = 32;   // a field's, by HTTP/2's definition of a header list's size
constexpr size_t kHeaderBombFactor = 8;  // this many times the limit ends the connection
constexpr int64_t kLateCalls = 64;       // handlers of reset calls that may still be at work
constexpr int kMaxPingStrikes = 2;
constexpr double kDrainNoticeS = 1;
constexpr double kLastWordsS = 5;              // for the socket to take what is sent before a close
constexpr size_t kMaxTrailerBytes = 32 << 10;  // beyond which trailers are left out
constexpr size_t kKeptOutBytes = 4 << 10;

int64_t Nanoseconds(double seconds) { return static_cast<int64_t>(seconds * 1e9); }

uint64_t NextCallId() {
  static std::atomic<uint64_t> next{1};
  return next++;
}

std::string_view View(const uint8_t* bytes, size_t size) {
  return {reinterpret_cast<const char*>(bytes), size};
}

// nghttp2 copies names and values, so the views need live only as long as the call that submits them.
nghttp2_nv Field(std::string_view name, std::string_view value) {
  return {reinterpret_cast<uint8_t*>(const_cast<char*>(name.data())),
          reinterpret_cast<uint8_t*>(const_cast<char*>(value.data())), name.size(), value.size(),
          NGHTTP2_NV_FLAG_NONE};
}

// Header fields for one submission, and what their values need to be kept in.
class FieldList {
 public:
  // The fields of a gRPC answer's first block.
  void AddOpening(std::string_view http_status, bool is_gzip) {
    Add(":status", http_status);
    Add("content-type", "application/grpc");
    if (is_gzip) Add("grpc-encoding", "gzip");
    Add("grpc-accept-encoding", "identity,deflate,gzip");
  }

  void AddStatus(const Status& status) {
    Keep("grpc-status", std::to_string(status.code));
    if (!status.message.empty()) Keep("grpc-message", PercentEncode(status.message));
    AddMetadata(status.trailers);
  }

  void AddMetadata(const Metadata& metadata) {
    for (const MetadataEntry& entry : metadata) {
      if (IsBinaryKey(entry.key)) {
        Keep(entry.key, Base64Encode(entry.value));
      } else {
        Add(entry.key, entry.value);
      }
    }
  }

  const nghttp2_nv* data() const { return fields_.data(); }
  size_t size() const { return fields_.size(); }

 private:
  void Add(std::string_view name, std::string_view value) { fields_.push_back(Field(name, value)); }
  void Keep(std::string_view name, std::string value) {
    kept_.push_back(std::make_unique<std::string>(std::move(value)));
    Add(name, *kept_.back());
  }

  std::vector<nghttp2_nv> fields_;
  std::vector<std::unique_ptr<std::string>> kept_;
};

size_t MetadataBytes(const Metadata& metadata) {
  size_t total = 0;
  for (const MetadataEntry& entry : metadata) {
    total += entry.key.size() + entry.value.size() * (IsBinaryKey(entry.key) ? 4 : 3) / 3 + kHeaderOverhead;
  }
  return total;
}

bool IsGrpcContentType(std::string_view type) {
  constexpr std::string_view kType = "application/grpc";
  if (!type.starts_with(kType)) return false;
  type.remove_prefix(kType.size());
  return type.empty() || type.front() == '+' || type.front() == ';';
}

// Whether text can be the beginning of an HTTP/1 request line.
bool LooksLikeHttp1(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.begin() + std::min<size_t>(text.size(), 3),
                                      [](char c) { return c >= 'A' && c <= 'Z'; });
}

}  // namespace

bool TokenBucket::Spend(int64_t now_ns) {
  if (rate_ > 0) {
    // In a minute any bucket is full: the bound keeps the product small.
    const int64_t waited_ns = std::min<int64_t>(now_ns - filled_at_ns_, 60'000'000'000);
    const uint64_t gained = static_cast<uint64_t>(waited_ns / 1000) * rate_ / 1'000'000;
    if (gained > 0) {
      tokens_ = std::min(burst_, tokens_ + gained);
      filled_at_ns_ = now_ns;
    }
  }
  if (tokens_ == 0) return false;
  --tokens_;
  return true;
}

// nghttp2's callbacks, each forwarding to a method. None may throw through nghttp2's C frames, and the
// methods throw nothing but what running out of memory throws, which ends the connection.
struct Session::Callbacks {
  template <typename F>
  static int Guard(F&& f) {
    try {
      return f();
    } catch (const std::exception&) {
      return NGHTTP2_ERR_CALLBACK_FAILURE;
    }
  }
  static Session* Of(void* user_data) { return static_cast<Session*>(user_data); }

  static int OnBeginHeaders(nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
    return Guard([&] { return Of(user_data)->OnBeginHeaders(frame); });
  }
  static int OnBeginFrame(nghttp2_session*, const nghttp2_frame_hd* header, void* user_data) {
    return Guard([&] { return Of(user_data)->OnBeginFrame(header->type); });
  }
  static int OnInvalidFrame(nghttp2_session*, const nghttp2_frame*, int, void* user_data) {
    Of(user_data)->header_since_ns_ = 0;
    return 0;
  }
  static int OnHeader(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                      const uint8_t* value, size_t value_size, uint8_t, void* user_data) {
    return Guard(
        [&] { return Of(user_data)->OnHeader(frame, View(name, name_size), View(value, value_size)); });
  }
  static int OnInvalidHeader(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name,
                             size_t name_size, const uint8_t*, size_t, uint8_t, void* user_data) {
    return Guard([&] {
      Stream* stream = Of(user_data)->Find(frame->hd.stream_id);
      if (stream && stream->bad_metadata.empty() && !View(name, name_size).starts_with(':')) {
        stream->bad_metadata = "a metadata key or value has characters that HTTP/2 does not allow";
        return 0;
      }
      Of(user_data)->header_since_ns_ = 0;
      return static_cast<int>(NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE);
    });
  }
  static int OnFrame(nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
    return Guard([&] { return Of(user_data)->OnFrame(frame); });
  }
  static int OnData(nghttp2_session*, uint8_t, int32_t stream_id, const uint8_t* data, size_t size,
                    void* user_data) {
    return Guard([&] { return Of(user_data)->OnData(stream_id, View(data, size)); });
  }
  static int OnFrameSent(nghttp2_session*, const nghttp2_frame* frame, void* user_data) {
    return Guard([&] { return Of(user_data)->OnFrameSent(frame); });
  }
  static int OnFrameNotSent(nghttp2_session* http2, const nghttp2_frame* frame, int, void* user_data) {
    // Headers that HTTP/2 cannot carry: the client must not wait for ever.
    if (frame->hd.type == NGHTTP2_HEADERS && Of(user_data)->Find(frame->hd.stream_id)) {
      nghttp2_submit_rst_stream(http2, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_INTERNAL_ERROR);
    }
    return 0;
  }
  static int OnStreamClose(nghttp2_session*, int32_t stream_id, uint32_t error_code, void* user_data) {
    return Guard([&] { return Of(user_data)->OnStreamClose(stream_id, error_code); });
  }
  static int SendData(nghttp2_session*, nghttp2_frame* frame, const uint8_t* header, size_t size,
                      nghttp2_data_source* source, void* user_data) {
    return Guard(
        [&] { return Of(user_data)->SendData(frame, header, size, static_cast<Stream*>(source->ptr)); });
  }
  static ssize_t ReadOutgoing(nghttp2_session*, int32_t, uint8_t*, size_t size, uint32_t* flags,
                              nghttp2_data_source* source, void* user_data) {
    try {
      return Of(user_data)->ReadOutgoing(static_cast<Stream*>(source->ptr), size, flags);
    } catch (const std::exception&) {
      return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    }
  }

  static nghttp2_session_callbacks* Make() {
    nghttp2_session_callbacks* table = nullptr;
    if (nghttp2_session_callbacks_new(&table) != 0) throw std::bad_alloc();
    nghttp2_session_callbacks_set_on_begin_headers_callback(table, &OnBeginHeaders);
    nghttp2_session_callbacks_set_on_begin_frame_callback(table, &OnBeginFrame);
    nghttp2_session_callbacks_set_on_invalid_frame_recv_callback(table, &OnInvalidFrame);
    nghttp2_session_callbacks_set_on_header_callback(table, &OnHeader);
    nghttp2_session_callbacks_set_on_invalid_header_callback(table, &OnInvalidHeader);
    nghttp2_session_callbacks_set_on_frame_recv_callback(table, &OnFrame);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(table, &OnData);
    nghttp2_session_callbacks_set_on_frame_send_callback(table, &OnFrameSent);
    nghttp2_session_callbacks_set_on_frame_not_send_callback(table, &OnFrameNotSent);
    nghttp2_session_callbacks_set_on_stream_close_callback(table, &OnStreamClose);
    nghttp2_session_callbacks_set_send_data_callback(table, &SendData);
    return table;
  }
};

Session::Session(LoopState* loop, std::shared_ptr<ConnectionStats> stats)
    : loop_(loop),
      stats_(std::move(stats)),
      held_calls_(std::make_shared<std::atomic<int64_t>>(0)),
      started_at_ns_(loop->now_ns),
      heard_at_ns_(loop->now_ns),
      idle_since_ns_(loop->now_ns),
      client_ping_at_ns_(loop->now_ns),
      idle_frames_(loop->options->idle_frame_burst, loop->options->idle_frame_rate) {
  static nghttp2_session_callbacks* const callbacks = Callbacks::Make();
  const Options& limits = *loop_->options;
  nghttp2_option* option = nullptr;
  if (nghttp2_option_new(&option) != 0) throw std::bad_alloc();
  nghttp2_option_set_no_auto_window_update(option, 1);
  nghttp2_option_set_no_closed_streams(option, 1);
  nghttp2_option_set_stream_reset_rate_limit(option, limits.reset_burst, limits.reset_rate);
  const int result = nghttp2_session_server_new2(&http2_, callbacks, this, option);
  nghttp2_option_del(option);
  if (result != 0) throw std::bad_alloc();
  const std::array<nghttp2_settings_entry, 4> settings{{
      {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, limits.max_streams},
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, limits.stream_window_bytes},
      {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, static_cast<uint32_t>(limits.max_metadata_bytes)},
      {NGHTTP2_SETTINGS_NO_RFC7540_PRIORITIES, 1},
  }};
  if (nghttp2_submit_settings(http2_, NGHTTP2_FLAG_NONE, settings.data(), settings.size()) != 0 ||
      nghttp2_session_set_local_window_size(http2_, NGHTTP2_FLAG_NONE, 0, limits.connection_window_bytes) !=
          0) {
    nghttp2_session_del(http2_);
    throw std::runtime_error("nghttp2 does not take the door's settings");
  }
}

Session::~Session() {
  while (!streams_.empty()) OnStreamClose(streams_.begin()->first, NGHTTP2_CONNECT_ERROR);
  nghttp2_session_del(http2_);
}

Stream* Session::Find(int32_t stream_id) {
  const auto found = streams_.find(stream_id);
  return found == streams_.end() ? nullptr : found->second.get();
}

bool Session::Feed(std::string_view bytes) {
  if (is_closing_) return false;
  heard_at_ns_ = loop_->now_ns;
  pinged_at_ns_ = 0;
  if (!is_http2_) {
    const size_t num_seen = opening_.size();
    opening_.append(bytes.substr(0, kMagic.size() - num_seen));
    bytes.remove_prefix(opening_.size() - num_seen);
    if (!kMagic.starts_with(opening_)) {
      is_closing_ = true;
      return false;
    }
    if (opening_.size() < kMagic.size()) return true;
    is_http2_ = true;
    nghttp2_session_mem_recv(http2_, reinterpret_cast<const uint8_t*>(kMagic.data()), kMagic.size());
    opening_ = std::string();
  }
  const ssize_t result =
      nghttp2_session_mem_recv(http2_, reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  if (result < 0 && !is_closing_) {
    nghttp2_session_terminate_session(
        http2_, result == NGHTTP2_ERR_FLOODED ? NGHTTP2_ENHANCE_YOUR_CALM : NGHTTP2_PROTOCOL_ERROR);
    is_closing_ = true;
  }
  return !is_closing_;
}

void Session::Pull(std::string* out, size_t max_bytes) {
  if (!is_http2_) {
    if (is_closing_ && !is_http1_answered_ && LooksLikeHttp1(opening_)) out->append(kHttp1Answer);
    is_http1_answered_ = is_closing_;
    return;
  }
  out_ = out;
  while (out->size() < max_bytes) {
    const uint8_t* data = nullptr;
    const ssize_t size = nghttp2_session_mem_send(http2_, &data);
    if (size < 0) is_closing_ = true;
    if (size <= 0) break;
    out->append(View(data, static_cast<size_t>(size)));
  }
  out_ = nullptr;
}

bool Session::is_done() const {
  if (is_closing_ || (is_draining_ && !is_http2_)) return true;
  // Between its two GOAWAYs nghttp2 wants to read no more if no call is open, but one may be on its way.
  if (!is_http2_ || (is_draining_ && !is_last_goaway_sent_)) return false;
  return !nghttp2_session_want_read(http2_) && !nghttp2_session_want_write(http2_);
}

// ---- what the peer sends

int Session::OnBeginFrame(uint8_t type) {
  if (type == NGHTTP2_HEADERS) {
    header_since_ns_ = loop_->now_ns;
  } else if (type != NGHTTP2_CONTINUATION) {
    header_since_ns_ = 0;
  }
  // The others are looked at when they are whole; types that nghttp2 does not know it skips by itself.
  const bool is_ignored = type == NGHTTP2_PRIORITY || type > NGHTTP2_CONTINUATION;
  return is_ignored && !SpendIdleFrame() ? NGHTTP2_ERR_CALLBACK_FAILURE : 0;
}

int Session::OnBeginHeaders(const nghttp2_frame* frame) {
  if (frame->headers.cat == NGHTTP2_HCAT_REQUEST) {
    auto stream = std::make_unique<Stream>(this, frame->hd.stream_id);
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
  // A request's trailers mean nothing in gRPC.
  if (frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;
  CallInfo& info = *stream->info;
  if (name == ":path") {
    info.path = value;
  } else if (name == ":authority") {
    info.authority = value;
  } else if (name == ":method") {
    stream->method = value;
  } else if (name == "content-type") {
    stream->content_type = value;
  } else if (name == "grpc-timeout") {
    const std::optional<int64_t> timeout_ns = ParseTimeout(value);
    stream->has_bad_timeout = !timeout_ns;
    info.timeout_ns = timeout_ns.value_or(-1);
  } else if (name == "grpc-encoding") {
    stream->encoding = ParseEncoding(value);
  } else if (name == "grpc-accept-encoding") {
    info.accepts_gzip = AcceptsGzip(value);
  } else if (name == "te" || name.starts_with(':') || name == "grpc-accept-encoding") {
    return 0;
  } else if (IsBinaryKey(name)) {
    while (true) {
      const size_t comma = value.find(',');
      std::optional<std::string> decoded = Base64Decode(value.substr(0, comma));
      if (!decoded) {
        stream->bad_metadata = "metadata " + std::string(name) + " is not base64";
        return 0;
      }
      info.metadata.push_back({std::string(name), std::move(*decoded)});
      if (comma == std::string_view::npos) return 0;
      value.remove_prefix(comma + 1);
    }
  } else if (IsMetadataKey(name) && IsAsciiValue(value)) {
    info.metadata.push_back({std::string(name), std::string(value)});
  } else {
    stream->bad_metadata = "a metadata key or value has characters that gRPC does not allow";
  }
  return 0;
}

int Session::OnFrame(const nghttp2_frame* frame) {
  const bool is_ended = (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) != 0;
  switch (frame->hd.type) {
    case NGHTTP2_HEADERS: {
      header_since_ns_ = 0;
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
      } else if (!OnClientPing()) {
        return NGHTTP2_ERR_CALLBACK_FAILURE;
      }
      break;
    default:
      break;
  }
  return 0;
}

bool Session::SpendIdleFrame() {
  if (idle_frames_.Spend(loop_->now_ns)) return true;
  ComplainAndClose(NGHTTP2_ENHANCE_YOUR_CALM, "too_many_empty_frames");
  return false;
}

// gRPC's policy: a ping that comes sooner than allowed after the last one is a strike, unless something was
// sent to the client meanwhile.
bool Session::OnClientPing() {
  const int64_t now_ns = loop_->now_ns;
  const bool is_early =
      has_client_pinged_ && now_ns - client_ping_at_ns_ < Nanoseconds(loop_->options->client_ping_s);
  has_client_pinged_ = true;
  if (!is_early) {
    client_ping_at_ns_ = now_ns;
    return true;
  }
  if (++num_ping_strikes_ <= kMaxPingStrikes) return true;
  ComplainAndClose(NGHTTP2_ENHANCE_YOUR_CALM, "too_many_pings");
  return false;
}

void Session::ComplainAndClose(uint32_t error_code, std::string_view text) {
  nghttp2_submit_goaway(http2_, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(http2_),
                        error_code, reinterpret_cast<const uint8_t*>(text.data()), text.size());
  is_closing_ = true;
}

void Session::OnRequest(Stream* stream, bool is_ended) {
  const Options& limits = *loop_->options;
  CallInfo& info = *stream->info;
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
  if (stream->method != "POST") {
    return Refuse(stream, kUnimplemented, "method " + stream->method + "; gRPC calls are POST", "405");
  }
  if (!IsGrpcContentType(stream->content_type)) {
    return Refuse(stream, kInvalidArgument, "content-type must be application/grpc", "415");
  }
  if (stream->metadata_bytes > limits.max_metadata_bytes) {
    return Refuse(stream, kResourceExhausted,
                  "metadata of " + std::to_string(stream->metadata_bytes) +
                      " bytes; allowed: " + std::to_string(limits.max_metadata_bytes));
  }
  if (!stream->bad_metadata.empty()) return Refuse(stream, kInvalidArgument, stream->bad_metadata);
  if (stream->has_bad_timeout) {
    return Refuse(stream, kInvalidArgument, "grpc-timeout must be up to 8 digits and one of HMSmun");
  }
  if (stream->encoding == Encoding::kUnknown) {
    return Refuse(stream, kUnimplemented, "grpc-encoding must be identity, gzip or deflate");
  }
  if (loop_->totals->calls >= static_cast<int64_t>(limits.max_calls)) {
    return RefuseForLoad(stream, "the server has as many calls as it can bear");
  }
  if (!FindPlace(stream)) {
    loop_->events.push_back({EventKind::kRefused, nullptr, info.path, nullptr});
    return RefuseForLoad(stream, limits.full_message, limits.full_details);
  }
  stream->reader.set_encoding(stream->encoding);
  stream->call = std::make_shared<Call>(NextCallId(), loop_->mailbox, loop_->totals, held_calls_);
  stream->call->stream_ = stream;
  if (info.timeout_ns >= 0) stream->deadline_ns = loop_->now_ns + info.timeout_ns;
  info.peer = stats_->peer;
  loop_->events.push_back({EventKind::kCall, stream->call, {}, std::move(stream->info)});
  if (is_ended) loop_->events.push_back({EventKind::kHalfClosed, stream->call, {}, nullptr});
  SettleTimer(stream);
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
  Call& call = *stream->call;
  std::string message;
  while (stream->reader.Read(&data, limit, &message)) {
    ++loop_->totals->messages_received;
    ++stats_->messages_received;
    ++stream->num_unacknowledged;
    loop_->totals->received_bytes += static_cast<int64_t>(message.size());
    call.received_bytes_ += static_cast<int64_t>(message.size());
    loop_->events.push_back({EventKind::kMessage, stream->call, std::move(message), nullptr});
    message.clear();
  }
  SetBuffered(stream, stream->reader.buffered_bytes());
  switch (stream->reader.error()) {
    case ReadError::kNone:
      break;
    case ReadError::kTooLarge: {
      const size_t size = stream->reader.declared_bytes();
      return Refuse(stream, kResourceExhausted,
                    (size > 0 ? "a message of " + std::to_string(size) + " bytes"
                              : std::string("a compressed message that grows")) +
                        "; allowed: " + std::to_string(limit) + " bytes");
    }
    case ReadError::kBadFlag:
      return Refuse(stream, kInternal, "a message's compressed flag must be 0 or 1");
    case ReadError::kNoEncoding:
      return Refuse(stream, kInternal, "a compressed message, but no grpc-encoding");
    case ReadError::kNotDecodable:
      return Refuse(stream, kInternal, "a message is not compressed as grpc-encoding says");
  }
  if (loop_->totals->received_bytes > static_cast<int64_t>(loop_->options->max_received_bytes)) {
    return RefuseForLoad(stream, "the server holds as many request bytes as it can bear");
  }
  if (stream->reader.is_in_message()) SettleTimer(stream);
}

void Session::SetBuffered(Stream* stream, size_t num_bytes) {
  loop_->totals->received_bytes +=
      static_cast<int64_t>(num_bytes) - static_cast<int64_t>(stream->buffered_bytes);
  stream->buffered_bytes = num_bytes;
}

void Session::OnHalfClosed(Stream* stream) {
  stream->is_request_ended = true;
  if (stream->is_discarding || !stream->call) return;
  if (stream->reader.is_in_message()) {
    return Refuse(stream, kInvalidArgument, "the request ended in the middle of a message");
  }
  loop_->events.push_back({EventKind::kHalfClosed, stream->call, {}, nullptr});
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

// ---- what handlers want

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
      DropOutgoing(stream);
      nghttp2_submit_rst_stream(http2_, NGHTTP2_FLAG_NONE, stream->id, NGHTTP2_CANCEL);
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
  nghttp2_data_provider provider{};
  provider.source.ptr = stream;
  provider.read_callback = &Callbacks::ReadOutgoing;
  nghttp2_submit_response(http2_, stream->id, fields.data(), fields.size(), &provider);
  stream->are_headers_sent = true;
}

void Session::AddMessage(Stream* stream, std::string_view bytes) {
  if (stream->out.size() - stream->out_pos > loop_->options->max_unsent_bytes) {
    stream->call->unsent_bytes_ -= static_cast<int64_t>(bytes.size() + kPrefixBytes);
    Break(stream, kResourceExhausted, "the client reads too slowly");
    DropOutgoing(stream);
    nghttp2_submit_rst_stream(http2_, NGHTTP2_FLAG_NONE, stream->id, NGHTTP2_ENHANCE_YOUR_CALM);
    return;
  }
  if (!stream->are_headers_sent) SendHeaders(stream, {});
  std::string gzipped;
  if (stream->is_compressing) {
    gzipped = Gzip(bytes);
    stream->call->unsent_bytes_ += static_cast<int64_t>(gzipped.size()) - static_cast<int64_t>(bytes.size());
    bytes = gzipped;
  }
  const bool was_empty = stream->out.empty();
  char prefix[kPrefixBytes];
  PutPrefix(stream->is_compressing, static_cast<uint32_t>(bytes.size()), prefix);
  stream->out.append(prefix, kPrefixBytes).append(bytes);
  ++loop_->totals->messages_sent;
  ++stats_->messages_sent;
  if (was_empty) Resume(stream);
}

// Not an error when the stream's data is not deferred: then it is on its way already.
void Session::Resume(Stream* stream) { nghttp2_session_resume_data(http2_, stream->id); }

ssize_t Session::ReadOutgoing(Stream* stream, size_t max_bytes, uint32_t* flags) {
  const size_t num_left = stream->out.size() - stream->out_pos;
  if (num_left == 0 && !stream->is_finished) return NGHTTP2_ERR_DEFERRED;
  const size_t num_bytes = std::min(num_left, max_bytes);
  *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
  if (num_bytes == num_left && stream->is_finished) {
    *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
    SubmitTrailers(stream);
  }
  return static_cast<ssize_t>(num_bytes);
}

int Session::SendData(nghttp2_frame* frame, const uint8_t* header, size_t num_bytes, Stream* stream) {
  constexpr size_t kFrameHeaderBytes = 9;
  out_->append(View(header, kFrameHeaderBytes));
  // No padding: the door asks nghttp2 for none.
  out_->append(stream->out, stream->out_pos, num_bytes);
  stream->out_pos += num_bytes;
  stream->moved_at_ns = loop_->now_ns;
  if (stream->out_pos == stream->out.size()) {
    stream->out.clear();
    stream->out_pos = 0;
    if (stream->out.capacity() > kKeptOutBytes) stream->out.shrink_to_fit();
  } else if (stream->out_pos > stream->out.size() / 2 && stream->out_pos > kKeptOutBytes) {
    stream->out.erase(0, stream->out_pos);
    stream->out_pos = 0;
  }
  if (num_bytes > 0) TakeFromUnsent(stream, num_bytes);
  static_cast<void>(frame);
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
  const size_t num_left = stream->out.size() - stream->out_pos;
  stream->out = std::string();
  stream->out_pos = 0;
  if (num_left > 0) TakeFromUnsent(stream, num_left);
}

int Session::OnFrameSent(const nghttp2_frame* frame) {
  // nghttp2 sends a ping ahead of everything else, so this one is made when the GOAWAY is out.
  if (frame->hd.type == NGHTTP2_GOAWAY && is_draining_ && !is_last_goaway_sent_) {
    return nghttp2_submit_ping(http2_, NGHTTP2_FLAG_NONE, nullptr);
  }
  if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) return 0;
  num_ping_strikes_ = 0;
  has_client_pinged_ = false;
  idle_frames_.Refund(1);
  if (frame->hd.type == NGHTTP2_HEADERS && (frame->hd.flags & NGHTTP2_FLAG_END_STREAM)) {
    Stream* stream = Find(frame->hd.stream_id);
    // The answer is whole; what the client would still send is of no use.
    if (stream && !stream->is_request_ended) {
      nghttp2_submit_rst_stream(http2_, NGHTTP2_FLAG_NONE, stream->id, NGHTTP2_NO_ERROR);
    }
  }
  return 0;
}

void Session::Finish(Stream* stream, Status status) {
  if (stream->is_finished) return;
  stream->is_finished = true;
  stream->is_discarding = true;
  stream->place.reset();
  stream->moved_at_ns = loop_->now_ns;
  std::atomic<int64_t>& count =
      status.code == kOk ? loop_->totals->calls_succeeded : loop_->totals->calls_failed;
  ++count;
  ++(status.code == kOk ? stats_->calls_succeeded : stats_->calls_failed);
  if (MetadataBytes(status.trailers) > kMaxTrailerBytes) status.trailers.clear();
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

void Session::Acknowledge(Stream* stream, size_t num_bytes) {
  stream->call->received_bytes_ -= static_cast<int64_t>(num_bytes);
  loop_->totals->received_bytes -= static_cast<int64_t>(num_bytes);
  if (--stream->num_unacknowledged <= 0 && stream->withheld_bytes > 0) {
    nghttp2_session_consume_stream(http2_, stream->id, std::exchange(stream->withheld_bytes, 0));
  }
}

// ---- ends

void Session::TellHandler(Stream* stream, std::string why) {
  if (stream->is_handler_told || !stream->call) return;
  stream->is_handler_told = true;
  stream->call->is_over_ = true;
  loop_->events.push_back({EventKind::kCancelled, stream->call, std::move(why), nullptr});
}

void Session::Refuse(Stream* stream, int code, std::string message, const char* http_status) {
  TellHandler(stream, message);
  stream->is_discarding = true;
  if (stream->call || std::string_view(http_status) == "200") {
    Finish(stream, {code, std::move(message), {}});
    return;
  }
  ++loop_->totals->calls_failed;
  ++stats_->calls_failed;
  stream->is_finished = true;
  FieldList fields;
  fields.AddOpening(http_status, false);
  fields.AddStatus({code, std::move(message), {}});
  nghttp2_submit_response(http2_, stream->id, fields.data(), fields.size(), nullptr);
}

void Session::RefuseForLoad(Stream* stream, std::string message) {
  RefuseForLoad(stream, std::move(message), loop_->options->overload_details);
}

void Session::RefuseForLoad(Stream* stream, std::string message, const std::string& details) {
  TellHandler(stream, message);
  stream->is_discarding = true;
  Status status{kResourceExhausted, std::move(message), {}};
  if (!details.empty()) status.trailers.push_back({"grpc-status-details-bin", details});
  Finish(stream, std::move(status));
}

// False if the path is bounded and no place is left.
bool Session::FindPlace(Stream* stream) {
  const Options& limits = *loop_->options;
  if (limits.max_open == 0) return true;
  if (std::ranges::find(limits.bounded_paths, stream->info->path) == limits.bounded_paths.end()) return true;
  stream->place = Place::Take(loop_->totals, limits.max_open);
  return stream->place != nullptr;
}

// What is unsent still goes first: a message may be half sent, and RST_STREAM would hide the status.
void Session::Break(Stream* stream, int code, const std::string& why) {
  TellHandler(stream, why);
  Finish(stream, {code, why, {}});
}

// ---- time

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
      DropOutgoing(stream);
      nghttp2_submit_rst_stream(http2_, NGHTTP2_FLAG_NONE, stream->id, NGHTTP2_CANCEL);
      return;
    }
  } else if (stream->deadline_ns >= 0 && now_ns >= stream->deadline_ns) {
    Break(stream, kDeadlineExceeded, "the deadline has passed");
  } else if (stream->reader.is_in_message() &&
             now_ns >= stream->read_at_ns + Nanoseconds(limits.message_stall_s)) {
    Break(stream, kResourceExhausted, "the client stopped in the middle of a message");
  }
  SettleTimer(stream);
}

bool Session::Tick() {
  const Options& limits = *loop_->options;
  const int64_t now_ns = loop_->now_ns;
  if (is_closing_) {
    if (closing_since_ns_ == 0) closing_since_ns_ = now_ns;
    return now_ns - closing_since_ns_ < Nanoseconds(kLastWordsS);
  }
  if (!is_settled_ && now_ns - started_at_ns_ >= Nanoseconds(limits.handshake_s)) return false;
  if (header_since_ns_ > 0 && now_ns - header_since_ns_ >= Nanoseconds(limits.header_s)) {
    ComplainAndClose(NGHTTP2_ENHANCE_YOUR_CALM, "slow_headers");
    return false;
  }
  if (pinged_at_ns_ > 0) {
    if (now_ns - pinged_at_ns_ >= Nanoseconds(limits.keepalive_timeout_s)) return false;
  } else if (is_settled_ && limits.keepalive_s > 0 &&
             now_ns - heard_at_ns_ >= Nanoseconds(limits.keepalive_s)) {
    nghttp2_submit_ping(http2_, NGHTTP2_FLAG_NONE, nullptr);
    pinged_at_ns_ = now_ns;
    ++stats_->keepalives_sent;
  }
  if (streams_.empty() && limits.idle_s > 0 && now_ns - idle_since_ns_ >= Nanoseconds(limits.idle_s)) Drain();
  if (is_draining_ && now_ns >= drain_at_ns_) SendLastGoaway();
  return true;
}

// Two GOAWAYs: the first, with the highest stream id there is, stops new calls; calls that were on their way
// then are known when the ping after it is answered, and the second GOAWAY names the last of them.
void Session::Drain() {
  if (is_draining_) return;
  is_draining_ = true;
  drain_at_ns_ = loop_->now_ns + Nanoseconds(kDrainNoticeS);
  if (!is_http2_) return;
  nghttp2_submit_shutdown_notice(http2_);
}

void Session::SendLastGoaway() {
  if (std::exchange(is_last_goaway_sent_, true)) return;
  nghttp2_submit_goaway(http2_, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(http2_),
                        NGHTTP2_NO_ERROR, nullptr, 0);
}

}  // namespace twinjet::door
