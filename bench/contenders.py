"""What the losses are compared with: the code that people write today, and ours.

A contender is made for a case and returns what takes the layers of cases.inputs to one loss a
layer. The loops named after a library are written from the description of what it does, and return
our number so that they can be checked: mean over heads, mean over what counts.

    eager        per-head maps, autograd, everything in the inputs' dtype
    gemm         scores only: eager, but one product over the heads side by side
    autocast     eager under torch.autocast: weights in float32, softmax and mse_loss in float32
    automodel    hidden only: a loop over layer pairs, both sides to float32, masked mean
    textbrewer   a loop; masks multiplied in; attention: float32 maps, summed over the heads
    tinybert     a loop; attention: scores of every head, very negative ones set to 0, mse_loss
    compile      torch.compile of eager; compile-max with mode="max-autotune-no-cudagraphs"
    blockwise, triton   ours, by backend
    triton-lse   probs only: both models' log-sum-exp are given
    triton-recompute  the residual is not kept but computed again in backward

Three more, probs only, run the forward of both models' attention first, as a training step does,
with the keys for values, then ours:

    sdpa          PyTorch's attention; the loss computes each log-sum-exp itself
    sdpa-lse      PyTorch's attention by the operators that hand back their log-sum-exp
    xformers-lse  the same by xFormers' memory-efficient attention, where it is installed
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import Case, Layer
from torch import Tensor

import optima_fast

Layers = list[list[Tensor]]
Loss = Callable[[Layers], Tensor | Sequence[Tensor]]  # of each layer


def eager_hidden(student: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    return (student @ weight - teacher).square().mean()


def autocast_hidden(student: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student @ weight, teacher)


def automodel_hidden(student: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    projected, aim = (student @ weight).float(), teacher.float()
    mask = torch.ones_like(aim[..., 0])
    errors = (projected - aim).square().mean(-1)
    return (errors * mask).sum() / mask.sum()


def textbrewer_hidden(student: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    mask = torch.ones_like(teacher[..., 0])
    errors = F.mse_loss(student @ weight, teacher, reduction="none") * mask.unsqueeze(-1)
    # a sum over this many 16-bit errors would lose the mean
    mean: Tensor = errors.sum(dtype=torch.float32) / mask.sum(dtype=torch.float32)
    return mean / teacher.shape[-1]


def eager_map(q: Tensor, k: Tensor, target: str, causal: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if target == "probs":
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        scores = scores.softmax(-1)
    mean: Tensor = scores.mean(1)
    return mean


def gemm_map(q: Tensor, k: Tensor, target: str, causal: bool) -> Tensor:
    scale: float = q.shape[-1] ** -0.5 / q.shape[1]
    return q.transpose(1, 2).flatten(2) @ k.transpose(1, 2).flatten(2).mT * scale


def attention(
    attention_map: Callable[..., Tensor], layer: Layer, target: str, tensors: Sequence[Tensor]
) -> Tensor:
    q, k, teacher_q, teacher_k = tensors
    residual = attention_map(q, k, target, layer.causal) - attention_map(
        teacher_q, teacher_k, target, layer.causal
    )
    if not layer.causal:
        return residual.square().mean()
    return residual.tril().square().sum() / layer.pairs


def autocast_attention(
    attention_map: Callable[..., Tensor], layer: Layer, target: str, tensors: Sequence[Tensor]
) -> Tensor:
    q, k, teacher_q, teacher_k = tensors
    student, teacher = (
        attention_map(*x, target, layer.causal) for x in ((q, k), (teacher_q, teacher_k))
    )
    if not layer.causal:
        return F.mse_loss(student, teacher)
    return F.mse_loss(student.tril(), teacher.tril(), reduction="sum") / layer.pairs


def textbrewer_attention(layer: Layer, target: str, tensors: Sequence[Tensor]) -> Tensor:
    q, k, teacher_q, teacher_k = tensors
    maps = []
    for x, y in ((q, k), (teacher_q, teacher_k)):
        scores = (x @ y.transpose(-1, -2)).float() * x.shape[-1] ** -0.5
        if target == "probs":
            if layer.causal:
                seen = scores.new_ones(scores.shape[-2:]).tril()
                scores = scores + (1 - seen) * -1e9
            scores = scores.softmax(-1)
        maps.append(scores.sum(1) / x.shape[1])
    mask = torch.ones_like(maps[0])
    if layer.causal:
        mask = mask.tril()
    errors = F.mse_loss(maps[0], maps[1], reduction="none") * mask
    return errors.sum() / mask.sum()


def tinybert_attention(layer: Layer, target: str, tensors: Sequence[Tensor]) -> Tensor:
    q, k, teacher_q, teacher_k = tensors
    maps = []
    for x, y in ((q, k), (teacher_q, teacher_k)):
        scores = x @ y.transpose(-1, -2) * x.shape[-1] ** -0.5
        if layer.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -1e4)
        if target == "probs":
            scores = scores.softmax(-1)
        else:
            scores = torch.where(scores <= -1e2, torch.zeros_like(scores), scores)
        maps.append(scores.mean(1))
    if layer.causal:
        return F.mse_loss(maps[0], maps[1], reduction="sum") / layer.pairs
    return F.mse_loss(maps[0], maps[1])


def _loop(case: Case, hidden: Callable[..., Tensor], one: Callable[..., Tensor]) -> Loss:
    """A layer after the other, as every one of these libraries does."""

    def loss(layers: Layers) -> list[Tensor]:
        if case.target == "hidden":
            return [hidden(*tensors) for tensors in layers]
        pairs = zip(case.layers, layers, strict=True)
        return [one(layer, case.target, tensors) for layer, tensors in pairs]

    return loss


def _eager(case: Case) -> Loss:
    return _loop(case, eager_hidden, lambda *args: attention(eager_map, *args))


def _gemm(case: Case) -> Loss:
    return _loop(case, eager_hidden, lambda *args: attention(gemm_map, *args))


def _autocast(case: Case) -> Loss:
    return _loop(case, autocast_hidden, lambda *args: autocast_attention(eager_map, *args))


def _compiled(case: Case, **options: Any) -> Loss:
    compiled: Loss = torch.compile(_eager(case), dynamic=False, **options)
    return compiled


def _ours(case: Case, backend: str, **options: Any) -> Loss:
    causal = [layer.causal for layer in case.layers]

    def loss(layers: Layers) -> Tensor:
        columns = [list(x) for x in zip(*layers, strict=True)]
        if case.target == "hidden":
            students, weights, teachers = columns
            return optima_fast.hidden_mse(students, teachers, weights, backend=backend, **options)
        return optima_fast.attention_mse(
            *columns, target=case.target, causal=causal, backend=backend, **options
        )

    return loss


def normaliser(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """[B, H, Nq] float32 log-sum-exp of the scaled scores, an item at a time."""
    found = []
    for x, y in zip(q.detach().float(), k.detach().float(), strict=True):
        scores = x @ y.mT * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        found.append(scores.logsumexp(-1))
    return torch.stack(found)


def _triton_lse(case: Case, layers: Layers) -> Loss:
    lses = [
        [
            normaliser(tensors[i], tensors[i + 1], layer.causal)
            for layer, tensors in zip(case.layers, layers, strict=True)
        ]
        for i in (0, 2)
    ]
    return _ours(case, "triton", student_lse=lses[0], teacher_lse=lses[1])


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def sdpa_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    aten = torch.ops.aten
    if not q.is_cuda:
        found = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    elif q.dtype == torch.float32:
        found = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
    else:
        found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    lse: Tensor = found[1]
    return lse[..., : q.shape[2]]  # rows may be padded


def xformers_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    ops = importlib.import_module("xformers.ops")
    mask = ops.LowerTriangularMask() if causal else None
    forward = ops.fmha.memory_efficient_attention_forward_requires_grad
    lse: Tensor = forward(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=mask)[1]
    return lse[..., : q.shape[2]]


def _after(attend: Callable[..., Tensor | None], case: Case) -> Loss:
    """Attention of both models, then ours with the log-sum-exp that comes of it."""

    def loss(layers: Layers) -> Tensor | Sequence[Tensor]:
        lses: list[list[Tensor | None]] = [[], []]
        with torch.no_grad():
            for layer, (q, k, teacher_q, teacher_k) in zip(case.layers, layers, strict=True):
                lses[0].append(attend(q, k, k, layer.causal))
                lses[1].append(attend(teacher_q, teacher_k, teacher_k, layer.causal))
        return _ours(case, "auto", student_lse=lses[0], teacher_lse=lses[1])(layers)

    return loss


def no_triton(device: str) -> str:
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return "the Triton kernels need a CUDA device"


@functools.cache
def no_xformers(device: str) -> str:
    """Why xFormers' attention cannot run, in a line: it may import without its operators."""
    try:
        q = torch.zeros(1, 1, 8, 64, device=device, dtype=torch.float16)
        xformers_lse(q, q, q, False)
    except Exception as error:  # whatever a broken install raises
        return "xformers: " + (str(error).strip() or type(error).__name__).splitlines()[0][:150]
    return ""


class Contender(NamedTuple):
    """How it is made from (case, its inputs), for which losses, and what it needs."""

    make: Callable[[Case, Layers], Loss]
    targets: Sequence[str] = ("hidden", "scores", "probs")
    lse: bool = False
    autocast: bool = False
    compiler: bool = False
    ours: bool = False
    attends: bool = False  # attention's own forward is in it
    lacks: Callable[[str], str] = lambda device: ""  # why it cannot run on this device


CONTENDERS: dict[str, Contender] = {
    "eager": Contender(lambda case, _: _eager(case)),
    "gemm": Contender(lambda case, _: _gemm(case), ("scores",)),
    "autocast": Contender(lambda case, _: _autocast(case), autocast=True),
    "automodel": Contender(
        lambda case, _: _loop(case, automodel_hidden, tinybert_attention), ("hidden",)
    ),
    "textbrewer": Contender(lambda case, _: _loop(case, textbrewer_hidden, textbrewer_attention)),
    "tinybert": Contender(
        lambda case, _: _loop(case, autocast_hidden, tinybert_attention), ("scores", "probs")
    ),
    "compile": Contender(lambda case, _: _compiled(case), compiler=True),
    "compile-max": Contender(
        lambda case, _: _compiled(case, mode="max-autotune-no-cudagraphs"), compiler=True
    ),
    "blockwise": Contender(lambda case, _: _ours(case, "blockwise"), ours=True),
    "triton": Contender(lambda case, _: _ours(case, "triton"), ours=True, lacks=no_triton),
    "triton-lse": Contender(_triton_lse, ("probs",), lse=True, ours=True, lacks=no_triton),
    "triton-recompute": Contender(
        lambda case, _: _ours(case, "triton", recompute=True), ("scores", "probs"),
        ours=True, lacks=no_triton,
    ),
    "sdpa": Contender(
        lambda case, _: _after(sdpa, case), ("probs",), ours=True, attends=True
    ),
    "sdpa-lse": Contender(
        lambda case, _: _after(sdpa_lse, case), ("probs",), ours=True, attends=True
    ),
    "xformers-lse": Contender(
        lambda case, _: _after(xformers_lse, case), ("probs",), ours=True, attends=True,
        lacks=no_xformers,
    ),
}  # fmt: skip


def prepared(name: str, layers: Layers) -> Layers:
    """The inputs as this contender wants them: under autocast, projections are float32."""
    if not CONTENDERS[name].autocast:
        return layers
    return [
        [x.detach().float().requires_grad_() if x.ndim == 2 else x for x in tensors]
        for tensors in layers
    ]


def step(
    name: str, case: Case, layers: Layers, *, backward: bool = True
) -> Callable[[], list[Tensor]]:
    """One step: the losses, and both gradients of each layer unless it is without backward."""
    contender = CONTENDERS[name]
    loss = contender.make(case, layers)
    tensors = prepared(name, layers)
    trained = [x for each in tensors for x in each[:2]]
    device = trained[0].device.type
    low = trained[0].dtype if trained[0].dtype != torch.float32 else torch.bfloat16

    def forward() -> Tensor | Sequence[Tensor]:
        if not contender.autocast:
            return loss(tensors)
        with torch.autocast(device, dtype=low):
            return loss(tensors)

    def both() -> list[Tensor]:
        values = forward()
        total = values.sum() if isinstance(values, Tensor) else sum(values[1:], values[0])
        gradients = torch.autograd.grad(total, trained)
        found = values if isinstance(values, Tensor) else torch.stack(list(values))
        return [found.detach(), *gradients]

    def alone() -> list[Tensor]:
        with torch.no_grad():
            values = forward()
        return [values if isinstance(values, Tensor) else torch.stack(list(values))]

    return both if backward else alone
