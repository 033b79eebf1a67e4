"""Gradients of a layer whose residual would be too large, from strips of its queries.

The residual of a map, ``[B, Nq, Nk]``, is all that grows with the square of the length. A strip of
queries, with the keys that they see, is a smaller problem: its dQ is the layer's, and its dK one
term of a sum. What a strip needs is computed again, so nothing is kept between forward and
backward. Beside the gradients, backward has ``ROOM`` bytes of residual (more where 128 queries take
more), and of each element of k a number in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from optima_fast.losses.blockwise.attention import valid_pairs
from optima_fast.losses.blockwise.blocks import starts
from optima_fast.losses.reference import accumulator

if TYPE_CHECKING:
    from optima_fast.losses.backends import Backend, Gradients, Inputs

ROOM = 2**28  # bytes of residual at a time
MOST_KEPT = 2**31  # bytes of a layer's residual that are kept for backward
ROWS = 128  # what a strip's queries are a multiple of

# which axis of a field is that of queries, of keys
QUERIES = {
    "student_q": 2, "teacher_q": 2, "q": 2, "weight": 2,
    "student_lse": 2, "teacher_lse": 2, "query_mask": 1,
}  # fmt: skip
KEYS = {"student_k": 2, "teacher_k": 2, "k": 1, "key_mask": 1}


class Strip(NamedTuple):
    """What a backend is told of a strip.

    Attributes:
        first: the place of its first query among its keys.
        sums: of each element of its keys, dK of the strips before it; None where none is wanted.
    """

    first: int
    sums: Tensor | None


def too_large(x: Inputs) -> bool:
    """Whether the residual of a layer is not kept."""
    layers = range(len(x[0]))
    return _has_residual(x) and any(_residual_bytes(x, i) > MOST_KEPT for i in layers)


def needed(layer: Inputs) -> bool:
    """Whether one layer is computed by strips, once nothing is kept."""
    return _has_residual(layer) and _residual_bytes(layer, 0) > ROOM


def shape(layer: Inputs) -> tuple[int, int]:
    """How many batch items and queries make a strip: whole items, or queries of one."""
    items, queries = layer.trained[0].shape[0], layer.trained[0].shape[2]
    row_bytes = _residual_bytes(layer, 0) // (items * queries)
    rows = min(queries, max(ROWS, ROOM // row_bytes // ROWS * ROWS))
    return max(1, min(items, ROOM // (row_bytes * queries))), rows


def gradients(backend: Backend, upstream: Tensor, x: Inputs) -> Gradients:
    """Those of one layer, from its upstream gradient [1] and its inputs."""
    q, k = x.trained[:2]
    (B, _, Nq, _), Nk, dtype = q.shape, k.shape[-2], accumulator(*x.tensors)
    causal, window = x.causal[0], getattr(x, "window", [0])[0]
    pairs = valid_pairs(x.query_mask[0], x.key_mask[0], causal, window, (B, Nq, Nk), dtype)
    squared = getattr(x, "target", "kl") in ("scores", "probs")
    number = pairs.number if squared else pairs.rows(B, Nq, dtype)
    scale = upstream.new_full((1,), 2.0 if squared else 1.0, dtype=dtype) / number
    x = x._replace(query_mask=[pairs.queries], key_mask=[pairs.keys])
    pairs_of = zip(x.trained, x.needed, strict=True)
    found = [torch.empty_like(t) if need else None for t, need in pairs_of]
    sums = k.new_zeros(k.shape, dtype=dtype) if x.needed[1] else None
    items, rows = shape(x)
    for b0, b1 in starts(B, items):
        for i0, i1 in starts(Nq, rows):
            j0, j1 = pairs.seen(i0, i1, Nk)
            part = _cut(x, slice(b0, b1), slice(i0, i1), slice(j0, j1))
            onto = None if sums is None else sums[b0:b1, ..., j0:j1, :]
            strip = Strip(i0 - j0, onto)
            _, saved = backend.forward(part, strip)
            assert backend.backward is not None
            values = backend.backward(upstream, [*saved[:-1], scale], part, strip)
            for whole, value, axis in zip(found, values, (2, None, 2), strict=False):
                if whole is not None and value is not None and axis is not None:
                    whole[b0:b1, :, i0:i1] = value
    if found[1] is not None and sums is not None:
        found[1].copy_(sums)
    return found


def _cut(x: Inputs, items: slice, queries: slice, keys: slice) -> Inputs:
    """A strip of one layer."""
    changed: dict[str, Any] = {}
    for axes, part in ((QUERIES, queries), (KEYS, keys)):
        for name, axis in axes.items():
            value = getattr(x, name, [None])[0]
            if value is not None:
                changed[name] = [value[(items, *[slice(None)] * (axis - 1), part)]]
    return x._replace(**changed)


def _has_residual(x: Inputs) -> bool:
    return getattr(x, "target", None) != "kl-each"


def _residual_bytes(x: Inputs, layer: int) -> int:
    q, keys = x.trained[layer], x.trained[len(x[0]) + layer].shape[-2]
    wider = q.dtype == torch.float16 and getattr(x, "target", None) == "kl"
    return int(q.shape[0] * q.shape[2] * keys * (4 if wider else q.element_size()))
