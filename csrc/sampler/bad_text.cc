#include "sampler/bad_text.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "sampler/bad_text_tables.h"
#include "sampler/request.h"

namespace twinjet::sampler {
namespace {

constexpr std::string_view kMagic = "twinjet token texts 1\n";

template <typename T>
void Put(std::string* out, const std::vector<T>& values) {
  out->append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// Takes values from the front of `in`.
template <typename T>
void Take(std::string_view* in, size_t count, std::vector<T>* values) {
  if (in->size() / sizeof(T) < count) throw InvalidRequest("token texts are cut short");
  values->resize(count);
  if (count != 0) std::memcpy(values->data(), in->data(), count * sizeof(T));
  in->remove_prefix(count * sizeof(T));
}

// The words that begin with `start`, in a sorted list.
std::span<const std::string> WordsStartingWith(std::span<const std::string> words, std::string_view start) {
  const auto before = [](const std::string& word, std::string_view s) {
    return std::string_view(word).substr(0, s.size()) < s;
  };
  const auto after = [](std::string_view s, const std::string& word) {
    return s < std::string_view(word).substr(0, s.size());
  };
  const auto first = std::lower_bound(words.begin(), words.end(), start, before);
  const auto last = std::upper_bound(first, words.end(), start, after);
  return {first, last};
}

}  // namespace

TokenTexts::TokenTexts(std::span<const std::string_view> texts, std::span<const uint8_t> is_special)
    : special_(is_special.begin(), is_special.end()) {
  if (texts.size() != is_special.size())
    throw InvalidRequest("token texts and special flags differ in number");
  size_t total = 0;
  for (std::string_view text : texts) total += text.size();
  if (total > UINT32_MAX) throw InvalidRequest("token texts are longer than 4 GiB");
  bytes_.reserve(total);
  ends_.reserve(texts.size());
  for (std::string_view text : texts) {
    bytes_.append(text);
    ends_.push_back(static_cast<uint32_t>(bytes_.size()));
  }
  order_.resize(texts.size());
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(), [this](int32_t a, int32_t b) { return text(a) < text(b); });
  FindLongest();
}

void TokenTexts::FindLongest() {
  for (int32_t id = 0; id < size(); ++id) longest_ = std::max(longest_, text(id).size());
}

std::string TokenTexts::Save() const {
  std::string out(kMagic);
  const std::vector<uint64_t> sizes = {special_.size(), bytes_.size()};
  Put(&out, sizes);
  Put(&out, ends_);
  Put(&out, order_);
  Put(&out, special_);
  out += bytes_;
  return out;
}

TokenTexts TokenTexts::Load(std::string_view saved) {
  if (!saved.starts_with(kMagic)) throw InvalidRequest("these are no token texts");
  saved.remove_prefix(kMagic.size());
  TokenTexts made;
  std::vector<uint64_t> sizes;
  Take(&saved, 2, &sizes);
  Take(&saved, sizes[0], &made.ends_);
  Take(&saved, sizes[0], &made.order_);
  Take(&saved, sizes[0], &made.special_);
  if (saved.size() != sizes[1]) throw InvalidRequest("token texts are cut short");
  made.bytes_ = saved;
  uint32_t before = 0;
  for (uint32_t end : made.ends_) {
    if (end < before || end > made.bytes_.size()) throw InvalidRequest("token texts overlap");
    before = end;
  }
  for (int32_t id : made.order_) {
    if (id < 0 || id >= made.size()) throw InvalidRequest("token texts are out of order");
  }
  made.FindLongest();
  return made;
}

std::string_view TokenTexts::text(int32_t id) const {
  const size_t i = static_cast<size_t>(id);
  const uint32_t start = i == 0 ? 0 : ends_[i - 1];
  return std::string_view(bytes_).substr(start, ends_[i] - start);
}

std::span<const int32_t> TokenTexts::StartingWith(std::string_view start) const {
  const auto [first, last] = PlacesStartingWith(start);
  return std::span(order_).subspan(static_cast<size_t>(first), static_cast<size_t>(last - first));
}

std::pair<int32_t, int32_t> TokenTexts::PlacesStartingWith(std::string_view start) const {
  const auto before = [this](int32_t id, std::string_view s) { return text(id).substr(0, s.size()) < s; };
  const auto after = [this](std::string_view s, int32_t id) { return s < text(id).substr(0, s.size()); };
  const auto first = std::lower_bound(order_.begin(), order_.end(), start, before);
  const auto last = std::upper_bound(first, order_.end(), start, after);
  return {static_cast<int32_t>(first - order_.begin()), static_cast<int32_t>(last - order_.begin())};
}

BadText::BadText(std::shared_ptr<const TokenTexts> texts, std::vector<std::string> words, bool skips_special)
    : texts_(std::move(texts)), words_(std::move(words)), skips_special_(skips_special) {
  std::sort(words_.begin(), words_.end());
  words_.erase(std::unique(words_.begin(), words_.end()), words_.end());
  if (words_.size() > UINT16_MAX) throw InvalidRequest("more than 65,535 bad words");
  for (const std::string& word : words_) {
    if (word.empty()) throw InvalidRequest("a bad word is empty: must have at least one character");
    begins_word_[static_cast<uint8_t>(word[0])] = true;
    num_tail_bytes_ = std::max(num_tail_bytes_, word.size() - 1);
  }
  allowed_mask_.assign((static_cast<size_t>(texts_->size()) + 31) / 32, ~0u);
  MaskContaining();
}

void BadText::MaskContaining() {
  // By a word's first two bytes: where in the sorted list the words stand that begin with them.
  std::vector<std::pair<uint16_t, uint16_t>> places(65536);
  bool is_alone[256] = {};
  for (size_t i = 0; i < words_.size(); ++i) {
    const uint8_t first = static_cast<uint8_t>(words_[i][0]);
    if (words_[i].size() == 1) {
      is_alone[first] = true;
      continue;
    }
    auto& place = places[static_cast<size_t>(first) << 8 | static_cast<uint8_t>(words_[i][1])];
    if (place.second == 0) place.first = static_cast<uint16_t>(i);
    place.second = static_cast<uint16_t>(i + 1);
  }
  const auto contains = [&](std::string_view text) {
    for (size_t at = 0; at < text.size(); ++at) {
      const uint8_t first = static_cast<uint8_t>(text[at]);
      if (!begins_word_[first]) continue;
      if (is_alone[first]) return true;
      if (at + 1 == text.size()) continue;
      const auto place = places[static_cast<size_t>(first) << 8 | static_cast<uint8_t>(text[at + 1])];
      for (size_t i = place.first; i < place.second; ++i) {
        if (text.substr(at).starts_with(words_[i])) return true;
      }
    }
    return false;
  };
  for (int32_t id = 0; id < texts_->size(); ++id) {
    if (!contains(TextOf(id))) continue;
    allowed_mask_[static_cast<size_t>(id / 32)] &= ~(1u << (id % 32));
    masks_any_ = true;
  }
}

std::string_view BadText::TextOf(int32_t id) const {
  if (id < 0 || id >= texts_->size() || (skips_special_ && texts_->is_special(id))) return {};
  return texts_->text(id);
}

void BadText::BannedAfter(std::string_view tail, std::vector<int32_t>* banned) const {
  const size_t longest = std::min(tail.size(), num_tail_bytes_);
  for (size_t length = 1; length <= longest; ++length) {
    const std::string_view start = tail.substr(tail.size() - length);
    if (!begins_word_[static_cast<uint8_t>(start[0])]) continue;
    for (const std::string& word : WordsStartingWith(words_, start)) {
      if (word.size() == length) continue;
      for (int32_t id : texts_->StartingWith(std::string_view(word).substr(length))) {
        if (!skips_special_ || !texts_->is_special(id)) banned->push_back(id);
      }
    }
  }
}

const std::vector<uint32_t>& BadText::Tables() const {
  std::call_once(tables_once_, [this] { tables_ = MakeTextTables(*texts_, words_, skips_special_); });
  return tables_;
}

}  // namespace twinjet::sampler
