#include "stream/detokenizer.h"

#include <algorithm>

namespace twinjet::stream {
namespace {

// Tokens of a kFunction vocabulary that may wait for a character's end. Each costs decoding all of them.
constexpr size_t kLongestWait = 64;

// Bytes of the whole characters that both begin with.
size_t CommonPrefix(std::string_view a, std::string_view b) {
  size_t size = 0;
  while (size < std::min(a.size(), b.size()) && a[size] == b[size]) ++size;
  while (size > 0 && size < a.size() && (static_cast<uint8_t>(a[size]) & 0xC0) == 0x80) --size;
  return size;
}

}  // namespace

void Detokenizer::Feed(int32_t id, std::string* text) {
  const Vocabulary& vocabulary = *vocabulary_;
  const uint8_t flags = vocabulary.flags(id);
  if (!(flags & Vocabulary::kKnown) || (skip_special_ && (flags & Vocabulary::kSpecial))) return;
  switch (vocabulary.joining()) {
    case Joining::kByteLevel:
      if (flags & Vocabulary::kWhole) {
        utf8_.FeedWhole(vocabulary.bytes(id), text);
      } else {
        utf8_.Feed(vocabulary.bytes(id), text);
      }
      break;
    case Joining::kByteFallback:
      if (flags & Vocabulary::kByte) {
        run_.append(vocabulary.bytes(id));
      } else {
        EndRun(text);
        Append(vocabulary.bytes(id), text);
      }
      break;
    case Joining::kMetaspace:
      text->append(is_first_ ? vocabulary.first_bytes(id) : vocabulary.TokenText(id));
      break;
    case Joining::kFunction:
      window_.push_back(id);
      AdvanceWindow(window_.size() - num_shown_ >= kLongestWait, text);
      break;
  }
  is_first_ = false;
}

void Detokenizer::Flush(std::string* text) {
  utf8_.Flush(text);
  EndRun(text);
  if (window_.size() > num_shown_) AdvanceWindow(true, text);
}

void Detokenizer::EndRun(std::string* text) {
  if (run_.empty()) return;
  if (IsUtf8(run_)) {
    Append(run_, text);
  } else {
    for (size_t i = 0; i < run_.size(); ++i) Append(kReplacement, text);
  }
  run_.clear();
}

void Detokenizer::Append(std::string_view piece, std::string* text) {
  while (num_to_strip_ > 0 && !piece.empty()) {
    if (piece.front() != ' ') {
      num_to_strip_ = 0;
      break;
    }
    piece.remove_prefix(1);
    --num_to_strip_;
  }
  text->append(piece);
}

void Detokenizer::AdvanceWindow(bool is_last, std::string* text) {
  std::string decoded = vocabulary_->decode_function()(window_, skip_special_);
  bool is_uncertain =
      decoded.ends_with(kReplacement) || decoded.size() <= shown_.size() || !decoded.starts_with(shown_);
  if (is_uncertain && !is_last) return;
  text->append(decoded, CommonPrefix(decoded, shown_));
  window_.erase(window_.begin(), window_.begin() + static_cast<std::ptrdiff_t>(num_shown_));
  num_shown_ = window_.size();
  shown_ = vocabulary_->decode_function()(window_, skip_special_);
}

}  // namespace twinjet::stream
