"""The registered operators: opcheck, torch.compile, autocast, backward twice, memory."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from tolerance import assert_as_good_as_eager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optima_fast
from optima_fast.losses import blockwise, ops

LOSSES = ["hidden", "scores", "probs"]


@pytest.fixture
def problem(hidden_problem, attention_problem):
    """One layer of each loss, with masks."""

    def make(loss, tokens=9, **options):
        if loss == "hidden":
            return hidden_problem((2, tokens), masked=True, **options)
        return attention_problem(2, tokens, masked="qk", target=loss, causal=True, **options)

    return make


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_opcheck_hidden(hidden_problem, grad, dtype):
    a, b = hidden_problem((2, 9), dtype=dtype), hidden_problem((3, 4), 3, 2, dtype, masked=True)
    a.trained[0] = a.trained[0].transpose(0, 1).contiguous().transpose(0, 1)
    students, weights = ([p.trained[i].requires_grad_(grad) for p in (a, b)] for i in (0, 1))
    weights[0].requires_grad_(False)
    torch.library.opcheck(
        torch.ops.optima_fast.hidden_mse.default,
        (
            students, [a.fixed[0], b.fixed[0]], weights, [None, b.options["mask"]],
            [grad, grad], [False, grad], "blockwise",
        ),
    )  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("target", ["scores", "probs"])
def test_opcheck_attention(attention_problem, grad, target):
    a, b = attention_problem(masked="qk"), attention_problem(1, 4, 6, (1, 2), (3, 3))
    b.trained[0] = b.trained[0].contiguous()
    q, k = ([p.trained[i].requires_grad_(grad) for p in (a, b)] for i in (0, 1))
    k[1].requires_grad_(False)
    lse = [None, torch.zeros(1, 2, 4)] if target == "probs" else [None, None]
    torch.library.opcheck(
        torch.ops.optima_fast.attention_mse.default,
        (
            q, k, *([p.fixed[i] for p in (a, b)] for i in (0, 1)),
            [a.options["query_mask"], None], [a.options["key_mask"], None], [None, None], lse,
            [0.5, 0.25], [0.5, 0.5], target, [False, False],
            [grad, grad], [grad, False], "blockwise",
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


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
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


@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_backward_equals_the_first(problem, loss):
    p = problem(loss)
    leaves = [x.detach().requires_grad_() for x in p.trained]
    value = p.loss(*p.arguments(leaves), **p.options).sum() * 7
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_double_backward_is_refused(problem, loss):
    p = problem(loss)
    leaves = [x.detach().requires_grad_() for x in p.trained]
    value = p.loss(*p.arguments(leaves), **p.options).sum()
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once.*backend='reference'"):
        sum(g.square().sum() for g in grads).backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_may_be_changed_in_place(problem, loss):
    """It is not among the tensors that backward reads."""
    p = problem(loss)
    leaves = [x.detach().requires_grad_() for x in p.trained]
    value = p.loss(*p.arguments(leaves), **p.options)
    value *= 2
    for g, expected in zip(
        torch.autograd.grad(value.sum(), leaves), p("blockwise", 2.0)[1:], strict=True
    ):
        assert torch.equal(g, expected)


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_changes_nothing(problem, loss, backend):
    p = problem(loss)
    p.trained[0], p.fixed[0] = p.trained[0].bfloat16(), p.fixed[0].bfloat16()
    plain = p(backend)
    leaves = [x.detach().requires_grad_() for x in p.trained]
    with torch.autocast(leaves[0].device.type, dtype=torch.bfloat16):
        value = p.loss(*p.arguments(leaves), backend=backend, **p.options)
    for x, y in zip([value, *torch.autograd.grad(value, leaves)], plain, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


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
        blockwise.attention_mse(
            *p.trained, *p.fixed, *masks, None, None, **options,
            need_q=True, need_k=True, dtype=torch.float32,
        )  # fmt: skip
    assert seen.nbytes <= max(4 * blockwise.BLOCK_ELEMENTS, p.fixed[0].nbytes)
    assert seen.nbytes < 4 * B * min(heads) * N * N / 2
    if target == "scores":
        assert seen.nbytes <= 4 * B * N * N


@pytest.mark.parametrize("batch", [1, 5, 300])
@pytest.mark.parametrize("rows", [1, 16, 77, 256, 1024, 5000])
@pytest.mark.parametrize("row_elements", [1, 64, 12 * 77, 16 * 1024, 16 * 2**20])
def test_block_shape(batch, rows, row_elements):
    items, block = blockwise.block_shape(batch, rows, row_elements)
    fewer, same = blockwise.block_shape(batch, rows, row_elements, shared=8)
    assert same == block
    assert fewer == max(1, items // 8) or fewer * 8 * block * row_elements <= 2**20
    assert 1 <= fewer <= items
    assert 1 <= items <= batch
    assert 1 <= block <= rows
    assert items == 1 or block == rows
    least = min(rows, 16)
    # one multiple of 16 rows above what fits, to make the blocks even, never twice of it
    room = max(blockwise.BLOCK_ELEMENTS, least * row_elements) + 16 * row_elements
    assert items * block * row_elements <= room
    whole = math.ceil(rows / block)
    assert sum(end - start for start, end in blockwise.starts(rows, block)) == rows
    assert len(list(blockwise.starts(rows, block))) == whole


def test_auto_prefers_triton_where_it_serves(monkeypatch, hidden_problem):
    """A backend is one entry: the operator hands it all layers at once."""
    p = hidden_problem((2, 3))
    tensors = [*p.trained, *p.fixed]
    assert ops.resolve(ops.HIDDEN_MSE, "auto", tensors) == "blockwise"
    calls, refused = [], ["only on Tuesdays"]

    def run(*args):
        calls.append(len(args[0]))
        return ops.HIDDEN_MSE["blockwise"].run(*args)

    monkeypatch.setitem(ops.HIDDEN_MSE, "triton", ops.Backend(run, lambda tensors: refused))
    args = [[x, x, x] for x in p.arguments(p.trained)]
    expected = optima_fast.hidden_mse(*args)
    assert calls == []
    with pytest.raises(ValueError, match="only on Tuesdays"):
        optima_fast.hidden_mse(*args, backend="triton")
    refused.clear()
    assert torch.equal(optima_fast.hidden_mse(*args), expected)
    assert calls == [3]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_triton_by_name_serves_the_public_function(hidden_problem, dtype, masked):
    """On a CPU in Triton's interpreter; ``auto`` does not take what no card has timed."""
    p = hidden_problem((3, 11), 17, 20, dtype=dtype, masked=masked)
    results = zip(
        p("triton", -2.0), p("reference", -2.0), p.double()("reference", -2.0), strict=True
    )
    for name, compared in zip(("loss", "d_student", "d_weight"), results, strict=True):
        assert_as_good_as_eager(name, *compared)
    assert ops.resolve(ops.HIDDEN_MSE, "auto", [*p.trained, *p.fixed]) == "blockwise"
    with torch.no_grad():
        only = optima_fast.hidden_mse(*p.arguments(p.trained), backend="triton", **p.options)
    assert torch.equal(only, p("triton")[0])


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_layers_may_differ_in_causality(attention_problem, backend):
    p, q = attention_problem(2, 9), attention_problem(1, 5, seed=1)
    together = optima_fast.attention_mse(
        *([x, y] for x, y in zip([*p.trained, *p.fixed], [*q.trained, *q.fixed], strict=True)),
        causal=[True, False],
        backend=backend,
    )
    p.options["causal"] = True
    assert torch.equal(together, torch.cat([p(backend)[0], q(backend)[0]]))


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

    import optima_fast.losses

    assert doctest.testmod(optima_fast.losses) == (0, 6)
