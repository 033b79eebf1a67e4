"""Official annotation files of the four tasks, read into examples and checked line by line.

vqa      v2_OpenEnded_mscoco_{train,val}2014_questions.json,
         v2_mscoco_{train,val}2014_annotations.json,
         {train,val}2014/COCO_{train,val}2014_000000000009.jpg
coco     annotations/captions_{train,val}2017.json, {train,val}2017/<file_name>
snli_ve  snli_ve_{train,dev,test}.jsonl, flickr30k-images/<Flickr30K_ID>.jpg
nlvr2    {train,dev,test1}.json (a JSON object a line); images/ holds train-10171-0-img0.png
         and so on, flat, in {train,dev,test1}/, or for training in train/<directory>/
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optima_fast.errors import UserError
from optima_fast.tasks.nlvr2 import CLASSES as NLVR2_CLASSES
from optima_fast.tasks.snli_ve import CLASSES as SNLI_VE_CLASSES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A text, the files of the images it is about, and what is known of it.

    Attributes:
        text: Question, statement, sentence or caption.
        images: One file, or two for NLVR2.
        group: Examples of one group must not be divided between splits.
        label: Class, for SNLI-VE and NLVR2.
        answers: What each annotator answered, for VQA.
        kind: VQA's answer type.
    """

    text: str
    images: tuple[Path, ...]
    group: str
    label: int = -1
    answers: tuple[str, ...] = ()
    kind: str | None = None


class Listing:
    """Whether files exist, by reading each folder once."""

    def __init__(self) -> None:
        self._names: dict[Path, frozenset[str]] = {}

    def __contains__(self, path: Path) -> bool:
        folder = path.parent
        if folder not in self._names:
            names = os.listdir(folder) if folder.is_dir() else []
            self._names[folder] = frozenset(names)
        return path.name in self._names[folder]


def vqa(root: Path, split: str, _: Listing) -> list[Example] | None:
    """VQA v2; None where the folder has no such split."""
    part = {"train": "train2014", "validation": "val2014"}.get(split)
    asked = root / f"v2_OpenEnded_mscoco_{part}_questions.json"
    answered = root / f"v2_mscoco_{part}_annotations.json"
    if part is None or not (asked.exists() or answered.exists()):
        return None
    folder = _folder(root / part)
    questions: dict[int, tuple[str, int]] = {}
    for entry, where in _entries(asked, "questions"):
        number = _get(entry, "question_id", int, where)
        _once(number, questions, "question_id", where)
        questions[number] = (
            _get(entry, "question", str, where),
            _get(entry, "image_id", int, where),
        )
    examples: dict[int, Example] = {}
    for entry, where in _entries(answered, "annotations"):
        number = _get(entry, "question_id", int, where)
        _once(number, examples, "question_id", where)
        if number not in questions:
            raise UserError(f"{where} answers question_id {number}, which is not in {asked}")
        given = _get(entry, "answers", list, where)
        answers = tuple(
            _get(_object(answer, f"{where}, answer {i}"), "answer", str, f"{where}, answer {i}")
            for i, answer in enumerate(given)
        )
        if not answers:
            raise UserError(f"{where} must hold at least one answer, got none")
        text, image = questions[number]
        file = folder / f"COCO_{part}_{image:012d}.jpg"
        kind = entry.get("answer_type")
        examples[number] = Example(text, (file,), str(image), answers=answers, kind=kind)
    for number in questions:
        if number not in examples:
            raise UserError(f"question_id {number} of {asked} has no annotation in {answered}")
    return list(examples.values())


def coco(root: Path, split: str, _: Listing) -> list[Example] | None:
    """COCO captions; None where the folder has no such split."""
    part = {"train": "train2017", "validation": "val2017"}.get(split)
    file = root / "annotations" / f"captions_{part}.json"
    if part is None or not file.exists():
        return None
    folder = _folder(root / part)
    images: dict[int, Path] = {}
    for entry, where in _entries(file, "images"):
        number = _get(entry, "id", int, where)
        _once(number, images, "image id", where)
        images[number] = folder / _get(entry, "file_name", str, where)
    examples: dict[int, Example] = {}
    for entry, where in _entries(file, "annotations"):
        number = _get(entry, "id", int, where)
        _once(number, examples, "annotation id", where)
        image = _get(entry, "image_id", int, where)
        if image not in images:
            raise UserError(f"{where} has image_id {image}, which is not among the file's images")
        text = " ".join(_get(entry, "caption", str, where).split())
        examples[number] = Example(text, (images[image],), str(image))
    return list(examples.values())


def snli_ve(root: Path, split: str, _: Listing) -> list[Example] | None:
    """SNLI-VE; pairs without a gold label are left out. None where there is no such split."""
    file = root / f"snli_ve_{'dev' if split == 'validation' else split}.jsonl"
    if not file.exists():
        return None
    folder = _folder(root / "flickr30k-images")
    examples: dict[str, Example] = {}
    seen: set[str] = set()
    for entry, where in _lines(file):
        pair = _get(entry, "pairID", str, where)
        _once(pair, seen, "pairID", where)
        seen.add(pair)
        label = _get(entry, "gold_label", str, where)
        if label == "-":
            continue
        image = str(_get(entry, "Flickr30K_ID", (str, int), where)).removesuffix(".jpg")
        examples[pair] = Example(
            _get(entry, "sentence2", str, where),
            (folder / f"{image}.jpg",),
            image,
            _label(label, SNLI_VE_CLASSES, "gold_label", where),
        )
    if len(seen) > len(examples):
        dropped = len(seen) - len(examples)
        log.warning("%s: left out %d of %d pairs without gold label", file, dropped, len(seen))
    return list(examples.values())


def nlvr2(root: Path, split: str, listing: Listing) -> list[Example] | None:
    """NLVR2, the left image first; None where the folder has no such split."""
    part = {"validation": "dev", "test": "test1"}.get(split, split)
    file = root / f"{part}.json"
    if not file.exists():
        return None
    folder = _folder(root / "images")
    examples: dict[str, Example] = {}
    for entry, where in _lines(file):
        identifier = _get(entry, "identifier", str, where)
        _once(identifier, examples, "identifier", where)
        parts = identifier.split("-")
        if len(parts) != 4:
            raise UserError(
                f"{where}: identifier must be split-set-pair-sentence, got {identifier!r}"
            )
        places = [folder, folder / part]
        if "directory" in entry:
            directory = str(_get(entry, "directory", (int, str), where))
            places += [folder / directory, folder / part / directory]
        names = [f"{'-'.join(parts[:3])}-img{side}.png" for side in (0, 1)]
        there = next((p for p in places if p / names[0] in listing), places[-1])
        label = _get(entry, "label", (str, bool), where)
        examples[identifier] = Example(
            _get(entry, "sentence", str, where),
            (there / names[0], there / names[1]),
            "-".join(parts[:2]),
            _label(str(label).lower(), NLVR2_CLASSES, "label", where),
        )
    return list(examples.values())


Reader = Callable[[Path, str, Listing], list[Example] | None]
READERS: Mapping[str, Reader] = {"vqa": vqa, "coco": coco, "snli_ve": snli_ve, "nlvr2": nlvr2}
TRAINING_FILES = {
    "vqa": "v2_OpenEnded_mscoco_train2014_questions.json and v2_mscoco_train2014_annotations.json",
    "coco": "annotations/captions_train2017.json",
    "snli_ve": "snli_ve_train.jsonl",
    "nlvr2": "train.json",
}


def nlvr2_consistency(identifiers: Sequence[str], correct: Sequence[bool]) -> float:
    """Part of the sentences that are judged rightly for every pair of images they are asked of.

    Args:
        identifiers: split-set-pair-sentence of each example.
        correct: Whether each example was answered rightly.

    Raises:
        ValueError: The two lengths differ, there is no example, or an identifier has another form.

    Source: the evaluation script of https://github.com/lil-lab/nlvr.

    Example:
        >>> nlvr2_consistency(["dev-8-0-0", "dev-8-1-0", "dev-8-0-1"], [True, False, True])
        0.5
    """
    if len(identifiers) != len(correct) or not identifiers:
        raise ValueError(
            "identifiers and correct must have one entry an example and at least one, "
            f"got {len(identifiers)} and {len(correct)}"
        )
    right: dict[tuple[str, str, str], bool] = {}
    for identifier, hit in zip(identifiers, correct, strict=True):
        parts = identifier.split("-")
        if len(parts) != 4:
            raise ValueError(f"identifier must be split-set-pair-sentence, got {identifier!r}")
        sentence = (parts[0], parts[1], parts[3])
        right[sentence] = right.get(sentence, True) and bool(hit)
    return sum(right.values()) / len(right)


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"no image folder {path}: put the images of the data set there")
    return path


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: the data set is not complete") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _entries(path: Path, key: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a list in a JSON file, each with a name for messages."""
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise UserError(f"{path} must be a JSON object with a list {key!r}")
    for number, entry in enumerate(content[key]):
        where = f"{path}, {key}[{number}]"
        yield _object(entry, where), where


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file of JSON lines, each with a name for messages."""
    for number, line in enumerate(_read(path).split("\n"), start=1):
        where = f"{path}, line {number}"
        if line.strip():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not valid JSON ({error.msg})") from error
            yield _object(entry, where), where


def _object(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be a JSON object, got {type(entry).__name__}")
    return entry


def _get(entry: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = " or ".join(k.__name__ for k in kinds)
    if key not in entry:
        raise UserError(f"{where}: {key!r} is missing, it must be of type {wanted}")
    value = entry[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(f"{where}: {key!r} must be of type {wanted}, got {value!r:.40}")
    return value


def _once(value: object, seen: Any, what: str, where: str) -> None:
    if value in seen:
        raise UserError(f"{where}: {what} {value} is there a second time")


def _label(label: str, classes: Sequence[str], key: str, where: str) -> int:
    if label not in classes:
        raise UserError(f"{where}: {key!r} must be one of {', '.join(classes)}, got {label!r}")
    return classes.index(label)
