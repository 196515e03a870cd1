// PrefixIndex against a plain map, and Picker's order.
#include <algorithm>
#include <deque>
#include <map>
#include <set>

#include "check.h"
#include "epp/ext_proc.h"
#include "epp/picker.h"
#include "epp/prefix_index.h"
#include "epp/prompt.h"

using twinjet::epp::Choice;
using twinjet::epp::Match;
using twinjet::epp::Picker;
using twinjet::epp::PickerOptions;
using twinjet::epp::PrefixIndex;
using twinjet::kv::BlockHash;

namespace {

constexpr BlockHash kSeed = {0x1234567890abcdef, 0xfedcba0987654321};

// Hashes of a path in a tree: the same beginning gives the same hashes.
std::vector<BlockHash> Path(const std::vector<int>& steps) {
  std::vector<BlockHash> hashes;
  uint64_t state = 7;
  for (int step : steps) {
    state = state * 6364136223846793005 + static_cast<uint64_t>(step) * 1442695040888963407 + 1;
    hashes.push_back({state, ~state * 3});
  }
  return hashes;
}

std::map<uint32_t, uint32_t> Found(PrefixIndex* index, const std::vector<BlockHash>& hashes) {
  std::vector<Match> matches;
  index->Find(hashes, &matches);
  std::map<uint32_t, uint32_t> found;
  for (const Match& match : matches) found[match.replica] = match.num_blocks;
  CHECK_EQ(found.size(), matches.size());
  return found;
}

// What a replica was sent, longest unused first.
struct Lru {
  size_t capacity = 0;
  std::deque<uint64_t> order;

  void Touch(std::vector<BlockHash> hashes) {
    hashes.resize(std::min(hashes.size(), capacity));
    for (size_t i = hashes.size(); i-- > 0;) {
      std::erase(order, hashes[i].lo);
      order.push_back(hashes[i].lo);
    }
    while (order.size() > capacity) order.pop_front();
  }
  uint32_t Run(const std::vector<BlockHash>& hashes) const {
    uint32_t run = 0;
    while (run < hashes.size() && std::ranges::find(order, hashes[run].lo) != order.end()) ++run;
    return run;
  }
};

}  // namespace

TEST(it_finds_what_a_plain_list_finds) {
  std::mt19937_64 random = test::Random();
  PrefixIndex index(1 << 20, kSeed);
  std::vector<Lru> replicas(9);
  for (uint32_t id = 0; id < replicas.size(); ++id) {
    replicas[id].capacity = random() % 40;
    index.SetCapacity(id, replicas[id].capacity);
  }
  for (int round = 0; round < 3000; ++round) {
    std::vector<int> steps(random() % 9);
    for (int& step : steps) step = static_cast<int>(random() % 3);
    std::vector<BlockHash> hashes = Path(steps);
    std::map<uint32_t, uint32_t> expected;
    for (uint32_t id = 0; id < replicas.size(); ++id) {
      if (uint32_t run = replicas[id].Run(hashes)) expected[id] = run;
    }
    CHECK(Found(&index, hashes) == expected);
    auto id = static_cast<uint32_t>(random() % replicas.size());
    replicas[id].Touch(hashes);
    index.Touch(id, hashes);
    if (round % 50 == 0) {
      replicas[id].capacity = random() % 40;
      while (replicas[id].order.size() > replicas[id].capacity) replicas[id].order.pop_front();
      index.SetCapacity(id, replicas[id].capacity);
    }
    if (round % 97 == 0) {
      replicas[id].order.clear();
      index.Clear(id);
    }
    if (round % 100 == 0) CHECK(index.Check());
  }
}

TEST(told_blocks_are_found_though_one_between_is_missing) {
  std::mt19937_64 random = test::Random();
  PrefixIndex index(1 << 20, kSeed);
  std::vector<std::set<uint64_t>> held(7);
  for (int round = 0; round < 4000; ++round) {
    std::vector<int> steps(1 + random() % 6);
    for (int& step : steps) step = static_cast<int>(random() % 2);
    std::vector<BlockHash> hashes = Path(steps);
    std::map<uint32_t, uint32_t> expected;
    for (uint32_t id = 0; id < held.size(); ++id) {
      uint32_t run = 0;
      while (run < hashes.size() && held[id].contains(hashes[run].lo)) ++run;
      if (run) expected[id] = run;
    }
    CHECK(Found(&index, hashes) == expected);
    auto id = static_cast<uint32_t>(random() % held.size());
    const BlockHash& one = hashes[random() % hashes.size()];
    if (random() % 3 == 0) {
      held[id].erase(one.lo);
      index.Erase(id, one);
    } else {
      held[id].insert(one.lo);
      index.Store(id, one);
    }
  }
  CHECK(index.Check());
}

TEST(memory_is_bounded_whatever_comes) {
  std::mt19937_64 random = test::Random();
  PrefixIndex index(500, kSeed);
  for (uint32_t id = 0; id < 5; ++id) index.SetCapacity(id, 1000);
  for (int round = 0; round < 2000; ++round) {
    std::vector<int> steps(1 + random() % 30);
    for (int& step : steps) step = static_cast<int>(random() % 100);
    index.Touch(static_cast<uint32_t>(random() % 5), Path(steps));
    CHECK(index.num_links() <= 500);
  }
  CHECK(index.Check());
  std::vector<int> huge(5000, 3);
  index.Touch(0, Path(huge));
  CHECK(index.num_links() <= 500);
  CHECK(index.Check());
  for (uint32_t id = 0; id < 5; ++id) index.Clear(id);
  CHECK_EQ(index.num_links(), size_t{0});
  CHECK_EQ(index.num_blocks(), size_t{0});
}

TEST(a_prefix_draws_until_the_queue_costs_more) {
  Picker picker(PickerOptions{});
  std::vector<uint32_t> ids = {picker.Add(), picker.Add()};
  std::vector<Choice> choices;
  std::vector<Match> cached = {{ids[1], 900}};
  picker.Report(ids[0], {}, 0);
  picker.Report(ids[1], {}, 0);
  picker.Rank(ids, 1000, cached, 0, 1, 2, &choices);
  CHECK_EQ(choices[0].replica, ids[1]);
  CHECK_EQ(choices[0].cached_tokens, 900u);
  picker.Report(ids[1], {.waiting = 2, .running = 8, .waiting_tokens = 2000, .kv_utilization = 0.5}, 0);
  picker.Rank(ids, 1000, cached, 0, 1, 2, &choices);
  CHECK_EQ(choices[0].replica, ids[0]);
  // Nothing of one ranking is left for the next.
  picker.Report(ids[1], {}, 0);
  picker.Rank(ids, 1000, {}, 0, 1, 2, &choices);
  CHECK_EQ(choices[0].cost, choices[1].cost);
}

TEST(what_was_sent_since_the_report_counts) {
  Picker picker(PickerOptions{});
  std::vector<uint32_t> ids = {picker.Add(), picker.Add(), picker.Add()};
  for (uint32_t id : ids) picker.Report(id, {}, 10);
  std::vector<Choice> choices;
  std::map<uint32_t, int> sent;
  for (int i = 0; i < 300; ++i) {
    picker.Rank(ids, 100, {}, 10, static_cast<uint64_t>(i) * 77, 1, &choices);
    picker.Begin(choices[0].replica, 100, 10);
    ++sent[choices[0].replica];
  }
  for (uint32_t id : ids) CHECK_EQ(sent[id], 100);
  // A report that came long after they were sent tells of them itself.
  picker.Report(ids[0], {}, 11);
  picker.Rank(ids, 100, {}, 11, 5, 3, &choices);
  CHECK_EQ(choices[0].replica, ids[0]);
}

TEST(a_backlog_shrinks_between_reports) {
  Picker picker(PickerOptions{.prefill_per_s = 1000});
  std::vector<uint32_t> ids = {picker.Add()};
  picker.Report(ids[0], {.waiting_tokens = 2000}, 10);
  picker.Begin(ids[0], 500, 11);
  std::vector<Choice> choices;
  picker.Rank(ids, 1, {}, 11.5, 1, 1, &choices);
  CHECK_EQ(choices[0].cost, 1.0 + 1000.0 + 16.0);
  picker.Rank(ids, 1, {}, 13, 1, 1, &choices);
  CHECK_EQ(choices[0].cost, 1.0 + 16.0);
}

TEST(what_has_ended_counts_no_longer) {
  Picker picker(PickerOptions{});
  std::vector<uint32_t> ids = {picker.Add(), picker.Add()};
  for (uint32_t id : ids) picker.Report(id, {}, 10);
  uint64_t first = picker.Begin(ids[0], 5000, 10);
  uint64_t second = picker.Begin(ids[0], 300, 10);
  picker.End(ids[0], first, 5000);
  std::vector<Choice> choices;
  std::vector<Match> cached = {{ids[0], 900}};
  picker.Rank(ids, 1000, cached, 10, 1, 1, &choices);
  CHECK_EQ(choices[0].replica, ids[0]);
  CHECK_EQ(choices[0].cost, 100.0 + 300.0 + 16.0);
  // One that a report has told of ends without being counted twice.
  picker.Report(ids[0], {}, 11);
  picker.End(ids[0], second, 300);
  picker.Rank(ids, 1000, cached, 11, 1, 1, &choices);
  CHECK_EQ(choices[0].cost, 100.0);
  CHECK_EQ(picker.in_flight(ids[0]), 0);
}

TEST(among_idle_replicas_the_least_used_comes_first) {
  Picker picker(PickerOptions{});
  std::vector<uint32_t> ids;
  for (int i = 0; i < 5; ++i) ids.push_back(picker.Add());
  std::map<uint32_t, int> sent;
  std::vector<Choice> choices;
  for (int i = 0; i < 50; ++i) {
    double now = 10 + i;
    for (uint32_t id : ids) picker.Report(id, {}, now);
    picker.Rank(ids, 100, {}, now, static_cast<uint64_t>(i) * 12345, 1, &choices);
    picker.End(choices[0].replica, picker.Begin(choices[0].replica, 100, now), 100);
    ++sent[choices[0].replica];
  }
  for (uint32_t id : ids) CHECK_EQ(sent[id], 10);
}

TEST(a_replica_without_room_for_the_prompt_is_avoided) {
  Picker picker(PickerOptions{});
  std::vector<uint32_t> ids = {picker.Add(), picker.Add()};
  for (uint32_t id : ids) picker.SetKvTokens(id, 10000);
  picker.Report(ids[0], {.waiting = 0, .running = 1, .waiting_tokens = 0, .kv_utilization = 0.99}, 0);
  picker.Report(ids[1], {.waiting = 0, .running = 9, .waiting_tokens = 0, .kv_utilization = 0.2}, 0);
  std::vector<Choice> choices;
  picker.Rank(ids, 2000, {}, 0, 1, 1, &choices);
  CHECK_EQ(choices[0].replica, ids[1]);
}

TEST(full_replicas_come_last_and_say_so) {
  Picker picker(PickerOptions{.max_waiting = 4});
  std::vector<uint32_t> ids = {picker.Add(), picker.Add()};
  picker.Report(ids[0], {.waiting = 4}, 0);
  picker.Report(ids[1], {.waiting = 3, .running = 100, .waiting_tokens = 1e6}, 0);
  std::vector<Choice> choices;
  std::vector<Match> cached = {{ids[0], 1000}};
  picker.Rank(ids, 1000, cached, 0, 1, 2, &choices);
  CHECK_EQ(choices[0].replica, ids[1]);
  CHECK(!choices[0].is_full);
  CHECK(choices[1].is_full);
}

TEST(hostile_bytes_do_no_harm) {
  std::mt19937_64 random = test::Random();
  twinjet::kv::BlockHasher hasher(4, twinjet::kv::BlockHasher::Algorithm::kSipHash, {});
  for (int round = 0; round < 20000; ++round) {
    std::string bytes(random() % 60, '\0');
    for (char& byte : bytes) {
      // Mostly what looks like fields, else all would end at the first byte.
      byte = static_cast<char>(random() % 3 ? (random() % 12) << 3 | (random() % 2) * 2 : random());
    }
    for (auto method : {twinjet::epp::Method::kGenerate, twinjet::epp::Method::kChat}) {
      twinjet::epp::Prompt prompt;
      if (twinjet::epp::ReadPrompt(bytes, method, &prompt)) {
        CHECK(prompt.words.size() <= bytes.size() * 2 + 40 * bytes.size());
        prompt.Hashes(hasher);
      }
    }
    twinjet::epp::ProcessingRequest request;
    twinjet::epp::ReadProcessingRequest(bytes, &request);
  }
}
