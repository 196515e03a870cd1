#include "sampler/cuda/shape.h"

namespace twinjet::sampler::cuda {
namespace {

// Three slices of this size and their blocks' other shared memory fit a multiprocessor of 228 KiB.
constexpr int32_t kGroupsOfThreePerMultiprocessor = 63;
constexpr int32_t kNarrowGroupsOfThreePerMultiprocessor = 126;
// One block has little room for the tokens that a search by mass keeps: top-p alone on rows of 32,000 takes
// twice as long in one block as in two.
constexpr int32_t kMostGroupsOfOneBlock = 63;
// Below this a block's fixed costs outweigh its share of the row.
constexpr int32_t kLeastGroupsPerBlock = 8;

}  // namespace

LaunchShape ChooseShape(const DeviceLimits& limits, int32_t num_rows, int32_t vocab_size,
                        int32_t force_cluster, bool keeps_narrow) {
  const int32_t most_groups =
      keeps_narrow ? kNarrowGroupsOfThreePerMultiprocessor : kGroupsOfThreePerMultiprocessor;
  const size_t item_bytes = keeps_narrow ? 2 : 4;
  const int32_t num_groups = NumGroups(vocab_size);
  LaunchShape shape;
  shape.cluster = 1;
  if (force_cluster > 0) {
    shape.cluster = force_cluster;
  } else {
    // Large batches: as few blocks a row as leave room for three blocks on a multiprocessor. Small ones:
    // as many as there are multiprocessors for.
    while (shape.cluster < limits.max_cluster &&
           (DivideUp(num_groups, shape.cluster) > most_groups ||
            (shape.cluster == 1 && num_groups > kMostGroupsOfOneBlock) ||
            (num_rows * shape.cluster * 2 <= limits.num_multiprocessors &&
             DivideUp(num_groups, shape.cluster * 2) >= kLeastGroupsPerBlock))) {
      shape.cluster *= 2;
    }
  }
  shape.groups_per_block = DivideUp(num_groups, shape.cluster);
  shape.on_chip =
      LayOutShared(shape.groups_per_block, shape.cluster, true, item_bytes).total <= limits.max_shared_bytes;
  if (!shape.on_chip) {
    shape.cluster = 1;
    shape.groups_per_block = num_groups;
  }
  shape.shared_bytes = LayOutShared(shape.groups_per_block, shape.cluster, shape.on_chip, item_bytes).total;
  shape.keeps_narrow = keeps_narrow && shape.on_chip;
  shape.num_blocks = num_rows * shape.cluster;
  if (!shape.on_chip && shape.num_blocks > 2 * limits.num_multiprocessors) {
    shape.num_blocks = 2 * limits.num_multiprocessors;  // blocks go from row to row; scratch is per block
  }
  return shape;
}

size_t ScratchFloats(const LaunchShape& shape, int32_t vocab_size) {
  if (shape.on_chip) return 0;
  return static_cast<size_t>(shape.num_blocks) * static_cast<size_t>(NumGroups(vocab_size)) * kGroupSize;
}

}  // namespace twinjet::sampler::cuda
