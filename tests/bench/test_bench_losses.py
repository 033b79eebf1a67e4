"""The losses' bench: contenders, floors and exact results; its quick form end to end."""

from __future__ import annotations

import json

import bench_losses
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
}
PAIRS = [
    (name, target)
    for name, contender in contenders.CONTENDERS.items()
    for target in contender.targets
    if not contender.compiler and not name.startswith("triton")
]


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_contenders_compute_the_loss_and_its_gradients(name, target):
    case = SMALL[target]
    layers = cases.inputs(case, torch.float32, "cpu")
    exact = cases.exact(case, layers)
    found = contenders.step(name, case, layers)()
    assert len(found) == 1 + 2 * len(case.layers)
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


@pytest.mark.parametrize("target", cases.TARGETS)
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
]


@pytest.mark.parametrize(("layer", "target", "options", "expected"), FLOORS)
def test_floors(layer, target, options, expected):
    rates = cases.card("NVIDIA H200")
    assert rates is not None
    for count in (1, 3):
        case = Case("x", target, (layer,) * count)
        found = cases.floor_ms(case, rates, **options)
        assert found == pytest.approx(count * expected, rel=0.02)


def test_cards_that_were_not_measured_have_no_floor():
    assert cases.card("NVIDIA GeForce RTX 4090") is None


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
    batches = {x.batch for case in cases.SUITES["growth"] for x in case.layers}
    assert {8, 16, 32, 64, 128, 256} <= batches


def run(tmp_path, *flags):
    """Exit code and rows of a quick run on the CPU."""
    file = tmp_path / "rows.jsonl"
    code = bench_losses.main(["--quick", "--device", "cpu", "--json", str(file), *flags])
    return code, [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("suite", ["headline", "growth", "crossover", "cpu"])
def test_quick_form_of_every_suite(tmp_path, suite):
    code, rows = run(tmp_path, "--suite", suite, "--providers", "eager", "optima_fast")
    assert code == 0
    expected = {(c.name, p) for c in cases.SUITES[suite] for p in ("eager", "optima_fast")}
    assert {(r["case"], r["provider"]) for r in rows} == expected
    for r in rows:
        assert r["ms"] > 0
        assert r["runs"] == 2
        assert 0 <= r["error"] < 1e-4
        assert r["torch"] == torch.__version__
    assert not (tmp_path / "rows.started").exists()


def test_every_contender_has_a_row_and_a_refusal_is_one(tmp_path):
    names = [n for n, c in contenders.CONTENDERS.items() if not c.compiler]
    code, rows = run(tmp_path, "--suite", "headline", "--case", "hidden8k", "--providers", *names)
    assert code == 0
    serve = {n for n in names if "hidden" in contenders.CONTENDERS[n].targets}
    assert {r["provider"] for r in rows} == serve
    assert all("ms" in r for r in rows if r["provider"] not in ("triton",)), rows


def test_loss_alone(tmp_path):
    code, rows = run(tmp_path, "--suite", "headline", "--case", "image256", "--loss-only",
                     "--providers", "eager", "blockwise")  # fmt: skip
    assert code == 0
    assert {r["case"] for r in rows} == {"image256-x6-probs-loss-only"}
    assert len(rows) == 2


def test_a_wrong_contender_is_not_timed(tmp_path, monkeypatch, capsys):
    wrong = contenders.Contender(
        lambda case, _: lambda layers: [1.01 * x for x in contenders._eager(case)(layers)]
    )
    monkeypatch.setitem(contenders.CONTENDERS, "wrong", wrong)
    code, rows = run(tmp_path, "--suite", "smoke", "--providers", "eager", "wrong")
    assert code == 0
    found = {(r["provider"], "ms" in r, "failed" in r) for r in rows}
    assert found == {("eager", True, False), ("wrong", False, True)}
    assert "WRONG (relative error" in capsys.readouterr().out


def test_after_a_crash_the_rest_is_measured(tmp_path, monkeypatch):
    """A process that ends in a cell leaves its name; the next one goes on after it."""

    def crash(case, _):
        raise SystemExit(9)

    monkeypatch.setitem(contenders.CONTENDERS, "crash", contenders.Contender(crash))
    flags = ("--suite", "smoke", "--providers", "eager", "crash", "optima_fast")
    file = tmp_path / "rows.jsonl"
    for _ in range(len(cases.SMOKE)):
        with pytest.raises(SystemExit):
            run(tmp_path, *flags, "--resume")
        assert (tmp_path / "rows.started").exists()
    code, rows = run(tmp_path, *flags, "--resume")
    assert code == 0
    assert file.exists()
    assert not (tmp_path / "rows.started").exists()
    died = [r["case"] for r in rows if r.get("failed") == "the process died here"]
    assert sorted(died) == sorted(c.name for c in cases.SMOKE)
    timed = sorted((r["case"], r["provider"]) for r in rows if "ms" in r)
    expected = [(c.name, p) for c in cases.SMOKE for p in ("eager", "optima_fast")]
    assert timed == sorted(expected)


def test_a_lost_device_ends_the_process_and_names_the_cell(tmp_path, monkeypatch):
    def lose(case, _):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(contenders.CONTENDERS, "lose", contenders.Contender(lose))
    code, rows = run(tmp_path, "--suite", "smoke", "--providers", "lose", "eager")
    assert code == bench_losses.CONTEXT_LOST
    assert [(r["provider"], "illegal" in r["failed"]) for r in rows] == [("lose", True)]
    assert (tmp_path / "rows.started").exists()


def test_a_spent_budget_leaves_cases_out_and_says_so(tmp_path):
    code, rows = run(tmp_path, "--suite", "smoke", "--budget", "-1")
    assert code == 0
    assert [r["failed"] for r in rows] == ["left out: no time"] * len(cases.SMOKE)


def test_cuda_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_losses.main(["--device", "cuda"])
    assert "sees no CUDA device; use --device cpu" in capsys.readouterr().err
