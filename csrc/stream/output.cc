#include "stream/output.h"

#include <algorithm>

namespace twinjet::stream {

Output::Output(std::shared_ptr<const Vocabulary> vocabulary, std::shared_ptr<const OutputRules> rules)
    : rules_(std::move(rules)),
      detokenizer_(std::move(vocabulary), rules_->skip_special),
      stops_(rules_->stop, rules_->include_stop) {}

bool Output::IsEos(int32_t id) const {
  return std::ranges::find(rules_->eos_token_ids, id) != rules_->eos_token_ids.end();
}

bool Output::IsStop(int32_t id) const {
  return std::ranges::find(rules_->stop_token_ids, id) != rules_->stop_token_ids.end();
}

size_t Output::Take(std::span<const int32_t> ids, std::string* text, EngineFinish finish, StopCause cause,
                    int32_t stop_token, std::string_view stop_text) {
  using Reason = Ending::Reason;
  size_t num_taken = 0;
  // The engine's own stop may be at a token that the rules do not know, which shows no text either.
  const bool is_named = finish == EngineFinish::kStop && cause == StopCause::kToken;
  for (int32_t id : ids) {
    if (has_ended()) return num_taken;
    ++num_taken;
    bool is_last = num_taken == ids.size();
    TakeOne(id, is_named && is_last && id == stop_token, text);
  }
  if (has_ended()) return num_taken;
  if (finish == EngineFinish::kLength) {
    End({.reason = Reason::kLength}, text);
  } else if (finish == EngineFinish::kStop) {
    Ending ending{.reason = Reason::kStop};
    if (is_named) {
      ending.cause = IsEos(stop_token) ? Ending::Cause::kEos : Ending::Cause::kStopToken;
      ending.token = stop_token;
    } else if (cause == StopCause::kText) {
      auto found = std::ranges::find(*rules_->stop, stop_text);
      if (found != rules_->stop->end()) {
        ending.cause = Ending::Cause::kStopString;
        ending.text = *found;
      }
    }
    End(ending, text);
  }
  return num_taken;
}

void Output::TakeOne(int32_t id, bool is_stop, std::string* text) {
  ++num_tokens_;
  const bool is_eos = IsEos(id);
  if (num_tokens_ > rules_->min_tokens && (is_stop || is_eos || IsStop(id))) {
    if (rules_->include_stop) {
      fresh_.clear();
      detokenizer_.Feed(id, &fresh_);
      Show(fresh_, text);
    }
    End({.reason = Ending::Reason::kStop,
         .cause = is_eos ? Ending::Cause::kEos : Ending::Cause::kStopToken,
         .token = id},
        text);
    return;
  }
  if (stops_.has_stops()) {
    fresh_.clear();
    detokenizer_.Feed(id, &fresh_);
    Show(fresh_, text);
  } else {
    detokenizer_.Feed(id, text);
  }
  if (!has_ended() && num_tokens_ >= rules_->max_tokens) End({.reason = Ending::Reason::kLength}, text);
}

void Output::Show(std::string_view text, std::string* shown) {
  stops_.Feed(text, num_tokens_ > rules_->min_tokens, shown);
  if (stops_.matched() < 0) return;
  ending_ = {.reason = Ending::Reason::kStop,
             .cause = Ending::Cause::kStopString,
             .text = (*rules_->stop)[static_cast<size_t>(stops_.matched())]};
}

// What waited is shown, and may itself complete a stop string, which then is the cause.
void Output::End(Ending ending, std::string* text) {
  if (has_ended()) return;
  fresh_.clear();
  detokenizer_.Flush(&fresh_);
  Show(fresh_, text);
  if (has_ended()) return;
  stops_.Flush(text);
  ending_ = ending;
}

}  // namespace twinjet::stream
