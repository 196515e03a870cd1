// Host entry to the sampler's kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "sampler/cuda/shape.h"

namespace twinjet::sampler::cuda {

// Limits of a device for these kernels; sets the kernels' attributes on it. Called once per device, not
// during a capture.
cudaError_t QueryLimits(int device, DeviceLimits* limits);

// How many clusters of `cluster` blocks with so much shared memory the current device runs at once; 0 where
// it cannot run any.
cudaError_t CountClusters(int32_t cluster, size_t shared_bytes, int* num_clusters);

// Asynchronous; capturable. Pointers are device pointers that stay valid until the kernel has run.
cudaError_t LaunchSample(const SampleArgs& args, const LaunchShape& shape, cudaStream_t stream);
cudaError_t LaunchLogprobs(const LogprobsArgs& args, const LaunchShape& shape, cudaStream_t stream);

}  // namespace twinjet::sampler::cuda
