"""Tile sizes and compiler options of every kernel: plain tables, one entry a kind of chip and data.

Nothing is tuned in a user's first step. Entries of 9.x for 2 bytes an element were timed on an H200
(bench/results); the others were chosen by registers, spills and shared memory as compiled ahead of
time, which tests/kernels/resources.py repeats. ``CANDIDATES`` holds entries to be timed beside
the table's own.
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
    programs: int = 0
    """Persistent programs a multiprocessor, which load by TMA; 0: plain loads, a program a tile."""
    split: int = 1
    """Parts that the columns of a tile are stored in; for persistent programs."""
    maxnreg: int = 0
    """Registers that a thread may have; 0: as many as there are."""

    def fitted(self, queries: int) -> LaunchConfig:
        """Half the rows and warps where 128 rows would be half empty."""
        if queries <= 64 and self.block_m == 128 and self.num_warps == 8:
            return self._replace(block_m=64, num_warps=4)
        return self


Table = dict[tuple[int, ...], LaunchConfig]

# Keys: (compute capability's major number, bytes an element). From 8.x entries, which load plainly,
# come those of data that TMA cannot address.

# Projected hidden states, forward and backward. From 64 rows on, Triton 3.6 takes float32 to
# sm_100's tensor cores although IEEE products are asked for.
PRODUCT: Table = {
    (8, 2): LaunchConfig(128, 128, 32, 4, 4),
    (9, 2): LaunchConfig(128, 128, 64, 4, 3, programs=2, split=2),
    (10, 2): LaunchConfig(128, 128, 64, 8, 3, maxnreg=128),
    (8, 4): LaunchConfig(64, 64, 16, 4, 3),
    (10, 4): LaunchConfig(32, 128, 16, 4, 3),
}

# Keys: the two above and the greatest number of queries or keys, up to 64 or more.
SCORES_FORWARD: Table = {
    (8, 2, 64): LaunchConfig(64, 64, 32, 4, 4),
    (8, 2, 128): LaunchConfig(128, 64, 32, 4, 4),
    (9, 2, 64): LaunchConfig(64, 64, 64, 4, 3),
    (9, 2, 128): LaunchConfig(128, 256, 64, 8, 3),
    (10, 2, 64): LaunchConfig(64, 64, 64, 4, 3),
    (10, 2, 128): LaunchConfig(128, 128, 64, 8, 3, maxnreg=128),
    (8, 4, 64): LaunchConfig(64, 64, 16, 4, 2),
    (8, 4, 128): LaunchConfig(64, 64, 16, 4, 2),
    (10, 4, 64): LaunchConfig(32, 128, 16, 4, 3),
    (10, 4, 128): LaunchConfig(32, 128, 16, 4, 3),
}
# Keys: the two above and the width of a head, or of all where they lie side by side, up to 64 or
# more.
SCORES_BACKWARD: Table = {
    (8, 2, 64): LaunchConfig(128, 64, 32, 4, 4),
    (8, 2, 128): LaunchConfig(128, 64, 32, 4, 4),
    (9, 2, 64): LaunchConfig(128, 64, 64, 4, 3),
    (9, 2, 128): LaunchConfig(128, 256, 64, 8, 3),
    (10, 2, 64): LaunchConfig(128, 64, 64, 4, 3),
    (10, 2, 128): LaunchConfig(128, 128, 64, 8, 3),
    (8, 4, 64): LaunchConfig(64, 64, 16, 4, 3),
    (8, 4, 128): LaunchConfig(64, 64, 16, 4, 3),
    (10, 4, 64): LaunchConfig(32, 128, 16, 4, 3),
    (10, 4, 128): LaunchConfig(32, 128, 16, 4, 3),
}

# Attention probabilities. Keys: (compute capability's major number, bytes an element of the wider
# model, columns that a head is padded to, 64 at most or 128). block_k: of a head at a time where it
# is narrower; without tensor cores whole heads take too many registers. maxnreg lets one program
# more fit on a multiprocessor.
PROBS_LSE: Table = {
    (8, 2, 64): LaunchConfig(128, 64, 128, 8, 2, maxnreg=128),
    (8, 2, 128): LaunchConfig(64, 64, 128, 4, 2),
    (9, 2, 64): LaunchConfig(64, 64, 128, 4, 3),
    (9, 2, 128): LaunchConfig(128, 64, 128, 8, 2),
    (10, 2, 64): LaunchConfig(128, 64, 128, 8, 3, maxnreg=128),
    (10, 2, 128): LaunchConfig(128, 64, 128, 8, 2, maxnreg=128),
    (8, 4, 64): LaunchConfig(64, 32, 16, 4, 2),
    (8, 4, 128): LaunchConfig(64, 32, 16, 4, 2),
    (10, 4, 64): LaunchConfig(32, 32, 16, 4, 2),
    (10, 4, 128): LaunchConfig(32, 32, 16, 4, 2),
}
PROBS_RESIDUAL: Table = {
    (8, 2, 64): LaunchConfig(64, 64, 128, 4, 3),
    (8, 2, 128): LaunchConfig(64, 64, 128, 4, 2, maxnreg=255),
    (9, 2, 64): LaunchConfig(64, 128, 128, 4, 3, maxnreg=168),
    (9, 2, 128): LaunchConfig(128, 64, 128, 8, 2, maxnreg=128),
    (10, 2, 64): LaunchConfig(128, 64, 128, 8, 3, maxnreg=128),
    (10, 2, 128): LaunchConfig(128, 64, 128, 8, 2, maxnreg=128),
    (8, 4, 64): LaunchConfig(64, 32, 16, 4, 2),
    (8, 4, 128): LaunchConfig(64, 32, 16, 4, 2),
    (10, 4, 64): LaunchConfig(32, 32, 16, 4, 2),
    (10, 4, 128): LaunchConfig(32, 32, 16, 4, 2),
}
PROBS_DQ: Table = {
    (8, 2, 64): LaunchConfig(64, 32, 128, 4, 2),
    (8, 2, 128): LaunchConfig(32, 64, 128, 4, 2),
    (9, 2, 64): LaunchConfig(64, 32, 128, 4, 3, maxnreg=128),
    (9, 2, 128): LaunchConfig(64, 32, 128, 4, 3),
    (10, 2, 64): LaunchConfig(64, 64, 128, 4, 2),
    (10, 2, 128): LaunchConfig(64, 64, 128, 4, 2),
    (8, 4, 64): LaunchConfig(32, 32, 16, 8, 1),
    (8, 4, 128): LaunchConfig(32, 32, 16, 8, 1),
}
PROBS_DK: Table = {
    (8, 2, 64): LaunchConfig(64, 64, 128, 4, 2),
    (8, 2, 128): LaunchConfig(32, 64, 128, 4, 2),
    (9, 2, 64): LaunchConfig(64, 64, 128, 4, 3, maxnreg=168),
    (9, 2, 128): LaunchConfig(64, 64, 128, 4, 3),
    (10, 2, 64): LaunchConfig(64, 64, 128, 4, 2),
    (10, 2, 128): LaunchConfig(64, 32, 128, 4, 2),
    (8, 4, 64): LaunchConfig(32, 32, 16, 4, 1),
    (8, 4, 128): LaunchConfig(32, 32, 16, 4, 1),
}
# dQ and dK together, for queries of one block.
PROBS_ONE_BLOCK: Table = {
    (8, 2, 64): LaunchConfig(64, 64, 128, 4, 2),
    (8, 2, 128): LaunchConfig(32, 64, 128, 4, 2),
    (9, 2, 64): LaunchConfig(64, 64, 128, 4, 3),
    (9, 2, 128): LaunchConfig(64, 64, 128, 4, 2),
    (8, 4, 64): LaunchConfig(32, 32, 16, 4, 1),
    (8, 4, 128): LaunchConfig(32, 32, 16, 4, 1),
}
# Rows of maps in registers, of 16 bits. Keys: (capability's major number, 2, keys of a tile,
# columns of a head).
PROBS_ROWS_FORWARD: Table = {
    (8, 2, 64, 64): LaunchConfig(32, 64, 0, 4, 2),
    (8, 2, 64, 128): LaunchConfig(32, 64, 0, 4, 1),
    (8, 2, 128, 64): LaunchConfig(32, 128, 0, 4, 2),
    (9, 2, 64, 64): LaunchConfig(64, 64, 0, 4, 3, maxnreg=128),
    (9, 2, 64, 128): LaunchConfig(64, 64, 0, 4, 2),
    (9, 2, 128, 64): LaunchConfig(64, 128, 0, 4, 3),
    (9, 2, 128, 128): LaunchConfig(64, 128, 0, 8, 2),
    (9, 2, 256, 64): LaunchConfig(64, 256, 0, 8, 3),
}
PROBS_ROWS_BACKWARD: Table = {
    (8, 2, 64, 64): LaunchConfig(64, 64, 0, 4, 2),
    (8, 2, 64, 128): LaunchConfig(16, 64, 0, 4, 1),
    (9, 2, 64, 64): LaunchConfig(64, 64, 0, 4, 3),
    (9, 2, 64, 128): LaunchConfig(64, 64, 0, 4, 2),
}
# A divergence has a tile of both maps at once.
DIVERGENCE: Table = PROBS_RESIDUAL | {
    (9, 2, 64): LaunchConfig(64, 64, 128, 4, 3),
    (9, 2, 128): LaunchConfig(64, 64, 128, 4, 2),
    (10, 2, 64): LaunchConfig(64, 64, 128, 4, 2),
    (10, 2, 128): LaunchConfig(64, 64, 128, 4, 2),
}
DIVERGENCE_DQ: Table = PROBS_DQ | {(9, 2, 64): LaunchConfig(64, 32, 128, 4, 3)}
DIVERGENCE_DK: Table = PROBS_DK | {
    (9, 2, 64): LaunchConfig(64, 64, 128, 4, 3, maxnreg=168),
    (9, 2, 128): LaunchConfig(64, 32, 128, 4, 3),
}

# The index of a lightning indexer, whose heads share their keys.
INDEX_LSE: Table = {
    (8, 2, 64): LaunchConfig(64, 64, 128, 4, 3),
    (8, 2, 128): LaunchConfig(64, 64, 128, 4, 2),
    (9, 2, 64): LaunchConfig(64, 128, 128, 4, 3),
    (9, 2, 128): LaunchConfig(64, 128, 128, 4, 3),
    (10, 2, 64): LaunchConfig(128, 64, 128, 8, 2),
    (10, 2, 128): LaunchConfig(128, 64, 128, 8, 2),
    (8, 4, 64): LaunchConfig(32, 32, 16, 4, 2),
    (8, 4, 128): LaunchConfig(32, 32, 16, 4, 2),
}
INDEX_RESIDUAL: Table = {
    (8, 2, 64): LaunchConfig(64, 64, 128, 4, 3),
    (8, 2, 128): LaunchConfig(64, 64, 128, 4, 2),
    (9, 2, 64): LaunchConfig(64, 64, 128, 4, 3),
    (9, 2, 128): LaunchConfig(64, 128, 128, 4, 2),
    (10, 2, 128): LaunchConfig(64, 64, 128, 4, 3),
    (8, 4, 64): LaunchConfig(32, 32, 16, 4, 2),
    (8, 4, 128): LaunchConfig(32, 32, 16, 4, 2),
}
INDEX_DQ: Table = {
    (8, 2, 64): LaunchConfig(64, 64, 128, 4, 3),
    (8, 2, 128): LaunchConfig(64, 32, 128, 4, 3),
    (9, 2, 64): LaunchConfig(64, 64, 128, 4, 3),
    (9, 2, 128): LaunchConfig(64, 64, 128, 4, 3),
    (10, 2, 64): LaunchConfig(128, 64, 128, 8, 2),
    (10, 2, 128): LaunchConfig(128, 64, 128, 8, 2),
    (8, 4, 64): LaunchConfig(32, 32, 16, 8, 1),
    (8, 4, 128): LaunchConfig(32, 32, 16, 8, 1),
}
INDEX_DK: Table = {
    (8, 2, 64): LaunchConfig(32, 64, 128, 4, 3),
    (8, 2, 128): LaunchConfig(32, 64, 128, 4, 2),
    (9, 2, 64): LaunchConfig(64, 64, 128, 4, 3),
    (9, 2, 128): LaunchConfig(64, 64, 128, 4, 3),
    (10, 2, 64): LaunchConfig(64, 128, 128, 8, 3),
    (10, 2, 128): LaunchConfig(64, 128, 128, 8, 3),
    (8, 4, 64): LaunchConfig(32, 32, 16, 8, 1),
    (8, 4, 128): LaunchConfig(32, 32, 16, 8, 1),
}

CANDIDATES: dict[str, dict[tuple[int, ...], tuple[LaunchConfig, ...]]] = {
    "PRODUCT": {
        (9, 2): (
            LaunchConfig(128, 128, 64, 8, 3, programs=2, split=2, maxnreg=128),
            LaunchConfig(128, 256, 64, 8, 3, programs=1, split=2),
        ),
    },
    "PROBS_RESIDUAL": {(9, 2, 64): (LaunchConfig(64, 64, 128, 4, 3),)},
    "PROBS_DQ": {(9, 2, 64): (LaunchConfig(64, 64, 128, 4, 3, maxnreg=168),)},
    "PROBS_ONE_BLOCK": {
        (9, 2, 64): (
            LaunchConfig(64, 64, 128, 4, 3, maxnreg=128),
            LaunchConfig(64, 64, 128, 4, 2, maxnreg=128),
            LaunchConfig(64, 32, 128, 4, 3, maxnreg=128),
            LaunchConfig(64, 128, 128, 8, 2),
        ),
    },
    "INDEX_DK": {
        (9, 2, 128): (
            LaunchConfig(64, 128, 128, 8, 3),
            LaunchConfig(128, 64, 128, 8, 2),
            LaunchConfig(64, 64, 128, 8, 3),
            LaunchConfig(64, 64, 128, 4, 3, maxnreg=168),
        ),
    },
    "DIVERGENCE": {
        (9, 2, 64): (
            LaunchConfig(64, 64, 128, 4, 3, maxnreg=128),
            LaunchConfig(64, 64, 128, 4, 2),
            LaunchConfig(64, 32, 128, 4, 3),
            LaunchConfig(64, 128, 128, 8, 2),
            LaunchConfig(128, 64, 128, 8, 3, maxnreg=128),
            LaunchConfig(128, 64, 128, 8, 2, maxnreg=128),
        ),
    },
    "DIVERGENCE_DQ": {
        (9, 2, 64): (
            LaunchConfig(64, 32, 128, 4, 3, maxnreg=128),
            LaunchConfig(64, 32, 128, 4, 2),
            LaunchConfig(64, 64, 128, 4, 2),
            LaunchConfig(64, 64, 128, 4, 3, maxnreg=168),
            LaunchConfig(128, 32, 128, 8, 3),
            LaunchConfig(128, 64, 128, 8, 2),
        ),
    },
    "DIVERGENCE_DK": {
        (9, 2, 64): (
            LaunchConfig(64, 64, 128, 4, 3),
            LaunchConfig(64, 64, 128, 4, 2),
            LaunchConfig(32, 64, 128, 4, 3),
            LaunchConfig(64, 32, 128, 4, 3),
            LaunchConfig(64, 128, 128, 8, 2),
            LaunchConfig(128, 64, 128, 8, 2),
        ),
    },
}


def lookup(
    table: Mapping[tuple[int, ...], LaunchConfig],
    capability: tuple[int, int],
    *key: int,
    tma: bool = False,
) -> LaunchConfig:
    """The entry for ``key`` of the newest architecture in the table no newer than this one.

    Consumer chips of 12.x have the shared memory of 8.x rather than of 10.x. Entries that load by
    TMA count only where the data allow it.
    """
    major = 8 if capability[0] >= 12 else capability[0]
    served = (
        entry
        for entry, config in table.items()
        if entry[1:] == key and entry[0] <= major and (tma or not config.programs)
    )
    return table[max(served)]


def has(table: Mapping[tuple[int, ...], LaunchConfig], major: int, *key: int) -> bool:
    """Whether ``lookup`` finds an entry."""
    major = 8 if major >= 12 else major
    return any(entry[1:] == key and entry[0] <= major for entry in table)


def capability(x: Tensor) -> tuple[int, int]:
    """The tensor's device's, and the least that the kernels serve where there is none."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)


def settles(x: Tensor) -> bool:
    """Whether products are added up by wgmma, whose accumulators need ``layers.settle``."""
    return capability(x)[0] == 9 and x.element_size() == 2


def persistent(config: LaunchConfig, tiles: int, x: Tensor) -> tuple[int]:
    """Persistent programs: as many as the device holds at once."""
    device = torch.cuda.get_device_properties(x.device) if x.is_cuda else None
    return (min(tiles, config.programs * (device.multi_processor_count if device else 2)),)


def options(config: LaunchConfig) -> dict[str, object]:
    """An entry as a kernel's keyword arguments."""
    chosen: dict[str, object] = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,  # from Triton 3.10 on no longer the default
    }
    if config.programs:
        chosen["SPLIT"] = config.split
    if config.maxnreg:
        chosen["maxnreg"] = config.maxnreg
    return chosen
