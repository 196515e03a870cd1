// The sampling kernel: a row per cluster, one read of the logits from memory.

#include "sampler/cuda/launch.cuh"
#include "sampler/cuda/row.cuh"

namespace twinjet::sampler::cuda {
namespace {

__device__ __forceinline__ void WriteProcessed(const Block& block, const SampleArgs& args, int32_t row) {
  float* out = args.processed_logits + static_cast<int64_t>(row) * args.vocab_size;
  const int32_t first = block.first_group * kGroupSize;
  const int32_t left = args.vocab_size - first;
  const int32_t size = left < block.num_local * kGroupSize ? left : block.num_local * kGroupSize;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < size; i += kThreads)
    out[first + i] = block.slice[i];
}

// Draws the rows first, first + stride and so on; the blocks of a cluster call this together. The race among
// the tokens of one row is run while the next row's maxima are exchanged.
__device__ __forceinline__ void SampleRows(Block& block, const SampleArgs& args, int32_t first,
                                           int32_t stride) {
  RaceUnderWay race;
  for (int32_t row = first; row < args.num_rows; row += stride) {
    const DeviceRow& input = WaitRow(block, args, row);
    const RowConstants& constants = input.constants;
    double own_exponential = 0.0;
    const RowState state = PrepareSlice(block, args, input, row, true, [&] {
      own_exponential = GroupExponential(block, constants);
      FinishRace(block, args, race);
    });
    race.row = -1;
    if (args.processed_logits != nullptr) WriteProcessed(block, args, row);
    float threshold = NegativeInfinity();
    if ((state.status & kStatusNoToken) == 0) {
      if (constants.is_greedy != 0) {
        WriteFirstMaximum(block, args, row, state.max);
        if (constants.scale != 0.0f) threshold = state.max;  // top_k = 1
      } else {
        threshold = KeepThreshold(block, constants, state.max, args.vocab_size);
        race.row = row;
        race.constants = &constants;
        race.max = state.max;
        race.threshold = threshold;
        RaceGroups(block, race, own_exponential);
      }
    }
    if (block.cluster.rank == 0 && threadIdx.x == 0) {
      if ((state.status & kStatusNoToken) != 0) args.token_ids[row] = -1;
      args.status[row] = state.status;
      if (args.info != nullptr) args.info[row].threshold = threshold;
    }
    if (block.copies) FenceForCopies();
    __syncthreads();  // the slice is free
    if (block.copies && threadIdx.x == kCopyThread) StartRow(block, args, row + stride, row + 2 * stride);
  }
  FinishRace(block, args, race);
}

__global__ void __launch_bounds__(kThreads, 3) SampleOnChipKernel(const __grid_constant__ SampleArgs args) {
  extern __shared__ __align__(16) char shared[];
  Block block = MakeBlock(shared, args, ThisCluster(), true);
  const int32_t row = static_cast<int32_t>(blockIdx.x / block.cluster.size);
  const int32_t stride = static_cast<int32_t>(gridDim.x / block.cluster.size);
  StartBlock(block, args, row, row + stride);
  SampleRows(block, args, row, stride);
}

// Slices do not fit on chip: one block a row, its slice in scratch memory.
__global__ void __launch_bounds__(kThreads) SampleInMemoryKernel(const __grid_constant__ SampleArgs args) {
  extern __shared__ __align__(16) char shared[];
  Block block = MakeBlock(shared, args, {0, 1}, false);
  const int32_t row = static_cast<int32_t>(blockIdx.x);
  const int32_t stride = static_cast<int32_t>(gridDim.x);
  block.slice = args.scratch + static_cast<int64_t>(row) * block.groups_per_block * kGroupSize;
  StartBlock(block, args, row, row + stride);
  SampleRows(block, args, row, stride);
}

}  // namespace

cudaError_t SetSampleAttributes(const DeviceLimits& limits) {
  const int bytes = static_cast<int>(limits.max_shared_bytes);
  for (auto* kernel : {&SampleOnChipKernel, &SampleInMemoryKernel}) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  if (limits.max_cluster > 8) {
    return cudaFuncSetAttribute(SampleOnChipKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
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
  return cudaOccupancyMaxActiveClusters(num_clusters, SampleOnChipKernel, &config);
}

cudaError_t LaunchSample(const SampleArgs& args, const LaunchShape& shape, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  SampleArgs full = args;
  full.groups_per_block = shape.groups_per_block;
  return LaunchCluster(shape.on_chip ? SampleOnChipKernel : SampleInMemoryKernel, full, shape, stream);
}

}  // namespace twinjet::sampler::cuda
