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

}  // namespace twinjet::sampler::cuda
