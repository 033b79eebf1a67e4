"""What a call of the attention-probability kernels keeps, wants and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernel_probs import (
    FEW,
    INF,
    MARKS,
    NAN,
    ON_GPU,
    Layers,
    Shape,
    assert_same,
    autograd,
    backward,
    check,
    forward,
    fused,
    make,
    no_float64,
    on_each_path,
    upstream,
)
from optima_fast.kernels import attention_probs as kernel
from optima_fast.kernels import core

pytestmark = MARKS


@on_each_path
def test_the_loss_alone_is_the_same(path: None, dtype: torch.dtype, device: str) -> None:
    layers = make(FEW, dtype, device, masked=True)
    losses, kept = forward(layers, need_residual=False)
    assert kept.residuals == kept.lses == []
    assert torch.equal(losses, forward(layers)[0])


@on_each_path
def test_only_what_is_asked_for(path: None, dtype: torch.dtype, device: str) -> None:
    layers = make(FEW, dtype, device, masked=True)
    grad = upstream(layers)
    _, kept = forward(layers)
    before = [x.clone() for x in (*kept.residuals, *kept.lses)]
    whole = backward(layers, grad, kept)
    need_q, need_k = [True, False, False], [False, False, True]
    for found, every, wanted in zip(
        backward(layers, grad, kept, need_q, need_k), whole, (need_q, need_k), strict=True
    ):
        for x, y, need in zip(found, every, wanted, strict=True):
            assert (x is not None) == need
            assert x is None or torch.equal(x, y)
    assert backward(layers, grad, kept, [False] * 3, [False] * 3) == ([None] * 3, [None] * 3)
    for x, y in zip(before, (*kept.residuals, *kept.lses), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("path", ["rows", "sweeps"], indirect=True)
def test_gradients_in_another_dtype_and_of_any_size(path: None, device: str) -> None:
    """Of float16: stored values neither underflow nor overflow, whatever the upstream gradient."""
    layers = make([Shape(1, 2, 8, 3, 6, 34, 17)], torch.float16, device, masked=True)
    _, kept = forward(layers)
    exact = autograd(layers, torch.ones(1, device=device), torch.float64)
    for size in (1.0, 1e-6, 1e5):
        grad = torch.full((1,), size, device=device)
        found = backward(layers, grad, kept, dtype=torch.float32)
        for (x,), (y,) in zip(found, exact[1:], strict=True):
            assert x.dtype == torch.float32
            assert (x.double() / size - y).abs().max() <= 4e-3 * y.abs().max()
    zero = backward(layers, torch.zeros(1, device=device), kept)
    assert not any(x.any() for (x,) in zero)


@on_each_path
def test_any_layout_gives_the_same(path: None, dtype: torch.dtype, device: str) -> None:
    """Heads first in memory, a slice of a fused projection, features that lie apart."""
    shape = Shape(2, 2, 8, 2, 16, 19, 19)
    layers = make([shape], dtype, device)
    expected = fused(layers)
    (q,), (k,) = layers[:2]
    side = torch.cat([q, k, k], -1)
    d = shape.D_S
    fused_projection = layers._replace(
        student_q=[side[..., :d]],
        student_k=[side[..., d : 2 * d]],
        teacher_q=[layers.teacher_q[0].contiguous()],
        teacher_k=[layers.teacher_k[0].transpose(2, 3).contiguous().transpose(2, 3)],
    )
    assert_same(fused(fused_projection), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_tiles_as_in_the_tables(dtype: torch.dtype, device: str) -> None:
    """Text of 77 tokens, a cross attention, and rows just past what registers hold."""
    shapes = [
        Shape(1, 1, 64, 2, 64, 77, 77, causal=True),
        Shape(1, 1, 64, 1, 128, 64, 150),
        Shape(1, 2, 20, 1, 40, 129, 129, causal=True),
    ]
    check(make(shapes, dtype, device, masked=True))


def test_what_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    q = [torch.zeros(1, 1, 2, 130)]
    assert "head sizes must be at most 128, got 130" in kernel.not_served(q, q, q, q)
    small = [torch.zeros(1, 1, 2, 4)]
    mixed = [*small, small[0].half()]
    assert any("students must have one dtype" in x for x in kernel.not_served(
        mixed, mixed, small * 2, small * 2
    ))  # fmt: skip
    monkeypatch.setattr(core, "INTERPRETED", False)
    assert any("must be CUDA" in x for x in kernel.not_served(small, small, small, small))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_nothing_waits_for_the_device() -> None:
    layers = make([Shape(2, 3, 64, 4, 64, 300, 300), Shape(2, 3, 64, 4, 64, 77, 77)],
                  torch.bfloat16, "cuda", masked=True)  # fmt: skip
    grad = upstream(layers)
    fused(layers, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(layers, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_each_path
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_all_masked(side: str, path: None, dtype: torch.dtype, device: str) -> None:
    """The whole of one layer, one item of the other."""
    shape = Shape(2, 2, 3, 1, 4, 18, 20, causal=side == "keys")
    layers = make([shape, shape], dtype, device)
    masks = layers.query_masks if side == "queries" else layers.key_masks
    for i in range(2):
        masks[i] = torch.ones(2, 18 if side == "queries" else 20, dtype=torch.bool, device=device)
        masks[i][i:] = False
        for x in layers[:4]:
            x[i][i:] = NAN
    ours = check(layers)
    assert ours.losses[0] == 0 != ours.losses[1]
    assert not any(x.any() for x in (ours.d_q[0], ours.d_k[0], ours.d_q[1][1], ours.d_k[1][1]))


@on_each_path
@pytest.mark.parametrize(("n_q", "n_k"), [(9, 40), (40, 9)])
def test_rows_that_causality_hides_may_hold_nan(
    n_q: int, n_k: int, path: None, dtype: torch.dtype, device: str
) -> None:
    """Keys after the last query that counts, and queries before the first key that does."""
    layers = make([Shape(1, 2, 3, 1, 4, n_q, n_k, causal=True)], dtype, device)
    first, last = 3, n_q - 4
    layers.key_masks[0] = torch.arange(n_k, device=device)[None] >= first
    layers.query_masks[0] = torch.arange(n_q, device=device)[None] <= last
    for q, k in (layers[:2], layers[2:4]):
        q[0][:, :, :first] = INF
        k[0][:, :, last + 1 :] = NAN
    ours = check(layers)
    assert not ours.d_q[0][:, :, :first].any()
    assert not ours.d_k[0][:, :, last + 1 :].any()


@on_each_path
def test_a_nan_that_counts_is_not_hidden(path: None, dtype: torch.dtype, device: str) -> None:
    layers = make([Shape(2, 2, 3, 1, 4, 5, 6)] * 2, dtype, device)
    layers.student_q[0][1, 1, 2, 0] = NAN
    losses, kept = forward(layers)
    assert losses.isnan().tolist() == [True, False]
    rows = kept.residuals[0][..., :6].isnan().all(2).tolist()
    assert rows == [[False] * 5, [i == 2 for i in range(5)]]


@pytest.mark.parametrize("path", ["rows", "sweeps"], indirect=True)
def test_float16_keeps_small_products(path: None, device: str) -> None:
    """P R is below float16's least number where maps are long and alike.

    The bound is on the rounding of factors alone, without what eager loses.
    """
    layers = make([Shape(1, 1, 8, 1, 8, 3, 120)], torch.float16, device)
    for x in layers[:2]:
        x[0].mul_(0.2)
    same = layers._replace(
        teacher_q=[x * 1.1 for x in layers.student_q], teacher_k=layers.student_k,
        teacher_scale=layers.student_scale,
    )  # fmt: skip
    grad = torch.ones(1, device=device)
    _, kept = forward(same)
    found = backward(same, grad, kept, dtype=torch.float32)
    exact = autograd(same, grad, torch.float64)
    for (x,), (y,) in zip(found, exact[1:], strict=True):
        assert (x.double() - y).norm() <= 2e-3 * y.norm()


class Probabilities(torch.autograd.Function):
    """The least that makes the launchers differentiable: two layers."""

    @staticmethod
    def forward(ctx: Any, layers: Layers, *inputs: Tensor) -> Tensor:
        ctx.layers = layers._replace(student_q=[*inputs[:2]], student_k=[*inputs[2:]])
        losses, ctx.kept = forward(ctx.layers)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_q, d_k = backward(ctx.layers, grad, ctx.kept)
        return None, *d_q, *d_k


@no_float64
@pytest.mark.parametrize("path", ["rows", "sweeps"], indirect=True)
def test_gradcheck(path: None) -> None:
    layers = make(
        [Shape(1, 1, 2, 1, 3, 3, 2), Shape(2, 1, 2, 1, 2, 3, 4, causal=True)], torch.float64, "cpu"
    )
    layers.query_masks[1] = torch.tensor([[True, False, True], [True, True, False]])
    layers.key_masks[1] = torch.tensor([[True, True, False, True], [False, True, True, True]])
    inputs = [x.requires_grad_() for x in (*layers.student_q, *layers.student_k)]
    assert torch.autograd.gradcheck(
        lambda *x: Probabilities.apply(layers, *x), inputs, fast_mode=True
    )
