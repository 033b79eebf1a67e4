"""Visual question answering: a question about an image, soft scores over a set of answers."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from optima_fast.tasks.base import Classification
from optima_fast.tasks.split import Split


def soft_scores(votes: NDArray[np.int64] | Sequence[Sequence[int]]) -> Tensor:
    """min(votes / 3, 1): an answer that three annotators gave is right (VQA's own rule).

    Args:
        votes: `[examples, answers]`, how many annotators gave each answer.

    Returns:
        float32 `[examples, answers]`.

    Source: Antol et al., "VQA: Visual Question Answering", 2015, section 3.
    """
    counts = torch.as_tensor(np.asarray(votes), dtype=torch.float32)
    return (counts / 3).clamp(max=1)


class Vqa(Classification):
    """VQA; targets are soft scores, float32 `[T, answers]`, and accuracy is the soft accuracy."""

    task: ClassVar[str] = "vqa"
    head: ClassVar[str] = "classification"

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross entropy against the normalised scores, mean over examples that have a score.

        - sum_a q(a) log p(a), q = scores / sum of the scores; `logits` is `[T, answers]`. An
        example none of whose answers is in the answer set has no scores and does not count.
        """
        target = batch["target"].to(torch.promote_types(logits.dtype, torch.float32))
        total = target.sum(1)
        q = target / total.clamp(min=1e-12)[:, None]
        each = -(q * F.log_softmax(logits, dim=-1, dtype=q.dtype)).sum(1)
        return each.sum() / (total > 0).sum().clamp(min=1)

    def counted(self, batch: Mapping[str, Tensor]) -> tuple[int, int]:
        """The examples that have a score, and all."""
        return int((batch["target"].sum(1) > 0).sum()), len(batch["text"])

    def worth(self, split: Split) -> tuple[Tensor, Tensor]:
        """The soft scores of every answer."""
        assert split.target is not None
        return torch.arange(self.num_classes).expand(len(split), -1), split.target
