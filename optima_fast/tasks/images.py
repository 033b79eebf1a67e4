"""Images from files, decoded when a batch asks for them, as CLIP models expect them."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.models.pretrained import MEAN, STD
from optima_fast.tasks.shards import Member

__all__ = ["Augment", "FolderImages", "Preprocessing", "UnreadableImages"]

RESIZES = ("shortest", "longest", "squash")
MAX_ASPECT = 100  # a thinner image is a damaged header, and would be scaled to gigabytes

# What Pillow raises for files that are cut short, damaged, or no images.
_DECODING = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)

Augment = Callable[[Tensor, int], Tensor]  # pixels [3, S, S] in 0 .. 1 and the image's number


class UnreadableImages(UserError):
    """Images that cannot be read.

    Attributes:
        errors: What is wrong with each, by its number.
    """

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__(errors)
        self.errors = errors

    def __str__(self) -> str:
        return f"{next(iter(self.errors.values()))}; --image-errors skip leaves out what shows it"


@dataclass(frozen=True)
class Preprocessing:
    """From a file to what a model sees; the defaults are CLIP's.

    The steps and their rounding are open_clip's for evaluation: bicubic scaling in the file's own
    mode, crop or padding, RGB (transparency dropped), (levels / 255 - mean) / std. Only 16-bit
    grey, which would be white there, keeps its range.

    Attributes:
        size: S, height and width that an image is brought to, at least 1.
        mean, std: Of red, green and blue, as parts of full brightness.
        resize: What is scaled to S: the "shortest" side (the longer one is cropped), the "longest"
            (the shorter one is padded with 0), or both ("squash").

    Raises:
        ValueError: A value out of range.

    Source: open_clip 3.3.0, `image_transform`; Radford et al., 2021.
    """

    size: int
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    resize: str = "shortest"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {self.resize!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise ValueError(
                "mean and std must be three numbers each, and std above 0, "
                f"got {self.mean} and {self.std}"
            )

    def read(self, path: Path | Member) -> Tensor:
        """The pixels of an image before normalisation: float32 `[3, S, S]` in 0 .. 1.

        Raises:
            UserError: The file is missing, unreadable, truncated or not an image.
        """
        try:
            with path.open("rb") as file, Image.open(file) as image:
                levels = np.array(_rgb(self._square(image)))
        except FileNotFoundError as error:
            raise UserError(f"no image file {path}") from error
        except _DECODING as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"cannot read the image {path}: {reason}") from error
        return torch.from_numpy(levels).permute(2, 0, 1).float().div(255).contiguous()

    def normalise(self, pixels: Tensor) -> Tensor:
        """(pixels - mean) / std of float32 `[..., 3, S, S]`."""
        mean, std = (torch.tensor(value)[:, None, None] for value in (self.mean, self.std))
        return (pixels - mean) / std

    def _square(self, image: Image.Image) -> Image.Image:
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        size, (width, height) = self.size, image.size
        if self.resize == "squash":
            return _scale(image, (size, size))
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(
                f"{width} x {height} pixels, more than {MAX_ASPECT} times as long as wide"
            )
        if self.resize == "shortest":
            short = min(width, height)
            image = _scale(image, (int(size * width / short), int(size * height / short)))
            left, top = (round((side - size) / 2) for side in image.size)
            return image.crop((left, top, left + size, top + size))
        ratio = max(width, height) / size
        image = _scale(image, (max(1, round(width / ratio)), max(1, round(height / ratio))))
        left, top = ((size - side) // 2 for side in image.size)
        return image.crop((-left, -top, size - left, size - top))


class FolderImages:
    """The images of a split, decoded when they are asked for: `images[index]` reads just these.

    Args:
        paths: One file, or member of a tar file, an image.
        preprocessing: From file to tensor.
    """

    def __init__(self, paths: Sequence[Path | Member], preprocessing: Preprocessing) -> None:
        self.paths = tuple(paths)
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """`load` without augmentation."""
        return self.load(index)

    def load(self, index: Tensor, augment: Augment | None = None) -> Tensor:
        """Images `index` (int64 `[I]`) as float32 `[I, 3, S, S]`, normalised.

        Args:
            index: Numbers of images.
            augment: Applied to each before it is normalised.

        Raises:
            UnreadableImages: Those of them that cannot be read.
        """
        size, images, errors = self.preprocessing.size, [], {}
        for number in index.tolist():
            try:
                pixels = self.preprocessing.read(self.paths[number])
            except UserError as error:
                errors[number] = str(error)
                continue
            images.append(pixels if augment is None else augment(pixels, number))
        if errors:
            raise UnreadableImages(errors)
        stacked = torch.stack(images) if images else torch.empty(0, 3, size, size)
        return self.preprocessing.normalise(stacked)


def _scale(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
