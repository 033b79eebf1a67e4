"""Settings as they were spelled before, in commands, files of settings and run folders.

``attention_target`` is ``attention_loss`` now. ``--method optima`` meant ``--policy greedy`` on
``--reward headroom`` unless a policy or a reward was given, and was the default; the published
bandit and its reward were both called ``paper``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optima_fast import bandit
from optima_fast.distill.reward import HEADROOM
from optima_fast.entry import old_spelling
from optima_fast.training.config import CHOICES, OF_A_CHOICE, TrainConfig, unusual

_CHOICE = ("method", "policy", "reward")


def modern_name(name: str) -> str:
    """What a setting is called now."""
    return {"attention_target": "attention_loss"}.get(name, name)


def modern_flag(text: str) -> str:
    """An argument of a command as it is spelled now; an old spelling is said."""
    name, equals, value = text.partition("=")
    if name != "--attention-target":
        return text
    old_spelling(name, "--attention-loss")
    return f"--attention-loss{equals}{value}"


def modern(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings as they are spelled now; those that are spelled so already as they are."""
    settings = {modern_name(name): value for name, value in settings.items()}
    method, reward = settings.get("method"), settings.get("reward")
    policy = settings.get("policy") and bandit.current(settings["policy"])
    reward = "drop" if reward == "paper" else reward
    greedy = bandit.Greedy.name
    if method is None and (policy or reward):
        method, policy = "optima", policy or greedy
    if method == "optima" and policy == greedy and reward in (None, HEADROOM):
        method = "headroom"
    choice = zip(_CHOICE, (method, policy, reward), strict=True)
    return {**settings, **{k: v for k, v in choice if v is not None or k in settings}}


def modern_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The same for what ``summary.json`` says of a run."""
    reward = summary.get("reward")
    choice = {"method": summary["method"], "policy": summary["policy"]}
    choice = modern({**choice, "reward": reward and reward["name"]})
    if reward:
        choice["reward"] = {**reward, "name": choice["reward"]}
    return {**summary, **choice}


def over(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were given over those of a file, spelled as now; an old spelling is said.

    Where another method or policy was given than the file's, what the file says of its own counts
    no longer.
    """
    before = modern(file)
    if _chosen({**before, **given}) != _chosen(before):
        file = {name: value for name, value in file.items() if name not in OF_A_CHOICE}
    both = {**file, **given}
    now = modern(both)
    if now != both:
        TrainConfig(**now)  # what is wrong however it is spelled is an error, and only that
        choice = {"method": now["method"], **unusual(now["method"], now)}
        old_spelling(_as_flags(both), _as_flags(choice))
    return now


def _chosen(settings: Mapping[str, Any]) -> tuple[str | None, str | None]:
    method = settings.get("method")
    policy = settings.get("policy") or CHOICES.get(method or "", {}).get("policy")
    return method, policy and bandit.current(policy)


def _as_flags(settings: Mapping[str, Any]) -> str:
    given = {name: settings[name] for name in _CHOICE if settings.get(name) is not None}
    return " ".join(f"--{name} {value}" for name, value in given.items())
