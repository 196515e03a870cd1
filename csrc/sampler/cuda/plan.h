// What host and device code of the CUDA sampler share: the rows' inputs as they lie in device memory,
// and the shape of a launch. Plain data and plain arithmetic; compiled by both compilers.
//
// A row is cut into slices of whole groups (kGroupSize tokens). One block owns one slice, the blocks of
// a cluster own a row. Where clusters do not exist, one block owns the row and keeps it in scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sampler/spec.h"

namespace twinjet::sampler::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLanesPerGroup = 8;                            // lanes of a warp that share a group
constexpr int kGroupsPerPass = kThreads / kLanesPerGroup;    // groups a block handles at a time
constexpr int kTokensPerLane = kGroupSize / kLanesPerGroup;  // 32
constexpr int kMaxCluster = 16;
constexpr int kMailWords = 8;        // words that a block sends to each other block at a time
constexpr int kMaxCandidates = 384;  // tokens that a threshold search settles by comparing all pairs
constexpr int kMaxTopLogprobs = 128;

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
  int32_t allowed_row;  // row of SampleArgs::allowed, or -1
  int32_t edit_begin;   // edits[edit_begin .. edit_end)
  int32_t edit_end;
  uint32_t has_early_stops;  // some edit has kEditEarlyStop
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
  int32_t rows_in_flight = 0;    // set by the launcher: rows that run at once
  const DeviceRow* rows = nullptr;
  const Edit* edits = nullptr;
  const uint32_t* bitmask = nullptr;  // [*, bitmask_stride] words, bit = 1: allowed
  int64_t bitmask_stride = 0;
  const uint32_t* allowed = nullptr;  // [*, ceil(vocab_size / 32)]
  int32_t* token_ids = nullptr;       // [num_rows]
  uint32_t* status = nullptr;         // [num_rows]
  DrawInfo* info = nullptr;           // [num_rows]
  float* processed_logits = nullptr;  // [num_rows, vocab_size] or null
  float* scratch = nullptr;           // rows in progress where they do not fit on chip
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
  int32_t rows_in_flight = 0;  // how many rows the device works on at once
  size_t shared_bytes = 0;
  bool on_chip = false;  // slices live in shared memory
};

struct DeviceLimits {
  int32_t num_multiprocessors = 0;
  size_t max_shared_bytes = 0;  // per block
  int32_t max_cluster = 1;      // 1 where the device has no clusters
};

TWINJET_HD int32_t NumGroups(int32_t vocab_size) { return (vocab_size + kGroupSize - 1) / kGroupSize; }

// The fixed head of a block's shared memory; arrays follow, see SharedLayout.
struct SharedHead {
  // Mail from block r of the cluster lies in mail[n % 2][r] in exchange n. Two sets: a block may send its
  // next mail while another still reads this one, but not the one after.
  uint64_t mail[2][kMaxCluster][kMailWords];
  uint64_t mail_arrival[2];  // mbarriers that count the mail
  uint64_t by_warp[kWarps][kMailWords];
  uint64_t totals[kMailWords];
  float list[kMaxCandidates];  // this block's candidates; read by the other blocks
  int32_t list_size;
  uint64_t num_sent[2][kMaxCluster];  // sizes of the blocks' lists, in two sets as mail
  int32_t num_listed[kMaxCluster];
  uint64_t arrival;  // mbarrier of the slice's bulk copy
};

// Byte offsets of the arrays behind the head.
struct SharedLayout {
  size_t group_mass;  // uint64 [groups_per_block]
  size_t gathered;    // double weights and float logits of all candidates, or all group maxima
  size_t group_max;   // float [groups_per_block]
  size_t slice;       // float [groups_per_block * kGroupSize], on chip only
  size_t total;
};

TWINJET_HD size_t RoundUp16(size_t bytes) { return (bytes + 15) & ~static_cast<size_t>(15); }

TWINJET_HD SharedLayout LayOutShared(int32_t groups_per_block, int32_t num_groups, bool on_chip) {
  SharedLayout layout = {};
  const size_t groups = static_cast<size_t>(groups_per_block);
  const size_t candidates = kMaxCandidates * (sizeof(double) + sizeof(float));
  const size_t maxima = static_cast<size_t>(num_groups) * sizeof(float);
  layout.group_mass = RoundUp16(sizeof(SharedHead));
  layout.gathered = layout.group_mass + RoundUp16(groups * sizeof(uint64_t));
  layout.group_max = layout.gathered + RoundUp16(candidates > maxima ? candidates : maxima);
  layout.slice = layout.group_max + RoundUp16(groups * sizeof(float));
  layout.total = layout.slice + (on_chip ? groups * kGroupSize * sizeof(float) : 0);
  return layout;
}

}  // namespace twinjet::sampler::cuda
