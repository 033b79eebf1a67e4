"""The losses beside OPTIMA's two against the formulas that their papers publish."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import optima_fast
from optima_fast.losses import relations


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(q: Tensor, k: Tensor, temperature: float = 1.0) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5 / temperature).softmax(-1)


BACKENDS = ["reference", "blockwise"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_divergence_of_each_head(backend):
    q, k, t_q, t_k = (draw(2, 3, 7, d, seed=i) for i, d in enumerate((4, 4, 8, 8)))
    for tau in (1.0, 3.0):
        s, t = softmax(q, k, tau), softmax(t_q, t_k, tau)
        expected = F.kl_div(s.log(), t, reduction="sum") * tau**2 / (3 * 2 * 7)
        actual = optima_fast.attention_kl(q, k, t_q, t_k, temperature=tau, backend=backend)
        torch.testing.assert_close(actual, expected[None])
    mean = F.kl_div(s.mean(1).log(), t.mean(1), reduction="sum") / (2 * 7) * tau**2
    actual = optima_fast.attention_kl(
        q, k, t_q, t_k, heads="mean", temperature=tau, backend=backend
    )
    torch.testing.assert_close(actual, mean[None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_head_against_several_of_the_teacher(backend):
    q, k = draw(2, 2, 7, 4), draw(2, 2, 7, 4, seed=1)
    t_q, t_k = draw(2, 6, 7, 4, seed=2), draw(2, 6, 7, 4, seed=3)
    s, t = softmax(q, k), softmax(t_q, t_k).unflatten(1, (2, 3)).mean(2)
    expected = F.kl_div(s.log(), t, reduction="sum") / (2 * 2 * 7)
    torch.testing.assert_close(
        optima_fast.attention_kl(q, k, t_q, t_k, backend=backend), expected[None]
    )
    squares = optima_fast.attention_mse(
        q, k, t_q, t_k, target="probs", heads="each", backend=backend
    )
    torch.testing.assert_close(squares, F.mse_loss(s, t)[None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_relations_of_minilm(backend):
    student, teacher = draw(2, 7, 12), draw(2, 4, 7, 6, seed=1)
    joined = teacher.transpose(1, 2).reshape(2, 7, 24)
    s, t = (softmax(y, y) for y in (x.view(2, 7, 3, -1).transpose(1, 2) for x in (student, joined)))
    expected = F.kl_div(s.log(), t, reduction="sum") / (3 * 2 * 7)
    for given in (teacher, joined):
        actual = optima_fast.relation_kl(student, given, relation_heads=3, backend=backend)
        torch.testing.assert_close(actual, expected[None])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("whole", [0, 512])
def test_gram_matrices(monkeypatch, backend, masked, normalize, whole):
    monkeypatch.setattr(relations, "WHOLE", whole)
    student, teacher = draw(2, 7, 5), draw(2, 7, 9, seed=1)
    student[0, 2] = 0  # of no direction
    student.requires_grad_()
    mask = draw(2, 7, seed=2) > -0.5 if masked else None
    s, t = (F.normalize(x, dim=-1) if normalize else x for x in (student, teacher))
    squares = (s @ s.mT - t @ t.mT).square()
    expected = squares.mean() if mask is None else squares[mask[:, None] & mask[:, :, None]].mean()
    actual = optima_fast.gram_mse(student, teacher, mask=mask, normalize=normalize, backend=backend)
    torch.testing.assert_close(actual, expected[None])
    gradients = (torch.autograd.grad(x.sum(), student)[0] for x in (actual, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_indexer_loss_of_megatron(backend, causal):
    q, k, w = draw(2, 3, 9, 4), draw(2, 9, 4, seed=1), draw(2, 3, 9, seed=2)
    t_q, t_k = draw(2, 4, 9, 6, seed=3), draw(2, 4, 9, 6, seed=4)
    later = torch.full((9, 9), -torch.inf).triu(1) if causal else 0
    index = (torch.relu(q @ k[:, None].mT) * w[..., None]).sum(1) + later
    attention = (t_q @ t_k.mT / 6**0.5 + later).softmax(-1).sum(1)
    attention /= attention.sum(-1, keepdim=True)
    logs = torch.log(attention + 1e-10) - torch.log(index.softmax(-1) + 1e-10)
    expected = (attention * logs).sum(-1).mean()
    actual = optima_fast.indexer_kl(q, k, w, t_q, t_k, causal=causal, backend=backend)
    torch.testing.assert_close(actual, expected[None], atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("projected", [False, True])
def test_hidden_states(backend, projected):
    student, teacher = draw(2, 7, 5), draw(2, 7, 5, seed=1)
    weight = draw(5, 5, seed=2) if projected else None
    mask = draw(2, 7, seed=3) > -0.5
    x, y = (student if weight is None else student @ weight)[mask], teacher[mask]
    options = {"mask": mask, "backend": backend}
    for function, more, expected in (
        (optima_fast.hidden_cosine, {}, 1 - F.cosine_similarity(x, y, dim=-1).mean()),
        (optima_fast.hidden_smooth_l1, {"beta": 0.3}, F.smooth_l1_loss(x, y, beta=0.3)),
        (optima_fast.hidden_mse, {"normalize": True}, F.mse_loss(x, y) / y.square().mean()),
    ):
        actual = function(student, teacher, weight, **options, **more)
        torch.testing.assert_close(actual, expected[None])
