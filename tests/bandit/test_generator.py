"""The generator and the normal quantile, in C++ and in Python."""

import hashlib
import math
import statistics
import struct

import numpy as np
import pytest
from scipy import special, stats

from optima_fast.bandit import core, generator

BACKENDS = [generator] if core.extension is None else [generator, core.extension]

# kat_vectors of Random123: counter, key, expected
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.fixture(params=BACKENDS, ids=lambda m: m.__name__.rpartition(".")[2])
def backend(request):
    return request.param


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(backend, counter, key, expected):
    assert backend.philox4x32(words(counter), words(key)) == words(expected)


def test_uniform_reads_the_block_of_its_counter(backend):
    seed, index, lane, stream = 0x0123456789ABCDEF, 0xFEDCBA9876543210, 5, 2
    block = backend.philox4x32([0x76543210, 0xFEDCBA98, 5, 2], [0x89ABCDEF, 0x01234567])
    top52 = (block[1] * 2**32 + block[0]) // 2**12
    assert backend.uniform(seed, index, lane, stream) == (2 * top52 + 1) / 2**53


def test_uniform_is_uniform_and_open(backend):
    u = np.array([backend.uniform(1, i, 0, 0) for i in range(5000)])
    assert 0 < u.min() < u.max() < 1
    assert np.all(u * 2**53 % 2 == 1)
    assert stats.kstest(u, "uniform").pvalue > 1e-3


def test_neighbouring_draws_do_not_correlate(backend):
    """Along the round, the arm, the stream and the seed."""
    base = [backend.uniform(s, i, a, t) for s in (0, 1) for i in range(999) for a, t in [(0, 1)]]
    for shift in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        moved = [
            backend.uniform(s + shift[0], i + shift[1], shift[2], 1 + shift[3])
            for s in (0, 1)
            for i in range(999)
        ]
        assert abs(np.corrcoef(base, moved)[0, 1]) < 4 / math.sqrt(len(base))


def test_normals_are_normal(backend):
    z = np.array([backend.normal_quantile(backend.uniform(7, i, 3, 1)) for i in range(5000)])
    n = len(z)
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(stats.skew(z)) < 4 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(z)) < 4 * math.sqrt(24 / n)
    assert stats.kstest(z, "norm").pvalue > 1e-3


def grid():
    """Centre, both tails to the last uniform there is, and both sides of each switch of branch."""
    edges = [0.075, 0.925, math.exp(-25)]
    return np.concatenate(
        [
            np.linspace(0.001, 0.999, 1997),
            2.0 ** -np.arange(1, 54),
            1 - 2.0 ** -np.arange(2, 54),
            [x * (1 + k * 2.0**-50) for x in edges for k in (-1, 0, 1)],
        ]
    )


def test_quantile_agrees_with_scipy_and_the_standard_library(backend):
    p = grid()
    z = np.array([backend.normal_quantile(x) for x in p])
    standard = np.array([statistics.NormalDist().inv_cdf(x) for x in p])
    np.testing.assert_allclose(z, special.ndtri(p), rtol=5e-15, atol=1e-15)
    np.testing.assert_allclose(z, standard, rtol=2e-15, atol=0)


def test_quantile_is_odd(backend):
    for p in grid():
        if 1 - (1 - p) == p:
            assert backend.normal_quantile(1 - p) == -backend.normal_quantile(p)


def test_normals_are_pinned_to_the_last_bit(backend):
    """The same on every platform and compiler; a change here changes every seeded run."""
    p = [backend.uniform(0, i, 0, 1) for i in range(5000)] + [2.0**-k for k in range(1, 54)]
    z = [backend.normal_quantile(x) for x in p]
    assert z[0].hex() == "-0x1.6fec35904fda6p+0"
    assert hashlib.sha256(struct.pack(f"<{len(z)}d", *z)).hexdigest()[:16] == "5c667f8cf26730a0"


@pytest.mark.skipif(core.extension is None, reason="the extension is not built")
def test_cpp_and_python_agree_bit_for_bit():
    cpp, at = core.extension, [(2**64 - 1, 2**30 * i, i % 7, i % 3) for i in range(5000)]
    p = [*grid(), *(generator.uniform(*x) for x in at)]
    assert [cpp.normal_quantile(x) for x in p] == [generator.normal_quantile(x) for x in p]
    assert p[-5000:] == [cpp.uniform(*x) for x in at]
    x = [*p, *(1 / u for u in p), 2.0**-1074, 1.7e308]
    assert [cpp.logarithm(v) for v in x] == [generator.logarithm(v) for v in x]


def test_the_logarithm_is_the_logarithm(backend):
    x = np.concatenate([grid(), 1 / grid(), [2.0**-1074, 1.7e308]])
    found = [backend.logarithm(v) for v in x]
    np.testing.assert_allclose(found, np.log(x), rtol=1e-15, atol=1e-16)
