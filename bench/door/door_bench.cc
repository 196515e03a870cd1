// What a message costs the native door, without anything of what messages mean.
//
//   door_bench serve STREAMS TOKENS BYTES [CERTIFICATE KEY]
//                                                a door whose handler is a thread that sends all streams one
//                                                constant message a step; prints its port
//   door_bench load PORT PID STREAMS CONNECTIONS TOKENS BYTES STEPS_FD [tls]
//                                                a client of any such server; prints what PID's CPU time was
//
// Steps are in lockstep: the client writes a byte to STEPS_FD (the server's standard input) when the last
// step has come to all streams, so that no message ever waits for another. bench/door/run.py runs both, and
// servers in Python beside them.
#include <arpa/inet.h>
#include <dirent.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <mutex>

#include "door/door.h"
#include "door_client.h"

using namespace twinjet::door;

namespace {

// Keeps the calls until all have come.
class Streams : public EventSink {
 public:
  explicit Streams(size_t num_streams) : num_streams_(num_streams) {}
  void Deliver(std::vector<Event>& events) override {
    const std::lock_guard lock(mutex_);
    for (Event& event : events) {
      if (event.kind == EventKind::kMessage) Acknowledge(event.call, event.bytes.size());
      if (event.kind == EventKind::kCall) calls_.push_back(event.call);
    }
    if (calls_.size() >= num_streams_) complete_.notify_one();
  }
  std::vector<CallRef> Take() {
    std::unique_lock lock(mutex_);
    complete_.wait(lock, [this] { return calls_.size() >= num_streams_; });
    return std::exchange(calls_, {});
  }

 private:
  const size_t num_streams_;
  std::mutex mutex_;
  std::condition_variable complete_;
  std::vector<CallRef> calls_;
};

std::string ReadFile(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// certificate, key: paths; null for plain text.
int Serve(size_t num_streams, int num_tokens, size_t num_bytes, const char* certificate, const char* key) {
  Streams streams(num_streams);
  Options options;
  options.max_streams = 1 << 20;
  Door door(options, &streams);
  int port = 0;
  if (certificate) door.UseTls({ReadFile(certificate), ReadFile(key), ""});
  door.Listen("127.0.0.1", &port, certificate != nullptr);
  door.Start();
  std::printf("%d\n", port);
  std::fflush(stdout);
  const std::string message(num_bytes, 'm');
  const std::vector<CallRef> calls = streams.Take();
  std::vector<Outgoing> step;
  for (const CallRef& call : calls) step.push_back({call, message});
  char done = 0;
  for (int i = 0; i < num_tokens; ++i) {
    door.WriteAll(step);
    if (read(STDIN_FILENO, &done, 1) != 1) return 1;
  }
  for (const CallRef& call : calls) Finish(call, {});
  return read(STDIN_FILENO, &done, 1) == 0 ? 0 : 1;
}

// Seconds of CPU that a process's threads have used. Threads must not end between two readings.
double CpuSeconds(const char* pid) {
  const std::string folder = std::string("/proc/") + pid + "/task";
  DIR* tasks = opendir(folder.c_str());
  double total = 0;
  while (const dirent* task = readdir(tasks)) {
    if (task->d_name[0] == '.') continue;
    std::ifstream stat(folder + "/" + task->d_name + "/schedstat");
    double ns = 0;
    if (stat >> ns) total += ns / 1e9;
  }
  closedir(tasks);
  return total;
}

int Connect(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<in_port_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    std::perror("connect");
    std::exit(1);
  }
  return fd;
}

// A blocking connection, with or without TLS.
class Socket {
 public:
  Socket(int port, SSL_CTX* tls) : fd(Connect(port)) {
    if (!tls) return;
    ssl_ = SSL_new(tls);
    SSL_set_fd(ssl_, fd);
    if (SSL_connect(ssl_) != 1) std::exit(1);
  }
  size_t Read(std::string* buffer) {
    const ssize_t size = ssl_ ? SSL_read(ssl_, buffer->data(), static_cast<int>(buffer->size()))
                              : recv(fd, buffer->data(), buffer->size(), 0);
    if (size <= 0) std::exit(1);
    return static_cast<size_t>(size);
  }
  void Write(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = ssl_ ? SSL_write(ssl_, bytes.data(), static_cast<int>(bytes.size()))
                                : send(fd, bytes.data(), bytes.size(), 0);
      if (sent <= 0) std::exit(1);
      bytes.remove_prefix(static_cast<size_t>(sent));
    }
  }
  bool has_pending() const { return ssl_ && SSL_pending(ssl_) > 0; }

  const int fd;

 private:
  SSL* ssl_ = nullptr;
};

SSL_CTX* ClientTls() {
  SSL_CTX* context = SSL_CTX_new(TLS_client_method());
  const unsigned char h2[] = {2, 'h', '2'};
  SSL_CTX_set_alpn_protos(context, h2, sizeof h2);
  return context;
}

int Load(int port, const char* pid, size_t num_streams, size_t num_connections, size_t num_tokens,
         size_t num_bytes, int steps_fd, bool does_use_tls) {
  SSL_CTX* const tls = does_use_tls ? ClientTls() : nullptr;
  std::vector<Socket> connections;
  std::vector<std::unique_ptr<test::Http2Client>> clients;
  std::vector<pollfd> sockets;
  for (size_t i = 0; i < num_connections; ++i) {
    clients.push_back(std::make_unique<test::Http2Client>());
    clients.back()->does_keep_data = false;
    connections.emplace_back(port, tls);
    sockets.push_back({connections.back().fd, POLLIN, 0});
  }
  const auto flush = [&](size_t i) { connections[i].Write(clients[i]->Pull()); };
  size_t num_bytes_seen = 0;
  size_t num_closed = 0;
  std::string buffer(1 << 16, '\0');
  const auto turn = [&] {
    poll(sockets.data(), sockets.size(), -1);
    for (size_t i = 0; i < sockets.size(); ++i) {
      if (!sockets[i].revents) continue;
      num_bytes_seen -= clients[i]->num_data_bytes;
      num_closed -= clients[i]->num_closed;
      do {
        clients[i]->Feed(std::string_view(buffer).substr(0, connections[i].Read(&buffer)));
      } while (connections[i].has_pending());
      num_bytes_seen += clients[i]->num_data_bytes;
      num_closed += clients[i]->num_closed;
      flush(i);
    }
  };
  for (size_t i = 0; i < num_connections; ++i) flush(i);
  const double cpu_before = CpuSeconds(pid);
  const auto wall_before = std::chrono::steady_clock::now();
  for (size_t i = 0; i < num_streams; ++i) clients[i % num_connections]->Ask("/bench.Bench/Stream", "x");
  for (size_t i = 0; i < num_connections; ++i) flush(i);
  const size_t step_bytes = num_streams * (num_bytes + kPrefixBytes);
  for (size_t step = 1; step <= num_tokens; ++step) {
    while (num_bytes_seen < step * step_bytes) turn();
    if (write(steps_fd, "s", 1) != 1) return 1;
  }
  while (num_closed < num_streams) turn();
  const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - wall_before;
  const double cpu = CpuSeconds(pid) - cpu_before;
  const auto num_messages = static_cast<double>(num_streams * num_tokens);
  std::printf("{\"streams\": %zu, \"connections\": %zu, \"us_per_message\": %.3f, \"wall_s\": %.3f}\n",
              num_streams, num_connections, cpu / num_messages * 1e6, wall.count());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const auto number = [&](int i) { return std::strtoull(argv[i], nullptr, 10); };
  if ((argc == 5 || argc == 7) && std::strcmp(argv[1], "serve") == 0) {
    return Serve(number(2), static_cast<int>(number(3)), number(4), argc == 7 ? argv[5] : nullptr,
                 argc == 7 ? argv[6] : nullptr);
  }
  if ((argc == 9 || argc == 10) && std::strcmp(argv[1], "load") == 0) {
    return Load(static_cast<int>(number(2)), argv[3], number(4), number(5), number(6), number(7),
                static_cast<int>(number(8)), argc == 10);
  }
  std::fprintf(stderr,
               "usage: door_bench serve STREAMS TOKENS BYTES [CERTIFICATE KEY]\n"
               "       door_bench load PORT PID STREAMS CONNECTIONS TOKENS BYTES STEPS_FD [tls]\n");
  return 2;
}
