"""JSON files and files of JSON lines, each entry checked and named in messages.

A byte order mark, which editors on Windows write, is no part of a text here or elsewhere.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from optima_fast.errors import UserError

Entry = dict[str, Any]


def entries(
    path: Path, key: str, shrink: Callable[[Entry], Any] | None = None
) -> Iterator[tuple[Entry, str]]:
    """The objects of the list `key` in a JSON file, each with its name for messages.

    Args:
        path: The file.
        key: Of the list.
        shrink: Applied to every object while the file is read, the inner ones first: millions of
            small objects take gigabytes.

    Raises:
        UserError: No such file, or not a JSON object with such a list.
    """
    return named(document(path, shrink), key, path)


def document(path: Path, shrink: Callable[[Entry], Any] | None = None) -> Any:
    """What a JSON file holds; `shrink` as in `entries`.

    Raises:
        UserError: No such file, not UTF-8, not JSON.
    """
    with _reading(path):
        text = path.read_text(encoding="utf-8-sig")
    try:
        return json.loads(text, object_hook=shrink)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error


def named(content: Any, key: str, path: Path) -> Iterator[tuple[Entry, str]]:
    """The objects of the list `key` of a document, each with its name for messages.

    Raises:
        UserError: The document is not an object with such a list, or an entry is no object.
    """
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise UserError(f"{path} must be a JSON object with a list {key!r}")
    for number, entry in enumerate(content[key]):
        where = f"{path}, {key}[{number}]"
        yield an_object(entry, where), where


def lines(path: Path) -> Iterator[tuple[Entry, str]]:
    """The objects of a file of JSON lines, each with its name for messages.

    Raises:
        UserError: No such file, or a line that is not a JSON object.
    """
    with _reading(path), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if line.strip():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where}: not valid JSON ({error.msg})") from error
                yield an_object(entry, where), where


def an_object(entry: Any, where: str) -> Entry:
    """`entry`, which must be a JSON object.

    Raises:
        UserError: It is none.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be a JSON object, got {type(entry).__name__}")
    return entry


def get(entry: Entry, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """The value of `key`, which must be there and of one of the types `kind`.

    Raises:
        UserError: It is missing or of another type; true and false are no numbers.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = " or ".join(k.__name__ for k in kinds)
    if key not in entry:
        raise UserError(f"{where}: {key!r} is missing, it must be of type {wanted}")
    value = entry[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(f"{where}: {key!r} must be of type {wanted}, got {value!r:.40}")
    return value


def once(value: object, seen: Any, what: str, where: str) -> None:
    """Refuse an id that was seen before.

    Raises:
        UserError: `value` is in `seen`.
    """
    if value in seen:
        raise UserError(f"{where}: {what} {value} is there a second time")


def choice(name: str, names: Sequence[str], key: str, where: str) -> int:
    """The place of `name` among `names`.

    Raises:
        UserError: It is none of them.
    """
    if name not in names:
        raise UserError(f"{where}: {key!r} must be one of {', '.join(names)}, got {name!r}")
    return names.index(name)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: the data set is not complete") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
