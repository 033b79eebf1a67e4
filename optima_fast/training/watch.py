"""Losses and gradients that are not finite, found without waiting for the device in every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optima_fast.distill import LayerPair, StepLosses

GRADIENT = "the gradient norm"


class Bad(NamedTuple):
    """The first step that was not finite.

    Attributes:
        step: from 1.
        terms: what of it was not: terms of the loss by name and layer, or the gradient norm.
        value: of the first term.
        examples: what the step trained on.
    """

    step: int
    terms: list[str]
    value: float
    examples: list[int]


class _Step(NamedTuple):
    number: int
    terms: list[Tensor | None]  # prediction, kl, hidden, attention
    pairs: Sequence[LayerPair]  # of the last two
    finite: Tensor  # bool, on the device
    examples: Tensor


class Watch:
    """What happened since the device was last waited for.

    Attributes:
        good: bool on the device: whether all steps were finite, from the start on. A step that is
            taken where it is False would harm the weights.
    """

    def __init__(self, device: torch.device) -> None:
        self.good = torch.ones((), dtype=torch.bool, device=device)
        self._steps: list[_Step] = []

    def note(self, number: int, losses: StepLosses, norm: Tensor, examples: Tensor) -> Tensor:
        """Take a step into account, before its update; returns ``good``."""
        finite = torch.isfinite(losses.total.detach()) & torch.isfinite(norm)
        self.good = self.good & finite
        kept = [None if x is None else x.detach() for x in losses[1:5]]
        self._steps.append(_Step(number, kept, losses.pairs, finite, examples))
        return self.good

    def read(self) -> Bad | None:
        """Wait for the device, and give the first step that was not finite, if there was one."""
        steps, self._steps = self._steps, []
        if not steps or bool(self.good):
            return None
        bad = next(step for step in steps if not bool(step.finite))
        prediction, kl, hidden, attention = bad.terms
        terms = [("prediction", prediction), ("kl", kl)]
        for name, layers in (("hidden", hidden), ("attention", attention)):
            if layers is not None:
                pairs = zip(bad.pairs, layers, strict=True)
                terms += [(f"{name} of {pair}", value) for pair, value in pairs]
        wrong = [(n, float(v)) for n, v in terms if v is not None and not bool(v.isfinite())]
        wrong = wrong or [(GRADIENT, float("nan"))]
        return Bad(bad.number, [n for n, _ in wrong], wrong[0][1], bad.examples.tolist())
