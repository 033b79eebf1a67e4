// Discounted upper confidence bounds that need no scale. scale_free.py is the same in Python.

#pragma once

#include <algorithm>

#include "core.h"

namespace optima_fast {

// Weight, mean and sum of squared deviations of each arm's rewards, the old ones fading. Rewards
// count less the sum of `level`: the first one, and what all arms have gained since.
class ScaleFreeUcbCore : public Scaled {
 public:
  ScaleFreeUcbCore(std::size_t arms, double gamma, double width, double prior, double trend,
                   std::size_t passes, std::size_t warm_up, std::uint64_t seed)
      : Scaled(arms, seed, passes, warm_up),
        gamma_(gamma),
        width_(width),
        prior_(prior),
        trend_(trend),
        level_(2),
        weight_(arms),
        average_(arms),
        square_(arms) {
    keep("level", level_);
    keep("weight", weight_);
    keep("average", average_);
    keep("square", square_);
  }

 protected:
  std::size_t choose() const override {
    const Summary all = summary();
    return argmax(arms(), [&](std::size_t k) { return offset(k, all) + radius(k, all); });
  }

  Numbers means() const override {
    const Summary all = summary();
    Numbers values(arms());
    for (std::size_t k = 0; k < arms(); ++k)
      values[k] = level_[0] + (level_[1] + (all.mean + offset(k, all)));
    return values;
  }

  Numbers spreads() const override {
    const Summary all = summary();
    Numbers values(arms());
    for (std::size_t k = 0; k < arms(); ++k) values[k] = radius(k, all);
    return values;
  }

  void rescale(int shift) override {
    for (Numbers* values : {&level_, &average_})
      for (double& x : *values) x = std::ldexp(x, shift);
    for (double& x : square_) x = std::ldexp(x, 2 * shift);
  }

  void learn_scaled(std::size_t a, double x) override {
    if (round() == 0) level_[0] = x;
    for (std::size_t k = 0; k < arms(); ++k) {
      weight_[k] *= gamma_;
      square_[k] *= gamma_;
      if (weight_[k] < kForgotten) weight_[k] = average_[k] = square_[k] = 0.0;
    }
    // apart, so that a shift of all rewards shifts the first number alone
    const double y = (x - level_[0]) - level_[1];
    const double n = weight_[a];
    const double away = y - average_[a];
    weight_[a] = n + 1.0;
    average_[a] += away / (n + 1.0);
    square_[a] += away * away * (n / (n + 1.0));
    level_[1] += trend_ * (y - average_[a]);
  }

 private:
  static constexpr double kForgotten = 0x1p-100;  // an arm's weight below this is 0

  // Mean of all arms, and the square of the radius of one whose weight and prior add up to 1.
  struct Summary {
    double mean;
    double variance;
  };

  Summary summary() const {
    double n = 0.0;
    double total = 0.0;
    double squares = 0.0;
    double once = 0.0;
    for (std::size_t k = 0; k < arms(); ++k) {
      n += weight_[k];
      total += weight_[k] * average_[k];
      squares += square_[k];
      once += std::min(weight_[k], 1.0);
    }
    const double variance = squares / std::max(1.0, n - once);
    return {n > 0.0 ? total / n : 0.0, variance * (2.0 * logarithm(std::max(1.0, n)))};
  }

  // Estimate of an arm, from the mean of all, which is worth `prior` pulls.
  double offset(std::size_t k, const Summary& all) const {
    return weight_[k] * (average_[k] - all.mean) / (weight_[k] + prior_);
  }
  double radius(std::size_t k, const Summary& all) const {
    return width_ * std::sqrt(all.variance / (weight_[k] + prior_));
  }

  double gamma_;
  double width_;
  double prior_;
  double trend_;
  Numbers level_;
  Numbers weight_;
  Numbers average_;
  Numbers square_;
};

}  // namespace optima_fast
