"""A CoCa with a task's head, fed with a task's batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optima_fast.models.config import CoCaConfig
from optima_fast.models.heads import CaptionHead, ClassificationHead, PairHead
from optima_fast.models.layers import LayerTap
from optima_fast.models.model import CAUSAL, MODULES, CoCa, CoCaOutput, TapRequest
from optima_fast.taps.records import Layer

HEADS = ("classification", "pair", "caption")
"""The heads that :func:`build` puts on a CoCa."""


class TaskOutput(NamedTuple):
    """What a task model gives; ``taps`` and ``masks`` as in :class:`CoCaOutput`.

    Attributes:
        logits: ``[T, classes]``, for captions ``[T, L - 1, vocab_size]``; ``None`` from
            :meth:`TaskModel.record`.
        taps: The records of the requested layers.
        masks: True where a token of the records counts.
    """

    logits: Tensor | None
    taps: dict[str, list[LayerTap]]
    masks: dict[str, Tensor | None]

    def layers(self, module: str) -> list[Layer]:
        """The records of a module as the losses take them."""
        return [tap.record(self.masks[module], CAUSAL[module]) for tap in self.taps[module]]


class TaskModel(nn.Module):
    """A CoCa and a head.

    A batch holds ``"images"`` ``[I, C, H, W]``, ``"text"`` ``[T, L]``, and ``"pair_image"`` and
    ``"pair_text"`` ``[P]`` where pairs are not one to one. Pair p belongs to text p, with a pair
    head pairs 2t and 2t + 1 to text t. A caption model reads all tokens but the last and
    predicts all but the first.

    Args:
        coca: The model.
        head: A :class:`ClassificationHead`, :class:`PairHead` or :class:`CaptionHead`.
    """

    def __init__(self, coca: CoCa, head: nn.Module) -> None:
        super().__init__()
        self.coca = coca
        self.head = head
        self.layer_counts = coca.layer_counts
        self.widths = coca.widths
        self.attention_cap = coca.config.attention_cap
        self.pad_id, self.longest = coca.config.pad_id, coca.config.text_length + 1

    def forward(
        self, batch: Mapping[str, Tensor], *, taps: TapRequest | None = None, lse: bool = False
    ) -> TaskOutput:
        """Logits, and records if asked for."""
        out = self._run(batch, taps, lse, MODULES)
        logits = self.head(self.coca, out.decoded, out.masks["multimodal"])
        return TaskOutput(logits, out.taps, out.masks)

    def record(
        self, batch: Mapping[str, Tensor], taps: TapRequest, *, lse: bool = False
    ) -> TaskOutput:
        """Records alone; a module that ``taps`` does not depend on is not run, nor the head."""
        run = MODULES if "multimodal" in taps else tuple(taps)
        out = self._run(batch, taps, lse, run)
        return TaskOutput(None, out.taps, out.masks)

    def recompute(self) -> None:
        """Keep of each layer what it hands on and what is recorded of it, from now on.

        The rest is computed again in the backward pass: less memory for more time.
        """
        for name in MODULES:
            for layer in getattr(self.coca, name).layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def tokens(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where tokens of each module count, ``[B, N]`` bool, without running any of it.

        All tokens of an image do, and images have as many: one stands for those of each.
        """
        text = self._read(batch) != self.pad_id
        pairs = text if "pair_text" not in batch else text[batch["pair_text"]]
        images = torch.ones(len(batch["images"]), 1, dtype=torch.bool)
        return dict(zip(MODULES, (images, text, pairs), strict=True))

    def follow(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """What scores the next token of captions that are written one token after the other.

        The images are encoded once; keys and values of all tokens so far are kept.

        Returns:
            A function of all ids so far, ``[I, n]``, one more in each call, to ``[I, vocab_size]``.
        """
        coca = self.coca
        tokens, past = coca.encode_images(images), coca.new_past()
        return lambda text: coca.token_logits(coca.extend(tokens, text[:, -1:], past))[:, 0]

    def _run(
        self,
        batch: Mapping[str, Tensor],
        taps: TapRequest | None,
        lse: bool,
        run: tuple[str, ...],
    ) -> CoCaOutput:
        out: CoCaOutput = self.coca(
            batch["images"],
            self._read(batch),
            pair_image=batch.get("pair_image"),
            pair_text=batch.get("pair_text"),
            taps=taps,
            lse=lse,
            run=run,
        )
        return out

    def _read(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the text decoder reads of a batch's texts."""
        text = batch["text"]
        return text[:, :-1] if isinstance(self.head, CaptionHead) else text


def build(config: CoCaConfig, head_kind: str, num_classes: int, dropout: float = 0.0) -> TaskModel:
    """A freshly initialised task model.

    Args:
        config: Sizes and form of the CoCa.
        head_kind: ``"classification"``, ``"pair"`` or ``"caption"``.
        num_classes: Classes of a classification or pair head; a caption head has none.
        dropout: Dropout before the classifier.
    """
    if head_kind not in HEADS:
        raise ValueError(f"head_kind must be one of {', '.join(HEADS)}, got {head_kind!r}")
    if head_kind != "caption" and num_classes < 2:
        raise ValueError(f"a {head_kind} head needs at least 2 classes, got {num_classes}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    coca = CoCa(config)
    head: nn.Module
    if head_kind == "caption":
        head = CaptionHead()
    elif head_kind == "pair":
        head = PairHead(config, num_classes, dropout)
    else:
        head = ClassificationHead(config, num_classes, dropout)
    return TaskModel(coca, head)
