// Draws for requests that keep their seats on the device, and waits for nothing: neither for the tokens,
// which stay where they are drawn, nor for what they change, which the device keeps itself (seats.h).
//
//   SeatSampler sampler(device, vocab_size, max_rows);
//   sampler.Put(seat, request);                                        // once, when a request enters
//   Receipt receipt = sampler.Draw(seats, advances, logits, results, stream);  // every step: four launches
//   sampler.Read(receipt);                                             // whenever the step is known to be
//   over
//
// One thread at a time, but for Read and Forget, which any thread may call. All calls take the same stream,
// or follow one another in the order of calls.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "sampler/cuda/device_sampler.h"
#include "sampler/cuda/seat_table.h"

namespace twinjet::sampler::cuda {

// Device memory of the caller; see EndArgs and Outputs. token_ids and status are needed, the rest may be
// null.
struct SeatResults {
  Outputs outputs;
  int64_t* tokens64 = nullptr;
  int32_t* tokens32 = nullptr;
  int32_t* num_sampled = nullptr;
  int32_t* num_rejected = nullptr;
};

class SeatSampler {
 public:
  // Allocates for max_rows, so that no step of ordinary requests does later. Throws CudaError.
  SeatSampler(int device, int32_t vocab_size, int32_t max_rows);
  ~SeatSampler();
  SeatSampler(const SeatSampler&) = delete;
  SeatSampler& operator=(const SeatSampler&) = delete;

  void Put(int32_t seat, Request& request) { table_.Put(seat, request); }
  void Remove(int32_t seat) { table_.Remove(seat); }
  bool Has(int64_t seat) const { return table_.Has(seat); }
  int32_t num_outputs(int64_t seat) const { return table_.num_outputs(seat); }
  int32_t vocab_size() const { return vocab_size_; }
  int device() const { return device_; }

  // Where a draw's statuses come to lie on the host.
  struct Receipt {
    size_t place;
    int32_t num_rows;
  };

  // Draws row i of the logits for seats[i] and enters the token into its history where advances[i] is not 0.
  // mask_rows: the row of logits.bitmask that holds for each, -1 for none; empty where none has one.
  Receipt Draw(std::span<const int64_t> seats, std::span<const uint8_t> advances,
               std::span<const int32_t> mask_rows, const Logits& logits, const SeatResults& results,
               cudaStream_t stream);

  // For a batch that another sampler draws: what the rows' banned strings rule out becomes -inf in the
  // logits. seats: SeatTable::kSkip for rows that have none. row_stride in elements.
  void Mask(std::span<const int64_t> seats, void* logits, int64_t row_stride, Dtype dtype,
            cudaStream_t stream);

  // Enters tokens that another sampler drew: [num_rows] on the device, `stride` elements apart, of 32 or 64
  // bits. seats: SeatTable::kSkip for rows that have none.
  void Follow(std::span<const int64_t> seats, std::span<const uint8_t> advances, const void* tokens,
              int64_t stride, int32_t bits, cudaStream_t stream);

  // The rows' statuses. Waits for the draw if it is not over. The receipt is spent.
  std::vector<uint32_t> Read(const Receipt& receipt);
  void Forget(const Receipt& receipt);  // spends it unread

  struct AllWaits {
    uint64_t buffers, memory, results;
  };
  AllWaits waits();

 private:
  // Statuses of one draw.
  struct Page {
    uint32_t* data = nullptr;  // pinned and mapped
    int32_t size = 0;
    cudaEvent_t written = nullptr;
  };
  SeatMemory Send(std::span<const int64_t> seats, std::span<const uint8_t> advances,
                  std::span<const int32_t> mask_rows, cudaStream_t stream);
  template <typename T>
  void Grow(T** data, size_t* size, size_t needed, cudaStream_t stream);
  size_t TakePage(int32_t num_rows);

  int device_;
  int32_t vocab_size_;
  SeatTable table_;
  DeviceSampler sampler_;
  Seat* seats_ = nullptr;
  size_t num_seats_ = 0;
  Unit* arena_ = nullptr;
  size_t num_units_ = 0;
  Unit* message_ = nullptr;
  size_t message_units_ = 0;
  DeviceRow* rows_ = nullptr;
  size_t num_rows_ = 0;
  std::mutex mutex_;  // of what follows
  std::vector<Page> pages_;
  std::vector<size_t> free_pages_;
  uint64_t result_waits_ = 0;
};

}  // namespace twinjet::sampler::cuda
