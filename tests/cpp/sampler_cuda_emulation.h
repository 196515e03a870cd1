// The CUDA sampler's kernel on the host: the same slices, lists, pivots, exchanges and order of passes,
// with loops where the device has threads. It shares search.h, plan.h and the specification's headers with
// the kernel, so what a CPU can test of the kernel's algorithm is tested here.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "sampler/cuda/plan.h"
#include "sampler/cuda/search.h"
#include "sampler/cuda/shape.h"
#include "sampler/row.h"

namespace emulation {

using namespace twinjet::sampler;
using namespace twinjet::sampler::cuda;

// The weight as the kernel adds it up: the widened float, truncated.
inline uint64_t TruncatedWeight(float x, float max, float scale) {
  const double w = DoubleFromBits(WeightAsDoubleBits(MulRn(SubRn(x, max), scale)));
  return static_cast<uint64_t>(std::floor(w));
}

struct Block {
  std::vector<float> slice;
  std::vector<float> group_max;
  std::vector<uint64_t> group_mass;
  std::vector<float> list;  // at most ListCapacity() of them
  size_t list_size = 0;
  std::vector<float> kept;  // at most kMaxKept
  int32_t first_group = 0;
  int32_t num_local = 0;
};

// One row as the blocks of its cluster hold it.
class Row {
 public:
  Row(const std::vector<float>& edited, const LaunchShape& shape)
      : vocab_size_(static_cast<int32_t>(edited.size())) {
    num_groups_ = NumGroups(vocab_size_);
    groups_per_block_ = shape.groups_per_block;
    list_capacity_ = static_cast<size_t>(ListCapacity(shape.cluster));
    blocks_.resize(static_cast<size_t>(shape.cluster));
    for (size_t r = 0; r < blocks_.size(); ++r) {
      Block& block = blocks_[r];
      block.first_group = static_cast<int32_t>(r) * groups_per_block_;
      block.num_local = std::clamp(num_groups_ - block.first_group, 0, groups_per_block_);
      block.slice.assign(static_cast<size_t>(block.num_local) * kGroupSize, NegativeInfinity());
      for (size_t i = 0; i < block.slice.size(); ++i) {
        const size_t token = static_cast<size_t>(block.first_group) * kGroupSize + i;
        if (token < edited.size()) block.slice[i] = edited[token];
      }
      block.group_mass.resize(static_cast<size_t>(block.num_local));
      RefreshMaxima(&block);
    }
  }

  // Steps 3 to 10.
  void Draw(const RowConstants& constants, RowOutput* output, float* threshold) {
    *threshold = NegativeInfinity();
    max_ = NegativeInfinity();
    for (const Block& block : blocks_) {
      for (float x : block.group_max) max_ = std::max(max_, x);
    }
    if (max_ == PositiveInfinity()) {
      output->status |= kStatusInfinite;
      for (Block& block : blocks_) {
        for (float& x : block.slice) x = x == PositiveInfinity() ? 0.0f : NegativeInfinity();
        RefreshMaxima(&block);
      }
      max_ = 0.0f;
    }
    output->token_id = -1;
    if (max_ == NegativeInfinity()) {
      output->status |= kStatusNoToken;
      return;
    }
    max_ = FloatFromKey(OrderedKey(max_));
    if (constants.is_greedy != 0) {
      if (constants.scale != 0.0f) *threshold = max_;
      for (const Block& block : blocks_) {
        for (size_t i = 0; i < block.slice.size(); ++i) {
          if (block.slice[i] != max_) continue;
          output->token_id = block.first_group * kGroupSize + static_cast<int32_t>(i);
          return;
        }
      }
      return;
    }
    *threshold = KeepThreshold(constants);
    output->token_id = DrawToken(constants, *threshold);
  }

  int num_sweeps = 0;         // passes over the slices by SumAtPivots
  int num_kept_searches = 0;  // searches that ended among kept tokens
  int num_uncertain = 0;      // lists that bounds of the row's mass did not settle

 private:
  static void RefreshMaxima(Block* block) {
    block->group_max.assign(static_cast<size_t>(block->num_local), NegativeInfinity());
    for (size_t i = 0; i < block->slice.size(); ++i) {
      float& max = block->group_max[i / kGroupSize];
      max = std::fmax(max, block->slice[i]);
    }
  }

  void SumGroups(float scale, float threshold) {
    for (Block& block : blocks_) {
      for (size_t g = 0; g < block.group_mass.size(); ++g) {
        block.group_mass[g] = 0;
        if (!(block.group_max[g] >= threshold && ZOf(block.group_max[g], max_, scale) >= -45.0f)) continue;
        for (size_t i = g * kGroupSize; i < (g + 1) * kGroupSize; ++i) {
          const float x = block.slice[i];
          if (x >= threshold) block.group_mass[g] += TruncatedWeight(x, max_, scale);
        }
      }
    }
  }

  void SumAtPivots(bool count, float scale, const Bracket& bracket, const Pivots& pivots, uint64_t* sums) {
    ++num_sweeps;
    std::fill(sums, sums + kNumPivots + 1, 0);
    for (const Block& block : blocks_) {
      for (size_t i = 0; i < block.slice.size(); ++i) {
        if (block.group_max[i / kGroupSize] >= FloatFromKey(bracket.lo))
          AddAtPivots(count, scale, block.slice[i], bracket, pivots, sums);
      }
    }
  }

  void AddAtPivots(bool count, float scale, float x, const Bracket& bracket, const Pivots& pivots,
                   uint64_t* sums) const {
    if (!(x >= FloatFromKey(bracket.lo) && x <= LastBelow(bracket.hi))) return;
    const uint64_t w = count ? 1 : TruncatedWeight(x, max_, scale);
    sums[kNumPivots] += w;
    for (int k = 0; k < kNumPivots; ++k) {
      if (x >= FloatFromKey(pivots.key[k])) sums[k] += w;
    }
  }

  // Lists the tokens of the bracket; false where a list or all of them together are too long.
  bool Collect(const Bracket& bracket, bool from_kept = false) {
    const float lo = FloatFromKey(bracket.lo);
    const float last = LastBelow(bracket.hi);
    size_t total = 0;
    bool is_cut = false;
    for (Block& block : blocks_) {
      block.list.clear();
      block.list_size = 0;
      for (float x : from_kept ? block.kept : block.slice) {
        if (!(x >= lo && x <= last)) continue;
        if (block.list_size++ < list_capacity_) block.list.push_back(x);
      }
      total += block.list_size;
      is_cut |= block.list_size > list_capacity_;
    }
    return !is_cut && total <= kMaxCandidates;
  }

  void Gather(float scale) {
    logit_.clear();
    weight_.clear();
    for (const Block& block : blocks_) {
      for (float x : block.list) {
        logit_.push_back(x);
        weight_.push_back(static_cast<double>(WeightOf(x, max_, scale)));
      }
    }
  }

  enum class Settling { kCount, kMass, kTopP };
  struct Settled {
    uint32_t key;
    bool is_certain;
  };
  Settled Settle(Settling settling, uint32_t floor_key, uint64_t above, uint64_t target_or_p,
                 uint64_t most = 0) {
    const float floor = FloatFromKey(floor_key);
    Settled best = {0, true};
    for (float x : logit_) {
      double sum = 0.0, all = 0.0;
      for (size_t j = 0; j < logit_.size(); ++j) {
        const double w = settling == Settling::kCount ? 1.0 : weight_[j];
        if (logit_[j] >= x) sum += w;
        if (settling == Settling::kTopP && logit_[j] >= floor) all += w;
      }
      const uint64_t mass = above + static_cast<uint64_t>(sum);
      uint64_t target = target_or_p;
      if (settling == Settling::kTopP) target = TopPMass(target_or_p, static_cast<uint64_t>(all));
      if (!(x >= floor && mass >= target)) continue;
      best.key = std::max(best.key, OrderedKey(x));
      if (settling == Settling::kMass && mass < most) best.is_certain = false;
    }
    return best;
  }

  uint32_t FindThreshold(bool count, float scale, Bracket bracket, uint64_t target, bool try_at_once,
                         bool from_kept, size_t* num_gathered) {
    *num_gathered = 0;
    for (int round = 0;; ++round) {
      if (bracket.hi - bracket.lo == 1) return bracket.lo;
      if ((round > 0 || try_at_once) && Collect(bracket, from_kept)) {
        Gather(scale);
        if (bracket.above == 0) *num_gathered = logit_.size();
        return Settle(count ? Settling::kCount : Settling::kMass, bracket.lo, bracket.above, target).key;
      }
      const Pivots pivots = NextPivots(bracket, target, round);
      uint64_t sums[kNumPivots + 1] = {};
      if (from_kept) {
        for (const Block& block : blocks_) {
          for (float x : block.kept) AddAtPivots(count, scale, x, bracket, pivots, sums);
        }
      } else {
        SumAtPivots(count, scale, bracket, pivots, sums);
      }
      bracket = Shrink(bracket, pivots, sums, target);
    }
  }

  static BinPlace FindBin(const uint64_t* mass, uint64_t amount) {
    BinPlace place = {kNumBins - 1, 0, 0, 0};
    bool is_found = false;
    for (int32_t bin = 0; bin < kNumBins; ++bin) {
      if (!is_found && place.total + mass[bin] > amount) {
        place.bin = bin;
        place.before = place.total;
        place.mass = mass[bin];
        is_found = true;
      }
      place.total += mass[bin];
    }
    return place;
  }

  // The sample that the kernel takes is the first 32 tokens of each group.
  Bracket SampledWindow(float scale, const Bracket& bracket, const BinGrid& grid, uint64_t dropped) {
    uint64_t mass[kNumBins] = {};
    for (const Block& block : blocks_) {
      for (size_t i = 0; i < block.slice.size(); ++i) {
        const float x = block.slice[i];
        if (i % kGroupSize >= kGroupSize / kSampleStep || !(x >= grid.lo && x <= LastBelow(bracket.hi)))
          continue;
        ++mass[GuessBin(grid, x)];
      }
    }
    for (int32_t bin = 0; bin < kNumBins; ++bin)
      mass[bin] = MassOfSampledBin(grid, bin, mass[bin], max_, scale);
    const BinPlace place = FindBin(mass, dropped);
    if (place.total <= dropped) return bracket;
    const Bracket sampled = BracketOfBin({bracket.lo, bracket.hi, 0, 0}, grid, place);
    return WindowOfSample(sampled, place.total - dropped, dropped, max_, scale, bracket);
  }

  uint32_t FindDeepThreshold(float scale, Bracket bracket, MassBounds bounds, uint64_t top_p_fixed) {
    bool use_kept = false;
    uint64_t target = TopPMass(top_p_fixed, bounds.least);
    uint64_t dropped = bounds.least - target;
    for (int sample = 0; sample < kMaxSamples && !use_kept; ++sample) {
      BinGrid grid = GridOf(bracket);
      Bracket window = bracket;
      if (grid.is_fit) window = SampledWindow(scale, bracket, grid, dropped / kSampleStep);
      grid = GridOf(window);
      uint64_t whole = 0, reached = 0, inside = 0, mass[kNumBins] = {};
      bool fits = grid.is_fit;
      for (Block& block : blocks_) {
        block.kept.clear();
        size_t count = 0;
        for (float x : block.slice) {
          whole += TruncatedWeight(x, max_, scale);
          if (!(x >= FloatFromKey(window.lo))) continue;
          reached += TruncatedWeight(x, max_, scale);
          if (x <= LastBelow(window.hi) && count++ < kMaxKept) block.kept.push_back(x);
        }
        fits = fits && count <= kMaxKept;
      }
      if (bounds.least != bounds.most) bounds = {whole, whole};
      target = TopPMass(top_p_fixed, bounds.least);
      for (const Block& block : blocks_) {
        if (!fits) break;
        for (float x : block.kept) {
          inside += WeightOf(x, max_, scale);
          mass[BinOf(grid, x)] += WeightOf(x, max_, scale);
        }
      }
      if (sample == 0) bracket.reached = bounds.least;
      if (target > reached) {
        bracket.hi = window.lo;
        bracket.above = reached;
      } else if (!fits) {
        bracket.reached = reached;
        if (sample > 0 && window.lo == bracket.lo) break;
        bracket.lo = window.lo;
      } else if (target <= reached - inside) {
        bracket.lo = window.hi;
        bracket.reached = reached - inside;
      } else {
        bracket = BracketOfBin({window.lo, window.hi, reached - inside, reached}, grid,
                               FindBin(mass, reached - target));
        use_kept = true;
        ++num_kept_searches;
      }
      dropped = bracket.reached - target;
    }
    size_t unused = 0;
    return FindThreshold(false, scale, bracket, target, use_kept, use_kept, &unused);
  }

  // All groups' maxima, as every block has them.
  std::vector<float> Maxima() const {
    std::vector<float> maxima;
    for (const Block& block : blocks_)
      maxima.insert(maxima.end(), block.group_max.begin(), block.group_max.end());
    return maxima;
  }

  // A key that at least k of the groups' maxima reach; 0 where they are fewer. *least: of them.
  uint32_t BoundOfMaxima(int32_t k, float* least) {
    std::vector<float> maxima = Maxima();
    std::erase(maxima, NegativeInfinity());
    *least = *std::min_element(maxima.begin(), maxima.end());
    if (k == 0) k = NumListed(static_cast<int32_t>(maxima.size()));
    if (k == 0 || k > static_cast<int32_t>(maxima.size())) return 0;
    Stretch stretch = {*least, max_};
    for (int round = 0; round < kMaxStretches; ++round) {
      const BinGrid grid = GridBetween(stretch.lo, stretch.hi);
      if (!grid.is_fit) break;
      int32_t counts[kNumBins] = {};
      for (float y : maxima) {
        if (y >= stretch.lo) ++counts[BinAbove(grid, y)];
      }
      CountedBin found = {kNumBins - 1, counts[kNumBins - 1]};
      while (found.count < k) found.count += counts[--found.bin];
      stretch = NarrowTo(stretch, grid, found.bin);
      const auto reaching =
          std::count_if(maxima.begin(), maxima.end(), [&stretch](float y) { return y >= stretch.lo; });
      if (reaching < found.count) throw std::logic_error("a value lies below the edge of its bin");
      if (IsCloseCount(found.count, k)) break;
    }
    return OrderedKey(stretch.lo);
  }

  uint32_t TopKThreshold(float scale, int32_t k, float least, uint32_t bound, size_t* num_gathered) {
    const uint64_t target = static_cast<uint64_t>(k);
    Bracket bracket = {kKeyOfNegativeInfinity, OrderedKey(max_) + 1, 0, static_cast<uint64_t>(vocab_size_)};
    if (bound != 0) {
      bracket.lo = bound;
      return FindThreshold(true, scale, bracket, target, k <= kMaxCandidates, false, num_gathered);
    }
    const float length = SubRn(max_, least);
    const Pivots pivots =
        length > 0.0f && IsFinite(length) ? CountPivots(bracket, least, length) : KeyPivots(bracket);
    uint64_t sums[kNumPivots + 1];
    SumAtPivots(true, 0.0f, bracket, pivots, sums);
    return FindThreshold(true, scale, Shrink(bracket, pivots, sums, target), target, false, false,
                         num_gathered);
  }

  // About the row's mass, as scans say it, with as much error as they may have.
  uint64_t ScannedMass(float scale) const {
    double mass = 0.0;
    for (const Block& block : blocks_) {
      for (float x : block.slice) mass += std::exp2(static_cast<double>(MulRn(SubRn(x, max_), scale)));
    }
    const double error = vocab_size_ % 2 == 0 ? 6.5e-6 : -6.5e-6;
    return static_cast<uint64_t>(mass * (1.0 + error) * 0x1p44);
  }

  uint32_t TopPThreshold(float scale, uint32_t floor_key, uint64_t top_p_fixed, uint32_t bound, bool has_sums,
                         size_t num_gathered) {
    const uint32_t top = OrderedKey(max_) + 1;
    if (top - floor_key == 1) return floor_key;
    if (num_gathered != 0) return Settle(Settling::kTopP, floor_key, 0, top_p_fixed).key;
    const uint32_t wanted = bound != 0 ? bound : FirstMassPivot(max_, scale);
    const uint32_t pivot = wanted > floor_key && wanted < top ? wanted : floor_key + 1;
    if (!has_sums) SumGroups(scale, FloatFromKey(floor_key));
    const bool is_listed = Collect({pivot, top, 0, 0});
    uint64_t whole = 0;
    for (const Block& block : blocks_) {
      for (uint64_t mass : block.group_mass) whole += mass;
    }
    const MassBounds bounds = has_sums ? BoundsOfScans(ScannedMass(scale)) : MassBounds{whole, whole};
    const uint64_t target = TopPMass(top_p_fixed, bounds.least);
    Bracket bracket = {floor_key, top, 0, whole};
    if (is_listed) {
      Gather(scale);
      const Settled settled = Settle(Settling::kMass, pivot, 0, target, TopPMass(top_p_fixed, bounds.most));
      if (settled.is_certain) {
        if (settled.key != 0) return settled.key;
        bracket.hi = pivot;
        for (double weight : weight_) bracket.above += static_cast<uint64_t>(weight);
      } else {
        ++num_uncertain;
      }
    }
    const uint32_t least = LeastMassKey(max_, scale, bounds.least, target, vocab_size_);
    if (least > bracket.lo && least < bracket.hi) bracket.lo = least;
    return FindDeepThreshold(scale, bracket, bounds, top_p_fixed);
  }

  float KeepThreshold(const RowConstants& constants) {
    uint32_t key = kKeyOfNegativeInfinity;
    size_t num_gathered = 0;
    if (constants.min_z > NegativeInfinity()) key = MinPKey(max_, constants.scale, constants.min_z);
    if (constants.top_k == 0 && constants.has_top_p == 0) return FloatFromKey(key);
    float least = 0.0f;
    uint32_t bound = BoundOfMaxima(constants.top_k, &least);
    if (constants.top_k > 0) {
      key = std::max(key, TopKThreshold(constants.scale, constants.top_k, least, bound, &num_gathered));
      bound = 0;
    }
    if (constants.has_top_p != 0)
      key = TopPThreshold(constants.scale, key, constants.top_p_fixed, bound,
                          constants.top_k == 0 && constants.min_z == NegativeInfinity(), num_gathered);
    return FloatFromKey(key);
  }

  int32_t DrawToken(const RowConstants& constants, float threshold) {
    SumGroups(constants.scale, threshold);
    // Each block sends its earliest group; the earliest of these wins.
    uint64_t best = ~0ull;
    const Block* owner = nullptr;
    size_t winner = 0;
    for (const Block& block : blocks_) {
      uint64_t best_of_block = ~0ull;
      size_t group_of_block = 0;
      for (size_t g = 0; g < block.group_mass.size(); ++g) {
        if (block.group_mass[g] == 0) continue;
        const uint32_t group = static_cast<uint32_t>(block.first_group) + static_cast<uint32_t>(g);
        const uint64_t time =
            DoubleBits(RaceTime(ExponentialOf(constants.race, group | kGroupLevel), block.group_mass[g]));
        if (time >= best_of_block) continue;
        best_of_block = time;
        group_of_block = g;
      }
      if (best_of_block >= best) continue;
      best = best_of_block;
      owner = &block;
      winner = group_of_block;
    }
    if (owner == nullptr) return -2;  // cannot be: the maximum has weight
    best = ~0ull;
    int32_t token = -2;
    for (size_t i = 0; i < kGroupSize; ++i) {
      const float x = owner->slice[winner * kGroupSize + i];
      const uint64_t weight = x >= threshold ? WeightOf(x, max_, constants.scale) : 0;
      if (weight == 0) continue;
      const int32_t id =
          (owner->first_group + static_cast<int32_t>(winner)) * kGroupSize + static_cast<int32_t>(i);
      const uint64_t time = DoubleBits(
          RaceTime(ExponentialOf(constants.race, static_cast<uint32_t>(id) | kTokenLevel), weight));
      if (time >= best) continue;
      best = time;
      token = id;
    }
    return token;
  }

  int32_t vocab_size_;
  int32_t num_groups_;
  int32_t groups_per_block_;
  size_t list_capacity_;
  float max_ = 0.0f;
  std::vector<Block> blocks_;
  std::vector<float> logit_;
  std::vector<double> weight_;
};

}  // namespace emulation
