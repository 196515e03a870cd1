// Launching a kernel of one argument struct on a shape.
#pragma once

#include <cuda_runtime.h>

#include "sampler/cuda/launch.h"

namespace twinjet::sampler::cuda {

template <class Args>
cudaError_t LaunchCluster(void (*kernel)(Args), const Args& args, const LaunchShape& shape,
                          cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.num_blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

// Each kernel file sets its own kernels' attributes.
cudaError_t SetSampleAttributes(const DeviceLimits& limits);
cudaError_t SetLogprobsAttributes(const DeviceLimits& limits);

// How many clusters of limits.max_cluster blocks with full slices the device can hold at once.
cudaError_t LargestClusters(const DeviceLimits& limits, int* num_clusters);

}  // namespace twinjet::sampler::cuda
