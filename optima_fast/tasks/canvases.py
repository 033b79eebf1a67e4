"""Canvases of real handwritten digits, composed from a seed: the pictures of the built-in data.

The scans are the 1,797 of 8x8 pixels that come with scikit-learn (UCI Optical Recognition of
Handwritten Digits, CC BY 4.0). They are split once and for all, before anything is composed, and
the split does not depend on the seed: a stroke of the test split is never seen in training, not
even by a teacher that another seed trained.

A canvas has 24x24 pixels, one channel and 2x2 cells of 12x12. One to four cells hold a scan at one
of three sizes, four tones (no two alike on a canvas) and any place in its cell; noise lies over
all of it. A cell may be covered by a grey patch, and then holds nothing that can be seen.

All arithmetic is on integers, so a seed gives the same bytes on every machine.
"""

import importlib.util
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optima_fast.tasks.split import ArrayImages

CANVAS, CELL, CELLS = 24, 12, 4
PLACES = ("top left", "top right", "bottom left", "bottom right")  # the cells, in order
SIZES = (8, 10, 12)
TONES = 4  # 2/5, 3/5, 4/5 and 5/5 of full brightness
EMPTY = 10  # label of a cell without a digit that can be seen: nothing there, or covered
CELL_CLASSES = 11
PATCH_LEVEL = 128
MEAN, STD = 0.125, 0.25  # what pixels are normalised with: black is -1/2, white 3 1/2
SHARES = {"train": 0.60, "validation": 0.15, "test": 0.25}

Rng = np.random.Generator
Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


def generator(*entropy: int) -> Rng:
    """The generator of a seed and the numbers of a stream within it."""
    return np.random.Generator(np.random.PCG64(list(entropy)))


@lru_cache(maxsize=1)
def scans() -> tuple[Bytes, Ints]:
    """The scans: levels 0 .. 16, uint8 `[1797, 8, 8]`, and the digits they show, int64 `[1797]`."""
    package = importlib.util.find_spec("sklearn")
    file = (
        Path(package.origin or "").parent / "datasets" / "data" / "digits.csv.gz"
        if package
        else None
    )
    if file is not None and file.is_file():
        # importing scikit-learn takes seconds
        table = np.loadtxt(file, dtype=np.int64, delimiter=",")
        return table[:, :-1].reshape(-1, 8, 8).astype(np.uint8), table[:, -1]
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.uint8), data.target.astype(np.int64)


@lru_cache(maxsize=1)
def scan_split() -> dict[str, Ints]:
    """Numbers of the scans of each split, each digit in the same shares; independent of seeds."""
    digit = scans()[1]
    parts: dict[str, list[Ints]] = {name: [] for name in SHARES}
    rng = generator(1797)
    for value in range(10):
        own = rng.permutation(np.flatnonzero(digit == value))
        first = round(SHARES["train"] * len(own))
        second = first + round(SHARES["validation"] * len(own))
        for name, part in zip(SHARES, np.split(own, [first, second]), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def resize(levels: Bytes, size: int) -> Bytes:
    """Bilinear resize of `[n, 8, 8]` levels 0 .. 16 to `[n, size, size]` levels 0 .. 255.

    Pixel j of the result lies at 8 (j + 1/2) / size - 1/2 of the source; in units of 1 / (2 size)
    that is a whole number, so that the result is exact up to one rounding.
    """
    unit = 2 * size
    at = np.clip(8 * (2 * np.arange(size) + 1) - size, 0, 7 * unit)
    low = np.minimum(at // unit, 6)
    high_weight = at - low * unit
    low_weight = unit - high_weight
    x = levels.astype(np.int64)
    x = x[:, low] * low_weight[:, None] + x[:, low + 1] * high_weight[:, None]
    x = x[:, :, low] * low_weight + x[:, :, low + 1] * high_weight
    whole = 16 * unit * unit
    resized: Bytes = ((x * 255 + whole // 2) // whole).astype(np.uint8)
    return resized


@dataclass(frozen=True)
class Canvases:
    """Canvases and what is on them, cell by cell in the order of `PLACES`.

    Attributes:
        image: uint8 `[n, 24, 24]`.
        digit: int64 `[n, 4]`, 0 .. 9 and `EMPTY`; the digit below a cover is not told.
        tone: int64 `[n, 4]`, 0 (dim) .. 3 (bright), -1 where no digit can be seen.
        covered: bool `[n, 4]`.
        scan: int64 `[n, 4]`, number of the scan, -1 where none can be seen.
    """

    image: Bytes
    digit: Ints
    tone: Ints
    covered: NDArray[np.bool_]
    scan: Ints

    def __len__(self) -> int:
        return len(self.image)

    def take(self, rows: Ints) -> "Canvases":
        """The canvases `rows`, in that order."""
        return Canvases(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @property
    def count(self) -> Ints:
        """Number of digits that can be seen, int64 `[n]`."""
        value: Ints = (self.digit < EMPTY).sum(1)
        return value

    @property
    def largest(self) -> Ints:
        """Largest digit that can be seen, -1 if there is none."""
        value: Ints = np.where(self.digit < EMPTY, self.digit, -1).max(1)
        return value

    @property
    def smallest(self) -> Ints:
        """Smallest digit that can be seen, `EMPTY` if there is none."""
        value: Ints = self.digit.min(1)
        return value

    @property
    def brightest(self) -> Ints:
        """The digit of the brightest tone."""
        value: Ints = self.digit[np.arange(len(self)), self.tone.argmax(1)]
        return value

    def images(self) -> ArrayImages:
        """The canvases as float32 images `[n, 1, 24, 24]`, black -1/2 and white 3 1/2."""
        return ArrayImages(torch.from_numpy(self.image)[:, None], mean=MEAN, std=STD)

    def cells(self) -> Tensor:
        """Label of each cell, int64 `[n, 4]`: its digit, `EMPTY` for empty and for covered ones."""
        return torch.from_numpy(self.digit)


def compose(
    n: int, split: str, rng: Rng, *, noise: float = 0.05, covers: tuple[int, ...] = (0,)
) -> Canvases:
    """Draw `n` canvases from the scans of a split.

    Args:
        n: How many.
        split: "train", "validation" or "test".
        rng: Where every choice comes from.
        noise: Standard deviation of the noise (uniform), as a part of full brightness.
        covers: Numbers of covered cells, 0 .. 3, one of them drawn for each canvas; at least one
            digit can always be seen.
    """
    source, digits = scans()
    own = scan_split()[split]
    order = rng.permuted(np.tile(np.arange(CELLS), (n, 1)), axis=1)
    hidden = np.array(covers)[rng.integers(0, len(covers), (n, 1))]
    covered = order >= CELLS - hidden
    present = order < rng.integers(1, CELLS + 1 - hidden)
    scan = own[rng.integers(0, len(own), (n, CELLS))]
    tone = rng.permuted(np.tile(np.arange(TONES), (n, 1)), axis=1)
    size = rng.integers(0, len(SIZES), (n, CELLS))
    room = CELL + 1 - np.array(SIZES)[size]
    top, left = rng.integers(0, room), rng.integers(0, room)

    cells = np.zeros((n, CELLS, CELL, CELL), dtype=np.uint8)
    cells[covered] = PATCH_LEVEL
    for k, s in enumerate(SIZES):
        row, column = np.nonzero(present & (size == k))
        ink = resize(source, s)[scan[row, column]].astype(np.uint16)
        ink = ink * (tone[row, column] + 2).astype(np.uint16)[:, None, None] // 5
        y = top[row, column][:, None, None] + np.arange(s)[:, None]
        x = left[row, column][:, None, None] + np.arange(s)
        cells[row[:, None, None], column[:, None, None], y, x] = ink
    # [n, 2, 2, 12, 12] -> [n, 2, 12, 2, 12]
    image = cells.reshape(n, 2, 2, CELL, CELL).swapaxes(2, 3).reshape(n, CANVAS, CANVAS)
    half = round(255 * noise * 3**0.5)
    speckle = rng.integers(-half, half, image.shape, dtype=np.int16, endpoint=True)
    return Canvases(
        image=np.clip(image + speckle, 0, 255).astype(np.uint8),
        digit=np.where(present, digits[scan], EMPTY),
        tone=np.where(present, tone, -1),
        covered=covered,
        scan=np.where(present, scan, -1),
    )
