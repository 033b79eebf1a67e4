"""Texts as ids: what every tokenizer shares, and a vocabulary of words."""

import abc
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optima_fast.errors import UserError

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
_WORD = re.compile(r"\w+(?:'\w+)*")


def tokenize(text: str) -> list[str]:
    """Words of a text: lower case, punctuation dropped, inner apostrophes kept.

    Example:
        >>> tokenize("What's the LARGEST digit?")
        ["what's", 'the', 'largest', 'digit']
    """
    return _WORD.findall(text.lower())


class Tokenizer(abc.ABC):
    """Texts to rows of ids and back: begin, the pieces of a text, end, padding on the right.

    Attributes:
        pad_id, bos_id, eos_id: Of padding, begin and end.
    """

    pad_id: int = 0
    bos_id: int
    eos_id: int

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of ids."""

    @abc.abstractmethod
    def pieces(self, text: str) -> list[int]:
        """Ids of a text, without marks."""

    @abc.abstractmethod
    def join(self, ids: list[int]) -> str:
        """The text of ids without marks."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `tokenizers.from_dict`."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(str(self.to_dict()))

    def length(self, text: str) -> int:
        """Ids of a text, begin and end included, if it is not cut off."""
        return len(self.pieces(text)) + 2

    def encode(self, text: str, length: int) -> list[int]:
        """Exactly `length` ids: begin, pieces, end, padding.

        A text of more than `length - 2` pieces keeps its first ones, and its end mark.

        Raises:
            ValueError: `length` is below 3.
        """
        row: list[int] = self.encode_all([text], length)[0].tolist()
        return row

    def encode_all(self, texts: Sequence[str], length: int) -> Tensor:
        """`encode` of each text: int64 `[len(texts), length]`."""
        if length < 3:
            raise ValueError(f"length must be at least 3 (begin, a piece, end), got {length}")
        known: dict[str, list[int]] = {}
        rows = np.full((len(texts), length), self.pad_id, dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            if text not in known:
                known[text] = [self.bos_id, *self.pieces(text)[: length - 2], self.eos_id]
            row[: len(known[text])] = known[text]
        return torch.from_numpy(rows)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of `ids` up to the first end mark; begin and padding at the end are skipped.

        Raises:
            ValueError: An id is outside the vocabulary.
        """
        given = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        wrong = [i for i in given if not 0 <= i < len(self)]
        if wrong:
            raise ValueError(f"ids must be in 0 .. {len(self) - 1}, got {wrong[0]}")
        if self.eos_id in given:
            given = given[: given.index(self.eos_id)]
        while given and given[-1] == self.pad_id:
            del given[-1]
        return self.join([i for i in given if i != self.bos_id])


class Vocabulary(Tokenizer):
    """Words and their ids; the ids 0 to 3 are padding, begin, end and the unknown word.

    Args:
        words: The words after the four special ones, each once, in the order of their ids.

    Raises:
        ValueError: A word is repeated, empty or one of the special ones.

    Example:
        >>> vocabulary = Vocabulary.build(["a bright three", "a three"])
        >>> vocabulary.encode("a dim three", 6)
        [1, 4, 3, 5, 2, 0]
        >>> vocabulary.decode([1, 4, 5, 2, 0])
        'a three'
    """

    pad_id, bos_id, eos_id, unk_id = range(4)

    def __init__(self, words: Sequence[str]) -> None:
        self.words: tuple[str, ...] = (*SPECIALS, *words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words) or "" in self._ids:
            repeated = [
                word for word, times in Counter(self.words).items() if times > 1 or not word
            ]
            raise ValueError(
                f"words must be distinct, not empty and none of {SPECIALS}, got {repeated[:5]}"
            )

    @classmethod
    def build(
        cls, texts: Iterable[str], *, min_count: int = 1, max_size: int | None = None
    ) -> "Vocabulary":
        """The words of `texts`, the frequent ones first and equally frequent ones by name.

        Args:
            texts: Training texts.
            min_count: Words that occur less often are left out, at least 1.
            max_size: Size including the four special words; None for no limit.

        Raises:
            ValueError: `min_count` below 1, `max_size` below 5, or no word is left.
        """
        if min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {min_count}")
        if max_size is not None and max_size <= len(SPECIALS):
            raise ValueError(
                f"max_size must be above {len(SPECIALS)}, the special words, got {max_size}"
            )
        counts = Counter(word for text in texts for word in tokenize(text))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        words = [word for word in ranked if counts[word] >= min_count]
        if not words:
            raise ValueError(f"no word occurs min_count={min_count} times in the given texts")
        return cls(words if max_size is None else words[: max_size - len(SPECIALS)])

    def __len__(self) -> int:
        return len(self.words)

    def id(self, word: str) -> int:
        """Id of a word; `unk_id` if it is not in the vocabulary."""
        return self._ids.get(word, self.unk_id)

    def pieces(self, text: str) -> list[int]:
        """Ids of a text's words."""
        return list(map(self.id, tokenize(text)))

    def join(self, ids: list[int]) -> str:
        """The words of ids, joined by spaces; padding is skipped."""
        return " ".join(self.words[i] for i in ids if i != self.pad_id)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `from_dict`."""
        return {"kind": "word", "words": list(self.words[len(SPECIALS) :])}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "Vocabulary":
        """The vocabulary that `to_dict` wrote.

        Raises:
            UserError: `state` is not such a form.
        """
        words = state.get("words") if isinstance(state, Mapping) else None
        if (
            not isinstance(words, Sequence)
            or isinstance(words, str)
            or state.get("kind") != "word"
            or not all(isinstance(word, str) for word in words)
        ):
            raise UserError(
                "a saved vocabulary must be {'kind': 'word', 'words': [...]}, "
                f"got {str(state)[:80]}: the file is damaged or of another kind"
            )
        try:
            return cls(words)
        except ValueError as error:
            raise UserError(f"a saved vocabulary is damaged: {error}") from error
