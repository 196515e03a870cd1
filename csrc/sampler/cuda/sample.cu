// The sampling kernel: a row per cluster, one read of the logits from memory.

#include <span>

#include "sampler/cuda/launch.cuh"
#include "sampler/cuda/row.cuh"

namespace twinjet::sampler::cuda {
namespace {

template <Dtype kStored>
__device__ __forceinline__ void WriteProcessed(const Block& block, const SampleArgs& args, int32_t row) {
  float* out = args.processed_logits + static_cast<int64_t>(row) * args.vocab_size;
  const int32_t first = block.first_group * kGroupSize;
  const int32_t left = args.vocab_size - first;
  const int32_t size = left < block.num_local * kGroupSize ? left : block.num_local * kGroupSize;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < size; i += kThreads)
    out[first + i] = TokenOf<kStored>(block, i);
}

// Draws rows; the blocks of a cluster, number `cluster` of num_clusters, call this together. The race among
// the tokens of one row is run while the next row's maxima are exchanged.
template <Family kFamily, bool kNarrow, Dtype kStored>
__device__ __forceinline__ void SampleRows(Block& block, const SampleArgs& args, int32_t cluster,
                                           int32_t num_clusters) {
  const bool claims = block.copies && args.num_claims != nullptr;
  const bool copies = block.copies && threadIdx.x == kCopyThread;
  // Blocks of a multiprocessor that start together stay together: they copy at the same time and compute at
  // the same time. The clusters of a wave have a place on each multiprocessor.
  const int32_t wave = cluster * args.num_waves / num_clusters;
  StartBlock(block, args, cluster, wave * args.cycles_per_wave);
  int32_t row = cluster, next = cluster + num_clusters;
  if (copies && claims && block.cluster.rank == 0) ClaimRow(block, args, num_clusters);
  if (copies && !claims) PrefetchRow(block, args, next);
  RaceUnderWay race;
  while (row < args.num_rows) {
    const DeviceRow& input = WaitRow(block, args, row);
    const RowConstants& constants = input.constants;
    double own_exponential = 0.0;
    const RowState state = PrepareSlice<kNarrow, kStored>(block, args, input, row, true, [&] {
      if (kFamily == Family::kGreedy) return;
      own_exponential = GroupExponential(block, constants);
      FinishRace(block, args, race);
    });
    if (claims) {
      next = ClaimedRow(block);
      if (copies) PrefetchRow(block, args, next);
    }
    race.row = -1;
    if (args.processed_logits != nullptr) WriteProcessed<kStored>(block, args, row);
    float threshold = NegativeInfinity();
    if ((state.status & kStatusNoToken) == 0) {
      if (kFamily == Family::kGreedy || constants.is_greedy != 0) {
        WriteFirstMaximum<kStored>(block, args, row, state.max);
        if (constants.scale != 0.0f) threshold = state.max;  // top_k = 1
      } else {
        threshold = KeepThreshold<kFamily, kStored>(block, constants, state.max, args.vocab_size);
        race.row = row;
        race.constants = &constants;
        race.max = state.max;
        race.threshold = threshold;
        RaceGroups<kStored>(block, race, own_exponential);
      }
    }
    if (block.cluster.rank == 0 && threadIdx.x == 0) {
      if ((state.status & kStatusNoToken) != 0) args.token_ids[row] = -1;
      args.status[row] = state.status;
      if (args.info != nullptr) args.info[row].threshold = threshold;
    }
    if (block.copies) FenceForCopies();
    __syncthreads();  // the slice is free
    row = next;
    next += num_clusters;
    if (copies) {
      StartRow(block, args, row);
      if (!claims) {
        PrefetchRow(block, args, next);
      } else if (row < args.num_rows && block.cluster.rank == 0) {
        ClaimRow(block, args, num_clusters);
      }
    }
  }
  if (kFamily != Family::kGreedy) FinishRace(block, args, race);
}

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
