#include "sampler/simd_avx2.h"
// After the vector types.
#include "sampler/simd_kernels.h"

namespace twinjet::sampler {

const Kernels kAvx2Kernels = {"avx2",  Scan,  GroupMasses,  WeighGroups, SplitMasses,
                              Collect, Weigh, CountAtLeast, Race};

}  // namespace twinjet::sampler
