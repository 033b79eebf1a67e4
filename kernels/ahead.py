"""Kernels compiled ahead of time, and how they are found again.

``OPTIMA_FAST_CUDA="80;90" pip install .`` runs ``python -m optima_fast.kernels.ahead`` (setup.py).
It needs no GPU: the host's side of every case in cases.py runs on a CPU for each architecture,
dtype and number of layers, and what it would launch is compiled. Ninja runs these parts side by
side, and only those whose sources changed. An architecture's binaries are one archive in
``kernels/cubins``, or in the user's cache, where ``python -m optima_fast.doctor --warm`` puts it.
One that other sources made does not count.

A kernel that is asked for with other dtypes, widths of a head or strides than the cases have is
compiled by Triton when it is first called, as all are without an archive.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .cases import CASES, Case

HERE = Path(__file__).parent
FOLDER = HERE / "cubins"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYERS = (4, 16)  # what layers.pointers pads to
INDEX = "index.json"
# what each operator's kernels are made of, beside the modules that all share
OWN = {
    "hidden_mse": ("hidden_mse",),
    "attention_scores": ("attention_scores",),
    "attention_probs": ("attention_probs", "probs_rows", "probs_sweeps"),
    "attention_kl": ("attention_kl", "attention_probs", "probs_rows", "probs_sweeps"),
    "indexer": ("indexer", "attention_probs", "probs_sweeps"),
    "strips": ("attention_scores", "attention_probs", "probs_sweeps", "indexer"),
}


def digest(kernel: str, key: bytes) -> str:
    """What a variant is called in an archive."""
    return hashlib.sha256(kernel.encode() + b"\0" + key).hexdigest()[:24]


@cache
def sources() -> str:
    """A hash of everything that kernels are compiled from."""
    found = hashlib.sha256()
    for path in sorted(HERE.glob("*.py")):
        found.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return found.hexdigest()


class Archive:
    """The binaries of one architecture.

    Attributes:
        path: the file.
        problem: why it does not count; empty if it does.
        variants: by digest: member, place and size in it, and what ``Binary`` has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""
        self.variants: dict[str, list[Any]] = {}
        self._members: dict[str, bytes] = {}
        try:
            with zipfile.ZipFile(path) as file:
                content = json.loads(file.read(INDEX))
        except FileNotFoundError:
            self.problem = "none compiled ahead, which python -m optima_fast.doctor --warm does"
            return
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            self.problem = f"{path} cannot be read: {error}"
            return
        if content["sources"] != sources():
            self.problem = f"{path} was compiled from other sources: install again"
            return
        self.variants = content["variants"]

    def summary(self) -> str:
        """A line: how many variants are compiled, or why none counts."""
        if self.problem:
            return f"{self.problem}; Triton compiles them when they are first called"
        size = self.path.stat().st_size / 2**20
        return f"{len(self.variants)} variants compiled ahead, {size:.1f} MiB"

    def refuse(self, problem: str) -> None:
        """Warn once, and find nothing from now on."""
        self.problem, self.variants = problem, {}
        warnings.warn(self.summary(), RuntimeWarning, stacklevel=2)

    def find(self, kernel: str, key: bytes) -> tuple[bytes, list[Any]] | None:
        """The binary of a variant, and its entry, threads, shared memory and scratch."""
        found = self.variants.get(digest(kernel, key))
        if found is None:
            return None
        member, start, size, *rest = found
        if member not in self._members:  # solid: variants of a kernel resemble one another
            with zipfile.ZipFile(self.path) as file:
                self._members[member] = file.read(member)
        return self._members[member][start : start + size], rest


def cached() -> Path:
    """The folder of archives that the user made: ``$OPTIMA_FAST_CACHE`` or ~/.cache/optima_fast."""
    chosen = os.environ.get("OPTIMA_FAST_CACHE")
    return (Path(chosen) if chosen else Path.home() / ".cache" / "optima_fast") / "cubins"


@cache
def archive(arch: int) -> Archive:
    """That of an architecture, such as 90: the package's, or else the user's."""
    own, made = (Archive(folder / f"sm_{arch}.zip") for folder in (FOLDER, cached()))
    return made if own.problem and made.path.exists() else own


def devices() -> list[int]:
    """The architectures of the GPUs that are there."""
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return sorted({10 * major + minor for major, minor in found})


def archives() -> list[Archive]:
    """All that there are, and one for each device that has none."""
    paths = [path for folder in (FOLDER, cached()) for path in folder.glob("sm_*.zip")]
    found = {int(path.stem.removeprefix("sm_")) for path in paths}
    return [archive(arch) for arch in sorted(found.union(devices()))]


def pretend(arch: int) -> None:
    """Tell Triton and the host's side that the device is one of this architecture."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from . import launch, launcher

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_current_device=lambda: arch,  # kernels are cached by device
            get_current_stream=lambda device: 0,
        )
    )
    launch.capability = lambda x: divmod(arch, 10)
    launcher.leave_to_triton("nothing is launched")


def compile_part(arch: int, op: str, dtype: str, layers: int, path: Path) -> None:
    """Compile what an operator's cases launch, into a file of its own."""
    from . import launcher

    pretend(arch)
    module = launcher.extension()
    if isinstance(module, str):
        raise SystemExit(module)
    module.configure(lambda: 0, lambda device: 0, lambda size: None, launcher.TYPES)
    found: dict[str, tuple[str, launcher.Binary]] = {}

    def compile_only(self: Any, grid: Any, args: Any, named: Any) -> None:
        key = module.Launcher(self.__name__, launcher.parameters(self.jit)).key(args, named)
        name = digest(self.__name__, key)
        if name not in found:
            binary = launcher.Binary.of(self.jit.run(*args, grid=grid, warmup=True, **named))
            if binary is not None:
                found[name] = (self.__name__, binary)

    launcher.Kernel.launch = compile_only  # type: ignore[method-assign]
    for masked, causal, gradient in product((False, True), repeat=3):
        CASES[op](Case(DTYPES[dtype], masked, causal, gradient, layers))
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name, (_, binary) in found.items():
            file.writestr(name, binary.code)
        index = {name: [kernel, *binary[1:]] for name, (kernel, binary) in found.items()}
        file.writestr(INDEX, json.dumps(index))


def merge(parts: Sequence[Path], path: Path) -> None:
    """One archive of an architecture's parts."""
    groups: dict[str, dict[str, tuple[bytes, list[Any]]]] = {}
    for part in parts:
        with zipfile.ZipFile(part) as file:
            for name, (kernel, *rest) in json.loads(file.read(INDEX)).items():
                groups.setdefault(kernel, {})[name] = (file.read(name), rest)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    variants: dict[str, list[Any]] = {}
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_LZMA) as file:
        for kernel, members in groups.items():
            start, codes = 0, []
            for name, (code, rest) in members.items():
                variants[name] = [kernel, start, len(code), *rest]
                codes.append(code)
                start += len(code)
            file.writestr(kernel, b"".join(codes))
        file.writestr(INDEX, json.dumps({"sources": sources(), "variants": variants}))
    os.replace(unfinished, path)


def write_ninja(archs: Sequence[int], work: Path, out: Path) -> Path:
    """The build's rules: an edge a part, and one an architecture's archive."""
    import ninja
    import triton

    own = {name for names in OWN.values() for name in names}
    shared = [str(path) for path in sorted(HERE.glob("*.py")) if path.stem not in own]
    # the version is in the command: with another one everything is compiled anew
    this = f'"{sys.executable}" -P -m optima_fast.kernels.ahead'
    work.mkdir(parents=True, exist_ok=True)
    path = work / "build.ninja"
    with path.open("w", encoding="utf-8") as file:
        rules = ninja.Writer(file)
        rules.variable("builddir", str(work))  # of ninja's own log
        command = f"{this} part $arch $op $dtype $layers $out # Triton {triton.__version__}"
        rules.rule("part", command, description="sm_$arch: $op, $dtype, up to $layers layers")
        rules.rule("merge", f"{this} merge $out $in", description="$out")
        for arch in archs:
            parts = []
            for op, dtype, layers in product(CASES, DTYPES, LAYERS):
                part = str(work / f"sm_{arch}" / f"{op}-{dtype}-{layers}.zip")
                needs = shared + [str(HERE / f"{name}.py") for name in OWN[op]]
                names = {"arch": arch, "op": op, "dtype": dtype, "layers": layers}
                rules.build(part, "part", implicit=needs, variables=names)
                parts.append(part)
            rules.build(str(out / f"sm_{arch}.zip"), "merge", parts)
    return path


def build(archs: Sequence[int], work: Path, out: Path, jobs: int | None = None) -> None:
    """Compile these architectures' archives, as far as their sources changed."""
    import ninja

    work, out = work.resolve(), out.resolve()
    rules = write_ninja(archs, work, out)
    environment = {
        "TRITON_DISABLE_LINE_INFO": "1",  # three quarters of a binary
        "TRITON_CACHE_DIR": str(work / "triton"),
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(rules)]
    command += ["-j", str(jobs)] if jobs else []
    subprocess.run(command, check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    every = commands.add_parser("build", help="compile, by ninja")
    every.add_argument("archs", type=int, nargs="+", help="such as 90")
    every.add_argument("--work", type=Path, default=Path("build/cubins"), help="for its files")
    every.add_argument("--out", type=Path, default=FOLDER, help="for the archives")
    every.add_argument("--jobs", type=int, help="at once; default as ninja has it")
    part = commands.add_parser("part", help="compile what one operator's cases launch")
    part.add_argument("arch", type=int)
    part.add_argument("op", choices=CASES)
    part.add_argument("dtype", choices=DTYPES)
    part.add_argument("layers", type=int)
    part.add_argument("path", type=Path)
    merged = commands.add_parser("merge", help="an archive of parts")
    merged.add_argument("path", type=Path)
    merged.add_argument("parts", type=Path, nargs="+")
    given = vars(parser.parse_args())
    run: dict[str, Any] = {"build": build, "part": compile_part, "merge": merge}
    run[given.pop("command")](**given)


if __name__ == "__main__":
    main()
