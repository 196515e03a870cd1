// Detokenizer: the text of one output, token by token.
//
//   Detokenizer text(vocabulary, /*skip_special=*/true);
//   for (...) text.Feed(id, &shown);   // what is certain
//   text.Flush(&shown);                // the output has ended
//
// The pieces join to what Vocabulary::Decode gives for all ids at once, and nothing is ever taken back: text
// that a later token could change waits. It knows nothing of the prompt. Of a kFunction vocabulary it decodes
// a short window again and again, so there the equality holds as far as a token's text depends on its
// neighbours alone.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stream/utf8.h"
#include "stream/vocabulary.h"

namespace twinjet::stream {

class Detokenizer {
 public:
  Detokenizer(std::shared_ptr<const Vocabulary> vocabulary, bool skip_special)
      : vocabulary_(std::move(vocabulary)),
        num_to_strip_(vocabulary_->strip_left()),
        skip_special_(skip_special) {}

  // Appends to *text. Unknown ids give none. Throws what the vocabulary's function throws.
  void Feed(int32_t id, std::string* text);
  void Flush(std::string* text);

 private:
  void EndRun(std::string* text);
  void Append(std::string_view piece, std::string* text);
  void AdvanceWindow(bool is_last, std::string* text);

  std::shared_ptr<const Vocabulary> vocabulary_;
  Utf8Decoder utf8_;  // kByteLevel
  std::string run_;   // kByteFallback: bytes whose end has not come
  int32_t num_to_strip_;
  bool skip_special_;
  bool is_first_ = true;
  // kFunction: the last tokens shown and those that wait, and the text of the former.
  std::vector<int32_t> window_;
  size_t num_shown_ = 0;
  std::string shown_;
};

}  // namespace twinjet::stream
