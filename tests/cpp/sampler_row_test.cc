// Every target this CPU has against the reference, bit for bit.
// TWINJET_TEST_ROWS multiplies the number of random rows (default 1).
#include <cstdlib>

#include "check.h"
#include "sampler/kernels.h"
#include "sampler_rows.h"

using namespace twinjet::sampler;

namespace {

int RowFactor() {
  const char* text = std::getenv("TWINJET_TEST_ROWS");
  return text == nullptr ? 1 : std::max(1, std::atoi(text));
}

std::string Describe(const rows::Row& row, rows::Shape shape, const Kernels& kernels) {
  std::ostringstream text;
  text << kernels.name << " shape " << static_cast<int>(shape) << " size " << row.input.vocab_size
       << " dtype " << static_cast<int>(row.input.dtype) << " T " << row.params.temperature << " k "
       << row.params.top_k << " p " << row.params.top_p << " min_p " << row.params.min_p << " logprobs "
       << row.input.num_logprobs << (row.input.processed_logprobs ? " processed" : " raw");
  return text.str();
}

void CompareRow(const rows::Row& row, rows::Shape shape, bool processed, std::vector<Workspace>& workspaces) {
  rows::Result expected(row.input);
  if (processed) expected.WantProcessed(row.input);
  ReferenceDrawRow(row.input, &expected.output);
  const std::vector<const Kernels*> targets = AvailableKernels();
  for (size_t t = 0; t < targets.size(); ++t) {
    rows::Result result(row.input);
    if (processed) result.WantProcessed(row.input);
    DrawRow(*targets[t], row.input, &workspaces[t], &result.output);
    const std::string difference = rows::Difference(expected, result);
    if (!difference.empty())
      test::Fail(__FILE__, __LINE__, Describe(row, shape, *targets[t]) + ": " + difference);
  }
}

void CompareRandomRows(int num_rows, int32_t max_size) {
  std::mt19937_64 random = test::Random(static_cast<uint64_t>(max_size));
  std::vector<Workspace> workspaces(AvailableKernels().size());
  for (int i = 0; i < num_rows; ++i) {
    const rows::Shape shape = static_cast<rows::Shape>(random() % static_cast<uint64_t>(rows::Shape::kCount));
    rows::Row row;
    rows::FillRow(random, shape, 1 + rows::Below(random, max_size), &row);
    CompareRow(row, shape, rows::Chance(random, 0.05), workspaces);
  }
}

}  // namespace

TEST(names_of_targets) {
  for (const Kernels* kernels : AvailableKernels()) std::printf("     target %s\n", kernels->name);
  CHECK_EQ(std::string(AvailableKernels().back()->name), "scalar");
  CHECK(FindKernels("sse9") == nullptr);
}

TEST(tiny_rows) { CompareRandomRows(40000 * RowFactor(), 40); }
TEST(small_rows) { CompareRandomRows(4000 * RowFactor(), 1100); }
TEST(middle_rows) { CompareRandomRows(400 * RowFactor(), 9000); }
TEST(large_rows) { CompareRandomRows(16 * RowFactor(), 300000); }

// Top-p targets that lie exactly on the mass before a token, one below and one above it: the
// thresholds of an implementation that confuses < and <= differ there and nowhere else.
TEST(top_p_on_every_boundary) {
  std::mt19937_64 random = test::Random();
  std::vector<Workspace> workspaces(AvailableKernels().size());
  for (int round = 0; round < 300; ++round) {
    const int32_t size = 1 + rows::Below(random, 700);
    rows::Row row;
    row.logits =
        rows::MakeLogits(random, round % 2 == 0 ? rows::Shape::kQuarters : rows::Shape::kNormal, size);
    row.input.vocab_size = size;
    row.input.logits = row.logits.data();
    row.input.num_logprobs = size;
    row.input.processed_logprobs = true;
    row.params.seed = random();
    PrepareRow(row.params, size, &row.input.constants);
    RowConstants& constants = row.input.constants;
    constants.has_top_p = 1;

    std::vector<float> sorted = row.logits;
    std::sort(sorted.rbegin(), sorted.rend());
    uint64_t total = 0;
    for (float x : sorted) total += WeightOf(x, sorted[0], constants.scale);
    uint64_t above = 0;
    const int32_t stop = rows::Below(random, size);
    for (int32_t i = 0; i < stop; ++i)
      above += WeightOf(sorted[static_cast<size_t>(i)], sorted[0], constants.scale);
    // The fixed-point p whose product with the total is just above `above`: ceil gives above + 1.
    const auto p = static_cast<uint64_t>((static_cast<unsigned __int128>(above) << 64) / total);
    for (uint64_t fixed : {p - 1, p, p + 1}) {
      constants.top_p_fixed = above == 0 ? 0 : fixed;
      CompareRow(row, rows::Shape::kQuarters, false, workspaces);
    }
  }
}

TEST(top_k_around_every_tie) {
  std::mt19937_64 random = test::Random();
  std::vector<Workspace> workspaces(AvailableKernels().size());
  for (int round = 0; round < 1000; ++round) {
    const int32_t size = 2 + rows::Below(random, round % 2 == 0 ? 600 : 6000);
    rows::Row row;
    row.logits = rows::MakeLogits(random, round % 8 < 6 ? rows::Shape::kTies : rows::Shape::kFlat, size);
    row.input.vocab_size = size;
    row.input.logits = row.logits.data();
    row.input.num_logprobs = size;
    row.input.processed_logprobs = true;
    row.params.seed = random();
    row.params.top_k = 1 + rows::Below(random, size);
    row.params.top_p = rows::OneOf(random, {1.0f, 0.5f, 0.0f});
    PrepareRow(row.params, size, &row.input.constants);
    CompareRow(row, rows::Shape::kTies, false, workspaces);
  }
}

// Rows whose sampled tokens mislead every guess of where the nucleus ends.
TEST(top_p_when_the_sample_misleads) {
  std::mt19937_64 random = test::Random();
  std::vector<Workspace> workspaces(AvailableKernels().size());
  for (int round = 0; round < 620; ++round) {
    const int32_t size = (round < 600 ? 4096 : 65536) + rows::Below(random, 5000);
    rows::Row row;
    row.logits = rows::MakeLogits(random, rows::Shape::kMisleading, size);
    row.input.vocab_size = size;
    row.input.logits = row.logits.data();
    row.params.seed = random();
    row.params.top_p = rows::OneOf(random, {0.1f, 0.3f, 0.5f, 0.9f, 0.95f, 0.99f, 0.9999f});
    row.input.num_logprobs = 1;
    row.input.processed_logprobs = true;  // shows the kept mass
    PrepareRow(row.params, size, &row.input.constants);
    CompareRow(row, rows::Shape::kMisleading, false, workspaces);
  }
}

// Nuclei too long to list, in vocabularies around the sizes where blocks and the sample change, with
// boundaries among ties, signed zeros and subnormal values.
TEST(top_p_with_long_nuclei) {
  std::mt19937_64 random = test::Random();
  std::vector<Workspace> workspaces(AvailableKernels().size());
  for (int32_t size : {4095, 4096, 4097, 4111, 4352, 8191, 8193, 65535, 65536, 65537, 66047, 66048}) {
    for (rows::Shape shape :
         {rows::Shape::kNormal, rows::Shape::kFlat, rows::Shape::kTies, rows::Shape::kQuarters,
          rows::Shape::kSubnormal, rows::Shape::kWide, rows::Shape::kZeros, rows::Shape::kMisleading}) {
      rows::Row row;
      row.logits = rows::MakeLogits(random, shape, size);
      row.input.vocab_size = size;
      row.input.logits = row.logits.data();
      row.params.seed = random();
      row.params.temperature = rows::OneOf(random, {1.0f, 3.0f, 2e-5f});
      row.params.top_p = rows::OneOf(random, {0.5f, 0.95f, 0.9999f, 0.99999994f});
      row.params.min_p = rows::OneOf(random, {0.0f, 0.0f, 1e-3f});
      row.input.num_logprobs = 1;
      row.input.processed_logprobs = true;  // shows the kept mass
      PrepareRow(row.params, size, &row.input.constants);
      CompareRow(row, shape, false, workspaces);
    }
  }
}

// The kernels behind them against plain loops, for every length about a group and a vector.
TEST(split_masses_of_every_length) {
  std::mt19937_64 random = test::Random();
  for (int32_t size = 1; size <= 600; ++size) {
    const size_t n = static_cast<size_t>(size), num_groups = (n + kGroupSize - 1) / kGroupSize;
    const std::vector<float> x =
        rows::MakeLogits(random, size % 2 == 0 ? rows::Shape::kQuarters : rows::Shape::kNormal, size);
    const float max = *std::max_element(x.begin(), x.end()), scale = 1.4426950408889634f;
    const float least = size % 3 == 0 ? max - 3.0f : NegativeInfinity();
    float low = x[random() % n], high = size % 5 == 0 ? PositiveInfinity() : x[random() % n];
    if (low > high) std::swap(low, high);
    std::vector<uint64_t> masses(num_groups, 0), above(num_groups, 0);
    std::vector<float> weights(n), group_max(num_groups, NegativeInfinity());
    std::vector<int32_t> ids;
    for (size_t i = 0; i < n; ++i) {
      const uint64_t weight = x[i] >= least ? WeightOf(x[i], max, scale) : 0;
      weights[i] = static_cast<float>(weight);
      masses[i / kGroupSize] += weight;
      group_max[i / kGroupSize] = std::max(group_max[i / kGroupSize], x[i]);
      if (x[i] >= high) above[i / kGroupSize] += weight;
    }
    for (size_t i = 0; i < n; ++i) {
      if (x[i] >= low && x[i] < high && masses[i / kGroupSize] != 0) ids.push_back(static_cast<int32_t>(i));
    }
    for (const Kernels* kernels : AvailableKernels()) {
      std::vector<float> out_weights(n);
      std::vector<uint64_t> out_masses(num_groups, 7), out_above(num_groups, 7);
      std::vector<int32_t> out_ids(n + kListSlack);
      kernels->weigh_groups(x.data(), size, group_max.data(), max, scale, least, out_weights.data(),
                            out_masses.data());
      CHECK(out_masses == masses);
      CHECK(rows::SameBits(out_weights, weights));
      const int32_t count =
          kernels->split_masses(x.data(), out_weights.data(), size, group_max.data(), out_masses.data(), low,
                                high, out_above.data(), out_ids.data());
      out_ids.resize(static_cast<size_t>(count));
      CHECK(out_above == above);
      CHECK(out_ids == ids);
    }
  }
}
