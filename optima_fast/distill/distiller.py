"""The loss of one distillation step, Eq. 5, for the modules that an arm selects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optima_fast.distill import maps
from optima_fast.distill.arms import Arm, arm_layers
from optima_fast.distill.maps import Maps
from optima_fast.distill.matching import LayerPair, given_layers, match_layers, matched
from optima_fast.distill.measurement import TERMS, Layers, Measurement
from optima_fast.distill.protocols import Batch, Distillable, Record
from optima_fast.distill.shares import Shares
from optima_fast.distill.tapped import Modules, TappedModel, TappedRecord, paths, summary
from optima_fast.distill.taught import Taught
from optima_fast.distill.terms import AttentionTerm, HiddenTerm
from optima_fast.distill.weights import Weights, by_layer
from optima_fast.errors import UserError
from optima_fast.losses import HIDDEN_LOSSES
from optima_fast.taps.records import Layer


class StepLosses(NamedTuple):
    """Eq. 5 and its terms, before their weights. ``hidden`` and ``attention`` are [L], as pairs.

    A layer to which a mapping gives the weight 0 is not computed: its entry is 0. ``each`` [L] is
    what a pair adds to the total by both, after their weights.
    """

    total: Tensor
    prediction: Tensor
    kl: Tensor | None
    hidden: Tensor | None
    attention: Tensor | None
    pairs: tuple[LayerPair, ...]
    each: Tensor | None = None

    def terms(self, change: Callable[..., Tensor], *others: StepLosses) -> StepLosses:
        """``change`` of every tensor, with those of others of the same arm."""

        def changed(name: str) -> Any:
            value = getattr(self, name)
            given = (getattr(other, name) for other in others)
            return value if value is None else change(value, *given)

        return self._replace(**{name: changed(name) for name in self._fields if name != "pairs"})


class LayerLosses(NamedTuple):
    """The layers' terms of Eq. 5: their weighted sum, and each before its weight, [L] as pairs.

    A layer to which a mapping gives the weight 0 is not computed: its entry is 0. ``each`` [L] is
    what a pair adds to the total.
    """

    total: Tensor
    hidden: Tensor
    attention: Tensor | None
    pairs: tuple[LayerPair, ...]
    each: Tensor | None = None


class _Records(NamedTuple):
    student: Record
    teacher: Record | None  # none where nothing of it is needed


class Distiller(nn.Module):
    r"""Compares a student with its frozen teacher, layer by layer, in what an arm selects.

    .. math:: L = L_{pred} + a_1 KL(t \| s) + a_2 \sum_l \mathrm{MSE}(H_t^l, H_s^l W^l)
              + a_3 \sum_l \mathrm{MSE}(A_t^l, A_s^l)

    (Liang et al., NeurIPS 2023, Eq. 5, with :math:`a_1, a_2, a_3` = ``kl_weight``,
    ``hidden_weight``, ``attention_weight``; other papers weigh the task's loss and each module
    apart.) The teacher runs without gradient and only as far as an arm needs; neither it nor the
    student is part of this module, whose only parameters are the projections :math:`W^l`,
    [d_s, d_t], one per matched student layer.

    Args:
        student: the model to train.
        teacher: the model to learn from; put in eval mode, its parameters frozen.
        modules: names of the modules to match; default all that the student has.
        hidden_weight: :math:`a_2`; or a mapping from every matched module to a number for its
            layers, a sequence of one a layer, or ``{"last": x}`` for its last layer alone.
        attention_weight: :math:`a_3`; likewise. With ``cross_attention`` the key ``"cross"`` is
            that of the last module, the decoder; default its own weights.
        prediction_weight: of the task's own loss.
        kl_weight: :math:`a_1`; at 0 the teacher's logits are not computed.
        attention_loss: ``"scores"`` (mean squared error before the softmax), ``"probs"`` (after
            it), ``"kl"`` (divergence), of the mean over heads; ``"scores-each"``,
            ``"probs-each"``, ``"kl-each"``: of each head; ``"scores-auto"`` and so on: of each
            where both models have as many, else of their mean; ``"relations"`` among queries and
            among keys, see :func:`optima_fast.relation_kl`.
        attention_scale: ``"none"``, or ``"length"`` to multiply each by its number of keys.
        relation_heads: of ``"relations"``.
        hidden_loss: ``"mse"``, ``"normalized-mse"``, ``"cosine"``, ``"smooth-l1"``; ``"gram"``,
            which needs no projections and has none; ``"contrastive"``, against a queue of the
            teacher's tokens of earlier steps, which is part of ``state_dict``. A step with
            gradient adds its tokens.
        negatives: of ``"contrastive"``, how many tokens a layer's queue holds.
        hidden_temperature: of ``"contrastive"``.
        hidden_scale: ``"none"``, or ``"variance"`` to divide each layer's hidden loss by the
            variance of the teacher's states around their mean over the batch's tokens, so that it
            is the share of variance not yet explained.
        reduction: ``"sum"`` over layers, or ``"mean"``.
        cross_attention: match the decoder's cross-attention too.
        cross_both_ways: and what its keys see of its queries: the same products, with the softmax
            over the queries that count.
        teacher_layers: for a module, the teacher's layer (0-based) that each student layer learns
            from, in any order; default: evenly spread, last from last.
        projections: ``"all"`` layers, or those ``"needed"``, where widths differ.
        backend: of the losses, see :func:`optima_fast.hidden_mse`.

    Attributes:
        hidden: the hidden states' term, with its options.
        attention: the attention maps' term, likewise.
        summary: made by :meth:`from_models`: a line a pair, with shapes and what is compared.

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
        hidden_weight: Weights = 1.0,
        attention_weight: Weights = 1e-2,
        prediction_weight: float = 1.0,
        kl_weight: float = 0.0,
        attention_loss: str = "scores",
        attention_scale: str = "none",
        relation_heads: int | None = None,
        hidden_loss: str = "mse",
        negatives: int = 4096,
        hidden_temperature: float = 0.07,
        hidden_scale: str = "none",
        reduction: str = "sum",
        cross_attention: bool = False,
        cross_both_ways: bool = False,
        teacher_layers: Mapping[str, Sequence[int]] | None = None,
        projections: str = "all",
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
            ("attention_loss", attention_loss, maps.NAMES),
            ("attention_scale", attention_scale, maps.SCALES),
            ("hidden_loss", hidden_loss, tuple(HIDDEN_LOSSES)),
            ("hidden_scale", hidden_scale, ("none", "variance")),
            ("reduction", reduction, ("sum", "mean")),
            ("projections", projections, ("all", "needed")),
        ):
            if value not in allowed:
                raise ValueError(f"{option} must be one of {allowed}, got {value!r}")
        if hidden_scale != "none" and hidden_loss != "mse":
            raise ValueError(
                f"hidden_scale={hidden_scale!r} is a share of the mean squared error, got "
                f"hidden_loss={hidden_loss!r}: leave one of them out"
            )
        for option, number in (
            ("negatives", negatives),
            ("hidden_temperature", hidden_temperature),
        ):
            if not 0 < number < float("inf"):
                raise ValueError(f"{option} must be finite and above 0, got {number}")
        if cross_both_ways and not cross_attention:
            raise ValueError("cross_both_ways needs cross_attention=True, got False")
        counts = {n: (student.layer_counts[n], teacher.layer_counts[n]) for n in names}
        layers = {name: count for name, (count, _) in counts.items()}
        for option, weight in (("prediction_weight", prediction_weight), ("kl_weight", kl_weight)):
            by_layer(option, float(weight), layers)
        if any(getattr(model, "attention_cap", None) is not None for model in (student, teacher)):
            raise ValueError(
                "the attention losses do not know capped scores (attention_cap): take models "
                "without a cap"
            )
        # a tuple hides the models from nn.Module: neither belongs to this module's state
        self._models = (student, teacher)
        self.modules_matched = names
        self.prediction_weight = prediction_weight
        self.kl_weight = kl_weight
        self.summary = ""
        self.hidden = HiddenTerm(
            by_layer("hidden_weight", hidden_weight, layers),
            reduction,
            loss=hidden_loss,
            scale=hidden_scale,
            temperature=hidden_temperature,
            backend=backend,
        )
        self.attention = AttentionTerm(
            by_layer("attention_weight", attention_weight, layers, cross=cross_attention),
            reduction,
            loss=Maps(attention_loss, attention_scale, relation_heads, backend),
            cross=cross_attention,
            both_ways=cross_both_ways,
            decoder=names[-1],
        )
        self.attention.loss.check()
        given = teacher_layers or {}
        self.pairs = {
            name: tuple(
                LayerPair(name, s, t)
                for s, t in (
                    given_layers(name, given[name], *counts[name])
                    if name in given
                    else match_layers(*counts[name])
                )
            )
            for name in names
        }
        self._selected: dict[Arm, tuple[LayerPair, ...]] = {}
        for name in names:
            widths = student.widths[name], teacher.widths[name]
            for pair in self.pairs[name]:
                self.hidden.add(pair, widths, negatives, always=projections == "all")
        self.projections = self.hidden.projections
        self.queues = self.hidden.queues
        frozen = module_of(teacher)
        if frozen is not None:
            frozen.eval().requires_grad_(False)

    @classmethod
    def from_models(
        cls,
        student: nn.Module,
        teacher: nn.Module,
        batch: Batch,
        *,
        modules: Modules | None = None,
        **options: Any,
    ) -> Distiller:
        """A distiller of any two models that one batch fits, their fast attention left on.

        Both are tapped (:func:`optima_fast.tap`) and run once on the batch, so that shapes are
        known and what cannot be compared is refused before training.

        Args:
            student: the model to train.
            teacher: the model to learn from; put in eval mode, its parameters frozen.
            batch: what both take by keyword, such as ``{"input_ids": ..., "attention_mask": ...}``.
            modules: by a name of yours the path of a list of layers, the same in both models or one
                for each: ``{"vision": ("vision.blocks", "vision_model.encoder.layers")}``. Default:
                all that are found. Arms are made of these names.
            options: of the constructor; ``projections`` is ``"needed"`` unless given.

        Raises:
            UserError: modules that are not found, attention that cannot be represented while
                ``attention_weight`` is not 0, layers that do not fit each other.

        Example::

            distiller = optima_fast.Distiller.from_models(student, teacher, batch)
            print(distiller.summary)
            step = distiller(batch)  # output.loss of the student, hidden states, attention
            step.total.backward()
        """
        of_student, of_teacher = paths(student, teacher, modules)
        tapped: list[TappedModel] = []
        try:
            tapped.append(TappedModel(student, of_student))
            tapped.append(TappedModel(teacher, of_teacher))
            s, t = (x.try_out(batch) for x in tapped)
            distiller = cls(*tapped, **{"projections": "needed", **options})
            chosen = distiller.selected(distiller.modules_matched)
            t = TappedRecord(None, distiller._requested(t.found))
            layers = matched(chosen, s, t)
            distiller.summary = summary(chosen, layers)
            distiller.to(layers[0][0].hidden.device)
            with torch.no_grad():
                distiller._layer_losses(chosen, s, t)
        except BaseException:
            for x in tapped:
                x.tap.close()
            raise
        return distiller

    @property
    def student(self) -> Distillable:
        return self._models[0]

    @property
    def teacher(self) -> Distillable:
        return self._models[1]

    def forward(
        self,
        batch: Batch,
        arm: Arm | None = None,
        *,
        predict: Callable[[Any, Batch], Tensor] | None = None,
        divergence: Callable[[Any, Any, Batch], Tensor] | None = None,
        shares: Shares | None = None,
    ) -> StepLosses:
        """Eq. 5 on one batch, or what a part of a batch adds to it.

        Args:
            batch: whatever both models take.
            arm: the modules (``image``) or student layers (``image[1-3]``, counted from 1) that
                are distilled now; may be empty. Default: all.
            predict: ``(student_logits, batch) -> scalar`` prediction loss. With
                :meth:`from_models` it gets the student's output; default ``output.loss``.
            divergence: ``(student_logits, teacher_logits, batch) -> scalar``; needed when
                ``kl_weight`` is not 0. With :meth:`from_models` it gets both outputs.
            shares: of the whole batch, where this is a part of it: every term is multiplied by its
                own, so that totals, terms and gradients of all parts add up to those of the whole.

        Returns:
            The weighted total and each term.
        """
        if self.kl_weight and divergence is None:
            raise ValueError(f"kl_weight is {self.kl_weight}: pass divergence=")
        if not self.kl_weight:
            divergence = None
        arm = self.modules_matched if arm is None else arm
        records = self._records(batch, arm, teacher_logits=divergence is not None)
        return self._losses(batch, arm, records, predict or _own_loss, divergence, shares=shares)

    def compare(self, arm: Arm | None = None, *, batch: Batch | None = None) -> LayerLosses:
        """The layers' losses of what both models did last; for a loop that runs them itself.

        Of a distiller made by :meth:`from_models`.

        Args:
            arm: as for :meth:`forward`.
            batch: for the teacher to run on first. Default: it has run already.
        """
        student, teacher = self._models
        if not isinstance(student, TappedModel) or not isinstance(teacher, TappedModel):
            raise TypeError("compare() is of a distiller made by Distiller.from_models")
        pairs = self.selected(self.modules_matched if arm is None else arm)
        if not pairs:
            raise ValueError("compare() needs an arm with a module or a layer, got an empty one")
        if batch is not None:
            with torch.no_grad():
                teacher.model(**batch)
        found = TappedRecord(None, self._requested(teacher.last().found))
        return self._layer_losses(pairs, _with_gradient(student.last(), student), found)

    def close(self) -> None:
        """Take the taps of :meth:`from_models` off both models."""
        for model in self._models:
            if isinstance(model, TappedModel):
                model.tap.close()

    def _requested(self, layers: Mapping[str, Sequence[Layer]]) -> dict[str, list[Layer]]:
        """The teacher's matched layers, in the order of the pairs."""
        return {n: [layers[n][p.teacher] for p in self.pairs[n]] for n in self.modules_matched}

    @torch.no_grad()
    def measure(
        self,
        batch: Batch,
        *,
        predict: Callable[[Tensor, Batch], Tensor],
        divergence: Callable[[Tensor, Tensor, Batch], Tensor],
        terms: Collection[str] = TERMS,
        taught: Taught | None = None,
    ) -> Measurement:
        """The losses of the full model, for the reward (Eq. 6), in one pass of either model.

        The student is put in eval mode for it and back afterwards.

        Args:
            batch: as for :meth:`forward`.
            predict: likewise.
            divergence: likewise.
            terms: what is asked for: ``"kl"`` and ``"attention"`` are computed only where they are
                named, the hidden and the prediction loss always.
            taught: what :meth:`teach` gave for this batch and these terms; default: the teacher
                runs now.

        Returns:
            The sums with layers reduced as in training, and each layer's; unweighted.
        """
        student = module_of(self.student)
        training = student is not None and student.training
        if student is not None:
            student.eval()
        try:
            record = self._student_record(batch)
        finally:
            if student is not None:
                student.train(training)
        if taught is None:
            taught = self.teach(batch, predict=predict, terms=terms)
        step = self._losses(
            batch,
            self.modules_matched,
            _Records(record, taught),
            predict,
            divergence if "kl" in terms else None,
            whole=True,
            maps="attention" in terms,
        )
        assert step.hidden is not None
        unexplained = step.hidden
        if self.hidden.scale == "none":
            unexplained = unexplained / taught.variances(matched(step.pairs, record, taught))
        maps = step.attention
        if maps is None and "attention" in terms:
            maps = torch.zeros_like(step.hidden)  # of layers whose attention is not known
        reduced = self.hidden.reduced
        sums = {
            "hidden": reduced(step.hidden),
            "prediction": step.prediction,
            "teacher": taught.loss,
        }
        by_layer = {"hidden": step.hidden, "unexplained": unexplained}
        if step.kl is not None:
            sums["kl"] = step.kl
        if maps is not None:
            sums["attention"], by_layer["attention"] = reduced(maps), maps
        # the host waits for the device once for all sums, and once for all layers
        numbers = torch.stack([term.double() for term in sums.values()]).tolist()
        rows = torch.stack(list(by_layer.values())).double().tolist()
        known: dict[str, float] = dict(zip(sums, numbers, strict=True))
        layers = {n: _by_module(step.pairs, row) for n, row in zip(by_layer, rows, strict=True)}
        return Measurement(
            kl=known.get("kl"),
            hidden=known["hidden"],
            attention=known.get("attention"),
            prediction=known["prediction"],
            hidden_layers=layers["hidden"],
            attention_layers=layers.get("attention", {}),
            unexplained=layers["unexplained"],
            teacher=known["teacher"],
        )

    @torch.no_grad()
    def teach(
        self,
        batch: Batch,
        *,
        predict: Callable[[Tensor, Batch], Tensor],
        terms: Collection[str] = TERMS,
    ) -> Taught:
        """The teacher's side of :meth:`measure`, which a loop may keep: the teacher never changes.

        Args:
            batch: as for :meth:`measure`.
            predict: likewise.
            terms: likewise.
        """
        request = self.teacher_request(self.modules_matched)
        record = self.teacher(batch, taps=request, lse=self.attention.loss.softmax)
        ordered = self._in_order(record, self.modules_matched)
        found = {name: list(ordered.layers(name)) for name in request}
        if "attention" not in terms:
            found = {n: [x._replace(attentions=()) for x in layers] for n, layers in found.items()}
        loss = predict(record.logits, batch).float()
        return Taught(record.logits if "kl" in terms else None, loss, found)

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
        return {
            name: sorted({pair.teacher for pair in pairs})
            for name, pairs in self._first_pairs(arm).items()
        }

    def _first_pairs(self, arm: Arm) -> dict[str, tuple[LayerPair, ...]]:
        """Of each module of the arm all pairs up to its deepest student layer."""
        depths: dict[str, int] = {}
        for pair in self.selected(arm):
            depths[pair.module] = pair.student
        return {name: self.pairs[name][: depth + 1] for name, depth in depths.items()}

    def _in_order(self, record: Record, arm: Arm) -> Record:
        """The teacher's record of :meth:`teacher_request`, a layer for each pair."""
        found = {}
        for name, pairs in self._first_pairs(arm).items():
            recorded = sorted({pair.teacher for pair in pairs})
            layers = dict(zip(recorded, record.layers(name), strict=True))
            found[name] = [layers[pair.teacher] for pair in pairs]
        return TappedRecord(record.logits, found)

    def _records(self, batch: Batch, arm: Arm, *, teacher_logits: bool) -> _Records:
        """What both models say of a batch, the teacher only as far as it is needed."""
        lse = self.attention.loss.softmax
        student = self._student_record(batch)
        teacher = None
        request = self.teacher_request(arm)
        with torch.no_grad():
            if teacher_logits:
                teacher = self.teacher(batch, taps=request, lse=lse)
            elif request:
                teacher = self.teacher.record(batch, request, lse=lse)
        return _Records(student, None if teacher is None else self._in_order(teacher, arm))

    def _student_record(self, batch: Batch) -> Record:
        # the request is always the whole one, so that no arm means another graph
        everything = {n: [p.student for p in self.pairs[n]] for n in self.modules_matched}
        record: Record = self.student(batch, taps=everything, lse=self.attention.loss.softmax)
        return record

    def _losses(
        self,
        batch: Batch,
        arm: Arm,
        records: _Records,
        predict: Callable[[Tensor, Batch], Tensor],
        divergence: Callable[[Tensor, Tensor, Batch], Tensor] | None,
        *,
        whole: bool = False,
        maps: bool = True,
        shares: Shares | None = None,
    ) -> StepLosses:
        """``whole``: also the layers of weight 0; ``maps``: the attention losses too."""
        pairs = self.selected(arm)
        student, teacher = records
        assert student.logits is not None
        prediction = predict(student.logits, batch).float()
        if shares is not None:
            prediction = shares.prediction * prediction

        kl = hidden = attention = each = None
        total = self.prediction_weight * prediction
        if divergence is not None:
            assert teacher is not None and teacher.logits is not None
            kl = divergence(student.logits, teacher.logits, batch).float()
            if shares is not None:
                kl = shares.divergence * kl
            total = total + self.kl_weight * kl
        if pairs:
            assert teacher is not None
            of_layers = self._layer_losses(
                pairs, student, teacher, whole=whole, maps=maps, shares=shares
            )
            total = total + of_layers.total
            hidden, attention, each = of_layers.hidden, of_layers.attention, of_layers.each
        return StepLosses(total, prediction, kl, hidden, attention, pairs, each)

    def _layer_losses(
        self,
        pairs: tuple[LayerPair, ...],
        student: Record,
        teacher: Record,
        *,
        whole: bool = False,
        maps: bool = True,
        shares: Shares | None = None,
    ) -> LayerLosses:
        layers = matched(pairs, student, teacher)
        hidden = self.hidden(pairs, layers, whole, shares)
        if torch.is_grad_enabled():
            self.hidden.remember(pairs, layers)
        unfit = any(s.refusals or t.refusals for s, t in layers)
        if not maps or (unfit and not self.attention):
            return LayerLosses(hidden.weighed, hidden.layers, None, pairs, hidden.each)
        attention = self.attention(pairs, layers, whole, shares)
        total, each = hidden.weighed + attention.weighed, hidden.each + attention.each
        return LayerLosses(total, hidden.layers, attention.layers, pairs, each)


def module_of(model: object) -> nn.Module | None:
    """The PyTorch module of a model, if it is one."""
    inner = model.model if isinstance(model, TappedModel) else model
    return inner if isinstance(inner, nn.Module) else None


def _with_gradient(record: TappedRecord, model: TappedModel) -> TappedRecord:
    """The record, which must lead to the weights of modules that are trained."""
    for name, layers in record.found.items() if torch.is_grad_enabled() else ():
        if not layers[-1].hidden.requires_grad and model.tap.trains(name):
            raise UserError(
                f"{name}: the student's layers were recorded without gradient: it ran under "
                "no_grad, or in a reentrant checkpoint, which needs use_reentrant=False"
            )
    return record


def _own_loss(output: Any, batch: Batch) -> Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise UserError(
            f"the student's output ({type(output).__name__}) has no loss: put labels into the "
            "batch, or pass predict="
        )
    return loss


def _by_module(pairs: Sequence[LayerPair], values: Sequence[float]) -> Layers:
    layers: Layers = {}
    for pair, value in zip(pairs, values, strict=True):
        layers.setdefault(pair.module, []).append(value)
    return layers
