"""Tokenizers by name, as runs choose and save them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.tasks.text import Vocabulary

__all__ = ["Tokenizer", "from_dict", "make"]


class Tokenizer(Protocol):
    """Texts to rows of ids and back; the id `pad_id` fills rows up on the right."""

    @property
    def pad_id(self) -> int: ...

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    def __len__(self) -> int:
        """Number of ids."""
        ...

    def length(self, text: str) -> int:
        """Ids of a text, begin and end included, if it is not cut off."""
        ...

    def encode_all(self, texts: Sequence[str], length: int) -> Tensor:
        """Each text as `length` ids (begin, text, end, padding): int64 `[len(texts), length]`.

        A text that is too long keeps its first tokens, and its end mark.
        """
        ...

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of `ids` up to the first end mark."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `from_dict`."""
        ...


def make(
    kind: str, texts: Sequence[str], *, min_count: int = 1, max_size: int | None = None
) -> Tokenizer:
    """The tokenizer `kind`, made from training texts where it has to be.

    Args:
        kind: "words".
        texts: Training texts.
        min_count: Words that occur less often in them are unknown ("words" only).
        max_size: Largest number of ids, special ones included; None for no limit.

    Raises:
        UserError: An unknown kind, or texts it cannot be made from.
    """
    if kind != "words":
        raise UserError(f"tokenizer must be words, got {kind!r}")
    try:
        return Vocabulary.build(texts, min_count=min_count, max_size=max_size)
    except ValueError as error:
        raise UserError(f"no vocabulary from the training texts: {error}") from error


def from_dict(state: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` wrote.

    Raises:
        UserError: `state` is not such a form.
    """
    return Vocabulary.from_dict(state)
