"""Whole runs: settings to summary, every method and task, and the same again."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from typing import Any

import pytest
import torch
from small_run import QUIET, small, trainer

import optima_fast
from optima_fast.errors import UserError
from optima_fast.models import MODULES
from optima_fast.training import checkpoints, compiling, experiment, overview, sources, teachers
from optima_fast.training.config import resolve
from optima_fast.training.display import Display
from optima_fast.training.run import Run

TUNED = {"method": "finetune", "steps": 2}

KEYS = {
    "task", "data", "method", "seed", "steps", "device", "metric_name", "teacher_metric",
    "student_metric", "majority_metric", "teacher_params", "student_params", "arms", "seconds",
    "versions",
}  # fmt: skip


def go(tmp_path, **settings: Any) -> tuple[Run, dict[str, Any]]:
    return experiment.run(small(tmp_path, **settings), QUIET)


@pytest.fixture(scope="module")
def tuned_once(tmp_path_factory) -> Run:
    return go(tmp_path_factory.mktemp("tuned"), **TUNED)[0]


@pytest.fixture
def tuned(tuned_once, tmp_path) -> Run:
    """A finished run of two steps, where ``go(tmp_path, **TUNED)`` would make it."""
    shutil.copytree(tuned_once.folder, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.mark.parametrize(
    ("task", "images"), [("vqa", 20), ("snli_ve", 20), ("nlvr2", 40), ("coco", 20)]
)
def test_every_task_runs_from_settings_to_summary(tmp_path, task, images, capsys):
    run, summary = go(tmp_path, task=task, steps=7, round_steps=1, train_images=images)
    assert KEYS <= set(summary)
    assert summary == run.summary()
    assert set(summary["seconds"]) >= {"teacher", "distill", "eval"}
    assert summary["metric_name"] == ("cider" if task == "coco" else "accuracy")
    assert summary["student_params"] > 100_000
    assert sum(summary["arms"].values()) == 7
    names = {p.name for p in run.folder.iterdir()}
    assert names == {
        "config.yaml", "data.json", "metrics.jsonl", "summary.json", "student.safetensors",
        "model.json", "checkpoints", "teacher.json",
    }  # fmt: skip
    again, metrics, recorded = experiment.evaluate(run.folder)
    assert metrics[again.metric_name()] == recorded == summary["student_metric"]
    overview.show(run, summary, Display())
    shown = capsys.readouterr().out
    assert f"{summary['student_metric']:.4f}" in shown
    assert "majority baseline" in shown
    assert f"python -m optima_fast.evaluate {run.folder}" in shown


def test_the_same_seed_gives_the_same_number_twice_and_another_seed_another(digits_run, tmp_path):
    one = Run(digits_run.folder)
    given = {"cache": one.config().cache, "steps": one.config().steps}
    two, three = (go(tmp_path / f"{s}", seed=s, **given)[0] for s in (0, 1))
    weights = [run.weights_path.read_bytes() for run in (one, two, three)]
    assert weights[0] == weights[1] != weights[2]
    assert one.summary()["student_metric"] == two.summary()["student_metric"]
    arms = [run.summary()["arms"] for run in (one, two, three)]
    assert arms[0] == arms[1] != arms[2]


def test_a_teacher_is_trained_once_and_again_when_something_it_depends_on_changes(
    tmp_path, monkeypatch
):
    go(tmp_path, method="kd", steps=2)
    folder = tmp_path / "cache" / "teachers"
    (first,) = folder.iterdir()
    stamp = (first / "student.safetensors").stat().st_mtime_ns
    go(tmp_path, method="layerwise", steps=2, seed=5, out=str(tmp_path / "two"))
    assert list(folder.iterdir()) == [first]
    assert (first / "student.safetensors").stat().st_mtime_ns == stamp

    go(tmp_path, method="kd", steps=2, teacher_steps=5, out=str(tmp_path / "three"))
    assert len(list(folder.iterdir())) == 2

    def name(**settings):
        config = small(tmp_path, **settings)
        own = resolve(teachers.teacher_config(config))
        data = experiment.load_data(config)
        source = sources.find(own.student, "--teacher")
        return teachers.cached_run(own, source, data, torch.device("cpu")).folder.name

    before = name()
    assert before == first.name
    assert name(threads=2, method="random") == before
    assert name(data_seed=1) != before
    assert name(task="coco") != before
    copy = tmp_path / "package"
    for room in ("models", "tasks", "training"):
        (copy / room).mkdir(parents=True)
    monkeypatch.setattr(teachers.optima_fast, "__file__", str(copy / "__init__.py"))
    changed = name()
    assert changed != before
    (copy / "models" / "new.py").write_text("x = 1\n")
    assert name() != changed


def test_a_finished_run_can_teach_the_next_and_start_it(tmp_path):
    first, _ = go(tmp_path, **TUNED, student="digits_base")
    given = {"teacher": str(first.folder), "out": str(tmp_path / "second")}
    run, summary = go(tmp_path, method="layerwise", steps=2, **given)
    assert summary["teacher_metric"] == first.summary()["student_metric"]
    # same widths: the student starts from the teacher's layers unless told otherwise
    data = experiment.load_data(run.config())
    teacher = first.load_model(data)
    start = sources.plan(run.config()).new_student(data, teacher)
    source = teacher.coca
    assert start.coca.image.layers[0].attention.qkv.weight.equal(
        source.image.layers[1].attention.qkv.weight
    )


def test_the_default_folder_is_new_for_each_finished_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(go(tmp_path, **TUNED, out=None)[0].folder) for _ in range(2)]
    assert names == ["runs/vqa-finetune-seed0", "runs/vqa-finetune-seed0-2"]


def test_a_folder_is_never_overwritten(tuned, tmp_path):
    before = {p: p.read_bytes() for p in tuned.folder.rglob("*") if p.is_file()}
    for name, was, now in (("lr", 0.003, 0.5), ("seed", 0, 1), ("batch_size", 4, 5)):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(UserError, match=f"{flag} was {was} there and is {now} now"):
            go(tmp_path, **TUNED, **{name: now})
    with pytest.raises(UserError, match="already holds a run: choose another --out"):
        go(tmp_path, **TUNED, resume="never")
    # finished: told again, not redone
    assert go(tmp_path, **TUNED, threads=2)[1] == tuned.summary()
    other = tmp_path / "full"
    other.mkdir()
    (other / "thesis.txt").write_text("all my work")
    with pytest.raises(UserError, match="not empty and holds no run"):
        go(tmp_path, **TUNED, out=str(other))
    assert {p: p.read_bytes() for p in tuned.folder.rglob("*") if p.is_file()} == before


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path):
    run = Run(tmp_path / "run")
    run.begin(small(tmp_path, **TUNED))
    run.append_metrics({"step": 999})
    go(tmp_path, **TUNED)
    assert {line["step"] for line in run.metrics()} == {1, 2}


def test_resuming_by_folder_takes_its_settings(tmp_path):
    run, summary = go(tmp_path, **TUNED, lr=0.01)
    # as if it had been stopped before its end
    run.summary_path.unlink()
    given = {"resume": str(run.folder)}
    again, second = experiment.run(experiment.settings(given), QUIET)
    assert again.folder == run.folder
    assert second["student_metric"] == summary["student_metric"]
    assert experiment.settings({**given, "lr": 0.01}).lr == 0.01
    with pytest.raises(UserError, match="holds no run"):
        experiment.settings({"resume": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match="goes on in that folder: leave --out elsewhere out"):
        experiment.settings({**given, "out": "elsewhere"})
    for name, other in (("lr", 0.5), ("clip", 1.0)):  # 1.0 is what it is by default
        before = dataclasses.replace(run.config(), clip=0.9)
        run.begin(before)
        with pytest.raises(UserError, match=f"another configuration: --{name} was"):
            experiment.run(experiment.settings({**given, name: other}), QUIET)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "/no/such/folder"}, "no data folder '/no/such/folder'"),
        (
            {"teacher": "coca_lage"},
            "and no checkpoint: unknown model preset 'coca_lage'; did",
        ),
        ({"student": "digits_studnt"}, "unknown model preset 'digits_studnt'; did you mean"),
        ({"student": "digits_teacher", "teacher": "digits_student"}, "deeper than its teacher"),
        ({"student_init": "teacher"}, "can start only from layers of its own shape"),
        ({"student_init": "/no/run"}, "'/no/run' is no run folder and no checkpoint"),
        (
            {"student_init": "digits_base"},
            "teacher, random, a run or a checkpoint, got 'digits_base",
        ),
        ({"student_init": "teacher", "method": "finetune"}, "--method finetune has no teacher"),
        (
            {"policy": "tompson"},
            "--policy must be one of thompson, .*got 'tompson'",
        ),
        ({"device": "cuda:99"}, "--device cuda:99: this torch sees"),
        (
            {"student": "coca_tiny6", "method": "finetune"},
            "coca_tiny6 and --teacher .*image_size must be a multiple of",
        ),
        ({"teacher": "/no/such_model"}, "no run folder and no checkpoint"),
        ({"batch_size": 61}, "--batch-size 61 is more than the 60 images"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        go(tmp_path, **settings)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())  # said before any work


def _other_tokenizer(described):
    described["tokenizer"]["words"].pop()


def _no_shape(described):
    del described["coca"]


def _shorter_texts(described):
    described["coca"]["text_length"] -= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_tokenizer, "trained with another tokenizer"),
        (_no_shape, "does not describe a model: no 'coca'"),
        (_shorter_texts, r"\(image size, channels, text length\) \(24, 1, "),
    ],
)
def test_a_model_of_another_tokenizer_or_size_is_refused(tuned, change, message):
    described = json.loads(tuned.model_path.read_text())
    change(described)
    checkpoints.write_json(tuned.model_path, described)
    with pytest.raises(UserError, match=message):
        experiment.evaluate(tuned.folder)


def test_a_model_of_another_task_is_refused(tuned, tmp_path):
    given = {"task": "nlvr2", "method": "kd", "teacher": str(tuned.folder)}
    with pytest.raises(UserError, match=r"a model for vqa \(classification head.*not for nlvr2"):
        go(tmp_path, **given, out=str(tmp_path / "b"))


@pytest.mark.parametrize("setting", ["out", "cache"])
def test_an_output_that_cannot_be_written_is_told_before_training(tmp_path, setting):
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" if setting == "out" else tmp_path / "file" / "inside"
    with pytest.raises(UserError, match=r"is a file: choose another --out|cannot write to"):
        go(tmp_path, **{setting: str(where)})
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    """A lock is of a file that was opened once, whichever process opened it."""
    (tmp_path / ".step-00000001.pt.77.partial").write_text("left by a killed process")
    with Run(tmp_path).held():
        assert not list(tmp_path.iterdir())
        with pytest.raises(UserError, match="is in use by another process"), Run(tmp_path).held():
            pass
    with Run(tmp_path).held():
        pass


@pytest.fixture
def graphs(monkeypatch):
    """Modules are compiled whole, by the compiler's front half; gives the number of graphs."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m, **options: real(m, backend="eager", **options)
    )
    torch._dynamo.reset()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own
def test_a_step_is_the_same_compiled(tmp_path, graphs):
    before, found = graphs(), {}
    for name in ("off", "on"):
        t = trainer(tmp_path / name, method="layerwise", steps=4, compile=name)
        models = {"student": t.student, "teacher": t.distiller.teacher}
        if name == "on":
            compiling.compile_modules(models, pytest.fail)
        t.arm = MODULES
        found[name] = [t._train_step() for _ in range(2)]
    assert graphs() - before >= len(MODULES) * len(models)
    for eager, compiled in zip(*found.values(), strict=True):
        torch.testing.assert_close(compiled.total, eager.total)
        torch.testing.assert_close(compiled.hidden, eager.hidden)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own
def test_another_arm_compiles_nothing(tmp_path, graphs):
    """A teacher's module is recorded, or runs for another's sake: then there are no more graphs."""
    t = trainer(tmp_path, method="layerwise", steps=30)
    models = {"student": t.student, "teacher": t.distiller.teacher}
    compiling.compile_modules(models, pytest.fail)
    arms = optima_fast.arms(MODULES)
    for arm in arms:
        t.arm = arm
        t._train_step()
    before = graphs()
    for arm in (*arms, *reversed(arms)):
        t.arm = arm
        t._train_step()
    assert graphs() == before


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own
def test_a_module_that_cannot_be_compiled_runs_as_it_is(tmp_path, graphs, monkeypatch):
    plain, t = (trainer(tmp_path / x, method="layerwise", steps=4) for x in "ab")
    real = type(t.student.coca.text).forward

    def breaks(self, *args, **options):
        torch._dynamo.graph_break()
        return real(self, *args, **options)

    monkeypatch.setattr(type(t.student.coca.text), "forward", breaks)
    said = []
    compiling.compile_modules({"student": t.student, "teacher": None}, said.append)
    for x in (plain, t):
        x.arm = MODULES
    for _ in range(2):
        torch.testing.assert_close(t._train_step().total, plain._train_step().total)
    assert len(said) == 1
    assert re.match(
        r"torch.compile fails for the student's text module; .*: Unsupported: .*break.*"
        r"--compile off",
        said[0],
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own
def test_a_run_distils_compiled(tmp_path, graphs):
    """The numbers are the eager ones."""
    _, summary = go(tmp_path, steps=14, round_steps=2)
    _, again = go(tmp_path, steps=14, round_steps=2, compile="on", out=str(tmp_path / "compiled"))
    assert graphs() > 6
    assert again["arms"] == summary["arms"]
    assert again["student_metric"] == pytest.approx(summary["student_metric"], abs=0.05)


def test_an_unfinished_run_cannot_be_evaluated(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        experiment.evaluate(tmp_path)
    run = Run(tmp_path)
    run.begin(small(tmp_path))
    with pytest.raises(UserError, match="is not finished"):
        experiment.evaluate(tmp_path)
