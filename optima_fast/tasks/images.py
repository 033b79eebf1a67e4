"""Images from files, decoded when a batch asks for them, as CLIP models expect them."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.tasks.shards import Member

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 100  # a thinner image is a damaged header, and would be scaled to gigabytes

# What Pillow raises for files that are cut short, damaged, or no images.
_DECODING = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


class FolderImages:
    """The images of a split: `images[index]` decodes just the files that `index` names.

    Args:
        paths: One file, or member of a tar file, an image.
        size: Height and width that each image is brought to, at least 1.

    Raises:
        ValueError: `size` is below 1.
    """

    def __init__(self, paths: Sequence[Path | Member], size: int) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.paths = tuple(paths)
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Images `index` (int64 `[I]`) as float32 `[I, 3, size, size]`, normalised.

        Raises:
            UserError: A file is missing or cannot be decoded.
        """
        images = [load_image(self.paths[i], self.size) for i in index.tolist()]
        return torch.stack(images) if images else torch.empty(0, 3, self.size, self.size)


def load_image(path: Path | Member, size: int) -> Tensor:
    """One image: bicubic to `size` on its shortest side, centre crop, (x / 255 - MEAN) / STD.

    Grey, palette, 16-bit and CMYK images become RGB; transparency is dropped. The steps and their
    rounding are those of CLIP's own preprocessing.

    Returns:
        float32 `[3, size, size]`.

    Raises:
        UserError: The file is missing, unreadable, truncated or not an image.

    Source: Radford et al., 2021, https://github.com/openai/CLIP.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            levels = _square(_rgb(image), size)
    except FileNotFoundError as error:
        raise UserError(f"no image file {path}") from error
    except _DECODING as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read the image {path}: {reason}") from error
    pixels = torch.from_numpy(levels).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
    return ((pixels - mean) / std).contiguous()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    width, height = image.size
    short = min(width, height)
    if max(width, height) > MAX_ASPECT * short:
        raise ValueError(f"{width} x {height} pixels, more than {MAX_ASPECT} times as long as wide")
    scaled = (int(size * width / short), int(size * height / short))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in scaled)
    return np.array(image.crop((left, top, left + size, top + size)))
