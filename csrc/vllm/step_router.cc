#include "vllm/step_router.h"

#include <algorithm>
#include <cassert>
#include <utility>

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

// Appends a row of `from` to `to`, all but what it says of the prompt.
SequenceStep& CopyRow(const StepOutputs& from, const SequenceStep& row, stream::SequenceKey key,
                      uint32_t width, StepOutputs* to) {
  SequenceStep& made = to->Add(key);
  const auto tokens = from.Tokens(row);
  to->token_ids.insert(to->token_ids.end(), tokens.begin(), tokens.end());
  made.num_tokens = row.num_tokens;
  made.finish = row.finish;
  made.stop_cause = row.stop_cause;
  made.stop_token = row.stop_token;
  to->text += from.StopText(row);
  made.num_text_bytes = row.num_text_bytes;
  if (row.logprobs.num_rows > 0) made.logprobs = Append(from, row.logprobs, width, to);
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

void StepRouter::Open(stream::SequenceKey key, const Route& route) {
  Sequence& sequence = sequences_[key];
  sequence.route = route;
  const auto first = route.first == 0 ? sequences_.end() : sequences_.find(route.first);
  sequence.prompt = first == sequences_.end() ? std::make_shared<Prompt>() : first->second.prompt;
}

void StepRouter::Put(const SequenceStep& row, Sequence* sequence) {
  const Route& route = sequence->route;
  Prompt& prompt = *sequence->prompt;
  const bool is_first = route.first == 0;
  if (is_first && !prompt.is_told && row.prompt_logprobs.num_rows > 0) {
    Append(step_, row.prompt_logprobs, route.prompt_width, &prompt.logprobs);
  }
  // Only a part of the prompt's log probabilities; more follow.
  if (row.num_tokens == 0 && row.finish == EngineFinish::kNone) return;
  if (!is_first && !prompt.is_told) {
    CopyRow(step_, row, route.pump_key, route.width, &prompt.waiting);
    return;
  }
  StepOutputs& outputs = OutputsOf(route.pump);
  SequenceStep& made = CopyRow(step_, row, route.pump_key, route.width, &outputs);
  // A request that was preempted is prefilled, and tells of it, again.
  if (!is_first || prompt.is_told || !row.has_prompt) return;
  prompt.is_told = true;
  made.has_prompt = true;
  made.num_cached_tokens = row.num_cached_tokens;
  if (const StepOutputs& all = prompt.logprobs; !all.ranks.empty()) {
    LogprobRows rows;
    rows.num_rows = static_cast<uint32_t>(all.ranks.size());
    rows.width = static_cast<uint32_t>(all.candidate_ids.size() / all.ranks.size());
    made.prompt_logprobs = Append(all, rows, route.prompt_width, &outputs);
    prompt.logprobs = StepOutputs();
  }
  const StepOutputs waiting = std::exchange(prompt.waiting, StepOutputs());
  for (const SequenceStep& other : waiting.sequences) {
    CopyRow(waiting, other, other.key, route.width, &outputs);
  }
}

void StepRouter::Take(std::span<const Frame> frames, double now) {
  assert(!has_rest());
  next_row_ = 0;
  message_ = {};
  message_ = DecodeCoreOutputs(frames, &step_);
  TakeRest(now);
}

void StepRouter::TakeRest(double now) {
  num_groups_ = 0;
  irregular_.clear();
  ended_.clear();
  stepped_.clear();
  is_eventful_ = false;
  const size_t end = std::min(step_.sequences.size(), next_row_ + kRowsAtOnce);
  for (; next_row_ < end; ++next_row_) {
    const SequenceStep& row = step_.sequences[next_row_];
    const auto found = sequences_.find(row.key);
    if (found == sequences_.end()) continue;
    Sequence& sequence = found->second;
    if (IsIrregular(row)) {
      irregular_.push_back({row.key, row.finish, row.num_tokens});
    } else {
      Put(row, &sequence);
    }
    if (row.finish == EngineFinish::kNone) continue;
    ended_.push_back(row.key);
    sequences_.erase(found);
  }
  for (size_t i = 0; i < num_groups_; ++i) {
    is_eventful_ |= groups_[i].pump->Step(groups_[i].outputs, now);
    stepped_.push_back(groups_[i].pump);
  }
}

}  // namespace twinjet::vllm
