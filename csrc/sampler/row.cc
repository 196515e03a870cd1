#include "sampler/row.h"

#include <algorithm>

#include "sampler/filter.h"
#include "sampler/logprobs.h"

namespace twinjet::sampler {
namespace {

bool IsEdited(const RowEdits& edits) {
  return edits.grammar_mask != nullptr || edits.allowed_mask != nullptr || edits.banned.size != 0 ||
         edits.early_stops.size != 0 || edits.biases.size != 0 || edits.uses.size != 0;
}

const uint32_t* JoinMasks(const RowEdits& edits, int32_t vocab_size, Workspace* workspace) {
  if (edits.allowed_mask == nullptr) return edits.grammar_mask;
  if (edits.grammar_mask == nullptr) return edits.allowed_mask;
  const size_t num_words = (static_cast<size_t>(vocab_size) + 31) / 32;
  for (size_t i = 0; i < num_words; ++i) workspace->mask[i] = edits.grammar_mask[i] & edits.allowed_mask[i];
  return workspace->mask.data();
}

// Sets view->max; a row with +inf becomes one of 0 for each +inf and -inf for the others, in buffer.
uint32_t FinishView(const Kernels& kernels, float* buffer, RowView* view) {
  const int32_t num_groups = (view->size + kGroupSize - 1) / kGroupSize;
  view->max = *std::max_element(view->group_max, view->group_max + num_groups);
  if (view->max != PositiveInfinity()) return kStatusOk;
  for (int32_t i = 0; i < view->size; ++i) {
    buffer[i] = view->x[i] == PositiveInfinity() ? 0.0f : NegativeInfinity();
  }
  kernels.scan(buffer, Dtype::kFloat32, view->size, nullptr, nullptr, view->group_max);
  view->x = buffer;
  view->max = 0.0f;
  return kStatusInfinite;
}

// The logits as they are, copied to buffer only if they have to be.
RowView ReadRow(const Kernels& kernels, const RowInput& input, float* buffer, float* group_max,
                uint32_t* status) {
  float* out = input.dtype == Dtype::kFloat32 ? nullptr : buffer;
  const bool has_nan = kernels.scan(input.logits, input.dtype, input.vocab_size, nullptr, out, group_max);
  if (has_nan) {
    *status |= kStatusNan;
    if (out == nullptr) {
      out = buffer;
      kernels.scan(input.logits, input.dtype, input.vocab_size, nullptr, out, group_max);
    }
  }
  const float* x = out == nullptr ? static_cast<const float*>(input.logits) : out;
  return {x, group_max, input.vocab_size, 0.0f};
}

void ApplyUses(const RowConstants& constants, ListView<TokenUse> uses, float* x) {
  for (const TokenUse& use : uses) {
    if (use.output_count == 0 && !use.in_prompt) continue;
    float y = ApplyRepetition(x[use.token_id], constants.repetition, constants.repetition_inverse);
    if (use.output_count != 0) {
      y = ApplyFrequencyPresence(y, constants.frequency, constants.presence, use.output_count);
    }
    x[use.token_id] = y;
  }
}

RowView EditRow(const Kernels& kernels, const RowInput& input, bool with_early_stops, Workspace* workspace,
                uint32_t* status) {
  const RowEdits& edits = input.edits;
  float* x = workspace->work_x.data();
  float* group_max = workspace->group_max.data();
  const uint32_t* mask = JoinMasks(edits, input.vocab_size, workspace);
  if (kernels.scan(input.logits, input.dtype, input.vocab_size, mask, x, group_max)) *status |= kStatusNan;
  for (int32_t id : edits.banned) x[id] = NegativeInfinity();
  if (with_early_stops) {
    for (int32_t id : edits.early_stops) x[id] = NegativeInfinity();
  }
  for (const TokenBias& bias : edits.biases) x[bias.token_id] = ApplyBias(x[bias.token_id], bias.bias);
  ApplyUses(input.constants, edits.uses, x);
  if (edits.banned.size + edits.biases.size + edits.uses.size +
          (with_early_stops ? edits.early_stops.size : 0) !=
      0) {
    kernels.scan(x, Dtype::kFloat32, input.vocab_size, nullptr, nullptr, group_max);
  }
  return {x, group_max, input.vocab_size, 0.0f};
}

void FillNothing(const RowInput& input, RowOutput* output) {
  output->token_id = -1;
  output->status |= kStatusNoToken;
  output->rank = 0;
  for (int32_t i = 0; i <= input.num_logprobs; ++i) {
    output->top_ids[i] = -1;
    output->top_logprobs[i] = NegativeInfinity();
  }
}

}  // namespace

void Workspace::Reserve(int32_t vocab_size) {
  const size_t size = static_cast<size_t>(vocab_size);
  const size_t num_groups = (size + kGroupSize - 1) / kGroupSize;
  if (raw_x.size() >= size) return;
  raw_x.resize(size);
  work_x.resize(size);
  raw_group_max.resize(num_groups);
  group_max.resize(num_groups);
  mask.resize((size + 31) / 32);
  list_x.resize(size + kListSlack);
  list_weight.resize(size + kListSlack);
  list_id.resize(size + kListSlack);
  weights.resize(size);
  masses.resize(num_groups);
  masses_above.resize(num_groups);
  race_index.resize(std::max(num_groups, static_cast<size_t>(kGroupSize)));
  race_mass.resize(std::max(num_groups, static_cast<size_t>(kGroupSize)));
  ranked.resize(size);
}

void DrawRow(const Kernels& kernels, const RowInput& input, Workspace* workspace, RowOutput* output) {
  workspace->Reserve(input.vocab_size);
  const bool has_logprobs = input.num_logprobs >= 0;
  const bool is_edited = IsEdited(input.edits);
  output->status = kStatusOk;

  RowView raw = {};
  if (!is_edited || (has_logprobs && !input.processed_logprobs)) {
    raw = ReadRow(kernels, input, workspace->raw_x.data(), workspace->raw_group_max.data(), &output->status);
  }
  RowView view = is_edited ? EditRow(kernels, input, true, workspace, &output->status) : raw;
  uint32_t infinite = FinishView(kernels, workspace->work_x.data(), &view);
  if (view.max == NegativeInfinity() && input.edits.early_stops.size != 0) {
    view = EditRow(kernels, input, false, workspace, &output->status);
    infinite = FinishView(kernels, workspace->work_x.data(), &view);
  }
  output->status |= infinite;
  view.ahead = input.ahead;
  if (output->processed_logits != nullptr) std::copy(view.x, view.x + view.size, output->processed_logits);
  if (view.max == NegativeInfinity()) {
    FillNothing(input, output);
    return;
  }

  const RowConstants& constants = input.constants;
  const float unit_scale = static_cast<float>(kLog2E);
  Distribution processed = {&view, constants.temperature, NegativeInfinity(), 0.0};
  if (constants.is_greedy != 0) {
    output->token_id = FirstMaximum(view);
    if (has_logprobs && input.processed_logprobs) {
      if (constants.top_k == 1) {
        const int32_t num_ties = kernels.count_at_least(view.x, view.size, view.group_max, view.max);
        processed.threshold = view.max;
        processed.ln_mass = LnMass(static_cast<uint64_t>(num_ties) << kMassBits);
      } else {
        const float scale = constants.scale != 0.0f ? constants.scale : unit_scale;
        processed = WholeRow(kernels, view, constants.temperature, scale, workspace);
      }
    }
  } else {
    const Draw draw = FilterAndDraw(kernels, view, constants, workspace);
    output->token_id = draw.token_id;
    processed.threshold = draw.threshold;
    processed.ln_mass = LnMass(draw.kept_mass);
  }
  if (!has_logprobs) return;
  if (input.processed_logprobs) {
    FillLogprobs(kernels, processed, input.num_logprobs, workspace, output);
    return;
  }
  if (!is_edited) {
    raw = view;
  } else {
    FinishView(kernels, workspace->raw_x.data(), &raw);
  }
  const Distribution whole = WholeRow(kernels, raw, 1.0f, unit_scale, workspace);
  FillLogprobs(kernels, whole, input.num_logprobs, workspace, output);
}

}  // namespace twinjet::sampler
