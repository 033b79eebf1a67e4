"""The processes that ``torchrun`` started for one run; without it, the one there is.

All of them come by the same calls in the same order. The first writes files and speaks; data and
decisions that files depend on are its too.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from optima_fast.errors import UserError

T = TypeVar("T")

PATIENCE = datetime.timedelta(hours=12)  # with one that trains a teacher, or waits for who does
_control: Any = None  # a group that exchanges numbers and decisions between CPUs


def count() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the one that writes files."""
    return number() == 0


def beside() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if started_by_torchrun() else 1


def started_by_torchrun() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" in os.environ


def speechless() -> bool:
    """Whether another process of the run speaks for this one."""
    return started_by_torchrun() and os.environ.get("RANK", "0") != "0"


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """A block before processes meet, in which all make the same mistake or none."""
    try:
        yield
    except UserError:
        if speechless():
            leave_to_first()
        raise


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Meet the other processes of the run, if there are any, and part from them at the end.

    Raises:
        UserError: another one ended meanwhile, or cannot be reached.
    """
    global _control
    if not started_by_torchrun() or dist.is_initialized():
        yield
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        _control = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield
    except RuntimeError as error:
        if not re.search("gloo|nccl|connection (closed|reset)|peer", str(error), re.IGNORECASE):
            raise
        line = (str(error).splitlines() or ["connection lost"])[0][:160]
        raise UserError(
            f"process {number()} of {count()} lost the others ({line}); what another one said "
            "before it tells why"
        ) from error
    finally:
        _control = None
    dist.destroy_process_group()


def gathered(value: T) -> list[T]:
    """The value of each process, in their order; it must be picklable."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=_control)
    return values


def total(numbers: Sequence[float]) -> list[float]:
    """Sums over the processes, exact where the numbers are counts."""
    if count() == 1:
        return list(numbers)
    summed = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(summed, group=_control)
    values: list[float] = summed.tolist()
    return values


def summed(value: Tensor) -> Tensor:
    """The sum over the processes of a tensor on the device, which is not waited for."""
    if count() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def whole(state: T) -> T:
    """A tree with every tensor in it that is sharded over the processes brought together."""

    def brought(x: Any) -> Any:
        return x.full_tensor() if is_sharded(x) else x

    return cast(T, tree_map_only(Tensor, brought, state))


def is_sharded(value: object) -> bool:
    """Whether it is a DTensor, whose module takes seconds to import."""
    return hasattr(value, "full_tensor")


def of_first(decide: Callable[[], T]) -> T:
    """What the first process decides.

    Raises:
        UserError: as it does.
    """
    if count() == 1:
        return decide()
    with together():
        value = decide() if is_first() else None
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0, group=_control)
    decided: T = values[0]
    return decided


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that all processes leave in the same way: one's mistake ends all, and is said once.

    Raises:
        UserError: in the first process, that of any.
    """
    if count() == 1:
        yield
        return
    mistake = None
    try:
        yield
    except UserError as error:
        mistake = str(error)
    told = [text for text in gathered(mistake) if text is not None]
    if told and not is_first():
        leave_to_first()
    if told:
        raise UserError(told[0])


def leave_to_first() -> NoReturn:
    """End without a word, after the process that has one to say: torchrun ends those that wait."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(10)
    raise SystemExit(2)
