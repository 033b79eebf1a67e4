"""The reference backend against the definitions, element by element in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

import optima_fast


def naive_hidden_mse(student, teacher, weight, mask):
    """Lists in, float out."""
    total, count = 0.0, 0
    for x, y, keep in zip(student, teacher, mask, strict=True):
        if not keep:
            continue
        for j, target in enumerate(y):
            projected = sum(x[i] * weight[i][j] for i in range(len(x)))
            total += (projected - target) ** 2
            count += 1
    return total / count if count else 0.0


def naive_map(q, k, b, i, visible, target, scale):
    """Head-averaged scores or probabilities of query i for each visible key."""
    heads = len(q[b])
    row = dict.fromkeys(visible, 0.0)
    for h in range(heads):
        s = {
            j: scale * sum(x * y for x, y in zip(q[b][h][i], k[b][h][j], strict=True))
            for j in visible
        }
        if target == "probs":
            total = sum(math.exp(x) for x in s.values())
            s = {j: math.exp(x) / total for j, x in s.items()}
        for j in visible:
            row[j] += s[j] / heads
    return row


def naive_attention_mse(sq, sk, tq, tk, query_mask, key_mask, causal, target, scales):
    total, count = 0.0, 0
    for b in range(len(sq)):
        for i in range(len(sq[b][0])):
            if not query_mask[b][i]:
                continue
            visible = [j for j in range(len(sk[b][0])) if key_mask[b][j] and (j <= i or not causal)]
            student = naive_map(sq, sk, b, i, visible, target, scales[0])
            teacher = naive_map(tq, tk, b, i, visible, target, scales[1])
            total += sum((student[j] - teacher[j]) ** 2 for j in visible)
            count += len(visible)
    return total / count if count else 0.0


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("masked", [False, True])
def test_hidden_mse_is_its_definition(hidden_problem, masked, backend):
    p = hidden_problem((6,), 2, 3, torch.float64, masked)
    mask = p.options["mask"].tolist() if masked else [True] * 6
    expected = naive_hidden_mse(
        p.trained[0].tolist(), p.fixed[0].tolist(), p.trained[1].tolist(), mask
    )
    actual = p(backend)[0]
    assert expected > 0
    assert actual.tolist() == pytest.approx([expected], rel=1e-13)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("target", ["scores", "probs"])
@pytest.mark.parametrize(
    ("masked", "causal", "keys"),
    [("", False, 4), ("", True, 5), ("qk", True, 5), ("k", False, 7), ("q", False, 4)],
)
def test_attention_mse_is_its_definition(attention_problem, masked, causal, keys, target, backend):
    scales = (0.5, 1 / math.sqrt(3))
    p = attention_problem(
        2, 5, keys, (2, 3), (2, 3), torch.float64, masked,
        target=target, causal=causal, student_scale=scales[0],
    )  # fmt: skip
    query_mask = p.options.get("query_mask", torch.ones(2, 5)).tolist()
    key_mask = p.options.get("key_mask", torch.ones(2, keys)).tolist()
    tensors = [x.tolist() for x in p.arguments(p.trained)]
    expected = naive_attention_mse(*tensors, query_mask, key_mask, causal, target, scales)
    assert expected > 0
    assert p(backend)[0].tolist() == pytest.approx([expected], rel=1e-12)


def test_reference_is_differentiable_twice(attention_problem):
    p = attention_problem(1, 3, dtype=torch.float64, target="probs", backend="reference")
    inputs = [x.detach().requires_grad_() for x in p.trained]
    f = lambda q, k: optima_fast.attention_mse(q, k, *p.fixed, **p.options)  # noqa: E731
    assert torch.autograd.gradgradcheck(f, inputs)
