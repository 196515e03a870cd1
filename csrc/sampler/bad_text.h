// Strings that an output may not contain, whatever tokens they would be made of.
//
// A token is banned at a step if the text so far and its own text would then contain one of the strings. Two
// cases: a string lies in the token alone, which depends on nothing and is a mask made once; or it begins in
// the text so far. Then some suffix of the text is a beginning of the string, and the token begins with the
// rest: with the tokens sorted by their texts, those are neighbours. So a step costs a look at each of the
// last few bytes, two binary searches for each that begins a string, and what is banned.
//
// Texts are bytes of UTF-8: a character's bytes may come from several tokens. Half a character that shows as
// U+FFFD is not seen as one.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace twinjet::sampler {

// What each token adds to a text. Immutable; made once for a model, saved and loaded, shared by its requests.
class TokenTexts {
 public:
  // texts: by token id. is_special: tokens that may be left out of the text.
  TokenTexts(std::span<const std::string_view> texts, std::span<const uint8_t> is_special);
  // Of Save's bytes. Throws InvalidRequest if they are something else.
  static TokenTexts Load(std::string_view saved);
  std::string Save() const;

  int32_t size() const { return static_cast<int32_t>(special_.size()); }
  std::string_view text(int32_t id) const;
  bool is_special(int32_t id) const { return special_[static_cast<size_t>(id)] != 0; }
  // Ids whose text begins with `start`, in the order of their texts.
  std::span<const int32_t> StartingWith(std::string_view start) const;
  // The same as places in order(), the second not in it.
  std::pair<int32_t, int32_t> PlacesStartingWith(std::string_view start) const;
  std::span<const int32_t> order() const { return order_; }  // ids, sorted by text
  size_t longest() const { return longest_; }                // bytes of the longest text
  // All texts, one after the other; `ends` has the end of each.
  std::string_view all() const { return bytes_; }
  std::span<const uint32_t> ends() const { return ends_; }

 private:
  TokenTexts() = default;
  void FindLongest();

  std::string bytes_;
  std::vector<uint32_t> ends_;
  std::vector<uint8_t> special_;
  std::vector<int32_t> order_;
  size_t longest_ = 0;
};

// The strings of one request on one model. Immutable.
class BadText {
 public:
  // skips_special: special tokens add nothing to the text. Throws InvalidRequest for an empty string.
  BadText(std::shared_ptr<const TokenTexts> texts, std::vector<std::string> words, bool skips_special);

  // Tokens that contain no string; bit i % 32 of word i / 32. Tokens beyond the texts are allowed.
  const std::vector<uint32_t>& allowed_mask() const { return allowed_mask_; }
  bool masks_any() const { return masks_any_; }
  // Bytes of text that matter, from its end.
  size_t num_tail_bytes() const { return num_tail_bytes_; }
  // What a token adds to the text; nothing for one beyond the texts.
  std::string_view TextOf(int32_t id) const;
  // Adds the tokens that may not follow a text with this end; some may come twice.
  void BannedAfter(std::string_view tail, std::vector<int32_t>* banned) const;
  // The same for a device (bad_text_tables.h), made at the first call. Any thread.
  const std::vector<uint32_t>& Tables() const;
  const std::shared_ptr<const TokenTexts>& texts() const { return texts_; }

 private:
  void MaskContaining();

  std::shared_ptr<const TokenTexts> texts_;
  std::vector<std::string> words_;  // sorted
  bool skips_special_;
  bool masks_any_ = false;
  bool begins_word_[256] = {};
  size_t num_tail_bytes_ = 0;
  std::vector<uint32_t> allowed_mask_;
  mutable std::once_flag tables_once_;
  mutable std::vector<uint32_t> tables_;
};

}  // namespace twinjet::sampler
