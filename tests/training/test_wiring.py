"""Every setting reaches what it is for; every number stands where it is said to."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from small_run import QUIET, rounds, small, trainer
from torch import nn

from optima_fast import bandit
from optima_fast.distill.matching import map_layers
from optima_fast.training import experiment, overview, teachers
from optima_fast.training.cells import CellStage
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display
from optima_fast.training.run import Run
from optima_fast.training.trainer import Trainer


def test_settings_reach_distiller_optimizer_and_policy(tmp_path, monkeypatch):
    norms = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda p, most: norms.append(most) or clip(p, most)
    )
    t = trainer(
        tmp_path, hidden_weight=0.5, attention_weight=0.25, kl_weight=0.125, reduction="mean",
        attention_loss="kl", hidden_scale="variance", cross_attention=True, dropout=0.3,
        gamma=0.7, variance_scale=0.2, seed=9, reward="hidden,kl", weight_decay=0.01, clip=0.6,
        lr=0.01, head_lr=0.02, steps=20, warmup_steps=2, batch_size=5, reward_examples=24,
    )  # fmt: skip
    d = t.distiller
    assert (d.hidden.weights, d.attention.weights, d.kl_weight) == (0.5, 0.25, 0.125)
    assert (d.attention.loss.loss, d.hidden.scale, d.hidden.reduction) == ("kl", "variance", "mean")
    assert d.attention.cross
    state = t.policy.state_dict()
    assert [state[k] for k in ("gamma", "init_rounds", "variance_scale", "seed")] == [
        0.7,
        1,
        0.2,
        9,
    ]
    assert t.student.head.dropout.p == 0.3
    assert {g["weight_decay"] for g in t.optimizer.param_groups} == {0.01}
    head, rest = set(map(id, t.student.head.parameters())), set(map(id, t.student.parameters()))
    rest = (rest | set(map(id, d.parameters()))) - head
    groups = {g["peak"]: set(map(id, g["params"])) for g in t.optimizer.param_groups}
    assert groups == {0.01: rest, 0.02: head}
    assert not any(id(p) in rest | head for p in d.teacher.parameters())
    assert sum(map(len, t.meter.batches)) == t.meter.examples == 24
    t.arm = ("image",)
    t._train_step()
    assert [g["lr"] for g in t.optimizer.param_groups] == [0.005, 0.01]
    assert norms == [0.6]


def test_the_layer_mapping_reaches_the_distiller(tmp_path):
    def mapped(**settings) -> dict[str, list[int]]:
        pairs = trainer(tmp_path, method="layerwise", **settings).distiller.pairs
        return {name: [pair.teacher for pair in of_module] for name, of_module in pairs.items()}

    assert mapped() == {"image": [1, 3], "text": [1], "multimodal": [1]}
    assert mapped(layer_mapping="reversed") == {"image": [3, 1], "text": [1], "multimodal": [1]}
    drawn = [mapped(layer_mapping="random", seed=seed) for seed in range(2)]
    assert drawn[0] != drawn[1]
    assert drawn[0] == map_layers(
        "random",
        {"image": 2, "text": 1, "multimodal": 1},
        {"image": 4, "text": 2, "multimodal": 2},
    )


def test_a_teacher_is_trained_by_its_own_settings():
    config = resolve(
        TrainConfig(
            teacher_steps=7, teacher_lr=0.1, teacher_head_lr=0.2, teacher_batch_size=3, seed=8,
            teacher_seed=4, data_seed=5, train_images=70, weight_decay=0.3, clip=0.4, dropout=0.2,
        )
    )  # fmt: skip
    own = resolve(teachers.teacher_config(config))
    assert (own.method, own.student, own.student_init) == ("finetune", "digits_teacher", None)
    assert (own.steps, own.lr, own.head_lr, own.batch_size) == (7, 0.1, 0.2, 3)
    assert (own.seed, own.data_seed, own.train_images) == (4, 5, 70)
    assert (own.weight_decay, own.clip, own.cell_stage) == (0.3, 0.4, 0.3)


def test_the_log_is_that_of_a_bandit_run_by_hand(tmp_path):
    t = trainer(tmp_path, steps=18, round_steps=1, gamma=0.9, seed=6, eval_every=5)
    t.fit()
    policy = bandit.make("thompson", 7, seed=6, gamma=0.9, init_rounds=1)
    names = list(t.pulls)
    for line in rounds(t):
        arm = policy.select()
        assert line["arm"] == names[arm]
        policy.update(arm, line["reward"])
        assert (line["means"], line["counts"]) == (policy.mean, policy.count)
    assert any(line["reward"] > 0 for line in rounds(t))
    assert [x["step"] for x in t.run.metrics() if "validation" in x] == [5, 10, 15]


def test_the_reward_is_measured_on_one_batch_without_dropout(tmp_path):
    t = trainer(tmp_path, dropout=0.5)
    t.student.train()
    first = t._measure()
    assert t._measure() == first
    assert t.student.training
    modes = []
    t.student.register_forward_pre_hook(lambda *_: modes.append(t.student.training))
    t.student.eval()
    t.arm = ("text",)
    t._train_step()
    t._measure()
    assert modes[0] is True
    assert set(modes[1:]) == {False}


def test_precision_on_a_cpu_is_float32_unless_asked_for(tmp_path):
    def seen(**settings) -> torch.dtype:
        t = trainer(tmp_path, method="finetune", **settings)
        loss, dtypes = t.data.loss, []
        object.__setattr__(t.data, "loss", lambda x, b: dtypes.append(x.dtype) or loss(x, b))
        t._train_step()
        return dtypes[0]

    assert seen() == torch.float32
    assert seen(precision="bf16", out=str(tmp_path / "b")) == torch.bfloat16


def test_the_seed_is_that_of_the_student_s_start_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda self: None)
    starts = []
    for name, seed in (("a", 0), ("b", 1), ("c", 1)):
        config = small(tmp_path, method="finetune", seed=seed, out=str(tmp_path / name))
        run, _ = experiment.run(config, QUIET)
        starts.append(run.weights_path.read_bytes())
    assert starts[0] != starts[1] == starts[2]


def test_the_first_stage_reads_the_tokens_of_each_cell(tmp_path):
    config = small(tmp_path, method="finetune", cell_stage=0.5, steps=10)
    data = experiment.load_data(config)
    student = experiment.new_model(config.student, data)
    stage = CellStage(config, data, student)
    assert [stage.active(s) for s in (0, 4, 5, 9)] == [True, True, False, False]
    # a 4 x 4 grid of tokens that hold the number of their 2 x 2 cell
    rows, cols = torch.arange(16) // 4, torch.arange(16) % 4
    cell = (rows // 2) * 2 + cols // 2
    hidden = cell.float()[None, :, None].expand(3, 16, 64)
    record = SimpleNamespace(taps={"image": [SimpleNamespace(hidden=hidden)]})
    seen = []
    stage.norm, head = nn.Identity(), stage.head
    stage.head = nn.Identity()
    stage.head.forward = lambda x: seen.append(x) or head(x)
    fake = SimpleNamespace(record=lambda batch, taps: record)
    cells = torch.zeros(3, 4, dtype=torch.int64)
    loss = stage(fake, {"cells": cells})
    assert torch.equal(seen[0], torch.arange(4.0)[None, :, None].expand(3, 4, 4 * 64))
    expected = nn.functional.cross_entropy(head(seen[0]).flatten(0, 1), cells.flatten())
    torch.testing.assert_close(loss, expected)


def test_each_number_of_the_overview_stands_in_its_row(tmp_path, capsys):
    run = Run(tmp_path)
    run.begin(small(tmp_path))
    summary = {
        "metric_name": "accuracy", "teacher_metric": 0.1, "student_metric_before": 0.2,
        "student_metric": 0.3, "majority_metric": 0.4, "text_only_metric": 0.5, "task": "vqa",
        "data": "digits", "method": "optima", "arm": None, "policy": "thompson",
        "teacher_params": 1234567, "student_params": 7654321, "arms": {"image": 1, "text": 3},
        "seconds": {"teacher": 61.0, "distill": 2.0}, "seed": 0,
    }  # fmt: skip
    overview.show(run, summary, Display())
    rows = capsys.readouterr().out.splitlines()
    for label, value in {
        "teacher (digits_teacher)": "0.1000",
        "student (digits_student) before": "0.2000",
        "student after": "0.3000",
        "majority baseline": "0.4000",
        "text-only baseline": "0.5000",
        "teacher parameters": "1,234,567",
        "student parameters": "7,654,321",
        "arms (4 rounds)": "text 75%, image 25%",
        "seconds": "teacher 61, distill 2",
    }.items():
        assert any(label in row and value in row for row in rows), label
