"""Settings from a command line and from YAML files: a flag and a key for each field."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from optima_fast.distill import recipes
from optima_fast.entry import Parser
from optima_fast.errors import UserError, unknown
from optima_fast.training import spelling
from optima_fast.training.config import TrainConfig, default_text, flag


def parse(argv: Sequence[str] | None, *, prog: str, description: str) -> dict[str, Any]:
    """The settings that flags give, over those of ``--config FILE.yaml``; no defaults.

    ``dry_run`` is among them where ``--dry-run`` was given. Where flags name another method or
    policy than the file, the file's policy, reward and options of it do not count; where a flag
    names a recipe, nor does what the file says of its settings. What is given beside a recipe, by
    flags or in its file, overrides it. An old spelling of the choice is said on stderr.

    Raises:
        UserError: an unknown flag or key (with the nearest name), or a value of the wrong type.
    """
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--dry-run] [--SETTING VALUE ...]",
        description=description,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="read settings from a YAML file")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=argparse.SUPPRESS,
        help="check files and settings, print the size, arithmetic and memory of a step, and stop",
    )
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(TrainConfig):
        if field.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[field.name])
        group.add_argument(
            flag(field.name),
            metavar=_metavar(field),
            default=argparse.SUPPRESS,
            help=field.metadata["help"] + default_text(field),
        )
    argv = [spelling.modern_flag(text) for text in (sys.argv[1:] if argv is None else argv)]
    known, rest = parser.parse_known_args(argv)
    if rest:
        names = [flag(f.name) for f in dataclasses.fields(TrainConfig)] + ["--config", "--help"]
        raise unknown("flag", rest[0].partition("=")[0], names, otherwise="--help lists them")
    given = vars(known)
    path, dry = given.pop("config"), given.pop("dry_run", None)
    values = read_yaml(Path(path)) if path else {}
    given = {name: _convert(flag(name), name, text) for name, text in given.items()}
    if "recipe" in given:
        values = {name: value for name, value in values.items() if name not in recipes.names()}
    values = spelling.over(values, given)
    if values.get("recipe") in recipes.RECIPES:
        task = values.get("task", TrainConfig.task)
        values = {**recipes.settings(values["recipe"], task), **values}
    return values if dry is None else {**values, "dry_run": dry}


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, checked by name and type.

    Raises:
        UserError: no such file, not a mapping, an unknown or repeated key, a value of the wrong
            type.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=_Texts)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if root is None or root.tag == _NULL:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} must hold 'key: value' lines, got {_text(root)}")
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, node in root.value:
        key, line = str(_text(key_node)), key_node.start_mark.line + 1
        name = spelling.modern_name(key.replace("-", "_"))
        if name not in names:
            hint = unknown("key", key, names, otherwise="--help lists them")
            raise UserError(f"{path}: {hint}")
        if name in lines:
            raise UserError(
                f"{path}: {key} is in line {lines[name]} and again in line {line}: keep one"
            )
        lines[name] = line
        values[name] = _value(f"{path}: {key}", name, node)
    return values


# headings of --help, each above the setting that it begins with
_GROUPS = {
    "task": "what is distilled",
    "policy": "how modules are chosen",
    "teacher": "models",
    "steps": "steps and rounds",
    "train_images": "data and optimizer",
    "hidden_weight": "losses",
    "teacher_steps": "the teacher's own training",
    "seed": "seeds and machine",
    "keep": "files and records",
}

_NULL = "tag:yaml.org,2002:null"


class _Texts(yaml.SafeLoader):
    """YAML whose plain scalars are texts, or the nulls of YAML 1.2.

    What a text means is up to the type of its setting, as on the command line. PyYAML's own rules
    are those of YAML 1.1, where ``off`` is a boolean, ``010`` is 8 and ``1e-3`` is a text.
    """

    yaml_implicit_resolvers: Any = {}  # noqa: RUF012 (as the base class declares it)


_Texts.add_implicit_resolver(_NULL, re.compile("(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])


def _text(node: yaml.Node) -> str | None:
    """What a scalar says, ``None`` for null; of anything else, what it is."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == _NULL else str(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _value(where: str, name: str, node: yaml.Node) -> Any:
    """What a node says of the setting ``name``."""
    if isinstance(node, yaml.MappingNode) and Mapping in _kinds(name):
        return _weights(where, node)
    if not isinstance(node, yaml.ScalarNode):
        kind = "one value" if Mapping not in _kinds(name) else "a number or a mapping by module"
        raise UserError(f"{where} must be {kind}, got {_text(node)}")
    return _convert(where, name, _text(node))


def _weights(where: str, node: yaml.Node, depth: int = 0) -> Any:
    """Numbers, in lists and mappings as they are written; no deeper than weights are."""
    if isinstance(node, yaml.SequenceNode) and depth < 2:
        return [_weights(where, item, depth + 1) for item in node.value]
    if isinstance(node, yaml.MappingNode) and depth < 2:
        pairs = [(str(_text(key)), _weights(where, value, depth + 1)) for key, value in node.value]
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{where} has {name} twice: keep one")
        return dict(pairs)
    with contextlib.suppress(ValueError, TypeError):
        return float(_text(node))  # type: ignore[arg-type]
    raise UserError(f"{where} must be of numbers, got {_text(node)!r}")


def to_yaml(config: TrainConfig) -> str:
    """The settings as YAML that :func:`read_yaml` reads back to the same values."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _convert(where: str, name: str, value: str | None) -> Any:
    """``value`` in the type of the field ``name``."""
    kinds = _kinds(name)
    if not value:
        if types.NoneType in kinds:
            return None
        raise UserError(f"{where} must not be empty")
    kind = next(k for k in kinds if k is not types.NoneType)
    if Mapping in kinds and value.lstrip().startswith("{"):
        try:
            node = yaml.compose(value, Loader=_Texts)
        except yaml.YAMLError as error:
            raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
        assert node is not None
        return _value(where, name, node)
    if kind is bool:
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
    else:
        with contextlib.suppress(ValueError, OverflowError):
            return _whole(value) if kind is int else kind(value)
    raise UserError(f"{where} must be {_KIND_NAMES[kind]}, got {value!r}")


def _whole(text: str) -> int:
    """``010`` is 10, ``1e3`` is 1000, ``0x10`` is 16.

    Raises:
        ValueError: it is no whole number.
    """
    for base in (10, 0):
        with contextlib.suppress(ValueError):
            return int(text, base)
    if not float(text).is_integer():
        raise ValueError(text)
    return int(float(text))


_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _kinds(name: str) -> tuple[type, ...]:
    """The types of a setting; of a mapping that alone, whatever it holds."""
    hint = typing.get_type_hints(TrainConfig)[name]
    return tuple(typing.get_origin(kind) or kind for kind in typing.get_args(hint) or (hint,))


def _metavar(field: dataclasses.Field[Any]) -> str:
    choices = field.metadata["choices"]
    if choices:
        return "|".join(choices)
    kind = next(k for k in _kinds(field.name) if k is not types.NoneType)
    return {int: "N", float: "X", bool: "true|false", str: "NAME"}[kind]
