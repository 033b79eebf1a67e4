"""The four tasks: data, batches, losses, metrics and baselines.

`load(task, "digits")` is the built-in data; `load(task, FOLDER)` reads a data set in its official
layout.
"""

from pathlib import Path
from typing import Any

from optima_fast.errors import UserError, unknown
from optima_fast.tasks.base import TaskData
from optima_fast.tasks.split import Split
from optima_fast.tasks.text import Vocabulary

__all__ = ["TASKS", "Split", "TaskData", "Vocabulary", "check", "load"]

TASKS = ("vqa", "snli_ve", "nlvr2", "coco")
"""The tasks that `load` knows."""


def load(task: str, data: str = "digits", *, seed: int = 0, **options: Any) -> TaskData:
    """A task and its data.

    Args:
        task: "vqa", "snli_ve", "nlvr2" or "coco".
        data: "digits", the built-in data, or a folder that holds the task's data set, or, for
            captioning, tar shards such as "shards/train-{000..010}.tar".
        seed: Of whatever is drawn.
        options: Of the reader: `tasks.digits.Options` or those of `tasks.folders.load`.

    Raises:
        UserError: An unknown task or option, or a missing, empty or broken data set.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    if data == "digits":
        from optima_fast.tasks import digits

        return digits.load(task, seed=seed, **options)
    from optima_fast.tasks import folders

    check(data)
    read: TaskData = folders.load(task, Path(data), seed=seed, **options)
    return read


def check(data: str) -> None:
    """Raise unless `data` is what `load` takes, without a look inside.

    Raises:
        UserError: It is neither "digits" nor a folder nor named like shards.
    """
    from optima_fast.tasks.shards import is_shards

    if data != "digits" and not is_shards(data) and not Path(data).is_dir():
        raise UserError(
            f"no data folder {data!r}: give an existing folder, or 'digits' for the built-in data"
        )
