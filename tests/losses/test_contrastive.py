"""hidden_contrastive: its formula one element at a time, gradients, masks, errors."""

from __future__ import annotations

import math

import pytest
import torch

from optima_fast import hidden_contrastive


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine(a: list[float], b: list[float]) -> float:
    sizes = [math.sqrt(sum(x * x for x in v)) for v in (a, b)]
    return sum(x * y for x, y in zip(a, b, strict=True)) / (sizes[0] * sizes[1])


def by_loops(s, t, w, n, temperature, mask, counts) -> float:
    total, tokens = 0.0, 0
    for b in range(s.shape[0]):
        for i in range(s.shape[1]):
            if not mask[b, i]:
                continue
            h = [float(sum(s[b, i, j] * w[j, k] for j in range(len(w)))) for k in range(w.shape[1])]
            own = math.exp(cosine(h, t[b, i].tolist()) / temperature)
            rest = [
                math.exp(cosine(h, n[k].tolist()) / temperature) for k in range(len(n)) if counts[k]
            ]
            total -= math.log(own / (own + sum(rest)))
            tokens += 1
    return total / tokens


def problem():
    s, t, w, n = draw(2, 3, 4), draw(2, 3, 5, seed=1), draw(4, 5, seed=2), draw(6, 5, seed=3)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    counts = torch.tensor([True, False, True, True, False, True])
    return s, t, w, n, mask, counts


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_it_is_its_formula(temperature):
    s, t, w, n, mask, counts = problem()
    more = draw(2, 3, 5, seed=4)
    found = hidden_contrastive(
        [s, more], [t, t], [w, None], [n, n[:2]], temperature=temperature,
        mask=[mask, None], negatives_mask=[counts, None],
    )  # fmt: skip
    every = torch.ones(2, 3, dtype=torch.bool)
    expected = [
        by_loops(s, t, w, n, temperature, mask, counts),
        by_loops(more, t, torch.eye(5), n[:2], temperature, every, [True, True]),
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_gradients_go_to_the_student_alone():
    s, t, w, n, mask, counts = problem()
    for x in (s, t, w, n):
        x.requires_grad_()

    def loss(s, w):
        return hidden_contrastive(s, t, w, n, mask=mask, negatives_mask=counts, temperature=0.5)

    assert torch.autograd.gradcheck(loss, (s, w))
    loss(s, w).backward()
    assert t.grad is None
    assert n.grad is None
    assert not s.grad[~mask].any()


def test_what_does_not_count_may_hold_anything():
    s, t, w, n, mask, counts = problem()
    expected = hidden_contrastive(s, t, w, n, mask=mask, negatives_mask=counts)
    for x, keep in ((s, mask), (t, mask), (n, counts)):
        x[~keep] = float("nan")
    s.requires_grad_()
    found = hidden_contrastive(s, t, w, n, mask=mask, negatives_mask=counts)
    assert torch.equal(found, expected)
    found.backward()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("none", ["tokens", "negatives", "places"])
def test_of_nothing_it_is_0_with_gradient_0(none):
    s, t, w, n, mask, counts = problem()
    s.requires_grad_()
    mask = mask & (none != "tokens")
    counts = counts & (none != "negatives")
    if none == "places":
        n, counts = n[:0], counts[:0]
    loss = hidden_contrastive(s, t, w, n, mask=mask, negatives_mask=counts)
    assert loss.tolist() == [0.0]
    loss.backward()
    assert not s.grad.any()


def test_dtypes():
    s, t, w, n = (x.to(torch.bfloat16) for x in problem()[:4])
    found = hidden_contrastive(s, t, w, n)
    assert found.dtype == torch.float32
    wide = hidden_contrastive(*(x.double() for x in (s, t, w, n)))
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=0)
    assert wide.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        rounded = hidden_contrastive(s.float(), t, w, n)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, found, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negatives": draw(6, 4)}, r"negatives must be \[K, d_t\] with d_t = 5, got \(6, 4\)"),
        ({"negatives": draw(1, 6, 5)}, r"negatives must be \[K, d_t\]"),
        ({"negatives": [draw(6, 5)] * 2}, "every list must have one tensor a layer"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ({"weight": None}, "states of different widths"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask must have shape"),
        ({"negatives_mask": torch.ones(5, dtype=torch.bool)}, "negatives_mask must have shape"),
    ],
)
def test_errors(change, message):
    s, t, w, n, _, _ = problem()
    given = {"student": s, "teacher": t, "weight": w, "negatives": n, **change}
    with pytest.raises(ValueError, match=message):
        hidden_contrastive(**given)


def test_errors_of_type():
    s, t, w, n, mask, _ = problem()
    with pytest.raises(TypeError, match="mask must be bool"):
        hidden_contrastive(s, t, w, n, mask=mask.int())
    with pytest.raises(TypeError, match="negatives must be float16"):
        hidden_contrastive(s, t, w, n.long())
