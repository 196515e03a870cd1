#include "kv/cuda/copy_plan.h"

#include <algorithm>
#include <unordered_map>

namespace twinjet::kv::cuda {

CopyPlan PlanCopies(std::span<const BlockCopy> copies) {
  // A copy's wave is one past the last wave that wrote its source or destination or read its destination.
  struct LastUse {
    int32_t read = -1;
    int32_t written = -1;
  };
  std::unordered_map<BlockId, LastUse> uses;
  std::vector<std::pair<int32_t, BlockCopy>> placed;
  for (const BlockCopy& copy : copies) {
    if (copy.source == copy.destination || copy.source == kNoBlock) continue;
    LastUse& source = uses[copy.source];
    const int32_t source_written = source.written;
    const LastUse destination = uses[copy.destination];
    const int32_t wave = 1 + std::max({source_written, destination.written, destination.read});
    uses[copy.source].read = std::max(uses[copy.source].read, wave);
    uses[copy.destination].written = wave;
    placed.emplace_back(wave, copy);
  }
  std::stable_sort(placed.begin(), placed.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  CopyPlan plan;
  for (size_t i = 0; i < placed.size(); ++i) {
    plan.copies.push_back(placed[i].second);
    if (i + 1 == placed.size() || placed[i + 1].first != placed[i].first) {
      plan.wave_ends.push_back(static_cast<int32_t>(i + 1));
    }
  }
  return plan;
}

}  // namespace twinjet::kv::cuda
