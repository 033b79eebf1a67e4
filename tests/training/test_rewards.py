"""Rewards in a run: what they are measured on, what they cost, what is written down."""

from __future__ import annotations

import dataclasses
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from small_run import QUIET, rounds, small, trainer

from optima_fast.distill import arm_name, arm_space
from optima_fast.errors import UserError
from optima_fast.models import MODULES
from optima_fast.tasks import Split
from optima_fast.tasks.split import ArrayImages
from optima_fast.training import cost, experiment
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.cost import arm_costs
from optima_fast.training.rewards import reward_examples, training_sampler
from optima_fast.training.sampler import Sampler


def test_the_reward_of_the_paper_is_that_of_its_first_version_to_the_bit(tmp_path):
    """Measured by hand, as before there was a choice: float32 sums, batches by size, Eq. 6."""
    t = trainer(tmp_path, batch_size=3, reward_examples=20, steps=7, round_steps=1)
    assert [len(b) for b in t.meter.batches] == [12, 8]
    measured = []

    def by_hand() -> dict[str, float]:
        total = dict.fromkeys(("kl", "hidden", "attention"), 0.0)
        t.student.eval()
        for part in t.meter.batches:
            batch = t.data.train.batch(part)
            with torch.no_grad():
                step = t.distiller(batch, MODULES, predict=t.data.loss)
                theirs = t.distiller.teacher(batch).logits
                kl = t.data.divergence(t.student(batch).logits, theirs, batch)
            terms = torch.stack([x.double() for x in (kl, step.hidden.sum(), step.attention.sum())])
            for key, value in zip(total, terms.tolist(), strict=True):
                total[key] += value * len(part) / 20
        return total

    measure = t._measure
    t._measure = lambda: measured.append(by_hand()) or measure()
    t.fit()
    lines = rounds(t)
    assert len(measured) == len(lines) + 1
    for line, (old, new) in zip(lines, pairwise(measured), strict=True):
        drops = {k: min(1.0, max(0.0, (old[k] - new[k]) / old[k])) for k in old}
        assert line["drops"] == drops
        assert line["reward"] == sum(drops.values()) / 3
        assert {k: line["losses"][k] for k in new} == new
    assert len({line["reward"] for line in lines}) > 3


def test_a_round_s_line_holds_all_that_it_was_decided_on(tmp_path):
    t = trainer(tmp_path, steps=30, round_steps=2, arms="layer-groups:2", batch_size=2)
    t.fit()
    lines = rounds(t)
    assert [line["round"] for line in lines] == list(range(1, 16))
    names = [arm_name(arm) for arm in arm_space("layer-groups:2", t.student.layer_counts).arms]
    for line in lines:
        assert {
            "step", "round", "arm", "choice", "reward", "drops", "cost", "losses", "layers",
            "means", "counts", "spreads", "seconds",
        } == set(line)  # fmt: skip
        assert line["arm"] == names[line["choice"]]
        assert line["step"] == 2 * line["round"]
        assert len(line["means"]) == len(line["counts"]) == 15
        assert sum(line["counts"]) == line["round"]
        assert line["cost"] == 1.0
        assert {k: list(v) for k, v in line["layers"].items()} == {
            "hidden": list(MODULES),
            "attention": list(MODULES),
            "unexplained": list(MODULES),
        }
        for term, layers in line["layers"].items():
            assert list(map(len, layers.values())) == [2, 1, 1]
            if term == "unexplained":
                continue
            total = sum(chain(*layers.values()))
            assert total == pytest.approx(line["losses"][term], rel=1e-5)
    spent = t.seconds["distill"] + t.seconds["reward"]
    assert sum(line["seconds"] for line in lines) == pytest.approx(spent, rel=0.02)
    assert min(line["seconds"] for line in lines) > 0.0


def _drop(old: float, new: float) -> float:
    return max(-1.0, (old - new) / old)


@pytest.mark.parametrize(
    ("reward", "clip"),
    [("normalised", False), ("hidden,prediction", True)],
)
def test_each_reward_follows_from_the_losses_in_the_log(tmp_path, reward, clip):
    t = trainer(
        tmp_path, steps=8, round_steps=1, lr=0.03, reward=reward, reward_clip=clip,
        reward_split="held-out",
    )  # fmt: skip
    t.fit()
    lines = rounds(t)
    for old, new in pairwise(lines):
        terms = {
            term: _drop(value, new["losses"][term])
            for term, value in old["losses"].items()
            if term != "teacher"
        }
        if reward == "normalised":
            for term in ("hidden", "attention"):
                modules = []
                for name in MODULES:
                    a, b = old["layers"][term][name], new["layers"][term][name]
                    drops = [_drop(x, y) for x, y in zip(a, b, strict=True)]
                    modules.append(sum(drops) / len(drops))
                terms[term] = sum(modules) / 3
        chosen = "kl,hidden,attention" if reward == "normalised" else reward
        kept = {k: terms[k] for k in chosen.split(",")}
        if clip:
            kept = {k: max(0.0, v) for k, v in kept.items()}
        assert new["drops"] == pytest.approx(kept, abs=1e-9)
        assert new["reward"] == pytest.approx(sum(kept.values()) / len(kept), abs=1e-9)
    below = [d for line in lines for d in line["drops"].values() if d < 0]
    assert bool(below) != clip


def test_a_reward_per_cost_is_divided_by_the_arm_s(tmp_path):
    t = trainer(tmp_path, reward_cost="flops", steps=7, round_steps=1)
    t.fit()
    costs = dict(zip(map(arm_name, t.space.arms), t.meter.costs, strict=True))
    for line in rounds(t):
        plain = sum(line["drops"].values()) / 3
        assert line["cost"] == costs[line["arm"]]
        assert line["reward"] == pytest.approx(plain / costs[line["arm"]])
    assert len(set(costs.values())) == 7
    assert t.reward_summary()["cost"] == "flops"


def shapes(tmp_path, **settings: Any):
    config = small(tmp_path, **settings)
    data = experiment.load_data(config)
    models = [
        experiment.new_model(name, data).coca.config for name in (config.student, config.teacher)
    ]
    return data, models, data.train.batch(range(8))


def test_costs_are_the_operations_that_arms_need(tmp_path):
    data, models, batch = shapes(tmp_path)
    space = arm_space("modules", models[0].layer_counts)
    before = torch.get_rng_state()
    costs = dict(zip(space.arms, arm_costs(*models, data, batch, space.arms), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert costs[MODULES] == max(costs.values()) == 1.0
    # the student always runs; the multimodal module needs all of the teacher
    image, text, multimodal = (costs[(name,)] for name in MODULES)
    assert 0.3 < min(image, text) < max(image, text) < 0.8 < multimodal < 1.0
    assert max(image, text) < costs[("image", "text")] < multimodal
    deeper = [models[0], dataclasses.replace(models[1], image_layers=8)]
    image_deeper = arm_costs(*deeper, data, batch, [("image",), ("text",)])
    assert image_deeper[0] > image
    assert image_deeper[1] < text
    # with a KL term the whole teacher runs whatever the arm
    settings = {"attention_loss": "probs", "cross_attention": True, "hidden_scale": "variance"}
    with_kl = arm_costs(*models, data, batch, space.arms, kl_weight=1.0, **settings)
    assert with_kl[-1] == 1.0
    assert 0.9 < min(with_kl) < 1.0


def test_the_cost_of_an_image_arm_by_hand(tmp_path):
    """The teacher's image encoder and the losses, from the sizes of its matrix products."""
    data, models, batch = shapes(tmp_path)
    student, teacher = models
    bare, image, both = arm_costs(*models, data, batch, [("text",), ("image",), ("image", "text")])
    images, tokens, width = len(batch["images"]), teacher.patches, teacher.image_width
    rows = images * tokens
    layer = 2 * rows * 12 * width**2 + 4 * images * tokens**2 * width
    patches = 2 * rows * teacher.patch_size**2 * width
    hidden = 3 * 2 * rows * student.image_width * width
    scores = 2 * images * tokens**2 * (3 * student.image_width + width)
    expected = teacher.image_layers * layer + patches + 2 * (hidden + scores)
    text_rows, length = batch["text"].numel(), data.text_length
    text_layer = 2 * text_rows * 12 * width**2 + 4 * len(batch["text"]) * length**2 * width
    text_hidden = 3 * 2 * text_rows * student.text_width * width
    text_scores = 2 * len(batch["text"]) * length**2 * (3 * student.text_width + width)
    text = teacher.text_layers * text_layer + text_hidden + text_scores
    # costs are sums over a common whole: student s, image i, text t
    assert (both - bare) / (both - image) == pytest.approx(expected / text)


def test_attention_on_a_cpu_is_counted_forward_and_backward():
    q = torch.ones(2, 3, 5, 8, requires_grad=True)
    k = torch.ones(2, 3, 7, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    product = 2 * 2 * 3 * 5 * 7 * 8
    assert cost._operations(lambda: attend(q.detach(), k, k)) == 2 * product
    assert cost._operations(lambda: attend(q, k, k).sum().backward()) == 7 * product


def test_held_out_examples_and_their_images_are_never_trained_on(tmp_path):
    config = small(tmp_path, reward_split="held-out", reward_examples=24)
    data = experiment.load_data(config)
    held = set(reward_examples(config, data.train).tolist())
    assert len(held) == 24
    # not those of a first step that draws as many
    first = Sampler(data.train, 24 // data.train.group, config.seed).at(0)
    assert held != set(first.tolist())
    sampler = training_sampler(config, data.train)
    seen = set(torch.cat([sampler.at(s) for s in range(200)]).tolist())
    assert not seen & held
    assert len(seen | held) == len(data.train)
    # by default they are trained on like any other, and drawn all the same
    plain = dataclasses.replace(config, reward_split="train")
    assert set(reward_examples(plain, data.train).tolist()) == held
    everything = training_sampler(plain, data.train)
    assert held < set(torch.cat([everything.at(s) for s in range(200)]).tolist())


@pytest.mark.parametrize(("group", "per_example"), [(1, 1), (1, 2), (2, 1)])
def test_other_examples_of_a_held_out_image_are_kept_out_too(tmp_path, group, per_example):
    """As in VQA and NLVR2 proper, where one image has questions all over the file."""
    n, images = 60, 10
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(images, (n, per_example), generator=generator)
    if group == 2:
        index = index.view(-1, 2, 1)[:, :1].expand(-1, 2, 1).reshape(n, 1)
    split = Split(
        ArrayImages(torch.zeros(images, 1, 2, 2, dtype=torch.uint8)),
        torch.ones(n, 3, dtype=torch.int64),
        index,
        torch.zeros(n, dtype=torch.int64),
        group=group,
    )
    config = dataclasses.replace(
        small(tmp_path), reward_split="held-out", reward_examples=2, batch_size=1
    )
    held = reward_examples(config, split)
    sampler = training_sampler(config, split)
    seen = torch.cat([sampler.at(s) for s in range(500)]).unique()
    assert not torch.isin(index[seen], index[held]).any()
    apart = ~torch.isin(index, index[held]).any(1)
    assert seen.tolist() == apart.nonzero()[:, 0].tolist()
    assert len(seen) + len(held) < n


def test_too_few_images_left_are_told_before_any_work(tmp_path):
    with pytest.raises(UserError, match="--batch-size 4 is more than the 2 images .*not held out"):
        experiment.run(small(tmp_path, reward_split="held-out", reward_examples=4 * 58), QUIET)
    assert not list(tmp_path.iterdir())


def test_the_summary_says_what_the_rewards_were_measured_on(tmp_path):
    t = trainer(tmp_path, reward="kl", reward_clip=False, reward_split="held-out", batch_size=3)
    t.seconds |= {"distill": 6.0, "reward": 2.0, "eval": 2.0}
    assert t.reward_summary() == {
        "name": "kl", "clip": False, "cost": "none", "split": "held-out", "examples": 16,
        "batches": 2, "seconds": 2.0, "share": 0.2,
    }  # fmt: skip
    assert trainer(tmp_path / "b", method="random").reward_summary() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "normalized"}, "did you mean 'normalised'"),
        ({"reward_cost": "seconds"}, "--reward-cost must be one of none, flops, got 'seconds'"),
        ({"reward_split": "test"}, "--reward-split must be one of train, held-out, got 'test'"),
        ({"reward_split": "validation"}, "--reward-split must be one of train, held-out"),
        (
            {"arms": "layers"},
            "--arms must be one of modules, single-modules, layer-groups:2, layer-gro",
        ),
    ],
)
def test_unknown_kinds_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        resolve(TrainConfig(**settings))
