"""Arms of the bandit: the non-empty subsets of a model's modules, or of groups of their layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

from optima_fast.errors import UserError, unknown

Arm = tuple[str, ...]

MAX_MODULES = 12  # 4095 arms: more than any bandit could try
ARM_SPACES = ("modules", "single-modules", "layer-groups:2", "layer-groups:3")

_MEMBER = re.compile(r"([^\[\]+]+)(?:\[([0-9]{1,6})(?:-([0-9]{1,6}))?\])?")


class ArmSpace(NamedTuple):
    """The arms of a run; ``features[i][u]`` is 1 where arm ``i`` holds unit ``u``, else 0."""

    arms: list[Arm]
    units: list[str]
    features: list[list[int]]


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


def layer_units(layer_counts: Mapping[str, int], groups: int) -> list[str]:
    """Each module's layers in ``groups`` contiguous parts, fewer where it has fewer layers.

    Group ``j`` (from 0) of ``L`` layers holds, counting from 1, the layers ``j * L // groups + 1``
    to ``(j + 1) * L // groups``: sizes differ by at most one, and the later are the larger.

    Args:
        layer_counts: layers of each module, at least 1.
        groups: at least 1.

    Returns:
        Members of arms, modules in the order given, first layers first.

    Example:
        >>> layer_units({"image": 6, "text": 1}, 2)
        ['image[1-3]', 'image[4-6]', 'text']
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    units = []
    for module, count in layer_counts.items():
        if count < 1:
            raise ValueError(f"{module} must have at least one layer, got {count}")
        parts = min(groups, count)
        edges = [j * count // parts for j in range(parts + 1)]
        for first, last in pairwise(edges):
            units += _written(module, [(first + 1, last)], count)
    return units


def group_arms(layer_counts: Mapping[str, int], groups: int) -> list[Arm]:
    """Every non-empty subset of :func:`layer_units`, in the order of :func:`arms`.

    An arm is written as short as can be: a module whose groups are all in it by its bare name,
    neighbouring groups as one range. So ``image`` and ``image+text`` are the same arms as among
    whole modules.

    Example:
        >>> group_arms({"image": 6, "text": 1}, 2)[:4]
        [('image[1-3]',), ('image[4-6]',), ('text',), ('image',)]
    """
    return [_short(arm, layer_counts) for arm in arms(layer_units(layer_counts, groups))]


def arm_space(kind: str, layer_counts: Mapping[str, int]) -> ArmSpace:
    """The arms that ``modules``, ``single-modules`` or ``layer-groups:N`` stands for.

    Raises:
        UserError: an unknown kind, or more than 12 units.
    """
    if kind in ("modules", "single-modules"):
        units = list(layer_counts)
    elif kind.startswith("layer-groups:") and kind in ARM_SPACES:
        units = layer_units(layer_counts, int(kind.rpartition(":")[2]))
    else:
        raise UserError(f"arms must be one of {', '.join(ARM_SPACES)}, got {kind!r}")
    if len(units) > MAX_MODULES:
        raise UserError(
            f"arms {kind} of modules with {', '.join(map(str, layer_counts.values()))} layers are "
            f"subsets of {len(units)} groups, more than {MAX_MODULES}: take fewer groups"
        )
    subsets = [(unit,) for unit in units] if kind == "single-modules" else arms(units)
    return ArmSpace(
        [_short(subset, layer_counts) for subset in subsets],
        units,
        [[int(unit in subset) for unit in units] for subset in subsets],
    )


def arm_name(arm: Arm) -> str:
    """``("image", "text[1-2]")`` as ``image+text[1-2]``; the empty arm as ``none``."""
    return "+".join(arm) or "none"


def parse_arm(text: str, modules: Sequence[str] | Mapping[str, int]) -> Arm:
    """The arm that ``text`` names, such as ``image[1-3]+text``, in the modules' own order.

    A member is a module, one of its layers (``image[2]``) or several (``image[1-3]``), counted
    from 1.

    Args:
        text: members joined by ``+``.
        modules: the model's; a mapping to their number of layers also has layers checked, and
            writes a module whose layers are all named by its bare name.

    Raises:
        UserError: it names no module, or a module or layer that the model does not have.
    """
    wanted = [part.strip() for part in text.split("+") if part.strip()]
    if not wanted:
        raise UserError(f"arm {text!r} names no module; choose from {', '.join(modules)}")
    try:
        return _short(wanted, modules)
    except ValueError as error:
        raise UserError(f"arm {text!r}: {error}") from None


def arm_layers(arm: Arm, layer_counts: Mapping[str, int]) -> dict[str, list[int]]:
    """0-based layers of each module in ``arm``, ascending; modules in the arm's own order.

    Raises:
        ValueError: a module or layer that is not there, or a member that is not understood.
    """
    return {
        module: [i - 1 for first, last in spans for i in range(first, last + 1)]
        for module, spans in _spans(arm, layer_counts).items()
    }


def _short(members: Sequence[str], modules: Sequence[str] | Mapping[str, int]) -> Arm:
    spans = _spans(members, modules)
    counts = modules if isinstance(modules, Mapping) else {}
    return tuple(
        member
        for module in modules
        if module in spans
        for member in _written(module, spans[module], counts.get(module))
    )


def _written(module: str, spans: Sequence[tuple[int, int]], count: int | None) -> list[str]:
    if list(spans) in ([(1, count)], [_ALL]):
        return [module]
    return [f"{module}[{a}]" if a == b else f"{module}[{a}-{b}]" for a, b in spans]


_ALL = (1, 10**6)  # of a module whose number of layers is not known


def _spans(
    members: Sequence[str], modules: Sequence[str] | Mapping[str, int]
) -> dict[str, list[tuple[int, int]]]:
    """First and last layers, from 1, of each module; ranges that touch are one."""
    counts = modules if isinstance(modules, Mapping) else {}
    found: dict[str, list[tuple[int, int]]] = {}
    for member in members:
        match = _MEMBER.fullmatch(member)
        if match is None:
            raise ValueError(
                f"a member must be MODULE, MODULE[LAYER] or MODULE[FIRST-LAST], got {member!r}"
            )
        name, first, last = match.groups()
        if name not in modules:
            raise unknown("module", name, modules)
        _, top = whole = (1, counts.get(name, _ALL[1]))
        span = (int(first), int(last or first)) if first else whole
        if not 1 <= span[0] <= span[1] <= top:
            raise ValueError(
                f"layers of {name} must be from 1 to {top}, the first not after the last, "
                f"got {member!r}"
            )
        found.setdefault(name, []).append(span)
    return {name: _merged(spans) for name, spans in found.items()}


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged
