"""Attention equals its formula; asking for the logsumexp changes no number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from optima_fast.models.attention import CrossAttention, attend

CASES = {
    "full": {},
    "causal": {"causal": True},
    "mask": {"mask": True},
    "cap": {"cap": 0.7},
    "cap, causal": {"cap": 0.7, "causal": True},
    "cap, mask": {"cap": 0.7, "mask": True},
}


def make(
    case: str, dtype: torch.dtype = torch.float64, keys: int = 7
) -> tuple[Tensor, Tensor, Tensor, dict]:
    generator = torch.Generator().manual_seed(len(case))
    # head-interleaved strides, as a packed projection gives them
    q, k, v = (
        (torch.randn(2, n, 3, 8, generator=generator) * 2).to(dtype).transpose(1, 2)
        for n in (7, keys, keys)
    )
    options = dict(CASES[case])
    if options.get("mask"):
        mask = torch.rand(2, 1, 7, keys, generator=generator) < 0.6
        mask[..., 0] = True
        options["mask"] = mask
    return q, k, v, options


def formula(q: Tensor, k: Tensor, v: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1])
    if "cap" in options:
        scores = options["cap"] * torch.tanh(scores / options["cap"])
    if "mask" in options:
        scores = torch.where(options["mask"], scores, -math.inf)
    if options.get("causal"):
        scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
    lse = scores.exp().sum(-1).log()
    return torch.einsum("bhnm,bhmd->bhnd", (scores - lse[..., None]).exp(), v), lse


@pytest.mark.parametrize("case", CASES)
def test_equals_its_formula(case: str) -> None:
    q, k, v, options = make(case)
    expected, expected_lse = formula(q, k, v, options)
    for lse in (False, True):
        out, sums = attend(q, k, v, **options, lse=lse)
        torch.testing.assert_close(out, expected)
        if lse:
            torch.testing.assert_close(sums, expected_lse)
        else:
            assert sums is None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_asking_for_lse_changes_nothing(case: str, dtype: torch.dtype) -> None:
    results = []
    for lse in (False, True):
        q, k, v, options = make(case, dtype)
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out, sums = attend(*inputs, **options, lse=lse)
        grads = torch.autograd.grad(out, inputs, torch.linspace(-1, 2, 336).view(out.shape).to(out))
        results.append((out, *grads))
    assert sums.dtype == torch.float32
    assert not sums.requires_grad
    for plain, asked in zip(*results, strict=True):
        torch.testing.assert_close(asked, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", ["full", "causal", "mask", "cap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cuda_kernels_give_the_same(case: str, dtype: torch.dtype) -> None:
    q, k, v, options = make(case)
    expected, expected_lse = formula(q, k, v, options)
    if "mask" in options:
        options["mask"] = options["mask"].cuda()
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-3
    inputs = [x.cuda().to(dtype).requires_grad_() for x in (q, k, v)]
    out, sums = attend(*inputs, **options, lse=True)
    out.sum().backward()
    assert inputs[0].grad.isfinite().all()
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    assert (sums is None) == (case == "mask" or (case != "cap" and dtype == torch.float64))
    if sums is not None:
        assert sums.shape == q.shape[:-1]
        torch.testing.assert_close(
            sums.double().cpu(), expected_lse, rtol=tolerance, atol=tolerance
        )


def test_more_keys_than_queries() -> None:
    q, k, v, options = make("mask", keys=11)
    expected, expected_lse = formula(q, k, v, options)
    out, sums = attend(q, k, v, **options, lse=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(sums, expected_lse)


def test_a_source_shared_by_pairs_equals_its_repetition() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(12, 20, 3, inner=24, scaled=True).double()
    torch.nn.init.normal_(attention.scale)
    x, source = torch.randn(4, 5, 12).double(), torch.randn(2, 6, 20).double()
    pair = torch.tensor([1, 0, 1, 1])
    for got, want in zip(attention(x, source, pair=pair), attention(x, source[pair]), strict=True):
        torch.testing.assert_close(got, want)


def test_scaled_queries_start_unscaled() -> None:
    torch.manual_seed(0)
    scaled = CrossAttention(12, 12, 3, scaled=True)
    plain = CrossAttention(12, 12, 3)
    plain.load_state_dict({n: p for n, p in scaled.state_dict().items() if n != "scale"})
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(scaled(x, x)[0], plain(x, x)[0])
