"""Recipes by name: what they set, what overrides them, that they run and go on."""

from __future__ import annotations

import pytest
import torch
from small_run import SMALL, small, stop, trainer, untimed

from optima_fast import doctor, train
from optima_fast.distill import recipes
from optima_fast.errors import UserError
from optima_fast.tasks.base import soft_bce
from optima_fast.training import checkpoints, dry_run, experiment
from optima_fast.training.config import TrainConfig, flag, resolve
from optima_fast.training.flags import parse
from optima_fast.training.run import Run

LAYERWISE = sorted(set(recipes.RECIPES) - {"minivlm"})  # which is of data, test_pseudo.py


def flags(*argv: str) -> TrainConfig:
    return TrainConfig(**parse(argv, prog="", description=""))


@pytest.mark.parametrize("name", LAYERWISE)
def test_a_recipe_sets_its_options_and_flags_override_it(name):
    config = flags("--recipe", name)
    assert config.method == "layerwise"
    for option, value in recipes.options(name).items():
        assert getattr(config, option) == value
    other = flags("--recipe", name, "--kl-weight", "7", "--method", "random")
    assert (other.kl_weight, other.method) == (7.0, "random")
    assert other.attention_weight == config.attention_weight


def test_what_a_file_says_beside_a_recipe_overrides_it_and_a_flag_takes_another(tmp_path):
    (tmp_path / "c.yaml").write_text("recipe: dide\nkl_weight: 3\ntask: nlvr2\nsteps: 50")
    file = ("--config", str(tmp_path / "c.yaml"))
    config = flags(*file)
    assert (config.kl_weight, config.prediction_weight, config.soft_labels) == (3.0, 0.0, "kl")
    config = flags(*file, "--recipe", "efficientvlm", "--prediction-weight", "0.1")
    assert (config.kl_weight, config.prediction_weight, config.steps) == (0.4, 0.1, 50)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipe", "efficentvlm"], "--recipe must be one of efficientvlm, .* got 'efficentvlm'"),
        (["--recipe", "dide", "--method", "finetune"], "--recipe dide needs a teacher"),
        (["--recipe", "distilvlm", "--method", "headroom"], "headroom is a share of variance"),
        (["--hidden-loss", "gram"], "headroom is a share .* and gram does not: take --method"),
        (["--attention-loss", "relations"], "relations and --relation-heads N go together"),
        (["--cross-both-ways", "true"], "--cross-both-ways true needs --cross-attention true"),
        (["--soft-labels", "bce", "--task", "coco"], "--soft-labels bce is for --task vqa, not"),
    ],
)
def test_wrong_flags_are_told_in_one_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        flags(*argv)
    assert "\n" not in str(caught.value)


def short(tmp_path, name, task="vqa", **settings):
    return {**recipes.settings(name, task), "recipe": name, "task": task, "steps": 4, **settings}


@pytest.mark.parametrize("name", LAYERWISE)
@pytest.mark.parametrize("task", ["snli_ve", "nlvr2", "coco"])
def test_each_runs_on_every_built_in_task(tmp_path, name, task):
    t = trainer(tmp_path, **short(tmp_path, name, task, steps=2, train_images=40))
    t.fit()
    line = t.run.metrics()[-1]
    assert line["step"] == 2
    assert all(p.isfinite().all() for p in t.student.parameters())


@pytest.mark.parametrize("name", LAYERWISE)
def test_each_goes_on_exactly(tmp_path, name):
    given = short(tmp_path, name, log_every=1)
    whole = trainer(tmp_path / "whole", **given)
    whole.fit()
    stop(trainer(tmp_path / "parts", **given), after=2)
    rest = trainer(tmp_path / "parts", **given)
    rest.resume(checkpoints.latest_checkpoint(rest.run.checkpoints))
    rest.fit()
    for one, other in ((whole.student, rest.student), (whole.distiller, rest.distiller)):
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key
    assert untimed(whole.run) == untimed(rest.run)


def test_soft_labels_reach_the_step_and_not_the_reward(tmp_path):
    t = trainer(tmp_path, **short(tmp_path, "dide"))
    t.arm = ()
    batch = t.data.train.batch(range(4))
    with torch.no_grad():
        student, teacher = t.student(batch).logits, t.distiller.teacher(batch).logits
        t.student.eval()
        torch.testing.assert_close(
            t.engine.step(0, batch, (), None).total, soft_bce(student, teacher)
        )
        kl = t.data.divergence(student, teacher, batch)
        measured = t.distiller.measure(batch, predict=t.data.loss, divergence=t.data.divergence)
    assert measured.kl == pytest.approx(float(kl))


def test_a_run_says_its_recipe_and_records_what_it_stands_for(tmp_path, capsys):
    given = {**SMALL, "steps": 1, "cache": tmp_path / "cache", "out": tmp_path / "run"}
    given = {k: v for k, v in given.items() if k not in ("method", "init_rounds")}
    given |= {"teacher_steps": 1, "train_images": 20, "recipe": "efficientvlm", "kl_weight": 0.5}
    assert train.main([f"{flag(k)}={v}" for k, v in given.items()]) == 0
    assert "efficientvlm, layerwise" in capsys.readouterr().out
    config = Run(tmp_path / "run").config()
    assert (config.recipe, config.kl_weight, config.prediction_weight) == ("efficientvlm", 0.5, 0.6)
    assert config.hidden_weight == {"image": 0.08, "text": 0.4, "multimodal": 0.2}
    rows = dict(dry_run._recipe(config, "efficientvlm"))
    assert "arXiv 2210.07795" in rows["source"]
    assert (rows["kl_weight"], rows["prediction_weight"]) == ("0.5 (recipe 0.4)", "0.6")


def test_a_recipe_is_a_name_for_settings_and_changes_nothing_itself(tmp_path):
    config = small(tmp_path, **short(tmp_path, "dide"))
    Run(config.out).begin(config)
    same = small(tmp_path, **{**short(tmp_path, "dide"), "recipe": None})
    assert experiment.place(same)[1].config() == config
    other = small(tmp_path, **short(tmp_path, "efficientvlm"))
    with pytest.raises(UserError, match="holds a run of another configuration"):
        experiment.place(other)


def test_doctor_describes_each(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_losses_agree", lambda device: True)
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    for name in recipes.RECIPES:
        assert f"recipe {name}: {recipes.get(name).what}" in shown


def test_an_option_that_no_recipe_makes_stays_the_default():
    config = resolve(flags("--recipe", "dide"))
    assert (config.hidden_loss, config.reduction) == ("mse", "sum")
