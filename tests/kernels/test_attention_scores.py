"""The head-averaged attention-score kernels against float64, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernel_scores import (
    DTYPES,
    EDGES,
    GROUPED,
    INF,
    MARKS,
    MIXED,
    NAN,
    Layers,
    Results,
    Shape,
    assert_same,
    check,
    forward,
    fused,
    make,
    no_float64,
    upstream,
)
from optima_fast.kernels import attention_scores as kernel
from optima_fast.kernels import layers as shared
from optima_fast.kernels.attention_tiles import Model, is_dense

pytestmark = MARKS


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", EDGES, ids=lambda s: "x".join(str(int(n)) for n in s[:8]))
def test_one_layer(shape: Shape, masked: bool, dtype: torch.dtype, device: str) -> None:
    layers = make([shape], dtype, device, masked)
    ours = check(layers, torch.full((1,), -2.5, device=device))
    assert ours.losses[0].dtype == torch.float32
    assert ours.d_q[0].dtype == ours.d_k[0].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("contiguous", [False, True], ids=["side by side", "contiguous"])
def test_grouped_queries(contiguous: bool, masked: bool, dtype: torch.dtype, device: str) -> None:
    layers = make(GROUPED, dtype, device, masked)
    if contiguous:
        layers = Layers(*([x.contiguous() for x in y] for y in layers[:4]), *layers[4:])
    ours = check(layers)
    assert [x.shape[1] for x in ours.d_k] == [s.H_S // s.share[0] for s in GROUPED]


@pytest.mark.parametrize(
    "dtype",
    [*DTYPES, pytest.param(torch.float64, marks=no_float64)],
    ids=lambda d: str(d).removeprefix("torch."),
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_layers_of_different_shapes_some_empty(
    masked: bool, dtype: torch.dtype, device: str
) -> None:
    ours = check(make(MIXED, dtype, device, masked))
    assert [i for i, x in enumerate(ours.losses) if not x] == [1, 3, 5]
    assert not ours.d_q[3].any()  # queries without a key
    assert not ours.d_k[5].any()  # keys without a query


def test_one_launch_is_as_many(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: a call of many layers, of one each, and one that takes several launches."""
    layers = make(MIXED, torch.float32, device, masked=True)
    grad = upstream(layers)
    whole = fused(layers, grad)
    assert_same(whole, fused(layers, grad))
    alone = [fused(layers.layer(i), grad[i : i + 1]) for i in range(len(grad))]
    assert_same(whole, Results(*([x for (x,) in group] for group in zip(*alone, strict=True))))
    monkeypatch.setattr(shared, "MAX_LAYERS", 1)
    assert_same(whole, fused(layers, grad))


def test_only_empty_layers(device: str) -> None:
    ours = fused(make([MIXED[1], MIXED[3], MIXED[5]], torch.float32, device))
    assert [x.item() for x in ours.losses] == [0, 0, 0]
    assert [tuple(x.shape) for x in ours.d_q] == [(0, 2, 5, 4), (2, 1, 4, 6), (3, 1, 0, 6)]
    assert not any(x.any() for x in (*ours.d_q, *ours.d_k))


def test_more_tiles_than_the_second_sum_takes_at_once(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "TOTAL_BLOCK", 2)
    check(make([Shape(2, 1, 3, 1, 3, 65, 65), MIXED[4]], torch.float32, device))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_all_masked(side: str, causal: bool, device: str) -> None:
    """The whole of one layer, one item of the other."""
    shape = Shape(2, 2, 3, 1, 4, 5, 6, causal)
    layers = make([shape, shape], torch.float32, device)
    masks = layers.query_masks if side == "queries" else layers.key_masks
    for i in range(2):
        masks[i] = torch.ones(2, 5 if side == "queries" else 6, dtype=torch.bool, device=device)
        masks[i][i:] = False
        for x in layers[:4]:
            x[i][i:] = NAN
    ours = check(layers)
    assert ours.losses[0] == 0 != ours.losses[1]
    assert not ours.d_q[0].any()
    assert not ours.d_k[0].any()
    assert not ours.d_q[1][1].any()
    assert not ours.d_k[1][1].any()


def test_masked_rows_have_no_effect(device: str) -> None:
    """Bit for bit, and their own gradient is exactly 0."""
    poisoned = make(
        [Shape(2, 2, 4, 3, 5, 67, 30), Shape(2, 2, 4, 1, 5, 20, 67, causal=True)],
        torch.float32,
        device,
    )
    clean = poisoned._replace(**{name: [] for name in Layers._fields[:4]})
    generator = torch.Generator().manual_seed(1)
    for i in range(2):
        n_q, n_k = poisoned.student_q[i].shape[2], poisoned.student_k[i].shape[2]
        poisoned.query_masks[i] = (torch.rand(2, n_q, generator=generator) < 0.6).to(device)
        poisoned.key_masks[i] = (torch.rand(2, n_k, generator=generator) < 0.6).to(device)
        for x, y, masks in zip(
            poisoned, clean, (poisoned.query_masks, poisoned.key_masks) * 2, strict=False
        ):
            hidden = ~masks[i][:, None, :, None]
            y.append(x[i].clone().masked_fill_(hidden, 3.0))
            x[i].masked_fill_(hidden, NAN)
    a, b = fused(poisoned), fused(clean)
    assert_same(a, b)
    for i in range(2):
        assert not a.d_q[i].transpose(1, 2)[~poisoned.query_masks[i]].any()
        assert not a.d_k[i].transpose(1, 2)[~poisoned.key_masks[i]].any()


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("n_q", "n_k"), [(9, 30), (40, 7), (20, 20)])
def test_rows_that_causality_hides_may_hold_nan(
    n_q: int, n_k: int, masked: bool, device: str
) -> None:
    """Keys after the last query that counts, and queries before the first key that does."""
    layers = make([Shape(2, 2, 3, 1, 4, n_q, n_k, causal=True)], torch.float32, device)
    first, last = (3, n_q - 4) if masked else (0, n_q - 1)
    if masked:
        layers.key_masks[0] = (torch.arange(n_k, device=device) >= first).repeat(2, 1)
        layers.query_masks[0] = (torch.arange(n_q, device=device) <= last).repeat(2, 1)
    for q, k in (layers[:2], layers[2:4]):
        q[0][:, :, :first] = INF
        k[0][:, :, last + 1 :] = NAN
    ours = check(layers)
    assert not ours.d_q[0][:, :, :first].any()
    assert not ours.d_k[0][:, :, last + 1 :].any()


def test_a_nan_that_counts_is_not_hidden(device: str) -> None:
    layers = make([Shape(2, 2, 3, 1, 4, 5, 6)] * 2, torch.float32, device)
    layers.student_q[0][1, 1, 2, 0] = NAN
    losses, residuals, _ = forward(layers)
    assert losses.isnan().tolist() == [True, False]
    assert residuals[0].isnan().all(2).tolist() == [[False] * 5, [i == 2 for i in range(5)]]


def permuted(x: Tensor, *order: int) -> Tensor:
    """The same values; in memory the dimensions follow one another in this order."""
    return x.permute(order).contiguous().permute(*(order.index(i) for i in range(4)))


def fused_projection(x: Tensor) -> Tensor:
    """The same values as a view of the queries', keys' and values' common projection."""
    B, H, N, d = x.shape
    wide = torch.full((B, N, 3, H, d), NAN, dtype=x.dtype, device=x.device)
    wide[:, :, 1] = x.transpose(1, 2)
    return wide[:, :, 1].transpose(1, 2)


def padded(x: Tensor) -> Tensor:
    """The same values in the middle of wider rows."""
    wide = x.new_full((*x.shape[:3], x.shape[3] + 5), NAN)
    wide[..., 2:-3] = x
    return wide[..., 2:-3]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda x: permuted(x, 0, 2, 1, 3),
    "heads": lambda x: permuted(x, 0, 1, 2, 3),
    "sequence first": lambda x: permuted(x, 2, 0, 1, 3),
    "fused projection": fused_projection,
    "padded": padded,
    "one head for all": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
    "features first": lambda x: permuted(x, 0, 1, 3, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str) -> None:
    """Read where they lie unless features are apart; inputs stay as they are."""
    shapes = [Shape(2, 3, 5, 2, 8, 9, 12, causal=True), Shape(2, 2, 16, 4, 4, 6, 8)]
    layers = make(shapes, torch.float32, device)
    for x in layers[:4]:
        x[:] = [LAYOUTS[layout](y) for y in x]
    for i in range(2):
        wide = torch.arange(2 * shapes[i].N_K, device=device).repeat(2, 1)
        layers.key_masks[i] = (wide % 5 != 1)[:, ::2]
    kept = [[x.clone() for x in group] for group in layers[:4]]
    ours = check(layers)
    for before, after in zip(kept, layers, strict=False):
        for x, y in zip(before, after, strict=True):
            assert torch.equal(x, y)
            assert is_dense(y) == (layout != "features first")
    for gradients, inputs in ((ours.d_q, layers.student_q), (ours.d_k, layers.student_k)):
        for x, y in zip(gradients, inputs, strict=True):
            assert x.stride() == torch.empty_like(y).stride()


def test_heads_side_by_side_are_one_product() -> None:
    """Where a token's heads lie together, in queries and in keys; elsewhere head by head."""
    x = torch.zeros(2, 3, 4, 5)
    tokens = permuted(x, 0, 2, 1, 3)
    for q, k, shape in (
        (tokens, tokens, (2, 1, 4, 15)),
        (tokens, x, (2, 3, 4, 5)),
        (fused_projection(x), fused_projection(x), (2, 1, 4, 15)),
    ):
        joined = kernel._joined(Model([q], [k], [1.0]))
        assert joined.q[0].shape == joined.k[0].shape == shape
        assert joined.q[0].data_ptr() == q.data_ptr()


def test_a_teacher_of_another_dtype(device: str) -> None:
    half = make(MIXED[:3], torch.float16, device, masked=True)
    mixed = half._replace(
        teacher_q=[x.float() for x in half.teacher_q], teacher_k=[x.float() for x in half.teacher_k]
    )
    assert_same(fused(half), fused(mixed))


def test_scales(device: str) -> None:
    """Of either sign, and 0: no gradient without the student, one without the teacher."""
    layers = make([MIXED[4]] * 4, torch.float32, device)._replace(
        student_scale=[-0.7, 0.0, 1e-3, 0.0], teacher_scale=[0.2, -1.5, 0.0, 0.0]
    )
    ours = check(layers)
    assert not ours.d_q[1].any()
    assert not ours.losses[3]
    assert ours.losses[1] > 0
    assert ours.d_q[2].any()
