"""The losses beside OPTIMA's two: their published formulas, and every backend against them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from tolerance import assert_as_good_as_eager
from torch import Tensor
from torch.nn import functional as F

import optima_fast

B, N = 2, 21


class Case(NamedTuple):
    """A loss of some trained tensors, and what it is made of."""

    call: Callable[..., Tensor]  # trained tensors, the others, options
    trained: tuple[tuple[int, ...], ...]  # shapes
    fixed: tuple[tuple[int, ...], ...]
    masks: tuple[str, ...]  # the argument that masks the tokens of each; empty: none


def heads(h: int, d: int) -> tuple[int, ...]:
    return B, h, N, d


def attention(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, t_q: Tensor, t_k: Tensor, **more: object) -> Tensor:
        return function(
            [q, q * 0.5], [k, k], [t_q, t_q], [t_k, t_k],
            student_scale=0.5, teacher_scale=0.5, **{**options, **more},
        )  # fmt: skip

    return call


def hidden(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    return lambda s, w, t, **more: function([s, s * 2], [t, t], [w, w], **options, **more)


KL, MSE = optima_fast.attention_kl, optima_fast.attention_mse
Q, K, T = "query_mask", "key_mask", "mask"
MAPS = (Q, K, Q, K)
GROUPED = (heads(4, 8), heads(1, 8)), (heads(4, 6), heads(2, 6))
FEWER = (heads(2, 8), heads(2, 8)), (heads(4, 6), heads(4, 6))
INDEXER = (
    (heads(3, 8), (B, N, 8), (B, 3, N)), (heads(4, 6), heads(2, 6)), (Q, K, Q, Q, K),
)  # fmt: skip
STATES = ((B, N, 5), (5, 7)), ((B, N, 7),)
CASES = {
    "kl-each": Case(attention(KL), *GROUPED, MAPS),
    "kl-each causal": Case(attention(KL, causal=True, temperature=2.0), *GROUPED, MAPS),
    "kl-each window": Case(attention(KL, window=4), *GROUPED, MAPS),
    "kl-each fewer": Case(attention(KL), *FEWER, MAPS),
    "kl-mean": Case(attention(KL, heads="mean"), *GROUPED, MAPS),
    "kl-mean causal": Case(attention(KL, heads="mean", causal=True), *FEWER, MAPS),
    "kl groups": Case(attention(KL, heads=2), *GROUPED, MAPS),
    "probs-each": Case(attention(MSE, target="probs", heads="each"), *FEWER, MAPS),
    "probs-each grouped": Case(
        attention(MSE, target="probs", heads="each"), *GROUPED, MAPS
    ),
    "scores-each": Case(attention(MSE, heads="each"), *FEWER, MAPS),
    "relations": Case(
        lambda s, t, **more: optima_fast.relation_kl([s, s], [t, t], relation_heads=3, **more),
        ((B, N, 12),), (heads(4, 6),), (T, T),
    ),
    "gram": Case(
        lambda s, t, **more: optima_fast.gram_mse([s, s], [t, t], **more),
        ((B, N, 12),), ((B, N, 9),), (T, T),
    ),
    "similarity": Case(
        lambda s, t, **more: optima_fast.gram_mse(s, t, normalize=False, **more),
        ((B, N, 12),), ((B, N, 9),), (T, T),
    ),
    "indexer": Case(
        lambda q, k, w, *t, **more: optima_fast.indexer_kl(q, k, w, *t, **more),
        *INDEXER,
    ),
    "indexer of all": Case(
        lambda q, k, w, *t, **more: optima_fast.indexer_kl(
            [q, q], [k, k * 0.5], [w, w], *([x, x] for x in t), causal=False, **more
        ),
        *INDEXER,
    ),
    "cosine": Case(hidden(optima_fast.hidden_cosine), *STATES, (T, "", T)),
    "smooth-l1": Case(hidden(optima_fast.hidden_smooth_l1, beta=0.5), *STATES, (T, "", T)),
    "normalized": Case(hidden(optima_fast.hidden_mse, normalize=True), *STATES, (T, "", T)),
}  # fmt: skip


class Problem:
    """Random tensors of a case; what is masked holds nan."""

    def __init__(self, name: str, dtype: torch.dtype, masked: bool, device: str) -> None:
        self.case = case = CASES[name]
        g = torch.Generator().manual_seed(len(name))
        names = [name for name in dict.fromkeys(case.masks) if name and masked]
        self.masks = {name: (torch.rand(B, N, generator=g) > 0.3).to(device) for name in names}
        if K in self.masks:
            self.masks[K][0, :] = False  # queries that see no key
            if "causal" in name:  # keys that count, and no query that counts sees
                self.masks[Q][:, -3:] = False
        shapes = (*case.trained, *case.fixed)
        tensors = [torch.randn(*s, generator=g).to(device, dtype) * 1.5 for s in shapes]
        for x, side in zip(tensors, case.masks, strict=True):
            if side in self.masks:
                tokens = x.movedim(x.shape.index(N, 1), 1)
                tokens[~self.masks[side]] = torch.nan
                if side == K and "causal" in name:
                    tokens[:, -3:] = torch.nan
        self.trained, self.fixed = tensors[: len(case.trained)], tensors[len(case.trained) :]

    def __call__(self, backend: str, dtype: torch.dtype | None = None, **more: object) -> list:
        leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in self.trained]
        fixed = [x.to(dtype or x.dtype) for x in self.fixed]
        loss = self.case.call(*leaves, *fixed, backend=backend, **self.masks, **more)
        weights = torch.arange(1.0, len(loss) + 1, device=loss.device)
        return [loss.detach(), *torch.autograd.grad((loss * -weights).sum(), leaves)]


def compare(problem: Problem, backend: str, loss: Tensor | None = None) -> None:
    """``loss``: what plain PyTorch finds, if not the reference in the same dtype."""
    exact, plain = problem("reference", torch.float64), problem("reference")
    if loss is not None:
        plain[0] = loss
    results = zip(problem(backend), plain, exact, strict=True)
    for i, (actual, eager, true) in enumerate(results):
        assert true.isfinite().all()
        scale = max(1.0, true.abs().max().item()) if i == 0 else true.abs().max().item() + 0.01
        assert_as_good_as_eager(f"result {i}", actual, eager, true, scale=scale)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_blockwise(small_blocks, device, name, dtype, masked, poisoned_memory):
    small_blocks(2**20 if dtype == torch.float64 else 600)
    compare(Problem(name, dtype, masked, device), "blockwise")


@pytest.mark.parametrize("name", CASES)
def test_triton(device, name, poisoned_memory):
    p = Problem(name, torch.float16, name != "kl-each", device)
    compare(p, "triton", cosine_of_rounded(p) if name == "cosine" else None)


def cosine_of_rounded(p: Problem) -> Tensor:
    """The kernel keeps projected states in the students' dtype, as products under autocast do."""
    (student, weight), (teacher,), counted = p.trained, p.fixed, p.masks[T]
    projected = student[counted] @ weight
    found = 1 - F.cosine_similarity(projected.float(), teacher[counted].float(), dim=-1)
    return found.mean().expand(2)


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window": 40}, {"heads": "mean"}, {"heads": "mean", "window": 9}]
)
def test_triton_over_several_tiles(device, options):
    g = torch.Generator().manual_seed(0)
    q, k, t_q, t_k = (
        torch.randn(1, h, 69, d, generator=g).to(device)
        for h, d in ((2, 8), (1, 8), (2, 4), (2, 4))
    )
    results = []
    for backend, dtype in (("triton", None), ("reference", None), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k)] if dtype else [q, k]
        leaves = [x.detach().requires_grad_() for x in leaves]
        fixed = [x.to(dtype or x.dtype) for x in (t_q, t_k)]
        loss = KL(*leaves, *fixed, backend=backend, student_scale=0.5, **options)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum() * 3, leaves)])
    for actual, eager, true in zip(*results, strict=True):
        assert_as_good_as_eager("", actual, eager, true, scale=true.abs().max().item() + 0.01)


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_operators(device, name):
    p = Problem(name, torch.float64, True, device)
    p.fixed = [x.nan_to_num() for x in p.fixed]
    leaves = [x.nan_to_num().requires_grad_() for x in p.trained]

    def call(*xs: Tensor, backend: str = "blockwise", **more: object) -> Tensor:
        return p.case.call(*xs, *p.fixed, backend=backend, **p.masks, **more)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    full = torch.autograd.grad(call(*leaves).sum(), leaves)
    again = torch.autograd.grad(call(*leaves, recompute=True).sum(), leaves)
    for x, y in zip(full, again, strict=True):
        assert torch.equal(x, y)
    with torch.no_grad():
        assert torch.equal(call(*leaves), call(*leaves))
    if name in ("kl groups", "gram", "indexer", "cosine"):
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for x, y in zip(full, torch.autograd.grad(compiled(*leaves).sum(), leaves), strict=True):
            assert torch.allclose(x, y)


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
@pytest.mark.parametrize("target", ["kl", "kl-each"])
def test_opcheck_attention(device, target, backend):
    p = Problem("kl-each", torch.float32, False, device)
    q, k = ([x[:1, :2, :5].detach().requires_grad_()] for x in p.trained)
    t_q, t_k = ([x[:1, :2, :5]] for x in p.fixed)
    lse = [torch.zeros(1, 2, 5, device=device)]
    torch.library.opcheck(
        torch.ops.optima_fast.attention_loss.default,
        (
            q, k, t_q, t_k, [None], [None], lse, [None], [0.5], [0.5], target, [False], [0],
            [True], [True], backend, False,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
def test_opcheck_indexer(device, backend):
    p = Problem("indexer", torch.float32, True, device)
    masks = [[m] for m in p.masks.values()]
    torch.library.opcheck(
        torch.ops.optima_fast.indexer_kl.default,
        (
            *([x.nan_to_num().requires_grad_(i != 2)] for i, x in enumerate(p.trained)),
            *([x.nan_to_num()] for x in p.fixed), *masks, [None], [0.5], [True],
            [True], [True], [False], backend, False,
        ),
    )  # fmt: skip


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(q: Tensor, k: Tensor, temperature: float = 1.0) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5 / temperature).softmax(-1)


BACKENDS = ["reference", "blockwise"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_probability_that_is_lost_stays_finite(backend):
    """The student of several heads gives a key the teacher wants less than a float can hold."""
    q = torch.full((1, 2, 1, 1), 75.0, requires_grad=True)
    k = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).expand(1, 2, 2, 1)
    loss = optima_fast.attention_kl(q, k, -q.detach(), k, heads="mean", backend=backend)
    assert loss.item() == pytest.approx(-torch.log(torch.tensor(1e-30)).item(), rel=1e-4)
    assert torch.autograd.grad(loss.sum(), q)[0].abs().max() == 0
    each = optima_fast.attention_kl(q, k, -q.detach(), k, backend=backend)
    assert each.item() == pytest.approx(75.0, rel=1e-4)


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
@pytest.mark.parametrize("heads", ["mean", "each"])
def test_log_sums_that_are_given(device, heads, backend):
    """Where nothing counts they may hold anything."""
    p = Problem("kl-each", torch.float32, True, device)
    valid = p.masks[Q][:, :, None] & p.masks[K][:, None]
    q, k, t_q, t_k = (x.nan_to_num() for x in (*p.trained, *p.fixed))
    lses = []
    for x, y in ((q, k), (t_q, t_k)):
        scores = x @ y.repeat_interleave(x.shape[1] // y.shape[1], 1).mT / 2
        lse = scores.masked_fill(~valid[:, None], -torch.inf).logsumexp(-1)
        lses.append(torch.where(valid.any(2)[:, None], lse, torch.nan))
    results = []
    both = {"student_lse": lses[0], "teacher_lse": lses[1]}
    for given in ({}, both, {"teacher_lse": lses[1]}):
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        loss = KL(
            *leaves, t_q, t_k, heads=heads, backend=backend, student_scale=0.5, teacher_scale=0.5,
            **p.masks, **given,
        )  # fmt: skip
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    for x, *others in zip(*results, strict=True):
        for y in others:
            torch.testing.assert_close(x, y)


def test_no_token_counts_and_none_is_there(device):
    for name in ("kl-each fewer", "kl-mean", "gram", "indexer", "cosine", "smooth-l1"):
        p = Problem(name, torch.float32, True, device)
        p.masks = {m: torch.zeros_like(x) for m, x in p.masks.items()}
        for backend in ("reference", "blockwise", "triton"):
            for x in p(backend):
                assert x.abs().sum() == 0, (name, backend)


def test_nothing_of_a_map_s_size_is_kept(device):
    """Memory kept for the divergence of each head grows with N, not with its square."""
    q = torch.randn(1, 1, 100, 8, device=device, requires_grad=True)
    kept = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    for backend in ("blockwise", "triton"):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            optima_fast.attention_kl(q, q, q * 2, q, backend=backend)
        assert kept
        assert max(kept) <= q.numel()


QS, KS = torch.zeros(1, 4, 3, 2), torch.zeros(1, 2, 3, 2)
X = torch.zeros(1, 3, 6)
SAME = (QS, KS, QS, KS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: KL(*SAME, heads="all"),
            ValueError,
            "'mean', 'each' or a number of .*'all'",
        ),
        (lambda: KL(*SAME, heads=0), ValueError, "at least one group, got 0"),
        (lambda: KL(*SAME, heads=True), ValueError, "'mean', 'each' or a number .*True"),
        (
            lambda: KL(*SAME, heads=3),
            ValueError,
            "makes 3 groups, .* got 4 of the student",
        ),
        (
            lambda: KL(QS, KS, QS[:, :2], KS),
            ValueError,
            "got 4 of the student and 2 of the teacher",
        ),
        (
            lambda: KL(torch.zeros(1, 6, 3, 2), KS, QS[:, :3], KS[:, :1], heads=3),
            ValueError,
            "makes 3 groups, which must divide the heads of student_k .* got 2",
        ),
        (lambda: KL(*SAME, temperature=0), ValueError, "finite and above 0, got 0"),
        (lambda: KL(*SAME, temperature="1"), TypeError, "temperature must be a float"),
        (
            lambda: KL(*SAME, temperature=2.0, teacher_lse=QS[..., 0]),
            ValueError,
            "teacher_lse is that of scores at temperature 1, got temperature=2.0",
        ),
        (
            lambda: optima_fast.relation_kl(X, X, relation_heads=4),
            ValueError,
            "must divide the width of student, got 4 and 6",
        ),
        (lambda: optima_fast.relation_kl(X, X, relation_heads=2.0), TypeError, "number, got 2.0"),
        (lambda: optima_fast.relation_kl(X[0], X, relation_heads=2), ValueError, r"got \(3, 6\)"),
        (lambda: optima_fast.gram_mse(X, X[:, :2]), ValueError, "with the same tokens, got"),
        (
            lambda: optima_fast.indexer_kl(QS, KS, QS[..., 0], QS, KS),
            ValueError,
            r"must be \[B, H, Nq, d\], \[B, Nk, d\] and \[B, H, Nq\], got",
        ),
        (lambda: optima_fast.hidden_smooth_l1(X, X, beta=-1.0), ValueError, "above 0, got -1.0"),
        (
            lambda: optima_fast.indexer_kl(
                QS, X[..., :2].half(), QS[..., 0], QS, KS, backend="triton"
            ),
            ValueError,
            "cannot serve this call: .*indexers' queries and keys must have one dtype",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
