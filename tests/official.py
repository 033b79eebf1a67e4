"""Data sets of a few images in their official layouts, and the shared real ones."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from optima_fast.models.pretrained import MEAN, STD
from optima_fast.tasks import folders
from optima_fast.tasks.images import Preprocessing

SIZE = 6


def shared(*parts):
    root = os.environ.get("OPTIMA_FAST_SHARED_DATA")
    base = Path(root) if root else Path(__file__).parents[2] / "shared" / "data"
    path = base.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no shared data: {path} does not exist (set OPTIMA_FAST_SHARED_DATA)")
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_lines(path, entries):
    write(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIZE, SIZE), (shade, shade, shade)).save(path)


def load_image(path, size, **options):
    """An image as a model sees it: float32 `[3, size, size]`, normalised."""
    preprocessing = Preprocessing(size, **options)
    return preprocessing.normalise(preprocessing.read(path))


def levels(tensor):
    """Of a normalised image: float levels `[H, W, 3]`, 0 .. 255."""
    scaled = tensor * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return (scaled.permute(1, 2, 0) * 255).numpy()


def shade(image):
    """The red level of a flat normalised image."""
    return round(float(levels(image)[0, 0, 0]))


def load(task, root, **options):
    """A data set read with images of their own size."""
    return folders.load(task, root, image_size=SIZE, **options)


def files(split):
    """Names of a split's images."""
    return {path.name for path in split.images.paths}


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_lines(path, change):
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    change(entries)
    write_lines(path, entries)


def answers(*given):
    return [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(given)]


def make_vqa(root, parts=("train", "val"), images=4):
    """Two questions an image, about its number; images i has the shade 10 i."""
    for number, part in enumerate(parts):
        questions, notes = [], []
        for i in range(images):
            image = 100 * number + i
            picture(root / f"{part}2014" / f"COCO_{part}2014_{image:012d}.jpg", 10 * i)
            for j, (text, answer) in enumerate([("What number", i), ("Is it odd", i % 2)]):
                ids = {"image_id": image, "question_id": 1000 * number + 10 * i + j}
                questions.append({"question": f"{text} {part}?", **ids})
                given = [str(answer)] * 7 + ["two", "a dog", "none"]
                notes.append({**ids, "answer_type": "number", "answers": answers(*given)})
        write(root / f"v2_OpenEnded_mscoco_{part}2014_questions.json", {"questions": questions})
        write(root / f"v2_mscoco_{part}2014_annotations.json", {"annotations": notes[::-1]})
    return root


def make_coco(root, parts=("train", "val"), images=4):
    for number, part in enumerate(parts):
        ids = [100 * number + i for i in range(images)]
        for i in ids:
            picture(root / f"{part}2017" / f"{i:012d}.jpg", i % 100 * 10)
        write(
            root / "annotations" / f"captions_{part}2017.json",
            {
                "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in ids],
                "annotations": [
                    {"id": 10 * i + j, "image_id": i, "caption": f"Caption {j} of\n{part} {i}."}
                    for j in range(3)
                    for i in ids
                ],
            },
        )
    return root


def make_snli_ve(root, parts=("train", "dev", "test"), images=3):
    labels = ("entailment", "neutral", "contradiction", "-")
    for number, part in enumerate(parts):
        entries = []
        for i in range(images):
            name = f"{number}{i}"
            picture(root / "flickr30k-images" / f"{name}.jpg", 10 * i)
            for j, label in enumerate(labels):
                entries.append(
                    {
                        "Flickr30K_ID": name + (".jpg" if j % 2 else ""),
                        "gold_label": label,
                        "pairID": f"{name}.jpg#{j}",
                        "sentence1": "Not used.",
                        "sentence2": f"Statement {j} {part}.",
                    }
                )
        write_lines(root / f"snli_ve_{part}.jsonl", entries)
    return root


def make_nlvr2(root, parts=("train", "dev", "test1"), sets=3, layout="{part}"):
    """Two pairs a set, two sentences a pair; left images are dark, right ones bright."""
    for part in parts:
        entries = []
        for s in range(sets):
            for pair in range(2):
                name = f"{part}-{s}-{pair}"
                folder = root / "images" / layout.format(part=part, directory=s)
                picture(folder / f"{name}-img0.png", 10 * s)
                picture(folder / f"{name}-img1.png", 200 + 10 * s)
                for sentence in range(2):
                    entry = {
                        "identifier": f"{name}-{sentence}",
                        "sentence": f"Sentence {sentence} {part}.",
                        "label": str(pair == sentence),
                    }
                    entries.append({**entry, "directory": s} if "directory" in layout else entry)
        write_lines(root / f"{part}.json", entries)
    return root


MAKE = {"vqa": make_vqa, "coco": make_coco, "snli_ve": make_snli_ve, "nlvr2": make_nlvr2}
