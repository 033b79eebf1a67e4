"""What a round of the bandit is judged by: the losses of the full model on some examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

TERMS = ("kl", "hidden", "attention", "prediction")

Layers = dict[str, list[float]]


class Measurement(NamedTuple):
    """Losses of the full model, unweighted.

    Attributes:
        kl: KL(teacher || student) of the predictions; None where it was not asked for.
        hidden: Eq. 3 over all matched layers, reduced as in training.
        attention: Eq. 4, likewise; None where it was not asked for.
        prediction: the task's own loss.
        hidden_layers: the hidden loss of each layer, by module, first layer first.
        attention_layers: the attention loss of each layer, likewise; empty where it was not asked
            for.
        unexplained: the share of each layer's variance that is not explained, likewise: its hidden
            loss over the variance of the teacher's states around their mean over the tokens.
        teacher: the task's own loss of the teacher.
    """

    kl: float | None
    hidden: float
    attention: float | None
    prediction: float
    hidden_layers: Layers
    attention_layers: Layers
    unexplained: Layers
    teacher: float


def average(parts: Sequence[tuple[Measurement, int]]) -> Measurement:
    """The mean of measurements on parts of one set of examples, each with its size as weight."""
    count = sum(size for _, size in parts)

    def mean(values: Sequence[float]) -> float:
        total = 0.0
        for value, (_, size) in zip(values, parts, strict=True):
            total += value * size / count
        return total

    def mean_if_known(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return mean(known) if known else None

    def by_layer(layers: Sequence[Layers]) -> Layers:
        return {
            module: [mean(v) for v in zip(*(part[module] for part in layers), strict=True)]
            for module in layers[0]
        }

    measured = [part for part, _ in parts]
    return Measurement(
        kl=mean_if_known([m.kl for m in measured]),
        hidden=mean([m.hidden for m in measured]),
        attention=mean_if_known([m.attention for m in measured]),
        prediction=mean([m.prediction for m in measured]),
        hidden_layers=by_layer([m.hidden_layers for m in measured]),
        attention_layers=by_layer([m.attention_layers for m in measured]),
        unexplained=by_layer([m.unexplained for m in measured]),
        teacher=mean([m.teacher for m in measured]),
    )
