"""Methods that others compare with: balanced losses, the gate by gradients, leave-one-in."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from small_run import rounds, trainer

from optima_fast.distill import Balance
from optima_fast.errors import UserError
from optima_fast.training import policies
from optima_fast.training.config import TrainConfig, resolve

COSINE = {"method": "gradient-cosine", "init_rounds": None}


def test_balanced_trains_by_the_means_of_the_steps_before(tmp_path):
    t = trainer(tmp_path, method="balanced", steps=4, log_every=1)
    by_hand = Balance(t.distiller)
    step, totals = t.engine.step.forward, []

    def watched(*given):
        losses = step(*given)
        totals.append((losses.total.item(), by_hand(losses).item()))
        by_hand.update(by_hand.terms(losses))
        return losses

    t.engine.step.forward = watched
    t.fit()
    for one, other in totals:
        assert one == pytest.approx(other, rel=1e-6)
    lines = [line for line in t.run.metrics() if "loss" in line]
    assert [line["loss"] for line in lines] == pytest.approx([total for total, _ in totals])
    assert lines[-1]["divided_by"] == pytest.approx(
        dict(zip(by_hand.names, by_hand.means().tolist(), strict=True))
    )
    assert 3.0 < lines[-1]["loss"] < 5.0 < lines[0]["loss"]  # the task and three modules, 1 each


def test_balanced_in_parts_is_balanced_of_the_whole(tmp_path):
    settings = {"method": "balanced", "steps": 4, "batch_size": 8, "kl_weight": 0.5}
    runs = [trainer(tmp_path / str(n), accumulate=n, **settings) for n in (1, 3)]
    for t in runs:
        t.fit()
    whole, parts = (t.balance.means() for t in runs)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)


def test_the_gate_takes_what_agrees_and_another_batch_each_round(tmp_path):
    t = trainer(tmp_path, steps=8, reward_examples=12, **COSINE)
    assert (t.config.policy, t.config.reward) == ("greedy", "gradient-cosine")
    seen, measure = [], t.meter.known.measure

    def watched(batch, **losses):
        seen.append(batch)
        return measure(batch, **losses)

    t.meter.known.measure = watched
    t.fit()
    lines = rounds(t)
    assert len(lines) == 4
    assert len(seen) == 5  # before the first round and after each
    loaded = [t.meter._loaded(i).batch for i in range(len(t.meter.batches))]
    for i, batch in enumerate(seen):
        assert torch.equal(batch["text"], loaded[i % len(loaded)]["text"])
    for before, line in pairwise(lines):
        cosines = before["cosines"]
        agree = [name for name, c in cosines.items() if c > 0]
        assert line["arm"] == "+".join(agree or [max(cosines, key=cosines.get)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp": True}, "gradient-cosine: --fsdp true shards the gradients that it compares: le"),
        ({"reward_cost": "flops"}, "gradient-cosine: --reward-cost flops divides cosines, of whic"),
        ({"hidden_loss": "contrastive"}, "--hidden-loss contrastive remembers every batch that it"),
        ({"reward": "kl"}, "--reward kl is for --method optima, not for --method gradient-cosine"),
        ({"policy": "random"}, "--policy random is for --method optima, not for --method gradien"),
    ],
)
def test_what_the_gate_does_not_go_with_is_told(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(method="gradient-cosine", **settings)
    TrainConfig(method="layerwise", **{k: v for k, v in settings.items() if k != "policy"})


def test_the_gate_has_no_option_of_a_bandit():
    config = resolve(TrainConfig(method="gradient-cosine", gamma=0.9))
    message = "--gamma is no option of --method gradient-cosine, which has none"
    with pytest.raises(UserError, match=message):
        policies.check_options(config)


def test_leave_one_in_tries_each_module_once_and_keeps_the_best(tmp_path):
    """As README writes it: explore, then commit."""
    t = trainer(
        tmp_path, arms="single-modules", init_rounds=1, gamma=1.0, variance_scale=0.0, steps=16
    )
    t.fit()
    lines = rounds(t)
    first = {line["arm"]: line["reward"] for line in lines[:3]}
    assert first.keys() == {"image", "text", "multimodal"}
    assert {line["arm"] for line in lines[3:]} == {max(first, key=first.get)}
    assert lines[-1]["means"] == lines[2]["means"]
