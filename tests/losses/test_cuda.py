"""The public losses on a CUDA device: bfloat16, graphs, no synchronisation, one compiled graph."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_as_good_as_eager

from optima_fast.losses import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LOSSES = ["hidden", "scores", "probs", "indexer"]


@pytest.fixture
def problem(hidden_problem, attention_problem, indexer_problem):
    def make(loss, tokens=200, dtype=torch.bfloat16):
        if loss == "hidden":
            return hidden_problem((2, tokens), 64, 96, dtype, masked=True)
        if loss == "indexer":
            return indexer_problem(2, tokens, (3, 4), (32, 64), dtype, masked=True)
        return attention_problem(
            2, tokens, heads=(3, 4), widths=(32, 64), dtype=dtype, masked="qk", target=loss,
            causal=True,
        )  # fmt: skip

    return make


def step(p, backend="auto", **options):
    def run(*trained):
        return (p.loss(*p.arguments(trained), backend=backend, **p.options, **options) * 3).sum()

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [77, 200])
@pytest.mark.parametrize("loss", LOSSES)
def test_as_good_as_eager(problem, loss, tokens, dtype):
    p = problem(loss, tokens, dtype)
    results = zip(p("triton", 2.0), p("reference", 2.0), p.double()("reference", 2.0), strict=True)
    for i, compared in enumerate(results):
        # what eager's arithmetic does not have, in eps of float32. Tensor cores cut their sums off:
        # up to 1 a step of 16, 9 steps here, twice that in a square. ex2.approx errs by 2, its
        # argument, below 2**5, by half an eps of its own size
        softmax = loss in ("probs", "indexer")
        wide = compared[0].dtype == torch.float32 and (softmax or dtype != torch.float32)
        size = (9 if wide else 1) * compared[2].abs().max().item()
        assert_as_good_as_eager(f"result {i}", *compared, scale=size)


@pytest.mark.parametrize("loss", LOSSES)
def test_auto_is_triton(problem, loss, monkeypatch):
    p = problem(loss)
    tables = {"hidden": backends.HIDDEN, "indexer": backends.INDEXER}
    table = tables.get(loss, backends.ATTENTION)
    monkeypatch.delitem(table, "blockwise")
    assert p("auto")[0].isfinite().all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_captured_graph_gives_what_calls_give(problem, loss, recompute):
    p = problem(loss)
    leaves = [x.detach().clone().requires_grad_() for x in p.trained]
    run = step(p, recompute=recompute)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(run(*leaves), leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = run(*leaves)
        captured = [value, *torch.autograd.grad(value, leaves)]
    with torch.no_grad():
        for x in leaves:
            x.mul_(0.5)
    graph.replay()
    value = run(*leaves)
    expected = [value, *torch.autograd.grad(value, leaves)]
    for x, y in zip(captured, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_waits_for_the_device(problem, loss):
    p = problem(loss)
    leaves = [x.detach().requires_grad_() for x in p.trained]
    torch.autograd.grad(step(p)(*leaves), leaves)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(step(p)(*leaves), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_as_one_graph(problem, loss):
    torch._dynamo.reset()
    p = problem(loss)
    leaves = [x.detach().requires_grad_() for x in p.trained]
    results = []
    for run in (torch.compile(step(p), fullgraph=True), step(p)):
        value = run(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)
