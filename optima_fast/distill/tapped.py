"""Any model as a :class:`Distiller` takes it: run as it is, its layers recorded by a tap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from optima_fast.errors import UserError
from optima_fast.taps import Layer, stacks, tap, unwrapped

Modules = Mapping[str, str | tuple[str, str]]


class TappedRecord(NamedTuple):
    """A model's output, whatever it is, and the layers that were asked for."""

    logits: Any
    found: Mapping[str, Sequence[Layer]]

    def layers(self, module: str) -> Sequence[Layer]:
        return self.found[module]


class TappedModel:
    """A model and its tap.

    Args:
        model: called with the batch's entries by keyword; as DistributedDataParallel too.
        modules: path of each list of layers.

    Attributes:
        widths: of each module's states, once it has run.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, str]) -> None:
        self.model = model
        self.tap = tap(model, modules)
        self.layer_counts = self.tap.counts
        self.widths: dict[str, int] = {}

    def __call__(
        self,
        batch: Mapping[str, Any],
        taps: Mapping[str, Sequence[int]] | None = None,
        lse: bool = False,
    ) -> TappedRecord:
        output = self.model(**batch)
        return self.last(taps)._replace(logits=output)

    def record(
        self, batch: Mapping[str, Any], taps: Mapping[str, Sequence[int]], *, lse: bool = False
    ) -> TappedRecord:
        return self(batch, taps)

    def last(self, taps: Mapping[str, Sequence[int]] | None = None) -> TappedRecord:
        """What the model did last, of these layers or of all."""
        layers = self.tap.layers()
        if taps is not None:
            layers = {name: [layers[name][i] for i in chosen] for name, chosen in taps.items()}
        return TappedRecord(None, layers)

    @torch.no_grad()
    def try_out(self, batch: Mapping[str, Any]) -> TappedRecord:
        """One run in eval mode, from which the widths are known."""
        training = self.model.training
        self.model.eval()
        try:
            record = self(batch)
        finally:
            self.model.train(training)
            # FSDP keeps its outermost weights whole for a backward pass that does not come here
            reshard = getattr(self.model, "reshard", None)
            if callable(reshard):
                reshard()
        for name, layers in record.found.items():
            widths = {layer.hidden.shape[-1] for layer in layers}
            if len(widths) > 1:
                raise UserError(
                    f"{self.tap.modules[name]}: layers of one width were expected, got "
                    f"{sorted(widths)}; name the lists of layers one by one in modules"
                )
            (self.widths[name],) = widths
        return record


def paths(
    student: nn.Module, teacher: nn.Module, modules: Modules | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Where both models have the layers of each module.

    Args:
        student: as given.
        teacher: as given.
        modules: by name a path that is the same in both, or two; None: all that are found.

    Raises:
        UserError: those that are found do not have the same names, or a name is not one.
    """
    if modules is not None:
        for name in modules:
            if not name.isidentifier():
                raise UserError(
                    f"modules: a name must be of letters, digits and _, as arms and projections "
                    f"are named after it, got {name!r}"
                )
        both = {name: (x, x) if isinstance(x, str) else x for name, x in modules.items()}
        return {n: a for n, (a, _) in both.items()}, {n: b for n, (_, b) in both.items()}
    of_student, of_teacher = stacks.find(unwrapped(student)), stacks.find(unwrapped(teacher))
    if len(of_student) == len(of_teacher) == 1:
        return of_student, dict(zip(of_student, of_teacher.values(), strict=True))
    if set(of_student) != set(of_teacher):
        raise UserError(
            f"the student's modules are {of_student}, the teacher's {of_teacher}: say which belong "
            'together, as in modules={"vision": ("student.path", "teacher.path")}'
        )
    return of_student, {name: of_teacher[name] for name in of_student}


def summary(pairs: Sequence[Any], layers: Sequence[tuple[Layer, Layer]]) -> str:
    """A line a pair: what is compared, and its shapes."""
    lines = []
    for pair, (s, t) in zip(pairs, layers, strict=True):
        widths = s.hidden.shape[-1], t.hidden.shape[-1]
        text = f"{pair}: hidden {widths[0]}"
        text += " as they are" if widths[0] == widths[1] else f" projected to {widths[1]}"
        for i, (a, b) in enumerate(zip(s.attentions, t.attentions, strict=False)):
            text += f"; {'cross-attention' if i else 'attention'} of {_heads(a)} and {_heads(b)}"
            text += ", causal" * a.causal + ", padded" * (a.key_mask is not None)
            text += f", window of {a.window}" if a.window else ""
        for reason in (*s.refusals, *t.refusals):
            text += f"; NOT COMPARED: {reason}"
        lines.append(text)
    return "\n".join(lines)


def _heads(a: Any) -> str:
    groups = "" if a.q.shape[1] == a.k.shape[1] else f" ({a.k.shape[1]} of keys)"
    return f"{a.q.shape[1]} heads{groups} of {a.q.shape[3]}"
