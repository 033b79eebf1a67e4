"""Checkpoints by name: every layout and file format, and every way in which one can be wrong."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import os
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models.checkpoints import BIN, CFG, SAFE, config, describe, found, save, weights
from models.record_open_clip import MODELS
from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.models import open_clip, presets, pretrained
from optima_fast.models.config import CoCaConfig

LIBC = ctypes.CDLL(None)


def assert_weights(checkpoint: pretrained.Checkpoint, atol: float = 0.0) -> None:
    assert checkpoint.config == config()
    got = open_clip.to_open_clip(checkpoint.load())
    for name, value in weights().items():
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name], value, rtol=0, atol=atol)


@pytest.mark.parametrize("file", [*pretrained.WEIGHT_FILES, "mine.pt", "mine.pth"])
def test_a_file_with_its_description_beside(file: str, tmp_path: Path) -> None:
    describe(tmp_path)
    checkpoint = found(save(tmp_path / file))
    assert checkpoint.name == str(checkpoint.path) == str(tmp_path / file)
    assert (checkpoint.mean, checkpoint.std) == (pretrained.MEAN, pretrained.STD)
    assert checkpoint.tokenizer == ""
    assert_weights(checkpoint)


def test_a_description_that_is_a_model_cfg_alone(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CFG))
    assert found(save(tmp_path / SAFE)).config == config()


def test_a_description_with_a_byte_order_mark(tmp_path: Path) -> None:
    described = "\ufeff" + json.dumps(CFG)
    (tmp_path / "open_clip_config.json").write_text(described, encoding="utf-8")
    assert found(save(tmp_path / SAFE)).config == config()


@pytest.mark.parametrize("file", pretrained.WEIGHT_FILES)
def test_a_folder(file: str, tmp_path: Path) -> None:
    describe(tmp_path, mean=[0.5, 0.4, 0.3], std=[0.2, 0.1, 0.3], interpolation="bicubic")
    save(tmp_path / file)
    checkpoint = found(tmp_path)
    assert checkpoint.path == tmp_path / file
    assert (checkpoint.mean, checkpoint.std) == ((0.5, 0.4, 0.3), (0.2, 0.1, 0.3))
    assert_weights(checkpoint)


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    describe(tmp_path)
    save(tmp_path / BIN)
    save(tmp_path / SAFE)
    assert found(tmp_path).path.name == SAFE


def test_training_checkpoints_prefixes_and_other_dtypes(tmp_path: Path) -> None:
    describe(tmp_path)
    wrapped = {f"module.{name}": value for name, value in weights().items()}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}
    training = {"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": optimizer}
    assert_weights(found(save(tmp_path / "epoch_3.pt", training)))
    assert_weights(found(save(tmp_path / "wrapped.safetensors", wrapped)))
    half = {name: value.bfloat16() for name, value in weights().items()}
    assert_weights(found(save(tmp_path / "half.safetensors", half)), atol=0.01)
    old = tmp_path / "old.pt"
    torch.save(weights(), old, _use_new_zipfile_serialization=False)
    assert_weights(found(old))


def test_published_sizes_are_told_from_shapes(tmp_path: Path) -> None:
    """No description beside, no weights read: tensors that take no room in the file."""
    small = presets.get("coca_ViT-B-32")
    state = {n: torch.zeros(()).expand(s) for n, s in open_clip.shapes(small).items()}
    checkpoint = found(save(tmp_path / "b32.pt", state))
    assert checkpoint.config == small
    assert checkpoint.tokenizer == "clip"


def test_finding_does_not_read_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe(tmp_path)
    devices = set()

    def spy(cfg: dict[str, Any], state: dict[str, Tensor]) -> CoCaConfig:
        devices.update(value.device.type for value in state.values())
        return config()

    monkeypatch.setattr(open_clip, "config_of", spy)
    for file in (SAFE, BIN):
        assert found(save(tmp_path / file)).config == config()
    assert devices == {"meta"}


@pytest.mark.parametrize("name", ["coca_tiny6", "coca_ViT-B-32", "laion/CoCa", "teacher", ""])
def test_what_is_no_checkpoints_name(name: str, tmp_path: Path) -> None:
    assert pretrained.find(name) is None
    assert pretrained.find(str(tmp_path)) is None


def test_a_run_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    student = save(tmp_path / "student.safetensors", {"coca.x": torch.zeros(1)})
    (tmp_path / "model.json").write_text("{}")
    assert pretrained.find(str(tmp_path)) is None
    assert pretrained.find(str(student)) is None
    (tmp_path / "model.json").unlink()
    with pytest.raises(UserError, match="a run's student: give its run folder"):
        pretrained.find(str(student))


class Payload:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_pickles_with_code_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for extra, held in ((Payload(), f"{os.name}.mkdir"), (argparse.Namespace(), "argparse.Name")):
        value = {"state_dict": weights(), "extra": extra}
        what = f"holds {held}.* besides tensors .* if you trust it, save"
        for zipped in (True, False):
            torch.save(value, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
            with pytest.raises(UserError, match=what):
                pretrained.find("evil.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("list.pt", [1, 2], "no state dict, nor does it have one .it holds list"),
        ("metrics.pt", {"loss": 1.0, "step": 2}, r"no state dict.*\['loss', 'step'\]"),
        ("nested.pt", {"state_dict": {"a": 1}}, "no state dict"),
        ("resnet.pt", {"layer1.0.weight": torch.zeros(1)}, "no CoCa of open_clip but a ResNet"),
        ("clip.safetensors", {"visual.proj": torch.zeros(1)}, "a plain CLIP without a text_dec"),
        ("empty.pt", {}, "something else, whose weights are called nothing"),
    ],
)
def test_files_that_hold_something_else(
    file: str, value: object, message: str, tmp_path: Path
) -> None:
    path = save(tmp_path / file, value)
    with pytest.raises(UserError, match=message) as error:
        pretrained.find(str(path))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", [SAFE, BIN])
@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.999])
def test_truncated_files(file: str, keep: float, tmp_path: Path) -> None:
    describe(tmp_path)
    path = save(tmp_path / file)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(UserError, match="is damaged or no checkpoint .*: copy or download it"):
        pretrained.find(str(tmp_path))


@pytest.mark.parametrize("file", ["photo.pt", "photo.bin", "photo.safetensors"])
def test_files_that_are_no_checkpoints(file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    for content in (b"\x89PNG\r\n\x1a\n" + bytes(500), b"<!DOCTYPE html><html>", b"PK\x03\x04xx"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged or no checkpoint") as error:
            pretrained.find(str(path))
        assert "\n" not in str(error.value)


def test_what_cannot_be_unpickled_is_one_error_without_warnings(tmp_path: Path) -> None:
    damaged = r"is damaged or no checkpoint \((not what|it ends)"
    contents = [b"hello world", pickle.dumps([1, 2]), pickle.dumps({}, 4), b"", b".", b"0"]
    contents += [b"\x80\x02}R.", b"\x80\x02N)R.", b"\x80\x02G1."]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.pt").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "program.pt"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(len(contents)):
            with pytest.raises(UserError, match=damaged):
                pretrained.find(str(tmp_path / f"{number}.pt"))
        with pytest.raises(UserError, match=r"program\.pt is a TorchScript program"):
            pretrained.find(str(tmp_path / "program.pt"))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no checkpoint .*missing\.pt"):
        pretrained.find(str(tmp_path / "missing.pt"))
    describe(tmp_path)
    with pytest.raises(UserError, match="has open_clip_config.json but none of open_clip_model"):
        pretrained.find(str(tmp_path))
    path = save(tmp_path / SAFE)
    checkpoint = found(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoint.load()


def test_a_description_of_another_model(tmp_path: Path) -> None:
    save(tmp_path / SAFE)
    describe(tmp_path, MODELS["no pooler"])
    with pytest.raises(UserError, match=r"model\.safetensors: .* unexpected \(visual\.attn_pool"):
        pretrained.find(str(tmp_path))
    describe(tmp_path, {"embed_dim": 64, "vision_cfg": {}, "text_cfg": {}})
    with pytest.raises(UserError, match="model_cfg lacks 'multimodal_cfg'"):
        pretrained.find(str(tmp_path))
    for text in ("{", "[]", '{"model_cfg": 3}', '{"model_cfg": {}, "preprocess_cfg": []}'):
        (tmp_path / "open_clip_config.json").write_text(text)
        with pytest.raises(UserError, match=r"^(cannot read )?/.*/open_clip_config\.json"):
            pretrained.find(str(tmp_path))


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ({"interpolation": "bilinear"}, "interpolation 'bilinear'; only 'bicubic'"),
        ({"resize_mode": "squash"}, "resize_mode 'squash'; only 'shortest'"),
        ({"mean": [0.5]}, r"mean must be 3 numbers, got \[0.5\]"),
        ({"mean": ["a", "b", "c"]}, "mean must be 3 numbers, got"),
        ({"std": "abc"}, "std must be 3 positive numbers, got 'abc'"),
        ({"std": [1, 0, 1]}, "std must be 3 positive numbers"),
    ],
)
def test_a_preprocessing_that_is_not_ours(
    preprocess: dict[str, object], message: str, tmp_path: Path
) -> None:
    save(tmp_path / SAFE)
    describe(tmp_path, **preprocess)
    with pytest.raises(UserError, match=message):
        pretrained.find(str(tmp_path))


def test_preprocessing_fields_that_say_what_is_usual(tmp_path: Path) -> None:
    save(tmp_path / SAFE)
    describe(tmp_path, mean=0.5, std=None, interpolation=None, resize_mode="shortest", size=32)
    checkpoint = found(tmp_path)
    assert (checkpoint.mean, checkpoint.std) == ((0.5, 0.5, 0.5), pretrained.STD)


def test_weights_of_a_file_that_changed(tmp_path: Path) -> None:
    describe(tmp_path)
    path = save(tmp_path / SAFE)
    checkpoint = found(tmp_path)
    save(path, {name: value for name, value in weights().items() if name != "visual.proj"})
    with pytest.raises(UserError, match=r"1 missing \(visual\.proj\)"):
        checkpoint.load()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    describe(tmp_path)
    projection = weights()["visual.proj"].clone()
    projection[1, 2] = value
    save(tmp_path / SAFE, {**weights(), "visual.proj": projection})
    with pytest.raises(UserError, match=r"NaN or infinite, the first in image_projection"):
        found(tmp_path).load()


@pytest.mark.skipif(not hasattr(LIBC, "malloc_trim"), reason="needs Linux and glibc")
@pytest.mark.parametrize("file", [SAFE, BIN])
def test_loading_holds_the_weights_once(file: str, tmp_path: Path) -> None:
    sizes = {"image_layers": 1, "text_layers": 1, "multimodal_layers": 1, "vocab_size": 20_000}
    large = dataclasses.replace(presets.get("coca_ViT-B-32"), **sizes)
    describe(tmp_path, open_clip.model_cfg(large))
    state = {name: torch.zeros(shape) for name, shape in open_clip.shapes(large).items()}
    save(tmp_path / file, state)
    del state
    checkpoint = found(tmp_path)

    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    LIBC.malloc_trim(0)  # memory that is free but kept would be taken again unseen
    done, peaks = threading.Event(), [held()]

    def watch() -> None:
        while not done.wait(0.001):
            peaks.append(held())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        model = checkpoint.load()
    finally:
        done.set()
        thread.join()
    size = sum(4 * p.numel() for p in model.parameters())
    assert size > 100e6
    assert 0.8 * size < max(peaks) - peaks[0] < 1.15 * size
