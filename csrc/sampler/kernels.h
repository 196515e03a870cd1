// The loops over a row that are written once per instruction set, and the choice among them.
// Every target gives the same bits; which one runs is a matter of speed alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "sampler/spec.h"

namespace twinjet::sampler {

// Kernels may write this many elements past the end of a list they fill.
constexpr size_t kListSlack = 16;

struct Kernels {
  const char* name;

  // Reads n logits of a dtype as float32 with NaN as -inf and, where mask (bit i of word i / 32, 1 =
  // allowed; null allows all) has a 0, as -inf. Writes them to out unless it is null, which needs
  // float32 without a mask, and each group's maximum to group_max[ceil(n / 256)]. Returns whether
  // any logit, masked or not, was NaN; with out null a NaN is only left out of the maximum.
  bool (*scan)(const void* source, Dtype dtype, int32_t n, const uint32_t* mask, float* out,
               float* group_max);

  // masses[g] = sum of the weights of group g's tokens with x >= threshold. max is finite. ahead is n floats
  // that are read next, or null: they are brought into the cache meanwhile.
  void (*group_masses)(const float* x, int32_t n, const float* group_max, float max, float scale,
                       float threshold, const float* ahead, uint64_t* masses);

  // As group_masses, and keeps weights[i] = weight of x[i] where x[i] >= threshold, else 0, exact as floats.
  // The weights of groups without mass are not written.
  void (*weigh_groups)(const float* x, int32_t n, const float* group_max, float max, float scale,
                       float threshold, float* weights, uint64_t* masses);

  // For the weights and masses of weigh_groups: above[g] = the mass of group g's tokens with x >= high,
  // and a list of the tokens with low <= x < high in groups with mass, in order of id. Returns their
  // number. low <= high; the list needs room for n + kListSlack.
  int32_t (*split_masses)(const float* x, const float* weights, int32_t n, const float* group_max,
                          const uint64_t* masses, float low, float high, uint64_t* above, int32_t* out_id);

  // Lists the tokens with threshold <= x < below in order of id. Returns their number. Both lists need room
  // for n + kListSlack.
  int32_t (*collect)(const float* x, int32_t n, const float* group_max, float threshold, float below,
                     float* out_x, int32_t* out_id);

  // weights[i] = weight of x[i], exact as a float. max is finite.
  void (*weigh)(const float* x, int32_t n, float max, float scale, float* weights);

  // The number of tokens with x >= value.
  int32_t (*count_at_least)(const float* x, int32_t n, const float* group_max, float value);

  // The place in the list of the race's winner; indices ascend, masses are integers in 1 .. 2^53.
  int32_t (*race)(const RaceKey& key, const uint32_t* indices, const double* masses, int32_t n);
};

extern const Kernels kScalarKernels;
#if defined(TWINJET_HAVE_X86_TARGETS)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// What this build and this CPU have, best first; the last is always the scalar one.
std::vector<const Kernels*> AvailableKernels();

// By name; null when unknown or not available here.
const Kernels* FindKernels(std::string_view name);

// The best, or the one TWINJET_CPU_TARGET names. Null when that one is not available.
const Kernels* DefaultKernels();

}  // namespace twinjet::sampler
