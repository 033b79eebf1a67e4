"""Adafactor with a first moment and decoupled weight decay, as CoCa was trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from optima_fast.training import ranks


class Adafactor(Optimizer):
    r"""Factored second moment, update clipping, momentum, decoupled weight decay.

    With :math:`t` counting steps from 1, for each parameter:

    .. math::
        b_t &= \beta_2 (1 - \beta_2^{t-1}) / (1 - \beta_2^t), \qquad g_2 = g^2 + \epsilon \\
        r &\leftarrow b_t r + (1 - b_t)\,\mathrm{mean}_{-1}(g_2), \quad
        c \leftarrow b_t c + (1 - b_t)\,\mathrm{mean}_{-2}(g_2) \\
        x &= g / \sqrt{(r / \mathrm{mean}(r)) \otimes c}, \qquad
        x \leftarrow x / \max(1, \mathrm{rms}(x) / d) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1)\,\eta\,x, \qquad
        \theta \leftarrow \theta - m - \eta \lambda \theta

    A parameter of fewer than two dimensions keeps its whole second moment. There is no
    multiplication by the parameter's scale and no relative step size. Source: Shazeer and Stern
    (arXiv 1804.04235) as Google's Praxis codes it for CoCa (``ShardedAdafactor``, decay method
    ``adam``). ``torch.optim.Adafactor`` has no first moment, hence this class.

    Args:
        params: parameters or groups.
        lr: :math:`\eta`.
        betas: :math:`\beta_1` in [0, 1) and :math:`\beta_2` in (0, 1).
        weight_decay: :math:`\lambda`.
        clip_threshold: :math:`d`.
        eps: :math:`\epsilon`.

    Raises:
        ValueError: a setting outside its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        clip_threshold: float = 1.0,
        eps: float = 1e-30,
    ) -> None:
        if not lr >= 0.0:
            raise ValueError(f"lr must not be negative, got {lr}")
        if not (0.0 <= betas[0] < 1.0 and 0.0 < betas[1] < 1.0):
            raise ValueError(f"betas must be in [0, 1) and (0, 1), got {betas}")
        if not weight_decay >= 0.0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
        if not clip_threshold > 0.0:
            raise ValueError(f"clip_threshold must be positive, got {clip_threshold}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "clip_threshold": clip_threshold,
            "eps": eps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, good: Tensor | None = None
    ) -> float | None:
        """One update of every parameter that has a gradient.

        Args:
            closure: as of every optimizer.
            good: bool scalar on the device: where it is False no parameter changes, whatever the
                gradients hold, and nothing waits to know. What is kept of gradients does change.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            kept: Any = 1.0 - group["lr"] * group["weight_decay"]
            if good is not None:
                kept = torch.full((), kept, dtype=torch.float64, device=good.device)
                kept = torch.where(good, kept, 1.0)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if good is not None:
                    p.grad.masked_fill_(~good, 0.0)
                momentum = self._momentum(p, p.grad, self.state[p], group)
                if group["weight_decay"]:
                    p.mul_(kept)
                if good is None:
                    p.sub_(momentum)
                else:
                    p.addcmul_(momentum, good.to(momentum.dtype), value=-1.0)
        return loss

    @staticmethod
    def _momentum(p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """What is to be taken off, apart from the decay of weights."""
        lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
        if not state:
            state["step"] = 0
            state["momentum"] = torch.zeros_like(p)
            if p.ndim >= 2:
                state["row"] = p.new_zeros(p.shape[:-1])
                state["col"] = p.new_zeros(p.shape[:-2] + p.shape[-1:])
            else:
                state["second"] = torch.zeros_like(p)
        state["step"] += 1
        t = state["step"]
        decay = beta2 * (1.0 - beta2 ** (t - 1)) / (1.0 - beta2**t)

        squared = grad.square().add_(eps)
        if p.ndim >= 2:
            row, col = state["row"], state["col"]
            row.lerp_(_placed(squared.mean(-1), row), 1.0 - decay)
            col.lerp_(_placed(squared.mean(-2), col), 1.0 - decay)
            r = (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
            x = grad * r * col.rsqrt().unsqueeze(-2)
        else:
            second = state["second"]
            second.lerp_(squared, 1.0 - decay)
            x = grad * second.rsqrt()
        rms = x.norm() / max(1, x.numel()) ** 0.5
        x.mul_((1.0 - beta1) * lr / (rms / group["clip_threshold"]).clamp_min_(1.0))
        momentum: Tensor = state["momentum"]
        return momentum.mul_(beta1).add_(_placed(x, momentum))


def _placed(value: Tensor, like: Any) -> Tensor:
    """A value that is sharded over processes, as another is."""
    if not ranks.is_sharded(like):
        return value
    placed: Any = value
    return cast(Tensor, placed.redistribute(placements=like.placements))
