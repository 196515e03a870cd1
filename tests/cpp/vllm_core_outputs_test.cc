// Messages of vLLM's engine core, made by hand: what is read, and that no cut or damaged one reads beyond it.
#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "vllm/core_outputs.h"
#include "vllm/step_router.h"
#include "vllm_messages.h"

namespace {

using twinjet::stream::StepOutputs;
using twinjet::vllm::CoreMessage;
using twinjet::vllm::DecodeCoreOutputs;
using twinjet::vllm::Frame;
using twinjet::vllm::WireError;
using vllm_messages::IdOf;
using vllm_messages::kFinished;
using vllm_messages::kStats;
using vllm_messages::Message;
using vllm_messages::Output;

Frame Bytes(const std::string& text) { return {reinterpret_cast<const uint8_t*>(text.data()), text.size()}; }

CoreMessage Decode(const std::string& text, StepOutputs* outputs) {
  const Frame frame = Bytes(text);
  return DecodeCoreOutputs({&frame, 1}, outputs);
}

TEST(tokens_ends_and_statistics_are_read) {
  StepOutputs outputs;
  const CoreMessage message =
      Decode(Message({Output("r-1f", kFinished), Output("keyless", kFinished)}, kStats), &outputs);
  CHECK(outputs.sequences.size() == 1);
  const auto& row = outputs.sequences[0];
  CHECK(row.key == 0x1f);
  CHECK(outputs.token_ids == (std::vector<int32_t>{7, 300}));
  CHECK(row.finish == twinjet::stream::EngineFinish::kLength);
  CHECK(row.has_prompt && row.num_cached_tokens == 5);
  CHECK(message.has_stats && message.num_running == 5 && message.kv_usage == 0.5);
}

// Each frame lies in memory of its own length, so that a sanitizer sees what is read behind it.
TEST(broken_messages_are_refused_whole) {
  const std::string whole = Message({Output("r-1f", kFinished)}, kStats);
  StepOutputs outputs;
  auto refuse = [&](const std::string& text) {
    const std::unique_ptr<uint8_t[]> exact(new uint8_t[text.size()]);
    std::copy(text.begin(), text.end(), exact.get());
    const Frame frame(exact.get(), text.size());
    try {
      DecodeCoreOutputs({&frame, 1}, &outputs);
      return false;
    } catch (const WireError&) {
      CHECK(outputs.sequences.empty());
      return true;
    }
  };
  for (size_t size = 0; size < whole.size(); ++size) CHECK(refuse(whole.substr(0, size)));
  CHECK(refuse(whole + '\0'));
  std::mt19937 random(7);
  for (int i = 0; i < 20'000; ++i) {
    std::string damaged = whole;
    for (int j = 0; j < 3; ++j) damaged[random() % damaged.size()] = static_cast<char>(random());
    refuse(damaged);
  }
}

TEST(keys_of_request_ids) {
  using twinjet::vllm::KeyOfRequestId;
  CHECK(KeyOfRequestId("a-b-ff") == 0xff);
  CHECK(KeyOfRequestId("a-ffffffffffffffff") == UINT64_MAX);
  for (const char* id : {"", "abc", "a-", "a-FF", "a-g", "a-11111111111111111", "a- 1"}) {
    CHECK(KeyOfRequestId(id) == 0);
  }
}

TEST(the_router_forgets_what_has_ended) {
  twinjet::vllm::StepRouter router;
  twinjet::stream::Pump pump;
  router.Open(0x1f, {&pump, 1, 1, 1, 0});
  const std::string text = Message({Output("r-1f", kFinished)}, kStats);
  const Frame frame = Bytes(text);
  router.Take({&frame, 1}, 0);
  CHECK(router.ended() == std::vector<uint64_t>{0x1f});
  CHECK(router.stepped() == std::vector<twinjet::stream::Pump*>{&pump});
  CHECK(router.num_open() == 0 && !router.Close(0x1f));
  router.Take({&frame, 1}, 0);
  CHECK(router.ended().empty() && router.stepped().empty());
}

TEST(a_large_message_is_taken_in_parts) {
  constexpr size_t kAtOnce = twinjet::vllm::StepRouter::kRowsAtOnce;
  twinjet::vllm::StepRouter router;
  twinjet::stream::Pump pump;
  std::vector<std::string> outputs;
  for (uint64_t key = 1; key <= 2 * kAtOnce + 1; ++key) {
    outputs.push_back(Output(IdOf(key), kFinished));
    router.Open(key, {&pump, key, 1, 1, 0});
  }
  const std::string text = Message(outputs, kStats);
  const Frame frame = Bytes(text);
  router.Take({&frame, 1}, 0);
  CHECK(router.has_rest() && router.ended().size() == kAtOnce && router.ended()[0] == 1);
  CHECK(router.Close(kAtOnce + 1));  // one of the next part
  router.TakeRest(0);
  CHECK(router.has_rest() && router.ended().size() == kAtOnce - 1 && router.ended()[0] == kAtOnce + 2);
  router.TakeRest(0);
  CHECK(!router.has_rest() && router.ended() == std::vector<uint64_t>{2 * kAtOnce + 1});
  CHECK(router.num_open() == 0);
}

}  // namespace
