"""Which layers are distilled, and by how much: arms, layer matching, losses of a step, reward.

``recipes`` holds the losses of other systems as options of a :class:`Distiller`.
"""

from __future__ import annotations

from optima_fast.distill import recipes
from optima_fast.distill.arms import arm_name, arm_space, arms, group_arms, parse_arm
from optima_fast.distill.balance import Balance
from optima_fast.distill.cosine import GradientCosine
from optima_fast.distill.distiller import Distiller, LayerLosses, StepLosses
from optima_fast.distill.headroom import Headroom
from optima_fast.distill.matching import LayerPair, match_layers
from optima_fast.distill.measurement import Measurement
from optima_fast.distill.protocols import Distillable
from optima_fast.distill.reward import REWARDS, parse_reward, relative_drop

__all__ = [
    "REWARDS",
    "Balance",
    "Distillable",
    "Distiller",
    "GradientCosine",
    "Headroom",
    "LayerLosses",
    "LayerPair",
    "Measurement",
    "StepLosses",
    "arm_name",
    "arm_space",
    "arms",
    "group_arms",
    "match_layers",
    "parse_arm",
    "parse_reward",
    "recipes",
    "relative_drop",
]
