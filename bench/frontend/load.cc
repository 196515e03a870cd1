// A load client that is not what a measurement waits for: one thread, epoll, no allocation per token.
//
// Opens streams on gRPC over HTTP/2 (nghttp2) or on HTTP/1.1 with server-sent events, counts their tokens and
// writes the running total into a page that it shares with the mock (see mock_core.py: Control). Prints one
// JSON object. In a body the twelve characters "@@@@@@@@@@@@" become the stream's number.
//
//   load --port P --kind grpc|sse --path /p.S/M --body FILE --streams N [--requests R] [--connections C]
//        [--tokens-path 2.3] [--rate R/S] [--control FILE] [--timeout S] [--tls 1] [--probe 1]
//
// The page also has two stamps for each of the last streams, written by the mock: when it had the request,
// and when it sent the first token. With them a first token's way is told apart: up, from when the call's
// headers went to the socket until the mock had it; down, from the mock until its bytes were read here. added
// is both; what the engine took, and how late this client was to ask and to parse, is not in it. Clocks are
// one.
//
// --probe: this client runs beside another one, which is the load; few streams, so that its own work is not
// in what it measures.
//
// --streams are open at once, --requests are made in all. --rate: requests begin at that rate instead, at
// most --streams at once. --tokens-path: field numbers that lead from a response to its packed token ids.
// --tls: with any certificate. A status other than OK is timed from when the call's headers were sent: calls
// that the server's SETTINGS_MAX_CONCURRENT_STREAMS holds back here have not reached it.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <openssl/ssl.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace {

constexpr std::string_view kMark = "@@@@@@@@@@@@";
constexpr size_t kMaxGaps = 4'000'000;
// The shared page, as mock_core.py has it.
constexpr size_t kNumStamps = 1 << 16;  // one half the load's, one the probe's
constexpr int64_t kFirstOfProbe = 500'000;
constexpr size_t kStampsAt = 4096;
constexpr size_t kPageBytes = kStampsAt + kNumStamps * 2 * sizeof(uint64_t);
constexpr size_t kRunField = 7;

struct Options {
  std::string host = "127.0.0.1";
  int port = 0;
  bool is_grpc = true;
  std::string path;
  std::string body;
  std::vector<uint32_t> tokens_path;
  int streams = 1;
  int connections = 1;
  int64_t requests = 0;
  double rate = 0;
  double timeout_s = 120;
  bool use_tls = false;
  bool is_probe = false;
  std::string control;
};

double Now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "load: %s: %s\n", what.c_str(), std::strerror(errno));
  std::exit(1);
}

struct Stream {
  int32_t id = -1;
  int connection = 0;
  int64_t number = 0;
  double due = 0;
  double began = 0;
  double sent_at = 0;
  double first = 0;
  double last = 0;
  int64_t tokens = 0;
  bool has_grpc_status = false;
  int grpc_status = -1;
  bool has_details = false;
  std::string request;
  size_t sent = 0;
  std::string received;
};

struct Result {
  int64_t tokens = 0, messages = 0, done = 0, started = 0, with_tokens = 0;
  // While every stream has begun and none has ended: when that was, and the tokens until then.
  double full_from = 0, full_until = 0;
  int64_t full_first = 0, full_last = 0;
  std::map<std::string, int64_t> statuses;
  std::map<std::string, int64_t> without_details;
  std::vector<float> first_ms, gap_ms, end_ms, refused_ms;
  // Of first tokens that the mock stamped.
  std::vector<float> added_ms, up_ms, down_ms, late_ms, parse_ms;
};

class Load {
 public:
  explicit Load(Options options);
  void Run();

  void OnHeader(Stream& stream, std::string_view name, std::string_view value);
  void OnData(Stream& stream, const uint8_t* data, size_t size);
  void OnClose(Stream& stream, uint32_t error_code);

 private:
  struct Connection {
    int fd = -1;
    SSL* tls = nullptr;
    nghttp2_session* session = nullptr;
    int open = 0;
    bool wants_write = false;
    // HTTP/1.1 only.
    Stream* stream = nullptr;
    std::string out, in;
  };

  void Open(int index);
  void StartTls(Connection& connection);
  ssize_t Send(Connection& connection);
  ssize_t Receive(Connection& connection);
  void Start();
  void StartGrpc(Connection& connection, Stream* stream);
  void StartHttp1(Connection& connection, Stream* stream);
  void Flush(int index);
  void Readable(int index);
  void OnEvents(Connection& connection);
  void Tokens(Stream& stream, int64_t count);
  void OnFirst(const Stream& stream, double now);
  void Finish(Stream& stream, const std::string& status, bool has_details);
  void Print(double seconds) const;
  std::string Ways() const;
  int64_t CountTokens(const uint8_t* data, size_t size) const;

  Options options_;
  int epoll_ = -1;
  SSL_CTX* tls_ = nullptr;
  uint64_t* control_ = nullptr;
  std::vector<Connection> connections_;
  std::deque<int> idle_;
  Result result_;
  double began_ = 0;
  double read_at_ = 0;  // when the bytes that are being parsed were read
  int run_ = static_cast<int>(getpid() % 1000000);
  size_t mark_at_ = std::string::npos;
  std::vector<uint8_t> buffer_ = std::vector<uint8_t>(1 << 18);
};

int OnHeaderCallback(nghttp2_session* session, const nghttp2_frame* frame, const uint8_t* name,
                     size_t name_size, const uint8_t* value, size_t value_size, uint8_t, void* user) {
  void* stream = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
  if (stream != nullptr) {
    static_cast<Load*>(user)->OnHeader(*static_cast<Stream*>(stream),
                                       {reinterpret_cast<const char*>(name), name_size},
                                       {reinterpret_cast<const char*>(value), value_size});
  }
  return 0;
}

int OnDataCallback(nghttp2_session* session, uint8_t, int32_t id, const uint8_t* data, size_t size,
                   void* user) {
  void* stream = nghttp2_session_get_stream_user_data(session, id);
  if (stream != nullptr) static_cast<Load*>(user)->OnData(*static_cast<Stream*>(stream), data, size);
  return 0;
}

int OnCloseCallback(nghttp2_session* session, int32_t id, uint32_t error_code, void* user) {
  void* stream = nghttp2_session_get_stream_user_data(session, id);
  if (stream != nullptr) static_cast<Load*>(user)->OnClose(*static_cast<Stream*>(stream), error_code);
  return 0;
}

int OnSentCallback(nghttp2_session* session, const nghttp2_frame* frame, void*) {
  if (frame->hd.type != NGHTTP2_HEADERS) return 0;
  void* stream = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
  if (stream != nullptr) static_cast<Stream*>(stream)->sent_at = Now();
  return 0;
}

ssize_t ReadBody(nghttp2_session*, int32_t, uint8_t* out, size_t size, uint32_t* flags,
                 nghttp2_data_source* source, void*) {
  auto& stream = *static_cast<Stream*>(source->ptr);
  const size_t count = std::min(size, stream.request.size() - stream.sent);
  std::memcpy(out, stream.request.data() + stream.sent, count);
  stream.sent += count;
  if (stream.sent == stream.request.size()) *flags |= NGHTTP2_DATA_FLAG_EOF;
  return static_cast<ssize_t>(count);
}

Load::Load(Options options) : options_(std::move(options)) {
  mark_at_ = options_.body.find(kMark);
  epoll_ = epoll_create1(0);
  if (options_.use_tls) {
    tls_ = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_mode(tls_, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    const unsigned char h2[] = {2, 'h', '2'};
    if (options_.is_grpc) SSL_CTX_set_alpn_protos(tls_, h2, sizeof h2);
  }
  if (!options_.control.empty()) {
    const int fd = open(options_.control.c_str(), O_RDWR);
    if (fd < 0) Fail(options_.control);
    void* page = mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED) Fail("mmap");
    control_ = static_cast<uint64_t*>(page);
    close(fd);
    if (!options_.is_probe) {
      std::memset(control_ + kStampsAt / sizeof(uint64_t), 0, kPageBytes - kStampsAt);
      __atomic_store_n(control_ + kRunField, static_cast<uint64_t>(getpid()) % 1000000, __ATOMIC_RELEASE);
    }
    run_ = static_cast<int>(__atomic_load_n(control_ + kRunField, __ATOMIC_ACQUIRE));
  }
  connections_.resize(static_cast<size_t>(options_.connections));
  for (int i = 0; i < options_.connections; ++i) Open(i);
}

void Load::Open(int index) {
  Connection& connection = connections_[static_cast<size_t>(index)];
  connection.fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(options_.port));
  inet_pton(AF_INET, options_.host.c_str(), &address.sin_addr);
  if (connect(connection.fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) Fail("connect");
  const int on = 1;
  setsockopt(connection.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (tls_ != nullptr) StartTls(connection);
  fcntl(connection.fd, F_SETFL, fcntl(connection.fd, F_GETFL) | O_NONBLOCK);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u32 = static_cast<uint32_t>(index);
  epoll_ctl(epoll_, EPOLL_CTL_ADD, connection.fd, &event);
  if (!options_.is_grpc) {
    idle_.push_back(index);
    return;
  }
  nghttp2_session_callbacks* callbacks = nullptr;
  nghttp2_session_callbacks_new(&callbacks);
  nghttp2_session_callbacks_set_on_header_callback(callbacks, OnHeaderCallback);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, OnDataCallback);
  nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, OnCloseCallback);
  nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, OnSentCallback);
  nghttp2_session_client_new(&connection.session, callbacks, this);
  nghttp2_session_callbacks_del(callbacks);
  const nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, 1 << 20},
                                             {NGHTTP2_SETTINGS_ENABLE_PUSH, 0}};
  nghttp2_submit_settings(connection.session, NGHTTP2_FLAG_NONE, settings, 2);
  nghttp2_session_set_local_window_size(connection.session, NGHTTP2_FLAG_NONE, 0, 1 << 28);
  Flush(index);
}

void Load::StartTls(Connection& connection) {
  connection.tls = SSL_new(tls_);
  SSL_set_fd(connection.tls, connection.fd);
  if (SSL_connect(connection.tls) != 1) Fail("TLS");
}

// As send and recv: -1 with EAGAIN when it would block.
ssize_t Load::Send(Connection& connection) {
  if (connection.tls == nullptr)
    return send(connection.fd, connection.out.data(), connection.out.size(), MSG_NOSIGNAL);
  const int count = SSL_write(connection.tls, connection.out.data(), static_cast<int>(connection.out.size()));
  if (count > 0) return count;
  errno = SSL_get_error(connection.tls, count) == SSL_ERROR_WANT_WRITE ? EAGAIN : EIO;
  return -1;
}

ssize_t Load::Receive(Connection& connection) {
  if (connection.tls == nullptr) return recv(connection.fd, buffer_.data(), buffer_.size(), 0);
  const int count = SSL_read(connection.tls, buffer_.data(), static_cast<int>(buffer_.size()));
  if (count > 0) return count;
  const int error = SSL_get_error(connection.tls, count);
  if (error == SSL_ERROR_ZERO_RETURN) return 0;
  errno = error == SSL_ERROR_WANT_READ ? EAGAIN : EIO;
  return -1;
}

void Load::Start() {
  auto* stream = new Stream;
  stream->request = options_.body;
  if (mark_at_ != std::string::npos) {
    char text[32];
    std::snprintf(text, sizeof text, "%06d%06lld", run_,
                  static_cast<long long>(result_.started) + (options_.is_probe ? kFirstOfProbe : 0));
    stream->request.replace(mark_at_, kMark.size(), text, kMark.size());
  }
  stream->connection = static_cast<int>(result_.started % options_.connections);
  stream->number = result_.started++;
  stream->began = Now();
  stream->due =
      options_.rate > 0 ? began_ + static_cast<double>(stream->number) / options_.rate : stream->began;
  if (options_.is_grpc) {
    StartGrpc(connections_[static_cast<size_t>(stream->connection)], stream);
  } else {
    stream->connection = idle_.front();
    idle_.pop_front();
    StartHttp1(connections_[static_cast<size_t>(stream->connection)], stream);
  }
}

void Load::StartGrpc(Connection& connection, Stream* stream) {
  const auto size = static_cast<uint32_t>(stream->request.size());
  std::string framed = {0, static_cast<char>(size >> 24), static_cast<char>(size >> 16),
                        static_cast<char>(size >> 8), static_cast<char>(size)};
  stream->request = framed + stream->request;
  auto header = [](std::string_view name, std::string_view value) {
    return nghttp2_nv{reinterpret_cast<uint8_t*>(const_cast<char*>(name.data())),
                      reinterpret_cast<uint8_t*>(const_cast<char*>(value.data())), name.size(), value.size(),
                      NGHTTP2_NV_FLAG_NONE};
  };
  const nghttp2_nv headers[] = {header(":method", "POST"),      header(":scheme", "http"),
                                header(":path", options_.path), header(":authority", "localhost"),
                                header("te", "trailers"),       header("content-type", "application/grpc")};
  nghttp2_data_provider provider{};
  provider.source.ptr = stream;
  provider.read_callback = ReadBody;
  stream->id = nghttp2_submit_request(connection.session, nullptr, headers, 6, &provider, stream);
  if (stream->id < 0) Fail("submit");
  ++connection.open;
}

void Load::StartHttp1(Connection& connection, Stream* stream) {
  connection.stream = stream;
  connection.out = "POST " + options_.path +
                   " HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: " +
                   std::to_string(stream->request.size()) + "\r\n\r\n" + stream->request;
}

void Load::Flush(int index) {
  Connection& connection = connections_[static_cast<size_t>(index)];
  for (;;) {
    if (connection.out.empty() && connection.session != nullptr) {
      const uint8_t* data = nullptr;
      for (ssize_t size; (size = nghttp2_session_mem_send(connection.session, &data)) > 0;) {
        connection.out.append(reinterpret_cast<const char*>(data), static_cast<size_t>(size));
        if (connection.out.size() > (1 << 16)) break;
      }
    }
    if (connection.out.empty()) break;
    const ssize_t sent = Send(connection);
    if (sent < 0 && errno == EAGAIN) break;
    if (sent < 0) Fail("send");
    connection.out.erase(0, static_cast<size_t>(sent));
  }
  const bool wants = !connection.out.empty();
  if (wants != connection.wants_write) {
    connection.wants_write = wants;
    epoll_event event{};
    event.events = wants ? EPOLLIN | EPOLLOUT : EPOLLIN;
    event.data.u32 = static_cast<uint32_t>(index);
    epoll_ctl(epoll_, EPOLL_CTL_MOD, connection.fd, &event);
  }
}

void Load::Readable(int index) {
  Connection& connection = connections_[static_cast<size_t>(index)];
  for (;;) {
    const ssize_t size = Receive(connection);
    if (size < 0 && errno == EAGAIN) return;
    if (size <= 0) Fail("the server closed a connection");
    read_at_ = Now();
    if (connection.session != nullptr) {
      if (nghttp2_session_mem_recv(connection.session, buffer_.data(), static_cast<size_t>(size)) < 0)
        Fail("HTTP/2");
    } else {
      connection.in.append(reinterpret_cast<const char*>(buffer_.data()), static_cast<size_t>(size));
      OnEvents(connection);
    }
    if (connection.tls == nullptr && size < static_cast<ssize_t>(buffer_.size())) return;
  }
}

// Each event is one line; words are counted by their leading spaces.
void Load::OnEvents(Connection& connection) {
  const size_t end = connection.in.rfind('\n');
  if (end == std::string::npos || connection.stream == nullptr) return;
  std::string_view lines(connection.in.data(), end + 1);
  bool is_done = false;
  std::string status = "OK";
  while (!lines.empty()) {
    const std::string_view line = lines.substr(0, lines.find('\n'));
    lines.remove_prefix(line.size() + 1);
    if (line.starts_with("HTTP/1.1 ") && !line.starts_with("HTTP/1.1 200")) {
      Finish(*connection.stream, std::string(line.substr(9, 3)), false);
      Fail("an HTTP error: " + connection.in);
    }
    if (!line.starts_with("data:")) continue;
    if (line.find("[DONE]") != std::string_view::npos) {
      is_done = true;
      continue;
    }
    size_t at = line.find("\"text\":");
    if (at == std::string_view::npos) continue;
    at = line.find('"', at + 7);
    int64_t words = 0;
    for (++at; at < line.size() && line[at] != '"'; ++at) words += line[at] == ' ';
    Tokens(*connection.stream, words);
  }
  connection.in.erase(0, end + 1);
  if (is_done) {
    Stream* stream = connection.stream;
    connection.stream = nullptr;
    idle_.push_back(static_cast<int>(&connection - connections_.data()));
    Finish(*stream, status, true);
    delete stream;
  }
}

void Load::OnHeader(Stream& stream, std::string_view name, std::string_view value) {
  if (name == "grpc-status") {
    stream.has_grpc_status = true;
    stream.grpc_status = std::atoi(std::string(value).c_str());
  } else if (name == "grpc-status-details-bin") {
    stream.has_details = true;
  }
}

void Load::OnData(Stream& stream, const uint8_t* data, size_t size) {
  stream.received.append(reinterpret_cast<const char*>(data), size);
  size_t at = 0;
  int64_t count = 0;
  while (stream.received.size() - at >= 5) {
    const auto* head = reinterpret_cast<const uint8_t*>(stream.received.data()) + at;
    const uint32_t length = static_cast<uint32_t>(head[1]) << 24 | static_cast<uint32_t>(head[2]) << 16 |
                            static_cast<uint32_t>(head[3]) << 8 | head[4];
    if (stream.received.size() - at - 5 < length) break;
    const int64_t found = CountTokens(head + 5, length);
    if (found > 0) ++result_.messages;
    count += found;
    at += 5 + length;
  }
  stream.received.erase(0, at);
  if (count > 0) Tokens(stream, count);
}

int64_t Load::CountTokens(const uint8_t* data, size_t size) const {
  size_t depth = 0;
  const uint8_t* end = data + size;
  auto varint = [&](uint64_t* out) {
    *out = 0;
    for (int shift = 0; data < end; shift += 7) {
      *out |= static_cast<uint64_t>(*data & 0x7f) << shift;
      if ((*data++ & 0x80) == 0) return true;
    }
    return false;
  };
  uint64_t tag = 0, length = 0;
  while (data < end && varint(&tag)) {
    const bool is_wanted = depth < options_.tokens_path.size() && tag >> 3 == options_.tokens_path[depth];
    switch (tag & 7) {
      case 0:
        if (!varint(&length)) return 0;
        if (is_wanted && depth + 1 == options_.tokens_path.size()) return 1;
        break;
      case 1:
        data += 8;
        break;
      case 5:
        data += 4;
        break;
      default:
        if (!varint(&length)) return 0;
        if (!is_wanted) {
          data += length;
        } else if (++depth == options_.tokens_path.size()) {
          return std::count_if(data, data + length, [](uint8_t byte) { return (byte & 0x80) == 0; });
        } else {
          end = data + length;
        }
    }
  }
  return 0;
}

void Load::Tokens(Stream& stream, int64_t count) {
  if (count == 0) return;
  const double now = Now();
  if (stream.tokens == 0) {
    stream.first = now;
    OnFirst(stream, now);
    if (++result_.with_tokens == options_.requests && result_.done == 0) {
      result_.full_from = now;
      result_.full_first = result_.tokens;
    }
  } else if (result_.gap_ms.size() < kMaxGaps) {
    result_.gap_ms.push_back(static_cast<float>((now - stream.last) * 1e3));
  }
  stream.last = now;
  stream.tokens += count;
  result_.tokens += count;
  if (!options_.is_grpc) ++result_.messages;
  if (control_ != nullptr && !options_.is_probe)
    __atomic_fetch_add(control_, static_cast<uint64_t>(count), __ATOMIC_RELEASE);
}

void Load::OnFirst(const Stream& stream, double now) {
  auto add = [](std::vector<float>& values, double seconds) {
    values.push_back(static_cast<float>(seconds * 1e3));
  };
  add(result_.first_ms, now - stream.due);
  if (control_ == nullptr || mark_at_ == std::string::npos) return;
  const size_t row =
      static_cast<size_t>(stream.number) % (kNumStamps / 2) + (options_.is_probe ? kNumStamps / 2 : 0);
  const uint64_t* stamps = control_ + kStampsAt / sizeof(uint64_t) + 2 * row;
  if (stamps[0] == 0 || stamps[1] == 0 || stream.sent_at == 0) return;
  const double up = static_cast<double>(stamps[0]) * 1e-9 - stream.sent_at;
  const double down = read_at_ - static_cast<double>(stamps[1]) * 1e-9;
  add(result_.up_ms, up);
  add(result_.down_ms, down);
  add(result_.added_ms, up + down);
  add(result_.late_ms, stream.sent_at - stream.due);
  add(result_.parse_ms, now - read_at_);
}

void Load::OnClose(Stream& stream, uint32_t error_code) {
  --connections_[static_cast<size_t>(stream.connection)].open;
  std::string status =
      stream.has_grpc_status ? std::to_string(stream.grpc_status) : "reset-" + std::to_string(error_code);
  if (status == "0") status = "OK";
  Finish(stream, status, stream.has_details);
  delete &stream;
}

void Load::Finish(Stream& stream, const std::string& status, bool has_details) {
  if (result_.done == 0) {
    result_.full_until = Now();
    result_.full_last = result_.tokens;
  }
  ++result_.done;
  ++result_.statuses[status];
  if (status != "OK" && !has_details) ++result_.without_details[status];
  const double now = Now();
  result_.end_ms.push_back(static_cast<float>((now - stream.began) * 1e3));
  if (status != "OK" && stream.sent_at > 0)
    result_.refused_ms.push_back(static_cast<float>((now - stream.sent_at) * 1e3));
}

void Load::Run() {
  began_ = Now();
  std::vector<epoll_event> events(256);
  while (result_.done < options_.requests) {
    const double elapsed = Now() - began_;
    if (elapsed > options_.timeout_s) break;
    int64_t may_start = options_.requests;
    double wait_s = .1;
    if (options_.rate > 0) {
      may_start = std::min(may_start, static_cast<int64_t>(elapsed * options_.rate) + 1);
      wait_s = std::clamp(static_cast<double>(may_start) / options_.rate - elapsed, 0.0, wait_s);
    }
    while (result_.started < may_start && result_.started - result_.done < options_.streams) Start();
    for (int i = 0; i < options_.connections; ++i) {
      Connection& connection = connections_[static_cast<size_t>(i)];
      if (!connection.wants_write &&
          (connection.session == nullptr ? !connection.out.empty()
                                         : nghttp2_session_want_write(connection.session)))
        Flush(i);
    }
    const timespec wait{0, static_cast<int64_t>(wait_s * 1e9)};
    const int count = epoll_pwait2(epoll_, events.data(), static_cast<int>(events.size()), &wait, nullptr);
    for (int i = 0; i < count; ++i) {
      const int index = static_cast<int>(events[static_cast<size_t>(i)].data.u32);
      if (events[static_cast<size_t>(i)].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) Readable(index);
      Flush(index);
    }
  }
  Print(Now() - began_);
}

float Percentile(std::vector<float> values, double share) {
  if (values.empty()) return 0;
  auto at = values.begin() + static_cast<ptrdiff_t>(share * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

// The parts of first tokens' ways, for the JSON object; nothing without stamps.
std::string Load::Ways() const {
  if (result_.added_ms.empty()) return {};
  std::string shown = "\"stamped\": " + std::to_string(result_.added_ms.size()) + ", ";
  auto show = [&shown](const char* name, const std::vector<float>& values) {
    char text[96];
    std::snprintf(text, sizeof text, "\"%s_ms\": [%.3f, %.3f], ", name, Percentile(values, .5),
                  Percentile(values, .99));
    shown += text;
  };
  show("added", result_.added_ms);
  show("up", result_.up_ms);
  show("down", result_.down_ms);
  show("late", result_.late_ms);
  show("parse", result_.parse_ms);
  return shown;
}

void Load::Print(double seconds) const {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const double cpu = static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                     static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
  const bool is_full = result_.full_from > 0 && result_.full_until > result_.full_from;
  auto counts = [](const std::map<std::string, int64_t>& map) {
    std::string out = "{";
    for (const auto& [name, count] : map) {
      out += (out.size() > 1 ? ", \"" : "\"") + name + "\": " + std::to_string(count);
    }
    return out + "}";
  };
  std::printf(
      "{\"seconds\": %.4f, \"requests\": %lld, \"done\": %lld, \"tokens\": %lld, \"messages\": %lld, "
      "\"statuses\": %s, "
      "\"without_details\": %s, \"ttft_ms\": [%.3f, %.3f], \"gap_ms\": [%.3f, %.3f], \"end_ms\": [%.3f, "
      "%.3f], \"refused_ms\": [%.3f, %.3f, %.3f], %s"
      "\"full_tokens\": %lld, \"full_seconds\": %.4f, \"client_cpu_s\": %.4f}\n",
      seconds, static_cast<long long>(result_.started), static_cast<long long>(result_.done),
      static_cast<long long>(result_.tokens), static_cast<long long>(result_.messages),
      counts(result_.statuses).c_str(), counts(result_.without_details).c_str(),
      Percentile(result_.first_ms, .5), Percentile(result_.first_ms, .99), Percentile(result_.gap_ms, .5),
      Percentile(result_.gap_ms, .99), Percentile(result_.end_ms, .5), Percentile(result_.end_ms, .99),
      Percentile(result_.refused_ms, .5), Percentile(result_.refused_ms, .99),
      Percentile(result_.refused_ms, 1), Ways().c_str(),
      static_cast<long long>(is_full ? result_.full_last - result_.full_first : 0),
      is_full ? result_.full_until - result_.full_from : 0.0, cpu);
}

Options Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string_view name = argv[i];
    const std::string value = argv[i + 1];
    if (name == "--host")
      options.host = value;
    else if (name == "--port")
      options.port = std::stoi(value);
    else if (name == "--kind")
      options.is_grpc = value == "grpc";
    else if (name == "--path")
      options.path = value;
    else if (name == "--streams")
      options.streams = std::stoi(value);
    else if (name == "--connections")
      options.connections = std::stoi(value);
    else if (name == "--requests")
      options.requests = std::stoll(value);
    else if (name == "--rate")
      options.rate = std::stod(value);
    else if (name == "--timeout")
      options.timeout_s = std::stod(value);
    else if (name == "--tls")
      options.use_tls = value == "1";
    else if (name == "--probe")
      options.is_probe = value == "1";
    else if (name == "--control")
      options.control = value;
    else if (name == "--body") {
      std::ifstream file(value, std::ios::binary);
      std::stringstream content;
      content << file.rdbuf();
      options.body = content.str();
    } else if (name == "--tokens-path") {
      std::stringstream parts(value);
      for (std::string part; std::getline(parts, part, '.');)
        options.tokens_path.push_back(static_cast<uint32_t>(std::stoul(part)));
    } else {
      std::fprintf(stderr, "load: unknown option %s\n", argv[i]);
      std::exit(2);
    }
  }
  if (options.requests == 0) options.requests = options.streams;
  if (!options.is_grpc) options.connections = options.streams;
  options.connections = std::min(options.connections, options.streams);
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  Load(Parse(argc, argv)).Run();
}
