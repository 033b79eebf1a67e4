"""What the kernels share: products, descriptors, what they serve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layers import INTERPRETED

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@triton.jit
def add_product(
    acc,  # [BLOCK_M, BLOCK_N]
    a_ptr,  # [heads, M, K]
    b_ptr,  # [heads / share, K, N]: heads of A side by side take the same B
    stride_ah, stride_am, stride_ak, stride_bh, stride_bk, stride_bn,
    rows,  # [BLOCK_M] bool: False reads as 0
    cols,  # [BLOCK_N] bool
    heads,
    share,
    K,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,  # every row and column is read, and K is a multiple of BLOCK_K
):  # fmt: skip
    """acc + the first tile of the sum of A B over the heads: the head is an inner dimension too."""
    m, n, k = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1]), tl.arange(0, BLOCK_K)
    a_tile = m[:, None] * stride_am + k[None, :] * stride_ak
    b_tile = k[:, None] * stride_bk + n[None, :] * stride_bn
    steps = tl.cdiv(K, BLOCK_K)
    back = tl.cast(steps * BLOCK_K, tl.int64)
    a_next, b_back = stride_ah - back * stride_ak, -back * stride_bk
    start = K * 0
    head = K * 0
    # one loop, so that loads run ahead from head to head
    for _ in tl.range(0, heads * steps):
        if WHOLE:
            a, b = tl.load(a_ptr + a_tile), tl.load(b_ptr + b_tile)
        else:
            inside = k < K - start
            a = tl.load(a_ptr + a_tile, mask=rows[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_ptr + b_tile, mask=inside[:, None] & cols[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
        start += BLOCK_K
        a_ptr += BLOCK_K * stride_ak
        b_ptr += BLOCK_K * stride_bk
        ends = start >= K
        a_ptr += tl.where(ends, a_next, 0)
        head += ends.to(tl.int32)
        b_next = b_back + tl.where(head % share == 0, stride_bh, 0)
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

    It comes from PyTorch's allocator, in the order of the stream, in a CUDA graph from its pool. An
    allocator that somebody has set stays.
    """
    from triton.runtime import _allocation as state

    if isinstance(state._allocator.get(), state.NullAllocator):
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda")
        )


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
