from collections.abc import Sequence
from typing import Any

ABI: int

def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def uniform(seed: int, index: int, lane: int, stream: int) -> float: ...
def logarithm(x: float) -> float: ...
def exponential(x: float) -> float: ...
def normal_quantile(p: float) -> float: ...

class Core:
    @property
    def round(self) -> int: ...
    @property
    def count(self) -> list[int]: ...
    @property
    def mean(self) -> list[float]: ...
    @property
    def spread(self) -> list[float]: ...
    @property
    def warm_up(self) -> int: ...
    def select(self) -> int: ...
    def update(self, arm: object, reward: object) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...

class GaussianThompson(Core):
    def __init__(
        self, arms: int, gamma: float, init_rounds: int, variance_scale: float, seed: int
    ) -> None: ...

class Random(Core):
    def __init__(self, arms: int, seed: int) -> None: ...

class Fixed(Core):
    def __init__(self, arms: int, arm: int) -> None: ...

class RoundRobin(Core):
    def __init__(self, arms: int) -> None: ...

class Exp3S(Core):
    def __init__(self, arms: int, mix: float, share: float, seed: int) -> None: ...

class ScaleFreeThompson(Core):
    def __init__(
        self,
        arms: int,
        gamma: float,
        width: float,
        prior: float,
        trend: float,
        passes: int,
        warm_up: int,
        seed: int,
    ) -> None: ...

class ScaleFreeUcb(Core):
    def __init__(
        self,
        arms: int,
        gamma: float,
        width: float,
        prior: float,
        trend: float,
        passes: int,
        warm_up: int,
        seed: int,
    ) -> None: ...

class SlidingWindowUcb(Core):
    def __init__(
        self,
        arms: int,
        window: int,
        width: float,
        prior: float,
        passes: int,
        warm_up: int,
        seed: int,
    ) -> None: ...

class EpsilonGreedy(Core):
    def __init__(
        self,
        arms: int,
        epsilon: float,
        gamma: float,
        prior: float,
        trend: float,
        passes: int,
        warm_up: int,
        seed: int,
    ) -> None: ...

class DiscountBank(Core):
    def __init__(
        self,
        arms: int,
        gammas: Sequence[float],
        width: float,
        prior: float,
        trend: float,
        forget: float,
        passes: int,
        warm_up: int,
        seed: int,
    ) -> None: ...

class StructuredUcb(Core):
    def __init__(
        self,
        features: Sequence[Sequence[float]],
        gamma: float,
        width: float,
        prior: float,
        trend: float,
        passes: int,
        warm_up: int,
        seed: int,
    ) -> None: ...
