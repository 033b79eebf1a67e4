"""The README's Python runs as it stands there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from optima_fast import tasks
from optima_fast.models import presets
from optima_fast.models.task_model import build

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def test_any_model_in_three_lines():
    tf = pytest.importorskip("transformers", reason="needs transformers")
    from families import SMALL, text

    batch = {**text(), "labels": text()["input_ids"]}
    names = {
        name: tf.BertForMaskedLM(tf.BertConfig(**{**SMALL, "num_hidden_layers": layers}))
        for name, layers in (("student", 2), ("teacher", 4))
    }
    assert BLOCKS[0].count("\n") == 3
    exec("import optima_fast\n" + BLOCKS[0], names | {"batch": batch} | (found := {}), found)
    found["loss"].backward()
    assert names["student"].bert.encoder.layer[0].attention.self.query.weight.grad.any()


def test_every_family_that_was_tested_is_in_the_table():
    pytest.importorskip("transformers", reason="needs transformers")
    from families import EQUAL, REFUSED

    table = (README.parent / "examples" / "README.md").read_text(encoding="utf-8")
    assert [x for x in (*EQUAL, *REFUSED) if not re.search(rf"\b{x}\b", table)] == []


def test_the_losses_in_a_loop_of_your_own():
    torch.manual_seed(0)
    names = {f"h_s{i}": draw(2, 5, 8) for i in (1, 2)} | {f"h_t{i}": draw(2, 5, 6) for i in (1, 2)}
    names |= {f"w{i}": draw(8, 6) for i in (1, 2)}
    for i in (1, 2):
        names |= {f"{x}_s{i}": draw(2, 2, 5, 4) for x in "qk"}
        names |= {f"{x}_t{i}": draw(2, 3, 5, 2) for x in "qk"}
    names["tokens"] = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    names["task_loss"] = draw()
    exec(BLOCKS[1], dict(names))
    trained = {name for name, value in names.items() if getattr(value, "grad", None) is not None}
    assert trained == {name for name in names if not re.match(r"[hqk]_t|tokens", name)}


def test_the_bandit_and_the_step():
    data = tasks.load("vqa", "digits", train_images=4, validation_images=1, test_images=1)
    models = [
        build(
            dataclasses.replace(
                presets.get(name), vocab_size=len(data.tokenizer), text_length=data.text_length
            ),
            data.head,
            data.num_classes,
        )
        for name in ("digits_student", "digits_teacher")
    ]
    names = {"student": models[0], "teacher": models[1], "batch": data.train.batch([0, 1])}
    names |= {"loss_fn": data.loss, "reward": 0.1}
    exec("import optima_fast\n" + BLOCKS[2], names)
    assert sum(names["policy"].count) == 1
    assert any(p.grad is not None for p in names["distiller"].parameters())
