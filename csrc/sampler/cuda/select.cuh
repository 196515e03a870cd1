// The thresholds of top-k and top-p over a row that lies in its blocks' slices; see search.h.
#pragma once

#include "sampler/cuda/settle.cuh"

namespace twinjet::sampler::cuda {

// Puts this block's tokens of the bracket into its list, and looks no further once that has overflowed. A
// barrier follows inside, before and after. A warp goes from one group that reaches the bracket to the next:
// as a rule they are few, and few of their tokens do.
template <Dtype kStored>
__device__ __forceinline__ void Collect(const Block& block, const Bracket& bracket) {
  ClearList(block);
  ListHeader& header = HeaderOf(block, block.cluster.rank);
  float* list = ListOf(block, block.cluster.rank);
  const auto* slice = FoursOf<kStored>(block);
  const float lo = FloatFromKey(bracket.lo);
  const float last = LastBelow(bracket.hi);
  const uint32_t capacity = static_cast<uint32_t>(block.list_capacity);
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32;
#pragma unroll 1
  for (int32_t first = warp; first < block.num_local; first += 32 * kWarps) {
    const int32_t own = first + LaneInWarp() * kWarps;
    uint32_t groups = __ballot_sync(~0u, own < block.num_local && block.group_max[own] >= lo);
#pragma unroll 1
    for (; groups != 0; groups &= groups - 1) {
      const int32_t group = first + (__ffs(static_cast<int>(groups)) - 1) * kWarps;
      if (*static_cast<volatile uint32_t*>(&header.count) > capacity) break;
      uint32_t found = 0;  // bit of each of the lane's tokens
#pragma unroll
      for (int i = 0; i < kGroupSize / 128; ++i) {
        const float4 x = slice[group * (kGroupSize / 4) + i * 32 + LaneInWarp()].Widened();
        if (!(fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)) >= lo)) continue;
        found |= (x.x >= lo && x.x <= last ? 1u : 0u) << (4 * i);
        found |= (x.y >= lo && x.y <= last ? 2u : 0u) << (4 * i);
        found |= (x.z >= lo && x.z <= last ? 4u : 0u) << (4 * i);
        found |= (x.w >= lo && x.w <= last ? 8u : 0u) << (4 * i);
      }
      if (found == 0) continue;
      uint32_t place = atomicAdd(&header.count, static_cast<uint32_t>(__popc(found)));
      for (; found != 0 && place < capacity; found &= found - 1, ++place) {
        const int32_t bit = __ffs(static_cast<int>(found)) - 1;
        list[place] =
            TokenOf<kStored>(block, group * kGroupSize + (bit / 4 * 32 + LaneInWarp()) * 4 + bit % 4);
        block.listed_groups[place] = static_cast<uint16_t>(group);
      }
    }
  }
  __syncthreads();
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
        Collect<kStored>(block, bracket);
      }
      const ListTotals totals = ExchangeLists(block);
      if (totals.count <= kMaxCandidates) {
        const Candidates candidates = Gather(block, totals, max, scale, with_weights);
        if (bracket.above == 0) *gathered = candidates;
        // Otherwise an exchange follows, which a search by mass after this one needs before its lists.
        const bool by_all = bracket.above == 0 ? candidates.count <= kMaxSettledByAll
                                               : !kCount && candidates.count <= kMaxSettledByAll / 2;
        return Settle<kCount ? Settling::kCount : Settling::kMass>(block, candidates, bracket.lo,
                                                                   bracket.above, target, target, by_all)
            .key;
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
  const uint64_t upto = SumUpToLane<32>(both);
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

// A search by mass over many tokens: a sample says about where the threshold lies, one pass weighs the row
// and keeps the tokens around it, the kept ones are weighed in bins, and the search goes on in one bin. Where
// they are too many, or do not hold it, the next sample is of less. bracket.lo may be a bound without its
// mass; bracket.reached is not used.
template <Dtype kStored>
__device__ __forceinline__ uint32_t FindDeepThreshold(Block& block, float max, float scale, Bracket bracket,
                                                      MassBounds bounds, uint64_t top_p_fixed) {
  const int32_t lane = LaneInWarp();
  Kept kept = {false, 0};
  uint64_t target = TopPMass(top_p_fixed, bounds.least);
  uint64_t dropped = bounds.least - target;  // from bracket.lo to the threshold, about
#pragma unroll 1
  for (int round = 0; round < kMaxSamples; ++round) {
    Bracket window = bracket;
    BinGrid grid = GridOf(bracket);
    if (grid.is_fit) {
      const Bins bins = ClearBins(block);
      CountSample<kStored>(block, grid, bracket.hi, bins);
      const uint64_t* counts = SumBins(block, bins, 0).bins;
      const uint64_t sampled_dropped = dropped / kSampleStep;
      const BinPlace place = FindBin({MassOfSampledBin(grid, 2 * lane, counts[2 * lane], max, scale),
                                      MassOfSampledBin(grid, 2 * lane + 1, counts[2 * lane + 1], max, scale)},
                                     sampled_dropped);
      if (place.total > sampled_dropped) {
        const Bracket sampled = BracketOfBin({bracket.lo, bracket.hi, 0, 0}, grid, place);
        window = WindowOfSample(sampled, place.total - sampled_dropped, sampled_dropped, max, scale, bracket);
      }
    } else {
      __syncthreads();  // the lists' headers have been read
    }
    ListHeader& header = HeaderOf(block, block.cluster.rank);
    ClearList(block);
    const bool is_exact = bounds.least == bounds.most;
    const PartedMass mass = SumAndKeep<kStored>(block, max, scale, FloatFromKey(window.lo), window.hi,
                                                !is_exact, KeptLogits(block), &header.count);
    __syncthreads();
    kept.count = static_cast<int32_t>(header.count);
    grid = GridOf(window);
    const bool has_room = kept.count <= kMaxKept && grid.is_fit;
    const Bins bins = ClearBins(block);
    if (has_room) WeighKept(KeptLogits(block), kept.count, max, scale, grid, bins);
    const BinTotals sums = SumBins(block, bins, kLowBits, mass.from, mass.below, !has_room);
    const uint64_t reached = sums.one_more;
    if (!is_exact) {
      bounds.least = bounds.most = reached + sums.and_another;
      target = TopPMass(top_p_fixed, bounds.least);
    }
    // The little mass that lies below a bound only tilts a guess.
    if (round == 0) bracket.reached = bounds.least;
    const BinPlace place = FindBin({sums.bins[2 * lane], sums.bins[2 * lane + 1]}, reached - target);
    if (target > reached) {
      bracket.hi = window.lo;
      bracket.above = reached;
    } else if (sums.flag) {
      bracket.reached = reached;
      if (round > 0 && window.lo == bracket.lo) break;
      bracket.lo = window.lo;
    } else if (target <= reached - place.total) {
      bracket.lo = window.hi;
      bracket.reached = reached - place.total;
    } else {
      bracket = BracketOfBin({window.lo, window.hi, reached - place.total, reached}, grid, place);
      kept.is_used = true;
      break;
    }
    dropped = bracket.reached - target;
  }
  Candidates unused;
  return FindThreshold<kStored, false>(block, max, scale, bracket, target, kept.is_used, kept, true, &unused);
}

// A key that the k-th largest group maximum reaches, k at most the number of groups with a token: so do k
// tokens. least: of their maxima. Barriers inside.
__device__ __forceinline__ uint32_t BoundOfMaxima(const Block& block, float max, float least, int32_t k) {
  static_assert(kNumBins == 64);
  const auto* maxima = reinterpret_cast<const float4*>(MaximaSlot(block, block.num_maxima & 1, 0));
  const int32_t fours = static_cast<int32_t>(block.cluster.size) * block.maxima_stride / 4;
  uint32_t* bins = MaximaBins(block);
  const int32_t lane = LaneInWarp();
  Stretch stretch = {least, max};
#pragma unroll 1
  for (int round = 0; round < kMaxStretches; ++round) {
    const BinGrid grid = GridBetween(stretch.lo, stretch.hi);
    if (!grid.is_fit) break;
    if (round > 0) {
      __syncthreads();
      if (threadIdx.x < kNumBins) bins[threadIdx.x] = 0;
      __syncthreads();
    }
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < fours; i += kThreads) {
      const float4 four = maxima[i];
      const float x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if (x[q] >= stretch.lo) atomicAdd(&bins[BinAbove(grid, x[q])], 1u);
      }
    }
    __syncthreads();
    // Lane l has bins 63 - 2 l and 62 - 2 l.
    const uint2 pair = reinterpret_cast<const uint2*>(bins)[31 - lane];
    const int32_t both = static_cast<int32_t>(pair.x + pair.y);
    const int32_t upto = SumUpToLane<32>(both);
    const int32_t upper = upto - static_cast<int32_t>(pair.x);
    const int32_t where = __ffs(static_cast<int>(__ballot_sync(~0u, upto >= k))) - 1;
    const CountedBin found = {__shfl_sync(~0u, upper >= k ? 63 - 2 * lane : 62 - 2 * lane, where),
                              __shfl_sync(~0u, upper >= k ? upper : upto, where)};
    stretch = NarrowTo(stretch, grid, found.bin);
    if (IsCloseCount(found.count, k)) break;
  }
  return OrderedKey(stretch.lo);
}

// The k-th largest logit, 1 <= k < vocab_size. least: of the groups' maxima. bound: BoundOfMaxima, 0 where
// there are fewer maxima than k. scale, with_weights, gathered: see FindThreshold.
template <Dtype kStored>
__device__ __forceinline__ uint32_t TopKThreshold(Block& block, float max, float scale, int32_t k,
                                                  int32_t vocab_size, float least, uint32_t bound,
                                                  bool with_weights, Candidates* gathered) {
  const uint64_t target = static_cast<uint64_t>(k);
  Bracket bracket = {kKeyOfNegativeInfinity, OrderedKey(max) + 1, 0, static_cast<uint64_t>(vocab_size)};
  const bool is_bounded = bound != 0;
  if (is_bounded) {
    bracket.lo = bound;
  } else {
    // All group maxima are above; the distance from the smallest to the largest is a scale to step down by.
    const float length = SubRn(max, least);
    const Pivots pivots =
        length > 0.0f && IsFinite(length) ? CountPivots(bracket, least, length) : KeyPivots(bracket);
    uint64_t sums[kNumPivots + 1] = {};
    SumAtPivots<kStored, true>(block, max, 0.0f, NegativeInfinity(), bracket.hi, pivots, sums);
    AllSum(block, sums);
    bracket = Shrink(bracket, pivots, sums, target);
  }
  return FindThreshold<kStored, true>(block, max, scale, bracket, target, is_bounded && k <= kMaxCandidates,
                                      {false, 0}, with_weights, gathered);
}

// A threshold as a key. is_listed: the blocks' lists hold all tokens that reach it.
struct Threshold {
  uint32_t key;
  bool is_listed;
};

// Step 9 over the tokens from floor_key up. bound: a key that about NumListed tokens reach, or 0. has_sums:
// their groups were scanned with sums, and the floor is -inf. gathered: not empty where it holds all of them
// already.
template <Dtype kStored>
__device__ __forceinline__ Threshold TopPThreshold(Block& block, float max, float scale, uint32_t floor_key,
                                                   uint64_t top_p_fixed, int32_t vocab_size, uint32_t bound,
                                                   bool has_sums, const Candidates& gathered) {
  const uint32_t top = OrderedKey(max) + 1;
  const bool has_gathered = gathered.count != 0;
  if (top - floor_key == 1) return {floor_key, has_gathered};
  if (has_gathered) {
    const bool by_all = gathered.count <= kMaxSettledByAll;
    return {Settle<Settling::kTopP>(block, gathered, floor_key, 0, top_p_fixed, 0, by_all).key, true};
  }
  // The whole mass, or about it, and the tokens from a pivot up, in one exchange.
  const uint32_t wanted = bound != 0 ? bound : FirstMassPivot(max, scale);
  const uint32_t pivot = wanted > floor_key && wanted < top ? wanted : floor_key + 1;
  if (!has_sums) {
    SumGroups<kStored>(block, max, scale, FloatFromKey(floor_key));
    __syncthreads();
  }
  uint64_t mass = 0;
  if (threadIdx.x < 32) {
    for (int32_t i = LaneInWarp(); i < block.num_local; i += 32) {
      mass += has_sums ? static_cast<uint64_t>(ApproximateMass(block, i, max, scale) *
                                               static_cast<float>(1ull << kMassBits))
                       : block.group_mass[i];
    }
    mass = SumWarp(mass);
  }
  Collect<kStored>(block, {pivot, top, 0, 0});  // takes the masses' place
  if (threadIdx.x == 0) HeaderOf(block, block.cluster.rank).mass = mass;
  __syncthreads();
  const ListTotals totals = ExchangeLists(block);
  const bool is_listed = totals.count <= kMaxCandidates;
  const uint64_t whole = totals.mass;
  const MassBounds bounds = has_sums ? BoundsOfScans(whole) : MassBounds{whole, whole};
  const uint64_t target = TopPMass(top_p_fixed, bounds.least);
  Bracket bracket = {floor_key, top, 0, whole};
  if (is_listed) {
    const Candidates candidates = Gather(block, totals, max, scale, true);
    const bool by_all = candidates.count <= kMaxSettledByAll;
    const Settled settled = Settle<Settling::kMass>(block, candidates, pivot, 0, target,
                                                    TopPMass(top_p_fixed, bounds.most), by_all);
    if (settled.is_certain) {
      if (settled.key != 0) return {settled.key, true};
      // The threshold lies below the pivot.
      const float* weight = GatheredWeights(block);
      double above = 0.0;
      for (int32_t i = LaneInWarp(); i < candidates.count; i += 32) above += static_cast<double>(weight[i]);
      bracket.hi = pivot;
      bracket.above = SumWarp(static_cast<uint64_t>(above));
    }
  }
  const uint32_t least = LeastMassKey(max, scale, bounds.least, target, vocab_size);
  if (least > bracket.lo && least < bracket.hi) bracket.lo = least;
  return {FindDeepThreshold<kStored>(block, max, scale, bracket, bounds, top_p_fixed), false};
}

}  // namespace twinjet::sampler::cuda
