// Policies that keep plain averages: the paper's, and its baselines.

#pragma once

#include "core.h"

namespace optima_fast {

class Averages : public Core {
 public:
  Numbers mean() const override { return mean_; }

 protected:
  Averages(std::size_t arms, std::uint64_t seed, std::size_t passes = 0, std::size_t warm_up = 0)
      : Core(arms, seed, passes, warm_up), total_(arms), mean_(arms) {
    keep("total", total_);
    keep("mean", mean_);
  }

  void learn(std::size_t k, double reward) override {
    const double total = total_[k] + reward;
    if (!std::isfinite(total))
      throw std::invalid_argument("rewards of arm " + std::to_string(k) +
                                  " must have a finite sum, got " + shown(py::float_(reward)) +
                                  " more");
    total_[k] = total;
    mean_[k] = total / static_cast<double>(count(k) + 1);
  }

  Numbers total_;
  Numbers mean_;
};

class Random : public Averages {
 public:
  Random(std::size_t arms, std::uint64_t seed) : Averages(arms, seed) {}

 protected:
  std::size_t choose() const override { return any_arm(0); }
};

class Fixed : public Averages {
 public:
  Fixed(std::size_t arms, std::size_t arm) : Averages(arms, 0), arm_(arm) {}

 protected:
  std::size_t choose() const override { return arm_; }

 private:
  std::size_t arm_;
};

class RoundRobin : public Averages {
 public:
  explicit RoundRobin(std::size_t arms) : Averages(arms, 0) {}

 protected:
  std::size_t choose() const override { return static_cast<std::size_t>(round() % arms()); }
};

// The paper's. `total` sums the rewards of the initialisation.
class GaussianThompson : public Averages {
 public:
  GaussianThompson(std::size_t arms, double gamma, std::size_t init_rounds, double variance_scale,
                   std::uint64_t seed)
      : Averages(arms, seed, init_rounds, arms * init_rounds),
        gamma_(gamma),
        variance_scale_(variance_scale) {}

  Numbers spread() const override {
    Numbers spreads(arms());
    for (std::size_t k = 0; k < arms(); ++k) spreads[k] = spread_of(k);
    return spreads;
  }

 protected:
  std::size_t choose() const override {
    return argmax(arms(), [&](std::size_t k) { return mean_[k] + spread_of(k) * draw(k); });
  }

  void learn(std::size_t k, double reward) override {
    if (round() < warm_up())
      Averages::learn(k, reward);
    else
      mean_[k] = gamma_ * mean_[k] + (1.0 - gamma_) * reward;
  }

 private:
  double spread_of(std::size_t k) const {
    return std::sqrt(variance_scale_ / static_cast<double>(count(k) + 1));
  }

  double gamma_;
  double variance_scale_;
};

}  // namespace optima_fast
