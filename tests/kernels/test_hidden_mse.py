"""The hidden-state kernels against float64, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernel_hidden import (
    BLOCK_M,
    BLOCK_N,
    DTYPES,
    EDGES,
    MARKS,
    MIXED,
    Layers,
    Results,
    check,
    fused,
    make,
    no_float64,
    upstream,
)
from optima_fast.kernels import hidden_mse as kernel
from optima_fast.kernels import layers as shared

pytestmark = MARKS


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", EDGES, ids=lambda s: "x".join(map(str, s)))
def test_one_layer(
    shape: tuple[int, int, int], masked: bool, dtype: torch.dtype, device: str
) -> None:
    layers = make([shape], dtype, device, masked)
    ours = check(layers, upstream(make([(1, 1, 1)] * 2, dtype, device))[1:])
    wide = torch.promote_types(dtype, torch.float32)
    assert ours.losses[0].dtype == wide
    assert ours.d_students[0].dtype == ours.d_weights[0].dtype == dtype


@pytest.mark.parametrize(
    "dtype",
    [*DTYPES, pytest.param(torch.float64, marks=no_float64)],
    ids=lambda d: str(d).removeprefix("torch."),
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_layers_of_different_shapes_some_empty(
    masked: bool, dtype: torch.dtype, device: str
) -> None:
    layers = make(MIXED, dtype, device, masked)
    ours = check(layers)
    assert ours.losses[1].item() == ours.losses[4].item() == 0
    assert not ours.d_weights[1].any()
    assert not ours.d_weights[4].any()


def test_only_empty_layers(device: str) -> None:
    ours = fused(layers := make([(0, 3, 4), (0, 2, 2)], torch.float32, device), upstream(layers))
    assert [x.item() for x in ours.losses] == [0, 0]
    assert [tuple(x.shape) for x in ours.d_students] == [(0, 3), (0, 2)]
    assert not any(x.any() for x in ours.d_weights)


def test_more_tiles_than_the_second_sum_takes_at_once(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "TOTAL_BLOCK", 2)
    check(make([(2 * BLOCK_M + 1, 3, 2 * BLOCK_N + 1), (9, 4, 5)], torch.float32, device))


def test_layers_of_two_forms_in_turn(device: str) -> None:
    """Each form is one launch; losses and gradients come in the order of the call."""
    shapes = [(9, 4, 5), (7, 6, 8), (9, 4, 5), (7, 6, 8), (9, 4, 5)]
    check(make(shapes, torch.float32, device))


def test_more_layers_than_a_launch_takes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = make(MIXED * 3, torch.float32, device, masked=True)
    whole = fused(layers, upstream(layers))
    monkeypatch.setattr(shared, "MAX_LAYERS", 2)
    parts = fused(layers, upstream(layers))
    for name in Results._fields:
        for a, b in zip(getattr(whole, name), getattr(parts, name), strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_nothing_counts(dtype: torch.dtype, device: str) -> None:
    """Exactly 0, whatever the rows hold and even where the projection is not finite."""
    layers = make([(9, 4, 5), (BLOCK_M + 2, 6, 3)], dtype, device)
    for x in (*layers.students, *layers.teachers):
        x.fill_(float("nan"))
    layers.masks[:] = [torch.zeros(len(x), dtype=torch.bool, device=device) for x in layers[0]]
    ours = fused(layers, upstream(layers))
    for x in (*ours.losses, *ours.d_students, *ours.d_weights):
        assert not x.any()  # nan is true
    layers.weights[0].fill_(float("inf"))
    losses, residuals, _ = kernel.hidden_mse_forward(*layers, need_residual=True)
    assert not losses.any()
    assert not residuals[0].any()


def test_masked_rows_have_no_effect(device: str) -> None:
    """Bit for bit, and their own gradient is exactly 0."""
    poisoned = make([(BLOCK_M + 9, 12, 11)], torch.float32, device, masked=True)
    mask = poisoned.masks[0]
    clean = poisoned._replace(
        students=[torch.where(mask[:, None], poisoned.students[0], 3.0)],
        teachers=[torch.where(mask[:, None], poisoned.teachers[0], -7.0)],
    )
    grad = torch.full((1,), 0.3, device=device)
    a, b = fused(poisoned, grad), fused(clean, grad)
    assert not a.d_students[0][~mask].any()
    for x, y in zip((*a.losses, *a[1], *a[2]), (*b.losses, *b[1], *b[2]), strict=True):
        assert torch.equal(x, y)


def test_a_nan_that_counts_is_not_hidden(device: str) -> None:
    layers = make([(6, 4, 5), (3, 4, 5)], torch.float32, device)
    layers.students[0][2, 1] = float("nan")
    losses, residuals, _ = kernel.hidden_mse_forward(*layers, need_residual=True)
    assert losses.isnan().tolist() == [True, False]
    assert residuals[0].isnan().any(1).tolist() == [False, False, True, False, False, False]


def test_strided_rows_and_transposed_projections(device: str) -> None:
    """Any layout gives the same bits, and no input is written to."""
    plain = make(MIXED, torch.float32, device, masked=True)

    def padded(x: Tensor) -> Tensor:
        wide = torch.full((len(x), x.shape[1] + 5), float("nan"), device=x.device)
        wide[:, 2:-3] = x
        return wide[:, 2:-3]

    strided = Layers(
        [padded(x) for x in plain.students],
        [x.t().contiguous().t() if i else padded(x) for i, x in enumerate(plain.teachers)],
        [x.t().contiguous().t() for x in plain.weights],
        [None if m is None else m.repeat_interleave(2)[::2] for m in plain.masks],
    )
    kept = [[None if x is None else x.clone() for x in group] for group in strided]
    a, b = fused(plain, upstream(plain)), fused(strided, upstream(plain))
    for name in Results._fields:
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            assert torch.equal(x, y), name
    for before, after in zip(kept, strided, strict=True):
        for x, y in zip(before, after, strict=True):
            assert x is y is None or torch.equal(x.nan_to_num(), y.nan_to_num())


def test_projection_and_teacher_of_other_dtypes(device: str) -> None:
    """As under autocast: computed in the students' dtype, dW in the weight's own."""
    half = make(MIXED[:3], torch.float16, device, masked=True)
    mixed = half._replace(
        teachers=[x.float() for x in half.teachers], weights=[x.float() for x in half.weights]
    )
    a, b = fused(half, upstream(half)), fused(mixed, upstream(half))
    assert all(torch.equal(x, y) for x, y in zip(a.losses, b.losses, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a.d_students, b.d_students, strict=True))
    for x, y in zip(a.d_weights, b.d_weights, strict=True):
        assert y.dtype == torch.float32
        assert torch.equal(x, y.half())


def test_float16_gradients_do_not_overflow_or_vanish(device: str) -> None:
    """2 / n is below float16's least number and the sums of dW are above its greatest."""
    layers = make([(600, 3, 4)], torch.float16, device)
    layers.students[0].fill_(30.0)
    layers.teachers[0].fill_(-200.0)
    check(layers, torch.full((1,), 0.01, device=device))
    scale = kernel.hidden_mse_forward(*layers, need_residual=True)[2].clone()
    assert scale.item() == pytest.approx(2 / 2400)
