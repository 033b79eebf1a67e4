"""The parts of `make gpu`: quick forms, launch tables with a fake clock, what goes wrong."""

from __future__ import annotations

import json

import card
import cases
import contenders
import pytest
import torch
import tuning
from measuring import Rows, Timer

pytest.importorskip("triton")


def run(tmp_path, *flags):
    file = tmp_path / "rows.jsonl"
    code = card.main([*flags, "--quick", "--device", "cpu", "--json", str(file)])
    return code, [json.loads(line) for line in file.read_text().splitlines()]


def test_ceilings(tmp_path):
    code, rows = run(tmp_path, "ceilings")
    assert code == 0
    names = [r["provider"] for r in rows]
    assert names[0] == "copy"
    assert names[1].startswith("product")
    for name in ("hidden E", "hidden dHs", "hidden dW", "scores", "math both"):
        assert any(x.startswith(name) for x in names), name
    assert all(r["per_second"] > 0 for r in rows)


def test_kernels(tmp_path):
    code, rows = run(tmp_path, "kernels", "--case", "hidden")
    assert code == 0
    (row,) = rows
    assert row["case"] == "hidden32k-x12"
    assert row["kernels"]
    assert row["error"] < 1e-4


@pytest.mark.parametrize("flags", [["kernels"], ["losses", "--device", "cpu"]])
def test_without_cuda_the_error_is_one_and_clear(flags, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        card.main(flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "must have a CUDA device, got --device cpu" in error
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


def test_candidates_are_compared_and_the_best_stays_in_the_table(
    tmp_path, launch, monkeypatch, capsys
):
    """With a clock that favours few warps; every other entry stays."""
    before = {name: dict(table) for name, table in tuning.tables(launch).items()}

    def clock(steps, timer, *, seconds, least):
        for run_step in steps.values():
            run_step()
        return {x: [float(x.num_warps)] * least for x in steps}

    monkeypatch.setattr(card, "interleave", clock)
    monkeypatch.setattr(tuning, "candidates", lambda x, *_: [x, x._replace(num_warps=1)])
    code, rows = run(tmp_path, "candidates", "--case", "hidden")
    assert code == 0
    changed = {
        (name, key): config
        for name, table in tuning.tables(launch).items()
        for key, config in table.items()
        if config != before[name].get(key)
    }
    assert changed
    assert all(name.startswith("PRODUCT") for name, _ in changed)
    assert len(rows) == len(changed)
    for (name, key), config in changed.items():
        assert config == before[name][key]._replace(num_warps=1)
        (row,) = (r for r in rows if r["provider"] == f"{name}{list(key)}")
        comment, source = row["source"]
        assert comment.startswith("# hidden32k-x12 1.000 ms (was ")
        assert "commit" in comment
        assert source == tuning.literal(key, config)
        assert f"{name}: {source}" in capsys.readouterr().out or len(changed) > 1


def test_an_entry_without_candidates_is_not_timed(tmp_path, launch, monkeypatch):
    monkeypatch.setattr(tuning, "candidates", lambda x, *_: [x])
    code, rows = run(tmp_path, "ceilings")  # so that there is a file
    count = len(rows)
    code, rows = run(tmp_path, "candidates", "--case", "hidden")
    assert (code, len(rows)) == (0, count)


def test_shards_compile_every_cell_once(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(card, "swept", lambda bench, args: ran.append(("swept", bench)) or ())
    monkeypatch.setattr(card, "Bench", lambda case, args: case.name)
    monkeypatch.setattr(contenders, "step", lambda name, case, layers: lambda: ran.append(name))
    flags = ("compile", "--candidates", "--providers", "triton", "triton-lse", "compile")
    for i in range(3):
        code, rows = run(tmp_path, *flags, "--shard", f"{i}/3")
        assert code == 0
    cells = [(r["case"], r["provider"]) for r in rows]
    assert len(set(cells)) == len(cells) == len(ran)
    names = {case.name: case.target for case in cases.SUITES["six"]}
    assert set(cells) == {
        *((name, "candidates-0") for name in names),
        *((name, "triton") for name in names),
        *((name, "triton-lse") for name, target in names.items() if target == "probs"),
    }  # of a quick run, without the compiler


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

    swept = card.Sweep(Bench(), table, key)
    assert swept.winner(good, [good, wrong, broken], Timer("cpu"), 2) == good
    assert set(swept.refused) == {wrong, broken}
    assert "shared memory" in swept.refused[broken]


def test_losses_go_on_after_a_crash(tmp_path, monkeypatch):
    """A process that ends in a cell leaves its name; the next one goes on after it."""

    def crash(case, _):
        raise SystemExit(9)

    monkeypatch.setitem(contenders.CONTENDERS, "crash", contenders.Contender(crash))
    monkeypatch.setattr(card, "PROVIDERS", ("eager", "crash", "blockwise"))
    flags = ("losses", "--suite", "cpu", "--case", "hidden", "--providers", "eager", "crash")
    for _ in range(2):
        with pytest.raises(SystemExit):
            run(tmp_path, *flags, "--resume")
        assert (tmp_path / "rows.started").exists()
    code, rows = run(tmp_path, *flags, "--resume")
    assert code == 0
    assert not (tmp_path / "rows.started").exists()
    hidden = {"hidden8192", "hidden2048"}
    died = [r["case"] for r in rows if r.get("failed") == "the process died here"]
    assert sorted(died) == sorted(hidden)
    assert sorted(r["case"] for r in rows if "ms" in r) == sorted(hidden)


def test_a_lost_device_ends_the_process_and_names_the_cell(tmp_path, monkeypatch):
    def lose(case, _):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(contenders.CONTENDERS, "lose", contenders.Contender(lose))
    code, rows = run(tmp_path, "losses", "--providers", "lose", "eager")
    assert code == card.CONTEXT_LOST
    assert [(r["provider"], "illegal" in r["failed"]) for r in rows] == [("lose", True)]
    assert (tmp_path / "rows.started").exists()


def test_a_case_that_breaks_costs_no_other(tmp_path, monkeypatch):
    def measure(case, args, rows, timer):
        if case.target == "hidden":
            raise ValueError("no such thing")
        rows.add(case=case.name, provider="x")

    monkeypatch.setitem(card.CASE_BY_CASE, "losses", measure)
    code, rows = run(tmp_path, "losses")
    assert code == 0
    assert len(rows) == 6
    assert [r["failed"] for r in rows if "failed" in r] == ["ValueError: no such thing"]


def test_a_spent_budget_leaves_cases_out_and_says_so(tmp_path):
    code, rows = run(tmp_path, "losses", "--budget", "-1")
    assert code == 0
    assert [r["left_out"] for r in rows] == ["no time"] * 6


def test_rows_without_a_file():
    rows = Rows(None, {})
    assert rows.begin("a", "b")
    rows.add(case="a", provider="b", ms=1.0)
    assert not rows.begin("a", "b")
    rows.close()
