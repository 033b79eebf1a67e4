"""Grids of runs: which runs there are, how they are made, and what is made of their results."""

from __future__ import annotations

import json
import math
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from small_run import QUIET, SMALL, InThisProcess

from optima_fast.compare import __main__ as command
from optima_fast.compare import curves, grid, runner, statistics, tables
from optima_fast.compare.curves import Point, Result
from optima_fast.training import Interrupted, Run, TrainConfig, processes, resolve
from optima_fast.training.config import flag
from optima_fast.training.flags import parse
from optima_fast.training.run import SUMMARY_KEYS

SIZE = {k: v for k, v in SMALL.items() if k not in ("method", "init_rounds")}
SIZE |= {"steps": 8, "teacher_steps": 2, "train_images": 30}
FLAGS = [f"{flag(name)}={value}" for name, value in SIZE.items()]
METHODS = ("layerwise", "random")


@pytest.fixture(autouse=True)
def _signals():
    """An entry point sets what a polite kill does, which is nothing until then."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def made(folder: Path, *words: str, methods: str = ",".join(METHODS), seeds: int = 2) -> grid.Grid:
    entries = grid.read_entries(methods)
    baseline = grid.read_baseline(None, entries)
    return grid.Grid(("vqa",), entries, seeds, baseline, False, folder, words)


# ------------------------------------------------------------------ a small grid, whole


class Finished(NamedTuple):
    """A finished grid, which no test may change."""

    argv: list[str]
    folder: Path
    said: str
    operations: list[curves.Operations]  # of its runs, in the order in which they were made


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    where = tmp_path_factory.mktemp("grid")
    argv = ["--task=snli_ve", f"--methods={','.join(METHODS)}", "--seeds=2", "--jobs=1", *FLAGS]
    argv += [f"--out={where / 'out'}", f"--cache={where / 'cache'}"]
    before = signal.getsignal(signal.SIGTERM)
    said: list[str] = []
    counted: list[curves.Operations] = []
    count = curves.operations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.subprocess, "Popen", InThisProcess)
        patch.setattr(runner, "LOOK", 0)
        patch.setattr(tables.Display, "note", lambda self, text: said.append(text))
        patch.setattr(curves, "operations", lambda runs: counted.extend(count(runs)) or counted)
        assert command.main(argv) == 0
    signal.signal(signal.SIGTERM, before)
    return Finished(argv, where / "out", "\n".join(said), counted)


def test_each_run_is_one_of_the_trainer_s(finished):
    folder, said = finished.folder, finished.said
    runs = sorted(path for path in folder.iterdir() if path.is_dir())
    assert [path.name for path in runs] == [
        f"snli_ve-{method}-seed{seed}" for method in METHODS for seed in (0, 1)
    ]
    for path in runs:
        config, summary = Run(path).config(), Run(path).summary()
        assert path.name == f"{config.task}-{config.method}-seed{config.seed}"
        assert (config.teacher_seed, config.eval_every, summary["steps"]) == (0, 1, 8)
        assert f"accuracy {summary['student_metric']:.4f}" in said
    assert f"next: python -m optima_fast.report {folder}/*/" in said


def test_the_table_is_what_the_runs_say(finished):
    folder, said, counted = finished.folder, finished.said, finished.operations
    told = json.loads((folder / "compare.json").read_text())
    task = told["tasks"]["snli_ve"]
    summaries = {
        (m, s): Run(folder / f"snli_ve-{m}-seed{s}").summary() for m in METHODS for s in (0, 1)
    }
    for row in task["rows"]:
        metrics = [summaries[row["label"], seed]["student_metric"] for seed in (0, 1)]
        assert list(row["metrics"].values()) == metrics
        assert row["median"] == sum(metrics) / 2
    base, random = task["rows"]
    assert (base["difference"], base["arithmetic"], base["reward"]) == (None, 1.0, 0.0)
    assert random["difference"]["seeds"] == 2
    assert (told["failed"], task["winner"]) == ({}, None)
    assert "There are 2 seeds; a winner needs 3." in said
    page = (folder / "compare.md").read_text()
    assert f"| random | {random['median']:.4f} |" in page
    assert "All seeds of a task share one teacher" in page

    for run in map(Run, sorted(folder.glob("*-seed?"))):
        times = [line["seconds"] for line in run.metrics() if "validation" in line]
        seconds = run.summary()["seconds"]
        assert 0 < times[0] < times[-1] < seconds["distill"] + seconds["reward"]
        assert times == sorted(times)

    # the pulls of a run's summary are another account of its arithmetic
    runs = [Run(folder / f"snli_ve-{m}-seed{s}") for m in METHODS for s in (0, 1)]
    assert all(each is counted[0] for each in counted)
    whole = counted[0]["image+text+multimodal"]
    for seed in (0, 1):
        pulls = summaries["random", seed]["arms"]
        operations = sum(2 * n * counted[0][arm] for arm, n in pulls.items() if n)
        assert curves.read(runs[2 + seed], counted[0]).operations == operations
        assert curves.read(runs[seed], counted[0]).operations == 8 * whole
        assert operations < 8 * whole


def test_the_same_command_makes_no_finished_run_again(finished, monkeypatch, capsys):
    argv, folder = finished.argv, finished.folder
    before = (folder / "compare.json").read_text()
    monkeypatch.setattr(processes.subprocess, "Popen", no_process)
    monkeypatch.setattr(curves, "operations", lambda runs: finished.operations)
    assert command.main([*argv, "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 5
    assert all(" (finished): python -m optima_fast.train " in line for line in listed[:4])
    assert listed[4] == "4 runs, 1 at a time; nothing was run or written"
    assert command.main(argv) == 0
    assert (folder / "compare.json").read_text() == before


def test_other_settings_in_the_same_folder_are_refused(finished, capsys):
    argv, folder = finished.argv, finished.folder
    assert command.main([*argv, "--lr=1e-4"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}/snli_ve-layerwise-seed0 holds a run of another")
    assert "--lr was 0.003 there and is 0.0001 now" in error


# ------------------------------------------------------------------ which runs there are


def test_runs_are_made_seed_by_seed_with_the_flags_of_all(tmp_path):
    methods = "headroom,fixed:image+text,optima:gamma=0.9:round-steps=20"
    cells = made(tmp_path, "--lr=0.01", "--batch-size", "8", methods=methods).cells()
    assert [(c.seed, c.label) for c in cells[:4]] == [
        (0, "headroom"), (0, "fixed:image+text"), (0, "optima:gamma=0.9:round-steps=20"),
        (1, "headroom"),
    ]  # fmt: skip
    for cell in cells:
        config = cell.config
        assert (config.lr, config.batch_size, config.seed) == (0.01, 8, cell.seed)
        assert config.eval_every == config.steps // 20 == 50
        again = train_settings(cell.words)
        assert resolve(again) == config
    one = cells[2].config
    assert (one.method, one.gamma, one.round_steps) == ("optima", 0.9, 20)
    assert cells[1].config.arm == "image+text"
    assert len({cell.config.out for cell in cells}) == len(cells)


def train_settings(words: tuple[str, ...]) -> TrainConfig:
    return TrainConfig(**parse(words, prog="", description=""))


def test_a_file_of_settings_is_an_entry(tmp_path):
    file = tmp_path / "weights.yaml"
    file.write_text(
        "method: layerwise\nhidden_weight: {image: 0.1, text: 1, multimodal: 1}\nseed: 9"
    )
    grid_ = made(tmp_path / "out", methods=f"layerwise,{file}", seeds=1)
    cell = grid_.cells()[1]
    assert (cell.label, cell.seed, cell.config.seed) == ("weights", 0, 0)
    assert cell.config.hidden_weight == {"image": 0.1, "text": 1.0, "multimodal": 1.0}
    assert resolve(train_settings(cell.words)) == cell.config


def test_each_seed_may_have_a_teacher_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--teacher-per-seed", "--seeds=2", "--jobs=2", "--eval-every=7", "--dry-run"]
    assert command.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    for line in lines[:-1]:
        config = train_settings(tuple(shlex.split(line.partition("optima_fast.train ")[2])))
        assert config.teacher_seed == config.seed
        assert (config.eval_every, config.threads) == (7, 1)
    assert not list(tmp_path.iterdir())


def test_the_baseline_is_layerwise_or_the_first():
    entries = grid.read_entries("random,layerwise")
    assert [entry.label for entry in grid.read_entries(" kd, random")] == ["kd", "random"]
    assert grid.read_baseline(None, entries) == "layerwise"
    assert grid.read_baseline("random", entries) == "random"
    assert grid.read_baseline(None, grid.read_entries("kd,random")) == "kd"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods=headrom"], "--methods: unknown method 'headrom'; did you mean 'headroom'?"),
        (["--methods=optima:reward=kl,hidden"], "--methods: unknown method 'hidden'; .* FILE.yaml"),
        (["--methods=fixed"], "--methods: fixed needs an arm: write fixed:image"),
        (["--methods=fixed:vidoe"], "fixed:vidoe on vqa: .*'vidoe'"),
        (["--methods=kd:0.5"], "--methods: kd:0.5: '0.5' must be NAME=VALUE"),
        (["--methods=kd:seed=1"], "--methods: kd:seed=1: leave seed out: --seeds N makes runs"),
        (["--methods=kd,kd"], "--methods has kd 2 times: name it once"),
        (["--methods=fixed:image,fixed/image"], "--methods: unknown method 'fixed/image'"),
        (["--methods=optima:gama=1"], "optima:gama=1 on vqa: unknown flag '--gama'; .*'--gamma'"),
        (["--methods=no.yaml"], "no on vqa: cannot read no.yaml: No such file"),
        (["--methods=no.yaml", "--config=x.yaml"], "--config and the file of no among --methods"),
        (["--methods=headroom", "--gamma=0.9"], "headroom on vqa: --gamma is no option of"),
        (["--task=vqa,coc"], "unknown task 'coc'; did you mean 'coco'?"),
        (["--task=vqa,vqa"], "--task has vqa 2 times"),
        (["--seeds=0"], "argument --seeds: must be a whole number from 1 on, got '0'"),
        (["--jobs=x"], "argument --jobs: must be a whole number from 1 on, got 'x'"),
        (["--baseline=kd"], "unknown --baseline 'kd'; choose from headroom, layerwise, random"),
        (["--seed=3"], "--seed=3 is set by the grid: leave it out; --seeds N makes runs of seeds"),
        (["--method", "kd"], "--method is set by the grid: leave it out; --methods names"),
        (["--arm=image"], "--arm=image is set by the grid: leave it out; write fixed:ARM"),
        (["--resume=never"], "--resume=never is set by the grid"),
        (["--setps=3"], "headroom on vqa: unknown flag '--setps'; did you mean '--steps'?"),
        (["--lr=-1"], "headroom on vqa: --lr must be positive and finite, got -1"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_any_run(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes.subprocess, "Popen", no_process)
    assert command.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(AssertionError, match=f"^error: {message}"):
        raise AssertionError(error)
    assert not list(tmp_path.iterdir())


def no_process(*args: object, **options: object) -> None:
    raise AssertionError("nothing is to be trained")


def test_a_folder_of_something_else_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes.subprocess, "Popen", no_process)
    for name, content, message in (
        ("file", None, "is a file: choose another --out"),
        ("notes", "notes.txt", "is there and holds no comparison: choose another --out"),
        ("newer", "compare.json", "is none of this version's: choose another --out"),
    ):
        path = tmp_path / name
        if content is None:
            path.touch()
        else:
            path.mkdir()
            (path / content).write_text('{"format": 99}')
        assert command.main([f"--out={path}"]) == 2
        assert message in capsys.readouterr().err
    file = tmp_path / "resume.yaml"
    file.write_text("resume: never")
    assert command.main([f"--methods={file}", f"--out={tmp_path / 'new'}"]) == 2
    assert "resume is not for a grid: the same command goes on" in capsys.readouterr().err


# ------------------------------------------------------------------ how runs are made


def test_runs_on_a_cpu_have_a_thread_each_where_there_are_several(monkeypatch):
    monkeypatch.setattr(runner, "usable_cores", lambda: 3)
    assert len(runner.places("cpu", 0, None)) == 3
    one = {"OMP_NUM_THREADS": "1"}
    assert runner.places("cpu", 0, 2) == [runner.Place(one, ("--threads=1",))] * 2
    assert runner.places("cpu", 0, 1) == [runner.Place({})]
    assert runner.places("cpu", 4, 2) == [runner.Place({})] * 2
    assert runner.places("cpu", 2, None) == runner.places("cpu", 4, None) == [runner.Place({})]


def test_runs_on_cuda_have_a_visible_device_each(monkeypatch):
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def devices(*arguments: Any) -> list[str | None]:
        return [p.environment.get("CUDA_VISIBLE_DEVICES") for p in runner.places(*arguments)]

    assert devices("auto", 0, None) == devices("cuda", 0, None) == ["0", "1"]
    assert devices("cuda", 0, 3) == ["0", "1", "0"]
    assert devices("cuda:1", 0, None) == [None]
    assert devices("cpu", 0, 1) == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert devices("auto", 0, None) == ["5", "7"]


# a run that logs a step and ends as its seed says, or waits until it is told to stop
FAKE = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / "told").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
folder.mkdir(parents=True)
(folder / "metrics.jsonl").write_text('{"step": 3}\\n{"st')
if sys.argv[2] == "fails" and folder.name.endswith("seed0"):
    sys.exit("warning: first\\nerror: step 4: hidden is nan")
if sys.argv[2] == "fails":
    (folder / "summary.json").write_text(sys.argv[3])
    (folder / "student.safetensors").touch()
    sys.exit()
time.sleep(20)
"""


def faked(monkeypatch, kind: str) -> None:
    summary = dict.fromkeys(SUMMARY_KEYS)
    summary |= {"method": "random", "metric_name": "accuracy", "student_metric": 0.5}
    summary["seconds"] = {"distill": 1.0, "reward": 0.0}

    def fake(words: list[str]) -> list[str]:
        (out,) = (word.partition("=")[2] for word in words if word.startswith("--out="))
        return [sys.executable, "-S", "-c", FAKE, out, kind, json.dumps(summary)]

    monkeypatch.setattr(runner, "command", fake)
    monkeypatch.setattr(runner, "LOOK", 0.02)


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    faked(monkeypatch, "fails")
    cells = made(tmp_path).cells()
    failed = runner.train(cells, [runner.Place({})] * 2, QUIET)
    assert failed == {f"vqa {method} seed 0": "step 4: hidden is nan" for method in METHODS}
    assert [cell.run.finished() for cell in cells] == [False, False, True, True]
    assert runner.train(cells[2:], [], QUIET) == {}


def test_a_run_that_fails_is_named_at_the_end(tmp_path, capsys):
    """In a process of its own, as a user runs it."""
    argv = ["--methods=kd", "--seeds=1", "--jobs=1", "--data=/no/folder", f"--out={tmp_path / 'o'}"]
    assert command.main(argv) == 1
    done = capsys.readouterr()
    assert done.err.startswith("error: vqa kd seed 0: no data folder '/no/folder'")
    assert done.err.count("\n") == 1
    assert "vqa kd seed 0 FAILED: no data folder" in done.out
    told = json.loads((tmp_path / "o" / "compare.json").read_text())
    assert told["failed"]["vqa kd seed 0"].startswith("no data folder")
    page = (tmp_path / "o" / "compare.md").read_text()
    assert "FAILED: vqa kd seed 0: no data folder" in page
    assert "No run is finished." in page


def test_ctrl_c_ends_the_runs_that_were_started(tmp_path, monkeypatch):
    faked(monkeypatch, "waits")
    cells, sleep = made(tmp_path).cells(), time.sleep

    def interrupt(seconds: float) -> None:
        sleep(0.01)
        if all(cell.run.metrics_path.is_file() for cell in cells[:2]):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(runner.time, "sleep", interrupt)
    with pytest.raises(Interrupted, match="stopped: 0 of 4 runs are finished"):
        runner.train(cells, [runner.Place({})] * 2, QUIET)
    assert [(cell.run.folder / "told").is_file() for cell in cells] == [True, True, False, False]


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped(*arguments: object) -> None:
        raise Interrupted("stopped: 1 of 9 runs are finished")

    monkeypatch.setattr(runner, "train", stopped)
    assert command.main([f"--out={tmp_path / 'out'}"]) == 130
    assert "1 of 9 runs are finished; the same command goes on" in capsys.readouterr().out


def test_how_far_a_run_is_is_read_from_the_end_of_its_log(tmp_path, monkeypatch):
    cell = made(tmp_path).cells()[0]
    assert runner.step(cell) == 0
    cell.run.folder.mkdir()
    cell.run.metrics_path.write_text('{"st')
    assert runner.step(cell) == 0
    lines = "".join(f'{{"step": {i}, "loss": 0.5}}\n' for i in range(100))
    cell.run.metrics_path.write_text(lines + '{"step": 10')
    monkeypatch.setattr(runner, "TAIL", 64)
    assert runner.step(cell) == 99


# ------------------------------------------------------------------ what is made of them

ARMS = {"image": 40, "image+text+multimodal": 100}  # operations of a step
ALL = "image+text+multimodal"


def write(folder: Path, summary: dict[str, Any], lines: list[dict[str, Any]]) -> Run:
    """A finished run of 10 steps by hand."""
    run = Run(folder)
    given = dict.fromkeys(SUMMARY_KEYS)
    given |= {"metric_name": "accuracy", "steps": 10, "student_metric": 0.5, **summary}
    run.begin(resolve(TrainConfig(method=given["method"])))
    run.summary_path.write_text(json.dumps(given))
    run.metrics_path.write_text("\n".join(map(json.dumps, lines)))
    run.weights_path.touch()
    return run


def evaluated(step: int, metric: float, seconds: float | None) -> dict[str, Any]:
    line = {"step": step, "validation": {"accuracy": metric, "other": 9.0}}
    return line if seconds is None else {**line, "seconds": seconds}


def test_a_curve_counts_the_arms_of_the_steps_and_the_seconds_of_the_reward(tmp_path):
    rounds = zip((2, 4, 6, 8, 10), ("image", ALL, "image", "image", ALL), strict=True)
    lines: list[dict[str, Any]] = [
        {"step": step, "round": i, "arm": arm, "reward": 0.1}
        for i, (step, arm) in enumerate(rounds, 1)
    ]
    lines += [evaluated(3, 0.3, 7.0), evaluated(6, 0.6, 14.5), evaluated(9, 0.7, 21.0)]
    lines.append({"step": 10, "round": 4, "arm": ALL, "loss": 1.0})
    summary = {
        "method": "headroom", "arms": {"image": 3, "text": 0, ALL: 2}, "validation_metric": 0.8,
        "seconds": {"teacher": 99.0, "distill": 16.0, "reward": 8.0, "eval": 50.0},
    }  # fmt: skip
    result = curves.read(write(tmp_path / "run", summary, lines), ARMS)
    # image 2 x 40 = 80, all 2 x 100: 280, image 4 x 40: 440, all: 640; step 3 and 9 within rounds
    assert result.curve == (
        Point(3, 0.3, 180, 7.0),
        Point(6, 0.6, 360, 14.5),
        Point(9, 0.7, 540, 21.0),
        Point(10, 0.8, 640, 24.0),
    )
    assert (result.metric, result.distill, result.reward, result.steps) == (0.5, 16.0, 8.0, 10)
    assert result.operations == 640


def test_a_curve_of_one_arm_or_none(tmp_path):
    summary = {
        "method": "layerwise", "arms": {ALL: 5}, "validation_metric": 0.8,
        "seconds": {"distill": 20.0, "reward": 0.0},
    }  # fmt: skip
    result = curves.read(write(tmp_path / "a", summary, [evaluated(3, 0.3, None)]), ARMS)
    assert result.curve == (Point(3, 0.3, 300, None), Point(10, 0.8, 1000, 20.0))
    summary |= {"method": "kd", "arms": {}}
    result = curves.read(write(tmp_path / "b", summary, []), {"none": 7})
    assert result.curve == (Point(10, 0.8, 70, 20.0),)


def test_what_the_arithmetic_of_a_step_depends_on():
    def shapes(**given: Any) -> str:
        return curves._shapes(resolve(TrainConfig(**given)))

    alike = [{"method": m} for m in ("headroom", "optima", "layerwise", "random")]
    alike += [{"method": "fixed", "arm": "image"}, {"seed": 3, "lr": 0.1, "steps": 99}]
    assert len({shapes(**given) for given in alike}) == 1
    others: list[dict[str, Any]] = [{}, {"method": "kd"}, {"method": "finetune"}]
    others += [{"batch_size": 7}, {"hidden_weight": 0.0}, {"task": "coco"}, {"data": "/x"}]
    others += [{"student": "coca_tiny6"}, {"attention_loss": "kl"}]
    # a mapping that is drawn says how deep the teacher runs
    others += [{"layer_mapping": "reversed"}]
    others += [{"layer_mapping": "random", "seed": seed} for seed in range(2)]
    assert len({shapes(**given) for given in others}) == len(others)


def test_paired_differences_by_hand():
    first, second = {0: 0.52, 1: 0.56, 2: 0.60, 3: 0.9}, {0: 0.50, 1: 0.50, 2: 0.57, 4: 0.1}
    found = statistics.paired(first, second)
    # differences .02, .06, .03: mean .11 / 3, squares of what is off the mean .00026 / 3
    assert found is not None
    assert found.seeds == 3
    assert found.mean == pytest.approx(0.11 / 3)
    assert found.error == pytest.approx(math.sqrt(0.0026 / 3 / 2 / 3))
    assert found.beyond_noise
    assert statistics.paired({0: 0.5}, {0: 0.25}) == statistics.Difference(0.25, None, 1)
    assert statistics.paired({0: 0.5}, {1: 0.25}) is None


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        # differences 2, 6, 3: 3.05 standard errors
        ({"a": [52, 56, 60], "b": [50, 50, 57]}, "a"),
        ({"b": [50, 50, 57], "a": [52, 56, 60]}, "a"),
        # the same from two seeds alone, or one
        ({"a": [52, 56], "b": [50, 54]}, None),
        ({"a": [52], "b": [50]}, None),
        # differences 2, 8, 1: 1.68 standard errors
        ({"a": [52, 58, 58], "b": [50, 50, 57]}, None),
        # exactly 2 standard errors: differences 0, 2, 2, ... are not enough
        ({"a": [0, 2, 2], "b": [0, 0, 0]}, None),
        # ahead of the second best, but not beyond the noise of the third
        ({"a": [60, 60, 60], "b": [59, 59, 59], "c": [80, 30, 60]}, None),
        ({"a": [60, 60, 60], "b": [59, 59, 59], "c": [50, 51, 50]}, "a"),
        ({"a": [60, 60, 60], "b": [60, 60, 60]}, None),
        ({"a": [60, 60, 60]}, None),
        # only two seeds of all three methods
        ({"a": [60, 61, 60], "b": [50, 51, 50], "c": [40, 41]}, None),
    ],
)
def test_a_winner_is_ahead_of_each_other_by_more_than_two_standard_errors(metrics, expected):
    of_seeds = {label: dict(enumerate(values)) for label, values in metrics.items()}
    assert statistics.winner(of_seeds) == expected


def result(metric: float, *points: tuple[int, float, int, float | None]) -> Result:
    curve = tuple(Point(*point) for point in points)
    return Result(metric, 20.0, 4.0, curve[-1].step, curve)


# of 10 steps each; the cheap one takes 640 operations and 24 seconds, the other 1000 and 20
CHEAP = ((3, 0.3, 180, 7.0), (6, 0.6, 360, 14.5), (9, 0.7, 540, 21.0), (10, 0.8, 640, 24.0))
DEAR = ((3, 0.2, 300, 6.0), (6, 0.5, 600, 12.0), (9, 0.65, 900, 18.0), (10, 0.75, 1000, 20.0))


def test_equal_budgets_are_read_at_the_last_evaluation_within_them():
    own, base = {0: result(0.5, *CHEAP)}, {0: result(0.5, *DEAR)}
    found = statistics.at_budget(own, base, "arithmetic")
    assert found is not None
    assert (found.budget, found.share, found.steps) == (640, 0.64, (10, 6))
    assert (found.metrics, found.difference.mean) == ((0.8, 0.5), pytest.approx(0.3))
    found = statistics.at_budget(own, base, "time")
    assert found is not None
    assert (found.budget, found.share, found.steps) == (20.0, 1.0, (6, 10))
    assert (found.metrics, found.difference.mean) == ((0.6, 0.75), pytest.approx(-0.15))


def test_nothing_is_extrapolated():
    late, base = {0: result(0.5, (10, 0.8, 200, 2.0))}, {0: result(0.5, *DEAR)}
    assert statistics.at_budget(late, base, "arithmetic") is None
    assert statistics.at_budget(late, base, "time") is None
    unknown = tuple((*point[:3], None) for point in CHEAP[:-1])
    own = {0: result(0.5, *unknown, CHEAP[-1])}
    assert statistics.at_budget(own, base, "time") is None
    assert statistics.at_budget(own, base, "arithmetic") is not None
    assert statistics.at_budget({1: base[0]}, base, "time") is None


def test_a_row_by_hand():
    results = {
        "layerwise": {s: result(m, *DEAR) for s, m in enumerate((0.50, 0.50, 0.57))},
        "random": {s: result(m, *CHEAP) for s, m in enumerate((0.52, 0.56, 0.60, 0.1))},
        "kd": {},
    }
    results["random"][1] = Result(0.56, 30.0, 6.0, 10, tuple(Point(*p) for p in DEAR))
    base, row = statistics.rows(results, "layerwise")
    assert (base.label, base.difference, base.budgets, base.arithmetic) == (
        "layerwise",
        None,
        {},
        1,
    )
    assert (row.label, row.median) == ("random", pytest.approx(0.54))
    assert row.difference is not None
    assert row.difference.mean == pytest.approx(0.11 / 3)
    assert row.arithmetic == pytest.approx((0.64 + 1 + 0.64) / 3)
    assert (row.distill, row.reward) == (20.0, 4.0)
    equal = row.budgets["arithmetic"]
    assert equal.difference.mean == pytest.approx((0.3 + 0 + 0.3) / 3)
    assert equal.metrics == pytest.approx(((0.8 + 0.75 + 0.8) / 3, (0.5 + 0.75 + 0.5) / 3))
    assert (equal.budget, equal.share, equal.steps) == (640, 0.64, (10, 6))
    (alone,) = statistics.rows({"kd": results["random"]}, "layerwise")
    assert (alone.difference, alone.arithmetic, alone.budgets) == (None, None, {})


def section(*seeds: float, winner: str | None = None) -> tables.Section:
    results = {
        "layerwise": {s: result(0.5, *DEAR) for s in range(len(seeds))},
        "random": {s: result(m, *CHEAP) for s, m in enumerate(seeds)},
    }
    return tables.Section("vqa", "accuracy", statistics.rows(results, "layerwise"), winner)


def test_the_tables_by_hand(tmp_path):
    made_ = made(tmp_path)
    one = section(0.52, 0.56, 0.6, winner="random")
    assert tables.of_test(one, "layerwise")[1:] == [
        ["layerwise", "0.5000", "0.5000-0.5000", "-", "3", "1.00", "20 + 4"],
        ["random *", "0.5600", "0.5200-0.6000", "+0.0600 (0.0231)", "3", "0.64", "20 + 4"],
    ]
    assert tables.of_budgets(one, "layerwise")[1:] == [
        ["random", "arithmetic", "0.64", "10, 6", "0.8000", "0.5000", "+0.3000 (0.0000)"],
        ["random", "time", "20 s", "6, 10", "0.6000", "0.7500", "-0.1500 (0.0000)"],
    ]
    notes = tables.explained(made_)
    page = tables.as_markdown(made_, [one], {"vqa kd seed 1": "no"}, notes)
    assert "| random * | 0.5600 | 0.5200-0.6000 |" in page
    assert "| random | time | 20 s | 6, 10 |" in page
    assert "FAILED: vqa kd seed 1: no" in page
    assert "All seeds of a task share one teacher" in page


def test_one_seed_has_no_uncertainty_and_says_so():
    one = section(0.6)
    assert tables.of_test(one, "layerwise")[2][3] == "+0.1000"
    assert "There is one seed, so there is no standard error" in tables.verdict(one)


@pytest.mark.parametrize(
    ("seeds", "winner", "said"),
    [
        ((0.6, 0.6), None, "There are 2 seeds; a winner needs 3."),
        ((0.6, 0.6, 0.4), None, "No winner: no method is ahead"),
        ((0.6, 0.6, 0.6), "random", "random is ahead of each other method by more than 2 standard"),
    ],
)
def test_the_verdict_says_no_more_than_the_numbers(seeds, winner, said):
    assert tables.verdict(section(*seeds, winner=winner)).startswith(said)


def test_a_comparison_of_one_method_says_so():
    rows = section(0.5, 0.6).rows[:1]
    said = tables.verdict(tables.Section("vqa", "accuracy", rows, None))
    assert said == "There is one method, so nothing is compared."
