#include "sampler/cuda/seat_sampler.h"

#include <algorithm>
#include <bit>
#include <stdexcept>

namespace twinjet::sampler::cuda {
namespace {

// Messages on their way at once. An engine is at most a few steps ahead of its device.
constexpr int kMessages = 8;
// For penalties, biases and bad words: 1 MiB to begin with, and at most so much of a shared table at a time.
constexpr size_t kFirstUnits = 1 << 16;
constexpr size_t kFirstPages = 4;

}  // namespace

SeatSampler::SeatSampler(int device, int32_t vocab_size, int32_t max_rows)
    : device_(device), vocab_size_(vocab_size), table_(vocab_size), sampler_(device, kMessages, true) {
  const CurrentDevice current(device);
  const auto rows = static_cast<size_t>(std::max(max_rows, 1));
  // A fresh seat with some edits for every row.
  const size_t units = rows * (sizeof(StepRow) / sizeof(Unit) + kSeatUnits) + kFirstUnits;
  sampler_.Reserve(max_rows, vocab_size, units, 0);
  Grow(&seats_, &num_seats_, rows, nullptr);
  Grow(&arena_, &num_units_, kFirstUnits, nullptr);
  Grow(&message_, &message_units_, units, nullptr);
  Grow(&rows_, &num_rows_, rows, nullptr);
  CheckCuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
  std::vector<size_t> pages;
  for (size_t i = 0; i < kFirstPages; ++i) pages.push_back(TakePage(max_rows));
  free_pages_ = pages;
}

SeatSampler::~SeatSampler() {
  for (Page& page : pages_) {
    if (page.written != nullptr) cudaEventDestroy(page.written);
    cudaFreeHost(page.data);
  }
  cudaFree(seats_);
  cudaFree(arena_);
  cudaFree(message_);
  cudaFree(rows_);
}

// Growing is ordered by the stream and makes nobody wait; what was there stays.
template <typename T>
void SeatSampler::Grow(T** data, size_t* size, size_t needed, cudaStream_t stream) {
  if (needed <= *size) return;
  needed = std::bit_ceil(needed);
  void* grown = nullptr;
  CheckCuda(cudaMallocAsync(&grown, needed * sizeof(T), stream), "cudaMallocAsync");
  if (*data != nullptr) {
    CheckCuda(cudaMemcpyAsync(grown, *data, *size * sizeof(T), cudaMemcpyDeviceToDevice, stream),
              "cudaMemcpyAsync");
    CheckCuda(cudaFreeAsync(*data, stream), "cudaFreeAsync");
  }
  *data = static_cast<T*>(grown);
  *size = needed;
}

SeatMemory SeatSampler::Send(std::span<const int64_t> seats, std::span<const uint8_t> advances,
                             std::span<const int32_t> mask_rows, cudaStream_t stream) {
  Grow(&arena_, &num_units_, static_cast<size_t>(table_.arena_units()), stream);
  for (;;) {
    const std::span<const Unit> pieces = table_.BuildPieces(static_cast<int32_t>(kFirstUnits));
    if (pieces.empty()) break;
    sampler_.Upload(pieces.data(), pieces.size_bytes(), message_, stream);
    CheckCuda(LaunchPieces({seats_, arena_, message_}, stream), "LaunchPieces");
  }
  const std::span<const Unit> message = table_.Build(seats, advances, mask_rows);
  Grow(&seats_, &num_seats_, static_cast<size_t>(table_.num_seats()), stream);
  Grow(&arena_, &num_units_, static_cast<size_t>(table_.arena_units()), stream);
  Grow(&message_, &message_units_, message.size(), stream);
  Grow(&rows_, &num_rows_, seats.size(), stream);
  sampler_.Upload(message.data(), message.size_bytes(), message_, stream);
  return {seats_, arena_, message_};
}

SeatSampler::Receipt SeatSampler::Draw(std::span<const int64_t> seats, std::span<const uint8_t> advances,
                                       std::span<const int32_t> mask_rows, const Logits& logits,
                                       const SeatResults& results, cudaStream_t stream) {
  const CurrentDevice current(device_);
  const auto num_rows = static_cast<int32_t>(seats.size());
  if (logits.num_rows != num_rows || advances.size() != seats.size() || logits.vocab_size != vocab_size_) {
    throw std::invalid_argument("the logits have another shape than the seats");
  }
  if (!mask_rows.empty() && (mask_rows.size() != seats.size() || logits.bitmask == nullptr)) {
    throw std::invalid_argument("mask_rows must have one element a seat, and masks to refer to");
  }
  for (const int64_t seat : seats) {
    if (!Has(seat)) throw std::invalid_argument("seat " + std::to_string(seat) + " is empty");
  }
  const SeatMemory memory = Send(seats, advances, mask_rows, stream);
  CheckCuda(LaunchBegin(memory, num_rows, vocab_size_, rows_, stream), "LaunchBegin");
  sampler_.SampleRows({rows_, reinterpret_cast<const Edit*>(arena_),
                       reinterpret_cast<const uint32_t*>(arena_), table_.traits()},
                      logits, results.outputs, stream);
  const Receipt receipt = {TakePage(num_rows), num_rows};
  Page page;
  {
    const std::lock_guard lock(mutex_);
    page = pages_[receipt.place];
  }
  EndArgs end;
  end.memory = memory;
  end.drawn = results.outputs.token_ids;
  end.status = results.outputs.status;
  end.tokens64 = results.tokens64;
  end.tokens32 = results.tokens32;
  end.num_sampled = results.num_sampled;
  end.num_rejected = results.num_rejected;
  end.host_status = page.data;
  CheckCuda(LaunchEnd(end, num_rows, stream), "LaunchEnd");
  CheckCuda(cudaEventRecord(page.written, stream), "cudaEventRecord");
  return receipt;
}

void SeatSampler::Follow(std::span<const int64_t> seats, std::span<const uint8_t> advances,
                         const void* tokens, int64_t stride, int32_t bits, cudaStream_t stream) {
  const CurrentDevice current(device_);
  if (advances.size() != seats.size()) throw std::invalid_argument("advances must have one element a seat");
  const auto num_rows = static_cast<int32_t>(seats.size());
  EndArgs end;
  end.memory = Send(seats, advances, {}, stream);
  end.foreign = tokens;
  end.foreign_stride = stride;
  end.foreign_bits = bits;
  CheckCuda(LaunchBegin(end.memory, num_rows, vocab_size_, nullptr, stream), "LaunchBegin");
  CheckCuda(LaunchEnd(end, num_rows, stream), "LaunchEnd");
}

void SeatSampler::Mask(std::span<const int64_t> seats, void* logits, int64_t row_stride, Dtype dtype,
                       cudaStream_t stream) {
  const CurrentDevice current(device_);
  const auto num_rows = static_cast<int32_t>(seats.size());
  const std::vector<uint8_t> advances(seats.size());
  const SeatMemory memory = Send(seats, advances, {}, stream);
  CheckCuda(LaunchBegin(memory, num_rows, vocab_size_, rows_, stream), "LaunchBegin");
  CheckCuda(LaunchMask(memory, num_rows, rows_, logits, row_stride, dtype, vocab_size_, stream),
            "LaunchMask");
}

size_t SeatSampler::TakePage(int32_t num_rows) {
  const std::lock_guard lock(mutex_);
  size_t place = pages_.size();
  const auto fits = std::find_if(free_pages_.begin(), free_pages_.end(),
                                 [&](size_t i) { return pages_[i].size >= num_rows; });
  if (fits != free_pages_.end()) {
    place = *fits;
    free_pages_.erase(fits);
    return place;
  }
  Page page;
  page.size = static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(std::max(num_rows, 1))));
  void* data = nullptr;
  CheckCuda(cudaHostAlloc(&data, static_cast<size_t>(page.size) * sizeof(uint32_t), cudaHostAllocMapped),
            "cudaHostAlloc");
  page.data = static_cast<uint32_t*>(data);
  // A thread that waits must not spin on a core that the engine needs.
  CheckCuda(cudaEventCreateWithFlags(&page.written, cudaEventDisableTiming | cudaEventBlockingSync),
            "cudaEventCreate");
  pages_.push_back(page);
  return place;
}

std::vector<uint32_t> SeatSampler::Read(const Receipt& receipt) {
  const CurrentDevice current(device_);
  Page page;
  {
    const std::lock_guard lock(mutex_);
    page = pages_[receipt.place];
  }
  if (cudaEventQuery(page.written) != cudaSuccess) {
    cudaGetLastError();  // "not ready" is no error
    CheckCuda(cudaEventSynchronize(page.written), "cudaEventSynchronize");
    const std::lock_guard lock(mutex_);
    ++result_waits_;
  }
  std::vector<uint32_t> statuses(page.data, page.data + receipt.num_rows);
  Forget(receipt);
  return statuses;
}

void SeatSampler::Forget(const Receipt& receipt) {
  const std::lock_guard lock(mutex_);
  free_pages_.push_back(receipt.place);
}

SeatSampler::AllWaits SeatSampler::waits() {
  const std::lock_guard lock(mutex_);
  return {sampler_.waits().buffers, sampler_.waits().memory, result_waits_};
}

}  // namespace twinjet::sampler::cuda
