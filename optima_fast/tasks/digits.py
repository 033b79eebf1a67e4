"""The built-in data `digits`: all four tasks on canvases of real handwritten digits.

Examples come in runs of `texts_per_image` about the same canvas (or pair of canvases), so that
one image encoding serves several texts. Each batch also holds `cells`, int64 `[I, 4]`: for each
image and cell (`PLACES`) the digit that can be seen there, or `EMPTY` where the cell is empty or
covered. No task loss uses it: it is for a first stage that teaches an image encoder to tell the
digits apart (`CELL_CLASSES` classes for the tokens of each cell), without which a teacher stays on
a plateau.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from optima_fast.errors import UserError
from optima_fast.tasks import digits_language as language
from optima_fast.tasks.base import Split, TaskData, unknown
from optima_fast.tasks.canvases import (
    CANVAS,
    CELL_CLASSES,
    EMPTY,
    PLACES,
    Canvases,
    compose,
    generator,
)
from optima_fast.tasks.text import Vocabulary, tokenize
from optima_fast.tasks.vqa import Vqa, soft_scores

__all__ = ["CELL_CLASSES", "EMPTY", "PLACES", "Options", "load"]

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Options:
    """Sizes and kinds of the built-in data.

    Attributes:
        train_images, validation_images, test_images: Canvases per split.
        texts_per_image: Questions, statements or captions about a canvas (sentences: a pair).
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


def _vqa(canvases: Canvases, options: Options, kinds: Sequence[str], seed: Sequence[int]) -> Any:
    named, texts, votes = language.questions(
        canvases, kinds, options.texts_per_image, options.annotator_error, generator(*seed)
    )
    return named, texts, soft_scores(votes)


KINDS = {"vqa": tuple(language.QUESTIONS)}


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
    names = [f.name for f in dataclasses.fields(Options)]
    for name in options:
        if name not in names:
            raise unknown("option of the built-in data", name, names)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed must be an integer >= 0, got {seed!r}")
    chosen = Options(**options)
    kinds = _kinds(task, chosen)
    parts = {}
    for number, name in enumerate(SPLITS):
        stream = (seed, list(KINDS).index(task), number)
        canvases = compose(
            getattr(chosen, f"{name}_images"), name, generator(*stream, 0), noise=chosen.noise
        )
        parts[name] = (canvases, *_vqa(canvases, chosen, kinds, (*stream, 1)))
    vocabulary = Vocabulary.build(parts["train"][2])
    length = max(len(tokenize(text)) for _, _, texts, _ in parts.values() for text in texts) + 2
    splits = {}
    for name, (canvases, named, texts, target) in parts.items():
        per = chosen.texts_per_image
        splits[name] = Split(
            canvases.images(),
            vocabulary.encode_all(texts, length),
            torch.arange(len(canvases)).repeat_interleave(per),
            target,
            image_labels={"cells": canvases.cells()},
            kinds=named,
            group=per,
            name=name,
        )
    return Vqa(
        vocabulary=vocabulary,
        text_length=length,
        image_size=CANVAS,
        channels=1,
        classes=language.ANSWERS,
        **splits,
    )


def _kinds(task: str, options: Options) -> tuple[str, ...]:
    known = KINDS[task]
    kinds = known if options.kinds is None else tuple(options.kinds)
    for kind in kinds:
        if kind not in known:
            raise unknown(f"kind of {task} text", kind, known)
    if len(set(kinds)) != len(kinds) or not kinds:
        raise UserError(f"kinds must be distinct and at least one, got {kinds}")
    if options.texts_per_image > len(kinds):
        raise UserError(
            f"texts_per_image must be at most {len(kinds)}, the number of kinds, "
            f"got {options.texts_per_image}"
        )
    return kinds
