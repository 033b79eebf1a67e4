"""Captions from images, one most likely token after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optima_fast.models.programs import Exported
from optima_fast.models.task_model import TaskModel


@torch.no_grad()
def greedy(
    model: TaskModel | Exported,
    images: Tensor,
    *,
    bos_id: int,
    eos_id: int,
    max_length: int,
) -> Tensor:
    """Greedy decoding.

    Each token is the most likely one given those before it, the padding id excluded.

    Args:
        model: Of captions; of any other task model the CoCa's softmax is used, not the head.
        images: ``[I, C, H, W]``.
        bos_id: The first token.
        eos_id: The token that ends a caption.
        max_length: Most tokens of a caption, ``bos_id`` and ``eos_id`` included.

    Returns:
        ``[I, n]`` int64 of ``bos_id``, the caption, ``eos_id`` if it came in time, then padding.
    """
    if not 1 <= max_length <= model.longest:
        raise ValueError(
            f"max_length must be from 1 to text_length + 1 = {model.longest}, got {max_length}"
        )
    follow = model.follow(images)
    text = torch.full((images.shape[0], 1), bos_id, device=images.device)
    ended = torch.zeros(images.shape[0], 1, dtype=torch.bool, device=images.device)
    while text.shape[1] < max_length and not bool(ended.all()):
        logits = follow(text)
        logits[:, model.pad_id] = -math.inf
        following = logits.argmax(-1, keepdim=True).masked_fill(ended, model.pad_id)
        ended = ended | (following == eos_id)
        text = torch.cat([text, following], dim=1)
    return text
