// Edits of a row as the kernels take them: one entry for each token. Host only.
#pragma once

#include <vector>

#include "sampler/cuda/plan.h"
#include "sampler/row.h"

namespace twinjet::sampler::cuda {

// Appends a row's lists, joined into one entry for each token, in order of token.
void AppendEdits(const RowEdits& row, std::vector<Edit>* edits);

}  // namespace twinjet::sampler::cuda
