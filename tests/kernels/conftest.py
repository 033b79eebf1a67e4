from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from quick_interpreter import patch_once

patch_once()

# tiles as small as products allow, so that a few tokens reach past their edges
TILES = {
    "PROBS_LSE": (32, 16),
    "PROBS_RESIDUAL": (32, 16),
    "PROBS_DQ": (16, 32),
    "PROBS_DK": (32, 16),
    "PROBS_ONE_BLOCK": (16, 16),
    "PROBS_ROWS_FORWARD": (32, 64),
    "PROBS_ROWS_BACKWARD": (32, 64),
    "INDEX_LSE": (32, 16),
    "INDEX_RESIDUAL": (16, 32),
    "INDEX_DQ": (16, 32),
    "INDEX_DK": (16, 32),
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from optima_fast.kernels import launch

    for name, (block_m, block_n) in TILES.items():
        table = getattr(launch, name)
        for key, entry in table.items():
            monkeypatch.setitem(table, key, entry._replace(block_m=block_m, block_n=block_n))


@pytest.fixture
def path(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small_tiles: None
) -> None:
    """Of the kernels of probabilities: whole rows in registers, or sweeps over blocks."""
    from optima_fast.kernels import probs_rows

    if request.param == "sweeps":
        monkeypatch.setattr(probs_rows, "tiles", lambda *args: None)
    else:  # a program takes several heads, as where there are many
        monkeypatch.setattr(probs_rows, "ENOUGH_PROGRAMS", 1)
        monkeypatch.setattr(probs_rows, "HEADS_AT_ONCE", 2)


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a driver that loads nothing and writes launches down."""
    compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    library, source = folder / "libcuda.so.1", Path(__file__).with_name("stub_driver.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    return folder
