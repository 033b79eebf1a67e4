"""The run that is watched: it is the trainer's own, and what is said of few examples is right."""

from __future__ import annotations

import bench_reward
import pytest

from optima_fast.distill import Measurement
from optima_fast.errors import UserError
from optima_fast.training import trainer
from optima_fast.training.rewards import RewardMeter


def test_a_run_is_watched_and_told(tmp_path, capsys, monkeypatch):
    costs = [0.6, 0.57, 0.97, 0.78, 0.98, 0.98, 1.0]
    monkeypatch.setattr("optima_fast.training.trainer.arm_costs", lambda *_, **__: costs)
    argv = [f"--out={tmp_path / 'run'}", f"--cache={tmp_path / 'cache'}", "--threads=1"]
    argv += ["--train-images=60", "--batch-size=4", "--steps=4", "--round-steps=2"]
    argv += ["--teacher-steps=4", "--reward-examples=8"]
    assert bench_reward.main(argv) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("vqa, seed 0: 2 rounds, accuracy 0.")
    assert "of training on 8 examples, " in said[0]
    assert said[0].endswith(" ms a measurement")
    # 240 examples are three whole parts of 64
    assert [line.split()[:2] for line in said[2:]] == [["128", "1"], ["64", "3"]]
    assert trainer.RewardMeter is RewardMeter
    with pytest.raises(UserError, match="is there already"):
        bench_reward.main(argv)


def measurement(image: float, text: float) -> Measurement:
    layers = {"image": [image], "text": [text]}
    return Measurement(None, 0.0, None, 1.0, layers, {}, layers, 1.0)


def test_what_a_set_would_have_missed_by_hand():
    meter = object.__new__(bench_reward.Watched)
    arms, counts = [("image",), ("text",)], {"image": 1, "text": 1}
    meter.model = (arms, [1.0, 1.0], counts, "none")
    # in all four parts image has 0.7 left and text 0.6; in the last alone it is the other way
    parts = [*3 * [measurement(0.8, 0.6)], measurement(0.4, 0.6)]
    meter.rows = 2 * [[(part, 64) for part in parts]]
    rows = {row.size: row for row in bench_reward.compared(meter, [0, 1])}
    assert list(rows) == [256, 128, 64]
    assert [row.sets for row in rows.values()] == [1, 2, 4]
    assert [row.same for row in rows.values()] == [0.5, 0.5, 0.5]
    assert rows[256].missed == rows[256].deviation == 0.0
    # one set of two has image at 0.6 and text at 0.6, of which the first is taken
    assert rows[128].missed == 0.0
    assert rows[64].missed == pytest.approx((1 - 0.6 / 0.7) / 4)
    # of image: the deviation of 0.8, 0.8, 0.8 and 0.4 is 0.2; of text 0
    assert rows[64].deviation == pytest.approx(0.2 / 0.7 / 2)


def test_another_method_has_no_headroom():
    with pytest.raises(UserError, match="--method layerwise measures no headroom"):
        bench_reward.main(["--method=layerwise"])
