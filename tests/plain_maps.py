"""Attention maps in plain PyTorch, one head at a time, for tests of what is made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from optima_fast.taps.records import Attention


def seen(a: Attention) -> Tensor:
    """[B, Nq, Nk]: which pairs count."""
    pairs = torch.ones(a.q.shape[0], a.q.shape[2], a.k.shape[2], dtype=torch.bool)
    if a.causal:
        pairs = pairs.tril()
    if a.key_mask is not None:
        pairs = pairs & a.key_mask[:, None]
    if a.query_mask is not None:
        pairs = pairs & a.query_mask[:, :, None]
    return pairs


def probabilities(a: Attention) -> Tensor:
    """[B, H, Nq, Nk]; 0 where a pair does not count."""
    scores = a.q @ a.k.transpose(2, 3) / a.q.shape[3] ** 0.5
    scores = scores.masked_fill(~seen(a)[:, None], float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0)


def mse(s: Attention, t: Attention, *, mean: bool = False) -> Tensor:
    """Over pairs that count, and over heads, unless their mean is compared."""
    difference = [probabilities(x).mean(1) if mean else probabilities(x) for x in (s, t)]
    error = (difference[0] - difference[1]).square()
    return (error if mean else error.mean(1))[seen(s)].mean()


def kl(s: Attention, t: Attention, *, mean: bool = False) -> Tensor:
    """Of the teacher from the student: mean over queries that count, and heads."""
    p, q = (probabilities(x).mean(1, keepdim=True) if mean else probabilities(x) for x in (t, s))
    rows = torch.where(p > 0, p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log()), 0).sum(-1)
    return rows.mean(1)[seen(s).any(-1)].mean()
