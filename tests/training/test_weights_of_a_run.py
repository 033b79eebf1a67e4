"""Weights by module in settings: flags, files, run folders, resumed runs."""

from __future__ import annotations

import pytest
import torch
from small_run import QUIET, small, stop, trainer, untimed

from optima_fast.errors import UserError
from optima_fast.training import checkpoints, experiment
from optima_fast.training.config import TrainConfig
from optima_fast.training.flags import parse, read_yaml, to_yaml

BY_MODULE = {"image": 0.5, "text": [2.0], "multimodal": {"last": 1.0}}
CROSSED = {**BY_MODULE, "cross": 0.25}


def flags(*argv: str) -> TrainConfig:
    return TrainConfig(**parse(argv, prog="", description=""))


def test_weights_by_module_are_yaml_in_a_flag_and_in_a_file(tmp_path):
    text = "{image: .5, text: [2], multimodal: {last: 1}}"
    assert flags("--hidden-weight", text).hidden_weight == BY_MODULE
    lines = ["hidden_weight:", "  image: 5e-1", "  text: [2]", "  multimodal: {last: 1}"]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    config = flags("--config", str(tmp_path / "c.yaml"))
    assert config.hidden_weight == BY_MODULE
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert TrainConfig(**read_yaml(tmp_path / "again.yaml")) == config
    assert flags("--hidden-weight", "0.25").hidden_weight == 0.25


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--hidden-weight", "{image: 1"], "--hidden-weight is not valid YAML"),
        (["--hidden-weight", "{image: 1}"], "--hidden-weight must name every module"),
        (["--hidden-weight", "{imge: 1, text: 1, multimodal: 1}"], "got 'imge'"),
        (["--hidden-weight", "{image: x, text: 1, multimodal: 1}"], "of numbers, got 'x'"),
        (["--hidden-weight", "{image: 1, image: 2}"], "--hidden-weight has image twice: keep one"),
        (["--hidden-weight", "{image: [[1]]}"], "of numbers, got 'a list'"),
        (["--hidden-weight", "{image: -1, text: 1, multimodal: 1}"], "not negative, got -1.0"),
        (
            ["--attention-weight", "{image: 1, text: 1, multimodal: 1, cross: 1}"],
            "got 'cross'; set cross_attention=True",
        ),
        (["--prediction-weight", "-1"], "--prediction-weight must be 0 or more and finite"),
    ],
)
def test_wrong_weights_are_told_in_one_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        flags(*argv)
    assert "\n" not in str(caught.value)


def test_a_list_is_no_weight(tmp_path):
    (tmp_path / "c.yaml").write_text("hidden_weight: [1, 2]")
    with pytest.raises(UserError, match="must be a number or a mapping by module, got a list"):
        flags("--config", str(tmp_path / "c.yaml"))


def test_another_number_of_layers_is_told_before_the_teacher_trains(tmp_path):
    config = small(tmp_path, hidden_weight={**BY_MODULE, "image": [1.0, 2.0, 3.0]})
    with pytest.raises(UserError, match=r"\['image'\] must be .* each of 2 layers, got 3"):
        experiment.run(config, QUIET)
    assert not (tmp_path / "cache").exists()


def test_a_run_with_weights_goes_on_exactly(tmp_path):
    given = {
        "method": "layerwise", "steps": 4, "hidden_weight": BY_MODULE, "attention_weight": CROSSED,
        "cross_attention": True, "prediction_weight": 0.5, "kl_weight": 0.5, "log_every": 1,
    }  # fmt: skip
    whole = trainer(tmp_path / "whole", **given)
    assert whole.distiller.prediction_weight == 0.5
    whole.fit()
    stop(trainer(tmp_path / "parts", **given), after=2)
    rest = trainer(tmp_path / "parts", **given)
    rest.resume(checkpoints.latest_checkpoint(rest.run.checkpoints))
    rest.fit()
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, rest.student.state_dict()[name]), name
    assert untimed(whole.run) == untimed(rest.run)


def test_a_checkpoint_from_before_a_setting_is_one_of_its_default(tmp_path):
    t = trainer(tmp_path, steps=4, method="layerwise")
    path = t.save()
    state = checkpoints.load_checkpoint(path)
    del state["config"]["prediction_weight"]
    torch.save(state, path)
    t.resume(path)
    other = trainer(tmp_path / "other", steps=4, method="layerwise", prediction_weight=0.5)
    with pytest.raises(UserError, match=r"prediction_weight is 1\.0 there and 0\.5 here"):
        other.resume(path)
