// Hostile peers in numbers: the door must not crash, grow or keep a descriptor.
//
//   door_soak frames NUM [SEED]         random frames, valid, broken and senseless, into sessions in memory
//   door_soak connections NUM [SEED]    connections opened over TCP and dropped at any point
//   door_soak streams NUM               memory of NUM open streams on one connection
//
// Prints what it did and how the memory in use moved; exit code 1 if something was left behind.
#include <arpa/inet.h>
#include <dirent.h>
#include <malloc.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <random>
#include <thread>

#include "door/door.h"
#include "door_client.h"

using namespace twinjet::door;

namespace {

size_t BytesInUse() { return mallinfo2().uordblks + mallinfo2().hblkhd; }

std::string RandomFrame(std::mt19937_64& random) {
  const auto type = static_cast<uint8_t>(random() % 8 == 0 ? random() : random() % 10);
  const auto flags = static_cast<uint8_t>(random() % 2 ? random() : random() % 2 * 4 + random() % 2);
  const auto id = static_cast<uint32_t>(random() % 3 == 0 ? 0 : random() % 40);
  std::string payload;
  if (type == NGHTTP2_HEADERS && random() % 2) {
    payload = test::RawHeaderBlock(random() % 2 ? test::Fields{{"k-bin", "AAEC"}} : test::Fields{});
    return test::RawFrame(type, random() % 8 ? 4 : 5, id | 1, payload);
  }
  if (type == NGHTTP2_DATA && random() % 2) payload = test::Framed(std::string(random() % 200, 'm'));
  if (payload.empty()) {
    const size_t sizes[] = {0, 4, 5, 6, 8, 12, random() % 300};
    payload.resize(sizes[random() % 7]);
    for (char& c : payload) c = static_cast<char>(random());
  }
  return test::RawFrame(type, flags, id, payload);
}

int Frames(uint64_t num_frames, uint64_t seed) {
  std::mt19937_64 random(seed);
  Options options;
  options.max_message_bytes = 1 << 16;
  LoopState state;
  state.options = &options;
  state.totals = std::make_shared<Totals>();
  state.mailbox = std::make_shared<Mailbox>();
  state.now_ns = 1'000'000'000;
  uint64_t num_sent = 0;
  uint64_t num_sessions = 0;
  size_t first_use = 0;
  size_t most_use = 0;
  while (num_sent < num_frames) {
    Session session(&state, std::make_shared<ConnectionStats>("unix:"), std::make_shared<Client>());
    ++num_sessions;
    bool is_fed = session.Feed(test::RawOpening());
    std::string out;
    while (is_fed && !session.is_done() && num_sent < num_frames) {
      is_fed = session.Feed(RandomFrame(random));
      ++num_sent;
      if (num_sent % 4 == 0) {
        session.Pull(&out, 1 << 16);
        out.clear();
      }
      for (Event& event : std::exchange(state.events, {})) {
        if (event.kind == EventKind::kCall && random() % 2 && !event.call->is_over()) {
          Command command{CommandKind::kFinish, event.call, 0, 0, nullptr, std::make_unique<Status>()};
          session.Apply(command, {});
        }
      }
      state.now_ns += 1'000'000;
    }
    session.Pull(&out, 1 << 16);
    if (num_sessions % 1000 == 0) {
      const size_t use = BytesInUse();
      if (first_use == 0) first_use = use;
      most_use = std::max(most_use, use);
    }
  }
  state.events.clear();
  std::printf("%llu frames in %llu sessions; bytes in use %zu at first, at most %zu\n",
              static_cast<unsigned long long>(num_sent), static_cast<unsigned long long>(num_sessions),
              first_use, most_use);
  const bool is_clean = state.totals->calls == 0 && state.totals->received_bytes == 0 && state.timers.empty();
  return is_clean && most_use < first_use + (1 << 20) ? 0 : 1;
}

size_t NumDescriptors() {
  DIR* folder = opendir("/proc/self/fd");
  size_t count = 0;
  while (readdir(folder)) ++count;
  closedir(folder);
  return count;
}

int Connect(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<in_port_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  // Closed with a reset, so that the ports of dropped connections can be had again at once.
  const linger now{1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    std::perror("connect");
    std::exit(1);
  }
  return fd;
}

// Answers nothing.
struct Silent : EventSink {
  std::mutex mutex;
  std::vector<CallRef> calls;
  bool does_keep = false;
  void Deliver(std::vector<Event>& events) override {
    if (!does_keep) return;
    const std::lock_guard lock(mutex);
    for (Event& event : events) {
      if (event.kind == EventKind::kCall) calls.push_back(event.call);
    }
  }
};

bool ComesAbout(const std::function<bool()>& is_so) {
  for (int i = 0; i < 20'000; ++i) {
    if (is_so()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

int Connections(uint64_t num_connections, uint64_t seed) {
  std::mt19937_64 random(seed);
  Silent sink;
  Door door({}, &sink);
  int port = 0;
  door.Listen("127.0.0.1", &port, false);
  door.Start();
  const size_t num_before = NumDescriptors();
  size_t first_use = 0;
  for (uint64_t i = 0; i < num_connections; ++i) {
    const int fd = Connect(port);
    std::string bytes = test::RawOpening();
    bytes += test::RawFrame(NGHTTP2_HEADERS, 4, 1, test::RawHeaderBlock());
    bytes += test::RawFrame(NGHTTP2_DATA, 0, 1, test::Framed("x"));
    bytes.resize(random() % (bytes.size() + 1));
    send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    close(fd);
    if (i == 1000) first_use = BytesInUse();
  }
  const bool is_clean =
      ComesAbout([&] { return door.totals().connections == 0 && door.totals().calls == 0; }) &&
      ComesAbout([&] { return NumDescriptors() == num_before; });
  std::printf(
      "%llu connections, %lld accepted; descriptors %zu before, %zu after; bytes in use %zu, then %zu\n",
      static_cast<unsigned long long>(num_connections),
      static_cast<long long>(door.totals().connections_accepted.load()), num_before, NumDescriptors(),
      first_use, BytesInUse());
  return is_clean ? 0 : 1;
}

int Streams(size_t num_streams) {
  Silent sink;
  sink.does_keep = true;
  sink.calls.reserve(num_streams);
  Options options;
  options.max_streams = 1 << 20;
  options.max_calls = 1 << 20;
  Door door(options, &sink);
  int port = 0;
  door.Listen("127.0.0.1", &port, false);
  door.Start();
  const int fd = Connect(port);
  const std::string block = test::RawHeaderBlock({{"user-agent", "soak"}, {"grpc-timeout", "1H"}});
  const auto send_all = [fd](std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) std::exit(1);
      bytes.remove_prefix(static_cast<size_t>(sent));
    }
  };
  send_all(test::RawOpening());
  const auto num_calls = [&] {
    const std::lock_guard lock(sink.mutex);
    return sink.calls.size();
  };
  const size_t before = BytesInUse();
  const auto begun = std::chrono::steady_clock::now();
  std::string batch;
  for (size_t i = 0; i < num_streams; ++i) {
    const auto id = static_cast<uint32_t>(2 * i + 1);
    batch += test::RawFrame(NGHTTP2_HEADERS, 4, id, block);
    batch += test::RawFrame(NGHTTP2_DATA, NGHTTP2_FLAG_END_STREAM, id, test::Framed("question"));
    if (i % 64 == 63 || i + 1 == num_streams) send_all(std::exchange(batch, {}));
  }
  if (!ComesAbout([&] { return num_calls() == num_streams; })) return 1;
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begun;
  std::printf("%zu streams: %zu bytes each, %.0f begun a second\n", num_streams,
              (BytesInUse() - before) / num_streams, static_cast<double>(num_streams) / took.count());
  close(fd);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  mallopt(M_ARENA_MAX, 1);  // mallinfo2 tells of the first arena only
  const uint64_t number = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  const uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1;
  if (number > 0 && std::strcmp(argv[1], "frames") == 0) return Frames(number, seed);
  if (number > 0 && std::strcmp(argv[1], "connections") == 0) return Connections(number, seed);
  if (number > 0 && std::strcmp(argv[1], "streams") == 0) return Streams(number);
  std::fprintf(stderr, "usage: door_soak frames|connections|streams NUM [SEED]\n");
  return 2;
}
