"""Twin of ``csrc/`` in Python, file by file: the same operations on doubles in the same order.

It runs where the extension was not built and, in the tests, beside it: arms, means, spreads and
states are equal bit for bit. Formulas are in the docstrings of ``bandit``'s policies.
"""

from optima_fast.bandit._cores.averaging import Fixed, GaussianThompson, Random, RoundRobin
from optima_fast.bandit._cores.core import Core, argmax, finite
from optima_fast.bandit._cores.scale_free import (
    DiscountBank,
    EpsilonGreedy,
    Exp3S,
    ScaleFreeThompson,
    ScaleFreeUcb,
    SlidingWindowUcb,
)
from optima_fast.bandit._cores.structured import StructuredUcb

__all__ = [
    "Core",
    "DiscountBank",
    "EpsilonGreedy",
    "Exp3S",
    "Fixed",
    "GaussianThompson",
    "Random",
    "RoundRobin",
    "ScaleFreeThompson",
    "ScaleFreeUcb",
    "SlidingWindowUcb",
    "StructuredUcb",
    "argmax",
    "finite",
]
