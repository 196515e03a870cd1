// Log probabilities and ranks from the same integer masses that draws use.
#pragma once

#include <cstdint>

#include "sampler/row.h"

namespace twinjet::sampler {

// A distribution over a view's tokens: those with x >= threshold, at a temperature.
struct Distribution {
  const RowView* view;
  float temperature;
  float threshold;  // -inf keeps all
  double ln_mass;
};

// All of a view at a temperature. The view may hold nothing finite; then every logprob is -inf.
Distribution WholeRow(const Kernels& kernels, const RowView& view, float temperature, float scale,
                      Workspace* workspace);

// Fills output->top_ids[1 ..], top_logprobs and rank; output->token_id is a token of the view.
void FillLogprobs(const Kernels& kernels, const Distribution& distribution, int32_t num_logprobs,
                  Workspace* workspace, RowOutput* output);

}  // namespace twinjet::sampler
