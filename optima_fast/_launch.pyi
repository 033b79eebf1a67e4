from collections.abc import Callable, Mapping, Sequence
from typing import Any

ABI: int

def configure(
    device: Callable[[], int],
    stream: Callable[[int], int],
    scratch: Callable[[int], Any],
    types: Mapping[Any, str],
) -> None: ...
def has_driver() -> bool: ...

class Launcher:
    def __init__(
        self, name: str, parameters: Sequence[tuple[str, bool, bool, bool, Any]]
    ) -> None: ...
    def __call__(
        self, grid: tuple[int, ...], args: tuple[Any, ...], named: dict[str, Any]
    ) -> bytes | None: ...
    def key(self, args: tuple[Any, ...], named: dict[str, Any]) -> bytes: ...
    def add(
        self, key: bytes, binary: bytes, entry: str, threads: int, shared: int, scratch: int
    ) -> None: ...
