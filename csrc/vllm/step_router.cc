#include "vllm/step_router.h"

#include <algorithm>

namespace twinjet::vllm {
namespace {

using stream::EngineFinish;
using stream::LogprobRows;
using stream::SequenceStep;
using stream::StepOutputs;
using stream::StopCause;

// The stop token by which our sampler ends a sequence that has no admissible one (engines/vllm/fields.py).
constexpr int32_t kNoToken = -1;

bool IsIrregular(const SequenceStep& row) {
  if (row.finish == EngineFinish::kAborted || row.finish == EngineFinish::kFailed) return true;
  return row.finish == EngineFinish::kStop && row.stop_cause == StopCause::kToken &&
         row.stop_token == kNoToken;
}

// Appends rows of `from` to `to`, at most `width` candidates each.
LogprobRows Append(const StepOutputs& from, const LogprobRows& rows, uint32_t width, StepOutputs* to) {
  LogprobRows made;
  made.num_rows = rows.num_rows;
  made.width = std::min(rows.width, width);
  made.first_candidate = static_cast<uint32_t>(to->candidate_ids.size());
  made.first_rank = static_cast<uint32_t>(to->ranks.size());
  for (uint32_t i = 0; i < rows.num_rows; ++i) {
    const auto ids = from.CandidateIds(rows, i).first(made.width);
    const auto logprobs = from.CandidateLogprobs(rows, i).first(made.width);
    to->candidate_ids.insert(to->candidate_ids.end(), ids.begin(), ids.end());
    to->candidate_logprobs.insert(to->candidate_logprobs.end(), logprobs.begin(), logprobs.end());
    to->ranks.push_back(from.Rank(rows, i));
  }
  return made;
}

}  // namespace

StepOutputs& StepRouter::OutputsOf(stream::Pump* pump) {
  for (size_t i = 0; i < num_groups_; ++i) {
    if (groups_[i].pump == pump) return groups_[i].outputs;
  }
  if (num_groups_ == groups_.size()) groups_.emplace_back();
  Group& group = groups_[num_groups_++];
  group.pump = pump;
  group.outputs.Clear();
  return group.outputs;
}

void StepRouter::Put(const SequenceStep& row, Sequence* sequence) {
  const Route& route = sequence->route;
  if (row.prompt_logprobs.num_rows > 0 && !sequence->told_prompt) {
    Append(step_, row.prompt_logprobs, route.prompt_width, &sequence->prompt);
  }
  // Only a part of the prompt's log probabilities; more follow.
  if (row.num_tokens == 0 && row.finish == EngineFinish::kNone) return;
  StepOutputs& outputs = OutputsOf(route.pump);
  SequenceStep& made = outputs.Add(route.pump_key);
  const auto tokens = step_.Tokens(row);
  outputs.token_ids.insert(outputs.token_ids.end(), tokens.begin(), tokens.end());
  made.num_tokens = row.num_tokens;
  made.finish = row.finish;
  made.stop_cause = row.stop_cause;
  made.stop_token = row.stop_token;
  outputs.text += step_.StopText(row);
  made.num_text_bytes = row.num_text_bytes;
  if (row.logprobs.num_rows > 0) made.logprobs = Append(step_, row.logprobs, route.width, &outputs);
  // A request that was preempted is prefilled, and tells of it, again.
  if (row.has_prompt && !sequence->told_prompt) {
    sequence->told_prompt = true;
    made.has_prompt = true;
    made.num_cached_tokens = row.num_cached_tokens;
    StepOutputs& prompt = sequence->prompt;
    if (!prompt.ranks.empty()) {
      LogprobRows all;
      all.num_rows = static_cast<uint32_t>(prompt.ranks.size());
      all.width = static_cast<uint32_t>(prompt.candidate_ids.size() / prompt.ranks.size());
      made.prompt_logprobs = Append(prompt, all, route.prompt_width, &outputs);
      prompt = StepOutputs();
    }
  }
  sequence->has_tokens |= row.num_tokens > 0;
}

void StepRouter::Take(std::span<const Frame> frames, double now) {
  num_groups_ = 0;
  irregular_.clear();
  ended_.clear();
  stepped_.clear();
  message_ = {};
  message_ = DecodeCoreOutputs(frames, &step_);
  for (const SequenceStep& row : step_.sequences) {
    const auto found = sequences_.find(row.key);
    if (found == sequences_.end()) continue;
    Sequence& sequence = found->second;
    if (IsIrregular(row)) {
      irregular_.push_back({row.key, row.finish, row.num_tokens, sequence.has_tokens});
    } else {
      Put(row, &sequence);
    }
    if (row.finish == EngineFinish::kNone) continue;
    ended_.push_back(row.key);
    sequences_.erase(found);
  }
  for (size_t i = 0; i < num_groups_; ++i) {
    groups_[i].pump->Step(groups_[i].outputs, now);
    stepped_.push_back(groups_[i].pump);
  }
}

}  // namespace twinjet::vllm
