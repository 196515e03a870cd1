// Output: one output of a request: tokens in, text out, and why it ended. The same rules for every engine.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "stream/detokenizer.h"
#include "stream/step_outputs.h"
#include "stream/stop_matcher.h"

namespace twinjet::stream {

// What ends an output, and how its text is made. One object for all outputs of a request.
struct OutputRules {
  std::shared_ptr<const std::vector<std::string>> stop = std::make_shared<std::vector<std::string>>();
  std::vector<int32_t> eos_token_ids;  // none with ignore_eos
  std::vector<int32_t> stop_token_ids;
  // Up to so many tokens neither a token nor a stop string ends the output.
  int64_t min_tokens = 0;
  int64_t max_tokens = INT64_MAX;
  bool include_stop = false;  // keep the text of what ended the output
  bool skip_special = true;
};

// kUnnamed: a stop that names no cause: the grammar of a constraint was complete.
struct Ending {
  enum class Reason : uint8_t { kNone, kStop, kLength } reason = Reason::kNone;
  enum class Cause : uint8_t { kUnnamed, kEos, kStopToken, kStopString } cause = Cause::kUnnamed;
  int32_t token = 0;           // of kEos and kStopToken
  std::string_view text = {};  // of kStopString; lives as long as the rules
};

class Output {
 public:
  Output(std::shared_ptr<const Vocabulary> vocabulary, std::shared_ptr<const OutputRules> rules);

  bool has_ended() const { return ending_.reason != Ending::Reason::kNone; }
  const Ending& ending() const { return ending_; }
  int64_t num_tokens() const { return num_tokens_; }

  // Takes tokens up to the one that ends the output, and returns how many that is; appends to *text what is
  // certain. finish: what the engine says with them; it counts where the rules do not end the output earlier.
  // kAborted and kFailed end nothing. stop_text must be of the rules' stop strings, any other text is no
  // cause.
  size_t Take(std::span<const int32_t> ids, std::string* text, EngineFinish finish = EngineFinish::kNone,
              StopCause cause = StopCause::kUnnamed, int32_t stop_token = 0, std::string_view stop_text = {});

 private:
  void TakeOne(int32_t id, bool is_stop, std::string* text);
  void Show(std::string_view text, std::string* shown);
  void End(Ending ending, std::string* text);
  bool IsEos(int32_t id) const;
  bool IsStop(int32_t id) const;

  std::shared_ptr<const OutputRules> rules_;
  Detokenizer detokenizer_;
  StopMatcher stops_;
  int64_t num_tokens_ = 0;
  Ending ending_;
  std::string fresh_;  // memory of one call
};

}  // namespace twinjet::stream
