// All three filters are thresholds on the logit, so a row is cut in two steps: a threshold that is
// surely low enough, found from the groups' maxima or from a sample of the row, brings a short list
// of tokens; the exact threshold is then found within the list.
#include "sampler/filter.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace twinjet::sampler {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::max();
constexpr int32_t kSampleRun = 16;         // adjacent tokens taken from a sampled group
constexpr int32_t kMinSampledSize = 4096;  // shorter rows are listed whole
constexpr int kNumGuessBins = 1024;
constexpr int32_t kFirstBin = 32;        // a first list reaches at least this far down
constexpr double kGuessErrors = 2.5;     // standard errors of a sample that a guess allows for
constexpr double kLongListShare = 32.0;  // of the row: longer lists are not made

int32_t NumGroups(const RowView& view) { return (view.size + kGroupSize - 1) / kGroupSize; }

// The least finite x with z >= min_z: z does not decrease with x.
float ThresholdOfZ(float max, float scale, float min_z) {
  uint32_t low = OrderedKey(kLowest), high = OrderedKey(max);
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (ZOf(FloatFromKey(middle), max, scale) >= min_z) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return FloatFromKey(high);
}

// The logits of a sample, into list_x: a run of tokens of every group, or of every second one.
int32_t TakeSample(const RowView& view, Workspace* workspace) {
  const int32_t stride = view.size >= 65536 ? 2 * kGroupSize : kGroupSize;
  int32_t count = 0;
  for (int32_t begin = 0; begin + kGroupSize <= view.size; begin += stride) {
    const float* run = view.x + begin + (begin / stride * 5 * kSampleRun) % kGroupSize;
    std::copy(run, run + kSampleRun, workspace->list_x.begin() + count);
    count += kSampleRun;
  }
  return count;
}

uint64_t Sum(const float* weights, int32_t n) {
  uint64_t sum = 0;
  for (int32_t i = 0; i < n; ++i) sum += static_cast<uint64_t>(weights[i]);
  return sum;
}

uint64_t Sum(const std::vector<uint64_t>& masses, int32_t n) {
  uint64_t sum = 0;
  for (int32_t i = 0; i < n; ++i) sum += masses[static_cast<size_t>(i)];
  return sum;
}

// What a sample says of how mass lies below the maximum, in bins so narrow that a token weighs as much
// as another of its bin. Only for guesses.
class MassProfile {
 public:
  // Tokens below `least` count for nothing.
  MassProfile(const RowView& view, const RowConstants& constants, float least, Workspace* workspace)
      : max_(view.max), bins_per_unit_(constants.scale * (static_cast<float>(kNumGuessBins) / kMassBits)) {
    const int32_t n = TakeSample(view, workspace);
    const float* x = workspace->list_x.data();
    int32_t bins[kSampleRun];
    for (int32_t begin = 0; begin < n; begin += kSampleRun) {
      for (int32_t i = 0; i < kSampleRun; ++i) bins[i] = BinOf(x[begin + i]);
      for (int32_t bin : bins) ++counts_[bin];
    }
    factor_ = static_cast<double>(view.size) / static_cast<double>(n);
    last_bin_ = std::min(BinOf(least), kNumGuessBins - 2);
  }

  // The lower edge of a bin; -1 is above all, and the last bin has no lower edge.
  float Edge(int32_t bin) const {
    if (bin < 0) return PositiveInfinity();
    if (bin >= kNumGuessBins - 1) return kLowest;
    return std::max(kLowest, max_ - static_cast<float>(bin + 1) / bins_per_unit_);
  }

  // Bins with surely at most, and surely more than, `mass` below their lower edge, as near as the
  // sample's error allows: that of a sum of independent draws, and of one draw unseen.
  void Bracket(double mass, int32_t* low_bin, int32_t* high_bin) const {
    const double target = mass / factor_;
    double below = 0.0, variance = 0.0;
    double weight = std::exp2(kMassBits - (last_bin_ + 0.5) * kMassBits / kNumGuessBins);
    *low_bin = kNumGuessBins - 1;
    *high_bin = -1;
    for (int32_t b = last_bin_; b >= 0; --b) {
      const double gap = target - below;
      if (gap * gap >= kGuessErrors * kGuessErrors * (variance + weight * weight)) {
        if (gap < 0.0) {
          *high_bin = b;
          return;
        }
        *low_bin = b;
      }
      const double bin_mass = counts_[b] * weight;
      below += bin_mass;
      variance += bin_mass * weight;
      weight *= kBinWeightRatio;
    }
  }

  double CountDownTo(int32_t bin) const { return factor_ * std::accumulate(counts_, counts_ + bin + 1, 0); }

 private:
  static constexpr double kBinWeightRatio = 0x1.07bd42b72a836p+0;  // 2^(44 / 1024)

  int32_t BinOf(float x) const {
    const float place = (max_ - x) * bins_per_unit_;
    const float most = static_cast<float>(kNumGuessBins - 1);
    return static_cast<int32_t>(place < most ? place : most);
  }

  float max_;
  float bins_per_unit_;
  double factor_;
  int32_t last_bin_;
  int32_t counts_[kNumGuessBins] = {};
};

// The list of tokens that a draw may choose from: workspace->list_x, list_id and list_weight.
class List {
 public:
  List(const Kernels& kernels, const RowView& view, const RowConstants& constants, Workspace* workspace)
      : kernels_(kernels), view_(view), constants_(constants), workspace_(workspace) {}

  void TakeTop(int32_t k, float least) {
    size_ = CollectTop(kernels_, view_, k, least, workspace_);
    if (size_ > k) {
      DropBelow(SelectThreshold(x(), nullptr, size_, static_cast<uint64_t>(k), &workspace_->select));
    }
  }

  uint64_t Weigh() {
    kernels_.weigh(x(), size_, view_.max, constants_.scale, weight());
    return Sum(weight(), size_);
  }

  // Tokens of at least `least` with a mass of at least `target`.
  void TakeMass(const MassProfile& profile, uint64_t target, float least, int32_t bin) {
    for (;; bin = std::min(2 * bin + 8, kNumGuessBins - 1)) {
      const float guess = std::max(least, profile.Edge(bin));
      Collect(guess, PositiveInfinity());
      if (Weigh() >= target || guess == least) return;
    }
  }

  void TakeAll(float least) { Collect(least, PositiveInfinity()); }

  // The exact boundary of a nucleus too long to list: what surely stays is summed, and only tokens about
  // the boundary are listed. Leaves the kept masses of groups in workspace->masses.
  float SplitAtTopP(const MassProfile& profile, uint64_t target, float least, int32_t low_bin,
                    int32_t high_bin) {
    // Where the top tie group may be the whole nucleus, as in a row of equal logits, no list is made of it.
    if (high_bin < 0 && Split(view_.max, view_.max) >= target) {
      std::swap(workspace_->masses, workspace_->masses_above);
      return view_.max;
    }
    float low = std::max(least, profile.Edge(low_bin));
    float high = std::max(low, profile.Edge(high_bin));  // `least` may lie within the higher bin
    for (;;) {
      const uint64_t above = Split(low, high);
      if (above >= target) {  // the boundary lies higher than was guessed
        low = high;
        high_bin = high_bin / 2 - 1;
        high = std::max(low, profile.Edge(high_bin));
        continue;
      }
      TakeListed();
      if (above + Sum(weight(), size_) >= target) {
        const float threshold = SelectThreshold(x(), weight(), size_, target - above, &workspace_->select);
        AddListed(threshold);
        std::swap(workspace_->masses, workspace_->masses_above);
        return threshold;
      }
      high = low;
      low_bin = 2 * low_bin + 1;
      low = std::max(least, profile.Edge(low_bin));
    }
  }

  // The least x that is left.
  float Least() { return *std::min_element(x(), x() + size_); }

  void CutTopP(uint64_t target) {
    const float threshold = SelectThreshold(x(), weight(), size_, target, &workspace_->select);
    int32_t count = 0;
    for (int32_t i = 0; i < size_; ++i) {
      if (x()[i] >= threshold) Move(i, count++, true);
    }
    size_ = count;
  }

  // Two races; the groups' one first.
  int32_t Race(uint64_t* kept_mass) {
    uint32_t* index = workspace_->race_index.data();
    double* mass = workspace_->race_mass.data();
    int32_t num_groups = 0;
    *kept_mass = 0;
    for (int32_t i = 0; i < size_; ++i) {
      const uint64_t w = static_cast<uint64_t>(weight()[i]);
      if (w == 0) continue;
      *kept_mass += w;
      const uint32_t group = static_cast<uint32_t>(id()[i] / kGroupSize);
      if (num_groups == 0 || index[num_groups - 1] != group) {
        index[num_groups] = group;
        mass[num_groups] = 0.0;
        ++num_groups;
      }
      mass[num_groups - 1] += static_cast<double>(w);
    }
    const int32_t group =
        static_cast<int32_t>(index[kernels_.race(constants_.race, index, mass, num_groups)]);
    int32_t num_tokens = 0;
    int32_t* const end = id() + size_;
    for (int32_t* p = std::lower_bound(id(), end, group * kGroupSize); p != end; ++p) {
      if (*p / kGroupSize != group) break;
      const float w = weight()[p - id()];
      if (w == 0.0f) continue;
      index[num_tokens] = static_cast<uint32_t>(*p) | kTokenLevel;
      mass[num_tokens] = static_cast<double>(w);
      ++num_tokens;
    }
    const int32_t winner = kernels_.race(constants_.race, index, mass, num_tokens);
    return static_cast<int32_t>(index[winner] & ~kTokenLevel);
  }

 private:
  float* x() { return workspace_->list_x.data(); }
  float* weight() { return workspace_->list_weight.data(); }
  int32_t* id() { return workspace_->list_id.data(); }

  void Move(int32_t from, int32_t to, bool with_weight) {
    x()[to] = x()[from];
    id()[to] = id()[from];
    if (with_weight) weight()[to] = weight()[from];
  }

  // Lists the ids with low <= x < high, without x and weight. Returns the mass of x >= high.
  uint64_t Split(float low, float high) {
    size_ =
        kernels_.split_masses(view_.x, workspace_->weights.data(), view_.size, view_.group_max,
                              workspace_->masses.data(), low, high, workspace_->masses_above.data(), id());
    return Sum(workspace_->masses_above, NumGroups(view_));
  }

  // Adds what is listed and kept to masses_above, a group at a time. Whether a token is kept is a toss-up,
  // so that is no branch.
  void AddListed(float threshold) {
    for (int32_t i = 0; i < size_;) {
      const uint32_t group = static_cast<uint32_t>(id()[i]) / kGroupSize;
      uint64_t mass = 0;
      for (; i < size_ && static_cast<uint32_t>(id()[i]) / kGroupSize == group; ++i) {
        const uint64_t mask = x()[i] >= threshold ? ~uint64_t{0} : 0;
        mass += static_cast<uint64_t>(static_cast<int64_t>(weight()[i])) & mask;
      }
      workspace_->masses_above[group] += mass;
    }
  }

  void TakeListed() {
    for (int32_t i = 0; i < size_; ++i) {
      x()[i] = view_.x[id()[i]];
      weight()[i] = workspace_->weights[static_cast<size_t>(id()[i])];
    }
  }

  void Collect(float threshold, float below) {
    size_ = kernels_.collect(view_.x, view_.size, view_.group_max, threshold, below, x(), id());
  }

  void DropBelow(float threshold) {
    int32_t count = 0;
    for (int32_t i = 0; i < size_; ++i) {
      if (x()[i] >= threshold) Move(i, count++, false);
    }
    size_ = count;
  }

  const Kernels& kernels_;
  const RowView& view_;
  const RowConstants& constants_;
  Workspace* workspace_;
  int32_t size_ = 0;
};

// The draw when the only thresholds are known beforehand: no list is needed.
Draw DrawFromGroups(const Kernels& kernels, const RowView& view, const RowConstants& constants,
                    float threshold, Workspace* workspace) {
  uint32_t* index = workspace->race_index.data();
  double* mass = workspace->race_mass.data();
  uint64_t total = 0;
  int32_t num_groups = 0;
  for (int32_t g = 0; g < NumGroups(view); ++g) {
    const uint64_t m = workspace->masses[static_cast<size_t>(g)];
    if (m == 0) continue;
    total += m;
    index[num_groups] = static_cast<uint32_t>(g);
    mass[num_groups] = static_cast<double>(m);
    ++num_groups;
  }
  const int32_t group = static_cast<int32_t>(index[kernels.race(constants.race, index, mass, num_groups)]);
  const int32_t begin = group * kGroupSize;
  const int32_t size = std::min(kGroupSize, view.size - begin);
  float weights[kGroupSize];
  kernels.weigh(view.x + begin, size, view.max, constants.scale, weights);
  int32_t num_tokens = 0;
  for (int32_t i = 0; i < size; ++i) {
    if (!(view.x[begin + i] >= threshold) || weights[i] == 0.0f) continue;
    index[num_tokens] = static_cast<uint32_t>(begin + i) | kTokenLevel;
    mass[num_tokens] = static_cast<double>(weights[i]);
    ++num_tokens;
  }
  const int32_t winner = kernels.race(constants.race, index, mass, num_tokens);
  return {static_cast<int32_t>(index[winner] & ~kTokenLevel), threshold, total};
}

}  // namespace

int32_t FirstMaximum(const RowView& view) {
  int32_t i = static_cast<int32_t>(std::find(view.group_max, view.group_max + NumGroups(view), view.max) -
                                   view.group_max) *
              kGroupSize;
  while (view.x[i] != view.max) ++i;
  return i;
}

int32_t CollectTop(const Kernels& kernels, const RowView& view, int32_t k, float least,
                   Workspace* workspace) {
  const int32_t num_groups = NumGroups(view);
  for (double factor = 1.25;; factor *= 4.0) {
    float guess = kLowest;
    if (k <= num_groups) {
      // k groups have a token at least as large as the k-th largest of the maxima.
      guess =
          SelectThreshold(view.group_max, nullptr, num_groups, static_cast<uint64_t>(k), &workspace->select);
    } else if (view.size >= kMinSampledSize) {
      const int32_t n = TakeSample(view, workspace);
      const double rank = factor * static_cast<double>(k) * static_cast<double>(n) / view.size + 8.0;
      if (rank < n) {
        guess = SelectThreshold(workspace->list_x.data(), nullptr, n, static_cast<uint64_t>(rank),
                                &workspace->select);
      }
    }
    guess = std::max({guess, least, kLowest});
    const int32_t count = kernels.collect(view.x, view.size, view.group_max, guess, PositiveInfinity(),
                                          workspace->list_x.data(), workspace->list_id.data());
    if (count >= k || guess == std::max(least, kLowest)) return count;
  }
}

namespace {

// Steps 9 and 10 when top-k is off, after weigh_groups.
Draw DrawTopP(const Kernels& kernels, const RowView& view, const RowConstants& constants, float least,
              Workspace* workspace) {
  List list(kernels, view, constants, workspace);
  const uint64_t total = Sum(workspace->masses, NumGroups(view));
  const uint64_t target = TopPMass(constants.top_p_fixed, total);
  if (view.size < kMinSampledSize) {
    list.TakeAll(least);
    list.Weigh();
  } else {
    const MassProfile profile(view, constants, least, workspace);
    int32_t low_bin, high_bin;
    profile.Bracket(static_cast<double>(total - target), &low_bin, &high_bin);
    if (profile.CountDownTo(low_bin) > static_cast<double>(view.size) / kLongListShare) {
      const float threshold = list.SplitAtTopP(profile, target, least, low_bin, high_bin);
      return DrawFromGroups(kernels, view, constants, threshold, workspace);
    }
    list.TakeMass(profile, target, least, std::max(low_bin, kFirstBin));
  }
  list.CutTopP(target);
  Draw draw = {-1, list.Least(), 0};
  draw.token_id = list.Race(&draw.kept_mass);
  return draw;
}

}  // namespace

Draw FilterAndDraw(const Kernels& kernels, const RowView& view, const RowConstants& constants,
                   Workspace* workspace) {
  const bool has_min_p = constants.min_z > NegativeInfinity();
  const float least = has_min_p ? ThresholdOfZ(view.max, constants.scale, constants.min_z) : kLowest;
  if (constants.top_k > 0) {
    // Where k tokens reach the maximum they are all that is kept, and may be too many to list.
    if (kernels.count_at_least(view.x, view.size, view.group_max, view.max) >= constants.top_k) {
      kernels.group_masses(view.x, view.size, view.group_max, view.max, constants.scale, view.max, nullptr,
                           workspace->masses.data());
      return DrawFromGroups(kernels, view, constants, view.max, workspace);
    }
    List list(kernels, view, constants, workspace);
    list.TakeTop(constants.top_k, least);
    const uint64_t total = list.Weigh();
    if (constants.has_top_p != 0) list.CutTopP(TopPMass(constants.top_p_fixed, total));
    Draw draw = {-1, list.Least(), 0};
    draw.token_id = list.Race(&draw.kept_mass);
    return draw;
  }
  const float threshold = has_min_p ? least : NegativeInfinity();
  if (constants.has_top_p != 0) {
    kernels.weigh_groups(view.x, view.size, view.group_max, view.max, constants.scale, threshold,
                         workspace->weights.data(), workspace->masses.data());
    return DrawTopP(kernels, view, constants, least, workspace);
  }
  // With min-p there is too little work to do while memory answers.
  const float* ahead = has_min_p ? nullptr : view.ahead;
  kernels.group_masses(view.x, view.size, view.group_max, view.max, constants.scale, threshold, ahead,
                       workspace->masses.data());
  return DrawFromGroups(kernels, view, constants, threshold, workspace);
}

}  // namespace twinjet::sampler
