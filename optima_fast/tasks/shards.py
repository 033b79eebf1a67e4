"""Captions and images from WebDataset's tar shards, read by position.

A shard is an uncompressed tar file; members of one key make a sample: `KEY.jpg` (or `.jpeg`,
`.png`, `.webp`) and `KEY.txt`, a caption a line, or `KEY.json` with "caption" or "captions".
Shards are of the split that their name says (`train-000000.tar`, `coco_val_3.tar`), else training
data. The headers of all members are read once, captions with them; images when a batch asks.

WebDataset itself streams, in an order that its workers decide; a run that goes on where it was
stopped needs the images of any step by index. Its naming rules are used: braces and keys.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optima_fast.errors import UserError
from optima_fast.tasks.records import an_object, get

_IMAGES = ("jpg", "jpeg", "png", "webp")
_SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    "test": "test",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar file, opened like a path.

    Attributes:
        tar: The tar file.
        name: The member's name.
        offset: Of its first byte in the tar file.
        size: In bytes.
    """

    tar: Path
    name: str
    offset: int
    size: int

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Its bytes.

        Raises:
            OSError: The tar file cannot be read, or ends before the member does.
        """
        with self.tar.open(mode) as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.tar} ends after {len(content)} of {self.size} bytes")
        return io.BytesIO(content)

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"


@dataclass(slots=True)
class Sample:
    """What members of one key say; `image` is None and `captions` empty where there is none."""

    tar: Path
    key: str
    image: Member | None = None
    captions: list[str] = field(default_factory=list)


def is_shards(data: str) -> bool:
    """Whether `data` names tar files, braces or not, rather than a folder."""
    return data.endswith(".tar")


def by_split(data: Path) -> dict[str, list[Path]]:
    """The shards of each split.

    Args:
        data: A folder with `*.tar` files, one tar file, or a pattern such as
            `shards/train-{000..010}.tar`; `{train,val}` in braces gives several splits.

    Raises:
        UserError: A file of the pattern is not there, or shards are compressed.
    """
    if data.is_dir():
        files = sorted(data.glob("*.tar"))
        packed = [*data.glob("*.tar.gz"), *data.glob("*.tgz")]
        if packed and not files:
            raise UserError(f"{packed[0]} is compressed and cannot be read by position: gunzip it")
    elif is_shards(str(data)):
        from webdataset.shardlists import expand_urls  # type: ignore[import-untyped]

        files = [Path(name) for name in expand_urls(str(data))]
        absent = [file for file in files if not file.is_file()]
        if absent:
            raise UserError(f"{len(absent)} of {len(files)} shards of {data} are not there, the "
                            f"first is {absent[0]}")  # fmt: skip
    else:
        files = []
    found: dict[str, list[Path]] = {}
    for file in files:
        words = re.findall("[a-z]+", file.stem.lower())
        split = next((_SPLITS[word] for word in words if word in _SPLITS), "train")
        found.setdefault(split, []).append(file)
    return found


def samples(files: Iterable[Path]) -> Iterator[Sample]:
    """The samples of tar files, in order; members next to each other with one key are one sample.

    Raises:
        UserError: A file is no complete tar file, or a member with captions is not as it must be.
    """
    for file in files:
        try:
            with tarfile.open(file, "r:") as tar:
                yield from _samples(file, tar)
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{file} is not a complete tar file: {error}") from error
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def _samples(file: Path, tar: tarfile.TarFile) -> Iterator[Sample]:
    from webdataset.tariterators import base_plus_ext  # type: ignore[import-untyped]

    sample = None
    for info in tar:
        key, kind = base_plus_ext(info.name)
        if not info.isfile() or key is None:
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(file, key)
        member = Member(file, info.name, info.offset_data, info.size)
        if kind.lower() in _IMAGES:
            sample.image = member
        elif kind.lower() in ("txt", "json"):
            content = tar.extractfile(info)
            assert content is not None
            sample.captions += _captions(content.read(), kind.lower(), str(member))
    if sample is not None:
        yield sample


def _captions(content: bytes, kind: str, where: str) -> list[str]:
    try:
        text = content.decode("utf-8-sig")
        entry: Any = json.loads(text) if kind == "json" else {"captions": text.splitlines()}
    except ValueError as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    entry = an_object(entry, where)
    given = get(entry, "captions", list, where) if "captions" in entry else []
    if "caption" in entry:
        given = [*given, entry["caption"]]
    for i, caption in enumerate(given):
        if not isinstance(caption, str):
            raise UserError(f"{where}: caption {i} must be text, got {caption!r:.40}")
    return [caption for caption in given if caption.strip()]
