// The loop over rows of a sampling kernel.
#pragma once

#include "sampler/cuda/row.cuh"

namespace twinjet::sampler::cuda {

template <Dtype kStored>
__device__ __forceinline__ void WriteProcessed(const Block& block, const SampleArgs& args, int32_t row) {
  float* out = args.processed_logits + static_cast<int64_t>(row) * args.vocab_size;
  const int32_t first = block.first_group * kGroupSize;
  const int32_t left = args.vocab_size - first;
  const int32_t size = left < block.num_local * kGroupSize ? left : block.num_local * kGroupSize;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < size; i += kThreads)
    out[first + i] = TokenOf<kStored>(block, i);
}

// Draws rows; the blocks of a cluster, number `cluster` of num_clusters, call this together. The race among
// the tokens of one row is run while the next row's maxima are exchanged.
template <Family kFamily, bool kNarrow, Dtype kStored>
__device__ __forceinline__ void SampleRows(Block& block, const SampleArgs& args, int32_t cluster,
                                           int32_t num_clusters) {
  const bool claims = block.copies && args.num_claims != nullptr;
  const bool copies = block.copies && threadIdx.x == kCopyThread;
  // Blocks of a multiprocessor that start together stay together: they copy at the same time and compute at
  // the same time. The clusters of a wave have a place on each multiprocessor.
  const int32_t wave = cluster * args.num_waves / num_clusters;
  StartBlock(block, args, cluster, wave * args.cycles_per_wave);
  int32_t row = cluster, next = cluster + num_clusters;
  if (copies && claims && block.cluster.rank == 0) ClaimRow(block, args, num_clusters);
  if (copies && !claims) PrefetchRow(block, args, next);
  RaceUnderWay race;
  while (row < args.num_rows) {
    const DeviceRow& input = WaitRow(block, args, row);
    const RowConstants& constants = input.constants;
    double own_exponential = 0.0;
    const float sum_scale = SumScale<kFamily>(constants);
    const RowState state = PrepareSlice<kNarrow, kStored, kFamily == Family::kAny>(
        block, args, input, row, true, sum_scale, [&] {
          if (kFamily == Family::kGreedy) return;
          own_exponential = GroupExponential(block, constants);
          FinishRace(block, args, race);
        });
    if (claims) {
      next = ClaimedRow(block);
      if (copies) PrefetchRow(block, args, next);
    }
    race.row = -1;
    if (args.processed_logits != nullptr) WriteProcessed<kStored>(block, args, row);
    float threshold = NegativeInfinity();
    if ((state.status & kStatusNoToken) == 0) {
      if (kFamily == Family::kGreedy || constants.is_greedy != 0) {
        WriteFirstMaximum<kStored>(block, args, row, state.max);
        if (constants.scale != 0.0f) threshold = state.max;  // top_k = 1
      } else {
        const bool has_sums = sum_scale != 0.0f;
        const Threshold kept =
            KeepThreshold<kFamily, kStored>(block, constants, state, args.vocab_size, has_sums);
        threshold = FloatFromKey(kept.key);
        race.row = row;
        race.constants = &constants;
        race.max = state.max;
        race.threshold = threshold;
        RaceGroups<kStored>(block, race, own_exponential, kFamily == Family::kAny && kept.is_listed,
                            has_sums);
      }
    }
    if (block.cluster.rank == 0 && threadIdx.x == 0) {
      if ((state.status & kStatusNoToken) != 0) args.token_ids[row] = -1;
      args.status[row] = state.status;
      if (args.info != nullptr) args.info[row].threshold = threshold;
    }
    if (kFamily == Family::kAny && threadIdx.x < kNumBins) MaximaBins(block)[threadIdx.x] = 0;
    if (block.copies) FenceForCopies();
    __syncthreads();  // the slice is free
    row = next;
    next += num_clusters;
    if (copies) {
      StartRow(block, args, row);
      if (!claims) {
        PrefetchRow(block, args, next);
      } else if (row < args.num_rows && block.cluster.rank == 0) {
        ClaimRow(block, args, num_clusters);
      }
    }
  }
  if (kFamily != Family::kGreedy) FinishRace(block, args, race);
}

}  // namespace twinjet::sampler::cuda
