"""The kernels of head-averaged probabilities against float64, in the interpreter or on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import tolerance
import torch
from torch import Tensor

from optima_fast.losses import reference

pytest.importorskip("triton")

from optima_fast.kernels import attention_probs as kernel
from optima_fast.kernels import core, launch, probs_rows
from optima_fast.kernels import layers as shared

ON_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # what a mask hides enters products, whose result is then discarded
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]

BFLOAT16 = pytest.mark.skipif(
    not ON_GPU, reason="the interpreter multiplies the bit patterns of bfloat16"
)
# a row of a map in registers, up to 256 keys and not for float32, or several sweeps
CASES = [
    pytest.param("rows", torch.float16, id="rows-float16"),
    pytest.param("rows", torch.bfloat16, id="rows-bfloat16", marks=BFLOAT16),
    pytest.param("sweeps", torch.float16, id="sweeps-float16"),
    pytest.param("sweeps", torch.bfloat16, id="sweeps-bfloat16", marks=BFLOAT16),
    pytest.param("sweeps", torch.float32, id="sweeps-float32"),
]
no_float64 = pytest.mark.skipif(ON_GPU, reason="float64 is for gradcheck in the interpreter")
NAN, INF = float("nan"), float("inf")
MODELS = ("student", "teacher")


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
    student_lse: list[Tensor | None]
    teacher_lse: list[Tensor | None]
    causal: list[bool]
    student_scale: list[float]
    teacher_scale: list[float]

    def layer(self, i: int) -> Layers:
        return Layers(*([x[i]] for x in self))


class Kept(NamedTuple):
    residuals: list[Tensor]
    lses: list[Tensor]
    scales: Tensor


class Results(NamedTuple):
    losses: list[Tensor]
    d_q: list[Tensor | None]
    d_k: list[Tensor | None]


# tiles as small as products allow, so that a few tokens reach past their edges
TILES = {
    "PROBS_LSE": (32, 16),
    "PROBS_RESIDUAL": (32, 16),
    "PROBS_DQ": (16, 32),
    "PROBS_DK": (32, 16),
    "PROBS_ONE_BLOCK": (16, 16),
    "PROBS_ROWS_FORWARD": (32, 64),
    "PROBS_ROWS_BACKWARD": (32, 64),
}
EDGES = [
    Shape(1, 1, 1, 1, 1, 1, 1),
    Shape(2, 2, 5, 3, 20, 3, 9),
    Shape(1, 2, 16, 1, 32, 16, 32, causal=True),
    Shape(1, 2, 20, 2, 72, 17, 33),
    Shape(2, 2, 24, 1, 16, 33, 33, causal=True),
    Shape(1, 1, 33, 2, 8, 18, 70, causal=True),
    Shape(1, 2, 8, 1, 64, 70, 18, causal=True),
]
# with nothing masked: tiles that are whole, and those at an edge
INTERIOR = [
    Shape(2, 2, 16, 3, 32, 64, 96),
    Shape(1, 2, 16, 1, 16, 96, 96, causal=True),
    Shape(1, 1, 20, 2, 16, 70, 50),
    Shape(1, 1, 16, 2, 16, 70, 70, causal=True),
    Shape(1, 2, 16, 1, 16, 16, 96),
    Shape(1, 1, 20, 1, 16, 9, 40),
    Shape(1, 3, 16, 1, 16, 40, 70),
    Shape(1, 1, 16, 2, 16, 40, 70, causal=True),
]
# keys that heads share: one block of queries and several, one model or both
GROUPED = [
    Shape(2, 4, 8, 6, 20, 20, 20, share=(2, 3)),
    Shape(1, 4, 16, 3, 16, 40, 70, causal=True, share=(4, 1)),
    Shape(1, 2, 16, 4, 16, 40, 50, share=(1, 2)),
]
MIXED = [
    Shape(2, 2, 8, 3, 6, 34, 17),
    Shape(0, 2, 4, 2, 4, 5, 5),
    Shape(1, 2, 3, 1, 20, 34, 40, causal=True),
    Shape(2, 1, 6, 2, 6, 4, 0),
    Shape(1, 2, 7, 2, 5, 1, 3),
    Shape(3, 1, 6, 2, 6, 0, 4, causal=True),
]
FEW = [
    Shape(1, 2, 3, 1, 20, 18, 17, causal=True),
    Shape(2, 1, 6, 2, 6, 4, 0),
    Shape(2, 1, 7, 2, 5, 1, 33),
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (block_m, block_n) in TILES.items():
        table = getattr(launch, name)
        for key, entry in table.items():
            monkeypatch.setitem(table, key, entry._replace(block_m=block_m, block_n=block_n))


@pytest.fixture
def path(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small_tiles: None
) -> None:
    """What CASES names."""
    if request.param == "sweeps":
        monkeypatch.setattr(probs_rows, "tiles", lambda *args: None)
    else:  # a program takes several heads, as where there are many
        monkeypatch.setattr(probs_rows, "ENOUGH_PROGRAMS", 1)
        monkeypatch.setattr(probs_rows, "HEADS_AT_ONCE", 2)


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
            # maps far from uniform, so that a lost term or factor cannot hide
            x = torch.randn(B, n, H, D, generator=generator, dtype=torch.float64) * 1.5 + 0.3
            if mask is not None:
                x[~mask] = fill
            group.append(x.to(device, dtype).transpose(1, 2))
        layers.query_masks.append(None if masks[0] is None else masks[0].to(device))
        layers.key_masks.append(None if masks[1] is None else masks[1].to(device))
        layers.student_lse.append(None)
        layers.teacher_lse.append(None)
        layers.causal.append(causal)
        # kernels take a scale as float32: one that float32 holds, so that float64 is exact
        for scales, scale in (
            (layers.student_scale, D_S**-0.5),
            (layers.teacher_scale, 1.3 * D_T**-0.5),
        ):
            scales.append(torch.tensor(scale, dtype=torch.float32).item())
    return layers


def valid_pairs(layers: Layers, i: int) -> Tensor:
    return reference.valid_pairs(
        layers.query_masks[i],
        layers.key_masks[i],
        layers.causal[i],
        layers.student_q[i],
        layers.student_k[i].shape[2],
    )


def log_sums(layers: Layers, i: int, side: str) -> Tensor:
    """[B, H, Nq] in float64, nan where nothing counts."""
    q, k = (getattr(layers, f"{side}_{x}")[i].double().nan_to_num(0, 0, 0) for x in "qk")
    scores = q @ k.transpose(-1, -2) * getattr(layers, f"{side}_scale")[i]
    valid = valid_pairs(layers, i)[:, None]
    lse = scores.masked_fill(~valid, -INF).logsumexp(-1)
    return lse.masked_fill(~valid.any(-1), NAN)


def with_log_sums(layers: Layers, dtype: torch.dtype = torch.float32) -> Layers:
    every = range(len(layers.student_q))
    given = ([log_sums(layers, i, side).to(dtype) for i in every] for side in MODELS)
    return layers._replace(**dict(zip(("student_lse", "teacher_lse"), given, strict=True)))


def upstream(layers: Layers) -> Tensor:
    """Gradients that differ from layer to layer and are not 1."""
    student = layers.student_q[0]
    dtype = torch.promote_types(student.dtype, torch.float32)
    return torch.linspace(-2.5, 3.0, len(layers.student_q), dtype=dtype, device=student.device)


def forward(layers: Layers, need_residual: bool = True) -> tuple[Tensor, Kept]:
    losses, *kept = kernel.attention_probs_forward(
        *layers[:8],
        causal=layers.causal,
        student_scale=layers.student_scale,
        teacher_scale=layers.teacher_scale,
        need_residual=need_residual,
    )
    return losses, Kept(*kept)


def backward(
    layers: Layers,
    grad: Tensor,
    kept: Kept,
    need_q: list[bool] | None = None,
    need_k: list[bool] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    every = [True] * len(layers.student_q)
    return kernel.attention_probs_backward(
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
    losses, kept = forward(layers)
    return Results(
        list(losses), *backward(layers, upstream(layers) if grad is None else grad, kept)
    )


def autograd(layers: Layers, grad: Tensor, dtype: torch.dtype | None = None) -> Results:
    """Plain PyTorch in the inputs' dtype, its squares wider; or all in another dtype."""
    results = Results([], [], [])
    for i in range(len(layers.student_q)):
        sq, sk, tq, tk = (x[i] if dtype is None else x[i].to(dtype) for x in layers[:4])
        sq, sk = (x.detach().clone().requires_grad_() for x in (sq, sk))
        valid = valid_pairs(layers, i)
        maps = (
            reference.attention_maps(q, k, valid, target="probs", scale=scale[i])[:, 0]
            for q, k, scale in ((sq, sk, layers.student_scale), (tq, tk, layers.teacher_scale))
        )
        residual = torch.where(valid, next(maps) - next(maps), 0)
        square = residual.to(torch.promote_types(residual.dtype, torch.float32)).square()
        loss = square.sum() / valid.sum().clamp(min=1)
        loss.backward(grad[i].to(loss.dtype))
        results.losses.append(loss.detach())
        results.d_q.append(sq.grad)
        results.d_k.append(sk.grad)
    return results


def cancelling(layers: Layers, i: int, grad: Tensor, loss: Tensor) -> tuple[float, float, float]:
    """Bounds of what cancels in a loss, in dQ and in dK: maps reach 1 where R may be 0."""
    q, k = (x[i].double().nan_to_num(0, 0, 0) for x in layers[:2])
    if not q.numel() or not k.numel():
        return 0, 0, 0
    eps = torch.finfo(torch.promote_types(layers.student_q[i].dtype, torch.float32)).eps
    n = valid_pairs(layers, i).sum().clamp(min=1)
    factor = 2 * grad[i].abs() * abs(layers.student_scale[i]) / (n * q.shape[1])
    return (
        loss.sqrt().item() + eps,
        (factor * k.abs().max()).item(),
        (factor * q.abs().max()).item(),
    )


def check(layers: Layers, grad: Tensor | None = None) -> Results:
    """Every loss and gradient by the rule of tests/tolerance.py.

    Its floor: 2 eps of the stored dtype of the result, and 2 eps of sums of what cancels in it.
    """
    grad = upstream(layers) if grad is None else grad
    ours, eager = fused(layers, grad), autograd(layers, grad)
    exact = autograd(layers, grad, torch.float64)
    for i, rows in enumerate(zip(*ours, *eager, *exact, strict=True)):
        sizes = cancelling(layers, i, grad, rows[6])
        for j, name in enumerate(Results._fields):
            actual, plain, truth = rows[j::3]
            assert actual.isfinite().all(), f"{name}[{i}]"
            wide = torch.promote_types(actual.dtype, torch.float32)
            ratio = torch.finfo(wide).eps / torch.finfo(actual.dtype).eps
            size = truth.abs().max().item() if truth.numel() else 0.0
            tolerance.assert_as_good_as_eager(
                f"{name}[{i}]", actual, plain, truth, scale=size + ratio * sizes[j]
            )
    return ours


def assert_same(a: Results, b: Results) -> None:
    for name in Results._fields:
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            assert torch.equal(x, y), name


on_each_path = pytest.mark.parametrize(("path", "dtype"), CASES, indirect=["path"])
# float16 in sweeps differs from float32 there by shifts alone, which test_one_layer sees
on_two_paths = pytest.mark.parametrize(
    ("path", "dtype"),
    [
        pytest.param(*c.values, id=c.id, marks=[*c.marks, pytest.mark.slow])
        if c.id == "sweeps-float16"
        else c
        for c in CASES
    ],
    indirect=["path"],
)


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
