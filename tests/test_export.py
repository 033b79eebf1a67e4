"""A run's student, or a checkpoint, as a folder that open_clip loads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from models.record_open_clip import MODELS, draw, inputs
from official import edit

from optima_fast import export
from optima_fast.models import CoCa, CoCaConfig, open_clip, presets, pretrained
from optima_fast.models.task_model import TaskModel, build
from optima_fast.tasks import tokenizers
from optima_fast.training.config import TrainConfig
from optima_fast.training.run import Run

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
    assert export.main([str(run), "--to", str(tmp_path / "out")]) == 0
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
    assert export.main([str(run), "--to", str(tmp_path / "own")]) == 0
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
    assert export.main([str(tmp_path / "weights.pt"), "--to", str(tmp_path / "out")]) == 0
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
    assert export.main([str(run), "--to", str(tmp_path / "out")]) == 0
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
        assert export.main([str(source), "--to", str(tmp_path / to)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
