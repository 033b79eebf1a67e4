"""The losses beside OPTIMA's two, forward and backward, against their formulas in plain PyTorch.

    pytest bench/bench_family.py --benchmark-only
    pytest bench/bench_family.py --benchmark-disable --quick      # only checks, tiny sizes

``eager`` is the formula as its paper or PyTorch writes it, ``compile`` is torch.compile of that.
Each is checked against float64 before it is timed; the three take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from measuring import (
    DTYPES,
    Row,
    Step,
    Timer,
    allowed_error,
    interleave,
    peak_bytes,
    ratio,
    relative_error,
    spread,
)
from torch import Tensor
from torch.nn import functional as F

import optima_fast

Loss = Callable[..., Tensor]
CONTENDERS = ("ours", "eager", "compile")


class Case(NamedTuple):
    """A loss: its tensors, of which the first ``trained`` have gradients, ours, and its formula."""

    shapes: Callable[[int, int], tuple[tuple[int, ...], ...]]  # of batch and tokens
    trained: int
    ours: Loss
    eager: Loss


def maps(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Of rows, their mean."""
    terms = F.kl_div(student.log(), teacher, reduction="sum")
    return terms / (student.numel() / student.shape[-1])


def kl_each(q: Tensor, k: Tensor, t_q: Tensor, t_k: Tensor) -> Tensor:
    return divergence(maps(q, k), maps(t_q, t_k))


def kl_mean(q: Tensor, k: Tensor, t_q: Tensor, t_k: Tensor) -> Tensor:
    return divergence(maps(q, k).mean(1), maps(t_q, t_k).mean(1))


def relations(student: Tensor, teacher: Tensor) -> Tensor:
    x, y = (torch.unflatten(z, 2, (48, -1)).transpose(1, 2) for z in (student, teacher))
    return divergence(maps(x, x), maps(y, y))


def gram(student: Tensor, teacher: Tensor) -> Tensor:
    x, y = (F.normalize(z, dim=-1) for z in (student, teacher))
    return F.mse_loss(x @ x.mT, y @ y.mT)


def indexer(q: Tensor, k: Tensor, w: Tensor, t_q: Tensor, t_k: Tensor) -> Tensor:
    later = torch.full((q.shape[2],) * 2, float("-inf"), device=q.device, dtype=q.dtype).triu(1)
    index = ((q @ k[:, None].mT).relu() * w[..., None]).sum(1) + later
    target = (t_q @ t_k.mT * t_q.shape[-1] ** -0.5 + later).softmax(-1).mean(1)
    logs = torch.where(later == 0, index.log_softmax(-1), 0)
    rows = q.shape[0] * q.shape[2]
    return torch.sum(torch.xlogy(target, target) - target * logs) / rows


def attention_shapes(batch: int, n: int) -> tuple[tuple[int, ...], ...]:
    return ((batch, 12, n, 64),) * 4


def feature_shapes(batch: int, n: int) -> tuple[tuple[int, ...], ...]:
    return ((batch, n, 384), (batch, n, 768))


def state_shapes(batch: int, n: int) -> tuple[tuple[int, ...], ...]:
    return ((batch, n, 384), (384, 768), (batch, n, 768))


def hidden(loss: Loss) -> Loss:
    return lambda s, w, t: loss(s, t, w)


def cosine(s: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(s @ w, t, dim=-1).mean()


def smooth_l1(s: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.smooth_l1_loss(s @ w, t)


CASES = {
    "kl-each": Case(attention_shapes, 2, optima_fast.attention_kl, kl_each),
    "kl-mean": Case(
        attention_shapes, 2, lambda *x: optima_fast.attention_kl(*x, heads="mean"), kl_mean
    ),
    "relations": Case(
        feature_shapes, 1, lambda *x: optima_fast.relation_kl(*x, relation_heads=48), relations
    ),
    "gram": Case(feature_shapes, 1, optima_fast.gram_mse, gram),
    "indexer": Case(
        lambda b, n: ((b, 16, n, 64), (b, n, 64), (b, 16, n), (b, 12, n, 64), (b, 12, n, 64)),
        3, optima_fast.indexer_kl, indexer,
    ),
    "cosine": Case(state_shapes, 2, hidden(optima_fast.hidden_cosine), cosine),
    "smooth-l1": Case(state_shapes, 2, hidden(optima_fast.hidden_smooth_l1), smooth_l1),
}  # fmt: skip
SHAPES = {"8x197": (8, 197), "1x1024": (1, 1024)}
QUICK = {"2x9": (2, 9)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.option.quick
    names = CONTENDERS[:2] if quick else CONTENDERS
    metafunc.parametrize("name", names)
    metafunc.parametrize("shape", QUICK if quick else SHAPES)
    metafunc.parametrize("loss", CASES)


def step(loss: Loss, tensors: list[Tensor], trained: int) -> Step:
    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors[:trained]]
        value = loss(*leaves, *tensors[trained:]).sum()
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return run


def test_loss(
    loss: str, shape: str, name: str, side_by_side: Any, request: pytest.FixtureRequest
) -> None:
    option = request.config.option
    few = option.quick or option.benchmark_disable
    device, dtype = option.device, DTYPES[option.dtype]

    def measure(names: list[str]) -> tuple[dict[str, Row], dict[str, list[float]]]:
        case, g = CASES[loss], torch.Generator().manual_seed(0)
        tensors = [
            torch.randn(*x, generator=g).to(device, dtype)
            for x in case.shapes(*(QUICK | SHAPES)[shape])
        ]
        exact = step(case.eager, [x.double() for x in tensors], case.trained)()
        torch._dynamo.reset()
        losses = {"ours": case.ours, "eager": case.eager, "compile": torch.compile(case.eager)}
        steps = {n: step(losses[n], tensors, case.trained) for n in names}
        rows: dict[str, Row] = {}
        for n, run in steps.items():
            error = relative_error(run(), exact)
            peak = peak_bytes(run, device) / 2**20
            wrong = not error < allowed_error(dtype)
            rows[n] = (
                {"failed": f"WRONG, {error:.1e}"} if wrong else {"error": error, "peak_mb": peak}
            )
        seconds = 0.0 if few else float(option.benchmark_max_time) * len(names)
        timer = Timer(device)
        samples = interleave(steps, timer, seconds=seconds, least=2 if few else 5)
        for n in names:
            rows[n] |= {"case": f"{loss} {shape}", "provider": n, "ours": n == "ours"}
            rows[n] |= spread(samples[n])._asdict()
            rows[n]["ratio"] = ratio(samples[n], samples["eager"])
        return rows, samples

    side_by_side(f"{loss} {shape}", measure)
