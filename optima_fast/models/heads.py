"""What turns the multimodal decoder's output into a task's logits.

Every head is called as ``head(coca, decoded, mask)``: the model, its output ``[P, L, d]`` and a
mask ``[P, L]``, True where a token counts.
"""

from __future__ import annotations

from torch import Tensor, nn

from optima_fast.models.basic import linear
from optima_fast.models.config import CoCaConfig
from optima_fast.models.layers import Pooler
from optima_fast.models.model import CoCa


class ClassificationHead(nn.Module):
    """Attentional pooler with one query over the output tokens, dropout, linear classifier.

    The pooler has the form of the model's own, ``"normed"`` where that has none.

    Args:
        config: The model's options.
        num_classes: Number of classes.
        dropout: Probability of dropping an element of the pooled vector.
        vectors: Pooled vectors that the classifier sees at a time.
    """

    def __init__(
        self, config: CoCaConfig, num_classes: int, dropout: float = 0.0, *, vectors: int = 1
    ) -> None:
        super().__init__()
        width = config.text_width
        if config.pooler == "none":
            self.pooler = Pooler(width, width, config.text_heads, width, 1, "normed")
        else:
            self.pooler = Pooler(
                width, width, config.pooler_heads, config.pooler_inner, 1, config.pooler
            )
        self.dropout = nn.Dropout(dropout)
        self.classify = linear(vectors * width, num_classes, std=0.02)

    def forward(self, coca: CoCa, decoded: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[P, classes]``."""
        logits: Tensor = self.classify(self.dropout(self.pooler(decoded, mask)[:, 0]))
        return logits


class PairHead(ClassificationHead):
    """The classification head over the concatenated vectors of two pairs, as in NLVR2.

    Pairs 2t and 2t + 1 belong to text t.

    Args:
        config: The model's options.
        num_classes: Number of classes.
        dropout: Probability of dropping an element of the pooled vectors.
    """

    def __init__(self, config: CoCaConfig, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__(config, num_classes, dropout, vectors=2)

    def forward(self, coca: CoCa, decoded: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[P / 2, classes]``."""
        if decoded.shape[0] % 2:
            raise ValueError(
                f"a pair head needs two pairs for each text, got {decoded.shape[0]} pairs"
            )
        pooled = self.pooler(decoded, mask)[:, 0].unflatten(0, (-1, 2)).flatten(1)
        logits: Tensor = self.classify(self.dropout(pooled))
        return logits


class CaptionHead(nn.Module):
    """The model's own softmax over the vocabulary; no parameters."""

    def forward(self, coca: CoCa, decoded: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[P, L, vocab_size]``."""
        return coca.token_logits(decoded)
