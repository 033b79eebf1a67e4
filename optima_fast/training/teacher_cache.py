"""What the frozen teacher says of each training sample, kept on disk: it need not run again.

Rows (:mod:`optima_fast.training.kept_rows`) are of these kinds, of which a run has those it needs:

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

A step gets the rounded numbers whether they were kept or computed just now, so what a run computes
does not depend on what was there before it.

A sub-folder is of one teacher, one training split, its matched layers and all else that the numbers
depend on, in words in its ``description.json``. Not detected: an image file that changed under its
name. Not part of it, as they change rounding alone: threads, torch.compile and the other samples of
a batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import optima_fast
from optima_fast.distill import parse_arm
from optima_fast.distill.arms import arm_layers
from optima_fast.distill.maps import Maps
from optima_fast.errors import UserError
from optima_fast.models import CoCaConfig
from optima_fast.models.layers import LayerTap
from optima_fast.models.model import TapRequest
from optima_fast.models.task_model import TaskModel, TaskOutput
from optima_fast.tasks import TaskData
from optima_fast.tasks.split import ArrayImages
from optima_fast.training.config import TrainConfig
from optima_fast.training.kept_rows import Rows, locked
from optima_fast.training.pretence import pretended
from optima_fast.training.run import pixels_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMAT = 1
OF_IMAGES = ("image", "cross")
WAITING = 64 * 2**20  # bytes, and
SECONDS = 5.0  # that are lost at most when a process is killed

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
                    if name in _OF_HEADS:
                        value = value.transpose(1, 2)  # as the teacher has them in memory
                    if kind == "cross":
                        value = value.index_select(0, shown)
                    elif module == "multimodal":
                        value = value.unflatten(0, (-1, pairs))
                    found.setdefault(kind, {})[layer, name] = value
        if out.logits is not None:
            found["logits"] = {(0, "logits"): out.logits}
        return found


_OF_HEADS = ("q", "k", "cross_q", "cross_k")


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
    others = [f for f in folder.glob("*/*.bin") if own is not None and f.parent != own]
    beside = sum(file.stat().st_size for file in others)
    written = sum(f.stat().st_blocks * 512 for f in (own or folder).rglob("*.bin"))
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free + written
    text = f"--teacher-cache needs {in_words(config, kinds)}"
    way = "or leave --teacher-cache out"
    if config.teacher_cache_dtype == "fp32":
        way = f"take --teacher-cache-dtype bf16, {way}"
    if size + beside > 1e9 * config.teacher_cache_gb:
        held = f", and {folder} holds {_size(beside)} of others," if beside else ""
        raise UserError(
            f"{text}{held} with --teacher-cache-gb {config.teacher_cache_gb:g}: raise that, "
            f"{'delete sub-folders that no run needs, ' if beside else ''}{way}"
        )
    if size > free:
        raise UserError(f"{text} and {there} has {_size(free)} free: make room, {way}")


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


class CachedTeacher:
    """A teacher that a :class:`optima_fast.distill.Distiller` asks in place of the real one.

    Inside :meth:`seeing` it answers from the rows where all of a kind that a batch needs are there,
    and else runs the teacher, for all matched layers of what is missing, and keeps that. Elsewhere
    it is the teacher.

    Args:
        teacher: on its device; put in eval mode, its parameters frozen.
        config: resolved settings.
        data: the task, with all that is trained on.
        layers: by module the teacher's layer of each student layer.
        digest: of the teacher's weights.
        bf16: whether steps run in bfloat16, by autocast.

    Attributes:
        folder: of the rows.

    Raises:
        UserError: there is no room for them, or files are damaged or cannot be written.
    """

    def __init__(
        self,
        teacher: TaskModel,
        config: TrainConfig,
        data: TaskData,
        layers: Mapping[str, Sequence[int]],
        *,
        digest: str,
        bf16: bool,
    ) -> None:
        assert config.teacher_cache is not None
        self.teacher = teacher.eval().requires_grad_(False)
        self.layer_counts, self.widths = teacher.layer_counts, teacher.widths
        self.attention_cap = teacher.attention_cap
        self._device = next(teacher.parameters()).device
        self._wanted, self._split = Wanted.of(config, layers), data.train
        shape = teacher.coca.config
        self._kinds = plan(config, data, shape, layers, device=self._device, bf16=bf16)
        said = {
            "what": "what a teacher says of each training sample, for --teacher-cache",
            "format": FORMAT,
            "teacher": {"sha256": digest, "shape": shape.to_dict()},
            "data": {"task": config.task, **_data(data)},
            "layers": self._wanted.layers,
            "cross_attention": self._wanted.cross,
            "logsumexp": self._wanted.lse,
            "dtype": config.teacher_cache_dtype,
            "precision": "bf16" if bf16 else "fp32",
            "device": self._device.type,
            "optima_fast": optima_fast.__version__,
        }
        text = json.dumps(said, indent=2) + "\n"
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = Path(config.teacher_cache) / f"{config.task}-{key}"
        self._rows = self._open(config, text)
        self._flushed = time.monotonic()
        self._now: dict[str, Tensor] = {}  # the row of each sample of the batch, by kind

    def _open(self, config: TrainConfig, text: str) -> dict[str, Rows]:
        with locked(self.folder):
            check_size(config, self._kinds, self.folder)
            path = self.folder / "description.json"
            if not path.exists():
                partial = path.with_suffix(".partial")
                partial.write_text(text, encoding="utf-8")
                partial.replace(path)
            if path.read_text(encoding="utf-8", errors="replace") != text:
                raise UserError(
                    f"{path} is damaged or of something else: delete the folder {self.folder}, and "
                    "the teacher runs again"
                )
            return {
                name: Rows(self.folder, name, kind.rows, kind.width, self._wanted.dtype)
                for name, kind in self._kinds.items()
            }

    @contextlib.contextmanager
    def seeing(self, examples: Tensor) -> Iterator[None]:
        """Calls inside are of the batch that the training split makes of these examples."""
        images, where = self._split.shown(examples)
        at = torch.zeros(len(images), dtype=torch.int64)
        self._shown = at.scatter_(0, where.reshape(-1), torch.arange(where.numel()))
        self._pairs = where.shape[1]
        self._now = {kind: images if kind in OF_IMAGES else examples for kind in self._kinds}
        try:
            yield
        finally:
            self._now = {}

    def flush(self) -> None:
        """Write to disk what is only in memory."""
        if any(rows.waiting for rows in self._rows.values()):
            with locked(self.folder):
                for rows in self._rows.values():
                    rows.write()
        self._flushed = time.monotonic()

    def __call__(
        self, batch: Mapping[str, Tensor], *, taps: TapRequest, lse: bool = False
    ) -> TaskOutput:
        if not self._now:
            said: TaskOutput = self.teacher(batch, taps=taps, lse=lse)
            return said
        return self._say(batch, taps, logits=True)

    def record(
        self, batch: Mapping[str, Tensor], taps: TapRequest, *, lse: bool = False
    ) -> TaskOutput:
        """As :meth:`TaskModel.record`."""
        if not self._now:
            return self.teacher.record(batch, taps, lse=lse)
        return self._say(batch, taps, logits=False)

    def _say(self, batch: Mapping[str, Tensor], taps: TapRequest, *, logits: bool) -> TaskOutput:
        fresh = self._run(batch, self._wanted.kinds(list(taps), logits))
        records: dict[str, list[LayerTap]] = {}
        for module, layers in taps.items():
            found: dict[tuple[int, str], Tensor] = {}
            for kind in self._wanted.kinds([module], logits=False):
                for (layer, name), value in self._tensors(kind, layers, fresh).items():
                    if kind == "cross":
                        value = value.index_select(0, batch["pair_image"])
                    elif module == "multimodal":
                        value = value.flatten(0, 1)
                    found[layer, name] = value.transpose(1, 2) if name in _OF_HEADS else value
            records[module] = [self._tap(module, layer, found) for layer in layers]
        said = self._tensors("logits", (0,), fresh)[0, "logits"] if logits else None
        return TaskOutput(said, records, {**self.teacher.tokens(batch), "image": None})

    def _tap(self, module: str, layer: int, found: Mapping[tuple[int, str], Tensor]) -> LayerTap:
        tap = LayerTap(**{name: value for (i, name), value in found.items() if i == layer})
        if module == "multimodal" and not self._wanted.cross:
            # a layer has as many attentions as the student's; nobody looks at this one
            nothing = tap.hidden.new_empty(0)
            tap = tap._replace(cross_q=nothing, cross_k=nothing)
        return tap

    def _tensors(
        self, kind: str, layers: Sequence[int], fresh: Mapping[str, Tensor]
    ) -> dict[tuple[int, str], Tensor]:
        """Of these layers, in the dtypes that the teacher has; one copy to the device for all."""
        places = {at: p for at, p in self._kinds[kind].places.items() if at[0] in layers}
        first, end = min(p.first for p in places.values()), max(p.end for p in places.values())
        if kind in fresh:
            block = fresh[kind][:, first:end]
        else:
            block = self._rows[kind].take(self._now[kind], first, end, self._device)
        parts = {at: block[:, p.first - first : p.end - first] for at, p in places.items()}
        # contiguous, as views of a block would be copied by every loss
        return {
            at: part.to(places[at].dtype).reshape(len(part), *places[at].shape).contiguous()
            for at, part in parts.items()
        }

    def _run(self, batch: Mapping[str, Tensor], kinds: Sequence[str]) -> dict[str, Tensor]:
        """The rows of what is not there for all samples of the batch, by the teacher itself."""
        missing = self._absent(kinds)
        if {"multimodal", "cross", "logits"} & set(missing):
            missing = self._absent(list(self._kinds))  # everything runs: what it says is kept
        if not missing:
            return {}
        taps = {m: self._wanted.layers[m] for m in self._wanted.layers if self._owns(m, missing)}
        if "logits" in missing:
            out = self.teacher(batch, taps=taps, lse=self._wanted.lse)
        else:
            out = self.teacher.record(batch, taps, lse=self._wanted.lse)
        said = self._wanted.samples(out, self._pairs, self._shown.to(self._device))
        fresh = {}
        for kind in missing:
            values = [value.flatten(1).to(self._wanted.dtype) for value in said[kind].values()]
            fresh[kind] = torch.cat(values, 1)
            self._rows[kind].add(self._now[kind], fresh[kind].cpu())
        waiting = sum(rows.waiting for rows in self._rows.values())
        if waiting > WAITING or time.monotonic() - self._flushed > SECONDS:
            self.flush()
        return fresh

    def _absent(self, kinds: Sequence[str]) -> list[str]:
        """The kinds of which a sample of the batch is not on disk."""

        def absent(*, waiting: bool) -> list[str]:
            found = {kind: self._rows[kind].have(self._now[kind], waiting) for kind in kinds}
            return [kind for kind in kinds if not found[kind]]

        if absent(waiting=True) != absent(waiting=False):
            self.flush()  # an epoch was shorter than the time between two
        return absent(waiting=False)

    def _owns(self, module: str, kinds: Sequence[str]) -> bool:
        return any(kind in kinds for kind in self._wanted.kinds([module], logits=False))


def _data(data: TaskData) -> dict[str, Any]:
    """What tells the training split, and how its images are seen, from any other."""
    split = data.train
    images = split.images
    pixels = images.levels.numpy().tobytes() if isinstance(images, ArrayImages) else b""
    return {
        "sha256": split.digest(),
        "images_sha256": hashlib.sha256(pixels).hexdigest(),
        "examples": list(split.text.shape),
        "images": len(images),
        "image_size": data.image_size,
        "pixels": pixels_of(data),
    }
