#include "sampler/bad_text_tables.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "sampler/bad_text.h"

namespace twinjet::sampler {
namespace {

// The strings' trie. A node's number is its state: by depth, then by text, so that children are neighbours.
struct Trie {
  std::vector<int32_t> parent, depth, first_child;  // first_child has one more
  std::vector<uint8_t> label;
  std::vector<bool> ends_word;
  std::vector<std::vector<int32_t>> paths;  // by word: the nodes of its beginnings, [0] is the root

  int32_t size() const { return static_cast<int32_t>(parent.size()); }
};

size_t CommonLength(std::string_view a, std::string_view b) {
  const size_t most = std::min(a.size(), b.size());
  return static_cast<size_t>(
      std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(most), b.begin()).first - a.begin());
}

Trie MakeTrie(const std::vector<std::string>& words) {
  // First in the order of the sorted words, in which nodes of one depth come by their texts.
  Trie made;
  made.parent = {0};
  made.depth = {0};
  made.label = {0};
  std::string_view before;
  for (const std::string& word : words) {
    std::vector<int32_t> path(word.size() + 1);
    const size_t common = CommonLength(before, word);
    if (common > 0) std::copy_n(made.paths.back().begin(), common + 1, path.begin());
    for (size_t i = common; i < word.size(); ++i) {
      path[i + 1] = made.size();
      made.parent.push_back(path[i]);
      made.depth.push_back(static_cast<int32_t>(i) + 1);
      made.label.push_back(static_cast<uint8_t>(word[i]));
    }
    made.paths.push_back(std::move(path));
    before = word;
  }
  const size_t num_nodes = made.parent.size();
  std::vector<int32_t> places;  // by depth: the number of its next node
  for (const int32_t depth : made.depth) {
    if (static_cast<size_t>(depth) + 1 >= places.size()) places.resize(static_cast<size_t>(depth) + 2);
    ++places[static_cast<size_t>(depth) + 1];
  }
  for (size_t i = 1; i < places.size(); ++i) places[i] += places[i - 1];
  std::vector<int32_t> numbers(num_nodes);
  for (size_t i = 0; i < num_nodes; ++i) numbers[i] = places[static_cast<size_t>(made.depth[i])]++;

  Trie trie;
  trie.parent.resize(num_nodes);
  trie.depth.resize(num_nodes);
  trie.label.resize(num_nodes);
  trie.ends_word.resize(num_nodes);
  trie.first_child.assign(num_nodes + 1, 0);
  trie.paths = std::move(made.paths);
  for (size_t i = 0; i < num_nodes; ++i) {
    const auto to = static_cast<size_t>(numbers[i]);
    trie.parent[to] = numbers[static_cast<size_t>(made.parent[i])];
    trie.depth[to] = made.depth[i];
    trie.label[to] = made.label[i];
  }
  for (std::vector<int32_t>& path : trie.paths) {
    for (int32_t& node : path) node = numbers[static_cast<size_t>(node)];
    trie.ends_word[static_cast<size_t>(path.back())] = true;
  }
  for (size_t i = 1; i < num_nodes; ++i) ++trie.first_child[static_cast<size_t>(trie.parent[i]) + 1];
  trie.first_child[0] = 1;
  for (size_t i = 1; i <= num_nodes; ++i) trie.first_child[i] += trie.first_child[i - 1];
  return trie;
}

// Whether each child's byte of `part` is also one of a child of `whole`.
bool HasAllLabels(const Trie& trie, int32_t whole, int32_t part) {
  int32_t i = trie.first_child[static_cast<size_t>(whole)];
  const int32_t end = trie.first_child[static_cast<size_t>(whole) + 1];
  for (int32_t j = trie.first_child[static_cast<size_t>(part)];
       j < trie.first_child[static_cast<size_t>(part) + 1]; ++j) {
    while (i < end && trie.label[static_cast<size_t>(i)] < trie.label[static_cast<size_t>(j)]) ++i;
    if (i == end || trie.label[static_cast<size_t>(i)] != trie.label[static_cast<size_t>(j)]) return false;
  }
  return true;
}

struct RangeOfState {
  int32_t state;
  BannedRange range;
};

// What the words' beginnings ban that no shorter end of the same text bans too. A word within a word bans all
// that the outer one does between its own first and last byte.
std::vector<RangeOfState> FindRanges(const TokenTexts& texts, const std::vector<std::string>& words,
                                     const Trie& trie, const std::vector<int32_t>& shorter) {
  // The longest word that ends a state's text, as a length.
  std::vector<int32_t> ended(static_cast<size_t>(trie.size()));
  for (size_t i = 1; i < ended.size(); ++i) {
    ended[i] = trie.ends_word[i] ? trie.depth[i] : ended[static_cast<size_t>(shorter[i])];
  }
  std::vector<RangeOfState> found;
  for (size_t w = 0; w < words.size(); ++w) {
    const std::string_view word = words[w];
    const std::vector<int32_t>& path = trie.paths[w];
    const auto size = static_cast<int32_t>(word.size());
    // The earliest beginning of a word within this one that ends behind the split.
    int32_t earliest = size - ended[static_cast<size_t>(shorter[static_cast<size_t>(path.back())])];
    for (int32_t split = size - 1; split > 0; --split) {
      const auto at = static_cast<size_t>(split);
      if (word.size() - at > texts.longest()) break;
      const auto state = static_cast<size_t>(path[at]);
      if (earliest >= split) {
        const auto [first, last] = texts.PlacesStartingWith(word.substr(at));
        if (first != last) found.push_back({static_cast<int32_t>(state), {first, last}});
      }
      if (ended[state] > 0) earliest = std::min(earliest, split - ended[state]);
    }
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const RangeOfState& a, const RangeOfState& b) { return a.state < b.state; });
  return found;
}

void PutBytes(std::vector<uint32_t>* words, const void* bytes, size_t size) {
  const size_t at = words->size();
  words->resize(at + (size + 3) / 4);
  if (size != 0) std::memcpy(words->data() + at, bytes, size);
}

}  // namespace

std::vector<uint32_t> MakeTokenTables(const TokenTexts& texts) {
  const auto size = static_cast<size_t>(texts.size());
  std::vector<uint32_t> words = {static_cast<uint32_t>(size), 0, 0, 0};
  words.insert(words.end(), texts.ends().begin(), texts.ends().end());
  std::vector<uint32_t> special((size + 31) / 32);
  for (const int32_t id : texts.order()) {
    const auto token = static_cast<uint32_t>(id);
    words.push_back(texts.is_special(id) ? token | kSpecialToken : token);
    if (texts.is_special(id)) special[token / 32] |= 1u << (token % 32);
  }
  words.insert(words.end(), special.begin(), special.end());
  PutBytes(&words, texts.all().data(), texts.all().size());
  return words;
}

std::vector<uint32_t> MakeTextTables(const TokenTexts& texts, const std::vector<std::string>& strings,
                                     bool skips_special) {
  const Trie trie = MakeTrie(strings);
  const auto num_states = static_cast<size_t>(trie.size());
  std::vector<TextState> states(num_states + 1);
  std::vector<int32_t> roots(256);
  for (int32_t i = trie.first_child[0]; i < trie.first_child[1]; ++i) {
    roots[trie.label[static_cast<size_t>(i)]] = i;
  }
  std::vector<uint8_t> labels = trie.label;
  TextTables view = {};
  view.num_states = trie.size();
  view.roots = roots.data();
  view.states = states.data();
  view.labels = labels.data();
  for (size_t i = 0; i <= num_states; ++i) states[i].first_child = trie.first_child[i];

  std::vector<int32_t> shorter(num_states);  // the longest shorter end that begins a word too
  for (size_t i = 1; i < num_states; ++i) {
    if (trie.depth[i] < 2) continue;
    const int32_t before = shorter[static_cast<size_t>(trie.parent[i])];
    shorter[i] = StateAfterByte(view, before, trie.label[i]);
    // By depth: `shorter` and the mismatches of all that is less deep are known.
    const int32_t next = shorter[i];
    states[i].on_mismatch = next != 0 && HasAllLabels(trie, static_cast<int32_t>(i), next)
                                ? states[static_cast<size_t>(next)].on_mismatch
                                : next;
  }
  const std::vector<RangeOfState> found = FindRanges(texts, strings, trie, shorter);
  std::vector<BannedRange> ranges;
  auto at = found.begin();
  for (size_t i = 0; i < num_states; ++i) {
    states[i].first_range = static_cast<int32_t>(ranges.size());
    for (; at != found.end() && at->state == static_cast<int32_t>(i); ++at) ranges.push_back(at->range);
  }
  states[num_states].first_range = static_cast<int32_t>(ranges.size());
  for (size_t i = 1; i < num_states; ++i) {
    const auto to = static_cast<size_t>(shorter[i]);
    const bool has_ranges = states[to].first_range != states[to + 1].first_range;
    states[i].next = has_ranges ? shorter[i] : states[to].next;
  }

  std::vector<uint32_t> words = {static_cast<uint32_t>(num_states), static_cast<uint32_t>(ranges.size()),
                                 skips_special ? 1u : 0u, 0};
  PutBytes(&words, roots.data(), roots.size() * sizeof(int32_t));
  PutBytes(&words, states.data(), states.size() * sizeof(TextState));
  PutBytes(&words, ranges.data(), ranges.size() * sizeof(BannedRange));
  PutBytes(&words, labels.data(), labels.size());
  return words;
}

}  // namespace twinjet::sampler
