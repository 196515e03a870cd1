// One pass deals the list into bins by x, the bin that holds the boundary is picked out, and so on
// until few tokens are left to sort. Bins of equal width in x come first, as logits spread evenly;
// when they fail to separate (a huge range, or nearly equal values), bins of the ordered key take
// over, which always split the list.
#include "sampler/select.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "sampler/spec_math.h"

namespace twinjet::sampler {
namespace {

constexpr int kBinBits = 9;
constexpr uint32_t kNumBins = 1u << kBinBits;
constexpr int32_t kSortSize = 24;

struct Entry {
  float x;
  uint64_t mass;
};

float SortAndWalk(const float* x, const float* weights, int32_t n, uint64_t target) {
  Entry entries[kSortSize];
  for (int32_t i = 0; i < n; ++i) {
    entries[i] = {x[i], weights == nullptr ? 1 : static_cast<uint64_t>(weights[i])};
  }
  std::sort(entries, entries + n, [](const Entry& a, const Entry& b) { return a.x > b.x; });
  uint64_t above = 0;   // strictly above the current value
  uint64_t so_far = 0;  // above, with the ties seen
  float threshold = entries[0].x;
  for (int32_t i = 0; i < n; ++i) {
    if (entries[i].x != threshold) above = so_far;
    if (above >= target) break;
    threshold = entries[i].x;
    so_far += entries[i].mass;
  }
  return threshold;
}

// Maps x to its bin; larger x never has the larger bin.
struct Binning {
  float high;
  float bins_per_unit;  // 0: by key
  uint32_t high_key;
  int shift;

  uint32_t operator()(float x) const {
    if (bins_per_unit > 0.0f) {
      const uint32_t bin = static_cast<uint32_t>((high - x) * bins_per_unit);
      return bin < kNumBins ? bin : kNumBins - 1;
    }
    return (high_key - OrderedKey(x)) >> shift;
  }
};

Binning MakeBinning(float low, float high, bool by_key) {
  Binning binning = {high, 0.0f, OrderedKey(high), 0};
  const float bins_per_unit = static_cast<float>(kNumBins - 1) / (high - low);
  if (!by_key && bins_per_unit > 0.0f && bins_per_unit <= std::numeric_limits<float>::max()) {
    binning.bins_per_unit = bins_per_unit;
    return binning;
  }
  const uint32_t range = binning.high_key - OrderedKey(low);
  const int width = static_cast<int>(std::bit_width(range));
  binning.shift = width > kBinBits ? width - kBinBits : 0;
  return binning;
}

}  // namespace

float SelectThreshold(const float* x, const float* weights, int32_t n, uint64_t target,
                      SelectScratch* scratch) {
  bool by_key = false;
  for (int side = 0;; side ^= 1) {
    if (n <= kSortSize) return SortAndWalk(x, weights, n, target);
    const auto [low, high] = std::minmax_element(x, x + n);
    if (*low == *high) return *high;
    const Binning bin_of = MakeBinning(*low, *high, by_key);
    uint64_t masses[kNumBins] = {};
    for (int32_t i = 0; i < n; ++i) {
      masses[bin_of(x[i])] += weights == nullptr ? 1 : static_cast<uint64_t>(weights[i]);
    }
    uint32_t boundary = 0;
    while (boundary < kNumBins - 1 && masses[boundary] < target) target -= masses[boundary++];

    std::vector<float>& next_x = scratch->x[side];
    std::vector<float>& next_weight = scratch->weight[side];
    if (next_x.size() < static_cast<size_t>(n)) {
      next_x.resize(static_cast<size_t>(n));
      next_weight.resize(static_cast<size_t>(n));
    }
    int32_t count = 0;
    for (int32_t i = 0; i < n; ++i) {
      if (bin_of(x[i]) != boundary) continue;
      next_x[static_cast<size_t>(count)] = x[i];
      if (weights != nullptr) next_weight[static_cast<size_t>(count)] = weights[i];
      ++count;
    }
    by_key = count > n / 2;
    x = next_x.data();
    if (weights != nullptr) weights = next_weight.data();
    n = count;
  }
}

}  // namespace twinjet::sampler
