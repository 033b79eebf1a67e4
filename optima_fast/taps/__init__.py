"""Taps: what the layers of any model did, recorded while its fast attention stays on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optima_fast.errors import UserError
from optima_fast.taps import calls, masks, stacks
from optima_fast.taps.calls import Call
from optima_fast.taps.records import Attention, Layer

__all__ = ["Attention", "Layer", "Tap", "record", "tap"]

HIDDEN = "_optima_fast_hidden"


class Tap:
    """Records of a model's layers; made by :func:`tap`.

    Attributes:
        model: as given.
        modules: path of each list of layers, by name.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, str]) -> None:
        self.model = model
        self.modules = dict(modules)
        self._layers = stacks.layers(model, self.modules)
        # all modules of each layer, itself too, by their path inside it, in the model's order
        self._parts = {
            layer: dict(layer.named_modules()) for group in self._layers.values() for layer in group
        }
        self._padding: dict[str, Any] = {}  # masks that the model was given
        begin = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._handles: list[Any] = [begin]
        self._functions: calls.Functions | None = None
        self._transformers = any(_is_transformers(x) for x in model.modules())
        if self._transformers:
            calls.see_transformers()
        else:
            self._functions = calls.Functions()
            end = model.register_forward_hook(self._end, always_call=True)
            self._handles.append(end)
        for layer, inside in self._parts.items():
            self._handles.append(layer.register_forward_hook(_keep_hidden))
            for module in inside.values():
                calls.watch(module)
                if self._functions is not None:
                    self._handles.append(module.register_forward_pre_hook(self._enter))
                    leave = module.register_forward_hook(self._leave, always_call=True)
                    self._handles.append(leave)
        self.clear()

    @property
    def counts(self) -> dict[str, int]:
        """How many layers each module has."""
        return {name: len(group) for name, group in self._layers.items()}

    def trains(self, module: str) -> bool:
        """Whether any weight of the module's layers is trained."""
        return any(x.requires_grad for layer in self._layers[module] for x in layer.parameters())

    def layers(self) -> dict[str, list[Layer]]:
        """What the layers did in the model's last forward pass; the tap lets go of it.

        Which tokens count is read from the model's own masks, which are compared with what was
        read: on a CUDA device the host waits for that once for each different mask.

        Returns:
            By module, first layer first. ``refusals`` of a layer name attentions that the losses
            cannot represent: a bias added to the scores, capped scores, sinks.

        Raises:
            UserError: the model has not run since the last call, or a layer ran more than once.
        """
        known: dict[tuple[int, bool], masks.Pairs | masks.Refused] = {}
        found = {
            name: [
                self._layer(f"{self.modules[name]}.{i}", layer, known)
                for i, layer in enumerate(group)
            ]
            for name, group in self._layers.items()
        }
        self.clear()
        return found

    def clear(self) -> None:
        """Let go of what was recorded."""
        self._padding = {}
        for layer, inside in self._parts.items():
            setattr(layer, HIDDEN, ())
            for module in inside.values():
                setattr(module, calls.CALLS, ())

    def close(self) -> None:
        """Take the tap off the model."""
        for handle in self._handles:
            handle.remove()
        if self._handles and self._transformers:
            calls.unsee_transformers()
        self._handles = []
        for layer, inside in self._parts.items():
            layer.__dict__.pop(HIDDEN, None)
            for module in inside.values():
                calls.forget(module)

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.clear()
        self._padding = {k: v for k, v in kwargs.items() if k.endswith("attention_mask")}
        if self._functions is not None:
            if torch.compiler.is_compiling():
                raise UserError(
                    "a tapped model that is not of transformers cannot be compiled as a whole: "
                    "compile its blocks, or call optima_fast.record in its attention"
                )
            self._functions.inside.clear()
            self._functions.__enter__()

    def _end(self, *_: Any) -> None:
        assert self._functions is not None
        if self._functions.on:
            self._functions.__exit__(None, None, None)

    def _enter(self, module: nn.Module, *_: Any) -> None:
        assert self._functions is not None
        self._functions.inside.append(module)

    def _leave(self, *_: Any) -> None:
        assert self._functions is not None
        if self._functions.inside:
            self._functions.inside.pop()

    def _layer(
        self,
        path: str,
        layer: nn.Module,
        known: dict[tuple[int, bool], masks.Pairs | masks.Refused],
    ) -> Layer:
        states = getattr(layer, HIDDEN)
        if not states:
            raise UserError(f"{path} has not run since the tap's records were last read")
        if len(states) > 1:
            raise UserError(
                f"{path} ran {len(states)} times in one forward pass: a model whose layers share "
                "their weights has no record for each"
            )
        parts = self._parts[layer]
        hidden = states[0]
        if any(isinstance(x, nn.MultiheadAttention) and not x.batch_first for x in parts.values()):
            hidden = hidden.transpose(0, 1)  # [N, B, d]
        attentions: list[Attention] = []
        refusals: list[str] = []
        # the layer's own attention knows better, if it is seen
        tokens = self._given(path, hidden)
        for inside, module in parts.items():
            for call in getattr(module, calls.CALLS):
                crossing = stacks.CROSS.search(inside) is not None
                crossing = crossing or call.q.shape[2] != call.k.shape[2]
                pairs: masks.Pairs | None
                try:
                    pairs = _pairs(call, crossing, known)
                    queries = tokens if crossing else pairs.queries
                    attentions.append(_attention(call, pairs, queries))
                except masks.Refused as reason:
                    pairs = reason.pairs
                    refusals.append(f"{path}.{inside}".rstrip(".") + f": {reason}")
                of_tokens = (call.q.shape[0], call.q.shape[2]) == hidden.shape[:-1]
                if pairs is not None and of_tokens and not crossing:
                    tokens = pairs.queries
        if not attentions and not refusals:
            refusals.append(f"{path}: {self._unseen(layer)}")
        return Layer(hidden, tokens, tuple(attentions), tuple(refusals))

    def _given(self, path: str, states: Tensor) -> Tensor | None:
        """The padding mask that the model was given for these layers, where it fits."""
        config = getattr(self.model, "config", None)
        decodes = getattr(config, "is_encoder_decoder", False) and "decoder" in path
        mask = self._padding.get("decoder_attention_mask" if decodes else "attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != states.shape[:-1]:
            return None
        return mask.bool()

    def _unseen(self, layer: nn.Module) -> str:
        """Why no attention of the layer was seen."""
        for model in self.model.modules():
            config = getattr(model, "config", None)
            if _is_transformers(model) and getattr(config, "_attn_implementation", "") == "eager":
                if getattr(config, "attn_logit_softcapping", None):
                    return "it caps its scores (attn_logit_softcapping)"
                if getattr(model, "_supports_sdpa", False):
                    return 'its attention is eager; call model.set_attn_implementation("sdpa")'
        return (
            "no attention was seen: it is written by hand, or nn.MultiheadAttention was asked for "
            "its weights (pass need_weights=False); call optima_fast.record in it"
        )


def tap(model: nn.Module, modules: Mapping[str, str] | None = None) -> Tap:
    """Record queries, keys and hidden states of a model's layers, its attention left as it is.

    The model is not edited and runs as before: ``sdpa``, flash or flex attention stays on, nothing
    is copied, no attention map is made. Queries and keys are those that the attention gets: after
    rotary embedding and norms, keys before they are repeated for grouped queries.

    Models of transformers are seen through its ``AttentionInterface``; there the model may be
    compiled with ``fullgraph=True`` (tap it first), checkpointed, wrapped in DDP or FSDP. Any other
    model is seen where it calls ``scaled_dot_product_attention``, within ``nn.MultiheadAttention``
    too; one whose attention is written by hand calls :func:`record` there.

    Args:
        model: to be recorded from now on; the tap's ``close()`` ends it, as does ``with``.
        modules: path of each list of layers, by a name of yours, such as
            ``{"vision": "vision_model.encoder.layers"}``. Default: all that are found.

    Returns:
        The tap, whose ``layers()`` gives what the last forward pass recorded.

    Raises:
        UserError: no list of layers is found, a path is wrong, the model is compiled already.

    Example::

        tap = optima_fast.tap(model)
        output = model(**batch)
        layers = tap.layers()  # {"encoder": [Layer(hidden, mask, attentions), ...]}
    """
    if hasattr(model, "_orig_mod"):
        raise UserError("the model is compiled already: tap it first, then compile it")
    model = unwrapped(model)
    if any(calls.CALLS in x.__dict__ for x in model.modules()):
        raise UserError(f"this {type(model).__name__} has a tap already: close() that one first")
    return Tap(model, stacks.find(model) if modules is None else modules)


def record(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> None:
    """Hand a tap the queries and keys of an attention that is written by hand.

    Called by the attention module itself, it does nothing while no tap is on the model.

    Args:
        module: the attention module, ``self``.
        q: ``[B, H, Nq, d]``, before the scale.
        k: ``[B, G, Nk, d]``, G dividing H.
        mask: ``[B, Nk]`` bool, True where a key counts, or ``[B or 1, 1, Nq, Nk]`` of pairs.
        causal: a query sees no later key.
        scale: of the scores; default ``1 / sqrt(d)``.

    Example::

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            optima_fast.record(self, q, k, causal=True)
            ...
    """
    if getattr(module, calls.CALLS, None) is not None:
        of_tokens = mask is None or mask.ndim == 2
        calls.note(module, Call(q, k, mask, of_tokens, causal, scale, None, None))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel."""
    inner = getattr(model, "module", None)
    if isinstance(model, nn.parallel.DistributedDataParallel) and isinstance(inner, nn.Module):
        return inner
    return model


def _keep_hidden(layer: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return  # a checkpoint's second run
    states = output[0] if isinstance(output, (tuple, list)) else output
    setattr(layer, HIDDEN, (*getattr(layer, HIDDEN), states))


def _is_transformers(module: nn.Module) -> bool:
    return any(x.__module__ == "transformers.modeling_utils" for x in type(module).__mro__)


def _pairs(
    call: Call, crossing: bool, known: dict[tuple[int, bool], masks.Pairs | masks.Refused]
) -> masks.Pairs:
    """Which pairs of a call count; a mask that several layers share is read once.

    Raises:
        Refused: the losses cannot represent it.
    """
    shape = (call.q.shape[0], call.q.shape[2], call.k.shape[2])
    if call.refusal:
        raise masks.Refused(call.refusal)
    if call.of_tokens:
        return masks.of_tokens(call.mask, shape, call.causal, call.window)
    key = (id(call.mask), crossing)
    if key not in known:
        try:
            known[key] = masks.of_pairs(call.mask, shape, crossing)
        except masks.Refused as reason:
            known[key] = reason
    found = known[key]
    if isinstance(found, masks.Refused):
        raise found
    return found


def _attention(call: Call, pairs: masks.Pairs, queries: Tensor | None) -> Attention:
    """What the losses take of a call; ``queries``: which of them count, where that fits."""
    q = call.q
    if queries is not None and queries.shape != (q.shape[0], q.shape[2]):
        queries = None
    return Attention(q, call.k, pairs.causal, pairs.window, queries, pairs.keys, call.scale)
