"""Questions of one's own to a trained student: image files and texts in, answers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.models.generate import greedy
from optima_fast.tasks import canvases
from optima_fast.tasks.base import evaluating
from optima_fast.tasks.images import Preprocessing
from optima_fast.tasks.split import to_device
from optima_fast.tasks.text import Vocabulary, tokenize
from optima_fast.training.run import Run


@dataclass(frozen=True)
class Question:
    """What a student is asked.

    Attributes:
        images: one file, two for NLVR2: the left one and the right one.
        text: a question, or a statement to judge; "" for a caption.
    """

    images: tuple[Path, ...]
    text: str = ""


@dataclass(frozen=True)
class Answer:
    """What a student says.

    Attributes:
        text: a class, an answer or a caption.
        probability: what the student gives it; of a caption, the product over its tokens.
    """

    text: str
    probability: float


class Student:
    """A run's student, to be asked about image files.

    Args:
        run: where it is described.
        device: where it runs.

    Raises:
        UserError: the run is not finished, or its files are damaged.
    """

    def __init__(self, run: Run, device: torch.device | str = "cpu") -> None:
        self.task, self.classes = run.task(), run.classes()
        self.images = 2 if self.task == "nlvr2" else 1
        reading = run.reading()
        self.tokenizer, self.length = reading["tokenizer"], int(reading["text_length"])
        # the built-in data is not read from files and leaves no word on its pixels
        grey = {"mean": (canvases.MEAN,) * 3, "std": (canvases.STD,) * 3, "resize": "shortest"}
        self.channels = run.model_config().image_channels
        self.preprocessing = Preprocessing(reading["image_size"], **(run.pixels() or grey))
        self.device = device
        self.model = run.load_student().to(device)

    def check(self, question: Question) -> None:
        """Raise unless this can be asked; the files are not opened.

        Raises:
            UserError: a number of images that the task does not take, a text that is missing or
                not wanted, or no such file.
        """
        if len(question.images) != self.images:
            wanted = {1: "one image", 2: "two images, the left and the right one"}[self.images]
            given = ", ".join(map(str, question.images)) or "none"
            raise UserError(f"a student of {self.task} is shown {wanted}, got {given}")
        if self.task == "coco" and question.text:
            raise UserError(
                f"a student of coco writes captions: leave the text out, got {question.text!r}"
            )
        if self.task != "coco" and not tokenize(question.text):
            what = "a question" if self.task == "vqa" else "a statement"
            raise UserError(
                f"a student of {self.task} needs {what} about {question.images[0]}, got "
                f"{question.text!r}"
            )
        for path in question.images:
            if not path.is_file():
                raise UserError(f"no image file {path}")

    def remarks(self, text: str) -> list[str]:
        """What of a text the student does not take in: words it never saw, an end that is cut."""
        said, words = [], self.tokenizer
        if isinstance(words, Vocabulary):  # others know any word by its pieces
            strange = [word for word in tokenize(text) if words.id(word) == words.unk_id]
            said += [f"the student never saw {', '.join(strange)}: {text!r}"] if strange else []
        if words.length(text) > self.length:
            said.append(f"the student reads {self.length - 2} tokens, the rest is cut: {text!r}")
        return said

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question, from a single batch; a file that several show is read once.

        Raises:
            UserError: an image that cannot be read.
        """
        files = list(dict.fromkeys(path for asked in questions for path in asked.images))
        images = torch.stack([self._pixels(path) for path in files])
        shown = [files.index(path) for asked in questions for path in asked.images]
        return self.answers(
            {
                "images": images,
                "text": self.tokenizer.encode_all([q.text for q in questions], self.length),
                "pair_image": torch.tensor(shown),
                "pair_text": torch.arange(len(questions)).repeat_interleave(self.images),
            }
        )

    def answers(self, batch: Mapping[str, Tensor]) -> list[Answer]:
        """One answer an example of a batch, as :meth:`optima_fast.tasks.Split.batch` makes it."""
        batch = to_device(batch, self.device)
        with evaluating(self.model):
            if self.task == "coco":
                return self._captions(batch["images"][batch["pair_image"]])
            best = self.model(batch).logits.float().softmax(-1).max(-1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Answer(self.classes[i], value) for i, value in pairs]

    def _pixels(self, path: Path) -> Tensor:
        pixels = self.preprocessing.normalise(self.preprocessing.read(path))
        # a grey picture has three channels alike, of a coloured one the brightest counts
        return pixels if self.channels == 3 else pixels.amax(0, keepdim=True)

    def _captions(self, images: Tensor) -> list[Answer]:
        words = self.tokenizer
        written = greedy(
            self.model,
            images,
            bos_id=words.bos_id,
            eos_id=words.eos_id,
            max_length=self.length,
        )
        logits, following = self.model({"images": images, "text": written}).logits, written[:, 1:]
        each = logits.float().log_softmax(-1).gather(-1, following[..., None])[..., 0]
        total = each.masked_fill(following == words.pad_id, 0).sum(1).exp().tolist()
        return [
            Answer(words.decode(row), value)
            for row, value in zip(written.cpu(), total, strict=True)
        ]
