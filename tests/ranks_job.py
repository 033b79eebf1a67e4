"""Jobs of several processes for test_ranks.py.

``torchrun ranks_job.py SCENE FOLDER``, or ``python ranks_job.py SCENE FOLDER PROCESSES``, which
forks them as torchrun would start them, and so imports PyTorch once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it: here once, not in every process that is forked

sys.path.insert(0, str(Path(__file__).resolve().parent))

from small_run import QUIET, small
from small_run import trainer as small_trainer

from optima_fast.errors import UserError
from optima_fast.tasks.vqa import Vqa
from optima_fast.training import checkpoints, experiment, ranks, trainer
from optima_fast.training.interrupts import Interrupted
from optima_fast.training.trainer import Trainer

SETTINGS: dict[str, Any] = {
    "steps": 10,
    "round_steps": 1,
    "batch_size": 7,
    "kl_weight": 0.5,
    "reward_examples": 20,
    "checkpoint_every": 5,
    "eval_every": 5,
    "log_every": 1,
}
BALANCED = {"method": "balanced", "init_rounds": None}
GATE = {"method": "gradient-cosine", "init_rounds": None, "round_steps": 2}


def run(folder: Path, name: str, **settings: Any) -> None:
    """A run in ``folder/name``, whose teacher is kept for the others."""
    config = small(folder, **{**SETTINGS, **settings})
    experiment.run(dataclasses.replace(config, out=str(folder / name)), QUIET)


def fit(folder: Path, **settings: Any) -> None:
    """The loop alone, from the last checkpoint on if there is one; the student in ``folder``."""
    t = small_trainer(folder, **{**SETTINGS, **settings})
    last = checkpoints.latest_checkpoint(t.run.checkpoints)
    if last is not None:
        t.resume(last)
    t.fit()
    t.run.save_model(t.student, t.data, t.config)


def costs(*given: Any, **settings: Any) -> list[float]:
    """Of arms, by their modules: counting operations takes longer than a run."""
    return [0.1 + 0.3 * len(arm) for arm in given[4]]


def at_step(number: int, act: Any) -> None:
    """Act before that 0-based step of training, of a student."""
    step = Trainer._train_step

    def acting(self: Trainer) -> Any:
        if self.step == number and self.distiller is not None:
            act()
        return step(self)

    Trainer._train_step = acting  # type: ignore[method-assign]


def whole(folder: Path) -> None:
    """All ways to share a run, and all to end it together."""
    run(folder, "ddp")
    fit(folder / "fsdp", fsdp=True, accumulate=2)
    fit(folder / "balanced", accumulate=2, **BALANCED)
    fit(folder / "gate", **GATE)
    fit(folder / "cached", teacher_cache=str(folder / "kept"), teacher_cache_dtype="fp32")
    told = {}
    try:
        with ranks.together():
            if ranks.number() == 1:
                raise UserError("no disk")
    except (UserError, RuntimeError) as error:
        told["mistake"] = repr(error)
    step, loss = Trainer._train_step, Vqa.loss
    if ranks.number() == 1:
        at_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    try:
        fit(folder / "stopped")
    except Interrupted as error:
        told["stopped"] = str(error)
    Trainer._train_step = step  # type: ignore[method-assign]

    def spoil() -> None:
        Vqa.loss = lambda *given: loss(*given) * float("nan")  # type: ignore[method-assign]

    if ranks.number() == 1:
        at_step(6, spoil)
    try:
        fit(folder / "bad")
    except (UserError, RuntimeError) as error:
        told["bad"] = repr(error)
    (folder / f"told-{ranks.number()}.json").write_text(json.dumps(told))


def killed(folder: Path) -> None:
    """The second process is killed after the first checkpoint."""
    if ranks.number() == 1:
        at_step(7, lambda: os.kill(os.getpid(), signal.SIGKILL))
    fit(folder / "killed")


def resumed(folder: Path) -> None:
    """It goes on with other processes."""
    fit(folder / "killed", fsdp=True)


def left() -> None:
    """What a process that has nothing to say does instead of ending."""
    raise RuntimeError("left")


def main(scene: str, folder: str) -> None:
    torch.set_num_threads(1)
    trainer.arm_costs = costs  # type: ignore[assignment]
    with ranks.joined(torch.device("cpu")):
        if scene == "whole":
            ranks.leave_to_first = left  # type: ignore[assignment]
        {"whole": whole, "killed": killed, "resumed": resumed}[scene](Path(folder))


def fork(count: int, *job: str) -> int:
    """Do the job in so many processes; how many failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
    started = []
    for number in range(count):
        child = os.fork()
        if not child:
            own = {"RANK": number, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": count}
            os.environ.update({name: str(value) for name, value in {**shared, **own}.items()})
            status = 1
            try:
                main(*job)
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        started.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in started)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        sys.exit(fork(int(sys.argv[3]), *sys.argv[1:3]))
    main(*sys.argv[1:])
