"""Where models come from: a preset's name, a run folder, or a published checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optima_fast.errors import UserError
from optima_fast.models import CoCa, CoCaConfig, initialise, presets, pretrained
from optima_fast.models.pretrained import Checkpoint
from optima_fast.models.task_model import TaskModel, build
from optima_fast.tasks import TaskData, tokenizers
from optima_fast.training.config import TrainConfig
from optima_fast.training.run import Run


@dataclass(frozen=True)
class Source:
    """A model by name: its shape, and its weights where there are any.

    Attributes:
        name: as the user gave it.
        config: the shape.
        run: the run whose student it is.
        checkpoint: the published checkpoint that it is.
    """

    name: str
    config: CoCaConfig
    run: Run | None = None
    checkpoint: Checkpoint | None = None

    @property
    def trained(self) -> bool:
        """Whether there are weights."""
        return self.run is not None or self.checkpoint is not None

    def reading(self, tokenizer: str | None = None) -> dict[str, Any]:
        """Options of a data folder's reader that go with the weights.

        Raises:
            UserError: the tokenizer is not known, or is not the run's.
        """
        if self.run is not None:
            own = self.run.tokenizer()
            if tokenizer is not None and not tokenizers.named(tokenizer, own):
                raise UserError(
                    f"--tokenizer {tokenizer} is not what {self.name} was trained with "
                    f"({own.to_dict()['kind']}, {len(own)} ids): leave --tokenizer out"
                )
            return self.run.reading()
        assert self.checkpoint is not None
        options = {"mean": self.checkpoint.mean, "std": self.checkpoint.std}
        chosen = tokenizer or self.checkpoint.tokenizer
        if not chosen:
            raise UserError(
                f"{self.name} does not say what turned its texts into its "
                f"{self.config.vocab_size} token ids: name it with --tokenizer"
            )
        return {**options, "tokenizer": chosen}

    def load(self) -> CoCa:
        """The CoCa with its weights."""
        if self.checkpoint is not None:
            return self.checkpoint.load()
        assert self.run is not None
        return self.run.load_coca()


def find(name: str, flag: str) -> Source:
    """The model of this name.

    Args:
        name: of a preset, a run folder (or its ``student.safetensors``), a checkpoint file or
            folder, or ``hf-hub:ORG/NAME``.
        flag: where it was given, for messages.

    Raises:
        UserError: it is none of these, or its files are damaged.
    """
    if name in presets.PRESETS:
        return Source(name, presets.PRESETS[name])
    path = Path(name)
    if path.is_file() and path == Run(path.parent).weights_path and Run(path.parent).exists():
        path = path.parent
    if path.is_dir() and Run(path).exists():
        return Source(name, Run(path).model_config(), run=Run(path))
    checkpoint = pretrained.find(name)
    if checkpoint is not None:
        return Source(name, checkpoint.config, checkpoint=checkpoint)
    if path.is_dir():
        raise UserError(
            f"{flag} {name} is a folder with neither a run in it (config.yaml) nor a checkpoint "
            f"({' or '.join(pretrained.WEIGHT_FILES)})"
        )
    if path.exists():
        raise UserError(
            f"{flag} {name} is no checkpoint: those are {', '.join(pretrained.SUFFIXES)}"
        )
    if "/" in name:
        raise UserError(
            f"{flag} {name!r} is no run folder and no checkpoint: there is nothing of that name"
        )
    try:
        return Source(name, presets.get(name))
    except UserError as error:
        raise UserError(f"{flag} {name!r} is no run folder and no checkpoint: {error}") from None


@dataclass(frozen=True)
class Models:
    """The models of a run, before there is data.

    Attributes:
        student: the shape that ``--student`` names, in the form and on the patches that the run
            gives it (see :func:`plan`).
        start: what the student starts from, ``None`` for random weights.
        teacher: ``None`` for ``--method finetune``.
        notes: what the user should know of the student's shape.
    """

    student: CoCaConfig
    start: Source | None
    teacher: Source | None
    notes: tuple[str, ...] = ()

    def _sources(self) -> list[Source]:
        known = [source for source in (self.teacher, self.start) if source is not None]
        return [source for source in known if source.trained]

    def reading(self, config: TrainConfig) -> dict[str, Any]:
        """Options of a data folder's reader: images and texts as these models take them."""
        shapes = [self.student, *([self.teacher.config] if self.teacher else [])]
        options: dict[str, Any] = {"tokenizer": config.tokenizer or "sentencepiece"}
        for source in self._sources()[:1]:
            options = source.reading(config.tokenizer)
        # a student may read images of another size than the run that it starts from
        return options | {
            "image_size": self.student.image_size,
            "max_text_length": min(shape.text_length for shape in shapes),
        }

    def check(self, data: TaskData) -> None:
        """Raise unless the weights are there and were trained on ids like the data's.

        Raises:
            UserError: naming the source, and both sizes.
        """
        if self.teacher is not None and self.teacher.run is not None:
            self.teacher.run.check_fits(data)
        ids = data.tokenizer.to_dict()
        for source in self._sources():
            known = source.config
            if source.run is not None:
                source.run.check_weights()
                if source.run.tokenizer().to_dict() != ids:
                    raise UserError(
                        f"{source.name} was trained with another tokenizer ({known.vocab_size} "
                        f"ids) than that of the data ({len(data.tokenizer)} ids): take a run on "
                        "the same data"
                    )
            if known.vocab_size != len(data.tokenizer):
                raise UserError(
                    f"{source.name} knows {known.vocab_size} token ids, the tokenizer of the data "
                    f"has {len(data.tokenizer)}: leave --tokenizer out, or name its own"
                )

    def check_digits(self) -> None:
        """Raise if a checkpoint, which was trained on photographs, is to read the built-in data."""
        for source in self._sources():
            if source.checkpoint is not None:
                raise UserError(
                    f"{source.name} reads photographs and --data digits is the built-in data of "
                    "small grey canvases: give --data FOLDER with the task's data set"
                )

    def shapes(self, data: TaskData) -> tuple[CoCaConfig, CoCaConfig | None]:
        """Student and teacher in the data's sizes."""
        student = sized(self.student, data, self.start)
        if self.teacher is None:
            return student, None
        return student, sized(self.teacher.config, data, self.teacher)

    def published_teacher(self, data: TaskData) -> TaskModel:
        """The teacher's checkpoint as it is, for a task whose head has no weights."""
        assert self.teacher is not None
        model = build(sized(self.teacher.config, data, self.teacher), data.head, data.num_classes)
        initialise.from_layers(model.coca, self.teacher.load())
        return model

    def new_student(
        self, data: TaskData, teacher: TaskModel | None, dropout: float = 0.0
    ) -> TaskModel:
        """The student with what it starts from.

        Args:
            data: the task.
            teacher: trained; its layers are the start where ``start`` is the teacher.
            dropout: before the task's classifier.
        """
        student = build(self.shapes(data)[0], data.head, data.num_classes, dropout)
        if self.start is not None:
            same = self.start is self.teacher
            source = teacher.coca if same and teacher is not None else self.start.load()
            initialise.from_layers(student.coca, source)
        return student


def plan(config: TrainConfig) -> Models:
    """Find the models of a run, and settle the student's shape.

    A preset that starts from weights of another form keeps its numbers of layers and takes form and
    widths of these; one that starts at random keeps its widths too and takes its teacher's form. A
    student has the patches of its teacher. Otherwise their image tokens would not correspond.

    Raises:
        UserError: a name that is nothing, or a student that cannot start as asked for.
    """
    assert config.student is not None
    teacher = None if config.method == "finetune" else find(config.teacher or "", "--teacher")
    if teacher is not None and config.image_size:
        teacher = dataclasses.replace(teacher, config=_resized(teacher, config.image_size))
    if teacher is not None and config.teacher_steps == 0:
        _check_published(config, teacher)
    student = find(config.student, "--student")
    start = _start(config, student, teacher)
    shape, notes = student.config, []
    model = start or teacher
    if model is not None and not student.trained and _other_form(shape, model.config):
        shape = initialise.like(start.config, layers=shape) if start else _formed(shape, model)
        notes.append(
            f"{_depths(shape)} layers in the form of {model.name}, widths "
            f"{shape.image_width}/{shape.text_width}"
        )
    if teacher is not None and _patches(shape) != _patches(teacher.config):
        shape = dataclasses.replace(
            shape,
            image_size=teacher.config.image_size,
            patch_size=teacher.config.patch_size,
            image_channels=teacher.config.image_channels,
        )
        notes.append(f"images of {shape.image_size} pixels in patches of {shape.patch_size}")
    elif teacher is None and config.image_size:
        shape = _resized(dataclasses.replace(student, config=shape, run=None), config.image_size)
    models = Models(shape, start, teacher, tuple(notes))
    if config.data == "digits":
        models.check_digits()
    return models


def _check_published(config: TrainConfig, teacher: Source) -> None:
    if teacher.run is None and (teacher.checkpoint is None or config.task != "coco"):
        raise UserError(
            f"--teacher-steps 0 is for captioning with a checkpoint, which needs no head; "
            f"{teacher.name} on {config.task} has to be trained first"
        )


def _start(config: TrainConfig, student: Source, teacher: Source | None) -> Source | None:
    name = config.student_init
    if name == "random":
        return None
    if name == "teacher":
        if teacher is None:
            raise UserError(f"--student-init teacher: --method {config.method} has no teacher")
        return teacher
    if name is not None:
        start = find(name, "--student-init")
        if not start.trained:
            raise UserError(
                f"--student-init must be teacher, random, a run or a checkpoint, got {name!r}"
            )
        return start
    if student.trained:
        return student
    if teacher is None:
        return None
    # what the data decides is the same for both
    known = teacher.config
    shape = dataclasses.replace(
        student.config, vocab_size=known.vocab_size, image_channels=known.image_channels
    )
    fits = initialise.obstacle(shape, known) is None
    return teacher if fits else None


def _resized(source: Source, image_size: int) -> CoCaConfig:
    if source.run is not None and source.config.image_size != image_size:
        raise UserError(
            f"--image-size {image_size}: {source.name} was trained on images of "
            f"{source.config.image_size} pixels; leave --image-size out"
        )
    try:
        return dataclasses.replace(source.config, image_size=image_size)
    except ValueError as error:
        raise UserError(f"--image-size {image_size}: {error}") from error


def _formed(config: CoCaConfig, model: Source) -> CoCaConfig:
    """The shape in the form of another model, with a pooler like its."""
    names = (*CoCaConfig.form_options(), "pooler_queries", "pooler_ratio")
    form = {name: getattr(model.config, name) for name in names}
    try:
        return dataclasses.replace(config, **form)
    except ValueError as error:
        raise UserError(f"the student cannot take the form of {model.name}: {error}") from error


def _depths(config: CoCaConfig) -> str:
    return "/".join(map(str, config.layer_counts.values()))


def _patches(config: CoCaConfig) -> tuple[int, ...]:
    return config.image_size, config.patch_size, config.image_channels


def _other_form(one: CoCaConfig, other: CoCaConfig) -> bool:
    return any(getattr(one, name) != getattr(other, name) for name in CoCaConfig.form_options())


def sized(config: CoCaConfig, data: TaskData, start: Source | None = None) -> CoCaConfig:
    """A shape with the data's tokenizer, images and text length, no shorter than the start's."""
    known = start.config.text_length if start is not None and start.trained else 0
    return dataclasses.replace(
        config,
        vocab_size=len(data.tokenizer),
        text_length=max(known, data.text_length),
        image_size=data.image_size,
        image_channels=data.channels,
    )
