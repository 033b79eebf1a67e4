"""A split of examples: texts, the images they show, and batches of both."""

import copy
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.tasks.images import Augment, FolderImages, UnreadableImages
from optima_fast.tasks.workers import in_order

__all__ = ["ArrayImages", "Batch", "ImageSource", "Loaded", "Split", "to_device"]

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]


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
        ids: The data set's own id of each example; of each image, for captioning.
        group: Examples come in runs of `group` that show the same images; a sampler that keeps
            runs together has each image encoded once.
        name: For messages.
        workers: Processes that `batches` and `image_batches` read images with; 0 for none.
        image_errors: "fail" where an image cannot be read, or "skip" the examples that show it.

    Attributes:
        unreadable: What is wrong with images that could not be read so far, by their number.

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
        ids: Sequence[str | int] | None = None,
        group: int = 1,
        name: str = "split",
        workers: int = 0,
        image_errors: str = "fail",
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
            "ids": ids is None or len(ids) == (n if references is None else len(images)),
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
        self._share = slice(None)
        self.images = images
        self.text = text
        self.image_index = image_index
        self.target = target
        self.image_labels = dict(image_labels or {})
        self.kinds = None if kinds is None else tuple(kinds)
        self.references = references
        self.ids = ids
        self.group = group
        self.name = name
        self.workers = workers
        self.image_errors = image_errors
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.text)

    def digest(self) -> str:
        """SHA-256 of the texts, the names of their images, and what is right."""
        total = hashlib.sha256()
        for tensor in self._tensors():
            total.update(tensor.contiguous().numpy().data)
        for said in self.references or ():
            total.update("\n".join(said).encode())
        if isinstance(self.images, FolderImages):
            total.update("\n".join(path.name for path in self.images.paths).encode())
        return total.hexdigest()

    def _tensors(self) -> list[Tensor]:
        return [self.text, self.image_index, *([] if self.target is None else [self.target])]

    @property
    def measurable(self) -> bool:
        """Whether it is known what is right; of some official test splits it is not."""
        return self.target is not None or self.references is not None

    def batch(self, indices: Sequence[int] | Tensor, augment: Augment | None = None) -> Batch:
        """The examples `indices`; an image that several of them show is in the batch once.

        Args:
            indices: Of the examples.
            augment: What is done to each image before it is normalised; for `FolderImages` alone.

        Returns:
            `images` float32 `[I, C, H, W]`, `text` int64 `[T, L]`, `pair_image` and `pair_text`
            int64 `[P]` with P = k T (the k pairs of an example are neighbours), `target` unless
            there is none, and the `image_labels` by image.

        Raises:
            ValueError: `indices` is not a non-empty list of integers in range.
            UnreadableImages: Images that cannot be read.
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
        ids, where = self.shown(index)
        if augment is None:
            images = self.images[ids]
        else:
            assert isinstance(self.images, FolderImages)
            images = self.images.load(ids, augment)
        batch = {
            "images": images,
            "text": self.text[index],
            "pair_image": where.reshape(-1),
            "pair_text": torch.arange(len(index)).repeat_interleave(where.shape[1]),
        }
        if self.target is not None:
            batch["target"] = self.target[index]
        batch.update({name: values[ids] for name, values in self.image_labels.items()})
        return batch

    def shown(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The images of a batch of examples: their numbers, and which of them each example shows.

        Int64 `[I]` and `[T, k]`.
        """
        numbers: tuple[Tensor, Tensor] = torch.unique(self.image_index[index], return_inverse=True)
        return numbers

    def load(self, indices: Tensor, augment: Augment | None = None) -> "Loaded":
        """`batch`, without the examples that show an unreadable image where these are skipped.

        Nothing is remembered or logged, so that any process may do this; see `note`.

        Raises:
            UnreadableImages: An image cannot be read, and `image_errors` is "fail".
        """
        try:
            return Loaded(indices, self.batch(indices, augment), {})
        except UnreadableImages as error:
            if self.image_errors == "fail":
                raise
            bad = torch.tensor(list(error.errors))
            kept = indices[~torch.isin(self.image_index[indices], bad).any(1)]
            return Loaded(kept, self.batch(kept, augment) if len(kept) else {}, error.errors)

    def note(self, errors: Mapping[int, str]) -> None:
        """Remember images that cannot be read, and name each once in the log."""
        for number, reason in errors.items():
            if number not in self.unreadable:
                self.unreadable[number] = reason
                log.warning("%s; what shows it is left out", reason)

    def readable(self) -> Tensor:
        """What shows no image that is known to be unreadable, bool.

        Of each example; of each image, for captioning.
        """
        bad = torch.tensor(list(self.unreadable), dtype=torch.int64)
        images = torch.arange(len(self.images))[:, None]
        return ~torch.isin(self.image_index if self.references is None else images, bad).any(1)

    def left_out(self) -> dict[str, float]:
        """`left_out`, how much is not `readable`, if anything is not."""
        count = int((~self.readable()).sum())
        return {"left_out": count} if count else {}

    def sample(self) -> Batch:
        """The batch of the first example that can be read.

        Raises:
            UserError: There is none.
        """
        for number in range(len(self)):
            loaded = self.load(torch.tensor([number]))
            if loaded.batch:
                return loaded.batch
        raise UserError(f"no image of the {self.name} split can be read")

    def part(self, number: int, parts: int) -> "Split":
        """The split, of whose `batches` and `image_batches` only every `parts`-th is there.

        Those from `number` on, 0-based. What cannot be read is remembered by both.
        """
        split = copy.copy(self)
        split._share = slice(number, None, parts)
        return split

    def _own(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        return batches[self._share]

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Batch]]:
        """All examples in order: pairs of their indices and their batch; the last may be short.

        Examples with an unreadable image are missing in both where they are skipped.

        Raises:
            ValueError: `batch_size` is below 1.
            UserError: An image cannot be read, and `image_errors` is "fail", or none can.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        parts = self._own(torch.split(torch.arange(len(self)), batch_size))
        any_read = not parts
        for loaded in in_order(self.load, parts, self.workers):
            self.note(loaded.errors)
            if loaded.batch:
                any_read = True
                yield loaded.index, loaded.batch
        if not any_read:
            raise UserError(f"no image of the {self.name} split can be read")

    def image_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, as `batches`: pairs of their numbers and float32 `[I, C, H, W]`."""
        parts = self._own(torch.split(torch.arange(len(self.images)), batch_size))
        any_read = not parts
        for numbers, images, errors in in_order(self._load_images, parts, self.workers):
            self.note(errors)
            if len(numbers):
                any_read = True
                yield numbers, images
        if not any_read:
            raise UserError(f"no image of the {self.name} split can be read")

    def _load_images(self, numbers: Tensor) -> tuple[Tensor, Tensor, dict[int, str]]:
        try:
            return numbers, self.images[numbers], {}
        except UnreadableImages as error:
            if self.image_errors == "fail":
                raise
            kept = numbers[~torch.isin(numbers, torch.tensor(list(error.errors)))]
            return kept, self.images[kept], error.errors


@dataclass(frozen=True)
class Loaded:
    """What could be loaded of a batch.

    Attributes:
        index: int64, the examples in the batch.
        batch: Their batch, empty where no example is left.
        errors: What is wrong with images that could not be read, by their number.
    """

    index: Tensor
    batch: Batch
    errors: Mapping[int, str]


def to_device(
    batch: Mapping[str, Tensor], device: torch.device | str, *, wait: bool = True
) -> Batch:
    """The batch with every tensor on `device`; a copy to CUDA is not waited for unless asked to."""
    if not wait and torch.device(device).type == "cuda":
        return {name: x.pin_memory().to(device, non_blocking=True) for name, x in batch.items()}
    return {name: value.to(device) for name, value in batch.items()}
