"""Packages and the optional C++ extension; everything else is in pyproject.toml.

OPTIMA_FAST_EXT=auto (default)  build the extension if there is a compiler, else warn and go on
OPTIMA_FAST_EXT=1               fail the install if the extension does not build
OPTIMA_FAST_EXT=0               do not build it; the bandit runs in Python, with the same results
"""

import glob
import os
import sys
import warnings

from setuptools import Extension, find_packages, setup


def extensions() -> list[Extension]:
    mode = os.environ.get("OPTIMA_FAST_EXT") or "auto"
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"OPTIMA_FAST_EXT must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        if mode == "1":
            raise
        warnings.warn("no pybind11: optima_fast._bandit is not built", stacklevel=1)
        return []
    # a fused multiply-add would round differently from the Python twin
    flags = ["/O2", "/fp:precise"] if sys.platform == "win32" else ["-O3", "-ffp-contract=off"]
    return [
        Pybind11Extension(
            "optima_fast._bandit",
            ["csrc/bandit.cpp"],
            depends=sorted(glob.glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=flags,
            optional=mode == "auto",
        )
    ]


setup(
    # kernels/ stands at the top of the checkout and is installed inside the package
    packages=[*find_packages(include=["optima_fast", "optima_fast.*"]), "optima_fast.kernels"],
    package_dir={"optima_fast.kernels": "kernels"},
    package_data={
        "optima_fast": ["py.typed", "*.pyi"],
        "optima_fast.demo": ["*_teacher.*"],
        "optima_fast.tasks": ["clip_merges.*"],
    },
    ext_modules=extensions(),
)
