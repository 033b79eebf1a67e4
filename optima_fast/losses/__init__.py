"""Layerwise distillation losses for students and teachers of different width, depth and heads.

``hidden.py``: hidden states, through a projection where widths differ. ``contrastive.py``: each
token against those of other batches, in plain PyTorch. ``attention.py``: attention
maps, from queries and keys. ``relations.py``: relations among tokens, of any features.
``indexer.py``: the choice of keys for sparse attention. Every function takes all matched layers in
one call and returns one value a layer.

``reference.py`` defines each loss in plain PyTorch; ``checks.py`` says what is accepted;
``ops.py`` registers the operators that ``backends.py`` serves: ``blockwise`` (cache-sized blocks,
any device) and ``triton`` (CUDA). ``auto`` takes ``triton`` on a CUDA device where it can serve,
except for products of float32, else ``blockwise``.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from optima_fast.losses.attention import attention_kl, attention_mse
from optima_fast.losses.contrastive import hidden_contrastive
from optima_fast.losses.hidden import hidden_cosine, hidden_mse, hidden_smooth_l1
from optima_fast.losses.indexer import indexer_kl
from optima_fast.losses.relations import gram_mse, relation_kl

__all__ = [
    "ATTENTION_LOSSES",
    "HIDDEN_LOSSES",
    "QUEUED",
    "UNPROJECTED",
    "attention_kl",
    "attention_mse",
    "gram_mse",
    "hidden_contrastive",
    "hidden_cosine",
    "hidden_mse",
    "hidden_smooth_l1",
    "indexer_kl",
    "relation_kl",
]

HIDDEN_LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": hidden_mse,
    "normalized-mse": partial(hidden_mse, normalize=True),
    "cosine": hidden_cosine,
    "smooth-l1": hidden_smooth_l1,
    "gram": gram_mse,
    "contrastive": hidden_contrastive,
}
"""What a distiller and the trainer call each loss of hidden states."""

UNPROJECTED = ("gram",)
"""Those that compare tokens with tokens and take no projection."""

QUEUED = ("contrastive",)
"""Those that take teacher tokens of earlier batches."""

ATTENTION_LOSSES: dict[str, Callable[..., Tensor]] = {
    "scores": partial(attention_mse, target="scores"),
    "probs": partial(attention_mse, target="probs"),
    "scores-each": partial(attention_mse, target="scores", heads="each"),
    "probs-each": partial(attention_mse, target="probs", heads="each"),
    "kl": partial(attention_kl, heads="mean"),
    "kl-each": partial(attention_kl, heads="each"),
}
"""What they call each loss of attention maps: ``each`` head by itself, else their mean."""
