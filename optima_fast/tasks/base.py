"""What every task shares: its interface, predictions and metrics."""

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optima_fast.errors import unknown
from optima_fast.tasks import blind
from optima_fast.tasks.split import Split, to_device
from optima_fast.tasks.tokenizers import Tokenizer


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def mean_kl(student_logits: Tensor, teacher_logits: Tensor, counts: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of `[..., classes]` logits at temperature 1, mean over rows.

    sum_c p_t(c) (log p_t(c) - log p_s(c)), in float32 or wider; the teacher gets no gradient. The
    mean is over all rows, or those where `counts` `[...]` is True.
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student = F.log_softmax(student_logits, dim=-1, dtype=wide)
    teacher = F.log_softmax(teacher_logits.detach(), dim=-1, dtype=wide)
    rows = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    if counts is None:
        return rows.sum() / max(rows.numel(), 1)
    return torch.where(counts, rows, 0).sum() / counts.sum().clamp_min(1)


def soft_bce(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Binary cross entropy with the teacher's probabilities, one a class, of `[rows, classes]`.

    - sum_c p_t(c) log p_s(c) + (1 - p_t(c)) log(1 - p_s(c)), p the logistic function of a logit;
    mean over rows, in float32 or wider; the teacher gets no gradient.
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    target = teacher_logits.detach().to(wide).sigmoid()
    total = F.binary_cross_entropy_with_logits(student_logits.to(wide), target, reduction="sum")
    return total / max(len(student_logits), 1)


@dataclass(frozen=True)
class Predictions:
    """What a model says of a split.

    Attributes:
        texts: A class or answer an example; for captioning, a caption an image; "" for what is
            left out because its image cannot be read, or is not of the part that was asked for.
        loss: Mean loss, where it was computed.
        count: Number of examples that it is the mean of.
    """

    texts: Sequence[str]
    loss: float | None = None
    count: int = 0

    @classmethod
    def merged(cls, parts: "Sequence[Predictions]") -> "Predictions":
        """Of a whole split, from those of its parts (see `Split.part`)."""
        texts = [
            next(filter(None, said), "") for said in zip(*(p.texts for p in parts), strict=True)
        ]
        if any(p.loss is None for p in parts):
            return cls(texts)
        count = sum(p.count for p in parts)
        total = sum(p.loss * p.count for p in parts if p.loss is not None)
        return cls(texts, total / max(count, 1), count)


@dataclass(frozen=True)
class TaskData(abc.ABC):
    """A task with its data: what the trainer needs to know about either.

    Attributes:
        tokenizer: Texts and ids; what it was made from is training texts alone.
        text_length: L, the begin and end marks included.
        image_size: Height and width of an image.
        channels: 1 or 3.
        train, validation, test: The splits.
        classes: Names of the classes or answers, in the order of the logits; () for captions.
        further: Other splits by name, such as VQA's test-dev, which has no targets.
    """

    task: ClassVar[str]
    head: ClassVar[str]
    metric_name: ClassVar[str]

    tokenizer: Tokenizer
    text_length: int
    image_size: int
    channels: int
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...] = field(default=())
    further: Mapping[str, Split] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for captions."""
        return len(self.classes)

    @abc.abstractmethod
    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Prediction loss: a scalar, the mean over examples or counted tokens."""

    def counted(self, batch: Mapping[str, Tensor]) -> tuple[int, int]:
        """How many predictions of a batch `loss` is the mean over, and how many `divergence`."""
        return len(batch["text"]), len(batch["text"])

    @abc.abstractmethod
    def divergence(
        self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """KL(teacher || student) at temperature 1 (Eq. 1), mean over examples or words."""

    @abc.abstractmethod
    def predict(
        self,
        model: nn.Module,
        split: Split,
        *,
        batch_size: int = 256,
        device: torch.device | str = "cpu",
    ) -> Predictions:
        """What `model` says of each example, or image, of `split`."""

    @abc.abstractmethod
    def metrics(self, split: Split, predictions: Predictions) -> dict[str, float]:
        """Metrics of predictions of a measurable split, `metric_name` among them.

        Raises:
            ValueError: Another number of predictions.
        """

    def evaluate(
        self,
        model: nn.Module,
        split: Split,
        *,
        batch_size: int = 256,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """`metrics` of what `model` predicts on `split`.

        Raises:
            ValueError: It is not known what is right there.
        """
        if not split.measurable:
            raise ValueError(f"the {split.name} split has no targets: it can be predicted only")
        return self.metrics(split, self.predict(model, split, batch_size=batch_size, device=device))

    def split(self, name: str) -> Split:
        """A split by name: train, validation, test or one of `further`.

        Raises:
            UserError: There is none of that name.
        """
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        splits |= self.further
        if name not in splits:
            raise unknown("split", name, splits)
        return splits[name]

    @abc.abstractmethod
    def baselines(self) -> dict[str, float]:
        """`majority` and `text_only` on the test split, fitted on the training split alone."""


class Classification(TaskData):
    """Tasks that choose one class: a row of scores per example says what each class is worth."""

    metric_name: ClassVar[str] = "accuracy"

    @abc.abstractmethod
    def worth(self, split: Split) -> tuple[Tensor, Tensor]:
        """What predicting a class is worth, kept by the k classes that are worth something.

        Returns:
            int64 `[examples, k]`, the classes, and float32 `[examples, k]`, the worth of each in
            0 .. 1; 0 fills rows up.
        """

    def divergence(
        self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """KL(teacher || student) over the classes at temperature 1, mean over examples (Eq. 1)."""
        return mean_kl(student_logits, teacher_logits)

    def predict(
        self,
        model: nn.Module,
        split: Split,
        *,
        batch_size: int = 256,
        device: torch.device | str = "cpu",
    ) -> Predictions:
        """The class with the largest logit of each example; the loss where there are targets."""
        loss, count, predicted = 0.0, 0, torch.full((len(split),), -1)
        with evaluating(model):
            for index, batch in split.batches(batch_size):
                batch = to_device(batch, device)
                logits = model(batch).logits
                if split.measurable:
                    loss += float(self.loss(logits, batch)) * len(index)
                predicted[index] = logits.argmax(-1).cpu()
                count += len(index)
        texts = [self.classes[i] if i >= 0 else "" for i in predicted.tolist()]
        if not split.measurable:
            return Predictions(texts)
        return Predictions(texts, loss / max(count, 1), count)

    def metrics(self, split: Split, predictions: Predictions) -> dict[str, float]:
        """Mean worth of the predicted classes.

        Returns:
            `accuracy`, `loss` where it is known, `accuracy/<kind>` where the split names kinds, and
            `left_out`, the number of examples whose image cannot be read, if there are any.
        """
        gained, seen = self.gained(split, predictions).double(), split.readable()
        result = {"accuracy": float(gained[seen].mean())}
        if predictions.loss is not None:
            result["loss"] = predictions.loss
        for kind in sorted(set(split.kinds or ())):
            chosen = torch.tensor([k == kind for k in split.kinds or ()])
            result[f"accuracy/{kind}"] = float(gained[chosen & seen].mean())
        return result | split.left_out()

    def gained(self, split: Split, predictions: Predictions) -> Tensor:
        """What each prediction is worth, float32 `[examples]`; 0 for what is none of the classes.

        Raises:
            ValueError: Another number of examples.
        """
        number = {name: i for i, name in enumerate(self.classes)}
        predicted = torch.tensor([number.get(text, -1) for text in predictions.texts])
        return _gained(predicted, *self.worth(split))

    def baselines(self) -> dict[str, float]:
        """Mean score on the test split of two ways to answer without seeing an image.

        `majority` always gives the class that scores most in training. `text_only` is the stronger
        of the class that scores most with the same text in training, and a logistic regression on
        the words of at most 20,000 training texts, to at most 100 classes (scikit-learn).
        """
        train, test = self.worth(self.train), self.worth(self.test)
        majority = int(_by_class(*train, self.num_classes).argmax())
        said = {
            "majority": torch.full((len(self.test),), majority),
            "text": blind.best_by_text(self.train.text, *train, self.test.text, majority),
            "words": blind.best_by_words(self.train.text, *train, self.test.text),
        }
        mean = {name: float(_gained(s, *test).double().mean()) for name, s in said.items()}
        return {"majority": mean["majority"], "text_only": max(mean["text"], mean["words"])}


class SingleLabel(Classification):
    """Classification with one right class an example: targets are int64 `[T]`."""

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross entropy of `logits` `[T, classes]` with the classes, mean over examples."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), batch["target"])

    def worth(self, split: Split) -> tuple[Tensor, Tensor]:
        """1 for the right class."""
        assert split.target is not None
        return split.target[:, None], torch.ones(len(split), 1)


def _gained(predicted: Tensor, classes: Tensor, worth: Tensor) -> Tensor:
    """What `predicted` (int64 `[n]`) is worth, by classes `[n, k]` and the worth of each."""
    if len(predicted) != len(classes):
        raise ValueError(
            f"predictions must be one an example, {len(classes)}, got {len(predicted)}"
        )
    return torch.where(classes == predicted[:, None], worth, 0).sum(1)


def _by_class(classes: Tensor, worth: Tensor, size: int) -> Tensor:
    """Sum of the worth of each of `size` classes."""
    total = torch.zeros(size, dtype=torch.float64)
    return total.index_add_(0, classes.reshape(-1), worth.reshape(-1).double())
