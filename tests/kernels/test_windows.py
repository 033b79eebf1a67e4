"""Sliding windows in the kernels of attention maps, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from small_tiles import shrink
from tolerance import assert_as_good_as_eager

import optima_fast

pytest.importorskip("triton", reason="needs triton")

# of numpy in the interpreter, about nan and inf that are discarded afterwards
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a window ends inside a tile, at its edge, and several tiles away."""
    shrink(monkeypatch)


def problem(tokens, dtype, masked, device, seed=0):
    """Student with shared keys, teacher without; what a mask hides is nan and inf."""
    g = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(1, tokens, heads, 16, generator=g, dtype=torch.float64) * 1.5
        for heads in (2, 1, 1, 1)
    ]
    masks = {}
    if masked:
        for name, share in (("query_mask", 0.5), ("key_mask", 0.6)):
            masks[name] = torch.rand(1, tokens, generator=g) < share
            masks[name][:, 3] = True
        for x, name, fill in zip(
            tensors, ("query_mask", "key_mask") * 2, (torch.nan, torch.inf) * 2, strict=True
        ):
            x[~masks[name]] = fill
    tensors = [x.to(device, dtype).transpose(1, 2) for x in tensors]
    return tensors, {k: v.to(device) for k, v in masks.items()}


def losses(backend, tensors, masks, dtype=None, **options):
    q, k, *teacher = (x if dtype is None else x.to(dtype) for x in tensors)
    q, k = (x.detach().requires_grad_() for x in (q, k))
    loss = optima_fast.attention_mse(
        q, k, *teacher, **masks, backend=backend, student_scale=0.25, teacher_scale=0.25, **options
    )
    return [loss.detach(), *torch.autograd.grad(-2.0 * loss.sum(), (q, k))]


@pytest.mark.parametrize("target", ["scores", "probs"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("window", [5, 30, 60])
def test_windows(window, causal, masked, target, device, poisoned_memory):
    dtype = torch.float16 if masked else torch.float32
    tensors, masks = problem(50, dtype, masked, device)
    options = {"target": target, "causal": causal, "window": window}
    exact = losses("reference", tensors, masks, torch.float64, **options)
    ours = losses("triton", tensors, masks, **options)
    eager = losses("reference", tensors, masks, **options)
    valid = 50 * min(window, 50) * (0.3 if masked else 1)
    finite = max(x[x.isfinite()].abs().max().item() for x in tensors)
    size = 2 * 2.0 * 0.25 * finite * (10 if target == "scores" else 1) / valid
    for name, x, y, true in zip(("loss", "d_q", "d_k"), ours, eager, exact, strict=True):
        scale = max(1.0 if name == "loss" else size, true.abs().max().item())
        assert_as_good_as_eager(name, x, y, true, scale=scale)


def test_a_window_of_each_layer_in_one_call(device):
    tensors, _ = problem(40, torch.float32, False, device)
    windows = [None, 7, 7, 3]
    loss = optima_fast.attention_mse(
        *([x] * 4 for x in tensors), target="probs", window=windows, backend="triton"
    )
    for value, window in zip(loss, windows, strict=True):
        expected = optima_fast.attention_mse(
            *tensors, target="probs", window=window, backend="reference"
        )
        torch.testing.assert_close(value, expected[0])


@pytest.mark.parametrize("target", ["scores", "probs"])
def test_what_no_query_of_its_window_counts_for_may_hold_nan(target, device):
    """Keys 8 and later count, and no query that does is near."""
    tensors, _ = problem(40, torch.float32, False, device)
    query_mask = torch.zeros(1, 40, dtype=torch.bool, device=device)
    query_mask[:, :6] = True
    tensors[1][:, :, 8:] = torch.nan
    options = {"target": target, "window": 3}
    ours = losses("triton", tensors, {"query_mask": query_mask}, **options)
    exact = losses("reference", tensors, {"query_mask": query_mask}, **options)
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x, y)
