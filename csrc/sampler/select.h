// Finds the boundary of top-k and top-p without sorting.
#pragma once

#include <cstdint>
#include <vector>

namespace twinjet::sampler {

// Memory for SelectThreshold; grows to the longest list seen.
struct SelectScratch {
  std::vector<float> x[2];
  std::vector<float> weight[2];
  std::vector<int32_t> bins;
};

// The least x of the list that is kept when a token is kept while the mass strictly above its x is
// below `target`. weights null counts every token as 1 (then it is the target-th largest x).
// No NaN; weights are integers; target is at least 1 and at most the list's mass.
// About two passes over the list, whatever its values.
float SelectThreshold(const float* x, const float* weights, int32_t n, uint64_t target,
                      SelectScratch* scratch);

}  // namespace twinjet::sampler
