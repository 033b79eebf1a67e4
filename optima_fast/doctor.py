"""``python -m optima_fast.doctor``: print versions and what works here, for a bug report.

With --task and --data it checks a data set instead: what is there of each split, what is missing,
and where to download it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Sequence

from optima_fast.entry import Parser, guarded
from optima_fast.errors import UserError

PACKAGES = ("torch", "triton", "xformers", "numpy", "scikit-learn", "safetensors", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 if the losses do not work, or no run could start."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m optima_fast.doctor", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("--task", help="vqa, snli_ve, nlvr2 or coco")
    parser.add_argument("--data", metavar="FOLDER", help="the folder of the data set to look at")
    parser.add_argument(
        "--images",
        type=_count,
        default=0,
        metavar="N|all",
        help="try to decode N images of each split, or all of them (default 0)",
    )
    parser.add_argument(
        "--warm",
        metavar="SM",
        type=int,
        nargs="*",
        help="compile the Triton kernels now, so that no run has to: for the GPUs of this machine, "
        "or for architectures that you name, such as 80 90",
    )
    arguments = parser.parse_args(argv)
    if arguments.warm is not None:
        return _warm(arguments.warm)
    if arguments.task is None and arguments.data is None:
        if arguments.images:
            parser.error("--images is for a data set: give --task and --data too")
        return _machine()
    if arguments.task is None or arguments.data is None:
        parser.error("--task and --data go together")
    return _data(arguments.task, arguments.data, arguments.images)


def _warm(archs: Sequence[int]) -> int:
    for package in ("triton", "ninja"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--warm needs {package}, which is not installed: pip install {package}"
            )
    from optima_fast.kernels import ahead, launcher

    module = launcher.extension()
    if isinstance(module, str):
        raise UserError(f"--warm: {module}; install with a C++ compiler and OPTIMA_FAST_EXT=1")
    named = list(archs) or ahead.devices()
    if not named:
        raise UserError(
            "--warm compiles for the GPU that is there, and there is none: name one, 90"
        )
    for arch in named:
        if arch < 80:
            raise UserError(f"--warm takes architectures from 80 on, such as 90, got {arch}")
    folder = ahead.cached()
    try:
        ahead.build(named, folder / "build", folder)
    except subprocess.CalledProcessError as error:
        raise UserError(f"--warm: a kernel was not compiled, see above ({error})") from error
    ahead.archive.cache_clear()
    for arch in named:
        found = ahead.archive(arch)
        print(f"kernels for sm_{arch}: {found.summary()}, {found.path}")
    return 0


def _count(text: str) -> int:
    if text == "all":
        return -1
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or all, got {text!r}")
    return int(text)


def _data(task: str, folder: str, decode: int) -> int:
    from pathlib import Path

    from optima_fast.tasks import inspection

    report = inspection.inspect(task, Path(folder), decode=decode)
    for line in inspection.lines(report):
        print(line)
    return 1 if report.problems else 0


def _machine() -> int:
    import torch

    import optima_fast
    from optima_fast import bandit

    print(f"optima_fast {optima_fast.__version__} in {os.path.dirname(optima_fast.__file__)}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} not installed")
    print(f"bandit backend {bandit.BACKEND}")
    print(f"cpu {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        devices.append(f"cuda:{index}")
    _kernels()
    _recipes()
    agree = [_losses_agree(device) for device in devices]
    return 0 if all(agree) else 1


def _kernels() -> None:
    """Who launches the Triton kernels, and which are compiled already."""
    try:
        from optima_fast.kernels import ahead, launcher
    except ImportError as error:
        print(f"kernels: none, as Triton does not import ({error})")
        return
    try:
        print(f"kernels are launched by {launcher.who()}")
    except ValueError as error:
        raise UserError(str(error)) from error
    for found in ahead.archives():
        print(f"kernels for {found.path.stem}: {found.summary()}")


def _recipes() -> None:
    """The recipes of the trainer: what each compares, and where it departs from its paper."""
    from optima_fast.distill.recipes import RECIPES

    for name, recipe in RECIPES.items():
        print(f"recipe {name}: {recipe.what} ({recipe.source}; here: {recipe.differs})")


def _losses_agree(device: str) -> bool:
    """Both losses against their definition on a small case; prints the worst relative error."""
    import torch

    import optima_fast

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    hidden = (draw(2, 33, 24), draw(2, 33, 40), draw(24, 40))
    heads = (draw(2, 3, 33, 16), draw(2, 3, 33, 16), draw(2, 4, 33, 8), draw(2, 4, 33, 8))
    worst = 0.0
    for target in ("hidden", "scores", "probs"):
        values = []
        for backend in ("auto", "reference"):
            if target == "hidden":
                value = optima_fast.hidden_mse(*hidden, backend=backend)
            else:
                value = optima_fast.attention_mse(*heads, target=target, backend=backend)
            values.append(value.double())
        worst = max(worst, float(((values[0] - values[1]) / values[1]).abs().max()))
    agree = worst < 1e-4
    print(f"losses on {device}: {'ok' if agree else 'WRONG'} (relative error {worst:.1e})")
    return agree


if __name__ == "__main__":
    sys.exit(main())
