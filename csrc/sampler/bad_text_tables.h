// Banned strings as tables that a device can follow token by token, without the text so far.
//
// What matters of a text is its longest end that begins some string: a state. The tables are the strings'
// trie with a link from each state to a shorter end of the same text (Aho and Corasick). Which tokens a state
// bans is a few ranges of the vocabulary sorted by text: those that begin with what a string still lacks. A
// range that lies within one of a shorter end is left out, as that one is looked at too. Tables take 17 bytes
// a byte of string and 2 KiB besides.
//
// Both tables are relocatable words of 32 bits, read in place. Equal in effect to BadText::BannedAfter.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sampler/hd.h"

namespace twinjet::sampler {

class TokenTexts;

// A model's token texts. Words: their number, 3 reserved, the ends of the texts [number], the ids sorted by
// text [number] with kSpecialToken set on special ones, a bit an id for special ones; then the texts.
struct TokenTables {
  int32_t num_tokens;
  const uint32_t* ends;
  const uint32_t* order;
  const uint32_t* special;
  const uint8_t* texts;
};
constexpr uint32_t kSpecialToken = 1u << 31;

TWINJET_HD TokenTables ReadTokenTables(const uint32_t* words) {
  TokenTables tables;
  tables.num_tokens = static_cast<int32_t>(words[0]);
  tables.ends = words + 4;
  tables.order = tables.ends + tables.num_tokens;
  tables.special = tables.order + tables.num_tokens;
  tables.texts = reinterpret_cast<const uint8_t*>(tables.special + (tables.num_tokens + 31) / 32);
  return tables;
}

// A state's children have the numbers from first_child to that of the next state, in the order of their
// bytes.
struct TextState {
  int32_t first_child;
  int32_t on_mismatch;  // where to look for a byte that no child has
  int32_t next;         // the longest shorter end with ranges, 0: none
  int32_t first_range;  // up to that of the next state
};

struct BannedRange {
  int32_t first;  // of TokenTables::order
  int32_t last;   // not in it
};

// One request's strings. Words: numbers of states and ranges, whether special tokens add nothing, 1 reserved;
// the state after each first byte [256]; TextState [states + 1]; BannedRange [ranges]; then each state's
// byte.
struct TextTables {
  int32_t num_states;
  bool skips_special;
  const int32_t* roots;
  const TextState* states;
  const BannedRange* ranges;
  const uint8_t* labels;
};

TWINJET_HD TextTables ReadTextTables(const uint32_t* words) {
  TextTables tables;
  tables.num_states = static_cast<int32_t>(words[0]);
  tables.skips_special = words[2] != 0;
  tables.roots = reinterpret_cast<const int32_t*>(words + 4);
  tables.states = reinterpret_cast<const TextState*>(words + 4 + 256);
  tables.ranges = reinterpret_cast<const BannedRange*>(tables.states + tables.num_states + 1);
  tables.labels = reinterpret_cast<const uint8_t*>(tables.ranges + words[1]);
  return tables;
}

// The state after one more byte. State 0 is that of a text without a beginning of a string.
TWINJET_HD int32_t StateAfterByte(const TextTables& text, int32_t state, uint8_t byte) {
  while (state != 0) {
    int32_t low = text.states[state].first_child;
    const int32_t end = text.states[state + 1].first_child;
    int32_t high = end;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (text.labels[middle] < byte) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (low < end && text.labels[low] == byte) return low;
    state = text.states[state].on_mismatch;
  }
  return text.roots[byte];
}

TWINJET_HD int32_t StateAfterToken(const TextTables& text, const TokenTables& tokens, int32_t state,
                                   int32_t token) {
  if (token < 0 || token >= tokens.num_tokens) return state;
  if (text.skips_special && (tokens.special[token / 32] >> (token % 32) & 1u) != 0) return state;
  const uint32_t end = tokens.ends[token];
  for (uint32_t i = token == 0 ? 0 : tokens.ends[token - 1]; i < end; ++i) {
    state = StateAfterByte(text, state, tokens.texts[i]);
  }
  return state;
}

// Whether anything is banned in this state beyond what always is.
TWINJET_HD bool HasRanges(const TextTables& text, int32_t state) {
  const TextState& at = text.states[state];
  return at.next != 0 || at.first_range != text.states[state + 1].first_range;
}

std::vector<uint32_t> MakeTokenTables(const TokenTexts& texts);

// words: sorted, none empty, none twice.
std::vector<uint32_t> MakeTextTables(const TokenTexts& texts, const std::vector<std::string>& words,
                                     bool skips_special);

}  // namespace twinjet::sampler
