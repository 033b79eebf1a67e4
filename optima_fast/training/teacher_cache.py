"""What the frozen teacher says of each training sample, kept on disk: it need not run again.

:mod:`optima_fast.training.cache_plan` says what is kept, :mod:`optima_fast.training.kept_rows` how.

A step gets the rounded numbers whether they were kept or computed just now, so what a run computes
does not depend on what was there before it. With fp32 nothing is rounded.

A sub-folder is of one teacher, one training split, its matched layers and all else that the numbers
depend on, in words in its ``description.json``; its name is a digest of these. Not detected: an
image file that changed under its name. Not part of it, as they change rounding alone: threads,
torch.compile, the card, the version of PyTorch and the other samples of a batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.models.layers import LayerTap
from optima_fast.models.model import TapRequest
from optima_fast.models.task_model import TaskModel, TaskOutput
from optima_fast.tasks import TaskData
from optima_fast.tasks.split import ArrayImages
from optima_fast.training.cache_plan import OF_HEADS, OF_IMAGES, Wanted, check_size, plan
from optima_fast.training.config import TrainConfig
from optima_fast.training.kept_rows import Rows, locked
from optima_fast.training.run import pixels_of
from optima_fast.training.teachers import code_digest

FORMAT = 1
WAITING = 64 * 2**20  # bytes of rows in memory, after which they are written
SECONDS = 5.0  # or so long after the last time


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
        kinds: what they are, by name.

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
        self.kinds = plan(config, data, shape, layers, device=self._device, bf16=bf16)
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
            "code": code_digest("models", "tasks"),
        }
        text = json.dumps(said, indent=2) + "\n"
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = Path(config.teacher_cache) / f"{config.task}-{key}"
        self._rows = self._open(config, text)
        self._flushed = time.monotonic()
        self._now: dict[str, Tensor] = {}  # the row of each sample of the batch, by kind

    def _open(self, config: TrainConfig, text: str) -> dict[str, Rows]:
        with locked(self.folder):
            check_size(config, self.kinds, self.folder)
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
                for name, kind in self.kinds.items()
            }

    @contextlib.contextmanager
    def seeing(self, examples: Tensor) -> Iterator[None]:
        """Calls inside are of the batch that the training split makes of these examples."""
        images, where = self._split.shown(examples)
        at = torch.zeros(len(images), dtype=torch.int64)
        self._shown = at.scatter_(0, where.reshape(-1), torch.arange(where.numel()))
        self._pairs = where.shape[1]
        self._now = {kind: images if kind in OF_IMAGES else examples for kind in self.kinds}
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
                    found[layer, name] = value.transpose(1, 2) if name in OF_HEADS else value
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
        places = {at: p for at, p in self.kinds[kind].places.items() if at[0] in layers}
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
            missing = self._absent(list(self.kinds))  # everything runs: what it says is kept
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
