// StepOutputs: what one engine step gave, for all its sequences, as flat arrays that are reused from step to
// step.
//
//   outputs.Clear();
//   SequenceStep& row = outputs.Add(key);
//   outputs.token_ids.push_back(17), row.num_tokens = 1;
//   row.finish = EngineFinish::kStop;
//
// Whoever decodes an engine's message fills it in place; it owns no pointers into that message. Rows of one
// sequence come in the order of its tokens. Not thread-safe.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace twinjet::stream {

// Names one sequence, that is one output of one request, from its submission to its end. 0 is none.
using SequenceKey = uint64_t;

// What the engine says of a sequence's end. kAborted and kFailed are no regular ends and fail the request, if
// it is still there: one that was cancelled is not.
enum class EngineFinish : uint8_t { kNone, kStop, kLength, kAborted, kFailed };

// What the engine names as the cause of kStop. kToken: stop_token. kText: a stop string, in stop_text.
enum class StopCause : uint8_t { kUnnamed, kToken, kText };

// Log probabilities of consecutive tokens: a part of StepOutputs' arrays. Each row has `width` candidates:
// the token in the sequence, then the best ones in order, which may hold it again; ranks are the first one's,
// from 1, 0 if not known.
struct LogprobRows {
  uint32_t num_rows = 0;
  uint32_t width = 0;
  uint32_t first_candidate = 0;  // in candidate_ids and candidate_logprobs
  uint32_t first_rank = 0;       // in ranks
};

struct SequenceStep {
  SequenceKey key = 0;
  uint32_t first_token = 0;  // in StepOutputs::token_ids
  uint32_t num_tokens = 0;
  EngineFinish finish = EngineFinish::kNone;
  StopCause stop_cause = StopCause::kUnnamed;
  bool has_prompt = false;         // the engine tells of the prompt: once, with or before the first token
  int32_t stop_token = 0;          // with StopCause::kToken
  int32_t num_cached_tokens = -1;  // prompt tokens from the prefix cache, with has_prompt; -1: not known
  uint32_t first_text = 0;         // stop string with StopCause::kText, in StepOutputs::text
  uint32_t num_text_bytes = 0;
  LogprobRows logprobs;  // one row a token, or none
  // With has_prompt: a row for each prompt token but the first. A width of 0: they were not asked for.
  LogprobRows prompt_logprobs;
};

struct StepOutputs {
  std::vector<SequenceStep> sequences;
  std::vector<int32_t> token_ids;
  std::vector<int32_t> candidate_ids;
  std::vector<float> candidate_logprobs;
  std::vector<uint32_t> ranks;
  std::string text;

  // Keeps the memory.
  void Clear() {
    sequences.clear();
    token_ids.clear();
    candidate_ids.clear();
    candidate_logprobs.clear();
    ranks.clear();
    text.clear();
  }

  // A row whose tokens, texts and log probabilities begin at the arrays' present ends. Valid until the next
  // Add().
  SequenceStep& Add(SequenceKey key) {
    SequenceStep& row = sequences.emplace_back();
    row.key = key;
    row.first_token = static_cast<uint32_t>(token_ids.size());
    row.first_text = static_cast<uint32_t>(text.size());
    return row;
  }

  std::span<const int32_t> Tokens(const SequenceStep& row) const {
    return std::span(token_ids).subspan(row.first_token, row.num_tokens);
  }
  std::string_view StopText(const SequenceStep& row) const {
    return std::string_view(text).substr(row.first_text, row.num_text_bytes);
  }
  // Row `index` of `rows`: its candidates' ids, their log probabilities, and the first one's rank.
  std::span<const int32_t> CandidateIds(const LogprobRows& rows, uint32_t index) const {
    return std::span(candidate_ids).subspan(rows.first_candidate + size_t{index} * rows.width, rows.width);
  }
  std::span<const float> CandidateLogprobs(const LogprobRows& rows, uint32_t index) const {
    return std::span(candidate_logprobs)
        .subspan(rows.first_candidate + size_t{index} * rows.width, rows.width);
  }
  uint32_t Rank(const LogprobRows& rows, uint32_t index) const { return ranks[rows.first_rank + index]; }
};

}  // namespace twinjet::stream
