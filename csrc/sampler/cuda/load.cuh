// Reading a slice of logits: widening, NaN, masks, edits, each group's maximum and about its mass. The only
// code that knows the dtype of rows; from here on there is the block's slice.
#pragma once

#include "sampler/cuda/slice.cuh"

namespace twinjet::sampler::cuda {

template <Dtype kDtype>
__device__ __forceinline__ float ReadOne(const void* row, int32_t i) {
  if (kDtype == Dtype::kFloat32) return static_cast<const float*>(row)[i];
  const uint32_t bits = static_cast<const uint16_t*>(row)[i];
  return kDtype == Dtype::kFloat16 ? WidenHalf(bits) : FloatFromBfloat16(static_cast<uint16_t>(bits));
}

struct LoadArgs {
  const void* row;  // the logits of the row
  int32_t vocab_size;
  const uint32_t* mask;     // null: all allowed
  const uint32_t* allowed;  // a second mask, null: all allowed
  bool aligned;             // row is 16-byte aligned
};

// The words of the masks that hold token `token`, as one.
__device__ __forceinline__ uint32_t MaskWord(const LoadArgs& args, int32_t token) {
  uint32_t word = ~0u;
  if (args.mask != nullptr) word &= args.mask[token / 32];
  if (args.allowed != nullptr) word &= args.allowed[token / 32];
  return word;
}

// A group as its first reader sees it, or a lane's part of one: the largest logit, and, where the row has a
// sum_scale, the sum of 2^((x - max) * sum_scale). The sum needs no other group's logits, so the row's
// maximum need not be known yet; see BoundsOfScans for its error.
struct GroupScan {
  float max;
  float sum;  // 0 without sum_scale
};

// What a scan subtracts: the maximum, or a finite number where all are -inf.
__device__ __forceinline__ float ReferenceOf(float max) { return fmaxf(max, -0x1.fffffep+127f); }

__device__ __forceinline__ float ScannedWeight(float x, float reference, float scale) {
  return ApproximateExp2(MulRn(SubRn(x, reference), scale));
}

// The lane's scan of the tokens that it has. max: of these.
template <Dtype kStored>
__device__ __forceinline__ GroupScan ScanTokens(const StoredFour<kStored> (&fours)[kTokensPerLane / 4],
                                                float max, float sum_scale) {
  if (sum_scale == 0.0f) return {max, 0.0f};
  const float reference = ReferenceOf(max);
  float sum[4] = {};
#pragma unroll
  for (int i = 0; i < kTokensPerLane / 4; ++i) {
    const float4 x = fours[i].Widened();
    sum[0] += ScannedWeight(x.x, reference, sum_scale);
    sum[1] += ScannedWeight(x.y, reference, sum_scale);
    sum[2] += ScannedWeight(x.z, reference, sum_scale);
    sum[3] += ScannedWeight(x.w, reference, sum_scale);
  }
  return {max, (sum[0] + sum[1]) + (sum[2] + sum[3])};
}

// Joins the lanes' scans of a group and keeps them. In all lanes of a warp, those without a group too.
__device__ __forceinline__ void KeepScan(const Block& block, int32_t group, const GroupScan& lane,
                                         float sum_scale) {
  float max = lane.max;
#pragma unroll
  for (int offset = kLanesPerGroup / 2; offset > 0; offset /= 2)
    max = fmaxf(max, __shfl_xor_sync(~0u, max, offset));
  const bool keeps = group < block.num_local && LaneInGroup() == 0;
  if (keeps) block.group_max[group] = max;
  if (sum_scale == 0.0f) return;
  float sum = lane.sum * ScannedWeight(ReferenceOf(lane.max), ReferenceOf(max), sum_scale);
#pragma unroll
  for (int offset = kLanesPerGroup / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (keeps) block.group_sum[group] = sum;
}

// A lane's 32 tokens of a group that lies wholly inside the row. first: the group's first token.
template <Dtype kDtype>
__device__ __forceinline__ GroupScan LoadGroup(const LoadArgs& args, int32_t first, float4* out, bool masked,
                                               float sum_scale, bool& has_nan) {
  constexpr int kBytes = kDtype == Dtype::kFloat32 ? 4 : 2;
  constexpr int kPerLoad = 16 / kBytes;
  constexpr int kLoads = kTokensPerLane / kPerLoad;
  const char* source = static_cast<const char*>(args.row) + static_cast<int64_t>(first) * kBytes;
  uint4 raw[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) raw[i] = LoadOnce(source + (i * kLanesPerGroup + LaneInGroup()) * 16);
  float max = NegativeInfinity();
  StoredFour<Dtype::kFloat32> fours[kTokensPerLane / 4];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
    const int32_t offset = (i * kLanesPerGroup + LaneInGroup()) * kPerLoad;  // of the load, in its group
    uint32_t allowed = ~0u;
    if (masked) allowed = MaskWord(args, first + offset) >> (offset % 32);
    float x[kPerLoad];
#pragma unroll
    for (int q = 0; q < kPerLoad; ++q) {
      if (kDtype == Dtype::kFloat32) {
        x[q] = __uint_as_float(words[q % 4]);
      } else {
        const uint32_t word = words[q / 2 % 4];
        if (kDtype == Dtype::kBfloat16) {
          x[q] = __uint_as_float(q % 2 == 0 ? word << 16 : word & 0xffff0000u);
        } else {
          x[q] = WidenHalf(q % 2 == 0 ? word & 0xffffu : word >> 16);
        }
      }
      has_nan |= x[q] != x[q];
      x[q] = fmaxf(x[q], NegativeInfinity());  // NaN becomes -inf
      if (masked && (allowed >> q & 1u) == 0) x[q] = NegativeInfinity();
      max = fmaxf(max, x[q]);
    }
#pragma unroll
    for (int q = 0; q < kPerLoad; q += 4) {
      const float4 four = make_float4(x[q], x[q + 1], x[q + 2], x[q + 3]);
      out[(offset + q) / 4] = four;
      fours[(i * kPerLoad + q) / 4].bits = four;
    }
  }
  return ScanTokens(fours, max, sum_scale);
}

// The same for a group that ends past the row, or a row at an odd address.
template <Dtype kDtype, Dtype kStored = Dtype::kFloat32>
__device__ __forceinline__ GroupScan LoadRaggedGroup(const Block& block, const LoadArgs& args, int32_t group,
                                                     float sum_scale, bool& has_nan) {
  const int32_t first = (block.first_group + group) * kGroupSize;
  float max = NegativeInfinity();
  for (int32_t i = LaneInGroup(); i < kGroupSize; i += kLanesPerGroup) {
    float x = NegativeInfinity();
    const int32_t token = first + i;
    if (token < args.vocab_size) {
      x = ReadOne<kDtype>(args.row, token);
      has_nan |= x != x;
      x = fmaxf(x, NegativeInfinity());
      if ((MaskWord(args, token) >> (token % 32) & 1u) == 0) x = NegativeInfinity();
    }
    SetToken<kStored>(block, group * kGroupSize + i, x);
    max = fmaxf(max, x);
  }
  float sum = 0.0f;
  if (sum_scale != 0.0f) {
    for (int32_t i = LaneInGroup(); i < kGroupSize; i += kLanesPerGroup)
      sum += ScannedWeight(TokenOf<kStored>(block, group * kGroupSize + i), ReferenceOf(max), sum_scale);
  }
  return {max, sum};
}

// Whether the row's logits lie so that bulk copies can fetch them as they are.
__device__ __forceinline__ bool IsAligned(const SampleArgs& args, int32_t row) {
  const int64_t item = args.dtype == Dtype::kFloat32 ? 4 : 2;
  return ((reinterpret_cast<uintptr_t>(args.logits) + static_cast<uintptr_t>(row * args.row_stride * item)) &
          15) == 0;
}

// Whether StartRow's copy brings the slice's whole groups.
__device__ __forceinline__ bool IsCopied(const Block& block, const SampleArgs& args, int32_t row) {
  return block.copies && IsAligned(args, row);
}

// Copies bring a 16-bit row to the upper half of its slice, from where it is widened.
__device__ __forceinline__ float* NarrowSlice(const Block& block) {
  return block.slice + block.groups_per_block * (kGroupSize / 2);
}

// The thread that starts copies: one that has no group to enter into the race when a block has few.
constexpr uint32_t kCopyThread = kThreads - 32;

// How many groups of the block's slice lie wholly inside a row.
__device__ __forceinline__ int32_t NumWholeGroups(const Block& block, const SampleArgs& args) {
  const int32_t left = (args.vocab_size - block.first_group * kGroupSize) / kGroupSize;
  return left < 0 ? 0 : left < block.num_local ? left : block.num_local;
}

__device__ __forceinline__ const char* SliceInMemory(const Block& block, const SampleArgs& args,
                                                     int32_t row) {
  const int64_t item = args.dtype == Dtype::kFloat32 ? 4 : 2;
  return static_cast<const char*>(args.logits) +
         (static_cast<int64_t>(block.first_group) * kGroupSize + row * args.row_stride) * item;
}

__device__ __forceinline__ uint32_t GroupBytes(const SampleArgs& args) {
  return kGroupSize * (args.dtype == Dtype::kFloat32 ? 4u : 2u);
}

// In kCopyThread of a block that `copies`: fetches a part of a row's slice into L2.
__device__ __forceinline__ void PrefetchRow(const Block& block, const SampleArgs& args, int32_t row) {
  // A quarter: more of all rows in flight would crowd L2.
  const uint32_t bytes = static_cast<uint32_t>(NumWholeGroups(block, args)) / 4 * GroupBytes(args);
  if (row < args.num_rows && bytes != 0 && IsAligned(args, row))
    StartPrefetch(SliceInMemory(block, args, row), bytes);
}

// In kCopyThread of a block that `copies`: sets the copies of a row going, its parameters and the whole
// groups of its slice. What was read from the places they go to must be behind a FenceForCopies and a
// barrier.
__device__ __forceinline__ void StartRow(const Block& block, const SampleArgs& args, int32_t row) {
  if (row >= args.num_rows) return;
  const uint32_t bytes =
      IsCopied(block, args, row) ? static_cast<uint32_t>(NumWholeGroups(block, args)) * GroupBytes(args) : 0;
  uint64_t* arrival = &block.head->copy_arrival;
  ExpectBytes(arrival, static_cast<uint32_t>(sizeof(DeviceRow)) + bytes);
  if (bytes != 0) {
    float* to = args.dtype == Dtype::kFloat32 || args.keeps_narrow ? block.slice : NarrowSlice(block);
    StartCopy(to, SliceInMemory(block, args, row), bytes, arrival);
  }
  StartCopy(&block.head->input[block.num_copies & 1], args.rows + row, sizeof(DeviceRow), arrival);
}

// In kCopyThread of the block of rank 0, when the cluster starts a row: takes the row after it. Clusters
// start with the rows of their own numbers. As many rows are claimed as are drawn, the last of them in vain.
__device__ __forceinline__ void ClaimRow(const Block& block, const SampleArgs& args, int32_t num_clusters) {
  const uint32_t claims = atomicAdd(args.num_claims, 1u);
  const auto num_rows = static_cast<uint32_t>(args.num_rows);
  const uint32_t row = claims + static_cast<uint32_t>(num_clusters);
  block.head->claimed = row < num_rows ? row : num_rows;
  if (claims + 1 == num_rows) *args.num_claims = 0;
}

// The row's parameters, once they and what else StartRow fetches are there.
__device__ __forceinline__ const DeviceRow& WaitRow(Block& block, const SampleArgs& args, int32_t row) {
  DeviceRow& input = block.head->input[block.num_copies & 1];
  if (block.copies) {
    WaitPhase(&block.head->copy_arrival, block.num_copies & 1);
  } else {
    constexpr uint32_t kWords = sizeof(DeviceRow) / 4;
    const auto* words = reinterpret_cast<const uint32_t*>(args.rows + row);
    for (uint32_t i = threadIdx.x; i < kWords; i += kThreads)
      reinterpret_cast<uint32_t*>(&input)[i] = words[i];
    __syncthreads();
  }
  ++block.num_copies;
  return input;
}

// The lane's tokens of a group that lies in the slice.
template <Dtype kStored>
__device__ __forceinline__ void ReadLane(const Block& block, int32_t group,
                                         StoredFour<kStored> (&fours)[kTokensPerLane / 4]) {
  const auto* slice = FoursOf<kStored>(block);
#pragma unroll
  for (int i = 0; i < kTokensPerLane / 4; ++i) fours[i] = slice[FloatFourOfLane(group, i)];
}

template <Dtype kStored>
__device__ __forceinline__ float MaxOrNanOf(const StoredFour<kStored> (&fours)[kTokensPerLane / 4]) {
  float max = NegativeInfinity();
#pragma unroll
  for (int i = 0; i < kTokensPerLane / 4; ++i) {
    const float4 x = fours[i].Widened();
    max = MaxOrNan(max, MaxOrNan(MaxOrNan(x.x, x.y), MaxOrNan(x.z, x.w)));
  }
  return max;
}

// NaN and masked tokens of the lane become -inf in place. Returns the lane's maximum.
template <Dtype kStored>
__device__ __forceinline__ float CleanGroup(const Block& block, const LoadArgs& args, int32_t group,
                                            bool masked, bool& has_nan) {
  const int32_t first = (block.first_group + group) * kGroupSize;
  StoredFour<kStored>* fours = FoursOf<kStored>(block) + group * (kGroupSize / 4);
  float max = NegativeInfinity();
#pragma unroll 1
  for (int i = 0; i < kTokensPerLane / 4; ++i) {
    const int32_t offset = (i * kLanesPerGroup + LaneInGroup()) * 4;
    float4 x = fours[offset / 4].Widened();
    has_nan |= x.x != x.x || x.y != x.y || x.z != x.z || x.w != x.w;
    const uint32_t allowed = masked ? MaskWord(args, first + offset) >> (offset % 32) : ~0u;
    x.x = (allowed & 1u) != 0 ? fmaxf(x.x, NegativeInfinity()) : NegativeInfinity();
    x.y = (allowed & 2u) != 0 ? fmaxf(x.y, NegativeInfinity()) : NegativeInfinity();
    x.z = (allowed & 4u) != 0 ? fmaxf(x.z, NegativeInfinity()) : NegativeInfinity();
    x.w = (allowed & 8u) != 0 ? fmaxf(x.w, NegativeInfinity()) : NegativeInfinity();
    fours[offset / 4] = StoredFour<kStored>::Of(x);
    max = fmaxf(fmaxf(max, fmaxf(x.x, x.y)), fmaxf(x.z, x.w));
  }
  return max;
}

// A group that a bulk copy brought.
template <Dtype kStored>
__device__ __forceinline__ GroupScan ScanGroup(const Block& block, const LoadArgs& args, int32_t group,
                                               bool masked, float sum_scale, bool& has_nan) {
  StoredFour<kStored> fours[kTokensPerLane / 4];
  ReadLane(block, group, fours);
  float max = MaxOrNanOf(fours);
  if (masked || max != max) {
    max = CleanGroup<kStored>(block, args, group, masked, has_nan);
    ReadLane(block, group, fours);
  }
  return ScanTokens(fours, max, sum_scale);
}

// Fills the slice, with what its groups' scans say; true where this lane saw a NaN. No barrier at the end.
template <Dtype kDtype>
__device__ __forceinline__ bool LoadSlice(const Block& block, const LoadArgs& args, bool has_arrived,
                                          float sum_scale) {
  bool has_nan = false;
  const bool masked = args.mask != nullptr || args.allowed != nullptr;
  const int32_t passes = NumPasses(block);
  for (int32_t pass = 0; pass < passes; ++pass) {
    const int32_t group = GroupOfLane(pass);
    GroupScan scan = {NegativeInfinity(), 0.0f};
    if (group < block.num_local) {
      const int32_t first = (block.first_group + group) * kGroupSize;
      if (!args.aligned || first + kGroupSize > args.vocab_size) {
        scan = LoadRaggedGroup<kDtype>(block, args, group, sum_scale, has_nan);
      } else if (kDtype == Dtype::kFloat32 && has_arrived) {
        scan = ScanGroup<Dtype::kFloat32>(block, args, group, masked, sum_scale, has_nan);
      } else {
        scan = LoadGroup<kDtype>(args, first, reinterpret_cast<float4*>(block.slice + group * kGroupSize),
                                 masked, sum_scale, has_nan);
      }
    }
    KeepScan(block, group, scan, sum_scale);
  }
  return has_nan;
}

// LoadSlice for a 16-bit row that a copy brought. A pass is read before any thread writes it: its widened
// groups take the places of 16-bit ones of this pass and of passes before.
template <Dtype kDtype>
__device__ __forceinline__ bool WidenSlice(const Block& block, const LoadArgs& args, float sum_scale) {
  bool has_nan = false;
  const bool masked = args.mask != nullptr || args.allowed != nullptr;
  const int32_t passes = NumPasses(block);
#pragma unroll 1
  for (int32_t pass = 0; pass < passes; ++pass) {
    const int32_t group = GroupOfLane(pass);
    const bool is_inside = group < block.num_local;
    const bool is_whole =
        is_inside && (block.first_group + group) * kGroupSize + kGroupSize <= args.vocab_size;
    uint2 pairs[kTokensPerLane / 4];
    if (is_whole) {
      const auto* narrow = reinterpret_cast<const uint2*>(NarrowSlice(block)) + group * (kGroupSize / 4);
#pragma unroll
      for (int i = 0; i < kTokensPerLane / 4; ++i) pairs[i] = narrow[i * kLanesPerGroup + LaneInGroup()];
    }
    __syncthreads();
    GroupScan scan = {NegativeInfinity(), 0.0f};
    if (is_whole) {
      auto* slice = FoursOf<Dtype::kFloat32>(block);
#pragma unroll
      for (int i = 0; i < kTokensPerLane / 4; ++i)
        slice[FloatFourOfLane(group, i)].bits = Widen<kDtype>(pairs[i]);
      scan = ScanGroup<Dtype::kFloat32>(block, args, group, masked, sum_scale, has_nan);
    } else if (is_inside) {
      scan = LoadRaggedGroup<kDtype>(block, args, group, sum_scale, has_nan);
    }
    KeepScan(block, group, scan, sum_scale);
  }
  return has_nan;
}

// LoadSlice for a 16-bit row that stays as it is.
template <Dtype kStored>
__device__ __forceinline__ bool ScanSlice(const Block& block, const LoadArgs& args, bool has_arrived,
                                          float sum_scale) {
  bool has_nan = false;
  const bool masked = args.mask != nullptr || args.allowed != nullptr;
  const int32_t passes = NumPasses(block);
  for (int32_t pass = 0; pass < passes; ++pass) {
    const int32_t group = GroupOfLane(pass);
    GroupScan scan = {NegativeInfinity(), 0.0f};
    if (group < block.num_local) {
      if (has_arrived && (block.first_group + group) * kGroupSize + kGroupSize <= args.vocab_size) {
        scan = ScanGroup<kStored>(block, args, group, masked, sum_scale, has_nan);
      } else {
        scan = LoadRaggedGroup<kStored, kStored>(block, args, group, sum_scale, has_nan);
      }
    }
    KeepScan(block, group, scan, sum_scale);
  }
  return has_nan;
}

// What few rows need is not inlined: the kernel's usual path is to stay in the instruction cache.
static __device__ __noinline__ bool LoadNarrowSlice(Block block, LoadArgs args, Dtype dtype,
                                                    float sum_scale) {
  if (dtype == Dtype::kFloat16) return LoadSlice<Dtype::kFloat16>(block, args, false, sum_scale);
  return LoadSlice<Dtype::kBfloat16>(block, args, false, sum_scale);
}
static __device__ __noinline__ bool LoadSliceFromMemory(Block block, LoadArgs args, float sum_scale) {
  return LoadSlice<Dtype::kFloat32>(block, args, false, sum_scale);
}

// kNarrow: the row has a 16-bit type. kStored: the slice's; if that is a 16-bit one, the row's.
template <bool kNarrow, Dtype kStored>
__device__ __forceinline__ bool LoadSlice(const Block& block, const LoadArgs& args, Dtype dtype,
                                          bool has_arrived, float sum_scale) {
  if (kStored != Dtype::kFloat32) return ScanSlice<kStored>(block, args, has_arrived, sum_scale);
  if (kNarrow) {
    if (!has_arrived) return LoadNarrowSlice(block, args, dtype, sum_scale);
    if (dtype == Dtype::kFloat16) return WidenSlice<Dtype::kFloat16>(block, args, sum_scale);
    return WidenSlice<Dtype::kBfloat16>(block, args, sum_scale);
  }
  if (!has_arrived) return LoadSliceFromMemory(block, args, sum_scale);
  return LoadSlice<Dtype::kFloat32>(block, args, true, sum_scale);
}

// Scans of the groups as the slice now is. Whole block; the slice must be in place.
template <Dtype kStored>
static __device__ __noinline__ void RescanSlice(Block block, float sum_scale) {
  const int32_t passes = NumPasses(block);
  for (int32_t pass = 0; pass < passes; ++pass) {
    const int32_t group = GroupOfLane(pass);
    GroupScan scan = {NegativeInfinity(), 0.0f};
    if (group < block.num_local) {
      StoredFour<kStored> fours[kTokensPerLane / 4];
      ReadLane(block, group, fours);
      scan = ScanTokens(fours, MaxOrNanOf(fours), sum_scale);
    }
    KeepScan(block, group, scan, sum_scale);
  }
}

// Steps 1 and 2 for the tokens that have an entry; each token has at most one.
static __device__ __noinline__ void ApplyEdits(Block block, const DeviceRow& input, const Edit* edits,
                                               bool with_early_stops) {
  const RowConstants& c = input.constants;
  const uint32_t masking = kEditMasked | (with_early_stops ? kEditEarlyStop : 0);
  const int32_t first = block.first_group * kGroupSize;
  const int32_t end = first + block.num_local * kGroupSize;
  for (int32_t i = input.edit_begin + static_cast<int32_t>(threadIdx.x); i < input.edit_end; i += kThreads) {
    const Edit edit = edits[i];
    if (edit.token_id < first || edit.token_id >= end) continue;
    float x = block.slice[edit.token_id - first];
    if ((edit.flags & masking) != 0) x = NegativeInfinity();
    if ((edit.flags & kEditBias) != 0) x = ApplyBias(x, edit.bias);
    if ((edit.flags & kEditSeen) != 0) x = ApplyRepetition(x, c.repetition, c.repetition_inverse);
    if (edit.output_count > 0) x = ApplyFrequencyPresence(x, c.frequency, c.presence, edit.output_count);
    block.slice[edit.token_id - first] = x;
  }
}

}  // namespace twinjet::sampler::cuda
