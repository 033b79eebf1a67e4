"""Tile sizes and compiler options of every kernel: plain tables, one entry a kind of chip and data.

Nothing is tuned in a user's first step. An entry's comment says where it is from: registers, spills
and shared memory as compiled ahead of time, which tests/kernels/test_resources.py repeats, or a
timing on a card.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class LaunchConfig(NamedTuple):
    """Tile sizes and the compiler's options of a product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Keys: (compute capability's major number, bytes an element).

# Ahead of time, not timed: two programs fit on a multiprocessor, so that one's epilogue hides under
# the other's products.
HIDDEN_MSE = {
    (8, 2): LaunchConfig(128, 128, 32, 4, 4),
    (9, 2): LaunchConfig(128, 128, 64, 8, 3),
    (10, 2): LaunchConfig(128, 128, 64, 8, 3),
    (8, 4): LaunchConfig(64, 64, 16, 4, 3),
    # from 64 rows on, Triton 3.6 takes float32 to tensor cores although IEEE products are asked for
    (10, 4): LaunchConfig(32, 128, 16, 4, 3),
    (8, 8): LaunchConfig(32, 32, 16, 4, 2),
}


def lookup(
    table: Mapping[tuple[int, ...], LaunchConfig], capability: tuple[int, int], *key: int
) -> LaunchConfig:
    """The entry for ``key`` of the newest architecture in the table no newer than this one.

    Consumer chips of 12.x have the shared memory of 8.x rather than of 10.x.
    """
    major = 8 if capability[0] >= 12 else capability[0]
    return table[max(entry for entry in table if entry[1:] == key and entry[0] <= major)]


def capability(x: Tensor) -> tuple[int, int]:
    """The tensor's device's, and the least that the kernels serve where there is none."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)


def options(config: LaunchConfig) -> dict[str, object]:
    """An entry as a kernel's keyword arguments."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,  # from Triton 3.10 on no longer the default
    }
