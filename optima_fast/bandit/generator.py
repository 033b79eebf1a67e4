"""Random numbers of the policies: twin of ``csrc/generator.h``, equal bit for bit.

Only operations that IEEE 754 rounds exactly are used (+ - * / sqrt, frexp, ldexp, floor), so a draw
is the same on every platform and compiler.
"""

import math
from collections.abc import Sequence

SHUFFLE, NORMAL, CHOICE = range(3)  # what a draw is for: the last word of the counter

_LOG2_HIGH = float.fromhex("0x1.62e42feep-1")  # its last 20 bits are 0: a small multiple is exact
_LOG2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
_ATANH = tuple(2.0 / k for k in range(23, 0, -2))

_CENTRE_TOP = (
    2.5090809287301226727e3,
    3.3430575583588128105e4,
    6.7265770927008700853e4,
    4.5921953931549871457e4,
    1.3731693765509461125e4,
    1.9715909503065514427e3,
    1.3314166789178437745e2,
    3.3871328727963666080e0,
)
_CENTRE_BOTTOM = (
    5.2264952788528545610e3,
    2.8729085735721942674e4,
    3.9307895800092710610e4,
    2.1213794301586595867e4,
    5.3941960214247511077e3,
    6.8718700749205790830e2,
    4.2313330701600911252e1,
    1.0,
)
_TAIL_TOP = (
    7.74545014278341407640e-4,
    2.27238449892691845833e-2,
    2.41780725177450611770e-1,
    1.27045825245236838258e0,
    3.64784832476320460504e0,
    5.76949722146069140550e0,
    4.63033784615654529590e0,
    1.42343711074968357734e0,
)
_TAIL_BOTTOM = (
    1.05075007164441684324e-9,
    5.47593808499534494600e-4,
    1.51986665636164571966e-2,
    1.48103976427480074590e-1,
    6.89767334985100004550e-1,
    1.67638483018380384940e0,
    2.05319162663775882187e0,
    1.0,
)
_FAR_TOP = (
    2.01033439929228813265e-7,
    2.71155556874348757815e-5,
    1.24266094738807843860e-3,
    2.65321895265761230930e-2,
    2.96560571828504891230e-1,
    1.78482653991729133580e0,
    5.46378491116411436990e0,
    6.65790464350110377720e0,
)
_FAR_BOTTOM = (
    2.04426310338993978564e-15,
    1.42151175831644588870e-7,
    1.84631831751005468180e-5,
    7.86869131145613259100e-4,
    1.48753612908506148525e-2,
    1.36929880922735805310e-1,
    5.99832206555887937690e-1,
    1.0,
)


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10: 4 random words of 32 bits from 4 of counter and 2 of key.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0 = 0xD2511F53 * c0
        p1 = 0xCD9E8D57 * c2
        c0, c1 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF
        c2, c3 = (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def uniform(seed: int, index: int, lane: int, stream: int) -> float:
    """Odd multiple of 2**-53 in (0, 1): never 0 or 1, and ``1 - u`` is exact."""
    counter = index & 0xFFFFFFFF, index >> 32, lane, stream
    x = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return math.ldexp(2 * ((x[1] << 32 | x[0]) >> 12) + 1, -53)


def _horner(coefficients: Sequence[float], x: float) -> float:
    total = coefficients[0]
    for c in coefficients[1:]:
        total = total * x + c
    return total


def logarithm(x: float) -> float:
    """log x = e log 2 + 2 atanh((m - 1) / (m + 1)), x = m 2^e with sqrt(1/2) <= m < sqrt(2)."""
    m, exponent = math.frexp(x)
    if m < _SQRT_HALF:
        m *= 2.0
        exponent -= 1
    s = (m - 1.0) / (m + 1.0)
    return exponent * _LOG2_HIGH + (exponent * _LOG2_LOW + s * _horner(_ATANH, s * s))


def normal_quantile(p: float) -> float:
    """Inverse of the normal CDF, 0 < p < 1.

    Source: Wichura, "Algorithm AS 241" (PPND16), Applied Statistics 37, 1988.
    """
    q = p - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        return q * _horner(_CENTRE_TOP, r) / _horner(_CENTRE_BOTTOM, r)
    r = math.sqrt(-logarithm(p if q < 0.0 else 1.0 - p))
    if r <= 5.0:
        z = _horner(_TAIL_TOP, r - 1.6) / _horner(_TAIL_BOTTOM, r - 1.6)
    else:
        z = _horner(_FAR_TOP, r - 5.0) / _horner(_FAR_BOTTOM, r - 5.0)
    return -z if q < 0.0 else z
