"""``python -m optima_fast.export RUN --to FORMAT``: write a run's student in another format.

Each format is a folder. What was written is read back and compared with the student before the
folder gets its name. Its README.md, the model card, is written from the run.

open_clip     open_clip_config.json and open_clip_model.safetensors, for open_clip, and for
              --teacher and --student-init here; without the task's head, which open_clip lacks
safetensors   the student and its description: a run folder without checkpoints
torch-export  the same, with the student as a program, student.pt2, for torch.export.load
onnx          the same, with student.onnx, for onnxruntime (needs the extra [export])
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optima_fast.entry import Parser, guarded
from optima_fast.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import nn

    from optima_fast.models.task_model import TaskModel
    from optima_fast.training.config import TrainConfig
    from optima_fast.training.run import Run
    from optima_fast.training.sources import Source

FORMATS = ("open_clip", "safetensors", "torch-export", "onnx")
# how far a logit may be from the student's, as a part of the largest one
TOLERANCE = 1e-4
ROWS = (1, 6)  # of the batches that are compared


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m optima_fast.export",
        description=(__doc__ or "").partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="RUN",
        help="a run folder; for open_clip also a checkpoint: a file, a folder or an hf-hub: name",
    )
    parser.add_argument("--to", metavar="FORMAT", required=True, help=", ".join(FORMATS))
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="a new or empty folder; default RUN-FORMAT"
    )
    parser.add_argument(
        "--licence",
        default="unknown",
        help="licence of the weights for the model card, such as apache-2.0",
    )
    parser.add_argument(
        "--push-to-hub", metavar="ORG/NAME", help="also upload the folder to the Hugging Face hub"
    )
    parser.add_argument(
        "--private", action="store_true", help="make a new repository on the hub private"
    )
    arguments = parser.parse_args(argv)
    if arguments.private and not arguments.push_to_hub:
        parser.error("--private goes with --push-to-hub ORG/NAME")
    kind = arguments.to
    if kind not in FORMATS:
        hint = f"choose from {', '.join(FORMATS)}; --out FOLDER says where"
        raise unknown("format --to", kind, FORMATS, otherwise=hint)

    from optima_fast.training import card, sources
    from optima_fast.training.display import Display

    if kind == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(name)
    source = sources.find(arguments.source, "RUN")
    if not source.trained:
        raise UserError(f"{source.name} is a preset, which has no weights: give a run folder")
    folder = _place(source, kind, arguments.out)
    if arguments.push_to_hub:
        _check_hub(arguments.push_to_hub)
    with _whole(folder) as partial:
        if kind == "open_clip":
            notes = _open_clip(source, partial)
        elif source.run is not None:
            notes = [_run(source.run, kind, partial)]
        else:
            raise UserError(
                f"{source.name} is a checkpoint without a task's head, for --to open_clip alone: "
                f"give a run folder to export {kind}"
            )
        if source.run is not None and (kind != "open_clip" or source.run.finished()):
            _card(source.run, kind, folder.name, notes[0], arguments.licence, partial)
    display = Display()
    size = sum(path.stat().st_size for path in folder.iterdir())
    display.note(f"wrote {folder}, {size / 1e6:.1f} MB; {notes[0]}")
    for note in notes[1:]:
        display.note(note)
    if arguments.push_to_hub:
        display.note(f"uploaded to {_push(arguments.push_to_hub, folder, arguments.private)}")
    if kind == "open_clip" or source.run is None:
        display.note(f"next: open_clip.create_model('local-dir:{folder}')")
    else:
        asked = card.ASKED[source.run.task()]
        display.note(f"next: python -m optima_fast.predict {shlex.quote(str(folder))} {asked}")
    return 0


def _place(source: Source, kind: str, out: Path | None) -> Path:
    if out is None:
        if source.run is None:
            raise UserError(f"--out FOLDER says where to write what {source.name} becomes")
        run = source.run.folder.resolve()
        out = source.run.folder.with_name(f"{run.name}-{kind}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} must be new or an empty folder, and it is neither")
    return out


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder that gets its name once everything is in it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        partial.chmod(0o755)
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent}: {error.strerror}") from error
    try:
        yield partial
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run(run: Run, kind: str, partial: Path) -> str:
    """Write a run's student as a run folder; how it was checked."""
    from optima_fast.models import programs
    from optima_fast.training import checkpoints
    from optima_fast.training.run import Run

    run.summary()  # raises unless the run is finished
    model, length = run.load_weights().eval(), int(run.reading()["text_length"])
    made = Run(partial)
    made.begin(portable(run.config()))
    for path in (run.model_path, run.summary_path, run.data_path):
        if path.is_file():
            shutil.copyfile(path, made.folder / path.name)
    if kind == "safetensors":
        checkpoints.save_weights(made.weights_path, model)
    else:
        programs.write(kind, partial / programs.FILES[kind], model, length)
    return _compare(model, made.load_student(), length)


def _open_clip(source: Source, partial: Path) -> list[str]:
    """Write a source as open_clip reads it; how it was checked, and what to know."""
    import safetensors.torch

    from optima_fast.models import CoCa, open_clip, pretrained
    from optima_fast.models.heads import CaptionHead
    from optima_fast.models.task_model import TaskModel
    from optima_fast.training import checkpoints

    try:
        described = open_clip.model_cfg(source.config)
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from None
    pixels = {"mean": pretrained.MEAN, "std": pretrained.STD, "resize": "shortest"}
    if source.checkpoint is not None:
        pixels |= {"mean": source.checkpoint.mean, "std": source.checkpoint.std}
    elif source.run is not None:
        pixels |= source.run.pixels()
    chosen = {"mean": pixels["mean"], "std": pixels["std"], "interpolation": "bicubic"}
    chosen["resize_mode"] = pixels["resize"]
    coca = source.load()
    checkpoints.save_state(partial / pretrained.WEIGHT_FILES[0], open_clip.to_open_clip(coca))
    checkpoints.write_json(
        partial / pretrained.CONFIG_FILE, {"model_cfg": described, "preprocess_cfg": chosen}
    )
    state = safetensors.torch.load_file(partial / pretrained.WEIGHT_FILES[0])
    again = CoCa(open_clip.config_of(described, state))
    again.load_state_dict(open_clip.from_open_clip(state, again.config))
    models = [TaskModel(model, CaptionHead()).eval() for model in (coca, again)]
    notes = [_compare(models[0], models[1], source.config.text_length)]
    if source.run is not None:
        notes.append("without the task's head, which open_clip does not have")
        tokenizer = source.run.tokenizer()
        if tokenizer.to_dict()["kind"] != "clip":
            notes.append(
                f"its {len(tokenizer)} token ids are those of the run's own tokenizer, not those "
                "of CLIP's, which open_clip would take"
            )
    return notes


def _compare(model: TaskModel, again: nn.Module, length: int) -> str:
    """What was read again beside the student, on batches of random images and texts.

    Raises:
        UserError: A logit differs by more than rounding, or an answer differs.
    """
    import torch

    from optima_fast.models.heads import PairHead
    from optima_fast.tasks.base import evaluating

    config, furthest, answers = model.coca.config, 0.0, 0
    draw = torch.Generator().manual_seed(0)
    size = (config.image_channels, config.image_size, config.image_size)
    with evaluating(model), evaluating(again):
        for rows in ROWS:
            pairs = 2 * rows if isinstance(model.head, PairHead) else rows
            text = torch.randint(1, config.vocab_size, (rows, length), generator=draw)
            ends = torch.randint(2, length + 1, (rows, 1), generator=draw)
            batch = {
                "images": torch.randn(pairs, *size, generator=draw),
                "text": text.masked_fill(torch.arange(length) >= ends, config.pad_id),
                "pair_image": torch.randperm(pairs, generator=draw),
                "pair_text": torch.arange(rows).repeat_interleave(pairs // rows),
            }
            expected, got = model(batch).logits, again(batch).logits
            if got.shape != expected.shape or not bool(got.isfinite().all()):
                raise UserError(f"what was exported gives {tuple(got.shape)} logits or no numbers")
            apart = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
            differ = int((got.argmax(-1) != expected.argmax(-1)).sum())
            if apart > TOLERANCE or differ:
                raise UserError(
                    f"what was exported is not the student: its logits are off by {apart:.1e} of "
                    f"the largest, and {differ} of {got[..., 0].numel()} answers differ; nothing "
                    "was written"
                )
            furthest, answers = max(furthest, apart), answers + got[..., 0].numel()
    exactly = f"within {furthest:.0e} of the largest" if furthest else "to the last bit"
    return f"checked: the student's logits {exactly}, the same {answers} answers"


def portable(config: TrainConfig) -> TrainConfig:
    """Settings without where things lie on this machine, and what they run on."""
    names = ("data", "teacher", "student", "student_init", "tokenizer", "extra_images")
    given = {name: getattr(config, name) for name in names}
    usual: dict[str, Any] = {
        k: Path(v).name for k, v in given.items() if v and Path(v).expanduser().is_absolute()
    }
    usual |= {"out": None, "cache": None, "resume": "auto"}
    usual |= {"device": "auto", "workers": "auto"}
    return dataclasses.replace(config, **usual)


def _card(run: Run, kind: str, name: str, checked: str, licence: str, partial: Path) -> None:
    from optima_fast.training import card, checkpoints

    text = card.write(
        run, portable(run.config()), name=name, kind=kind, checked=checked, licence=licence
    )
    checkpoints.write_text(partial / "README.md", text)


def _check_hub(repository: str) -> None:
    """Raise unless the name can be one on the hub and somebody is logged in."""
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--push-to-hub must be ORG/NAME, got {repository!r}")
    try:
        HfApi().whoami()
    except Exception as error:
        # the client's errors share no class between its versions
        raise UserError(
            f"--push-to-hub {repository}: {_reason(error)}; 'hf auth login' logs in"
        ) from error


def _push(repository: str, folder: Path, private: bool) -> str:
    """Upload a folder; its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Export of optima_fast"
        )
    except Exception as error:
        raise UserError(
            f"cannot upload to {repository} ({_reason(error)}); {folder} is whole, and "
            f"'hf upload {repository} {folder}' sends it"
        ) from error
    return str(made)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


if __name__ == "__main__":
    sys.exit(main())
