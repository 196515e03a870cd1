// What host and device code of the CUDA sampler share: the rows' inputs as they lie in device memory,
// and the shape of a launch. Plain data and plain arithmetic; compiled by both compilers.
//
// A row is cut into slices of whole groups (kGroupSize tokens). One block owns one slice, the blocks of
// a cluster own a row and go from row to row. Where clusters do not exist, one block owns the row and keeps
// it in scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sampler/spec.h"

namespace twinjet::sampler::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kLanesPerGroup = 8;                            // lanes of a warp that share a group
constexpr int kGroupsPerPass = kThreads / kLanesPerGroup;    // groups a block handles at a time
constexpr int kTokensPerLane = kGroupSize / kLanesPerGroup;  // 32
constexpr int kMaxCluster = 16;
constexpr int kNumBins = 64;                  // parts of a bracket whose totals are exchanged at a time
constexpr int kReducedWords = 8;              // words that a block sends to each other block for totals
constexpr int kMaxCandidates = 240;           // tokens that a threshold search settles by comparing all pairs
constexpr int kMaxKept = 3 * kMaxCandidates;  // tokens of a block that a search keeps in their place
constexpr int kSampleStep = kTokensPerLane / 4;  // one token of so many is in a search's sample
constexpr int kMaxSamples = 3;                   // of a search, before it goes on by pivots
constexpr int kMaxTopLogprobs = 128;

// What a batch's rows are, for which a kernel of less code is faster.
enum class Family : int32_t {
  kGreedy,  // all are greedy
  kOpen,    // greedy, or without top_k and top_p
  kAny,
};

// What the host knows of all rows of a batch, and chooses the kernel by.
struct Traits {
  Family family = Family::kAny;
  bool has_edits = true;  // some row may have
};

// A token whose logit is changed before the maximum is taken. At most one entry per row and token.
struct Edit {
  int32_t token_id;
  uint32_t flags;         // kEdit*
  uint32_t output_count;  // occurrences in the output
  float bias;
};
constexpr uint32_t kEditMasked = 1;  // -inf
constexpr uint32_t kEditBias = 2;
constexpr uint32_t kEditSeen = 4;       // in the prompt or the output: repetition penalty
constexpr uint32_t kEditEarlyStop = 8;  // -inf, unless that leaves no token

// One row's inputs. Written by the host before each step, constant during it.
struct DeviceRow {
  RowConstants constants;
  int32_t bitmask_row;  // row of SampleArgs::bitmask, or -1
  int32_t allowed_at;   // 16-byte unit of SampleArgs::allowed where the row's mask begins, or -1
  int32_t edit_begin;   // edits[edit_begin .. edit_end)
  int32_t edit_end;
  uint32_t has_early_stops;  // edits with kEditEarlyStop count
  uint32_t reserved;
};

// What the draw leaves behind for the logprobs of the distribution it drew from.
struct DrawInfo {
  float threshold;  // kept are the logits at least this large
};

struct SampleArgs {
  const void* logits = nullptr;  // [num_rows, vocab_size], row_stride elements apart
  int64_t row_stride = 0;
  Dtype dtype = Dtype::kFloat32;
  int32_t num_rows = 0;
  int32_t vocab_size = 0;
  int32_t groups_per_block = 0;  // set by the launcher
  const DeviceRow* rows = nullptr;
  const Edit* edits = nullptr;
  const uint32_t* bitmask = nullptr;  // [*, bitmask_stride] words, bit = 1: allowed
  int64_t bitmask_stride = 0;
  const uint32_t* allowed = nullptr;  // masks of ceil(vocab_size / 32) words
  int32_t* token_ids = nullptr;       // [num_rows]
  uint32_t* status = nullptr;         // [num_rows]
  DrawInfo* info = nullptr;           // [num_rows]
  float* processed_logits = nullptr;  // [num_rows, vocab_size] or null
  float* scratch = nullptr;           // rows in progress where they do not fit on chip
  Family family = Family::kAny;
  bool keeps_narrow = false;  // slices hold a 16-bit row's logits as they are: no row has edits
  // The clusters of each wave, so many in all, start so many cycles after those of the wave before.
  int32_t num_waves = 1;
  int32_t cycles_per_wave = 0;
  uint32_t* num_claims = nullptr;  // 0 before and after a launch. Null: clusters take rows by a fixed stride
};

struct LogprobsArgs {
  SampleArgs sample;           // token_ids and info as the draw wrote them
  int32_t num_top = 0;         // 0 .. kMaxTopLogprobs
  int32_t processed = 0;       // 1: of the distribution drawn from; 0: of the logits as given, T = 1
  int32_t* top_ids = nullptr;  // [num_rows, 1 + num_top]
  float* top_logprobs = nullptr;
  int32_t* ranks = nullptr;  // [num_rows]
};

// How a launch cuts its rows.
struct LaunchShape {
  int32_t cluster = 1;
  int32_t groups_per_block = 0;
  int32_t num_blocks = 0;
  size_t shared_bytes = 0;
  bool on_chip = false;  // slices live in shared memory
  bool keeps_narrow = false;
};

struct DeviceLimits {
  int32_t num_multiprocessors = 0;
  size_t max_shared_bytes = 0;   // per block
  int32_t max_cluster = 1;       // 1 where the device has no clusters
  double bytes_per_cycle = 0.0;  // of memory, in cycles of a multiprocessor; 0: unknown
};

TWINJET_HD int32_t DivideUp(int32_t a, int32_t b) { return (a + b - 1) / b; }

TWINJET_HD Family FamilyOf(const RowConstants& constants) {
  if (constants.is_greedy != 0) return Family::kGreedy;
  return constants.top_k == 0 && constants.has_top_p == 0 ? Family::kOpen : Family::kAny;
}

TWINJET_HD int32_t NumGroups(int32_t vocab_size) { return DivideUp(vocab_size, kGroupSize); }

// The fixed head of a block's shared memory; arrays follow, see SharedLayout. What comes in two sets is used
// in turns: a block may send into the next set while another still reads the last, but not into the one
// after.
struct SharedHead {
  DeviceRow input[2];  // of this row and of the row before, whose race may still be on
  uint64_t by_warp[kWarps][kReducedWords];
  uint64_t totals[kReducedWords];
  // Barriers that count arriving bytes.
  uint64_t copy_arrival;
  uint64_t maxima_arrival[2];
  uint64_t mail_arrival[2];
  uint64_t runner_arrival[2];
  uint64_t list_arrival;
  uint32_t claimed;  // row that the cluster draws next, where rows are claimed; in the block of rank 0
};
static_assert(sizeof(DeviceRow) % 16 == 0);

// What a block tells the others of its list of candidates; the candidates' logits follow in its slot.
struct ListHeader {
  uint32_t count;  // above the capacity: the rest is missing
  uint32_t reserved;
  uint64_t mass;  // of the block's kept tokens, where the search sums weights
  uint64_t reserved2[2];
};

// Byte offsets of the arrays behind the head. Those with a slot for each block of the cluster are where the
// other blocks send.
struct SharedLayout {
  size_t maxima;   // float [2][cluster][maxima_stride], filled up with -inf
  size_t flags;    // uint32 [2][cluster]
  size_t mail;     // uint64 [2][MailWords]
  size_t runners;  // uint64 [2][cluster][2]
  size_t lists;    // [cluster] of a ListHeader and float [list_capacity]
  // Float weights and logits of all candidates, before them counts of maxima or the tokens that a search
  // keeps.
  size_t gathered;
  // Either uint64 group_mass [groups_per_block], or float group_sum [groups_per_block] and uint16
  // listed_groups [list_capacity], of the tokens in this block's own list.
  size_t group_mass;
  size_t slice;  // [groups_per_block * kGroupSize], on chip only
  size_t total;
  int32_t maxima_stride;
  int32_t list_capacity;
};

TWINJET_HD size_t RoundUp16(size_t bytes) { return (bytes + 15) & ~static_cast<size_t>(15); }

// Candidates that one block may list: all of them in small clusters, twice its share in large ones.
TWINJET_HD int32_t ListCapacity(int32_t cluster) {
  return cluster <= 2 ? kMaxCandidates : cluster <= 4 ? kMaxCandidates / 2 : 64;
}

// Words of one exchange of mail: kReducedWords from each block, or the bins and two words from each.
TWINJET_HD int32_t MailWords(int32_t cluster) {
  const int32_t reduced = kReducedWords * cluster, binned = kNumBins + 2 * cluster;
  return reduced > binned ? reduced : binned;
}

TWINJET_HD SharedLayout LayOutShared(int32_t groups_per_block, int32_t cluster, bool on_chip,
                                     size_t item_bytes = sizeof(float)) {
  SharedLayout layout = {};
  const size_t groups = static_cast<size_t>(groups_per_block);
  const size_t blocks = static_cast<size_t>(cluster);
  layout.maxima_stride = (groups_per_block + 3) / 4 * 4;
  layout.list_capacity = ListCapacity(cluster);
  const size_t list_bytes = sizeof(ListHeader) + static_cast<size_t>(layout.list_capacity) * sizeof(float);
  const size_t candidate_bytes = kMaxKept * sizeof(float);
  layout.maxima = RoundUp16(sizeof(SharedHead));
  layout.flags = layout.maxima + 2 * blocks * static_cast<size_t>(layout.maxima_stride) * sizeof(float);
  layout.mail = layout.flags + RoundUp16(2 * blocks * sizeof(uint32_t));
  layout.runners = layout.mail + 2 * static_cast<size_t>(MailWords(cluster)) * sizeof(uint64_t);
  layout.lists = layout.runners + 2 * blocks * 2 * sizeof(uint64_t);
  layout.gathered = layout.lists + blocks * list_bytes;
  layout.group_mass = layout.gathered + candidate_bytes;
  const size_t mass_bytes = groups * sizeof(uint64_t);
  const size_t listed_bytes =
      groups * sizeof(float) + static_cast<size_t>(layout.list_capacity) * sizeof(uint16_t);
  // Bulk copies to places that are no multiples of 128 bytes take a sixth longer.
  layout.slice =
      (layout.group_mass + (mass_bytes > listed_bytes ? mass_bytes : listed_bytes) + 127) / 128 * 128;
  layout.total = layout.slice + (on_chip ? groups * kGroupSize * item_bytes : 0);
  return layout;
}

}  // namespace twinjet::sampler::cuda
