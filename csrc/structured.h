// Upper confidence bounds for arms that share units. structured.py is the same in Python.

#pragma once

#include <algorithm>

#include "core.h"

namespace optima_fast {

// A Kalman filter of what arms are worth: a level that walks, weights of features that fade, and
// something of each arm's own that fades. Variances are in units of the noise's.
class StructuredUcbCore : public Scaled {
 public:
  StructuredUcbCore(const std::vector<Numbers>& features, double gamma, double width, double prior,
                    double trend, std::size_t passes, std::size_t warm_up, std::uint64_t seed)
      : Scaled(features.size(), seed, passes, warm_up),
        columns_(features.at(0).size(), Numbers(features.size())),
        gamma_(gamma),
        width_(width),
        prior_(prior),
        trend_(trend),
        own_prior_(columns_.empty() ? 3.0 * prior : prior),
        shared_prior_(features.size()),
        level_(2),
        noise_(2),
        offset_(features.size()),
        own_(features.size(), own_prior_) {
    for (std::size_t k = 0; k < arms(); ++k) {
      if (features[k].size() != columns_.size())
        throw std::invalid_argument("features must have rows of one length");
      double square = 0.0;
      for (std::size_t j = 0; j < columns_.size(); ++j) {
        const double x = columns_[j][k] = features[k][j];
        square += x * x;
      }
      shared_prior_[k] = prior * square;
    }
    shared_ = shared_prior_;
    covariance_.assign(columns_.size() + 1, Numbers(columns_.size() + 1));
    std::vector<Numbers*> rows;
    for (std::size_t i = 0; i < covariance_.size(); ++i) {
      covariance_[i][i] = i == 0 ? 1.0 : prior;
      rows.push_back(&covariance_[i]);
    }
    keep("level", level_);
    keep("noise", noise_);
    keep("offset", offset_);
    keep("shared", shared_);
    keep("own", own_);
    keep("covariance", rows);
  }

 protected:
  std::size_t choose() const override {
    const double variance = this->variance();
    return argmax(arms(),
                  [&](std::size_t k) { return offset_[k] + width_ * deviation(k, variance); });
  }

  Numbers means() const override {
    Numbers values(arms());
    for (std::size_t k = 0; k < arms(); ++k) values[k] = level_[0] + (level_[1] + offset_[k]);
    return values;
  }

  Numbers spreads() const override {
    const double variance = this->variance();
    Numbers values(arms());
    for (std::size_t k = 0; k < arms(); ++k) values[k] = deviation(k, variance);
    return values;
  }

  void rescale(int shift) override {
    for (Numbers* values : {&level_, &offset_})
      for (double& x : *values) x = std::ldexp(x, shift);
    noise_[0] = std::ldexp(noise_[0], 2 * shift);
  }

  void learn_scaled(std::size_t a, double x) override {
    if (round() == 0) level_[0] = x;
    fade();

    const std::size_t n = columns_.size();
    Numbers gain = covariance_[0];  // of the level and the features: covariance with the arm
    for (std::size_t j = 0; j < n; ++j)
      for (std::size_t i = 0; i <= n; ++i) gain[i] += columns_[j][a] * covariance_[j + 1][i];
    Numbers reach(arms());  // covariance of what each arm shares with the arm
    for (std::size_t j = 0; j < n; ++j)
      for (std::size_t k = 0; k < arms(); ++k) reach[k] += columns_[j][k] * gain[j + 1];

    const double inverse = 1.0 / (1.0 + std::max(0.0, gain[0] + reach[a]) + own_[a]);
    const double surprise = (x - level_[0]) - level_[1] - offset_[a];
    const double step = surprise * inverse;
    for (std::size_t i = 0; i <= n; ++i)
      for (std::size_t j = 0; j <= n; ++j) covariance_[i][j] -= gain[i] * gain[j] * inverse;
    level_[1] += gain[0] * step;
    for (std::size_t k = 0; k < arms(); ++k) {
      offset_[k] += reach[k] * step;
      shared_[k] = std::max(0.0, shared_[k] - reach[k] * reach[k] * inverse);
    }
    offset_[a] += own_[a] * step;
    own_[a] -= own_[a] * own_[a] * inverse;
    if (round() > 0) {  // the first reward is no surprise: it sets the level
      noise_[0] = kFading * noise_[0] + surprise * step;
      noise_[1] = kFading * noise_[1] + 1.0;
    }
  }

 private:
  static constexpr double kFading = 0.99;  // of what the noise's variance is learned from

  double variance() const { return noise_[1] > 0.0 ? noise_[0] / noise_[1] : 0.0; }
  double deviation(std::size_t k, double variance) const {
    return std::sqrt(variance * (shared_[k] + own_[k]));
  }

  void fade() {
    const double square = gamma_ * gamma_;
    const double renewed = 1.0 - square;
    for (std::size_t k = 0; k < arms(); ++k) {
      offset_[k] *= gamma_;
      shared_[k] = square * shared_[k] + renewed * shared_prior_[k];
      own_[k] = square * own_[k] + renewed * own_prior_;
    }
    covariance_[0][0] += trend_;
    for (std::size_t i = 1; i < covariance_.size(); ++i) {
      for (double& x : covariance_[i]) x *= square;
      covariance_[i][i] += renewed * prior_;
      covariance_[i][0] = covariance_[0][i] *= gamma_;
    }
  }

  std::vector<Numbers> columns_;  // of the features, one number an arm
  double gamma_;
  double width_;
  double prior_;
  double trend_;
  double own_prior_;
  Numbers shared_prior_;
  Numbers level_;  // the first reward, and what all arms have gained since
  Numbers noise_;  // sum of squared surprises, and their weight
  Numbers offset_;
  Numbers shared_;  // variance of what an arm shares with others, and of what is its own
  Numbers own_;
  std::vector<Numbers> covariance_;  // of the level and the features' weights
};

}  // namespace optima_fast
