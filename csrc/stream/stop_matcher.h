// StopMatcher: finds stop strings in text that arrives in pieces, and holds back what may still become one,
// so that no text is ever taken back.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace twinjet::stream {

class StopMatcher {
 public:
  // stops: not empty strings, UTF-8; may be none. include: keep the matched string in the text.
  StopMatcher(std::shared_ptr<const std::vector<std::string>> stops, bool include)
      : stops_(std::move(stops)), include_(include) {}

  bool has_stops() const { return !stops_->empty(); }
  // Index of the stop string that was found, -1 if none was.
  int matched() const { return matched_; }

  // Takes new text and appends to *shown what may be shown; after a match nothing. Of several stop strings
  // the one that is complete first counts, of two complete at once the one that begins first. is_armed: false
  // lets those that the new text completes pass.
  void Feed(std::string_view text, bool is_armed, std::string* shown);
  // The output has ended otherwise: appends what is held back.
  void Flush(std::string* shown);

 private:
  std::shared_ptr<const std::vector<std::string>> stops_;
  bool include_;
  int matched_ = -1;
  std::string held_;
};

}  // namespace twinjet::stream
