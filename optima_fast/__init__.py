"""Fused losses and adaptive module choice for distilling multi-module transformers.

The public names load on first use, so ``import optima_fast`` itself needs only Python.
"""

from __future__ import annotations

import importlib as _importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Distiller",
    "arms",
    "attention_kl",
    "attention_mse",
    "bandit",
    "distill",
    "gram_mse",
    "hidden_contrastive",
    "hidden_cosine",
    "hidden_mse",
    "hidden_smooth_l1",
    "indexer_kl",
    "losses",
    "models",
    "record",
    "relation_kl",
    "tap",
    "taps",
    "tasks",
    "training",
]

# In a checkout kernels/ sits beside this package; once installed it is inside it.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))

_HOMES = {
    "Distiller": "optima_fast.distill",
    "arms": "optima_fast.distill",
    "attention_kl": "optima_fast.losses",
    "attention_mse": "optima_fast.losses",
    "gram_mse": "optima_fast.losses",
    "hidden_contrastive": "optima_fast.losses",
    "hidden_cosine": "optima_fast.losses",
    "hidden_mse": "optima_fast.losses",
    "hidden_smooth_l1": "optima_fast.losses",
    "indexer_kl": "optima_fast.losses",
    "relation_kl": "optima_fast.losses",
    "record": "optima_fast.taps",
    "tap": "optima_fast.taps",
}

if TYPE_CHECKING:
    from optima_fast import bandit, distill, losses, models, taps, tasks, training
    from optima_fast.distill import Distiller, arms
    from optima_fast.losses import (
        attention_kl,
        attention_mse,
        gram_mse,
        hidden_contrastive,
        hidden_cosine,
        hidden_mse,
        hidden_smooth_l1,
        indexer_kl,
        relation_kl,
    )
    from optima_fast.taps import record, tap


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(_importlib.import_module(_HOMES[name]), name)
    elif name in __all__:
        value = _importlib.import_module(f"optima_fast.{name}")
    else:
        raise AttributeError(f"module 'optima_fast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
