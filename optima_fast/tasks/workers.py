"""Work of the next batches done ahead, in other processes, handed out in order."""

import contextlib
import os
import re
import signal
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset

from optima_fast.errors import UserError

__all__ = ["in_order", "usable_cores"]

K = TypeVar("K")
T = TypeVar("T")


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_order(fetch: Callable[[K], T], keys: Sequence[K], workers: int) -> Generator[T, None, None]:
    """`fetch(key)` of each key, in the order of the keys, two a worker computed ahead.

    What is given does not depend on the number of workers, and no random number of this process is
    drawn. Workers end with the iterator, at an error, and when this process dies; Ctrl-C does not
    reach them. They are forked where Python's default is to fork (Linux before Python 3.14), and
    share memory; elsewhere each is sent a pickled copy of `fetch` when it starts.

    Args:
        fetch: Computed in workers on one thread each; with several ways to start a process,
            something that can be pickled.
        keys: What to call it with.
        workers: Number of processes; 0 computes each here when it is asked for.

    Raises:
        UserError: As `fetch` raised it, or a worker was killed.
    """
    if workers == 0:
        yield from map(fetch, keys)
        return
    with warnings.catch_warnings():
        # more workers than cores are what the user asked for
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader: DataLoader[T | _Failure] = DataLoader(
            cast("Dataset[T | _Failure]", _Calls(fetch)),
            batch_size=None,
            sampler=cast("Sequence[int]", keys),
            num_workers=workers,
            collate_fn=_as_is,
            worker_init_fn=_quiet,
            generator=torch.Generator(),
        )
        results: Any = iter(loader)
    with killed_workers():
        try:
            for result in results:
                if isinstance(result, _Failure):
                    raise result.error
                yield result
        finally:
            # not left to the last reference: the traceback of an error holds one
            results._shutdown_workers()


@contextlib.contextmanager
def killed_workers() -> Iterator[None]:
    """Say what may have happened where a worker was killed, which torch reports at any moment.

    Raises:
        UserError: A worker was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.match(r"DataLoader worker \(pid.* (killed|exited)", str(error)):
            raise
        raise UserError(
            "a worker process that reads images was killed, most likely for want of memory: lower "
            "--workers, or give /dev/shm more room (docker run --shm-size)"
        ) from error


class _Failure:
    """A user's mistake met in a worker."""

    def __init__(self, error: UserError) -> None:
        self.error = error


class _Calls(Dataset[object]):
    def __init__(self, fetch: Callable[[K], T]) -> None:
        self.fetch = cast("Callable[[object], object]", fetch)

    def __getitem__(self, key: object) -> object:
        try:
            return self.fetch(key)
        except UserError as error:
            return _Failure(error)


def _as_is(value: T) -> T:
    return value


def _quiet(worker: int) -> None:
    """Signals of the terminal are for the trainer, which ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
