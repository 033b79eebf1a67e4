// Policies whose choices stay when all rewards are multiplied by, or shifted by, a constant.

#pragma once

#include <algorithm>

#include "core.h"

namespace optima_fast {

// Of all arms: weight, mean, and variance within the arms.
struct Summary {
  double weight;
  double mean;
  double variance;
};

// Weight, mean and sum of squared deviations of each arm's rewards, the old ones fading. Rewards
// count less the sum of `level`: the first one, and what all arms have gained since.
struct Discounted {
  static constexpr double kForgotten = 0x1p-100;  // an arm's weight below this is 0

  Discounted(std::size_t arms, double discount, double beta)
      : gamma(discount), trend(beta), level(2), weight(arms), mean(arms), square(arms) {}

  // Apart, so that a shift of all rewards shifts the first number alone.
  double away(double x) const { return (x - level[0]) - level[1]; }

  void learn(std::size_t k, double x, bool first) {
    if (first) level[0] = x;
    const double y = away(x);
    fade();
    add(k, y);
    level[1] += trend * (y - mean[k]);
  }

  void fade() {
    for (std::size_t k = 0; k < weight.size(); ++k) {
      weight[k] *= gamma;
      square[k] *= gamma;
      if (weight[k] < kForgotten) weight[k] = mean[k] = square[k] = 0.0;
    }
  }

  void add(std::size_t k, double x) {
    const double n = weight[k];
    const double deviation = x - mean[k];
    weight[k] = n + 1.0;
    mean[k] += deviation / (n + 1.0);
    square[k] += deviation * deviation * (n / (n + 1.0));
  }

  void rescale(int shift) {
    for (Numbers* values : {&level, &mean})
      for (double& x : *values) x = std::ldexp(x, shift);
    for (double& x : square) x = std::ldexp(x, 2 * shift);
  }

  void clear() {
    for (Numbers* values : {&level, &weight, &mean, &square})
      std::fill(values->begin(), values->end(), 0.0);
  }

  Summary summary() const {
    double n = 0.0;
    double total = 0.0;
    double squares = 0.0;
    double once = 0.0;
    for (std::size_t k = 0; k < weight.size(); ++k) {
      n += weight[k];
      total += weight[k] * mean[k];
      squares += square[k];
      once += std::min(weight[k], 1.0);
    }
    return {n, n > 0.0 ? total / n : 0.0, squares / std::max(1.0, n - once)};
  }

  // Estimate of an arm, from the mean of all, which is worth `prior` pulls.
  double offset(std::size_t k, double centre, double prior) const {
    return weight[k] * (mean[k] - centre) / (weight[k] + prior);
  }
  double unshifted(double y) const { return level[0] + (level[1] + y); }

  double gamma;
  double trend;
  Numbers level;
  Numbers weight;
  Numbers mean;
  Numbers square;
};

// Discounted statistics, means drawn towards that of all arms, and a radius around them.
class ScaleFree : public Scaled {
 protected:
  ScaleFree(std::size_t arms, double gamma, double width, double prior, double trend,
            std::size_t passes, std::size_t warm_up, std::uint64_t seed)
      : Scaled(arms, seed, passes, warm_up),
        stats_(arms, gamma, trend),
        width_(width),
        prior_(prior) {}

  void keep_statistics() {
    keep("level", stats_.level);
    keep("weight", stats_.weight);
    keep("average", stats_.mean);
    keep("square", stats_.square);
  }

  // Square of the radius of an arm with a weight of one, without the width.
  virtual double variance(const Summary& summary) const { return summary.variance; }

  double offset(std::size_t k, const Summary& summary) const {
    return stats_.offset(k, summary.mean, prior_);
  }
  double radius(std::size_t k, double variance) const {
    return width_ * std::sqrt(variance / (stats_.weight[k] + prior_));
  }

  Numbers means() const override {
    const Summary summary = stats_.summary();
    Numbers values(arms());
    for (std::size_t k = 0; k < arms(); ++k)
      values[k] = stats_.unshifted(summary.mean + offset(k, summary));
    return values;
  }
  Numbers spreads() const override {
    const double square = variance(stats_.summary());
    Numbers values(arms());
    for (std::size_t k = 0; k < arms(); ++k) values[k] = radius(k, square);
    return values;
  }
  void rescale(int shift) override { stats_.rescale(shift); }
  void learn_scaled(std::size_t k, double x) override { stats_.learn(k, x, round() == 0); }

  Discounted stats_;
  double width_;
  double prior_;
};

class ScaleFreeThompson : public ScaleFree {
 public:
  ScaleFreeThompson(std::size_t arms, double gamma, double width, double prior, double trend,
                    std::size_t passes, std::size_t warm_up, std::uint64_t seed)
      : ScaleFree(arms, gamma, width, prior, trend, passes, warm_up, seed) {
    keep_statistics();
  }

 protected:
  std::size_t choose() const override {
    const Summary summary = stats_.summary();
    return argmax(arms(), [&](std::size_t k) {
      return offset(k, summary) + radius(k, summary.variance) * draw(k);
    });
  }
};

class BoundedUcb : public ScaleFree {
 protected:
  using ScaleFree::ScaleFree;

  double variance(const Summary& summary) const override {
    return summary.variance * (2.0 * logarithm(std::max(1.0, summary.weight)));
  }
  std::size_t choose() const override {
    const Summary summary = stats_.summary();
    const double square = variance(summary);
    return argmax(arms(),
                  [&](std::size_t k) { return offset(k, summary) + radius(k, square); });
  }
};

class ScaleFreeUcb : public BoundedUcb {
 public:
  ScaleFreeUcb(std::size_t arms, double gamma, double width, double prior, double trend,
               std::size_t passes, std::size_t warm_up, std::uint64_t seed)
      : BoundedUcb(arms, gamma, width, prior, trend, passes, warm_up, seed) {
    keep_statistics();
  }
};

// The statistics are summed anew in every round: taking out the oldest reward would leave its
// rounding behind.
class SlidingWindowUcb : public BoundedUcb {
 public:
  SlidingWindowUcb(std::size_t arms, std::size_t window, double width, double prior,
                   std::size_t passes, std::size_t warm_up, std::uint64_t seed)
      : BoundedUcb(arms, 1.0, width, prior, 0.0, passes, warm_up, seed),
        pulled_(window),
        reward_(window) {
    keep("pulled", pulled_);
    keep("reward", reward_);
  }

 protected:
  void rescale(int shift) override {
    for (double& x : reward_) x = std::ldexp(x, shift);
  }
  void learn_scaled(std::size_t k, double x) override {
    const auto slot = static_cast<std::size_t>(round() % reward_.size());
    pulled_[slot] = k;
    reward_[slot] = x;
    gather(round() + 1);
  }
  void restored() override { gather(round()); }

 private:
  void gather(std::uint64_t rounds) {
    const std::size_t filled = rounds < reward_.size() ? low(rounds) : reward_.size();
    stats_.clear();
    stats_.level[0] = reward_[0];  // any of them: sums of differences hardly cancel
    for (std::size_t i = 0; i < filled; ++i) {
      if (pulled_[i] >= arms()) throw std::out_of_range("state must have arms in pulled");
      const double x = stats_.away(reward_[i]);
      stats_.weight[pulled_[i]] += 1.0;
      stats_.mean[pulled_[i]] += x;
      stats_.square[pulled_[i]] += x * x;
    }
    for (std::size_t k = 0; k < arms(); ++k) {
      if (stats_.weight[k] == 0.0) continue;
      const double mean = stats_.mean[k] / stats_.weight[k];
      stats_.square[k] = std::max(0.0, stats_.square[k] - stats_.mean[k] * mean);
      stats_.mean[k] = mean;
    }
  }

  std::vector<std::uint64_t> pulled_;
  Numbers reward_;
};

class EpsilonGreedy : public ScaleFree {
 public:
  EpsilonGreedy(std::size_t arms, double epsilon, double gamma, double prior, double trend,
                std::size_t passes, std::size_t warm_up, std::uint64_t seed)
      : ScaleFree(arms, gamma, 0.0, prior, trend, passes, warm_up, seed), epsilon_(epsilon) {
    keep_statistics();
  }

 protected:
  std::size_t choose() const override {
    if (choice(0) < epsilon_) return any_arm(1);
    const Summary summary = stats_.summary();
    return argmax(arms(), [&](std::size_t k) { return offset(k, summary); });
  }

 private:
  double epsilon_;
};

// ScaleFreeThompson under several discounts, each believed as far as it predicts.
class DiscountBank : public Scaled {
 public:
  DiscountBank(std::size_t arms, const Numbers& gammas, double width, double prior, double trend,
               double forget, std::size_t passes, std::size_t warm_up, std::uint64_t seed)
      : Scaled(arms, seed, passes, warm_up),
        evidence_(gammas.size()),
        width_(width),
        prior_(prior),
        forget_(forget) {
    if (gammas.empty()) throw std::invalid_argument("gammas must not be empty");
    for (const double gamma : gammas) members_.emplace_back(arms, gamma, trend);
    std::vector<Numbers*> levels, weights, averages, squares;
    for (Discounted& member : members_) {
      levels.push_back(&member.level);
      weights.push_back(&member.weight);
      averages.push_back(&member.mean);
      squares.push_back(&member.square);
    }
    keep("evidence", evidence_);
    keep("level", levels);
    keep("weight", weights);
    keep("average", averages);
    keep("square", squares);
  }

 protected:
  std::size_t choose() const override {
    const Numbers belief = this->belief();
    double left = choice(0);
    std::size_t chosen = 0;
    while (chosen + 1 < belief.size() && left >= belief[chosen]) left -= belief[chosen++];
    const Discounted& member = members_[chosen];
    const Summary summary = member.summary();
    return argmax(arms(), [&](std::size_t k) {
      const double radius = width_ * std::sqrt(summary.variance / (member.weight[k] + prior_));
      return member.offset(k, summary.mean, prior_) + radius * draw(k);
    });
  }

  Numbers means() const override {
    return mixture([&](const Discounted& member, std::size_t k, const Summary& summary) {
      return member.unshifted(summary.mean + member.offset(k, summary.mean, prior_));
    });
  }

  Numbers spreads() const override {
    const Numbers centre = means();
    Numbers values =
        mixture([&](const Discounted& member, std::size_t k, const Summary& summary) {
          const double offset = member.offset(k, summary.mean, prior_);
          const double away = member.unshifted(summary.mean + offset) - centre[k];
          const double within = width_ * width_ * summary.variance / (member.weight[k] + prior_);
          return within + away * away;
        });
    for (double& x : values) x = std::sqrt(x);
    return values;
  }

  void rescale(int shift) override {
    for (Discounted& member : members_) member.rescale(shift);
  }

  void learn_scaled(std::size_t k, double x) override {
    Numbers variance(members_.size()), surprise(members_.size());
    for (std::size_t i = 0; i < members_.size(); ++i) {
      const Discounted& member = members_[i];
      const Summary summary = member.summary();
      variance[i] = summary.variance * (1.0 + 1.0 / (member.weight[k] + prior_));
      surprise[i] = member.away(x) - summary.mean - member.offset(k, summary.mean, prior_);
    }
    if (*std::min_element(variance.begin(), variance.end()) > 0.0) {
      const double widest = *std::max_element(variance.begin(), variance.end());
      for (std::size_t i = 0; i < members_.size(); ++i) {
        const double square = std::min(kSurprise, surprise[i] * surprise[i] / variance[i]);
        const double size = logarithm(std::max(kNarrow, variance[i] / widest));
        evidence_[i] = forget_ * evidence_[i] - 0.5 * (size + square);
      }
      const double highest = *std::max_element(evidence_.begin(), evidence_.end());
      for (double& e : evidence_) e -= highest;
    }
    for (Discounted& member : members_) member.learn(k, x, round() == 0);
  }

 private:
  static constexpr double kSurprise = 25.0;  // beyond 5 sigma counts as 5: no outlier decides
  static constexpr double kNarrow = 0x1p-1000;

  Numbers belief() const {
    Numbers likelihood(evidence_.size());
    double total = 0.0;
    for (std::size_t i = 0; i < evidence_.size(); ++i) {
      likelihood[i] = exponential(std::max(-700.0, evidence_[i]));
      total += likelihood[i];
    }
    for (double& p : likelihood) p /= total;
    return likelihood;
  }

  template <typename Of>
  Numbers mixture(Of of) const {
    const Numbers belief = this->belief();
    Numbers values(arms(), 0.0);
    for (std::size_t i = 0; i < members_.size(); ++i) {
      const Summary summary = members_[i].summary();
      for (std::size_t k = 0; k < arms(); ++k)
        values[k] += belief[i] * of(members_[i], k, summary);
    }
    return values;
  }

  std::vector<Discounted> members_;
  Numbers evidence_;  // log, the largest is 0
  double width_;
  double prior_;
  double forget_;
};

// Exponential weights with sharing, on rewards stretched to [0, 1].
class Exp3S : public Scaled {
 public:
  Exp3S(std::size_t arms, double mix, double share, std::uint64_t seed)
      : Scaled(arms, seed),
        mix_(mix),
        share_(share),
        weight_(arms, 1.0 / static_cast<double>(arms)),
        average_(arms),
        range_(2) {
    keep("weight", weight_);
    keep("average", average_);
    keep("range", range_);
  }

 protected:
  std::size_t choose() const override {
    double left = choice(0);
    for (std::size_t k = 0; k + 1 < arms(); ++k) {
      left -= probability(k);
      if (left < 0.0) return k;
    }
    return arms() - 1;
  }

  Numbers means() const override { return average_; }

  void rescale(int shift) override {
    for (double& x : average_) x = std::ldexp(x, shift);
    for (double& x : range_) x = std::ldexp(x, shift);
  }

  void learn_scaled(std::size_t k, double x) override {
    if (round() == 0) range_ = {x, x};
    range_ = {std::min(range_[0], x), std::max(range_[1], x)};
    const double width = range_[1] - range_[0];
    const double gain = width > 0.0 ? (x - range_[0]) / width : 0.5;
    const auto n = static_cast<double>(arms());
    average_[k] += (x - average_[k]) / static_cast<double>(count(k) + 1);
    weight_[k] *= exponential(mix_ * gain / (probability(k) * n));
    const double everyone = exponential(1.0) * share_ / n;
    double total = 0.0;
    for (double& w : weight_) {
      w += everyone;
      total += w;
    }
    for (double& w : weight_) w /= total;
  }

 private:
  double probability(std::size_t k) const {
    return (1.0 - mix_) * weight_[k] + mix_ / static_cast<double>(arms());
  }

  double mix_;
  double share_;
  Numbers weight_;  // they add up to 1
  Numbers average_;
  Numbers range_;  // least and largest reward
};

}  // namespace optima_fast
