// Seats: where the device keeps what a running request's next draw needs. Plain data and the two steps that
// the device takes around a draw, written for a team of threads so that a host of one thread runs the same.
//
// A request's region of the arena holds, in this order, the prefixes of its bad words, a ring of its last
// output tokens, its mask of allowed tokens, and its edits, which grow at the end as tokens are drawn.
#pragma once

#include "sampler/bad_text_tables.h"
#include "sampler/cuda/plan.h"

// Code of a team runs on the device where the device's compiler sees it, else on the host.
#if defined(__CUDACC__)
#define TWINJET_TEAM __device__ __forceinline__
#define TWINJET_TEAM_STEP static __device__ __forceinline__
#else
#define TWINJET_TEAM inline
#define TWINJET_TEAM_STEP static inline
#endif

namespace twinjet::sampler::cuda {

// What the arena and messages are counted in.
struct alignas(16) Unit {
  uint32_t words[4];
};
static_assert(sizeof(Edit) == sizeof(Unit));

struct Seat {
  RowConstants constants;  // race.position is ignored: each step names the position
  int32_t begin;           // the region's first unit
  int32_t ring_at;         // units from `begin` to the ring, the mask and the edits
  int32_t allowed_at;
  int32_t edits_at;
  int32_t num_edits;
  int32_t num_words;  // bad words of two tokens and more
  int32_t ring_size;  // output tokens remembered: as many as the longest prefix has
  uint32_t has_allowed;
  uint32_t counts_output;  // draws are entered into the edits
  // Banned strings, units of the arena: their tables (-1: none), the model's, and room for a mask of a step.
  int32_t text_at;
  int32_t tokens_at;
  int32_t text_mask_at;
  int32_t text_state;  // of the output so far
  uint32_t reserved;
};
static_assert(sizeof(Seat) % sizeof(Unit) == 0);
constexpr int32_t kSeatUnits = static_cast<int32_t>(sizeof(Seat) / sizeof(Unit));

// One row of a step, as the host sends it.
struct StepRow {
  uint64_t position;    // of the token to draw
  int32_t seat;         // -1: a row that is not ours
  int32_t num_outputs;  // before this draw
  int32_t fresh_at;     // unit of the message with a Seat and the contents of its region, -1: seated before
  int32_t fresh_units;  // of the contents
  int32_t move_to;      // unit of the arena to which the region moves, -1: it stays
  uint32_t flags;       // kStep*
};
static_assert(sizeof(StepRow) % sizeof(Unit) == 0);
constexpr uint32_t kStepAdvances = 1;    // the drawn token becomes an output token
constexpr uint32_t kStepEarlyStops = 2;  // min_tokens is not reached
constexpr uint32_t kStepMaskShift = 8;   // from this bit on: 1 + the row's grammar mask, 0: none

// What comes into the arena before a step and belongs to no seat, as the host sends it: a Unit with the
// number of pieces in its first word, the pieces, their contents.
struct Piece {
  int32_t from;  // units of the message, of the arena
  int32_t to;
  int32_t units;
  int32_t reserved;
};
static_assert(sizeof(Piece) == sizeof(Unit));

struct SeatMemory {
  Seat* seats;
  Unit* arena;
  const Unit* message;  // StepRow [num_rows], then what is fresh
};

TWINJET_HD const StepRow* RowsOf(const SeatMemory& memory) {
  return reinterpret_cast<const StepRow*>(memory.message);
}

TWINJET_HD Edit* EditsOf(const SeatMemory& memory, const Seat& seat) {
  return reinterpret_cast<Edit*>(memory.arena + seat.begin + seat.edits_at);
}

TWINJET_HD int32_t* RingOf(const SeatMemory& memory, const Seat& seat) {
  return reinterpret_cast<int32_t*>(memory.arena + seat.begin + seat.ring_at);
}

// A region's bad words, as ints: the end of each word's prefix in the list of tokens, the index of each
// word's edit, the tokens of all prefixes.
TWINJET_HD const int32_t* WordsOf(const SeatMemory& memory, const Seat& seat) {
  return reinterpret_cast<const int32_t*>(memory.arena + seat.begin);
}

template <class Team>
TWINJET_TEAM_STEP void CopyUnits(const Team& team, const Unit* from, Unit* to, int32_t count) {
  for (int32_t i = team.rank(); i < count; i += team.size()) to[i] = from[i];
}

// Whether the output's last tokens are this prefix.
TWINJET_HD bool EndsWithPrefix(const int32_t* ring, int32_t ring_size, int32_t num_outputs,
                               const int32_t* prefix, int32_t length) {
  if (length > num_outputs) return false;
  for (int32_t i = 0; i < length; ++i) {
    if (ring[(num_outputs - length + i) % ring_size] != prefix[i]) return false;
  }
  return true;
}

// Masks the last tokens of the bad words whose prefix stands at the end of the output, and no others'.
template <class Team>
TWINJET_TEAM_STEP void MaskBadWords(const Team& team, const SeatMemory& memory, const Seat& seat,
                                    int32_t num_outputs) {
  const int32_t* ends = WordsOf(memory, seat);
  const int32_t* places = ends + seat.num_words;
  const int32_t* tokens = places + seat.num_words;
  const int32_t* ring = RingOf(memory, seat);
  Edit* edits = EditsOf(memory, seat);
  for (int32_t i = team.rank(); i < seat.num_words; i += team.size()) edits[places[i]].flags &= ~kEditMasked;
  team.Sync();
  for (int32_t i = team.rank(); i < seat.num_words; i += team.size()) {
    const int32_t first = i == 0 ? 0 : ends[i - 1];
    if (EndsWithPrefix(ring, seat.ring_size, num_outputs, tokens + first, ends[i] - first))
      team.Or(&edits[places[i]].flags, kEditMasked);
  }
}

template <class Team>
TWINJET_TEAM_STEP void CopyPiece(const Team& team, const SeatMemory& memory, int32_t index) {
  const Piece& piece = reinterpret_cast<const Piece*>(memory.message + 1)[index];
  CopyUnits(team, memory.message + piece.from, memory.arena + piece.to, piece.units);
}

TWINJET_HD TextTables TextOf(const SeatMemory& memory, const Seat& seat) {
  return ReadTextTables(reinterpret_cast<const uint32_t*>(memory.arena + seat.text_at));
}

TWINJET_HD TokenTables TokensOf(const SeatMemory& memory, const Seat& seat) {
  return ReadTokenTables(reinterpret_cast<const uint32_t*>(memory.arena + seat.tokens_at));
}

// Writes the row's mask of allowed tokens without those that would complete a banned string.
template <class Team>
TWINJET_TEAM_STEP void MaskBadText(const Team& team, const SeatMemory& memory, const Seat& seat,
                                   const TextTables& text, int32_t vocab_size) {
  const TokenTables tokens = TokensOf(memory, seat);
  auto* mask = reinterpret_cast<uint32_t*>(memory.arena + seat.text_mask_at);
  const auto* allowed = reinterpret_cast<const uint32_t*>(memory.arena + seat.begin + seat.allowed_at);
  for (int32_t i = team.rank(); i < (vocab_size + 31) / 32; i += team.size()) {
    mask[i] = seat.has_allowed != 0 ? allowed[i] : ~0u;
  }
  team.Sync();
  int32_t state = seat.text_state;
  do {
    const TextState& at = text.states[state];
    for (int32_t r = at.first_range; r < text.states[state + 1].first_range; ++r) {
      const BannedRange range = text.ranges[r];
      for (int32_t i = range.first + team.rank(); i < range.last; i += team.size()) {
        const uint32_t entry = tokens.order[i];
        if (text.skips_special && (entry & kSpecialToken) != 0) continue;
        const uint32_t id = entry & ~kSpecialToken;
        // The texts may know more tokens than the model has.
        if (id < static_cast<uint32_t>(vocab_size)) team.And(&mask[id / 32], ~(1u << (id % 32)));
      }
    }
    state = at.next;
  } while (state != 0);
}

// Before a draw: seats a fresh request, moves a region, and writes the row's inputs for the kernels.
template <class Team>
TWINJET_TEAM_STEP void BeginRow(const Team& team, const SeatMemory& memory, int32_t index, int32_t vocab_size,
                                DeviceRow* rows) {
  const StepRow& step = RowsOf(memory)[index];
  if (step.seat < 0) return;
  Seat& seat = memory.seats[step.seat];
  if (step.fresh_at >= 0) {
    const Unit* source = memory.message + step.fresh_at;
    CopyUnits(team, source, reinterpret_cast<Unit*>(&seat), kSeatUnits);
    team.Sync();
    CopyUnits(team, source + kSeatUnits, memory.arena + seat.begin, step.fresh_units);
    team.Sync();
  }
  if (step.move_to >= 0) {
    CopyUnits(team, memory.arena + seat.begin, memory.arena + step.move_to, seat.edits_at + seat.num_edits);
    team.Sync();
    if (team.rank() == 0) seat.begin = step.move_to;
    team.Sync();
  }
  if (seat.num_words > 0) MaskBadWords(team, memory, seat, step.num_outputs);
  if (rows == nullptr) return;
  bool has_text_mask = false;
  if (seat.text_at >= 0) {
    const TextTables text = TextOf(memory, seat);
    has_text_mask = HasRanges(text, seat.text_state);
    if (has_text_mask) MaskBadText(team, memory, seat, text, vocab_size);
  }
  if (team.rank() != 0) return;
  DeviceRow out = {};
  out.constants = seat.constants;
  out.constants.race.position = step.position;
  out.bitmask_row = static_cast<int32_t>(step.flags >> kStepMaskShift) - 1;
  out.allowed_at = has_text_mask           ? seat.text_mask_at
                   : seat.has_allowed != 0 ? seat.begin + seat.allowed_at
                                           : -1;
  out.edit_begin = seat.begin + seat.edits_at;
  out.edit_end = out.edit_begin + seat.num_edits;
  out.has_early_stops = (step.flags & kStepEarlyStops) != 0 ? 1 : 0;
  rows[index] = out;
}

// After a draw: the token becomes part of the request's history.
template <class Team>
TWINJET_TEAM_STEP void EndRow(const Team& team, const SeatMemory& memory, int32_t index, int32_t token) {
  const StepRow& step = RowsOf(memory)[index];
  if (step.seat < 0 || token < 0 || (step.flags & kStepAdvances) == 0) return;
  Seat& seat = memory.seats[step.seat];
  if (seat.ring_size > 0 && team.rank() == 0) RingOf(memory, seat)[step.num_outputs % seat.ring_size] = token;
  if (seat.text_at >= 0 && team.rank() == 0) {
    seat.text_state = StateAfterToken(TextOf(memory, seat), TokensOf(memory, seat), seat.text_state, token);
  }
  if (seat.counts_output == 0) return;
  Edit* edits = EditsOf(memory, seat);
  const int32_t num_edits = seat.num_edits;
  bool is_known = false;
  for (int32_t i = team.rank(); i < num_edits; i += team.size()) {
    if (edits[i].token_id != token) continue;
    edits[i].flags |= kEditSeen;
    ++edits[i].output_count;
    is_known = true;
  }
  if (team.Any(is_known) || team.rank() != 0) return;
  edits[num_edits] = {token, kEditSeen, 1, 0.0f};
  seat.num_edits = num_edits + 1;
}

}  // namespace twinjet::sampler::cuda
