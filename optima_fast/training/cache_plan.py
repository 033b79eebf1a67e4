"""What ``--teacher-cache`` keeps: which rows, what is in each, and whether there is room for them.

Rows are of these kinds, of which a run has those it needs:

    ==========  =======  ================================================================
    kind        row of   numbers in a row, with sums over the matched layers of the teacher
    ==========  =======  ================================================================
    image       image    sum N (d + 2 d [+ H])            N tokens, width d, H heads
    text        example  sum L (d + 2 d [+ H])            L tokens
    multimodal  example  k sum L (d + 2 d [+ d] [+ H])    k pairs of image and text
    cross       image    [sum M d]                        M image tokens for the decoder
    logits      example  classes, for captions L x ids
    ==========  =======  ================================================================

d is a hidden state, 2 d its queries and keys, a further d and the kind ``cross`` the queries and
keys of cross-attention where it is matched, H the logsumexp where a loss uses it, which is kept in
float32 alone: queries and keys that were rounded have another one, which the loss computes. The
whole takes 2 bytes (bf16) or 4 (fp32) for each number of a row, times the number of rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from optima_fast.distill import parse_arm
from optima_fast.distill.arms import arm_layers
from optima_fast.distill.maps import Maps
from optima_fast.errors import UserError
from optima_fast.models import CoCaConfig
from optima_fast.models.model import TapRequest
from optima_fast.models.task_model import TaskOutput
from optima_fast.tasks import TaskData
from optima_fast.training.config import TrainConfig
from optima_fast.training.pretence import pretended

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OF_IMAGES = ("image", "cross")
OF_HEADS = ("q", "k", "cross_q", "cross_k")

Samples = dict[str, dict[tuple[int, str], Tensor]]  # by kind, then layer and name: [samples, ...]


class Place(NamedTuple):
    """Where a tensor of one sample is in its row, and what it is to the teacher."""

    first: int
    end: int
    shape: torch.Size
    dtype: torch.dtype


class Kind(NamedTuple):
    """Rows of one kind: how many, and what is in each."""

    rows: int
    places: dict[tuple[int, str], Place]

    @property
    def width(self) -> int:
        return max(place.end for place in self.places.values())


class Wanted(NamedTuple):
    """What a run needs of its teacher.

    Attributes:
        layers: by module, all that are matched.
        modules: those that the run may distil.
        cross: whether cross-attention is matched.
        lse: whether the losses use a logsumexp.
        logits: whether they use logits.
        dtype: of the rows.
    """

    layers: TapRequest
    modules: Sequence[str]
    cross: bool
    lse: bool
    logits: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, config: TrainConfig, layers: Mapping[str, Sequence[int]]) -> Wanted:
        """Of resolved settings and the teacher's layer of each student layer."""
        counts = {module: len(chosen) for module, chosen in layers.items()}
        modules = tuple(layers) if config.method not in ("fixed", "kd") else ()
        if config.arm is not None:
            modules = tuple(arm_layers(parse_arm(config.arm, counts), counts))
        return cls(
            {module: sorted(set(chosen)) for module, chosen in layers.items()},
            modules,
            config.cross_attention,
            Maps(config.attention_loss).softmax,
            bool(config.kl_weight),
            DTYPES[config.teacher_cache_dtype],
        )

    def kinds(self, modules: Sequence[str], logits: bool) -> list[str]:
        """What records of these modules are kept as."""
        cross = ["cross"] if self.cross and "multimodal" in modules else []
        return [*modules, *cross, *(["logits"] if logits else [])]

    def samples(self, out: TaskOutput, pairs: int, shown: Tensor) -> Samples:
        """What the teacher says, by sample.

        Args:
            out: what it says of a batch.
            pairs: of image and text that each example has.
            shown: ``[I]``, a pair that each image is in: keys of all of them are the same.
        """
        found: Samples = {}
        for module, taps in out.taps.items():
            for layer, tap in zip(self.layers[module], taps, strict=True):
                for name, value in tap._asdict().items():
                    kind = "cross" if name == "cross_k" else module
                    left_out = name == "lse" and self.dtype != torch.float32
                    if value is None or left_out or (name.startswith("cross") and not self.cross):
                        continue
                    if name in OF_HEADS:
                        value = value.transpose(1, 2)  # as the teacher has them in memory
                    if kind == "cross":
                        value = value.index_select(0, shown)
                    elif module == "multimodal":
                        value = value.unflatten(0, (-1, pairs))
                    found.setdefault(kind, {})[layer, name] = value
        if out.logits is not None:
            found["logits"] = {(0, "logits"): out.logits}
        return found


def plan(
    config: TrainConfig,
    data: TaskData,
    teacher: CoCaConfig,
    layers: Mapping[str, Sequence[int]],
    *,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    more: int = 0,
) -> dict[str, Kind]:
    """The rows of a run by kind, of a teacher's shape alone.

    Args:
        config: resolved settings.
        data: the task.
        teacher: in the data's sizes.
        layers: by module the teacher's layer of each student layer.
        device: where the teacher runs.
        bf16: whether it runs in bfloat16, by autocast.
        more: images of ``--extra-images`` that the data does not hold yet.
    """
    wanted, split = Wanted.of(config, layers), data.train
    pretence = pretended(data, split.sample(), teacher, device=device)
    with torch.no_grad(), pretence as ((model,), batch):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            out = model.eval()(batch, taps=wanted.layers, lse=wanted.lse)
        shown = torch.zeros(len(batch["images"]), dtype=torch.int64)
        samples = wanted.samples(out, len(batch["pair_image"]), shown)
    examples, images = len(split) + more * split.group, len(split.images) + more
    found = {}
    for kind in wanted.kinds(wanted.modules, wanted.logits):
        places, end = {}, 0
        for key, value in samples[kind].items():
            first, end = end, end + value[0].numel()
            places[key] = Place(first, end, value.shape[1:], value.dtype)
        found[kind] = Kind(images if kind in OF_IMAGES else examples, places)
    return found


def needed(config: TrainConfig, kinds: Mapping[str, Kind]) -> int:
    """Bytes of all rows."""
    return DTYPES[config.teacher_cache_dtype].itemsize * sum(
        k.rows * k.width for k in kinds.values()
    )


def in_words(config: TrainConfig, kinds: Mapping[str, Kind]) -> str:
    """How much that is, and of what."""
    parts = ", ".join(f"{name} {k.rows:,} x {k.width:,}" for name, k in kinds.items())
    item = DTYPES[config.teacher_cache_dtype].itemsize
    return f"{_size(needed(config, kinds))} ({parts} numbers of {item} bytes)"


def check_size(config: TrainConfig, kinds: Mapping[str, Kind], own: Path | None = None) -> None:
    """Raise unless all rows fit into what ``--teacher-cache-gb`` and the disk have room for.

    Args:
        config: resolved settings.
        kinds: the rows.
        own: the sub-folder of the rows, once it is known: what others hold counts too.

    Raises:
        UserError: with the size, its parts and ways out.
    """
    folder, size = Path(config.teacher_cache or ""), needed(config, kinds)
    there = list(folder.glob("*/*.bin"))
    mine = there if own is None else [own / f"{name}.bin" for name in kinds]
    beside = sum(file.stat().st_size for file in there if file not in mine)
    written = sum(_on_disk(file) for file in there if file in mine)
    disk = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free + written
    text = f"--teacher-cache needs {in_words(config, kinds)}"
    way = "or leave --teacher-cache out"
    if config.teacher_cache_dtype == "fp32":
        way = f"take --teacher-cache-dtype bf16, {way}"
    if size + beside > 1e9 * config.teacher_cache_gb:
        held = f", and {folder} holds {_size(beside)} of others" if beside else ""
        raise UserError(
            f"{text}{held}, more than --teacher-cache-gb {config.teacher_cache_gb:g}: raise that, "
            f"{'delete sub-folders that no run needs, ' if beside else ''}{way}"
        )
    if size > free:
        raise UserError(f"{text} and {disk} has {_size(free)} free: make room, {way}")


def _on_disk(file: Path) -> int:
    return 512 * getattr(file.stat(), "st_blocks", 0)  # not known on Windows


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
