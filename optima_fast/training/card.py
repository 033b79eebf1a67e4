"""The model card of an exported student: what the Hugging Face hub shows, written from its run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from optima_fast.models.programs import FILES
from optima_fast.tasks import canvases
from optima_fast.training.config import TrainConfig
from optima_fast.training.flags import to_yaml
from optima_fast.training.overview import method_name, number
from optima_fast.training.run import Run

# the hub's name of each task, and ours
_TASKS = {
    "vqa": ("visual-question-answering", "visual question answering"),
    "snli_ve": ("visual-question-answering", "visual entailment"),
    "nlvr2": ("visual-question-answering", "judging statements about two images"),
    "coco": ("image-to-text", "image captioning"),
}
_DATA = {"vqa": "VQA v2", "snli_ve": "SNLI-VE", "nlvr2": "NLVR2", "coco": "COCO captions"}
ASKED = {
    "vqa": '--image FILE --text "..."',
    "snli_ve": '--image FILE --text "..."',
    "nlvr2": '--image LEFT --image RIGHT --text "..."',
    "coco": "--image FILE",
}
DIGITS = "the built-in digits of optima_fast (UCI handwritten digits, CC BY 4.0)"


def write(
    run: Run, config: TrainConfig, *, name: str, kind: str, checked: str, licence: str
) -> str:
    """The card, as Markdown with the hub's fields on top.

    Args:
        run: whose student it is, finished.
        config: its settings, as they are to be published.
        name: of the exported student.
        kind: the format, such as ``"onnx"``.
        checked: how it was compared with the student.
        licence: of the weights, as the hub spells it.
    """
    summary = run.summary()
    hub, task = _TASKS[summary["task"]]
    data = DIGITS if config.data == "digits" else f"{_DATA[summary['task']]} ({config.data})"
    metric = summary["metric_name"]
    fields = {
        "license": licence,
        "library_name": "open_clip" if kind == "open_clip" else "optima-fast",
        "pipeline_tag": hub,
        "tags": ["coca", "knowledge-distillation"],
        "model-index": [{"name": name, "results": [_result(summary, hub, task, data)]}],
    }
    teacher = "none"
    if config.method != "finetune":
        teacher = f"{config.teacher}, {summary['teacher_params']:,} parameters"
        teacher += f", {metric} {number(summary['teacher_metric'])} on the test split"
    rows = {
        "data": data + _sizes(run),
        f"{metric}, test split": number(summary["student_metric"]),
        f"{metric}, validation split": number(summary.get("validation_metric")),
        f"{metric} without images, test split": number(summary["text_only_metric"]),
        "teacher": teacher,
        "method": method_name(summary),
        "steps": f"{summary['steps']:,} (seed {summary['seed']})",
        "parameters": f"{summary['student_params']:,}",
        "versions": ", ".join(f"{k} {v}" for k, v in summary["versions"].items()),
        "format": f"{kind}; {checked}",
        "licence": _licence(licence),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    moved = "" if config.data == "digits" else " --data FOLDER"
    command = f"python -m optima_fast.train --config config.yaml{moved}"
    parts = [
        f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        f"A CoCa for {task}, trained with optima_fast.",
        f"| | |\n|---|---|\n{table}",
        _use(run, kind),
    ]
    if kind == "open_clip":
        parts += [
            f"Made by `{command}`, where `config.yaml` holds:",
            _block("yaml", to_yaml(config)),
        ]
    else:
        evaluate = f"python -m optima_fast.evaluate .{moved}"
        ask = f"python -m optima_fast.predict . {ASKED[summary['task']]}"
        parts += ["In this folder, to ask it, to measure it again, to make it again:"]
        parts += [_block("sh", f"{ask}\n{evaluate}\n{command}\n")]
    return "\n\n".join(parts) + "\n"


def _result(summary: Mapping[str, Any], hub: str, task: str, data: str) -> dict[str, Any]:
    """The main metric as the hub lists it."""
    metric = summary["metric_name"]
    return {
        "task": {"type": hub, "name": task},
        "dataset": {"type": summary["task"], "name": data, "split": "test"},
        "metrics": [{"type": metric, "name": metric, "value": summary["student_metric"]}],
    }


def _sizes(run: Run) -> str:
    parts = run.data()
    examples = ", ".join(f"{part['examples']:,} {name}" for name, part in parts.items())
    return f"; examples: {examples}" if examples else ""


def _licence(licence: str) -> str:
    if licence != "unknown":
        return licence
    return "not stated; those of the data and of the teacher's weights apply"


def _use(run: Run, kind: str) -> str:
    """What the file takes and gives, for those who call it themselves."""
    if kind == "open_clip":
        return "`open_clip.create_model('local-dir:FOLDER')` loads it, without the task's head."
    if kind == "safetensors":
        return "`student.safetensors` holds the weights, `model.json` says what of."
    config, reading = run.model_config(), run.reading()
    sides = "2, " if run.task() == "nlvr2" else ""
    size = f"{config.image_channels}, {config.image_size}, {config.image_size}"
    mean, std = reading.get("mean", canvases.MEAN), reading.get("std", canvases.STD)
    length = reading["text_length"]
    gives = f"rows, {len(run.classes())}" if run.classes() else f"rows, {length - 1}, ids"
    return (
        f"`{FILES[kind]}` takes `images`, float32 [rows, {sides}{size}], which are (pixels in "
        f"0 .. 1 - mean) / std with mean {mean} and std {std}, and `text`, int64 [rows, {length}], "
        f"ids of the tokenizer in `model.json`. It gives `logits`, float32 [{gives}]; there may be "
        "any number of rows."
    )


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text}```"
