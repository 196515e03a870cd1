// The pump between threads: an engine's thread steps, a reader takes, a scheduler collects, requests come and
// go.
#include <atomic>
#include <map>
#include <thread>

#include "check.h"
#include "stream/pump.h"

using namespace twinjet::stream;

namespace {

std::shared_ptr<const Vocabulary> Letters() {
  std::vector<std::optional<std::string>> tokens;
  for (char c = 'a'; c <= 'z'; ++c) tokens.push_back(std::string(1, c));
  return std::make_shared<Vocabulary>(Joining::kByteLevel, tokens, std::span<const int32_t>());
}

std::shared_ptr<Stream> MakeStream(int64_t max_tokens, uint32_t num_outputs = 1) {
  auto rules = std::make_shared<OutputRules>();
  rules->max_tokens = max_tokens;
  return std::make_shared<Stream>(Letters(), rules, num_outputs, StreamFacts{}, 0.0, int64_t{1} << 40);
}

// Keeps what it is given; has room while told so.
class Recorder : public Carrier {
 public:
  bool HasRoom(const std::shared_ptr<void>&) override { return has_room; }
  void Carry(std::span<const Parcel> parcels) override {
    std::lock_guard lock(mutex_);
    ++num_carries;
    for (const Parcel& parcel : parcels) messages[parcel.call.get()].push_back(parcel.bytes);
  }

  std::atomic<bool> has_room{true};
  int num_carries = 0;
  std::map<void*, std::vector<std::string>> messages;

 private:
  std::mutex mutex_;
};

void Fill(StepOutputs* step, SequenceKey key, std::initializer_list<int32_t> ids) {
  SequenceStep& row = step->Add(key);
  row.num_tokens = static_cast<uint32_t>(ids.size());
  step->token_ids.insert(step->token_ids.end(), ids);
}

}  // namespace

TEST(a_step_of_many_streams_is_carried_at_once) {
  auto carrier = std::make_shared<Recorder>();
  Pump pump;
  std::vector<std::shared_ptr<Stream>> streams;
  std::vector<SequenceKey> keys;
  std::vector<std::string> taken;
  for (int i = 0; i < 5; ++i) {
    streams.push_back(MakeStream(100));
    streams.back()->Attach(carrier, std::make_shared<int>(i));
    CHECK(!streams.back()->Take(&taken));
    keys.push_back(pump.Add(streams.back(), {}));
  }
  StepOutputs step;
  for (SequenceKey key : keys) Fill(&step, key, {0});
  pump.Step(step, 1.0);
  CHECK_EQ(carrier->num_carries, 1);
  CHECK_EQ(carrier->messages.size(), size_t{5});
  const Report& report = pump.Collect(nullptr);
  CHECK_EQ(report.num_tokens, int64_t{5});
  for (const Report::Request& request : report.requests) CHECK(!(request.happenings & kAwaited));
  pump.Step(step, 2.0);
  CHECK_EQ(carrier->num_carries, 2);
}

TEST(without_room_deltas_merge_and_the_rest_is_left_to_take) {
  auto carrier = std::make_shared<Recorder>();
  auto call = std::make_shared<int>(0);
  Pump pump;
  std::shared_ptr<Stream> stream = MakeStream(4);
  stream->Attach(carrier, call);
  std::vector<std::string> taken;
  CHECK(!stream->Take(&taken));
  SequenceKey key = pump.Add(stream, {});
  StepOutputs step;
  Fill(&step, key, {0});
  carrier->has_room = false;
  pump.Step(step, 1.0);
  pump.Step(step, 2.0);
  CHECK(carrier->messages.empty());
  CHECK(stream->blocked_since() == 1.0);
  carrier->has_room = true;
  pump.Step(step, 3.0);
  CHECK_EQ(carrier->messages[call.get()].size(), size_t{1});
  CHECK(!stream->blocked_since());
  carrier->has_room = false;
  pump.Step(step, 4.0);
  CHECK(pump.Collect(nullptr).requests[0].happenings & kOver);
  CHECK(stream->Take(&taken));
  CHECK_EQ(taken.size(), size_t{2});  // the last delta and the end
}

TEST(nothing_is_carried_before_a_take_came_back_empty) {
  auto carrier = std::make_shared<Recorder>();
  Pump pump;
  std::shared_ptr<Stream> stream = MakeStream(9);
  stream->Attach(carrier, std::make_shared<int>(0));
  SequenceKey key = pump.Add(stream, {});
  StepOutputs step;
  Fill(&step, key, {0});
  pump.Step(step, 1.0);
  std::vector<std::string> taken;
  CHECK(stream->Take(&taken));
  pump.Step(step, 1.0);
  CHECK(carrier->messages.empty());
}

TEST(threads_lose_and_invent_nothing) {
  constexpr int64_t kTokens = 200;
  constexpr int kRequests = 60;
  Pump pump;
  std::mutex mutex;
  std::map<SequenceKey, int64_t> running;  // tokens so far
  std::atomic<bool> is_done{false};
  std::thread engine([&] {
    StepOutputs step;
    while (!is_done) {
      step.Clear();
      {
        std::lock_guard lock(mutex);
        for (auto& [key, count] : running) {
          if (count++ < kTokens) Fill(&step, key, {static_cast<int32_t>(count % 26)});
        }
      }
      pump.Step(step, 1.0);
    }
  });
  int64_t num_told = 0;
  std::map<uint32_t, SequenceKey> by_slot;
  std::map<SequenceKey, std::shared_ptr<Stream>> streams;
  std::vector<std::string> messages;
  int num_begun = 0;
  int num_over = 0;
  while (num_over < kRequests) {
    if (num_begun < kRequests && streams.size() < 8) {
      std::shared_ptr<Stream> stream = MakeStream(kTokens);
      SequenceKey key = pump.Add(stream, {.tenant = num_begun++ % 3});
      streams[key] = stream;
      by_slot[Pump::SlotOf(key)] = key;
      std::lock_guard lock(mutex);
      running[key] = 0;
    }
    for (auto& [key, stream] : streams) stream->Take(&messages);
    const Report& report = pump.Collect(nullptr);
    num_told += report.num_tokens;
    for (const Report::Request& request : report.requests) {
      if (!(request.happenings & kOver)) continue;
      SequenceKey key = by_slot.at(request.slot);
      {
        std::lock_guard lock(mutex);
        running.erase(key);
      }
      num_told += pump.Remove(key);
      CHECK_EQ(streams[key]->num_output_tokens(), kTokens);
      streams.erase(key);
      ++num_over;
    }
  }
  is_done = true;
  engine.join();
  CHECK_EQ(num_told, kTokens * kRequests);
}
