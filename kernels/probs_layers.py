"""What a launch of the kernels of attention maps passes: layers of any shapes, as tuples."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from . import launch
from .core import MAX_LAYERS, bits, first_tiles, pad, pad_raw
from .launch import LaunchConfig
from .probs_tiles import Heads, Pairs

MAX_STRIDE = 2**24  # a tile has at most 2**7 rows
UNIT = 8  # elements: 16 bytes of the narrowest dtype
ROW_UNIT = 16  # elements that a stored residual's rows are padded to a multiple of
# Powers of two for P and for R, which never exceed 1, that keep both and their product among
# float16's normal numbers.
SHIFTS = {torch.float16: (8, 7)}

K = TypeVar("K", bound=Hashable)
Table = Mapping[tuple[int, ...], LaunchConfig]


class Model(NamedTuple):
    """One model's queries and keys, an entry a layer."""

    q: list[Tensor]
    k: list[Tensor]
    scale: Sequence[float]

    @classmethod
    def of(cls, q: Sequence[Tensor], k: Sequence[Tensor], scale: Sequence[float]) -> Model:
        """Reads heads in place where their rows are dense, and copies them elsewhere."""
        dense = ([x if is_dense(x) else x.contiguous() for x in y] for y in (q, k))
        return cls(*dense, scale)

    def lengths(self, layer: int) -> tuple[int, int]:
        """Nq and Nk."""
        return self.q[layer].shape[2], self.k[layer].shape[2]

    def width(self, layer: int) -> int:
        """The columns of a tile of a head."""
        return max(16, triton.next_power_of_2(self.q[layer].shape[3]))

    def unit(self, layers: Sequence[int], *others: Mapping[int, Tensor]) -> int:
        """What every stride and head size is a multiple of: UNIT or 1."""
        tensors = (x[i] for x in (self.q, self.k, *others) for i in layers)
        every = (n for x in tensors for n in (x.shape[3], *x.stride()[:3]))
        return 1 if any(n % UNIT for n in every) else UNIT

    def arguments(self, layers: Sequence[int], unit: int) -> Heads:
        """What a launch passes."""
        return Heads(
            select(self.q, layers),
            select(self.k, layers),
            strides(self.q, layers, unit),
            strides(self.k, layers, unit),
            pad([self.q[i].shape[1] for i in layers]),
            pad([self.q[i].shape[3] // unit for i in layers]),
            pad_raw([bits(self.scale[i]) for i in layers]),
        )


class Counted(NamedTuple):
    """Which pairs count, an entry a layer."""

    query_masks: Sequence[Tensor | None]
    key_masks: Sequence[Tensor | None]
    causal: Sequence[bool]

    def arguments(self, model: Model, layers: Sequence[int]) -> tuple[Pairs, bool]:
        """What a launch passes, and whether there is a mask among it."""
        masks = [[x[i] for i in layers] for x in (self.query_masks, self.key_masks)]
        anything = next((m for x in masks for m in x if m is not None), None)
        unused = model.q[layers[0]] if anything is None else anything
        given = (pad([unused if m is None else m.contiguous() for m in x]) for x in masks)
        flags = (pad([int(m is not None) for m in x]) for x in masks)
        queries, keys = zip(*(model.lengths(i) for i in layers), strict=True)
        causal = pad([int(self.causal[i]) for i in layers])
        return Pairs(pad(queries), pad(keys), causal, *given, *flags), anything is not None


def is_dense(x: Tensor) -> bool:
    """Whether offsets within a tile of [B, H, N, d] fit 32 bits, d side by side."""
    return (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(2) < MAX_STRIDE


def select(
    tensors: Sequence[Tensor] | Mapping[int, Tensor], layers: Sequence[int]
) -> tuple[Tensor, ...]:
    """A launch's pointers."""
    return pad([tensors[i] for i in layers])


def strides(
    tensors: Sequence[Tensor] | Mapping[int, Tensor], layers: Sequence[int], unit: int
) -> tuple[tuple[int, ...], ...]:
    """Of B, H and N, each an entry a layer."""
    return tuple(pad([tensors[i].stride(dim) // unit for i in layers]) for dim in range(3))


def residual_strides(residuals: Sequence[Tensor], layers: Sequence[int]) -> tuple[int, ...]:
    """Of the residuals' rows."""
    return pad([residuals[i].shape[-1] // ROW_UNIT for i in layers])


def shifts(x: Tensor) -> dict[str, int]:
    """The powers of two, as a backward kernel's keyword arguments."""
    return dict(zip(("P_SHIFT", "R_SHIFT"), SHIFTS.get(x.dtype, (0, 0)), strict=True))


def groups(keys: Mapping[int, K]) -> list[tuple[K, list[int]]]:
    """Layers that share a launch, by key."""
    by_key: dict[K, list[int]] = {}
    for layer, key in keys.items():
        by_key.setdefault(key, []).append(layer)
    return [
        (key, layers[start : start + MAX_LAYERS])
        for key, layers in by_key.items()
        for start in range(0, len(layers), MAX_LAYERS)
    ]


def config(table: Table, width: int, *examples: Tensor) -> LaunchConfig:
    """The table's entry for heads of a width."""
    itemsize = max(x.element_size() for x in examples)
    bucket = 64 if width <= 64 else 128
    return launch.lookup(table, launch.capability(examples[0]), itemsize, bucket)


def options(chosen: LaunchConfig) -> dict[str, object]:
    """An entry as a kernel's keyword arguments."""
    return launch.options(chosen)


def tiles(counts: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where each layer's tiles start and at the end their number, and a launch's argument of it."""
    first = first_tiles(counts)
    return first, pad(first[:-1], first[-1])
