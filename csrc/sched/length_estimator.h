// LengthEstimator: how long outputs get, a distribution learnt from finished requests, in which older
// ones count less.
//
// The product-limit estimator (Kaplan and Meier 1958): an output cut short by max_tokens, a
// cancellation or an abort says only that it would have been longer, and just that is used. Bins are a
// quarter of an octave; inside one the logarithm of the survival function is linear. Until data
// outweighs it, lengths are taken as geometric. Not thread-safe.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace twinjet::sched {

class LengthEstimator {
 public:
  // prior_mean: tokens, > 0. memory: outputs after which an older one counts 1/e; > 0.
  explicit LengthEstimator(double prior_mean, double memory = 1000.0);

  // length: tokens, >= 0. complete: it ended by itself, not because something cut it short.
  void Observe(int64_t length, bool complete);
  int64_t num_observed() const { return num_observed_; }

  // Expected length of an output that may have at most `limit` tokens; limit >= 0.
  double Mean(double limit);
  // Probability that an output of `start` tokens gets over `ahead` tokens more; both >= 0.
  double Survival(double start, double ahead);
  // Survival() at each of `times` from the lower edge of the bin of `start`. Valid until the next call.
  // times[0] is 0, and each array given is a prefix of the longest one: answers are kept by bin.
  std::span<const double> SurvivalNear(int64_t start, std::span<const double> times);

 private:
  size_t BinOf(double length) const;
  double LogAt(double length) const;
  void Renew();

  double growth_;
  double weight_ = 1.0;
  int64_t num_observed_ = 0;
  int64_t num_fresh_ = 0;
  std::vector<double> prior_hazard_;  // by bin, as the next three
  std::vector<double> prior_risk_;
  std::vector<double> ended_;
  std::vector<double> left_;
  std::vector<double> log_;   // logarithm of the survival function, by edge
  std::vector<double> area_;  // its integral up to the edge
  std::vector<std::vector<double>> kept_;
};

}  // namespace twinjet::sched
