// What Handover promises: nothing lost, each call's events in order, bounded turns, and nobody behind others'
// large messages.
#include <algorithm>
#include <atomic>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "door/handover.h"
#include "door/mailbox.h"

using namespace twinjet::door;

namespace {

constexpr size_t kLarge = kLargeBytes + 1;

class Calls {
 public:
  CallRef Make(size_t connection) {
    while (connections_.size() <= connection) {
      connections_.push_back(std::make_shared<std::atomic<int64_t>>(0));
    }
    return std::make_shared<Call>(next_id_++, mailbox_, totals_, client_, connections_[connection]);
  }

 private:
  const std::shared_ptr<Mailbox> mailbox_ = std::make_shared<Mailbox>();
  const std::shared_ptr<Totals> totals_ = std::make_shared<Totals>();
  const std::shared_ptr<Client> client_ = std::make_shared<Client>();
  std::vector<std::shared_ptr<std::atomic<int64_t>>> connections_;
  uint64_t next_id_ = 1;
};

void Put(Handover* handover, EventKind kind, const CallRef& call, size_t size = 0) {
  std::vector<Event> events;
  events.push_back({kind, call, std::string(size, 'x'), nullptr});
  handover->Put(events);
}

CallRef PutCall(Handover* handover, const CallRef& call, size_t size) {
  Put(handover, EventKind::kCall, call);
  Put(handover, EventKind::kMessage, call, size);
  return call;
}

size_t NumBytes(const Handover::Turn& turn) {
  size_t sum = 0;
  for (const Event& event : turn.events) sum += event.bytes.size();
  return sum;
}

}  // namespace

TEST(a_short_call_waits_for_one_large_message) {
  Calls calls;
  Handover handover;
  for (int i = 0; i < 100; ++i) PutCall(&handover, calls.Make(0), 4 << 20);
  Handover::Turn turn;
  CHECK(handover.Take(&turn));
  CHECK_EQ(turn.events.size(), 101u);
  CHECK_EQ(NumBytes(turn), size_t{4} << 20);
  const CallRef quick = PutCall(&handover, calls.Make(0), 5);
  CHECK(handover.Take(&turn));
  CHECK_EQ(turn.events.size(), 3u);
  const Event& message = *std::next(turn.events.begin());
  CHECK_EQ(message.call, quick);
  CHECK_EQ(message.bytes.size(), 5u);
}

TEST(connections_take_turns_at_large_messages) {
  Calls calls;
  Handover handover;
  for (int i = 0; i < 100; ++i) Put(&handover, EventKind::kMessage, calls.Make(0), kLarge);
  Handover::Turn turn;
  CHECK(handover.Take(&turn));
  const CallRef other = calls.Make(1);
  Put(&handover, EventKind::kMessage, other, kLarge);
  Put(&handover, EventKind::kHalfClosed, other);
  size_t num_turns = 0;
  for (bool is_there = false; !is_there; ++num_turns) {
    CHECK(handover.Take(&turn));
    is_there = turn.events.front().call == other;
  }
  CHECK_EQ(num_turns, 2u);
  CHECK_EQ(turn.events.size(), 2u);
}

TEST(a_call_waits_for_few_of_another_connections) {
  Calls calls;
  Handover handover;
  for (int i = 0; i < 3000; ++i) {
    Put(&handover, EventKind::kCancelled, PutCall(&handover, calls.Make(0), 5));
  }
  Handover::Turn turn;
  CHECK(handover.Take(&turn));
  const CallRef other = PutCall(&handover, calls.Make(1), 5);
  CHECK(handover.Take(&turn));
  CHECK_EQ(turn.events.size(), Handover::kEventsATurn);
  const auto first =
      std::ranges::find_if(turn.events, [&](const Event& event) { return event.call == other; });
  CHECK(std::distance(turn.events.begin(), first) <= static_cast<ptrdiff_t>(Handover::kEventsAVisit));
  CHECK_EQ(std::next(first)->call, other);
}

TEST(many_short_messages_come_in_parts) {
  Calls calls;
  Handover handover;
  std::vector<Event> events;
  for (size_t i = 0; i < 600; ++i) events.push_back({EventKind::kMessage, calls.Make(i), "x", nullptr});
  for (size_t i = 0; i < 40; ++i) {
    events.push_back({EventKind::kMessage, calls.Make(600 + i), std::string(kLargeBytes, 'x'), nullptr});
  }
  CHECK(handover.Put(events));
  Handover::Turn turn;
  std::vector<size_t> sizes;
  bool is_more = true;
  while (is_more) {
    is_more = handover.Take(&turn);
    sizes.push_back(turn.events.size());
    CHECK(NumBytes(turn) < Handover::kBytesATurn + kLargeBytes);
  }
  CHECK_EQ(sizes, (std::vector<size_t>{256, 256, 88 + 16, 16, 8}));
  CHECK(!handover.Take(&turn));
  CHECK(turn.events.empty());
}

TEST(refused_calls_are_counted) {
  Handover handover;
  for (const bool is_first : {true, false}) {
    std::vector<Event> events;
    for (const char* path : {"/a", "/b", "/a"}) {
      events.push_back({EventKind::kRefused, nullptr, path, nullptr});
    }
    CHECK_EQ(handover.Put(events), is_first);
  }
  Handover::Turn turn;
  CHECK(!handover.Take(&turn));
  CHECK(turn.events.empty());
  CHECK_EQ(turn.refused, (std::map<std::string, int64_t>{{"/a", 4}, {"/b", 2}}));
  CHECK(!handover.Take(&turn));
  CHECK(turn.refused.empty());
}

TEST(whatever_comes_each_call_keeps_its_order_and_turns_are_bounded) {
  std::mt19937_64 random = test::Random();
  for (int round = 0; round < 200; ++round) {
    Calls calls;
    Handover handover;
    std::vector<CallRef> open;
    std::map<uint64_t, std::deque<std::pair<EventKind, size_t>>> due;
    size_t num_due = 0;
    const auto take = [&] {
      Handover::Turn turn;
      const bool is_more = handover.Take(&turn);
      size_t num_large = 0;
      for (const Event& event : turn.events) {
        std::deque<std::pair<EventKind, size_t>>& left = due[event.call->id()];
        CHECK(!left.empty());
        CHECK(left.front() == std::make_pair(event.kind, event.bytes.size()));
        left.pop_front();
        --num_due;
        num_large += event.bytes.size() > kLargeBytes;
      }
      CHECK(num_large <= 1);
      CHECK(turn.events.size() <= 2 * Handover::kEventsATurn);
      CHECK_EQ(is_more, num_due > 0);
    };
    for (int step = 0; step < 300; ++step) {
      if (open.empty() || random() % 4 == 0) open.push_back(calls.Make(random() % 3));
      const CallRef call = open[random() % open.size()];
      const auto kind = random() % 3 > 0 ? EventKind::kMessage : EventKind::kHalfClosed;
      const size_t sizes[] = {0, 1, 1000, kLargeBytes, kLarge, 200'000};
      const size_t size = kind == EventKind::kMessage ? sizes[random() % 6] : 0;
      due[call->id()].emplace_back(kind, size);
      ++num_due;
      Put(&handover, kind, call, size);
      if (random() % 3 == 0) take();
    }
    // In each turn something comes, until all has.
    while (num_due > 0) {
      const size_t num_before = num_due;
      take();
      CHECK(num_due < num_before);
    }
  }
}

TEST(threads_put_while_one_takes) {
  constexpr size_t kThreads = 3;
  constexpr size_t kEvents = 2000;
  Handover handover;
  Calls calls;
  std::vector<CallRef> of_thread;
  for (size_t i = 0; i < kThreads; ++i) of_thread.push_back(calls.Make(i));
  std::atomic<int64_t> num_wakes{0};
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (size_t n = 0; n < kEvents; ++n) {
        std::vector<Event> events;
        const size_t size = n % 100 == 7 ? kLarge : 3;
        events.push_back({EventKind::kMessage, of_thread[i], std::string(size, 'x'), nullptr});
        if (handover.Put(events)) ++num_wakes;
      }
    });
  }
  // Takes only when it was woken or left something, as the door's reader does.
  Handover::Turn turn;
  size_t num_taken = 0;
  bool is_more = false;
  while (num_taken < kThreads * kEvents) {
    if (!is_more && num_wakes.exchange(0) == 0) {
      std::this_thread::yield();
      continue;
    }
    is_more = handover.Take(&turn);
    num_taken += turn.events.size();
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(!handover.Take(&turn));
  CHECK(turn.events.empty());
}
