// What the device keeps of a request in its seat against the request itself: the device's two steps are run
// here by one thread over memory of the host.
#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include "check.h"
#include "sampler/bad_text.h"
#include "sampler/cuda/edits.h"
#include "sampler/cuda/seat_table.h"

using namespace twinjet::sampler;
using namespace twinjet::sampler::cuda;

namespace {

constexpr int32_t kVocab = 70;  // no multiple of 32, and few enough that tokens repeat

struct OneThread {
  int32_t rank() const { return 0; }
  int32_t size() const { return 1; }
  void Sync() const {}
  bool Any(bool value) const { return value; }
  void Or(uint32_t* word, uint32_t bits) const { *word |= bits; }
  void And(uint32_t* word, uint32_t bits) const { *word &= bits; }
};

// The device: memory that is poisoned where nobody has written.
struct Device {
  std::vector<Seat> seats;
  std::vector<Unit> arena;
  std::vector<Unit> message;
  std::vector<DeviceRow> rows;

  SeatMemory Receive(SeatTable& table, std::span<const int64_t> in, std::span<const uint8_t> advances,
                     std::span<const int32_t> mask_rows = {}) {
    const Unit poison = {{0xa5a5a5a5u, 0xa5a5a5a5u, 0xa5a5a5a5u, 0xa5a5a5a5u}};
    arena.resize(static_cast<size_t>(table.arena_units()), poison);
    for (;;) {
      const std::span<const Unit> pieces = table.BuildPieces(40);
      if (pieces.empty()) break;
      CHECK(pieces.size() <= 40);
      for (uint32_t i = 0; i < pieces[0].words[0]; ++i) {
        CopyPiece(OneThread(), {seats.data(), arena.data(), pieces.data()}, static_cast<int32_t>(i));
      }
    }
    const std::span<const Unit> sent = table.Build(in, advances, mask_rows);
    const size_t num_rows = in.size();
    arena.resize(static_cast<size_t>(table.arena_units()), poison);
    seats.resize(static_cast<size_t>(table.num_seats()));
    message.assign(sent.begin(), sent.end());
    rows.assign(num_rows, DeviceRow{});
    return {seats.data(), arena.data(), message.data()};
  }
};

// A token's edit, less what has no effect.
struct Effect {
  bool masked = false;
  bool early_stop = false;
  std::optional<float> bias;
  bool seen = false;
  uint32_t count = 0;
  bool operator==(const Effect&) const = default;
};

std::map<int32_t, Effect> EffectsOf(const Edit* begin, const Edit* end, bool with_early_stops) {
  std::map<int32_t, Effect> effects;
  for (const Edit* edit = begin; edit != end; ++edit) {
    CHECK(!effects.contains(edit->token_id));
    Effect effect;
    effect.masked = (edit->flags & kEditMasked) != 0;
    effect.early_stop = with_early_stops && (edit->flags & kEditEarlyStop) != 0;
    if ((edit->flags & kEditBias) != 0) effect.bias = edit->bias;
    effect.seen = (edit->flags & kEditSeen) != 0;
    effect.count = edit->output_count;
    if (effect != Effect{}) effects[edit->token_id] = effect;
  }
  return effects;
}

// Banned texts are a mask on the device and edits in a request: their union is what counts.
std::set<int32_t> Masked(const std::map<int32_t, Effect>& effects, const uint32_t* mask) {
  std::set<int32_t> masked;
  for (const auto& [token, effect] : effects) {
    if (effect.masked) masked.insert(token);
  }
  for (int32_t token = 0; mask != nullptr && token < kVocab; ++token) {
    if ((mask[token / 32] >> (token % 32) & 1u) == 0) masked.insert(token);
  }
  return masked;
}

std::map<int32_t, Effect> WithoutMasks(const std::map<int32_t, Effect>& effects) {
  std::map<int32_t, Effect> made;
  for (auto [token, effect] : effects) {
    effect.masked = false;
    if (effect != Effect{}) made[token] = effect;
  }
  return made;
}

std::string RandomText(std::mt19937_64& random, size_t most) {
  std::string text;
  for (size_t i = random() % (most + 1); i > 0; --i) text += "aab\xc3\xa9"[random() % 5];
  return text;
}

std::shared_ptr<const TokenTexts> RandomTexts(std::mt19937_64& random) {
  std::vector<std::string> texts(kVocab - 5 + random() % 10);
  std::vector<uint8_t> special;
  for (std::string& text : texts) {
    text = RandomText(random, 5);
    special.push_back(random() % 8 == 0 ? 1 : 0);
  }
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  return std::make_shared<const TokenTexts>(views, special);
}

std::shared_ptr<const BadText> RandomBadText(std::mt19937_64& random,
                                             std::shared_ptr<const TokenTexts> texts) {
  std::vector<std::string> words;
  for (size_t i = 1 + random() % 6; i > 0; --i)
    words.push_back("ab"[random() % 2] + RandomText(random, random() % 20 == 0 ? 60 : 7));
  return std::make_shared<const BadText>(std::move(texts), std::move(words), random() % 2 != 0);
}

int32_t AnyToken(std::mt19937_64& random) { return static_cast<int32_t>(random() % kVocab); }

std::vector<int32_t> SomeTokens(std::mt19937_64& random, size_t most) {
  std::vector<int32_t> tokens(random() % (most + 1));
  for (int32_t& token : tokens) token = AnyToken(random);
  return tokens;
}

struct Options {
  RequestOptions options;
  std::vector<int32_t> prompt, output, allowed;
};

void FillOptions(std::mt19937_64& random, Options* made) {
  RequestOptions& options = made->options;
  if (random() % 2 != 0) options.params.repetition_penalty = 1.3f;
  if (random() % 2 != 0) options.params.frequency_penalty = 0.2f;
  if (random() % 4 == 0) options.params.presence_penalty = 0.1f;
  made->prompt = SomeTokens(random, 40);
  if (!made->prompt.empty() && random() % 3 == 0) made->prompt[0] = kVocab + 5;  // another modality's
  made->output = SomeTokens(random, random() % 2 != 0 ? 0 : 20);
  options.prompt_token_ids = made->prompt;
  options.output_token_ids = made->output;
  options.position_offset = static_cast<int64_t>(made->prompt.size());
  std::map<int32_t, float> biases;
  for (const int32_t token : SomeTokens(random, 5)) biases[token] = static_cast<float>(random() % 9) - 4.0f;
  for (const auto& [token, bias] : biases) options.biases.push_back({token, bias});
  if (random() % 3 == 0) {
    options.has_allowed = true;
    made->allowed = SomeTokens(random, 60);
    options.allowed_token_ids = made->allowed;
  }
  // Few different tokens, so that prefixes come true, and words that share their last token.
  for (uint64_t i = random() % 6; i-- > 0;) {
    std::vector<int32_t> word(1 + random() % 4);
    for (int32_t& token : word) token = static_cast<int32_t>(random() % 4);
    options.bad_words.push_back(word);
  }
  if (random() % 2 != 0) {
    options.min_tokens = static_cast<int64_t>(random() % 30);
    options.stop_token_ids = SomeTokens(random, 3);
  }
}

void CheckRow(const Device& device, const DeviceRow& row, Request& request) {
  const RowEdits expected = request.Edits();
  std::vector<Edit> edits;
  AppendEdits(expected, &edits);
  const auto* all = reinterpret_cast<const Edit*>(device.arena.data());
  const auto actual = EffectsOf(all + row.edit_begin, all + row.edit_end, row.has_early_stops != 0);
  const auto wanted = EffectsOf(edits.data(), edits.data() + edits.size(), true);
  CHECK(WithoutMasks(actual) == WithoutMasks(wanted));
  CHECK_EQ(row.constants.race.position, request.position());
  CHECK_EQ(row.constants.race.seed, request.params().seed);
  const auto* mask =
      row.allowed_at < 0 ? nullptr : reinterpret_cast<const uint32_t*>(device.arena.data() + row.allowed_at);
  CHECK(Masked(actual, mask) == Masked(wanted, expected.allowed_mask));
}

}  // namespace

TEST(seats_hold_what_their_requests_do) {
  std::mt19937_64 random = test::Random();
  for (int round = 0; round < 60; ++round) {
    SeatTable table(kVocab);
    Device device;
    std::map<int64_t, std::unique_ptr<Request>> requests;
    const std::shared_ptr<const TokenTexts> texts = RandomTexts(random);
    std::shared_ptr<const BadText> text;
    for (int step = 0; step < 120; ++step) {
      for (int64_t seat = 0; seat < 12; ++seat) {
        if (requests.contains(seat) ? random() % 40 != 0 : random() % 4 != 0) continue;
        if (requests.contains(seat) && random() % 2 != 0) {
          table.Remove(static_cast<int32_t>(seat));
          CHECK(!table.Has(seat));
          requests.erase(seat);
          continue;
        }
        Options made;
        FillOptions(random, &made);
        made.options.params.seed = random();
        if (text == nullptr || random() % 2 != 0) text = RandomBadText(random, texts);
        if (random() % 2 != 0) made.options.bad_text = text;
        requests[seat] = std::make_unique<Request>(kVocab, made.options);
        table.Put(static_cast<int32_t>(seat), *requests[seat]);
        CHECK_EQ(table.num_outputs(seat), static_cast<int32_t>(made.output.size()));
      }
      std::vector<int64_t> seats;
      std::vector<uint8_t> advances;
      for (const auto& [seat, request] : requests) {
        if (random() % 5 == 0) continue;
        seats.push_back(random() % 30 == 0 ? SeatTable::kSkip : seat);
        advances.push_back(random() % 6 != 0 ? 1 : 0);
      }
      std::vector<int32_t> mask_rows;
      if (random() % 4 == 0) {
        for (size_t i = 0; i < seats.size(); ++i) mask_rows.push_back(static_cast<int32_t>(random() % 9) - 1);
      }
      std::vector<size_t> order(seats.size());
      for (size_t i = 0; i < order.size(); ++i) order[i] = i;
      std::shuffle(order.begin(), order.end(), random);
      const SeatMemory memory = device.Receive(table, seats, advances, mask_rows);
      for (const size_t i : order)
        BeginRow(OneThread(), memory, static_cast<int32_t>(i), kVocab, device.rows.data());
      for (size_t i = 0; i < seats.size(); ++i) {
        if (seats[i] != SeatTable::kSkip) {
          CheckRow(device, device.rows[i], *requests[seats[i]]);
          CHECK_EQ(device.rows[i].bitmask_row, mask_rows.empty() ? -1 : mask_rows[i]);
        }
      }
      for (const size_t i : order) {
        const int32_t token = random() % 3 != 0 ? static_cast<int32_t>(random() % 4) : AnyToken(random);
        EndRow(OneThread(), memory, static_cast<int32_t>(i), token);
        if (seats[i] != SeatTable::kSkip && advances[i] != 0) requests[seats[i]]->Append(token);
      }
    }
  }
}

TEST(strings_without_room_are_refused_and_leave_the_seat_as_it_was) {
  std::mt19937_64 random = test::Random();
  const std::shared_ptr<const TokenTexts> texts = RandomTexts(random);
  RequestOptions options[3];
  for (int i = 0; i < 3; ++i) {
    options[i].bad_text = std::make_shared<const BadText>(
        texts, std::vector<std::string>{"ab" + std::string(10, static_cast<char>('a' + i))}, true);
  }
  const auto bytes = options[0].bad_text->Tables().size() * sizeof(uint32_t);
  SeatTable table(kVocab, 2 * UnitArena::SizeOf(static_cast<int32_t>(bytes / sizeof(Unit) + 1)));
  std::vector<std::unique_ptr<Request>> requests;
  for (const RequestOptions& one : options) requests.push_back(std::make_unique<Request>(kVocab, one));
  table.Put(0, *requests[0]);
  table.Put(1, *requests[1]);
  table.Put(2, *requests[0]);  // shares
  const auto is_refused = [&](int32_t seat) {
    try {
      table.Put(seat, *requests[2]);
    } catch (const InvalidRequest&) {
      return true;
    }
    return false;
  };
  CHECK(is_refused(1));
  CHECK(table.Has(1));
  table.Remove(0);
  CHECK(is_refused(3));
  const int32_t units = table.arena_units();
  table.Remove(2);
  CHECK(!is_refused(3));
  CHECK_EQ(table.arena_units(), units);
}

TEST(a_row_without_a_token_changes_no_history) {
  RequestOptions options;
  options.params.frequency_penalty = 1.0f;
  Request request(kVocab, options);
  SeatTable table(kVocab);
  table.Put(0, request);
  Device device;
  const std::vector<int64_t> seats = {0};
  const std::vector<uint8_t> advances = {1};
  for (int step = 0; step < 2; ++step) {
    const SeatMemory memory = device.Receive(table, seats, advances);
    BeginRow(OneThread(), memory, 0, kVocab, device.rows.data());
    CHECK_EQ(device.rows[0].edit_begin, device.rows[0].edit_end);
    EndRow(OneThread(), memory, 0, -1);
  }
}

TEST(plain_requests_send_32_bytes_a_step_and_take_no_room) {
  SeatTable table(kVocab);
  Request request(kVocab, RequestOptions());
  table.Put(3, request);
  const std::vector<int64_t> seats = {3};
  const std::vector<uint8_t> advances = {1};
  table.Build(seats, advances);
  CHECK_EQ(table.Build(seats, advances).size_bytes(), size_t{32});
  CHECK_EQ(table.arena_units(), 0);
}

// Kernels that do less draw batches whose rows need no more.
TEST(a_message_tells_the_traits_of_its_rows) {
  SeatTable table(kVocab);
  RequestOptions greedy, open, top_k, top_p, biased, penalised, stopped;
  greedy.params.temperature = 0.0f;
  greedy.params.top_p = 0.5f;
  open.params.min_p = 0.1f;
  top_k.params.top_k = 5;
  top_p.params.top_p = 0.9f;
  biased.biases.push_back({1, 2.0f});
  penalised.params.presence_penalty = 0.5f;
  const std::vector<int32_t> stops = {2};
  stopped.min_tokens = 5;
  stopped.stop_token_ids = stops;
  for (int32_t seat = 0;
       const RequestOptions* options : {&greedy, &open, &top_k, &top_p, &biased, &penalised, &stopped}) {
    Request request(kVocab, *options);
    table.Put(seat++, request);
  }
  const auto traits_of = [&](std::vector<int64_t> seats) {
    table.Build(seats, std::vector<uint8_t>(seats.size(), 1));
    return table.traits();
  };
  const auto family_of = [&](std::vector<int64_t> seats) { return traits_of(seats).family; };
  CHECK(family_of({0, 0}) == Family::kGreedy);
  CHECK(family_of({0, 1, SeatTable::kSkip}) == Family::kOpen);
  CHECK(family_of({2, 0}) == Family::kAny);
  CHECK(family_of({0, 3, 1}) == Family::kAny);
  CHECK(family_of({1}) == Family::kOpen);
  CHECK(!traits_of({0, 1, 2, 3}).has_edits);
  for (const int64_t seat : {4, 5, 6}) CHECK(traits_of({0, seat, 1}).has_edits);
}

TEST(regions_that_are_left_serve_again) {
  RequestOptions options;
  options.params.frequency_penalty = 1.0f;
  SeatTable table(kVocab);
  Device device;
  const std::vector<int64_t> seats = {0};
  const std::vector<uint8_t> advances = {1};
  int32_t units = 0;
  for (int round = 0; round < 50; ++round) {
    Request request(kVocab, options);
    table.Put(0, request);
    for (int32_t step = 0; step < kVocab + 10; ++step) {
      const SeatMemory memory = device.Receive(table, seats, advances);
      BeginRow(OneThread(), memory, 0, kVocab, device.rows.data());
      EndRow(OneThread(), memory, 0, step % kVocab);
    }
    if (round == 0) units = table.arena_units();
  }
  CHECK_EQ(table.arena_units(), units);
  CHECK(units <= 512);
}

TEST(requests_of_another_vocabulary_and_empty_seats_are_refused) {
  SeatTable table(kVocab);
  Request request(kVocab + 1, RequestOptions());
  bool refused = false;
  try {
    table.Put(0, request);
  } catch (const InvalidRequest&) {
    refused = true;
  }
  CHECK(refused);
  refused = false;
  try {
    table.Build(std::vector<int64_t>{0}, std::vector<uint8_t>{1});
  } catch (const std::out_of_range&) {
    refused = true;
  }
  CHECK(refused);
}
