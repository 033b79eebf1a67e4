"""Where a model keeps its layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from optima_fast.errors import UserError

# words that a path may have wherever the layers are
GENERIC = {
    "base_model", "block", "blocks", "decoder", "encoder", "h", "layer", "layers", "model",
    "module", "resblocks", "trunk", "transformer",
}  # fmt: skip
ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)


def find(model: nn.Module) -> dict[str, str]:
    """Paths of the model's stacks of layers, by a short name for each.

    A stack is a list of modules of one class, each with an attention inside and no other stack.

    Raises:
        UserError: there is none.
    """
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _is_stack(module)
    ]
    inner = [
        p
        for p in paths
        if not any(q != p and f"{q}.".startswith(f"{p}.".lstrip(".")) for q in paths)
    ]
    if not inner:
        raise UserError(
            f"{type(model).__name__} has no list of layers with attention that can be found: name "
            'them, as in modules={"vision": "vision_model.encoder.layers"}'
        )
    return dict(zip(_names(inner), inner, strict=True))


def layers(model: nn.Module, modules: Mapping[str, str]) -> dict[str, list[nn.Module]]:
    """The layers of each stack that is named.

    Raises:
        UserError: a path that is not one of the model, or not of a list of layers.
    """
    found = {}
    for name, path in modules.items():
        try:
            stack = model.get_submodule(path)
        except AttributeError:
            known = ", ".join(find(model).values())
            raise UserError(
                f"modules[{name!r}]: {type(model).__name__} has no {path!r}; its lists of layers "
                f"are {known}"
            ) from None
        if not isinstance(stack, (nn.ModuleList, nn.Sequential)) or not len(stack):
            raise UserError(
                f"modules[{name!r}]: {path!r} is a {type(stack).__name__}, not a list of layers"
            )
        found[name] = list(stack)
    return found


def _is_stack(modules: nn.ModuleList | nn.Sequential) -> bool:
    return len({type(x) for x in modules}) == 1 and all(_attends(x) for x in modules)


def _attends(layer: nn.Module) -> bool:
    return any(
        isinstance(x, nn.MultiheadAttention) or ATTENTION.search(type(x).__name__) is not None
        for path, x in layer.named_modules()
        if path
    )


def _names(paths: Sequence[str]) -> list[str]:
    """Each path's first telling word, longer where two would be alike."""
    words = [path.split(".") for path in paths]
    while len(words) > 1 and all(len(x) > 1 for x in words) and len({x[0] for x in words}) == 1:
        words = [x[1:] for x in words]
    words = [[f"stage{w}" if w.isdecimal() else w for w in x] for x in words]
    names = [next((w for w in x if w not in GENERIC), x[0]) for x in words]
    if len(set(names)) < len(names):
        names = ["_".join(x) for x in words]
    return names
