"""A whole distillation step of the paper's models: what the losses add to it, by way of writing it.

    python bench/bench_step.py                                   # on a GPU: Large to Tiny12
    python bench/bench_step.py --compiled 288                    # then once more, models compiled
    python bench/bench_step.py --device cpu --quick              # a tiny model, two steps

CoCa-Large teaches CoCa-Tiny12 on VQA's shapes: an image and a question an item, forward of both
models and backward of the student under autocast to bfloat16 (float32 on a CPU), random weights, no
padding, no optimizer. The losses are those of all twelve pairs of layers.

    logits    the teacher's logits alone are matched: what every other way has too
    scores    hidden states and attention scores, the trainer's default
    probs     hidden states and attention probabilities
    kl-mean   hidden states and the divergence of attention
    usual     as people write probs: attention in plain operations that return their maps, a loop
              over layers with F.mse_loss

``usual`` and ``probs`` must have the same loss, to 2 %. On a GPU a sample is time on the device;
peak memory is what a step holds above models and batch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from measuring import Row, Rows, Step, Timer, conditions, interleave, one_line, peak_bytes, spread

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from optima_fast import Distiller
from optima_fast.distill import LayerLosses
from optima_fast.distill.matching import matched
from optima_fast.models import attention, presets
from optima_fast.models.config import CoCaConfig
from optima_fast.models.task_model import build

WAYS = ("logits", "scores", "probs", "kl-mean", "usual")
LOSSES = {"kl-mean": "kl", "usual": "probs", "logits": "scores"}  # the distiller's names
ANSWERS = 3129  # of VQA
MAPS: dict[int, Tensor] = {}  # of the step that runs, by the queries they are of


def keep_maps(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None,
    cap: float | None = None, lse: bool = False,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as it is written where maps are to be returned."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    maps = scores.softmax(-1)
    MAPS[id(q)] = maps
    return maps.to(v.dtype) @ v, None


class Usual(Distiller):
    """The losses of maps that attention returned, a layer after the other."""

    def _layer_losses(self, pairs: Any, student: Any, teacher: Any, **_: Any) -> Any:
        hidden, maps = [], []
        layers = matched(pairs, student, teacher)
        for pair, (s, t) in zip(pairs, layers, strict=True):
            weight = self.projections[pair.key]
            hidden.append(F.mse_loss(s.hidden @ weight, t.hidden))
            ours, theirs = (MAPS[id(x.attentions[0].q)].mean(1) for x in (s, t))
            loss, n = F.mse_loss(ours, theirs), s.hidden.shape[1]
            if s.attentions[0].causal:  # half of the squares are 0 and do not count
                loss = loss * (2 * n / (n + 1))
            maps.append(loss)
        of_hidden, of_maps = torch.stack(hidden), torch.stack(maps)
        # both weights are 1 here
        return LayerLosses(of_hidden.sum() + of_maps.sum(), of_hidden, of_maps, pairs)


def configurations(side: int, quick: bool) -> tuple[CoCaConfig, CoCaConfig]:
    names = ("digits_student", "digits_teacher") if quick else ("coca_tiny12", "coca_large")
    student, teacher = (presets.get(name) for name in names)
    if quick:
        return student, teacher
    return replace(student, image_size=side), replace(teacher, image_size=side)


def predict(logits: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(logits.float(), batch["answer"])


def divergence(student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
    return F.kl_div(
        student.float().log_softmax(-1), teacher.float().softmax(-1), reduction="batchmean"
    )


class Bench:
    """Both models, a batch, and a step for each way."""

    def __init__(self, args: argparse.Namespace, side: int) -> None:
        torch.manual_seed(0)
        small, large = configurations(side, args.quick)
        self.device, size = args.device, args.batch
        self.low = torch.bfloat16 if self.device == "cuda" else None
        with torch.device(self.device):  # to draw the weights of a large model on a CPU takes long
            self.student, self.teacher = (
                build(config, "classification", ANSWERS) for config in (small, large)
            )
        if self.low is not None:
            self.teacher.to(self.low)
        image = (size, small.image_channels, small.image_size, small.image_size)
        g = torch.Generator().manual_seed(0)
        text = torch.randint(1, small.vocab_size, (size, small.text_length), generator=g)
        self.batch = {
            "images": torch.randn(image, generator=g).to(self.device),
            "text": text.to(self.device),
            "answer": torch.randint(0, ANSWERS, (size,), generator=g).to(self.device),
        }
        self.tokens = (small.image_size // small.patch_size) ** 2

    def compile(self) -> None:
        """As the trainer does."""
        torch._dynamo.config.recompile_limit = 64
        for model in (self.student, self.teacher):
            for name in model.layer_counts:
                getattr(model.coca, name).compile()

    def step(self, way: str) -> Step:
        torch.manual_seed(1)  # the same projections
        kind = Usual if way == "usual" else Distiller
        distiller = kind(
            self.student, self.teacher, attention_loss=LOSSES.get(way, way),
            attention_weight=1.0, kl_weight=1.0,
        ).to(self.device)  # fmt: skip
        arm = () if way == "logits" else distiller.modules_matched
        trained = [*self.student.parameters(), *distiller.parameters()]

        def run() -> Tensor:
            MAPS.clear()
            with written(way), torch.autocast(self.device, self.low, enabled=self.low is not None):
                found = distiller(self.batch, arm, predict=predict, divergence=divergence)
            found.total.backward()
            for p in trained:
                p.grad = None
            loss: Tensor = found.total.detach()
            return loss

        return run


@contextlib.contextmanager
def written(way: str) -> Iterator[None]:
    """Attention as this way has it."""
    fast = attention.attend
    attention.attend = keep_maps if way == "usual" else fast
    try:
        yield
    finally:
        attention.attend = fast
        MAPS.clear()


def measure(
    args: argparse.Namespace, side: int, timer: Timer, rows: Rows, *, compiled: bool
) -> list[Row]:
    bench = Bench(args, side)
    case = f"step-{bench.tokens}x{args.batch}" + ("-compiled" if compiled else "")
    if compiled:
        bench.compile()
    steps: dict[str, Step] = {}
    found: dict[str, Row] = {}
    for way in args.ways:
        if compiled and way == "usual":
            continue  # its maps are kept by a dictionary, which no graph knows
        if not rows.begin(case, way):
            continue
        try:
            run = bench.step(way)
            loss = run().item()
            found[way] = {"loss": loss, "peak_mb": peak_bytes(run, args.device) / 2**20}
            steps[way] = run
        except Exception as mistake:  # too little memory for one
            rows.add(case=case, provider=way, failed=one_line(mistake))
            print(f"{case:24} {way:8} {one_line(mistake)}", flush=True)
    if {"usual", "probs"} <= found.keys():
        ours, theirs = found["probs"]["loss"], found["usual"]["loss"]
        if abs(ours - theirs) > 0.02 * abs(ours):
            raise RuntimeError(f"WRONG: the loss is {ours} by probs and {theirs} by usual")
    samples = interleave(steps, timer, seconds=args.seconds, least=2 if args.quick else 5)
    made = []
    for way in steps:
        row: Row = {"case": case, "provider": way, "ours": way != "usual", **found[way]}
        row |= spread(samples[way])._asdict()
        row["share"] = None
        row["per_second"] = 1e3 * args.batch / row["ms"]
        if timer.cuda:
            row["wall_ms"] = timer.wall(steps[way], seconds=0.3)
        made.append(rows.add(**row))
    base = next((row["ms"] for row in made if row["provider"] == "logits"), None)
    for row in made:
        added = f"{row['ms'] / base - 1:+7.1%} of logits" if base else ""
        wall = f" {row['wall_ms']:9.2f} ms on the host" if "wall_ms" in row else ""
        print(
            f"{case:24} {row['provider']:8} {row['ms']:9.2f} ms {row['iqr']:7.2f}{wall}"
            f" {row['peak_mb']:9.0f} MB {row['per_second']:8.1f} items/s {added}",
            flush=True,
        )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sides", type=int, nargs="*", default=[288, 576], help="of the image")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--compiled", type=int, nargs="*", default=[], metavar="SIDE",
                        help="sides to be measured again, the models compiled")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny models, two steps")
    parser.add_argument("--seconds", type=float, default=3.0, help="least time of a size")
    parser.add_argument("--json", metavar="FILE", help="append one line a cell")
    parser.add_argument("--resume", action="store_true", help="leave out cells that FILE has")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.sides, args.seconds = 2, [24], 0.0
    facts = conditions(args.device, "bfloat16" if args.device == "cuda" else "float32",
                       torch.get_num_threads())  # fmt: skip
    print(json.dumps(facts), flush=True)
    rows, timer = Rows(args.json, facts, resume=args.resume), Timer(args.device)
    for compiled, sides in ((False, args.sides), (True, args.compiled)):
        for side in sides:
            measure(args, side, timer, rows, compiled=compiled)
            torch.compiler.reset()
    rows.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
