// Host entry to the sampler's kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "sampler/cuda/seats.h"
#include "sampler/cuda/shape.h"

namespace twinjet::sampler::cuda {

// Limits of a device for these kernels; sets the kernels' attributes on it. Called once per device, not
// during a capture.
cudaError_t QueryLimits(int device, DeviceLimits* limits);

// How many clusters of `cluster` blocks with so much shared memory the current device runs at once; 0 where
// it cannot run any.
cudaError_t CountClusters(int32_t cluster, size_t shared_bytes, int* num_clusters);

// Asynchronous; capturable. Pointers are device pointers that stay valid until the kernel has run.
cudaError_t LaunchSample(const SampleArgs& args, const LaunchShape& shape, cudaStream_t stream);
cudaError_t LaunchLogprobs(const LogprobsArgs& args, const LaunchShape& shape, cudaStream_t stream);

// What follows a draw: the seats' histories, and the results in the forms that engines want. drawn: the
// tokens of LaunchSample; null where another sampler drew `foreign` (then only histories are kept).
struct EndArgs {
  SeatMemory memory = {};
  const int32_t* drawn = nullptr;
  const uint32_t* status = nullptr;
  const void* foreign = nullptr;
  int64_t foreign_stride = 1;       // elements
  int32_t foreign_bits = 32;        // or 64
  int64_t* tokens64 = nullptr;      // [num_rows] or null; 0 where no token is admissible
  int32_t* tokens32 = nullptr;      // the same
  int32_t* num_sampled = nullptr;   // [num_rows] or null: 1 for rows that advance
  int32_t* num_rejected = nullptr;  // [num_rows], with num_sampled: 0
  uint32_t* host_status = nullptr;  // [num_rows] in mapped host memory
};

// memory.message: of SeatTable::BuildPieces.
cudaError_t LaunchPieces(const SeatMemory& memory, cudaStream_t stream);

// rows: receives the rows for LaunchSample; null where nothing is drawn.
cudaError_t LaunchBegin(const SeatMemory& memory, int32_t num_rows, int32_t vocab_size, DeviceRow* rows,
                        cudaStream_t stream);

// After LaunchBegin with the same rows, for a sampler that is not ours: writes -inf over the logits of tokens
// that a row with banned strings may not have.
cudaError_t LaunchMask(const SeatMemory& memory, int32_t num_rows, const DeviceRow* rows, void* logits,
                       int64_t row_stride, Dtype dtype, int32_t vocab_size, cudaStream_t stream);
cudaError_t LaunchEnd(const EndArgs& args, int32_t num_rows, cudaStream_t stream);

}  // namespace twinjet::sampler::cuda
