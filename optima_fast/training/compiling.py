"""torch.compile of the modules of a run, and what happens where the compiler fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from optima_fast.models import MODULES
from optima_fast.models.task_model import TaskModel


def compile_modules(models: Mapping[str, TaskModel | None], say: Callable[[str], None]) -> None:
    """Compile each module of the models in place, whole: a graph break is a failure.

    A teacher's module has a graph for each of: recorded, run for another module only. The limit
    is raised as student and teacher share the code that is compiled.

    Args:
        models: by the name that a user knows; None is passed over.
        say: is told of a module that cannot be compiled, and why, once for each reason. It then
            runs as it is.
    """
    told: set[str] = set()

    def warn(name: str, error: Exception) -> None:
        why = f"{type(error).__name__}: " + str(error).strip().split("\n")[0]
        if why not in told:
            told.add(why)
            say(
                f"torch.compile fails for {name}; such modules run without it, slower: {why} "
                "(--compile off leaves it out)"
            )

    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for owner, model in models.items():
        if model is None:
            continue
        for name in MODULES:
            module = getattr(model.coca, name)
            module.compile(fullgraph=True)
            _or_plain(module, f"the {owner}'s {name} module", warn)


def _or_plain(module: nn.Module, name: str, warn: Callable[[str, Exception], None]) -> None:
    """Let a compiled module run without the compiler from its first failure on."""
    compiled = module._compiled_call_impl
    assert compiled is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            # before anything has run: what fails while it runs is raised as it is
            module._compiled_call_impl = None
            warn(name, error)
            return module(*args, **kwargs)

    module._compiled_call_impl = call
