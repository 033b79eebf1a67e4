"""Images without captions that the teacher captions, to train on beside the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.models.task_model import TaskModel
from optima_fast.tasks import Split, TaskData, tokenizers
from optima_fast.tasks.images import FolderImages, Preprocessing
from optima_fast.tasks.split import ArrayImages
from optima_fast.training import checkpoints, predicting, ranks
from optima_fast.training.display import Display

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def files(folder: str) -> list[Path]:
    """The images below a folder, by their paths.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"--extra-images {folder} is no folder")
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"--extra-images {folder} holds no image ({', '.join(SUFFIXES)})")
    return found


def extended(
    data: TaskData,
    folder: str,
    kept: Path,
    teacher: TaskModel,
    *,
    device: torch.device,
    display: Display,
) -> TaskData:
    """The task with the folder's images in its training split, as the teacher captions them.

    Args:
        data: captioning.
        folder: the images.
        kept: a file of the captions, which is read if it is there: they are made once.
        teacher: writes them, greedily.
        device: where it is.
        display: what the user sees.

    Raises:
        UserError: the captions that are kept are of other images or of another teacher.
    """
    paths, digest = files(folder), checkpoints.digest(teacher)
    names = [str(path.relative_to(folder)) for path in paths]
    if ranks.of_first(kept.is_file):
        before = checkpoints.read_json(kept)
        if before["teacher"] != digest or list(before["captions"]) != names:
            raise UserError(
                f"{kept} has the captions of other images than those of {folder}, or of another "
                "teacher: put them back as they were, or start over in another --out"
            )
        captions = list(before["captions"].values())
    else:
        images = _images(data.train, paths)
        empty = torch.zeros(len(paths), 1, dtype=torch.int64)
        split = Split(
            images, empty, torch.arange(len(paths)), references=[[""]] * len(paths),
            name="extra", workers=data.train.workers, image_errors=data.train.image_errors,
        )  # fmt: skip
        captions = list(predicting.predict(data, teacher, split, device).texts)
        said = {"teacher": digest, "captions": dict(zip(names, captions, strict=True))}
        checkpoints.write_json(kept, said)
    used = [i for i, caption in enumerate(captions) if caption]
    display.note(f"{len(used)} images of {folder}, captioned by the teacher, are trained on too")
    if not used:
        return data
    chosen, texts = [paths[i] for i in used], [captions[i] for i in used]
    return dataclasses.replace(data, train=_with(data, chosen, texts))


def _with(data: TaskData, paths: Sequence[Path], captions: Sequence[str]) -> Split:
    """The training split and these images after it, each with its caption in a run of its own."""
    train = data.train
    assert train.references is not None
    text = tokenizers.encode(data.tokenizer, captions, data.text_length, "extra")
    index = len(train.images) + torch.arange(len(paths))
    return Split(
        _images(train, paths, train.images),
        torch.cat([train.text, text.repeat_interleave(train.group, 0)]),
        torch.cat([train.image_index, index.repeat_interleave(train.group)[:, None]]),
        references=[*train.references, *([caption] for caption in captions)],
        group=train.group,
        name=train.name,
        workers=train.workers,
        image_errors=train.image_errors,
    )


def _images(
    like: Split, paths: Sequence[Path], before: object = None
) -> FolderImages | ArrayImages:
    """The files as the images of a split are read, after ``before``, which are those."""
    images = like.images
    if isinstance(images, FolderImages):
        first = images.paths if before is images else ()
        return FolderImages([*first, *paths], images.preprocessing)
    assert isinstance(images, ArrayImages)
    levels = torch.stack([_levels(path, images.levels) for path in paths])
    if before is images:
        levels = torch.cat([images.levels, levels])
    return ArrayImages(levels, mean=images.mean, std=images.std)


def _levels(path: Path, like: Tensor) -> Tensor:
    """A file in the size and the channels of the built-in images, uint8 ``[C, S, S]``."""
    pixels = Preprocessing(like.shape[-1], resize="squash").read(path)
    if like.shape[1] == 1:
        pixels = pixels.mean(0, keepdim=True)
    return (255 * pixels).round().to(torch.uint8)
