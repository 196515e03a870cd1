// The sampler on one device: memory it owns, and the steps a batch takes.
//
//   DeviceSampler sampler(device);
//   sampler.Prepare(rows, vocab_size, stream);             // parameters and edits, host to device
//   sampler.Sample(logits, outputs, stream);     // kernels only: may be captured in a graph
//
// Prepare copies through pinned buffers and does not wait for the device, except when it is num_slots batches
// ahead of it, or when memory has to grow; it grows by doubling to the largest batch seen and then stays.
// Calls are ordered by the streams they are given: when the stream changes, the new one waits for the old
// one's work. One caller at a time.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "sampler/cuda/launch.h"
#include "sampler/row.h"

namespace twinjet::sampler::cuda {

// A CUDA call failed; what() says which and how.
class CudaError : public std::runtime_error {
 public:
  CudaError(const char* call, cudaError_t error);
};

void CheckCuda(cudaError_t error, const char* call);

// Makes `device` current for the lifetime of the object.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// How often the host had to wait for the device, by cause.
struct Waits {
  uint64_t buffers = 0;  // all pinned buffers were on their way
  uint64_t memory = 0;   // memory had to grow, and freeing the old waits
};

// Rows that lie on the device already, with what they refer to.
struct RowsOnDevice {
  const DeviceRow* rows = nullptr;
  const Edit* edits = nullptr;
  const uint32_t* allowed = nullptr;
  Traits traits = {};
};

// One row's parameters. edits.grammar_mask is ignored: the grammar's masks are a device matrix.
struct HostRow {
  RowConstants constants;
  RowEdits edits;
  int32_t bitmask_row = -1;  // of Logits::bitmask; -1: none
};

// Logits of a batch on the device, rows apart by row_stride elements, tokens adjacent.
struct Logits {
  const void* data = nullptr;
  int64_t row_stride = 0;
  Dtype dtype = Dtype::kFloat32;
  int32_t num_rows = 0;
  int32_t vocab_size = 0;
  const uint32_t* bitmask = nullptr;  // [*, bitmask_stride] words, or null
  int64_t bitmask_stride = 0;
};

// Where results go: device pointers of the caller.
struct Outputs {
  int32_t* token_ids = nullptr;       // [num_rows], -1 where no token is admissible
  uint32_t* status = nullptr;         // [num_rows]
  float* processed_logits = nullptr;  // [num_rows, vocab_size] or null
  int32_t num_logprobs = -1;          // -1: none; 0 .. kMaxTopLogprobs
  bool processed_logprobs = false;
  int32_t* top_ids = nullptr;  // [num_rows, 1 + num_logprobs]
  float* top_logprobs = nullptr;
  int32_t* ranks = nullptr;  // [num_rows]
};

class DeviceSampler {
 public:
  // num_slots: batches that may be on their way to the device at once, at least 1. has_one_stream: the caller
  // orders its streams itself, which spares events. Throws CudaError.
  explicit DeviceSampler(int device, int num_slots = 4, bool has_one_stream = false);
  ~DeviceSampler();
  DeviceSampler(const DeviceSampler&) = delete;
  DeviceSampler& operator=(const DeviceSampler&) = delete;

  int device() const { return device_; }
  const DeviceLimits& limits() const { return limits_; }

  // Blocks a row, for measurements: 0 chooses; otherwise a power of two up to limits().max_cluster.
  void set_cluster(int32_t cluster) { force_cluster_ = cluster; }

  // For measurements: what draws in captures may take for granted of all rows that will be prepared for them.
  void set_captured_traits(const Traits& traits) { captured_traits_ = traits; }
  const Traits& prepared_traits() const { return traits_; }

  // For tests: runs at most so many clusters at once, so that few rows are claimed too; 0: as many as fit.
  void set_max_clusters(int32_t max_clusters) { max_clusters_ = max_clusters; }

  // For tests: pretends a smaller device, such as one without clusters.
  void set_limits(const DeviceLimits& limits) { limits_ = limits; }

  // Allocates for batches up to this size at once, so that no later call does.
  void Reserve(int32_t num_rows, int32_t vocab_size, size_t num_edits, size_t num_allowed_rows);

  // Borrows rows for the call only.
  void Prepare(std::span<const HostRow> rows, int32_t vocab_size, cudaStream_t stream);

  // Draws the rows that were prepared last; logits has as many. Launches one kernel, or two with logprobs.
  void Sample(const Logits& logits, const Outputs& outputs, cudaStream_t stream);

  // The same for rows that the caller brought to the device.
  void SampleRows(const RowsOnDevice& rows, const Logits& logits, const Outputs& outputs,
                  cudaStream_t stream);

  // Copies to the device through a pinned buffer, waiting as Prepare does. Borrows data for the call only.
  void Upload(const void* data, size_t bytes, void* to, cudaStream_t stream);

  const Waits& waits() const { return waits_; }

 private:
  struct Slot {
    char* data = nullptr;  // pinned
    size_t size = 0;
    cudaEvent_t copied = nullptr;
    bool in_flight = false;
  };

  void GrowBatch(size_t bytes);
  void GrowRows(int32_t num_rows);
  void GrowScratch(size_t floats);
  void Follow(cudaStream_t stream);
  void RecordWork(cudaStream_t stream);
  char* TakeSlot(size_t bytes);
  void CopySlot(void* to, size_t bytes, cudaStream_t stream);  // the slot taken last
  LaunchShape ShapeOf(int32_t num_rows, int32_t vocab_size, bool keeps_narrow);
  uint32_t* TakeCounter(bool capturing);
  // How long memory takes for one block's slice on each multiprocessor.
  int32_t CyclesPerWave(const LaunchShape& shape, const Logits& logits, int32_t num_waves) const;

  // Replays of different graphs may overlap: each captured launch has a counter of its own, as far as there
  // are.
  static constexpr size_t kNumCounters = 4096;

  int device_;
  bool has_one_stream_;
  DeviceLimits limits_;
  int32_t force_cluster_ = 0;
  int32_t max_clusters_ = 0;
  std::map<std::pair<int32_t, size_t>, int> num_clusters_;  // by cluster and shared bytes
  std::vector<Slot> slots_;
  size_t next_slot_ = 0;
  std::vector<Edit> edits_;            // of the batch being prepared
  std::vector<uint32_t> edit_begins_;  // of its rows
  char* batch_ = nullptr;              // device: rows, edits, allowed masks
  size_t batch_size_ = 0;
  DrawInfo* info_ = nullptr;
  int32_t info_rows_ = 0;
  float* scratch_ = nullptr;
  size_t scratch_floats_ = 0;
  uint32_t* counters_ =
      nullptr;  // device, 0 while no launch runs; the first is for launches outside captures
  size_t next_counter_ = 1;
  int32_t num_rows_ = 0;  // prepared
  int32_t vocab_size_ = 0;
  size_t edits_offset_ = 0;
  size_t allowed_offset_ = 0;
  cudaStream_t last_stream_ = nullptr;
  cudaEvent_t last_work_ = nullptr;
  bool has_work_ = false;
  Traits traits_;  // of the rows prepared
  Traits captured_traits_;
  Waits waits_;
};

}  // namespace twinjet::sampler::cuda
