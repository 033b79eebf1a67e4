"""Settings: flags, YAML keys, defaults, and what is said about wrong ones."""

from __future__ import annotations

import dataclasses

import pytest

from optima_fast.errors import UserError
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.flags import parse, read_yaml, to_yaml


def flags(*argv: str) -> TrainConfig:
    return TrainConfig(**parse(list(argv), prog="train", description=""))


def test_every_field_is_a_flag():
    config = flags(
        "--task", "coco", "--round-steps", "7", "--lr=1e-4", "--cross-attention", "true",
        "--arm", "image+text", "--method", "fixed", "--seed", "3",
    )  # fmt: skip
    assert (config.task, config.round_steps, config.lr, config.seed) == ("coco", 7, 1e-4, 3)
    assert config.cross_attention is True
    assert flags() == TrainConfig()


def test_flags_go_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("task: nlvr2\nlr: 1e-3\nround-steps: 5\n")
    config = flags("--config", str(path), "--lr", "0.5")
    assert (config.task, config.lr, config.round_steps) == ("nlvr2", 0.5, 5)


def test_a_resolved_configuration_survives_its_file(tmp_path):
    config = resolve(flags("--method", "kd", "--hidden-scale", "variance"))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert TrainConfig(**read_yaml(tmp_path / "c.yaml")) == config


def test_the_paper_s_numbers_are_the_defaults_on_real_data():
    config = resolve(TrainConfig(data="somewhere", task="snli_ve", method="optima"))
    assert (config.steps, config.round_steps, config.init_rounds) == (100_000, 100, 10)
    assert (config.lr, config.warmup_steps, config.batch_size) == (1e-3, 1000, 128)
    assert (config.hidden_weight, config.attention_weight, config.kl_weight) == (1.0, 1e-2, 0.0)
    assert (config.gamma, config.clip, config.weight_decay) == (0.98, 1.0, 0.1)
    assert (config.teacher, config.student) == ("coca_large", "coca_tiny12")
    assert (config.teacher_lr, config.teacher_head_lr) == (5e-5, 1e-3)
    assert resolve(TrainConfig(teacher_lr=0.5)).teacher_head_lr == 0.5


def test_resolving_leaves_what_was_given_and_no_gap():
    config = resolve(TrainConfig(steps=200, lr=0.1))
    assert (config.steps, config.lr, config.head_lr) == (200, 0.1, 0.1)
    assert config.warmup_steps == 10
    optional = {"arm", "student_init", "tokenizer", "image_size", "out", "cache"}
    optional |= {"relation_heads", "recipe", "extra_images", "stages", "max_hours", "teacher_cache"}
    gaps = {k for k, v in dataclasses.asdict(config).items() if v is None}
    assert gaps == optional | {"gamma", "init_rounds", "variance_scale"}
    config = resolve(TrainConfig(method="optima"))
    assert {k for k, v in dataclasses.asdict(config).items() if v is None} == optional
    assert resolve(TrainConfig(method="kd")).kl_weight == 1.0
    assert resolve(TrainConfig(method="kd", kl_weight=0.3)).kl_weight == 0.3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--task", "vqaa"],
            "--task must be one of vqa, snli_ve, nlvr2, coco, got 'vqaa'",
        ),
        (["--setps", "3"], "unknown flag '--setps'; did you mean '--steps'"),
        (["--stesp=3"], "unknown flag '--stesp'; did you mean '--steps'"),
        (["--zzzzzz", "3"], "unknown flag '--zzzzzz'; --help lists them"),
        (["stray"], "unknown flag 'stray'"),
        (["--step", "3"], "unknown flag '--step'; did you mean '--steps'"),
        (["--steps", "many"], "--steps must be a whole number, got 'many'"),
        (["--steps", "1.5"], "--steps must be a whole number, got '1.5'"),
        (["--steps", "0"], "--steps must be positive and finite, got 0"),
        (["--steps", "-4"], "--steps must be positive and finite, got -4"),
        (["--lr", "nan"], "--lr must be positive and finite, got nan"),
        (["--lr", "inf"], "--lr must be positive and finite, got inf"),
        (["--lr"], "expected one argument"),
        (["--gamma", "1.5"], "--gamma must be above 0 and at most 1, got 1.5"),
        (["--dropout", "1"], r"--dropout must be in \[0, 1\), got 1.0"),
        (["--cross-attention", "maybe"], "must be true or false, got 'maybe'"),
        (["--hidden-weight", "-1"], "--hidden-weight must be finite and not negative, got -1.0"),
        (["--method", "fixed"], "--method fixed needs --arm"),
        (["--method", "fixed", "--arm", "imge"], "unknown module 'imge'; did you mean 'image'"),
        (["--method", "fixed", "--arm", "+"], "names no module"),
        (["--arm", "image"], "--arm image is for --method fixed, not --method headroom"),
        (["--reward", "kl,hiden"], "did you mean 'hidden'"),
        (["--device", "gpu"], "--device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--steps", "20", "--warmup-steps", "20"], "--warmup-steps 20 must be below --steps 20"),
        (["--config", "/no/such.yaml"], "cannot read /no/such.yaml: No such file"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--seed", str(2**64)], r"--seed must be below 2\*\*63, got 18446744073709551616"),
        (["--threads", "100000"], "--threads must be at most 1024, got 100000"),
        (["--tokenizer", "clip"], "--tokenizer clip is for a data folder, not for the digits"),
        (["--image-size", "48"], "--image-size 48 is for a data folder, not for the digits"),
        (["--augment", "1,10"], "--augment 1,10 is for a data folder, not for the digits"),
        (["--data", "x", "--tokenizer", "bert"], "tokenizer must be words, clip, .*, got 'bert'"),
        (["--cell-stage", "0.3"], "--cell-stage 0.3 is for --method finetune on the digits"),
    ],
)
def test_wrong_flags_are_told_in_one_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        flags(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stps: 3", ": unknown key 'stps'; did you mean 'steps'"),
        ("steps: [1]", "steps must be one value, got a list"),
        ("steps: {a: &a [*a]}", "steps must be one value, got a mapping"),
        ("steps: true", "steps must be a whole number, got 'true'"),
        ("steps: 1:30", "steps must be a whole number, got '1:30'"),
        ("compile: true", "--compile must be one of auto, on, off, got 'true'"),
        ("[steps]: 3", ": unknown key 'a list'"),
        ("lr: 0.1\n\nlr: 0.2", "c.yaml: lr is in line 1 and again in line 3: keep one"),
        ("round-steps: 5\nround_steps: 6", "round_steps is in line 1 and again in line 2"),
        ("- a\n- b", "must hold 'key: value' lines, got a list"),
        ("a: [", "is not valid YAML"),
        ("task: null", "task must not be empty"),
    ],
)
def test_wrong_files_are_told_in_one_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        flags("--config", str(tmp_path / "c.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "setting", "value"),
    [
        ("compile: off", "compile", "off"),
        ("compile: on", "compile", "on"),
        ("augment: none", "augment", "none"),
        ("augment: off", "augment", "off"),
        ("arm:", "arm", None),
        ("reward: ~", "reward", None),
        ("out: 'null'", "out", "null"),
        ("out: 007", "out", "007"),
        ("out: yes", "out", "yes"),
        ("seed: 010", "seed", 10),
        ("seed: 0x10", "seed", 16),
        ("seed: 1_000", "seed", 1000),
        ("seed: 9007199254740993", "seed", 2**53 + 1),
        ("steps: 1e3", "steps", 1000),
        ("lr: 1e-3", "lr", 1e-3),
        ("lr: 1", "lr", 1.0),
        ("cross-attention: True", "cross_attention", True),
        ("\ufefflr: 0.5\r\nseed: 3\r\n", "seed", 3),
        ("# nothing", "seed", 0),
    ],
)
def test_a_file_s_words_and_numbers_mean_what_they_say(tmp_path, text, setting, value):
    (tmp_path / "c.yaml").write_bytes(text.encode())
    read = getattr(flags("--config", str(tmp_path / "c.yaml")), setting)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("given", "reward", "cost"),
    [
        ({}, "headroom", "flops"),
        ({"method": "optima"}, "drop", "none"),
        ({"method": "optima", "policy": "scale-free-ucb"}, "drop", "none"),
        ({"method": "optima", "reward": "headroom"}, "headroom", "flops"),
        ({"method": "optima", "reward": "kl", "reward_cost": "flops"}, "kl", "flops"),
    ],
)
def test_the_reward_is_the_method_s_unless_it_is_given(given, reward, cost):
    config = resolve(TrainConfig(**given))
    assert (config.reward, config.reward_cost) == (reward, cost)


def test_headroom_is_never_without_its_cost():
    with pytest.raises(UserError, match="leave out --reward-cost none"):
        TrainConfig(reward="headroom", reward_cost="none")


def test_too_few_rounds_for_the_first_pulls_are_told_before_work_starts():
    with pytest.raises(UserError, match="7 arms 2 times first, 14 rounds of 10 steps, but --steps"):
        resolve(TrainConfig(steps=100, method="optima"))
    assert resolve(TrainConfig(steps=140, method="optima")).steps == 140
    assert resolve(TrainConfig(steps=10)).steps == 10
    assert resolve(TrainConfig(steps=100, method="layerwise")).steps == 100
    assert resolve(TrainConfig(steps=100, method="optima", policy="random")).steps == 100


def test_the_published_algorithm_takes_its_own_options():
    """Also before the steps are known: how often each arm is pulled first is that of the scale."""
    config = resolve(flags("--method", "optima", "--init-rounds", "5"))
    assert (config.policy, config.reward, config.init_rounds) == ("thompson", "drop", 5)
    short = ("--student", "digits_student", "--steps", "500", "--round-steps", "10")
    assert resolve(flags("--method=optima", "--policy=thompson", *short)).init_rounds == 2
