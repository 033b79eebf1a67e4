"""How close is close enough: twice the error of plain PyTorch, both measured against float64."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_good_as_eager(
    name: str,
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    factor: float = 2.0,
    scale: float | None = None,
) -> None:
    """max|actual - exact| <= factor * max|eager - exact| + 2 eps * scale, in float64.

    eps is of the dtype ``actual`` is stored in, whose rounding alone costs eps / 2. ``scale`` is
    the size of the largest intermediate that cancels; by default the result's own size. For float64
    ``exact`` has errors of its own: there the floor is 32 eps.
    """
    assert exact.dtype == torch.float64, f"{name}: the exact result must be float64"
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} != {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype} != {eager.dtype}"
    if not exact.numel():
        return
    error = (actual.double() - exact).abs().max().item()
    allowed = factor * (eager.double() - exact).abs().max().item()
    size = exact.abs().max().item() if scale is None else scale
    allowed += (32 if actual.dtype == torch.float64 else 2) * torch.finfo(actual.dtype).eps * size
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}, size {size:.3e}"
