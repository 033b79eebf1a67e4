"""What share of a batch each of its parts is, so that the losses of parts add up to the batch's.

Losses are means: over examples, tokens, or pairs of tokens that attend to each other. Where a batch
is worked on in parts, the mean over all of it is not the mean of the parts' means, unless they are
of one size, and texts are not. Each part's mean, times its share of what is counted, is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Extent(NamedTuple):
    """How much of a module's input counts; a part's, or its share of that of the whole batch.

    Attributes:
        items: images, texts, or pairs of both.
        tokens: of all items.
        squares: pairs of tokens of one item.
        seen: those whose first token comes no earlier than the second, as in causal attention.
    """

    items: float
    tokens: float
    squares: float
    seen: float

    @classmethod
    def of(cls, mask: Tensor) -> Extent:
        """Of items ``[B, N]``, True where a token counts."""
        lengths = mask.sum(1)
        seen = (mask * mask.cumsum(1)).sum()
        numbers = torch.stack([lengths.count_nonzero(), lengths.sum(), (lengths**2).sum(), seen])
        return cls(*numbers.tolist())


class Shares(NamedTuple):
    """The extents of a part, or its shares of those of the whole batch.

    Attributes:
        prediction: what the task's own loss is a mean over.
        divergence: what that of the predictions from the teacher's is.
        modules: by name.
    """

    prediction: float
    divergence: float
    modules: Mapping[str, Extent]

    def numbers(self) -> list[float]:
        """All of it in one list, which those of other parts may be added to."""
        of_modules = (x for extent in self.modules.values() for x in extent)
        return [self.prediction, self.divergence, *of_modules]

    def of(self, whole: Sequence[float]) -> Shares:
        """This part's shares of the whole, which is the sum of the parts' :meth:`numbers`."""
        shares = [a / b if b else 0.0 for a, b in zip(self.numbers(), whole, strict=True)]
        prediction, divergence, *rest = shares
        width = len(Extent._fields)
        modules = {
            name: Extent(*rest[width * i : width * (i + 1)]) for i, name in enumerate(self.modules)
        }
        return Shares(prediction, divergence, modules)


def on_device(values: Sequence[float], like: Tensor) -> Tensor:
    """The numbers as a tensor beside ``like``, which is not waited for."""
    tensor = torch.tensor(values, dtype=like.dtype)
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor
