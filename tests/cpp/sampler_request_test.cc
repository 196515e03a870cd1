// A request's history against a recount from scratch.
#include <cmath>
#include <limits>
#include <map>
#include <string>

#include "check.h"
#include "sampler/request.h"

using namespace twinjet::sampler;

namespace {

template <typename F>
bool Refused(F make) {
  try {
    make();
  } catch (const InvalidRequest&) {
    return true;
  }
  return false;
}

}  // namespace

TEST(ranges_are_exactly_what_is_refused_outside_of) {
  const auto refused = [](const std::string& name, double value) {
    RequestOptions options;
    RowParams& params = options.params;
    const float x = static_cast<float>(value);
    if (name == "temperature") params.temperature = x;
    if (name == "top_p") params.top_p = x;
    if (name == "min_p") params.min_p = x;
    if (name == "top_k") params.top_k = static_cast<int32_t>(value);
    if (name == "repetition_penalty") params.repetition_penalty = x;
    if (name == "frequency_penalty") params.frequency_penalty = x;
    if (name == "presence_penalty") params.presence_penalty = x;
    if (name == "logit_bias") options.biases = {{1, x}};
    return Refused([&] { Request(30, options); });
  };
  for (const ParamRange& range : kParamRanges) {
    const std::string name = range.name;
    CHECK(!refused(name, range.low));
    CHECK(!refused(name, range.high));
    if (name == "top_k") {
      CHECK(refused(name, range.low - 1));
      continue;
    }
    const float infinity = std::numeric_limits<float>::infinity();
    CHECK(refused(name, std::nextafter(static_cast<float>(range.low), -infinity)));
    CHECK(refused(name, infinity));
    CHECK(refused(name, std::numeric_limits<float>::quiet_NaN()));
  }
}

TEST(counts_follow_append_and_truncate) {
  std::mt19937_64 random = test::Random();
  for (int round = 0; round < 200; ++round) {
    RequestOptions options;
    options.params.repetition_penalty = 1.2f;
    std::vector<int32_t> prompt(random() % 20);
    for (int32_t& id : prompt) id = static_cast<int32_t>(random() % 40) - 3;  // some outside
    options.prompt_token_ids = prompt;
    Request request(30, options);
    std::vector<int32_t> output;
    for (int step = 0; step < 60; ++step) {
      if (random() % 4 == 0) {
        output.resize(random() % (output.size() + 1));
        request.Truncate(output.size());
      } else {
        output.push_back(static_cast<int32_t>(random() % 30));
        request.Append(output.back());
      }
      std::map<int32_t, std::pair<uint32_t, bool>> expected;
      for (int32_t id : prompt) {
        if (id >= 0 && id < 30) expected[id].second = true;
      }
      for (int32_t id : output) ++expected[id].first;
      std::map<int32_t, std::pair<uint32_t, bool>> actual;
      for (const TokenUse& use : request.Edits().uses) {
        if (use.output_count != 0 || use.in_prompt) actual[use.token_id] = {use.output_count, use.in_prompt};
      }
      CHECK(actual == expected);
      CHECK_EQ(request.Constants().race.position, output.size());
    }
  }
}

TEST(bad_words_ban_the_last_token_after_their_prefix) {
  RequestOptions options;
  options.bad_words = {{7}, {1, 2}, {1, 2, 3}};
  Request request(10, options);
  const auto banned = [&] {
    const RowEdits edits = request.Edits();
    return std::vector<int32_t>(edits.banned.begin(), edits.banned.end());
  };
  CHECK(banned() == std::vector<int32_t>({7}));
  request.Append(1);
  CHECK(banned() == std::vector<int32_t>({7, 2}));
  request.Append(2);
  CHECK(banned() == std::vector<int32_t>({7, 3}));
  request.Append(2);
  CHECK(banned() == std::vector<int32_t>({7}));
}

TEST(stop_tokens_are_masked_before_min_tokens) {
  RequestOptions options;
  options.min_tokens = 2;
  options.stop_token_ids = {4, 5};
  Request request(10, options);
  CHECK_EQ(request.Edits().early_stops.size, size_t{2});
  request.Append(0);
  CHECK_EQ(request.Edits().early_stops.size, size_t{2});
  request.Append(0);
  CHECK_EQ(request.Edits().early_stops.size, size_t{0});
}

TEST(bad_values_are_refused) {
  RequestOptions good;
  CHECK(!Refused([&] { Request(10, good); }));
  CHECK(Refused([&] { Request(0, good); }));
  CHECK(Refused([&] { Request(kMaxVocabSize + 1, good); }));
  RequestOptions bias;
  bias.biases = {{10, 1.0f}};
  CHECK(Refused([&] { Request(10, bias); }));
  bias.biases = {{1, PositiveInfinity()}};
  CHECK(Refused([&] { Request(10, bias); }));
  bias.biases = {{1, 1.0f}, {1, 2.0f}};
  CHECK(Refused([&] { Request(10, bias); }));
  RequestOptions word;
  word.bad_words = {{}};
  CHECK(Refused([&] { Request(10, word); }));
  Request request(10, good);
  CHECK(Refused([&] { request.Append(10); }));
  CHECK(Refused([&] { request.Truncate(1); }));
}
