"""Settings that every test needs, made before torch and triton are imported."""

from __future__ import annotations

import os

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
