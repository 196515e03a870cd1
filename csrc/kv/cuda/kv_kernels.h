// Block copies and slot mappings on a device. Asynchronous on the caller's stream, capturable; nothing is
// allocated. All pointers are device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include "kv/block_manager.h"

namespace twinjet::kv::cuda {

// A KV cache as planes: memory where block b starts at plane + b * block_stride and has block_bytes bytes
// that belong together. [2, num_blocks, block_size, heads, head_size] of one layer is two planes;
// [num_blocks, 2, block_size, heads, head_size] is one of twice the bytes; all layers of a model are as many
// planes more. Keys and values may have different sizes: launch once for each.
struct KvPlanes {
  void* const* planes = nullptr;  // [num_planes]
  int32_t num_planes = 0;
  int64_t block_stride = 0;  // bytes
  int64_t block_bytes = 0;
};

// One wave of copies of a CopyPlan, in every plane. Block ids must lie within the planes.
cudaError_t CopyBlocks(const KvPlanes& cache, const BlockCopy* copies, int32_t num_copies,
                       cudaStream_t stream);

// slots[query_start[s] + i] = slot of position first_position[s] + i of sequence s, for query_start[s] + i <
// query_start[s + 1]: block id * block_size + offset, or -1 where the table has no block for it (a
// negative id). slots[query_start[num_sequences] .. num_slots) become -1: padding of a captured batch.
struct SlotMapping {
  const int32_t* block_tables = nullptr;  // [num_sequences, max_blocks], rows table_stride apart
  int64_t table_stride = 0;
  int32_t max_blocks = 0;
  const int32_t* query_start = nullptr;     // [num_sequences + 1], from 0, ascending
  const int64_t* first_position = nullptr;  // [num_sequences]
  int32_t num_sequences = 0;
  int32_t block_size = 0;
  int64_t* slots = nullptr;  // [num_slots]
  int32_t num_slots = 0;
};

cudaError_t MapSlots(const SlotMapping& mapping, cudaStream_t stream);

}  // namespace twinjet::kv::cuda
