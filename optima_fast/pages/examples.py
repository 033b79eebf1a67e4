"""Test examples with their images, and what the models of a run answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from numpy.typing import NDArray

from optima_fast.errors import UserError
from optima_fast.pages import html
from optima_fast.pages.records import Group, Record, Task
from optima_fast.tasks import Split, TaskData
from optima_fast.tasks.base import Classification
from optima_fast.tasks.images import FolderImages
from optima_fast.tasks.split import ArrayImages
from optima_fast.training import experiment
from optima_fast.training.asking import Student
from optima_fast.training.run import Run

ASKED = 64  # examples of different images among which the shown ones are looked for


@dataclass(frozen=True)
class Said:
    """What a model says of an example.

    Attributes:
        text: its answer.
        right: whether it is; ``None`` of captions, which are neither.
        probability: what the model gives it, where that is known.
    """

    text: str
    right: bool | None = None
    probability: float | None = None


@dataclass(frozen=True)
class Example:
    """An example, and what each model says of it.

    Attributes:
        images: levels ``[H, W]`` or ``[H, W, 3]``.
        text: a question or a statement; "" for a caption.
        answer: what is right.
        said: by the model's name.
    """

    images: tuple[NDArray[np.uint8], ...]
    text: str
    answer: str
    said: Mapping[str, Said]


def of_task(task: Task, each: int) -> str:
    """The part of a page with ``each`` right and as many wrong answers, or why there is none.

    Raises:
        UserError: there is none, though it was said where the data is.
    """
    head = f"<h2>{escape(task.name)}: examples of the test split</h2>"
    first = task.groups[0].records[0]
    try:
        data = data_of(first)
        found, missing = ask(task, data, each)
    except UserError as error:
        if first.run.moved is not None:
            raise
        return head + html.paragraph(f"No examples are shown: {error}.", "quiet")
    name = _name(task.groups[0])
    rule = (
        f"The first {2 * each} images of the test split and their captions."
        if data.task == "coco"
        else f"The first {each} that {name} answers rightly and the first {each} that it answers "
        f"wrongly, among the first texts of the first {ASKED} different images; fewer where there "
        "are not as many. The percentage is the probability that a model gives its answer."
    )
    parts = [html.paragraph(rule, "quiet")]
    parts += [html.paragraph(f"{why}.", "quiet") for why in missing]
    return head + "".join(parts) + gallery(found)


def data_of(record: Record) -> TaskData:
    """The data that a run was trained on.

    Raises:
        UserError: it is not at hand, or its test split has changed.
    """
    data = experiment.data_of(record.run, dataclasses.replace(record.config, workers="0"))
    _check(record.run, data)
    return data


def _check(run: Run, data: TaskData) -> None:
    """Raise unless the run was measured on this test split."""
    run.check_fits(data)
    known = run.data().get("test")
    if known is not None and known["sha256"] != data.test.digest():
        raise UserError(f"{run.folder} was measured on another test split than the data has now")


def ask(task: Task, data: TaskData, each: int) -> tuple[list[Example], list[str]]:
    """Choose examples by the answers of the first run, and ask one student of each method.

    Returns:
        The examples, and of models that cannot be asked, why.

    Raises:
        UserError: the first run's student or its images cannot be read.
    """
    first, split, truth = task.groups[0].records[0], data.test, Truth(data)
    device = experiment.prepare(dataclasses.replace(first.config, device="auto"))
    models, missing = {_name(task.groups[0]): Student(first.run, device)}, []
    rows = first_rows(split)
    loaded = split.load(torch.tensor(rows))
    if not loaded.batch:
        raise UserError(f"none of the first {len(rows)} images of the test split can be read")
    answers = next(iter(models.values())).answers(loaded.batch)
    asked = zip(loaded.index.tolist(), answers, strict=True)
    chosen = choose({row: truth.right(row, answer.text) for row, answer in asked}, each)
    for group in task.groups[1:]:
        try:
            _check(group.records[0].run, data)
            models[_name(group)] = Student(group.records[0].run, device)
        except UserError as error:
            missing.append(f"{group.label} is not asked: {error}")
    taught = [g.records[0] for g in task.groups if g.records[0].config.method != "finetune"]
    teacher = next(filter(None, (teacher_of(record, data) for record in taught)), None)
    if teacher is None and taught:
        missing.append("The teacher is not asked: there is no run of it at hand")
    if teacher is not None:
        models = {"teacher": Student(teacher, device), **models}
    batch = split.batch(chosen)
    said = {name: model.answers(batch) for name, model in models.items()}
    examples = [
        truth.example(
            row,
            {name: answer[i].text for name, answer in said.items()},
            {name: answer[i].probability for name, answer in said.items()},
        )
        for i, row in enumerate(chosen)
    ]
    return examples, missing


class Truth:
    """What is right in the test split."""

    def __init__(self, data: TaskData) -> None:
        self.data = data
        self.worth = data.worth(data.test) if isinstance(data, Classification) else None

    def answer(self, row: int) -> str:
        """The best answer; of a caption, the first reference."""
        if self.worth is None:
            image = int(self.data.test.image_index[row].view(-1)[0])
            references = self.data.test.references
            return references[image][0] if references is not None else ""
        classes, worth = (part[row] for part in self.worth)
        return self.data.classes[int(classes[worth.argmax()])] if worth.any() else ""

    def right(self, row: int, said: str) -> bool | None:
        """Whether an answer is worth more than a half; ``None`` of captions."""
        if self.worth is None:
            return None
        classes, worth = (part[row].tolist() for part in self.worth)
        pairs = zip(classes, worth, strict=True)
        return any(self.data.classes[c] == said and value > 0.5 for c, value in pairs)

    def example(
        self, row: int, said: Mapping[str, str], probabilities: Mapping[str, float] | None = None
    ) -> Example:
        """A row of the test split with what each model says of it."""
        split, known = self.data.test, probabilities or {}
        return Example(
            tuple(levels(split, number) for number in split.image_index[row].view(-1).tolist()),
            "" if split.references is not None else self.data.tokenizer.decode(split.text[row]),
            self.answer(row),
            {n: Said(text, self.right(row, text), known.get(n)) for n, text in said.items()},
        )


def first_rows(split: Split) -> list[int]:
    """The first example of each of the first ``ASKED`` different images, or pairs of them."""
    seen: dict[tuple[int, ...], int] = {}
    for row, shown in enumerate(split.image_index.tolist()):
        seen.setdefault(tuple(shown) if isinstance(shown, list) else (shown,), row)
        if len(seen) == ASKED:
            break
    return list(seen.values())


def choose(right: Mapping[int, bool | None], each: int) -> list[int]:
    """The first examples: ``each`` that are right and ``each`` wrong, or twice as many captions."""
    if None in right.values():
        return list(right)[: 2 * each]
    wanted = [
        [row for row, is_right in right.items() if is_right == kind] for kind in (True, False)
    ]
    return [row for rows in wanted for row in rows[:each]]


def teacher_of(record: Record, data: TaskData) -> Run | None:
    """The run of a run's teacher, where it is known, still there and of this data."""
    run = record.run.teacher()
    try:
        if run is not None:
            run.check_fits(data)
            run.check_weights()
    except UserError:
        return None
    return run


def levels(split: Split, number: int) -> NDArray[np.uint8]:
    """An image as it is shown: ``[H, W]``, or ``[H, W, 3]`` of a file."""
    images = split.images
    if isinstance(images, ArrayImages):
        array: NDArray[np.uint8] = images.levels[number, 0].numpy()
        return array
    assert isinstance(images, FolderImages)
    pixels = images.preprocessing.read(images.paths[number])
    array = pixels.mul(255).round().byte().permute(1, 2, 0).numpy()
    return array


def gallery(examples: Sequence[Example]) -> str:
    """Examples side by side."""
    return f'<div class="examples">{"".join(map(_figure, examples))}</div>'


def _figure(example: Example) -> str:
    alt = f"test image of: {example.text or example.answer}"
    images = "".join(html.image(image, alt) for image in example.images)
    lines = [f"&ldquo;{escape(example.text)}&rdquo;"] if example.text else []
    lines.append(f"right answer: <b>{escape(example.answer)}</b>" if example.text else
                 f"a person: {escape(example.answer)}")  # fmt: skip
    lines += [f"{escape(name)}: {_said(said)}" for name, said in example.said.items()]
    kind = ' class="two"' if len(example.images) > 1 else ""
    return f"<figure{kind}>{images}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def _said(said: Said) -> str:
    shown = escape(said.text)
    if said.right is not None:
        kind, word = ("right", "right") if said.right else ("wrong", "wrong")
        shown = f'<span class="{kind}">{shown} ({word})</span>'
    return shown if said.probability is None else f"{shown} {said.probability:.0%}"


def _name(group: Group) -> str:
    return f"{group.label}, seed {group.records[0].config.seed}"
