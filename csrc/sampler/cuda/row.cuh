// One row, from logits to thresholds and token, by the blocks of its cluster.
#pragma once

#include "sampler/cuda/load.cuh"
#include "sampler/cuda/select.cuh"

namespace twinjet::sampler::cuda {

// What all blocks of a row know once it is loaded.
struct RowState {
  float max;  // after step 3: 0 on rows with +inf, -inf on rows without a token
  uint32_t status;
  int32_t num_groups;  // see Maxima
  float least;
};

// cluster: of one block where the slice is not on chip.
__device__ __forceinline__ Block MakeBlock(char* shared, const SampleArgs& args, const Cluster& cluster,
                                           bool on_chip) {
  Block block = {};
  block.cluster = cluster;
  const SharedLayout layout = LayOutShared(args.groups_per_block, static_cast<int32_t>(block.cluster.size),
                                           on_chip, args.keeps_narrow ? 2 : sizeof(float));
  block.head = reinterpret_cast<SharedHead*>(shared);
  block.maxima = reinterpret_cast<float*>(shared + layout.maxima);
  block.flags = reinterpret_cast<uint32_t*>(shared + layout.flags);
  block.mail = reinterpret_cast<uint64_t*>(shared + layout.mail);
  block.runners = reinterpret_cast<uint64_t*>(shared + layout.runners);
  block.lists = shared + layout.lists;
  block.gathered = shared + layout.gathered;
  block.group_mass = reinterpret_cast<uint64_t*>(shared + layout.group_mass);
  block.group_sum = reinterpret_cast<float*>(shared + layout.group_mass);
  block.listed_groups = reinterpret_cast<uint16_t*>(block.group_sum + args.groups_per_block);
  block.slice = reinterpret_cast<float*>(shared + layout.slice);
  const int32_t num_groups = NumGroups(args.vocab_size);
  block.first_group = static_cast<int32_t>(block.cluster.rank) * args.groups_per_block;
  const int32_t left = num_groups - block.first_group;
  block.num_local = left < 0 ? 0 : left < args.groups_per_block ? left : args.groups_per_block;
  block.groups_per_block = args.groups_per_block;
  block.maxima_stride = layout.maxima_stride;
  block.list_capacity = layout.list_capacity;
#if __CUDA_ARCH__ >= 900
  block.copies = on_chip;
#endif
  block.num_maxima = ~0u;  // the first turn goes to 0
  return block;
}

// Sets up barriers and padding and, where the block copies, the first row's copies. Afterwards the other
// blocks of the cluster may be sent to. delay: cycles before the copies.
__device__ __forceinline__ void StartBlock(const Block& block, const SampleArgs& args, int32_t row,
                                           int32_t delay = 0) {
  SharedHead& head = *block.head;
  if (threadIdx.x == kCopyThread) {
    InitBarrier(&head.copy_arrival);
    InitBarrier(&head.list_arrival);
    for (int set = 0; set < 2; ++set) {
      InitBarrier(&head.maxima_arrival[set]);
      InitBarrier(&head.mail_arrival[set]);
      InitBarrier(&head.runner_arrival[set]);
    }
    head.claimed = 0;
    FenceBarrierInit();
  }
  ClusterArriveRelaxed(block.cluster);  // a release after the copies would wait for them
  if (threadIdx.x == kCopyThread && block.copies) {
    if (delay > 0) WaitCycles(delay);
    StartRow(block, args, row);
  }
  if (threadIdx.x < kNumBins) MaximaBins(block)[threadIdx.x] = 0;
  // Groups that this block does not have stay at -inf for good.
  for (uint32_t set = 0; set < 2; ++set) {
    float* own = MaximaSlot(block, set, block.cluster.rank);
    for (int32_t i = block.num_local + static_cast<int32_t>(threadIdx.x); i < block.maxima_stride;
         i += kThreads)
      own[i] = NegativeInfinity();
  }
  ClusterWait(block.cluster);
  if (block.cluster.size == 1) __syncthreads();
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
  if (edited && input.allowed_at >= 0)
    load.allowed = args.allowed + static_cast<int64_t>(input.allowed_at) * 4;
  load.aligned = IsAligned(args, row);
  return load;
}

// Steps 1 to 3. edited: with masks and edits; otherwise the logits as they are. sum_scale: see GroupScan.
// between: what can be done while the first maxima are under way; called once. kWithLeast: see Maxima.
template <bool kNarrow, Dtype kStored, bool kWithLeast, class Between>
__device__ __forceinline__ RowState PrepareSlice(Block& block, const SampleArgs& args, const DeviceRow& input,
                                                 int32_t row, bool edited, float sum_scale, Between between) {
  const LoadArgs load = LoadArgsOf(args, input, row, edited);
  const bool has_edits = kStored == Dtype::kFloat32 && edited && input.edit_begin < input.edit_end;
  Maxima maxima = {};
#pragma unroll 1
  for (int attempt = 0; attempt < 2; ++attempt) {
    TurnMaxima(block);
    const bool has_nan = LoadSlice<kNarrow, kStored>(block, load, args.dtype,
                                                     attempt == 0 && IsCopied(block, args, row), sum_scale);
    if (has_edits) {
      __syncthreads();
      ApplyEdits(block, input, args.edits, attempt == 0 && input.has_early_stops != 0);
      __syncthreads();
      RescanSlice<kStored>(block, sum_scale);
    }
    const bool own_flag = PostMaxima(block, has_nan);
    if (attempt == 0) between();
    maxima = WaitMaxima<kWithLeast>(block, own_flag);
    // Early stops are masked only while they leave a token.
    if (!(maxima.max == NegativeInfinity() && has_edits && input.has_early_stops != 0)) break;
  }
  RowState state = {maxima.max, maxima.flag ? kStatusNan : kStatusOk, maxima.num_groups, maxima.least};
  if (state.max == PositiveInfinity()) {
    // Every +inf weighs the same, the rest nothing.
    __syncthreads();
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < block.num_local * kGroupSize; i += kThreads) {
      SetToken<kStored>(block, i,
                        TokenOf<kStored>(block, i) == PositiveInfinity() ? 0.0f : NegativeInfinity());
    }
    __syncthreads();
    TurnMaxima(block);
    RescanSlice<kStored>(block, sum_scale);
    maxima = WaitMaxima<kWithLeast>(block, PostMaxima(block, false));
    state = {maxima.max, state.status, maxima.num_groups, maxima.least};
    state.status |= kStatusInfinite;
  }
  if (state.max == NegativeInfinity()) state.status |= kStatusNoToken;
  return state;
}

// The scale of a row's GroupScans; 0 where others than the logits' own bounds decide which groups matter.
template <Family kFamily>
__device__ __forceinline__ float SumScale(const RowConstants& constants) {
  if (kFamily == Family::kGreedy || constants.is_greedy != 0 || constants.top_k > 0 ||
      constants.min_z > NegativeInfinity())
    return 0.0f;
  return constants.scale;
}

// Steps 7 to 9: kept are the logits at least as large. has_sums: the groups were scanned with sums.
template <Family kFamily, Dtype kStored>
__device__ __forceinline__ Threshold KeepThreshold(Block& block, const RowConstants& constants,
                                                   const RowState& state, int32_t vocab_size, bool has_sums) {
  const float max = state.max;
  Threshold threshold = {kKeyOfNegativeInfinity, false};
  if (constants.min_z > NegativeInfinity()) threshold.key = MinPKey(max, constants.scale, constants.min_z);
  if (kFamily == Family::kOpen || (constants.top_k == 0 && constants.has_top_p == 0)) return threshold;
  const int32_t k = constants.top_k > 0 ? constants.top_k : NumListed(state.num_groups);
  uint32_t bound = 0;
  if (k > 0 && k <= state.num_groups) bound = BoundOfMaxima(block, max, state.least, k);
  Candidates gathered = {0, 0, 0};
  if (constants.top_k > 0) {
    const uint32_t kth = TopKThreshold<kStored>(block, max, constants.scale, k, vocab_size, state.least,
                                                bound, constants.has_top_p != 0, &gathered);
    threshold = {kth > threshold.key ? kth : threshold.key, gathered.count != 0};
    bound = 0;
  }
  if (constants.has_top_p != 0) {
    threshold = TopPThreshold<kStored>(block, max, constants.scale, threshold.key, constants.top_p_fixed,
                                       vocab_size, bound, has_sums, gathered);
  }
  return threshold;
}

// The exponential variate of the group that this thread enters into the race first.
__device__ __forceinline__ double GroupExponential(const Block& block, const RowConstants& constants) {
  if (constants.is_greedy != 0 || static_cast<int32_t>(threadIdx.x) >= block.num_local) return 0.0;
  return ExponentialOf(constants.race,
                       (static_cast<uint32_t>(block.first_group) + threadIdx.x) | kGroupLevel);
}

// A row whose groups have raced in every block, but not yet against the other blocks'.
struct RaceUnderWay {
  int32_t row = -1;  // none
  const RowConstants* constants;
  float max;
  float threshold;
  // Of the block's best group, tokens threadIdx.x, threadIdx.x + kThreads and so on.
  float logits[kGroupSize / kThreads];
};

// The variate of group i of the block, one of those that this thread enters into the race.
__device__ __forceinline__ double ExponentialOfGroup(const Block& block, const RaceUnderWay& race, int32_t i,
                                                     double own_exponential) {
  if (i < kThreads) return own_exponential;
  return ExponentialOf(race.constants->race, static_cast<uint32_t>(block.first_group + i) | kGroupLevel);
}

// The earliest group of those that this thread enters. mass_of(i): of group i of the block.
template <class MassOf>
__device__ __forceinline__ Runner EarliestOfThread(const Block& block, const RaceUnderWay& race,
                                                   double own_exponential, MassOf mass_of) {
  Runner runner = {kNeverArrives, 0};
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < block.num_local; i += kThreads) {
    const uint64_t mass = mass_of(i);
    if (mass == 0) continue;
    const double exponential = ExponentialOfGroup(block, race, i, own_exponential);
    runner = Earlier(runner,
                     {DoubleBits(RaceTime(exponential, mass)), static_cast<uint32_t>(block.first_group + i)});
  }
  return runner;
}

template <Dtype kStored>
__device__ __forceinline__ Runner EarliestByMass(const Block& block, const RaceUnderWay& race,
                                                 double own_exponential) {
  SumGroups<kStored>(block, race.max, race.constants->scale, race.threshold);
  __syncthreads();
  return EarliestOfThread(block, race, own_exponential, [&](int32_t i) { return block.group_mass[i]; });
}

// The same where this block's list holds all its kept tokens.
__device__ __forceinline__ Runner EarliestByList(const Block& block, const RaceUnderWay& race,
                                                 double own_exponential) {
  const ListHeader& header = HeaderOf(block, block.cluster.rank);
  const float* list = ListOf(block, block.cluster.rank);
  const auto number = static_cast<int32_t>(header.count);
  return EarliestOfThread(block, race, own_exponential, [&](int32_t i) {
    uint64_t mass = 0;
#pragma unroll 4
    for (int32_t j = 0; j < number; ++j) {
      const float x = list[j];
      if (block.listed_groups[j] == i && x >= race.threshold)
        mass += WeightOf(x, race.max, race.constants->scale);
    }
    return mass;
  });
}

// The earliest group of those that this warp's threads enter, in all of them. A scan's sum says before which
// time a group cannot arrive; in the order of these times groups are weighed, until no other can win.
template <Dtype kStored>
__device__ __forceinline__ Runner EarliestByBound(const Block& block, const RaceUnderWay& race,
                                                  double own_exponential) {
  const auto* slice = FoursOf<kStored>(block);
  const float max = race.max, scale = race.constants->scale;
  Runner best = {kNeverArrives, 0};
#pragma unroll 1
  for (int32_t first = static_cast<int32_t>(threadIdx.x) - LaneInWarp(); first < block.num_local;
       first += kThreads) {
    const int32_t i = first + LaneInWarp();
    double exponential = 0.0;
    float bound = PositiveInfinity();
    if (i < block.num_local && block.group_max[i] >= race.threshold) {
      exponential = ExponentialOfGroup(block, race, i, own_exponential);
      bound = LeastTime(exponential, ApproximateMass(block, i, max, scale));
    }
    while (true) {
      const uint32_t least = __reduce_min_sync(~0u, FloatBits(bound));
      if (least == FloatBits(PositiveInfinity()) ||
          (best.time != kNeverArrives &&
           static_cast<double>(FloatFromBits(least)) > DoubleFromBits(best.time)))
        break;
      const int32_t lane = __ffs(static_cast<int>(__ballot_sync(~0u, FloatBits(bound) == least))) - 1;
      const auto* begin = slice + (first + lane) * (kGroupSize / 4) + LaneInWarp();
      const uint64_t mass =
          SumWarp(MassOfLane<true, kGroupSize / 128, 32>(begin, max, scale, race.threshold));
      const double its_exponential = __shfl_sync(~0u, exponential, lane);
      if (mass != 0)
        best = Earlier(best, {DoubleBits(RaceTime(its_exponential, mass)),
                              static_cast<uint32_t>(block.first_group + first + lane)});
      if (LaneInWarp() == lane) bound = PositiveInfinity();
    }
  }
  return best;
}

// Step 10's first race: sends the block's best group and fetches that group's logits. The slice is free after
// the next barrier. own_exponential: GroupExponential of this thread.
template <Dtype kStored>
__device__ __forceinline__ void RaceGroups(Block& block, RaceUnderWay& race, double own_exponential,
                                           bool is_listed, bool has_sums) {
  const Runner of_thread = is_listed  ? EarliestByList(block, race, own_exponential)
                           : has_sums ? EarliestByBound<kStored>(block, race, own_exponential)
                                      : EarliestByMass<kStored>(block, race, own_exponential);
  const Runner runner = EarliestInBlock(block, of_thread);
  PostRunner(block, runner);
  if (runner.time == kNeverArrives) return;
  const int32_t begin = (static_cast<int32_t>(runner.index) - block.first_group) * kGroupSize;
#pragma unroll
  for (int i = 0; i < kGroupSize / kThreads; ++i)
    race.logits[i] = TokenOf<kStored>(block, begin + static_cast<int32_t>(threadIdx.x) + i * kThreads);
}

// Step 10's second race: the block whose group won draws among its tokens.
__device__ __forceinline__ void FinishRace(Block& block, const SampleArgs& args, const RaceUnderWay& race) {
  if (race.row < 0) return;
  const Runner winner = WaitRunner(block);
  const int32_t group = static_cast<int32_t>(winner.index) - block.first_group;
  if (group < 0 || group >= block.num_local) return;
  Runner runner = {kNeverArrives, 0};
#pragma unroll
  for (int i = 0; i < kGroupSize / kThreads; ++i) {
    const float x = race.logits[i];
    const uint64_t weight = x >= race.threshold ? WeightOf(x, race.max, race.constants->scale) : 0;
    if (weight == 0) continue;
    const uint32_t token =
        static_cast<uint32_t>(winner.index) * kGroupSize + threadIdx.x + static_cast<uint32_t>(i) * kThreads;
    const double time = RaceTime(ExponentialOf(race.constants->race, token | kTokenLevel), weight);
    runner = Earlier(runner, {DoubleBits(time), token});
  }
  runner = EarliestInBlock(block, runner);
  if (threadIdx.x == 0) args.token_ids[race.row] = static_cast<int32_t>(runner.index);
}

// The lowest token of the maximum, to token_ids, by the block that has it.
template <Dtype kStored>
__device__ __forceinline__ void WriteFirstMaximum(Block& block, const SampleArgs& args, int32_t row,
                                                  float max) {
  const int32_t group = FirstGroupOf(block, max) - block.first_group;
  if (group < 0 || group >= block.num_local) return;
  if (threadIdx.x >= 32) return;
  uint32_t first = ~0u;
  for (int32_t i = LaneInWarp(); i < kGroupSize; i += 32) {
    if (TokenOf<kStored>(block, group * kGroupSize + i) == max && static_cast<uint32_t>(i) < first)
      first = static_cast<uint32_t>(i);
  }
  first = __reduce_min_sync(~0u, first);
  if (threadIdx.x == 0) {
    args.token_ids[row] = (block.first_group + group) * kGroupSize + static_cast<int32_t>(first);
  }
}

}  // namespace twinjet::sampler::cuda
