"""What a training step costs in arithmetic and memory, found without running it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from optima_fast.distill import Distiller
from optima_fast.distill.arms import Arm
from optima_fast.models import CoCaConfig, TapRequest, TaskModel, TaskOutput
from optima_fast.tasks import TaskData
from optima_fast.training import pretence
from optima_fast.training.pretence import pretended


def arm_costs(
    student: CoCaConfig,
    teacher: CoCaConfig,
    data: TaskData,
    batch: Mapping[str, Tensor],
    arms: Sequence[Arm],
    **settings: Any,
) -> list[float]:
    r"""Operations of a training step with each arm, relative to one with all modules.

    .. math:: c(a) = \frac{s + t(a) + \sum_{l \in a} p(l)}{s + t(A) + \sum_{l \in A} p(l)}

    s: the student forward and backward, the same for every arm; t: the teacher forward, as far as
    the arm needs it; p: the losses of a layer, forward and backward; A: all modules. A function of
    shapes alone, so equal on every machine: matrix products are counted, on models without memory,
    and nothing else (norms, activations, the optimizer).

    Args:
        student: sizes of the student.
        teacher: sizes of the teacher.
        data: the task, for its head.
        batch: a batch of it, of which only the shapes count.
        arms: arms of modules or of layers.
        settings: of the :class:`optima_fast.Distiller`.

    Returns:
        One positive number an arm; 1 for all modules.
    """
    whole, *each = distilling_operations(student, teacher, data, batch, [None, *arms], **settings)
    return [operations / whole for operations in each]


def distilling_operations(
    student: CoCaConfig,
    teacher: CoCaConfig,
    data: TaskData,
    batch: Mapping[str, Tensor],
    arms: Sequence[Arm | None],
    **settings: Any,
) -> list[int]:
    """Operations of a step with each arm, ``None`` for all modules; see :func:`arm_costs`."""
    with pretended(data, batch, student, teacher) as (models, shapes):
        settings["backend"] = "reference"
        whole, losses = Distiller(*models, **settings), Distiller(*map(_Once, models), **settings)
        return _by_arm(whole, losses, shapes, arms)


def finetuning_operations(model: CoCaConfig, data: TaskData, batch: Mapping[str, Tensor]) -> int:
    """Operations of a step without a teacher."""
    with pretended(data, batch, model) as ((student,), shapes):

        def body() -> None:
            pretence.loss(student(shapes).logits, shapes).backward()  # type: ignore[no-untyped-call]

        return _operations(body)


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step holds, in eager mode and without what kernels and libraries keep for
    themselves.

    Attributes:
        weights: of student, projections and teacher.
        optimizer: Adafactor's first moment; its factored second moments are left out.
        working: gradients and activations, where they are most.
    """

    weights: int
    optimizer: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.working


def step_memory(
    student: CoCaConfig,
    teacher: CoCaConfig | None,
    data: TaskData,
    batch: Mapping[str, Tensor],
    *,
    bf16: bool,
    recompute: bool = False,
    **settings: Any,
) -> StepMemory:
    """What a step of all modules holds.

    Args:
        student: sizes of the model that is trained.
        teacher: sizes of its teacher, ``None`` without one.
        data: the task, for its head.
        batch: a batch of it, of which only the shapes count.
        bf16: whether the step runs under autocast.
        recompute: whether the student's layers are computed again in the backward pass.
        settings: of the :class:`optima_fast.Distiller`.
    """
    configs = [student] if teacher is None else [student, teacher]
    with pretended(data, batch, *configs) as (models, shapes):
        if recompute:
            models[0].recompute()
        distiller = Distiller(*models, **settings) if teacher is not None else None
        cast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
        with LiveBytes() as live:
            with cast:
                if distiller is None:
                    loss = pretence.loss(models[0](shapes).logits, shapes)
                else:
                    everything = distiller.modules_matched
                    losses = distiller(
                        shapes, everything, predict=pretence.loss, divergence=pretence.divergence
                    )
                    loss = losses.total
            loss.backward()  # type: ignore[no-untyped-call]
        held = [*models, *([distiller] if distiller is not None else [])]
        weights = {p for module in held for p in module.parameters()}
        learnt = sum(p.nbytes for p in weights if p.grad is not None)
        return StepMemory(sum(p.nbytes for p in weights), learnt, live.peak)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make while they are alive.

    Attributes:
        now: bytes alive.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known and key not in given:
                self._known.add(key)
                self.now += size
                weakref.finalize(storage, self._freed, key, size)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


class _Once:
    """A model that runs once and then says the same again; no gradient reaches it.

    What a :class:`Distiller` of two such does is its losses alone.
    """

    def __init__(self, model: TaskModel) -> None:
        self.layer_counts, self.widths = model.layer_counts, model.widths
        self._model = model
        self._said: TaskOutput | None = None
        self._taps: TapRequest = {}  # what it said

    def __call__(self, batch: Mapping[str, Tensor], taps: TapRequest, **asked: Any) -> TaskOutput:
        return self._say(self._model, batch, taps, **asked)

    def record(self, batch: Mapping[str, Tensor], taps: TapRequest, **asked: Any) -> TaskOutput:
        return self._say(self._model.record, batch, taps, **asked)

    def _say(
        self,
        run: Callable[..., TaskOutput],
        batch: Mapping[str, Tensor],
        taps: TapRequest,
        **asked: Any,
    ) -> TaskOutput:
        if self._said is None:
            said = run(batch, taps=taps, **asked)
            self._taps = taps
            self._said = tree_map_only(
                Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), said
            )
        known = {n: dict(zip(self._taps[n], self._said.taps[n], strict=True)) for n in taps}
        return self._said._replace(taps={n: [known[n][i] for i in taps[n]] for n in taps})


def _by_arm(
    whole: Distiller,
    losses: Distiller,
    batch: Mapping[str, Tensor],
    arms: Sequence[Arm | None],
) -> list[int]:
    def step(distiller: Distiller, arm: Arm) -> int:
        def body() -> None:
            done = distiller(batch, arm, predict=pretence.loss, divergence=pretence.divergence)
            done.total.backward()

        return _operations(body)

    known: dict[str, int] = {}

    def teaching(arm: Arm) -> int:
        if whole.kl_weight:
            return 0  # the whole teacher runs whatever the arm: it is in the step without one
        request = whole.teacher_request(arm)
        key = str(request)
        if key not in known:
            known[key] = _operations(lambda: whole.teacher.record(batch, request))
        return known[key]

    base, everything = step(whole, ()), whole.modules_matched
    step(losses, everything)  # both models run, as far as any arm needs
    pairs = {
        pair: step(losses, (f"{pair.module}[{pair.student + 1}]",))
        for pair in whole.selected(everything)
    }

    def total(arm: Arm) -> int:
        return base + teaching(arm) + sum(pairs[pair] for pair in whole.selected(arm))

    return [total(everything if arm is None else arm) for arm in arms]


def _operations(body: Callable[[], Any]) -> int:
    aten = torch.ops.aten
    # the kernels that attention runs on a CPU, which the counter does not know
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        body()
    return int(counter.get_total_flops())


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """Two products, scores and output, of ``[B, H, N, d]`` and ``[B, H, M, d]``."""
    return 2 * 2 * q.numel() * k[2]


def _attention_backward(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any
) -> int:
    """Five products: the scores again, and the gradients of them and of q, k and v."""
    return 5 * 2 * q.numel() * k[2]
