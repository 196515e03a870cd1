// How a batch is cut into blocks and clusters. Pure arithmetic, no CUDA needed.
#pragma once

#include "sampler/cuda/plan.h"

namespace twinjet::sampler::cuda {

// force_cluster: 0 chooses; otherwise a power of two up to limits.max_cluster. keeps_narrow: slices hold 16
// bits a token, where they fit on chip.
LaunchShape ChooseShape(const DeviceLimits& limits, int32_t num_rows, int32_t vocab_size,
                        int32_t force_cluster, bool keeps_narrow = false);

// Floats of scratch memory that a shape needs; 0 on chip.
size_t ScratchFloats(const LaunchShape& shape, int32_t vocab_size);

}  // namespace twinjet::sampler::cuda
