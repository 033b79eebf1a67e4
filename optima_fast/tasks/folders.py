"""Data sets in their official folder layouts (see `annotations`), as the trainer's tasks.

Official splits are used where there are any. A single held-out split is divided into validation
and test, and a lone training split into all three, by image (NLVR2: by set of images), in an order
hashed from the seed: no image is in two splits. What was divided, left out or is missing is logged
in one line each. Annotations are held in memory; images are decoded when a batch asks for them.
Answers to VQA v2's own test questions are secret: its splits test-dev and test-std can be read as
`further` ones, to be predicted only.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optima_fast.errors import UserError, unknown
from optima_fast.models.pretrained import MEAN, STD
from optima_fast.tasks import shards, tokenizers
from optima_fast.tasks.annotations import (
    READERS,
    TRAINING_FILES,
    Example,
    ImageFile,
    Listing,
    Reading,
    Readings,
)
from optima_fast.tasks.base import TaskData
from optima_fast.tasks.coco import Coco
from optima_fast.tasks.images import Augment, FolderImages, Preprocessing
from optima_fast.tasks.nlvr2 import CLASSES as NLVR2_CLASSES
from optima_fast.tasks.nlvr2 import Nlvr2
from optima_fast.tasks.snli_ve import CLASSES as SNLI_VE_CLASSES
from optima_fast.tasks.snli_ve import SnliVe
from optima_fast.tasks.split import Batch, Split
from optima_fast.tasks.tokenizers import Tokenizer
from optima_fast.tasks.vqa import Vqa
from optima_fast.tasks.vqa_answers import accepted, answer_set, normalise

__all__ = ["AnswerSplit", "FolderVqa", "Options", "load"]

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
FURTHER = {"vqa": ("test-dev", "test-std"), "nlvr2": ("test2",)}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a folder is read.

    Attributes:
        image_size: Height and width of an image.
        text_length: L; None for the longest training text, at most `max_text_length`.
        max_text_length: Longest L.
        tokenizer: A kind of `tokenizers.make`, or a tokenizer.
        min_count: A word that occurs less often in the training texts is unknown.
        max_words: Size of the vocabulary, special words included; None for no limit.
        answers: Size of the answer set (vqa).
        validation_fraction: Part of the held-out images that validates, where they are divided.
        held_out_fraction: Part of the training images to hold out where no other split is there.
        further: Splits of `FURTHER` to read too.
        mean, std: What pixels are normalised with, as parts of full brightness; CLIP's.
        resize: What of an image is scaled to its size, see `Preprocessing`.
        workers: Processes that read images where whole splits are evaluated; 0 for none.
        image_errors: "fail" at an image that cannot be read, or "skip" what shows it.
    """

    image_size: int = 224
    text_length: int | None = None
    max_text_length: int = 64
    tokenizer: str | Tokenizer = "words"
    min_count: int = 1
    max_words: int | None = None
    answers: int = 3129
    validation_fraction: float = 0.5
    held_out_fraction: float = 0.2
    further: tuple[str, ...] = ()
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    resize: str = "shortest"
    workers: int = 0
    image_errors: str = "fail"

    def __post_init__(self) -> None:
        if self.image_errors not in ("fail", "skip"):
            raise UserError(f"image_errors must be fail or skip, got {self.image_errors!r}")
        least = {"image_size": 1, "text_length": 3, "max_text_length": 3, "min_count": 1}
        least |= {"max_words": 5, "answers": 1, "workers": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is None and name in ("text_length", "max_words"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise UserError(f"{name} must be an integer >= {low}, got {value!r}")
        for name in ("validation_fraction", "held_out_fraction"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, float) or not 0 < value < 1:
                raise UserError(f"{name} must be between 0 and 1, got {value!r}")
        try:
            _ = self.preprocessing
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def preprocessing(self) -> Preprocessing:
        """From an image file to what a model sees."""
        return Preprocessing(self.image_size, self.mean, self.std, self.resize)


class AnswerSplit(Split):
    """A split whose soft scores are kept by the few answers that have one, not by answer set.

    Args:
        answer: int64 `[n, k]`, classes that score; the rest of a row is 0.
        worth: float32 `[n, k]`, what each is worth; the rest of a row is 0.
        classes: Size of the answer set.
    """

    def __init__(
        self, *parts: Any, answer: Tensor, worth: Tensor, classes: int, **options: Any
    ) -> None:
        super().__init__(*parts, **options)
        self.answer, self.worth, self.classes = answer, worth, classes

    def _tensors(self) -> list[Tensor]:
        return [*super()._tensors(), self.answer, self.worth]

    @property
    def measurable(self) -> bool:
        """True: the answers are known."""
        return True

    def batch(self, indices: Sequence[int] | Tensor, augment: Augment | None = None) -> Batch:
        """As `Split.batch`, with the soft scores as `target`, float32 `[T, classes]`."""
        batch = super().batch(indices, augment)
        index = torch.as_tensor(indices).to("cpu", torch.int64)
        dense = torch.zeros(len(index), self.classes)
        batch["target"] = dense.scatter_add_(1, self.answer[index], self.worth[index])
        return batch


class FolderVqa(Vqa):
    """VQA with the official score: the mean over the ten leave-one-out sets of annotators."""

    def worth(self, split: Split) -> tuple[Tensor, Tensor]:
        """The soft scores, by the answers that have one."""
        assert isinstance(split, AnswerSplit)
        return split.answer, split.worth


def load(task: str, path: Path | str, *, seed: int = 0, **options: Any) -> TaskData:
    """A task on a folder that holds its data set in the official layout.

    Args:
        task: "vqa", "snli_ve", "nlvr2" or "coco".
        path: The folder; for "coco" also tar shards (see `shards.by_split`).
        seed: Of the division of splits that are not there.
        options: Fields of `Options`.

    Raises:
        UserError: An unknown task or option, a value out of range, a missing folder or file, a
            file that is not as it must be (with its line or entry), a repeated id, no image of a
            split, or a split that is empty or too small to divide.
    """
    if task not in READERS:
        raise unknown("task", task, READERS)
    names = [f.name for f in dataclasses.fields(Options)]
    for name in options:
        if name not in names:
            raise unknown("option of a data folder", name, names)
    chosen = Options(**options)
    for name in chosen.further:
        if name not in FURTHER.get(task, ()):
            raise unknown(f"split of {task}", name, FURTHER.get(task, ()))
    root = Path(path)
    listing = Listing()
    found = readings(task, root, listing)
    if "train" not in found:
        raise UserError(no_training(task, root))
    parts: dict[str, list[Example]] = {}
    for name in (*SPLITS, *chosen.further):
        if name in found:
            reading = found[name]()
            parts[name] = present(reading, name, root, listing)
            _log_left_out(reading, parts[name], name, root, listing)
        elif name in chosen.further:
            raise UserError(f"{root} has no {name} split of {task}: its file is not there")
    further = {name: parts.pop(name) for name in chosen.further}
    parts, divided = arrange(parts, root, seed, chosen)
    if divided:
        log.warning("%s: %s", root, divided)
    texts = [example.text for example in parts["train"]]
    tokenizer = chosen.tokenizer
    if isinstance(tokenizer, str):
        tokenizer = tokenizers.make(
            tokenizer, texts, min_count=chosen.min_count, max_size=chosen.max_words
        )
    longest = max(map(tokenizer.length, texts))
    length = chosen.text_length or max(3, min(longest, chosen.max_text_length))
    made: dict[str, type[TaskData]] = {"snli_ve": SnliVe, "nlvr2": Nlvr2, "coco": Coco}
    classes: tuple[str, ...] = {"snli_ve": SNLI_VE_CLASSES, "nlvr2": NLVR2_CLASSES}.get(task, ())
    if task == "vqa":
        made["vqa"] = FolderVqa
        classes = answer_set((example.answers for example in parts["train"]), chosen.answers)
    splits = {
        name: _split(task, name, part, tokenizer, length, chosen, classes)
        for name, part in (parts | further).items()
    }
    return made[task](
        tokenizer=tokenizer,
        text_length=length,
        image_size=chosen.image_size,
        channels=3,
        classes=classes,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        further={name: splits[name] for name in further},
    )


def readings(task: str, root: Path, listing: Listing) -> Readings:
    """The splits that a folder has, none of them read yet.

    Raises:
        UserError: There is no such folder, it may not be read, or not all shards of a pattern.
    """
    if not root.is_dir() and not (task == "coco" and shards.is_shards(str(root))):
        raise UserError(f"no data folder {root}: give the folder that holds the {task} data set")
    try:
        return READERS[task](root, listing)
    except OSError as error:
        raise UserError(f"cannot read {root}: {error.strerror}") from error


def no_training(task: str, root: Path) -> str:
    """What is wrong with a folder without training annotations, and what may have been meant."""
    below = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    said = f"no training annotations in {root}: {TRAINING_FILES[task]} must be there"
    for folder in (*below, root.parent):
        if _trains(task, folder):
            return f"{said}; give {folder}, which has them"
    others = [other for other in READERS if other != task and _trains(other, root)]
    return f"{said}; what is there is of --task {others[0]}" if others else said


def _trains(task: str, folder: Path) -> bool:
    try:
        return "train" in READERS[task](folder, Listing())
    except (UserError, OSError):
        return False


def present(reading: Reading, name: str, root: Path, listing: Listing) -> list[Example]:
    """The examples of a split all of whose images are there.

    Raises:
        UserError: The split is empty, or none of its images is there.
    """
    if not reading.examples:
        raise UserError(f"the {name} split of {root} is empty: its files hold no example")
    there = [e for e in reading.examples if all(image in listing for image in e.images)]
    if not there:
        absent = _first_absent(reading.examples, listing)
        if isinstance(absent, Path) and not absent.parent.is_dir():
            raise UserError(
                f"no image folder {absent.parent}: put the images of the data set there"
            )
        raise UserError(
            f"no image of the {name} split is there, the first would be {absent}: put the images "
            "of the data set there"
        )
    return there


def arrange(
    parts: Mapping[str, list[Example]], root: Path, seed: int, options: Options
) -> tuple[dict[str, list[Example]], str]:
    """Train, validation and test from what is there, train at least; and what was divided.

    Raises:
        UserError: There are too few images to divide.
    """
    held_out = [name for name in ("validation", "test") if name in parts]
    if len(held_out) == 2:
        return dict(parts), ""
    if held_out:
        divided = _divide(parts[held_out[0]], (options.validation_fraction,), seed, root)
        made = dict(zip(SPLITS, [parts["train"], *divided], strict=True))
        return made, f"divided its held-out split by image into {_sizes(made)}"
    cuts = (1 - options.held_out_fraction, options.validation_fraction)
    made = dict(zip(SPLITS, _divide(parts["train"], cuts, seed, root), strict=True))
    return made, f"only a training split; divided it by image into {_sizes(made)}"


def _log_left_out(
    reading: Reading, there: list[Example], name: str, root: Path, listing: Listing
) -> None:
    for what, count in reading.left_out.items():
        total = count + len({example.id for example in reading.examples})
        log.warning("%s: left out %d of %d %s", reading.files[0], count, total, what)
    if len(there) < len(reading.examples):
        log.warning(
            "%s: left out %d of %d %s examples whose image is not there, the first %s",
            root, len(reading.examples) - len(there), len(reading.examples), name,
            _first_absent(reading.examples, listing),
        )  # fmt: skip


def _first_absent(examples: list[Example], listing: Listing) -> ImageFile:
    return next(image for e in examples for image in e.images if image not in listing)


def _sizes(parts: dict[str, list[Example]]) -> str:
    return ", ".join(f"{len(parts[name])} {name}" for name in SPLITS)


def _divide(
    examples: list[Example], cuts: Sequence[float], seed: int, root: Path
) -> list[list[Example]]:
    """Groups in hashed order, cut in two at each fraction of what is left; no part is empty."""
    groups = {example.group for example in examples}
    if len(groups) <= len(cuts):
        raise UserError(
            f"{root} has {len(groups)} image(s) to divide into {len(cuts) + 1} splits: "
            "it needs one for each at least"
        )
    order = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
    part_of: dict[str, int] = {}
    for number, fraction in enumerate(cuts):
        spare = len(cuts) - number
        size = min(max(1, round(fraction * len(order))), len(order) - spare)
        part_of.update(dict.fromkeys(order[:size], number))
        order = order[size:]
    part_of.update(dict.fromkeys(order, len(cuts)))
    divided: list[list[Example]] = [[] for _ in range(len(cuts) + 1)]
    for example in examples:
        divided[part_of[example.group]].append(example)
    return divided


def _split(
    task: str,
    name: str,
    examples: list[Example],
    tokenizer: tokenizers.Tokenizer,
    length: int,
    options: Options,
    classes: Sequence[str],
) -> Split:
    number: dict[ImageFile, int] = {}
    for example in examples:
        for image in example.images:
            number.setdefault(image, len(number))
    images = FolderImages(list(number), options.preprocessing)
    text = tokenizers.encode(tokenizer, [e.text for e in examples], length, name)
    index = torch.tensor([[number[image] for image in e.images] for e in examples])
    reading: dict[str, Any] = {
        "name": name, "workers": options.workers, "image_errors": options.image_errors,
    }  # fmt: skip
    if task == "coco":
        captions: list[list[str]] = [[] for _ in number]
        for example in examples:
            captions[number[example.images[0]]].append(example.text)
        ids = {number[example.images[0]]: example.id for example in examples}
        return Split(images, text, index, references=captions, ids=list(ids.values()), **reading)
    names = [example.id for example in examples]
    if task == "vqa" and not examples[0].answers:
        return Split(images, text, index, ids=names, **reading)
    if task == "vqa":
        answer, worth = _worth([example.answers for example in examples], classes)
        kinds = [example.kind for example in examples]
        return AnswerSplit(
            images,
            text,
            index,
            answer=answer,
            worth=worth,
            classes=len(classes),
            kinds=[str(kind) for kind in kinds] if all(kinds) else None,
            ids=names,
            **reading,
        )
    labels = torch.tensor([example.label for example in examples])
    return Split(images, text, index, labels, ids=names, **reading)


def _worth(questions: Sequence[Sequence[str]], classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The classes that score and what they are worth, `[n, k]` each, filled up with zeros."""
    written = {answer: [i] for i, answer in enumerate(classes)}
    normal: dict[str, list[int]] = {}
    for i, answer in enumerate(classes):
        normal.setdefault(normalise(answer), []).append(i)
    rows = []
    for answers in questions:
        scores, differ = accepted(answers)
        known = normal if differ else written
        rows.append([(i, s) for answer, s in scores.items() for i in known.get(answer, ())])
    width = max([1, *map(len, rows)])
    filled = [row + [(0, 0.0)] * (width - len(row)) for row in rows]
    return (
        torch.tensor([[answer for answer, _ in row] for row in filled]),
        torch.tensor([[value for _, value in row] for row in filled]),
    )
