// The kernels for any CPU: the specification's functions in plain loops.
#include <algorithm>

#include "sampler/kernels.h"

namespace twinjet::sampler {
namespace {

float Read(const void* source, Dtype dtype, int32_t i) {
  switch (dtype) {
    case Dtype::kFloat16:
      return FloatFromHalf(static_cast<const uint16_t*>(source)[i]);
    case Dtype::kBfloat16:
      return FloatFromBfloat16(static_cast<const uint16_t*>(source)[i]);
    case Dtype::kFloat32:
      break;
  }
  return static_cast<const float*>(source)[i];
}

bool Scan(const void* source, Dtype dtype, int32_t n, const uint32_t* mask, float* out, float* group_max) {
  bool has_nan = false;
  for (int32_t begin = 0; begin < n; begin += kGroupSize) {
    const int32_t end = std::min(n, begin + kGroupSize);
    float max = NegativeInfinity();
    for (int32_t i = begin; i < end; ++i) {
      float x = Read(source, dtype, i);
      if (IsNan(x)) {
        has_nan = true;
        x = NegativeInfinity();
      }
      if (mask != nullptr && ((mask[i / 32] >> (i % 32)) & 1u) == 0) x = NegativeInfinity();
      if (x > max) max = x;
      if (out != nullptr) out[i] = x;
    }
    group_max[begin / kGroupSize] = max;
  }
  return has_nan;
}

void GroupMasses(const float* x, int32_t n, const float* group_max, float max, float scale, float threshold,
                 const float*, uint64_t* masses) {
  for (int32_t begin = 0; begin < n; begin += kGroupSize) {
    const int32_t end = std::min(n, begin + kGroupSize);
    uint64_t mass = 0;
    if (group_max[begin / kGroupSize] >= threshold) {
      for (int32_t i = begin; i < end; ++i) {
        if (x[i] >= threshold) mass += WeightOf(x[i], max, scale);
      }
    }
    masses[begin / kGroupSize] = mass;
  }
}

void WeighGroups(const float* x, int32_t n, const float* group_max, float max, float scale, float threshold,
                 float* weights, uint64_t* masses) {
  for (int32_t begin = 0; begin < n; begin += kGroupSize) {
    const int32_t end = std::min(n, begin + kGroupSize);
    uint64_t mass = 0;
    if (group_max[begin / kGroupSize] >= threshold) {
      for (int32_t i = begin; i < end; ++i) {
        const uint64_t weight = x[i] >= threshold ? WeightOf(x[i], max, scale) : 0;
        weights[i] = static_cast<float>(weight);
        mass += weight;
      }
    }
    masses[begin / kGroupSize] = mass;
  }
}

int32_t SplitMasses(const float* x, const float* weights, int32_t n, const float* group_max,
                    const uint64_t* masses, float low, float high, uint64_t* above, int32_t* out_id) {
  int32_t count = 0;
  for (int32_t begin = 0; begin < n; begin += kGroupSize) {
    const int32_t g = begin / kGroupSize;
    above[g] = 0;
    if (masses[g] == 0 || !(group_max[g] >= low)) continue;
    const int32_t end = std::min(n, begin + kGroupSize);
    for (int32_t i = begin; i < end; ++i) {
      if (x[i] >= high) {
        above[g] += static_cast<uint64_t>(weights[i]);
      } else if (x[i] >= low) {
        out_id[count++] = i;
      }
    }
  }
  return count;
}

int32_t Collect(const float* x, int32_t n, const float* group_max, float threshold, float below, float* out_x,
                int32_t* out_id) {
  int32_t count = 0;
  for (int32_t begin = 0; begin < n; begin += kGroupSize) {
    if (!(group_max[begin / kGroupSize] >= threshold)) continue;
    const int32_t end = std::min(n, begin + kGroupSize);
    for (int32_t i = begin; i < end; ++i) {
      if (x[i] >= threshold && x[i] < below) {
        out_x[count] = x[i];
        out_id[count] = i;
        ++count;
      }
    }
  }
  return count;
}

void Weigh(const float* x, int32_t n, float max, float scale, float* weights) {
  for (int32_t i = 0; i < n; ++i) weights[i] = static_cast<float>(WeightOf(x[i], max, scale));
}

int32_t CountAtLeast(const float* x, int32_t n, const float* group_max, float value) {
  int32_t count = 0;
  for (int32_t begin = 0; begin < n; begin += kGroupSize) {
    if (!(group_max[begin / kGroupSize] >= value)) continue;
    const int32_t end = std::min(n, begin + kGroupSize);
    for (int32_t i = begin; i < end; ++i) count += x[i] >= value ? 1 : 0;
  }
  return count;
}

int32_t Race(const RaceKey& key, const uint32_t* indices, const double* masses, int32_t n) {
  int32_t best = 0;
  double best_time = 0.0;
  for (int32_t i = 0; i < n; ++i) {
    const double time = DivRn(ExponentialOf(key, indices[i]), masses[i]);
    if (i == 0 || time < best_time) {
      best_time = time;
      best = i;
    }
  }
  return best;
}

}  // namespace

const Kernels kScalarKernels = {"scalar", Scan,  GroupMasses,  WeighGroups, SplitMasses,
                                Collect,  Weigh, CountAtLeast, Race};

}  // namespace twinjet::sampler
