"""Balancing by the size of losses: the task and every module count alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optima_fast.distill.distiller import Distiller, StepLosses

DECAY = 0.9
_LEAST = 1e-12  # of a mean that a term is divided by: a module whose weights are 0 stays 0


class Balance(nn.Module):
    r"""The loss of a step with all modules, each term divided by its mean over the steps before.

    .. math:: L_t = a_0 \frac{L_{pred, t}}{m_{pred, t}} + a_1 \frac{KL_t}{m_{KL, t}}
              + \sum_u \frac{D_{u, t}}{m_{u, t}}, \qquad
              m_{k, t} = \frac{\sum_{s < t} b^{t - 1 - s} L_{k, s}}{\sum_{s < t} b^{t - 1 - s}}

    :math:`D_u` is what module u adds to Eq. 5, its hidden and attention losses after their weights
    :math:`a_2` and :math:`a_3`, of which only the ratio matters here; :math:`a_0` and :math:`a_1`
    are ``prediction_weight`` and ``kl_weight``. The means have no gradient; before the first step
    they are 1.

    Source: Lin et al., "Dual-Balancing for Multi-Task Learning", arXiv 2308.12029, whose balance of
    scales minimises :math:`\sum_k \log L_k`, whose gradient is :math:`\sum_k \nabla L_k / L_k`.
    Read so: in the denominator stands the decaying mean of the steps before, as in the loss ratios
    of Groenendijk et al., "Multi-Loss Weighting with Coefficient of Variations", WACV 2021, so that
    all parts of a batch are divided by the same. Their other halves, the size of gradients and the
    variation of losses, are left out.

    Args:
        distiller: whose losses are balanced.
        decay: b.

    Attributes:
        names: of the terms.
    """

    factors: Tensor
    sums: Tensor
    weight: Tensor

    def __init__(self, distiller: Distiller, decay: float = DECAY) -> None:
        super().__init__()
        self._decay = decay
        factors = {"prediction": distiller.prediction_weight, "kl": distiller.kl_weight}
        if not distiller.kl_weight:
            del factors["kl"]
        factors |= dict.fromkeys(distiller.modules_matched, 1.0)
        self.names = tuple(factors)
        self.register_buffer("factors", torch.tensor([*factors.values()]), persistent=False)
        self.register_buffer("sums", torch.zeros(len(factors)))
        self.register_buffer("weight", torch.zeros(()))

    def terms(self, losses: StepLosses) -> Tensor:
        """The terms before they are divided, ``[len(names)]``, of the losses of all modules."""
        assert losses.each is not None
        terms = {"prediction": losses.prediction}
        if losses.kl is not None:
            terms["kl"] = losses.kl
        for pair, value in zip(losses.pairs, losses.each.unbind(), strict=True):
            known = terms.get(pair.module)
            terms[pair.module] = value if known is None else known + value
        return torch.stack([*terms.values()])

    def means(self) -> Tensor:
        """What each term is divided by in the next step."""
        return torch.where(self.weight > 0, self.sums / self.weight, 1.0).clamp_min(_LEAST)

    def forward(self, losses: StepLosses) -> Tensor:
        """The balanced loss of a step, or what a part of its batch adds to it."""
        return (self.factors * self.terms(losses) / self.means()).sum()

    @torch.no_grad()
    def update(self, terms: Tensor) -> None:
        """Take the terms of a step, of its whole batch, into the means."""
        self.sums.mul_(self._decay).add_(terms)
        self.weight.mul_(self._decay).add_(1.0)
