"""`make gpu`: its quick form end to end, parts that fail apart, how its figures are read."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import card
import check
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
def test_the_first_call_and_what_is_new_in_the_second_end_to_end(tmp_path):
    """As `make gpu` makes them, where PyTorch has no GPU and no git is asked."""
    environment = {**os.environ, "OPTIMA_FAST_COMMIT": "abc123", "PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "1"
    calls = {
        "1": ["--call", "1"],
        "2": ["--part", "compile-and-test", "attention", "others", "step", "training"],
    }
    running = {
        call: subprocess.Popen(
            [sys.executable, "bench/gpu.py", "--device", "cpu", "--quick", *flags,
             "--results", tmp_path / call],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for call, flags in calls.items()
    }  # fmt: skip
    found, said = {}, {}
    for call, process in running.items():
        said[call] = process.communicate()[0]
        assert process.returncode == 0, said[call]
        (file,) = (tmp_path / call).iterdir()
        assert file.name.startswith("no-gpu-")
        assert file.name.endswith("-abc123.json")
        assert f"written to {file}" in said[call]
        content = json.loads(file.read_text())
        assert content["machine"]["torch"] == torch.__version__
        assert list(content["parts"]) == (list(gpu.CALLS["1"]) if call == "1" else calls["2"][1:])
        found |= content["parts"]
    assert found.pop("races") == {
        "status": "left out", "why": "there is no compute-sanitizer here (or no CUDA device)"
    }  # fmt: skip
    if gpu.missing_for_training():
        assert found.pop("training")["status"] == "left out"
    assert {name: part["status"] for name, part in found.items()} == dict.fromkeys(found, "done")

    def rows(part):
        return [row for job in found[part]["jobs"].values() for row in job.get("rows", ())]

    troubles = [line for part in found.values() for line in gpu.troubles(part)]
    assert not troubles
    assert {r["provider"] for r in rows("six")} == {"triton", "eager", "autocast"}
    assert all(r["ms"] > 0 and r["error"] < 0.1 for r in rows("six"))
    assert rows("check")[0]["error"] < 1e-4
    assert rows("candidates")[0]["times"]
    assert rows("kernels")[0]["kernels"]
    assert found["compile-and-test"]["jobs"]["pytest"]["passed"] > 10
    assert "peak MB: triton" in said["1"]


def test_without_cuda_the_error_names_the_way_out(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2
    assert "must have a CUDA device" in capsys.readouterr().err


def test_a_call_fits_its_time_and_blockwise_is_no_contender_there():
    assert gpu.parsed(["--device", "cpu"]).seconds <= 330
    for parts in gpu.CALLS.values():
        assert sum(part.seconds for part in parts.values()) <= gpu.CALL_SECONDS
    assert list(gpu.CALLS["1"]) == [
        "ceilings", "compile", "check", "races", "kernels", "candidates", "six", "six-by-triton",
    ]  # fmt: skip
    assert "blockwise" not in {*gpu.MAIN, *gpu.MORE_OF_MAIN}
    assert set(gpu.WHY_EMPTY) <= set(gpu.PARTS)


def test_what_the_parts_start_understands_its_flags(args, tmp_path):
    flags = ["--json", str(tmp_path / "rows.jsonl"), "--resume"]
    started = [
        card.parsed([*job.command[2:], *flags]).part
        for part in gpu.PARTS.values()
        for job in part.jobs(args, tmp_path, 60.0)
        if Path(job.command[1]).name == "card.py"
    ]
    assert {*started} == {"ceilings", "compile", *card.CASE_BY_CASE}
    args.quick = False
    cells = {f"{target}-{name}" for target, name, _ in check.cells()}
    assert [job.name for job in gpu.check(args, tmp_path, 60.0) if job.name not in cells] == []


def test_the_time_that_a_part_leaves_goes_to_the_next(args, tmp_path, monkeypatch):
    given = {}

    def run_part(name, seconds, args, results):
        given[name] = seconds
        return {"status": "done"}

    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 0.0)
    flags = ["--device", "cpu", "--results", str(tmp_path)]
    assert gpu.main([*flags, "--part", "kernels", "candidates", "--seconds", "200"]) == 0
    parts = gpu.PARTS
    assert given == {"kernels": 200 - parts["candidates"].seconds, "candidates": 200}
    assert gpu.main([*flags, "--part", "kernels", "candidates", "--seconds", "4"]) == 0
    (file,) = tmp_path.glob("*.json")
    left_out = json.loads(file.read_text())["parts"]["kernels"]
    assert left_out == {"status": "left out", "why": "no time left"}


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
    part = gpu.Part(seconds, lambda args, folder, seconds: [job])
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
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # as `make gpu` runs it
    run = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
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


def test_figures_of_the_race_check():
    output = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 2 hazards displayed\n"
    found = gpu.race_figures(output)
    assert found == {"summary": ["2 hazards displayed"]}
    row = {"jobs": {"probs-odd": {"code": 0, **found}}}
    assert gpu.troubles(row) == ["probs-odd: 2 hazards displayed"]
    clean = {"jobs": {"probs-odd": {"code": 0, "summary": ["0 hazards displayed"]}}}
    assert gpu.troubles(clean) == []


def test_losses_are_summed_up_as_ratios_and_peaks(capsys):
    def row(provider, ms, peak, share=None):
        return {"case": "c", "provider": provider, "ms": ms, "peak_mb": peak, "share": share,
                "ours": provider == "triton"}  # fmt: skip

    rows = [row("triton", 2.0, 3.0, 0.5), row("eager", 8.0, 40.0), {"case": "c", "failed": "x"}]
    gpu.show_losses({"six": {"jobs": {"losses": {"rows": rows}}}, "tests": {"status": "done"}})
    out = capsys.readouterr().out
    assert "triton 2.0000 ms, 50% of the floor; eager 4.00x" in out
    assert "peak MB: triton 3, eager 40" in out


def test_a_file_from_before_keeps_its_other_parts(tmp_path):
    facts = gpu.machine("cpu")
    first = gpu.Results(tmp_path, facts)
    first.save("a", {"status": "done"})
    second = gpu.Results(tmp_path, facts)
    second.save("b", {"status": "done"})
    assert set(json.loads(second.path.read_text())["parts"]) == {"a", "b"}
    assert [p.name for p in tmp_path.iterdir()] == [second.path.name]


@pytest.mark.slow
def test_the_launcher_is_built_where_it_is_not(tmp_path, monkeypatch):
    """From torch's own copy of pybind11's headers."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    for name in ("optima_fast", "kernels"):
        shutil.copytree(
            gpu.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    shutil.copytree(gpu.ROOT / "csrc", tmp_path / "csrc")
    find = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda x: None if x.endswith("_launch") else find(x)
    )
    said = gpu.built_launcher()
    assert len(list((tmp_path / "optima_fast").glob("_launch*.so"))) == 1
    assert said in ("Triton (there is no CUDA driver)", "the extension optima_fast._launch")
