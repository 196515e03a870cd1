#include "door/session.h"

#include <algorithm>
#include <array>
#include <new>
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
// Frames that wait for a client that sends and does not read: answers to calls that it has reset, mostly.
constexpr size_t kQueuedFrames = 2048;
constexpr size_t kQueuedFramesACall = 4;
constexpr double kDrainNoticeS = 1;
constexpr double kLastWordsS = 5;  // for the socket to take what is sent before a close

// Whether text can be the beginning of an HTTP/1 request line.
bool LooksLikeHttp1(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.begin() + std::min<size_t>(text.size(), 3),
                                      [](char c) { return c >= 'A' && c <= 'Z'; });
}

}  // namespace

Session::Session(LoopState* loop, std::shared_ptr<ConnectionStats> stats, std::shared_ptr<Client> client)
    : loop_(loop),
      stats_(std::move(stats)),
      client_(std::move(client)),
      held_calls_(std::make_shared<std::atomic<int64_t>>(0)),
      started_at_ns_(loop->now_ns),
      heard_at_ns_(loop->now_ns),
      idle_since_ns_(loop->now_ns),
      conduct_(loop->options, loop->now_ns) {
  const Options& limits = *loop_->options;
  nghttp2_option* option = nullptr;
  if (nghttp2_option_new(&option) != 0) throw std::bad_alloc();
  nghttp2_option_set_no_auto_window_update(option, 1);
  nghttp2_option_set_no_closed_streams(option, 1);
  nghttp2_option_set_stream_reset_rate_limit(option, limits.reset_burst, limits.reset_rate);
  const int result = nghttp2_session_server_new2(&http2_, CallbackTable(), this, option);
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
  if (result >= 0 && !is_closing_ &&
      nghttp2_session_get_outbound_queue_size(http2_) >
          kQueuedFrames + kQueuedFramesACall * streams_.size()) {
    ComplainAndClose(NGHTTP2_ENHANCE_YOUR_CALM, "reads_too_little");
  }
  if (result < 0 && !is_closing_) {
    nghttp2_session_terminate_session(
        http2_, result == NGHTTP2_ERR_FLOODED ? NGHTTP2_ENHANCE_YOUR_CALM : NGHTTP2_PROTOCOL_ERROR);
    is_closing_ = true;
  }
  return !is_closing_;
}

bool Session::Pull(std::string* out, size_t max_bytes) {
  if (!is_http2_) {
    if (is_closing_ && !is_http1_answered_ && LooksLikeHttp1(opening_)) out->append(kHttp1Answer);
    is_http1_answered_ = is_closing_;
    return false;
  }
  out_ = out;
  bool is_all = false;
  while (!is_all && out->size() < max_bytes) {
    const uint8_t* data = nullptr;
    const ssize_t size = nghttp2_session_mem_send(http2_, &data);
    if (size < 0) is_closing_ = true;
    is_all = size <= 0;
    if (size > 0) out->append(reinterpret_cast<const char*>(data), static_cast<size_t>(size));
  }
  out_ = nullptr;
  return !is_all;
}

bool Session::is_done() const {
  if (is_closing_ || (is_draining_ && !is_http2_)) return true;
  // Between its two GOAWAYs nghttp2 wants to read no more if no call is open, but one may be on its way.
  if (!is_http2_ || (is_draining_ && !is_last_goaway_sent_)) return false;
  return !nghttp2_session_want_read(http2_) && !nghttp2_session_want_write(http2_);
}

bool Session::Tick() {
  const Options& limits = *loop_->options;
  const int64_t now_ns = loop_->now_ns;
  if (is_closing_) {
    if (closing_since_ns_ == 0) closing_since_ns_ = now_ns;
    return now_ns - closing_since_ns_ < Nanoseconds(kLastWordsS);
  }
  if (!is_settled_ && now_ns - started_at_ns_ >= Nanoseconds(limits.handshake_s)) return false;
  if (!conduct_.AreHeadersInTime(now_ns)) {
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
  EndCallsThatAskNothing();
  if (streams_.empty() && limits.idle_s > 0 && now_ns - idle_since_ns_ >= Nanoseconds(limits.idle_s)) Drain();
  if (is_draining_ && now_ns >= drain_at_ns_) SendLastGoaway();
  return true;
}

void Session::ComplainAndClose(uint32_t error_code, std::string_view text) {
  nghttp2_submit_goaway(http2_, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(http2_),
                        error_code, reinterpret_cast<const uint8_t*>(text.data()), text.size());
  is_closing_ = true;
}

// Two GOAWAYs: the first, with the highest stream id there is, stops new calls; calls that were on their way
// then are known when the ping after it is answered, and the second GOAWAY names the last of them.
void Session::Drain() {
  if (is_draining_) return;
  is_draining_ = true;
  for (const auto& [id, stream] : streams_) TellOfCall(stream.get());
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
