// One row, from logits to thresholds and token, by the blocks of its cluster.
#pragma once

#include "sampler/cuda/load.cuh"
#include "sampler/cuda/select.cuh"

namespace twinjet::sampler::cuda {

// What all blocks of a row know once it is loaded.
struct RowState {
  float max;  // after step 3: 0 on rows with +inf, -inf on rows without a token
  uint32_t status;
  int32_t first_max_group;  // lowest group that holds the maximum
};

__device__ __forceinline__ Block MakeBlock(char* shared, const SampleArgs& args, bool on_chip) {
  Block block;
  block.cluster = ThisCluster();
  block.num_groups = NumGroups(args.vocab_size);
  block.groups_per_block = args.groups_per_block;
  const SharedLayout layout = LayOutShared(args.groups_per_block, block.num_groups, on_chip);
  block.head = reinterpret_cast<SharedHead*>(shared);
  block.group_mass = reinterpret_cast<uint64_t*>(shared + layout.group_mass);
  block.gathered = shared + layout.gathered;
  block.group_max = reinterpret_cast<float*>(shared + layout.group_max);
  block.slice = reinterpret_cast<float*>(shared + layout.slice);
  block.first_group = static_cast<int32_t>(block.cluster.rank) * args.groups_per_block;
  const int32_t left = block.num_groups - block.first_group;
  block.num_local = left < 0 ? 0 : left < args.groups_per_block ? left : args.groups_per_block;
  block.exchange = 0;
  block.listing = 0;
  block.is_arriving = false;
  return block;
}

// Before anything else is read: sets the block's copies going. A barrier of the block follows inside.
__device__ __forceinline__ void StartRow(Block& block, const SampleArgs& args, int32_t row) {
  const int64_t bytes = args.dtype == Dtype::kFloat32 ? 4 : 2;
  const auto address =
      reinterpret_cast<uintptr_t>(args.logits) + static_cast<uintptr_t>(row * args.row_stride * bytes);
  const bool aligned = (address & 15) == 0;
#if __CUDA_ARCH__ >= 900
  block.is_arriving = aligned && args.dtype == Dtype::kFloat32;
#endif
  if (threadIdx.x == 0) {
    InitBarrier(&block.head->arrival);
    InitBarrier(&block.head->mail_arrival[0]);
    InitBarrier(&block.head->mail_arrival[1]);
    FenceBarrierInit();
    StartCopies(block, args, row, aligned);
  }
  ClusterArriveRelaxed(block.cluster);
  __syncthreads();
}

__device__ __forceinline__ LoadArgs LoadArgsOf(const SampleArgs& args, const DeviceRow& input, int32_t row,
                                               bool edited) {
  const int64_t bytes = args.dtype == Dtype::kFloat32 ? 4 : 2;
  LoadArgs load;
  load.row = static_cast<const char*>(args.logits) + row * args.row_stride * bytes;
  load.vocab_size = args.vocab_size;
  load.mask = nullptr;
  load.allowed = nullptr;
  if (edited && input.bitmask_row >= 0) load.mask = args.bitmask + input.bitmask_row * args.bitmask_stride;
  if (edited && input.allowed_row >= 0) {
    load.allowed = args.allowed + static_cast<int64_t>(input.allowed_row) * ((args.vocab_size + 31) / 32);
  }
  load.aligned = (reinterpret_cast<uintptr_t>(load.row) & 15) == 0;
  return load;
}

// Exchanges maximum and NaN flags. Word 0: key of the maximum, then the lowest group that has it.
__device__ __forceinline__ RowState ExchangeMaxima(Block& block, bool has_nan) {
  uint64_t values[2] = {0, has_nan ? 1u : 0u};
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < block.num_local; i += kThreads) {
    const uint64_t key = OrderedKey(block.group_max[i]);
    const uint64_t place = 0xffffffffu - static_cast<uint32_t>(block.first_group + i);
    values[0] = MaxOf()(values[0], key << 32 | place);
  }
  AllReduce(block, values, MaxOf());
  RowState state;
  state.max = FloatFromKey(static_cast<uint32_t>(values[0] >> 32));
  state.first_max_group = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(values[0]));
  state.status = values[1] != 0 ? kStatusNan : kStatusOk;
  return state;
}

// Steps 1 to 3. The caller has arrived at the cluster's barrier once; this waits for it.
// edited: with masks and edits; otherwise the logits as they are.
__device__ __forceinline__ RowState PrepareSlice(Block& block, const SampleArgs& args, const DeviceRow& input,
                                                 int32_t row, bool edited) {
  const LoadArgs load = LoadArgsOf(args, input, row, edited);
  const bool has_edits = edited && input.edit_begin < input.edit_end;
  RowState state = {};
  for (int attempt = 0; attempt < 2; ++attempt) {
    const bool was_arriving = block.is_arriving;
    const bool has_nan = LoadSlice(block, load, args.dtype);
    if (has_edits) {
      __syncthreads();
      ApplyEdits(block, input, args.edits, attempt == 0);
      __syncthreads();
      RefreshGroupMaxima(block);
    }
    __syncthreads();
    if (was_arriving && threadIdx.x == 0) InvalidateBarrier(&block.head->arrival);
    if (attempt == 0) ClusterWait(block.cluster);  // all blocks of the cluster run
    state = ExchangeMaxima(block, has_nan);
    // Early stops are masked only while they leave a token.
    if (!(state.max == NegativeInfinity() && has_edits && input.has_early_stops != 0)) break;
  }
  if (state.max == PositiveInfinity()) {
    // Every +inf weighs the same, the rest nothing.
    __syncthreads();
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < block.num_local * kGroupSize; i += kThreads) {
      block.slice[i] = block.slice[i] == PositiveInfinity() ? 0.0f : NegativeInfinity();
    }
    __syncthreads();
    RefreshGroupMaxima(block);
    ClusterSync(block.cluster);  // maxima may be read by other blocks next
    state.max = 0.0f;
    state.status |= kStatusInfinite;
  }
  if (state.max == NegativeInfinity()) state.status |= kStatusNoToken;
  return state;
}

// Steps 7 to 9: kept are the logits at least this large.
__device__ __forceinline__ float KeepThreshold(Block& block, const RowConstants& constants, float max,
                                               int32_t vocab_size) {
  uint32_t key = kKeyOfNegativeInfinity;
  int32_t num_gathered = 0;
  if (constants.min_z > NegativeInfinity()) key = MinPKey(max, constants.scale, constants.min_z);
  if (constants.top_k > 0) {
    const uint32_t kth =
        TopKThreshold(block, max, constants.scale, constants.top_k, vocab_size, &num_gathered);
    key = kth > key ? kth : key;
  }
  if (constants.has_top_p != 0) {
    key = TopPThreshold(block, max, constants.scale, key, constants.top_p_fixed, vocab_size, num_gathered);
  }
  return FloatFromKey(key);
}

// The exponential variate of the group that this thread enters into the race first.
__device__ __forceinline__ double GroupExponential(const Block& block, const RowConstants& constants) {
  if (constants.is_greedy != 0 || static_cast<int32_t>(threadIdx.x) >= block.num_local) return 0.0;
  return ExponentialOf(constants.race,
                       (static_cast<uint32_t>(block.first_group) + threadIdx.x) | kGroupLevel);
}

// Step 10. Returns the token in thread 0 of the block that owns the winning group, -1 elsewhere.
// own_exponential: GroupExponential of this thread, computed while the logits were on their way.
__device__ __forceinline__ int32_t DrawToken(Block& block, const RowConstants& constants, float max,
                                             float threshold, double own_exponential) {
  SumGroups<false>(block, max, constants.scale, threshold, 0.0f);
  __syncthreads();
  Runner runner = {kNeverArrives, 0};
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < block.num_local; i += kThreads) {
    const uint64_t mass = block.group_mass[i];
    if (mass == 0) continue;
    const uint32_t group = static_cast<uint32_t>(block.first_group + i);
    const double exponential =
        i < kThreads ? own_exponential : ExponentialOf(constants.race, group | kGroupLevel);
    runner = Earlier(runner, {DoubleBits(RaceTime(exponential, mass)), group});
  }
  const Runner winner = EarliestInRow(block, runner);
  const int32_t group = static_cast<int32_t>(winner.index) - block.first_group;
  if (group < 0 || group >= block.num_local) return -1;
  runner = {kNeverArrives, 0};
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kGroupSize; i += kThreads) {
    const float x = block.slice[group * kGroupSize + i];
    const uint64_t weight = x >= threshold ? WeightOf(x, max, constants.scale) : 0;
    if (weight == 0) continue;
    const uint32_t token = static_cast<uint32_t>(winner.index) * kGroupSize + static_cast<uint32_t>(i);
    const double time = RaceTime(ExponentialOf(constants.race, token | kTokenLevel), weight);
    runner = Earlier(runner, {DoubleBits(time), token});
  }
  return static_cast<int32_t>(EarliestInBlock(block, runner).index);
}

// The lowest token of the maximum, in thread 0 of its block; -1 elsewhere.
__device__ __forceinline__ int32_t FirstMaximum(Block& block, const RowState& state) {
  const int32_t group = state.first_max_group - block.first_group;
  if (group < 0 || group >= block.num_local) return -1;
  Runner runner = {kNeverArrives, 0};
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kGroupSize; i += kThreads) {
    if (block.slice[group * kGroupSize + i] != state.max) continue;
    runner = Earlier(runner, {0, static_cast<uint64_t>(state.first_max_group * kGroupSize + i)});
  }
  return static_cast<int32_t>(EarliestInBlock(block, runner).index);
}

}  // namespace twinjet::sampler::cuda
