"""Random problems for the losses, and what they return with every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from quick_interpreter import patch_once
from torch import Tensor

import optima_fast
from optima_fast.losses.blockwise import blocks

patch_once()


class Problem:
    """Tensors a gradient goes to, the others, and the options of one call."""

    def __init__(
        self,
        loss: Callable[..., Tensor],
        trained: list[Tensor],
        fixed: list[Tensor],
        **options: Any,
    ) -> None:
        self.loss, self.trained, self.fixed, self.options = loss, trained, fixed, options

    def double(self) -> Problem:
        """The same problem, with the very values it has, in float64."""
        options = {
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in self.options.items()
        }
        trained, fixed = ([x.double() for x in xs] for xs in (self.trained, self.fixed))
        return Problem(self.loss, trained, fixed, **options)

    def arguments(self, trained: list[Tensor]) -> list[Tensor]:
        if self.loss is optima_fast.hidden_mse:
            return [trained[0], self.fixed[0], trained[1]]
        return [*trained, *self.fixed]

    def __call__(self, backend: str, upstream: float = 1.0) -> list[Tensor]:
        """The loss, then the gradient of upstream * loss for each trained tensor."""
        leaves = [x.detach().requires_grad_() for x in self.trained]
        value = self.loss(*self.arguments(leaves), backend=backend, **self.options)
        return [value.detach(), *torch.autograd.grad((value * upstream).sum(), leaves)]


@pytest.fixture
def hidden_problem(device: str) -> Callable[..., Problem]:
    def make(
        tokens: tuple[int, ...],
        d_s: int = 5,
        d_t: int = 7,
        dtype: torch.dtype = torch.float32,
        masked: bool = False,
        seed: int = 0,
    ) -> Problem:
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        options = {}
        mask = torch.rand(tokens, generator=g) > 0.4
        if masked:
            options["mask"] = mask.to(device)
        student, teacher, weight = (
            x.to(device, dtype)
            for x in (draw(*tokens, d_s), draw(*tokens, d_t), draw(d_s, d_t) * d_s**-0.5)
        )
        return Problem(optima_fast.hidden_mse, [student, weight], [teacher], **options)

    return make


@pytest.fixture
def attention_problem(device: str) -> Callable[..., Problem]:
    def make(
        batch: int = 2,
        queries: int = 9,
        keys: int | None = None,
        heads: tuple[int, int] = (2, 3),
        widths: tuple[int, int] = (4, 6),
        dtype: torch.dtype = torch.float32,
        masked: str = "",
        seed: int = 0,
        share: tuple[int, int] = (1, 1),
        **options: Any,
    ) -> Problem:
        keys = queries if keys is None else keys
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        tensors = [
            # as a model makes them, [B, N, H, d] in memory; * 1.5 for a softmax with peaks
            (1.5 * draw(batch, n, h, d)).to(device, dtype).transpose(1, 2)
            for h_q, d, shared in zip(heads, widths, share, strict=True)
            for n, h in ((queries, h_q), (keys, h_q // shared))
        ]
        query_mask = torch.rand(batch, queries, generator=g) > 0.3
        key_mask = torch.rand(batch, keys, generator=g) > 0.4
        if "q" in masked:
            options["query_mask"] = query_mask.to(device)
        if "k" in masked:
            options["key_mask"] = key_mask.to(device)
        return Problem(optima_fast.attention_mse, tensors[:2], tensors[2:], **options)

    return make


@pytest.fixture
def indexer_problem(device: str) -> Callable[..., Problem]:
    def make(
        batch: int = 2,
        tokens: int = 9,
        heads: tuple[int, int] = (3, 4),
        widths: tuple[int, int] = (4, 6),
        dtype: torch.dtype = torch.float32,
        masked: bool = False,
    ) -> Problem:
        g = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        (h, h_t), (d, d_t) = heads, widths
        shapes = ((h, d), (d,), (h,), (h_t, d_t), (h_t // 2, d_t))
        # as a model makes them, [B, N, H, d] in memory
        tensors = [1.5 * draw(batch, tokens, *shape) for shape in shapes]
        tensors[2] *= d**-0.5
        tensors = [
            x.to(device, dtype) if i == 1 else x.to(device, dtype).transpose(1, 2)
            for i, x in enumerate(tensors)
        ]
        options = {}
        if masked:
            for name in ("query_mask", "key_mask"):
                options[name] = (torch.rand(batch, tokens, generator=g) > 0.3).to(device)
        return Problem(optima_fast.indexer_kl, tensors[:3], tensors[3:], **options)

    return make


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Blocks of so many elements, that small problems have several and a ragged last one."""
    return lambda elements: monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)


@pytest.fixture
def problem(hidden_problem, attention_problem):
    """One layer of each loss, with masks."""

    def make(loss, tokens=9, **options):
        if loss == "hidden":
            return hidden_problem((2, tokens), masked=True, **options)
        return attention_problem(2, tokens, masked="qk", target=loss, causal=True, **options)

    return make
