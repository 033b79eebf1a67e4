"""Policies compared on the recorded rewards of runs, without training again.

Two estimates of what another policy would have earned, neither of which is a run:

``rejection`` (Li et al., "Unbiased offline evaluation of contextual-bandit-based news article
recommendation algorithms", WSDM 2011): go through the recorded rounds, and let the policy see only
those in which it would have pulled the recorded arm. Unbiased where the arms were recorded
uniformly at random (``--policy random``) and rewards depend neither on the round nor on earlier
pulls; uses about one round in K.

``world``: the reward of arm k in round t is one of the :data:`NEAR` recorded rewards of arm k that
are nearest to t, drawn anew for each seed. Uses every round, and rewards may drift with the round;
biased, as a world's rewards do not change with what was pulled before, and as the noise and the
luck of one recording are taken for its means.

Rewards of distillation depend on the round and on earlier pulls: take either for a hint.
"""

from __future__ import annotations

import inspect
import json
import math
import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from optima_fast import bandit
from optima_fast.entry import old_spelling
from optima_fast.errors import UserError, unknown

NEAR = 5


class Log(NamedTuple):
    """The rounds of one run: which arm was pulled, and what it earned."""

    name: str
    arms: list[str]
    choices: list[int]
    rewards: list[float]

    def pulls(self) -> list[int]:
        return [self.choices.count(arm) for arm in range(len(self.arms))]

    def means(self) -> list[float]:
        """Mean reward of each arm; not a number for one never pulled."""
        earned: list[list[float]] = [[] for _ in self.arms]
        for arm, reward in zip(self.choices, self.rewards, strict=True):
            earned[arm].append(reward)
        return [math.fsum(e) / len(e) if e else math.nan for e in earned]


class Outcome(NamedTuple):
    """What a policy did in one replay: rounds it saw, how many of them before its first choice,
    mean reward, share of the best arm."""

    rounds: int
    warm_up: int
    mean: float
    best: float


def read(run: str | Path, least: int = 1) -> Log:
    """The recorded rounds of a run folder.

    Args:
        run: the folder, which holds ``metrics.jsonl``.
        least: rounds that every arm must have been pulled in.

    Raises:
        UserError: no such file, a damaged one, no rewards in it, or an arm pulled too seldom.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from error
    names: dict[int, str] = {}
    log = Log(str(run), [], [], [])
    before: list[int] = []
    for number, row in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(row)
            if not isinstance(line, dict):
                raise ValueError("not an object")
            if "reward" not in line:
                continue
            counts, reward = line["counts"], float(line["reward"])
            before = before or [0] * len(counts)
            moved = [b - a for a, b in zip(before, counts, strict=True)]
            if sorted(moved) != [0] * (len(moved) - 1) + [1] or not math.isfinite(reward):
                raise ValueError("its counts do not follow from those before")
            arm, before = moved.index(1), counts
            names[arm] = str(line["arm"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}, line {number}: not the record of a round ({error})") from None
        log.choices.append(arm)
        log.rewards.append(reward)
    if not log.choices:
        raise UserError(f"{path} holds no rewards: record them with --method optima")
    log.arms.extend(names.get(i, f"arm {i + 1}") for i in range(len(before)))
    for arm, pulls in enumerate(before):
        if pulls < least:
            raise UserError(
                f"{run}: {log.arms[arm]} was pulled {pulls} times in {len(log.choices)} rounds, "
                f"and a comparison needs {least} of each arm: record with --policy random, or "
                "lower --least"
            )
    return log


def rejection(policy: bandit.Policy, log: Log) -> Outcome:
    """Show the policy the recorded rounds in which it would have pulled the recorded arm."""
    chosen, earned = [], []
    for arm, reward in zip(log.choices, log.rewards, strict=True):
        if policy.select() == arm:
            policy.update(arm, reward)
            chosen.append(arm)
            earned.append(reward)
    return _outcome(log, policy, chosen, earned)


def world(policy: bandit.Policy, log: Log, seed: int) -> Outcome:
    """Let the policy pull in every round, for rewards drawn from recorded ones near it."""
    near = _Near(log)
    generator = random.Random(seed)
    chosen, earned = [], []
    for round in range(len(log.choices)):
        # one draw a round, whatever the arm: all policies meet the same luck
        draw = generator.random()
        arm = policy.select()
        reward = near.reward(arm, round, draw)
        policy.update(arm, reward)
        chosen.append(arm)
        earned.append(reward)
    return _outcome(log, policy, chosen, earned)


class _Near:
    """The recorded rewards of each arm that are nearest to a round."""

    def __init__(self, log: Log) -> None:
        self._rounds: list[list[int]] = [[] for _ in log.arms]
        self._rewards: list[list[float]] = [[] for _ in log.arms]
        for round, (arm, reward) in enumerate(zip(log.choices, log.rewards, strict=True)):
            self._rounds[arm].append(round)
            self._rewards[arm].append(reward)

    def reward(self, arm: int, round: int, draw: float) -> float:
        rounds, rewards = self._rounds[arm], self._rewards[arm]
        low = high = bisect_left(rounds, round)
        while high - low < min(NEAR, len(rounds)):
            if high == len(rounds) or (low and round - rounds[low - 1] <= rounds[high] - round):
                low -= 1
            else:
                high += 1
        return rewards[low + int(draw * (high - low))]


def _outcome(
    log: Log, policy: bandit.Policy, chosen: Sequence[int], earned: Sequence[float]
) -> Outcome:
    n, means = len(chosen), log.means()
    best = max(range(len(means)), key=lambda arm: (not math.isnan(means[arm]), means[arm]))
    if not n:
        return Outcome(0, 0, math.nan, math.nan)
    return Outcome(n, min(n, policy.warm_up), math.fsum(earned) / n, chosen.count(best) / n)


def policies(text: str) -> list[str]:
    """The policies that ``all`` or a list of names stands for.

    Raises:
        UserError: an unknown name (with the nearest), one that is gone, or one that cannot choose.
    """
    known = [name for name in bandit.names() if name != bandit.Fixed.name]
    if text == "all":
        return known
    given = [part.strip() for part in text.split(",") if part.strip()]
    for name in given:
        if bandit.current(name) != name:
            old_spelling(f"policy {name}", bandit.current(name))
    names = list(dict.fromkeys(map(bandit.current, given)))
    if not names:
        raise UserError(f"--policies {text!r} names none; take all, or from {', '.join(known)}")
    for name in names:
        if name == bandit.Fixed.name:
            raise UserError("policy fixed has one arm: its reward is in the table of the arms")
        if bandit.gone(name):
            raise UserError(bandit.gone(name))
        if name not in known:
            raise unknown("policy", name, known)
    return names


def compare(
    logs: Sequence[Log], names: Sequence[str], *, seed: int, repeats: int, **options: Any
) -> dict[str, list[dict[str, Any]]]:
    """Replay every policy on every log with several seeds.

    Args:
        logs: what was recorded.
        names: of policies; ``random`` is replayed anyway, to compare with.
        seed: the first of ``repeats`` seeds of policies and worlds.
        repeats: at least 1.
        options: of the policies, for those that have them; None leaves it to the policy.

    Returns:
        For ``rejection`` and ``world`` a row a policy, the best first: means over runs and seeds of
        ``rounds`` (used), ``warm_up`` (of them before any choice), ``mean`` (reward), ``best``
        (share of the arm of the highest recorded mean) and ``vs_random``, and ``deviation`` (of
        the mean reward between seeds).
    """
    rows: dict[str, list[dict[str, Any]]] = {"rejection": [], "world": []}
    for method, table in rows.items():
        outcomes = {}
        for name in dict.fromkeys([bandit.Random.name, *names]):
            outcomes[name] = [
                [_replay(method, make(name, log, seed + i, options), log, seed + i) for log in logs]
                for i in range(repeats)
            ]
        baseline = _summary(outcomes[bandit.Random.name])["mean"]
        for name in names:
            row = _summary(outcomes[name])
            table.append({"policy": name, **row, "vs_random": row["mean"] - baseline})
        table.sort(key=lambda row: -row["mean"] if math.isfinite(row["mean"]) else math.inf)
    return rows


def make(name: str, log: Log, seed: int, options: Mapping[str, Any]) -> bandit.Policy:
    """A policy for the arms of a log, with those of the options that it has.

    Raises:
        UserError: a value that the policy refuses.
    """
    known = inspect.signature(type(bandit.make(name, 3))).parameters
    given = {k: v for k, v in options.items() if k in known and v is not None}
    if "init_rounds" in given and "warmup_limit" in known:
        given["warmup_limit"] = given["init_rounds"] * len(log.arms)
    try:
        return bandit.make(name, len(log.arms), seed=seed, **given)
    except ValueError as error:
        raise UserError(f"policy {name}: {error}") from error


def _replay(method: str, policy: bandit.Policy, log: Log, seed: int) -> Outcome:
    return rejection(policy, log) if method == "rejection" else world(policy, log, seed)


def _summary(outcomes: Sequence[Sequence[Outcome]]) -> dict[str, float]:
    """Means over seeds and runs; a replay that used no round counts for its rounds alone."""
    every = [outcome for row in outcomes for outcome in row]
    used = [outcome for outcome in every if outcome.rounds]
    by_seed = [_mean([o.mean for o in row if o.rounds]) for row in outcomes]
    centre = _mean([m for m in by_seed if not math.isnan(m)])
    spread = math.fsum((m - centre) ** 2 for m in by_seed if not math.isnan(m))
    return {
        "rounds": _mean([o.rounds for o in every]),
        "warm_up": _mean([o.warm_up for o in every]),
        "mean": _mean([o.mean for o in used]),
        "deviation": math.sqrt(spread / max(1, len(by_seed) - 1)),
        "best": _mean([o.best for o in used]),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
