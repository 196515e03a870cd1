#include "sampler/logprobs.h"

#include <algorithm>

#include "sampler/filter.h"

namespace twinjet::sampler {
namespace {

float LogProbOf(const Distribution& distribution, float x) {
  if (!(x >= distribution.threshold) || x == NegativeInfinity()) return NegativeInfinity();
  return LogProb(x, distribution.view->max, distribution.temperature, distribution.ln_mass);
}

// The n first tokens by (logit descending, id ascending) into workspace->ranked. Returns how many
// there are, which is less than n only when the vocabulary is smaller.
int32_t RankTop(const Kernels& kernels, const RowView& view, int32_t n, Workspace* workspace) {
  std::vector<Workspace::Ranked>& ranked = workspace->ranked;
  n = std::min(n, view.size);
  int32_t count = CollectTop(kernels, view, n, NegativeInfinity(), workspace);
  float threshold = NegativeInfinity();
  if (count > n) {
    threshold = SelectThreshold(workspace->list_x.data(), nullptr, count, static_cast<uint64_t>(n),
                                &workspace->select);
  }
  int32_t kept = 0;
  for (int32_t i = 0; i < count; ++i) {
    const size_t from = static_cast<size_t>(i);
    if (workspace->list_x[from] < threshold) continue;
    ranked[static_cast<size_t>(kept++)] = {workspace->list_x[from], workspace->list_id[from]};
  }
  std::sort(ranked.begin(), ranked.begin() + kept,
            [](const Workspace::Ranked& a, const Workspace::Ranked& b) {
              return a.x > b.x || (a.x == b.x && a.token_id < b.token_id);
            });
  for (int32_t id = 0; kept < n; ++id) {
    if (view.x[id] == NegativeInfinity()) ranked[static_cast<size_t>(kept++)] = {view.x[id], id};
  }
  return n;
}

}  // namespace

Distribution WholeRow(const Kernels& kernels, const RowView& view, float temperature, float scale,
                      Workspace* workspace) {
  Distribution distribution = {&view, temperature, NegativeInfinity(), 0.0};
  if (view.max == NegativeInfinity()) return distribution;
  kernels.group_masses(view.x, view.size, view.group_max, view.max, scale, NegativeInfinity(), nullptr,
                       workspace->masses.data());
  uint64_t total = 0;
  for (int32_t g = 0; g * kGroupSize < view.size; ++g) total += workspace->masses[static_cast<size_t>(g)];
  distribution.ln_mass = LnMass(total);
  return distribution;
}

void FillLogprobs(const Kernels& kernels, const Distribution& distribution, int32_t num_logprobs,
                  Workspace* workspace, RowOutput* output) {
  const RowView& view = *distribution.view;
  const float drawn = view.x[output->token_id];
  output->top_ids[0] = output->token_id;
  output->top_logprobs[0] = LogProbOf(distribution, drawn);
  output->rank = kernels.count_at_least(view.x, view.size, view.group_max, drawn);
  if (num_logprobs == 0) return;
  const int32_t count = RankTop(kernels, view, num_logprobs, workspace);
  for (int32_t i = 0; i < num_logprobs; ++i) {
    const Workspace::Ranked& ranked = workspace->ranked[static_cast<size_t>(std::min(i, count - 1))];
    output->top_ids[1 + i] = i < count ? ranked.token_id : -1;
    output->top_logprobs[1 + i] = i < count ? LogProbOf(distribution, ranked.x) : NegativeInfinity();
  }
}

}  // namespace twinjet::sampler
