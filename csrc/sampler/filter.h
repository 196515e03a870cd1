// Steps 7 to 10 on a prepared row: which tokens stay, and the race among them.
#pragma once

#include <cstdint>

#include "sampler/row.h"

namespace twinjet::sampler {

struct Draw {
  int32_t token_id;
  float threshold;     // tokens with x >= threshold were kept
  uint64_t kept_mass;  // the sum of their weights
};

// view.max is finite and constants are not greedy.
Draw FilterAndDraw(const Kernels& kernels, const RowView& view, const RowConstants& constants,
                   Workspace* workspace);

// The least token id with x == view.max.
int32_t FirstMaximum(const RowView& view);

// Lists tokens with x >= some threshold so that, if the row has that many finite ones, at least k are
// listed, in workspace->list_x and list_id. Returns their number.
int32_t CollectTop(const Kernels& kernels, const RowView& view, int32_t k, float least, Workspace* workspace);

}  // namespace twinjet::sampler
