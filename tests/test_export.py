"""A run's student, or a checkpoint, taken away: each format is read again and says the same."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from models.record_open_clip import MODELS, draw, inputs
from official import edit
from PIL import Image
from small_run import finetuned

from optima_fast import export, predict, train
from optima_fast.models import CoCa, CoCaConfig, open_clip, presets, pretrained
from optima_fast.models.programs import FILES
from optima_fast.models.task_model import TaskModel, build
from optima_fast.tasks import tokenizers
from optima_fast.training import checkpoints, experiment
from optima_fast.training.checkpoints import write_json
from optima_fast.training.config import TrainConfig
from optima_fast.training.run import SUMMARY_KEYS, Run

CONFIG = open_clip.config_of(MODELS["pooler"], {"text_decoder.": torch.empty(0)})
STATE = {n: v.float() for n, v in draw(open_clip.shapes(CONFIG), 3).items()}


def student() -> CoCa:
    coca = CoCa(CONFIG)
    coca.load_state_dict(open_clip.from_open_clip(STATE, CONFIG))
    return coca.eval()


def run_of(folder: Path, config: CoCaConfig, coca: CoCa | None = None) -> Path:
    """A finished run's folder, as far as its model goes."""
    model = build(config, "classification", 5)
    if coca is not None:
        model = TaskModel(coca, model.head)
    data = SimpleNamespace(
        head="classification",
        num_classes=5,
        classes=list("abcde"),
        tokenizer=tokenizers.make("words", ["a b c"]),
        text_length=config.text_length,
        train=SimpleNamespace(images=None),
    )
    run, settings = Run(folder), TrainConfig(task="vqa")
    run.begin(settings)
    run.save_model(model, data, settings)
    return folder


def features(coca: CoCa) -> list[torch.Tensor]:
    images, ids = inputs(0)
    with torch.no_grad():
        out = coca(images.float(), ids, features=True)
        return [out.image_features, out.text_features, coca.token_logits(out.decoded)]


def test_a_runs_student_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coca = student()
    run = run_of(tmp_path / "run", CONFIG, coca)
    assert export.main([str(run), "--to=open_clip", f"--out={tmp_path}/out"]) == 0
    said = capsys.readouterr().out
    assert "without the task's head" in said
    assert "are those of the run's own tokenizer, not those of CLIP's" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    state = safetensors.torch.load_file(tmp_path / "out/open_clip_model.safetensors")
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
    described = json.loads((tmp_path / "out/open_clip_config.json").read_text())
    assert described["model_cfg"] == open_clip.model_cfg(CONFIG)
    assert described["preprocess_cfg"] == {
        "mean": list(pretrained.MEAN),
        "std": list(pretrained.STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    found = pretrained.find(str(tmp_path / "out"))
    assert found is not None
    assert found.config == CONFIG
    for got, want in zip(features(found.load()), features(coca), strict=True):
        assert torch.equal(got, want)
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize": "squash"}
    edit(run / "model.json", lambda model: model.update(pixels=own))
    assert export.main([str(run), "--to=open_clip", f"--out={tmp_path}/own"]) == 0
    described = json.loads((tmp_path / "own/open_clip_config.json").read_text())
    chosen = described["preprocess_cfg"]
    assert (chosen["mean"], chosen["std"], chosen["resize_mode"]) == tuple(own.values())


def test_a_checkpoint_keeps_its_preprocessing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": STATE}, tmp_path / "weights.pt")
    described = {"model_cfg": MODELS["pooler"]}
    described["preprocess_cfg"] = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    (tmp_path / "out").mkdir()
    assert (
        export.main([str(tmp_path / "weights.pt"), "--to=open_clip", f"--out={tmp_path}/out"]) == 0
    )
    assert "head" not in capsys.readouterr().out
    found = pretrained.find(str(tmp_path / "out"))
    assert found is not None
    assert (found.mean, found.std) == ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))


def test_open_clip_loads_what_was_written(tmp_path: Path) -> None:
    try:
        import open_clip as theirs
    except ImportError as error:
        pytest.skip(f"open_clip (open_clip_torch) does not import here: {error}")
    coca = student()
    run = run_of(tmp_path / "run", CONFIG, coca)
    assert export.main([str(run), "--to=open_clip", f"--out={tmp_path}/out"]) == 0
    model = theirs.create_model(f"local-dir:{tmp_path / 'out'}", require_pretrained=True).eval()
    state = model.state_dict()
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
    images, ids = inputs(0)
    with torch.no_grad():
        out = model(images.float(), ids)
    image, text, logits = features(coca)
    torch.testing.assert_close(out["image_features"], image, rtol=0, atol=1e-5)
    torch.testing.assert_close(out["text_features"], text, rtol=0, atol=1e-5)
    real = ids[:, :-1] != 0
    torch.testing.assert_close(out["logits"][real], logits[:, :-1][real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["safetensors", "torch-export", "onnx"])
def test_an_exported_student_has_the_metrics_of_its_run(
    kind: str, digits_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript", reason="needs the extra [export]")
        pytest.importorskip("onnxruntime", reason="needs the extra [export]")
    folder = tmp_path / "student"
    assert export.main([str(digits_run.folder), f"--to={kind}", f"--out={folder}"]) == 0
    said = capsys.readouterr()
    assert "the same 7 answers" in said.out
    assert said.err == ""
    same_metrics(digits_run.folder, folder)
    held = {"config.yaml", "data.json", "model.json", "summary.json", "README.md"}
    weights = {path.name for path in folder.iterdir()} - held
    assert weights == {FILES.get(kind, "student.safetensors")}
    assert held < {path.name for path in folder.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    here = [str(digits_run.folder.parent).encode(), str(Path(export.__file__).parent).encode()]
    for path in folder.iterdir():
        assert not [place for place in here if place in path.read_bytes()], path
    same_answers(digits_run.folder, folder, tmp_path, ["--text=what is the largest digit"], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["nlvr2", "coco"])
def test_pairs_and_captions_as_programs(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finetuned(tmp_path, task)
    assert export.main([str(run.folder), "--to=torch-export"]) == 0
    folder = tmp_path / "run-torch-export"
    assert f"wrote {folder}" in capsys.readouterr().out
    same_metrics(run.folder, folder)
    text = ["--text=both images show digits"] if task == "nlvr2" else []
    same_answers(run.folder, folder, tmp_path, text, capsys)


def same_metrics(run: Path, exported: Path) -> None:
    (_, expected, recorded), (_, got, again) = map(experiment.evaluate, (run, exported))
    assert again == recorded
    loss = expected.pop("loss", 0.0)
    assert got.pop("loss", 0.0) == pytest.approx(loss, rel=1e-4)
    assert got == expected


def same_answers(
    run: Path, exported: Path, folder: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of images of noise, by the command."""
    levels = np.random.default_rng(0).integers(0, 255, (4, 24, 24), dtype=np.uint8)
    for i, image in enumerate(levels):
        Image.fromarray(image).save(folder / f"{i}.png")
    flags = [*(f"--image={folder}/{i}.png" for i in range(4)), *text, "--json", "--device=cpu"]
    said = []
    for source in (run, exported):
        assert predict.main([str(source), *flags]) == 0
        said.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert [x["answer"] for x in said[0]] == [x["answer"] for x in said[1]]
    one, other = ([x["probability"] for x in lines] for lines in said)
    assert one == pytest.approx(other, rel=1e-4)
    assert len(set(one)) == len(one)


def test_photographs_in_the_form_of_open_clip_as_a_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(run_of(tmp_path / "run", CONFIG, student()))
    write_json(run.summary_path, summary())
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize": "shortest"}
    edit(run.model_path, lambda model: model.update(pixels=pixels))
    assert export.main([str(run.folder), "--to=torch-export"]) == 0
    assert "the same 7 answers" in capsys.readouterr().out
    assert (
        "with mean (0.1, 0.2, 0.3) and std (0.4"
        in (tmp_path / "run-torch-export/README.md").read_text()
    )
    assert export.main([str(run.folder), "--to=open_clip"]) == 0
    card = (tmp_path / "run-open_clip/README.md").read_text()
    assert "library_name: open_clip" in card
    assert "task: vqa" in card
    assert "optima_fast.predict" not in card


def test_what_differs_from_the_student_is_not_written(
    digits_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def wrong(path: Path, model: TaskModel) -> None:
        with torch.no_grad():
            state = {name: value.clone() for name, value in model.state_dict().items()}
        state["head.classify.bias"] += 1e-3 * torch.arange(len(state["head.classify.bias"]))
        checkpoints.save_state(path, state)

    monkeypatch.setattr(checkpoints, "save_weights", wrong)
    argv = [str(digits_run.folder), "--to=safetensors", f"--out={tmp_path}/out"]
    assert export.main(argv) == 2
    error = capsys.readouterr().err
    assert "what was exported is not the student: its logits are off by" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_the_run_did_and_its_command_does_it_again(
    digits_run: Any, tmp_path: Path
) -> None:
    run, folder = Run(digits_run.folder), tmp_path / "student"
    argv = [str(run.folder), "--to=safetensors", f"--out={folder}", "--licence=apache-2.0"]
    assert export.main(argv) == 0
    card = (folder / "README.md").read_text()
    fields = yaml.safe_load(card.split("---\n")[1])
    known = run.summary()
    assert fields["license"] == "apache-2.0"
    result = fields["model-index"][0]["results"][0]
    assert result["dataset"]["split"] == "test"
    metric = {"type": "accuracy", "name": "accuracy", "value": known["student_metric"]}
    assert result["metrics"] == [metric]
    for line in (
        f"| accuracy, test split | {known['student_metric']:.4f} |",
        f"| accuracy, validation split | {known['validation_metric']:.4f} |",
        f"accuracy {known['teacher_metric']:.4f} on the test split |",
        "| method | optima |",
        "CC BY 4.0); examples: 240 train, ",
        f"torch {torch.__version__}",
        "| licence | apache-2.0 |",
    ):
        assert line in card
    assert Run(folder).config().out is None
    command = card.split("optima_fast.train ")[1].splitlines()[0].split()
    command[command.index("config.yaml")] = str(folder / "config.yaml")
    cache = digits_run.folder.parent / "cache"
    assert train.main([*command, f"--out={tmp_path}/again", f"--cache={cache}"]) == 0
    assert Run(tmp_path / "again").weights_path.read_bytes() == run.weights_path.read_bytes()


def test_folders_of_this_machine_are_not_told() -> None:
    config = TrainConfig(task="vqa", data="/home/me/vqav2", teacher="hf-hub:org/name", out="/x")
    public = export.portable(dataclasses.replace(config, device="cuda:7"))
    assert (public.data, public.teacher, public.out) == ("vqav2", "hf-hub:org/name", None)
    assert public.device == "auto"
    assert export.portable(TrainConfig(data="data/vqav2")).data == "data/vqav2"


class Hub:
    """What stands for the hub: keeps what it is told, fails where it is to."""

    fails: str = ""
    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def told(self, name: str, **given: Any) -> None:
        if name == self.fails:
            raise OSError(f"no {name}\nand more")
        self.calls.append((name, given))

    def whoami(self) -> None:
        self.told("whoami")

    def create_repo(self, repo_id: str, **given: Any) -> Any:
        self.told("create", repo_id=repo_id, **given)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Path, **given: Any) -> None:
        self.told("upload", repo_id=repo_id, files=sorted(p.name for p in folder_path.iterdir()))


def test_a_push_is_of_the_whole_folder_and_asks_for_a_login_first(
    digits_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="needs the extra [export]")
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    argv = [str(digits_run.folder), "--to=safetensors", "--private"]
    for number, (fails, name, message) in enumerate(
        (
            ("", "name", "--push-to-hub must be ORG/NAME, got 'name'"),
            ("whoami", "me/it", "--push-to-hub me/it: no whoami; 'hf auth login' logs in"),
            ("upload", "me/it", "cannot upload to me/it (no upload); "),
        )
    ):
        monkeypatch.setattr(Hub, "fails", fails)
        out = tmp_path / str(number)
        assert export.main([*argv, f"--push-to-hub={name}", f"--out={out}"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert out.exists() == (fails == "upload")
    monkeypatch.setattr(Hub, "fails", "")
    Hub.calls.clear()
    assert export.main([*argv, "--push-to-hub=me/it", f"--out={tmp_path}/out"]) == 0
    (_, _), (_, created), (_, sent) = Hub.calls
    assert created == {"repo_id": "me/it", "private": True, "exist_ok": True}
    assert sent == {
        "repo_id": "me/it",
        "files": sorted(p.name for p in (tmp_path / "out").iterdir()),
    }


def summary() -> dict[str, Any]:
    """As little as a finished run says."""
    empty: dict[str, Any] = dict.fromkeys(SUMMARY_KEYS)
    sizes = {"steps": 1, "seed": 0, "student_params": 1, "teacher_params": 1}
    names = {"task": "vqa", "method": "kd", "metric_name": "accuracy", "student_metric": 0.5}
    return {**empty, **sizes, **names, "versions": {}}


def test_what_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    google = run_of(tmp_path / "google", presets.get("digits_student"))
    run = run_of(tmp_path / "run", CONFIG)
    (tmp_path / "file").write_text("")
    for source, to, message in (
        (google, "out", "google: not a model of open_clip's form (image_channels is 1, not 3; "),
        (run, "run", "run must be new or an empty folder, and it is neither"),
        (run, "file", "file must be new or an empty folder, and it is neither"),
        ("coca_ViT-B-32", "out", "coca_ViT-B-32 is a preset, which has no weights"),
        (tmp_path / "none.pt", "out", "there is no checkpoint"),
        (tmp_path / "none", "out", "is no run folder and no checkpoint"),
    ):
        before = sorted(tmp_path.rglob("*"))
        assert export.main([str(source), "--to=open_clip", f"--out={tmp_path / to}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
    for flags, message in (
        (["--to=onnx", "--private"], "--private goes with --push-to-hub"),
        (["--to=onx"], "unknown format --to 'onx'; did you mean 'onnx'?"),
        ([f"--to={tmp_path}"], "--out FOLDER says where"),
        (["--to=safetensors", f"--out={tmp_path}/out"], "is not finished: there is no summary"),
    ):
        assert export.main([str(run), *flags]) == 2
        assert message in capsys.readouterr().err
    torch.save({"state_dict": STATE}, tmp_path / "w.pt")
    assert export.main([str(tmp_path / "w.pt"), "--to=onnx", f"--out={tmp_path}/out"]) == 2
    assert "is a checkpoint without a task's head, for --to open_clip" in capsys.readouterr().err
    assert export.main([str(tmp_path / "w.pt"), "--to=open_clip"]) == 2
    assert "--out FOLDER says where to write what" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_told_before_any_work(
    digits_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert export.main([str(digits_run.folder), "--to=onnx", f"--out={tmp_path}/out"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'optima-fast[export]'" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
