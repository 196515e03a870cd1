// Banned strings against a search of every text that a token would make.
#include <algorithm>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "sampler/bad_text.h"
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
