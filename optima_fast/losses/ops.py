"""The losses as PyTorch operators: one call for all layers, whatever their shapes.

``optima_fast::hidden_loss`` and ``optima_fast::attention_loss`` return the losses [L], a marker and
what the backend keeps for backward: unit gradients (blockwise, which computes them while a block is
in cache) or residuals (Triton), which ``..._backward`` takes together with the upstream gradient.
With ``recompute`` nothing is kept but the inputs, and backward goes through forward again, layer by
layer. Inputs and what is kept are only read, so a second backward equals the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from optima_fast.losses import strips
from optima_fast.losses.backends import (
    ATTENTION,
    HIDDEN,
    INDEXER,
    AttentionInputs,
    Backend,
    Gradients,
    HiddenInputs,
    IndexerInputs,
    Inputs,
    filled,
    resolve,
)
from optima_fast.losses.reference import accumulator


def _operator(
    name: str,
    schema: str,
    kind: type[Inputs],
    backends: dict[str, Backend],
    *,
    trained: tuple[str, ...],
) -> Any:
    """Register ``optima_fast::{name}`` and its backward.

    Args:
        name: of the operator.
        schema: of its inputs, in the order of the fields of ``kind``.
        kind: what they are gathered in.
        backends: of the loss, by name.
        trained: fields that have gradients.
    """

    def unpacked(arguments: tuple[Any, ...]) -> tuple[Inputs, Backend, bool]:
        *fields, backend, recompute = arguments
        inputs = kind(*fields)
        chosen = resolve(backends, backend, inputs)
        return inputs, chosen, recompute or (chosen.strips and strips.too_large(inputs))

    def forward(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        inputs, backend, recompute = unpacked(arguments)
        with _without_autocast(inputs):
            losses, saved = backend.forward(_unwanted(inputs) if recompute else inputs)
        kept = any(inputs.needed) and not recompute
        return losses, losses.new_empty(0), saved if kept else []

    def forward_like(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        inputs, backend, recompute = unpacked(arguments)
        losses = inputs.tensors[0].new_empty(len(inputs[0]), dtype=accumulator(*inputs.tensors))
        kept = any(inputs.needed) and not recompute
        return losses, losses.new_empty(0), backend.saved_like(inputs) if kept else []

    def backward(
        upstream: Tensor, marker: Tensor, saved: list[Tensor], *arguments: Any
    ) -> list[Tensor]:
        inputs, backend, recompute = unpacked(arguments)
        with _without_autocast(inputs):
            if not recompute:
                return filled(_gradients(backend, upstream, saved, inputs), inputs)
            gradients: Gradients = [None] * len(inputs.trained)
            layers = len(upstream)
            for i, layer in enumerate(_layers(inputs)):
                if any(layer.needed):
                    gradients[i::layers] = _again(backend, upstream[i : i + 1], layer)
            return filled(gradients, inputs)

    def backward_like(
        upstream: Tensor, marker: Tensor, saved: list[Tensor], *arguments: Any
    ) -> list[Tensor]:
        *fields, _, _ = arguments
        inputs = kind(*fields)
        pairs = zip(inputs.trained, inputs.needed, strict=True)
        return filled([torch.empty_like(x) if needed else None for x, needed in pairs], inputs)

    settings = f"{schema}, str backend, bool recompute"
    op = torch.library.custom_op(
        f"optima_fast::{name}",
        forward,
        mutates_args=(),
        schema=f"({settings}) -> (Tensor, Tensor, Tensor[])",
    )
    op.register_fake(forward_like)
    backward_op = torch.library.custom_op(
        f"optima_fast::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor upstream, Tensor marker, Tensor[] saved, {settings}) -> Tensor[]",
    )
    backward_op.register_fake(backward_like)
    backward_op.register_autograd(_refuse)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, marker, saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # else each tensor that is kept gets zeros of its size
        gathered, backend, recompute = unpacked(inputs)
        ctx.scales = backend.backward is None and not recompute
        ctx.lists = [
            len(x) if isinstance(x, list) and all(isinstance(y, Tensor) for y in x) else None
            for x in inputs
        ]
        fields: list[Any] = []
        if ctx.scales:
            ctx.dtypes = [x.dtype for x in gathered.trained]
        else:
            dropped = set() if recompute else backend.only_forward(gathered)
            named = zip(kind._fields, gathered, strict=True)
            fields = [[] if field in dropped else value for field, value in named]
            fields += inputs[len(fields) :]
        ctx.kept = len(saved)
        # tensors are saved, and stand for themselves in what remains
        ctx.fields = [
            [_SAVED if isinstance(y, Tensor) else y for y in x] if isinstance(x, list) else x
            for x in fields
        ]
        tensors = [y for x in fields if isinstance(x, list) for y in x if isinstance(y, Tensor)]
        # the marker requires grad, so a backward that is itself recorded leads to _refuse
        ctx.save_for_backward(marker, *saved, *tensors)

    def differentiate(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        grads: list[Any] = [None if n is None else [None] * n for n in ctx.lists]
        if upstream is None:
            return tuple(grads)
        marker, *tensors = ctx.saved_tensors
        saved, rest = tensors[: ctx.kept], iter(tensors[ctx.kept :])
        if ctx.scales:
            values = _Scaled.apply(marker, upstream, ctx.dtypes, *saved)  # type: ignore[no-untyped-call]
        else:
            fields = [[*_restored(x, rest)] if isinstance(x, list) else x for x in ctx.fields]
            values = backward_op(upstream, marker, saved, *fields)
        layers = len(upstream)
        for n, field in enumerate(trained):
            place = kind._fields.index(field)
            needed = ctx.needs_input_grad[place]
            part = values[n * layers : (n + 1) * layers]
            grads[place] = [g if need else None for g, need in zip(part, needed, strict=True)]
        return tuple(grads)

    op.register_autograd(differentiate, setup_context=setup_context)
    return op


_SAVED = "saved"


def _restored(values: list[Any], tensors: Iterator[Tensor]) -> Iterator[Any]:
    for value in values:
        yield next(tensors) if value is _SAVED else value


def needed(tensors: list[Tensor]) -> list[bool]:
    """Which gradients a call will be asked for."""
    return [torch.is_grad_enabled() and x.requires_grad for x in tensors]


def _without_autocast(inputs: Inputs) -> torch.autocast:
    return torch.autocast(inputs.tensors[0].device.type, enabled=False)


def _unwanted(inputs: Inputs) -> Inputs:
    """The same without any gradient wanted."""
    needs = [field for field in inputs._fields if field.startswith("need_")]
    return inputs._replace(**{field: [False] * len(inputs[0]) for field in needs})


def _layers(inputs: Inputs) -> Iterator[Inputs]:
    """Each layer as inputs of its own."""
    for i in range(len(inputs[0])):
        yield type(inputs)(*(x[i : i + 1] if isinstance(x, list) else x for x in inputs))


def _again(backend: Backend, upstream: Tensor, layer: Inputs) -> Gradients:
    """Of one layer that kept nothing."""
    if backend.strips and strips.needed(layer):
        return strips.gradients(backend, upstream, layer)
    _, saved = backend.forward(layer)
    return _gradients(backend, upstream, saved, layer)


def _gradients(
    backend: Backend, upstream: Tensor, saved: list[Tensor], inputs: Inputs
) -> Gradients:
    if backend.backward is not None:
        return backend.backward(upstream, saved, inputs)
    values = _scaled(upstream, [x.dtype for x in inputs.trained], saved)
    return [g if needed else None for g, needed in zip(values, inputs.needed, strict=True)]


def _scaled(
    upstream: Tensor, dtypes: list[torch.dtype], unit: list[Tensor] | tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Unit gradients times the upstream gradient of their layer, in the dtype of their input."""
    layers = len(upstream)
    return tuple(
        (g * upstream[i % layers]).to(dtype)
        for i, (g, dtype) in enumerate(zip(unit, dtypes, strict=True))
    )


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "optima_fast losses can be differentiated once: their gradients are computed with the "
        "loss. For a second derivative use backend='reference'."
    )


class _Scaled(torch.autograd.Function):
    """``_scaled``, in a graph that a compiler sees through."""

    @staticmethod
    def forward(
        ctx: Any, marker: Tensor, upstream: Tensor, dtypes: list[torch.dtype], *unit: Tensor
    ) -> tuple[Tensor, ...]:
        return _scaled(upstream, dtypes, unit)

    backward = staticmethod(_refuse)


hidden_loss = _operator(
    "hidden_loss",
    "Tensor[] student, Tensor[] teacher, Tensor[] weight, Tensor?[] mask, str measure, float beta,"
    " bool[] need_student, bool[] need_weight",
    HiddenInputs,
    HIDDEN,
    trained=("student", "weight"),
)
attention_loss = _operator(
    "attention_loss",
    "Tensor[] student_q, Tensor[] student_k, Tensor[] teacher_q, Tensor[] teacher_k,"
    " Tensor?[] query_mask, Tensor?[] key_mask, Tensor?[] student_lse, Tensor?[] teacher_lse,"
    " float[] student_scale, float[] teacher_scale, str target, bool[] causal,"
    " int[] window, bool[] need_q, bool[] need_k",
    AttentionInputs,
    ATTENTION,
    trained=("student_q", "student_k"),
)
indexer_kl = _operator(
    "indexer_kl",
    "Tensor[] q, Tensor[] k, Tensor[] weight, Tensor[] teacher_q, Tensor[] teacher_k,"
    " Tensor?[] query_mask, Tensor?[] key_mask, Tensor?[] teacher_lse, float[] teacher_scale,"
    " bool[] causal, bool[] need_q, bool[] need_k, bool[] need_weight",
    IndexerInputs,
    INDEXER,
    trained=("q", "k", "weight"),
)
