// The sampling kernel: a row per cluster, one read of the logits from memory.

#include <span>

#include "sampler/cuda/draw.cuh"
#include "sampler/cuda/launch.cuh"

namespace twinjet::sampler::cuda {
namespace {

template <Family kFamily, bool kNarrow, Dtype kStored>
__global__ void __launch_bounds__(kThreads, 3) SampleOnChipKernel(const __grid_constant__ SampleArgs args) {
  extern __shared__ __align__(128) char shared[];
  Block block = MakeBlock(shared, args, ThisCluster(), true);
  SampleRows<kFamily, kNarrow, kStored>(block, args, static_cast<int32_t>(blockIdx.x / block.cluster.size),
                                        static_cast<int32_t>(gridDim.x / block.cluster.size));
}

// Slices do not fit on chip: one block a row, its slice in scratch memory.
template <bool kNarrow>
__global__ void __launch_bounds__(kThreads) SampleInMemoryKernel(const __grid_constant__ SampleArgs args) {
  extern __shared__ __align__(128) char shared[];
  Block block = MakeBlock(shared, args, {0, 1}, false);
  block.slice = args.scratch + static_cast<int64_t>(blockIdx.x) * block.groups_per_block * kGroupSize;
  SampleRows<Family::kAny, kNarrow, Dtype::kFloat32>(block, args, static_cast<int32_t>(blockIdx.x),
                                                     static_cast<int32_t>(gridDim.x));
}

using Kernel = void (*)(SampleArgs);
// By what the slices hold: float32 of float32 or of 16-bit rows, float16, bfloat16.
constexpr int kNumForms = 4;
template <Family kFamily>
constexpr Kernel kForms[kNumForms] = {
    SampleOnChipKernel<kFamily, false, Dtype::kFloat32>, SampleOnChipKernel<kFamily, true, Dtype::kFloat32>,
    SampleOnChipKernel<kFamily, true, Dtype::kFloat16>, SampleOnChipKernel<kFamily, true, Dtype::kBfloat16>};
constexpr const Kernel* kOnChip[3] = {kForms<Family::kGreedy>, kForms<Family::kOpen>, kForms<Family::kAny>};
constexpr Kernel kInMemory[2] = {SampleInMemoryKernel<false>, SampleInMemoryKernel<true>};

}  // namespace

cudaError_t SetSampleAttributes(const DeviceLimits& limits) {
  const int bytes = static_cast<int>(limits.max_shared_bytes);
  for (const Kernel* family : kOnChip) {
    for (const Kernel kernel : std::span(family, kNumForms)) {
      cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      if (error == cudaSuccess && limits.max_cluster > 8)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      if (error != cudaSuccess) return error;
    }
  }
  for (const Kernel kernel : kInMemory) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t CountClusters(int32_t cluster, size_t shared_bytes, int* num_clusters) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  // Registers bound no family: shared memory does, and it is the same for all.
  return cudaOccupancyMaxActiveClusters(num_clusters,
                                        SampleOnChipKernel<Family::kAny, false, Dtype::kFloat32>, &config);
}

cudaError_t LaunchSample(const SampleArgs& args, const LaunchShape& shape, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  SampleArgs full = args;
  full.groups_per_block = shape.groups_per_block;
  full.keeps_narrow = shape.keeps_narrow;
  const bool is_narrow = args.dtype != Dtype::kFloat32;
  if (!shape.on_chip) return LaunchCluster(kInMemory[is_narrow], full, shape, stream);
  const int form = !is_narrow ? 0 : !shape.keeps_narrow ? 1 : args.dtype == Dtype::kFloat16 ? 2 : 3;
  return LaunchCluster(kOnChip[static_cast<int>(args.family)][form], full, shape, stream);
}

}  // namespace twinjet::sampler::cuda
