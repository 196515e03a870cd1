#include "sched/length_estimator.h"

#include <algorithm>
#include <cmath>

namespace twinjet::sched {
namespace {

constexpr double kPriorWeight = 8.0;
constexpr double kSmallestLog = -30.0;

// Bin edges in tokens, four to the octave: 0, 1, 2, 3, 4, 5, 7, ... 2^20 - 1.
const std::vector<double>& Edges() {
  static const std::vector<double> edges = [] {
    std::vector<double> made;
    for (int k = 0; k <= 80; ++k) {
      double edge = std::floor(std::exp2(k / 4.0)) - 1.0;
      if (made.empty() || edge > made.back()) made.push_back(edge);
    }
    return made;
  }();
  return edges;
}

}  // namespace

LengthEstimator::LengthEstimator(double prior_mean, double memory) : growth_(1.0 + 1.0 / memory) {
  const std::vector<double>& edges = Edges();
  size_t num_bins = edges.size() - 1;
  for (size_t b = 0; b < num_bins; ++b) {
    prior_hazard_.push_back(-std::expm1((edges[b] - edges[b + 1]) / prior_mean));
    prior_risk_.push_back(kPriorWeight * std::max(std::exp(-edges[b] / prior_mean), 1e-4));
  }
  ended_.resize(num_bins);
  left_.resize(num_bins);
  log_.resize(edges.size());
  area_.resize(edges.size());
  kept_.resize(edges.size());
  num_fresh_ = 1;
}

void LengthEstimator::Observe(int64_t length, bool complete) {
  size_t b = std::min(BinOf(static_cast<double>(length)), left_.size() - 1);
  left_[b] += weight_;
  if (complete) ended_[b] += weight_;
  weight_ *= growth_;
  if (weight_ > 1e6) {
    for (double& x : left_) x /= weight_;
    for (double& x : ended_) x /= weight_;
    weight_ = 1.0;
  }
  ++num_observed_;
  ++num_fresh_;
}

double LengthEstimator::Mean(double limit) {
  Renew();
  const std::vector<double>& edges = Edges();
  size_t b = std::min(BinOf(limit), edges.size() - 2);
  double share = std::min((limit - edges[b]) / (edges[b + 1] - edges[b]), 1.0);
  return area_[b] + share * (area_[b + 1] - area_[b]);
}

double LengthEstimator::Survival(double start, double ahead) {
  Renew();
  return std::exp(LogAt(start + ahead) - LogAt(start));
}

std::span<const double> LengthEstimator::SurvivalNear(int64_t start, std::span<const double> times) {
  Renew();
  size_t b = BinOf(static_cast<double>(start));
  std::vector<double>& kept = kept_[b];
  if (kept.size() < times.size()) {
    kept.resize(times.size());
    double edge = Edges()[b];
    for (size_t k = 0; k < times.size(); ++k) kept[k] = std::exp(LogAt(edge + times[k]) - log_[b]);
  }
  return std::span(kept).first(times.size());
}

// The last edge counts as a bin of its own.
size_t LengthEstimator::BinOf(double length) const {
  const std::vector<double>& edges = Edges();
  return static_cast<size_t>(std::upper_bound(edges.begin(), edges.end(), length) - edges.begin()) - 1;
}

double LengthEstimator::LogAt(double length) const {
  const std::vector<double>& edges = Edges();
  size_t b = BinOf(length);
  if (b + 1 == edges.size()) return log_[b];
  return log_[b] + (log_[b + 1] - log_[b]) / (edges[b + 1] - edges[b]) * (length - edges[b]);
}

// Makes the distribution anew once enough was observed: the first times at once, then by eighths.
void LengthEstimator::Renew() {
  if (num_fresh_ < std::min<int64_t>(64, 1 + num_observed_ / 8)) return;
  num_fresh_ = 0;
  for (std::vector<double>& kept : kept_) kept.clear();
  const std::vector<double>& edges = Edges();
  // From the longest down: at_risk is what got into the bin, those cut short inside it for half of it.
  double reached = 0.0;
  for (size_t b = left_.size(); b-- > 0;) {
    double left = left_[b] / weight_;
    double ended = ended_[b] / weight_;
    reached += left;
    double at_risk = reached - 0.5 * (left - ended) + prior_risk_[b];
    double hazard = std::min((ended + prior_risk_[b] * prior_hazard_[b]) / at_risk, 1.0 - 1e-9);
    log_[b + 1] = std::log1p(-hazard);
  }
  double log = 0.0;
  double survival = 1.0;
  for (size_t b = 1; b < log_.size(); ++b) {
    log += log_[b];
    log_[b] = std::max(log, kSmallestLog);
    double next = std::exp(log_[b]);
    area_[b] = area_[b - 1] + (survival + next) / 2 * (edges[b] - edges[b - 1]);
    survival = next;
  }
}

}  // namespace twinjet::sched
