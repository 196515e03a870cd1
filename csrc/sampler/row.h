// Draws one token from one row: the specification's steps in order, over the kernels of one target.
#pragma once

#include <cstdint>
#include <vector>

#include "sampler/kernels.h"
#include "sampler/select.h"
#include "sampler/spec.h"

namespace twinjet::sampler {

struct TokenBias {
  int32_t token_id;
  float bias;
};

// How a token occurred so far in a request.
struct TokenUse {
  int32_t token_id;
  uint32_t output_count;
  bool in_prompt;
};

// A borrowed list.
template <typename T>
struct ListView {
  const T* data = nullptr;
  size_t size = 0;
  const T* begin() const { return data; }
  const T* end() const { return data + size; }
};

// Changes to a row's logits before its maximum is taken. Token ids lie within the vocabulary; each
// occurs once in biases and once in uses. Masks have bit i of word i / 32 set where token i is
// allowed; null allows all.
struct RowEdits {
  const uint32_t* grammar_mask = nullptr;
  const uint32_t* allowed_mask = nullptr;
  ListView<int32_t> banned;       // last tokens of bad words
  ListView<int32_t> early_stops;  // end tokens before min_tokens; ignored if nothing else is left
  ListView<TokenBias> biases;
  ListView<TokenUse> uses;  // given only to rows with a penalty
};

struct RowInput {
  const void* logits = nullptr;  // vocab_size elements of dtype, adjacent
  Dtype dtype = Dtype::kFloat32;
  int32_t vocab_size = 0;  // 1 .. kMaxVocabSize
  RowConstants constants;
  RowEdits edits;
  int32_t num_logprobs = -1;  // -1: none; n: the drawn token and the n most likely
  bool processed_logprobs = false;
  // vocab_size logits that the same thread will probably read next, or null. Changes speed alone.
  const float* ahead = nullptr;
};

struct RowOutput {
  int32_t token_id = -1;
  uint32_t status = kStatusOk;
  // Of the caller, 1 + num_logprobs long; untouched when num_logprobs is -1.
  int32_t* top_ids = nullptr;
  float* top_logprobs = nullptr;
  int32_t rank = 0;
  // Of the caller, vocab_size long, or null: receives the logits after masks, bias and penalties.
  float* processed_logits = nullptr;
};

// A row of float32 logits without NaN and the maxima of its groups.
struct RowView {
  const float* x = nullptr;
  float* group_max = nullptr;
  int32_t size = 0;
  float max = 0.0f;
  const float* ahead = nullptr;  // of RowInput
};

// Memory for one row at a time; grows to the largest vocabulary seen, then stays.
struct Workspace {
  std::vector<float> raw_x, work_x;
  std::vector<float> raw_group_max, group_max;
  std::vector<uint32_t> mask;
  std::vector<float> list_x, list_weight;  // tokens above a threshold, by id
  std::vector<int32_t> list_id;
  std::vector<float> weights;                  // of the row, for top-p alone
  std::vector<uint64_t> masses, masses_above;  // of groups
  std::vector<uint32_t> race_index;
  std::vector<double> race_mass;
  struct Ranked {
    float x;
    int32_t token_id;
  };
  std::vector<Ranked> ranked;
  SelectScratch select;

  void Reserve(int32_t vocab_size);
};

// Fills *output. Touches nothing but its arguments, so rows may be drawn in any order and at once.
void DrawRow(const Kernels& kernels, const RowInput& input, Workspace* workspace, RowOutput* output);

}  // namespace twinjet::sampler
