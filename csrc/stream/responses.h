// The bytes of GenerateResponse (proto/twinjet/v1/generation.proto), event by event. Equal to what protobuf
// makes of the same values; tests/stream/test_responses.py compares them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "stream/output.h"
#include "stream/step_outputs.h"
#include "stream/vocabulary.h"

namespace twinjet::stream {

// Log probabilities are sent no lower than this, which stands for minus infinity.
inline constexpr float kMinLogprob = -9999.0f;

// Log probabilities of consecutive tokens, copied out of a step.
struct LogprobList {
  struct Row {
    uint32_t first = 0;  // in ids and logprobs
    uint32_t width = 0;  // the token in the sequence, then the best ones
    uint32_t rank = 0;   // of the former; 0: not known
  };
  std::vector<Row> rows;
  std::vector<int32_t> ids;
  std::vector<float> logprobs;

  bool empty() const { return rows.empty(); }
  void Clear() {
    rows.clear();
    ids.clear();
    logprobs.clear();
  }
  void Add(std::span<const int32_t> row_ids, std::span<const float> row_logprobs, uint32_t rank);
};

// What does not change over a stream.
struct StreamFacts {
  std::string request_id;
  std::string model;
  std::string engine;
  std::string deployment;
  std::string sampler;
  uint32_t num_prompt_tokens = 0;
  uint64_t seed = 0;
};

// Seconds, or nothing where a timing is not known.
struct StreamTimings {
  double queue_s = 0;
  double first_token_s = 0;
  double prefill_s = 0;
  std::optional<double> per_token_s;
  double total_s = 0;
};

std::string EncodeQueued(const StreamFacts& facts, uint32_t position, std::optional<double> expected_wait_s);
std::string EncodeStarted(const StreamFacts& facts, std::optional<uint32_t> num_cached_tokens,
                          uint32_t queue_position);
// In messages that end with the row that brings them to num_bytes; at least one.
std::vector<std::string> EncodePromptLogprobs(const LogprobList& logprobs, const Vocabulary& vocabulary,
                                              size_t num_bytes);
std::string EncodeHandoff(const StreamFacts& facts, std::string_view state);
std::string EncodeDelta(uint32_t output_index, std::string_view text, std::span<const int32_t> token_ids,
                        const LogprobList& logprobs, const Vocabulary& vocabulary);
std::string EncodeFinished(uint32_t output_index, const Ending& ending, uint32_t num_tokens);
std::string EncodeSummary(const StreamFacts& facts, const StreamTimings& timings,
                          std::optional<uint32_t> num_cached_tokens, uint32_t num_output_tokens);

}  // namespace twinjet::stream
