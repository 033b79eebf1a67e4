"""How much the loss of each layer weighs: one number for all, or numbers by module and layer."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

# of a module: one number for its layers, one a layer, or {"last": x} for its last layer alone
Weight = float | Sequence[float] | Mapping[str, float]
Weights = float | Mapping[str, Weight]

CROSS = "cross"  # what the cross-attention of the last module, the decoder, is called
LAST = "last"

ByLayer = dict[str, tuple[float, ...]]


def by_layer(
    option: str, given: Any, counts: Mapping[str, int | None], *, cross: bool = False
) -> float | ByLayer:
    """The weights as they are used: a number for all layers, or one a layer of each module.

    Args:
        option: what messages call them.
        given: a number, or by module what :data:`Weight` says; every module must be named.
        counts: layers of each module; None where they are not known yet, and not checked.
        cross: whether ``"cross"`` may be named too. Default of it: the last module's weights.

    Raises:
        ValueError: a module that is not matched or not named, a number that is negative or not
            finite, another number of layers.

    Example:
        >>> by_layer("hidden_weight", {"a": 0.1, "b": {"last": 1.0}}, {"a": 1, "b": 2})
        {'a': (0.1,), 'b': (0.0, 1.0)}
    """
    if not isinstance(given, Mapping):
        return _number(option, given)
    known = (*counts, CROSS) if cross else tuple(counts)
    for name in given:
        if name not in known:
            hint = "; set cross_attention=True to compare it" if name == CROSS else ""
            raise ValueError(f"{option} must name {', '.join(known)}, got {name!r}{hint}")
    missing = [name for name in counts if name not in given]
    if missing:
        raise ValueError(
            f"{option} must name every module that is matched, got none for {missing[0]!r}: 0 "
            "leaves its losses out"
        )
    last = list(counts)[-1]
    return {
        name: _layers(f"{option}[{name!r}]", weight, counts[last if name == CROSS else name])
        for name, weight in given.items()
    }


def _layers(what: str, weight: Any, count: int | None) -> tuple[float, ...]:
    if isinstance(weight, Mapping):
        if list(weight) != [LAST]:
            raise ValueError(
                f"{what} must be a number, one a layer, or {{'last': a number}}, got {dict(weight)}"
            )
        own = _number(f"{what}['last']", weight[LAST])
        return (*[0.0] * ((count or 1) - 1), own)
    if isinstance(weight, Sequence) and not isinstance(weight, str):
        each = tuple(_number(what, x) for x in weight)
        if count is not None and len(each) != count:
            raise ValueError(
                f"{what} must be a number or one for each of {count} layers, got {len(each)}: "
                f"{list(each)}"
            )
        return each
    return (_number(what, weight),) * (count or 1)


def _number(what: str, value: Any) -> float:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0.0 <= value < math.inf:
        raise ValueError(f"{what} must be finite and not negative, got {value!r}")
    return float(value)
