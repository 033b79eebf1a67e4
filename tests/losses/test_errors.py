"""Every mistake is told before any work, with what was given."""

from __future__ import annotations

import re

import pytest
import torch

import optima_fast
from optima_fast.losses import backends, blockwise, reference

x = torch.zeros


@pytest.fixture(autouse=True)
def _no_work(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("computed before checking")

    for module in (blockwise, reference):
        monkeypatch.setattr(module, "hidden_loss", fail)
        monkeypatch.setattr(module, "attention_loss", fail)


S, T, W = x(2, 5, 3), x(2, 5, 4), x(3, 4)
HIDDEN = [
    (([], [], []), {}, ValueError, "student must have at least one layer, got an empty list"),
    (([S], [T, T], [W]), {}, ValueError, "lengths student 1, teacher 2, weight 1"),
    (([S, S], [T, T], W), {}, ValueError, "lengths student 2, teacher 2, weight 1"),
    (("S", T, W), {}, TypeError, "student must be a tensor or a list of tensors, got str"),
    ((None, T, W), {}, TypeError, "student must be a tensor or a list of tensors, got NoneType"),
    ((S, [T.numpy()], W), {}, TypeError, "teacher must be a tensor or .*, got ndarray"),
    ((S.long(), T, W), {}, TypeError, "student must be float16, .*, got torch.int64"),
    ((S, T, W.to(torch.complex64)), {}, TypeError, "weight must be .*, got torch.complex64"),
    ((S[0, 0], T[0, 0], W), {}, ValueError, r"\[..., N, d_s\] .* got \(3,\) and \(4,\)"),
    ((S, T[:, :4], W), {}, ValueError, r"same tokens, got \(2, 5, 3\) and \(2, 4, 4\)"),
    ((S, T[0], W), {}, ValueError, r"same tokens, got \(2, 5, 3\) and \(5, 4\)"),
    ((S, T, W.t()), {}, ValueError, r"weight must be \[d_s, d_t\] = \(3, 4\), got \(4, 3\)"),
    ((S, T, x(1, 3, 4)), {}, ValueError, r"\(3, 4\), got \(1, 3, 4\)"),
    ((x(2, 5, 0), T, x(0, 4)), {}, ValueError, r"must be at least 1, got \(0, 4\)"),
    ((S, T.to("meta"), W), {}, ValueError, "one device, got cpu and teacher on meta"),
    ((S, T, W), {"backend": "cuda"}, ValueError, "backend must be one of .*, got 'cuda'"),
    ((S, T, W), {"mask": x(2, 5)}, TypeError, r"mask must be bool, .*float32; use mask.bool\(\)"),
    ((S, T, W), {"mask": 1}, TypeError, "mask must be a bool tensor, got int"),
    ((S, T, W), {"mask": x(2, 4).bool()}, ValueError, r"shape \(2, 5\), got \(2, 4\)"),
    ((S, T, W), {"mask": x(2, 5, 1).bool()}, ValueError, r"shape \(2, 5\), got \(2, 5, 1\)"),
    (([S] * 2, [T] * 2, [W] * 2), {"mask": [None]}, ValueError, "mask .* a list of 2, got 1"),
    (
        ([S, S[:1]], [T, T[:1]], [W, W]), {"mask": x(2, 5).bool()},
        ValueError, r"shape \(1, 5\), got \(2, 5\)",
    ),
    (
        (S, T, W), {"mask": x(2, 5, device="meta").bool()},
        ValueError, "one device, got cpu and mask on meta",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("args", "options", "error", "message"), HIDDEN)
def test_hidden_mse(args, options, error, message):
    with pytest.raises(error, match=message):
        optima_fast.hidden_mse(*args, **options)


Q, K, P, R = x(2, 3, 5, 4), x(2, 3, 6, 4), x(2, 7, 5, 8), x(2, 7, 6, 8)
GOOD = (Q, K, P, R)
ATTENTION = [
    (([], [], [], []), {}, ValueError, "student_q must have at least one layer"),
    (
        ([Q], [K], [P], [R, R]), {},
        ValueError, "lengths student_q 1, student_k 1, teacher_q 1, teacher_k 2",
    ),
    ((Q, K, P, 0), {}, TypeError, "teacher_k must be a tensor or .*, got int"),
    ((Q.int(), K, P, R), {}, TypeError, "student_q must be .*, got torch.int32"),
    ((Q[0], K, P, R), {}, ValueError, r"student_q and student_k .* got \(3, 5, 4\) and"),
    ((Q, K[..., :2], P, R), {}, ValueError, r"got \(2, 3, 5, 4\) and \(2, 3, 6, 2\)"),
    ((Q, K, P, R[:, :3]), {}, ValueError, r"multiple of teacher_k's, .*: got 7 and 3"),
    ((Q, K, P, R), {"window": 2}, ValueError, r"window needs Nq = Nk, got Nq = 5 and Nk = 6"),
    ((Q, K, P, R), {"window": 0}, ValueError, r"window must be at least 1, .* got 0"),
    ((Q, K, P, R), {"window": 2.0}, TypeError, r"window must be a number of places .* got 2.0"),
    ((Q[:1], K[:1], P, R), {}, ValueError, r"must agree .* got \(1, 5, 6\) and \(2, 5, 6\)"),
    ((Q, K, P[:, :, :4], R), {}, ValueError, r"must agree .* got \(2, 5, 6\) and \(2, 4, 6\)"),
    ((Q, K, P, R[:, :, :1]), {}, ValueError, r"must agree .* got \(2, 5, 6\) and \(2, 5, 1\)"),
    ((Q[:, :0], K[:, :0], P, R), {}, ValueError, r"at least one head .* got \(2, 0, 5, 4\)"),
    ((Q, K, P[..., :0], R[..., :0]), {}, ValueError, r"teacher_q .* d >= 1, got \(2, 7, 5, 0\)"),
    ((Q, K, P, R.to("meta")), {}, ValueError, "one device, got cpu and teacher_k on meta"),
    (GOOD, {"target": "softmax"}, ValueError, "target must be one of 'scores', 'probs', got 'soft"),
    (GOOD, {"backend": "fast"}, ValueError, "backend must be one of 'auto', .* got 'fast'"),
    (GOOD, {"causal": True}, ValueError, "causal needs Nq = Nk, got Nq = 5 and Nk = 6"),
    (GOOD, {"causal": 1}, TypeError, "causal must be True or False, got 1"),
    (GOOD, {"causal": [False, False]}, ValueError, "causal must be one or a list of 1, got 2"),
    (GOOD, {"causal": [None]}, TypeError, "causal must be True or False, got None"),
    (GOOD, {"causal": [True]}, ValueError, "causal needs Nq = Nk, got Nq = 5 and Nk = 6"),
    (GOOD, {"query_mask": x(2, 5)}, TypeError, "query_mask must be bool, .*got torch.float32"),
    (GOOD, {"query_mask": x(2, 6).bool()}, ValueError, r"query_mask .*\(2, 5\), got \(2, 6\)"),
    (GOOD, {"key_mask": x(2, 5).bool()}, ValueError, r"key_mask .*\(2, 6\), got \(2, 5\)"),
    (GOOD, {"key_mask": [None, None]}, ValueError, "key_mask must be one or a list of 1, got 2"),
    (GOOD, {"student_lse": x(2, 3, 5)}, ValueError, "student_lse .* got target='scores'"),
    (
        GOOD, {"target": "probs", "student_lse": x(2, 7, 5)},
        ValueError, r"student_lse must be \[B, H, Nq\] = \(2, 3, 5\), got \(2, 7, 5\)",
    ),
    (
        GOOD, {"target": "probs", "teacher_lse": x(2, 7, 5, 1)},
        ValueError, r"teacher_lse must be .* \(2, 7, 5\), got \(2, 7, 5, 1\)",
    ),
    (
        GOOD, {"target": "probs", "teacher_lse": x(2, 7, 5).int()},
        TypeError, "teacher_lse must be .*, got torch.int32",
    ),
    (
        GOOD, {"target": "probs", "teacher_lse": [None, None]},
        ValueError, "teacher_lse must have one tensor .* a layer: 1, got 2",
    ),
    (
        GOOD, {"target": "probs", "student_lse": x(2, 3, 5, device="meta")},
        ValueError, "one device, got cpu and student_lse on meta",
    ),
    (GOOD, {"student_scale": "1"}, TypeError, "student_scale must be a float, got str"),
    (GOOD, {"student_scale": float("nan")}, ValueError, "student_scale must be finite, got nan"),
    (GOOD, {"teacher_scale": [1.0, 2.0]}, ValueError, "teacher_scale must be one or .* 1, got 2"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "options", "error", "message"), ATTENTION)
def test_attention_mse(args, options, error, message):
    with pytest.raises(error, match=message):
        optima_fast.attention_mse(*args, **options)


CALLS = [
    lambda **options: optima_fast.hidden_mse(S, T, W, **options),
    lambda **options: optima_fast.attention_mse(*GOOD, **options),
    lambda **options: optima_fast.attention_mse(*GOOD, target="probs", **options),
]


@pytest.mark.parametrize("call", CALLS)
def test_triton_lists_each_reason(monkeypatch, call):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    reasons = (
        "it needs tensors on a CUDA device, got cpu; triton is not installed. Use backend='auto'"
    )
    with pytest.raises(ValueError, match=re.escape(reasons)):
        call(backend="triton")


@pytest.mark.parametrize("call", CALLS)
def test_triton_s_own_reasons_are_passed_on(monkeypatch, call):
    monkeypatch.setattr("optima_fast.kernels.core.INTERPRETED", False)
    with pytest.raises(ValueError, match="must be CUDA, got cpu, and TRITON_INTERPRET is not set"):
        call(backend="triton")


def test_recompute_is_a_flag():
    with pytest.raises(TypeError, match="recompute must be True or False, got 1"):
        optima_fast.hidden_mse(S, T, W, recompute=1)
