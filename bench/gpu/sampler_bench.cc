// Times of the sampling kernel, by CUDA events around replays of a graph of several draws; JSON lines.
// Logits rotate among buffers that together exceed the L2 cache.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "sampler/cuda/device_sampler.h"

using namespace twinjet::sampler;
using cuda::CheckCuda;

namespace {

struct Case {
  const char* name;
  RowParams params;
};

std::vector<Case> Cases() {
  std::vector<Case> cases(7);
  cases[0].name = "greedy";
  cases[0].params.temperature = 0.0f;
  cases[1].name = "plain";
  cases[2].name = "top_k 50";
  cases[2].params.top_k = 50;
  cases[3].name = "top_p .95";
  cases[3].params.top_p = 0.95f;
  cases[4].name = "top_k 50, top_p .95";
  cases[4].params.top_k = 50;
  cases[4].params.top_p = 0.95f;
  cases[5].name = "min_p .05";
  cases[5].params.min_p = 0.05f;
  cases[6].name = "top_k 2000, top_p .95";
  cases[6].params.top_k = 2000;
  cases[6].params.top_p = 0.95f;
  return cases;
}

// kind 0: a language model's row, a few tokens far above a wide bell. kind 1: a plain bell, flat.
std::vector<float> MakeLogits(size_t size, size_t row, int kind) {
  std::mt19937_64 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> bell(1 << 18);
  for (float& value : bell) value = normal(random);
  std::vector<float> x(size);
  uint64_t state = 99;
  for (size_t i = 0; i < size; ++i) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    x[i] = bell[state >> 46] * (kind == 0 ? 2.5f : 1.0f) + static_cast<float>((state >> 20) & 0xffff) * 1e-6f;
    if (kind == 0 && i % row % 997 == 0) x[i] += 6.0f + 4.0f * std::abs(bell[(state >> 28) & 0x3ffff]);
  }
  return x;
}

// The same logits as a GPU's 16-bit type would hold them: rounded to nearest even.
std::vector<uint16_t> Narrow(const std::vector<float>& x, Dtype dtype) {
  std::vector<uint16_t> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    if (dtype == Dtype::kFloat16) {
      out[i] = std::bit_cast<uint16_t>(static_cast<_Float16>(x[i]));
    } else {
      const uint32_t bits = FloatBits(x[i]);
      out[i] = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
  }
  return out;
}

double Median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  return static_cast<double>(values[values.size() / 2]);
}

// Microseconds a draw, the median over replays.
double Time(cuda::DeviceSampler& sampler, cudaStream_t stream, const std::vector<cuda::Logits>& inputs,
            const cuda::Outputs& outputs, const RowParams& params, int rounds) {
  std::vector<cuda::HostRow> rows(static_cast<size_t>(inputs[0].num_rows));
  for (size_t i = 0; i < rows.size(); ++i) {
    RowParams row = params;
    row.seed = i;
    row.position = i * 31;
    PrepareRow(row, inputs[0].vocab_size, &rows[i].constants);
  }
  sampler.Prepare(rows, inputs[0].vocab_size, stream);
  sampler.set_captured_traits(sampler.prepared_traits());  // as launches outside captures choose
  sampler.Sample(inputs[0], outputs, stream);
  CheckCuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  const int draws = std::max<int>(static_cast<int>(inputs.size()), 8);
  CheckCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  for (int i = 0; i < draws; ++i)
    sampler.Sample(inputs[static_cast<size_t>(i) % inputs.size()], outputs, stream);
  CheckCuda(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  CheckCuda(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  cudaEvent_t begin = nullptr, end = nullptr;
  CheckCuda(cudaEventCreate(&begin), "cudaEventCreate");
  CheckCuda(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  for (int i = -2; i < rounds; ++i) {
    CheckCuda(cudaEventRecord(begin, stream), "cudaEventRecord");
    CheckCuda(cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
    CheckCuda(cudaEventRecord(end, stream), "cudaEventRecord");
    CheckCuda(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0.0f;
    CheckCuda(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (i >= 0) times.push_back(ms * 1000.0f / static_cast<float>(draws));
  }
  CheckCuda(cudaEventDestroy(begin), "cudaEventDestroy");
  CheckCuda(cudaEventDestroy(end), "cudaEventDestroy");
  CheckCuda(cudaGraphExecDestroy(exec), "cudaGraphExecDestroy");
  CheckCuda(cudaGraphDestroy(graph), "cudaGraphDestroy");
  return Median(times);
}

double CopyBandwidth(cudaStream_t stream) {
  const size_t bytes = size_t{2} << 30;
  void *a = nullptr, *b = nullptr;
  CheckCuda(cudaMalloc(&a, bytes), "cudaMalloc");
  CheckCuda(cudaMalloc(&b, bytes), "cudaMalloc");
  CheckCuda(cudaMemset(a, 0x5a, bytes), "cudaMemset");
  cudaEvent_t begin = nullptr, end = nullptr;
  CheckCuda(cudaEventCreate(&begin), "cudaEventCreate");
  CheckCuda(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  for (int i = 0; i < 12; ++i) {
    CheckCuda(cudaEventRecord(begin, stream), "cudaEventRecord");
    CheckCuda(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
    CheckCuda(cudaEventRecord(end, stream), "cudaEventRecord");
    CheckCuda(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0.0f;
    CheckCuda(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (i > 1) times.push_back(ms);
  }
  cudaFree(a);
  cudaFree(b);
  return 2.0 * static_cast<double>(bytes) / (Median(times) * 1e-3);
}

}  // namespace

// Usage: sampler_gpu_bench [clusters, e.g. 0,8,16] [vocab sizes] [batches] [case numbers] [logits: 0
// language, 1 flat] [dtypes: 0 float32, 1 float16, 2 bfloat16]
int main(int argc, char** argv) {
  const auto list = [&](int i, std::vector<int> otherwise) {
    if (argc <= i) return otherwise;
    std::vector<int> values;
    for (const char* text = argv[i]; text != nullptr && *text != '\0';) {
      values.push_back(std::atoi(text));
      text = std::strchr(text, ',');
      if (text != nullptr) ++text;
    }
    return values;
  };
  const std::vector<int> clusters = list(1, {0});
  const std::vector<int> sizes = list(2, {32000, 128256, 262144});
  const std::vector<int> batches = list(3, {1, 32, 256, 1024});
  const std::vector<int> cases = list(4, {0, 1, 2, 3, 4, 5, 6});
  const std::vector<int> kinds = list(5, {0, 1});
  const std::vector<int> dtypes = list(6, {0});
  constexpr const char* kDtypeNames[] = {"float32", "float16", "bfloat16"};
  cuda::DeviceSampler sampler(0);
  cudaStream_t stream = nullptr;
  CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  const double bandwidth = CopyBandwidth(stream);
  std::printf("{\"copy_bytes_per_second\": %.4g}\n", bandwidth);
  for (int kind : kinds) {
    for (int vocab_size : sizes) {
      for (int number_of_dtype : dtypes) {
        const auto dtype = static_cast<Dtype>(number_of_dtype);
        const size_t item = dtype == Dtype::kFloat32 ? 4 : 2;
        const size_t row = static_cast<size_t>(vocab_size);
        const size_t most_rows = static_cast<size_t>(*std::max_element(batches.begin(), batches.end()));
        // At least 320 MB of distinct logits, where a batch is smaller than that.
        const size_t pool_rows = std::max(most_rows, size_t{320'000'000} / (row * item));
        const std::vector<float> host = MakeLogits(std::min(pool_rows, size_t{64}) * row, row, kind);
        const std::vector<uint16_t> narrow = item == 2 ? Narrow(host, dtype) : std::vector<uint16_t>();
        const void* source = item == 2 ? static_cast<const void*>(narrow.data()) : host.data();
        void* memory = nullptr;
        CheckCuda(cudaMalloc(&memory, pool_rows * row * item), "cudaMalloc");
        auto* pool = static_cast<char*>(memory);
        for (size_t r = 0; r < pool_rows; r += 64) {
          const size_t rows = std::min(size_t{64}, pool_rows - r);
          CheckCuda(cudaMemcpy(pool + r * row * item, source, rows * row * item, cudaMemcpyHostToDevice),
                    "cudaMemcpy");
        }
        CheckCuda(cudaMalloc(&memory, 8 * most_rows), "cudaMalloc");
        auto* tokens = static_cast<int32_t*>(memory);
        for (int batch : batches) {
          std::vector<cuda::Logits> inputs;
          const size_t step = static_cast<size_t>(batch) * row;
          for (size_t at = 0; at + step <= pool_rows * row && inputs.size() < 400; at += step) {
            cuda::Logits input;
            input.data = pool + at * item;
            input.row_stride = vocab_size;
            input.dtype = dtype;
            input.num_rows = batch;
            input.vocab_size = vocab_size;
            inputs.push_back(input);
          }
          cuda::Outputs outputs;
          outputs.token_ids = tokens;
          outputs.status = reinterpret_cast<uint32_t*>(tokens + most_rows);
          for (int cluster : clusters) {
            if (cluster > sampler.limits().max_cluster) continue;
            sampler.set_cluster(cluster);
            for (int number : cases) {
              const Case test = Cases().at(static_cast<size_t>(number));
              const double us = Time(sampler, stream, inputs, outputs, test.params, 9);
              const double bytes = static_cast<double>(batch) * vocab_size * static_cast<double>(item);
              std::printf(
                  "{\"case\": \"%s\", \"logits\": \"%s\", \"dtype\": \"%s\", \"vocab_size\": %d, "
                  "\"batch\": %d, \"cluster\": %d, \"microseconds\": %.2f, "
                  "\"share_of_copy_bandwidth\": %.3f}\n",
                  test.name, kind == 0 ? "language" : "flat", kDtypeNames[number_of_dtype], vocab_size, batch,
                  cluster, us, bytes / (us * 1e-6) / bandwidth);
              std::fflush(stdout);
            }
          }
        }
        cudaFree(pool);
        cudaFree(tokens);
      }
    }
  }
  return 0;
}
