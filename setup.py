"""Packages and the optional C++ extensions; everything else is in pyproject.toml.

OPTIMA_FAST_EXT=auto (default)  build the extensions if there is a compiler, else warn and go on
OPTIMA_FAST_EXT=1               fail the install if an extension does not build
OPTIMA_FAST_EXT=0               build none: the bandit runs in Python, Triton launches the kernels;
                                both are slower and have the same results

OPTIMA_FAST_CUDA="80;90;100"    compile the Triton kernels ahead for these architectures; no GPU is
                                needed, but torch, triton, ninja: hence pip's --no-build-isolation
OPTIMA_FAST_CUDA=1              for those of TORCH_CUDA_ARCH_LIST, or else of the GPU that is there
OPTIMA_FAST_CUDA_REQUIRE=1      fail the install if that fails; by default it warns and goes on, and
                                Triton compiles kernels when they are first called
"""

import glob
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


def asked_for() -> str:
    """OPTIMA_FAST_CUDA; "" where nothing is to be compiled ahead."""
    given = os.environ.get("OPTIMA_FAST_CUDA", "").strip().lower()
    return "" if given in ("0", "off") else given


def without_kernels(why: object) -> None:
    """Go on without kernels compiled ahead, with a line, unless they are required."""
    if os.environ.get("OPTIMA_FAST_CUDA_REQUIRE") == "1":
        raise SystemExit(f"no kernels compiled ahead: {why}")
    print(f"warning: no kernels compiled ahead: {why}", file=sys.stderr)


def extensions() -> list[Extension]:
    mode = os.environ.get("OPTIMA_FAST_EXT") or "auto"
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"OPTIMA_FAST_EXT must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        if asked_for():
            raise SystemExit("OPTIMA_FAST_CUDA needs the extensions, got OPTIMA_FAST_EXT=0")
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        if mode == "1":
            raise
        warnings.warn("no pybind11: no extension of optima_fast is built", stacklevel=1)
        if asked_for():
            without_kernels("they need the extensions, and pybind11 is not installed")
        return []
    found = [
        Pybind11Extension(
            "optima_fast._launch",
            ["csrc/launch.cpp"],
            cxx_std=17,
            extra_compile_args=["-O2"],
            libraries=["dl"],
            optional=mode == "auto",
        )
    ]
    # a fused multiply-add would round differently from the Python twin
    flags = ["/O2", "/fp:precise"] if sys.platform == "win32" else ["-O3", "-ffp-contract=off"]
    return [
        *(found if sys.platform == "linux" else ()),  # where Triton is
        Pybind11Extension(
            "optima_fast._bandit",
            ["csrc/bandit.cpp"],
            depends=sorted(glob.glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=flags,
            optional=mode == "auto",
        ),
    ]


def architectures() -> list[int]:
    """What OPTIMA_FAST_CUDA names, as 80 or 90."""
    given = asked_for()
    if given in ("1", "auto"):
        # as torch.utils.cpp_extension reads it: "8.0;9.0a 10.0+PTX"
        given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").lower().replace(".", "")
        if not given:
            import torch

            if not torch.cuda.is_available():
                raise RuntimeError(
                    "OPTIMA_FAST_CUDA=1 takes the architectures of TORCH_CUDA_ARCH_LIST, which is "
                    'not set, or of the GPU, and there is none: name them, as OPTIMA_FAST_CUDA="90"'
                )
            found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
            return sorted({10 * major + minor for major, minor in found})
    names = [re.sub(r"a?(\+ptx)?$", "", name) for name in re.split(r"[;, ]+", given) if name]
    for name in names:
        if not name.isdigit() or int(name) < 80:
            raise RuntimeError(
                f"architectures must be numbers from 80 on, as OPTIMA_FAST_CUDA=80;90, got {name!r}"
            )
    return sorted(set(map(int, names)))


class BuildExtensions(build_ext):
    """The extensions, then the kernels that are to be compiled ahead, which need them."""

    def run(self) -> None:
        super().run()
        try:
            archs = architectures()
            if archs:
                self.compile_kernels(archs)
        except Exception as error:
            without_kernels(error)

    def compile_kernels(self, archs: list[int]) -> None:
        print("kernels are compiled ahead for", *(f"sm_{arch}" for arch in archs), flush=True)
        for module in ("torch", "triton", "ninja"):
            if importlib.util.find_spec(module) is None:
                raise RuntimeError(
                    f"OPTIMA_FAST_CUDA needs {module}, which is not installed: install it, and "
                    "optima_fast with pip install --no-build-isolation"
                )
        root = Path.cwd() if self.inplace else Path(self.build_lib).resolve()
        if not list((root / "optima_fast").glob("_launch*.so")):
            raise RuntimeError("they need the extension _launch, which was not built: see above")
        kernels = Path.cwd() / "kernels" if self.inplace else root / "optima_fast" / "kernels"
        paths = [str(root), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-P", "-m", "optima_fast.kernels.ahead", "build"]
        command += [str(arch) for arch in archs]
        command += ["--work", str(Path(self.build_temp).resolve() / "cubins")]
        command += ["--out", str(kernels / "cubins")]
        try:
            subprocess.run(command, check=True, env=environment)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{' '.join(command)} failed, see above") from error


setup(
    # kernels/ stands at the top of the checkout and is installed inside the package
    packages=[*find_packages(include=["optima_fast", "optima_fast.*"]), "optima_fast.kernels"],
    package_dir={"optima_fast.kernels": "kernels"},
    package_data={
        "optima_fast": ["py.typed", "*.pyi"],
        "optima_fast.demo": ["*_teacher.*"],
        "optima_fast.kernels": ["cubins/*.zip"],
        "optima_fast.tasks": ["clip_merges.*"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtensions},
)
