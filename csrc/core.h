// What every policy is: rounds, counts, warm-up and state, around what it chooses and learns.
// optima_fast/bandit/core.py is the same in Python.

#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "generator.h"

namespace optima_fast {

namespace py = pybind11;

using Numbers = std::vector<double>;

inline std::string shown(py::handle value) { return std::string(py::repr(value)); }

inline std::size_t arm_of(py::handle value, std::size_t arms) {
  // operator.index: a float is refused, not cut to an integer
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    throw py::type_error("arm must be an integer, got " + shown(value));
  }
  int overflow = 0;
  const long long arm = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0 || static_cast<unsigned long long>(arm) >= arms)  // -1 wraps to the largest
    throw std::out_of_range("arm must be from 0 to " + std::to_string(arms - 1) + ", got " +
                            shown(value));
  return static_cast<std::size_t>(arm);
}

inline double reward_of(py::handle value) {
  double reward = PyFloat_AsDouble(value.ptr());
  if (reward == -1.0 && PyErr_Occurred()) {
    const bool type = PyErr_ExceptionMatches(PyExc_TypeError);
    if (!type && !PyErr_ExceptionMatches(PyExc_OverflowError)) throw py::error_already_set();
    PyErr_Clear();
    if (type) throw py::type_error("reward must be a number, got " + shown(value));
    reward = std::numeric_limits<double>::infinity();
  }
  if (!std::isfinite(reward))
    throw std::invalid_argument("reward must be finite, got " + shown(value));
  return reward;
}

// The first index of the largest value.
template <typename Value>
std::size_t argmax(std::size_t arms, Value value) {
  std::size_t best = 0;
  double highest = -std::numeric_limits<double>::infinity();
  for (std::size_t k = 0; k < arms; ++k) {
    const double candidate = value(k);
    if (candidate > highest) {
      best = k;
      highest = candidate;
    }
  }
  return best;
}

class Core {
 public:
  Core(const Core&) = delete;
  Core& operator=(const Core&) = delete;
  virtual ~Core() = default;

  std::size_t select() const { return round_ < order_.size() ? order_[round_] : choose(); }

  void update(py::handle arm, py::handle reward) {
    const std::size_t k = arm_of(arm, arms());
    learn(k, reward_of(reward));
    ++count_[k];
    ++round_;
  }

  std::uint64_t round() const { return round_; }
  const std::vector<std::uint64_t>& count() const { return count_; }
  std::size_t warm_up() const { return order_.size(); }
  virtual Numbers mean() const = 0;
  virtual Numbers spread() const = 0;

  py::dict state() const {
    py::dict state;
    for (const Field& field : fields_) state[field.name] = field.saved();
    return state;
  }

  void restore(const py::dict& state) {
    for (const bool commit : {false, true})  // a state that does not fit changes nothing
      for (const Field& field : fields_) field.load(state[field.name], commit);
  }

 protected:
  // The warm-up plays the first rounds of a shuffle of `passes` times all arms.
  Core(std::size_t arms, std::uint64_t seed, std::size_t passes, std::size_t warm_up)
      : seed_(seed), count_(arms), order_(arms * passes) {
    if (arms == 0) throw std::invalid_argument("arms must be at least 1, got 0");
    for (std::size_t i = 0; i < order_.size(); ++i) order_[i] = low(i % arms);
    for (std::size_t i = order_.size(); i-- > 1;) {
      const double u = uniform(seed_, i, 0, kShuffle);
      std::swap(order_[i], order_[static_cast<std::size_t>(u * static_cast<double>(i + 1))]);
    }
    if (warm_up < order_.size()) order_.resize(warm_up);
    keep("round", round_);
    keep("count", count_);
  }

  virtual std::size_t choose() const = 0;
  virtual void learn(std::size_t k, double reward) = 0;

  // Make `values`, a member, part of the state.
  template <typename Values>
  void keep(const char* name, Values& values) {
    fields_.push_back({name, [&values]() -> py::object { return py::cast(values); },
                       [&values, name](py::handle saved, bool commit) {
                         auto loaded = saved.cast<Values>();
                         check_size(name, loaded, values);
                         if (commit) values = std::move(loaded);
                       }});
  }

  void keep(const char* name, std::vector<Numbers*> rows) {
    fields_.push_back({name,
                       [rows]() -> py::object {
                         py::list saved;
                         for (const Numbers* row : rows) saved.append(py::cast(*row));
                         return saved;
                       },
                       [rows, name](py::handle saved, bool commit) {
                         auto loaded = saved.cast<std::vector<Numbers>>();
                         check_size(name, loaded, rows);
                         for (std::size_t i = 0; i < rows.size(); ++i) {
                           check_size(name, loaded[i], *rows[i]);
                           if (commit) *rows[i] = std::move(loaded[i]);
                         }
                       }});
  }

  std::size_t arms() const { return count_.size(); }
  std::uint64_t count(std::size_t k) const { return count_[k]; }
  double draw(std::size_t lane) const {
    return normal_quantile(uniform(seed_, round_, low(lane), kNormal));
  }

 private:
  struct Field {
    const char* name;
    std::function<py::object()> saved;
    std::function<void(py::handle, bool)> load;
  };

  static void check_size(const char*, std::uint64_t, std::uint64_t) {}
  template <typename Loaded, typename Mine>
  static void check_size(const char* name, const Loaded& loaded, const Mine& mine) {
    if (loaded.size() != mine.size())
      throw std::invalid_argument("state must have " + std::to_string(mine.size()) + " in " +
                                  name + ", got " + std::to_string(loaded.size()));
  }

  std::uint64_t seed_;
  std::uint64_t round_ = 0;
  std::vector<std::uint64_t> count_;
  std::vector<std::uint32_t> order_;
  std::vector<Field> fields_;
};

// Counts rewards in units of 2^(scale - 1074), above the largest so far: none over- or underflows,
// and a power of two on all of them changes the scale alone.
class Scaled : public Core {
 public:
  Numbers mean() const final { return unscaled(means()); }
  Numbers spread() const final { return unscaled(spreads()); }

 protected:
  Scaled(std::size_t arms, std::uint64_t seed, std::size_t passes, std::size_t warm_up)
      : Core(arms, seed, passes, warm_up) {
    keep("scale", scale_);
  }

  virtual Numbers means() const = 0;
  virtual Numbers spreads() const = 0;
  virtual void rescale(int shift) = 0;
  virtual void learn_scaled(std::size_t k, double x) = 0;

 private:
  static constexpr int kScaleBias = 1074;  // of the smallest double, 2^-1074: none is negative

  void learn(std::size_t k, double reward) final {
    if (reward != 0.0) {
      int exponent = 0;
      std::frexp(reward, &exponent);
      const int shift = static_cast<int>(scale_) - (exponent + kScaleBias);
      if (shift < 0) {
        rescale(shift);
        scale_ = static_cast<std::uint64_t>(exponent + kScaleBias);
      }
    }
    learn_scaled(k, std::ldexp(reward, kScaleBias - static_cast<int>(scale_)));
  }

  Numbers unscaled(Numbers values) const {
    for (double& x : values) x = std::ldexp(x, static_cast<int>(scale_) - kScaleBias);
    return values;
  }

  std::uint64_t scale_ = 0;
};

}  // namespace optima_fast
