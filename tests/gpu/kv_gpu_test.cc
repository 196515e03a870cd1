// Block copies and slot mappings on a GPU against loops on the host. Needs a device.
#include <cuda_runtime_api.h>

#include "check.h"
#include "gpu_batch.h"
#include "kv/cuda/copy_plan.h"
#include "kv/cuda/kv_kernels.h"

using namespace twinjet::kv;
using gpu::CheckCuda;
using gpu::DeviceArray;

TEST(copies_in_waves_are_the_list_in_order) {
  std::mt19937_64 random = test::Random();
  for (int64_t block_bytes : {16, 48, 20, 4096, 20480}) {
    const size_t num_blocks = 40, num_planes = 3;
    const size_t plane_bytes = num_blocks * static_cast<size_t>(block_bytes);
    std::vector<char> host(num_planes * plane_bytes);
    for (char& byte : host) byte = static_cast<char>(random());
    DeviceArray<char> device(host);
    std::vector<void*> planes;
    for (size_t i = 0; i < num_planes; ++i) planes.push_back(device.data() + i * plane_bytes);
    const DeviceArray<void*> device_planes(planes);
    std::vector<BlockCopy> list(60);
    for (BlockCopy& copy : list) {
      copy = {static_cast<BlockId>(random() % num_blocks), static_cast<BlockId>(random() % num_blocks)};
    }
    const cuda::CopyPlan plan = cuda::PlanCopies(list);
    const DeviceArray<BlockCopy> copies(plan.copies);
    const cuda::KvPlanes cache = {device_planes.data(), static_cast<int32_t>(num_planes), block_bytes,
                                  block_bytes};
    int32_t begin = 0;
    for (int32_t end : plan.wave_ends) {
      CheckCuda(cuda::CopyBlocks(cache, copies.data() + begin, end - begin, nullptr), "CopyBlocks");
      begin = end;
    }
    CheckCuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    for (const BlockCopy& copy : list) {
      if (copy.source == copy.destination) continue;
      for (size_t p = 0; p < num_planes; ++p) {
        char* plane = host.data() + p * plane_bytes;
        std::memcpy(plane + copy.destination * block_bytes, plane + copy.source * block_bytes,
                    static_cast<size_t>(block_bytes));
      }
    }
    CHECK(device.Download() == host);
  }
}

TEST(slots_follow_the_block_tables) {
  std::mt19937_64 random = test::Random(1);
  for (int round = 0; round < 50; ++round) {
    const int32_t block_size = rows::OneOf(random, {1, 8, 16, 32});
    const int32_t num_sequences = rows::Below(random, 20);
    const int32_t max_blocks = 1 + rows::Below(random, 30);
    std::vector<int32_t> tables(static_cast<size_t>(num_sequences * max_blocks) + 1);
    for (int32_t& block : tables) block = rows::Chance(random, 0.1) ? -1 : rows::Below(random, 1 << 24);
    std::vector<int32_t> starts = {0};
    std::vector<int64_t> first(static_cast<size_t>(num_sequences) + 1);
    for (int32_t s = 0; s < num_sequences; ++s) {
      starts.push_back(starts.back() + rows::Below(random, 600));
      first[static_cast<size_t>(s)] = rows::Below(random, block_size * max_blocks);
    }
    const int32_t num_slots = starts.back() + rows::Below(random, 40);
    std::vector<int64_t> expected(static_cast<size_t>(num_slots), -1);
    for (int32_t s = 0; s < num_sequences; ++s) {
      for (int32_t i = starts[static_cast<size_t>(s)]; i < starts[static_cast<size_t>(s) + 1]; ++i) {
        const int64_t position = first[static_cast<size_t>(s)] + i - starts[static_cast<size_t>(s)];
        const int64_t page = position / block_size;
        const int32_t block = page < max_blocks ? tables[static_cast<size_t>(s * max_blocks + page)] : -1;
        if (block >= 0)
          expected[static_cast<size_t>(i)] = int64_t{block} * block_size + position % block_size;
      }
    }
    const DeviceArray<int32_t> device_tables(tables), device_starts(starts);
    const DeviceArray<int64_t> device_first(first);
    DeviceArray<int64_t> slots(static_cast<size_t>(num_slots));
    cuda::SlotMapping mapping;
    mapping.block_tables = device_tables.data();
    mapping.table_stride = max_blocks;
    mapping.max_blocks = max_blocks;
    mapping.query_start = device_starts.data();
    mapping.first_position = device_first.data();
    mapping.num_sequences = num_sequences;
    mapping.block_size = block_size;
    mapping.slots = slots.data();
    mapping.num_slots = num_slots;
    CheckCuda(cuda::MapSlots(mapping, nullptr), "MapSlots");
    CheckCuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    CHECK(slots.Download() == expected);
  }
}
