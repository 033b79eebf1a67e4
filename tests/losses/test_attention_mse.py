"""Blockwise attention_mse against the reference: dtypes, block edges, masks, layouts."""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerance import assert_as_good_as_eager

import optima_fast
from optima_fast.losses import blockwise, reference
from optima_fast.losses.blockwise import attention, blocks

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TARGETS = ["scores", "probs"]

# (batch, queries, keys): one query, a whole block of rows, one past it, several and a ragged tail,
# batch items that share a block
SHAPES = [(1, 1, 1), (2, 16, 16), (2, 17, 5), (1, 37, 41), (5, 3, 4)]


def sizes(p, upstream):
    """The largest terms that cancel: of the loss, and of the gradients of q and k."""
    (q, k), (teacher_q, teacher_k) = p.double().trained, p.double().fixed
    masks = p.options.get("query_mask"), p.options.get("key_mask")
    window = p.options.get("window", 0)
    valid = reference.valid_pairs(*masks, p.options.get("causal", False), q, k.shape[2], window)
    scale = p.options.get("student_scale", q.shape[-1] ** -0.5)
    target = p.options.get("target", "scores")
    maps = (
        reference.attention_maps(q, k, valid, target=target, scale=scale)[:, 0],
        reference.attention_maps(
            teacher_q, teacher_k, valid, target=target, scale=teacher_q.shape[-1] ** -0.5
        )[:, 0],
    )
    largest = max(x.where(valid, 0).abs().max().item() for x in maps)
    unit = 2 * abs(scale * upstream) * largest / max(1, valid.sum().item())
    finite = (x[x.isfinite()].abs().max().item() for x in (k, q))
    return [largest**2, *(unit * x for x in finite)]


def compare(p, upstream=1.0):
    exact = p.double()("reference", upstream)
    results = zip(
        ("loss", "d_q", "d_k"), p("blockwise", upstream), p("reference", upstream), exact,
        sizes(p, upstream), strict=True,
    )  # fmt: skip
    for name, actual, eager, true, size in results:
        assert_as_good_as_eager(name, actual, eager, true, scale=max(size, true.abs().max().item()))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(attention_problem, small_blocks, shape, dtype, target, poisoned_memory):
    small_blocks(160)
    compare(attention_problem(*shape, dtype=dtype, target=target), upstream=-3.0)


OPTIONS = [
    (causal, masked, keys)
    for causal, masked, keys in itertools.product([False, True], ["", "q", "k", "qk"], [35, 21])
    if keys == 35 or not causal
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("causal", "masked", "keys"), OPTIONS)
@pytest.mark.parametrize("elements", [160, 60000, 2**20])
def test_masks_and_causality(
    attention_problem, small_blocks, causal, masked, keys, elements, target, poisoned_memory
):
    """Rows of an item, some items, or all of them in a block."""
    small_blocks(elements)
    compare(attention_problem(4, 35, keys, masked=masked, causal=causal, target=target), 0.5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("heads", "widths"), [((1, 1), (1, 1)), ((3, 1), (2, 8)), ((1, 4), (8, 2)), ((4, 4), (3, 3))]
)
def test_heads_and_sizes(attention_problem, heads, widths, target):
    compare(attention_problem(heads=heads, widths=widths, target=target))


SHARES = [((4, 6), (2, 3)), ((6, 2), (6, 1)), ((3, 4), (1, 4))]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("heads", "share"), SHARES)
@pytest.mark.parametrize(("causal", "masked"), [(False, ""), (True, "qk")])
@pytest.mark.parametrize("elements", [160, 2**20])
def test_grouped_queries(
    attention_problem, small_blocks, heads, share, causal, masked, elements, target, poisoned_memory
):
    """Keys of fewer heads are those keys repeated, and their gradients the sum."""
    small_blocks(elements)
    p = attention_problem(3, 19, heads=heads, share=share, causal=causal, masked=masked,
                          target=target)  # fmt: skip
    compare(p, -2.0)
    repeated = [
        x.repeat_interleave(n, 1) for x, n in zip((p.trained[1], p.fixed[1]), share, strict=True)
    ]
    full = type(p)(p.loss, [p.trained[0], repeated[0]], [p.fixed[0], repeated[1]], **p.options)
    loss, d_q, d_k = full.double()("reference")
    d_k = d_k.unflatten(1, (-1, share[0])).sum(2)
    for x, y in zip(p.double()("reference"), (loss, d_q, d_k), strict=True):
        torch.testing.assert_close(x, y)


def test_grouped_queries_with_normalisers(attention_problem):
    p = attention_problem(3, 19, heads=(4, 6), share=(2, 3), target="probs")
    valid = torch.ones(3, 19, 19, dtype=torch.bool, device=p.trained[0].device)
    expected = p.double()("reference")
    for side, (q, k), n in zip(("student", "teacher"), (p.trained, p.fixed), (2, 3), strict=True):
        p.options[f"{side}_lse"] = normaliser(q, k.repeat_interleave(n, 1), valid)
    for x, y in zip(p.double()("blockwise"), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_grouped_queries_of_heads_that_do_not_divide(attention_problem):
    p = attention_problem(heads=(6, 3))
    keys = p.trained[1][:, :4]
    with pytest.raises(ValueError, match="multiple of student_k's.*got 6 and 4"):
        p.loss(p.trained[0], keys, *p.fixed)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("masked", ["", "qk"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("elements", [160, 2**20])
def test_windows(
    attention_problem, small_blocks, elements, causal, masked, target, poisoned_memory
):
    """One that reaches over several blocks, one of the query alone, one of all keys."""
    small_blocks(elements)
    for window in (1, 4, 17, 50):
        p = attention_problem(3, 37, causal=causal, window=window, masked=masked, target=target)
        compare(p, -2.0)


def test_a_window_is_the_pairs_so_near(attention_problem):
    """By hand: each query sees itself and the one before, or its neighbours too."""
    for causal, seen in ((True, lambda i, j: 0 <= i - j < 2), (False, lambda i, j: abs(i - j) < 2)):
        p = attention_problem(1, 5, heads=(1, 1), widths=(3, 3), dtype=torch.float64)
        scores = [(q[0, 0] @ k[0, 0].T * 3**-0.5).tolist() for q, k in (p.trained, p.fixed)]
        pairs = [(i, j) for i in range(5) for j in range(5) if seen(i, j)]
        expected = sum((scores[0][i][j] - scores[1][i][j]) ** 2 for i, j in pairs) / len(pairs)
        for backend in ("reference", "blockwise"):
            p.options.update(causal=causal, window=2)
            assert p(backend)[0].item() == pytest.approx(expected)


def test_a_key_that_no_query_of_its_window_counts_for_may_hold_nan(attention_problem):
    p = attention_problem(1, 12, window=3, target="probs", masked="q")
    p.options["query_mask"][:] = True
    p.options["query_mask"][:, 6:] = False  # the last query that counts sees keys up to 7
    p.trained[1][:, :, 8:] = float("nan")
    assert all(x.isfinite().all() for x in p("blockwise"))
    compare(p)


@pytest.mark.parametrize("target", TARGETS)
def test_default_blocks_match_too(attention_problem, target):
    """Several blocks at the size the library uses."""
    p = attention_problem(1, 700, heads=(3, 4), widths=(8, 8), target=target, causal=True)
    assert blocks.block_shape(1, 700, 4 * 700)[1] < 700
    compare(p)


@pytest.mark.parametrize("target", TARGETS)
def test_scales(attention_problem, target):
    p = attention_problem(target=target)
    default = p("blockwise")
    p.options.update(student_scale=0.5, teacher_scale=6**-0.5)
    for x, y in zip(p("blockwise"), default, strict=True):
        torch.testing.assert_close(x, y)
    p.options.update(student_scale=1.25, teacher_scale=[0.1])
    assert not torch.allclose(p("blockwise")[0], default[0])
    compare(p)


def normaliser(q, k, valid):
    scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~valid[:, None], -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("which", [("student",), ("teacher",), ("student", "teacher")])
@pytest.mark.parametrize(("causal", "masked"), [(False, ""), (True, "qk"), (False, "k")])
def test_given_normalisers(attention_problem, small_blocks, causal, masked, which):
    """Same value and full gradients; rows without a key have -inf there, as kernels return it."""
    small_blocks(160)
    p = attention_problem(3, 20, masked=masked, causal=causal, target="probs")
    valid = torch.ones(3, 20, 20, dtype=torch.bool, device=p.trained[0].device)
    if causal:
        valid = valid.tril()
    if "k" in masked:
        p.options["key_mask"][0] = False
        valid = valid & p.options["key_mask"][:, None]
    for side, (q, k) in {"student": p.trained, "teacher": p.fixed}.items():
        if side in which:
            p.options[f"{side}_lse"] = normaliser(q, k, valid).float()
    plain = type(p)(
        p.loss, p.trained, p.fixed, **{k: v for k, v in p.options.items() if "lse" not in k}
    )
    exact = plain.double()("reference")
    # it is as large as the scores, and a probability is the exponential of their difference
    most = max(v[v.isfinite()].abs().max().item() for k, v in p.options.items() if "lse" in k)
    results = zip(
        ("loss", "d_q", "d_k"),
        p("blockwise"),
        plain("reference"),
        exact,
        sizes(p, 1.0),
        strict=True,
    )
    for name, actual, eager, true, size in results:
        assert_as_good_as_eager(name, actual, eager, true, scale=most * size)


def test_a_given_normaliser_is_used(attention_problem):
    p = attention_problem(target="probs")
    own = p("blockwise")[0]
    lse = torch.zeros(2, 2, 9, device=own.device)
    p.options["student_lse"] = lse + 100  # every probability underflows to 0
    teacher_only = torch.zeros_like(own)
    p.options["teacher_lse"] = torch.full((2, 3, 9), 100.0, device=own.device)
    assert torch.equal(p("blockwise")[0], teacher_only)


@pytest.mark.parametrize("target", TARGETS)
def test_large_logits(attention_problem, target):
    """Scores of several hundred: exp would overflow without the row's maximum."""
    p = attention_problem(target=target, student_scale=60.0, teacher_scale=60.0)
    assert all(x.isfinite().all() for x in p("blockwise"))
    compare(p)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "strided", "expanded", "reversed"])
def test_any_strides(attention_problem, small_blocks, layout, target):
    small_blocks(160)
    p = attention_problem(3, 18, target=target)
    change = {
        "contiguous": lambda x: x.contiguous(),
        "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda x: x[:1].expand_as(x),
        "reversed": lambda x: x.flip(1),
    }[layout]
    p.trained, p.fixed = ([change(x) for x in xs] for xs in (p.trained, p.fixed))
    compare(p)


@pytest.mark.parametrize("target", TARGETS)
def test_the_models_layout_is_read_in_place_and_kept(target):
    """[B, N, H, d] tensors are seen as heads side by side without a copy, and so are gradients."""
    q = torch.randn(2, 6, 3, 4).transpose(1, 2)
    assert attention._heads_last(q, None, 0, 2, q.dtype).data_ptr() == q.data_ptr()
    assert attention.heads_first(q, None, 0, 1, q.dtype, 1).data_ptr() == q.data_ptr()
    q.requires_grad_()
    optima_fast.attention_mse(q, q.detach(), q, q, target=target, student_scale=2.0).backward()
    assert q.grad.stride() == q.stride()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("causal", "masked"), [(False, "qk"), (True, "qk"), (True, "q")])
def test_tokens_in_no_valid_pair_may_hold_anything(
    attention_problem, small_blocks, causal, masked, target, poisoned_memory
):
    small_blocks(160)
    p = attention_problem(3, 20, masked=masked, causal=causal, target=target)
    query_mask = p.options["query_mask"]
    query_mask[:, 15:] = False  # causal: the last keys are seen by masked queries only
    key_mask = p.options.get("key_mask", torch.ones_like(query_mask))
    key_mask[:, 16:] = False
    if "key_mask" not in p.options:
        key_mask[:, :16] = True
    if target == "probs":
        lse = torch.zeros(3, 3, 20, device=query_mask.device)
        p.options["teacher_lse"] = lse
    clean = p("blockwise")
    for q, k in (p.trained, p.fixed):
        q.transpose(1, 2)[~query_mask] = float("nan")
        k.transpose(1, 2)[~key_mask] = float("inf")
    if target == "probs":
        lse.transpose(1, 2)[~query_mask] = float("nan")
    for x, y in zip(p("blockwise"), clean, strict=True):
        assert torch.equal(x, y)
    _, d_q, d_k = clean
    assert d_q.transpose(1, 2)[~query_mask].eq(0).all()
    assert d_k.transpose(1, 2)[~key_mask].eq(0).all()
    p.options.pop("teacher_lse", None)
    assert all(x.isfinite().all() for x in p("reference"))
    compare(p)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("backend", ["blockwise", "reference"])
@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "query_mask", "key_mask"])
def test_nothing_counts(attention_problem, target, backend, empty, poisoned_memory):
    sizes = {"batch": (0, 3, 3), "queries": (2, 0, 3), "keys": (2, 3, 0)}.get(empty, (2, 3, 3))
    p = attention_problem(*sizes, target=target)
    if "mask" in empty:
        p.options[empty] = torch.zeros(2, 3, dtype=torch.bool, device=p.trained[0].device)
        for x in (*p.trained, *p.fixed):
            x.fill_(float("nan"))
    for x in p(backend):
        assert x.eq(0).all()


@pytest.mark.parametrize("target", TARGETS)
def test_a_query_without_a_key_contributes_nothing(attention_problem, target):
    p = attention_problem(2, 5, target=target)
    keep = torch.tensor([[False] * 5, [True] * 5], device=p.trained[0].device)
    p.options["key_mask"] = keep
    second = attention_problem(2, 5, target=target)
    second.trained, second.fixed = ([x[1:] for x in xs] for xs in (p.trained, p.fixed))
    for x, y in zip(p("blockwise"), second("blockwise"), strict=True):
        torch.testing.assert_close(x[-1:], y)
    assert p("blockwise")[1][0].eq(0).all()


def test_each_layer_has_its_own_shape_mask_scale_and_upstream(attention_problem):
    first = attention_problem(2, 6, masked="qk", target="probs", student_scale=0.3)
    second = attention_problem(3, 4, 8, heads=(1, 2), seed=1, target="probs")
    layers = [first, second]
    q, k = ([p.trained[i].detach().requires_grad_() for p in layers] for i in (0, 1))
    upstream = torch.tensor([0.5, -2.0], device=q[0].device)
    loss = optima_fast.attention_mse(
        q, k, *([p.fixed[i] for p in layers] for i in (0, 1)), target="probs",
        query_mask=[first.options["query_mask"], None], key_mask=[first.options["key_mask"], None],
        student_scale=[0.3, None],
    )  # fmt: skip
    (loss * upstream).sum().backward()
    for i, p in enumerate(layers):
        value, d_q, d_k = p("blockwise", upstream[i].item())
        assert torch.equal(loss[i : i + 1], value)
        assert torch.equal(q[i].grad, d_q)
        assert torch.equal(k[i].grad, d_k)


@pytest.mark.parametrize("target", TARGETS)
def test_student_and_teacher_may_differ_in_dtype(attention_problem, target):
    p = attention_problem(target=target)
    p.fixed = [x.bfloat16() for x in p.fixed]
    p.trained[1] = p.trained[1].half()
    loss, d_q, d_k = p("blockwise")
    assert (loss.dtype, d_q.dtype, d_k.dtype) == (torch.float32, torch.float32, torch.float16)
    compare(p)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(attention_problem, small_blocks, target, causal):
    small_blocks(40)
    p = attention_problem(
        1, 18, widths=(2, 2), heads=(2, 1), dtype=torch.float64, masked="qk",
        target=target, causal=causal,
    )  # fmt: skip
    inputs = [x.requires_grad_() for x in p.trained]
    f = lambda q, k: optima_fast.attention_mse(q, k, *p.fixed, **p.options)  # noqa: E731
    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("target", TARGETS)
def test_teacher_gets_no_gradient(attention_problem, target):
    p = attention_problem(target=target)
    q, k = (x.detach().requires_grad_() for x in p.trained)
    teacher = [x.detach().requires_grad_() for x in p.fixed]
    for backend in ("blockwise", "reference"):
        options = {"backend": backend, "target": target}
        optima_fast.attention_mse(q, k, *teacher, **options).sum().backward()
        assert [x.grad for x in teacher] == [None, None]
        loss = optima_fast.attention_mse(*p.trained, *teacher, **options)
        assert not loss.requires_grad


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients_are_computed(attention_problem, monkeypatch, target, trained):
    p = attention_problem(target=target)
    full, seen = p("blockwise"), []
    compute = blockwise.attention_loss
    monkeypatch.setattr(
        blockwise, "attention_loss", lambda *a, **k: seen.append(compute(*a, **k)) or seen[-1]
    )
    q, k = (x.detach().requires_grad_(t) for x, t in zip(p.trained, trained, strict=True))
    loss = optima_fast.attention_mse(q, k, *p.fixed, target=target)
    with torch.no_grad():
        assert torch.equal(optima_fast.attention_mse(q, k, *p.fixed, target=target), loss)
    assert [tuple(x is not None for x in g.of) for g in seen] == [trained, (False, False)]
    assert torch.equal(loss, full[0])
    if any(trained):
        loss.sum().backward()
    for x, wanted, expected in zip((q, k), trained, full[1:], strict=True):
        assert torch.equal(x.grad, expected) if wanted else x.grad is None
