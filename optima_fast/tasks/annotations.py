"""Official annotation files of the four tasks, read into examples and checked entry by entry.

vqa      v2_OpenEnded_mscoco_{train2014,val2014,test-dev2015,test2015}_questions.json,
         v2_mscoco_{train,val}2014_annotations.json,
         {train2014,val2014,test2015}/COCO_train2014_000000000009.jpg
coco     dataset_coco.json (Karpathy's splits) with {train,val}2014/ or {train,val}2017/; else
         captions_{train,val}2017.json or captions_{train,val}2014.json with {train,val}2017/ or
         2014/; else tar shards (see `shards`)
snli_ve  snli_ve_{train,dev,test}.jsonl, flickr30k-images/<Flickr30K_ID>.jpg
nlvr2    {train,dev,test1,test2}.json (a JSON object a line), images/train/<directory>/,
         dev/ and test1/ with dev-850-0-img0.png and so on

Annotation files lie in the folder or in its `annotations/`, `questions/` or `data/`; folders of
images in the folder or in its `images/`.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optima_fast.errors import UserError
from optima_fast.tasks import shards
from optima_fast.tasks.nlvr2 import CLASSES as NLVR2_CLASSES
from optima_fast.tasks.records import an_object, choice, document, entries, get, lines, named, once
from optima_fast.tasks.shards import Member
from optima_fast.tasks.snli_ve import CLASSES as SNLI_VE_CLASSES

log = logging.getLogger(__name__)

ImageFile = Path | Member

_ANNOTATIONS = ("", "annotations", "Annotations", "questions", "Questions", "data")
_IMAGES = ("", "images", "Images", "Images/mscoco")


@dataclass(frozen=True, slots=True)
class Example:
    """A text, the files of the images it is about, and what is known of it.

    Attributes:
        id: The data set's own: question_id, pairID, identifier; for a caption, its image's.
        text: Question, statement, sentence or caption.
        images: One file, or two for NLVR2.
        group: Examples of one group must not be divided between splits.
        label: Class, for SNLI-VE and NLVR2.
        answers: What each annotator answered, for VQA; () where that is kept secret.
        kind: VQA's answer type.
    """

    id: str | int
    text: str
    images: tuple[ImageFile, ...]
    group: str
    label: int = -1
    answers: tuple[str, ...] = ()
    kind: str | None = None


@dataclass(frozen=True)
class Reading:
    """A split as its files have it.

    Attributes:
        examples: In the order of the files, whether their images are there or not.
        files: What was read.
        left_out: How many entries are no examples, by what they are.
    """

    examples: list[Example]
    files: tuple[Path, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


Readings = dict[str, Callable[[], Reading]]


class Listing:
    """Whether files exist, by reading each folder once; members of a tar file do."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def __contains__(self, file: ImageFile) -> bool:
        return isinstance(file, Member) or self.has(str(file.parent), file.name)

    def has(self, folder: str, name: str) -> bool:
        """Whether `folder` holds a file `name`."""
        if folder not in self._names:
            names = os.listdir(folder) if os.path.isdir(folder) else []
            self._names[folder] = frozenset(names)
        return name in self._names[folder]


def vqa(root: Path, _: Listing) -> Readings:
    """VQA v2; the answers of test-dev and test-std are the server's secret."""
    parts = {
        "train": "train2014",
        "validation": "val2014",
        "test-dev": "test-dev2015",
        "test-std": "test2015",
    }
    found: Readings = {}
    for split, part in parts.items():
        asked = _file(root, f"v2_OpenEnded_mscoco_{part}_questions.json")
        answered = _file(root, f"v2_mscoco_{part}_annotations.json")
        if part.startswith("test"):
            if asked.exists():
                found[split] = functools.partial(_vqa_asked, root, asked)
        elif asked.exists() or answered.exists():
            found[split] = functools.partial(_vqa, root, part, asked, answered)
    return found


def _vqa(root: Path, part: str, asked: Path, answered: Path) -> Reading:
    questions = _questions(asked)
    shown = _Photos(root, part)
    examples: dict[int, Example] = {}
    for entry, where in entries(answered, "annotations", _Answers()):
        number = get(entry, "question_id", int, where)
        once(number, examples, "question_id", where)
        if number not in questions:
            raise UserError(f"{where} answers question_id {number}, which is not in {asked}")
        given = get(entry, "answers", list, where)
        if not given:
            raise UserError(f"{where} must hold at least one answer, got none")
        answers = tuple(_answer(answer, i, where) for i, answer in enumerate(given))
        text, image = questions[number]
        kind = entry.get("answer_type")
        examples[number] = Example(
            number, text, *shown[image], answers=answers, kind=kind and sys.intern(str(kind))
        )
    if len(examples) < len(questions):
        number = next(number for number in questions if number not in examples)
        raise UserError(f"question_id {number} of {asked} has no annotation in {answered}")
    return Reading(list(examples.values()), (asked, answered))


def _vqa_asked(root: Path, asked: Path) -> Reading:
    shown = _Photos(root, "test2015")
    questions = _questions(asked)
    examples = [Example(n, text, *shown[image]) for n, (text, image) in questions.items()]
    return Reading(examples, (asked,))


def _questions(asked: Path) -> dict[int, tuple[str, int]]:
    questions: dict[int, tuple[str, int]] = {}
    for entry, where in entries(asked, "questions"):
        number = get(entry, "question_id", int, where)
        once(number, questions, "question_id", where)
        questions[number] = (get(entry, "question", str, where), get(entry, "image_id", int, where))
    return questions


def _answer(answer: Any, number: int, where: str) -> str:
    if type(answer) is tuple:
        return str(answer[0])
    where = f"{where}, answer {number}"
    return str(get(an_object(answer, where), "answer", str, where))


class _Answers(dict[str, tuple[str]]):
    """Turns {"answer": "yes", ...} into ("yes",), the same object for the same answer."""

    def __call__(self, entry: dict[str, Any]) -> Any:
        answer = entry.get("answer")
        if type(answer) is str and "question_id" not in entry:
            return self.setdefault(answer, (answer,))
        return entry


class _Photos(dict[int, tuple[tuple[Path, ...], str]]):
    """The file of each COCO image of 2014 and 2015, and its group, made once an image."""

    def __init__(self, root: Path, part: str) -> None:
        self._folder, self._part = _folder(root, part), part

    def __missing__(self, image: int) -> tuple[tuple[Path, ...], str]:
        file = self._folder / f"COCO_{self._part}_{image:012d}.jpg"
        self[image] = ((file,), str(image))
        return self[image]


def coco(root: Path, listing: Listing) -> Readings:
    """COCO captions, of the first source that is there: Karpathy's, 2017, 2014, tar shards."""
    karpathy = _file(root, "dataset_coco.json")
    sources: dict[str, Readings] = {}
    if karpathy.exists():

        @functools.cache  # one file has all splits
        def read() -> dict[str, Reading]:
            return _karpathy(root, karpathy, listing)

        sources[karpathy.name] = {
            "train": lambda: read()["train"],
            "validation": lambda: read()["validation"],
            "test": lambda: read()["test"],
        }
    for year in (2017, 2014):
        parts = {"train": f"train{year}", "validation": f"val{year}"}
        files = {split: _file(root, f"captions_{part}.json") for split, part in parts.items()}
        sources[f"captions_*{year}.json"] = {
            split: functools.partial(_captions, _folder(root, parts[split]), file)
            for split, file in files.items()
            if file.exists()
        }
    packed = shards.by_split(root)
    sources["*.tar"] = {s: functools.partial(_shards, files) for s, files in packed.items()}
    there = [name for name, readings in sources.items() if readings]
    if len(there) > 1:
        log.warning("%s: read %s, not %s", root, there[0], " nor ".join(there[1:]))
    return sources[there[0]] if there else {}


def _captions(folder: Path, file: Path) -> Reading:
    content = document(file)
    images: dict[int, tuple[Path]] = {}
    for entry, where in named(content, "images", file):
        number = get(entry, "id", int, where)
        once(number, images, "image id", where)
        images[number] = (folder / get(entry, "file_name", str, where),)
    examples: dict[int, Example] = {}
    for entry, where in named(content, "annotations", file):
        number = get(entry, "id", int, where)
        once(number, examples, "annotation id", where)
        image = get(entry, "image_id", int, where)
        if image not in images:
            raise UserError(f"{where} has image_id {image}, which is not among the file's images")
        text = _line(get(entry, "caption", str, where))
        examples[number] = Example(image, text, images[image], str(image))
    return Reading(list(examples.values()), (file,))


def _karpathy(root: Path, file: Path, listing: Listing) -> dict[str, Reading]:
    """Every split of dataset_coco.json; `restval` is training data, as is the custom."""
    parts = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
    split: dict[str, list[Example]] = {part: [] for part in parts.values()}
    folders = {name: _folder(root, name) for name in ("train2014", "val2014")}
    later = [_folder(root, name) for name in ("train2017", "val2017")]
    seen: set[int] = set()
    for entry, where in entries(file, "images"):
        number = get(entry, "cocoid", int, where)
        once(number, seen, "cocoid", where)
        seen.add(number)
        part = tuple(parts)[choice(get(entry, "split", str, where), tuple(parts), "split", where)]
        place = tuple(folders)[
            choice(get(entry, "filepath", str, where), tuple(folders), "filepath", where)
        ]
        own = folders[place] / get(entry, "filename", str, where)
        others = [folder / f"{number:012d}.jpg" for folder in later] if own not in listing else []
        image = (next((other for other in others if other in listing), own),)
        sentences = get(entry, "sentences", list, where)
        if not sentences:
            raise UserError(f"{where} must hold at least one sentence, got none")
        for i, sentence in enumerate(sentences):
            at = f"{where}, sentences[{i}]"
            text = _line(get(an_object(sentence, at), "raw", str, at))
            split[parts[part]].append(Example(number, text, image, str(number)))
    return {name: Reading(examples, (file,)) for name, examples in split.items()}


def _shards(files: list[Path]) -> Reading:
    examples = []
    seen: set[str] = set()
    bare = 0
    for sample in shards.samples(files):
        once(sample.key, seen, "key", str(sample.tar))
        seen.add(sample.key)
        if sample.image is None or not sample.captions:
            bare += 1
            continue
        number = int(sample.key) if sample.key.isdecimal() else sample.key
        image = (sample.image,)
        examples += [Example(number, _line(c), image, sample.key) for c in sample.captions]
    left_out = {"samples without an image or a caption": bare} if bare else {}
    return Reading(examples, tuple(files), left_out)


def snli_ve(root: Path, _: Listing) -> Readings:
    """SNLI-VE; pairs without a gold label are left out."""
    parts = {"train": "train", "validation": "dev", "test": "test"}
    files = {split: _file(root, f"snli_ve_{part}.jsonl") for split, part in parts.items()}
    folder = _folder(root, "flickr30k-images", "flickr30k_images")
    return {
        split: functools.partial(_snli_ve, folder, file)
        for split, file in files.items()
        if file.exists()
    }


def _snli_ve(folder: Path, file: Path) -> Reading:
    examples = []
    seen: set[str] = set()
    shown: dict[str, tuple[Path]] = {}
    for entry, where in lines(file):
        pair = get(entry, "pairID", str, where)
        once(pair, seen, "pairID", where)
        seen.add(pair)
        label = get(entry, "gold_label", str, where)
        if label == "-":
            continue
        image = str(get(entry, "Flickr30K_ID", (str, int), where)).removesuffix(".jpg")
        files = shown.setdefault(image, (folder / f"{image}.jpg",))
        text = get(entry, "sentence2", str, where)
        gold = choice(label, SNLI_VE_CLASSES, "gold_label", where)
        examples.append(Example(pair, text, files, image, gold))
    unlabelled = len(seen) - len(examples)
    left_out = {"pairs without gold label": unlabelled} if unlabelled else {}
    return Reading(examples, (file,), left_out)


def nlvr2(root: Path, listing: Listing) -> Readings:
    """NLVR2, the left image first; test is test1."""
    parts = {"train": "train", "validation": "dev", "test": "test1", "test2": "test2"}
    files = {split: _file(root, f"{part}.json") for split, part in parts.items()}
    return {
        split: functools.partial(_nlvr2, root, parts[split], file, listing)
        for split, file in files.items()
        if file.exists()
    }


def _nlvr2(root: Path, part: str, file: Path, listing: Listing) -> Reading:
    places = [root / part, root / "images" / part, root / "images"]
    if part == "train":
        places[:2] = places[1::-1]
    examples: dict[str, Example] = {}
    for entry, where in lines(file):
        identifier = get(entry, "identifier", str, where)
        once(identifier, examples, "identifier", where)
        parts = identifier.split("-")
        if len(parts) != 4:
            raise UserError(
                f"{where}: identifier must be split-set-pair-sentence, got {identifier!r}"
            )
        names = [f"{'-'.join(parts[:3])}-img{side}.png" for side in (0, 1)]
        there = _nlvr2_place(places, entry, names[0], listing, where)
        label = get(entry, "label", (str, bool), where)
        examples[identifier] = Example(
            identifier,
            get(entry, "sentence", str, where),
            (there / names[0], there / names[1]),
            "-".join(parts[:2]),
            choice(str(label).lower(), NLVR2_CLASSES, "label", where),
        )
    return Reading(list(examples.values()), (file,))


def _nlvr2_place(
    places: list[Path], entry: dict[str, Any], name: str, listing: Listing, where: str
) -> Path:
    """The folder that holds an example's left image, or the one that should."""
    if "directory" in entry:
        directory = str(get(entry, "directory", (int, str), where))
        places = [place / directory for place in places] + places
    return next((place for place in places if listing.has(str(place), name)), places[0])


Reader = Callable[[Path, Listing], Readings]
READERS: Mapping[str, Reader] = {"vqa": vqa, "coco": coco, "snli_ve": snli_ve, "nlvr2": nlvr2}
TRAINING_FILES = {
    "vqa": "v2_OpenEnded_mscoco_train2014_questions.json and v2_mscoco_train2014_annotations.json",
    "coco": "dataset_coco.json, annotations/captions_train2017.json or train-*.tar shards",
    "snli_ve": "snli_ve_train.jsonl",
    "nlvr2": "train.json",
}


def _file(root: Path, name: str) -> Path:
    """The annotation file `name`, where it is, or where it should be."""
    return next(_existing(root, _ANNOTATIONS, (name,)), root / name)


def _folder(root: Path, *names: str) -> Path:
    """The folder of images with one of the names, where it is, or where it should be."""
    return next(_existing(root, _IMAGES, names), root / names[0])


def _existing(root: Path, places: tuple[str, ...], names: tuple[str, ...]) -> Iterator[Path]:
    return (p for place in places for name in names if (p := root / place / name).exists())


def _line(caption: str) -> str:
    return " ".join(caption.split())
