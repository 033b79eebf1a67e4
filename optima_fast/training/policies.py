"""The bandit of a run, made from settings that may leave its options to the policy."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from optima_fast import bandit
from optima_fast.distill.arms import ArmSpace
from optima_fast.errors import UserError

if TYPE_CHECKING:
    from optima_fast.training.config import TrainConfig

OPTIONS = ("gamma", "init_rounds", "variance_scale")


def choices() -> list[str]:
    """The policies that ``--policy`` may name: all that need no arm to be told."""
    return [name for name in bandit.names() if name != bandit.Fixed.name]


def options(name: str) -> set[str]:
    """What a policy can be told besides its arms."""
    return set(inspect.signature(type(bandit.make(name, 3))).parameters) - {"arms"}


def make(config: TrainConfig, space: ArmSpace) -> bandit.Policy:
    """The policy of a run, over its arms.

    Options that the settings leave open, or that the policy does not have, are the policy's own;
    policies that learn across arms are told what each is made of.

    Raises:
        UserError: a value that the policy refuses.
    """
    assert config.policy
    name = bandit.Random.name if config.method == "random" else config.policy
    if bandit.gone(name):
        raise UserError(bandit.gone(name))
    known = options(name)
    chosen: dict[str, Any] = {key: getattr(config, key) for key in OPTIONS if key in known}
    if "features" in known:
        chosen["features"] = space.features
    chosen = {key: value for key, value in chosen.items() if value is not None}
    if "init_rounds" in chosen and "warmup_limit" in known:
        # what is asked for is limited by the rounds of the run alone
        chosen["warmup_limit"] = chosen["init_rounds"] * len(space.arms)
    try:
        return bandit.make(name, len(space.arms), seed=config.seed, **chosen)
    except (TypeError, ValueError) as error:
        raise UserError(f"--policy {name}: {error}") from error


def check_options(config: TrainConfig) -> None:
    """Refuse options that were given to a policy without them.

    Raises:
        UserError: naming the option and those that the policy has.
    """
    assert config.policy
    known = options(config.policy)
    whose = (
        f"--policy {config.policy}" if config.method == "optima" else f"--method {config.method}"
    )
    for key in OPTIONS:
        if getattr(config, key) is not None and key not in known:
            has = ", ".join(f"--{k.replace('_', '-')}" for k in OPTIONS if k in known)
            raise UserError(
                f"--{key.replace('_', '-')} is no option of {whose}, which has {has or 'none'}: "
                "leave it out"
            )
