"""Files that are whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from optima_fast.errors import UserError
from optima_fast.training import ranks

DIGEST = "sha256"  # in the metadata of a file of weights
KEEP = 2  # checkpoints of a run; the one before the newest survives a damaged newest


class Damaged(UserError):
    """A checkpoint that is not what was written."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write`` on a temporary file beside ``path``, flush it to disk and rename it.

    Of the processes of a run the first does so.

    Raises:
        UserError: the disk is full, or the folder cannot be written; ``path`` is as it was.
    """
    if not ranks.is_first():
        return
    # two runs may write the same file: the teacher that both need
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
        why = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot save {path}: {why}; earlier files are intact") from error


def write_text(path: Path, text: str) -> None:
    """:func:`write_atomically` of UTF-8 text."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: object) -> None:
    """:func:`write_atomically` of indented JSON; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in ``path``.

    Raises:
        UserError: no such file, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def save_weights(path: Path, model: nn.Module) -> None:
    """The model's parameters and buffers as safetensors."""
    save_state(path, model.state_dict())


def save_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """A state dict as safetensors, in the flavour that other readers take for PyTorch's.

    Its metadata hold a digest, since a bit that turned over in a weight is a weight too.
    """
    found = ranks.whole(dict(state))
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    data = safetensors.torch.save(plain, {"format": "pt", DIGEST: _sha256(plain)})
    # the library writes metadata in any order; equal weights are to be equal files
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    write_atomically(path, lambda file: file.write(head) and file.write(data[start:]))


def load_weights(path: Path, model: nn.Module) -> None:
    """Strictly load what :func:`save_weights` wrote.

    Raises:
        UserError: no such file, a damaged one, or weights of another model.
    """
    state = read_weights(path)
    _check_shapes(path, model, {name: value.shape for name, value in state.items()})
    model.load_state_dict(state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """What :func:`save_weights` wrote.

    Raises:
        UserError: no such file, or a damaged one.
    """
    with _reading(path), safetensors.safe_open(path, framework="pt") as file:
        recorded = (file.metadata() or {}).get(DIGEST)
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if recorded is not None and recorded != _sha256(state):
        raise UserError(
            f"{path} is damaged: its weights are not those that were written; take a copy of it, "
            "or train again"
        )
    return state


def check_weights(path: Path, model: nn.Module) -> None:
    """Raise as :func:`load_weights` would; only names and shapes are read.

    Raises:
        UserError: no such file, a damaged one, or weights of another model.
    """
    with _reading(path), safetensors.safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    _check_shapes(path, model, shapes)


def digest(model: nn.Module) -> str:
    """SHA-256 of the model's parameters and buffers."""
    return _sha256(model.state_dict(), ordered=False)


def _sha256(state: Mapping[str, Tensor], *, ordered: bool = True) -> str:
    """Of names and values; ``ordered``: by name, as files do not keep an order."""
    total = hashlib.sha256()
    for name in sorted(state) if ordered else state:
        values: Any = state[name].detach().cpu().reshape(-1).view(torch.uint8).numpy()
        total.update(name.encode())
        total.update(values)
    return total.hexdigest()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"no weights at {path}") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error


def _check_shapes(path: Path, model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    own = model.state_dict()
    missing = sorted(own.keys() - shapes.keys())
    extra = sorted(shapes.keys() - own.keys())
    other = sorted(n for n in own.keys() & shapes.keys() if [*own[n].shape] != [*shapes[n]])
    problems = [
        f"{len(names)} {what} (first {names[0]!r})"
        for what, names in (("missing", missing), ("unexpected", extra), ("of other shape", other))
        if names
    ]
    if problems:
        raise UserError(f"{path} holds the weights of another model: {', '.join(problems)}")


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write ``folder/step-XXXXXXXX.pt`` and delete all but the newest :data:`KEEP`.

    ``state`` holds tensors and plain Python values only, so that it can be read back without
    running code from the file.
    """
    path = folder / f"step-{step:08d}.pt"
    write_atomically(path, lambda file: torch.save(dict(state), file))
    for old in found(folder)[:-KEEP] if ranks.is_first() else ():
        old.unlink(missing_ok=True)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in ``folder``, if there is one."""
    return next(reversed(found(folder)), None)


def found(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, by step."""
    return sorted(folder.glob("step-????????.pt")) if folder.is_dir() else []


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed.

    Raises:
        Damaged: the file is truncated, damaged or no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not compare the checksums
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or ["truncated"])[0][:160]
        raise Damaged(f"checkpoint {path} is damaged ({reason})") from error
    return state
