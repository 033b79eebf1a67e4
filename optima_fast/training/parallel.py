"""A step on many devices: PyTorch's DDP, or its FSDP for models that are too large for each."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from optima_fast.distill import maps
from optima_fast.errors import UserError
from optima_fast.models import MODULES
from optima_fast.models.task_model import TaskModel
from optima_fast.training import ranks
from optima_fast.training.config import TrainConfig, flag
from optima_fast.training.step import Step

T = TypeVar("T")


def check(config: TrainConfig) -> None:
    """Refuse what a batch that is worked on in parts would not have the same result with.

    Raises:
        UserError: naming it and the way out.
    """
    assert config.batch_size
    parts = ranks.count() * config.accumulate
    if parts == 1:
        return
    way = f"{ranks.count()} processes and --accumulate {config.accumulate}"
    if config.batch_size < parts:
        raise UserError(
            f"--batch-size {config.batch_size} cannot be in {parts} parts, of {way}: it is of all "
            "processes together; raise it or lower these"
        )
    for name, value, why in (
        ("hidden_loss", "contrastive", "learns from the tokens of all steps before"),
        ("hidden_loss", "normalized-mse", "divides by the mean square of a whole batch"),
        ("hidden_scale", "variance", "divides by the variance of a whole batch"),
    ):
        if getattr(config, name) == value:
            raise UserError(
                f"{flag(name)} {value} {why}, which parts of a batch ({way}) do not know: leave "
                "it out, or take one process and --accumulate 1"
            )
    if config.attention_loss == maps.RELATIONS and config.cross_attention:
        raise UserError(
            f"--attention-loss relations with --cross-attention true is of texts and of images at "
            f"once, whose parts ({way}) differ: leave one out, or take one process and "
            "--accumulate 1"
        )


class Engine:
    """Runs a step's module on this process's device, with those of the other processes.

    Every process holds the whole of each model, whose gradients DDP adds up; or, sharded, its part
    of each parameter, of its gradient and of the optimizer's state. FSDP then brings a student's
    parameters together for a step, a teacher's for a layer at a time.

    Args:
        step: what is trained, on its device.
        teacher: on the same device; sharded in place.
        sharded: whether FSDP shards both.
    """

    def __init__(self, step: Step, teacher: TaskModel | None, *, sharded: bool) -> None:
        self.step = step
        self._run: nn.Module = step
        device = next(step.parameters()).device
        self._sharded: list[Any] = []  # FSDP's modules
        if sharded and ranks.count() > 1:
            self._sharded = _sharded(step, teacher, device)
        elif ranks.count() > 1:
            self._run = DistributedDataParallel(
                step,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                # projections of what an arm leaves out have no gradient, nor has a text's [CLS]
                find_unused_parameters=True,
            )

    def backward(
        self, *args: Any, last: bool, under: contextlib.AbstractContextManager[Any]
    ) -> Any:
        """Losses of a part of the batch; its gradient is added to those of the parts before.

        Args:
            args: of :meth:`Step.forward`.
            last: whether it is the step's last part, after which processes add up gradients.
            under: what the forward pass runs in.
        """
        with self._adding_up(last):
            with under:
                losses = self._run(*args)
            # both engines divide the sum by the number of processes
            (losses.total * ranks.count()).backward()
        return losses._replace(total=losses.total.detach())

    @contextlib.contextmanager
    def _adding_up(self, last: bool) -> Iterator[None]:
        if isinstance(self._run, DistributedDataParallel) and not last:
            with self._run.no_sync():
                yield
            return
        for part in self._sharded[:1]:  # the step itself; it tells the others
            part.set_requires_gradient_sync(last)
        yield

    def during(self, body: Callable[[], T]) -> T:
        """Call ``body``, which runs the student itself; its parameters are whole meanwhile."""
        if not self._sharded:
            return body()

        def gathered() -> T:
            for part in self._sharded:
                part.unshard()
            return body()

        try:
            return self.step.during(gathered)
        finally:
            for part in self._sharded:
                part.reshard()


def _sharded(step: Step, teacher: TaskModel | None, device: torch.device) -> list[Any]:
    """Shard both in place; the modules of the step that FSDP gathers, the step first."""
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    except ImportError as error:
        raise UserError(f"--fsdp true needs torch 2.6, got {torch.__version__}") from error
    # records hold views, which nothing writes to
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(device.type, (ranks.count(),))
    parts = [*(getattr(step.student.coca, name) for name in MODULES), step]
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(step, "during")
    if teacher is not None:
        for name in MODULES:
            for layer in getattr(teacher.coca, name).layers:
                fully_shard(layer, mesh=mesh)
        fully_shard(teacher, mesh=mesh)
        register_fsdp_forward_method(teacher, "record")
    return parts[::-1]


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module, whose own may be sharded."""
    own = module.state_dict()
    module.load_state_dict({name: _placed(value, own.get(name)) for name, value in state.items()})


def shard_state(optimizer: torch.optim.Optimizer) -> None:
    """Shard the state of sharded parameters as they are; what has another shape is kept whole."""
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = _placed(value, p)


def _placed(value: Tensor, like: Any) -> Tensor:
    if not ranks.is_sharded(like) or ranks.is_sharded(value):
        return value
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = like.placements if value.shape == like.shape else [Replicate()]
    return distribute_tensor(value.to(like.device), like.device_mesh, placements)
