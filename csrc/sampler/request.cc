#include "sampler/request.h"

#include <algorithm>
#include <sstream>

#include "sampler/bad_text.h"

namespace twinjet::sampler {
namespace {

template <typename T>
[[noreturn]] void Refuse(const char* what, T value, const char* allowed) {
  std::ostringstream text;
  text << what << " is " << value << ": must be " << allowed;
  throw InvalidRequest(text.str());
}

void Check(const RowParams& params, int32_t vocab_size, RowConstants* constants) {
  switch (PrepareRow(params, vocab_size, constants)) {
    case ParamError::kNone:
      return;
    case ParamError::kTemperature:
      Refuse("temperature", params.temperature, "finite and at least 0");
    case ParamError::kTopP:
      Refuse("top_p", params.top_p, "finite");
    case ParamError::kMinP:
      Refuse("min_p", params.min_p, "finite");
    case ParamError::kTopK:
      Refuse("top_k", params.top_k, "at least -1");
    case ParamError::kRepetitionPenalty:
      Refuse("repetition_penalty", params.repetition_penalty, "finite and above 2.94e-39");
    case ParamError::kFrequencyPenalty:
      Refuse("frequency_penalty", params.frequency_penalty, "finite");
    case ParamError::kPresencePenalty:
      Refuse("presence_penalty", params.presence_penalty, "finite");
  }
}

}  // namespace

Request::Request(int32_t vocab_size, const RequestOptions& options)
    : vocab_size_(vocab_size), params_(options.params), bad_words_(options.bad_words) {
  if (vocab_size < 1 || vocab_size > kMaxVocabSize) Refuse("vocab_size", vocab_size, "in [1, 524288]");
  Check(params_, vocab_size, &constants_);
  if (options.position_offset < 0) Refuse("position_offset", options.position_offset, "at least 0");
  position_offset_ = static_cast<uint64_t>(options.position_offset);
  if (options.min_tokens < 0) Refuse("min_tokens", options.min_tokens, "at least 0");
  min_tokens_ = static_cast<size_t>(options.min_tokens);
  counts_prompt_ = params_.repetition_penalty != 1.0f;
  counts_output_ = counts_prompt_ || params_.frequency_penalty != 0.0f || params_.presence_penalty != 0.0f;

  for (const TokenBias& bias : options.biases) {
    CheckToken(bias.token_id, "logit_bias token");
    if (!IsFinite(bias.bias)) Refuse("logit_bias", bias.bias, "finite");
  }
  biases_ = options.biases;
  std::sort(biases_.begin(), biases_.end(),
            [](const TokenBias& a, const TokenBias& b) { return a.token_id < b.token_id; });
  for (size_t i = 1; i < biases_.size(); ++i) {
    if (biases_[i].token_id == biases_[i - 1].token_id) {
      Refuse("logit_bias token", biases_[i].token_id, "given once");
    }
  }
  if (options.has_allowed) {
    allowed_mask_.resize((static_cast<size_t>(vocab_size) + 31) / 32);
    for (int32_t id : options.allowed_token_ids) {
      CheckToken(id, "allowed token");
      allowed_mask_[static_cast<size_t>(id / 32)] |= 1u << (id % 32);
    }
  }
  for (const std::vector<int32_t>& word : bad_words_) {
    if (word.empty()) throw InvalidRequest("a bad word is empty: must have at least one token");
    for (int32_t id : word) CheckToken(id, "bad word token");
  }
  banned_.reserve(bad_words_.size());
  bad_text_ = options.bad_text;
  if (bad_text_ != nullptr) MaskBadText();
  for (int32_t id : options.stop_token_ids) CheckToken(id, "stop token");
  stop_token_ids_ = options.stop_token_ids;

  if (counts_prompt_) {
    for (int32_t id : options.prompt_token_ids) {
      if (id >= 0 && id < vocab_size_) UseOf(id)->in_prompt = true;
    }
  }
  for (int32_t id : options.output_token_ids) Append(id);
}

void Request::CheckToken(int32_t token_id, const char* what) const {
  if (token_id >= 0 && token_id < vocab_size_) return;
  std::ostringstream text;
  text << what << " is " << token_id << ": must be in [0, " << vocab_size_ << ")";
  throw InvalidRequest(text.str());
}

TokenUse* Request::UseOf(int32_t token_id) {
  const auto [place, is_new] = use_places_.try_emplace(token_id, uses_.size());
  if (is_new) uses_.push_back({token_id, 0, false});
  return &uses_[place->second];
}

void Request::Append(int32_t token_id) {
  CheckToken(token_id, "output token");
  output_token_ids_.push_back(token_id);
  if (bad_text_ != nullptr) AddText(token_id);
  if (counts_output_) ++UseOf(token_id)->output_count;
}

void Request::Truncate(size_t num_output_tokens) {
  if (num_output_tokens > output_token_ids_.size()) {
    Refuse("num_output_tokens", num_output_tokens, "at most the present number");
  }
  while (output_token_ids_.size() > num_output_tokens) {
    if (counts_output_) --UseOf(output_token_ids_.back())->output_count;
    output_token_ids_.pop_back();
  }
  if (bad_text_ == nullptr) return;
  // Back as far as the tail reaches; tokens without text do not count.
  size_t first = output_token_ids_.size();
  for (size_t num_bytes = 0; first > 0 && num_bytes < bad_text_->num_tail_bytes();) {
    num_bytes += bad_text_->TextOf(output_token_ids_[--first]).size();
  }
  tail_.clear();
  for (size_t i = first; i < output_token_ids_.size(); ++i) AddText(output_token_ids_[i]);
}

void Request::MaskBadText() {
  if (!bad_text_->masks_any()) return;
  const size_t num_words = (static_cast<size_t>(vocab_size_) + 31) / 32;
  const std::vector<uint32_t>& mask = bad_text_->allowed_mask();
  if (allowed_mask_.empty()) allowed_mask_.assign(num_words, ~0u);
  for (size_t i = 0; i < std::min(num_words, mask.size()); ++i) allowed_mask_[i] &= mask[i];
}

void Request::AddText(int32_t token_id) {
  tail_ += bad_text_->TextOf(token_id);
  const size_t most = bad_text_->num_tail_bytes();
  if (tail_.size() > most) tail_.erase(0, tail_.size() - most);
}

RowConstants Request::Constants() const {
  RowConstants constants = constants_;
  constants.race.position = position();
  return constants;
}

bool Request::EndsWith(std::span<const int32_t> tokens) const {
  return tokens.size() <= output_token_ids_.size() &&
         std::equal(tokens.rbegin(), tokens.rend(), output_token_ids_.rbegin());
}

RowEdits Request::Edits() {
  banned_.clear();
  for (const std::vector<int32_t>& word : bad_words_) {
    if (EndsWith(std::span(word).first(word.size() - 1))) banned_.push_back(word.back());
  }
  if (bad_text_ != nullptr && !tail_.empty()) {
    bad_text_->BannedAfter(tail_, &banned_);
    // The texts may know more tokens than the model has.
    std::erase_if(banned_, [this](int32_t id) { return id >= vocab_size_; });
    std::sort(banned_.begin(), banned_.end());
    banned_.erase(std::unique(banned_.begin(), banned_.end()), banned_.end());
  }
  RowEdits edits;
  edits.allowed_mask = allowed_mask_.empty() ? nullptr : allowed_mask_.data();
  edits.banned = {banned_.data(), banned_.size()};
  if (output_token_ids_.size() < min_tokens_)
    edits.early_stops = {stop_token_ids_.data(), stop_token_ids_.size()};
  edits.biases = {biases_.data(), biases_.size()};
  edits.uses = {uses_.data(), uses_.size()};
  return edits;
}

}  // namespace twinjet::sampler
