// Orders block copies for a device that makes many at once. Needs no CUDA.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kv/block_manager.h"

namespace twinjet::kv::cuda {

// Copies that may run at the same time: copies[begin .. end).
struct CopyPlan {
  std::vector<BlockCopy> copies;
  std::vector<int32_t> wave_ends;  // ascending; the last is copies.size()
};

// Splits a list that means "one after the other" (as the block manager's lists do) into waves without a block
// that one copy of the wave writes and another reads or writes. Copies of a block onto itself are left out.
// Within a wave and across waves the result is that of the list in order.
CopyPlan PlanCopies(std::span<const BlockCopy> copies);

}  // namespace twinjet::kv::cuda
