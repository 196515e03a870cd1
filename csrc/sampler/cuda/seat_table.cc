#include "sampler/cuda/seat_table.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "sampler/cuda/edits.h"

namespace twinjet::sampler::cuda {
namespace {

constexpr int32_t kLeastUnits = 16;

int32_t UnitsOf(size_t bytes) { return static_cast<int32_t>((bytes + sizeof(Unit) - 1) / sizeof(Unit)); }

// The bad words that need the output's last tokens to be looked at: not those that one token makes, which are
// masked for good.
struct DynamicWords {
  std::vector<int32_t> ends, places, tokens;
  int32_t longest_prefix = 0;
};

DynamicWords FindDynamicWords(const std::vector<std::vector<int32_t>>& words, std::vector<Edit>* edits) {
  DynamicWords found;
  for (const std::vector<int32_t>& word : words) {
    if (word.size() < 2) continue;
    auto edit =
        std::find_if(edits->begin(), edits->end(), [&](const Edit& e) { return e.token_id == word.back(); });
    if (edit == edits->end()) {
      edits->push_back({word.back(), 0, 0, 0.0f});
      edit = edits->end() - 1;
    }
    if ((edit->flags & kEditMasked) != 0) continue;
    found.places.push_back(static_cast<int32_t>(edit - edits->begin()));
    found.tokens.insert(found.tokens.end(), word.begin(), word.end() - 1);
    found.ends.push_back(static_cast<int32_t>(found.tokens.size()));
    found.longest_prefix = std::max(found.longest_prefix, static_cast<int32_t>(word.size()) - 1);
  }
  return found;
}

}  // namespace

int32_t UnitArena::SizeOf(int32_t units) {
  return static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(std::max(units, kLeastUnits))));
}

int32_t UnitArena::Take(int32_t units) {
  const int32_t size = SizeOf(units);
  std::vector<int32_t>& free = free_[static_cast<size_t>(std::countr_zero(static_cast<uint32_t>(size)))];
  if (!free.empty()) {
    const int32_t begin = free.back();
    free.pop_back();
    return begin;
  }
  if (size > INT32_MAX - end_) throw std::length_error("the sampler's device memory has no room");
  end_ += size;
  return end_ - size;
}

void UnitArena::Free(int32_t begin, int32_t units) {
  free_[static_cast<size_t>(std::countr_zero(static_cast<uint32_t>(SizeOf(units))))].push_back(begin);
}

bool SeatTable::Has(int64_t seat) const {
  return seat >= 0 && seat < num_seats() && entries_[static_cast<size_t>(seat)] != nullptr;
}

void SeatTable::Put(int32_t seat, Request& request) {
  if (seat < 0) throw std::out_of_range("a seat is at least 0");
  if (request.vocab_size() != vocab_size_) {
    throw InvalidRequest("a request has vocab_size " + std::to_string(request.vocab_size()) + ": must be " +
                         std::to_string(vocab_size_));
  }
  const std::vector<int32_t>& output = request.output_token_ids();
  auto entry = std::make_unique<Entry>();
  entry->first_position = request.position() - output.size();
  entry->num_outputs = static_cast<int32_t>(output.size());
  entry->counts_output = request.counts_output();

  RowEdits lists = request.Edits();
  // Masked for good are the words of one token; the others' turn comes with their prefixes.
  std::vector<int32_t> banned;
  for (const std::vector<int32_t>& word : request.bad_words()) {
    if (word.size() == 1) banned.push_back(word.front());
  }
  lists.banned = {banned.data(), banned.size()};
  const std::vector<int32_t>& stops = request.stop_token_ids();
  lists.early_stops = {};
  if (output.size() < request.min_tokens() && !stops.empty()) {
    lists.early_stops = {stops.data(), stops.size()};
    entry->min_tokens = static_cast<int32_t>(std::min<size_t>(request.min_tokens(), INT32_MAX));
  }
  std::vector<Edit> edits;
  AppendEdits(lists, &edits);
  const DynamicWords words = FindDynamicWords(request.bad_words(), &edits);

  if (request.has_bad_text()) UseText(request.bad_text());
  if (Has(seat)) Remove(seat);

  Seat state = {};
  state.constants = request.Constants();
  entry->traits = {FamilyOf(state.constants), entry->counts_output || !edits.empty()};
  state.num_words = static_cast<int32_t>(words.places.size());
  state.ring_size = words.longest_prefix;
  state.counts_output = entry->counts_output ? 1 : 0;
  state.num_edits = static_cast<int32_t>(edits.size());
  state.ring_at = UnitsOf((words.ends.size() + words.places.size() + words.tokens.size()) * sizeof(int32_t));
  state.allowed_at = state.ring_at + UnitsOf(static_cast<size_t>(state.ring_size) * sizeof(int32_t));
  state.edits_at = state.allowed_at;
  const size_t mask_bytes = (static_cast<size_t>(vocab_size_) + 31) / 32 * sizeof(uint32_t);
  if (lists.allowed_mask != nullptr) {
    state.has_allowed = 1;
    state.edits_at += UnitsOf(mask_bytes);
  }
  const int32_t contents = state.edits_at + state.num_edits;

  entry->begin = -1;
  entry->edits_at = state.edits_at;
  entry->max_edits = state.num_edits;
  if (contents > 0 || entry->counts_output) {
    entry->begin = arena_.Take(contents + (entry->counts_output ? kLeastUnits : 0));
    entry->capacity = UnitArena::SizeOf(contents + (entry->counts_output ? kLeastUnits : 0));
  }
  state.begin = std::max(entry->begin, 0);
  state.text_at = -1;
  if (request.has_bad_text()) {
    entry->text = request.bad_text();
    entry->text_mask_at = arena_.Take(text_mask_units());
    state.text_at = texts_.at(entry->text.get()).begin;
    state.tokens_at = TokensAt(entry->text->texts());
    state.text_mask_at = entry->text_mask_at;
    const TextTables text = ReadTextTables(entry->text->Tables().data());
    for (const char byte : request.tail()) {
      state.text_state = StateAfterByte(text, state.text_state, static_cast<uint8_t>(byte));
    }
  }

  entry->fresh.assign(static_cast<size_t>(kSeatUnits + contents), Unit{});
  std::memcpy(entry->fresh.data(), &state, sizeof(state));
  Unit* region = entry->fresh.data() + kSeatUnits;
  auto* ints = reinterpret_cast<int32_t*>(region);
  for (const std::vector<int32_t>* part : {&words.ends, &words.places, &words.tokens}) {
    ints = std::copy(part->begin(), part->end(), ints);
  }
  auto* ring = reinterpret_cast<int32_t*>(region + state.ring_at);
  const size_t ring_size = static_cast<size_t>(state.ring_size);
  for (size_t i = output.size() - std::min(output.size(), ring_size); i < output.size(); ++i) {
    ring[i % ring_size] = output[i];
  }
  if (lists.allowed_mask != nullptr) std::memcpy(region + state.allowed_at, lists.allowed_mask, mask_bytes);
  if (!edits.empty()) std::memcpy(region + state.edits_at, edits.data(), edits.size() * sizeof(Edit));

  if (seat >= num_seats()) entries_.resize(static_cast<size_t>(seat) + 1);
  entries_[static_cast<size_t>(seat)] = std::move(entry);
}

void SeatTable::Remove(int32_t seat) {
  if (!Has(seat)) return;
  std::unique_ptr<Entry>& entry = entries_[static_cast<size_t>(seat)];
  if (entry->begin >= 0) arena_.Free(entry->begin, entry->capacity);
  if (entry->text != nullptr) {
    arena_.Free(entry->text_mask_at, text_mask_units());
    LeaveText(entry->text.get());
  }
  entry = nullptr;
}

SeatTable::Shared SeatTable::Share(std::shared_ptr<const void> owner, const std::vector<uint32_t>& words) {
  Shared shared;
  shared.owner = std::move(owner);
  shared.units = UnitsOf(words.size() * sizeof(uint32_t));
  shared.begin = arena_.Take(shared.units);
  Pending pending;
  pending.begin = shared.begin;
  pending.contents.resize(static_cast<size_t>(shared.units));
  std::memcpy(pending.contents.data(), words.data(), words.size() * sizeof(uint32_t));
  pending_.push_back(std::move(pending));
  return shared;
}

void SeatTable::UseText(const std::shared_ptr<const BadText>& text) {
  auto place = texts_.find(text.get());
  if (place == texts_.end()) {
    const std::vector<uint32_t>& words = text->Tables();
    const int32_t units = UnitArena::SizeOf(UnitsOf(words.size() * sizeof(uint32_t)));
    if (units > max_text_units_ - text_units_) {
      throw InvalidRequest("the device has no room for this many different bad words at once");
    }
    text_units_ += units;
    place = texts_.emplace(text.get(), Share(text, words)).first;
  }
  ++place->second.num_users;
}

void SeatTable::LeaveText(const BadText* text) {
  const auto place = texts_.find(text);
  const Shared& shared = place->second;
  if (--place->second.num_users > 0) return;
  std::erase_if(pending_, [&](const Pending& pending) { return pending.begin == shared.begin; });
  arena_.Free(shared.begin, shared.units);
  text_units_ -= UnitArena::SizeOf(shared.units);
  texts_.erase(place);
}

int32_t SeatTable::TokensAt(const std::shared_ptr<const TokenTexts>& texts) {
  auto place = tokens_.find(texts.get());
  if (place == tokens_.end()) {
    place = tokens_.emplace(texts.get(), Share(texts, MakeTokenTables(*texts))).first;
  }
  return place->second.begin;
}

std::span<const Unit> SeatTable::BuildPieces(int32_t max_units) {
  std::vector<Piece> pieces;
  int32_t room = max_units - 1;
  size_t num_done = 0;
  for (Pending& pending : pending_) {
    if (room < 2) break;
    const int32_t left = static_cast<int32_t>(pending.contents.size()) - pending.units_sent;
    pieces.push_back({pending.units_sent, pending.begin + pending.units_sent, std::min(left, room - 1), 0});
    room -= 1 + pieces.back().units;
    pending.units_sent += pieces.back().units;
    if (pieces.back().units == left) ++num_done;
  }
  pieces_.assign(pieces.empty() ? 0 : 1 + pieces.size(), Unit{});
  for (size_t i = 0; i < pieces.size(); ++i) {
    const auto first = pending_[i].contents.begin() + pieces[i].from;
    pieces[i].from = static_cast<int32_t>(pieces_.size());
    pieces_.insert(pieces_.end(), first, first + pieces[i].units);
    std::memcpy(&pieces_[1 + i], &pieces[i], sizeof(Piece));
  }
  if (!pieces.empty()) pieces_[0].words[0] = static_cast<uint32_t>(pieces.size());
  pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(num_done));
  return pieces_;
}

std::span<const Unit> SeatTable::Build(std::span<const int64_t> seats, std::span<const uint8_t> advances,
                                       std::span<const int32_t> mask_rows) {
  const size_t row_units = sizeof(StepRow) / sizeof(Unit);
  message_.assign(seats.size() * row_units, Unit{});
  traits_ = {Family::kGreedy, false};
  // What is moved from is read by this step: nobody may get it before the next.
  std::vector<std::pair<int32_t, int32_t>> left;
  for (size_t i = 0; i < seats.size(); ++i) {
    StepRow row = {};
    row.seat = -1;
    row.fresh_at = -1;
    row.move_to = -1;
    if (seats[i] != kSkip) {
      if (!Has(seats[i])) throw std::out_of_range("seat " + std::to_string(seats[i]) + " is empty");
      Entry& entry = *entries_[static_cast<size_t>(seats[i])];
      const bool is_advance = advances[i] != 0;
      traits_.family = std::max(traits_.family, entry.traits.family);
      traits_.has_edits |= entry.traits.has_edits;
      row.seat = static_cast<int32_t>(seats[i]);
      row.num_outputs = entry.num_outputs;
      row.position = entry.first_position + static_cast<uint64_t>(entry.num_outputs);
      if (is_advance) row.flags |= kStepAdvances;
      if (entry.num_outputs < entry.min_tokens) row.flags |= kStepEarlyStops;
      if (!mask_rows.empty() && mask_rows[i] >= 0) {
        row.flags |= (static_cast<uint32_t>(mask_rows[i]) + 1) << kStepMaskShift;
      }
      if (!entry.fresh.empty()) {
        row.fresh_at = static_cast<int32_t>(message_.size());
        row.fresh_units = static_cast<int32_t>(entry.fresh.size()) - kSeatUnits;
        message_.insert(message_.end(), entry.fresh.begin(), entry.fresh.end());
        entry.fresh = {};
      }
      if (is_advance && entry.counts_output && entry.max_edits < vocab_size_) {
        if (entry.edits_at + entry.max_edits + 1 > entry.capacity) {
          left.emplace_back(entry.begin, entry.capacity);
          entry.begin = arena_.Take(2 * entry.capacity);
          entry.capacity = UnitArena::SizeOf(2 * entry.capacity);
          row.move_to = entry.begin;
        }
        ++entry.max_edits;
      }
      if (is_advance) ++entry.num_outputs;
    }
    std::memcpy(message_.data() + i * row_units, &row, sizeof(row));
  }
  for (const auto& [begin, units] : left) arena_.Free(begin, units);
  return message_;
}

}  // namespace twinjet::sampler::cuda
