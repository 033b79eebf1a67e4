"""Predictions and their metrics: official forms, official values."""

import csv
import io
import json
import math
import os

import pytest
import torch
from official import MAKE, load, make_vqa, picture, shared, write, write_lines

from optima_fast import tasks
from optima_fast.errors import UserError
from optima_fast.tasks import submissions
from optima_fast.tasks.base import Predictions, Split
from optima_fast.tasks.coco import Coco
from optima_fast.tasks.vqa_answers import score


class Says(torch.nn.Module):
    """A model whose logits are largest for the classes given, in the order of the split."""

    def __init__(self, classes, size):
        super().__init__()
        self.rows = torch.nn.functional.one_hot(torch.tensor(classes), size).float() * 9
        self.done = 0

    def forward(self, batch):
        rows = self.rows[self.done : self.done + len(batch["text"])]
        self.done += len(rows)
        return type("Output", (), {"logits": rows})


def test_vqa_for_its_server(tmp_path):
    data = load("vqa", make_vqa(tmp_path))
    said = ["yes"] * 7 + ["2"]
    text = submissions.render(data, data.train, Predictions(said))
    assert json.loads(text) == [
        {"question_id": i, "answer": a}
        for i, a in zip([31, 30, 21, 20, 11, 10, 1, 0], said, strict=True)
    ]


def test_nlvr2_as_its_script_reads_it(tmp_path):
    data = load("nlvr2", MAKE["nlvr2"](tmp_path))
    truth = [data.classes[t] for t in data.test.target.tolist()]
    rows = list(csv.reader(io.StringIO(submissions.render(data, data.test, Predictions(truth)))))
    labels = [json.loads(line) for line in (tmp_path / "test1.json").read_text().splitlines()]
    assert rows == [[entry["identifier"], entry["label"]] for entry in labels]


def test_snli_ve_and_coco(tmp_path):
    data = load("snli_ve", MAKE["snli_ve"](tmp_path / "a"))
    text = submissions.render(data, data.test, Predictions(["neutral"] * 9))
    assert json.loads(text.splitlines()[3]) == {"pairID": "21.jpg#0", "label": "neutral"}
    assert len(text.splitlines()) == 9
    data = load("coco", MAKE["coco"](tmp_path / "b"))
    text = submissions.render(data, data.train, Predictions(list("abcd")))
    assert json.loads(text)[2] == {"image_id": 2, "caption": "c"}


def test_predictions_without_ids_or_of_another_number(tmp_path):
    data = load("coco", MAKE["coco"](tmp_path))
    with pytest.raises(ValueError, match="must have an id a prediction, got 4 for 3"):
        submissions.render(data, data.train, Predictions(["a"] * 3))
    digits = tasks.load("nlvr2", train_images=20, validation_images=4, test_images=4)
    with pytest.raises(ValueError, match="the test split must have an id a prediction, got none"):
        submissions.render(digits, digits.test, Predictions(["true"] * 3))
    assert "consistency" not in digits.metrics(
        digits.test, Predictions(["true"] * len(digits.test))
    )
    data = load("nlvr2", MAKE["nlvr2"](tmp_path / "nlvr2"))
    assert data.metrics(data.test, Predictions(["False"] * 12))["accuracy"] == 0  # no class of it
    with pytest.raises(ValueError, match="must be one an example, 12, got 1"):
        data.metrics(data.test, Predictions(["true"]))


def test_a_file_of_predictions_is_new_and_in_a_folder(tmp_path):
    assert submissions.new_file(tmp_path / "new.json", "folder") == tmp_path / "new.json"
    (tmp_path / "old.json").write_text("kept")
    with pytest.raises(UserError, match=r"old.json is there already: choose a new file"):
        submissions.new_file(tmp_path / "old.json", "folder")
    with pytest.raises(UserError, match=r"no folder .*nowhere for the predictions"):
        submissions.new_file(tmp_path / "nowhere" / "new.json", "folder")
    with pytest.raises(UserError, match="the built-in data has no official ids"):
        submissions.new_file(tmp_path / "new.json", "digits")


def test_vqa_accuracy_is_the_official_one_whole_and_by_answer_type(tmp_path):
    root = make_vqa(tmp_path)
    notes = json.loads((root / "v2_mscoco_train2014_annotations.json").read_text())
    for i, entry in enumerate(notes["annotations"]):
        entry["answer_type"] = "yes/no" if i % 3 else "other"
    write(root / "v2_mscoco_train2014_annotations.json", notes)
    data = load("vqa", root)
    picked = [i % data.num_classes for i in range(len(data.train))]
    result = data.evaluate(Says(picked, data.num_classes), data.train, batch_size=3)
    official = [
        score(data.classes[c], [a["answer"] for a in entry["answers"]])
        for c, entry in zip(picked, notes["annotations"], strict=True)
    ]
    assert result["accuracy"] == pytest.approx(math.fsum(official) / len(official), abs=1e-7)
    by_type = math.fsum(official[::3]) / len(official[::3])
    assert result["accuracy/other"] == pytest.approx(by_type, abs=1e-7)
    assert math.isfinite(result["loss"])


def test_golden_nlvr2_accuracy_and_consistency_through_metrics(tmp_path):
    """The official dev lines; every image is one and the same file."""
    golden = json.loads(shared("golden", "nlvr2_expected.json").read_text())
    with shared("golden", "nlvr2_dev_noisy70_predictions.csv").open() as file:
        noisy = dict(csv.reader(file))
    lines = shared("nlvr2", "dev.json").read_text()
    entries = [json.loads(line) for line in lines.splitlines()]
    (tmp_path / "dev.json").write_text(lines)
    train = [{"identifier": f"train-0-{i}-0", "sentence": "A", "label": "True"} for i in range(2)]
    write_lines(tmp_path / "train.json", train)
    write_lines(tmp_path / "test1.json", train)
    picture(tmp_path / "one.png")
    (tmp_path / "images").mkdir()
    for name in sorted({e["identifier"].rpartition("-")[0] for e in [*entries, *train]}):
        for side in (0, 1):
            os.link(tmp_path / "one.png", tmp_path / "images" / f"{name}-img{side}.png")
    data = load("nlvr2", tmp_path)
    assert len(data.validation) == 6982
    said = {
        "dev/always_true": ["true"] * 6982,
        "dev/noisy70": [noisy[i].lower() for i in data.validation.ids],
        "dev/oracle_lower": [data.classes[i] for i in data.validation.target.tolist()],
    }
    for name, expected in golden.items():
        result = data.metrics(data.validation, Predictions(said[name]))
        assert result == pytest.approx(expected, abs=1e-12), name
    text = submissions.render(data, data.validation, Predictions(said["dev/noisy70"]))
    assert dict(csv.reader(io.StringIO(text))) == noisy


def test_golden_captions_through_metrics():
    names = {f"bleu{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)} | {"cider": "CIDEr"}
    for case in json.loads(shared("golden", "caption_metrics.json").read_text())["cases"]:
        items = case["items"]
        if "already" in case.get("note", ""):
            continue
        n = len(items)
        split = Split(
            torch.zeros(n, 3, 1, 1),
            torch.zeros(n, 3, dtype=torch.int64),
            torch.arange(n),
            references=[item["references"] for item in items],
        )
        data = Coco(tasks.Vocabulary.build(["a"]), 3, 1, 3, split, split, split)
        result = data.metrics(split, Predictions([item["candidate"] for item in items]))
        assert set(result) == {*names, "rouge_l"}
        for key, official in {**names, "rouge_l": "ROUGE_L"}.items():
            if official in case["summary"]:
                expected = case["summary"][official]
                assert result[key] == pytest.approx(expected, abs=1e-9), (case["name"], key)
