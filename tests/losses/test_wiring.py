"""What a call's arguments become on their way to a backend, and its gradients on their way back."""

from __future__ import annotations

import pytest
import torch

import optima_fast
from optima_fast.losses import backends, ops

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
BACKENDS = ["triton", "blockwise"]


@pytest.fixture
def problem(hidden_problem, attention_problem):
    """One layer of each loss, with masks, in tensors whose batch lies second in memory."""

    def make(loss, **options):
        p = (
            hidden_problem((2, 9), masked=True, **options)
            if loss == "hidden"
            else attention_problem(2, 9, masked="qk", target=loss, **options)
        )
        p.trained[0] = p.trained[0].transpose(0, 1).contiguous().transpose(0, 1)
        return p

    return make


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_layer_without_a_weight_beside_others(hidden_problem, backend):
    """Each layer has its own mask; a float64 teacher makes all losses float64."""
    layers = [hidden_problem((2, n), 4, 4, masked=n != 5, seed=n) for n in (3, 5, 7)]
    students, weights = ([p.trained[i] for p in layers] for i in (0, 1))
    teachers = [p.fixed[0] for p in layers]
    masks = [p.options.get("mask") for p in layers]
    weights[0] = None
    alone = [
        optima_fast.hidden_mse(*x, mask=m, backend=backend)
        for *x, m in zip(students, teachers, weights, masks, strict=True)
    ]
    together = optima_fast.hidden_mse(students, teachers, weights, mask=masks, backend=backend)
    assert torch.equal(together, torch.cat(alone))
    if backend != "triton":
        teachers[0] = teachers[0].double()
        loss = optima_fast.hidden_mse(students, teachers, weights, mask=masks, backend=backend)
        assert loss.dtype == torch.float64


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_scale_of_zero_is_a_scale(problem, backend):
    """It makes scores those of queries that are 0."""
    p = problem("scores")
    scaled, zero = (
        p.loss(q, *p.arguments(p.trained)[1:], backend=backend, student_scale=scale, **p.options)
        for q, scale in ((p.trained[0], 0.0), (torch.zeros_like(p.trained[0]), None))
    )
    torch.testing.assert_close(scaled, zero)


@pytest.mark.parametrize("given", [("student",), ("teacher",), ("student", "teacher")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_with_log_sums_that_are_given(problem, backend, given):
    """A natural log-sum-exp changes neither the loss nor its gradients, recomputed or not."""
    p = problem("probs")
    expected = p("reference", -2.0)
    hidden = ~p.options["key_mask"][:, None, None]
    for side, (q, k) in {"student": p.trained, "teacher": p.fixed}.items():
        if side in given:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            p.options[f"{side}_lse"] = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    for recompute in (False, True):
        p.options["recompute"] = recompute
        for x, y in zip(p(backend, -2.0), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_with_log_sums_that_are_given(problem, backend):
    """The operator returns no input, and what it keeps in its place has no elements."""
    p = problem("probs")
    masks = [p.options["query_mask"]], [p.options["key_mask"]]
    lse = torch.zeros(2, 2, 9, device=p.trained[0].device)
    torch.library.opcheck(
        ops.attention_loss,
        (
            *([x] for x in (*p.trained, *p.fixed)), *masks, [lse], [None], [0.5], [0.5], "probs",
            [False], [0], [True], [True], backend, False,
        ),
        test_utils=["test_schema", "test_faketensor"],
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["hidden", "scores", "probs"])
def test_gradients_lie_as_their_inputs_do(problem, loss, backend):
    p = problem(loss)
    for gradient, x in zip(p(backend)[1:], p.trained, strict=True):
        assert gradient.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["hidden", "scores", "probs"])
def test_gradients_are_computed_once_whether_or_not_they_are_computed_again(
    problem, monkeypatch, loss, backend
):
    """With ``recompute`` in backward alone, else in forward alone."""
    p, seen = problem(loss), []
    table = backends.HIDDEN if loss == "hidden" else backends.ATTENTION
    compute = table[backend].forward
    entry = table[backend]._replace(forward=lambda x: seen.append(any(x.needed)) or compute(x))
    monkeypatch.setitem(table, backend, entry)
    for recompute, expected in ((False, [True]), (True, [False, True])):
        seen.clear()
        p.options["recompute"] = recompute
        p(backend)
        assert seen == expected
