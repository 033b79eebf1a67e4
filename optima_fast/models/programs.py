"""A task model as a program in one file, by torch.export or as ONNX, and read back.

A program takes ``images`` ``[T, C, H, W]`` float32 (``[T, 2, C, H, W]`` with a pair head, the left
and the right one), normalised, and ``text`` ``[T, L]`` int64, padded on the right, for any T, and
gives ``logits`` ``[T, classes]``, for captions ``[T, L - 1, vocab_size]``. It runs on the CPU.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optima_fast.errors import UserError
from optima_fast.models.heads import CaptionHead, PairHead
from optima_fast.models.task_model import TaskModel, TaskOutput

FILES = {"torch-export": "student.pt2", "onnx": "student.onnx"}
# an ONNX file must stay below 2 GB; of a larger model the weights lie in a file beside it
ONNX_BYTES = 1_900_000_000

Call = Callable[[Tensor, Tensor], Tensor]


class Program(nn.Module):
    """What is traced: a task model with a text and its own images in each row.

    Args:
        model: The task model.
    """

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Logits, as the module's docstring says."""
        head = self.model.head
        if not isinstance(head, PairHead):
            logits: Tensor = self.model({"images": images, "text": text}).logits
            return logits
        # one side after the other: pairs side by side would fix T, as torch.export sees it
        vectors = []
        for side in images.unbind(1):
            out = self.model.coca(side, text)
            vectors.append(head.pooler(out.decoded, out.masks["multimodal"])[:, 0])
        paired: Tensor = head.classify(torch.cat(vectors, 1))
        return paired


class Exported(nn.Module):
    """A program that takes batches as a :class:`TaskModel` does, without records.

    Args:
        call: Runs it.
        images: How many it is shown with a text, 1 or 2.
        length: L.
        pad_id: Of padding.
    """

    def __init__(self, call: Call, images: int, length: int, pad_id: int) -> None:
        super().__init__()
        self.call, self.images = call, images
        self.longest, self.pad_id = length, pad_id

    def forward(self, batch: Mapping[str, Tensor]) -> TaskOutput:
        """Logits, on the device of the batch."""
        images, text = batch["images"], batch["text"]
        if "pair_image" in batch:
            images = images[batch["pair_image"]]
        if self.images > 1:
            images = images.reshape(-1, self.images, *images.shape[1:])
        logits = self._run(images, text)
        # of captions, [T, L - 1, vocab_size], those of the ids that were given
        return TaskOutput(logits if logits.ndim == 2 else logits[:, : text.shape[1] - 1], {}, {})

    def follow(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """As :meth:`TaskModel.follow`; every token so far is run again."""
        return lambda text: self._run(images, text)[:, text.shape[1] - 1]

    def _run(self, images: Tensor, text: Tensor) -> Tensor:
        padded = F.pad(text, (0, self.longest - text.shape[1]), value=self.pad_id)
        return self.call(images.cpu(), padded.cpu()).to(text.device)


def write(kind: str, path: Path, model: TaskModel, length: int) -> None:
    """Trace a model and write it.

    Args:
        kind: ``"torch-export"`` or ``"onnx"``.
        path: The file.
        model: On the CPU, in evaluation mode.
        length: L.
    """
    coca = model.coca.config
    if not isinstance(model.head, CaptionHead):
        # without the weights of the vocabulary, a third of a small model, which it never runs
        model = copy.deepcopy(model, {id(model.coca.to_vocabulary): nn.Identity()})
    sides = (2,) if isinstance(model.head, PairHead) else ()
    images = torch.zeros(3, *sides, coca.image_channels, coca.image_size, coca.image_size)
    text = torch.ones(3, length, dtype=torch.int64)
    rows = torch.export.Dim("batch", min=1)
    with _quiet(), torch.no_grad():
        program = torch.export.export(
            Program(model).eval(), (images, text), dynamic_shapes=({0: rows}, {0: rows})
        )
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        if kind == "torch-export":
            torch.export.save(program, path)
            return
        made = torch.onnx.export(
            program,
            input_names=["images", "text"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
        assert made is not None
        for node in made.model.graph:
            node.metadata_props.clear()  # of use to debug the tracer, a third of a small file
        size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        made.save(path, external_data=size > ONNX_BYTES)


def read(path: Path, images: int, length: int, pad_id: int) -> Exported:
    """What :func:`write` wrote, by the file's name; the rest as :class:`Exported` has it.

    Raises:
        UserError: The file is damaged.
    """
    try:
        with _quiet():
            call = _torch(path) if path.name == FILES["torch-export"] else _onnx(path)
    except ImportError:
        raise
    except Exception as error:
        # readers of damaged files stumble in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{path} is damaged ({reason}): export it again") from error
    return Exported(call, images, length, pad_id)


def _torch(path: Path) -> Call:
    program: Call = torch.export.load(path).module()
    # as a plain function: such modules refuse eval()
    return lambda images, text: program(images, text)


def _onnx(path: Path) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def call(images: Tensor, text: Tensor) -> Tensor:
        given = {"images": images.numpy(), "text": text.numpy()}
        return torch.from_numpy(session.run(["logits"], given)[0])

    return call


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the tracers say of themselves: deprecated calls, operators of torchvision."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
