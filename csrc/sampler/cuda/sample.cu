// The sampling kernel: a row per cluster, one read of the logits from memory.
#include "sampler/cuda/launch.cuh"
#include "sampler/cuda/row.cuh"

namespace twinjet::sampler::cuda {
namespace {

// The blocks of a cluster call this together.
__device__ __forceinline__ void SampleRow(Block& block, const SampleArgs& args, int32_t row) {
  const DeviceRow& input = args.rows[row];
  const RowConstants constants = input.constants;
  const double own_exponential = GroupExponential(block, constants);
  const RowState state = PrepareSlice(block, args, input, row, true);
  if (args.processed_logits != nullptr) {
    float* out = args.processed_logits + static_cast<int64_t>(row) * args.vocab_size;
    const int32_t first = block.first_group * kGroupSize;
    const int32_t left = args.vocab_size - first;
    const int32_t size = left < block.num_local * kGroupSize ? left : block.num_local * kGroupSize;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < size; i += kThreads)
      out[first + i] = block.slice[i];
  }
  float threshold = NegativeInfinity();
  int32_t token = -1;
  bool has_arrived = false;
  if ((state.status & kStatusNoToken) == 0) {
    if (constants.is_greedy != 0) {
      token = FirstMaximum(block, state);
      if (constants.scale != 0.0f) threshold = state.max;  // top_k = 1
    } else {
      threshold = KeepThreshold(block, constants, state.max, args.vocab_size);
      // Searches read other blocks' memory: no block may end before all are past them.
      has_arrived = constants.top_k > 0 || constants.has_top_p != 0;
      if (has_arrived) ClusterArriveRelaxed(block.cluster);
      token = DrawToken(block, constants, state.max, threshold, own_exponential);
    }
  }
  if (has_arrived) ClusterWait(block.cluster);
  if (threadIdx.x != 0) return;
  if (token >= 0) args.token_ids[row] = token;
  if (block.cluster.rank == 0) {
    if ((state.status & kStatusNoToken) != 0) args.token_ids[row] = -1;
    args.status[row] = state.status;
    if (args.info != nullptr) args.info[row].threshold = threshold;
  }
}

__global__ void __launch_bounds__(kThreads, 3) SampleOnChipKernel(const __grid_constant__ SampleArgs args) {
  extern __shared__ __align__(16) char shared[];
  Block block = MakeBlock(shared, args, true);
  const int32_t row = static_cast<int32_t>(blockIdx.x / block.cluster.size);
  StartRow(block, args, row);
  SampleRow(block, args, row);
}

// Slices do not fit on chip: one block a row, its slice in scratch memory.
__global__ void __launch_bounds__(kThreads) SampleInMemoryKernel(const __grid_constant__ SampleArgs args) {
  extern __shared__ __align__(16) char shared[];
  Block block = MakeBlock(shared, args, false);
  block.cluster = {0, 1};
  block.slice = args.scratch + static_cast<int64_t>(blockIdx.x) * block.num_groups * kGroupSize;
  for (int32_t row = static_cast<int32_t>(blockIdx.x); row < args.num_rows;
       row += static_cast<int32_t>(gridDim.x)) {
    SampleRow(block, args, row);
    __syncthreads();
  }
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

cudaError_t LargestClusters(const DeviceLimits& limits, int* num_clusters) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(limits.max_cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = limits.max_shared_bytes;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(limits.max_cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(num_clusters, SampleOnChipKernel, &config);
}

cudaError_t LaunchSample(const SampleArgs& args, const LaunchShape& shape, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  SampleArgs full = args;
  full.groups_per_block = shape.groups_per_block;
  full.rows_in_flight = shape.rows_in_flight;
  return LaunchCluster(shape.on_chip ? SampleOnChipKernel : SampleInMemoryKernel, full, shape, stream);
}

}  // namespace twinjet::sampler::cuda
