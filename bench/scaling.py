"""What many GPUs would need: memory and communication of each, by formula, from measured parts.

    python bench/scaling.py            # the tables of bench/scaling.md

One GPU's step is measured (`results/nvidia-h200-2026-11-27-2f14064.json`: CoCa-Large to Tiny12, 32
examples, 1,024 image tokens, the default losses). Sizes of models are counted. What links carry is
what their makers say. No run on several GPUs was measured.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from optima_fast.models import CoCa, CoCaConfig, presets

RESULTS = Path(__file__).with_name("results") / "nvidia-h200-2026-11-27-2f14064.json"
FLOAT = 4  # bytes of a weight, a gradient, a moment; teachers are kept in float32 too
NODE = 8  # GPUs
NVLINK, NETWORK = 450e9, 50e9  # bytes a second and GPU, one way: NVLink 4, 400 Gbit/s InfiniBand
GPUS = (1, 8, 64, 256, 1024)
HEAD = ("GPUs", "batch", "GiB", "GiB sharded", "sent", "sent sharded", "step", "links", "sharded")


@dataclasses.dataclass(frozen=True)
class Measured:
    """A step of one GPU.

    Attributes:
        seconds: of it.
        examples: in its batch.
        activations: bytes an example.
    """

    seconds: float
    examples: int
    activations: float


def parameters(config: CoCaConfig) -> int:
    """Number of weights of a model without a task's head."""
    with torch.device("meta"):
        return sum(p.numel() for p in CoCa(config).parameters())


def ten_billion() -> CoCaConfig:
    """CoCa-Large's form, grown to about ten billion weights."""
    large = presets.get("coca_large")
    return dataclasses.replace(
        large, image_width=3072, image_heads=24, image_layers=48, text_width=2560, text_heads=20,
        text_layers=24, multimodal_layers=24,
    )  # fmt: skip


def measured(student: int, teacher: int) -> Measured:
    """The step of the results file; what it held beyond weights and gradients, by example."""
    rows = json.loads(RESULTS.read_text())["parts"]["step"]["jobs"]["step"]["rows"]
    row = next(r for r in rows if (r["case"], r["provider"]) == ("step-1024x32", "scores"))
    static = FLOAT * (2 * student + teacher)
    return Measured(row["ms"] / 1000, 32, (row["peak_mb"] * 1e6 - static) / 32)


@dataclasses.dataclass(frozen=True)
class Need:
    """What each of N GPUs needs.

    Attributes:
        memory: bytes.
        sent: bytes that a step sends, and receives.
    """

    memory: float
    sent: float


def ddp(student: int, teacher: int, gpus: int, activations: float) -> Need:
    """12 s + 4 t + activations; 8 s (N - 1) / N, of an all-reduce of gradients around a ring.

    s weights of the student (with gradient and first moment), t of the teacher.
    """
    sent = 2 * FLOAT * student * (gpus - 1) / gpus
    return Need(3 * FLOAT * student + FLOAT * teacher + activations, sent)


def fsdp(student: int, teacher: int, layer: int, gpus: int, activations: float) -> Need:
    """(12 s + 4 t) / N + 4 s + 8 w + activations; (8 s + 4 t) (N - 1) / N.

    The student is whole during a step, the teacher's layers of w weights two at a time.
    """
    held = (3 * FLOAT * student + FLOAT * teacher) / gpus
    gathered = FLOAT * student + 2 * FLOAT * layer if gpus > 1 else 0
    sent = (2 * FLOAT * student + FLOAT * teacher) * (gpus - 1) / gpus
    return Need(held + gathered + activations, sent)


def seconds(sent: float, gpus: int) -> float:
    """What links take for it, if they do nothing else."""
    return sent / (NVLINK if gpus <= NODE else NETWORK)


def table(student: int, teacher: int, layer: int, step: Measured, each: int) -> list[list[str]]:
    """A line a number of GPUs, with ``each`` examples on each."""
    lines = []
    for gpus in GPUS:
        activations = step.activations * each
        plain = ddp(student, teacher, gpus, activations)
        sharded = fsdp(student, teacher, layer, gpus, activations)
        times = (step.seconds * each / step.examples, seconds(plain.sent, gpus))
        lines.append(
            [f"{gpus:,}", f"{gpus * each:,}"]
            + [f"{need.memory / 2**30:.1f}" for need in (plain, sharded)]
            + [f"{need.sent / 1e9:.2f} GB" for need in (plain, sharded)]
            + [f"{1000 * t:.0f} ms" for t in (*times, seconds(sharded.sent, gpus))]
        )
    return lines


def show(title: str, lines: list[list[str]]) -> None:
    print(f"\n{title}\n")
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for line in lines:
        print("| " + " | ".join(line) + " |")


def main() -> None:
    small, large = (parameters(presets.get(name)) for name in ("coca_tiny12", "coca_large"))
    step = measured(small, large)
    print(f"student {small / 1e6:.0f}M, teacher {large / 1e6:.0f}M weights, activations")
    print(f"{step.activations / 1e6:.0f} MB an example, {step.seconds * 1000:.0f} ms for 32")
    layer = large // 48
    for each in (32, 1):
        title = f"CoCa-Large to Tiny12, {each} on each GPU"
        show(title, table(small, large, layer, step, each))
    huge = parameters(ten_billion())
    # the teacher's forward pass is most of the step: two operations a weight and token
    factor = huge / large
    slower = dataclasses.replace(step, seconds=step.seconds * factor)
    title = f"a teacher of {huge / 1e9:.1f}B, 32 on each GPU (the step {factor:.0f} times as long)"
    show(title, table(small, huge, huge // 96, slower, 32))


if __name__ == "__main__":
    main()
