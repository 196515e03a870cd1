#include "stream/stop_matcher.h"

#include <algorithm>

namespace twinjet::stream {
namespace {

// Length of the longest proper prefix of `stop` that `text` ends with.
size_t Overlap(std::string_view text, std::string_view stop) {
  for (size_t size = std::min(stop.size() - 1, text.size()); size > 0; --size) {
    if (text.ends_with(stop.substr(0, size))) return size;
  }
  return 0;
}

}  // namespace

void StopMatcher::Feed(std::string_view text, bool is_armed, std::string* shown) {
  if (matched_ >= 0) return;
  if (stops_->empty()) {
    shown->append(text);
    return;
  }
  const size_t num_held = held_.size();
  held_.append(text);
  const std::string_view whole = held_;
  size_t first_end = std::string_view::npos;
  size_t first_at = 0;
  for (size_t i = 0; is_armed && i < stops_->size(); ++i) {
    const std::string& stop = (*stops_)[i];
    // What ends inside the held text was looked for when it came.
    size_t from = num_held + 1 > stop.size() ? num_held + 1 - stop.size() : 0;
    size_t at = whole.find(stop, from);
    if (at == std::string_view::npos) continue;
    size_t end = at + stop.size();
    if (end < first_end || (end == first_end && at < first_at)) {
      first_end = end;
      first_at = at;
      matched_ = static_cast<int>(i);
    }
  }
  if (matched_ >= 0) {
    shown->append(whole.substr(0, include_ ? first_end : first_at));
    held_.clear();
    return;
  }
  size_t keep = 0;
  for (const std::string& stop : *stops_) keep = std::max(keep, Overlap(whole, stop));
  shown->append(whole.substr(0, whole.size() - keep));
  held_.erase(0, held_.size() - keep);
}

void StopMatcher::Flush(std::string* shown) {
  shown->append(held_);
  held_.clear();
}

}  // namespace twinjet::stream
