"""The bench of whole steps: every way has the same models, and the loss it says it has."""

from __future__ import annotations

import json

import bench_step
import pytest
from torch.nn import functional as F


def test_every_way_is_timed_and_memory_told(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert bench_step.main(["--device", "cpu", "--quick", "--json", str(file)]) == 0
    rows = {r["provider"]: r for r in map(json.loads, file.read_text().splitlines())}
    assert set(rows) == set(bench_step.WAYS)
    assert all(r["ms"] > 0 and r["peak_mb"] > 0 for r in rows.values())
    assert rows["logits"]["loss"] < rows["scores"]["loss"]
    assert rows["usual"]["loss"] == pytest.approx(rows["probs"]["loss"], rel=1e-5)


def test_ways_that_differ_are_not_timed(monkeypatch):
    monkeypatch.setattr(bench_step.F, "mse_loss", lambda x, y: 2 * F.l1_loss(x, y))
    with pytest.raises(RuntimeError, match="WRONG"):
        bench_step.main(["--device", "cpu", "--quick", "--ways", "probs", "usual"])


def test_attention_is_the_fast_one_again_afterwards():
    fast = bench_step.attention.attend
    with pytest.raises(KeyError), bench_step.written("usual"):
        assert bench_step.attention.attend is bench_step.keep_maps
        raise KeyError
    assert bench_step.attention.attend is fast
