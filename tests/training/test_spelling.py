"""The choice of modules in its old spelling: commands that are told, run folders that go on."""

from __future__ import annotations

import json

import pytest
from small_run import small

from optima_fast import report
from optima_fast.errors import UserError
from optima_fast.training import checkpoints, experiment
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display
from optima_fast.training.flags import parse
from optima_fast.training.overview import method_name
from optima_fast.training.run import Run
from optima_fast.training.spelling import modern, modern_summary

QUIET = Display(quiet=True)


@pytest.mark.parametrize(
    ("old", "new", "choice"),
    [
        ("--policy paper", "--method optima", ("optima", "thompson", "drop")),
        ("--method optima --policy paper", "--method optima", ("optima", "thompson", "drop")),
        ("--policy paper --reward paper", "--method optima", ("optima", "thompson", "drop")),
        ("--policy greedy", "--method headroom", ("headroom", "greedy", "headroom")),
        ("--reward headroom", "--method headroom", ("headroom", "greedy", "headroom")),
        (
            "--method optima --policy greedy",
            "--method headroom",
            ("headroom", "greedy", "headroom"),
        ),
        (
            "--policy structured-ucb",
            "--method optima --policy structured-ucb",
            ("optima", "structured-ucb", "drop"),
        ),
        (
            "--policy paper --reward headroom",
            "--method optima --reward headroom",
            ("optima", "thompson", "headroom"),
        ),
        (
            "--reward kl",
            "--method optima --policy greedy --reward kl",
            ("optima", "greedy", "kl"),
        ),
    ],
)
def test_an_old_spelling_is_taken_and_told_in_a_line(capsys, old, new, choice):
    given = parse(old.split(), prog="train", description="")
    assert capsys.readouterr().err == (
        f"warning: {old} is an old spelling: write {new}; the next release refuses it\n"
    )
    config = resolve(TrainConfig(**given))
    assert (config.method, config.policy, config.reward) == choice
    again = parse(new.split(), prog="train", description="")
    assert resolve(TrainConfig(**again)) == config
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "choice"),
    [
        ([], ("optima", "thompson", "drop", 0.9)),
        (["--policy", "paper"], ("optima", "thompson", "drop", 0.9)),
        (["--policy", "greedy"], ("headroom", "greedy", "headroom", None)),
        (["--method", "headroom"], ("headroom", "greedy", "headroom", None)),
        (["--method", "layerwise"], ("layerwise", "greedy", "headroom", None)),
        (["--policy", "scale-free-ucb"], ("optima", "scale-free-ucb", "drop", None)),
    ],
)
def test_flags_go_over_a_file_in_the_old_spelling(tmp_path, flags, choice):
    file = tmp_path / "old.yaml"
    file.write_text("method: optima\npolicy: paper\nreward: paper\ngamma: 0.9\nlr: 0.5\n")
    config = resolve(TrainConfig(**parse(["--config", str(file), *flags], prog="", description="")))
    assert (config.method, config.policy, config.reward, config.gamma) == choice
    assert config.lr == 0.5


@pytest.mark.parametrize("flags", [["--policy", "papr"], ["--reward", "hiden"]])
def test_what_is_wrong_is_told_without_another_spelling_of_it(capsys, flags):
    with pytest.raises(UserError, match="'papr'|did you mean 'hidden'"):
        parse(flags, prog="", description="")
    assert capsys.readouterr().err == ""


def test_settings_that_are_spelled_as_now_stay(capsys):
    for method in ("headroom", "optima", "layerwise", "random"):
        settings = vars(resolve(TrainConfig(method=method)))
        assert modern(settings) == settings
    flags = ["--method", "optima", "--policy", "greedy", "--reward", "kl"]
    given = parse(flags, prog="", description="")
    assert (given["method"], given["policy"]) == ("optima", "greedy")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--policy must be one of thompson, .*, got 'paper'"):
        TrainConfig(method="optima", policy="paper")


def aged(run: Run) -> None:
    """The folder as a release before this one left it, stopped after its first checkpoint."""
    text = run.config_path.read_text()
    for name in ("policy: thompson", "reward: drop"):
        assert text.count(name) == 1
        text = text.replace(name, f"{name.partition(':')[0]}: paper")
    run.config_path.write_text(text)
    for path in (run.summary_path, run.weights_path, run.model_path):
        path.unlink()
    first, last = sorted(run.checkpoints.iterdir())
    last.unlink()
    state = checkpoints.load_checkpoint(first)
    state["config"] |= {"policy": "paper", "reward": "paper"}
    state["bandit"]["policy"] = "paper"
    checkpoints.save_checkpoint(run.checkpoints, state["step"], state)


def test_a_run_folder_in_the_old_spelling_goes_on_and_reports_as_before(tmp_path, capsys):
    few = {"steps": 16, "checkpoint_every": 9, "reward_examples": 4, "batch_size": 2}
    config = small(tmp_path, **few, train_images=20, eval_every=99)
    run, summary = experiment.run(config, QUIET)
    weights = run.weights_path.read_bytes()
    aged(run)
    again, resumed = experiment.run(experiment.settings({"resume": str(run.folder)}), QUIET)
    assert again.weights_path.read_bytes() == weights
    assert resumed["arms"] == summary["arms"]

    old = {**summary, "policy": "paper", "reward": {**summary["reward"], "name": "paper"}}
    run.summary_path.write_text(json.dumps(old))
    assert report.main([str(run.folder)]) == 0
    captured = capsys.readouterr()
    assert " optima " in captured.out
    assert "paper" not in captured.out + captured.err
    assert "<h1>vqa: optima, seed 0</h1>" in (run.folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("method", "policy", "reward", "name"),
    [
        ("optima", "greedy", "headroom", "headroom"),
        ("optima", "paper", "paper", "optima"),
        ("optima", "paper", None, "optima"),
        ("optima", "paper", "kl", "optima (reward kl)"),
        ("optima", "exp3s", "paper", "optima (policy exp3s)"),
        ("optima", "greedy", "kl,hidden", "optima (policy greedy, reward kl,hidden)"),
        ("headroom", "greedy", "headroom", "headroom"),
        ("layerwise", None, None, "layerwise"),
    ],
)
def test_a_report_names_the_method_by_what_it_is(method, policy, reward, name):
    summary = {"method": method, "arm": None, "policy": policy}
    summary["reward"] = reward and {"name": reward, "clip": True}
    assert method_name(modern_summary(summary)) == name
    assert method_name({**summary, "method": "fixed", "arm": "text"}) == "fixed (text)"


def test_a_setting_under_its_old_name(tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text("attention_target: probs\n")
    assert parse(["--config", str(path)], prog="train", description="") == {
        "attention_loss": "probs"
    }
    for old in (["--attention-target", "probs"], ["--attention-target=probs"]):
        assert parse(old, prog="train", description="") == {"attention_loss": "probs"}
        assert "write --attention-loss" in capsys.readouterr().err
    assert modern({"attention_target": "probs"}) == {"attention_loss": "probs"}
