"""The loss of one distillation step, Eq. 5, for the modules that an arm selects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from optima_fast.distill.arms import Arm, arm_layers
from optima_fast.distill.matching import match_layers
from optima_fast.distill.measurement import Layers, Measurement
from optima_fast.losses import attention_mse, hidden_mse

Batch = Mapping[str, Tensor]


class Record(Protocol):
    """What a model returns: logits, and the taps and token masks of the layers asked for."""

    @property
    def logits(self) -> Tensor | None: ...
    @property
    def taps(self) -> Mapping[str, Sequence[Any]]: ...
    @property
    def masks(self) -> Mapping[str, Tensor | None]: ...


class Distillable(Protocol):
    """What a :class:`Distiller` needs of a student or a teacher.

    ``optima_fast.models.TaskModel`` is one; any model that yields ``hidden`` [B, N, d], ``q`` and
    ``k`` [B, H, N, d_h] for the layers in a request (module name to 0-based indices) can be.
    """

    @property
    def layer_counts(self) -> Mapping[str, int]: ...
    @property
    def widths(self) -> Mapping[str, int]: ...
    @property
    def causal(self) -> Mapping[str, bool]: ...
    @property
    def __call__(self) -> Callable[..., Any]: ...

    def record(
        self, batch: Batch, taps: Mapping[str, Sequence[int]], *, lse: bool = False
    ) -> Record: ...


class LayerPair(NamedTuple):
    """One student layer and the teacher layer it learns from, both 0-based."""

    module: str
    student: int
    teacher: int

    def __str__(self) -> str:
        return f"{self.module} layer {self.student + 1} from teacher layer {self.teacher + 1}"


class StepLosses(NamedTuple):
    """Eq. 5 and its terms, before their weights. ``hidden`` and ``attention`` are [L], as pairs."""

    total: Tensor
    prediction: Tensor
    kl: Tensor | None
    hidden: Tensor | None
    attention: Tensor | None
    pairs: tuple[LayerPair, ...]


class _Records(NamedTuple):
    student: Record
    teacher: Record | None  # none where nothing of it is needed


class Distiller(nn.Module):
    r"""Compares a student with its frozen teacher, layer by layer, in what an arm selects.

    .. math:: L = L_{pred} + a_1 KL(t \| s) + a_2 \sum_l \mathrm{MSE}(H_t^l, H_s^l W^l)
              + a_3 \sum_l \mathrm{MSE}(A_t^l, A_s^l)

    (Liang et al., NeurIPS 2023, Eq. 5, with :math:`a_1, a_2, a_3` = ``kl_weight``,
    ``hidden_weight``, ``attention_weight``.) The teacher runs without gradient and only as far as
    an arm needs; neither it nor the student is part of this module, whose only parameters are the
    projections :math:`W^l`, [d_s, d_t], one per matched student layer.

    Args:
        student: the model to train.
        teacher: the model to learn from; put in eval mode, its parameters frozen.
        modules: names of the modules to match; default all that the student has.
        hidden_weight: :math:`a_2`.
        attention_weight: :math:`a_3`.
        kl_weight: :math:`a_1`; at 0 the teacher's logits are not computed.
        attention_target: ``"scores"`` (before softmax) or ``"probs"``.
        hidden_scale: ``"none"``, or ``"variance"`` to divide each layer's hidden loss by the
            variance of the teacher's states around their mean over the batch's tokens, so that it
            is the share of variance not yet explained.
        reduction: ``"sum"`` over layers, or ``"mean"``.
        cross_attention: match the decoder's cross-attention too.
        backend: of the losses, see :func:`optima_fast.hidden_mse`.

    Raises:
        ValueError: an unknown module or option; a student deeper than its teacher.

    Example::

        distiller = Distiller(student, teacher)
        step = distiller(batch, ("image",), predict=task.loss)
        step.total.backward()
    """

    def __init__(
        self,
        student: Distillable,
        teacher: Distillable,
        *,
        modules: Sequence[str] | None = None,
        hidden_weight: float = 1.0,
        attention_weight: float = 1e-2,
        kl_weight: float = 0.0,
        attention_target: str = "scores",
        hidden_scale: str = "none",
        reduction: str = "sum",
        cross_attention: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        names = tuple(student.layer_counts if modules is None else modules)
        for name in names:
            if name not in student.layer_counts or name not in teacher.layer_counts:
                raise ValueError(
                    f"modules must be of both models, got {name!r}; the student has "
                    f"{list(student.layer_counts)}, the teacher {list(teacher.layer_counts)}"
                )
        for option, value, allowed in (
            ("attention_target", attention_target, ("scores", "probs")),
            ("hidden_scale", hidden_scale, ("none", "variance")),
            ("reduction", reduction, ("sum", "mean")),
        ):
            if value not in allowed:
                raise ValueError(f"{option} must be one of {allowed}, got {value!r}")
        for option, weight in (
            ("hidden_weight", hidden_weight),
            ("attention_weight", attention_weight),
            ("kl_weight", kl_weight),
        ):
            if not 0.0 <= weight < float("inf"):
                raise ValueError(f"{option} must be finite and not negative, got {weight}")

        if any(getattr(model, "attention_cap", None) is not None for model in (student, teacher)):
            raise ValueError(
                "the attention losses do not know capped scores (attention_cap): take models "
                "without a cap"
            )
        # a tuple hides the models from nn.Module: neither belongs to this module's state
        self._models = (student, teacher)
        self.modules_matched = names
        self.hidden_weight = hidden_weight
        self.attention_weight = attention_weight
        self.kl_weight = kl_weight
        self.attention_target = attention_target
        self.hidden_scale = hidden_scale
        self.reduction = reduction
        self.cross_attention = cross_attention
        self.backend = backend
        self.pairs = {
            name: tuple(
                LayerPair(name, s, t)
                for s, t in match_layers(student.layer_counts[name], teacher.layer_counts[name])
            )
            for name in names
        }
        self._selected: dict[Arm, tuple[LayerPair, ...]] = {}
        self.projections = nn.ParameterDict()
        for name in names:
            d_s, d_t = student.widths[name], teacher.widths[name]
            for pair in self.pairs[name]:
                # nn.Linear's own initialisation
                self.projections[f"{name}_{pair.student}"] = nn.Parameter(
                    torch.empty(d_s, d_t).uniform_(-(d_s**-0.5), d_s**-0.5)
                )
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)

    @property
    def student(self) -> Distillable:
        return self._models[0]

    @property
    def teacher(self) -> Distillable:
        return self._models[1]

    def forward(
        self,
        batch: Batch,
        arm: Arm,
        *,
        predict: Callable[[Tensor, Batch], Tensor],
        divergence: Callable[[Tensor, Tensor, Batch], Tensor] | None = None,
    ) -> StepLosses:
        """Eq. 5 on one batch.

        Args:
            batch: whatever both models take.
            arm: the modules (``image``) or student layers (``image[1-3]``, counted from 1) that
                are distilled now; may be empty.
            predict: ``(student_logits, batch) -> scalar`` prediction loss.
            divergence: ``(student_logits, teacher_logits, batch) -> scalar``; needed when
                ``kl_weight`` is not 0.

        Returns:
            The weighted total and each term.
        """
        if self.kl_weight and divergence is None:
            raise ValueError(f"kl_weight is {self.kl_weight}: pass divergence=")
        if not self.kl_weight:
            divergence = None
        records = self._records(batch, arm, teacher_logits=divergence is not None)
        return self._losses(batch, arm, records, predict, divergence)

    @torch.no_grad()
    def measure(
        self,
        batch: Batch,
        *,
        predict: Callable[[Tensor, Batch], Tensor],
        divergence: Callable[[Tensor, Tensor, Batch], Tensor],
    ) -> Measurement:
        """Every loss of the full model, for the reward (Eq. 6), in one pass of either model.

        The student is put in eval mode for it and back afterwards.

        Args:
            batch: as for :meth:`forward`.
            predict: likewise.
            divergence: likewise.

        Returns:
            The sums with layers reduced as in training, and each layer's; unweighted.
        """
        student = self.student
        training = isinstance(student, nn.Module) and student.training
        if training:
            student.eval()  # type: ignore[attr-defined]
        try:
            records = self._records(batch, self.modules_matched, teacher_logits=True)
        finally:
            if training:
                student.train()  # type: ignore[attr-defined]
        step = self._losses(batch, self.modules_matched, records, predict, divergence)
        assert step.kl is not None and step.hidden is not None and step.attention is not None
        assert records.teacher is not None and records.teacher.logits is not None
        unexplained = step.hidden
        if self.hidden_scale == "none":
            unexplained = unexplained / self._variances(
                step.pairs, records.student, records.teacher
            )
        teacher = predict(records.teacher.logits, batch).float()
        sums = (step.kl, self._reduce(step.hidden), self._reduce(step.attention), step.prediction)
        stacked = torch.stack([term.double() for term in (*sums, teacher)])
        layers = torch.stack([step.hidden, step.attention, unexplained]).double()
        kl, hidden, attention, prediction, taught = stacked.tolist()
        a, b, c = (_by_module(step.pairs, row) for row in layers.tolist())
        return Measurement(kl, hidden, attention, prediction, a, b, c, taught)

    def selected(self, arm: Arm) -> tuple[LayerPair, ...]:
        """The layer pairs of an arm, modules in the arm's order.

        Raises:
            ValueError: a module or layer that is not matched.
        """
        arm = tuple(arm)
        if arm not in self._selected:
            counts = {name: len(pairs) for name, pairs in self.pairs.items()}
            try:
                layers = arm_layers(arm, counts)
            except ValueError as error:
                raise ValueError(f"arm {arm}: {error}") from None
            self._selected[arm] = tuple(
                self.pairs[name][i] for name, chosen in layers.items() for i in chosen
            )
        return self._selected[arm]

    def teacher_request(self, arm: Arm) -> dict[str, list[int]]:
        """The teacher's layers to record: of each module of the arm all matched ones so deep.

        Those above the deepest selected layer need not run. Those below run anyway; recording them
        too keeps the number of different requests, hence of compiled graphs, to one a depth.
        """
        depths: dict[str, int] = {}
        for pair in self.selected(arm):
            depths[pair.module] = pair.student
        return {
            name: [pair.teacher for pair in self.pairs[name][: depth + 1]]
            for name, depth in depths.items()
        }

    def _records(self, batch: Batch, arm: Arm, *, teacher_logits: bool) -> _Records:
        """What both models say of a batch, the teacher only as far as it is needed."""
        lse = self.attention_target == "probs"
        # the student's request is always the whole one, so that no arm means another graph
        everything = {n: [p.student for p in self.pairs[n]] for n in self.modules_matched}
        student = self.student(batch, taps=everything, lse=lse)
        teacher = None
        request = self.teacher_request(arm)
        with torch.no_grad():
            if teacher_logits:
                teacher = self.teacher(batch, taps=request, lse=lse)
            elif request:
                teacher = self.teacher.record(batch, request, lse=lse)
        return _Records(student, teacher)

    def _losses(
        self,
        batch: Batch,
        arm: Arm,
        records: _Records,
        predict: Callable[[Tensor, Batch], Tensor],
        divergence: Callable[[Tensor, Tensor, Batch], Tensor] | None,
    ) -> StepLosses:
        pairs = self.selected(arm)
        student, teacher = records
        assert student.logits is not None
        prediction = predict(student.logits, batch).float()

        kl = hidden = attention = None
        total = prediction
        if divergence is not None:
            assert teacher is not None and teacher.logits is not None
            kl = divergence(student.logits, teacher.logits, batch).float()
            total = total + self.kl_weight * kl
        if pairs:
            assert teacher is not None
            hidden = self._hidden(pairs, student, teacher)
            attention = self._attention(pairs, student, teacher)
            total = total + self.hidden_weight * self._reduce(hidden)
            total = total + self.attention_weight * self._reduce(attention)
        return StepLosses(total, prediction, kl, hidden, attention, pairs)

    def _reduce(self, layers: Tensor) -> Tensor:
        return layers.sum() if self.reduction == "sum" else layers.mean()

    def _hidden(self, pairs: Sequence[LayerPair], student: Record, teacher: Record) -> Tensor:
        losses = hidden_mse(
            [student.taps[p.module][p.student].hidden for p in pairs],
            [teacher.taps[p.module][p.student].hidden for p in pairs],
            [self.projections[f"{p.module}_{p.student}"] for p in pairs],
            mask=[student.masks[p.module] for p in pairs],
            backend=self.backend,
        )
        if self.hidden_scale == "variance":
            losses = losses / self._variances(pairs, student, teacher)
        return losses

    def _variances(self, pairs: Sequence[LayerPair], student: Record, teacher: Record) -> Tensor:
        """Of the teacher's states, [L], as the pairs."""
        return torch.stack(
            [
                _variance(teacher.taps[p.module][p.student].hidden, student.masks[p.module])
                for p in pairs
            ]
        )

    def _attention(self, pairs: Sequence[LayerPair], student: Record, teacher: Record) -> Tensor:
        rows: list[tuple[Any, ...]] = []
        crossing = []
        for pair in pairs:
            mask = student.masks[pair.module]
            causal = bool(self.student.causal[pair.module])
            # both are recorded from the first matched layer on, in the order of the pairs
            s = student.taps[pair.module][pair.student]
            t = teacher.taps[pair.module][pair.student]
            if self.cross_attention and s.cross_q is not None:
                crossing.append((len(rows), s, t, mask))
            rows.append((s.q, s.k, t.q, t.k, s.lse, t.lse, causal, mask, mask))
        layers = len(rows)
        for _, s, t, mask in crossing:
            rows.append((s.cross_q, s.cross_k, t.cross_q, t.cross_k, None, None, False, mask, None))
        q_s, k_s, q_t, k_t, lse_s, lse_t, causals, query_mask, key_mask = map(
            list, zip(*rows, strict=True)
        )
        probs = self.attention_target == "probs"
        losses = attention_mse(
            q_s,
            k_s,
            q_t,
            k_t,
            target=self.attention_target,
            causal=causals,
            query_mask=query_mask,
            key_mask=key_mask,
            student_lse=lse_s if probs else None,
            teacher_lse=lse_t if probs else None,
            backend=self.backend,
        )
        if not crossing:
            return losses
        # a layer's two attentions are one loss
        owner = torch.tensor([row for row, *_ in crossing], device=losses.device)
        return losses[:layers].index_add(0, owner, losses[layers:])


def _by_module(pairs: Sequence[LayerPair], values: Sequence[float]) -> Layers:
    layers: Layers = {}
    for pair, value in zip(pairs, values, strict=True):
        layers.setdefault(pair.module, []).append(value)
    return layers


def _variance(states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over features of the variance over counted tokens, at least 1e-6; [..., N, d]."""
    flat = states.detach().float().flatten(0, -2)
    if mask is None:
        return flat.var(dim=0, correction=0).mean().clamp_min(1e-6)
    keep = mask.flatten().unsqueeze(-1)
    flat = torch.where(keep, flat, 0.0)
    count = keep.sum().clamp_min(1)
    mean = flat.sum(0) / count
    return (torch.where(keep, flat - mean, 0.0).square().sum(0) / count).mean().clamp_min(1e-6)
