// An HTTP/2 client for the door's tests: nghttp2's client side over bytes that the test moves.
#pragma once

#include <nghttp2/nghttp2.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "door/call.h"
#include "door/wire.h"

namespace test {

using Fields = std::vector<std::pair<std::string, std::string>>;

// What came back on one stream.
struct Answer {
  Fields headers;   // first block
  Fields trailers;  // last block; a trailers-only answer has them in headers
  std::string data;
  bool is_closed = false;
  uint32_t error_code = 0;
  bool is_first_block_over = false;

  std::string Find(const std::string& name) const {
    for (const Fields* fields : {&trailers, &headers}) {
      for (const auto& [key, value] : *fields) {
        if (key == name) return value;
      }
    }
    return "";
  }
  int status() const {
    const std::string text = Find("grpc-status");
    return text.empty() ? -1 : std::stoi(text);
  }
  std::string message() const { return twinjet::door::PercentDecode(Find("grpc-message")); }
  // The messages, decompressed.
  std::vector<std::string> messages() const {
    std::vector<std::string> found;
    std::string_view left = data;
    while (left.size() >= 5) {
      size_t size = 0;
      for (size_t i = 1; i < 5; ++i) size = size << 8 | static_cast<unsigned char>(left[i]);
      if (left.size() < 5 + size) break;
      std::string body(left.substr(5, size));
      bool is_too_large = false;
      if (left[0] == 1) body = twinjet::door::Inflate(body, 1 << 30, &is_too_large).value();
      found.push_back(body);
      left.remove_prefix(5 + size);
    }
    return found;
  }
};

inline std::string Framed(std::string_view message, bool is_compressed = false) {
  std::string out(5, '\0');
  twinjet::door::PutPrefix(is_compressed, static_cast<uint32_t>(message.size()), out.data());
  return out.append(message);
}

class Http2Client {
 public:
  // does_read: false leaves flow-control windows as they are, as a client does that reads nothing.
  explicit Http2Client(bool does_read = true, uint32_t window = 65535) {
    nghttp2_session_callbacks* table = nullptr;
    nghttp2_session_callbacks_new(&table);
    nghttp2_session_callbacks_set_on_header_callback(table, &OnHeader);
    nghttp2_session_callbacks_set_on_frame_recv_callback(table, &OnFrame);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(table, &OnData);
    nghttp2_session_callbacks_set_on_stream_close_callback(table, &OnClose);
    nghttp2_option* option = nullptr;
    nghttp2_option_new(&option);
    nghttp2_option_set_no_auto_window_update(option, does_read ? 0 : 1);
    nghttp2_session_client_new2(&session_, table, this, option);
    nghttp2_option_del(option);
    nghttp2_session_callbacks_del(table);
    const nghttp2_settings_entry entry{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, window};
    nghttp2_submit_settings(session_, 0, &entry, 1);
  }
  ~Http2Client() { nghttp2_session_del(session_); }
  Http2Client(const Http2Client&) = delete;
  Http2Client& operator=(const Http2Client&) = delete;

  // Begins a call; more: fields beyond those of every gRPC request.
  int32_t Begin(const std::string& path, const Fields& more = {}, Fields base = {}) {
    if (base.empty()) {
      base = {{":method", "POST"},    {":scheme", "http"}, {":path", path},
              {":authority", "test"}, {"te", "trailers"},  {"content-type", "application/grpc"}};
    }
    base.insert(base.end(), more.begin(), more.end());
    std::vector<nghttp2_nv> fields;
    for (auto& [key, value] : base) {
      fields.push_back({reinterpret_cast<uint8_t*>(key.data()), reinterpret_cast<uint8_t*>(value.data()),
                        key.size(), value.size(), NGHTTP2_NV_FLAG_NONE});
    }
    auto upload = std::make_unique<Upload>();
    nghttp2_data_provider provider{};
    provider.source.ptr = upload.get();
    provider.read_callback = &ReadUpload;
    const int32_t id =
        nghttp2_submit_request(session_, nullptr, fields.data(), fields.size(), &provider, nullptr);
    if (id < 0) throw std::runtime_error(nghttp2_strerror(id));
    uploads_[id] = std::move(upload);
    return id;
  }
  void SendRaw(int32_t id, std::string_view bytes) {
    uploads_.at(id)->bytes.append(bytes);
    nghttp2_session_resume_data(session_, id);
  }
  void Send(int32_t id, std::string_view message) { SendRaw(id, Framed(message)); }
  void HalfClose(int32_t id) {
    uploads_.at(id)->is_ended = true;
    nghttp2_session_resume_data(session_, id);
  }
  // A unary or server-streaming request.
  int32_t Ask(const std::string& path, std::string_view message, const Fields& more = {}) {
    const int32_t id = Begin(path, more);
    Send(id, message);
    HalfClose(id);
    return id;
  }
  void Cancel(int32_t id) { nghttp2_submit_rst_stream(session_, 0, id, NGHTTP2_CANCEL); }
  void Ping() { nghttp2_submit_ping(session_, 0, nullptr); }
  // Lets the peer send again after nothing was read.
  void GiveWindow(int32_t id, int bytes) {
    nghttp2_submit_window_update(session_, 0, id, bytes);
    nghttp2_submit_window_update(session_, 0, 0, bytes);
  }

  void Feed(std::string_view bytes) {
    const ssize_t used =
        nghttp2_session_mem_recv(session_, reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    if (used < 0) throw std::runtime_error(nghttp2_strerror(static_cast<int>(used)));
  }
  std::string Pull() {
    std::string out;
    const uint8_t* data = nullptr;
    while (true) {
      const ssize_t size = nghttp2_session_mem_send(session_, &data);
      if (size < 0) throw std::runtime_error(nghttp2_strerror(static_cast<int>(size)));
      if (size == 0) return out;
      out.append(reinterpret_cast<const char*>(data), static_cast<size_t>(size));
    }
  }

  Answer& answer(int32_t id) { return answers_[id]; }
  nghttp2_session* session() { return session_; }

  struct Goaway {
    uint32_t error_code;
    int32_t last_stream_id;
    std::string text;
  };
  std::vector<Goaway> goaways;
  int num_pings_received = 0;
  size_t num_data_frames = 0;
  size_t num_data_bytes = 0;
  size_t num_closed = 0;
  bool does_keep_data = true;
  bool does_answer_pings = true;

 private:
  struct Upload {
    std::string bytes;
    bool is_ended = false;
  };

  static ssize_t ReadUpload(nghttp2_session*, int32_t, uint8_t* out, size_t size, uint32_t* flags,
                            nghttp2_data_source* source, void*) {
    auto* upload = static_cast<Upload*>(source->ptr);
    const size_t taken = std::min(size, upload->bytes.size());
    std::copy_n(upload->bytes.begin(), taken, out);
    upload->bytes.erase(0, taken);
    if (upload->bytes.empty() && upload->is_ended) {
      *flags |= NGHTTP2_DATA_FLAG_EOF;
    } else if (taken == 0) {
      return NGHTTP2_ERR_DEFERRED;
    }
    return static_cast<ssize_t>(taken);
  }
  static Http2Client* Of(void* data) { return static_cast<Http2Client*>(data); }
  static int OnHeader(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                      const uint8_t* value, size_t value_size, uint8_t, void* data) {
    Answer& answer = Of(data)->answers_[frame->hd.stream_id];
    (answer.is_first_block_over ? answer.trailers : answer.headers)
        .emplace_back(std::string(reinterpret_cast<const char*>(name), name_size),
                      std::string(reinterpret_cast<const char*>(value), value_size));
    return 0;
  }
  static int OnFrame(nghttp2_session*, const nghttp2_frame* frame, void* data) {
    Http2Client& self = *Of(data);
    if (frame->hd.type == NGHTTP2_HEADERS) self.answers_[frame->hd.stream_id].is_first_block_over = true;
    if (frame->hd.type == NGHTTP2_DATA) ++self.num_data_frames;
    if (frame->hd.type == NGHTTP2_PING && !(frame->hd.flags & NGHTTP2_FLAG_ACK)) ++self.num_pings_received;
    if (frame->hd.type == NGHTTP2_GOAWAY) {
      const auto& goaway = frame->goaway;
      self.goaways.push_back(
          {goaway.error_code, goaway.last_stream_id,
           std::string(reinterpret_cast<const char*>(goaway.opaque_data), goaway.opaque_data_len)});
    }
    return 0;
  }
  static int OnData(nghttp2_session*, uint8_t, int32_t id, const uint8_t* bytes, size_t size, void* data) {
    Of(data)->num_data_bytes += size;
    if (!Of(data)->does_keep_data) return 0;
    Of(data)->answers_[id].data.append(reinterpret_cast<const char*>(bytes), size);
    return 0;
  }
  static int OnClose(nghttp2_session*, int32_t id, uint32_t error_code, void* data) {
    ++Of(data)->num_closed;
    Answer& answer = Of(data)->answers_[id];
    answer.is_closed = true;
    answer.error_code = error_code;
    return 0;
  }

  nghttp2_session* session_ = nullptr;
  std::map<int32_t, Answer> answers_;
  std::map<int32_t, std::unique_ptr<Upload>> uploads_;
};

// A frame as bytes, for what no well-behaved client sends.
inline std::string RawFrame(uint8_t type, uint8_t flags, uint32_t stream_id, std::string_view payload) {
  std::string out;
  for (int shift : {16, 8, 0}) out += static_cast<char>(payload.size() >> shift & 0xff);
  out += static_cast<char>(type);
  out += static_cast<char>(flags);
  for (int shift : {24, 16, 8, 0}) out += static_cast<char>(stream_id >> shift & 0xff);
  return out.append(payload);
}

inline std::string RawOpening() {
  return std::string(NGHTTP2_CLIENT_MAGIC, NGHTTP2_CLIENT_MAGIC_LEN) + RawFrame(NGHTTP2_SETTINGS, 0, 0, "");
}

// A gRPC request's header block, uncompressed.
inline std::string RawHeaderBlock(const Fields& more = {}) {
  Fields fields = {{":method", "POST"},
                   {":scheme", "http"},
                   {":path", "/a/b"},
                   {":authority", "x"},
                   {"content-type", "application/grpc"}};
  fields.insert(fields.end(), more.begin(), more.end());
  std::string out;
  for (const auto& [key, value] : fields) {
    out += '\0';  // literal without indexing, new name
    out += static_cast<char>(key.size());
    out += key;
    if (value.size() < 127) {
      out += static_cast<char>(value.size());
    } else {
      out += '\x7f';
      size_t rest = value.size() - 127;
      for (; rest >= 128; rest >>= 7) out += static_cast<char>((rest & 127) | 128);
      out += static_cast<char>(rest);
    }
    out += value;
  }
  return out;
}

}  // namespace test
