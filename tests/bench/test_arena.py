"""Contenders, floors and exact results; how contenders are checked, timed and compared."""

from __future__ import annotations

import sys

import arena
import cases
import contenders
import measuring
import pytest
import torch
from cases import Case, Layer

HEADS = (2, 3)
SMALL = {
    "hidden": Case("h", "hidden", (Layer(2, 10, 0, HEADS, 4), Layer(3, 7, 0, HEADS, 8))),
    "scores": Case("s", "scores", (Layer(2, 10, 6, HEADS, 4), Layer(3, 7, 7, HEADS, 8, True))),
    "probs": Case("p", "probs", (Layer(2, 10, 6, HEADS, 4), Layer(3, 7, 7, HEADS, 8, True))),
    "kl": Case("k", "kl", (Layer(2, 10, 6, (3, 3), 4), Layer(3, 7, 7, (2, 2), 8, True))),
    "kl-mean": Case("m", "kl-mean", (Layer(2, 10, 6, HEADS, 4), Layer(3, 7, 7, HEADS, 8, True))),
    "relations": Case("r", "relations", (Layer(2, 9, 0, (6, 12), 8),)),
    "gram": Case("g", "gram", (Layer(3, 10, 0, HEADS, 4),)),
    "indexer": Case("i", "indexer", (Layer(2, 9, 9, HEADS, 4, True),)),
    "cosine": Case("c", "cosine", (Layer(2, 10, 0, HEADS, 4),)),
    "smooth-l1": Case("l", "smooth-l1", (Layer(2, 10, 0, HEADS, 4),)),
}
PAIRS = [
    (name, target)
    for name, contender in contenders.CONTENDERS.items()
    for target in contender.targets
    if not contender.compiler and not contender.lacks("cpu")
]


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_contenders_compute_the_loss_and_its_gradients(name, target):
    case = SMALL[target]
    layers = cases.inputs(case, torch.float32, "cpu")
    exact = cases.exact(case, layers)
    found = contenders.step(name, case, layers)()
    assert len(found) == 1 + cases.LOSSES[target].trained * len(case.layers)
    assert all(x.any() for x in found[1:])
    rounding = torch.bfloat16 if name == "autocast" else torch.float32
    assert measuring.relative_error(found, exact) < measuring.allowed_error(rounding)
    (alone,) = contenders.step(name, case, layers, backward=False)()
    assert measuring.relative_error([alone], exact[:1]) < measuring.allowed_error(rounding)


def test_under_autocast_projections_are_float32():
    layers = cases.inputs(SMALL["hidden"], torch.bfloat16, "cpu")
    plain, autocast = (contenders.prepared(name, layers) for name in ("eager", "autocast"))
    assert [x.dtype for x in plain[0]] == [torch.bfloat16] * 3
    assert [x.dtype for x in autocast[0]] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert autocast[0][1].requires_grad


@pytest.mark.parametrize("place", [0, 1])
def test_nan_is_an_error(place):
    exact = [torch.ones(3, dtype=torch.float64)] * 2
    found = [x.clone() for x in exact]
    assert measuring.relative_error(found, exact) == 0
    found[place][1] = float("nan")
    assert not measuring.relative_error(found, exact) < 1


def test_log_sum_exp_that_is_given_is_the_softmax_normaliser():
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    scores = (q @ k.mT / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(contenders.normaliser(q, k, True), scores.logsumexp(-1))


@pytest.mark.parametrize("target", cases.LOSSES)
def test_exact_results_do_not_depend_on_the_chunks(target):
    case = SMALL[target]
    layers = cases.inputs(case, torch.float32, "cpu")
    whole, chunked = cases.exact(case, layers), cases.exact(case, layers, room=1)
    assert all(x.dtype == torch.float64 for x in whole)
    for x, y in zip(whole, chunked, strict=True):
        torch.testing.assert_close(x, y)


FLOORS = [  # milliseconds a layer on an H200, computed by hand from the rates in cases.CARDS
    (Layer(32, 1024, 0), "hidden", {}, 0.196),
    (Layer(32, 1024, 1024), "probs", {}, 0.833),
    (Layer(32, 1024, 1024), "probs", {"lse": True}, 0.580),
    (Layer(256, 77, 77, causal=True), "probs", {}, 0.047),
    (Layer(256, 64, 256), "probs", {}, 0.098),
    (Layer(32, 1024, 1024), "scores", {}, 0.283),
    (Layer(32, 1024, 1024), "scores", {"backward": False}, 0.152),
    (Layer(32, 1024, 1024), "probs", {"backward": False}, 0.507),
    (Layer(32, 1024, 1024, (12, 12)), "kl", {}, 0.868),
    (Layer(256, 77, 77, (12, 12), causal=True), "kl", {}, 0.042),
]


@pytest.mark.parametrize(("layer", "target", "options", "expected"), FLOORS)
def test_floors(layer, target, options, expected):
    rates = cases.card("NVIDIA H200")
    assert rates is not None
    for count in (1, 3):
        case = Case("x", target, (layer,) * count)
        found = cases.floor_ms(cases.work(case, **options), rates)
        assert found == pytest.approx(count * expected, rel=0.02)


def test_an_h100_copies_slower_and_multiplies_as_fast():
    h200, h100 = cases.card("NVIDIA H200"), cases.card("NVIDIA H100 80GB HBM3")
    text = cases.work(Case("x", "probs", (Layer(256, 77, 77, causal=True),)))  # bound by bytes
    assert cases.floor_ms(text, h100) / cases.floor_ms(text, h200) == pytest.approx(4.3 / 3.0)
    hidden = cases.work(Case("x", "hidden", (Layer(32, 1024, 0),)))  # by arithmetic
    assert cases.floor_ms(hidden, h100) / cases.floor_ms(hidden, h200) == pytest.approx(790 / 798)


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", "NVIDIA H100 PCIe"])
def test_cards_that_were_not_measured_have_no_floor(name):
    assert cases.card(name) is None


def test_suites_have_the_shapes_that_matter():
    shapes = {
        (layer.queries, layer.keys, layer.causal, case.target)
        for case in cases.HEADLINE
        for layer in case.layers
    }
    for target in ("scores", "probs"):
        assert {(256, 256, False, target), (1024, 1024, False, target)} <= shapes
        assert {(77, 77, True, target), (64, 256, False, target)} <= shapes
    for name, suite in cases.SUITES.items():
        assert len({case.name for case in suite}) == len(suite), name
    assert [case.name for case in cases.SUITES["six"]] == [
        "hidden32k-x12", "image1024-probs", "text77-x12-probs", "cross64x256-x12-probs",
        "image256-x6-probs", "image1024-scores",
    ]  # fmt: skip
    batches = {x.batch for case in cases.SUITES["growth"] for x in case.layers}
    assert {8, 16, 32, 64, 128, 256} <= batches


def test_a_name_is_looked_up_in_its_suite():
    batches = [cases.named(x, "image1024-probs").layers[0].batch for x in ("cpu", "headline")]
    assert batches == [2, 32]


def settings(**changes):
    return arena.Settings("cpu", "float32", 0.0, 2)._replace(**changes)


def compare(case, *names, **changes):
    rows = measuring.Rows(None, {"device": "NVIDIA H200"})
    timer = measuring.Timer("cpu")
    found, samples = arena.compare(case, names, settings(**changes), timer, rows)
    assert len(rows.rows) == len(found)
    assert all(row in rows.rows for row in found.values())
    return found, samples


def test_contenders_are_checked_timed_in_turn_and_compared(monkeypatch):
    order = []

    class Timer(measuring.Timer):
        def sample(self, run):
            order.append(run)
            return float(len(order))

    rows = measuring.Rows(None, {"device": "cpu"})
    names = ("blockwise", "eager", "gemm")  # gemm has no probabilities
    found, samples = arena.compare(
        SMALL["probs"], names, settings(least=3), Timer("cpu"), rows
    )  # fmt: skip
    assert set(found) == {"blockwise", "eager"}
    assert order[:2] * 3 == order
    assert samples == {"blockwise": [1.0, 3.0, 5.0], "eager": [2.0, 4.0, 6.0]}
    ours = found["blockwise"]
    assert (ours["ms"], ours["runs"], ours["ours"], ours["anchor"]) == (3.0, 3, True, "eager")
    assert ours["ratio"] == 0.75  # median of 1/2, 3/4 and 5/6
    assert found["eager"]["ratio"] == 1
    assert 0 <= ours["error"] < 1e-4
    assert ours["peak_mb"] > 0
    assert "0.750 of eager" in arena.line(ours)
    assert rows.rows == list(found.values())


def test_what_a_step_must_do_at_least(monkeypatch):
    """The numbers of one layer of hidden states, by hand; a floor needs a card and 16 bits."""
    case = Case("h", "hidden", (Layer(2, 10, 0, (2, 3), 4),))
    work = {"flop": 6 * 20 * 8 * 12, "bytes": 4 * (20 * (2 * 8 + 12) + 2 * 8 * 12)}
    row = arena.least_work("eager", case, settings(), "NVIDIA H200")
    assert row == {**work, "floor_ms": None}
    half = settings(dtype="bfloat16", device="cuda")
    row = arena.least_work("eager", case, half, "NVIDIA H200")
    assert row["bytes"] == work["bytes"] / 2
    assert row["floor_ms"] == pytest.approx(1e3 * row["bytes"] / 4.3e12)
    assert arena.least_work("eager", case, half, "NVIDIA A100")["floor_ms"] is None
    assert set(arena.least_work("sdpa", case, half, "NVIDIA H200").values()) == {None}
    assert set(arena.least_work("eager", SMALL["gram"], half, "NVIDIA H200").values()) == {None}


def test_without_the_anchor_there_is_no_ratio():
    found, _ = compare(SMALL["hidden"], "blockwise")
    assert found["blockwise"]["ratio"] is None
    assert " of " not in arena.line(found["blockwise"])


def test_loss_alone():
    found, samples = compare(SMALL["probs"], "eager", "blockwise", backward=False)
    assert set(samples) == {"eager", "blockwise"}
    with_gradients, _ = compare(SMALL["probs"], "eager")
    assert found["eager"]["flop"] < with_gradients["eager"]["flop"]


def test_a_wrong_contender_is_not_timed(monkeypatch):
    wrong = contenders.Contender(
        lambda case, _: (
            lambda layers: [1.01 * x for x in contenders._loop(case, contenders.EAGER)(layers)]
        )
    )
    monkeypatch.setitem(contenders.CONTENDERS, "wrong", wrong)
    found, samples = compare(SMALL["hidden"], "eager", "wrong")
    assert set(samples) == {"eager"}
    assert "WRONG (relative error" in found["wrong"]["failed"]
    assert "WRONG" in arena.line(found["wrong"])


def test_a_contender_that_cannot_run_says_why():
    why = contenders.Contender(lambda case, _: 1 / 0, lacks=lambda device: f"not on {device}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(contenders.CONTENDERS, "absent", why)
        found, samples = compare(SMALL["hidden"], "eager", "absent")
    assert found["absent"]["left_out"] == "not on cpu"
    assert set(samples) == {"eager"}


@pytest.fixture
def xformers(monkeypatch):
    """A stand-in with xFormers' interface: [B, N, H, d], rows of the log-sum-exp padded."""
    said = []

    def forward(q, k, v, attn_bias=None):
        said.append(attn_bias)
        q, k = (x.transpose(1, 2) for x in (q, k))
        lse = contenders.normaliser(q, k, attn_bias is not None)
        return None, torch.nn.functional.pad(lse, (0, 5), value=float("nan"))

    package, ops, fmha = (type(torch)(x) for x in ("xformers", "ops", "fmha"))
    fmha.memory_efficient_attention_forward_requires_grad = forward
    ops.fmha, ops.LowerTriangularMask = fmha, lambda: "causal"
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    contenders.no_xformers.cache_clear()
    yield said
    contenders.no_xformers.cache_clear()


@pytest.mark.usefixtures("xformers")
def test_losses_after_attention_are_given_its_log_sum_exp(xformers):
    names = ("sdpa", "sdpa-lse", "xformers-lse")
    found, samples = compare(SMALL["probs"], *names)
    assert set(samples) == set(names), found
    assert all(row["anchor"] == "sdpa" for row in found.values())
    assert xformers[1:5] == [None, None, "causal", "causal"]  # after the trial


def test_a_log_sum_exp_that_is_wrong_is_found(xformers, monkeypatch):
    monkeypatch.setattr(contenders, "normaliser", lambda q, k, causal: q.sum(-1))
    found, _ = compare(SMALL["probs"], "xformers-lse")
    assert "WRONG" in found["xformers-lse"]["failed"]


@pytest.mark.parametrize("broken", [None, "no operator for these inputs\nand much more"])
def test_without_xformers_a_line_says_why(monkeypatch, xformers, broken):
    def refuse(*args, **options):
        raise NotImplementedError(broken)

    if broken is None:
        monkeypatch.setitem(sys.modules, "xformers.ops", None)
    else:
        fmha = sys.modules["xformers.ops"].fmha
        monkeypatch.setattr(fmha, "memory_efficient_attention_forward_requires_grad", refuse)
    found, samples = compare(SMALL["probs"], "xformers-lse")
    assert not samples
    why = found["xformers-lse"]["left_out"]
    assert why.startswith("xformers: ")
    assert "\n" not in why
    assert ("no operator for these inputs" in why) == (broken is not None)
