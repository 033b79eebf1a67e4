// optima_fast._bandit: the arithmetic of the bandit policies. optima_fast/_bandit_py.py is the same
// in Python, step by step and bit by bit; optima_fast/bandit.py names policies and checks settings.
//
// Every draw is a function of (seed, round, arm): a counter-based generator and an inverse normal
// CDF that uses only operations IEEE 754 rounds exactly (+ - * / sqrt, frexp). The distributions of
// <random> and the logarithm of libm differ between platforms, so neither is used.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

static_assert(std::numeric_limits<double>::is_iec559 && FLT_EVAL_METHOD == 0,
              "draws repeat across platforms only where a double operation rounds to a double");

using Counter = std::array<std::uint32_t, 4>;
using Key = std::array<std::uint32_t, 2>;

constexpr std::uint32_t low(std::uint64_t x) { return static_cast<std::uint32_t>(x); }
constexpr std::uint32_t high(std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); }

// Philox4x32-10. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
Counter philox4x32(Counter c, Key k) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57} * c[2];
    c = {high(p1) ^ c[1] ^ k[0], low(p1), high(p0) ^ c[3] ^ k[1], low(p0)};
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  return c;
}

// What a draw is for: the last word of the counter, so that no two uses share a draw.
constexpr std::uint32_t kShuffle = 0;
constexpr std::uint32_t kNormal = 1;

// An odd multiple of 2^-53: never 0 or 1, and 1 - u is exact.
double uniform(std::uint64_t seed, std::uint64_t index, std::uint32_t lane, std::uint32_t stream) {
  const Counter x = philox4x32({low(index), high(index), lane, stream}, {low(seed), high(seed)});
  const std::uint64_t bits = (std::uint64_t{x[1]} << 32 | x[0]) >> 12;
  return static_cast<double>(2 * bits + 1) * 0x1p-53;
}

template <std::size_t N>
double horner(const std::array<double, N>& coefficients, double x) {
  double sum = coefficients[0];
  for (std::size_t i = 1; i < N; ++i) sum = sum * x + coefficients[i];
  return sum;
}

// log x = e log 2 + 2 atanh((m - 1) / (m + 1)), x = m 2^e with sqrt(1/2) <= m < sqrt(2).
double logarithm(double x) {
  constexpr double kLn2High = 0x1.62e42feep-1;  // its last 20 bits are 0: a small multiple is exact
  constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr std::array<double, 12> kAtanh{2.0 / 23, 2.0 / 21, 2.0 / 19, 2.0 / 17,
                                                 2.0 / 15, 2.0 / 13, 2.0 / 11, 2.0 / 9,
                                                 2.0 / 7,  2.0 / 5,  2.0 / 3,  2.0};
  int exponent = 0;
  double m = std::frexp(x, &exponent);
  if (m < 0x1.6a09e667f3bcdp-1) {
    m *= 2.0;
    --exponent;
  }
  const double s = (m - 1.0) / (m + 1.0);
  return exponent * kLn2High + (exponent * kLn2Low + s * horner(kAtanh, s * s));
}

// Inverse of the normal CDF. Wichura, "Algorithm AS 241" (PPND16), Applied Statistics 37, 1988.
double normal_quantile(double p) {
  static constexpr std::array<double, 8> kCentreTop{
      2.5090809287301226727e+3, 3.3430575583588128105e+4, 6.7265770927008700853e+4,
      4.5921953931549871457e+4, 1.3731693765509461125e+4, 1.9715909503065514427e+3,
      1.3314166789178437745e+2, 3.3871328727963666080e+0};
  static constexpr std::array<double, 8> kCentreBottom{
      5.2264952788528545610e+3, 2.8729085735721942674e+4, 3.9307895800092710610e+4,
      2.1213794301586595867e+4, 5.3941960214247511077e+3, 6.8718700749205790830e+2,
      4.2313330701600911252e+1, 1.0};
  static constexpr std::array<double, 8> kTailTop{
      7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1,
      1.27045825245236838258e+0, 3.64784832476320460504e+0, 5.76949722146069140550e+0,
      4.63033784615654529590e+0, 1.42343711074968357734e+0};
  static constexpr std::array<double, 8> kTailBottom{
      1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2,
      1.48103976427480074590e-1, 6.89767334985100004550e-1, 1.67638483018380384940e+0,
      2.05319162663775882187e+0, 1.0};
  static constexpr std::array<double, 8> kFarTop{
      2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3,
      2.65321895265761230930e-2, 2.96560571828504891230e-1, 1.78482653991729133580e+0,
      5.46378491116411436990e+0, 6.65790464350110377720e+0};
  static constexpr std::array<double, 8> kFarBottom{
      2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5,
      7.86869131145613259100e-4,  1.48753612908506148525e-2, 1.36929880922735805310e-1,
      5.99832206555887937690e-1,  1.0};
  const double q = p - 0.5;
  if (std::fabs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return q * horner(kCentreTop, r) / horner(kCentreBottom, r);
  }
  const double r = std::sqrt(-logarithm(q < 0.0 ? p : 1.0 - p));
  const double z = r <= 5.0 ? horner(kTailTop, r - 1.6) / horner(kTailBottom, r - 1.6)
                            : horner(kFarTop, r - 5.0) / horner(kFarBottom, r - 5.0);
  return q < 0.0 ? -z : z;
}

std::string shown(py::handle value) { return std::string(py::repr(value)); }

std::size_t arm_of(py::handle value, std::size_t arms) {
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

double reward_of(py::handle value) {
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

class GaussianThompson {
 public:
  GaussianThompson(std::uint32_t arms, double gamma, std::uint32_t init_rounds,
                   double variance_scale, std::uint64_t seed)
      : gamma_(gamma),
        variance_scale_(variance_scale),
        seed_(seed),
        count_(arms),
        total_(arms),
        mean_(arms),
        order_(std::size_t{arms} * init_rounds) {
    if (arms == 0) throw std::invalid_argument("arms must be at least 1, got 0");
    for (std::size_t i = 0; i < order_.size(); ++i) order_[i] = low(i % arms);
    for (std::size_t i = order_.size(); i-- > 1;) {
      const double u = uniform(seed_, i, 0, kShuffle);
      std::swap(order_[i], order_[static_cast<std::size_t>(u * static_cast<double>(i + 1))]);
    }
  }

  std::size_t select() const {
    if (round_ < order_.size()) return order_[round_];
    std::size_t best = 0;
    double highest = -std::numeric_limits<double>::infinity();
    for (std::size_t k = 0; k < mean_.size(); ++k) {
      const double spread = std::sqrt(variance_scale_ / static_cast<double>(count_[k] + 1));
      const double draw =
          mean_[k] + spread * normal_quantile(uniform(seed_, round_, low(k), kNormal));
      if (draw > highest) {
        best = k;
        highest = draw;
      }
    }
    return best;
  }

  void update(py::handle arm, py::handle reward) {
    const std::size_t k = arm_of(arm, mean_.size());
    const double r = reward_of(reward);
    if (round_ < order_.size()) {
      const double total = total_[k] + r;
      if (!std::isfinite(total))
        throw std::invalid_argument("rewards of arm " + std::to_string(k) +
                                    " must have a finite sum, got " + shown(reward) + " more");
      total_[k] = total;
      mean_[k] = total / static_cast<double>(count_[k] + 1);
    } else {
      mean_[k] = gamma_ * mean_[k] + (1.0 - gamma_) * r;
    }
    ++count_[k];
    ++round_;
  }

  std::uint64_t round() const { return round_; }
  const std::vector<std::uint64_t>& count() const { return count_; }
  const std::vector<double>& mean() const { return mean_; }

  py::dict state() const {
    return py::dict("round"_a = round_, "count"_a = count_, "total"_a = total_, "mean"_a = mean_);
  }

  void restore(const py::dict& state) {
    auto round = state["round"].cast<std::uint64_t>();
    auto count = state["count"].cast<std::vector<std::uint64_t>>();
    auto total = state["total"].cast<std::vector<double>>();
    auto mean = state["mean"].cast<std::vector<double>>();
    if (count.size() != mean_.size() || total.size() != mean_.size() ||
        mean.size() != mean_.size())
      throw std::invalid_argument("a state of " + std::to_string(mean_.size()) +
                                  " arms is needed");
    round_ = round;
    count_ = std::move(count);
    total_ = std::move(total);
    mean_ = std::move(mean);
  }

 private:
  double gamma_;
  double variance_scale_;
  std::uint64_t seed_;
  std::uint64_t round_ = 0;
  std::vector<std::uint64_t> count_;
  std::vector<double> total_;  // of the initialisation's rewards
  std::vector<double> mean_;
  std::vector<std::uint32_t> order_;  // the arm of each round of the initialisation
};

}  // namespace

PYBIND11_MODULE(_bandit, m) {
  m.doc() = "C++ implementation of the policies of optima_fast.bandit.";
  m.attr("ABI") = 1;  // bandit.py refuses a stale build of another number
  m.def("philox4x32", &philox4x32, "counter"_a, "key"_a, "Philox4x32-10 block.");
  m.def("uniform", &uniform, "seed"_a, "index"_a, "lane"_a, "stream"_a,
        "Odd multiple of 2**-53 in (0, 1).");
  m.def("normal_quantile", &normal_quantile, "p"_a, "Inverse of the normal CDF, 0 < p < 1.");
  py::class_<GaussianThompson>(m, "GaussianThompson", "Core of optima_fast.bandit.GaussianThompson.")
      .def(py::init<std::uint32_t, double, std::uint32_t, double, std::uint64_t>(), "arms"_a,
           "gamma"_a, "init_rounds"_a, "variance_scale"_a, "seed"_a)
      .def("select", &GaussianThompson::select, "Index of the arm to pull next.")
      .def("update", &GaussianThompson::update, "arm"_a, "reward"_a,
           "Record a finite reward of an arm.")
      .def("state", &GaussianThompson::state, "Everything update changes.")
      .def("restore", &GaussianThompson::restore, "state"_a, "Take over a checked state.")
      .def_property_readonly("round", &GaussianThompson::round)
      .def_property_readonly("count", &GaussianThompson::count)
      .def_property_readonly("mean", &GaussianThompson::mean);
}
