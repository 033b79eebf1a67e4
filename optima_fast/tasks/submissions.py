"""Predictions in files, each as the evaluation of its data set takes them.

vqa      [{"question_id": 1, "answer": "yes"}, ...], for the server at https://visualqa.org
coco     [{"image_id": 1, "caption": "a cat"}, ...], for coco-caption and the COCO server
nlvr2    dev-850-0-0,False: a line an example, for eval/metrics.py of lil-lab/nlvr
snli_ve  {"pairID": "1.jpg#2r1c", "label": "neutral"}: a line a pair; there is no official form
"""

import csv
import io
import json
from pathlib import Path

from optima_fast.errors import UserError
from optima_fast.tasks.base import Predictions, TaskData
from optima_fast.tasks.split import Split


def new_file(path: str | Path, data: str) -> Path:
    """The file to write predictions of `data` into, checked before there are any.

    Raises:
        UserError: The built-in data has no ids to predict by, the file is there already, or its
            folder is not.
    """
    file = Path(path)
    if data == "digits":
        raise UserError(
            f"no predictions into {file}: the built-in data has no official ids, --data FOLDER has"
        )
    if file.exists() or file.is_symlink():
        raise UserError(f"{file} is there already: choose a new file for the predictions")
    if not file.parent.is_dir():
        raise UserError(f"no folder {file.parent} for the predictions: create it first")
    return file


def render(data: TaskData, split: Split, predictions: Predictions) -> str:
    """The text of a file of predictions.

    Raises:
        ValueError: The split has no ids, or another number of them.
    """
    if split.ids is None or len(split.ids) != len(predictions.texts):
        have = "none" if split.ids is None else len(split.ids)
        raise ValueError(
            f"the {split.name} split must have an id a prediction, "
            f"got {have} for {len(predictions.texts)}"
        )
    pairs = list(zip(split.ids, predictions.texts, strict=True))
    if data.task == "nlvr2":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows((i, said.title()) for i, said in pairs)
        return text.getvalue()
    key, value = {
        "vqa": ("question_id", "answer"),
        "coco": ("image_id", "caption"),
        "snli_ve": ("pairID", "label"),
    }[data.task]
    entries = [json.dumps({key: i, value: said}) for i, said in pairs]
    if data.task == "snli_ve":
        return "".join(entry + "\n" for entry in entries)
    return "[" + ",\n ".join(entries) + "]\n"
