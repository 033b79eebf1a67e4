"""Blockwise hidden_mse against the reference, in every dtype, around the edges of its blocks."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_as_good_as_eager

import optima_fast
from optima_fast.losses import blockwise
from optima_fast.losses.blockwise import blocks

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# one token, a whole block, one past it, several with a ragged tail; items that share a block
SHAPES = [(1,), (2, 16), (2, 17), (1, 53), (3, 2, 5), (9, 3)]


def compare(p, upstream=1.0, names=("loss", "d_student", "d_weight")):
    exact = p.double()("reference", upstream)
    results = zip(p("blockwise", upstream), p("reference", upstream), exact, strict=True)
    for name, compared in zip(names, results, strict=True):
        assert_as_good_as_eager(name, *compared)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(hidden_problem, small_blocks, shape, dtype, masked):
    small_blocks(16 * 7)
    compare(hidden_problem(shape, dtype=dtype, masked=masked), upstream=-3.0)


def test_default_blocks_match_too(hidden_problem):
    tokens = blocks.BLOCK_ELEMENTS // 64 + 5  # two blocks
    compare(hidden_problem((1, tokens), 64, 32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_student_teacher_and_weight_may_differ_in_dtype(hidden_problem, dtype):
    p = hidden_problem((2, 6))
    p.trained[0], p.fixed[0] = p.trained[0].to(dtype), p.fixed[0].bfloat16()
    loss, d_student, d_weight = p("blockwise")
    assert (loss.dtype, d_student.dtype, d_weight.dtype) == (torch.float32, dtype, torch.float32)
    compare(p)


def test_float16_gradients_of_a_large_mean_do_not_underflow(device):
    """A unit gradient of 2e-8 is 0 in float16; with a loss scale it must come back."""
    student = torch.full((1, 4096, 32), 1.0, dtype=torch.float16, device=device)
    student.requires_grad_()
    weight = torch.eye(32, dtype=torch.float16, device=device)
    loss = optima_fast.hidden_mse(student, 0.999 * student.detach(), weight)
    (loss * 2.0**16).sum().backward()
    expected = 2 * (1 - 0.999) * 2.0**16 / (4096 * 32)
    assert student.grad.float().mean().item() == pytest.approx(expected, rel=0.05)


def test_each_layer_has_its_own_shape_mask_and_upstream(hidden_problem):
    layers = [hidden_problem((2, 5), 3, 4, masked=True, seed=1), hidden_problem((7,), 6, 2, seed=2)]
    students, weights = ([p.trained[i].clone().requires_grad_() for p in layers] for i in (0, 1))
    upstream = torch.tensor([0.5, -2.0], device=students[0].device)
    masks = [layers[0].options["mask"], None]
    loss = optima_fast.hidden_mse(students, [p.fixed[0] for p in layers], weights, mask=masks)
    (loss * upstream).sum().backward()
    for i, p in enumerate(layers):
        value, d_student, d_weight = p("blockwise", upstream[i].item())
        assert torch.equal(loss[i : i + 1], value)
        assert torch.equal(students[i].grad, d_student)
        assert torch.equal(weights[i].grad, d_weight)


def test_weights_may_be_a_parameter_list(hidden_problem):
    p = hidden_problem((2, 5))
    weights = torch.nn.ParameterList([p.trained[1]])
    loss = optima_fast.hidden_mse([p.trained[0]], [p.fixed[0]], weights)
    assert torch.equal(loss, p("blockwise")[0])


def test_one_mask_serves_all_layers(hidden_problem):
    p = hidden_problem((2, 5), masked=True)
    args = [[x, x] for x in p.arguments(p.trained)]
    both = optima_fast.hidden_mse(*args, **p.options)
    assert torch.equal(both, p("blockwise")[0].expand(2))


@pytest.mark.parametrize("layout", ["permuted", "strided", "expanded", "offset"])
def test_any_strides(hidden_problem, layout):
    p = hidden_problem((3, 4))
    change = {
        "permuted": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda x: x[:1].expand_as(x),
        "offset": lambda x: torch.cat([x[:1], x])[1:],
    }[layout]
    p.trained[0], p.fixed[0] = change(p.trained[0]), change(p.fixed[0])
    compare(p)


def test_masked_tokens_may_hold_anything(hidden_problem, small_blocks, poisoned_memory):
    small_blocks(16 * 7)
    p = hidden_problem((2, 20), masked=True)
    clean = p("blockwise")
    out = ~p.options["mask"]
    p.trained[0][out], p.fixed[0][out] = float("nan"), float("inf")
    for backend in ("blockwise", "reference"):
        for x, y in zip(p(backend), clean, strict=True):
            torch.testing.assert_close(x, y)
        assert p(backend)[1][out].eq(0).all()


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
@pytest.mark.parametrize("tokens", [(0,), (2, 0), (0, 3), (2, 3)])
def test_nothing_counts(hidden_problem, tokens, backend, poisoned_memory):
    p = hidden_problem(tokens)
    p.options["mask"] = torch.zeros(tokens, dtype=torch.bool, device=p.trained[0].device)
    p.trained[0].fill_(float("nan"))
    for x in p(backend):
        assert x.eq(0).all()
    del p.options["mask"]
    if 0 in tokens:
        for x in p(backend):
            assert x.eq(0).all()


def test_gradcheck(hidden_problem, small_blocks):
    small_blocks(16 * 7)
    p = hidden_problem((2, 18), 2, 3, torch.float64, masked=True)
    inputs = [x.requires_grad_() for x in p.trained]
    f = lambda s, w: optima_fast.hidden_mse(s, p.fixed[0], w, **p.options)  # noqa: E731
    assert torch.autograd.gradcheck(f, inputs)


def test_teacher_gets_no_gradient(hidden_problem):
    p = hidden_problem((2, 3))
    student, weight = (x.requires_grad_() for x in p.trained)
    teacher = p.fixed[0].requires_grad_()
    for backend in ("blockwise", "reference"):
        optima_fast.hidden_mse(student, teacher, weight, backend=backend).sum().backward()
        assert teacher.grad is None
        assert not optima_fast.hidden_mse(
            student.detach(), teacher, weight.detach(), backend=backend
        ).requires_grad


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients_are_computed(hidden_problem, monkeypatch, trained):
    p = hidden_problem((2, 3))
    full, seen = p("blockwise"), []
    compute = blockwise.hidden_loss
    monkeypatch.setattr(
        blockwise, "hidden_loss", lambda *a, **k: seen.append(compute(*a, **k)) or seen[-1]
    )
    student, weight = (x.requires_grad_(t) for x, t in zip(p.trained, trained, strict=True))
    loss = optima_fast.hidden_mse(student, p.fixed[0], weight)
    with torch.no_grad():
        assert torch.equal(optima_fast.hidden_mse(student, p.fixed[0], weight), loss)
    assert [tuple(x is not None for x in g.of) for g in seen] == [trained, (False, False)]
    assert torch.equal(loss, full[0])
    if any(trained):
        loss.sum().backward()
    for x, wanted, expected in zip((student, weight), trained, full[1:], strict=True):
        assert torch.equal(x.grad, expected) if wanted else x.grad is None
