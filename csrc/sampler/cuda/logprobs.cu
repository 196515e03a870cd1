// The logprobs kernel: reads the rows once more, after the draw, and only where logprobs are asked for.
#include "sampler/cuda/launch.cuh"
#include "sampler/cuda/logprobs.cuh"

namespace twinjet::sampler::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 3)
    LogprobsOnChipKernel(const __grid_constant__ LogprobsArgs args) {
  extern __shared__ __align__(128) char shared[];
  Block block = MakeBlock(shared, args.sample, ThisCluster(), true);
  LogprobsOfRows(block, args, static_cast<int32_t>(blockIdx.x / block.cluster.size),
                 static_cast<int32_t>(gridDim.x / block.cluster.size));
}

__global__ void __launch_bounds__(kThreads)
    LogprobsInMemoryKernel(const __grid_constant__ LogprobsArgs args) {
  extern __shared__ __align__(128) char shared[];
  Block block = MakeBlock(shared, args.sample, {0, 1}, false);
  block.slice = args.sample.scratch + static_cast<int64_t>(blockIdx.x) * block.groups_per_block * kGroupSize;
  LogprobsOfRows(block, args, static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(gridDim.x));
}

}  // namespace

cudaError_t SetLogprobsAttributes(const DeviceLimits& limits) {
  const int bytes = static_cast<int>(limits.max_shared_bytes);
  for (auto* kernel : {&LogprobsOnChipKernel, &LogprobsInMemoryKernel}) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  if (limits.max_cluster > 8) {
    return cudaFuncSetAttribute(LogprobsOnChipKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return cudaSuccess;
}

cudaError_t LaunchLogprobs(const LogprobsArgs& args, const LaunchShape& shape, cudaStream_t stream) {
  if (args.sample.num_rows == 0) return cudaSuccess;
  LogprobsArgs full = args;
  full.sample.groups_per_block = shape.groups_per_block;
  return LaunchCluster(shape.on_chip ? LogprobsOnChipKernel : LogprobsInMemoryKernel, full, shape, stream);
}

}  // namespace twinjet::sampler::cuda
