"""What the entry points share: quiet threads, one line for a user's mistake."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from optima_fast.errors import UserError

# what is in the extras [data] and [export]; all else that may be missing is in [train]
OF_DATA = ("ftfy", "huggingface_hub", "kornia", "sentencepiece", "tokenizers", "webdataset")
OF_EXPORT = ("onnx", "onnxruntime", "onnxscript")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are :class:`UserError`, one line without the usage."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.description = (self.description or "")[:1].upper() + (self.description or "")[1:]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what there is")


def calm_openmp() -> None:
    """Let idle OpenMP threads spin for microseconds only, unless the user chose otherwise.

    With another busy process on the machine, threads that spin at a barrier take the very core
    that the thread they wait for needs, and a step can become 10 to 100 times slower; threads that
    sleep at once make it a third slower on an idle machine. OpenMP reads this once, when torch is
    imported. The variables are those of GCC's and of LLVM's (Intel's) library.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        os.environ.setdefault("KMP_BLOCKTIME", "0")


def old_spelling(old: str, new: str) -> None:
    """Say in a line on stderr, where users of a command see it, that a spelling will go."""
    print(
        f"warning: {old} is an old spelling: write {new}; the next release refuses it",
        file=sys.stderr,
    )


def guarded(body: Callable[[], int]) -> int:
    """Run an entry point; a user's mistake becomes one line on stderr and exit code 2."""
    calm_openmp()
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return body()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was saved is intact", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("optima_fast", "torch"):
            raise
        extras = {"data": OF_DATA, "export": OF_EXPORT}
        extra = next((name for name, held in extras.items() if package in held), "train")
        print(f"error: {error}: pip install 'optima-fast[{extra}]'", file=sys.stderr)
        return 2
