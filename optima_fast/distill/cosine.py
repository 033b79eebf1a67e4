"""The gate by gradients: modules whose distillation pulls the student where its task pulls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from optima_fast.distill.arms import Arm, ArmSpace
from optima_fast.distill.distiller import Distiller, StepLosses, module_of


class GradientCosine:
    r"""Cosines between the gradients of the task and of each module's distillation.

    .. math:: c_u = \cos\left(\nabla_\theta L_{pred}, \nabla_\theta D_u\right), \qquad
              r(a) = \sum_{u \in a} c_u

    :math:`D_u` is what module u adds to Eq. 5, after its weights, and :math:`\theta` the student's
    parameters that both reach (no projection, not the task's head). The arm with the largest r has
    the modules with a positive cosine, or, where none has one, that with the largest.

    Source: Du et al., "Adapting Auxiliary Losses Using Gradient Similarity", arXiv 1812.02224, the
    unweighted version, which takes an auxiliary loss where its cosine is not negative, in every
    step and from its own batch. Here the batch is another one of the same data each round, and
    what it says holds for the round; an arm has one module at least. A cosine of exactly 0, which
    a module of weight 0 has, leaves it out.

    Args:
        distiller: of the losses.
        space: arms, and the units (modules, or groups of their layers) that they are made of.
    """

    def __init__(self, distiller: Distiller, space: ArmSpace) -> None:
        self._distiller, self._space = distiller, space
        self._cosines = [0.0] * len(space.units)
        self.turn = 0  # batches that were measured

    def measure(
        self,
        batch: Mapping[str, Tensor],
        *,
        predict: Callable[[Any, Any], Tensor],
        divergence: Callable[[Any, Any, Any], Tensor],
    ) -> list[float]:
        """The cosine of each unit on a batch, one forward and backward pass each and one more.

        The student is in eval mode for it; no ``grad`` of a parameter changes.
        """
        student = module_of(self._distiller.student)
        assert student is not None
        parameters = [p for p in student.parameters() if p.requires_grad]

        def gradient(arm: Arm, of: Callable[[StepLosses], Tensor]) -> tuple[Tensor | None, ...]:
            with torch.enable_grad():
                loss = of(self._distiller(batch, arm, predict=predict, divergence=divergence))
                if not loss.requires_grad:  # of weight 0
                    return (None,) * len(parameters)
                return torch.autograd.grad(loss, parameters, allow_unused=True)

        training = student.training
        student.eval()
        try:
            task = gradient((), lambda losses: losses.prediction)
            units = [gradient((unit,), _distillation) for unit in self._space.units]
        finally:
            student.train(training)
        cosines: list[float] = torch.stack([_cosine(task, unit) for unit in units]).tolist()
        return cosines

    def update(self, cosines: list[float]) -> None:
        """Take a measurement into account, in place of the one before."""
        self._cosines = cosines
        self.turn += 1

    def rewards(self) -> list[float]:
        """r of every arm."""
        rows = self._space.features
        return [sum(c for c, held in zip(self._cosines, row, strict=True) if held) for row in rows]

    def told(self) -> dict[str, Any]:
        """The cosine of each unit, for the record of a round."""
        return {"cosines": dict(zip(self._space.units, self._cosines, strict=True))}

    def state_dict(self) -> dict[str, Any]:
        """The last measurement."""
        return {"cosines": [*self._cosines], "turn": self.turn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict`` of the same units."""
        self._cosines, self.turn = [*state["cosines"]], state["turn"]


def _distillation(losses: StepLosses) -> Tensor:
    assert losses.each is not None
    return losses.each.sum()


def _cosine(task: tuple[Tensor | None, ...], unit: tuple[Tensor | None, ...]) -> Tensor:
    """Over the parameters that have both gradients; 0 where one of them is 0."""
    both = [(a, b) for a, b in zip(task, unit, strict=True) if a is not None and b is not None]

    def product(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([(a * b).sum(dtype=torch.float64) for a, b in pairs]).sum()

    if not both:
        return next(g for g in task if g is not None).new_zeros((), dtype=torch.float64)
    size = product([(a, a) for a, _ in both]) * product([(b, b) for _, b in both])
    return torch.where(size > 0, product(both) / size.sqrt(), 0.0)
