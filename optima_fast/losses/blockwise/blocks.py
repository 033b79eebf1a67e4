"""How a layer is cut into blocks, and what comes of one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of the largest array a block works on, all heads. 4 MB of float32: of 2**17 .. 2**22 it
# was within 5 % of the fastest at 256 and 1024 tokens, 12 and 16 heads (AVX-512, 32 MB of L3). A
# GPU has no such cache, and each block costs it a dozen launches: 64 MB.
BLOCK_ELEMENTS = 2**20
BLOCK_ELEMENTS_OF_A_GPU = 2**24
# 2, 3 and 4 are within 10 % of each other at 77, 256 and 1024 tokens; 1 takes up to twice as long
CAUSAL_BLOCKS = 3


class Gradients(NamedTuple):
    """What one layer returns: its loss, and the gradient of each tensor that is trained, None where
    it was not asked for."""

    loss: Tensor
    of: tuple[Tensor | None, ...]


def block_shape(
    batch: int,
    rows: int,
    row_elements: int,
    *,
    shared: int = 1,
    causal: bool = False,
    gpu: bool = False,
) -> tuple[int, int]:
    """How many batch items and rows make a block: whole items, or rows of one item.

    Items share a block up to one ``shared``-th of what a single item may fill. Causal rows are cut
    into ``CAUSAL_BLOCKS`` at least, each of which leaves out the keys that none of its rows sees.
    """
    room = max(1, (BLOCK_ELEMENTS_OF_A_GPU if gpu else BLOCK_ELEMENTS) // max(1, row_elements))
    # even blocks, in multiples of 16 rows: a short last one would waste its products
    blocks = math.ceil(rows / room)
    if causal:
        blocks = max(blocks, CAUSAL_BLOCKS)
    if blocks > 1:
        rows = min(rows, math.ceil(rows / blocks / 16) * 16)
    return max(1, min(batch, room // shared // max(1, rows))), rows


def starts(total: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each block, the last one first."""
    for start in reversed(range(0, total, max(1, step))):
        yield start, min(total, start + step)


def stored(x: Tensor) -> torch.dtype:
    """The dtype of an input's unit gradient, which for a large mean would underflow in float16."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def empty_gradient(x: Tensor, needed: bool) -> Tensor | None:
    """Room for a gradient, in the layout of its input where that is dense."""
    return torch.empty_like(x, dtype=stored(x)) if needed else None


def view(buffer: Tensor, *shape: int) -> Tensor:
    """The first elements of a flat buffer in this shape."""
    return buffer[: math.prod(shape)].view(shape)


def mean(partial: list[Tensor], count: Tensor | float) -> Tensor:
    """The blocks' sums over the count; the order is fixed."""
    return torch.stack(partial).sum() / count


def nothing(like: Tensor, *gradients: Tensor | None) -> Gradients:
    """The result where there is no element at all."""
    zeros = tuple(None if x is None else x.zero_() for x in gradients)
    return Gradients(like.new_zeros(()), zeros)
