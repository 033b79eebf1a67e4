// Thompson sampling with a Gaussian posterior, the paper's. thompson.py is the same in Python.

#pragma once

#include "core.h"

namespace optima_fast {

// `total` sums the rewards of the initialisation, which lasts as long as the warm-up.
class ThompsonCore : public Core {
 public:
  ThompsonCore(std::size_t arms, double gamma, std::size_t init_rounds, double variance_scale,
               std::uint64_t seed)
      : Core(arms, seed, init_rounds, arms * init_rounds),
        gamma_(gamma),
        variance_scale_(variance_scale),
        total_(arms),
        mean_(arms) {
    keep("total", total_);
    keep("mean", mean_);
  }

  Numbers mean() const override { return mean_; }
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
    if (round() >= warm_up()) {
      mean_[k] = gamma_ * mean_[k] + (1.0 - gamma_) * reward;
      return;
    }
    const double total = total_[k] + reward;
    if (!std::isfinite(total))
      throw std::invalid_argument("rewards of arm " + std::to_string(k) +
                                  " must have a finite sum, got " + shown(py::float_(reward)) +
                                  " more");
    total_[k] = total;
    mean_[k] = total / static_cast<double>(count(k) + 1);
  }

 private:
  double spread_of(std::size_t k) const {
    return std::sqrt(variance_scale_ / static_cast<double>(count(k) + 1));
  }

  double gamma_;
  double variance_scale_;
  Numbers total_;
  Numbers mean_;
};

}  // namespace optima_fast
