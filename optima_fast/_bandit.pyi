from collections.abc import Sequence
from typing import Any

ABI: int

def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def uniform(seed: int, index: int, lane: int, stream: int) -> float: ...
def logarithm(x: float) -> float: ...
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

class ThompsonCore(Core):
    def __init__(
        self, arms: int, gamma: float, init_rounds: int, variance_scale: float, seed: int
    ) -> None: ...

class ScaleFreeUcbCore(Core):
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

class StructuredUcbCore(Core):
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
