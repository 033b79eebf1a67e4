"""The bandit's reward: how far the distillation losses of the full model fell (Eq. 6)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

from optima_fast.errors import UserError

TERMS = ("kl", "hidden", "attention")


def parse_reward(text: str) -> tuple[str, ...]:
    """The loss terms that ``text`` names: ``paper`` (all three) or a list such as ``kl,hidden``.

    Raises:
        UserError: an unknown or repeated term, or none.
    """
    if text == "paper":
        return TERMS
    terms = tuple(part.strip() for part in text.split(",") if part.strip())
    if not terms:
        raise UserError(f"reward {text!r} names no term; choose paper or from {', '.join(TERMS)}")
    for term in terms:
        if term not in TERMS:
            near = difflib.get_close_matches(term, ("paper", *TERMS), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose paper or {', '.join(TERMS)}"
            raise UserError(f"reward {text!r}: no term {term!r}; {hint}")
    if len(set(terms)) < len(terms):
        raise UserError(f"reward {text!r} repeats a term")
    return terms


def relative_drop(
    before: Mapping[str, float], after: Mapping[str, float], terms: Sequence[str] = TERMS
) -> tuple[float, dict[str, float]]:
    """Mean over the terms of ``max(0, (before - after) / before)``, and each of them.

    A term that was 0, or that is not finite at either end, counts as no drop.

    Args:
        before: loss per term at the start of the round.
        after: the same at its end, on the same batch.
        terms: the ones that count.

    Returns:
        The reward in [0, 1], and the drop of each term.

    Example:
        >>> relative_drop({"kl": 2.0, "hidden": 4.0}, {"kl": 1.0, "hidden": 5.0}, ["kl", "hidden"])
        (0.25, {'kl': 0.5, 'hidden': 0.0})
    """
    drops = {}
    for term in terms:
        old, new = before[term], after[term]
        usable = math.isfinite(old) and math.isfinite(new) and old > 0.0
        drops[term] = min(1.0, max(0.0, (old - new) / old)) if usable else 0.0
    return sum(drops.values()) / len(drops), drops
