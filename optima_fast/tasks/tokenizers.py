"""Tokenizers by name, as runs choose and save them."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.tasks.subwords import ClipBytePairs, SentencePieces
from optima_fast.tasks.text import Tokenizer, Vocabulary

__all__ = ["Tokenizer", "encode", "from_dict", "make"]

log = logging.getLogger(__name__)


def make(
    kind: str, texts: Sequence[str], *, min_count: int = 1, max_size: int | None = None
) -> Tokenizer:
    """The tokenizer `kind`, made from training texts where it has to be.

    Args:
        kind: "words"; "clip", CLIP's byte pairs; "sentencepiece", trained on the texts; or the
            file of a sentence-piece model, by its name's ending ".model".
        texts: Training texts.
        min_count: Words that occur less often in them are unknown ("words" only).
        max_size: Largest number of ids, special ones included; None for no limit of words, and
            64,000 sentence pieces, the paper's.

    Raises:
        UserError: An unknown kind, a limit that it does not have, or texts or a file that it
            cannot be made from.
    """
    check(kind)
    limits = {"words": ("min_count", "max_size"), "sentencepiece": ("max_size",)}
    given = {"min_count": min_count != 1, "max_size": max_size is not None}
    for name, set_ in given.items():
        if set_ and name not in limits.get(kind, ()):
            value = {"min_count": min_count, "max_size": max_size}[name]
            raise UserError(f"tokenizer {kind} has no {name}, got {value}: leave it out")
    if kind == "words":
        try:
            return Vocabulary.build(texts, min_count=min_count, max_size=max_size)
        except ValueError as error:
            raise UserError(f"no vocabulary from the training texts: {error}") from error
    if kind == "clip":
        return ClipBytePairs()
    if kind == "sentencepiece":
        return SentencePieces.train(texts, max_size=max_size or 64_000)
    return SentencePieces.read(Path(kind))


def check(kind: str) -> None:
    """Raise unless `make` knows `kind`; a file is not opened.

    Raises:
        UserError: An unknown kind.
    """
    if kind not in ("words", "clip", "sentencepiece") and not kind.endswith(".model"):
        raise UserError(
            f"tokenizer must be words, clip, sentencepiece or a file FILE.model, got {kind!r}"
        )


def named(kind: str, tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is of the kind, or what the file holds, that `make` takes.

    Raises:
        UserError: The file cannot be read.
    """
    if kind.endswith(".model"):
        return SentencePieces.read(Path(kind)).to_dict() == tokenizer.to_dict()
    own = tokenizer.to_dict()["kind"]
    return kind == ("words" if own == "word" else own)


def from_dict(state: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` wrote.

    Raises:
        UserError: `state` is not such a form.
    """
    kind = state.get("kind") if isinstance(state, Mapping) else None
    if kind == "clip":
        return ClipBytePairs()
    if kind == "sentencepiece":
        return SentencePieces.from_dict(state)
    return Vocabulary.from_dict(state)


def encode(tokenizer: Tokenizer, texts: Sequence[str], length: int, name: str) -> Tensor:
    """`encode_all`, with one line in the log that counts the texts that were cut.

    Args:
        tokenizer: What encodes.
        texts: The texts of a split.
        length: Ids a text.
        name: What they are, for the line.
    """
    rows = tokenizer.encode_all(texts, length)
    full = (rows[:, -1] != tokenizer.pad_id).nonzero()[:, 0].tolist()
    cut = sum(tokenizer.length(texts[i]) > length for i in full)
    if cut:
        log.warning(
            "%s of %s %s texts are longer than %d tokens and were cut",
            f"{cut:,}", f"{len(texts):,}", name, length,
        )  # fmt: skip
    return rows
