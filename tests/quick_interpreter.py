"""Triton's interpreter, at half its time."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any


def patch_once() -> None:
    """Triton's interpreter patches ``triton.language`` at a launch, not at every call within it.

    To do so it looks through all members, which takes as long as what a device function does.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # another version
    language, patch, nothing = (
        interpreter.tl,
        interpreter._patch_lang,
        interpreter._LangPatchScope(),
    )

    @cache
    def modules(fn: Any) -> list[Any]:
        return [x for x in fn.__globals__.values() if x is language or x is language.core]

    def patch_lang(fn: Any) -> Any:
        is_builtin = language.core.is_builtin
        return patch(fn) if any(is_builtin(x.load) for x in modules(fn)) else nothing

    interpreter._patch_lang = patch_lang
