"""CoCa and its parts, presets, task heads, student initialisation and greedy decoding."""

from optima_fast.models import generate, initialise, open_clip, presets, pretrained, task_model
from optima_fast.models.config import CoCaConfig
from optima_fast.models.layers import LayerTap
from optima_fast.models.model import MODULES, CoCa, CoCaOutput, TapRequest
from optima_fast.models.presets import coca, paper_parameters
from optima_fast.models.task_model import TaskModel, TaskOutput

__all__ = [
    "MODULES",
    "CoCa",
    "CoCaConfig",
    "CoCaOutput",
    "LayerTap",
    "TapRequest",
    "TaskModel",
    "TaskOutput",
    "coca",
    "generate",
    "initialise",
    "open_clip",
    "paper_parameters",
    "presets",
    "pretrained",
    "task_model",
]
