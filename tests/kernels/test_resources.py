"""Registers, spills and instructions of the compiled kernels, without a GPU: resources.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "cosine", "dk", "dq", "hidden_backward_tma", "hidden_forward_tma", "index_dk",
    "index_dq", "index_lse", "index_merge", "index_residual", "kl_dk", "kl_dq", "kl_forward", "lse",
    "one_block", "residual",
    "rows_backward", "rows_forward", "scores_backward", "scores_forward", "total",
}  # fmt: skip


def compiled(*arguments: str) -> list[dict[str, Any]]:
    triton = pytest.importorskip("triton")
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not {"cuobjdump", "ptxas"} <= {path.name for path in binaries.glob("*")}:
        pytest.skip(f"this build of Triton has no cuobjdump and ptxas in {binaries}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("resources.py"), "--json", *arguments],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode in (0, 1), run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_each_kernel_once() -> None:
    found = compiled("--quick")
    assert {x["kernel"].split()[0] for x in found} == KERNELS
    assert [x for x in found if x["failures"]] == []


@pytest.mark.slow
def test_every_entry_of_the_launch_tables() -> None:
    from optima_fast.kernels import launch

    found = compiled()
    assert [x for x in found if x["failures"]] == []
    tables = {
        name: table
        for name, table in vars(launch).items()
        if isinstance(table, dict) and all(hasattr(x, "_fields") for x in table.values())
    }
    touched = {entry for x in found for entry in x["entries"] if " " not in entry.partition("[")[0]}
    assert touched == {f"{name}{[*key]}" for name, table in tables.items() for key in table}
