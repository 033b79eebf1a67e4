"""Mistakes of a user: the exception that an entry point prints as a single line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake outside the program (a file, a flag, a data set) that one line can explain.

    The entry points print it and leave with exit code 2; library users can catch ``ValueError``.
    """


def unknown(what: str, name: object, known: Iterable[str], *, otherwise: str = "") -> UserError:
    """The error for a name that is not ``known``: it says which is nearest, or else all.

    Args:
        what: what the name is of.
        name: as given.
        known: all there are.
        otherwise: what to say in place of a long list.

    Example:
        >>> print(unknown("module", "imgae", ["image", "text"]))
        unknown module 'imgae'; did you mean 'image'?
        >>> print(unknown("module", "video", ["image", "text"]))
        unknown module 'video'; choose from image, text
    """
    names = list(known)
    near = difflib.get_close_matches(str(name), names, 1, cutoff=0.5)
    every = otherwise or (f"choose from {', '.join(names)}" if names else "there is none")
    return UserError(f"unknown {what} {name!r}; {f'did you mean {near[0]!r}?' if near else every}")
