#include "sampler/kernels.h"

#include <cstdlib>

namespace twinjet::sampler {

std::vector<const Kernels*> AvailableKernels() {
  std::vector<const Kernels*> available;
#if defined(TWINJET_HAVE_X86_TARGETS)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
  if (has_avx512) available.push_back(&kAvx512Kernels);
  if (has_avx2) available.push_back(&kAvx2Kernels);
#endif
  available.push_back(&kScalarKernels);
  return available;
}

const Kernels* FindKernels(std::string_view name) {
  for (const Kernels* kernels : AvailableKernels()) {
    if (name == kernels->name) return kernels;
  }
  return nullptr;
}

const Kernels* DefaultKernels() {
  const char* forced = std::getenv("TWINJET_CPU_TARGET");
  if (forced != nullptr && *forced != '\0') return FindKernels(forced);
  return AvailableKernels().front();
}

}  // namespace twinjet::sampler
