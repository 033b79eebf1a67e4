"""Gradients from strips of queries are those of the whole layer, in room that does not grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_tiles import shrink
from tolerance import assert_as_good_as_eager
from torch import Tensor

import optima_fast
from optima_fast.losses import ops, strips
from optima_fast.losses.backends import ATTENTION, AttentionInputs, IndexerInputs

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")

ROWS = 16


@pytest.fixture
def small_strips(monkeypatch):
    """Room for 16 queries of a map of 40 keys, which are several tiles."""
    shrink(monkeypatch)
    monkeypatch.setattr(strips, "ROWS", ROWS)
    monkeypatch.setattr(strips, "ROOM", ROWS * 40 * 4)


class Problem:
    """Queries, keys, and an indexer's weights; the second batch item's are other ones."""

    def __init__(self, device: str, loss: str, masked: bool, **options: object) -> None:
        g = torch.Generator().manual_seed(3)
        draw = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
        self.loss, self.options = loss, options
        items, length = 2, 40
        self.masks = {}
        if masked:
            for name in ("query_mask", "key_mask"):
                self.masks[name] = (torch.rand(items, length, generator=g) > 0.3).to(device)
            self.masks["query_mask"][0, :ROWS] = False  # a strip without a query that counts
        if loss == "indexer":
            self.trained = [draw(items, 2, length, 8), draw(items, length, 8)]
            self.trained.append(draw(items, 2, length))
        else:
            self.trained = [draw(items, 2, length, 8), draw(items, 1, length, 8)]
        self.fixed = [draw(items, heads, length, 8) for heads in (2, 1)]
        if masked:  # what counts nowhere may hold anything
            self.trained[0][:, :, ~self.masks["query_mask"].any(0)] = torch.nan
            self.trained[0][0, :, :ROWS] = torch.nan

    def __call__(self, dtype: torch.dtype = torch.float32, **more: object) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in self.trained]
        function = {
            "kl": optima_fast.attention_kl,
            "indexer": optima_fast.indexer_kl,
        }.get(self.loss, optima_fast.attention_mse)
        options = dict(self.options)
        if function is optima_fast.attention_mse:
            options["target"] = self.loss
        elif self.loss == "kl":
            options["heads"] = "mean"
        fixed = [x.to(dtype) for x in self.fixed]
        loss = function(*leaves, *fixed, **options, **self.masks, **more)
        return [loss.detach(), *torch.autograd.grad(loss.sum() * 3, leaves)]


CASES = [
    (loss, masked, options)
    for loss, masked, options in (
        *((loss, True, {"causal": True}) for loss in ("scores", "probs", "kl", "indexer")),
        *((loss, False, {"causal": True}) for loss in ("scores", "probs", "indexer")),
        *((loss, True, {"causal": True, "window": 9}) for loss in ("scores", "kl")),
        ("scores", False, {"window": 9}), ("probs", False, {"window": 9}),
        ("kl", False, {}), ("scores", True, {}), ("indexer", True, {"causal": False}),
    )
]  # fmt: skip


@pytest.mark.parametrize(("loss", "masked", "options"), CASES, ids=str)
def test_strips_give_the_gradients_of_the_layer(
    device, small_strips, loss, masked, options, poisoned_memory
):
    p = Problem(device, loss, masked, **options)
    found = p(backend="triton", recompute=True)
    exact = p(torch.float64, backend="reference")
    for actual, eager, true in zip(found, p(backend="reference"), exact, strict=True):
        assert true.isfinite().all()
        assert_as_good_as_eager(loss, actual, eager, true, scale=true.abs().max().item() + 0.01)


@pytest.mark.parametrize("loss", ["scores", "kl", "indexer"])
def test_no_map_is_larger_than_the_room(device, small_strips, loss, monkeypatch):
    p, new_empty, made = Problem(device, loss, False, causal=True), Tensor.new_empty, [0]

    def noting(self: Tensor, *shape: Any, **more: Any) -> Tensor:
        out = new_empty(self, *shape, **more)
        if out.dim() == 3 and out.shape[1:] != (2, 40):  # an index's log-sum-exp
            made.append(out.numel())
        return out

    monkeypatch.setattr(Tensor, "new_empty", noting)
    p(backend="triton")
    assert max(made) >= 2 * 40 * 40
    made.clear()
    p(backend="triton", recompute=True)
    assert max(made) <= ROWS * 48  # rows are padded


def test_a_residual_that_is_too_large_is_not_kept(device, small_strips, monkeypatch):
    p = Problem(device, "kl", False)
    q, k = ([x.requires_grad_()] for x in p.trained)
    t_q, t_k = ([x] for x in p.fixed)
    none, scale = [None], [0.35]
    arguments = (
        q, k, t_q, t_k, none, none, none, none, scale, scale, "kl", [False], [0], [True], [True],
        "triton", False,
    )  # fmt: skip
    assert ops.attention_loss(*arguments)[2]
    kept = p(backend="triton")
    monkeypatch.setattr(strips, "MOST_KEPT", 1000)
    assert not ops.attention_loss(*arguments)[2]
    for x, y in zip(p(backend="triton"), kept, strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-6)


def long(tokens: int, heads: int, groups: int, width: int) -> AttentionInputs:
    """Shapes of one layer of bfloat16, without memory."""
    q = torch.empty(1, heads, tokens, width, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, groups, tokens, width, dtype=torch.bfloat16, device="meta")
    none: list[Tensor | None] = [None]
    return AttentionInputs(
        [q], [k], [q], [k], none, none, none, none, [1.0], [1.0], "kl", [True], [0], [True], [True]
    )


def test_a_layer_of_131072_tokens_takes_less_than_1_gb_beside_its_gradients():
    layer = long(131072, heads=32, groups=8, width=128)
    assert strips.too_large(layer)
    assert strips.needed(layer)
    items, rows = strips.shape(layer)
    residual = items * rows * 131072 * 2
    sums = 4 * layer.student_k[0].numel()
    # of a strip: dQ in float32, its term and both models' log-sum-exp
    queries = 4 * 32 * rows * (128 + 1 + 2)
    assert residual <= strips.ROOM
    assert residual + sums + queries < 1e9
    # the forward pass keeps a log-sum-exp of either model while it runs
    assert 4 * 2 * 32 * 131072 < 1e8


def test_short_layers_and_those_without_a_residual_are_left_alone():
    assert not strips.too_large(long(1024, 12, 12, 64))
    each = long(131072, 32, 8, 128)._replace(target="kl-each")
    assert not strips.too_large(each)
    assert not strips.needed(each)
    assert ATTENTION["triton"].strips
    assert not ATTENTION["blockwise"].strips


def test_an_indexer_counts_by_its_own_dtype():
    q = torch.empty(1, 4, 65536, 128, dtype=torch.float16, device="meta")
    k = torch.empty(1, 65536, 128, dtype=torch.float16, device="meta")
    w = torch.empty(1, 4, 65536, device="meta")
    none: list[Tensor | None] = [None]
    x = IndexerInputs(
        [q], [k], [w], [q], [q], none, none, none, [1.0], [True], [True], [True], [True]
    )
    assert strips.too_large(x)
    assert strips.shape(x) == (1, strips.ROOM // (65536 * 2))
