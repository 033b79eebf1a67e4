"""The README's table of losses, made from the code.

python tests/losses/test_supported.py    # prints it
"""

from __future__ import annotations

import inspect
from pathlib import Path

import torch

import optima_fast
from optima_fast.losses import backends

README = Path(__file__).resolve().parents[2] / "README.md"
# what a loss is computed by, and its inputs in terms of which a backend refuses
SERVED = {
    "hidden_mse": (backends.HIDDEN, "mse"),
    "hidden_cosine": (backends.HIDDEN, "cosine"),
    "hidden_smooth_l1": (backends.HIDDEN, "smooth_l1"),
    "attention_mse": (backends.ATTENTION, "probs"),
    "attention_kl": (backends.ATTENTION, "kl-each"),
    "relation_kl": (backends.ATTENTION, "kl-each"),
    "gram_mse": (backends.ATTENTION, "scores"),
    "indexer_kl": (backends.INDEXER, None),
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


def by_triton(table: dict[str, backends.Backend], kind: str | None) -> bool:
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float16)
    if table is backends.HIDDEN:
        inputs = backends.HiddenInputs([x[0]], [x[0]], [x[0, 0]], [None], kind, 1.0, [True], [True])
    elif table is backends.INDEXER:
        inputs = backends.IndexerInputs(
            [x], [x[0]], [x[0]], [x], [x], *([None],) * 3, [1.0], [False], *([True],) * 3
        )
    else:
        inputs = backends.AttentionInputs(
            *([x],) * 4, *([None],) * 4, [1.0], [1.0], kind, [False], [0], [True], [True]
        )
    return not any("it computes" in reason for reason in table["triton"].refusals(inputs))


def table() -> str:
    head = ["loss", "blockwise", "triton", *OPTIONS]
    rows = [head, ["---"] * len(head)]
    for name, served in SERVED.items():
        known = inspect.signature(getattr(optima_fast, name)).parameters
        marks = [True, by_triton(*served), *(any(x in known for x in y) for y in OPTIONS.values())]
        rows.append([f"`{name}`", *("yes" if mark else "" for mark in marks)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_every_loss_is_in_the_table():
    public = {x for x in optima_fast.losses.__all__ if x.islower()}
    assert public == set(SERVED) | PLAIN


def test_the_readme_has_it():
    assert table() in README.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table())
