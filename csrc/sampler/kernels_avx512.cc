#include "sampler/simd_avx512.h"
// After the vector types.
#include "sampler/simd_kernels.h"

namespace twinjet::sampler {

const Kernels kAvx512Kernels = {"avx512", Scan,  GroupMasses,  WeighGroups, SplitMasses,
                                Collect,  Weigh, CountAtLeast, Race};

}  // namespace twinjet::sampler
