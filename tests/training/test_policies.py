"""Bandits and arms of a run: options, first pulls, arms of layers, stops in mid round."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from small_run import small

from optima_fast import bandit
from optima_fast.distill import arm_space
from optima_fast.errors import UserError
from optima_fast.models import presets
from optima_fast.training import checkpoints, experiment, policies
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display
from optima_fast.training.interrupts import Interrupted
from optima_fast.training.run import Run
from optima_fast.training.trainer import Trainer

QUIET = Display(quiet=True)
CHOICES = policies.choices()


def trainer(tmp_path, **settings: Any) -> Trainer:
    given = small(tmp_path, **settings)
    experiment.prepare(given)
    data = experiment.load_data(given)
    torch.manual_seed(7)
    teacher = experiment.new_model(given.teacher, data)
    torch.manual_seed(given.seed)
    student = experiment.new_model(given.student, data)
    run = Run(given.out)
    run.begin(given)
    return Trainer(given, data, student, teacher, run, QUIET)


def lines(t: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in t.run.metrics_path.read_text().splitlines()]


def config(**settings: Any) -> TrainConfig:
    return resolve(TrainConfig(**{"method": "optima", **settings}))


def test_every_policy_that_needs_no_arm_can_be_chosen():
    assert set(CHOICES) == set(bandit.names()) - {"fixed"}
    for name in CHOICES:
        assert config(policy=name).policy == name
    assert config().policy == "thompson"


def test_a_run_stopped_in_the_middle_of_a_round_goes_on_exactly(tmp_path, monkeypatch):
    """Of a policy that keeps much, and has rewards of both signs; others' states: tests/bandit."""
    settings = {
        "policy": "structured-ucb", "steps": 20, "batch_size": 2, "reward_examples": 4,
        "train_images": 20, "init_rounds": 1, "reward_clip": False, "checkpoint_every": 99,
        "eval_every": 99,
    }  # fmt: skip
    whole = trainer(tmp_path / "whole", **settings)
    whole.fit()

    first = trainer(tmp_path / "parts", **settings)
    step = first._train_step

    def stop(*args: Any) -> Any:
        first._stop.asked = first.step + 1 == 17
        return step(*args)

    monkeypatch.setattr(first, "_train_step", stop)
    with pytest.raises(Interrupted):
        first.fit()
    second = trainer(tmp_path / "parts", **settings)
    second.resume(checkpoints.latest_checkpoint(second.run.checkpoints))
    assert second.step == 17  # a round has two steps
    second.fit()
    assert second.policy.state_dict() == whole.policy.state_dict()
    timing = {"samples_per_second": 0, "seconds": 0}
    a, b = ([{**x, **timing} for x in lines(t)] for t in (whole, second))
    assert a == b
    assert sum("reward" in line for line in a) == 10
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, second.student.state_dict()[name]), name


def test_options_left_open_are_the_policy_s_own():
    space = arm_space("modules", presets.get("digits_student").layer_counts)
    for name in CHOICES:
        own = bandit.make(name, 7, seed=5).state_dict()
        settings = config(policy=name, seed=5)
        made = policies.make(settings, space).state_dict()
        if name == "thompson":
            left = (settings.gamma, settings.variance_scale, settings.init_rounds)
            assert left == (0.98, 1.0, 2)
            own |= {"init_rounds": 2}
        assert made == own, name


@pytest.mark.parametrize("name", CHOICES)
def test_options_given_reach_the_policies_that_have_them(name):
    given = {"gamma": 0.875, "init_rounds": 8, "variance_scale": 0.5}
    settings = config(policy=name, **given)
    space = arm_space("modules", presets.get("digits_student").layer_counts)
    state = policies.make(settings, space).state_dict()
    known = policies.options(name)
    for key, value in given.items():
        assert (state.get(key) == value) == (key in known), key
    assert "seed" in known
    if set(given) <= known:
        policies.check_options(settings)
    else:
        missing = next(k for k in policies.OPTIONS if k not in known)
        flag = "--" + missing.replace("_", "-")
        with pytest.raises(UserError, match=f"{flag} is no option of --policy {name}, which has"):
            policies.check_options(settings)


def test_an_option_of_another_policy_is_told_before_any_work(tmp_path):
    with pytest.raises(UserError, match="--gamma is no option of --policy random, which has none"):
        experiment.run(small(tmp_path, policy="random", gamma=0.9, init_rounds=None), QUIET)
    assert not list(tmp_path.iterdir())
    # nobody asked the bandit: what it would be told does not matter
    assert config(method="layerwise", policy="random", gamma=0.9).gamma == 0.9


def test_a_policy_that_is_gone_is_told_before_any_work_and_its_runs_can_be_read(tmp_path):
    with pytest.raises(UserError, match="policy exp3s is not in optima_fast any more, bench/pol"):
        config(policy="exp3s")
    run = Run(tmp_path)
    run.begin(dataclasses.replace(small(tmp_path), policy="exp3s"))
    assert run.config().policy == "exp3s"
    with pytest.raises(UserError, match="policy exp3s is not in optima_fast any more"):
        experiment.run(experiment.settings({"resume": str(tmp_path)}), QUIET)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"arms": "layer-groups:3", "data": "somewhere", "policy": "thompson", "init_rounds": 2},
            "--policy thompson pulls each of 511 arms 2 times first, 1022 rounds of 100 steps, but "
            "--steps 100000 gives 1000: raise --steps, lower --round-steps or --init-rounds, or",
        ),
        (
            {"arms": "layer-groups:2", "policy": "thompson", "steps": 200, "init_rounds": 2},
            "each of 15 arms 2 times first, 30 rounds of 10 steps, but --steps 200 gives 20",
        ),
        (
            {"arms": "layer-groups:3", "student": "digits_base", "policy": "thompson"},
            "each of 127 arms 2 times first, 254 rounds .* gives 100",
        ),
        (
            {"arms": "layer-groups:2", "policy": "scale-free-ucb", "steps": 140},
            "--policy scale-free-ucb pulls each of 15 arms 1 times first, 15 rounds of 10 "
            "steps, but --steps 140 gives 14",
        ),
        (
            {
                "arms": "layer-groups:3",
                "policy": "structured-ucb",
                "student": "digits_base",
                "steps": 150,
            },
            "--policy structured-ucb pulls 16 arms once first, 16 rounds of 10 .* gives 15",
        ),
        (
            {"policy": "scale-free-ucb", "init_rounds": 15},
            "each of 7 arms 15 times first, 105 rounds of 10 steps, but --steps 1000 gives 100",
        ),
    ],
)
def test_first_pulls_that_do_not_fit_are_told_with_the_way_out(settings, message):
    with pytest.raises(UserError, match=message):
        config(**settings)


@pytest.mark.parametrize("arms", ["modules", "layer-groups:2", "layer-groups:3"])
@pytest.mark.parametrize("name", [n for n in CHOICES if n != "thompson"])
def test_every_other_policy_works_with_every_arm_space_of_the_paper(name, arms):
    settings = config(data="somewhere", policy=name, arms=arms)
    space = arm_space(arms, presets.get(settings.student).layer_counts)
    policy = policies.make(settings, space)
    assert policy.warm_up <= 32
    if "features" in policies.options(name):
        rows = [[int(x) for x in row] for row in policy.state_dict()["features"]]
        assert rows == space.features
    assert policy.arms == len(space.arms) == {"modules": 7}.get(arms, 2 ** len(space.units) - 1)


def test_sixty_three_arms_fit_the_paper_s_own_thousand_rounds():
    paper = config(data="somewhere", arms="layer-groups:2")
    assert (paper.steps, paper.round_steps, paper.init_rounds) == (100_000, 100, 10)
    assert config(data="somewhere", policy="random", arms="layer-groups:3").steps


@pytest.mark.parametrize(
    ("arm", "written", "distilled"),
    [
        ("image[2]", "image[2]", {"image": 1}),
        ("text + image[1]+image[2]", "image+text", {"image": 2, "text": 1}),
        ("multimodal", "multimodal", {"multimodal": 1}),
    ],
)
def test_a_fixed_arm_may_be_of_layers(tmp_path, arm, written, distilled):
    t = trainer(tmp_path, method="fixed", arm=arm, steps=2)
    counts = {}
    losses = t.engine.step.forward

    def watch(*given):
        step = losses(*given)
        counts.update({m: sum(p.module == m for p in step.pairs) for m in distilled})
        assert len(step.pairs) == sum(distilled.values())
        return step

    t.engine.step.forward = watch
    t.fit()
    assert counts == distilled
    assert {name: n for name, n in t.pulls.items() if n} == {written: 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arm": "image[3]"}, r"arm 'image\[3\]': layers of image must be from 1 to 2, .*got"),
        ({"arm": "image[1"}, "a member must be MODULE, MODULE.LAYER. or MODULE.FIRST-LAST."),
        ({"arm": "audio[1]"}, "unknown module 'audio'"),
    ],
)
def test_a_fixed_arm_is_checked_against_the_student(settings, message):
    with pytest.raises(UserError, match=message):
        config(method="fixed", **settings)


def test_many_arms_are_pulled_by_their_own_names(tmp_path):
    t = trainer(
        tmp_path, method="random", arms="layer-groups:2", student="digits_base", steps=40,
        round_steps=1, batch_size=2, train_images=20, eval_every=99, checkpoint_every=99,
    )  # fmt: skip
    t.fit()
    assert len(t.pulls) == 63
    pulled = {name for name, n in t.pulls.items() if n}
    assert len(pulled) > 25
    logged = [line for line in lines(t) if "choice" in line]
    assert [line["arm"] for line in logged] == [list(t.pulls)[line["choice"]] for line in logged]
    for line in lines(t):
        if "hidden" in line:
            modules = {member.partition("[")[0] for member in line["arm"].split("+")}
            assert set(line["hidden"]) == modules
