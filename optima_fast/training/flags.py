"""Settings from a command line and from YAML files: a flag and a key for each field."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from optima_fast.entry import Parser
from optima_fast.errors import UserError
from optima_fast.training import spelling
from optima_fast.training.config import TrainConfig, default_text, flag, no_choice


def parse(argv: Sequence[str] | None, *, prog: str, description: str) -> dict[str, Any]:
    """The settings that flags give, over those of ``--config FILE.yaml``; no defaults.

    ``dry_run`` is among them where ``--dry-run`` was given. Where flags name another method or
    policy than the file, the file's policy, reward and options of it do not count. An old spelling
    of the choice is said on stderr.

    Raises:
        UserError: an unknown flag or key (with the nearest name), or a value of the wrong type.
    """
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="read settings from a YAML file")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=argparse.SUPPRESS,
        help="check files and settings, print sizes, arithmetic and memory of a step, and stop",
    )
    for field in dataclasses.fields(TrainConfig):
        parser.add_argument(
            flag(field.name),
            metavar=_metavar(field),
            default=argparse.SUPPRESS,
            help=field.metadata["help"] + default_text(field),
        )
    known, rest = parser.parse_known_args(argv)
    if rest:
        names = [flag(f.name) for f in dataclasses.fields(TrainConfig)] + ["--config", "--help"]
        raise UserError(no_choice("flag", rest[0].partition("=")[0], names, list_all=False))
    given = vars(known)
    path, dry = given.pop("config"), given.pop("dry_run", None)
    values = read_yaml(Path(path)) if path else {}
    given = {name: _convert(flag(name), name, text) for name, text in given.items()}
    values = spelling.over(values, given)
    return values if dry is None else {**values, "dry_run": dry}


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, checked by name and type.

    Raises:
        UserError: no such file, not a mapping, an unknown key, a value of the wrong type.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} must hold 'key: value' lines, got a {type(loaded).__name__}")
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    values = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise UserError(no_choice(f"{path}: key", str(key), names, list_all=False))
        values[name] = _convert(f"{path}: {key}", name, value)
    return values


def to_yaml(config: TrainConfig) -> str:
    """The settings as YAML that :func:`read_yaml` reads back to the same values."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _convert(where: str, name: str, value: Any) -> Any:
    """``value`` in the type of the field ``name``."""
    kinds = _kinds(name)
    if value is None or value == "":
        if types.NoneType in kinds:
            return None
        raise UserError(f"{where} must not be empty")
    kind = next(k for k in kinds if k is not types.NoneType)
    if kind is bool:
        text = str(value).lower()
        if text in ("true", "false"):
            return text == "true"
    elif not isinstance(value, (bool, Mapping, list)):
        try:
            # YAML reads 1e-3 as a string and 1 as an int where a float is meant
            if kind is not int or float(value) == int(float(value)):
                return kind(value) if kind is not int else int(float(value))
        except (ValueError, OverflowError):
            pass
    raise UserError(f"{where} must be {_KIND_NAMES[kind]}, got {value!r}")


_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _kinds(name: str) -> tuple[type, ...]:
    hint = typing.get_type_hints(TrainConfig)[name]
    return typing.get_args(hint) or (hint,)


def _metavar(field: dataclasses.Field[Any]) -> str:
    choices = field.metadata["choices"]
    if choices:
        return "|".join(choices)
    kind = next(k for k in _kinds(field.name) if k is not types.NoneType)
    return {int: "N", float: "X", bool: "true|false", str: "NAME"}[kind]
