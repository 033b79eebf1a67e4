"""Everything that the rest of a run depends on, as a checkpoint, and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optima_fast.distill import Measurement
from optima_fast.errors import UserError
from optima_fast.training import checkpoints, parallel, ranks, spelling
from optima_fast.training.config import TrainConfig

if TYPE_CHECKING:
    from optima_fast.training.trainer import Trainer

FORMAT = 5  # of checkpoints
READ = (4, FORMAT)  # format 4 kept states of random generators, which steps no longer depend on
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
_COUNTERS = ("step", "round", "choice", "round_began", "last_metric", "left_out")
_LATER = ("best_metric", "kept_step")  # counters that older checkpoints lack


def save(trainer: Trainer) -> Path:
    """Write a checkpoint of everything that the rest of the run depends on."""
    known = trainer.meter.known if trainer.meter else None
    state: dict[str, Any] = {
        "format": FORMAT,
        "config": dataclasses.asdict(trainer.config),
        **{name: getattr(trainer, name) for name in (*_COUNTERS, *_LATER)},
        "student": ranks.whole(trainer.student.state_dict()),
        "projections": ranks.whole(trainer.distiller.state_dict()) if trainer.distiller else {},
        "cells": ranks.whole(trainer.cells.state_dict()),
        "optimizer": ranks.whole(trainer.optimizer.state_dict()),
        "bandit": trainer.policy.state_dict() if trainer.policy else None,
        "before": trainer.before._asdict() if trainer.before else None,
        "headroom": known.state_dict() if known else None,
        "balance": trainer.balance.state_dict() if trainer.balance else None,
        "pulls": trainer.pulls,
        "seconds": trainer.seconds,
        "metrics_size": trainer.run.metrics_size(),
        "teacher": trainer.teacher_digest,
    }
    return checkpoints.save_checkpoint(trainer.run.checkpoints, trainer.step, state)


def restore(trainer: Trainer, path: Path) -> None:
    """Continue from a checkpoint, exactly.

    Raises:
        UserError: the file is damaged, or of a run with other settings.
    """
    state = checkpoints.load_checkpoint(path)
    mine = trainer.run.computed_by(dataclasses.asdict(trainer.config))
    try:
        if state["format"] not in READ:
            raise UserError(f"checkpoint {path} has format {state['format']}, not {FORMAT}")
        # what there was no setting for then was done as by default
        theirs = {**_DEFAULTS, **spelling.modern(state["config"])}
        theirs = trainer.run.computed_by(theirs)
        if theirs != mine:
            name = next(k for k in {**mine, **theirs} if theirs.get(k) != mine.get(k))
            raise UserError(
                f"checkpoint {path} is of another configuration: {name} is {theirs.get(name)} "
                f"there and {mine.get(name)} here"
            )
        if state["teacher"] != trainer.teacher_digest:
            raise UserError(
                f"checkpoint {path} was made with another teacher than {trainer.config.teacher} "
                "is now: put the old one back, or start over in another --out"
            )
        parallel.load_weights(trainer.student, state["student"])
        if trainer.distiller is not None:
            parallel.load_weights(trainer.distiller, state["projections"])
        parallel.load_weights(trainer.cells, state["cells"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        parallel.shard_state(trainer.optimizer)
        if trainer.policy is not None:
            trainer.policy.load_state_dict(state["bandit"])
        for name in (*_COUNTERS, "pulls", "seconds"):
            setattr(trainer, name, state[name])
        for name in _LATER:
            setattr(trainer, name, state.get(name, getattr(trainer, name)))
        trainer.before = Measurement(**state["before"]) if state["before"] else None
        if trainer.meter is not None and trainer.meter.known is not None:
            trainer.meter.known.load_state_dict(state["headroom"])
        if trainer.balance is not None:
            trainer.balance.load_state_dict(state["balance"])
        trainer.run.truncate_metrics(state["metrics_size"])
    except UserError:
        raise
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"checkpoint {path} does not fit this run: {error}") from error
