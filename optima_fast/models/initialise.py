"""Start a student from layers of a larger model, also one for another grid of patches."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.models.config import CoCaConfig
from optima_fast.models.model import MODULES, CoCa

# options in which a student may differ from the model it starts from
_LAYERS = ("image_layers", "text_layers", "multimodal_layers")
_ADAPTED = ("image_size", "patch_size", "text_length")


def like(source: CoCaConfig, layers: CoCaConfig) -> CoCaConfig:
    """The configuration of a student of ``source``'s form and sizes, and ``layers``' numbers of
    layers.
    """
    return replace(source, **{name: getattr(layers, name) for name in _LAYERS})


def sampled_layer(index: int, student_layers: int, source_layers: int) -> int:
    """The source layer of a student layer, both 0-based; from 1, layer i gets ceil(i * r).

    r is the ratio of the numbers of layers.
    """
    return -(-(index + 1) * source_layers // student_layers) - 1


def obstacle(student: CoCaConfig, source: CoCaConfig) -> str | None:
    """Why a student of this shape cannot start from layers of ``source``; ``None`` if it can."""
    mine, theirs = student.to_dict(), source.to_dict()
    for name in (field.name for field in fields(student)):
        ours, other = mine[name], theirs[name]
        if name in _LAYERS and ours > other:
            return (
                f"a student cannot be deeper than the model it starts from: {name} is {ours} in "
                f"the student and {other} in the source"
            )
        if name not in _LAYERS + _ADAPTED and ours != other:
            return (
                "a student can start only from layers of its own shape: "
                f"{name} is {ours} in the student and {other} in the source; "
                "start it at random or from another source"
            )
    return None


@torch.no_grad()
def from_layers(student: CoCa, source: CoCa) -> None:
    """Copy uniformly sampled layers of ``source``, and all that is not a layer, into ``student``.

    Positions and patches are adapted to another image size, patch size or text length, see
    :func:`image_positions`, :func:`text_positions` and :func:`patches`.

    Args:
        student: Changed in place.
        source: A model that differs from the student in its numbers of layers, image size, patch
            size and text length only.

    Raises:
        UserError: The models differ otherwise, or the student has more layers.
    """
    reason = obstacle(student.config, source.config)
    if reason is not None:
        raise UserError(reason)
    state = source.state_dict()
    for name, value in student.state_dict().items():
        module, _, rest = name.partition(".layers.")
        if module in MODULES and rest:
            index, _, leaf = rest.partition(".")
            counts = student.layer_counts[module], source.layer_counts[module]
            name = f"{module}.layers.{sampled_layer(int(index), *counts)}.{leaf}"
        given = state[name]
        if name == "image.positions":
            given = image_positions(given, student.config)
        elif name == "image.patches.weight":
            given = patches(given, student.config.patch_size)
        elif name == "text.positions":
            given = text_positions(given, student.config)
        value.copy_(given)


def image_positions(positions: Tensor, config: CoCaConfig) -> Tensor:
    """Positions of a grid of patches for the grid of ``config``, bicubic with antialiasing.

    The class token's position, which is the first where there is one, is kept. The same as
    open_clip's ``resize_pos_embed``.

    Args:
        positions: ``[g * g, d]``, or ``[1 + g * g, d]`` with a class token.
        config: Gives the other grid, and whether there is a class token.

    Returns:
        ``[n, d]``; ``positions`` themselves for a grid of their size.
    """
    extra = int(config.image_stem == "clip")
    if len(positions) == config.patches + extra:
        return positions
    first, grid = positions[:extra], positions[extra:]
    old, new = round(len(grid) ** 0.5), round(config.patches**0.5)
    image = grid.T.reshape(1, -1, old, old)
    image = F.interpolate(image, size=(new, new), mode="bicubic", antialias=True)
    return torch.cat([first, image[0].flatten(1).T])


def text_positions(positions: Tensor, config: CoCaConfig) -> Tensor:
    """Learned positions of a text for texts of ``config.text_length`` tokens.

    A shorter text keeps the first positions, so that each token stays where it was trained. For a
    longer one they are stretched linearly, as open_clip's ``resize_text_pos_embed`` does in both
    directions. The position of [CLS], which is the last where there is one, is kept, where
    open_clip blends it with its neighbour.

    Args:
        positions: ``[L, d]``, or ``[L + 1, d]`` with [CLS].
        config: Gives the other length, and whether there is a [CLS].

    Returns:
        ``[text_length, d]`` or ``[text_length + 1, d]``.
    """
    length = len(positions) - (config.contrastive != "none")
    tokens, cls = positions[:length], positions[length:]
    if config.text_length > length:
        tokens = F.interpolate(tokens.T[None], size=config.text_length, mode="linear")[0].T
    return torch.cat([tokens[: config.text_length], cls])


def patches(weight: Tensor, patch_size: int) -> Tensor:
    r"""A patch projection resampled to another patch size.

    .. math:: \hat w = (B^T)^+ w, \qquad B x = \mathrm{resize}(x)

    B resizes a patch x of the old size to the new one, bilinearly with antialiasing. Then
    :math:`\langle B x, \hat w \rangle` equals :math:`\langle x, w \rangle` for every x when the new
    size is the larger one, and is nearest to it over white noise otherwise.

    Source: Beyer et al., "FlexiViT: One Model for All Patch Sizes", arXiv 2212.08013, section 3.4.

    Args:
        weight: ``[d, C, p, p]``.
        patch_size: The new p.

    Returns:
        ``[d, C, patch_size, patch_size]`` of the same dtype; ``weight`` itself for its own size.
    """
    old = weight.shape[-1]
    if old == patch_size:
        return weight
    basis = torch.eye(old * old, dtype=torch.float64, device=weight.device)
    resized = F.interpolate(
        basis.view(-1, 1, old, old), size=(patch_size,) * 2, mode="bilinear", antialias=True
    )
    # row i of `resized` is B e_i, so that `resized` is B^T
    inverse = torch.linalg.pinv(resized.flatten(1))
    kernel: Tensor = weight.double().flatten(2) @ inverse.T
    return kernel.view(*weight.shape[:2], patch_size, patch_size).to(weight.dtype)
