"""A run's student is asked about files: it says what it says of the same examples in a data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from official import make_nlvr2, make_vqa
from PIL import Image
from small_run import finetuned

from optima_fast import predict, tasks
from optima_fast.tasks import TaskData
from optima_fast.training import experiment
from optima_fast.training.run import Run

ASKED = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of each task on the digits."""
    return {task: finetuned(tmp_path_factory.mktemp(task), task) for task in tasks.TASKS}


def files(data: TaskData, folder: Path) -> list[list[str]]:
    """The images of the first test examples, as files."""
    shown = data.test.image_index[:ASKED].tolist()
    for number in {i for row in shown for i in row}:
        image = data.test.images.levels[number, 0].numpy()
        Image.fromarray(image).save(folder / f"{number}.png")
    return [[f"{i}.png" for i in row] for row in shown]


def ask(capsys: pytest.CaptureFixture[str], *argv: object) -> list[dict[str, object]]:
    assert predict.main([*map(str, argv), "--json", "--device=cpu"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def write(path: Path, entries: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
    return path


@pytest.mark.parametrize("task", ["vqa", "snli_ve", "nlvr2"])
def test_answers_are_those_to_the_same_examples(task, runs, tmp_path, capsys):
    data = experiment.load_data(runs[task].config())
    model = runs[task].load_model(data).eval()
    with torch.no_grad():
        expected = model(data.test.batch(range(ASKED))).logits.softmax(-1).max(-1)
    pairs = zip(files(data, tmp_path), data.test.text, strict=False)
    entries = [
        {"image": names if task == "nlvr2" else names[0], "text": data.tokenizer.decode(row)}
        for names, row in pairs
    ]
    said = ask(capsys, runs[task].folder, "--list", write(tmp_path / "list.jsonl", entries))
    assert [entry["answer"] for entry in said] == [data.classes[i] for i in expected.indices]
    values = [entry["probability"] for entry in said]
    assert values == pytest.approx(expected.values.tolist(), abs=1e-6)
    assert len(set(values)) > 1
    assert [{k: v for k, v in e.items() if k in entries[0]} for e in said] == entries


def test_captions_and_their_probability_token_by_token(runs, tmp_path, capsys):
    data = experiment.load_data(runs["coco"].config())
    model = runs["coco"].load_model(data).eval()
    names = [row[0] for row in files(data, tmp_path)]
    entries = [{"image": str(tmp_path / name), "id": i} for i, name in enumerate(names)]
    said = ask(capsys, runs["coco"].folder, "--list", write(tmp_path / "list.jsonl", entries))
    numbers = data.test.image_index[:ASKED, 0].tolist()
    captions = data.predict(model, data.test).texts
    assert [entry["answer"] for entry in said] == [captions[i] for i in numbers]
    assert [entry["id"] for entry in said] == list(range(ASKED))
    words = data.tokenizer
    for entry, number in zip(said, numbers, strict=True):
        ids = [words.bos_id, *words.pieces(str(entry["answer"])), words.eos_id][: data.text_length]
        probability, image = 1.0, data.test.images[torch.tensor([number])]
        for n in range(1, len(ids)):
            text = torch.tensor([[*ids[:n], words.pad_id]])  # of which the head reads the first n
            with torch.no_grad():
                logits = model({"images": image, "text": text}).logits
            probability *= float(logits[0, -1].softmax(-1)[ids[n]])
        assert entry["probability"] == pytest.approx(probability, rel=1e-4)


@pytest.mark.parametrize("make", [make_vqa, make_nlvr2])
def test_photographs_are_read_as_the_run_read_them(make, tmp_path, capsys):
    task = make.__name__.removeprefix("make_")
    run = finetuned(tmp_path, task, make(tmp_path / "data"))
    _, metrics, recorded = experiment.evaluate(run.folder)
    assert metrics["accuracy"] == recorded
    data = experiment.load_data(run.config())
    shown, chosen = data.test.image_index, torch.tensor([0, 1, -1])
    texts = [data.tokenizer.decode(data.test.text[i]) for i in chosen]
    flags = [f"--image={data.test.images.paths[i]}" for row in shown[chosen] for i in row]
    said = ask(capsys, run.folder, *flags, *(f"--text={text}" for text in texts))
    model = run.load_model(data).eval()
    with torch.no_grad():
        batch = data.test.batch(chosen % len(data.test))
        expected = model(batch).logits.softmax(-1).max(-1)
    assert [e["probability"] for e in said] == pytest.approx(expected.values.tolist(), abs=1e-6)
    assert [entry["answer"] for entry in said] == [data.classes[i] for i in expected.indices]
    assert len({round(e["probability"], 6) for e in said}) > 1  # type: ignore[call-overload]


def test_images_and_texts_in_order_or_one_of_them_with_all(runs, tmp_path, capsys, monkeypatch):
    data = experiment.load_data(runs["vqa"].config())
    files(data, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "BATCH", 2)
    images = sorted(path.name for path in tmp_path.iterdir())[:2]
    images = (images * 2)[:2]
    run, flags = runs["vqa"].folder, [f"--image={name}" for name in images]
    texts = ["what is the largest digit", "how many digits"]
    assert predict.main([str(run), flags[0], "--text", texts[0]]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{images[0]} {texts[0]}: ")
    assert said.rstrip().endswith(")")
    for given, expected in (
        ([*flags, f"--text={texts[0]}"], [(images[0], texts[0]), (images[1], texts[0])]),
        ([flags[0], *(f"--text={t}" for t in texts)], [(images[0], t) for t in texts]),
        (
            [*flags, flags[0], *(f"--text={t}" for t in (*texts, texts[0]))],
            [(images[0], texts[0]), (images[1], texts[1]), (images[0], texts[0])],
        ),
    ):
        assert [(e["image"], e["text"]) for e in ask(capsys, run, *given)] == expected
    assert predict.main([str(run), flags[0], "--text=a quaint digit", "--device=cpu"]) == 0
    assert "note: the student never saw a, quaint: 'a quaint digit'\n" in capsys.readouterr().err


def test_a_picture_of_another_size_or_in_colour_is_read_too(runs, tmp_path, capsys):
    grey = Image.linear_gradient("L")
    grey.save(tmp_path / "grey.png")
    Image.merge("RGB", [grey, Image.new("L", grey.size), grey]).save(tmp_path / "colour.png")
    run, text = runs["vqa"].folder, "--text=what is the largest digit"
    one, other = ask(
        capsys, run, f"--image={tmp_path}/grey.png", f"--image={tmp_path}/colour.png", text
    )
    assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)


def test_a_mistake_is_one_line_before_any_answer(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "c.png"):
        Image.new("L", (24, 24)).save(name)
    Path("text.png").write_text("not a picture")
    lists = {
        "empty": "\n",
        "odd": '{"image": "a.png", "text": "x"}\n{"image": 3, "text": "x"}',
        "broken": '\n{"image": "a.png"',
        "gone": '{"image": "a.png", "text": "x"}\n\n{"image": "gone.png", "text": "x"}',
    }
    for name, content in lists.items():
        Path(f"{name}.jsonl").write_text(content)
    image, pair = ["--image=a.png"], ["--image=a.png", "--image=b.png"]
    both = "give either --image FILE, repeatable, or --list FILE.jsonl"
    for task, flags, message in (
        ("vqa", [], both),
        ("vqa", [*image, "--list=odd.jsonl"], both),
        ("vqa", ["--list=odd.jsonl", "--text=x"], "the texts of --list are in its lines"),
        ("vqa", image, "a student of vqa needs a question about a.png, got ''"),
        ("snli_ve", [*image, "--text= ? "], "needs a statement about a.png, got ' ? '"),
        ("coco", [*image, "--text=x"], "writes captions: leave the text out, got 'x'"),
        ("nlvr2", [*image, "--text=x"], "takes images in pairs, left and right, got 1 --image"),
        ("vqa", [*pair, "--image=c.png", "--text=x", "--text=y"], "3 images and 2 texts do not"),
        ("nlvr2", [*pair * 3, "--text=x", "--text=y"], "3 pairs of images and 2 texts do not go"),
        ("vqa", ["--image=gone.png", "--text=x"], "no image file gone.png"),
        ("vqa", ["--image=text.png", "--text=even"], "cannot read the image text.png"),
        ("vqa", ["--list=empty.jsonl"], "--list empty.jsonl has no line"),
        ("vqa", ["--list=no.jsonl"], "cannot read --list no.jsonl"),
        ("vqa", ["--list=broken.jsonl"], "broken.jsonl, line 2 is not JSON"),
        ("vqa", ["--list=odd.jsonl"], 'line 2 must be like {"image": "a.png", "text": "..."}, got'),
        ("vqa", ["--list=gone.jsonl"], "gone.jsonl, line 3: no image file gone.png"),
        (
            "nlvr2",
            ["--list=gone.jsonl"],
            "line 1: a student of nlvr2 is shown two images, the left",
        ),
        ("vqa", [*image, "--text=x", "--device=cuda:99"], "--device cuda:99: this torch sees"),
    ):
        assert predict.main([str(runs[task].folder), *flags]) == 2, flags
        done = capsys.readouterr()
        assert message in done.err
        assert (done.out, done.err[:7], done.err.count("\n")) == ("", "error: ", 1)
    assert predict.main(["gone", *image, "--text=x"]) == 2
    assert "gone holds no run" in capsys.readouterr().err
    Path("open_clip_config.json").write_text("{}")
    assert predict.main([".", *image, "--text=x"]) == 2
    assert "is a model of open_clip, without a task's head" in capsys.readouterr().err
