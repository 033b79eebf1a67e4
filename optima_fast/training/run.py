"""A run folder: settings, model, metrics, checkpoints, summary."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from optima_fast.errors import UserError
from optima_fast.models import CoCa, CoCaConfig, programs
from optima_fast.models.programs import Exported
from optima_fast.models.task_model import TaskModel, build
from optima_fast.tasks import TaskData, tokenizers
from optima_fast.tasks.images import FolderImages
from optima_fast.tasks.tokenizers import Tokenizer
from optima_fast.training import checkpoints, ranks, spelling
from optima_fast.training.config import CHOICES, OF_A_CHOICE, TrainConfig, flag
from optima_fast.training.flags import read_yaml, to_yaml

try:
    import fcntl
except ImportError:  # not on Windows, where two runs in one folder are not noticed
    fcntl = None  # type: ignore[assignment]

SUMMARY_KEYS = (
    *("task", "data", "method", "arm", "policy", "seed", "steps", "device", "metric_name"),
    *("teacher_metric", "student_metric", "student_metric_before", "majority_metric"),
    *("text_only_metric", "teacher_params", "student_params", "arms", "seconds", "versions"),
)

# settings that say where and how a run executes, or what others amount to, not what it computes
_PLACE = (
    "recipe",
    "out",
    "cache",
    "teacher_cache",
    "teacher_cache_gb",
    "resume",
    "device",
    "threads",
    "workers",
    "image_errors",
    "reward_memory",
    "checkpoint_every",
    "accumulate",
    "recompute",
    "fsdp",
    "max_hours",
    "track",
)


class Run:
    """The files of one run, below one folder.

    Args:
        folder: of the run.
        data: where the data set is now, if not where the run was trained on it.
    """

    def __init__(self, folder: str | Path, data: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.moved = data
        self.config_path = self.folder / "config.yaml"
        self.data_path = self.folder / "data.json"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.summary_path = self.folder / "summary.json"
        self.model_path = self.folder / "model.json"
        self.weights_path = self.folder / "student.safetensors"
        self.teacher_path = self.folder / "teacher.json"
        self.captions_path = self.folder / "captions.json"  # of --extra-images
        self.checkpoints = self.folder / "checkpoints"

    def best_path(self, step: int) -> Path:
        """The student of a step that was the best so far."""
        return self.checkpoints / f"best-{step:08d}.safetensors"

    def exists(self) -> bool:
        return self.config_path.is_file()

    def finished(self) -> bool:
        return self.summary_path.is_file() and self.weights_path.is_file()

    def exported(self) -> bool:
        """Whether this is a student taken out of its run, without the record of its training."""
        return self.model_path.is_file() and not self.metrics_path.is_file()

    def config(self) -> TrainConfig:
        """The resolved settings the run was started with, its data where it is now.

        Raises:
            UserError: there is no run, its file is damaged, or the built-in data is said to have
                moved.
        """
        if not self.exists():
            raise UserError(f"{self.folder} holds no run (no config.yaml)")
        config = TrainConfig(**spelling.modern(read_yaml(self.config_path)))
        if self.moved is None:
            return config
        if config.data == "digits":
            raise UserError(
                f"{self.folder} is a run on the built-in data: leave --data {self.moved} out"
            )
        return dataclasses.replace(config, data=str(self.moved))

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds.

        Raises:
            UserError: the run is not finished, or the file is damaged.
        """
        if self.exists() and not self.summary_path.is_file():
            raise UserError(f"{self.folder} is not finished: there is no summary.json yet")
        value = checkpoints.read_json(self.summary_path)
        missing = [k for k in SUMMARY_KEYS if k not in value] if isinstance(value, dict) else ["{"]
        if missing:
            raise UserError(f"{self.summary_path} is no summary of a run: no {missing[0]!r}")
        return spelling.modern_summary(value)

    def metric_name(self) -> str:
        return str(self.summary()["metric_name"])

    @contextlib.contextmanager
    def held(self, *, wait: bool = False) -> Iterator[None]:
        """Keep the folder, created if need be, to this process; of several, to the first.

        Raises:
            UserError: the folder cannot be written, or (unless ``wait``) another process has it.
        """
        if not ranks.is_first():
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}") from error
        if fcntl is None:
            yield
            return
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            for litter in self.folder.rglob(".*.partial"):
                litter.unlink(missing_ok=True)
            yield
        except BlockingIOError as error:
            raise UserError(f"{self.folder} is in use by another process") from error
        finally:
            os.close(handle)

    def begin(self, config: TrainConfig) -> None:
        """Create the folder and write the settings."""
        checkpoints.write_text(self.config_path, to_yaml(config))

    def remember(self, data: TaskData) -> None:
        """Write what tells the data from any other."""
        checkpoints.write_json(self.data_path, _parts(data))

    def data(self) -> dict[str, dict[str, Any]]:
        """The number of examples and a hash of each split, by name; {} where it is not known."""
        value: dict[str, dict[str, Any]] = {}
        return checkpoints.read_json(self.data_path) if self.data_path.is_file() else value

    def remember_teacher(self, teacher: Run) -> None:
        """Write where the teacher is, so that both can be asked later."""
        checkpoints.write_json(self.teacher_path, {"run": str(teacher.folder.absolute())})

    def teacher(self) -> Run | None:
        """The run whose student was the teacher, there or not; ``None`` where it is not known.

        Raises:
            UserError: the file that names it is damaged.
        """
        if not self.teacher_path.is_file():
            return None
        value = checkpoints.read_json(self.teacher_path)
        if not isinstance(value, dict) or not isinstance(value.get("run"), str):
            raise UserError(f"{self.teacher_path} names no run: delete it")
        return Run(value["run"])

    def check_data(self, data: TaskData) -> None:
        """Raise if there is a checkpoint to go on from that was trained on other data.

        Raises:
            UserError: naming the first split that differs and its sizes.
        """
        if checkpoints.latest_checkpoint(self.checkpoints) is None or not self.data_path.is_file():
            return
        before = checkpoints.read_json(self.data_path)
        for name, part in _parts(data).items():
            if before.get(name) != part:
                raise UserError(
                    f"{self.folder} was begun on other data: {before[name]['examples']} {name} "
                    f"examples then, {part['examples']} now, and not the same texts, answers and "
                    "images; put the data back as it was, or start over in another --out"
                )

    def check_same(self, config: TrainConfig) -> None:
        """Raise if ``config`` would compute something else than this run.

        Raises:
            UserError: naming the first setting that differs and both values.
        """
        before = self.computed_by(dataclasses.asdict(self.config()))
        for name, value in self.computed_by(dataclasses.asdict(config)).items():
            if before.get(name) != value:
                raise UserError(
                    f"{self.folder} holds a run of another configuration: {flag(name)} was "
                    f"{before.get(name)} there and is {value} now; take the same value, or another "
                    "--out"
                )

    @staticmethod
    def computed_by(settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that the result depends on."""
        other = _PLACE if settings["method"] in CHOICES else (*_PLACE, *OF_A_CHOICE)
        found = {name: value for name, value in settings.items() if name not in other}
        if settings["teacher_cache"] is None or settings["teacher_cache_dtype"] == "fp32":
            # a teacher's records in float32 are those that it gives itself
            found["teacher_cache_dtype"] = "fp32, or no --teacher-cache"
        return found

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one JSON line to metrics.jsonl."""
        if not ranks.is_first():
            return
        text = json.dumps(_plain(line), allow_nan=False)
        try:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.metrics_path}: {error.strerror}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl.

        Raises:
            UserError: there is none, or a line is not JSON.
        """
        try:
            text = self.metrics_path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise UserError(f"cannot read {self.metrics_path}: {error.strerror}") from error
        lines = []
        for position, line in enumerate(text.splitlines(), 1):
            try:
                lines.append(json.loads(line))
                if not isinstance(lines[-1], dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise UserError(f"{self.metrics_path}, line {position}: {error}") from error
        return lines

    def metrics_size(self) -> int:
        return self.metrics_path.stat().st_size if self.metrics_path.exists() else 0

    def truncate_metrics(self, size: int) -> None:
        """Drop what was logged after the checkpoint that a run goes on from."""
        if ranks.is_first() and self.metrics_size() > size:
            os.truncate(self.metrics_path, size)

    def save_model(self, model: TaskModel, data: TaskData, config: TrainConfig) -> None:
        """Write ``student.safetensors`` and ``model.json``, enough to build the model again."""
        checkpoints.save_weights(self.weights_path, model)
        checkpoints.write_json(
            self.model_path,
            {
                "format": 1,
                "task": config.task,
                "head": data.head,
                "num_classes": data.num_classes,
                "classes": list(data.classes),
                "coca": model.coca.config.to_dict(),
                "tokenizer": data.tokenizer.to_dict(),
                "text_length": data.text_length,
                "pixels": pixels_of(data),
            },
        )

    def model_config(self) -> CoCaConfig:
        """The shape of the run's student."""
        return CoCaConfig.from_dict(self._described("coca"))

    def tokenizer(self) -> Tokenizer:
        """What turned texts into the ids that the run's student knows."""
        return tokenizers.from_dict(self._described("tokenizer"))

    def reading(self) -> dict[str, Any]:
        """Options of a data folder's reader: images and texts as the run's student knows them."""
        return {
            "image_size": self.model_config().image_size,
            "text_length": self._described("text_length"),
            "tokenizer": self.tokenizer(),
            **self.pixels(),
        }

    def pixels(self) -> dict[str, Any]:
        """What the pixels of files were normalised with: mean, std and resize; {} for digits."""
        known: dict[str, Any] = self._described("pixels")
        return {name: tuple(v) if isinstance(v, list) else v for name, v in known.items()}

    def task(self) -> str:
        """What the run's student was trained to do."""
        return str(self._described("task"))

    def classes(self) -> tuple[str, ...]:
        """The classes or answers of its logits, in order; () for captions."""
        return tuple(self._described("classes"))

    def load_coca(self) -> CoCa:
        """The run's student without its head."""
        return self.load_weights().coca

    def load_student(self) -> TaskModel | Exported:
        """The run's student to be asked, from its weights or the program that it was exported as.

        Raises:
            UserError: its files are missing or damaged.
        """
        program = self._program()
        if program is None:
            return self.load_weights()
        images = 2 if self._described("head") == "pair" else 1
        length, pad_id = self._described("text_length"), self.model_config().pad_id
        return programs.read(program, images, length, pad_id)

    def load_weights(self) -> TaskModel:
        """The run's student, from its weights alone.

        Raises:
            UserError: they are missing or damaged.
        """
        model = self._build()
        checkpoints.load_weights(self.weights_path, model)
        return model

    def check_weights(self) -> None:
        """Raise unless the weights are there, whole, and those of the model that is described.

        Raises:
            UserError: they are not; their values are not looked at.
        """
        with torch.device("meta"):
            model = self._build()
        checkpoints.check_weights(self.weights_path, model)

    def _program(self) -> Path | None:
        """The program that the student was exported as, if this is such a folder."""
        paths = (self.folder / name for name in programs.FILES.values())
        return next((path for path in paths if path.is_file()), None)

    def _build(self) -> TaskModel:
        program = self._program()
        if program is not None:
            raise UserError(
                f"{self.folder} holds {program.name}, a program that can only be asked: give the "
                "run that it was exported from, or export that --to safetensors"
            )
        head, classes = self._described("head"), self._described("num_classes")
        return build(self.model_config(), head, classes)

    def _described(self, key: str) -> Any:
        if self.exists() and not self.model_path.is_file():
            raise UserError(
                f"{self.folder} is not finished: there is no {self.model_path.name} yet; go on "
                f"with it by --resume {self.folder}"
            )
        described = checkpoints.read_json(self.model_path)
        if not isinstance(described, dict) or key not in described:
            raise UserError(f"{self.model_path} does not describe a model: no {key!r}")
        return described[key]

    def load_model(self, data: TaskData) -> TaskModel:
        """The run's model for ``data``.

        Raises:
            UserError: as :meth:`check_fits`, or its weights are missing or damaged.
        """
        self.check_fits(data)
        return self.load_weights()

    def check_fits(self, data: TaskData) -> None:
        """Raise unless the run's student was trained for this task, tokenizer and images.

        Raises:
            UserError: it was not, or the file that describes it is missing or damaged.
        """
        task, head, classes = self.task(), self._described("head"), self._described("num_classes")
        coca, tokenizer = self.model_config(), self.tokenizer()
        if (task, head) != (data.task, data.head):
            raise UserError(
                f"{self.folder} holds a model for {task} ({head} head), not for {data.task} "
                f"({data.head} head): take a run of {data.task}"
            )
        if self.classes() != data.classes:
            raise UserError(
                f"{self.folder} was trained on other classes or answers ({classes}) than those of "
                f"the data ({data.num_classes}): use the same --data and --data-seed"
            )
        shape = (coca.image_size, coca.image_channels)
        if shape != (data.image_size, data.channels) or coca.text_length < data.text_length:
            raise UserError(
                f"{self.folder} holds a model for (image size, channels, text length) "
                f"{(*shape, coca.text_length)}, not for the data's "
                f"{(data.image_size, data.channels, data.text_length)}"
            )
        if tokenizer.to_dict() != data.tokenizer.to_dict():
            raise UserError(
                f"{self.folder} was trained with another tokenizer ({len(tokenizer)} ids "
                f"against {len(data.tokenizer)}): use the same --data and --data-seed"
            )


def _parts(data: TaskData) -> dict[str, Any]:
    return {
        part.name: {"examples": len(part), "sha256": part.digest()}
        for part in (data.train, data.validation, data.test)
    }


def pixels_of(data: TaskData) -> dict[str, Any]:
    """What the pixels of files are normalised with: mean, std and resize; {} for digits."""
    images = data.train.images
    if not isinstance(images, FolderImages):
        return {}
    chosen = images.preprocessing
    return {"mean": list(chosen.mean), "std": list(chosen.std), "resize": chosen.resize}


def _plain(value: Any) -> Any:
    """Numbers that JSON lacks (NaN, infinity) as None, at any depth."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
