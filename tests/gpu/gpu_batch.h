// A batch of rows on the host and the device, drawn by both.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "sampler/batch.h"
#include "sampler/cuda/device_sampler.h"
#include "sampler_rows.h"

namespace gpu {

using namespace twinjet::sampler;
using cuda::CheckCuda;

// Device memory of a vector's size, freed with the object.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : size_(size) {
    void* data = nullptr;
    CheckCuda(cudaMalloc(&data, std::max<size_t>(size, 1) * sizeof(T)), "cudaMalloc");
    data_ = static_cast<T*>(data);
    // Anything not written shows.
    CheckCuda(cudaMemset(data_, 0xa5, std::max<size_t>(size, 1) * sizeof(T)), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) { Upload(host); }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  size_t size() const { return size_; }
  void Upload(const std::vector<T>& host) {
    CheckCuda(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  std::vector<T> Download() const {
    std::vector<T> host(size_);
    CheckCuda(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return host;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

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

// logits: the batch's on the device. offset_elements shifts them, for rows at odd addresses.
inline Drawn DrawOnDevice(cuda::DeviceSampler& sampler, const Batch& batch, const void* logits,
                          const uint32_t* bitmask, cudaStream_t stream) {
  const size_t n = batch.num_rows();
  const size_t width = static_cast<size_t>(batch.num_logprobs + 1);
  std::vector<cuda::HostRow> rows(n);
  for (size_t i = 0; i < n; ++i) {
    rows[i].constants = batch.inputs[i].constants;
    rows[i].edits = batch.inputs[i].edits;
    if (batch.inputs[i].edits.grammar_mask != nullptr) rows[i].bitmask_row = static_cast<int32_t>(i);
  }
  DeviceArray<int32_t> token_ids(n), top_ids(n * width), ranks(n);
  DeviceArray<uint32_t> status(n);
  DeviceArray<float> top_logprobs(n * width);
  DeviceArray<float> processed(batch.want_processed ? n * static_cast<size_t>(batch.vocab_size) : 0);
  cuda::Logits input;
  input.data = logits;
  input.row_stride = batch.row_stride;
  input.dtype = batch.dtype;
  input.num_rows = static_cast<int32_t>(n);
  input.vocab_size = batch.vocab_size;
  input.bitmask = bitmask;
  input.bitmask_stride = static_cast<int64_t>(batch.words());
  cuda::Outputs outputs;
  outputs.token_ids = token_ids.data();
  outputs.status = status.data();
  outputs.num_logprobs = batch.num_logprobs;
  outputs.processed_logprobs = batch.processed_logprobs;
  outputs.top_ids = top_ids.data();
  outputs.top_logprobs = top_logprobs.data();
  outputs.ranks = ranks.data();
  if (batch.want_processed) outputs.processed_logits = processed.data();
  CheckCuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // the poison is in place
  sampler.Prepare(rows, batch.vocab_size, stream);
  sampler.Sample(input, outputs, stream);
  CheckCuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  Drawn drawn;
  drawn.token_ids = token_ids.Download();
  drawn.status = status.Download();
  if (width != 0) drawn.ranks = ranks.Download();
  drawn.top_ids = top_ids.Download();
  drawn.top_logprobs = top_logprobs.Download();
  drawn.processed = processed.Download();
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

}  // namespace gpu
