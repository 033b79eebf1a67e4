"""Teachers that come with the package: small files, what they score, how they were made.

    python -m optima_fast.demo.teachers --task snli_ve --to optima_fast/demo

trains a teacher as the trainer does, on one thread, and writes ``TASK_teacher.safetensors``
(bfloat16) and ``TASK_teacher.json`` beside it; the same command gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optima_fast.entry import Parser, guarded
from optima_fast.errors import UserError

HERE = Path(__file__).resolve().parent
LICENCE = (
    "Apache-2.0; trained on canvases drawn from scikit-learn's handwritten digits "
    "(UCI Optical Recognition of Handwritten Digits, CC BY 4.0)"
)


def files(task: str, folder: Path | None = None) -> tuple[Path, Path]:
    """Where the weights of a task's teacher are, and what is known of it."""
    folder = folder or HERE
    return folder / f"{task}_teacher.safetensors", folder / f"{task}_teacher.json"


def packaged(task: str) -> bool:
    """Whether a teacher of the task comes with the package."""
    return files(task)[1].is_file()


def card(task: str) -> dict[str, Any]:
    """What is known of the packaged teacher: its metric, its digest, how it was made."""
    from optima_fast.training import checkpoints

    known: dict[str, Any] = checkpoints.read_json(files(task)[1])
    return known


def unpack(task: str, folder: Path) -> None:
    """Lay the packaged teacher into ``folder`` as a run that ``--teacher`` takes.

    Raises:
        UserError: the file is not there or not the one that was packaged, or the folder cannot be
            written.
    """
    from optima_fast.training import TrainConfig, checkpoints
    from optima_fast.training.flags import to_yaml
    from optima_fast.training.run import Run

    weights, known, run = files(task)[0], card(task), Run(folder)
    try:
        data = weights.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {weights}: {error.strerror}; {_WAY_OUT}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != known["sha256"]:
        raise UserError(
            f"{weights} is damaged: its SHA-256 is {digest}, not {known['sha256']}; {_WAY_OUT}"
        )
    checkpoints.write_atomically(run.weights_path, lambda file: file.write(data))
    checkpoints.write_json(run.model_path, known["model"])
    checkpoints.write_text(run.config_path, to_yaml(TrainConfig(**known["settings"])))


_WAY_OUT = "install the package again, or train a teacher with --teacher-steps 1000"


def make(task: str, to: Path, **settings: Any) -> Path:
    """Train a teacher and pack it; the file that says what is known of it.

    Args:
        task: what it answers.
        to: a folder for the two files.
        settings: of :class:`optima_fast.training.TrainConfig`, over the defaults.

    Raises:
        UserError: as a run of these settings.
    """
    from optima_fast.training import (
        Display,
        TrainConfig,
        checkpoints,
        experiment,
        resolve,
        teachers,
    )

    given: dict[str, Any] = {"task": task, "threads": 1, "device": "cpu", **settings}
    own = teachers.teacher_config(resolve(TrainConfig(**given)))
    out = str(Path("runs") / f"teacher-{task}")
    run, summary = experiment.run(dataclasses.replace(own, out=out), Display())
    config = run.config()
    data = experiment.load_data(config)
    model = run.load_model(data)
    short = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(short)
    rounded = data.evaluate(model, data.test)[data.metric_name]
    weights, about = files(task, to)
    checkpoints.save_state(weights, short)
    # where and how it ran is not what it is
    place: dict[str, Any] = {"out": None, "cache": None, "threads": 0, "device": "auto"}
    known = {
        "task": task,
        "metric": data.metric_name,
        "test_split": {"float32": summary["student_metric"], "bfloat16": rounded},
        "test_examples": len(data.test),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "command": f"python -m optima_fast.demo.teachers --task {task} --steps {config.steps}",
        "versions": dict(summary["versions"]),
        "licence": LICENCE,
        "settings": dataclasses.asdict(dataclasses.replace(config, **place)),
        "model": checkpoints.read_json(run.model_path),
    }
    checkpoints.write_json(about, known)
    return about


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    from optima_fast.demo.pair import TASKS

    parser = Parser(
        prog="python -m optima_fast.demo.teachers", description="Train a teacher and pack it."
    )
    parser.add_argument("--task", choices=TASKS, default=TASKS[0])
    parser.add_argument("--steps", type=int, metavar="N", help="default the trainer's")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args(argv)
    about = make(arguments.task, arguments.to, teacher_steps=arguments.steps)
    print(f"wrote {about}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
