"""Options of `pytest bench`, and what its files share: contenders of a group are timed in turn.

A busy machine slows one run more than the next, so the contenders of a group take turns, once, when
its first test runs; each test then hands its own samples to pytest-benchmark, whose clock moves by
a sample a round. On a GPU the samples are times between two events on the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from measuring import Row, card_state, conditions

# isort: split
import pytest
import torch
from cases import SUITES

Measure = Callable[[Sequence[str]], tuple[dict[str, Row], dict[str, list[float]]]]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("optima_fast")
    cuda = torch.cuda.is_available()
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    group.addoption("--dtype", choices=("float32", "bfloat16", "float16"),
                    help="default: bfloat16 on a GPU, else float32")  # fmt: skip
    group.addoption("--suite", choices=SUITES, help="default: headline on a GPU, else cpu")
    group.addoption("--loss-only", action="store_true", help="no gradient, as for the reward")
    group.addoption("--quick", action="store_true", help="tiny sizes, two rounds, no compiler")


def pytest_configure(config: pytest.Config) -> None:
    cuda = config.option.device == "cuda"
    config.option.dtype = config.option.dtype or ("bfloat16" if cuda else "float32")
    config.option.suite = config.option.suite or ("headline" if cuda else "cpu")


class Clock:
    """pytest-benchmark's timer: seconds, which pass by being added."""

    __name__ = "a sample a round"
    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "side_by_side" not in getattr(item, "fixturenames", ()):
            continue
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        item.add_marker(pytest.mark.filterwarnings("default"))  # other packages' are theirs


@pytest.fixture
def side_by_side(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[str, Measure], None]:
    """Report this test's share of a group, which the first test of the group measures.

    A test has a parameter ``name``, and its function's other parameters are the group's.
    """

    def group_of(item: Any) -> tuple[Any, ...]:
        return item.originalname, *(v for k, v in item.callspec.params.items() if k != "name")

    def run(label: str, measure: Measure) -> None:
        mine = group_of(request.node)
        if LAST.get("group") != mine:
            tests = [x for x in request.session.items if hasattr(x, "callspec")]
            names = [x.callspec.params["name"] for x in tests if group_of(x) == mine]
            LAST.update(group=mine, found=measure(names))
        rows, samples = LAST["found"]
        name = request.node.callspec.params["name"]
        row = rows.get(name) or rows["timing"]  # where timing all of them broke
        if "left_out" in row:
            pytest.skip(row["left_out"])
        if "failed" in row:
            pytest.fail(row["failed"], pytrace=False)
        benchmark.group = label
        benchmark.extra_info.update(row)
        left = iter(samples[name])

        def a_round() -> None:
            CLOCK.now += next(left) / 1e3

        benchmark.pedantic(a_round, rounds=len(samples[name]))

    return run


LAST: dict[str, Any] = {}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Row) -> None:
    option = config.option
    del machine_info["node"]
    machine_info |= conditions(option.device, option.dtype, torch.get_num_threads())
    machine_info |= {"cpus": os.cpu_count(), "nvidia_smi": card_state()}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: Row) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # thousands of numbers
