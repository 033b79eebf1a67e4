"""Sub-word text: CLIP's byte pairs, and sentence pieces."""

import base64
import binascii
import functools
import gzip
import html
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optima_fast.errors import UserError
from optima_fast.tasks.text import Tokenizer

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

__all__ = ["ClipBytePairs", "SentencePieces"]

CLIP_MERGES = Path(__file__).with_name("clip_merges.txt.gz")
CLIP_MARKS = ("<start_of_text>", "<end_of_text>")
# CLIP's words; its marks count as words where a text spells them out
CLIP_WORD = (
    rf"(?i){'|'.join(CLIP_MARKS)}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"
)


class ClipBytePairs(Tokenizer):
    """CLIP's lower-case byte-pair encoding, as open_clip's `SimpleTokenizer` gives it: 49,408 ids.

    A text is repaired (ftfy), its HTML entities are resolved twice, white space is joined, capitals
    are dropped; words are then cut into letters, single digits and the rest, and their bytes are
    merged. Id 0, the padding, is also an exclamation mark inside of a word of punctuation.

    Characters newer than the Unicode tables of `tokenizers` may be cut into other words than by
    open_clip, whose own tables depend on its version of `regex`.

    Source: Radford et al., 2021, https://github.com/openai/CLIP; open_clip 3.3.0, `tokenizer.py`.

    Example:
        >>> tokenizer = ClipBytePairs()
        >>> tokenizer.encode("A photo of a cat", 8)
        [49406, 320, 1125, 539, 320, 2368, 49407, 0]
        >>> tokenizer.decode([49406, 320, 2368, 49407, 0])
        'a cat'
    """

    def __init__(self) -> None:
        self._words = _clip_words()
        self._levels = {char: byte for byte, char in _clip_alphabet().items()}
        self.bos_id, self.eos_id = len(self._words) - 2, len(self._words) - 1

    def __len__(self) -> int:
        return len(self._words)

    def pieces(self, text: str) -> list[int]:
        """Ids of a text, without the marks around it."""
        text = _clip_clean(text)
        backend = _clip_backend()
        if not any(mark in text for mark in CLIP_MARKS):
            ids: list[int] = backend.encode(text).ids
            return ids
        marks = dict(zip(CLIP_MARKS, (self.bos_id, self.eos_id), strict=True))
        assert backend.pre_tokenizer is not None
        spans = [text[slice(*span)] for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
        cut = [[marks[word]] if word in marks else backend.encode(word).ids for word in spans]
        return [i for word in cut for i in word]

    def join(self, ids: list[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        raw = bytes(self._levels[char] for i in ids for char in self._words[i])
        return raw.decode("utf-8", errors="replace").replace("</w>", " ").strip()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `tokenizers.from_dict`."""
        return {"kind": "clip"}


@functools.cache
def _clip_alphabet() -> dict[int, str]:
    """A printable character for each byte, in the order of their ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@functools.cache
def _clip_merges() -> tuple[tuple[str, str], ...]:
    lines = gzip.decompress(CLIP_MERGES.read_bytes()).decode().splitlines()
    return tuple((first, second) for first, _, second in (line.partition(" ") for line in lines))


@functools.cache
def _clip_words() -> tuple[str, ...]:
    """The word, or part of one, of each id."""
    alphabet = _clip_alphabet().values()
    ends = (char + "</w>" for char in alphabet)
    return (*alphabet, *ends, *map("".join, _clip_merges()), *CLIP_MARKS)


@functools.cache
def _clip_backend() -> "tokenizers.Tokenizer":
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    ids = {word: i for i, word in enumerate(_clip_words())}
    merges = list(_clip_merges())
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORD), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


def _clip_clean(text: str) -> str:
    # what is left of plain ASCII is as it is: a third of the time for captions and questions
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class SentencePieces(Tokenizer):
    """A sentence-piece model, as the paper's: it cuts words and normalises as it was trained to.

    Args:
        model: The serialised model. One without a padding id gets it at 0, before its own ids.

    Raises:
        UserError: No such model, one without begin or end, or with another id than 0 for padding.

    Source: Kudo and Richardson, 2018, https://github.com/google/sentencepiece.
    """

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            if not model:
                raise RuntimeError("it is empty")
            self._pieces: sentencepiece.SentencePieceProcessor = SentencePieceProcessor(
                model_proto=model
            )
        except RuntimeError as error:
            raise UserError(f"no sentence-piece model: {' '.join(str(error).split())}") from error
        pad, bos, eos = (getattr(self._pieces, f"{name}_id")() for name in ("pad", "bos", "eos"))
        if pad > 0 or bos < 0 or eos < 0:
            raise UserError(
                "a sentence-piece model must have its padding at id 0, or none, and a begin and "
                f"an end, got pad {pad}, bos {bos}, eos {eos}: train one with --pad_id=0 "
                "--bos_id=1 --eos_id=2 --unk_id=3"
            )
        self.model = model
        self._shift = 0 if pad == 0 else 1
        self.bos_id, self.eos_id = bos + self._shift, eos + self._shift

    @classmethod
    def train(cls, texts: Iterable[str], *, max_size: int = 64_000) -> "SentencePieces":
        """A unigram model of at most `max_size` ids, of lower-case text: the same at each call.

        The ids 0 to 3 are padding, begin, end and unknown. Lower case (`nmt_nfkc_cf`), as the other
        tokenizers and the metrics of captions and answers have it.

        Raises:
            UserError: Too few texts, or `max_size` below their number of characters.
        """
        from sentencepiece import SentencePieceTrainer

        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=map(_utf8, texts),
                model_writer=model,
                model_type="unigram",
                vocab_size=max_size,
                hard_vocab_limit=False,
                normalization_rule_name="nmt_nfkc_cf",
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                num_threads=1,  # sums are of another order, and pieces others, with more
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).rpartition("]")[2].strip() or "they hold no text"
            raise UserError(f"no sentence pieces from the training texts: {reason}") from error
        return cls(model.getvalue())

    @classmethod
    def read(cls, path: Path) -> "SentencePieces":
        """The model in a file.

        Raises:
            UserError: The file is missing, or holds no such model.
        """
        try:
            return cls(path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        except UserError as error:
            raise UserError(f"tokenizer {path}: {error}") from error

    def __len__(self) -> int:
        return int(self._pieces.get_piece_size()) + self._shift

    def pieces(self, text: str) -> list[int]:
        """Ids of a text, without marks."""
        return [i + self._shift for i in self._pieces.encode(_utf8(text))]

    def join(self, ids: list[int]) -> str:
        """The text of ids."""
        text: str = self._pieces.decode([i - self._shift for i in ids if i >= self._shift])
        return text

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `from_dict`."""
        return {"kind": "sentencepiece", "model": base64.b64encode(self.model).decode("ascii")}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "SentencePieces":
        """The tokenizer that `to_dict` wrote.

        Raises:
            UserError: `state` is not such a form.
        """
        try:
            return cls(base64.b64decode(state["model"], validate=True))
        except (KeyError, TypeError, binascii.Error, UserError) as error:
            raise UserError(f"a saved sentence-piece model is damaged: {error}") from error


def _utf8(text: str) -> str:
    """The text with lone surrogates, which are no text, as question marks."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
