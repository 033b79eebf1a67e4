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
    blockwise, triton   ours, by backend; auto where Triton has no kernel
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import FAMILY, LOSSES, RELATION_HEADS, TARGETS, Case, Layer
from cases import loss as our_loss
from torch import Tensor

Layers = list[list[Tensor]]
Loss = Callable[[Layers], Tensor | Sequence[Tensor]]  # of each layer
One = Callable[..., Tensor]  # of a layer and its tensors


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


def later(n: int, like: Tensor) -> Tensor:
    return torch.ones((n, n), dtype=torch.bool, device=like.device).triu(1)


def eager_map(q: Tensor, k: Tensor, target: str, causal: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if target == "probs":
        if causal:
            scores = scores.masked_fill(later(q.shape[2], q), float("-inf"))
        scores = scores.softmax(-1)
    mean: Tensor = scores.mean(1)
    return mean


def rows_divergence(student: Tensor, teacher: Tensor, causal: bool) -> Tensor:
    """KL(teacher || student), the mean over rows; of logarithms and of probabilities."""
    if causal:  # 0 times -inf is nan
        student = student.masked_fill(later(teacher.shape[-1], teacher), 0)
    return F.kl_div(student, teacher, reduction="sum") / (teacher.numel() / teacher.shape[-1])


def eager_kl(layer: Layer, q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor) -> Tensor:
    student, teacher = (
        x @ y.transpose(-1, -2) * x.shape[-1] ** -0.5 for x, y in ((q, k), (teacher_q, teacher_k))
    )
    if layer.causal:
        hidden = later(layer.queries, q)
        student, teacher = (x.masked_fill(hidden, float("-inf")) for x in (student, teacher))
    return rows_divergence(student.log_softmax(-1), teacher.softmax(-1), layer.causal)


def eager_kl_mean(
    layer: Layer, q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor
) -> Tensor:
    student = eager_map(q, k, "probs", layer.causal).clamp_min(1e-30).log()
    teacher = eager_map(teacher_q, teacher_k, "probs", layer.causal)
    return rows_divergence(student, teacher, layer.causal)


def eager_relations(layer: Layer, student: Tensor, teacher: Tensor) -> Tensor:
    x, y = (z.unflatten(2, (RELATION_HEADS, -1)).transpose(1, 2) for z in (student, teacher))  # type: ignore[no-untyped-call]
    return eager_kl(layer, x, x, y, y)


def eager_gram(layer: Layer, student: Tensor, teacher: Tensor) -> Tensor:
    x, y = (F.normalize(z, dim=-1) for z in (student, teacher))
    return F.mse_loss(x @ x.mT, y @ y.mT)


def eager_indexer(
    layer: Layer, q: Tensor, k: Tensor, w: Tensor, teacher_q: Tensor, teacher_k: Tensor
) -> Tensor:
    index = ((q @ k[:, None].mT).relu() * w[..., None]).sum(1)
    index = index.masked_fill(later(layer.queries, q), float("-inf"))
    target = eager_map(teacher_q, teacher_k, "probs", layer.causal)
    return rows_divergence(index.log_softmax(-1), target, layer.causal)


def eager_cosine(layer: Layer, student: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student @ weight, teacher, dim=-1).mean()


def eager_smooth_l1(layer: Layer, student: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    return F.smooth_l1_loss(student @ weight, teacher)


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


def _loop(case: Case, one: Mapping[str, One]) -> Loss:
    """A layer after the other, as every one of these libraries does."""

    def loss(layers: Layers) -> list[Tensor]:
        pairs = zip(case.layers, layers, strict=True)
        return [one[case.target](layer, *tensors) for layer, tensors in pairs]

    return loss


def _paper(hidden: Callable[..., Tensor], both: Callable[..., Tensor]) -> dict[str, One]:
    """Of the losses of the paper: hidden states, and both targets of attention."""
    of_attention: dict[str, One] = {
        target: lambda layer, *tensors, target=target: both(layer, target, tensors)
        for target in ("scores", "probs")
    }
    return {"hidden": lambda layer, *tensors: hidden(*tensors), **of_attention}


EAGER = _paper(eager_hidden, functools.partial(attention, eager_map)) | {
    "kl": eager_kl,
    "kl-mean": eager_kl_mean,
    "relations": eager_relations,
    "gram": eager_gram,
    "indexer": eager_indexer,
    "cosine": eager_cosine,
    "smooth-l1": eager_smooth_l1,
}
GEMM = _paper(eager_hidden, functools.partial(attention, gemm_map))
AUTOCAST = _paper(autocast_hidden, functools.partial(autocast_attention, eager_map))
AUTOMODEL = _paper(automodel_hidden, tinybert_attention)
TEXTBREWER = _paper(textbrewer_hidden, textbrewer_attention)
TINYBERT = _paper(autocast_hidden, tinybert_attention)


def _compiled(case: Case, **options: Any) -> Loss:
    compiled: Loss = torch.compile(_loop(case, EAGER), dynamic=False, **options)
    return compiled


def _ours(case: Case, backend: str, **options: Any) -> Loss:
    def loss(layers: Layers) -> Tensor:
        return our_loss(case, list(zip(*layers, strict=True)), backend=backend, **options)

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
    targets: Sequence[str] = TARGETS
    lse: bool = False
    autocast: bool = False
    compiler: bool = False
    ours: bool = False
    attends: bool = False  # attention's own forward is in it
    lacks: Callable[[str], str] = lambda device: ""  # why it cannot run on this device


EVERY = (*TARGETS, *FAMILY)
CONTENDERS: dict[str, Contender] = {
    "eager": Contender(lambda case, _: _loop(case, EAGER), EVERY),
    "gemm": Contender(lambda case, _: _loop(case, GEMM), ("scores",)),
    "autocast": Contender(lambda case, _: _loop(case, AUTOCAST), autocast=True),
    "automodel": Contender(lambda case, _: _loop(case, AUTOMODEL), ("hidden",)),
    "textbrewer": Contender(lambda case, _: _loop(case, TEXTBREWER)),
    "tinybert": Contender(lambda case, _: _loop(case, TINYBERT), ("scores", "probs")),
    "compile": Contender(lambda case, _: _compiled(case), EVERY, compiler=True),
    "compile-max": Contender(
        lambda case, _: _compiled(case, mode="max-autotune-no-cudagraphs"), compiler=True
    ),
    "blockwise": Contender(lambda case, _: _ours(case, "blockwise"), EVERY, ours=True),
    "triton": Contender(lambda case, _: _ours(case, "triton"), EVERY, ours=True, lacks=no_triton),
    "triton-lse": Contender(_triton_lse, ("probs",), lse=True, ours=True, lacks=no_triton),
    "triton-recompute": Contender(
        lambda case, _: _ours(case, "triton", recompute=True), ("scores", "probs", "kl-mean"),
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
    """One step: the losses, and the gradients of each layer unless it is without backward."""
    contender = CONTENDERS[name]
    loss = contender.make(case, layers)
    tensors = prepared(name, layers)
    trained = [x for each in tensors for x in each[: LOSSES[case.target].trained]]
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
