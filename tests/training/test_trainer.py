"""The loop: what moves, what is chosen, what stops it, how it goes on."""

from __future__ import annotations

import signal
from itertools import pairwise

import pytest
import torch
from small_run import NothingIsRead, rounds, trainer, untimed

from optima_fast.distill import Measurement
from optima_fast.errors import UserError
from optima_fast.training import checkpoints
from optima_fast.training.cost import LiveBytes
from optima_fast.training.interrupts import Interrupted
from optima_fast.training.trainer import Trainer


def test_the_student_learns_and_the_teacher_does_not_move(tmp_path):
    t = trainer(tmp_path, method="layerwise", steps=30, lr=0.01, log_every=1)
    teacher = t.distiller.teacher
    before = {n: p.clone() for n, p in teacher.state_dict().items()}
    batch = t.data.train.batch(range(16))

    def measure() -> Measurement:
        return t.distiller.measure(batch, predict=t.data.loss, divergence=t.data.divergence)

    first = measure()
    t.fit()
    last = measure()
    assert last.hidden < 0.5 * first.hidden
    assert last.attention < first.attention
    assert all(torch.equal(before[n], p) for n, p in teacher.state_dict().items())
    losses = [line["prediction"] for line in t.run.metrics() if "prediction" in line]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(p.grad is None for p in t.student.parameters())  # a step's own, not all so far


def test_optima_pulls_each_arm_t0_times_then_follows_its_bandit(tmp_path):
    t = trainer(tmp_path, steps=17, round_steps=1, init_rounds=2)
    t.fit()
    lines = rounds(t)
    assert len(lines) == 17
    first = [line["arm"] for line in lines[:14]]
    assert sorted(first) == sorted(2 * list(t.pulls))
    assert first[:7] != list(t.pulls)  # shuffled, not in order
    assert t.policy.round == 17
    assert sum(t.pulls.values()) == 17
    for line in lines:
        drops = line["drops"]
        assert line["reward"] == pytest.approx(sum(drops.values()) / 3)
        assert all(0.0 <= d <= 1.0 for d in drops.values())
    for before, after in pairwise(lines):
        old, new = before["losses"]["hidden"], after["losses"]["hidden"]
        assert after["drops"]["hidden"] == pytest.approx(max(0.0, (old - new) / old))


@pytest.mark.parametrize(
    ("method", "arm", "expected"),
    [
        ("layerwise", None, {"image+text+multimodal"}),
        ("balanced", None, {"image+text+multimodal"}),
        ("fixed", "text+image", {"image+text"}),
        ("kd", None, set()),
        ("finetune", None, set()),
    ],
)
def test_methods_distil_what_they_say(tmp_path, method, arm, expected):
    t = trainer(tmp_path, method=method, arm=arm, steps=4)
    t.fit()
    assert {name for name, pulls in t.pulls.items() if pulls} == expected
    line = t.run.metrics()[0]
    assert ("kl" in line) == (method == "kd")
    assert set(line.get("hidden", {})) == set("+".join(expected).split("+") if expected else ())
    assert (t.distiller is None) == (method == "finetune")


def test_random_takes_different_arms_and_measures_no_reward(tmp_path):
    t = trainer(tmp_path, method="random", steps=14, round_steps=1)
    t.fit()
    assert sum(p > 0 for p in t.pulls.values()) > 4
    assert not rounds(t)
    assert t.seconds["reward"] == 0.0


@pytest.mark.parametrize(
    ("method", "steps", "stops", "more"),
    [
        ("optima", 17, (5, 10), {}),  # in a round and between two; the last round is cut short
        ("gradient-cosine", 9, (3, 4), {"init_rounds": None, "batch_size": 8}),
        ("balanced", 6, (3,), {"kl_weight": 0.5}),
        ("kd", 6, (3,), {}),
        ("finetune", 6, (2,), {"cell_stage": 0.8}),
    ],
)
def test_a_stopped_run_goes_on_exactly(tmp_path, monkeypatch, method, steps, stops, more):
    settings = {"method": method, "steps": steps, "dropout": 0.1, "checkpoint_every": 99, **more}
    settings |= {"log_every": 1, "eval_every": 4}
    whole = trainer(tmp_path / "whole", **settings)
    whole.fit()

    t = trainer(tmp_path / "parts", **settings)
    for stop in stops:
        step = t._train_step

        def stopping(t=t, step=step, stop=stop):
            t._stop.asked = t.step + 1 == stop
            return step()

        monkeypatch.setattr(t, "_train_step", stopping)
        with pytest.raises(Interrupted, match=f"after step {stop} of {steps}"):
            t.fit()
        t.run.append_metrics({"step": 999})  # as if it had died after a later line
        stopped, t = t, trainer(tmp_path / "parts", **settings)
        torch.manual_seed(1234)
        t.resume(checkpoints.latest_checkpoint(t.run.checkpoints))
        assert (t.step, t.seconds) == (stop, stopped.seconds)
        assert t.last_metric == stopped.last_metric
        assert (t.last_metric is None) == (stop < 4)
    t.fit()
    kept = ("student", "distiller", "balance")
    for one, other in ((getattr(whole, name), getattr(t, name)) for name in kept):
        if one is not None:
            for name, value in one.state_dict().items():
                assert torch.equal(value, other.state_dict()[name]), name
    assert whole.pulls == t.pulls
    assert untimed(whole.run) == untimed(t.run)
    assert len(rounds(t)) == {"optima": 9, "gradient-cosine": 5}.get(method, 0)


def test_ctrl_c_saves_and_stops_after_the_step(tmp_path, monkeypatch):
    t = trainer(tmp_path, method="layerwise", steps=20)
    step = t._train_step

    def interrupt(*args):
        if t.step == 5:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(t, "_train_step", interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="after step 6 of 20"):
        t.fit()
    assert checkpoints.latest_checkpoint(t.run.checkpoints).name == "step-00000006.pt"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait(tmp_path, monkeypatch):
    t = trainer(tmp_path, method="layerwise", steps=20)

    def interrupt(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(t, "_train_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        t.fit()


def _break_prediction(t: Trainer) -> None:
    t.student.head.classify.weight.data[0, 0] = float("nan")


def _break_hidden(t: Trainer) -> None:
    t.distiller.projections["image_1"].data[0, 0] = float("inf")


def _break_gradient(t: Trainer) -> None:
    loss = t.data.loss
    object.__setattr__(
        t.data, "loss", lambda logits, batch: loss(logits, batch) + (logits.sum() * 0.0).sqrt()
    )


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_break_prediction, "step 4: prediction is nan"),
        (_break_hidden, "step 4: hidden of image layer 2 from teacher layer 4 is (inf|nan)"),
        (_break_gradient, "step 4: the gradient norm is nan"),
    ],
)
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, monkeypatch, harm, message):
    t = trainer(tmp_path, method="layerwise", steps=20, checkpoint_every=2)
    step = t._train_step
    kept: dict[str, torch.Tensor] = {}

    def strike(*args):
        if t.step == 3:
            harm(t)
            kept.update({n: p.clone() for n, p in t.student.state_dict().items()})
        return step(*args)

    monkeypatch.setattr(t, "_train_step", strike)
    with pytest.raises(UserError, match=message) as caught:
        t.fit()
    assert "last good checkpoint" in str(caught.value)
    assert "step-00000002.pt" in str(caught.value)
    for name, value in t.student.state_dict().items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=0, equal_nan=True)
    report = checkpoints.read_json(t.run.folder / "nonfinite.json")
    assert report["step"] == 4
    assert report["examples"] == t.sampler.at(3).tolist()
    good = checkpoints.load_checkpoint(checkpoints.latest_checkpoint(t.run.checkpoints))
    assert all(p.isfinite().all() for p in good["student"].values())


def test_what_a_step_broke_is_seen_at_the_next_line_and_no_later_step_is_taken(tmp_path):
    t = trainer(tmp_path, method="layerwise", steps=20, checkpoint_every=20, log_every=5)
    step, kept, whole = t._train_step, {}, t.data.loss

    def strike():
        if t.step == 1:
            _break_gradient(t)
            kept.update({n: p.clone() for n, p in t.student.state_dict().items()})
        losses = step()
        object.__setattr__(t.data, "loss", whole)  # only that one
        return losses

    t._train_step = strike
    with pytest.raises(UserError, match=r"step 2: the gradient norm is nan, so no step was taken"):
        t.fit()
    assert t.step == 5
    assert all(torch.equal(p, kept[n]) for n, p in t.student.state_dict().items())


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "layerwise", "attention_loss": "probs", "cross_attention": True},
        {"method": "optima", "hidden_scale": "variance", "kl_weight": 1.0},
        {"method": "balanced"},
        {"method": "kd"},
        {"method": "finetune"},
    ],
)
@pytest.mark.parametrize("task", ["vqa", "coco"])
def test_no_step_waits_for_the_device(tmp_path, task, settings):
    t = trainer(tmp_path, task=task, steps=20, **settings)
    if t.policy is not None:
        t._begin_round()
    t._next_parts()  # drawn by a generator of the CPU
    batch = t._next_parts()
    t._next_parts = lambda: batch
    with NothingIsRead():
        t._train_step()
        t._train_step()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingIsRead():
        t._check()


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    t = trainer(tmp_path, steps=20, method="layerwise")
    path = t.save()
    other = trainer(tmp_path / "other", steps=20, method="layerwise", lr=0.123)
    with pytest.raises(UserError, match=r"another configuration: lr is 0\.003 there and 0\.123"):
        other.resume(path)
    state = checkpoints.load_checkpoint(path)
    torch.save({**state, "teacher": "0"}, path)
    with pytest.raises(UserError, match="was made with another teacher than digits_teacher is now"):
        t.resume(path)
    torch.save({**state, "format": 1}, path)
    with pytest.raises(UserError, match="has format 1, not 5"):
        t.resume(path)
    torch.save({**state, "config": {**state["config"], "newer": 1}}, path)
    with pytest.raises(UserError, match="another configuration: newer is 1 there and None here"):
        t.resume(path)
    del state["optimizer"]
    torch.save(state, path)
    with pytest.raises(UserError, match="does not fit this run: 'optimizer'"):
        t.resume(path)


def test_layers_computed_again_give_the_same_bits_in_less_memory(tmp_path, monkeypatch):
    settings = {"method": "layerwise", "steps": 3, "cross_attention": True, "task": "coco"}
    runs = [trainer(tmp_path / str(i), **settings) for i in range(2)]
    runs[1].student.recompute()
    peaks = []
    for t in runs:
        with LiveBytes() as live:
            t._train_step()
        peaks.append(live.peak)
        t.step += 1
        t.fit()
    assert peaks[1] < 0.8 * peaks[0]
    for name, value in runs[0].student.state_dict().items():
        assert torch.equal(value, runs[1].student.state_dict()[name]), name
