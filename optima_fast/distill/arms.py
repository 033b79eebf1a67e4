"""Arms of the bandit: the non-empty subsets of a model's modules."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import combinations

from optima_fast.errors import UserError

Arm = tuple[str, ...]

MAX_MODULES = 12  # 4095 arms: more than any bandit could try


def arms(modules: Sequence[str]) -> list[Arm]:
    """Every non-empty subset of ``modules``.

    The order is fixed: by size, then by the position of the members, so that for
    ``["image", "text", "multimodal"]`` it is image, text, multimodal, image+text,
    image+multimodal, text+multimodal, image+text+multimodal. A bandit's arm ``i`` is
    ``arms(modules)[i]`` on every machine.

    Args:
        modules: 1 to 12 distinct names, without ``+``.

    Returns:
        ``2 ** len(modules) - 1`` tuples of names.

    Raises:
        ValueError: no name, too many, a repeated or an unusable one.

    Example:
        >>> arms(["image", "text"])
        [('image',), ('text',), ('image', 'text')]
    """
    if isinstance(modules, str):
        raise TypeError(f"modules must be a sequence of names, got the string {modules!r}")
    names = list(modules)
    if not 1 <= len(names) <= MAX_MODULES:
        raise ValueError(f"modules must hold 1 to {MAX_MODULES} names, got {len(names)}")
    for name in names:
        if not isinstance(name, str) or not name or "+" in name:
            raise ValueError(f"a module name must be a non-empty string without '+', got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"module names must be distinct, got {names}")
    return [subset for size in range(1, len(names) + 1) for subset in combinations(names, size)]


def arm_name(arm: Arm) -> str:
    """``("image", "text")`` as ``image+text``; the empty arm as ``none``."""
    return "+".join(arm) or "none"


def parse_arm(text: str, modules: Sequence[str]) -> Arm:
    """The arm that ``text`` names, such as ``image+text``, in the modules' own order.

    Raises:
        UserError: it names no module, or one that the model does not have.
    """
    wanted = [part.strip() for part in text.split("+") if part.strip()]
    if not wanted:
        raise UserError(f"arm {text!r} names no module; choose from {', '.join(modules)}")
    for name in wanted:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(modules)}"
            raise UserError(f"arm {text!r}: the model has no module {name!r}; {hint}")
    return tuple(name for name in modules if name in wanted)
