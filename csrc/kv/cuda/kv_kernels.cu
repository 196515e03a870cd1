#include <cuda_runtime.h>

#include "kv/cuda/kv_kernels.h"

namespace twinjet::kv::cuda {
namespace {

constexpr int kThreads = 256;
// A copy's share of one block of threads: four 16-byte words a thread in flight.
constexpr int64_t kBytesPerBlock = kThreads * 16 * 4;

// Grid: (shares of a page, copies, planes). Word is the widest that everything is aligned to.
template <typename Word>
__global__ void __launch_bounds__(kThreads) CopyBlocksKernel(KvPlanes cache, const BlockCopy* copies) {
  const BlockCopy copy = copies[blockIdx.y];
  char* plane = static_cast<char*>(cache.planes[blockIdx.z]);
  const auto* source = reinterpret_cast<const Word*>(plane + copy.source * cache.block_stride);
  auto* destination = reinterpret_cast<Word*>(plane + copy.destination * cache.block_stride);
  constexpr int64_t kWords = kBytesPerBlock / static_cast<int64_t>(sizeof(Word));
  const int64_t begin = blockIdx.x * kWords + threadIdx.x;
  const int64_t total = cache.block_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t end = (blockIdx.x + 1) * kWords < total ? (blockIdx.x + 1) * kWords : total;
#pragma unroll 4
  for (int64_t i = begin; i < end; i += kThreads) destination[i] = source[i];
}

__global__ void __launch_bounds__(kThreads) MapSlotsKernel(SlotMapping mapping) {
  const int32_t sequence = static_cast<int32_t>(blockIdx.x);
  if (sequence == mapping.num_sequences) {
    for (int32_t i = mapping.query_start[sequence] + static_cast<int32_t>(threadIdx.x); i < mapping.num_slots;
         i += kThreads) {
      mapping.slots[i] = -1;
    }
    return;
  }
  const int32_t begin = mapping.query_start[sequence];
  const int32_t end = mapping.query_start[sequence + 1];
  const int32_t* table = mapping.block_tables + sequence * mapping.table_stride;
  const int64_t first = mapping.first_position[sequence];
  for (int32_t i = begin + static_cast<int32_t>(threadIdx.x); i < end; i += kThreads) {
    const int64_t position = first + (i - begin);
    const int64_t page = position / mapping.block_size;
    const int32_t block = page < mapping.max_blocks ? table[page] : kNoBlock;
    mapping.slots[i] =
        block < 0 ? -1 : static_cast<int64_t>(block) * mapping.block_size + position % mapping.block_size;
  }
}

}  // namespace

cudaError_t CopyBlocks(const KvPlanes& cache, const BlockCopy* copies, int32_t num_copies,
                       cudaStream_t stream) {
  if (num_copies == 0 || cache.num_planes == 0 || cache.block_bytes == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((cache.block_bytes + kBytesPerBlock - 1) / kBytesPerBlock),
                  static_cast<unsigned>(num_copies), static_cast<unsigned>(cache.num_planes));
  if (grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidValue;
  // Plane addresses come from allocators and are aligned to 16 bytes at least; strides decide.
  if ((cache.block_stride | cache.block_bytes) % 16 == 0) {
    CopyBlocksKernel<uint4><<<grid, kThreads, 0, stream>>>(cache, copies);
  } else {
    CopyBlocksKernel<char><<<grid, kThreads, 0, stream>>>(cache, copies);
  }
  return cudaGetLastError();
}

cudaError_t MapSlots(const SlotMapping& mapping, cudaStream_t stream) {
  if (mapping.num_slots == 0) return cudaSuccess;
  MapSlotsKernel<<<static_cast<unsigned>(mapping.num_sequences + 1), kThreads, 0, stream>>>(mapping);
  return cudaGetLastError();
}

}  // namespace twinjet::kv::cuda
