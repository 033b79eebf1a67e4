"""Losses: forward and backward against eager PyTorch, torch.compile and the loops people write.

    pytest bench/bench_losses.py --benchmark-only                        # the table
    pytest bench/bench_losses.py --benchmark-only -k "image1024 and not compile"
    pytest bench/bench_losses.py --benchmark-only --suite growth         # bench/cases.py has them
    pytest bench/bench_losses.py --benchmark-disable --quick             # only checks, tiny sizes

bench/contenders.py says who they are. Each is checked against float64 before it is timed, and a
wrong one fails. ``extra_info`` has the least FLOP and bytes of a step, the floor that they set on a
card whose rates are known and the share of it (else null), peak memory, error, and the ratio to
``anchor``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import arena
import pytest
import torch
from cases import SUITES, named, shrunk
from contenders import CONTENDERS
from measuring import Rows, Timer


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    attends = metafunc.function is test_attention_and_loss
    pairs = [
        (case.name, name)
        for case in SUITES[option.suite]
        for name in arena.serving(case, list(CONTENDERS))
        if CONTENDERS[name].attends == attends
        and name != "compile-max"  # minutes a case
        and not (option.quick and CONTENDERS[name].compiler)
    ]
    metafunc.parametrize(("case", "name"), pairs, ids=map("-".join, pairs))


@pytest.fixture(scope="module")
def timer(request: pytest.FixtureRequest) -> Timer:
    return Timer(request.config.option.device)


@pytest.fixture
def measure(case: str, timer: Timer, request: pytest.FixtureRequest) -> Callable[..., Any]:
    option = request.config.option
    few = option.quick or option.benchmark_disable

    def run(names: list[str]) -> Any:
        settings = arena.Settings(
            option.device,
            option.dtype,
            seconds=0.0 if few else float(option.benchmark_max_time) * len(names),
            least=2 if few else option.benchmark_min_rounds,
            backward=not option.loss_only,
        )
        device = torch.cuda.get_device_name() if timer.cuda else "cpu"
        chosen = named(option.suite, case)
        chosen = shrunk(chosen) if option.quick else chosen
        return arena.compare(chosen, names, settings, timer, Rows(None, {"device": device}))

    return run


def test_loss(case: str, name: str, measure: Any, side_by_side: Any) -> None:
    side_by_side(case, measure)


def test_attention_and_loss(case: str, name: str, measure: Any, side_by_side: Any) -> None:
    """The forward of both models' attention too: what it is worth to be given log-sum-exp."""
    side_by_side(f"attention, {case}", measure)
