"""`make gpu`: its quick form end to end, parts that fail apart, how its figures are read."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import gpu
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(
        device="cpu", quick=True, results=str(tmp_path / "results"), seconds=60.0, part=["x"]
    )


@pytest.mark.slow
def test_quick_form_end_to_end(tmp_path):
    """As `make gpu` calls it, where PyTorch has no GPU and no git is asked."""
    environment = {**os.environ, "OPTIMA_FAST_COMMIT": "abc123", "PYTHONPATH": str(ROOT)}
    parts = ("headline", "sanity", "tests", "sanitizer")
    for chosen in (parts[:1], parts[1:]):  # parts run apart land in one file
        run = subprocess.run(
            [sys.executable, "bench/gpu.py", "--device", "cpu", "--quick", "--results", tmp_path,
             "--part", *chosen],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    (file,) = tmp_path.glob("*.json")
    assert file.name.startswith("no-gpu-")
    assert file.name.endswith("-abc123.json")
    content = json.loads(file.read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert set(content["parts"]) == set(parts)
    found = content["parts"]
    assert found["sanitizer"] == {
        "status": "left out", "why": "there is no compute-sanitizer here (or no CUDA device)"
    }  # fmt: skip
    assert all(found[name]["status"] == "done" for name in parts[:-1]), found
    (rows,) = (x["rows"] for name, x in found["sanity"]["jobs"].items() if "hidden" in name)
    assert rows[0]["error"] < 1e-4
    rows = found["headline"]["jobs"]["headline"]["rows"]
    assert {r["provider"] for r in rows} == {"triton", "blockwise", "eager"}
    assert found["tests"]["jobs"]["pytest"]["passed"] > 10
    assert found["tests"]["jobs"]["pytest"]["failed"] == 0
    assert "headline  hidden8k" not in run.stdout  # what this call did not run it does not claim
    assert f"written to {file}" in run.stdout


def test_without_cuda_the_error_names_the_way_out(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2
    assert "must have a CUDA device" in capsys.readouterr().err


def test_each_call_fits_its_time():
    assert gpu.parsed(["--device", "cpu", "--call", "1"]).seconds == gpu.CALL_SECONDS == 330
    assert gpu.parsed(["--device", "cpu"]).seconds == 2 * gpu.CALL_SECONDS
    assert sorted(gpu.PARTS) == sorted(x for parts in gpu.CALLS.values() for x in parts)
    for parts in gpu.CALLS.values():
        assert sum(gpu.PARTS[name].seconds for name in parts) <= gpu.CALL_SECONDS
    assert gpu.CALLS["1"][:2] == ("sanity", "main")  # is it right, and is it fast
    assert set(gpu.WHY_EMPTY) <= set(gpu.PARTS)


def script(tmp_path, body):
    """A bench that takes --json FILE --resume and marks the cell it is in."""
    path = tmp_path / "script.py"
    head = """
        import json, pathlib, sys, time
        file = pathlib.Path(sys.argv[sys.argv.index("--json") + 1])
    """
    path.write_text(textwrap.dedent(head) + textwrap.dedent(body))
    return [sys.executable, str(path)]


def run(args, tmp_path, monkeypatch, body, seconds, rows=True):
    job = gpu.Job("job", script(tmp_path, body), rows)
    part = gpu.Part(seconds, lambda args, folder: [job])
    monkeypatch.setitem(gpu.PARTS, "x", part)
    results = gpu.Results(Path(args.results), gpu.machine("cpu"))
    row = gpu.run_part("x", seconds, args, results)
    assert json.loads(results.path.read_text())["parts"]["x"] == json.loads(json.dumps(row))
    return row


def test_a_process_that_dies_in_a_cell_goes_on(args, tmp_path, monkeypatch):
    body = """
        mark = file.with_suffix(".started")
        with file.open("a") as f:
            f.write(json.dumps({"case": "a", "n": len(file.read_text().splitlines())}) + "\\n")
        mark.write_text("[]")
        if len(file.read_text().splitlines()) < 3:
            sys.exit(1)
        mark.unlink()
    """
    row = run(args, tmp_path, monkeypatch, body, 20)
    assert row["status"] == "done"
    assert row["jobs"]["job"]["restarts"] == 2
    assert [r["n"] for r in row["jobs"]["job"]["rows"]] == [0, 1, 2]


def test_a_process_that_always_dies_is_given_up(args, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESTARTS", 2)
    body = 'file.with_suffix(".started").write_text("[]"); sys.exit("no such thing")'
    row = run(args, tmp_path, monkeypatch, body, 20)
    assert row["status"] == "died"
    assert any("no such thing" in line for line in gpu.troubles(row))


def test_a_process_that_hangs_is_cut_and_its_rows_are_kept(args, tmp_path, monkeypatch):
    body = """
        file.write_text(json.dumps({"case": "a", "ms": 1.5}) + "\\n" + '{"case": "b"')
        time.sleep(60)
    """
    row = run(args, tmp_path, monkeypatch, body, 2)
    assert row["status"] == "cut short"
    assert row["seconds"] < 10
    assert row["jobs"]["job"]["rows"] == [{"case": "a", "ms": 1.5}]


def test_figures_of_pytest(tmp_path):
    test = tmp_path / "test_some.py"
    test.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', ['a b', 'FAILED', 'c'])\n"
        "def test_good(x): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_skip(): pytest.skip('no')\n"
        "@pytest.fixture\ndef broken(): raise ValueError('x')\n"
        "def test_error(broken): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider", test]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = gpu.test_figures(run.stdout)
    counts = {k: found[k] for k in ("passed", "failed", "skipped", "error")}
    assert counts == {"passed": 3, "failed": 1, "skipped": 1, "error": 1}, run.stdout
    assert len(found["wrong"]) == 2
    assert any("test_bad" in line for line in found["wrong"])


def test_figures_of_pytest_with_workers():
    output = textwrap.dedent("""
        [gw0] [ 33%] PASSED tests/losses/test_a.py::test_one[a b]
        [gw1] [ 66%] FAILED tests/losses/test_a.py::test_two
        [gw1] [100%] SKIPPED tests/losses/test_a.py::test_three
        ERROR tests/bandit/test_b.py - ModuleNotFoundError: No module named 'scipy'
        FAILED tests/losses/test_a.py::test_two - assert 1 == 2
    """)
    found = gpu.test_figures(output)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert any("assert 1 == 2" in line for line in found["wrong"])
    assert any("scipy" in line for line in found["wrong"])
    assert len(found["wrong"]) == 2
    cut = "\n".join(output.splitlines()[:4])  # no summary yet
    assert gpu.test_figures(cut)["wrong"] == ["FAILED tests/losses/test_a.py::test_two"]


def test_figures_of_the_sanitizer():
    output = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 2 errors\n"
    found = gpu.sanitizer_figures(output)
    assert found == {"summary": ["2 errors"]}
    row = {"jobs": {"memcheck": {"code": 0, **found}}}
    assert gpu.troubles(row) == ["memcheck: 2 errors"]
    clean = {"jobs": {"memcheck": {"code": 0, "summary": ["0 errors"]}}}
    assert gpu.troubles(clean) == []


def test_losses_are_summed_up_as_ratios(capsys):
    def row(provider, ms, **more):
        return {"case": "c", "provider": provider, "ms": ms, **more}

    rows = [row("triton", 2.0, floor_ms=1.0), row("eager", 8.0), {"case": "c", "failed": "x"}]
    gpu.show_losses({"headline": {"jobs": {"headline": {"rows": rows}}}})
    out = capsys.readouterr().out
    assert "triton 2.0000 ms, 50% of the floor; eager 4.00x" in out


def test_a_file_from_before_keeps_its_other_parts(tmp_path):
    facts = gpu.machine("cpu")
    first = gpu.Results(tmp_path, facts)
    first.save("a", {"status": "done"})
    second = gpu.Results(tmp_path, facts)
    second.save("b", {"status": "done"})
    assert set(json.loads(second.path.read_text())["parts"]) == {"a", "b"}
    assert [p.name for p in tmp_path.iterdir()] == [second.path.name]
