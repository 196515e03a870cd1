// Many sockets' bytes at once, through io_uring where this kernel has it and one by one.
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "door/sender.h"

using namespace twinjet::door;

namespace {

// Connected pairs of sockets: bytes go in at one end, non-blocking, and out at the other.
class Pairs {
 public:
  explicit Pairs(size_t count) {
    for (size_t i = 0; i < count; ++i) {
      int ends[2];
      if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) != 0) {
        throw test::Failure{"socketpair"};
      }
      in_.push_back(ends[0]);
      out_.push_back(ends[1]);
    }
  }
  ~Pairs() {
    for (const int fd : in_) close(fd);
    for (const int fd : out_) {
      if (fd >= 0) close(fd);
    }
  }
  Pairs(const Pairs&) = delete;
  Pairs& operator=(const Pairs&) = delete;

  int in(size_t i) const { return in_[i]; }
  std::string Read(size_t i) const {
    std::string all;
    char piece[4096];
    for (ssize_t size; (size = recv(out_[i], piece, sizeof piece, 0)) > 0;) {
      all.append(piece, static_cast<size_t>(size));
    }
    return all;
  }
  void CloseOut(size_t i) { close(std::exchange(out_[i], -1)); }

 private:
  std::vector<int> in_;
  std::vector<int> out_;
};

void BothWays(void (*check)(Sender&)) {
  Sender plain(false);
  CHECK(!plain.has_ring());
  check(plain);
  Sender sender;
  if (!sender.has_ring()) std::printf("  no io_uring here\n");
  check(sender);
}

}  // namespace

TEST(each_socket_gets_its_own_bytes) {
  BothWays([](Sender& sender) {
    // More than one submission holds, and few enough for one by one.
    for (const size_t count : {1, 3, 4, 128, 129, 400}) {
      const Pairs pairs(count);
      for (int round = 0; round < 3; ++round) {
        std::vector<std::string> texts;
        std::vector<Sending> sendings;
        for (size_t i = 0; i < count; ++i) {
          texts.push_back(std::to_string(round) + " for " + std::to_string(i));
        }
        for (size_t i = 0; i < count; ++i) {
          sendings.push_back({pairs.in(i), texts[i].data(), texts[i].size()});
        }
        sender.Send(sendings);
        for (size_t i = 0; i < count; ++i) {
          CHECK_EQ(sendings[i].result, static_cast<ssize_t>(texts[i].size()));
          CHECK_EQ(pairs.Read(i), texts[i]);
        }
      }
    }
  });
}

TEST(a_full_socket_takes_a_part_and_then_nothing_and_holds_up_nobody) {
  BothWays([](Sender& sender) {
    const Pairs pairs(6);
    const std::string much(16 << 20, 'm');
    for (int round = 0; round < 2; ++round) {
      std::vector<Sending> sendings;
      for (size_t i = 0; i < 6; ++i) sendings.push_back({pairs.in(i), much.data(), i == 2 ? much.size() : 1});
      sender.Send(sendings);
      for (size_t i = 0; i < 6; ++i) {
        if (i != 2) CHECK_EQ(sendings[i].result, 1);
      }
      if (round == 0) CHECK(sendings[2].result > 0 && sendings[2].result < static_cast<ssize_t>(much.size()));
      if (round == 1) CHECK_EQ(sendings[2].result, -EAGAIN);
    }
  });
}

TEST(a_lost_socket_is_an_error_of_its_own_and_no_signal) {
  BothWays([](Sender& sender) {
    Pairs pairs(6);
    pairs.CloseOut(4);
    std::vector<Sending> sendings;
    for (size_t i = 0; i < 6; ++i) sendings.push_back({pairs.in(i), "bytes", 5});
    sender.Send(sendings);
    for (size_t i = 0; i < 6; ++i) CHECK_EQ(sendings[i].result, i == 4 ? -EPIPE : 5);
  });
}
