// Random numbers of the policies. optima_fast/bandit/generator.py is the same in Python.
//
// Every draw is a function of (seed, round, arm): a counter-based generator and an inverse normal
// CDF that uses only operations IEEE 754 rounds exactly (+ - * / sqrt, frexp, ldexp, floor). The
// distributions of <random> and the logarithm of libm differ between platforms, so neither is used.

#pragma once

#include <array>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

namespace optima_fast {

static_assert(std::numeric_limits<double>::is_iec559 && FLT_EVAL_METHOD == 0,
              "draws repeat across platforms only where a double operation rounds to a double");

using Counter = std::array<std::uint32_t, 4>;
using Key = std::array<std::uint32_t, 2>;

constexpr std::uint32_t low(std::uint64_t x) { return static_cast<std::uint32_t>(x); }
constexpr std::uint32_t high(std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); }

// Philox4x32-10. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
inline Counter philox4x32(Counter c, Key k) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57} * c[2];
    c = {high(p1) ^ c[1] ^ k[0], low(p1), high(p0) ^ c[3] ^ k[1], low(p0)};
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  return c;
}

// What a draw is for: the last word of the counter, so that no two uses share a draw. Python has
// one more.
constexpr std::uint32_t kShuffle = 0;
constexpr std::uint32_t kNormal = 1;

// An odd multiple of 2^-53: never 0 or 1, and 1 - u is exact.
inline double uniform(std::uint64_t seed, std::uint64_t index, std::uint32_t lane, std::uint32_t stream) {
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

constexpr double kLn2High = 0x1.62e42feep-1;  // its last 20 bits are 0: a small multiple is exact
constexpr double kLn2Low = 0x1.a39ef35793c76p-33;

// log x = e log 2 + 2 atanh((m - 1) / (m + 1)), x = m 2^e with sqrt(1/2) <= m < sqrt(2).
inline double logarithm(double x) {
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
inline double normal_quantile(double p) {
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

}  // namespace optima_fast
