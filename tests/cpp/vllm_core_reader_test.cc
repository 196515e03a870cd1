// CoreReader: an engine core's bytes in pieces of any size, read by a thread while another opens and closes.
#include <sys/poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "vllm/core_reader.h"
#include "vllm_messages.h"

namespace {

using twinjet::stream::Pump;
using twinjet::vllm::CoreNews;
using twinjet::vllm::CoreReader;
using twinjet::vllm::ZmtpReader;
using vllm_messages::IdOf;
using vllm_messages::kFinished;
using vllm_messages::kRunning;
using vllm_messages::kStats;
using vllm_messages::Message;
using vllm_messages::Output;

constexpr char kMore = 1;
constexpr char kLong = 2;
constexpr char kCommand = 4;

std::string Frame(const std::string& body, char flags = 0) {
  std::string made;
  if (body.size() < 256) {
    made = {flags, static_cast<char>(body.size())};
  } else {
    made = {static_cast<char>(flags | kLong)};
    for (int i = 7; i >= 0; --i) made += static_cast<char>(body.size() >> (8 * i) & 0xff);
  }
  return made + body;
}

std::string Ping(const std::string& context) {
  return Frame(std::string("\x04PING\0\0", 7) + context, kCommand);
}

// Both ends of a connection, and a reader at one of them.
struct Ends {
  explicit Ends(std::string_view unread = {}) {
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds) == 0);
    reader = std::make_unique<CoreReader>(fds[0], unread);
  }
  ~Ends() {
    reader.reset();
    for (int fd : fds) {
      if (fd >= 0) close(fd);
    }
  }

  void Write(std::string_view bytes) const {
    while (!bytes.empty()) {
      pollfd writable{fds[1], POLLOUT, 0};
      poll(&writable, 1, -1);
      const ssize_t count = write(fds[1], bytes.data(), bytes.size());
      CHECK(count > 0);
      bytes.remove_prefix(static_cast<size_t>(count));
    }
  }
  void HangUp() {
    close(fds[1]);
    fds[1] = -1;
  }
  void TakeNews(CoreNews* news) const {
    pollfd readable{reader->fd(), POLLIN, 0};
    CHECK(poll(&readable, 1, 30'000) == 1);
    reader->Take(news);
  }

  int fds[2];
  std::unique_ptr<CoreReader> reader;
};

TEST(rows_in_pieces_reach_their_pumps_while_others_come_and_go) {
  constexpr uint64_t kRequests = 3000;
  auto random = test::Random();
  Ends ends;
  Pump pump;
  ends.reader->Start();
  std::atomic<uint64_t> num_open = 0;
  std::thread core([&] {
    uint64_t key = 1;
    while (key <= kRequests) {
      const uint64_t until = num_open.load();
      std::vector<std::string> outputs;
      while (key <= until && outputs.size() < 700) outputs.push_back(Output(IdOf(key++), kFinished));
      if (outputs.empty()) {
        std::this_thread::yield();
        continue;
      }
      const std::string bytes = Frame(Message(outputs, kStats)) + Ping("abc");
      const std::string_view view = bytes;
      const size_t cut = bytes.size() / 3;
      ends.Write(view.substr(0, cut));
      ends.Write(view.substr(cut));
    }
  });
  std::set<uint64_t> closed;
  std::set<uint64_t> ended;
  CoreNews news;
  auto take = [&] {
    ends.reader->Take(&news);
    CHECK(!news.end);
    for (uint64_t key : news.ended) CHECK(ended.insert(key).second);
  };
  for (uint64_t key = 1; key <= kRequests; ++key) {
    ends.reader->Open(key, {&pump, key, 1, 1, 0});
    num_open = key;
    const uint64_t other = 1 + random() % (key);
    if (key % 7 == 0 && ends.reader->Close(other)) CHECK(closed.insert(other).second);
    if (key % 50 == 0) take();
  }
  core.join();
  while (ends.reader->num_open() > 0) std::this_thread::yield();
  ends.reader->Stop();
  take();
  CHECK(ended.size() + closed.size() == kRequests);
  for (uint64_t key : closed) CHECK(!ended.contains(key));
}

TEST(a_pump_in_its_owners_thread_reads_in_parts) {
  Ends ends;
  Pump pump;
  std::vector<std::string> outputs;
  for (uint64_t key = 1; key <= 600; ++key) {
    outputs.push_back(Output(IdOf(key), kFinished));
    ends.reader->Open(key, {&pump, key, 1, 1, 0});
  }
  ends.Write(Frame(Message(outputs, kStats)));
  CHECK(ends.reader->Read() && ends.reader->num_open() == 600 - 256);
  CHECK(ends.reader->Close(600));
  CHECK(ends.reader->Read() && ends.reader->num_open() == 599 - 512);
  CHECK(!ends.reader->Read() && ends.reader->num_open() == 0);
  CoreNews news;
  ends.TakeNews(&news);
  CHECK(news.ended.size() == 599 && news.stepped == std::vector<Pump*>{&pump});
  CHECK(news.stats && news.stats->num_running == 5);
  for (int i = 0; i < 17; ++i) ends.Write(Frame(Message({}, kStats)));
  CHECK(ends.reader->Read());
  CHECK(!ends.reader->Read());
  ends.Write(Ping("abc"));
  ends.reader->Read();
  const std::string pong = Frame("\x04PONGabc", kCommand);
  char answer[64];
  const ssize_t size = read(ends.fds[1], answer, sizeof answer);
  CHECK(std::string(answer, size < 0 ? 0 : static_cast<size_t>(size)) == pong);
}

TEST(steps_that_bring_only_tokens_are_told_of_together) {
  constexpr int kSteps = 3000;
  Ends ends;
  Pump pump;
  ends.reader->Open(1, {&pump, 1, 1, 1, 0});
  ends.reader->Start();
  const auto began = std::chrono::steady_clock::now();
  std::thread core([&] {
    const std::string step = Frame(Message({Output(IdOf(1), kRunning)}, kStats));
    for (int i = 0; i < kSteps; ++i) ends.Write(step);
    ends.Write(Frame(Message({Output(IdOf(1), kFinished)}, kStats)));
  });
  CoreNews news;
  int num_told = 0;
  do {
    ends.TakeNews(&news);
    ++num_told;
    CHECK(news.ended.empty() || news.stats);
  } while (news.ended.empty());
  core.join();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
  CHECK(num_told <= took.count() / 0.005 + 2);
}

TEST(what_was_read_before_comes_first) {
  const std::string first = Frame(Message({Output(IdOf(1), kFinished)}, kStats));
  for (size_t cut : {size_t{0}, size_t{1}, first.size() / 2, first.size()}) {
    Ends ends(std::string_view(first).substr(0, cut));
    Pump pump;
    ends.reader->Open(1, {&pump, 1, 1, 1, 0});
    ends.Write(std::string_view(first).substr(cut));
    ends.reader->Start();
    CoreNews news;
    ends.TakeNews(&news);
    CHECK(news.ended == std::vector<uint64_t>{1});
  }
}

std::string EndOf(const std::string& bytes, bool does_hang_up = false) {
  std::string told[2];
  for (bool in_thread : {false, true}) {
    Ends ends;
    ends.Write(bytes);
    if (does_hang_up) ends.HangUp();
    CoreNews news;
    if (in_thread) {
      ends.reader->Start();
    } else {
      while (ends.reader->Read()) {
      }
      ends.reader->Read();
    }
    do {
      ends.TakeNews(&news);
    } while (!news.end);
    told[in_thread] = *news.end;
  }
  CHECK(told[0] == told[1]);
  return told[0];
}

TEST(every_end_is_told) {
  CHECK(EndOf(Frame("ENGINE_CORE_DEAD")).find("EngineDeadError") != std::string::npos);
  CHECK(EndOf(Frame("\x99")).find("cannot be read") != std::string::npos);
  CHECK(EndOf(Frame("")).find("cannot be read") != std::string::npos);
  CHECK(EndOf(Frame(Message({}, kStats), 8)).find("flags 0x8") != std::string::npos);
  CHECK(EndOf({kLong, '\x7f', 0, 0, 0, 0, 0, 0, 0}).find("bytes") != std::string::npos);
  CHECK(EndOf(Frame("\x05"
                    "ERROR\x03why",
                    kCommand))
            .find("why") != std::string::npos);
  CHECK(EndOf(Frame("\x09", kCommand)).find("commands") != std::string::npos);
  CHECK(EndOf(Frame(Message({}, kStats)), true).empty());
  CHECK(EndOf(Frame(Message({}, kStats)).substr(0, 9), true).empty());
}

TEST(frames_of_any_size_are_given_whole) {
  auto random = test::Random();
  int fds[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds) == 0);
  const size_t edges[] = {0, 1, 254, 255, 256, 65'536, 131'061, 131'072, 131'073, 400'000};
  std::vector<std::vector<std::string>> sent;
  std::string bytes;
  for (int i = 0; i < 60; ++i) {
    std::vector<std::string>& frames = sent.emplace_back();
    const uint64_t count = 1 + random() % (4);
    for (uint64_t j = 0; j < count; ++j) {
      const size_t size = random() % (3) == 0 ? edges[random() % (std::size(edges))] : random() % (3000);
      frames.emplace_back(size, static_cast<char>('a' + random() % (26)));
      bytes += Frame(frames.back(), j + 1 < count ? kMore : 0);
    }
    if (random() % (4) == 0) bytes += Ping("x");
  }
  std::thread writer([&] {
    for (std::string_view left = bytes; !left.empty();) {
      const ssize_t count =
          write(fds[1], left.data(), std::min<size_t>(left.size(), 1 + left.size() % 100'000));
      if (count > 0) left.remove_prefix(static_cast<size_t>(count));
    }
  });
  ZmtpReader reader({});
  size_t num_taken = 0;
  std::string replies;
  while (num_taken < sent.size()) {
    for (auto frames = reader.Next(); !frames.empty(); frames = reader.Next()) {
      const std::vector<std::string>& expected = sent[num_taken++];
      CHECK(frames.size() == expected.size());
      for (size_t i = 0; i < frames.size(); ++i) {
        CHECK(std::equal(frames[i].begin(), frames[i].end(), expected[i].begin(), expected[i].end()));
      }
    }
    replies += reader.TakeReply();
    reader.Fill(fds[0]);
  }
  writer.join();
  CHECK(replies.find(std::string("\x04\x06\x04PONGx", 8)) == 0);
  for (int fd : fds) close(fd);
}

TEST(damaged_bytes_end_it_at_most) {
  auto random = test::Random(1);
  const std::string whole =
      Frame("first", kMore) + Frame(std::string(300, 'x')) + Ping("abc") + Frame("last");
  int num_refused = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string damaged = whole.substr(0, random() % (whole.size() + 1));
    for (int j = 0; j < 3 && !damaged.empty(); ++j)
      damaged[random() % damaged.size()] = static_cast<char>(random());
    ZmtpReader reader(damaged);
    try {
      while (!reader.Next().empty()) {
      }
    } catch (const twinjet::vllm::ZmtpError&) {
      ++num_refused;
    }
  }
  CHECK(num_refused > 0);
}

}  // namespace
