// Parameters of a row and what is computed from them once, on the host, before any kernel runs.
// Together with spec_math.h and philox.h this is the specification in code; docs/sampler.md is the
// specification in words.
#pragma once

#include "sampler/philox.h"
#include "sampler/spec_math.h"

namespace twinjet::sampler {

// Raised whenever any row could get another token than before.
constexpr int kSpecVersion = 2;

enum class Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// Bits of a row's status. kNoToken and only kNoToken means that no token was drawn.
constexpr uint32_t kStatusOk = 0;
constexpr uint32_t kStatusNan = 1;       // NaN logits were met and counted as -inf
constexpr uint32_t kStatusInfinite = 2;  // the largest logit is +inf: the +inf tokens share the row
constexpr uint32_t kStatusNoToken = 4;   // every token is masked, -inf or NaN; the token is -1

// The smallest and the largest value of a parameter, both allowed.
struct ParamRange {
  const char* name;
  double low;
  double high;
};

constexpr double kFloatMax = 0x1.fffffep+127;  // the largest finite float32

// What the sampler can compute with. Every API in front of it allows a part of this and no more.
// repetition_penalty: with the smallest one the float32 inverse is still finite.
constexpr ParamRange kParamRanges[] = {
    {"temperature", 0.0, kFloatMax},
    {"top_p", -kFloatMax, kFloatMax},
    {"min_p", -kFloatMax, kFloatMax},
    {"top_k", -1.0, 2147483647.0},
    {"repetition_penalty", 0x1p-128 + 0x1p-149, kFloatMax},
    {"frequency_penalty", -kFloatMax, kFloatMax},
    {"presence_penalty", -kFloatMax, kFloatMax},
    {"logit_bias", -kFloatMax, kFloatMax},
};

// What a caller asks for. Every float is a float32 already.
struct RowParams {
  float temperature = 1.0f;         // finite, >= 0; below 1e-5 is greedy
  float top_p = 1.0f;               // finite; >= 1 is off, <= 0 keeps the most likely tokens alone
  float min_p = 0.0f;               // finite; <= 0 is off, >= 1 keeps the most likely tokens alone
  float repetition_penalty = 1.0f;  // finite, > 0, with a finite inverse; 1 is off
  float frequency_penalty = 0.0f;   // finite; 0 is off
  float presence_penalty = 0.0f;    // finite; 0 is off
  int32_t top_k = 0;                // >= -1; 0, -1 and vocab_size or more are off, 1 is greedy
  uint32_t output_index = 0;
  uint64_t seed = 0;
  uint64_t position = 0;
};

// What kernels take. Plain data: may be copied to a device as it is.
struct RowConstants {
  float scale = 0.0f;        // float32(log2(e) / temperature); 0 when greedy
  float temperature = 1.0f;  // for processed logprobs; 1 when temperature is below 1e-5
  float min_z = 0.0f;        // a token needs z >= min_z; -inf when min-p is off
  float repetition = 1.0f;   // penalty and its float32 inverse; both 1 when off
  float repetition_inverse = 1.0f;
  float frequency = 0.0f;
  float presence = 0.0f;
  int32_t top_k = 0;         // 1 .. vocab_size - 1, or 0 when off
  uint64_t top_p_fixed = 0;  // floor(p * 2^64); unused when top-p is off
  uint32_t has_top_p = 0;
  uint32_t is_greedy = 0;  // argmax, the lowest id among ties
  RaceKey race = {};
};

enum class ParamError : int32_t {
  kNone = 0,
  kTemperature,
  kTopP,
  kMinP,
  kTopK,
  kRepetitionPenalty,
  kFrequencyPenalty,
  kPresencePenalty,
};

TWINJET_HD bool IsFinite(float x) { return (FloatBits(x) & 0x7f800000u) != 0x7f800000u; }

// floor(p * 2^64) for p in [0, 1).
TWINJET_HD uint64_t FixedPoint(float p) {
  return static_cast<uint64_t>(MulRn(static_cast<double>(p), 0x1p64));
}

// Checks params and fills constants. Greedy rows by temperature ignore the three filters.
TWINJET_HD ParamError PrepareRow(const RowParams& params, int32_t vocab_size, RowConstants* constants) {
  RowConstants out;
  if (!IsFinite(params.temperature) || params.temperature < 0.0f) return ParamError::kTemperature;
  if (!IsFinite(params.top_p)) return ParamError::kTopP;
  if (!IsFinite(params.min_p)) return ParamError::kMinP;
  if (params.top_k < -1) return ParamError::kTopK;
  if (!IsFinite(params.frequency_penalty)) return ParamError::kFrequencyPenalty;
  if (!IsFinite(params.presence_penalty)) return ParamError::kPresencePenalty;
  if (!IsFinite(params.repetition_penalty) || !(params.repetition_penalty > 0.0f)) {
    return ParamError::kRepetitionPenalty;
  }
  // Rounding the double quotient to float equals rounding 1 / r once (53 >= 2 * 24 + 2).
  out.repetition_inverse = static_cast<float>(DivRn(1.0, static_cast<double>(params.repetition_penalty)));
  if (!IsFinite(out.repetition_inverse)) return ParamError::kRepetitionPenalty;
  out.repetition = params.repetition_penalty;
  out.frequency = params.frequency_penalty;
  out.presence = params.presence_penalty;
  out.min_z = NegativeInfinity();
  out.race.seed = params.seed;
  out.race.position = params.position;
  out.race.output_index = params.output_index;
  if (params.temperature < kGreedyTemperature) {
    out.is_greedy = 1;
    *constants = out;
    return ParamError::kNone;
  }
  out.temperature = params.temperature;
  out.scale = static_cast<float>(DivRn(kLog2E, static_cast<double>(params.temperature)));
  if (params.min_p >= 1.0f) {
    out.min_z = 0.0f;
  } else if (params.min_p > 0.0f) {
    out.min_z = static_cast<float>(MulRn(Ln(static_cast<double>(params.min_p)), kLog2E));
  }
  if (params.top_k > 0 && params.top_k < vocab_size) out.top_k = params.top_k;
  out.is_greedy = params.top_k == 1 ? 1 : 0;
  if (params.top_p < 1.0f) {
    out.has_top_p = 1;
    out.top_p_fixed = params.top_p > 0.0f ? FixedPoint(params.top_p) : 0;
  }
  *constants = out;
  return ParamError::kNone;
}

// Steps 7 to 9 as one predicate: a token is kept when its logit is at least `threshold` (the larger
// of the top-k and top-p thresholds; -inf when both are off) and its z at least constants.min_z.
TWINJET_HD bool IsKept(float x, float z, float threshold, const RowConstants& constants) {
  return x >= threshold && z >= constants.min_z;
}

}  // namespace twinjet::sampler
