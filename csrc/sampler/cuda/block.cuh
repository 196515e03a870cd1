// A block's view of its row and the exchanges between the row's blocks.
//
// Whatever is posted is waited for by every block of the row. A block posts exchange n + 2 of a kind only
// after it has waited for n + 1, and posts n + 1 only after it has read n: two sets are enough.
#pragma once

#include "sampler/cuda/cluster.cuh"
#include "sampler/cuda/plan.h"

namespace twinjet::sampler::cuda {

// Where a block stands. All members are the same in all of its threads.
struct Block {
  Cluster cluster;
  SharedHead* head;
  float* maxima;  // see SharedLayout for this and the next five
  uint32_t* flags;
  uint64_t* mail;
  uint64_t* runners;
  char* lists;
  char* gathered;
  uint64_t* group_mass;     // [groups_per_block]
  float* group_sum;         // [groups_per_block], in group_mass's place: see GroupScan
  uint16_t* listed_groups;  // [list_capacity], in its place too: of the tokens in this block's own list
  float* group_max;         // [groups_per_block], this block's slot of the current maxima
  float* slice;             // [num_local * kGroupSize], filled up with -inf
  int32_t first_group;      // of the row
  int32_t num_local;        // groups of this block; may be 0
  int32_t groups_per_block;
  int32_t maxima_stride;
  int32_t list_capacity;
  bool copies;  // rows and their parameters come by bulk copies
  // Numbers of exchanges so far, by kind.
  uint32_t num_copies;
  uint32_t num_maxima;
  uint32_t num_mail;
  uint32_t num_runners;
  uint32_t num_lists;
};

// The group a lane works on in pass `pass`, within the block; lane_in_group in 0 .. 7.
__device__ __forceinline__ int32_t GroupOfLane(int32_t pass) {
  return pass * kGroupsPerPass + static_cast<int32_t>(threadIdx.x) / kLanesPerGroup;
}
__device__ __forceinline__ int32_t NumPasses(const Block& block) {
  return (block.num_local + kGroupsPerPass - 1) / kGroupsPerPass;
}
__device__ __forceinline__ int32_t LaneInGroup() {
  return static_cast<int32_t>(threadIdx.x) % kLanesPerGroup;
}
__device__ __forceinline__ int32_t LaneInWarp() { return static_cast<int32_t>(threadIdx.x) % 32; }

// Lane lane_in_group's float4 number i (0 .. 7) of a group in shared memory: eight lanes read 128
// consecutive bytes, which no two of them share a bank in.
__device__ __forceinline__ int32_t FloatFourOfLane(int32_t group, int32_t i) {
  return group * (kGroupSize / 4) + i * kLanesPerGroup + LaneInGroup();
}

struct SumOf {
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct MaxOf {
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

template <class Op>
__device__ __forceinline__ uint64_t ReduceWarp(uint64_t value, Op op) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = op(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

// The sum over this lane and those before it, of the first kLanes lanes.
template <int kLanes, class T>
__device__ __forceinline__ T SumUpToLane(T value) {
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    const T other = __shfl_up_sync(~0u, value, offset);
    if (LaneInWarp() >= offset) value += other;
  }
  return value;
}

// ---- Maxima: every block gets all groups' maxima ----

__device__ __forceinline__ float* MaximaSlot(const Block& block, uint32_t set, uint32_t rank) {
  return block.maxima + static_cast<int32_t>(set * block.cluster.size + rank) * block.maxima_stride;
}

// Turns to the next set, where the maxima of this block's groups are to be written.
__device__ __forceinline__ void TurnMaxima(Block& block) {
  block.group_max = MaximaSlot(block, ++block.num_maxima & 1, block.cluster.rank);
}

// Sends group_max and a flag, true where any thread's is, and in the flag's upper bits the row that the block
// of rank 0 has claimed. Returns the flag of this block.
__device__ __forceinline__ bool PostMaxima(Block& block, bool flag) {
  const bool any = __syncthreads_or(flag ? 1 : 0) != 0;  // group_max is complete
  const uint32_t size = block.cluster.size, rank = block.cluster.rank;
  if (size == 1) return any;
  const uint32_t set = block.num_maxima & 1;
  uint64_t* arrival = &block.head->maxima_arrival[set];
  const uint32_t fours = static_cast<uint32_t>(block.maxima_stride) / 4;
  if (threadIdx.x == 0) ExpectBytes(arrival, (size - 1) * (fours * 16 + 4));
  const auto* own = reinterpret_cast<const uint4*>(block.group_max);
  for (uint32_t i = threadIdx.x; i < fours * (size - 1); i += kThreads) {
    const uint32_t other = i / fours;
    const uint4* place = own + i % fours;
    SendRemote(place, *place, arrival, other + (other >= rank ? 1 : 0));
  }
  if (threadIdx.x < size && threadIdx.x != rank) {
    SendRemote(block.flags + set * size + rank, (any ? 1u : 0u) | block.head->claimed << 1, arrival,
               threadIdx.x);
  }
  return any;
}

// What all blocks of a row know of its maxima.
struct Maxima {
  float max;
  bool flag;  // of any block
  // With kWithLeast: how many groups have a token, and the least of their maxima.
  int32_t num_groups;
  float least;
};

// Waits for the posted maxima. own_flag: what PostMaxima returned.
template <bool kWithLeast>
__device__ __forceinline__ Maxima WaitMaxima(Block& block, bool own_flag) {
  const uint32_t size = block.cluster.size;
  const uint32_t set = block.num_maxima & 1;
  bool flag = own_flag;
  if (size > 1) {
    WaitPhase(&block.head->maxima_arrival[set], block.num_maxima >> 1 & 1);
    const uint32_t lane = static_cast<uint32_t>(LaneInWarp());
    if (lane < size && lane != block.cluster.rank) flag |= (block.flags[set * size + lane] & 1) != 0;
  }
  const auto* maxima = reinterpret_cast<const float4*>(MaximaSlot(block, set, 0));
  const int32_t fours = static_cast<int32_t>(size) * block.maxima_stride / 4;
  float max = NegativeInfinity(), least = PositiveInfinity();
  int32_t num_groups = 0;
#pragma unroll 4
  for (int32_t i = LaneInWarp(); i < fours; i += 32) {
    const float4 four = maxima[i];
    max = fmaxf(fmaxf(max, fmaxf(four.x, four.y)), fmaxf(four.z, four.w));
    if (!kWithLeast) continue;
    const float x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const bool has_token = x[q] > NegativeInfinity();
      least = has_token ? fminf(least, x[q]) : least;
      num_groups += has_token ? 1 : 0;
    }
  }
  Maxima result = {FloatFromKey(__reduce_max_sync(~0u, OrderedKey(max))), __any_sync(~0u, flag) != 0, 0,
                   0.0f};
  if (kWithLeast) {
    result.num_groups = __reduce_add_sync(~0u, num_groups);
    result.least = FloatFromKey(__reduce_min_sync(~0u, OrderedKey(least)));
  }
  return result;
}

// The row that the cluster has claimed, once the maxima of the row before are there.
__device__ __forceinline__ int32_t ClaimedRow(const Block& block) {
  const uint32_t claimed = block.cluster.rank == 0
                               ? block.head->claimed
                               : block.flags[(block.num_maxima & 1) * block.cluster.size] >> 1;
  return static_cast<int32_t>(claimed);
}

// The lowest group of the row whose maximum is max.
__device__ __forceinline__ int32_t FirstGroupOf(const Block& block, float max) {
  const float* maxima = MaximaSlot(block, block.num_maxima & 1, 0);
  const int32_t number = static_cast<int32_t>(block.cluster.size) * block.maxima_stride;
  uint32_t first = ~0u;
  for (int32_t i = LaneInWarp(); i < number; i += 32) {
    if (maxima[i] == max && static_cast<uint32_t>(i) < first) first = static_cast<uint32_t>(i);
  }
  const int32_t place = static_cast<int32_t>(__reduce_min_sync(~0u, first));
  return place / block.maxima_stride * block.groups_per_block + place % block.maxima_stride;
}

// ---- Mail: every block gets a combination of all threads' values ----
//
// A set holds MailWords(size) words of 8 bytes.

__device__ __forceinline__ uint64_t* MailSlot(const Block& block, uint32_t set) {
  return block.mail + (set & 1) * static_cast<uint32_t>(MailWords(static_cast<int32_t>(block.cluster.size)));
}

// Says how many bytes come with the next exchange of mail. In one thread.
__device__ __forceinline__ void ExpectMail(const Block& block, uint32_t bytes) {
  ExpectBytes(&block.head->mail_arrival[block.num_mail & 1], bytes);
}

// Sends a word of the next exchange, or two, to the place `to` in block `rank`.
template <class T>
__device__ __forceinline__ void SendMail(const Block& block, const T* to, const T& value, uint32_t rank) {
  SendRemote(to, value, &block.head->mail_arrival[block.num_mail & 1], rank);
}

// Waits for the exchange of mail under way and turns to the next. In clusters of several blocks.
__device__ __forceinline__ void WaitMail(Block& block) {
  WaitPhase(&block.head->mail_arrival[block.num_mail & 1], block.num_mail >> 1 & 1);
  ++block.num_mail;
}

template <int kCount, class Op>
__device__ __forceinline__ void AllReduce(Block& block, uint64_t (&values)[kCount], Op op) {
  SharedHead& head = *block.head;
  const uint32_t size = block.cluster.size;
  __syncthreads();  // by_warp may be read still from the last call
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint64_t value = ReduceWarp(values[i], op);
    if (LaneInWarp() == 0) head.by_warp[threadIdx.x / 32][i] = value;
  }
  __syncthreads();
  uint64_t* mail = MailSlot(block, block.num_mail);
  if (threadIdx.x == 0 && size > 1) ExpectMail(block, size * kCount * 8);
  for (uint32_t to = threadIdx.x; to < size * kCount; to += kThreads) {
    const uint32_t i = to % kCount;
    uint64_t value = head.by_warp[0][i];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) value = op(value, head.by_warp[w][i]);
    uint64_t* place = mail + block.cluster.rank * kReducedWords + i;
    if (size > 1) {
      SendMail(block, place, value, to / kCount);
    } else {
      *place = value;
    }
  }
  if (size > 1) {
    WaitMail(block);
  } else {
    __syncthreads();
  }
  if (kCount <= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = mail[i];
      for (uint32_t r = 1; r < size; ++r) values[i] = op(values[i], mail[r * kReducedWords + i]);
    }
    return;
  }
  if (threadIdx.x < kCount) {
    uint64_t value = mail[threadIdx.x];
    for (uint32_t r = 1; r < size; ++r) value = op(value, mail[r * kReducedWords + threadIdx.x]);
    head.totals[threadIdx.x] = value;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = head.totals[i];
}

template <int kCount>
__device__ __forceinline__ void AllSum(Block& block, uint64_t (&values)[kCount]) {
  AllReduce(block, values, SumOf());
}

// The largest value of all threads of all blocks.
__device__ __forceinline__ uint64_t AllMax(Block& block, uint64_t value) {
  uint64_t values[1] = {value};
  AllReduce(block, values, MaxOf());
  return values[0];
}

// Counts of a block's tokens in kNumBins bins, each as two words. They lie where lists lie while no list is
// wanted: the last lists must have been read, and the next may be sent only after SumBins.
struct Bins {
  uint32_t* low;
  uint32_t* high;
};

// Clears the bins. Barriers at the beginning and at the end.
__device__ __forceinline__ Bins ClearBins(const Block& block) {
  auto* words = reinterpret_cast<uint32_t*>(block.lists);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < 2 * kNumBins; i += kThreads) words[i] = 0;
  __syncthreads();
  return {words, words + kNumBins};
}

// Counts of BoundOfMaxima, where candidates will be gathered; 0 when a row starts.
__device__ __forceinline__ uint32_t* MaximaBins(const Block& block) {
  return reinterpret_cast<uint32_t*>(block.gathered);
}

struct BinTotals {
  const uint64_t* bins;  // kNumBins
  uint64_t one_more;
  uint64_t and_another;
  bool flag;  // of any block
};

// All blocks' bins together: high * 2^shift + low; and the sums of one_more and and_another over all threads.
// Each block adds up its share of the bins and sends the totals to all: two exchanges. flag: the same in all
// threads of a block; it travels as the top bit of and_another, whose total in a block must be below 2^63.
__device__ __forceinline__ BinTotals SumBins(Block& block, const Bins& bins, int shift, uint64_t one_more = 0,
                                             uint64_t and_another = 0, bool flag = false) {
  constexpr uint64_t kFlag = 1ull << 63;
  SharedHead& head = *block.head;
  const uint32_t size = block.cluster.size, rank = block.cluster.rank;
  one_more = ReduceWarp(one_more, SumOf());
  and_another = ReduceWarp(and_another, SumOf());
  if (flag && threadIdx.x == 0) and_another |= kFlag;
  if (LaneInWarp() == 0) {
    head.by_warp[threadIdx.x / 32][0] = one_more;
    head.by_warp[threadIdx.x / 32][1] = and_another;
  }
  __syncthreads();  // the bins are complete
  const uint32_t thread = threadIdx.x;
  const uint32_t share = kNumBins / size;
  uint64_t total = 0;
  if (thread < kNumBins) total = (static_cast<uint64_t>(bins.high[thread]) << shift) + bins.low[thread];
  if (size > 1) {
    const uint64_t* parts = MailSlot(block, block.num_mail);  // [size][share], of this block's share
    if (thread == 0) ExpectMail(block, kNumBins * 8);
    if (thread < kNumBins) SendMail(block, parts + rank * share + thread % share, total, thread / share);
    WaitMail(block);
    total = 0;
    if (thread < kNumBins) {
      for (uint32_t r = 0; r < size; ++r) total += parts[r * share + thread % share];
    }
  }
  uint64_t* totals = MailSlot(block, block.num_mail);  // bins, then two words of each block
  uint64_t* pairs = totals + kNumBins;
  if (thread == 0 && size > 1) ExpectMail(block, kNumBins * 8 + size * 16);
  if (thread < kNumBins) {
    // With one block the share is all bins.
    uint64_t* place = totals + rank * share + thread % share;
    if (size > 1) {
      SendMail(block, place, total, thread / share);
    } else {
      *place = total;
    }
  } else if (thread < kNumBins + size) {
    uint64_t pair[2] = {0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      pair[0] += head.by_warp[w][0];
      pair[1] += head.by_warp[w][1];
    }
    if (size > 1) {
      const uint4 words = {static_cast<uint32_t>(pair[0]), static_cast<uint32_t>(pair[0] >> 32),
                           static_cast<uint32_t>(pair[1]), static_cast<uint32_t>(pair[1] >> 32)};
      SendMail(block, reinterpret_cast<uint4*>(pairs + 2 * rank), words, thread - kNumBins);
    } else {
      pairs[0] = pair[0];
      pairs[1] = pair[1];
    }
  }
  if (size > 1) WaitMail(block);
  __syncthreads();  // lists may be written
  BinTotals result = {totals, 0, 0, false};
  for (uint32_t r = 0; r < size; ++r) {
    result.one_more += pairs[2 * r];
    result.and_another += pairs[2 * r + 1] & ~kFlag;
    result.flag |= (pairs[2 * r + 1] & kFlag) != 0;
  }
  return result;
}

// ---- Races ----

// A runner of a race: time as the bits of a positive double, which order as the times do.
struct Runner {
  uint64_t time;
  uint64_t index;
};
constexpr uint64_t kNeverArrives = ~0ull;

__device__ __forceinline__ Runner Earlier(const Runner& a, const Runner& b) {
  return b.time < a.time || (b.time == a.time && b.index < a.index) ? b : a;
}

// The warp's earliest runner, word by word.
__device__ __forceinline__ Runner EarliestInWarp(const Runner& runner) {
  const uint32_t high = static_cast<uint32_t>(runner.time >> 32);
  const uint32_t low = static_cast<uint32_t>(runner.time);
  const uint32_t best_high = __reduce_min_sync(~0u, high);
  const uint32_t best_low = __reduce_min_sync(~0u, high == best_high ? low : ~0u);
  const bool is_best = high == best_high && low == best_low;
  const uint32_t index = __reduce_min_sync(~0u, is_best ? static_cast<uint32_t>(runner.index) : ~0u);
  return {static_cast<uint64_t>(best_high) << 32 | best_low, index};
}

// The block's earliest runner, in all threads.
__device__ __forceinline__ Runner EarliestInBlock(Block& block, Runner runner) {
  SharedHead& head = *block.head;
  __syncthreads();  // by_warp is read by all threads below, and may be still from the last call
  runner = EarliestInWarp(runner);
  if (LaneInWarp() == 0) {
    head.by_warp[threadIdx.x / 32][0] = runner.time;
    head.by_warp[threadIdx.x / 32][1] = runner.index;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) runner = Earlier(runner, {head.by_warp[w][0], head.by_warp[w][1]});
  return runner;
}

// Sends the block's earliest runner, the same in all threads.
__device__ __forceinline__ void PostRunner(Block& block, const Runner& runner) {
  const uint32_t size = block.cluster.size;
  const uint32_t set = block.num_runners & 1;
  uint64_t* place = block.runners + (set * size + block.cluster.rank) * 2;
  if (size == 1) {
    if (threadIdx.x == 0) {
      place[0] = runner.time;
      place[1] = runner.index;
    }
    return;  // the barrier before the next row starts makes it seen
  }
  uint64_t* arrival = &block.head->runner_arrival[set];
  if (threadIdx.x == 0) ExpectBytes(arrival, size * 16);
  if (threadIdx.x < size) {
    const uint4 words = {static_cast<uint32_t>(runner.time), static_cast<uint32_t>(runner.time >> 32),
                         static_cast<uint32_t>(runner.index), static_cast<uint32_t>(runner.index >> 32)};
    SendRemote(reinterpret_cast<const uint4*>(place), words, arrival, threadIdx.x);
  }
}

// The row's earliest runner, in all threads of all blocks.
__device__ __forceinline__ Runner WaitRunner(Block& block) {
  const uint32_t size = block.cluster.size;
  const uint32_t set = block.num_runners & 1;
  if (size > 1) WaitPhase(&block.head->runner_arrival[set], block.num_runners >> 1 & 1);
  ++block.num_runners;
  const uint32_t lane = threadIdx.x % 32;
  Runner runner = {kNeverArrives, 0};
  if (lane < size) {
    const uint64_t* mail = block.runners + (set * size + lane) * 2;
    runner = {mail[0], mail[1]};
  }
  return EarliestInWarp(runner);
}

// ---- Lists: every block gets the candidates that each block has listed ----

__device__ __forceinline__ ListHeader& HeaderOf(const Block& block, uint32_t rank) {
  const size_t bytes = sizeof(ListHeader) + static_cast<size_t>(block.list_capacity) * sizeof(float);
  return *reinterpret_cast<ListHeader*>(block.lists + rank * bytes);
}
__device__ __forceinline__ float* ListOf(const Block& block, uint32_t rank) {
  return reinterpret_cast<float*>(&HeaderOf(block, rank) + 1);
}

// Begins this block's list. A barrier follows inside. The other blocks must have read the last one: there is
// one set only.
__device__ __forceinline__ void ClearList(const Block& block) {
  if (threadIdx.x == 0) HeaderOf(block, block.cluster.rank) = {};
  __syncthreads();
}

struct ListTotals {
  uint32_t count;  // of the row; above kMaxCandidates: the lists are of no use
  uint64_t mass;
  uint32_t of_lane;  // count of the block whose rank is the lane
};

// Sends this block's list, which must be complete and seen by all threads, and waits for the others'.
__device__ __forceinline__ ListTotals ExchangeLists(Block& block) {
  const uint32_t size = block.cluster.size, rank = block.cluster.rank;
  if (size > 1) {
    uint64_t* arrival = &block.head->list_arrival;
    const uint32_t fours =
        static_cast<uint32_t>(sizeof(ListHeader) + static_cast<size_t>(block.list_capacity) * 4) / 16;
    if (threadIdx.x == 0) ExpectBytes(arrival, (size - 1) * fours * 16);
    const auto* own = reinterpret_cast<const uint4*>(&HeaderOf(block, rank));
    for (uint32_t i = threadIdx.x; i < fours * (size - 1); i += kThreads) {
      const uint32_t other = i / fours;
      const uint4* place = own + i % fours;
      SendRemote(place, *place, arrival, other + (other >= rank ? 1 : 0));
    }
    WaitPhase(arrival, block.num_lists & 1);
    ++block.num_lists;
  }
  const uint32_t lane = static_cast<uint32_t>(LaneInWarp());
  ListTotals totals = {0, 0, 0};
  if (lane < size) {
    totals.of_lane = HeaderOf(block, lane).count;
    totals.mass = HeaderOf(block, lane).mass;
  }
  totals.count = __reduce_add_sync(~0u, totals.of_lane);
  totals.mass = ReduceWarp(totals.mass, SumOf());
  if (__any_sync(~0u, totals.of_lane > static_cast<uint32_t>(block.list_capacity)))
    totals.count = kMaxCandidates + 1u;
  return totals;
}

}  // namespace twinjet::sampler::cuda
