"""What a call of the attention-score kernels keeps, wants and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import tolerance
import torch
from torch import Tensor

from optima_fast.losses import reference

pytest.importorskip("triton")
from kernel_scores import (
    MARKS,
    MIXED,
    ON_GPU,
    Layers,
    Shape,
    autograd,
    backward,
    forward,
    fused,
    make,
    no_float64,
    upstream,
)
from optima_fast.kernels import attention_scores as kernel
from optima_fast.kernels import launch
from optima_fast.kernels.attention_tiles import MAX_STRIDE, Model

pytestmark = MARKS


def test_loss_alone_stores_no_residual(device: str) -> None:
    layers = make(MIXED, torch.float32, device, masked=True)
    losses, residuals, scales = forward(layers, need_residual=False)
    expected = forward(layers)
    assert residuals == []
    assert torch.equal(losses, expected[0])
    assert torch.equal(scales, expected[2])


def test_residuals(device: str) -> None:
    """R itself, rows padded with zeros; 2 / n of the valid pairs."""
    layers = make([Shape(2, 2, 3, 1, 4, 5, 19, causal=True)], torch.float32, device, masked=True)
    _, (residual,), scales = forward(layers)
    valid = reference.valid_pairs(
        layers.query_masks[0], layers.key_masks[0], True, layers.student_q[0], 19
    )
    exact = [
        reference.attention_maps(
            q[0].double(), k[0].double(), valid, target="scores", scale=scale[0]
        )[:, 0]
        for q, k, scale in ((*layers[:2], layers[7]), (*layers[2:4], layers[8]))
    ]
    assert scales.item() == pytest.approx(2 / valid.sum().item())
    assert residual.stride() == (160, 32, 1)
    assert not residual.as_strided((2, 5, 32), (160, 32, 1))[..., 19:].any()
    truth = torch.where(valid, exact[0] - exact[1], 0)
    tolerance.assert_as_good_as_eager("R", residual, truth.float(), truth)


def test_a_residual_that_was_copied(device: str) -> None:
    """As saving it on the CPU does, which drops the rows' padding."""
    layers = make([MIXED[0], MIXED[2]], torch.float32, device, masked=True)
    _, residuals, scales = forward(layers)
    whole = backward(layers, upstream(layers), (residuals, scales))
    for copied in (
        [x.contiguous() for x in residuals],
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in residuals],
    ):
        assert all(x.stride() != y.stride() for x, y in zip(copied, residuals, strict=True))
        again = backward(layers, upstream(layers), (copied, scales))
        for a, b in zip(whole, again, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_only_wanted_gradients_and_a_second_backward(device: str) -> None:
    layers = make([MIXED[0], MIXED[2], MIXED[4]], torch.float32, device, masked=True)
    whole = fused(layers)
    _, *kept = forward(layers)
    for _ in range(2):
        d_q, d_k = backward(
            layers,
            upstream(layers),
            (kept[0], kept[1]),
            need_q=[False, True, True],
            need_k=[True, False, False],
        )
        assert d_q[0] is d_k[1] is d_k[2] is None
        assert torch.equal(d_q[1], whole.d_q[1])
        assert torch.equal(d_q[2], whole.d_q[2])
        assert torch.equal(d_k[0], whole.d_k[0])
    neither = [False] * 3
    none = backward(layers, upstream(layers), (kept[0], kept[1]), neither, neither)
    assert none == ([None] * 3, [None] * 3)


def test_an_upstream_gradient_of_zero(device: str) -> None:
    layers = make([MIXED[0], MIXED[4]], torch.float16, device, masked=True)
    ours = fused(layers, torch.tensor([0.0, 1.0], device=device))
    assert not ours.d_q[0].any()
    assert not ours.d_k[0].any()
    assert ours.d_q[1].any()


@pytest.mark.parametrize("grad", [0.01, 300.0])
def test_float16_gradients_do_not_overflow_or_vanish(grad: float, device: str) -> None:
    """2 a / n is below float16's least number, the sums over queries and keys above its greatest.

    The bound is on the rounding of R and of the result alone, without what eager loses.
    """
    layers = make([Shape(1, 2, 16, 1, 16, 40, 200)], torch.float16, device)
    for q, k in (layers[:2], layers[2:4]):
        q[0].mul_(20)
        k[0].add_(10)
    assert forward(layers)[2].item() * layers.student_scale[0] / 2 < 2**-14
    upstream_gradient = torch.full((1,), grad, device=device)
    ours = fused(layers, upstream_gradient)
    exact = autograd(layers, upstream_gradient, torch.float64)
    for actual, truth in zip((*ours.d_q, *ours.d_k), (*exact.d_q, *exact.d_k), strict=True):
        tolerance.assert_as_good_as_eager("gradient", actual, truth.half(), truth)


def test_gradients_in_a_wider_dtype(device: str) -> None:
    """Unit gradients of float16 inputs, for a mean that is too large for float16."""
    layers = make([Shape(2, 2, 3, 1, 4, 40, 9)], torch.float16, device)
    grad = torch.full((1,), 2.0**-22, device=device)
    _, *kept = forward(layers)
    wide = backward(layers, grad, (kept[0], kept[1]), dtype=torch.float32)
    exact = autograd(layers, grad, torch.float64)
    for (actual,), (truth,) in zip(wide, exact[1:], strict=True):
        assert actual.dtype == torch.float32
        error = (actual.double() - truth).norm() / truth.norm()
        assert error <= torch.finfo(torch.float16).eps


def test_rows_too_far_apart_for_32_bits_are_copied() -> None:
    far = torch.zeros(MAX_STRIDE + 3, dtype=torch.bool).as_strided(
        (1, 1, 2, 3), (0, 0, MAX_STRIDE, 1)
    )
    assert Model.of([far], [far], [1.0]).q[0].stride(2) == 3
    assert Model.of([far[:, :, :1]], [far], [1.0]).q[0].stride(2) == MAX_STRIDE


class Scores(torch.autograd.Function):
    """The least that makes the launchers differentiable: two layers."""

    @staticmethod
    def forward(ctx: Any, layers: Layers, *inputs: Tensor) -> Tensor:
        ctx.layers = layers._replace(student_q=[*inputs[:2]], student_k=[*inputs[2:]])
        losses, *ctx.kept = forward(ctx.layers)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_q, d_k = backward(ctx.layers, grad, ctx.kept)
        return None, *d_q, *d_k


@no_float64
def test_gradcheck() -> None:
    layers = make(
        [Shape(1, 2, 2, 1, 3, 3, 2), Shape(2, 1, 2, 2, 2, 3, 4, causal=True)], torch.float64, "cpu"
    )
    layers.query_masks[1] = torch.tensor([[True, False, True], [True, True, False]])
    layers.key_masks[1] = torch.tensor([[True, True, False, True], [False, True, True, True]])
    inputs = [x.requires_grad_() for x in (*layers.student_q, *layers.student_k)]
    assert torch.autograd.gradcheck(lambda *x: Scores.apply(layers, *x), inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("longest", "bucket"), [(1, 64), (64, 64), (65, 128), (128, 128), (4096, 128)]
)
def test_launch_config(longest: int, bucket: int) -> None:
    x = torch.zeros(1, dtype=torch.float16)
    for table in (launch.SCORES_FORWARD, launch.SCORES_BACKWARD):
        assert kernel._config(table, x, longest) is table[8, 2, bucket]


@pytest.mark.parametrize(
    ("student", "teacher", "reason"),
    [
        (torch.float32, torch.int32, "float64, got torch.int32"),
        (torch.float32, torch.float64, "float64 cannot be mixed"),
    ],
)
def test_not_served_names_dtypes(
    student: torch.dtype, teacher: torch.dtype, reason: str, device: str
) -> None:
    tensors = ([torch.zeros(1, 1, 2, 2, device=device, dtype=d)] for d in [student, teacher] * 2)
    assert any(reason in line for line in kernel.not_served(*tensors))


def test_not_served_names_dtypes_that_differ_between_layers(device: str) -> None:
    layers = make([MIXED[4]] * 2, torch.float32, device)
    assert kernel.not_served(*layers[:4]) == []
    layers.student_k[1] = layers.student_k[1].half()
    assert kernel.not_served(*layers[:4]) == ["students must have one dtype, got float16, float32"]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_offsets_past_32_bits_and_no_synchronisation() -> None:
    n = 2**15  # three residuals of n * n pass 2**31
    q, k = (torch.randn(3, 1, n, 64, device="cuda", dtype=torch.float16) for _ in range(2))
    zeros = torch.zeros(3, 1, n, 64, device="cuda", dtype=torch.float16)
    layers = Layers([q], [k], [zeros], [zeros], [None], [None], [False], [0.125], [0.125])
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses, *kept = forward(layers)
        d_q, d_k = backward(layers, losses, (kept[0], kept[1]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    residual, scale = kept[0][0], 0.125 * kept[1][0].double() * losses[0]
    exact = q[2, 0, -3:].double() @ k[2, 0].double().t() * 0.125
    torch.testing.assert_close(residual[2, -3:].double(), exact, rtol=2e-3, atol=2e-3)
    exact = exact @ k[2, 0].double() * scale
    torch.testing.assert_close(d_q[0][2, 0, -3:].double(), exact, rtol=4e-3, atol=1e-6)
    exact = residual[2, :, -3:].double().t() @ q[2, 0].double() * scale
    torch.testing.assert_close(d_k[0][2, 0, -3:].double(), exact, rtol=4e-3, atol=1e-6)
