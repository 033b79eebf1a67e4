"""Settings that every test needs, made before torch and triton are imported."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import NamedTuple

from optima_fast.entry import calm_openmp

calm_openmp()
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned_memory():
    """``torch.empty`` and its kin return NaN, so that a missed store shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Finished(NamedTuple):
    """A finished run, which no test may change: its folder, the flags, what it printed."""

    folder: Path
    flags: list[str]
    said: str


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of 9 rounds on the digits, and its teacher beside it."""
    from small_run import SMALL

    from optima_fast import train
    from optima_fast.training.config import flag

    where = tmp_path_factory.mktemp("digits")
    given = {**SMALL, "steps": 18, "cache": where / "cache"}
    flags = [f"{flag(name)}={value}" for name, value in given.items()]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert train.main([*flags, f"--out={where / 'run'}"]) == 0
    return Finished(where / "run", flags, said.getvalue())
