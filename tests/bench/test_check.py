"""The kernels' check on a card: its cells, and the faults that it must see."""

from __future__ import annotations

import json

import check
import pytest
import torch

pytest.importorskip("triton")


def test_sanity_check_passes_and_reports(tmp_path):
    file = tmp_path / "rows.jsonl"
    flags = ["--once", "--device", "cpu", "--case", "hidden-odd", "--json", str(file)]
    assert check.main(flags) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {r["provider"] for r in rows} == {"odd-float32", "odd-float16"}
    assert all(r["error"] < 1e-2 for r in rows)


CELLS = {(target, name): shapes for target, name, shapes in check.cells()}
CHOSEN = [*((t, "odd") for t in ("hidden", "scores", "probs", "kl", "kl-mean")),
          ("kl", "shared"), ("probs", "window")]  # fmt: skip


@pytest.mark.parametrize(("target", "name"), CHOSEN)
def test_sanity_problems_are_masked_and_finite(target, name):
    """Masked tokens hold nan, and the definition's losses and gradients do not show it."""
    shapes = CELLS[target, name]
    problem = check.Problem(target, shapes, torch.float32, "cpu")
    assert any(x.isnan().any() for column in problem.trained for x in column)
    found = problem("reference", double=True)
    assert all(x.isfinite().all() for x in found)
    assert len(found) == 1 + 2 * len(shapes)


@pytest.mark.parametrize("fault", ["value", "bits", "loss"])
def test_sanity_sees_faults(fault):
    class Faulty(check.Problem):
        calls = 0

        def __call__(self, backend, **options):
            found = super().__call__("reference", **options)
            if backend == "triton":
                self.calls += 1
                if fault == "value" or (fault == "loss" and len(found) == 1):
                    found[0] = found[0] * 1.01
                if fault == "bits" and self.calls == 2:
                    found[1] = found[1].nextafter(torch.full_like(found[1], 9.0))
            return found

    problem = Faulty("hidden", ((2, 5, 3, 4),), torch.float32, "cpu")
    words = {"value": "relative error", "bits": "other bits", "loss": "without a gradient"}
    with pytest.raises(RuntimeError, match=words[fault]):
        check.check(problem, 1e-4, "cpu", again=True)
