"""The README's table of losses, made from the code.

python tests/losses/test_supported.py    # prints it
"""

from __future__ import annotations

import inspect
from pathlib import Path

import optima_fast
from optima_fast.losses import backends

README = Path(__file__).resolve().parents[2] / "README.md"
# what a loss is computed by
SERVED = {
    **dict.fromkeys(("hidden_mse", "hidden_cosine", "hidden_smooth_l1"), backends.HIDDEN),
    **dict.fromkeys(("attention_mse", "attention_kl", "relation_kl"), backends.ATTENTION),
    "gram_mse": backends.ATTENTION,
    "indexer_kl": backends.INDEXER,
}
PLAIN = {"hidden_contrastive"}  # PyTorch alone, whatever the device
OPTIONS = {
    "masks": ("mask", "query_mask"),
    "causal": ("causal",),
    "window": ("window",),
    "heads": ("heads",),
    "temperature": ("temperature",),
    "LSE given": ("teacher_lse",),
}


def table() -> str:
    fast = ("blockwise", "triton")
    head = ["loss", *fast, *OPTIONS]
    rows = [head, ["---"] * len(head)]
    for name, served in SERVED.items():
        known = inspect.signature(getattr(optima_fast, name)).parameters
        marks = [x in served for x in fast] + [any(x in known for x in y) for y in OPTIONS.values()]
        rows.append([f"`{name}`", *("yes" if mark else "" for mark in marks)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_every_loss_is_in_the_table():
    public = {x for x in optima_fast.losses.__all__ if x.islower()}
    assert public == set(SERVED) | PLAIN


def test_the_readme_has_it():
    assert table() in README.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table())
