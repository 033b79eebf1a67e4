"""Rows of numbers on disk that several processes read and add to, each of them whole or not there.

``NAME.bin`` has a row for each sample, and takes disk space only where rows were written.
``NAME.map`` has a byte for each, 1 where the row is there: data is flushed to disk before its mark
is set, so that a process may be killed at any moment. A row is written once: who writes holds the
folder's lock, and leaves out what another process has written meanwhile. Readers take no lock.

Checked when the files are opened: their sizes, and that marks are 0 or 1. Not detected: a byte of a
row that changed on the disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from optima_fast.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows, where two writers may write the same row
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep the writers of other processes out of a folder, which is created if need be.

    Raises:
        UserError: the folder or a file in it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


class Rows:
    """The rows of one name; created, if they are not there, by who holds the folder's lock.

    Args:
        folder: of the files.
        name: of the files.
        count: number of rows.
        width: numbers in a row.
        dtype: of the numbers.

    Attributes:
        waiting: bytes of rows that :meth:`write` has yet to write.

    Raises:
        UserError: the files are damaged, or are other rows.
    """

    def __init__(self, folder: Path, name: str, count: int, width: int, dtype: torch.dtype) -> None:
        self._path = folder / f"{name}.bin"
        self._row_bytes = width * dtype.itemsize
        self._waiting: dict[int, Tensor] = {}
        marks = folder / f"{name}.map"
        if not marks.exists():
            _create(self._path, count * self._row_bytes)
            partial = folder / f".{name}.partial"
            _create(partial, count, zeros=True)
            partial.replace(marks)
        for path, expected in ((self._path, count * self._row_bytes), (marks, count)):
            size = path.stat().st_size if path.is_file() else 0
            if size != expected:
                raise _damaged(path, f"it has {size:,} bytes, not {expected:,}")
        self._marks = np.memmap(marks, np.uint8, "r+", shape=(count,))
        if self._marks.max() > 1:
            raise _damaged(marks, "a mark is neither 0 nor 1")
        size = count * width
        whole = torch.from_file(str(self._path), shared=True, size=size, dtype=dtype)
        self._data = whole.view(count, width)

    @property
    def waiting(self) -> int:
        return len(self._waiting) * self._row_bytes

    def have(self, rows: Tensor, waiting: bool = False) -> bool:
        """Whether all of these are there; ``waiting``: or will be, once they are written."""
        there = self._marks[rows.numpy()] == 1
        if not waiting or there.all():
            return bool(there.all())
        return all(row in self._waiting for row in rows[torch.from_numpy(~there)].tolist())

    def take(self, rows: Tensor, first: int, end: int, device: torch.device) -> Tensor:
        """Columns ``first`` to ``end`` of rows; a copy to CUDA is not waited for."""
        pinned = device.type == "cuda"
        taken = torch.empty(len(rows), end - first, dtype=self._data.dtype, pin_memory=pinned)
        torch.index_select(self._data[:, first:end], 0, rows, out=taken)
        return taken.to(device, non_blocking=True)

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Have these rows written, but for those that are there."""
        for row, value in zip(rows.tolist(), values, strict=True):
            if not self._marks[row]:
                self._waiting[row] = value

    def write(self) -> None:
        """Write what is waiting and mark it; for who holds the folder's lock."""
        new = [row for row in sorted(self._waiting) if not self._marks[row]]
        with self._path.open("r+b") as file:
            for row in new:
                file.seek(row * self._row_bytes)
                file.write(self._waiting[row].view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        self._marks[new] = 1
        self._marks.flush()
        self._waiting.clear()


def _create(path: Path, size: int, *, zeros: bool = False) -> None:
    """A file of zeros; ``zeros``: they take disk space now, so that it does not run out later."""
    with path.open("wb") as file:
        if zeros:
            file.write(bytes(size))
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is damaged or of something else: {why}; delete the folder {path.parent}, and the "
        "teacher runs again"
    )
