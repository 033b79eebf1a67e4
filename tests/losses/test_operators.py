"""The registered operators: opcheck, torch.compile, autocast, backward twice, memory."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from tolerance import assert_as_good_as_eager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optima_fast
from optima_fast.losses import backends, blockwise
from optima_fast.losses.blockwise import blocks

LOSSES = ["hidden", "scores", "probs"]
# pairs that do not count get anything in a kernel, and nothing of it is used
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
VARIANTS = [("blockwise", False), ("blockwise", True), ("triton", False), ("triton", True)]


@pytest.fixture
def problem(hidden_problem, attention_problem):
    """One layer of each loss, with masks."""

    def make(loss, tokens=9, **options):
        if loss == "hidden":
            return hidden_problem((2, tokens), masked=True, **options)
        return attention_problem(2, tokens, masked="qk", target=loss, causal=True, **options)

    return make


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


class OnCuda:
    """Inputs as on a CUDA device, for the rule alone."""

    is_cuda, dtype, device = True, torch.float16, torch.device("cuda")

    def __init__(self, dtype=torch.float16):
        self.dtype = dtype


def hidden_inputs(*tensors):
    return backends.HiddenInputs(*([x] for x in tensors), [None], "mse", 1.0, [True], [True])


def attention_inputs(target, *tensors):
    nothing = [[None]] * 4
    return backends.AttentionInputs(
        *([x] for x in tensors), *nothing, [1.0], [1.0], target, [False], [0], [True], [True]
    )


def indexer_inputs(*tensors):
    nothing = [[None]] * 3
    return backends.IndexerInputs(
        *([x] for x in tensors), *nothing, [1.0], [False], [True], [True], [True]
    )


@pytest.mark.parametrize(
    ("dtypes", "taken"),
    [
        ((torch.float16,) * 4, {"hidden", "scores", "probs", "indexer"}),
        ((torch.bfloat16, torch.float16) * 2, {"hidden", "scores", "probs", "indexer"}),
        ((torch.float32,) * 4, {"probs"}),
        ((torch.bfloat16, torch.bfloat16, torch.float32, torch.float32), {"probs"}),
    ],
)
def test_auto_is_triton_on_cuda_but_for_products_of_float32(monkeypatch, dtypes, taken):
    a, b, c, d = map(OnCuda, dtypes)
    calls = {
        "hidden": (backends.HIDDEN, hidden_inputs(a, c, c)),
        "scores": (backends.ATTENTION, attention_inputs("scores", a, b, c, d)),
        "probs": (backends.ATTENTION, attention_inputs("probs", a, b, c, d)),
        "indexer": (backends.INDEXER, indexer_inputs(a, b, OnCuda(torch.float32), c, d)),
    }
    for refused in ([], ["only on Tuesdays"]):
        for table in (backends.HIDDEN, backends.ATTENTION, backends.INDEXER):
            serves = table["triton"]._replace(refusals=lambda inputs, r=refused: r)
            monkeypatch.setitem(table, "triton", serves)
        for name, (table, inputs) in calls.items():
            chosen = backends.resolve(table, "auto", inputs)
            assert (chosen is table["triton"]) == (name in taken and not refused), name
            assert backends.resolve(table, "blockwise", inputs) is table["blockwise"]


def test_auto_is_blockwise_on_a_cpu_and_without_triton(monkeypatch, hidden_problem):
    p = hidden_problem((2, 3))
    inputs = hidden_inputs(*p.arguments(p.trained))
    table = backends.HIDDEN
    assert backends.resolve(table, "auto", inputs) is table["blockwise"]
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    cuda = hidden_inputs(*[OnCuda()] * 3)
    assert backends.resolve(table, "auto", cuda) is table["blockwise"]


def test_a_backend_is_one_entry_and_gets_all_layers(monkeypatch, hidden_problem):
    p = hidden_problem((2, 3))
    calls = []

    def forward(inputs):
        calls.append(len(inputs.student))
        return backends.HIDDEN["blockwise"].forward(inputs)

    entry = backends.HIDDEN["blockwise"]._replace(forward=forward)
    monkeypatch.setitem(backends.HIDDEN, "triton", entry)
    args = [[x, x, x] for x in p.arguments(p.trained)]
    loss = optima_fast.hidden_mse(*args, backend="triton")
    assert torch.equal(loss, optima_fast.hidden_mse(*args, backend="blockwise"))
    assert calls == [3]


DTYPES = [torch.float16, torch.float32]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_triton_by_name_serves_the_public_function(problem, loss, dtype, recompute):
    """On a CPU in Triton's interpreter."""
    p = problem(loss, dtype=dtype)
    names = ("loss", "first", "second")
    p.options["recompute"] = recompute
    results = zip(
        p("triton", -2.0), p("reference", -2.0), p.double()("reference", -2.0), strict=True
    )
    for name, compared in zip(names, results, strict=True):
        # a probability is 2 to a difference of scores, below 2**4 here: it errs by 6 eps where
        # eager's first subtracts the greatest and divides by the sum
        size = (4 if loss == "probs" else 1) * compared[2].abs().max().item()
        assert_as_good_as_eager(name, *compared, scale=size)
    with torch.no_grad():
        only = p.loss(*p.arguments(p.trained), backend="triton", **p.options)
    assert torch.equal(only, p("triton")[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="float64 needs Triton's interpreter")
@pytest.mark.parametrize("loss", LOSSES)
def test_triton_passes_gradcheck(problem, loss):
    p = problem(loss, 5).double()
    leaves = [x.detach().requires_grad_() for x in p.trained]

    def f(*trained):
        return p.loss(*p.arguments(trained), backend="triton", **p.options)

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


def several(attention_problem, hidden_problem, loss, dtype):
    """Three layers of different shapes, the second without a gradient of its second input."""
    if loss == "hidden":
        made = [hidden_problem((2, n), d, 5, dtype, masked=n == 9) for n, d in ((9, 3), (4, 6))]
        made.append(hidden_problem((1, 7), dtype=dtype))
    else:
        made = [
            attention_problem(2, n, m, dtype=dtype, masked=masked, target=loss)
            for n, m, masked in ((9, 9, "qk"), (140, 5, "k"), (3, 6, ""))
        ]
    layers = [list(x) for x in zip(*(p.arguments(p.trained) for p in made), strict=True)]
    trained = 2 if loss != "hidden" else None
    options = {"target": loss} if trained else {}
    keys = ("query_mask", "key_mask") if trained else ("mask",)
    for key in keys:
        options[key] = [p.options.get(key) for p in made]
    return made[0].loss, layers, options


@pytest.mark.parametrize("backend", ["triton", "blockwise"])
@pytest.mark.parametrize("loss", LOSSES)
def test_recomputed_gradients_are_the_same_and_nothing_is_kept(
    hidden_problem, attention_problem, loss, backend
):
    f, layers, options = several(attention_problem, hidden_problem, loss, torch.float32)
    second = 1 if loss != "hidden" else 2
    results, kept = [], []
    for recompute in (False, True):
        leaves = [[x.detach().clone() for x in xs] for xs in layers]
        wanted = [*leaves[0], leaves[second][0], leaves[second][2]]
        for x in wanted:
            x.requires_grad_()
        inputs = {x.untyped_storage().data_ptr() for xs in leaves for x in xs}
        inputs |= {m.untyped_storage().data_ptr() for k in options for m in options[k]
                   if isinstance(m, torch.Tensor)}  # fmt: skip
        own = []

        def pack(x, own=own, inputs=inputs):
            if x.untyped_storage().data_ptr() not in inputs:
                own.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = f(*leaves, backend=backend, recompute=recompute, **options)
        upstream = torch.tensor([1.5, -2.0, 3.0])
        results.append([value.detach(), *torch.autograd.grad(value, wanted, upstream)])
        kept.append(sum(own))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
    assert kept[0] > 100
    assert kept[1] == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_triton_keeps_no_teacher(problem, loss):
    """Backward reads residuals: the teacher's states may go once forward is over."""
    p = problem(loss)
    leaves = [x.detach().requires_grad_() for x in p.trained]
    fixed = {x.untyped_storage().data_ptr() for x in p.fixed}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.untyped_storage().data_ptr()) or x, lambda x: x
    ):
        p.loss(*p.arguments(leaves), backend="triton", **p.options)
    assert saved
    assert not fixed & set(saved)


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
    import importlib

    for name in ("attention", "hidden", "indexer", "relations"):
        module = importlib.import_module(f"optima_fast.losses.{name}")
        failed, attempted = doctest.testmod(module)
        assert (failed, attempted > 1) == (0, True), name
