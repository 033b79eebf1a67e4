"""The losses as a repository for Hugging Face's ``kernels``, which loads them without an install.

    python kernels/hub/lay_out.py build/hub    # what `make hub` runs; nothing is published

The folder gets ``build.toml``, ``CARD.md`` and ``torch-ext/optima_fast``, which ``kernel-builder``
builds from, and ``build/torch-cpu`` and ``build/torch-cuda``, which it would build, and which
``kernels`` loads. All hold the same files: the losses and whatever they import.

``kernels`` imports a module under a name of its own, so that a process may hold several versions.
Imports of this package therefore become relative, and the operators move to the namespace that
``_ops.py`` names, which is another one as soon as a line of the sources is.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import optima_fast

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = "optima_fast"
NAME = "optima-fast"
NOWHERE = f"OWNER/{NAME}"  # until somebody says where it will be published
VERSION = int(optima_fast.__version__.split(".")[0])  # of the interface; 0 promises nothing yet
BACKENDS = ("cpu", "cuda")  # triton where there is CUDA; the blocks of plain PyTorch on both
LOSSES = [name for name, home in optima_fast._HOMES.items() if home == f"{PACKAGE}.losses"]
OUTSIDE = {"torch", "triton", *sys.stdlib_module_names}

BUILD = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = [{backends}]
{hub}
[torch-noarch]
"""
INIT = '''\
"""optima_fast {release}: layerwise distillation losses, forward and backward, of many layers."""

from .losses import (
{imported}
)

__all__ = [
{listed}
]
'''
OPS = '''\
"""The namespace of this build's operators, which no other build has."""

NAMESPACE = "{identifier}"


def add_op_namespace_prefix(name: str) -> str:
    """The full name of an operator."""
    return f"{{NAMESPACE}}::{{name}}"
'''
# of all that kernels/launcher.py does: the extension that it can launch by is not here
LAUNCHER = '''\
"""How a kernel is launched: by Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton


def kernel(do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit``, for what the host launches."""
    return triton.jit(do_not_specialize=list(do_not_specialize))
'''
# a folder of the package's name is where old versions of `kernels` look
INNER = '''\
"""The package around this folder."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "{identifier}", Path(__file__).resolve().parents[1] / "__init__.py"
)
_package = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _package
_spec.loader.exec_module(_package)
__all__ = _package.__all__
globals().update({{name: getattr(_package, name) for name in __all__}})
'''
WRITTEN = {"kernels/launcher.py": LAUNCHER}  # instead of what stands there


def source(module: str) -> tuple[str, str] | None:
    """Where a module of the package stands in the repository, and its text; None if it is none."""
    top, *below = module.split(".")
    if top != PACKAGE or not below:
        return None
    above = ROOT if below[0] == "kernels" else ROOT / PACKAGE
    for place in ("/".join(below) + ".py", "/".join([*below, "__init__.py"])):
        if (above / place).is_file():
            return place, WRITTEN.get(place) or (above / place).read_text(encoding="utf-8")
    return None


def imports(place: str, text: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Each import of a file, and the full name of every module that it may mean."""
    package = ".".join([PACKAGE, *place.split("/")[:-1]])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package) if node.level else base
            yield node, base
            yield from ((node, f"{base}.{alias.name}") for alias in node.names)


def relative(place: str, text: str) -> str:
    """A file with relative imports, and operators in the namespace that ``_ops.py`` names."""
    up = "." * (1 + place.count("/"))
    lines = text.splitlines(keepends=True)
    for node, name in imports(place, text):
        if isinstance(node, ast.ImportFrom) and not node.level and name.split(".")[0] == PACKAGE:
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = re.sub(rf"\bfrom {PACKAGE}\b\.?", f"from {up}", line, count=1)
    text, operators = re.subn(
        rf'f"{PACKAGE}::([^"]*)"', r'add_op_namespace_prefix(f"\1")', "".join(lines)
    )
    if operators:
        lines = text.splitlines(keepends=True)
        kinds = (ast.Import, ast.ImportFrom)
        last = [node for node in ast.parse(text).body if isinstance(node, kinds)][-1]
        lines.insert(last.end_lineno or 0, f"from {up}_ops import add_op_namespace_prefix\n")
        text = "".join(lines)
    return text


def problems(files: dict[str, str]) -> list[str]:
    """What ``kernels`` does not allow in these files: imports, and namespaces of operators."""
    found = []
    for place, text in files.items():
        for node, name in imports(place, text):
            top = name.split(".")[0]
            inside = isinstance(node, ast.ImportFrom) and node.level > 0
            if not inside and top not in OUTSIDE:
                found.append(f"{place}:{node.lineno} imports {name}")
        constants = [x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.Constant)]
        for part in constants:
            if isinstance(part.value, str) and part.value.startswith(f"{PACKAGE}::"):
                found.append(f"{place}:{part.lineno} names an operator {part.value}")
    return found


def package() -> dict[str, str]:
    """The text of each file of the package, by its place in it: all that the losses import.

    Raises:
        ValueError: it needs something besides torch, triton and Python.
    """
    files = {
        "__init__.py": INIT.format(
            release=optima_fast.__version__,
            imported="\n".join(f"    {name}," for name in LOSSES),
            listed="\n".join(f'    "{name}",' for name in LOSSES),
        ),
        "kernels/__init__.py": '"""Triton kernels of the losses."""\n',
    }
    waiting = [f"{PACKAGE}.losses"]
    while waiting:
        found = source(waiting.pop())
        if found is None or found[0] in files:
            continue
        place, text = found
        files[place] = relative(place, text)
        waiting += [name for _, name in imports(place, text)]
    wrong = problems(files)
    if wrong:
        raise ValueError(f"only torch, triton and Python may be imported: {'; '.join(wrong)}")
    return dict(sorted(files.items()))


def write(folder: Path, files: dict[str, str]) -> None:
    """Write files, by their place in the folder."""
    for place, text in files.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


def lay_out(folder: Path, version: int = VERSION, repo: str = NOWHERE) -> None:
    """Lay the repository out.

    Args:
        folder: where; what is in ``build`` and ``torch-ext`` there is replaced.
        version: of the interface, a branch of its own in the hub.
        repo: what the card and ``build.toml`` call the repository, with its owner.

    Raises:
        ValueError: the losses import what ``kernels`` does not allow.
    """
    files = package()
    content = json.dumps([version, files]).encode()
    unique = hashlib.sha256(content).hexdigest()[:10]
    for old in ("build", "torch-ext"):
        shutil.rmtree(folder / old, ignore_errors=True)
    card = (HERE / "CARD.md").read_text(encoding="utf-8")
    top = {
        "build.toml": BUILD.format(
            name=NAME,
            version=version,
            backends=", ".join(f'"{backend}"' for backend in BACKENDS),
            hub="" if repo == NOWHERE else f'\n[general.hub]\nrepo-id = "{repo}"\n',
        ),
        "CARD.md": card.replace(NOWHERE, repo).replace("VERSION", str(version)),
        "LICENSE": (ROOT / "LICENSE").read_text(encoding="utf-8"),
    }
    write(folder, top)
    write(folder / "torch-ext" / PACKAGE, files)  # kernel-builder adds an _ops.py of its own
    for backend in BACKENDS:
        identifier = f"_{PACKAGE}_{backend}_{unique}"
        built = {
            **files,
            "_ops.py": OPS.format(identifier=identifier),
            f"{PACKAGE}/__init__.py": INNER.format(identifier=identifier),
        }
        digests = {
            place: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            for place, text in sorted(built.items())
        }
        metadata = {
            "name": NAME,
            "id": identifier,
            "version": version,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests},
        }
        built["metadata.json"] = json.dumps(metadata, indent=2) + "\n"
        write(folder / "build" / f"torch-{backend}", built)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="for the repository")
    parser.add_argument("--repo", default=NOWHERE, help="where it will be published")
    given = parser.parse_args()
    lay_out(given.folder, repo=given.repo)
    upload = f"kernel-builder upload {given.folder} --repo-id {given.repo}"
    print(f"{given.folder}: version {VERSION}; to publish it: {upload}")


if __name__ == "__main__":
    main()
