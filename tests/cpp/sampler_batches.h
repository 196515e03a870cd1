// Batches of random rows, and what the CPU draws from them.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "sampler/batch.h"
#include "sampler/cuda/plan.h"
#include "sampler_rows.h"

namespace gpu {

using namespace twinjet::sampler;

// What a draw left, on the host.
struct Drawn {
  std::vector<int32_t> token_ids;
  std::vector<uint32_t> status;
  std::vector<int32_t> top_ids;
  std::vector<float> top_logprobs;
  std::vector<int32_t> ranks;
  std::vector<float> processed;
};

// Rows of one batch: one dtype, one vocabulary, one number of logprobs. row_stride is in elements.
struct Batch {
  Dtype dtype = Dtype::kFloat32;
  int32_t vocab_size = 0;
  int64_t row_stride = 0;
  std::vector<char> logits;  // num_rows * row_stride elements
  std::vector<uint32_t> bitmask;
  std::vector<RowInput> inputs;  // logits point into the above
  int32_t num_logprobs = -1;
  bool processed_logprobs = false;
  bool want_processed = false;

  size_t num_rows() const { return inputs.size(); }
  size_t words() const { return (static_cast<size_t>(vocab_size) + 31) / 32; }
};

inline Drawn DrawOnHost(BatchSampler& sampler, const Batch& batch) {
  const size_t n = batch.num_rows();
  const size_t width = static_cast<size_t>(batch.num_logprobs + 1);
  Drawn drawn;
  drawn.token_ids.resize(n);
  drawn.status.resize(n);
  drawn.ranks.resize(width == 0 ? 0 : n);
  drawn.top_ids.resize(n * width);
  drawn.top_logprobs.resize(n * width);
  if (batch.want_processed) drawn.processed.resize(n * static_cast<size_t>(batch.vocab_size));
  std::vector<RowOutput> outputs(n);
  for (size_t i = 0; i < n; ++i) {
    if (width != 0) {
      outputs[i].top_ids = drawn.top_ids.data() + i * width;
      outputs[i].top_logprobs = drawn.top_logprobs.data() + i * width;
    }
    if (batch.want_processed) {
      outputs[i].processed_logits = drawn.processed.data() + i * static_cast<size_t>(batch.vocab_size);
    }
  }
  sampler.Draw(batch.inputs, outputs);
  for (size_t i = 0; i < n; ++i) {
    drawn.token_ids[i] = outputs[i].token_id;
    drawn.status[i] = outputs[i].status;
    if (width != 0) drawn.ranks[i] = outputs[i].rank;
  }
  return drawn;
}

// Rows that differ, the first described in *what.
inline int CountDifferences(const Batch& batch, const Drawn& host, const Drawn& device, std::string* what) {
  const size_t width = static_cast<size_t>(batch.num_logprobs + 1);
  const size_t size = static_cast<size_t>(batch.vocab_size);
  int differences = 0;
  for (size_t i = 0; i < batch.num_rows(); ++i) {
    std::string difference;
    if (host.token_ids[i] != device.token_ids[i]) {
      difference =
          "token " + std::to_string(host.token_ids[i]) + " and " + std::to_string(device.token_ids[i]);
    } else if (host.status[i] != device.status[i]) {
      difference = "status " + std::to_string(host.status[i]) + " and " + std::to_string(device.status[i]);
    } else if (width != 0 && host.ranks[i] != device.ranks[i]) {
      difference = "rank " + std::to_string(host.ranks[i]) + " and " + std::to_string(device.ranks[i]);
    } else if (width != 0 &&
               std::memcmp(&host.top_ids[i * width], &device.top_ids[i * width], width * 4) != 0) {
      difference = "top ids";
    } else if (width != 0 &&
               std::memcmp(&host.top_logprobs[i * width], &device.top_logprobs[i * width], width * 4) != 0) {
      difference = "logprobs";
    } else if (batch.want_processed &&
               std::memcmp(&host.processed[i * size], &device.processed[i * size], size * 4) != 0) {
      difference = "processed logits";
    }
    if (difference.empty()) continue;
    if (differences++ == 0) {
      const RowConstants& c = batch.inputs[i].constants;
      *what = "row " + std::to_string(i) + " of " + std::to_string(batch.num_rows()) + ", size " +
              std::to_string(batch.vocab_size) + ", dtype " + std::to_string(static_cast<int>(batch.dtype)) +
              ", scale " + std::to_string(c.scale) + ", top_k " + std::to_string(c.top_k) + ", top_p " +
              std::to_string(c.has_top_p ? static_cast<double>(c.top_p_fixed) * 0x1p-64 : 1.0) + ", min_z " +
              std::to_string(c.min_z) + ", greedy " + std::to_string(c.is_greedy) + ", logprobs " +
              std::to_string(batch.num_logprobs) + (batch.processed_logprobs ? " processed" : " raw") +
              ", edits " + std::to_string(batch.inputs[i].edits.biases.size) + "/" +
              std::to_string(batch.inputs[i].edits.uses.size) + ": " + difference;
    }
  }
  return differences;
}

inline void RestrictTo(cuda::Family family, RowParams* params) {
  if (family == cuda::Family::kGreedy) params->temperature = 0.0f;
  if (family != cuda::Family::kOpen) return;
  params->top_k = 0;
  params->top_p = 1.0f;
}

// Random rows of all shapes, parameters and edits; storage keeps what the inputs borrow.
struct RandomBatch {
  Batch batch;
  std::vector<rows::Row> storage;
};

inline RandomBatch MakeRandomBatch(rows::Generator& random, int num_rows, int32_t vocab_size) {
  RandomBatch made;
  Batch& batch = made.batch;
  batch.vocab_size = vocab_size;
  batch.dtype = static_cast<Dtype>(rows::Below(random, 3));
  // Padding of rows: none, a little (odd addresses), to 16 bytes.
  batch.row_stride = vocab_size + rows::OneOf(random, {0, 1, 3, 64});
  if (rows::Chance(random, 0.5)) batch.row_stride = (batch.row_stride + 7) / 8 * 8;
  const size_t item = batch.dtype == Dtype::kFloat32 ? 4 : 2;
  const size_t row_bytes = static_cast<size_t>(batch.row_stride) * item;
  batch.logits.assign(static_cast<size_t>(num_rows) * row_bytes, '\xff');
  batch.bitmask.assign(static_cast<size_t>(num_rows) * batch.words(), 0);
  if (rows::Chance(random, 0.3)) {
    batch.num_logprobs = rows::OneOf(random, {0, 1, 5, 20, 128});
    batch.processed_logprobs = rows::Chance(random, 0.5);
  }
  batch.want_processed = rows::Chance(random, 0.1);
  // Batches of each family, and without edits, have kernels of their own.
  const auto family = static_cast<cuda::Family>(rows::Below(random, 3));
  const bool has_edits = rows::Chance(random, 0.6);
  made.storage.resize(static_cast<size_t>(num_rows));
  for (size_t i = 0; i < made.storage.size(); ++i) {
    rows::Row& row = made.storage[i];
    const auto shape = static_cast<rows::Shape>(random() % static_cast<uint64_t>(rows::Shape::kCount));
    rows::FillRow(random, shape, vocab_size, &row);
    RestrictTo(family, &row.params);
    PrepareRow(row.params, vocab_size, &row.input.constants);
    if (!has_edits) {
      const RowEdits all = row.input.edits;
      row.input.edits = {};
      row.input.edits.allowed_mask = all.allowed_mask;
      row.input.edits.grammar_mask = all.grammar_mask;
    }
    char* out = batch.logits.data() + i * row_bytes;
    if (batch.dtype == Dtype::kFloat32) {
      std::memcpy(out, row.logits.data(), row.logits.size() * 4);
    } else {
      for (size_t j = 0; j < row.logits.size(); ++j) {
        const uint32_t bits = FloatBits(row.logits[j]);
        uint16_t narrow = static_cast<uint16_t>(bits >> 16);
        if (batch.dtype == Dtype::kFloat16 && !IsNan(row.logits[j])) {
          narrow = static_cast<uint16_t>((0x4000u | (bits >> 13 & 0x7ffu)) | (bits >> 31 << 15));
          if (row.logits[j] == NegativeInfinity()) narrow = 0xfc00u;
        }
        std::memcpy(out + 2 * j, &narrow, 2);
      }
    }
    row.input.logits = out;
    row.input.dtype = batch.dtype;
    row.input.num_logprobs = batch.num_logprobs;
    row.input.processed_logprobs = batch.processed_logprobs;
    if (row.input.edits.grammar_mask != nullptr) {
      std::memcpy(batch.bitmask.data() + i * batch.words(), row.grammar.data(), batch.words() * 4);
    }
    batch.inputs.push_back(row.input);
  }
  return made;
}

}  // namespace gpu
