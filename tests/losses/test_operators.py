"""The registered operators: opcheck, torch.compile, autocast, backward twice, memory."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optima_fast.losses import blockwise
from optima_fast.losses.blockwise import blocks

LOSSES = ["hidden", "scores", "probs"]
# pairs that do not count get anything in a kernel, and nothing of it is used
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
VARIANTS = [("blockwise", False), ("blockwise", True), ("triton", False), ("triton", True)]


# each backend, with and without a gradient, kept or computed again
OPCHECKED = [
    ("blockwise", False, True), ("blockwise", True, False),
    ("triton", False, True), ("triton", True, True), ("triton", False, False),
]  # fmt: skip


@pytest.mark.parametrize(("backend", "recompute", "grad"), OPCHECKED)
def test_opcheck_hidden(hidden_problem, grad, backend, recompute):
    dtype = torch.float16 if recompute else torch.float32
    a, b = hidden_problem((2, 9), dtype=dtype), hidden_problem((3, 4), 3, 2, dtype, masked=True)
    a.trained[0] = a.trained[0].transpose(0, 1).contiguous().transpose(0, 1)
    students, weights = ([p.trained[i].requires_grad_(grad) for p in (a, b)] for i in (0, 1))
    weights[0].requires_grad_(False)
    torch.library.opcheck(
        torch.ops.optima_fast.hidden_loss.default,
        (
            students, [a.fixed[0], b.fixed[0]], weights, [None, b.options["mask"]],
            "mse", 1.0, [grad, grad], [False, grad], backend, recompute,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("target", ["scores", "probs"])
@pytest.mark.parametrize(("backend", "recompute", "grad"), OPCHECKED)
def test_opcheck_attention(attention_problem, grad, target, backend, recompute):
    a, b = attention_problem(masked="qk"), attention_problem(1, 4, 6, (1, 2), (3, 3))
    b.trained[0] = b.trained[0].contiguous()
    q, k = ([p.trained[i].requires_grad_(grad) for p in (a, b)] for i in (0, 1))
    k[1].requires_grad_(False)
    lse = [None, torch.zeros(1, 2, 4)] if target == "probs" else [None, None]
    torch.library.opcheck(
        torch.ops.optima_fast.attention_loss.default,
        (
            q, k, *([p.fixed[i] for p in (a, b)] for i in (0, 1)),
            [a.options["query_mask"], None], [a.options["key_mask"], None], [None, None], lse,
            [0.5, 0.25], [0.5, 0.5], target, [False, False],
            [0, 2 if backend == "blockwise" and q[1].shape[2] == k[1].shape[2] else 0],
            [grad, grad], [grad, False], backend, recompute,
        ),
    )  # fmt: skip


def twice(p, backend="auto"):
    """Loss and gradients through something before and after the loss, as a model has."""

    def step(*trained):
        loss = p.loss(*p.arguments([x * 2 for x in trained]), backend=backend, **p.options)
        return (loss * 3).sum()

    def run(f):
        leaves = [x.detach().requires_grad_() for x in p.trained]
        value = f(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return step, run


@pytest.mark.parametrize("backend", ["triton", "blockwise", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_as_one_graph(problem, loss, backend):
    torch._dynamo.reset()
    step, run = twice(problem(loss), backend)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    for x, y in zip(run(compiled), run(step), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_dynamic_graph_serves_all_sizes(problem, loss):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    p = problem(loss)

    def step(trained, fixed, options):
        q = type(p)(p.loss, trained, fixed)
        return (p.loss(*q.arguments([x * 2 for x in trained]), **options) * 3).sum()

    compiled = torch.compile(step, fullgraph=True, backend=graphs, dynamic=True)
    for tokens in (9, 12, 31):
        p = problem(loss, tokens)
        results = []
        for f in (compiled, step):
            leaves = [x.detach().requires_grad_() for x in p.trained]
            value = f(leaves, p.fixed, p.options)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y)
    assert graphs.frame_count == 1


@pytest.mark.slow  # a run that distils compiled takes the same way
def test_compiles_with_inductor(problem):
    torch._dynamo.reset()
    steps = [twice(problem(loss)) for loss in LOSSES]
    leaves = [[x.detach().requires_grad_() for x in problem(loss).trained] for loss in LOSSES]

    def total(leaves):
        return sum(step(*x) for (step, _), x in zip(steps, leaves, strict=True))

    results = []
    for f in (torch.compile(total, fullgraph=True), total):
        value = f(leaves)
        results.append(
            [value.detach(), *torch.autograd.grad(value, [x for xs in leaves for x in xs])]
        )
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("backend", "recompute"), VARIANTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_backward_equals_the_first(problem, loss, backend, recompute):
    p = problem(loss)
    leaves = [x.detach().requires_grad_() for x in p.trained]
    options = {"backend": backend, "recompute": recompute, **p.options}
    value = p.loss(*p.arguments(leaves), **options).sum() * 7
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(("backend", "recompute"), VARIANTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_double_backward_is_refused(problem, loss, backend, recompute):
    p = problem(loss)
    leaves = [x.detach().requires_grad_() for x in p.trained]
    options = {"backend": backend, "recompute": recompute, **p.options}
    value = p.loss(*p.arguments(leaves), **options).sum()
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once.*backend='reference'"):
        sum(g.square().sum() for g in grads).backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_may_be_changed_in_place(problem, loss):
    """It is not among the tensors that backward reads."""
    p = problem(loss)
    leaves = [x.detach().requires_grad_() for x in p.trained]
    value = p.loss(*p.arguments(leaves), backend="blockwise", **p.options)
    value *= 2
    for g, expected in zip(
        torch.autograd.grad(value.sum(), leaves), p("blockwise", 2.0)[1:], strict=True
    ):
        assert torch.equal(g, expected)


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_under_autocast_what_is_multiplied_is_rounded_to_its_dtype(problem, loss, backend):
    """As torch.matmul does; sums stay float32, gradients come in the dtype of what was given."""
    p = problem(loss)
    leaves = [x.detach().requires_grad_() for x in p.trained]
    with torch.autocast(leaves[0].device.type, dtype=torch.bfloat16):
        value = p.loss(*p.arguments(leaves), backend=backend, **p.options)
    found = [value, *torch.autograd.grad(value, leaves)]
    assert all(x.dtype == torch.float32 for x in found)
    p.trained = [x.bfloat16() for x in p.trained]
    if loss != "hidden":  # where the teacher is subtracted, not multiplied
        p.fixed = [x.bfloat16() for x in p.fixed]
    for x, y in zip(found, p(backend), strict=True):
        assert torch.equal(x, y.float())


@pytest.mark.parametrize("loss", LOSSES)
def test_under_autocast_float64_stays(problem, loss):
    p = problem(loss)
    p.trained, p.fixed = ([x.double() for x in tensors] for tensors in (p.trained, p.fixed))
    plain = p("blockwise")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = p("blockwise")
    assert all(torch.equal(x, y) for x, y in zip(found, plain, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_runs_repeat_bit_for_bit(problem, loss):
    p = problem(loss, 700)
    first = p("blockwise")
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(p("blockwise"), first, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_float64_inputs_give_a_float64_loss(problem, loss):
    p = problem(loss)
    assert p("auto")[0].dtype == p("reference")[0].dtype == torch.float32
    p.fixed[0] = p.fixed[0].double()
    assert p("auto")[0].dtype == p("reference")[0].dtype == torch.float64


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that any operation returned."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("target", ["scores", "probs"])
def test_nothing_of_the_size_of_the_maps_is_allocated(attention_problem, target, causal):
    B, N, heads = 2, 512, (6, 8)
    p = attention_problem(B, N, None, heads, (8, 8), masked="qk")
    options = {"target": target, "causal": causal, "student_scale": 0.3, "teacher_scale": 0.3}
    masks = p.options["query_mask"], p.options["key_mask"]
    with LargestTensor() as seen:
        blockwise.attention_loss(
            *p.trained, *p.fixed, *masks, None, None, **options,
            need_q=True, need_k=True, dtype=torch.float32,
        )  # fmt: skip
    assert seen.nbytes <= max(4 * blocks.BLOCK_ELEMENTS, p.fixed[0].nbytes)
    assert seen.nbytes < 4 * B * min(heads) * N * N / 2
    if target == "scores":
        assert seen.nbytes <= 4 * B * N * N


@pytest.mark.parametrize("batch", [1, 5, 300])
@pytest.mark.parametrize("rows", [1, 16, 77, 256, 1024, 5000])
@pytest.mark.parametrize("row_elements", [1, 64, 12 * 77, 16 * 1024, 16 * 2**20])
@pytest.mark.parametrize("causal", [False, True])
def test_block_shape(batch, rows, row_elements, causal):
    items, block = blocks.block_shape(batch, rows, row_elements, causal=causal)
    fewer, same = blocks.block_shape(batch, rows, row_elements, shared=8, causal=causal)
    assert same == block
    assert fewer == max(1, items // 8) or fewer * 8 * block * row_elements <= 2**20
    assert 1 <= fewer <= items
    assert 1 <= items <= batch
    assert 1 <= block <= rows
    assert items == 1 or block == rows or causal
    if causal:  # three blocks, or two of a multiple of 16 rows
        assert rows <= 16 or math.ceil(rows / block) >= 2
    least = min(rows, 16)
    # one multiple of 16 rows above what fits, to make the blocks even, never twice of it
    room = max(blocks.BLOCK_ELEMENTS, least * row_elements) + 16 * row_elements
    assert items * block * row_elements <= room
    whole = math.ceil(rows / block)
    assert sum(end - start for start, end in blocks.starts(rows, block)) == rows
    assert len(list(blocks.starts(rows, block))) == whole


def test_losses_need_torch_alone():
    """No GPU, no triton and nothing of the trainer's."""
    code = (
        "import sys\n"
        "for name in ('triton', 'numpy', 'sklearn', 'yaml', 'rich'): sys.modules[name] = None\n"
        "import torch, optima_fast\n"
        "x = torch.ones(2, 3, requires_grad=True)\n"
        "optima_fast.hidden_mse(x, x, torch.eye(3)).backward()\n"
        "q = torch.ones(1, 2, 3, 4)\n"
        "optima_fast.attention_mse(q, q, q, q, target='probs')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_docstring_examples():
    import doctest
    import importlib

    for name in ("attention", "hidden", "indexer", "relations"):
        module = importlib.import_module(f"optima_fast.losses.{name}")
        failed, attempted = doctest.testmod(module)
        assert (failed, attempted > 1) == (0, True), name
