"""A batch in parts has the losses and the gradients of the whole."""

from __future__ import annotations

import pytest
import torch
from small_run import QUIET, small, trainer

from optima_fast.distill.shares import Extent, Shares
from optima_fast.errors import UserError
from optima_fast.training import experiment
from optima_fast.training.step import added

EVERY_TERM = {"method": "layerwise", "kl_weight": 0.5, "cross_attention": True}


def exact(tmp_path, **settings):
    """A trainer in float64, and its first batch whole."""
    t = trainer(tmp_path, batch_size=7, **settings)
    for module in (t.student, t.engine.step, *([t.distiller.teacher] if t.distiller else [])):
        module.double()
    return t


def batch_of(t, *part):
    batch = t.data.train.batch(t.sampler.at(0, *part))
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def losses_and_gradients(t, batches):
    held = [t.engine.step.shares_of(batch) for batch in batches]
    whole = [sum(column) for column in zip(*(x.numbers() for x in held), strict=True)]
    shares = [x.of(whole) if len(held) > 1 else None for x in held]
    given = zip(batches, shares, strict=True)
    done = [t.engine.backward(0, b, t.arm, s, last=True, under=t._autocast()) for b, s in given]
    gradients = {n: p.grad for n, p in t.engine.step.named_parameters() if p.grad is not None}
    for p in t.engine.step.parameters():
        p.grad = None
    return added(done), gradients


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("vqa", {}),
        ("vqa", {"attention_loss": "probs", "hidden_loss": "smooth-l1"}),
        ("vqa", {"soft_labels": "bce"}),
        ("vqa", {"attention_loss": "relations", "relation_heads": 2, "cross_attention": False}),
        ("vqa", {"hidden_weight": {"image": [0, 1], "text": 2, "multimodal": 3}}),
        ("coco", {"attention_loss": "kl-each", "hidden_loss": "cosine"}),
        ("coco", {"attention_loss": "kl", "cross_both_ways": True}),
        ("coco", {"attention_loss": "scores-auto", "hidden_loss": "gram"}),
        ("nlvr2", {"attention_loss": "probs", "cross_both_ways": True}),
        ("snli_ve", {"method": "fixed", "arm": "text+multimodal", "reduction": "mean"}),
        ("snli_ve", {"method": "finetune", "cell_stage": 0.5}),
        ("coco", {"method": "finetune"}),
    ],
)
def test_parts_add_up_to_the_whole(tmp_path, task, settings):
    given = {"kl_weight": None, "cross_attention": False} if "cell_stage" in settings else {}
    t = exact(tmp_path, task=task, **{**EVERY_TERM, **given, **settings})
    batches = [batch_of(t, part, 3) for part in range(3)]
    assert sum(len(b["text"]) for b in batches) == len(batch_of(t)["text"])
    whole, gradients = losses_and_gradients(t, [batch_of(t)])
    parts, summed = losses_and_gradients(t, batches)
    for name, value in whole._asdict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(parts, name), value, rtol=1e-6, atol=1e-7)
    assert gradients.keys() == summed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


def test_an_extent_counts_what_losses_are_means_over():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert Extent.of(mask) == Extent(items=2, tokens=4, squares=10, seen=7)
    one, other = (Shares(n, 2 * n, {"text": Extent(n, n, n, n)}) for n in (1, 3))
    assert one.of([4, 8, 4, 4, 4, 4]) == Shares(0.25, 0.25, {"text": Extent(*[0.25] * 4)})
    assert other.of([4, 8, 4, 4, 4, 0]).modules["text"] == Extent(0.75, 0.75, 0.75, 0.0)


def test_a_run_in_parts_chooses_the_same_arms(tmp_path):
    runs = [
        trainer(tmp_path / str(n), accumulate=n, batch_size=8, reward_examples=8, seed=3)
        for n in (1, 3)
    ]
    for t in runs:
        t.fit()
    whole, parts = (t.run.metrics() for t in runs)
    assert [x.get("arm") for x in whole] == [x.get("arm") for x in parts]
    for one, other in zip(whole, parts, strict=True):
        if "loss" in one:
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
            assert other["hidden"] == pytest.approx(one["hidden"], rel=1e-3)


def test_a_run_stopped_with_parts_goes_on_without(tmp_path):
    settings = {"steps": 6, "checkpoint_every": 3, "method": "kd", "accumulate": 2}
    t = trainer(tmp_path, **settings)
    t.fit()
    again = trainer(tmp_path, **{**settings, "accumulate": 1})
    again.resume(t.run.checkpoints / "step-00000003.pt")
    again.fit()
    for name, value in t.student.state_dict().items():
        if not name.endswith("kv.bias") and not name.endswith("qkv.bias"):  # no true gradient
            torch.testing.assert_close(again.student.state_dict()[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 5}, "--batch-size 4 cannot be in 5 parts, of 1 processes and --accumul"),
        ({"accumulate": 0}, "--accumulate must be positive and finite, got 0"),
        (
            {"accumulate": 2, "hidden_loss": "contrastive", "method": "layerwise"},
            "--hidden-loss contrastive learns from the tokens of all steps before, which parts of",
        ),
        (
            {"accumulate": 2, "hidden_loss": "normalized-mse", "method": "layerwise"},
            "--hidden-loss normalized-mse divides by the mean square of a whole batch",
        ),
        ({"accumulate": 2, "hidden_scale": "variance"}, "--hidden-scale variance divides by the v"),
        (
            {
                "accumulate": 2,
                "attention_loss": "relations",
                "relation_heads": 2,
                "cross_attention": True,
            },
            "--attention-loss relations with --cross-attention true is of texts and of images",
        ),
    ],
)
def test_what_parts_cannot_do_is_told_before_any_work(tmp_path, settings, message):
    if "init_rounds" not in settings and settings.get("method", "optima") != "optima":
        settings = {**settings, "init_rounds": None}
    with pytest.raises(UserError, match=message):
        experiment.run(small(tmp_path, **settings), QUIET)
    assert not (tmp_path / "run").exists()
