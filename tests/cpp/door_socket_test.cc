// The whole door over real sockets, with threads: answers from several, TLS, limits, ends.
#include <arpa/inet.h>
#include <dirent.h>
#include <netinet/in.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <ctime>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "check.h"
#include "door/door.h"
#include "door_client.h"

using namespace twinjet::door;

namespace {

using Clock = std::chrono::steady_clock;
constexpr int kPatienceMs = 20'000;

// Hands events to a thread of its own, as a server's handlers would have it.
class Handlers : public EventSink {
 public:
  using Handle = std::function<void(Event&)>;
  explicit Handlers(Handle handle) : handle_(std::move(handle)), thread_([this] { Run(); }) {}
  ~Handlers() override {
    {
      const std::lock_guard lock(mutex_);
      is_ended_ = true;
    }
    came_.notify_all();
    thread_.join();
  }
  void Deliver(std::vector<Event>& events) override {
    {
      const std::lock_guard lock(mutex_);
      for (Event& event : events) queue_.push_back(std::move(event));
    }
    came_.notify_one();
  }

 private:
  void Run() {
    std::unique_lock lock(mutex_);
    while (true) {
      came_.wait(lock, [this] { return is_ended_ || !queue_.empty(); });
      if (queue_.empty()) return;
      Event event = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      handle_(event);
      event.call.reset();
      lock.lock();
    }
  }

  Handle handle_;
  std::mutex mutex_;
  std::condition_variable came_;
  std::deque<Event> queue_;
  bool is_ended_ = false;
  std::thread thread_;
};

// Answers each message with itself, and ends when the client does.
void Echo(Event& event) {
  if (event.kind == EventKind::kMessage) {
    Write(event.call, event.bytes);
    Acknowledge(event.call, event.bytes.size());
  } else if (event.kind == EventKind::kHalfClosed) {
    Finish(event.call, {});
  }
}

// A blocking socket, plain or with TLS, and the HTTP/2 client on it.
class SocketClient {
 public:
  explicit SocketClient(int fd, SSL_CTX* tls = nullptr) : fd_(fd) {
    if (!tls) return;
    ssl_ = SSL_new(tls);
    SSL_set_fd(ssl_, fd_);
    is_tls_good_ = SSL_connect(ssl_) == 1;
  }
  ~SocketClient() {
    SSL_free(ssl_);
    close(fd_);
  }
  SocketClient(const SocketClient&) = delete;
  SocketClient& operator=(const SocketClient&) = delete;

  bool is_tls_good() const { return is_tls_good_; }
  SSL* ssl() { return ssl_; }
  void Flush() { SendRaw(http2.Pull()); }
  void SendRaw(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = ssl_ ? SSL_write(ssl_, bytes.data(), static_cast<int>(bytes.size()))
                                : send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return;
      bytes.remove_prefix(static_cast<size_t>(sent));
    }
  }
  // Some bytes, or none if the connection has ended.
  std::string Receive() {
    if (!ssl_ || SSL_pending(ssl_) == 0) {
      pollfd what{fd_, POLLIN, 0};
      if (poll(&what, 1, kPatienceMs) != 1) throw test::Failure{"nothing came in time"};
    }
    std::string out(65536, '\0');
    const ssize_t size = ssl_ ? SSL_read(ssl_, out.data(), static_cast<int>(out.size()))
                              : recv(fd_, out.data(), out.size(), 0);
    out.resize(size > 0 ? static_cast<size_t>(size) : 0);
    return out;
  }
  void Until(const std::function<bool()>& is_so) {
    Flush();
    while (!is_so()) {
      const std::string bytes = Receive();
      if (bytes.empty()) throw test::Failure{"the connection ended early"};
      http2.Feed(bytes);
      Flush();
    }
  }
  // When the kernel had the next bytes to come, by its own clock, in ns. From now on it notes that of each
  // segment.
  void NoteArrivals() {
    const int on = 1;
    setsockopt(fd_, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
  }
  int64_t NextArrival() {
    pollfd what{fd_, POLLIN, 0};
    if (poll(&what, 1, kPatienceMs) != 1) throw test::Failure{"nothing came in time"};
    char bytes[16];
    alignas(cmsghdr) char control[64];
    iovec part{bytes, sizeof bytes};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    if (recvmsg(fd_, &message, MSG_PEEK) <= 0) throw test::Failure{"the connection ended early"};
    for (cmsghdr* one = CMSG_FIRSTHDR(&message); one != nullptr; one = CMSG_NXTHDR(&message, one)) {
      if (one->cmsg_type != SO_TIMESTAMPNS) continue;
      timespec at{};
      std::memcpy(&at, CMSG_DATA(one), sizeof at);
      return int64_t{at.tv_sec} * 1'000'000'000 + at.tv_nsec;
    }
    return 0;  // a kernel, or what stands for one, that notes no times
  }
  // What comes until the other side closes.
  std::string UntilEnd() {
    std::string all;
    for (std::string bytes; !(bytes = Receive()).empty();) all += bytes;
    return all;
  }

  test::Http2Client http2;

 private:
  const int fd_;
  SSL* ssl_ = nullptr;
  bool is_tls_good_ = true;
};

int ConnectTcp(int port, const char* from = "127.0.0.1") {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  inet_pton(AF_INET, from, &address.sin_addr);
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address);
  address.sin_port = htons(static_cast<in_port_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    close(fd);
    throw test::Failure{"cannot connect"};
  }
  return fd;
}

int ConnectTcp6(int port) {
  sockaddr_in6 address{};
  address.sin6_family = AF_INET6;
  address.sin6_port = htons(static_cast<in_port_t>(port));
  address.sin6_addr = in6addr_loopback;
  const int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    close(fd);
    return -1;
  }
  return fd;
}

int ConnectUnix(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    close(fd);
    throw test::Failure{"cannot connect to " + path};
  }
  return fd;
}

size_t NumDescriptors() {
  DIR* folder = opendir("/proc/self/fd");
  size_t count = 0;
  while (readdir(folder)) ++count;
  closedir(folder);
  return count;
}

void WaitUntil(const std::function<bool()>& is_so) {
  const auto end = Clock::now() + std::chrono::milliseconds(kPatienceMs);
  while (!is_so()) {
    if (Clock::now() > end) throw test::Failure{"it did not come about in time"};
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

struct Server {
  explicit Server(Options options = {}, Handlers::Handle handle = Echo, const TlsSettings* tls = nullptr,
                  const std::string& host = "127.0.0.1")
      : handlers(std::move(handle)), door(std::move(options), &handlers) {
    if (tls) door.UseTls(*tls);
    door.Listen(host, &port, tls != nullptr);
    door.Start();
  }
  Handlers handlers;
  Door door;
  int port = 0;
};

void CheckEcho(SocketClient& client, size_t size = 10) {
  const std::string text(size, 'e');
  const int32_t id = client.http2.Ask("/echo/Echo", text);
  client.Until([&] { return client.http2.answer(id).is_closed; });
  CHECK_EQ(client.http2.answer(id).status(), 0);
  CHECK_EQ(client.http2.answer(id).messages().at(0), text);
}

struct Certificate {
  std::string key;
  std::string pem;
};

Certificate MakeCertificate(const char* name) {
  EVP_PKEY* key = EVP_EC_gen("P-256");
  X509* certificate = X509_new();
  X509_set_version(certificate, 2);
  ASN1_INTEGER_set(X509_get_serialNumber(certificate),
                   static_cast<long>(std::hash<std::string>()(name) % 1000000));
  X509_gmtime_adj(X509_getm_notBefore(certificate), -60);
  X509_gmtime_adj(X509_getm_notAfter(certificate), 86400);
  X509_set_pubkey(certificate, key);
  X509_NAME* subject = X509_get_subject_name(certificate);
  X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC, reinterpret_cast<const unsigned char*>(name), -1,
                             -1, 0);
  X509_set_issuer_name(certificate, subject);
  X509_sign(certificate, key, EVP_sha256());
  const auto text = [](const std::function<void(BIO*)>& write) {
    BIO* bio = BIO_new(BIO_s_mem());
    write(bio);
    char* data = nullptr;
    const long size = BIO_get_mem_data(bio, &data);
    std::string out(data, static_cast<size_t>(size));
    BIO_free(bio);
    return out;
  };
  Certificate made{
      text([&](BIO* bio) { PEM_write_bio_PrivateKey(bio, key, nullptr, nullptr, 0, nullptr, nullptr); }),
      text([&](BIO* bio) { PEM_write_bio_X509(bio, certificate); })};
  X509_free(certificate);
  EVP_PKEY_free(key);
  return made;
}

std::shared_ptr<SSL_CTX> ClientTls(const Certificate* own, const char* protocol = "\x02h2") {
  std::shared_ptr<SSL_CTX> context(SSL_CTX_new(TLS_client_method()), &SSL_CTX_free);
  SSL_CTX_set_alpn_protos(context.get(), reinterpret_cast<const unsigned char*>(protocol),
                          static_cast<unsigned int>(std::strlen(protocol)));
  if (own) {
    BIO* bio = BIO_new_mem_buf(own->pem.data(), static_cast<int>(own->pem.size()));
    X509* certificate = PEM_read_bio_X509(bio, nullptr, nullptr, nullptr);
    SSL_CTX_use_certificate(context.get(), certificate);
    X509_free(certificate);
    BIO_free(bio);
    bio = BIO_new_mem_buf(own->key.data(), static_cast<int>(own->key.size()));
    EVP_PKEY* key = PEM_read_bio_PrivateKey(bio, nullptr, nullptr, nullptr);
    SSL_CTX_use_PrivateKey(context.get(), key);
    EVP_PKEY_free(key);
    BIO_free(bio);
  }
  return context;
}

std::string ServerName(SocketClient& client) {
  X509* certificate = SSL_get1_peer_certificate(client.ssl());
  char name[100] = {};
  X509_NAME_get_text_by_NID(X509_get_subject_name(certificate), NID_commonName, name, sizeof name);
  X509_free(certificate);
  return name;
}

}  // namespace

TEST(calls_are_answered_over_tcp) {
  Server server;
  SocketClient client(ConnectTcp(server.port));
  CheckEcho(client);
  CheckEcho(client, 3 << 20);
  CHECK_EQ(server.door.totals().calls_succeeded.load(), 2);
  CHECK_EQ(server.door.connections().size(), 1u);
  CHECK(server.door.connections()[0].second->peer.starts_with("ipv4:127.0.0.1:"));
}

TEST(a_dual_stack_address_serves_both_families) {
  Server server({}, Echo, nullptr, "[::]");
  SocketClient v4(ConnectTcp(server.port));
  CheckEcho(v4);
  CHECK(server.door.connections()[0].second->peer.starts_with("ipv4:127.0.0.1:"));
  const int fd = ConnectTcp6(server.port);
  if (fd < 0) return;  // a machine without IPv6
  SocketClient v6(fd);
  CheckEcho(v6);
}

TEST(unix_sockets_serve_and_are_removed) {
  const std::string path = std::filesystem::temp_directory_path() / ("door_test." + std::to_string(getpid()));
  for (int round = 0; round < 2; ++round) {
    Server server({}, Echo, nullptr, "unix:" + path);
    SocketClient client(ConnectUnix(path));
    CheckEcho(client);
    CHECK_EQ(server.door.connections()[0].second->peer, "unix:");
    server.door.Stop(1);
    CHECK(access(path.c_str(), F_OK) != 0);
  }
  {
    // One that a killed server left behind is replaced, one that is in use is not.
    Server first({}, Echo, nullptr, "unix:" + path);
    bool is_refused = false;
    try {
      Server second({}, Echo, nullptr, "unix:" + path);
    } catch (const std::system_error&) {
      is_refused = true;
    }
    CHECK(is_refused);
  }
}

TEST(a_port_in_use_is_an_error) {
  Server server;
  Handlers handlers(Echo);
  Door other({}, &handlers);
  bool is_refused = false;
  try {
    other.Listen("127.0.0.1", &server.port, false);
  } catch (const std::system_error& error) {
    is_refused = error.code().value() == EADDRINUSE;
  }
  CHECK(is_refused);
}

TEST(several_threads_write_to_calls_of_several_loops) {
  constexpr size_t kCalls = 64;
  constexpr size_t kMessages = 200;
  std::mutex mutex;
  std::condition_variable came;
  std::vector<CallRef> calls;
  Options options;
  options.num_threads = 3;
  Server server(options, [&](Event& event) {
    if (event.kind != EventKind::kCall) return;
    const std::lock_guard lock(mutex);
    calls.push_back(event.call);
    came.notify_all();
  });
  std::vector<std::unique_ptr<SocketClient>> clients;
  std::vector<std::pair<SocketClient*, int32_t>> asked;
  for (int i = 0; i < 8; ++i) {
    clients.push_back(std::make_unique<SocketClient>(ConnectTcp(server.port)));
    for (size_t k = 0; k < kCalls / 8; ++k) {
      asked.emplace_back(clients.back().get(), clients.back()->http2.Ask("/a/b", "x"));
    }
    clients.back()->Flush();
  }
  {
    std::unique_lock lock(mutex);
    CHECK(
        came.wait_for(lock, std::chrono::milliseconds(kPatienceMs), [&] { return calls.size() == kCalls; }));
  }
  // Each call belongs to one writer, so that the order of its messages is known.
  std::vector<std::thread> writers;
  for (size_t w = 0; w < 4; ++w) {
    writers.emplace_back([&, w] {
      for (size_t k = 0; k < kMessages; ++k) {
        const std::string text = std::to_string(k);
        std::vector<Outgoing> step;
        for (size_t i = w; i < kCalls; i += 4) step.push_back({calls[i], text});
        server.door.WriteAll(step);
      }
      for (size_t i = w; i < kCalls; i += 4) Finish(calls[i], {});
    });
  }
  for (auto& [client, id] : asked) {
    client->Until([&] { return client->http2.answer(id).is_closed; });
    const std::vector<std::string> messages = client->http2.answer(id).messages();
    CHECK_EQ(messages.size(), kMessages);
    for (size_t k = 0; k < kMessages; ++k) CHECK_EQ(messages[k], std::to_string(k));
  }
  for (std::thread& writer : writers) writer.join();
}

TEST(a_step_leaves_in_one_piece_a_connection) {
  std::mutex mutex;
  std::vector<CallRef> calls;
  Server server({}, [&](Event& event) {
    const std::lock_guard lock(mutex);
    if (event.kind == EventKind::kCall) calls.push_back(event.call);
  });
  SocketClient client(ConnectTcp(server.port));
  std::vector<int32_t> ids;
  for (int i = 0; i < 100; ++i) ids.push_back(client.http2.Ask("/a/b", "x"));
  client.Flush();
  WaitUntil([&] {
    const std::lock_guard lock(mutex);
    return calls.size() == ids.size();
  });
  std::vector<Outgoing> step;
  for (const CallRef& call : calls) step.push_back({call, "token"});
  server.door.WriteAll(step);
  client.Until([&] { return client.http2.num_data_frames > 0; });
  CHECK_EQ(client.http2.num_data_frames, ids.size());
}

TEST(a_first_message_leaves_before_the_others_of_a_step) {
  constexpr size_t kNumCalls = 8;
  std::mutex mutex;
  std::map<std::string, CallRef> calls;
  Server server({}, [&](Event& event) {
    const std::lock_guard lock(mutex);
    if (event.kind == EventKind::kMessage) calls[event.bytes] = event.call;
  });
  std::vector<std::unique_ptr<SocketClient>> clients;
  std::vector<int32_t> ids;
  for (size_t i = 0; i < kNumCalls; ++i) {
    clients.push_back(std::make_unique<SocketClient>(ConnectTcp(server.port)));
    clients.back()->NoteArrivals();
    ids.push_back(clients.back()->http2.Ask("/p/Stream", std::to_string(i)));
    clients.back()->Flush();
  }
  WaitUntil([&] {
    const std::lock_guard lock(mutex);
    return calls.size() == kNumCalls;
  });
  std::vector<Outgoing> step;
  for (size_t i = 0; i < kNumCalls; ++i) step.push_back({calls[std::to_string(i)], "token"});
  // All but the last have begun.
  for (size_t i = 0; i + 1 < kNumCalls; ++i) {
    Write(step[i].call, "first");
    clients[i]->Until([&] { return !clients[i]->http2.answer(ids[i]).messages().empty(); });
  }
  // The last one's headers would come before its message, and be taken for it.
  SendHeaders(step.back().call, {});
  clients.back()->Until([&] { return !clients.back()->http2.answer(ids.back()).headers.empty(); });
  server.door.WriteAll(step);
  const int64_t first = clients.back()->NextArrival();
  for (size_t i = 0; first > 0 && i + 1 < kNumCalls; ++i) CHECK(clients[i]->NextArrival() > first);
}

// All leave in the same batches; most need several, since flow control lets them have less at once.
TEST(connections_that_send_at_once_keep_their_bytes_apart) {
  const Certificate ours = MakeCertificate("server");
  const TlsSettings settings{ours.pem, ours.key, ""};
  const std::shared_ptr<SSL_CTX> tls = ClientTls(nullptr);
  for (const bool does_use_tls : {false, true}) {
    std::mutex mutex;
    std::vector<CallRef> calls;
    Server server(
        {},
        [&](Event& event) {
          const std::lock_guard lock(mutex);
          if (event.kind == EventKind::kCall) calls.push_back(event.call);
        },
        does_use_tls ? &settings : nullptr);
    constexpr size_t kClients = 70;
    std::deque<SocketClient> clients;
    for (size_t i = 0; i < kClients; ++i) {
      SocketClient& client =
          clients.emplace_back(ConnectTcp(server.port), does_use_tls ? tls.get() : nullptr);
      client.http2.Ask("/a/b", "x");
      client.Flush();
      WaitUntil([&] {
        const std::lock_guard lock(mutex);
        return calls.size() == i + 1;
      });
    }
    std::vector<std::string> texts;
    std::vector<Outgoing> step;
    for (size_t i = 0; i < kClients; ++i) {
      texts.emplace_back(i % 3 == 0 ? 20 : 150'000, static_cast<char>('0' + i));
    }
    for (size_t i = 0; i < kClients; ++i) step.push_back({calls[i], texts[i]});
    server.door.WriteAll(step);
    for (const CallRef& call : calls) Finish(call, {});
    for (size_t i = 0; i < kClients; ++i) {
      clients[i].Until([&] { return clients[i].http2.answer(1).is_closed; });
      CHECK_EQ(clients[i].http2.answer(1).status(), 0);
      CHECK(clients[i].http2.answer(1).messages() == std::vector<std::string>{texts[i]});
    }
  }
}

TEST(tls_needs_no_restart_to_change_its_certificate) {
  const Certificate first = MakeCertificate("first");
  const Certificate second = MakeCertificate("second");
  const TlsSettings settings{first.pem, first.key, ""};
  Server server({}, Echo, &settings);
  const std::shared_ptr<SSL_CTX> tls = ClientTls(nullptr);
  SocketClient old_client(ConnectTcp(server.port), tls.get());
  CHECK(old_client.is_tls_good());
  CHECK_EQ(ServerName(old_client), "first");
  CheckEcho(old_client, 1 << 20);
  bool is_refused = false;
  try {
    server.door.UseTls({second.pem, first.key, ""});
  } catch (const std::invalid_argument&) {
    is_refused = true;
  }
  CHECK(is_refused);
  server.door.UseTls({second.pem, second.key, ""});
  SocketClient new_client(ConnectTcp(server.port), tls.get());
  CHECK_EQ(ServerName(new_client), "second");
  CheckEcho(new_client);
  CheckEcho(old_client);
}

TEST(mutual_tls_wants_a_certificate_of_its_own) {
  const Certificate ours = MakeCertificate("server");
  const Certificate known = MakeCertificate("client");
  const Certificate stranger = MakeCertificate("stranger");
  const TlsSettings settings{ours.pem, ours.key, known.pem};
  Server server({}, Echo, &settings);
  SocketClient good(ConnectTcp(server.port), ClientTls(&known).get());
  CheckEcho(good);
  for (const Certificate* own : {static_cast<const Certificate*>(nullptr), &stranger}) {
    SocketClient bad(ConnectTcp(server.port), ClientTls(own).get());
    bad.http2.Ask("/a/b", "x");
    bad.Flush();
    CHECK_EQ(bad.UntilEnd(), "");
  }
  CheckEcho(good);
  CHECK_EQ(server.door.totals().calls_started.load(), 2);
}

TEST(http1_clients_get_a_sentence_with_and_without_tls) {
  const Certificate ours = MakeCertificate("server");
  const TlsSettings settings{ours.pem, ours.key, ""};
  Server plain;
  Server tls({}, Echo, &settings);
  SocketClient one(ConnectTcp(plain.port));
  SocketClient other(ConnectTcp(tls.port), ClientTls(nullptr, "\x08http/1.1").get());
  for (SocketClient* client : {&one, &other}) {
    client->SendRaw("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    CHECK(client->UntilEnd().find("gRPC") != std::string::npos);
  }
  // Plain text on a TLS port, and a client whose ALPN we do not know.
  SocketClient confused(ConnectTcp(tls.port));
  confused.http2.Ask("/a/b", "x");
  confused.Flush();
  confused.UntilEnd();
  CHECK(!SocketClient(ConnectTcp(tls.port), ClientTls(nullptr, "\x04smtp").get()).is_tls_good());
  WaitUntil([&] { return plain.door.totals().connections == 0 && tls.door.totals().connections == 0; });
}

TEST(connections_beyond_the_limit_are_turned_away) {
  Options options;
  options.max_connections = 2;
  Server server(options);
  auto first = std::make_unique<SocketClient>(ConnectTcp(server.port));
  SocketClient second(ConnectTcp(server.port));
  CheckEcho(*first);
  CheckEcho(second);
  SocketClient third(ConnectTcp(server.port));
  CHECK_EQ(third.UntilEnd(), "");
  first.reset();
  WaitUntil([&] { return server.door.totals().connections == 1; });
  SocketClient fourth(ConnectTcp(server.port));
  CheckEcho(fourth);
}

TEST(one_address_cannot_take_all_connections) {
  Options options;
  options.max_address_connections = 2;
  options.num_threads = 2;
  Server server(options);
  const auto connect_from = [&](const char* address) {
    return std::make_unique<SocketClient>(ConnectTcp(server.port, address));
  };
  auto first = connect_from("127.0.0.1");
  auto second = connect_from("127.0.0.1");
  CheckEcho(*first);
  CheckEcho(*second);
  CHECK_EQ(connect_from("127.0.0.1")->UntilEnd(), "");
  auto other = connect_from("127.0.0.2");
  CheckEcho(*other);
  first.reset();
  WaitUntil([&] { return server.door.totals().connections == 2; });
  first = connect_from("127.0.0.1");
  CheckEcho(*first);
  CHECK_EQ(connect_from("127.0.0.1")->UntilEnd(), "");
  CHECK_EQ(server.door.totals().connections_refused.load(), 2);
}

sockaddr_storage Address(int family, const char* text, uint32_t zone = 0) {
  sockaddr_storage address{};
  address.ss_family = static_cast<sa_family_t>(family);
  if (family == AF_INET) {
    CHECK_EQ(inet_pton(family, text, &reinterpret_cast<sockaddr_in&>(address).sin_addr), 1);
  } else if (family == AF_INET6) {
    auto& v6 = reinterpret_cast<sockaddr_in6&>(address);
    CHECK_EQ(inet_pton(family, text, &v6.sin6_addr), 1);
    v6.sin6_scope_id = zone;
  }
  return address;
}

TEST(an_ipv6_network_counts_as_one_address) {
  const auto client = [](const char* text, int prefix = 64, uint32_t zone = 0) {
    return ClientKey(Address(AF_INET6, text, zone), prefix);
  };
  CHECK(client("2001:db8:1:2::1") == client("2001:db8:1:2:ffff::9"));
  CHECK(client("2001:db8:1:2::1") != client("2001:db8:1:3::1"));
  CHECK(client("2001:db8::1", 128) != client("2001:db8::2", 128));
  CHECK(client("2001:db8:1:12::", 60) == client("2001:db8:1:1f::", 60));
  CHECK(client("2001:db8:1:12::", 60) != client("2001:db8:1:2f::", 60));
  CHECK(client("2001:db8:1:12::", 57) == client("2001:db8:1:7f::", 57));
  CHECK(client("2001:db8:1:12::", 57) != client("2001:db8:1:80::", 57));
  CHECK(client("fe80::1", 64, 2) == client("fe80::2", 64, 2));
  CHECK(client("fe80::1", 64, 2) != client("fe80::1", 64, 3));
  // Whichever socket an IPv4 client came through.
  const std::string v4 = ClientKey(Address(AF_INET, "192.0.2.1"), 64);
  CHECK(client("::ffff:192.0.2.1") == v4);
  CHECK(client("::ffff:192.0.2.2") != v4);
  CHECK_EQ(ClientKey(Address(AF_UNIX, ""), 64), "");
}

TEST(peers_are_named_as_grpc_names_them) {
  CHECK_EQ(PeerName(Address(AF_INET, "192.0.2.1")), "ipv4:192.0.2.1:0");
  CHECK_EQ(PeerName(Address(AF_INET6, "::ffff:192.0.2.1")), "ipv4:192.0.2.1:0");
  CHECK_EQ(PeerName(Address(AF_INET6, "2001:db8::1")), "ipv6:%5B2001:db8::1%5D:0");
  CHECK_EQ(PeerName(Address(AF_INET6, "fe80::1", 2)), "ipv6:%5Bfe80::1%252%5D:0");
  CHECK_EQ(PeerName(Address(AF_UNIX, "")), "unix:");
}

TEST(connections_that_end_while_they_wait_to_be_sent_to_harm_nobody) {
  constexpr int kNumClients = 60;
  std::mutex mutex;
  std::vector<CallRef> calls;
  Server server({}, [&](Event& event) {
    const std::lock_guard lock(mutex);
    if (event.kind == EventKind::kMessage) calls.push_back(event.call);
  });
  std::vector<std::unique_ptr<SocketClient>> clients;
  for (int i = 0; i < kNumClients; ++i) {
    clients.push_back(std::make_unique<SocketClient>(ConnectTcp(server.port)));
    clients.back()->http2.Ask("/p/Stream", "x");
    clients.back()->Flush();
  }
  WaitUntil([&] {
    const std::lock_guard lock(mutex);
    return calls.size() == kNumClients;
  });
  // So much that a step is sent in several turns.
  const std::string text(100'000, 's');
  std::vector<Outgoing> step;
  for (const CallRef& call : calls) step.push_back({call, text});
  while (!clients.empty()) {
    server.door.WriteAll(step);
    clients.pop_back();
  }
  WaitUntil([&] { return server.door.totals().connections == 0; });
  step.clear();
  calls.clear();
  SocketClient late(ConnectTcp(server.port));
  const int32_t id = late.http2.Ask("/p/Stream", "x");
  late.Flush();
  WaitUntil([&] {
    const std::lock_guard lock(mutex);
    return !calls.empty();
  });
  Write(calls.front(), "well");
  Finish(calls.front(), {});
  late.Until([&] { return late.http2.answer(id).is_closed; });
  CHECK_EQ(late.http2.answer(id).messages().at(0), "well");
}

TEST(opened_and_dropped_connections_leave_no_descriptor) {
  Options options;
  options.num_threads = 2;
  Server server(options);
  const size_t num_before = NumDescriptors();
  auto random = test::Random();
  for (int i = 0; i < 2000; ++i) {
    SocketClient client(ConnectTcp(server.port));
    switch (random() % 4) {
      case 0:
        break;
      case 1:
        client.http2.Begin("/a/b");
        client.Flush();
        break;
      case 2:
        client.SendRaw(std::string_view(NGHTTP2_CLIENT_MAGIC).substr(0, random() % 24));
        break;
      default:
        CheckEcho(client);
    }
  }
  WaitUntil([&] { return server.door.totals().connections == 0; });
  WaitUntil([&] { return NumDescriptors() == num_before; });
  WaitUntil([&] { return server.door.totals().calls == 0; });
}

TEST(a_misbehaving_connection_is_closed_alone) {
  Server server;
  SocketClient good(ConnectTcp(server.port));
  CheckEcho(good);
  SocketClient bad(ConnectTcp(server.port));
  bad.SendRaw(test::RawOpening());
  for (int i = 0; i < 3000; ++i) bad.SendRaw(test::RawFrame(NGHTTP2_SETTINGS, 0, 0, ""));
  CHECK(bad.UntilEnd().size() > 0);
  CheckEcho(good);
}

TEST(a_client_that_reads_nothing_holds_up_nobody) {
  std::mutex mutex;
  CallRef stuck;
  Options options;
  options.max_unsent_bytes = 1 << 20;
  options.stream_window_bytes = 1 << 30;
  Server server(options, [&](Event& event) {
    if (event.kind == EventKind::kCall && event.info->path == "/stuck/x") {
      const std::lock_guard lock(mutex);
      stuck = event.call;
    } else if (event.call != stuck) {
      Echo(event);
    }
  });
  // A window so large that only the socket holds the door back.
  SocketClient client(ConnectTcp(server.port));
  client.SendRaw(test::RawOpening() +
                 test::RawFrame(NGHTTP2_SETTINGS, 0, 0, std::string("\0\x04\x7f\xff\xff\xff", 6)) +
                 test::RawFrame(NGHTTP2_WINDOW_UPDATE, 0, 0, std::string("\x7f\xfe\0\0", 4)) +
                 test::RawFrame(NGHTTP2_HEADERS, NGHTTP2_FLAG_END_HEADERS | NGHTTP2_FLAG_END_STREAM, 1, [] {
                   std::string block = test::RawHeaderBlock();
                   block.replace(block.find("\x04/a/b"), 5, "\x08/stuck/x");
                   return block;
                 }()));
  WaitUntil([&] {
    const std::lock_guard lock(mutex);
    return stuck != nullptr;
  });
  const std::string message(100'000, 'm');
  WaitUntil([&] {
    Write(stuck, message);
    return stuck->is_over();
  });
  SocketClient good(ConnectTcp(server.port));
  CheckEcho(good);
}

TEST(stop_waits_for_calls_and_for_no_longer_than_asked) {
  std::mutex mutex;
  std::vector<CallRef> calls;
  std::atomic<int> num_cancelled{0};
  Server server({}, [&](Event& event) {
    const std::lock_guard lock(mutex);
    if (event.kind == EventKind::kCall) calls.push_back(event.call);
    if (event.kind == EventKind::kCancelled) ++num_cancelled;
  });
  SocketClient client(ConnectTcp(server.port));
  const int32_t quick = client.http2.Ask("/a/b", "x");
  const int32_t endless = client.http2.Ask("/a/b", "x");
  client.Flush();
  WaitUntil([&] {
    const std::lock_guard lock(mutex);
    return calls.size() == 2;
  });
  std::thread stopper([&] { server.door.Stop(1.5); });
  client.Until([&] { return !client.http2.goaways.empty(); });
  Finish(calls[0], {});
  client.Until([&] { return client.http2.answer(quick).is_closed; });
  CHECK_EQ(client.http2.answer(quick).status(), 0);
  const auto before = Clock::now();
  stopper.join();
  CHECK(Clock::now() - before < std::chrono::seconds(10));
  CHECK_EQ(client.http2.answer(endless).status(), -1);
  WaitUntil([&] { return num_cancelled == 1; });
  Write(calls[1], "too late");
  CHECK(calls[1]->is_over());
}

TEST(an_idle_door_stops_at_once) {
  const auto before = Clock::now();
  {
    Server server;
    SocketClient client(ConnectTcp(server.port));
    CheckEcho(client);
    server.door.Stop(30);
    CHECK(client.UntilEnd().size() > 0);
  }
  CHECK(Clock::now() - before < std::chrono::seconds(5));
}
