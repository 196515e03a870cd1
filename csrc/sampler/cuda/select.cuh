// The thresholds of top-k and top-p over a row that lies in its blocks' slices; see search.h.
#pragma once

#include "sampler/cuda/mass.cuh"

namespace twinjet::sampler::cuda {

// Puts this block's tokens of the bracket into its list. A barrier follows inside, before and after.
// kMayGiveUp: looks no further once the list has overflowed, which is likely.
template <Dtype kStored, bool kMayGiveUp>
__device__ __forceinline__ void Collect(const Block& block, const Bracket& bracket) {
  ClearList(block);
  ListHeader& header = HeaderOf(block, block.cluster.rank);
  float* list = ListOf(block, block.cluster.rank);
  const auto* slice = FoursOf<kStored>(block);
  const float lo = FloatFromKey(bracket.lo);
  const float last = LastBelow(bracket.hi);
  const uint32_t capacity = static_cast<uint32_t>(block.list_capacity);
  const int32_t passes = NumPasses(block);
  for (int32_t pass = 0; pass < passes; ++pass) {
    const int32_t group = GroupOfLane(pass);
    if (group >= block.num_local || !(block.group_max[group] >= lo)) continue;
    if (kMayGiveUp && *static_cast<volatile uint32_t*>(&header.count) > capacity) break;
    uint32_t found = 0;  // bit of each of the lane's 32 tokens
#pragma unroll
    for (int i = 0; i < kTokensPerLane / 4; ++i) {
      const float4 x = slice[FloatFourOfLane(group, i)].Widened();
      found |= (x.x >= lo && x.x <= last ? 1u : 0u) << (4 * i);
      found |= (x.y >= lo && x.y <= last ? 2u : 0u) << (4 * i);
      found |= (x.z >= lo && x.z <= last ? 4u : 0u) << (4 * i);
      found |= (x.w >= lo && x.w <= last ? 8u : 0u) << (4 * i);
    }
    if (found == 0) continue;
    uint32_t place = atomicAdd(&header.count, static_cast<uint32_t>(__popc(found)));
    while (found != 0 && place < capacity) {
      const int32_t bit = __ffs(static_cast<int>(found)) - 1;
      found &= found - 1;
      list[place++] = TokenOf<kStored>(block, 4 * FloatFourOfLane(group, bit / 4) + bit % 4);
    }
  }
  __syncthreads();
}

// The row's candidates as Gather leaves them in `gathered`.
struct Candidates {
  int32_t count;
  int32_t own_begin;  // this block's lie in [own_begin, own_end)
  int32_t own_end;
};

__device__ __forceinline__ double* GatheredWeights(const Block& block) {
  return reinterpret_cast<double*>(block.gathered);
}
__device__ __forceinline__ float* GatheredLogits(const Block& block) {
  return reinterpret_cast<float*>(GatheredWeights(block) + kMaxCandidates);
}

// Joins the exchanged lists, a warp to each, and works out the weights where they are wanted.
__device__ __forceinline__ Candidates Gather(const Block& block, float max, float scale, bool with_weights) {
  double* weight = GatheredWeights(block);
  float* logit = GatheredLogits(block);
  const uint32_t warp = threadIdx.x / 32;
  Candidates candidates = {0, 0, 0};
  for (uint32_t r = 0; r < block.cluster.size; ++r) {
    const int32_t number = static_cast<int32_t>(HeaderOf(block, r).count);
    const float* list = ListOf(block, r);
    if (r % kWarps == warp) {
      for (int32_t i = LaneInWarp(); i < number; i += 32) {
        const float x = list[i];
        logit[candidates.count + i] = x;
        if (with_weights) weight[candidates.count + i] = static_cast<double>(WeightOf(x, max, scale));
      }
    }
    if (r == block.cluster.rank) candidates.own_begin = candidates.count;
    candidates.count += number;
    if (r == block.cluster.rank) candidates.own_end = candidates.count;
  }
  __syncthreads();
  return candidates;
}

// Few enough for every block to settle all of them; otherwise each settles its own.
constexpr int32_t kMaxSettledByAll = 128;

// Sum over `lanes` neighbouring lanes, a power of two up to 8.
__device__ __forceinline__ uint64_t SumLanes(uint64_t value, int32_t lanes) {
#pragma unroll
  for (int offset = kLanesPerGroup / 2; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(~0u, value, offset);
    if (offset < lanes) value += other;
  }
  return value;
}

// The threshold among gathered candidates from floor_key up, all at once, one to eight lanes to a candidate.
// kTopP: target_or_p is p in fixed point and the total is the gathered weight; otherwise it is the target,
// and above what lies above the candidates. 0 where no candidate reaches the target.
enum class Settling { kCount, kMass, kTopP };
template <Settling kSettling>
__device__ __forceinline__ uint32_t Settle(Block& block, const Candidates& candidates, uint32_t floor_key,
                                           uint64_t above, uint64_t target_or_p, bool by_all) {
  const double* weight = GatheredWeights(block);
  const float* logit = GatheredLogits(block);
  const float floor = FloatFromKey(floor_key);
  const int32_t begin = by_all ? 0 : candidates.own_begin;
  const int32_t end = by_all ? candidates.count : candidates.own_end;
  const int32_t number = end - begin;
  const int32_t lanes = number <= kThreads / 8   ? 8
                        : number <= kThreads / 4 ? 4
                        : number <= kThreads / 2 ? 2
                                                 : 1;
  uint32_t best = 0;
#pragma unroll 1
  for (int32_t i = begin + static_cast<int32_t>(threadIdx.x) / lanes; __any_sync(~0u, i < end);
       i += kThreads / lanes) {
    const float x = i < end ? logit[i] : PositiveInfinity();
    double sum = 0.0, all = 0.0;  // at most kMaxCandidates * 2^44: exact
    uint32_t count = 0;
#pragma unroll 4
    for (int32_t j = static_cast<int32_t>(threadIdx.x) % lanes; j < candidates.count; j += lanes) {
      const float other = logit[j];
      if (kSettling == Settling::kCount) {
        count += other >= x ? 1 : 0;
        continue;
      }
      const double w = weight[j];
      if (other >= x) sum += w;
      if (kSettling == Settling::kTopP && other >= floor) all += w;
    }
    const uint64_t mass =
        above + SumLanes(kSettling == Settling::kCount ? count : static_cast<uint64_t>(sum), lanes);
    uint64_t target = target_or_p;
    if (kSettling == Settling::kTopP)
      target = TopPMass(target_or_p, SumLanes(static_cast<uint64_t>(all), lanes));
    if (i < end && x >= floor && mass >= target) {
      const uint32_t key = OrderedKey(x);
      best = key > best ? key : best;
    }
  }
  if (!by_all) {
    return AllMax(block, best);
  }
  best = __reduce_max_sync(~0u, best);
  __syncthreads();  // by_warp may be read still from the last call
  if (LaneInWarp() == 0) block.head->by_warp[threadIdx.x / 32][0] = best;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const uint32_t other = static_cast<uint32_t>(block.head->by_warp[w][0]);
    best = other > best ? other : best;
  }
  return best;
}

// The same candidates from tokens that SumAndKeep kept.
__device__ __forceinline__ void CollectKept(const Block& block, const float* kept, int32_t count,
                                            const Bracket& bracket) {
  ClearList(block);
  ListHeader& header = HeaderOf(block, block.cluster.rank);
  float* list = ListOf(block, block.cluster.rank);
  const float lo = FloatFromKey(bracket.lo), last = LastBelow(bracket.hi);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) {
    const float x = kept[i];
    if (!(x >= lo && x <= last)) continue;
    const uint32_t place = atomicAdd(&header.count, 1u);
    if (place < static_cast<uint32_t>(block.list_capacity)) list[place] = x;
  }
  __syncthreads();
}

// Tokens of this block that a search works on in place of the slice; they lie where Gather will write, which
// a search does last.
struct Kept {
  bool is_used;
  int32_t count;
};
__device__ __forceinline__ float* KeptLogits(const Block& block) {
  return reinterpret_cast<float*>(block.gathered);
}

// Narrows the bracket until few candidates are left, or one logit. *gathered: the candidates, if they are all
// tokens from the threshold up; none otherwise. with_weights, scale: for their weights; a search by mass
// needs them. Where lists are exchanged more than once in a row, an AllSum lies between.
template <Dtype kStored, bool kCount>
__device__ __forceinline__ uint32_t FindThreshold(Block& block, float max, float scale, Bracket bracket,
                                                  uint64_t target, bool try_at_once, const Kept& kept,
                                                  bool with_weights, Candidates* gathered) {
  *gathered = {0, 0, 0};
  for (int round = 0;; ++round) {
    if (bracket.hi - bracket.lo == 1) return bracket.lo;
    if (round > 0 || try_at_once) {
      if (kept.is_used) {
        CollectKept(block, KeptLogits(block), kept.count, bracket);
      } else {
        Collect<kStored, false>(block, bracket);
      }
      if (ExchangeLists(block).count <= kMaxCandidates) {
        const Candidates candidates = Gather(block, max, scale, with_weights);
        if (bracket.above == 0) *gathered = candidates;
        // Otherwise an exchange follows, which a search by mass after this one needs before its lists.
        const bool by_all = bracket.above == 0 ? candidates.count <= kMaxSettledByAll
                                               : !kCount && candidates.count <= kMaxSettledByAll / 2;
        return Settle<kCount ? Settling::kCount : Settling::kMass>(block, candidates, bracket.lo,
                                                                   bracket.above, target, by_all);
      }
    }
    const Pivots pivots = NextPivots(bracket, target, round);
    uint64_t sums[kNumPivots + 1] = {};
    if (kept.is_used) {
      SumKeptAtPivots(KeptLogits(block), kept.count, max, scale, bracket, pivots, sums);
    } else {
      SumAtPivots<kStored, kCount>(block, max, scale, FloatFromKey(bracket.lo), bracket.hi, pivots, sums);
    }
    AllSum(block, sums);
    bracket = Shrink(bracket, pivots, sums, target);
  }
}

// The bin in which the bins' mass exceeds `amount`, by each warp for itself. mass: of bins 2 * lane and
// 2 * lane + 1.
__device__ __forceinline__ BinPlace FindBin(const uint64_t (&&mass)[2], uint64_t amount) {
  static_assert(kNumBins == 64);
  const uint64_t both = mass[0] + mass[1];
  uint64_t upto = both;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, upto, offset);
    if (LaneInWarp() >= offset) upto += other;
  }
  BinPlace place;
  place.total = __shfl_sync(~0u, upto, 31);
  const uint32_t above = __ballot_sync(~0u, upto > amount);
  const int32_t lane = above == 0 ? 31 : __ffs(static_cast<int>(above)) - 1;
  const uint64_t before = upto - both;
  const int second = before + mass[0] > amount ? 0 : 1;
  place.bin = __shfl_sync(~0u, 2 * LaneInWarp() + second, lane);
  place.before = __shfl_sync(~0u, second == 0 ? before : before + mass[0], lane);
  place.mass = __shfl_sync(~0u, second == 0 ? mass[0] : mass[1], lane);
  return place;
}

// A search by mass over many tokens: a sample says about where the threshold lies, one pass keeps the tokens
// around it, the kept ones are weighed in bins, and the search goes on in one bin. bracket.lo may be a bound
// without its mass.
template <Dtype kStored>
__device__ __forceinline__ uint32_t FindDeepThreshold(Block& block, float max, float scale, Bracket bracket,
                                                      uint64_t whole, uint64_t target) {
  const int32_t lane = LaneInWarp();
  Kept kept = {false, 0};
  Bracket window = bracket;
  BinGrid grid = GridOf(bracket);
  if (grid.is_fit) {
    const uint64_t dropped = (whole - target) / kSampleStep;
    const Bins bins = ClearBins(block);
    CountSample<kStored>(block, grid, bracket.hi, bins);
    const uint64_t* counts = SumBins(block, bins, 0).bins;
    const BinPlace place = FindBin({MassOfSampledBin(grid, 2 * lane, counts[2 * lane], max, scale),
                                    MassOfSampledBin(grid, 2 * lane + 1, counts[2 * lane + 1], max, scale)},
                                   dropped);
    if (place.total > dropped) {
      const Bracket sampled = BracketOfBin({bracket.lo, bracket.hi, 0, 0}, grid, place);
      window = WindowOfSample(sampled, place.total - dropped, dropped, max, scale, bracket);
    }
  }
  if (window.lo != bracket.lo || window.hi != bracket.hi) {
    ListHeader& header = HeaderOf(block, block.cluster.rank);
    ClearList(block);
    const uint64_t mass = SumAndKeep<kStored>(block, max, scale, FloatFromKey(window.lo), window.hi,
                                              KeptLogits(block), &header.count);
    __syncthreads();
    kept.count = static_cast<int32_t>(header.count);
    grid = GridOf(window);
    const bool has_room = kept.count <= kMaxKept && grid.is_fit;
    const Bins bins = ClearBins(block);
    if (has_room) WeighKept(KeptLogits(block), kept.count, max, scale, grid, bins);
    const BinTotals sums = SumBins(block, bins, kLowBits, mass, threadIdx.x == 0 && !has_room ? 1 : 0);
    const uint64_t reached = sums.one_more;
    const BinPlace place = FindBin({sums.bins[2 * lane], sums.bins[2 * lane + 1]}, reached - target);
    if (target > reached) {
      bracket.hi = window.lo;
      bracket.above = reached;
    } else if (sums.and_another != 0) {
      bracket.lo = window.lo;
      bracket.reached = reached;
    } else if (target <= reached - place.total) {
      bracket.lo = window.hi;
      bracket.reached = reached - place.total;
    } else {
      bracket = BracketOfBin({window.lo, window.hi, reached - place.total, reached}, grid, place);
      kept.is_used = true;
    }
  }
  Candidates unused;
  return FindThreshold<kStored, false>(block, max, scale, bracket, target, kept.is_used, kept, true, &unused);
}

// How many groups have a token, and the least of their maxima. All lanes of the calling warp.
struct LeastMaximum {
  int32_t num_groups;
  float value;
};
__device__ __forceinline__ LeastMaximum FindLeastMaximum(const Block& block) {
  const auto* maxima = reinterpret_cast<const float4*>(MaximaSlot(block, block.num_maxima & 1, 0));
  const int32_t fours = static_cast<int32_t>(block.cluster.size) * block.maxima_stride / 4;
  float least = PositiveInfinity();
  int32_t found = 0;
  for (int32_t i = LaneInWarp(); i < fours; i += 32) {
    const float4 four = maxima[i];
    const float x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const bool has_token = x[q] > NegativeInfinity();
      least = fminf(least, has_token ? x[q] : PositiveInfinity());
      found += has_token ? 1 : 0;
    }
  }
  return {__reduce_add_sync(~0u, found), FloatFromKey(__reduce_min_sync(~0u, OrderedKey(least)))};
}

// A key that the k-th largest group maximum reaches, k at most least.num_groups: so do k tokens. The warps
// share the marks.
__device__ __forceinline__ uint32_t BoundOfMaxima(const Block& block, float max, const LeastMaximum& least,
                                                  int32_t k) {
  static_assert(kNumMarks == 8);
  constexpr int kMarksPerWarp = kNumMarks / kWarps;
  const auto* maxima = reinterpret_cast<const float4*>(MaximaSlot(block, block.num_maxima & 1, 0));
  const int32_t fours = static_cast<int32_t>(block.cluster.size) * block.maxima_stride / 4;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int set = 0;
  return BoundFromBelow(least.value, max, k, [&](float lo, float hi, int32_t* counts) {
    float mark[kMarksPerWarp];
    int32_t count[kMarksPerWarp] = {};
#pragma unroll
    for (int m = 0; m < kMarksPerWarp; ++m) mark[m] = MarkOf(lo, hi, warp * kMarksPerWarp + m);
    for (int32_t i = LaneInWarp(); i < fours; i += 32) {
      const float4 four = maxima[i];
#pragma unroll
      for (int m = 0; m < kMarksPerWarp; ++m)
        count[m] += (four.x >= mark[m] ? 1 : 0) + (four.y >= mark[m] ? 1 : 0) + (four.z >= mark[m] ? 1 : 0) +
                    (four.w >= mark[m] ? 1 : 0);
    }
    auto* at_marks = block.head->at_marks[set];
    set ^= 1;  // the other set may still be read
#pragma unroll
    for (int m = 0; m < kMarksPerWarp; ++m) {
      const int32_t all = __reduce_add_sync(~0u, count[m]);
      if (LaneInWarp() == 0) at_marks[warp * kMarksPerWarp + m] = all;
    }
    __syncthreads();
    const int4 low = reinterpret_cast<const int4*>(at_marks)[0],
               high = reinterpret_cast<const int4*>(at_marks)[1];
    counts[0] = low.x, counts[1] = low.y, counts[2] = low.z, counts[3] = low.w;
    counts[4] = high.x, counts[5] = high.y, counts[6] = high.z, counts[7] = high.w;
  });
}

// The k-th largest logit, 1 <= k < vocab_size. scale, with_weights, gathered: see FindThreshold.
template <Dtype kStored>
__device__ __forceinline__ uint32_t TopKThreshold(Block& block, float max, float scale, int32_t k,
                                                  int32_t vocab_size, bool with_weights,
                                                  Candidates* gathered) {
  const uint64_t target = static_cast<uint64_t>(k);
  Bracket bracket = {kKeyOfNegativeInfinity, OrderedKey(max) + 1, 0, static_cast<uint64_t>(vocab_size)};
  const LeastMaximum least = FindLeastMaximum(block);
  const bool is_bounded = k <= least.num_groups;
  if (is_bounded) {
    bracket.lo = BoundOfMaxima(block, max, least, k);
  } else {
    // All group maxima are above; the distance from the smallest to the largest is a scale to step down by.
    const float length = SubRn(max, least.value);
    const Pivots pivots =
        length > 0.0f && IsFinite(length) ? CountPivots(bracket, least.value, length) : KeyPivots(bracket);
    uint64_t sums[kNumPivots + 1] = {};
    SumAtPivots<kStored, true>(block, max, 0.0f, NegativeInfinity(), bracket.hi, pivots, sums);
    AllSum(block, sums);
    bracket = Shrink(bracket, pivots, sums, target);
  }
  return FindThreshold<kStored, true>(block, max, scale, bracket, target, is_bounded && k <= kMaxCandidates,
                                      {false, 0}, with_weights, gathered);
}

// Step 9 over the tokens from floor_key up. gathered: not empty where it holds all of them already.
template <Dtype kStored>
__device__ __forceinline__ uint32_t TopPThreshold(Block& block, float max, float scale, uint32_t floor_key,
                                                  uint64_t top_p_fixed, int32_t vocab_size,
                                                  const Candidates& gathered) {
  const uint32_t top = OrderedKey(max) + 1;
  if (top - floor_key == 1) return floor_key;
  if (gathered.count != 0) {
    return Settle<Settling::kTopP>(block, gathered, floor_key, 0, top_p_fixed,
                                   gathered.count <= kMaxSettledByAll);
  }
  // The whole mass and the tokens from a pivot up, in one exchange.
  const uint32_t wanted = FirstMassPivot(max, scale);
  const uint32_t pivot = wanted > floor_key && wanted < top ? wanted : floor_key + 1;
  SumGroups<kStored>(block, max, scale, FloatFromKey(floor_key));
  Collect<kStored, true>(block, {pivot, top, 0, 0});
  if (threadIdx.x < 32) {
    uint64_t mass = 0;
    for (int32_t i = LaneInWarp(); i < block.num_local; i += 32) mass += block.group_mass[i];
    mass = SumWarp(mass);
    if (threadIdx.x == 0) HeaderOf(block, block.cluster.rank).mass = mass;
  }
  __syncthreads();
  const bool is_listed = ExchangeLists(block).count <= kMaxCandidates;
  uint64_t whole = 0;
  for (uint32_t r = 0; r < block.cluster.size; ++r) whole += HeaderOf(block, r).mass;
  const uint64_t target = TopPMass(top_p_fixed, whole);
  Bracket bracket = {floor_key, top, 0, whole};
  if (is_listed) {
    const Candidates candidates = Gather(block, max, scale, true);
    const bool by_all = candidates.count <= kMaxSettledByAll;
    const uint32_t settled = Settle<Settling::kMass>(block, candidates, pivot, 0, target, by_all);
    if (settled != 0) return settled;
    // The threshold lies below the pivot.
    const double* weight = GatheredWeights(block);
    double above = 0.0;
    for (int32_t i = LaneInWarp(); i < candidates.count; i += 32) above += weight[i];
    bracket.hi = pivot;
    bracket.above = SumWarp(static_cast<uint64_t>(above));
  }
  const uint32_t least = LeastMassKey(max, scale, whole, target, vocab_size);
  // `reached` stays what it is: the little mass that lies below the least key only tilts a guess.
  if (least > bracket.lo && least < bracket.hi) bracket.lo = least;
  return FindDeepThreshold<kStored>(block, max, scale, bracket, whole, target);
}

}  // namespace twinjet::sampler::cuda
