// RankCounts: of many lists that grow and shrink by one, how many have at least x items. A Fenwick
// tree, so that a change and a prefix sum are O(log x).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace twinjet::sched {

class RankCounts {
 public:
  // Preconditions: x >= 1.
  void Add(int64_t x, int64_t amount) {
    if (x >= size()) Grow(x);
    counts_[x] += amount;
    Update(x, amount);
  }
  // How many lists have at least x items; none past the largest ever seen.
  int64_t At(int64_t x) const { return x >= 1 && x < size() ? counts_[x] : 0; }
  // The sum of At(1)..At(x).
  int64_t UpTo(int64_t x) const {
    int64_t total = 0;
    for (x = std::min(x, size() - 1); x > 0; x &= x - 1) total += tree_[x];
    return total;
  }

 private:
  int64_t size() const { return static_cast<int64_t>(counts_.size()); }
  void Update(int64_t x, int64_t amount) {
    for (; x < size(); x += x & -x) tree_[x] += amount;
  }
  void Grow(int64_t x) {
    int64_t wanted = size();
    while (wanted <= x) wanted *= 2;
    counts_.resize(static_cast<size_t>(wanted));
    tree_.assign(static_cast<size_t>(wanted), 0);
    for (int64_t i = 1; i < wanted; ++i) {
      if (counts_[i] != 0) Update(i, counts_[i]);
    }
  }

  std::vector<int64_t> counts_ = std::vector<int64_t>(64);
  std::vector<int64_t> tree_ = std::vector<int64_t>(64);
};

}  // namespace twinjet::sched
