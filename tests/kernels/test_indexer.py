"""The kernels of a lightning indexer's loss against float64, in the interpreter or on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import tolerance
import torch
from torch import Tensor

from optima_fast.losses import reference

pytest.importorskip("triton")

from kernel_scores import DTYPES, INF, NAN, ON_GPU
from optima_fast.kernels import indexer as kernel
from optima_fast.kernels import layers as shared

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory", "small_tiles"),
    # what a mask hides enters products, whose result is then discarded
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
on_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Shape(NamedTuple):
    """Of one layer: batch, heads and their size, teacher's, queries, keys."""

    B: int
    H: int
    D: int
    H_T: int
    D_T: int
    N_Q: int
    N_K: int
    causal: bool = False
    share: int = 1  # heads of the teacher's queries for each of its keys'


class Layers(NamedTuple):
    q: list[Tensor]
    k: list[Tensor]
    weight: list[Tensor]
    teacher_q: list[Tensor]
    teacher_k: list[Tensor]
    query_masks: list[Tensor | None]
    key_masks: list[Tensor | None]
    teacher_lse: list[Tensor | None]
    causal: list[bool]
    teacher_scale: list[float]

    def layer(self, i: int) -> Layers:
        return Layers(*([x[i]] for x in self))


class Results(NamedTuple):
    losses: list[Tensor]
    d_q: list[Tensor | None]
    d_k: list[Tensor | None]
    d_w: list[Tensor | None]


EDGES = [
    Shape(1, 1, 1, 1, 1, 1, 1),
    Shape(2, 2, 5, 3, 20, 3, 9),
    Shape(1, 2, 20, 4, 40, 17, 33, share=2),
    Shape(2, 3, 24, 1, 16, 33, 33, causal=True),
    Shape(1, 2, 16, 2, 16, 32, 32),
    Shape(1, 2, 70, 2, 8, 50, 50, causal=True),
]
# with nothing masked: tiles that are whole, and causality with more of the one than of the other
ALL = [
    Shape(2, 2, 16, 2, 32, 64, 96),
    Shape(1, 3, 16, 1, 16, 64, 64, causal=True),
    Shape(1, 4, 16, 2, 32, 32, 64, causal=True),
    Shape(1, 1, 8, 2, 64, 70, 18, causal=True, share=2),
]
MIXED = [
    Shape(2, 2, 8, 3, 6, 34, 17),
    Shape(0, 2, 4, 2, 4, 5, 5),
    Shape(2, 2, 8, 3, 6, 34, 17),
    Shape(1, 2, 3, 4, 20, 40, 40, causal=True, share=4),
    Shape(2, 1, 6, 2, 6, 4, 0),
    Shape(1, 2, 7, 2, 5, 1, 3),
    Shape(3, 1, 6, 2, 6, 0, 4),
]
FEW = [MIXED[0], MIXED[5], MIXED[0]]


@pytest.fixture
def small_tiles(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And chunks of several blocks of queries, several tiles that are merged at once and after."""
    monkeypatch.setattr(kernel, "PROGRAMS", 4)
    monkeypatch.setattr(kernel, "MERGED", (16, 2))


def make(
    shapes: list[Shape], dtype: torch.dtype, device: str, masked: bool = False, seed: int = 0
) -> Layers:
    """Layers of tokens' heads side by side; if masked, masks of queries, of keys or of both.

    What a mask hides is nan and inf.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = Layers(*([] for _ in Layers._fields))
    for i, (B, H, D, H_T, D_T, N_Q, N_K, causal, share) in enumerate(shapes):
        masks: list[Tensor | None] = []
        for n, wanted in ((N_Q, i % 3 != 1), (N_K, i % 3 != 2)):
            mask = torch.rand(B, n, generator=generator) < 0.7
            masks.append(mask if masked and wanted else None)
        sizes = ((N_Q, H, D), (N_K, D), (N_Q, H), (N_Q, H_T, D_T), (N_K, H_T // share, D_T))
        sides = (0, 1, 0, 0, 1)
        for group, size, side, fill in zip(
            layers, sizes, sides, (NAN, INF, NAN, INF, NAN), strict=False
        ):
            # maps far from uniform, so that a lost term or factor cannot hide
            x = torch.randn(B, *size, generator=generator, dtype=torch.float64) * 1.5 + 0.3
            if group is layers.weight:
                x *= D**-0.5
            if masks[side] is not None:
                x[~masks[side]] = fill
            x = x.to(device, dtype)
            group.append(x if group is layers.k else x.transpose(1, 2))
        layers.query_masks.append(None if masks[0] is None else masks[0].to(device))
        layers.key_masks.append(None if masks[1] is None else masks[1].to(device))
        layers.teacher_lse.append(None)
        layers.causal.append(causal)
        # kernels take a scale as float32: one that float32 holds, so that float64 is exact
        scale = torch.tensor(1.3 * D_T**-0.5, dtype=torch.float32).item()
        layers.teacher_scale.append(scale)
    return layers


def valid_pairs(layers: Layers, i: int) -> Tensor:
    return reference.valid_pairs(
        layers.query_masks[i], layers.key_masks[i], layers.causal[i],
        layers.q[i], layers.k[i].shape[1],
    )  # fmt: skip


def upstream(layers: Layers) -> Tensor:
    """Gradients that differ from layer to layer and are not 1."""
    dtype = torch.promote_types(layers.q[0].dtype, torch.float32)
    return torch.linspace(-2.5, 3.0, len(layers.q), dtype=dtype, device=layers.q[0].device)


def forward(layers: Layers, need_residual: bool = True) -> tuple[Tensor, ...]:
    return kernel.indexer_forward(
        *layers[:8], causal=layers.causal, teacher_scale=layers.teacher_scale,
        need_residual=need_residual,
    )  # fmt: skip


def backward(
    layers: Layers, grad: Tensor, kept: tuple[Tensor, ...], needs: list[list[bool]] | None = None
) -> tuple[list[Tensor | None], ...]:
    need_q, need_k, need_weight = needs or [[True] * len(layers.q)] * 3
    return kernel.indexer_backward(
        grad, *layers[:3], *layers[5:7], *kept, causal=layers.causal,
        need_q=need_q, need_k=need_k, need_weight=need_weight,
    )  # fmt: skip


def fused(layers: Layers, grad: Tensor | None = None) -> Results:
    losses, *kept = forward(layers)
    return Results(
        list(losses), *backward(layers, upstream(layers) if grad is None else grad, kept)
    )


def autograd(layers: Layers, grad: Tensor, dtype: torch.dtype) -> Results:
    """The reference, which computes in this dtype."""
    results = Results([], [], [], [])
    for i in range(len(layers.q)):
        leaves = [x[i].detach().clone() for x in layers[:3]]
        if dtype == torch.float64:
            leaves = [x.double() for x in leaves]
        leaves = [x.requires_grad_() for x in leaves]
        loss = reference.indexer_kl(
            *leaves, *(x[i] for x in layers[3:7]),
            teacher_scale=layers.teacher_scale[i], causal=layers.causal[i], dtype=dtype,
        )  # fmt: skip
        loss.backward(grad[i].to(loss.dtype))
        for found, x in zip(results, (loss.detach(), *(y.grad for y in leaves)), strict=True):
            found.append(x)
    return results


def check(layers: Layers, grad: Tensor | None = None) -> Results:
    """Every loss and gradient by the rule of tests/tolerance.py.

    Its floor: 2 eps of the result's own size and of what cancels in it, a factor times a residual
    that may reach 1: in a loss its terms, in a gradient the other factors of a product.
    """
    grad = upstream(layers) if grad is None else grad
    wide = torch.promote_types(layers.q[0].dtype, torch.float32)
    ours, eager = fused(layers, grad), autograd(layers, grad, wide)
    exact = autograd(layers, grad, torch.float64)
    for i, rows in enumerate(zip(*ours, *eager, *exact, strict=True)):
        for name, actual, plain, truth in zip(
            Results._fields, rows[:4], rows[4:8], rows[8:], strict=True
        ):
            assert actual.isfinite().all(), f"{name}[{i}]"
            size = truth.abs().max().item() if truth.numel() else 0.0
            ratio = torch.finfo(wide).eps / torch.finfo(actual.dtype).eps
            tolerance.assert_as_good_as_eager(
                f"{name}[{i}]", actual, plain.to(actual.dtype), truth, scale=size + ratio
            )
    return ours


def assert_same(a: Results, b: Results) -> None:
    for name in Results._fields:
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            assert torch.equal(x, y), name


def size(shape: Shape) -> str:
    return "x".join(str(int(n)) for n in shape[:8])


@on_each_dtype
@pytest.mark.parametrize("shape", EDGES, ids=size)
def test_one_layer(shape: Shape, dtype: torch.dtype, device: str) -> None:
    layers = make([shape], dtype, device, masked=True)
    ours = check(layers, torch.full((1,), -2.5, device=device))
    assert ours.losses[0].dtype == torch.float32
    assert ours.d_q[0].dtype == ours.d_k[0].dtype == ours.d_w[0].dtype == dtype


@on_each_dtype
@pytest.mark.parametrize("shape", ALL, ids=size)
def test_one_layer_without_masks(shape: Shape, dtype: torch.dtype, device: str) -> None:
    check(make([shape], dtype, device))


@on_each_dtype
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_layers_of_different_shapes_some_empty(
    masked: bool, dtype: torch.dtype, device: str
) -> None:
    ours = check(make(MIXED, dtype, device, masked))
    assert [i for i, x in enumerate(ours.losses) if not x] == [1, 4, 6]
    assert not ours.d_q[4].any()  # queries without a key
    assert not ours.d_w[4].any()
    assert not ours.d_k[6].any()  # keys without a query


@pytest.mark.skipif(ON_GPU, reason="float64 is for the interpreter")
def test_float64() -> None:
    layers = make([MIXED[0], MIXED[3]], torch.float64, "cpu", masked=True)
    ours, exact = fused(layers), autograd(layers, upstream(layers), torch.float64)
    for found, true in zip(ours, exact, strict=True):
        for x, y in zip(found, true, strict=True):
            # the kernels' own constants, and exponentials of float32
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@on_each_dtype
def test_one_launch_is_as_many(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: a call again, layers one by one, and a call that takes several launches."""
    layers = make(FEW, dtype, device, masked=True)
    grad = upstream(layers)
    whole = fused(layers, grad)
    assert_same(whole, fused(layers, grad))
    alone = [fused(layers.layer(i), grad[i : i + 1]) for i in range(len(grad))]
    assert_same(whole, Results(*([x for (x,) in group] for group in zip(*alone, strict=True))))
    monkeypatch.setattr(shared, "MAX_LAYERS", 1)
    assert_same(whole, fused(layers, grad))


@on_each_dtype
def test_queries_that_see_nothing_may_hold_nan(dtype: torch.dtype, device: str) -> None:
    """They count, but causality and the mask of keys hide every key: as do keys after the last
    query that counts."""
    layers = make([Shape(1, 2, 3, 2, 4, 40, 40, causal=True)], dtype, device)
    first, last = 20, 36
    layers.key_masks[0] = torch.arange(40, device=device)[None] >= first
    layers.query_masks[0] = torch.arange(40, device=device)[None] <= last
    for x in (layers.q[0], layers.weight[0], layers.teacher_q[0]):
        x[:, :, :first] = NAN
    layers.k[0][:, last + 1 :] = layers.teacher_k[0][:, :, last + 1 :] = NAN
    ours = check(layers)
    assert not ours.d_q[0][:, :, :first].any()
    assert not ours.d_w[0][:, :, :first].any()
    assert not ours.d_k[0][:, last + 1 :].any()
    layers.key_masks[0] = torch.zeros_like(layers.key_masks[0])
    for found in fused(layers):
        assert not found[0].any()


def test_keys_after_the_last_query_may_hold_nan(device: str) -> None:
    """Nothing is masked, and sizes are multiples of tiles."""
    layers = make([Shape(1, 2, 16, 2, 16, 48, 64, causal=True)], torch.float32, device)
    layers.k[0][:, 48:] = layers.teacher_k[0][:, :, 48:] = NAN
    assert not check(layers).d_k[0][:, 48:].any()


@pytest.mark.parametrize("name", ["q", "k", "weight", "teacher_q"])
def test_a_nan_that_counts_is_not_hidden(name: str, device: str) -> None:
    layers = make([Shape(2, 2, 3, 1, 4, 5, 6)] * 2, torch.float32, device)
    getattr(layers, name)[0][1, 1 if name != "teacher_q" else 0, 2] = NAN
    losses, residuals, *_ = forward(layers)
    assert losses.isnan().tolist() == [True, False]
    assert residuals[0].isnan().flatten(1).any(1).tolist() == [False, True]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_residuals_are_zero_where_nothing_counts(masked: bool, causal: bool, device: str) -> None:
    """In the rows' padding too."""
    layers = make([Shape(1, 1, 16, 2, 16, 45, 45, causal)], torch.float16, device, masked)
    _, (residual,), *_ = forward(layers)
    assert residual.shape[2] == 48
    counts = torch.zeros(residual.shape, dtype=torch.bool, device=device)
    counts[..., :45] = valid_pairs(layers, 0)
    assert residual[counts].any()
    assert not residual[~counts].any()


@on_each_dtype
def test_log_sums_that_are_given(dtype: torch.dtype, device: str) -> None:
    """Within rounding the same; a query that sees no key may come with nan."""
    layers = make(FEW, dtype, device, masked=True)
    for i in (0, 2):
        q, k = (x[i].double().nan_to_num(0, 0, 0) for x in layers[3:5])
        valid = valid_pairs(layers, i)[:, None]
        scores = (q @ k.mT * layers.teacher_scale[i]).masked_fill(~valid, -INF)
        lse = scores.logsumexp(-1).masked_fill(~valid.any(-1), NAN)
        layers.teacher_lse[i] = lse.float().transpose(1, 2).contiguous().transpose(1, 2)
    check(layers)
    layers.teacher_lse[0] += 1.0  # they are read: a map that sums to 1 / e
    assert (fused(layers).losses[0] - fused(layers._replace(teacher_lse=[None] * 3)).losses[0]) < 0


@on_each_dtype
def test_the_loss_alone_is_the_same(dtype: torch.dtype, device: str) -> None:
    layers = make(FEW, dtype, device, masked=True)
    losses, residuals, lses, _ = forward(layers, need_residual=False)
    assert residuals == lses == []
    assert torch.equal(losses, forward(layers)[0])


@on_each_dtype
def test_only_what_is_asked_for(dtype: torch.dtype, device: str) -> None:
    layers = make(FEW, dtype, device, masked=True)
    grad = upstream(layers)
    _, *kept = forward(layers)
    before = [x.clone() for x in (*kept[0], *kept[1])]
    whole = backward(layers, grad, kept)
    needs = [[True, False, False], [False, False, True], [False, True, False]]
    for found, every, wanted in zip(backward(layers, grad, kept, needs), whole, needs, strict=True):
        for x, y, need in zip(found, every, wanted, strict=True):
            assert (x is not None) == need
            assert x is None or torch.equal(x, y)
    for x, y in zip(before, (*kept[0], *kept[1]), strict=True):
        assert torch.equal(x, y), "what was kept is only read"


def test_any_strides(device: str) -> None:
    """Tensors that are not dense in memory, one of them expanded, are as their copies."""
    layers = make([Shape(2, 3, 8, 2, 8, 20, 20)], torch.float32, device)
    copies = fused(layers)
    turned = layers._replace(
        q=[layers.q[0].transpose(2, 3).contiguous().transpose(2, 3)],
        k=[torch.cat([layers.k[0]] * 2, 2)[..., :8]],
        weight=[layers.weight[0].contiguous()],
    )
    assert_same(fused(turned), copies)
    alike = layers._replace(weight=[layers.weight[0][:, :1, :1].expand(2, 3, 20)])
    assert_same(fused(alike), fused(alike._replace(weight=[alike.weight[0].contiguous()])))


def test_weights_of_another_dtype(device: str) -> None:
    layers = make([Shape(2, 3, 8, 2, 8, 20, 20)], torch.float16, device)
    wide = layers._replace(weight=[layers.weight[0].float()])
    ours, narrow = fused(wide), fused(layers)
    assert ours.d_w[0].dtype == torch.float32
    assert torch.equal(ours.losses[0], narrow.losses[0])
    assert torch.equal(ours.d_w[0].half(), narrow.d_w[0])


def test_what_is_not_served() -> None:
    q, k, w = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 4), torch.zeros(1, 2, 3)
    wide = torch.zeros(1, 2, 3, 129)
    if not ON_GPU:
        assert kernel.not_served([q], [k], [w], [q], [q]) == []
    reasons = "; ".join(kernel.not_served([q], [k.half()], [w], [wide], [wide]))
    assert "the indexers' queries and keys must have one dtype, got float16, float32" in reasons
    assert "head sizes must be at most 128, got 129" in reasons
    assert "weights must have one dtype" in "; ".join(
        kernel.not_served([q] * 2, [k] * 2, [w, w.half()], [q] * 2, [q] * 2)
    )
