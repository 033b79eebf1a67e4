"""The head-averaged attention-score kernels against float64, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import tolerance
import torch
from torch import Tensor

from optima_fast.losses import reference

pytest.importorskip("triton")

from optima_fast.kernels import attention_scores as kernel
from optima_fast.kernels import launch
from optima_fast.kernels import layers as shared
from optima_fast.kernels.attention_tiles import MAX_STRIDE, Model, is_dense

ON_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # what a mask hides enters products, whose result is then discarded
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning"),
]

DTYPES = [
    torch.float16,
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not ON_GPU, reason="the interpreter multiplies the bit patterns of bfloat16"
        ),
    ),
]
no_float64 = pytest.mark.skipif(ON_GPU, reason="float64 is for gradcheck in the interpreter")
NAN, INF = float("nan"), float("inf")


class Shape(NamedTuple):
    """Of one layer: batch, student's heads and their size, teacher's, queries, keys."""

    B: int
    H_S: int
    D_S: int
    H_T: int
    D_T: int
    N_Q: int
    N_K: int
    causal: bool = False
    share: tuple[int, int] = (1, 1)  # heads of a model's queries for each of its keys'


class Layers(NamedTuple):
    student_q: list[Tensor]
    student_k: list[Tensor]
    teacher_q: list[Tensor]
    teacher_k: list[Tensor]
    query_masks: list[Tensor | None]
    key_masks: list[Tensor | None]
    causal: list[bool]
    student_scale: list[float]
    teacher_scale: list[float]

    def layer(self, i: int) -> Layers:
        return Layers(*([x[i]] for x in self))


class Results(NamedTuple):
    losses: list[Tensor]
    d_q: list[Tensor | None]
    d_k: list[Tensor | None]


BLOCK_M, BLOCK_N, BLOCK_K = launch.lookup(launch.SCORES_FORWARD, (8, 0), 2, 128)[:3]
EDGES = [
    Shape(1, 1, 1, 1, 1, 1, 1),
    Shape(2, 2, 5, 3, 7, 3, 9),
    Shape(1, 1, BLOCK_K, 2, BLOCK_K // 2, 64, 64, causal=True),
    Shape(1, 2, BLOCK_K + 1, 1, 2 * BLOCK_K, BLOCK_M + 1, BLOCK_N + 1),
    Shape(2, 1, 16, 3, 16, 65, 65, causal=True),
    Shape(1, 3, 4, 2, 6, 7, BLOCK_N + 16, causal=True),
    Shape(1, 2, 65, 1, 3, 2 * BLOCK_N + 3, 5, causal=True),
]
# keys that heads share: in one model or in both
GROUPED = [
    Shape(2, 4, 8, 6, 20, 20, 20, share=(2, 3)),
    Shape(1, 4, 2 * BLOCK_K, 3, 16, BLOCK_M, BLOCK_N, share=(4, 1)),
    Shape(1, 2, 16, 4, 16, 40, 70, causal=True, share=(1, 2)),
]
MIXED = [
    Shape(2, 2, 8, 3, 6, 66, 17),
    Shape(0, 2, 4, 2, 4, 5, 5),
    Shape(1, 4, 3, 1, 20, 9, 70, causal=True),
    Shape(2, 1, 6, 2, 6, 4, 0),
    Shape(1, 2, 7, 2, 5, 1, 3),
    Shape(3, 1, 6, 2, 6, 0, 4, causal=True),
]


def make(
    shapes: list[Shape], dtype: torch.dtype, device: str, masked: bool = False, seed: int = 0
) -> Layers:
    """Layers of tokens' heads side by side; if masked, masks of queries, of keys or of both.

    What a mask hides is nan and inf.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = Layers(*([] for _ in Layers._fields))
    for i, (B, H_S, D_S, H_T, D_T, N_Q, N_K, causal, share) in enumerate(shapes):
        student, teacher = ((H_S, H_S // share[0], D_S), (H_T, H_T // share[1], D_T))
        sides = [
            (h, d, n)
            for *heads, d in (student, teacher)
            for h, n in zip(heads, (N_Q, N_K), strict=True)
        ]
        masks: list[Tensor | None] = []
        for n, wanted in ((N_Q, i % 3 != 1), (N_K, i % 3 != 2)):
            mask = torch.rand(B, n, generator=generator) < 0.7
            if mask.shape[0]:
                mask[0, :1] = True
            masks.append(mask if masked and wanted else None)
        for group, mask, fill, (H, D, n) in zip(
            layers, masks * 2, (NAN, INF, -INF, NAN), sides, strict=False
        ):
            # a mean that is not 0, so that a lost term or factor cannot hide in the noise
            x = torch.randn(B, n, H, D, generator=generator, dtype=torch.float64) + 0.3
            if mask is not None:
                x[~mask] = fill
            group.append(x.to(device, dtype).transpose(1, 2))
        layers.query_masks.append(None if masks[0] is None else masks[0].to(device))
        layers.key_masks.append(None if masks[1] is None else masks[1].to(device))
        layers.causal.append(causal)
        # kernels take a scale as float32: one that float32 holds, so that float64 is exact
        for scales, scale in (
            (layers.student_scale, D_S**-0.5),
            (layers.teacher_scale, 1.7 * D_T**-0.5),
        ):
            scales.append(torch.tensor(scale, dtype=torch.float32).item())
    return layers


def upstream(layers: Layers) -> Tensor:
    """Gradients that differ from layer to layer and are not 1."""
    student = layers.student_q[0]
    dtype = torch.promote_types(student.dtype, torch.float32)
    return torch.linspace(-2.5, 3.0, len(layers.student_q), dtype=dtype, device=student.device)


def forward(layers: Layers, need_residual: bool = True) -> tuple[Tensor, list[Tensor], Tensor]:
    return kernel.attention_scores_forward(
        *layers[:6],
        causal=layers.causal,
        student_scale=layers.student_scale,
        teacher_scale=layers.teacher_scale,
        need_residual=need_residual,
    )


def backward(
    layers: Layers,
    grad: Tensor,
    kept: tuple[list[Tensor], Tensor],
    need_q: list[bool] | None = None,
    need_k: list[bool] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    every = [True] * len(layers.student_q)
    return kernel.attention_scores_backward(
        grad,
        layers.student_q,
        layers.student_k,
        layers.query_masks,
        layers.key_masks,
        *kept,
        causal=layers.causal,
        student_scale=layers.student_scale,
        need_q=every if need_q is None else need_q,
        need_k=every if need_k is None else need_k,
        dtype=dtype,
    )


def fused(layers: Layers, grad: Tensor | None = None) -> Results:
    losses, *kept = forward(layers)
    grad = upstream(layers) if grad is None else grad
    return Results(list(losses), *backward(layers, grad, (kept[0], kept[1])))


def autograd(layers: Layers, grad: Tensor, dtype: torch.dtype | None = None) -> Results:
    """Plain PyTorch in the inputs' dtype, its squares wider; or all in another dtype."""
    results = Results([], [], [])
    for i in range(len(layers.student_q)):
        sq, sk, tq, tk, qm, km, causal, s_scale, t_scale = (x[0] for x in layers.layer(i))
        if dtype is not None:
            sq, sk, tq, tk = (x.to(dtype) for x in (sq, sk, tq, tk))
        sq, sk = (x.detach().clone().requires_grad_() for x in (sq, sk))
        valid = reference.valid_pairs(qm, km, causal, sq, sk.shape[2])
        student = reference.attention_maps(sq, sk, valid, target="scores", scale=s_scale)[:, 0]
        teacher = reference.attention_maps(tq, tk, valid, target="scores", scale=t_scale)[:, 0]
        residual = torch.where(valid, student - teacher, 0)
        square = residual.to(torch.promote_types(residual.dtype, torch.float32)).square()
        loss = square.sum() / valid.sum().clamp(min=1)
        loss.backward(grad[i].to(loss.dtype))
        results.losses.append(loss.detach())
        results.d_q.append(sq.grad)
        results.d_k.append(sk.grad)
    return results


def check(layers: Layers, grad: Tensor | None = None) -> Results:
    """Every loss and gradient by the rule of tests/tolerance.py."""
    grad = upstream(layers) if grad is None else grad
    ours, eager = fused(layers, grad), autograd(layers, grad)
    exact = autograd(layers, grad, torch.float64)
    for name in Results._fields:
        rows = zip(getattr(ours, name), getattr(eager, name), getattr(exact, name), strict=True)
        for i, (actual, plain, truth) in enumerate(rows):
            assert actual.isfinite().all(), f"{name}[{i}]"
            tolerance.assert_as_good_as_eager(f"{name}[{i}]", actual, plain, truth)
    return ours


def assert_same(a: Results, b: Results) -> None:
    for name in Results._fields:
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            assert torch.equal(x, y), name


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
