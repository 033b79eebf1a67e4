"""Teacher tokens of earlier batches, to tell a token's own teacher from."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenQueue(nn.Module):
    """The newest tokens that were pushed; part of the state, so that a stopped run goes on.

    Args:
        size: most tokens that it holds; of 0 nothing is pushed.
        width: features of one.

    Attributes:
        tokens: ``[size, width]`` float32, newest batch first.
        counts: ``[size]`` bool, True where there is one; all False at first.
    """

    tokens: Tensor
    counts: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(size, width))
        self.register_buffer("counts", torch.zeros(size, dtype=torch.bool))

    @torch.no_grad()
    def push(self, states: Tensor, mask: Tensor | None) -> None:
        """Put the tokens of ``[..., N, width]`` that count first, and let as many of the oldest go.

        Of more tokens than it holds it takes some from all over the batch.
        """
        size = len(self.tokens)
        flat = states.detach().flatten(0, -2)
        keep = flat.new_ones(len(flat), dtype=torch.bool) if mask is None else mask.flatten()
        if len(flat) > size:
            spread = torch.arange(size, device=flat.device) * len(flat) // size
            flat, keep = flat[spread], keep[spread]
        tokens = torch.cat([torch.where(keep[:, None], flat, 0).to(self.tokens), self.tokens])
        counts = torch.cat([keep, self.counts])
        # what does not count goes last, without asking the device how many count
        order = (~counts).to(torch.uint8).argsort(stable=True)[:size]
        # new tensors, as this step's gradient still needs the old ones
        self.tokens, self.counts = tokens[order], counts[order]
