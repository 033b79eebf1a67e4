"""Work ahead in other processes: order, errors, randomness, and that no process is left."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from optima_fast.errors import UserError
from optima_fast.tasks.workers import in_order, usable_cores


def square(key):
    return os.getpid(), torch.full((3,), key * key), torch.get_num_threads()


def slow_first(key):
    time.sleep(0.3 if key == 0 else 0.0)
    return key


def fail_at_three(key):
    if key == 3:
        raise UserError("file 3 is broken")
    return key


def bug(key):
    raise KeyError(f"bug {key}")


def die(key):
    os.kill(os.getpid(), signal.SIGKILL)


def alive(pids):
    """Those that still run; ended children that nobody waited for would be zombies."""
    found = []
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists():
            found.append((pid, stat.read_text().rpartition(")")[2].split()[0]))
    return found


def settled(pids, seconds=8.0):
    end = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.05)
    return alive(pids)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_order_whoever_computes_them(workers):
    results = list(in_order(square, range(2, 9), workers))
    assert [int(value[0]) for _, value, _ in results] == [k * k for k in range(2, 9)]
    pids = {pid for pid, _, _ in results}
    assert len(pids) == max(1, workers)
    assert (os.getpid() in pids) == (workers == 0)
    if workers:
        assert {threads for _, _, threads in results} == {1}
    assert not settled(pids - {os.getpid()})
    assert list(in_order(slow_first, range(5), workers)) == list(range(5))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_comes_as_it_is_after_the_results_before_it(workers):
    results = in_order(fail_at_three, range(9), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"^file 3 is broken$"):
        next(results)
    assert not multiprocessing.active_children()


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError, match="bug 0") as caught:
        next(in_order(bug, range(3), 1))
    assert "in bug" in str(caught.value)
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_one_line():
    with pytest.raises(UserError, match="a worker process that reads images was killed"):
        list(in_order(die, range(3), 1))
    assert not multiprocessing.active_children()


def test_no_random_number_of_this_process_is_drawn():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(in_order(square, range(4), 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_closing_early_leaves_no_process():
    results = in_order(square, range(1000), 2)
    pids = {next(results)[0] for _ in range(4)}
    assert len(pids) == 2
    results.close()
    assert not settled(pids)
    assert not multiprocessing.active_children()


SCRIPT = """
import multiprocessing, os, signal, sys, time
from optima_fast.tasks.workers import in_order
def fetch(key):
    time.sleep(0.01)
    return os.getpid()
if __name__ == "__main__":
    stopped = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore it
    results = in_order(fetch, range(10**6), 2)
    pids = {next(results) for _ in range(8)}
    signal.signal(signal.SIGINT, lambda *_: stopped.append(1))  # not what the workers began with
    print(*pids, flush=True)
    while not stopped:
        next(results)
    for _ in range(20):  # more than was computed ahead
        next(results)
    results.close()
    multiprocessing.set_start_method("spawn", force=True)
    print(*set(in_order(fetch, range(3), 1)), flush=True)
    multiprocessing.set_start_method("fork", force=True)
    results = in_order(fetch, range(10**6), 2)
    print(*{next(results) for _ in range(8)}, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_workers_survive_ctrl_c_in_silence_are_spawned_too_and_end_with_the_trainer(tmp_path):
    """In one process of its own, as each takes seconds to begin."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip

        def workers():
            return list(map(int, process.stdout.readline().split()))

        forked = workers()
        assert len(forked) == 2
        # as the terminal does: to everything in the foreground
        os.killpg(process.pid, signal.SIGINT)
        (spawned,) = workers()
        assert not settled([*forked, spawned])
        left = workers()
        assert len(left) == 2
        os.killpg(process.pid, signal.SIGKILL)
        rest, errors = process.communicate(timeout=30)
    assert (rest, errors) == ("", "")
    assert not settled(left)


def test_usable_cores():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
