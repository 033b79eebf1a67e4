"""What a frozen teacher says of one batch: the same at every measurement on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from optima_fast.distill.matching import Matched
from optima_fast.distill.terms import variances
from optima_fast.taps.records import Layer


@dataclass
class Taught:
    """A teacher's side of a measurement; a :class:`optima_fast.distill.protocols.Record`.

    Attributes:
        logits: the teacher's output, or None where no term needs it.
        loss: its own loss in the task.
        found: its matched layers of each module; without attentions where no term needs them.
    """

    logits: Any
    loss: Tensor
    found: Mapping[str, Sequence[Layer]]
    _variances: Tensor | None = field(default=None, repr=False)

    def layers(self, module: str) -> Sequence[Layer]:
        return self.found[module]

    def variances(self, layers: Sequence[Matched]) -> Tensor:
        """Variances of the teacher's states, which are computed at the first call alone.

        Args:
            layers: all matched layers of a student and of this record. The student's masks say
                which tokens count; they follow from the batch, so they are the same each time.
        """
        if self._variances is None:
            self._variances = variances(layers)
        return self._variances

    def own(self) -> Taught:
        """The same in memory of its own, as a view keeps all alive that it is a part of."""
        copies: dict[int, Tensor] = {}

        def copy(tensor: Tensor) -> Tensor:
            # a mask is one object in all layers of a module, and stays one
            if id(tensor) not in copies:
                whole = tensor.untyped_storage().nbytes() == tensor.nbytes
                copies[id(tensor)] = tensor if whole else tensor.clone()
            return copies[id(tensor)]

        return Taught(*tree_map_only(Tensor, copy, (self.logits, self.loss, dict(self.found))))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors; one that is part of several layers counts once."""
        tensors = tree_leaves((self.logits, self.loss, dict(self.found)))
        sizes = {id(x): x.nbytes for x in tensors if isinstance(x, Tensor)}
        return sum(sizes.values())
