"""What a data folder holds beside what it should, before anything trains."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from optima_fast.errors import UserError, unknown
from optima_fast.tasks import folders, shards
from optima_fast.tasks.annotations import (
    READERS,
    ImageFile,
    Listing,
    Reading,
    Readings,
)
from optima_fast.tasks.downloads import DOWNLOADS, NOUNS, SIZES, Download, Size
from optima_fast.tasks.images import Preprocessing


@dataclass(frozen=True)
class Part:
    """One split of a folder.

    Attributes:
        name: Of the split.
        files: Annotation files that were read.
        examples: Questions, captions, pairs or sentences with all that is needed of them.
        size: What the official split has; None where it is not known.
        left_out: Entries that are no examples, by what they are.
        images: Distinct images that the examples name.
        absent: Files of those that are not there.
        broken: Of a sample that was decoded, why an image cannot be.
        decoded: Size of that sample.
    """

    name: str
    files: tuple[Path, ...]
    examples: int
    size: Size | None
    left_out: dict[str, int]
    images: int
    absent: list[Path]
    broken: list[str] = field(default_factory=list)
    decoded: int = 0


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        task, root: Of what.
        parts: The splits whose annotations could be read.
        problems: Why no run can start; each a sentence.
        notes: What a user should know otherwise.
        downloads: What is missing, where it comes from.
    """

    task: str
    root: Path
    parts: list[Part]
    problems: list[str]
    notes: list[str]
    downloads: list[Download]


def inspect(task: str, root: Path, *, decode: int = 0) -> Report:
    """Read every split of a folder and look for the images it names.

    Args:
        task: "vqa", "snli_ve", "nlvr2" or "coco".
        root: The folder, or tar shards for "coco".
        decode: How many images of each split to decode, spread evenly; -1 for all.

    Raises:
        UserError: An unknown task.
    """
    if task not in READERS:
        raise unknown("task", task, READERS)
    listing = Listing()
    problems: list[str] = []
    notes: list[str] = []
    parts: list[Part] = []
    usable = {}
    found: Readings = {}
    try:
        found = folders.readings(task, root, listing)
        if "train" not in found:
            problems.append(folders.no_training(task, root))
    except UserError as error:
        problems.append(str(error))
    for name in (*folders.SPLITS, *folders.FURTHER.get(task, ())):
        if name not in found:
            continue
        needed = name in folders.SPLITS
        try:
            reading = found[name]()
            parts.append(_part(task, name, reading, listing, decode))
            there = folders.present(reading, name, root, listing)
            if needed:
                usable[name] = there
        except UserError as error:
            (problems if needed else notes).append(str(error))
    if not problems:
        try:
            _, divided = folders.arrange(usable, root, 0, folders.Options())
            notes += [divided] if divided else []
        except UserError as error:
            problems.append(str(error))
    for part in parts:
        if part.broken:
            problems.append(
                f"{len(part.broken)} of {part.decoded} images of {part.name} cannot be decoded, "
                f"the first: {part.broken[0]}"
            )
    return Report(task, root, parts, problems, notes, list(_missing(task, root, parts)))


def lines(report: Report) -> Iterator[str]:
    """The report as text for a terminal."""
    noun = NOUNS[report.task]
    yield f"{report.task} in {report.root}"
    rows = [["split", noun, "official", "images", "official", "not there"]]
    for part in report.parts:
        size = part.size or Size(-1, None)
        counts = [part.examples, size.examples, part.images, size.images, len(part.absent)]
        rows.append([part.name, *("-" if c is None or c < 0 else f"{c:,}" for c in counts)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if report.parts:
        for row in rows:
            cells = zip(row[1:], widths[1:], strict=True)
            yield "  ".join([f"  {row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in cells)])
    for part in report.parts:
        first = f"{part.files[0]}" + (f" and {len(part.files) - 1} more" * (len(part.files) > 1))
        yield f"{part.name}: read {first}" + "".join(
            f"; {count:,} {what} left out" for what, count in part.left_out.items()
        )
        if part.absent:
            yield f"{part.name}: {len(part.absent):,} images are not there, first {part.absent[0]}"
        if part.decoded:
            whole = part.decoded - len(part.broken)
            yield f"{part.name}: {whole:,} of {part.decoded:,} images decoded"
    yield from (f"note: {note}" for note in report.notes)
    if report.downloads:
        yield "to download:"
        for download in report.downloads:
            to = f", into {download.folder}" if download.folder else ""
            yield f"  {download.url}  ({download.size}{to})"
    yield from (f"problem: {problem}" for problem in report.problems)
    if report.problems:
        yield "a run cannot start"
    elif report.downloads or any(part.absent for part in report.parts):
        yield "a run can start, on the part that is there"
    elif any(part.size and part.examples < part.size.examples for part in report.parts):
        yield "a run can start: complete, smaller than the official set"
    else:
        yield "a run can start"


def _part(task: str, name: str, reading: Reading, listing: Listing, decode: int) -> Part:
    shown = list(dict.fromkeys(image for e in reading.examples for image in e.images))
    absent = [i for i in shown if isinstance(i, Path) and i not in listing]
    there = [image for image in shown if image in listing]
    sample = there if decode < 0 else _spread(there, decode)
    broken = []
    for image in sample:
        try:
            Preprocessing(8).read(image)
        except UserError as error:
            broken.append(str(error))
    sizes = SIZES.get(reading.files[0].name if task == "coco" else task, {})
    return Part(
        name,
        reading.files,
        len(reading.examples),
        sizes.get(name),
        dict(reading.left_out),
        len(shown),
        absent,
        broken,
        len(sample),
    )


def _spread(images: Sequence[ImageFile], number: int) -> list[ImageFile]:
    number = min(number, len(images))
    return [images[i * len(images) // number] for i in range(number)]


def _missing(task: str, root: Path, parts: list[Part]) -> Iterator[Download]:
    """The downloads of splits that a run needs and that are not there, and of absent images.

    Annotations that could be read are whole: fewer than the official ones are somebody's choice.
    """
    read = {part.name: part for part in parts}
    source = task
    if shards.is_shards(str(root)) or (task == "coco" and not parts and any(root.glob("*.tar"))):
        return
    if task == "coco" and parts:
        name = parts[0].files[0].name
        if shards.is_shards(name):
            return
        years = (year for year in ("2017", "2014") if name.endswith(f"{year}.json"))
        source = next((f"coco {year}" for year in years), task)
    # the official test splits of these have no answers to measure by
    needed = dict.fromkeys(("vqa", "coco 2017", "coco 2014"), ("train", "validation"))
    for download in DOWNLOADS[source]:
        for name in download.splits:
            part = read.get(name)
            if part is None:
                wanted = name in needed.get(source, folders.SPLITS)
                lacking = wanted and not (download.folder and (root / download.folder).is_dir())
            else:
                folder = Path(download.folder).name
                lacking = bool(download.folder) and any(
                    task != "coco" or image.parent.name == folder for image in part.absent
                )
            if lacking:
                yield download
                break
