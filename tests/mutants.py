"""`make mutants`: faults planted in a copy of the sources, each of which a test must catch.

    python tests/mutants.py                  # all; exit code 1 if one survives or no longer applies
    python tests/mutants.py probs row-term   # those whose name, file or reason contains a word

tests/mutants.toml lists them: the file, its ``original`` text, which stands in it exactly once, the
``fault`` that replaces it, and the ``tests`` that must fail. The copy is in a temporary folder. The
tests are first run without a fault: they must pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".toml")
COPIED = (
    "optima_fast", "kernels", "tests", "bench", "examples", "docs", "configs", "pyproject.toml",
    "LICENSE", "README.md", "CONTRIBUTING.md", "CHANGELOG.md",
)  # fmt: skip
SECONDS = 600  # a fault that makes the tests hang is caught too
PASSED, FAILED = 0, 1  # pytest's exit codes; the others mean that it could not run the tests


class Mutant(NamedTuple):
    """One planted fault."""

    name: str
    file: str
    original: str
    fault: str
    tests: tuple[str, ...]


def mutants() -> list[Mutant]:
    """The faults of tests/mutants.toml."""
    content = tomllib.loads(LIST.read_text(encoding="utf-8"))
    return [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in content["mutant"]]


def misfit(mutant: Mutant, root: Path = ROOT) -> str:
    """Why a fault can no longer be planted; empty if it can."""
    path = root / mutant.file
    if not path.is_file():
        return f"there is no {mutant.file}"
    count = path.read_text(encoding="utf-8").count(mutant.original)
    if count != 1:
        return f"its original text must stand once in {mutant.file}, got {count} times"
    missing = [t for t in mutant.tests if not (root / t.partition("::")[0]).is_file()]
    return f"there is no {', '.join(missing)}" if missing else ""


def copied(folder: Path) -> Path:
    """A copy of the sources below ``folder``."""
    root = folder / "tree"
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            root.mkdir(exist_ok=True)
            shutil.copy2(source, root / name)
    return root


def run_tests(root: Path, tests: tuple[str, ...]) -> int | None:
    """pytest's exit code in a copy; None if it took too long."""
    # importing by PYTHONPATH comes before an editable installation
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    with (root / "log").open("wb") as log:
        try:
            return subprocess.run(
                command, cwd=root, env=environment, stdout=log, stderr=log, timeout=SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            return None


def judge(mutant: Mutant) -> tuple[str, float]:
    """What became of a fault, and the seconds it took."""
    start = time.monotonic()
    why = misfit(mutant)
    if why:
        return f"DOES NOT APPLY: {why}", 0.0
    with tempfile.TemporaryDirectory(prefix="optima-mutant-") as folder:
        root = copied(Path(folder))
        path = root / mutant.file
        text = path.read_text(encoding="utf-8").replace(mutant.original, mutant.fault)
        path.write_text(text, encoding="utf-8")
        code = run_tests(root, mutant.tests)
        words = {PASSED: "SURVIVED", FAILED: "killed", None: "killed (hung)"}
        verdict = words.get(code, f"NOT RUN: pytest's exit code {code}")
        if code not in words:
            verdict += ": " + (root / "log").read_text(encoding="utf-8")[-500:]
    return verdict, time.monotonic() - start


def sound(tests: tuple[str, ...]) -> bool:
    """Whether the tests pass on a copy without a fault; prints their end if not."""
    with tempfile.TemporaryDirectory(prefix="optima-mutant-") as folder:
        root = copied(Path(folder))
        if run_tests(root, tests) == PASSED:
            return True
        print((root / "log").read_text(encoding="utf-8")[-3000:])
        return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="only those whose name or file contains one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--trust", action="store_true", help="do not run the tests without a fault")
    args = parser.parse_args(argv)
    chosen = [
        m for m in mutants() if not args.words or any(w in m.name + m.file for w in args.words)
    ]
    if not chosen:
        parser.error(f"no mutant has {' or '.join(args.words)} in its name or file")
    every = tuple(sorted({test for m in chosen for test in m.tests}))
    if not args.trust and not sound(every):
        print(f"the tests must pass without a fault, got failures in {' '.join(every)}")
        return 1
    status = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, (verdict, seconds) in zip(chosen, pool.map(judge, chosen), strict=True):
            status |= not verdict.startswith("killed")
            where = Path(mutant.file).name
            print(f"{verdict:14} {seconds:5.0f} s  {where:22} {mutant.name}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
