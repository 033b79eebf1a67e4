"""Launch tables with tiles so small that the bounds of blocks matter in tests of few tokens."""

from __future__ import annotations

import pytest

TILES = {
    "PROBS_LSE": (32, 16),
    "PROBS_RESIDUAL": (32, 16),
    "PROBS_DQ": (16, 32),
    "PROBS_DK": (32, 16),
    "SCORES_FORWARD": (32, 16),
    "SCORES_BACKWARD": (16, 16),
    "DIVERGENCE": (32, 16),
    "DIVERGENCE_DQ": (16, 32),
    "DIVERGENCE_DK": (32, 16),
    "INDEX_LSE": (16, 16),
    "INDEX_RESIDUAL": (16, 16),
    "INDEX_DQ": (16, 16),
    "INDEX_DK": (16, 16),
}


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every entry of these tables such a tile until the test ends."""
    from optima_fast.kernels import launch

    for name, (block_m, block_n) in TILES.items():
        table = getattr(launch, name)
        for key, entry in table.items():
            monkeypatch.setitem(table, key, entry._replace(block_m=block_m, block_n=block_n))
