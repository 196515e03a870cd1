#include "sampler/cuda/device_sampler.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

namespace twinjet::sampler::cuda {
namespace {

// Makes `device` current for the lifetime of the object.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    CheckCuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) CheckCuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = previous_ != device;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

bool IsCapturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  CheckCuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

// Joins a row's lists into one entry per token, in order of token.
void AppendEdits(const RowEdits& row, std::vector<Edit>* edits) {
  const auto begin = static_cast<std::ptrdiff_t>(edits->size());
  for (int32_t id : row.banned) edits->push_back({id, kEditMasked, 0, 0.0f});
  for (int32_t id : row.early_stops) edits->push_back({id, kEditEarlyStop, 0, 0.0f});
  for (const TokenBias& bias : row.biases) edits->push_back({bias.token_id, kEditBias, 0, bias.bias});
  for (const TokenUse& use : row.uses) {
    if (use.in_prompt || use.output_count > 0)
      edits->push_back({use.token_id, kEditSeen, use.output_count, 0.0f});
  }
  std::sort(edits->begin() + begin, edits->end(),
            [](const Edit& a, const Edit& b) { return a.token_id < b.token_id; });
  auto last = edits->begin() + begin;
  for (auto next = last; next != edits->end(); ++next) {
    if (next == last) continue;
    if (next->token_id != last->token_id) {
      *++last = *next;
      continue;
    }
    last->flags |= next->flags;
    last->output_count += next->output_count;  // at most one of the two has it
    if ((next->flags & kEditBias) != 0) last->bias = next->bias;
  }
  if (edits->begin() + begin != edits->end()) edits->erase(last + 1, edits->end());
}

}  // namespace

CudaError::CudaError(const char* call, cudaError_t error)
    : std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error)) {}

void CheckCuda(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky is reported once
  throw CudaError(call, error);
}

DeviceSampler::DeviceSampler(int device, int num_slots)
    : device_(device), slots_(static_cast<size_t>(std::max(1, num_slots))) {
  const CurrentDevice current(device);
  CheckCuda(QueryLimits(device, &limits_), "QueryLimits");
  CheckCuda(cudaEventCreateWithFlags(&last_work_, cudaEventDisableTiming), "cudaEventCreate");
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
}

void DeviceSampler::GrowBatch(size_t bytes) {
  if (bytes <= batch_size_) return;
  // Penalties add a token a step; freeing memory waits for the device, so it must not happen at each.
  bytes = std::bit_ceil(bytes);
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
  if (slot.in_flight) CheckCuda(cudaEventSynchronize(slot.copied), "cudaEventSynchronize");
  slot.in_flight = false;
  if (bytes > slot.size) {
    bytes = std::bit_ceil(bytes);
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

void DeviceSampler::Reserve(int32_t num_rows, int32_t vocab_size, size_t num_edits, size_t num_allowed_rows) {
  const CurrentDevice current(device_);
  const size_t words = (static_cast<size_t>(vocab_size) + 31) / 32;
  const size_t bytes = RoundUp16(static_cast<size_t>(num_rows) * sizeof(DeviceRow)) +
                       num_edits * sizeof(Edit) + RoundUp16(num_allowed_rows * words * sizeof(uint32_t));
  GrowBatch(bytes);
  for (size_t i = 0; i < slots_.size(); ++i) {
    TakeSlot(bytes);
    next_slot_ = (next_slot_ + 1) % slots_.size();
  }
  GrowRows(num_rows);
  GrowScratch(ScratchFloats(ChooseShape(limits_, num_rows, vocab_size, force_cluster_), vocab_size));
}

LaunchShape DeviceSampler::ShapeOf(int32_t num_rows, int32_t vocab_size) {
  LaunchShape shape = ChooseShape(limits_, num_rows, vocab_size, force_cluster_);
  if (!shape.on_chip) return shape;
  if (shape.cluster != counted_cluster_ || shape.shared_bytes != counted_bytes_) {
    CheckCuda(CountClusters(shape.cluster, shape.shared_bytes, &num_clusters_), "CountClusters");
    counted_cluster_ = shape.cluster;
    counted_bytes_ = shape.shared_bytes;
  }
  // Clusters go from row to row: none waits for another to end.
  shape.num_blocks = std::min(shape.num_blocks, std::max(num_clusters_, 1) * shape.cluster);
  return shape;
}

void DeviceSampler::Prepare(std::span<const HostRow> rows, int32_t vocab_size, cudaStream_t stream) {
  const CurrentDevice current(device_);
  const size_t words = (static_cast<size_t>(vocab_size) + 31) / 32;
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
  const size_t bytes = allowed_offset_ + num_allowed * words * sizeof(uint32_t);
  GrowBatch(bytes);
  GrowRows(static_cast<int32_t>(rows.size()));
  char* data = TakeSlot(bytes);
  auto* device_rows = reinterpret_cast<DeviceRow*>(data);
  auto* allowed = reinterpret_cast<uint32_t*>(data + allowed_offset_);
  int32_t allowed_row = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    DeviceRow& out = device_rows[i];
    out = {};
    out.constants = rows[i].constants;
    out.bitmask_row = rows[i].bitmask_row;
    out.allowed_row = -1;
    out.edit_begin = static_cast<int32_t>(edit_begins_[i]);
    out.edit_end = static_cast<int32_t>(i + 1 < rows.size() ? edit_begins_[i + 1] : edits_.size());
    out.has_early_stops = rows[i].edits.early_stops.size != 0 ? 1 : 0;
    if (rows[i].edits.allowed_mask != nullptr) {
      out.allowed_row = allowed_row++;
      std::memcpy(allowed, rows[i].edits.allowed_mask, words * sizeof(uint32_t));
      allowed += words;
    }
  }
  if (!edits_.empty()) std::memcpy(data + edits_offset_, edits_.data(), edits_.size() * sizeof(Edit));
  Follow(stream);
  CheckCuda(cudaMemcpyAsync(batch_, data, bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
  Slot& slot = slots_[next_slot_];
  CheckCuda(cudaEventRecord(slot.copied, stream), "cudaEventRecord");
  slot.in_flight = true;
  next_slot_ = (next_slot_ + 1) % slots_.size();
  num_rows_ = static_cast<int32_t>(rows.size());
  vocab_size_ = vocab_size;
  CheckCuda(cudaEventRecord(last_work_, stream), "cudaEventRecord");
  has_work_ = true;
}

void DeviceSampler::Sample(const Logits& logits, const Outputs& outputs, cudaStream_t stream) {
  const CurrentDevice current(device_);
  if (logits.num_rows != num_rows_ || logits.vocab_size != vocab_size_) {
    throw std::invalid_argument("the logits have another shape than the rows that were prepared");
  }
  if (num_rows_ == 0) return;
  const LaunchShape shape = ShapeOf(num_rows_, vocab_size_);
  const bool capturing = IsCapturing(stream);
  const size_t floats = ScratchFloats(shape, vocab_size_);
  if (capturing && floats > scratch_floats_) {
    throw std::invalid_argument(
        "a capture may not allocate: draw a batch of this size, or Reserve(), before it");
  }
  GrowScratch(floats);
  SampleArgs args;
  args.logits = logits.data;
  args.row_stride = logits.row_stride;
  args.dtype = logits.dtype;
  args.num_rows = num_rows_;
  args.vocab_size = vocab_size_;
  args.rows = reinterpret_cast<const DeviceRow*>(batch_);
  args.edits = reinterpret_cast<const Edit*>(batch_ + edits_offset_);
  args.bitmask = logits.bitmask;
  args.bitmask_stride = logits.bitmask_stride;
  args.allowed = reinterpret_cast<const uint32_t*>(batch_ + allowed_offset_);
  args.token_ids = outputs.token_ids;
  args.status = outputs.status;
  args.info = info_;
  args.processed_logits = outputs.processed_logits;
  args.scratch = scratch_;
  if (!capturing) Follow(stream);  // in a graph, replays are ordered by the stream they are launched on
  CheckCuda(LaunchSample(args, shape, stream), "LaunchSample");
  if (outputs.num_logprobs >= 0) {
    LogprobsArgs logprobs;
    logprobs.sample = args;
    logprobs.sample.processed_logits = nullptr;
    logprobs.num_top = outputs.num_logprobs;
    logprobs.processed = outputs.processed_logprobs ? 1 : 0;
    logprobs.top_ids = outputs.top_ids;
    logprobs.top_logprobs = outputs.top_logprobs;
    logprobs.ranks = outputs.ranks;
    CheckCuda(LaunchLogprobs(logprobs, shape, stream), "LaunchLogprobs");
  }
  if (capturing) return;
  CheckCuda(cudaEventRecord(last_work_, stream), "cudaEventRecord");
  has_work_ = true;
}

}  // namespace twinjet::sampler::cuda
