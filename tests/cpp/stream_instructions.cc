// What a token and a request cost in csrc/stream, as fixed work whose instructions can be counted:
//
//   stream_instructions WORKLOAD    does it, and prints in how many units (tokens or requests)
//
// check_instructions.sh runs it under callgrind, which counts inside Measured() alone, and holds the result
// against stream_instructions.txt. Everything is deterministic: no clock, no threads, no randomness.
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "stream/pump.h"

using namespace twinjet::stream;

// Callgrind's --toggle-collect names it. It must stay on the stack meanwhile: no tail call.
extern "C" __attribute__((noinline)) int64_t Measured(const std::function<int64_t()>& work) {
  int64_t result = work();
  asm volatile("" : "+r"(result));
  return result;
}

namespace {

constexpr int kStreams = 256;
constexpr int kSteps = 64;

// Words of four letters with a space before them, as most tokens are, and one byte of each kind.
std::shared_ptr<const Vocabulary> Words() {
  std::vector<std::optional<std::string>> tokens;
  for (int i = 0; i < 26 * 26; ++i) {
    const char a = static_cast<char>('a' + i / 26), b = static_cast<char>('a' + i % 26);
    tokens.push_back("\xC4\xA0" + std::string{a, b, a, b});
  }
  return std::make_shared<Vocabulary>(Joining::kByteLevel, tokens, std::span<const int32_t>());
}

// Has room for everything and keeps nothing.
class Sink : public Carrier {
 public:
  bool HasRoom(const std::shared_ptr<void>&) override { return true; }
  void Carry(std::span<const Parcel> parcels) override {
    for (const Parcel& parcel : parcels) num_bytes += static_cast<int64_t>(parcel.bytes.size());
  }
  int64_t num_bytes = 0;
};

struct Bench {
  explicit Bench(std::vector<std::string> stop = {}) {
    rules->max_tokens = 1 << 20;
    rules->eos_token_ids = {1};
    rules->stop = std::make_shared<const std::vector<std::string>>(std::move(stop));
    for (int i = 0; i < kStreams; ++i) {
      streams.push_back(MakeStream());
      keys.push_back(pump.Add(streams.back(), {}));
    }
  }

  std::shared_ptr<Stream> MakeStream() const {
    const StreamFacts facts{"0123456789abcdef01234567", "demo", "vllm", "demo", "twinjet", 32, 7};
    return std::make_shared<Stream>(vocabulary, rules, 1, facts, 0.0, int64_t{1} << 20);
  }

  // The next token of every stream. num_logprobs: candidates a token, 0 is none.
  const StepOutputs& Step(uint32_t num_logprobs = 0) {
    step.Clear();
    for (SequenceKey key : keys) {
      SequenceStep& row = step.Add(key);
      row.num_tokens = 1;
      const auto id = static_cast<int32_t>(2 + (++drawn * 31) % 600);
      step.token_ids.push_back(id);
      if (num_logprobs == 0) continue;
      row.logprobs = {1, num_logprobs, static_cast<uint32_t>(step.candidate_ids.size()),
                      static_cast<uint32_t>(step.ranks.size())};
      for (uint32_t i = 0; i < num_logprobs; ++i) {
        step.candidate_ids.push_back(id + static_cast<int32_t>(i));
        step.candidate_logprobs.push_back(-0.5f * static_cast<float>(i));
      }
      step.ranks.push_back(1);
    }
    return step;
  }

  void Carried() {
    for (auto& stream : streams) {
      std::vector<std::string> none;
      stream->Attach(sink, stream);
      stream->Take(&none);
    }
  }

  int64_t Steps(uint32_t num_logprobs = 0) {
    int64_t sum = 0;
    for (int i = 0; i < kSteps; ++i) {
      pump.Step(Step(num_logprobs), i);
      sum += pump.Collect(nullptr).num_tokens;
    }
    return sum;
  }

  // Each stream is read after every `merged` steps.
  int64_t Taken(int merged) {
    int64_t sum = 0;
    std::vector<std::string> messages;
    for (int i = 0; i < kSteps; ++i) {
      pump.Step(Step(), i);
      sum += pump.Collect(nullptr).num_tokens;
      if ((i + 1) % merged != 0) continue;
      for (auto& stream : streams) {
        messages.clear();
        while (stream->Take(&messages)) continue;
      }
    }
    return sum;
  }

  const std::shared_ptr<const Vocabulary> vocabulary = Words();
  const std::shared_ptr<OutputRules> rules = std::make_shared<OutputRules>();
  const std::shared_ptr<Sink> sink = std::make_shared<Sink>();
  Pump pump;
  std::vector<std::shared_ptr<Stream>> streams;
  std::vector<SequenceKey> keys;
  StepOutputs step;
  int64_t drawn = 0;
};

int64_t Carried(uint32_t num_logprobs, std::vector<std::string> stop) {
  Bench bench(std::move(stop));
  bench.Carried();
  bench.Steps(num_logprobs);
  return Measured([&] { return bench.Steps(num_logprobs); });
}

int64_t Taken(int merged) {
  Bench bench;
  bench.Taken(merged);
  return Measured([&] { return bench.Taken(merged); });
}

// A request from its beginning to its summary, with one token.
int64_t Requests() {
  Bench bench;
  const auto work = [&] {
    for (int i = 0; i < kStreams; ++i) {
      std::shared_ptr<Stream> stream = bench.MakeStream();
      std::vector<std::string> messages;
      stream->Attach(bench.sink, stream);
      stream->Take(&messages);
      const SequenceKey key = bench.pump.Add(stream, {});
      bench.step.Clear();
      SequenceStep& row = bench.step.Add(key);
      row.num_tokens = 1;
      row.has_prompt = true;
      row.finish = EngineFinish::kLength;
      bench.step.token_ids.push_back(17);
      bench.pump.Step(bench.step, i);
      bench.pump.Collect(nullptr);
      messages.push_back(stream->Summary());
      bench.pump.Remove(key);
    }
    return int64_t{kStreams};
  };
  work();
  return Measured(work);
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, std::function<int64_t()>> workloads{
      {"carried", [] { return Carried(0, {}); }},
      {"carried_with_stops", [] { return Carried(0, {"\n\nUser:", "zzyx"}); }},
      {"carried_with_logprobs", [] { return Carried(5, {}); }},
      {"taken", [] { return Taken(1); }},
      {"merged", [] { return Taken(16); }},
      {"request", Requests},
  };
  const auto found = workloads.find(argc > 1 ? argv[1] : "");
  if (found == workloads.end()) {
    for (const auto& [name, _] : workloads) std::fprintf(stderr, "%s\n", name.c_str());
    return 2;
  }
  std::printf("%lld\n", static_cast<long long>(found->second()));
  return 0;
}
