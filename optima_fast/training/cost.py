"""What a step costs with each arm: matrix products, counted without computing them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from optima_fast.distill import Distiller
from optima_fast.distill.arms import Arm
from optima_fast.models import CoCaConfig
from optima_fast.models.task_model import build
from optima_fast.tasks import TaskData


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
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        models = [build(config, data.head, data.num_classes) for config in (student, teacher)]
        distiller = Distiller(*models, **{**settings, "backend": "reference"})
        shapes = {
            name: torch.empty(value.shape, dtype=value.dtype) for name, value in batch.items()
        }
        return _relative(distiller, shapes, arms)


def _relative(
    distiller: Distiller, batch: Mapping[str, Tensor], arms: Sequence[Arm]
) -> list[float]:
    def step(arm: Arm) -> int:
        def body() -> None:
            losses = distiller(batch, arm, predict=_some_loss, divergence=_some_divergence)
            losses.total.backward()

        return _operations(body)

    known: dict[str, int] = {}

    def teaching(arm: Arm) -> int:
        if distiller.kl_weight:
            return 0  # the whole teacher runs whatever the arm: it is in the step without one
        request = distiller.teacher_request(arm)
        key = str(request)
        if key not in known:
            known[key] = _operations(lambda: distiller.teacher.record(batch, request))
        return known[key]

    base = step(())
    everything = distiller.modules_matched
    pairs = {}
    for pair in distiller.selected(everything):
        alone = (f"{pair.module}[{pair.student + 1}]",)
        pairs[pair] = step(alone) - base - teaching(alone)

    def total(arm: Arm) -> int:
        return base + teaching(arm) + sum(pairs[pair] for pair in distiller.selected(arm))

    return [total(arm) / total(everything) for arm in arms]


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


def _some_loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return logits.float().mean()


def _some_divergence(student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return (student.float() - teacher.float()).mean()
