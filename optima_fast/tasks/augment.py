"""RandAugment: a few random operations of one magnitude on a training image."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from optima_fast.errors import UserError

__all__ = ["OPERATIONS", "RandAugment"]

GREY = 128 / 255  # of what was outside of the image


class RandAugment:
    """`layers` operations, drawn with replacement from 16 and applied at one magnitude.

    The operations, and what a magnitude M means to each, are those of Google's code, on whose scale
    the CoCa paper's "1, 10" is: M / 10 of a rotation by 30 degrees, of a shear by 0.3, of a shift
    by 0.45 of the image, of a cut-out of 0.18 of it to either side, of 110 levels added to dark
    pixels; a factor of 0.1 + 1.8 M / 10 for colour, contrast, brightness and sharpness; 4 M / 10
    bits kept; inverted from level 256 M / 10 on. Directions are random. As there, the last two
    grow weaker with M. (kornia's own `RandAugment` has another scale, 0 to 30, and operations that
    differ: it adds to the brightness, and its shear of 0.3 is one by 54 degrees.)

    What is drawn depends on the seed, the step and the number of the image alone.

    Args:
        layers: Operations an image, at least 1.
        magnitude: M, above 0 and at most 10.
        seed: Of everything drawn.

    Raises:
        ValueError: A value out of range.

    Source: Cubuk et al., 2020, arXiv 1909.13719; tensorflow/tpu, efficientnet/autoaugment.py.
    """

    def __init__(self, layers: int, magnitude: float, seed: int = 0) -> None:
        if layers < 1 or not 0 < magnitude <= 10:
            raise ValueError(
                "layers must be at least 1 and magnitude above 0 and at most 10, "
                f"got {layers} and {magnitude}"
            )
        self.layers, self.magnitude, self.seed = layers, magnitude, seed

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> "RandAugment | None":
        """ "none" or "off", or "LAYERS,MAGNITUDE" such as "1,10".

        Raises:
            UserError: Neither, or a value out of range.
        """
        if text in ("none", "off"):
            return None
        try:
            layers, magnitude = text.split(",")
            return cls(int(layers), float(magnitude), seed)
        except ValueError as error:
            raise UserError(
                "augment must be none or LAYERS,MAGNITUDE such as 1,10 (at least 1 layer, a "
                f"magnitude above 0 and at most 10), got {text!r}"
            ) from error

    def __call__(self, step: int, pixels: Tensor, image: int) -> Tensor:
        """Augmented pixels of one image.

        Args:
            step: The training step.
            pixels: float32 `[3, S, S]` in 0 .. 1.
            image: The number of the image.

        Returns:
            float32 `[3, S, S]` in 0 .. 1.
        """
        draw = np.random.Generator(np.random.PCG64([self.seed, step, image]))
        names = list(OPERATIONS)
        with _one_thread():
            for _ in range(self.layers):
                operation = OPERATIONS[names[draw.integers(len(names))]]
                sign = 1.0 if draw.random() < 0.5 else -1.0
                where = (float(draw.random()), float(draw.random()))
                pixels = operation(pixels, self.magnitude / 10, sign, where)
        return pixels


Operation = Callable[[Tensor, float, float, tuple[float, float]], Tensor]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, whoever computes them: a worker process or the trainer itself."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _auto_contrast(x: Tensor) -> Tensor:
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low), x)


def _equalize(x: Tensor) -> Tensor:
    from kornia.enhance import equalize

    equalized: Tensor = equalize(x[None])
    return equalized[0]


def _posterize(x: Tensor, bits: int) -> Tensor:
    width = float(1 << (8 - bits))
    return (x * 255).round().div(width, rounding_mode="floor") * width / 255


def _enhanced(name: str) -> Operation:
    def enhance(x: Tensor, level: float, sign: float, where: tuple[float, float]) -> Tensor:
        import kornia.enhance

        enhanced: Tensor = getattr(kornia.enhance, name)(x[None], 0.1 + 1.8 * level)
        return enhanced[0]

    return enhance


def _moved(x: Tensor, matrix: list[list[float]], *, about_centre: bool = False) -> Tensor:
    """The image whose pixel (column, row) is that of `x` at `matrix` (column, row, 1)."""
    from kornia.geometry.transform import warp_affine

    inverse = torch.tensor([[*matrix, [0.0, 0.0, 1.0]]], dtype=torch.float64)
    if about_centre:
        shift = torch.eye(3, dtype=torch.float64)[None]
        shift[0, :2, 2] = (x.shape[-1] - 1) / 2
        inverse = shift @ inverse @ torch.linalg.inv(shift)
    forward = torch.linalg.inv(inverse)[:, :2].float()
    fill = torch.full((3,), GREY)
    size = (x.shape[-2], x.shape[-1])
    moved: Tensor = warp_affine(x[None], forward, size, "nearest", "fill", True, fill)
    return moved[0]


def _rotated(x: Tensor, degrees: float) -> Tensor:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _moved(x, [[cosine, -sine, 0.0], [sine, cosine, 0.0]], about_centre=True)


def _cut_out(x: Tensor, half: int, where: tuple[float, float]) -> Tensor:
    row, column = (int(part * side) for part, side in zip(where, x.shape[1:], strict=True))
    x = x.clone()
    x[:, max(0, row - half) : row + half, max(0, column - half) : column + half] = GREY
    return x


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda x, level, sign, where: _auto_contrast(x),
    "equalize": lambda x, level, sign, where: _equalize(x),
    "invert": lambda x, level, sign, where: 1 - x,
    "rotate": lambda x, level, sign, where: _rotated(x, sign * 30 * level),
    "posterize": lambda x, level, sign, where: _posterize(x, int(4 * level)),
    "solarize": lambda x, level, sign, where: torch.where(x < 256 / 255 * level, x, 1 - x),
    "color": _enhanced("adjust_saturation_with_gray_subtraction"),
    "contrast": _enhanced("adjust_contrast_with_mean_subtraction"),
    "brightness": _enhanced("adjust_brightness_accumulative"),
    "sharpness": _enhanced("sharpness"),
    "shear_x": lambda x, level, sign, where: _moved(x, [[1, sign * 0.3 * level, 0], [0, 1, 0]]),
    "shear_y": lambda x, level, sign, where: _moved(x, [[1, 0, 0], [sign * 0.3 * level, 1, 0]]),
    "translate_x": lambda x, level, sign, where: _moved(
        x, [[1, 0, sign * round(0.45 * level * x.shape[-1])], [0, 1, 0]]
    ),
    "translate_y": lambda x, level, sign, where: _moved(
        x, [[1, 0, 0], [0, 1, sign * round(0.45 * level * x.shape[-2])]]
    ),
    "cutout": lambda x, level, sign, where: _cut_out(x, round(0.18 * level * x.shape[-1]), where),
    "solarize_add": lambda x, level, sign, where: torch.where(
        x < GREY, (x + 110 / 255 * level).clamp(max=1), x
    ),
}
