"""The two terms of Eq. 5 that sum over layers: hidden states, and attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optima_fast.distill.maps import RELATIONS, Maps, swapped
from optima_fast.distill.matching import LayerPair, Matched
from optima_fast.distill.queue import TokenQueue
from optima_fast.distill.shares import Extent, Shares, on_device
from optima_fast.distill.weights import CROSS, ByLayer
from optima_fast.errors import UserError
from optima_fast.losses import HIDDEN_LOSSES, QUEUED, UNPROJECTED
from optima_fast.taps.records import Attention


class Term(NamedTuple):
    """What a term is for the pairs of an arm.

    Attributes:
        layers: ``[pairs]``, each pair's loss before its weight; 0 where it was not computed.
        weighed: the term itself: their weighted sum, or mean.
        each: ``[pairs]``, what each pair adds to it.
    """

    layers: Tensor
    weighed: Tensor
    each: Tensor


class _LayerTerm:
    """What both have: weights, and how layers become one number.

    Args:
        weights: one for all layers, or by module one a layer.
        reduction: ``"sum"`` over layers, or ``"mean"``.
    """

    def __init__(self, weights: float | ByLayer, reduction: str) -> None:
        self.weights = weights
        self.reduction = reduction

    def __bool__(self) -> bool:
        """Whether a layer has a weight."""
        if isinstance(self.weights, float):
            return bool(self.weights)
        return any(map(any, self.weights.values()))

    def weight(self, pair: LayerPair, name: str | None = None) -> float:
        """A pair's; ``name``: what its weights are called, if not as its module."""
        if isinstance(self.weights, float):
            return self.weights
        return self.weights.get(name or pair.module, self.weights[pair.module])[pair.student]

    def computed(self, weight: float, whole: bool) -> bool:
        """Whether a loss is computed: where one number weighs all, always, to be reported."""
        return whole or bool(weight) or isinstance(self.weights, float)

    def reduced(self, layers: Tensor) -> Tensor:
        return layers.sum() if self.reduction == "sum" else layers.mean()

    def weighed(
        self, losses: Tensor, owners: Sequence[int], count: int, weights: Sequence[float]
    ) -> Term:
        """The term of any number of losses a layer.

        Args:
            losses: their values.
            owners: the layer of each.
            count: number of layers.
            weights: of each value.
        """

        def by_owner(values: Tensor) -> Tensor:
            if list(owners) == list(range(count)):
                return values
            total = values.new_zeros(count)
            # exact as floats, and copied to the device without waiting for it
            owner = on_device(owners, total).long()
            return total.index_add(0, owner, values)

        layers = by_owner(losses)
        share = 1.0 if self.reduction == "sum" else 1.0 / count
        if isinstance(self.weights, float):
            each = self.weights * share * layers
            return Term(layers, self.weights * self.reduced(layers), each)
        weighted = by_owner(losses * on_device(weights, losses))
        return Term(layers, self.reduced(weighted), share * weighted)


class HiddenTerm(_LayerTerm):
    """The hidden states' term.

    Args:
        weights: as of the base.
        reduction: likewise.
        loss: a name of ``optima_fast.losses.HIDDEN_LOSSES``.
        scale: ``"none"``, or ``"variance"`` to divide each by that of its teacher's states.
        temperature: of ``"contrastive"``.
        backend: of the loss.

    Attributes:
        projections: of pairs by :meth:`LayerPair.key`; a pair without one is compared as it is.
        queues: of pairs likewise, for ``"contrastive"``.
    """

    def __init__(
        self,
        weights: float | ByLayer,
        reduction: str,
        *,
        loss: str,
        scale: str,
        temperature: float,
        backend: str,
    ) -> None:
        super().__init__(weights, reduction)
        self.loss = loss
        self.scale = scale
        self.temperature = temperature
        self.backend = backend
        # the Distiller's own, so that they are its parameters and state by these names
        self.projections = nn.ParameterDict()
        self.queues = nn.ModuleDict()

    def add(self, pair: LayerPair, widths: tuple[int, int], negatives: int, always: bool) -> None:
        """Give a pair the parameters and the state that its loss needs.

        Args:
            pair: the layers.
            widths: student's and teacher's.
            negatives: tokens that a queue holds.
            always: a projection too where widths agree.
        """
        d_s, d_t = widths
        if self.loss not in UNPROJECTED and (always or d_s != d_t):
            # nn.Linear's own initialisation
            bound = d_s**-0.5
            self.projections[pair.key] = nn.Parameter(torch.empty(d_s, d_t).uniform_(-bound, bound))
        if self.loss in QUEUED:
            # a layer that is not compared remembers nothing, and is measured as 0
            self.queues[pair.key] = TokenQueue(negatives if self.weight(pair) else 0, d_t)

    def __call__(
        self,
        pairs: Sequence[LayerPair],
        layers: Sequence[Matched],
        whole: bool,
        shares: Shares | None = None,
    ) -> Term:
        """The term; ``whole``: also of layers of weight 0; ``shares`` of a part of a batch."""
        weights = [self.weight(pair) for pair in pairs]
        chosen = [i for i, weight in enumerate(weights) if self.computed(weight, whole)]
        if not chosen:
            return _nothing(layers)
        compared = [layers[i] for i in chosen]
        given: list[Any] = [[s.hidden for s, _ in compared], [t.hidden for _, t in compared]]
        options: dict[str, Any] = {"mask": [s.mask for s, _ in compared]}
        if self.loss not in UNPROJECTED:
            given.append([self.projections.get(pairs[i].key) for i in chosen])
        if self.loss in QUEUED:
            queues = [self.queues[pairs[i].key] for i in chosen]
            given.append([queue.tokens for queue in queues])
            options["negatives_mask"] = [queue.counts for queue in queues]
            options["temperature"] = self.temperature
        else:
            options["backend"] = self.backend
        losses = HIDDEN_LOSSES[self.loss](*given, **options)
        if self.scale == "variance":
            losses = losses / variances(compared)
        if shares is not None:
            extents = (shares.modules[pairs[i].module] for i in chosen)
            counted = [x.squares if self.loss in UNPROJECTED else x.tokens for x in extents]
            losses = losses * on_device(counted, losses)
        return self.weighed(losses, chosen, len(pairs), [weights[i] for i in chosen])

    def remember(self, pairs: Sequence[LayerPair], layers: Sequence[Matched]) -> None:
        """Keep the teacher's tokens for later steps."""
        for pair, (s, t) in zip(pairs, layers, strict=True) if self.queues else ():
            queue = self.queues[pair.key]
            assert isinstance(queue, TokenQueue)
            if len(queue.tokens):
                queue.push(t.hidden, s.mask)


class AttentionTerm(_LayerTerm):
    """The attention maps' term.

    Args:
        weights: as of the base; ``"cross"`` are the decoder's cross-attentions.
        reduction: likewise.
        loss: of the maps.
        cross: compare cross-attention too.
        both_ways: and what its keys see of its queries.
        decoder: the module whose cross-attentions ``"cross"`` weighs.
    """

    def __init__(
        self,
        weights: float | ByLayer,
        reduction: str,
        *,
        loss: Maps,
        cross: bool,
        both_ways: bool,
        decoder: str,
    ) -> None:
        super().__init__(weights, reduction)
        self.loss = loss
        self.cross = cross
        self.both_ways = both_ways
        self.decoder = decoder

    def __call__(
        self,
        pairs: Sequence[LayerPair],
        layers: Sequence[Matched],
        whole: bool,
        shares: Shares | None = None,
    ) -> Term:
        """The term; ``whole``: also of layers of weight 0; ``shares`` of a part of a batch."""
        rows: list[tuple[Attention, Attention]] = []
        owners: list[int] = []
        factors: list[float] = []
        counted: list[float] = []
        for i, (pair, (s, t)) in enumerate(zip(pairs, layers, strict=True)):
            weights = [self.weight(pair)]
            if self.cross:
                weights.append(self.weight(pair, CROSS if pair.module == self.decoder else None))
            if (s.refusals or t.refusals) and not any(weights):
                continue
            _check(pair, s.refusals, t.refusals, (len(s.attentions), len(t.attentions)))
            both = zip((False, True), s.attentions, t.attentions, weights, strict=False)
            for is_cross, a, b, weight in both:
                if not self.computed(weight, whole):
                    continue
                _check_pattern(pair, a, b)
                found = [(a, b)]
                if is_cross and self.both_ways:
                    found.append((swapped(a), swapped(b)))
                if shares is not None:
                    extent = shares.modules[pair.module]
                    means = [False, True][: len(found)]
                    counted += [self._counted(extent, a.causal, is_cross, x) for x in means]
                rows += found
                owners += [i] * len(found)
                factors += [weight] * len(found)
        if not rows:
            return _nothing(layers)
        losses = self.loss(*([row[i] for row in rows] for i in range(2)))
        if shares is not None:
            losses = losses * on_device(counted, losses)
        return self.weighed(losses, owners, len(pairs), factors)

    def _counted(self, extent: Extent, causal: bool, is_cross: bool, is_swapped: bool) -> float:
        """What a map's loss is a mean over: its rows or its pairs of query and key.

        Items have the same number of keys in cross-attention, all of which count.
        """
        if self.loss.loss.startswith("kl") or self.loss.loss == RELATIONS:
            return extent.items if is_swapped else extent.tokens
        if is_cross:
            return extent.tokens
        return extent.seen if causal else extent.squares


def _check(
    pair: LayerPair, student: Sequence[str], teacher: Sequence[str], counts: tuple[int, int]
) -> None:
    """Raise unless both layers' attentions are known, and as many."""
    refusals = "; ".join(chain(student, teacher))
    if refusals:
        raise UserError(
            f"{pair}: the attention losses cannot represent {refusals}. Set attention_weight=0, or "
            "leave the layer out of the arm"
        )
    if not counts[0] or counts[0] != counts[1]:
        raise UserError(
            f"{pair}: the student's layer has {counts[0]} attentions and the teacher's "
            f"{counts[1]}; set attention_weight=0"
        )


def _check_pattern(pair: LayerPair, a: Attention, b: Attention) -> None:
    """Raise unless both maps are of the same pairs of query and key."""
    if (a.causal, a.window) != (b.causal, b.window):
        raise UserError(
            f"{pair}: the student's attention has causal={a.causal} and window={a.window}, the "
            f"teacher's causal={b.causal} and window={b.window}: their maps are of different "
            "pairs; set attention_weight=0, or leave the layer out of the arm"
        )


def _nothing(layers: Sequence[Matched]) -> Term:
    """No loss of any layer."""
    zeros = torch.zeros(len(layers), device=layers[0][0].hidden.device)
    return Term(zeros, zeros.sum(), zeros)


def variances(layers: Sequence[Matched]) -> Tensor:
    """Of each teacher's states, ``[len(layers)]``, at least 1e-6.

    The mean over features of the variance over the tokens that count.
    """
    return torch.stack([_variance(t.hidden, s.mask) for s, t in layers])


def _variance(states: Tensor, mask: Tensor | None) -> Tensor:
    flat = states.detach().float().flatten(0, -2)
    if mask is None:
        return flat.var(dim=0, correction=0).mean().clamp_min(1e-6)
    keep = mask.flatten().unsqueeze(-1)
    flat = torch.where(keep, flat, 0.0)
    count = keep.sum().clamp_min(1)
    mean = flat.sum(0) / count
    return (torch.where(keep, flat - mean, 0.0).square().sum(0) / count).mean().clamp_min(1e-6)
