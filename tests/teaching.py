"""Students and teachers on the built-in questions, for the tests of distillers."""

from __future__ import annotations

import dataclasses

from optima_fast import tasks
from optima_fast.models import presets
from optima_fast.models.task_model import TaskModel, build

DATA = tasks.load("vqa", "digits", train_images=6, validation_images=1, test_images=1)
BATCH = DATA.train.batch(range(8))


def model(preset: str, **changes: object) -> TaskModel:
    config = dataclasses.replace(
        presets.get(preset),
        vocab_size=len(DATA.tokenizer),
        text_length=DATA.text_length,
        **changes,
    )
    return build(config, DATA.head, DATA.num_classes)
