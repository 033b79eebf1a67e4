"""Which backend serves a call, what it gets and what it keeps."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_as_good_as_eager

import optima_fast
from optima_fast.losses import backends

LOSSES = ["hidden", "scores", "probs"]
DTYPES = [torch.float16, torch.float32]
# pairs that do not count get anything in a kernel, and nothing of it is used
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")


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


def test_a_teacher_that_is_not_multiplied_may_be_of_float32(monkeypatch):
    serves = backends.HIDDEN["triton"]._replace(refusals=lambda inputs: [])
    monkeypatch.setitem(backends.HIDDEN, "triton", serves)
    inputs = hidden_inputs(OnCuda(), OnCuda(torch.float32), OnCuda())
    assert backends.resolve(backends.HIDDEN, "auto", inputs) is serves


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
