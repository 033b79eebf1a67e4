"""open_clip's CoCa: its state dict to ours and back.

Every weight is the same numbers under another name. Beyond renaming, open_clip packs attention
projections in the order q, k, v where ours keeps q apart for cross-attention, and stores three
projections as ``[in, out]``, used as ``x @ P``.

Source: https://github.com/mlfoundations/open_clip, ``coca_model.py`` of 3.3.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.models.config import CoCaConfig
from optima_fast.models.model import CoCa
from optima_fast.models.open_clip_config import check_form, config_of, model_cfg

__all__ = [
    "State",
    "check",
    "config_of",
    "from_open_clip",
    "model_cfg",
    "rules",
    "shapes",
    "to_open_clip",
]

State = dict[str, Tensor]


class Rule(NamedTuple):
    """Tensors of both sides that are equal once concatenated on dimension 0.

    Attributes:
        ours: Names in our state dict.
        theirs: Names in open_clip's.
        transposed: Whether the two are each other's transpose.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transposed: bool = False


def from_open_clip(state: Mapping[str, Tensor], config: CoCaConfig) -> State:
    """Our state dict with the weights of open_clip's.

    Args:
        state: An open_clip CoCa's state dict; causal masks that old versions stored are left out.
        config: As :func:`config_of` gives it.

    Returns:
        Tensors of the dtype they came in, views of ``state`` wherever the layout allows it.

    Raises:
        UserError: Keys are missing, unexpected or of another shape.
    """
    state = {name: value for name, value in state.items() if not name.endswith("attn_mask")}
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(())
    check(state, config)
    converted: State = {}
    for ours, theirs, transposed in rules(config):
        converted |= _convert(state, theirs, ours, transposed)
    return converted


def to_open_clip(coca: CoCa) -> State:
    """The model's weights as open_clip's state dict, sharing memory with it where possible.

    Raises:
        UserError: The model is not of open_clip's form.
    """
    check_form(coca.config)
    state = coca.state_dict()
    converted: State = {}
    for ours, theirs, transposed in rules(coca.config):
        converted |= _convert(state, ours, theirs, transposed)
    return {name: value.contiguous() for name, value in converted.items()}


def shapes(config: CoCaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of open_clip's state dict of a model of this configuration."""
    with torch.device("meta"):
        model = CoCa(config)
    return {name: tuple(value.shape) for name, value in to_open_clip(model).items()}


def check(state: Mapping[str, Tensor], config: CoCaConfig) -> None:
    """Raise unless ``state`` has exactly the names and shapes that ``config`` asks for.

    Raises:
        UserError: With the number of keys that are missing, unexpected or of another shape and the
            first few of each.
    """
    wanted = shapes(config)
    given = {name: tuple(value.shape) for name, value in state.items()}
    missing = [name for name in wanted if name not in given]
    extra = [name for name in given if name not in wanted]
    other = [
        f"{name} {list(given[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    kinds = ("missing", "unexpected", "of another shape")
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in zip(kinds, (missing, extra, other), strict=True)
        if names
    ]
    if problems:
        raise UserError(
            f"of {len(wanted)} weights that this CoCa needs, {'; '.join(problems)}: take the "
            "open_clip_config.json that belongs to the weights, or another checkpoint"
        )


def rules(config: CoCaConfig) -> Iterator[Rule]:
    """Which of our weights are which of open_clip's, for all weights of the model."""
    pooled = config.pooler != "none"
    yield Rule(("logit_scale",), ("logit_scale",))
    yield Rule(("image.class_token",), ("visual.class_embedding",))
    yield Rule(("image.positions",), ("visual.positional_embedding",))
    yield Rule(("image.patches.weight",), ("visual.conv1.weight",))
    yield from _pair("image.norm_pre", "visual.ln_pre")
    for i in range(config.image_layers):
        yield from _block(f"image.layers.{i}", f"visual.transformer.resblocks.{i}")
    if pooled:
        attention = "visual.attn_pool.attn"
        # torch's MultiheadAttention packs projections of one width only
        packed = config.image_width == config.text_width
        yield Rule(("pooler.query",), ("visual.attn_pool.query",))
        yield from _pair("pooler.norm_query", "visual.attn_pool.ln_q")
        yield from _pair("pooler.norm_source", "visual.attn_pool.ln_k")
        yield from _cross_attention("pooler.attention", attention, packed)
    yield from _pair("pooler.norm" if pooled else "image.norm", "visual.ln_post")
    yield Rule(("image_projection.weight",), ("visual.proj",), True)
    yield Rule(("text.embedding.weight",), ("text.token_embedding.weight",))
    yield Rule(("text.positions",), ("text.positional_embedding",))
    yield Rule(("text.cls_token",), ("text.cls_emb",))
    for i in range(config.text_layers):
        yield from _block(f"text.layers.{i}", f"text.transformer.resblocks.{i}")
    yield from _pair("text.norm_cls", "text.ln_final")
    yield Rule(("text_projection.weight",), ("text.text_projection",), True)
    for i in range(config.multimodal_layers):
        ours, cross = f"multimodal.layers.{i}", f"text_decoder.cross_attn.{i}"
        yield from _block(ours, f"text_decoder.resblocks.{i}", "self_mlp")
        yield from _pair(f"{ours}.norm_cross", f"{cross}.ln_1")
        yield from _pair(f"{ours}.norm_image", f"{cross}.ln_1_kv")
        yield from _cross_attention(f"{ours}.cross", f"{cross}.attn", True)
        yield from _mlp(ours, cross, "mlp")
    yield from _pair("multimodal.norm", "text_decoder.ln_final")
    yield Rule(("to_vocabulary.weight",), ("text_decoder.text_projection",), True)


def _pair(ours: str, theirs: str) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield Rule((f"{ours}.{kind}",), (f"{theirs}.{kind}",))


def _block(ours: str, theirs: str, mlp: str = "mlp") -> Iterator[Rule]:
    yield from _pair(f"{ours}.norm_attention", f"{theirs}.ln_1")
    for kind in ("weight", "bias"):
        yield Rule((f"{ours}.attention.qkv.{kind}",), (f"{theirs}.attn.in_proj_{kind}",))
    yield from _pair(f"{ours}.attention.out", f"{theirs}.attn.out_proj")
    yield from _mlp(ours, theirs, mlp)


def _mlp(ours: str, theirs: str, mlp: str) -> Iterator[Rule]:
    yield from _pair(f"{ours}.norm_{mlp}", f"{theirs}.ln_2")
    yield from _pair(f"{ours}.{mlp}.up", f"{theirs}.mlp.c_fc")
    yield from _pair(f"{ours}.{mlp}.down", f"{theirs}.mlp.c_proj")


def _cross_attention(ours: str, theirs: str, packed: bool) -> Iterator[Rule]:
    q, kv = f"{ours}.q", f"{ours}.kv"
    if packed:
        yield Rule((f"{q}.weight", f"{kv}.weight"), (f"{theirs}.in_proj_weight",))
    else:
        yield Rule((f"{q}.weight",), (f"{theirs}.q_proj_weight",))
        yield Rule((f"{kv}.weight",), (f"{theirs}.k_proj_weight", f"{theirs}.v_proj_weight"))
    yield Rule((f"{q}.bias", f"{kv}.bias"), (f"{theirs}.in_proj_bias",))
    yield from _pair(f"{ours}.out", f"{theirs}.out_proj")


def _convert(
    state: Mapping[str, Tensor], sources: Sequence[str], targets: Sequence[str], transposed: bool
) -> State:
    whole = state[sources[0]] if len(sources) == 1 else torch.cat([state[n] for n in sources])
    if transposed:
        whole = whole.T
    if len(targets) == 1:
        return {targets[0]: whole}
    parts = [2 if ".kv." in name else 1 for name in targets]
    unit = whole.shape[0] // sum(parts)
    return dict(zip(targets, torch.split(whole, [unit * part for part in parts]), strict=True))
