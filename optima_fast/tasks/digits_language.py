"""What the built-in data says about its canvases: questions, statements, sentences, captions.

Every kind of text is a few wordings and a function of the canvases. Statements and sentences are
dealt out such that each text has each label equally often, so that text alone tells nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optima_fast.tasks.canvases import EMPTY, Canvases, Ints, Rng

Bools = NDArray[np.bool_]
Property = Callable[[Ints], Bools]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

ANSWERS = (*map(str, range(10)), "even", "odd")
ANNOTATORS = 10


@dataclass(frozen=True)
class Question:
    """A kind of question: wordings, the answers it can have, and which one is right."""

    wordings: tuple[str, ...]
    answers: tuple[int, ...]  # positions in ANSWERS
    answer: Callable[[Canvases], Ints]  # position in ANSWERS for each canvas


QUESTIONS: Mapping[str, Question] = {
    "count": Question(
        ("how many digits are there?", "number of digits?"),
        (1, 2, 3, 4),
        lambda c: c.count,
    ),
    "largest": Question(
        ("what is the largest digit?", "which digit is highest?"),
        tuple(range(10)),
        lambda c: c.largest,
    ),
    "smallest": Question(
        ("what is the smallest digit?", "which digit is lowest?"),
        tuple(range(10)),
        lambda c: c.smallest,
    ),
    "brightest": Question(
        ("what is the brightest digit?", "which digit shines most?"),
        tuple(range(10)),
        lambda c: c.brightest,
    ),
    "parity": Question(
        ("brightest digit: even or odd?", "even or odd: brightest digit?"),
        (10, 11),
        lambda c: 10 + c.brightest % 2,
    ),
}


def questions(
    canvases: Canvases, kinds: Sequence[str], per_image: int, error: float, rng: Rng
) -> tuple[list[str], list[str], Ints]:
    """Ask `per_image` different kinds of questions about each canvas.

    Each of ten simulated annotators gives the right answer, or with probability `error` one drawn
    from all the answers that the kind of question has.

    Returns:
        Kinds, texts and votes int64 `[questions, answers]`; a canvas's questions are neighbours.
    """
    n = len(canvases)
    asked = rng.permuted(np.tile(np.arange(len(kinds)), (n, 1)), axis=1)[:, :per_image]
    right = np.stack([QUESTIONS[kind].answer(canvases) for kind in kinds], axis=1)
    right = np.take_along_axis(right, asked, axis=1).reshape(-1)
    asked = asked.reshape(-1)

    shape = (len(asked), ANNOTATORS)
    slip = rng.integers(0, 1_000_000, shape) < round(error * 1_000_000)
    ranges = [QUESTIONS[kind].answers for kind in kinds]
    sizes = np.array([len(answers) for answers in ranges])
    table = np.array([(*a, *[a[0]] * (len(ANSWERS) - len(a))) for a in ranges])
    drawn = table[asked[:, None], rng.integers(0, sizes[asked][:, None], shape)]
    given = np.where(slip, drawn, right[:, None])
    votes = (given[:, :, None] == np.arange(len(ANSWERS))).sum(1)

    wordings = [QUESTIONS[kind].wordings for kind in kinds]
    which = rng.integers(0, [[len(wordings[k])] for k in asked])[:, 0]
    texts = [wordings[k][w] for k, w in zip(asked, which, strict=True)]
    return [kinds[k] for k in asked], texts, votes


ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)
NOT_SAID = -1  # the text does not apply


@dataclass(frozen=True)
class Claim:
    """A text in several wordings and its label for each canvas (or pair of canvases)."""

    kind: str
    wordings: tuple[str, ...]
    label: Callable[..., Ints]


def _verdict(certain: Bools, impossible: Bools) -> Ints:
    """Entailment where the claim holds whatever the covers hide, contradiction where it cannot."""
    return np.where(certain, ENTAILMENT, np.where(impossible, CONTRADICTION, NEUTRAL))


def _any(cells: Bools) -> Bools:
    """Whether any cell of each canvas: bool `[n, 4]` to `[n]`."""
    found: Bools = np.logical_or.reduce(cells, axis=1)
    return found


def _holds(c: Canvases, has: Property) -> Bools:
    """Whether some digit that can be seen has a property."""
    return _any((c.digit < EMPTY) & has(c.digit))


def _some(has: Property) -> Callable[[Canvases], Ints]:
    """Some digit has a property; a cover may hide such a digit."""

    def label(c: Canvases) -> Ints:
        seen = _holds(c, has)
        return _verdict(seen, ~seen & ~_any(c.covered))

    return label


def _every(has: Property) -> Callable[[Canvases], Ints]:
    """Every digit has a property; a cover may hide one that has not."""

    def label(c: Canvases) -> Ints:
        broken = _holds(c, lambda d: ~has(d))
        return _verdict(~broken & ~_any(c.covered), broken)

    return label


def _at_least(k: int) -> Callable[[Canvases], Ints]:
    """There are at least k digits; a cover hides one or none."""
    return lambda c: _verdict(c.count >= k, c.count + c.covered.sum(1) < k)


def _even(d: Ints) -> Bools:
    return np.equal(d % 2, 0)


def _odd(d: Ints) -> Bools:
    return np.equal(d % 2, 1)


def _above(k: int) -> Property:
    return lambda d: d > k


def _below(k: int) -> Property:
    return lambda d: d < k


STATEMENTS: tuple[Claim, ...] = (
    *(
        Claim("some", (f"there is an {name} digit", f"some digit is {name}"), _some(has))
        for name, has in (("even", _even), ("odd", _odd))
    ),
    *(
        Claim("every", (f"every digit is {name}", f"all digits are {name}"), _every(has))
        for name, has in (("even", _even), ("odd", _odd))
    ),
    *(Claim("above", (f"some digit is above {WORDS[k]}",), _some(_above(k))) for k in (5, 7)),
    *(Claim("above", (f"no digit is above {WORDS[k]}",), _every(_below(k + 1))) for k in (4, 6)),
    *(Claim("below", (f"some digit is below {WORDS[k]}",), _some(_below(k))) for k in (2, 4)),
    *(Claim("below", (f"no digit is below {WORDS[k]}",), _every(_above(k - 1))) for k in (3, 5)),
    *(Claim("count", (f"there are at least {WORDS[k]} digits",), _at_least(k)) for k in (2, 3)),
)


def _compare(left: Ints, right: Ints) -> Ints:
    """1 where left > right, 0 where left < right, not said where they are equal."""
    return np.where(left == right, NOT_SAID, left > right).astype(np.int64)


SENTENCES: tuple[Claim, ...] = (
    Claim(
        "more",
        ("the left image has more digits", "the right image has fewer digits"),
        lambda a, b: _compare(a.count, b.count),
    ),
    Claim(
        "largest",
        ("the largest digit is in the left image", "the left image has the largest digit"),
        lambda a, b: _compare(a.largest, b.largest),
    ),
    Claim(
        "smallest",
        ("the smallest digit is in the left image", "the left image has the smallest digit"),
        lambda a, b: _compare(b.smallest, a.smallest),
    ),
    *(
        Claim(
            "both",
            (f"both images have an {name} digit", f"each image has an {name} digit"),
            lambda a, b, has=has: (_holds(a, has) & _holds(b, has)).astype(np.int64),
        )
        for name, has in (("even", _even), ("odd", _odd))
    ),
    *(
        Claim(
            "total",
            (f"at least {WORDS[k]} digits in total",),
            lambda a, b, k=k: (a.count + b.count >= k).astype(np.int64),
        )
        for k in (4, 5, 6)
    ),
)


def deal(labels: Ints, classes: int, per_row: int, rng: Rng) -> Ints:
    """Choose `per_row` texts for each row such that each text has each label equally often.

    Row by row, the texts chosen are those whose label on this row is least ahead of that text's
    rarest label, then those said least often so far, then at random.

    Args:
        labels: int64 `[rows, texts]`, 0 .. classes - 1, negative where a text does not apply; at
            least `per_row` texts apply to each row.

    Returns:
        int64 `[rows, per_row]`, the texts chosen; they differ within a row.
    """
    rows, texts = labels.shape
    seen = np.zeros((texts, classes), dtype=np.int64)
    every = np.arange(texts)
    chance = rng.permuted(np.tile(every, (rows, 1)), axis=1)
    chosen = np.empty((rows, per_row), dtype=np.int64)
    for row in range(rows):
        label = labels[row]
        ahead = seen[every, label] - seen.min(1)
        order = np.lexsort((chance[row], seen.sum(1), ahead, label < 0))[:per_row]
        chosen[row] = order
        seen[order, label[order]] += 1
    return chosen


def claims(
    said: Sequence[Claim], views: tuple[Canvases, ...], classes: int, per_row: int, rng: Rng
) -> tuple[Ints, list[str], list[str], Ints]:
    """Say `per_row` claims about each row of the given canvases.

    Args:
        views: Canvases of one length; a claim's label is a function of them all.

    Returns:
        The rows of which enough can be said, and kinds, texts and labels int64 of their examples;
        those of a row are neighbours.
    """
    labels = np.stack([claim.label(*views) for claim in said], axis=1)
    rows = np.flatnonzero((labels >= 0).sum(1) >= per_row)
    labels = labels[rows]
    chosen = deal(labels, classes, per_row, rng)
    label = np.take_along_axis(labels, chosen, axis=1).reshape(-1)
    wording = rng.integers(0, 1 << 30, label.shape)
    picked = [said[i] for i in chosen.reshape(-1).tolist()]
    texts = [c.wordings[w % len(c.wordings)] for c, w in zip(picked, wording, strict=True)]
    return rows, [c.kind for c in picked], texts, label


def captions(canvases: Canvases, per_image: int, rng: Rng) -> list[list[str]]:
    """`per_image` captions of each canvas: which digits, which of them is brightest, how many.

    A caption names the digits in rising order, or the brightest first; openings, nouns and
    adjectives have synonyms, and all choices are drawn.
    """
    n = len(canvases)
    draws = rng.integers(0, 1 << 30, (n, per_image, 3)).tolist()
    result = []
    for digit, tone, drawn in zip(
        canvases.digit.tolist(), canvases.tone.tolist(), draws, strict=True
    ):
        ranked = sorted((d, t) for d, t in zip(digit, tone, strict=True) if t >= 0)
        result.append([_caption(ranked, *draw) for draw in drawn])
    return result


def _caption(ranked: list[tuple[int, int]], form: int, synonym: int, order: int) -> str:
    """A caption of (digit, tone) pairs in rising order; the numbers choose form and words."""
    brightest = max(ranked, key=lambda pair: pair[1])
    if order % 2:
        ranked = [brightest, *(pair for pair in ranked if pair is not brightest)]
    adjective = ("bright", "shining")[synonym % 2]
    names = [
        f"a {adjective} {WORDS[pair[0]]}"
        if pair is brightest
        else f"{'an' if pair[0] == 8 else 'a'} {WORDS[pair[0]]}"
        for pair in ranked
    ]
    listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    noun = ("digit", "number")[synonym // 2 % 2] + ("s" if len(names) > 1 else "")
    return (
        listed,
        f"a picture of {listed}",
        f"{WORDS[len(names)]} {noun}: {listed}",
        f"an image with {WORDS[len(names)]} {noun}, {listed}",
    )[form % 4]
