// Thompson sampling for arms that are sets of units, such as modules or layer groups.

#pragma once

#include "scale_free.h"

namespace optima_fast {

// An arm is the bits of its units. What a coefficient sees of the arms is a sum over supersets of
// its bits, what an arm sees of the coefficients one over subsets.
class LinearThompson : public ScaleFree {
 public:
  LinearThompson(std::vector<std::uint32_t> masks, std::uint32_t units, double gamma, double width,
                 double prior, double ridge, double trend, std::size_t passes,
                 std::size_t warm_up, std::uint64_t seed)
      : ScaleFree(masks.size(), gamma, width, prior, trend, passes, warm_up, seed),
        masks_(std::move(masks)),
        units_(units),
        ridge_(ridge) {
    if (units > 16) throw std::invalid_argument("units must be at most 16");
    for (const std::uint32_t mask : masks_)
      if (mask >> units) throw std::invalid_argument("masks must be below 2^units");
    features_.push_back(0);
    for (std::uint32_t i = 0; i < units; ++i) features_.push_back(1u << i);
    for (std::uint32_t i = 0; i < units; ++i)
      for (std::uint32_t j = i + 1; j < units; ++j) features_.push_back(1u << i | 1u << j);
    keep_statistics();
  }

 protected:
  std::size_t choose() const override {
    const double mean = stats_.summary().mean;
    const Fit fit = this->fit(mean);
    const double scale = width_ * std::sqrt(fit.variance);
    Numbers noise(features_.size());
    for (std::size_t i = 0; i < noise.size(); ++i) noise[i] = scale * draw(arms() + i);
    const Numbers offsets = this->offsets(fit, mean, noise);
    return argmax(arms(), [&](std::size_t k) {
      return offsets[k] + scale / std::sqrt(stats_.weight[k] + prior_) * draw(k);
    });
  }

  Numbers means() const override {
    const double mean = stats_.summary().mean;
    Numbers values = offsets(fit(mean), mean, Numbers(features_.size(), 0.0));
    for (double& x : values) x = level_[0] + (mean + x);
    return values;
  }

  Numbers spreads() const override {
    const Fit fit = this->fit(stats_.summary().mean);
    const std::size_t n = features_.size();
    Numbers left(n);
    Numbers values(arms());
    for (std::size_t arm = 0; arm < arms(); ++arm) {
      for (std::size_t i = 0; i < n; ++i)
        left[i] = (features_[i] & masks_[arm]) == features_[i] ? 1.0 : 0.0;
      double leverage = 0.0;
      for (std::size_t i = 0; i < n; ++i) {
        const double* row = fit.row(i);
        const double solved = left[i] / row[i];
        leverage += solved * solved;
        for (std::size_t k = i + 1; k < n; ++k) left[k] -= row[k] * solved;
      }
      const double own = 1.0 / (stats_.weight[arm] + prior_);
      const double share = prior_ / (stats_.weight[arm] + prior_);
      values[arm] = width_ * std::sqrt(fit.variance * (own + share * share * leverage));
    }
    return values;
  }

 private:
  // Upper Cholesky factor of the coefficients' precision, with the solution of its transpose as
  // another column; and the noise's variance.
  struct Fit {
    explicit Fit(std::size_t n) : columns(n + 1), values(n * (n + 1)) {}
    double* row(std::size_t i) { return &values[i * columns]; }
    const double* row(std::size_t i) const { return &values[i * columns]; }

    std::size_t columns;
    Numbers values;
    double variance = 0.0;
  };

  // Pairs of masks that differ in one bit, bit by bit.
  template <typename Do>
  static void for_each_bit(std::size_t masks, Do apply) {
    for (std::size_t bit = 1; bit < masks; bit *= 2)
      for (std::size_t block = 0; block < masks; block += 2 * bit)
        for (std::size_t mask = block; mask < block + bit; ++mask) apply(mask, mask + bit);
  }

  Fit fit(double mean) const {
    const std::size_t n = features_.size();
    Numbers weight(std::size_t{1} << units_), total(weight.size());
    double pulls = 0.0;
    double square = 0.0;
    for (std::size_t k = 0; k < arms(); ++k) {
      const double pulled = stats_.weight[k];
      const double away = stats_.mean[k] - mean;
      const double w = prior_ * pulled / (pulled + prior_);
      weight[masks_[k]] += w;
      total[masks_[k]] += w * away;
      pulls += pulled;
      square += stats_.square[k] + w * away * away;
    }
    for (Numbers* table : {&weight, &total})
      for_each_bit(table->size(), [&](std::size_t without, std::size_t with) {
        (*table)[without] += (*table)[with];
      });

    Fit fit(n);
    for (std::size_t i = 0; i < n; ++i) {
      double* row = fit.row(i);
      for (std::size_t k = i; k < n; ++k) row[k] = weight[features_[i] | features_[k]];
      row[n] = total[features_[i]];
    }
    for (std::size_t j = 0; j < n; ++j) {
      double* row = fit.row(j);
      const double pivot = std::sqrt(row[j] + ridge_);
      row[j] = pivot;
      const double inverse = 1.0 / pivot;
      for (std::size_t k = j + 1; k <= n; ++k) row[k] *= inverse;
      for (std::size_t i = j + 1; i < n; ++i) {
        double* below = fit.row(i);
        const double factor = row[i];
        for (std::size_t k = i; k <= n; ++k) below[k] -= factor * row[k];
      }
      square -= row[n] * row[n];
    }
    fit.variance = std::max(0.0, square) / std::max(1.0, pulls - 1.0);
    return fit;
  }

  Numbers offsets(const Fit& fit, double mean, const Numbers& noise) const {
    const std::size_t n = features_.size();
    Numbers solved(n), table(std::size_t{1} << units_);
    for (std::size_t i = n; i-- > 0;) {
      const double* row = fit.row(i);
      double rest = row[n] + noise[i];
      for (std::size_t k = i + 1; k < n; ++k) rest -= row[k] * solved[k];
      solved[i] = rest / row[i];
      table[features_[i]] = solved[i];
    }
    for_each_bit(table.size(), [&](std::size_t without, std::size_t with) {
      table[with] += table[without];
    });
    Numbers values(arms());
    for (std::size_t k = 0; k < arms(); ++k) {
      const double pulled = stats_.weight[k];
      values[k] =
          (pulled * (stats_.mean[k] - mean) + prior_ * table[masks_[k]]) / (pulled + prior_);
    }
    return values;
  }

  std::vector<std::uint32_t> masks_;
  std::uint32_t units_;
  double ridge_;
  std::vector<std::uint32_t> features_;
};

}  // namespace optima_fast
