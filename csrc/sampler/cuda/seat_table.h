// The host's side of the seats: who sits where, where the regions lie in the arena, and the message that
// tells the device of a step. Needs no device.
//
// The host never learns a drawn token here. It counts output tokens, which is all that positions and
// min_tokens need; what depends on the tokens themselves is kept by the device (seats.h).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "sampler/bad_text.h"
#include "sampler/cuda/seats.h"
#include "sampler/request.h"

namespace twinjet::sampler::cuda {

// Hands out ranges of units in sizes of powers of two; what is freed serves the same size again.
class UnitArena {
 public:
  int32_t Take(int32_t units);
  void Free(int32_t begin, int32_t units);  // as taken
  static int32_t SizeOf(int32_t units);     // what Take reserves for so many
  int32_t end() const { return end_; }      // units that were ever in use

 private:
  std::vector<std::vector<int32_t>> free_ = std::vector<std::vector<int32_t>>(31);
  int32_t end_ = 0;
};

class SeatTable {
 public:
  // max_text_units: of tables of banned strings that may lie on the device at once; requests with the same
  // strings share one.
  static constexpr int32_t kMaxTextUnits = 1 << 24;  // 256 MiB
  explicit SeatTable(int32_t vocab_size, int32_t max_text_units = kMaxTextUnits)
      : vocab_size_(vocab_size), max_text_units_(max_text_units) {}

  // Seats a request with its history so far; who sat there leaves. Throws InvalidRequest for another
  // vocabulary, and for banned strings that have no room, and then leaves all as it was. seat: at least 0;
  // the caller keeps seats dense.
  void Put(int32_t seat, Request& request);
  void Remove(int32_t seat);
  bool Has(int64_t seat) const;
  int32_t num_outputs(int64_t seat) const { return entries_[static_cast<size_t>(seat)]->num_outputs; }

  // The message of a step with these rows, and the counts afterwards. seats: with kSkip for rows that are not
  // ours. advances: the row's token becomes an output token. Valid until the next call.
  // mask_rows: each row's grammar mask, -1 where it has none; empty where no row has one.
  static constexpr int64_t kSkip = -1;
  std::span<const Unit> Build(std::span<const int64_t> seats, std::span<const uint8_t> advances,
                              std::span<const int32_t> mask_rows = {});

  // What has to come into the arena before the next step, by messages of at most max_units (2 and more): call
  // until one is empty. Each is valid until the next call.
  std::span<const Unit> BuildPieces(int32_t max_units);

  // Of the rows of the last message.
  const Traits& traits() const { return traits_; }

  // What the device must have room for before it takes the last message.
  int32_t arena_units() const { return arena_.end(); }
  int32_t num_seats() const { return static_cast<int32_t>(entries_.size()); }

 private:
  struct Entry {
    uint64_t first_position = 0;
    int32_t num_outputs = 0;
    int32_t min_tokens = 0;  // 0 where there is nothing to mask before
    bool counts_output = false;
    Traits traits;
    int32_t begin = 0;  // of the region; -1: it has none
    int32_t capacity = 0;
    int32_t edits_at = 0;
    int32_t max_edits = 0;  // at most so many are in the region
    std::vector<Unit> fresh;
    std::shared_ptr<const BadText> text;
    int32_t text_mask_at = 0;
  };

  // Words that lie in the arena for whoever refers to them.
  struct Shared {
    std::shared_ptr<const void> owner;  // of what they were made of
    int32_t begin = 0;
    int32_t units = 0;
    int32_t num_users = 0;
  };
  struct Pending {
    int32_t begin = 0;
    int32_t units_sent = 0;
    std::vector<Unit> contents;
  };
  void UseText(const std::shared_ptr<const BadText>& text);
  void LeaveText(const BadText* text);
  int32_t TokensAt(const std::shared_ptr<const TokenTexts>& texts);
  Shared Share(std::shared_ptr<const void> owner, const std::vector<uint32_t>& words);
  int32_t text_mask_units() const { return (vocab_size_ + 127) / 128; }

  int32_t vocab_size_;
  Traits traits_;
  int32_t max_text_units_;
  UnitArena arena_;
  std::vector<std::unique_ptr<Entry>> entries_;
  std::vector<Unit> message_;
  std::map<const BadText*, Shared> texts_;
  std::map<const TokenTexts*, Shared> tokens_;  // of models: few, and they stay
  int32_t text_units_ = 0;
  std::vector<Pending> pending_;
  std::vector<Unit> pieces_;
};

}  // namespace twinjet::sampler::cuda
