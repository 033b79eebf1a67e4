"""What the kernels share: many layers in one launch, the residual's product, the sums, the checks.

A launch takes every layer of a call as tuples of pointers, sizes and strides, one entry a layer. A
program finds its layer from the number of its tile, with no table in device memory: nothing is
copied, stacked or waited for, and a CUDA graph may record the launch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

V = TypeVar("V")

# a launch passes 100 to 200 bytes a layer, and a kernel's arguments have 4 KB
MAX_LAYERS = 16
TOTAL_BLOCK = 1024
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@triton.jit
def pick_raw(values, layer):
    """values[layer] of a tuple from ``pad_raw``, for a layer known only on the device."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(layer >= i, values[i], chosen)
    return chosen


@triton.jit
def pick(values, layer):
    """values[layer] of a tuple from ``pad``, for a layer known only on the device."""
    chosen = pick_raw(values, layer)
    if chosen.dtype.is_int():
        chosen = (chosen - 3) >> 1
    return chosen


@triton.jit
def find(first, tile):
    """The layer that a tile belongs to: the last that starts no later; layers may be empty."""
    layer = tile * 0
    for i in tl.static_range(1, len(first)):
        layer += (tile * 2 + 3 >= first[i]).to(tl.int32)
    return layer


@triton.jit
def add_product(
    acc,  # [BLOCK_M, BLOCK_N]
    a_ptr,  # [heads, M, K]
    b_ptr,  # [heads, K, N]
    stride_ah,
    stride_am,
    stride_ak,
    stride_bh,
    stride_bk,
    stride_bn,
    row_counts,  # [BLOCK_M] bool: False reads as 0
    col_counts,  # [BLOCK_N] bool
    heads,
    K,
    BLOCK_K: tl.constexpr,
):
    """acc + the first tile of the sum of A B over the heads: the head is an inner dimension too.

    Rows and columns that do not count read as zeros.
    """
    k = tl.arange(0, BLOCK_K)
    m, n = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1])
    a_tile = m[:, None] * stride_am + k[None, :] * stride_ak
    b_tile = k[:, None] * stride_bk + n[None, :] * stride_bn
    steps = tl.cdiv(K, BLOCK_K)
    back = (steps * BLOCK_K).to(tl.int64)
    a_next, b_next = stride_ah - back * stride_ak, stride_bh - back * stride_bk
    start = K * 0
    # one loop, so that loads run ahead from head to head
    for _ in range(heads * steps):
        inside = k < K - start
        a_mask = row_counts[:, None] & inside[None, :]
        b_mask = inside[:, None] & col_counts[None, :]
        a = tl.load(a_ptr + a_tile, mask=a_mask, other=0.0)
        b = tl.load(b_ptr + b_tile, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
        start += BLOCK_K
        a_ptr += BLOCK_K * stride_ak
        b_ptr += BLOCK_K * stride_bk
        ends = start >= K
        a_ptr += tl.where(ends, a_next, 0)
        b_ptr += tl.where(ends, b_next, 0)
        start = tl.where(ends, 0, start)
    return acc


@triton.jit
def own(first, program, programs):
    """The first tile from ``first`` on that is a persistent program's: each takes its in turn."""
    return first + (program + programs - first % programs) % programs


@triton.jit
def parts(x, SPLIT: tl.constexpr):
    """The columns of a tile in one or two parts, left to right."""
    if SPLIT == 1:
        return (x,)
    else:
        return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _total_kernel(
    sum_ptr,  # [tiles]
    count_ptr,  # [tiles] int32
    loss_ptr,  # [L] out
    scale_ptr,  # [L] out: 2 / n
    width,  # L ints, as all below: what one count stands for
    first,  # the layer's first tile
    end,  # the tile after its last
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(0)
    stop = pick(end, layer)
    total = tl.zeros((BLOCK,), dtype=ACC)
    counted = tl.zeros((BLOCK,), dtype=tl.int64)
    for start in range(pick(first, layer), stop, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        total += tl.load(sum_ptr + tiles, mask=tiles < stop, other=0.0)
        counted += tl.load(count_ptr + tiles, mask=tiles < stop, other=0)
    # where nothing counts the sum is 0 already
    n = tl.maximum(tl.sum(counted, axis=0) * pick(width, layer), 1).to(ACC)
    tl.store(loss_ptr + layer, tl.sum(total, axis=0) / n)
    tl.store(scale_ptr + layer, 2.0 / n)


INTERPRETED = not isinstance(pick, JITFunction)


def total(
    sums: Tensor, counts: Tensor, widths: Sequence[int], first: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Losses and scales of L layers from what their tiles found, in a fixed order.

    Args:
        sums: ``[tiles]``, each tile's sum of squares, float32 or float64.
        counts: ``[tiles]`` int32, what each tile adds to its layer's count.
        widths: L ints: how many elements one count stands for.
        first: as ``first_tiles`` returns it.

    Returns:
        losses ``[L]``, sum / n, and scales ``[L]``, 2 / n, where n is at least 1.
    """
    losses, scales = (sums.new_empty(len(widths)) for _ in range(2))
    _total_kernel[(len(widths),)](
        sums,
        counts,
        losses,
        scales,
        pad(widths),
        pad(first[:-1], first[-1]),
        pad(first[1:], first[-1]),
        BLOCK=TOTAL_BLOCK,
        ACC=accumulator(sums)[1],
        enable_fp_fusion=True,
    )
    return losses, scales


def first_tiles(tiles: Iterable[int]) -> tuple[int, ...]:
    """Where each layer's tiles start, and at the end their number."""
    return (0, *accumulate(tiles))


def pad_raw(values: Sequence[V], fill: V | None = None) -> tuple[V, ...]:
    """The layers' values and those of empty layers, up to the next power of two.

    A launch of another number of layers then seldom needs another compilation. An empty layer has
    no tile, so that its values are never used: by default they are the first layer's.
    """
    missing = triton.next_power_of_2(len(values)) - len(values)
    return (*values, *(values[0] if fill is None else fill,) * missing)


def pad(values: Sequence[V], fill: V | None = None) -> tuple[V, ...]:
    """As ``pad_raw``, integers from 0 on in a code that ``pick`` and ``find`` undo.

    Triton compiles a kernel again for a 1 and for a multiple of 16, in a tuple whatever its
    ``do_not_specialize`` says. An odd number from 3 on is neither. Strides are better raw: 16
    bytes are loaded at a time only where the compiler knows them to be multiples.
    """
    return tuple(2 * x + 3 if isinstance(x, int) else x for x in pad_raw(values, fill))


def describable(tensors: Iterable[Tensor]) -> bool:
    """Whether TMA can address these tensors: strides are of 16 bytes' multiples, the last 1.

    The stride of a dimension of size 1 counts too.
    """
    return hasattr(tl, "make_tensor_descriptor") and all(
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
        for x in tensors
    )


def allow_scratch() -> None:
    """Let this thread's launches have the scratch memory in which descriptors are built.

    It comes from PyTorch's allocator, in the order of the stream, in a CUDA graph from its pool.
    """
    triton.set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda")
    )


@triton.jit
def of_bits(bits, ACC: tl.constexpr):
    """A float64 from its bits: as an argument it would be rounded to float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)


def bits(x: float) -> int:
    """For ``of_bits``. Odd, and far from 1: no other number needs another compilation."""
    return int(struct.unpack("q", struct.pack("d", x or -0.0))[0]) | 1


def accumulator(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """The dtype of products and sums: float32, or float64 for float64; PyTorch's and Triton's."""
    wide = x.dtype == torch.float64
    return (torch.float64, tl.float64) if wide else (torch.float32, tl.float32)


def device_refusals(tensors: Sequence[Tensor]) -> list[str]:
    """Each reason why no kernel here can take these tensors, by device and dtype."""
    reasons = []
    devices = sorted({str(x.device) for x in tensors})
    device = tensors[0].device
    if len(devices) > 1:
        reasons.append(f"all tensors must be on one device, got {', '.join(devices)}")
    elif device.type != "cuda" and not INTERPRETED:
        reasons.append(f"the device must be CUDA, got {device}, and TRITON_INTERPRET is not set")
    elif device.type == "cuda" and torch.version.hip is not None:
        reasons.append("the device must be NVIDIA's, got a ROCm build of PyTorch")
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        reasons.append(f"compute capability must be at least 8.0, got {major}.{minor}")
    found = {x.dtype for x in tensors}
    for dtype in sorted(found - set(DTYPES), key=str):
        reasons.append(f"dtypes must be float16, bfloat16, float32 or float64, got {dtype}")
    if torch.float64 in found and len(found) > 1:
        reasons.append("float64 cannot be mixed with other dtypes")
    if torch.float64 in found and not INTERPRETED:
        reasons.append(
            "float64 runs in the interpreter only: Triton 3.6 cannot compile its products"
        )
    if torch.bfloat16 in found and INTERPRETED:
        reasons.append("the interpreter computes bfloat16 products wrongly; use float16 or float32")
    return reasons


def dtype_refusals(name: str, tensors: Sequence[Tensor]) -> list[str]:
    """Why tensors that a kernel takes as one tuple cannot be one: their dtypes differ."""
    dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in tensors})
    return [f"{name} must have one dtype, got {', '.join(dtypes)}"] if len(dtypes) > 1 else []
