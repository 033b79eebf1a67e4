"""CoCa: a contrastive captioner that hands back what its layers did.

Source: Yu et al., "CoCa: Contrastive Captioners are Image-Text Foundation Models",
arXiv 2205.01917, in Google's and in open_clip's form; see :class:`CoCaConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optima_fast.models.attention import Past
from optima_fast.models.basic import linear
from optima_fast.models.config import CoCaConfig
from optima_fast.models.layers import LayerTap, Pooler
from optima_fast.models.towers import ImageEncoder, MultimodalDecoder, TextDecoder

MODULES = ("image", "text", "multimodal")
"""The modules of a CoCa, in the order in which they run."""

# whether a token of each module sees only those before it
CAUSAL = {"image": False, "text": True, "multimodal": True}

TapRequest = Mapping[str, Sequence[int]]
"""The layers whose records a forward pass gives: numbers by module, 0 is the first layer."""


class CoCaOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        decoded: ``[P, L, d]`` normed output of the multimodal decoder, ``None`` if it did not run.
        image_features: ``[I, e]`` L2-normalised, ``None`` unless asked for.
        text_features: ``[T, e]`` L2-normalised, ``None`` unless asked for.
        taps: The records of the requested layers of each requested module.
        masks: For each module that ran, True where a token of its records counts: ``None`` (all)
            for ``"image"``, ``[T, N]`` for ``"text"``, ``[P, L]`` for ``"multimodal"``.
    """

    decoded: Tensor | None
    image_features: Tensor | None
    text_features: Tensor | None
    taps: dict[str, list[LayerTap]]
    masks: dict[str, Tensor | None]


class CoCa(nn.Module):
    """Image encoder, unimodal text decoder and multimodal decoder.

    Every parameter is drawn from torch's global generator. Works in
    ``torch.compile(fullgraph=True)``, with records as without.

    Args:
        config: Sizes and form.

    Attributes:
        config: As given.
        layer_counts: Layers of each module.
        widths: Residual width of each module.
    """

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        self.config = config
        self.layer_counts = config.layer_counts
        self.widths = config.widths
        width, form = config.text_width, config.contrastive
        heads, inner = config.pooler_heads, config.pooler_inner
        self.image = ImageEncoder(config)
        self.text = TextDecoder(config)
        self.multimodal = MultimodalDecoder(config)
        self.to_vocabulary = linear(width, config.vocab_size, bias=config.softmax_bias, std=0.02)
        pooled = config.pooler != "none"
        self.pooler = (
            Pooler(width, config.image_width, heads, inner, config.pooler_queries, config.pooler)
            if pooled
            else None
        )
        self.contrastive_pooler = (
            Pooler(width, width, heads, inner, 1, config.pooler if pooled else "scaled")
            if form == "cascade"
            else None
        )
        project = form == "query"
        self.image_projection = (
            linear(width, config.contrastive_width, bias=False) if project else None
        )
        self.text_projection = (
            linear(width, config.contrastive_width, bias=False) if project else None
        )
        if form != "none":
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self,
        images: Tensor | None,
        text: Tensor | None,
        *,
        pair_image: Tensor | None = None,
        pair_text: Tensor | None = None,
        taps: TapRequest | None = None,
        lse: bool = False,
        run: Collection[str] = MODULES,
        features: bool = False,
    ) -> CoCaOutput:
        """Run the modules named in ``run``.

        Args:
            images: ``[I, C, H, W]`` float; may be ``None`` if ``"image"`` does not run.
            text: ``[T, L]`` int64, padded on the right; may be ``None`` if ``"text"`` does not run.
            pair_image: ``[P]`` int64, the image of each pair. Default: image p in pair p.
            pair_text: ``[P]`` int64, the text of each pair. Default: text p in pair p.
            taps: For each module the 0-based layers to record, ascending.
            lse: Whether records hold the logsumexp where a kernel gives it.
            run: Modules to run; ``"multimodal"`` needs all three.
            features: Whether to compute the contrastive features. Then [CLS] runs as well, and
                the text decoder's records and mask have N = L + 1 tokens, else N = L.

        Returns:
            See :class:`CoCaOutput`.

        Raises:
            ValueError: An argument's shape, a module or a layer does not fit.
        """
        wanted = self._wanted(taps or {}, run)
        if features and self.config.contrastive == "none":
            raise ValueError("features need contrastive 'query' or 'cascade', got 'none'")
        records: dict[str, list[LayerTap]] = {}
        masks: dict[str, Tensor | None] = {}
        decoded = image_features = text_features = None
        if "image" in run:
            states, records["image"] = self.image(_given(images, "images"), wanted["image"], lse)
            masks["image"] = None
            if features or "multimodal" in run:
                tokens, first = self._pool(states)
                if features:
                    image_features = self._image_features(tokens, first)
        if "text" in run:
            text_states, cls, mask, records["text"] = self.text(
                _given(text, "text"), wanted["text"], lse, cls=features
            )
            masks["text"] = mask
            if cls is not None:
                projected = cls if self.text_projection is None else self.text_projection(cls)
                text_features = F.normalize(projected, dim=-1)
        if "multimodal" in run:
            mask = mask[:, : text_states.shape[1]]
            if pair_text is not None:
                text_states = text_states.index_select(0, pair_text)
                mask = mask.index_select(0, pair_text)
            images_paired = tokens.shape[0] if pair_image is None else pair_image.shape[0]
            if images_paired != text_states.shape[0]:
                raise ValueError(
                    "images and texts must pair up one to one; give pair_image and pair_text of "
                    f"one length, got {images_paired} images and {text_states.shape[0]} texts"
                )
            decoded, records["multimodal"] = self.multimodal(
                text_states, tokens, pair_image, wanted["multimodal"], lse
            )
            masks["multimodal"] = mask
        requested = {module: records[module] for module in taps or {}}
        return CoCaOutput(decoded, image_features, text_features, requested, masks)

    def encode_images(self, images: Tensor) -> Tensor:
        """Image tokens for :meth:`extend`: ``[I, C, H, W]`` to ``[I, M, d]``."""
        tokens, _ = self._pool(self.image(images)[0])
        return tokens

    def new_past(self) -> dict[str, list[Past]]:
        """An empty cache for :meth:`extend`."""
        return {name: [Past() for _ in range(self.layer_counts[name])] for name in MODULES[1:]}

    def extend(self, image_tokens: Tensor, ids: Tensor, past: Mapping[str, list[Past]]) -> Tensor:
        """Decoder output ``[I, 1, d]`` of one more id a text, ``[I, 1]``.

        Equal to the last token of :meth:`forward` on all ids so far, each text with its own image,
        without running those again.
        """
        states = self.text.extend(ids, past["text"])
        return self.multimodal.extend(states, image_tokens, past["multimodal"])

    def token_logits(self, decoded: Tensor) -> Tensor:
        """Scores of the next token, ``[..., d]`` to ``[..., vocab_size]``."""
        logits: Tensor = self.to_vocabulary(decoded)
        return logits

    def _pool(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens for the decoder, and the token that is kept for ``contrastive="query"``."""
        tokens = states if self.pooler is None else self.pooler(states)
        if self.image_projection is None:
            return tokens, None
        return tokens[:, 1:], tokens[:, 0]

    def _image_features(self, tokens: Tensor, first: Tensor | None) -> Tensor:
        if self.image_projection is not None:
            vector = self.image_projection(first)
        else:
            assert self.contrastive_pooler is not None
            vector = self.contrastive_pooler(tokens)[:, 0]
        return F.normalize(vector, dim=-1)

    def _wanted(self, taps: TapRequest, run: Collection[str]) -> dict[str, tuple[bool, ...]]:
        """Whether to record it, for each layer of every module.

        Flags, as torch.compile would take indices that differ between two models of one process
        for variables, and comparisons with them for unknown.
        """
        for module in [*run, *taps]:
            if module not in MODULES:
                raise ValueError(f"a module must be one of {', '.join(MODULES)}, got {module!r}")
        if "multimodal" in run and len(set(run)) < len(MODULES):
            raise ValueError(f"running 'multimodal' needs all three modules, got run={list(run)}")
        for module, layers in taps.items():
            count = self.layer_counts[module]
            if module not in run:
                raise ValueError(
                    f"taps must be of modules that run, got {module!r} and run={list(run)}"
                )
            if list(layers) != sorted(set(layers)) or not all(0 <= i < count for i in layers):
                raise ValueError(
                    f"taps[{module!r}] must be ascending layer indices from 0 to {count - 1}, "
                    f"got {list(layers)}"
                )
        return {
            module: tuple(i in taps.get(module, ()) for i in range(count))
            for module, count in self.layer_counts.items()
        }


def _given(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"{name} must be given when their module runs, got None")
    return tensor
