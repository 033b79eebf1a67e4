"""Start a student from layers of a larger model of the same width."""

from __future__ import annotations

import dataclasses

import torch

from optima_fast.errors import UserError
from optima_fast.models.model import MODULES, CoCa


def sampled_layer(index: int, student_layers: int, source_layers: int) -> int:
    """The source layer of a student layer, both 0-based; from 1, layer i gets ceil(i * r).

    r is the ratio of the numbers of layers.
    """
    return -(-(index + 1) * source_layers // student_layers) - 1


@torch.no_grad()
def from_layers(student: CoCa, source: CoCa) -> None:
    """Copy uniformly sampled layers of ``source``, and all that is not a layer, into ``student``.

    Args:
        student: Changed in place.
        source: A model that differs from the student in its numbers of layers only.

    Raises:
        UserError: The models differ otherwise, or the student has more layers.
    """
    mine, theirs = student.config.to_dict(), source.config.to_dict()
    for field in dataclasses.fields(student.config):
        ours, other = mine[field.name], theirs[field.name]
        if field.name.endswith("_layers"):
            if ours > other:
                raise UserError(
                    f"a student cannot be deeper than the model it starts from: {field.name} is "
                    f"{ours} in the student and {other} in the source"
                )
        elif ours != other:
            raise UserError(
                "a student can start only from layers of its own shape: "
                f"{field.name} is {ours} in the student and {other} in the source; "
                "start it at random or from another source"
            )
    state = source.state_dict()
    for name, value in student.state_dict().items():
        module, _, rest = name.partition(".layers.")
        if module in MODULES and rest:
            index, _, leaf = rest.partition(".")
            counts = student.layer_counts[module], source.layer_counts[module]
            name = f"{module}.layers.{sampled_layer(int(index), *counts)}.{leaf}"
        value.copy_(state[name])
