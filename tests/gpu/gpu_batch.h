// A batch of rows on the host and the device, drawn by both.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "sampler/cuda/device_sampler.h"
#include "sampler_batches.h"

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

}  // namespace gpu
