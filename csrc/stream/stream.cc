#include "stream/stream.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace twinjet::stream {
namespace {

constexpr size_t kCandidateBytes = 32;

size_t NumBytes(const Delta& delta) {
  return delta.text.size() + sizeof(int32_t) * delta.token_ids.size() +
         kCandidateBytes * delta.logprobs.ids.size();
}

}  // namespace

Stream::Stream(std::shared_ptr<const Vocabulary> vocabulary, std::shared_ptr<const OutputRules> rules,
               uint32_t num_outputs, StreamFacts facts, double arrived_at, int64_t max_pending_bytes)
    : vocabulary_(std::move(vocabulary)),
      rules_(std::move(rules)),
      facts_(std::move(facts)),
      arrived_at_(arrived_at),
      max_pending_bytes_(max_pending_bytes),
      num_tokens_(num_outputs),
      has_ended_(num_outputs),
      stop_texts_(num_outputs),
      pending_(num_outputs),
      is_pending_(num_outputs),
      num_open_(num_outputs),
      dispatched_at_(arrived_at),
      last_token_at_(arrived_at) {
  outputs_.reserve(num_outputs);
  for (uint32_t i = 0; i < num_outputs; ++i) {
    outputs_.emplace_back(vocabulary_, rules_);
    pending_[i].output_index = i;
  }
}

bool Stream::Awaken() { return std::exchange(is_awaited_, false); }

bool Stream::PutQueued(uint32_t position, std::optional<double> expected_wait_s) {
  std::lock_guard lock(mutex_);
  if (is_dropped_) return false;
  // Only the latest place is of interest.
  if (!items_.empty() && items_.back().kind == Item::Kind::kQueued) items_.pop_back();
  items_.push_back({Item::Kind::kQueued, EncodeQueued(facts_, position, expected_wait_s)});
  return Awaken();
}

void Stream::SetDispatched(uint32_t queue_position, double at) {
  std::lock_guard lock(mutex_);
  queue_position_ = queue_position;
  dispatched_at_ = at;
}

bool Stream::PutPrompt(std::optional<uint32_t> num_cached_tokens, const LogprobList* logprobs) {
  std::lock_guard lock(mutex_);
  if (is_dropped_) return false;
  PutPromptLocked(num_cached_tokens, logprobs);
  return Awaken();
}

void Stream::PutPromptLocked(std::optional<uint32_t> num_cached_tokens, const LogprobList* logprobs) {
  is_prompt_told_ = true;
  num_cached_tokens_ = num_cached_tokens;
  if (reads_deltas_) {
    prompt_news_.emplace().num_cached_tokens = num_cached_tokens;
    if (logprobs) prompt_news_->logprobs = *logprobs;
    return;
  }
  items_.push_back({Item::Kind::kMessage, EncodeStarted(facts_, num_cached_tokens, queue_position_)});
  if (!logprobs) return;
  for (std::string& message : EncodePromptLogprobs(*logprobs, *vocabulary_, kLargeMessageBytes)) {
    items_.push_back({Item::Kind::kMessage, std::move(message)});
  }
}

Effect Stream::Put(const StepOutputs& step, const SequenceStep& row, uint32_t output_index, double now) {
  std::lock_guard lock(mutex_);
  Effect effect;
  if (is_dropped_ || output_index >= outputs_.size()) return effect;
  Output& output = outputs_[output_index];
  // Engines that run each output as a request of its own tell of the prompt for each.
  if (row.has_prompt && !is_prompt_told_) {
    effect.has_prompt = true;
    LogprobList logprobs;
    for (uint32_t i = 0; i < row.prompt_logprobs.num_rows; ++i) {
      logprobs.Add(step.CandidateIds(row.prompt_logprobs, i), step.CandidateLogprobs(row.prompt_logprobs, i),
                   step.Rank(row.prompt_logprobs, i));
    }
    std::optional<uint32_t> num_cached;
    if (row.num_cached_tokens >= 0) num_cached = static_cast<uint32_t>(row.num_cached_tokens);
    PutPromptLocked(num_cached, row.prompt_logprobs.width > 0 ? &logprobs : nullptr);
  }
  if (has_ended_[output_index]) return effect;
  if (row.finish == EngineFinish::kFailed || row.finish == EngineFinish::kAborted) {
    effect.has_failed = true;
    effect.is_awaited = Awaken();
    return effect;
  }
  if (row.num_tokens > 0 || row.finish != EngineFinish::kNone) {
    Delta& pending = PendingOf(output_index);
    const size_t num_bytes = NumBytes(pending);
    std::span<const int32_t> ids = step.Tokens(row);
    size_t num_taken =
        output.Take(ids, &pending.text, row.finish, row.stop_cause, row.stop_token, step.StopText(row));
    pending.token_ids.insert(pending.token_ids.end(), ids.begin(),
                             ids.begin() + static_cast<std::ptrdiff_t>(num_taken));
    for (uint32_t i = 0; i < std::min<size_t>(row.logprobs.num_rows, num_taken); ++i) {
      pending.logprobs.Add(step.CandidateIds(row.logprobs, i), step.CandidateLogprobs(row.logprobs, i),
                           step.Rank(row.logprobs, i));
    }
    num_tokens_[output_index] += static_cast<int64_t>(num_taken);
    effect.num_tokens = static_cast<uint32_t>(num_taken);
    NoteTokens(now, &effect);
    if (output.has_ended()) {
      pending.ending = output.ending();
      has_ended_[output_index] = true;
      effect.has_ended_early = row.finish == EngineFinish::kNone;
      effect.is_over = --num_open_ == 0;
    }
    Account(pending, num_bytes, &effect);
  }
  if (!items_.empty() || prompt_news_) effect.is_awaited = Awaken();
  return effect;
}

Effect Stream::PutMade(Delta delta, double now) {
  std::lock_guard lock(mutex_);
  Effect effect;
  const uint32_t index = delta.output_index;
  if (is_dropped_ || index >= outputs_.size() || has_ended_[index]) return effect;
  Delta& pending = PendingOf(index);
  const size_t num_bytes = NumBytes(pending);
  pending.text += delta.text;
  pending.token_ids.insert(pending.token_ids.end(), delta.token_ids.begin(), delta.token_ids.end());
  for (const LogprobList::Row& row : delta.logprobs.rows) {
    pending.logprobs.Add(std::span(delta.logprobs.ids).subspan(row.first, row.width),
                         std::span(delta.logprobs.logprobs).subspan(row.first, row.width), row.rank);
  }
  effect.num_tokens = static_cast<uint32_t>(delta.token_ids.size());
  num_tokens_[index] += effect.num_tokens;
  NoteTokens(now, &effect);
  if (delta.ending) {
    stop_texts_[index] = delta.ending->text;
    pending.ending = delta.ending;
    pending.ending->text = stop_texts_[index];
    has_ended_[index] = true;
    effect.is_over = --num_open_ == 0;
  }
  Account(pending, num_bytes, &effect);
  if (!items_.empty() || prompt_news_) effect.is_awaited = Awaken();
  return effect;
}

bool Stream::PutHandoff(std::string_view state, double now) {
  std::lock_guard lock(mutex_);
  if (is_dropped_ || num_open_ == 0) return false;
  items_.push_back({Item::Kind::kMessage, EncodeHandoff(facts_, state)});
  std::fill(has_ended_.begin(), has_ended_.end(), true);
  num_open_ = 0;
  first_token_at_ = last_token_at_ = now;
  return Awaken();
}

Delta& Stream::PendingOf(uint32_t output_index) {
  Delta& pending = pending_[output_index];
  if (is_pending_[output_index] && NumBytes(pending) >= kLargeMessageBytes) {
    auto of_output = [&](const Item& item) {
      return item.kind == Item::Kind::kDelta && !item.full && item.output_index == output_index;
    };
    auto item = std::find_if(items_.begin(), items_.end(), of_output);
    item->full = std::make_unique<Delta>(std::move(pending));
    pending = Delta();
    pending.output_index = output_index;
    is_pending_[output_index] = false;
  }
  if (!is_pending_[output_index]) {
    is_pending_[output_index] = true;
    pending.text.clear();
    pending.token_ids.clear();
    pending.logprobs.Clear();
    pending.ending.reset();
    items_.push_back({Item::Kind::kDelta, {}, output_index});
  }
  return pending;
}

void Stream::NoteTokens(double now, Effect* effect) {
  if (effect->num_tokens == 0) return;
  last_token_at_ = now;
  if (first_token_at_) return;
  first_token_at_ = now;
  effect->is_first = true;
}

void Stream::Account(const Delta& pending, size_t num_bytes_before, Effect* effect) {
  num_pending_bytes_ += static_cast<int64_t>(NumBytes(pending) - num_bytes_before);
  if (num_pending_bytes_ <= max_pending_bytes_) return;
  effect->has_overflowed = true;
  is_dropped_ = true;
  items_.clear();
}

void Stream::Attach(std::shared_ptr<Carrier> carrier, std::shared_ptr<void> call) {
  std::lock_guard lock(mutex_);
  carrier_ = std::move(carrier);
  call_ = std::move(call);
}

std::shared_ptr<Carrier> Stream::carrier() const {
  std::lock_guard lock(mutex_);
  return carrier_;
}

std::optional<double> Stream::blocked_since() const {
  std::lock_guard lock(mutex_);
  return blocked_since_;
}

template <typename Add>
void Stream::AddDelta(const Delta& delta, Add add) const {
  const uint32_t index = delta.output_index;
  if (!delta.text.empty() || !delta.token_ids.empty()) {
    add(EncodeDelta(index, delta.text, delta.token_ids, delta.logprobs, *vocabulary_));
  }
  if (delta.ending) {
    add(EncodeFinished(index, *delta.ending, static_cast<uint32_t>(num_tokens_[index])));
  }
}

template <typename Add>
void Stream::EncodeItems(Add add) {
  for (Item& item : items_) {
    if (item.kind != Item::Kind::kDelta) {
      add(std::move(item.message));
      continue;
    }
    if (item.full) {
      AddDelta(*item.full, add);
      continue;
    }
    is_pending_[item.output_index] = false;
    AddDelta(pending_[item.output_index], add);
  }
  items_.clear();
  num_pending_bytes_ = 0;
}

Stream::Carried Stream::TakeParcels(double now, const Carrier* carrier,
                                    std::vector<Carrier::Parcel>* parcels) {
  std::lock_guard lock(mutex_);
  if (!carrier_) return Carried::kNobody;
  if (carrier_.get() != carrier) return Carried::kOther;
  is_awaited_ = true;
  if (!carrier_->HasRoom(call_)) {
    if (!blocked_since_) blocked_since_ = now;
    return Carried::kDone;
  }
  blocked_since_.reset();
  EncodeItems([&](std::string message) { parcels->push_back({call_, std::move(message)}); });
  return Carried::kDone;
}

bool Stream::Take(std::vector<std::string>* messages) {
  std::lock_guard lock(mutex_);
  blocked_since_.reset();
  if (items_.empty()) {
    is_awaited_ = true;
    return false;
  }
  EncodeItems([&](std::string message) { messages->push_back(std::move(message)); });
  return true;
}

std::optional<PromptNews> Stream::TakePrompt() {
  std::lock_guard lock(mutex_);
  return std::exchange(prompt_news_, std::nullopt);
}

void Stream::TakeDeltas(std::vector<Delta>* deltas) {
  std::lock_guard lock(mutex_);
  if (items_.empty()) is_awaited_ = true;
  for (Item& item : items_) {
    if (item.kind != Item::Kind::kDelta) continue;
    if (item.full) {
      deltas->push_back(std::move(*item.full));
      continue;
    }
    is_pending_[item.output_index] = false;
    deltas->push_back(pending_[item.output_index]);
  }
  items_.clear();
  num_pending_bytes_ = 0;
}

void Stream::Drop() {
  std::lock_guard lock(mutex_);
  is_dropped_ = true;
  items_.clear();
}

std::string Stream::Summary() const {
  std::lock_guard lock(mutex_);
  const double first = first_token_at_.value_or(last_token_at_);
  StreamTimings timings{.queue_s = dispatched_at_ - arrived_at_,
                        .first_token_s = first - arrived_at_,
                        .prefill_s = first - dispatched_at_,
                        .per_token_s = PerTokenLocked(),
                        .total_s = last_token_at_ - arrived_at_};
  return EncodeSummary(facts_, timings, num_cached_tokens_, static_cast<uint32_t>(NumTokensLocked()));
}

int64_t Stream::NumTokensLocked() const {
  return std::accumulate(num_tokens_.begin(), num_tokens_.end(), int64_t{0});
}

std::optional<double> Stream::PerTokenLocked() const {
  const int64_t num_tokens = NumTokensLocked();
  if (!first_token_at_ || num_tokens < 2) return std::nullopt;
  return (last_token_at_ - *first_token_at_) / static_cast<double>(num_tokens - 1);
}

int64_t Stream::num_output_tokens() const {
  std::lock_guard lock(mutex_);
  return NumTokensLocked();
}

int64_t Stream::num_pending_bytes() const {
  std::lock_guard lock(mutex_);
  return num_pending_bytes_;
}

std::optional<double> Stream::first_token_at() const {
  std::lock_guard lock(mutex_);
  return first_token_at_;
}

double Stream::last_token_at() const {
  std::lock_guard lock(mutex_);
  return last_token_at_;
}

std::optional<double> Stream::first_token_s() const {
  std::lock_guard lock(mutex_);
  if (!first_token_at_) return std::nullopt;
  return *first_token_at_ - arrived_at_;
}

std::optional<double> Stream::per_token_s() const {
  std::lock_guard lock(mutex_);
  return PerTokenLocked();
}

bool Stream::is_over() const {
  std::lock_guard lock(mutex_);
  return num_open_ == 0;
}

bool Stream::has_begun() const {
  std::lock_guard lock(mutex_);
  return is_prompt_told_ || first_token_at_.has_value();
}

}  // namespace twinjet::stream
