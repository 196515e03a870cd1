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

uint64_t MassOf(float weight) { return static_cast<uint64_t>(static_cast<int64_t>(weight)); }

float SortAndWalk(const float* x, const float* weights, int32_t n, uint64_t target) {
  Entry entries[kSortSize];
  for (int32_t i = 0; i < n; ++i) entries[i] = {x[i], weights == nullptr ? 1 : MassOf(weights[i])};
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

// The bin of each x, so that a larger x never has a larger bin. Plain loops: compilers turn them
// into vectors of the baseline.
void DealLinear(const float* x, int32_t n, float high, float bins_per_unit, int32_t* bins) {
  for (int32_t i = 0; i < n; ++i) {
    const float place = (high - x[i]) * bins_per_unit;
    const float most = static_cast<float>(kNumBins - 1);
    bins[i] = static_cast<int32_t>(place < most ? place : most);
  }
}

void DealByKey(const float* x, int32_t n, uint32_t high_key, uint32_t low_key, int32_t* bins) {
  const int width = static_cast<int>(std::bit_width(high_key - low_key));
  const int shift = width > kBinBits ? width - kBinBits : 0;
  for (int32_t i = 0; i < n; ++i) bins[i] = static_cast<int32_t>((high_key - OrderedKey(x[i])) >> shift);
}

// Four running extremes, so that one comparison need not wait for the last.
void Extremes(const float* x, int32_t n, float* low, float* high) {
  float lows[4] = {x[0], x[0], x[0], x[0]}, highs[4] = {x[0], x[0], x[0], x[0]};
  int32_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int v = 0; v < 4; ++v) {
      lows[v] = x[i + v] < lows[v] ? x[i + v] : lows[v];
      highs[v] = x[i + v] > highs[v] ? x[i + v] : highs[v];
    }
  }
  for (; i < n; ++i) {
    lows[0] = std::min(lows[0], x[i]);
    highs[0] = std::max(highs[0], x[i]);
  }
  *low = *std::min_element(lows, lows + 4);
  *high = *std::max_element(highs, highs + 4);
}

void AddMasses(const int32_t* bins, const float* weights, int32_t n, uint64_t* masses) {
  // Neighbours often share a bin; two tables keep one addition from waiting for the other.
  uint64_t odd[kNumBins] = {};
  for (int32_t i = 0; i + 1 < n; i += 2) {
    masses[bins[i]] += weights == nullptr ? 1 : MassOf(weights[i]);
    odd[bins[i + 1]] += weights == nullptr ? 1 : MassOf(weights[i + 1]);
  }
  if (n % 2 != 0) masses[bins[n - 1]] += weights == nullptr ? 1 : MassOf(weights[n - 1]);
  for (uint32_t b = 0; b < kNumBins; ++b) masses[b] += odd[b];
}

}  // namespace

float SelectThreshold(const float* x, const float* weights, int32_t n, uint64_t target,
                      SelectScratch* scratch) {
  bool by_key = false;
  for (int side = 0;; side ^= 1) {
    if (n <= kSortSize) return SortAndWalk(x, weights, n, target);
    const size_t size = static_cast<size_t>(n);
    if (scratch->x[side].size() < size) {
      scratch->x[side].resize(size);
      scratch->weight[side].resize(size);
    }
    if (scratch->bins.size() < size) scratch->bins.resize(size);
    float low, high;
    Extremes(x, n, &low, &high);
    if (low == high) return high;
    int32_t* bins = scratch->bins.data();
    const float bins_per_unit = static_cast<float>(kNumBins - 1) / (high - low);
    if (!by_key && bins_per_unit > 0.0f && bins_per_unit <= std::numeric_limits<float>::max()) {
      DealLinear(x, n, high, bins_per_unit, bins);
    } else {
      DealByKey(x, n, OrderedKey(high), OrderedKey(low), bins);
    }
    uint64_t masses[kNumBins] = {};
    AddMasses(bins, weights, n, masses);
    int32_t boundary = 0;
    while (boundary < static_cast<int32_t>(kNumBins) - 1 && masses[boundary] < target)
      target -= masses[boundary++];

    float* next_x = scratch->x[side].data();
    float* next_weight = scratch->weight[side].data();
    int32_t count = 0;
    for (int32_t i = 0; i < n; ++i) {
      if (bins[i] != boundary) continue;
      next_x[count] = x[i];
      if (weights != nullptr) next_weight[count] = weights[i];
      ++count;
    }
    by_key = count > n / 2;
    x = next_x;
    if (weights != nullptr) weights = next_weight;
    n = count;
  }
}

}  // namespace twinjet::sampler
