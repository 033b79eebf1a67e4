"""What the kernels of head-averaged attention maps share: their arguments, tiles, Q K^T."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import LaunchConfig
from .layers import pick, pointers, power_of_2, stride

LOG2E = tl.constexpr(1.4426950408889634)
MAX_STRIDE = 2**24  # a tile has at most 2**7 rows
ROW_UNIT = 16  # elements that a stored residual's rows are padded to a multiple of
# Powers of two for P and for R, which never exceed 1, that keep both and their product among
# float16's normal numbers.
SHIFTS = {torch.float16: (8, 7)}


class Heads(NamedTuple):
    """The queries and keys of one model's layers, as a kernel takes them."""

    q: Any  # pointers, one a layer, to [B, H, Nq, D]
    k: Any  # to [B, H / share, Nk, D]
    q_stride: Any  # of B, H and Nq; D lies side by side
    k_stride: Any
    share: Any  # heads of q side by side that take the same head of k


class Masks(NamedTuple):
    """Which queries and keys count; never read where nothing is masked."""

    query: Any  # pointers, one a layer, to [B, Nq] bool
    key: Any  # to [B, Nk] bool
    first: Any  # the place of the first query among the keys; None: 0


@triton.jit
def place(ptr, strides, item, head, row):
    """Where a head's row is. B H N d passes 2**31; offsets within a tile do not."""
    offset = strides[0] * item.to(tl.int64) + strides[1] * tl.cast(head, tl.int64)
    return ptr + (offset + strides[2] * tl.cast(row, tl.int64))


@triton.jit
def next_key(head, share, stride):
    """How far it is from the keys of a head to those of the next: 0 where they are the same."""
    return tl.where((head + 1) % share == 0, tl.cast(stride, tl.int64), 0)


@triton.jit
def load_rows(ptr, stride, inside, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
              WHOLE: tl.constexpr):  # fmt: skip
    """[N, WIDTH] of a head; zeros outside. WHOLE: no row is outside."""
    n, e = tl.arange(0, inside.shape[0]), START + tl.arange(0, WIDTH)
    tile = ptr + n[:, None] * stride + e[None, :]
    if WHOLE and D % WIDTH == 0:
        x = tl.load(tile)
    elif WHOLE:
        x = tl.load(tile, mask=(e < D)[None, :], other=0.0)
    elif D % WIDTH == 0:
        x = tl.load(tile, mask=inside[:, None], other=0.0)
    else:
        x = tl.load(tile, mask=inside[:, None] & (e < D)[None, :], other=0.0)
    return x


@triton.jit
def store_rows(ptr, values, stride, inside, D: tl.constexpr):
    n, e = tl.arange(0, values.shape[0]), tl.arange(0, values.shape[1])
    mask = inside[:, None] & (e < D)[None, :]
    values = values.to(ptr.dtype.element_ty)
    tl.store(ptr + n[:, None] * stride + e[None, :], values, mask=mask)


@triton.jit
def products(
    q,  # [M, WIDTH], the tile at q_ptr
    k,  # [N, WIDTH], the tile at k_ptr
    q_ptr, k_ptr, stride_q, stride_k,
    rows,  # [M] bool: which to load
    cols,  # [N] bool
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """q k^T, in chunks where whole rows take too many registers: float32, without tensor cores."""
    if CHUNK >= WIDTH:
        s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
    else:
        s = tl.zeros((rows.shape[0], cols.shape[0]), ACC)
        for start in tl.static_range(0, WIDTH, CHUNK):
            a = load_rows(q_ptr, stride_q, rows, start, CHUNK, D, False)
            b = load_rows(k_ptr, stride_k, cols, start, CHUNK, D, False)
            s = tl.dot(a, tl.trans(b), s, input_precision="ieee", out_dtype=ACC)
    return s


@triton.jit
def positive(scale, ACC: tl.constexpr):
    """The scale of scores in powers of two, above 0: so that -inf stays itself."""
    return tl.maximum(tl.cast(scale, ACC) * LOG2E, 1e-30)


@triton.jit
def counted(mask, item, start, length, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] bool: which positions from ``start`` on are before ``length`` and not masked."""
    n = tl.arange(0, BLOCK)
    inside = n < length - start
    if MASKED:
        at = mask + item.to(tl.int64) * length + start
        inside &= tl.load(at + n, mask=inside, other=0) != 0
    return inside


@triton.jit
def valid_pairs(rows, cols, row, col, CAUSAL: tl.constexpr, WINDOW: tl.constexpr = 0):
    """[M, N] bool, from which of the queries at ``row`` and the keys at ``col`` on count."""
    valid = rows[:, None] & cols[None, :]
    i, j = tl.arange(0, rows.shape[0]) + row, tl.arange(0, cols.shape[0]) + col
    if CAUSAL:
        valid &= i[:, None] >= j[None, :]
    if WINDOW:
        valid &= tl.abs(i[:, None] - j[None, :]) < WINDOW
    return valid


@triton.jit
def placed(masks, row):
    """The place of a query among the keys."""
    if masks.first is not None:
        row += masks.first
    return row


@triton.jit
def keys_seen(rows, row, keys, CAUSAL: tl.constexpr, WINDOW: tl.constexpr = 0):
    """Up to where a block of queries sees keys: nowhere if none of them counts."""
    last = tl.max(tl.where(rows, row + tl.arange(0, rows.shape[0]), -1), axis=0)
    if CAUSAL:
        return tl.minimum(last + 1, keys)
    elif WINDOW:
        return tl.where(last >= 0, tl.minimum(last + WINDOW, keys), 0)
    else:
        return tl.where(last >= 0, keys, 0)


@triton.jit
def first_seen(start, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """From which block on places are less than WINDOW before ``start``; 0 without a window."""
    first = start * 0
    if WINDOW:
        first = tl.maximum(start - (WINDOW - 1), 0) // BLOCK * BLOCK
    return first


@triton.jit
def in_reach(row, col, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr,
             N: tl.constexpr):  # fmt: skip
    """1 if a tile may have a pair in it that sees one another, else 0."""
    reach = row >= 0
    if CAUSAL:
        reach &= col < row + M
    if WINDOW:
        reach &= (col + N > row - (WINDOW - 1)) & (col < row + M + (WINDOW - 1))
    return reach.to(tl.int32)


@triton.jit
def log_sums(ptr, rows, SHIFT, MASKED: tl.constexpr):
    """Of the rows at ptr: log-sum-exp in powers of two less SHIFT, and which rows are to be read.

    A query that counts but sees no key has -inf, or anything where the log-sum-exp was given: it
    is not read, for it may hold nan.
    """
    lse = tl.load(ptr + tl.arange(0, rows.shape[0]), mask=rows, other=0.0)
    if MASKED:
        rows &= lse > -float("inf")
        lse = tl.where(rows, lse, 0.0)
    return lse - SHIFT, rows


@triton.jit
def add_map(
    acc,  # [M, N]
    sign: tl.constexpr,
    model, lse_ptr, heads, scale, layer, item, row, col, queries, rows, cols,
    WHOLE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """acc + sign times a tile of the heads' mean map; pairs that do not count get anything."""
    stride_q, stride_k = model.q_stride[2], model.k_stride[2]
    q_ptr = place(pick(model.q, layer), model.q_stride, item, 0, row)
    k_ptr = place(pick(model.k, layer), model.k_stride, item, 0, col)
    lse_ptr += item.to(tl.int64) * heads * queries + row + tl.arange(0, rows.shape[0])
    c = positive(scale, ACC)
    # 1 / H in the exponent costs nothing an element
    log_heads = tl.log2(tl.cast(tl.maximum(heads, 1), ACC))
    for head in tl.range(0, heads):
        q = load_rows(q_ptr, stride_q, rows, 0, WIDTH, D, WHOLE)
        k = load_rows(k_ptr, stride_k, cols, 0, WIDTH, D, WHOLE)
        lse = tl.load(lse_ptr, mask=rows, other=0.0) + log_heads
        s = products(q, k, q_ptr, k_ptr, stride_q, stride_k, rows, cols, WIDTH, CHUNK, D, ACC)
        acc += sign * tl.exp2(s * c - lse[:, None])
        q_ptr += model.q_stride[1]
        k_ptr += next_key(head, model.share, model.k_stride[1])
        lse_ptr += queries
    return acc


@triton.jit
def load_residual(ptr, stride, row, col, in_rows, in_cols):
    """[M, N] of one item's residual, whose rows are padded with zeros; zeros outside."""
    m, n = tl.arange(0, in_rows.shape[0]), tl.arange(0, in_cols.shape[0])
    tile = ptr + (tl.cast(row, tl.int64) * stride + col) + m[:, None] * stride + n[None, :]
    return tl.load(tile, mask=in_rows[:, None] & in_cols[None, :], other=0.0)


@triton.jit
def store_residual(ptr, values, stride, row, col, queries, SHIFT: tl.constexpr):
    m, n = tl.arange(0, values.shape[0]), tl.arange(0, values.shape[1])
    tile = ptr + (tl.cast(row, tl.int64) * stride + col) + m[:, None] * stride + n[None, :]
    mask = (m < queries - row)[:, None] & (n < stride - col)[None, :]
    tl.store(tile, (values * 2.0**SHIFT).to(ptr.dtype.element_ty), mask=mask)


class Model(NamedTuple):
    """One model's queries and keys, an entry a layer."""

    q: list[Tensor]
    k: list[Tensor]
    scale: Sequence[float]

    @classmethod
    def of(cls, q: Sequence[Tensor], k: Sequence[Tensor], scale: Sequence[float]) -> Model:
        """Reads heads in place where their rows are dense, and copies them elsewhere."""
        queries, keys = ([x if is_dense(x) else x.contiguous() for x in y] for y in (q, k))
        return cls(queries, keys, scale)

    def positive(self) -> Model:
        """The same maps with no scale below 0, as the forward kernels need them."""
        q = [-x if s < 0 else x for x, s in zip(self.q, self.scale, strict=True)]
        return Model(q, self.k, [abs(s) for s in self.scale])

    def form(self, layer: int) -> tuple[Any, ...]:
        """What layers of one launch share."""
        q, k = self.q[layer], self.k[layer]
        return q.shape, k.shape[1:3], self.scale[layer], strides(q), strides(k)

    def arguments(self, layers: Sequence[int]) -> Heads:
        """What a launch passes."""
        i = layers[0]
        q, k = pointers(self.q, layers), pointers(self.k, layers)
        return Heads(q, k, strides(self.q[i]), strides(self.k[i]), self.share(i))

    def share(self, layer: int) -> int:
        """Heads of q for each of k."""
        return self.q[layer].shape[1] // self.k[layer].shape[1]


class Counted(NamedTuple):
    """Which pairs count, an entry a layer."""

    query_masks: Sequence[Tensor | None]
    key_masks: Sequence[Tensor | None]
    causal: Sequence[bool]
    window: Sequence[int]
    first: int | None = None  # of a strip of queries: its first one's place among the keys

    @classmethod
    def of(
        cls,
        query_masks: Sequence[Tensor | None],
        key_masks: Sequence[Tensor | None],
        causal: Sequence[bool],
        window: Sequence[int] | None,
        first: int | None = None,
    ) -> Counted:
        """With a window, masks of what is in a valid pair: anything else may hold nan. Those of a
        strip are such masks already."""
        windows = window or [0] * len(causal)
        if first is not None:
            return cls(query_masks, key_masks, causal, windows, first)
        q_masks, k_masks = list(query_masks), list(key_masks)
        for i, w in enumerate(windows):
            q, k = q_masks[i], k_masks[i]
            given = q if k is None else k
            if not w or given is None:
                continue
            q, k = (torch.ones_like(given) if x is None else x for x in (q, k))
            before, after = (w - 1, 0) if causal[i] else (w - 1, w - 1)
            q_masks[i], k_masks[i] = q & _near(k, before, after), k & _near(q, after, before)
        return cls(q_masks, k_masks, causal, windows)

    def form(self, layer: int) -> tuple[bool, bool, int]:
        """Whether anything is masked, causality, window."""
        masked = self.query_masks[layer] is not None or self.key_masks[layer] is not None
        return masked, self.causal[layer], self.window[layer]

    def arguments(self, like: Tensor, queries: int, keys: int, layers: Sequence[int]) -> Masks:
        """What a launch passes: where only queries or only keys are masked, all others count."""
        if not self.form(layers[0])[0]:
            unread = pointers([like], [0])
            return Masks(unread, unread, self.first)
        both = (
            [
                like.new_ones(len(like), n, dtype=torch.bool) if mask is None else mask.contiguous()
                for mask in (masks[i] for i in layers)
            ]
            for n, masks in ((queries, self.query_masks), (keys, self.key_masks))
        )
        query, key = (pointers(x, range(len(x))) for x in both)
        return Masks(query, key, self.first)

    def queries_that_see(self, layer: int, q: Tensor, keys: int) -> Tensor:
        """How many queries of a layer count and see a key that counts; 1 at least."""
        queries, seen = self.query_masks[layer], self.key_masks[layer]
        number = q.new_full((), q.shape[0] * q.shape[2] * min(keys, 1), dtype=torch.int64)
        if seen is not None and self.first is None:
            # with a window the masks hold what is in a valid pair already
            sees = _near(seen, keys, 0) if self.causal[layer] else seen.any(1, keepdim=True)
            queries = sees.expand(q.shape[0], q.shape[2]) if queries is None else queries & sees
        return (number if queries is None else queries.sum()).clamp(min=1)


def _near(mask: Tensor, before: int, after: int) -> Tensor:
    """[B, N]: whether any counts from so many places before each one to so many after it."""
    n = mask.shape[1]
    sums = torch.nn.functional.pad(mask.cumsum(1), (1, 0))
    place = torch.arange(n, device=mask.device)
    last, first = (place + after + 1).clamp(max=n), (place - before).clamp(min=0)
    return sums[:, last] > sums[:, first]


def is_dense(x: Tensor) -> bool:
    """Whether offsets within a tile of [B, H, N, d] fit 32 bits, d side by side."""
    return (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(2) < MAX_STRIDE


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of B, H and N."""
    return stride(x, 0), stride(x, 1), stride(x, 2)


def in_powers_of_two(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """A natural log-sum-exp as the kernels keep it: each change of base would cost accuracy."""
    log2_e: float = LOG2E.value
    return (lse.to(dtype) * log2_e).contiguous()


def width(x: Tensor) -> int:
    """The columns of a tile of a head."""
    return max(16, power_of_2(x.shape[3]))


def shifts(x: Tensor) -> tuple[int, int]:
    """The powers of two of P and R."""
    return SHIFTS.get(x.dtype, (0, 0))


def residual_width(keys: int) -> int:
    """The length of a stored residual's rows: aligned, so that 16 bytes are read at a time."""
    return -(-keys // ROW_UNIT) * ROW_UNIT


def valid_count(shape: torch.Size, keys: int, causal: bool, window: int) -> int:
    """Pairs of queries ``[B, H, Nq, d]`` and keys, where nothing is masked."""
    items, _, queries, _ = shape
    if window:
        width = min(window, queries)
        lower = queries * width - width * (width - 1) // 2
        return items * (lower if causal else 2 * lower - queries)
    if not causal:
        return items * queries * keys
    square = min(queries, keys)
    return items * (square * (square + 1) // 2 + (queries - square) * keys)


def config(
    table: Mapping[tuple[int, ...], LaunchConfig], columns: int, *examples: Tensor
) -> LaunchConfig:
    """The table's entry for heads of so many columns; float64 takes float32's."""
    itemsize = min(4, max(x.element_size() for x in examples))
    bucket = 64 if columns <= 64 else 128
    return launch.lookup(table, launch.capability(examples[0]), itemsize, bucket)
