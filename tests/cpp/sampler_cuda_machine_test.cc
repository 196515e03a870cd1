// The CUDA sampler's own source, run on the host by machine.h, against the sampler on the CPU. Batches as the
// test on a GPU draws them. TWINJET_TEST_ROWS multiplies their number (default 1).
#include <cstdlib>
#include <numeric>

#include "check.h"
#include "sampler/cuda/edits.h"
#include "sampler/cuda/shape.h"
#include "sampler/kernels.h"
#include "sampler_batches.h"

// The kernels' source comes last: machine.h gives CUDA's words a meaning here.
#include "machine.h"
#include "sampler/cuda/draw.cuh"
#include "sampler/cuda/logprobs.cuh"

using namespace twinjet::sampler;

namespace {

constexpr cuda::DeviceLimits kHopper = {132, 232448, 16, 2.0};

int RowFactor() {
  const char* text = std::getenv("TWINJET_TEST_ROWS");
  return text == nullptr ? 1 : std::max(1, std::atoi(text));
}

BatchSampler& HostSampler() {
  static BatchSampler sampler(*DefaultKernels(), 1);
  return sampler;
}

using SampleBody = void (*)(cuda::Block&, const cuda::SampleArgs&, int32_t, int32_t);
template <cuda::Family kFamily>
constexpr SampleBody kBodies[4] = {
    cuda::SampleRows<kFamily, false, Dtype::kFloat32>, cuda::SampleRows<kFamily, true, Dtype::kFloat32>,
    cuda::SampleRows<kFamily, true, Dtype::kFloat16>, cuda::SampleRows<kFamily, true, Dtype::kBfloat16>};
constexpr const SampleBody* kFamilies[3] = {kBodies<cuda::Family::kGreedy>, kBodies<cuda::Family::kOpen>,
                                            kBodies<cuda::Family::kAny>};

// As DeviceSampler prepares and launches a batch.
gpu::Drawn DrawOnMachine(const gpu::Batch& batch, int32_t cluster, int32_t max_clusters, uint64_t seed) {
  const auto n = static_cast<int32_t>(batch.num_rows());
  std::vector<cuda::DeviceRow> rows(static_cast<size_t>(n));
  std::vector<cuda::Edit> edits;
  std::vector<uint32_t> allowed;
  cuda::Traits traits = {cuda::Family::kGreedy, false};
  for (size_t i = 0; i < rows.size(); ++i) {
    const RowInput& input = batch.inputs[i];
    rows[i].constants = input.constants;
    rows[i].bitmask_row = input.edits.grammar_mask != nullptr ? static_cast<int32_t>(i) : -1;
    rows[i].allowed_at = -1;
    rows[i].edit_begin = static_cast<int32_t>(edits.size());
    cuda::AppendEdits(input.edits, &edits);
    rows[i].edit_end = static_cast<int32_t>(edits.size());
    rows[i].has_early_stops = input.edits.early_stops.size != 0 ? 1 : 0;
    if (input.edits.allowed_mask != nullptr) {
      rows[i].allowed_at = static_cast<int32_t>(allowed.size() / 4);
      allowed.insert(allowed.end(), input.edits.allowed_mask, input.edits.allowed_mask + batch.words());
      allowed.resize((allowed.size() + 3) / 4 * 4);
    }
    traits.family = std::max(traits.family, cuda::FamilyOf(input.constants));
  }
  traits.has_edits = !edits.empty();

  const size_t width = static_cast<size_t>(batch.num_logprobs + 1);
  gpu::Drawn drawn;
  drawn.token_ids.assign(rows.size(), -7);
  drawn.status.assign(rows.size(), 77);
  drawn.top_ids.assign(rows.size() * width, -7);
  drawn.top_logprobs.assign(rows.size() * width, 7.0f);
  drawn.ranks.assign(width == 0 ? 0 : rows.size(), -7);
  drawn.processed.assign(batch.want_processed ? rows.size() * static_cast<size_t>(batch.vocab_size) : 0,
                         7.0f);
  std::vector<cuda::DrawInfo> info(rows.size());
  uint32_t num_claims = 0;

  cuda::SampleArgs args;
  // Copies want 16-byte addresses, as device memory has.
  std::vector<char> logits(batch.logits.size() + 16);
  const auto begin = reinterpret_cast<uintptr_t>(logits.data());
  char* aligned = reinterpret_cast<char*>((begin + 15) / 16 * 16);
  std::memcpy(aligned, batch.logits.data(), batch.logits.size());
  args.logits = aligned;
  args.row_stride = batch.row_stride;
  args.dtype = batch.dtype;
  args.num_rows = n;
  args.vocab_size = batch.vocab_size;
  args.rows = rows.data();
  args.edits = edits.data();
  args.bitmask = batch.bitmask.data();
  args.bitmask_stride = static_cast<int64_t>(batch.words());
  args.allowed = allowed.data();
  args.token_ids = drawn.token_ids.data();
  args.status = drawn.status.data();
  args.info = info.data();
  args.processed_logits = batch.want_processed ? drawn.processed.data() : nullptr;
  args.family = traits.family;
  const bool is_narrow = batch.dtype != Dtype::kFloat32;

  const auto run = [&](bool keeps_narrow, auto body) {
    const cuda::LaunchShape shape = cuda::ChooseShape(kHopper, n, batch.vocab_size, cluster, keeps_narrow);
    if (!shape.on_chip) throw std::invalid_argument("the row does not fit");
    const int32_t num_clusters = std::min(n, max_clusters);
    args.groups_per_block = shape.groups_per_block;
    args.keeps_narrow = shape.keeps_narrow;
    args.num_claims = num_clusters < n && seed % 4 != 0 ? &num_claims : nullptr;
    machine::Machine machine(static_cast<uint32_t>(num_clusters), static_cast<uint32_t>(shape.cluster),
                             shape.shared_bytes, seed);
    machine.Run([&] {
      cuda::Block block = cuda::MakeBlock(machine.block().shared, args, cuda::ThisCluster(), true);
      block.copies = true;
      body(block, static_cast<int32_t>(machine.fiber().block) / shape.cluster, num_clusters);
    });
    CHECK_EQ(num_claims, 0u);
  };
  run(is_narrow && !traits.has_edits, [&](cuda::Block& block, int32_t first, int32_t stride) {
    const int form = !is_narrow ? 0 : !args.keeps_narrow ? 1 : args.dtype == Dtype::kFloat16 ? 2 : 3;
    kFamilies[static_cast<int>(args.family)][form](block, args, first, stride);
  });
  if (batch.num_logprobs < 0) return drawn;
  cuda::LogprobsArgs logprobs;
  run(false, [&](cuda::Block& block, int32_t first, int32_t stride) {
    logprobs.sample = args;
    logprobs.sample.processed_logits = nullptr;
    logprobs.num_top = batch.num_logprobs;
    logprobs.processed = batch.processed_logprobs ? 1 : 0;
    logprobs.top_ids = drawn.top_ids.data();
    logprobs.top_logprobs = drawn.top_logprobs.data();
    logprobs.ranks = drawn.ranks.data();
    cuda::LogprobsOfRows(block, logprobs, first, stride);
  });
  return drawn;
}

void CompareBatch(const gpu::Batch& batch, int32_t cluster, int32_t max_clusters, uint64_t seed,
                  const std::string& name) {
  const gpu::Drawn host = gpu::DrawOnHost(HostSampler(), batch);
  const std::string where = name + " of " + std::to_string(batch.num_rows()) + " x " +
                            std::to_string(batch.vocab_size) + ", cluster " + std::to_string(cluster) + ", " +
                            std::to_string(max_clusters) + " at once";
  std::string what;
  gpu::Drawn drawn;
  try {
    drawn = DrawOnMachine(batch, cluster, max_clusters, seed);
  } catch (const std::runtime_error& error) {
    test::Fail(__FILE__, __LINE__, where + ": " + error.what());
  }
  const int differences = gpu::CountDifferences(batch, host, drawn, &what);
  if (differences != 0) {
    test::Fail(__FILE__, __LINE__, where + ": " + std::to_string(differences) + " rows differ; " + what);
  }
}

void CompareRandomBatches(uint64_t stream, int num_batches, int32_t num_rows, int32_t max_size) {
  std::mt19937_64 random = test::Random(stream);
  for (int b = 0; b < num_batches * RowFactor(); ++b) {
    const gpu::RandomBatch made =
        gpu::MakeRandomBatch(random, 1 + rows::Below(random, num_rows), 1 + rows::Below(random, max_size));
    const int32_t cluster = rows::OneOf(random, {1, 2, 2, 4, 8});
    const bool fits = made.batch.vocab_size <= 50000;  // in one block
    const int32_t max_clusters = rows::OneOf(random, {1, 2, 3});
    CompareBatch(made.batch, fits ? cluster : std::max(cluster, 2), max_clusters, random(),
                 "batch " + std::to_string(b));
  }
}

// Rows of float32 without edits in a batch.
gpu::Batch BatchOf(const std::vector<rows::Row>& storage, int32_t size) {
  gpu::Batch batch;
  batch.vocab_size = size;
  batch.row_stride = (size + 3) / 4 * 4;
  batch.logits.resize(storage.size() * static_cast<size_t>(batch.row_stride) * 4);
  for (size_t i = 0; i < storage.size(); ++i) {
    char* out = batch.logits.data() + i * static_cast<size_t>(batch.row_stride) * 4;
    std::memcpy(out, storage[i].logits.data(), static_cast<size_t>(size) * 4);
    batch.inputs.push_back(storage[i].input);
    batch.inputs.back().logits = out;
  }
  return batch;
}

}  // namespace

TEST(tiny_rows) { CompareRandomBatches(1, 40, 6, 600); }
TEST(small_rows) { CompareRandomBatches(2, 6, 4, 9000); }
TEST(middle_rows) { CompareRandomBatches(3, 1, 3, 60000); }

// Bounds of a row's mass do not settle these, exact sums must.
TEST(nuclei_that_end_on_a_boundary) {
  std::mt19937_64 random = test::Random(4);
  for (int b = 0; b < 12 * RowFactor(); ++b) {
    const int32_t size = 300 + rows::Below(random, 2000);
    std::vector<rows::Row> storage(3);
    for (rows::Row& row : storage) rows::FillBoundaryRow(random, size, &row);
    CompareBatch(BatchOf(storage, size), rows::OneOf(random, {1, 2, 4}), 2, random(),
                 "batch " + std::to_string(b));
  }
}

// A threshold cuts off much of some groups and little of others: which arrives first is not what bounds say.
TEST(races_of_groups_that_are_cut) {
  std::mt19937_64 random = test::Random(6);
  std::normal_distribution<float> normal;
  for (int b = 0; b < 8 * RowFactor(); ++b) {
    const int32_t size = 4000 + rows::Below(random, 4000);
    std::vector<rows::Row> storage(4);
    for (rows::Row& row : storage) {
      for (int32_t i = 0; i < size; ++i) {
        // Every other group has few tokens that are kept, and many just below.
        const bool is_cut = i / kGroupSize % 2 == 1 && i % 8 != 0;
        row.logits.push_back((is_cut ? -1.0f : 0.0f) + 0.1f * normal(random));
      }
      row.params.top_p = rows::OneOf(random, {0.5f, 0.7f});
      row.params.seed = random();
      row.input.vocab_size = size;
      PrepareRow(row.params, size, &row.input.constants);
    }
    CompareBatch(BatchOf(storage, size), 1, 1, random(), "batch " + std::to_string(b));
  }
}
