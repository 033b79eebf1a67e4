"""What every task shares: a split of examples, its batches, and the interface of a task."""

import abc
import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optima_fast.errors import UserError
from optima_fast.tasks.tokenizers import Tokenizer

Batch = dict[str, Tensor]


def unknown(what: str, name: object, names: Iterable[str]) -> UserError:
    """The error for a name that is none of `names`, with the nearest one."""
    known = sorted(names)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UserError(f"unknown {what} {name!r}{hint}; known: {', '.join(known)}")


class ImageSource(Protocol):
    """Images by index: a sequence that loads, or holds, what a batch asks for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Images `index` (int64 `[I]`) as float32 `[I, C, H, W]`."""
        ...


class ArrayImages:
    """Images in memory, handed out as (levels / 255 - mean) / std.

    Args:
        levels: uint8 `[n, C, H, W]`.
        mean, std: Of a pixel, as parts of full brightness.
    """

    def __init__(self, levels: Tensor, *, mean: float = 0.0, std: float = 1.0) -> None:
        if levels.dtype != torch.uint8 or levels.dim() != 4:
            raise ValueError(
                f"levels must be uint8 [n, C, H, W], got {levels.dtype} {tuple(levels.shape)}"
            )
        self.levels = levels
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, index: Tensor, /) -> Tensor:
        return (self.levels[index].float() / 255 - self.mean) / self.std


class Split:
    """The examples of one of train, validation and test; an example is a text and its images.

    Args:
        images: The images of the split.
        text: int64 `[n, L]`, one row an example, right-padded.
        image_index: int64 `[n]` or `[n, k]`: the k images of each example.
        target: int64 `[n]` classes, float32 `[n, classes]` scores, or None for captions.
        image_labels: Further tensors `[images, ...]` that go into each batch by image, by name.
        kinds: A name for each example's kind of text; `evaluate` then reports each kind too.
        references: Captions of each image, for captioning.
        group: Examples come in runs of `group` that show the same images; a sampler that keeps
            runs together has each image encoded once.
        name: For messages.

    Raises:
        UserError: There is no example.
        ValueError: Sizes or dtypes do not fit together.
    """

    def __init__(
        self,
        images: ImageSource,
        text: Tensor,
        image_index: Tensor,
        target: Tensor | None = None,
        *,
        image_labels: Mapping[str, Tensor] | None = None,
        kinds: Sequence[str] | None = None,
        references: Sequence[Sequence[str]] | None = None,
        group: int = 1,
        name: str = "split",
    ) -> None:
        n = len(text)
        if n == 0 or len(images) == 0:
            raise UserError(
                f"the {name} split is empty ({len(images)} images, {n} texts): "
                "it needs at least one image and one text"
            )
        image_index = image_index.reshape(n, -1) if len(image_index) == n else image_index
        fits = {
            "text": text.dim() == 2 and text.dtype == torch.int64,
            "image_index": len(image_index) == n and image_index.dtype == torch.int64,
            "target": target is None or len(target) == n,
            "kinds": kinds is None or len(kinds) == n,
            "references": references is None or len(references) == len(images),
            "group": group >= 1 and n % group == 0,
            **{key: len(v) == len(images) for key, v in (image_labels or {}).items()},
        }
        if not all(fits.values()):
            bad = ", ".join(key for key, fit in fits.items() if not fit)
            raise ValueError(
                f"the parts of the {name} split must fit {n} texts and {len(images)} images, "
                f"but not so: {bad}"
            )
        low, high = int(image_index.min()), int(image_index.max())
        if low < 0 or high >= len(images):
            raise ValueError(f"image_index must be in 0 .. {len(images) - 1}, got {low} .. {high}")
        self.images = images
        self.text = text
        self.image_index = image_index
        self.target = target
        self.image_labels = dict(image_labels or {})
        self.kinds = None if kinds is None else tuple(kinds)
        self.references = references
        self.group = group
        self.name = name

    def __len__(self) -> int:
        return len(self.text)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The examples `indices`; an image that several of them show is in the batch once.

        Returns:
            `images` float32 `[I, C, H, W]`, `text` int64 `[T, L]`, `pair_image` and `pair_text`
            int64 `[P]` with P = k T (the k pairs of an example are neighbours), `target` unless
            there is none, and the `image_labels` by image.

        Raises:
            ValueError: `indices` is not a non-empty list of integers in range.
        """
        index = torch.as_tensor(indices)
        if index.dim() != 1 or len(index) == 0 or index.is_floating_point():
            raise ValueError(
                "indices must be a non-empty list of integers, "
                f"got {index.dtype} of shape {tuple(index.shape)}"
            )
        index = index.to("cpu", torch.int64)
        if int(index.min()) < 0 or int(index.max()) >= len(self):
            raise ValueError(
                f"indices must be in 0 .. {len(self) - 1}, "
                f"got {int(index.min())} .. {int(index.max())}"
            )
        shown = self.image_index[index]
        ids, where = torch.unique(shown, return_inverse=True)
        batch = {
            "images": self.images[ids],
            "text": self.text[index],
            "pair_image": where.reshape(-1),
            "pair_text": torch.arange(len(index)).repeat_interleave(shown.shape[1]),
        }
        if self.target is not None:
            batch["target"] = self.target[index]
        batch.update({name: values[ids] for name, values in self.image_labels.items()})
        return batch

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Batch]]:
        """All examples in order: pairs of their indices and their batch; the last may be short.

        Raises:
            ValueError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        for start in range(0, len(self), batch_size):
            index = torch.arange(start, min(start + batch_size, len(self)))
            yield index, self.batch(index)


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


def to_device(batch: Mapping[str, Tensor], device: torch.device | str) -> Batch:
    """The batch with every tensor on `device`."""
    return {name: value.to(device) for name, value in batch.items()}


def mean_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of `[rows, classes]` logits at temperature 1, mean over rows.

    sum_c p_t(c) (log p_t(c) - log p_s(c)), in float32 or wider; the teacher gets no gradient.
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student = F.log_softmax(student_logits, dim=-1, dtype=wide)
    teacher = F.log_softmax(teacher_logits.detach(), dim=-1, dtype=wide)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / max(len(student), 1)


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

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for captions."""
        return len(self.classes)

    @abc.abstractmethod
    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Prediction loss: a scalar, the mean over examples or counted tokens."""

    @abc.abstractmethod
    def divergence(
        self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """KL(teacher || student) at temperature 1 (Eq. 1), the same mean as `loss`."""

    @abc.abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        split: Split,
        *,
        batch_size: int = 256,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """Metrics of `model` on `split`, `metric_name` among them."""

    @abc.abstractmethod
    def baselines(self) -> dict[str, float]:
        """`majority` and `text_only` on the test split, fitted on the training split alone."""


class Classification(TaskData):
    """Tasks that choose one class: a row of scores per example says what each class is worth."""

    metric_name: ClassVar[str] = "accuracy"

    @abc.abstractmethod
    def scores(self, split: Split) -> Tensor:
        """What predicting each class is worth: float32 `[examples, classes]` in 0 .. 1."""

    def divergence(
        self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """KL(teacher || student) over the classes at temperature 1, mean over examples (Eq. 1)."""
        return mean_kl(student_logits, teacher_logits)

    def evaluate(
        self,
        model: nn.Module,
        split: Split,
        *,
        batch_size: int = 256,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """Mean score of the class with the largest logit, and the mean loss.

        Returns:
            `accuracy`, `loss`, and `accuracy/<kind>` where the split names kinds.
        """
        loss, predicted = 0.0, torch.empty(len(split), dtype=torch.int64)
        with evaluating(model):
            for index, batch in split.batches(batch_size):
                batch = to_device(batch, device)
                logits = model(batch).logits
                loss += float(self.loss(logits, batch)) * len(index)
                predicted[index] = logits.argmax(-1).cpu()
        gained = self.scores(split).gather(1, predicted[:, None])[:, 0].double()
        result = {"accuracy": float(gained.mean()), "loss": loss / len(split)}
        for kind in sorted(set(split.kinds or ())):
            chosen = torch.tensor([k == kind for k in split.kinds or ()])
            result[f"accuracy/{kind}"] = float(gained[chosen].mean())
        return result

    def baselines(self) -> dict[str, float]:
        """Accuracies on the test split of two predictors that never see an image.

        `majority` always gives the class that scores most in training. `text_only` is the stronger
        of the class that scores most with the same text in training, and a logistic regression on
        the words of at most 20,000 training texts (scikit-learn).
        """
        train, test = self.scores(self.train), self.scores(self.test)
        majority = int(train.sum(0).argmax())
        by_text = _best_by_text(self.train.text, train, self.test.text, majority)
        by_words = _best_by_words(self.train.text, train, self.test.text, len(self.tokenizer))

        def accuracy(predicted: Tensor) -> float:
            return float(test.gather(1, predicted[:, None]).double().mean())

        return {
            "majority": float(test[:, majority].double().mean()),
            "text_only": max(accuracy(by_text), accuracy(by_words)),
        }


class SingleLabel(Classification):
    """Classification with one right class an example: targets are int64 `[T]`."""

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross entropy of `logits` `[T, classes]` with the classes, mean over examples."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), batch["target"])

    def scores(self, split: Split) -> Tensor:
        """1 for the right class, 0 for the others."""
        assert split.target is not None
        return F.one_hot(split.target, self.num_classes).float()


def _best_by_text(text: Tensor, scores: Tensor, asked: Tensor, otherwise: int) -> Tensor:
    """Class with the largest sum of scores for the very same text, `otherwise` if it is new."""
    known, where = torch.unique(text, dim=0, return_inverse=True)
    total = torch.zeros(len(known), scores.shape[1]).index_add_(0, where, scores)
    best = {tuple(t): int(c) for t, c in zip(known.tolist(), total.argmax(1), strict=True)}
    return torch.tensor([best.get(tuple(t), otherwise) for t in asked.tolist()])


def _best_by_words(
    text: Tensor, scores: Tensor, asked: Tensor, words: int, limit: int = 20_000
) -> Tensor:
    """Logistic regression from word counts to the class with the largest score."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    def counts(rows: Tensor) -> Any:
        n, length = rows.shape
        where = np.repeat(np.arange(n), length)
        ones = np.ones(n * length, dtype=np.float64)
        return csr_matrix((ones, (where, rows.reshape(-1).numpy())), shape=(n, words))

    stride = -(-len(text) // limit)
    text, label = text[::stride], scores[::stride].argmax(1).numpy()
    if len(np.unique(label)) == 1:
        return torch.full((len(asked),), int(label[0]))
    fit: Callable[..., Any] = LogisticRegression(max_iter=200).fit
    return torch.from_numpy(fit(counts(text), label).predict(counts(asked)).astype(np.int64))
