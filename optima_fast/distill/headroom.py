"""What is left to learn from the teacher: a reward that is known of every arm, pulled or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optima_fast.distill.arms import Arm, arm_layers
from optima_fast.distill.measurement import Layers, Measurement


class Headroom:
    r"""The most that each arm can still teach, per cost of a step.

    .. math::
        r_t(a) = \frac{1}{c(a)} \sum_{m \in a} \frac{1}{n_m} \sum_{l \in a_m} h_l(t), \qquad
        h_l(t) = \min\Big(1, \min_{s \le t} u_l(s)\Big)

    with :math:`u_l(s)` the share of the variance of the teacher's states in layer l that the
    student's projected states did not explain at measurement s, :math:`n_m` the matched layers of
    module m and c(a) the cost of a step with arm a, relative to one with all modules. For the
    layers of the module that predicts, h is at most the teacher's lead in the task itself,

    .. math:: A(t) = \max\Big(0, \min_{s \le t} L_{pred}(s) / L_{teacher} - 1\Big)

    so that a student that once predicted as well as its teacher no longer has to predict like it.

    The best so far counts, not the latest: a module that is left alone for a round moves away from
    its teacher, and moves back in a round or two when it is pulled again. A reward that counts such
    losses when they fall, as Eq. 6 does, pays again and again for what was known before.

    There is nothing to explore: all of it is measured, whichever arm was pulled. Measured on the
    built-in tasks, see ``bench/README.md``; a definition of this project.

    Args:
        arms: of modules or of layers.
        costs: one positive number an arm.
        layer_counts: matched layers of each module.
        output: the module that predicts.

    Example:
        >>> headroom = Headroom([("a",), ("a", "b")], [0.5, 1.0], {"a": 1, "b": 1}, output="b")
        >>> headroom.update({"a": [0.5], "b": [0.4]}, prediction=1.1, teacher=1.0)
        >>> [round(reward, 6) for reward in headroom.rewards()]
        [1.0, 0.6]
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        costs: Sequence[float],
        layer_counts: Mapping[str, int],
        *,
        output: str,
    ) -> None:
        self._arms = [arm_layers(arm, layer_counts) for arm in arms]
        self._costs = list(costs)
        self._output = output
        self._unexplained = {name: [1.0] * count for name, count in layer_counts.items()}
        self._lead = math.inf

    def update(self, unexplained: Layers, *, prediction: float, teacher: float) -> None:
        """Take a measurement into account; what is not finite in it is left out.

        Args:
            unexplained: share of variance not explained, by module, a number a layer.
            prediction: the student's loss in the task.
            teacher: the teacher's, on the same examples.
        """
        for name, best in self._unexplained.items():
            # of two values, min() takes the first where the second is not a number
            best[:] = [min(a, b) for a, b in zip(best, unexplained[name], strict=True)]
        if 0.0 < teacher < math.inf:
            self._lead = max(0.0, min(self._lead, prediction / teacher - 1.0))

    def measured(self, measurement: Measurement) -> None:
        """:meth:`update` by a measurement of the full model."""
        self.update(
            measurement.unexplained,
            prediction=measurement.prediction,
            teacher=measurement.teacher,
        )

    def layers(self) -> Layers:
        """h of every layer."""
        return {
            name: [min(value, self._lead) if name == self._output else value for value in best]
            for name, best in self._unexplained.items()
        }

    def rewards(self) -> list[float]:
        """r of every arm."""
        left = self.layers()
        return [
            sum(
                sum(left[name][i] for i in chosen) / len(left[name]) for name, chosen in arm.items()
            )
            / cost
            for arm, cost in zip(self._arms, self._costs, strict=True)
        ]

    def told(self) -> dict[str, Any]:
        """h of every layer, for the record of a round."""
        return {"headroom": self.layers()}

    def state_dict(self) -> dict[str, Any]:
        """The best of each so far."""
        best = {name: [*values] for name, values in self._unexplained.items()}
        return {"unexplained": best, "lead": self._lead}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict`` of the same modules."""
        self._unexplained = {name: [*state["unexplained"][name]] for name in self._unexplained}
        self._lead = state["lead"]
