// The sampler on a GPU against the sampler on the CPU, bit for bit. Needs a device; bench/gpu/run.py runs it.
// TWINJET_GPU_ROWS: how many rows the grid draws (default 100,000). TWINJET_GPU_SMALL: few and small rows,
// for runs under compute-sanitizer, which end within seconds. TWINJET_GPU_MAX_CLUSTER: the largest cluster
// used (default what the device can). TWINJET_GPU_TRACE: names each random draw before it starts.
#include <bit>
#include <cstdlib>

#include "check.h"
#include "gpu_batch.h"
#include "sampler/cuda/shape.h"

using namespace twinjet::sampler;
using gpu::Batch;
using gpu::DeviceArray;
using gpu::MakeRandomBatch;
using gpu::RandomBatch;
using gpu::RestrictTo;

namespace {

int64_t Setting(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoll(text);
}
bool IsSmall() { return Setting("TWINJET_GPU_SMALL", 0) != 0; }

BatchSampler& HostSampler() {
  static BatchSampler sampler(*DefaultKernels(), 16);
  return sampler;
}

cuda::DeviceSampler& Device() {
  static cuda::DeviceSampler sampler(0);
  static const bool is_set = [] {
    cuda::DeviceLimits limits = sampler.limits();
    limits.max_cluster = std::min(
        limits.max_cluster, static_cast<int32_t>(Setting("TWINJET_GPU_MAX_CLUSTER", cuda::kMaxCluster)));
    sampler.set_limits(limits);
    return true;
  }();
  (void)is_set;
  return sampler;
}

void Compare(const Batch& batch, const gpu::Drawn& host, const gpu::Drawn& device, const std::string& where) {
  std::string what;
  const int differences = gpu::CountDifferences(batch, host, device, &what);
  if (differences != 0) {
    test::Fail(__FILE__, __LINE__, where + ": " + std::to_string(differences) + " rows differ; " + what);
  }
}

void CompareRandomBatches(uint64_t stream, int num_batches, int num_rows, int32_t max_size) {
  std::mt19937_64 random = test::Random(stream);
  cudaStream_t own = nullptr;
  gpu::CheckCuda(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking), "cudaStreamCreate");
  for (int b = 0; b < num_batches; ++b) {
    const RandomBatch made =
        MakeRandomBatch(random, 1 + rows::Below(random, num_rows), 1 + rows::Below(random, max_size));
    const gpu::Drawn host = gpu::DrawOnHost(HostSampler(), made.batch);
    const DeviceArray<char> logits(made.batch.logits);
    const DeviceArray<uint32_t> bitmask(made.batch.bitmask);
    const cuda::DeviceLimits limits = Device().limits();
    for (int32_t cluster : {0, 1, 2, 8, -1}) {
      if (cluster > limits.max_cluster) continue;
      if (cluster > 0 && rows::Chance(random, 0.5)) continue;
      Device().set_cluster(cluster < 0 ? 0 : cluster);
      if (cluster < 0) Device().set_limits({limits.num_multiprocessors, 40000, 1});
      Device().set_max_clusters(rows::OneOf(random, {0, 1, 2, 5}));
      if (Setting("TWINJET_GPU_TRACE", 0) != 0) {
        std::fprintf(stderr, "batch %d, %zu x %d, dtype %d, logprobs %d, cluster %d\n", b,
                     made.batch.num_rows(), made.batch.vocab_size, static_cast<int>(made.batch.dtype),
                     made.batch.num_logprobs, cluster);
      }
      const gpu::Drawn device = gpu::DrawOnDevice(Device(), made.batch, logits.data(), bitmask.data(),
                                                  rows::Chance(random, 0.5) ? own : nullptr);
      Device().set_limits(limits);
      Device().set_cluster(0);
      Device().set_max_clusters(0);
      Compare(made.batch, host, device,
              "batch " + std::to_string(b) + ", cluster " + std::to_string(cluster));
    }
  }
  gpu::CheckCuda(cudaStreamDestroy(own), "cudaStreamDestroy");
}

// Logits of a few kinds, filled quickly; the grid reuses them with other parameters and seeds.
std::vector<float> QuickLogits(rows::Generator& random, size_t num_rows, size_t size) {
  std::vector<float> bell(1 << 16);
  std::normal_distribution<float> normal;
  for (float& value : bell) value = normal(random);
  std::vector<float> x(num_rows * size);
  uint64_t state = random() | 1;
  for (size_t row = 0; row < num_rows; ++row) {
    const int kind = static_cast<int>(row % 4);
    const float spread = kind == 0 ? 1.0f : kind == 1 ? 2.5f : 4.0f;
    for (size_t i = 0; i < size; ++i) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      float value = spread * bell[state >> 48] + static_cast<float>((state >> 20) & 0xffff) * 1e-6f;
      if (kind == 2 && (state >> 36 & 0x3ff) == 0) value += 9.0f;
      if (kind == 3) value = 0.25f * static_cast<float>(static_cast<int>(4.0f * value));
      x[row * size + i] = value;
    }
  }
  return x;
}

struct GridPart {
  int32_t vocab_size;
  size_t num_rows;
  double share;  // of all rows
};

std::vector<RowParams> Grid() {
  std::vector<RowParams> grid;
  for (float temperature : {1.0f, 0.7f, 1.5f, 0.0f}) {
    for (int32_t top_k : {0, 1, 20, 50, 1000}) {
      for (float top_p : {1.0f, 0.95f, 0.5f, 0.999f}) {
        for (float min_p : {0.0f, 0.05f}) {
          if (temperature == 0.0f && (top_k != 0 || top_p < 1.0f || min_p > 0.0f)) continue;
          if (min_p > 0.0f && top_k == 20) continue;
          RowParams params;
          params.temperature = temperature;
          params.top_k = top_k;
          params.top_p = top_p;
          params.min_p = min_p;
          grid.push_back(params);
        }
      }
    }
  }
  return grid;
}

// Draws `share` rows of the grid; returns how many.
int64_t CompareGrid(rows::Generator& random, const GridPart& part, int64_t num_draws, Dtype dtype) {
  Batch batch;
  batch.dtype = dtype;
  batch.vocab_size = part.vocab_size;
  batch.row_stride = (part.vocab_size + 7) / 8 * 8;
  const std::vector<float> x = QuickLogits(random, part.num_rows, static_cast<size_t>(batch.row_stride));
  const size_t item = dtype == Dtype::kFloat32 ? 4 : 2;
  batch.logits.resize(x.size() * item);
  if (dtype == Dtype::kFloat32) {
    std::memcpy(batch.logits.data(), x.data(), batch.logits.size());
  } else {
    for (size_t i = 0; i < x.size(); ++i) {
      const auto narrow = dtype == Dtype::kFloat16 ? std::bit_cast<uint16_t>(static_cast<_Float16>(x[i]))
                                                   : static_cast<uint16_t>(FloatBits(x[i]) >> 16);
      std::memcpy(batch.logits.data() + 2 * i, &narrow, 2);
    }
  }
  const DeviceArray<char> logits(batch.logits);
  const std::vector<RowParams> grid = Grid();
  int64_t drawn = 0;
  while (drawn < num_draws) {
    batch.inputs.clear();
    // Half of the draws by the kernel for any rows.
    const auto family = static_cast<cuda::Family>(std::min<uint64_t>(random() % 4, 2));
    for (size_t i = 0; i < part.num_rows; ++i) {
      RowInput input;
      input.logits = batch.logits.data() + i * static_cast<size_t>(batch.row_stride) * item;
      input.dtype = dtype;
      input.vocab_size = part.vocab_size;
      RowParams params = grid[random() % grid.size()];
      RestrictTo(family, &params);
      params.seed = random();
      params.position = random() % 8192;
      params.output_index = static_cast<uint32_t>(random() % 4);
      PrepareRow(params, part.vocab_size, &input.constants);
      batch.inputs.push_back(input);
    }
    const gpu::Drawn device = gpu::DrawOnDevice(Device(), batch, logits.data(), nullptr, nullptr);
    Compare(batch, gpu::DrawOnHost(HostSampler(), batch), device, "grid");
    drawn += static_cast<int64_t>(part.num_rows);
  }
  return drawn;
}

}  // namespace

TEST(tiny_rows) { CompareRandomBatches(1, IsSmall() ? 10 : 300, IsSmall() ? 20 : 600, 600); }
TEST(small_rows) { CompareRandomBatches(2, IsSmall() ? 6 : 150, IsSmall() ? 6 : 300, 9000); }
TEST(middle_rows) { CompareRandomBatches(3, IsSmall() ? 2 : 40, IsSmall() ? 2 : 40, 60000); }
TEST(large_rows) { CompareRandomBatches(4, IsSmall() ? 1 : 20, IsSmall() ? 1 : 12, 300000); }

TEST(grid) {
  std::mt19937_64 random = test::Random(5);
  const int64_t total = IsSmall() ? 64 : Setting("TWINJET_GPU_ROWS", 100000);
  const GridPart parts[] = {{1024, 1024, 0.40},   {4096, 1024, 0.35},  {8192, 1024, 0.14},
                            {32000, 512, 0.06},   {49152, 512, 0.02},  {128256, 256, 0.02},
                            {151936, 256, 0.005}, {262144, 128, 0.005}};
  int64_t drawn = 0;
  for (GridPart part : parts) {
    if (IsSmall() && part.vocab_size > 40000) continue;
    if (IsSmall()) part.num_rows = 8;
    const auto share = static_cast<int64_t>(static_cast<double>(total) * part.share);
    drawn += CompareGrid(random, part, share - share / 4, Dtype::kFloat32);
    drawn += CompareGrid(random, part, share / 8, Dtype::kBfloat16);
    drawn += CompareGrid(random, part, share / 8, Dtype::kFloat16);
  }
  std::printf("     grid: %lld rows drawn on both, 0 differences\n", static_cast<long long>(drawn));
}

// The draw of such rows needs no scratch memory, the widened rows of their logprobs do.
TEST(logprobs_of_rows_that_fit_16_bits_wide_alone) {
  std::mt19937_64 random = test::Random(8);
  constexpr int32_t kVocabSize = 140000;
  constexpr size_t kRows = 3;
  const std::vector<float> x = QuickLogits(random, kRows, kVocabSize);
  Batch batch;
  batch.dtype = Dtype::kBfloat16;
  batch.vocab_size = kVocabSize;
  batch.row_stride = kVocabSize;
  batch.num_logprobs = 5;
  batch.logits.resize(x.size() * 2);
  for (size_t i = 0; i < x.size(); ++i) {
    const auto narrow = static_cast<uint16_t>(FloatBits(x[i]) >> 16);
    std::memcpy(batch.logits.data() + 2 * i, &narrow, 2);
  }
  for (size_t i = 0; i < kRows; ++i) {
    RowInput row;
    row.logits = batch.logits.data() + i * kVocabSize * 2;
    row.dtype = batch.dtype;
    row.vocab_size = kVocabSize;
    row.num_logprobs = batch.num_logprobs;
    RowParams params;
    params.seed = i;
    PrepareRow(params, kVocabSize, &row.constants);
    batch.inputs.push_back(row);
  }
  cuda::DeviceSampler sampler(0);
  if (sampler.limits().max_cluster < 2) return;
  sampler.set_cluster(2);
  const DeviceArray<char> logits(batch.logits);
  Compare(batch, gpu::DrawOnHost(HostSampler(), batch),
          gpu::DrawOnDevice(sampler, batch, logits.data(), nullptr, nullptr), "two blocks a row");
}

// A captured draw replays on new logits and new parameters.
TEST(graph_replays_with_new_inputs) {
  std::mt19937_64 random = test::Random(6);
  const int32_t vocab_size = IsSmall() ? 5000 : 128256;
  const size_t num_rows = IsSmall() ? 2 : 96;  // more than clusters: rows are claimed, in each replay anew
  Batch batch;
  batch.vocab_size = vocab_size;
  batch.row_stride = vocab_size;
  batch.num_logprobs = 3;
  cudaStream_t stream = nullptr;
  gpu::CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  DeviceArray<float> logits(num_rows * static_cast<size_t>(vocab_size));
  DeviceArray<int32_t> token_ids(num_rows), top_ids(num_rows * 4), ranks(num_rows);
  DeviceArray<uint32_t> status(num_rows);
  DeviceArray<float> top_logprobs(num_rows * 4);
  cuda::Logits input;
  input.data = logits.data();
  input.row_stride = vocab_size;
  input.num_rows = static_cast<int32_t>(num_rows);
  input.vocab_size = vocab_size;
  cuda::Outputs outputs;
  outputs.token_ids = token_ids.data();
  outputs.status = status.data();
  outputs.num_logprobs = 3;
  outputs.top_ids = top_ids.data();
  outputs.top_logprobs = top_logprobs.data();
  outputs.ranks = ranks.data();
  cudaGraphExec_t graph_exec = nullptr;
  for (int replay = 0; replay < 4; ++replay) {
    const std::vector<float> x = QuickLogits(random, num_rows, static_cast<size_t>(vocab_size));
    batch.logits.resize(x.size() * 4);
    std::memcpy(batch.logits.data(), x.data(), batch.logits.size());
    logits.Upload(x);
    batch.inputs.clear();
    std::vector<cuda::HostRow> host_rows(num_rows);
    const std::vector<RowParams> grid = Grid();
    for (size_t i = 0; i < num_rows; ++i) {
      RowInput row;
      row.logits = batch.logits.data() + i * static_cast<size_t>(vocab_size) * 4;
      row.vocab_size = vocab_size;
      row.num_logprobs = 3;
      RowParams params = grid[random() % grid.size()];
      params.seed = random();
      PrepareRow(params, vocab_size, &row.constants);
      host_rows[i].constants = row.constants;
      batch.inputs.push_back(row);
    }
    Device().Prepare(host_rows, vocab_size, stream);
    if (replay == 0) {
      cudaGraph_t graph = nullptr;
      gpu::CheckCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
                     "cudaStreamBeginCapture");
      Device().Sample(input, outputs, stream);
      gpu::CheckCuda(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
      gpu::CheckCuda(cudaGraphInstantiate(&graph_exec, graph, 0), "cudaGraphInstantiate");
      gpu::CheckCuda(cudaGraphDestroy(graph), "cudaGraphDestroy");
    }
    gpu::CheckCuda(cudaGraphLaunch(graph_exec, stream), "cudaGraphLaunch");
    gpu::CheckCuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    gpu::Drawn device;
    device.token_ids = token_ids.Download();
    device.status = status.Download();
    device.top_ids = top_ids.Download();
    device.top_logprobs = top_logprobs.Download();
    device.ranks = ranks.Download();
    Compare(batch, gpu::DrawOnHost(HostSampler(), batch), device, "replay " + std::to_string(replay));
  }
  gpu::CheckCuda(cudaGraphExecDestroy(graph_exec), "cudaGraphExecDestroy");
  gpu::CheckCuda(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

// Two samplers on two streams at once, and one sampler that goes from stream to stream.
TEST(streams_do_not_disturb_each_other) {
  std::mt19937_64 random = test::Random(7);
  const RandomBatch first = MakeRandomBatch(random, IsSmall() ? 3 : 64, IsSmall() ? 3000 : 50000);
  const RandomBatch second = MakeRandomBatch(random, IsSmall() ? 3 : 100, IsSmall() ? 2000 : 32000);
  const gpu::Drawn host[2] = {gpu::DrawOnHost(HostSampler(), first.batch),
                              gpu::DrawOnHost(HostSampler(), second.batch)};
  const DeviceArray<char> logits[2] = {DeviceArray<char>(first.batch.logits),
                                       DeviceArray<char>(second.batch.logits)};
  const DeviceArray<uint32_t> bitmask[2] = {DeviceArray<uint32_t>(first.batch.bitmask),
                                            DeviceArray<uint32_t>(second.batch.bitmask)};
  cudaStream_t streams[2] = {};
  for (cudaStream_t& stream : streams) {
    gpu::CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  for (int round = 0; round < (IsSmall() ? 1 : 20); ++round) {
    for (size_t i = 0; i < 2; ++i) {
      const Batch& batch = i == 0 ? first.batch : second.batch;
      const gpu::Drawn device = gpu::DrawOnDevice(Device(), batch, logits[i].data(), bitmask[i].data(),
                                                  streams[(i + static_cast<size_t>(round)) % 2]);
      Compare(batch, host[i], device, "stream " + std::to_string(i));
    }
  }
  for (cudaStream_t stream : streams) gpu::CheckCuda(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

TEST(shapes_reach_every_kernel) {
  const cuda::DeviceLimits limits = Device().limits();
  std::printf("     %d multiprocessors, %zu bytes of shared memory a block, clusters of %d\n",
              limits.num_multiprocessors, limits.max_shared_bytes, limits.max_cluster);
  CHECK(cuda::ChooseShape(limits, 1, 300000, 0).on_chip || limits.max_cluster == 1);
}
