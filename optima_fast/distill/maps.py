"""Which loss of attention maps a name stands for, and how it is called on what layers recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.losses import ATTENTION_LOSSES, relation_kl
from optima_fast.taps.records import Attention

AUTO = "-auto"  # each head by itself where both models have as many, else their mean
RELATIONS = "relations"
NAMES = (*ATTENTION_LOSSES, *(f"{x}{AUTO}" for x in ("scores", "probs", "kl")), RELATIONS)
SCALES = ("none", "length")


class Maps(NamedTuple):
    """A loss of attention maps.

    Attributes:
        loss: one of ``NAMES``.
        scale: ``"length"`` multiplies it by the number of keys, padding included, as EfficientVLM
            does: a map's probabilities shrink as it grows. ``"none"`` does not.
        relation_heads: of ``"relations"``: MiniLMv2's among queries and among keys, their sum.
        backend: of the losses.
    """

    loss: str = "scores"
    scale: str = "none"
    relation_heads: int | None = None
    backend: str = "auto"

    def check(self) -> None:
        """Raise a ValueError unless the options go together."""
        if (self.loss == RELATIONS) != (self.relation_heads is not None):
            raise ValueError(
                "attention_loss='relations' and relation_heads go together, got "
                f"attention_loss={self.loss!r} and relation_heads={self.relation_heads}: the "
                "number must divide the widths of both models, such as the teacher's heads"
            )

    @property
    def softmax(self) -> bool:
        """Whether a log-sum-exp of the maps is of use."""
        return not self.loss.startswith("scores") and self.loss != RELATIONS

    def __call__(self, student: Sequence[Attention], teacher: Sequence[Attention]) -> Tensor:
        """One value an attention."""
        if self.loss == RELATIONS:
            losses = self._relations(student, teacher)
        elif self.loss.endswith(AUTO):
            losses = self._by_heads(student, teacher)
        else:
            losses = self._of(self.loss, student, teacher)
        if self.scale == "length":
            losses = losses * losses.new_tensor([a.k.shape[2] for a in student])
        return losses

    def _by_heads(self, student: Sequence[Attention], teacher: Sequence[Attention]) -> Tensor:
        name = self.loss.removesuffix(AUTO)
        as_many = [a.q.shape[1] == b.q.shape[1] for a, b in zip(student, teacher, strict=True)]
        found: dict[int, Tensor] = {}
        for loss, own in ((f"{name}-each", True), (name, False)):
            chosen = [i for i, same in enumerate(as_many) if same is own]
            if chosen:
                parts = ([x[i] for i in chosen] for x in (student, teacher))
                found.update(zip(chosen, self._of(loss, *parts).unbind(), strict=True))
        return torch.stack([found[i] for i in range(len(student))])

    def _relations(self, student: Sequence[Attention], teacher: Sequence[Attention]) -> Tensor:
        assert self.relation_heads is not None
        for a in student:
            if a.window is not None:
                raise UserError(
                    f"relations know no window of attention, got one of {a.window}: take another "
                    "attention_loss, or leave the layer out of the arm"
                )
        masks = [a.query_mask for a in student], [a.key_mask for a in student]
        losses = relation_kl(
            [a.q for a in student] + [a.k for a in student],
            [a.q for a in teacher] + [a.k for a in teacher],
            relation_heads=self.relation_heads,
            causal=2 * [a.causal for a in student],
            mask=[*masks[0], *masks[1]],
            backend=self.backend,
        )
        of_queries, of_keys = losses.chunk(2)
        return of_queries + of_keys

    def _of(self, name: str, student: Sequence[Attention], teacher: Sequence[Attention]) -> Tensor:
        return ATTENTION_LOSSES[name](
            [a.q for a in student],
            [a.k for a in student],
            [a.q for a in teacher],
            [a.k for a in teacher],
            causal=[a.causal for a in student],
            window=[a.window for a in student],
            query_mask=[a.query_mask for a in student],
            key_mask=[a.key_mask for a in student],
            student_lse=[a.lse for a in student] if self.softmax else None,
            teacher_lse=[a.lse for a in teacher] if self.softmax else None,
            student_scale=[a.scale for a in student],
            teacher_scale=[a.scale for a in teacher],
            backend=self.backend,
        )


def swapped(a: Attention) -> Attention:
    """The same products with queries and keys in each other's place: what keys see of queries."""
    q = a.k.repeat_interleave(a.q.shape[1] // a.k.shape[1], 1)
    return Attention(q, a.q, query_mask=a.key_mask, key_mask=a.query_mask, scale=a.scale)
