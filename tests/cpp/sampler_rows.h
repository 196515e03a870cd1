// Random rows, parameters and edits for the sampler's tests, and the comparison of two results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "sampler/reference.h"
#include "sampler/row.h"

namespace rows {

using namespace twinjet::sampler;
using Generator = std::mt19937_64;

inline int32_t Below(Generator& random, int32_t n) {
  return static_cast<int32_t>(random() % static_cast<uint64_t>(n));
}
inline bool Chance(Generator& random, double p) {
  return std::uniform_real_distribution<>(0.0, 1.0)(random) < p;
}
template <typename T, size_t N>
T OneOf(Generator& random, const T (&values)[N]) {
  return values[random() % N];
}

// What a row looks like; every kind breaks something of its own when an implementation is wrong.
enum class Shape {
  kNormal,
  kLanguage,   // steep head, long tail
  kPeaked,     // one token holds all
  kFlat,       // all equal
  kTies,       // few distinct values
  kQuarters,   // multiples of 1/4: many ties, exact boundaries
  kMasked,     // mostly -inf
  kSubnormal,  // differences near 0, subnormal values
  kHuge,       // differences overflow
  kWide,       // spread over the whole weight range
  kZeros,      // +0 and -0
  kNan,
  kInfinite,
  kMisleading,  // what a regular sample of each group's tokens sees is unlike the rest
  kNothing,
  kCount
};

inline std::vector<float> MakeLogits(Generator& random, Shape shape, int32_t size) {
  std::normal_distribution<float> normal;
  const float infinity = std::numeric_limits<float>::infinity();
  const float spread = OneOf(random, {0.3f, 1.0f, 3.0f});
  const float seen_shift = OneOf(random, {-8.0f, -2.0f, 2.0f, 8.0f});
  int32_t id = -1;
  std::vector<float> x(static_cast<size_t>(size));
  for (float& value : x) {
    ++id;
    switch (shape) {
      case Shape::kNormal:
        value = 3.0f * normal(random);
        break;
      case Shape::kLanguage:
        value = 2.5f * normal(random) + (Chance(random, 0.002) ? 9.0f : 0.0f);
        break;
      case Shape::kPeaked:
        value = normal(random) - 40.0f;
        break;
      case Shape::kFlat:
        value = 1.5f;
        break;
      case Shape::kTies:
        value = static_cast<float>(Below(random, 3));
        break;
      case Shape::kQuarters:
        value = 0.25f * static_cast<float>(Below(random, 60));
        break;
      case Shape::kMasked:
        value = Chance(random, 0.97) ? -infinity : normal(random);
        break;
      case Shape::kSubnormal:
        value = static_cast<float>(Below(random, 2000) - 1000) * 1e-42f;
        break;
      case Shape::kHuge:
        value =
            (Chance(random, 0.5) ? 1.0f : -1.0f) * 3.4e38f * static_cast<float>(Below(random, 100)) / 100.0f;
        break;
      case Shape::kWide:
        value = -35.0f * static_cast<float>(Below(random, 1000003)) / 1000003.0f;
        break;
      case Shape::kZeros:
        value = Chance(random, 0.5) ? 0.0f : -0.0f;
        break;
      case Shape::kNan:
        value = Chance(random, 0.2) ? std::nanf("") : normal(random);
        break;
      case Shape::kInfinite:
        value = Chance(random, 0.02) ? infinity : normal(random);
        break;
      case Shape::kMisleading:
        // Groups, from 65,536 on every second one, are sampled at runs of 16 that move on by 80 ids.
        value = spread * normal(random);
        if ((id % 256) / 16 == id / (size >= 65536 ? 512 : 256) * 5 % 16) value += seen_shift;
        break;
      case Shape::kNothing:
      case Shape::kCount:
        value = Chance(random, 0.1) ? std::nanf("") : -infinity;
        break;
    }
  }
  if (shape == Shape::kPeaked) x[static_cast<size_t>(Below(random, size))] = 7.0f;
  return x;
}

inline RowParams MakeParams(Generator& random, int32_t size) {
  RowParams params;
  params.temperature =
      OneOf(random, {1.0f, 1.0f, 0.7f, 0.3f, 1.5f, 2.0f, 0.0f, 9e-6f, 1.1e-5f, 1e30f, 0.01f});
  if (Chance(random, 0.5)) {
    params.top_p =
        OneOf(random, {0.95f, 0.9f, 0.5f, 0.1f, 0.9999f, 0.99999994f, 0.0f, -1.0f, 1e-30f, 1.0f, 2.0f});
  }
  if (Chance(random, 0.5)) {
    params.top_k = OneOf(random, {1, 2, 5, 40, 50, 300, 1000, 20000, -1, 0});
    if (Chance(random, 0.2)) params.top_k = 1 + Below(random, size + 2);
  }
  if (Chance(random, 0.3))
    params.min_p = OneOf(random, {0.05f, 0.5f, 1e-3f, 1e-12f, 1e-30f, 1.0f, 3.0f, -1.0f, 1e-45f});
  if (Chance(random, 0.3)) params.repetition_penalty = OneOf(random, {1.1f, 0.8f, 2.0f, 1e30f});
  if (Chance(random, 0.3)) params.frequency_penalty = OneOf(random, {0.2f, -0.5f, 2.0f, 1e38f});
  if (Chance(random, 0.3)) params.presence_penalty = OneOf(random, {0.7f, -2.0f});
  params.seed = random();
  params.position = Chance(random, 0.1) ? random() : static_cast<uint64_t>(Below(random, 4096));
  params.output_index = static_cast<uint32_t>(Below(random, 4));
  return params;
}

// A row with all it borrows.
struct Row {
  std::vector<float> logits;
  std::vector<uint16_t> narrow;  // when the dtype is a 16-bit one
  std::vector<uint32_t> grammar, allowed;
  std::vector<int32_t> banned, early_stops;
  std::vector<TokenBias> biases;
  std::vector<TokenUse> uses;
  RowParams params;
  RowInput input;
};

inline std::vector<uint32_t> MakeMask(Generator& random, int32_t size) {
  const double share = OneOf(random, {0.9, 0.5, 0.01, 0.0});
  std::vector<uint32_t> mask((static_cast<size_t>(size) + 31) / 32);
  for (uint32_t& word : mask) {
    for (int bit = 0; bit < 32; ++bit) word |= Chance(random, share) ? 1u << bit : 0u;
  }
  return mask;
}

inline uint16_t RandomHalf(Generator& random) { return static_cast<uint16_t>(random()); }

inline std::vector<int32_t> DistinctTokens(Generator& random, int32_t size, int32_t most) {
  std::set<int32_t> tokens;
  const int32_t count = Below(random, most) + 1;
  for (int32_t i = 0; i < count; ++i) tokens.insert(Below(random, size));
  return {tokens.begin(), tokens.end()};
}

inline void FillRow(Generator& random, Shape shape, int32_t size, Row* row) {
  row->logits = MakeLogits(random, shape, size);
  row->params = MakeParams(random, size);
  row->input.vocab_size = size;
  row->input.logits = row->logits.data();
  if (Chance(random, 0.3)) {
    row->input.dtype = Chance(random, 0.5) ? Dtype::kFloat16 : Dtype::kBfloat16;
    row->narrow.resize(row->logits.size());
    const bool any_bits = Chance(random, 0.2);
    for (size_t i = 0; i < row->narrow.size(); ++i) {
      // Truncation to bfloat16, or a half with a few of the logit's bits: the values hardly matter.
      const uint32_t bits = FloatBits(row->logits[i]);
      row->narrow[i] = static_cast<uint16_t>(bits >> 16);
      if (row->input.dtype == Dtype::kFloat16) {
        row->narrow[i] = static_cast<uint16_t>((0x4000u | (bits >> 13 & 0x7ffu)) | (bits >> 31 << 15));
      }
      if (any_bits && Chance(random, 0.3)) row->narrow[i] = RandomHalf(random);
    }
    row->input.logits = row->narrow.data();
  }
  RowEdits& edits = row->input.edits;
  if (Chance(random, 0.15)) {
    row->grammar = MakeMask(random, size);
    edits.grammar_mask = row->grammar.data();
  }
  if (Chance(random, 0.1)) {
    row->allowed = MakeMask(random, size);
    edits.allowed_mask = row->allowed.data();
  }
  if (Chance(random, 0.1)) row->banned = DistinctTokens(random, size, 5);
  if (Chance(random, 0.1)) row->early_stops = DistinctTokens(random, size, 3);
  edits.banned = {row->banned.data(), row->banned.size()};
  edits.early_stops = {row->early_stops.data(), row->early_stops.size()};
  if (Chance(random, 0.15)) {
    for (int32_t id : DistinctTokens(random, size, 30)) {
      row->biases.push_back({id, OneOf(random, {5.0f, -100.0f, 100.0f, 0.1f, 3e38f})});
    }
  }
  edits.biases = {row->biases.data(), row->biases.size()};
  const RowParams& params = row->params;
  if (params.repetition_penalty != 1.0f || params.frequency_penalty != 0.0f ||
      params.presence_penalty != 0.0f) {
    for (int32_t id : DistinctTokens(random, size, 200)) {
      row->uses.push_back({id, static_cast<uint32_t>(Below(random, 4)), Chance(random, 0.5)});
    }
  }
  edits.uses = {row->uses.data(), row->uses.size()};
  if (Chance(random, 0.25)) {
    row->input.num_logprobs = OneOf(random, {0, 1, 5, 20, 300});
    if (Chance(random, 0.05)) row->input.num_logprobs = size + 1;
    row->input.processed_logprobs = Chance(random, 0.5);
  }
  PrepareRow(params, size, &row->input.constants);
}

// A float32 row whose nucleus ends exactly where some tokens' mass does, or one unit of p further.
inline void FillBoundaryRow(Generator& random, int32_t size, Row* row) {
  row->logits = MakeLogits(random, OneOf(random, {Shape::kNormal, Shape::kLanguage}), size);
  row->params = {};
  row->params.temperature = OneOf(random, {1.0f, 0.7f, 3.0f});
  row->params.top_p = 0.5f;
  row->params.seed = random();
  row->input.logits = row->logits.data();
  row->input.vocab_size = size;
  RowConstants& constants = row->input.constants;
  PrepareRow(row->params, size, &constants);
  std::vector<float> ordered = row->logits;
  std::sort(ordered.begin(), ordered.end(), std::greater<>());
  const auto last = static_cast<size_t>(Below(random, std::min(size, OneOf(random, {10, 40, 80, 2000}))));
  uint64_t whole = 0, kept = 0;
  for (const float x : ordered) {
    const uint64_t weight = WeightOf(x, ordered[0], constants.scale);
    whole += weight;
    if (x >= ordered[last]) kept += weight;
  }
  if (kept == whole) return;
  constants.top_p_fixed = static_cast<uint64_t>((static_cast<unsigned __int128>(kept) << 64) / whole);
  if (Chance(random, 0.5)) ++constants.top_p_fixed;
}

// A result with room for logprobs.
struct Result {
  RowOutput output;
  std::vector<int32_t> ids;
  std::vector<float> logprobs;
  std::vector<float> processed;

  explicit Result(const RowInput& input) {
    const size_t width = static_cast<size_t>(input.num_logprobs + 1);
    ids.assign(width, -7);
    logprobs.assign(width, 7.0f);
    output.top_ids = ids.data();
    output.top_logprobs = logprobs.data();
  }

  void WantProcessed(const RowInput& input) {
    processed.assign(static_cast<size_t>(input.vocab_size), 7.0f);
    output.processed_logits = processed.data();
  }
};

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Empty when equal bit for bit.
inline std::string Difference(const Result& a, const Result& b) {
  if (a.output.token_id != b.output.token_id) {
    return "token " + std::to_string(a.output.token_id) + " and " + std::to_string(b.output.token_id);
  }
  if (a.output.status != b.output.status) {
    return "status " + std::to_string(a.output.status) + " and " + std::to_string(b.output.status);
  }
  if (a.output.rank != b.output.rank) {
    return "rank " + std::to_string(a.output.rank) + " and " + std::to_string(b.output.rank);
  }
  if (a.ids != b.ids) return "top ids";
  if (!SameBits(a.logprobs, b.logprobs)) return "logprobs";
  if (!SameBits(a.processed, b.processed)) return "processed logits";
  return "";
}

}  // namespace rows
