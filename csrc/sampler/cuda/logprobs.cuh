// Logprobs of drawn rows by the blocks of a cluster: the row is read once more, after the draw.
#pragma once

#include "sampler/cuda/row.cuh"

namespace twinjet::sampler::cuda {

constexpr uint64_t kNoEntry = 0;

// Larger first by logit, then by lower id. Entries of real tokens are not kNoEntry.
__device__ __forceinline__ uint64_t EntryOf(float x, int32_t token) {
  return static_cast<uint64_t>(OrderedKey(x)) << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}

// The largest entry of a group below `bound`, in all lanes of the calling warp.
__device__ __forceinline__ uint64_t BestOfGroup(const Block& block, int32_t vocab_size, int32_t group,
                                                uint64_t bound) {
  uint64_t best = kNoEntry;
  for (int32_t i = static_cast<int32_t>(threadIdx.x) % 32; i < kGroupSize; i += 32) {
    const int32_t token = (block.first_group + group) * kGroupSize + i;
    if (token >= vocab_size) break;
    const uint64_t entry = EntryOf(block.slice[group * kGroupSize + i], token);
    if (entry < bound && entry > best) best = entry;
  }
  return ReduceWarp(best, MaxOf());
}

// The block's num_top largest entries in order, to `list`. Takes group_mass as scratch.
__device__ __forceinline__ void ListTop(Block& block, int32_t vocab_size, int32_t num_top, uint64_t* list) {
  uint64_t* best = block.group_mass;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  __syncthreads();
  for (int32_t g = static_cast<int32_t>(threadIdx.x) / 32; g < block.num_local; g += kWarps) {
    const uint64_t entry = BestOfGroup(block, vocab_size, g, ~0ull);
    if (lane == 0) best[g] = entry;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  for (int32_t n = 0; n < num_top; ++n) {
    uint64_t entry = kNoEntry;
    for (int32_t g = lane; g < block.num_local; g += 32) entry = MaxOf()(entry, best[g]);
    entry = ReduceWarp(entry, MaxOf());
    __syncwarp();  // all lanes have read best before one of them is changed
    if (lane == 0) list[n] = entry;
    if (entry == kNoEntry) continue;
    const int32_t token = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(entry));
    const int32_t group = token / kGroupSize - block.first_group;
    const uint64_t next = BestOfGroup(block, vocab_size, group, entry);
    if (lane == 0) best[group] = next;
    __syncwarp();
  }
}

// How many entries of block r's ordered list are above `entry`.
__device__ __forceinline__ int32_t CountAbove(const Block& block, const uint64_t* list, uint32_t r,
                                              int32_t num_top, uint64_t entry) {
  int32_t lo = 0, hi = num_top;  // list[lo - 1] > entry >= list[hi]
  while (lo < hi) {
    const int32_t middle = (lo + hi) / 2;
    if (LoadRemote(&list[middle], r, block.cluster) > entry) {
      lo = middle + 1;
    } else {
      hi = middle;
    }
  }
  return lo;
}

struct Distribution {
  float max;
  float temperature;
  float threshold;
  double ln_mass;
};

__device__ __forceinline__ float LogProbOf(const Distribution& d, float x) {
  if (!(x >= d.threshold) || x == NegativeInfinity()) return NegativeInfinity();
  return LogProb(x, d.max, d.temperature, d.ln_mass);
}

__device__ __forceinline__ void LogprobsOfRow(Block& block, const LogprobsArgs& args, int32_t row) {
  const SampleArgs& sample = args.sample;
  const DeviceRow& input = WaitRow(block, sample, row);
  const int32_t token = sample.token_ids[row];
  const bool processed = args.processed != 0;
  const RowState state =
      sample.dtype == Dtype::kFloat32
          ? PrepareSlice<false, Dtype::kFloat32, false>(block, sample, input, row, processed, 0.0f, [] {})
          : PrepareSlice<true, Dtype::kFloat32, false>(block, sample, input, row, processed, 0.0f, [] {});
  const int64_t base = static_cast<int64_t>(row) * (1 + args.num_top);
  if (token < 0) {
    if (block.cluster.rank != 0) return;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i <= args.num_top; i += kThreads) {
      args.top_ids[base + i] = -1;
      args.top_logprobs[base + i] = NegativeInfinity();
    }
    if (threadIdx.x == 0) args.ranks[row] = 0;
    return;
  }

  const float unit = static_cast<float>(kLog2E);
  Distribution distribution = {state.max, 1.0f, NegativeInfinity(), 0.0};
  float scale = unit;
  if (processed) {
    distribution.temperature = input.constants.temperature;
    distribution.threshold = sample.info[row].threshold;
    if (input.constants.scale != 0.0f) scale = input.constants.scale;
  }
  SumGroups<Dtype::kFloat32>(block, state.max, scale, distribution.threshold);
  __syncthreads();
  uint64_t sums[2] = {0, 0};  // mass; key of the drawn token's logit
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < block.num_local; i += kThreads) {
    sums[0] += block.group_mass[i];
  }
  const int32_t place = token - block.first_group * kGroupSize;
  if (threadIdx.x == 0 && place >= 0 && place < block.num_local * kGroupSize)
    sums[1] = OrderedKey(block.slice[place]);
  AllSum(block, sums);
  distribution.ln_mass = LnMass(sums[0]);
  const float drawn = FloatFromKey(static_cast<uint32_t>(sums[1]));
  uint64_t rank[1] = {CountAtLeast<Dtype::kFloat32>(block, drawn)};
  AllSum(block, rank);
  // Slices are filled up with -inf, which must not count.
  if (drawn == NegativeInfinity()) rank[0] = static_cast<uint64_t>(sample.vocab_size);
  if (block.cluster.rank == 0 && threadIdx.x == 0) {
    args.top_ids[base] = token;
    args.top_logprobs[base] = LogProbOf(distribution, drawn);
    args.ranks[row] = static_cast<int32_t>(rank[0]);
  }
  if (args.num_top == 0) return;

  auto* list = reinterpret_cast<uint64_t*>(block.gathered);
  ListTop(block, sample.vocab_size, args.num_top, list);
  ClusterSync(block.cluster);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < args.num_top; i += kThreads) {
    const uint64_t entry = list[i];
    if (entry != kNoEntry) {
      int32_t above = i;
      for (uint32_t r = 0; r < block.cluster.size; ++r) {
        if (r != block.cluster.rank) above += CountAbove(block, list, r, args.num_top, entry);
      }
      if (above < args.num_top) {
        args.top_ids[base + 1 + above] = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(entry));
        args.top_logprobs[base + 1 + above] =
            LogProbOf(distribution, FloatFromKey(static_cast<uint32_t>(entry >> 32)));
      }
    }
    if (block.cluster.rank == 0 && i >= sample.vocab_size) {
      args.top_ids[base + 1 + i] = -1;
      args.top_logprobs[base + 1 + i] = NegativeInfinity();
    }
  }
  ClusterSync(block.cluster);  // no block may end while another reads its list
}

__device__ __forceinline__ void LogprobsOfRows(Block& block, const LogprobsArgs& args, int32_t first,
                                               int32_t stride) {
  StartBlock(block, args.sample, first);
  for (int32_t row = first; row < args.sample.num_rows; row += stride) {
    LogprobsOfRow(block, args, row);
    if (block.copies) FenceForCopies();
    __syncthreads();  // the slice is free
    const int32_t next = row + stride;
    if (block.copies && threadIdx.x == kCopyThread) {
      StartRow(block, args.sample, next);
      PrefetchRow(block, args.sample, next + stride);
    }
  }
}

}  // namespace twinjet::sampler::cuda
