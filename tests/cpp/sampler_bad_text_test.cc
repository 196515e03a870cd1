// Banned strings against a search of every text that a token would make.
#include <algorithm>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "sampler/bad_text.h"
#include "sampler/bad_text_tables.h"
#include "sampler/request.h"

using namespace twinjet::sampler;

namespace {

size_t Below(std::mt19937_64* random, size_t bound) { return (*random)() % bound; }

std::string RandomText(std::mt19937_64* random, size_t most) {
  std::string text;
  for (size_t i = Below(random, most + 1); i > 0; --i) text += "ab\xc3\xa9"[Below(random, 4)];
  return text;
}

// Whether an occurrence of a word ends within the last num_new bytes.
bool Completes(const std::vector<std::string>& words, const std::string& text, size_t num_new) {
  for (const std::string& word : words) {
    for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) {
      if (at + word.size() + num_new > text.size()) return true;
    }
  }
  return false;
}

}  // namespace

TEST(bans_what_completes_a_word_and_nothing_else) {
  std::mt19937_64 random = test::Random();
  for (int round = 0; round < 300; ++round) {
    const size_t vocab_size = 1 + Below(&random, 70);
    std::vector<std::string> texts;
    std::vector<uint8_t> special;
    for (size_t i = 0; i < vocab_size; ++i) {
      texts.push_back(RandomText(&random, 5));
      special.push_back(Below(&random, 8) == 0);
    }
    std::vector<std::string> words;
    for (size_t i = 1 + Below(&random, 5); i > 0; --i)
      words.push_back(std::string("a").append(RandomText(&random, 6)));
    const bool skips = Below(&random, 2) == 0;
    const std::vector<std::string_view> views(texts.begin(), texts.end());
    const TokenTexts made(views, special);
    RequestOptions options;
    options.bad_text =
        std::make_shared<BadText>(std::make_shared<TokenTexts>(TokenTexts::Load(made.Save())), words, skips);
    Request request(static_cast<int32_t>(vocab_size), options);
    std::string text;
    for (int step = 0; step < 20; ++step) {
      const RowEdits edits = request.Edits();
      const std::set<int32_t> banned(edits.banned.begin(), edits.banned.end());
      for (size_t id = 0; id < vocab_size; ++id) {
        const std::string added = skips && special[id] != 0 ? "" : texts[id];
        const bool is_masked =
            edits.allowed_mask != nullptr && (edits.allowed_mask[id / 32] >> (id % 32) & 1) == 0;
        CHECK_EQ(is_masked || banned.count(static_cast<int32_t>(id)) != 0,
                 Completes(words, text + added, added.size()));
      }
      const size_t id = Below(&random, vocab_size);
      if (!(skips && special[id] != 0)) text += texts[id];
      request.Append(static_cast<int32_t>(id));
    }
    request.Truncate(0);
    CHECK(request.Edits().banned.size == 0);
  }
}

// What the tables ban in a state.
std::set<int32_t> BannedIn(const TextTables& text, const TokenTables& tokens, int32_t state) {
  std::set<int32_t> banned;
  do {
    for (int32_t r = text.states[state].first_range; r < text.states[state + 1].first_range; ++r) {
      for (int32_t i = text.ranges[r].first; i < text.ranges[r].last; ++i) {
        if (text.skips_special && (tokens.order[i] & kSpecialToken) != 0) continue;
        banned.insert(static_cast<int32_t>(tokens.order[i] & ~kSpecialToken));
      }
    }
    state = text.states[state].next;
  } while (state != 0);
  return banned;
}

TEST(tables_ban_what_the_text_does) {
  std::mt19937_64 random = test::Random();
  for (int round = 0; round < 400; ++round) {
    const size_t num_letters = 1 + Below(&random, 4);
    const auto any_text = [&](size_t least, size_t most) {
      std::string text;
      for (size_t i = least + Below(&random, most - least + 1); i > 0; --i)
        text += "ab\xc3\xa9"[Below(&random, num_letters)];
      return text;
    };
    std::vector<std::string> all(30);
    std::vector<uint8_t> special;
    for (std::string& text : all) {
      text = any_text(0, 6);
      special.push_back(Below(&random, 8) == 0);
    }
    const auto texts =
        std::make_shared<const TokenTexts>(std::vector<std::string_view>(all.begin(), all.end()), special);
    std::vector<std::string> words(1 + Below(&random, 12));
    for (std::string& word : words) word = any_text(1, Below(&random, 5) == 0 ? 40 : 7);
    const BadText bad(texts, words, Below(&random, 2) == 0);
    const std::vector<uint32_t> token_words = MakeTokenTables(*texts);
    const TextTables text = ReadTextTables(bad.Tables().data());
    const TokenTables tokens = ReadTokenTables(token_words.data());
    std::string tail;
    int32_t state = 0;
    for (int step = 0; step < 30; ++step) {
      // Often along a word, so that states are deep.
      const std::string& word = words[Below(&random, words.size())];
      auto id = static_cast<int32_t>(Below(&random, all.size() + 1)) - 1;
      for (int32_t other = 0; other < 30 && Below(&random, 4) != 0; ++other) {
        if (!all[static_cast<size_t>(other)].empty() &&
            (tail + all[static_cast<size_t>(other)])
                .ends_with(word.substr(0, 1 + Below(&random, word.size()))))
          id = other;
      }
      tail += bad.TextOf(id);
      if (tail.size() > bad.num_tail_bytes()) tail.erase(0, tail.size() - bad.num_tail_bytes());
      state = StateAfterToken(text, tokens, state, id);
      std::vector<int32_t> expected;
      bad.BannedAfter(tail, &expected);
      const std::set<int32_t> banned = BannedIn(text, tokens, state);
      CHECK(banned == std::set<int32_t>(expected.begin(), expected.end()));
      CHECK(HasRanges(text, state) || banned.empty());
    }
  }
}

TEST(tables_of_hostile_strings_are_small_and_lead_far_in_few_steps) {
  // Strings of up to 1,024 letters, where each beginning of one ends with beginnings of many others.
  std::vector<std::string> words;
  for (size_t i = 0; i < 256; ++i) {
    words.push_back(std::string(1023 - i, 'a') + static_cast<char>('b' + i % 20));
    words.push_back(std::string(1 + i, 'a') + "bc");
  }
  std::vector<std::string> all(64);
  for (size_t i = 0; i < all.size(); ++i) all[i] = std::string(i, 'a') + (i % 2 != 0 ? "b" : "c");
  const auto texts = std::make_shared<const TokenTexts>(std::vector<std::string_view>(all.begin(), all.end()),
                                                        std::vector<uint8_t>(all.size()));
  const BadText bad(texts, words, false);
  size_t num_bytes = 0;
  for (const std::string& word : words) num_bytes += word.size();
  CHECK(bad.Tables().size() * sizeof(uint32_t) <= 17 * num_bytes + 2048 + 8 * 64 * words.size());
  const TextTables text = ReadTextTables(bad.Tables().data());
  int32_t state = 0;
  for (int i = 0; i < 1000; ++i) state = StateAfterByte(text, state, 'a');
  const BadText alike(texts, {std::string(1024, 'a')}, false);
  CHECK_EQ(ReadTextTables(alike.Tables().data()).states[1000].on_mismatch, 0);
  int32_t num_ends = 0;
  for (int32_t at = state; at != 0; at = text.states[at].next) ++num_ends;
  CHECK(num_ends < 300);
}

TEST(refuses_what_is_no_table) {
  const std::vector<std::string_view> views = {"a", "b"};
  const std::vector<uint8_t> special = {0, 0};
  const std::string saved = TokenTexts(views, special).Save();
  for (size_t size = 0; size < saved.size(); ++size) {
    bool is_refused = false;
    try {
      TokenTexts::Load(std::string_view(saved).substr(0, size));
    } catch (const InvalidRequest&) {
      is_refused = true;
    }
    CHECK(is_refused);
  }
}
