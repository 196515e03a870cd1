#include "sampler/reference.h"

#include <algorithm>
#include <vector>

namespace twinjet::sampler {
namespace {

bool IsAllowed(const uint32_t* mask, int32_t id) {
  return mask == nullptr || ((mask[id / 32] >> (id % 32)) & 1u) != 0;
}

std::vector<float> ReadLogits(const RowInput& input, uint32_t* status) {
  std::vector<float> x(static_cast<size_t>(input.vocab_size));
  for (size_t i = 0; i < x.size(); ++i) {
    switch (input.dtype) {
      case Dtype::kFloat32:
        x[i] = static_cast<const float*>(input.logits)[i];
        break;
      case Dtype::kFloat16:
        x[i] = FloatFromHalf(static_cast<const uint16_t*>(input.logits)[i]);
        break;
      case Dtype::kBfloat16:
        x[i] = FloatFromBfloat16(static_cast<const uint16_t*>(input.logits)[i]);
        break;
    }
    if (IsNan(x[i])) {
      x[i] = NegativeInfinity();
      *status |= kStatusNan;
    }
  }
  return x;
}

void Edit(const RowInput& input, bool with_early_stops, std::vector<float>* x) {
  const RowEdits& edits = input.edits;
  const auto at = [x](int32_t id) -> float& { return (*x)[static_cast<size_t>(id)]; };
  for (int32_t id = 0; id < input.vocab_size; ++id) {
    if (!IsAllowed(edits.grammar_mask, id) || !IsAllowed(edits.allowed_mask, id)) at(id) = NegativeInfinity();
  }
  for (int32_t id : edits.banned) at(id) = NegativeInfinity();
  if (with_early_stops) {
    for (int32_t id : edits.early_stops) at(id) = NegativeInfinity();
  }
  for (const TokenBias& bias : edits.biases) at(bias.token_id) = ApplyBias(at(bias.token_id), bias.bias);
  for (const TokenUse& use : edits.uses) {
    float& value = at(use.token_id);
    if (use.in_prompt || use.output_count > 0) {
      value = ApplyRepetition(value, input.constants.repetition, input.constants.repetition_inverse);
    }
    if (use.output_count > 0) {
      value = ApplyFrequencyPresence(value, input.constants.frequency, input.constants.presence,
                                     use.output_count);
    }
  }
}

// Step 3's rule for +inf. Returns whether it applied.
bool SettleInfinities(std::vector<float>* x) {
  if (std::find(x->begin(), x->end(), PositiveInfinity()) == x->end()) return false;
  for (float& value : *x) value = value == PositiveInfinity() ? 0.0f : NegativeInfinity();
  return true;
}

// Steps 7 to 9: sets the weight of what is dropped to 0 and its flag to false.
void Filter(const RowConstants& constants, const std::vector<float>& x, float max,
            std::vector<uint64_t>* weights, std::vector<bool>* kept) {
  std::vector<size_t> order;
  for (size_t i = 0; i < x.size(); ++i) {
    (*kept)[i] = x[i] > NegativeInfinity() && ZOf(x[i], max, constants.scale) >= constants.min_z;
    if ((*kept)[i]) order.push_back(i);
  }
  std::sort(order.begin(), order.end(), [&x](size_t a, size_t b) { return x[a] > x[b]; });
  const size_t k = static_cast<size_t>(constants.top_k);
  if (k != 0 && k < order.size()) {
    size_t end = k;
    while (end < order.size() && x[order[end]] == x[order[k - 1]]) ++end;
    order.resize(end);
  }
  if (constants.has_top_p != 0) {
    uint64_t total = 0;
    for (size_t i : order) total += (*weights)[i];
    const uint64_t target = TopPMass(constants.top_p_fixed, total);
    uint64_t above = 0;
    for (size_t begin = 0, end = 0; begin < order.size(); begin = end) {
      if (above >= target) {
        order.resize(begin);
        break;
      }
      while (end < order.size() && x[order[end]] == x[order[begin]]) above += (*weights)[order[end++]];
    }
  }
  std::fill(kept->begin(), kept->end(), false);
  for (size_t i : order) (*kept)[i] = true;
  for (size_t i = 0; i < x.size(); ++i) {
    if (!(*kept)[i]) (*weights)[i] = 0;
  }
}

int32_t Race(const RaceKey& key, const std::vector<uint64_t>& weights) {
  const size_t group_size = static_cast<size_t>(kGroupSize);
  size_t group = 0, winner = 0;
  double best = -1.0;
  for (size_t g = 0; g * group_size < weights.size(); ++g) {
    uint64_t mass = 0;
    for (size_t i = g * group_size; i < std::min(weights.size(), (g + 1) * group_size); ++i)
      mass += weights[i];
    if (mass == 0) continue;
    const double time = RaceTime(ExponentialOf(key, static_cast<uint32_t>(g) | kGroupLevel), mass);
    if (best < 0.0 || time < best) {
      best = time;
      group = g;
    }
  }
  best = -1.0;
  for (size_t i = group * group_size; i < std::min(weights.size(), (group + 1) * group_size); ++i) {
    if (weights[i] == 0) continue;
    const double time = RaceTime(ExponentialOf(key, static_cast<uint32_t>(i) | kTokenLevel), weights[i]);
    if (best < 0.0 || time < best) {
      best = time;
      winner = i;
    }
  }
  return static_cast<int32_t>(winner);
}

void FillLogprobs(const RowInput& input, const std::vector<float>& x, const std::vector<uint64_t>& weights,
                  const std::vector<bool>& kept, float temperature, RowOutput* output) {
  const float max = *std::max_element(x.begin(), x.end());
  uint64_t total = 0;
  for (uint64_t w : weights) total += w;
  const auto logprob = [&](size_t i) {
    if (!kept[i] || x[i] == NegativeInfinity()) return NegativeInfinity();
    return LogProb(x[i], max, temperature, LnMass(total));
  };
  std::vector<size_t> order(x.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&x](size_t a, size_t b) { return x[a] > x[b]; });
  const size_t drawn = static_cast<size_t>(output->token_id);
  output->top_ids[0] = output->token_id;
  output->top_logprobs[0] = logprob(drawn);
  output->rank =
      static_cast<int32_t>(std::count_if(x.begin(), x.end(), [&](float value) { return value >= x[drawn]; }));
  for (int32_t n = 0; n < input.num_logprobs; ++n) {
    const size_t place = static_cast<size_t>(n);
    output->top_ids[1 + n] = place < order.size() ? static_cast<int32_t>(order[place]) : -1;
    output->top_logprobs[1 + n] = place < order.size() ? logprob(order[place]) : NegativeInfinity();
  }
}

std::vector<uint64_t> Weights(const std::vector<float>& x, float max, float scale) {
  std::vector<uint64_t> weights(x.size(), 0);
  if (max == NegativeInfinity()) return weights;
  for (size_t i = 0; i < x.size(); ++i) weights[i] = WeightOf(x[i], max, scale);
  return weights;
}

}  // namespace

void ReferenceDrawRow(const RowInput& input, RowOutput* output) {
  const RowConstants& constants = input.constants;
  const float unit_scale = static_cast<float>(kLog2E);
  output->status = kStatusOk;
  output->token_id = -1;
  output->rank = 0;
  std::vector<float> raw = ReadLogits(input, &output->status);
  std::vector<float> x = raw;
  Edit(input, true, &x);
  if (*std::max_element(x.begin(), x.end()) == NegativeInfinity() && input.edits.early_stops.size != 0) {
    x = raw;
    Edit(input, false, &x);
  }
  if (SettleInfinities(&x)) output->status |= kStatusInfinite;
  if (output->processed_logits != nullptr) std::copy(x.begin(), x.end(), output->processed_logits);
  const auto max_place = std::max_element(x.begin(), x.end());  // the first of equals
  const float max = *max_place;
  if (max == NegativeInfinity()) {
    output->status |= kStatusNoToken;
    for (int32_t i = 0; i <= input.num_logprobs; ++i) {
      output->top_ids[i] = -1;
      output->top_logprobs[i] = NegativeInfinity();
    }
    return;
  }
  const bool is_cold = constants.scale == 0.0f;  // greedy by temperature: nothing is filtered
  std::vector<uint64_t> weights = Weights(x, max, is_cold ? unit_scale : constants.scale);
  std::vector<bool> kept(x.size(), true);
  if (!is_cold && constants.top_k == 1) {
    for (size_t i = 0; i < x.size(); ++i) {
      kept[i] = x[i] == max;
      if (!kept[i]) weights[i] = 0;
    }
  } else if (!is_cold) {
    Filter(constants, x, max, &weights, &kept);
  }
  output->token_id =
      constants.is_greedy != 0 ? static_cast<int32_t>(max_place - x.begin()) : Race(constants.race, weights);
  if (input.num_logprobs < 0) return;
  if (input.processed_logprobs) {
    FillLogprobs(input, x, weights, kept, constants.temperature, output);
  } else {
    SettleInfinities(&raw);
    const float raw_max = *std::max_element(raw.begin(), raw.end());
    FillLogprobs(input, raw, Weights(raw, raw_max, unit_scale), std::vector<bool>(raw.size(), true), 1.0f,
                 output);
  }
}

}  // namespace twinjet::sampler
