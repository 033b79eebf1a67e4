"""The small parts every module of a CoCa is made of, with their initial values."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def linear(
    fan_in: int, fan_out: int, *, bias: bool = True, gain: float = 1.0, std: float | None = None
) -> nn.Linear:
    """A linear layer with weights from N(0, gain^2 / fan_in), or N(0, std^2), and zero bias."""
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    nn.init.normal_(layer.weight, std=gain * fan_in**-0.5 if std is None else std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def parameter(*shape: int, std: float) -> nn.Parameter:
    """A parameter from N(0, std^2)."""
    return nn.Parameter(torch.randn(shape) * std)


class MLP(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        width: Width of the input and output.
        ratio: Hidden width over ``width``.
        activation: ``"gelu"`` (exact) or ``"relu"``.
        out_gain: Factor on the initial second layer.
    """

    def __init__(self, width: int, ratio: float, activation: str, *, out_gain: float = 1.0) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.up = linear(width, hidden)
        self.activation = nn.GELU() if activation == "gelu" else nn.ReLU()
        self.down = linear(hidden, width, gain=out_gain)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d]`` to ``[..., d]``."""
        down: Tensor = self.down(self.activation(self.up(x)))
        return down


def sinusoids(length: int, width: int) -> Tensor:
    r"""Fixed positions ``[length, width]``: sines in the first half, cosines in the second.

    .. math:: \sin(p / 10000^{i/(h-1)}), \quad \cos(p / 10000^{i/(h-1)}), \quad h = width / 2
    """
    half = width // 2
    rates = torch.exp(torch.arange(half) * (-math.log(10_000.0) / max(half - 1, 1)))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
