// LengthEstimator and RankCounts against closed forms and plain counting.
#include <cmath>

#include "check.h"
#include "sched/length_estimator.h"
#include "sched/rank_counts.h"

using twinjet::sched::LengthEstimator;
using twinjet::sched::RankCounts;

TEST(without_data_lengths_are_geometric) {
  LengthEstimator lengths(100.0);
  for (double ahead : {0.0, 1.0, 31.0, 255.0}) {
    CHECK(std::abs(lengths.Survival(0.0, ahead) - std::exp(-ahead / 100.0)) < 1e-12);
  }
  CHECK(lengths.Mean(0.0) == 0.0);
  CHECK(std::abs(lengths.Mean(1e6) - 100.0) < 2.0);
}

TEST(outputs_cut_short_say_only_that_they_would_have_been_longer) {
  std::mt19937_64 random = test::Random();
  std::exponential_distribution<double> draw(1.0 / 200);
  LengthEstimator lengths(1000.0, 4000.0);
  for (int i = 0; i < 8000; ++i) {
    auto length = static_cast<int64_t>(draw(random));
    int64_t limit = 20 + static_cast<int64_t>(random() % 2000);
    lengths.Observe(std::min(length, limit), length < limit);
  }
  CHECK_EQ(lengths.num_observed(), 8000);
  CHECK(std::abs(lengths.Mean(1e6) - 200.0) < 20.0);
  CHECK(std::abs(lengths.Survival(150.0, 200.0) - std::exp(-1.0)) < 0.05);
}

TEST(survival_near_is_survival_from_the_bins_lower_edge) {
  LengthEstimator lengths(50.0);
  for (int64_t i = 0; i < 300; ++i) lengths.Observe(i * 7 % 400, i % 3 != 0);
  std::vector<double> times = {0.0, 16.0, 22.0, 64.0, 1e7};
  for (size_t count : {size_t{2}, times.size(), size_t{3}}) {
    std::span<const double> near = lengths.SurvivalNear(130, std::span(times).first(count));
    CHECK_EQ(near.size(), count);
    for (size_t k = 0; k < count; ++k) {
      // 127 is the edge at or below 130.
      CHECK(std::abs(near[k] - lengths.Survival(127.0, times[k])) < 1e-12);
    }
  }
  CHECK_EQ(lengths.SurvivalNear(int64_t{1} << 40, times).size(), times.size());
}

TEST(rank_counts_grow_and_add_up) {
  std::mt19937_64 random = test::Random();
  std::vector<int64_t> sizes(9);
  RankCounts counts;
  for (int i = 0; i < 5000; ++i) {
    int64_t& size = sizes[random() % sizes.size()];
    if (random() % 8 < 5) {
      counts.Add(++size, 1);
    } else if (size > 0) {
      counts.Add(size--, -1);
    }
  }
  for (int64_t x : {0, 1, 2, 63, 64, 65, 200, 100000}) {
    int64_t least = 0;
    int64_t sum = 0;
    for (int64_t size : sizes) {
      least += x > 0 && size >= x;
      sum += std::min(size, x);
    }
    CHECK_EQ(counts.At(x), least);
    CHECK_EQ(counts.UpTo(x), sum);
  }
}
