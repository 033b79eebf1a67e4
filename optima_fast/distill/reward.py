"""The bandit's reward: how far the losses of the full model fell in a round (Eq. 6 and others)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from optima_fast.distill.measurement import TERMS, Layers, Measurement
from optima_fast.errors import UserError, unknown

PAPER = TERMS[:3]

Drops = dict[str, float]


class Context(NamedTuple):
    """What a reward is computed with besides the losses.

    Attributes:
        clip: whether a loss that rose counts as 0, not as a negative drop.
        cost: of a step with the round's arm, relative to one with all modules; divides the reward.
    """

    clip: bool = True
    cost: float = 1.0


PLAIN = Context()
Reward = Callable[[Measurement, Measurement, Context], tuple[float, Drops]]


def drop(before: Measurement, after: Measurement, context: Context) -> tuple[float, Drops]:
    r"""Eq. 6: the mean relative drop of the three distillation losses of the full model.

    .. math:: r = \frac{1}{3} \sum_{L \in \{KL, hidden, attention\}}
              \max\left(0, \frac{L_{before} - L_{after}}{L_{before}}\right)

    Source: Liang et al., NeurIPS 2023, Eq. 6.
    """
    return relative_drop(before._asdict(), after._asdict(), PAPER, context)


def normalised(before: Measurement, after: Measurement, context: Context) -> tuple[float, Drops]:
    r"""Eq. 6 with every layer of a module, and every module, of the same weight.

    .. math:: r = \frac{1}{3} \left(\Delta_{KL} + \sum_{L \in \{hidden, attention\}}
              \frac{1}{M} \sum_{m=1}^{M} \frac{1}{n_m} \sum_{l=1}^{n_m} \Delta_{L, m, l}\right)

    with :math:`\Delta = (before - after) / before` of one layer's loss, M modules and :math:`n_m`
    matched layers. In Eq. 6 a loss is summed first, so that the layers with the largest states
    decide. Clipping applies to each of the three terms.
    """
    assert before.kl is not None and after.kl is not None
    drops = {"kl": relative(before.kl, after.kl)}
    for term in ("hidden", "attention"):
        old, new = (getattr(m, f"{term}_layers") for m in (before, after))
        drops[term] = _mean_over_modules(old, new)
    return _mean(drops, context)


def prediction(before: Measurement, after: Measurement, context: Context) -> tuple[float, Drops]:
    r"""The relative drop of the task's own loss, what the student is for.

    .. math:: r = \max(0, (L_{before} - L_{after}) / L_{before})

    Measured on examples that are trained on it is optimistic: see ``--reward-split held-out``.
    """
    return relative_drop(before._asdict(), after._asdict(), ("prediction",), context)


# known of every arm after every measurement, not of a round of one arm: see the files of that name
HEADROOM, COSINE = "headroom", "gradient-cosine"
OF_EVERY_ARM = (HEADROOM, COSINE)
REWARDS: dict[str, Reward] = {
    "drop": drop,
    "normalised": normalised,
    "prediction": prediction,
}
"""Rewards of a round of one arm, by name; :func:`parse_reward` also takes terms."""


def parse_reward(text: str) -> Reward:
    """The reward that ``text`` names: one of :data:`REWARDS`, or terms such as ``kl,hidden``.

    A list of terms (``kl``, ``hidden``, ``attention``, ``prediction``) is the mean of their
    relative drops, as in Eq. 6 and its ablations.

    Raises:
        UserError: an unknown or repeated term, or none.
    """
    if text == "paper":
        warnings.warn(
            "reward 'paper' is called 'drop' now; the next release will not know it",
            FutureWarning,
            stacklevel=2,
        )
        text = "drop"
    if text in REWARDS:
        return REWARDS[text]
    terms = _listed(text)
    known = f"{', '.join((*OF_EVERY_ARM, *REWARDS))} or terms of {','.join(TERMS)}"
    if not terms:
        raise UserError(f"reward {text!r} names no term; choose {known}")
    for term in terms:
        if term not in TERMS:
            names = TERMS if len(terms) > 1 else (*OF_EVERY_ARM, *REWARDS, *TERMS)
            what = "term of a reward" if len(terms) > 1 else "reward"
            raise unknown(what, term, names, otherwise=f"choose {known}")
    if len(set(terms)) < len(terms):
        raise UserError(f"reward {text!r} repeats a term")
    return lambda before, after, context: relative_drop(
        before._asdict(), after._asdict(), terms, context
    )


def terms_of(text: str) -> tuple[str, ...]:
    """The terms of a measurement, of ``TERMS``, that the reward named ``text`` is computed from.

    Example:
        >>> terms_of("headroom"), terms_of("kl,prediction")
        (('hidden', 'prediction'), ('kl', 'prediction'))
    """
    if text in OF_EVERY_ARM:
        return ("hidden", "prediction")
    return PAPER if text in ("drop", "paper", "normalised") else _listed(text)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def relative(before: float, after: float) -> float:
    """``(before - after) / before`` in [-1, 1]; 0 where a loss was 0 or either is not finite.

    A loss that more than doubled counts as one that doubled, so that one accident does not
    outweigh a hundred rounds.

    Example:
        >>> relative(2.0, 1.5), relative(2.0, 9.0), relative(0.0, 1.0)
        (0.25, -1.0, 0.0)
    """
    if not (math.isfinite(before) and math.isfinite(after) and before > 0.0):
        return 0.0
    return min(1.0, max(-1.0, (before - after) / before))


def relative_drop(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    terms: Sequence[str] = PAPER,
    context: Context = PLAIN,
) -> tuple[float, Drops]:
    """Mean over the terms of ``max(0, (before - after) / before)``, and each of them.

    A term that was 0, or that is not finite at either end, counts as no drop.

    Args:
        before: loss per term at the start of the round.
        after: the same at its end, on the same batch.
        terms: the ones that count.
        context: whether to clip, and the cost to divide by.

    Returns:
        The reward, in [0, 1] at cost 1 (in [-1, 1] unless clipped), and the drop of each term.

    Example:
        >>> relative_drop({"kl": 2.0, "hidden": 4.0}, {"kl": 1.0, "hidden": 5.0}, ["kl", "hidden"])
        (0.25, {'kl': 0.5, 'hidden': 0.0})
    """
    return _mean({term: relative(before[term], after[term]) for term in terms}, context)


def _mean(drops: Drops, context: Context) -> tuple[float, Drops]:
    if context.clip:
        drops = {term: max(0.0, drop) for term, drop in drops.items()}
    return sum(drops.values()) / len(drops) / context.cost, drops


def _mean_over_modules(before: Layers, after: Layers) -> float:
    means = []
    for module, old in before.items():
        drops = [relative(b, a) for b, a in zip(old, after[module], strict=True)]
        means.append(sum(drops) / len(drops))
    return sum(means) / len(means)
