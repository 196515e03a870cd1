#include "sampler/cuda/device_sampler.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "sampler/cuda/edits.h"

namespace twinjet::sampler::cuda {
namespace {

// A mask of allowed tokens, up to the next 16 bytes.
size_t MaskBytes(int32_t vocab_size) {
  return RoundUp16((static_cast<size_t>(vocab_size) + 31) / 32 * sizeof(uint32_t));
}

bool IsCapturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  CheckCuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

CudaError::CudaError(const char* call, cudaError_t error)
    : std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error)) {}

void CheckCuda(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky is reported once
  throw CudaError(call, error);
}

CurrentDevice::CurrentDevice(int device) {
  CheckCuda(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ != device) CheckCuda(cudaSetDevice(device), "cudaSetDevice");
  changed_ = previous_ != device;
}

CurrentDevice::~CurrentDevice() {
  if (changed_) cudaSetDevice(previous_);
}

DeviceSampler::DeviceSampler(int device, int num_slots, bool has_one_stream)
    : device_(device), has_one_stream_(has_one_stream), slots_(static_cast<size_t>(std::max(1, num_slots))) {
  const CurrentDevice current(device);
  CheckCuda(QueryLimits(device, &limits_), "QueryLimits");
  CheckCuda(cudaEventCreateWithFlags(&last_work_, cudaEventDisableTiming), "cudaEventCreate");
  void* counters = nullptr;
  CheckCuda(cudaMalloc(&counters, kNumCounters * sizeof(uint32_t)), "cudaMalloc");
  counters_ = static_cast<uint32_t*>(counters);
  CheckCuda(cudaMemset(counters_, 0, kNumCounters * sizeof(uint32_t)), "cudaMemset");
  CheckCuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
  for (Slot& slot : slots_) {
    CheckCuda(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming), "cudaEventCreate");
  }
}

// Frees wait for the device's work; their errors have nowhere to go.
DeviceSampler::~DeviceSampler() {
  for (Slot& slot : slots_) {
    if (slot.copied != nullptr) cudaEventDestroy(slot.copied);
    cudaFreeHost(slot.data);
  }
  if (last_work_ != nullptr) cudaEventDestroy(last_work_);
  cudaFree(batch_);
  cudaFree(info_);
  cudaFree(scratch_);
  cudaFree(counters_);
}

void DeviceSampler::GrowBatch(size_t bytes) {
  if (bytes <= batch_size_) return;
  // Penalties add a token a step; freeing memory waits for the device, so it must not happen at each.
  bytes = std::bit_ceil(bytes);
  if (batch_ != nullptr) ++waits_.memory;
  CheckCuda(cudaFree(batch_), "cudaFree");
  batch_ = nullptr;
  batch_size_ = 0;
  void* data = nullptr;
  CheckCuda(cudaMalloc(&data, bytes), "cudaMalloc");
  batch_ = static_cast<char*>(data);
  batch_size_ = bytes;
}

void DeviceSampler::GrowRows(int32_t num_rows) {
  if (num_rows <= info_rows_) return;
  if (info_ != nullptr) ++waits_.memory;
  CheckCuda(cudaFree(info_), "cudaFree");
  info_ = nullptr;
  info_rows_ = 0;
  void* data = nullptr;
  CheckCuda(cudaMalloc(&data, static_cast<size_t>(num_rows) * sizeof(DrawInfo)), "cudaMalloc");
  info_ = static_cast<DrawInfo*>(data);
  info_rows_ = num_rows;
}

void DeviceSampler::GrowScratch(size_t floats) {
  if (floats <= scratch_floats_) return;
  if (scratch_ != nullptr) ++waits_.memory;
  CheckCuda(cudaFree(scratch_), "cudaFree");
  scratch_ = nullptr;
  scratch_floats_ = 0;
  void* data = nullptr;
  CheckCuda(cudaMalloc(&data, floats * sizeof(float)), "cudaMalloc");
  scratch_ = static_cast<float*>(data);
  scratch_floats_ = floats;
}

char* DeviceSampler::TakeSlot(size_t bytes) {
  Slot& slot = slots_[next_slot_];
  if (slot.in_flight && cudaEventQuery(slot.copied) != cudaSuccess) {
    cudaGetLastError();  // "not ready" is no error
    ++waits_.buffers;
    CheckCuda(cudaEventSynchronize(slot.copied), "cudaEventSynchronize");
  }
  slot.in_flight = false;
  if (bytes > slot.size) {
    bytes = std::bit_ceil(bytes);
    if (slot.data != nullptr) ++waits_.memory;
    CheckCuda(cudaFreeHost(slot.data), "cudaFreeHost");
    slot.data = nullptr;
    slot.size = 0;
    void* data = nullptr;
    CheckCuda(cudaMallocHost(&data, bytes), "cudaMallocHost");
    slot.data = static_cast<char*>(data);
    slot.size = bytes;
  }
  return slot.data;
}

void DeviceSampler::Follow(cudaStream_t stream) {
  if (has_work_ && stream != last_stream_) {
    CheckCuda(cudaStreamWaitEvent(stream, last_work_, 0), "cudaStreamWaitEvent");
  }
  last_stream_ = stream;
}

void DeviceSampler::RecordWork(cudaStream_t stream) {
  if (has_one_stream_) return;
  CheckCuda(cudaEventRecord(last_work_, stream), "cudaEventRecord");
  has_work_ = true;
}

void DeviceSampler::Reserve(int32_t num_rows, int32_t vocab_size, size_t num_edits, size_t num_allowed_rows) {
  const CurrentDevice current(device_);
  const size_t bytes = RoundUp16(static_cast<size_t>(num_rows) * sizeof(DeviceRow)) +
                       num_edits * sizeof(Edit) + num_allowed_rows * MaskBytes(vocab_size);
  GrowBatch(bytes);
  for (size_t i = 0; i < slots_.size(); ++i) {
    TakeSlot(bytes);
    next_slot_ = (next_slot_ + 1) % slots_.size();
  }
  GrowRows(num_rows);
  GrowScratch(ScratchFloats(ChooseShape(limits_, num_rows, vocab_size, force_cluster_), vocab_size));
}

LaunchShape DeviceSampler::ShapeOf(int32_t num_rows, int32_t vocab_size, bool keeps_narrow) {
  LaunchShape shape = ChooseShape(limits_, num_rows, vocab_size, force_cluster_, keeps_narrow);
  if (!shape.on_chip) return shape;
  const auto [place, is_new] = num_clusters_.try_emplace({shape.cluster, shape.shared_bytes}, 0);
  if (is_new) CheckCuda(CountClusters(shape.cluster, shape.shared_bytes, &place->second), "CountClusters");
  // Clusters go from row to row: none waits for another to end.
  int32_t most = std::max(place->second, 1);
  if (max_clusters_ > 0) most = std::min(most, max_clusters_);
  shape.num_blocks = std::min(shape.num_blocks, most * shape.cluster);
  return shape;
}

int32_t DeviceSampler::CyclesPerWave(const LaunchShape& shape, const Logits& logits,
                                     int32_t num_waves) const {
  const double item = logits.dtype == Dtype::kFloat32 ? 4 : 2;
  const double slice_bytes = static_cast<double>(shape.groups_per_block) * kGroupSize * item;
  if (num_waves < 2 || !(limits_.bytes_per_cycle > 0)) return 0;
  return static_cast<int32_t>(slice_bytes * shape.num_blocks / num_waves / limits_.bytes_per_cycle);
}

void DeviceSampler::Prepare(std::span<const HostRow> rows, int32_t vocab_size, cudaStream_t stream) {
  const CurrentDevice current(device_);
  const size_t mask_bytes = MaskBytes(vocab_size);
  edits_.clear();
  edit_begins_.clear();
  size_t num_allowed = 0;
  for (const HostRow& row : rows) {
    edit_begins_.push_back(static_cast<uint32_t>(edits_.size()));
    AppendEdits(row.edits, &edits_);
    if (row.edits.allowed_mask != nullptr) ++num_allowed;
  }
  edits_offset_ = RoundUp16(rows.size() * sizeof(DeviceRow));
  allowed_offset_ = edits_offset_ + edits_.size() * sizeof(Edit);
  const size_t bytes = allowed_offset_ + num_allowed * mask_bytes;
  GrowBatch(bytes);
  GrowRows(static_cast<int32_t>(rows.size()));
  char* data = TakeSlot(bytes);
  auto* device_rows = reinterpret_cast<DeviceRow*>(data);
  size_t allowed = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    DeviceRow& out = device_rows[i];
    out = {};
    out.constants = rows[i].constants;
    out.bitmask_row = rows[i].bitmask_row;
    out.allowed_at = -1;
    out.edit_begin = static_cast<int32_t>(edit_begins_[i]);
    out.edit_end = static_cast<int32_t>(i + 1 < rows.size() ? edit_begins_[i + 1] : edits_.size());
    out.has_early_stops = rows[i].edits.early_stops.size != 0 ? 1 : 0;
    if (rows[i].edits.allowed_mask != nullptr) {
      out.allowed_at = static_cast<int32_t>(allowed / 16);
      const size_t words = (static_cast<size_t>(vocab_size) + 31) / 32;
      std::memcpy(data + allowed_offset_ + allowed, rows[i].edits.allowed_mask, words * sizeof(uint32_t));
      allowed += mask_bytes;
    }
  }
  if (!edits_.empty()) std::memcpy(data + edits_offset_, edits_.data(), edits_.size() * sizeof(Edit));
  CopySlot(batch_, bytes, stream);
  num_rows_ = static_cast<int32_t>(rows.size());
  vocab_size_ = vocab_size;
  traits_ = {Family::kGreedy, !edits_.empty()};
  for (const HostRow& row : rows) traits_.family = std::max(traits_.family, FamilyOf(row.constants));
}

void DeviceSampler::CopySlot(void* to, size_t bytes, cudaStream_t stream) {
  Slot& slot = slots_[next_slot_];
  Follow(stream);
  CheckCuda(cudaMemcpyAsync(to, slot.data, bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
  CheckCuda(cudaEventRecord(slot.copied, stream), "cudaEventRecord");
  slot.in_flight = true;
  next_slot_ = (next_slot_ + 1) % slots_.size();
  RecordWork(stream);
}

void DeviceSampler::Upload(const void* data, size_t bytes, void* to, cudaStream_t stream) {
  const CurrentDevice current(device_);
  std::memcpy(TakeSlot(bytes), data, bytes);
  CopySlot(to, bytes, stream);
}

uint32_t* DeviceSampler::TakeCounter(bool capturing) {
  if (!capturing) return counters_;
  return next_counter_ < kNumCounters ? counters_ + next_counter_++ : nullptr;
}

void DeviceSampler::Sample(const Logits& logits, const Outputs& outputs, cudaStream_t stream) {
  if (logits.num_rows != num_rows_ || logits.vocab_size != vocab_size_) {
    throw std::invalid_argument("the logits have another shape than the rows that were prepared");
  }
  SampleRows(
      {reinterpret_cast<const DeviceRow*>(batch_), reinterpret_cast<const Edit*>(batch_ + edits_offset_),
       reinterpret_cast<const uint32_t*>(batch_ + allowed_offset_), traits_},
      logits, outputs, stream);
}

void DeviceSampler::SampleRows(const RowsOnDevice& rows, const Logits& logits, const Outputs& outputs,
                               cudaStream_t stream) {
  const CurrentDevice current(device_);
  if (logits.num_rows == 0) return;
  GrowRows(logits.num_rows);
  const bool capturing = IsCapturing(stream);
  const Traits& traits = capturing ? captured_traits_ : rows.traits;
  const bool keeps_narrow = logits.dtype != Dtype::kFloat32 && !traits.has_edits && limits_.max_cluster > 1;
  const LaunchShape shape = ShapeOf(logits.num_rows, logits.vocab_size, keeps_narrow);
  // Logprobs are of widened rows, which may need scratch memory where the draw does not.
  const bool has_logprobs = outputs.num_logprobs >= 0;
  const LaunchShape wide_shape =
      keeps_narrow && has_logprobs ? ShapeOf(logits.num_rows, logits.vocab_size, false) : shape;
  const size_t floats =
      std::max(ScratchFloats(shape, logits.vocab_size), ScratchFloats(wide_shape, logits.vocab_size));
  if (capturing && floats > scratch_floats_) {
    throw std::invalid_argument(
        "a capture may not allocate: draw a batch of this size, or Reserve(), before it");
  }
  GrowScratch(floats);
  SampleArgs args;
  args.logits = logits.data;
  args.row_stride = logits.row_stride;
  args.dtype = logits.dtype;
  args.num_rows = logits.num_rows;
  args.vocab_size = logits.vocab_size;
  args.rows = rows.rows;
  args.edits = rows.edits;
  args.bitmask = logits.bitmask;
  args.bitmask_stride = logits.bitmask_stride;
  args.allowed = rows.allowed;
  args.token_ids = outputs.token_ids;
  args.status = outputs.status;
  args.info = info_;
  args.processed_logits = outputs.processed_logits;
  args.scratch = scratch_;
  args.family = traits.family;
  const int32_t num_clusters = shape.num_blocks / shape.cluster;
  if (shape.on_chip && num_clusters < logits.num_rows) {
    args.num_claims = TakeCounter(capturing);
    args.num_waves = DivideUp(shape.num_blocks, limits_.num_multiprocessors);
    args.cycles_per_wave = CyclesPerWave(shape, logits, args.num_waves);
  }
  if (!capturing) Follow(stream);  // in a graph, replays are ordered by the stream they are launched on
  CheckCuda(LaunchSample(args, shape, stream), "LaunchSample");
  if (has_logprobs) {
    LogprobsArgs logprobs;
    logprobs.sample = args;
    logprobs.sample.processed_logits = nullptr;
    logprobs.num_top = outputs.num_logprobs;
    logprobs.processed = outputs.processed_logprobs ? 1 : 0;
    logprobs.top_ids = outputs.top_ids;
    logprobs.top_logprobs = outputs.top_logprobs;
    logprobs.ranks = outputs.ranks;
    CheckCuda(LaunchLogprobs(logprobs, wide_shape, stream), "LaunchLogprobs");
  }
  if (capturing) return;
  RecordWork(stream);
}

}  // namespace twinjet::sampler::cuda
