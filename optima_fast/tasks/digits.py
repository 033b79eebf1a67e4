"""The built-in data `digits`: all four tasks on canvases of real handwritten digits.

Examples come in runs of `texts_per_image` about the same canvas (or pair of canvases), so that
one image encoding serves several texts. Each batch also holds `cells`, int64 `[I, 4]`: for each
image and cell (`PLACES`) the digit that can be seen there, or `EMPTY` where the cell is empty or
covered. No task loss uses it: it is for a first stage that teaches an image encoder to tell the
digits apart (`CELL_CLASSES` classes for the tokens of each cell), without which a teacher stays on
a plateau.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optima_fast.errors import UserError, unknown
from optima_fast.tasks import digits_language as language
from optima_fast.tasks.base import TaskData
from optima_fast.tasks.canvases import (
    CANVAS,
    CELL_CLASSES,
    EMPTY,
    PLACES,
    Canvases,
    Rng,
    compose,
    generator,
)
from optima_fast.tasks.coco import Coco
from optima_fast.tasks.nlvr2 import CLASSES as NLVR2_CLASSES
from optima_fast.tasks.nlvr2 import Nlvr2
from optima_fast.tasks.snli_ve import CLASSES as SNLI_VE_CLASSES
from optima_fast.tasks.snli_ve import SnliVe
from optima_fast.tasks.split import Split
from optima_fast.tasks.text import Vocabulary, tokenize
from optima_fast.tasks.vqa import Vqa, soft_scores

__all__ = ["CELL_CLASSES", "EMPTY", "PLACES", "Options", "load"]

TASKS: Mapping[str, tuple[type[TaskData], tuple[str, ...]]] = {
    "vqa": (Vqa, language.ANSWERS),
    "snli_ve": (SnliVe, SNLI_VE_CLASSES),
    "nlvr2": (Nlvr2, NLVR2_CLASSES),
    "coco": (Coco, ()),
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {"coco": {"texts_per_image": 5}}
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Options:
    """Sizes and kinds of the built-in data.

    Attributes:
        train_images, validation_images, test_images: Canvases per split.
        texts_per_image: Questions, statements or captions about a canvas, or sentences about a
            pair; by default 4, for captions 5.
        noise: Standard deviation of the noise, as a part of full brightness.
        annotator_error: How often a simulated annotator draws an answer by chance (vqa).
        kinds: Kinds of texts to use; None for all of the task's.
    """

    train_images: int = 20_000
    validation_images: int = 1_000
    test_images: int = 2_000
    texts_per_image: int = 4
    noise: float = 0.05
    annotator_error: float = 0.05
    kinds: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("train_images", "validation_images", "test_images", "texts_per_image"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(
                    f"{name} of the built-in data must be an integer >= 1, got {value!r}"
                )
        for name in ("noise", "annotator_error"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 <= value <= 1
            ):
                raise UserError(f"{name} of the built-in data must be in 0 .. 1, got {value!r}")


KINDS: Mapping[str, tuple[str, ...]] = {
    "vqa": tuple(language.QUESTIONS),
    "snli_ve": tuple(dict.fromkeys(claim.kind for claim in language.STATEMENTS)),
    "nlvr2": tuple(dict.fromkeys(claim.kind for claim in language.SENTENCES)),
    "coco": ("caption",),
}
COVERS = {"snli_ve": (0, 1)}  # covered cells of a canvas, drawn from these


@dataclasses.dataclass(frozen=True)
class _Said:
    """What is said about the canvases of a split, `rows` of examples about the same images."""

    texts: list[str]
    rows: Tensor  # int64 [rows, k], the images of a row
    kinds: list[str] | None = None
    target: Tensor | None = None
    references: list[list[str]] | None = None


def _say(task: str, canvases: Canvases, options: Options, rng: Rng) -> _Said:
    """The texts and targets of a task on given canvases."""
    per, own = options.texts_per_image, torch.arange(len(canvases))[:, None]
    kinds = options.kinds or KINDS[task]
    if task == "coco":
        written = language.captions(canvases, per, rng)
        return _Said([text for group in written for text in group], own, references=written)
    if task == "vqa":
        named, texts, votes = language.questions(canvases, kinds, per, options.annotator_error, rng)
        return _Said(texts, own, named, soft_scores(votes))
    if task == "snli_ve":
        said = [claim for claim in language.STATEMENTS if claim.kind in kinds]
        rows, named, texts, label = language.claims(said, (canvases,), 3, per, rng)
    else:
        said = [claim for claim in language.SENTENCES if claim.kind in kinds]
        own = own[: len(own) // 2 * 2].view(-1, 2)
        views = (canvases.take(own[:, 0].numpy()), canvases.take(own[:, 1].numpy()))
        rows, named, texts, label = language.claims(said, views, 2, per, rng)
    return _Said(texts, own[rows], named, torch.from_numpy(label))


def load(task: str, *, seed: int = 0, **options: Any) -> TaskData:
    """A task on the built-in data.

    Args:
        task: "vqa", "snli_ve", "nlvr2" or "coco".
        seed: Of every canvas and text; the scans of each split are the same for all seeds.
        options: Fields of `Options`.

    Raises:
        UserError: An unknown task, option or kind, or a value out of range.
    """
    if task not in KINDS:
        raise unknown("task", task, KINDS)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed must be an integer >= 0, got {seed!r}")
    chosen = _options(task, options)
    said, drawn = {}, {}
    for number, name in enumerate(SPLITS):
        stream = (seed, list(KINDS).index(task), number)
        n = getattr(chosen, f"{name}_images")
        covers = COVERS.get(task, (0,))
        drawn[name] = compose(n, name, generator(*stream, 0), noise=chosen.noise, covers=covers)
        said[name] = _say(task, drawn[name], chosen, generator(*stream, 1))
    tokenizer = Vocabulary.build(said["train"].texts)
    length = max(len(tokenize(text)) for part in said.values() for text in part.texts) + 2
    splits = {
        name: Split(
            drawn[name].images(),
            tokenizer.encode_all(part.texts, length),
            part.rows.repeat_interleave(chosen.texts_per_image, 0),
            part.target,
            image_labels={"cells": drawn[name].cells()},
            kinds=part.kinds,
            references=part.references,
            group=chosen.texts_per_image,
            name=name,
        )
        for name, part in said.items()
    }
    made, classes = TASKS[task]
    return made(
        tokenizer=tokenizer,
        text_length=length,
        image_size=CANVAS,
        channels=1,
        classes=classes,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
    )


def _options(task: str, given: Mapping[str, Any]) -> Options:
    names = [f.name for f in dataclasses.fields(Options)]
    for name in given:
        if name not in names:
            raise unknown("option of the built-in data", name, names)
    options = Options(**{**DEFAULTS.get(task, {}), **given})
    kinds, known = options.kinds, KINDS[task]
    if kinds is not None:
        for kind in kinds:
            if kind not in known:
                raise unknown(f"kind of {task} text", kind, known)
        if not kinds or len(set(kinds)) != len(kinds):
            raise UserError(f"kinds must be distinct and at least one, got {kinds}")
    texts = {
        "vqa": len(kinds or known),
        "snli_ve": sum(claim.kind in (kinds or known) for claim in language.STATEMENTS),
        "nlvr2": sum(claim.kind in (kinds or known) for claim in language.SENTENCES),
    }.get(task)
    if texts is not None and options.texts_per_image > texts:
        raise UserError(
            f"texts_per_image must be at most {texts}, the different texts of {task} "
            f"with kinds {kinds or known}, got {options.texts_per_image}"
        )
    if task == "nlvr2":
        for name in SPLITS:
            if getattr(options, f"{name}_images") < 2:
                raise UserError(
                    f"{name}_images must be at least 2 for nlvr2, which shows pairs, got 1"
                )
    return options
