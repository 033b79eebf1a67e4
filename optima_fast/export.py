"""``python -m optima_fast.export RUN --to FOLDER``: write a run's student as open_clip reads it.

The folder holds open_clip_config.json and open_clip_model.safetensors, for open_clip
(``local-dir:FOLDER``, or uploaded ``hf-hub:ORG/NAME``) and for ``--teacher`` and ``--student-init``
here. The task's head is not part of it, as open_clip has none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from optima_fast.entry import Parser, guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    from optima_fast.errors import UserError
    from optima_fast.models import open_clip, pretrained
    from optima_fast.training import checkpoints, sources
    from optima_fast.training.display import Display

    parser = Parser(
        prog="python -m optima_fast.export", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument(
        "source", metavar="RUN", help="a run folder, or a checkpoint's file, folder or hf-hub: name"
    )
    parser.add_argument("--to", metavar="FOLDER", type=Path, required=True, help="new or empty")
    arguments = parser.parse_args(argv)
    source, folder = sources.find(arguments.source, "RUN"), arguments.to
    if not source.trained:
        raise UserError(f"{source.name} is a preset, which has no weights: give a run folder")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--to {folder} must be new or an empty folder, and it is neither")
    try:
        described = open_clip.model_cfg(source.config)
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from None
    pixels = {"mean": pretrained.MEAN, "std": pretrained.STD, "resize": "shortest"}
    if source.checkpoint is not None:
        pixels |= {"mean": source.checkpoint.mean, "std": source.checkpoint.std}
    elif source.run is not None:
        pixels |= source.run.pixels()
    weights, config = (
        folder / name for name in (pretrained.WEIGHT_FILES[0], pretrained.CONFIG_FILE)
    )
    checkpoints.save_state(weights, open_clip.to_open_clip(source.load()))
    checkpoints.write_json(
        config,
        {
            "model_cfg": described,
            "preprocess_cfg": {
                "mean": pixels["mean"],
                "std": pixels["std"],
                "interpolation": "bicubic",
                "resize_mode": pixels["resize"],
            },
        },
    )
    display = Display()
    display.note(f"wrote {config} and {weights.name}; open_clip.create_model('local-dir:{folder}')")
    if source.run is not None:
        display.note("without the task's head, which open_clip does not have")
        tokenizer = source.run.tokenizer()
        if tokenizer.to_dict()["kind"] != "clip":
            display.note(
                f"its {len(tokenizer)} token ids are those of the run's own tokenizer, not those "
                "of CLIP's, which open_clip would take"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
