// The steps before and after a draw, a block a row.
#include <cuda_runtime.h>

#include "sampler/cuda/launch.h"

namespace twinjet::sampler::cuda {
namespace {

constexpr int kTeam = 128;

struct BlockTeam {
  TWINJET_TEAM int32_t rank() const { return static_cast<int32_t>(threadIdx.x); }
  TWINJET_TEAM int32_t size() const { return kTeam; }
  TWINJET_TEAM void Sync() const { __syncthreads(); }
  TWINJET_TEAM bool Any(bool value) const { return __syncthreads_or(value) != 0; }
  TWINJET_TEAM void Or(uint32_t* word, uint32_t bits) const { atomicOr(word, bits); }
};

__global__ void __launch_bounds__(kTeam) BeginKernel(SeatMemory memory, DeviceRow* rows) {
  BeginRow(BlockTeam(), memory, static_cast<int32_t>(blockIdx.x), rows);
}

__global__ void __launch_bounds__(kTeam) EndKernel(const __grid_constant__ EndArgs args) {
  const auto row = static_cast<int32_t>(blockIdx.x);
  const int32_t token =
      args.drawn != nullptr ? args.drawn[row]
      : args.foreign_bits == 64
          ? static_cast<int32_t>(static_cast<const int64_t*>(args.foreign)[row * args.foreign_stride])
          : static_cast<const int32_t*>(args.foreign)[row * args.foreign_stride];
  EndRow(BlockTeam(), args.memory, row, token);
  if (threadIdx.x != 0 || args.drawn == nullptr) return;
  const int32_t admissible = token < 0 ? 0 : token;
  if (args.tokens64 != nullptr) args.tokens64[row] = admissible;
  if (args.tokens32 != nullptr) args.tokens32[row] = admissible;
  if (args.num_sampled != nullptr) {
    args.num_sampled[row] = (RowsOf(args.memory)[row].flags & kStepAdvances) != 0 ? 1 : 0;
    args.num_rejected[row] = 0;
  }
  args.host_status[row] = args.status[row];
}

}  // namespace

cudaError_t LaunchBegin(const SeatMemory& memory, int32_t num_rows, DeviceRow* rows, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  BeginKernel<<<static_cast<unsigned>(num_rows), kTeam, 0, stream>>>(memory, rows);
  return cudaGetLastError();
}

cudaError_t LaunchEnd(const EndArgs& args, int32_t num_rows, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  EndKernel<<<static_cast<unsigned>(num_rows), kTeam, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace twinjet::sampler::cuda
