"""What a run would be: data, models, arithmetic and memory of a step, without taking one."""

from __future__ import annotations

import torch

from optima_fast import tasks
from optima_fast.distill import arm_name, arm_space, recipes
from optima_fast.models import CoCa, CoCaConfig, paper_parameters
from optima_fast.tasks import TaskData
from optima_fast.training import cache_plan, cost, experiment, loader, pseudo, sources, teachers
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display
from optima_fast.training.sources import Models, Source
from optima_fast.training.trainer import distilled, uses_bf16

ARMS_SHOWN = 7


def show(config: TrainConfig, display: Display) -> None:
    """Read the data, check files and sizes as a run would, and print what it would take.

    Raises:
        UserError: as the run itself would.
    """
    config, _ = experiment.place(config)
    device = experiment.prepare(config)
    tasks.check(config.data)
    models = sources.plan(config)
    data = experiment.load_data(config, models)
    experiment.rehearse(config, models, data)
    display.table(f"dry run: {config.task} on {config.data}", _data(config, data))
    if config.recipe is not None:
        display.table(f"recipe {config.recipe}", _recipe(config, config.recipe))
    display.table("models", _models(config, models, data, device))
    display.table(f"a step on {device}", _step(config, models, data, device))
    display.note("nothing was trained and nothing was written")


def _data(config: TrainConfig, data: TaskData) -> list[list[str]]:
    rows = [
        [split.name, f"{len(split):,} examples of {len(split.images):,} images"]
        for split in (data.train, data.validation, data.test)
    ]
    assert config.batch_size and config.steps
    epochs = config.steps * config.batch_size * data.train.group / len(data.train)
    extra = []
    if config.extra_images is not None:
        found = len(pseudo.files(config.extra_images))
        extra = [["extra", f"{found:,} images of {config.extra_images}, to be captioned"]]
    classes = [["classes", f"{data.num_classes:,}"]] if data.num_classes else []
    return [
        *rows,
        *extra,
        *classes,
        ["tokenizer", f"{len(data.tokenizer):,} ids, texts of at most {data.text_length}"],
        ["training", f"{config.steps:,} steps of {config.batch_size}, {epochs:,.1f} epochs"],
    ]


def _recipe(config: TrainConfig, name: str) -> list[list[str]]:
    recipe = recipes.get(name)
    rows = [["source", recipe.source], ["losses", recipe.what], ["differs", recipe.differs]]
    for option, value in recipes.settings(name, config.task).items():
        chosen = getattr(config, option)
        rows.append([option, f"{chosen}" if chosen == value else f"{chosen} (recipe {value})"])
    return rows


def _models(
    config: TrainConfig, models: Models, data: TaskData, device: torch.device
) -> list[list[str]]:
    student, teacher = models.shapes(data)
    rows = []
    if models.teacher is not None and teacher is not None:
        rows += _model("teacher", config.teacher, teacher)
        rows.append(["", _teaching(config, models.teacher, data, device)])
    rows += _model("student", config.student, student)
    start = "random weights" if models.start is None else f"layers of {models.start.name}"
    rows.append(["", ", ".join([f"starts from {start}", *models.notes])])
    return rows


def _teaching(config: TrainConfig, teacher: Source, data: TaskData, device: torch.device) -> str:
    if teacher.run is not None:
        return f"the model of {teacher.run.folder}"
    if config.teacher_steps == 0:
        return "as published"
    own = resolve(teachers.teacher_config(config))
    kept = teachers.cached_run(own, teacher, data, device)
    if kept.finished():
        return f"trained before, in {kept.folder}"
    start = "its published weights" if teacher.trained else "random weights"
    return f"to be trained first, {own.steps:,} steps from {start}, kept in {kept.folder}"


def _model(role: str, name: str | None, shape: CoCaConfig) -> list[list[str]]:
    with torch.device("meta"):
        model = CoCa(shape)
    layers = "/".join(map(str, shape.layer_counts.values()))
    return [
        [
            f"{role} ({name})",
            f"{experiment.count(model):,} parameters, {paper_parameters(model):,} as the paper "
            "counts",
        ],
        ["", f"{layers} layers, widths {shape.image_width}/{shape.text_width}, {_tokens(shape)}"],
    ]


def _tokens(shape: CoCaConfig) -> str:
    read = shape.patches + (shape.image_stem == "clip")
    handed = read if shape.pooler == "none" else shape.pooler_queries
    handed -= shape.contrastive == "query"
    return f"{read} image tokens ({handed} for the decoder) of {shape.image_size} pixels"


def _step(
    config: TrainConfig, models: Models, data: TaskData, device: torch.device
) -> list[list[str]]:
    student, teacher = models.shapes(data)
    batch = loader.first_batch(config, data)
    bf16 = uses_bf16(config, device)
    settings = {} if teacher is None else distilled(config, student, teacher)
    rows = []
    if teacher is None:
        operations = cost.finetuning_operations(student, data, batch)
        rows.append(["arithmetic", _operations(operations)])
    else:
        space = arm_space(config.arms, student.layer_counts)
        arms = space.arms[:ARMS_SHOWN] if config.rewarded or config.method == "random" else ()
        counted = cost.distilling_operations(
            student, teacher, data, batch, [None, *arms], **settings
        )
        rows.append(["arithmetic, all modules", _operations(counted[0])])
        rows += [
            [f"  {arm_name(arm)}", _operations(operations)]
            for arm, operations in zip(arms, counted[1:], strict=True)
        ]
    memory = {
        "training": cost.step_memory(
            student, teacher, data, batch, bf16=bf16, recompute=config.recompute, **settings
        )
    }
    trains = models.teacher is not None and models.teacher.run is None and config.teacher_steps
    if teacher is not None and trains:
        own = loader.first_batch(resolve(teachers.teacher_config(config)), data)
        memory["the teacher's own training"] = cost.step_memory(teacher, None, data, own, bf16=bf16)
    for name, held in memory.items():
        rows.append(
            [
                f"memory, {name}",
                f"about {_bytes(held.total)} in eager mode: weights {_bytes(held.weights)}, "
                f"optimizer {_bytes(held.optimizer)}, gradients and activations "
                f"{_bytes(held.working)}",
            ]
        )
    if teacher is not None and config.teacher_cache is not None:
        kinds = experiment.cached_kinds(config, models, data)
        rows.append(["teacher cache", cache_plan.in_words(config, kinds)])
    return rows


def _operations(count: int) -> str:
    return f"{count / 1e12:.1f} TFLOP" if count >= 1e12 else f"{count / 1e9:.3g} GFLOP"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
