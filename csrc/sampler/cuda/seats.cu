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
  TWINJET_TEAM void And(uint32_t* word, uint32_t bits) const { atomicAnd(word, bits); }
};

__global__ void __launch_bounds__(kTeam) PiecesKernel(SeatMemory memory) {
  const auto count = static_cast<int32_t>(memory.message->words[0]);
  for (auto i = static_cast<int32_t>(blockIdx.x); i < count; i += static_cast<int32_t>(gridDim.x)) {
    CopyPiece(BlockTeam(), memory, i);
  }
}

__global__ void __launch_bounds__(kTeam) BeginKernel(SeatMemory memory, int32_t vocab_size, DeviceRow* rows) {
  BeginRow(BlockTeam(), memory, static_cast<int32_t>(blockIdx.x), vocab_size, rows);
}

// Where a row has banned strings: -inf for what BeginRow's mask and edits rule out.
template <typename T>
__global__ void __launch_bounds__(kTeam) MaskKernel(SeatMemory memory, const DeviceRow* rows, T* logits,
                                                    int64_t row_stride, int32_t vocab_size, T lowest) {
  const auto row = static_cast<int32_t>(blockIdx.y);
  const StepRow& step = RowsOf(memory)[row];
  if (step.seat < 0 || memory.seats[step.seat].text_at < 0) return;
  const auto* edits = reinterpret_cast<const Edit*>(memory.arena);
  for (int32_t i = rows[row].edit_begin + static_cast<int32_t>(blockIdx.x * kTeam + threadIdx.x);
       i < rows[row].edit_end; i += static_cast<int32_t>(gridDim.x * kTeam)) {
    if ((edits[i].flags & kEditMasked) != 0) logits[row * row_stride + edits[i].token_id] = lowest;
  }
  if (rows[row].allowed_at < 0) return;
  const auto* mask = reinterpret_cast<const uint32_t*>(memory.arena + rows[row].allowed_at);
  for (auto token = static_cast<int32_t>(blockIdx.x * kTeam + threadIdx.x); token < vocab_size;
       token += static_cast<int32_t>(gridDim.x * kTeam)) {
    if ((mask[token / 32] >> (token % 32) & 1u) == 0) logits[row * row_stride + token] = lowest;
  }
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

cudaError_t LaunchPieces(const SeatMemory& memory, cudaStream_t stream) {
  PiecesKernel<<<64, kTeam, 0, stream>>>(memory);
  return cudaGetLastError();
}

cudaError_t LaunchBegin(const SeatMemory& memory, int32_t num_rows, int32_t vocab_size, DeviceRow* rows,
                        cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  BeginKernel<<<static_cast<unsigned>(num_rows), kTeam, 0, stream>>>(memory, vocab_size, rows);
  return cudaGetLastError();
}

cudaError_t LaunchMask(const SeatMemory& memory, int32_t num_rows, const DeviceRow* rows, void* logits,
                       int64_t row_stride, Dtype dtype, int32_t vocab_size, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  const dim3 grid(16, static_cast<unsigned>(num_rows));
  if (dtype == Dtype::kFloat32) {
    MaskKernel<<<grid, kTeam, 0, stream>>>(memory, rows, static_cast<float*>(logits), row_stride, vocab_size,
                                           NegativeInfinity());
  } else {
    const uint16_t lowest = dtype == Dtype::kFloat16 ? 0xfc00 : 0xff80;
    MaskKernel<<<grid, kTeam, 0, stream>>>(memory, rows, static_cast<uint16_t*>(logits), row_stride,
                                           vocab_size, lowest);
  }
  return cudaGetLastError();
}

cudaError_t LaunchEnd(const EndArgs& args, int32_t num_rows, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  EndKernel<<<static_cast<unsigned>(num_rows), kTeam, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace twinjet::sampler::cuda
