#include "stream/responses.h"

#include <algorithm>
#include <cmath>

#include "stream/wire.h"

namespace twinjet::stream {
namespace {

// Field numbers of GenerateResponse's oneof.
enum Event : uint32_t {
  kStarted = 1,
  kDelta = 2,
  kFinished = 3,
  kSummary = 4,
  kQueued = 5,
  kPromptLogprobs = 6,
  kHandoff = 7
};

std::string Wrap(Event event, std::string_view body) {
  std::string message;
  message.reserve(body.size() + 8);
  WireWriter(&message).SetBytes(event, body);
  return message;
}

std::string Duration(double seconds) {
  std::string body;
  WireWriter writer(&body);
  // Also turns NaN into 0.
  double nanos = seconds > 0 ? std::min(std::floor(seconds * 1e9), 9e18) : 0;
  uint64_t whole = static_cast<uint64_t>(nanos);
  writer.Scalar(1, whole / 1'000'000'000);
  writer.Scalar(2, whole % 1'000'000'000);
  return body;
}

// rank 0: not known.
std::string Logprob(int32_t id, float logprob, uint32_t rank, const Vocabulary& vocabulary) {
  std::string body;
  WireWriter writer(&body);
  writer.Scalar(1, Int32Bits(id));
  writer.Float(2, std::max(logprob, kMinLogprob));
  if (rank > 0) writer.Set(3, rank);
  writer.Bytes(4, vocabulary.TokenText(id));
  return body;
}

void TokenLogprobs(const LogprobList& list, const LogprobList::Row& row, uint32_t field,
                   const Vocabulary& vocabulary, std::string* out) {
  std::string body;
  WireWriter writer(&body);
  for (uint32_t i = 0; i < row.width; ++i) {
    int32_t id = list.ids[row.first + i];
    float logprob = list.logprobs[row.first + i];
    writer.SetBytes(i == 0 ? 1 : 2, Logprob(id, logprob, i == 0 ? row.rank : i, vocabulary));
  }
  WireWriter(out).SetBytes(field, body);
}

}  // namespace

void LogprobList::Add(std::span<const int32_t> row_ids, std::span<const float> row_logprobs, uint32_t rank) {
  rows.push_back({static_cast<uint32_t>(ids.size()), static_cast<uint32_t>(row_ids.size()), rank});
  ids.insert(ids.end(), row_ids.begin(), row_ids.end());
  logprobs.insert(logprobs.end(), row_logprobs.begin(), row_logprobs.end());
}

std::string EncodeQueued(const StreamFacts& facts, uint32_t position, std::optional<double> expected_wait_s) {
  std::string body;
  WireWriter writer(&body);
  writer.Bytes(1, facts.request_id);
  writer.Scalar(2, position);
  if (expected_wait_s) writer.SetBytes(3, Duration(*expected_wait_s));
  return Wrap(kQueued, body);
}

std::string EncodeStarted(const StreamFacts& facts, std::optional<uint32_t> num_cached_tokens,
                          uint32_t queue_position) {
  std::string body;
  WireWriter writer(&body);
  writer.Bytes(1, facts.request_id);
  writer.Bytes(2, facts.model);
  writer.Bytes(3, facts.engine);
  writer.Scalar(4, facts.num_prompt_tokens);
  if (num_cached_tokens) writer.Set(5, *num_cached_tokens);
  writer.Bytes(6, facts.deployment);
  writer.Scalar(7, queue_position);
  return Wrap(kStarted, body);
}

std::vector<std::string> EncodePromptLogprobs(const LogprobList& logprobs, const Vocabulary& vocabulary,
                                              size_t num_bytes) {
  std::vector<std::string> messages;
  std::string body;
  for (const LogprobList::Row& row : logprobs.rows) {
    TokenLogprobs(logprobs, row, 1, vocabulary, &body);
    if (body.size() < num_bytes) continue;
    messages.push_back(Wrap(kPromptLogprobs, body));
    body.clear();
  }
  if (messages.empty() || !body.empty()) messages.push_back(Wrap(kPromptLogprobs, body));
  return messages;
}

std::string EncodeHandoff(const StreamFacts& facts, std::string_view state) {
  std::string body;
  WireWriter writer(&body);
  writer.Bytes(1, state);
  writer.Scalar(2, facts.seed);
  return Wrap(kHandoff, body);
}

std::string EncodeDelta(uint32_t output_index, std::string_view text, std::span<const int32_t> token_ids,
                        const LogprobList& logprobs, const Vocabulary& vocabulary) {
  std::string rest;
  for (const LogprobList::Row& row : logprobs.rows) TokenLogprobs(logprobs, row, 4, vocabulary, &rest);
  size_t size = rest.size();
  if (output_index != 0) size += 1 + VarintSize(output_index);
  if (!text.empty()) size += 1 + VarintSize(text.size()) + text.size();
  if (!token_ids.empty()) {
    size_t packed = 0;
    for (int32_t id : token_ids) packed += VarintSize(Int32Bits(id));
    size += 1 + VarintSize(packed) + packed;
  }
  std::string message;
  message.reserve(size + 1 + VarintSize(size));
  WireWriter writer(&message);
  writer.Begin(kDelta, size);
  writer.Scalar(1, output_index);
  writer.Bytes(2, text);
  writer.PackedInt32(3, token_ids);
  message.append(rest);
  return message;
}

std::string EncodeFinished(uint32_t output_index, const Ending& ending, uint32_t num_tokens) {
  std::string body;
  WireWriter writer(&body);
  writer.Scalar(1, output_index);
  writer.Scalar(2, ending.reason == Ending::Reason::kLength ? 2 : 1);
  switch (ending.cause) {
    case Ending::Cause::kEos:
      writer.Set(3, Int32Bits(ending.token));
      break;
    case Ending::Cause::kStopToken:
      writer.Set(4, Int32Bits(ending.token));
      break;
    case Ending::Cause::kStopString:
      writer.SetBytes(5, ending.text);
      break;
    case Ending::Cause::kUnnamed:
      break;
  }
  writer.Scalar(6, num_tokens);
  return Wrap(kFinished, body);
}

std::string EncodeSummary(const StreamFacts& facts, const StreamTimings& timings,
                          std::optional<uint32_t> num_cached_tokens, uint32_t num_output_tokens) {
  std::string usage;
  WireWriter usage_writer(&usage);
  usage_writer.Scalar(1, facts.num_prompt_tokens);
  if (num_cached_tokens) usage_writer.Set(2, *num_cached_tokens);
  usage_writer.Scalar(3, num_output_tokens);
  std::string times;
  WireWriter times_writer(&times);
  times_writer.SetBytes(1, Duration(timings.queue_s));
  times_writer.SetBytes(2, Duration(timings.first_token_s));
  times_writer.SetBytes(3, Duration(timings.prefill_s));
  if (timings.per_token_s) times_writer.SetBytes(4, Duration(*timings.per_token_s));
  times_writer.SetBytes(5, Duration(timings.total_s));
  std::string body;
  WireWriter writer(&body);
  writer.SetBytes(1, usage);
  writer.SetBytes(2, times);
  writer.Scalar(3, facts.seed);
  writer.Bytes(4, facts.sampler);
  return Wrap(kSummary, body);
}

}  // namespace twinjet::stream
