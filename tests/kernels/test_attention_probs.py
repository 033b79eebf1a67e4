"""The head-averaged attention-probability kernels against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from kernel_probs import (
    EDGES,
    FEW,
    GROUPED,
    INTERIOR,
    MARKS,
    MIXED,
    Results,
    Shape,
    assert_same,
    check,
    forward,
    fused,
    make,
    no_float64,
    on_each_path,
    on_two_paths,
    upstream,
    valid_pairs,
    with_log_sums,
)
from optima_fast.kernels import launch
from optima_fast.kernels import layers as shared

pytestmark = MARKS


@on_each_path
@pytest.mark.parametrize("shape", EDGES, ids=lambda s: "x".join(str(int(n)) for n in s[:8]))
def test_one_layer(shape: Shape, path: None, dtype: torch.dtype, device: str) -> None:
    layers = make([shape], dtype, device, masked=True)
    ours = check(layers, torch.full((1,), -2.5, device=device))
    assert ours.losses[0].dtype == torch.float32
    assert ours.d_q[0].dtype == ours.d_k[0].dtype == dtype


@on_two_paths
@pytest.mark.parametrize("shape", INTERIOR, ids=lambda s: "x".join(str(int(n)) for n in s[:8]))
def test_one_layer_without_masks(shape: Shape, path: None, dtype: torch.dtype, device: str) -> None:
    check(make([shape], dtype, device), torch.full((1,), -2.5, device=device))


@on_two_paths
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_grouped_queries(masked: bool, path: None, dtype: torch.dtype, device: str) -> None:
    ours = check(make(GROUPED, dtype, device, masked))
    assert [x.shape[1] for x in ours.d_k] == [s.H_S // s.share[0] for s in GROUPED]


@on_two_paths
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_layers_of_different_shapes_some_empty(
    masked: bool, path: None, dtype: torch.dtype, device: str
) -> None:
    ours = check(make(MIXED, dtype, device, masked))
    assert [i for i, x in enumerate(ours.losses) if not x] == [1, 3, 5]
    assert not ours.d_q[3].any()  # queries without a key
    assert not ours.d_k[5].any()  # keys without a query


@no_float64
@pytest.mark.parametrize("path", ["rows", "sweeps"], indirect=True)
def test_float64(path: None) -> None:
    check(make([MIXED[0], MIXED[2]], torch.float64, "cpu", masked=True))


@on_two_paths
def test_one_launch_is_as_many(
    path: None, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: a call again, layers one by one, and a call that takes several launches."""
    layers = make(FEW, dtype, device, masked=True)
    grad = upstream(layers)
    whole = fused(layers, grad)
    assert_same(whole, fused(layers, grad))
    alone = [fused(layers.layer(i), grad[i : i + 1]) for i in range(len(grad))]
    assert_same(whole, Results(*([x for (x,) in group] for group in zip(*alone, strict=True))))
    monkeypatch.setattr(shared, "MAX_LAYERS", 2)
    assert_same(whole, fused(layers, grad))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_residuals_are_zero_where_nothing_counts(
    masked: bool, causal: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the rows' padding too: 77 tokens are a tile, its tail and 3 places of padding."""
    for key in [x for x in launch.PROBS_ROWS_FORWARD if x[2:] == (64, 64)]:
        entry = launch.PROBS_ROWS_FORWARD[key]._replace(block_m=64)
        monkeypatch.setitem(launch.PROBS_ROWS_FORWARD, key, entry)
    for n, path in ((77, "rows"), (130, "rows"), (260, "sweeps")):
        layers = make([Shape(1, 1, 16, 2, 16, n, n, causal)], torch.float16, device, masked)
        _, kept = forward(layers)
        (residual,) = kept.residuals
        assert residual.shape[2] % 16 == 0, path
        counts = torch.zeros(residual.shape, dtype=torch.bool, device=device)
        counts[..., :n] = valid_pairs(layers, 0)
        assert residual[counts].any(), path
        assert not residual[~counts].any(), path


@on_two_paths
def test_log_sums_that_are_given(path: None, dtype: torch.dtype, device: str) -> None:
    """Within rounding the same; a query that sees no key may come with nan."""
    layers = make(FEW, dtype, device, masked=True)
    check(with_log_sums(layers))
    some = with_log_sums(layers)
    some.student_lse[0] = some.teacher_lse[2] = None
    check(some)
    wide = with_log_sums(layers, torch.float64)
    strided = wide._replace(
        student_lse=[x.transpose(1, 2).contiguous().transpose(1, 2) for x in wide.student_lse]
    )
    assert_same(fused(strided), fused(with_log_sums(layers)))


@on_each_path
def test_scales_of_either_sign_and_zero(path: None, dtype: torch.dtype, device: str) -> None:
    """A scale of 0 makes maps uniform over the keys that count."""
    layers = make([FEW[0]] * 3, dtype, device, masked=True)
    check(layers._replace(student_scale=[-0.5, 0.0, 0.25], teacher_scale=[0.5, -0.75, 0.0]))
