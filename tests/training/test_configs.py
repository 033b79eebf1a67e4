"""The experiments under configs/: they load, and agree with the defaults and with each other."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from optima_fast.models import presets
from optima_fast.training.config import TASKS, TrainConfig, resolve
from optima_fast.training.flags import parse, read_yaml

ROOT = Path(__file__).parents[2] / "configs"
FILES = sorted(ROOT.glob("*/*.yaml"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")


def test_each_task_has_both_stages_in_both_forms():
    names = {f"{task}-{student}.yaml" for task in TASKS for student in ("tiny12", "tiny6")}
    for form in ("paper", "open_clip"):
        assert {path.name for path in ROOT.joinpath(form).iterdir()} == names


@every_file
def test_what_a_file_says_is_what_the_defaults_are(path):
    given = read_yaml(path)
    bare = TrainConfig(
        task=given["task"], data=given["data"], method="optima", student="coca_tiny12"
    )
    defaults = dataclasses.asdict(resolve(bare))
    own = {"out", "teacher", "teacher_steps", "student", "student_init"}
    for name, value in given.items():
        if name not in own:
            assert value == defaults[name], name
    resolve(TrainConfig(**given))


def test_a_flag_for_another_choice_drops_the_options_of_the_files():
    def read(*flags):
        return parse(["--config", str(FILES[0]), *flags], prog="", description="")

    config = resolve(TrainConfig(**read("--method", "headroom")))
    assert (config.policy, config.reward, config.gamma) == ("greedy", "headroom", None)
    assert read("--method", "optima") == read() == read_yaml(FILES[0])
    assert read("--policy", "thompson") == {**read(), "policy": "thompson"}
    given = read("--policy", "scale-free-ucb", "--gamma", "0.9")
    assert (given["method"], given["gamma"]) == ("optima", 0.9)
    assert not given.keys() & {"variance_scale", "init_rounds"}


@every_file
def test_a_second_stage_is_taught_by_the_first(path):
    given = read_yaml(path)
    form = path.parent.name
    assert given["out"] == f"runs/{form}-{path.stem}"
    if path.stem.endswith("tiny6"):
        first = read_yaml(path.with_name(path.name.replace("tiny6", "tiny12")))
        assert given["teacher"] == first["out"]
        assert given["student"] == "coca_tiny6"
    else:
        assert given["student"] == "coca_tiny12"
        assert (given["teacher"] in presets.PRESETS) == (form == "paper")
    assert given.get("student_init", "").startswith("hf-hub:") == (form == "open_clip")


@every_file
def test_each_value_has_its_source(path):
    for line in path.read_text().splitlines():
        if (
            line
            and not line.startswith("#")
            and line.partition(":")[0] not in ("task", "data", "out")
        ):
            assert re.search(r"# \[(paper|coca|own)\]", line), line
