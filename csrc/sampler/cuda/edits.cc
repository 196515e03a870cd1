#include "sampler/cuda/edits.h"

#include <algorithm>

namespace twinjet::sampler::cuda {

void AppendEdits(const RowEdits& row, std::vector<Edit>* edits) {
  const auto begin = static_cast<std::ptrdiff_t>(edits->size());
  for (int32_t id : row.banned) edits->push_back({id, kEditMasked, 0, 0.0f});
  for (int32_t id : row.early_stops) edits->push_back({id, kEditEarlyStop, 0, 0.0f});
  for (const TokenBias& bias : row.biases) edits->push_back({bias.token_id, kEditBias, 0, bias.bias});
  for (const TokenUse& use : row.uses) {
    if (use.in_prompt || use.output_count > 0)
      edits->push_back({use.token_id, kEditSeen, use.output_count, 0.0f});
  }
  std::sort(edits->begin() + begin, edits->end(),
            [](const Edit& a, const Edit& b) { return a.token_id < b.token_id; });
  auto last = edits->begin() + begin;
  for (auto next = last; next != edits->end(); ++next) {
    if (next == last) continue;
    if (next->token_id != last->token_id) {
      *++last = *next;
      continue;
    }
    last->flags |= next->flags;
    last->output_count += next->output_count;  // at most one of the two has it
    if ((next->flags & kEditBias) != 0) last->bias = next->bias;
  }
  if (edits->begin() + begin != edits->end()) edits->erase(last + 1, edits->end());
}

}  // namespace twinjet::sampler::cuda
