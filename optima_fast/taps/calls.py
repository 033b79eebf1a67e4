"""Where a model's attention is seen: transformers' attention functions, and PyTorch's own.

Both are seen from outside, so that the model keeps the attention it has. A call is kept on the
module it belongs to, as it is: nothing is copied or computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CALLS = "_optima_fast_calls"


class Call(NamedTuple):
    """One call of an attention function."""

    q: Tensor
    k: Tensor
    mask: Any
    of_tokens: bool  # the mask is [B, Nk], not of pairs
    causal: bool
    scale: float | None
    window: int | None
    refusal: str | None


def watch(module: nn.Module) -> None:
    """Keep the calls of this module from now on."""
    object.__setattr__(module, CALLS, ())


def forget(module: nn.Module) -> None:
    module.__dict__.pop(CALLS, None)


def note(module: nn.Module, call: Call) -> None:
    """Keep a call, unless it is a checkpoint's second run."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return
    setattr(module, CALLS, (*getattr(module, CALLS), call))


# ------------------------------------------------------------------ transformers


class _Seen:
    """An attention function of transformers, which notes its calls."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        if getattr(module, CALLS, None) is not None:
            note(module, self._call(module, query, key, attention_mask, kwargs))
        return self.function(module, query, key, value, attention_mask, **kwargs)

    def _call(
        self, module: nn.Module, q: Tensor, k: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> Call:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        flash = "flash" in self.name
        refusal = None
        if kwargs.get("position_bias") is not None:
            refusal = "it adds a position bias to its scores"
        elif kwargs.get("softcap") is not None:
            refusal = f"it caps its scores (softcap={kwargs['softcap']})"
        elif kwargs.get("s_aux") is not None:
            refusal = "it has attention sinks"
        return Call(
            q,
            k,
            mask,
            of_tokens=flash or mask is None,
            causal=bool(causal) and q.shape[2] > 1,
            scale=kwargs.get("scaling"),
            # elsewhere the mask has it
            window=kwargs.get("sliding_window") if flash else None,
            refusal=refusal,
        )


_taps = 0


def see_transformers() -> None:
    """Have transformers' attention functions note their calls, for one tap more."""
    global _taps
    from transformers import AttentionInterface

    functions: dict[str, Any] = dict(AttentionInterface._global_mapping)
    for name, function in functions.items():
        if not isinstance(function, _Seen) and not name.startswith("paged"):
            AttentionInterface.register(name, _Seen(name, function))
    _taps += 1


def unsee_transformers() -> None:
    """For one tap less; with the last, the functions are transformers' own again."""
    global _taps
    from transformers import AttentionInterface

    _taps -= 1
    if _taps == 0:
        for name, function in list(AttentionInterface._global_mapping.items()):
            if isinstance(function, _Seen):
                AttentionInterface.register(name, function.function)


# ------------------------------------------------------------------ PyTorch


class Functions(TorchFunctionMode):
    """Notes calls of scaled_dot_product_attention, while a tapped model runs.

    Attributes:
        inside: the modules that are running, innermost last; a call belongs to the last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[nn.Module] = []
        self.on = False

    def __enter__(self) -> Functions:
        # while a mode is on, nn.MultiheadAttention does not take its shortcut, which calls no
        # attention function
        super().__enter__()  # type: ignore[no-untyped-call]
        self.on = True
        return self

    def __exit__(self, *exception: Any) -> None:
        self.on = False
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self._note(*args, **kwargs)
        elif function is F.multi_head_attention_forward:
            return self._inside(function, args, kwargs)
        return function(*args, **kwargs)

    def _inside(self, function: Any, args: Any, kwargs: Any) -> Any:
        """One function for us; the attention that it calls is looked up in its module."""
        plain = F.scaled_dot_product_attention

        def seen(*args: Any, **kwargs: Any) -> Any:
            self._note(*args, **kwargs)
            return plain(*args, **kwargs)

        F.scaled_dot_product_attention = seen
        try:
            return function(*args, **kwargs)
        finally:
            F.scaled_dot_product_attention = plain

    def _note(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if self.inside:
            refusal = None if query.ndim == 4 else f"its queries are {query.ndim}-dimensional"
            of_tokens = attn_mask is None
            call = Call(query, key, attn_mask, of_tokens, is_causal, scale, None, refusal)
            note(self.inside[-1], call)
