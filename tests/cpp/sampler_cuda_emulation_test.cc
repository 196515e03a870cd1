// The CUDA sampler's algorithm on the host against the specification's reference: tokens, statuses and the
// threshold itself. TWINJET_TEST_ROWS multiplies the number of random rows (default 1; 25 is a million rows).
#include "sampler_cuda_emulation.h"

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

constexpr cuda::DeviceLimits kHopper = {132, 232448, 16};

// The kept set by its logprobs: every token's processed logprob is -inf exactly where it is dropped. Returns
// how many searches ended among kept tokens.
int CompareRow(rows::Row* row, int32_t cluster, int* num_uncertain = nullptr) {
  RowInput input = row->input;
  input.num_logprobs = -1;
  rows::Result expected(input);
  expected.WantProcessed(input);
  // A scan of all ids is a list of all logprobs.
  std::vector<int32_t> ids(static_cast<size_t>(input.vocab_size) + 1);
  std::vector<float> logprobs(ids.size());
  if (input.vocab_size <= 2000) {
    input.num_logprobs = input.vocab_size;
    input.processed_logprobs = true;
    expected.output.top_ids = ids.data();
    expected.output.top_logprobs = logprobs.data();
  }
  ReferenceDrawRow(input, &expected.output);

  const cuda::LaunchShape shape = cuda::ChooseShape(kHopper, 1, input.vocab_size, cluster);
  rows::Result result(row->input);
  result.output.status = expected.output.status & kStatusNan;  // the edits are not what is tested here
  // The reference settles infinities before it hands out its logits: undo that by status alone.
  emulation::Row emulated(expected.processed, shape);
  float threshold = 0.0f;
  emulated.Draw(input.constants, &result.output, &threshold);
  result.output.status |= expected.output.status & kStatusInfinite;
  std::ostringstream text;
  text << "size " << input.vocab_size << " cluster " << shape.cluster << " T " << row->params.temperature
       << " k " << row->params.top_k << " p " << row->params.top_p << " min_p " << row->params.min_p;
  if (result.output.token_id != expected.output.token_id) {
    test::Fail(__FILE__, __LINE__,
               text.str() + ": token " + std::to_string(expected.output.token_id) + " and " +
                   std::to_string(result.output.token_id));
  }
  CHECK_EQ(result.output.status, expected.output.status);
  CHECK(emulated.num_sweeps < 60);
  if (num_uncertain != nullptr) *num_uncertain += emulated.num_uncertain;
  if (input.num_logprobs < 0 || expected.output.token_id < 0) return emulated.num_kept_searches;
  for (size_t i = 1; i < ids.size(); ++i) {
    if (ids[i] < 0) continue;
    const float x = expected.processed[static_cast<size_t>(ids[i])];
    // A kept token far below the others overflows to -inf as well: it tells nothing.
    const float distance =
        (x - expected.processed[static_cast<size_t>(ids[1])]) / input.constants.temperature;
    if (x >= threshold && distance < -3e38f) continue;
    const bool kept = logprobs[i] > NegativeInfinity();
    if (kept != (x >= threshold && x > NegativeInfinity())) {
      std::ostringstream value;
      value << text.str() << ": threshold " << std::hexfloat << threshold << ", logit " << x
            << (kept ? " kept" : " dropped");
      test::Fail(__FILE__, __LINE__, value.str());
    }
  }
  return emulated.num_kept_searches;
}

void CompareRandomRows(int num_rows, int32_t max_size) {
  std::mt19937_64 random = test::Random(static_cast<uint64_t>(max_size) + 17);
  for (int i = 0; i < num_rows; ++i) {
    const rows::Shape shape = static_cast<rows::Shape>(random() % static_cast<uint64_t>(rows::Shape::kCount));
    rows::Row row;
    rows::FillRow(random, shape, 1 + rows::Below(random, max_size), &row);
    CompareRow(&row, rows::OneOf(random, {0, 1, 2, 4, 8, 16}));
  }
}

}  // namespace

TEST(tiny_rows) { CompareRandomRows(38000 * RowFactor(), 600); }
TEST(small_rows) { CompareRandomRows(2000 * RowFactor(), 9000); }
TEST(large_rows) { CompareRandomRows(10 * RowFactor(), 300000); }

// Both zeros are one logit to every search; a search whose bracket ends at them must not count them twice.
TEST(brackets_that_end_at_zero) {
  std::mt19937_64 random = test::Random(9);
  for (int i = 0; i < 400; ++i) {
    rows::Row row;
    const int32_t size = 500 + rows::Below(random, 1500);
    for (int32_t j = 0; j < size; ++j) {
      const float step = rows::OneOf(random, {1e-42f, 1e-38f, 0.01f});
      row.logits.push_back(rows::Chance(random, 0.4)
                               ? rows::OneOf(random, {0.0f, -0.0f})
                               : step * static_cast<float>(rows::Below(random, 21) - 10));
    }
    row.params.top_k = 2 + rows::Below(random, size - 2);
    if (rows::Chance(random, 0.5)) row.params.top_p = rows::OneOf(random, {0.3f, 0.5f, 0.7f, 0.9f});
    row.input.vocab_size = size;
    row.input.logits = row.logits.data();
    PrepareRow(row.params, size, &row.input.constants);
    CompareRow(&row, rows::OneOf(random, {1, 2, 8}));
  }
}

// Flat rows keep most of their tokens under top-p: a sample finds about where the threshold lies.
TEST(deep_thresholds_are_found_among_kept_tokens) {
  std::mt19937_64 random = test::Random(21);
  std::normal_distribution<float> normal;
  int num_kept_searches = 0;
  constexpr int kRows = 60;
  for (int i = 0; i < kRows; ++i) {
    rows::Row row;
    const int32_t size = 20000 + rows::Below(random, 20000);
    for (int32_t j = 0; j < size; ++j) row.logits.push_back(normal(random));
    row.params.top_p = rows::OneOf(random, {0.5f, 0.8f, 0.9f, 0.95f, 0.99f});
    row.params.temperature = rows::OneOf(random, {0.7f, 1.0f, 2.0f});
    row.params.seed = random();
    row.input.vocab_size = size;
    row.input.logits = row.logits.data();
    PrepareRow(row.params, size, &row.input.constants);
    num_kept_searches += CompareRow(&row, rows::OneOf(random, {2, 4, 8, 16}));
  }
  CHECK(num_kept_searches >= kRows * 3 / 4);
}

// Where bounds of a row's mass do not say which token is the last, the exact mass must.
TEST(nuclei_that_end_on_a_boundary) {
  std::mt19937_64 random = test::Random(22);
  int num_uncertain = 0;
  constexpr int kRows = 1000;
  for (int i = 0; i < kRows; ++i) {
    rows::Row row;
    rows::FillBoundaryRow(random, 300 + rows::Below(random, i % 50 == 0 ? 30000 : 3000), &row);
    CompareRow(&row, rows::OneOf(random, {1, 2, 4, 8, 16}), &num_uncertain);
  }
  CHECK(num_uncertain >= kRows / 20);
}

// All values that a search counts in a bin and above reach the bin's bound, at any width and place.
TEST(counted_values_reach_their_bound) {
  std::mt19937_64 random = test::Random(34);
  for (int i = 0; i < 200000; ++i) {
    const float lo = rows::OneOf(random, {0.0f, 1e-3f, -2.5f, 17.0f, 1e4f, -3e4f, 1e30f, -1e-38f});
    const float hi = lo + rows::OneOf(random, {1e-30f, 1e-7f, 1e-3f, 0.3f, 20.0f, 1e6f, 1e25f, 3e38f});
    const cuda::BinGrid grid = cuda::GridBetween(lo, hi);
    if (!grid.is_fit) continue;
    const uint32_t first = OrderedKey(lo), last = OrderedKey(hi);
    float x = FloatFromKey(first + static_cast<uint32_t>(random() % (last - first + 1)));
    const int32_t bin = cuda::BinAbove(grid, x);
    CHECK(bin >= 0 && bin < cuda::kNumBins);
    CHECK(x >= cuda::NarrowTo({lo, hi}, grid, bin).lo);
    // And the least value that falls into the bin.
    x = cuda::EdgeOf(grid, bin);
    for (int step = 0; step < 4 && x >= lo && cuda::BinAbove(grid, x) >= bin; ++step) {
      CHECK(x >= cuda::NarrowTo({lo, hi}, grid, bin).lo);
      x = std::nextafter(x, NegativeInfinity());
    }
  }
}

// A bin holds what lies from its edge up to the next bin's, in brackets of any width and place.
TEST(bins_part_a_bracket_at_their_edges) {
  std::mt19937_64 random = test::Random(33);
  int num_fit = 0;
  for (int i = 0; i < 20000; ++i) {
    const float middle = rows::OneOf(random, {0.0f, 1e-3f, -2.5f, 17.0f, -3e4f, 1e30f});
    const float width = rows::OneOf(random, {1e-7f, 1e-3f, 0.3f, 20.0f, 1e6f, 3e38f});
    const uint32_t lo = OrderedKey(middle), hi = OrderedKey(middle + width) + 1;
    if (hi <= lo + 1) continue;
    const cuda::Bracket bracket = {lo, hi, 5, 105};
    const cuda::BinGrid grid = cuda::GridOf(bracket);
    if (!grid.is_fit) continue;
    ++num_fit;
    const float x = FloatFromKey(lo + static_cast<uint32_t>(random() % (hi - lo)));
    const int32_t bin = cuda::BinOf(grid, x);
    CHECK(bin >= 0 && bin < cuda::kNumBins);
    const cuda::Bracket part = cuda::BracketOfBin(bracket, grid, {bin, 30, 20, 100});
    CHECK(x >= FloatFromKey(part.lo) && x <= cuda::LastBelow(part.hi));
    CHECK_EQ(part.reached, 75u);
    CHECK_EQ(part.above, 55u);
    const int32_t other = rows::Below(random, cuda::kNumBins);
    const cuda::Bracket elsewhere = cuda::BracketOfBin(bracket, grid, {other, 30, 20, 100});
    if (other != bin)
      CHECK(!(x >= FloatFromKey(elsewhere.lo) && x <= cuda::LastBelow(elsewhere.hi)) ||
            elsewhere.lo >= elsewhere.hi);
  }
  CHECK(num_fit > 5000);
}

// The weight that kernels add up is the specification's, at every exponent and at the ends.
TEST(truncated_weight_is_the_weight) {
  std::mt19937_64 random = test::Random();
  for (int i = 0; i < 3000000; ++i) {
    const float z = -47.0f * static_cast<float>(random() >> 40) * 0x1p-24f;
    const double w = DoubleFromBits(cuda::WeightAsDoubleBits(z));
    CHECK_EQ(static_cast<uint64_t>(std::floor(w)), WeightOfZ(z));
  }
  for (float z : {0.0f, -0.0f, -44.0f, -44.5f, -46.0f, -1e30f, -std::numeric_limits<float>::infinity()}) {
    CHECK_EQ(static_cast<uint64_t>(std::floor(DoubleFromBits(cuda::WeightAsDoubleBits(z)))), WeightOfZ(z));
  }
}

// min-p's key parts the logits exactly where the predicate on z does.
TEST(min_p_key_is_the_predicate) {
  std::mt19937_64 random = test::Random(3);
  for (int i = 0; i < 20000; ++i) {
    const float max = rows::OneOf(random, {0.0f, 3.5f, -7.25f, 1e-40f, 1e6f, 3e38f});
    const float scale = rows::OneOf(random, {1.442695f, 0.1f, 144269.0f, 1e-30f});
    const float min_z = rows::OneOf(random, {0.0f, -0.1f, -4.32f, -30.0f, -149.0f});
    const uint32_t key = cuda::MinPKey(max, scale, min_z);
    CHECK(ZOf(FloatFromKey(key), max, scale) >= min_z);
    if (key > cuda::kKeyOfNegativeInfinity) CHECK(!(ZOf(FloatFromKey(key - 1), max, scale) >= min_z));
  }
}

TEST(shapes_fit_their_device) {
  for (int32_t vocab_size : {1, 255, 256, 257, 32000, 128256, 151936, 262144, 300000, 524288}) {
    for (int32_t num_rows : {1, 7, 32, 256, 1024}) {
      for (const cuda::DeviceLimits& limits :
           {kHopper, cuda::DeviceLimits{108, 166912, 1}, cuda::DeviceLimits{128, 101376, 1}}) {
        for (const bool keeps_narrow : {false, true}) {
          const cuda::LaunchShape shape = cuda::ChooseShape(limits, num_rows, vocab_size, 0, keeps_narrow);
          CHECK(shape.shared_bytes <= limits.max_shared_bytes);
          CHECK(shape.cluster <= limits.max_cluster);
          CHECK(shape.cluster * shape.groups_per_block >= cuda::NumGroups(vocab_size));
          CHECK(shape.on_chip || shape.cluster == 1);
          CHECK_EQ(shape.keeps_narrow, keeps_narrow && shape.on_chip);
          CHECK_EQ(shape.on_chip, cuda::ScratchFloats(shape, vocab_size) == 0);
        }
      }
    }
  }
  // Three blocks to a multiprocessor of 228 KiB, a KiB of each its own.
  constexpr size_t kThird = (228 << 10) / 3 - 1024;
  CHECK_EQ(cuda::ChooseShape(kHopper, 256, 128256, 0).cluster, 8);
  CHECK(cuda::ChooseShape(kHopper, 256, 128256, 0).shared_bytes <= kThird);
  CHECK_EQ(cuda::ChooseShape(kHopper, 256, 128256, 0, true).cluster, 4);
  CHECK(cuda::ChooseShape(kHopper, 256, 128256, 0, true).shared_bytes <= kThird);
  CHECK_EQ(cuda::ChooseShape(kHopper, 1, 128256, 0).cluster, 16);
}
