"""Layers of one call: those of one form share a launch, in which only their pointers differ.

A form is everything else that a kernel takes: shapes, strides, scale, causality, and whether
anything is masked. A program finds its layer's pointers by ``program_id(1)``. No table is copied to
the device and nothing waits for the host, so that a CUDA graph may record the launch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from .launcher import kernel

K = TypeVar("K", bound=Hashable)

MAX_LAYERS = 16  # of a launch: 8 pointers a layer are 1 KB of the 4 KB that arguments have
FEW_LAYERS = 4
TOTAL_BLOCK = 1024


@triton.jit
def pick(pointers, layer):
    """pointers[layer], for a layer known only on the device."""
    chosen = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        chosen = tl.where(layer >= i, pointers[i], chosen)
    return chosen


INTERPRETED = not isinstance(pick, JITFunction)
COMPILED = tl.constexpr(not INTERPRETED)


@triton.jit
def settle(x, SETTLE: tl.constexpr):
    """x itself, at the end of an iteration that adds to it by tensor cores.

    Without it ptxas cannot tell that an accumulator is still being written when the loop comes
    round, and waits after every single product (warnings C7510 to C7515).
    """
    if SETTLE and COMPILED:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=1
        )
    return x


@kernel(["tiles", "n"])
def _total_kernel(
    sum_ptr,  # [L, tiles]
    count_ptr,  # [L, tiles] int32; unused without COUNTED
    loss_ptr,  # [L] out
    scale_ptr,  # [L] out: 2 / n
    tiles,
    n,  # how many elements the mean is over; with COUNTED, for each that was counted
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=ACC)
    counted = tl.zeros((BLOCK,), dtype=tl.int64)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        total += tl.load(sum_ptr + layer * tiles + tile, mask=tile < tiles, other=0.0)
        if COUNTED:
            counted += tl.load(count_ptr + layer * tiles + tile, mask=tile < tiles, other=0)
    every = tl.cast(n, tl.int64)
    if COUNTED:
        every *= tl.sum(counted, axis=0)
    # where nothing counts the sum is 0 already
    mean_over = tl.maximum(every, 1).to(ACC)
    tl.store(loss_ptr + layer, tl.sum(total, axis=0) / mean_over)
    tl.store(scale_ptr + layer, 2.0 / mean_over)


def total(sums: Tensor, counts: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """Losses and scales of L layers from what their tiles found, in a fixed order.

    Args:
        sums: ``[L, tiles]``, each tile's sum of squares, float32 or float64.
        counts: ``[L, tiles]`` int32, what each tile adds to its layer's count, or None.
        n: how many elements a mean is over; with counts, for each that was counted.

    Returns:
        losses ``[L]``, sum / n, and scales ``[L]``, 2 / n, where n is at least 1.
    """
    layers, tiles = sums.shape
    losses, scales = (sums.new_empty(layers) for _ in range(2))
    _total_kernel[(layers,)](
        sums, sums if counts is None else counts, losses, scales, tiles, n,
        COUNTED=counts is not None, BLOCK=TOTAL_BLOCK,
        ACC=tl.float64 if sums.dtype == torch.float64 else tl.float32, enable_fp_fusion=True,
    )  # fmt: skip
    return losses, scales


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own takes microseconds, and a step asks often."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is no less than n."""
    return 1 << max(0, n - 1).bit_length()


def groups(forms: Mapping[int, K]) -> list[tuple[K, list[int]]]:
    """Layers by form, in launches of at most ``MAX_LAYERS``."""
    by_form: dict[K, list[int]] = {}
    for layer, form in forms.items():
        by_form.setdefault(form, []).append(layer)
    return [
        (form, layers[start : start + MAX_LAYERS])
        for form, layers in by_form.items()
        for start in range(0, len(layers), MAX_LAYERS)
    ]


def pointers(
    tensors: Sequence[Tensor] | Mapping[int, Tensor], layers: Sequence[int]
) -> tuple[Tensor, ...]:
    """What a launch passes of these layers, padded with the first to 4 or to ``MAX_LAYERS``.

    A launch of another number of layers then seldom needs another compilation.
    """
    chosen = [tensors[i] for i in layers]
    length = FEW_LAYERS if len(chosen) <= FEW_LAYERS else MAX_LAYERS
    return (*chosen, *chosen[:1] * (length - len(chosen)))


def in_order(found: Mapping[int, Tensor]) -> Tensor:
    """[L] of every layer's scalar, from launches that each gave some of them."""
    return torch.stack([found[i] for i in range(len(found))])


def of_layers(values: Tensor, layers: Sequence[int]) -> Tensor:
    """Entries of ``[L]`` side by side: the tensor itself where the layers are all, in order."""
    if list(layers) == list(range(len(values))):
        return values
    return torch.stack([values[i] for i in layers])


def stride(x: Tensor, dim: int) -> int:
    """0, which is a multiple of anything, where no step is ever taken."""
    return x.stride(dim) if x.shape[dim] > 1 else 0
