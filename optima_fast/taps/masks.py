"""What an attention mask says: which tokens count, causality, a window.

Models hand their attention a mask of pairs, made from less: which tokens are padding, that no query
sees a later key, or one too far away. The losses take the latter. It is read back from the mask's
values and the mask is made again from it; one that differs is refused, not approximated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# a pair whose score has this added to it, or less, has probability 0
EXCLUDES = -1e4


class Refused(Exception):
    """What the losses cannot represent, and why.

    Attributes:
        pairs: what is known of a self-attention all the same: which tokens count.
    """

    def __init__(self, reason: str, pairs: Pairs | None = None) -> None:
        super().__init__(reason)
        self.pairs = pairs


class Pairs(NamedTuple):
    """Which pairs of a query and a key count."""

    queries: Tensor | None  # [B, Nq] bool; None: each
    keys: Tensor | None  # [B, Nk] bool
    causal: bool
    window: int | None = None  # places


def of_tokens(
    mask: Tensor | None, shape: tuple[int, int, int], causal: bool, window: int | None
) -> Pairs:
    """From ``[B, Nk]``, as flash attention's callers have it, or nothing: each token counts."""
    _, queries, keys = shape
    if causal and queries != keys:
        raise Refused(f"it is causal with {queries} queries and {keys} keys")
    if window is not None and window >= keys:
        window = None
    if mask is None:
        return Pairs(None, None, causal, window)
    mask = mask.bool()
    return Pairs(mask if queries == keys else None, mask, causal, window)


def of_pairs(mask: Any, shape: tuple[int, int, int], cross: bool) -> Pairs:
    """From ``[B or 1, H or 1, Nq, Nk]`` bool (True counts) or floating (added to the scores).

    Args:
        mask: as scaled_dot_product_attention takes it, or flex attention's BlockMask.
        shape: batch, queries, keys.
        cross: whether keys are of another sequence than queries.

    Raises:
        Refused: it is another pattern than padding, causality and a window, or a bias.
    """
    batch, queries, keys = shape
    if isinstance(mask, Tensor) and mask.requires_grad:
        raise Refused("it adds a learned bias to its scores")
    visible, is_mask = _visible(mask, shape)
    if visible.shape[1] > 1:
        is_mask = is_mask & (visible == visible[:, :1]).all()
    visible = visible[:, 0].expand(batch, queries, keys)
    if cross or queries != keys:
        key_mask = visible.any(1)
        same = (visible == key_mask[:, None]) | ~visible.any(2, keepdim=True)
        known, same_keys, every = torch.stack([is_mask, same.all(), key_mask.all()]).tolist()
        if not known:
            raise Refused("its mask adds a bias to the scores, or differs from head to head")
        if not same_keys:
            raise Refused("its queries do not all see the same keys")
        return Pairs(None, None if every else key_mask, False)
    # a token sees itself, so the diagonal says which count
    token = visible.diagonal(dim1=1, dim2=2)
    counts = token[:, :, None] & token[:, None, :]
    seen = visible & token[:, :, None]
    tests = [is_mask, token.all(), (seen == counts).all(), (seen == counts.tril()).all()]
    known, every, full, causal = torch.stack(tests).tolist()
    if not known:
        raise Refused("its mask adds a bias to the scores, or differs from head to head")
    tokens = None if every else token
    if full or causal:
        return Pairs(tokens, tokens, not full)
    place = torch.arange(queries, device=seen.device)
    distance = (place[:, None] - place).abs()
    window = torch.where(seen, distance, 0).max() + 1
    near = counts & (distance < window)
    both, before, places = torch.stack(
        [(seen == near).all().long(), (seen == near.tril()).all().long(), window]
    ).tolist()
    if both or before:
        return Pairs(tokens, tokens, not both, places)
    raise Refused(
        "its mask is none of padding, causality and a window: packed sequences, it seems, or a "
        "prefix",
        Pairs(tokens, tokens, False),
    )


def _visible(mask: Any, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """[B or 1, H or 1, Nq, Nk] bool, and whether it is all that the mask says."""
    if not isinstance(mask, Tensor):
        from torch.nn.attention.flex_attention import create_mask

        mask = create_mask(mask.mask_mod, shape[0], 1, *shape[1:], device=mask.kv_indices.device)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)  # as it is broadcast
    mask = mask[..., : shape[1], : shape[2]]
    if mask.dtype == torch.bool:
        return mask, torch.ones((), dtype=torch.bool, device=mask.device)
    visible = mask == 0
    return visible, (visible | (mask <= EXCLUDES)).all()
