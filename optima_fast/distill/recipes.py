"""Systems of OPTIMA's Table 1 as options of a :class:`Distiller` of image, text and multimodal.

``Distiller(student, teacher, **recipes.options("efficientvlm"))``, or ``--recipe efficientvlm`` of
the trainer: plain data, which any option given beside it overrides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optima_fast.errors import unknown

_LAST = {"last": 1.0}


@dataclass(frozen=True)
class Recipe:
    """What a system compares, as far as its losses go.

    Attributes:
        source: the paper.
        what: the loss in a line.
        differs: what is not as in the paper.
        options: of :class:`Distiller`.
        method: of the trainer: which modules are distilled.
        soft_labels: by task, how the trainer compares predictions; ``"kl"`` where none is named.
    """

    source: str
    what: str
    differs: str
    options: Mapping[str, Any]
    method: str = "layerwise"
    soft_labels: Mapping[str, str] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "efficientvlm": Recipe(
        source="Wang et al. 2022, arXiv 2210.07795, stage 1, as its VQA code weighs it",
        what=".6 task + .4 (KL + MSE of each head's attention x keys + MSE of hidden states; image "
        "hidden x .2, multimodal x .5)",
        differs="no pruning (stage 2); hidden states through projections, of layers and not of "
        "embeddings, the image encoder's last layer too; padding does not count; the decoder is "
        "the multimodal module",
        options={
            "prediction_weight": 0.6,
            "kl_weight": 0.4,
            "hidden_weight": {"image": 0.08, "text": 0.4, "multimodal": 0.2},
            "attention_weight": {"image": 0.4, "text": 0.4, "multimodal": 0.2, "cross": 0.2},
            "attention_loss": "probs-auto",
            "attention_scale": "length",
            "cross_attention": True,
        },
    ),
    "dide": Recipe(
        source="Wang et al. 2021, arXiv 2112.08723",
        what="soft labels (BCE for VQA, else KL; no hard labels) + KL of each head's cross-modal "
        "attention, text to image and image to text, in the last layer",
        differs="the student has a decoder, where theirs is two encoders; image to text is what "
        "the keys of its cross-attention see of the queries; hard labels are off for every task, "
        "and captions, which they do not have, take KL over words",
        options={
            "prediction_weight": 0.0,
            "kl_weight": 1.0,
            "hidden_weight": {"image": 0.0, "text": 0.0, "multimodal": 0.0},
            "attention_weight": {"image": 0.0, "text": 0.0, "multimodal": 0.0, "cross": _LAST},
            "attention_loss": "kl-auto",
            "cross_attention": True,
            "cross_both_ways": True,
        },
        soft_labels={"vqa": "bce"},
    ),
    "distilvlm": Recipe(
        source="Fang et al. 2021, arXiv 2104.02096",
        what="task + MSE of each head's attention and contrastive loss of hidden states, against "
        "4096 teacher tokens of earlier steps, of the last layers",
        differs="of three modules, where theirs is one; images are seen as pixels, so both models "
        "have the same tokens without regions of a detector; cosines at temperature 0.07, "
        "weights of 1 and the length of the queue are this project's choice",
        options={
            "prediction_weight": 1.0,
            "kl_weight": 0.0,
            "hidden_weight": {"image": _LAST, "text": _LAST, "multimodal": _LAST},
            "attention_weight": {"image": _LAST, "text": _LAST, "multimodal": _LAST},
            "attention_loss": "probs-auto",
            "hidden_loss": "contrastive",
            "negatives": 4096,
            "hidden_temperature": 0.07,
        },
    ),
    "minivlm": Recipe(
        source="Wang et al. 2020, arXiv 2012.06946",
        what="the task's own loss, on more images that the teacher captioned (--extra-images)",
        differs="pseudo-captions while finetuning on captions, where theirs are of pretraining; "
        "no tags, no detector",
        options={
            "prediction_weight": 1.0,
            "kl_weight": 0.0,
            "hidden_weight": 0.0,
            "attention_weight": 0.0,
        },
        method="kd",
    ),
}


def get(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        UserError: there is none; the message gives the nearest name.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]


def options(name: str) -> dict[str, Any]:
    """The recipe's options of a :class:`Distiller`; ``kl_weight`` needs a ``divergence``.

    Raises:
        UserError: there is no recipe of this name.

    Example:
        >>> options("efficientvlm")["prediction_weight"]
        0.6
    """
    return dict(get(name).options)


def settings(name: str, task: str) -> dict[str, Any]:
    """Those of the trainer on a task: the options, and which modules are distilled."""
    recipe = get(name)
    labels = recipe.soft_labels.get(task, "kl")
    return {"method": recipe.method, "soft_labels": labels, **recipe.options}


def names() -> set[str]:
    """Every setting that a recipe may make."""
    return {"method", "soft_labels"}.union(*(recipe.options for recipe in RECIPES.values()))
