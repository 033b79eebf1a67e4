"""The kernels' bench: quick forms end to end, tuning with a fake clock, the error without CUDA."""

from __future__ import annotations

import json

import bench_kernels
import check_kernels
import pytest
import torch
import tuning
from measuring import Rows, Spread, Timer

pytest.importorskip("triton")


def run(tmp_path, *flags):
    file = tmp_path / "rows.jsonl"
    code = bench_kernels.main(["--quick", "--device", "cpu", "--json", str(file), *flags])
    return code, [json.loads(line) for line in file.read_text().splitlines()]


def test_ceilings(tmp_path):
    code, rows = run(tmp_path, "--part", "ceilings")
    assert code == 0
    names = [r["provider"] for r in rows]
    for name in ("copy", "hidden E", "hidden dHs", "hidden dW", "scores", "math both"):
        assert any(x.startswith(name) for x in names), name
    assert all(r["per_second"] > 0 for r in rows)


def test_kernels(tmp_path):
    code, rows = run(tmp_path, "--part", "kernels", "--case", "hidden")
    assert code == 0
    (row,) = rows
    assert row["kernels"]
    assert row["error"] < 1e-4


@pytest.mark.parametrize("part", ["kernels", "sweep", "tune"])
def test_without_cuda_the_error_is_one_and_clear(part, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        bench_kernels.main(["--part", part])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"--part {part} must have a CUDA device, got cpu" in error
    assert "--quick --device cpu" in error


@pytest.fixture
def launch():
    """The launch tables, put back as they were."""
    from optima_fast.kernels import launch

    tables = tuning.tables(launch)
    before = {name: dict(table) for name, table in tables.items()}
    yield launch
    for name, table in tables.items():
        table.clear()
        table.update(before[name])


def test_tune_writes_the_table_it_measured(tmp_path, launch, monkeypatch, capsys):
    """With a clock that favours few warps; every other entry stays."""
    before = {name: dict(table) for name, table in tuning.tables(launch).items()}

    def clock(steps, timer, *, seconds, least, most=None):
        for run_step in steps.values():
            run_step()
        return {x: Spread(float(x.num_warps), 0.0, least) for x in steps}

    monkeypatch.setattr(bench_kernels, "interleave", clock)
    monkeypatch.setattr(tuning, "candidates", lambda x, *_: [x, x._replace(num_warps=1)])
    target = tmp_path / "launch.py"
    code, rows = run(tmp_path, "--tune", "--case", "hidden", "--write", str(target))
    assert code == 0
    tuned = [r for r in rows if "winner" in r]
    assert tuned
    after = tuning.tables(tuning.load(target))
    changed = {
        (name, key)
        for name, table in after.items()
        for key, config in table.items()
        if config != before[name].get(key)
    }
    assert all(name.startswith("PRODUCT") for name, _ in changed)
    assert len(changed) == len(tuned)
    for name, key in changed:
        assert tuning.tables(launch)[name][key] == after[name][key]  # for the cases after it
        assert after[name][key] == before[name][key]._replace(num_warps=1)
    text = target.read_text()
    assert "hidden32k-x2 1.000 ms (was" in text
    assert "commit" in text
    assert "PRODUCT" in capsys.readouterr().out


def test_a_wrong_or_refused_candidate_never_wins(launch, monkeypatch):
    """A faster configuration whose result is wrong, and one that does not launch."""
    table = next(iter(tuning.tables(launch).values()))
    key, good = next(iter(table.items()))
    wrong, broken = good._replace(num_warps=1), good._replace(num_stages=1)

    class Bench:
        name = "x"

        def run(self):
            return None

        def error(self):
            if table[key] == wrong:
                raise RuntimeError("WRONG")
            if table[key] == broken:
                raise RuntimeError("out of resource: shared memory")
            return 0.0

    swept = bench_kernels.Sweep(Bench(), table, key)
    assert swept.winner(good, [good, wrong, broken], Timer("cpu"), 2) == good
    assert set(swept.refused) == {wrong, broken}
    assert "shared memory" in swept.refused[broken]


def test_sanity_check_passes_and_reports(tmp_path):
    file = tmp_path / "rows.jsonl"
    flags = ["--small", "--device", "cpu", "--case", "hidden", "--json", str(file)]
    assert check_kernels.main(flags) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {r["provider"] for r in rows} == {"odd-float32", "odd-float16"}
    assert all(r["error"] < 1e-2 for r in rows)


@pytest.mark.parametrize("target", ["hidden", "scores", "probs"])
def test_sanity_problems_are_masked_and_finite(target):
    """Masked tokens hold nan, and the definition's losses and gradients do not show it."""
    shapes = (check_kernels.HIDDEN if target == "hidden" else check_kernels.ATTENTION)["odd"]
    problem = check_kernels.Problem(target, shapes, torch.float32, "cpu")
    assert any(x.isnan().any() for column in problem.trained for x in column)
    found = problem("reference", double=True)
    assert all(x.isfinite().all() for x in found)
    assert len(found) == 1 + 2 * len(shapes)


@pytest.mark.parametrize("fault", ["value", "bits", "loss"])
def test_sanity_sees_faults(fault):
    class Faulty(check_kernels.Problem):
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
        check_kernels.check(problem, 1e-4, "cpu", again=True)


def test_rows_without_a_file():
    rows = Rows(None, {})
    assert rows.begin("a", "b")
    rows.add(case="a", provider="b", ms=1.0)
    assert not rows.begin("a", "b")
    rows.close()
